//! Typed device memory with an owner.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cuda_std::{DeviceSlice, Element, f16};

use super::{Error, SharedDevice};

/// An [`Element`] whose bytes are its value: no padding, every bit pattern valid.
///
/// # Safety
///
/// Both hold.
pub unsafe trait Plain: Element {}
// SAFETY: primitive numbers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: `half` promises a transparent `u16`.
unsafe impl Plain for f16 {}

/// What every buffer's address is a multiple of, in bytes; [`Device::allocate`](super::Device::allocate) gives no less.
const ALIGNMENT: usize = 256;

/// Bytes that a buffer of `bytes` takes in an [`Arena`].
pub fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// One allocation of a device, freed on drop.
struct Allocation {
    device: SharedDevice,
    address: u64,
    bytes: usize,
}

impl Allocation {
    fn new(device: &SharedDevice, bytes: usize) -> Result<Arc<Self>, Error> {
        let address = device.allocate(bytes)?;
        Ok(Arc::new(Self { device: SharedDevice::clone(device), address, bytes }))
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed here only; the borrow of a buffer by whoever launches ends before.
        unsafe { self.device.free(self.address, self.bytes) };
    }
}

/// One allocation for many buffers that live equally long. It is freed with the last of them.
///
/// A driver gives memory in pieces of 2 MiB: hundreds of buffers with allocations of their own would take more than they
/// hold, and nobody could say beforehand how much.
pub struct Arena {
    memory: Arc<Allocation>,
    used: usize,
}

impl Arena {
    /// Room for buffers of `bytes` bytes together, each [`padded`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(device: &SharedDevice, bytes: usize) -> Result<Self, Error> {
        Ok(Self { memory: Allocation::new(device, bytes)?, used: 0 })
    }

    /// A buffer of `len` elements; contents are undefined.
    ///
    /// # Panics
    ///
    /// If there is no room: whoever planned the arena forgot this buffer.
    pub fn buffer<T: Plain>(&mut self, len: usize) -> Buffer<T> {
        let bytes = padded(len * size_of::<T>());
        assert!(bytes <= self.left(), "an arena has {} bytes left, a buffer of {bytes} was not planned", self.left());
        let address = self.memory.address + self.used as u64;
        self.used += bytes;
        Buffer { memory: Arc::clone(&self.memory), address, len, elements: PhantomData }
    }

    /// Bytes that no buffer has taken.
    pub fn left(&self) -> usize {
        self.memory.bytes - self.used
    }
}

/// `len` elements of device memory, freed on drop.
pub struct Buffer<T: Plain> {
    memory: Arc<Allocation>,
    address: u64,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Room for `len` elements, allocated for them alone; contents are undefined.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(device: &SharedDevice, len: usize) -> Result<Self, Error> {
        let memory = Allocation::new(device, len * size_of::<T>())?;
        Ok(Self { address: memory.address, memory, len, elements: PhantomData })
    }

    /// A copy of `elements` on the device.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], and those of [`write`](Self::write).
    pub fn from_slice(device: &SharedDevice, elements: &[T]) -> Result<Self, Error> {
        let buffer = Self::new(device, elements.len())?;
        buffer.write(0, elements)?;
        Ok(buffer)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of device memory.
    pub fn n_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// All of it, as a kernel argument.
    pub fn slice(&self) -> DeviceSlice<T> {
        DeviceSlice::new(self.address, self.len)
    }

    /// Copies `elements` to `self[start..]`.
    ///
    /// # Errors
    ///
    /// Those of [`Device::copy_to_device`](super::Device::copy_to_device).
    ///
    /// # Panics
    ///
    /// If they reach past the end: the caller's bug.
    pub fn write(&self, start: usize, elements: &[T]) -> Result<(), Error> {
        let target = self.slice().slice(start..start + elements.len());
        // SAFETY: `Plain` elements are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) };
        self.memory.device.copy_to_device(target.address(), bytes)
    }

    /// Waits for all launches and copies `self[range]` to the host.
    ///
    /// # Errors
    ///
    /// Those of [`Device::copy_to_host`](super::Device::copy_to_host).
    ///
    /// # Panics
    ///
    /// If `range` reaches past the end: the caller's bug.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<T>, Error> {
        let source = self.slice().slice(range);
        let mut elements = Vec::<T>::with_capacity(source.len());
        // SAFETY: the spare capacity is written whole before `set_len`; `Plain` elements have no invalid bytes. The device
        // only writes through the reference, which for bytes that are about to be overwritten is sound once zeroed.
        unsafe {
            elements.as_mut_ptr().write_bytes(0, source.len());
            let bytes = std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), source.len() * size_of::<T>());
            self.memory.device.copy_to_host(source.address(), bytes)?;
            elements.set_len(source.len());
        }
        Ok(elements)
    }

    /// All of it, on the host.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn to_vec(&self) -> Result<Vec<T>, Error> {
        self.read(0..self.len)
    }

    /// Sets every byte.
    ///
    /// # Errors
    ///
    /// Those of [`Device::fill`](super::Device::fill).
    pub fn fill_bytes(&self, byte: u8) -> Result<(), Error> {
        self.memory.device.fill(self.address, byte, self.n_bytes())
    }
}

/// Part of a [`Buffer`], borrowed: what operations take, so that no launch can name freed memory.
pub struct View<'a, T: Plain> {
    slice: DeviceSlice<T>,
    buffer: PhantomData<&'a Buffer<T>>,
}

impl<T: Plain> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: Plain> Copy for View<'_, T> {}

impl<T: Plain> View<'_, T> {
    /// As a kernel argument.
    pub fn slice(&self) -> DeviceSlice<T> {
        self.slice
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// Elements of `range`.
    ///
    /// # Panics
    ///
    /// If `range` reaches past the end: the caller's bug.
    pub fn part(self, range: Range<usize>) -> Self {
        Self { slice: self.slice.slice(range), ..self }
    }
}

impl<'a, T: Plain> View<'a, T> {
    /// The same memory as elements of another type, as many as there is room for.
    ///
    /// # Panics
    ///
    /// If the first would not be aligned: the caller's bug.
    pub fn cast<U: Plain>(self) -> View<'a, U> {
        let (address, bytes) = (self.slice.address(), self.len() * size_of::<T>());
        assert!(address.is_multiple_of(align_of::<U>() as u64), "alignment");
        View { slice: DeviceSlice::new(address, bytes / size_of::<U>()), buffer: PhantomData }
    }

    /// The bytes of its elements.
    pub fn bytes(self) -> View<'a, u8> {
        View { slice: DeviceSlice::new(self.slice.address(), self.len() * size_of::<T>()), buffer: PhantomData }
    }
}

impl<T: Plain> Buffer<T> {
    /// All of it, borrowed.
    pub fn view(&self) -> View<'_, T> {
        View { slice: self.slice(), buffer: PhantomData }
    }
}

impl<T: Plain> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} on {}", self.len, T::NAME, self.memory.device.name())
    }
}
