//! gpt-oss's gated linear unit.

use cuda_std::{Disjoint, Float, Global, kernel, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

const THREADS: u32 = 256;
/// Beyond this `gate` and `up` do not grow.
const LIMIT: f32 = 7.0;
const ALPHA: f32 = 1.702;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[swiglu_oai::ENTRY];

/// The one geometry [`swiglu_oai`](fn@swiglu_oai) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_elements: u32) -> Launch {
    Launch::linear(n_elements.div_ceil(THREADS), THREADS)
}

/// `g σ(1.702 g) (u + 1)` with `g = min(gate, 7)`, not bounded below, and `u` = `up` brought to −7..7. NaN stays NaN.
#[inline(always)]
pub fn activation(gate: f32, up: f32) -> f32 {
    // Comparisons, since f32::min and max answer the number when the other is NaN.
    let gate = if gate > LIMIT { LIMIT } else { gate };
    let up = if up > LIMIT { LIMIT } else { up };
    let up = if up < -LIMIT { -LIMIT } else { up };
    gate.div_full(1.0 + Float::exp(-ALPHA * gate)) * (up + 1.0)
}

/// Applies [`activation`] to each pair of elements.
///
/// - Math: `out[i] = g σ(1.702 g) (clamp(up[i], −7, 7) + 1)`, `g = min(gate[i], 7)`.
/// - Shapes: `out`, `gate`, `up`: any, of the same length; `out` may be the memory of either.
/// - Launch: [`launch`]`(n_elements)`, a thread an element.
/// - Shared memory: none, and no barrier.
/// - Cost: memory bound, 12 bytes an element.
/// - Determinism: one fixed order of operations; `ex2.approx` differs from the emulator's by 2 ulp.
/// - Source: gpt-oss's reference implementation, `swiglu` in `gpt_oss/torch/model.py`.
///
/// # Safety
///
/// Launched as above; the slices have equal lengths.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn swiglu_oai(out: Disjoint<f32>, gate: Global<f32>, up: Global<f32>) {
    let i = (thread::block_idx_x() * THREADS + thread::thread_idx_x()) as usize;
    if i < gate.len() {
        // SAFETY: element i is this thread's alone.
        unsafe { out.write(i, activation(gate[i], up[i])) };
    }
}
