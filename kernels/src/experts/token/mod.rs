//! One token through experts of MXFP4 on tensor cores: the router's end and two kernels, at the speed of memory.
//!
//! Both kernels keep warps apart: a warp streams its own weights through its own ring in shared memory, in the order in which
//! they lie in device memory. Runs of tiles are small enough to be dealt out evenly.

mod down;
mod gate_up;
mod routed;

use crate::format::{GROUP, MXFP4_ROWS, MXFP4_RUN, mxfp4_pairs};
#[cfg(not(target_arch = "nvptx64"))]
use crate::router::{MAX_EXPERTS, MAX_USED};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::Entry;
use cuda_std::{Shared, mma, warp};

pub use down::*;
pub use gate_up::*;

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

/// Activations are stored times 2⁹, far from the smallest f16: |h| is at most 56.
const H_UNIT: f32 = 512.0;
/// What codes of [`mxfp4_pairs`] are to be multiplied with.
const CODE_UNIT: f32 = 16384.0;

/// The kernels of this module.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_token_gate_up_mxfp4::ENTRY, experts_token_down_mxfp4::ENTRY];

/// Whether the kernels of this module can run a layer of these widths, which are whole groups.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn fits(n_expert: u32, n_used: u32, d_model: u32, d_ff: u32) -> bool {
    if n_expert > MAX_EXPERTS || n_used == 0 || n_used > MAX_USED || d_model > MAX_D_MODEL {
        return false;
    }
    let splits = DOWN_WARPS / n_used.div_ceil(2);
    d_ff.div_ceil(GROUP * RUN).div_ceil(splits) <= MAX_STEPS
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
