//! The end of [`rows`](super::rows): blocks that share a tile add up, and results are scaled and written.

use super::rows::Parameters;
use super::tile::{Seat, Tile};
use crate::matvec::{ADD, finish};
use cuda_std::{Disjoint, f16, grid, shared_array, warp};

/// The most threads of a block.
const MAX_THREADS: usize = 256;
/// Both factors of a product are scaled to below 2¹⁵: what is left of that once each has 2¹⁴ of it undone with its power.
const UNSCALE: f32 = 1.0 / (1 << 28) as f32;
const HALF_SCALE: f32 = (1 << 14) as f32;
/// Tokens that a lane writes out at a time.
const TOKENS_AT_ONCE: usize = 2;

/// Writes the block's sums beside those of the other blocks of tile `tile`; the last of them adds all, in their order, and
/// goes on alone.
///
/// # Safety
///
/// The whole block is here.
#[inline(always)]
pub(super) unsafe fn gather<const MT: usize, const NT: usize>(
    to: Parameters,
    thread: u32,
    threads: u32,
    sums: &mut [[[f32; 4]; NT]; MT],
    tile: usize,
    split: u32,
) -> bool {
    let quads = (MT * NT) as u32;
    let plane = |split: u32| (tile * to.n_splits as usize + split as usize) * (4 * quads * threads) as usize;
    let first = plane(split);
    // SAFETY: the place is this thread's; the last block reads what arrived before it.
    unsafe {
        let mut m = 0;
        while m < MT {
            let mut n = 0;
            while n < NT {
                let quad = (m * NT + n) as u32;
                to.partial.store16(first + (4 * (quad * threads + thread)) as usize, sums[m][n].map(f32::to_bits));
                n += 1;
            }
            m += 1;
        }
        let flags = shared_array!(matmul_rows_flags: [u32; MAX_THREADS]);
        if !grid::is_last_block(to.counters, tile, to.n_splits, flags) {
            return false;
        }
        *sums = [[[0.0; 4]; NT]; MT];
        let mut split = 0;
        while split < to.n_splits {
            let first = plane(split);
            let mut m = 0;
            while m < MT {
                let mut n = 0;
                while n < NT {
                    let quad = (m * NT + n) as u32;
                    let part = to.partial.load16(first + (4 * (quad * threads + thread)) as usize).map(f32::from_bits);
                    let sum = &mut sums[m][n];
                    *sum = [sum[0] + part[0], sum[1] + part[1], sum[2] + part[2], sum[3] + part[3]];
                    n += 1;
                }
                m += 1;
            }
            split += 1;
        }
    }
    true
}

/// Undoes the powers, adds the bias, and writes the warp's results by way of its part of shared memory: so a lane has four
/// neighbours of a token, and the epilogue stands in the code a few times and not once a sum.
///
/// # Safety
///
/// Whole warps are here; nobody uses the tiles any more.
#[inline(always)]
pub(super) unsafe fn write<const MT: usize, const NT: usize, const WM: u32, const WN: u32, const STAGES: u32>(
    to: Parameters,
    seat: Seat,
    sums: &[[[f32; 4]; NT]; MT],
) {
    let lane = seat.thread % 32;
    let mut factors = [[HALF_SCALE; 2]; NT];
    if to.factors.len() > 0 {
        let mut n = 0;
        while n < NT {
            let token = seat.first_token + seat.token + 8 * n as u32 + 2 * (lane % 4);
            // SAFETY: the token exists.
            factors[n] = unsafe {
                [
                    to.factors.read_unchecked(token.min(to.n_tokens - 1) as usize) * HALF_SCALE,
                    to.factors.read_unchecked((token + 1).min(to.n_tokens - 1) as usize) * HALF_SCALE,
                ]
            };
            n += 1;
        }
    }
    let mut powers = [[0.0; 2]; MT];
    let mut biases = [[0.0; 2]; MT];
    let mut m = 0;
    while m < MT {
        let row = seat.first_row + seat.row + 16 * m as u32 + lane / 4;
        let rows = [row.min(to.n_out - 1) as usize, (row + 8).min(to.n_out - 1) as usize];
        // SAFETY: the rows exist.
        unsafe {
            powers[m] = rows.map(|row| to.powers.read_unchecked(row) * HALF_SCALE);
            if to.bias.len() > 0 {
                biases[m] = rows.map(|row| to.bias.read_unchecked(row));
            }
        }
        m += 1;
    }

    let scales = Scales { factors, powers, biases };
    // SAFETY: the caller's promise. By constants, so that sums stay in registers.
    unsafe {
        write_pass::<MT, NT, WM, WN, STAGES, 0>(to, seat, sums, &scales);
        if MT > 2 {
            write_pass::<MT, NT, WM, WN, STAGES, 2>(to, seat, sums, &scales);
        }
    }
}

/// What a thread's sums are multiplied by and added to.
struct Scales<const MT: usize, const NT: usize> {
    factors: [[f32; 2]; NT],
    powers: [[f32; 2]; MT],
    biases: [[f32; 2]; MT],
}

/// [`write`] for the tiles of 16 rows from `DONE` on.
///
/// # Safety
///
/// As [`write`].
#[inline(always)]
unsafe fn write_pass<
    const MT: usize,
    const NT: usize,
    const WM: u32,
    const WN: u32,
    const STAGES: u32,
    const DONE: usize,
>(
    to: Parameters,
    seat: Seat,
    sums: &[[[f32; 4]; NT]; MT],
    scales: &Scales<MT, NT>,
) {
    let stride = Tile::<MT, NT, WM, WN, STAGES>::RESULT_STRIDE;
    let warp_tokens = Tile::<MT, NT, WM, WN, STAGES>::WARP_TOKENS;
    let pass_rows = Tile::<MT, NT, WM, WN, STAGES>::PASS_ROWS;
    let pass = Tile::<MT, NT, WM, WN, STAGES>::PASS;
    let lane = seat.thread % 32;
    // In halves, since the tiles are of them.
    let word = |token: u32, row: u32| 2 * ((seat.thread / 32 * warp_tokens + token) * stride + row) as usize;
    let quads = pass_rows / 4;
    let tokens_at_once = 32 / quads;
    let (quad, lane_token) = (lane % quads * 4, lane / quads);
    let mut m = 0;
    while m < pass {
        let mut n = 0;
        while n < NT {
            let (token, row) = (8 * n as u32 + 2 * (lane % 4), 16 * m as u32 + lane / 4);
            let (power, bias) = (scales.powers[DONE + m], scales.biases[DONE + m]);
            let sum = sums[DONE + m][n].map(|sum| sum * UNSCALE);
            let result = |i: usize| (sum[i] * power[i / 2] * scales.factors[n][i % 2] + bias[i / 2]).to_bits();
            // SAFETY: the part is this warp's, and each word one lane's.
            unsafe {
                seat.tiles.store4(word(token, row), result(0));
                seat.tiles.store4(word(token + 1, row), result(1));
                seat.tiles.store4(word(token, row + 8), result(2));
                seat.tiles.store4(word(token + 1, row + 8), result(3));
            }
            n += 1;
        }
        m += 1;
    }
    // SAFETY: whole warps are here.
    unsafe { warp::sync() };
    let o = seat.first_row + seat.row + 16 * DONE as u32 + quad;
    // Whether this lane's four columns are there, and can be read and written at once.
    let whole = to.quads != 0 && o + 4 <= to.n_out;
    if o < to.n_out {
        let end = to.n_tokens.saturating_sub(seat.first_token + seat.token).min(warp_tokens);
        let mut i = lane_token;
        while i < end {
            // Several tokens at a time, so that what they add to is asked for together.
            let mut results = [[0.0; 4]; TOKENS_AT_ONCE];
            let mut before = [[0.0; 4]; TOKENS_AT_ONCE];
            let mut t = 0;
            while t < TOKENS_AT_ONCE {
                let token = i + t as u32 * tokens_at_once;
                if token < end {
                    let start = (seat.first_token + seat.token + token) as usize * to.out_stride as usize + o as usize;
                    // SAFETY: written above; elements (token, o..o + 4) are this lane's alone.
                    unsafe {
                        results[t] = seat.tiles.load16(word(token, quad)).map(f32::from_bits);
                        if to.epilogue == ADD {
                            before[t] = load_quad(to.out, start, to.n_out - o, whole);
                        }
                    }
                }
                t += 1;
            }
            let mut t = 0;
            while t < TOKENS_AT_ONCE {
                let token = i + t as u32 * tokens_at_once;
                if token < end {
                    let start = (seat.first_token + seat.token + token) as usize * to.out_stride as usize + o as usize;
                    let mut j = 0;
                    while j < 4 {
                        results[t][j] = finish(to.epilogue, results[t][j], || before[t][j]);
                        j += 1;
                    }
                    // SAFETY: as above.
                    unsafe {
                        if to.out.len() > 0 {
                            store_quad(to.out, start, to.n_out - o, whole, results[t]);
                        }
                        if to.out16.len() > 0 {
                            store_quad16(to.out16, start, to.n_out - o, results[t]);
                        }
                    }
                }
                t += 1;
            }
            i += TOKENS_AT_ONCE as u32 * tokens_at_once;
        }
    }
    // SAFETY: as above.
    unsafe { warp::sync() };
}

/// Elements `start..start + 4`, or the first `n` of them; at once if `whole`.
///
/// # Safety
///
/// They exist; if `whole`, all four, from a multiple of 16 bytes on. Nobody writes them meanwhile.
#[inline(always)]
unsafe fn load_quad(from: Disjoint<f32>, start: usize, n: u32, whole: bool) -> [f32; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        if whole {
            return from.load16(start).map(f32::from_bits);
        }
        let mut quad = [0.0; 4];
        let mut j = 0;
        while j < 4 {
            if (j as u32) < n {
                quad[j] = from.read_unchecked(start + j);
            }
            j += 1;
        }
        quad
    }
}

/// Writes what [`load_quad`] reads.
///
/// # Safety
///
/// As [`load_quad`], and nobody else reads or writes them.
#[inline(always)]
unsafe fn store_quad(to: Disjoint<f32>, start: usize, n: u32, whole: bool, quad: [f32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        if whole {
            return to.store16(start, quad.map(f32::to_bits));
        }
        let mut j = 0;
        while j < 4 {
            if (j as u32) < n {
                to.write(start + j, quad[j]);
            }
            j += 1;
        }
    }
}

/// As [`store_quad`], rounded to f16.
///
/// # Safety
///
/// As [`store_quad`].
#[inline(always)]
unsafe fn store_quad16(to: Disjoint<f16>, start: usize, n: u32, quad: [f32; 4]) {
    let mut j = 0;
    while j < 4 {
        if (j as u32) < n {
            // SAFETY: the caller's promise.
            unsafe { to.write(start + j, f16::from_f32(quad[j])) };
        }
        j += 1;
    }
}
