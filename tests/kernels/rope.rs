use std::f64::consts::TAU;

use gamma_tests::{TestDevice, devices, normal};
use kernels::rope::{cos_sin, frequency, launch, rope};

#[test]
fn positions_from_the_first_to_the_last() {
    for position in [0, 1, 4095, 131_071] {
        check(position, 1, 2, 64);
    }
}

#[test]
fn tokens_follow_the_position_of_the_first() {
    check(0, 5, 2, 64);
    check(131_067, 5, 1, 64);
}

#[test]
fn heads_one_off_a_block() {
    for n_head in [7, 8, 9] {
        check(100, 2, n_head, 64);
    }
}

#[test]
fn gpt_oss_heads() {
    // 64 query heads and 8 key heads turn.
    check(1234, 1, 72, 64);
}

#[test]
fn widths_of_heads() {
    for d_head in [2, 32, 66, 128] {
        check(4095, 2, 3, d_head);
    }
}

#[test]
fn position_zero_scales_only() {
    let qkv = normal(1, 3 * 64);
    for device in devices() {
        let found = run(&device, &qkv, &yarn(64), 0, 1, 2, 1.0);
        assert_eq!(found, qkv);
    }
}

#[test]
fn angles_are_exact_at_every_position() {
    let mut worst = 0.0f64;
    for (i, radians) in yarn(64).into_iter().enumerate() {
        for position in (0..131_072u64).step_by(37 + i).chain([131_071]) {
            let [cos, sin] = cos_sin(position.wrapping_mul(frequency(radians)));
            let (true_sin, true_cos) = (position as f64 * radians).sin_cos();
            worst = worst.max((f64::from(cos) - true_cos).abs()).max((f64::from(sin) - true_sin).abs());
        }
    }
    assert!(worst < 2e-7, "{worst:e}");
}

#[test]
fn an_angle_multiplied_in_f32_would_be_seen() {
    let angle = yarn(64)[1] * 131_071.0;
    let rounded = f64::from(yarn(64)[1] as f32 * 131_071.0);
    assert!((angle.sin() - rounded.sin()).abs() > 1e-4, "{angle} and {rounded}");
}

#[test]
fn frequencies_leave_whole_turns_out_and_may_be_negative() {
    assert_eq!(frequency(0.0), 0);
    // An f64 of up to 4 turns is rounded by 2⁻⁵¹ of one at most: 2¹³ units.
    for (turns, expected) in [(0.25, 1u64 << 62), (3.25, 1 << 62), (-0.25, 3 << 62), (-3.75, 1 << 62)] {
        assert!(frequency(TAU * turns).abs_diff(expected) <= 1 << 13, "{turns} turns");
    }
}

/// gpt-oss's angles per position: θ = 150000 stretched by 32 from 4096 positions.
fn yarn(d_head: usize) -> Vec<f64> {
    let base = 150_000f64;
    let correction = |turns: f64| d_head as f64 * (4096.0 / (turns * TAU)).ln() / (2.0 * base.ln());
    let (low, high) = (correction(32.0), correction(1.0));
    let angle = |i: usize| {
        let f = base.powf(-2.0 * i as f64 / d_head as f64);
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        f * (1.0 - ramp) + f / 32.0 * ramp
    };
    (0..d_head / 2).map(angle).collect()
}

/// Turns `n_head` heads of rows that have as many elements again behind them, which must stay.
#[track_caller]
fn check(position: u32, n_tokens: usize, n_head: usize, d_head: usize) {
    let width = 2 * n_head * d_head;
    let (qkv, frequencies, magnitude) = (normal(7, n_tokens * width), yarn(d_head), 1.346_573_6_f32);
    let half = d_head / 2;
    for device in devices() {
        let found = run(&device, &qkv, &frequencies, position, n_tokens, n_head, magnitude);
        for (at, &found) in found.iter().enumerate() {
            let (token, column) = (at / width, at % width);
            if column >= n_head * d_head {
                assert_eq!(found, qkv[at], "element {at} is no query and no key");
                continue;
            }
            let i = column % half;
            let (sin, cos) = (f64::from(position + token as u32) * frequencies[i]).sin_cos();
            let is_first = column % d_head < half;
            let pair = if is_first { at + half } else { at - half };
            let (x, y) = (f64::from(qkv[at]), f64::from(qkv[pair]));
            let expected = f64::from(magnitude) * if is_first { x * cos - y * sin } else { x * cos + y * sin };
            // 2e-7 of cosine and sine, and the roundings of two products by μ, two by x and y, and their sum: 2⁻²⁴ each.
            let bound = 5e-7 * f64::from(magnitude) * (x.abs() + y.abs());
            assert!((f64::from(found) - expected).abs() <= bound, "element {at}: found {found}, expected {expected}");
        }
    }
}

fn run(
    device: &TestDevice,
    qkv: &[f32],
    radians: &[f64],
    position: u32,
    n_tokens: usize,
    n_head: usize,
    magnitude: f32,
) -> Vec<f32> {
    let frequencies: Vec<u64> = radians.iter().map(|&radians| frequency(radians)).collect();
    let (frequencies, state) = (device.upload(&frequencies), device.upload(&[position]));
    let width = (qkv.len() / n_tokens) as u32;
    let qkv = device.upload(qkv);
    let launch = launch(n_tokens as u32, n_head as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (qkv, frequencies, state) = (qkv.slice(), frequencies.slice(), state.slice());
        rope::run(device.launcher(), launch, qkv, frequencies, state, n_head as u32, width, magnitude).unwrap();
    }
    qkv.to_vec().unwrap()
}
