//! Blocks to numbers, bit for bit.

use gpt_gamma::gguf::{DecodeError, TensorType, decode};
use safetensors::SafeTensors;

/// Random blocks of each type, NaN and infinite scales among them, as gguf-py decodes them.
#[test]
fn random_blocks_decode_as_ggml_decodes_them() {
    let golden = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/gguf/golden/blocks.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    for &ty in TensorType::SUPPORTED {
        let bytes = golden.tensor(&format!("{ty}.bytes")).unwrap();
        let expected = decode(TensorType::F32, golden.tensor(&format!("{ty}.values")).unwrap().data()).unwrap();
        let found = decode(ty, bytes.data()).unwrap();
        assert_eq!((found.len(), expected.len()), (2048, 2048), "{ty}");
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // Which bits of a NaN survive arithmetic is the processor's choice.
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{ty}, element {i}: {found:e}, expected {expected:e}");
        }
    }
}

/// Bits of 1.0 as f16, little-endian.
const ONE: [u8; 2] = [0x00, 0x3C];

#[test]
fn mxfp4_elements_follow_the_published_block() {
    let mut block = vec![0x80];
    for _ in 0..2 {
        block.extend([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]);
    }
    let low = [0.0, 2.0, 4.0, 8.0, -0.0, -2.0, -4.0, -8.0];
    let high = [1.0, 3.0, 6.0, 12.0, -1.0, -3.0, -6.0, -12.0];
    assert_eq!(decode(TensorType::MXFP4, &block).unwrap(), [low, low, high, high].concat());
}

#[test]
fn mxfp4_exponents_reach_both_ends() {
    let first = |exponent: u8, code: u8| {
        let mut block = [0; 17];
        (block[0], block[1]) = (exponent, code);
        decode(TensorType::MXFP4, &block).unwrap()[0]
    };
    // Code 1 is 0.5, so its value is half the scale 2^(e − 127): a subnormal for the two smallest exponents.
    for (exponent, bits) in
        [(0, 0x0020_0000), (1, 0x0040_0000), (2, 0x0080_0000), (127, 0x3F00_0000), (254, 0x7E80_0000)]
    {
        assert_eq!(first(exponent, 1).to_bits(), bits, "e = {exponent}");
    }
    assert_eq!(first(255, 1).to_bits(), 0x7F00_0000); // 2¹²⁷, not NaN.
    assert_eq!(first(255, 2), f32::INFINITY);
    assert_eq!(first(255, 0), 0.0);
    assert_eq!((first(254, 3), first(254, 4)), (1.5 * 2_f32.powi(127), f32::INFINITY));
    assert_eq!((first(253, 5), first(253, 14)), (3.0 * 2_f32.powi(126), f32::NEG_INFINITY));
    assert_eq!(first(0, 7), 6.0 * 2_f32.powi(-127));
    assert_eq!(first(127, 8).to_bits(), 0, "ggml's code 8 is +0");
}

#[test]
fn q3_k_scales_follow_the_published_bytes() {
    let mut block = [0; 110];
    block[..32].fill(0xFF); // No 4 is subtracted.
    block[32..96].fill(0b0101_0101); // All quants are 1.
    block[96..108].copy_from_slice(&[0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED, 0x0F, 0x1B, 0x2C, 0x3D, 0x4E]);
    block[108..].copy_from_slice(&ONE);
    let scales = [17, -29, -11, 7, 9, 27, 29, 31, -14, 4, 22, -24, -22, -20, -18, -16];
    let expected: Vec<f32> = scales.iter().flat_map(|&scale| [scale as f32; 16]).collect();
    assert_eq!(decode(TensorType::Q3_K, &block).unwrap(), expected);
}

#[test]
fn q4_k_and_q5_k_scales_follow_the_published_bytes() {
    let scales = [0xC1, 0x82, 0x43, 0x04, 0xC5, 0x86, 0x47, 0x08, 0x9A, 0xBC, 0xDE, 0xF0];
    let expected = |q: f32| -> Vec<f32> {
        let (sc, m) = ([1, 2, 3, 4, 58, 44, 30, 0], [5, 6, 7, 8, 57, 43, 29, 15]);
        sc.iter().zip(m).flat_map(|(&sc, m)| [q * sc as f32 - m as f32; 32]).collect()
    };
    let mut block = [0; 144];
    block[..2].copy_from_slice(&ONE);
    block[2..4].copy_from_slice(&ONE);
    block[4..16].copy_from_slice(&scales);
    block[16..].fill(0x33);
    assert_eq!(decode(TensorType::Q4_K, &block).unwrap(), expected(3.0));

    let mut block = [0; 176];
    block[..2].copy_from_slice(&ONE);
    block[2..4].copy_from_slice(&ONE);
    block[4..16].copy_from_slice(&scales);
    block[16..48].fill(0xFF);
    block[48..].fill(0x33);
    assert_eq!(decode(TensorType::Q5_K, &block).unwrap(), expected(19.0));
}

#[test]
fn subnormal_halves_keep_their_value() {
    assert_eq!(
        decode(TensorType::F16, &[1, 0, 0xFF, 0x03, 0, 0x80]).unwrap(),
        [2_f32.powi(-24), 1023.0 * 2_f32.powi(-24), -0.0]
    );
    let mut block = [0; 34];
    (block[0], block[2], block[33]) = (1, 0x80, 127);
    let values = decode(TensorType::Q8_0, &block).unwrap();
    assert_eq!((values[0], values[31]), (-128.0 * 2_f32.powi(-24), 127.0 * 2_f32.powi(-24)));
}

#[test]
fn only_whole_blocks_of_known_types_decode() {
    for &ty in TensorType::ALL {
        let n_bytes = 2 * ty.block_bytes();
        match decode(ty, &vec![0; n_bytes]) {
            Ok(values) => assert_eq!((ty.is_supported(), values), (true, vec![0.0; 2 * ty.block_len()]), "{ty}"),
            Err(error) => assert_eq!((ty.is_supported(), error), (false, DecodeError::Unsupported { ty })),
        }
        if ty.is_supported() {
            let error = DecodeError::PartialBlock { ty, n_bytes: n_bytes - 1 };
            assert_eq!(decode(ty, &vec![0; n_bytes - 1]), Err(error));
        }
    }
    let message = decode(TensorType::IQ2_XS, &[]).unwrap_err().to_string();
    assert!(message.starts_with("type IQ2_XS (17) cannot be decoded; supported: F32, F16, BF16, Q4_0"), "{message}");
}
