//! What a model needs of the device's memory, before any of it is taken.

use std::fmt;

use super::{Error, KvType, Options};
use crate::adapter::{FfnSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec, TensorId};
use crate::device::{MemoryInfo, ops};
use crate::gguf::{TensorInfo, TensorType};
use crate::weights::Packing;

/// Bytes of device memory by purpose. Exact: the engine allocates these numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights by type in the file, largest first. Norms and biases, decoded to f32, count as F32.
    pub weights: Vec<(TensorType, u64)>,
    /// Keys and values of the whole context, all layers.
    pub kv_cache: u64,
    /// Activations of one prompt chunk, logits, and attention's partial results.
    pub workspace: u64,
}

/// Elements of each workspace buffer; the engine allocates by it.
pub(super) struct WorkspaceSizes {
    pub tokens: usize,
    pub x: usize,
    pub normed: usize,
    pub qkv: usize,
    pub attended: usize,
    pub inner: usize,
    pub logits: usize,
    pub partial: usize,
    /// Of experts: logits, choices and their weights, what they give, and the lists they are sorted by. 0 without.
    pub router_logits: usize,
    pub pairs: usize,
    pub tiles: usize,
    pub expert_out: usize,
    /// Rotary frequencies, u64.
    pub frequencies: usize,
}

impl WorkspaceSizes {
    pub fn new(spec: &ModelSpec, options: &Options) -> Self {
        let rows = options.n_batch.min(options.n_ctx);
        let (q_width, kv_width) = (spec.n_head * spec.d_head, spec.n_head_kv * spec.d_head);
        let (n_expert, n_used) = n_experts(spec);
        Self {
            tokens: rows,
            x: rows * spec.d_model,
            normed: rows * spec.d_model,
            qkv: rows * (q_width + 2 * kv_width),
            attended: rows * q_width,
            inner: rows * n_used.max(1) * spec.d_ff,
            logits: spec.n_vocab,
            partial: super::forward::partial_len(spec, options.n_ctx),
            router_logits: rows * n_expert,
            pairs: rows * n_used,
            tiles: if n_expert == 0 { 0 } else { ops::expert_tiles_len(rows * n_used, n_expert) },
            expert_out: rows * n_used * spec.d_model,
            frequencies: rope(spec).map_or(0, |rope| rope.n_dims / 2),
        }
    }

    /// Bytes of all of them, and of the position (u32).
    fn n_bytes(&self) -> u64 {
        let dense = [self.tokens, self.x, self.normed, self.qkv, self.attended, self.inner, self.logits, self.partial];
        // Choices, their weights and the sorted list are `pairs` each; a frequency is two words, the position one.
        let others = [self.router_logits, 3 * self.pairs, self.tiles, self.expert_out, 2 * self.frequencies, 1];
        let argmax = 2 * ops::ARGMAX_PARTS + 1;
        dense.iter().chain(&others).chain(&[argmax]).map(|&words| 4 * words as u64).sum()
    }
}

/// Elements of the K or the V cache of one layer.
pub(super) fn cache_len(spec: &ModelSpec, options: &Options) -> usize {
    spec.n_head_kv * options.n_ctx * spec.d_head
}

impl KvType {
    /// Bytes of one element.
    pub fn n_bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// How a matrix is repacked.
pub(super) fn packing(tensor: &TensorInfo, n_in: usize, n_out: usize) -> Result<Packing, Error> {
    Packing::new(tensor.ty, n_in, n_out).map_err(|source| Error::Repack { tensor: tensor.name.clone(), source })
}

/// One matrix on the device: a tensor, or several of one type with their rows one after the other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stack {
    /// The first names the whole.
    pub parts: Vec<TensorId>,
    pub n_in: usize,
    pub n_out: usize,
}

/// Every matrix in some product or look-up, each once; experts are [`super::experts`].
pub(super) fn matrices(spec: &ModelSpec) -> Vec<Stack> {
    let mut matrices = vec![Stack { parts: vec![spec.token_embedding], n_in: spec.d_model, n_out: spec.n_vocab }];
    for linear in super::linears(spec) {
        matrices.push(Stack { parts: vec![linear.weight], n_in: linear.n_in, n_out: linear.n_out });
    }
    // Queries, keys and values make one product, whether the file has one tensor or three.
    matrices.extend(spec.layers.iter().map(|layer| Stack {
        parts: layer.qkv.linears().map(|part| part.weight).collect(),
        n_in: spec.d_model,
        n_out: layer.qkv.linears().map(|part| part.n_out).sum(),
    }));
    // A tied head is the token embedding again.
    matrices.sort_unstable();
    matrices.dedup();
    matrices
}

/// Tensors that are decoded to f32, alone or one after the other: norms, biases, sinks, routers, the table of positions.
pub(super) fn vectors(spec: &ModelSpec) -> Vec<Vec<TensorId>> {
    let norm = |norm: &NormSpec| match *norm {
        NormSpec::Layer { gamma, beta, .. } => [Some(gamma), Some(beta)],
        NormSpec::Rms { gamma, .. } => [Some(gamma), None],
    };
    let norms = spec.layers.iter().flat_map(|layer| [&layer.attention_norm, &layer.ffn_norm]);
    let mut alone: Vec<TensorId> = norms.chain([&spec.output_norm]).flat_map(norm).flatten().collect();
    alone.extend(spec.position_embedding);
    alone.extend(super::linears(spec).filter_map(|linear| linear.bias));
    alone.extend(super::experts(spec).map(|(experts, _)| experts.bias));
    alone.extend(super::routers(spec).flat_map(|router| [Some(router.weight), router.bias]).flatten());
    alone.extend(spec.layers.iter().filter_map(|layer| layer.attention.sinks));
    let stacked = spec.layers.iter().map(|layer| layer.qkv.linears().filter_map(|part| part.bias).collect::<Vec<_>>());
    let mut vectors: Vec<Vec<TensorId>> = alone.into_iter().map(|id| vec![id]).collect();
    vectors.extend(stacked.filter(|biases| !biases.is_empty()));
    vectors.sort_unstable();
    vectors.dedup();
    vectors
}

/// The model's rotary positions, if it has any. All layers share them.
pub(super) fn rope(spec: &ModelSpec) -> Option<&RopeSpec> {
    spec.layers.first().and_then(|layer| layer.attention.rope.as_ref())
}

/// Experts of a layer, and how many of them a token goes to; 0 if it has none.
fn n_experts(spec: &ModelSpec) -> (usize, usize) {
    let of_layer = |layer: &LayerSpec| match layer.ffn {
        FfnSpec::Gelu { .. } => (0, 0),
        FfnSpec::MixtureOfExperts { n_expert, n_used, .. } => (n_expert, n_used),
    };
    spec.layers.iter().map(of_layer).max().unwrap_or_default()
}

impl MemoryPlan {
    /// The plan for a model under `options`.
    ///
    /// # Errors
    ///
    /// - [`Error::Context`] if `options.n_ctx` is 0 or beyond the model's, [`Error::Batch`] if `n_batch` is 0.
    /// - [`Error::Repack`] if a matrix has rows that no kernel reads.
    /// - [`Error::NotYetRunnable`] if tensors that one kernel reads together differ in type.
    pub fn new(spec: &ModelSpec, tensors: &[TensorInfo], options: &Options) -> Result<Self, Error> {
        options.check(spec)?;
        let mut by_type: Vec<(TensorType, u64)> = Vec::new();
        let mut add = |ty: TensorType, bytes: u64| match by_type.iter_mut().find(|(other, _)| *other == ty) {
            Some((_, sum)) => *sum += bytes,
            None => by_type.push((ty, bytes)),
        };
        for Stack { parts, n_in, n_out } in matrices(spec) {
            let tensor = &tensors[parts[0].0];
            if parts.iter().any(|part| tensors[part.0].ty != tensor.ty) {
                return Err(Error::NotYetRunnable { what: "queries, keys and values of different types" });
            }
            add(tensor.ty, packing(tensor, n_in, n_out)?.n_bytes() as u64);
        }
        for layer in &spec.layers {
            if let FfnSpec::MixtureOfExperts { gate, up, .. } = &layer.ffn
                && tensors[gate.weight.0].ty != tensors[up.weight.0].ty
            {
                return Err(Error::NotYetRunnable { what: "gate and up experts of different types" });
            }
        }
        for (experts, n_expert) in super::experts(spec) {
            let tensor = &tensors[experts.weight.0];
            add(tensor.ty, (n_expert * packing(tensor, experts.n_in, experts.n_out)?.n_bytes()) as u64);
        }
        for id in vectors(spec).into_iter().flatten() {
            add(TensorType::F32, 4 * tensors[id.0].n_elements());
        }
        by_type.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));

        let kv_cache = (2 * spec.n_layer * cache_len(spec, options) * options.kv.n_bytes()) as u64;
        Ok(Self { weights: by_type, kv_cache, workspace: WorkspaceSizes::new(spec, options).n_bytes() })
    }

    /// All weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.iter().map(|&(_, bytes)| bytes).sum()
    }

    /// Everything.
    pub fn total(&self) -> u64 {
        self.weight_bytes() + self.kv_cache + self.workspace
    }

    /// The largest context whose plan fits `budget` bytes, or `None` if not even one token does.
    pub fn largest_context(spec: &ModelSpec, tensors: &[TensorInfo], options: &Options, budget: u64) -> Option<usize> {
        let fits = |n_ctx: usize| {
            let options = Options { n_ctx, ..options.clone() };
            Self::new(spec, tensors, &options).is_ok_and(|plan| plan.total() <= budget)
        };
        // The total grows with the context, so the fitting ones are a prefix: `low` fits, `high` does not.
        let (mut low, mut high) = (0, spec.n_ctx + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        (low > 0).then_some(low)
    }

    /// Whether it fits what the device has free.
    ///
    /// # Errors
    ///
    /// [`Error::DoesNotFit`] with the numbers and the largest context that would.
    pub fn check(
        &self,
        spec: &ModelSpec,
        tensors: &[TensorInfo],
        options: &Options,
        memory: MemoryInfo,
    ) -> Result<(), Error> {
        if self.total() <= memory.free {
            return Ok(());
        }
        let largest = Self::largest_context(spec, tensors, options, memory.free);
        Err(Error::DoesNotFit {
            needed: self.total(),
            free: memory.free,
            n_ctx: options.n_ctx,
            advice: Advice(largest),
        })
    }
}

/// The next step when a model does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advice(pub Option<usize>);

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(n_ctx) => write!(f, "the largest context that fits is {n_ctx}: use -c {n_ctx}"),
            None => f.write_str("no context fits: the weights alone are too large"),
        }
    }
}
