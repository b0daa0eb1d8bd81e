//! One token through experts of MXFP4 on tensor cores: the router's end and two kernels, at the speed of memory.
//!
//! Both kernels bring tiles of whole rows to shared memory, byte after byte as they lie in device memory, a ring of tiles
//! ahead; the warps of a block share each tile's length, so that a warp has the same activations for all tiles. Tiles are
//! small enough to be dealt out evenly to all multiprocessors, and there is one barrier for each.

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

/// Warps of a block.
const WARPS: u32 = 12;
const THREADS: u32 = WARPS * WARP_SIZE;

const RUN: u32 = MXFP4_RUN as u32;
/// Bytes of a row's run.
const RUN_BYTES: u32 = 16 * RUN;
/// Runs of `gate` and `up` that a warp multiplies of each tile.
const WARP_RUNS: u32 = 2;
/// The widest rows of `gate` and `up`.
pub const MAX_D_MODEL: u32 = WARPS * WARP_RUNS * RUN * GROUP;
/// The most activations of all slots together, their number rounded up to a power of two.
pub const MAX_ACTIVATIONS: u32 = COLUMNS * WARPS * RUN * GROUP;

/// Features of a tile of `gate` and `up`.
const FEATURES: u32 = 8;
/// Tiles of `gate` and `up` in the ring: one in use, two under way, 46 KiB of gpt-oss-20b.
const GATE_UP_STAGES: u32 = 3;
/// Eight rows of either.
const FEATURE_BYTES: u32 = FEATURES * MAX_D_MODEL / 2;
/// Their scales, from a multiple of 16 bytes on.
const FEATURE_SCALES: u32 = FEATURES * MAX_D_MODEL / GROUP + 16;
const GATE_UP_STAGE: u32 = 2 * (FEATURE_BYTES + FEATURE_SCALES);
const GATE_UP_SHARED: u32 = GATE_UP_STAGES * GATE_UP_STAGE;
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
/// Tiles of `down` in the ring: one in use, four under way, 46 KiB of gpt-oss-20b.
const DOWN_STAGES: u32 = 5;
/// Two rows of every slot.
const ROW_BYTES: u32 = ROWS * MAX_ACTIVATIONS / 2;
/// Their scales, each slot's from a multiple of 16 bytes on.
const ROW_SCALES: u32 = ROWS * MAX_ACTIVATIONS / GROUP + 32 * MAX_USED;
const DOWN_STAGE: u32 = ROW_BYTES + ROW_SCALES;
const DOWN_SHARED: u32 = DOWN_STAGES * DOWN_STAGE;
/// A lane off the diagonal.
const OUT_LANE: u32 = 1;
/// Activations are stored times 2⁹, far from the smallest f16: |h| is at most 56.
const H_UNIT: f32 = 512.0;
/// What codes of [`mxfp4_pairs`] are to be multiplied with.
const CODE_UNIT: f32 = 16384.0;
/// Two tiles' two sums of each thread: one tile's are written while the other's are read.
const SUMS: usize = 4 * THREADS as usize;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_token_gate_up_mxfp4::ENTRY, experts_token_down_mxfp4::ENTRY];

/// Whether the kernels of this file can run a layer of these widths.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn fits(n_expert: u32, n_used: u32, d_model: u32, d_ff: u32) -> bool {
    let slots = n_used.next_power_of_two();
    n_expert <= MAX_EXPERTS && n_used <= MAX_USED && d_model <= MAX_D_MODEL && slots * d_ff <= MAX_ACTIVATIONS
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
    let thread = warp_idx * WARP_SIZE + lane;
    let (block, n_blocks) = (thread::block_idx_x(), thread::grid_dim_x());
    let n_groups = d_model / GROUP;
    let planes = Mxfp4::LAYOUT.planes(d_model as usize, d_ff as usize);
    let tiles_per_slot = d_ff / FEATURES;
    let n_tiles = n_used * tiles_per_slot;
    // Tile i of this block: its slot, expert, and first feature.
    let tile_of = |i: u32| {
        let tile = block + i * n_blocks;
        let slot = tile / tiles_per_slot.max(1);
        // SAFETY: there are as many ids as slots.
        (slot, unsafe { routed.sorted.read(slot as usize) }, (tile - slot * tiles_per_slot) * FEATURES)
    };
    // Starts the copies of tile i, each thread's share: the eight rows of a matrix lie behind one another.
    let copy = |i: u32| {
        if block + i * n_blocks < n_tiles {
            let (_, expert, first) = tile_of(i);
            let base = expert as usize * planes.end;
            let rows = base + first as usize * (16 * n_groups) as usize;
            let scales = base + planes.scales + first as usize * n_groups as usize;
            let at = i % GATE_UP_STAGES * GATE_UP_STAGE;
            let is_up = thread >= THREADS / 2;
            let half = thread % (THREADS / 2);
            let scales_at = at + 2 * FEATURE_BYTES + if is_up { FEATURE_SCALES } else { 0 };
            // SAFETY: rows and scales exist; the stage was read by all before the last barrier.
            unsafe {
                copy_bytes(dynamic, at, gate, rows, FEATURES * 16 * n_groups, thread, THREADS);
                copy_bytes(dynamic, at + FEATURE_BYTES, up, rows, FEATURES * 16 * n_groups, thread, THREADS);
                let weight = if is_up { up } else { gate };
                copy_bytes(dynamic, scales_at, weight, scales, FEATURES * n_groups, half, THREADS / 2);
            }
        }
        cp_async::commit();
    };
    let mut i = 0;
    while i < GATE_UP_STAGES - 1 {
        copy(i);
        i += 1;
    }

    let normal = shared_array!(experts_token_x: [u32; X_WORDS]);
    let sums = shared_array!(experts_token_gate_up_sums: [f32; SUMS]);
    // SAFETY: the whole block is here.
    unsafe { routed.store_normal(normal) };
    // This one writes what the next kernel needs.
    if block == 0 && warp_idx == WARPS - 1 {
        // SAFETY: a whole warp is here; its elements are a lane's own.
        unsafe { routed.write(chosen, weights) };
    }
    let (g, t) = (lane / 4, lane % 4);
    // The biases of the next tile that this warp finishes, of `gate` in even lanes and of `up` in odd ones.
    let bias_of = |i: u32| {
        let bias = if t % 2 == 0 { gate_bias } else { up_bias };
        if block + i * n_blocks < n_tiles && bias.len() > 0 {
            let (_, expert, first) = tile_of(i);
            bias[expert as usize * d_ff as usize + (first + g) as usize]
        } else {
            0.0
        }
    };
    let mut bias = bias_of(warp_idx);

    let mut i = 0;
    while block + i * n_blocks < n_tiles {
        // SAFETY: the whole block runs this loop in step.
        unsafe {
            cp_async::wait::<{ GATE_UP_STAGES - 2 }>();
            thread::sync_threads();
        }
        copy(i + GATE_UP_STAGES - 1);
        if i > 0 && (i - 1) % WARPS == warp_idx {
            let (slot, _, first) = tile_of(i - 1);
            // SAFETY: the sums of the tile before are there, and a whole warp is here.
            unsafe { finish_features(h, sums, (i - 1) % 2, bias, slot * d_ff + first) };
            bias = bias_of(i - 1 + WARPS);
        }
        let at = i % GATE_UP_STAGES * GATE_UP_STAGE;
        let (_, _, first) = tile_of(i);
        let shift = (planes.scales as u32 + first * n_groups) % 16;
        let scales_at = at + 2 * FEATURE_BYTES + shift + g * n_groups;
        let rows_at = at + g * 16 * n_groups;
        let mut sum = [0.0; 2];
        let mut k = 0;
        while k < WARP_RUNS {
            let run = warp_idx * WARP_RUNS + k;
            // SAFETY: the tile has landed, x is there, and whole warps are here.
            unsafe {
                let words = [
                    run_words(dynamic, rows_at, n_groups, run),
                    run_words(dynamic, rows_at + FEATURE_BYTES, n_groups, run),
                ];
                // Past the last group weights are 0, and so is x.
                let group = (run * RUN + t).min(n_groups - 1);
                let scales = [
                    dynamic.read((scales_at + group) as usize),
                    dynamic.read((scales_at + FEATURE_SCALES + group) as usize),
                ];
                let x = normal.load16(((run * RUN + g / 2) * 16 + 4 * t) as usize);
                add_run(&mut sum, &words, scales, x, g);
            }
            k += 1;
        }
        // SAFETY: whole warps are here; each thread writes its own element, which nobody reads before the next barrier.
        unsafe {
            let (gate, up) = (warp::sum_of::<4>(sum[0]), warp::sum_of::<4>(sum[1]));
            sums.write((i % 2 * 2 * THREADS + thread) as usize, if t % 2 == 0 { gate } else { up });
        }
        i += 1;
    }
    // SAFETY: the whole block is here.
    unsafe { thread::sync_threads() };
    if i > 0 && (i - 1) % WARPS == warp_idx {
        let (slot, _, first) = tile_of(i - 1);
        // SAFETY: as above.
        unsafe { finish_features(h, sums, (i - 1) % 2, bias, slot * d_ff + first) };
    }
}

/// Adds what the warps have of eight features, and writes their activations, from element `first` of `h` on.
///
/// # Safety
///
/// A whole warp is here, and the sums of tile parity `buffer`; the elements are this warp's alone.
#[inline(always)]
unsafe fn finish_features(h: Disjoint<u32>, sums: Shared<f32>, buffer: u32, bias: f32, first: u32) {
    let lane = warp::lane_id();
    let mut total = bias;
    let mut w = 0;
    while w < WARPS {
        // SAFETY: the caller's promise.
        total += unsafe { sums.read((buffer * 2 * THREADS + w * WARP_SIZE + lane) as usize) };
        w += 1;
    }
    // SAFETY: the whole warp is here.
    unsafe {
        let up = warp::shuffle_xor(total, 1);
        let value = swiglu::activation(total, up) * H_UNIT;
        // Features f and f + 1 in a word, as B fragments have them.
        let next = warp::shuffle_xor(value, 4);
        if lane.is_multiple_of(8) {
            let word = first / GROUP * 16 + 4 * (lane / 8) + first % GROUP / 8;
            h.write(word as usize, pack_f16x2(value, next));
        }
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
    let planes = Mxfp4::LAYOUT.planes(d_ff as usize, d_model as usize);

    let dynamic = dynamic_shared_array!(experts_token_down_ring: [u8; DOWN_SHARED as usize]);
    let sums = shared_array!(experts_token_down_sums: [f32; SUMS]);
    let thread = warp_idx * WARP_SIZE + lane;
    let (block, n_blocks) = (thread::block_idx_x(), thread::grid_dim_x());
    let n_tiles = d_model / ROWS;
    // Bytes of a slot in a stage, and of its scales.
    let slot_bytes = ROWS * 16 * n_groups;
    let scale_bytes = (ROWS * n_groups + 31) & !15;

    // SAFETY: once, by all threads.
    unsafe { grid::wait() };
    // Equally many threads bring each slot.
    let bringers = THREADS >> slots.trailing_zeros();
    let brought = thread / bringers.max(1);
    let bring_base = if brought < n_used { chosen[brought as usize] as usize * planes.end } else { 0 };
    let copy = |i: u32| {
        let o = (block + i * n_blocks) * ROWS;
        if o < d_model && brought < n_used {
            let at = i % DOWN_STAGES * DOWN_STAGE;
            let scales_at = at + ROW_BYTES + brought * scale_bytes;
            let own = thread - brought * bringers;
            let from = bring_base + o as usize * (16 * n_groups) as usize;
            let scales = bring_base + planes.scales + o as usize * n_groups as usize;
            // SAFETY: rows and scales exist; the stage was read by all before the last barrier.
            unsafe {
                copy_bytes(dynamic, at + brought * slot_bytes, weight, from, slot_bytes, own, bringers);
                copy_bytes(dynamic, scales_at, weight, scales, ROWS * n_groups, own, bringers);
            }
        }
        cp_async::commit();
    };
    let mut i = 0;
    while i < DOWN_STAGES - 1 {
        copy(i);
        i += 1;
    }

    let expert = chosen[slot as usize];
    let slot_weight = if used { weights[slot as usize] } else { 0.0 };
    // This warp's run of the lane's part, of which the activations are the same for all rows.
    let run = part * steps + warp_idx;
    let here = used && warp_idx < steps && run < n_runs;
    let mut x = [[0; 4]; MXFP4_RUN];
    let mut j = 0;
    while j < MXFP4_RUN {
        let group = run * RUN + j as u32;
        if here && group < n_groups {
            // SAFETY: the group exists; groups are 64 bytes, from multiples of as much on.
            x[j] = unsafe { h.load16((slot * (d_ff / 2) + group * 16 + 4 * t) as usize) };
        }
        j += 1;
    }
    // What is added to the next tile that this warp finishes: biases in lanes on the diagonal, `out` itself in two others.
    let mine = used && t == g / 2;
    let offsets_of = |i: u32| {
        let o = (block + i * n_blocks) * ROWS;
        let mut offsets = [0.0; 2];
        if o < d_model {
            if mine && part == 0 && bias.len() > 0 {
                let row = expert as usize * d_model as usize + o as usize;
                offsets = [bias[row], bias[row + 1]];
            } else if lane == OUT_LANE {
                offsets = [out.read(o as usize), out.read(o as usize + 1)];
            }
        }
        offsets
    };
    let mut offsets = offsets_of(warp_idx);
    let finish = |i: u32, offsets: [f32; 2]| {
        let mut total = [0.0; 2];
        let mut w = 0;
        while w < WARPS {
            let at = i % 2 * 2 * THREADS + w * WARP_SIZE + lane;
            // SAFETY: the sums of the tile are there.
            unsafe {
                total[0] += sums.read(at as usize);
                total[1] += sums.read((at + THREADS) as usize);
            }
            w += 1;
        }
        // A product is on the diagonal: that of row g and column g, or of row g + 8 and column g. Codes count 2⁻¹⁴ times
        // their values, activations 2⁹ times.
        let scaled = |r: usize| {
            if mine { slot_weight * (total[r] * (CODE_UNIT / H_UNIT) + offsets[r]) } else { offsets[r] }
        };
        // SAFETY: the whole warp is here.
        let (first, second) = unsafe { (warp::sum(scaled(0)), warp::sum(scaled(1))) };
        if lane < ROWS {
            let o = (block + i * n_blocks) * ROWS + lane;
            // SAFETY: the element is this lane's alone.
            unsafe { out.write(o as usize, if lane == 0 { first } else { second }) };
        }
    };

    let mut i = 0;
    while block + i * n_blocks < n_tiles {
        // SAFETY: the whole block runs this loop in step.
        unsafe {
            cp_async::wait::<{ DOWN_STAGES - 2 }>();
            thread::sync_threads();
        }
        copy(i + DOWN_STAGES - 1);
        if i > 0 && (i - 1) % WARPS == warp_idx {
            finish(i - 1, offsets);
            offsets = offsets_of(i - 1 + WARPS);
        }
        let o = (block + i * n_blocks) * ROWS;
        let at = i % DOWN_STAGES * DOWN_STAGE;
        let shift = (planes.scales as u32 + o * n_groups) % 16;
        let scales_at = at + ROW_BYTES + slot * scale_bytes + shift;
        let rows_at = at + slot * slot_bytes;
        let mut sum = [0.0; 2];
        let mut words = [[0; 4]; 2];
        if here {
            // SAFETY: the tile has landed.
            words = unsafe {
                [run_words(dynamic, rows_at, n_groups, run), run_words(dynamic, rows_at + 16 * n_groups, n_groups, run)]
            };
        }
        let mut j = 0;
        while j < MXFP4_RUN {
            // Weights and activations that are not there are 0.
            let group = if here { (run * RUN + j as u32).min(n_groups - 1) } else { 0 };
            // SAFETY: as above, and whole warps are here.
            unsafe {
                let (upper, lower) = (mxfp4_pairs(words[0][j]), mxfp4_pairs(words[1][j]));
                let c = mma::m16n8k16_f16([upper[0], lower[0], upper[1], lower[1]], [x[j][0], x[j][1]], [0.0; 4]);
                let c = mma::m16n8k16_f16([upper[2], lower[2], upper[3], lower[3]], [x[j][2], x[j][3]], c);
                let c = if g % 2 == 0 { [c[0], c[2]] } else { [c[1], c[3]] };
                sum[0] += scale_of(dynamic.read((scales_at + group) as usize)) * c[0];
                sum[1] += scale_of(dynamic.read((scales_at + n_groups + group) as usize)) * c[1];
            }
            j += 1;
        }
        // SAFETY: each thread writes its own elements, which nobody reads before the next barrier.
        unsafe {
            let at = i % 2 * 2 * THREADS + thread;
            sums.write(at as usize, sum[0]);
            sums.write((at + THREADS) as usize, sum[1]);
        }
        i += 1;
    }
    // SAFETY: the whole block is here.
    unsafe { thread::sync_threads() };
    if i > 0 && (i - 1) % WARPS == warp_idx {
        finish(i - 1, offsets);
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

/// The words of lane t of run `run` of a row that starts at byte `at`; 0 for groups that it has not.
///
/// # Safety
///
/// The row is there.
#[inline(always)]
unsafe fn run_words(shared: Shared<u8>, at: u32, n_groups: u32, run: u32) -> [u32; 4] {
    let (t, first) = (warp::lane_id() % 4, run * RUN);
    // SAFETY: the caller's promise; rows start at multiples of 16 bytes.
    unsafe {
        if first + RUN <= n_groups {
            return shared.load16((at + run * RUN_BYTES + 16 * t) as usize);
        }
        let mut words = [0; 4];
        let left = n_groups.max(first) - first;
        let mut j = 0;
        while j < MXFP4_RUN {
            if (j as u32) < left {
                words[j] = shared.load4((at + run * RUN_BYTES + 4 * t * left) as usize + 4 * j);
            }
            j += 1;
        }
        words
    }
}

/// Starts copying `bytes` bytes from `start` on, of any alignment, to byte `at` and further by as much as `start` is beyond
/// a multiple of 16: this thread's share, 16 bytes of each `16 · threads`.
///
/// # Safety
///
/// The bytes exist, and those around them to multiples of 16; the room is free.
#[inline(always)]
unsafe fn copy_bytes(
    into: Shared<u8>,
    at: u32,
    weight: Global<u8>,
    start: usize,
    bytes: u32,
    thread: u32,
    threads: u32,
) {
    let before = start as u32 % 16;
    let mut i = 16 * thread;
    while i < before + bytes {
        // SAFETY: the caller's promise.
        unsafe { into.copy_async((at + i) as usize, weight, start - before as usize + i as usize, true) };
        i += 16 * threads;
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
