//! Types with blocks of 32 elements.

use super::{Format, Layout, Place, Raw, bytes, half, half_word, nibbles, single_bits};
use cuda_std::unpack_f16x2;

/// `(q − 8) · d`. Planes: quants 16 bytes, ggml's; scales `d`.
pub enum Q4_0 {}
/// `q · d + m`. Planes: quants 16 bytes, ggml's; scales `d · m`.
pub enum Q4_1 {}
/// `(q − 16) · d`. Planes: quants 16 bytes, ggml's; high 4 bytes, the bit of element `4 j + b` being bit j of byte b;
/// scales `d`.
pub enum Q5_0 {}
/// `q · d + m`. Planes: as [`Q5_0`], scales `d · m`.
pub enum Q5_1 {}
/// `q · d`. Planes: quants 32 bytes, ggml's but for the interleaving; scales `d`.
pub enum Q8_0 {}
/// E2M1 numbers under an E8M0 scale. Planes: quants 16 bytes, ggml's; scales the byte `e`.
pub enum Mxfp4 {}

const fn layout(quants: usize, high: usize, scales: usize) -> Layout {
    Layout { block_len: 32, quants, high, scales, supers: 0 }
}

impl Format for Q4_0 {
    const LAYOUT: Layout = layout(16, 0, 2);
    const BATCH: usize = 4;
    type Raw = Raw<4, 0, 2>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let at = place.planes.scales + 2 * place.index(row, group);
        // SAFETY: the caller's promise.
        unsafe { Raw { quants: place.chunk::<Self>(row, group, 0), high: [], scales: place.load2(at) } }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<4>(nibbles(&raw.quants, i), 8)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        [half(half_word(raw.scales)), 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        8.0 * Self::scale(raw, group, 0)[0].abs()
    }
}

impl Format for Q4_1 {
    const LAYOUT: Layout = layout(16, 0, 4);
    const BATCH: usize = 4;
    const HAS_OFFSET: bool = true;
    type Raw = Raw<4, 0, 1>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let at = place.planes.scales + 4 * place.index(row, group);
        // SAFETY: the caller's promise.
        unsafe { Raw { quants: place.chunk::<Self>(row, group, 0), high: [], scales: [place.weight.load4(at)] } }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<4>(nibbles(&raw.quants, i), 0)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        unpack_f16x2(raw.scales[0])
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        let [d, m] = Self::scale(raw, group, 0);
        15.0 * d.abs() + m.abs()
    }
}

#[inline(always)]
fn five_bits(quants: &[u32; 4], high: u32, i: usize) -> u32 {
    nibbles(quants, i) | single_bits(high, i) << 4
}

impl Format for Q5_0 {
    const LAYOUT: Layout = layout(16, 4, 2);
    const BATCH: usize = 2;
    type Raw = Raw<4, 1, 2>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let (planes, index) = (&place.planes, place.index(row, group));
        // SAFETY: the caller's promise.
        unsafe {
            let high = [place.weight.load4(planes.high + 4 * index)];
            Raw { quants: place.chunk::<Self>(row, group, 0), high, scales: place.load2(planes.scales + 2 * index) }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<5>(five_bits(&raw.quants, raw.high[0], i), 16)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        [half(half_word(raw.scales)), 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        16.0 * Self::scale(raw, group, 0)[0].abs()
    }
}

impl Format for Q5_1 {
    const LAYOUT: Layout = layout(16, 4, 4);
    const BATCH: usize = 2;
    const HAS_OFFSET: bool = true;
    type Raw = Raw<4, 1, 1>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let (planes, index) = (&place.planes, place.index(row, group));
        // SAFETY: the caller's promise.
        unsafe {
            let high = [place.weight.load4(planes.high + 4 * index)];
            let scales = [place.weight.load4(planes.scales + 4 * index)];
            Raw { quants: place.chunk::<Self>(row, group, 0), high, scales }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<5>(five_bits(&raw.quants, raw.high[0], i), 0)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        unpack_f16x2(raw.scales[0])
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        let [d, m] = Self::scale(raw, group, 0);
        31.0 * d.abs() + m.abs()
    }
}

impl Format for Q8_0 {
    const LAYOUT: Layout = layout(32, 0, 2);
    const BATCH: usize = 2;
    type Raw = Raw<8, 0, 2>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let at = place.planes.scales + 2 * place.index(row, group);
        // SAFETY: the caller's promise.
        unsafe {
            let [a, b, c, d] = place.chunk::<Self>(row, group, 0);
            let [e, f, g, h] = place.chunk::<Self>(row, group, 1);
            Raw { quants: [a, b, c, d, e, f, g, h], high: [], scales: place.load2(at) }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        // A signed byte with its sign flipped is that byte plus 128.
        bytes::<8>(raw.quants[i] ^ 0x8080_8080, 128)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        [half(half_word(raw.scales)), 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        128.0 * Self::scale(raw, group, 0)[0].abs()
    }
}

impl Format for Mxfp4 {
    const LAYOUT: Layout = layout(16, 0, 1);
    const BATCH: usize = 4;
    /// A code's bits, put under the exponent of an f16, are its value times 2⁻¹⁴; doubled values take half the scale.
    const UNIT: f32 = 32768.0;
    type Raw = Raw<4, 0, 1>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let at = place.planes.scales + place.index(row, group);
        // SAFETY: the caller's promise.
        unsafe {
            let scales = [place.weight.read_unchecked(at).into()];
            Raw { quants: place.chunk::<Self>(row, group, 0), high: [], scales }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        // Two bytes apart, codes are two f16 apart: sign to bit 15, exponent and mantissa to bits 9 to 11.
        let pair = |codes: u32| unpack_f16x2((codes & 0x0008_0008) << 12 | (codes & 0x0007_0007) << 9);
        let codes = raw.quants[i % 4] >> (i / 4 * 4);
        let ([a, c], [b, d]) = (pair(codes), pair(codes >> 8));
        [a, b, c, d]
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, _: u32, _: usize) -> [f32; 2] {
        let e = raw.scales[0];
        // Half of 2^(e − 127); its two smallest powers are subnormal.
        let bits = if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 };
        [f32::from_bits(bits), 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        12.0 * Self::scale(raw, group, 0)[0]
    }
}
