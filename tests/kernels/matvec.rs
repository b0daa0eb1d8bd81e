use super::weights::{Matrix, gelu_erf, gelu_tanh, product};
use gamma_tests::{TestDevice, assert_close, devices, normal};
use gpt_gamma::gguf::TensorType;
use kernels::matvec::{ADD, GELU_ERF, GELU_TANH, STORE, run};

#[test]
fn single_block() {
    for &ty in TensorType::SUPPORTED {
        check(&Matrix::random(ty, ty.block_len().max(32), 1, 1));
    }
}

#[test]
fn few_groups_and_rows_one_off_a_block() {
    for &ty in TensorType::SUPPORTED {
        // 8 lanes a row, 64 or 128 rows a block: the second block has one row, or the first is one short.
        check(&Matrix::random(ty, 256, 127, 2));
        check(&Matrix::random(ty, 512, 129, 3));
    }
}

#[test]
fn groups_not_a_multiple_of_the_lanes() {
    for &ty in TensorType::SUPPORTED {
        // 9, 17 and 67 groups where blocks are groups; 72 where they are 8.
        for n_groups in [9, 17, 67] {
            let n_in = if ty.block_len() == 256 { 72 * 32 } else { n_groups * 32 };
            check(&Matrix::random(ty, n_in, 5, n_groups as u64));
        }
    }
}

#[test]
fn gpt2_124m_attention_input() {
    check(&Matrix::random(TensorType::Q6_K, 768, 2304, 4));
}

#[test]
fn gpt2_124m_feed_forward_output() {
    check(&Matrix::random(TensorType::Q4_K, 3072, 768, 5));
}

#[test]
fn vocabulary_of_gpt2_at_a_small_width() {
    // 50257 rows, the geometry for many rows and its last block.
    check(&Matrix::random(TensorType::Q5_0, 64, 50257, 6));
}

#[test]
fn many_rows_of_many_groups() {
    for ty in [TensorType::F32, TensorType::F16, TensorType::Q8_0, TensorType::MXFP4] {
        check(&Matrix::random(ty, 544, 8193, 7));
    }
}

#[test]
fn inputs_longer_than_shared_memory_come_in_parts() {
    for ty in [TensorType::Q4_0, TensorType::Q8_0] {
        check(&Matrix::random(ty, 16384, 3, 8));
        check(&Matrix::random(ty, 8192 + 32, 3, 9));
    }
}

#[test]
fn bias_and_epilogues() {
    let weight = Matrix::random(TensorType::Q4_1, 96, 40, 10);
    // Sums of about 1, where the two forms of GELU and the identity differ most.
    let x: Vec<f32> = normal(11, 96).iter().map(|x| x / 10.0).collect();
    let (bias, before) = (normal(12, 40), normal(13, 40));
    let y = product(&weight, &x, &bias);
    let (exact, tanh_form): (Vec<_>, Vec<_>) = y.iter().map(|&y| (gelu_erf(y), gelu_tanh(y))).unzip();
    let apart = exact.iter().zip(&tanh_form).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart > 2e-4, "the data does not tell the two forms of GELU apart: {apart:e}");
    for device in devices() {
        let run = |epilogue| matvec(&device, &weight, &x, &bias, &before, epilogue);
        assert_close(&run(STORE), &y, TOLERANCE);
        let sum: Vec<f64> = y.iter().zip(&before).map(|(y, &before)| y + f64::from(before)).collect();
        assert_close(&run(ADD), &sum, TOLERANCE);
        // GELU is within 1e-6 of its formula, and its slope at most 1.13.
        assert_close(&run(GELU_ERF), &exact, TOLERANCE);
        assert_close(&run(GELU_TANH), &tanh_form, TOLERANCE);
    }
}

#[test]
fn zero_rows_yield_the_bias() {
    for &ty in TensorType::SUPPORTED {
        let mut weight = Matrix::random(ty, 256, 3, 14);
        weight.bytes.fill(0);
        for device in devices() {
            let bias = [1.5, -2.0, 0.0];
            assert_eq!(matvec(&device, &weight, &normal(15, 256), &bias, &[], STORE), bias, "{ty}");
        }
    }
}

#[test]
fn magnitudes_beyond_f16_are_kept() {
    // Weights of 1e30 and activations of 1e-30, which f16 cannot hold.
    let mut weight = Matrix::random(TensorType::F32, 96, 9, 16);
    for element in weight.bytes.chunks_exact_mut(4) {
        let x = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
        element.copy_from_slice(&(x * 1e30).to_le_bytes());
    }
    let x: Vec<f32> = normal(17, 96).iter().map(|x| x * 1e-30).collect();
    for device in devices() {
        assert_close(&matvec(&device, &weight, &x, &[], &[], STORE), &product(&weight, &x, &[]), TOLERANCE);
    }
}

#[test]
fn launches_repeat_to_the_bit() {
    let (weight, x) = (Matrix::random(TensorType::Q4_K, 1024, 100, 18), normal(19, 1024));
    // Twice on each device: two orders of threads in the emulator, two launches on a GPU. Devices round differently.
    let run = || devices().iter().map(|device| matvec(device, &weight, &x, &[], &[], STORE)).collect::<Vec<_>>();
    let (first, second) = (run(), run());
    assert_eq!(first, second, "a launch does not repeat");
    assert_eq!(first[0], *first.last().unwrap(), "the order of threads shows");
}

/// A lane's sums round at random: √(terms) · 2⁻²⁴ of their size, about 2e-6 for 2048 terms, where the offset of a block and
/// its quants cancel up to three times more. A wrong weight shows as at least 1 / √16384 of the result.
const TOLERANCE: f64 = 1e-5;

#[track_caller]
fn check(weight: &Matrix) {
    let (x, bias) = (normal(100, weight.n_in), normal(101, weight.n_out));
    let expected = product(weight, &x, &bias);
    for device in devices() {
        assert_close(&matvec(&device, weight, &x, &bias, &[], STORE), &expected, TOLERANCE);
    }
}

/// `before`: what `out` holds; empty if that is of no matter.
#[track_caller]
fn matvec(device: &TestDevice, weight: &Matrix, x: &[f32], bias: &[f32], before: &[f32], epilogue: u32) -> Vec<f32> {
    let out = if before.is_empty() { device.poisoned(weight.n_out) } else { device.upload(before) };
    let (packed, x, bias) = (weight.upload(device), device.upload(x), device.upload(bias));
    let (n_in, n_out) = (weight.n_in as u32, weight.n_out as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (format, device) = (weight.format(), device.launcher());
        run(format, device, out.slice(), packed.slice(), x.slice(), bias.slice(), n_in, n_out, epilogue).unwrap();
    }
    out.to_vec().unwrap()
}
