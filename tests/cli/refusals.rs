//! What cannot be done is refused in one clear line with exit code 1; what cannot be meant, with usage and exit code 2.

use std::fs;
use std::path::{Path, PathBuf};

use crate::gamma::{gamma, gamma_with_input, generate};
use crate::{model, vocabulary_only};
use gamma_tests::write::{File, Val, text, texts};
use gpt_gamma::gguf::TensorType;

/// Writes `bytes` where they are gone after the test.
fn file(bytes: &[u8]) -> tempfile::TempPath {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    file.into_temp_path()
}

/// Asserts that every command that opens a model says `expected` of the one in `path`.
#[track_caller]
fn refuse(path: &Path, expected: &str) {
    let name = path.to_str().unwrap();
    let expected = format!("{name}: {expected}");
    assert_eq!(generate(&["-m", name, "-p", "x"]).refused(), expected);
    assert_eq!(gamma(["plan", "--device", "cpu", "-m", name]).refused(), expected);
    assert_eq!(gamma(["logits", "--device", "cpu", "-m", name, "-p", "x", "-o", "never-written"]).refused(), expected);
}

/// As [`refuse`], by the commands that want no model but only its file, too.
#[track_caller]
fn refuse_file(path: &Path, expected: &str) {
    refuse(path, expected);
    let name = path.to_str().unwrap();
    for args in [&["inspect", "-m", name][..], &["tokenize", "-m", name, "x"]] {
        assert_eq!(gamma(args).refused(), format!("{name}: {expected}"));
    }
}

#[test]
fn a_missing_file() {
    refuse_file(Path::new("no/such/model.gguf"), "no such file");
}

#[test]
fn a_directory() {
    refuse_file(tempfile::tempdir().unwrap().path(), "is a directory, expected a GGUF file");
}

#[test]
fn an_empty_file() {
    refuse_file(&file(b""), "file is empty");
}

#[test]
fn a_file_that_is_not_gguf() {
    refuse_file(&file(b"PK\x03\x04 and more"), "not a GGUF file: magic is 0x04034b50, expected 0x46554747");
}

#[test]
fn a_truncated_header() {
    refuse_file(&file(b"GGUF\x03\0\0\0abc"), "file ends inside tensor count: 8 bytes needed at offset 8, 3 left");
}

#[test]
fn a_download_that_stopped_half_way() {
    let whole = fs::read(model("tiny-gpt2-q4_k_m.gguf")).unwrap();
    let half = file(&whole[..whole.len() / 2]);
    let line = generate(&["-m", half.to_str().unwrap(), "-p", "x"]).refused();
    assert!(line.contains("file ends inside tensor"), "{line}");
    assert!(line.ends_with(&format!("the file has {}; was it downloaded in full?", whole.len() / 2)), "{line}");
}

#[test]
fn an_unknown_architecture() {
    let bytes = File::new().key("general.architecture", text("mamba")).tensor("x", TensorType::F32, &[8]).bytes();
    let path = file(&bytes);
    let line = generate(&["-m", path.to_str().unwrap(), "-p", "x"]).refused();
    assert!(line.starts_with(&format!("{}: architecture \"mamba\" is not supported; supported: gpt2", path.display())));
}

#[test]
fn an_unsupported_type() {
    let bytes = File::new()
        .key("general.architecture", text("gpt2"))
        .key("gpt2.block_count", Val::U32(1))
        .key("gpt2.context_length", Val::U32(16))
        .key("gpt2.embedding_length", Val::U32(32))
        .key("gpt2.feed_forward_length", Val::U32(96))
        .key("gpt2.attention.head_count", Val::U32(4))
        .key("gpt2.attention.layer_norm_epsilon", Val::F32(1e-5))
        .key("tokenizer.ggml.tokens", texts(["a", "b"]))
        .tensor("token_embd.weight", TensorType::IQ4_NL, &[32, 2])
        .bytes();
    let expected = format!(
        "tensor token_embd.weight has type IQ4_NL (20), which is not supported; supported: {}",
        TensorType::supported_names()
    );
    refuse(&file(&bytes), &expected);
}

#[test]
fn a_vocabulary_without_a_model() {
    let bytes = vocabulary_only().bytes();
    refuse(&file(&bytes), "holds a vocabulary only, no tensors; `gamma tokenize` and `gamma inspect` can use it");
}

#[test]
fn control_characters_of_a_file_do_not_reach_the_terminal() {
    let bytes = File::new().key("general.architecture", text("a\x1b[2J\nb")).tensor("x", TensorType::F32, &[8]).bytes();
    let path = file(&bytes);
    let line = generate(&["-m", path.to_str().unwrap(), "-p", "x"]).refused();
    assert!(!line.contains('\x1b'), "{line:?}");
    let shown = gamma(["inspect", "-m", path.to_str().unwrap()]).text();
    assert!(!shown.contains('\x1b') && shown.contains("a\\u{1b}[2J\\nb"), "{shown:?}");
}

#[test]
fn a_context_larger_than_the_model_s() {
    let line = generate(&["-c", "1025", "-p", "x"]).refused();
    assert_eq!(line, "bundled model: a context of 1025 tokens was asked for, the model has 1 to 1024");
}

#[test]
fn a_prompt_longer_than_the_context() {
    let n_tokens = gamma(["tokenize", "1 2 3 4 5 6 7 8"]).text().lines().count();
    let line = generate(&["-c", "4", "-p", "1 2 3 4 5 6 7 8"]).refused();
    assert_eq!(line, format!("prompt: has {n_tokens} tokens, the context has room for 4; -c makes it larger"));
    let line = generate(&["-p", &"word ".repeat(2000)]).refused();
    assert!(line.ends_with("tokens, the context has room for 1024, all that the model was made for"), "{line}");
}

#[test]
fn a_model_larger_than_the_memory() {
    let line = generate(&["--vram-limit", "1MiB", "-p", "x"]).refused();
    assert!(line.contains("1048576 are free; no context fits: the weights alone are too large"), "{line}");
    assert!(line.starts_with("bundled model: "), "{line}");
}

#[test]
fn an_empty_prompt_of_a_model_without_a_beginning_token() {
    // The vocabulary names none, and nothing else is asked of it before that is noticed.
    let directory = gpt_gamma::gguf::parse(&fs::read(model("tiny-gpt2-q4_k_m.gguf")).unwrap()).unwrap();
    assert!(directory.metadata.value("tokenizer.ggml.bos_token_id").is_some(), "so the bundled one starts from it");
    let bytes = fs::read(model("tiny-gpt2-q4_k_m.gguf")).unwrap();
    let key = b"tokenizer.ggml.bos_token_id";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    let mut renamed = bytes;
    renamed[at + 15..at + 18].copy_from_slice(b"xxx");
    let line = generate(&["-m", file(&renamed).to_str().unwrap(), "-p", ""]).refused();
    assert_eq!(line, "prompt: is empty, and the model names no token to begin with; give some text with -p");
}

#[test]
fn a_missing_prompt_file_and_a_missing_tokenizer() {
    assert_eq!(generate(&["-f", "no/such"]).refused(), "no/such: No such file or directory (os error 2)");
    let line = generate(&["--tokenizer", "no/such", "-p", "x"]).refused();
    assert_eq!(line, "no/such: No such file or directory (os error 2)");
}

#[test]
fn specials_in_bytes_that_are_no_text() {
    let line = gamma_with_input(["tokenize", "--specials"], b"a\xff").refused();
    assert_eq!(line, "text: is not UTF-8, which --specials needs");
}

#[test]
fn a_message_that_is_no_text() {
    let run = gamma_with_input(["generate", "--device", "cpu", "--chat"], b"a\xff");
    assert_eq!(run.refused(), "prompt: is not UTF-8, which --chat needs");
}

#[test]
fn a_gpu_where_there_is_none() {
    for flags in [&["--device", "cuda"][..], &["--gpu", "0"], &["--ptx", "sm_80"]] {
        let line = gamma(["generate", "-p", "x"].iter().chain(flags)).refused();
        assert!(line.starts_with("no CUDA device: ") && line.ends_with("; run `gamma doctor`"), "{line}");
    }
}

#[test]
fn token_files_that_are_none() {
    let cases = [
        ("[1, 2", "is no JSON array of token ids: EOF while parsing a list at line 1 column 5"),
        ("[1, -2]", "is no JSON array of token ids: invalid value: integer `-2`, expected u32 at line 1 column 6"),
        ("[]", "holds no token"),
        ("[1, 2048]", "token id 2048 at index 1 is outside the vocabulary of 2048 tokens"),
    ];
    for (tokens, expected) in cases {
        let path = file(tokens.as_bytes());
        let name = path.to_str().unwrap();
        let run = gamma(["logits", "--device", "cpu", "--tokens-file", name, "-o", "never-written"]);
        assert_eq!(run.refused(), format!("{name}: {expected}"));
    }
    assert!(!PathBuf::from("never-written").exists());
}

#[test]
fn output_that_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().to_str().unwrap();
    let run = gamma(["logits", "--device", "cpu", "-p", "x", "-o", name]);
    assert_eq!(run.refused(), format!("{name}: is a directory"));
    let run = gamma(["logits", "--device", "cpu", "-p", "x", "-o", "no/such/out.safetensors"]);
    assert!(run.refused().starts_with("no/such/out.safetensors: No such file or directory"));
}

#[test]
fn wrong_usage() {
    let cases = [
        (&["--temprature", "1"][..], "--temp"),
        (&["--temp", "-1"], "--temp: '-1' is out of range; expected 0 or more"),
        (&["--temp", "nan"], "--temp: 'NaN' is out of range"),
        (&["--temp", "warm"], "invalid float literal"),
        (&["--top-p", "1.5"], "--top-p: '1.5' is out of range; expected 0 to 1"),
        (&["--min-p", "-0.1"], "--min-p: '-0.1' is out of range; expected 0 to 1"),
        (&["--top-k", "-1"], "invalid value '-1' for '--top-k <K>'"),
        (&["--repeat-penalty", "0"], "--repeat-penalty: '0' is out of range; expected more than 0"),
        (&["--presence-penalty", "inf"], "--presence-penalty: 'inf' is out of range; expected a finite number"),
        (&["--logit-bias", "262"], "expected a token id, + or -, and a number"),
        (&["--logit-bias", "262+inf"], "--logit-bias: 'inf' for token 262 is out of range"),
        (&["-n", "-2"], "expected -1 or a whole number from 0"),
        (&["-s", "-2"], "expected -1 or a whole number from 0"),
        (&["-b", "0"], "expected a whole number from 1 to 1048576"),
        (&["-c", "-1"], "invalid value '-1' for '--ctx-size <N>'"),
        (&["--vram-limit", "0"], "expected a number of bytes above 0"),
        (&["--vram-limit", "24XB"], "expected a number of bytes above 0"),
        (&["--kv", "q8_0"], "possible values: f16, f32"),
        (&["--gelu", "fast"], "possible values: exact, tanh"),
        (&["--device", "rocm"], "possible values: auto, cuda, cpu"),
        (&["--ptx", "sm_70"], "expected sm_80 or sm_90a"),
        (&["--device", "cpu", "--gpu", "0"], "--gpu cannot be used with it"),
        (&["-f", "x"], "cannot be used with"),
        (&["--top-logprobs", "3"], "--json"),
        (&["-r", ""], "--reverse-prompt: '' would stop at once"),
        (&["--chat", "--specials"], "cannot be used with"),
        (&["--chat", "--reasoning", "hard"], "possible values: low, medium, high"),
        (&["--system", "Be brief."], "--system and --reasoning are for --chat"),
        (&["stray"], "unexpected argument 'stray'"),
    ];
    for (flags, expected) in cases {
        let run = gamma(["generate", "-p", "x"].iter().chain(flags));
        assert_eq!((run.code, run.stdout.len()), (2, 0), "{flags:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{flags:?}: {}", run.stderr);
    }
    for args in [&["dream"][..], &["logits", "-p", "x"], &["inspect", "--temp", "1"], &["tokenize", "a", "b"]] {
        assert_eq!(gamma(args).code, 2, "{args:?}");
    }
}
