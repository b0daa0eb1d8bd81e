//! The likeliest token, and the step to the next position.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Global, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// Blocks that share the logits, and so candidates of the last step.
pub const PARTS: u32 = 128;
const THREADS: u32 = 256;
const WARPS: usize = (THREADS / WARP_SIZE) as usize;

/// What [`argmax`](fn@argmax) answers if a logit is NaN: no token has this id.
pub const NOT_A_NUMBER: u32 = u32::MAX;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[argmax_parts::ENTRY, argmax::ENTRY];

/// The one geometry [`argmax_parts`](fn@argmax_parts) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_parts() -> Launch {
    Launch::linear(PARTS, THREADS)
}

/// The one geometry [`argmax`](fn@argmax) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch() -> Launch {
    Launch::linear(1, PARTS)
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

/// The largest candidate of the block's warps, in every thread.
///
/// # Safety
///
/// The whole block is here, once in its life; it has `n_warps` warps.
#[inline(always)]
unsafe fn best_of_block(logit: f32, id: u32, n_warps: u32) -> (f32, u32) {
    let warp_logits = shared_array!(argmax_logits: [f32; WARPS]);
    let warp_ids = shared_array!(argmax_ids: [u32; WARPS]);
    let (warp, lane) = (thread::thread_idx_x() / WARP_SIZE, thread::thread_idx_x() % WARP_SIZE);
    // SAFETY: every warp is whole. Its first lane writes its own element, and the barrier orders that before the reads of
    // the first `n_warps`.
    unsafe {
        let (logit, id) = best_of_warp(logit, id);
        if lane == 0 {
            warp_logits.write(warp as usize, logit);
            warp_ids.write(warp as usize, id);
        }
        thread::sync_threads();
        let from = lane.min(n_warps - 1) as usize;
        best_of_warp(warp_logits.read(from), warp_ids.read(from))
    }
}

/// Finds the largest logit of each part of the vocabulary.
///
/// - Math: with `s = ⌈n_vocab / 128⌉`, `best_logits[b] = max logits[b s..(b + 1) s]` and `best_ids[b]` the lowest id that
///   has it; a NaN is the largest. −∞ and [`NOT_A_NUMBER`] for a part past the end.
/// - Shapes: `best_logits`, `best_ids`: `[128]`; `logits`: `[n_vocab]`.
/// - Launch: [`launch_parts`]`()`, a block a part; thread t looks at every 256th.
/// - Shared memory: 64 bytes, one candidate a warp; one barrier.
/// - Cost: memory bound, `4 · n_vocab` bytes over all SMs.
/// - Determinism: exact, whatever the order.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS)]
pub unsafe fn argmax_parts(best_logits: Disjoint<f32>, best_ids: Disjoint<u32>, logits: Global<f32>) {
    let (part, thread) = (thread::block_idx_x() as usize, thread::thread_idx_x());
    let share = logits.len().div_ceil(PARTS as usize);
    let end = logits.len().min((part + 1) * share);
    let (mut logit, mut id) = (f32::NEG_INFINITY, NOT_A_NUMBER);
    let mut i = part * share + thread as usize;
    while i < end {
        let candidate = logits[i];
        if beats(candidate, i as u32, logit, id) {
            (logit, id) = (candidate, i as u32);
        }
        i += THREADS as usize;
    }
    // SAFETY: all threads run this straight code.
    (logit, id) = unsafe { best_of_block(logit, id, WARPS as u32) };
    if thread == 0 {
        // SAFETY: one thread of each block, its own element.
        unsafe {
            best_logits.write(part, logit);
            best_ids.write(part, id);
        }
    }
}

/// Writes the id of the largest logit where the next step reads its token, and moves the position on.
///
/// - Math: `token[0]` = the id of the largest candidate, the lowest among equals, or [`NOT_A_NUMBER`] if one is NaN;
///   `state[0] ← state[0] + n_tokens`.
/// - Shapes: `token`: `[1]`; `state`: `[1]`, the number of tokens in the KV cache; `best_logits`, `best_ids`: `[128]`, as
///   [`argmax_parts`](fn@argmax_parts) wrote them.
/// - Launch: [`launch`]`()`, one block, a thread a candidate.
/// - Shared memory: 64 bytes, one candidate a warp; one barrier.
/// - Cost: latency.
/// - Determinism: exact, whatever the order.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = PARTS)]
pub unsafe fn argmax(
    token: Disjoint<u32>,
    state: Disjoint<u32>,
    best_logits: Global<f32>,
    best_ids: Global<u32>,
    n_tokens: u32,
) {
    let thread = thread::thread_idx_x() as usize;
    // SAFETY: all threads run this straight code.
    let (logit, id) = unsafe { best_of_block(best_logits[thread], best_ids[thread], PARTS / WARP_SIZE) };
    if thread == 0 {
        // SAFETY: one thread of one block.
        unsafe {
            token.write(0, if logit.is_nan() { NOT_A_NUMBER } else { id });
            state.write(0, state.read(0) + n_tokens);
        }
    }
}
