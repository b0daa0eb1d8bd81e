//! Decoding: everything that one new token's attention is, in one launch.
//!
//! The token's queries and key are turned by its position, its key and value go to the cache, and the queries attend to the
//! cached keys and to the new one, which comes from `qkv` and not through memory: a softmax term of its own, in split 0.
//! Blocks take a range of the cached keys each, a *split*; the last of a head's to finish joins them
//! ([`grid::is_last_block`](cuda_std::grid::is_last_block)). Few keys, a window's above all, are one split: nothing is joined.

use cuda_std::{Disjoint, Float, Global, warp};

use super::{CacheElement, NO_SCORE, Shape};

pub mod grouped;
pub mod single;

/// The most splits of a head: a lane each, for the warp that joins them.
pub const MAX_SPLITS: u32 = 32;

/// So many units are one block's work even if there are more blocks: joining costs as much as three more rounds of loads.
const UNITS_OF_ONE_BLOCK: u32 = 4;
/// Splits whose outputs are under way at a time while they are joined.
const SPLITS_AT_ONCE: usize = 16;

/// How many splits a launch for contexts up to `n_keys` should have, in `unit`s of keys, when its grid is `blocks` wide
/// without them (x of the launch) and `wanted` fill the machine. A window bounds `n_keys`. At least 1, at most [`MAX_SPLITS`].
#[cfg(not(target_arch = "nvptx64"))]
const fn splits(n_keys: u32, unit: u32, blocks: u32, wanted: u32) -> u32 {
    let (units, affordable) = (n_keys.div_ceil(unit), wanted / blocks);
    if units <= UNITS_OF_ONE_BLOCK || affordable < 1 {
        return 1;
    }
    let n_splits = if units < affordable { units } else { affordable };
    if n_splits > MAX_SPLITS { MAX_SPLITS } else { n_splits }
}

/// Elements of `partial` for so many splits.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn partial_len(n_head: u32, d_head: u32, n_splits: u32) -> usize {
    if n_splits == 1 { 0 } else { n_head as usize * n_splits as usize * (d_head as usize + 2) }
}

/// Keys of a split, and how many of the launch's splits take part, at least one. Computed from the length of this moment, so
/// that a recorded launch spreads every context evenly.
#[inline(always)]
fn divide(n_keys: u32, unit: u32, n_splits: u32) -> (u32, u32) {
    let units = n_keys.div_ceil(unit);
    if units <= UNITS_OF_ONE_BLOCK {
        return (UNITS_OF_ONE_BLOCK * unit, 1);
    }
    if units <= n_splits {
        return (unit, units); // No division before the first load.
    }
    let units_per_split = units.div_ceil(n_splits.max(1)).max(1);
    (units_per_split * unit, units.div_ceil(units_per_split))
}

/// Where query head `head` of split `split` lies in `partial`: its output, and its maximum and sum.
#[inline(always)]
fn partial_of(shape: &Shape, head: u32, split: u32, n_splits: u32) -> (usize, usize) {
    let row = head * n_splits + split;
    ((row * shape.d_head) as usize, (shape.n_head * n_splits * shape.d_head + 2 * row) as usize)
}

/// `[frequency]` of a lane's pairs `lane + 32 p`; 0 past the last, and for a model without.
///
/// # Safety
///
/// `frequencies` starts at a multiple of 8 bytes.
#[inline(always)]
unsafe fn load_frequencies<const PAIRS: usize>(frequencies: Global<u64>, lane: u32) -> [u64; PAIRS] {
    core::array::from_fn(|p| {
        let i = lane as usize + 32 * p;
        if i >= frequencies.len() {
            return 0;
        }
        // SAFETY: inside, aligned as the caller promised.
        let [low, high] = unsafe { frequencies.load8(i) };
        u64::from(low) | u64::from(high) << 32
    })
}

/// Elements `i` and `i + d_head / 2` of a head, for a lane's pairs `i = lane + 32 p`; 0 past the last.
///
/// # Safety
///
/// `head` has `d_head` elements.
#[inline(always)]
unsafe fn load_pairs<const PAIRS: usize>(head: Global<f32>, half: u32, lane: u32) -> [[f32; 2]; PAIRS] {
    core::array::from_fn(|p| {
        let i = lane + 32 * p as u32;
        if i >= half {
            return [0.0; 2];
        }
        // SAFETY: `i + half < d_head`.
        unsafe { [head.read_unchecked(i as usize), head.read_unchecked((i + half) as usize)] }
    })
}

/// Elements `64 i + 32 j + lane` of a head; 0 past the last.
///
/// # Safety
///
/// `head` has `d_head` elements.
#[inline(always)]
unsafe fn load_columns<const PAIRS: usize>(head: Global<f32>, d_head: u32, lane: u32) -> [[f32; 2]; PAIRS] {
    core::array::from_fn(|i| {
        core::array::from_fn(|j| {
            let column = 64 * i as u32 + 32 * j as u32 + lane;
            // SAFETY: `column < d_head`.
            if column < d_head { unsafe { head.read_unchecked(column as usize) } } else { 0.0 }
        })
    })
}

/// `[cos, sin]` of a lane's pairs at `position`, times `magnitude`; no turn for a model without frequencies.
#[inline(always)]
fn turns_of<const PAIRS: usize>(
    frequencies: [u64; PAIRS],
    any: bool,
    position: u32,
    magnitude: f32,
) -> [[f32; 2]; PAIRS] {
    frequencies.map(|frequency| {
        if any {
            crate::rope::cos_sin(u64::from(position).wrapping_mul(frequency)).map(|x| x * magnitude)
        } else {
            [1.0, 0.0]
        }
    })
}

/// The pairs turned, as [`rope`](fn@crate::rope::rope) does.
#[inline(always)]
fn turn<const PAIRS: usize>(pairs: [[f32; 2]; PAIRS], turns: [[f32; 2]; PAIRS]) -> [[f32; 2]; PAIRS] {
    core::array::from_fn(|p| {
        let ([a, b], [cos, sin]) = (pairs[p], turns[p]);
        [a * cos - b * sin, b * cos + a * sin]
    })
}

/// The score of the new key: a lane has the same pairs of it and of the query.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
unsafe fn score_of<const PAIRS: usize>(q: [[f32; 2]; PAIRS], k: [[f32; 2]; PAIRS]) -> f32 {
    let (mut sum, mut p) = (0.0, 0);
    while p < PAIRS {
        sum += q[p][0] * k[p][0] + q[p][1] * k[p][1];
        p += 1;
    }
    // SAFETY: the caller's promise.
    unsafe { warp::sum(sum) }
}

/// Writes the new key, turned, and the new value to row `slot` of a KV head.
///
/// # Safety
///
/// All 32 lanes are here with their [`load_pairs`] and [`load_columns`]; the row is in `k` and `v`, and nobody else touches
/// it in this launch.
#[inline(always)]
unsafe fn append<E: CacheElement, const PAIRS: usize>(
    k: Disjoint<E>,
    v: Disjoint<E>,
    slot: u32,
    d_head: u32,
    key: [[f32; 2]; PAIRS],
    value: [[f32; 2]; PAIRS],
    lane: u32,
) {
    let (row, half) = ((slot * d_head) as usize, d_head / 2);
    let mut p = 0;
    while p < PAIRS {
        let mut j = 0;
        while j < 2 {
            let (i, column) = (lane + 32 * p as u32, 64 * p as u32 + 32 * j as u32 + lane);
            // SAFETY: these elements of the row are this lane's.
            unsafe {
                if i < half {
                    k.write(row + (i + half * j as u32) as usize, E::round(key[p][j]));
                }
                if column < d_head {
                    v.write(row + column as usize, E::round(value[p][j]));
                }
            }
            j += 1;
        }
        p += 1;
    }
}

/// Ends the launch if the token's position has no slot: the next head's rows lie there. As
/// [`kv_append_f16`](fn@super::kv_append::kv_append_f16).
#[inline(always)]
fn check_slot<E: CacheElement>(cache: Disjoint<E>, shape: &Shape, position: u32) {
    if position >= shape.n_slots && (shape.window == 0 || shape.n_slots < shape.window) {
        // A checked read past the end is a trap, and a fault in the emulator.
        let _ = cache.read(cache.len());
    }
}

/// Joins the splits of query head `head` into its output: lane c writes columns `c + 32 i`.
///
/// # Safety
///
/// All 32 lanes are here; the rows of `in_use` splits, at most [`MAX_SPLITS`], are written and can be read.
#[inline(always)]
unsafe fn join<const COLUMNS: usize>(
    out: Disjoint<f32>,
    partial: Disjoint<f32>,
    shape: &Shape,
    head: u32,
    n_splits: u32,
    in_use: u32,
    sink: f32,
    lane: u32,
) {
    let (output, sums) = partial_of(shape, head, 0, n_splits);
    let load_rows = |first: u32| -> [[f32; COLUMNS]; SPLITS_AT_ONCE] {
        core::array::from_fn(|step| {
            let split = (first + step as u32).min(in_use - 1);
            core::array::from_fn(|c| {
                let column = (lane + 32 * c as u32).min(shape.d_head - 1);
                // SAFETY: a split in use; `column < d_head`.
                unsafe { partial.read_unchecked(output + (split * shape.d_head + column) as usize) }
            })
        })
    };
    // All that is read is under way at once, if there are few splits.
    let mut rows = load_rows(0);
    let (mut m, mut l) = (NO_SCORE, 0.0);
    if lane < in_use {
        // SAFETY: the row of a split in use.
        unsafe {
            m = partial.read_unchecked(sums + 2 * lane as usize);
            l = partial.read_unchecked(sums + 2 * lane as usize + 1);
        }
    }
    // SAFETY: all 32 lanes are here.
    let largest = unsafe { warp::max_of::<32>(m) }.max(sink);
    let weight = Float::exp2(m - largest);
    // SAFETY: as above.
    let sum = unsafe { warp::sum(weight * l) } + Float::exp2(sink - largest);

    let mut o = [0.0f32; COLUMNS];
    let mut first = 0;
    while first < in_use {
        let mut step = 0;
        while step < SPLITS_AT_ONCE {
            // SAFETY: all 32 lanes are here: `in_use` is the block's. `first` is a multiple of 16 below 32.
            let of_split = unsafe { warp::shuffle(weight, first + step as u32) };
            let of_split = if first + (step as u32) < in_use { of_split } else { 0.0 };
            let mut c = 0;
            while c < COLUMNS {
                o[c] += of_split * rows[step][c];
                c += 1;
            }
            step += 1;
        }
        first += SPLITS_AT_ONCE as u32;
        if first < in_use {
            rows = load_rows(first);
        }
    }
    let mut c = 0;
    while c < COLUMNS {
        let column = lane + 32 * c as u32;
        if column < shape.d_head {
            // SAFETY: column `column` of the head's row is this lane's alone.
            unsafe { out.write((head * shape.d_head + column) as usize, o[c] / sum) };
        }
        c += 1;
    }
}
