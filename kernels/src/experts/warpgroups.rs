//! Many tokens through their experts on Hopper: `wgmma`, whose operand A are weights decoded in registers.

use super::bias_of;
use super::grouped::{factor_of, factors_of, largest_of, power_of};
use super::sort::Job;
#[cfg(not(target_arch = "nvptx64"))]
use super::{grouped::words, sort::TILE_WORDS};
use crate::format::{Format, GROUP, Mxfp4, mxfp4_pairs};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, Shared, cp_async, dynamic_shared_array, f16, kernel, mul_f16x2, thread, wgmma};

/// The widest tile of pairs: what [`experts_sort`](super::sort::experts_sort()) is to cut for these kernels.
pub const TILE_PAIRS: u32 = 160;

/// Three warpgroups of 64 rows each. Two of 128 rows spend their time waiting for their own decoding, with no one beside them;
/// four leave a thread too few registers.
const THREADS: u32 = 384;
const TILE_ROWS: u32 = 192;
/// Neighbouring rows of one matrix in a tile: it has two such halves.
const HALF_ROWS: u32 = TILE_ROWS / 2;
const _: () = assert!(THREADS / 4 == HALF_ROWS, "a thread copies quants of one row of each half");
/// Groups of a step, and of a run of the packed weights: a lane's words of them are 16 bytes.
const STEP_GROUPS: u32 = 4;
const STEP: u32 = STEP_GROUPS * GROUP;
/// Words of a row's quants in a step.
const ROW_WORDS: u32 = 4 * STEP_GROUPS;
const QUANT_WORDS: u32 = TILE_ROWS * ROW_WORDS;
/// Words of a row of an operand of `wgmma`: 64 elements, half a step.
const X_WORDS: u32 = 32;
/// Steps in shared memory: one that is multiplied, one before it that products under way may still read, two to come.
const STAGES: u32 = 4;

/// Words of 8 rows of an operand, which start at multiples of their size.
const ATOM: u32 = 8 * X_WORDS;

/// Words of a step: two halves of activations, quants, a word of factors for each row.
const fn stage_words(pairs: u32) -> u32 {
    2 * pairs * X_WORDS + QUANT_WORDS + TILE_ROWS.next_multiple_of(ATOM)
}

/// Where the row of activations of each place starts: those of a thread, [`APART`] places apart, lie side by side.
const PLACES: u32 = STAGES * stage_words(TILE_PAIRS);
const APART: u32 = THREADS / 16;
const PLACES_STRIDE: u32 = 8;
/// What the epilogue wants to know of each place.
const OTHERS: u32 = PLACES + APART * PLACES_STRIDE;
/// Each row's largest scale.
const TOPS: u32 = OTHERS + TILE_PAIRS;
const SHARED_WORDS: u32 = TOPS + TILE_ROWS;
const SHARED_BYTES: u32 = 4 * SHARED_WORDS;
/// Halves from one pair's results to the next's, on their way out.
const RESULT_STRIDE: u32 = HALF_ROWS + 8;
const _: () = assert!(TILE_PAIRS * RESULT_STRIDE <= 2 * PLACES && SHARED_BYTES <= 227 * 1024);
const _: () = assert!(TILE_PAIRS <= PLACES_STRIDE * APART && APART * PLACES_STRIDE <= THREADS && TILE_ROWS <= THREADS);
const _: () =
    assert!(APART.is_multiple_of(8) && stage_words(8).is_multiple_of(ATOM) && RESULT_STRIDE.is_multiple_of(8));

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_warpgroups_gate_up_mxfp4::ENTRY, experts_warpgroups_down_mxfp4::ENTRY];

/// The one geometry [`experts_warpgroups_gate_up_mxfp4`](fn@experts_warpgroups_gate_up_mxfp4) is written for; `n_tiles`
/// entries are in the list.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_gate_up(n_tiles: u32, d_ff: u32) -> Launch {
    Launch { grid: [d_ff.div_ceil(HALF_ROWS), n_tiles, 1], block: [THREADS, 1, 1] }
}

/// The one geometry [`experts_warpgroups_down_mxfp4`](fn@experts_warpgroups_down_mxfp4) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_tiles: u32, d_model: u32) -> Launch {
    Launch { grid: [d_model.div_ceil(TILE_ROWS), n_tiles, 1], block: [THREADS, 1, 1] }
}

/// Starts [`experts_warpgroups_gate_up_mxfp4`](fn@experts_warpgroups_gate_up_mxfp4).
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
        experts_warpgroups_gate_up_mxfp4::run(
            launcher, launch, h, gate, up, gate_bias, up_bias, x, row_factor, pairs, tiles, n_used, d_model, d_ff,
        )
    }
}

/// Starts [`experts_warpgroups_down_mxfp4`](fn@experts_warpgroups_down_mxfp4).
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
    unsafe { experts_warpgroups_down_mxfp4::run(launcher, launch, y, weight, bias, h, pairs, tiles, d_ff, d_model) }
}

/// Runs `$tile::<N>` for the fewest columns of a product, 8 N, that take all of a block's pairs.
macro_rules! by_width {
    ($count:expr, $tile:ident($($argument:expr),*)) => {
        match $count.div_ceil(16) {
            0..=1 => $tile::<2>($($argument),*),
            2 => $tile::<4>($($argument),*),
            3 => $tile::<6>($($argument),*),
            4 => $tile::<8>($($argument),*),
            5 => $tile::<10>($($argument),*),
            6 => $tile::<12>($($argument),*),
            7 => $tile::<14>($($argument),*),
            8 => $tile::<16>($($argument),*),
            9 => $tile::<18>($($argument),*),
            _ => $tile::<20>($($argument),*),
        }
    };
}

/// The first half of MXFP4 experts, with the gated unit, for many tokens, on Hopper.
///
/// - Math: that of [`experts_grouped_gate_up_mxfp4`](fn@super::grouped::experts_grouped_gate_up_mxfp4), its slow twin.
/// - Shapes: as there, for tiles of [`TILE_PAIRS`]; d_model is a multiple of 32 of any length.
/// - Launch: [`launch_gate_up`]`(n_tiles, d_ff)`. A block owns 96 features and a tile of pairs, or returns if it has none; each
///   of its three warpgroups has 32 features. Features of `gate` are rows 0 to 7 of a warp's 16, the same of `up` rows 8 to
///   15, so that a lane has both.
/// - Shared memory: 214 KiB, a ring of four steps of 128 elements, filled by `cp.async`; one barrier a step, over which
///   products stay under way.
/// - Cost: `4 · n_pairs · d_ff · d_model` operations; memory bound below about 100 pairs an expert.
/// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a product themselves.
/// - Source: PTX ISA, `wgmma.mma_async`; OCP Microscaling Formats 1.0, 5.3 and 6.3.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, dynamic_shared = SHARED_BYTES, warpgroups)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn experts_warpgroups_gate_up_mxfp4(
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

/// The second half of MXFP4 experts, for many tokens, on Hopper.
///
/// - Math: that of [`experts_grouped_down_mxfp4`](fn@super::grouped::experts_grouped_down_mxfp4), its slow twin.
/// - Shapes: as there, for tiles of [`TILE_PAIRS`]; d_ff is a multiple of 32 of any length.
/// - Launch: [`launch_down`]`(n_tiles, d_model)`. A block owns 192 rows and a tile of pairs, or returns if it has none.
/// - Shared memory: 214 KiB, as [`experts_warpgroups_gate_up_mxfp4`](fn@experts_warpgroups_gate_up_mxfp4).
/// - Cost: `2 · n_pairs · d_ff · d_model` operations; memory bound below about 100 pairs an expert.
/// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a product themselves.
/// - Source: as there.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, dynamic_shared = SHARED_BYTES, warpgroups)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn experts_warpgroups_down_mxfp4(
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
unsafe fn gate_up<const N: usize>(h: Disjoint<f16>, [gate_bias, up_bias]: [Global<f32>; 2], block: Block) {
    // SAFETY: the caller's promise.
    let sums = unsafe { block.products::<N, true>() };
    // Read again: what lives through the products takes registers from them.
    let (job, lane) = (Job::read(block.tiles), Lane::of_thread());
    let results = dynamic_shared_array!(experts_warpgroups_results: [f16; 2 * SHARED_WORDS as usize]);
    // SAFETY: nobody reads the ring any more, and no copy into it is under way.
    unsafe { thread::sync_threads() };
    let row = 8 * lane.fragment + lane.g;
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
            let place = 8 * n as u32 + 2 * lane.t + i as u32;
            // SAFETY: kept before the last barrier; the element is this lane's alone.
            unsafe {
                let factor = f32::from_bits(block.shared.read((OTHERS + place) as usize));
                let gate = sums[n][i] * factor * gate_power + gate_bias;
                let up = sums[n][i + 2] * factor * up_power + up_bias;
                let h = f16::from_f32(swiglu::activation(gate, up));
                results.write((place * RESULT_STRIDE + row) as usize, h);
            }
            i += 1;
        }
        n += 1;
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
unsafe fn down<const N: usize>(y: Disjoint<f32>, bias: Global<f32>, block: Block) {
    // SAFETY: the caller's promise.
    let sums = unsafe { block.products::<N, false>() };
    // Read again: what lives through the products takes registers from them.
    let (job, lane) = (Job::read(block.tiles), Lane::of_thread());
    // SAFETY: the caller's promise. By constants, so that sums stay in registers.
    unsafe {
        store::<N, 0>(&sums, y, bias, &block, &job, &lane);
        store::<N, 1>(&sums, y, bias, &block, &job, &lane);
    }
}

/// Writes half `HALF` of the lane's fragments: one row.
///
/// # Safety
///
/// A barrier lies between this and `keep`, and the first step of `products`.
#[inline(always)]
unsafe fn store<const N: usize, const HALF: usize>(
    sums: &[[f32; 4]; N],
    y: Disjoint<f32>,
    bias: Global<f32>,
    block: &Block,
    job: &Job,
    lane: &Lane,
) {
    let row = 16 * lane.fragment + 8 * HALF as u32 + lane.g;
    let o = block.first_rows[0] + row;
    if o >= block.n_out {
        return;
    }
    let bias = bias_of(bias, job.expert, block.n_out, o);
    // SAFETY: the caller's promise.
    let power = unsafe { block.power_of(row) };
    let mut n = 0;
    while n < N {
        let mut i = 0;
        while i < 2 {
            let place = 8 * n as u32 + 2 * lane.t + i as u32;
            if place < job.count {
                // SAFETY: kept before the last barrier; a pair has one place, so the element is this lane's.
                unsafe {
                    let pair = block.shared.read((OTHERS + place) as usize);
                    let at = pair as usize * block.n_out as usize + o as usize;
                    y.write(at, sums[n][2 * HALF + i] * power + bias);
                }
            }
            i += 1;
        }
        n += 1;
    }
}

/// Where a thread is in the tile: which of the 16-row fragments its warp has, and which rows and columns of it are its own.
struct Lane {
    fragment: u32,
    /// Its rows of the fragment, g and g + 8, and its columns of eight, 2 t and 2 t + 1.
    g: u32,
    t: u32,
}

impl Lane {
    #[inline(always)]
    fn of_thread() -> Self {
        let (warp, lane) = (thread::thread_idx_x() / WARP_SIZE, thread::thread_idx_x() % WARP_SIZE);
        Self { fragment: warp, g: lane / 4, t: lane % 4 }
    }
}

/// What a block multiplies: two halves of 96 rows, and the activations of a tile of pairs.
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

/// Where a thread finds the scales of the row whose factors it makes.
#[derive(Clone, Copy)]
struct Scales {
    matrix: Global<u32>,
    /// Where those of the row's octet start, in words; eight rows interleave their runs.
    octet: u32,
    /// The row's place in its octet.
    row: u32,
    n_groups: u32,
}

impl Scales {
    /// Those of step `step`, a byte each; 0 behind the last.
    ///
    /// # Safety
    ///
    /// The step exists.
    #[inline(always)]
    unsafe fn of_step(&self, step: u32) -> u32 {
        // SAFETY: the caller's promise; whole runs are words.
        unsafe {
            if step < self.n_groups / STEP_GROUPS {
                return self.matrix.read_unchecked((self.octet + 8 * step + self.row) as usize);
            }
            let width = self.n_groups % STEP_GROUPS;
            let (at, shift) = (self.octet + 8 * step + self.row * width / 4, self.row * width % 4 * 8);
            let low = self.matrix.read_unchecked(at as usize);
            // Behind the last row there may be nothing.
            let next = (at as usize + 1).min(self.matrix.len() - 1);
            let high = self.matrix.read_unchecked(next);
            let four = ((u64::from(high) << 32 | u64::from(low)) >> shift) as u32;
            four & ((1 << (8 * width)) - 1)
        }
    }

    /// The largest of all.
    ///
    /// # Safety
    ///
    /// The row exists.
    #[inline(always)]
    unsafe fn top(&self) -> u32 {
        const AHEAD: usize = 8;
        let n_steps = self.n_groups.div_ceil(STEP_GROUPS);
        let mut top = 0;
        let mut step = 0;
        while step < n_steps {
            let mut scales = [0; AHEAD];
            let mut i = 0;
            while i < AHEAD {
                // The last again, instead of those behind it.
                // SAFETY: the caller's promise.
                scales[i] = unsafe { self.of_step((step + i as u32).min(n_steps - 1)) };
                i += 1;
            }
            i = 0;
            while i < AHEAD {
                top = top.max(largest_of(scales[i]));
                i += 1;
            }
            step += AHEAD as u32;
        }
        top
    }
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
            shared: dynamic_shared_array!(experts_warpgroups_words: [u32; SHARED_WORDS as usize]),
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
            if thread < APART * PLACES_STRIDE {
                let at = PLACES + thread % APART * PLACES_STRIDE + thread / APART;
                self.shared.write(at as usize, row * (self.n_groups * GROUP / 8));
            }
            if thread < TILE_PAIRS {
                self.shared.write((OTHERS + thread) as usize, other);
            }
            thread::sync_threads();
        }
    }

    /// A row of the tile in its matrix. Instead of rows past the last come others: their products are never written.
    #[inline(always)]
    fn source_row(&self, row: u32) -> u32 {
        let at = if row < HALF_ROWS { self.first_rows[0] } else { self.first_rows[1] } + row % HALF_ROWS;
        if at < self.n_out { at } else { at % 8 }
    }

    #[inline(always)]
    fn matrix_of(&self, row: u32) -> Global<u32> {
        if row < HALF_ROWS { self.matrices[0] } else { self.matrices[1] }
    }

    /// What the sums of a row are to be multiplied with.
    ///
    /// # Safety
    ///
    /// A barrier lies between this and the writing of [`TOPS`].
    #[inline(always)]
    unsafe fn power_of(&self, row: u32) -> f32 {
        // SAFETY: the caller's promise.
        power_of(unsafe { self.shared.read((TOPS + row) as usize) })
    }

    /// The octets of rows of which this thread copies quants: one of each half.
    ///
    /// # Safety
    ///
    /// The matrices are there.
    #[inline(always)]
    unsafe fn octets(&self) -> [Global<u32>; 2] {
        let row = thread::thread_idx_x() / 4;
        let octet_words = 8 * (4 * self.n_groups) as usize;
        // SAFETY: the caller's promise.
        unsafe {
            [
                self.matrices[0].row_unchecked((self.source_row(row) / 8) as usize, octet_words),
                self.matrices[1].row_unchecked((self.source_row(HALF_ROWS + row) / 8) as usize, octet_words),
            ]
        }
    }

    /// Asks for this thread's part of a step's quants, for the stage at word `stage`; for nothing behind the last.
    ///
    /// # Safety
    ///
    /// The whole block is here, and nobody reads the stage.
    #[inline(always)]
    unsafe fn copy_quants(&self, step: u32, pairs: u32, stage: u32, octets: [Global<u32>; 2]) {
        let thread = thread::thread_idx_x();
        let (row, column) = (thread / 4, thread % 4);
        let width = self.n_groups.saturating_sub(step * STEP_GROUPS).min(STEP_GROUPS);
        // Eight rows interleave their runs.
        let from = (step * 8 * ROW_WORDS + (row % 8 * width + column) * 4) as usize;
        let to = stage + 2 * pairs * X_WORDS + row * ROW_WORDS + 4 * column;
        // SAFETY: the rows have these words; the places are this thread's.
        unsafe {
            self.shared.copy_async_if(column < width, to as usize, octets[0], from);
            self.shared.copy_async_if(column < width, (to + HALF_ROWS * ROW_WORDS) as usize, octets[1], from);
        }
    }

    /// Asks for this thread's pieces `first..end` of a step's activations.
    ///
    /// # Safety
    ///
    /// As [`copy_quants`](Self::copy_quants).
    #[inline(always)]
    unsafe fn copy_x(&self, step: u32, pairs: u32, stage: u32, first: u32, end: u32) {
        // A row's 16 bytes of these 16 threads, in two operands.
        let (row, column) = (thread::thread_idx_x() / 16, thread::thread_idx_x() % 16);
        let chunk = step * (STEP / 8) + column;
        let exists = chunk < self.n_groups * (GROUP / 8);
        if first < pairs.div_ceil(APART) {
            let to = stage + column / 8 * (pairs * X_WORDS) + 4 * ((column % 8) ^ (row % 8));
            // SAFETY: as above; rows of x were kept before a barrier.
            unsafe {
                // All at once: a copy lets no load pass.
                let x_rows = self.shared.load16((PLACES + row * PLACES_STRIDE + first / 4 * 4) as usize);
                let mut i = first;
                while i < end && i < pairs.div_ceil(APART) {
                    let place = APART * i + row;
                    let from = 4 * (x_rows[i as usize % 4] + chunk) as usize;
                    let to = (to + place * X_WORDS) as usize;
                    self.shared.copy_async_if(exists && place < pairs, to, self.x, from);
                    i += 1;
                }
            }
        }
    }

    /// The tile's products: fragments of the lane's rows and of eight pairs each. PAIRED: rows g and g + 8 of a fragment are row
    /// g of either half, else the halves follow one another.
    ///
    /// # Safety
    ///
    /// The whole block is here, once, and `keep` was called.
    #[inline(always)]
    unsafe fn products<const N: usize, const PAIRED: bool>(&self) -> [[f32; 4]; N] {
        const { assert!(N.is_multiple_of(2)) };
        let (pairs, words) = const { (8 * N as u32, stage_words(8 * N as u32)) };
        let (lane, thread) = (Lane::of_thread(), thread::thread_idx_x());
        let quants = 2 * pairs * X_WORDS;
        let factors = quants + QUANT_WORDS;
        // The lane's rows in the tile.
        let row = if PAIRED { 8 } else { 16 } * lane.fragment + lane.g;
        let rows = [row, row + if PAIRED { HALF_ROWS } else { 8 }];

        let makes_factors = thread < TILE_ROWS;
        let own_row = self.source_row(thread % TILE_ROWS);
        let scales = Scales {
            matrix: self.matrix_of(thread % TILE_ROWS),
            octet: self.scales as u32 / 4 + own_row / 8 * 2 * self.n_groups,
            row: own_row % 8,
            n_groups: self.n_groups,
        };
        let (n_full, n_left) = (self.n_groups / STEP_GROUPS, self.n_groups % STEP_GROUPS);
        let n_steps = self.n_groups.div_ceil(STEP_GROUPS);
        let mut sums = [[0.0; 4]; N];
        // SAFETY: the matrices are there.
        let octets = unsafe { self.octets() };
        // SAFETY: every thread of the block runs these steps, and all warps all of it. A stage is written when its last
        // products were waited for by all threads before a barrier, and read behind the next.
        unsafe {
            let mut step = 0;
            while step < 2 {
                self.copy_quants(step, pairs, step * words, octets);
                self.copy_x(step, pairs, step * words, 0, 4);
                self.copy_x(step, pairs, step * words, 4, 8);
                cp_async::commit();
                step += 1;
            }
            let (mut top, mut next_scales) = (0, 0);
            if makes_factors {
                top = scales.top();
                self.shared.write((TOPS + thread) as usize, top);
                let mut step = 0;
                while step < 2 {
                    let own = scales.of_step(step.min(n_steps - 1));
                    self.shared.write((step * words + factors + thread) as usize, factors_of(top, own));
                    step += 1;
                }
                next_scales = scales.of_step(2.min(n_steps - 1));
            }

            let (mut stage, mut free) = (0, 2 * words);
            let mut step = 0;
            while step < n_full {
                cp_async::wait::<1>();
                wgmma::fence_proxy_async();
                thread::sync_threads();
                if makes_factors {
                    self.shared.write((free + factors + thread) as usize, factors_of(top, next_scales));
                    next_scales = scales.of_step((step + 3).min(n_steps - 1));
                }
                let mut codes = [[0; 4]; 2];
                let mut lane_factors = [0; 2];
                let mut i = 0;
                while i < 2 {
                    codes[i] = self.shared.load16((stage + quants + rows[i] * ROW_WORDS + 4 * lane.t) as usize);
                    lane_factors[i] = self.shared.read((stage + factors + rows[i]) as usize);
                    i += 1;
                }
                let x = [self.shared.operand(stage as usize), self.shared.operand((stage + pairs * X_WORDS) as usize)];
                let mut group = 0;
                while group < STEP_GROUPS {
                    let words = [codes[0][group as usize], codes[1][group as usize]];
                    multiply::<N, 1>(&mut sums, words, lane_factors, group, x[group as usize / 2]);
                    group += 1;
                    // Not before the first products: the tensor cores would wait for it.
                    if group == 2 {
                        self.copy_quants(step + 2, pairs, free, octets);
                        self.copy_x(step + 2, pairs, free, 0, 4);
                        self.copy_x(step + 2, pairs, free, 4, 8);
                        cp_async::commit();
                    }
                }
                stage = if stage == (STAGES - 1) * words { 0 } else { stage + words };
                free = if free == (STAGES - 1) * words { 0 } else { free + words };
                step += 1;
            }
            cp_async::wait::<0>();
            if n_left > 0 {
                wgmma::fence_proxy_async();
                thread::sync_threads();
                let mut group = 0;
                while group < n_left {
                    let mut codes = [0; 2];
                    let mut lane_factors = [0; 2];
                    let mut i = 0;
                    while i < 2 {
                        let at = stage + quants + rows[i] * ROW_WORDS + n_left * lane.t + group;
                        codes[i] = self.shared.read(at as usize);
                        lane_factors[i] = self.shared.read((stage + factors + rows[i]) as usize);
                        i += 1;
                    }
                    let x = self.shared.operand((stage + group / 2 * (pairs * X_WORDS)) as usize);
                    multiply::<N, 0>(&mut sums, codes, lane_factors, group, x);
                    group += 1;
                }
            }
            wgmma::wait::<0>();
        }
        sums
    }
}

/// Starts the products of one group: `codes` are the words of rows g and g + 8 of the fragment, `x` the half step of
/// activations that has the group. Products are done then but those of the last `PENDING` groups, whose registers of A ptxas leaves
/// alone in an unrolled loop. In a loop that is not, it takes them again: there `PENDING` is 0.
///
/// # Safety
///
/// Whole warpgroups are here; the group has arrived.
#[inline(always)]
unsafe fn multiply<const N: usize, const PENDING: u32>(
    sums: &mut [[f32; 4]; N],
    codes: [u32; 2],
    factors: [u32; 2],
    group: u32,
    x: wgmma::Operand,
) {
    // SAFETY: the caller's promise.
    unsafe { wgmma::wait::<PENDING>() };
    let mut a = [[0; 4]; 2];
    let mut i = 0;
    while i < 2 {
        let factor = factor_of(factors[i], group);
        let [first, second, third, fourth] = mxfp4_pairs(codes[i]);
        a[0][i] = mul_f16x2(first, factor);
        a[0][i + 2] = mul_f16x2(second, factor);
        a[1][i] = mul_f16x2(third, factor);
        a[1][i + 2] = mul_f16x2(fourth, factor);
        i += 1;
    }
    // SAFETY: the caller's promise.
    unsafe {
        wgmma::fence();
        wgmma::m64k16_f16(sums, a[0], x.quarter(group % 2 * 2));
        wgmma::m64k16_f16(sums, a[1], x.quarter(group % 2 * 2 + 1));
        wgmma::commit();
    }
}
