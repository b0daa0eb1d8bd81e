//! What every block of the first kernel does for itself: the router's end, and the normalized token.

use super::gate_up::{GATE_UP_THREADS, GATE_UP_WARPS, MAX_D_MODEL};
use crate::router::{MAX_EXPERTS, order};
use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Float, Global, Shared, grid, pack_f16x2, shared_array, thread, warp};

/// Quads of `x` that a thread brings.
const X_QUADS: usize = MAX_D_MODEL.div_ceil(4 * GATE_UP_THREADS) as usize;
pub(super) const X_WORDS: usize = X_QUADS * 2 * GATE_UP_THREADS as usize;
/// Zeros behind `x`, for the columns of others.
pub(super) const ZERO_WORDS: u32 = 32;
/// Parts of the router's sums that a thread loads together.
const PARTS_AHEAD: usize = 9;
const EXPERT_SUMS: usize = (GATE_UP_WARPS * MAX_EXPERTS) as usize;

/// What a block knows of its token once the router is done.
pub(super) struct Routed {
    /// Expert ids in order of choice, an array of all threads' length.
    pub(super) sorted: Shared<u32>,
    /// By expert.
    logits: Shared<f32>,
    /// 1 / √(mean square + ε).
    scale: f32,
    /// This thread's quads of `x` and `gamma`: `thread`, `thread + GATE_UP_THREADS`, …; 0 past the end.
    x: [[u32; 4]; X_QUADS],
    gamma: [[u32; 4]; X_QUADS],
}

impl Routed {
    /// Waits for the grid before, and adds up the router's parts.
    ///
    /// # Safety
    ///
    /// The whole block is here; the slices have the shapes that [`experts_token_gate_up_mxfp4`] asks for.
    #[inline(always)]
    pub(super) unsafe fn of_block(
        x: Global<f32>,
        gamma: Global<f32>,
        parts: Global<f32>,
        router_bias: Global<f32>,
        epsilon: f32,
        d_model: u32,
        n_parts: u32,
    ) -> Self {
        let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
        let thread = warp_idx * WARP_SIZE + lane;
        let n_columns = parts.len() as u32 / n_parts.max(1);
        let n_expert = n_columns - 1;

        let quads = |from: Global<f32>| {
            let mut quads = [[0; 4]; X_QUADS];
            let mut k = 0;
            while k < X_QUADS {
                let i = 4 * (thread + k as u32 * GATE_UP_THREADS);
                if i < d_model {
                    // SAFETY: whole quads from a multiple of 16 bytes on.
                    quads[k] = unsafe { from.load16(i as usize) };
                }
                k += 1;
            }
            quads
        };
        let gamma = quads(gamma);
        let bias = if router_bias.len() > 0 && thread < n_expert { router_bias[thread as usize] } else { 0.0 };
        // SAFETY: once, by all threads.
        unsafe { grid::wait() };

        let sums = shared_array!(experts_token_sums: [f32; EXPERT_SUMS]);
        // Nothing is used before all is asked for.
        let x = quads(x);
        let square_at = |p: u32| {
            // SAFETY: the row's last element.
            if p < n_parts { unsafe { parts.read_unchecked((p * n_columns + n_expert) as usize) } } else { 0.0 }
        };
        let first_square = square_at(thread);
        let mut e = lane;
        while e < MAX_EXPERTS {
            let mut sum = 0.0;
            let mut p = warp_idx;
            while p < n_parts {
                let mut loaded = [0.0; PARTS_AHEAD];
                let mut i = 0;
                while i < PARTS_AHEAD {
                    let p = p + i as u32 * GATE_UP_WARPS;
                    if p < n_parts && e < n_expert {
                        // SAFETY: the element exists.
                        loaded[i] = unsafe { parts.read_unchecked((p * n_columns + e) as usize) };
                    }
                    i += 1;
                }
                let mut i = 0;
                while i < PARTS_AHEAD {
                    sum += loaded[i];
                    i += 1;
                }
                p += PARTS_AHEAD as u32 * GATE_UP_WARPS;
            }
            // SAFETY: each thread writes its own elements.
            unsafe { sums.write((warp_idx * MAX_EXPERTS + e) as usize, sum) };
            e += WARP_SIZE;
            if e - lane >= n_expert {
                break; // The same for the whole warp.
            }
        }
        let mut squares = first_square;
        let mut p = thread + GATE_UP_THREADS;
        while p < n_parts {
            squares += square_at(p);
            p += GATE_UP_THREADS;
        }

        let square_sums = shared_array!(experts_token_squares: [f32; GATE_UP_THREADS as usize]);
        let logits = shared_array!(experts_token_logits: [f32; GATE_UP_THREADS as usize]);
        let keys = shared_array!(experts_token_keys: [u32; GATE_UP_THREADS as usize]);
        let sorted = shared_array!(experts_token_sorted: [u32; GATE_UP_THREADS as usize]);
        // SAFETY: the block is whole; each thread writes its own elements, and barriers order that before the reads.
        let scale = unsafe {
            square_sums.write(thread as usize, warp::sum(squares));
            thread::sync_threads();

            let (mut square, mut logit) = (0.0, 0.0);
            let mut w = 0;
            while w < GATE_UP_WARPS {
                square += square_sums.read((w * WARP_SIZE) as usize);
                w += 1;
            }
            let scale = Float::sqrt(square / d_model as f32 + epsilon).recip();
            if thread < n_expert {
                let mut w = 0;
                while w < GATE_UP_WARPS {
                    logit += sums.read((w * MAX_EXPERTS + thread) as usize);
                    w += 1;
                }
            }
            let logit = scale * logit + bias;
            // What is not there loses to all.
            let key = if thread < n_expert { order(logit) } else { 0 };
            logits.write(thread as usize, logit);
            keys.write(thread as usize, key);
            thread::sync_threads();

            // An expert's place is the number of those before it: of larger logit, or as large and of lower id.
            let mut rank = thread;
            if thread < n_expert {
                rank = 0;
                let mut e = 0;
                while e < n_expert {
                    let [k0, k1, k2, k3] = keys.load16(e as usize);
                    let beats = |k: u32, i: u32| (k > key || (k == key && e + i < thread)) as u32;
                    rank += beats(k0, 0) + beats(k1, 1) + beats(k2, 2) + beats(k3, 3);
                    e += 4;
                }
            }
            sorted.write(rank as usize, thread);
            thread::sync_threads();
            scale
        };
        Self { sorted, logits, scale, x, gamma }
    }

    /// Writes the choice, and its softmax.
    ///
    /// # Safety
    ///
    /// A whole warp is here, and nobody else writes them.
    #[inline(always)]
    pub(super) unsafe fn write(&self, chosen: Disjoint<u32>, weights: Disjoint<f32>) {
        let (lane, n_used) = (warp::lane_id(), chosen.len() as u32);
        // SAFETY: ids are there for every lane; elements are a lane's own.
        unsafe {
            let id = self.sorted.read(lane as usize);
            let logit = self.logits.read(id as usize);
            // The first has the largest, or NaN.
            let largest = warp::shuffle(logit, 0);
            let numerator = if lane < n_used { Float::exp(logit - largest) } else { 0.0 };
            let sum = warp::sum(numerator);
            if lane < n_used {
                chosen.write(lane as usize, id);
                weights.write(lane as usize, numerator / sum);
            }
        }
    }

    /// Brings `r · γ ⊙ x` to `normal` as f16 in the order of B fragments: lane t finds the four pairs of group k from word
    /// `16 k + 4 t` on. Zeros follow.
    ///
    /// # Safety
    ///
    /// The whole block is here, and nobody reads `normal`.
    #[inline(always)]
    pub(super) unsafe fn store_normal(&self, normal: Shared<u32>) {
        let thread = thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x();
        let mut k = 0;
        while k < X_QUADS {
            let [x, gamma] = [self.x[k], self.gamma[k]].map(|quad| quad.map(f32::from_bits));
            let n = |i: usize| x[i] * self.scale * gamma[i];
            let q = thread + k as u32 * GATE_UP_THREADS;
            // Pair i of lane t: elements 8 i + 2 t and the next.
            let at = (q / 8 * 16 + q % 2 * 8 + q % 8 / 2) as usize;
            // SAFETY: inside; each thread writes its own.
            unsafe {
                normal.write(at, pack_f16x2(n(0), n(1)));
                normal.write(at + 4, pack_f16x2(n(2), n(3)));
            }
            k += 1;
        }
        if thread < ZERO_WORDS {
            // SAFETY: as above.
            unsafe { normal.write(X_WORDS + thread as usize, 0) };
        }
    }
}
