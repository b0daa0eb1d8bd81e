use gamma_tests::{assert_close, devices, uniform};
use kernels::layer_norm::{launch, layer_norm};

#[test]
fn every_row_by_itself() {
    check(9, 64, 0.0);
}

#[test]
fn one_stride_of_the_warp() {
    check(1, 32, 0.0);
}

#[test]
fn columns_not_a_multiple_of_the_warp() {
    check(1, 77, 0.0);
}

#[test]
fn columns_one_off_the_block() {
    check(2, 255, 0.0);
    check(2, 257, 0.0);
}

#[test]
fn single_column_yields_beta() {
    check(3, 1, 0.0);
}

#[test]
fn gpt2_124m_width() {
    check(3, 768, 0.0);
}

#[test]
fn mean_far_from_zero_does_not_cancel() {
    check(2, 768, 1e3);
}

#[test]
fn constant_row_yields_beta_kept_finite_by_epsilon() {
    let (x, gamma, beta) = (vec![3.5; 64], uniform(2, 64, 0.5, 1.5), uniform(3, 64, -1.0, 1.0));
    for device in devices() {
        let found = run(&device, 1, &x, &gamma, &beta);
        assert_eq!(found, beta);
    }
}

#[track_caller]
fn check(n_tokens: usize, d_model: usize, mean: f32) {
    let x = uniform(1, n_tokens * d_model, mean - 1.0, mean + 1.0);
    let (gamma, beta) = (uniform(2, d_model, 0.5, 1.5), uniform(3, d_model, -1.0, 1.0));
    for device in devices() {
        let found = run(&device, n_tokens, &x, &gamma, &beta);
        // x − μ carries the rounding of μ, a few ulp of |μ|, and 1/σ ≈ √3 scales it up.
        let tolerance = 8.0 * f64::from(f32::EPSILON) * (1.0 + 1.73 * f64::from(mean));
        assert_close(&found, &reference(&x, &gamma, &beta, EPSILON), tolerance);
    }
}

const EPSILON: f32 = 1e-5;

fn run(device: &gamma_tests::TestDevice, n_tokens: usize, x: &[f32], gamma: &[f32], beta: &[f32]) -> Vec<f32> {
    let out = device.poisoned(x.len());
    let (x, gamma, beta) = (device.upload(x), device.upload(gamma), device.upload(beta));
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (launch, device) = (launch(n_tokens as u32), device.launcher());
        layer_norm::run(device, launch, out.slice(), x.slice(), gamma.slice(), beta.slice(), EPSILON).unwrap();
    }
    out.to_vec().unwrap()
}

fn reference(x: &[f32], gamma: &[f32], beta: &[f32], epsilon: f32) -> Vec<f64> {
    let d = gamma.len();
    let mut out = Vec::new();
    for row in x.chunks(d) {
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / d as f64;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / d as f64;
        for c in 0..d {
            let normal = (f64::from(row[c]) - mean) / (variance + f64::from(epsilon)).sqrt();
            out.push(normal * f64::from(gamma[c]) + f64::from(beta[c]));
        }
    }
    out
}
