//! MXFP4 between the file and its planes: sixteen bytes at a time, since these are the most bytes of a model.
//!
//! Half `i` of a group's sixteen bytes in the plane, `i < 8`, takes its four codes from bytes `i` and `8 + i` of the file:
//! both directions permute the bits of 16-bit lanes, which compilers turn into vector instructions.

use kernels::format::{MXFP4_RUN, mxfp4_word};

/// Bytes of a block in the file: the scale, then 32 codes.
const BLOCK_BYTES: usize = 17;
/// The E8M0 scale that is no number.
pub(super) const NAN_SCALE: u8 = 255;

/// Writes the quants and scales of the blocks of one row.
pub(super) fn pack_row(row: &[u8], quants: &mut [u8], scales: &mut [u8]) {
    let (runs, rest) = row.as_chunks::<{ BLOCK_BYTES * MXFP4_RUN }>();
    let (packed_runs, packed_rest) = quants.as_chunks_mut::<{ 16 * MXFP4_RUN }>();
    let (run_scales, rest_scales) = scales.as_chunks_mut::<MXFP4_RUN>();
    for ((run, packed), scales) in runs.iter().zip(packed_runs).zip(run_scales) {
        // Of constant length, this is unrolled.
        pack_run(run, packed, scales);
    }
    pack_run(rest, packed_rest, rest_scales);
}

#[inline(always)]
fn pack_run(blocks: &[u8], packed: &mut [u8], scales: &mut [u8]) {
    let n_groups = scales.len();
    for (j, (block, scale)) in blocks.as_chunks::<BLOCK_BYTES>().0.iter().zip(scales).enumerate() {
        let [first, codes @ ..] = block;
        *scale = *first;
        for (t, word) in pack(codes).as_chunks::<4>().0.iter().enumerate() {
            let at = mxfp4_word(n_groups, j, t);
            packed[at..at + 4].copy_from_slice(word);
        }
    }
}

/// The way back.
pub(super) fn unpack_row(quants: &[u8], scales: &[u8], row: &mut [u8]) {
    for (group, block) in row.chunks_exact_mut(BLOCK_BYTES).enumerate() {
        block[0] = scales[group];
        let mut packed = [0; 16];
        for (t, word) in packed.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let at = mxfp4_word(scales.len(), group, t);
            word.copy_from_slice(&quants[at..at + 4]);
        }
        block[1..].copy_from_slice(&unpack(&packed));
    }
}

/// The first block of `rows` whose scale is no number.
pub(super) fn nan_block(rows: &[u8]) -> Option<usize> {
    rows.chunks_exact(BLOCK_BYTES).position(|block| block[0] == NAN_SCALE)
}

fn pack(codes: &[u8; 16]) -> [u8; 16] {
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

fn unpack(packed: &[u8; 16]) -> [u8; 16] {
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
