//! One token through experts of MXFP4 on tensor cores: the router's end and two kernels, at the speed of memory.
//!
//! Both kernels give each warp whole products and keep warps apart: a warp brings its own weights to its own part of shared
//! memory, [`DEPTH`] runs of 128 elements ahead, a thread exactly the bytes that it reads. There is no barrier but those for
//! activations, and all warps of the grid finish together: tiles are small enough to be dealt out evenly.

use crate::format::{Format, GROUP, MXFP4_RUN, Mxfp4, mxfp4_pairs};
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
const WARPS: u32 = 11;
const THREADS: u32 = WARPS * WARP_SIZE;
/// The widest rows of `gate` and `up`.
pub const MAX_D_MODEL: u32 = 4096;
/// The most activations of all slots together, `n_used · d_ff`.
pub const MAX_ACTIVATIONS: u32 = 16384;

const RUN: u32 = MXFP4_RUN as u32;
/// Bytes of a row's run.
const RUN_BYTES: u32 = 16 * RUN;
/// Runs that are asked for together, and so often under way: with eleven busy warps 44 KiB of an SM.
const RUNS: u32 = 1;
const DEPTH: u32 = 2;
/// Sixteen rows of a run, as fragments: 16 bytes of each thread for rows 0 to 7, then for rows 8 to 15.
const HALF_RUN: u32 = 16 * WARP_SIZE;
const STAGE_BYTES: u32 = RUNS * 2 * HALF_RUN;
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
const PARTS_AHEAD: usize = 18;
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
/// A lane off the diagonal.
const OUT_LANE: u32 = 1;
/// Activations are stored times 2⁹, far from the smallest f16: |h| is at most 56.
const H_UNIT: f32 = 512.0;
/// What codes of [`mxfp4_pairs`] are to be multiplied with.
const CODE_UNIT: f32 = 16384.0;

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
    launch(n_multiprocessors, n_used * (d_ff / FEATURES))
}

/// The geometry [`experts_token_down_mxfp4`] is written for: as [`launch_gate_up`].
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_multiprocessors: u32, d_model: u32) -> Launch {
    launch(n_multiprocessors, d_model / ROWS)
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
    h: Disjoint<u32>,
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
    // SAFETY: the launch contract; the whole block is here.
    let routed = unsafe { Routed::of_block(x, gamma, parts, router_bias, epsilon, d_model, n_parts) };
    let n_used = chosen.len() as u32;

    let dynamic = dynamic_shared_array!(experts_token_gate_up_ring: [u8; GATE_UP_SHARED as usize]);
    let stages = Stages { shared: dynamic, at: warp_idx * GATE_UP_BYTES };
    let scales_at = stages.at + RING_BYTES;
    let n_groups = d_model / GROUP;
    let planes = Mxfp4::LAYOUT.planes(d_model as usize, d_ff as usize);
    let tiles_per_slot = d_ff / FEATURES;
    let n_tiles = n_used * tiles_per_slot;
    let (g, t) = (lane / 4, lane % 4);
    let weights_of = |tile: u32| {
        let slot = tile / tiles_per_slot.max(1);
        // SAFETY: there are as many ids as slots.
        let expert = unsafe { routed.sorted.read(slot as usize) };
        let f = (tile - slot * tiles_per_slot) * FEATURES + g;
        // An expert's first byte, and this lane's first in the row.
        let base = expert as usize * planes.end;
        (slot, expert, f, base, base + f as usize * (16 * n_groups) as usize + (16 * t) as usize)
    };
    let mut runs = Runs::new(n_groups, 0, n_groups.div_ceil(RUN), t);
    let start = |runs: &mut Runs, tile: u32| {
        if tile < n_tiles {
            let (_, _, f, base, from) = weights_of(tile);
            let scales = base + planes.scales + (f - g) as usize * n_groups as usize;
            // SAFETY: the rows exist, and nobody uses this warp's shared memory.
            unsafe {
                copy_scales(dynamic, scales_at, gate, scales, FEATURES * n_groups, lane);
                copy_scales(dynamic, scales_at + FEATURE_SCALES, up, scales, FEATURES * n_groups, lane);
                runs.start(&stages, [(gate, from), (up, from)]);
            }
        }
    };
    let mut tile = warp_idx * thread::grid_dim_x() + thread::block_idx_x();
    start(&mut runs, tile);

    let normal = shared_array!(experts_token_x: [u32; X_WORDS]);
    // SAFETY: the whole block is here.
    unsafe {
        routed.store_normal(normal);
        thread::sync_threads();
    }
    // Few blocks have work for all warps; this one writes what the next kernel needs.
    if thread::block_idx_x() == 0 && warp_idx == WARPS - 1 {
        // SAFETY: a whole warp is here; its elements are a lane's own.
        unsafe { routed.write(chosen, weights) };
    }

    while tile < n_tiles {
        let (slot, expert, f, base, from) = weights_of(tile);
        let at = expert as usize * d_ff as usize + f as usize;
        let gate_bias = if gate_bias.len() > 0 { gate_bias[at] } else { 0.0 };
        let up_bias = if up_bias.len() > 0 { up_bias[at] } else { 0.0 };
        let first = base + planes.scales + (f - g) as usize * n_groups as usize;
        let scale_row = scales_at + first as u32 % 16 + g * n_groups;

        let mut sums = [0.0; 2];
        let mut step = 0;
        while step < runs.steps {
            // SAFETY: the whole warp is here.
            let words = unsafe { runs.next(&stages, [(gate, from), (up, from)], step) };
            let mut k = 0;
            while k < RUNS as usize {
                // Past the last group weights are 0, and so is x.
                let first_group = (step * RUNS + k as u32) * RUN;
                let group = (first_group + t).min(n_groups - 1);
                // SAFETY: scales have landed, x is there.
                unsafe {
                    let scales = [
                        dynamic.read((scale_row + group) as usize),
                        dynamic.read((scale_row + FEATURE_SCALES + group) as usize),
                    ];
                    let x = normal.load16(((first_group + g / 2) * 16 + 4 * t) as usize);
                    add_run(&mut sums, &words[k], scales, x, g);
                }
                k += 1;
            }
            step += 1;
        }
        // SAFETY: the whole warp is here.
        unsafe {
            let (gate, up) = (warp::sum_of::<4>(sums[0]), warp::sum_of::<4>(sums[1]));
            let value = swiglu::activation(gate + gate_bias, up + up_bias) * H_UNIT;
            // Features f and f + 1 in a word, as B fragments have them.
            let next = warp::shuffle_xor(value, 4);
            if lane % 8 == 0 {
                let pair = f % 8 / 2;
                let word = slot * d_ff / 2 + f / GROUP * 16 + 4 * pair + f % GROUP / 8;
                // This lane's alone.
                h.write(word as usize, pack_f16x2(value, next));
            }
            warp::sync(); // Nobody reads this warp's shared memory any more.
        }
        tile += WARPS * thread::grid_dim_x();
        start(&mut runs, tile);
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
    h: Global<u32>,
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
    // A product is on the diagonal: that of row g and column g, or of row g + 8 and column g.
    let mine = used && t == g / 2;
    let planes = Mxfp4::LAYOUT.planes(d_ff as usize, d_model as usize);

    let dynamic = dynamic_shared_array!(experts_token_down_ring: [u8; DOWN_SHARED as usize]);
    let stages = Stages { shared: dynamic, at: warp_idx * DOWN_BYTES };
    let activations = shared_array!(experts_token_h: [u32; H_WORDS]);
    let slot_words = n_runs * RUN * 16 + SLOT_PAD;
    // Scales of a slot's two rows, from a multiple of 16 bytes on.
    let room = (ROWS * n_groups + 31) & !15;
    let scales_at = stages.at + RING_BYTES + slot * room;

    // SAFETY: once, by all threads.
    unsafe { grid::wait() };
    let expert = chosen[slot as usize];
    let slot_weight = if used { weights[slot as usize] } else { 0.0 };
    // SAFETY: the whole block is here, and nobody reads the memory.
    unsafe { stage_activations(activations, h, n_used, d_ff, slot_words) };
    let base = expert as usize * planes.end;
    let row_bytes = 16 * n_groups;
    let end = if used { ((part + 1) * steps).min(n_runs) } else { 0 };
    let mut runs = Runs::new(n_groups, part * steps, end, t);
    // All lanes take as many steps as those with the longest part.
    runs.steps = steps.div_ceil(RUNS);
    let n_tiles = d_model / ROWS;
    let rows_of = |tile: u32| {
        let o = tile * ROWS;
        let from = base + o as usize * row_bytes as usize + (16 * t) as usize;
        (o, [(weight, from), (weight, from + row_bytes as usize)])
    };
    let start = |runs: &mut Runs, tile: u32| {
        if tile < n_tiles {
            let (o, from) = rows_of(tile);
            let scales = base + planes.scales + o as usize * n_groups as usize;
            // SAFETY: the rows exist, and nobody uses this warp's shared memory.
            unsafe {
                if used && part == 0 {
                    // Eight times, for one lane in four at a time.
                    let mut i = 0;
                    while i < WARP_SIZE / 4 {
                        copy_scales(dynamic, scales_at, weight, scales, ROWS * n_groups, 4 * i + t);
                        i += 1;
                    }
                }
                runs.start(&stages, from);
            }
        }
    };
    let mut tile = warp_idx * thread::grid_dim_x() + thread::block_idx_x();
    start(&mut runs, tile);
    if tile < n_tiles {
        cp_async::wait::<DEPTH>(); // The activations' copies are older than these.
    } else {
        cp_async::wait::<0>();
    }
    // SAFETY: the whole block is here.
    unsafe { thread::sync_threads() };

    while tile < n_tiles {
        let (o, from) = rows_of(tile);
        // What is added: biases in lanes on the diagonal, `out` itself in another.
        let mut offsets = [0.0; 2];
        if mine && part == 0 && bias.len() > 0 {
            let row = expert as usize * d_model as usize + o as usize;
            offsets = [bias[row], bias[row + 1]];
        } else if lane == OUT_LANE {
            offsets = [out.read(o as usize), out.read(o as usize + 1)];
        }
        let first = base + planes.scales + o as usize * n_groups as usize;
        let scale_row = scales_at + first as u32 % 16;

        let mut sums = [0.0; 2];
        let mut step = 0;
        while step < runs.steps {
            // SAFETY: the whole warp is here.
            let words = unsafe { runs.next(&stages, from, step) };
            let mut k = 0;
            while k < RUNS as usize {
                // Weights that are not there are 0, whatever they are multiplied with.
                let run = (runs.first + step * RUNS + k as u32).min(n_runs - 1);
                let x = slot * slot_words + run * RUN * 16 + 4 * t;
                let (scales, behind) = (scale_row + run * RUN, n_groups - 1 - run * RUN);
                let mut j = 0;
                while j < MXFP4_RUN {
                    let scale = scales + (j as u32).min(behind);
                    // SAFETY: scales have landed, activations are there, and whole warps are here.
                    unsafe {
                        let b = activations.load16(x as usize + 16 * j);
                        let (upper, lower) = (mxfp4_pairs(words[k][0][j]), mxfp4_pairs(words[k][1][j]));
                        let c = mma::m16n8k16_f16([upper[0], lower[0], upper[1], lower[1]], [b[0], b[1]], [0.0; 4]);
                        let c = mma::m16n8k16_f16([upper[2], lower[2], upper[3], lower[3]], [b[2], b[3]], c);
                        let c = if g % 2 == 0 { [c[0], c[2]] } else { [c[1], c[3]] };
                        sums[0] += scale_of(dynamic.read(scale as usize)) * c[0];
                        sums[1] += scale_of(dynamic.read((scale + n_groups) as usize)) * c[1];
                    }
                    j += 1;
                }
                k += 1;
            }
            step += 1;
        }
        // Codes count 2⁻¹⁴ times their values, activations 2⁹ times.
        let scaled = |r: usize| {
            if mine { slot_weight * (sums[r] * (CODE_UNIT / H_UNIT) + offsets[r]) } else { offsets[r] }
        };
        // SAFETY: the whole warp is here.
        let (first, second) = unsafe { (warp::sum(scaled(0)), warp::sum(scaled(1))) };
        if lane < ROWS {
            // SAFETY: the element is this lane's alone.
            unsafe { out.write((o + lane) as usize, if lane == 0 { first } else { second }) };
        }
        // SAFETY: the whole warp is here, so nobody reads its shared memory any more.
        unsafe { warp::sync() };
        tile += WARPS * thread::grid_dim_x();
        start(&mut runs, tile);
    }
}

/// What a block knows of its token once the router is done.
struct Routed {
    /// Expert ids in order of choice, an array of all threads' length.
    sorted: Shared<u32>,
    /// By expert.
    logits: Shared<f32>,
    /// 1 / √(mean square + ε).
    scale: f32,
    /// This thread's quads of `x` and `gamma`: `thread`, `thread + THREADS`, …; 0 past the end.
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
    unsafe fn of_block(
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
                let i = 4 * (thread + k as u32 * THREADS);
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
        let mut squares = 0.0;
        let mut p = thread;
        while p < n_parts {
            // SAFETY: the row's last element.
            squares += unsafe { parts.read_unchecked((p * n_columns + n_expert) as usize) };
            p += THREADS;
        }
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
            if e - lane >= n_expert {
                break; // The same for the whole warp.
            }
        }
        let x = quads(x);

        let square_sums = shared_array!(experts_token_squares: [f32; THREADS as usize]);
        let logits = shared_array!(experts_token_logits: [f32; THREADS as usize]);
        let keys = shared_array!(experts_token_keys: [u32; THREADS as usize]);
        let sorted = shared_array!(experts_token_sorted: [u32; THREADS as usize]);
        // SAFETY: the block is whole; each thread writes its own elements, and barriers order that before the reads.
        let scale = unsafe {
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
    unsafe fn write(&self, chosen: Disjoint<u32>, weights: Disjoint<f32>) {
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
    unsafe fn store_normal(&self, normal: Shared<u32>) {
        let thread = thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x();
        let mut k = 0;
        while k < X_QUADS {
            let [x, gamma] = [self.x[k], self.gamma[k]].map(|quad| quad.map(f32::from_bits));
            let n = |i: usize| x[i] * self.scale * gamma[i];
            let q = thread + k as u32 * THREADS;
            // Pair i of lane t: elements 8 i + 2 t and the next.
            let at = (q / 8 * 16 + q % 2 * 8 + q % 8 / 2) as usize;
            // SAFETY: inside; each thread writes its own.
            unsafe {
                normal.write(at, pack_f16x2(n(0), n(1)));
                normal.write(at + 4, pack_f16x2(n(2), n(3)));
            }
            k += 1;
        }
    }
}

/// Starts bringing `h` to shared memory, slot s from word `s · slot_words` on, with zeros behind its last group.
///
/// # Safety
///
/// The whole block is here, and nobody reads `into`.
#[inline(always)]
unsafe fn stage_activations(into: Shared<u32>, h: Global<u32>, n_used: u32, d_ff: u32, slot_words: u32) {
    let thread = thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x();
    let mut slot = 0;
    while slot < n_used {
        let mut i = 4 * thread;
        while i < slot_words - SLOT_PAD {
            // SAFETY: rows are whole groups, from multiples of 64 bytes on; each thread writes its own.
            unsafe {
                into.copy_async((slot * slot_words + i) as usize, h, (slot * d_ff / 2 + i) as usize, i < d_ff / 2);
            }
            i += 4 * THREADS;
        }
        slot += 1;
    }
    cp_async::commit();
}

/// A warp's ring of weights, from byte `at` of the dynamic shared memory on.
#[derive(Clone, Copy)]
struct Stages {
    shared: Shared<u8>,
    at: u32,
}

impl Stages {
    /// Where this thread's 16 bytes are of run k of a stage, in row `half` of its two.
    #[inline(always)]
    fn place(&self, step: u32, k: u32, half: u32) -> u32 {
        self.at + step % DEPTH * STAGE_BYTES + (2 * k + half) * HALF_RUN + 16 * warp::lane_id()
    }

    /// This thread's four words of a whole run.
    ///
    /// # Safety
    ///
    /// Its copy has landed.
    #[inline(always)]
    unsafe fn words(&self, step: u32, k: u32, half: u32) -> [u32; 4] {
        // SAFETY: the caller's promise.
        unsafe { self.shared.load16(self.place(step, k, half) as usize) }
    }

    /// This thread's words of a run of only `width` groups, whose row four lanes copied 16 bytes each of; the others are 0.
    ///
    /// # Safety
    ///
    /// All copies have landed, and the warp is synchronized since.
    #[inline(always)]
    unsafe fn words_of_last(&self, step: u32, k: u32, half: u32, width: u32) -> [u32; 4] {
        let t = warp::lane_id() % 4;
        let at = self.place(step, k, half) - 16 * t + 4 * t * width;
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

/// A lane's runs of two rows, on their way through the ring.
struct Runs {
    /// The first run, and the one after the last.
    first: u32,
    end: u32,
    /// Whole runs of a row, and groups of one behind them.
    whole: u32,
    left: u32,
    /// The lane of the row's four.
    t: u32,
    /// Steps of [`RUNS`] runs.
    steps: u32,
}

impl Runs {
    #[inline(always)]
    fn new(n_groups: u32, first: u32, end: u32, t: u32) -> Self {
        let steps = (end.max(first) - first).div_ceil(RUNS);
        Self { first, end, whole: n_groups / RUN, left: n_groups % RUN, t, steps }
    }

    /// Starts the copies of the first steps; `from`: the matrices, and this lane's piece of run 0 of each row.
    ///
    /// # Safety
    ///
    /// The rows exist; the ring is free.
    #[inline(always)]
    unsafe fn start(&mut self, stages: &Stages, from: [(Global<u8>, usize); 2]) {
        let mut step = 0;
        while step < DEPTH {
            // SAFETY: the caller's promise.
            unsafe { self.issue(stages, from, step) };
            step += 1;
        }
    }

    /// # Safety
    ///
    /// The rows exist; the stage has been read.
    #[inline(always)]
    unsafe fn issue(&self, stages: &Stages, from: [(Global<u8>, usize); 2], step: u32) {
        let mut k = 0;
        while k < RUNS {
            let run = self.first + step * RUNS + k;
            // Of a run that is not whole, as many lanes copy as it has groups.
            if run < self.end && (run < self.whole || self.t < self.left) {
                let mut half = 0;
                while half < 2 {
                    let (weight, from) = from[half as usize];
                    let at = stages.place(step, k, half);
                    // SAFETY: the bytes exist; pieces of 16 bytes lie at multiples of 16.
                    unsafe { stages.shared.copy_async(at as usize, weight, from + (run * RUN_BYTES) as usize, true) };
                    half += 1;
                }
            }
            k += 1;
        }
        cp_async::commit();
    }

    /// Waits for a step's words, and starts the copies that take their place.
    ///
    /// # Safety
    ///
    /// The whole warp is here; [`start`](Self::start) was called, and this for all steps before.
    #[inline(always)]
    unsafe fn next(
        &self,
        stages: &Stages,
        from: [(Global<u8>, usize); 2],
        step: u32,
    ) -> [[[u32; 4]; 2]; RUNS as usize] {
        cp_async::wait::<{ DEPTH - 1 }>();
        let mut words = [[[0; 4]; 2]; RUNS as usize];
        // SAFETY: the copies have landed.
        unsafe {
            warp::sync(); // For scales and short runs lanes read what others copied.
            let mut k = 0;
            while k < RUNS {
                let run = self.first + step * RUNS + k;
                if run < self.end && run < self.whole {
                    words[k as usize] = [stages.words(step, k, 0), stages.words(step, k, 1)];
                } else if run < self.end {
                    let of = |half| stages.words_of_last(step, k, half, self.left);
                    words[k as usize] = [of(0), of(1)];
                }
                k += 1;
            }
            self.issue(stages, from, step + DEPTH);
        }
        words
    }
}

/// Starts copying `bytes` bytes from `start` on, of any alignment, to byte `at` and further by as much as `start` is beyond
/// a multiple of 16; every lane has its 16 bytes.
///
/// # Safety
///
/// The bytes exist, and those around them to multiples of 16; the room is free.
#[inline(always)]
unsafe fn copy_scales(into: Shared<u8>, at: u32, weight: Global<u8>, start: usize, bytes: u32, lane: u32) {
    let before = start as u32 % 16;
    let mut i = 16 * lane;
    while i < before + bytes {
        // SAFETY: planes are whole multiples of 16 bytes.
        unsafe { into.copy_async((at + i) as usize, weight, start - before as usize + i as usize, true) };
        i += 16 * WARP_SIZE;
    }
}

/// What f32 has to be multiplied with under the E8M0 scale `e`; the smallest power is subnormal.
#[inline(always)]
fn scale_of(e: u8) -> f32 {
    f32::from_bits((u32::from(e) << 23).max(0x0040_0000))
}

/// Adds the products of a run of a row of `gate` and one of `up`, whose words are given, with the vector of which lanes `4
/// · 2 j + t` have group j in `x`; a lane keeps the sums of group t of the run.
///
/// # Safety
///
/// The whole warp is here.
#[inline(always)]
unsafe fn add_run(sums: &mut [f32; 2], [gate, up]: &[[u32; 4]; 2], scales: [u8; 2], x: [u32; 4], g: u32) {
    // Column 2 j is group j's, and all others are 0.
    let (mut low, mut high) = ([0.0; 4], [0.0; 4]);
    let mut j = 0;
    while j < MXFP4_RUN {
        let b = if g == 2 * j as u32 { x } else { [0; 4] };
        let (a, c) = (mxfp4_pairs(gate[j]), mxfp4_pairs(up[j]));
        let sum = if j < 2 { &mut low } else { &mut high };
        // SAFETY: the caller's promise.
        unsafe {
            *sum = mma::m16n8k16_f16([a[0], c[0], a[1], c[1]], [b[0], b[1]], *sum);
            *sum = mma::m16n8k16_f16([a[2], c[2], a[3], c[3]], [b[2], b[3]], *sum);
        }
        j += 1;
    }
    sums[0] += scale_of(scales[0]) * ((low[0] + high[0]) * CODE_UNIT);
    sums[1] += scale_of(scales[1]) * ((low[2] + high[2]) * CODE_UNIT);
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
    h: DeviceSlice<u32>,
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
    h: DeviceSlice<u32>,
    chosen: DeviceSlice<u32>,
    weights: DeviceSlice<f32>,
    d_ff: u32,
    d_model: u32,
) -> Result<(), LaunchError> {
    let launch = launch_down(n_multiprocessors, d_model);
    // SAFETY: the caller's promise.
    unsafe { experts_token_down_mxfp4::run(launcher, launch, out, weight, bias, h, chosen, weights, d_ff, d_model) }
}
