//! `cp.async`: copies of 16 or 4 bytes from device to shared memory that run beside arithmetic, sm_80 and later.
//!
//! [`Shared::copy_async`](crate::Shared::copy_async) and [`Shared::copy_async4`](crate::Shared::copy_async4) issue a copy, [`commit`] closes a group of them, [`wait`] waits for
//! this thread's groups; a barrier then makes them visible to the block.

use crate::machine;

/// `cp.async.commit_group`: closes the group of copies this thread issued since the last.
#[inline(always)]
pub fn commit() {
    machine::cp_async_commit();
}

/// `cp.async.wait_group PENDING`: waits until at most `PENDING` of this thread's newest groups are under way.
#[inline(always)]
#[track_caller]
pub fn wait<const PENDING: u32>() {
    machine::cp_async_wait::<PENDING>();
}
