//! How weights lie in device memory, and how a thread decodes them.
//!
//! ggml's blocks of 17, 18, 22, 34, 110 or 210 bytes put nothing where a vector load could reach it. So a matrix is
//! repacked when it is loaded, bit for bit and without growing, into up to four *planes*, one after the other, each from a
//! multiple of [`ALIGNMENT`] bytes on:
//!
//! | plane | holds | index |
//! | --- | --- | --- |
//! | quants | the low bits, or all | group of 32 elements |
//! | high | the bits above, if any | group |
//! | scales | scales of groups; for Q4_K and Q5_K of super-blocks, all in 16 bytes | group or super-block |
//! | supers | scales of super-blocks of 256 elements, if any | super-block |
//!
//! Groups and super-blocks are counted row by row, so that rows follow one another in every plane. The types of this
//! module say what is in each plane; `gpt_gamma::weights` writes and undoes it.
//!
//! A group of more than 16 bytes of quants is cut in 16-byte chunks, and eight neighbouring groups of a row (the last of a
//! row: what is left) interleave theirs: chunk 0 of each, chunk 1 of each, … So neighbouring lanes, one group each, load
//! neighbouring 16 bytes. See [`chunk_offset`]. MXFP4 is cut finer, and eight rows interleave: see [`Mxfp4`].

mod block;
mod scalar;
mod super_block;

use cuda_std::{Global, pack_f16x2};

pub use block::{MXFP4_ROWS, MXFP4_RUN, Mxfp4, Mxfp4Place, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, mxfp4_pairs};
pub use scalar::{Bf16, F16, F32};
pub use super_block::{Q2K, Q3K, Q4K, Q5K, Q6K};

/// Elements of a group: what one thread decodes at a time. Rows are whole groups.
pub const GROUP: u32 = 32;
/// Groups of a super-block.
pub const GROUPS_PER_SUPER_BLOCK: usize = 8;
/// Where planes start, in bytes: a cache line.
pub const ALIGNMENT: usize = 128;
/// Groups that interleave their chunks of quants.
pub const INTERLEAVE: usize = 8;

/// The bytes that a format's planes hold for each block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Elements of a block: a group, or a super-block.
    pub block_len: usize,
    /// Bytes a block in the plane of quants.
    pub quants: usize,
    /// Bytes a block in the plane of high bits.
    pub high: usize,
    /// Bytes a block in the plane of scales.
    pub scales: usize,
    /// Bytes a block in the plane of super-block scales.
    pub supers: usize,
}

/// Where the planes of one matrix start, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    /// Always 0.
    pub quants: usize,
    /// The plane of high bits.
    pub high: usize,
    /// The plane of scales.
    pub scales: usize,
    /// The plane of super-block scales.
    pub supers: usize,
    /// Bytes of the whole matrix.
    pub end: usize,
    /// Its rows.
    pub n_out: usize,
}

impl Layout {
    /// The planes of a matrix of `n_out` rows of `n_in` elements, `n_in` a multiple of the block's.
    #[inline(always)]
    pub const fn planes(&self, n_in: usize, n_out: usize) -> Planes {
        let n_blocks = n_in / self.block_len * n_out;
        let high = (n_blocks * self.quants).next_multiple_of(ALIGNMENT);
        let scales = high + (n_blocks * self.high).next_multiple_of(ALIGNMENT);
        let supers = scales + (n_blocks * self.scales).next_multiple_of(ALIGNMENT);
        let end = supers + (n_blocks * self.supers).next_multiple_of(ALIGNMENT);
        Planes { quants: 0, high, scales, supers, end, n_out }
    }

    /// Bytes of quants of one group.
    pub const fn group_bytes(&self) -> usize {
        self.quants / (self.block_len / GROUP as usize)
    }
}

/// The offset of chunk `chunk` of group `group` in the quants of its row, which has `n_groups` groups of `group_bytes`.
#[inline(always)]
pub const fn chunk_offset(n_groups: usize, group_bytes: usize, group: usize, chunk: usize) -> usize {
    let (first, lane) = (group / INTERLEAVE * INTERLEAVE, group % INTERLEAVE);
    let left = n_groups - first;
    let width = if left < INTERLEAVE { left } else { INTERLEAVE };
    first * group_bytes + (chunk * width + lane) * 16
}

/// The names of the formats, where one is chosen at run time: on the host.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "ggml's names")]
pub enum WeightFormat {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Mxfp4,
}

#[cfg(not(target_arch = "nvptx64"))]
impl WeightFormat {
    /// What its planes hold.
    pub const fn layout(self) -> Layout {
        match self {
            Self::F32 => F32::LAYOUT,
            Self::F16 => F16::LAYOUT,
            Self::Bf16 => Bf16::LAYOUT,
            Self::Q4_0 => Q4_0::LAYOUT,
            Self::Q4_1 => Q4_1::LAYOUT,
            Self::Q5_0 => Q5_0::LAYOUT,
            Self::Q5_1 => Q5_1::LAYOUT,
            Self::Q8_0 => Q8_0::LAYOUT,
            Self::Q2K => Q2K::LAYOUT,
            Self::Q3K => Q3K::LAYOUT,
            Self::Q4K => Q4K::LAYOUT,
            Self::Q5K => Q5K::LAYOUT,
            Self::Q6K => Q6K::LAYOUT,
            Self::Mxfp4 => Mxfp4::LAYOUT,
        }
    }
}

/// Which group of which matrix: what a load needs.
#[derive(Clone, Copy)]
pub struct Place {
    /// The matrix.
    pub weight: Global<u8>,
    /// Its planes.
    pub planes: Planes,
    /// Groups of a row.
    pub n_groups: u32,
}

/// How a thread reads and decodes one group.
///
/// In two steps, so that the loads of several groups are under way before the first is used: [`load`](Format::load) does
/// not look at what it loads. Element i of a group is `factor · quad(i / 4)[i % 4] + offset`, the numbers of
/// [`scale`](Format::scale), in ggml's own order of operations. For every quantized type the product is exact in f32, so
/// that contracting it with the addition changes nothing: all machines decode to the same bits.
pub trait Format {
    /// What the planes hold.
    const LAYOUT: Layout;
    /// Groups that a thread of the matrix-vector product loads together: enough bytes in flight, within its registers.
    const BATCH: usize;
    /// Whether elements 16 to 31 have a scale of their own.
    const TWO_SCALES: bool = false;
    /// Whether `offset` is ever other than 0.
    const HAS_OFFSET: bool = false;
    /// A power of two that elements of a quad are still to be multiplied with.
    const UNIT: f32 = 1.0;
    /// The registers of a group.
    type Raw: Copy;
    /// What stands in for a group that is not there; never decoded.
    const EMPTY: Self::Raw;

    /// Loads group `group` of row `row`.
    ///
    /// # Safety
    ///
    /// The matrix has that row and group.
    unsafe fn load(place: &Place, row: usize, group: u32) -> Self::Raw;

    /// Elements `4 i..4 i + 4`, `i < 8`, without scale: small integers, or the numbers themselves. `i` is constant after
    /// unrolling.
    fn quad(raw: &Self::Raw, i: usize) -> [f32; 4];

    /// `[factor, offset]` of elements `16 half..16 half + 16`; `group` as it was loaded.
    fn scale(raw: &Self::Raw, group: u32, half: usize) -> [f32; 2];

    /// No element's magnitude is larger, nor that of the largest much smaller: within 2⁸.
    fn bound(raw: &Self::Raw, group: u32) -> f32;

    /// Elements `4 i..4 i + 4`, given the scale of their half.
    #[inline(always)]
    fn decode(raw: &Self::Raw, i: usize, [factor, offset]: [f32; 2]) -> [f32; 4] {
        Self::quad(raw, i).map(|q| {
            // + 0: ggml decodes E2M1's −0 as 0.
            let q = if Self::UNIT == 1.0 { q } else { q * Self::UNIT + 0.0 };
            if Self::HAS_OFFSET { q * factor + offset } else { q * factor }
        })
    }

    /// Pairs of elements `8 i..8 i + 8`, `i < 4`, given the scale of their half, rounded to f16.
    #[inline(always)]
    fn halves(raw: &Self::Raw, i: usize, scale: [f32; 2]) -> [u32; 4] {
        let [a, b, c, d] = Self::decode(raw, 2 * i, scale);
        let [e, f, g, h] = Self::decode(raw, 2 * i + 1, scale);
        [pack_f16x2(a, b), pack_f16x2(c, d), pack_f16x2(e, f), pack_f16x2(g, h)]
    }
}

/// The registers of a group: `Q` words of quants, `H` of high bits, `S` of scales and where in them to look.
#[derive(Clone, Copy)]
pub struct Raw<const Q: usize, const H: usize, const S: usize> {
    quants: [u32; Q],
    high: [u32; H],
    scales: [u32; S],
}

impl<const Q: usize, const H: usize, const S: usize> Raw<Q, H, S> {
    const EMPTY: Self = Self { quants: [0; Q], high: [0; H], scales: [0; S] };
}

impl Place {
    /// Group `group` of row `row`, counted from the matrix's first.
    #[inline(always)]
    fn index(&self, row: usize, group: u32) -> usize {
        row * self.n_groups as usize + group as usize
    }

    /// Chunk `chunk` of the group's quants.
    ///
    /// # Safety
    ///
    /// The matrix has it.
    #[inline(always)]
    unsafe fn chunk<F: Format>(&self, row: usize, group: u32, chunk: usize) -> [u32; 4] {
        let (n_groups, bytes) = (self.n_groups as usize, F::LAYOUT.group_bytes());
        let at = row * n_groups * bytes + chunk_offset(n_groups, bytes, group as usize, chunk);
        // SAFETY: the caller's promise; chunks are 16 bytes from a multiple of 16 on.
        unsafe { self.weight.load16(at) }
    }

    /// The word with the 2 bytes at `at`, and how far right to shift it: [`half_word`] does.
    ///
    /// # Safety
    ///
    /// The word is inside; planes are padded to whole words.
    #[inline(always)]
    unsafe fn load2(&self, at: usize) -> [u32; 2] {
        // SAFETY: the caller's promise.
        [unsafe { self.weight.load4(at & !3) }, (at as u32 & 2) * 8]
    }
}

/// The 2 bytes that [`Place::load2`] was asked for.
#[inline(always)]
fn half_word([word, shift]: [u32; 2]) -> u32 {
    word >> shift & 0xffff
}

/// The f16 in the low half of `bits`.
#[inline(always)]
fn half(bits: u32) -> f32 {
    cuda_std::f16::from_bits(bits as u16).to_f32()
}

/// Byte `p / 8` of `word`, less `zero`, for bytes below 2^`BITS`. Or-ed under the exponent 23 − p, bit p counts 1, and the
/// subtraction is exact: two full-rate instructions, where a conversion takes a quarter-rate one.
#[inline(always)]
fn bytes<const BITS: u32>(word: u32, zero: u32) -> [f32; 4] {
    let at_0 = |byte: u32| f32::from_bits(byte | 0x4b00_0000) - (0x80_0000 + zero) as f32;
    let at_8 = f32::from_bits(word & 0xff00 | 0x4700_0000) - (0x8000 + zero) as f32;
    let at_16 = if BITS <= 7 {
        f32::from_bits(word & 0x7f_0000 | 0x4300_0000) - (0x80 + zero) as f32
    } else {
        at_0(word >> 16 & 0xff)
    };
    [at_0(word & 0xff), at_8, at_16, at_0(word >> 24)]
}

/// Four bits each of elements `4 i..4 i + 4`, a byte each: the low halves of 16 bytes come first, as in ggml.
#[inline(always)]
fn nibbles(quants: &[u32; 4], i: usize) -> u32 {
    quants[i % 4] >> (i / 4 * 4) & 0x0f0f_0f0f
}

/// Two bits each of elements `4 i..4 i + 4`, from 8 bytes: byte b of word w holds elements `16 w + 4 j + b`, j rising from
/// the low bits.
#[inline(always)]
fn bit_pairs(words: &[u32; 2], i: usize) -> u32 {
    words[i / 4] >> (i % 4 * 2) & 0x0303_0303
}

/// One bit each of elements `4 i..4 i + 4`: byte b holds elements `4 j + b`, j rising from the low bit.
#[inline(always)]
fn single_bits(word: u32, i: usize) -> u32 {
    word >> i & 0x0101_0101
}
