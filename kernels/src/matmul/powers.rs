//! The powers of two that bring the rows of a matrix into f16's range: run once, when a matrix is loaded.

#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use cuda_std::warp::WARP_SIZE;
use cuda_std::{Atomics, Disjoint, Global, kernel, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};

/// Rows of a block, a warp each.
const ROWS: u32 = 8;
/// How far an element without scale may be above the row's largest, so that scales stay finite: a row may hold nothing but
/// zeros under any scale.
const SLACK: f32 = 1.0 / (1 << 20) as f32;
/// 2⁻¹⁴, f16's smallest normal number.
const SMALLEST_NORMAL: f32 = 1.0 / (1 << 14) as f32;

/// `[2ᵉ, 2⁻ᵉ]` such that `largest · 2⁻ᵉ` is in 2¹⁴..2¹⁵, or below that if `largest` is below 2⁻¹¹².
#[inline(always)]
pub(crate) fn power_of_row(largest: f32) -> [f32; 2] {
    // Both are normal numbers. Infinity and NaN stay what they are through any of them.
    let exponent = (largest.to_bits() & 0x7f80_0000).clamp(15 << 23, 254 << 23) - (14 << 23);
    [f32::from_bits(exponent), inverse_of(f32::from_bits(exponent))]
}

/// 2⁻ᵉ of 2ᵉ.
#[inline(always)]
pub(crate) fn inverse_of(power: f32) -> f32 {
    f32::from_bits(0x7f00_0000 - power.to_bits())
}

/// The one geometry the kernels of this file are written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_out: u32) -> Launch {
    Launch { grid: [n_out.div_ceil(ROWS), 1, 1], block: [WARP_SIZE, ROWS, 1] }
}

macro_rules! kernels {
    ($($name:ident: $format:ident;)+) => {
        $(
            #[doc = concat!("Finds the powers of two for the rows of a matrix of type ", stringify!($format), ".")]
            ///
            /// - Math: `powers[o]` is the power of two by which the largest magnitude of row o, divided, is in 2¹⁴..2¹⁵; if
            ///   it is more than 2²⁰ below what the row's scales allow, as in a row of zeros, that limit stands in for it.
            ///   `wide[0]` becomes 1 if the largest of any 32 neighbours, not all 0, is then below 2⁻¹⁴, where f16 has fewer
            ///   bits: such a matrix is for [`super::run`].
            /// - Shapes: `powers`: `[n_out]`; `wide`: `[1]`, 0 before; `weight`: `[n_out, n_in]` in its format's planes.
            /// - Launch: [`launch`]`(n_out)`. A warp owns a row, a lane its groups `g ≡ lane (mod 32)`.
            /// - Shared memory: none, and no barrier.
            /// - Cost: memory bound, the bytes of `weight` if a row stays cached over its two passes.
            /// - Determinism: the same bits everywhere.
            /// - Source: none.
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `n_in` is a multiple of the format's block.
            #[kernel(threads = ROWS * WARP_SIZE, blocks_per_sm = 2)]
            pub unsafe fn $name(powers: Disjoint<f32>, wide: Atomics<u32>, weight: Global<u8>, n_in: u32, n_out: u32) {
                // SAFETY: the launch contract is this kernel's own.
                unsafe { row_powers::<format::$format>(powers, wide, weight, n_in, n_out) }
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
            powers: DeviceSlice<f32>,
            wide: DeviceSlice<u32>,
            weight: DeviceSlice<u8>,
            n_in: u32,
            n_out: u32,
        ) -> Result<(), LaunchError> {
            let launch = launch(n_out);
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => $name::run(launcher, launch, powers, wide, weight, n_in, n_out)),+
                }
            }
        }
    };
}

kernels! {
    row_powers_f32: F32;
    row_powers_f16: F16;
    row_powers_bf16: Bf16;
    row_powers_q4_0: Q4_0;
    row_powers_q4_1: Q4_1;
    row_powers_q5_0: Q5_0;
    row_powers_q5_1: Q5_1;
    row_powers_q8_0: Q8_0;
    row_powers_q2_k: Q2K;
    row_powers_q3_k: Q3K;
    row_powers_q4_k: Q4K;
    row_powers_q5_k: Q5K;
    row_powers_q6_k: Q6K;
    row_powers_mxfp4: Mxfp4;
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
unsafe fn row_powers<F: Format>(powers: Disjoint<f32>, wide: Atomics<u32>, weight: Global<u8>, n_in: u32, n_out: u32) {
    let (lane, row) = (thread::thread_idx_x(), thread::block_idx_x() * ROWS + thread::thread_idx_y());
    if row >= n_out {
        return; // Past the last row: whole warps leave.
    }
    let place = Place { weight, planes: F::LAYOUT.planes(n_in as usize, n_out as usize), n_groups: n_in / GROUP };
    let row = row as usize;

    let mut largest = 0.0f32;
    let mut group = lane;
    while group < place.n_groups {
        // SAFETY: row and group exist.
        let raw = unsafe { F::load(&place, row, group) };
        largest = largest.max(largest_of::<F>(&raw, group)).max(F::bound(&raw, group) * SLACK);
        group += WARP_SIZE;
    }
    // SAFETY: a row is a warp, so all 32 lanes are here.
    let [power, inverse] = power_of_row(unsafe { warp::max(largest) });

    let mut below = false;
    let mut group = lane;
    while group < place.n_groups {
        // SAFETY: as above.
        let largest = largest_of::<F>(&unsafe { F::load(&place, row, group) }, group);
        below |= largest > 0.0 && largest * inverse < SMALLEST_NORMAL;
        group += WARP_SIZE;
    }
    if below {
        wide.fetch_max(0, 1);
    }
    if lane == 0 {
        // SAFETY: one lane writes it.
        unsafe { powers.write(row, power) };
    }
}

/// The largest magnitude of a group.
#[inline(always)]
fn largest_of<F: Format>(raw: &F::Raw, group: u32) -> f32 {
    let (mut largest, mut i) = (0.0f32, 0);
    while i < 8 {
        let [a, b, c, d] = F::decode(raw, i, F::scale(raw, group, i / 4)).map(f32::abs);
        largest = largest.max(a.max(b)).max(c.max(d));
        i += 1;
    }
    largest
}
