//! Device memory behind kernel parameters. Memory that other threads write is never behind a Rust reference: a `&T`
//! parameter would become `noalias readonly`, its loads `ld.global.nc`, and two reads across a barrier one.

use core::ops::Index;

use crate::machine;
use crate::{Element, Store};

/// A kernel parameter to read: `len` elements of device memory.
///
/// On the device a pointer and a length; in the emulator every access is also checked for bounds, alignment, memory that
/// nothing wrote, and conflicting writes of other threads.
#[derive(Clone, Copy)]
pub struct Global<T: Element> {
    base: *const T,
    len: usize,
    #[cfg(not(target_arch = "nvptx64"))]
    shadow: machine::ShadowRef,
}

/// A kernel parameter to write, each element by one thread only between two barriers, and to read back.
#[derive(Clone, Copy)]
pub struct Disjoint<T: Store> {
    base: *mut T,
    len: usize,
    #[cfg(not(target_arch = "nvptx64"))]
    shadow: machine::ShadowRef,
}

/// A kernel parameter that many threads update at once, by atomic operations only.
#[derive(Clone, Copy)]
pub struct Atomics<T: Store> {
    base: *mut T,
    len: usize,
    #[cfg(not(target_arch = "nvptx64"))]
    shadow: machine::ShadowRef,
}

macro_rules! parameter {
    ($name:ident, $bound:ident, $($pointer:tt)+) => {
        impl<T: $bound> $name<T> {
            /// From the two PTX parameters; `#[kernel]` calls it.
            #[doc(hidden)]
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            pub fn from_raw(base: $($pointer)+ T, len: usize) -> Self {
                Self { base, len }
            }

            /// From a launch argument; `#[kernel]` calls it.
            #[doc(hidden)]
            #[cfg(not(target_arch = "nvptx64"))]
            pub fn from_argument(argument: &machine::Argument) -> Self {
                let (address, len, shadow) = argument.slice();
                Self { base: address as $($pointer)+ T, len, shadow }
            }

            /// Number of elements.
            #[inline(always)]
            #[allow(clippy::len_without_is_empty, reason = "a kernel parameter; emptiness is no question it asks")]
            pub fn len(&self) -> usize {
                self.len
            }

            /// Elements `start..start + len`, or `None` if they reach past the end.
            #[inline(always)]
            pub fn slice(self, start: usize, len: usize) -> Option<Self> {
                if start > self.len || len > self.len - start {
                    return None;
                }
                // SAFETY: `start <= self.len`, so the pointer stays in or one past the allocation.
                Some(Self { base: unsafe { self.base.add(start) }, len, ..self })
            }

            /// Row `row` of a matrix with `width` columns, or `None` past the last.
            #[inline(always)]
            pub fn row(self, row: usize, width: usize) -> Option<Self> {
                self.slice(row.checked_mul(width)?, width)
            }

            /// Like `row`, for a row that exists by the launch contract.
            ///
            /// # Safety
            ///
            /// `(row + 1) * width <= self.len()`. The emulator checks it.
            #[inline(always)]
            #[track_caller]
            pub unsafe fn row_unchecked(self, row: usize, width: usize) -> Self {
                #[cfg(not(target_arch = "nvptx64"))]
                machine::check_bounds(row.saturating_add(1).saturating_mul(width), 0, self.len);
                // SAFETY: the caller's promise.
                Self { base: unsafe { self.base.add(row * width) }, len: width, ..self }
            }
        }
    };
}

parameter!(Global, Element, *const);
parameter!(Disjoint, Store, *mut);
parameter!(Atomics, Store, *mut);

macro_rules! loads {
    ($name:ident, $bound:ident) => {
        impl<T: $bound> $name<T> {
            /// Element `i`; out of bounds traps on the device and is a fault in the emulator.
            #[inline(always)]
            #[track_caller]
            pub fn read(&self, i: usize) -> T {
                if i >= self.len {
                    machine::out_of_bounds(i, self.len);
                }
                // SAFETY: in bounds, checked above.
                unsafe { self.read_unchecked(i) }
            }

            /// Element `i` without a bounds check on the device.
            ///
            /// # Safety
            ///
            /// `i < self.len()`. The emulator checks it.
            #[inline(always)]
            #[track_caller]
            pub unsafe fn read_unchecked(&self, i: usize) -> T {
                #[cfg(not(target_arch = "nvptx64"))]
                machine::on_read(self.shadow, self.base as usize, i, size_of::<T>(), size_of::<T>(), self.len);
                // SAFETY: the caller's promise.
                unsafe { *self.base.add(i) }
            }

            /// 4 bytes from element `i` on: `ld.global.u32`.
            ///
            /// # Safety
            ///
            /// The bytes are inside and their address is a multiple of 4. The emulator checks both.
            #[inline(always)]
            #[track_caller]
            pub unsafe fn load4(&self, i: usize) -> u32 {
                #[cfg(not(target_arch = "nvptx64"))]
                machine::on_read(self.shadow, self.base as usize, i, size_of::<T>(), 4, self.len);
                // SAFETY: the caller's promise.
                unsafe { machine::load4(self.base.add(i).cast()) }
            }

            /// 8 bytes from element `i` on, as one load: `ld.global.v2.u32`.
            ///
            /// # Safety
            ///
            /// The bytes are inside and their address is a multiple of 8. The emulator checks both.
            #[inline(always)]
            #[track_caller]
            pub unsafe fn load8(&self, i: usize) -> [u32; 2] {
                #[cfg(not(target_arch = "nvptx64"))]
                machine::on_read(self.shadow, self.base as usize, i, size_of::<T>(), 8, self.len);
                // SAFETY: the caller's promise.
                unsafe { machine::load8(self.base.add(i).cast()) }
            }

            /// 16 bytes from element `i` on, as one load: `ld.global.v4.u32`.
            ///
            /// # Safety
            ///
            /// The bytes are inside and their address is a multiple of 16. The emulator checks both.
            #[inline(always)]
            #[track_caller]
            pub unsafe fn load16(&self, i: usize) -> [u32; 4] {
                #[cfg(not(target_arch = "nvptx64"))]
                machine::on_read(self.shadow, self.base as usize, i, size_of::<T>(), 16, self.len);
                // SAFETY: the caller's promise.
                unsafe { machine::load16(self.base.add(i).cast()) }
            }
        }
    };
}

loads!(Global, Element);
loads!(Disjoint, Store);

impl<T: Element> Index<usize> for Global<T> {
    type Output = T;

    /// Element `i`; out of bounds traps on the device and is a fault in the emulator.
    #[inline(always)]
    #[track_caller]
    fn index(&self, i: usize) -> &T {
        if i >= self.len {
            machine::out_of_bounds(i, self.len);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        machine::on_read(self.shadow, self.base as usize, i, size_of::<T>(), size_of::<T>(), self.len);
        // SAFETY: in bounds, checked above; the reference lives for the load only, since `T` is `Copy`.
        unsafe { &*self.base.add(i) }
    }
}

impl<T: Element> Global<T> {
    /// The address of element `i`, for [`Shared::copy_async`](crate::Shared::copy_async).
    #[inline(always)]
    pub(crate) fn address(&self, i: usize) -> *const u8 {
        self.base.wrapping_add(i).cast()
    }

    #[cfg(not(target_arch = "nvptx64"))]
    pub(crate) fn shadow(&self) -> machine::ShadowRef {
        self.shadow
    }
}

impl<T: Store> Disjoint<T> {
    /// Writes element `i`; out of bounds traps on the device and is a fault in the emulator.
    ///
    /// # Safety
    ///
    /// No other thread reads or writes element `i` before the next barrier both pass. The emulator's checked mode
    /// reports a violation.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn write(&self, i: usize, value: T) {
        if i >= self.len {
            machine::out_of_bounds(i, self.len);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        machine::on_write(self.shadow, self.base as usize, i, size_of::<T>(), size_of::<T>(), self.len);
        // SAFETY: in bounds, checked above; unshared by the caller's promise.
        unsafe { *self.base.add(i) = value }
    }

    /// Writes 16 bytes from element `i` on, as one store: `st.global.v4.u32`.
    ///
    /// # Safety
    ///
    /// As [`write`](Self::write) for all of them; they are inside and their address is a multiple of 16. The emulator
    /// checks it.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store16(&self, i: usize, value: [u32; 4]) {
        #[cfg(not(target_arch = "nvptx64"))]
        machine::on_write(self.shadow, self.base as usize, i, size_of::<T>(), 16, self.len);
        // SAFETY: the caller's promise.
        unsafe { machine::store16(self.base.add(i).cast(), value) }
    }
}

macro_rules! atomics {
    ($type:ty, $add:ident, $max:ident) => {
        impl Atomics<$type> {
            /// `atom.relaxed.gpu.global.add`: adds, and returns the value before. Out of bounds traps.
            #[inline(always)]
            #[track_caller]
            pub fn fetch_add(&self, i: usize, value: $type) -> $type {
                let address = self.address(i);
                // SAFETY: in bounds; all accesses to the parameter are atomic.
                unsafe { machine::$add(address, value) }
            }

            /// `atom.relaxed.gpu.global.max`: keeps the larger, and returns the value before. Out of bounds traps.
            #[inline(always)]
            #[track_caller]
            pub fn fetch_max(&self, i: usize, value: $type) -> $type {
                let address = self.address(i);
                // SAFETY: as above.
                unsafe { machine::$max(address, value) }
            }
        }
    };
}

atomics!(u32, atomic_add_u32, atomic_max_u32);
atomics!(u64, atomic_add_u64, atomic_max_u64);

impl Atomics<u32> {
    /// `atom.acq_rel.gpu.global.inc`: counts up, and from `last` on to 0; returns the value before. For
    /// [`grid::is_last_block`](crate::grid::is_last_block).
    #[inline(always)]
    #[track_caller]
    pub(crate) fn arrive(&self, i: usize, last: u32) -> u32 {
        let address = self.address(i);
        // SAFETY: in bounds; all accesses to the parameter are atomic.
        unsafe { machine::atomic_inc_u32(address, last) }
    }
}

impl<T: Store> Atomics<T> {
    #[inline(always)]
    #[track_caller]
    fn address(&self, i: usize) -> *mut T {
        if i >= self.len {
            machine::out_of_bounds(i, self.len);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        machine::on_atomic(self.shadow, self.base as usize, i, size_of::<T>(), self.len);
        self.base.wrapping_add(i)
    }
}

/// The columns of one lane: `lane`, `lane + 32`, … below `end`. The comparison `end <= at` lets LLVM drop the bounds check
/// of an index below `end`; `step_by` keeps it.
#[inline(always)]
pub fn lane_share(lane: u32, end: usize) -> impl Iterator<Item = usize> {
    let mut at = lane as usize;
    core::iter::from_fn(move || {
        if end <= at {
            return None;
        }
        let this = at;
        at += 32;
        Some(this)
    })
}
