//! The forward pass, and the state it moves: KV cache, position, the token to come.

use cuda_std::{LaunchError, Launcher, f16};

use super::load::{DeviceWeights, Experts};
use super::plan::{WorkspaceSizes, cache_len, rope};
use super::{Error, Gelu, KvType, Options};
use crate::adapter::{ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec, QkvSpec};
use crate::device::ops::{self, AttentionShape, Cache, Epilogue, ExpertsMatrix, ExpertsWork};
use crate::device::{self, Buffer, Graph, SharedDevice, View};

/// A loaded model with one sequence of tokens.
pub struct Engine {
    // Dropped first: it names the buffers below.
    decode_graph: Option<Box<dyn Graph>>,
    model: Model,
    /// Tokens in the KV cache.
    n_past: usize,
    /// What `state[0]` holds on the device, if known.
    device_position: Option<usize>,
    /// What `tokens[0]` holds on the device, if known to the host.
    device_token: Option<u32>,
    has_logits: bool,
}

/// What a forward pass reads and writes.
struct Model {
    device: SharedDevice,
    spec: ModelSpec,
    options: Options,
    weights: DeviceWeights,
    caches: Vec<LayerCache>,
    work: Workspace,
    /// What turned queries and keys are multiplied by.
    rope_magnitude: f32,
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
    /// Candidates of argmax.
    best_logits: Buffer<f32>,
    best_ids: Buffer<u32>,
    arrived: Buffer<u32>,
    /// For mixtures of experts, as `WorkspaceSizes` says.
    router_logits: Buffer<f32>,
    expert_ids: Buffer<u32>,
    expert_weights: Buffer<f32>,
    pairs: Buffer<u32>,
    tiles: Buffer<u32>,
    expert_out: Buffer<f32>,
    frequencies: Buffer<u64>,
}

fn attention_shape(spec: &ModelSpec, layer: Option<&LayerSpec>, n_ctx: usize) -> AttentionShape {
    AttentionShape {
        n_head: spec.n_head,
        n_head_kv: spec.n_head_kv,
        d_head: spec.d_head,
        n_ctx,
        scale: layer.map_or(0.0, |layer| layer.attention.scale),
        window: layer.and_then(|layer| layer.attention.window),
    }
}

/// Elements of the buffer for attention's partial results.
pub(super) fn partial_len(spec: &ModelSpec, n_ctx: usize) -> usize {
    ops::attention_partial_len(attention_shape(spec, None, n_ctx))
}

pub(super) fn new(
    device: SharedDevice,
    spec: ModelSpec,
    options: Options,
    weights: DeviceWeights,
) -> Result<Engine, Error> {
    let len = cache_len(&spec, &options);
    let cache = || -> Result<LayerCache, device::Error> {
        Ok(match options.kv {
            KvType::F16 => LayerCache::F16(Buffer::new(&device, len)?, Buffer::new(&device, len)?),
            KvType::F32 => LayerCache::F32(Buffer::new(&device, len)?, Buffer::new(&device, len)?),
        })
    };
    let caches = (0..spec.n_layer).map(|_| cache()).collect::<Result<Vec<_>, _>>()?;
    let sizes = WorkspaceSizes::new(&spec, &options);
    let positions = rope(&spec).map(|rope| rope.inverse_frequencies(options.yarn_truncate));
    let (radians, magnitude) = positions.unwrap_or_default();
    let frequencies: Vec<u64> = radians.into_iter().map(kernels::rope::frequency).collect();
    let work = Workspace {
        tokens: Buffer::new(&device, sizes.tokens)?,
        state: Buffer::new(&device, 1)?,
        x: Buffer::new(&device, sizes.x)?,
        normed: Buffer::new(&device, sizes.normed)?,
        qkv: Buffer::new(&device, sizes.qkv)?,
        attended: Buffer::new(&device, sizes.attended)?,
        inner: Buffer::new(&device, sizes.inner)?,
        logits: Buffer::new(&device, sizes.logits)?,
        partial: Buffer::new(&device, sizes.partial)?,
        best_logits: Buffer::new(&device, ops::ARGMAX_PARTS)?,
        best_ids: Buffer::new(&device, ops::ARGMAX_PARTS)?,
        arrived: Buffer::from_slice(&device, &[0])?,
        router_logits: Buffer::new(&device, sizes.router_logits)?,
        expert_ids: Buffer::new(&device, sizes.pairs)?,
        expert_weights: Buffer::new(&device, sizes.pairs)?,
        pairs: Buffer::new(&device, sizes.pairs)?,
        tiles: Buffer::new(&device, sizes.tiles)?,
        expert_out: Buffer::new(&device, sizes.expert_out)?,
        frequencies: Buffer::from_slice(&device, &frequencies)?,
    };
    let model = Model { device, spec, options, weights, caches, work, rope_magnitude: magnitude as f32 };
    Ok(Engine { decode_graph: None, model, n_past: 0, device_position: None, device_token: None, has_logits: false })
}

impl Model {
    /// `n_tokens` tokens from `work.tokens` through all layers; leaves the residual stream in `work.x` and their keys
    /// and values in the cache.
    fn layers(&self, launcher: &dyn Launcher, n_tokens: usize) -> Result<(), LaunchError> {
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
            self.qkv(launcher, qkv, normed, &layer.qkv)?;
            let shape = attention_shape(spec, Some(layer), self.options.n_ctx);
            if layer.attention.rope.is_some() {
                let (frequencies, magnitude) = (work.frequencies.view(), self.rope_magnitude);
                ops::rope(launcher, qkv, frequencies, magnitude, state, shape, n_tokens)?;
            }
            ops::kv_append(launcher, cache.view(), qkv, state, shape, n_tokens)?;
            let (sinks, partial) = (layer.attention.sinks.map(|id| weights.vector(id).view()), work.partial.view());
            ops::attention(launcher, attended, qkv, cache.view(), state, sinks, partial, shape, n_tokens)?;
            self.linear(launcher, x, attended, &layer.attention_output, Epilogue::Add)?;

            self.norm(launcher, normed, x, &layer.ffn_norm)?;
            self.ffn(launcher, x, normed, &layer.ffn)?;
        }
        Ok(())
    }

    /// Logits of rows `first..first + n_rows` of the last forward pass.
    fn head(&self, launcher: &dyn Launcher, logits: View<f32>, first: usize, n_rows: usize) -> Result<(), LaunchError> {
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
    fn qkv(&self, launcher: &dyn Launcher, out: View<f32>, x: View<f32>, qkv: &QkvSpec) -> Result<(), LaunchError> {
        let first = qkv.linears().next().expect("a fused tensor, or three");
        self.linear(launcher, out, x, first, Epilogue::Store)
    }

    /// The feed-forward network on the rows of `normed`, added to those of `x`.
    fn ffn(&self, launcher: &dyn Launcher, x: View<f32>, normed: View<f32>, ffn: &FfnSpec) -> Result<(), LaunchError> {
        let (work, d_model, d_ff) = (&self.work, self.spec.d_model, self.spec.d_ff);
        let n_tokens = x.len() / d_model;
        match ffn {
            FfnSpec::Gelu { up, down } => {
                let gelu = match self.options.gelu {
                    Gelu::Exact => Epilogue::GeluErf,
                    Gelu::Tanh => Epilogue::GeluTanh,
                };
                let inner = work.inner.view().part(0..n_tokens * d_ff);
                self.linear(launcher, inner, normed, up, gelu)?;
                self.linear(launcher, x, inner, down, Epilogue::Add)
            }
            FfnSpec::MixtureOfExperts { router, n_expert, n_used, gate, up, down, activation: _ } => {
                let n_pairs = n_tokens * n_used;
                let expert_work = ExpertsWork {
                    n_expert: *n_expert,
                    n_used: *n_used,
                    d_model,
                    d_ff,
                    logits: work.router_logits.view().part(0..n_tokens * n_expert),
                    ids: work.expert_ids.view().part(0..n_pairs),
                    weights: work.expert_weights.view().part(0..n_pairs),
                    pairs: work.pairs.view().part(0..n_pairs),
                    tiles: work.tiles.view().part(0..ops::expert_tiles_len(n_pairs, *n_expert)),
                    h: work.inner.view().part(0..n_pairs * d_ff),
                    y: work.expert_out.view().part(0..n_pairs * d_model),
                };
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
        (self.n_past, self.has_logits) = (0, false);
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
