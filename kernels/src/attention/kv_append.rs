//! Writes new keys and values into the cache.

use cuda_std::{Disjoint, Global, f16, kernel, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

use super::{CacheElement, Shape, Slots};

/// Threads along a head, 8 elements each: 128 elements, the largest head.
const PIECES: u32 = 16;
const TOKENS_PER_BLOCK: u32 = 8;
const THREADS: u32 = PIECES * TOKENS_PER_BLOCK;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[kv_append_f16::ENTRY, kv_append_f32::ENTRY];

/// The one geometry the kernels of this file are written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32, n_head_kv: u32) -> Launch {
    Launch { grid: [n_tokens.div_ceil(TOKENS_PER_BLOCK), 2 * n_head_kv, 1], block: [PIECES, TOKENS_PER_BLOCK, 1] }
}

macro_rules! kv_append {
    ($name:ident, $element:ty, $rounding:literal) => {
        /// Copies the key and value heads of this launch's tokens to their positions in the caches.
        ///
        /// - Math: `k_cache[h, (state[0] + t) mod n_slots, c] = qkv[t, k head h, c]`, and v alike,
        #[doc = $rounding]
        /// - Shapes: `k_cache`, `v_cache`: `[n_head_kv, n_slots, d_head]`; `qkv`: `[n_tokens, (n_head + 2 n_head_kv) d_head]`;
        ///   `state`: `[1]`. A position past `n_slots` traps, unless the cache is a ring: `window > 0` and
        ///   `n_slots ≥ window − 1 + n_tokens`, so that no key goes that a query of this launch still sees.
        /// - Launch: [`launch`]`(n_tokens, n_head_kv)`. Block y is a key head, then a value head; a thread moves 8 elements.
        /// - Shared memory: none, and no barrier.
        /// - Cost: memory bound: the new keys and values, read once in f32 and written once.
        /// - Determinism: one rounding an element, the same on every machine.
        /// - Source: the cache of `reference.md` 5.2; none needed.
        ///
        /// # Safety
        ///
        /// Launched as above; the slices have the shapes written above and start at multiples of 16 bytes; `d_head` is a
        /// multiple of 8, at most 128.
        #[kernel(threads = THREADS, blocks_per_sm = 8)]
        pub unsafe fn $name(
            k_cache: Disjoint<$element>,
            v_cache: Disjoint<$element>,
            qkv: Global<f32>,
            state: Global<u32>,
            n_tokens: u32,
            n_head: u32,
            n_head_kv: u32,
            d_head: u32,
            n_slots: u32,
            window: u32,
        ) {
            let shape = Shape { n_head, n_head_kv, d_head, n_slots, window, scale: 1.0 };
            // SAFETY: the launch contract.
            unsafe { append(k_cache, v_cache, qkv, state, n_tokens, &shape) }
        }
    };
}

kv_append!(kv_append_f16, f16, "  rounded to f16; NaN where |x| ≥ 65520, which f16 cannot hold.");
kv_append!(kv_append_f32, f32, "  exactly.");

/// # Safety
///
/// The kernels'.
#[inline(always)]
unsafe fn append<E: CacheElement>(
    k_cache: Disjoint<E>,
    v_cache: Disjoint<E>,
    qkv: Global<f32>,
    state: Global<u32>,
    n_tokens: u32,
    shape: &Shape,
) {
    let &Shape { n_head, n_head_kv, d_head, n_slots, window, .. } = shape;
    let token = thread::block_idx_x() * TOKENS_PER_BLOCK + thread::thread_idx_y();
    let column = 8 * thread::thread_idx_x();
    if token >= n_tokens || column >= d_head {
        return;
    }
    let source_head = thread::block_idx_y();
    let is_value = source_head >= n_head_kv;
    let (cache, head) = if is_value { (v_cache, source_head - n_head_kv) } else { (k_cache, source_head) };
    let position = state[0] + token;
    if position >= n_slots && (window == 0 || n_slots < window - 1 + n_tokens) {
        // No ring. The next head's rows lie there. A checked read past the end is a trap, and a fault in the emulator.
        let _ = k_cache.read(k_cache.len());
    }

    let slot = Slots::from(shape, position).of(0);
    let from = token as usize * shape.qkv_width() + ((n_head + source_head) * d_head + column) as usize;
    let to = (head as usize * n_slots as usize + slot as usize) * d_head as usize + column as usize;
    // SAFETY: inside by the launch contract; all offsets are multiples of 8 elements; piece `to` is this thread's alone.
    unsafe {
        let values = f32::widen(f32::load_eight(qkv, from));
        E::store_eight(cache, to, values);
    }
}
