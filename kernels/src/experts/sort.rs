//! Which tokens go to which expert.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Disjoint, Global, kernel, shared_array, thread, warp};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{Entry, Launch};

/// Words of an entry of the list of tiles: expert, first place in the sorted list, number of pairs.
pub const TILE_WORDS: u32 = 3;

/// The pairs of an expert's tiles but the last are a multiple of this: the pairs of a tensor core's fragment.
pub const TILE_QUANTUM: u32 = 8;

const THREADS: u32 = 512;
const WARPS: u32 = THREADS / WARP_SIZE;
const COUNTS: usize = THREADS as usize;
/// Ids that a lane loads before it looks at the first.
const AHEAD: usize = 4;
const STEP: u32 = AHEAD as u32 * WARP_SIZE;

/// The kernels of this file.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&Entry] = &[experts_sort::ENTRY];

/// The one geometry [`experts_sort`](fn@experts_sort) is written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_expert: u32) -> Launch {
    Launch::linear(n_expert, THREADS)
}

/// Tiles in the list for so many pairs, used or not. Experts e of `cₑ` pairs need `Σ ⌈cₑ / tile_pairs⌉` tiles, which is never
/// more.
pub const fn n_tiles(n_pairs: u32, n_expert: u32, tile_pairs: u32) -> u32 {
    n_pairs / tile_pairs + n_expert
}

/// An entry of the list of tiles: pairs of one expert.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) expert: u32,
    /// Its first place in the sorted list.
    pub(super) first: u32,
    /// Number of its places, at least 1.
    pub(super) count: u32,
}

impl Job {
    /// That of this block, by its index y; `None`, for the whole block, if it has nothing to do.
    #[inline(always)]
    pub(super) fn of_block(tiles: Global<u32>) -> Option<Self> {
        let job = Self::read(tiles);
        if job.count == 0 { None } else { Some(job) }
    }

    /// That of this block, which may have no pairs.
    #[inline(always)]
    pub(super) fn read(tiles: Global<u32>) -> Self {
        let at = (thread::block_idx_y() * TILE_WORDS) as usize;
        Self { expert: tiles[at], first: tiles[at + 1], count: tiles[at + 2] }
    }

    /// The place in the sorted list that this thread looks up; those past the tile's last repeat it.
    #[inline(always)]
    pub(super) fn place_of_thread(self) -> u32 {
        self.first + thread::thread_idx_x().min(self.count - 1)
    }
}

/// Sorts pairs of token and slot by expert, and cuts each expert's share into tiles.
///
/// - Math: `pairs` is the permutation of `0..n_pairs` that sorts by `(ids[p], p)`. Expert e's pairs start at place
///   `bₑ = |{p : ids[p] < e}|`, and its tiles fill entries `⌊bₑ / tile_pairs⌋ + e` up to those of `e + 1`: enough for all
///   its pairs, whatever they are, and known without the counts of other experts. They are as few as can be, and equal but
///   for the last, in multiples of [`TILE_QUANTUM`]; entries left over have no pairs.
/// - Shapes: `pairs`: `[n_pairs]`; `tiles`: `[n_tiles(n_pairs, n_expert, tile_pairs), 3]`; `ids`: `[n_pairs]`, each below
///   n_expert. `tile_pairs` is a multiple of [`TILE_QUANTUM`], other than 0.
/// - Launch: [`launch`]`(n_expert)`. A block owns an expert, a warp a sixteenth of the pairs, in order.
/// - Shared memory: 4 KiB, two counts of each warp in each thread's place; one barrier.
/// - Cost: latency; each expert's block reads `ids` twice.
/// - Determinism: exact.
/// - Source: none.
///
/// # Safety
///
/// Launched as above; the slices have the shapes written above.
#[kernel(threads = THREADS, blocks_per_sm = 2)]
pub unsafe fn experts_sort(pairs: Disjoint<u32>, tiles: Disjoint<u32>, ids: Global<u32>, tile_pairs: u32) {
    let (expert, thread) = (thread::block_idx_x(), thread::thread_idx_x());
    let (warp_idx, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
    let n_pairs = ids.len() as u32;
    let share = n_pairs.div_ceil(WARPS * STEP) * STEP;
    let (first, end) = ((warp_idx * share).min(n_pairs), ((warp_idx + 1) * share).min(n_pairs));

    let (mut n_less, mut n_equal) = (0, 0);
    let mut at = first;
    while at < end {
        let found = load(ids, at + lane, end);
        let mut i = 0;
        while i < AHEAD {
            // SAFETY: a warp has one share, so all 32 lanes are here.
            unsafe {
                n_less += warp::ballot(found[i] < expert).count_ones();
                n_equal += warp::ballot(found[i] == expert).count_ones();
            }
            i += 1;
        }
        at += STEP;
    }

    let less = shared_array!(experts_sort_less: [u32; COUNTS]);
    let equal = shared_array!(experts_sort_equal: [u32; COUNTS]);
    // The expert's first place, this warp's, and how many pairs the expert has.
    let (mut base, mut place, mut count) = (0, 0, 0);
    // SAFETY: the whole block is here; each thread writes its own element, and the barrier orders that before the reads.
    unsafe {
        less.write(thread as usize, n_less);
        equal.write(thread as usize, n_equal);
        thread::sync_threads();
        let mut w = 0;
        while w < WARPS {
            base += less.read((w * WARP_SIZE) as usize);
            let of_warp = equal.read((w * WARP_SIZE) as usize);
            place += if w < warp_idx { of_warp } else { 0 };
            count += of_warp;
            w += 1;
        }
    }
    place += base;

    let mut at = first;
    while at < end {
        let found = load(ids, at + lane, end);
        let mut i = 0;
        while i < AHEAD {
            let mine = found[i] == expert;
            // SAFETY: as above.
            let all = unsafe { warp::ballot(mine) };
            if mine {
                let before = (all & ((1 << lane) - 1)).count_ones();
                // SAFETY: places of warps, steps and lanes are distinct, and so are those of experts.
                unsafe { pairs.write((place + before) as usize, at + i as u32 * WARP_SIZE + lane) };
            }
            place += all.count_ones();
            i += 1;
        }
        at += STEP;
    }

    // The contract says so; the compiler does not know.
    let tile_pairs = tile_pairs.max(TILE_QUANTUM);
    let first_tile = base / tile_pairs + expert;
    let end_tile = (base + count) / tile_pairs + expert + 1;
    let n_needed = count.div_ceil(tile_pairs).max(1);
    let size = count.div_ceil(n_needed).next_multiple_of(TILE_QUANTUM);
    let mut tile = first_tile + thread;
    while tile < end_tile {
        let done = ((tile - first_tile) * size).min(count);
        let at = (tile * TILE_WORDS) as usize;
        // SAFETY: the entry is this thread's alone.
        unsafe {
            tiles.write(at, expert);
            tiles.write(at + 1, base + done);
            tiles.write(at + 2, (count - done).min(size));
        }
        tile += THREADS;
    }
}

/// Ids `at`, `at + 32`, …; those from `end` on count as no expert's, nor below any.
#[inline(always)]
fn load(ids: Global<u32>, at: u32, end: u32) -> [u32; AHEAD] {
    let mut found = [u32::MAX; AHEAD];
    let mut i = 0;
    while i < AHEAD {
        let at = at + i as u32 * WARP_SIZE;
        if at < end {
            found[i] = ids[at as usize];
        }
        i += 1;
    }
    found
}
