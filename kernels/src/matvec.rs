//! Matrix times vector: one token against a weight matrix, as in decoding.

#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use crate::gelu;
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, Shared, kernel, shared_array, thread, warp};

/// Epilogue: `out = y`.
pub const STORE: u32 = 0;
/// Epilogue: `out = out + y`, the residual connection.
pub const ADD: u32 = 1;
/// Epilogue: `out = gelu(y)`, exact.
pub const GELU_ERF: u32 = 2;
/// Epilogue: `out = gelu(y)`, in the tanh form.
pub const GELU_TANH: u32 = 3;

/// The most threads of a block.
const THREADS: u32 = 256;
/// Elements of `x` in shared memory at a time; a longer one comes in parts.
const PART: u32 = 8192;
/// Floats from one group of `x` to the next in shared memory: 4 more than it has, so that 8 lanes which load 16 bytes each
/// of their own group meet in no bank.
pub(crate) const GROUP_STRIDE: u32 = GROUP + 4;
const SHARED_FLOATS: usize = (PART / GROUP * GROUP_STRIDE) as usize;

/// How many lanes work on one row: 8 when there are rows enough to fill the device, or too few groups for more; else 32.
#[inline(always)]
const fn lanes_per_row(n_in: u32, n_out: u32) -> u32 {
    if n_in <= 16 * GROUP || n_out >= 8192 { 8 } else { 32 }
}

/// The one geometry the kernels of this file are written for. `batch` is the format's `BATCH`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_in: u32, n_out: u32, batch: u32) -> Launch {
    let (warps, rows_per_warp) = match lanes_per_row(n_in, n_out) {
        8 => (8, 4 * batch),
        _ => (4, 1),
    };
    Launch { grid: [n_out.div_ceil(warps * rows_per_warp), 1, 1], block: [WARP_SIZE, warps, 1] }
}

macro_rules! kernels {
    ($($name:ident: $format:ident, $blocks_per_sm:literal;)+) => {
        $(
            #[doc = concat!("Multiplies a matrix of type ", stringify!($format), " with a vector.")]
            ///
            /// - Math: `y[o] = Σᵢ weight[o, i] · x[i] + bias[o]`, then the epilogue.
            /// - Shapes: `out`: `[n_out]`; `weight`: `[n_out, n_in]` in its format's planes; `x`: `[n_in]`, from a multiple of
            ///   16 bytes on; `bias`: `[n_out]`, or empty. `epilogue`: [`STORE`], [`ADD`], [`GELU_ERF`], [`GELU_TANH`].
            /// - Launch: [`launch`]`(n_in, n_out, BATCH)`. 8 lanes share `BATCH` rows, a group of 32 elements each at a
            ///   time, if rows abound; otherwise a warp has one row, and a lane `BATCH` groups at a time. Either way a
            ///   lane has a batch of loads under way while it uses the one before.
            /// - Shared memory: 36 KiB, up to 8192 elements of `x`; a barrier before and one after each such part.
            /// - Cost: memory bound, the bytes of `weight`.
            /// - Determinism: f32 sums in one order, that of the geometry; devices contract `a · b + c`.
            /// - Source: [`crate::format`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `n_in` is a multiple of the format's block.
            #[kernel(threads = THREADS, blocks_per_sm = $blocks_per_sm)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $name(
                out: Disjoint<f32>,
                weight: Global<u8>,
                x: Global<f32>,
                bias: Global<f32>,
                n_in: u32,
                n_out: u32,
                epilogue: u32,
            ) {
                // SAFETY: the launch contract is this kernel's own.
                unsafe { matvec::<format::$format, { format::$format::BATCH }>(out, weight, x, bias, n_in, n_out, epilogue) }
            }
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[$($name::ENTRY),+];

        /// Starts the kernel for `format`.
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
        pub unsafe fn run(
            format: WeightFormat,
            launcher: &dyn Launcher,
            out: DeviceSlice<f32>,
            weight: DeviceSlice<u8>,
            x: DeviceSlice<f32>,
            bias: DeviceSlice<f32>,
            n_in: u32,
            n_out: u32,
            epilogue: u32,
        ) -> Result<(), LaunchError> {
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        let launch = launch(n_in, n_out, format::$format::BATCH as u32);
                        $name::run(launcher, launch, out, weight, x, bias, n_in, n_out, epilogue)
                    })+
                }
            }
        }
    };
}

kernels! {
    matvec_f32: F32, 2;
    matvec_f16: F16, 2;
    matvec_bf16: Bf16, 2;
    matvec_q4_0: Q4_0, 2;
    matvec_q4_1: Q4_1, 2;
    matvec_q5_0: Q5_0, 2;
    matvec_q5_1: Q5_1, 2;
    matvec_q8_0: Q8_0, 2;
    matvec_q2_k: Q2K, 2;
    matvec_q3_k: Q3K, 2;
    matvec_q4_k: Q4K, 2;
    matvec_q5_k: Q5K, 2;
    matvec_q6_k: Q6K, 2;
    matvec_mxfp4: Mxfp4, 2;
}

/// `y` after the epilogue; `before` is what `out` holds, asked for only if needed.
#[inline(always)]
pub(crate) fn finish(epilogue: u32, y: f32, before: impl FnOnce() -> f32) -> f32 {
    match epilogue {
        ADD => before() + y,
        GELU_ERF => gelu::exact(y),
        GELU_TANH => gelu::tanh_form(y),
        _ => y,
    }
}

/// # Safety
///
/// As the kernels above; `BATCH` is the format's.
#[inline(always)]
unsafe fn matvec<F: Format, const BATCH: usize>(
    out: Disjoint<f32>,
    weight: Global<u8>,
    x: Global<f32>,
    bias: Global<f32>,
    n_in: u32,
    n_out: u32,
    epilogue: u32,
) {
    let place = Place { weight, planes: F::LAYOUT.planes(n_in as usize, n_out as usize), n_groups: n_in / GROUP };
    // SAFETY: the launch contract; the condition is the same for the whole grid.
    unsafe {
        if lanes_per_row(n_in, n_out) == 8 {
            rows::<F, 8, BATCH, 1>(out, &place, x, bias, n_out, epilogue);
        } else {
            rows::<F, 32, 1, BATCH>(out, &place, x, bias, n_out, epilogue);
        }
    }
}

/// `LANES` neighbouring lanes compute `ROWS` rows of `out`, `DEPTH` groups of each at a time.
///
/// # Safety
///
/// As the kernels above.
#[inline(always)]
unsafe fn rows<F: Format, const LANES: u32, const ROWS: usize, const DEPTH: usize>(
    out: Disjoint<f32>,
    place: &Place,
    x: Global<f32>,
    bias: Global<f32>,
    n_out: u32,
    epilogue: u32,
) {
    let (warp_idx, lane) =
        (thread::block_idx_x() * thread::block_dim_y() + thread::thread_idx_y(), thread::thread_idx_x());
    let (slots, slot, lane) = (WARP_SIZE / LANES, lane / LANES, lane % LANES);
    let mut row = [0; ROWS];
    let mut r = 0;
    while r < ROWS {
        // Neighbouring slots have neighbouring rows.
        row[r] = (warp_idx * ROWS as u32 + r as u32) * slots + slot;
        r += 1;
    }
    // Lanes past the last row repeat it, and write nothing.
    // SAFETY: the row exists; the caller asks for groups that do.
    let load = |r: usize, group: u32| unsafe { F::load(place, row[r].min(n_out - 1) as usize, group) };
    let load_batch = |first: u32, end: u32| {
        let mut batch = [[F::EMPTY; DEPTH]; ROWS];
        let mut d = 0;
        while d < DEPTH {
            let group = first + d as u32 * LANES;
            if group < end {
                let mut r = 0;
                while r < ROWS {
                    batch[r][d] = load(r, group);
                    r += 1;
                }
            }
            d += 1;
        }
        batch
    };

    let mut sums = [0.0; ROWS];
    let mut part = 0;
    while part < place.n_groups {
        let end = (part + PART / GROUP).min(place.n_groups);
        // Weights do not wait for x.
        let mut next = load_batch(part + lane, end);
        // SAFETY: the whole block runs this loop in step.
        let staged = unsafe {
            if part > 0 {
                thread::sync_threads();
            }
            stage(x, part * GROUP, end * GROUP)
        };

        let mut first = part + lane;
        while first < end {
            let batch = next;
            let after = first + DEPTH as u32 * LANES;
            next = load_batch(after, end);
            let mut d = 0;
            while d < DEPTH {
                let group = first + d as u32 * LANES;
                if group < end {
                    let mut raw = [F::EMPTY; ROWS];
                    let mut r = 0;
                    while r < ROWS {
                        raw[r] = batch[r][d];
                        r += 1;
                    }
                    // SAFETY: the group of x is staged.
                    unsafe { accumulate::<F, ROWS>(&mut sums, &raw, group, staged, (group - part) * GROUP_STRIDE) };
                }
                d += 1;
            }
            first = after;
        }
        part = end;
    }

    let mut r = 0;
    while r < ROWS {
        // SAFETY: whole warps are here.
        let y = unsafe { warp::sum_of::<LANES>(sums[r]) };
        if lane == r as u32 && row[r] < n_out {
            let o = row[r] as usize;
            let y = if bias.len() > 0 { y + bias[o] } else { y };
            // SAFETY: element o is this lane's alone.
            unsafe { out.write(o, finish(epilogue, y, || out.read(o))) };
        }
        r += 1;
    }
}

/// Brings elements `start..end` of `x` to shared memory, and waits for them.
///
/// # Safety
///
/// The whole block is here, and no longer reads the last part.
#[inline(always)]
unsafe fn stage(x: Global<f32>, start: u32, end: u32) -> Shared<f32> {
    let staged = shared_array!(matvec_x: [f32; SHARED_FLOATS]);
    let mut i = 4 * (thread::thread_idx_y() * WARP_SIZE + thread::thread_idx_x());
    while i < end - start {
        // SAFETY: inside, in whole 16 bytes since rows are whole groups; every thread writes its own.
        unsafe {
            let four = x.load16((start + i) as usize);
            staged.store16((i / GROUP * GROUP_STRIDE + i % GROUP) as usize, four);
        }
        i += 4 * thread::block_dim_y() * WARP_SIZE;
    }
    // SAFETY: the caller's promise.
    unsafe { thread::sync_threads() };
    staged
}

/// Adds to each row's sum its group `group` times the group of `x` at `at`.
///
/// # Safety
///
/// The group of x is staged.
#[inline(always)]
pub(crate) unsafe fn accumulate<F: Format, const ROWS: usize>(
    sums: &mut [f32; ROWS],
    raw: &[F::Raw; ROWS],
    group: u32,
    staged: Shared<f32>,
    at: u32,
) {
    // Σ (factor · q + offset) · x = factor · Σ q · x + offset · Σ x, over as many elements as share a scale.
    let (mut products, mut x_sum) = ([0.0; ROWS], 0.0);
    let mut i = 0;
    while i < 8 {
        // SAFETY: the caller's promise; groups and quads are at multiples of 16 bytes.
        let x = unsafe { staged.load16(at as usize + 4 * i) }.map(f32::from_bits);
        if F::HAS_OFFSET {
            x_sum += (x[0] + x[1]) + (x[2] + x[3]);
        }
        let last = if F::TWO_SCALES { i % 4 == 3 } else { i == 7 };
        let mut r = 0;
        while r < ROWS {
            let q = F::quad(&raw[r], i);
            products[r] += q[0] * x[0];
            products[r] += q[1] * x[1];
            products[r] += q[2] * x[2];
            products[r] += q[3] * x[3];
            if last {
                let [factor, offset] = F::scale(&raw[r], group, i / 4);
                sums[r] += products[r] * F::UNIT * factor;
                if F::HAS_OFFSET {
                    sums[r] += x_sum * offset;
                }
                products[r] = 0.0;
            }
            r += 1;
        }
        if last {
            x_sum = 0.0;
        }
        i += 1;
    }
}
