//! Files whose tensors have other types than usual.

use std::fs;

use gamma_tests::{engine_device, models};
use gpt_gamma::adapter::{InferenceAdapter, detect};
use gpt_gamma::engine::{Engine, Options};
use gpt_gamma::gguf::{DEFAULT_ALIGNMENT, TensorInfo, TensorType, decode};
use gpt_gamma::model_file::ModelFile;

use crate::reference::relative_error;

/// The bundled gpt-oss with the tensors that `widened` names as F32 or F16: the same numbers, since what they were is Q8_0.
fn file_with(widened: impl Fn(&str) -> Option<TensorType>) -> ModelFile {
    let path = models().join("tiny-gpt-oss-mxfp4.gguf");
    let (bytes, model) = (fs::read(&path).unwrap(), ModelFile::open(&path).unwrap());
    let named = |name: &str| [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    // Keys stay as they are: all up to the first tensor's name.
    let first = named(&model.tensors()[0].name);
    let keys = bytes.windows(first.len()).position(|window| window == first).unwrap();
    let (mut head, mut data) = (bytes[..keys].to_vec(), Vec::new());
    for TensorInfo { name, ty, dims, n_dims, offset, n_bytes } in model.tensors() {
        let source = &bytes[*offset..offset + n_bytes];
        let (ty, new) = match widened(name) {
            None => (*ty, source.to_vec()),
            Some(wide) => {
                let values = decode(*ty, source).unwrap();
                let bytes = match wide {
                    TensorType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
                    _ => values.iter().flat_map(|&value| half::f16::from_f32(value).to_le_bytes()).collect(),
                };
                (wide, bytes)
            }
        };
        head.extend(named(name));
        head.extend((*n_dims as u32).to_le_bytes());
        dims[..*n_dims].iter().for_each(|dim| head.extend(dim.to_le_bytes()));
        head.extend(ty.id().to_le_bytes());
        head.extend((data.len() as u64).to_le_bytes());
        data.extend(new);
        data.resize(data.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
    }
    head.resize(head.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
    let changed = tempfile::NamedTempFile::new().unwrap();
    fs::write(changed.path(), [head, data].concat()).unwrap();
    ModelFile::open(changed.path()).unwrap()
}

/// Logits after a prompt, and after one token more.
fn logits(file: &ModelFile) -> [Vec<f32>; 2] {
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let options = Options { n_ctx: 128, ..Options::for_model(adapter.spec()) };
    let mut engine = Engine::load(engine_device(), file, adapter.spec(), options, &mut |_, _| {}).unwrap();
    let tokens: Vec<u32> = (0..70).map(|i| (i * 677 + 13) % 2000).collect();
    engine.prefill(&tokens, &mut |_| {}).unwrap();
    let after_prompt = engine.logits().unwrap();
    engine.decode(5).unwrap();
    [after_prompt, engine.logits().unwrap()]
}

#[test]
fn queries_keys_and_values_may_differ_in_type() {
    let expected = logits(&file_with(|_| None));
    let mixed = file_with(|name| match name {
        "blk.0.attn_q.weight" | "blk.2.attn_v.weight" => Some(TensorType::F32),
        "blk.1.attn_k.weight" => Some(TensorType::F16),
        _ => None,
    });
    for (found, expected) in logits(&mixed).iter().zip(&expected) {
        // Rounding a scale times a byte to f16 changes a weight by 2⁻¹¹ at most; the bar of all models is 1e-2.
        let error = relative_error(found, expected);
        assert!(error < 2e-3, "{error:.2e}");
    }
}
