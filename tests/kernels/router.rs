use gamma_tests::{TestDevice, assert_close, devices, normal, uniform};
use kernels::router::{launch, launch_logits, router, router_logits};

#[test]
fn experts_around_a_warp_s_width() {
    for n_expert in [4, 8, 31, 32, 33, 64, 127, 128] {
        check(&normal(n_expert as u64, 3 * n_expert), n_expert, 4);
    }
}

#[test]
fn tokens_one_off_a_block() {
    for n_tokens in [1, 4, 5] {
        check(&normal(1, n_tokens * 32), 32, 4);
    }
}

#[test]
fn one_choice_has_all_the_weight_and_all_experts_can_be_chosen() {
    check(&normal(2, 2 * 32), 32, 1);
    check(&normal(3, 2 * 8), 8, 8);
}

#[test]
fn equal_logits_go_to_the_lower_expert() {
    check(&[0.5; 128], 128, 8);
    let mut logits = vec![-1.0; 128];
    for e in [77, 12, 44, 108, 13] {
        logits[e] = 2.0;
    }
    check(&logits, 128, 4);
    // The zeros are equal.
    check(&[0.0, -0.0, 0.0, -0.0, -0.0, 0.0, -1.0, -2.0], 8, 4);
    check(&[-0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -1.0, -2.0], 8, 4);
}

#[test]
fn logits_of_all_magnitudes_are_ordered() {
    let logits = [-1e30, 1e-40, -1e-40, 1e30, -3.0, f32::NEG_INFINITY, 0.0, 1e-3];
    check(&logits, 8, 4);
    check(&logits, 8, 8);
}

#[test]
fn a_nan_makes_its_token_s_weights_nan_and_no_other_s() {
    for at in [0, 31, 32, 100] {
        for nan in [f32::NAN, -f32::NAN] {
            let mut logits = normal(4, 3 * 128);
            logits[128 + at] = nan;
            for device in devices() {
                let (ids, weights) = run(&device, &logits, 128, 4);
                assert!(weights[4..8].iter().all(|w| w.is_nan()), "{weights:?}");
                assert_eq!(ids[4], at as u32);
                assert!(ids.iter().all(|&id| id < 128), "{ids:?}");
                assert!(weights[..4].iter().chain(&weights[8..]).all(|w| w.is_finite()), "{weights:?}");
            }
        }
    }
}

#[track_caller]
fn check(logits: &[f32], n_expert: usize, n_used: usize) {
    let (mut expected_ids, mut expected_weights) = (Vec::new(), Vec::new());
    for row in logits.chunks(n_expert) {
        let mut ids: Vec<usize> = (0..n_expert).collect();
        // A stable sort, so that the lower of equals stays first.
        ids.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap());
        let exp: Vec<f64> = ids[..n_used].iter().map(|&e| (f64::from(row[e]) - f64::from(row[ids[0]])).exp()).collect();
        expected_weights.extend(exp.iter().map(|e| e / exp.iter().sum::<f64>()));
        expected_ids.extend(ids[..n_used].iter().map(|&e| e as u32));
    }
    for device in devices() {
        let (ids, weights) = run(&device, logits, n_expert, n_used);
        assert_eq!(ids, expected_ids);
        // exp's relative error is |x| 2⁻²⁴ + 2⁻²², with |x| below 8 where exp still counts.
        assert_close(&weights, &expected_weights, 1e-6);
    }
}

fn run(device: &TestDevice, logits: &[f32], n_expert: usize, n_used: usize) -> (Vec<u32>, Vec<f32>) {
    let n_tokens = logits.len() / n_expert;
    let (ids, weights) = (device.poisoned(n_tokens * n_used), device.poisoned(n_tokens * n_used));
    let (logits, launch) = (device.upload(logits), launch(n_tokens as u32));
    let (t, e, u) = (n_tokens as u32, n_expert as u32, n_used as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (ids, weights) = (ids.slice(), weights.slice());
        router::run(device.launcher(), launch, ids, weights, logits.slice(), t, e, u).unwrap();
    }
    (ids.to_vec().unwrap(), weights.to_vec().unwrap())
}

// ---- the product ----

#[test]
fn logits_of_one_token() {
    for n_in in [4, 64, 508, 512, 516, 2880] {
        check_logits(1, n_in, 32);
    }
}

#[test]
fn logits_of_tokens_and_experts_one_off_a_tile() {
    for (n_tokens, n_expert) in [(2, 8), (7, 4), (8, 5), (9, 33), (17, 3)] {
        check_logits(n_tokens, 96, n_expert);
    }
}

#[test]
fn logits_without_bias() {
    let (weight, x) = (normal(1, 5 * 64), normal(2, 3 * 64));
    for device in devices() {
        assert_close(&run_logits(&device, &weight, &x, &[], 64, 5), &reference(&weight, &x, &[0.0; 5]), TOLERANCE);
    }
}

#[test]
fn a_token_has_the_same_logits_alone_and_among_others() {
    let (weight, x, bias) = (normal(1, 32 * 576), normal(2, 3 * 576), normal(3, 32));
    for device in devices() {
        let together = run_logits(&device, &weight, &x, &bias, 576, 32);
        for (t, x) in x.chunks(576).enumerate() {
            assert_eq!(run_logits(&device, &weight, x, &bias, 576, 32), together[t * 32..(t + 1) * 32], "token {t}");
        }
    }
}

/// 22 to 24 products a lane in a chain, seven more additions: 31 roundings of 2⁻²⁴ at most, of partial sums no larger than
/// the result's deviation. f16 would leave 3e-4.
const TOLERANCE: f64 = 31.0 / 16_777_216.0;

#[track_caller]
fn check_logits(n_tokens: usize, n_in: usize, n_expert: usize) {
    let (weight, x) = (normal(1, n_expert * n_in), normal(2, n_tokens * n_in));
    let bias = uniform(3, n_expert, -1.0, 1.0);
    for device in devices() {
        let found = run_logits(&device, &weight, &x, &bias, n_in, n_expert);
        assert_close(&found, &reference(&weight, &x, &bias), TOLERANCE);
    }
}

fn reference(weight: &[f32], x: &[f32], bias: &[f32]) -> Vec<f64> {
    let n_in = weight.len() / bias.len();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    x.chunks(n_in)
        .flat_map(|x| weight.chunks(n_in).zip(bias).map(move |(w, &bias)| dot(w, x) + f64::from(bias)))
        .collect()
}

fn run_logits(device: &TestDevice, weight: &[f32], x: &[f32], bias: &[f32], n_in: usize, n_expert: usize) -> Vec<f32> {
    let n_tokens = x.len() / n_in;
    let out = device.poisoned(n_tokens * n_expert);
    let (weight, x, bias) = (device.upload(weight), device.upload(x), device.upload(bias));
    let (t, n, e) = (n_tokens as u32, n_in as u32, n_expert as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (out, weight, x, bias) = (out.slice(), weight.slice(), x.slice(), bias.slice());
        router_logits::run(device.launcher(), launch_logits(t, e), out, weight, x, bias, t, n, e).unwrap();
    }
    out.to_vec().unwrap()
}
