use super::weights::{Matrix, gelu_erf, gelu_tanh, product};
use cuda_std::{DeviceSlice, Launch, LaunchError, Launcher};
use gamma_tests::{TestDevice, assert_close, devices, normal, uniform};
use gpt_gamma::gguf::TensorType;
use kernels::matvec::{
    self, ADD, GELU_ERF, GELU_TANH, MAX_EXPERTS, PART, STORE, launch, launch_warps, n_parts, norm_fits, router_fits,
    run, run_in, run_router,
};

#[test]
fn single_block() {
    for &ty in TensorType::SUPPORTED {
        check(&Matrix::random(ty, ty.block_len().max(32), 1, 1));
    }
}

#[test]
fn a_last_block_with_fewer_rows() {
    for &ty in TensorType::SUPPORTED {
        // 8 or 4 rows a block, of 8 or 16 groups: the last has one row, or is one short.
        check(&Matrix::random(ty, 256, 127, 2));
        check(&Matrix::random(ty, 512, 9, 3));
    }
}

#[test]
fn groups_not_a_multiple_of_anything() {
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
    // 191 rows a block, more than are summed in one round.
    check(&Matrix::random(TensorType::Q5_0, 64, 50257, 6));
}

#[test]
fn runs_longer_than_the_ring() {
    // By hand, since only vocabularies have so many rows a block: 63 of 67 or 72 groups, for a ring of 4096 sums. It goes
    // around, rows lie across its end, and each round is scaled by the norm.
    macro_rules! check_long_run {
        ($($kernel:ident: $ty:ident, $n_groups:literal;)+) => {
            $(
                let weight = Matrix::random(TensorType::$ty, $n_groups * 32, 127, 7);
                check_norm_by(&weight, 0.0, false, &|launcher, out, packed, [x, gamma, beta, bias], epsilon| {
                    let (launch, n_in) = (Launch::linear(3, 384), $n_groups * 32);
                    // SAFETY: shapes as the kernel's comment says, 63 rows a block.
                    unsafe {
                        matvec::$kernel::run(
                            launcher, launch, out, packed, x, gamma, beta, bias, epsilon, n_in, 127, 63, STORE,
                        )
                    }
                });
            )+
        };
    }
    check_long_run! {
        matvec_f32: F32, 67;
        matvec_f16: F16, 67;
        matvec_q5_1: Q5_1, 67;
        matvec_q8_0: Q8_0, 67;
        matvec_mxfp4: MXFP4, 67;
        matvec_q4_k: Q4_K, 72;
    }
}

#[test]
fn blocks_of_one_warp_give_what_all_do() {
    // As the emulator runs models: runs of 8 rows, of 5 and a last one of 3, of a row; a warp walks around the ring.
    for (ty, n_in, n_out, n_blocks) in
        [(TensorType::Q8_0, 256, 64, 8), (TensorType::MXFP4, 768, 38, 8), (TensorType::Q6_K, 2304, 3, 8)]
    {
        let weight = Matrix::random(ty, n_in, n_out, 39);
        check_norm_by(&weight, 0.0, false, &|launcher, out, packed, [x, gamma, beta, bias], epsilon| {
            let (geometry, format) = (launch_warps(n_out as u32, n_blocks), weight.format());
            let (i, o) = (n_in as u32, n_out as u32);
            // SAFETY: shapes as the kernel's comment says.
            unsafe { run_in(geometry, format, launcher, out, packed, x, gamma, beta, bias, epsilon, i, o, STORE) }
        });
    }
    assert_eq!(launch_warps(38, 8), (Launch::linear(8, 32), 5));
    assert_eq!(launch_warps(3, 8), (Launch::linear(3, 32), 1));
}

#[test]
fn inputs_longer_than_shared_memory_come_in_parts() {
    let part = PART as usize;
    for ty in [TensorType::Q4_0, TensorType::Q8_0] {
        check(&Matrix::random(ty, part, 3, 8));
        check(&Matrix::random(ty, part + 32, 3, 9));
        check(&Matrix::random(ty, 2 * part + 160, 134, 9));
    }
    // And so do the epilogues: what `out` holds, the bias and GELU count once.
    for epilogue in [ADD, GELU_ERF, GELU_TANH] {
        let weight = Matrix::random(TensorType::Q8_0, part + 96, 5, 20);
        let x: Vec<f32> = normal(21, part + 96).iter().map(|x| x / 80.0).collect();
        let (bias, before) = (normal(22, 5), normal(23, 5));
        let y = product(&weight, &x, &bias);
        let expected: Vec<f64> = y.iter().zip(&before).map(|(&y, &before)| finish(epilogue, y, before)).collect();
        for device in devices() {
            assert_close(&matvec(&device, &weight, &x, &bias, &before, epilogue), &expected, TOLERANCE);
        }
    }
}

#[test]
fn bias_and_epilogues() {
    let weight = Matrix::random(TensorType::Q4_1, 96, 40, 10);
    // Sums of about 1, where the two forms of GELU and the identity differ most.
    let x: Vec<f32> = normal(11, 96).iter().map(|x| x / 10.0).collect();
    let (bias, before) = (normal(12, 40), normal(13, 40));
    let y = product(&weight, &x, &bias);
    let after =
        |epilogue| -> Vec<f64> { y.iter().zip(&before).map(|(&y, &before)| finish(epilogue, y, before)).collect() };
    let (exact, tanh_form) = (after(GELU_ERF), after(GELU_TANH));
    let apart = exact.iter().zip(&tanh_form).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart > 2e-4, "the data does not tell the two forms of GELU apart: {apart:e}");
    for device in devices() {
        let run = |epilogue| matvec(&device, &weight, &x, &bias, &before, epilogue);
        assert_close(&run(STORE), &y, TOLERANCE);
        assert_close(&run(ADD), &after(ADD), TOLERANCE);
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

#[test]
fn an_input_is_normalized_by_its_root_mean_square() {
    for &ty in TensorType::SUPPORTED {
        check_norm(&Matrix::random(ty, 768, 40, 24), 0.0, false);
    }
    check_norm(&Matrix::random(TensorType::Q8_0, 2880, 30, 25), 3.0, false);
    // A group, and the longest.
    check_norm(&Matrix::random(TensorType::F16, 32, 3, 26), 0.0, false);
    check_norm(&Matrix::random(TensorType::Q8_0, PART as usize, 3, 27), 0.0, false);
}

#[test]
fn an_input_is_layer_normalized() {
    for &ty in TensorType::SUPPORTED {
        check_norm(&Matrix::random(ty, 768, 40, 28), 0.5, true);
    }
    check_norm(&Matrix::random(TensorType::Q8_0, 1600, 30, 29), 0.5, true);
    check_norm(&Matrix::random(TensorType::F16, 32, 3, 30), 0.0, true);
    check_norm(&Matrix::random(TensorType::Q8_0, 4096, 3, 31), 0.0, true);
}

#[test]
fn a_mean_far_from_zero_does_not_cancel() {
    check_norm(&Matrix::random(TensorType::Q6_K, 768, 20, 32), 100.0, true);
}

#[test]
fn what_fits_is_what_models_have() {
    // RMS: gpt-oss. LayerNorm: GPT-2 to its XL, Cerebras-GPT's 2560.
    assert!(norm_fits(2880, false) && norm_fits(PART, false) && !norm_fits(PART + 32, false));
    assert!(norm_fits(1600, true) && norm_fits(2560, true) && !norm_fits(4096 + 32, true));
    // gpt-oss-20b and 120b.
    assert!(router_fits(4096, 2880, 32) && router_fits(4096, 2880, MAX_EXPERTS) && !router_fits(4096, 2880, 129));
    assert!(!router_fits(4096, 132 * 60, MAX_EXPERTS));
}

#[test]
fn router_parts_add_up_to_the_router() {
    for &ty in TensorType::SUPPORTED {
        check_router(&Matrix::random(ty, 256, 96, 34), 4);
    }
}

#[test]
fn router_of_gpt_oss() {
    // 11 rows a block, of 128 groups; the last block has 9.
    check_router(&Matrix::random(TensorType::Q8_0, 4096, 2880, 35), 32);
}

#[test]
fn router_with_more_experts_and_rows_than_warps_and_lanes() {
    // 4 warps of 32 lanes have 61 experts and, in the first block, 64 rows; in the second, 3.
    check_router(&Matrix::random(TensorType::Q8_0, 32, 67, 36), 61);
    check_router(&Matrix::random(TensorType::Q4_0, 4096, 2880, 37), MAX_EXPERTS as usize);
}

#[test]
fn router_of_inputs_longer_than_shared_memory() {
    check_router(&Matrix::random(TensorType::Q8_0, PART as usize + 32, 9, 38), 3);
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

/// The epilogue in f64.
fn finish(epilogue: u32, y: f64, before: f32) -> f64 {
    match epilogue {
        ADD => y + f64::from(before),
        GELU_ERF => gelu_erf(y),
        GELU_TANH => gelu_tanh(y),
        _ => y,
    }
}

#[track_caller]
fn check_norm(weight: &Matrix, mean: f32, has_beta: bool) {
    let (format, n_in, n_out) = (weight.format(), weight.n_in as u32, weight.n_out as u32);
    check_norm_by(weight, mean, has_beta, &|launcher, out, packed, [x, gamma, beta, bias], epsilon| {
        // SAFETY: shapes as the kernel's comment says.
        unsafe { run(format, launcher, out, packed, x, gamma, beta, bias, epsilon, n_in, n_out, STORE) }
    });
}

/// Starts a kernel with `out`, the weights, `[x, gamma, beta, bias]` and `epsilon`.
type Start<'a> =
    &'a dyn Fn(&dyn Launcher, DeviceSlice<f32>, DeviceSlice<u8>, [DeviceSlice<f32>; 4], f32) -> Result<(), LaunchError>;

/// Normalizes in f64, then multiplies. `mean` is that of `x`, beside a deviation of 1.
#[track_caller]
fn check_norm_by(weight: &Matrix, mean: f32, has_beta: bool, start: Start) {
    const EPSILON: f32 = 1e-2; // Large enough to show.
    let n_in = weight.n_in;
    let x: Vec<f32> = normal(100, n_in).iter().map(|x| x + mean).collect();
    let (gamma, beta) = (uniform(102, n_in, 0.5, 1.5), normal(103, if has_beta { n_in } else { 0 }));
    let bias = normal(101, weight.n_out);

    let average = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / n_in as f64;
    let center = if has_beta { average(&mut x.iter().map(|&x| x.into())) } else { 0.0 };
    let squares = average(&mut x.iter().map(|&x| (f64::from(x) - center).powi(2)));
    let rstd = (squares + f64::from(EPSILON)).sqrt().recip();
    let normed: Vec<f64> = (0..n_in)
        .map(|i| {
            let shift = beta.get(i).map_or(0.0, |&b| f64::from(b));
            (f64::from(x[i]) - center) * rstd * f64::from(gamma[i]) + shift
        })
        .collect();
    let decoded = weight.decoded();
    let dot = |row: &[f32]| row.iter().zip(&normed).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
    let expected: Vec<f64> = decoded.chunks(n_in).zip(&bias).map(|(row, &bias)| dot(row) + f64::from(bias)).collect();

    // x − μ carries the rounding of μ, a few ulp of it, the same in every element: against Σ w, which is √n_in like the
    // result. Beside it, the sums' own.
    let tolerance = TOLERANCE + 4.0 * f64::from(f32::EPSILON) * f64::from(mean);
    for device in devices() {
        let (out, packed) = (device.poisoned(weight.n_out), weight.upload(&device));
        let (x, gamma, beta) = (device.upload(&x), device.upload(&gamma), device.upload(&beta));
        let bias = device.upload(&bias);
        let vectors = [x.slice(), gamma.slice(), beta.slice(), bias.slice()];
        start(device.launcher(), out.slice(), packed.slice(), vectors, EPSILON).unwrap();
        assert_close(&out.to_vec().unwrap(), &expected, tolerance);
    }
}

/// The residual after the product, and the router's logits and sum of squares from it.
#[track_caller]
fn check_router(weight: &Matrix, n_expert: usize) {
    let (n_in, n_out) = (weight.n_in, weight.n_out);
    let (x, bias, before) = (normal(100, n_in), normal(101, n_out), normal(104, n_out));
    let (router, gamma) = (normal(105, n_expert * n_out), uniform(106, n_out, 0.5, 1.5));
    let y = product(weight, &x, &bias);
    let expected: Vec<f64> = y.iter().zip(&before).map(|(y, &before)| y + f64::from(before)).collect();
    let scaled: Vec<f64> = expected.iter().zip(&gamma).map(|(y, &gamma)| y * f64::from(gamma)).collect();
    let logit = |row: &[f32]| row.iter().zip(&scaled).map(|(&r, y)| f64::from(r) * y).sum::<f64>();
    let logits: Vec<f64> = router.chunks(n_out).map(logit).collect();
    let squares: f64 = expected.iter().map(|y| y * y).sum();

    let n_parts = n_parts(n_in as u32, n_out as u32) as usize;
    assert_eq!(launch(weight.format(), n_in as u32, n_out as u32).grid, [n_parts as u32, 1, 1]);
    for device in devices() {
        let (out, packed) = (device.upload(&before), weight.upload(&device));
        let parts = device.poisoned::<f32>(n_parts * (n_expert + 1));
        let (x, bias) = (device.upload(&x), device.upload(&bias));
        let (router, gamma) = (device.upload(&router), device.upload(&gamma));
        let (i, o, e) = (n_in as u32, n_out as u32, n_expert as u32);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (format, device, out, packed) = (weight.format(), device.launcher(), out.slice(), packed.slice());
            let (x, bias, router, gamma) = (x.slice(), bias.slice(), router.slice(), gamma.slice());
            run_router(format, device, out, parts.slice(), packed, x, bias, router, gamma, i, o, e).unwrap();
        }
        assert_close(&out.to_vec().unwrap(), &expected, TOLERANCE);
        let mut sums = vec![0.0; n_expert + 1];
        for part in parts.to_vec().unwrap().chunks(n_expert + 1) {
            for (sum, &x) in sums.iter_mut().zip(part) {
                *sum += x;
            }
        }
        assert_close(&sums[..n_expert], &logits, TOLERANCE);
        assert_close(&sums[n_expert..], &[squares], TOLERANCE);
    }
}

/// `before`: what `out` holds; empty if that is of no matter.
#[track_caller]
fn matvec(device: &TestDevice, weight: &Matrix, x: &[f32], bias: &[f32], before: &[f32], epilogue: u32) -> Vec<f32> {
    let out = if before.is_empty() { device.poisoned(weight.n_out) } else { device.upload(before) };
    let (packed, x, bias) = (weight.upload(device), device.upload(x), device.upload(bias));
    let none = device.none();
    let (n_in, n_out) = (weight.n_in as u32, weight.n_out as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (format, device) = (weight.format(), device.launcher());
        let (out, packed, x, bias) = (out.slice(), packed.slice(), x.slice(), bias.slice());
        run(format, device, out, packed, x, none.slice(), none.slice(), bias, 0.0, n_in, n_out, epilogue).unwrap();
    }
    out.to_vec().unwrap()
}
