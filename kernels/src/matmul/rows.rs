//! Matrix times many rows of f16 activations: prefill's linear maps, on tensor cores. See [`super`] for the twin that takes
//! f32 and loses nothing to a range.

use super::finish::{gather, write};
use super::tile::{STEP_GROUPS, Seat, Tile, accumulate};
use super::warpgroups::{self, Warpgroups};
#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use cuda_std::{Atomics, Disjoint, Global, Shared, dynamic_shared_array, f16, kernel, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};

/// 128 rows, 256 tokens: 8 warps of 64 × 64. For many tokens: the least traffic and decoding for a product.
type Wide = Tile<4, 8, 2, 4, 2>;
/// 64 rows, 64 tokens: 4 warps of 32 × 32.
type Narrow = Tile<2, 4, 2, 2, 3>;
/// 64 rows, 16 tokens: 4 warps of 16 × 16.
type Skinny = Tile<1, 2, 4, 1, 3>;

/// What a kernel was given; see its comment.
#[derive(Clone, Copy)]
pub(super) struct Parameters {
    pub(super) out: Disjoint<f32>,
    pub(super) out16: Disjoint<f16>,
    pub(super) weight: Global<u8>,
    pub(super) powers: Global<f32>,
    pub(super) x: Global<f16>,
    pub(super) factors: Global<f32>,
    pub(super) bias: Global<f32>,
    pub(super) partial: Disjoint<f32>,
    pub(super) counters: Atomics<u32>,
    pub(super) n_tokens: u32,
    pub(super) n_in: u32,
    pub(super) n_out: u32,
    pub(super) out_stride: u32,
    pub(super) quads: u32,
    pub(super) epilogue: u32,
    pub(super) n_whole: u32,
    pub(super) n_splits: u32,
    pub(super) n_steps: u32,
}

macro_rules! kernel {
    ($name:ident, $format:ident, $shape:ident, $rows:literal, $tokens:literal, $tiles:literal, $blocks_per_sm:literal, $bytes:expr, [$($mark:ident)?], $run:ident::<$($size:tt),*>) => {
        #[doc = concat!("Multiplies a matrix of type ", stringify!($format), " with rows of f16: tiles of ", $rows, " × ", $tokens, ".")]
        ///
        /// - Math: `y[t, o] = factors[t] · Σᵢ weight[o, i] · x[t, i] + bias[o]`, then the epilogue. Weights are divided by
        ///   `powers[o]`, rounded to f16 and multiplied with f32 sums. What f16 loses of a weight is 2⁻¹¹ of it, or 2⁻³⁹ of
        ///   its row's largest if that is more; norm-wise about 2e-4 for a product, beside the rounding of `x`. No finite
        ///   weight overflows; infinite and NaN inputs give infinite or NaN outputs.
        /// - Shapes: `out`: rows of `n_out` elements, `out_stride` from one to the next, or empty; `out16`: the same in f16,
        ///   where what exceeds 65504 is infinite, or empty; `weight`: `[n_out, n_in]` in its format's planes; `powers`:
        ///   `[n_out]`, of [`super::powers`]; `x`: `[n_tokens, n_in]`; `factors`: `[n_tokens]`, or empty for 1; `bias`:
        ///   `[n_out]`, or empty; `partial`, `counters`: what the [`Plan`] says, `counters` 0 before and after. `quads`: not
        ///   0 if rows of `out` start at multiples of 16 bytes. `epilogue`: [`super::STORE`], [`super::ADD`] (of `out`),
        ///   [`super::GELU_ERF`], [`super::GELU_TANH`].
        #[doc = concat!(" - Launch: that of a [`Plan`] of [`Shape::", stringify!($shape), "`]. The first `n_whole` blocks own a tile each; of each")]
        ///   tile after those `n_splits` blocks do `n_steps` steps each, and the last of them to arrive adds up and writes.
        ///   Step by step of 64 elements, all threads decode weights and bring `x`, one and more steps ahead.
        #[doc = concat!(" - Shared memory: ", stringify!($shape), "'s, ", $tiles, " of `x`; a barrier a step.")]
        /// - Cost: `2 · n_tokens · n_in · n_out` operations; for few tokens the bytes of `weight`.
        /// - Determinism: one fixed order of steps and splits; tensor cores order the 16 terms of a product themselves.
        /// - Source: PTX ISA, `mma.m16n8k16`, `wgmma.mma_async`; [`crate::format`].
        ///
        /// # Safety
        ///
        /// Launched as above; the slices have the shapes written above; `n_in` is a multiple of the format's block.
        #[kernel(threads = $shape::THREADS, blocks_per_sm = $blocks_per_sm, dynamic_shared = $bytes, waits $(, $mark)?)]
        #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
        pub unsafe fn $name(
            out: Disjoint<f32>,
            out16: Disjoint<f16>,
            weight: Global<u8>,
            powers: Global<f32>,
            x: Global<f16>,
            factors: Global<f32>,
            bias: Global<f32>,
            partial: Disjoint<f32>,
            counters: Atomics<u32>,
            n_tokens: u32,
            n_in: u32,
            n_out: u32,
            out_stride: u32,
            quads: u32,
            epilogue: u32,
            n_whole: u32,
            n_splits: u32,
            n_steps: u32,
        ) {
            let to = Parameters {
                out,
                out16,
                weight,
                powers,
                x,
                factors,
                bias,
                partial,
                counters,
                n_tokens,
                n_in,
                n_out,
                out_stride,
                quads,
                epilogue,
                n_whole,
                n_splits,
                n_steps,
            };
            // SAFETY: the launch contract is this kernel's own.
            unsafe { $run::<format::$format, $($size),*>(to) }
        }
    };
}

macro_rules! kernels {
    ($($format:ident: $warpgroups:ident, $wide:ident, $narrow:ident, $skinny:ident, $depth:literal;)+) => {
        $(
            kernel!(
                $warpgroups, $format, Warpgroups, 128, 256, "three tiles of weights and five", 1, warpgroups::BYTES,
                [warpgroups], rows_of_warpgroups::<$depth>
            );
            kernel!(
                $wide, $format, Wide, 128, 256, "two tiles of weights and two", 1, Wide::BYTES, [],
                rows::<4, 8, 2, 4, 2, 1, $depth>
            );
            kernel!(
                $narrow, $format, Narrow, 64, 64, "two tiles of weights and three", 4, Narrow::BYTES, [],
                rows::<2, 4, 2, 2, 3, 1, $depth>
            );
            kernel!(
                $skinny, $format, Skinny, 64, 16, "two tiles of weights and three", 4, Skinny::BYTES, [],
                rows::<1, 2, 4, 1, 3, 1, $depth>
            );
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[$($warpgroups::ENTRY, $wide::ENTRY, $narrow::ENTRY, $skinny::ENTRY),+];

        /// Starts the kernel for `format` and `plan`.
        ///
        /// # Errors
        ///
        /// Those of [`Launcher::launch`].
        ///
        /// # Safety
        ///
        /// Those of the kernel; the plan is for these arguments.
        #[cfg(not(target_arch = "nvptx64"))]
        pub unsafe fn run(
            format: WeightFormat,
            launcher: &dyn Launcher,
            plan: Plan,
            arguments: &Arguments,
        ) -> Result<(), LaunchError> {
            let entry = match (format, plan.shape) {
                $(
                    (WeightFormat::$format, Shape::Warpgroups) => $warpgroups::run,
                    (WeightFormat::$format, Shape::Wide) => $wide::run,
                    (WeightFormat::$format, Shape::Narrow) => $narrow::run,
                    (WeightFormat::$format, Shape::Skinny) => $skinny::run,
                )+
            };
            let to = arguments;
            let quads = to.out.address().is_multiple_of(16) && to.out_stride.is_multiple_of(4);
            // SAFETY: the caller's promise.
            unsafe {
                entry(
                    launcher,
                    plan.launch(),
                    to.out,
                    to.out16,
                    to.weight,
                    to.powers,
                    to.x,
                    to.factors,
                    to.bias,
                    to.partial,
                    to.counters,
                    plan.n_tokens,
                    plan.n_in,
                    plan.n_out,
                    to.out_stride,
                    quads.into(),
                    to.epilogue,
                    plan.n_whole,
                    plan.n_splits,
                    plan.n_steps,
                )
            }
        }
    };
}

kernels! {
    F32: matmul_warpgroups_f32, matmul_wide_f32, matmul_narrow_f32, matmul_skinny_f32, 1;
    F16: matmul_warpgroups_f16, matmul_wide_f16, matmul_narrow_f16, matmul_skinny_f16, 1;
    Bf16: matmul_warpgroups_bf16, matmul_wide_bf16, matmul_narrow_bf16, matmul_skinny_bf16, 1;
    Q4_0: matmul_warpgroups_q4_0, matmul_wide_q4_0, matmul_narrow_q4_0, matmul_skinny_q4_0, 2;
    Q4_1: matmul_warpgroups_q4_1, matmul_wide_q4_1, matmul_narrow_q4_1, matmul_skinny_q4_1, 2;
    Q5_0: matmul_warpgroups_q5_0, matmul_wide_q5_0, matmul_narrow_q5_0, matmul_skinny_q5_0, 2;
    Q5_1: matmul_warpgroups_q5_1, matmul_wide_q5_1, matmul_narrow_q5_1, matmul_skinny_q5_1, 2;
    Q8_0: matmul_warpgroups_q8_0, matmul_wide_q8_0, matmul_narrow_q8_0, matmul_skinny_q8_0, 2;
    Q2K: matmul_warpgroups_q2_k, matmul_wide_q2_k, matmul_narrow_q2_k, matmul_skinny_q2_k, 2;
    Q3K: matmul_warpgroups_q3_k, matmul_wide_q3_k, matmul_narrow_q3_k, matmul_skinny_q3_k, 2;
    Q4K: matmul_warpgroups_q4_k, matmul_wide_q4_k, matmul_narrow_q4_k, matmul_skinny_q4_k, 2;
    Q5K: matmul_warpgroups_q5_k, matmul_wide_q5_k, matmul_narrow_q5_k, matmul_skinny_q5_k, 2;
    Q6K: matmul_warpgroups_q6_k, matmul_wide_q6_k, matmul_narrow_q6_k, matmul_skinny_q6_k, 2;
    Mxfp4: matmul_warpgroups_mxfp4, matmul_wide_mxfp4, matmul_narrow_mxfp4, matmul_skinny_mxfp4, 2;
}

/// The slices and scalars of the kernels that do not follow from the [`Plan`].
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the kernels' comment has them")]
pub struct Arguments {
    pub out: DeviceSlice<f32>,
    pub out16: DeviceSlice<f16>,
    pub weight: DeviceSlice<u8>,
    pub powers: DeviceSlice<f32>,
    pub x: DeviceSlice<f16>,
    pub factors: DeviceSlice<f32>,
    pub bias: DeviceSlice<f32>,
    pub partial: DeviceSlice<f32>,
    pub counters: DeviceSlice<u32>,
    pub out_stride: u32,
    pub epilogue: u32,
}

/// Which kernels of a format.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Tiles of 128 rows and 256 tokens, by warpgroups.
    Warpgroups,
    /// Tiles of 128 rows and 256 tokens.
    Wide,
    /// Tiles of 64 rows and 64 tokens.
    Narrow,
    /// Tiles of 64 rows and 16 tokens.
    Skinny,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Shape {
    /// Rows, tokens and warps of a block, and how many blocks an SM holds.
    const fn sizes(self) -> [u32; 4] {
        match self {
            Self::Warpgroups => [Warpgroups::ROWS, Warpgroups::TOKENS, Warpgroups::WARPS, 1],
            Self::Wide => [Wide::ROWS, Wide::TOKENS, Wide::WARPS, 1],
            Self::Narrow => [Narrow::ROWS, Narrow::TOKENS, Narrow::WARPS, 4],
            Self::Skinny => [Skinny::ROWS, Skinny::TOKENS, Skinny::WARPS, 4],
        }
    }
}

/// Multiprocessors of the GPU that plans are made for, H100's. On others results are the same, to the bit, and the last
/// blocks less even.
#[cfg(not(target_arch = "nvptx64"))]
const MULTIPROCESSORS: u32 = 132;
/// The most blocks that share a tile.
#[cfg(not(target_arch = "nvptx64"))]
const MAX_SPLITS: u32 = 16;

/// How a product is cut into blocks.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    shape: Shape,
    n_tokens: u32,
    n_in: u32,
    n_out: u32,
    /// Tiles that one block does.
    n_whole: u32,
    /// The tiles after those, and how many blocks share each.
    n_shared: u32,
    n_splits: u32,
    /// Steps of each of them; the last may have fewer.
    n_steps: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Plan {
    /// The plan for these sizes, each at least 1; `warpgroups`: for a device that has them.
    pub const fn new(n_tokens: u32, n_in: u32, n_out: u32, warpgroups: bool) -> Self {
        let shape = match n_tokens {
            0..=16 => Shape::Skinny,
            17..=192 => Shape::Narrow,
            _ if warpgroups => Shape::Warpgroups,
            _ => Shape::Wide,
        };
        let [_, _, _, blocks_per_sm] = shape.sizes();
        let (n_tiles, slots) = (shape.n_tiles(n_tokens, n_out), MULTIPROCESSORS * blocks_per_sm);
        // Tiles that fill the device have a block each; what is left over is cut so that it fills it too.
        let n_whole = n_tiles / slots * slots;
        let (n_shared, steps) = (n_tiles - n_whole, n_in.div_ceil(STEP_GROUPS * GROUP));
        // The sums of a tile that each of its blocks writes and the last reads, in steps.
        let part = if matches!(shape, Shape::Skinny) { 1 } else { 3 };
        let (mut best, mut best_cost, mut n_splits) = (1, u32::MAX, 1);
        while n_splits <= MAX_SPLITS && n_splits <= steps {
            // In steps, one after the other on a multiprocessor: those of a block, what begins and ends it, and what it
            // costs to add up.
            let overhead = if n_splits == 1 { BLOCK_STEPS } else { BLOCK_STEPS + SPLIT_STEPS + part * n_splits };
            let cost = (n_shared * n_splits).div_ceil(slots) * (steps.div_ceil(n_splits) + overhead);
            if cost < best_cost {
                (best, best_cost) = (n_splits, cost);
            }
            n_splits += 1;
        }
        Self::with(shape, n_whole, best, n_tokens, n_in, n_out)
    }

    /// A plan of this shape with all tiles cut in `n_splits`, or as many as there are steps.
    pub const fn cut(shape: Shape, n_splits: u32, n_tokens: u32, n_in: u32, n_out: u32) -> Self {
        Self::with(shape, 0, n_splits, n_tokens, n_in, n_out)
    }

    const fn with(shape: Shape, n_whole: u32, n_splits: u32, n_tokens: u32, n_in: u32, n_out: u32) -> Self {
        let steps = n_in.div_ceil(STEP_GROUPS * GROUP);
        let n_steps = steps.div_ceil(n_splits);
        // No split without a step.
        let n_splits = steps.div_ceil(n_steps);
        let n_shared = shape.n_tiles(n_tokens, n_out) - n_whole;
        Self { shape, n_tokens, n_in, n_out, n_whole, n_shared, n_splits, n_steps }
    }

    /// Elements of `partial`.
    pub const fn partial_len(&self) -> usize {
        let [rows, tokens, ..] = self.shape.sizes();
        match self.n_splits {
            1 => 0,
            n_splits => (self.n_shared * n_splits) as usize * (rows * tokens) as usize,
        }
    }

    /// Elements of `counters`.
    pub const fn counters_len(&self) -> usize {
        if self.n_splits == 1 { 0 } else { self.n_shared as usize }
    }

    /// The launch.
    pub const fn launch(&self) -> Launch {
        let [_, _, warps, _] = self.shape.sizes();
        Launch { grid: [self.n_whole + self.n_shared * self.n_splits, 1, 1], block: [32, warps, 1] }
    }
}

/// What beginning and ending a block takes, in steps.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCK_STEPS: u32 = 4;
/// What meeting the other blocks of a tile takes, in steps.
#[cfg(not(target_arch = "nvptx64"))]
const SPLIT_STEPS: u32 = 2;

#[cfg(not(target_arch = "nvptx64"))]
impl Shape {
    const fn n_tiles(self, n_tokens: u32, n_out: u32) -> u32 {
        let [rows, tokens, ..] = self.sizes();
        n_out.div_ceil(rows) * n_tokens.div_ceil(tokens)
    }
}

/// What a block does: its seat in the tile, and steps `first..end` of it, alone or with other blocks.
struct Share {
    seat: Seat,
    place: Place,
    first: u32,
    end: u32,
    /// If with others: which of the tiles that are shared, and which of its blocks this is.
    shared: Option<(usize, u32)>,
}

impl Share {
    /// That of this thread: a block's tile has so many rows and tokens, and its warp starts at such a one.
    #[inline(always)]
    fn of_thread<F: Format>(to: Parameters, tiles: Shared<f16>, [rows, tokens]: [u32; 2], warp_seat: [u32; 2]) -> Self {
        let place = Place {
            weight: to.weight,
            planes: F::LAYOUT.planes(to.n_in as usize, to.n_out as usize),
            n_groups: to.n_in / GROUP,
        };
        let steps = place.n_groups.div_ceil(STEP_GROUPS);
        let block = thread::block_idx_x();
        let (tile, split) = match block.checked_sub(to.n_whole) {
            None => (block, 0),
            Some(block) => (to.n_whole + block / to.n_splits.max(1), block % to.n_splits.max(1)),
        };
        let shared = block >= to.n_whole && to.n_splits > 1;
        let (first, end) =
            if shared { (split * to.n_steps, (split * to.n_steps + to.n_steps).min(steps)) } else { (0, steps) };
        // Neighbouring blocks have neighbouring rows and the same tokens, whose activations the cache then holds.
        let row_tiles = to.n_out.div_ceil(rows).max(1);
        let seat = Seat {
            tiles,
            thread: thread::thread_idx_y() * 32 + thread::thread_idx_x(),
            first_row: tile % row_tiles * rows,
            first_token: tile / row_tiles * tokens,
            row: warp_seat[0],
            token: warp_seat[1],
        };
        let shared = if shared { Some(((tile - to.n_whole) as usize, split)) } else { None };
        Self { seat, place, first, end, shared }
    }
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
unsafe fn rows<
    F: Format,
    const MT: usize,
    const NT: usize,
    const WM: u32,
    const WN: u32,
    const STAGES: u32,
    const G: usize,
    const DEPTH: usize,
>(
    to: Parameters,
) {
    const { Tile::<MT, NT, WM, WN, STAGES>::FITS };
    let threads = Tile::<MT, NT, WM, WN, STAGES>::THREADS;
    let tiles = dynamic_shared_array!(matmul_rows_tiles: [f16; Tile::<MT, NT, WM, WN, STAGES>::HALVES as usize]);
    let size = const { [Tile::<MT, NT, WM, WN, STAGES>::ROWS, Tile::<MT, NT, WM, WN, STAGES>::TOKENS] };
    let warp = thread::thread_idx_y();
    let warp_seat = [
        warp % WM * Tile::<MT, NT, WM, WN, STAGES>::WARP_ROWS,
        warp / WM * Tile::<MT, NT, WM, WN, STAGES>::WARP_TOKENS,
    ];
    let Share { seat, place, first, end, shared } = Share::of_thread::<F>(to, tiles, size, warp_seat);
    // SAFETY: the launch contract; the conditions are the block's.
    unsafe {
        let mut sums = accumulate::<F, MT, NT, WM, WN, STAGES, G, DEPTH>(to, seat, &place, first, end);
        if let Some((tile, split)) = shared
            && !gather::<MT, NT>(to, seat.thread, threads, &mut sums, tile, split)
        {
            return;
        }
        thread::sync_threads();
        write::<MT, NT, WM, WN, STAGES>(to, seat, &sums);
    }
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
unsafe fn rows_of_warpgroups<F: Format, const DEPTH: usize>(to: Parameters) {
    let tiles = dynamic_shared_array!(matmul_rows_warpgroups: [f16; warpgroups::HALVES as usize]);
    let warp_seat = [thread::thread_idx_y() * Warpgroups::WARP_ROWS, 0];
    let size = [Warpgroups::ROWS, Warpgroups::TOKENS];
    let Share { seat, place, first, end, shared } = Share::of_thread::<F>(to, tiles, size, warp_seat);
    // SAFETY: the launch contract; the conditions are the block's.
    unsafe {
        let mut sums = warpgroups::accumulate::<F, DEPTH>(to, seat, &place, first, end);
        if let Some((tile, split)) = shared
            && !gather::<1, { warpgroups::EIGHTHS }>(to, seat.thread, Warpgroups::THREADS, &mut sums, tile, split)
        {
            return;
        }
        thread::sync_threads();
        write::<1, { warpgroups::EIGHTHS }, { Warpgroups::WARPS }, 1, { warpgroups::STAGES }>(to, seat, &sums);
    }
}
