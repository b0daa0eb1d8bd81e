//! Attention of one new token, split over the keys: blocks take a range of them each,
//! [`attention_merge`](fn@attention_merge) joins the ranges.

use cuda_std::{Disjoint, Float, Global, f16, kernel, mma, pack_f16x2, shared_array, thread, unpack_f16x2, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

use super::single_query::{THREADS, attend};
use super::{CacheElement, NO_SCORE, Shape, nan_past_f16, sink_of};

/// Query heads that a block of the grouped kernels takes: rows g of the tensor cores' 16, the other 8 being their low parts.
pub const HEADS_PER_BLOCK: u32 = 8;
/// The most splits that [`attention_merge`](fn@attention_merge) joins.
pub const MAX_SPLITS: u32 = THREADS;

/// Splits are multiples of this many keys, so a short context takes few of them.
const SPLIT_UNIT: u32 = 64;
/// Two blocks for each of 132 SMs: 32 KB of keys and values under way on each.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS_WANTED: u32 = 264;

const SLOTS: usize = THREADS as usize;
const WARPS: u32 = THREADS / 32;
/// Keys that a warp of the grouped kernels takes at a time: two n-tiles of scores, one k-step of `P V`.
const KEYS_PER_STEP: u32 = 16;
/// Warps times heads.
const ROWS: usize = (WARPS * HEADS_PER_BLOCK) as usize;
const OUTPUT_64: usize = ROWS * 64;
const OUTPUT_128: usize = ROWS * 128;
const MERGE_LANES: u32 = 32;
const MERGE_GROUPS: u32 = THREADS / MERGE_LANES;
const MERGE_STEPS: usize = 4;
const MERGE_OUTPUT: usize = 128 * MERGE_GROUPS as usize;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[
    attention_decode_f16_32::ENTRY,
    attention_decode_f16_64::ENTRY,
    attention_decode_f16_128::ENTRY,
    attention_decode_f32_32::ENTRY,
    attention_decode_f32_64::ENTRY,
    attention_decode_f32_128::ENTRY,
    attention_decode_grouped_f16_64::ENTRY,
    attention_decode_grouped_f16_128::ENTRY,
    attention_merge::ENTRY,
];

/// How many splits a launch for contexts up to `n_keys` should have, when its grid is `blocks` wide without them
/// ([`launch`] and [`launch_grouped`]: x). A window bounds `n_keys`. At least 1, at most [`MAX_SPLITS`].
#[cfg(not(target_arch = "nvptx64"))]
pub const fn decode_splits(n_keys: u32, blocks: u32) -> u32 {
    let (useful, affordable) = (n_keys.div_ceil(SPLIT_UNIT), BLOCKS_WANTED / blocks);
    let n_splits = if useful < affordable { useful } else { affordable };
    if n_splits < 1 {
        1
    } else if n_splits > MAX_SPLITS {
        MAX_SPLITS
    } else {
        n_splits
    }
}

/// Elements of `partial` for so many splits.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn partial_len(n_head: u32, d_head: u32, n_splits: u32) -> usize {
    n_head as usize * n_splits as usize * (d_head as usize + 2)
}

/// The geometry of `attention_decode_{f16,f32}_*`: a block takes one query head and one split.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_head: u32, n_splits: u32) -> Launch {
    Launch { grid: [n_head, n_splits, 1], block: [THREADS, 1, 1] }
}

/// The geometry of `attention_decode_grouped_*`: a block takes up to [`HEADS_PER_BLOCK`] query heads of one KV head and one
/// split.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_grouped(n_head: u32, n_head_kv: u32, n_splits: u32) -> Launch {
    let blocks_per_head = (n_head / n_head_kv).div_ceil(HEADS_PER_BLOCK);
    Launch { grid: [n_head_kv * blocks_per_head, n_splits, 1], block: [THREADS, 1, 1] }
}

/// The geometry of [`attention_merge`](fn@attention_merge).
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_merge(n_head: u32) -> Launch {
    Launch::linear(n_head, THREADS)
}

/// Keys of a split, and how many of the launch's splits have any. Kernels and merge compute it alike from the length of this
/// moment, so a recorded launch spreads every context evenly and nothing stale is read.
#[inline(always)]
fn divide(n_keys: u32, n_splits: u32) -> (u32, u32) {
    let units = n_keys.div_ceil(SPLIT_UNIT);
    let units_per_split = units.div_ceil(n_splits.max(1)).max(1);
    (units_per_split * SPLIT_UNIT, units.div_ceil(units_per_split))
}

/// The keys of split `split`, as a range of positions, or `None` past the last.
#[inline(always)]
fn keys_of(shape: &Shape, state: Global<u32>, split: u32, n_splits: u32) -> Option<(u32, u32)> {
    let position = state[0];
    let (first, end) = (shape.first_key(position), position + 1);
    let (length, in_use) = divide(end - first, n_splits);
    if split >= in_use {
        return None;
    }
    let first = first + split * length;
    Some((first, end.min(first + length)))
}

/// Where query head `head` of split `split` lies in `partial`: its output, and its maximum and sum.
#[inline(always)]
fn partial_of(shape: &Shape, head: u32, split: u32, n_splits: u32) -> (usize, usize) {
    let row = head * n_splits + split;
    ((row * shape.d_head) as usize, (shape.n_head * n_splits * shape.d_head + 2 * row) as usize)
}

macro_rules! attention_decode {
    ($name:ident, $element:ty, $lanes:literal) => {
        /// Attends from one token to a split of the keys, for one query head a block: the kernel for models with one to
        /// about four query heads per KV head, and for the f32 cache.
        ///
        /// - Math: over the visible keys j of the split, `sⱼ = scale · log2 e · q·kⱼ`, `m = max sⱼ`, `l = Σ 2^(sⱼ − m)`,
        ///   `o[c] = Σ 2^(sⱼ − m) vⱼ[c]`.
        /// - Shapes: `partial`: `[n_head, n_splits, d_head]` of o, then `[n_head, n_splits, 2]` of m, l; `qkv`:
        ///   `[1, (n_head + 2 n_head_kv) d_head]`; caches: `[n_head_kv, n_ctx, d_head]`, this token's key and value
        ///   included; `state`: `[1]`, the token's position.
        /// - Launch: [`launch`]`(n_head, n_splits)`. 4, 8 or 16 lanes take a key, a lane 8 of its elements, four keys at a time.
        ///   The keys are divided among as many splits as have at least 64 each; the blocks of the others return.
        /// - Shared memory: 5 KB, one barrier.
        /// - Cost: memory bound, `2 · n_keys · n_head_kv · d_head` elements; query heads of a group share them through L2.
        /// - Determinism: one fixed order of operations; rounding depends on `n_splits`.
        /// - Source: Dao et al., *Flash-Decoding for long-context inference*, 2023; Milakov, Gimelshein, *Online normalizer
        ///   calculation for softmax*, arXiv:1805.02867.
        ///
        /// # Safety
        ///
        /// Launched as above; the slices have the shapes written above and start at multiples of 16 bytes; `n_head_kv`
        /// divides `n_head`; `d_head` is a multiple of 8 within the name's bound; `state[0] < n_ctx`.
        #[kernel(threads = THREADS, blocks_per_sm = 4)]
        pub unsafe fn $name(
            partial: Disjoint<f32>,
            qkv: Global<f32>,
            k_cache: Global<$element>,
            v_cache: Global<$element>,
            state: Global<u32>,
            n_head: u32,
            n_head_kv: u32,
            d_head: u32,
            n_ctx: u32,
            window: u32,
            scale: f32,
        ) {
            let shape = Shape { n_head, n_head_kv, d_head, n_ctx, window, scale };
            // SAFETY: the launch contract.
            unsafe { decode::<$element, $lanes>(partial, qkv, k_cache, v_cache, state, &shape) }
        }
    };
}

attention_decode!(attention_decode_f16_32, f16, 4);
attention_decode!(attention_decode_f16_64, f16, 8);
attention_decode!(attention_decode_f16_128, f16, 16);
attention_decode!(attention_decode_f32_32, f32, 4);
attention_decode!(attention_decode_f32_64, f32, 8);
attention_decode!(attention_decode_f32_128, f32, 16);

/// # Safety
///
/// The kernels'.
#[inline(always)]
unsafe fn decode<E: CacheElement, const LANES: u32>(
    partial: Disjoint<f32>,
    qkv: Global<f32>,
    k_cache: Global<E>,
    v_cache: Global<E>,
    state: Global<u32>,
    shape: &Shape,
) {
    let (head, split, n_splits) = (thread::block_idx_x(), thread::block_idx_y(), thread::grid_dim_y());
    let Some((first, end)) = keys_of(shape, state, split, n_splits) else {
        return; // The whole block leaves.
    };
    let kv_head = shape.kv_head(head);
    // SAFETY: the launch contract; the block is whole, and its keys are within the context.
    let column = unsafe {
        let (q, k, v) = (shape.query(qkv, 0, head), shape.head_of(k_cache, kv_head), shape.head_of(v_cache, kv_head));
        attend::<E, LANES>(q, k, v, first, end, shape.d_head, shape.scale)
    };
    let (output, sums) = partial_of(shape, head, split, n_splits);
    let t = thread::thread_idx_x();
    if t < shape.d_head {
        // SAFETY: column t of this block's row is this thread's alone.
        unsafe { partial.write(output + t as usize, column.o) };
    }
    if t < 2 {
        // SAFETY: as above.
        unsafe { partial.write(sums + t as usize, if t == 0 { column.m } else { column.l }) };
    }
}

macro_rules! attention_decode_grouped {
    ($name:ident, $halves:literal, $output:ident, $symbol:ident) => {
        /// Attends from one token to a split of the keys, for up to 8 query heads of one KV head a block, on tensor cores.
        ///
        /// - Math: as [`attention_decode_f16_64`](fn@attention_decode_f16_64). q and the softmax's numerators enter the
        ///   tensor cores as `high + low`, two f16 each, in the rows that a group of 8 heads leaves free: 21 bits, at no cost.
        /// - Shapes: as there.
        /// - Launch: [`launch_grouped`]`(n_head, n_head_kv, n_splits)`. A warp takes 16 keys at a time, straight from the
        ///   cache to fragments: the order of columns in a product is free, so a lane's 16 bytes are its operands.
        /// - Shared memory: 9 KB (`_64`) or 17 KB (`_128`), one barrier.
        /// - Cost: memory bound, `4 · n_keys · n_head_kv · d_head` bytes.
        /// - Determinism: one fixed order of operations; tensor cores sum in their own, the same on every run.
        /// - Source: as there.
        ///
        /// # Safety
        ///
        /// As [`attention_decode_f16_64`](fn@attention_decode_f16_64).
        #[kernel(threads = THREADS, blocks_per_sm = 2)]
        pub unsafe fn $name(
            partial: Disjoint<f32>,
            qkv: Global<f32>,
            k_cache: Global<f16>,
            v_cache: Global<f16>,
            state: Global<u32>,
            n_head: u32,
            n_head_kv: u32,
            d_head: u32,
            n_ctx: u32,
            window: u32,
            scale: f32,
        ) {
            let shape = Shape { n_head, n_head_kv, d_head, n_ctx, window, scale };
            let outputs = shared_array!($symbol: [f32; $output]);
            // SAFETY: the launch contract.
            unsafe { decode_grouped::<$halves>(partial, qkv, k_cache, v_cache, state, &shape, outputs) }
        }
    };
}

attention_decode_grouped!(attention_decode_grouped_f16_64, 1, OUTPUT_64, decode_grouped_o_64);
attention_decode_grouped!(attention_decode_grouped_f16_128, 2, OUTPUT_128, decode_grouped_o_128);

/// `HALVES`: heads of up to 64 · `HALVES` columns.
///
/// Lane (g, t), g = lane / 4, loads columns `64 i + 32 j + 8 t ..+ 8` of key g as operands of `Q Kᵀ` (i: half, j: 0, 1), and
/// columns `64 i + 8 g ..+ 8` of keys 2t, 2t + 1, 2t + 8, 2t + 9 as operands of `P V`, whose n-tile c thus holds columns
/// `8 n + c`.
///
/// # Safety
///
/// The kernels'; `outputs` has `ROWS · 64 · HALVES` elements.
#[inline(always)]
unsafe fn decode_grouped<const HALVES: usize>(
    partial: Disjoint<f32>,
    qkv: Global<f32>,
    k_cache: Global<f16>,
    v_cache: Global<f16>,
    state: Global<u32>,
    shape: &Shape,
    outputs: cuda_std::Shared<f32>,
) {
    let (split, n_splits) = (thread::block_idx_y(), thread::grid_dim_y());
    let Some((first, end)) = keys_of(shape, state, split, n_splits) else {
        return; // The whole block leaves.
    };
    let heads_per_kv_head = shape.n_head / shape.n_head_kv.max(1);
    let blocks_per_kv_head = heads_per_kv_head.div_ceil(HEADS_PER_BLOCK).max(1);
    let kv_head = thread::block_idx_x() / blocks_per_kv_head;
    let first_in_group = thread::block_idx_x() % blocks_per_kv_head * HEADS_PER_BLOCK;
    let first_head = kv_head * heads_per_kv_head + first_in_group;
    let n_heads = (heads_per_kv_head - first_in_group).min(HEADS_PER_BLOCK);
    // SAFETY: the launch contract.
    let (k, v) = unsafe { (shape.head_of(k_cache, kv_head), shape.head_of(v_cache, kv_head)) };

    let thread = thread::thread_idx_x();
    let (warp_idx, g, t) = (thread / 32, thread % 32 / 4, thread % 4);
    let d = shape.d_head;

    // Rows past the last head repeat it; columns past the last are zero.
    let head = first_head + g.min(n_heads - 1);
    // SAFETY: the head exists.
    let query = unsafe { shape.query(qkv, 0, head) };
    let q: [[[[u32; 4]; 2]; 2]; HALVES] = core::array::from_fn(|i| {
        core::array::from_fn(|j| {
            let column = 64 * i as u32 + 32 * j as u32 + 8 * t;
            let factor = if column < d { shape.scale * core::f32::consts::LOG2_E } else { 0.0 };
            // SAFETY: at most `d − 8`, a multiple of 8.
            let eight = unsafe { f32::load_eight(query, column.min(d - 8) as usize) };
            let [a, b, c, d, e, f, g, h] = f32::widen(eight).map(|x| nan_past_f16(x * factor));
            let [[ab, ab_low], [cd, cd_low], [ef, ef_low], [gh, gh_low]] =
                [split_pair(a, b), split_pair(c, d), split_pair(e, f), split_pair(g, h)];
            // Rows g: the high parts; rows g + 8: the low.
            [[ab, ab_low, cd, cd_low], [ef, ef_low, gh, gh_low]]
        })
    });

    // A key past the end is read as the last one and then masked.
    let load_keys = |at: u32| -> [[[[u32; 4]; 2]; HALVES]; 2] {
        core::array::from_fn(|tile| {
            let key = (at + 8 * tile as u32 + g).min(end - 1);
            core::array::from_fn(|i| {
                core::array::from_fn(|j| {
                    let column = (64 * i as u32 + 32 * j as u32 + 8 * t).min(d - 8);
                    // SAFETY: `key < end` and `column + 8 <= d`, multiples of 8 elements.
                    unsafe { k.load16((key * d + column) as usize) }
                })
            })
        })
    };
    let load_values = |at: u32| -> [[[u32; 4]; 4]; HALVES] {
        core::array::from_fn(|i| {
            let column = (64 * i as u32 + 8 * g).min(d - 8);
            core::array::from_fn(|n| {
                let key = (at + 2 * t + n as u32 % 2 + 8 * (n as u32 / 2)).min(end - 1);
                // SAFETY: as above.
                unsafe { v.load16((key * d + column) as usize) }
            })
        })
    };

    let (mut m, mut l) = (NO_SCORE, 0.0);
    let mut o = [[[0.0f32; 4]; 8]; HALVES];
    let mut at = first + warp_idx * KEYS_PER_STEP;
    let (mut keys, mut values) = (load_keys(at), load_values(at));
    while at < end {
        // A whole warp is here: `at` is the same for its lanes.
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
        let next = at + WARPS * KEYS_PER_STEP;
        keys = load_keys(next);

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
        values = load_values(next);
        at = next;
    }

    // SAFETY: all 32 lanes are here.
    l = unsafe { warp::sum_of::<4>(l) };
    let (all_m, all_l) = (shared_array!(decode_grouped_m: [f32; SLOTS]), shared_array!(decode_grouped_l: [f32; SLOTS]));
    let width = 64 * HALVES as u32;
    let row = warp_idx * HEADS_PER_BLOCK + g;
    let mut i = 0;
    while i < HALVES {
        let mut n = 0;
        while n < 2 {
            let sum: [u32; 8] = core::array::from_fn(|c| (o[i][c][n] + o[i][c][n + 2]).to_bits());
            let to = (row * width + 64 * i as u32 + 8 * (2 * t + n as u32)) as usize;
            // SAFETY: these eight columns of the row are this lane's alone.
            unsafe {
                outputs.store16(to, [sum[0], sum[1], sum[2], sum[3]]);
                outputs.store16(to + 4, [sum[4], sum[5], sum[6], sum[7]]);
            }
            n += 1;
        }
        i += 1;
    }
    // SAFETY: own elements; the whole block reaches the barrier.
    unsafe {
        all_m.write(thread as usize, m);
        all_l.write(thread as usize, l);
        thread::sync_threads();
    }

    // 16 threads a head merge the warps, 4 columns at a time.
    let (head, piece) = (thread / 16, thread % 16);
    if head >= n_heads {
        return;
    }
    let weights: [[f32; 2]; WARPS as usize] = core::array::from_fn(|warp_idx| {
        let at = warp_idx * 32 + 4 * head as usize;
        // SAFETY: written before the barrier.
        unsafe { [all_m.read(at), all_l.read(at)] }
    });
    let m = weights[0][0].max(weights[1][0]).max(weights[2][0].max(weights[3][0]));
    let (mut l, mut warp_idx) = (0.0, 0);
    while warp_idx < WARPS as usize {
        l += weights[warp_idx][1] * Float::exp2(weights[warp_idx][0] - m);
        warp_idx += 1;
    }
    let (output, sums) = partial_of(shape, first_head + head, split, n_splits);
    let mut i = 0;
    while i < HALVES {
        let column = 64 * i as u32 + 4 * piece;
        let mut whole = [0.0f32; 4];
        let mut warp_idx = 0;
        while warp_idx < WARPS as usize {
            let at = (warp_idx as u32 * HEADS_PER_BLOCK + head) * width + column;
            // SAFETY: written before the barrier.
            let part = unsafe { outputs.load16(at as usize) }.map(f32::from_bits);
            let weight = Float::exp2(weights[warp_idx][0] - m);
            let mut c = 0;
            while c < 4 {
                whole[c] += weight * part[c];
                c += 1;
            }
            warp_idx += 1;
        }
        if column < d {
            // SAFETY: these four columns are this thread's alone; `d` is a multiple of 8, so all four are in the row.
            unsafe { partial.store16(output + column as usize, whole.map(f32::to_bits)) };
        }
        i += 1;
    }
    if piece < 2 {
        // SAFETY: this thread's alone.
        unsafe { partial.write(sums + piece as usize, if piece == 0 { m } else { l }) };
    }
}

/// Two values as f16 pairs whose sum is they: `[high, low]`.
#[inline(always)]
fn split_pair(a: f32, b: f32) -> [u32; 2] {
    let high = pack_f16x2(a, b);
    let [a_high, b_high] = unpack_f16x2(high);
    [high, pack_f16x2(a - a_high, b - b_high)]
}

/// Joins the splits of a decode launch into the attention's output.
///
/// - Math: `m = max(maxₛ mₛ, z)`, `out[h, c] = Σₛ 2^(mₛ − m) oₛ[c] / (Σₛ 2^(mₛ − m) lₛ + 2^(z − m))`, z: the head's sink
///   times log2 e, or −∞.
/// - Shapes: `out`: `[n_head, d_head]`; `partial`: as the decode kernel wrote it, with the same `n_splits` and `window`;
///   `state`: `[1]`; `sinks`: empty or `[n_head]`.
/// - Launch: [`launch_merge`]`(n_head)`. Splits without keys, whose rows nobody wrote, are not read.
/// - Shared memory: 3 KB, two barriers.
/// - Cost: latency bound: two dependent reads of the partials.
/// - Determinism: one fixed order of operations.
/// - Source: Dao et al., *Flash-Decoding*, 2023; OpenAI, *gpt-oss*, `torch/model.py` (`sdpa`) for the sink.
///
/// # Safety
///
/// Launched as above after the decode kernel; the slices have the shapes written above and start at multiples of 16 bytes;
/// `1 <= n_splits <= MAX_SPLITS`; `d_head` is a multiple of 8, at most 128.
#[kernel(threads = THREADS, blocks_per_sm = 8)]
pub unsafe fn attention_merge(
    out: Disjoint<f32>,
    partial: Global<f32>,
    state: Global<u32>,
    sinks: Global<f32>,
    n_head: u32,
    d_head: u32,
    n_splits: u32,
    window: u32,
) {
    let head = thread::block_idx_x();
    let t = thread::thread_idx_x();
    let shape = Shape { n_head, n_head_kv: n_head, d_head, n_ctx: 0, window, scale: 1.0 };
    let n_keys = state[0] + 1 - shape.first_key(state[0]);
    let (_, in_use) = divide(n_keys, n_splits);
    let (output, sums) = partial_of(&shape, head, 0, n_splits);

    let all_m = shared_array!(merge_m: [f32; SLOTS]);
    let all_l = shared_array!(merge_l: [f32; SLOTS]);
    let (mut m, mut l) = (NO_SCORE, 0.0);
    if t < in_use {
        (m, l) = (partial[sums + 2 * t as usize], partial[sums + 2 * t as usize + 1]);
    }
    // SAFETY: own elements; the whole block reaches the barrier.
    unsafe {
        all_m.write(t as usize, m);
        all_l.write(t as usize, l);
        thread::sync_threads();
    }
    let sink = sink_of(sinks, head);
    let mut m = sink.max(NO_SCORE);
    let mut split = 0;
    while split < in_use {
        // SAFETY: written before the barrier.
        m = m.max(unsafe { all_m.read(split as usize) });
        split += 1;
    }
    let mut l = Float::exp2(sink - m);
    let mut split = 0;
    while split < in_use {
        // SAFETY: as above.
        l += unsafe { Float::exp2(all_m.read(split as usize) - m) * all_l.read(split as usize) };
        split += 1;
    }

    // 32 lanes take 4 columns each, a group of them every fourth split, four splits at a time to overlap their reads.
    let (group, lane) = (t / MERGE_LANES, t % MERGE_LANES);
    let column = (4 * lane).min(d_head - 4);
    let mut o = [0.0f32; 4];
    let mut first = group;
    while first < in_use {
        let rows: [[u32; 4]; MERGE_STEPS] = core::array::from_fn(|step| {
            let split = (first + step as u32 * MERGE_GROUPS).min(in_use - 1);
            // SAFETY: a split in use, whose row the decode kernel wrote; `column + 4 <= d_head`, multiples of 4.
            unsafe { partial.load16(output + (split * d_head + column) as usize) }
        });
        let mut step = 0;
        while step < MERGE_STEPS {
            let split = first + step as u32 * MERGE_GROUPS;
            // SAFETY: written before the barrier; `split.min(..) < in_use <= THREADS`.
            let m_split = unsafe { all_m.read(split.min(in_use - 1) as usize) };
            let weight = if split < in_use { Float::exp2(m_split - m) } else { 0.0 };
            let mut c = 0;
            while c < 4 {
                o[c] += weight * f32::from_bits(rows[step][c]);
                c += 1;
            }
            step += 1;
        }
        first += MERGE_STEPS as u32 * MERGE_GROUPS;
    }

    let outputs = shared_array!(merge_o: [f32; MERGE_OUTPUT]);
    // SAFETY: own elements; the whole block reaches the barrier.
    unsafe {
        outputs.store16(4 * t as usize, o.map(f32::to_bits));
        thread::sync_threads();
    }
    if t < d_head {
        let mut sum = 0.0;
        let mut group = 0;
        while group < MERGE_GROUPS {
            // SAFETY: written before the barrier.
            sum += unsafe { outputs.read((4 * MERGE_LANES * group + t) as usize) };
            group += 1;
        }
        // SAFETY: element `(head, t)` is this thread's alone.
        unsafe { out.write((head * d_head + t) as usize, sum / l) };
    }
}
