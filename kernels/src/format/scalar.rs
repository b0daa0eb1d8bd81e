//! Numbers that are not quantized. Planes: quants only, as in the file, but for the interleaving.

use super::{Format, Layout, Place};
use cuda_std::unpack_f16x2;

/// IEEE binary32.
pub enum F32 {}
/// IEEE binary16.
pub enum F16 {}
/// The upper half of a binary32.
pub enum Bf16 {}

const fn layout(element_bytes: usize) -> Layout {
    Layout { block_len: 32, quants: 32 * element_bytes, high: 0, scales: 0, supers: 0 }
}

/// All chunks of a group.
///
/// # Safety
///
/// The matrix has the group.
#[inline(always)]
unsafe fn chunks<F: Format, const N: usize>(place: &Place, row: usize, group: u32) -> [[u32; 4]; N] {
    let mut chunks = [[0; 4]; N];
    let mut c = 0;
    while c < N {
        // SAFETY: the caller's promise.
        chunks[c] = unsafe { place.chunk::<F>(row, group, c) };
        c += 1;
    }
    chunks
}

#[inline(always)]
fn largest<F: Format>(raw: &F::Raw) -> f32 {
    let (mut largest, mut i) = (0.0f32, 0);
    while i < 8 {
        let [a, b, c, d] = F::quad(raw, i).map(f32::abs);
        largest = largest.max(a.max(b)).max(c.max(d));
        i += 1;
    }
    largest
}

impl Format for F32 {
    const LAYOUT: Layout = layout(4);
    const BATCH: usize = 1;
    type Raw = [[u32; 4]; 8];
    const EMPTY: Self::Raw = [[0; 4]; 8];

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        // SAFETY: the caller's promise.
        unsafe { chunks::<Self, 8>(place, row, group) }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        raw[i].map(f32::from_bits)
    }

    #[inline(always)]
    fn scale(_: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        [1.0, 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, _: u32) -> f32 {
        largest::<Self>(raw)
    }
}

macro_rules! sixteen_bits {
    ($name:ident, $unpack:expr) => {
        impl Format for $name {
            const LAYOUT: Layout = layout(2);
            const BATCH: usize = 2;
            type Raw = [[u32; 4]; 4];
            const EMPTY: Self::Raw = [[0; 4]; 4];

            #[inline(always)]
            unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
                // SAFETY: the caller's promise.
                unsafe { chunks::<Self, 4>(place, row, group) }
            }

            #[inline(always)]
            fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
                let unpack: fn(u32) -> [f32; 2] = $unpack;
                let [a, b] = unpack(raw[i / 2][i % 2 * 2]);
                let [c, d] = unpack(raw[i / 2][i % 2 * 2 + 1]);
                [a, b, c, d]
            }

            #[inline(always)]
            fn scale(_: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
                [1.0, 0.0]
            }

            #[inline(always)]
            fn bound(raw: &Self::Raw, _: u32) -> f32 {
                largest::<Self>(raw)
            }
        }
    };
}

sixteen_bits!(F16, unpack_f16x2);
sixteen_bits!(Bf16, |pair| [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]);
