//! Rotary position embedding.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Global, kernel, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

const HEADS_PER_BLOCK: u32 = 8;
const THREADS: u32 = WARP_SIZE * HEADS_PER_BLOCK;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[rope::ENTRY];

/// The one geometry [`rope`](fn@rope) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32, n_head: u32) -> Launch {
    Launch { grid: [n_head.div_ceil(HEADS_PER_BLOCK), n_tokens, 1], block: [WARP_SIZE, HEADS_PER_BLOCK, 1] }
}

/// What [`rope`](fn@rope) wants for a pair that turns by so many radians from one position to the next: 2⁻⁶⁴ turns, whole
/// turns left out. Rounding f64 to that costs 2⁻⁵³ of the angle, 2e-11 radians at position 131072.
#[cfg(not(target_arch = "nvptx64"))]
pub fn frequency(radians: f64) -> u64 {
    let turns = (radians / core::f64::consts::TAU) % 1.0;
    // The remainder in −1..1 is an integer of i128 after scaling by a power of two, and a negative angle wraps around.
    (turns * 18_446_744_073_709_551_616.0) as i128 as u64
}

/// `[cos, sin]` of so many 2⁻⁶⁴ turns, each within 2e-7 of the truth.
#[inline(always)]
pub fn cos_sin(turns: u64) -> [f32; 2] {
    // The nearest quarter turn, and what is left, in −2²⁹..2²⁹ of 2⁻³² turns: up to π/4, rounded by 2⁻²⁵ of it.
    let turns = (turns >> 32) as u32;
    let quarter = turns.wrapping_add(1 << 29) >> 30;
    let rest = turns.wrapping_sub(quarter << 30) as i32;
    let x = rest as f32 * (core::f32::consts::TAU / 4_294_967_296.0);
    let z = x * x;
    // Minimax polynomials of Cephes' sinf and cosf (Moshier) on −π/4..π/4, within 1e-7 there.
    let sin = ((-1.951_529_6e-4 * z + 8.332_161e-3) * z - 0.166_666_55) * z * x + x;
    let cos = ((2.443_315_7e-5 * z - 1.388_731_6e-3) * z + 4.166_664_6e-2) * z * z - 0.5 * z + 1.0;
    let (cos, sin) = if quarter & 1 == 0 { (cos, sin) } else { (-sin, cos) };
    if quarter & 2 == 0 { [cos, sin] } else { [-cos, -sin] }
}

/// Turns the pairs of each head's vectors by angles that grow with the position.
///
/// - Math: with `h = d_head / 2`, `p = state[0] + t`, `θ = p · frequencies[i]`, and for each head and `i < h`:
///   `(aᵢ, aᵢ₊ₕ) ← μ (aᵢ cos θ − aᵢ₊ₕ sin θ, aᵢ₊ₕ cos θ + aᵢ sin θ)`, μ being `magnitude`. θ is an integer product modulo
///   2⁶⁴, so it is as exact at position 131072 as at 1; its cosine and sine are within 2e-7.
/// - Shapes: `qkv`: `[n_tokens, qkv_width]`, in place, a row starting with the `n_head` heads to turn, of d_head elements
///   each; `frequencies`: `[d_head / 2]`, made by [`frequency`]; `state`: `[1]`, the position of token 0.
/// - Launch: [`launch`]`(n_tokens, n_head)`. A warp owns a head of a token, a lane its pairs `i ≡ lane (mod 32)`.
/// - Shared memory: none, and no barrier.
/// - Cost: memory bound, `8 · n_tokens · n_head · d_head` bytes.
/// - Determinism: one fixed order of operations; devices contract `a · b + c`.
/// - Source: Su and others, *RoFormer*, arXiv:2104.09864, eq. 34, pairing halves as GPT-NeoX does; `magnitude` is YaRN's,
///   arXiv:2309.00071, section 3.4.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above, and `n_head · d_head <= qkv_width`.
#[kernel(threads = THREADS, blocks_per_sm = 4)]
pub unsafe fn rope(
    qkv: Disjoint<f32>,
    frequencies: Global<u64>,
    state: Global<u32>,
    n_head: u32,
    qkv_width: u32,
    magnitude: f32,
) {
    let head = thread::block_idx_x() * HEADS_PER_BLOCK + thread::thread_idx_y();
    if head >= n_head {
        return;
    }
    let (t, half) = (thread::block_idx_y(), frequencies.len() as u32);
    let position = u64::from(state[0] + t);
    let first = t as usize * qkv_width as usize + (2 * half * head) as usize;
    let mut i = thread::thread_idx_x();
    while i < half {
        let [cos, sin] = cos_sin(position.wrapping_mul(frequencies[i as usize])).map(|x| x * magnitude);
        let (at_a, at_b) = (first + i as usize, first + (i + half) as usize);
        // SAFETY: inside by the launch contract; the pair is this lane's alone.
        unsafe {
            let (a, b) = (qkv.read_unchecked(at_a), qkv.read_unchecked(at_b));
            qkv.write(at_a, a * cos - b * sin);
            qkv.write(at_b, b * cos + a * sin);
        }
        i += WARP_SIZE;
    }
}
