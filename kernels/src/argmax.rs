//! The likeliest token, and the step to the next position.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Atomics, Disjoint, Global, grid, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// The most blocks that share the logits, and so candidates of the last step.
pub const PARTS: u32 = 128;
/// Logits of a block, where all together have fewer than [`PARTS`] times as many.
#[cfg(not(target_arch = "nvptx64"))]
const SHARE: u32 = 1024;
const THREADS: u32 = 256;
const WARPS: u32 = THREADS / WARP_SIZE;
const SLOTS: usize = THREADS as usize;
/// Logits that a thread loads before it looks at the first.
const BATCH: usize = 8;

/// What [`argmax`](fn@argmax) answers if a logit is NaN: no token has this id.
pub const NOT_A_NUMBER: u32 = u32::MAX;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[argmax::ENTRY];

/// The one geometry [`argmax`](fn@argmax) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_vocab: u32) -> Launch {
    let n_parts = n_vocab.div_ceil(SHARE);
    Launch::linear(if n_parts < PARTS { n_parts } else { PARTS }, THREADS)
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
/// The whole block is here; a barrier lies between two calls.
#[inline(always)]
unsafe fn best_of_block(logit: f32, id: u32) -> (f32, u32) {
    let warp_logits = shared_array!(argmax_logits: [f32; SLOTS]);
    let warp_ids = shared_array!(argmax_ids: [u32; SLOTS]);
    let thread = thread::thread_idx_x();
    // SAFETY: every warp is whole. Each thread writes its own element, and the barrier orders that before the reads.
    unsafe {
        let (logit, id) = best_of_warp(logit, id);
        warp_logits.write(thread as usize, logit);
        warp_ids.write(thread as usize, id);
        thread::sync_threads();
        let from = (thread % WARPS * WARP_SIZE) as usize;
        best_of_warp(warp_logits.read(from), warp_ids.read(from))
    }
}

/// Writes the id of the largest logit where the next step reads its token, and moves the position on.
///
/// - Math: `token[0]` = the id of the largest logit, the lowest among equals, or [`NOT_A_NUMBER`] if one is NaN;
///   `state[0] ← state[0] + n_tokens`.
/// - Shapes: `token`: `[1]`; `state`: `[1]`, the number of tokens in the KV cache; `best_logits`, `best_ids`: `[PARTS]`,
///   work space; `arrived`: `[1]`, set to 0 once; `logits`: `[n_vocab]`.
/// - Launch: [`launch`]`(n_vocab)`. A block finds the largest of an equal share, thread t looking at every 256th of it; the
///   last to finish chooses among the blocks' candidates.
/// - Shared memory: 3 KiB, a candidate and a flag in each thread's place; at most four barriers.
/// - Cost: memory bound, `4 · n_vocab` bytes over all SMs.
/// - Determinism: exact, whatever the order.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS)]
pub unsafe fn argmax(
    token: Disjoint<u32>,
    state: Disjoint<u32>,
    best_logits: Disjoint<f32>,
    best_ids: Disjoint<u32>,
    arrived: Atomics<u32>,
    logits: Global<f32>,
    n_tokens: u32,
) {
    // A grid has a block: `max` tells LLVM so.
    let (part, n_parts) = (thread::block_idx_x(), thread::grid_dim_x().max(1));
    let (thread, n_vocab) = (thread::thread_idx_x(), logits.len() as u32);
    let share = n_vocab.div_ceil(n_parts);
    let end = n_vocab.min((part + 1) * share);
    let (mut logit, mut id) = (f32::NEG_INFINITY, NOT_A_NUMBER);
    let mut first = part * share + thread;
    while first < end {
        let (mut batch, mut k) = ([f32::NEG_INFINITY; BATCH], 0);
        while k < BATCH {
            let i = first + k as u32 * THREADS;
            if i < end {
                // SAFETY: below the length.
                batch[k] = f32::from_bits(unsafe { logits.load4(i as usize) });
            }
            k += 1;
        }
        k = 0;
        while k < BATCH {
            let i = first + k as u32 * THREADS;
            if i < end && beats(batch[k], i, logit, id) {
                (logit, id) = (batch[k], i);
            }
            k += 1;
        }
        first += BATCH as u32 * THREADS;
    }

    // SAFETY: all threads run this straight code; one of each block writes its own element, and the last block reads what
    // the others wrote before they arrived.
    unsafe {
        (logit, id) = best_of_block(logit, id);
        if thread == 0 {
            best_logits.write(part as usize, logit);
            best_ids.write(part as usize, id);
        }
        if !grid::is_last_block(arrived, 0, n_parts, shared_array!(argmax_flags: [u32; SLOTS])) {
            return;
        }
        (logit, id) = (f32::NEG_INFINITY, NOT_A_NUMBER);
        if thread < n_parts {
            (logit, id) = (best_logits.read_unchecked(thread as usize), best_ids.read_unchecked(thread as usize));
        }
        (logit, id) = best_of_block(logit, id);
        if thread == 0 {
            token.write(0, if logit.is_nan() { NOT_A_NUMBER } else { id });
            state.write(0, state.read(0) + n_tokens);
        }
    }
}
