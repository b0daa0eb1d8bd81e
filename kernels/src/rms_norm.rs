//! Root-mean-square normalization.

use crate::block;
use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Float, Global, kernel, shared_array, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// A block a row: in decoding there is one row, and only many threads hide the latency of reading it.
const THREADS: u32 = 256;
const WARPS: u32 = THREADS / WARP_SIZE;
const SUMS: usize = THREADS as usize;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[rms_norm::ENTRY];

/// The one geometry [`rms_norm`](fn@rms_norm) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32) -> Launch {
    Launch::linear(n_tokens, THREADS)
}

/// Divides each row of `x` by its root mean square, and scales it.
///
/// - Math: `out[t, c] = γ[c] · x[t, c] / √(mean_c(x[t, c]²) + ε)`.
/// - Shapes: `out`, `x`: `[n_tokens, d_model]`; `gamma`: `[d_model]`, d_model a multiple of 4; all from multiples of 16
///   bytes on. `epsilon` is added to the mean square. `out` and `x` may be the same memory.
/// - Launch: [`launch`]`(n_tokens)`. A block owns a row, thread i its quads `i`, `i + 256`, ….
/// - Shared memory: 1 KiB, a warp's sum in each thread's place; one barrier.
/// - Cost: memory bound, `8 · n_tokens · d_model` bytes.
/// - Determinism: f32 sums in one fixed order; devices contract `a · b + c`.
/// - Source: Zhang, Sennrich, *Root Mean Square Layer Normalization*, arXiv:1910.07467, eq. 4.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn rms_norm(out: Disjoint<f32>, x: Global<f32>, gamma: Global<f32>, epsilon: f32) {
    let (thread, d) = (thread::thread_idx_x(), gamma.len());
    let first = thread::block_idx_x() as usize * d;

    let mut squares = 0.0;
    let mut c = 4 * thread as usize;
    while c < d {
        // SAFETY: the row has whole quads and starts at a multiple of 16 bytes.
        let [x, y, z, w] = unsafe { x.load16(first + c) }.map(f32::from_bits);
        squares += (x * x + y * y) + (z * z + w * w);
        c += 4 * THREADS as usize;
    }
    // SAFETY: all threads of the block are here, and this array is used once.
    let sum = unsafe { block::sum(squares, thread, WARPS, shared_array!(rms_norm_sums: [f32; SUMS])) };
    let scale = Float::sqrt(sum / d as f32 + epsilon).recip();

    let mut c = 4 * thread as usize;
    while c < d {
        // SAFETY: as above; these quads of the row are this thread's alone.
        unsafe {
            let (x, gamma) = (x.load16(first + c).map(f32::from_bits), gamma.load16(c).map(f32::from_bits));
            let normal =
                [x[0] * scale * gamma[0], x[1] * scale * gamma[1], x[2] * scale * gamma[2], x[3] * scale * gamma[3]];
            out.store16(first + c, normal.map(f32::to_bits));
        }
        c += 4 * THREADS as usize;
    }
}
