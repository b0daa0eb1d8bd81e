//! Many tokens through their experts, MXFP4 weights and f16 activations: tensor cores fed from the packed weights.

use super::bias_of;
use super::sort::Job;
#[cfg(not(target_arch = "nvptx64"))]
use super::sort::TILE_WORDS;
use crate::format::{Format, GROUP, Mxfp4, mxfp4_pairs};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Element, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, Shared, cp_async, dynamic_shared_array, f16, kernel, mma, mul_f16x2, thread, warp};

/// The widest tile of pairs: what [`experts_sort`](super::sort::experts_sort()) is to cut for these kernels.
pub const TILE_PAIRS: u32 = 96;
/// The longest rows of weights: their scales lie in shared memory as a whole.
pub const MAX_IN: u32 = 31 * STEP;

const THREADS: u32 = 128;
const TILE_ROWS: u32 = 128;
/// Neighbouring rows of one matrix in a tile: it has two such halves.
const HALF_ROWS: u32 = TILE_ROWS / 2;
/// Groups of a step, and of a run of the packed weights: a lane's words of them are 16 bytes.
const STEP_GROUPS: u32 = 4;
const STEP: u32 = STEP_GROUPS * GROUP;
/// Words of a row's quants in a step.
const ROW_WORDS: u32 = 4 * STEP_GROUPS;
const QUANT_WORDS: u32 = TILE_ROWS * ROW_WORDS;
/// Words of a pair's activations in a step.
const X_WORDS: u32 = STEP / 2;

/// Words of the ring of steps.
const RING: u32 = 20 * 1024;
/// Bytes of a half's scales as they are in memory, from a multiple of 16 on, with the word behind the last.
const RAW_BYTES: u32 = HALF_ROWS * (MAX_IN / GROUP) + 32;
/// They come to the end of the ring, where no step lies yet.
const RAW: u32 = RING - 2 * RAW_BYTES / 4;
/// A row's factors: a word for each step, an odd number of them, so that rows start in different banks.
const FACTOR_WORDS: u32 = MAX_IN / STEP;
const FACTORS: u32 = RING;
/// Each row's largest scale.
const TOPS: u32 = FACTORS + TILE_ROWS * FACTOR_WORDS;
/// Two words of each place: where its row of activations starts, and what the epilogue wants to know.
const PLACES: u32 = TOPS + TILE_ROWS;
const SHARED_WORDS: u32 = PLACES + 2 * THREADS;
const SHARED_BYTES: u32 = 4 * SHARED_WORDS;
/// Halves from one pair's results to the next's, on their way out.
const RESULT_STRIDE: u32 = HALF_ROWS + 8;
const _: () = assert!(TILE_PAIRS * RESULT_STRIDE <= 2 * RING && SHARED_BYTES <= 99 * 1024);
const _: () =
    assert!(RAW_BYTES.is_multiple_of(16) && FACTOR_WORDS % 2 == 1 && TILE_PAIRS <= THREADS && TILE_ROWS == THREADS);

/// A scale's factor is 2¹⁵ for the largest of its row, half of it for one less, and so on to 2⁻¹⁴ and 0. So a product with a
/// code, 2⁻¹⁴ of its value, is at most 12.
const TOP: u32 = 30;

/// Words of a step: quants, then `pairs` rows of activations.
const fn stage_words(pairs: u32) -> u32 {
    QUANT_WORDS + pairs * X_WORDS
}

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_grouped_gate_up_mxfp4::ENTRY, experts_grouped_down_mxfp4::ENTRY];

/// The one geometry [`experts_grouped_gate_up_mxfp4`](fn@experts_grouped_gate_up_mxfp4) is written for; `n_tiles` entries
/// are in the list.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_gate_up(n_tiles: u32, d_ff: u32) -> Launch {
    Launch { grid: [d_ff.div_ceil(HALF_ROWS), n_tiles, 1], block: [THREADS, 1, 1] }
}

/// The one geometry [`experts_grouped_down_mxfp4`](fn@experts_grouped_down_mxfp4) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_tiles: u32, d_model: u32) -> Launch {
    Launch { grid: [d_model.div_ceil(TILE_ROWS), n_tiles, 1], block: [THREADS, 1, 1] }
}

/// Starts [`experts_grouped_gate_up_mxfp4`](fn@experts_grouped_gate_up_mxfp4).
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
    launcher: &dyn Launcher,
    h: DeviceSlice<f16>,
    gate: DeviceSlice<u8>,
    up: DeviceSlice<u8>,
    gate_bias: DeviceSlice<f32>,
    up_bias: DeviceSlice<f32>,
    x: DeviceSlice<f16>,
    row_factor: DeviceSlice<f32>,
    pairs: DeviceSlice<u32>,
    tiles: DeviceSlice<u32>,
    n_used: u32,
    d_model: u32,
    d_ff: u32,
) -> Result<(), LaunchError> {
    let launch = launch_gate_up(tiles.len() as u32 / TILE_WORDS, d_ff);
    let (gate, up, x) = (words(gate), words(up), words(x));
    // SAFETY: the caller's promise.
    unsafe {
        experts_grouped_gate_up_mxfp4::run(
            launcher, launch, h, gate, up, gate_bias, up_bias, x, row_factor, pairs, tiles, n_used, d_model, d_ff,
        )
    }
}

/// Starts [`experts_grouped_down_mxfp4`](fn@experts_grouped_down_mxfp4).
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
    launcher: &dyn Launcher,
    y: DeviceSlice<f32>,
    weight: DeviceSlice<u8>,
    bias: DeviceSlice<f32>,
    h: DeviceSlice<f16>,
    pairs: DeviceSlice<u32>,
    tiles: DeviceSlice<u32>,
    d_ff: u32,
    d_model: u32,
) -> Result<(), LaunchError> {
    let launch = launch_down(tiles.len() as u32 / TILE_WORDS, d_model);
    let (weight, h) = (words(weight), words(h));
    // SAFETY: the caller's promise.
    unsafe { experts_grouped_down_mxfp4::run(launcher, launch, y, weight, bias, h, pairs, tiles, d_ff, d_model) }
}

/// The same memory as words: `cp.async` wants one type on both sides.
#[cfg(not(target_arch = "nvptx64"))]
pub(super) fn words<T: Element>(slice: DeviceSlice<T>) -> DeviceSlice<u32> {
    DeviceSlice::new(slice.address(), slice.len() * size_of::<T>() / size_of::<u32>())
}

/// Runs `$tile::<M, N, PENDING>` for the narrowest warp tile of 16 M rows and 8 N pairs that takes all of a block's pairs,
/// with as many steps under way as there is room for.
macro_rules! by_width {
    ($count:expr, $tile:ident($($argument:expr),*)) => {
        match $count.div_ceil(8) {
            0..=1 => $tile::<2, 1, 4>($($argument),*),
            2 => $tile::<2, 2, 4>($($argument),*),
            3..=4 => $tile::<2, 4, 3>($($argument),*),
            5..=6 => $tile::<2, 6, 2>($($argument),*),
            7..=8 => $tile::<2, 8, 1>($($argument),*),
            9..=10 => $tile::<2, 10, 0>($($argument),*),
            _ => $tile::<2, 12, 0>($($argument),*),
        }
    };
}

/// The first half of MXFP4 experts, with the gated unit, for many tokens.
///
/// - Math: for each place i of the sorted list, of token `t = pairs[i] / n_used` and expert e: `h[i, f] = swiglu(r[t] gateₑ[f]
///   · x[t] + gate_bias[e, f], r[t] upₑ[f] · x[t] + up_bias[e, f])`, swiglu being [`swiglu::activation`] and r `row_factor`,
///   or 1. A code of E2M1, put under the exponent of an f16, is its value times 2⁻¹⁴; it is multiplied with a power of two
///   that is 2¹⁵ for the largest scale of its row and goes down with its own. So weights are exact unless their scale is
///   2²⁵ or more below the row's largest; from 2³⁰ on they are 0. The largest scale multiplies the sums, in f32.
/// - Shapes: `h`: `[n_pairs, d_ff]`; `gate`, `up`: `[n_expert, d_ff, d_model]`, each expert in its format's planes, as words;
///   `gate_bias`, `up_bias`: `[n_expert, d_ff]`, or empty; `x`: `[n_tokens, d_model]` of f16, two to a word; `row_factor`:
///   `[n_tokens]`, or empty; `pairs`, `tiles`: those of [`experts_sort`](super::sort::experts_sort()) for tiles of
///   [`TILE_PAIRS`]. `x` and `h` start at multiples of 16 bytes. d_model is at most [`MAX_IN`], d_ff a multiple of 32.
/// - Launch: [`launch_gate_up`]`(n_tiles, d_ff)`. A block owns 64 features and a tile of pairs, or returns if it has none.
///   Features of `gate` are rows 0 to 7 of a fragment, the same of `up` rows 8 to 15, so that a lane has both.
/// - Shared memory: 97 KiB, a ring of steps of 128 elements, filled by `cp.async`; one barrier a step.
/// - Cost: `4 · n_pairs · d_ff · d_model` operations; memory bound below about 50 pairs an expert.
/// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a product themselves.
/// - Source: PTX ISA, `mma.m16n8k16`; OCP Microscaling Formats 1.0, 5.3 and 6.3.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 2, dynamic_shared = SHARED_BYTES)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn experts_grouped_gate_up_mxfp4(
    h: Disjoint<f16>,
    gate: Global<u32>,
    up: Global<u32>,
    gate_bias: Global<f32>,
    up_bias: Global<f32>,
    x: Global<u32>,
    row_factor: Global<f32>,
    pairs: Global<u32>,
    tiles: Global<u32>,
    n_used: u32,
    d_model: u32,
    d_ff: u32,
) {
    let Some(job) = Job::of_block(tiles) else {
        return;
    };
    let first = thread::block_idx_x() * HALF_ROWS;
    let pair = pairs[job.place_of_thread() as usize];
    let token = pair / n_used.max(1);
    let factor = if row_factor.len() > 0 { row_factor[token as usize] } else { 1.0 };
    // SAFETY: the expert exists; the whole block is here, since it has one job.
    unsafe {
        let block = Block::new(tiles, job.expert, [gate, up], [first, first], x, d_model, d_ff);
        block.keep([token, factor.to_bits()]);
        by_width!(job.count, gate_up(h, [gate_bias, up_bias], block));
    }
}

/// The second half of MXFP4 experts, for many tokens.
///
/// - Math: for each place i of the sorted list, of expert e: `y[pairs[i], o] = downₑ[o] · h[i] + bias[e, o]`. Products as in
///   [`experts_grouped_gate_up_mxfp4`](fn@experts_grouped_gate_up_mxfp4).
/// - Shapes: `y`: `[n_pairs, d_model]`; `weight`: `[n_expert, d_model, d_ff]`, each expert in its format's planes, as words;
///   `bias`: `[n_expert, d_model]`, or empty; `h`: `[n_pairs, d_ff]` of f16, two to a word, from a multiple of 16 bytes on; `pairs`,
///   `tiles`: those of [`experts_sort`](super::sort::experts_sort()) for tiles of [`TILE_PAIRS`]. d_ff is at most
///   [`MAX_IN`], d_model a multiple of 32.
/// - Launch: [`launch_down`]`(n_tiles, d_model)`. A block owns 128 rows and a tile of pairs, or returns if it has none.
/// - Shared memory: 97 KiB, a ring of steps of 128 elements, filled by `cp.async`; one barrier a step.
/// - Cost: `2 · n_pairs · d_ff · d_model` operations; memory bound below about 50 pairs an expert.
/// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a product themselves.
/// - Source: as there.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 2, dynamic_shared = SHARED_BYTES)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn experts_grouped_down_mxfp4(
    y: Disjoint<f32>,
    weight: Global<u32>,
    bias: Global<f32>,
    h: Global<u32>,
    pairs: Global<u32>,
    tiles: Global<u32>,
    d_ff: u32,
    d_model: u32,
) {
    let Some(job) = Job::of_block(tiles) else {
        return;
    };
    let first = thread::block_idx_x() * TILE_ROWS;
    let place = job.place_of_thread();
    // SAFETY: the expert exists; the whole block is here, since it has one job.
    unsafe {
        let block = Block::new(tiles, job.expert, [weight, weight], [first, first + HALF_ROWS], h, d_ff, d_model);
        block.keep([place, pairs[place as usize]]);
        by_width!(job.count, down(y, bias, block));
    }
}

/// # Safety
///
/// As the kernel.
#[inline(always)]
unsafe fn gate_up<const M: usize, const N: usize, const PENDING: u32>(
    h: Disjoint<f16>,
    [gate_bias, up_bias]: [Global<f32>; 2],
    block: Block,
) {
    // SAFETY: the caller's promise.
    let sums = unsafe { block.products::<M, N, PENDING, true>() };
    // Read again: what lives through the products takes registers from them.
    let (job, warp) = (Job::read(block.tiles), WarpTile::<M, N>::of_thread());
    let results = dynamic_shared_array!(experts_grouped_results: [f16; 2 * SHARED_WORDS as usize]);
    // SAFETY: nobody reads the ring any more, and no copy into it is under way.
    unsafe { thread::sync_threads() };
    let mut m = 0;
    while m < M {
        let row = 8 * warp.fragment(m) + warp.g;
        // Features past the last repeat it: they are not written.
        let f = (block.first_rows[0] + row).min(block.n_out - 1);
        let gate_bias = bias_of(gate_bias, job.expert, block.n_out, f);
        let up_bias = bias_of(up_bias, job.expert, block.n_out, f);
        // SAFETY: written before the last barrier.
        let (gate_power, up_power) = unsafe { (block.power_of(row), block.power_of(HALF_ROWS + row)) };
        let mut n = 0;
        while n < N {
            let mut i = 0;
            while i < 2 {
                let place = warp.place(n) + i as u32;
                // SAFETY: kept before the last barrier; the element is this lane's alone.
                unsafe {
                    let factor = f32::from_bits(block.shared.read((PLACES + THREADS + place) as usize));
                    let gate = sums[m][n][i] * factor * gate_power + gate_bias;
                    let up = sums[m][n][i + 2] * factor * up_power + up_bias;
                    let h = f16::from_f32(swiglu::activation(gate, up));
                    results.write((place * RESULT_STRIDE + row) as usize, h);
                }
                i += 1;
            }
            n += 1;
        }
        m += 1;
    }
    // SAFETY: as above.
    unsafe { thread::sync_threads() };
    let mut i = thread::thread_idx_x();
    while i < job.count * (HALF_ROWS / 8) {
        let (place, row) = (i / (HALF_ROWS / 8), i % (HALF_ROWS / 8) * 8);
        let f = block.first_rows[0] + row;
        if f < block.n_out {
            let at = (job.first + place) as usize * block.n_out as usize + f as usize;
            // SAFETY: these eight features of the place are this thread's alone, and all exist: they come in 32.
            unsafe { h.store16(at, results.load16((place * RESULT_STRIDE + row) as usize)) };
        }
        i += THREADS;
    }
}

/// # Safety
///
/// As the kernel.
#[inline(always)]
unsafe fn down<const M: usize, const N: usize, const PENDING: u32>(y: Disjoint<f32>, bias: Global<f32>, block: Block) {
    // SAFETY: the caller's promise.
    let sums = unsafe { block.products::<M, N, PENDING, false>() };
    // Read again: what lives through the products takes registers from them.
    let (job, warp) = (Job::read(block.tiles), WarpTile::<M, N>::of_thread());
    let mut m = 0;
    while m < M {
        let mut half = 0;
        while half < 2 {
            let row = 16 * warp.fragment(m) + 8 * half as u32 + warp.g;
            let o = block.first_rows[0] + row;
            if o < block.n_out {
                let bias = bias_of(bias, job.expert, block.n_out, o);
                // SAFETY: written before the last barrier.
                let power = unsafe { block.power_of(row) };
                let mut n = 0;
                while n < N {
                    let mut i = 0;
                    while i < 2 {
                        let place = warp.place(n) + i as u32;
                        if place < job.count {
                            // SAFETY: kept before the last barrier; a pair has one place, so the element is this lane's.
                            unsafe {
                                let pair = block.shared.read((PLACES + THREADS + place) as usize);
                                let at = pair as usize * block.n_out as usize + o as usize;
                                y.write(at, sums[m][n][2 * half + i] * power + bias);
                            }
                        }
                        i += 1;
                    }
                    n += 1;
                }
            }
            half += 1;
        }
        m += 1;
    }
}

/// A warp's part of a tile: fragments of 16 rows from `first_fragment` on, M of them, and N of 8 pairs.
struct WarpTile<const M: usize, const N: usize> {
    first_fragment: u32,
    first_place: u32,
    /// The lane's rows of a fragment, g and g + 8, and its columns, 2 t and 2 t + 1.
    g: u32,
    t: u32,
}

impl<const M: usize, const N: usize> WarpTile<M, N> {
    const FRAGMENTS: u32 = TILE_ROWS / 16;
    /// The pairs of a block.
    const PAIRS: u32 = THREADS / WARP_SIZE * (M * N) as u32;

    #[inline(always)]
    fn of_thread() -> Self {
        let (warp_idx, lane) = (thread::thread_idx_x() / WARP_SIZE, thread::thread_idx_x() % WARP_SIZE);
        let warps_of_rows = Self::FRAGMENTS / M as u32;
        Self {
            first_fragment: warp_idx % warps_of_rows * M as u32,
            first_place: warp_idx / warps_of_rows * 8 * N as u32,
            g: lane / 4,
            t: lane % 4,
        }
    }

    #[inline(always)]
    fn fragment(&self, m: usize) -> u32 {
        self.first_fragment + m as u32
    }

    /// The place, in the tile, of the first of the lane's two columns of fragment n.
    #[inline(always)]
    fn place(&self, n: usize) -> u32 {
        self.first_place + 8 * n as u32 + 2 * self.t
    }
}

/// What a block multiplies: two halves of 64 rows, and the activations of a tile of pairs.
#[derive(Clone, Copy)]
struct Block {
    tiles: Global<u32>,
    matrices: [Global<u32>; 2],
    first_rows: [u32; 2],
    n_out: u32,
    x: Global<u32>,
    n_groups: u32,
    /// Where the matrices' scales start, in bytes.
    scales: usize,
    shared: Shared<u32>,
}

impl Block {
    /// # Safety
    ///
    /// The experts' matrices are there.
    #[inline(always)]
    unsafe fn new(
        tiles: Global<u32>,
        expert: u32,
        experts: [Global<u32>; 2],
        first_rows: [u32; 2],
        x: Global<u32>,
        n_in: u32,
        n_out: u32,
    ) -> Self {
        let planes = Mxfp4::LAYOUT.planes(n_in as usize, n_out as usize);
        Self {
            tiles,
            // SAFETY: the caller's promise; planes are whole words.
            matrices: experts.map(|all| unsafe { all.row_unchecked(expert as usize, planes.end / 4) }),
            first_rows,
            n_out,
            x,
            n_groups: n_in / GROUP,
            scales: planes.scales,
            shared: dynamic_shared_array!(experts_grouped_words: [u32; SHARED_WORDS as usize]),
        }
    }

    /// Keeps two words of this thread's place: the row of `x`, and what the epilogue wants to know.
    ///
    /// # Safety
    ///
    /// The whole block is here, once.
    #[inline(always)]
    unsafe fn keep(&self, [row, other]: [u32; 2]) {
        let thread = thread::thread_idx_x();
        // SAFETY: the elements are this thread's alone.
        unsafe {
            self.shared.write((PLACES + thread) as usize, row * (self.n_groups * GROUP / 8));
            self.shared.write((PLACES + THREADS + thread) as usize, other);
            thread::sync_threads();
        }
    }

    /// Where a half's scales start in memory, in bytes, and how far into their 16 bytes.
    #[inline(always)]
    fn scales_of(&self, half: usize) -> (usize, u32) {
        let at = self.scales + self.first_rows[half] as usize * self.n_groups as usize;
        (at & !15, at as u32 & 15)
    }

    /// Asks for all scales of the block's rows.
    ///
    /// # Safety
    ///
    /// The whole block is here, once.
    #[inline(always)]
    unsafe fn copy_scales(&self) {
        let mut half = 0;
        while half < 2 {
            let (from, lead) = self.scales_of(half);
            // With the word behind the last, since rows begin anywhere in one.
            let n_chunks = (lead + HALF_ROWS * self.n_groups + 4).div_ceil(16);
            let (matrix, to) = (self.matrices[half], RAW + half as u32 * (RAW_BYTES / 4));
            let mut chunk = thread::thread_idx_x();
            while chunk < n_chunks {
                let at = from / 4 + 4 * chunk as usize;
                // Behind the last row there may be nothing; what rows past the last are scaled by does not matter.
                // SAFETY: the chunk is this thread's alone, and inside or not read.
                unsafe { self.shared.copy_async((to + 4 * chunk) as usize, matrix, at, at + 4 <= matrix.len()) };
                chunk += THREADS;
            }
            half += 1;
        }
    }

    /// Makes factors of the rows' scales, and finds each row's largest.
    ///
    /// # Safety
    ///
    /// The whole block is here, once; the scales have arrived.
    #[inline(always)]
    unsafe fn make_factors(&self) {
        let row = thread::thread_idx_x();
        let half = row / HALF_ROWS;
        let lead = if half == 0 { self.scales_of(0).1 } else { self.scales_of(1).1 };
        let octet = 4 * RAW + half * RAW_BYTES + lead + row % HALF_ROWS / 8 * (8 * self.n_groups);
        let n_words = self.n_groups.div_ceil(STEP_GROUPS);
        let scales = |word: u32| {
            // Eight rows interleave their runs.
            let width = (self.n_groups - word * STEP_GROUPS).min(STEP_GROUPS);
            let bytes = octet + 8 * STEP_GROUPS * word + row % 8 * width;
            let (at, shift) = ((bytes / 4) as usize, bytes % 4 * 8);
            // SAFETY: they have arrived, with a word behind the last.
            let [low, high] = unsafe { [self.shared.read(at), self.shared.read(at + 1)] };
            let four = ((u64::from(high) << 32 | u64::from(low)) >> shift) as u32;
            // What follows the row's last scale is another row's.
            let n_others = STEP_GROUPS - width;
            four << (8 * n_others) >> (8 * n_others)
        };
        let mut top = 0;
        let mut word = 0;
        while word < n_words {
            let four = scales(word);
            top = top.max(largest_of(four));
            word += 1;
        }
        // SAFETY: the caller's promise; words are this thread's alone.
        unsafe {
            let mut word = 0;
            while word < n_words {
                self.shared.write((FACTORS + row * FACTOR_WORDS + word) as usize, factors_of(top, scales(word)));
                word += 1;
            }
            self.shared.write((TOPS + row) as usize, top);
        }
    }

    /// What the sums of a row are to be multiplied with: `2^(top − 127) · 2¹⁴ / 2¹⁵`.
    ///
    /// # Safety
    ///
    /// A barrier lies between this and `make_factors`.
    #[inline(always)]
    unsafe fn power_of(&self, row: u32) -> f32 {
        // SAFETY: the caller's promise.
        power_of(unsafe { self.shared.read((TOPS + row) as usize) })
    }

    /// Asks for this thread's part of a step of `pairs` pairs, for the stage at word `stage`; for nothing behind the last.
    ///
    /// # Safety
    ///
    /// The whole block is here, and nobody reads the stage.
    #[inline(always)]
    unsafe fn copy(&self, step: u32, pairs: u32, stage: u32) {
        let thread = thread::thread_idx_x();
        // 32 rows at a time, which exist together or not: rows come in 32.
        let (row, chunk) = (thread / 4, step * STEP_GROUPS + thread % 4);
        if chunk < self.n_groups {
            let row_words = (4 * self.n_groups) as usize;
            let width = (self.n_groups - step * STEP_GROUPS).min(STEP_GROUPS);
            let mut i = 0;
            while i < 4 {
                let (half, first) = (i / 2, self.first_rows[i / 2] + i as u32 % 2 * 32);
                // Instead of rows past the last come others: their products are never written.
                let source_row = if first < self.n_out { first + row } else { row };
                // Eight rows interleave their runs.
                let in_run = step * 8 * ROW_WORDS + (source_row % 8 * width + thread % 4) * 4;
                let from = (source_row / 8) as usize * (8 * row_words) + in_run as usize;
                let to = stage + (32 * i as u32 + row) * ROW_WORDS + 4 * (thread % 4);
                // SAFETY: the row has these words; the place is this thread's.
                unsafe { self.shared.copy_async(to as usize, self.matrices[half], from, true) };
                i += 1;
            }
        }
        let (row, column) = (thread / 16, thread % 16);
        let chunk = step * (STEP / 8) + column;
        if chunk < self.n_groups * (GROUP / 8) {
            let mut i = 0;
            while i < pairs.div_ceil(8) {
                let place = 8 * i + row;
                if place < pairs {
                    // SAFETY: as above; rows of x were kept before a barrier.
                    unsafe {
                        let x_row = self.shared.read((PLACES + place) as usize);
                        let from = 4 * (x_row + chunk) as usize;
                        let to = stage + QUANT_WORDS + place * X_WORDS + 4 * (column ^ (place % 8));
                        self.shared.copy_async(to as usize, self.x, from, true);
                    }
                }
                i += 1;
            }
        }
    }

    /// The tile's products: fragments of the warp's rows and pairs. PAIRED: rows g and g + 8 of a fragment are row g of
    /// either half, else the halves follow one another.
    ///
    /// # Safety
    ///
    /// The whole block is here, once, and `keep` was called.
    #[inline(always)]
    unsafe fn products<const M: usize, const N: usize, const PENDING: u32, const PAIRED: bool>(
        &self,
    ) -> [[[f32; 4]; N]; M] {
        let pairs = const { WarpTile::<M, N>::PAIRS };
        const {
            let words = stage_words(WarpTile::<M, N>::PAIRS);
            assert!((PENDING + 2) * words <= RING && (PENDING + 1) * words <= RAW);
        }
        let warp = WarpTile::<M, N>::of_thread();
        let lane = thread::thread_idx_x() % WARP_SIZE;

        // The lane's first row of the tile, and how far its others are from it.
        let first_row = if PAIRED { 8 * warp.first_fragment } else { 16 * warp.first_fragment } + warp.g;
        let offset = |m: usize, i: usize| {
            if PAIRED { (8 * m) as u32 + i as u32 * HALF_ROWS } else { (16 * m + 8 * i) as u32 }
        };
        let row_words = first_row * ROW_WORDS;
        let row_factors = FACTORS + first_row * FACTOR_WORDS;
        // `ldmatrix`: lane l gives row l % 8 of chunk l / 8 of a group's four; chunks of the next group differ in one bit.
        let x_row = QUANT_WORDS + (warp.first_place + lane % 8) * X_WORDS;
        let x_chunk = x_row + 4 * ((lane / 8) ^ (lane % 8));
        let x_at = |stage: u32, group: u32| (stage + (x_chunk ^ (group % 2 * 16)) + group / 2 * 32) as usize;

        let (n_full, n_left) = (self.n_groups / STEP_GROUPS, self.n_groups % STEP_GROUPS);
        let words = const { stage_words(WarpTile::<M, N>::PAIRS) };
        let mut sums = [[[0.0; 4]; N]; M];
        // SAFETY: every thread of the block runs these steps. A barrier lies between a stage's last use and its next copy, and
        // between its arrival and its use; all warps run all of it.
        unsafe {
            self.copy_scales();
            cp_async::commit();
            let mut step = 0;
            while step < PENDING + 1 {
                self.copy(step, pairs, step * words);
                cp_async::commit();
                step += 1;
            }
            cp_async::wait::<PENDING>();
            thread::sync_threads();
            self.make_factors();
            let (mut stage, mut free) = (0, (PENDING + 1) * words);
            let mut step = 0;
            while step < n_full {
                cp_async::wait::<PENDING>();
                thread::sync_threads();
                self.copy(step + PENDING + 1, pairs, free);
                cp_async::commit();

                let mut codes = [[[0; 4]; 2]; M];
                let mut factors = [[0; 2]; M];
                let mut m = 0;
                while m < M {
                    let mut i = 0;
                    while i < 2 {
                        let at = stage + row_words + 4 * warp.t + offset(m, i) * ROW_WORDS;
                        codes[m][i] = self.shared.load16(at as usize);
                        factors[m][i] = self.shared.read((row_factors + step + offset(m, i) * FACTOR_WORDS) as usize);
                        i += 1;
                    }
                    m += 1;
                }
                let mut group = 0;
                while group < STEP_GROUPS {
                    let mut words = [[0; 2]; M];
                    let mut m = 0;
                    while m < M {
                        words[m] = [codes[m][0][group as usize], codes[m][1][group as usize]];
                        m += 1;
                    }
                    self.multiply(&mut sums, words, factors, group, x_at(stage, group));
                    group += 1;
                }
                free = stage;
                stage = if stage == (PENDING + 1) * words { 0 } else { stage + words };
                step += 1;
            }
            if n_left > 0 {
                cp_async::wait::<0>();
                thread::sync_threads();
                let mut group = 0;
                while group < n_left {
                    let mut codes = [[0; 2]; M];
                    let mut factors = [[0; 2]; M];
                    let mut m = 0;
                    while m < M {
                        let mut i = 0;
                        while i < 2 {
                            let at = stage + row_words + n_left * warp.t + group + offset(m, i) * ROW_WORDS;
                            codes[m][i] = self.shared.read(at as usize);
                            let at = row_factors + step + offset(m, i) * FACTOR_WORDS;
                            factors[m][i] = self.shared.read(at as usize);
                            i += 1;
                        }
                        m += 1;
                    }
                    self.multiply(&mut sums, codes, factors, group, x_at(stage, group));
                    group += 1;
                }
            }
        }
        sums
    }

    /// Adds the products of one group: `codes` are the words of rows g and g + 8 of each fragment, `x_at` is where this lane
    /// finds the group of its row of `x`.
    ///
    /// # Safety
    ///
    /// Whole warps are here; the group has arrived.
    #[inline(always)]
    unsafe fn multiply<const M: usize, const N: usize>(
        &self,
        sums: &mut [[[f32; 4]; N]; M],
        codes: [[u32; 2]; M],
        factors: [[u32; 2]; M],
        group: u32,
        x_at: usize,
    ) {
        // SAFETY: the caller's promise. Keeps ptxas from mixing groups, for which there are too few registers.
        unsafe { warp::sync() };
        let mut a = [[[0; 4]; 2]; M];
        let mut m = 0;
        while m < M {
            let mut i = 0;
            while i < 2 {
                let factor = factor_of(factors[m][i], group);
                let [first, second, third, fourth] = mxfp4_pairs(codes[m][i]);
                a[m][0][i] = mul_f16x2(first, factor);
                a[m][0][i + 2] = mul_f16x2(second, factor);
                a[m][1][i] = mul_f16x2(third, factor);
                a[m][1][i + 2] = mul_f16x2(fourth, factor);
                i += 1;
            }
            m += 1;
        }
        let mut n = 0;
        while n < N {
            // SAFETY: the caller's promise.
            unsafe {
                let [b0, b1, b2, b3] = self.shared.load_matrix_x4(x_at + n * (8 * X_WORDS) as usize);
                let mut m = 0;
                while m < M {
                    sums[m][n] = mma::m16n8k16_f16(a[m][0], [b0, b1], sums[m][n]);
                    sums[m][n] = mma::m16n8k16_f16(a[m][1], [b2, b3], sums[m][n]);
                    m += 1;
                }
            }
            n += 1;
        }
    }
}

/// The factors of four scales in a row whose largest is `top`, a byte each: the high byte of an f16 without mantissa, whose
/// low byte is 0.
#[inline(always)]
pub(super) const fn factors_of(top: u32, scales: u32) -> u32 {
    // How much less than the largest: no byte borrows. From TOP on, the factor is 0.
    let less = top * 0x0101_0101 - scales;
    let beyond = ((less & 0x7f7f_7f7f) + (0x80 - TOP) * 0x0101_0101) | less;
    let too_little = (beyond >> 7 & 0x0101_0101) * 0xff;
    ((TOP * 0x0101_0101 - (less & !too_little)) & !too_little) << 2
}

/// Factor `group` of four, twice.
#[inline(always)]
pub(super) const fn factor_of(factors: u32, group: u32) -> u32 {
    (factors >> (8 * group) & 0xff) * 0x0100_0100
}

/// The largest of four scales.
#[inline(always)]
pub(super) fn largest_of(scales: u32) -> u32 {
    (scales & 0xff).max(scales >> 8 & 0xff).max((scales >> 16 & 0xff).max(scales >> 24))
}

/// What sums of a row whose largest scale is `top` are to be multiplied with: `2^(top − 127) · 2¹⁴ / 2¹⁵`.
#[inline(always)]
pub(super) const fn power_of(top: u32) -> f32 {
    f32::from_bits(if top < 2 { 0x0020_0000 << top } else { (top - 1) << 23 })
}
