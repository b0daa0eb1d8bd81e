//! Why bytes are refused.

use super::ALIGNMENT_KEY;
use super::metadata::{ValueKind, ValueType};
use super::tensor_type::TensorType;

/// Why bytes are not a GGUF file that can be read, in the order the reader meets it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("not a GGUF file: magic is {found:#010x}, expected 0x46554747")]
    BadMagic { found: u32 },
    #[error("not a GGUF file but the older format {name}; convert the original model with a current converter")]
    LegacyFormat { name: &'static str },
    #[error("GGUF version 1 is not supported; 2 and 3 are: convert the original model with a current converter")]
    Version1,
    #[error("GGUF version {version} in big-endian byte order is not supported; little-endian is")]
    BigEndian { version: u32 },
    #[error("GGUF version {found} is not supported; 2 and 3 are")]
    UnsupportedVersion { found: u32 },
    #[error("file ends inside {what}: {need} bytes needed at offset {offset}, {have} left")]
    Truncated { what: &'static str, offset: usize, need: u64, have: usize },
    #[error("{what} at offset {offset} has length {found}; at most {most} is allowed")]
    TooLong { what: &'static str, offset: usize, found: u64, most: usize },
    #[error("file has {found} {what}; at most {most} are allowed")]
    TooMany { what: &'static str, found: u64, most: usize },
    #[error("{what} at offset {offset} is not UTF-8")]
    NotUtf8 { what: &'static str, offset: usize },
    #[error("metadata key at offset {offset} is empty")]
    EmptyKey { offset: usize },
    #[error("metadata key {key} has value type {found}, which does not exist; 0 to 12 do")]
    UnknownValueType { key: String, found: u32 },
    #[error("metadata key {key} is an array of arrays, which is not supported")]
    NestedArray { key: String },
    #[error("metadata key {key} appears twice")]
    DuplicateKey { key: String },
    #[error("{ALIGNMENT_KEY} has type {found}, expected {}", ValueType::U32)]
    AlignmentType { found: ValueKind },
    #[error("{ALIGNMENT_KEY} is {found}, expected a power of two")]
    BadAlignment { found: u32 },
    #[error("tensor {tensor} has {found} dimensions; at most 4 are allowed")]
    TooManyDims { tensor: String, found: u32 },
    #[error("tensor {tensor} has type {id}, which was removed from ggml (it was {was}){}", removed_advice(*id))]
    RemovedType { tensor: String, id: u32, was: &'static str },
    #[error("tensor {tensor} has type {id}, which is unknown; the highest known is {}", TensorType::MAX_ID)]
    UnknownType { tensor: String, id: u32 },
    #[error("tensor {tensor} of dimensions {dims:?} is larger than any file can be")]
    TensorTooLarge { tensor: String, dims: [u64; 4] },
    #[error("tensor {tensor} has rows of {row} elements, expected a multiple of {}, the block of {ty}", ty.block_len())]
    PartialBlock { tensor: String, ty: TensorType, row: u64 },
    #[error("tensor {tensor} has data at offset {offset}, expected a multiple of the alignment {alignment}")]
    Misaligned { tensor: String, offset: u64, alignment: usize },
    #[error("tensor {name} appears twice")]
    DuplicateTensor { name: String },
    #[error(
        "file ends inside tensor {tensor}: {n_bytes} bytes needed at offset {offset}, the file has {file_bytes}; \
         was it downloaded in full?"
    )]
    TensorTruncated { tensor: String, n_bytes: usize, offset: usize, file_bytes: usize },
    #[error("tensors {first} and {second} overlap")]
    Overlap { first: String, second: String },
}

fn removed_advice(id: u32) -> &'static str {
    match id {
        // Early gpt-oss files of Ollama's own engine carry MXFP4 under Q4_2's old number.
        4 | 5 => {
            "; Ollama's early gpt-oss blobs use this number for MXFP4: use a GGUF made by llama.cpp's converter instead"
        }
        _ => "; convert or quantize the original model again",
    }
}
