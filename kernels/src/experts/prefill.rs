//! Many tokens through their experts, as in prefill: tensor cores.

use super::sort::Job;
#[cfg(not(target_arch = "nvptx64"))]
use super::sort::n_tiles;
use super::{bias_of, place};
#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use crate::matmul::{
    Ahead, Share, THREADS, TILE_ROWS, Tiles, WEIGHT_HALVES, WEIGHT_POWERS, WEIGHT_THREADS, X_HALVES, X_POWERS, X_QUADS,
    multiply,
};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, f16, kernel, shared_array, thread};

/// The widest tile of pairs: what [`experts_sort`](super::sort::experts_sort()) is to cut for these kernels.
pub const TILE_PAIRS: u32 = crate::matmul::TILE_TOKENS;
/// Features of a block of `experts_prefill_gate_up_*`: half of its rows are of `gate`, half of `up`.
const TILE_FEATURES: u32 = TILE_ROWS / 2;
const COMBINE_THREADS: u32 = 256;

/// The one geometry `experts_prefill_gate_up_*` is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_gate_up(n_pairs: u32, n_expert: u32, d_ff: u32) -> Launch {
    let grid = [d_ff.div_ceil(TILE_FEATURES), n_tiles(n_pairs, n_expert, TILE_PAIRS), 1];
    Launch { grid, block: [WARP_SIZE, THREADS / WARP_SIZE, 1] }
}

/// The one geometry `experts_prefill_down_*` is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_pairs: u32, n_expert: u32, d_model: u32) -> Launch {
    let grid = [d_model.div_ceil(TILE_ROWS), n_tiles(n_pairs, n_expert, TILE_PAIRS), 1];
    Launch { grid, block: [WARP_SIZE, THREADS / WARP_SIZE, 1] }
}

/// The one geometry [`experts_combine`](fn@experts_combine) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_combine(n_tokens: u32, d_model: u32) -> Launch {
    Launch { grid: [d_model.div_ceil(4 * COMBINE_THREADS), n_tokens, 1], block: [COMBINE_THREADS, 1, 1] }
}

macro_rules! kernels {
    ($($gate_up:ident, $down:ident: $format:ident, $blocks_per_sm:literal;)+) => {
        $(
            #[doc = concat!("The first half of experts of type ", stringify!($format), ", with the gated unit, for many tokens.")]
            ///
            /// - Math: for each place i of the sorted list, of token `t = pairs[i] / n_used` and expert e: `h[i, f] =
            ///   swiglu(gateₑ[f] · x[t] + gate_bias[e, f], upₑ[f] · x[t] + up_bias[e, f])`, swiglu being
            ///   [`swiglu::activation`]. Products as in [`crate::matmul`].
            /// - Shapes: `h`: `[n_pairs, d_ff]`; `gate`, `up`: `[n_expert, d_ff, d_model]`, each expert in its format's
            ///   planes; `gate_bias`, `up_bias`: `[n_expert, d_ff]`, or empty; `x`: `[n_tokens, d_model]`, from a multiple of
            ///   16 bytes on; `pairs`, `tiles`: those of [`experts_sort`](super::sort::experts_sort()) for tiles of [`TILE_PAIRS`].
            /// - Launch: [`launch_gate_up`]`(n_pairs, n_expert, d_ff)`. A block owns 64 features and a tile of up to 64
            ///   places, or returns if its tile has none. A warp has 16 rows of `gate`, the same of `up`, and 32 places.
            /// - Shared memory: 31.5 KiB, two tiles of each operand; one barrier a step of 32 elements.
            /// - Cost: `4 · n_pairs · d_ff · d_model` operations.
            /// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a step themselves.
            /// - Source: [`crate::matmul`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `d_model` is a multiple of the format's block.
            #[kernel(threads = THREADS, blocks_per_sm = $blocks_per_sm)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $gate_up(
                h: Disjoint<f32>,
                gate: Global<u8>,
                up: Global<u8>,
                gate_bias: Global<f32>,
                up_bias: Global<f32>,
                x: Global<f32>,
                pairs: Global<u32>,
                tiles: Global<u32>,
                n_used: u32,
                d_model: u32,
                d_ff: u32,
            ) {
                let biases = [gate_bias, up_bias];
                // SAFETY: the launch contract is this kernel's own.
                unsafe { gate_up::<format::$format>(h, gate, up, biases, x, pairs, tiles, n_used, d_model, d_ff) }
            }

            #[doc = concat!("The second half of experts of type ", stringify!($format), ", for many tokens.")]
            ///
            /// - Math: for each place i of the sorted list, of expert e: `y[pairs[i], o] = downₑ[o] · h[i] + bias[e, o]`.
            ///   Products as in [`crate::matmul`].
            /// - Shapes: `y`: `[n_pairs, d_model]`; `weight`: `[n_expert, d_model, d_ff]`, each expert in its format's planes;
            ///   `bias`: `[n_expert, d_model]`, or empty; `h`: `[n_pairs, d_ff]`, from a multiple of 16 bytes on; `pairs`,
            ///   `tiles`: those of [`experts_sort`](super::sort::experts_sort()) for tiles of [`TILE_PAIRS`].
            /// - Launch: [`launch_down`]`(n_pairs, n_expert, d_model)`. A block owns 128 rows and a tile of up to 64 places, or
            ///   returns if its tile has none.
            /// - Shared memory: 31.5 KiB, two tiles of each operand; one barrier a step of 32 elements.
            /// - Cost: `2 · n_pairs · d_ff · d_model` operations.
            /// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a step themselves.
            /// - Source: [`crate::matmul`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `d_ff` is a multiple of the format's block.
            #[kernel(threads = THREADS, blocks_per_sm = $blocks_per_sm)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $down(
                y: Disjoint<f32>,
                weight: Global<u8>,
                bias: Global<f32>,
                h: Global<f32>,
                pairs: Global<u32>,
                tiles: Global<u32>,
                d_ff: u32,
                d_model: u32,
            ) {
                // SAFETY: the launch contract is this kernel's own.
                unsafe { down::<format::$format>(y, weight, bias, h, pairs, tiles, d_ff, d_model) }
            }
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[experts_combine::ENTRY, $($gate_up::ENTRY, $down::ENTRY),+];

        /// Starts `experts_prefill_gate_up_*` for `format`.
        ///
        /// # Errors
        ///
        /// Those of [`Launcher::launch`].
        ///
        /// # Safety
        ///
        /// Those of the kernel.
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
        pub unsafe fn run_gate_up(
            format: WeightFormat,
            launcher: &dyn Launcher,
            h: DeviceSlice<f32>,
            gate: DeviceSlice<u8>,
            up: DeviceSlice<u8>,
            gate_bias: DeviceSlice<f32>,
            up_bias: DeviceSlice<f32>,
            x: DeviceSlice<f32>,
            pairs: DeviceSlice<u32>,
            tiles: DeviceSlice<u32>,
            n_expert: u32,
            n_used: u32,
            d_model: u32,
            d_ff: u32,
        ) -> Result<(), LaunchError> {
            let launch = launch_gate_up(pairs.len() as u32, n_expert, d_ff);
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => $gate_up::run(
                        launcher, launch, h, gate, up, gate_bias, up_bias, x, pairs, tiles, n_used, d_model, d_ff,
                    ),)+
                }
            }
        }

        /// Starts `experts_prefill_down_*` for `format`.
        ///
        /// # Errors
        ///
        /// Those of [`Launcher::launch`].
        ///
        /// # Safety
        ///
        /// Those of the kernel.
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
        pub unsafe fn run_down(
            format: WeightFormat,
            launcher: &dyn Launcher,
            y: DeviceSlice<f32>,
            weight: DeviceSlice<u8>,
            bias: DeviceSlice<f32>,
            h: DeviceSlice<f32>,
            pairs: DeviceSlice<u32>,
            tiles: DeviceSlice<u32>,
            n_expert: u32,
            d_ff: u32,
            d_model: u32,
        ) -> Result<(), LaunchError> {
            let launch = launch_down(pairs.len() as u32, n_expert, d_model);
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        $down::run(launcher, launch, y, weight, bias, h, pairs, tiles, d_ff, d_model)
                    })+
                }
            }
        }
    };
}

kernels! {
    experts_prefill_gate_up_f32, experts_prefill_down_f32: F32, 1;
    experts_prefill_gate_up_f16, experts_prefill_down_f16: F16, 1;
    experts_prefill_gate_up_bf16, experts_prefill_down_bf16: Bf16, 1;
    experts_prefill_gate_up_q4_0, experts_prefill_down_q4_0: Q4_0, 2;
    experts_prefill_gate_up_q4_1, experts_prefill_down_q4_1: Q4_1, 2;
    experts_prefill_gate_up_q5_0, experts_prefill_down_q5_0: Q5_0, 2;
    experts_prefill_gate_up_q5_1, experts_prefill_down_q5_1: Q5_1, 2;
    experts_prefill_gate_up_q8_0, experts_prefill_down_q8_0: Q8_0, 2;
    experts_prefill_gate_up_q2_k, experts_prefill_down_q2_k: Q2K, 2;
    experts_prefill_gate_up_q3_k, experts_prefill_down_q3_k: Q3K, 2;
    experts_prefill_gate_up_q4_k, experts_prefill_down_q4_k: Q4K, 2;
    experts_prefill_gate_up_q5_k, experts_prefill_down_q5_k: Q5K, 2;
    experts_prefill_gate_up_q6_k, experts_prefill_down_q6_k: Q6K, 1;
    experts_prefill_gate_up_mxfp4, experts_prefill_down_mxfp4: Mxfp4, 2;
}

/// Adds to each token what its experts say, by weight.
///
/// - Math: `out[t, o] ← out[t, o] + Σₛ weights[t, s] · y[t · n_used + s, o]`.
/// - Shapes: `out`: `[n_tokens, d_model]`; `y`: `[n_tokens · n_used, d_model]`; `weights`: `[n_tokens, n_used]`. d_model is a
///   multiple of 4; `out` and `y` start at multiples of 16 bytes.
/// - Launch: [`launch_combine`]`(n_tokens, d_model)`, a thread four elements.
/// - Shared memory: none, and no barrier.
/// - Cost: memory bound, `4 · (n_used + 2)` bytes an element of `out`.
/// - Determinism: slots in rising order; devices contract `a · b + c`.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = COMBINE_THREADS, blocks_per_sm = 4)]
pub unsafe fn experts_combine(out: Disjoint<f32>, y: Global<f32>, weights: Global<f32>, n_used: u32, d_model: u32) {
    let (t, d) = (thread::block_idx_y() as usize, d_model as usize);
    let o = 4 * (thread::block_idx_x() * COMBINE_THREADS + thread::thread_idx_x()) as usize;
    if o >= d {
        return;
    }
    let n_used = n_used as usize;
    let mut total = [0.0; 4];
    let mut s = 0;
    while s < n_used {
        let weight = weights[t * n_used + s];
        // SAFETY: rows are whole quads, from multiples of 16 bytes on.
        let y = unsafe { y.load16((t * n_used + s) * d + o) }.map(f32::from_bits);
        total =
            [total[0] + weight * y[0], total[1] + weight * y[1], total[2] + weight * y[2], total[3] + weight * y[3]];
        s += 1;
    }
    // SAFETY: as above; these elements are this thread's alone.
    unsafe {
        let x = out.load16(t * d + o).map(f32::from_bits);
        let sum = [x[0] + total[0], x[1] + total[1], x[2] + total[2], x[3] + total[3]];
        out.store16(t * d + o, sum.map(f32::to_bits));
    }
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' own")]
unsafe fn gate_up<F: Format>(
    h: Disjoint<f32>,
    gate: Global<u8>,
    up: Global<u8>,
    [gate_bias, up_bias]: [Global<f32>; 2],
    x: Global<f32>,
    pairs: Global<u32>,
    tiles: Global<u32>,
    n_used: u32,
    d_model: u32,
    d_ff: u32,
) {
    let Some(job) = Job::of_block(tiles) else {
        return;
    };
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    let thread = warp_idx * WARP_SIZE + lane;
    let first_feature = thread::block_idx_x() * TILE_FEATURES;

    // Rows of a tile: 16 features of `gate`, the same 16 of `up`, and so on; a warp's first fragment is then `gate`, its
    // second `up`, and a lane has both for each of its features.
    let (block, is_up, row) = (thread / 32, thread / 16 % 2 == 1, thread % 16);
    // Features past the last repeat it: their products are never written.
    let row = (first_feature + block * 16 + row).min(d_ff - 1);
    // SAFETY: the expert exists.
    let matrix = unsafe { place::<F>(if is_up { up } else { gate }, job.expert, d_model, d_ff) };
    let token = |place: u32| pairs[place as usize] / n_used.max(1);
    // SAFETY: the whole block is here, since it has one job; row and tokens exist.
    let sums = unsafe { products::<F>(job, &matrix, row, x, token) };

    let mut half = 0;
    while half < 2 {
        let f = first_feature + warp_idx % 4 * 16 + 8 * half as u32 + lane / 4;
        if f < d_ff {
            let gate_bias = bias_of(gate_bias, job.expert, d_ff, f);
            let up_bias = bias_of(up_bias, job.expert, d_ff, f);
            let mut n = 0;
            while n < 8 {
                let i = place_in_tile(warp_idx, lane, n);
                if i < job.count {
                    let gate = sums[0][n / 2][half * 2 + n % 2] + gate_bias;
                    let up = sums[1][n / 2][half * 2 + n % 2] + up_bias;
                    let at = (job.first + i) as usize * d_ff as usize + f as usize;
                    // SAFETY: element (first + i, f) is this lane's alone.
                    unsafe { h.write(at, swiglu::activation(gate, up)) };
                }
                n += 1;
            }
        }
        half += 1;
    }
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' own")]
unsafe fn down<F: Format>(
    y: Disjoint<f32>,
    weight: Global<u8>,
    bias: Global<f32>,
    h: Global<f32>,
    pairs: Global<u32>,
    tiles: Global<u32>,
    d_ff: u32,
    d_model: u32,
) {
    let Some(job) = Job::of_block(tiles) else {
        return;
    };
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    let first_row = thread::block_idx_x() * TILE_ROWS;
    // Rows past the last repeat it: their products are never written. Threads from 128 on bring `h`.
    let row = (first_row + warp_idx * WARP_SIZE + lane).min(d_model - 1);
    // SAFETY: the expert exists.
    let matrix = unsafe { place::<F>(weight, job.expert, d_ff, d_model) };
    // SAFETY: the whole block is here, since it has one job; row and places exist.
    let sums = unsafe { products::<F>(job, &matrix, row, h, |place| place) };

    let mut m = 0;
    while m < 4 {
        let o = first_row + warp_idx % 4 * 32 + 8 * m as u32 + lane / 4;
        if o < d_model {
            let bias = bias_of(bias, job.expert, d_model, o);
            let mut n = 0;
            while n < 8 {
                let i = place_in_tile(warp_idx, lane, n);
                if i < job.count {
                    let pair = pairs[(job.first + i) as usize];
                    let at = pair as usize * d_model as usize + o as usize;
                    // SAFETY: a pair is in one place, so element (pair, o) is this lane's alone.
                    unsafe { y.write(at, sums[m / 2][n / 2][m % 2 * 2 + n % 2] + bias) };
                }
                n += 1;
            }
        }
        m += 1;
    }
}

/// The place, within a tile, of a lane's `n`th column of results.
#[inline(always)]
fn place_in_tile(warp_idx: u32, lane: u32, n: usize) -> u32 {
    warp_idx / 4 * 32 + 8 * (n as u32 / 2) + 2 * (lane % 4) + n as u32 % 2
}

/// A warp's products: fragments of rows `16 m..` and places `8 n..` of its 32 × 32. `row` is the row of `matrix` that this
/// thread decodes, if it does; `x_row` says which row of `x` belongs to a place of the sorted list.
///
/// # Safety
///
/// The whole block is here; rows of `matrix` and `x` exist, and start at multiples of 16 bytes.
#[inline(always)]
unsafe fn products<F: Format>(
    job: Job,
    matrix: &Place,
    row: u32,
    x: Global<f32>,
    x_row: impl Fn(u32) -> u32,
) -> [[[f32; 4]; 4]; 2] {
    let tiles = Tiles {
        weight: shared_array!(experts_weight: [f16; WEIGHT_HALVES]),
        x: shared_array!(experts_x_tile: [f16; X_HALVES]),
        weight_powers: shared_array!(experts_weight_powers: [f32; WEIGHT_POWERS]),
        x_powers: shared_array!(experts_x_powers: [f32; X_POWERS]),
    };
    let warp_idx = thread::thread_idx_y();
    let n_in = matrix.n_groups * GROUP;
    let share = Share {
        thread: warp_idx * WARP_SIZE + thread::thread_idx_x(),
        first_row: 0,
        first_token: 0,
        n_tokens: job.count,
        n_in,
        n_out: TILE_ROWS,
    };
    let decodes = share.thread < WEIGHT_THREADS;
    // Where the quads of `x` are that this thread brings; places past the last repeat it.
    let mut quads = [0; X_QUADS];
    if !decodes {
        let mut i = 0;
        while i < X_QUADS {
            let (token, quad) = share.x_place(i);
            let row = x_row(job.first + token.min(job.count - 1));
            quads[i] = row as usize * n_in as usize + 4 * quad as usize;
            i += 1;
        }
    }
    // In two decisions: of one, LLVM makes a single store to either field, by address, and both then live in memory.
    let load = |step: u32| Ahead::<F> {
        // SAFETY: the caller's promise.
        raw: if decodes { unsafe { F::load(matrix, row as usize, step) } } else { F::EMPTY },
        quads: if decodes {
            [[0; 4]; X_QUADS]
        } else {
            // SAFETY: as above.
            quads.map(|at| unsafe { x.load16(at + (step * GROUP) as usize) })
        },
    };

    let mut sums = [[[0.0; 4]; 4]; 2];
    // SAFETY: every thread of the block runs these steps, and a barrier lies between the filling of a tile and its use,
    // and between its use and its filling for the step after the next.
    unsafe {
        let mut ahead = load(0);
        share.fill(&ahead, 0, tiles);
        thread::sync_threads();
        let mut step = 0;
        while step < matrix.n_groups {
            let more = step + 1 < matrix.n_groups;
            if more {
                ahead = load(step + 1);
            }
            multiply(&mut sums, tiles, step % 2, warp_idx % 4 * 32, warp_idx / 4 * 32, share);
            if more {
                share.fill(&ahead, step + 1, tiles);
            }
            thread::sync_threads();
            step += 1;
        }
    }
    sums
}
