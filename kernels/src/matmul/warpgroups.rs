//! The steps of [`rows`](super::rows) on Hopper: tiles in shared memory that two warpgroups multiply with `wgmma`.

use super::powers::inverse_of;
use super::rows::Parameters;
use super::tile::{STEP, STEP_GROUPS, Seat, Tile, load, step_inverses};
use crate::format::{Format, Place};
use cuda_std::{cp_async, grid, thread, wgmma};

/// 128 rows, 256 tokens: a warpgroup has 64 rows and all tokens. Tokens lie in five tiles: one that is multiplied, one before it that
/// products under way may still read, three to come. (Three warpgroups with tiles of 192 × 192 read less and were slower.)
pub(super) type Warpgroups = Tile<1, { EIGHTHS }, { THREADS / 32 }, 1, { STAGES }>;
/// Tokens by eight.
pub(super) const EIGHTHS: usize = 32;
const THREADS: u32 = 256;
pub(super) const STAGES: u32 = 5;
/// Of weights there are three, since they come a step ahead only; the third lies behind the tiles of [`Tile`].
pub(super) const HALVES: u32 = Warpgroups::HALVES + Warpgroups::WEIGHT_HALVES;
pub(super) const BYTES: u32 = 2 * HALVES;
const _: () = assert!(
    BYTES <= 226 * 1024 && Warpgroups::WEIGHT_HALVES.is_multiple_of(512) && Warpgroups::RESULT_HALVES <= HALVES
);

type Sums = [[[f32; 4]; EIGHTHS]; 1];

/// What changes from step to step.
struct Step {
    step: u32,
    /// Where its weights are, in halves, and those of the two steps after it.
    weights: [u32; 3],
    /// Which of the tiles of `x` it has.
    stage: u32,
}

/// The stage `n` behind `stage`.
#[inline(always)]
const fn after_stage(stage: u32, n: u32) -> u32 {
    if stage + n >= STAGES { stage + n - STAGES } else { stage + n }
}

/// As [`accumulate`](super::tile::accumulate()): the sums of steps `first..end` of this block's tile.
///
/// A thread decodes a group of 32 weights a step, loaded `DEPTH` steps ahead.
///
/// # Safety
///
/// As there.
#[inline(always)]
pub(super) unsafe fn accumulate<F: Format, const DEPTH: usize>(
    to: Parameters,
    seat: Seat,
    place: &Place,
    first: u32,
    end: u32,
) -> Sums {
    const { assert!(DEPTH == 1 || DEPTH == 2) };
    // A group is half a row of a tile; rows past the last repeat it, and their products are never written.
    let rows = [(seat.first_row + seat.thread / 2).min(to.n_out - 1)];
    let mut raws = [[F::EMPTY; 1]; DEPTH];
    let mut sums: Sums = [[[0.0; 4]; EIGHTHS]; 1];
    let third = Warpgroups::HALVES;
    // SAFETY: a barrier lies between the filling of a tile and its use, and between the end of products and the next filling of
    // what they read. What is read before the wait no launch beside this one writes.
    unsafe {
        raws[0] = load::<F, 1>(place, &rows, seat, first);
        let inverses = [inverse_of(to.powers.read_unchecked(rows[0] as usize))];
        if DEPTH > 1 && first + 1 < end {
            raws[1] = load::<F, 1>(place, &rows, seat, first + 1);
        }
        grid::wait();
        let mut stage = 0;
        while stage < STAGES - 2 {
            if first + stage < end {
                copy(to, seat, first + stage, stage);
            }
            cp_async::commit();
            stage += 1;
        }
        let [inverse] = step_inverses::<1>(&inverses, seat, place, first);
        let mut i = 0;
        while i < 4 {
            decode::<F>(&raws[0][0], inverse, seat, first, 0, i);
            i += 1;
        }
        cp_async::wait::<{ STAGES - 3 }>();
        wgmma::fence_proxy_async();
        thread::sync_threads();

        let mut now = Step { step: first, weights: [0, Warpgroups::WEIGHT_HALVES, third], stage: 0 };
        loop {
            step::<F, DEPTH, 0>(to, seat, place, &rows, &inverses, &mut raws, &mut sums, &mut now, end);
            if now.step >= end {
                break;
            }
            if DEPTH > 1 {
                step::<F, DEPTH, 1>(to, seat, place, &rows, &inverses, &mut raws, &mut sums, &mut now, end);
                if now.step >= end {
                    break;
                }
            }
        }
        wgmma::wait::<0>();
        cp_async::wait::<0>();
    }
    sums
}

/// Decodes quarter `i` of this thread's group into the tile of weights at `tile`.
///
/// # Safety
///
/// Nobody reads that tile.
#[inline(always)]
unsafe fn decode<F: Format>(raw: &F::Raw, inverse: f32, seat: Seat, step: u32, tile: u32, i: usize) {
    let (row, half) = (seat.thread / 2, seat.thread % 2);
    let scale = F::scale(raw, step * STEP_GROUPS + half, i / 2).map(|scale| scale * inverse);
    let chunk = (4 * half + i as u32) ^ (row % 8);
    // SAFETY: this piece of the row is this thread's.
    unsafe { seat.tiles.store16((tile + row * STEP + 8 * chunk) as usize, F::halves(raw, i, scale)) };
}

/// Asks for this thread's part of `x` for step `step`.
///
/// # Safety
///
/// Nobody reads tile `stage`; the step exists.
#[inline(always)]
unsafe fn copy(to: Parameters, seat: Seat, step: u32, stage: u32) {
    const AT_ONCE: u32 = THREADS / 8;
    const { assert!(AT_ONCE.is_multiple_of(8), "a thread's rows are equal mod 8") };
    let (row, chunk) = (seat.thread / 8, seat.thread % 8);
    // Behind the last element and token come the last again: weights are 0 there, and results are not written.
    let (k, last) = ((step * STEP + 8 * chunk).min(to.n_in - 8), to.n_tokens - 1 - seat.first_token);
    let tile = 2 * Warpgroups::WEIGHT_HALVES + stage * Warpgroups::X_HALVES + row * STEP + 8 * (chunk ^ (row % 8));
    let mut i = 0;
    while i < Warpgroups::TOKENS / AT_ONCE {
        let token = seat.first_token + (row + i * AT_ONCE).min(last);
        let from = token as usize * to.n_in as usize + k as usize;
        // SAFETY: token and element exist; rows are whole groups, so pieces are aligned.
        unsafe { seat.tiles.copy_async_if(true, (tile + i * AT_ONCE * STEP) as usize, to.x, from) };
        i += 1;
    }
}

/// One step: starts its products, and beside them decodes the next step's weights. `TURN` is the step's place in the ring of
/// raw groups.
///
/// # Safety
///
/// As [`accumulate`]; the step's tiles are filled and seen by all.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "all of it is needed")]
unsafe fn step<F: Format, const DEPTH: usize, const TURN: usize>(
    to: Parameters,
    seat: Seat,
    place: &Place,
    rows: &[u32; 1],
    inverses: &[f32; 1],
    raws: &mut [[F::Raw; 1]; DEPTH],
    sums: &mut Sums,
    now: &mut Step,
    end: u32,
) {
    let (slot, next) = ((TURN + 1) % DEPTH, now.step + 1);
    let [current, free, after] = now.weights;
    // SAFETY: the caller's promise. Past the last step what is decoded is stale, and nobody reads it.
    unsafe {
        let warpgroup_rows = seat.thread / 128 * (64 * STEP);
        let weights = seat.tiles.operand((current + warpgroup_rows) as usize);
        let x = seat.tiles.operand((2 * Warpgroups::WEIGHT_HALVES + now.stage * Warpgroups::X_HALVES) as usize);
        wgmma::fence();
        let mut quarter = 0;
        while quarter < 4 {
            wgmma::m64k16_f16_shared(&mut sums[0], weights.quarter(quarter), x.quarter(quarter));
            quarter += 1;
        }
        wgmma::commit();

        // The fence below waits for what is loaded: nothing is asked for shortly before it.
        let ahead = now.step + DEPTH as u32;
        if ahead < end {
            raws[TURN % DEPTH] = load::<F, 1>(place, rows, seat, ahead);
        }
        let (ahead, stage) = (now.step + STAGES - 2, after_stage(now.stage, STAGES - 2));
        if ahead < end {
            copy(to, seat, ahead, stage);
        }
        cp_async::commit();
        let [inverse] = step_inverses::<1>(inverses, seat, place, next);
        let mut i = 0;
        while i < 4 {
            decode::<F>(&raws[slot][0], inverse, seat, next, free, i);
            i += 1;
        }
        cp_async::wait::<{ STAGES - 3 }>();
        wgmma::fence_proxy_async();
        // This step's products stay under way over the barrier; those before are done.
        wgmma::wait::<1>();
        thread::sync_threads();
    }
    *now = Step { step: next, weights: [free, after, current], stage: after_stage(now.stage, 1) };
}
