//! The operations of a forward pass: which kernel, with which geometry, on memory that is there and large enough.
//!
//! Each function checks the lengths its kernel's `# Safety` section asks for and then launches. Lengths that do not fit are
//! the engine's bug and panic; whatever a file or a user can cause was refused long before.

use cuda_std::{DeviceSlice, LaunchError, Launcher, f16};
use kernels::attention::decode::{self, decode_splits};
use kernels::attention::{kv_append, prefill};
use kernels::experts::{decode as one, prefill as many, sort};
use kernels::format::WeightFormat;
use kernels::{
    argmax as argmax_kernel, embed as embed_kernel, layer_norm as layer_norm_kernel, matmul, matvec, norm_rows,
    rms_norm as rms_norm_kernel, rope as rope_kernel, router,
};

use super::View;

/// What a linear map does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// Writes them.
    Store,
    /// Adds them to what is there: the residual.
    Add,
    /// Writes their exact GELU.
    GeluErf,
    /// Writes their GELU in the tanh form.
    GeluTanh,
}

impl Epilogue {
    fn code(self) -> u32 {
        match self {
            Self::Store => matvec::STORE,
            Self::Add => matvec::ADD,
            Self::GeluErf => matvec::GELU_ERF,
            Self::GeluTanh => matvec::GELU_TANH,
        }
    }
}

/// What the attention kernels need to know of a layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Width of a head: a multiple of 8 up to 128.
    pub d_head: usize,
    /// Positions of the cache.
    pub n_ctx: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// How many keys a query sees, its own included; all if `None`.
    pub window: Option<usize>,
}

impl AttentionShape {
    fn qkv_width(&self) -> usize {
        (self.n_head + 2 * self.n_head_kv) * self.d_head
    }

    fn q_width(&self) -> usize {
        self.n_head * self.d_head
    }

    /// Whether so many query heads share the keys they read that one block serves them on tensor cores: below about five
    /// their rows of the tensor core's tile are empty.
    fn is_grouped(&self) -> bool {
        self.n_head > 4 * self.n_head_kv
    }

    /// Over how many blocks a decode step spreads the keys of a head, by the whole context: the launch is recorded once.
    fn n_splits(&self) -> u32 {
        let one = match self.is_grouped() {
            true => decode::launch_grouped(self.n_head as u32, self.n_head_kv as u32, 1),
            false => decode::launch(self.n_head as u32, 1),
        };
        decode_splits(self.n_ctx.min(self.window.unwrap_or(usize::MAX)) as u32, one.grid[0])
    }
}

/// The KV cache of one layer: `[n_head_kv, n_ctx, d_head]` each.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "keys and values")]
pub enum Cache<'a> {
    F16 { k: View<'a, f16>, v: View<'a, f16> },
    F32 { k: View<'a, f32>, v: View<'a, f32> },
}

impl Cache<'_> {
    fn assert_holds(&self, shape: AttentionShape) {
        let (k, v) = match self {
            Self::F16 { k, v } => (k.len(), v.len()),
            Self::F32 { k, v } => (k.len(), v.len()),
        };
        assert_eq!((k, v), (shape.n_head_kv * shape.n_ctx * shape.d_head, k), "cache lengths");
    }
}

/// A kernel parameter that may be left out, as an empty slice.
fn optional(view: Option<View<f32>>) -> DeviceSlice<f32> {
    view.map_or(DeviceSlice::new(0, 0), |view| view.slice())
}

/// `out[t] = table[tokens[t]] (+ positions[state[0] + t])`.
///
/// # Errors
///
/// Those of the launch.
pub fn embed(
    launcher: &dyn Launcher,
    out: View<f32>,
    format: WeightFormat,
    table: View<u8>,
    tokens: View<u32>,
    positions: Option<View<f32>>,
    state: View<u32>,
    n_vocab: usize,
) -> Result<(), LaunchError> {
    let (n_tokens, d_model) = (tokens.len(), out.len() / tokens.len());
    assert_eq!(out.len(), n_tokens * d_model, "output length");
    assert_eq!(table.len(), format.layout().planes(d_model, n_vocab).end, "table length");
    assert!(!state.is_empty(), "state length");
    let (n, d, v) = (n_tokens as u32, d_model as u32, n_vocab as u32);
    let (out, table, tokens) = (out.slice(), table.slice(), tokens.slice());
    let (positions, state) = (optional(positions), state.slice());
    // SAFETY: lengths checked above; views keep the memory alive until the device has run what was launched.
    unsafe { embed_kernel::run(format, launcher, out, table, tokens, positions, state, n, d, v) }
}

/// `out[t] = γ · (x[t] − mean) / √(variance + ε) + β`.
///
/// # Errors
///
/// Those of the launch.
pub fn layer_norm(
    launcher: &dyn Launcher,
    out: View<f32>,
    x: View<f32>,
    gamma: View<f32>,
    beta: View<f32>,
    epsilon: f32,
) -> Result<(), LaunchError> {
    let n_tokens = x.len() / gamma.len();
    assert_eq!((out.len(), x.len(), beta.len()), (x.len(), n_tokens * gamma.len(), gamma.len()), "lengths");
    let launch = layer_norm_kernel::launch(n_tokens as u32);
    let (out, x, gamma, beta) = (out.slice(), x.slice(), gamma.slice(), beta.slice());
    // SAFETY: as in `embed`.
    unsafe { layer_norm_kernel::layer_norm::run(launcher, launch, out, x, gamma, beta, epsilon) }
}

/// `out[t] = epilogue(weight · x[t] + bias)` for each row t of `x`: one row by the kernel that streams weights, more by
/// tensor cores.
///
/// # Errors
///
/// Those of the launch.
pub fn linear(
    launcher: &dyn Launcher,
    out: View<f32>,
    format: WeightFormat,
    weight: View<u8>,
    x: View<f32>,
    bias: Option<View<f32>>,
    n_in: usize,
    n_out: usize,
    epilogue: Epilogue,
) -> Result<(), LaunchError> {
    let n_tokens = x.len() / n_in;
    assert_eq!((out.len(), x.len()), (n_tokens * n_out, n_tokens * n_in), "lengths");
    assert_eq!(weight.len(), format.layout().planes(n_in, n_out).end, "weight length");
    assert!(bias.is_none_or(|bias| bias.len() == n_out), "bias length");
    let (out, weight, x, bias) = (out.slice(), weight.slice(), x.slice(), optional(bias));
    let (t, i, o, code) = (n_tokens as u32, n_in as u32, n_out as u32, epilogue.code());
    // SAFETY: as in `embed`.
    unsafe {
        if n_tokens == 1 {
            matvec::run(format, launcher, out, weight, x, bias, i, o, code)
        } else {
            matmul::run(format, launcher, out, weight, x, bias, t, i, o, code)
        }
    }
}

/// Rows of f16 under a power of two each: what [`linear_rows`] multiplies.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// `[n_tokens, width]`, width a multiple of 8.
    pub x: View<'a, f16>,
    /// `[n_tokens]`: row t is `factors[t] · x[t]`.
    pub factors: View<'a, f32>,
}

/// `rows[t] = γ · x[t] / √(mean(x[t]²) + ε)`.
///
/// # Errors
///
/// Those of the launch.
pub fn rms_norm_rows(
    launcher: &dyn Launcher,
    rows: Rows,
    x: View<f32>,
    gamma: View<f32>,
    epsilon: f32,
) -> Result<(), LaunchError> {
    let launch = rows_launch(rows, x, gamma.len());
    let (out, factors, x, gamma) = (rows.x.slice(), rows.factors.slice(), x.slice(), gamma.slice());
    // SAFETY: as in `embed`.
    unsafe { norm_rows::rms_norm_f16::run(launcher, launch, out, factors, x, gamma, epsilon) }
}

/// `rows[t] = γ · (x[t] − mean) / √(variance + ε) + β`.
///
/// # Errors
///
/// Those of the launch.
pub fn layer_norm_rows(
    launcher: &dyn Launcher,
    rows: Rows,
    x: View<f32>,
    gamma: View<f32>,
    beta: View<f32>,
    epsilon: f32,
) -> Result<(), LaunchError> {
    assert_eq!(beta.len(), gamma.len(), "lengths");
    let launch = rows_launch(rows, x, gamma.len());
    let (out, factors, x) = (rows.x.slice(), rows.factors.slice(), x.slice());
    // SAFETY: as in `embed`.
    unsafe { norm_rows::layer_norm_f16::run(launcher, launch, out, factors, x, gamma.slice(), beta.slice(), epsilon) }
}

/// `rows[t] = x[t]`, rows of `width`.
///
/// # Errors
///
/// Those of the launch.
pub fn to_rows(launcher: &dyn Launcher, rows: Rows, x: View<f32>, width: usize) -> Result<(), LaunchError> {
    let launch = rows_launch(rows, x, width);
    let (out, factors, x) = (rows.x.slice(), rows.factors.slice(), x.slice());
    // SAFETY: as in `embed`.
    unsafe { norm_rows::to_f16::run(launcher, launch, out, factors, x, width as u32) }
}

fn rows_launch(rows: Rows, x: View<f32>, width: usize) -> cuda_std::Launch {
    let n_tokens = x.len() / width;
    assert!(width.is_multiple_of(8), "width");
    assert_eq!((rows.x.len(), rows.factors.len(), x.len()), (x.len(), n_tokens, n_tokens * width), "lengths");
    norm_rows::launch(n_tokens as u32)
}

/// A matrix, and the powers of two that [`row_powers`] found for its rows.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "a format, a matrix, its powers, its widths")]
pub struct RowsMatrix<'a> {
    pub format: WeightFormat,
    pub packed: View<'a, u8>,
    /// `[n_out]`.
    pub powers: View<'a, f32>,
    pub n_in: usize,
    pub n_out: usize,
}

/// Finds the powers of two of a matrix's rows, once when it is loaded, and sets `wide[0]`, 0 before, to 1 if the matrix is
/// not for [`linear_rows`] but for [`linear`]: if f16 would lose bits of all of some 32 neighbours.
///
/// # Errors
///
/// Those of the launch.
pub fn row_powers(launcher: &dyn Launcher, matrix: RowsMatrix, wide: View<u32>) -> Result<(), LaunchError> {
    matrix.assert_holds();
    assert_eq!(wide.len(), 1, "flag");
    let (powers, wide, weight) = (matrix.powers.slice(), wide.slice(), matrix.packed.slice());
    let (i, o) = (matrix.n_in as u32, matrix.n_out as u32);
    // SAFETY: as in `embed`.
    unsafe { matmul::powers::run(matrix.format, launcher, powers, wide, weight, i, o) }
}

impl RowsMatrix<'_> {
    fn assert_holds(&self) {
        let Self { format, packed, powers, n_in, n_out } = *self;
        assert_eq!(packed.len(), format.layout().planes(n_in, n_out).end, "weight length");
        assert_eq!(powers.len(), n_out, "powers length");
    }
}

/// Where blocks of [`linear_rows`] that share a tile meet.
#[derive(Clone, Copy)]
pub struct RowsWork<'a> {
    /// [`rows_work_lens`]`.0` elements.
    pub partial: View<'a, f32>,
    /// [`rows_work_lens`]`.1` elements, 0 before the first use, and again after each.
    pub counters: View<'a, u32>,
}

/// Elements that [`linear_rows`] needs in `partial` and `counters` for up to `max_tokens` tokens.
pub fn rows_work_lens(max_tokens: usize, n_in: usize, n_out: usize) -> (usize, usize) {
    let lens = |n_tokens: usize| {
        let plan = matmul::rows::Plan::new(n_tokens as u32, n_in as u32, n_out as u32);
        (plan.partial_len(), plan.counters_len())
    };
    (1..=max_tokens).map(lens).fold((0, 0), |(p, c), (partial, counters)| (p.max(partial), c.max(counters)))
}

/// `out[t] = epilogue(weight · rows[t] + bias)`, rows of `out` being `out_stride` elements apart; and `out16` the same in
/// f16, where what exceeds 65504 is infinite. Either may be left out, `out` unless added to.
///
/// # Errors
///
/// Those of the launch.
pub fn linear_rows(
    launcher: &dyn Launcher,
    out: Option<View<f32>>,
    out_stride: usize,
    out16: Option<View<f16>>,
    matrix: RowsMatrix,
    rows: Rows,
    bias: Option<View<f32>>,
    epilogue: Epilogue,
    work: RowsWork,
) -> Result<(), LaunchError> {
    matrix.assert_holds();
    let RowsMatrix { format, packed, powers, n_in, n_out } = matrix;
    let n_tokens = rows.factors.len();
    assert_eq!(rows.x.len(), n_tokens * n_in, "lengths");
    let out_len = (n_tokens - 1) * out_stride + n_out;
    assert!(out_stride >= n_out && out.is_none_or(|out| out.len() >= out_len), "output length");
    assert!(out.is_some() || (out16.is_some() && epilogue != Epilogue::Add), "no output");
    assert!(out16.is_none_or(|out| out.len() >= out_len), "output length");
    assert!(bias.is_none_or(|bias| bias.len() == n_out), "bias length");
    let plan = matmul::rows::Plan::new(n_tokens as u32, n_in as u32, n_out as u32);
    assert!(work.partial.len() >= plan.partial_len() && work.counters.len() >= plan.counters_len(), "work lengths");
    let arguments = matmul::rows::Arguments {
        out: optional(out),
        out16: out16.map_or(DeviceSlice::new(0, 0), |out| out.slice()),
        weight: packed.slice(),
        powers: powers.slice(),
        x: rows.x.slice(),
        factors: rows.factors.slice(),
        bias: optional(bias),
        partial: work.partial.slice(),
        counters: work.counters.slice(),
        out_stride: out_stride as u32,
        epilogue: epilogue.code(),
    };
    // SAFETY: as in `embed`.
    unsafe { matmul::rows::run(format, launcher, plan, &arguments) }
}

/// Writes the keys and values in `qkv` to their positions in the cache.
///
/// # Errors
///
/// Those of the launch.
pub fn kv_append(
    launcher: &dyn Launcher,
    cache: Cache,
    qkv: View<f32>,
    state: View<u32>,
    shape: AttentionShape,
    n_tokens: usize,
) -> Result<(), LaunchError> {
    cache.assert_holds(shape);
    assert_eq!(qkv.len(), n_tokens * shape.qkv_width(), "qkv length");
    let launch = kv_append::launch(n_tokens as u32, shape.n_head_kv as u32);
    let (t, h, hkv) = (n_tokens as u32, shape.n_head as u32, shape.n_head_kv as u32);
    let (d, c) = (shape.d_head as u32, shape.n_ctx as u32);
    let (qkv, state) = (qkv.slice(), state.slice());
    // SAFETY: as in `embed`.
    unsafe {
        match cache {
            Cache::F16 { k, v } => {
                kv_append::kv_append_f16::run(launcher, launch, k.slice(), v.slice(), qkv, state, t, h, hkv, d, c)
            }
            Cache::F32 { k, v } => {
                kv_append::kv_append_f32::run(launcher, launch, k.slice(), v.slice(), qkv, state, t, h, hkv, d, c)
            }
        }
    }
}

/// Elements that [`attention`] needs in `partial`.
pub fn attention_partial_len(shape: AttentionShape) -> usize {
    decode::partial_len(shape.n_head as u32, shape.d_head as u32, shape.n_splits())
}

/// Attends from each of `n_tokens` tokens in `qkv` to the cache, which holds their own keys already.
///
/// # Errors
///
/// Those of the launches.
pub fn attention(
    launcher: &dyn Launcher,
    out: View<f32>,
    qkv: View<f32>,
    cache: Cache,
    state: View<u32>,
    sinks: Option<View<f32>>,
    partial: View<f32>,
    shape: AttentionShape,
    n_tokens: usize,
) -> Result<(), LaunchError> {
    cache.assert_holds(shape);
    assert!(sinks.is_none_or(|sinks| sinks.len() == shape.n_head), "sinks length");
    assert_eq!(qkv.len(), n_tokens * shape.qkv_width(), "qkv length");
    assert_eq!(out.len(), n_tokens * shape.q_width(), "output length");
    assert!(partial.len() >= attention_partial_len(shape), "partial length");
    assert!(shape.d_head.is_multiple_of(8) && shape.d_head <= 128, "head width");
    let (t, h, hkv) = (n_tokens as u32, shape.n_head as u32, shape.n_head_kv as u32);
    let (d, c, scale) = (shape.d_head as u32, shape.n_ctx as u32, shape.scale);
    let (out, qkv, state, partial) = (out.slice(), qkv.slice(), state.slice(), partial.slice());
    let (sinks, window) = (optional(sinks), shape.window.unwrap_or(0) as u32);

    if n_tokens > 1 {
        // SAFETY: as in `embed`.
        return unsafe {
            match cache {
                Cache::F16 { k, v } => {
                    let kernel = match d {
                        ..=64 => prefill::attention_prefill_f16_64::run,
                        _ => prefill::attention_prefill_f16_128::run,
                    };
                    let (launch, k, v) = (prefill::launch_f16(t, h), k.slice(), v.slice());
                    kernel(launcher, launch, out, qkv, k, v, state, sinks, t, h, hkv, d, c, window, scale)
                }
                Cache::F32 { k, v } => {
                    let kernel = match d {
                        ..=32 => prefill::attention_prefill_f32_32::run,
                        33..=64 => prefill::attention_prefill_f32_64::run,
                        _ => prefill::attention_prefill_f32_128::run,
                    };
                    let (launch, k, v) = (prefill::launch_f32(t, h), k.slice(), v.slice());
                    kernel(launcher, launch, out, qkv, k, v, state, sinks, t, h, hkv, d, c, window, scale)
                }
            }
        };
    }

    let n_splits = shape.n_splits();
    // SAFETY: as in `embed`.
    unsafe {
        match cache {
            Cache::F16 { k, v } => {
                let kernel = match (shape.is_grouped(), d) {
                    (true, ..=64) => decode::attention_decode_grouped_f16_64::run,
                    (true, _) => decode::attention_decode_grouped_f16_128::run,
                    (false, ..=32) => decode::attention_decode_f16_32::run,
                    (false, 33..=64) => decode::attention_decode_f16_64::run,
                    (false, _) => decode::attention_decode_f16_128::run,
                };
                let launch = match shape.is_grouped() {
                    true => decode::launch_grouped(h, hkv, n_splits),
                    false => decode::launch(h, n_splits),
                };
                kernel(launcher, launch, partial, qkv, k.slice(), v.slice(), state, h, hkv, d, c, window, scale)?;
            }
            Cache::F32 { k, v } => {
                let kernel = match d {
                    ..=32 => decode::attention_decode_f32_32::run,
                    33..=64 => decode::attention_decode_f32_64::run,
                    _ => decode::attention_decode_f32_128::run,
                };
                // These have a block a query head whatever the group.
                let (launch, k, v) = (decode::launch(h, n_splits), k.slice(), v.slice());
                kernel(launcher, launch, partial, qkv, k, v, state, h, hkv, d, c, window, scale)?;
            }
        }
        let launch = decode::launch_merge(h);
        decode::attention_merge::run(launcher, launch, out, partial, state, sinks, h, d, n_splits, window)
    }
}

/// `out[t] = γ · x[t] / √(mean(x[t]²) + ε)`.
///
/// # Errors
///
/// Those of the launch.
pub fn rms_norm(
    launcher: &dyn Launcher,
    out: View<f32>,
    x: View<f32>,
    gamma: View<f32>,
    epsilon: f32,
) -> Result<(), LaunchError> {
    let n_tokens = x.len() / gamma.len();
    assert_eq!((out.len(), x.len()), (x.len(), n_tokens * gamma.len()), "lengths");
    let launch = rms_norm_kernel::launch(n_tokens as u32);
    // SAFETY: as in `embed`.
    unsafe { rms_norm_kernel::rms_norm::run(launcher, launch, out.slice(), x.slice(), gamma.slice(), epsilon) }
}

/// Turns the query and key heads in `qkv` by their positions; `frequencies` are of [`kernels::rope::frequency`].
///
/// # Errors
///
/// Those of the launch.
pub fn rope(
    launcher: &dyn Launcher,
    qkv: View<f32>,
    frequencies: View<u64>,
    magnitude: f32,
    state: View<u32>,
    shape: AttentionShape,
    n_tokens: usize,
) -> Result<(), LaunchError> {
    assert_eq!(qkv.len(), n_tokens * shape.qkv_width(), "qkv length");
    assert_eq!(2 * frequencies.len(), shape.d_head, "frequencies");
    let n_head = (shape.n_head + shape.n_head_kv) as u32;
    let launch = rope_kernel::launch(n_tokens as u32, n_head);
    let (qkv, frequencies, width) = (qkv.slice(), frequencies.slice(), shape.qkv_width() as u32);
    // SAFETY: as in `embed`.
    unsafe { rope_kernel::rope::run(launcher, launch, qkv, frequencies, state.slice(), n_head, width, magnitude) }
}

/// What the experts of a layer are, and where their work goes.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the names of the kernels' parameters")]
pub struct ExpertsWork<'a> {
    pub n_expert: usize,
    pub n_used: usize,
    pub d_model: usize,
    pub d_ff: usize,
    /// `[n_tokens, n_expert]`.
    pub logits: View<'a, f32>,
    /// `[n_tokens, n_used]`, and so the next two.
    pub ids: View<'a, u32>,
    pub weights: View<'a, f32>,
    pub pairs: View<'a, u32>,
    /// [`expert_tiles_len`].
    pub tiles: View<'a, u32>,
    /// `[n_tokens · n_used, d_ff]`.
    pub h: View<'a, f32>,
    /// `[n_tokens · n_used, d_model]`.
    pub y: View<'a, f32>,
}

/// Words of the list of tiles for so many pairs of token and expert.
pub fn expert_tiles_len(n_pairs: usize, n_expert: usize) -> usize {
    (sort::n_tiles(n_pairs as u32, n_expert as u32) * sort::TILE_WORDS) as usize
}

/// Chooses each token's experts: f32 logits of all, the largest `n_used`, their softmax.
///
/// # Errors
///
/// Those of the launches.
pub fn route(
    launcher: &dyn Launcher,
    work: &ExpertsWork,
    x: View<f32>,
    weight: View<f32>,
    bias: Option<View<f32>>,
) -> Result<(), LaunchError> {
    let n_tokens = x.len() / work.d_model;
    assert_eq!(weight.len(), work.n_expert * work.d_model, "router length");
    assert!(bias.is_none_or(|bias| bias.len() == work.n_expert), "router bias length");
    assert_eq!(work.logits.len(), n_tokens * work.n_expert, "router logits length");
    assert_eq!((work.ids.len(), work.weights.len()), (n_tokens * work.n_used, work.ids.len()), "choices");
    let (t, d, e, n) = (n_tokens as u32, work.d_model as u32, work.n_expert as u32, work.n_used as u32);
    let (logits, bias) = (work.logits.slice(), optional(bias));
    // SAFETY: as in `embed`.
    unsafe {
        let launch = router::launch_logits(t, e);
        router::router_logits::run(launcher, launch, logits, weight.slice(), x.slice(), bias, t, d, e)?;
        router::router::run(launcher, router::launch(t), work.ids.slice(), work.weights.slice(), logits, t, e, n)
    }
}

/// The matrices of a layer's experts and their biases, `[n_expert, n_out]`.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "a format, matrices, biases")]
pub struct ExpertsMatrix<'a> {
    pub format: WeightFormat,
    pub packed: View<'a, u8>,
    pub bias: View<'a, f32>,
}

/// `out[t] += Σₛ weights[t, s] · down(swiglu(gate(x[t]), up(x[t])))` over the experts that [`route`] chose.
///
/// # Errors
///
/// Those of the launches.
pub fn experts(
    launcher: &dyn Launcher,
    work: &ExpertsWork,
    out: View<f32>,
    x: View<f32>,
    gate: ExpertsMatrix,
    up: ExpertsMatrix,
    down: ExpertsMatrix,
) -> Result<(), LaunchError> {
    let (n_pairs, n_tokens) = (work.ids.len(), x.len() / work.d_model);
    assert_eq!((out.len(), x.len(), n_pairs), (x.len(), n_tokens * work.d_model, n_tokens * work.n_used), "lengths");
    assert_eq!((work.h.len(), work.y.len()), (n_pairs * work.d_ff, n_pairs * work.d_model), "work lengths");
    assert_eq!((work.pairs.len(), work.tiles.len()), (n_pairs, expert_tiles_len(n_pairs, work.n_expert)), "lists");
    assert_eq!(gate.format, up.format, "one kernel reads gate and up; the plan refused what differs");
    let check = |matrix: ExpertsMatrix, n_in: usize, n_out: usize| {
        let bytes = work.n_expert * matrix.format.layout().planes(n_in, n_out).end;
        assert_eq!((matrix.packed.len(), matrix.bias.len()), (bytes, work.n_expert * n_out), "expert lengths");
    };
    check(gate, work.d_model, work.d_ff);
    check(up, work.d_model, work.d_ff);
    check(down, work.d_ff, work.d_model);
    let (first, second) = (gate.format, down.format);
    let (gate, up, down) = (
        (gate.packed.slice(), gate.bias.slice()),
        (up.packed.slice(), up.bias.slice()),
        (down.packed.slice(), down.bias.slice()),
    );
    let (d, f, e, n) = (work.d_model as u32, work.d_ff as u32, work.n_expert as u32, work.n_used as u32);
    let (out, x, h, y) = (out.slice(), x.slice(), work.h.slice(), work.y.slice());
    let (ids, weights, pairs, tiles) = (work.ids.slice(), work.weights.slice(), work.pairs.slice(), work.tiles.slice());
    // SAFETY: as in `embed`.
    unsafe {
        if n_tokens == 1 {
            one::run_gate_up(first, launcher, h, gate.0, up.0, gate.1, up.1, x, ids, d, f)?;
            return one::run_down(second, launcher, out, down.0, down.1, h, ids, weights, f, d);
        }
        sort::experts_sort::run(launcher, sort::launch(e), pairs, tiles, ids)?;
        many::run_gate_up(first, launcher, h, gate.0, up.0, gate.1, up.1, x, pairs, tiles, e, n, d, f)?;
        many::run_down(second, launcher, y, down.0, down.1, h, pairs, tiles, e, f, d)?;
        many::experts_combine::run(launcher, many::launch_combine(n_tokens as u32, d), out, y, weights, n, d)
    }
}

/// Candidates that [`argmax`] needs room for.
pub const ARGMAX_PARTS: usize = argmax_kernel::PARTS as usize;

/// The id of the largest logit into `token[0]`, and `state[0] += n_tokens`.
///
/// # Errors
///
/// Those of the launches.
pub fn argmax(
    launcher: &dyn Launcher,
    token: View<u32>,
    state: View<u32>,
    logits: View<f32>,
    best: (View<f32>, View<u32>),
    n_tokens: usize,
) -> Result<(), LaunchError> {
    assert!(!token.is_empty() && !state.is_empty(), "lengths");
    assert_eq!((best.0.len(), best.1.len()), (ARGMAX_PARTS, ARGMAX_PARTS), "candidates");
    let (best_logits, best_ids) = (best.0.slice(), best.1.slice());
    let (token, state, launch) = (token.slice(), state.slice(), argmax_kernel::launch());
    // SAFETY: as in `embed`.
    unsafe {
        argmax_kernel::argmax_parts::run(
            launcher,
            argmax_kernel::launch_parts(),
            best_logits,
            best_ids,
            logits.slice(),
        )?;
        argmax_kernel::argmax::run(launcher, launch, token, state, best_logits, best_ids, n_tokens as u32)
    }
}
