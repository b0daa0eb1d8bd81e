//! Why a model is refused.

use super::{D_HEAD_STEP, GROUP, MAX_D_HEAD, SUPPORTED};
use crate::gguf::{MetadataError, TensorType};

/// Why a file, though well-formed, holds no model that this engine can run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error("architecture {found:?} is not supported; supported: {}", SUPPORTED.join(", "))]
    UnknownArchitecture { found: String },
    #[error(
        "architecture {found} is Ollama's own layout of gpt-oss, with other tensor names and experts packed otherwise; \
         use a GGUF made by llama.cpp's converter instead"
    )]
    OllamaLayout { found: &'static str },
    #[error("{key} is {found}, expected {least} to {most}")]
    OutOfRange { key: String, found: usize, least: usize, most: usize },
    #[error("{what} {found} is not a multiple of {by}, {divisor}")]
    DoesNotDivide { what: &'static str, found: usize, by: &'static str, divisor: usize },
    #[error("{what} is {found}, expected a multiple of {GROUP}: kernels read rows in groups of that many")]
    Groups { what: String, found: usize },
    #[error("heads are {found} wide, expected a multiple of {D_HEAD_STEP} from {D_HEAD_STEP} to {MAX_D_HEAD}")]
    HeadWidth { found: usize },
    #[error("{n_head} heads of {d_head} are {} wide, expected the embedding length, {d_model}", n_head * d_head)]
    WidthMismatch { n_head: usize, d_head: usize, d_model: usize },
    #[error("{key} is {found}, expected a finite number {expected}")]
    Number { key: String, found: f32, expected: &'static str },
    #[error("{key} is {found:?}, expected \"yarn\" or \"none\", the only ones this engine implements")]
    RopeScaling { key: String, found: String },
    #[error("{key} is {found}, expected {expected}, the only value this engine implements")]
    NotDefault { key: String, found: String, expected: String },
    #[error("{key} has {found} elements, expected {expected}, one per layer")]
    LayerCount { key: String, found: usize, expected: usize },
    #[error("{key} is {first} in layer 0 and {other} in layer {layer}; expected one value for all")]
    LayersDiffer { key: String, first: usize, layer: usize, other: usize },
    #[error("tensor {tensor} is missing")]
    MissingTensor { tensor: String },
    #[error("tensor {tensor} has shape {found:?}, expected {expected:?}: {meaning}")]
    Shape { tensor: String, found: Vec<u64>, expected: Vec<u64>, meaning: &'static str },
    #[error("tensor {tensor} has type {ty} ({}), which is not supported; supported: {}", ty.id(), TensorType::supported_names())]
    WeightType { tensor: String, ty: TensorType },
    #[error("tensor {tensor} has type {ty} ({}), expected F32, F16 or BF16", ty.id())]
    FloatType { tensor: String, ty: TensorType },
    #[error("{} not part of the architecture, the first is {first}", count_tensors(*count))]
    UnexpectedTensors { first: String, count: usize },
}

fn count_tensors(count: usize) -> String {
    if count == 1 { "1 tensor is".to_owned() } else { format!("{count} tensors are") }
}
