//! One token through experts of MXFP4 on tensor cores: the router's end and two kernels, at the speed of memory.
//!
//! Both kernels give each warp whole products and keep warps apart: a warp brings its own weights to its own part of shared
//! memory, [`DEPTH`] runs of 128 elements ahead, a thread exactly the bytes that it reads. There is no barrier but those for
//! activations, and all warps of the grid finish together: tiles are small enough to be dealt out evenly.

use super::place;
use crate::format::{GROUP, MXFP4_RUN, Mxfp4, Place, mxfp4_pairs};
use crate::router::{MAX_EXPERTS, MAX_USED, order};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{
    Disjoint, Float, Global, Shared, cp_async, dynamic_shared_array, grid, kernel, mma, pack_f16x2, shared_array,
    thread, warp,
};

/// Warps of a block. Eleven tiles for each of 132 SMs are what 2880 features of four experts make, of either kernel.
const WARPS: u32 = 12;
const THREADS: u32 = WARPS * WARP_SIZE;
/// The widest rows of `gate` and `up`.
pub const MAX_D_MODEL: u32 = 4096;
/// The most activations of all slots together, `n_used · d_ff`.
pub const MAX_ACTIVATIONS: u32 = 16384;

const RUN: u32 = MXFP4_RUN as u32;
/// Bytes of a row's run.
const RUN_BYTES: u32 = 16 * RUN;
/// Runs under way: with eleven busy warps 44 KiB of an SM.
const DEPTH: u32 = 4;
/// Sixteen rows of a run, as fragments: 16 bytes of each thread for rows 0 to 7, then for rows 8 to 15.
const HALF_STAGE: u32 = 16 * WARP_SIZE;
const STAGE_BYTES: u32 = 2 * HALF_STAGE;
const RING_BYTES: u32 = DEPTH * STAGE_BYTES;

/// Features of a tile of `gate` and `up`.
const FEATURES: u32 = 8;
/// Scales of eight rows, from a multiple of 16 bytes on.
const FEATURE_SCALES: u32 = FEATURES * (MAX_D_MODEL / GROUP) + 16;
const GATE_UP_BYTES: u32 = RING_BYTES + 2 * FEATURE_SCALES;
const GATE_UP_SHARED: u32 = WARPS * GATE_UP_BYTES;
/// Quads of `x` that a thread brings.
const X_QUADS: usize = MAX_D_MODEL.div_ceil(4 * THREADS) as usize;
const X_WORDS: usize = X_QUADS * 2 * THREADS as usize;
/// Parts of the router's sums that a thread loads together.
const PARTS_AHEAD: usize = 16;
const EXPERT_SUMS: usize = (WARPS * MAX_EXPERTS) as usize;

/// Rows of a tile of `down`.
const ROWS: u32 = 2;
/// Columns of an mma: products of a slot, or of a part of it, each.
const COLUMNS: u32 = 8;
/// Scales of two rows of every slot, each from a multiple of 16 bytes on.
const ROW_SCALES: u32 = ROWS * MAX_ACTIVATIONS / GROUP + 32 * MAX_USED;
const DOWN_BYTES: u32 = RING_BYTES + ROW_SCALES;
const DOWN_SHARED: u32 = WARPS * DOWN_BYTES;
/// Words between the activations of two slots, beyond whole runs: lanes of neighbouring slots then read different banks.
const SLOT_PAD: u32 = 16;
const H_WORDS: usize = (MAX_ACTIVATIONS / 2 + MAX_USED * (RUN * 16 + SLOT_PAD)) as usize;
/// Quads of `h` that a thread loads together.
const H_AHEAD: usize = 8;
/// Activations are stored times 2⁹, far from the smallest f16: |h| is at most 56.
const H_UNIT: f32 = 512.0;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_token_gate_up_mxfp4::ENTRY, experts_token_down_mxfp4::ENTRY];

/// Whether the kernels of this file can run a layer of these widths.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn fits(n_expert: u32, n_used: u32, d_model: u32, d_ff: u32) -> bool {
    n_expert <= MAX_EXPERTS && n_used <= MAX_USED && d_model <= MAX_D_MODEL && n_used * d_ff <= MAX_ACTIVATIONS
}

/// The geometry [`experts_token_gate_up_mxfp4`] is written for: any number of blocks, one for each multiprocessor, or
/// fewer if a warp of each has its tile.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_gate_up(n_multiprocessors: u32, n_used: u32, d_ff: u32) -> Launch {
    launch(n_multiprocessors, n_used * d_ff.div_ceil(FEATURES))
}

/// The geometry [`experts_token_down_mxfp4`] is written for: as [`launch_gate_up`].
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_multiprocessors: u32, d_model: u32) -> Launch {
    launch(n_multiprocessors, d_model.div_ceil(ROWS))
}

#[cfg(not(target_arch = "nvptx64"))]
const fn launch(n_multiprocessors: u32, n_tiles: u32) -> Launch {
    let blocks = if n_tiles < n_multiprocessors { n_tiles } else { n_multiprocessors };
    Launch { grid: [blocks, 1, 1], block: [WARP_SIZE, WARPS, 1] }
}

/// The end of a token's router, and the first half of its experts, of type MXFP4, with the gated unit.
///
/// - Math: `r = 1 / √(Σₚ parts[p, n_expert] / d_model + ε)`; `logit[e] = r · Σₚ parts[p, e] + router_bias[e]`; `chosen` and
///   `weights` as [`router`](crate::router::router()) has them; for each slot s, `e = chosen[s]`, `n = r · γ ⊙ x`: `h[s, f] =
///   swiglu(gateₑ[f] · n + gate_bias[e, f], upₑ[f] · n + up_bias[e, f])`, swiglu being [`swiglu::activation`]. n is rounded
///   to f16, so it is to stay below 65504.
/// - Shapes: `h`: `[n_used, d_ff]`; `chosen`, `weights`: `[n_used]`; `gate`, `up`: `[n_expert, d_ff, d_model]`, each expert in
///   its planes; `gate_bias`, `up_bias`: `[n_expert, d_ff]`, or empty; `x`, `gamma`: `[d_model]`, from multiples of 16 bytes
///   on; `parts`: `[n_parts, n_expert + 1]`, of part p of x the sums `Σᵢ router[e, i] · γ[i] · x[i]` and `Σᵢ x[i]²`;
///   `router_bias`: `[n_expert]`, or empty. As [`fits`] says; d_model a multiple of 32, n_used at most n_expert.
/// - Launch: [`launch_gate_up`]. Every block finishes the router for itself; then a warp owns eight features of a slot, an
///   mma's rows 0 to 7 being of `gate` and 8 to 15 of `up`, its columns 0, 2, 4, 6 one group of 32 elements each.
/// - Shared memory: 72 KiB dynamic, a ring of weights and the scales for each warp; 19 KiB static, n and the router's sums;
///   three barriers.
/// - Cost: memory bound, the bytes of `n_used` experts' `gate` and `up`.
/// - Determinism: one fixed order of f32 sums; tensor cores order the 16 terms of a step themselves.
/// - Source: [`Mxfp4`]; gpt-oss's reference implementation, `MLPBlock` in `gpt_oss/torch/model.py`.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above; no launch writes `gamma`, `router_bias`.
#[kernel(threads = THREADS, blocks_per_sm = 2, dynamic_shared = GATE_UP_SHARED, waits)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn experts_token_gate_up_mxfp4(
    h: Disjoint<f32>,
    chosen: Disjoint<u32>,
    weights: Disjoint<f32>,
    gate: Global<u8>,
    up: Global<u8>,
    gate_bias: Global<f32>,
    up_bias: Global<f32>,
    x: Global<f32>,
    gamma: Global<f32>,
    parts: Global<f32>,
    router_bias: Global<f32>,
    epsilon: f32,
    d_model: u32,
    d_ff: u32,
    n_parts: u32,
) {
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    let normal = shared_array!(experts_token_x: [u32; X_WORDS]);
    // SAFETY: the launch contract; the whole block is here.
    let (sorted, logits) = unsafe { finish_router(normal, x, gamma, parts, router_bias, epsilon, d_model, n_parts) };
    let n_used = chosen.len() as u32;

    // Few blocks have work for all warps; this one writes what the next kernel needs.
    if thread::block_idx_x() == 0 && warp_idx == WARPS - 1 {
        // SAFETY: a whole warp is here; sorted ids are there for every lane; its elements are a lane's own.
        unsafe {
            let id = sorted.read(lane as usize);
            let logit = logits.read(id as usize);
            let largest = warp::shuffle(logit, 0);
            let numerator = if lane < n_used { Float::exp(logit - largest) } else { 0.0 };
            let sum = warp::sum(numerator);
            if lane < n_used {
                chosen.write(lane as usize, id);
                weights.write(lane as usize, numerator / sum);
            }
        }
    }

    let dynamic = dynamic_shared_array!(experts_token_gate_up_ring: [u8; GATE_UP_SHARED as usize]);
    let stages = Stages { shared: dynamic, at: warp_idx * GATE_UP_BYTES };
    let scales_at = stages.at + RING_BYTES;
    let n_groups = d_model / GROUP;
    let tiles_per_slot = d_ff.div_ceil(FEATURES);
    let (g, t) = (lane / 4, lane % 4);

    let mut tile = warp_idx * thread::grid_dim_x() + thread::block_idx_x();
    while tile < n_used * tiles_per_slot {
        let slot = tile / tiles_per_slot.max(1);
        let first = (tile - slot * tiles_per_slot) * FEATURES;
        // Rows past the last repeat it, and write nothing.
        let f = (first + g).min(d_ff - 1);
        // SAFETY: there are as many ids as slots, and such experts.
        let (expert, matrices) = unsafe {
            let expert = sorted.read(slot as usize);
            (expert, [place::<Mxfp4>(gate, expert, d_model, d_ff), place::<Mxfp4>(up, expert, d_model, d_ff)])
        };
        let rows = (FEATURES).min(d_ff - first);
        // SAFETY: whole warps are here; rows and groups exist, and nobody uses this warp's shared memory.
        let [gate, up] = unsafe {
            let scale_rows = [
                copy_scales(dynamic, scales_at, &matrices[0], first, rows, lane, 1),
                copy_scales(dynamic, scales_at + FEATURE_SCALES, &matrices[1], first, rows, lane, 1),
            ];
            let scale_rows = scale_rows.map(|at| at + (f - first) * n_groups);
            gate_up_sums(&stages, &matrices, f, scale_rows, normal)
        };
        let at = expert as usize * d_ff as usize + f as usize;
        let gate = if gate_bias.len() > 0 { gate + gate_bias[at] } else { gate };
        let up = if up_bias.len() > 0 { up + up_bias[at] } else { up };
        if t == 0 && first + g < d_ff {
            // SAFETY: element (slot, f) is this lane's alone.
            unsafe { h.write((slot * d_ff + f) as usize, swiglu::activation(gate, up)) };
        }
        // SAFETY: the whole warp is here.
        unsafe { warp::sync() };
        tile += WARPS * thread::grid_dim_x();
    }
}

/// The second half of a token's experts, of type MXFP4, weighted and added up.
///
/// - Math: `out[o] ← out[o] + Σₛ weights[s] · (downₑ[o] · h[s] + bias[e, o])`, `e = chosen[s]`. `h` is rounded to f16 times
///   2⁹, so its magnitude is to stay below 127.
/// - Shapes: `out`: `[d_model]`; `weight`: `[n_expert, d_model, d_ff]`, each expert in its planes; `bias`: `[n_expert,
///   d_model]`, or empty; `h`: `[n_used, d_ff]`, from a multiple of 16 bytes on; `chosen`, `weights`: `[n_used]`. As [`fits`]
///   says; d_ff a multiple of 32.
/// - Launch: [`launch_down`]. A warp owns two rows of `out`. Column c of an mma is slot `c mod S` (S: n_used rounded up to a
///   power of two), and of 8 / S equal parts of its elements number `c / S`; row c of the mma's upper half and of its lower
///   are the weights for that of the two rows of `out`. So the products are on the diagonals.
/// - Shared memory: 63 KiB dynamic, a ring of weights and the scales for each warp; 34 KiB static, `h`; one barrier.
/// - Cost: memory bound, the bytes of `n_used` experts' `down`.
/// - Determinism: one fixed order of f32 sums; tensor cores order the 16 terms of a step themselves.
/// - Source: [`Mxfp4`].
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 2, dynamic_shared = DOWN_SHARED, waits)]
#[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
pub unsafe fn experts_token_down_mxfp4(
    out: Disjoint<f32>,
    weight: Global<u8>,
    bias: Global<f32>,
    h: Global<f32>,
    chosen: Global<u32>,
    weights: Global<f32>,
    d_ff: u32,
    d_model: u32,
) {
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    let (g, t) = (lane / 4, lane % 4);
    let n_used = chosen.len() as u32;
    let n_groups = d_ff / GROUP;
    let n_runs = n_groups.div_ceil(RUN);
    let slots = if n_used <= 1 { 1 } else { 1u32 << (WARP_SIZE - (n_used - 1).leading_zeros()) };
    let n_parts = COLUMNS >> (slots.trailing_zeros());
    let steps = (n_runs + n_parts - 1) >> n_parts.trailing_zeros();
    let (slot, part) = (g & (slots - 1), g >> slots.trailing_zeros());
    let used = slot < n_used;
    let slot = slot.min(n_used - 1);

    let dynamic = dynamic_shared_array!(experts_token_down_ring: [u8; DOWN_SHARED as usize]);
    let stages = Stages { shared: dynamic, at: warp_idx * DOWN_BYTES };
    let scales_at = stages.at + RING_BYTES;
    let activations = shared_array!(experts_token_h: [u32; H_WORDS]);
    let slot_words = n_runs * RUN * 16 + SLOT_PAD;

    // SAFETY: once, by all threads.
    unsafe { grid::wait() };
    let expert = chosen[slot as usize];
    let slot_weight = if used { weights[slot as usize] } else { 0.0 };
    // SAFETY: the expert exists.
    let matrix = unsafe { place::<Mxfp4>(weight, expert, d_ff, d_model) };
    let n_tiles = d_model.div_ceil(ROWS);
    let mut tile = warp_idx * thread::grid_dim_x() + thread::block_idx_x();
    let mut products = DownProducts {
        stages,
        first_run: part * steps,
        // None for slots that are not there.
        n_runs: if used { n_runs } else { 0 },
        n_groups,
        steps,
        g,
        t,
        rows: [0; 2],
        scales: [0; 2],
    };
    if tile < n_tiles {
        // SAFETY: the rows and the expert exist; this warp's shared memory is unused.
        unsafe { products.start(&matrix, tile * ROWS, d_model, scales_at, slot, used) };
    }
    // SAFETY: the whole block is here.
    unsafe {
        stage_activations(activations, h, n_used, d_ff, slot_words);
        thread::sync_threads();
    }

    while tile < n_tiles {
        let o = tile * ROWS;
        let last = (o + 1).min(d_model - 1);
        let mut biases = [0.0; 2];
        if bias.len() > 0 && used && part == 0 {
            let row = expert as usize * d_model as usize;
            biases = [bias[row + o as usize], bias[row + last as usize]];
        }
        let writes = lane < ROWS && o + lane < d_model;
        let before = if writes { out.read((o + lane) as usize) } else { 0.0 };
        // SAFETY: the whole warp is here; `start` was called for the tile.
        let sums = unsafe { products.sums(&matrix, activations, slot * slot_words) };
        // A product is on the diagonal: that of row g and column g, or of row g + 8 and column g.
        let mine = used && t == g / 2;
        let scaled = |i: usize| if mine { slot_weight * (sums[i] + biases[i]) } else { 0.0 };
        // SAFETY: the whole warp is here.
        let (first, second) = unsafe { (warp::sum(scaled(0)), warp::sum(scaled(1))) };
        if writes {
            let sum = if lane == 0 { first } else { second };
            // SAFETY: the element is this lane's alone.
            unsafe { out.write((o + lane) as usize, before + sum) };
        }
        // SAFETY: the whole warp is here, so nobody reads its shared memory any more.
        unsafe { warp::sync() };
        tile += WARPS * thread::grid_dim_x();
        if tile < n_tiles {
            // SAFETY: as above.
            unsafe { products.start(&matrix, tile * ROWS, d_model, scales_at, slot, used) };
        }
    }
}

/// Finishes the router, and brings `r · γ ⊙ x` to `normal` as f16 in the order of B fragments: lane t finds the four pairs
/// of group k from word `16 k + 4 t` on; zeros follow to the last whole run. Returns expert ids in order of choice, an array
/// of all threads' length, and the logits by expert.
///
/// # Safety
///
/// The whole block is here; the slices have the shapes that [`experts_token_gate_up_mxfp4`] asks for.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernel's own")]
unsafe fn finish_router(
    normal: Shared<u32>,
    x: Global<f32>,
    gamma: Global<f32>,
    parts: Global<f32>,
    router_bias: Global<f32>,
    epsilon: f32,
    d_model: u32,
    n_parts: u32,
) -> (Shared<u32>, Shared<f32>) {
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    let thread = warp_idx * WARP_SIZE + lane;
    let n_columns = parts.len() as u32 / n_parts.max(1);
    let n_expert = n_columns - 1;

    let quad = |k: usize| 4 * (thread + k as u32 * THREADS);
    let mut gammas = [[0; 4]; X_QUADS];
    let mut k = 0;
    while k < X_QUADS {
        if quad(k) < d_model {
            // SAFETY: whole quads from a multiple of 16 bytes on.
            gammas[k] = unsafe { gamma.load16(quad(k) as usize) };
        }
        k += 1;
    }
    let bias = if router_bias.len() > 0 && thread < n_expert { router_bias[thread as usize] } else { 0.0 };
    // SAFETY: once, by all threads.
    unsafe { grid::wait() };

    let mut values = [[0; 4]; X_QUADS];
    let mut k = 0;
    while k < X_QUADS {
        if quad(k) < d_model {
            // SAFETY: as above.
            values[k] = unsafe { x.load16(quad(k) as usize) };
        }
        k += 1;
    }
    let mut squares = 0.0;
    let mut p = thread;
    while p < n_parts {
        // SAFETY: the row's last element.
        squares += unsafe { parts.read_unchecked((p * n_columns + n_expert) as usize) };
        p += THREADS;
    }
    let sums = shared_array!(experts_token_sums: [f32; EXPERT_SUMS]);
    let mut e = lane;
    while e < MAX_EXPERTS {
        let mut sum = 0.0;
        let mut p = warp_idx;
        while p < n_parts {
            let mut loaded = [0.0; PARTS_AHEAD];
            let mut i = 0;
            while i < PARTS_AHEAD {
                let p = p + i as u32 * WARPS;
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
            p += PARTS_AHEAD as u32 * WARPS;
        }
        // SAFETY: each thread writes its own elements.
        unsafe { sums.write((warp_idx * MAX_EXPERTS + e) as usize, sum) };
        e += WARP_SIZE;
        // The same for the whole warp.
        if e - lane >= n_expert {
            break;
        }
    }
    let square_sums = shared_array!(experts_token_squares: [f32; THREADS as usize]);
    let logits = shared_array!(experts_token_logits: [f32; THREADS as usize]);
    let keys = shared_array!(experts_token_keys: [u32; THREADS as usize]);
    let sorted = shared_array!(experts_token_sorted: [u32; THREADS as usize]);
    // SAFETY: the block is whole; each thread writes its own elements, and barriers order that before the reads.
    unsafe {
        square_sums.write(thread as usize, warp::sum(squares));
        thread::sync_threads();

        let (mut square, mut logit) = (0.0, 0.0);
        let mut w = 0;
        while w < WARPS {
            square += square_sums.read((w * WARP_SIZE) as usize);
            w += 1;
        }
        let scale = Float::sqrt(square / d_model as f32 + epsilon).recip();
        if thread < n_expert {
            let mut w = 0;
            while w < WARPS {
                logit += sums.read((w * MAX_EXPERTS + thread) as usize);
                w += 1;
            }
        }
        let logit = scale * logit + bias;
        // What is not there loses to all.
        let key = if thread < n_expert { order(logit) } else { 0 };
        logits.write(thread as usize, logit);
        keys.write(thread as usize, key);
        let mut k = 0;
        while k < X_QUADS {
            let ([x, gamma], q) = ([values[k], gammas[k]].map(|quad| quad.map(f32::from_bits)), quad(k) / 4);
            let n =
                [x[0] * scale * gamma[0], x[1] * scale * gamma[1], x[2] * scale * gamma[2], x[3] * scale * gamma[3]];
            store_quad(normal, 0, q, n);
            k += 1;
        }
        thread::sync_threads();

        let mut rank = thread;
        if thread < MAX_EXPERTS {
            let mut above = 0;
            let mut e = 0;
            while e < n_expert {
                let [k0, k1, k2, k3] = keys.load16(e as usize);
                let beats = |k: u32, i: u32| (k > key || (k == key && e + i < thread)) as u32;
                above += beats(k0, 0) + beats(k1, 1) + beats(k2, 2) + beats(k3, 3);
                e += 4;
            }
            rank = if thread < n_expert { above } else { thread };
        }
        sorted.write(rank as usize, thread);
        thread::sync_threads();
    }
    (sorted, logits)
}

/// Writes elements `4 q..4 q + 4` as f16 to where B fragments are read, `words` words in.
///
/// # Safety
///
/// They are inside, and this thread's alone.
#[inline(always)]
unsafe fn store_quad(into: Shared<u32>, words: u32, q: u32, x: [f32; 4]) {
    // Pair i of lane t: elements 8 i + 2 t and the next.
    let at = words + q / 8 * 16 + q % 2 * 8 + q % 8 / 2;
    // SAFETY: the caller's promise.
    unsafe {
        into.write(at as usize, pack_f16x2(x[0], x[1]));
        into.write(at as usize + 4, pack_f16x2(x[2], x[3]));
    }
}

/// Brings `h` to shared memory as f16, times [`H_UNIT`], slot s from word `s · slot_words` on.
///
/// # Safety
///
/// The whole block is here, and nobody reads `into`.
#[inline(always)]
unsafe fn stage_activations(into: Shared<u32>, h: Global<f32>, n_used: u32, d_ff: u32, slot_words: u32) {
    let thread = thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x();
    // With the zeros behind a slot's last whole run.
    let (quads, padded) = (d_ff / 4, (slot_words - SLOT_PAD) / 2);
    let mut first = thread;
    while first < n_used * padded {
        let mut loaded = [[0; 4]; H_AHEAD];
        let mut k = 0;
        while k < H_AHEAD {
            let i = first + k as u32 * THREADS;
            let (slot, q) = (i / padded.max(1), i % padded.max(1));
            if slot < n_used && q < quads {
                // SAFETY: rows are whole quads, from multiples of 16 bytes on.
                loaded[k] = unsafe { h.load16((slot * d_ff + 4 * q) as usize) };
            }
            k += 1;
        }
        let mut k = 0;
        while k < H_AHEAD {
            let i = first + k as u32 * THREADS;
            let (slot, q) = (i / padded.max(1), i % padded.max(1));
            if slot < n_used {
                let values = loaded[k].map(|bits| f32::from_bits(bits) * H_UNIT);
                // SAFETY: inside; each thread writes its own.
                unsafe { store_quad(into, slot * slot_words, q, values) };
            }
            k += 1;
        }
        first += H_AHEAD as u32 * THREADS;
    }
}

/// A warp's ring of weights, from byte `at` of the dynamic shared memory on.
#[derive(Clone, Copy)]
struct Stages {
    shared: Shared<u8>,
    at: u32,
}

impl Stages {
    /// Starts copying this thread's 16 bytes of a run of row `half` of its two: bytes `from` of `weight` on.
    ///
    /// # Safety
    ///
    /// They exist; the stage is free.
    #[inline(always)]
    unsafe fn copy(&self, step: u32, half: u32, weight: Global<u8>, from: usize) {
        let at = self.at + step % DEPTH * STAGE_BYTES + half * HALF_STAGE + 16 * warp::lane_id();
        // SAFETY: the caller's promise; pieces of 16 bytes lie at multiples of 16.
        unsafe { self.shared.copy_async(at as usize, weight, from, true) };
    }

    /// This thread's four words of a whole run.
    ///
    /// # Safety
    ///
    /// Its copy has landed.
    #[inline(always)]
    unsafe fn words(&self, step: u32, half: u32) -> [u32; 4] {
        let at = self.at + step % DEPTH * STAGE_BYTES + half * HALF_STAGE + 16 * warp::lane_id();
        // SAFETY: the caller's promise.
        unsafe { self.shared.load16(at as usize) }
    }

    /// This thread's words of a run of only `width` groups, whose row four lanes copied 16 bytes each of; the others are 0.
    ///
    /// # Safety
    ///
    /// All copies have landed, and the warp is synchronized since.
    #[inline(always)]
    unsafe fn words_of_last(&self, step: u32, half: u32, width: u32) -> [u32; 4] {
        let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
        let at = self.at + step % DEPTH * STAGE_BYTES + half * HALF_STAGE + g * RUN_BYTES + 4 * t * width;
        let mut words = [0; 4];
        let mut j = 0;
        while j < MXFP4_RUN {
            if (j as u32) < width {
                // SAFETY: the caller's promise.
                words[j] = unsafe { self.shared.load4(at as usize + 4 * j) };
            }
            j += 1;
        }
        words
    }
}

/// Starts copying the scales of `rows` rows from `first` on to byte `at`, by every `lanes`th lane from `lane` on, and
/// returns where they will start.
///
/// # Safety
///
/// The rows exist; the room is free and enough.
#[inline(always)]
unsafe fn copy_scales(into: Shared<u8>, at: u32, matrix: &Place, first: u32, rows: u32, lane: u32, stride: u32) -> u32 {
    let start = matrix.planes.scales + first as usize * matrix.n_groups as usize;
    let before = start as u32 % 16;
    let mut i = 16 * lane;
    while i < before + rows * matrix.n_groups {
        // SAFETY: planes are padded to more than 16 bytes.
        unsafe { into.copy_async((at + i) as usize, matrix.weight, start - before as usize + i as usize, true) };
        i += 16 * WARP_SIZE / stride;
    }
    at + before
}

/// What f32 has to be multiplied with under the E8M0 scale `e`; the smallest power is subnormal.
#[inline(always)]
fn scale_of(e: u8) -> f32 {
    f32::from_bits((u32::from(e) << 23).max(0x0040_0000))
}

/// The products of rows `f` of both matrices with the vector in `normal`, over all lanes of a feature.
///
/// # Safety
///
/// The whole warp is here; the scales of the rows are being copied to `scale_rows`.
#[inline(always)]
unsafe fn gate_up_sums(
    stages: &Stages,
    matrices: &[Place; 2],
    f: u32,
    scale_rows: [u32; 2],
    normal: Shared<u32>,
) -> [f32; 2] {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    let n_groups = matrices[0].n_groups;
    let (whole, left) = (n_groups / RUN, n_groups % RUN);
    let n_runs = n_groups.div_ceil(RUN);
    let from = f as usize * (16 * n_groups) as usize + (16 * t) as usize;
    let issue = |r: u32| {
        // Of a last run that is not whole, as many lanes copy as it has groups.
        if r < whole || (r < n_runs && t < left) {
            // SAFETY: the bytes exist, and the stage's have been read.
            unsafe {
                stages.copy(r, 0, matrices[0].weight, from + (r * RUN_BYTES) as usize);
                stages.copy(r, 1, matrices[1].weight, from + (r * RUN_BYTES) as usize);
            }
        }
        cp_async::commit();
    };
    let mut r = 0;
    while r < DEPTH {
        issue(r);
        r += 1;
    }

    let mut sums = [0.0; 2];
    let mut r = 0;
    while r < n_runs {
        cp_async::wait::<{ DEPTH - 1 }>();
        // SAFETY: the copies have landed; whole warps are here.
        unsafe {
            if r == 0 || r == whole {
                warp::sync(); // For scales and short runs lanes read what others copied.
            }
            let (gate, up) = if r < whole {
                (stages.words(r, 0), stages.words(r, 1))
            } else {
                (stages.words_of_last(r, 0, left), stages.words_of_last(r, 1, left))
            };
            issue(r + DEPTH);

            let group = (r * RUN + t).min(n_groups - 1);
            let gate_scale = stages.shared.read((scale_rows[0] + group) as usize);
            let up_scale = stages.shared.read((scale_rows[1] + group) as usize);
            let x = normal.load16(((r * RUN + g / 2) * 16 + 4 * t) as usize);
            // Column 2 j is group j's, and all others are 0: a lane keeps one group, two rows.
            let (mut low, mut high) = ([0.0; 4], [0.0; 4]);
            let mut j = 0;
            while j < MXFP4_RUN {
                let b = if g == 2 * j as u32 { x } else { [0; 4] };
                let (a, c) = (mxfp4_pairs(gate[j]), mxfp4_pairs(up[j]));
                let sum = if j < 2 { &mut low } else { &mut high };
                *sum = mma::m16n8k16_f16([a[0], c[0], a[1], c[1]], [b[0], b[1]], *sum);
                *sum = mma::m16n8k16_f16([a[2], c[2], a[3], c[3]], [b[2], b[3]], *sum);
                j += 1;
            }
            // Codes count 2⁻¹⁴ times their values.
            sums[0] += scale_of(gate_scale) * ((low[0] + high[0]) * 16384.0);
            sums[1] += scale_of(up_scale) * ((low[2] + high[2]) * 16384.0);
        }
        r += 1;
    }
    // SAFETY: the whole warp is here.
    unsafe { [warp::sum_of::<4>(sums[0]), warp::sum_of::<4>(sums[1])] }
}

/// A warp's products of two rows of every slot's matrix.
struct DownProducts {
    stages: Stages,
    /// The first run of this lane's column.
    first_run: u32,
    /// Runs of a row; 0 if the lane has none.
    n_runs: u32,
    n_groups: u32,
    /// Runs of a column.
    steps: u32,
    g: u32,
    t: u32,
    /// Where this lane's pieces of the two rows start.
    rows: [usize; 2],
    /// Where the scales of the two rows start.
    scales: [u32; 2],
}

impl DownProducts {
    /// Starts the first copies for rows `o` and `o + 1`.
    ///
    /// # Safety
    ///
    /// Row `o` exists; the warp's shared memory is unused.
    #[inline(always)]
    unsafe fn start(&mut self, matrix: &Place, o: u32, d_model: u32, scales_at: u32, slot: u32, used: bool) {
        let last = (o + 1).min(d_model - 1);
        self.rows = [o, last].map(|row| row as usize * (16 * self.n_groups) as usize + (16 * self.t) as usize);
        let room = (ROWS * self.n_groups + 31) & !15;
        let column = self.first_run > 0;
        // The four lanes of a slot's first column bring its scales.
        let lane = if used && !column { self.t } else { u32::MAX / 16 };
        // SAFETY: the rows exist.
        let scales = unsafe {
            copy_scales(self.stages.shared, scales_at + slot * room, matrix, o, last + 1 - o, lane, WARP_SIZE / 4)
        };
        self.scales = [scales, scales + (last - o) * self.n_groups];
        let mut i = 0;
        while i < DEPTH {
            // SAFETY: as above.
            unsafe { self.issue(matrix, i) };
            i += 1;
        }
    }

    /// # Safety
    ///
    /// The stage of step `i` has been read.
    #[inline(always)]
    unsafe fn issue(&self, matrix: &Place, i: u32) {
        let run = self.first_run + i;
        let whole = self.n_groups / RUN;
        if i < self.steps && (run < whole || (run < self.n_runs && self.t < self.n_groups % RUN)) && run < self.n_runs {
            let at = (run * RUN_BYTES) as usize;
            // SAFETY: the bytes exist.
            unsafe {
                self.stages.copy(i, 0, matrix.weight, self.rows[0] + at);
                self.stages.copy(i, 1, matrix.weight, self.rows[1] + at);
            }
        }
        cp_async::commit();
    }

    /// The products of the two rows with this lane's column of `activations`, whose slot starts at word `slot_at`: of use
    /// in the lane that has the column's diagonal, `t = g / 2`.
    ///
    /// # Safety
    ///
    /// The whole warp is here, and [`start`](Self::start) was called.
    #[inline(always)]
    unsafe fn sums(&self, matrix: &Place, activations: Shared<u32>, slot_at: u32) -> [f32; 2] {
        let (whole, left) = (self.n_groups / RUN, self.n_groups % RUN);
        let last_run = self.n_groups.div_ceil(RUN) - 1;
        let mut sums = [0.0; 2];
        let mut i = 0;
        while i < self.steps {
            cp_async::wait::<{ DEPTH - 1 }>();
            let run = self.first_run + i;
            // SAFETY: the copies have landed; whole warps are here.
            unsafe {
                let mut words = [[0; 4]; 2];
                warp::sync(); // For scales and short runs lanes read what others copied.
                if run < whole && run < self.n_runs {
                    words = [self.stages.words(i, 0), self.stages.words(i, 1)];
                } else if run < self.n_runs {
                    words = [self.stages.words_of_last(i, 0, left), self.stages.words_of_last(i, 1, left)];
                }
                self.issue(matrix, i + DEPTH);

                // Weights that are not there are 0, whatever they are multiplied with.
                let run = run.min(last_run);
                let mut j = 0;
                while j < MXFP4_RUN {
                    let group = run * RUN + j as u32;
                    let b = activations.load16((slot_at + group * 16 + 4 * self.t) as usize);
                    let (upper, lower) = (mxfp4_pairs(words[0][j]), mxfp4_pairs(words[1][j]));
                    let c = mma::m16n8k16_f16([upper[0], lower[0], upper[1], lower[1]], [b[0], b[1]], [0.0; 4]);
                    let c = mma::m16n8k16_f16([upper[2], lower[2], upper[3], lower[3]], [b[2], b[3]], c);
                    let c = if self.g % 2 == 0 { [c[0], c[2]] } else { [c[1], c[3]] };
                    let group = group.min(self.n_groups - 1);
                    sums[0] += scale_of(self.stages.shared.read((self.scales[0] + group) as usize)) * c[0];
                    sums[1] += scale_of(self.stages.shared.read((self.scales[1] + group) as usize)) * c[1];
                    j += 1;
                }
            }
            i += 1;
        }
        // Codes count 2⁻¹⁴ times their values, activations 2⁹ times.
        sums.map(|sum| sum * (16384.0 / H_UNIT))
    }
}

/// Starts [`experts_token_gate_up_mxfp4`](fn@experts_token_gate_up_mxfp4).
///
/// # Errors
///
/// Those of [`Launcher::launch`].
///
/// # Safety
///
/// Those of the kernel.
#[cfg(not(target_arch = "nvptx64"))]
#[allow(clippy::too_many_arguments, reason = "the kernel's own")]
pub unsafe fn run_gate_up(
    launcher: &dyn Launcher,
    n_multiprocessors: u32,
    h: DeviceSlice<f32>,
    chosen: DeviceSlice<u32>,
    weights: DeviceSlice<f32>,
    gate: DeviceSlice<u8>,
    up: DeviceSlice<u8>,
    gate_bias: DeviceSlice<f32>,
    up_bias: DeviceSlice<f32>,
    x: DeviceSlice<f32>,
    gamma: DeviceSlice<f32>,
    parts: DeviceSlice<f32>,
    router_bias: DeviceSlice<f32>,
    epsilon: f32,
    d_model: u32,
    d_ff: u32,
    n_parts: u32,
) -> Result<(), LaunchError> {
    let launch = launch_gate_up(n_multiprocessors, chosen.len() as u32, d_ff);
    // SAFETY: the caller's promise.
    unsafe {
        experts_token_gate_up_mxfp4::run(
            launcher,
            launch,
            h,
            chosen,
            weights,
            gate,
            up,
            gate_bias,
            up_bias,
            x,
            gamma,
            parts,
            router_bias,
            epsilon,
            d_model,
            d_ff,
            n_parts,
        )
    }
}

/// Starts [`experts_token_down_mxfp4`](fn@experts_token_down_mxfp4).
///
/// # Errors
///
/// Those of [`Launcher::launch`].
///
/// # Safety
///
/// Those of the kernel.
#[cfg(not(target_arch = "nvptx64"))]
#[allow(clippy::too_many_arguments, reason = "the kernel's own")]
pub unsafe fn run_down(
    launcher: &dyn Launcher,
    n_multiprocessors: u32,
    out: DeviceSlice<f32>,
    weight: DeviceSlice<u8>,
    bias: DeviceSlice<f32>,
    h: DeviceSlice<f32>,
    chosen: DeviceSlice<u32>,
    weights: DeviceSlice<f32>,
    d_ff: u32,
    d_model: u32,
) -> Result<(), LaunchError> {
    let launch = launch_down(n_multiprocessors, d_model);
    // SAFETY: the caller's promise.
    unsafe { experts_token_down_mxfp4::run(launcher, launch, out, weight, bias, h, chosen, weights, d_ff, d_model) }
}
