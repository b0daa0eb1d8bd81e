//! Decodes every supported type to `f32`, bit for bit as ggml's reference does: what kernels are tested against.
//!
//! No product here rounds: 11 bits of an f16 scale, at most 7 of a sub-scale and 5 of a quant (or 7 and none) fit the 24
//! of an `f32`. Only adding the minimum does, once, so that kernels may reorder or fuse and still give the same bits.
//! Blocks are packed, never aligned, little-endian. Layouts: `ggml-common.h` of llama.cpp b11434.

use super::TensorType;
use half::{bf16, f16};

/// Why bytes cannot be decoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum DecodeError {
    #[error("type {ty} ({}) cannot be decoded; supported: {}", ty.id(), TensorType::supported_names())]
    Unsupported { ty: TensorType },
    #[error("{n_bytes} bytes are not whole {ty} blocks of {} bytes", ty.block_bytes())]
    PartialBlock { ty: TensorType, n_bytes: usize },
}

/// Decodes consecutive blocks of type `ty`; one row or many, since no block straddles a row.
///
/// Scales that are infinite or NaN decode to what IEEE arithmetic makes of them, and an MXFP4 exponent of 255 to
/// 2¹²⁷ or infinity, as in ggml on a CPU.
///
/// # Errors
/// - [`DecodeError::Unsupported`] unless [`TensorType::is_supported`].
/// - [`DecodeError::PartialBlock`] if the length of `bytes` is no multiple of the block size.
pub fn decode(ty: TensorType, bytes: &[u8]) -> Result<Vec<f32>, DecodeError> {
    let block: fn(&[u8], &mut [f32]) = match ty {
        TensorType::F32 => f32_le,
        TensorType::F16 => |block, out| out[0] = half_at(block, 0),
        TensorType::BF16 => |block, out| out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        TensorType::Q4_0 => q4_0,
        TensorType::Q4_1 => q4_1,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q8_0 => q8_0,
        TensorType::Q2_K => q2_k,
        TensorType::Q3_K => q3_k,
        TensorType::Q4_K => q4_k,
        TensorType::Q5_K => q5_k,
        TensorType::Q6_K => q6_k,
        TensorType::MXFP4 => mxfp4,
        _ => return Err(DecodeError::Unsupported { ty }),
    };
    if !bytes.len().is_multiple_of(ty.block_bytes()) {
        return Err(DecodeError::PartialBlock { ty, n_bytes: bytes.len() });
    }
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    for (bytes, out) in bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(ty.block_len())) {
        block(bytes, out);
    }
    Ok(out)
}

fn f32_le(block: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Element `i` of 32 nibbles: the low halves come first, then the high ones.
fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

/// `d f16 · qs[16]`.
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = f32::from(nibble(&block[2..], i) as i8 - 8) * d;
    }
}

/// `d f16 · m f16 · qs[16]`.
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = f32::from(nibble(&block[4..], i)) * d + m;
    }
}

/// The quant of Q5_0 and Q5_1: `qh u32 · qs[16]`, where bit `i` of `qh` is the fifth bit of element `i`.
fn five_bits(block: &[u8], i: usize) -> u8 {
    nibble(&block[4..], i) | (block[i / 8] >> (i % 8) & 1) << 4
}

/// `d f16 · qh u32 · qs[16]`.
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = f32::from(five_bits(&block[2..], i) as i8 - 16) * d;
    }
}

/// `d f16 · m f16 · qh u32 · qs[16]`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        *out = f32::from(five_bits(&block[4..], i)) * d + m;
    }
}

/// `d f16 · qs[32] i8`.
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, out) in out.iter_mut().enumerate() {
        *out = f32::from(block[2 + i] as i8) * d;
    }
}

/// Two bits of element `i` of a super-block: 128 elements share 32 bytes, a bit pair for each 32 elements.
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// `scales[16] · qs[64] · d f16 · dmin f16`; a scale byte is 4 bits of scale below 4 bits of minimum.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (i, out) in out.iter_mut().enumerate() {
        let scale = scales[i / 16];
        *out = d * f32::from(scale & 15) * f32::from(two_bits(qs, i)) - dmin * f32::from(scale >> 4);
    }
}

/// `hmask[32] · qs[64] · scales[12] · d f16`; a clear bit in the mask subtracts 4.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (hmask, qs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (i, out) in out.iter_mut().enumerate() {
        let high = hmask[i % 32] >> (i / 32) & 1;
        let q = two_bits(qs, i) as i8 - if high == 1 { 0 } else { 4 };
        *out = d * f32::from(q3_k_scale(scales, i / 16)) * f32::from(q);
    }
}

/// Scale `s` of 16, signed 6 bits: the low four in bytes 0 to 7, the high two in bytes 8 to 11.
fn q3_k_scale(scales: &[u8], s: usize) -> i8 {
    let low = if s < 8 { scales[s] & 15 } else { scales[s - 8] >> 4 };
    let high = scales[8 + s % 4] >> (s / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// Scale and minimum of sub-block `j` of 8, unsigned 6 bits each, from the 12 bytes of Q4_K and Q5_K.
fn scale_and_min(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4)
    }
}

/// The nibble of element `i` of a super-block: 64 elements share 32 bytes, the first 32 the low halves.
fn k_nibble(qs: &[u8], i: usize) -> u8 {
    qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15
}

/// `d f16 · dmin f16 · scales[12] · qs[128]`.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], i / 32);
        let q = k_nibble(&block[16..], i);
        *out = d * f32::from(scale) * f32::from(q) - dmin * f32::from(min);
    }
}

/// `d f16 · dmin f16 · scales[12] · qh[32] · qs[128]`; bit `j` of `qh[l]` is the fifth bit of element `32 j + l`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], i / 32);
        let q = k_nibble(&block[48..], i) | (block[16 + i % 32] >> (i / 32) & 1) << 4;
        *out = d * f32::from(scale) * f32::from(q) - dmin * f32::from(min);
    }
}

/// `ql[128] · qh[64] · scales[16] i8 · d f16`.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        let low = ql[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        let q = (low | two_bits(qh, i) << 4) as i8 - 32;
        *out = d * f32::from(scales[i / 16] as i8) * f32::from(q);
    }
}

/// Twice the values of E2M1, which makes them whole; code 8 is +0, as in ggml.
const E2M1_DOUBLED: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// `e u8 · qs[16]`: E2M1 values times the E8M0 scale 2^(e − 127).
fn mxfp4(block: &[u8], out: &mut [f32]) {
    // The values are doubled, so the scale is halved. Its two smallest powers are subnormal.
    let half_scale = match block[0] {
        e @ ..2 => f32::from_bits(0x0020_0000 << e),
        e => f32::from_bits((u32::from(e) - 1) << 23),
    };
    for (i, out) in out.iter_mut().enumerate() {
        *out = E2M1_DOUBLED[usize::from(nibble(&block[1..], i))] * half_scale;
    }
}
