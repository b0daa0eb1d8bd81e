use std::fs;
use std::path::Path;

use gamma_tests::{engine_device, models};
use gpt_gamma::adapter::{InferenceAdapter, detect};
use gpt_gamma::engine::{Engine, KvType, Options};
use gpt_gamma::model_file::ModelFile;
use safetensors::SafeTensors;

/// f16 operands on tensor cores cost about 3e-4 a product, which a few layers do not add up to this.
const F32_KV: f64 = 2e-3;
/// The bar of design.md section 5; f16 keys and values cost about 5e-4 each.
pub const F16_KV: f64 = 1e-2;

#[test]
fn tiny_gpt2_q4_k_m_with_f32_cache() {
    check("tiny-gpt2-q4_k_m", KvType::F32, F32_KV);
}

#[test]
fn tiny_gpt2_q4_k_m_with_f16_cache() {
    check("tiny-gpt2-q4_k_m", KvType::F16, F16_KV);
}

#[test]
fn tiny_gpt2_mxfp4_with_f32_cache() {
    check("tiny-gpt2-mxfp4", KvType::F32, F32_KV);
}

#[test]
fn tiny_gpt2_mxfp4_with_f16_cache() {
    check("tiny-gpt2-mxfp4", KvType::F16, F16_KV);
}

/// A choice of experts is not continuous: a router logit's last digits can swap two, and with them a layer's output. So
/// the bar of dense models is no bar here, and the f32 cache has the one of design.md section 5.
#[test]
fn tiny_gpt_oss_mxfp4_with_f32_cache() {
    check("tiny-gpt-oss-mxfp4", KvType::F32, F16_KV);
}

#[test]
fn tiny_gpt_oss_mxfp4_with_f16_cache() {
    check("tiny-gpt-oss-mxfp4", KvType::F16, F16_KV);
}

fn check(model: &str, kv: KvType, tolerance: f64) {
    let mut engine = load(model, kv);
    let reference = fs::read(models().join(format!("{model}.reference.safetensors"))).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let (mut n_prompts, mut n_long) = (0, 0);
    while let Ok(tokens) = reference.tensor(&format!("prompt{n_prompts}.tokens")) {
        let tokens: Vec<u32> = numbers(tokens.data(), i32::from_le_bytes).map(|token| token as u32).collect();
        let mut logits = Vec::new();
        engine.reset();
        engine.prefill_all(&tokens, &mut |_, row| logits.push(row.to_vec())).unwrap();
        assert_eq!(logits.len(), tokens.len());
        let name = |what: &str| format!("prompt{n_prompts}.{what}");
        let mut error = f64::INFINITY;
        if let Ok(expected) = reference.tensor(&name("logits")) {
            let expected: Vec<f32> = numbers(expected.data(), f32::from_le_bytes).collect();
            error = relative_error(&logits.concat(), &expected);
            println!("{model} {kv:?} prompt {n_prompts}: {} tokens, logits relative error {error:.2e}", tokens.len());
            assert!(error <= tolerance, "prompt {n_prompts}: relative error {error:.2e}, tolerance {tolerance:.0e}");
        } else {
            check_long(&reference, n_prompts, &tokens, &logits, tolerance);
            n_long += 1;
        }
        if let Ok(expected) = reference.tensor(&name("greedy")) {
            let expected: Vec<u32> = numbers(expected.data(), i32::from_le_bytes).map(|t| t as u32).collect();
            let gaps = reference.tensor(&name("greedy_gap")).unwrap();
            let gaps: Vec<f32> = numbers(gaps.data(), f32::from_le_bytes).collect();
            check_greedy(&mut engine, &tokens, &expected, &gaps, error);
        }
        n_prompts += 1;
    }
    assert!(n_prompts >= 2 && n_long >= 1, "{n_prompts} prompts, {n_long} long");
}

/// The long prompt: the last rows' logits, every position's likeliest token and negative log-likelihood.
fn check_long(reference: &SafeTensors, prompt: usize, tokens: &[u32], logits: &[Vec<f32>], tolerance: f64) {
    let tensor = |what: &str| reference.tensor(&format!("prompt{prompt}.{what}")).unwrap();
    let last: Vec<f32> = numbers(tensor("last_logits").data(), f32::from_le_bytes).collect();
    let rows = last.len() / logits[0].len();
    let error = relative_error(&logits[logits.len() - rows..].concat(), &last);
    println!("prompt {prompt}: {} tokens, last {rows} logits relative error {error:.2e}", tokens.len());
    assert!(error <= tolerance, "prompt {prompt}: relative error {error:.2e}, tolerance {tolerance:.0e}");

    let argmax: Vec<i32> = numbers(tensor("argmax").data(), i32::from_le_bytes).collect();
    let likeliest = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap();
    let agree = logits.iter().zip(&argmax).filter(|(row, expected)| likeliest(row) == **expected as usize).count();
    // 99 % of positions: near ties may fall either way within the tolerance.
    assert!(agree * 100 >= argmax.len() * 99, "top-1 agrees at {agree} of {} positions", argmax.len());

    let nll: Vec<f32> = numbers(tensor("nll").data(), f32::from_le_bytes).collect();
    for (position, &expected) in nll.iter().enumerate() {
        let row = &logits[position];
        let top = row.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
        let found = sum.ln() - f64::from(row[tokens[position + 1] as usize] - top);
        // A logit moves by the relative error times the logits' size, about 10 here, and so does a log-likelihood, twice.
        assert!(
            (found - f64::from(expected)).abs() <= 20.0 * tolerance,
            "position {position}: nll {found}, {expected}"
        );
    }
}

/// Greedy decoding step by step gives the reference's tokens, as long as its top two logits are apart by more than the error
/// that the prompt's logits have.
pub fn check_greedy(engine: &mut Engine, prompt: &[u32], expected: &[u32], gaps: &[f32], error: f64) {
    engine.reset();
    engine.prefill(prompt, &mut |_| {}).unwrap();
    let mut compared = 0;
    for (&expected, &gap) in expected.iter().zip(gaps) {
        let logits = engine.logits().unwrap();
        let rms = (logits.iter().map(|x| f64::from(x * x)).sum::<f64>() / logits.len() as f64).sqrt();
        // Two logits, each off by up to twice the error's rms.
        if f64::from(gap) <= 4.0 * error * rms {
            break; // From here on the sequences may differ rightly.
        }
        let token = engine.greedy().unwrap();
        assert_eq!(token, expected, "step {compared}, gap {gap}");
        compared += 1;
        engine.decode(token).unwrap();
    }
    println!("greedy: {compared} of {} tokens compared, all equal", expected.len());
    assert!(compared >= 4, "only {compared} tokens could be compared");
}

pub fn load(model: &str, kv: KvType) -> Engine {
    let file = ModelFile::open(models().join(Path::new(model).with_extension("gguf"))).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    // A chunk that divides no prompt, so that chunks meet within them.
    let options = Options { kv, n_batch: 56, ..Options::for_model(adapter.spec()) };
    Engine::load(engine_device(), &file, adapter.spec(), options, &mut |_, _| {}).unwrap()
}

pub fn numbers<'a, const N: usize, T: 'a>(bytes: &'a [u8], of: fn([u8; N]) -> T) -> impl Iterator<Item = T> + 'a {
    bytes.chunks_exact(N).map(move |bytes| of(bytes.try_into().unwrap()))
}

pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
    gamma_tests::relative_error(found, &expected)
}
