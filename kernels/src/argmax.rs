//! The likeliest token, and the step to the next position.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Global, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

const THREADS: u32 = 1024;
const WARPS: usize = (THREADS / WARP_SIZE) as usize;

/// What [`argmax`](fn@argmax) answers if a logit is NaN: no token has this id.
pub const NOT_A_NUMBER: u32 = u32::MAX;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[argmax::ENTRY];

/// The one geometry [`argmax`](fn@argmax) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch() -> Launch {
    Launch::linear(1, THREADS)
}

/// Orders candidates: by logit, and the lower id first among equals. NaN beats all, so that it is not lost.
#[inline(always)]
fn beats(logit: f32, id: u32, other_logit: f32, other_id: u32) -> bool {
    if logit.is_nan() || other_logit.is_nan() {
        return logit.is_nan();
    }
    logit > other_logit || (logit == other_logit && id < other_id)
}

/// The larger candidate of the warp's lanes, in every lane.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
unsafe fn best_of_warp(mut logit: f32, mut id: u32) -> (f32, u32) {
    let mut step = WARP_SIZE / 2;
    while step > 0 {
        // SAFETY: the caller's promise.
        let (other_logit, other_id) = unsafe { (warp::shuffle_xor(logit, step), warp::shuffle_xor(id, step)) };
        if beats(other_logit, other_id, logit, id) {
            (logit, id) = (other_logit, other_id);
        }
        step /= 2;
    }
    (logit, id)
}

/// Writes the id of the largest logit where the next step reads its token, and moves the position on.
///
/// - Math: `token[0] = min { i : logits[i] = max logits }`, or [`NOT_A_NUMBER`] if a logit is NaN;
///   `state[0] ← state[0] + n_tokens`.
/// - Shapes: `token`: `[1]`; `state`: `[1]`, the number of tokens in the KV cache; `logits`: `[n_vocab]`.
/// - Launch: [`launch`]`()`, one block; thread t looks at logits `t`, `t + 1024`, ….
/// - Shared memory: 256 bytes, one candidate a warp; one barrier.
/// - Cost: `4 · n_vocab` bytes through one SM.
/// - Determinism: exact, whatever the order.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS)]
pub unsafe fn argmax(token: Disjoint<u32>, state: Disjoint<u32>, logits: Global<f32>, n_tokens: u32) {
    let thread = thread::thread_idx_x();
    let (mut logit, mut id) = (f32::NEG_INFINITY, NOT_A_NUMBER);
    let mut i = thread as usize;
    while i < logits.len() {
        let candidate = logits[i];
        if beats(candidate, i as u32, logit, id) {
            (logit, id) = (candidate, i as u32);
        }
        i += THREADS as usize;
    }

    let warp_logits = shared_array!(argmax_logits: [f32; WARPS]);
    let warp_ids = shared_array!(argmax_ids: [u32; WARPS]);
    let (warp, lane) = ((thread / WARP_SIZE) as usize, (thread % WARP_SIZE) as usize);
    // SAFETY: all threads run this straight code, so every warp is whole. Each warp's first lane writes the warp's own
    // element, the barrier orders it before the reads, and 32 warps fill the 32 elements that lanes read.
    unsafe {
        (logit, id) = best_of_warp(logit, id);
        if lane == 0 {
            warp_logits.write(warp, logit);
            warp_ids.write(warp, id);
        }
        thread::sync_threads();
        (logit, id) = best_of_warp(warp_logits.read(lane), warp_ids.read(lane));
    }
    if thread == 0 {
        // SAFETY: one thread of one block.
        unsafe {
            token.write(0, if logit.is_nan() { NOT_A_NUMBER } else { id });
            state.write(0, state.read(0) + n_tokens);
        }
    }
}
