//! Matrix times vector: one token against a weight matrix, as in decoding, with the norm before it and what follows it.
//!
//! A block has a run of rows, and its threads walk the run's groups of 32 elements as one sequence: thread t has groups
//! `t, t + n_threads, …`, so that all have the same number whatever the width, and neighbours load neighbouring bytes. Each
//! leaves the product of a group with its part of `x` in a ring in shared memory; when the ring is full, or the run ends,
//! eight threads a row sum the rows that are complete. Weights are loaded [`Format`]-wise into registers a few groups
//! ahead, and the first before the grid waits for the one that makes `x`.

#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use crate::{block, gelu};
use cuda_std::warp::{self, WARP_SIZE};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Float, Global, Shared, grid, kernel, shared_array, thread};

/// Epilogue: `out = y`.
pub const STORE: u32 = 0;
/// Epilogue: `out = out + y`, the residual connection.
pub const ADD: u32 = 1;
/// Epilogue: `out = gelu(y)`, exact.
pub const GELU_ERF: u32 = 2;
/// Epilogue: `out = gelu(y)`, in the tanh form.
pub const GELU_TANH: u32 = 3;

/// The most threads of a block.
const THREADS: u32 = 384;
/// Blocks: the SMs of an H100, so that the next kernel, too, finds room on each.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS: u32 = 132;
/// Blocks for so many rows that this kernel's own time is all that counts: two on each SM.
#[cfg(not(target_arch = "nvptx64"))]
const MANY_BLOCKS: u32 = 264;
/// How many rows are so many.
#[cfg(not(target_arch = "nvptx64"))]
const MANY_ROWS: u32 = 8192;
/// Elements of `x` in shared memory at a time; a longer one comes in parts.
pub const PART: u32 = 6400;
/// Floats from one group of `x` to the next in shared memory: 4 more than it has, so that 8 lanes which load 16 bytes each
/// of their own group meet in no bank.
pub(crate) const GROUP_STRIDE: u32 = GROUP + 4;
/// Floats of the ring: a power of two.
const RING: u32 = 4096;
/// The ring, then `x`.
const SHARED_FLOATS: usize = (RING + PART / GROUP * GROUP_STRIDE) as usize;
/// The same, then what a router needs.
const ROUTER_FLOATS: u32 = 12_288;
const ROUTER_LEN: usize = ROUTER_FLOATS as usize;
const SUMS: usize = THREADS as usize;
/// Threads that sum a row of the ring.
const LANES: u32 = 8;
/// The most experts that a router may have.
pub const MAX_EXPERTS: u32 = 128;

/// How many rows of a matrix a block has: an equal share, but enough for 64 threads to have a group.
#[cfg(not(target_arch = "nvptx64"))]
const fn rows_per_block(n_in: u32, n_out: u32) -> u32 {
    let blocks = if n_out < MANY_ROWS { BLOCKS } else { MANY_BLOCKS };
    let (share, least) = (n_out.div_ceil(blocks), 64_u32.div_ceil(n_in / GROUP));
    if share > least { share } else { least }
}

/// The one geometry the kernels of this file are written for, of which `n_rows` must be the rows of a block.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_in: u32, n_out: u32) -> Launch {
    let n_groups = rows_per_block(n_in, n_out) * (n_in / GROUP);
    let threads = match n_groups {
        ..=128 => 128,
        ..=256 => 256,
        _ => THREADS,
    };
    Launch::linear(n_parts(n_in, n_out), threads)
}

/// The blocks of [`launch`], and so the rows of `parts`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn n_parts(n_in: u32, n_out: u32) -> u32 {
    n_out.div_ceil(rows_per_block(n_in, n_out))
}

/// Whether an input of `n_in` elements can be normalized on the way: it is in shared memory whole, and with it β.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn norm_fits(n_in: u32, has_beta: bool) -> bool {
    n_in <= PART && (!has_beta || n_in <= RING)
}

/// Whether a router of `n_expert` experts fits beside the matrix.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn router_fits(n_in: u32, n_out: u32, n_expert: u32) -> bool {
    let n_groups = if n_in < PART { n_in / GROUP } else { PART / GROUP };
    let x = n_groups * GROUP_STRIDE;
    n_expert <= MAX_EXPERTS && RING + x + router_floats(n_expert, rows_per_block(n_in, n_out)) <= ROUTER_FLOATS
}

/// Floats in shared memory that a router needs: its weights for the block's rows, and what the rows came to.
const fn router_floats(n_expert: u32, n_rows: u32) -> u32 {
    n_expert * n_rows + LANES * n_rows + THREADS
}

macro_rules! kernels {
    ($($name:ident, $router_name:ident: $format:ident, $rows:literal, $depth:literal, $ahead:literal;)+) => {
        $(
            #[doc = concat!("Multiplies a matrix of type ", stringify!($format), " with a vector, which it may normalize first.")]
            ///
            /// - Math: `y[o] = Σᵢ weight[o, i] · x̂[i] + bias[o]`, then the epilogue. `x̂` is `x`; or with `gamma`
            ///   `γ[i] · x[i] / √(mean(x²) + ε)`; or with `beta` too `γ[i] · (x[i] − μ) / √(σ² + ε) + β[i]`.
            /// - Shapes: `out`: `[n_out]`; `weight`: `[n_out, n_in]` in its format's planes; `x`, `gamma`, `beta`: `[n_in]`,
            ///   from multiples of 16 bytes on, `gamma` and `beta` or empty; `bias`: `[n_out]`, or empty. `epilogue`:
            ///   [`STORE`], [`ADD`], [`GELU_ERF`], [`GELU_TANH`].
            /// - Launch: [`launch`]`(n_in, n_out)`, `n_rows` rows a block. See the module.
            /// - Shared memory: 46.1 KiB, the ring and up to 6400 elements of `x`; a barrier for `x` (four with `beta`),
            ///   one when the run ends, two each time the ring is full.
            /// - Cost: memory bound, the bytes of `weight`.
            /// - Determinism: f32 sums in one order, that of the geometry; devices contract `a · b + c`.
            /// - Source: [`crate::format`]; norms as in [`crate::rms_norm`], [`crate::layer_norm`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `n_in` is a multiple of the format's block, and
            /// [`norm_fits`] if there is a norm. `weight`, `gamma`, `beta`, `bias` were written before the grid before this.
            #[kernel(threads = THREADS, blocks_per_sm = 2, waits)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $name(
                out: Disjoint<f32>,
                weight: Global<u8>,
                x: Global<f32>,
                gamma: Global<f32>,
                beta: Global<f32>,
                bias: Global<f32>,
                epsilon: f32,
                n_in: u32,
                n_out: u32,
                n_rows: u32,
                epilogue: u32,
            ) {
                let planes = format::$format::LAYOUT.planes(n_in as usize, n_out as usize);
                let shared = memory();
                let run = Run::new(Place { weight, planes, n_groups: n_in / GROUP }, n_rows, n_out, shared);
                let norm = Norm { gamma, beta, epsilon };
                // SAFETY: the launch contract is this kernel's own.
                unsafe { run.products::<format::$format, $rows, $depth, $ahead>(x, Some(norm), bias, out, epilogue, |_, _| ()) };
            }

            #[doc = concat!("[`", stringify!($name), "`](fn@", stringify!($name), ") that adds to the residual, and prepares the router that reads it.")]
            ///
            /// - Math: `out[o] ← out[o] + Σᵢ weight[o, i] · x[i] + bias[o]`; then over the rows o of block b
            ///   `parts[b, e] = Σ router[e, o] · router_gamma[o] · out[o]` and `parts[b, n_expert] = Σ out[o]²`.
            /// - Shapes: as there; `router`: `[n_expert, n_out]`, `router_gamma`: `[n_out]`; `parts`:
            ///   `[n_parts, n_expert + 1]`, [`n_parts`]`(n_in, n_out)`.
            /// - Launch: [`launch`]`(n_in, n_out)`, `n_rows` rows a block.
            /// - Shared memory: as there, with the router's weights of the block's rows; one barrier more.
            /// - Cost: memory bound, the bytes of `weight` and `router`.
            /// - Determinism: f32 sums in one order, that of the geometry; devices contract `a · b + c`.
            /// - Source: the logits of a router after an RMS norm are a sum over rows divided by one number.
            ///
            /// # Safety
            ///
            /// As there, and [`router_fits`]. `router` and `router_gamma` were written before the grid before this.
            #[kernel(threads = THREADS, blocks_per_sm = 2, waits)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $router_name(
                out: Disjoint<f32>,
                parts: Disjoint<f32>,
                weight: Global<u8>,
                x: Global<f32>,
                bias: Global<f32>,
                router: Global<f32>,
                router_gamma: Global<f32>,
                n_in: u32,
                n_out: u32,
                n_rows: u32,
                n_expert: u32,
            ) {
                let planes = format::$format::LAYOUT.planes(n_in as usize, n_out as usize);
                let shared = router_memory();
                let run = Run::new(Place { weight, planes, n_groups: n_in / GROUP }, n_rows, n_out, shared);
                let router = Router { weight: router, gamma: router_gamma, n_expert, at: ROUTER_FLOATS - router_floats(n_expert, n_rows) };
                // SAFETY: the launch contract is this kernel's own.
                unsafe { run.routed::<format::$format, $rows, $depth, $ahead>(x, bias, out, &router, parts) };
            }
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[$($name::ENTRY, $router_name::ENTRY),+];

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
            gamma: DeviceSlice<f32>,
            beta: DeviceSlice<f32>,
            bias: DeviceSlice<f32>,
            epsilon: f32,
            n_in: u32,
            n_out: u32,
            epilogue: u32,
        ) -> Result<(), LaunchError> {
            let (launch, n_rows) = (launch(n_in, n_out), rows_per_block(n_in, n_out));
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        $name::run(
                            launcher, launch, out, weight, x, gamma, beta, bias, epsilon, n_in, n_out, n_rows, epilogue,
                        )
                    })+
                }
            }
        }

        /// Starts the kernel with a router for `format`.
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
        pub unsafe fn run_router(
            format: WeightFormat,
            launcher: &dyn Launcher,
            out: DeviceSlice<f32>,
            parts: DeviceSlice<f32>,
            weight: DeviceSlice<u8>,
            x: DeviceSlice<f32>,
            bias: DeviceSlice<f32>,
            router: DeviceSlice<f32>,
            router_gamma: DeviceSlice<f32>,
            n_in: u32,
            n_out: u32,
            n_expert: u32,
        ) -> Result<(), LaunchError> {
            let (launch, n_rows) = (launch(n_in, n_out), rows_per_block(n_in, n_out));
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => {
                        $router_name::run(
                            launcher, launch, out, parts, weight, x, bias, router, router_gamma, n_in, n_out, n_rows, n_expert,
                        )
                    })+
                }
            }
        }
    };
}

kernels! {
    matvec_f32, matvec_router_f32: F32, 1, 1, false;
    matvec_f16, matvec_router_f16: F16, 1, 1, true;
    matvec_bf16, matvec_router_bf16: Bf16, 1, 1, true;
    matvec_q4_0, matvec_router_q4_0: Q4_0, 2, 1, true;
    matvec_q4_1, matvec_router_q4_1: Q4_1, 2, 1, true;
    matvec_q5_0, matvec_router_q5_0: Q5_0, 2, 1, true;
    matvec_q5_1, matvec_router_q5_1: Q5_1, 2, 1, true;
    matvec_q8_0, matvec_router_q8_0: Q8_0, 2, 1, true;
    matvec_q2_k, matvec_router_q2_k: Q2K, 2, 1, true;
    matvec_q3_k, matvec_router_q3_k: Q3K, 2, 1, true;
    matvec_q4_k, matvec_router_q4_k: Q4K, 2, 1, true;
    matvec_q5_k, matvec_router_q5_k: Q5K, 2, 1, true;
    matvec_q6_k, matvec_router_q6_k: Q6K, 2, 1, true;
    matvec_mxfp4, matvec_router_mxfp4: Mxfp4, 2, 2, true;
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

/// Shared memory of the kernels without a router.
#[inline(always)]
fn memory() -> Shared<f32> {
    shared_array!(matvec_memory: [f32; SHARED_FLOATS])
}

/// A sum for each thread.
#[inline(always)]
fn sums() -> Shared<f32> {
    shared_array!(matvec_sums: [f32; SUMS])
}

/// Shared memory of the kernels with one.
#[inline(always)]
fn router_memory() -> Shared<f32> {
    shared_array!(matvec_router_memory: [f32; ROUTER_LEN])
}

/// Where in the ring the sum of row `r` of item `item` is.
#[inline(always)]
const fn ring_at<const ROWS: usize>(item: u32, r: u32) -> usize {
    let half = RING / ROWS as u32;
    (item % half + r * half) as usize
}

/// What is done to `x` on the way: nothing, RMS normalization if there is a γ, layer normalization if there is a β too.
#[derive(Clone, Copy)]
struct Norm {
    gamma: Global<f32>,
    beta: Global<f32>,
    epsilon: f32,
}

impl Norm {
    #[inline(always)]
    fn is_rms(&self) -> bool {
        self.gamma.len() > 0 && self.beta.len() == 0
    }
}

/// The router that reads the residual, and where in shared memory its part of the weights lies.
struct Router {
    weight: Global<f32>,
    gamma: Global<f32>,
    n_expert: u32,
    at: u32,
}

/// A block's run of rows, and its thread.
struct Run {
    place: Place,
    first_row: u32,
    n_rows: u32,
    thread: u32,
    n_threads: u32,
    /// The ring, which before the first products holds β; then `x`; then the router's.
    shared: Shared<f32>,
}

/// A thread's place in the sequence of a run's groups.
#[derive(Clone, Copy)]
struct Cursor {
    row: u32,
    group: u32,
}

impl Cursor {
    /// `n_groups` groups on from the first of row 0; a row has `width`, not 0.
    #[inline(always)]
    fn new(n_groups: u32, width: u32) -> Self {
        Self { row: n_groups / width, group: n_groups % width }
    }

    #[inline(always)]
    fn advance(&mut self, by: Self, width: u32) {
        self.row += by.row;
        self.group += by.group;
        if self.group >= width {
            self.group -= width;
            self.row += 1;
        }
    }
}

impl Run {
    #[inline(always)]
    fn new(place: Place, n_rows: u32, n_out: u32, shared: Shared<f32>) -> Self {
        let first_row = thread::block_idx_x() * n_rows;
        Self {
            place,
            first_row,
            n_rows: n_rows.min(n_out - first_row),
            thread: thread::thread_idx_x(),
            n_threads: thread::block_dim_x(),
            shared,
        }
    }

    /// Computes the run's rows of `out`. `done(row, value)` is called by eight threads for each row, in code that the whole
    /// block runs; the first of the eight gives what it wrote. Rows past the end, and values of the others, mean nothing.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    unsafe fn products<F: Format, const ROWS: usize, const DEPTH: usize, const AHEAD: bool>(
        &self,
        x: Global<f32>,
        norm: Option<Norm>,
        bias: Global<f32>,
        out: Disjoint<f32>,
        epilogue: u32,
        mut done: impl FnMut(u32, f32),
    ) {
        let &Self { ref place, n_rows, thread, n_threads, shared, .. } = self;
        // What row `slot` of the run waits for, if there is a bias; later rows, of longer runs, ask when they are due.
        let (slot, lane) = (thread / LANES, thread % LANES);
        let bias_of = |row: u32| if bias.len() > 0 { self.at(bias, row) } else { 0.0 };
        let first_bias = if slot < n_rows { bias_of(slot) } else { 0.0 };
        let mut first_before = 0.0;

        let mut part = 0;
        while part < place.n_groups {
            // Never 0; `max` tells LLVM so, and the divisions need no panic.
            let width = (place.n_groups - part).min(PART / GROUP).max(1);
            let n_tuples = n_rows.div_ceil(ROWS as u32);
            let n_items = n_tuples * width;
            let (first, step) = (Cursor::new(thread, width), Cursor::new(n_threads, width));
            let load = |ahead: &mut Cursor| {
                let mut raw = [[F::EMPTY; ROWS]; DEPTH];
                let mut d = 0;
                while d < DEPTH {
                    if ahead.row < n_tuples {
                        let mut r = 0;
                        while r < ROWS {
                            // An odd last row comes twice.
                            let row = self.first_row + (ahead.row * ROWS as u32 + r as u32).min(n_rows - 1);
                            // SAFETY: the row is of the run, the group of the part.
                            raw[d][r] = unsafe { F::load(place, row as usize, part + ahead.group) };
                            r += 1;
                        }
                    }
                    ahead.advance(step, width);
                    d += 1;
                }
                raw
            };
            let mut ahead = first;
            let mut next = load(&mut ahead);

            // SAFETY: the conditions are the same for the whole grid.
            unsafe {
                if part == 0 {
                    self.stage_norm(norm);
                    grid::wait();
                    if epilogue == ADD && slot < n_rows && lane == 0 {
                        first_before = out.read_unchecked((self.first_row + slot) as usize);
                    }
                } else {
                    thread::sync_threads();
                }
                self.stage(x, part * GROUP, (part + width) * GROUP, norm);
                thread::sync_threads();
            }

            let is_last = part + width == place.n_groups;
            // The thread's item in the sequence, and its group of x.
            let (mut item, mut group) = (thread, first);
            // Items begun and tuples of rows done: the block's.
            let (mut begun, mut n_done) = (0, 0);
            while begun < n_items {
                let raw = next;
                if AHEAD {
                    next = load(&mut ahead);
                }
                let mut d = 0;
                while d < DEPTH {
                    if item < n_items {
                        let mut sums = [0.0; ROWS];
                        let x_at = RING + group.group * GROUP_STRIDE;
                        // SAFETY: the group of x is staged.
                        unsafe { accumulate::<F, ROWS>(&mut sums, &raw[d], part + group.group, shared, x_at) };
                        let mut r = 0;
                        while r < ROWS {
                            // SAFETY: the ring's element is this thread's until the next barrier.
                            unsafe { shared.write(ring_at::<ROWS>(item, r as u32), sums[r]) };
                            r += 1;
                        }
                    }
                    group.advance(step, width);
                    item += n_threads;
                    d += 1;
                }
                if !AHEAD {
                    next = load(&mut ahead);
                }
                begun += DEPTH as u32 * n_threads;
                let is_end = begun >= n_items;
                if !is_end && begun + DEPTH as u32 * n_threads <= n_done * width + RING / ROWS as u32 {
                    continue;
                }

                // SAFETY: the whole block is here, since all conditions are the block's.
                unsafe { thread::sync_threads() };
                let scale = unsafe { self.scale(norm) };
                let n_complete = if is_end { n_tuples } else { begun / width };
                let end = n_rows.min(n_complete * ROWS as u32);
                let mut round = n_done * ROWS as u32;
                while round < end {
                    let row = round + slot;
                    let (is_row, o) = (row < end, (self.first_row + row) as usize);
                    let (mut start, mut before) = (first_bias, first_before);
                    if (round > 0 || part > 0) && is_row && lane == 0 {
                        // SAFETY: the row exists, and is this thread's alone. With a later part it has all but the sum.
                        unsafe {
                            start = if part > 0 { out.read_unchecked(o) } else { bias_of(row) };
                            before = if epilogue == ADD && part == 0 { out.read_unchecked(o) } else { 0.0 };
                        }
                    }
                    let mut sum = 0.0;
                    if is_row {
                        let (tuple, r) = (row / ROWS as u32, row % ROWS as u32);
                        let (mut item, end) = (tuple * width + lane, (tuple + 1) * width);
                        while item < end {
                            // SAFETY: written before the barrier.
                            sum += unsafe { shared.read(ring_at::<ROWS>(item, r)) };
                            item += LANES;
                        }
                    }
                    // SAFETY: whole warps are here.
                    let y = unsafe { warp::sum_of::<LANES>(sum) } * scale + start;
                    // A sum is whole with the last part; until then `out` holds it.
                    let value = match epilogue {
                        ADD => before + y,
                        GELU_ERF if is_last => gelu::exact(y),
                        GELU_TANH if is_last => gelu::tanh_form(y),
                        _ => y,
                    };
                    if is_row && lane == 0 {
                        // SAFETY: element o is this thread's alone.
                        unsafe { out.write(o, value) };
                    }
                    done(row, value);
                    round += n_threads / LANES;
                }
                if !is_end {
                    // SAFETY: as above.
                    unsafe { thread::sync_threads() };
                    n_done = n_complete;
                }
            }
            part += width;
        }
    }

    /// Element `row` of the run in a vector of the matrix's height.
    #[inline(always)]
    fn at(&self, vector: Global<f32>, row: u32) -> f32 {
        // SAFETY: the launch contract; the row is of the run.
        unsafe { vector.read_unchecked((self.first_row + row) as usize) }
    }

    /// Where element `i` of the staged part of `x` is, `i` a multiple of 4.
    #[inline(always)]
    fn staged(i: u32) -> usize {
        (RING + i / GROUP * GROUP_STRIDE + i % GROUP) as usize
    }

    /// Brings γ to where `x` will be, and β to where the ring will be: each thread what it will need itself.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    unsafe fn stage_norm(&self, norm: Option<Norm>) {
        let Some(norm) = norm else { return };
        let n_in = norm.gamma.len() as u32;
        let mut i = 4 * self.thread;
        while i < n_in {
            // SAFETY: both fit by the launch contract, in whole 16 bytes; every thread writes its own.
            unsafe {
                self.shared.store16(Self::staged(i), norm.gamma.load16(i as usize));
                if norm.beta.len() > 0 {
                    self.shared.store16(i as usize, norm.beta.load16(i as usize));
                }
            }
            i += 4 * self.n_threads;
        }
    }

    /// Brings elements `start..end` of `x` to shared memory: layer-normalized, or with RMS normalization scaled by γ, each
    /// warp's sum of squares left in `sums`.
    ///
    /// # Safety
    ///
    /// The whole block is here, no longer reads the last part, and passes a barrier next. With a norm this is the only part.
    #[inline(always)]
    unsafe fn stage(&self, x: Global<f32>, start: u32, end: u32, norm: Option<Norm>) {
        let (shared, len, n_warps) = (self.shared, end - start, self.n_threads / WARP_SIZE);
        let sums = sums();
        let first = 4 * self.thread;
        // SAFETY: inside, in whole 16 bytes since rows are whole groups.
        let load = |i: u32| unsafe { x.load16((start + i) as usize) }.map(f32::from_bits);
        let (has_gamma, has_beta, is_rms) = match norm {
            Some(norm) => (norm.gamma.len() > 0, norm.beta.len() > 0, norm.is_rms()),
            None => (false, false, false),
        };
        let epsilon = norm.map_or(0.0, |norm| norm.epsilon);
        let (mut mean, mut rstd) = (0.0, 1.0);
        if has_beta {
            let (mut sum, mut i) = (0.0, first);
            while i < len {
                let [a, b, c, d] = load(i);
                sum += (a + b) + (c + d);
                i += 4 * self.n_threads;
            }
            // SAFETY: the whole block is here; its sums are its own.
            mean = unsafe { block::sum(sum, self.thread, n_warps, sums) } / len as f32;

            // A second pass, since E[x²] − E[x]² cancels when |mean| ≫ σ.
            let (mut squares, mut i) = (0.0, first);
            while i < len {
                let [a, b, c, d] = load(i).map(|x| x - mean);
                squares += (a * a + b * b) + (c * c + d * d);
                i += 4 * self.n_threads;
            }
            // SAFETY: as above; the barrier lies between the readers of the last sum and the writers of this.
            let variance = unsafe {
                thread::sync_threads();
                block::sum(squares, self.thread, n_warps, sums)
            } / len as f32;
            rstd = Float::sqrt(variance + epsilon).recip();
        }

        let (mut squares, mut i) = (0.0, first);
        while i < len {
            let at = Self::staged(i);
            let mut x = load(i);
            // SAFETY: every thread reads and writes its own; γ and β are there since `stage_norm`.
            unsafe {
                if has_gamma {
                    let gamma = shared.load16(at).map(f32::from_bits);
                    if has_beta {
                        let beta = shared.load16(i as usize).map(f32::from_bits);
                        x = [
                            (x[0] - mean) * rstd * gamma[0] + beta[0],
                            (x[1] - mean) * rstd * gamma[1] + beta[1],
                            (x[2] - mean) * rstd * gamma[2] + beta[2],
                            (x[3] - mean) * rstd * gamma[3] + beta[3],
                        ];
                    } else {
                        squares += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
                        x = [x[0] * gamma[0], x[1] * gamma[1], x[2] * gamma[2], x[3] * gamma[3]];
                    }
                }
                shared.store16(at, x.map(f32::to_bits));
            }
            i += 4 * self.n_threads;
        }
        if is_rms {
            // SAFETY: whole warps are here.
            unsafe { block::leave_sum(squares, self.thread, sums) };
        }
    }

    /// What sums over the staged `x` are to be multiplied by.
    ///
    /// # Safety
    ///
    /// Whole warps are here, after the barrier that follows [`stage`](Self::stage).
    #[inline(always)]
    unsafe fn scale(&self, norm: Option<Norm>) -> f32 {
        let Some(norm) = norm.filter(|norm| norm.is_rms()) else { return 1.0 };
        // SAFETY: the caller's promise.
        let squares = unsafe { block::sum_left(self.thread, self.n_threads / WARP_SIZE, sums()) };
        Float::sqrt(squares / norm.gamma.len() as f32 + norm.epsilon).recip()
    }

    /// Adds the run's rows to `out`, and writes what they contribute to the router's logits.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    unsafe fn routed<F: Format, const ROWS: usize, const DEPTH: usize, const AHEAD: bool>(
        &self,
        x: Global<f32>,
        bias: Global<f32>,
        out: Disjoint<f32>,
        router: &Router,
        parts: Disjoint<f32>,
    ) {
        let (warp, lane, n_warps) = (self.thread / WARP_SIZE, self.thread % WARP_SIZE, self.n_threads / WARP_SIZE);
        let (n_expert, n_rows, shared) = (router.n_expert, self.n_rows, self.shared);
        // A warp has experts `warp, warp + n_warps, …`, a lane rows `lane, lane + 32, …`: now and later.
        let mut e = warp;
        while e < n_expert {
            let mut row = lane;
            while row < n_rows {
                let weight = self.at(router.gamma, row);
                // SAFETY: the expert and row exist; every thread writes its own.
                unsafe {
                    let weights = router.weight.row_unchecked(e as usize, router.gamma.len());
                    let weight = weight * self.at(weights, row);
                    shared.write((router.at + e * n_rows + row) as usize, weight);
                }
                row += WARP_SIZE;
            }
            e += n_warps;
        }

        let values_at = router.at + n_expert * n_rows;
        // SAFETY: the caller's promise. Every thread writes its own element for each row.
        unsafe {
            self.products::<F, ROWS, DEPTH, AHEAD>(x, None, bias, out, ADD, |row, value| {
                shared.write((values_at + row * LANES + self.thread % LANES) as usize, value);
            });
            thread::sync_threads();
        }

        let n_parts = n_expert + 1;
        let mut e = warp;
        while e < n_parts {
            let (mut sum, mut row) = (0.0, lane);
            while row < n_rows {
                // SAFETY: own, and written before the barrier.
                unsafe {
                    let value = shared.read((values_at + row * LANES) as usize);
                    let weight =
                        if e < n_expert { shared.read((router.at + e * n_rows + row) as usize) } else { value };
                    sum += weight * value;
                }
                row += WARP_SIZE;
            }
            // SAFETY: whole warps are here; one element for each expert of the warp.
            unsafe {
                let sum = warp::sum(sum);
                if lane == 0 {
                    parts.write((thread::block_idx_x() * n_parts + e) as usize, sum);
                }
            }
            e += n_warps;
        }
    }
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
    let (mut products, mut x_sum) = ([[0.0; 2]; ROWS], 0.0);
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
            products[r][0] += q[0] * x[0];
            products[r][1] += q[1] * x[1];
            products[r][0] += q[2] * x[2];
            products[r][1] += q[3] * x[3];
            if last {
                let [factor, offset] = F::scale(&raw[r], group, i / 4);
                sums[r] += (products[r][0] + products[r][1]) * F::UNIT * factor;
                if F::HAS_OFFSET {
                    sums[r] += x_sum * offset;
                }
                products[r] = [0.0; 2];
            }
            r += 1;
        }
        if last {
            x_sum = 0.0;
        }
        i += 1;
    }
}
