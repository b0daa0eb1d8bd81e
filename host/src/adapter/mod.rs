//! What a model is: which tensors of a file play which part, and with which sizes.
//!
//! An adapter *describes* a model, the engine executes the description. Adding an architecture means one new file here
//! that fills a [`ModelSpec`], and a line in [`detect`]; see `docs/adapter-pattern-locked.md`.
//!
//! Invariant: a spec that exists is sound. Every tensor it names is in the file, has the shape that the sizes demand
//! and a type that can be run, and no tensor of the file is left over. No I/O, no device, and nothing about tokens but
//! their number.

mod error;
mod gpt2;
mod gpt_oss;
mod keys;
mod rope;
mod tensors;

pub use error::Error;
pub use rope::{RopeSpec, YarnSpec};

use crate::gguf::{Metadata, TensorInfo};

/// Every architecture that [`detect`] accepts, as `general.architecture` spells it.
pub const SUPPORTED: &[&str] = &[gpt2::ARCHITECTURE, gpt_oss::ARCHITECTURE];
/// The most layers a model may have; llama.cpp's limit.
pub const MAX_LAYERS: usize = 512;
/// The widest attention head: what the attention kernels hold per head, in elements.
pub const MAX_D_HEAD: usize = 128;
/// What the width of a head is a multiple of: the attention kernels read that many elements at once.
pub const D_HEAD_STEP: usize = 8;
/// The most experts of a layer: what the router kernel holds; gpt-oss-120b has as many.
pub const MAX_EXPERTS: usize = 128;
/// The most experts that a token uses: what the router kernel holds.
pub const MAX_EXPERTS_USED: usize = 8;
/// What the length of every row of a weight is a multiple of: kernels decode that many elements at once.
pub const GROUP: usize = 32;
/// The largest value of any size: kernels count rows and columns in 32 bits, and some with a sign.
pub const MAX_SIZE: usize = i32::MAX as usize;

/// A model that the engine can run.
pub trait InferenceAdapter: Send + Sync {
    /// The architecture, as `general.architecture` spells it.
    fn architecture(&self) -> &'static str {
        self.spec().architecture
    }

    /// What to compute, and with which tensors.
    fn spec(&self) -> &ModelSpec;
}

/// A decoder-only transformer of the GPT family, made by [`detect`].
#[derive(Debug, Clone, PartialEq)]
pub struct GptInferenceAdapter {
    spec: ModelSpec,
}

impl InferenceAdapter for GptInferenceAdapter {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

/// Describes the model in a file with these key-value pairs and tensors, by its `general.architecture`.
///
/// Not for files that hold a vocabulary only: those have no tensors to describe.
///
/// # Errors
/// - [`Error::Metadata`] if a key is missing or of the wrong type.
/// - [`Error::UnknownArchitecture`], [`Error::OllamaLayout`] if no adapter fits.
/// - [`Error::OutOfRange`], [`Error::DoesNotDivide`], [`Error::Groups`], [`Error::HeadWidth`], [`Error::WidthMismatch`],
///   [`Error::LayerCount`], [`Error::LayersDiffer`] if the sizes make no model.
/// - [`Error::Number`], [`Error::RopeScaling`], [`Error::NotDefault`] if a value is none that the
///   engine computes with.
/// - [`Error::MissingTensor`], [`Error::Shape`], [`Error::WeightType`], [`Error::FloatType`],
///   [`Error::UnexpectedTensors`] if the tensors do not fit the sizes.
pub fn detect(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<GptInferenceAdapter, Error> {
    let spec = match metadata.required("general.architecture")? {
        gpt2::ARCHITECTURE => gpt2::describe(metadata, tensors)?,
        gpt_oss::ARCHITECTURE => gpt_oss::describe(metadata, tensors)?,
        "gptoss" => return Err(Error::OllamaLayout { found: "gptoss" }),
        found => return Err(Error::UnknownArchitecture { found: found.to_owned() }),
    };
    Ok(GptInferenceAdapter { spec })
}

/// What to compute: `token_embedding[t]`, plus `position_embedding[p]` if there is one, the layers,
/// `output(output_norm(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The architecture, as `general.architecture` spells it.
    pub architecture: &'static str,
    /// The number of tokens in the vocabulary, and of logits.
    pub n_vocab: usize,
    /// The longest context the model was made for, in tokens.
    pub n_ctx: usize,
    /// The width of the residual stream.
    pub d_model: usize,
    /// The number of layers.
    pub n_layer: usize,
    /// The number of query heads.
    pub n_head: usize,
    /// The number of key and value heads; divides `n_head`. Query head `h` reads head `h / (n_head / n_head_kv)`.
    pub n_head_kv: usize,
    /// The width of a head: a multiple of [`D_HEAD_STEP`], at most [`MAX_D_HEAD`]. `n_head · d_head` need not be `d_model`.
    pub d_head: usize,
    /// The width inside the feed-forward network, or inside one expert.
    pub d_ff: usize,
    /// `[n_vocab, d_model]`.
    pub token_embedding: TensorId,
    /// `[n_ctx, d_model]`, added to the token's embedding, for models that know positions from there.
    pub position_embedding: Option<TensorId>,
    /// The layers, first to last: `n_layer` of them.
    pub layers: Vec<LayerSpec>,
    /// Normalizes the residual stream after the last layer.
    pub output_norm: NormSpec,
    /// Makes logits; may share its weight with the token embedding.
    pub output: LinearSpec,
}

/// One layer: `x += attention_output(attention(qkv(attention_norm(x))))`, then `x += ffn(ffn_norm(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Normalizes what attention reads.
    pub attention_norm: NormSpec,
    /// Makes queries, keys and values.
    pub qkv: QkvSpec,
    /// How queries meet keys.
    pub attention: AttentionSpec,
    /// Mixes the heads back into the residual stream.
    pub attention_output: LinearSpec,
    /// Normalizes what the feed-forward network reads.
    pub ffn_norm: NormSpec,
    /// The feed-forward network.
    pub ffn: FfnSpec,
}

/// The maps that make queries, keys and values of `n_head · d_head`, `n_head_kv · d_head` and `n_head_kv · d_head` rows;
/// the rows of a head are consecutive.
#[derive(Debug, Clone, PartialEq)]
pub enum QkvSpec {
    /// One tensor: the rows of q, then those of k, then those of v.
    Fused(LinearSpec),
    /// Three tensors, maybe of three types: mixes give more bits to v.
    Separate {
        /// Makes queries.
        q: LinearSpec,
        /// Makes keys.
        k: LinearSpec,
        /// Makes values.
        v: LinearSpec,
    },
}

impl QkvSpec {
    /// The maps in the order of their rows.
    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        match self {
            Self::Fused(qkv) => [Some(qkv), None, None],
            Self::Separate { q, k, v } => [Some(q), Some(k), Some(v)],
        }
        .into_iter()
        .flatten()
    }
}

/// Causal softmax attention: a query at position i sees the keys at positions `j <= i`.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// What `q · k` is multiplied by before the softmax: 1 / √d_head.
    pub scale: f32,
    /// Only keys with `i - j < window` are seen: so many, the query's own among them. `None`: all.
    pub window: Option<usize>,
    /// A logit per query head, `[n_head]`, that takes part in the softmax's sum, neither scaled nor turned, and brings no
    /// value: `P_j = exp(s_j) / (Σ exp(s_j) + exp(sink))`.
    pub sinks: Option<TensorId>,
    /// How positions turn queries and keys; `None` where the embedding tells them.
    pub rope: Option<RopeSpec>,
}

/// A normalization of a row of `d_model` elements.
#[derive(Debug, Clone, PartialEq)]
pub enum NormSpec {
    /// `γ · (x − mean) / √(variance + ε) + β`, with the biased variance.
    Layer {
        /// γ, `[d_model]`.
        gamma: TensorId,
        /// β, `[d_model]`.
        beta: TensorId,
        /// ε, added to the variance; positive.
        epsilon: f32,
    },
    /// `γ · x / √(mean(x²) + ε)`.
    Rms {
        /// γ, `[d_model]`.
        gamma: TensorId,
        /// ε, added to the mean square; positive.
        epsilon: f32,
    },
}

/// A feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnSpec {
    /// `down(gelu(up(x)))`. Which GELU, exact or tanh, no file tells: the user's choice.
    Gelu {
        /// `d_model` to `d_ff`.
        up: LinearSpec,
        /// `d_ff` to `d_model`.
        down: LinearSpec,
    },
    /// `Σₑ ωₑ · downₑ(activation(gateₑ(x), upₑ(x)))` over the `n_used` experts e of the largest `router(x)`, with ω the
    /// softmax over these `n_used` logits alone. Among equal logits the lower e is taken.
    MixtureOfExperts {
        /// `d_model` to `n_expert`; weight and bias F32, F16 or BF16.
        router: LinearSpec,
        /// The number of experts, at most [`MAX_EXPERTS`].
        n_expert: usize,
        /// How many of them a token uses: 1 to `n_expert`, at most [`MAX_EXPERTS_USED`].
        n_used: usize,
        /// `d_model` to `d_ff`.
        gate: ExpertsSpec,
        /// `d_model` to `d_ff`.
        up: ExpertsSpec,
        /// `d_ff` to `d_model`.
        down: ExpertsSpec,
        /// What joins gate and up.
        activation: ClampedSwiGlu,
    },
}

/// A linear map per expert, stacked: the rows of expert e are `e · n_out` to `(e + 1) · n_out`, at most [`MAX_SIZE`] in
/// all.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// `[n_expert, n_out, n_in]`, rows of whole blocks, of a type that can be decoded.
    pub weight: TensorId,
    /// `[n_expert, n_out]`, F32, F16 or BF16.
    pub bias: TensorId,
    /// The length of x.
    pub n_in: usize,
    /// The length of y.
    pub n_out: usize,
}

/// OpenAI's SwiGLU: `g · σ(α · g) · (u + 1)`, where `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampedSwiGlu {
    /// α, which sharpens the sigmoid.
    pub alpha: f32,
    /// Beyond which values are cut off; the gate from above only.
    pub limit: f32,
}

/// A linear map: `y[o] = Σᵢ weight[o, i] · x[i] + bias[o]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    /// `[n_out, n_in]`, rows of whole blocks, of a type that can be decoded.
    pub weight: TensorId,
    /// `[n_out]`, F32, F16 or BF16.
    pub bias: Option<TensorId>,
    /// The length of x.
    pub n_in: usize,
    /// The length of y.
    pub n_out: usize,
}

/// A tensor, as its index in the tensors that [`detect`] was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(pub usize);
