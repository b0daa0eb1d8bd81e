//! The likeliest tokens: what a sampler that keeps the top k needs of 200,000 logits.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Global, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// Logits of a part: what a block looks at.
pub const PART: u32 = THREADS * PER_THREAD as u32;
/// Candidates that a part gives; no top-k beyond it can be taken from them.
pub const KEPT: u32 = 64;

const THREADS: u32 = 256;
const PER_THREAD: usize = 8;
const WARPS: usize = (THREADS / WARP_SIZE) as usize;
/// Two counts a warp: one is read while the other is written.
const COUNTS: usize = 2 * WARPS;
/// A count for each warp and each of its threads' values, of values above and at the threshold.
const RANKS: usize = 2 * WARPS * PER_THREAD;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[likeliest::ENTRY];

/// Parts of a vocabulary.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn n_parts(n_vocab: u32) -> u32 {
    n_vocab.div_ceil(PART)
}

/// The one geometry [`likeliest`](fn@likeliest) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_vocab: u32) -> Launch {
    Launch::linear(n_parts(n_vocab), THREADS)
}

/// Integers in the order of floats, from 1 on; NaN above all, so that it is kept and seen.
#[inline(always)]
fn key_of(logit: f32) -> u32 {
    let bits = logit.to_bits();
    if logit.is_nan() {
        u32::MAX
    } else if bits >> 31 == 0 {
        bits | 0x8000_0000
    } else {
        // −∞ has the smallest: 0x007f_ffff.
        !bits
    }
}

/// Finds the 64 largest logits of each part of the vocabulary.
///
/// - Math: of logits `[2048 b, 2048 (b + 1))`, those 64 that are largest, a lower id before a higher among equals, in no
///   particular order; all if there are fewer, then −∞ with id `u32::MAX`.
/// - Shapes: `values`, `ids`: `[n_parts, 64]`; `logits`: `[n_vocab]`.
/// - Launch: [`launch`]`(n_vocab)`, a block a part; thread t has every 256th of it in registers.
/// - Shared memory: 576 bytes; a barrier for each of the 32 bits of the threshold, and one more.
/// - Cost: latency, about that of the barriers: the 4 bytes of each logit are read once.
/// - Determinism: exact, and in one order.
/// - Source: selection by bits from the top, as in a radix select.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 2)]
pub unsafe fn likeliest(values: Disjoint<f32>, ids: Disjoint<u32>, logits: Global<f32>) {
    let (part, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    let (warp_idx, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
    let n_vocab = logits.len() as u32;
    let id_of = |j: usize| part * PART + j as u32 * THREADS + thread;
    let mut logit = [f32::NEG_INFINITY; PER_THREAD];
    // 0: no logit is there.
    let mut key = [0; PER_THREAD];
    let mut j = 0;
    while j < PER_THREAD {
        let id = id_of(j);
        if id < n_vocab {
            logit[j] = logits[id as usize];
            key[j] = key_of(logit[j]);
        }
        j += 1;
    }

    let counts = shared_array!(likeliest_counts: [u32; COUNTS]);
    // The largest threshold that 64 keys reach, from its highest bit down; 0 if there are fewer.
    let mut threshold = 0;
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        let candidate = threshold | 1 << bit;
        let mut count = 0;
        let mut j = 0;
        while j < PER_THREAD {
            // SAFETY: whole warps run this straight code.
            count += unsafe { warp::ballot(key[j] >= candidate) }.count_ones();
            j += 1;
        }
        let buffer = (bit & 1) * WARPS as u32;
        // SAFETY: the whole block is here. Lanes write the same count to their warp's element, one after the other's
        // reading of two barriers ago.
        let all = unsafe {
            if lane == 0 {
                counts.write((buffer + warp_idx) as usize, count);
            }
            thread::sync_threads();
            let mut all = 0;
            let mut w = 0;
            while w < WARPS as u32 {
                all += counts.read((buffer + w) as usize);
                w += 1;
            }
            all
        };
        if all >= KEPT {
            threshold = candidate;
        }
    }

    // Where each kept one goes: those above the threshold first, then as many at it as there is room for.
    let ranks = shared_array!(likeliest_ranks: [u32; RANKS]);
    let (mut above_mine, mut at_mine) = ([0; PER_THREAD], [0; PER_THREAD]);
    let mut j = 0;
    while j < PER_THREAD {
        // SAFETY: whole warps; the first lane writes its warp's elements, once.
        unsafe {
            let above = warp::ballot(key[j] > threshold);
            let at = warp::ballot(key[j] == threshold && threshold > 0);
            let before = (1 << lane) - 1;
            (above_mine[j], at_mine[j]) = ((above & before).count_ones(), (at & before).count_ones());
            if lane == 0 {
                let slot = j * WARPS + warp_idx as usize;
                ranks.write(slot, above.count_ones());
                ranks.write(RANKS / 2 + slot, at.count_ones());
            }
        }
        j += 1;
    }
    // SAFETY: the whole block is here.
    unsafe { thread::sync_threads() };
    let (mut n_above, mut n_at) = (0, 0);
    let mut slot = 0;
    while slot < RANKS / 2 {
        // SAFETY: written before the barrier.
        let (above, at) = unsafe { (ranks.read(slot), ranks.read(RANKS / 2 + slot)) };
        let mut j = 0;
        while j < PER_THREAD {
            if slot == j * WARPS + warp_idx as usize {
                above_mine[j] += n_above;
                at_mine[j] += n_at;
            }
            j += 1;
        }
        n_above += above;
        n_at += at;
        slot += 1;
    }
    let out = part * KEPT;
    let mut j = 0;
    while j < PER_THREAD {
        let at = if key[j] > threshold { above_mine[j] } else { n_above + at_mine[j] };
        if key[j] >= threshold && key[j] > 0 && at < KEPT {
            // SAFETY: ranks are distinct.
            unsafe {
                values.write((out + at) as usize, logit[j]);
                ids.write((out + at) as usize, id_of(j));
            }
        }
        j += 1;
    }
    let n_kept = if n_above + n_at < KEPT { n_above + n_at } else { KEPT };
    if n_kept <= thread && thread < KEPT {
        // SAFETY: nobody else writes the places that are left.
        unsafe {
            values.write((out + thread) as usize, f32::NEG_INFINITY);
            ids.write((out + thread) as usize, u32::MAX);
        }
    }
}
