//! What a block's threads do together.

use cuda_std::warp::WARP_SIZE;
use cuda_std::{Shared, thread, warp};

/// Leaves the sum over this thread's warp in the thread's own element of `sums`; a barrier later, [`sum_left`] reads it.
///
/// # Safety
///
/// Whole warps are here; `sums` has an element for each thread of the block, which nobody else uses.
#[inline(always)]
pub(crate) unsafe fn leave_sum(value: f32, thread: u32, sums: Shared<f32>) {
    // SAFETY: the caller's promise.
    unsafe { sums.write(thread as usize, warp::sum(value)) };
}

/// The sum over the block's `n_warps ≤ 32` warps of what [`leave_sum`] left, in every thread and in one order.
///
/// # Safety
///
/// Whole warps are here; a barrier lies between.
#[inline(always)]
pub(crate) unsafe fn sum_left(thread: u32, n_warps: u32, sums: Shared<f32>) -> f32 {
    let lane = thread % WARP_SIZE;
    // SAFETY: the caller's promise; warp `lane` exists.
    unsafe {
        let of_warp = if lane < n_warps { sums.read((lane * WARP_SIZE) as usize) } else { 0.0 };
        warp::sum(of_warp)
    }
}

/// The sum over the block, in every thread: over each warp, then over the `n_warps ≤ 32` warps.
///
/// # Safety
///
/// The whole block is here; `sums` has an element for each of its threads, and is used nowhere else.
#[inline(always)]
pub(crate) unsafe fn sum(value: f32, thread: u32, n_warps: u32, sums: Shared<f32>) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        leave_sum(value, thread, sums);
        thread::sync_threads();
        sum_left(thread, n_warps, sums)
    }
}
