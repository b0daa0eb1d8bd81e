//! Attention of a prompt, or a piece of one: every new token against its visible keys, without a matrix of scores in memory.

use cuda_std::{Disjoint, Float, Global, Shared, cp_async, f16, kernel, mma, pack_f16x2, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

use super::single_query::{THREADS, attend, column_of};
use super::{CacheElement, NO_SCORE, Shape, Slots, nan_past_f16, normalizer, sink_of};

/// Queries of a block, 16 a warp.
const QUERIES: u32 = 64;
/// Keys of a tile.
const KEYS: u32 = 64;
/// 16 bytes more than the columns: rows then start in different banks, for copies and `ldmatrix` alike.
const STRIDE_64: usize = 64 + 8;
const STRIDE_128: usize = 128 + 8;
const TILE_64: usize = KEYS as usize * STRIDE_64;
const TILE_128: usize = KEYS as usize * STRIDE_128;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[
    attention_prefill_f16_64::ENTRY,
    attention_prefill_f16_128::ENTRY,
    attention_prefill_f32_32::ENTRY,
    attention_prefill_f32_64::ENTRY,
    attention_prefill_f32_128::ENTRY,
];

/// The geometry of `attention_prefill_f16_*`: a block takes 64 queries of one head.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_f16(n_tokens: u32, n_head: u32) -> Launch {
    Launch { grid: [n_tokens.div_ceil(QUERIES), n_head, 1], block: [THREADS, 1, 1] }
}

/// The geometry of `attention_prefill_f32_*`: a block takes one query of one head.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_f32(n_tokens: u32, n_head: u32) -> Launch {
    Launch { grid: [n_tokens, n_head, 1], block: [THREADS, 1, 1] }
}

macro_rules! attention_prefill_f16 {
    ($name:ident, $k_steps:literal, $n_tiles:literal, $tile:ident, $k_symbol:ident, $v_symbol:ident, $blocks:literal) => {
        /// Attends from each new token to its visible keys, on tensor cores.
        ///
        /// - Math: `out[t, h, c] = Σⱼ pⱼ vⱼ[c] / (Σⱼ pⱼ + exp(z − M))`, `pⱼ = exp(scale · q·kⱼ − M)` over visible j, z: the
        ///   head's sink, or −∞; M: the largest exponent. q · scale and p are rounded to f16; scores, sums and M are f32.
        /// - Shapes: `out`, `out16`: `[n_tokens, n_head d_head]`, one of them empty and not written; `qkv`: `[n_tokens, (n_head + 2 n_head_kv) d_head]`; caches:
        ///   `[n_head_kv, n_slots, d_head]`, this launch's keys and values included; `state`: `[1]`, the first token's position;
        ///   `sinks`: empty or `[n_head]`.
        /// - Launch: [`launch_f16`]`(n_tokens, n_head)`, the longest rows first. A warp takes 16 queries, the block 64 keys at a
        ///   time; tiles that no query of the block sees are not read.
        /// - Shared memory: a tile of keys and one of values: 18 KB (`_64`) or 34 KB (`_128`). Two barriers a tile: values
        ///   arrive while scores are computed, the next keys while values are summed.
        /// - Cost: compute bound, `4 · n_tokens · n_keys / 2 · n_head · d_head` flop.
        /// - Determinism: one fixed order of operations; tensor cores sum in their own, the same on every run.
        /// - Source: Dao, *FlashAttention-2*, arXiv:2307.08691, algorithm 1; OpenAI, *gpt-oss*, `torch/model.py` for the sink.
        ///
        /// # Safety
        ///
        /// Launched as above; the slices have the shapes written above and start at multiples of 16 bytes; `n_head_kv`
        /// divides `n_head`; `d_head` is a multiple of 8 within the name's bound; the positions have slots.
        #[kernel(threads = THREADS, blocks_per_sm = $blocks)]
        pub unsafe fn $name(
            out: Disjoint<f32>,
            out16: Disjoint<f16>,
            qkv: Global<f32>,
            k_cache: Global<f16>,
            v_cache: Global<f16>,
            state: Global<u32>,
            sinks: Global<f32>,
            n_tokens: u32,
            n_head: u32,
            n_head_kv: u32,
            d_head: u32,
            n_slots: u32,
            window: u32,
            scale: f32,
        ) {
            let shape = Shape { n_head, n_head_kv, d_head, n_slots, window, scale };
            let tiles = (shared_array!($k_symbol: [f16; $tile]), shared_array!($v_symbol: [f16; $tile]));
            // SAFETY: the launch contract.
            unsafe {
                prefill_f16::<$k_steps, $n_tiles>(out, out16, qkv, k_cache, v_cache, state, sinks, n_tokens, &shape, tiles);
            }
        }
    };
}

attention_prefill_f16!(attention_prefill_f16_64, 4, 8, TILE_64, prefill_k_64, prefill_v_64, 3);
attention_prefill_f16!(attention_prefill_f16_128, 8, 16, TILE_128, prefill_k_128, prefill_v_128, 2);

macro_rules! attention_prefill_f32 {
    ($name:ident, $lanes:literal) => {
        /// Attends from each new token to its visible keys, in f32 throughout: the reference path, exact rather than fast.
        ///
        /// - Math: as [`attention_prefill_f16_64`](fn@attention_prefill_f16_64), nothing rounded below f32.
        /// - Shapes: as there.
        /// - Launch: [`launch_f32`]`(n_tokens, n_head)`. 4, 8 or 16 lanes take a key, a lane 8 of its elements, as in decoding.
        /// - Shared memory: 5 KB, one barrier.
        /// - Cost: L2 bound: every query reads its keys and values anew.
        /// - Determinism: one fixed order of operations.
        /// - Source: as [`attention_token_f32_64`](fn@super::token::single::attention_token_f32_64), with one split.
        ///
        /// # Safety
        ///
        /// As [`attention_prefill_f16_64`](fn@attention_prefill_f16_64).
        #[kernel(threads = THREADS, blocks_per_sm = 4)]
        pub unsafe fn $name(
            out: Disjoint<f32>,
            out16: Disjoint<f16>,
            qkv: Global<f32>,
            k_cache: Global<f32>,
            v_cache: Global<f32>,
            state: Global<u32>,
            sinks: Global<f32>,
            n_tokens: u32,
            n_head: u32,
            n_head_kv: u32,
            d_head: u32,
            n_slots: u32,
            window: u32,
            scale: f32,
        ) {
            let shape = Shape { n_head, n_head_kv, d_head, n_slots, window, scale };
            let (token, head) = (thread::block_idx_x(), thread::block_idx_y());
            if token >= n_tokens {
                return; // The whole block leaves.
            }
            let position = state[0] + token;
            let kv_head = shape.kv_head(head);
            // SAFETY: the launch contract; the block is whole, and the keys up to its position are in the cache.
            let column = unsafe {
                let (q, k, v) =
                    (shape.query(qkv, token, head), shape.head_of(k_cache, kv_head), shape.head_of(v_cache, kv_head));
                let factor = scale * core::f32::consts::LOG2_E;
                let q = f32::widen(f32::load_eight(q, column_of::<$lanes>(d_head) as usize)).map(|x| x * factor);
                let first = shape.first_key(position);
                attend::<f32, $lanes>(q, k, v, Slots::from(&shape, first), 0, position + 1 - first, d_head)
            };
            let factor = normalizer(column.m, column.l, sink_of(sinks, head));
            let t = thread::thread_idx_x();
            if t < d_head {
                let to = token as usize * (n_head * d_head) as usize + (head * d_head + t) as usize;
                // SAFETY: column t of this block's row is this thread's alone.
                unsafe {
                    if out16.len() > 0 {
                        out16.write(to, f16::round(column.o * factor));
                    } else {
                        out.write(to, column.o * factor);
                    }
                }
            }
        }
    };
}

attention_prefill_f32!(attention_prefill_f32_32, 4);
attention_prefill_f32!(attention_prefill_f32_64, 8);
attention_prefill_f32!(attention_prefill_f32_128, 16);

/// `K_STEPS` · 16 = `N_TILES` · 8: the columns of a head, padded with zeros.
///
/// # Safety
///
/// The kernels'; each of `tiles` has `KEYS · (8 N_TILES + 8)` elements.
#[inline(always)]
unsafe fn prefill_f16<const K_STEPS: usize, const N_TILES: usize>(
    out: Disjoint<f32>,
    out16: Disjoint<f16>,
    qkv: Global<f32>,
    k_cache: Global<f16>,
    v_cache: Global<f16>,
    state: Global<u32>,
    sinks: Global<f32>,
    n_tokens: u32,
    shape: &Shape,
    (k_tile, v_tile): (Shared<f16>, Shared<f16>),
) {
    // The last queries see the most keys: they go first, so that no long block is left at the end.
    let first_token = (thread::grid_dim_x() - 1 - thread::block_idx_x()) * QUERIES;
    if first_token >= n_tokens {
        return; // The whole block leaves.
    }
    let head = thread::block_idx_y();
    let kv_head = shape.kv_head(head);
    let thread = thread::thread_idx_x();
    let (lane, g, t) = (thread % 32, thread % 32 / 4, thread % 4);
    // SAFETY: the launch contract.
    let (k, v) = unsafe { (shape.head_of(k_cache, kv_head), shape.head_of(v_cache, kv_head)) };

    let start = state[0];
    let first_position = start + first_token;
    let end = (first_position + QUERIES).min(start + n_tokens);
    // This lane's rows of the fragments: two tokens, 8 apart.
    let token = first_token + thread / 32 * 16 + g;
    let positions = [start + token, start + token + 8];

    // SAFETY: the launch contract.
    let q = unsafe { load_queries::<K_STEPS>(qkv, n_tokens, shape, head, token, t) };

    // A row's sum is spread over four lanes; its maximum is the same in all of them.
    let (mut m, mut l) = ([NO_SCORE; 2], [0.0f32; 2]);
    let mut o = [[0.0f32; 4]; N_TILES];

    let stride = 8 * N_TILES + 8;
    let mut tile = shape.first_key(first_position);
    let mut slots = Slots::from(shape, tile);
    // SAFETY: nobody has read the tile yet.
    unsafe { copy_tile::<N_TILES>(k_tile, k, slots, end - tile, shape.d_head) };
    while tile < end {
        cp_async::wait::<0>();
        // SAFETY: the whole block is here: `tile` and `end` are the block's. All have read the values before.
        unsafe {
            thread::sync_threads();
            copy_tile::<N_TILES>(v_tile, v, slots, end - tile, shape.d_head);
        }

        // Scores, 16 queries by 64 keys a warp.
        let mut s = [[0.0f32; 4]; 8];
        let mut step = 0;
        while step < K_STEPS {
            let mut pair = 0;
            while pair < 4 {
                let (row, column) = (16 * pair + lane % 8 + 8 * (lane / 16), 16 * step as u32 + 8 * (lane / 8 % 2));
                // SAFETY: copied, waited for and past the barrier; all 32 lanes are here.
                unsafe {
                    let b = k_tile.load_matrix_x4(row as usize * stride + column as usize);
                    let n = 2 * pair as usize;
                    s[n] = mma::m16n8k16_f16(q[step], [b[0], b[1]], s[n]);
                    s[n + 1] = mma::m16n8k16_f16(q[step], [b[2], b[3]], s[n + 1]);
                }
                pair += 1;
            }
            step += 1;
        }

        // Only tiles that reach past a query's own position, or behind a query's window, need a look at each score.
        let last_visible_to_all = first_position;
        let first_visible_to_all = shape.first_key(end - 1);
        if tile + KEYS - 1 > last_visible_to_all || tile < first_visible_to_all {
            let mut n = 0;
            while n < 8 {
                let mut c = 0;
                while c < 4 {
                    let (key, position) = (tile + 8 * n as u32 + 2 * t + c as u32 % 2, positions[c / 2]);
                    if key > position || (shape.window > 0 && position - key >= shape.window) {
                        s[n][c] = f32::NEG_INFINITY;
                    }
                    c += 1;
                }
                n += 1;
            }
        }

        let mut row = 0;
        while row < 2 {
            let mut largest = m[row];
            let mut n = 0;
            while n < 8 {
                largest = largest.max(s[n][2 * row].max(s[n][2 * row + 1]));
                n += 1;
            }
            // SAFETY: all 32 lanes are here.
            largest = unsafe { warp::max_of::<4>(largest) };
            let correction = Float::exp2(m[row] - largest);
            m[row] = largest;
            let mut sum = 0.0;
            let mut n = 0;
            while n < 8 {
                s[n][2 * row] = Float::exp2(s[n][2 * row] - largest);
                s[n][2 * row + 1] = Float::exp2(s[n][2 * row + 1] - largest);
                sum += s[n][2 * row] + s[n][2 * row + 1];
                n += 1;
            }
            l[row] = l[row] * correction + sum;
            let mut n = 0;
            while n < N_TILES {
                o[n][2 * row] *= correction;
                o[n][2 * row + 1] *= correction;
                n += 1;
            }
            row += 1;
        }

        cp_async::wait::<0>();
        // SAFETY: the whole block is here, and has read the keys.
        unsafe {
            thread::sync_threads();
            if tile + KEYS < end {
                copy_tile::<N_TILES>(k_tile, k, slots.after(KEYS), end - tile - KEYS, shape.d_head);
            }
        }

        // Scores of two neighbouring n-tiles are the fragment of 16 keys.
        let mut step = 0;
        while step < 4 {
            let (low, high) = (s[2 * step], s[2 * step + 1]);
            let p = [
                pack_f16x2(low[0], low[1]),
                pack_f16x2(low[2], low[3]),
                pack_f16x2(high[0], high[1]),
                pack_f16x2(high[2], high[3]),
            ];
            let mut pair = 0;
            while pair < N_TILES / 2 {
                let (row, column) = (16 * step as u32 + lane % 16, 16 * pair as u32 + 8 * (lane / 16));
                // SAFETY: copied, waited for and past the barrier; all 32 lanes are here.
                unsafe {
                    let b = v_tile.load_matrix_x4_transposed(row as usize * stride + column as usize);
                    o[2 * pair] = mma::m16n8k16_f16(p, [b[0], b[1]], o[2 * pair]);
                    o[2 * pair + 1] = mma::m16n8k16_f16(p, [b[2], b[3]], o[2 * pair + 1]);
                }
                pair += 1;
            }
            step += 1;
        }
        (tile, slots) = (tile + KEYS, slots.after(KEYS));
    }

    let sink = sink_of(sinks, head);
    let mut row = 0;
    while row < 2 {
        // SAFETY: all 32 lanes are here.
        let factor = normalizer(m[row], unsafe { warp::sum_of::<4>(l[row]) }, sink);
        let token = token + 8 * row as u32;
        let to = token as usize * (shape.n_head * shape.d_head) as usize + (head * shape.d_head + 2 * t) as usize;
        // One branch for all columns of the row.
        let is_f16 = out16.len() > 0;
        let mut n = 0;
        while n < N_TILES && !is_f16 {
            if token < n_tokens && 8 * (n as u32) < shape.d_head {
                // SAFETY: these two columns of the row are this lane's alone.
                unsafe {
                    out.write(to + 8 * n, o[n][2 * row] * factor);
                    out.write(to + 8 * n + 1, o[n][2 * row + 1] * factor);
                }
            }
            n += 1;
        }
        let mut n = 0;
        while n < N_TILES && is_f16 {
            if token < n_tokens && 8 * (n as u32) < shape.d_head {
                // SAFETY: as above.
                unsafe {
                    out16.write(to + 8 * n, f16::round(o[n][2 * row] * factor));
                    out16.write(to + 8 * n + 1, f16::round(o[n][2 * row + 1] * factor));
                }
            }
            n += 1;
        }
        row += 1;
    }
}

/// The fragments of `q · scale · log2 e` for tokens `token` and `token + 8`. Tokens past the last repeat it; columns past the
/// last are zero.
///
/// # Safety
///
/// The kernels'; the head exists.
#[inline(always)]
unsafe fn load_queries<const K_STEPS: usize>(
    qkv: Global<f32>,
    n_tokens: u32,
    shape: &Shape,
    head: u32,
    token: u32,
    t: u32,
) -> [[u32; 4]; K_STEPS] {
    core::array::from_fn(|step| {
        core::array::from_fn(|register| {
            let token = (token + 8 * (register as u32 % 2)).min(n_tokens - 1);
            let column = 16 * step as u32 + 8 * (register as u32 / 2);
            // SAFETY: the token exists; `column + 2 t + 2 <= d_head` after the minimum, an even number of elements.
            let [low, high] = unsafe {
                let q = shape.query(qkv, token, head);
                q.load8((column.min(shape.d_head - 8) + 2 * t) as usize)
            };
            let factor = if column < shape.d_head { shape.scale * core::f32::consts::LOG2_E } else { 0.0 };
            let scaled = |bits| nan_past_f16(f32::from_bits(bits) * factor);
            pack_f16x2(scaled(low), scaled(high))
        })
    })
}

/// Starts copying the first [`KEYS`] of `slots` of `source` to `tile`, as one group; rows from `n` on, and columns past the
/// last, become zero.
///
/// # Safety
///
/// All threads of the block are here, and none reads `tile` before waiting for the group and a barrier; the first `n` slots
/// are in `source`.
#[inline(always)]
unsafe fn copy_tile<const N_TILES: usize>(tile: Shared<f16>, source: Global<f16>, slots: Slots, n: u32, d_head: u32) {
    let thread = thread::thread_idx_x();
    let stride = 8 * N_TILES + 8;
    let mut piece = 0;
    while piece < KEYS * N_TILES as u32 / THREADS {
        let at = piece * THREADS + thread;
        let (row, column) = (at / N_TILES as u32, 8 * (at % N_TILES as u32));
        let valid = row < n && column < d_head;
        // SAFETY: the destination is this thread's, a multiple of 8 elements as the source is, which is inside if valid.
        unsafe {
            let to = row as usize * stride + column as usize;
            tile.copy_async(to, source, (slots.of(row) * d_head + column) as usize, valid);
        }
        piece += 1;
    }
    cp_async::commit();
}
