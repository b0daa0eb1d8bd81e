//! Attention, and the cache its keys and values live in: `out = softmax(q kᵀ / √d_head) v`, head by head.
//!
//! Common to all kernels here:
//!
//! - `qkv` is `[n_tokens, (n_head + 2 n_head_kv) d_head]` f32, a row being query heads, key heads, value heads. The model's
//!   rotary embedding, if any, has been applied.
//! - `k_cache` and `v_cache` are `[n_head_kv, n_slots, d_head]` of f16 or f32. `state[0]` tokens were there before this launch,
//!   so token t of the launch has position `i = state[0] + t`. Position i lies in slot `i mod n_slots`: where `window > 0`
//!   the cache may be a ring, of at least `window − 1 + n_tokens` slots, whose oldest keys no query sees any more.
//!   Otherwise positions end at `n_slots`.
//! - Query head h reads KV head `h / (n_head / n_head_kv)`. `d_head` is a multiple of 8; a kernel named `_32` takes
//!   up to 32, `_64` up to 64, `_128` up to 128.
//! - Key j is visible to query i iff `j ≤ i` and, where `window > 0`, `i − j < window`.
//! - `sinks` is empty or `[n_head]`: a logit per query head that enters the softmax's denominator and nothing else.
//! - Sums run over positions in rising order, whatever slots they lie in: a ring gives the bits that a whole cache gives.
//! - Scores are kept in units of log2 e, so that [`Float::exp2`] is the exponential: `scale` (1/√d_head) and log2 e are
//!   multiplied into q.
//!
//! A value that f16 cannot hold (|x| ≥ 65520) goes to the cache, or into the tensor cores, as NaN and not as infinity: a
//! score of −∞ would drop a key in silence, NaN shows in every result it touches. Nothing is clamped.

pub mod kv_append;
pub mod prefill;
mod single_query;
pub mod token;

use cuda_std::{Disjoint, Float, Global, Store, f16, pack_f16x2, unpack_f16x2};

/// A running maximum before the first score: below every real one, yet finite, since −∞ − −∞ is NaN.
const NO_SCORE: f32 = -3.0e38;

/// What the kernels' scalar parameters say.
#[derive(Clone, Copy)]
struct Shape {
    n_head: u32,
    n_head_kv: u32,
    d_head: u32,
    n_slots: u32,
    /// 0: none.
    window: u32,
    scale: f32,
}

impl Shape {
    /// Elements of a row of `qkv`.
    #[inline(always)]
    fn qkv_width(&self) -> usize {
        ((self.n_head + 2 * self.n_head_kv) * self.d_head) as usize
    }

    /// The KV head of query head `head`. One division, as `n_head_kv` divides `n_head`.
    #[inline(always)]
    fn kv_head(&self, head: u32) -> u32 {
        head * self.n_head_kv / self.n_head.max(1)
    }

    /// Query head `head` of row `token` of `qkv`.
    ///
    /// # Safety
    ///
    /// The launch contract, and both exist.
    #[inline(always)]
    unsafe fn query(&self, qkv: Global<f32>, token: u32, head: u32) -> Global<f32> {
        // SAFETY: the caller's promise.
        unsafe {
            qkv.row_unchecked(token as usize, self.qkv_width()).row_unchecked(head as usize, self.d_head as usize)
        }
    }

    /// The `[n_slots, d_head]` matrix of a KV head.
    ///
    /// # Safety
    ///
    /// The launch contract, and the head exists.
    #[inline(always)]
    unsafe fn head_of<E: CacheElement>(&self, cache: Global<E>, kv_head: u32) -> Global<E> {
        // SAFETY: the caller's promise.
        unsafe { cache.row_unchecked(kv_head as usize, self.n_slots as usize * self.d_head as usize) }
    }

    /// The first key visible to the query at `position`.
    #[inline(always)]
    fn first_key(&self, position: u32) -> u32 {
        if self.window > 0 { (position + 1).saturating_sub(self.window) } else { 0 }
    }
}

/// What kernels that have no time to divide want to know of `n_slots`, which is at least 1.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn reciprocal(n_slots: u32) -> u64 {
    u64::MAX / n_slots as u64
}

/// Consecutive positions of a cache: where they lie.
#[derive(Clone, Copy)]
struct Slots {
    /// The first position's.
    first: u32,
    n_slots: u32,
}

impl Slots {
    /// Positions from `first_key` on.
    #[inline(always)]
    fn from(shape: &Shape, first_key: u32) -> Self {
        // Without a window positions end before `n_slots`, and no division delays the first load.
        let first = if shape.window > 0 { first_key % shape.n_slots.max(1) } else { first_key };
        Self { first, n_slots: shape.n_slots }
    }

    /// As [`from`](Self::from), with [`reciprocal`]`(n_slots)`: before the first load of a decode step, a division is a tenth of
    /// a microsecond.
    #[inline(always)]
    fn without_division(shape: &Shape, first_key: u32, n_slots_reciprocal: u64) -> Self {
        let quotient = ((u128::from(first_key) * u128::from(n_slots_reciprocal)) >> 64) as u32;
        // The quotient is right or one too small.
        let rest = first_key - quotient * shape.n_slots;
        Self { first: rest.min(rest.wrapping_sub(shape.n_slots)), n_slots: shape.n_slots }
    }

    /// Where the position `i` after the first lies; `i` is at most `n_slots`.
    #[inline(always)]
    fn of(self, i: u32) -> u32 {
        let slot = self.first + i;
        // The smaller of the two is the one that did not wrap around below zero.
        slot.min(slot.wrapping_sub(self.n_slots))
    }

    /// The positions from `i` on; `i` is at most `n_slots`.
    #[inline(always)]
    fn after(self, i: u32) -> Self {
        Self { first: self.of(i), ..self }
    }
}

/// The sink of `head` in units of log2 e, or −∞ where there is none.
#[inline(always)]
fn sink_of(sinks: Global<f32>, head: u32) -> f32 {
    if sinks.len() == 0 { f32::NEG_INFINITY } else { sinks[head as usize] * core::f32::consts::LOG2_E }
}

/// What `o` is multiplied by to become the output: `1 / Σ`, with the sink as one more term of the sum. At the end and not the
/// start, so that a large sink does not shrink the numerators below what f16 holds.
#[inline(always)]
fn normalizer(m: f32, l: f32, sink: f32) -> f32 {
    let largest = m.max(sink);
    let weight = Float::exp2(m - largest);
    weight / (weight * l + Float::exp2(sink - largest))
}

/// NaN for what rounds to an infinite f16: see the module's comment.
#[inline(always)]
fn nan_past_f16(x: f32) -> f32 {
    const FIRST_TO_ROUND_TO_INFINITY: f32 = 65520.0;
    if x.abs() < FIRST_TO_ROUND_TO_INFINITY { x } else { f32::NAN }
}

/// An element type of the cache.
trait CacheElement: Store {
    /// Eight neighbours as they lie in memory.
    type Eight: Copy + Default;

    /// Rounds; NaN for what f16 cannot hold.
    fn round(x: f32) -> Self;

    /// Exact.
    fn value(self) -> f32;

    /// Loads elements `at..at + 8`, 16 bytes at a time.
    ///
    /// # Safety
    ///
    /// They are inside, and their address is a multiple of 16.
    unsafe fn load_eight(source: Global<Self>, at: usize) -> Self::Eight;

    /// Their values.
    fn widen(eight: Self::Eight) -> [f32; 8];

    /// Rounds `values` and stores them at `at..at + 8`, 16 bytes at a time.
    ///
    /// # Safety
    ///
    /// As [`load_eight`](Self::load_eight), and they are this thread's alone.
    unsafe fn store_eight(target: Disjoint<Self>, at: usize, values: [f32; 8]);
}

impl CacheElement for f16 {
    type Eight = [u32; 4];

    #[inline(always)]
    fn round(x: f32) -> Self {
        f16::from_f32(nan_past_f16(x))
    }

    #[inline(always)]
    fn value(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load_eight(source: Global<Self>, at: usize) -> [u32; 4] {
        // SAFETY: the caller's promise.
        unsafe { source.load16(at) }
    }

    #[inline(always)]
    fn widen(eight: [u32; 4]) -> [f32; 8] {
        let [[a, b], [c, d], [e, f], [g, h]] = eight.map(unpack_f16x2);
        [a, b, c, d, e, f, g, h]
    }

    #[inline(always)]
    unsafe fn store_eight(target: Disjoint<Self>, at: usize, values: [f32; 8]) {
        let [a, b, c, d, e, f, g, h] = values.map(nan_past_f16);
        // SAFETY: the caller's promise.
        unsafe {
            target.store16(at, [pack_f16x2(a, b), pack_f16x2(c, d), pack_f16x2(e, f), pack_f16x2(g, h)]);
        }
    }
}

impl CacheElement for f32 {
    type Eight = [[u32; 4]; 2];

    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn value(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load_eight(source: Global<Self>, at: usize) -> [[u32; 4]; 2] {
        // SAFETY: the caller's promise.
        unsafe { [source.load16(at), source.load16(at + 4)] }
    }

    #[inline(always)]
    fn widen(eight: [[u32; 4]; 2]) -> [f32; 8] {
        let [[a, b, c, d], [e, f, g, h]] = eight;
        [a, b, c, d, e, f, g, h].map(f32::from_bits)
    }

    #[inline(always)]
    unsafe fn store_eight(target: Disjoint<Self>, at: usize, values: [f32; 8]) {
        let [a, b, c, d, e, f, g, h] = values.map(f32::to_bits);
        // SAFETY: the caller's promise.
        unsafe {
            target.store16(at, [a, b, c, d]);
            target.store16(at + 4, [e, f, g, h]);
        }
    }
}
