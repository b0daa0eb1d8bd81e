//! The steps of [`rows`](super::rows): weights decoded and activations copied into shared memory, and multiplied there.

use super::powers::inverse_of;
use super::rows::Parameters;
use crate::format::{Format, GROUP, Place};
use cuda_std::{Shared, cp_async, f16, grid, mma, pack_f16x2, thread};

/// Elements of a row that a step multiplies: two groups, and 128 bytes of f16.
pub(super) const STEP: u32 = STEP_GROUPS * GROUP;
pub(super) const STEP_GROUPS: u32 = 2;

/// The shape of a block: `WM · WN` warps, each with `MT` tiles of 16 rows and `NT` tiles of 8 tokens, and `STAGES` tiles of
/// `x` in shared memory.
pub(super) struct Tile<const MT: usize, const NT: usize, const WM: u32, const WN: u32, const STAGES: u32>;

impl<const MT: usize, const NT: usize, const WM: u32, const WN: u32, const STAGES: u32> Tile<MT, NT, WM, WN, STAGES> {
    pub(super) const WARP_ROWS: u32 = 16 * MT as u32;
    pub(super) const WARP_TOKENS: u32 = 8 * NT as u32;
    pub(super) const ROWS: u32 = WM * Self::WARP_ROWS;
    pub(super) const TOKENS: u32 = WN * Self::WARP_TOKENS;
    pub(super) const WARPS: u32 = WM * WN;
    pub(super) const THREADS: u32 = 32 * Self::WARPS;
    pub(super) const WEIGHT_HALVES: u32 = Self::ROWS * STEP;
    pub(super) const X_HALVES: u32 = Self::TOKENS * STEP;
    /// Two tiles of weights, then those of `x`.
    pub(super) const HALVES: u32 = 2 * Self::WEIGHT_HALVES + STAGES * Self::X_HALVES;
    pub(super) const BYTES: u32 = 2 * Self::HALVES;
    /// Tiles of 16 rows that a warp writes out at a time, by way of shared memory.
    pub(super) const PASS: usize = if MT < 2 { MT } else { 2 };
    pub(super) const PASS_ROWS: u32 = 16 * Self::PASS as u32;
    /// Words from one token's results to the next's there: four more than it has, so that 8 rows of 4 tokens, two apart,
    /// meet in no bank.
    pub(super) const RESULT_STRIDE: u32 = Self::PASS_ROWS + 4;
    /// What the results of all warps take there.
    pub(super) const RESULT_HALVES: u32 = 2 * Self::WARPS * Self::WARP_TOKENS * Self::RESULT_STRIDE;
    pub(super) const FITS: () = assert!(Self::RESULT_HALVES <= Self::HALVES);
}

/// Where a thread is in its block's tiles.
#[derive(Clone, Copy)]
pub(super) struct Seat {
    pub(super) tiles: Shared<f16>,
    /// This thread in the block.
    pub(super) thread: u32,
    /// The block's first row and token.
    pub(super) first_row: u32,
    pub(super) first_token: u32,
    /// The warp's first row and token in the tile.
    pub(super) row: u32,
    pub(super) token: u32,
}

/// What changes from step to step: the step, and which tiles hold its operands.
struct Step {
    step: u32,
    /// Which of the two tiles of weights.
    weights: u32,
    /// Which of the tiles of `x`.
    stage: u32,
}

/// The sums of steps `first..end` of this block's tile, `first < end`. `sums[m][n]` are the fragments of rows `16 m..` and
/// tokens `8 n..` of the warp.
///
/// A thread decodes `G` groups of 32 weights a step, loaded `DEPTH` steps ahead.
///
/// # Safety
///
/// The whole block is here, with as many threads as the tile says; shapes are as the kernel's comment says.
#[inline(always)]
pub(super) unsafe fn accumulate<
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
    seat: Seat,
    place: &Place,
    first: u32,
    end: u32,
) -> [[[f32; 4]; NT]; MT] {
    const { assert!(G == MT / WN as usize && MT.is_multiple_of(WN as usize) && (DEPTH == 1 || DEPTH == 2)) };
    const { assert!(STAGES == 2 || STAGES == 3) };
    let threads = Tile::<MT, NT, WM, WN, STAGES>::THREADS;
    // The rows whose groups this thread decodes; those past the last repeat it, and their products are never written.
    let mut rows = [0u32; G];
    let mut g = 0;
    while g < G {
        rows[g] = (seat.first_row + (seat.thread + g as u32 * threads) / STEP_GROUPS).min(to.n_out - 1);
        g += 1;
    }
    let mut inverses = [0.0f32; G];
    let mut raws = [[F::EMPTY; G]; DEPTH];
    let mut sums = [[[0.0; 4]; NT]; MT];
    // SAFETY: a barrier lies between the filling of a tile and its use, and between its use and the next filling. What is
    // read before the wait no launch beside this one writes.
    unsafe {
        raws[0] = load::<F, G>(place, &rows, seat, first);
        let mut g = 0;
        while g < G {
            inverses[g] = inverse_of(to.powers.read_unchecked(rows[g] as usize));
            g += 1;
        }
        if DEPTH > 1 && first + 1 < end {
            raws[1] = load::<F, G>(place, &rows, seat, first + 1);
        }
        grid::wait();

        let mut stage = 0;
        while stage < STAGES {
            if first + stage < end {
                copy::<MT, NT, WM, WN, STAGES>(to, seat, first + stage, stage);
            }
            cp_async::commit();
            stage += 1;
        }
        let scales = step_inverses::<G>(&inverses, seat, place, first);
        decode::<F, G, 0>(&raws[0], &scales, seat, first, threads, 0);
        decode::<F, G, 1>(&raws[0], &scales, seat, first, threads, 0);
        decode::<F, G, 2>(&raws[0], &scales, seat, first, threads, 0);
        decode::<F, G, 3>(&raws[0], &scales, seat, first, threads, 0);
        if first + (DEPTH as u32) < end {
            raws[0] = load::<F, G>(place, &rows, seat, first + DEPTH as u32);
        }
        if STAGES == 2 {
            cp_async::wait::<1>();
        } else {
            cp_async::wait::<2>();
        }
        thread::sync_threads();

        let mut now = Step { step: first, weights: 0, stage: 0 };
        loop {
            step::<F, MT, NT, WM, WN, STAGES, G, DEPTH, 0>(
                to, seat, place, &rows, &inverses, &mut raws, &mut sums, &mut now, end,
            );
            if now.step >= end {
                break;
            }
            if DEPTH > 1 {
                step::<F, MT, NT, WM, WN, STAGES, G, DEPTH, 1>(
                    to, seat, place, &rows, &inverses, &mut raws, &mut sums, &mut now, end,
                );
                if now.step >= end {
                    break;
                }
            }
        }
        cp_async::wait::<0>();
    }
    sums
}

/// One step: multiplies its tiles while the next step's weights are decoded. `TURN` is the step's place in the ring of raw
/// groups.
///
/// # Safety
///
/// As [`accumulate`]; the step's tiles are filled and seen by all.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "all of it is needed")]
unsafe fn step<
    F: Format,
    const MT: usize,
    const NT: usize,
    const WM: u32,
    const WN: u32,
    const STAGES: u32,
    const G: usize,
    const DEPTH: usize,
    const TURN: usize,
>(
    to: Parameters,
    seat: Seat,
    place: &Place,
    rows: &[u32; G],
    inverses: &[f32; G],
    raws: &mut [[F::Raw; G]; DEPTH],
    sums: &mut [[[f32; 4]; NT]; MT],
    now: &mut Step,
    end: u32,
) {
    let threads = Tile::<MT, NT, WM, WN, STAGES>::THREADS;
    let slot = (TURN + 1) % DEPTH;
    let other_tile = (1 - now.weights) * Tile::<MT, NT, WM, WN, STAGES>::WEIGHT_HALVES;
    let (next, other, free) = (now.step + 1, 1 - now.weights, now.stage);
    // SAFETY: the caller's promise. Past the last step what is decoded is stale, and nobody reads it.
    unsafe {
        let (raw, scales) = (&raws[slot], step_inverses::<G>(inverses, seat, place, next));
        multiply(sums, &fragments::<MT, NT, WM, WN, STAGES, 0>(seat, now));
        decode::<F, G, 0>(raw, &scales, seat, next, threads, other_tile);
        multiply(sums, &fragments::<MT, NT, WM, WN, STAGES, 1>(seat, now));
        decode::<F, G, 1>(raw, &scales, seat, next, threads, other_tile);
        multiply(sums, &fragments::<MT, NT, WM, WN, STAGES, 2>(seat, now));
        decode::<F, G, 2>(raw, &scales, seat, next, threads, other_tile);
        decode::<F, G, 3>(raw, &scales, seat, next, threads, other_tile);
        let last = fragments::<MT, NT, WM, WN, STAGES, 3>(seat, now);
        let ahead = next + DEPTH as u32;
        if ahead < end {
            raws[slot] = load::<F, G>(place, rows, seat, ahead);
        }

        // The operands of the last quarter are in registers: this step's tiles are free once all are here, and those of
        // the next are filled. What follows runs beside the last quarter's products.
        if STAGES == 2 {
            cp_async::wait::<0>();
        } else {
            cp_async::wait::<1>();
        }
        thread::sync_threads();
        multiply(sums, &last);
        let ahead = next + (STAGES - 1);
        if ahead < end {
            copy::<MT, NT, WM, WN, STAGES>(to, seat, ahead, free);
        }
        cp_async::commit();
    }
    now.step = next;
    now.weights = other;
    now.stage = if free == STAGES - 1 { 0 } else { free + 1 };
}

/// Loads this thread's groups of step `step`, without looking at them.
///
/// # Safety
///
/// The step exists.
#[inline(always)]
pub(super) unsafe fn load<F: Format, const G: usize>(
    place: &Place,
    rows: &[u32; G],
    seat: Seat,
    step: u32,
) -> [F::Raw; G] {
    let mut raws = [F::EMPTY; G];
    // A row may end with half a step: its last group stands in, and is multiplied by 0.
    let group = (step * STEP_GROUPS + seat.thread % 2).min(place.n_groups - 1);
    let mut g = 0;
    while g < G {
        // SAFETY: row and group exist.
        raws[g] = unsafe { F::load(place, rows[g] as usize, group) };
        g += 1;
    }
    raws
}

/// What this thread's groups are multiplied with: 0 past the end of the rows.
#[inline(always)]
pub(super) fn step_inverses<const G: usize>(inverses: &[f32; G], seat: Seat, place: &Place, step: u32) -> [f32; G] {
    let exists = step * STEP_GROUPS + seat.thread % 2 < place.n_groups;
    inverses.map(|inverse| if exists { inverse } else { 0.0 })
}

/// Decodes elements `8 KK..8 KK + 8` of this thread's groups into the tile of weights at half `tile`.
///
/// # Safety
///
/// Nobody reads that tile.
#[inline(always)]
unsafe fn decode<F: Format, const G: usize, const KK: usize>(
    raws: &[F::Raw; G],
    inverses: &[f32; G],
    seat: Seat,
    step: u32,
    threads: u32,
    tile: u32,
) {
    let half = seat.thread % 2;
    let group = step * STEP_GROUPS + half;
    let mut g = 0;
    while g < G {
        let row = (seat.thread + g as u32 * threads) / 2;
        let scale = F::scale(&raws[g], group, KK / 2).map(|scale| scale * inverses[g]);
        let [a, b, c, d] = F::decode(&raws[g], 2 * KK, scale);
        let [e, f, h, i] = F::decode(&raws[g], 2 * KK + 1, scale);
        let halves = [pack_f16x2(a, b), pack_f16x2(c, d), pack_f16x2(e, f), pack_f16x2(h, i)];
        let chunk = (4 * half + KK as u32) ^ (row % 8);
        // SAFETY: this piece of the row is this thread's.
        unsafe { seat.tiles.store16((tile + row * STEP + 8 * chunk) as usize, halves) };
        g += 1;
    }
}

/// Asks for this thread's part of `x` for step `step`.
///
/// # Safety
///
/// Nobody reads tile `stage`.
#[inline(always)]
unsafe fn copy<const MT: usize, const NT: usize, const WM: u32, const WN: u32, const STAGES: u32>(
    to: Parameters,
    seat: Seat,
    step: u32,
    stage: u32,
) {
    let (first, chunk) = (seat.thread / 8, seat.thread % 8);
    let tile = 2 * Tile::<MT, NT, WM, WN, STAGES>::WEIGHT_HALVES + stage * Tile::<MT, NT, WM, WN, STAGES>::X_HALVES;
    let k = step * STEP + 8 * chunk;
    // A register and no constant, so that LLVM keeps the loop: unrolled, its addresses would take the registers of the sums.
    let rows_apart = thread::block_dim_y() * 4;
    const { assert!(Tile::<MT, NT, WM, WN, STAGES>::THREADS.is_multiple_of(64), "a thread's rows are equal mod 8") };
    let mut half = tile + first * STEP + 8 * (chunk ^ (first % 8));
    let mut from = (seat.first_token + first) as usize * to.n_in as usize + k as usize;
    let mut row = first;
    while row < Tile::<MT, NT, WM, WN, STAGES>::TOKENS {
        let exists = seat.first_token + row < to.n_tokens && k < to.n_in;
        // SAFETY: valid only where the token and its element exist; rows are whole groups, so pieces are aligned.
        unsafe { seat.tiles.copy_async(half as usize, to.x, from, exists) };
        row += rows_apart;
        half += rows_apart * STEP;
        from += (rows_apart * to.n_in) as usize;
    }
}

/// Operands of a quarter of a step, 16 elements, for a warp.
#[derive(Clone, Copy)]
struct Fragments<const MT: usize, const NT: usize> {
    a: [[u32; 4]; MT],
    b: [[u32; 2]; NT],
}

/// Loads quarter `KK`.
///
/// # Safety
///
/// Whole warps are here; the tiles are filled.
#[inline(always)]
unsafe fn fragments<
    const MT: usize,
    const NT: usize,
    const WM: u32,
    const WN: u32,
    const STAGES: u32,
    const KK: u32,
>(
    seat: Seat,
    now: &Step,
) -> Fragments<MT, NT> {
    let lane = seat.thread % 32;
    let weights = now.weights * Tile::<MT, NT, WM, WN, STAGES>::WEIGHT_HALVES + (seat.row + lane % 16) * STEP;
    let x = 2 * Tile::<MT, NT, WM, WN, STAGES>::WEIGHT_HALVES
        + now.stage * Tile::<MT, NT, WM, WN, STAGES>::X_HALVES
        + (seat.token + lane / 16 * 8 + lane % 8) * STEP;
    let weights = weights + 8 * ((2 * KK) ^ (lane / 16) ^ (lane % 8));
    let x = x + 8 * ((2 * KK) ^ (lane / 8 % 2) ^ (lane % 8));
    let mut fragments = Fragments { a: [[0; 4]; MT], b: [[0; 2]; NT] };
    // SAFETY: the caller's promise.
    unsafe {
        let mut n = 0;
        while n < NT / 2 {
            let [b0, b1, b2, b3] = seat.tiles.load_matrix_x4((x + 16 * n as u32 * STEP) as usize);
            fragments.b[2 * n] = [b0, b1];
            fragments.b[2 * n + 1] = [b2, b3];
            n += 1;
        }
        let mut m = 0;
        while m < MT {
            fragments.a[m] = seat.tiles.load_matrix_x4((weights + 16 * m as u32 * STEP) as usize);
            m += 1;
        }
    }
    fragments
}

/// Adds the products of a quarter of a step to the warp's sums.
///
/// # Safety
///
/// Whole warps are here.
#[inline(always)]
unsafe fn multiply<const MT: usize, const NT: usize>(sums: &mut [[[f32; 4]; NT]; MT], fragments: &Fragments<MT, NT>) {
    let mut m = 0;
    while m < MT {
        let mut n = 0;
        while n < NT {
            // SAFETY: the caller's promise.
            sums[m][n] = unsafe { mma::m16n8k16_f16(fragments.a[m], fragments.b[n], sums[m][n]) };
            n += 1;
        }
        m += 1;
    }
}
