//! Runs the model that an adapter describes: weights on the device, prompt in chunks, one recorded graph per decode step.
//!
//! It names no GPU and no emulator, only [`Device`](crate::device::Device), and decides which kernel runs; it reads no file
//! but through [`ModelFile`] and prints nothing.

mod forward;
mod load;
mod plan;
pub mod ring;
mod traffic;

use std::thread;
use std::time::{Duration, Instant};

use crate::adapter::{ExpertsSpec, FfnSpec, LinearSpec, ModelSpec};
use crate::device::{self, Arena, SharedDevice};
use crate::gguf::DecodeError;
use crate::model_file::ModelFile;
use crate::weights;

pub use forward::Engine;
pub use plan::{Advice, MemoryPlan};
pub use traffic::decode_bytes;

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Half precision; the default.
    #[default]
    F16,
    /// Single precision, for comparing with references.
    F32,
}

/// Which GELU a feed-forward network applies; no file says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gelu {
    /// `x · Φ(x)`, the default.
    #[default]
    Exact,
    /// The tanh approximation, `gelu_new`, that OpenAI's GPT-2 checkpoints were trained with.
    Tanh,
}

/// How to run a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Tokens the KV cache has room for; 1 up to the model's own context.
    pub n_ctx: usize,
    /// Element type of the KV cache; default f16.
    pub kv: KvType,
    /// Which GELU; default the exact one.
    pub gelu: Gelu,
    /// Most prompt tokens computed at once; default 512. More is faster, and takes workspace.
    pub n_batch: usize,
    /// Rounds YaRN's bounds as llama.cpp does; default false, as the models were trained.
    pub yarn_truncate: bool,
}

impl Options {
    /// The model's whole context and the defaults.
    pub fn for_model(spec: &ModelSpec) -> Self {
        Self { n_ctx: spec.n_ctx, kv: KvType::default(), gelu: Gelu::default(), n_batch: 512, yarn_truncate: false }
    }

    fn check(&self, spec: &ModelSpec) -> Result<(), Error> {
        if self.n_ctx == 0 || self.n_ctx > spec.n_ctx {
            return Err(Error::Context { wanted: self.n_ctx, limit: spec.n_ctx });
        }
        if self.n_batch == 0 {
            return Err(Error::Batch);
        }
        Ok(())
    }
}

/// Why a model was not loaded, or a step not computed. After any of them the sequence is as it was before the
/// call; where the device failed, its logits are gone.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("a context of {wanted} tokens was asked for, the model has 1 to {limit}")]
    Context { wanted: usize, limit: usize },
    #[error("a prompt chunk of 0 tokens was asked for, at least 1 is needed")]
    Batch,
    #[error("{needed} bytes of device memory are needed for a context of {n_ctx}, {free} are free; {advice}")]
    DoesNotFit { needed: u64, free: u64, n_ctx: usize, advice: Advice },
    #[error("the context is full: {wanted} tokens, room for {n_ctx}; start over or use a larger -c")]
    ContextFull { wanted: usize, n_ctx: usize },
    #[error("the sequence of {n_past} tokens cannot go back to {to}: the cache holds what follows {oldest}")]
    Rewind { to: usize, oldest: usize, n_past: usize },
    #[error("token {token} is not in the vocabulary of {n_vocab}")]
    Token { token: u32, n_vocab: usize },
    #[error("no token was given")]
    NoTokens,
    #[error("there are no logits before the first token")]
    NoLogits,
    #[error("a logit is NaN after {n_past} tokens: the model or its weights overflow")]
    NotANumber { n_past: usize },
    #[error("tensor {tensor}")]
    Decode {
        tensor: String,
        #[source]
        source: DecodeError,
    },
    #[error("tensor {tensor}")]
    Repack {
        tensor: String,
        #[source]
        source: weights::Error,
    },
    #[error("the engine cannot run {what} yet")]
    NotYetRunnable { what: &'static str },
    #[error(transparent)]
    Device(#[from] device::Error),
}

/// Every linear map of the model but routers, [`experts`], and queries, keys and values.
fn linears(spec: &ModelSpec) -> impl Iterator<Item = &LinearSpec> {
    let layers = spec.layers.iter().flat_map(|layer| {
        let ffn = match &layer.ffn {
            FfnSpec::Gelu { up, down } => Some([up, down]),
            FfnSpec::MixtureOfExperts { .. } => None,
        };
        [&layer.attention_output].into_iter().chain(ffn.into_iter().flatten())
    });
    layers.chain([&spec.output])
}

/// The map of every router.
fn routers(spec: &ModelSpec) -> impl Iterator<Item = &LinearSpec> {
    spec.layers.iter().filter_map(|layer| match &layer.ffn {
        FfnSpec::Gelu { .. } => None,
        FfnSpec::MixtureOfExperts { router, .. } => Some(router),
    })
}

/// The stacked maps of all experts, with their number.
fn experts(spec: &ModelSpec) -> impl Iterator<Item = (&ExpertsSpec, usize)> {
    let stacks = spec.layers.iter().filter_map(|layer| match &layer.ffn {
        FfnSpec::Gelu { .. } => None,
        FfnSpec::MixtureOfExperts { gate, up, down, n_expert, .. } => Some([gate, up, down].map(|e| (e, *n_expert))),
    });
    stacks.flatten()
}

impl Engine {
    /// Loads a model: checks that it fits, repacks its weights and copies them to the device.
    ///
    /// `progress` hears of bytes copied and bytes in all.
    ///
    /// # Errors
    ///
    /// - [`Error::Context`], [`Error::Batch`] for options out of range.
    /// - [`Error::NotYetRunnable`] for parts of a model that have no forward pass here.
    /// - [`Error::DoesNotFit`] before any allocation.
    /// - [`Error::Decode`], [`Error::Repack`] for tensors that cannot be used.
    /// - [`Error::Device`] if the device fails.
    pub fn load(
        device: SharedDevice,
        file: &ModelFile,
        spec: &ModelSpec,
        options: Options,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, Error> {
        let plan = MemoryPlan::new(spec, file.tensors(), &options)?;
        plan.check(spec, file.tensors(), &options, device.memory()?.free)?;
        let mut arena = Arena::new(&device, plan.total() as usize)?;
        let weights = load::allocate(&mut arena, file, spec)?;
        let mut engine = forward::new(device, spec.clone(), options, weights, &mut arena)?;
        debug_assert_eq!(arena.left(), 0, "the plan is exact");
        let model = engine.model();
        // The driver compiles the kernels while the weights are copied: both take about a second.
        let (weights, kernels) = thread::scope(|scope| {
            let kernels = scope.spawn(|| timed(|| model.preload()));
            let weights = timed(|| load::fill(model.weights(), model.device(), file, spec, progress));
            (weights, kernels.join().expect("a launch panics where a step would have"))
        });
        weights.0?;
        kernels.0?;
        engine.measure_weights()?;
        engine.set_load_times(LoadTimes { weights: weights.1, kernels: kernels.1 });
        Ok(engine)
    }
}

fn timed<T>(body: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (body(), start.elapsed())
}

/// How long the parts of [`Engine::load`] took. They run beside each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadTimes {
    /// Repacking the weights and copying them to the device.
    pub weights: Duration,
    /// Having the driver compile kernels.
    pub kernels: Duration,
}
