//! Files with random weights: shapes and types as published, and models that run.

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Write};

use gamma_tests::random_model::{Gpt2, GptOss, NAMES, RandomModel};
use gamma_tests::{engine_device, models};
use gpt_gamma::adapter::{InferenceAdapter, detect};
use gpt_gamma::engine::{Engine, Options};
use gpt_gamma::gguf::{TensorType, decode};
use gpt_gamma::model_file::ModelFile;
use gpt_gamma::tokenizer::{Tokenizer, Vocabulary};
use tempfile::NamedTempFile;

const SMALL: Gpt2 = Gpt2 { n_vocab: 2048, n_ctx: 512, n_layer: 4, d_model: 256, n_head: 4 };
/// The sizes of the bundled gpt-oss.
const SMALL_OSS: GptOss = GptOss {
    n_vocab: 2048,
    n_ctx: 1024,
    n_layer: 4,
    d_model: 256,
    n_head: 8,
    n_head_kv: 2,
    d_head: 64,
    d_ff: 256,
    n_expert: 8,
    n_used: 4,
    window: 64,
};

/// The model's directory before as many bytes of nothing as its data takes; the system stores none of them.
fn without_data(model: &RandomModel) -> ModelFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&model.file.head()).unwrap();
    file.as_file().set_len(model.n_bytes()).unwrap();
    ModelFile::open(file.path()).unwrap()
}

fn written(model: &RandomModel) -> ModelFile {
    let file = NamedTempFile::new().unwrap();
    model.write(file.path(), 7).unwrap();
    ModelFile::open(file.path()).unwrap()
}

/// Name, type and shape of each tensor, by name.
fn directory(file: &ModelFile) -> Vec<(String, TensorType, Vec<u64>)> {
    let tensors = file.tensors().iter();
    let mut directory: Vec<_> =
        tensors.map(|tensor| (tensor.name.clone(), tensor.ty, tensor.shape().to_vec())).collect();
    directory.sort_by(|a, b| a.0.cmp(&b.0));
    directory
}

#[test]
fn published_shapes_have_the_published_number_of_weights() {
    // 20b: OpenAI's model card, 20.91 billion; the others as HF transformers counts the released checkpoints.
    let expected = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200, 20_914_757_184];
    for (name, expected) in NAMES.into_iter().zip(expected) {
        let file = without_data(&RandomModel::published(name, None).unwrap());
        let adapter = detect(file.metadata(), file.tensors()).unwrap();
        let n_weights: u64 = file.tensors().iter().map(|tensor| tensor.n_elements()).sum();
        assert_eq!(n_weights, expected, "{name}");
        assert_eq!(adapter.spec().d_head, 64, "{name}");
        let vocabulary = Vocabulary::from_metadata(file.metadata()).unwrap();
        assert_eq!(adapter.spec().n_vocab, vocabulary.tokens.len(), "{name}");
        let tokenizer = Tokenizer::from_vocabulary(vocabulary).unwrap();
        // Merges work: each pair of letters is a token.
        assert_eq!(tokenizer.encode("abcd").len(), 2, "{name}");
    }
    assert!(RandomModel::published("gpt3", None).is_none());
}

#[test]
fn gpt2_has_the_types_that_llama_cpp_s_quantizer_chose() {
    let expected = ModelFile::open(models().join("tiny-gpt2-q4_k_m.gguf")).unwrap();
    let mut expected = directory(&expected);
    // Its source had positions in f16; llama.cpp's converter keeps f32, and its quantizer what there is.
    let positions = expected.iter_mut().find(|(name, ..)| name == "position_embd.weight").unwrap();
    assert_eq!(std::mem::replace(&mut positions.1, TensorType::F32), TensorType::F16);
    assert_eq!(directory(&without_data(&RandomModel::gpt2("small", SMALL))), expected);
}

#[test]
fn gpt_oss_has_the_tensors_of_a_conversion() {
    let expected = ModelFile::open(models().join("tiny-gpt-oss-mxfp4.gguf")).unwrap();
    assert_eq!(directory(&without_data(&RandomModel::gpt_oss("small", SMALL_OSS))), directory(&expected));
}

#[test]
fn rows_that_256_does_not_divide_have_smaller_blocks() {
    let file = without_data(&RandomModel::published("gpt2-xl", None).unwrap());
    let of = |name: &str| file.tensors().iter().find(|tensor| tensor.name == name).unwrap().ty;
    assert_eq!(of("token_embd.weight"), TensorType::Q8_0);
    // Of 48 layers the first 6, the last 6 and every third between have more bits; 6400 is 25 times 256.
    for (layers, qkv, down) in [
        (&[0, 5, 8, 41, 42, 47][..], TensorType::Q8_0, TensorType::Q6_K),
        (&[6, 7, 9, 10, 40], TensorType::Q5_0, TensorType::Q4_K),
    ] {
        for i in layers {
            let types = ["attn_qkv", "attn_output", "ffn_up", "ffn_down"];
            let types = types.map(|part| of(&format!("blk.{i}.{part}.weight")));
            assert_eq!(types, [qkv, TensorType::Q5_0, TensorType::Q5_0, down], "layer {i}");
        }
    }
}

/// Runs two tokens. Products of normalized rows have σ = 1, and so have logits.
#[track_caller]
fn check_runs(model: &RandomModel) {
    let file = written(model);
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let options = Options { n_ctx: 32, ..Options::for_model(adapter.spec()) };
    let mut engine = Engine::load(engine_device(), &file, adapter.spec(), options, &mut |_, _| {}).unwrap();
    engine.prefill(&[300], &mut |_| {}).unwrap();
    engine.decode(5).unwrap();
    let logits = engine.logits().unwrap();
    assert!(logits.iter().all(|logit| logit.is_finite()));
    let mean_square = logits.iter().map(|&logit| f64::from(logit).powi(2)).sum::<f64>() / logits.len() as f64;
    assert!((0.5..2.0).contains(&mean_square.sqrt()), "σ of the logits: {}", mean_square.sqrt());
}

#[test]
fn gpt2_of_one_layer_runs() {
    check_runs(&RandomModel::published("gpt2", Some(1)).unwrap());
}

#[test]
fn gpt2_in_smaller_blocks_runs() {
    check_runs(&RandomModel::gpt2("narrow", Gpt2 { d_model: 192, n_head: 3, ..SMALL }));
}

#[test]
fn gpt_oss_runs() {
    check_runs(&RandomModel::gpt_oss("small", SMALL_OSS));
}

#[test]
fn products_keep_their_magnitude_and_the_layers_together_add_as_much() {
    let narrow = Gpt2 { d_model: 192, n_head: 3, ..SMALL };
    let mut seen = Vec::new();
    for (model, d) in [(RandomModel::gpt2("narrow", narrow), 192.0), (RandomModel::gpt2("small", SMALL), 256.0)] {
        let mut check = |ty, part: &str, values: &[f32]| {
            let n_in = if part == "ffn_down" { 4.0 * d } else { d };
            let n_added = if matches!(part, "ffn_down" | "attn_output") { 2.0 * SMALL.n_layer as f64 } else { 1.0 };
            let (mean, sigma) = mean_and_sigma(values);
            let found = sigma * f64::sqrt(n_in * n_added);
            assert!((0.97..1.03).contains(&found), "{part}, {ty}: σ is {found} times what it should be");
            assert!(mean.abs() < 0.02 * sigma, "{part}, {ty}: mean {mean:e}, σ {sigma:e}");
            seen.push(ty);
        };
        let path = NamedTempFile::new().unwrap().into_temp_path();
        model.write(&path, 7).unwrap();
        let (file, bytes) = (ModelFile::open(&path).unwrap(), fs::read(&path).unwrap());
        for tensor in file.tensors() {
            if let ["blk", _, part @ ("attn_qkv" | "attn_output" | "ffn_up" | "ffn_down"), "weight"] =
                tensor.name.split('.').collect::<Vec<_>>()[..]
            {
                check(tensor.ty, part, &decode(tensor.ty, &bytes[tensor.range()]).unwrap());
            }
        }
    }
    seen.sort_by_key(|ty| ty.id());
    seen.dedup();
    assert_eq!(seen, [TensorType::Q5_0, TensorType::Q8_0, TensorType::Q4_K, TensorType::Q6_K]);
}

#[test]
fn experts_keep_their_magnitude_within_a_power_of_two() {
    let path = NamedTempFile::new().unwrap().into_temp_path();
    RandomModel::gpt_oss("small", SMALL_OSS).write(&path, 7).unwrap();
    let (file, bytes) = (ModelFile::open(&path).unwrap(), fs::read(&path).unwrap());
    for (part, n_added) in [("gate", 1.0), ("up", 1.0), ("down", 2.0 * SMALL_OSS.n_layer as f64)] {
        let name = format!("blk.1.ffn_{part}_exps.weight");
        let tensor = file.tensors().iter().find(|tensor| tensor.name == name).unwrap();
        let (mean, sigma) = mean_and_sigma(&decode(tensor.ty, &bytes[tensor.range()]).unwrap());
        // All widths are 256. A scale is the nearest power of two.
        let found = sigma * f64::sqrt(256.0 * n_added);
        assert!((0.7..1.43).contains(&found), "{part}: σ is {found} times what it should be");
        assert!(mean.abs() < 0.02 * sigma, "{part}: mean {mean:e}, σ {sigma:e}");
    }
}

fn mean_and_sigma(values: &[f32]) -> (f64, f64) {
    let values = || values.iter().map(|&value| f64::from(value));
    let (mean, n) = (values().sum::<f64>() / values().count() as f64, values().count() as f64);
    (mean, (values().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt())
}

#[test]
fn a_seed_gives_one_file_on_any_number_of_threads() {
    // Tensors of several chunks.
    let model = RandomModel::gpt2("wide", Gpt2 { d_model: 768, n_head: 12, n_layer: 1, ..SMALL });
    let bytes = |seed, n_threads| {
        let file = NamedTempFile::new().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        pool.install(|| model.write(file.path(), seed)).unwrap();
        fs::read(file.path()).unwrap()
    };
    let first = bytes(1, 1);
    assert_eq!(first.len() as u64, model.n_bytes());
    assert!(first == bytes(1, 3));
    // No number of one chunk is that of another.
    let positions = without_data(&model);
    let positions = positions.tensors().iter().find(|tensor| tensor.name == "position_embd.weight").unwrap();
    let mut seen = HashSet::new();
    assert!(positions.n_bytes > 1 << 20 && first[positions.range()].chunks(16).all(|four| seen.insert(four)));
    assert!(first != bytes(2, 3));
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let names = || -> Vec<_> { fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect() };
    let mut model = RandomModel::gpt2("small", Gpt2 { n_layer: 1, ..SMALL });
    fs::create_dir(folder.path().join("taken")).unwrap();
    let error = model.write(&folder.path().join("taken"), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(names(), ["taken"]);
    // No disk is that large.
    model.file.tensors[0].offset = Some(1 << 62);
    model.write(&folder.path().join("large"), 0).unwrap_err();
    assert_eq!(names(), ["taken"]);
}
