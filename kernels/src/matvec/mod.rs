//! Matrix times vector: one token against a weight matrix, as in decoding, with the norm before it and what follows it.
//!
//! A block has a run of rows, and its threads walk the run's groups of 32 elements as one sequence: thread t has groups
//! `t, t + n_threads, …`, so that all have the same number whatever the width, and neighbours load neighbouring bytes. Each
//! leaves the product of a group with its part of `x` in a ring in shared memory; when the ring is full, or the run ends,
//! eight threads a row sum the rows that are complete. Most formats take two rows at once, for which `x` is read once.
//! Weights are loaded into registers one step ahead, and the first before the grid waits for the one that makes `x`.

mod run;
pub mod stream;

#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use crate::gelu;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher, warp::WARP_SIZE};
use cuda_std::{Disjoint, Global, Shared, kernel};
use run::{LANES, Norm, Router, Run, memory, router_memory};

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
/// The most blocks: two on each SM of an H100. With one, half as many weights are under way when the wait ends.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS: u32 = 264;
/// The least: so many bring 768 elements of `x` in one round.
#[cfg(not(target_arch = "nvptx64"))]
const LEAST_THREADS: u32 = 64;
/// Elements of `x` in shared memory at a time; a longer one comes in parts.
pub const PART: u32 = 6400;
/// Floats from one group of `x` to the next in shared memory: 4 more than it has, so that 8 lanes which load 16 bytes each
/// of their own group meet in no bank.
pub(crate) const GROUP_STRIDE: u32 = GROUP + 4;
/// Floats of the ring: a power of two.
const RING: u32 = 4096;
/// Floats of shared memory where there is a router: all that is to be had without asking.
const ROUTER_FLOATS: u32 = 12_288;
/// The most experts that a router may have.
pub const MAX_EXPERTS: u32 = 128;

/// How many rows of a matrix a block has: an equal share, but enough for 64 threads to have a group.
#[cfg(not(target_arch = "nvptx64"))]
const fn rows_per_block(n_in: u32, n_out: u32) -> u32 {
    let (share, least) = (n_out.div_ceil(BLOCKS), 64_u32.div_ceil(n_in / GROUP));
    if share > least { share } else { least }
}

/// The geometry the kernels of this file are started with. Any will do whose blocks of 32 to 384 threads, a multiple of 32,
/// cover the rows, `n_rows` each.
///
/// As many threads as have the same number of items each: those that have none would only take registers that the next
/// grid could start in.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(format: WeightFormat, n_in: u32, n_out: u32) -> Launch {
    let n_items = rows_per_block(n_in, n_out).div_ceil(rows_at_once(format)) * (n_in / GROUP);
    let n_threads = n_items.div_ceil(n_items.div_ceil(THREADS)).next_multiple_of(WARP_SIZE);
    Launch::linear(n_parts(n_in, n_out), if n_threads < LEAST_THREADS { LEAST_THREADS } else { n_threads })
}

/// The blocks of [`launch`], and so the rows of `parts`.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn n_parts(n_in: u32, n_out: u32) -> u32 {
    n_out.div_ceil(rows_per_block(n_in, n_out))
}

/// Another geometry, for a machine to which a thread costs much and a block's width nothing, as the emulator: `n_blocks`
/// blocks of one warp at most, and the rows of each.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch_warps(n_out: u32, n_blocks: u32) -> (Launch, u32) {
    let n_rows = n_out.div_ceil(n_blocks);
    (Launch::linear(n_out.div_ceil(n_rows), WARP_SIZE), n_rows)
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
            /// - Launch: [`launch`]`(format, n_in, n_out)`, `n_rows` rows a block. See the module.
            /// - Shared memory: 47.1 KiB, the ring, up to 6400 elements of `x`, sums for norms; a barrier for `x` (three with
            ///   `beta`), one when the run ends, two each time the ring is full.
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
                unsafe { run.products::<format::$format, $rows, $depth, $ahead>(x, Some(norm), bias, out, epilogue, || (), |_, _| ()) };
            }

            #[doc = concat!("[`", stringify!($name), "`](fn@", stringify!($name), ") that adds to the residual, and prepares the router that reads it.")]
            ///
            /// - Math: `out[o] ← out[o] + Σᵢ weight[o, i] · x[i] + bias[o]`; then over the rows o of block b
            ///   `parts[b, e] = Σ router[e, o] · router_gamma[o] · out[o]` and `parts[b, n_expert] = Σ out[o]²`.
            /// - Shapes: as there; `router`: `[n_expert, n_out]`, `router_gamma`: `[n_out]`; `parts`:
            ///   `[n_parts, n_expert + 1]`, [`n_parts`]`(n_in, n_out)`.
            /// - Launch: [`launch`]`(format, n_in, n_out)`, `n_rows` rows a block.
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

        /// Rows that a thread multiplies together.
        #[cfg(not(target_arch = "nvptx64"))]
        const fn rows_at_once(format: WeightFormat) -> u32 {
            match format {
                $(WeightFormat::$format => $rows),+
            }
        }

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
            let geometry = (launch(format, n_in, n_out), rows_per_block(n_in, n_out));
            // SAFETY: the caller's promise.
            unsafe {
                run_in(geometry, format, launcher, out, weight, x, gamma, beta, bias, epsilon, n_in, n_out, epilogue)
            }
        }

        /// [`run`] in a geometry of the caller's choice: [`launch`] says which there are; with it come the rows of a block.
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
        pub unsafe fn run_in(
            (launch, n_rows): (Launch, u32),
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
            let (launch, n_rows) = (launch(format, n_in, n_out), rows_per_block(n_in, n_out));
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
