//! Which experts a token goes to, and with what weights.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Float, Global, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// The most experts of a layer.
pub const MAX_EXPERTS: u32 = 128;
/// The most experts a token goes to.
pub const MAX_USED: u32 = 8;

const TOKENS_PER_BLOCK: u32 = 4;
const CANDIDATES: usize = (MAX_EXPERTS / WARP_SIZE) as usize;

/// Warps of a block of [`router_logits`](fn@router_logits): each takes every fourth part of a product.
const WARPS: u32 = 4;
/// What a block computes when there are several tokens; for one token it is one logit.
const TILE_TOKENS: usize = 8;
const TILE_EXPERTS: usize = 4;
const SUMS: usize = WARPS as usize * TILE_TOKENS * TILE_EXPERTS;
/// Elements a warp takes at a time.
const STEP: u32 = 4 * WARP_SIZE;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[router::ENTRY, router_logits::ENTRY];

/// The one geometry [`router`](fn@router) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32) -> Launch {
    Launch { grid: [n_tokens.div_ceil(TOKENS_PER_BLOCK), 1, 1], block: [WARP_SIZE, TOKENS_PER_BLOCK, 1] }
}

/// The one geometry [`router_logits`](fn@router_logits) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_logits(n_tokens: u32, n_expert: u32) -> Launch {
    let (tokens, experts) = if n_tokens == 1 { (1, 1) } else { (TILE_TOKENS as u32, TILE_EXPERTS as u32) };
    Launch { grid: [n_expert.div_ceil(experts), n_tokens.div_ceil(tokens), 1], block: [WARP_SIZE, WARPS, 1] }
}

/// An integer that orders logits: equal for both zeros, and largest for NaN, so that it is not lost. Never 0.
#[inline(always)]
pub(crate) fn order(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    if logit.is_nan() {
        u32::MAX
    } else if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    }
}

/// Chooses each token's experts and weights them.
///
/// - Math: `ids[t]` are the `n_used` experts of largest logit, in falling order, the lower id first among equals;
///   `weights[t] = softmax(logits[t, ids[t]])`. NaN counts as the largest logit, and makes all weights of its token NaN.
/// - Shapes: `ids`, `weights`: `[n_tokens, n_used]`; `logits`: `[n_tokens, n_expert]`, bias included.
///   `n_expert <= 128`, `n_used <= min(n_expert, 8)`.
/// - Launch: [`launch`]`(n_tokens)`. A warp owns a token, a lane experts `e ≡ lane (mod 32)`.
/// - Shared memory: none, and no barrier.
/// - Cost: latency; `n_used` rounds of ten shuffles.
/// - Determinism: exact choice; the softmax in one fixed order, `ex2.approx` differing from the emulator's by 2 ulp.
/// - Source: gpt-oss's reference implementation, `MLPBlock` in `gpt_oss/torch/model.py`.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = WARP_SIZE * TOKENS_PER_BLOCK, blocks_per_sm = 4)]
pub unsafe fn router(
    ids: Disjoint<u32>,
    weights: Disjoint<f32>,
    logits: Global<f32>,
    n_tokens: u32,
    n_expert: u32,
    n_used: u32,
) {
    let (t, lane) = (thread::block_idx_x() * TOKENS_PER_BLOCK + thread::thread_idx_y(), thread::thread_idx_x());
    if t >= n_tokens {
        return; // Whole warps leave.
    }
    // SAFETY: the token exists, by the launch contract.
    let logits = unsafe { logits.row_unchecked(t as usize, n_expert as usize) };
    // What is not there, or was chosen, has order 0 and loses to all.
    let mut candidates = [0; CANDIDATES];
    let mut i = 0;
    while i < CANDIDATES {
        let expert = i as u32 * WARP_SIZE + lane;
        if expert < n_expert {
            candidates[i] = order(logits[expert as usize]);
        }
        i += 1;
    }

    // Lane s keeps the expert of slot s.
    let mut chosen = 0;
    let mut slot = 0;
    while slot < n_used {
        let (mut best, mut id) = (candidates[0], lane);
        let mut i = 1;
        while i < CANDIDATES {
            if candidates[i] > best {
                (best, id) = (candidates[i], i as u32 * WARP_SIZE + lane);
            }
            i += 1;
        }
        let mut step = WARP_SIZE / 2;
        while step > 0 {
            // SAFETY: a token is a warp, so all 32 lanes are here.
            let (other, other_id) = unsafe { (warp::shuffle_xor(best, step), warp::shuffle_xor(id, step)) };
            if other > best || (other == best && other_id < id) {
                (best, id) = (other, other_id);
            }
            step /= 2;
        }
        let mut i = 0;
        while i < CANDIDATES {
            if i as u32 * WARP_SIZE + lane == id {
                candidates[i] = 0;
            }
            i += 1;
        }
        chosen = if lane == slot { id } else { chosen };
        slot += 1;
    }

    let logit = logits[chosen as usize];
    // SAFETY: as above. The first slot has the largest, or NaN.
    let largest = unsafe { warp::shuffle(logit, 0) };
    let numerator = if lane < n_used { Float::exp(logit - largest) } else { 0.0 };
    // SAFETY: as above.
    let sum = unsafe { warp::sum(numerator) };
    if lane < n_used {
        let at = (t * n_used + lane) as usize;
        // SAFETY: element (t, lane) is this lane's alone.
        unsafe {
            ids.write(at, chosen);
            weights.write(at, numerator / sum);
        }
    }
}

/// The router's product, in f32 throughout: which expert comes fourth and which fifth must not hang on f16's rounding.
///
/// - Math: `out[t, e] = Σᵢ weight[e, i] · x[t, i] + bias[e]`.
/// - Shapes: `out`: `[n_tokens, n_expert]`; `weight`: `[n_expert, n_in]`, row by row as in the file; `x`:
///   `[n_tokens, n_in]`; `bias`: `[n_expert]`, or empty. n_in is a multiple of 4; `weight` and `x` start at multiples of 16
///   bytes.
/// - Launch: [`launch_logits`]`(n_tokens, n_expert)`. A block owns four experts and eight tokens, or one logit if there is
///   one token; a warp takes every fourth 128 elements of the products, a lane four of them.
/// - Shared memory: 512 bytes, the sums of each warp; one barrier.
/// - Cost: one token: latency, and `4 · n_expert · n_in` bytes. Many: `2 · n_tokens · n_expert · n_in` operations.
/// - Determinism: f32 sums in one order, the same for a token alone and among others; devices contract `a · b + c`.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = WARP_SIZE * WARPS, blocks_per_sm = 4)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn router_logits(
    out: Disjoint<f32>,
    weight: Global<f32>,
    x: Global<f32>,
    bias: Global<f32>,
    n_tokens: u32,
    n_in: u32,
    n_expert: u32,
) {
    // SAFETY: the launch contract; the condition is the same for the whole grid.
    unsafe {
        if n_tokens == 1 {
            logits_tile::<1, 1>(out, weight, x, bias, n_tokens, n_in, n_expert);
        } else {
            logits_tile::<TILE_TOKENS, TILE_EXPERTS>(out, weight, x, bias, n_tokens, n_in, n_expert);
        }
    }
}

/// # Safety
///
/// As the kernel above.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernel's own")]
unsafe fn logits_tile<const TOKENS: usize, const EXPERTS: usize>(
    out: Disjoint<f32>,
    weight: Global<f32>,
    x: Global<f32>,
    bias: Global<f32>,
    n_tokens: u32,
    n_in: u32,
    n_expert: u32,
) {
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    let (first_expert, first_token) = (thread::block_idx_x() * EXPERTS as u32, thread::block_idx_y() * TOKENS as u32);
    // Rows past the last repeat it, and are not written.
    let (mut weight_rows, mut x_rows) = ([0; EXPERTS], [0; TOKENS]);
    let mut e = 0;
    while e < EXPERTS {
        weight_rows[e] = (first_expert + e as u32).min(n_expert - 1) as usize * n_in as usize;
        e += 1;
    }
    let mut t = 0;
    while t < TOKENS {
        x_rows[t] = (first_token + t as u32).min(n_tokens - 1) as usize * n_in as usize;
        t += 1;
    }

    let mut sums = [[0.0; EXPERTS]; TOKENS];
    let mut i = warp_idx * STEP + 4 * lane;
    while i < n_in {
        let mut w = [[0.0; 4]; EXPERTS];
        let mut e = 0;
        while e < EXPERTS {
            // SAFETY: rows are whole quads, from multiples of 16 bytes on.
            w[e] = unsafe { weight.load16(weight_rows[e] + i as usize) }.map(f32::from_bits);
            e += 1;
        }
        let mut t = 0;
        while t < TOKENS {
            // SAFETY: as above.
            let x = unsafe { x.load16(x_rows[t] + i as usize) }.map(f32::from_bits);
            let mut e = 0;
            while e < EXPERTS {
                sums[t][e] += w[e][0] * x[0];
                sums[t][e] += w[e][1] * x[1];
                sums[t][e] += w[e][2] * x[2];
                sums[t][e] += w[e][3] * x[3];
                e += 1;
            }
            t += 1;
        }
        i += WARPS * STEP;
    }

    // Lane `t · EXPERTS + e` keeps the warp's sum for token t and expert e.
    let mut kept = 0.0;
    let mut k = 0;
    while k < TOKENS * EXPERTS {
        // SAFETY: whole warps are here.
        let sum = unsafe { warp::sum(sums[k / EXPERTS][k % EXPERTS]) };
        kept = if lane == k as u32 { sum } else { kept };
        k += 1;
    }
    let shared = shared_array!(router_sums: [f32; SUMS]);
    let mut y = 0.0;
    // SAFETY: the block is whole; each thread writes its own element, and the barrier orders that before the reads.
    unsafe {
        shared.write((warp_idx * WARP_SIZE + lane) as usize, kept);
        thread::sync_threads();
        let mut w = 0;
        while w < WARPS {
            y += shared.read((w * WARP_SIZE + lane) as usize);
            w += 1;
        }
    }
    let (token, expert) = (first_token + lane / EXPERTS as u32, first_expert + lane % EXPERTS as u32);
    if warp_idx == 0 && lane < (TOKENS * EXPERTS) as u32 && token < n_tokens && expert < n_expert {
        let y = if bias.len() > 0 { y + bias[expert as usize] } else { y };
        // SAFETY: element (token, expert) is this lane's alone.
        unsafe { out.write(token as usize * n_expert as usize + expert as usize, y) };
    }
}
