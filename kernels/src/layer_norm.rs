//! Layer normalization.

use crate::block;
use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Float, Global, kernel, shared_array, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / WARP_SIZE;
const SUMS: usize = THREADS as usize;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[layer_norm::ENTRY];

/// The one geometry [`layer_norm`](fn@layer_norm) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32) -> Launch {
    Launch::linear(n_tokens, THREADS)
}

/// Normalizes each row of `x` to zero mean and unit variance, then scales and shifts it.
///
/// - Math: `out[t, c] = γ[c] · (x[t, c] − μₜ) / √(σₜ² + ε) + β[c]`; μₜ, σₜ²: mean and biased variance of row t.
/// - Shapes: `out`, `x`: `[n_tokens, d_model]`; `gamma`, `beta`: `[d_model]`. `epsilon` is added to the variance.
/// - Launch: [`launch`]`(n_tokens)`. A block owns row t, a thread its columns `c ≡ thread (mod 256)`.
/// - Shared memory: 2 KiB, a sum in each thread's place, twice; two barriers.
/// - Cost: memory bound, `8 · n_tokens · d_model` bytes if a row stays cached over its three passes.
/// - Determinism: IEEE operations in one fixed order; devices contract `a · b + c` to one rounding, the emulator does not.
/// - Source: Ba, Kiros, Hinton, *Layer Normalization*, arXiv:1607.06450, eq. 3.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn layer_norm(out: Disjoint<f32>, x: Global<f32>, gamma: Global<f32>, beta: Global<f32>, epsilon: f32) {
    let (t, thread, d) = (thread::block_idx_x() as usize, thread::thread_idx_x(), gamma.len());
    let (Some(x), Some(beta)) = (x.row(t, d), beta.row(0, d)) else {
        return; // Past the last row: the whole block leaves.
    };

    let mut sum = 0.0;
    for c in columns(d) {
        sum += x[c];
    }
    // SAFETY: the whole block is here, and this array is used once.
    let mean = unsafe { block::sum(sum, thread, WARPS, shared_array!(layer_norm_sums: [f32; SUMS])) } / d as f32;

    // A second pass, since E[x²] − E[x]² cancels when |mean| ≫ σ.
    let mut squares = 0.0;
    for c in columns(d) {
        squares += (x[c] - mean) * (x[c] - mean);
    }
    // SAFETY: as above.
    let variance =
        unsafe { block::sum(squares, thread, WARPS, shared_array!(layer_norm_squares: [f32; SUMS])) } / d as f32;
    let rstd = Float::sqrt(variance + epsilon).recip();

    for c in columns(d) {
        // SAFETY: element `(t, c)` is this thread's alone.
        unsafe { out.write(t * d + c, (x[c] - mean) * rstd * gamma[c] + beta[c]) };
    }
}

/// This thread's columns below `d`.
#[inline(always)]
fn columns(d: usize) -> impl Iterator<Item = usize> {
    let mut at = thread::thread_idx_x() as usize;
    core::iter::from_fn(move || {
        if d <= at {
            return None;
        }
        let this = at;
        at += THREADS as usize;
        Some(this)
    })
}
