//! gpt-oss: the bundled model and the published ones map in full, and whatever does not fit is refused by name.

use crate::damage::{apply, damage};
use gamma_tests::write::{File, Val, text, texts};
use gpt_gamma::adapter::{
    AttentionSpec, ClampedSwiGlu, Error, ExpertsSpec, FfnSpec, GptInferenceAdapter, InferenceAdapter, LayerSpec,
    LinearSpec, ModelSpec, NormSpec, QkvSpec, RopeSpec, TensorId, YarnSpec, detect,
};
use gpt_gamma::gguf::{MetadataError, ShardName, TensorInfo, TensorType, parse};
use gpt_gamma::model_file::ModelFile;
use proptest::prelude::*;
use std::path::Path;

/// What the keys and the tensors of a model are made from.
#[derive(Clone, Copy)]
struct Model {
    n_layer: u32,
    n_ctx: u32,
    n_vocab: u64,
    d_model: u64,
    d_ff: u64,
    n_head: u64,
    n_head_kv: u64,
    d_head: u64,
    n_expert: u64,
    n_used: u32,
    window: u32,
    factor: f32,
    original_context: u32,
}

/// Heads that together are wider than the model, and no two sizes alike.
const SMALL: Model = Model {
    n_layer: 3,
    n_ctx: 64,
    n_vocab: 10,
    d_model: 32,
    d_ff: 96,
    n_head: 4,
    n_head_kv: 2,
    d_head: 16,
    n_expert: 5,
    n_used: 3,
    window: 7,
    factor: 4.0,
    original_context: 17,
};

const GPT_OSS_20B: Model = Model {
    n_layer: 24,
    n_ctx: 131_072,
    n_vocab: 201_088,
    d_model: 2880,
    d_ff: 2880,
    n_head: 64,
    n_head_kv: 8,
    d_head: 64,
    n_expert: 32,
    n_used: 4,
    window: 128,
    factor: 32.0,
    original_context: 4096,
};

const GPT_OSS_120B: Model = Model { n_layer: 36, n_expert: 128, ..GPT_OSS_20B };

impl Model {
    /// The keys that llama.cpp's converter writes, with a vocabulary of `n_vocab` letters or the number alone.
    fn keys(&self) -> File {
        let n = |n: u64| Val::U32(n as u32);
        let file = File::new()
            .key("general.architecture", text("gpt-oss"))
            .key("gpt-oss.block_count", Val::U32(self.n_layer))
            .key("gpt-oss.context_length", Val::U32(self.n_ctx))
            .key("gpt-oss.embedding_length", n(self.d_model))
            .key("gpt-oss.feed_forward_length", n(self.d_ff))
            .key("gpt-oss.attention.head_count", n(self.n_head))
            .key("gpt-oss.attention.head_count_kv", n(self.n_head_kv))
            .key("gpt-oss.rope.freq_base", Val::F32(150_000.0))
            .key("gpt-oss.attention.layer_norm_rms_epsilon", Val::F32(1.0e-5))
            .key("gpt-oss.expert_count", n(self.n_expert))
            .key("gpt-oss.expert_used_count", Val::U32(self.n_used))
            .key("gpt-oss.attention.key_length", n(self.d_head))
            .key("gpt-oss.attention.value_length", n(self.d_head))
            .key("gpt-oss.attention.sliding_window", Val::U32(self.window))
            .key("gpt-oss.expert_feed_forward_length", n(self.d_ff))
            .key("gpt-oss.rope.scaling.type", text("yarn"))
            .key("gpt-oss.rope.scaling.factor", Val::F32(self.factor))
            .key("gpt-oss.rope.scaling.original_context_length", Val::U32(self.original_context));
        match "abcdefghijklmnop".get(..self.n_vocab as usize) {
            Some(letters) => file.key("tokenizer.ggml.tokens", texts(letters.split_inclusive(|_| true))),
            None => file.key("gpt-oss.vocab_size", n(self.n_vocab)),
        }
    }

    /// Names and shapes of all tensors, as the published files have them.
    fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        let &Self { n_vocab, d_model, d_ff, n_head, n_expert, .. } = self;
        let (d_q, d_kv) = (n_head * self.d_head, self.n_head_kv * self.d_head);
        let mut all = vec![
            ("token_embd.weight".to_owned(), vec![d_model, n_vocab]),
            ("output.weight".to_owned(), vec![d_model, n_vocab]),
            ("output_norm.weight".to_owned(), vec![d_model]),
        ];
        for i in 0..self.n_layer {
            let layer: [(&str, &[u64]); 19] = [
                ("attn_norm.weight", &[d_model]),
                ("attn_q.weight", &[d_model, d_q]),
                ("attn_q.bias", &[d_q]),
                ("attn_k.weight", &[d_model, d_kv]),
                ("attn_k.bias", &[d_kv]),
                ("attn_v.weight", &[d_model, d_kv]),
                ("attn_v.bias", &[d_kv]),
                ("attn_output.weight", &[d_q, d_model]),
                ("attn_output.bias", &[d_model]),
                ("attn_sinks.weight", &[n_head]),
                ("post_attention_norm.weight", &[d_model]),
                ("ffn_gate_inp.weight", &[d_model, n_expert]),
                ("ffn_gate_inp.bias", &[n_expert]),
                ("ffn_gate_exps.weight", &[d_model, d_ff, n_expert]),
                ("ffn_gate_exps.bias", &[d_ff, n_expert]),
                ("ffn_up_exps.weight", &[d_model, d_ff, n_expert]),
                ("ffn_up_exps.bias", &[d_ff, n_expert]),
                ("ffn_down_exps.weight", &[d_ff, d_model, n_expert]),
                ("ffn_down_exps.bias", &[d_model, n_expert]),
            ];
            all.extend(layer.map(|(name, shape)| (format!("blk.{i}.{name}"), shape.to_vec())));
        }
        all
    }

    fn file(&self, ty: impl Fn(&str) -> TensorType) -> File {
        self.tensors().iter().fold(self.keys(), |file, (name, shape)| file.tensor(name, ty(name), shape))
    }

    /// As from a file, but without one: it would be 120 GB.
    fn adapt_without_data(&self, ty: impl Fn(&str) -> TensorType) -> Result<GptInferenceAdapter, Error> {
        let metadata = parse(&self.keys().bytes()).expect("well-formed").metadata;
        let info = |(name, shape): (String, Vec<u64>)| {
            let mut dims = [1; 4];
            dims[..shape.len()].copy_from_slice(&shape);
            let ty = ty(&name);
            assert_eq!(dims[0] % ty.block_len() as u64, 0, "{name} has whole blocks of {ty}");
            TensorInfo { name, ty, dims, n_dims: shape.len(), offset: 0, n_bytes: 0 }
        };
        detect(&metadata, &self.tensors().into_iter().map(info).collect::<Vec<_>>())
    }
}

/// What no writer quantizes.
fn stays_float(name: &str) -> bool {
    !name.ends_with(".weight") || ["norm", "sinks", "gate_inp"].iter().any(|part| name.contains(part))
}

/// Experts in MXFP4, the rest in `rest`: what OpenAI's checkpoint becomes.
fn mxfp4_and(rest: TensorType) -> impl Fn(&str) -> TensorType {
    move |name| match name {
        _ if stays_float(name) => TensorType::F32,
        _ if name.contains("_exps") => TensorType::MXFP4,
        _ => rest,
    }
}

/// "Q4_K_M" as llama.cpp's quantizer makes it for rows of 2880, with the experts in MXFP4 or not.
fn q4_k_m(experts_stay: bool) -> impl Fn(&str) -> TensorType {
    move |name| match name {
        _ if stays_float(name) => TensorType::F32,
        _ if name.contains("_exps") && experts_stay => TensorType::MXFP4,
        "output.weight" | "blk.0.attn_v.weight" | "blk.2.ffn_down_exps.weight" => TensorType::Q8_0,
        _ if name.contains("attn_output") => TensorType::Q4_K,
        _ => TensorType::Q5_0,
    }
}

fn small() -> File {
    SMALL.file(mxfp4_and(TensorType::Q8_0))
}

fn adapt(file: &File) -> Result<GptInferenceAdapter, Error> {
    let directory = parse(&file.bytes()).expect("well-formed");
    detect(&directory.metadata, &directory.tensors)
}

fn spec(file: &File) -> ModelSpec {
    adapt(file).expect("a sound model").spec().clone()
}

#[track_caller]
fn refuse(file: &File, expected: Error) {
    assert_eq!(adapt(file), Err(expected));
}

/// The small model with `gpt-oss.NAME` replaced or added.
fn with(name: &str, value: Val) -> File {
    without(name).key(format!("gpt-oss.{name}"), value)
}

fn without(name: &str) -> File {
    let mut file = small();
    file.keys.retain(|(found, _)| *found != format!("gpt-oss.{name}").into_bytes());
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

fn windows(spec: &ModelSpec) -> Vec<bool> {
    spec.layers.iter().map(|layer| layer.attention.window.is_some()).collect()
}

const SMALL_YARN: YarnSpec =
    YarnSpec { factor: 4.0, original_context: 17, beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.0 };

fn yarn(file: &File) -> YarnSpec {
    let rope = spec(file).layers[0].attention.rope.clone();
    rope.and_then(|rope| rope.scaling).expect("a model with YaRN")
}

#[test]
fn every_tensor_plays_its_part() {
    let rms = |at| NormSpec::Rms { gamma: TensorId(at), epsilon: 1.0e-5 };
    let linear = |at, n_in, n_out| LinearSpec { weight: TensorId(at), bias: Some(TensorId(at + 1)), n_in, n_out };
    let experts = |at, n_in, n_out| ExpertsSpec { weight: TensorId(at), bias: TensorId(at + 1), n_in, n_out };
    let layer = |i: usize| {
        let at = 3 + 19 * i;
        LayerSpec {
            attention_norm: rms(at),
            qkv: QkvSpec::Separate { q: linear(at + 1, 32, 64), k: linear(at + 3, 32, 32), v: linear(at + 5, 32, 32) },
            attention: AttentionSpec {
                scale: 0.25,
                window: (i != 1).then_some(7),
                sinks: Some(TensorId(at + 9)),
                rope: Some(RopeSpec { n_dims: 16, base: 150_000.0, scaling: Some(SMALL_YARN) }),
            },
            attention_output: linear(at + 7, 64, 32),
            ffn_norm: rms(at + 10),
            ffn: FfnSpec::MixtureOfExperts {
                router: linear(at + 11, 32, 5),
                n_expert: 5,
                n_used: 3,
                gate: experts(at + 13, 32, 96),
                up: experts(at + 15, 32, 96),
                down: experts(at + 17, 96, 32),
                activation: ClampedSwiGlu { alpha: 1.702, limit: 7.0 },
            },
        }
    };
    let expected = ModelSpec {
        architecture: "gpt-oss",
        n_vocab: 10,
        n_ctx: 64,
        d_model: 32,
        n_layer: 3,
        n_head: 4,
        n_head_kv: 2,
        d_head: 16,
        d_ff: 96,
        token_embedding: TensorId(0),
        position_embedding: None,
        layers: vec![layer(0), layer(1), layer(2)],
        output_norm: rms(2),
        output: LinearSpec { weight: TensorId(1), bias: None, n_in: 32, n_out: 10 },
    };
    assert_eq!(spec(&small()), expected);
}

#[test]
fn the_bundled_model_maps_in_full() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-gpt-oss-mxfp4.gguf");
    let file = ModelFile::open(path).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let spec = adapter.spec();
    assert_eq!((adapter.architecture(), spec.n_layer, spec.d_model, spec.d_ff), ("gpt-oss", 4, 256, 256));
    assert_eq!((spec.n_head, spec.n_head_kv, spec.d_head, spec.n_vocab, spec.n_ctx), (8, 2, 64, 2048, 1024));
    assert_eq!(windows(spec), [true, false, true, false]);
    assert_eq!(spec.layers[2].attention.window, Some(64));
    assert_eq!(spec.layers[3].attention.scale, 0.125);
    let scaling = Some(YarnSpec { original_context: 256, ..SMALL_YARN });
    assert_eq!(spec.layers[1].attention.rope, Some(RopeSpec { n_dims: 64, base: 150_000.0, scaling }));
    let name = |id: TensorId| &*file.tensors()[id.0].name;
    let FfnSpec::MixtureOfExperts { down, n_expert, n_used, .. } = &spec.layers[3].ffn else {
        panic!("a mixture of experts")
    };
    assert_eq!((name(down.weight), name(down.bias)), ("blk.3.ffn_down_exps.weight", "blk.3.ffn_down_exps.bias"));
    assert_eq!((*n_expert, *n_used), (8, 4));
    assert_eq!(spec.layers[0].attention.sinks.map(name), Some("blk.0.attn_sinks.weight"));
    assert_ne!(spec.output.weight, spec.token_embedding, "the head is not tied");
}

#[test]
fn the_published_models_map_in_every_published_mix() {
    for (model, n_tensors) in [(GPT_OSS_20B, 459), (GPT_OSS_120B, 687)] {
        assert_eq!(model.tensors().len(), n_tensors);
        let reference = model.adapt_without_data(mxfp4_and(TensorType::BF16)).unwrap();
        let spec = reference.spec();
        assert_eq!((spec.n_layer, spec.layers.len(), spec.n_vocab), (model.n_layer as usize, n_tensors / 19, 201_088));
        let rows: Vec<usize> = spec.layers[0].qkv.linears().map(|linear| linear.n_out).collect();
        assert_eq!((rows, spec.layers[0].attention_output.n_in), (vec![4096, 512, 512], 4096));
        assert!(windows(spec).iter().enumerate().all(|(i, &has_window)| has_window == (i % 2 == 0)));
        let Some(RopeSpec { scaling: Some(yarn), .. }) = &spec.layers[0].attention.rope else { panic!("YaRN") };
        assert_eq!((yarn.factor, yarn.original_context), (32.0, 4096));
        // The types make no difference to the description.
        for rest in [TensorType::Q8_0, TensorType::F16, TensorType::F32, TensorType::Q5_0, TensorType::Q4_0] {
            assert_eq!(model.adapt_without_data(mxfp4_and(rest)).unwrap(), reference);
        }
        for experts_stay in [true, false] {
            assert_eq!(model.adapt_without_data(q4_k_m(experts_stay)).unwrap(), reference);
        }
    }
}

#[test]
fn split_files_map_like_whole_ones() {
    let folder = tempfile::tempdir().unwrap();
    let whole = small();
    let n_tensors = whole.tensors.len();
    for (no, range) in [(0, 0..20), (1, 20..n_tensors)] {
        let mut shard = if no == 0 { whole.clone() } else { File::new() }
            .key("split.no", Val::U16(no as u16))
            .key("split.count", Val::U16(2))
            .key("split.tensors.count", Val::I32(n_tensors as i32));
        shard.tensors = whole.tensors[range].to_vec();
        let name = ShardName { prefix: "gpt-oss", no, count: 2 }.to_string();
        std::fs::write(folder.path().join(name), shard.bytes()).unwrap();
    }
    let file = ModelFile::open(folder.path().join("gpt-oss-00001-of-00002.gguf")).unwrap();
    assert_eq!(*detect(file.metadata(), file.tensors()).unwrap().spec(), spec(&whole));
}

#[test]
fn the_layout_of_ollama_is_refused_with_the_reason() {
    let mut file = small();
    file.keys[0].1 = text("gptoss");
    refuse(&file, Error::OllamaLayout { found: "gptoss" });
    let message = adapt(&file).unwrap_err().to_string();
    assert!(message.contains("Ollama's own layout") && message.contains("llama.cpp's converter"), "{message}");
}

#[test]
fn required_keys_are_named_when_missing() {
    for name in [
        "block_count",
        "context_length",
        "embedding_length",
        "attention.head_count",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
    ] {
        match adapt(&without(name)) {
            Err(Error::Metadata(MetadataError::Missing { key, .. })) => assert_eq!(key, format!("gpt-oss.{name}")),
            other => panic!("{name}: {other:?}"),
        }
        assert!(matches!(adapt(&with(name, Val::Bool(1))), Err(Error::Metadata(MetadataError::WrongType { .. }))));
    }
    // Nothing rests on these.
    for name in ["feed_forward_length", "attention.value_length"] {
        assert_eq!(spec(&without(name)), spec(&small()));
    }
}

#[test]
fn sizes_have_ranges() {
    const MOST: usize = (1 << 31) - 1;
    let cases = [
        ("block_count", 512),
        ("context_length", MOST),
        ("embedding_length", MOST / 5),
        ("expert_feed_forward_length", MOST / 5),
        ("attention.head_count", MOST / 48),
        ("attention.head_count_kv", MOST),
        ("attention.sliding_window", MOST),
        ("expert_count", 128),
        ("expert_used_count", 5),
        ("rope.scaling.original_context_length", MOST),
    ];
    for (name, most) in cases {
        for found in [0, most + 1] {
            let key = format!("gpt-oss.{name}");
            refuse(&with(name, Val::U64(found as u64)), Error::OutOfRange { key, found, least: 1, most });
        }
    }
    let error = adapt(&with("expert_used_count", Val::U32(6))).unwrap_err();
    assert_eq!(error.to_string(), "gpt-oss.expert_used_count is 6, expected 1 to 5");
    // Of many experts a token still uses eight at most.
    let many = Model { n_expert: 32, n_used: 9, ..SMALL }.file(mxfp4_and(TensorType::Q8_0));
    let key = "gpt-oss.expert_used_count".into();
    refuse(&many, Error::OutOfRange { key, found: 9, least: 1, most: 8 });
    for value in [1, 2, 5] {
        assert!(adapt(&with("expert_used_count", Val::U32(value))).is_ok());
    }
}

#[test]
fn widths_are_whole_groups() {
    for found in [4, 12, 130, 136, 0] {
        refuse(&with("attention.key_length", Val::U32(found)), Error::HeadWidth { found: found as usize });
    }
    for name in ["embedding_length", "expert_feed_forward_length"] {
        refuse(&with(name, Val::U32(48)), Error::Groups { what: format!("gpt-oss.{name}"), found: 48 });
    }
    let narrow = Model { n_head: 3, n_head_kv: 3, d_head: 8, ..SMALL }.file(|_| TensorType::F32);
    let what = "gpt-oss.attention.head_count times key_length".into();
    refuse(&narrow, Error::Groups { what, found: 24 });
    let (what, by) = ("attention.head_count", "attention.head_count_kv");
    refuse(&with(by, Val::U32(3)), Error::DoesNotDivide { what, found: 4, by, divisor: 3 });
    for d_head in [8, 24, 64, 128] {
        let model = Model { d_head, ..SMALL };
        assert_eq!(spec(&model.file(mxfp4_and(TensorType::Q8_0))).d_head as u64, d_head);
    }
}

#[test]
fn numbers_have_ranges() {
    let cases: [(&str, &str, &[f32]); 7] = [
        ("attention.layer_norm_rms_epsilon", "above 0", &[0.0, -1.0e-5]),
        ("rope.freq_base", "above 1", &[1.0, 0.0, -150_000.0]),
        ("rope.scaling.factor", "of at least 1", &[0.99, 0.0, -32.0]),
        ("rope.scaling.attn_factor", "above 0", &[0.0, -1.0]),
        ("rope.scaling.yarn_beta_slow", "above 0", &[0.0, -1.0]),
        ("rope.scaling.yarn_beta_fast", "above yarn_beta_slow", &[1.0, 0.5]),
        ("rope.scaling.yarn_beta_fast", "above yarn_beta_slow", &[-32.0]),
    ];
    for (name, expected, bad) in cases {
        for &found in bad.iter().chain(&[f32::INFINITY]) {
            let key = format!("gpt-oss.{name}");
            refuse(&with(name, Val::F32(found)), Error::Number { key, found, expected });
        }
        let nan = adapt(&with(name, Val::F32(f32::NAN)));
        assert!(matches!(nan, Err(Error::Number { found, .. }) if found.is_nan()), "{name}: {nan:?}");
    }
    let error = adapt(&with("rope.scaling.factor", Val::F32(0.5))).unwrap_err();
    assert_eq!(error.to_string(), "gpt-oss.rope.scaling.factor is 0.5, expected a finite number of at least 1");
}

#[test]
fn rotary_positions_are_what_the_file_says() {
    assert_eq!(yarn(&small()), SMALL_YARN);
    let file = with("rope.scaling.yarn_beta_fast", Val::F32(16.0))
        .key("gpt-oss.rope.scaling.yarn_beta_slow", Val::F32(2.0))
        .key("gpt-oss.rope.scaling.attn_factor", Val::F32(1.5));
    assert_eq!(yarn(&file), YarnSpec { beta_fast: 16.0, beta_slow: 2.0, attention_factor: 1.5, ..SMALL_YARN });
    let plain = spec(&with("rope.scaling.type", text("none")));
    assert!(plain.layers.iter().all(|layer| layer.attention.rope.as_ref().is_some_and(|rope| rope.scaling.is_none())));
    for found in ["linear", "longrope", "YARN", ""] {
        let key = "gpt-oss.rope.scaling.type".into();
        refuse(&with("rope.scaling.type", text(found)), Error::RopeScaling { key, found: found.into() });
    }
}

#[test]
fn the_window_pattern_is_a_period_or_a_flag_per_layer() {
    const NAME: &str = "attention.sliding_window_pattern";
    let pattern = |value| windows(&spec(&with(NAME, value)));
    assert_eq!(windows(&spec(&small())), [true, false, true]);
    // A period of p: all but the last of every p layers have a window.
    for (period, expected) in [(1, [false; 3]), (2, [true, false, true]), (3, [true, true, false]), (4, [true; 3])] {
        assert_eq!(pattern(Val::U32(period)), expected);
    }
    let flags = |ty, flag: fn(u8) -> Val, flags: &[u8]| Val::Array(ty, flags.iter().map(|&f| flag(f)).collect());
    let ints = |values: &[u8]| flags(5, |f| Val::I32(f.into()), values);
    assert_eq!(pattern(flags(7, Val::Bool, &[0, 1, 1])), [false, true, true]);
    assert_eq!(pattern(ints(&[1, 1, 0])), [true, true, false]);

    let key = format!("gpt-oss.{NAME}");
    refuse(&with(NAME, Val::U32(0)), Error::OutOfRange { key: key.clone(), found: 0, least: 1, most: (1 << 31) - 1 });
    refuse(&with(NAME, ints(&[0, 1, 2])), Error::OutOfRange { key: format!("{key}[2]"), found: 2, least: 0, most: 1 });
    for value in [flags(7, Val::Bool, &[1, 0]), flags(7, Val::Bool, &[]), ints(&[0, 1, 0, 1])] {
        let Val::Array(_, elements) = &value else { unreachable!("made above") };
        let found = elements.len();
        refuse(&with(NAME, value), Error::LayerCount { key: key.clone(), found, expected: 3 });
    }
    assert!(matches!(adapt(&with(NAME, texts(["a"]))), Err(Error::Metadata(MetadataError::WrongType { .. }))));
    assert!(matches!(adapt(&with(NAME, Val::Bool(1))), Err(Error::Metadata(MetadataError::WrongType { .. }))));
}

#[test]
fn keys_that_ask_for_another_forward_pass_are_refused() {
    let cases = [
        ("attention.causal", Val::Bool(1), Val::Bool(0), "false", "true"),
        ("attention.value_length", Val::U32(16), Val::U32(32), "32", "16"),
        ("attention.key_length_swa", Val::U32(16), Val::U32(32), "32", "16"),
        ("attention.value_length_swa", Val::U32(16), Val::U32(8), "8", "16"),
        ("embedding_length_out", Val::U32(32), Val::U32(64), "64", "32"),
        ("rope.dimension_count", Val::U32(16), Val::U32(8), "8", "16"),
        ("rope.dimension_count_swa", Val::U32(16), Val::U32(8), "8", "16"),
        ("rope.freq_base_swa", Val::F32(150_000.0), Val::F32(10_000.0), "10000", "150000"),
        ("rope.scale_linear", Val::F32(4.0), Val::F32(8.0), "8", "4"),
        ("rope.scaling.alpha", Val::F32(0.0), Val::F32(1.0), "1", "0"),
        ("rope.scaling.yarn_ext_factor", Val::F32(1.0), Val::F32(0.5), "0.5", "1"),
        ("rope.scaling.yarn_attn_factor", Val::F32(1.0), Val::F32(2.0), "2", "1"),
        ("rope.scaling.yarn_log_multiplier", Val::F32(0.0), Val::F32(0.1), "0.1", "0"),
        ("expert_group_count", Val::U32(0), Val::U32(4), "4", "0"),
        ("expert_group_used_count", Val::U32(0), Val::U32(2), "2", "0"),
        ("expert_shared_count", Val::U32(0), Val::U32(1), "1", "0"),
        ("pooling_type", Val::U32(0), Val::U32(1), "1", "0"),
        ("nextn_predict_layers", Val::U32(0), Val::U32(1), "1", "0"),
    ];
    for (name, good, bad, found, expected) in cases {
        assert_eq!(spec(&with(name, good)), spec(&small()), "{name}");
        let key = format!("gpt-oss.{name}");
        refuse(&with(name, bad), Error::NotDefault { key, found: found.into(), expected: expected.into() });
    }
}

#[test]
fn every_tensor_is_needed_and_has_its_shape() {
    for (name, shape) in SMALL.tensors() {
        let mut file = small();
        file.tensors.retain(|tensor| tensor.name != name.as_bytes());
        refuse(&file, Error::MissingTensor { tensor: name.clone() });
        for axis in 0..shape.len() {
            let mut wrong = shape.clone();
            wrong[axis] += 1;
            match adapt(&with_tensor(&name, TensorType::F32, &wrong)) {
                Err(Error::Shape { tensor, found, expected, .. }) => {
                    assert_eq!((tensor, found, expected), (name.clone(), wrong, shape.clone()));
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    let error = adapt(&with_tensor("blk.1.ffn_up_exps.weight", TensorType::MXFP4, &[32, 96, 4])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor blk.1.ffn_up_exps.weight has shape [32, 96, 4], expected [32, 96, 5]: \
         [embedding_length, expert_feed_forward_length, expert_count]"
    );
}

#[test]
fn tensors_nobody_asked_for_are_refused() {
    let file = small().tensor("blk.0.attn_q_norm.weight", TensorType::F32, &[16]);
    refuse(&file, Error::UnexpectedTensors { first: "blk.0.attn_q_norm.weight".into(), count: 1 });
    let error = Error::UnexpectedTensors { first: "blk.2.attn_norm.weight".into(), count: 19 };
    refuse(&with("block_count", Val::U32(2)), error);
    refuse(&with("block_count", Val::U32(4)), Error::MissingTensor { tensor: "blk.3.attn_norm.weight".into() });
}

#[test]
fn weights_have_any_supported_type_and_the_rest_is_floats() {
    for (name, shape) in SMALL.tensors() {
        for &ty in TensorType::ALL.iter().filter(|ty| shape[0].is_multiple_of(ty.block_len() as u64)) {
            let is_float = matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16);
            let expected = match stays_float(&name) {
                true if is_float => Ok(()),
                true => Err(Error::FloatType { tensor: name.clone(), ty }),
                false if ty.is_supported() => Ok(()),
                false => Err(Error::WeightType { tensor: name.clone(), ty }),
            };
            assert_eq!(adapt(&with_tensor(&name, ty, &shape)).map(|_| ()), expected);
        }
    }
}

#[test]
fn queries_keys_and_values_may_be_one_tensor() {
    let mut file = small();
    let is_query = |name: &[u8]| name.starts_with(b"blk.1.attn_q.");
    let is_key_or_value = |name: &[u8]| name.starts_with(b"blk.1.attn_k.") || name.starts_with(b"blk.1.attn_v.");
    file.tensors.retain(|tensor| !is_key_or_value(&tensor.name));
    for tensor in file.tensors.iter_mut().filter(|tensor| is_query(&tensor.name)) {
        tensor.name = String::from_utf8_lossy(&tensor.name).replace("attn_q", "attn_qkv").into();
        *tensor.dims.last_mut().unwrap() = 128;
    }
    let fused = LinearSpec { weight: TensorId(23), bias: Some(TensorId(24)), n_in: 32, n_out: 128 };
    assert_eq!(spec(&file).layers[1].qkv, QkvSpec::Fused(fused));
    // One or the other, not both.
    let both = file.tensor("blk.1.attn_q.weight", TensorType::F32, &[32, 64]);
    refuse(&both, Error::UnexpectedTensors { first: "blk.1.attn_q.weight".into(), count: 1 });
}

#[test]
fn values_given_layer_by_layer_are_one_per_layer_and_equal() {
    let layers = |values: &[u64]| Val::Array(10, values.iter().map(|&value| Val::U64(value)).collect());
    for (name, value) in
        [("expert_feed_forward_length", 96), ("attention.head_count", 4), ("attention.head_count_kv", 2)]
    {
        assert_eq!(spec(&with(name, layers(&[value; 3]))), spec(&small()));
        let key = format!("gpt-oss.{name}");
        refuse(&with(name, layers(&[value; 2])), Error::LayerCount { key: key.clone(), found: 2, expected: 3 });
        let first = value as usize;
        refuse(&with(name, layers(&[value, value, 1])), Error::LayersDiffer { key, first, layer: 2, other: 1 });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_directories_never_panic(damages in proptest::collection::vec(damage(), 1..4)) {
        thread_local!(static WHOLE: (Vec<u8>, Vec<u8>) = (small().head(), small().bytes()));
        WHOLE.with(|(head, whole)| {
            let mut file = head.clone();
            for damage in &damages {
                apply(damage, &mut file);
            }
            file.extend(&whole[head.len()..]);
            if let Ok(directory) = parse(&file)
                && let Ok(adapter) = detect(&directory.metadata, &directory.tensors)
            {
                // What still passes is a whole model, with frequencies that are numbers.
                let spec = adapter.spec();
                assert_eq!(directory.tensors.len(), 3 + 19 * spec.n_layer);
                for rope in spec.layers.iter().filter_map(|layer| layer.attention.rope.as_ref()) {
                    for truncate in [false, true] {
                        let (frequencies, magnitude) = rope.inverse_frequencies(truncate);
                        assert!(frequencies.iter().chain([&magnitude]).all(|x| x.is_finite()), "{rope:?}");
                    }
                }
            }
        });
    }
}
