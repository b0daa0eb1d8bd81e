//! Going back in a sequence, and on from there.

use gamma_tests::{engine_device, models};
use gpt_gamma::adapter::{InferenceAdapter, detect};
use gpt_gamma::engine::{Engine, Error, Options};
use gpt_gamma::model_file::ModelFile;

/// The second has sliding windows: 64 of 128 tokens below.
const MODELS: [&str; 2] = ["tiny-gpt2-q4_k_m.gguf", "tiny-gpt-oss-mxfp4.gguf"];

fn load(model: &str) -> Engine {
    let file = ModelFile::open(models().join(model)).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let options = Options { n_ctx: 128, ..Options::for_model(adapter.spec()) };
    Engine::load(engine_device(), &file, adapter.spec(), options, &mut |_, _| {}).unwrap()
}

fn tokens(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 677 + seed * 131 + 13) % 2000).collect()
}

fn logits_after(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    engine.prefill(tokens, &mut |_| {}).unwrap();
    engine.logits().unwrap()
}

#[test]
fn going_on_after_a_rewind_is_a_fresh_run() {
    let (kept, dropped, following) = (tokens(1, 72), tokens(2, 40), tokens(3, 33));
    for model in MODELS {
        let mut fresh = load(model);
        fresh.prefill(&kept, &mut |_| {}).unwrap();
        let expected = logits_after(&mut fresh, &following);

        let mut engine = load(model);
        engine.prefill(&kept, &mut |_| {}).unwrap();
        engine.prefill(&dropped, &mut |_| {}).unwrap();
        engine.decode(7).unwrap();
        engine.rewind(kept.len()).unwrap();
        assert_eq!(engine.n_past(), kept.len());
        // The same launches on the same numbers, wherever the engine has been meanwhile.
        assert_eq!(logits_after(&mut engine, &following), expected, "{model}");
    }
}

#[test]
fn a_decode_step_after_a_rewind_is_that_of_a_fresh_run() {
    for model in MODELS {
        let mut engine = load(model);
        engine.prefill(&tokens(1, 20), &mut |_| {}).unwrap();
        let first = engine.greedy().unwrap();
        engine.decode(first).unwrap();
        let expected = engine.logits().unwrap();
        for token in [first, 5, 6] {
            engine.decode(token).unwrap();
        }
        engine.rewind(20).unwrap();
        assert!(matches!((engine.logits(), engine.greedy()), (Err(Error::NoLogits), Err(Error::NoLogits))));
        engine.decode(first).unwrap();
        assert_eq!(engine.logits().unwrap(), expected, "{model}");
    }
}

#[test]
fn what_is_not_there_cannot_be_kept() {
    let mut engine = load(MODELS[0]);
    let before = logits_after(&mut engine, &tokens(1, 9));
    assert!(matches!(engine.rewind(10), Err(Error::Rewind { to: 10, oldest: 0, n_past: 9 })));
    assert_eq!((engine.n_past(), engine.logits().unwrap()), (9, before.clone()));
    engine.rewind(9).unwrap();
    assert_eq!(engine.logits().unwrap(), before, "nothing was forgotten");
    engine.rewind(0).unwrap();
    assert!(matches!(engine.logits(), Err(Error::NoLogits)));
    assert_eq!(logits_after(&mut engine, &tokens(1, 9)), before);
}
