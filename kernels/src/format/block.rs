//! Types with blocks of 32 elements.

use super::{Format, Layout, Place, Raw, bytes, half, half_word, nibbles, single_bits};
use cuda_std::{add_f16x2, mul_f16x2, pack_f16x2, permute_bytes, unpack_f16x2};

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
/// E2M1 numbers under an E8M0 scale. Planes: quants 16 bytes a group, in the order of tensor cores; scales the byte `e`.
///
/// [`MXFP4_ROWS`] rows (the last of a matrix: what is left, r) lie together, and each run of [`MXFP4_RUN`] groups of theirs
/// (the last: what is left, w) takes `16 r w` bytes of quants and `r w` of scales: row after row, the row's quants in four
/// pieces of `4 w` bytes. Piece t holds a word of each group: the eight codes that lane t of four gives to two
/// `mma.m16n8k16`, see [`mxfp4_pairs`]. So the lanes of a warp load their fragments of eight rows and a whole run at once,
/// 16 bytes each and a scale, side by side.
pub enum Mxfp4 {}

/// Groups of MXFP4 that interleave their words.
pub const MXFP4_RUN: usize = 4;
/// Rows of MXFP4 that interleave their runs.
pub const MXFP4_ROWS: usize = 8;

/// Where a group of MXFP4 lies in its planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mxfp4Place {
    /// Groups before the row's part of the run.
    pub first: usize,
    /// The group's place in the run.
    pub lane: usize,
    /// Groups of the run.
    pub width: usize,
}

impl Mxfp4Place {
    /// That of group `group` of row `row` of a matrix that has `n_out` rows of `n_groups` groups.
    #[inline(always)]
    pub const fn new(n_groups: usize, n_out: usize, row: usize, group: usize) -> Self {
        let (first_row, row) = (row / MXFP4_ROWS * MXFP4_ROWS, row % MXFP4_ROWS);
        let (first, lane) = (group / MXFP4_RUN * MXFP4_RUN, group % MXFP4_RUN);
        let (rows_left, left) = (n_out - first_row, n_groups - first);
        let height = if rows_left < MXFP4_ROWS { rows_left } else { MXFP4_ROWS };
        let width = if left < MXFP4_RUN { left } else { MXFP4_RUN };
        Self { first: first_row * n_groups + first * height + row * width, lane, width }
    }

    /// The offset of word `t` in the plane of quants.
    #[inline(always)]
    pub const fn word(&self, t: usize) -> usize {
        16 * self.first + 4 * (t * self.width + self.lane)
    }

    /// The offset in the plane of scales.
    #[inline(always)]
    pub const fn scale(&self) -> usize {
        self.first + self.lane
    }
}

/// Pairs of f16 `[2 t, + 1]`, `[8 + 2 t, + 1]`, `[16 + 2 t, + 1]`, `[24 + 2 t, + 1]` of a group from its word t: their
/// values times 2⁻¹⁴, exactly.
///
/// A half of the word holds four codes of a sign and three bits: the first at 15 and 11..9, the second at 12 and 8..6, the
/// third at 14 and 5..3, the fourth at 13 and 2..0. Shifted under sign and exponent of an f16, three bits count 2⁻¹⁴ times
/// what they do in E2M1.
#[inline(always)]
pub fn mxfp4_pairs(word: u32) -> [u32; 4] {
    [
        word & 0x8e00_8e00,
        word << 3 & 0x8e00_8e00,
        word << 1 & 0x8000_8000 | word << 6 & 0x0e00_0e00,
        word << 2 & 0x8000_8000 | word << 9 & 0x0e00_0e00,
    ]
}

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

    /// In three operations a pair: as the low byte of 8 a byte with its sign flipped counts 2⁻⁷, and with 9 less there is 2⁻⁷ of
    /// its value, exactly. With a factor of 2⁷ times the scale the product is rounded once, as that in f32 is; what such a
    /// factor loses below 2⁻¹⁴ is 2⁻²⁵ of an element at most. Scales from 2⁸ on are left as they are, and bytes count 1.
    #[inline(always)]
    fn halves(raw: &Self::Raw, i: usize, [factor, _]: [f32; 2]) -> [u32; 4] {
        let is_large = factor.abs() >= 256.0;
        // 8 and −9, or 1024 and −1152, twice.
        let (exponent, less) = if is_large { (0x6464_6464, 0xe480_e480) } else { (0x4848_4848, 0xc880_c880) };
        let factor = if is_large { factor } else { 128.0 * factor };
        // No element of such a scale is other than 0, since none is beyond f16; infinity stays.
        let beyond = factor.abs() > 65504.0 && factor.abs() < f32::INFINITY;
        let factor = if beyond { 65504.0 } else { factor };
        let factor = pack_f16x2(factor, factor);
        let pair = |word: u32, selector: u32| {
            mul_f16x2(add_f16x2(permute_bytes(word ^ 0x8080_8080, exponent, selector), less), factor)
        };
        let (a, b) = (raw.quants[2 * i], raw.quants[2 * i + 1]);
        [pair(a, 0x4140), pair(a, 0x4342), pair(b, 0x4140), pair(b, 0x4342)]
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
        let at = Mxfp4Place::new(place.n_groups as usize, place.planes.n_out, row, group as usize);
        // SAFETY: the caller's promise; words start at multiples of 4.
        unsafe {
            let quants = [
                place.weight.load4(at.word(0)),
                place.weight.load4(at.word(1)),
                place.weight.load4(at.word(2)),
                place.weight.load4(at.word(3)),
            ];
            Raw { quants, high: [], scales: [place.weight.read_unchecked(place.planes.scales + at.scale()).into()] }
        }
    }

    #[inline(always)]
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4] {
        let pair = |word: u32| unpack_f16x2(mxfp4_pairs(word)[i / 2]);
        let ([a, b], [c, d]) = (pair(raw.quants[i % 2 * 2]), pair(raw.quants[i % 2 * 2 + 1]));
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
