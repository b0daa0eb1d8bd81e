use cuda_std::DeviceSlice;
use cuda_std::{Launch, LaunchError, Launcher};
use gamma_tests::{assert_close, devices, uniform};
use kernels::gelu::{gelu_erf, gelu_tanh, launch};

type Kernel = unsafe fn(&dyn Launcher, Launch, DeviceSlice<f32>, DeviceSlice<f32>) -> Result<(), LaunchError>;

#[test]
fn exact_form_follows_the_error_function() {
    check(gelu_erf::run, reference_exact);
}

#[test]
fn tanh_form_follows_its_formula() {
    check(gelu_tanh::run, reference_tanh);
}

#[test]
fn the_two_forms_are_told_apart_at_their_largest_difference() {
    // Hendrycks and Gimpel's approximation is off by 4.73e-4 at |x| ≈ 2.70.
    let difference = (reference_exact(2.7) - reference_tanh(2.7)).abs();
    assert!((4.7e-4..4.8e-4).contains(&difference), "{difference:e}");
}

#[track_caller]
fn check(kernel: Kernel, reference: fn(f64) -> f64) {
    // One element, one off a block, and the tails where erf saturates and exp underflows.
    for n in [1, 255, 257] {
        let mut x = uniform(7, n, -6.0, 6.0);
        for (x, hostile) in x.iter_mut().zip([0.0, -0.0, 40.0, -40.0, 1e-30, f32::MAX, f32::MIN]) {
            if n > 7 {
                *x = hostile;
            }
        }
        let expected: Vec<f64> = x.iter().map(|&x| reference(f64::from(x))).collect();
        for device in devices() {
            let (out, x) = (device.poisoned(n), device.upload(&x));
            // SAFETY: equal lengths.
            unsafe { kernel(device.launcher(), launch(n as u32), out.slice(), x.slice()).unwrap() };
            let found = out.to_vec().unwrap();
            for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                // erf's own 1.5e-7, plus exp's and the last roundings, scaled by |x| / 2 at most 3 where not saturated.
                let bound = 1e-6 + 4.0 * f64::from(f32::EPSILON) * expected.abs();
                assert!((f64::from(found) - expected).abs() <= bound, "element {i}: {found} for {expected}");
            }
            assert_close(&found[found.len().min(7)..], &expected[expected.len().min(7)..], 1e-6);
        }
    }
}

fn reference_exact(x: f64) -> f64 {
    0.5 * x * erfc(-x / std::f64::consts::SQRT_2)
}

fn reference_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// The complementary error function by Simpson's rule over its definition, within 1e-12 for |x| ≤ 6.
fn erfc(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return if x > 0.0 { 0.0 } else { 2.0 };
    }
    let n = 20_000;
    let step = x / f64::from(n);
    let f = |i: i32| (-(f64::from(i) * step).powi(2)).exp();
    let sum: f64 = (0..n / 2).map(|i| f(2 * i) + 4.0 * f(2 * i + 1) + f(2 * i + 2)).sum();
    1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum * step / 3.0
}
