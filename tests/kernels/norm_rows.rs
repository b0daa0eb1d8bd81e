use gamma_tests::{TestDevice, devices, normal, uniform};
use half::f16;
use kernels::norm_rows::{launch, layer_norm_f16, rms_norm_f16, to_f16};

#[test]
fn single_octet() {
    check(3, 8, 1.0);
}

#[test]
fn fewer_octets_than_threads() {
    check(2, 96, 1.0);
}

#[test]
fn one_stride_of_the_block_and_one_octet_off_it() {
    for d in [2040, 2048, 2056] {
        check(2, d, 1.0);
    }
}

#[test]
fn gpt_oss_and_gpt2_widths() {
    check(2, 2880, 1.0);
    check(2, 1600, 1.0);
}

#[test]
fn magnitudes_beyond_f16_are_kept() {
    for magnitude in [1e-30, 1e-7, 3e5, 1e15] {
        check(2, 64, magnitude);
    }
}

#[test]
fn rows_have_powers_of_their_own() {
    let mut x = normal(1, 3 * 64);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= [1e-20, 1.0, 1e20][i / 64];
    }
    for device in devices() {
        let (rows, factors) = converted(&device, &x, 64);
        assert_close_to_f16(&rows, &factors, &x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), 0.0);
    }
}

#[test]
fn the_largest_of_a_row_fills_the_upper_end_of_f16() {
    for largest in [1.0f32, 1.999_999_9, 2.0, 65_504.0, 65_536.0, 1e-30, 1e38] {
        let mut x = vec![0.0; 64];
        x[63] = -largest;
        for device in devices() {
            let (rows, factors) = converted(&device, &x, 64);
            assert!(factors[0].to_bits() & 0x7f_ffff == 0, "{largest}: {} is no power of two", factors[0]);
            let found = rows[63].to_f32();
            assert!((-32768.0..=-16384.0).contains(&found), "{largest}: {found}");
        }
    }
}

#[test]
fn zero_rows_stay_zero() {
    for device in devices() {
        let (rows, factors) = converted(&device, &[0.0; 64], 64);
        assert!(rows.iter().all(|&x| x == f16::ZERO) && factors[0].is_finite(), "{rows:?} {factors:?}");
    }
}

#[test]
fn what_is_not_finite_stays_where_it_is() {
    for hostile in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = normal(4, 3 * 64);
        x[64 + 9] = hostile;
        for device in devices() {
            let (rows, factors) = converted(&device, &x, 64);
            for (i, x) in rows.iter().enumerate() {
                assert_eq!(x.is_finite(), i != 64 + 9, "{hostile}: element {i}: {x}");
            }
            assert!(factors.iter().all(|factor| factor.is_finite()), "{factors:?}");
        }
    }
}

const EPSILON: f32 = 1e-5;
/// Half a unit in f16's last place.
const ROUNDING: f64 = 1.0 / 2048.0;

#[track_caller]
fn check(n_tokens: usize, d: usize, magnitude: f32) {
    let x = uniform(1, n_tokens * d, -magnitude, magnitude);
    let (gamma, beta) = (uniform(2, d, 0.5, 1.5), uniform(3, d, -1.0, 1.0));
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let mut rms = Vec::new();
    let mut layer = Vec::new();
    for row in exact.chunks(d) {
        let mean = row.iter().sum::<f64>() / d as f64;
        let power = |about: f64| row.iter().map(|x| (x - about).powi(2)).sum::<f64>() / d as f64;
        let root = |about: f64| (power(about) + f64::from(EPSILON)).sqrt();
        for (c, x) in row.iter().enumerate() {
            rms.push(f64::from(gamma[c]) * x / root(0.0));
            layer.push(f64::from(gamma[c]) * (x - mean) / root(mean) + f64::from(beta[c]));
        }
    }
    for device in devices() {
        let (rows, factors) = converted(&device, &x, d);
        assert_close_to_f16(&rows, &factors, &exact, 0.0);
        // The sums over a row and the root: fewer than 20 roundings of 2⁻²⁴, far below f16's; x − μ may cancel.
        let (rows, factors) = rms_norm(&device, &x, &gamma);
        assert_close_to_f16(&rows, &factors, &rms, 2e-6);
        let (rows, factors) = layer_norm(&device, &x, &gamma, &beta);
        assert_close_to_f16(&rows, &factors, &layer, 4e-6);
    }
}

/// Each element within half a unit of f16, or 2⁻²⁵ of 2¹⁴ if it is so far below its row's largest; plus `other`, of f32's
/// rounding, relative to the row's largest.
#[track_caller]
fn assert_close_to_f16(rows: &[f16], factors: &[f32], expected: &[f64], other: f64) {
    let d = rows.len() / factors.len();
    for (t, factor) in factors.iter().enumerate() {
        let expected = &expected[t * d..][..d];
        let largest = expected.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
        for (c, expected) in expected.iter().enumerate() {
            let found = f64::from(rows[t * d + c].to_f32()) * f64::from(*factor);
            let bound = (ROUNDING * expected.abs()).max(largest / 2f64.powi(39)) + other * largest;
            assert!((found - expected).abs() <= bound, "row {t}, column {c}: {found}, expected {expected} ± {bound}");
        }
    }
}

fn converted(device: &TestDevice, x: &[f32], d: usize) -> (Vec<f16>, Vec<f32>) {
    let n_tokens = x.len() / d;
    let (out, factors) = (device.poisoned(x.len()), device.poisoned(n_tokens));
    let (x, launch) = (device.upload(x), launch(n_tokens as u32));
    // SAFETY: shapes as the kernel's comment says; so below.
    unsafe { to_f16::run(device.launcher(), launch, out.slice(), factors.slice(), x.slice(), d as u32).unwrap() };
    (out.to_vec().unwrap(), factors.to_vec().unwrap())
}

fn rms_norm(device: &TestDevice, x: &[f32], gamma: &[f32]) -> (Vec<f16>, Vec<f32>) {
    let n_tokens = x.len() / gamma.len();
    let (out, factors) = (device.poisoned(x.len()), device.poisoned(n_tokens));
    let (x, gamma, launch) = (device.upload(x), device.upload(gamma), launch(n_tokens as u32));
    // SAFETY: as above.
    unsafe {
        let (out, factors) = (out.slice(), factors.slice());
        rms_norm_f16::run(device.launcher(), launch, out, factors, x.slice(), gamma.slice(), EPSILON).unwrap();
    }
    (out.to_vec().unwrap(), factors.to_vec().unwrap())
}

fn layer_norm(device: &TestDevice, x: &[f32], gamma: &[f32], beta: &[f32]) -> (Vec<f16>, Vec<f32>) {
    let n_tokens = x.len() / gamma.len();
    let (out, factors) = (device.poisoned(x.len()), device.poisoned(n_tokens));
    let (x, gamma, beta, launch) =
        (device.upload(x), device.upload(gamma), device.upload(beta), launch(n_tokens as u32));
    // SAFETY: as above.
    unsafe {
        let (out, factors) = (out.slice(), factors.slice());
        let (gamma, beta) = (gamma.slice(), beta.slice());
        layer_norm_f16::run(device.launcher(), launch, out, factors, x.slice(), gamma, beta, EPSILON).unwrap();
    }
    (out.to_vec().unwrap(), factors.to_vec().unwrap())
}
