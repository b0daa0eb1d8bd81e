//! The one seam between the engine and the machine it runs on: allocate, copy, launch, synchronize, record and replay.
//!
//! [`Emulated`] runs the kernels in `cuda_std`'s emulator; [`Cuda`] runs them on an NVIDIA GPU. The engine cannot tell them
//! apart. This module and its tests are where the host is `unsafe`: launches and the driver.

#![expect(unsafe_code, reason = "launches kernels and owns device memory")]

mod buffer;
mod ceiling;
mod cuda;
mod emulated;
pub mod ops;
mod upload;

use std::sync::Arc;

use cuda_std::emulator::MemoryError;
use cuda_std::{LaunchError, Launcher};

pub use buffer::{Arena, Buffer, Plain, View, padded};
pub use ceiling::{StreamShape, read_bandwidth, stream_read};
pub use cuda::{Cuda, CudaOptions, PtxBuild};
pub use emulated::Emulated;
pub use upload::{Segment, Staging, upload};

/// A machine that holds memory and runs kernels, in the order they are launched.
pub trait Device: Launcher + Send + Sync {
    /// What to call it in messages: the card's name, or the emulator's.
    fn name(&self) -> String;

    /// How many blocks run side by side at least: a GPU's multiprocessors, the emulator's threads. One token's experts are dealt
    /// out to as many.
    fn multiprocessors(&self) -> u32;

    /// Whether it runs kernels marked `warpgroups`: Hopper's, in its own PTX.
    fn has_warpgroups(&self) -> bool;

    /// Whether one token's products are cheaper without tensor cores and in few threads: an emulated `mma` costs the same whether
    /// one of its eight columns counts or all, and a thread costs more than its share of a product.
    fn prefers_scalars(&self) -> bool {
        false
    }

    /// Its memory right now.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if the driver does not answer.
    fn memory(&self) -> Result<MemoryInfo, Error>;

    /// Allocates `bytes` of device memory, aligned to 256; contents are undefined.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if the device, or its `--vram-limit`, has not that much left.
    fn allocate(&self, bytes: usize) -> Result<u64, Error>;

    /// Frees what `allocate` gave.
    ///
    /// # Safety
    ///
    /// `address` came from this device's `allocate`, is freed once, and no launch that uses it is still to come.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Copies host bytes to the device; they may be reused on return.
    ///
    /// # Errors
    ///
    /// - [`Error::Memory`] if the range is not allocated.
    /// - [`Error::Driver`] if the driver reports anything, earlier kernels' faults included.
    fn copy_to_device(&self, address: u64, from: &[u8]) -> Result<(), Error>;

    /// Starts a copy of host bytes to the device, in order with launches.
    ///
    /// # Errors
    ///
    /// As [`copy_to_device`](Self::copy_to_device).
    ///
    /// # Safety
    ///
    /// `from` lives unchanged until [`synchronize`](Self::synchronize).
    unsafe fn copy_to_device_async(&self, address: u64, from: &[u8]) -> Result<(), Error>;

    /// Host memory, zeroed, from which such copies run beside the host's work.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if the driver cannot lock so much memory.
    fn staging(&self, bytes: usize) -> Result<Box<dyn Staging>, Error>;

    /// Waits for all launches, then copies device bytes to the host.
    ///
    /// # Errors
    ///
    /// As [`copy_to_device`](Self::copy_to_device); in the checked emulator also if nothing wrote one of the bytes.
    fn copy_to_host(&self, address: u64, to: &mut [u8]) -> Result<(), Error>;

    /// Sets `bytes` device bytes to `byte`, in order with launches.
    ///
    /// # Errors
    ///
    /// As [`copy_to_device`](Self::copy_to_device).
    fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<(), Error>;

    /// Waits for all launches.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if one of them failed.
    fn synchronize(&self) -> Result<(), Error>;

    /// A mark behind everything that was queued so far, by any thread.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if the driver fails.
    fn fence(&self) -> Result<Box<dyn Fence>, Error>;

    /// Gets the kernels ready that `body` launches, on all cores, and launches none. Otherwise each is made ready at its first
    /// launch, which then takes a fifth of a second longer on a GPU.
    ///
    /// # Errors
    ///
    /// Those of `body`, and [`Error::Launch`] for a kernel that the driver refuses.
    fn preload(&self, body: &mut dyn FnMut(&dyn Launcher) -> Result<(), LaunchError>) -> Result<(), Error>;

    /// Records the launches that `body` makes, without running them. Calls it twice: once to get its kernels ready.
    ///
    /// # Errors
    ///
    /// Those of `body`, and [`Error::Driver`].
    ///
    /// # Safety
    ///
    /// The memory that the launches name outlives the graph.
    unsafe fn record(
        &self,
        body: &mut dyn FnMut(&dyn Launcher) -> Result<(), LaunchError>,
    ) -> Result<Box<dyn Graph>, Error>;
}

/// A mark in the order of copies and launches.
pub trait Fence: Send {
    /// Waits for what was queued before it.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if that failed.
    fn wait(&self) -> Result<(), Error>;
}

/// Recorded launches.
pub trait Graph: Send {
    /// Runs them in their order, after what was launched before.
    ///
    /// # Errors
    ///
    /// [`Error::Launch`] or [`Error::Driver`], as the launches themselves.
    fn replay(&self) -> Result<(), Error>;

    /// How many launches it holds.
    fn n_nodes(&self) -> usize;
}

/// A device shared by the buffers on it.
pub type SharedDevice = Arc<dyn Device>;

/// Device memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// What can still be allocated.
    pub free: u64,
    /// What the device has, or `--vram-limit` if that is less.
    pub total: u64,
    /// What the device reported as taken right after it was opened: by other processes, and by the driver for itself.
    pub before: u64,
    /// What it has reported as taken since; other processes' changes count, too.
    pub since: u64,
}

/// What went wrong on the device.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("out of device memory: {wanted} bytes wanted, {free} of {total} free")]
    OutOfMemory { wanted: u64, free: u64, total: u64 },
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("device memory")]
    Memory(#[from] MemoryError),
    #[error("{call} failed after kernel {after}: {reason}")]
    Driver { call: &'static str, after: &'static str, reason: String },
    #[error("no CUDA device: {reason}; run `gamma doctor`")]
    NoDevice { reason: String },
}
