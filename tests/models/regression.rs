//! Models in MXFP4 give what they gave when `models/*.regression.safetensors` were written, so that faster kernels do not
//! drift from it unnoticed. `GAMMA_BLESS=1` writes it anew.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::{env, fs};

use gamma_tests::models;
use gpt_gamma::engine::{Engine, KvType};
use half::f16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::reference::{check_greedy, load, numbers, relative_error};

const MODELS: [&str; 2] = ["tiny-gpt-oss-mxfp4", "tiny-gpt2-mxfp4"];

/// Sums in another order move logits by 5e-4 at most (f16 operands; two f16 caches differ by as much), and rounding the
/// record to f16 by 3e-4.
const TOLERANCE: f64 = 2e-3;

/// Tensors by name: of each prompt the logits after its last token, f16; of the first also 48 greedy tokens, i32, and by
/// how much each was ahead, f32.
type Record = BTreeMap<String, (Dtype, Vec<u8>)>;

#[test]
fn tiny_gpt_oss_gives_what_it_gave() {
    check(MODELS[0]);
}

#[test]
fn tiny_gpt2_gives_what_it_gave() {
    check(MODELS[1]);
}

fn path(model: &str) -> PathBuf {
    models().join(format!("{model}.regression.safetensors"))
}

fn prompts(model: &str) -> Vec<Vec<u32>> {
    let reference = fs::read(models().join(format!("{model}.reference.safetensors"))).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let tokens = (0..).map_while(|i| reference.tensor(&format!("prompt{i}.tokens")).ok());
    tokens.map(|tokens| numbers(tokens.data(), u32::from_le_bytes).collect()).collect()
}

fn check(model: &str) {
    let mut engine = load(model, KvType::F16);
    let prompts = prompts(model);
    if env::var_os("GAMMA_BLESS").is_some_and(|value| value == "1") {
        write(model, &record(&mut engine, &prompts));
    }
    let bytes = fs::read(path(model)).unwrap();
    let before = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: String| before.tensor(&name).unwrap();
    for (i, prompt) in prompts.iter().enumerate() {
        let expected: Vec<f32> =
            numbers(tensor(format!("prompt{i}.logits")).data(), f16::from_le_bytes).map(f32::from).collect();
        let error = relative_error(&logits_after(&mut engine, prompt), &expected);
        println!("{model} prompt {i}: relative error {error:.2e}");
        assert!(error <= TOLERANCE, "prompt {i}: relative error {error:.2e}, tolerance {TOLERANCE:.0e}");
    }
    let greedy: Vec<u32> = numbers(tensor("greedy".to_owned()).data(), u32::from_le_bytes).collect();
    let gaps: Vec<f32> = numbers(tensor("gaps".to_owned()).data(), f32::from_le_bytes).collect();
    check_greedy(&mut engine, &prompts[0], &greedy, &gaps, TOLERANCE);
}

fn logits_after(engine: &mut Engine, prompt: &[u32]) -> Vec<f32> {
    engine.reset();
    engine.prefill(prompt, &mut |_| {}).unwrap();
    engine.logits().unwrap()
}

fn record(engine: &mut Engine, prompts: &[Vec<u32>]) -> Record {
    let mut record = Record::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let logits = logits_after(engine, prompt);
        let bytes = logits.iter().flat_map(|&logit| f16::from_f32(logit).to_le_bytes()).collect();
        record.insert(format!("prompt{i}.logits"), (Dtype::F16, bytes));
    }
    let (mut greedy, mut gaps) = (Vec::new(), Vec::new());
    let mut logits = logits_after(engine, &prompts[0]);
    for _ in 0..48 {
        logits.sort_unstable_by(|a, b| b.total_cmp(a));
        gaps.extend((logits[0] - logits[1]).to_le_bytes());
        let token = engine.greedy().unwrap();
        greedy.extend(token.to_le_bytes());
        engine.decode(token).unwrap();
        logits = engine.logits().unwrap();
    }
    record.insert("greedy".to_owned(), (Dtype::I32, greedy));
    record.insert("gaps".to_owned(), (Dtype::F32, gaps));
    record
}

fn write(model: &str, record: &Record) {
    let size = |dtype| if dtype == Dtype::F16 { 2 } else { 4 };
    let view = |(dtype, bytes): &'_ (Dtype, Vec<u8>)| (*dtype, vec![bytes.len() / size(*dtype)]);
    let views: Vec<(&str, TensorView)> = record
        .iter()
        .map(|(name, tensor)| {
            let (dtype, shape) = view(tensor);
            (name.as_str(), TensorView::new(dtype, shape, &tensor.1).unwrap())
        })
        .collect();
    fs::write(path(model), safetensors::serialize(views, None).unwrap()).unwrap();
}
