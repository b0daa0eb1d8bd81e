use std::sync::Arc;

use cuda_std::emulator::Mode;
use gamma_tests::{engine_device, models};
use gpt_gamma::adapter::{InferenceAdapter, detect};
use gpt_gamma::device::{Emulated, SharedDevice};
use gpt_gamma::engine::{Engine, Error, Gelu, KvType, MemoryPlan, Options};
use gpt_gamma::model_file::ModelFile;

use crate::reference::relative_error;

const TOKENS: [u32; 70] = {
    let mut tokens = [0; 70];
    let mut i = 0;
    while i < tokens.len() {
        tokens[i] = (i as u32 * 677 + 13) % 2000;
        i += 1;
    }
    tokens
};

fn model() -> ModelFile {
    ModelFile::open(models().join("tiny-gpt2-q4_k_m.gguf")).unwrap()
}

fn load_on(device: SharedDevice, change: impl FnOnce(&mut Options)) -> Result<Engine, Error> {
    let file = model();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let mut options = Options { n_ctx: 96, ..Options::for_model(adapter.spec()) };
    change(&mut options);
    Engine::load(device, &file, adapter.spec(), options, &mut |_, _| {})
}

fn load(change: impl FnOnce(&mut Options)) -> Engine {
    load_on(engine_device(), change).unwrap()
}

fn logits_after(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    engine.prefill(tokens, &mut |_| {}).unwrap();
    engine.logits().unwrap()
}

#[test]
fn any_chunking_gives_the_same_logits() {
    let whole = logits_after(&mut load(|_| {}), &TOKENS);
    for n_batch in [1, 7, 64, 69] {
        let chunked = logits_after(&mut load(|options| options.n_batch = n_batch), &TOKENS);
        // A chunk of one token takes the f32 kernels, larger ones f16 operands: 3e-4 a product, a few layers deep.
        let error = relative_error(&chunked, &whole);
        assert!(error <= 2e-3, "chunks of {n_batch}: {error:.2e}");
    }
}

#[test]
fn decoding_step_by_step_is_prefill() {
    let whole = logits_after(&mut load(|_| {}), &TOKENS);
    let mut engine = load(|_| {});
    engine.prefill(&TOKENS[..3], &mut |_| {}).unwrap();
    for &token in &TOKENS[3..] {
        engine.decode(token).unwrap();
    }
    assert_eq!(engine.n_past(), TOKENS.len());
    let error = relative_error(&engine.logits().unwrap(), &whole);
    assert!(error <= 2e-3, "{error:.2e}");
}

#[test]
fn greedy_decoding_repeats_itself_to_the_bit() {
    let run = || {
        let mut engine = load(|_| {});
        engine.prefill(&TOKENS[..9], &mut |_| {}).unwrap();
        let tokens: Vec<u32> = (0..20)
            .map(|_| {
                let token = engine.greedy().unwrap();
                engine.decode(token).unwrap();
                token
            })
            .collect();
        (tokens, engine.logits().unwrap())
    };
    assert_eq!(run(), run());
}

#[test]
fn a_reset_sequence_leaves_no_trace() {
    let mut engine = load(|_| {});
    let fresh = logits_after(&mut engine, &TOKENS[..20]);
    engine.decode(5).unwrap();
    engine.reset();
    assert!(matches!(engine.logits(), Err(Error::NoLogits)));
    assert_eq!(logits_after(&mut engine, &TOKENS[..20]), fresh);
}

#[test]
fn a_token_other_than_the_greedy_one_can_follow() {
    let mut by_decode = load(|_| {});
    by_decode.prefill(&TOKENS[..8], &mut |_| {}).unwrap();
    let greedy = by_decode.greedy().unwrap();
    let other = (greedy + 1) % 2000;
    by_decode.decode(other).unwrap();
    let mut by_prefill = load(|options| options.n_batch = 1);
    let expected = logits_after(&mut by_prefill, &[&TOKENS[..8], &[other]].concat());
    let error = relative_error(&by_decode.logits().unwrap(), &expected);
    assert!(error <= 2e-3, "{error:.2e}");
}

#[test]
fn exact_and_tanh_gelu_differ_as_little_as_they_should() {
    let exact = logits_after(&mut load(|_| {}), &TOKENS);
    let tanh = logits_after(&mut load(|options| options.gelu = Gelu::Tanh), &TOKENS);
    let error = relative_error(&tanh, &exact);
    assert!((1e-5..2e-2).contains(&error), "{error:.2e}");
}

#[test]
fn a_full_context_is_refused_before_anything_is_computed() {
    let mut engine = load(|options| options.n_ctx = 24);
    assert!(matches!(engine.prefill(&TOKENS[..25], &mut |_| {}), Err(Error::ContextFull { wanted: 25, n_ctx: 24 })));
    assert_eq!(engine.n_past(), 0);
    let before = logits_after(&mut engine, &TOKENS[..24]);
    assert!(matches!(engine.decode(1), Err(Error::ContextFull { wanted: 25, n_ctx: 24 })));
    assert_eq!(engine.logits().unwrap(), before);
}

#[test]
fn bad_tokens_and_options_are_refused_with_both_numbers() {
    let mut engine = load(|_| {});
    assert!(matches!(engine.prefill(&[], &mut |_| {}), Err(Error::NoTokens)));
    assert!(matches!(engine.decode(2048), Err(Error::Token { token: 2048, n_vocab: 2048 })));
    assert!(matches!(engine.logits(), Err(Error::NoLogits)));
    let refused = |change: fn(&mut Options)| load_on(engine_device(), change).err().unwrap();
    assert!(matches!(refused(|o| o.n_ctx = 513), Error::Context { wanted: 513, limit: 512 }));
    assert!(matches!(refused(|o| o.n_ctx = 0), Error::Context { wanted: 0, limit: 512 }));
    assert!(matches!(refused(|o| o.n_batch = 0), Error::Batch));
}

#[test]
fn a_decode_step_is_one_recorded_graph() {
    let mut engine = load(|_| {});
    engine.prefill(&TOKENS[..2], &mut |_| {}).unwrap();
    engine.decode(1).unwrap();
    // Embedding; per layer attention and its product, a product before and two after; head, argmax.
    assert_eq!(engine.n_graph_nodes(), 1 + 4 * 5 + 2);
}

#[test]
fn a_whole_step_is_clean_in_the_checked_emulator() {
    let file = model();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let options = Options { n_ctx: 16, n_batch: 8, ..Options::for_model(adapter.spec()) };
    let device = Arc::new(Emulated::new(Mode::Checked { seed: 11 }));
    let mut engine = Engine::load(device, &file, adapter.spec(), options, &mut |_, _| {}).unwrap();
    engine.prefill(&TOKENS[..9], &mut |_| {}).unwrap();
    let token = engine.greedy().unwrap();
    engine.decode(token).unwrap();
    engine.greedy().unwrap();
}

#[test]
fn what_is_fastest_on_a_cpu_gives_the_same_logits() {
    // As `gamma` runs without a GPU: other kernels for experts, other blocks for products. GPT-2 with β, gpt-oss without.
    let after = |model: &str, device: Emulated| {
        let file = ModelFile::open(models().join(model)).unwrap();
        let adapter = detect(file.metadata(), file.tensors()).unwrap();
        let options = Options { n_ctx: 16, n_batch: 8, ..Options::for_model(adapter.spec()) };
        let mut engine = Engine::load(Arc::new(device), &file, adapter.spec(), options, &mut |_, _| {}).unwrap();
        engine.prefill(&TOKENS[..5], &mut |_| {}).unwrap();
        TOKENS[5..8].iter().for_each(|&token| engine.decode(token).unwrap());
        engine.logits().unwrap()
    };
    for model in ["tiny-gpt2-q4_k_m.gguf", "tiny-gpt-oss-mxfp4.gguf"] {
        let expected = after(model, Emulated::new(Mode::Fast));
        let found = after(model, Emulated::new(Mode::Checked { seed: 12 }).for_use());
        // The GPU's kernel for experts rounds activations to f16, as in `any_chunking_gives_the_same_logits`.
        let error = relative_error(&found, &expected);
        assert!(error <= 2e-3, "{model}: {error:.2e}");
    }
}

// ---- layers with a window ----

/// gpt-oss, every other layer of which sees 64 keys.
fn load_windowed(n_batch: usize) -> Engine {
    let file = ModelFile::open(models().join("tiny-gpt-oss-mxfp4.gguf")).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let options = Options { n_ctx: 240, n_batch, ..Options::for_model(adapter.spec()) };
    Engine::load(engine_device(), &file, adapter.spec(), options, &mut |_, _| {}).unwrap()
}

/// Longer than the ring of 128 slots that chunks of up to 64 make.
fn long_prompt() -> Vec<u32> {
    (0..170).map(|i| (i * 677 + 13) % 2000).collect()
}

#[test]
fn windows_see_the_same_keys_in_rings_as_in_a_cache_of_all() {
    let tokens = long_prompt();
    let whole = logits_after(&mut load_windowed(240), &tokens);
    for n_batch in [1, 33, 64] {
        let ring = logits_after(&mut load_windowed(n_batch), &tokens);
        let error = relative_error(&ring, &whole);
        assert!(error <= 2e-3, "chunks of {n_batch}: {error:.2e}");
    }
}

#[test]
fn decoding_across_the_end_of_a_ring_is_prefill() {
    let tokens = long_prompt();
    let whole = logits_after(&mut load_windowed(240), &tokens);
    let mut engine = load_windowed(8);
    engine.prefill(&tokens[..100], &mut |_| {}).unwrap();
    tokens[100..].iter().for_each(|&token| engine.decode(token).unwrap());
    let error = relative_error(&engine.logits().unwrap(), &whole);
    assert!(error <= 2e-3, "{error:.2e}");
}

#[test]
fn layers_with_a_window_keep_that_and_a_chunk() {
    let file = ModelFile::open(models().join("tiny-gpt-oss-mxfp4.gguf")).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    for (n_ctx, n_batch, slots) in [(1024, 56, 128), (1024, 512, 576), (100, 56, 100)] {
        let options = Options { n_ctx, n_batch, kv: KvType::F16, ..Options::for_model(adapter.spec()) };
        let plan = MemoryPlan::new(adapter.spec(), file.tensors(), &options).unwrap();
        // Two layers of each kind; keys and values of two heads of 64, two bytes each.
        assert_eq!(plan.kv_cache(), (2 * (n_ctx + slots) * 2 * 2 * 64 * 2) as u64);
    }
}
