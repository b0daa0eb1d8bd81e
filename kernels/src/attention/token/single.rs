//! For models with few query heads per KV head, and for the f32 cache: a query head a block, in f32 arithmetic.

use cuda_std::{Atomics, Disjoint, Float, Global, Shared, f16, grid, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

use super::{
    append, check_slot, divide, join, load_columns, load_frequencies, load_pairs, partial_of, score_of, turn, turns_of,
};
use crate::attention::single_query::{THREADS, attend, column_of};
use crate::attention::{CacheElement, NO_SCORE, Shape, Slots, normalizer, sink_of};

/// Keys of a split are multiples of this, so a short context takes few splits.
const UNIT: u32 = 64;
/// Two blocks for each of 132 SMs: 32 KB of keys and values under way on each.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS_WANTED: u32 = 264;
const FLAGS: usize = THREADS as usize;
/// A copy of the query for each warp, so that none waits for another.
const QUERIES: usize = 4 * 128;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[
    attention_token_f16_32::ENTRY,
    attention_token_f16_64::ENTRY,
    attention_token_f16_128::ENTRY,
    attention_token_f32_32::ENTRY,
    attention_token_f32_64::ENTRY,
    attention_token_f32_128::ENTRY,
];

/// How many splits a launch for contexts up to `n_keys` should have. A window bounds `n_keys`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn n_splits(n_keys: u32, n_head: u32) -> u32 {
    super::splits(n_keys, UNIT, n_head, BLOCKS_WANTED)
}

/// The one geometry the kernels of this file are written for. Its x is the number of counters.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_head: u32, n_splits: u32) -> Launch {
    Launch { grid: [n_head, n_splits, 1], block: [THREADS, 1, 1] }
}

macro_rules! attention_token {
    ($name:ident, $element:ty, $lanes:literal, $pairs:literal, [$q:ident, $flags:ident]) => {
        /// One token's attention, from `qkv` to output: rotary embedding, cache, softmax and all splits, for one query head a
        /// block.
        ///
        /// - Math: `i = state[0]`; where there are `frequencies`, queries and key are turned by `i` as
        ///   [`rope`](fn@crate::rope::rope) does, `magnitude` included. `k_cache[h, i mod n_slots] = k`, and v alike, rounded
        ///   once. `out[h, c] = Σⱼ pⱼ vⱼ[c] / (Σⱼ pⱼ + exp(z − M))`, `pⱼ = exp(scale · q·kⱼ − M)` over the visible j, the new
        ///   one as the cache has it, z: the head's sink, or −∞; M: the largest exponent. NaN where the cache cannot hold |x|.
        /// - Shapes: `out`: `[n_head, d_head]`, which says `n_head`; `partial`: [`partial_len`](super::partial_len)`(n_head, d_head, n_splits)`,
        ///   contents of no matter; `counters`: `[n_head]`, zero before the first launch and after each; `qkv`: `[1, (n_head +
        ///   2 n_head_kv) d_head]`; `k_new` and `k_cache`: one memory, `[n_head_kv, n_slots, d_head]`, written by the one name
        ///   and read by the other; `v_new`, `v_cache` alike; `state`: `[1]`, the token's position; `frequencies`: empty or
        ///   `[d_head / 2]`, made by [`frequency`](crate::rope::frequency); `sinks`: empty or `[n_head]`;
        ///   `n_slots_reciprocal`: [`reciprocal`](crate::attention::reciprocal)`(n_slots)`. A position past
        ///   `n_slots` traps, unless the cache is a ring: `window > 0` and `n_slots >= window`.
        /// - Launch: [`launch`]`(n_head, n_splits)`. 4, 8 or 16 lanes take a key, a lane 8 of its elements, four keys at a time.
        ///   The keys are divided among as many splits as have at least 64 each; the blocks of the others return.
        /// - Shared memory: 7.5 KB. One barrier, and two more to join splits.
        /// - Cost: memory bound, `2 · n_keys · n_head_kv · d_head` elements; query heads of a group share them through L2.
        /// - Determinism: one fixed order of operations, whichever block joins; rounding depends on `n_splits`.
        /// - Source: Dao et al., *Flash-Decoding for long-context inference*, 2023; Milakov, Gimelshein, *Online normalizer
        ///   calculation for softmax*, arXiv:1805.02867; OpenAI, *gpt-oss*, `torch/model.py` (`sdpa`) for the sink.
        ///
        /// # Safety
        ///
        /// Launched as above; the slices have the shapes written above and start at multiples of 16 bytes; `n_head_kv`
        /// divides `n_head`; `d_head` is a multiple of 8 within the name's bound; the visible positions before `state[0]` are
        /// in the cache; `1 <= n_splits <= `[`MAX_SPLITS`](super::MAX_SPLITS).
        #[kernel(threads = THREADS, blocks_per_sm = 4, waits)]
        pub unsafe fn $name(
            out: Disjoint<f32>,
            partial: Disjoint<f32>,
            counters: Atomics<u32>,
            qkv: Global<f32>,
            k_new: Disjoint<$element>,
            v_new: Disjoint<$element>,
            k_cache: Global<$element>,
            v_cache: Global<$element>,
            state: Global<u32>,
            frequencies: Global<u64>,
            sinks: Global<f32>,
            n_head_kv: u32,
            d_head: u32,
            n_slots: u32,
            n_slots_reciprocal: u64,
            window: u32,
            scale: f32,
            magnitude: f32,
        ) {
            let n_head = out.len() as u32 / d_head.max(1);
            let shape = Shape { n_head, n_head_kv, d_head, n_slots, window, scale };
            let shared = (shared_array!($q: [f32; QUERIES]), shared_array!($flags: [u32; FLAGS]));
            // SAFETY: the launch contract.
            unsafe {
                attend_token::<$element, $lanes, $pairs>(
                    out, partial, counters, qkv, [k_new, v_new], [k_cache, v_cache], state, frequencies, sinks, &shape,
                    n_slots_reciprocal, magnitude, shared,
                );
            }
        }
    };
}

attention_token!(attention_token_f16_32, f16, 4, 1, [token_query_f16_32, token_flags_f16_32]);
attention_token!(attention_token_f16_64, f16, 8, 1, [token_query_f16_64, token_flags_f16_64]);
attention_token!(attention_token_f16_128, f16, 16, 2, [token_query_f16_128, token_flags_f16_128]);
attention_token!(attention_token_f32_32, f32, 4, 1, [token_query_f32_32, token_flags_f32_32]);
attention_token!(attention_token_f32_64, f32, 8, 1, [token_query_f32_64, token_flags_f32_64]);
attention_token!(attention_token_f32_128, f32, 16, 2, [token_query_f32_128, token_flags_f32_128]);

/// `LANES` · 8 columns, `PAIRS` · 64 at least.
///
/// # Safety
///
/// The kernels'.
#[inline(always)]
unsafe fn attend_token<E: CacheElement, const LANES: u32, const PAIRS: usize>(
    out: Disjoint<f32>,
    partial: Disjoint<f32>,
    counters: Atomics<u32>,
    qkv: Global<f32>,
    [k_new, v_new]: [Disjoint<E>; 2],
    [k_cache, v_cache]: [Global<E>; 2],
    state: Global<u32>,
    frequencies: Global<u64>,
    sinks: Global<f32>,
    shape: &Shape,
    n_slots_reciprocal: u64,
    magnitude: f32,
    (queries, flags): (Shared<f32>, Shared<u32>),
) {
    let (head, split, n_splits) = (thread::block_idx_x(), thread::block_idx_y(), thread::grid_dim_y());
    let thread = thread::thread_idx_x();
    let (warp_idx, lane) = (thread / 32, thread % 32);
    let (d, half) = (shape.d_head, shape.d_head / 2);

    // Before the wait: what no launch writes.
    // SAFETY: the launch contract.
    let radians = unsafe { load_frequencies::<PAIRS>(frequencies, lane) };
    let sink = sink_of(sinks, head);
    // SAFETY: every thread is here.
    unsafe { grid::wait() };

    let position = state[0];
    let kv_head = shape.kv_head(head);
    // SAFETY: the head exists, and so below.
    let head_of = |head: u32| unsafe { qkv.row_unchecked(head as usize, d as usize) };
    let new_value = head_of(shape.n_head + shape.n_head_kv + kv_head);
    // Every warp has the whole query, and in split 0 the new key.
    // SAFETY: as above.
    let mut q = unsafe { load_pairs::<PAIRS>(head_of(head), half, lane) };
    let (mut key, mut value) = ([[0.0f32; 2]; PAIRS], 0.0);
    if split == 0 {
        // SAFETY: as above.
        unsafe {
            key = load_pairs(head_of(shape.n_head + kv_head), half, lane);
            value = if thread < d { new_value.read_unchecked(thread as usize) } else { 0.0 };
        }
    }
    let first_key = shape.first_key(position);
    let n_cached = position - first_key;
    let (length, in_use) = divide(n_cached, UNIT, n_splits);
    if split >= in_use {
        return; // The whole block leaves.
    }
    // Of the cached keys, counted from the first visible.
    let (begin, end) = (split * length, n_cached.min((split + 1) * length));
    let slots = Slots::without_division(shape, first_key, n_slots_reciprocal);

    let any = frequencies.len() > 0;
    let turns = turns_of(radians, any, position, magnitude);
    if any {
        (q, key) = (turn(q, turns), turn(key, turns));
    }
    let factor = shape.scale * core::f32::consts::LOG2_E;
    q = q.map(|pair| pair.map(|x| x * factor));
    let mut p = 0;
    while p < PAIRS {
        let column = lane + 32 * p as u32;
        if column < half {
            let to = (128 * warp_idx + column) as usize;
            // SAFETY: this lane's pair of its warp's copy.
            unsafe {
                queries.write(to, q[p][0]);
                queries.write(to + half as usize, q[p][1]);
            }
        }
        p += 1;
    }
    // SAFETY: all 32 lanes are here; `column_of + 8 <= d`, a multiple of 8.
    let eight = unsafe {
        warp::sync();
        let from = (128 * warp_idx + column_of::<LANES>(d)) as usize;
        [queries.load16(from), queries.load16(from + 4)]
    };

    let mut new_score = NO_SCORE;
    if split == 0 {
        // The first query head of a group writes for it.
        let group = shape.n_head / shape.n_head_kv.max(1);
        if warp_idx == 0 && head == kv_head * group {
            check_slot(k_new, shape, position);
            // SAFETY: the launch contract; no other block has this KV head's first query head and split 0.
            unsafe {
                let head_len = shape.n_slots as usize * d as usize;
                let (k, v) =
                    (k_new.row_unchecked(kv_head as usize, head_len), v_new.row_unchecked(kv_head as usize, head_len));
                append(k, v, slots.of(n_cached), d, key, load_columns(new_value, d, lane), lane);
            }
        }
        // SAFETY: whole warps are here.
        new_score = unsafe { score_of(q, key.map(|pair| pair.map(|x| E::round(x).value()))) };
    }

    // SAFETY: the launch contract; the block is whole.
    let column = unsafe {
        let (k, v) = (shape.head_of(k_cache, kv_head), shape.head_of(v_cache, kv_head));
        attend::<E, LANES>(f32::widen(eight), k, v, slots, begin, end, d)
    };
    let m = column.m.max(new_score);
    // NaN shows here, `max` ignores it.
    let is_new = new_score > NO_SCORE || new_score.is_nan();
    let (before, new) = (Float::exp2(column.m - m), if is_new { Float::exp2(new_score - m) } else { 0.0 });
    let l = column.l * before + new;
    let o = column.o * before + new * E::round(value).value();

    if in_use == 1 {
        if thread < d {
            // SAFETY: column `thread` of this head is this thread's alone.
            unsafe { out.write((head * d + thread) as usize, o * normalizer(m, l, sink)) };
        }
        return; // The whole block leaves.
    }
    let (to, sums) = partial_of(shape, head, split, n_splits);
    // SAFETY: these elements of this split's row are this thread's alone.
    unsafe {
        if thread < d {
            partial.write(to + thread as usize, o);
        }
        if thread < 2 {
            partial.write(sums + thread as usize, if thread == 0 { m } else { l });
        }
    }
    // SAFETY: the whole block is here; the blocks of `in_use` splits arrive at this head's counter.
    let is_last = unsafe { grid::is_last_block(counters, head as usize, in_use, flags) };
    if is_last && warp_idx == 0 {
        // SAFETY: a whole warp is here; all blocks have written their rows.
        unsafe {
            match PAIRS {
                1 => join::<2>(out, partial, shape, head, n_splits, in_use, sink, lane),
                _ => join::<4>(out, partial, shape, head, n_splits, in_use, sink, lane),
            }
        }
    }
}
