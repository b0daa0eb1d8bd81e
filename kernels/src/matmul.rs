//! Matrix times matrix: many tokens against a weight matrix, as in prefill. Tensor cores.
//!
//! The kernels of this file scale each 32 neighbours, of weights as of f32 activations, by a power of two of their own, and
//! so hold any range; [`rows`] takes f16 activations and a power for each row, and is three times as fast on many tokens.

mod finish;
pub mod powers;
pub mod rows;
mod tile;
mod warpgroups;

#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use crate::matvec::finish;
pub use crate::matvec::{ADD, GELU_ERF, GELU_TANH, STORE};
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, Shared, f16, kernel, mma, pack_f16x2, shared_array, thread, warp};

/// Rows of the weight, and so columns of `out`, of a block.
pub(crate) const TILE_ROWS: u32 = 128;
/// Tokens of a block.
pub(crate) const TILE_TOKENS: u32 = 64;
pub(crate) const THREADS: u32 = 256;
/// Threads that decode weights, one row each; the others bring `x`.
pub(crate) const WEIGHT_THREADS: u32 = TILE_ROWS;
/// Halves from one row of a tile to the next: 8 more than the 32 it has, so that `ldmatrix` meets no bank twice.
const STRIDE: u32 = GROUP + 8;
/// Two of each tile: one is filled while the other is used.
pub(crate) const WEIGHT_HALVES: usize = (2 * TILE_ROWS * STRIDE) as usize;
pub(crate) const X_HALVES: usize = (2 * TILE_TOKENS * STRIDE) as usize;
pub(crate) const WEIGHT_POWERS: usize = 2 * TILE_ROWS as usize;
pub(crate) const X_POWERS: usize = 2 * TILE_TOKENS as usize;
/// Words from one token's 16 results to the next's when they are written out by way of the tile of weights, which they
/// just fill: 8 rows of 4 tokens, two apart, meet in no bank.
const RESULT_STRIDE: u32 = 20;
const _: () = assert!(2 * TILE_ROWS * STRIDE == 2 * THREADS * RESULT_STRIDE);
/// Quads of `x` a thread brings.
pub(crate) const X_QUADS: usize = 4;
const _: () = assert!((THREADS - WEIGHT_THREADS) / 8 == 16, "a thread's quads are 16 tokens apart");

/// The one geometry the kernels of this file are written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32, n_out: u32) -> Launch {
    let grid = [n_out.div_ceil(TILE_ROWS), n_tokens.div_ceil(TILE_TOKENS), 1];
    Launch { grid, block: [WARP_SIZE, THREADS / WARP_SIZE, 1] }
}

macro_rules! kernels {
    ($($name:ident: $format:ident, $blocks_per_sm:literal;)+) => {
        $(
            #[doc = concat!("Multiplies a matrix of type ", stringify!($format), " with the vectors of many tokens.")]
            ///
            /// - Math: `y[t, o] = Σᵢ weight[o, i] · x[t, i] + bias[o]`, then the epilogue. Each 32 neighbours of a row, of
            ///   `weight` as of `x`, are scaled by a power of two to below 4, rounded to f16, and multiplied with f32 sums;
            ///   the powers then scale the sum of those 32 in f32. So no finite weight or activation overflows, and what
            ///   f16 loses is relative to the largest of its 32 neighbours: 2⁻¹² at most from rounding, norm-wise about
            ///   3e-4 for a product. Infinite and NaN inputs give infinite or NaN outputs.
            /// - Shapes: `out`: `[n_tokens, n_out]`; `weight`: `[n_out, n_in]` in its format's planes; `x`:
            ///   `[n_tokens, n_in]`; `bias`: `[n_out]`, or empty. `epilogue`: [`STORE`], [`ADD`], [`GELU_ERF`],
            ///   [`GELU_TANH`].
            /// - Launch: [`launch`]`(n_tokens, n_out)`. A block owns 128 rows of `weight` and 64 tokens, a warp 32 × 32 of
            ///   them; step by step of 32 elements, half the warps decode weights and half bring `x`, one step ahead.
            /// - Shared memory: 31.5 KiB, two tiles of each operand; one barrier a step.
            /// - Cost: `2 · n_tokens · n_in · n_out` operations; compute bound from about 64 tokens on.
            /// - Determinism: one fixed order of steps; tensor cores order the 16 terms of a step themselves.
            /// - Source: PTX ISA, `mma.m16n8k16`; [`crate::format`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `n_in` is a multiple of the format's block.
            #[kernel(threads = THREADS, blocks_per_sm = $blocks_per_sm)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $name(
                out: Disjoint<f32>,
                weight: Global<u8>,
                x: Global<f32>,
                bias: Global<f32>,
                n_tokens: u32,
                n_in: u32,
                n_out: u32,
                epilogue: u32,
            ) {
                // SAFETY: the launch contract is this kernel's own.
                unsafe { matmul::<format::$format>(out, weight, x, bias, n_tokens, n_in, n_out, epilogue) }
            }
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[$($name::ENTRY),+];

        /// Starts the kernel for `format`.
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
            format: WeightFormat,
            launcher: &dyn Launcher,
            out: DeviceSlice<f32>,
            weight: DeviceSlice<u8>,
            x: DeviceSlice<f32>,
            bias: DeviceSlice<f32>,
            n_tokens: u32,
            n_in: u32,
            n_out: u32,
            epilogue: u32,
        ) -> Result<(), LaunchError> {
            let launch = launch(n_tokens, n_out);
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        $name::run(launcher, launch, out, weight, x, bias, n_tokens, n_in, n_out, epilogue)
                    })+
                }
            }
        }
    };
}

kernels! {
    matmul_f32: F32, 1;
    matmul_f16: F16, 2;
    matmul_bf16: Bf16, 2;
    matmul_q4_0: Q4_0, 2;
    matmul_q4_1: Q4_1, 2;
    matmul_q5_0: Q5_0, 2;
    matmul_q5_1: Q5_1, 2;
    matmul_q8_0: Q8_0, 2;
    matmul_q2_k: Q2K, 2;
    matmul_q3_k: Q3K, 2;
    matmul_q4_k: Q4K, 2;
    matmul_q5_k: Q5K, 2;
    matmul_q6_k: Q6K, 2;
    matmul_mxfp4: Mxfp4, 2;
}

/// The tiles of a block in shared memory, and the powers of two that were taken out of their rows.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    pub(crate) weight: Shared<f16>,
    pub(crate) x: Shared<f16>,
    pub(crate) weight_powers: Shared<f32>,
    pub(crate) x_powers: Shared<f32>,
}

/// What a thread has loaded for the next step; one of the two, by its role.
pub(crate) struct Ahead<F: Format> {
    pub(crate) raw: F::Raw,
    pub(crate) quads: [[u32; 4]; X_QUADS],
}

/// Which part of the work is this thread's.
#[derive(Clone, Copy)]
pub(crate) struct Share {
    /// This thread in the block.
    pub(crate) thread: u32,
    /// The block's first row and token.
    pub(crate) first_row: u32,
    pub(crate) first_token: u32,
    pub(crate) n_tokens: u32,
    pub(crate) n_in: u32,
    pub(crate) n_out: u32,
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' own")]
unsafe fn matmul<F: Format>(
    out: Disjoint<f32>,
    weight: Global<u8>,
    x: Global<f32>,
    bias: Global<f32>,
    n_tokens: u32,
    n_in: u32,
    n_out: u32,
    epilogue: u32,
) {
    let tiles = Tiles {
        weight: shared_array!(matmul_weight: [f16; WEIGHT_HALVES]),
        x: shared_array!(matmul_x: [f16; X_HALVES]),
        weight_powers: shared_array!(matmul_weight_powers: [f32; WEIGHT_POWERS]),
        x_powers: shared_array!(matmul_x_powers: [f32; X_POWERS]),
    };
    let share = Share {
        thread: thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x(),
        first_row: thread::block_idx_x() * TILE_ROWS,
        first_token: thread::block_idx_y() * TILE_TOKENS,
        n_tokens,
        n_in,
        n_out,
    };
    let place = Place { weight, planes: F::LAYOUT.planes(n_in as usize, n_out as usize), n_groups: n_in / GROUP };
    // A warp's 32 rows and 32 tokens in the tiles.
    let warp_idx = thread::thread_idx_y();
    let (row, token) = (warp_idx % 4 * 32, warp_idx / 4 * 32);

    let mut sums = [[[0.0; 4]; 4]; 2];
    // SAFETY: every thread of the block runs these steps, and a barrier lies between the filling of a tile and its use,
    // and between its use and its filling for the step after the next.
    unsafe {
        let mut ahead = share.load::<F>(&place, x, 0);
        share.fill(&ahead, 0, tiles);
        thread::sync_threads();
        let mut step = 0;
        while step < place.n_groups {
            let more = step + 1 < place.n_groups;
            if more {
                ahead = share.load(&place, x, step + 1);
            }
            multiply(&mut sums, tiles, step % 2, row, token, share);
            if more {
                share.fill(&ahead, step + 1, tiles);
            }
            thread::sync_threads();
            step += 1;
        }
        write(&sums, tiles, out, bias, share.first_row + row, share.first_token + token, n_tokens, n_out, epilogue);
    }
}

impl Share {
    /// Loads this thread's part of step `step`, without looking at it.
    ///
    /// # Safety
    ///
    /// The launch contract; the step exists.
    #[inline(always)]
    unsafe fn load<F: Format>(self, place: &Place, x: Global<f32>, step: u32) -> Ahead<F> {
        let mut ahead = Ahead { raw: F::EMPTY, quads: [[0; 4]; X_QUADS] };
        if self.thread < WEIGHT_THREADS {
            // Rows past the last repeat it: their products are never written.
            let row = (self.first_row + self.thread).min(self.n_out - 1);
            // SAFETY: the row exists.
            ahead.raw = unsafe { F::load(place, row as usize, step) };
        } else {
            let mut i = 0;
            while i < X_QUADS && self.wants_tokens(16 * i as u32) {
                let (token, quad) = self.x_place(i);
                // As with rows.
                let token = (self.first_token + token).min(self.n_tokens - 1);
                // SAFETY: the token exists; rows of x are whole groups, and so at multiples of 16 bytes.
                ahead.quads[i] =
                    unsafe { x.load16(token as usize * self.n_in as usize + (step * GROUP + 4 * quad) as usize) };
                i += 1;
            }
        }
        ahead
    }

    /// Whether any of the 16 tokens of the tile from `first` on exists: they are brought and multiplied together. The same
    /// for whole warps.
    #[inline(always)]
    fn wants_tokens(self, first: u32) -> bool {
        self.first_token + first < self.n_tokens
    }

    /// The token, in the tile, and quad of its group that is this thread's `i`th: 8 neighbouring lanes share a token.
    #[inline(always)]
    pub(crate) fn x_place(self, i: usize) -> (u32, u32) {
        let thread = self.thread - WEIGHT_THREADS;
        (thread / 8 + i as u32 * ((THREADS - WEIGHT_THREADS) / 8), thread % 8)
    }

    /// Decodes what was loaded for step `step` into the tile for even or odd steps.
    ///
    /// # Safety
    ///
    /// Whole warps are here; nobody reads that tile.
    #[inline(always)]
    pub(crate) unsafe fn fill<F: Format>(self, ahead: &Ahead<F>, step: u32, tiles: Tiles) {
        let buffer = step % 2;
        if self.thread < WEIGHT_THREADS {
            let row = buffer * TILE_ROWS + self.thread;
            let [power, inverse] = power_of_two(F::bound(&ahead.raw, step));
            let mut i = 0;
            while i < 4 {
                let scale = F::scale(&ahead.raw, step, i / 2);
                let [a, b, c, d] = F::decode(&ahead.raw, 2 * i, scale).map(|value| value * inverse);
                let [e, f, g, h] = F::decode(&ahead.raw, 2 * i + 1, scale).map(|value| value * inverse);
                let halves = [pack_f16x2(a, b), pack_f16x2(c, d), pack_f16x2(e, f), pack_f16x2(g, h)];
                // SAFETY: this row is this thread's; 80 bytes a row are whole 16 bytes.
                unsafe { tiles.weight.store16((row * STRIDE) as usize + 8 * i, halves) };
                i += 1;
            }
            // SAFETY: as above.
            unsafe { tiles.weight_powers.write(row as usize, power) };
        } else {
            let mut i = 0;
            while i < X_QUADS && self.wants_tokens(16 * i as u32) {
                let (token, quad) = self.x_place(i);
                let row = buffer * TILE_TOKENS + token;
                let [a, b, c, d] = ahead.quads[i].map(f32::from_bits);
                let largest = a.abs().max(b.abs()).max(c.abs().max(d.abs()));
                // SAFETY: the role is a whole warp's.
                let [power, inverse] = power_of_two(unsafe { warp::max_of::<8>(largest) });
                let at = (row * STRIDE + 4 * quad) as usize;
                // SAFETY: this quad is this thread's; the 8 lanes of a token write one power, each its own copy's turn.
                unsafe {
                    tiles.x.store4(at, pack_f16x2(a * inverse, b * inverse));
                    tiles.x.store4(at + 2, pack_f16x2(c * inverse, d * inverse));
                    if quad == 0 {
                        tiles.x_powers.write(row as usize, power);
                    }
                }
                i += 1;
            }
        }
    }
}

/// `[2ᵉ, 2⁻ᵉ]` such that `value · 2⁻ᵉ` is in 1..2, or below 4 at the end of the range, or below 1 at its start.
#[inline(always)]
fn power_of_two(value: f32) -> [f32; 2] {
    // From 2⁻¹²⁶ to 2¹²⁶, so that both are normal numbers. Infinity and NaN stay what they are through any of them.
    let exponent = (value.to_bits() & 0x7f80_0000).clamp(0x0080_0000, 0x7e80_0000);
    [f32::from_bits(exponent), f32::from_bits(0x7f00_0000 - exponent)]
}

/// Adds the products of one step to a warp's sums: `sums[m][n]` are the fragments of rows `16 m..` and tokens `8 n..`.
///
/// # Safety
///
/// Whole warps are here; tile `buffer` is filled.
#[inline(always)]
pub(crate) unsafe fn multiply(
    sums: &mut [[[f32; 4]; 4]; 2],
    tiles: Tiles,
    buffer: u32,
    row: u32,
    token: u32,
    share: Share,
) {
    let lane = thread::thread_idx_x();
    let (row, weight_row) = (buffer * TILE_ROWS + row, lane % 16);
    // Lanes 8 to 15 and 24 to 31 give the second 8 elements, lanes 16 to 31 the second 8 tokens.
    let (x_row, x_half) = (lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
    let x_tile = buffer * TILE_TOKENS + token;

    // SAFETY: the caller's promise; rows are at multiples of 16 bytes.
    unsafe {
        let mut a = [[[0; 4]; 2]; 2];
        let mut powers = [[0.0; 2]; 2];
        let mut m = 0;
        while m < 2 {
            let tile_row = row + 16 * m as u32;
            let at = (tile_row + weight_row) * STRIDE + lane / 16 * 8;
            a[m] = [tiles.weight.load_matrix_x4(at as usize), tiles.weight.load_matrix_x4(at as usize + 16)];
            let power_row = (tile_row + lane / 4) as usize;
            powers[m] = [tiles.weight_powers.read(power_row), tiles.weight_powers.read(power_row + 8)];
            m += 1;
        }
        let mut pair = 0;
        while pair < 2 && share.wants_tokens(token + 16 * pair as u32) {
            let first = 16 * pair as u32;
            let at = ((x_tile + first + x_row) * STRIDE + x_half) as usize;
            let (low, high) = (tiles.x.load_matrix_x4(at), tiles.x.load_matrix_x4(at + 16));
            let mut n = 0;
            while n < 2 {
                let power_row = (x_tile + first + 8 * n as u32 + 2 * (lane % 4)) as usize;
                let x_powers = [tiles.x_powers.read(power_row), tiles.x_powers.read(power_row + 1)];
                let mut m = 0;
                while m < 2 {
                    let products = mma::m16n8k16_f16(a[m][0], [low[2 * n], low[2 * n + 1]], [0.0; 4]);
                    let products = mma::m16n8k16_f16(a[m][1], [high[2 * n], high[2 * n + 1]], products);
                    let sums = &mut sums[m][2 * pair + n];
                    sums[0] += products[0] * powers[m][0] * x_powers[0];
                    sums[1] += products[1] * powers[m][0] * x_powers[1];
                    sums[2] += products[2] * powers[m][1] * x_powers[0];
                    sums[3] += products[3] * powers[m][1] * x_powers[1];
                    m += 1;
                }
                n += 1;
            }
            pair += 1;
        }
    }
}

/// Writes a warp's 32 × 32 results, by way of its part of shared memory: so neighbouring lanes write neighbours, and the
/// epilogue stands in the code twice and not 32 times.
///
/// # Safety
///
/// Whole warps are here; no other warp has the results; nobody uses the tile of weights any more.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "all of it is needed")]
unsafe fn write(
    sums: &[[[f32; 4]; 4]; 2],
    tiles: Tiles,
    out: Disjoint<f32>,
    bias: Global<f32>,
    row: u32,
    token: u32,
    n_tokens: u32,
    n_out: u32,
    epilogue: u32,
) {
    let lane = thread::thread_idx_x();
    // In halves, since the tile is of them. 32 tokens of 16 rows.
    let word = |token: u32, row: u32| 2 * ((thread::thread_idx_y() * 32 + token) * RESULT_STRIDE + row) as usize;
    let end = n_tokens.saturating_sub(token).min(32);
    let mut m = 0;
    while m < 2 {
        let mut n = 0;
        while n < 4 {
            let (token, row) = (8 * n as u32 + 2 * (lane % 4), lane / 4);
            let [a, b, c, d] = sums[m][n].map(f32::to_bits);
            // SAFETY: the part is this warp's, and each word one lane's.
            unsafe {
                tiles.weight.store4(word(token, row), a);
                tiles.weight.store4(word(token + 1, row), b);
                tiles.weight.store4(word(token, row + 8), c);
                tiles.weight.store4(word(token + 1, row + 8), d);
            }
            n += 1;
        }
        // SAFETY: whole warps are here.
        unsafe { warp::sync() };
        let o = (row + 16 * m as u32 + lane % 16) as usize;
        if o < n_out as usize {
            let bias = if bias.len() > 0 { bias[o] } else { 0.0 };
            let mut i = lane / 16;
            while i < end {
                // SAFETY: written above.
                let y = f32::from_bits(unsafe { tiles.weight.load4(word(i, lane % 16)) }) + bias;
                let at = (token + i) as usize * n_out as usize + o;
                // SAFETY: element (token + i, o) is this lane's alone.
                unsafe { out.write(at, finish(epilogue, y, || out.read(at))) };
                i += 2;
            }
        }
        // SAFETY: as above.
        unsafe { warp::sync() };
        m += 1;
    }
}
