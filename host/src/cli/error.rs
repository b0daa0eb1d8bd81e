//! Why a command failed, and how that is told: one line, `gamma: subject: fact`.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use gpt_gamma::gguf::MetadataError;
use gpt_gamma::{adapter, chat, device, engine, model_file, sampler, tokenizer};

/// Why a command failed. Wrong usage is not among it: that is clap's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    ModelFile(#[from] model_file::Error),
    #[error("{file}")]
    Adapter { file: String, source: adapter::Error },
    #[error("{file}: holds a vocabulary only, no tensors; `gamma tokenize` and `gamma inspect` can use it")]
    NoTensors { file: String },
    #[error("{file}")]
    Vocabulary { file: String, source: MetadataError },
    #[error("{file}")]
    Tokenizer { file: String, source: tokenizer::Error },
    #[error("{file}: has {found} tokens, more than the model's {expected}")]
    TokenizerTooLarge { file: String, found: usize, expected: usize },
    #[error("prompt: has {n_tokens} tokens, the context has room for {n_ctx}{advice}")]
    PromptTooLong { n_tokens: usize, n_ctx: usize, advice: &'static str },
    #[error("prompt: is empty, and the model names no token to begin with; give some text with -p")]
    EmptyPrompt,
    #[error("prompt: none was given; use -p, -f or standard input")]
    NoPrompt,
    #[error("{what}: is not UTF-8, which --specials needs")]
    SpecialsNotUtf8 { what: &'static str },
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: is no JSON array of token ids", path.display())]
    TokensFile { path: PathBuf, source: serde_json::Error },
    #[error("{}: token id {id} at index {idx} is outside the vocabulary of {n_vocab} tokens", path.display())]
    TokenOutsideVocabulary { path: PathBuf, id: u32, idx: usize, n_vocab: usize },
    #[error("{}: holds no token", path.display())]
    NoTokens { path: PathBuf },
    #[error("{}", path.display())]
    Safetensors { path: PathBuf, source: safetensors::SafeTensorError },
    #[error("{file}: has neither the markers of harmony nor a chat template; `gamma generate` continues any text")]
    NoChatFormat { file: String },
    #[error("{file}")]
    Template { file: String, source: chat::TemplateError },
    #[error("prompt: is not UTF-8, which --chat needs")]
    MessageNotUtf8,
    #[error("a window of {n_ctx} tokens leaves fewer than 2 to score; use -c 5 or more")]
    WindowTooSmall { n_ctx: usize },
    #[error("text: has {found} tokens, fewer than the {expected} of one window; use a longer text or a smaller -c")]
    TextTooShort { found: usize, expected: usize },
    #[error("test {test}: takes {n_tokens} tokens of context, the model was made for {n_ctx}")]
    BenchTooLong { test: String, n_tokens: usize, n_ctx: usize },
    #[error("terminal")]
    Terminal(#[source] rustyline::error::ReadlineError),
    #[error("standard input")]
    Input(#[source] io::Error),
    #[error("standard output")]
    Output(#[source] io::Error),
    #[error("Ctrl-C cannot be watched")]
    Interrupt(#[source] ctrlc::Error),
    #[error(transparent)]
    Device(#[from] device::Error),
    #[error("{file}")]
    Engine { file: String, source: engine::Error },
    #[error("sampling")]
    Sampler(#[from] sampler::Error),
    #[error("doctor: models cannot run here: {reason}")]
    Doctor { reason: String },
}

impl Error {
    /// Whether it only says that nobody reads the output any more.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// `error` and its sources on one line. Control characters, which may come from a file, are escaped: they would reach
/// the terminal.
pub fn one_line(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    escape(&text)
}

/// `text` with its control characters escaped.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() { escaped.extend(letter.escape_default()) } else { escaped.push(letter) }
    }
    escaped
}
