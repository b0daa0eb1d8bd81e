//! The operations of a forward pass: which kernel, with which geometry, on memory that is there and large enough.
//!
//! Each function checks the lengths its kernel's `# Safety` section asks for and then launches. Lengths that do not fit are
//! the engine's bug and panic; whatever a file or a user can cause was refused long before.

use cuda_std::{DeviceSlice, LaunchError, Launcher, f16};
use kernels::attention::token::{grouped, partial_len, single};
use kernels::attention::{kv_append, prefill, reciprocal};
use kernels::experts::{
    decode as one, grouped as grouped_experts, prefill as many, sort, token as token_experts,
    warpgroups as wide_experts,
};
use kernels::format::WeightFormat;
use kernels::{
    argmax as argmax_kernel, candidates, embed as embed_kernel, layer_norm as layer_norm_kernel, matmul, matvec,
    norm_rows, rms_norm as rms_norm_kernel, rope as rope_kernel, router,
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
    /// Positions the cache has room for. With a window it may be a ring: position i is in slot i mod `n_slots`.
    pub n_slots: usize,
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

    /// Whether the kernels of `token::grouped` serve it.
    fn runs_grouped(&self, cache: &Cache) -> bool {
        matches!(cache, Cache::F16 { .. }) && self.is_grouped()
    }

    /// Over how many blocks a decode step spreads the keys of a head, by the whole context: the launch is recorded once.
    fn n_splits(&self, grouped: bool) -> u32 {
        let n_keys = self.n_slots.min(self.window.unwrap_or(usize::MAX)) as u32 - 1;
        let (n_head, n_head_kv, d_head) = (self.n_head as u32, self.n_head_kv as u32, self.d_head as u32);
        match grouped {
            true => grouped::n_splits(n_keys, n_head, n_head_kv, d_head),
            false => single::n_splits(n_keys, n_head),
        }
    }
}

/// The KV cache of one layer: `[n_head_kv, n_slots, d_head]` each.
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
        assert_eq!((k, v), (shape.n_head_kv * shape.n_slots * shape.d_head, k), "cache lengths");
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
            let none = optional(None);
            matvec::run(format, launcher, out, weight, x, none, none, bias, 0.0, i, o, code)
        } else {
            matmul::run(format, launcher, out, weight, x, bias, t, i, o, code)
        }
    }
}

/// A matrix of weights, `[n_out, n_in]`.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "a format, its planes, a shape")]
pub struct LinearMatrix<'a> {
    pub format: WeightFormat,
    pub packed: View<'a, u8>,
    pub n_in: usize,
    pub n_out: usize,
}

/// How one token's products are cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// As fits a GPU of so many multiprocessors, on its tensor cores where they take the matrix: Q8_0 under an RMS norm or none.
    Multiprocessors(u32),
    /// Into so many blocks of one warp, without tensor cores; with a router as fits a GPU.
    Warps(u32),
}

impl LinearMatrix<'_> {
    /// The multiprocessors that stream this matrix through tensor cores, if they do.
    fn streams(&self, cut: Cut) -> Option<u32> {
        match cut {
            Cut::Multiprocessors(n) if self.format == WeightFormat::Q8_0 && matvec::stream::fits(self.n_in as u32) => {
                Some(n)
            }
            _ => None,
        }
    }
}

/// What is done to a vector before a matrix.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the names of the kernels' parameters")]
pub enum Norm<'a> {
    /// Root-mean-square normalization.
    Rms { gamma: View<'a, f32>, epsilon: f32 },
    /// Layer normalization.
    Layer { gamma: View<'a, f32>, beta: View<'a, f32>, epsilon: f32 },
}

/// The router of a mixture of experts that reads what [`linear_fused`] adds to.
#[derive(Clone, Copy)]
pub struct RouterParts<'a> {
    /// `[n_expert, n_out]`.
    pub weight: View<'a, f32>,
    /// The scale of the RMS norm before the router, `[n_out]`.
    pub gamma: View<'a, f32>,
    /// `[n_parts, n_expert + 1]`, `n_parts` of [`router_parts`]: what each part of the rows adds to the logits, short of the
    /// norm's division, and its sum of squares.
    pub parts: View<'a, f32>,
}

/// Whether [`linear_fused`] can normalize `n_in` elements, with a β if `has_beta`.
pub fn norm_fits(n_in: usize, has_beta: bool) -> bool {
    matvec::norm_fits(n_in as u32, has_beta)
}

/// Whether [`linear_fused`] can serve a router of `n_expert` experts beside a matrix of this shape.
pub fn router_fits(matrix: LinearMatrix, n_expert: usize, cut: Cut) -> bool {
    let (n_in, n_out, n_expert) = (matrix.n_in as u32, matrix.n_out as u32, n_expert as u32);
    match matrix.streams(cut) {
        Some(_) => n_expert > 0 && n_expert <= matvec::MAX_EXPERTS,
        None => matvec::router_fits(n_in, n_out, n_expert),
    }
}

/// Rows of [`RouterParts::parts`] for a matrix and so many experts: at most as many as the matrix has.
pub fn router_parts(matrix: LinearMatrix, n_expert: usize, cut: Cut) -> usize {
    let (n_in, n_out) = (matrix.n_in as u32, matrix.n_out as u32);
    match matrix.streams(cut) {
        Some(n_multiprocessors) => matvec::stream::n_parts(n_multiprocessors, n_in, n_out, n_expert as u32) as usize,
        None => matvec::n_parts(n_in, n_out) as usize,
    }
}

/// `out = epilogue(weight · norm(x) + bias)` for one token, in one launch, and with a router what its logits are made of.
///
/// The weights, γ, β, biases and the router must have been written before the launch before this one: they are read while
/// that one may still run.
///
/// # Errors
///
/// Those of the launch.
///
/// # Panics
///
/// If lengths do not fit, a norm does not ([`norm_fits`]), or a router does not ([`router_fits`]) or comes with a norm or an
/// epilogue other than [`Epilogue::Add`]: the caller's bugs.
pub fn linear_fused(
    launcher: &dyn Launcher,
    out: View<f32>,
    matrix: LinearMatrix,
    x: View<f32>,
    norm: Option<Norm>,
    bias: Option<View<f32>>,
    epilogue: Epilogue,
    router: Option<RouterParts>,
    cut: Cut,
) -> Result<(), LaunchError> {
    let LinearMatrix { format, packed, n_in, n_out } = matrix;
    let streams = matrix.streams(cut);
    assert_eq!((out.len(), x.len()), (n_out, n_in), "lengths");
    assert_eq!(packed.len(), format.layout().planes(n_in, n_out).end, "weight length");
    assert!(bias.is_none_or(|bias| bias.len() == n_out), "bias length");
    let (out, weight, x, bias) = (out.slice(), packed.slice(), x.slice(), optional(bias));
    let (i, o) = (n_in as u32, n_out as u32);
    if let Some(RouterParts { weight: router, gamma, parts }) = router {
        assert!(norm.is_none() && epilogue == Epilogue::Add, "a router follows the residual");
        assert_eq!(gamma.len(), n_out, "router norm length");
        let n_expert = router.len() / n_out;
        assert_eq!(router.len(), n_expert * n_out, "router length");
        assert_eq!(parts.len(), router_parts(matrix, n_expert, cut) * (n_expert + 1), "parts length");
        assert!(router_fits(matrix, n_expert, cut), "{n_expert} experts do not fit");
        let (router, gamma, parts, e) = (router.slice(), gamma.slice(), parts.slice(), n_expert as u32);
        // SAFETY: as in `embed`.
        return unsafe {
            match streams {
                Some(n) => matvec::stream::run_router(launcher, n, out, parts, weight, x, bias, router, gamma, i, o, e),
                None => matvec::run_router(format, launcher, out, parts, weight, x, bias, router, gamma, i, o, e),
            }
        };
    }
    let (gamma, beta, epsilon) = match norm {
        None => (None, None, 0.0),
        Some(Norm::Rms { gamma, epsilon }) => (Some(gamma), None, epsilon),
        Some(Norm::Layer { gamma, beta, epsilon }) => (Some(gamma), Some(beta), epsilon),
    };
    assert!(gamma.is_none_or(|gamma| gamma.len() == n_in), "norm length");
    assert!(beta.is_none_or(|beta| beta.len() == n_in), "norm shift length");
    assert!(norm.is_none() || norm_fits(n_in, beta.is_some()), "a norm of {n_in} elements does not fit");
    let streams = streams.filter(|_| beta.is_none());
    let (gamma, beta, code) = (optional(gamma), optional(beta), epilogue.code());
    // SAFETY: as in `embed`.
    unsafe {
        match (streams, cut) {
            (Some(n), _) => matvec::stream::run(launcher, n, out, weight, x, gamma, bias, epsilon, i, o, code),
            (None, Cut::Multiprocessors(_)) => {
                matvec::run(format, launcher, out, weight, x, gamma, beta, bias, epsilon, i, o, code)
            }
            (None, Cut::Warps(n_warps)) => {
                let geometry = matvec::launch_warps(o, n_warps);
                matvec::run_in(geometry, format, launcher, out, weight, x, gamma, beta, bias, epsilon, i, o, code)
            }
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
    /// Whether the device has warpgroups: they do what is wide enough.
    pub warpgroups: bool,
}

/// Elements that [`linear_rows`] needs in `partial` and `counters` for up to `max_tokens` tokens.
pub fn rows_work_lens(max_tokens: usize, n_in: usize, n_out: usize) -> (usize, usize) {
    let lens = |(n_tokens, warpgroups)| {
        let plan = matmul::rows::Plan::new(n_tokens as u32, n_in as u32, n_out as u32, warpgroups);
        (plan.partial_len(), plan.counters_len())
    };
    // A plan of memory is for any device.
    (1..=max_tokens)
        .flat_map(|n| [(n, false), (n, true)])
        .map(lens)
        .fold((0, 0), |(p, c), (partial, counters)| (p.max(partial), c.max(counters)))
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
    let plan = matmul::rows::Plan::new(n_tokens as u32, n_in as u32, n_out as u32, work.warpgroups);
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
    let (d, s, w) = (shape.d_head as u32, shape.n_slots as u32, shape.window.unwrap_or(0) as u32);
    let (qkv, state) = (qkv.slice(), state.slice());
    // SAFETY: as in `embed`.
    unsafe {
        match cache {
            Cache::F16 { k, v } => {
                kv_append::kv_append_f16::run(launcher, launch, k.slice(), v.slice(), qkv, state, t, h, hkv, d, s, w)
            }
            Cache::F32 { k, v } => {
                kv_append::kv_append_f32::run(launcher, launch, k.slice(), v.slice(), qkv, state, t, h, hkv, d, s, w)
            }
        }
    }
}

/// Where [`attention`] writes, `[n_tokens, n_head d_head]`.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the element type; f16 is NaN where it cannot hold the value")]
pub enum AttentionOut<'a> {
    F32(View<'a, f32>),
    F16(View<'a, f16>),
}

/// Attends from each of `n_tokens` tokens in `qkv` to the cache, which holds their own keys already.
///
/// # Errors
///
/// Those of the launch.
pub fn attention(
    launcher: &dyn Launcher,
    out: AttentionOut,
    qkv: View<f32>,
    cache: Cache,
    state: View<u32>,
    sinks: Option<View<f32>>,
    shape: AttentionShape,
    n_tokens: usize,
) -> Result<(), LaunchError> {
    cache.assert_holds(shape);
    assert!(sinks.is_none_or(|sinks| sinks.len() == shape.n_head), "sinks length");
    assert_eq!(qkv.len(), n_tokens * shape.qkv_width(), "qkv length");
    assert!(shape.d_head.is_multiple_of(8) && shape.d_head <= 128, "head width");
    let (t, h, hkv) = (n_tokens as u32, shape.n_head as u32, shape.n_head_kv as u32);
    let (d, s, scale) = (shape.d_head as u32, shape.n_slots as u32, shape.scale);
    let (out, out16) = match out {
        AttentionOut::F32(out) => (out.slice(), DeviceSlice::new(0, 0)),
        AttentionOut::F16(out) => (DeviceSlice::new(0, 0), out.slice()),
    };
    assert_eq!(out.len() + out16.len(), n_tokens * shape.q_width(), "output length");
    let (qkv, state) = (qkv.slice(), state.slice());
    let (sinks, window) = (optional(sinks), shape.window.unwrap_or(0) as u32);
    // SAFETY: as in `embed`.
    unsafe {
        match cache {
            Cache::F16 { k, v } => {
                let kernel = match d {
                    ..=64 => prefill::attention_prefill_f16_64::run,
                    _ => prefill::attention_prefill_f16_128::run,
                };
                let (launch, k, v) = (prefill::launch_f16(t, h), k.slice(), v.slice());
                kernel(launcher, launch, out, out16, qkv, k, v, state, sinks, t, h, hkv, d, s, window, scale)
            }
            Cache::F32 { k, v } => {
                let kernel = match d {
                    ..=32 => prefill::attention_prefill_f32_32::run,
                    33..=64 => prefill::attention_prefill_f32_64::run,
                    _ => prefill::attention_prefill_f32_128::run,
                };
                let (launch, k, v) = (prefill::launch_f32(t, h), k.slice(), v.slice());
                kernel(launcher, launch, out, out16, qkv, k, v, state, sinks, t, h, hkv, d, s, window, scale)
            }
        }
    }
}

/// How a model turns queries and keys.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    /// Of [`kernels::rope::frequency`], `[d_head / 2]`.
    pub frequencies: View<'a, u64>,
    /// What turned vectors are multiplied by.
    pub magnitude: f32,
}

/// What [`attention_token`] keeps between its blocks. All layers may share it, one after the other.
#[derive(Clone, Copy)]
pub struct TokenWork<'a> {
    /// At least [`attention_partial_len`] elements, whose contents do not matter.
    pub partial: View<'a, f32>,
    /// At least [`attention_counters_len`] elements: zero before the first launch, and again after each.
    pub counters: View<'a, u32>,
}

/// Elements that [`attention_token`] needs in [`TokenWork::partial`].
pub fn attention_partial_len(shape: AttentionShape) -> usize {
    let len = |grouped| partial_len(shape.n_head as u32, shape.d_head as u32, shape.n_splits(grouped));
    len(true).max(len(false))
}

/// Elements that [`attention_token`] needs in [`TokenWork::counters`].
pub fn attention_counters_len(shape: AttentionShape) -> usize {
    shape.n_head
}

/// One token's attention in one launch: turns queries and key, puts key and value into the cache, attends.
///
/// # Errors
///
/// Those of the launch.
pub fn attention_token(
    launcher: &dyn Launcher,
    out: View<f32>,
    qkv: View<f32>,
    cache: Cache,
    state: View<u32>,
    rotation: Option<Rotation>,
    sinks: Option<View<f32>>,
    work: TokenWork,
    shape: AttentionShape,
) -> Result<(), LaunchError> {
    cache.assert_holds(shape);
    assert!(sinks.is_none_or(|sinks| sinks.len() == shape.n_head), "sinks length");
    assert!(rotation.is_none_or(|rotation| 2 * rotation.frequencies.len() == shape.d_head), "frequencies");
    assert_eq!((qkv.len(), out.len()), (shape.qkv_width(), shape.q_width()), "lengths");
    assert!(work.partial.len() >= attention_partial_len(shape), "partial length");
    assert!(work.counters.len() >= attention_counters_len(shape), "counters");
    assert!(shape.d_head.is_multiple_of(8) && shape.d_head <= 128, "head width");
    let (h, hkv, d) = (shape.n_head as u32, shape.n_head_kv as u32, shape.d_head as u32);
    let (s, scale, window) = (shape.n_slots as u32, shape.scale, shape.window.unwrap_or(0) as u32);
    let (out, qkv, state, sinks) = (out.slice(), qkv.slice(), state.slice(), optional(sinks));
    let (partial, counters) = (work.partial.slice(), work.counters.slice());
    let (f, magnitude) = rotation.map_or((DeviceSlice::new(0, 0), 1.0), |r| (r.frequencies.slice(), r.magnitude));
    let is_grouped = shape.runs_grouped(&cache);
    let launch = match is_grouped {
        true => grouped::launch(h, hkv, d, shape.n_splits(true)),
        false => single::launch(h, shape.n_splits(false)),
    };
    // SAFETY: as in `embed`; the row that is written by the one name of a cache is read by neither.
    unsafe {
        match cache {
            Cache::F16 { k, v } => {
                let kernel = match (is_grouped, d) {
                    (true, ..=64) => grouped::attention_token_grouped_f16_64::run,
                    (true, _) => grouped::attention_token_grouped_f16_128::run,
                    (false, ..=32) => single::attention_token_f16_32::run,
                    (false, 33..=64) => single::attention_token_f16_64::run,
                    (false, _) => single::attention_token_f16_128::run,
                };
                let (k, v) = (k.slice(), v.slice());
                kernel(
                    launcher,
                    launch,
                    out,
                    partial,
                    counters,
                    qkv,
                    k,
                    v,
                    k,
                    v,
                    state,
                    f,
                    sinks,
                    hkv,
                    d,
                    s,
                    reciprocal(s),
                    window,
                    scale,
                    magnitude,
                )
            }
            Cache::F32 { k, v } => {
                let kernel = match d {
                    ..=32 => single::attention_token_f32_32::run,
                    33..=64 => single::attention_token_f32_64::run,
                    _ => single::attention_token_f32_128::run,
                };
                let (k, v) = (k.slice(), v.slice());
                kernel(
                    launcher,
                    launch,
                    out,
                    partial,
                    counters,
                    qkv,
                    k,
                    v,
                    k,
                    v,
                    state,
                    f,
                    sinks,
                    hkv,
                    d,
                    s,
                    reciprocal(s),
                    window,
                    scale,
                    magnitude,
                )
            }
        }
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

/// Turns the query and key heads in `qkv` by their positions.
///
/// # Errors
///
/// Those of the launch.
pub fn rope(
    launcher: &dyn Launcher,
    qkv: View<f32>,
    rotation: Rotation,
    state: View<u32>,
    shape: AttentionShape,
    n_tokens: usize,
) -> Result<(), LaunchError> {
    let Rotation { frequencies, magnitude } = rotation;
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

/// Words of the list of tiles for so many pairs of token and expert: enough for [`experts`] and [`experts_rows`].
pub fn expert_tiles_len(n_pairs: usize, n_expert: usize) -> usize {
    tiles_len(n_pairs, n_expert, many::TILE_PAIRS.min(grouped_experts::TILE_PAIRS))
}

fn tiles_len(n_pairs: usize, n_expert: usize, tile_pairs: u32) -> usize {
    (sort::n_tiles(n_pairs as u32, n_expert as u32, tile_pairs) * sort::TILE_WORDS) as usize
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
        let tiles = tiles.slice(0..tiles_len(n_pairs, work.n_expert, many::TILE_PAIRS));
        sort::experts_sort::run(launcher, sort::launch(e), pairs, tiles, ids, many::TILE_PAIRS)?;
        many::run_gate_up(first, launcher, h, gate.0, up.0, gate.1, up.1, x, pairs, tiles, e, n, d, f)?;
        many::run_down(second, launcher, y, down.0, down.1, h, pairs, tiles, e, f, d)?;
        many::experts_combine::run(launcher, many::launch_combine(n_tokens as u32, d), out, y, weights, n, d)
    }
}

/// Whether [`experts_rows`] takes experts of these formats and widths.
pub fn experts_rows_take(first: WeightFormat, second: WeightFormat, d_model: usize, d_ff: usize) -> bool {
    first == WeightFormat::Mxfp4 && second == first && d_model.max(d_ff) <= grouped_experts::MAX_IN as usize
}

/// So many pairs an expert make tiles that are worth a warpgroup's while: with fewer the other kernels were faster on an H200.
pub const WARPGROUP_PAIRS: usize = 32;

/// What the experts of a layer are, and where the work of [`experts_rows`] goes.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the names of the kernels' parameters")]
pub struct ExpertsRowsWork<'a> {
    pub n_expert: usize,
    pub n_used: usize,
    pub d_model: usize,
    pub d_ff: usize,
    /// From how many pairs an expert has on average the kernels for warpgroups do it, if the device runs them.
    pub warpgroup_pairs: Option<usize>,
    /// `[n_tokens, n_used]`, and so the next two: the choices of [`route`].
    pub ids: View<'a, u32>,
    pub weights: View<'a, f32>,
    pub pairs: View<'a, u32>,
    /// [`expert_tiles_len`].
    pub tiles: View<'a, u32>,
    /// `[n_tokens · n_used, d_ff]`.
    pub h: View<'a, f16>,
    /// `[n_tokens · n_used, d_model]`.
    pub y: View<'a, f32>,
}

/// `out[t] += Σₛ weights[t, s] · down(swiglu(gate(r[t] x[t]), up(r[t] x[t])))` for activations in f16, r being `row_factor`
/// or 1. For formats and widths that [`experts_rows_take`] names.
///
/// # Errors
///
/// Those of the launches.
#[allow(clippy::too_many_arguments, reason = "what goes in and what comes out")]
pub fn experts_rows(
    launcher: &dyn Launcher,
    work: &ExpertsRowsWork,
    out: View<f32>,
    x: View<f16>,
    row_factor: Option<View<f32>>,
    gate: ExpertsMatrix,
    up: ExpertsMatrix,
    down: ExpertsMatrix,
) -> Result<(), LaunchError> {
    let (n_pairs, n_tokens) = (work.ids.len(), x.len() / work.d_model);
    assert_eq!((out.len(), x.len(), n_pairs), (x.len(), n_tokens * work.d_model, n_tokens * work.n_used), "lengths");
    assert!(row_factor.is_none_or(|factor| factor.len() == n_tokens), "row factors");
    assert_eq!((work.h.len(), work.y.len()), (n_pairs * work.d_ff, n_pairs * work.d_model), "work lengths");
    let wide = work.warpgroup_pairs.is_some_and(|n| n_pairs >= n * work.n_expert);
    let tile_pairs = if wide { wide_experts::TILE_PAIRS } else { grouped_experts::TILE_PAIRS };
    let tiles_len = tiles_len(n_pairs, work.n_expert, tile_pairs);
    assert_eq!((work.weights.len(), work.pairs.len()), (n_pairs, n_pairs), "lists");
    assert!(work.tiles.len() >= tiles_len, "tiles");
    assert!(
        experts_rows_take(gate.format, down.format, work.d_model, work.d_ff) && up.format == gate.format,
        "formats"
    );
    let check = |matrix: ExpertsMatrix, n_in: usize, n_out: usize| {
        let bytes = work.n_expert * matrix.format.layout().planes(n_in, n_out).end;
        assert_eq!((matrix.packed.len(), matrix.bias.len()), (bytes, work.n_expert * n_out), "expert lengths");
    };
    check(gate, work.d_model, work.d_ff);
    check(up, work.d_model, work.d_ff);
    check(down, work.d_ff, work.d_model);
    let (gate, up, down) = (
        (gate.packed.slice(), gate.bias.slice()),
        (up.packed.slice(), up.bias.slice()),
        (down.packed.slice(), down.bias.slice()),
    );
    let (d, f, e, n) = (work.d_model as u32, work.d_ff as u32, work.n_expert as u32, work.n_used as u32);
    let (out, x, h, y) = (out.slice(), x.slice(), work.h.slice(), work.y.slice());
    let (ids, weights, pairs) = (work.ids.slice(), work.weights.slice(), work.pairs.slice());
    let (tiles, factor) = (work.tiles.slice().slice(0..tiles_len), optional(row_factor));
    // SAFETY: as in `embed`.
    unsafe {
        sort::experts_sort::run(launcher, sort::launch(e), pairs, tiles, ids, tile_pairs)?;
        if wide {
            wide_experts::run_gate_up(launcher, h, gate.0, up.0, gate.1, up.1, x, factor, pairs, tiles, n, d, f)?;
            wide_experts::run_down(launcher, y, down.0, down.1, h, pairs, tiles, f, d)?;
        } else {
            grouped_experts::run_gate_up(launcher, h, gate.0, up.0, gate.1, up.1, x, factor, pairs, tiles, n, d, f)?;
            grouped_experts::run_down(launcher, y, down.0, down.1, h, pairs, tiles, f, d)?;
        }
        many::experts_combine::run(launcher, many::launch_combine(n_tokens as u32, d), out, y, weights, n, d)
    }
}

/// What ends a router whose logits [`linear_fused`] began.
#[derive(Clone, Copy)]
pub struct RouterFinish<'a> {
    /// `[n_parts, n_expert + 1]`, of [`RouterParts`].
    pub parts: View<'a, f32>,
    /// The scale of the RMS norm before router and experts, `[d_model]`.
    pub gamma: View<'a, f32>,
    /// `[n_expert]`.
    pub bias: Option<View<'a, f32>>,
    /// Of the norm.
    pub epsilon: f32,
}

/// One token's experts, and where their work goes.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the names of the kernels' parameters")]
pub struct TokenExperts<'a> {
    /// Blocks to deal the work out to; results do not depend on it.
    pub n_blocks: u32,
    pub n_expert: usize,
    pub d_model: usize,
    pub d_ff: usize,
    /// `[n_used]`, and so the next.
    pub ids: View<'a, u32>,
    pub weights: View<'a, f32>,
    /// `[n_used, d_ff / 2]`, of two f16 each.
    pub h: View<'a, u32>,
}

/// Whether [`experts_token`] can run a layer of these sizes.
pub fn experts_token_fits(n_expert: usize, n_used: usize, d_model: usize, d_ff: usize) -> bool {
    token_experts::fits(n_expert as u32, n_used as u32, d_model as u32, d_ff as u32)
}

/// Chooses one token's experts and adds what they make of its norm to `x`, in two launches. All matrices are MXFP4.
///
/// # Errors
///
/// Those of the launches.
///
/// # Panics
///
/// If lengths do not fit, a matrix is of another type, or the sizes do not fit ([`experts_token_fits`]).
pub fn experts_token(
    launcher: &dyn Launcher,
    token: &TokenExperts,
    x: View<f32>,
    router: RouterFinish,
    gate: ExpertsMatrix,
    up: ExpertsMatrix,
    down: ExpertsMatrix,
) -> Result<(), LaunchError> {
    let &TokenExperts { n_expert, d_model, d_ff, .. } = token;
    let n_used = token.ids.len();
    assert!(experts_token_fits(n_expert, n_used, d_model, d_ff), "sizes");
    assert_eq!((x.len(), router.gamma.len()), (d_model, d_model), "lengths");
    assert_eq!((token.weights.len(), token.h.len()), (n_used, n_used * d_ff / 2), "work lengths");
    assert!(router.bias.is_none_or(|bias| bias.len() == n_expert), "router bias length");
    let n_parts = router.parts.len() / (n_expert + 1);
    assert_eq!(router.parts.len(), n_parts * (n_expert + 1), "parts length");
    let check = |matrix: ExpertsMatrix, n_in: usize, n_out: usize| {
        assert_eq!(matrix.format, WeightFormat::Mxfp4, "type");
        let bytes = n_expert * matrix.format.layout().planes(n_in, n_out).end;
        assert_eq!((matrix.packed.len(), matrix.bias.len()), (bytes, n_expert * n_out), "expert lengths");
    };
    check(gate, d_model, d_ff);
    check(up, d_model, d_ff);
    check(down, d_ff, d_model);
    let (h, ids, weights) = (token.h.slice(), token.ids.slice(), token.weights.slice());
    let (x, gamma, parts, bias) = (x.slice(), router.gamma.slice(), router.parts.slice(), optional(router.bias));
    let (d, f, p, epsilon) = (d_model as u32, d_ff as u32, n_parts as u32, router.epsilon);
    let (gate, gate_bias) = (gate.packed.slice(), gate.bias.slice());
    let (up, up_bias) = (up.packed.slice(), up.bias.slice());
    let (down, down_bias) = (down.packed.slice(), down.bias.slice());
    // SAFETY: as in `embed`; `gamma` and the router's bias are weights.
    unsafe {
        token_experts::run_gate_up(
            launcher,
            token.n_blocks,
            h,
            ids,
            weights,
            gate,
            up,
            gate_bias,
            up_bias,
            x,
            gamma,
            parts,
            bias,
            epsilon,
            d,
            f,
            p,
        )?;
        token_experts::run_down(launcher, token.n_blocks, x, down, down_bias, h, ids, weights, f, d)
    }
}

/// Candidates that [`likeliest`] gives for so many logits.
pub fn n_likeliest(n_vocab: usize) -> usize {
    (candidates::n_parts(n_vocab as u32) * candidates::KEPT) as usize
}

/// How many candidates [`likeliest`] gives of each part.
pub const LIKELIEST_PER_PART: usize = candidates::KEPT as usize;

/// The 64 largest of each part of the logits, and their ids.
///
/// # Errors
///
/// Those of the launch.
pub fn likeliest(
    launcher: &dyn Launcher,
    values: View<f32>,
    ids: View<u32>,
    logits: View<f32>,
) -> Result<(), LaunchError> {
    let n = n_likeliest(logits.len());
    assert_eq!((values.len(), ids.len()), (n, n), "candidates");
    let launch = candidates::launch(logits.len() as u32);
    // SAFETY: as in `embed`.
    unsafe { candidates::likeliest::run(launcher, launch, values.slice(), ids.slice(), logits.slice()) }
}

/// Candidates that [`argmax`] needs room for.
pub const ARGMAX_PARTS: usize = argmax_kernel::PARTS as usize;

/// Where [`argmax`] works.
#[derive(Clone, Copy)]
pub struct ArgmaxWork<'a> {
    /// `[ARGMAX_PARTS]`.
    pub best_logits: View<'a, f32>,
    /// `[ARGMAX_PARTS]`.
    pub best_ids: View<'a, u32>,
    /// `[1]`, set to 0 before the first launch; every launch leaves it so.
    pub arrived: View<'a, u32>,
}

/// The id of the largest logit into `token[0]`, and `state[0] += n_tokens`.
///
/// # Errors
///
/// Those of the launch.
pub fn argmax(
    launcher: &dyn Launcher,
    token: View<u32>,
    state: View<u32>,
    logits: View<f32>,
    work: ArgmaxWork,
    n_tokens: usize,
) -> Result<(), LaunchError> {
    assert!(!token.is_empty() && !state.is_empty(), "lengths");
    assert_eq!((work.best_logits.len(), work.best_ids.len()), (ARGMAX_PARTS, ARGMAX_PARTS), "candidates");
    assert!(!work.arrived.is_empty(), "counter");
    let launch = argmax_kernel::launch(logits.len() as u32);
    let (best_logits, best_ids, arrived) = (work.best_logits.slice(), work.best_ids.slice(), work.arrived.slice());
    let (token, state, logits, n) = (token.slice(), state.slice(), logits.slice(), n_tokens as u32);
    // SAFETY: as in `embed`.
    unsafe { argmax_kernel::argmax::run(launcher, launch, token, state, best_logits, best_ids, arrived, logits, n) }
}
