//! Why a vocabulary or an id is refused.

use super::PreTokenizer;

/// Why a vocabulary cannot be used, in the order in which it is checked, or an id cannot be decoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("tokenizer.json: {reason}")]
    Json { reason: String },
    #[error("tokenizer.json: {step} is {found}; expected {expected}")]
    UnsupportedStep { step: &'static str, found: String, expected: &'static str },
    #[error("tokenizer.json: id {id} is taken by {first:?} and by {second:?}")]
    IdTakenTwice { id: u32, first: String, second: String },
    #[error("tokenizer.json: id {id} has no token; {n_tokens} tokens need the ids 0 to {}", n_tokens - 1)]
    MissingId { id: u32, n_tokens: usize },
    #[error("tokenizer.json: {role} token {name:?} is not among its added tokens")]
    UnknownSpecial { role: &'static str, name: String },

    #[error("tokenizer.ggml.model {found:?} is not supported; gpt2 (byte-level BPE) is")]
    UnsupportedModel { found: String },
    #[error(
        "tokenizer.ggml.pre is missing, and a wrong guess changes the tokens; convert the model again with a current \
         converter (supported: {})",
        supported()
    )]
    MissingPreTokenizer,
    #[error("tokenizer.ggml.pre {found:?} is not supported; {} are", supported())]
    UnknownPreTokenizer { found: String },
    #[error("token {id} is not UTF-8")]
    TokenNotUtf8 { id: u32 },
    #[error("tokenizer.ggml.token_type has {n_types} entries, tokenizer.ggml.tokens {n_tokens}; expected as many")]
    TypeCount { n_types: usize, n_tokens: usize },
    #[error("tokenizer.ggml.{role} is {id}, but the vocabulary has {n_vocab} tokens")]
    SpecialOutsideVocabulary { role: &'static str, id: u32, n_vocab: usize },
    #[error("tokenizer.ggml.{flag} is true, but tokenizer.ggml.{role} is missing")]
    MissingSpecial { flag: &'static str, role: &'static str },
    #[error("token {id} has type {found}; expected 1 (normal) to 5 (unused)")]
    UnknownTokenType { id: u32, found: i32 },
    #[error("token {id} is empty")]
    EmptyToken { id: u32 },
    #[error("tokens {first} and {second} are both {text:?}")]
    DuplicateToken { first: u32, second: u32, text: String },
    #[error("token {id} {text:?} is of type normal, but {letter:?} stands for no byte in GPT-2's alphabet")]
    NotByteLevel { id: u32, text: String, letter: char },
    #[error("no normal token stands for byte {byte:#04x} alone; byte-level BPE needs all 256")]
    MissingByte { byte: u8 },
    #[error("merge {rank} is not UTF-8")]
    MergeNotUtf8 { rank: usize },
    #[error("merge {rank} {merge:?} is not two tokens separated by a space")]
    MergeWithoutSeparator { rank: usize, merge: String },
    #[error("merge {rank} needs {token:?}, which is not a normal token of the vocabulary")]
    MergeOutsideVocabulary { rank: usize, token: String },
    #[error("merge {rank} of {left:?} and {right:?} stands twice")]
    DuplicateMerge { rank: usize, left: String, right: String },
    #[error("{n_markers} control and user-defined tokens do not fit one search automaton: {reason}")]
    TooManyMarkers { n_markers: usize, reason: String },

    #[error("token id {id} is outside the vocabulary of {n_vocab} tokens")]
    IdOutsideVocabulary { id: u32, n_vocab: usize },
}

fn supported() -> String {
    PreTokenizer::ALL.map(PreTokenizer::name).join(", ")
}
