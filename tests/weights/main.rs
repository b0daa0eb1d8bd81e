//! Repacking of weights: nothing is lost, nothing grows.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]

use gamma_tests::bytes;
use gpt_gamma::gguf::TensorType;
use gpt_gamma::weights::{Error, Packing};

/// Rows and blocks of a row: one, one off eight and off sixteen, many.
const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 7), (2, 9), (5, 8), (1, 17), (9, 24), (19, 90)];

#[test]
fn unpacking_undoes_repacking() {
    for &ty in TensorType::SUPPORTED {
        for (n_out, n_blocks) in SHAPES {
            let (packing, source) = matrix(ty, n_out, n_blocks);
            let packed = repacked(&packing, &source);
            let mut unpacked = vec![0xaa; source.len()];
            packing.unpack(&packed, &mut unpacked);
            assert!(unpacked == source, "{ty}, {n_out} rows of {n_blocks} blocks");
        }
    }
}

#[test]
fn every_bit_of_the_file_is_one_bit_of_the_matrix() {
    for &ty in TensorType::SUPPORTED {
        let (packing, source) = matrix(ty, 2, 9);
        let ones = |bytes: &[u8]| bytes.iter().map(|byte| byte.count_ones()).sum::<u32>();
        assert_eq!(ones(&repacked(&packing, &source)), ones(&source), "{ty}");
        assert_eq!(ones(&repacked(&packing, &vec![0xff; source.len()])) as usize, 8 * source.len(), "{ty}");
    }
}

#[test]
fn only_the_ends_of_four_planes_are_padded() {
    for &ty in TensorType::SUPPORTED {
        for (n_out, n_blocks) in SHAPES {
            let (packing, source) = matrix(ty, n_out, n_blocks);
            let padding = packing.n_bytes() - source.len();
            assert!(padding < 4 * 128, "{ty}: {padding} bytes more than in the file");
        }
    }
}

#[test]
fn rows_at_a_time_make_the_same_matrix() {
    for &ty in TensorType::SUPPORTED {
        let n_out = 19;
        let (packing, source) = matrix(ty, n_out, 9);
        // Poison: every byte of the matrix must come from some segment.
        let mut found = vec![0xaa; packing.n_bytes()];
        let together = packing.rows_together();
        let some = if together == 1 { [0..4, 4..5, 5..5, 5..n_out] } else { [0..8, 8..8, 8..16, 16..n_out] };
        for rows in some {
            let mut part = vec![0x55; packing.rows_bytes(rows.clone())];
            let row_bytes = packing.row_bytes();
            let source = &source[rows.start * row_bytes..rows.end * row_bytes];
            for segment in packing.repack_rows(rows, source, &mut part) {
                found[segment.to..segment.to + segment.from.len()].copy_from_slice(&part[segment.from]);
            }
        }
        assert!(found == repacked(&packing, &source), "{ty}");
    }
}

#[test]
fn words_of_mxfp4_hold_the_codes_of_two_fragments() {
    // Five groups: a run of four and one of one. Ten rows: eight together, and two.
    let (n_groups, n_out) = (5, 10);
    let packing = Packing::new(TensorType::MXFP4, n_groups * 32, n_out).unwrap();
    let code = |row: usize, group: usize, i: usize| ((5 * row + 2 * group + i) % 16) as u8;
    let mut source = Vec::new();
    for (row, group) in (0..n_out).flat_map(|row| (0..n_groups).map(move |group| (row, group))) {
        source.push((10 * row + group) as u8);
        source.extend((0..16).map(|j| code(row, group, j) | code(row, group, 16 + j) << 4));
    }
    let packed = repacked(&packing, &source);
    for (row, group) in (0..n_out).flat_map(|row| (0..n_groups).map(move |group| (row, group))) {
        let (first, height, row_of) = if row < 8 { (0, 8, row) } else { (8 * 80, 2, row - 8) };
        let (run, lane, width) = if group < 4 { (0, group, 4) } else { (64 * height, 0, 1) };
        for t in 0..4 {
            let at = first + run + 16 * width * row_of + 4 * (t * width + lane);
            let word = u32::from_le_bytes(packed[at..at + 4].try_into().unwrap());
            // Sign and the other three bits of four codes, in each half.
            let places = [(0, 15, 9), (8, 12, 6), (16, 14, 3), (24, 13, 0)];
            let half = |h: usize| {
                places.iter().fold(0, |half, &(first, sign, rest)| {
                    let code = u32::from(code(row, group, first + 2 * t + h));
                    half | code >> 3 << sign | (code & 7) << rest
                })
            };
            assert_eq!(word, half(0) | half(1) << 16, "row {row}, group {group}, word {t}");
        }
    }
    // 800 bytes of quants are padded to 896. Scales of a run are a row's next to the other's.
    let scales = &packed[896..];
    assert_eq!(scales[..6], [0, 1, 2, 3, 10, 11]);
    assert_eq!(scales[32..40], [4, 14, 24, 34, 44, 54, 64, 74]);
    assert_eq!(scales[40..50], [80, 81, 82, 83, 90, 91, 92, 93, 84, 94]);
}

#[test]
fn scales_of_mxfp4_that_are_no_number_are_refused() {
    let packing = Packing::new(TensorType::MXFP4, 96, 4).unwrap();
    let mut source = vec![0xff; 4 * 51];
    for (i, block) in source.chunks_exact_mut(17).enumerate() {
        block[0] = [0, 1, 254][i % 3];
    }
    assert_eq!(packing.check_rows(0, &source), Ok(()));
    source[2 * 51 + 17] = 255;
    assert_eq!(packing.check_rows(0, &source), Err(Error::NanScale { row: 2, block: 1 }));
    assert_eq!(packing.check_rows(7, &source[2 * 51..]), Err(Error::NanScale { row: 7, block: 1 }));
    // 255 is a number elsewhere.
    let packing = Packing::new(TensorType::Q8_0, 96, 1).unwrap();
    assert_eq!(packing.check_rows(0, &[255; 102]), Ok(()));
}

#[test]
#[should_panic(expected = "are not whole")]
fn rows_that_lie_together_are_repacked_together() {
    let (packing, source) = matrix(TensorType::MXFP4, 16, 3);
    let mut part = vec![0; packing.rows_bytes(0..9)];
    packing.repack_rows(0..9, &source[..9 * packing.row_bytes()], &mut part);
}

#[test]
fn rows_of_partial_groups_are_refused() {
    let error = |ty, n_in| Packing::new(ty, n_in, 1).unwrap_err();
    let refused = |ty, n_in, multiple| assert_eq!(error(ty, n_in), Error::RowLength { ty, n_in, multiple });
    refused(TensorType::F32, 48, 32);
    refused(TensorType::F16, 0, 32);
    refused(TensorType::Q8_0, 33, 32);
    refused(TensorType::Q4_K, 128, 256);
}

#[test]
fn types_without_kernels_are_refused_by_name() {
    let ty = TensorType::IQ2_XS;
    assert_eq!(Packing::new(ty, 256, 1).unwrap_err(), Error::Unsupported { ty });
    for &ty in TensorType::ALL {
        assert_eq!(Packing::new(ty, 256, 1).is_ok(), ty.is_supported(), "{ty}");
    }
}

fn matrix(ty: TensorType, n_out: usize, n_blocks: usize) -> (Packing, Vec<u8>) {
    let packing = Packing::new(ty, n_blocks * ty.block_len().max(32), n_out).unwrap();
    let source = bytes(7, n_out * packing.row_bytes());
    (packing, source)
}

fn repacked(packing: &Packing, source: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x55; packing.n_bytes()];
    packing.repack(source, &mut packed);
    packed
}
