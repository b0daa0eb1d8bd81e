use gamma_tests::{TestDevice, assert_close, devices, uniform};
use kernels::rms_norm::{launch, rms_norm};

#[test]
fn single_quad() {
    check(3, 4, 1.0);
}

#[test]
fn fewer_quads_than_threads() {
    check(2, 96, 1.0);
}

#[test]
fn one_stride_of_the_block_and_one_quad_off_it() {
    for d_model in [1020, 1024, 1028] {
        check(2, d_model, 1.0);
    }
}

#[test]
fn gpt_oss_width() {
    check(2, 2880, 1.0);
}

#[test]
fn magnitudes_far_from_one() {
    // Squares of 1e-15 vanish beside ε; those of 1e15 leave it without effect.
    check(1, 64, 1e-15);
    check(1, 64, 1e15);
}

#[test]
fn zero_row_stays_zero() {
    for device in devices() {
        assert_eq!(run(&device, 1, &[0.0; 64], &[1.5; 64]), [0.0; 64]);
    }
}

#[test]
fn a_nan_fills_its_row_only() {
    let mut x = uniform(1, 3 * 64, -1.0, 1.0);
    x[64 + 7] = f32::NAN;
    for device in devices() {
        let found = run(&device, 3, &x, &[1.0; 64]);
        for (i, x) in found.iter().enumerate() {
            assert_eq!(x.is_nan(), i / 64 == 1, "element {i}");
        }
    }
}

/// A thread's squares, the butterfly and eight warps: fewer than 20 roundings of 2⁻²⁴ each, halved by the root; then a root,
/// a reciprocal and two products.
const TOLERANCE: f64 = 14.0 / 16_777_216.0;
const EPSILON: f32 = 1e-5;

#[track_caller]
fn check(n_tokens: usize, d_model: usize, magnitude: f32) {
    let x = uniform(1, n_tokens * d_model, -magnitude, magnitude);
    let gamma = uniform(2, d_model, 0.5, 1.5);
    for device in devices() {
        assert_close(&run(&device, n_tokens, &x, &gamma), &reference(&x, &gamma), TOLERANCE);
    }
}

fn run(device: &TestDevice, n_tokens: usize, x: &[f32], gamma: &[f32]) -> Vec<f32> {
    let out = device.poisoned(x.len());
    let (x, gamma) = (device.upload(x), device.upload(gamma));
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let launch = launch(n_tokens as u32);
        rms_norm::run(device.launcher(), launch, out.slice(), x.slice(), gamma.slice(), EPSILON).unwrap();
    }
    out.to_vec().unwrap()
}

fn reference(x: &[f32], gamma: &[f32]) -> Vec<f64> {
    let d = gamma.len();
    let mut out = Vec::new();
    for row in x.chunks(d) {
        let square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / d as f64;
        let scale = (square + f64::from(EPSILON)).sqrt().recip();
        out.extend(row.iter().zip(gamma).map(|(&x, &gamma)| f64::from(x) * scale * f64::from(gamma)));
    }
    out
}
