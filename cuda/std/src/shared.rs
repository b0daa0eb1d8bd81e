//! A block's own memory.

use core::marker::PhantomData;

use crate::machine;
use crate::{Element, Global, Store, wgmma};

/// An array in the block's shared memory, made by [`shared_array!`](crate::shared_array). Contents are undefined at first.
///
/// Its loads and stores are `ld.shared` and `st.shared` on a 32-bit address: a Rust pointer would be generic, and ptxas
/// does not find out where it points.
#[derive(Clone, Copy)]
pub struct Shared<T> {
    address: machine::SharedAddress,
    len: usize,
    elements: PhantomData<*mut T>,
}

/// Declares `NAME: [TYPE; LEN]` in the block's shared memory and evaluates to its [`Shared`] handle.
///
/// `NAME` becomes a PTX symbol and so is unique in the kernel crate; `LEN` is a constant of the enclosing module, not of a
/// generic function. 16-byte aligned.
#[macro_export]
macro_rules! shared_array {
    ($name:ident: [$type:ty; $len:expr]) => {{
        #[cfg(target_arch = "nvptx64")]
        {
            mod $name {
                #[allow(unused_imports, reason = "the length and type may be the enclosing module's")]
                use super::*;
                $crate::internal::global_asm!(
                    concat!(".shared .align 16 .b8 ", stringify!($name), "[{bytes}];"),
                    bytes = const { ($len) as usize * size_of::<$type>() }
                );
            }
            let address: u32;
            // SAFETY: only names the symbol declared above.
            #[allow(unused_unsafe, reason = "expands inside unsafe blocks too")]
            unsafe {
                $crate::internal::asm!(
                    concat!("mov.u32 {}, ", stringify!($name), ";"),
                    out(reg32) address,
                    options(pure, nomem, nostack, preserves_flags)
                )
            };
            $crate::internal::from_address::<$type>(address, $len)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            static KEY: u8 = 0;
            $crate::internal::shared_array::<$type>(&raw const KEY, $len)
        }
    }};
}

/// The block's dynamic shared memory as `[TYPE; LEN]`: what goes beyond the 48 KiB that a kernel can declare statically.
///
/// `NAME` is unique in the kernel crate. A kernel has one such array at most, and says its bytes in
/// `#[kernel(…, dynamic_shared = BYTES)]`; every such array starts at the same address, a multiple of 1024 bytes. Together
/// with static arrays at most 99 KiB run on every GPU from Ampere on, 227 KiB on Hopper.
#[macro_export]
macro_rules! dynamic_shared_array {
    ($name:ident: [$type:ty; $len:expr]) => {{
        #[cfg(target_arch = "nvptx64")]
        {
            mod $name {
                $crate::internal::global_asm!(concat!(".extern .shared .align 1024 .b8 ", stringify!($name), "[];"));
            }
            let address: u32;
            // SAFETY: only names the symbol declared above.
            #[allow(unused_unsafe, reason = "expands inside unsafe blocks too")]
            unsafe {
                $crate::internal::asm!(
                    concat!("mov.u32 {}, ", stringify!($name), ";"),
                    out(reg32) address,
                    options(pure, nomem, nostack, preserves_flags)
                )
            };
            $crate::internal::from_address::<$type>(address, $len)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            $crate::internal::dynamic_shared_array::<$type>($len)
        }
    }};
}

/// What [`shared_array!`](crate::shared_array) makes of a symbol's address.
#[doc(hidden)]
#[inline(always)]
pub fn from_address<T>(address: machine::SharedAddress, len: usize) -> Shared<T> {
    Shared { address, len, elements: PhantomData }
}

impl<T: Element> Shared<T> {
    /// Number of elements.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Element `i`.
    ///
    /// # Safety
    ///
    /// `i < self.len()`; a barrier lies between this and another thread's write. The emulator checks both, and that
    /// something was written.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn read(&self, i: usize) -> T {
        // SAFETY: the caller's promise.
        unsafe { machine::shared_read(self.address, i, self.len) }
    }

    /// 4 bytes from element `i` on.
    ///
    /// # Safety
    ///
    /// As [`read`](Self::read) for all of them, and their address is a multiple of 4.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load4(&self, i: usize) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { machine::shared_load4::<T>(self.address, i, self.len) }
    }

    /// 16 bytes from element `i` on, as one load: `ld.shared.v4.u32`.
    ///
    /// # Safety
    ///
    /// As [`read`](Self::read) for all of them, and their address is a multiple of 16.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16(&self, i: usize) -> [u32; 4] {
        // SAFETY: the caller's promise.
        unsafe { machine::shared_load16::<T>(self.address, i, self.len) }
    }

    /// `ldmatrix.sync.aligned.m8n8.x4.shared.b16`: four 8 × 8 matrices of 16-bit elements. Lane `l` gives in `i` the first
    /// element of row `l % 8` of matrix `l / 8`; register m of lane `l` gets elements `2 (l % 4)`, `+ 1` of row `l / 4` of
    /// matrix m.
    ///
    /// # Safety
    ///
    /// All 32 lanes are here in code that the whole warp runs; each `i` names 16 readable bytes at a multiple of 16.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_matrix_x4(&self, i: usize) -> [u32; 4] {
        // SAFETY: the caller's promise.
        unsafe { machine::load_matrix_x4::<T>(self.address, i, self.len, false) }
    }

    /// As [`load_matrix_x4`](Self::load_matrix_x4) with each matrix transposed (`.trans`).
    ///
    /// # Safety
    ///
    /// As [`load_matrix_x4`](Self::load_matrix_x4).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_matrix_x4_transposed(&self, i: usize) -> [u32; 4] {
        // SAFETY: the caller's promise.
        unsafe { machine::load_matrix_x4::<T>(self.address, i, self.len, true) }
    }
}

impl<T: Element> Shared<T> {
    /// The operand of [`wgmma`](crate::wgmma) whose first row starts at element `i`.
    ///
    /// # Safety
    ///
    /// It starts at a multiple of 1024 bytes of a [`dynamic_shared_array!`](crate::dynamic_shared_array).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn operand(&self, i: usize) -> wgmma::Operand {
        // SAFETY: the caller's promise.
        wgmma::Operand(unsafe { machine::operand_at::<T>(self.address, i, self.len) })
    }
}

impl<T: Store> Shared<T> {
    /// Writes element `i`.
    ///
    /// # Safety
    ///
    /// `i < self.len()`; no other thread reads or writes it before the next barrier. The emulator checks both.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn write(&self, i: usize, value: T) {
        // SAFETY: the caller's promise.
        unsafe { machine::shared_write(self.address, i, self.len, value) }
    }
}

impl<T: Element> Shared<T> {
    /// Writes 4 bytes from element `i` on.
    ///
    /// # Safety
    ///
    /// As [`write`](Self::write) for all of them, and their address is a multiple of 4.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store4(&self, i: usize, value: u32) {
        // SAFETY: the caller's promise.
        unsafe { machine::shared_store4::<T>(self.address, i, self.len, value) }
    }

    /// Writes 16 bytes from element `i` on, as one store: `st.shared.v4.u32`.
    ///
    /// # Safety
    ///
    /// As [`write`](Self::write) for all of them, and their address is a multiple of 16.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store16(&self, i: usize, value: [u32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { machine::shared_store16::<T>(self.address, i, self.len, value) }
    }

    /// `cp.async.cg.shared.global 16`: copies 16 bytes from `source[j..]` to `self[i..]`, beside what follows; if not
    /// `valid`, writes zeros and reads nothing. See [`cp_async`](crate::cp_async) for when they arrive.
    ///
    /// # Safety
    ///
    /// No other thread reads or writes the destination until the copy was waited for and a barrier passed; both addresses
    /// are multiples of 16; if `valid`, the source is inside `source` and nobody writes it meanwhile.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn copy_async(&self, i: usize, source: Global<T>, j: usize, valid: bool) {
        #[cfg(not(target_arch = "nvptx64"))]
        if valid {
            machine::on_read(source.shadow(), source.address(0) as usize, j, size_of::<T>(), 16, source.len());
        }
        // SAFETY: the caller's promise.
        unsafe { machine::copy_async::<T>(self.address, i, self.len, source.address(j), valid) }
    }

    /// As [`copy_async`](Self::copy_async) if `wanted`, else nothing: a predicate, and no branch.
    ///
    /// # Safety
    ///
    /// As [`copy_async`](Self::copy_async) of what is valid, if `wanted`.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn copy_async_if(&self, wanted: bool, i: usize, source: Global<T>, j: usize) {
        #[cfg(not(target_arch = "nvptx64"))]
        if wanted {
            machine::on_read(source.shadow(), source.address(0) as usize, j, size_of::<T>(), 16, source.len());
        }
        // SAFETY: the caller's promise.
        unsafe { machine::copy_async_if::<T>(wanted, self.address, i, self.len, source.address(j)) }
    }

    /// `cp.async.ca.shared.global 4`: as [`copy_async`](Self::copy_async) for 4 bytes of any type, from and to multiples of 4.
    ///
    /// # Safety
    ///
    /// As [`copy_async`](Self::copy_async).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn copy_async4<U: Element>(&self, i: usize, source: Global<U>, j: usize, valid: bool) {
        #[cfg(not(target_arch = "nvptx64"))]
        if valid {
            machine::on_read(source.shadow(), source.address(0) as usize, j, size_of::<U>(), 4, source.len());
        }
        // SAFETY: the caller's promise.
        unsafe { machine::copy_async4::<T>(self.address, i, self.len, source.address(j), valid) }
    }
}
