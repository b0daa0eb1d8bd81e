//! Look-ups: what stands for what, and what errors say.

use gamma_tests::write::{File, Val, text, texts};
use gpt_gamma::gguf::{Metadata, MetadataError, Strings, Value, ValueKind, ValueType, parse};

fn metadata(file: File) -> Metadata {
    parse(&file.bytes()).expect("well-formed").metadata
}

fn one(value: Val) -> Metadata {
    metadata(File::new().key("k", value))
}

#[test]
fn pairs_keep_their_order_and_type() {
    let metadata = metadata(
        File::new().key("z", Val::I8(-1)).key("a", text("é")).key("m", Val::Array(5, vec![Val::I32(-7), Val::I32(8)])),
    );
    let pairs: Vec<(&str, String, String)> =
        metadata.iter().map(|(key, value)| (key, value.kind().to_string(), value.to_string())).collect();
    let expected = [("z", "i8", "-1"), ("a", "string", "é"), ("m", "array of i32", "2 × i32")];
    assert_eq!(pairs, expected.map(|(key, kind, value)| (key, kind.to_owned(), value.to_owned())));
    assert_eq!(metadata.value("a"), Some(&Value::String("é".as_bytes().into())));
    assert_eq!(metadata.value("b"), None);
}

#[test]
fn every_integer_type_stands_for_a_count() {
    for value in [Val::U8(7), Val::I8(7), Val::U16(7), Val::I16(7), Val::U32(7), Val::I32(7), Val::U64(7), Val::I64(7)]
    {
        let metadata = one(value);
        assert_eq!(metadata.required::<u32>("k"), Ok(7));
        assert_eq!(metadata.required::<u64>("k"), Ok(7));
        assert_eq!(metadata.required::<usize>("k"), Ok(7));
        assert_eq!(metadata.required::<i32>("k"), Ok(7));
    }
}

#[test]
fn integers_that_do_not_fit_are_refused() {
    let out_of_range = |metadata: Metadata| match metadata.required::<u32>("k") {
        Err(MetadataError::OutOfRange { found, .. }) => found,
        other => panic!("{other:?}"),
    };
    assert_eq!(out_of_range(one(Val::I32(-1))), -1);
    assert_eq!(out_of_range(one(Val::I64(i64::MIN))), i64::MIN.into());
    assert_eq!(out_of_range(one(Val::U64(1 << 32))), 1 << 32);
    assert_eq!(one(Val::U64(u64::MAX)).required::<u64>("k"), Ok(u64::MAX));
    assert_eq!(
        one(Val::I32(-1)).required::<u32>("k").unwrap_err().to_string(),
        "metadata key k has value -1, expected an integer from 0 to 2^32 - 1"
    );
}

#[test]
fn both_float_types_stand_for_a_float_and_nothing_else_does() {
    assert_eq!(one(Val::F32(1.0e-5)).required::<f32>("k"), Ok(1.0e-5));
    assert_eq!(one(Val::F64(1.0e-5)).required::<f32>("k"), Ok(1.0e-5));
    for value in [Val::U32(1), Val::Bool(1), text("1")] {
        assert!(matches!(one(value).required::<f32>("k"), Err(MetadataError::WrongType { .. })));
    }
}

#[test]
fn a_bool_is_true_unless_its_byte_is_zero() {
    for (byte, expected) in [(0, false), (1, true), (2, true), (255, true)] {
        assert_eq!(one(Val::Bool(byte)).required::<bool>("k"), Ok(expected));
    }
    assert!(one(Val::U8(1)).required::<bool>("k").is_err());
    assert!(one(Val::Bool(1)).required::<u32>("k").is_err());
}

#[test]
fn texts_are_utf8_and_bytes_are_anything() {
    let metadata = one(Val::Str(b"caf\xE9\0".to_vec()));
    assert_eq!(metadata.required::<&[u8]>("k"), Ok(&b"caf\xE9\0"[..]));
    assert_eq!(metadata.required::<&str>("k"), Err(MetadataError::NotUtf8 { key: "k".into() }));
    // What is printed cannot steer a terminal.
    assert_eq!(one(text("a\x1b[2J\n")).value("k").unwrap().to_string(), "a\\u{1b}[2J\\n");
}

#[test]
fn arrays_of_strings_are_walked_without_copies() {
    let metadata = one(Val::Array(8, vec![text("a"), Val::Str(vec![]), Val::Str(b"\xF0\x9F".to_vec())]));
    let strings: Strings = metadata.required("k").unwrap();
    assert_eq!(strings.len(), 3);
    assert_eq!(strings.clone().collect::<Vec<_>>(), [b"a", &b""[..], b"\xF0\x9F"]);
    assert_eq!(strings.skip(1).len(), 2);
    assert_eq!(one(texts([])).required::<Strings>("k").unwrap().count(), 0);
}

#[test]
fn arrays_of_numbers_convert_as_single_numbers_do() {
    let integers = one(Val::Array(11, vec![Val::I64(1), Val::I64(-2)]));
    assert_eq!(integers.required::<Vec<i32>>("k"), Ok(vec![1, -2]));
    assert!(matches!(
        integers.required::<Vec<u32>>("k"),
        Err(MetadataError::OutOfRange { key, found: -2, .. }) if key == "k[1]"
    ));
    let floats = one(Val::Array(12, vec![Val::F64(0.5)]));
    assert_eq!(floats.required::<Vec<f32>>("k"), Ok(vec![0.5]));
    assert!(matches!(floats.required::<Vec<u32>>("k"), Err(MetadataError::WrongType { .. })));
    assert!(matches!(one(Val::U32(1)).required::<Vec<u32>>("k"), Err(MetadataError::WrongType { .. })));
    match one(Val::Array(2, vec![Val::U16(3), Val::U16(4)])).value("k") {
        Some(Value::Array(array)) => {
            assert_eq!((array.len(), array.is_empty(), array.element()), (2, false, ValueType::U16));
            assert_eq!(array.iter().collect::<Vec<_>>(), [Value::U16(3), Value::U16(4)]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn errors_name_key_wanted_and_found() {
    let metadata = one(Val::Array(8, vec![]));
    let error = metadata.required::<u32>("gpt2.block_count").unwrap_err();
    assert_eq!(error.to_string(), "metadata key gpt2.block_count is missing, expected an integer from 0 to 2^32 - 1");
    let error = metadata.required::<&str>("k").unwrap_err();
    let found = ValueKind::Array(ValueType::String);
    assert_eq!(error, MetadataError::WrongType { key: "k".into(), wanted: "a string", found });
    assert_eq!(error.to_string(), "metadata key k has type array of string, expected a string");
    assert_eq!(metadata.optional::<&str>("absent"), Ok(None));
    assert!(metadata.optional::<&str>("k").is_err());
}
