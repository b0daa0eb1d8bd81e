use super::weights::{Matrix, gelu_erf, product};
use gamma_tests::{TestDevice, assert_close, devices, normal, relative_error, uniform};
use gpt_gamma::gguf::TensorType;
use kernels::matvec::stream::{MAX_IN, fits, launch, n_parts, rows_per_block, run, run_router};
use kernels::matvec::{ADD, GELU_ERF, MAX_EXPERTS, STORE};

/// An element of `x` is wrong by up to half of a 32639th of its group's largest, about 2.2 times the deviation of normal
/// numbers: 2.2 / 32639 / √12 = 2e-5 of the result, at random. A wrong weight shows as at least 1 / √8192 of it.
const TOLERANCE: f64 = 4e-5;

#[test]
fn widths_that_steps_and_runs_divide_and_others() {
    // 2, 4, 6, 8, 10, 14 and 24 groups: steps have 4, interleaved runs 8.
    for n_groups in [2, 4, 6, 8, 10, 14, 24] {
        check(&matrix(32 * n_groups, 19, n_groups as u64), 1);
    }
}

#[test]
fn heights_that_tiles_divide_and_others() {
    for n_out in [1, 8, 15, 16, 17, 33, 48] {
        check(&matrix(128, n_out, 20 + n_out as u64), 1);
    }
}

#[test]
fn a_last_block_with_fewer_rows() {
    // 23 rows a block, the last with 20; one row a block.
    check(&matrix(192, 66, 1), 3);
    check(&matrix(192, 5, 2), 132);
}

#[test]
fn more_rows_than_threads() {
    check(&matrix(64, 700, 3), 1);
}

#[test]
fn more_rows_than_have_room() {
    // Two blocks for each of two multiprocessors.
    let n_out = 2 * 7000;
    assert!(rows_per_block(2, 64, n_out, 0) < 7000);
    check(&matrix(64, n_out as usize, 4), 2);
}

#[test]
fn gpt_oss_attention_input() {
    check(&matrix(2880, 40, 5), 1);
}

#[test]
fn the_widest_input() {
    check(&matrix(MAX_IN as usize, 18, 6), 1);
    check_norm(&matrix(MAX_IN as usize, 18, 6));
}

#[test]
fn an_input_is_normalized_by_its_root_mean_square() {
    for n_in in [64, 320, 2880, 4096 + 64] {
        check_norm(&matrix(n_in, 20, 7));
    }
}

#[test]
fn bias_and_epilogues() {
    let weight = matrix(192, 300, 8);
    let x: Vec<f32> = normal(11, 192).iter().map(|x| x / 14.0).collect();
    let (bias, before) = (normal(12, 300), normal(13, 300));
    let y = product(&weight, &x, &bias);
    for device in devices() {
        let run = |epilogue| matvec(&device, &weight, &x, &bias, &before, epilogue);
        assert_close(&run(STORE), &y, TOLERANCE);
        let added: Vec<f64> = y.iter().zip(&before).map(|(&y, &before)| y + f64::from(before)).collect();
        assert_close(&run(ADD), &added, TOLERANCE);
        assert_close(&run(GELU_ERF), &y.iter().map(|&y| gelu_erf(y)).collect::<Vec<_>>(), TOLERANCE);
    }
}

#[test]
fn groups_of_x_have_scales_of_their_own() {
    // One group drowns the others but for its weights, which are 0: what is left is as precise as ever.
    let mut weight = matrix(256, 24, 14);
    for row in weight.bytes.chunks_exact_mut(8 * 34) {
        row[3 * 34 + 2..4 * 34].fill(0);
    }
    let mut x = normal(15, 256);
    x[96..128].iter_mut().for_each(|x| *x *= 1e20);
    x[128..160].fill(0.0);
    x[160..192].iter_mut().for_each(|x| *x *= 1e-3);
    for device in devices() {
        assert_close(&matvec(&device, &weight, &x, &[], &[], STORE), &product(&weight, &x, &[]), TOLERANCE);
    }
}

#[test]
fn the_largest_bytes_do_not_overflow() {
    let mut weight = matrix(256, 16, 16);
    for block in weight.bytes.chunks_exact_mut(34) {
        block[2..].fill(0x80); // −128
    }
    for sign in [1.0, -1.0] {
        let x = [sign; 256];
        for device in devices() {
            // 1 is 32639 / 32639, exactly.
            assert_close(&matvec(&device, &weight, &x, &[], &[], STORE), &product(&weight, &x, &[]), 1e-6);
        }
    }
}

#[test]
fn nan_and_infinity_do_not_vanish() {
    let weight = matrix(256, 16, 17);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = normal(18, 256);
        x[77] = bad;
        for device in devices() {
            let found = matvec(&device, &weight, &x, &[], &[], STORE);
            assert!(found.iter().all(|y| !y.is_finite()), "{bad}: {found:?}");
        }
    }
}

#[test]
fn launches_repeat_to_the_bit() {
    let (weight, x) = (matrix(1024, 100, 18), normal(19, 1024));
    let run = || devices().iter().map(|device| matvec(device, &weight, &x, &[], &[], STORE)).collect::<Vec<_>>();
    let (first, second) = (run(), run());
    assert_eq!(first, second, "a launch does not repeat");
    assert_eq!(first[0], *first.last().unwrap(), "the order of threads shows");
}

#[test]
fn router_parts_add_up_to_the_router() {
    check_router(&matrix(256, 96, 34), 33, 3);
    check_router(&matrix(320, 50, 35), 61, 2);
}

#[test]
fn router_of_gpt_oss() {
    // The rows of one of 132 multiprocessors, and the experts of both models.
    check_router(&matrix(4096, 22, 36), 32, 1);
    check_router(&matrix(4096, 22, 37), MAX_EXPERTS as usize, 1);
}

#[test]
fn what_fits() {
    assert!(fits(2880) && fits(4096) && fits(64) && fits(MAX_IN));
    assert!(!fits(32) && !fits(96) && !fits(MAX_IN + 64));
    // 132 multiprocessors: a block each, also for a vocabulary; 82: two or more, where rows are too many for one.
    assert_eq!(launch(132, 2880, 201_088, 0).grid, [132, 1, 1]);
    assert_eq!(n_parts(132, 4096, 2880, 32), 131);
    assert_eq!(n_parts(132, 4096, 2880, MAX_EXPERTS), 131);
    assert!(rows_per_block(16, 2880, 201_088, 0) <= 201_088 / 32);
}

fn matrix(n_in: usize, n_out: usize, seed: u64) -> Matrix {
    Matrix::random(TensorType::Q8_0, n_in, n_out, seed)
}

#[track_caller]
fn check(weight: &Matrix, n_multiprocessors: u32) {
    let (x, bias) = (normal(100, weight.n_in), normal(101, weight.n_out));
    let expected = product(weight, &x, &bias);
    for device in devices() {
        let found = matvec_on(&device, n_multiprocessors, weight, &x, &bias, &[], STORE);
        assert_close(&found, &expected, TOLERANCE);
    }
}

/// Normalizes in f64, then multiplies.
#[track_caller]
fn check_norm(weight: &Matrix) {
    const EPSILON: f32 = 1e-2; // Large enough to show.
    let n_in = weight.n_in;
    let (x, gamma) = (normal(100, n_in), uniform(102, n_in, 0.5, 1.5));
    let squares = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n_in as f64;
    let rstd = (squares + f64::from(EPSILON)).sqrt().recip();
    let normed: Vec<f64> = x.iter().zip(&gamma).map(|(&x, &gamma)| f64::from(x) * rstd * f64::from(gamma)).collect();
    let dot = |row: &[f32]| row.iter().zip(&normed).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
    let expected: Vec<f64> = weight.decoded().chunks(n_in).map(dot).collect();

    for device in devices() {
        let (out, packed) = (device.poisoned(weight.n_out), weight.upload(&device));
        let (x, gamma, none) = (device.upload(&x), device.upload(&gamma), device.none());
        let (i, o) = (n_in as u32, weight.n_out as u32);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (launcher, out, packed) = (device.launcher(), out.slice(), packed.slice());
            let (x, gamma, bias) = (x.slice(), gamma.slice(), none.slice());
            run(launcher, 1, out, packed, x, gamma, bias, EPSILON, i, o, STORE).unwrap();
        }
        assert_close(&out.to_vec().unwrap(), &expected, TOLERANCE);
    }
}

/// The residual after the product, and the router's logits and sum of squares from it.
#[track_caller]
fn check_router(weight: &Matrix, n_expert: usize, n_multiprocessors: u32) {
    let (n_in, n_out) = (weight.n_in, weight.n_out);
    let (x, bias, before) = (normal(100, n_in), normal(101, n_out), normal(104, n_out));
    let (router, gamma) = (normal(105, n_expert * n_out), uniform(106, n_out, 0.5, 1.5));
    let y = product(weight, &x, &bias);
    let expected: Vec<f64> = y.iter().zip(&before).map(|(y, &before)| y + f64::from(before)).collect();
    let scaled: Vec<f64> = expected.iter().zip(&gamma).map(|(y, &gamma)| y * f64::from(gamma)).collect();
    let logit = |row: &[f32]| row.iter().zip(&scaled).map(|(&r, y)| f64::from(r) * y).sum::<f64>();
    let logits: Vec<f64> = router.chunks(n_out).map(logit).collect();
    let squares: f64 = expected.iter().map(|y| y * y).sum();

    let (i, o, e) = (n_in as u32, n_out as u32, n_expert as u32);
    let n_parts = n_parts(n_multiprocessors, i, o, e) as usize;
    for device in devices() {
        let (out, packed) = (device.upload(&before), weight.upload(&device));
        let parts = device.poisoned::<f32>(n_parts * (n_expert + 1));
        let (x, bias) = (device.upload(&x), device.upload(&bias));
        let (router, gamma) = (device.upload(&router), device.upload(&gamma));
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (launcher, out, packed) = (device.launcher(), out.slice(), packed.slice());
            let (x, bias, router, gamma) = (x.slice(), bias.slice(), router.slice(), gamma.slice());
            run_router(launcher, n_multiprocessors, out, parts.slice(), packed, x, bias, router, gamma, i, o, e)
                .unwrap();
        }
        assert_close(&out.to_vec().unwrap(), &expected, TOLERANCE);
        let mut sums = vec![0.0; n_expert + 1];
        for part in parts.to_vec().unwrap().chunks(n_expert + 1) {
            for (sum, &x) in sums.iter_mut().zip(part) {
                *sum += x;
            }
        }
        assert!(relative_error(&sums[..n_expert], &logits) <= TOLERANCE);
        assert_close(&sums[n_expert..], &[squares], TOLERANCE);
    }
}

#[track_caller]
fn matvec(device: &TestDevice, weight: &Matrix, x: &[f32], bias: &[f32], before: &[f32], epilogue: u32) -> Vec<f32> {
    matvec_on(device, 2, weight, x, bias, before, epilogue)
}

/// `before`: what `out` holds; empty if that is of no matter.
#[track_caller]
fn matvec_on(
    device: &TestDevice,
    n_multiprocessors: u32,
    weight: &Matrix,
    x: &[f32],
    bias: &[f32],
    before: &[f32],
    epilogue: u32,
) -> Vec<f32> {
    let out = if before.is_empty() { device.poisoned(weight.n_out) } else { device.upload(before) };
    let (packed, x, bias) = (weight.upload(device), device.upload(x), device.upload(bias));
    let none = device.none();
    let (n_in, n_out) = (weight.n_in as u32, weight.n_out as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (launcher, out, packed) = (device.launcher(), out.slice(), packed.slice());
        let (x, gamma, bias) = (x.slice(), none.slice(), bias.slice());
        run(launcher, n_multiprocessors, out, packed, x, gamma, bias, 0.0, n_in, n_out, epilogue).unwrap();
    }
    out.to_vec().unwrap()
}
