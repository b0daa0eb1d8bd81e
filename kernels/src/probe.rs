//! What a device reaches at best: streams that are only read, tensor cores that only multiply, and nothing at all. The
//! engine runs none of it; benches and `gamma bench` take shares of it.

use cuda_std::{Disjoint, Global, kernel, mma, thread};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// The most threads of a block here.
pub const THREADS: u32 = 512;
/// Words of one load.
const WORDS: usize = 4;
/// Products of a warp of [`mma_chains`](fn@mma_chains) that wait for none of each other.
pub const CHAINS: usize = 8;
/// Words of factors that a lane of [`mma_chains`](fn@mma_chains) reads: its fragments of A and of B.
pub const FACTOR_WORDS: usize = 6;
/// Floating-point operations of a warp in one round of [`mma_chains`](fn@mma_chains).
pub const ROUND_FLOP: u64 = CHAINS as u64 * 2 * 16 * 8 * 16;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] =
    &[stream_read_4::ENTRY, stream_read_8::ENTRY, stream_read_16::ENTRY, mma_chains::ENTRY, empty::ENTRY];

/// A geometry of this file's kernels: any number of blocks, of 32 to 512 threads, whole warps.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_blocks: u32, threads: u32) -> Launch {
    Launch::linear(n_blocks, threads)
}

macro_rules! stream_read {
    ($name:ident, $depth:literal) => {
        /// Reads all of `data` once, with so many 16-byte loads of each thread on their way as the name says.
        ///
        /// - Math: `sums[i]` = the sum of the words that thread i of the grid read, modulo 2³²: vectors of 4 words
        ///   `i, i + n, i + 2 n, …` with n, the threads of the grid.
        /// - Shapes: `sums`: `[n]`; `data`: any multiple of 4 words.
        /// - Launch: [`launch`]`(n_blocks, threads)`; bytes on their way in an SM: 16 · depth · its resident threads.
        /// - Shared memory: none, and no barrier.
        /// - Cost: memory bound, `4 · data.len()` bytes.
        /// - Determinism: exact.
        /// - Source: none.
        ///
        /// # Safety
        ///
        /// Launched as above; `data` is aligned to 16 bytes.
        #[kernel(threads = THREADS)]
        pub unsafe fn $name(sums: Disjoint<u32>, data: Global<u32>) {
            // SAFETY: the caller's promise.
            unsafe { stream_read::<$depth>(sums, data) }
        }
    };
}

stream_read!(stream_read_4, 4);
stream_read!(stream_read_8, 8);
stream_read!(stream_read_16, 16);

/// The place of this thread in the grid, and how many threads the grid has.
#[inline(always)]
fn place() -> (usize, usize) {
    let threads = thread::block_dim_x();
    let i = thread::block_idx_x() * threads + thread::thread_idx_x();
    (i as usize, (thread::grid_dim_x() * threads) as usize)
}

#[inline(always)]
fn sum(words: [u32; WORDS]) -> u32 {
    words[0].wrapping_add(words[1]).wrapping_add(words[2].wrapping_add(words[3]))
}

/// # Safety
///
/// That of the kernels made of it.
#[inline(always)]
unsafe fn stream_read<const DEPTH: usize>(sums: Disjoint<u32>, data: Global<u32>) {
    let (i, n) = place();
    let end = data.len() / WORDS;
    let mut total = 0_u32;
    let mut at = i;
    // All of a round's loads are inside if the last one is.
    if at + (DEPTH - 1) * n < end {
        let mut pending = [[0; WORDS]; DEPTH];
        let mut k = 0;
        while k < DEPTH {
            // SAFETY: below `end`; 16-byte aligned as `data` is.
            pending[k] = unsafe { data.load16((at + k * n) * WORDS) };
            k += 1;
        }
        at += DEPTH * n;
        while at + (DEPTH - 1) * n < end {
            // Each load is replaced as soon as it is there, so that as many stay on their way.
            let mut k = 0;
            while k < DEPTH {
                total = total.wrapping_add(sum(pending[k]));
                // SAFETY: as above.
                pending[k] = unsafe { data.load16((at + k * n) * WORDS) };
                k += 1;
            }
            at += DEPTH * n;
        }
        let mut k = 0;
        while k < DEPTH {
            total = total.wrapping_add(sum(pending[k]));
            k += 1;
        }
    }
    if at < end {
        // Less than a round is left, and goes out at once, too: a load past the end repeats the first, and does not count.
        let mut pending = [[0; WORDS]; DEPTH];
        let mut k = 0;
        while k < DEPTH {
            let from = if at + k * n < end { at + k * n } else { at };
            // SAFETY: as above.
            pending[k] = unsafe { data.load16(from * WORDS) };
            k += 1;
        }
        let mut k = 0;
        while k < DEPTH {
            total = total.wrapping_add(if at + k * n < end { sum(pending[k]) } else { 0 });
            k += 1;
        }
    }
    // SAFETY: this thread's own element.
    unsafe { sums.write(i, total) };
}

/// Multiplies on the tensor cores and does nothing else: 8 products of a warp are independent of each other.
///
/// - Math: `out = 8 · n_rounds · (A · B)`, as 8 sums that are added up in the end; A: 16 × 16, B: 16 × 8, f16; sums f32.
/// - Shapes: `out`: `[4 · n]`, n threads of the grid: each lane's fragment of its warp's sum; `factors`: `[32, 6]`: each
///   lane's fragments of A, 4 words, and of B, 2.
/// - Launch: [`launch`]`(n_blocks, threads)`.
/// - Shared memory: none, and no barrier.
/// - Cost: compute bound, `32768 · n_rounds` operations of each warp.
/// - Determinism: tensor cores sum in their own order, the same on every run.
/// - Source: PTX ISA, `mma.m16n8k16`.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS)]
pub unsafe fn mma_chains(out: Disjoint<f32>, factors: Global<u32>, n_rounds: u32) {
    let (i, _) = place();
    let first = (i % 32) * FACTOR_WORDS;
    let word = |k: usize| factors[first + k];
    let (a, b) = ([word(0), word(1), word(2), word(3)], [word(4), word(5)]);
    let mut sums = [[0.0_f32; 4]; CHAINS];
    let mut round = 0;
    while round < n_rounds {
        let mut chain = 0;
        while chain < CHAINS {
            // SAFETY: every warp runs this loop whole: its bound is the launch's.
            sums[chain] = unsafe { mma::m16n8k16_f16(a, b, sums[chain]) };
            chain += 1;
        }
        round += 1;
    }
    let mut k = 0;
    while k < 4 {
        let mut total = 0.0;
        let mut chain = 0;
        while chain < CHAINS {
            total += sums[chain][k];
            chain += 1;
        }
        // SAFETY: this thread's own elements.
        unsafe { out.write(4 * i + k, total) };
        k += 1;
    }
}

/// Does nothing: what is left is the launch.
///
/// - Math: none.
/// - Shapes: none.
/// - Launch: [`launch`]`(n_blocks, threads)`.
/// - Shared memory: none, and no barrier.
/// - Cost: that of a launch.
/// - Determinism: exact.
/// - Source: none.
///
/// # Safety
///
/// Launched as above.
#[kernel(threads = THREADS)]
pub unsafe fn empty() {}
