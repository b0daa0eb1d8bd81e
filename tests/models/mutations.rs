//! The reference is sensitive: a model that is wrong in one part misses it by more than the bar.

use std::fs;

use gamma_tests::{engine_device, models};
use gpt_gamma::adapter::{InferenceAdapter, ModelSpec, detect};
use gpt_gamma::engine::{Engine, KvType, Options};
use gpt_gamma::model_file::ModelFile;
use safetensors::SafeTensors;

use crate::reference::{F16_KV, numbers, relative_error};

const MODEL: &str = "tiny-gpt-oss-mxfp4";

#[test]
fn the_model_as_it_is_meets_the_bar() {
    let error = error_with(|_, _| {});
    assert!(error <= F16_KV, "{error:.2e}");
}

#[test]
fn no_sinks() {
    check(|spec, _| spec.layers.iter_mut().for_each(|layer| layer.attention.sinks = None));
}

#[test]
fn a_window_one_longer() {
    check(|spec, _| change_windows(spec, |window| window.map(|n| n + 1)));
}

#[test]
fn a_window_one_shorter() {
    check(|spec, _| change_windows(spec, |window| window.map(|n| n - 1)));
}

#[test]
fn windows_in_the_other_layers() {
    check(|spec, _| {
        let window = spec.layers[0].attention.window;
        assert_eq!((window, spec.layers[1].attention.window), (Some(64), None));
        change_windows(spec, |found| if found.is_some() { None } else { window });
    });
}

#[test]
fn yarn_with_rounded_bounds() {
    check(|_, options| options.yarn_truncate = true);
}

fn change_windows(spec: &mut ModelSpec, change: impl Fn(Option<usize>) -> Option<usize>) {
    spec.layers.iter_mut().for_each(|layer| layer.attention.window = change(layer.attention.window));
}

#[track_caller]
fn check(change: impl FnOnce(&mut ModelSpec, &mut Options)) {
    let error = error_with(change);
    assert!(error > F16_KV, "relative error {error:.2e} is within the bar of {F16_KV:.0e}");
}

/// The relative error of the long prompt's last logits.
fn error_with(change: impl FnOnce(&mut ModelSpec, &mut Options)) -> f64 {
    let file = ModelFile::open(models().join(format!("{MODEL}.gguf"))).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let mut spec = adapter.spec().clone();
    let mut options = Options { kv: KvType::F32, n_batch: 128, ..Options::for_model(&spec) };
    change(&mut spec, &mut options);
    let mut engine = Engine::load(engine_device(), &file, &spec, options, &mut |_, _| {}).unwrap();

    let reference = fs::read(models().join(format!("{MODEL}.reference.safetensors"))).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let tokens = reference.tensor("prompt4.tokens").unwrap();
    let tokens: Vec<u32> = numbers(tokens.data(), u32::from_le_bytes).collect();
    let expected: Vec<f32> =
        numbers(reference.tensor("prompt4.last_logits").unwrap().data(), f32::from_le_bytes).collect();
    let (before, last) = tokens.split_at(tokens.len() - expected.len() / spec.n_vocab);
    engine.prefill(before, &mut |_| {}).unwrap();
    let mut found = Vec::new();
    engine.prefill_all(last, &mut |_, row| found.extend_from_slice(row)).unwrap();
    let error = relative_error(&found, &expected);
    println!("relative error {error:.2e}");
    error
}
