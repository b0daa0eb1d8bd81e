//! MXFP4 between the file and its planes: sixteen bytes at a time, since these are the most bytes of a model.
//!
//! Half `i` of a group's sixteen bytes in the plane, `i < 8`, takes its four codes from bytes `i` and `8 + i` of the file:
//! both directions permute the bits of 16-bit lanes, which compilers turn into vector instructions.

use kernels::format::{MXFP4_ROWS, MXFP4_RUN, Mxfp4Place};

/// Bytes of a block in the file: the scale, then 32 codes.
const BLOCK_BYTES: usize = 17;
/// The E8M0 scale that is no number.
const NAN_SCALE: u8 = 255;

/// Writes the quants and scales of rows of `n_groups` blocks, the first of which is the first of eight, and the last the
/// last of eight or of the matrix.
pub(super) fn pack(rows: &[u8], n_groups: usize, quants: &mut [u8], scales: &mut [u8]) {
    let row_bytes = BLOCK_BYTES * n_groups;
    let packed = quants.chunks_mut(16 * MXFP4_ROWS * n_groups).zip(scales.chunks_mut(MXFP4_ROWS * n_groups));
    for (rows, (quants, scales)) in rows.chunks(MXFP4_ROWS * row_bytes).zip(packed) {
        let height = rows.len() / row_bytes;
        for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
            let (runs, rest) = row.as_chunks::<{ BLOCK_BYTES * MXFP4_RUN }>();
            for (i, run) in runs.iter().enumerate() {
                let first = (i * height + r) * MXFP4_RUN;
                // Of constant length, this is unrolled.
                pack_run(run, MXFP4_RUN, &mut quants[16 * first..16 * (first + MXFP4_RUN)], &mut scales[first..]);
            }
            let width = rest.len() / BLOCK_BYTES;
            let first = runs.len() * MXFP4_RUN * height + r * width;
            pack_run(rest, width, &mut quants[16 * first..16 * (first + width)], &mut scales[first..]);
        }
    }
}

#[inline(always)]
fn pack_run(blocks: &[u8], width: usize, quants: &mut [u8], scales: &mut [u8]) {
    for (j, (block, scale)) in blocks.as_chunks::<BLOCK_BYTES>().0.iter().zip(scales).enumerate() {
        let [first, codes @ ..] = block;
        *scale = *first;
        for (t, word) in pack_codes(codes).as_chunks::<4>().0.iter().enumerate() {
            let at = 4 * (t * width + j);
            quants[at..at + 4].copy_from_slice(word);
        }
    }
}

/// The way back, for a whole matrix.
pub(super) fn unpack(quants: &[u8], scales: &[u8], n_groups: usize, rows: &mut [u8]) {
    let n_out = rows.len() / (BLOCK_BYTES * n_groups);
    for (i, block) in rows.chunks_exact_mut(BLOCK_BYTES).enumerate() {
        let place = Mxfp4Place::new(n_groups, n_out, i / n_groups, i % n_groups);
        block[0] = scales[place.scale()];
        let mut packed = [0; 16];
        for (t, word) in packed.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let at = place.word(t);
            word.copy_from_slice(&quants[at..at + 4]);
        }
        block[1..].copy_from_slice(&unpack_codes(&packed));
    }
}

/// The first block of `rows` whose scale is no number.
pub(super) fn nan_block(rows: &[u8]) -> Option<usize> {
    rows.chunks_exact(BLOCK_BYTES).position(|block| block[0] == NAN_SCALE)
}

fn pack_codes(codes: &[u8; 16]) -> [u8; 16] {
    // Lanes of 16 bits; from the low bits on: a, c, b, d, a sign above three bits each.
    let mut lanes: [u16; 8] = std::array::from_fn(|i| u16::from_le_bytes([codes[i], codes[8 + i]]));
    for z in &mut lanes {
        let a = (*z & 0x0007) << 9 | (*z & 0x0008) << 12;
        let c = *z >> 1 & 0x0038 | (*z & 0x0080) << 7;
        // Three bits of b move as far as the sign of d.
        let b_and_d = (*z & 0x0800) << 1 | *z >> 2 & 0x21c0 | *z >> 12 & 0x0007;
        *z = a | b_and_d | c;
    }
    let mut packed = [0; 16];
    for (half, lane) in packed.as_chunks_mut::<2>().0.iter_mut().zip(lanes) {
        *half = lane.to_le_bytes();
    }
    packed
}

fn unpack_codes(packed: &[u8; 16]) -> [u8; 16] {
    let mut codes = [0; 16];
    for (i, half) in packed.as_chunks::<2>().0.iter().enumerate() {
        let p = u16::from_le_bytes(*half);
        let a = p >> 9 & 0x0007 | p >> 12 & 0x0008;
        let b = p >> 1 & 0x0800;
        let c = p << 1 & 0x0070 | p >> 7 & 0x0080;
        let d = p << 12 & 0x7000 | p << 2 & 0x8700;
        [codes[i], codes[8 + i]] = (a | b | c | d).to_le_bytes();
    }
    codes
}
