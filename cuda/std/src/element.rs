//! Which types device and shared memory hold.

use crate::f16;

mod sealed {
    pub trait Sealed {}
}

/// A scalar that device and shared memory hold: any bit pattern is a value, alignment is its size.
pub trait Element: Copy + sealed::Sealed + 'static {
    /// The name in PTX interface tables, as Rust writes it.
    const NAME: &'static str;

    /// Loads from a `.shared` address.
    ///
    /// # Safety
    ///
    /// `address` is aligned and inside the block's shared memory.
    #[doc(hidden)]
    #[cfg(target_arch = "nvptx64")]
    unsafe fn load_shared(address: u32) -> Self;
}

/// An [`Element`] that several threads may write side by side: at least two bytes, the grain of the race detector.
pub trait Store: Element {
    /// Stores to a `.shared` address.
    ///
    /// # Safety
    ///
    /// As [`Element::load_shared`].
    #[doc(hidden)]
    #[cfg(target_arch = "nvptx64")]
    unsafe fn store_shared(address: u32, value: Self);
}

macro_rules! element {
    ($type:ty, $name:literal, $register:ident, $suffix:literal, $bits:ty) => {
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const NAME: &'static str = $name;

            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn load_shared(address: u32) -> Self {
                let bits: $bits;
                // SAFETY: the caller's promise.
                unsafe {
                    core::arch::asm!(concat!("ld.shared.", $suffix, " {}, [{}];"), out($register) bits, in(reg32) address);
                    core::mem::transmute(bits)
                }
            }
        }
        impl Store for $type {
            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            unsafe fn store_shared(address: u32, value: Self) {
                // SAFETY: the caller's promise.
                unsafe {
                    let bits: $bits = core::mem::transmute(value);
                    core::arch::asm!(concat!("st.shared.", $suffix, " [{}], {};"), in(reg32) address, in($register) bits);
                }
            }
        }
    };
}

element!(f16, "f16", reg16, "u16", u16);
element!(u16, "u16", reg16, "u16", u16);
element!(u32, "u32", reg32, "u32", u32);
element!(i32, "i32", reg32, "u32", u32);
element!(f32, "f32", reg32, "u32", u32);
element!(u64, "u64", reg64, "u64", u64);

impl sealed::Sealed for u8 {}
/// Bytes are for reading packed weights; no kernel writes single bytes.
impl Element for u8 {
    const NAME: &'static str = "u8";

    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    unsafe fn load_shared(address: u32) -> Self {
        let bits: u16;
        // SAFETY: the caller's promise.
        unsafe { core::arch::asm!("ld.shared.u8 {}, [{}];", out(reg16) bits, in(reg32) address) };
        bits as u8
    }
}
