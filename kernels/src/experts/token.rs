//! One token through experts of MXFP4 on tensor cores: the router's end and two kernels, at the speed of memory.
//!
//! Both kernels keep warps apart: a warp streams its own weights through its own ring in shared memory, in the order in which
//! they lie in device memory. Runs of tiles are small enough to be dealt out evenly.

use crate::format::{Format, GROUP, MXFP4_ROWS, MXFP4_RUN, Mxfp4, mxfp4_pairs};
#[cfg(not(target_arch = "nvptx64"))]
use crate::router::MAX_USED;
use crate::router::{MAX_EXPERTS, order};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{
    Disjoint, Float, Global, Shared, cp_async, dynamic_shared_array, grid, kernel, mma, pack_f16x2, shared_array,
    thread, warp,
};

const RUN: u32 = MXFP4_RUN as u32;
/// Rows that interleave their runs: those of a tile, half of an mma's.
const ROWS: u32 = MXFP4_ROWS as u32;
/// Bytes of a run of eight rows: 16 of each lane.
const RUN_BYTES: u32 = 16 * RUN * ROWS;
/// Scales of such a run: one of each lane.
const RUN_SCALES: u32 = RUN * ROWS;
/// Steps of a warp under way, each a run of two tiles.
const DEPTH: u32 = 4;
const STAGE_BYTES: u32 = 2 * RUN_BYTES;
const RING_BYTES: u32 = DEPTH * STAGE_BYTES;

/// Warps of a block of `experts_token_gate_up_mxfp4`: four for each scheduler, whose registers leave no room for a second
/// block.
const GATE_UP_WARPS: u32 = 16;
const GATE_UP_THREADS: u32 = GATE_UP_WARPS * WARP_SIZE;
/// The widest rows of `gate` and `up`.
pub const MAX_D_MODEL: u32 = 4096;
/// A run of two tiles, and the scales of both.
const GATE_UP_STAGE: u32 = STAGE_BYTES + 2 * RUN_SCALES;
const GATE_UP_RING: u32 = DEPTH * GATE_UP_STAGE;
/// The most tiles of a block; more blocks than multiprocessors have the rest.
const MAX_TILES: u32 = 48;
/// What a warp has of a tile's rows, of `gate` and of `up`: warp w's of tile i at place `i + w`, since warps share tiles in
/// order.
const GATE_UP_SUMS: u32 = (MAX_TILES + GATE_UP_WARPS) * 2 * ROWS;
const GATE_UP_SHARED: u32 = GATE_UP_WARPS * GATE_UP_RING + 4 * GATE_UP_SUMS;
const _: () = assert!(MAX_TILES * ROWS <= GATE_UP_THREADS, "a thread for each feature");
/// Quads of `x` that a thread brings.
const X_QUADS: usize = MAX_D_MODEL.div_ceil(4 * GATE_UP_THREADS) as usize;
const X_WORDS: usize = X_QUADS * 2 * GATE_UP_THREADS as usize;
/// Zeros behind `x`, for the columns of others.
const ZERO_WORDS: u32 = 32;
/// Parts of the router's sums that a thread loads together.
const PARTS_AHEAD: usize = 9;
const EXPERT_SUMS: usize = (GATE_UP_WARPS * MAX_EXPERTS) as usize;

/// Warps of a block of `experts_token_down_mxfp4`: they share the pairs of slots evenly, and their registers leave no room for a
/// second block.
const DOWN_WARPS: u32 = 12;
const DOWN_THREADS: u32 = DOWN_WARPS * WARP_SIZE;
/// The most steps of a warp in a row.
const MAX_STEPS: u32 = 4;
/// Scales of a warp's part of eight rows, from a multiple of 16 bytes on.
const PART_SCALES: u32 = MAX_STEPS * RUN_SCALES + 16;
const _: () = assert!(PART_SCALES <= 16 * WARP_SIZE);
/// Tiles whose scales have room: one in use, and as many under way as steps.
const SCALE_TILES: u32 = 8;
const _: () = assert!(SCALE_TILES > DEPTH);
/// Activations of a warp: 16 bytes of each lane for each step.
const PART_BYTES: u32 = MAX_STEPS * 16 * WARP_SIZE;
const ACTIVATION_WORDS: u32 = DOWN_WARPS * PART_BYTES / 4;
const DOWN_BYTES: u32 = RING_BYTES + SCALE_TILES * 2 * PART_SCALES;
const DOWN_SHARED: u32 = DOWN_WARPS * DOWN_BYTES;
/// Tiles whose sums are added up together: a lane of four keeps one each.
const SUM_TILES: u32 = 4;
/// Activations are stored times 2⁹, far from the smallest f16: |h| is at most 56.
const H_UNIT: f32 = 512.0;
/// What codes of [`mxfp4_pairs`] are to be multiplied with.
const CODE_UNIT: f32 = 16384.0;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_token_gate_up_mxfp4::ENTRY, experts_token_down_mxfp4::ENTRY];

/// Whether the kernels of this file can run a layer of these widths, which are whole groups.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn fits(n_expert: u32, n_used: u32, d_model: u32, d_ff: u32) -> bool {
    if n_expert > MAX_EXPERTS || n_used == 0 || n_used > MAX_USED || d_model > MAX_D_MODEL {
        return false;
    }
    let splits = DOWN_WARPS / n_used.div_ceil(2);
    d_ff.div_ceil(GROUP * RUN).div_ceil(splits) <= MAX_STEPS
}

/// Tiles of a block of `experts_token_gate_up_mxfp4`: an equal share of one, two, … blocks for each multiprocessor.
#[cfg(not(target_arch = "nvptx64"))]
const fn tiles_per_block(n_multiprocessors: u32, n_used: u32, d_ff: u32) -> u32 {
    let n_tiles = n_used * (d_ff / ROWS);
    let waves = n_tiles.div_ceil(n_multiprocessors).div_ceil(MAX_TILES);
    n_tiles.div_ceil(n_multiprocessors * waves)
}

/// The geometry [`experts_token_gate_up_mxfp4`](fn@experts_token_gate_up_mxfp4) is written for: blocks of an equal share of
/// tiles, one for each multiprocessor. Where a tile lies in its block decides the order in which it is summed.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_gate_up(n_multiprocessors: u32, n_used: u32, d_ff: u32) -> Launch {
    let blocks = (n_used * (d_ff / ROWS)).div_ceil(tiles_per_block(n_multiprocessors, n_used, d_ff));
    Launch { grid: [blocks, 1, 1], block: [WARP_SIZE, GATE_UP_WARPS, 1] }
}

/// The geometry [`experts_token_down_mxfp4`](fn@experts_token_down_mxfp4) is written for: a block for each multiprocessor, or
/// for each tile if those are fewer. Any number of blocks gives the same bits.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_multiprocessors: u32, d_model: u32) -> Launch {
    let n_tiles = d_model / ROWS;
    let blocks = if n_tiles < n_multiprocessors { n_tiles } else { n_multiprocessors };
    Launch { grid: [blocks, 1, 1], block: [WARP_SIZE, DOWN_WARPS, 1] }
}

/// The end of a token's router, and the first half of its experts, of type MXFP4, with the gated unit.
///
/// - Math: `r = 1 / √(Σₚ parts[p, n_expert] / d_model + ε)`; `logit[e] = r · Σₚ parts[p, e] + router_bias[e]`; `chosen` and
///   `weights` as [`router`](crate::router::router()) has them; for each slot s, `e = chosen[s]`, `n = r · γ ⊙ x`: `h[s, f] =
///   swiglu(gateₑ[f] · n + gate_bias[e, f], upₑ[f] · n + up_bias[e, f])`, swiglu being [`swiglu::activation`]. n is rounded
///   to f16, so it is to stay below 65504.
/// - Shapes: `h`: `[n_used, d_ff / 2]`, pairs of f16 times 2⁹: word `16 k + 4 t + i` of a slot has features `32 k + 8 i + 2 t`
///   and the next; `chosen`, `weights`: `[n_used]`; `gate`, `up`: `[n_expert, d_ff, d_model]`, each expert in its planes;
///   `gate_bias`, `up_bias`: `[n_expert, d_ff]`, or empty; `x`, `gamma`: `[d_model]`, from multiples of 16 bytes on; `parts`:
///   `[n_parts, n_expert + 1]`, of part p of x the sums `Σᵢ router[e, i] · γ[i] · x[i]` and `Σᵢ x[i]²`; `router_bias`:
///   `[n_expert]`, or empty. As [`fits`] says; n_used at most n_expert, n_parts at least 1.
/// - Launch: [`launch_gate_up`], `n_block_tiles` tiles of eight features a block. Every block finishes the router for itself;
///   then its warps share the runs of all its tiles in order, an mma's rows 0 to 7 being of `gate` and 8 to 15 of `up`, its
///   columns 0, 2, 4, 6 one group of 32 elements each.
/// - Shared memory: 72 KiB dynamic, a ring of weights for each warp and the warps' sums; 24 KiB static, n and the router's
///   sums; five barriers.
/// - Cost: memory bound, the bytes of `n_used` experts' `gate` and `up`.
/// - Determinism: one fixed order of f32 sums; tensor cores order the 16 terms of a step themselves.
/// - Source: [`Mxfp4`]; gpt-oss's reference implementation, `MLPBlock` in `gpt_oss/torch/model.py`.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above; no launch writes `gamma` and `router_bias`.
#[kernel(threads = GATE_UP_THREADS, registers = 80, dynamic_shared = GATE_UP_SHARED, waits, launches)]
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
    n_block_tiles: u32,
) {
    let (lane, warp_idx) = (thread::thread_idx_x(), thread::thread_idx_y());
    // SAFETY: the launch contract; the whole block is here.
    let routed = unsafe { Routed::of_block(x, gamma, parts, router_bias, epsilon, d_model, n_parts) };
    let n_used = chosen.len() as u32;

    let dynamic = dynamic_shared_array!(experts_token_gate_up_ring: [u8; GATE_UP_SHARED as usize]);
    let n_groups = d_model / GROUP;
    let planes = Mxfp4::LAYOUT.planes(d_model as usize, d_ff as usize);
    let tiles_per_slot = (d_ff / ROWS).max(1);
    let first_tile = thread::block_idx_x() * n_block_tiles;
    let n_tiles = n_block_tiles.min(n_used * tiles_per_slot - first_tile);
    let (g, t) = (lane / 4, lane % 4);
    let (whole, left) = (n_groups / RUN, n_groups % RUN);
    let n_runs = n_groups.div_ceil(RUN).max(1); // Never 0, which LLVM does not know.
    // A warp's share of the runs of all tiles.
    let n_units = n_tiles * n_runs;
    let per_warp = n_units.div_ceil(GATE_UP_WARPS).max(1);
    let (first, end) = (n_units.min(warp_idx * per_warp), n_units.min((warp_idx + 1) * per_warp));
    let (ring, sums_at) = (warp_idx * GATE_UP_RING, GATE_UP_WARPS * GATE_UP_RING);
    // Of a tile its expert's matrix, and in it the groups before the tile's.
    let place_of = |tile: u32| {
        let slot = (first_tile + tile) / tiles_per_slot;
        // SAFETY: there are as many ids as slots.
        let expert = unsafe { routed.sorted.read(slot as usize) };
        let first = (first_tile + tile - slot * tiles_per_slot) * ROWS;
        (slot, expert, first)
    };
    // Eight lanes copy scales of `gate`, a word each, and eight of `up`.
    let (scales_of, scale_word) = (if lane < ROWS { gate } else { up }, lane % ROWS);
    let place = |ahead: Ahead| {
        let (_, expert, first) = place_of(ahead.tile);
        let before = first * n_groups;
        // SAFETY: the expert exists.
        let matrix = |of: Global<u8>| unsafe { of.row_unchecked(expert as usize, planes.end) };
        Ahead {
            gate: matrix(gate),
            up: matrix(up),
            scales: matrix(scales_of),
            quants_at: 16 * before + ahead.run * RUN_BYTES + 16 * lane,
            scales_at: planes.scales as u32 + before + ahead.run * RUN_SCALES + 4 * scale_word,
            ..ahead
        }
    };
    // Of a run that is not whole, eight lanes copy for each of its groups, and two words of scales.
    let has_scales = lane < 2 * ROWS;
    let copy = |ahead: &Ahead, quants: bool, scales: bool| {
        let to = (ring + ahead.unit % DEPTH * GATE_UP_STAGE) as usize;
        // SAFETY: the bytes exist, and the stage has been read.
        unsafe {
            if quants {
                let (to, from) = (to + 16 * lane as usize, ahead.quants_at as usize);
                dynamic.copy_async(to, ahead.gate, from, true);
                dynamic.copy_async(to + RUN_BYTES as usize, ahead.up, from, true);
            }
            if scales {
                let to = to + (STAGE_BYTES + 4 * lane) as usize;
                dynamic.copy_async4(to, ahead.scales, ahead.scales_at as usize, true);
            }
        }
    };
    let issue = |ahead: &mut Ahead| {
        if ahead.unit < end {
            if ahead.run < whole {
                copy(ahead, true, has_scales);
            } else {
                copy(ahead, lane < ROWS * left, has_scales && scale_word < ROWS / 4 * left);
            }
            (ahead.unit, ahead.run) = (ahead.unit + 1, ahead.run + 1);
            (ahead.quants_at, ahead.scales_at) = (ahead.quants_at + RUN_BYTES, ahead.scales_at + RUN_SCALES);
            if ahead.run == n_runs && ahead.unit < end {
                *ahead = place(Ahead { tile: ahead.tile + 1, run: 0, ..*ahead });
            }
        }
        cp_async::commit();
    };
    let (tile, run) = (first / n_runs, first % n_runs);
    let ahead = Ahead { unit: first, tile, run, gate, up, scales: scales_of, quants_at: 0, scales_at: 0 };
    let mut ahead = if first < end { place(ahead) } else { ahead };
    // One stage is left free: while it is filled, all read the one before.
    let mut i = 1;
    while i < DEPTH {
        issue(&mut ahead);
        i += 1;
    }

    // A feature is a thread's at the end; its biases are there by then.
    let thread = warp_idx * WARP_SIZE + lane;
    let (slot, expert, first_feature) = place_of((thread / ROWS).min(n_tiles - 1));
    let feature = first_feature + thread % ROWS;
    let bias_of = |bias: Global<f32>| {
        let at = expert as usize * d_ff as usize + feature as usize;
        // SAFETY: the feature exists.
        if bias.len() > 0 { unsafe { bias.read_unchecked(at) } } else { 0.0 }
    };
    let biases = [bias_of(gate_bias), bias_of(up_bias)];

    let normal = shared_array!(experts_token_x: [u32; X_WORDS + ZERO_WORDS as usize]);
    // Column 2 j is group j's of a run: others read zeros.
    let x_of = |at: u32| {
        // SAFETY: as below.
        [0, 1, 2, 3].map(|j| unsafe { normal.load16(if g == 2 * j { at as usize } else { X_WORDS }) })
    };
    // SAFETY: the whole block is here.
    unsafe {
        routed.store_normal(normal);
        thread::sync_threads();
    }
    // Its share is the smallest; it writes what the next kernel needs.
    if thread::block_idx_x() == 0 && warp_idx == GATE_UP_WARPS - 1 {
        // SAFETY: a whole warp is here; its elements are a lane's own.
        unsafe { routed.write(chosen, weights) };
    }

    let (mut unit, mut tile, mut run) = (first, first / n_runs, first % n_runs);
    let x_start = 16 * (g / 2) + 4 * t;
    let mut x_at = x_start + run * (16 * RUN);
    let mut sums = [0.0; 2];
    while unit < end {
        // The tile's whole runs, then what is left, if they are this warp's.
        let n_now = whole.saturating_sub(run).min(end - unit);
        let (stop, stop_short) = (unit + n_now, unit + (n_runs - run).min(end - unit));
        let mut add = |words: [[u32; 4]; 2], scales: [u8; 2], x: [[u32; 4]; 4]| {
            // SAFETY: whole warps are here.
            let products = unsafe { multiply_run::<false>(&words, x) };
            // Codes count 2⁻¹⁴ times their values.
            sums[0] += scale_of(scales[0]) * (products[0] * CODE_UNIT);
            sums[1] += scale_of(scales[1]) * (products[1] * CODE_UNIT);
        };
        while unit < stop {
            cp_async::wait::<{ DEPTH - 2 }>();
            let at = ring + unit % DEPTH * GATE_UP_STAGE;
            // SAFETY: the warp's copies have landed, and x is there.
            unsafe {
                // Scales are read that other lanes have copied; and all have read the stage that is filled next.
                warp::sync();
                issue(&mut ahead);
                let words = own_words(dynamic, at + 16 * lane);
                let scale = (at + STAGE_BYTES + lane) as usize;
                let scales = [dynamic.read(scale), dynamic.read(scale + RUN_SCALES as usize)];
                add(words, scales, x_of(x_at));
            }
            (unit, x_at) = (unit + 1, x_at + 16 * RUN);
        }
        if unit < stop_short {
            cp_async::wait::<{ DEPTH - 2 }>();
            let at = ring + unit % DEPTH * GATE_UP_STAGE;
            // SAFETY: as above.
            unsafe {
                warp::sync();
                issue(&mut ahead);
                let words = short_words(dynamic, at, left);
                let scale = (at + STAGE_BYTES + g * left + t.min(left - 1)) as usize;
                let scales = [dynamic.read(scale), dynamic.read(scale + RUN_SCALES as usize)];
                // Past the last group weights are 0, and so is x.
                add(words, scales, x_of(x_at));
            }
            unit += 1;
        }
        if unit + DEPTH >= end {
            grid::launch_dependents();
        }
        // SAFETY: the whole warp is here; a lane of two writes its own element.
        unsafe {
            let [gate, up] = sums.map(|sum| warp::sum_of::<4>(sum));
            let to = sums_at + 4 * ((tile + warp_idx) * 2 * ROWS + t * ROWS + g);
            if t < 2 {
                dynamic.store4(to as usize, (if t == 0 { gate } else { up }).to_bits());
            }
        }
        sums = [0.0; 2];
        (tile, run, x_at) = (tile + 1, 0, x_start);
    }
    // SAFETY: the whole block is here.
    unsafe { thread::sync_threads() };
    // Whole warps have features, or none.
    if warp_idx * WARP_SIZE < n_tiles * ROWS {
        let tile = thread / ROWS;
        let mut sums = biases;
        if tile < n_tiles {
            let (mut w, last) = (tile * n_runs / per_warp, ((tile + 1) * n_runs - 1) / per_warp);
            while w <= last {
                let at = sums_at + 4 * ((tile + w) * 2 * ROWS + thread % ROWS);
                // SAFETY: written before the barrier.
                unsafe {
                    sums[0] += f32::from_bits(dynamic.load4(at as usize));
                    sums[1] += f32::from_bits(dynamic.load4((at + 4 * ROWS) as usize));
                }
                w += 1;
            }
        }
        let value = swiglu::activation(sums[0], sums[1]) * H_UNIT;
        // SAFETY: whole warps are here; features f and f + 1 share a word, as B fragments have them, which is one lane's.
        unsafe {
            let next = warp::shuffle_xor(value, 1);
            if tile < n_tiles && feature.is_multiple_of(2) {
                let place = feature / GROUP * 16 + 4 * (feature % ROWS / 2) + feature % GROUP / ROWS;
                h.write((slot * d_ff / 2 + place) as usize, pack_f16x2(value, next));
            }
        }
    }
}

/// The next run that a warp asks for.
#[derive(Clone, Copy)]
struct Ahead {
    unit: u32,
    tile: u32,
    run: u32,
    /// The tile's expert, and the one of the two of which this lane copies scales.
    gate: Global<u8>,
    up: Global<u8>,
    scales: Global<u8>,
    /// First byte there of this lane's quants, and of its scales.
    quants_at: u32,
    scales_at: u32,
}

/// The second half of a token's experts, of type MXFP4, weighted and added up.
///
/// - Math: `out[o] ← out[o] + Σₛ weights[s] · (downₑ[o] · h[s] + bias[e, o])`, `e = chosen[s]`.
/// - Shapes: `out`: `[d_model]`; `weight`: `[n_expert, d_model, d_ff]`, each expert in its planes; `bias`: `[n_expert,
///   d_model]`, or empty; `h`: `[n_used, d_ff / 2]`, as [`experts_token_gate_up_mxfp4`](fn@experts_token_gate_up_mxfp4) leaves it; `chosen`, `weights`:
///   `[n_used]`. As [`fits`] says.
/// - Launch: [`launch_down`]. A block owns eight rows of `out` at a time, a warp two slots and an equal part of their
///   elements: an mma's rows 0 to 7 are of the one slot and its even columns one group each, the others of the other.
/// - Shared memory: 75 KiB dynamic, rings of weights and scales for each warp; 26 KiB static, activations and sums; two
///   barriers each four times eight rows.
/// - Cost: memory bound, the bytes of `n_used` experts' `down`.
/// - Determinism: one fixed order of f32 sums; tensor cores order the 16 terms of a step themselves.
/// - Source: [`Mxfp4`].
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = DOWN_THREADS, registers = 112, dynamic_shared = DOWN_SHARED, waits, launches)]
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
    let (whole, left) = (n_groups / RUN, n_groups % RUN);
    let n_runs = n_groups.div_ceil(RUN);
    let planes = Mxfp4::LAYOUT.planes(d_ff as usize, d_model as usize);
    // This warp's slots, the second of which may be none, and its runs.
    let splits = DOWN_WARPS / n_used.div_ceil(2).max(1);
    let pair = warp_idx / splits.max(1);
    let steps = n_runs.div_ceil(splits.max(1));
    let first_run = (warp_idx - pair * splits) * steps;
    let slots = [(2 * pair).min(n_used - 1), (2 * pair + 1).min(n_used - 1)];
    let (block, n_blocks) = (thread::block_idx_x(), thread::grid_dim_x());
    let n_tiles = d_model / ROWS;

    let dynamic = dynamic_shared_array!(experts_token_down_ring: [u8; DOWN_SHARED as usize]);
    let ring = warp_idx * DOWN_BYTES;
    let scales_at = ring + RING_BYTES;
    let activations = shared_array!(experts_token_h: [u32; (ACTIVATION_WORDS + 4 * DOWN_WARPS) as usize]);
    let sums = shared_array!(experts_token_down_sums: [f32; DOWN_THREADS as usize]);

    // SAFETY: once, by all threads.
    unsafe { grid::wait() };
    let experts = slots.map(|slot| chosen[slot as usize]);
    let slot_weights = [
        if 2 * pair < n_used { weights[slots[0] as usize] } else { 0.0 },
        if 2 * pair + 1 < n_used { weights[slots[1] as usize] } else { 0.0 },
    ];
    // The first byte of the first tile's run of this warp, and of its scales.
    // All of them are below 2³² of a matrix, given `fits`.
    let groups = block * ROWS * n_groups;
    let bases = experts.map(|expert| expert as usize * planes.end);
    let run_before = RUN_BYTES * first_run + 16 * lane;
    let scales_before = planes.scales as u32 + RUN_SCALES * first_run;
    let tile_groups = n_blocks * ROWS * n_groups;
    let part_scales = |run: u32| ROWS * (RUN * run).min(n_groups);
    let part_bytes = part_scales((first_run + steps).min(n_runs).max(first_run)) - part_scales(first_run);

    // The next step to be asked for: its tile, place there, and groups before the tile.
    let (mut ahead_tile, mut ahead_step, mut ahead, mut ahead_groups) = (0, 0, 0, groups);
    let mut issue = || {
        if block + ahead_tile * n_blocks < n_tiles {
            let run = first_run + ahead_step;
            // SAFETY: rows and scales exist; the stage has been read, and scales of as many tiles before.
            unsafe {
                if ahead_step == 0 && part_bytes > 0 {
                    let at = scales_at + ahead_tile % SCALE_TILES * (2 * PART_SCALES);
                    let from = (scales_before + ahead_groups) as usize;
                    copy_scales::<1>(dynamic, at, weight, bases[0] + from, part_bytes);
                    copy_scales::<1>(dynamic, at + PART_SCALES, weight, bases[1] + from, part_bytes);
                }
                if run < whole || (run < n_runs && lane < ROWS * left) {
                    let from = (16 * ahead_groups + run_before + ahead_step * RUN_BYTES) as usize;
                    let to = (ring + ahead % DEPTH * STAGE_BYTES + 16 * lane) as usize;
                    dynamic.copy_async(to, weight, bases[0] + from, true);
                    dynamic.copy_async(to + RUN_BYTES as usize, weight, bases[1] + from, true);
                }
            }
            ahead_step += 1;
            if ahead_step == steps {
                (ahead_tile, ahead_step, ahead_groups) = (ahead_tile + 1, 0, ahead_groups + tile_groups);
            }
        }
        ahead += 1;
        cp_async::commit();
    };
    // Activations are the same for all tiles; each lane copies what it reads: of a column, group g / 2 of a run.
    let x_at = warp_idx * (PART_BYTES / 4) + 4 * lane;
    let x_slot = if g % 2 == 0 { slots[0] } else { slots[1] };
    let mut step = 0;
    while step < steps {
        let group = (first_run + step) * RUN + g / 2;
        let from = if group < n_groups { (x_slot * n_groups + group) * 16 + 4 * t } else { 0 };
        // SAFETY: the group exists, or is not read.
        unsafe {
            let to = x_at + step * (4 * WARP_SIZE);
            activations.copy_async(to as usize, h, from as usize, group < n_groups);
        }
        step += 1;
    }
    let mut i = 0;
    while i < DEPTH {
        issue();
        i += 1;
    }
    // For the columns of others; the barriers of the loop order it.
    let zeros_at = ACTIVATION_WORDS + 4 * warp_idx;
    if lane < 4 {
        // SAFETY: this lane's alone.
        unsafe { activations.write((zeros_at + lane) as usize, 0) };
    }

    let has_bias = bias.len() > 0 && t == 0 && first_run == 0;
    // Of the last tile nearly all is under way.
    let own_tile_is_last = |tile: u32| block + (tile + 1) * n_blocks >= n_tiles;
    let (mut tile, mut taken) = (0, 0);
    let (mut kept, mut total) = (0.0, 0.0);
    while block + tile * n_blocks < n_tiles {
        // Sums of four tiles are added up together: lane l of the first warp has row `l % 8` of tile `l / 8` of them.
        let own_tile = block + (tile / SUM_TILES * SUM_TILES + lane / ROWS) * n_blocks;
        let adds = warp_idx == 0 && own_tile < n_tiles;
        let o = own_tile * ROWS + lane % ROWS;
        if tile % SUM_TILES == 0 && adds {
            total = out.read(o as usize);
        }
        if own_tile_is_last(tile) {
            grid::launch_dependents();
        }
        let at = scales_at + tile % SCALE_TILES * (2 * PART_SCALES);
        let at = at + (scales_before + groups + tile * tile_groups) % 16;
        // One lane of those that share row g has its biases, of one part of the elements.
        let mut offsets = [0.0; 2];
        if has_bias {
            let row = (block + tile * n_blocks) * ROWS + g;
            offsets = experts.map(|expert| bias[expert as usize * d_model as usize + row as usize]);
        }
        let mut sum = [0.0; 2];
        let mut step = 0;
        while step < steps {
            cp_async::wait::<{ DEPTH - 1 }>();
            let run = first_run + step;
            // SAFETY: the copies have landed, and whole warps are here.
            unsafe {
                warp::sync(); // For scales and short runs lanes read what others copied.
                if run < n_runs {
                    let is_whole = run < whole;
                    let stage = ring + taken % DEPTH * STAGE_BYTES;
                    let own = stage + 16 * lane;
                    let words = if is_whole { own_words(dynamic, own) } else { short_words(dynamic, stage, left) };
                    let scale = at + scale_place(step, if is_whole { RUN } else { left });
                    let scales = [dynamic.read(scale as usize), dynamic.read((scale + PART_SCALES) as usize)];
                    let x = [0, 1, 2, 3].map(|j| {
                        let own = x_at + step * (4 * WARP_SIZE);
                        activations.load16((if g / 2 == j { own } else { zeros_at }) as usize)
                    });
                    let products = multiply_run::<true>(&words, x);
                    sum[0] += scale_of(scales[0]) * products[0];
                    sum[1] += scale_of(scales[1]) * products[1];
                }
                if run >= whole {
                    warp::sync(); // Nor is such a run overwritten before all have read it.
                }
            }
            issue();
            taken += 1;
            step += 1;
        }
        // Codes count 2⁻¹⁴ times their values, activations 2⁹ times.
        let product = |i: usize| slot_weights[i] * (sum[i] * (CODE_UNIT / H_UNIT) + offsets[i]);
        // SAFETY: the whole warp is here.
        let row = unsafe { warp::sum_of::<4>(product(0) + product(1)) };
        kept = if t == tile % SUM_TILES { row } else { kept };
        tile += 1;
        if tile % SUM_TILES == 0 || block + tile * n_blocks >= n_tiles {
            // SAFETY: the whole block is here, since its tiles are; each thread writes its own element, between barriers.
            unsafe {
                sums.write((warp_idx * WARP_SIZE + t * ROWS + g) as usize, kept);
                thread::sync_threads();
                if adds {
                    let mut w = 0;
                    while w < DOWN_WARPS {
                        total += sums.read((w * WARP_SIZE + lane) as usize);
                        w += 1;
                    }
                    out.write(o as usize, total);
                }
                thread::sync_threads();
            }
        }
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

/// This lane's words of both tiles of a whole run, its own 16 bytes being at `at`: what it has copied itself.
///
/// # Safety
///
/// This lane's copies have landed.
#[inline(always)]
unsafe fn own_words(shared: Shared<u8>, at: u32) -> [[u32; 4]; 2] {
    // SAFETY: the caller's promise.
    unsafe { [0, RUN_BYTES].map(|tile| shared.load16((at + tile) as usize)) }
}

/// This lane's words of both tiles of a run of `width` groups, fewer than a whole one's, in the stage at `stage`; words of
/// groups past them are 0.
///
/// # Safety
///
/// The warp's copies have landed, and it is synchronized since.
#[inline(always)]
unsafe fn short_words(shared: Shared<u8>, stage: u32, width: u32) -> [[u32; 4]; 2] {
    let mut words = [[0; 4]; 2];
    // Row g's pieces of `4 · width` bytes.
    let at = stage + 4 * width * warp::lane_id();
    let mut j = 0;
    while j < MXFP4_RUN {
        if (j as u32) < width {
            // SAFETY: the caller's promise.
            unsafe {
                words[0][j] = shared.load4(at as usize + 4 * j);
                words[1][j] = shared.load4((at + RUN_BYTES) as usize + 4 * j);
            }
        }
        j += 1;
    }
    words
}

/// Where the scale is, from the first run's on, of row `lane / 4` and group `lane % 4` of a run of `width` groups; some other
/// of the run's if it has no such group.
#[inline(always)]
fn scale_place(run: u32, width: u32) -> u32 {
    let (g, t) = (warp::lane_id() / 4, warp::lane_id() % 4);
    run * RUN_SCALES + g * width + t.min(width - 1)
}

/// Starts copying `bytes` bytes from `start` on, of any alignment, to byte `at` and further by as much as `start` is beyond
/// a multiple of 16. Each lane copies 16 bytes, `PIECES` times at most.
///
/// # Safety
///
/// The whole warp is here; the bytes exist, and those around them to multiples of 16; the room is free.
#[inline(always)]
unsafe fn copy_scales<const PIECES: u32>(into: Shared<u8>, at: u32, weight: Global<u8>, start: usize, bytes: u32) {
    let before = start as u32 % 16;
    let mut piece = 0;
    while piece < PIECES {
        let i = 16 * (warp::lane_id() + piece * WARP_SIZE);
        if i < before + bytes {
            // SAFETY: planes are whole multiples of 16 bytes.
            unsafe { into.copy_async((at + i) as usize, weight, start - before as usize + i as usize, true) };
        }
        piece += 1;
    }
}

/// What f32 has to be multiplied with under the E8M0 scale `e`; the smallest power is subnormal.
#[inline(always)]
fn scale_of(e: u8) -> f32 {
    f32::from_bits((u32::from(e) << 23).max(0x0040_0000))
}

/// The products of a run of two tiles' rows g with group t of the vectors. `x[j]` is B for group j: its pairs of lane t
/// in one column, or if `TWO` those of two vectors in columns `2 j` and `2 j + 1`, and zeros in all others. The second
/// tile's products are of the second vector.
///
/// # Safety
///
/// The whole warp is here.
#[inline(always)]
unsafe fn multiply_run<const TWO: bool>([first, second]: &[[u32; 4]; 2], x: [[u32; 4]; MXFP4_RUN]) -> [f32; 2] {
    // Column 2 j is group j's, as is 2 j + 1 for another vector: a lane keeps one group of two rows.
    let (mut low, mut high) = ([0.0; 4], [0.0; 4]);
    let mut j = 0;
    while j < MXFP4_RUN {
        let b = x[j];
        let (a, c) = (mxfp4_pairs(first[j]), mxfp4_pairs(second[j]));
        let sum = if j < 2 { &mut low } else { &mut high };
        // SAFETY: the caller's promise.
        unsafe {
            *sum = mma::m16n8k16_f16([a[0], c[0], a[1], c[1]], [b[0], b[1]], *sum);
            *sum = mma::m16n8k16_f16([a[2], c[2], a[3], c[3]], [b[2], b[3]], *sum);
        }
        j += 1;
    }
    let second = if TWO { low[3] + high[3] } else { low[2] + high[2] };
    [low[0] + high[0], second]
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
    let n_used = chosen.len() as u32;
    let (launch, n_block_tiles) =
        (launch_gate_up(n_multiprocessors, n_used, d_ff), tiles_per_block(n_multiprocessors, n_used, d_ff));
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
            n_block_tiles,
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
