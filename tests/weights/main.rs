//! Repacking of weights: nothing is lost, nothing grows.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]

use gamma_tests::bytes;
use gpt_gamma::gguf::TensorType;
use gpt_gamma::weights::{Error, Packing};

/// Rows and blocks of a row: one, one off eight and off sixteen, many.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 7), (2, 9), (5, 8), (1, 17), (9, 24)];

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
        let n_out = 11;
        let (packing, source) = matrix(ty, n_out, 9);
        // Poison: every byte of the matrix must come from some segment.
        let mut found = vec![0xaa; packing.n_bytes()];
        for rows in [0..4, 4..5, 5..5, 5..n_out] {
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
