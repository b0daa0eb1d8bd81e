//! What the parser accepts, and every single reason for which it refuses.

use gamma_tests::write::{File, Val, text};
use gpt_gamma::gguf::{Error, MAX_KEYS, MAX_TENSORS, Split, TensorType, ValueKind, ValueType, parse};

#[track_caller]
fn refuse(file: &File, expected: Error) {
    assert_eq!(parse(&file.bytes()), Err(expected));
}

/// One F32 tensor of 8 elements called `a`.
fn one_tensor() -> File {
    File::new().tensor("a", TensorType::F32, &[8])
}

#[test]
fn a_small_file_is_read_in_full() {
    let file = File::new()
        .key("general.architecture", text("gpt2"))
        .key("general.alignment", Val::U32(64))
        .tensor("token_embd.weight", TensorType::Q8_0, &[64, 3])
        .tensor("scalar", TensorType::F32, &[])
        .tensor("cube", TensorType::MXFP4, &[32, 2, 3, 4]);
    let file = File { alignment: 64, ..file };
    for version in [2, 3] {
        let bytes = File { version, ..file.clone() }.bytes();
        let directory = parse(&bytes).unwrap();
        assert_eq!((directory.version, directory.alignment), (version, 64));
        assert_eq!(directory.data_offset, file.head().len().next_multiple_of(64));
        assert_eq!(directory.metadata.len(), 2);
        assert_eq!(directory.metadata.required("general.architecture"), Ok("gpt2"));

        let [embedding, scalar, cube] = &directory.tensors[..] else { panic!("{:?}", directory.tensors) };
        assert_eq!((&*embedding.name, embedding.ty), ("token_embd.weight", TensorType::Q8_0));
        assert_eq!((embedding.shape(), embedding.dims), (&[64, 3][..], [64, 3, 1, 1]));
        assert_eq!((embedding.offset, embedding.n_bytes), (directory.data_offset, 2 * 34 * 3));
        assert_eq!((scalar.shape(), scalar.n_dims, scalar.n_elements(), scalar.n_bytes), (&[1][..], 0, 1, 4));
        assert_eq!(scalar.offset, directory.data_offset + 256);
        assert_eq!((cube.shape(), cube.n_elements(), cube.n_bytes), (&[32, 2, 3, 4][..], 768, 24 * 17));
        assert_eq!(cube.range(), directory.data_offset + 320..bytes.len());
    }
}

#[test]
fn a_vocabulary_needs_no_tensors_and_no_padding() {
    let file = File::new().key("tokenizer.ggml.model", text("gpt2"));
    let directory = parse(&file.bytes()).unwrap();
    assert_eq!((directory.tensors.len(), directory.data_offset), (0, file.head().len()));
    assert_eq!(parse(&File::new().bytes()).unwrap().data_offset, 24);
}

#[test]
fn other_magics_are_refused() {
    refuse(&File { magic: *b"PK\x03\x04", ..File::new() }, Error::BadMagic { found: 0x0403_4B50 });
    for (magic, name) in [(b"lmgg", "ggml"), (b"ggml", "ggml"), (b"fmgg", "ggmf"), (b"tjgg", "ggjt"), (b"algg", "ggla")]
    {
        refuse(&File { magic: *magic, ..File::new() }, Error::LegacyFormat { name });
    }
}

#[test]
fn other_versions_are_refused() {
    let version = |version| File { version, ..File::new() };
    refuse(&version(1), Error::Version1);
    refuse(&version(0x0300_0000), Error::BigEndian { version: 3 });
    refuse(&version(0x0200_0000), Error::BigEndian { version: 2 });
    for found in [0, 4, 0x1000, 0x0001_0003, u32::MAX] {
        refuse(&version(found), Error::UnsupportedVersion { found });
    }
}

#[test]
fn every_truncation_of_the_directory_is_refused() {
    let file = one_tensor()
        .key("list", Val::Array(8, vec![text("a"), text("bc")]))
        .key("numbers", Val::Array(3, vec![Val::I16(1), Val::I16(2)]))
        .key("x", Val::F64(1.0));
    let (bytes, head) = (file.bytes(), file.head().len());
    parse(&bytes).unwrap();
    for n in 0..head {
        let error = parse(&bytes[..n]).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{n} bytes: {error}");
    }
    for n in head..bytes.len() {
        let error = parse(&bytes[..n]).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. } | Error::TensorTruncated { .. }), "{n} bytes: {error}");
    }
    assert_eq!(parse(b"GGUF"), Err(Error::Truncated { what: "version", offset: 4, need: 4, have: 0 }));
    assert_eq!(parse(b""), Err(Error::Truncated { what: "magic", offset: 0, need: 4, have: 0 }));
}

#[test]
fn counts_that_the_file_cannot_hold_are_refused() {
    for (n, need) in [(1, 14), (1 << 40, 14 << 40), (u64::MAX, u64::MAX)] {
        let error = Error::Truncated { what: "metadata keys", offset: 24, need, have: 0 };
        refuse(&File { n_keys: Some(n), ..File::new() }, error);
    }
    for (n, need) in [(1, 24), (1 << 40, 24 << 40), (1 << 63, u64::MAX)] {
        let error = Error::Truncated { what: "tensor infos", offset: 24, need, have: 0 };
        refuse(&File { n_tensors: Some(n), ..File::new() }, error);
    }
}

#[test]
fn counts_over_the_limit_are_refused() {
    let mut bytes = File { n_keys: Some(MAX_KEYS as u64 + 1), ..File::new() }.bytes();
    bytes.resize(14 * (MAX_KEYS + 10), 0);
    assert_eq!(parse(&bytes), Err(Error::TooMany { what: "metadata keys", found: 65537, most: MAX_KEYS }));
    let mut bytes = File { n_tensors: Some(MAX_TENSORS as u64 + 1), ..File::new() }.bytes();
    bytes.resize(24 * (MAX_TENSORS + 10), 0);
    assert_eq!(parse(&bytes), Err(Error::TooMany { what: "tensor infos", found: 65537, most: MAX_TENSORS }));
}

#[test]
fn lengths_of_strings_are_checked() {
    let string = |length: u64| File::new().key("k", Val::Raw(8, length.to_le_bytes().to_vec()));
    parse(&string(0).bytes()).unwrap();
    refuse(&string(1), Error::Truncated { what: "string", offset: 45, need: 1, have: 0 });
    refuse(&string(1 << 30), Error::Truncated { what: "string", offset: 45, need: 1 << 30, have: 0 });
    for found in [(1 << 30) + 1, u64::MAX] {
        refuse(&string(found), Error::TooLong { what: "string", offset: 37, found, most: 1 << 30 });
    }
}

#[test]
fn lengths_of_arrays_are_checked() {
    let array = |element: u32, length: u64| {
        let mut bytes = element.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        File::new().key("k", Val::Raw(9, bytes))
    };
    for element in [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12] {
        parse(&array(element, 0).bytes()).unwrap();
        let error = parse(&array(element, 1 << 30).bytes()).unwrap_err();
        assert!(matches!(error, Error::Truncated { what: "array", have: 0, .. }), "{error}");
        refuse(&array(element, 1 << 40), Error::TooLong { what: "array", offset: 41, found: 1 << 40, most: 1 << 30 });
    }
    // Two strings announced, one there.
    let mut short = array(8, 2).head();
    short.extend([0; 15]);
    assert_eq!(parse(&short), Err(Error::Truncated { what: "array", offset: 49, need: 16, have: 15 }));
    short.extend([0; 1]);
    short[49] = 1; // The first string eats a byte of the second one's length.
    assert_eq!(parse(&short), Err(Error::Truncated { what: "string", offset: 58, need: 8, have: 7 }));
}

#[test]
fn nested_arrays_are_refused() {
    let nested = Val::Array(9, vec![Val::Array(0, vec![Val::U8(1)])]);
    refuse(&File::new().key("deep", nested), Error::NestedArray { key: "deep".into() });
}

#[test]
fn value_types_that_do_not_exist_are_refused() {
    for found in [13, 255, u32::MAX] {
        let error = Error::UnknownValueType { key: "k".into(), found };
        refuse(&File::new().key("k", Val::Raw(found, vec![0; 64])), error.clone());
        refuse(&File::new().key("k", Val::Array(found, vec![])), error);
    }
}

#[test]
fn keys_must_be_unique_filled_and_utf8() {
    let key = |key: &[u8]| File::new().key("first", Val::U8(1)).key(key, Val::U8(2));
    refuse(&key(b"first"), Error::DuplicateKey { key: "first".into() });
    refuse(&key(b""), Error::EmptyKey { offset: 42 });
    refuse(&key(b"caf\xE9"), Error::NotUtf8 { what: "metadata key", offset: 42 });
    parse(&key(&[b'k'; 65535]).bytes()).unwrap();
    let found = 65536;
    refuse(&key(&[b'k'; 65536]), Error::TooLong { what: "metadata key", offset: 42, found, most: 65535 });
}

#[test]
fn the_alignment_is_a_power_of_two_in_a_u32() {
    for alignment in [1, 2, 32, 4096] {
        let file = one_tensor().key("general.alignment", Val::U32(alignment as u32));
        let directory = parse(&File { alignment, ..file }.bytes()).unwrap();
        assert_eq!((directory.alignment, directory.data_offset % alignment), (alignment, 0));
    }
    for found in [0, 24, 33, u32::MAX] {
        refuse(&one_tensor().key("general.alignment", Val::U32(found)), Error::BadAlignment { found });
    }
    for (value, found) in [(Val::U64(32), ValueType::U64), (Val::I32(32), ValueType::I32)] {
        let found = ValueKind::Scalar(found);
        refuse(&one_tensor().key("general.alignment", value), Error::AlignmentType { found });
    }
}

#[test]
fn room_for_the_padding_is_needed_as_soon_as_there_is_a_tensor() {
    let file = File::new().tensor("none", TensorType::F32, &[0]);
    let n = file.head().len();
    assert!(!n.is_multiple_of(32), "the case needs padding");
    let need = (n.next_multiple_of(32) - n) as u64;
    let what = "padding before the tensor data";
    assert_eq!(parse(&file.head()), Err(Error::Truncated { what, offset: n, need, have: 0 }));
    assert_eq!(parse(&file.bytes()).unwrap().tensors[0].n_bytes, 0);
    // An alignment that no address is a multiple of.
    let file = one_tensor().key("general.alignment", Val::U32(1 << 31));
    assert!(matches!(parse(&file.bytes()), Err(Error::Truncated { need: 0x7FFF_FF00.., .. })));
}

#[test]
fn tensor_names_are_unique_short_and_utf8() {
    let name = |name: &[u8]| one_tensor().tensor_at(name, 0, &[8], 32);
    refuse(&name(b"a"), Error::DuplicateTensor { name: "a".into() });
    refuse(&name(b"\xFF"), Error::NotUtf8 { what: "tensor name", offset: 24 + 33 });
    parse(&name(&[b'n'; 63]).bytes()).unwrap();
    parse(&name(b"").bytes()).unwrap();
    refuse(&name(&[b'n'; 64]), Error::TooLong { what: "tensor name", offset: 24 + 33, found: 64, most: 63 });
}

#[test]
fn more_than_four_dimensions_are_refused() {
    parse(&File::new().tensor("a", TensorType::F32, &[1, 2, 3, 4]).bytes()).unwrap();
    refuse(&File::new().tensor("a", TensorType::F32, &[1; 5]), Error::TooManyDims { tensor: "a".into(), found: 5 });
}

#[test]
fn sizes_that_overflow_are_refused() {
    let half = 1 << 32;
    for dims in [
        [1 << 63, 1, 1, 1], // a dimension that is negative as an i64
        [u64::MAX, 1, 1, 1],
        [half, 1 << 31, 1, 1], // 2⁶³ elements
        [half, half, 1, 1],    // wraps to none
        [half, half, 0, 1],    // is none, by a zero that comes too late
        [0, half, half, 1],    // or too early
        [1 << 62, 1, 1, 1],    // elements fit, 2⁶⁴ bytes do not
        [1 << 61, 1, 1, 1],    // 2⁶³ bytes
        [1 << 31, 1 << 16, 1 << 16, 2],
    ] {
        let tensor = File::new().tensor_at("a", 0, &dims, 0).head();
        assert_eq!(parse(&tensor), Err(Error::TensorTooLarge { tensor: "a".into(), dims }), "{dims:?}");
    }
    // Fits 64 bits, but no file: 2⁶⁰ elements.
    let error = parse(&[File::new().tensor_at("a", 0, &[1 << 60], 0).head(), vec![0; 64]].concat()).unwrap_err();
    assert!(matches!(error, Error::TensorTruncated { n_bytes: 0x4000_0000_0000_0000, .. }), "{error:?}");
}

#[test]
fn zero_dimensions_hold_no_bytes() {
    let file = File::new().tensor("a", TensorType::Q4_K, &[0, 5]).tensor("b", TensorType::F32, &[7, 0, 3]);
    let directory = parse(&file.bytes()).unwrap();
    assert!(directory.tensors.iter().all(|tensor| tensor.n_bytes == 0 && tensor.n_elements() == 0));
}

#[test]
fn rows_are_whole_blocks() {
    for (ty, row) in
        [(TensorType::Q8_0, 48), (TensorType::Q4_K, 2880), (TensorType::MXFP4, 16), (TensorType::NVFP4, 32)]
    {
        refuse(&File::new().tensor("a", ty, &[row, 256]), Error::PartialBlock { tensor: "a".into(), ty, row });
    }
    for &ty in TensorType::ALL {
        let directory = parse(&File::new().tensor("a", ty, &[512, 3]).bytes()).unwrap();
        assert_eq!(directory.tensors[0].n_bytes, 3 * 512 / ty.block_len() * ty.block_bytes(), "{ty}");
    }
}

#[test]
fn removed_and_unknown_types_are_refused() {
    for (id, was) in [
        (4, "Q4_2"),
        (5, "Q4_3"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
        (33, "Q4_0_8_8"),
        (36, "IQ4_NL_4_4"),
        (37, "IQ4_NL_4_8"),
        (38, "IQ4_NL_8_8"),
    ] {
        refuse(&File::new().tensor_at("a", id, &[256], 0), Error::RemovedType { tensor: "a".into(), id, was });
    }
    for id in [43, 142, u32::MAX] {
        refuse(&File::new().tensor_at("a", id, &[256], 0), Error::UnknownType { tensor: "a".into(), id });
    }
}

#[test]
fn type_numbers_are_ggmls() {
    let known: Vec<u32> = TensorType::ALL.iter().map(|ty| ty.id()).collect();
    let expected: Vec<u32> = (0..43).filter(|id| TensorType::removed(*id).is_none()).collect();
    assert_eq!(known, expected);
    assert_eq!(TensorType::MAX_ID, 42);
    for &ty in TensorType::ALL {
        assert_eq!(TensorType::from_id(ty.id()), Some(ty));
    }
    assert_eq!((TensorType::IQ2_XS.id(), TensorType::IQ2_XS.to_string()), (17, "IQ2_XS".to_owned()));
    assert_eq!((TensorType::MXFP4.id(), TensorType::BF16.id(), TensorType::Q4_K.id()), (39, 30, 12));
    assert!(!TensorType::Q8_1.is_supported() && !TensorType::IQ4_NL.is_supported());
}

/// Elements and bytes per block as gguf-py 0.19.0 has them, but for Q8_1 (its 40 is an old layout, ggml has 36) and Q2_0,
/// which is newer.
#[test]
fn block_sizes_are_ggmls() {
    let sizes = [
        (0, 1, 4),
        (1, 1, 2),
        (2, 32, 18),
        (3, 32, 20),
        (6, 32, 22),
        (7, 32, 24),
        (8, 32, 34),
        (9, 32, 36),
        (10, 256, 84),
        (11, 256, 110),
        (12, 256, 144),
        (13, 256, 176),
        (14, 256, 210),
        (15, 256, 292),
        (16, 256, 66),
        (17, 256, 74),
        (18, 256, 98),
        (19, 256, 50),
        (20, 32, 18),
        (21, 256, 110),
        (22, 256, 82),
        (23, 256, 136),
        (24, 1, 1),
        (25, 1, 2),
        (26, 1, 4),
        (27, 1, 8),
        (28, 1, 8),
        (29, 256, 56),
        (30, 1, 2),
        (34, 256, 54),
        (35, 256, 66),
        (39, 32, 17),
        (40, 64, 36),
        (41, 128, 18),
        (42, 64, 18),
    ];
    let found: Vec<_> = TensorType::ALL.iter().map(|ty| (ty.id(), ty.block_len(), ty.block_bytes())).collect();
    assert_eq!(found, sizes);
}

#[test]
fn offsets_are_multiples_of_the_alignment() {
    for offset in [1, 16, 33] {
        let error = Error::Misaligned { tensor: "a".into(), offset, alignment: 32 };
        refuse(&File::new().tensor_at("a", 0, &[8], offset), error);
    }
}

#[test]
fn tensors_may_lie_in_any_order_with_gaps_and_bytes_behind() {
    let mut bytes = File::new()
        .tensor_at("last", 0, &[8], 256)
        .tensor_at("first", 0, &[8], 64)
        .tensor_at("nothing", 0, &[0], 64)
        .tensor_at("middle", 0, &[8], 96)
        .bytes();
    bytes.extend([0xAA; 7]);
    let directory = parse(&bytes).unwrap();
    let offsets: Vec<usize> = directory.tensors.iter().map(|tensor| tensor.offset - directory.data_offset).collect();
    assert_eq!(offsets, [256, 64, 64, 96]);
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let overlap = |first: &str, second: &str| Error::Overlap { first: first.into(), second: second.into() };
    refuse(&one_tensor().tensor_at("b", 0, &[8], 0), overlap("a", "b"));
    let file = File::new().tensor_at("b", 0, &[1], 96).tensor_at("a", 0, &[25], 0);
    refuse(&file, overlap("a", "b"));
    // A small tensor in the middle of a large one, and one that holds nothing in between.
    let file = File::new().tensor_at("large", 0, &[64], 0).tensor_at("none", 0, &[0], 32).tensor_at("in", 0, &[1], 64);
    refuse(&file, overlap("large", "in"));
    parse(&File::new().tensor_at("b", 0, &[1], 96).tensor_at("a", 0, &[24], 0).bytes()).unwrap();
}

#[test]
fn tensor_data_ends_inside_the_file() {
    let file = one_tensor();
    let bytes = file.bytes();
    parse(&bytes).unwrap();
    let error = Error::TensorTruncated {
        tensor: "a".into(),
        n_bytes: 32,
        offset: bytes.len() - 32,
        file_bytes: bytes.len() - 1,
    };
    assert_eq!(parse(&bytes[..bytes.len() - 1]), Err(error));
    // Offsets whose sum with start and size leaves 64 bits.
    for offset in [1 << 40, 1 << 63, u64::MAX - 31] {
        let mut bytes = File::new().tensor_at("a", 0, &[8], offset).head();
        bytes.resize(256, 0);
        let error = parse(&bytes).unwrap_err();
        assert!(matches!(error, Error::TensorTruncated { n_bytes: 32, file_bytes: 256, .. }), "{error:?}");
    }
}

#[test]
fn sums_of_sizes_that_wrap_are_refused() {
    // Size and offset fit 64 bits, their sum comes out inside the file (CVE-2025-53630, CVE-2026-27940).
    let half = 1 << 62;
    let mut bytes = File::new().tensor_at("a", TensorType::I8.id(), &[half], 0_u64.wrapping_sub(half)).head();
    bytes.resize(512, 0);
    assert!(matches!(parse(&bytes), Err(Error::TensorTruncated { n_bytes: 0x4000_0000_0000_0000, .. })));
}

#[test]
fn messages_name_subject_fact_and_numbers() {
    let message = |file: &File| parse(&file.bytes()).unwrap_err().to_string();
    assert_eq!(
        message(&File::new().tensor_at("blk.0.ffn_up_exps.weight", 4, &[32], 0)),
        "tensor blk.0.ffn_up_exps.weight has type 4, which was removed from ggml (it was Q4_2); Ollama's early gpt-oss \
         blobs use this number for MXFP4: use a GGUF made by llama.cpp's converter instead"
    );
    assert_eq!(
        message(&File::new().tensor("x", TensorType::Q4_K, &[2880])),
        "tensor x has rows of 2880 elements, expected a multiple of 256, the block of Q4_K"
    );
    assert_eq!(
        message(&File::new().key("general.alignment", Val::Str(b"32".to_vec()))),
        "general.alignment has type string, expected u32"
    );
}

#[test]
fn splits_are_recognized() {
    let split = |keys: &[(&str, Val)]| {
        let file = keys.iter().fold(File::new(), |file, (key, value)| file.key(*key, value.clone()));
        Split::of(&parse(&file.bytes()).unwrap().metadata)
    };
    let (no, count, tensors) = ("split.no", "split.count", "split.tensors.count");
    assert_eq!(split(&[]), Ok(None));
    assert_eq!(split(&[(count, Val::U16(0))]), Ok(None));
    assert_eq!(split(&[(no, Val::U16(0)), (count, Val::U16(1)), (tensors, Val::I32(9))]), Ok(None));
    let found = split(&[(no, Val::U16(2)), (count, Val::U16(3)), (tensors, Val::I32(9))]);
    assert_eq!(found, Ok(Some(Split { no: 2, count: 3, n_tensors: 9 })));
    assert!(split(&[(no, Val::U16(2)), (count, Val::U16(3))]).is_err());
    assert!(split(&[(no, Val::U16(2)), (count, Val::U16(3)), (tensors, Val::I32(-1))]).is_err());
}
