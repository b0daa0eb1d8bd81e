//! Copies much from host to device: every core fills staging memory of its own while earlier parts of it are copied.

use std::num::NonZero;
use std::ops::{DerefMut, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::{Device, Error, Fence, View};

/// Host memory that a device copies from at full speed; page-locked where that makes a difference.
pub trait Staging: DerefMut<Target = [u8]> + Send + Sync {}
impl<T: DerefMut<Target = [u8]> + Send + Sync> Staging for T {}

/// A part of staging memory, in bytes, and where it goes.
pub struct Segment<'a> {
    /// Of the staging memory that was filled.
    pub from: Range<usize>,
    /// As long as `from`.
    pub to: View<'a, u8>,
}

/// Staging memory of one core: it fills one part while the other is copied.
const PARTS_PER_CORE: usize = 2;

/// Lets `fill` fill staging memory of `part_bytes` bytes for each job of `0..n_jobs`, on all cores and in no order, and copies
/// what it names to the device. All of it has arrived on return. `copied` hears of bytes queued, on the calling thread.
///
/// # Errors
///
/// - [`Error::Driver`] if the driver cannot lock so much memory, or a copy fails.
/// - Those of `fill`: no job begins after the first.
///
/// # Panics
///
/// If a segment reaches past the part or is not as long as where it goes: the caller's bug.
pub fn upload<'a, E: From<Error> + Send>(
    device: &dyn Device,
    n_jobs: usize,
    part_bytes: usize,
    fill: impl Fn(usize, &mut [u8]) -> Result<Vec<Segment<'a>>, E> + Sync,
    copied: &mut dyn FnMut(u64),
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let n_cores = thread::available_parallelism().map_or(1, NonZero::get).min(n_jobs);
    let (sender, progress) = channel();
    let work = |progress| {
        let result = work(device, &next, n_jobs, part_bytes, &fill, progress);
        if result.is_err() {
            next.store(n_jobs, Ordering::Relaxed);
        }
        result
    };
    let work = &work;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..n_cores)
            .map(|_| {
                let sender = sender.clone();
                scope.spawn(move || work(sender))
            })
            .collect();
        // Ends when the last worker drops its sender.
        drop(sender);
        progress.iter().for_each(&mut *copied);
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panics where its caller would have"))
    })
}

/// What one core does.
fn work<'a, E: From<Error>>(
    device: &dyn Device,
    next: &AtomicUsize,
    n_jobs: usize,
    part_bytes: usize,
    fill: &(impl Fn(usize, &mut [u8]) -> Result<Vec<Segment<'a>>, E> + Sync),
    progress: Sender<u64>,
) -> Result<(), E> {
    let mut parts = Vec::with_capacity(PARTS_PER_CORE);
    for _ in 0..PARTS_PER_CORE {
        parts.push(device.staging(part_bytes)?);
    }
    // Dropped before the parts, however this ends.
    let _guard = Synchronized(device);
    let mut fences = [const { None::<Box<dyn Fence>> }; PARTS_PER_CORE];
    let mut turn = 0;
    loop {
        let job = next.fetch_add(1, Ordering::Relaxed);
        if job >= n_jobs {
            return fences.iter().flatten().try_for_each(|fence| Ok(fence.wait()?));
        }
        if let Some(fence) = fences[turn].take() {
            fence.wait()?;
        }
        let part = &mut parts[turn];
        let segments = fill(job, part)?;
        let mut bytes = 0;
        for Segment { from, to } in segments {
            assert_eq!(from.len(), to.len(), "a segment and where it goes");
            // SAFETY: the part is not touched before the fence below, or the guard, has been waited for.
            unsafe { device.copy_to_device_async(to.slice().address(), &part[from.clone()])? };
            bytes += from.len() as u64;
        }
        fences[turn] = Some(device.fence()?);
        turn = (turn + 1) % PARTS_PER_CORE;
        // The receiver outlives the workers.
        let _ = progress.send(bytes);
    }
}

/// Waits for all copies on drop.
struct Synchronized<'a>(&'a dyn Device);

impl Drop for Synchronized<'_> {
    fn drop(&mut self) {
        // A failure was or will be reported by another call.
        let _ = self.0.synchronize();
    }
}
