//! Copies much from host to device: one half of the staging memory is filled while the other is copied.

use std::ops::{DerefMut, Range};

use rayon::prelude::*;

use super::{Buffer, Error, SharedDevice};

/// Host memory that a device copies from at full speed; page-locked where that makes a difference.
pub trait Staging: DerefMut<Target = [u8]> + Send + Sync {}
impl<T: DerefMut<Target = [u8]> + Send + Sync> Staging for T {}

/// A part of staging memory and where it goes in a buffer, both in bytes.
pub struct Segment {
    /// Of the part that was filled.
    pub from: Range<usize>,
    /// Of the buffer.
    pub to: usize,
}

/// Fills parts of staging memory on all cores and copies them to the device, both at once.
pub struct Uploader {
    device: SharedDevice,
    halves: [Vec<Box<dyn Staging>>; 2],
    /// Which half is to be filled next; the other may still be copied.
    next: usize,
}

impl Uploader {
    /// With `2 · n_parts` parts of `part_bytes` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if the driver cannot lock so much memory.
    pub fn new(device: &SharedDevice, n_parts: usize, part_bytes: usize) -> Result<Self, Error> {
        let half = || (0..n_parts).map(|_| device.staging(part_bytes)).collect::<Result<Vec<_>, _>>();
        Ok(Self { device: SharedDevice::clone(device), halves: [half()?, half()?], next: 0 })
    }

    /// Most parts of a batch.
    pub fn n_parts(&self) -> usize {
        self.halves[0].len()
    }

    /// Lets `fill` fill parts `0..n_parts`, each on some core, and starts copying what it names to `into`. Returns the bytes
    /// named. They have arrived once [`finish`](Self::finish) returns.
    ///
    /// # Errors
    ///
    /// Those of [`Device::copy_to_device`](super::Device::copy_to_device).
    ///
    /// # Panics
    ///
    /// If there are fewer parts, or a segment reaches past its part or the buffer: the caller's bug.
    pub fn batch(
        &mut self,
        into: &Buffer<u8>,
        n_parts: usize,
        fill: impl Fn(usize, &mut [u8]) -> Vec<Segment> + Sync,
    ) -> Result<u64, Error> {
        let half = &mut self.halves[self.next][..n_parts];
        let filled: Vec<Vec<Segment>> = half.par_iter_mut().enumerate().map(|(i, part)| fill(i, part)).collect();
        // Copies of the other half have had all this time; once they are done it may be filled again.
        self.device.synchronize()?;
        let mut bytes = 0;
        for (segments, part) in filled.iter().zip(&*half) {
            for Segment { from, to } in segments {
                let target = into.slice().slice(*to..*to + from.len());
                // SAFETY: the part is not touched before the next synchronization, above or in `finish` or on drop.
                unsafe { self.device.copy_to_device_async(target.address(), &part[from.clone()])? };
                bytes += from.len() as u64;
            }
        }
        self.next = 1 - self.next;
        Ok(bytes)
    }

    /// Waits for all copies.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if one failed.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.device.synchronize()
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // Staging memory is freed next. A failure was or will be reported by another call.
        let _ = self.device.synchronize();
    }
}
