//! Where each bit of a block is in the file and in the planes. Layouts of the file: `ggml-common.h` of llama.cpp b11434.

use std::ops::Range;

use kernels::format::{Layout, Planes, WeightFormat};

/// A plane of [`kernels::format`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    Quants,
    High,
    Scales,
    Supers,
}

impl Plane {
    pub const ALL: [Self; 4] = [Self::Quants, Self::High, Self::Scales, Self::Supers];

    pub fn block_bytes(self, layout: &Layout) -> usize {
        match self {
            Self::Quants => layout.quants,
            Self::High => layout.high,
            Self::Scales => layout.scales,
            Self::Supers => layout.supers,
        }
    }

    pub fn range(self, planes: &Planes) -> Range<usize> {
        match self {
            Self::Quants => planes.quants..planes.high,
            Self::High => planes.high..planes.scales,
            Self::Scales => planes.scales..planes.supers,
            Self::Supers => planes.supers..planes.end,
        }
    }
}

/// Bits of a block that one plane takes.
#[derive(Clone, Debug)]
pub(super) struct Field {
    pub plane: Plane,
    moves: Moves,
}

#[derive(Clone, Debug)]
enum Moves {
    /// Whole bytes, side by side in both.
    Bytes { file: usize, packed: usize, len: usize },
    /// `mask` wide bits each.
    Bits { mask: u8, moves: Vec<BitMove> },
}

/// Bytes of the block and of its part of the plane, and shifts in them.
#[derive(Clone, Copy, Debug)]
struct BitMove {
    file: u8,
    file_shift: u8,
    packed: u8,
    packed_shift: u8,
}

impl Field {
    /// Where in a block of the file the `len` bytes are that it moves as they stand, if that is what it does.
    pub fn whole(&self, len: usize) -> Option<usize> {
        match self.moves {
            Moves::Bytes { file, packed: 0, len: moved } if moved == len => Some(file),
            _ => None,
        }
    }

    /// Moves the field from a block of the file to the plane, whose bits are still zero.
    pub fn pack(&self, block: &[u8], plane: &mut [u8]) {
        match &self.moves {
            &Moves::Bytes { file, packed, len } => {
                plane[packed..packed + len].copy_from_slice(&block[file..file + len]);
            }
            Moves::Bits { mask, moves } => {
                for m in moves {
                    plane[usize::from(m.packed)] |=
                        (block[usize::from(m.file)] >> m.file_shift & mask) << m.packed_shift;
                }
            }
        }
    }

    /// The way back, into a block whose bits are still zero.
    pub fn unpack(&self, plane: &[u8], block: &mut [u8]) {
        match &self.moves {
            &Moves::Bytes { file, packed, len } => {
                block[file..file + len].copy_from_slice(&plane[packed..packed + len]);
            }
            Moves::Bits { mask, moves } => {
                for m in moves {
                    block[usize::from(m.file)] |=
                        (plane[usize::from(m.packed)] >> m.packed_shift & mask) << m.file_shift;
                }
            }
        }
    }
}

/// Bytes from offset `file` of the block, at the start of its part of the plane.
fn bytes(plane: Plane, file: usize, len: usize) -> Field {
    Field { plane, moves: Moves::Bytes { file, packed: 0, len } }
}

/// `n` pieces of `width` bits; piece i at byte and shift `file(i)` of the block, `packed(i)` of the plane.
fn bits(
    plane: Plane,
    width: u32,
    n: usize,
    file: impl Fn(usize) -> (usize, usize),
    packed: impl Fn(usize) -> (usize, usize),
) -> Field {
    let moves = (0..n).map(|i| {
        let ((file, file_shift), (packed, packed_shift)) = (file(i), packed(i));
        let [file, file_shift, packed, packed_shift] = [file, file_shift, packed, packed_shift].map(|x| x as u8);
        BitMove { file, file_shift, packed, packed_shift }
    });
    Field { plane, moves: Moves::Bits { mask: (1 << width) - 1, moves: moves.collect() } }
}

/// Element i's single bit in the plane: byte `i % 4` of its group's word.
fn single_bit(i: usize) -> (usize, usize) {
    (i / 32 * 4 + i % 4, i % 32 / 4)
}

/// Element i's bit pair in the plane: byte `i % 4` of its 16 elements' word.
fn bit_pair(i: usize) -> (usize, usize) {
    (i / 16 * 4 + i % 4, i % 16 / 4 * 2)
}

/// Element i's nibble in the plane: 16 bytes a group, the first 16 elements in the low halves.
fn nibble(i: usize) -> (usize, usize) {
    (i / 32 * 16 + i % 16, i % 32 / 16 * 4)
}

/// Element i's bit pair in a K-quant of the file, from byte `start` on: 128 elements share 32 bytes.
fn file_bit_pair(start: usize) -> impl Fn(usize) -> (usize, usize) {
    move |i| (start + i / 128 * 32 + i % 32, i % 128 / 32 * 2)
}

/// The 12 bytes of 6-bit scales and minimums, from byte 4 on in the block and in the plane, in pieces of two bits: piece
/// `3 j + k` is the `k`th of group j.
fn six_bit_scales() -> [Field; 2] {
    let scale_in_file = |i: usize| match (i / 3, i % 3) {
        (j @ ..4, k) => (4 + j, 2 * k),
        (j, 2) => (j, 6),
        (j, k) => (8 + j, 2 * k),
    };
    let min_in_file = |i: usize| match (i / 3, i % 3) {
        (j @ ..4, k) => (8 + j, 2 * k),
        (j, 2) => (4 + j, 6),
        (j, k) => (8 + j, 4 + 2 * k),
    };
    let scale = |i: usize| (4 + i / 3, i % 3 * 2);
    let min = |i: usize| match (i / 3, i % 3) {
        (j, 0) => (4 + j, 6),
        (j, k) => (12 + j / 2, j % 2 * 4 + 2 * (k - 1)),
    };
    [bits(Plane::Scales, 2, 24, scale_in_file, scale), bits(Plane::Scales, 2, 24, min_in_file, min)]
}

/// The fields of a block: together, each of its bits once. None for MXFP4, which `mxfp4.rs` repacks.
pub(super) fn of(format: WeightFormat) -> Vec<Field> {
    use Plane::{High, Quants, Scales, Supers};
    let k_nibble = |start: usize| move |i: usize| (start + i / 64 * 32 + i % 32, i / 32 % 2 * 4);
    match format {
        WeightFormat::F32 => vec![bytes(Quants, 0, 128)],
        WeightFormat::F16 | WeightFormat::Bf16 => vec![bytes(Quants, 0, 64)],
        WeightFormat::Q4_0 => vec![bytes(Scales, 0, 2), bytes(Quants, 2, 16)],
        WeightFormat::Q4_1 => vec![bytes(Scales, 0, 4), bytes(Quants, 4, 16)],
        WeightFormat::Q5_0 => {
            vec![bytes(Scales, 0, 2), bits(High, 1, 32, |i| (2 + i / 8, i % 8), single_bit), bytes(Quants, 6, 16)]
        }
        WeightFormat::Q5_1 => {
            vec![bytes(Scales, 0, 4), bits(High, 1, 32, |i| (4 + i / 8, i % 8), single_bit), bytes(Quants, 8, 16)]
        }
        WeightFormat::Q8_0 => vec![bytes(Scales, 0, 2), bytes(Quants, 2, 32)],
        WeightFormat::Mxfp4 => Vec::new(),
        WeightFormat::Q2K => {
            vec![bytes(Scales, 0, 16), bits(Quants, 2, 256, file_bit_pair(16), bit_pair), bytes(Supers, 80, 4)]
        }
        WeightFormat::Q3K => vec![
            bits(High, 1, 256, |i| (i % 32, i / 32), single_bit),
            bits(Quants, 2, 256, file_bit_pair(32), bit_pair),
            // Scale s: its low four bits, then its high two.
            bits(Scales, 4, 16, |s| (96 + s % 8, s / 8 * 4), |s| (s / 2, s % 2 * 4)),
            bits(Scales, 2, 16, |s| (104 + s % 4, s / 4 * 2), |s| (8 + s / 4, s % 4 * 2)),
            bytes(Supers, 108, 2),
        ],
        WeightFormat::Q4K => {
            let [scales, mins] = six_bit_scales();
            vec![bytes(Scales, 0, 4), scales, mins, bits(Quants, 4, 256, k_nibble(16), nibble)]
        }
        WeightFormat::Q5K => {
            let [scales, mins] = six_bit_scales();
            let high = bits(High, 1, 256, |i| (16 + i % 32, i / 32), single_bit);
            vec![bytes(Scales, 0, 4), scales, mins, high, bits(Quants, 4, 256, k_nibble(48), nibble)]
        }
        WeightFormat::Q6K => vec![
            bits(Quants, 4, 256, |i| (i / 128 * 64 + i % 64, i % 128 / 64 * 4), nibble),
            bits(High, 2, 256, file_bit_pair(128), bit_pair),
            bytes(Scales, 192, 16),
            bytes(Supers, 208, 2),
        ],
    }
}
