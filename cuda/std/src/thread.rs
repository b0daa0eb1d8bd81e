//! Which thread this is, and the block's barrier.

use crate::machine;

/// `%tid.x`: this thread's index in its block.
#[inline(always)]
pub fn thread_idx_x() -> u32 {
    machine::thread_idx()[0]
}

/// `%tid.y`.
#[inline(always)]
pub fn thread_idx_y() -> u32 {
    machine::thread_idx()[1]
}

/// `%tid.z`.
#[inline(always)]
pub fn thread_idx_z() -> u32 {
    machine::thread_idx()[2]
}

/// `%ctaid.x`: this block's index in the grid.
#[inline(always)]
pub fn block_idx_x() -> u32 {
    machine::block_idx()[0]
}

/// `%ctaid.y`.
#[inline(always)]
pub fn block_idx_y() -> u32 {
    machine::block_idx()[1]
}

/// `%ctaid.z`.
#[inline(always)]
pub fn block_idx_z() -> u32 {
    machine::block_idx()[2]
}

/// `%ntid.x`: threads of a block along x.
#[inline(always)]
pub fn block_dim_x() -> u32 {
    machine::block_dim()[0]
}

/// `%ntid.y`.
#[inline(always)]
pub fn block_dim_y() -> u32 {
    machine::block_dim()[1]
}

/// `%nctaid.x`: blocks of the grid along x.
#[inline(always)]
pub fn grid_dim_x() -> u32 {
    machine::grid_dim()[0]
}

/// `%nctaid.y`.
#[inline(always)]
pub fn grid_dim_y() -> u32 {
    machine::grid_dim()[1]
}

/// `%nctaid.z`.
#[inline(always)]
pub fn grid_dim_z() -> u32 {
    machine::grid_dim()[2]
}

/// `barrier.cta.sync.aligned.all 0`: waits for every thread of the block and orders their memory accesses.
///
/// # Safety
///
/// Every thread of the block gets here, at this same call, and none has returned. The emulator reports a violation; a GPU
/// hangs or races.
#[inline(always)]
#[track_caller]
pub unsafe fn sync_threads() {
    // SAFETY: the caller's promise.
    unsafe { machine::sync_threads() }
}
