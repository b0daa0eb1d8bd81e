use super::weights::{Matrix, gelu_erf, gelu_tanh, product};
use gamma_tests::{TestDevice, assert_close, devices, normal};
use gpt_gamma::gguf::TensorType;
use kernels::matmul::{ADD, GELU_ERF, GELU_TANH, STORE, run};

#[test]
fn single_block_and_token() {
    for &ty in TensorType::SUPPORTED {
        let n_in = ty.block_len().max(32);
        let (weight, x) = (Matrix::random(ty, n_in, 1, 1), normal(2, n_in));
        let expected = product(&weight, &x, &[])[0];
        // One sum may cancel, so its bound is that of its terms: each factor is rounded by at most 2⁻¹¹ of itself.
        let terms: f64 = weight.decoded().iter().zip(&x).map(|(&w, &x)| f64::from(w * x).abs()).sum();
        for device in devices() {
            let found = f64::from(matmul(&device, &weight, &x, &[], &[], STORE)[0]);
            assert!((found - expected).abs() <= terms / 1024.0, "{ty}: found {found}, expected {expected}");
        }
    }
}

#[test]
fn one_off_a_tile() {
    for &ty in TensorType::SUPPORTED {
        check(&Matrix::random(ty, 256, 129, 2), 65);
    }
    for (n_in, n_out, n_tokens) in
        [(32, 127, 63), (64, 128, 64), (96, 129, 17), (288, 31, 33), (32, 33, 15), (64, 1, 16)]
    {
        check(&Matrix::random(TensorType::Q4_0, n_in, n_out, 3), n_tokens);
        check(&Matrix::random(TensorType::F16, n_in, n_out, 3), n_tokens);
    }
}

#[test]
fn gpt2_124m_attention_input() {
    for n_tokens in [1, 3, 65] {
        check(&Matrix::random(TensorType::Q6_K, 768, 2304, 4), n_tokens);
    }
}

#[test]
fn gpt2_124m_feed_forward_output() {
    for n_tokens in [1, 3] {
        check(&Matrix::random(TensorType::Q4_K, 3072, 768, 5), n_tokens);
    }
}

#[test]
fn bias_and_epilogues() {
    let weight = Matrix::random(TensorType::Q4_1, 96, 40, 6);
    let x: Vec<f32> = normal(7, 5 * 96).iter().map(|x| x / 10.0).collect();
    let (bias, before) = (normal(8, 40), normal(9, 5 * 40));
    let y = product(&weight, &x, &bias);
    for device in devices() {
        let run = |epilogue| matmul(&device, &weight, &x, &bias, &before, epilogue);
        let each = |f: fn(f64) -> f64| y.iter().map(|&y| f(y)).collect::<Vec<_>>();
        assert_close(&run(STORE), &y, TOLERANCE);
        let sum: Vec<f64> = y.iter().zip(&before).map(|(y, &before)| y + f64::from(before)).collect();
        assert_close(&run(ADD), &sum, TOLERANCE);
        // GELU's slope is at most 1.13.
        assert_close(&run(GELU_ERF), &each(gelu_erf), 1.2 * TOLERANCE);
        assert_close(&run(GELU_TANH), &each(gelu_tanh), 1.2 * TOLERANCE);
    }
}

#[test]
fn zero_rows_yield_the_bias() {
    for &ty in TensorType::SUPPORTED {
        let mut weight = Matrix::random(ty, 256, 3, 10);
        weight.bytes.fill(0);
        for device in devices() {
            let bias = [1.5, -2.0, 0.0];
            assert_eq!(matmul(&device, &weight, &normal(11, 256), &bias, &[], STORE), bias, "{ty}");
        }
    }
}

#[test]
fn zero_activations_yield_the_bias() {
    let weight = Matrix::random(TensorType::Q5_K, 256, 3, 12);
    for device in devices() {
        let bias = [1.5, -2.0, 0.0];
        assert_eq!(matmul(&device, &weight, &[0.0; 256], &bias, &[], STORE), bias);
    }
}

#[test]
fn magnitudes_beyond_f16_are_kept() {
    for (weight_scale, x_scale) in [(1e30, 1e-30), (1e-30, 1e30), (1e-36, 1.0), (1.0, 1e-36), (1.0, 1e35), (1e35, 1.0)]
    {
        for ty in [TensorType::F32, TensorType::BF16] {
            let mut weight = Matrix::random(ty, 96, 9, 13);
            for element in weight.bytes.chunks_exact_mut(ty.block_bytes()) {
                let high = element.len() - 2;
                let x = half::bf16::from_le_bytes([element[high], element[high + 1]]).to_f32() * weight_scale;
                element[high..].copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
            }
            let x: Vec<f32> = normal(14, 5 * 96).iter().map(|x| x * x_scale).collect();
            check_with(&weight, &x);
        }
    }
}

#[test]
fn neighbours_of_very_different_magnitude_are_kept() {
    // Each group of 32 in a magnitude of its own, from 2⁻⁶⁰ to 2⁶⁰, in weights and inversely in activations: every group
    // counts alike, and an exponent for a whole row would lose most of them.
    let n_in = 32 * 41;
    let mut weight = Matrix::random(TensorType::F32, n_in, 9, 15);
    let power = |i: usize| 2f32.powi(3 * (i % n_in / 32) as i32 - 60);
    for (i, element) in weight.bytes.chunks_exact_mut(4).enumerate() {
        let x = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
        element.copy_from_slice(&(x * power(i)).to_le_bytes());
    }
    let x: Vec<f32> = normal(16, 2 * n_in).iter().enumerate().map(|(i, x)| x / power(i)).collect();
    check_with(&weight, &x);
}

#[test]
fn extreme_exponents_of_mxfp4_are_kept() {
    for e in [0u8, 1, 2, 60, 103, 141, 200, 250] {
        let mut weight = Matrix::random(TensorType::MXFP4, 64, 9, 17);
        weight.bytes.chunks_exact_mut(17).for_each(|block| block[0] = e);
        // Results near 1 whatever the weights; 2¹²⁰ is near the most that x may be.
        let x_scale = 2f32.powi(127 - i32::from(e.max(7)));
        let x: Vec<f32> = normal(18, 3 * 64).iter().map(|x| x * x_scale).collect();
        check_with(&weight, &x);
    }
}

#[test]
fn non_finite_values_stay_visible_where_they_belong() {
    let weight = Matrix::random(TensorType::Q8_0, 64, 5, 19);
    for hostile in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = normal(20, 3 * 64);
        x[64 + 7] = hostile;
        for device in devices() {
            let found = matmul(&device, &weight, &x, &[], &[], STORE);
            for (i, y) in found.iter().enumerate() {
                assert_eq!(y.is_finite(), i / 5 != 1, "{hostile}: token {}, row {}: {y}", i / 5, i % 5);
            }
        }
    }
    let mut weight = Matrix::random(TensorType::Q4_0, 64, 5, 21);
    weight.bytes[2 * 36..2 * 36 + 2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    for device in devices() {
        let found = matmul(&device, &weight, &normal(22, 3 * 64), &[], &[], STORE);
        for (i, y) in found.iter().enumerate() {
            assert_eq!(y.is_finite(), i % 5 != 2, "token {}, row {}: {y}", i / 5, i % 5);
        }
    }
}

/// Both factors are rounded to f16: each by 2⁻¹¹/√12 to 2⁻¹²/√12 of itself, so a product by about 2e-4 · √2 norm-wise.
/// A wrong weight shows as 1 / √n_in, 2e-2 at least.
const TOLERANCE: f64 = 6e-4;

#[track_caller]
fn check(weight: &Matrix, n_tokens: usize) {
    let (x, bias) = (normal(100, n_tokens * weight.n_in), normal(101, weight.n_out));
    let expected = product(weight, &x, &bias);
    for device in devices() {
        assert_close(&matmul(&device, weight, &x, &bias, &[], STORE), &expected, TOLERANCE);
    }
}

#[track_caller]
fn check_with(weight: &Matrix, x: &[f32]) {
    let expected = product(weight, x, &[]);
    for device in devices() {
        assert_close(&matmul(&device, weight, x, &[], &[], STORE), &expected, TOLERANCE);
    }
}

/// `before`: what `out` holds; empty if that is of no matter.
#[track_caller]
fn matmul(device: &TestDevice, weight: &Matrix, x: &[f32], bias: &[f32], before: &[f32], epilogue: u32) -> Vec<f32> {
    let n_tokens = x.len() / weight.n_in;
    let out = if before.is_empty() { device.poisoned(n_tokens * weight.n_out) } else { device.upload(before) };
    let (packed, x, bias) = (weight.upload(device), device.upload(x), device.upload(bias));
    let (n_tokens, n_in, n_out) = (n_tokens as u32, weight.n_in as u32, weight.n_out as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (format, device) = (weight.format(), device.launcher());
        run(format, device, out.slice(), packed.slice(), x.slice(), bias.slice(), n_tokens, n_in, n_out, epilogue)
            .unwrap();
    }
    out.to_vec().unwrap()
}
