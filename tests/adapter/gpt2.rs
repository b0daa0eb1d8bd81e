//! GPT-2: the bundled models map in full, and whatever does not fit is refused by name.

use crate::damage::{apply, damage};
use gamma_tests::write::{File, Val, text, texts};
use gpt_gamma::adapter::{
    AttentionSpec, Error, FfnSpec, GptInferenceAdapter, InferenceAdapter, LayerSpec, LinearSpec, ModelSpec, NormSpec,
    QkvSpec, TensorId, detect,
};
use gpt_gamma::gguf::{MetadataError, TensorInfo, TensorType, parse};
use gpt_gamma::model_file::ModelFile;
use proptest::prelude::*;
use std::path::Path;

/// A model of 2 layers, 4 heads of 8, width 32, feed-forward width 96, context 16, 10 tokens, in F32.
fn small() -> File {
    let file = File::new()
        .key("general.architecture", text("gpt2"))
        .key("gpt2.block_count", Val::U32(2))
        .key("gpt2.context_length", Val::U32(16))
        .key("gpt2.embedding_length", Val::U32(32))
        .key("gpt2.feed_forward_length", Val::U32(96))
        .key("gpt2.attention.head_count", Val::U32(4))
        .key("gpt2.attention.layer_norm_epsilon", Val::F32(1.0e-5))
        .key("tokenizer.ggml.tokens", texts("abcdefghij".split_inclusive(|_| true)))
        .tensor("token_embd.weight", TensorType::F32, &[32, 10])
        .tensor("position_embd.weight", TensorType::F32, &[32, 16])
        .tensor("output_norm.weight", TensorType::F32, &[32])
        .tensor("output_norm.bias", TensorType::F32, &[32]);
    (0..2).fold(file, |file, i| {
        let name = |name: &str| format!("blk.{i}.{name}");
        file.tensor(&name("attn_norm.weight"), TensorType::F32, &[32])
            .tensor(&name("attn_norm.bias"), TensorType::F32, &[32])
            .tensor(&name("attn_qkv.weight"), TensorType::F32, &[32, 96])
            .tensor(&name("attn_qkv.bias"), TensorType::F32, &[96])
            .tensor(&name("attn_output.weight"), TensorType::F32, &[32, 32])
            .tensor(&name("attn_output.bias"), TensorType::F32, &[32])
            .tensor(&name("ffn_norm.weight"), TensorType::F32, &[32])
            .tensor(&name("ffn_norm.bias"), TensorType::F32, &[32])
            .tensor(&name("ffn_up.weight"), TensorType::F32, &[32, 96])
            .tensor(&name("ffn_up.bias"), TensorType::F32, &[96])
            .tensor(&name("ffn_down.weight"), TensorType::F32, &[96, 32])
            .tensor(&name("ffn_down.bias"), TensorType::F32, &[32])
    })
}

fn adapt(file: &File) -> Result<GptInferenceAdapter, Error> {
    let directory = parse(&file.bytes()).expect("well-formed");
    detect(&directory.metadata, &directory.tensors)
}

#[track_caller]
fn refuse(file: &File, expected: Error) {
    assert_eq!(adapt(file), Err(expected));
}

/// The small model with `gpt2.NAME` replaced or added.
fn with(name: &str, value: Val) -> File {
    with_key(&format!("gpt2.{name}"), value)
}

fn with_key(key: &str, value: Val) -> File {
    without_key(key).key(key, value)
}

fn without_key(key: &str) -> File {
    let mut file = small();
    file.keys.retain(|(found, _)| found != key.as_bytes());
    file
}

/// The small model with another shape or type for one tensor.
fn with_tensor(name: &str, ty: TensorType, dims: &[u64]) -> File {
    let mut file = small();
    let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes());
    let tensor = tensor.expect("a tensor of the small model");
    (tensor.ty, tensor.dims) = (ty.id(), dims.to_vec());
    file
}

fn without_tensor(name: &str) -> File {
    let mut file = small();
    file.tensors.retain(|tensor| tensor.name != name.as_bytes());
    file
}

fn out_of_range(key: &str, found: usize, most: usize) -> Error {
    Error::OutOfRange { key: key.into(), found, least: 1, most }
}

#[test]
fn every_tensor_plays_its_part() {
    let adapter = adapt(&small()).unwrap();
    assert_eq!(adapter.architecture(), "gpt2");
    let norm = |at| NormSpec::Layer { gamma: TensorId(at), beta: TensorId(at + 1), epsilon: 1.0e-5 };
    let linear = |at, n_in, n_out| LinearSpec { weight: TensorId(at), bias: Some(TensorId(at + 1)), n_in, n_out };
    let layer = |at| LayerSpec {
        attention_norm: norm(at),
        qkv: QkvSpec::Fused(linear(at + 2, 32, 96)),
        attention: AttentionSpec { scale: 8_f32.sqrt().recip(), window: None, sinks: None, rope: None },
        attention_output: linear(at + 4, 32, 32),
        ffn_norm: norm(at + 6),
        ffn: FfnSpec::Gelu { up: linear(at + 8, 32, 96), down: linear(at + 10, 96, 32) },
    };
    let expected = ModelSpec {
        architecture: "gpt2",
        n_vocab: 10,
        n_ctx: 16,
        d_model: 32,
        n_layer: 2,
        n_head: 4,
        n_head_kv: 4,
        d_head: 8,
        d_ff: 96,
        token_embedding: TensorId(0),
        position_embedding: Some(TensorId(1)),
        layers: vec![layer(4), layer(16)],
        output_norm: norm(2),
        output: LinearSpec { weight: TensorId(0), bias: None, n_in: 32, n_out: 10 },
    };
    assert_eq!(*adapter.spec(), expected);
}

#[test]
fn the_bundled_models_map_in_full() {
    for name in ["tiny-gpt2-f16.gguf", "tiny-gpt2-q4_k_m.gguf", "tiny-gpt2-mxfp4.gguf"] {
        let file = ModelFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)).unwrap();
        let adapter = detect(file.metadata(), file.tensors()).unwrap();
        let spec = adapter.spec();
        assert_eq!((spec.n_layer, spec.d_model, spec.n_head, spec.n_head_kv, spec.d_head), (4, 256, 4, 4, 64));
        assert_eq!((spec.n_vocab, spec.n_ctx, spec.d_ff, spec.layers.len()), (2048, 512, 1024, 4));
        assert_eq!(spec.output.weight, spec.token_embedding, "the head is tied");
        assert_eq!(spec.layers[0].attention.scale, 0.125);
        // The order of tensors differs between these files; the names do not.
        let name = |id: TensorId| &*file.tensors()[id.0].name;
        let FfnSpec::Gelu { down, .. } = &spec.layers[3].ffn else { panic!("no mixture of experts") };
        assert_eq!(name(down.weight), "blk.3.ffn_down.weight");
        assert_eq!(down.bias.map(name), Some("blk.3.ffn_down.bias"));
        let NormSpec::Layer { gamma, beta, epsilon } = &spec.layers[1].ffn_norm else { panic!("no RMS norm") };
        assert_eq!((name(*gamma), name(*beta), *epsilon), ("blk.1.ffn_norm.weight", "blk.1.ffn_norm.bias", 1.0e-5));
        assert_eq!(spec.position_embedding.map(name), Some("position_embd.weight"));
    }
}

#[test]
fn other_architectures_are_refused_by_name() {
    let architecture = |name: &str| with_key("general.architecture", text(name));
    refuse(&architecture("llama"), Error::UnknownArchitecture { found: "llama".into() });
    let message = adapt(&architecture("GPT2")).unwrap_err().to_string();
    assert!(message.starts_with("architecture \"GPT2\" is not supported; supported: gpt2, gpt-oss"), "{message}");
    let missing = adapt(&without_key("general.architecture"));
    assert!(matches!(missing, Err(Error::Metadata(MetadataError::Missing { .. }))));
    let wrong = adapt(&with_key("general.architecture", Val::U32(2)));
    assert!(matches!(wrong, Err(Error::Metadata(MetadataError::WrongType { .. }))));
}

#[test]
fn required_keys_are_named_when_missing() {
    for name in [
        "gpt2.block_count",
        "gpt2.context_length",
        "gpt2.embedding_length",
        "gpt2.feed_forward_length",
        "gpt2.attention.head_count",
        "gpt2.attention.layer_norm_epsilon",
        "tokenizer.ggml.tokens",
    ] {
        match adapt(&without_key(name)) {
            Err(Error::Metadata(MetadataError::Missing { key, .. })) => assert_eq!(key, name),
            other => panic!("{name}: {other:?}"),
        }
        assert!(matches!(adapt(&with_key(name, text("7"))), Err(Error::Metadata(MetadataError::WrongType { .. }))));
    }
}

#[test]
fn sizes_have_ranges() {
    const MOST: usize = (1 << 31) - 1;
    for found in [0, 513, u32::MAX as usize] {
        refuse(&with("block_count", Val::U32(found as u32)), out_of_range("gpt2.block_count", found, 512));
    }
    for name in ["context_length", "embedding_length", "feed_forward_length", "attention.head_count"] {
        let key = format!("gpt2.{name}");
        refuse(&with(name, Val::U32(0)), out_of_range(&key, 0, MOST));
        refuse(&with(name, Val::U64(1 << 31)), out_of_range(&key, 1 << 31, MOST));
        assert!(matches!(adapt(&with(name, Val::I32(-4))), Err(Error::Metadata(MetadataError::OutOfRange { .. }))));
    }
    refuse(&with("attention.head_count_kv", Val::U32(0)), out_of_range("gpt2.attention.head_count_kv", 0, MOST));
    refuse(&with_key("tokenizer.ggml.tokens", texts([])), out_of_range("tokenizer.ggml.tokens", 0, MOST));
}

#[test]
fn layers_declared_without_tensors_are_refused() {
    refuse(&with("block_count", Val::U32(3)), Error::MissingTensor { tensor: "blk.2.attn_qkv.weight".into() });
    refuse(&with("block_count", Val::U32(512)), Error::MissingTensor { tensor: "blk.2.attn_qkv.weight".into() });
}

#[test]
fn heads_share_the_embedding_evenly() {
    let indivisible = |found, by, divisor, what| Error::DoesNotDivide { what, found, by, divisor };
    let (count, kv, width) = ("attention.head_count", "attention.head_count_kv", "embedding_length");
    refuse(&with(count, Val::U32(5)), indivisible(32, count, 5, width));
    refuse(&with(kv, Val::U32(3)), indivisible(4, kv, 3, count));
    refuse(&with(kv, Val::U32(8)), indivisible(4, kv, 8, count));
    refuse(&with(count, Val::U32(32)), Error::HeadWidth { found: 1 });
    refuse(&with(count, Val::U32(1 << 20)), indivisible(32, count, 1 << 20, width));
    refuse(&with(count, Val::U32(16)), Error::HeadWidth { found: 2 });
    refuse(&with("embedding_length", Val::U32(1056)), Error::HeadWidth { found: 264 });
    refuse(&with("attention.key_length", Val::U32(0)), Error::HeadWidth { found: 0 });
    refuse(&with("attention.key_length", Val::U32(7)), Error::HeadWidth { found: 7 });
    refuse(&with("attention.key_length", Val::U32(12)), Error::HeadWidth { found: 12 });
    refuse(&with("attention.key_length", Val::U32(136)), Error::HeadWidth { found: 136 });
    let message = Error::HeadWidth { found: 12 }.to_string();
    assert_eq!(message, "heads are 12 wide, expected a multiple of 8 from 8 to 128");
    let narrow = Error::WidthMismatch { n_head: 4, d_head: 16, d_model: 32 };
    refuse(&with("attention.key_length", Val::U32(16)), narrow);
    let other =
        Error::NotDefault { key: "gpt2.attention.value_length".into(), found: "16".into(), expected: "8".into() };
    refuse(&with("attention.value_length", Val::U32(16)), other);

    let agreeing = with("attention.key_length", Val::U32(8)).key("gpt2.attention.value_length", Val::U32(8));
    assert_eq!(adapt(&agreeing).unwrap().spec().d_head, 8);
    // Not 64 only: one head of 32, two of 16.
    for (n_head, d_head) in [(1, 32), (2, 16)] {
        let adapter = adapt(&with("attention.head_count", Val::U32(n_head))).unwrap();
        assert_eq!(adapter.spec().d_head, d_head);
    }
}

#[test]
fn fewer_key_and_value_heads_make_fewer_rows() {
    let mut file = with("attention.head_count_kv", Val::U32(2));
    for tensor in file.tensors.iter_mut().filter(|tensor| String::from_utf8_lossy(&tensor.name).contains("qkv")) {
        *tensor.dims.last_mut().unwrap() = 64;
    }
    let adapter = adapt(&file).unwrap();
    let rows: usize = adapter.spec().layers[1].qkv.linears().map(|linear| linear.n_out).sum();
    assert_eq!((adapter.spec().n_head_kv, rows), (2, 64));
}

#[test]
fn rows_come_in_groups_of_32() {
    let refuse_groups = |name: &str, found| {
        refuse(&with(name, Val::U32(found as u32)), Error::Groups { what: format!("gpt2.{name}"), found });
    };
    refuse_groups("embedding_length", 16);
    refuse_groups("embedding_length", 48);
    refuse_groups("feed_forward_length", 100);
    let message = adapt(&with("feed_forward_length", Val::U32(100))).unwrap_err().to_string();
    assert_eq!(
        message,
        "gpt2.feed_forward_length is 100, expected a multiple of 32: kernels read rows in groups of that many"
    );
}

#[test]
fn values_given_layer_by_layer_are_one_per_layer_and_equal() {
    let layers = |values: &[i32]| Val::Array(5, values.iter().map(|&value| Val::I32(value)).collect());
    for (name, value) in [("feed_forward_length", 96), ("attention.head_count", 4), ("attention.head_count_kv", 4)] {
        assert_eq!(adapt(&with(name, layers(&[value, value]))), adapt(&small()));
        let key = format!("gpt2.{name}");
        for found in [0, 1, 3] {
            let error = Error::LayerCount { key: key.clone(), found, expected: 2 };
            refuse(&with(name, layers(&vec![value; found])), error);
        }
        let error = Error::LayersDiffer { key: key.clone(), first: value as usize, layer: 1, other: 1 };
        refuse(&with(name, layers(&[value, 1])), error);
        refuse(&with(name, layers(&[0, 0])), out_of_range(&key, 0, (1 << 31) - 1));
        let negative = adapt(&with(name, layers(&[value, -1])));
        assert!(matches!(negative, Err(Error::Metadata(MetadataError::OutOfRange { found: -1, .. }))));
    }
}

#[test]
fn epsilon_is_a_positive_number() {
    for found in [0.0, -1.0e-5, f32::INFINITY] {
        let key = "gpt2.attention.layer_norm_epsilon".to_owned();
        refuse(
            &with("attention.layer_norm_epsilon", Val::F32(found)),
            Error::Number { key, found, expected: "above 0" },
        );
    }
    let nan = adapt(&with("attention.layer_norm_epsilon", Val::F32(f32::NAN)));
    assert!(matches!(nan, Err(Error::Number { found, .. }) if found.is_nan()));
}

#[test]
fn keys_that_ask_for_another_forward_pass_are_refused() {
    let not_default = |name: &str, found: &str, expected: &str| Error::NotDefault {
        key: format!("gpt2.{name}"),
        found: found.into(),
        expected: expected.into(),
    };
    refuse(&with("attention.causal", Val::Bool(0)), not_default("attention.causal", "false", "true"));
    for name in ["expert_count", "expert_used_count", "pooling_type", "nextn_predict_layers"] {
        refuse(&with(name, Val::U32(2)), not_default(name, "2", "0"));
        assert_eq!(adapt(&with(name, Val::U32(0))), adapt(&small()));
    }
    assert_eq!(adapt(&with("attention.causal", Val::Bool(1))), adapt(&small()));
}

#[test]
fn every_tensor_is_needed() {
    for tensor in small().tensors {
        let tensor = String::from_utf8(tensor.name).unwrap();
        refuse(&without_tensor(&tensor), Error::MissingTensor { tensor: tensor.clone() });
    }
}

#[test]
fn every_tensor_has_its_shape() {
    for tensor in small().tensors {
        let name = String::from_utf8(tensor.name).unwrap();
        for axis in 0..tensor.dims.len() {
            let mut found = tensor.dims.clone();
            found[axis] -= 1;
            match adapt(&with_tensor(&name, TensorType::F32, &found)) {
                Err(Error::Shape { tensor: of, found: was, expected, .. }) => {
                    assert_eq!((of, was, expected), (name.clone(), found, tensor.dims.clone()));
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        // A dimension more or less is nothing if it is 1.
        let longer = [&tensor.dims[..], &[1]].concat();
        assert_eq!(adapt(&with_tensor(&name, TensorType::F32, &longer)), adapt(&small()));
        let doubled = [&tensor.dims[..], &[2]].concat();
        assert!(matches!(adapt(&with_tensor(&name, TensorType::F32, &doubled)), Err(Error::Shape { .. })));
        let empty = vec![0; tensor.dims.len()];
        assert!(matches!(adapt(&with_tensor(&name, TensorType::F32, &empty)), Err(Error::Shape { .. })));
    }
}

#[test]
fn positions_are_as_many_as_the_context() {
    let error = adapt(&with("context_length", Val::U32(17))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor position_embd.weight has shape [32, 16], expected [32, 17]: [embedding_length, context_length]"
    );
}

#[test]
fn the_vocabulary_is_as_long_as_the_embedding() {
    let error = adapt(&with_key("tokenizer.ggml.tokens", texts(["a", "b"]))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor token_embd.weight has shape [32, 10], expected [32, 2]: [embedding_length, number of tokens]"
    );
    // The token list decides; without one, the number that the file states.
    assert_eq!(adapt(&with("vocab_size", Val::U32(99))), adapt(&small()));
    assert_eq!(adapt(&without_key("tokenizer.ggml.tokens").key("gpt2.vocab_size", Val::U32(10))), adapt(&small()));
    let none = without_key("tokenizer.ggml.tokens").key("gpt2.vocab_size", Val::U32(0));
    refuse(&none, out_of_range("gpt2.vocab_size", 0, (1 << 31) - 1));
}

#[test]
fn a_head_of_its_own_replaces_the_embedding() {
    let adapter = adapt(&small().tensor("output.weight", TensorType::Q8_0, &[32, 10])).unwrap();
    assert_eq!(adapter.spec().output.weight, TensorId(28));
    assert_eq!(adapter.spec().token_embedding, TensorId(0));
    let wrong = small().tensor("output.weight", TensorType::Q8_0, &[32, 9]);
    assert!(matches!(adapt(&wrong), Err(Error::Shape { .. })));
}

#[test]
fn weights_have_any_supported_type() {
    for &ty in TensorType::ALL.iter().filter(|ty| ty.block_len() <= 32) {
        for (name, dims) in [
            ("token_embd.weight", [32, 10]),
            ("position_embd.weight", [32, 16]),
            ("blk.1.attn_qkv.weight", [32, 96]),
            ("blk.0.attn_output.weight", [32, 32]),
            ("blk.1.ffn_up.weight", [32, 96]),
            ("blk.0.ffn_down.weight", [96, 32]),
        ] {
            let result = adapt(&with_tensor(name, ty, &dims)).map(|_| ());
            let expected = if ty.is_supported() { Ok(()) } else { Err(Error::WeightType { tensor: name.into(), ty }) };
            assert_eq!(result, expected);
        }
    }
    let error = adapt(&with_tensor("token_embd.weight", TensorType::IQ4_NL, &[32, 10])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor token_embd.weight has type IQ4_NL (20), which is not supported; supported: F32, F16, BF16, Q4_0, \
         Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, MXFP4"
    );
}

#[test]
fn norms_and_biases_are_floats() {
    for name in ["output_norm.weight", "output_norm.bias", "blk.0.attn_norm.weight", "blk.1.ffn_down.bias"] {
        for ty in [TensorType::F16, TensorType::BF16] {
            assert_eq!(adapt(&with_tensor(name, ty, &[32])), adapt(&small()));
        }
        for ty in [TensorType::Q8_0, TensorType::F64, TensorType::I32] {
            refuse(&with_tensor(name, ty, &[32]), Error::FloatType { tensor: name.into(), ty });
        }
    }
}

#[test]
fn tensors_nobody_asked_for_are_refused() {
    let file = small().tensor("blk.0.attn.bias", TensorType::F32, &[4]);
    refuse(&file, Error::UnexpectedTensors { first: "blk.0.attn.bias".into(), count: 1 });
    let file = file.tensor("blk.1.attn.bias", TensorType::F32, &[4]);
    let error = Error::UnexpectedTensors { first: "blk.0.attn.bias".into(), count: 2 };
    assert_eq!(error.to_string(), "2 tensors are not part of the architecture, the first is blk.0.attn.bias");
    refuse(&file, error);
    // Fewer layers than there are tensors for.
    let error = Error::UnexpectedTensors { first: "blk.1.attn_norm.weight".into(), count: 12 };
    refuse(&with("block_count", Val::U32(1)), error);
}

#[test]
fn the_order_of_tensors_does_not_matter() {
    let directory = parse(&small().bytes()).unwrap();
    let reversed: Vec<TensorInfo> = directory.tensors.iter().rev().cloned().collect();
    let adapter = detect(&directory.metadata, &reversed).unwrap();
    assert_eq!(adapter.spec().token_embedding, TensorId(27));
    assert_eq!(adapter.spec().layers[1].qkv.linears().next().map(|linear| linear.weight), Some(TensorId(27 - 18)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_directories_never_panic(damages in proptest::collection::vec(damage(), 1..4)) {
        thread_local!(static SMALL: (Vec<u8>, Vec<u8>) = (small().head(), small().bytes()));
        SMALL.with(|(head, whole)| {
            let mut file = head.clone();
            for damage in &damages {
                apply(damage, &mut file);
            }
            file.extend(&whole[head.len()..]);
            if let Ok(directory) = parse(&file)
                && let Ok(adapter) = detect(&directory.metadata, &directory.tensors)
            {
                // What still passes is a whole model.
                assert_eq!(adapter.spec().layers.len(), adapter.spec().n_layer);
                assert_eq!(directory.tensors.len(), 4 + 12 * adapter.spec().n_layer);
            }
        });
    }
}
