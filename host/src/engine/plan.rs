//! What a model needs of the device's memory, before any of it is taken.

use std::fmt;

use super::{Error, KvType, Options, ring};
use crate::adapter::{FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec, RopeSpec, TensorId};
use crate::device::ops::{self, AttentionShape};
use crate::device::padded;
use crate::gguf::{TensorInfo, TensorType};
use crate::weights::Packing;

/// Bytes of device memory by purpose, each buffer's padding included. Exact: the engine makes one allocation of their sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights by type in the file, largest first. Norms and biases, decoded to f32, count as F32, and so does a power of two
    /// for each row of a matrix.
    pub weights: Vec<(TensorType, u64)>,
    /// Keys and values of the layers that attend to the whole context.
    pub kv_full: u64,
    /// Keys and values of the layers that attend to a window of it: of a window and a prompt chunk.
    pub kv_sliding: u64,
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
    pub counters: usize,
    /// Activations of many tokens before a product, f16.
    pub rows: usize,
    /// Where blocks meet that share a product: sums, and counters.
    pub rows_partial: usize,
    pub rows_counters: usize,
    /// Of a router's logits, for one token.
    pub parts: usize,
    /// Activations inside one token's experts.
    pub token_h: usize,
    /// Of the likeliest tokens: ids, and logits.
    pub likeliest: usize,
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
        let most = |len: fn(AttentionShape) -> usize| {
            spec.layers.iter().map(|layer| len(attention_shape(spec, options, layer))).max().unwrap_or_default()
        };
        let (rows_partial, rows_counters) = rows_work_lens(spec, rows);
        Self {
            tokens: rows,
            x: rows * spec.d_model,
            normed: rows * spec.d_model,
            qkv: rows * (q_width + 2 * kv_width),
            attended: rows * q_width,
            inner: rows * n_used.max(1) * spec.d_ff,
            logits: spec.n_vocab,
            partial: most(ops::attention_partial_len),
            counters: most(ops::attention_counters_len),
            rows: rows * spec.d_model.max(q_width),
            rows_partial,
            rows_counters,
            // A part has a row at least; how many it has is the device's affair.
            parts: if n_expert == 0 { 0 } else { spec.d_model * (n_expert + 1) },
            token_h: n_used * spec.d_ff / 2,
            likeliest: ops::n_likeliest(spec.n_vocab),
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
        let lists = [self.pairs, self.pairs, self.pairs, self.tiles, self.counters, self.parts, self.token_h];
        let experts = [self.router_logits, self.expert_out];
        let others = [2 * self.frequencies, 1, ops::ARGMAX_PARTS, ops::ARGMAX_PARTS, 1, self.likeliest, self.likeliest];
        // Rows are f16; their factors, and those of 1, are as many as tokens.
        let rows = [self.rows.div_ceil(2), self.tokens, self.tokens, self.rows_partial, self.rows_counters, 1];
        dense
            .iter()
            .chain(&lists)
            .chain(&experts)
            .chain(&others)
            .chain(&rows)
            .map(|&words| padded(4 * words) as u64)
            .sum()
    }
}

/// What products with up to `rows` tokens need to share tiles.
fn rows_work_lens(spec: &ModelSpec, rows: usize) -> (usize, usize) {
    let mut shapes: Vec<[usize; 2]> = super::linears(spec).map(|linear| [linear.n_in, linear.n_out]).collect();
    // Queries, keys and values are one product or three.
    for layer in &spec.layers {
        shapes.extend(layer.qkv.linears().map(|part| [part.n_in, part.n_out]));
        shapes.push([spec.d_model, layer.qkv.linears().map(|part| part.n_out).sum()]);
    }
    shapes.sort_unstable();
    shapes.dedup();
    let lens = |[n_in, n_out]: [usize; 2]| ops::rows_work_lens(rows, n_in, n_out);
    shapes.into_iter().map(lens).fold((0, 0), |(p, c), (partial, counters)| (p.max(partial), c.max(counters)))
}

/// What attention is told of a layer.
pub(super) fn attention_shape(spec: &ModelSpec, options: &Options, layer: &LayerSpec) -> AttentionShape {
    let window = layer.attention.window;
    AttentionShape {
        n_head: spec.n_head,
        n_head_kv: spec.n_head_kv,
        d_head: spec.d_head,
        n_slots: ring::n_slots(window, options.n_ctx, options.n_batch.min(options.n_ctx)),
        scale: layer.attention.scale,
        window,
    }
}

/// Elements of the K or the V cache of a layer.
pub(super) fn cache_len(shape: AttentionShape) -> usize {
    shape.n_head_kv * shape.n_slots * shape.d_head
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
pub(super) fn matrices(spec: &ModelSpec, tensors: &[TensorInfo]) -> Vec<Stack> {
    let mut matrices = vec![Stack { parts: vec![spec.token_embedding], n_in: spec.d_model, n_out: spec.n_vocab }];
    for linear in super::linears(spec) {
        matrices.push(Stack { parts: vec![linear.weight], n_in: linear.n_in, n_out: linear.n_out });
    }
    // Queries, keys and values make one product, whether the file has one tensor or three, unless their types differ.
    for layer in &spec.layers {
        let parts: Vec<&LinearSpec> = layer.qkv.linears().collect();
        let ty = |part: &LinearSpec| tensors[part.weight.0].ty;
        let stacks = parts.chunk_by(|a, b| parts.iter().all(|part| ty(part) == ty(a)) && ty(a) == ty(b));
        matrices.extend(stacks.map(|stack| Stack {
            parts: stack.iter().map(|part| part.weight).collect(),
            n_in: spec.d_model,
            n_out: stack.iter().map(|part| part.n_out).sum(),
        }));
    }
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
        for Stack { parts, n_in, n_out } in matrices(spec, tensors) {
            let tensor = &tensors[parts[0].0];
            add(TensorType::F32, padded(4 * n_out) as u64);
            add(tensor.ty, padded(packing(tensor, n_in, n_out)?.n_bytes()) as u64);
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
            add(tensor.ty, padded(n_expert * packing(tensor, experts.n_in, experts.n_out)?.n_bytes()) as u64);
        }
        for parts in vectors(spec) {
            let n_elements: u64 = parts.iter().map(|part| tensors[part.0].n_elements()).sum();
            add(TensorType::F32, padded(4 * n_elements as usize) as u64);
        }
        by_type.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));

        let (mut kv_full, mut kv_sliding) = (0, 0);
        for layer in &spec.layers {
            let bytes = 2 * padded(cache_len(attention_shape(spec, options, layer)) * options.kv.n_bytes()) as u64;
            *(if layer.attention.window.is_some() { &mut kv_sliding } else { &mut kv_full }) += bytes;
        }
        let workspace = WorkspaceSizes::new(spec, options).n_bytes();
        Ok(Self { weights: by_type, kv_full, kv_sliding, workspace })
    }

    /// All weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.iter().map(|&(_, bytes)| bytes).sum()
    }

    /// Keys and values of all layers.
    pub fn kv_cache(&self) -> u64 {
        self.kv_full + self.kv_sliding
    }

    /// Everything.
    pub fn total(&self) -> u64 {
        self.weight_bytes() + self.kv_cache() + self.workspace
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

    /// Whether it fits `free` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::DoesNotFit`] with the numbers and the largest context that would.
    pub fn check(&self, spec: &ModelSpec, tensors: &[TensorInfo], options: &Options, free: u64) -> Result<(), Error> {
        if self.total() <= free {
            return Ok(());
        }
        let largest = Self::largest_context(spec, tensors, options, free);
        Err(Error::DoesNotFit { needed: self.total(), free, n_ctx: options.n_ctx, advice: Advice(largest) })
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
