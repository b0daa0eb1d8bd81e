//! The end of the router, and the first half of the experts.

use super::routed::{Routed, X_WORDS, ZERO_WORDS};
use super::{
    CODE_UNIT, DEPTH, H_UNIT, ROWS, RUN, RUN_BYTES, RUN_SCALES, STAGE_BYTES, multiply_run, own_words, scale_of,
    short_words,
};
use crate::format::{Format, GROUP, Mxfp4};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Launch, LaunchError, Launcher};
use cuda_std::{
    Disjoint, Global, cp_async, dynamic_shared_array, grid, kernel, pack_f16x2, shared_array, thread, warp,
};

/// Warps of a block of `experts_token_gate_up_mxfp4`: four for each scheduler, whose registers leave no room for a second
/// block.
pub(super) const GATE_UP_WARPS: u32 = 16;
pub(super) const GATE_UP_THREADS: u32 = GATE_UP_WARPS * WARP_SIZE;
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
///   `[n_expert]`, or empty. As [`fits`](super::fits) says; n_used at most n_expert, n_parts at least 1.
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
