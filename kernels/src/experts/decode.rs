//! One token through its experts, as in decoding.

use super::{bias_of, place};
#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP};
use crate::matvec::{GROUP_STRIDE, accumulate};
use crate::swiglu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, Shared, kernel, shared_array, thread, warp};

/// Warps of a block of `experts_gate_up_*`, and neighbouring lanes that share a row.
const GATE_UP_WARPS: u32 = 4;
const GATE_UP_LANES: u32 = 8;
/// Warps of a block of `experts_down_*`, and neighbouring lanes that share a row.
const DOWN_WARPS: u32 = 8;
const DOWN_LANES: u32 = 16;
const ROWS_PER_DOWN_BLOCK: u32 = DOWN_WARPS * (WARP_SIZE / DOWN_LANES);

/// Groups of activations in shared memory at a time; what is longer comes in parts.
const SHARED_GROUPS: u32 = 128;
const SHARED_FLOATS: usize = (SHARED_GROUPS * GROUP_STRIDE) as usize;
/// Quads of activations that a thread loads before it stores the first.
const STAGE_AHEAD: usize = 4;

/// Features that a lane computes together, each of a row of `gate` and one of `up`, given the format's `BATCH`.
const fn features(batch: usize) -> usize {
    if batch < 2 { 1 } else { batch / 2 }
}

/// The one geometry `experts_gate_up_*` is written for. `batch` is the format's `BATCH`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_gate_up(d_ff: u32, n_used: u32, batch: u32) -> Launch {
    let per_block = GATE_UP_WARPS * (WARP_SIZE / GATE_UP_LANES) * features(batch as usize) as u32;
    Launch { grid: [d_ff.div_ceil(per_block), n_used, 1], block: [WARP_SIZE, GATE_UP_WARPS, 1] }
}

/// The one geometry `experts_down_*` is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_down(d_model: u32) -> Launch {
    Launch { grid: [d_model.div_ceil(ROWS_PER_DOWN_BLOCK), 1, 1], block: [WARP_SIZE, DOWN_WARPS, 1] }
}

macro_rules! kernels {
    ($($gate_up:ident, $down:ident: $format:ident, $gate_up_blocks:literal, $down_blocks:literal;)+) => {
        $(
            #[doc = concat!("The first half of a token's experts, of type ", stringify!($format), ", with the gated unit.")]
            ///
            /// - Math: for each slot s, `e = ids[s]`: `h[s, f] = swiglu(gateₑ[f] · x + gate_bias[e, f],
            ///   upₑ[f] · x + up_bias[e, f])`, swiglu being [`swiglu::activation`].
            /// - Shapes: `h`: `[n_used, d_ff]`; `gate`, `up`: `[n_expert, d_ff, d_model]`, each expert in its format's planes;
            ///   `gate_bias`, `up_bias`: `[n_expert, d_ff]`, or empty; `x`: `[d_model]`, from a multiple of 16 bytes on;
            ///   `ids`: `[n_used]`, each below n_expert.
            /// - Launch: [`launch_gate_up`]`(d_ff, n_used, BATCH)`. Eight lanes share `BATCH` rows, half of them of `gate`
            ///   and half of `up`, a group of 32 elements each at a time, one batch of loads ahead.
            /// - Shared memory: 18 KiB, up to 4096 elements of `x`; a barrier before and one after each such part.
            /// - Cost: memory bound, the bytes of `n_used` experts' `gate` and `up`.
            /// - Determinism: f32 sums in one fixed order; devices contract `a · b + c`.
            /// - Source: [`crate::format`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `d_model` is a multiple of the format's block.
            #[kernel(threads = WARP_SIZE * GATE_UP_WARPS, blocks_per_sm = $gate_up_blocks)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $gate_up(
                h: Disjoint<f32>,
                gate: Global<u8>,
                up: Global<u8>,
                gate_bias: Global<f32>,
                up_bias: Global<f32>,
                x: Global<f32>,
                ids: Global<u32>,
                d_model: u32,
                d_ff: u32,
            ) {
                const FEATURES: usize = features(format::$format::BATCH);
                let biases = [gate_bias, up_bias];
                // SAFETY: the launch contract is this kernel's own.
                unsafe {
                    gate_up::<format::$format, FEATURES, { 2 * FEATURES }>(h, gate, up, biases, x, ids, d_model, d_ff);
                }
            }

            #[doc = concat!("The second half of a token's experts, of type ", stringify!($format), ", weighted and added up.")]
            ///
            /// - Math: `out[o] ← out[o] + Σₛ weights[s] · (downₑ[o] · h[s] + bias[e, o])`, `e = ids[s]`.
            /// - Shapes: `out`: `[d_model]`; `weight`: `[n_expert, d_model, d_ff]`, each expert in its format's planes; `bias`:
            ///   `[n_expert, d_model]`, or empty; `h`: `[n_used, d_ff]`, from a multiple of 16 bytes on; `ids`, `weights`:
            ///   `[n_used]`, ids below n_expert.
            /// - Launch: [`launch_down`]`(d_model)`. Sixteen lanes share a row of `BATCH` slots, a group of 32 elements each
            ///   at a time, one batch of loads ahead.
            /// - Shared memory: 18 KiB, up to 4096 elements of `h`; a barrier before and one after each such part.
            /// - Cost: memory bound, the bytes of `n_used` experts' `down`.
            /// - Determinism: f32 sums in one fixed order, slots in rising order; devices contract `a · b + c`.
            /// - Source: [`crate::format`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `d_ff` is a multiple of the format's block.
            #[kernel(threads = WARP_SIZE * DOWN_WARPS, blocks_per_sm = $down_blocks)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $down(
                out: Disjoint<f32>,
                weight: Global<u8>,
                bias: Global<f32>,
                h: Global<f32>,
                ids: Global<u32>,
                weights: Global<f32>,
                d_ff: u32,
                d_model: u32,
            ) {
                // SAFETY: the launch contract is this kernel's own.
                unsafe {
                    down::<format::$format, { format::$format::BATCH }>(out, weight, bias, h, ids, weights, d_ff, d_model);
                }
            }
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[$($gate_up::ENTRY, $down::ENTRY),+];

        /// Starts `experts_gate_up_*` for `format`.
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
            format: WeightFormat,
            launcher: &dyn Launcher,
            h: DeviceSlice<f32>,
            gate: DeviceSlice<u8>,
            up: DeviceSlice<u8>,
            gate_bias: DeviceSlice<f32>,
            up_bias: DeviceSlice<f32>,
            x: DeviceSlice<f32>,
            ids: DeviceSlice<u32>,
            d_model: u32,
            d_ff: u32,
        ) -> Result<(), LaunchError> {
            let n_used = ids.len() as u32;
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        let launch = launch_gate_up(d_ff, n_used, format::$format::BATCH as u32);
                        $gate_up::run(launcher, launch, h, gate, up, gate_bias, up_bias, x, ids, d_model, d_ff)
                    })+
                }
            }
        }

        /// Starts `experts_down_*` for `format`.
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
            format: WeightFormat,
            launcher: &dyn Launcher,
            out: DeviceSlice<f32>,
            weight: DeviceSlice<u8>,
            bias: DeviceSlice<f32>,
            h: DeviceSlice<f32>,
            ids: DeviceSlice<u32>,
            weights: DeviceSlice<f32>,
            d_ff: u32,
            d_model: u32,
        ) -> Result<(), LaunchError> {
            let launch = launch_down(d_model);
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        $down::run(launcher, launch, out, weight, bias, h, ids, weights, d_ff, d_model)
                    })+
                }
            }
        }
    };
}

kernels! {
    experts_gate_up_f32, experts_down_f32: F32, 2, 1;
    experts_gate_up_f16, experts_down_f16: F16, 4, 2;
    experts_gate_up_bf16, experts_down_bf16: Bf16, 4, 2;
    experts_gate_up_q4_0, experts_down_q4_0: Q4_0, 4, 2;
    experts_gate_up_q4_1, experts_down_q4_1: Q4_1, 4, 2;
    experts_gate_up_q5_0, experts_down_q5_0: Q5_0, 4, 2;
    experts_gate_up_q5_1, experts_down_q5_1: Q5_1, 4, 2;
    experts_gate_up_q8_0, experts_down_q8_0: Q8_0, 4, 2;
    experts_gate_up_q2_k, experts_down_q2_k: Q2K, 4, 1;
    experts_gate_up_q3_k, experts_down_q3_k: Q3K, 4, 2;
    experts_gate_up_q4_k, experts_down_q4_k: Q4K, 4, 1;
    experts_gate_up_q5_k, experts_down_q5_k: Q5K, 4, 2;
    experts_gate_up_q6_k, experts_down_q6_k: Q6K, 4, 2;
    experts_gate_up_mxfp4, experts_down_mxfp4: Mxfp4, 4, 2;
}

/// # Safety
///
/// As the kernels above; `ROWS` is twice `FEATURES`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' own")]
unsafe fn gate_up<F: Format, const FEATURES: usize, const ROWS: usize>(
    h: Disjoint<f32>,
    gate: Global<u8>,
    up: Global<u8>,
    [gate_bias, up_bias]: [Global<f32>; 2],
    x: Global<f32>,
    ids: Global<u32>,
    d_model: u32,
    d_ff: u32,
) {
    let lane = thread::thread_idx_x();
    let slot = thread::block_idx_y();
    let expert = ids[slot as usize];
    // SAFETY: the expert exists.
    let matrices = unsafe { [place::<F>(gate, expert, d_model, d_ff), place::<F>(up, expert, d_model, d_ff)] };
    let rows_per_warp = WARP_SIZE / GATE_UP_LANES;
    let warp_idx = thread::block_idx_x() * GATE_UP_WARPS + thread::thread_idx_y();
    let feature = |i: usize| (warp_idx * FEATURES as u32 + i as u32) * rows_per_warp + lane / GATE_UP_LANES;

    // Rows past the last repeat it, and write nothing.
    // SAFETY: the row exists, and the caller asks for groups that do.
    let load = |r: usize, group| unsafe { F::load(&matrices[r % 2], feature(r / 2).min(d_ff - 1) as usize, group) };
    // SAFETY: the whole block is here; `x` has whole groups.
    let sums = unsafe { products::<F, GATE_UP_LANES, ROWS, 1>(load, x, [0], d_model / GROUP, false) };
    let mut i = 0;
    while i < FEATURES {
        // SAFETY: whole warps are here.
        let (gate, up) =
            unsafe { (warp::sum_of::<GATE_UP_LANES>(sums[2 * i]), warp::sum_of::<GATE_UP_LANES>(sums[2 * i + 1])) };
        let f = feature(i);
        if lane % GATE_UP_LANES == i as u32 && f < d_ff {
            let gate = gate + bias_of(gate_bias, expert, d_ff, f);
            let up = up + bias_of(up_bias, expert, d_ff, f);
            // SAFETY: element (slot, f) is this lane's alone.
            unsafe { h.write((slot * d_ff + f) as usize, swiglu::activation(gate, up)) };
        }
        i += 1;
    }
}

/// # Safety
///
/// As the kernels above; `BATCH` is the format's.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' own")]
unsafe fn down<F: Format, const BATCH: usize>(
    out: Disjoint<f32>,
    weight: Global<u8>,
    bias: Global<f32>,
    h: Global<f32>,
    ids: Global<u32>,
    weights: Global<f32>,
    d_ff: u32,
    d_model: u32,
) {
    let lane = thread::thread_idx_x();
    let warp_idx = thread::block_idx_x() * DOWN_WARPS + thread::thread_idx_y();
    let o = warp_idx * (WARP_SIZE / DOWN_LANES) + lane / DOWN_LANES;
    // A row past the last repeats it, and so do slots; neither counts.
    let row = o.min(d_model - 1);
    let n_used = ids.len() as u32;

    let mut total = 0.0;
    let mut first = 0;
    while first < n_used {
        let slots: [u32; BATCH] = core::array::from_fn(|r| (first + r as u32).min(n_used - 1));
        let experts = slots.map(|slot| ids[slot as usize]);
        // SAFETY: the experts exist.
        let matrices = experts.map(|expert| unsafe { place::<F>(weight, expert, d_ff, d_model) });
        // SAFETY: the row exists, and the caller asks for groups that do.
        let load = |r: usize, group| unsafe { F::load(&matrices[r], row as usize, group) };
        // SAFETY: the whole block is here, `n_used` being the same for it; rows of `h` are whole groups.
        let sums = unsafe { products::<F, DOWN_LANES, BATCH, BATCH>(load, h, slots, d_ff / GROUP, first > 0) };
        let mut r = 0;
        while r < BATCH {
            // SAFETY: whole warps are here.
            let y = unsafe { warp::sum_of::<DOWN_LANES>(sums[r]) };
            if first + (r as u32) < n_used {
                total += weights[slots[r] as usize] * (y + bias_of(bias, experts[r], d_model, row));
            }
            r += 1;
        }
        first += BATCH as u32;
    }
    if lane.is_multiple_of(DOWN_LANES) && o < d_model {
        // SAFETY: element o is this lane's alone.
        unsafe { out.write(o as usize, out.read(o as usize) + total) };
    }
}

/// This lane's part of the products of `ROWS` rows, whose groups `load` brings, with vectors: row r of the weights with row
/// `vectors[r]` of `x`, or all with `vectors[0]` if `VECTORS` is 1. `LANES` neighbours take every `LANES`th group each.
///
/// # Safety
///
/// The whole block is here; if it still reads what an earlier call staged, `wait` is true. `VECTORS` is 1 or `ROWS`; rows
/// of `x` are `n_groups` groups, from multiples of 16 bytes on.
#[inline(always)]
unsafe fn products<F: Format, const LANES: u32, const ROWS: usize, const VECTORS: usize>(
    load: impl Fn(usize, u32) -> F::Raw,
    x: Global<f32>,
    vectors: [u32; VECTORS],
    n_groups: u32,
    wait: bool,
) -> [f32; ROWS] {
    let part_groups = SHARED_GROUPS / VECTORS as u32;
    // Then a lane's next group is `LANES` further, also in the next part.
    const { assert!((SHARED_GROUPS / VECTORS as u32).is_multiple_of(LANES)) };
    let load_batch = |group: u32| {
        let mut batch = [F::EMPTY; ROWS];
        if group < n_groups {
            let mut r = 0;
            while r < ROWS {
                batch[r] = load(r, group);
                r += 1;
            }
        }
        batch
    };

    let staged = shared_array!(experts_x: [f32; SHARED_FLOATS]);
    let mut sums = [0.0; ROWS];
    let mut group = thread::thread_idx_x() % LANES;
    // Weights do not wait for activations.
    let mut next = load_batch(group);
    let mut part = 0;
    while part < n_groups {
        let end = (part + part_groups).min(n_groups);
        // SAFETY: the whole block runs this loop in step.
        unsafe {
            if wait || part > 0 {
                thread::sync_threads();
            }
            stage(staged, part_groups, x, vectors, n_groups, part, end);
            thread::sync_threads();
        }
        while group < end {
            let batch = next;
            next = load_batch(group + LANES);
            let at = (group - part) * GROUP_STRIDE;
            // SAFETY: the groups are staged.
            unsafe {
                if VECTORS == 1 {
                    accumulate::<F, ROWS>(&mut sums, &batch, group, staged, at);
                } else {
                    let mut r = 0;
                    while r < ROWS {
                        let mut sum = [sums[r]];
                        let at = at + r as u32 * part_groups * GROUP_STRIDE;
                        accumulate::<F, 1>(&mut sum, &[batch[r]], group, staged, at);
                        sums[r] = sum[0];
                        r += 1;
                    }
                }
            }
            group += LANES;
        }
        part = end;
    }
    sums
}

/// Brings groups `start..end` of rows `vectors` of `x`, of `n_groups` groups each, to `staged`: row v from group
/// `v · part_groups` on.
///
/// # Safety
///
/// The whole block is here, and nobody reads `staged`.
#[inline(always)]
unsafe fn stage<const VECTORS: usize>(
    staged: Shared<f32>,
    part_groups: u32,
    x: Global<f32>,
    vectors: [u32; VECTORS],
    n_groups: u32,
    start: u32,
    end: u32,
) {
    let threads = thread::block_dim_y() * WARP_SIZE;
    let quads_per_vector = part_groups * (GROUP / 4);
    let mut first = thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x();
    while first < VECTORS as u32 * quads_per_vector {
        // Several loads are under way before the first is stored; one by one, each would wait for the one before.
        let mut ahead = [[0; 4]; STAGE_AHEAD];
        let mut k = 0;
        while k < STAGE_AHEAD {
            let quad = first + k as u32 * threads;
            let (v, i) = (quad / quads_per_vector, 4 * (quad % quads_per_vector));
            if v < VECTORS as u32 && i < (end - start) * GROUP {
                let row = pick(vectors, v) as usize * (n_groups * GROUP) as usize;
                // SAFETY: inside, in whole 16 bytes since rows are whole groups.
                ahead[k] = unsafe { x.load16(row + (start * GROUP + i) as usize) };
            }
            k += 1;
        }
        let mut k = 0;
        while k < STAGE_AHEAD {
            let quad = first + k as u32 * threads;
            let (v, i) = (quad / quads_per_vector, 4 * (quad % quads_per_vector));
            if v < VECTORS as u32 && i < (end - start) * GROUP {
                let at = (v * part_groups + i / GROUP) * GROUP_STRIDE + i % GROUP;
                // SAFETY: inside; every thread writes its own.
                unsafe { staged.store16(at as usize, ahead[k]) };
            }
            k += 1;
        }
        first += STAGE_AHEAD as u32 * threads;
    }
}

/// `values[i]`, by comparisons: an index known at run time only would put the array in memory.
#[inline(always)]
fn pick<const N: usize>(values: [u32; N], i: u32) -> u32 {
    let mut value = values[0];
    let mut j = 1;
    while j < N {
        value = if j as u32 == i { values[j] } else { value };
        j += 1;
    }
    value
}
