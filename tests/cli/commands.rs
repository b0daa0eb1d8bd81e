//! The commands beside `generate`.

use std::fs;

use crate::gamma::{gamma, gamma_with_input};
use crate::{model, vocabulary_only};
use gamma_tests::write::{File, Val, text};
use gpt_gamma::gguf::TensorType;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const TEXT: &str = "Fellow-Citizens of the Senate: naïve 😀\n\n  <|endoftext|>\t12345";

fn ids(text: &str) -> Vec<u32> {
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    value.as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8).collect()
}

#[test]
fn tokenize_prints_the_ids_that_hugging_face_has() {
    let mut theirs = tokenizers::Tokenizer::from_file(model("tiny-gpt-oss.tokenizer.json")).unwrap();
    for specials in [false, true] {
        theirs.set_encode_special_tokens(!specials);
        let expected = theirs.encode_fast(TEXT, false).unwrap().get_ids().to_vec();
        let flags: &[&str] = if specials { &["--specials"] } else { &[] };
        assert_eq!(ids(&gamma(["tokenize", TEXT].iter().chain(flags)).text()), expected);
        let run = gamma_with_input(["tokenize"].iter().chain(flags), TEXT.as_bytes());
        assert_eq!(ids(&run.text()), expected);
    }
}

#[test]
fn tokenize_loses_no_byte_of_standard_input() {
    let every: Vec<u8> = (0..=255).chain(*b"\r\n\xc3\xa9\xc3 \xf0\x9f\x98").collect();
    let lines = gamma_with_input(["tokenize", "--json"], &every).json();
    assert_eq!(lines.iter().flat_map(|line| bytes(&line["bytes"])).collect::<Vec<u8>>(), every);
    assert_eq!(ids(&gamma_with_input(["tokenize"], &every).text()).len(), lines.len());
    assert!(gamma_with_input(["tokenize"], b"").succeeded().is_empty());
}

#[test]
fn tokenize_takes_another_tokenizer() {
    let path = model("tiny-gpt2.tokenizer.json");
    let ours = gamma(["tokenize", "--tokenizer", &path, TEXT]).text();
    assert_eq!(ours, gamma(["tokenize", "-m", &model("tiny-gpt2-q4_k_m.gguf"), TEXT]).text());
    assert_ne!(ours, gamma(["tokenize", TEXT]).text());
}

#[test]
fn a_vocabulary_alone_can_be_tokenized_with_and_inspected() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), vocabulary_only().bytes()).unwrap();
    let path = file.path().to_str().unwrap();
    assert_eq!(gamma(["tokenize", "-m", path, TEXT]).text(), gamma(["tokenize", TEXT]).text());
    let shown = gamma(["inspect", "-m", path]).text();
    assert!(shown.contains("architecture  gpt2; vocabulary only, no tensors\n"), "{shown}");
    assert!(shown.contains("tokenizer     byte-level BPE, pre-tokenizer gpt-4o, 2048 tokens"), "{shown}");
}

#[test]
fn inspect_tells_what_is_in_the_bundled_model() {
    let shown = gamma(["inspect"]).text();
    for wanted in ["architecture  gpt-oss; runs: 4 layers, width 256", "gpt-oss.block_count", "token_embd.weight"] {
        assert!(shown.contains(wanted), "{wanted:?} is not in {shown}");
    }
    let longest = shown.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(longest < 300, "a line of {longest} characters: long arrays are to be abbreviated");

    let json = &gamma(["inspect", "--json"]).json()[0];
    assert_eq!(
        (&json["architecture"], &json["runs"], &json["reason"]),
        (&"gpt-oss".into(), &true.into(), &Value::Null)
    );
    let pairs = json["metadata"].as_array().unwrap();
    let tokens = pairs.iter().find(|pair| pair["key"] == "tokenizer.ggml.tokens").unwrap();
    assert_eq!((&tokens["length"], &tokens["type"]), (&2048.into(), &"array of string".into()));
    let tensors = json["tensors"].as_array().unwrap();
    let sum = |rows: &[Value]| rows.iter().map(|row| row["bytes"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum(tensors), sum(json["types"].as_array().unwrap()));
    assert!(sum(tensors) > 2_000_000);
}

#[test]
fn inspect_shows_what_does_not_run() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = File::new()
        .key("general.architecture", text("mamba"))
        .key("mamba.numbers", Val::Array(5, (0..100).map(Val::I32).collect()))
        .tensor("odd", TensorType::IQ4_NL, &[64, 3])
        .bytes();
    fs::write(file.path(), bytes).unwrap();
    let path = file.path().to_str().unwrap();
    let shown = gamma(["inspect", "-m", path]).text();
    for wanted in [
        "architecture  mamba; does not run: architecture \"mamba\" is not supported",
        "tokenizer     none that can be used: metadata key tokenizer.ggml.model is missing",
        "[0, 1, 2, 3, 4, 5, …] (100)",
        "64 × 3",
        "not supported as a weight",
    ] {
        assert!(shown.contains(wanted), "{wanted:?} is not in {shown}");
    }
    let json = &gamma(["inspect", "--json", "-m", path]).json()[0];
    assert_eq!((&json["runs"], &json["types"][0]["supported"]), (&false.into(), &false.into()));
}

#[test]
fn plan_adds_up_and_the_largest_context_is_the_largest() {
    let plan = |args: &[&str]| gamma(["plan", "--device", "cpu", "--json"].iter().chain(args));
    let whole = &plan(&[]).json()[0];
    let number = |json: &Value, key: &str| json[key].as_u64().unwrap();
    let weights: u64 = whole["weights"].as_array().unwrap().iter().map(|row| number(row, "bytes")).sum();
    let sum = weights + number(whole, "kv_cache_bytes") + number(whole, "workspace_bytes");
    assert_eq!((number(whole, "total_bytes"), number(whole, "n_ctx")), (sum, 1024));
    assert_eq!((&whole["fits"], &whole["largest_ctx"]), (&true.into(), &1024.into()));
    // 2 (K and V) · (2 layers · 1024 tokens + 2 · (a window of 64 + a chunk of 512)) · 2 heads of 64 · 2 bytes
    assert_eq!(number(whole, "kv_cache_bytes"), 2 * (2 * 1024 + 2 * (64 + 512)) * 128 * 2);
    let double = &plan(&["--kv", "f32"]).json()[0];
    assert_eq!(number(double, "kv_cache_bytes"), 2 * number(whole, "kv_cache_bytes"));

    let limit = (sum - 100_000).to_string();
    let run = plan(&["--vram-limit", &limit]);
    let json: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((&json["fits"], &json["budget_bytes"].to_string()), (&false.into(), &limit));
    let largest = number(&json, "largest_ctx");
    let line = run.refused();
    let told =
        format!("bundled model: {sum} bytes of device memory are needed for a context of 1024, {limit} are free");
    assert!(line.starts_with(&told) && line.ends_with(&format!("use -c {largest}")), "{line}");
    plan(&["--vram-limit", &limit, "-c", &largest.to_string()]).succeeded();
    plan(&["--vram-limit", &limit, "-c", &(largest + 1).to_string()]).refused();
    // What the plan says is what loading does.
    let fits = largest.to_string();
    let args = ["generate", "--device", "cpu", "-p", "x", "-n", "1", "--vram-limit", &limit];
    gamma(args.iter().chain(&["-c", &fits])).succeeded();
    gamma(args).refused();
}

#[test]
fn plan_needs_no_device() {
    let shown = gamma(["plan"]).text();
    assert!(shown.contains("budget     unknown (no CUDA device: "), "{shown}");
    let shown = gamma(["plan", "--vram-limit", "24GiB"]).text();
    assert!(shown.contains("24.00 GiB     25769803776 bytes  --vram-limit\n"), "{shown}");
    assert!(shown.contains("largest    1024 tokens of context fit, all that the model was made for\n"), "{shown}");
}

#[test]
fn logits_are_a_row_per_token() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
    let prompt = "Fellow-Citizens of the Senate";
    let (out, again, tokens) = (path("out.safetensors"), path("again.safetensors"), path("tokens.json"));
    let json = gamma(["logits", "--device", "cpu", "-p", prompt, "-o", &out, "--json"]).json();

    let expected = ids(&gamma(["tokenize", prompt]).text());
    assert_eq!((&json[0]["n_tokens"], &json[0]["n_vocab"]), (&expected.len().into(), &2048.into()));
    let written = fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&written).unwrap();
    let found = tensors.tensor("tokens").unwrap();
    assert_eq!((found.dtype(), found.shape()), (Dtype::I32, &[expected.len()][..]));
    assert_eq!(found.data(), expected.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>());
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!((logits.dtype(), logits.shape()), (Dtype::F32, &[expected.len(), 2048][..]));

    // The last row is what generation goes on from.
    let last = &logits.data()[(expected.len() - 1) * 2048 * 4..];
    let last: Vec<f32> = last.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    let likeliest = (0..2048).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    let args = ["generate", "--device", "cpu", "-p", prompt, "-n", "1", "--temp", "0", "--json"];
    assert_eq!(gamma(args).json()[0]["id"], likeliest);

    fs::write(&tokens, serde_json::to_string(&expected).unwrap()).unwrap();
    assert!(gamma(["logits", "--device", "cpu", "--tokens-file", &tokens, "-o", &again]).succeeded().is_empty());
    assert_eq!(fs::read(&again).unwrap(), written);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "something was left behind");
}

#[test]
fn doctor_finds_the_emulator_in_order_and_says_what_is_missing() {
    let shown = gamma(["doctor"]).text();
    for wanted in [
        "emulator  kernels load, layer_norm is right",
        "verdict   models run in the emulator",
        "kernels   sm_80: PTX ",
        "kernels   sm_90a: PTX ",
        "to use a GPU: ",
    ] {
        assert!(shown.contains(wanted), "{wanted:?} is not in {shown}");
    }
    let json = &gamma(["doctor", "--json"]).json()[0];
    assert!(json["driver_error"].is_string() && json["emulator"]["error"].is_null(), "{json}");
}
