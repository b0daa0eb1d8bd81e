//! What a block does with its run of rows.

use super::{ADD, GROUP_STRIDE, PART, RING, ROUTER_FLOATS, THREADS, accumulate, finish};
use crate::block;
use crate::format::{Format, GROUP, Place};
use cuda_std::warp::{self, WARP_SIZE};
use cuda_std::{Disjoint, Float, Global, Shared, grid, shared_array, thread};

/// The ring, then `x`.
const SHARED_FLOATS: usize = (RING + PART / GROUP * GROUP_STRIDE) as usize;
const ROUTER_LEN: usize = ROUTER_FLOATS as usize;
const SUMS: usize = THREADS as usize;
/// Threads that sum a row of the ring.
pub(super) const LANES: u32 = 8;
/// Quads of a vector that a thread loads together.
const QUADS: usize = 3;

/// Shared memory of the kernels without a router.
#[inline(always)]
pub(super) fn memory() -> Shared<f32> {
    shared_array!(matvec_memory: [f32; SHARED_FLOATS])
}

/// A sum for each thread.
#[inline(always)]
fn sums() -> Shared<f32> {
    shared_array!(matvec_sums: [f32; SUMS])
}

/// And a second, for layer normalization.
#[inline(always)]
fn squares_of_threads() -> Shared<f32> {
    shared_array!(matvec_squares: [f32; SUMS])
}

/// Shared memory of the kernels with one.
#[inline(always)]
pub(super) fn router_memory() -> Shared<f32> {
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
pub(super) struct Norm {
    pub gamma: Global<f32>,
    pub beta: Global<f32>,
    pub epsilon: f32,
}

impl Norm {
    #[inline(always)]
    fn is_rms(&self) -> bool {
        self.gamma.len() > 0 && self.beta.len() == 0
    }
}

/// The router that reads the residual, and where in shared memory its part of the weights lies.
pub(super) struct Router {
    pub weight: Global<f32>,
    pub gamma: Global<f32>,
    pub n_expert: u32,
    pub at: u32,
}

/// A block's run of rows, and its thread.
pub(super) struct Run {
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
    pub(super) fn new(place: Place, n_rows: u32, n_out: u32, shared: Shared<f32>) -> Self {
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

    /// Computes the run's rows of `out`, `ROWS` rows of `DEPTH` groups at a step; the next step's are loaded before this one's
    /// are used if `AHEAD`, which takes registers for both. `prepare` runs before the grid waits. `done(row, value)` is called by eight threads for each row, in code that the whole
    /// block runs; the first of the eight gives what it wrote. Rows past the end, and values of the others, mean nothing.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    pub(super) unsafe fn products<F: Format, const ROWS: usize, const DEPTH: usize, const AHEAD: bool>(
        &self,
        x: Global<f32>,
        norm: Option<Norm>,
        bias: Global<f32>,
        out: Disjoint<f32>,
        epilogue: u32,
        prepare: impl Fn(),
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
            // Rows that are multiplied together; an item is a group of each.
            const { assert!(PART / GROUP + DEPTH as u32 * THREADS <= RING / ROWS as u32, "a step and an open row") };
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
                    prepare();
                    grid::wait();
                    if epilogue == ADD && slot < n_rows && lane == 0 {
                        first_before = out.read_unchecked((self.first_row + slot) as usize);
                    }
                } else {
                    thread::sync_threads();
                }
                self.stage(x, part * GROUP, width * GROUP, norm);
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
                            let (mut four, mut k) = ([0.0; 4], 0);
                            while k < 4 {
                                let item = item + k as u32 * LANES;
                                if item < end {
                                    // SAFETY: written before the barrier.
                                    four[k] = unsafe { shared.read(ring_at::<ROWS>(item, r)) };
                                }
                                k += 1;
                            }
                            sum += (four[0] + four[1]) + (four[2] + four[3]);
                            item += 4 * LANES;
                        }
                    }
                    // SAFETY: whole warps are here.
                    let y = unsafe { warp::sum_of::<LANES>(sum) } * scale + start;
                    // A sum is whole with the last part; until then `out` holds what there is.
                    let value = if is_last || epilogue == ADD { finish(epilogue, y, || before) } else { y };
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

    /// Calls `f` with the index and the numbers of each quad of this thread in `x[start..start + len]`. Some loads are under
    /// way at a time: a vector is read once, and its latency is all that counts.
    #[inline(always)]
    fn each_quad(&self, x: Global<f32>, start: u32, len: u32, mut f: impl FnMut(u32, [f32; 4])) {
        let mut first = 4 * self.thread;
        while first < len {
            let (mut quads, mut k) = ([[0.0; 4]; QUADS], 0);
            while k < QUADS {
                let i = first + k as u32 * 4 * self.n_threads;
                if i < len {
                    // SAFETY: inside, in whole 16 bytes since rows are whole groups.
                    quads[k] = unsafe { x.load16((start + i) as usize) }.map(f32::from_bits);
                }
                k += 1;
            }
            k = 0;
            while k < QUADS {
                let i = first + k as u32 * 4 * self.n_threads;
                if i < len {
                    f(i, quads[k]);
                }
                k += 1;
            }
            first += QUADS as u32 * 4 * self.n_threads;
        }
    }

    /// Brings γ to where `x` will be, and β to where the ring will be: each thread what it will need itself.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    unsafe fn stage_norm(&self, norm: Option<Norm>) {
        let Some(Norm { gamma, beta, .. }) = norm else { return };
        // SAFETY: both fit by the launch contract; every thread writes its own.
        let put = |at: usize, quad: [f32; 4]| unsafe { self.shared.store16(at, quad.map(f32::to_bits)) };
        self.each_quad(gamma, 0, gamma.len() as u32, |i, quad| put(Self::staged(i), quad));
        self.each_quad(beta, 0, beta.len() as u32, |i, quad| put(i as usize, quad));
    }

    /// Brings elements `start..start + len` of `x` to shared memory: layer-normalized, or with RMS normalization scaled by
    /// γ, each warp's sum of squares left in [`sums`].
    ///
    /// # Safety
    ///
    /// The whole block is here, no longer reads the last part, and passes a barrier next. With a norm this is the only part.
    #[inline(always)]
    unsafe fn stage(&self, x: Global<f32>, start: u32, len: u32, norm: Option<Norm>) {
        let n_warps = self.n_threads / WARP_SIZE;
        // SAFETY: every thread reads and writes its own; γ and β are there since `stage_norm`.
        let (own, put) = (
            |at: usize| unsafe { self.shared.load16(at) }.map(f32::from_bits),
            |at: usize, quad: [f32; 4]| unsafe { self.shared.store16(at, quad.map(f32::to_bits)) },
        );
        match norm {
            Some(norm) if norm.is_rms() => {
                let mut squares = 0.0;
                self.each_quad(x, start, len, |i, x| {
                    squares += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
                    let gamma = own(Self::staged(i));
                    put(Self::staged(i), [x[0] * gamma[0], x[1] * gamma[1], x[2] * gamma[2], x[3] * gamma[3]]);
                });
                // SAFETY: whole warps are here.
                unsafe { block::leave_sum(squares, self.thread, sums()) };
            }
            Some(norm) if norm.gamma.len() > 0 => {
                let mut sum = 0.0;
                self.each_quad(x, start, len, |_, x| sum += (x[0] + x[1]) + (x[2] + x[3]));
                // SAFETY: the whole block is here; its sums are its own.
                let mean = unsafe { block::sum(sum, self.thread, n_warps, sums()) } / len as f32;

                // A second pass, since E[x²] − E[x]² cancels when |mean| ≫ σ.
                let mut squares = 0.0;
                self.each_quad(x, start, len, |_, x| {
                    let [a, b, c, d] = x.map(|x| x - mean);
                    squares += (a * a + b * b) + (c * c + d * d);
                });
                // SAFETY: as above.
                let squares = unsafe { block::sum(squares, self.thread, n_warps, squares_of_threads()) };
                let rstd = Float::rsqrt(squares / len as f32 + norm.epsilon);
                self.each_quad(x, start, len, |i, x| {
                    let (gamma, beta) = (own(Self::staged(i)), own(i as usize));
                    let normal = [
                        (x[0] - mean) * rstd * gamma[0] + beta[0],
                        (x[1] - mean) * rstd * gamma[1] + beta[1],
                        (x[2] - mean) * rstd * gamma[2] + beta[2],
                        (x[3] - mean) * rstd * gamma[3] + beta[3],
                    ];
                    put(Self::staged(i), normal);
                });
            }
            _ => self.each_quad(x, start, len, |i, x| put(Self::staged(i), x)),
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
        Float::rsqrt(squares / norm.gamma.len() as f32 + norm.epsilon)
    }

    /// Adds the run's rows to `out`, and writes what they contribute to the router's logits.
    ///
    /// # Safety
    ///
    /// That of the kernels.
    #[inline(always)]
    pub(super) unsafe fn routed<F: Format, const ROWS: usize, const DEPTH: usize, const AHEAD: bool>(
        &self,
        x: Global<f32>,
        bias: Global<f32>,
        out: Disjoint<f32>,
        router: &Router,
        parts: Disjoint<f32>,
    ) {
        let (n_expert, n_rows, shared) = (router.n_expert, self.n_rows.max(1), self.shared);
        let values_at = router.at + n_expert * n_rows;
        // The router's weights for the run's rows, with the norm's scale.
        let prepare = || {
            let mut i = self.thread;
            while i < n_expert * n_rows {
                let (e, row) = (i / n_rows, i % n_rows);
                // SAFETY: the expert and row exist; every element has one writer.
                unsafe {
                    let weights = router.weight.row_unchecked(e as usize, router.gamma.len());
                    shared.write((router.at + i) as usize, self.at(weights, row) * self.at(router.gamma, row));
                }
                i += self.n_threads;
            }
        };
        // SAFETY: the caller's promise. Every thread writes its own element for each row.
        unsafe {
            self.products::<F, ROWS, DEPTH, AHEAD>(x, None, bias, out, ADD, prepare, |row, value| {
                shared.write((values_at + row * LANES + self.thread % LANES) as usize, value);
            });
            thread::sync_threads();
        }

        let (slot, lane, n_parts) = (self.thread / LANES, self.thread % LANES, n_expert + 1);
        let mut round = 0;
        while round < n_parts {
            let e = round + slot;
            let (mut sum, mut row) = (0.0, lane);
            while e < n_parts && row < n_rows {
                // SAFETY: written before the barrier.
                unsafe {
                    let value = shared.read((values_at + row * LANES) as usize);
                    let weight =
                        if e < n_expert { shared.read((router.at + e * n_rows + row) as usize) } else { value };
                    sum += weight * value;
                }
                row += LANES;
            }
            // SAFETY: whole warps are here; one element for each slot.
            unsafe {
                let sum = warp::sum_of::<LANES>(sum);
                if e < n_parts && lane == 0 {
                    parts.write((thread::block_idx_x() * n_parts + e) as usize, sum);
                }
            }
            round += self.n_threads / LANES;
        }
    }
}
