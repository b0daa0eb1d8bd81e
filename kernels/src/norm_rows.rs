//! Rows of f32 turned into rows of f16 under a power of two each, normalized on the way or not: what
//! [`crate::matmul::rows`] multiplies. For the twins that keep f32 see [`crate::rms_norm`] and [`crate::layer_norm`].

use crate::matmul::powers::power_of_row;
use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Float, Global, Shared, f16, kernel, pack_f16x2, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// A block a row.
const THREADS: u32 = 256;
const WARPS: u32 = THREADS / WARP_SIZE;
const SUMS: usize = THREADS as usize;
/// Elements that a thread takes at a time: 16 bytes of f16.
const OCTET: usize = 8;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[rms_norm_f16::ENTRY, layer_norm_f16::ENTRY, to_f16::ENTRY];

/// The one geometry the kernels of this file are written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32) -> Launch {
    Launch::linear(n_tokens, THREADS)
}

/// [`rms_norm`](crate::rms_norm::rms_norm()) into f16.
///
/// - Math: `out[t, c] · factors[t] ≈ γ[c] · x[t, c] / √(mean_c(x[t, c]²) + ε)`, `factors[t]` a power of two such that the
///   row's largest magnitude is in 2¹⁴..2¹⁵: f16 rounds by 2⁻¹¹ of an element, or 2⁻³⁹ of the row's largest if that is
///   more. A NaN or an infinity stays in its place.
/// - Shapes: `out`, `x`: `[n_tokens, d_model]`; `factors`: `[n_tokens]`; `gamma`: `[d_model]`, d_model a multiple of 8; all
///   from multiples of 16 bytes on. `epsilon` is added to the mean square.
/// - Launch: [`launch`]`(n_tokens)`. A block owns a row, thread i its octets `i`, `i + 256`, ….
/// - Shared memory: 2 KiB, a sum or a maximum in each thread's place; two barriers.
/// - Cost: memory bound, `6 · n_tokens · d_model` bytes if a row stays cached over its three passes.
/// - Determinism: f32 sums in one fixed order; devices contract `a · b + c`.
/// - Source: as [`rms_norm`](crate::rms_norm::rms_norm()).
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn rms_norm_f16(
    out: Disjoint<f16>,
    factors: Disjoint<f32>,
    x: Global<f32>,
    gamma: Global<f32>,
    epsilon: f32,
) {
    let (row, d) = (thread::block_idx_x() as usize, gamma.len());
    let mut squares = 0.0;
    for c in octets(d) {
        // SAFETY: the row has whole octets and starts at a multiple of 16 bytes.
        let x = unsafe { octet(x, row * d + c) };
        squares += sum(x.map(|x| x * x));
    }
    // SAFETY: the whole block is here, and this array is used once.
    let square = unsafe { sum_of_block(squares, shared_array!(rms_norm_f16_sums: [f32; SUMS])) };
    let scale = Float::sqrt(square / d as f32 + epsilon).recip();
    let maxima = shared_array!(rms_norm_f16_maxima: [f32; SUMS]);
    // SAFETY: as above; this row is this block's alone.
    unsafe {
        write(out, factors, row, d, maxima, |c| {
            let (x, gamma) = (octet(x, row * d + c), octet(gamma, c));
            core::array::from_fn(|i| x[i] * scale * gamma[i])
        });
    }
}

/// [`layer_norm`](crate::layer_norm::layer_norm()) into f16.
///
/// - Math: `out[t, c] · factors[t] ≈ γ[c] · (x[t, c] − μₜ) / √(σₜ² + ε) + β[c]`; μₜ, σₜ²: mean and biased variance of row
///   t; factors and rounding as [`rms_norm_f16`](fn@rms_norm_f16).
/// - Shapes: `out`, `x`: `[n_tokens, d_model]`; `factors`: `[n_tokens]`; `gamma`, `beta`: `[d_model]`, d_model a multiple of
///   8; all from multiples of 16 bytes on. `epsilon` is added to the variance.
/// - Launch: [`launch`]`(n_tokens)`. A block owns a row, thread i its octets `i`, `i + 256`, ….
/// - Shared memory: 3 KiB, a sum or a maximum in each thread's place; three barriers.
/// - Cost: memory bound, `6 · n_tokens · d_model` bytes if a row stays cached over its four passes.
/// - Determinism: f32 sums in one fixed order; devices contract `a · b + c`.
/// - Source: as [`layer_norm`](crate::layer_norm::layer_norm()).
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 3)]
pub unsafe fn layer_norm_f16(
    out: Disjoint<f16>,
    factors: Disjoint<f32>,
    x: Global<f32>,
    gamma: Global<f32>,
    beta: Global<f32>,
    epsilon: f32,
) {
    let (row, d) = (thread::block_idx_x() as usize, gamma.len());
    let mut total = 0.0;
    for c in octets(d) {
        // SAFETY: the row has whole octets and starts at a multiple of 16 bytes.
        total += sum(unsafe { octet(x, row * d + c) });
    }
    // SAFETY: the whole block is here, and this array is used once.
    let mean = unsafe { sum_of_block(total, shared_array!(layer_norm_f16_sums: [f32; SUMS])) } / d as f32;

    // A second pass, since E[x²] − E[x]² cancels when |mean| ≫ σ.
    let mut squares = 0.0;
    for c in octets(d) {
        // SAFETY: as above.
        let x = unsafe { octet(x, row * d + c) };
        squares += sum(x.map(|x| (x - mean) * (x - mean)));
    }
    // SAFETY: as above.
    let square = unsafe { sum_of_block(squares, shared_array!(layer_norm_f16_squares: [f32; SUMS])) };
    let scale = Float::sqrt(square / d as f32 + epsilon).recip();
    let maxima = shared_array!(layer_norm_f16_maxima: [f32; SUMS]);
    // SAFETY: as above; this row is this block's alone.
    unsafe {
        write(out, factors, row, d, maxima, |c| {
            let (x, gamma, beta) = (octet(x, row * d + c), octet(gamma, c), octet(beta, c));
            core::array::from_fn(|i| (x[i] - mean) * scale * gamma[i] + beta[i])
        });
    }
}

/// Rows of f32 into f16.
///
/// - Math: `out[t, c] · factors[t] ≈ x[t, c]`; factors and rounding as [`rms_norm_f16`](fn@rms_norm_f16).
/// - Shapes: `out`, `x`: `[n_tokens, d]`, d a multiple of 8; `factors`: `[n_tokens]`; all from multiples of 16 bytes on.
/// - Launch: [`launch`]`(n_tokens)`. A block owns a row, thread i its octets `i`, `i + 256`, ….
/// - Shared memory: 1 KiB, a maximum in each thread's place; one barrier.
/// - Cost: memory bound, `6 · n_tokens · d` bytes if a row stays cached over its two passes.
/// - Determinism: the same bits everywhere.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn to_f16(out: Disjoint<f16>, factors: Disjoint<f32>, x: Global<f32>, d: u32) {
    let (row, d) = (thread::block_idx_x() as usize, d as usize);
    let maxima = shared_array!(to_f16_maxima: [f32; SUMS]);
    // SAFETY: the whole block is here; the row has whole octets, and is this block's alone.
    unsafe { write(out, factors, row, d, maxima, |c| octet(x, row * d + c)) };
}

/// Finds the row's power of two, then writes both. `value` gives elements `c..c + 8`.
///
/// # Safety
///
/// The whole block is here, nobody else writes this row, and `maxima` is used nowhere else.
#[inline(always)]
unsafe fn write(
    out: Disjoint<f16>,
    factors: Disjoint<f32>,
    row: usize,
    d: usize,
    maxima: Shared<f32>,
    value: impl Fn(usize) -> [f32; OCTET],
) {
    let mut largest = 0.0f32;
    for c in octets(d) {
        let [p, q, r, s, t, u, v, w] = value(c).map(f32::abs);
        largest = largest.max(p.max(q).max(r.max(s))).max(t.max(u).max(v.max(w)));
    }
    let thread = thread::thread_idx_x();
    // SAFETY: every warp is whole; each thread writes its own element, and the barrier orders that before the reads.
    let largest = unsafe {
        maxima.write(thread as usize, warp::max(largest));
        thread::sync_threads();
        warp::max_of::<WARPS>(maxima.read((thread % WARPS * WARP_SIZE) as usize))
    };
    let [power, inverse] = power_of_row(largest);
    for c in octets(d) {
        let [p, q, r, s, t, u, v, w] = value(c).map(|value| value * inverse);
        let halves = [pack_f16x2(p, q), pack_f16x2(r, s), pack_f16x2(t, u), pack_f16x2(v, w)];
        // SAFETY: these octets are this thread's alone, and whole 16 bytes.
        unsafe { out.store16(row * d + c, halves) };
    }
    if thread == 0 {
        // SAFETY: one thread writes it.
        unsafe { factors.write(row, power) };
    }
}

/// Where this thread's octets below `d` start.
#[inline(always)]
fn octets(d: usize) -> impl Iterator<Item = usize> {
    let mut at = OCTET * thread::thread_idx_x() as usize;
    core::iter::from_fn(move || {
        if d <= at {
            return None;
        }
        let this = at;
        at += OCTET * THREADS as usize;
        Some(this)
    })
}

/// Elements `i..i + 8`.
///
/// # Safety
///
/// They exist, from a multiple of 16 bytes on.
#[inline(always)]
unsafe fn octet(x: Global<f32>, i: usize) -> [f32; OCTET] {
    // SAFETY: the caller's promise.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (x.load16(i), x.load16(i + 4)) };
    [a, b, c, d, e, f, g, h].map(f32::from_bits)
}

#[inline(always)]
fn sum([a, b, c, d, e, f, g, h]: [f32; OCTET]) -> f32 {
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// The sum over the block, in every thread: over each warp, then over the warps.
///
/// # Safety
///
/// The whole block is here, and `sums` is used nowhere else.
#[inline(always)]
unsafe fn sum_of_block(value: f32, sums: Shared<f32>) -> f32 {
    let thread = thread::thread_idx_x();
    // SAFETY: every warp is whole; each thread writes its own element, and the barrier orders that before the reads.
    unsafe {
        sums.write(thread as usize, warp::sum(value));
        thread::sync_threads();
        warp::sum_of::<WARPS>(sums.read((thread % WARPS * WARP_SIZE) as usize))
    }
}
