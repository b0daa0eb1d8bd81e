//! Valid files, broken at random: every one is refused or read, none of them ends the process.

use crate::damage::{Damage, HOSTILE, apply, damage};
use gamma_tests::write::{File, Val, text, texts};
use gpt_gamma::gguf::{Array, Directory, Strings, TensorType, Value, decode, parse};
use proptest::prelude::*;

/// Files with all that the format has, small so that a random position is likely one that matters.
fn valid_files() -> Vec<Vec<u8>> {
    let every_type = File::new()
        .key("a", Val::U8(1))
        .key("b", Val::I16(-2))
        .key("c", Val::F64(0.5))
        .key("d", Val::Bool(1))
        .key("e", Val::Array(5, vec![Val::I32(1), Val::I32(2)]))
        .key("f", Val::Array(7, vec![]))
        .key("g", Val::I64(-9));
    let model = File::new()
        .key("general.architecture", text("gpt2"))
        .key("general.alignment", Val::U32(8))
        .key("tokenizer.ggml.tokens", texts(["a", "bc", "def"]))
        .tensor("x", TensorType::F16, &[2, 2])
        .tensor("y", TensorType::MXFP4, &[32])
        .tensor("z", TensorType::Q8_0, &[32, 2]);
    let vocabulary = File::new().key("tokenizer.ggml.merges", texts(["a b", "c d"]));
    let model = File { alignment: 8, ..model };
    vec![every_type.bytes(), model.bytes(), File { version: 2, ..model }.bytes(), vocabulary.bytes()]
}

/// Uses all that a directory offers; what it promises must hold.
fn use_all(file: &[u8], directory: &Directory) {
    for (key, value) in directory.metadata.iter() {
        assert!(!key.is_empty() && !value.to_string().is_empty() || matches!(value, Value::String(_)));
        let _ = directory.metadata.required::<u32>(key);
        let _ = directory.metadata.required::<&str>(key);
        let _ = directory.metadata.required::<Vec<i32>>(key);
        if let Ok(strings) = directory.metadata.required::<Strings>(key) {
            assert_eq!(strings.len(), strings.count());
        }
        if let Value::Array(array) = value {
            assert_eq!(array.len(), Array::iter(array).count());
        }
    }
    for tensor in &directory.tensors {
        let data = &file[tensor.range()];
        assert!(tensor.range().start >= directory.data_offset && tensor.shape().len() <= 4);
        if tensor.ty.is_supported() {
            assert_eq!(decode(tensor.ty, data).expect("whole blocks").len() as u64, tensor.n_elements());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(i in 0..4_usize, damages in proptest::collection::vec(damage(), 1..5)) {
        thread_local!(static FILES: Vec<Vec<u8>> = valid_files());
        let mut file = FILES.with(|files| files[i].clone());
        for damage in &damages {
            apply(damage, &mut file);
        }
        match parse(&file) {
            Ok(directory) => use_all(&file, &directory),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

#[test]
fn files_without_damage_are_read() {
    for file in valid_files() {
        use_all(&file, &parse(&file).unwrap());
    }
}

#[test]
fn every_number_in_every_place_is_survived() {
    for valid in valid_files() {
        for at in 0..valid.len() as u32 {
            for value in HOSTILE {
                for n_bytes in [4, 8] {
                    let mut file = valid.clone();
                    apply(&Damage::Number { at, value, n_bytes }, &mut file);
                    if let Ok(directory) = parse(&file) {
                        use_all(&file, &directory);
                    }
                }
            }
        }
    }
}
