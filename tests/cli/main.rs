//! The `gamma` command as its users meet it: arguments and standard input in; output, messages and exit code out.
//!
//! Everything runs in the emulator, on a GPU host too: what the device computes is tested elsewhere.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]

mod bench;
mod chat;
mod commands;
mod gamma;
mod generate;
mod help;
mod perplexity;
mod refusals;
mod small;

use gamma_tests::write::{File, Val, text};
use gpt_gamma::gguf::{Metadata, Strings, parse};

/// A bundled file's path.
fn model(name: &str) -> String {
    gamma_tests::models().join(name).into_os_string().into_string().unwrap()
}

/// The metadata of the model that runs without `-m`.
fn bundled_metadata() -> Metadata {
    parse(&std::fs::read(model("tiny-gpt-oss-mxfp4.gguf")).unwrap()).unwrap().metadata
}

/// A file with the bundled model's vocabulary and no tensors.
fn vocabulary_only() -> File {
    let metadata = bundled_metadata();
    let texts = |key: &str| {
        let texts: Strings = metadata.required(key).unwrap();
        Val::Array(8, texts.map(|text| Val::Str(text.to_vec())).collect())
    };
    let types: Vec<i32> = metadata.required("tokenizer.ggml.token_type").unwrap();
    File::new()
        .key("general.architecture", text("gpt2"))
        .key("tokenizer.ggml.model", text("gpt2"))
        .key("tokenizer.ggml.pre", text("gpt-4o"))
        .key("tokenizer.ggml.tokens", texts("tokenizer.ggml.tokens"))
        .key("tokenizer.ggml.token_type", Val::Array(5, types.into_iter().map(Val::I32).collect()))
        .key("tokenizer.ggml.merges", texts("tokenizer.ggml.merges"))
}
