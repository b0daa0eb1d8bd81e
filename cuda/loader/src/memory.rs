//! Page-locked host memory and copies that do not wait.

use std::alloc::Layout;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::slice;

use cust::memory::bytemuck::Pod;
use cust::stream::Stream;
use cust::sys::CUdeviceptr;

use crate::{Error, check, symbols};

/// Free and total memory of the current context's device, in bytes.
///
/// # Errors
///
/// [`Error::Call`] if no context is current.
pub fn memory_info() -> Result<(usize, usize), Error> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both outlive the call.
    check(unsafe { symbols::cuMemGetInfo_v2(&mut free, &mut total) })?;
    Ok((free, total))
}

/// Host memory that the driver has locked into RAM, so that copies to and from the device need no staging and run
/// beside other work. Reads as zeros at first.
#[derive(Debug)]
pub struct PinnedBuffer<T: Pod> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its memory as a `Vec` does, and the driver ties page-locked memory to no thread.
unsafe impl<T: Pod + Send> Send for PinnedBuffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Pod + Sync> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// Allocates `len` zeros.
    ///
    /// # Errors
    ///
    /// - [`Error::TooLarge`] if their size in bytes does not fit an allocation.
    /// - [`Error::Call`] if the driver has no such memory left or no context is current.
    pub fn zeroed(len: usize) -> Result<Self, Error> {
        let too_large = |_| Error::TooLarge { elements: len, element_bytes: size_of::<T>() };
        let bytes = Layout::array::<T>(len).map_err(too_large)?.size();
        if bytes == 0 {
            return Ok(Self { start: NonNull::dangling(), len }); // The driver refuses to allocate nothing.
        }
        let mut start: *mut c_void = ptr::null_mut();
        // SAFETY: `start` outlives the call.
        check(unsafe { symbols::cuMemAllocHost_v2(&mut start, bytes) })?;
        let start = NonNull::new(start.cast::<T>()).expect("the driver reports success with an address");
        assert!(start.is_aligned(), "the driver allocates whole pages");
        // SAFETY: `len` elements were allocated there, and all-zero bytes are a value of any `Pod`.
        unsafe { start.write_bytes(0, len) };
        Ok(Self { start, len })
    }
}

impl<T: Pod> Deref for PinnedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialized elements, owned by this value; dangling only if they take no bytes.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for PinnedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        if size_of_val::<[T]>(self) != 0 {
            // SAFETY: allocated by `zeroed`, not used again. A failure cannot be reported from here.
            unsafe { symbols::cuMemFreeHost(self.start.as_ptr().cast()) };
        }
    }
}

/// Copies `host` to `device` in `stream`'s order, without waiting if `host` is page-locked.
///
/// # Errors
///
/// [`Error::Call`] if the copy cannot be queued or an earlier asynchronous call failed.
///
/// # Safety
///
/// - `device` is valid for a write of `host`'s size in bytes.
/// - Until `stream` has passed the copy, `host` stays alive and unchanged, and nothing else uses that device memory. If
///   the stream is captured, this holds for every replay.
pub unsafe fn copy_to_device_async<T: Pod>(device: CUdeviceptr, host: &[T], stream: &Stream) -> Result<(), Error> {
    // SAFETY: `host` is valid for its size; the rest is the caller's promise.
    check(unsafe { symbols::cuMemcpyHtoDAsync_v2(device, host.as_ptr().cast(), size_of_val(host), stream.as_inner()) })
}

/// Copies from `device` to `host` in `stream`'s order, without waiting if `host` is page-locked.
///
/// # Errors
///
/// [`Error::Call`] if the copy cannot be queued or an earlier asynchronous call failed.
///
/// # Safety
///
/// - `device` is valid for a read of `host`'s size in bytes.
/// - Until `stream` has passed the copy, `host` stays alive and unread, and nothing writes that device memory. If the
///   stream is captured, this holds for every replay.
pub unsafe fn copy_to_host_async<T: Pod>(host: &mut [T], device: CUdeviceptr, stream: &Stream) -> Result<(), Error> {
    // SAFETY: `host` is valid for its size; the rest is the caller's promise.
    check(unsafe {
        symbols::cuMemcpyDtoHAsync_v2(host.as_mut_ptr().cast(), device, size_of_val(host), stream.as_inner())
    })
}

/// Copies `bytes` bytes inside the device's memory, in `stream`'s order.
///
/// # Errors
///
/// [`Error::Call`] if the copy cannot be queued or an earlier asynchronous call failed.
///
/// # Safety
///
/// `to` and `from` are valid for `bytes` bytes, do not overlap, and nothing else writes them until `stream` has passed
/// the copy.
pub unsafe fn copy_on_device_async(
    to: CUdeviceptr,
    from: CUdeviceptr,
    bytes: usize,
    stream: &Stream,
) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    check(unsafe { symbols::cuMemcpyDtoDAsync_v2(to, from, bytes, stream.as_inner()) })
}

/// Sets `bytes` bytes of the device's memory to `value`, in `stream`'s order.
///
/// # Errors
///
/// [`Error::Call`] if the fill cannot be queued or an earlier asynchronous call failed.
///
/// # Safety
///
/// `device` is valid for a write of `bytes` bytes, and nothing else uses them until `stream` has passed the fill.
pub unsafe fn fill_async(device: CUdeviceptr, value: u8, bytes: usize, stream: &Stream) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    check(unsafe { symbols::cuMemsetD8Async(device, value, bytes, stream.as_inner()) })
}
