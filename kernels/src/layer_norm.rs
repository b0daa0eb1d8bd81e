//! Layer normalization.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Float, Global, kernel, lane_share, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

const ROWS_PER_BLOCK: u32 = 8;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[layer_norm::ENTRY];

/// The one geometry [`layer_norm`](fn@layer_norm) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32) -> Launch {
    Launch { grid: [n_tokens.div_ceil(ROWS_PER_BLOCK), 1, 1], block: [WARP_SIZE, ROWS_PER_BLOCK, 1] }
}

/// Normalizes each row of `x` to zero mean and unit variance, then scales and shifts it.
///
/// - Math: `out[t, c] = γ[c] · (x[t, c] − μₜ) / √(σₜ² + ε) + β[c]`; μₜ, σₜ²: mean and biased variance of row t.
/// - Shapes: `out`, `x`: `[n_tokens, d_model]`; `gamma`, `beta`: `[d_model]`. `epsilon` is added to the variance.
/// - Launch: [`launch`]`(n_tokens)`. A warp owns row `t = 8 · block + warp`, a lane its columns `c ≡ lane (mod 32)`.
/// - Shared memory: none, and no barrier.
/// - Cost: memory bound, `8 · n_tokens · d_model` bytes if a row stays cached over its three passes.
/// - Determinism: IEEE operations in one fixed order; devices contract `a · b + c` to one rounding, the emulator does not.
/// - Source: Ba, Kiros, Hinton, *Layer Normalization*, arXiv:1607.06450, eq. 3.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = 256, blocks_per_sm = 4)]
pub unsafe fn layer_norm(out: Disjoint<f32>, x: Global<f32>, gamma: Global<f32>, beta: Global<f32>, epsilon: f32) {
    let t = (thread::block_idx_x() * ROWS_PER_BLOCK + thread::thread_idx_y()) as usize;
    let (lane, d) = (thread::thread_idx_x(), gamma.len());
    let (Some(x), Some(beta)) = (x.row(t, d), beta.row(0, d)) else {
        return; // Past the last row. Whole warps leave, so the sums below stay full.
    };

    let mut sum = 0.0;
    for c in lane_share(lane, d) {
        sum += x[c];
    }
    // SAFETY: a row is a warp, so all 32 lanes are here.
    let mean = unsafe { warp::sum(sum) } / d as f32;

    // A second pass, since E[x²] − E[x]² cancels when |mean| ≫ σ.
    let mut squares = 0.0;
    for c in lane_share(lane, d) {
        squares += (x[c] - mean) * (x[c] - mean);
    }
    // SAFETY: as above.
    let variance = unsafe { warp::sum(squares) } / d as f32;
    let rstd = Float::sqrt(variance + epsilon).recip();

    for c in lane_share(lane, d) {
        // SAFETY: element `(t, c)` is this lane's alone.
        unsafe { out.write(t * d + c, (x[c] - mean) * rstd * gamma[c] + beta[c]) };
    }
}
