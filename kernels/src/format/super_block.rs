//! K-quants: super-blocks of 256 elements, 8 groups. Group j holds elements `32 j..32 j + 32`.

use super::{
    Format, GROUPS_PER_SUPER_BLOCK, Layout, Place, Raw, bit_pairs, bytes, half, half_word, nibbles, single_bits,
};
use cuda_std::unpack_f16x2;

/// `d · s · q − dmin · m` for each 16 elements. Planes: quants 8 bytes a group, bits of element `16 w + 4 j + b` at bit
/// `2 j` of byte b of word w; scales 2 bytes a group, ggml's; supers `d · dmin`.
pub enum Q2K {}
/// `d · s · q` for each 16 elements. Planes: quants as [`Q2K`]; high 4 bytes a group, the bit of element `4 j + b` being
/// bit j of byte b; scales 12 bytes: byte j the low four bits of group j's two scales, then nibble j their high two bits;
/// supers `d`.
pub enum Q3K {}
/// `d · s · q − dmin · m` for each group. Planes: quants 16 bytes a group, elements 16 to 31 in the high halves; scales 16
/// bytes: `d · dmin`, then byte j with s below the low two bits of m, then nibble j with the high four bits of m.
pub enum Q4K {}
/// As [`Q4K`], with a fifth bit in the plane of high bits, laid out as [`Q3K`]'s.
pub enum Q5K {}
/// `d · s · q` for each 16 elements. Planes: quants 16 bytes a group as [`Q4K`]; high 8 bytes a group, laid out as
/// [`Q2K`]'s quants; scales 2 bytes a group, ggml's; supers `d`.
pub enum Q6K {}

const fn layout(quants: usize, high: usize, scales: usize, supers: usize) -> Layout {
    Layout { block_len: 256, quants, high, scales, supers }
}

/// The larger magnitude of the two factors.
#[inline(always)]
fn larger_factor<F: Format>(raw: &F::Raw, group: u32) -> f32 {
    F::scale(raw, group, 0)[0].abs().max(F::scale(raw, group, 1)[0].abs())
}

impl Format for Q2K {
    const LAYOUT: Layout = layout(64, 0, 16, 4);
    const BATCH: usize = 4;
    const TWO_SCALES: bool = true;
    const HAS_OFFSET: bool = true;
    type Raw = Raw<2, 0, 2>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let (planes, index) = (&place.planes, place.index(row, group));
        // SAFETY: the caller's promise.
        unsafe {
            let quants = place.weight.load8(planes.quants + 8 * index);
            let scales = place.weight.load4(planes.scales + index / 2 * 4);
            let d_dmin = place.weight.load4(planes.supers + index / GROUPS_PER_SUPER_BLOCK * 4);
            Raw { quants, high: [], scales: [scales, d_dmin] }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<2>(bit_pairs(&raw.quants, i), 0)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, group: u32, half_idx: usize) -> [f32; 2] {
        let [scales, d_dmin] = raw.scales;
        let ([d, dmin], byte) = (unpack_f16x2(d_dmin), scales >> (group % 2 * 16) >> (8 * half_idx));
        [d * (byte & 15) as f32, -(dmin * (byte >> 4 & 15) as f32)]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        let offset = Self::scale(raw, group, 0)[1].abs().max(Self::scale(raw, group, 1)[1].abs());
        3.0 * larger_factor::<Self>(raw, group) + offset
    }
}

impl Format for Q3K {
    const LAYOUT: Layout = layout(64, 32, 12, 2);
    const BATCH: usize = 2;
    const TWO_SCALES: bool = true;
    type Raw = Raw<2, 1, 4>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let (planes, index) = (&place.planes, place.index(row, group));
        let (super_block, j) = (index / GROUPS_PER_SUPER_BLOCK, index % GROUPS_PER_SUPER_BLOCK);
        let scales = planes.scales + 12 * super_block;
        // SAFETY: the caller's promise.
        unsafe {
            let quants = place.weight.load8(planes.quants + 8 * index);
            let high = [place.weight.load4(planes.high + 4 * index)];
            let [d, shift] = place.load2(planes.supers + 2 * super_block);
            let (low, top) = (place.weight.load4(scales + j / 4 * 4), place.weight.load4(scales + 8));
            Raw { quants, high, scales: [d, shift, low, top] }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<3>(bit_pairs(&raw.quants, i) | single_bits(raw.high[0], i) << 2, 4)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, group: u32, half_idx: usize) -> [f32; 2] {
        let [d, shift, low, top] = raw.scales;
        let low = low >> (group % 4 * 8) >> (4 * half_idx) & 15;
        let top = top >> (group % 8 * 4) >> (2 * half_idx) & 3;
        [half(half_word([d, shift])) * ((low | top << 4) as i32 - 32) as f32, 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        4.0 * larger_factor::<Self>(raw, group)
    }
}

/// `[factor, offset]` of a group from the 16 bytes of Q4_K and Q5_K.
#[inline(always)]
fn six_bit_scale(&[d_dmin, low, high, tops]: &[u32; 4], group: u32) -> [f32; 2] {
    let j = group % 8;
    let byte = (if j < 4 { low } else { high }) >> (j % 4 * 8) & 0xff;
    let min = byte >> 6 | (tops >> (j * 4) & 15) << 2;
    let [d, dmin] = unpack_f16x2(d_dmin);
    [d * (byte & 63) as f32, -(dmin * min as f32)]
}

/// The words that [`six_bit_scale`] takes.
///
/// # Safety
///
/// The matrix has the group.
#[inline(always)]
unsafe fn load_six_bit_scale(place: &Place, index: usize) -> [u32; 4] {
    let at = place.planes.scales + index / GROUPS_PER_SUPER_BLOCK * 16;
    // SAFETY: the caller's promise.
    unsafe { place.weight.load16(at) }
}

impl Format for Q4K {
    const LAYOUT: Layout = layout(128, 0, 16, 0);
    const BATCH: usize = 4;
    const HAS_OFFSET: bool = true;
    type Raw = Raw<4, 0, 4>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        // SAFETY: the caller's promise.
        unsafe {
            let quants = place.chunk::<Self>(row, group, 0);
            Raw { quants, high: [], scales: load_six_bit_scale(place, place.index(row, group)) }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<4>(nibbles(&raw.quants, i), 0)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, group: u32, _: usize) -> [f32; 2] {
        six_bit_scale(&raw.scales, group)
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        let [factor, offset] = Self::scale(raw, group, 0);
        15.0 * factor.abs() + offset.abs()
    }
}

impl Format for Q5K {
    const LAYOUT: Layout = layout(128, 32, 16, 0);
    const BATCH: usize = 2;
    const HAS_OFFSET: bool = true;
    type Raw = Raw<4, 1, 4>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let index = place.index(row, group);
        // SAFETY: the caller's promise.
        unsafe {
            let high = [place.weight.load4(place.planes.high + 4 * index)];
            Raw { quants: place.chunk::<Self>(row, group, 0), high, scales: load_six_bit_scale(place, index) }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<5>(nibbles(&raw.quants, i) | single_bits(raw.high[0], i) << 4, 0)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, group: u32, _: usize) -> [f32; 2] {
        six_bit_scale(&raw.scales, group)
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        let [factor, offset] = Self::scale(raw, group, 0);
        31.0 * factor.abs() + offset.abs()
    }
}

impl Format for Q6K {
    const LAYOUT: Layout = layout(128, 64, 16, 2);
    const BATCH: usize = 2;
    const TWO_SCALES: bool = true;
    type Raw = Raw<4, 2, 3>;
    const EMPTY: Self::Raw = Raw::EMPTY;

    #[inline(always)]
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw {
        let (planes, index) = (&place.planes, place.index(row, group));
        // SAFETY: the caller's promise.
        unsafe {
            let high = place.weight.load8(planes.high + 8 * index);
            let scales = place.weight.load4(planes.scales + index / 2 * 4);
            let [d, shift] = place.load2(planes.supers + index / GROUPS_PER_SUPER_BLOCK * 2);
            Raw { quants: place.chunk::<Self>(row, group, 0), high, scales: [scales, d, shift] }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        bytes::<6>(nibbles(&raw.quants, i) | bit_pairs(&raw.high, i) << 4, 32)
    }

    #[inline(always)]
    fn scale(raw: &Self::Raw, group: u32, half_idx: usize) -> [f32; 2] {
        let [scales, d, shift] = raw.scales;
        let scale = (scales >> (group % 2 * 16) >> (8 * half_idx)) as i8;
        [half(half_word([d, shift])) * f32::from(scale), 0.0]
    }

    #[inline(always)]
    fn bound(raw: &Self::Raw, group: u32) -> f32 {
        32.0 * larger_factor::<Self>(raw, group)
    }
}
