//! The forward pass, and the state it moves: KV cache, position, the token to come.

mod rows;
mod token;

use cuda_std::{LaunchError, Launcher, f16};

use super::load::{DeviceWeights, Experts, Matrix};
use super::plan::{WorkspaceSizes, attention_shape, cache_len, rope};
use super::{Error, Gelu, KvType, LoadTimes, Options, ring};
use crate::adapter::{ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec};
use crate::device::ops::{self, AttentionOut, Cache, Epilogue, ExpertsMatrix, ExpertsWork, Rotation};
use crate::device::{self, Arena, Buffer, Device, Graph, SharedDevice, View};
use crate::sampler::Likeliest;

/// A loaded model with one sequence of tokens.
pub struct Engine {
    // Dropped first: it names the buffers below.
    decode_graph: Option<Box<dyn Graph>>,
    model: Model,
    /// Tokens in the KV cache.
    n_past: usize,
    /// The most that were in it since the last reset.
    n_written: usize,
    /// What `state[0]` holds on the device, if known.
    device_position: Option<usize>,
    /// What `tokens[0]` holds on the device, if known to the host.
    device_token: Option<u32>,
    has_logits: bool,
    load_times: LoadTimes,
}

/// What a forward pass reads and writes.
pub(super) struct Model {
    device: SharedDevice,
    spec: ModelSpec,
    options: Options,
    weights: DeviceWeights,
    caches: Vec<LayerCache>,
    work: Workspace,
    /// What turned queries and keys are multiplied by.
    rope_magnitude: f32,
    /// Whether some weights are too far apart for f16, so that prompts take the kernels that scale each group.
    is_wide: bool,
}

enum LayerCache {
    F16(Buffer<f16>, Buffer<f16>),
    F32(Buffer<f32>, Buffer<f32>),
}

impl LayerCache {
    fn view(&self) -> Cache<'_> {
        match self {
            Self::F16(k, v) => Cache::F16 { k: k.view(), v: v.view() },
            Self::F32(k, v) => Cache::F32 { k: k.view(), v: v.view() },
        }
    }
}

struct Workspace {
    tokens: Buffer<u32>,
    /// `[1]`: the number of tokens in the KV cache before the launch.
    state: Buffer<u32>,
    /// The residual stream, `[n_batch, d_model]`.
    x: Buffer<f32>,
    normed: Buffer<f32>,
    qkv: Buffer<f32>,
    attended: Buffer<f32>,
    inner: Buffer<f32>,
    logits: Buffer<f32>,
    partial: Buffer<f32>,
    /// Zero between launches.
    counters: Buffer<u32>,
    /// Candidates of argmax.
    best_logits: Buffer<f32>,
    best_ids: Buffer<u32>,
    arrived: Buffer<u32>,
    likeliest_logits: Buffer<f32>,
    likeliest_ids: Buffer<u32>,
    /// Activations of many tokens before a product, the factor of each row, and factors of 1.
    rows: Buffer<f16>,
    factors: Buffer<f32>,
    ones: Buffer<f32>,
    /// Where blocks meet that share a product. Counters are zero between launches.
    rows_partial: Buffer<f32>,
    rows_counters: Buffer<u32>,
    /// `[1]`: whether some matrix is wide.
    wide: Buffer<u32>,
    /// What each part of one token's residual stream adds to the router's logits.
    parts: Buffer<f32>,
    /// Activations inside one token's experts, two f16 a word.
    token_h: Buffer<u32>,
    /// For mixtures of experts, as `WorkspaceSizes` says.
    router_logits: Buffer<f32>,
    expert_ids: Buffer<u32>,
    expert_weights: Buffer<f32>,
    pairs: Buffer<u32>,
    tiles: Buffer<u32>,
    expert_out: Buffer<f32>,
    frequencies: Buffer<u64>,
}

pub(super) fn new(
    device: SharedDevice,
    spec: ModelSpec,
    options: Options,
    weights: DeviceWeights,
    arena: &mut Arena,
) -> Result<Engine, Error> {
    let mut cache = |layer| {
        let len = cache_len(attention_shape(&spec, &options, layer));
        match options.kv {
            KvType::F16 => LayerCache::F16(arena.buffer(len), arena.buffer(len)),
            KvType::F32 => LayerCache::F32(arena.buffer(len), arena.buffer(len)),
        }
    };
    let caches = spec.layers.iter().map(&mut cache).collect();
    let sizes = WorkspaceSizes::new(&spec, &options);
    let positions = rope(&spec).map(|rope| rope.inverse_frequencies(options.yarn_truncate));
    let (radians, magnitude) = positions.unwrap_or_default();
    let frequencies: Vec<u64> = radians.into_iter().map(kernels::rope::frequency).collect();
    let work = Workspace {
        tokens: arena.buffer(sizes.tokens),
        state: arena.buffer(1),
        x: arena.buffer(sizes.x),
        normed: arena.buffer(sizes.normed),
        qkv: arena.buffer(sizes.qkv),
        attended: arena.buffer(sizes.attended),
        inner: arena.buffer(sizes.inner),
        logits: arena.buffer(sizes.logits),
        partial: arena.buffer(sizes.partial),
        counters: arena.buffer(sizes.counters),
        parts: arena.buffer(sizes.parts),
        rows: arena.buffer(sizes.rows),
        factors: arena.buffer(sizes.tokens),
        ones: arena.buffer(sizes.tokens),
        rows_partial: arena.buffer(sizes.rows_partial),
        rows_counters: arena.buffer(sizes.rows_counters),
        wide: arena.buffer(1),
        token_h: arena.buffer(sizes.token_h),
        best_logits: arena.buffer(ops::ARGMAX_PARTS),
        best_ids: arena.buffer(ops::ARGMAX_PARTS),
        arrived: arena.buffer(1),
        likeliest_logits: arena.buffer(sizes.likeliest),
        likeliest_ids: arena.buffer(sizes.likeliest),
        router_logits: arena.buffer(sizes.router_logits),
        expert_ids: arena.buffer(sizes.pairs),
        expert_weights: arena.buffer(sizes.pairs),
        pairs: arena.buffer(sizes.pairs),
        tiles: arena.buffer(sizes.tiles),
        expert_out: arena.buffer(sizes.expert_out),
        frequencies: arena.buffer(frequencies.len()),
    };
    work.counters.write(0, &vec![0; sizes.counters])?;
    work.arrived.write(0, &[0])?;
    work.wide.write(0, &[0])?;
    work.ones.write(0, &vec![1.0; sizes.tokens])?;
    if sizes.rows_counters > 0 {
        work.rows_counters.write(0, &vec![0; sizes.rows_counters])?;
    }
    if !frequencies.is_empty() {
        work.frequencies.write(0, &frequencies)?;
    }
    let model =
        Model { device, spec, options, weights, caches, work, rope_magnitude: magnitude as f32, is_wide: false };
    Ok(Engine {
        decode_graph: None,
        model,
        n_past: 0,
        n_written: 0,
        device_position: None,
        device_token: None,
        has_logits: false,
        load_times: LoadTimes::default(),
    })
}

impl Model {
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    pub fn weights(&self) -> &DeviceWeights {
        &self.weights
    }

    /// Finds out what products with many tokens need to know of the weights, which are there by now.
    fn measure_weights(&mut self) -> Result<(), Error> {
        self.row_powers(&*self.device).map_err(device::Error::Launch)?;
        self.is_wide = self.work.wide.read(0..1)?[0] != 0;
        if self.is_wide && self.spec.layers.iter().any(|layer| self.qkv_matrices(layer).count() > 1) {
            let what = "queries, keys and values of different types beside weights further apart than f16 reaches";
            return Err(Error::NotYetRunnable { what });
        }
        Ok(())
    }

    fn row_powers(&self, launcher: &dyn Launcher) -> Result<(), LaunchError> {
        self.weights.matrices().try_for_each(|matrix| ops::row_powers(launcher, matrix.rows(), self.work.wide.view()))
    }

    /// Has the device make all kernels ready that steps launch.
    pub fn preload(&self) -> Result<(), device::Error> {
        let rows = self.work.tokens.len();
        self.device.preload(&mut |launcher| {
            self.row_powers(launcher)?;
            // One token, a few and many each have their kernels.
            for n_tokens in [1, 2, 40, 100, rows].map(|n| n.min(rows)) {
                self.layers(launcher, n_tokens)?;
            }
            self.head(launcher, self.work.logits.view(), 0, 1)?;
            self.choose(launcher, 1)
        })
    }

    /// `n_tokens` tokens from `work.tokens` through all layers; leaves the residual stream in `work.x` and their keys
    /// and values in the cache.
    fn layers(&self, launcher: &dyn Launcher, n_tokens: usize) -> Result<(), LaunchError> {
        if n_tokens == 1 {
            return self.token_layers(launcher);
        }
        if !self.is_wide {
            return self.rows_layers(launcher, n_tokens);
        }
        let (spec, work, weights) = (&self.spec, &self.work, &self.weights);
        let (d, q_width) = (spec.d_model, spec.n_head * spec.d_head);
        let qkv_width = q_width + 2 * spec.n_head_kv * spec.d_head;
        let x = work.x.view().part(0..n_tokens * d);
        let normed = work.normed.view().part(0..n_tokens * d);
        let qkv = work.qkv.view().part(0..n_tokens * qkv_width);
        let attended = work.attended.view().part(0..n_tokens * q_width);
        let (tokens, state) = (work.tokens.view().part(0..n_tokens), work.state.view());

        let table = weights.matrix(spec.token_embedding);
        let positions = spec.position_embedding.map(|id| weights.vector(id).view());
        ops::embed(launcher, x, table.format, table.packed.view(), tokens, positions, state, spec.n_vocab)?;

        for (layer, cache) in spec.layers.iter().zip(&self.caches) {
            self.norm(launcher, normed, x, &layer.attention_norm)?;
            self.qkv(launcher, qkv, normed, layer)?;
            let shape = attention_shape(spec, &self.options, layer);
            let (frequencies, magnitude) = (work.frequencies.view(), self.rope_magnitude);
            let rotation = layer.attention.rope.is_some().then_some(Rotation { frequencies, magnitude });
            let sinks = layer.attention.sinks.map(|id| weights.vector(id).view());
            if let Some(rotation) = rotation {
                ops::rope(launcher, qkv, rotation, state, shape, n_tokens)?;
            }
            ops::kv_append(launcher, cache.view(), qkv, state, shape, n_tokens)?;
            let out = AttentionOut::F32(attended);
            ops::attention(launcher, out, qkv, cache.view(), state, sinks, shape, n_tokens)?;
            self.linear(launcher, x, attended, &layer.attention_output, Epilogue::Add)?;

            self.norm(launcher, normed, x, &layer.ffn_norm)?;
            self.ffn(launcher, x, normed, &layer.ffn)?;
        }
        Ok(())
    }

    /// Logits of rows `first..first + n_rows` of the last forward pass.
    fn head(&self, launcher: &dyn Launcher, logits: View<f32>, first: usize, n_rows: usize) -> Result<(), LaunchError> {
        if n_rows == 1 {
            return self.token_head(launcher, logits, first);
        }
        if !self.is_wide {
            return self.rows_head(launcher, logits, first, n_rows);
        }
        let d = self.spec.d_model;
        let x = self.work.x.view().part(first * d..(first + n_rows) * d);
        let normed = self.work.normed.view().part(0..n_rows * d);
        self.norm(launcher, normed, x, &self.spec.output_norm)?;
        self.linear(launcher, logits, normed, &self.spec.output, Epilogue::Store)
    }

    /// The likeliest token into `work.tokens[0]`, and the position moved on.
    fn choose(&self, launcher: &dyn Launcher, n_tokens: usize) -> Result<(), LaunchError> {
        let (token, state) = (self.work.tokens.view().part(0..1), self.work.state.view());
        let Workspace { best_logits, best_ids, arrived, logits, .. } = &self.work;
        let work =
            ops::ArgmaxWork { best_logits: best_logits.view(), best_ids: best_ids.view(), arrived: arrived.view() };
        ops::argmax(launcher, token, state, logits.view(), work, n_tokens)
    }

    fn norm(&self, launcher: &dyn Launcher, out: View<f32>, x: View<f32>, norm: &NormSpec) -> Result<(), LaunchError> {
        let vector = |id| self.weights.vector(id).view();
        match *norm {
            NormSpec::Layer { gamma, beta, epsilon } => {
                ops::layer_norm(launcher, out, x, vector(gamma), vector(beta), epsilon)
            }
            NormSpec::Rms { gamma, epsilon } => ops::rms_norm(launcher, out, x, vector(gamma), epsilon),
        }
    }

    /// Queries, keys and values of all heads: one product, whether the file has one tensor or three.
    fn qkv(&self, launcher: &dyn Launcher, out: View<f32>, x: View<f32>, layer: &LayerSpec) -> Result<(), LaunchError> {
        let Matrix { format, packed, n_in, n_out, .. } =
            self.qkv_matrices(layer).next().expect("a fused tensor, or three");
        let bias = self.qkv_bias(layer);
        ops::linear(launcher, out, *format, packed.view(), x, bias, *n_in, *n_out, Epilogue::Store)
    }

    /// Queries, keys and values: one matrix, or one each if the file's tensors differ in type.
    fn qkv_matrices(&self, layer: &LayerSpec) -> impl Iterator<Item = &Matrix> {
        layer.qkv.linears().filter_map(|part| self.weights.find_matrix(part.weight))
    }

    /// The biases of queries, keys and values, one after the other.
    fn qkv_bias(&self, layer: &LayerSpec) -> Option<View<'_, f32>> {
        let first = layer.qkv.linears().find_map(|part| part.bias)?;
        Some(self.weights.vector(first).view())
    }

    fn gelu(&self) -> Epilogue {
        match self.options.gelu {
            Gelu::Exact => Epilogue::GeluErf,
            Gelu::Tanh => Epilogue::GeluTanh,
        }
    }

    /// The feed-forward network on the rows of `normed`, added to those of `x`.
    fn ffn(&self, launcher: &dyn Launcher, x: View<f32>, normed: View<f32>, ffn: &FfnSpec) -> Result<(), LaunchError> {
        let (work, d_model, d_ff) = (&self.work, self.spec.d_model, self.spec.d_ff);
        let n_tokens = x.len() / d_model;
        match ffn {
            FfnSpec::Gelu { up, down } => {
                let inner = work.inner.view().part(0..n_tokens * d_ff);
                self.linear(launcher, inner, normed, up, self.gelu())?;
                self.linear(launcher, x, inner, down, Epilogue::Add)
            }
            FfnSpec::MixtureOfExperts { router, n_expert, n_used, gate, up, down, activation: _ } => {
                let expert_work = self.experts_work(n_tokens, *n_expert, *n_used);
                let vector = |id| self.weights.vector(id).view();
                let matrix = |experts: &ExpertsSpec| {
                    let Experts { format, packed } = self.weights.experts(experts.weight);
                    ExpertsMatrix { format: *format, packed: packed.view(), bias: vector(experts.bias) }
                };
                ops::route(launcher, &expert_work, normed, vector(router.weight), router.bias.map(vector))?;
                ops::experts(launcher, &expert_work, x, normed, matrix(gate), matrix(up), matrix(down))
            }
        }
    }

    fn experts_work(&self, n_tokens: usize, n_expert: usize, n_used: usize) -> ExpertsWork<'_> {
        let (work, d_model, d_ff, n_pairs) = (&self.work, self.spec.d_model, self.spec.d_ff, n_tokens * n_used);
        ExpertsWork {
            n_expert,
            n_used,
            d_model,
            d_ff,
            logits: work.router_logits.view().part(0..n_tokens * n_expert),
            ids: work.expert_ids.view().part(0..n_pairs),
            weights: work.expert_weights.view().part(0..n_pairs),
            pairs: work.pairs.view().part(0..n_pairs),
            tiles: work.tiles.view().part(0..ops::expert_tiles_len(n_pairs, n_expert)),
            h: work.inner.view().part(0..n_pairs * d_ff),
            y: work.expert_out.view().part(0..n_pairs * d_model),
        }
    }

    fn linear(
        &self,
        launcher: &dyn Launcher,
        out: View<f32>,
        x: View<f32>,
        linear: &LinearSpec,
        epilogue: Epilogue,
    ) -> Result<(), LaunchError> {
        let matrix = self.weights.matrix(linear.weight);
        let bias = linear.bias.map(|id| self.weights.vector(id).view());
        ops::linear(launcher, out, matrix.format, matrix.packed.view(), x, bias, matrix.n_in, matrix.n_out, epilogue)
    }
}

impl Engine {
    /// See [`Model::measure_weights`].
    pub(super) fn measure_weights(&mut self) -> Result<(), Error> {
        self.model.measure_weights()
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    pub(super) fn set_load_times(&mut self, times: LoadTimes) {
        self.load_times = times;
    }

    /// How long loading took.
    pub fn load_times(&self) -> LoadTimes {
        self.load_times
    }

    /// What it runs.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// How it runs it.
    pub fn options(&self) -> &Options {
        &self.model.options
    }

    /// Tokens of the sequence so far.
    pub fn n_past(&self) -> usize {
        self.n_past
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        (self.n_past, self.n_written, self.has_logits) = (0, 0, false);
    }

    /// Keeps the first `n` tokens of the sequence and forgets the rest. There are no logits then until more tokens follow,
    /// unless nothing was forgotten.
    ///
    /// # Errors
    ///
    /// [`Error::Rewind`] if there are fewer tokens, or the cache no longer holds what the `n`th one attends to. The sequence
    /// is unchanged then; [`reset`](Self::reset) always works.
    pub fn rewind(&mut self, n: usize) -> Result<(), Error> {
        let (oldest, n_past) = (self.oldest_rewind(), self.n_past);
        if n > n_past || n < oldest && n > 0 {
            return Err(Error::Rewind { to: n, oldest, n_past });
        }
        // Keys and values behind the first `n` stay where they are: no token sees them before they are overwritten.
        (self.n_past, self.has_logits) = (n, self.has_logits && n == n_past);
        Ok(())
    }

    /// The fewest tokens that [`rewind`](Self::rewind) can keep, besides none: those from which on every layer's cache holds
    /// what is seen.
    fn oldest_rewind(&self) -> usize {
        let (spec, options) = (&self.model.spec, &self.model.options);
        let of_layer = |layer| {
            let shape = attention_shape(spec, options, layer);
            ring::oldest_rewind(self.n_written, shape.window, shape.n_slots)
        };
        spec.layers.iter().map(of_layer).max().unwrap_or(0)
    }

    /// Continues the sequence with `tokens`, in chunks of at most `n_batch`; logits are then those after the last.
    ///
    /// `progress` hears how many tokens are done.
    ///
    /// # Errors
    ///
    /// - [`Error::NoTokens`], [`Error::Token`], [`Error::ContextFull`] before anything is computed.
    /// - [`Error::Device`] if the device fails.
    pub fn prefill(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize)) -> Result<(), Error> {
        self.check(tokens)?;
        let mut done = 0;
        for chunk in tokens.chunks(self.model.work.tokens.len()) {
            self.run_chunk(chunk, self.n_past + done)?;
            done += chunk.len();
            if done == tokens.len() {
                let (model, device) = (&self.model, &*self.model.device);
                let launch = || {
                    model.head(device, model.work.logits.view(), chunk.len() - 1, 1)?;
                    model.choose(device, chunk.len())
                };
                launch().map_err(device::Error::Launch)?;
            }
            self.model.device.synchronize()?;
            progress(done);
        }
        self.n_past += tokens.len();
        self.n_written = self.n_written.max(self.n_past);
        (self.device_position, self.device_token, self.has_logits) = (Some(self.n_past), None, true);
        Ok(())
    }

    /// As [`prefill`](Self::prefill), and gives `each` the position and the logits of every token.
    ///
    /// # Errors
    ///
    /// As [`prefill`](Self::prefill); [`Error::Device`] too if there is no memory for the logits of 32 tokens.
    pub fn prefill_all(&mut self, tokens: &[u32], each: &mut dyn FnMut(usize, &[f32])) -> Result<(), Error> {
        const ROWS: usize = 32;
        self.check(tokens)?;
        let n_vocab = self.model.spec.n_vocab;
        let logits = Buffer::<f32>::new(&self.model.device, ROWS.min(tokens.len()) * n_vocab)?;
        let mut done = 0;
        for chunk in tokens.chunks(self.model.work.tokens.len()) {
            self.run_chunk(chunk, self.n_past + done)?;
            for first in (0..chunk.len()).step_by(ROWS) {
                let n_rows = ROWS.min(chunk.len() - first);
                let rows = logits.view().part(0..n_rows * n_vocab);
                self.model.head(&*self.model.device, rows, first, n_rows).map_err(device::Error::Launch)?;
                for (row, values) in logits.read(0..n_rows * n_vocab)?.chunks(n_vocab).enumerate() {
                    each(self.n_past + done + first + row, values);
                }
            }
            done += chunk.len();
        }
        let last = (tokens.len() - 1) % self.model.work.tokens.len();
        let model = &self.model;
        model.head(&*model.device, model.work.logits.view(), last, 1).map_err(device::Error::Launch)?;
        model.choose(&*model.device, last + 1).map_err(device::Error::Launch)?;
        self.n_past += tokens.len();
        self.n_written = self.n_written.max(self.n_past);
        (self.device_position, self.device_token, self.has_logits) = (Some(self.n_past), None, true);
        Ok(())
    }

    /// Continues the sequence with one token; logits are then those after it. Replays one recorded graph, which reads
    /// token and position from device memory; a token that [`greedy`](Self::greedy) just gave is there already.
    ///
    /// # Errors
    ///
    /// As [`prefill`](Self::prefill).
    pub fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.check(&[token])?;
        if self.device_token != Some(token) {
            self.model.work.tokens.write(0, &[token])?;
        }
        if self.device_position != Some(self.n_past) {
            self.model.work.state.write(0, &[self.n_past as u32])?;
        }
        (self.device_position, self.device_token) = (None, None);
        if self.decode_graph.is_none() {
            let model = &self.model;
            let mut step = |launcher: &dyn Launcher| {
                model.layers(launcher, 1)?;
                model.head(launcher, model.work.logits.view(), 0, 1)?;
                model.choose(launcher, 1)
            };
            // SAFETY: the graph names buffers of `self.model`, which is dropped after it.
            #[expect(unsafe_code, reason = "records launches whose memory this struct owns")]
            let graph = unsafe { model.device.record(&mut step)? };
            self.decode_graph = Some(graph);
        }
        self.decode_graph.as_ref().expect("recorded above").replay()?;
        self.n_past += 1;
        self.n_written = self.n_written.max(self.n_past);
        (self.device_position, self.has_logits) = (Some(self.n_past), true);
        Ok(())
    }

    /// The logits after the last token, `[n_vocab]`.
    ///
    /// # Errors
    ///
    /// - [`Error::NoLogits`] before the first token.
    /// - [`Error::Device`] if the device fails, in an earlier launch too.
    pub fn logits(&self) -> Result<Vec<f32>, Error> {
        if !self.has_logits {
            return Err(Error::NoLogits);
        }
        Ok(self.model.work.logits.to_vec()?)
    }

    /// The likeliest next tokens, of each part of the vocabulary: what [`Sampler::sample_likeliest`] takes, a hundredth of
    /// all logits.
    ///
    /// # Errors
    ///
    /// As [`logits`](Self::logits).
    ///
    /// [`Sampler::sample_likeliest`]: crate::sampler::Sampler::sample_likeliest
    pub fn likeliest(&self) -> Result<Likeliest, Error> {
        if !self.has_logits {
            return Err(Error::NoLogits);
        }
        let (work, device) = (&self.model.work, &*self.model.device);
        let (values, ids) = (&work.likeliest_logits, &work.likeliest_ids);
        ops::likeliest(device, values.view(), ids.view(), work.logits.view()).map_err(device::Error::Launch)?;
        Ok(Likeliest { per_part: ops::LIKELIEST_PER_PART, ids: ids.to_vec()?, logits: values.to_vec()? })
    }

    /// The likeliest next token, the lowest id among equals; chosen on the device.
    ///
    /// # Errors
    ///
    /// As [`logits`](Self::logits), and [`Error::NotANumber`] if a logit is NaN.
    pub fn greedy(&mut self) -> Result<u32, Error> {
        if !self.has_logits {
            return Err(Error::NoLogits);
        }
        let token = self.model.work.tokens.read(0..1)?[0];
        if token == kernels::argmax::NOT_A_NUMBER {
            return Err(Error::NotANumber { n_past: self.n_past });
        }
        self.device_token = Some(token);
        Ok(token)
    }

    /// Launches a decode step holds, for reports; 0 before the first.
    pub fn n_graph_nodes(&self) -> usize {
        self.decode_graph.as_ref().map_or(0, |graph| graph.n_nodes())
    }

    fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let (n_vocab, n_ctx) = (self.model.spec.n_vocab, self.model.options.n_ctx);
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= n_vocab) {
            return Err(Error::Token { token, n_vocab });
        }
        let wanted = self.n_past + tokens.len();
        if wanted > n_ctx {
            return Err(Error::ContextFull { wanted, n_ctx });
        }
        Ok(())
    }

    fn run_chunk(&mut self, chunk: &[u32], position: usize) -> Result<(), Error> {
        (self.device_position, self.device_token, self.has_logits) = (None, None, false);
        self.model.work.tokens.write(0, chunk)?;
        self.model.work.state.write(0, &[position as u32])?;
        self.model.layers(&*self.model.device, chunk.len()).map_err(device::Error::Launch)?;
        Ok(())
    }
}
