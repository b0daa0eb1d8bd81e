//! What one grid has to do with the next, and its blocks with each other.
//!
//! On Hopper a grid may be launched while the one before it still runs (*programmatic dependent launch*, CUDA programming
//! guide, section of that name): its blocks are then resident early, and what they do before [`wait`] runs beside the end
//! of the other. `#[kernel]` begins every kernel with [`launch_dependents`] and [`wait`], so that each is safe to launch
//! that way; a kernel marked `#[kernel(…, waits)]` calls [`wait`] itself, after it asked for weights, and one marked
//! `launches` calls [`launch_dependents`] when it has asked for its last: weights that the next grid asks for earlier only
//! take their way from its own. On older targets, and
//! in the emulator, where grids follow one another, both do nothing.

use crate::{Atomics, Shared, machine, thread};

/// `griddepcontrol.launch_dependents`: the next grid may start once all blocks of this one have said so or returned. A block
/// has said so when one of its threads has, and may say it again.
#[inline(always)]
pub fn launch_dependents() {
    machine::launch_dependents();
}

/// `griddepcontrol.wait`: until the grids before this one are done and what they wrote can be read.
///
/// Before it a kernel reads only what no launch writes (weights), and writes nothing: the grid before may still read. The
/// emulator faults a write before it, and a thread of a `waits` kernel that returns without it.
///
/// # Safety
///
/// Called by every thread of the grid, once, in code that whole warps run.
#[inline(always)]
pub unsafe fn wait() {
    // SAFETY: the caller's promise.
    unsafe { machine::wait_for_grids() }
}

/// Counts a block as arrived at counter `i`, and says whether it is the last of `expected`: then everything that the
/// others wrote before they arrived can be read. The last sets the counter back to 0, for the next launch.
///
/// `flags` is for this call alone, an element for each thread of the block.
///
/// # Safety
///
/// The whole block is here; no more than `expected` blocks arrive at the counter in a launch, and nobody else changes it.
#[inline(always)]
#[track_caller]
pub unsafe fn is_last_block(counter: Atomics<u32>, i: usize, expected: u32, flags: Shared<u32>) -> bool {
    let thread = thread::thread_idx_x()
        + thread::block_dim_x() * (thread::thread_idx_y() + thread::block_dim_y() * thread::thread_idx_z());
    // SAFETY: the caller's promise; each thread writes its own flag, and the first the one that all read.
    unsafe {
        thread::sync_threads();
        let before = if thread == 0 { counter.arrive(i, expected - 1) } else { 0 };
        flags.write(thread as usize, before);
        thread::sync_threads();
        let last = flags.read(0) == expected - 1;
        machine::acquired(last);
        last
    }
}
