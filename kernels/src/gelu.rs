//! The Gaussian error linear unit, exact and in the tanh form.

use cuda_std::{Disjoint, Float, Global, kernel, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

const THREADS: u32 = 256;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[gelu_erf::ENTRY, gelu_tanh::ENTRY];

/// The one geometry the kernels of this file are written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_elements: u32) -> Launch {
    Launch::linear(n_elements.div_ceil(THREADS), THREADS)
}

/// The error function, within 1.5e-7 absolutely: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 7.1.26.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let t = 1.0.div_full(1.0 + 0.327_591_1 * x.abs());
    let polynomial = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let magnitude = 1.0 - polynomial * Float::exp(-x * x);
    if x < 0.0 { -magnitude } else { magnitude }
}

/// `x · Φ(x)`, Φ being the normal distribution: the definition.
#[inline(always)]
pub fn exact(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * core::f32::consts::FRAC_1_SQRT_2))
}

/// `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, up to 4.7e-4 from [`exact`]; what `gelu_new` checkpoints were trained with.
#[inline(always)]
pub fn tanh_form(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + Float::tanh(SQRT_2_OVER_PI * x * (1.0 + 0.044_715 * x * x)))
}

/// Applies the exact GELU to each element of `x`.
///
/// - Math: `out[i] = x[i] · Φ(x[i])`; [`erf`] is within 1.5e-7.
/// - Shapes: `out`, `x`: any, of the same length; both may be the same memory.
/// - Launch: [`launch`]`(n_elements)`, a thread an element.
/// - Shared memory: none, and no barrier.
/// - Cost: memory bound, 8 bytes an element.
/// - Determinism: one fixed order of operations; `ex2.approx` differs from the emulator's by 2 ulp.
/// - Source: Hendrycks, Gimpel, *Gaussian Error Linear Units*, arXiv:1606.08415, eq. 1.
///
/// # Safety
///
/// Launched as above; the slices have equal lengths.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn gelu_erf(out: Disjoint<f32>, x: Global<f32>) {
    let i = (thread::block_idx_x() * THREADS + thread::thread_idx_x()) as usize;
    if i < x.len() {
        // SAFETY: element i is this thread's alone.
        unsafe { out.write(i, exact(x[i])) };
    }
}

/// Applies the tanh form of GELU to each element of `x`.
///
/// - Math: `out[i] = ½ x[i] (1 + tanh(√(2/π) (x[i] + 0.044715 x[i]³)))`.
/// - Shapes: `out`, `x`: any, of the same length; both may be the same memory.
/// - Launch: [`launch`]`(n_elements)`, a thread an element.
/// - Shared memory: none, and no barrier.
/// - Cost: memory bound, 8 bytes an element.
/// - Determinism: as [`gelu_erf`](fn@gelu_erf).
/// - Source: arXiv:1606.08415, section 2.
///
/// # Safety
///
/// As [`gelu_erf`](fn@gelu_erf).
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn gelu_tanh(out: Disjoint<f32>, x: Global<f32>) {
    let i = (thread::block_idx_x() * THREADS + thread::thread_idx_x()) as usize;
    if i < x.len() {
        // SAFETY: element i is this thread's alone.
        unsafe { out.write(i, tanh_form(x[i])) };
    }
}
