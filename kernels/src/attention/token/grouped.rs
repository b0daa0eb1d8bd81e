//! For models with several query heads per KV head and an f16 cache: the heads of a group are rows of the tensor cores.

use cuda_std::{
    Atomics, Disjoint, Float, Global, Shared, cp_async, f16, grid, kernel, mma, pack_f16x2, shared_array, thread,
    unpack_f16x2, warp,
};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

use super::{
    append, check_slot, divide, join, load_columns, load_frequencies, load_pairs, partial_of, score_of, turn, turns_of,
};
use crate::attention::{CacheElement, NO_SCORE, Shape, Slots, nan_past_f16, normalizer, sink_of};

/// Query heads that a block takes: rows g of the tensor cores' 16, the other 8 being their low parts.
pub const HEADS_PER_BLOCK: u32 = 8;

/// Keys that a warp takes at a time: two n-tiles of scores, one k-step of `P V`.
const KEYS_PER_STEP: u32 = 16;
const THREADS_64: u32 = 256;
const THREADS_128: u32 = 128;
/// f16 elements of what a block has under way: 16 keys and values a warp.
const RING: usize = 16384;
/// 4 more than the columns: the lanes of a quarter warp then read different banks.
const QUERIES_64: usize = 8 * (64 + 4);
const QUERIES_128: usize = 8 * (128 + 4);
const SLOTS_64: usize = THREADS_64 as usize;
const SLOTS_128: usize = THREADS_128 as usize;
/// One block of 256 threads, or two of 128, for each of 132 SMs: 32 or 64 KB of keys and values under way on each.
#[cfg(not(target_arch = "nvptx64"))]
const THREADS_WANTED: u32 = 132 * 256;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[attention_token_grouped_f16_64::ENTRY, attention_token_grouped_f16_128::ENTRY];

#[cfg(not(target_arch = "nvptx64"))]
const fn threads(d_head: u32) -> u32 {
    if d_head <= 64 { THREADS_64 } else { THREADS_128 }
}

/// How many splits a launch for contexts up to `n_keys` should have. A window bounds `n_keys`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn n_splits(n_keys: u32, n_head: u32, n_head_kv: u32, d_head: u32) -> u32 {
    let unit = threads(d_head) / 32 * KEYS_PER_STEP;
    super::splits(n_keys, unit, launch(n_head, n_head_kv, d_head, 1).grid[0], THREADS_WANTED / threads(d_head))
}

/// The one geometry the kernels of this file are written for. Its x is the number of counters.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_head: u32, n_head_kv: u32, d_head: u32, n_splits: u32) -> Launch {
    let blocks_per_head = (n_head / n_head_kv).div_ceil(HEADS_PER_BLOCK);
    Launch { grid: [n_head_kv * blocks_per_head, n_splits, 1], block: [threads(d_head), 1, 1] }
}

macro_rules! attention_token_grouped {
    ($name:ident, $halves:literal, $heads:literal, $threads:ident, $blocks:literal, $queries:ident, $slots:ident,
     [$ring:ident, $q:ident, $m:ident, $l:ident, $flags:ident]) => {
        /// One token's attention, from `qkv` to output: rotary embedding, cache, softmax and all splits, for up to 8 query
        /// heads of one KV head a block, on tensor cores.
        ///
        /// - Math: as [`attention_token_f16_64`](fn@super::single::attention_token_f16_64). q and the softmax's numerators
        ///   enter the tensor cores as `high + low`, two f16 each, in the rows that a group of 8 heads leaves free: 21 bits,
        ///   at no cost.
        /// - Shapes: as there; `counters`: at least x of the launch.
        /// - Launch: [`launch`]`(n_head, n_head_kv, d_head, n_splits)`. A warp takes 16 keys at a time.
        /// - Shared memory: 38 KB: 16 keys and values a warp under way, the queries, and at the end the warps' outputs. The
        ///   order of columns in a product is free, so 16 bytes of the cache are a lane's operands as they lie. Two barriers, and
        ///   two more to join splits.
        /// - Cost: memory bound, `4 · n_keys · n_head_kv · d_head` bytes; short contexts, latency of three dependent loads.
        /// - Determinism: one fixed order of operations; tensor cores sum in their own, the same on every run.
        /// - Source: as there.
        ///
        /// # Safety
        ///
        /// As [`attention_token_f16_64`](fn@super::single::attention_token_f16_64), with this launch.
        #[kernel(threads = $threads, blocks_per_sm = $blocks, waits)]
        pub unsafe fn $name(
            out: Disjoint<f32>,
            partial: Disjoint<f32>,
            counters: Atomics<u32>,
            qkv: Global<f32>,
            k_new: Disjoint<f16>,
            v_new: Disjoint<f16>,
            k_cache: Global<f16>,
            v_cache: Global<f16>,
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
            let shared = BlockMemory {
                ring: shared_array!($ring: [f16; RING]),
                queries: shared_array!($q: [f32; $queries]),
                m: shared_array!($m: [f32; $slots]),
                l: shared_array!($l: [f32; $slots]),
                flags: shared_array!($flags: [u32; $slots]),
            };
            // SAFETY: the launch contract.
            unsafe {
                attend::<$halves, $heads>(
                    out, partial, counters, qkv, [k_new, v_new], [k_cache, v_cache], state, frequencies, sinks, &shape,
                    n_slots_reciprocal, magnitude, shared,
                );
            }
        }
    };
}

attention_token_grouped!(
    attention_token_grouped_f16_64,
    1,
    1,
    THREADS_64,
    2,
    QUERIES_64,
    SLOTS_64,
    [token_ring_64, token_queries_64, token_m_64, token_l_64, token_flags_64]
);
attention_token_grouped!(
    attention_token_grouped_f16_128,
    2,
    2,
    THREADS_128,
    2,
    QUERIES_128,
    SLOTS_128,
    [token_ring_128, token_queries_128, token_m_128, token_l_128, token_flags_128]
);

#[derive(Clone, Copy)]
struct BlockMemory {
    /// For each warp `[16 keys, 64 HALVES]` and values alike, swizzled; later `[8 heads, 64 HALVES]` of f32.
    ring: Shared<f16>,
    /// `[8 heads, 64 HALVES + 4]`, times `scale · log2 e`.
    queries: Shared<f32>,
    /// A thread each.
    m: Shared<f32>,
    l: Shared<f32>,
    flags: Shared<u32>,
}

/// `HALVES`: heads of up to 64 · `HALVES` columns; `HEADS` of them are a warp's to turn and to merge, so the block has
/// `8 / HEADS` warps.
///
/// Lane (g, t), g = lane / 4, has columns `64 i + 32 j + 8 t ..+ 8` of key g as operands of `Q Kᵀ` (i: half, j: 0, 1), and
/// columns `64 i + 8 g ..+ 8` of keys 2t, 2t + 1, 2t + 8, 2t + 9 as operands of `P V`, whose n-tile c thus holds columns
/// `8 n + c`.
///
/// # Safety
///
/// The kernels'.
#[inline(always)]
unsafe fn attend<const HALVES: usize, const HEADS: usize>(
    out: Disjoint<f32>,
    partial: Disjoint<f32>,
    counters: Atomics<u32>,
    qkv: Global<f32>,
    [k_new, v_new]: [Disjoint<f16>; 2],
    [k_cache, v_cache]: [Global<f16>; 2],
    state: Global<u32>,
    frequencies: Global<u64>,
    sinks: Global<f32>,
    shape: &Shape,
    n_slots_reciprocal: u64,
    magnitude: f32,
    shared: BlockMemory,
) {
    let warps = 8 / HEADS as u32;
    let (split, n_splits) = (thread::block_idx_y(), thread::grid_dim_y());
    let heads_per_kv_head = shape.n_head / shape.n_head_kv.max(1);
    let blocks_per_kv_head = heads_per_kv_head.div_ceil(HEADS_PER_BLOCK).max(1);
    let kv_head = thread::block_idx_x() / blocks_per_kv_head;
    let first_in_group = thread::block_idx_x() % blocks_per_kv_head * HEADS_PER_BLOCK;
    let first_head = kv_head * heads_per_kv_head + first_in_group;
    let n_heads = (heads_per_kv_head - first_in_group).min(HEADS_PER_BLOCK);

    let thread = thread::thread_idx_x();
    let (warp_idx, lane) = (thread / 32, thread % 32);
    let (g, t) = (lane / 4, lane % 4);
    let (d, half) = (shape.d_head, shape.d_head / 2);
    let width = 64 * HALVES as u32;

    // Before the wait: what no launch writes. This warp's heads are rows `warp_idx`, `warp_idx + warps`; rows past the last
    // head repeat it.
    let row_of = |i: usize| warp_idx + warps * i as u32;
    let head_of = |i: usize| first_head + row_of(i).min(n_heads - 1);
    // SAFETY: the launch contract.
    let radians = unsafe { load_frequencies::<HALVES>(frequencies, lane) };
    let sink: [f32; HEADS] = core::array::from_fn(|i| sink_of(sinks, head_of(i)));
    // SAFETY: every thread is here.
    unsafe { grid::wait() };

    let position = state[0];
    // SAFETY: the heads exist.
    let head = |head: u32| unsafe { qkv.row_unchecked(head as usize, d as usize) };
    // SAFETY: as above.
    let mut q: [[[f32; 2]; HALVES]; HEADS] =
        core::array::from_fn(|i| unsafe { load_pairs(head(head_of(i)), half, lane) });
    // The new key and value are split 0's.
    let (mut key, mut value) = ([[0.0f32; 2]; HALVES], [[0.0f32; 2]; HALVES]);
    if split == 0 {
        // SAFETY: as above.
        unsafe {
            key = load_pairs(head(shape.n_head + kv_head), half, lane);
            value = load_columns(head(shape.n_head + shape.n_head_kv + kv_head), d, lane);
        }
    }
    let first_key = shape.first_key(position);
    let n_cached = position - first_key;
    let (length, in_use) = divide(n_cached, warps * KEYS_PER_STEP, n_splits);
    if split >= in_use {
        return; // The whole block leaves.
    }
    // Of the cached keys, counted from the first visible.
    let (begin, end) = (split * length, n_cached.min((split + 1) * length));
    let slots = Slots::without_division(shape, first_key, n_slots_reciprocal);
    // SAFETY: the launch contract.
    let (k, v) = unsafe { (shape.head_of(k_cache, kv_head), shape.head_of(v_cache, kv_head)) };

    // A warp copies whole rows, for whole cache lines, 8 elements a lane; rows of values lie behind the keys'.
    let ring = warp_idx * (2048 * HALVES as u32);
    let chunks = 8 * HALVES as u32;
    let (copy_row, copy_chunk) = (lane / chunks, lane % chunks);
    let copy_step = |at: u32| {
        let mut i = 0;
        while i < 4 * HALVES as u32 {
            let row = copy_row + 32 / chunks * i;
            let (key, column) = (at + row, 8 * copy_chunk);
            let from = (slots.of(key) * d + column) as usize;
            // Keys past the end, and columns past the last, become zero.
            let valid = key < end && column < d;
            let key_to = ring + (row * chunks + (copy_chunk ^ key_swizzle(row))) * 8;
            let value_to = ring + ((16 + row) * chunks + (copy_chunk ^ value_swizzle(row))) * 8;
            // SAFETY: 16 bytes that the warp has read; if valid, inside the cache and a multiple of 8 elements.
            unsafe {
                shared.ring.copy_async(key_to as usize, k, from, valid);
                shared.ring.copy_async(value_to as usize, v, from, valid);
            }
            i += 1;
        }
        cp_async::commit();
    };
    let mut at = begin + warp_idx * KEYS_PER_STEP;
    if at < end {
        copy_step(at); // A whole warp is here: `at` is the same for its lanes.
    }

    // Queries in f32, turned and scaled, to where every warp finds them.
    let any = frequencies.len() > 0;
    let turns = turns_of(radians, any, position, magnitude);
    let factor = shape.scale * core::f32::consts::LOG2_E;
    let mut i = 0;
    while i < HEADS {
        if any {
            q[i] = turn(q[i], turns);
        }
        q[i] = q[i].map(|pair| pair.map(|x| x * factor));
        let mut p = 0;
        while p < HALVES {
            let column = lane + 32 * p as u32;
            if column < half {
                let to = (row_of(i) * (width + 4) + column) as usize;
                // SAFETY: this lane's pair of this warp's row.
                unsafe {
                    shared.queries.write(to, q[i][p][0]);
                    shared.queries.write(to + half as usize, q[i][p][1]);
                }
            }
            p += 1;
        }
        i += 1;
    }
    // SAFETY: the whole block is here.
    unsafe { thread::sync_threads() };

    let mut new_score = [NO_SCORE; HEADS];
    if split == 0 {
        if any {
            key = turn(key, turns);
        }
        // A KV head may have a second block of query heads.
        if warp_idx == 0 && first_in_group == 0 {
            check_slot(k_new, shape, position);
            // SAFETY: the launch contract; no other block has this KV head and split 0.
            unsafe {
                let head_len = shape.n_slots as usize * d as usize;
                let (k, v) =
                    (k_new.row_unchecked(kv_head as usize, head_len), v_new.row_unchecked(kv_head as usize, head_len));
                append(k, v, slots.of(n_cached), d, key, value, lane);
            }
        }
        let rounded = key.map(|pair| pair.map(|x| f16::round(x).value()));
        let mut i = 0;
        while i < HEADS {
            // SAFETY: whole warps are here.
            new_score[i] = unsafe { score_of(q[i], rounded) };
            i += 1;
        }
        value = value.map(|pair| pair.map(|x| f16::round(x).value()));
    }

    // Rows g: the high parts; rows g + 8: the low.
    let q: [[[[u32; 4]; 2]; 2]; HALVES] = core::array::from_fn(|i| {
        core::array::from_fn(|j| {
            let column = 64 * i as u32 + 32 * j as u32 + 8 * t;
            let from = (g * (width + 4) + column.min(d - 8)) as usize;
            // SAFETY: written before the barrier; a multiple of 4 elements.
            let eight = unsafe { [shared.queries.load16(from), shared.queries.load16(from + 4)] };
            let keep = if column < d { 1.0 } else { 0.0 };
            let [a, b, c, d, e, f, g, h] = f32::widen(eight).map(|x| nan_past_f16(x * keep));
            let [[ab, ab_low], [cd, cd_low], [ef, ef_low], [gh, gh_low]] =
                [split_pair(a, b), split_pair(c, d), split_pair(e, f), split_pair(g, h)];
            [[ab, ab_low, cd, cd_low], [ef, ef_low, gh, gh_low]]
        })
    });

    let (mut m, mut l) = (NO_SCORE, 0.0);
    let mut o = [[[0.0f32; 4]; 8]; HALVES];
    while at < end {
        // A whole warp is here: `at` is the same for its lanes.
        cp_async::wait::<0>();
        // SAFETY: all 32 lanes are here, and each has waited for its copies.
        unsafe { warp::sync() };
        let keys: [[[[u32; 4]; 2]; HALVES]; 2] = core::array::from_fn(|tile| {
            core::array::from_fn(|i| {
                core::array::from_fn(|j| {
                    let (row, chunk) = (8 * tile as u32 + g, (8 * i + 4 * j) as u32 + t);
                    // SAFETY: copied, waited for, and past the warp's barrier.
                    unsafe { shared.ring.load16((ring + (row * chunks + (chunk ^ key_swizzle(row))) * 8) as usize) }
                })
            })
        });
        let values: [[[u32; 4]; 4]; HALVES] = core::array::from_fn(|i| {
            core::array::from_fn(|n| {
                let (row, chunk) = (2 * t + n as u32 % 2 + 8 * (n as u32 / 2), 8 * i as u32 + g);
                let from = ring + ((16 + row) * chunks + (chunk ^ value_swizzle(row))) * 8;
                // SAFETY: as above.
                unsafe { shared.ring.load16(from as usize) }
            })
        });
        // SAFETY: all 32 lanes are here, and have their operands: the ring takes the next.
        unsafe { warp::sync() };
        let next = at + warps * KEYS_PER_STEP;
        if next < end {
            copy_step(next);
        }

        let mut s = [[0.0f32; 2]; 2];
        let mut tile = 0;
        while tile < 2 {
            let mut sum = [0.0f32; 4];
            let mut i = 0;
            while i < HALVES {
                let mut j = 0;
                while j < 2 {
                    let key = keys[tile][i][j];
                    // SAFETY: all 32 lanes are here.
                    unsafe {
                        sum = mma::m16n8k16_f16(q[i][j][0], [key[0], key[1]], sum);
                        sum = mma::m16n8k16_f16(q[i][j][1], [key[2], key[3]], sum);
                    }
                    j += 1;
                }
                i += 1;
            }
            let key = at + 8 * tile as u32 + 2 * t;
            s[tile][0] = if key < end { sum[0] + sum[2] } else { f32::NEG_INFINITY };
            s[tile][1] = if key + 1 < end { sum[1] + sum[3] } else { f32::NEG_INFINITY };
            tile += 1;
        }

        // SAFETY: all 32 lanes are here.
        let m_new = m.max(unsafe { warp::max_of::<4>(s[0][0].max(s[0][1]).max(s[1][0].max(s[1][1]))) });
        let correction = Float::exp2(m - m_new);
        m = m_new;
        let p = s.map(|pair| pair.map(|s| Float::exp2(s - m)));
        l = l * correction + (p[0][0] + p[0][1]) + (p[1][0] + p[1][1]);
        let ([p0, p0_low], [p1, p1_low]) = (split_pair(p[0][0], p[0][1]), split_pair(p[1][0], p[1][1]));
        let mut i = 0;
        while i < HALVES {
            let mut c = 0;
            while c < 8 {
                // Rows g and g + 8 are the same head, so they share the correction.
                let before = o[i][c].map(|o| o * correction);
                let [v0, v1, v2, v3] = [0, 1, 2, 3].map(|n: usize| values[i][n][c / 2]);
                let pairs = if c % 2 == 0 {
                    [v0 & 0xffff | v1 << 16, v2 & 0xffff | v3 << 16]
                } else {
                    [v0 >> 16 | v1 & 0xffff_0000, v2 >> 16 | v3 & 0xffff_0000]
                };
                // SAFETY: all 32 lanes are here.
                o[i][c] = unsafe { mma::m16n8k16_f16([p0, p0_low, p1, p1_low], pairs, before) };
                c += 1;
            }
            i += 1;
        }
        at = next;
    }

    // The warp's part of the ring becomes its outputs, f32 in place of pairs of f16.
    // SAFETY: all 32 lanes are here, and have read their last copies: a barrier of the warp lies behind that.
    l = unsafe { warp::sum_of::<4>(l) };
    let mut i = 0;
    while i < HALVES {
        let mut n = 0;
        while n < 2 {
            let sum: [u32; 8] = core::array::from_fn(|c| (o[i][c][n] + o[i][c][n + 2]).to_bits());
            let to = (ring + 2 * (g * width + 64 * i as u32 + 8 * (2 * t + n as u32))) as usize;
            // SAFETY: these eight columns of the row are this lane's alone.
            unsafe {
                shared.ring.store16(to, [sum[0], sum[1], sum[2], sum[3]]);
                shared.ring.store16(to + 8, [sum[4], sum[5], sum[6], sum[7]]);
            }
            n += 1;
        }
        i += 1;
    }
    // SAFETY: own elements; the whole block reaches the barrier.
    unsafe {
        shared.m.write(thread as usize, m);
        shared.l.write(thread as usize, l);
        thread::sync_threads();
    }

    let mut i = 0;
    while i < HEADS {
        // SAFETY: written before the barrier.
        let merged = unsafe { merge_warps::<HALVES>(shared, warps, row_of(i), new_score[i], value, lane) };
        if row_of(i) < n_heads {
            let head = head_of(i);
            let (to, sums) = partial_of(shape, head, split, n_splits);
            let factor = normalizer(merged.m, merged.l, sink[i]);
            let mut c = 0;
            while c < 2 * HALVES {
                let column = 32 * c as u32 + lane;
                let o = merged.o[c / 2][c % 2];
                // SAFETY: this column of the head is this lane's alone.
                unsafe {
                    if column < d && in_use == 1 {
                        out.write((head * d + column) as usize, o * factor);
                    } else if column < d {
                        partial.write(to + column as usize, o);
                    }
                }
                c += 1;
            }
            if in_use > 1 && lane < 2 {
                // SAFETY: this lane's alone.
                unsafe { partial.write(sums + lane as usize, if lane == 0 { merged.m } else { merged.l }) };
            }
        }
        i += 1;
    }
    if in_use == 1 {
        return; // The whole block leaves.
    }
    // SAFETY: the whole block is here; the blocks of `in_use` splits arrive at this group's counter.
    if unsafe { grid::is_last_block(counters, thread::block_idx_x() as usize, in_use, shared.flags) } {
        let mut i = 0;
        while i < HEADS {
            if row_of(i) < n_heads {
                // SAFETY: a whole warp is here; all blocks have written their rows.
                unsafe {
                    match HALVES {
                        1 => join::<2>(out, partial, shape, head_of(i), n_splits, in_use, sink[i], lane),
                        _ => join::<4>(out, partial, shape, head_of(i), n_splits, in_use, sink[i], lane),
                    }
                }
            }
            i += 1;
        }
    }
}

/// Where in its row a chunk of 8 elements lies: 8 lanes that load together, of two neighbouring keys and 4 chunks, then
/// meet different banks.
#[inline(always)]
fn key_swizzle(row: u32) -> u32 {
    4 * (row % 2)
}

/// As [`key_swizzle`], for 8 lanes of every other of 8 keys and two neighbouring chunks.
#[inline(always)]
fn value_swizzle(row: u32) -> u32 {
    row & 6
}

/// A head over a block's keys; `o[i][j]` is column `64 i + 32 j + lane`.
struct Merged<const HALVES: usize> {
    m: f32,
    l: f32,
    o: [[f32; 2]; HALVES],
}

/// What the block's warps have of head `row`, and the new key, as one softmax.
///
/// # Safety
///
/// `shared` holds maxima, sums and outputs of all warps, behind a barrier.
#[inline(always)]
unsafe fn merge_warps<const HALVES: usize>(
    shared: BlockMemory,
    warps: u32,
    row: u32,
    new_score: f32,
    new_value: [[f32; 2]; HALVES],
    lane: u32,
) -> Merged<HALVES> {
    // A row's maximum and sum are the same in its four lanes.
    let at = |warp_idx: u32| (32 * warp_idx + 4 * row) as usize;
    let mut m = new_score.max(NO_SCORE);
    let mut warp_idx = 0;
    while warp_idx < warps {
        // SAFETY: the caller's promise, and below.
        m = m.max(unsafe { shared.m.read(at(warp_idx)) });
        warp_idx += 1;
    }
    // NaN shows here, `max` ignores it.
    let is_new = new_score > NO_SCORE || new_score.is_nan();
    let weight = if is_new { Float::exp2(new_score - m) } else { 0.0 };
    let (mut l, mut o) = (weight, new_value.map(|pair| pair.map(|x| x * weight)));
    let mut warp_idx = 0;
    while warp_idx < warps {
        // SAFETY: as above.
        let (of_warp, sum) = unsafe { (shared.m.read(at(warp_idx)), shared.l.read(at(warp_idx))) };
        let weight = Float::exp2(of_warp - m);
        l += weight * sum;
        let mut i = 0;
        while i < HALVES {
            let mut j = 0;
            while j < 2 {
                let column = 64 * i as u32 + 32 * j as u32 + lane;
                let from = warp_idx * (2048 * HALVES as u32) + 2 * (row * 64 * HALVES as u32 + column);
                // SAFETY: as above.
                let x = unsafe { shared.ring.load4(from as usize) };
                o[i][j] += weight * f32::from_bits(x);
                j += 1;
            }
            i += 1;
        }
        warp_idx += 1;
    }
    Merged { m, l, o }
}

/// Two values as f16 pairs whose sum is they: `[high, low]`.
#[inline(always)]
fn split_pair(a: f32, b: f32) -> [u32; 2] {
    let high = pack_f16x2(a, b);
    let [a_high, b_high] = unpack_f16x2(high);
    [high, pack_f16x2(a - a_high, b - b_high)]
}
