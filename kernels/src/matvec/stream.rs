//! One token against a Q8_0 matrix on the integer tensor cores: as [`matvec`](super), with half of its instructions.
//!
//! The products of [`super`] are bound by what a multiprocessor can issue: each 8-bit weight is made a float first. Here
//! weights enter `mma.m16n8k32` as they lie, and it is `x` that is made integer: each group of 32 under a scale of its own, in
//! 16 bits, which are two columns of 8.
//!
//! A lane's 16 bytes are half a group of one row, so the four lanes that share a row have four groups, and a product sums
//! over all of them. That they come out apart is up to B: column n has group `n % 4`, its high bytes for `n < 4` and its low
//! ones from there, and is zero where lanes of other groups multiply.
//!
//! A block has a run of rows in tiles of 16, and its warps share the steps of all tiles, 16 rows and 8 groups each, in order.
//! Each warp streams through a ring of its own, a lane exactly the bytes that it reads, so that nothing waits for another
//! warp before the end. The ring is full before the grid waits for the one that makes `x`.

use super::finish;
use crate::block;
use crate::format::{Format, GROUP, INTERLEAVE, Q8_0};
use cuda_std::warp::{self, WARP_SIZE};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{
    Disjoint, Float, Global, Shared, cp_async, dynamic_shared_array, grid, kernel, mma, shared_array, thread,
    unpack_f16x2,
};

const WARPS: u32 = 8;
const THREADS: u32 = WARPS * WARP_SIZE;
/// Rows of a tile: those of an mma.
const TILE: u32 = 16;
/// Groups of a step, those that interleave their quants: two for each of the four lanes that share a row.
const STEP: u32 = INTERLEAVE as u32;
/// Groups that are multiplied together.
const HALF_STEP: u32 = 4;
/// Bytes of a group's quants.
const GROUP_BYTES: u32 = 32;
/// Steps of a warp under way, 4 KiB of quants each: 64 KiB a multiprocessor.
const DEPTH: u32 = 2;
/// Bytes of all lanes' 16.
const PIECE: u32 = 16 * WARP_SIZE;
/// Of each half step a piece of quants for rows 0 to 7 and 8 to 15, first half and second of their groups; then scales, a pair
/// for each half step and half of the rows.
const STAGE: u32 = 2 * (4 * PIECE + 8 * WARP_SIZE);
const SCALES: u32 = 2 * 4 * PIECE;
const RING: u32 = DEPTH * STAGE;
const RINGS: u32 = WARPS * RING;
/// With 1 KiB of static memory, what every GPU from Ampere on has for a block.
const SHARED: u32 = 98 * 1024;
/// Bytes that columns without a group read.
const ZEROS: u32 = GROUP_BYTES;
/// The largest magnitude in 16 bits of which high and low byte are both signed.
const LARGEST: f32 = 32639.0;
/// Groups of smaller numbers count as zeros: their scale would have no reciprocal.
const SMALLEST: f32 = 1.0e-33;
/// 3 · 2²²: a number near 0 that is added to it is rounded to an integer, found in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// Quads of `x` that a thread loads together.
const QUADS: usize = 4;
/// Threads that sum an expert's share.
const LANES: u32 = 8;
/// The widest `x`.
pub const MAX_IN: u32 = 8192;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[matvec_stream_q8_0::ENTRY, matvec_stream_router_q8_0::ENTRY];

/// Where things are in shared memory, behind the rings, in bytes.
struct Places {
    /// High bytes of `x`, group after group.
    high: u32,
    low: u32,
    /// An f32 for each group.
    scales: u32,
    zeros: u32,
    /// What a warp has of a tile, 16 f32: warp w's of tile i at place `i + w`, since warps share tiles in order.
    sums: u32,
    /// The router's weights for the block's rows, `[n_expert, n_rows]`, the norm's scale, and the rows' values.
    router: u32,
}

impl Places {
    #[inline(always)]
    const fn new(n_in: u32, n_rows: u32) -> Self {
        let n_steps = n_in.div_ceil(STEP * GROUP);
        let high = RINGS;
        let low = high + n_steps * STEP * GROUP;
        let scales = low + n_steps * STEP * GROUP;
        let zeros = scales + n_steps * STEP * 4;
        let sums = zeros + ZEROS;
        Self { high, low, scales, zeros, sums, router: sums + (n_rows.div_ceil(TILE) + WARPS) * TILE * 4 }
    }
}

/// Whether a matrix of rows of `n_in` elements can be streamed: scales are loaded in pairs.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn fits(n_in: u32) -> bool {
    n_in.is_multiple_of(2 * GROUP) && n_in <= MAX_IN
}

/// Rows of a block: an equal share of one, two, … blocks for each multiprocessor, as few as have room in shared memory.
/// `n_expert` is 0 without a router.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn rows_per_block(n_multiprocessors: u32, n_in: u32, n_out: u32, n_expert: u32) -> u32 {
    // A row has a sum, its tile's rounded up, and of a router its value, its scale and a weight for each expert.
    let row_bytes = 4 + if n_expert > 0 { 4 * (n_expert + 2) } else { 0 };
    let most = (SHARED - Places::new(n_in, 0).router - TILE * 4) / row_bytes;
    let waves = n_out.div_ceil(n_multiprocessors).div_ceil(most);
    n_out.div_ceil(n_multiprocessors * waves)
}

/// The blocks of [`launch`], and so the rows of `parts`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn n_parts(n_multiprocessors: u32, n_in: u32, n_out: u32, n_expert: u32) -> u32 {
    n_out.div_ceil(rows_per_block(n_multiprocessors, n_in, n_out, n_expert))
}

/// The geometry the kernels of this file are started with: blocks of [`rows_per_block`] rows. Where a row lies in its block
/// decides the order in which it is summed.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_multiprocessors: u32, n_in: u32, n_out: u32, n_expert: u32) -> Launch {
    Launch::linear(n_parts(n_multiprocessors, n_in, n_out, n_expert), THREADS)
}

/// Multiplies a matrix of type Q8_0 with a vector, which it may normalize first.
///
/// - Math: `y[o] = Σᵢ weight[o, i] · x̂[i] + bias[o]`, then the epilogue. `x̂` is `x`, or with `gamma`
///   `γ[i] · x[i] / √(mean(x²) + ε)`; either in 16 bits, relative to the largest of its group.
/// - Shapes: `out`: `[n_out]`; `weight`: `[n_out, n_in]` in its planes; `x`, `gamma`: `[n_in]`, from multiples of 16 bytes on,
///   `gamma` or empty; `bias`: `[n_out]`, or empty. `epilogue`: [`super::STORE`], [`super::ADD`], [`super::GELU_ERF`],
///   [`super::GELU_TANH`].
/// - Launch: [`launch`], `n_rows` rows a block. See the module.
/// - Shared memory: 98 KiB dynamic, rings of weights, `x` and sums; 1 KiB static; two barriers.
/// - Cost: memory bound, the bytes of `weight`; about 220 instructions of a warp for 4 KiB.
/// - Determinism: exact sums of 32 products, then f32 sums in one order, that of the geometry.
/// - Source: [`Q8_0`]; norm as in [`crate::rms_norm`].
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above; [`fits`]`(n_in)`. `weight`, `gamma`, `bias` were written
/// before the grid before this.
#[kernel(threads = THREADS, registers = 88, dynamic_shared = SHARED, waits, launches, alone)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn matvec_stream_q8_0(
    out: Disjoint<f32>,
    weight: Global<u8>,
    x: Global<f32>,
    gamma: Global<f32>,
    bias: Global<f32>,
    epsilon: f32,
    n_in: u32,
    n_out: u32,
    n_rows: u32,
    epilogue: u32,
) {
    let shared = dynamic_shared_array!(matvec_stream_memory: [u8; SHARED as usize]);
    let run = Run::new(weight, n_in, n_out, n_rows, shared);
    // SAFETY: the launch contract is this kernel's own.
    unsafe { run.products(x, Some(gamma), epsilon, bias, out, epilogue, || (), |_, _| ()) };
}

/// [`matvec_stream_q8_0`](fn@matvec_stream_q8_0) that adds to the residual, and prepares the router that reads it.
///
/// - Math: `out[o] ← out[o] + Σᵢ weight[o, i] · x[i] + bias[o]`; then over the rows o of block b
///   `parts[b, e] = Σ router[e, o] · router_gamma[o] · out[o]` and `parts[b, n_expert] = Σ out[o]²`.
/// - Shapes: as there; `router`: `[n_expert, n_out]`, `router_gamma`: `[n_out]`; `parts`: `[n_parts, n_expert + 1]`,
///   [`n_parts`] of the launch.
/// - Launch: [`launch`], `n_rows` rows a block.
/// - Shared memory: as there, with the router's weights of the block's rows; one barrier more.
/// - Cost: memory bound, the bytes of `weight` and `router`.
/// - Determinism: as there.
/// - Source: the logits of a router after an RMS norm are a sum over rows divided by one number.
///
/// # Safety
///
/// As there, and n_expert is not 0 and at most [`MAX_EXPERTS`](super::MAX_EXPERTS). `router` and `router_gamma` were written before the grid
/// before this.
#[kernel(threads = THREADS, registers = 88, dynamic_shared = SHARED, waits, launches, alone)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn matvec_stream_router_q8_0(
    out: Disjoint<f32>,
    parts: Disjoint<f32>,
    weight: Global<u8>,
    x: Global<f32>,
    bias: Global<f32>,
    router: Global<f32>,
    router_gamma: Global<f32>,
    n_in: u32,
    n_out: u32,
    n_rows: u32,
    n_expert: u32,
) {
    let shared = dynamic_shared_array!(matvec_stream_router_memory: [u8; SHARED as usize]);
    let run = Run::new(weight, n_in, n_out, n_rows, shared);
    let (n_rows, thread, weights_at) = (run.n_rows.max(1), run.thread, run.places.router);
    let n_columns = n_expert + 1;
    let (gamma_at, values_at) = (weights_at + 4 * n_expert * n_rows, weights_at + 4 * n_columns * n_rows);
    // The router's weights for the block's rows and the norm's scale, waited for with the weights.
    let prepare = || {
        let mut i = thread;
        while i < n_columns * n_rows {
            let (e, row) = (i / n_rows, (run.first_row + i % n_rows) as usize);
            let to = (weights_at + 4 * i) as usize;
            // SAFETY: the expert and row exist; every element has one writer.
            unsafe {
                match e < n_expert {
                    true => shared.copy_async4(to, router, e as usize * router_gamma.len() + row, true),
                    false => shared.copy_async4(to, router_gamma, row, true),
                }
            }
            i += THREADS;
        }
    };
    // SAFETY: the launch contract is this kernel's own; a row has one thread.
    unsafe {
        run.products(x, None, 0.0, bias, out, super::ADD, prepare, |row, value| {
            shared.store4((values_at + 4 * row) as usize, value.to_bits());
        });
        thread::sync_threads();
    }

    let (slot, lane) = (thread / LANES, thread % LANES);
    let mut round = 0;
    while round < n_columns {
        let e = round + slot;
        let (mut sum, mut row) = (0.0, lane);
        while e < n_columns && row < n_rows {
            // SAFETY: written before the barriers.
            unsafe {
                let at = |from: u32| f32::from_bits(shared.load4((from + 4 * row) as usize));
                let value = at(values_at);
                sum += value * if e < n_expert { at(weights_at + 4 * e * n_rows) * at(gamma_at) } else { value };
            }
            row += LANES;
        }
        // SAFETY: whole warps are here; one element for each slot.
        unsafe {
            let sum = warp::sum_of::<LANES>(sum);
            if e < n_columns && lane == 0 {
                parts.write((thread::block_idx_x() * n_columns + e) as usize, sum);
            }
        }
        round += THREADS / LANES;
    }
}

/// A block's run of rows, and its thread.
struct Run {
    weight: Global<u8>,
    /// First byte of the plane of scales.
    scales: usize,
    n_groups: u32,
    n_steps: u32,
    first_row: u32,
    n_rows: u32,
    thread: u32,
    shared: Shared<u8>,
    places: Places,
}

/// The next step that a warp asks for, and where this lane's share of it is: of row `g` of the tile.
#[derive(Clone, Copy)]
struct Ahead {
    unit: u32,
    tile: u32,
    step: u32,
    /// First byte of its quants, and of its scales.
    quants: usize,
    scales: usize,
}

impl Run {
    #[inline(always)]
    fn new(weight: Global<u8>, n_in: u32, n_out: u32, n_rows: u32, shared: Shared<u8>) -> Self {
        let first_row = thread::block_idx_x() * n_rows;
        let n_rows = n_rows.min(n_out - first_row);
        Self {
            weight,
            scales: Q8_0::LAYOUT.planes(n_in as usize, n_out as usize).scales,
            n_groups: n_in / GROUP,
            n_steps: n_in.div_ceil(STEP * GROUP).max(1), // Never 0, which LLVM does not know.
            first_row,
            n_rows,
            thread: thread::thread_idx_x(),
            shared,
            places: Places::new(n_in, n_rows),
        }
    }

    /// Element `row` of the run in a vector of the matrix's height.
    #[inline(always)]
    fn at(&self, vector: Global<f32>, row: u32) -> f32 {
        // SAFETY: the launch contract; the row is of the run.
        unsafe { vector.read_unchecked((self.first_row + row) as usize) }
    }

    /// Computes the run's rows of `out`. `prepare` runs before the grid waits; `done(row, value)` is called once for each
    /// row.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    unsafe fn products(
        &self,
        x: Global<f32>,
        gamma: Option<Global<f32>>,
        epsilon: f32,
        bias: Global<f32>,
        out: Disjoint<f32>,
        epilogue: u32,
        prepare: impl Fn(),
        done: impl Fn(u32, f32),
    ) {
        let &Self { n_steps, n_rows, thread, shared, ref places, .. } = self;
        let (warp_idx, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
        let (g, t) = (lane / 4, lane % 4);
        // Steps of all tiles, dealt out in order.
        let n_units = n_rows.div_ceil(TILE) * n_steps;
        let per_warp = n_units.div_ceil(WARPS).max(1);
        let (first, end) = (n_units.min(warp_idx * per_warp), n_units.min((warp_idx + 1) * per_warp));

        let (mut unit, mut tile, mut step) = (first, first / n_steps, first % n_steps);
        let mut ahead = self.place(Ahead { unit, tile, step, quants: 0, scales: 0 });
        prepare();
        let mut i = 0;
        while i < DEPTH {
            // Half as many under way at a time: the grid before has loads of its own, which would wait behind these.
            if i >= DEPTH / 2 {
                cp_async::wait::<{ DEPTH / 2 - 1 }>();
            }
            self.issue(&mut ahead, end);
            i += 1;
        }
        let bias_of = |row: u32| if bias.len() > 0 { self.at(bias, row) } else { 0.0 };
        let first_bias = if thread < n_rows { bias_of(thread) } else { 0.0 };
        let gamma = gamma.filter(|gamma| gamma.len() > 0);
        let first_gamma = gamma.map(|gamma| self.quads(gamma, 0));
        let sums = shared_array!(matvec_stream_sums: [f32; THREADS as usize]);
        let mut first_before = 0.0;
        // SAFETY: once, by all threads.
        unsafe {
            grid::wait();
            if epilogue == super::ADD && thread < n_rows {
                first_before = out.read_unchecked((self.first_row + thread) as usize);
            }
            let squares = self.stage(x, gamma.zip(first_gamma));
            block::leave_sum(squares, thread, sums);
            thread::sync_threads();
        }

        // Column g of B is group g % 4's: its lane walks over the bytes of x, the others stay where there are zeros.
        let is_mine = g % HALF_STEP == t;
        let plane = if g < HALF_STEP { places.high } else { places.low };
        let (x_start, x_stride) =
            if is_mine { (plane + t * GROUP_BYTES, HALF_STEP * GROUP_BYTES) } else { (places.zeros, 0) };
        // Columns 2 t and 2 t + 1 of the product, of high bytes or low, are of these groups and the next.
        let pair = 2 * (t % 2);
        let weight_of_byte = if t < 2 { 256.0 } else { 1.0 };
        let mut x_at = x_start + 2 * step * x_stride;
        let scales_start = places.scales + 4 * pair;
        let mut scales_at = scales_start + 4 * STEP * step;
        let mut row_sums = [0.0; 2];
        while unit < end {
            cp_async::wait::<{ DEPTH - 1 }>();
            let stage = (warp_idx * RING + unit % DEPTH * STAGE) as usize;
            let mut half_step = 0;
            while half_step < 2 {
                // SAFETY: this lane's copies have landed; x is there since the barrier; whole warps are here.
                unsafe {
                    let quants = stage + 4 * half_step * PIECE as usize + 16 * lane as usize;
                    let piece = |i: usize| shared.load16(quants + i * PIECE as usize);
                    let (a, b, c, d) = (piece(0), piece(1), piece(2), piece(3));
                    let scales = [0, 1].map(|half| {
                        let part = (2 * half_step + half) as u32;
                        unpack_f16x2(shared.load4(stage + (SCALES + 4 * (part * WARP_SIZE + lane)) as usize))
                    });
                    let (x0, x1) = (shared.load16(x_at as usize), shared.load16((x_at + 16) as usize));
                    let of_x = [0, 4].map(|next| f32::from_bits(shared.load4((scales_at + next) as usize)));

                    // Two chains, since each product waits for the one before it.
                    let first = mma::m16n8k32_s8([a[0], c[0], a[1], c[1]], [x0[0], x0[1]], [0; 4]);
                    let second = mma::m16n8k32_s8([b[0], d[0], b[1], d[1]], [x1[0], x1[1]], [0; 4]);
                    let first = mma::m16n8k32_s8([a[2], c[2], a[3], c[3]], [x0[2], x0[3]], first);
                    let second = mma::m16n8k32_s8([b[2], d[2], b[3], d[3]], [x1[2], x1[3]], second);
                    let product = |i: usize| first[i].wrapping_add(second[i]) as f32;
                    let mut half = 0;
                    while half < 2 {
                        let [s0, s1] = scales[half];
                        row_sums[half] += product(2 * half) * s0 * of_x[0] + product(2 * half + 1) * s1 * of_x[1];
                        half += 1;
                    }
                }
                (x_at, scales_at) = (x_at + x_stride, scales_at + 4 * HALF_STEP);
                half_step += 1;
            }
            self.issue(&mut ahead, end);
            if ahead.unit == end {
                grid::launch_dependents();
            }
            (unit, step) = (unit + 1, step + 1);
            if step == n_steps || unit == end {
                // SAFETY: the whole warp is here; a lane of two writes its own element.
                unsafe {
                    let [low, high] = row_sums.map(|sum| warp::sum_of::<4>(sum * weight_of_byte));
                    let to = places.sums + 4 * ((tile + warp_idx) * TILE + g + 8 * t);
                    if t < 2 {
                        shared.store4(to as usize, (if t == 0 { low } else { high }).to_bits());
                    }
                }
                row_sums = [0.0; 2];
                (tile, step, x_at, scales_at) = (tile + 1, 0, x_start, scales_start);
            }
        }

        cp_async::wait::<0>(); // What was prepared.
        // SAFETY: the whole block is here; sums are read behind the barrier, and a row is one thread's.
        unsafe {
            thread::sync_threads();
            let mut scale = 1.0;
            if let Some(gamma) = gamma {
                let squares = block::sum_left(thread, WARPS, sums);
                scale = Float::rsqrt(squares / gamma.len() as f32 + epsilon);
            }
            let mut row = thread;
            while row < n_rows {
                let tile = row / TILE;
                let (mut w, last) = (tile * n_steps / per_warp, ((tile + 1) * n_steps - 1) / per_warp);
                let mut sum = 0.0;
                while w <= last {
                    let from = places.sums + 4 * ((tile + w) * TILE + row % TILE);
                    sum += f32::from_bits(shared.load4(from as usize));
                    w += 1;
                }
                let o = (self.first_row + row) as usize;
                let (mut start, mut before) = (first_bias, first_before);
                if row >= THREADS {
                    start = bias_of(row);
                    before = if epilogue == super::ADD { out.read_unchecked(o) } else { 0.0 };
                }
                let value = finish(epilogue, sum * scale + start, || before);
                out.write(o, value);
                done(row, value);
                row += THREADS;
            }
        }
    }

    /// `ahead` with the place that its step has.
    #[inline(always)]
    fn place(&self, ahead: Ahead) -> Ahead {
        let (g, t) = (self.thread % WARP_SIZE / 4, self.thread % 4);
        let groups = (self.first_row + ahead.tile * TILE + g) as usize * self.n_groups as usize;
        let first = (ahead.step * STEP) as usize;
        Ahead {
            quants: (groups + first) * GROUP_BYTES as usize + 16 * t as usize,
            scales: self.scales + 2 * (groups + first) + 4 * (t % 2) as usize,
            ..ahead
        }
    }

    /// Asks for the bytes of step `ahead`, if it is before `end`, and goes on to the next.
    #[inline(always)]
    fn issue(&self, ahead: &mut Ahead, end: u32) {
        let &Self { weight, n_groups, n_rows, thread, shared, .. } = self;
        if ahead.unit < end {
            let (warp_idx, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
            let (g, t) = (lane / 4, lane % 4);
            let to = (warp_idx * RING + ahead.unit % DEPTH * STAGE) as usize;
            // The last groups of a row, fewer than eight, interleave what there is.
            let left = n_groups - ahead.step * STEP;
            let next = 16 * left.min(STEP) as usize;
            let mut part = 0;
            while part < 4 {
                let (half_step, half) = (part / 2, part % 2);
                let is_row = ahead.tile * TILE + 8 * half as u32 + g < n_rows;
                let groups = half * 8 * n_groups as usize;
                let from = ahead.quants + groups * GROUP_BYTES as usize + half_step * 16 * HALF_STEP as usize;
                let to_quants = to + 2 * part * PIECE as usize + 16 * lane as usize;
                let first = half_step as u32 * HALF_STEP;
                // SAFETY: the row and group exist, or zeros come; this lane has read the stage.
                unsafe {
                    let valid = is_row && first + t < left;
                    shared.copy_async(to_quants, weight, from, valid);
                    shared.copy_async(to_quants + PIECE as usize, weight, from + next, valid);
                    let valid = is_row && first + 2 * (t % 2) < left;
                    let from = ahead.scales + 2 * (groups + first as usize);
                    let to_scales = to + (SCALES + 4 * (part as u32 * WARP_SIZE + lane)) as usize;
                    shared.copy_async4(to_scales, weight, from, valid);
                }
                part += 1;
            }
            ahead.quants += (STEP * GROUP_BYTES) as usize;
            ahead.scales += 2 * STEP as usize;
            (ahead.unit, ahead.step) = (ahead.unit + 1, ahead.step + 1);
            if ahead.step == self.n_steps {
                *ahead = self.place(Ahead { tile: ahead.tile + 1, step: 0, ..*ahead });
            }
        }
        cp_async::commit();
    }

    /// This thread's quads `thread`, `thread + THREADS`, … of a vector, from its `round`-th `QUADS` on; 0 past its end.
    #[inline(always)]
    fn quads(&self, vector: Global<f32>, round: u32) -> [[f32; 4]; QUADS] {
        let (mut quads, mut k) = ([[0.0; 4]; QUADS], 0);
        while k < QUADS {
            let i = 4 * (self.thread + (round * QUADS as u32 + k as u32) * THREADS);
            if i < vector.len() as u32 {
                // SAFETY: inside, in whole 16 bytes since rows are whole groups.
                quads[k] = unsafe { vector.load16(i as usize) }.map(f32::from_bits);
            }
            k += 1;
        }
        quads
    }

    /// Brings `x`, scaled by γ if there is one, to shared memory, and returns this thread's sum of its squares before that.
    /// With γ come the thread's first quads of it.
    ///
    /// # Safety
    ///
    /// The whole block is here, and passes a barrier next.
    #[inline(always)]
    unsafe fn stage(&self, x: Global<f32>, norm: Option<(Global<f32>, [[f32; 4]; QUADS])>) -> f32 {
        let &Self { n_groups, n_steps, thread, shared, ref places, .. } = self;
        let n_quads = n_groups * (GROUP / 4);
        let (mut squares, mut round) = (0.0, 0);
        while round * QUADS as u32 * THREADS < n_quads {
            let quads = self.quads(x, round);
            let factors = norm.map(|(gamma, first)| if round == 0 { first } else { self.quads(gamma, round) });
            let mut k = 0;
            while k < QUADS {
                let first = (round * QUADS as u32 + k as u32) * THREADS;
                let q = first + thread;
                // Groups are eight threads', so that warps are whole where they are not all.
                if first + thread / WARP_SIZE * WARP_SIZE < n_quads {
                    let mut x = quads[k];
                    squares += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
                    if let Some(factors) = factors {
                        let [a, b, c, d] = factors[k];
                        x = [x[0] * a, x[1] * b, x[2] * c, x[3] * d];
                    }
                    // As integers magnitudes have the same order, and NaN is the largest.
                    let bits = x.map(|x| x.to_bits() & 0x7fff_ffff);
                    let mut largest = bits[0].max(bits[1]).max(bits[2].max(bits[3]));
                    // SAFETY: the whole warp is here.
                    unsafe {
                        largest = largest.max(warp::shuffle_xor(largest, 4));
                        largest = largest.max(warp::shuffle_xor(largest, 2));
                        largest = largest.max(warp::shuffle_xor(largest, 1));
                    }
                    let largest = f32::from_bits(largest);
                    // NaN is not below.
                    let (factor, scale) =
                        if largest < SMALLEST { (0.0, 0.0) } else { (LARGEST / largest, largest / LARGEST) };
                    let integers = x.map(|x| (x * factor + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()));
                    let word = |bytes: [u32; 4]| {
                        bytes[0] & 0xff | (bytes[1] & 0xff) << 8 | (bytes[2] & 0xff) << 16 | bytes[3] << 24
                    };
                    // The low byte is signed too, so the high one is of the nearest multiple of 256.
                    let high = word(integers.map(|x| x.wrapping_add(128) >> 8));
                    if q < n_quads {
                        // SAFETY: each thread writes its own word, and one of eight their group's scale.
                        unsafe {
                            shared.store4((places.high + 4 * q) as usize, high);
                            shared.store4((places.low + 4 * q) as usize, word(integers));
                            if q.is_multiple_of(GROUP / 4) {
                                shared.store4((places.scales + q / 2) as usize, scale.to_bits());
                            }
                        }
                    }
                }
                k += 1;
            }
            round += 1;
        }
        // Zeros for other lanes' columns, and for the groups that the last step has too many.
        let missing = n_steps * STEP - n_groups;
        // SAFETY: each thread writes its own words.
        unsafe {
            if thread < ZEROS / 4 {
                shared.store4((places.zeros + 4 * thread) as usize, 0);
            }
            if thread < missing * GROUP_BYTES / 4 {
                let at = n_groups * GROUP_BYTES + 4 * thread;
                shared.store4((places.high + at) as usize, 0);
                shared.store4((places.low + at) as usize, 0);
            }
            if thread < missing {
                shared.store4((places.scales + 4 * (n_groups + thread)) as usize, 0);
            }
        }
        squares
    }
}

/// Starts [`matvec_stream_q8_0`](fn@matvec_stream_q8_0).
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
pub unsafe fn run(
    launcher: &dyn Launcher,
    n_multiprocessors: u32,
    out: DeviceSlice<f32>,
    weight: DeviceSlice<u8>,
    x: DeviceSlice<f32>,
    gamma: DeviceSlice<f32>,
    bias: DeviceSlice<f32>,
    epsilon: f32,
    n_in: u32,
    n_out: u32,
    epilogue: u32,
) -> Result<(), LaunchError> {
    let (launch, n_rows) =
        (launch(n_multiprocessors, n_in, n_out, 0), rows_per_block(n_multiprocessors, n_in, n_out, 0));
    // SAFETY: the caller's promise.
    unsafe {
        matvec_stream_q8_0::run(launcher, launch, out, weight, x, gamma, bias, epsilon, n_in, n_out, n_rows, epilogue)
    }
}

/// Starts [`matvec_stream_router_q8_0`](fn@matvec_stream_router_q8_0).
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
pub unsafe fn run_router(
    launcher: &dyn Launcher,
    n_multiprocessors: u32,
    out: DeviceSlice<f32>,
    parts: DeviceSlice<f32>,
    weight: DeviceSlice<u8>,
    x: DeviceSlice<f32>,
    bias: DeviceSlice<f32>,
    router: DeviceSlice<f32>,
    router_gamma: DeviceSlice<f32>,
    n_in: u32,
    n_out: u32,
    n_expert: u32,
) -> Result<(), LaunchError> {
    let launch = launch(n_multiprocessors, n_in, n_out, n_expert);
    let n_rows = rows_per_block(n_multiprocessors, n_in, n_out, n_expert);
    // SAFETY: the caller's promise.
    unsafe {
        matvec_stream_router_q8_0::run(
            launcher,
            launch,
            out,
            parts,
            weight,
            x,
            bias,
            router,
            router_gamma,
            n_in,
            n_out,
            n_rows,
            n_expert,
        )
    }
}
