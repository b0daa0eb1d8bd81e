//! The second half of the experts.

use super::{
    CODE_UNIT, DEPTH, H_UNIT, RING_BYTES, ROWS, RUN, RUN_BYTES, RUN_SCALES, STAGE_BYTES, multiply_run, own_words,
    scale_of, scale_place, short_words,
};
use crate::format::{Format, GROUP, Mxfp4};
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, Shared, cp_async, dynamic_shared_array, grid, kernel, shared_array, thread, warp};

/// Warps of a block of `experts_token_down_mxfp4`: they share the pairs of slots evenly, and their registers leave no room for a
/// second block.
pub(super) const DOWN_WARPS: u32 = 12;
const DOWN_THREADS: u32 = DOWN_WARPS * WARP_SIZE;
/// The most steps of a warp in a row.
pub(super) const MAX_STEPS: u32 = 4;
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
/// The geometry [`experts_token_down_mxfp4`](fn@experts_token_down_mxfp4) is written for: a block for each multiprocessor, or
/// for each tile if those are fewer. Any number of blocks gives the same bits.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(n_multiprocessors: u32, d_model: u32) -> Launch {
    let n_tiles = d_model / ROWS;
    let blocks = if n_tiles < n_multiprocessors { n_tiles } else { n_multiprocessors };
    Launch { grid: [blocks, 1, 1], block: [WARP_SIZE, DOWN_WARPS, 1] }
}

/// The second half of a token's experts, of type MXFP4, weighted and added up.
///
/// - Math: `out[o] ← out[o] + Σₛ weights[s] · (downₑ[o] · h[s] + bias[e, o])`, `e = chosen[s]`.
/// - Shapes: `out`: `[d_model]`; `weight`: `[n_expert, d_model, d_ff]`, each expert in its planes; `bias`: `[n_expert,
///   d_model]`, or empty; `h`: `[n_used, d_ff / 2]`, as [`experts_token_gate_up_mxfp4`](fn@super::experts_token_gate_up_mxfp4) leaves it; `chosen`, `weights`:
///   `[n_used]`. As [`fits`](super::fits) says.
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
