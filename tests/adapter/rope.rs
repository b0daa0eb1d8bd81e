//! Frequencies of rotary positions, against the numbers that HF's and llama.cpp's formulas give for gpt-oss.

use gpt_gamma::adapter::{RopeSpec, YarnSpec};

/// gpt-oss-20b and -120b.
fn gpt_oss() -> RopeSpec {
    let yarn =
        YarnSpec { factor: 32.0, original_context: 4096, beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.0 };
    RopeSpec { n_dims: 64, base: 150_000.0, scaling: Some(yarn) }
}

/// Pair; θ^(−2i/64); YaRN with exact bounds, as trained; YaRN with rounded bounds, as in llama.cpp. Six digits or more.
const TABLE: [(usize, f64, f64, f64); 9] = [
    (9, 3.50126e-2, 3.17056962e-2, 3.16207523e-2),
    (10, 2.41252e-2, 1.93350011e-2, 1.94509675e-2),
    (11, 1.66234e-2, 1.15920493e-2, 1.17921911e-2),
    (12, 1.14542e-2, 6.79495949e-3, 7.01571391e-3),
    (13, 7.89247e-3, 3.86035932e-3, 4.06955471e-3),
    (14, 5.43826e-3, 2.09379238e-3, 2.27727194e-3),
    (15, 3.74720e-3, 1.05260210e-3, 1.20613097e-3),
    (16, 2.58199e-3, 4.56483919e-4, 5.80947502e-4),
    (17, 1.77910e-3, 1.29318701e-4, 2.27947796e-4),
];

/// `digits`: how many the expected number is written with; its rounding is half of the last one's unit.
#[track_caller]
fn close(found: f64, expected: f64, digits: i32) {
    let unit = 10_f64.powi(expected.abs().log10().floor() as i32 - (digits - 1));
    assert!((found - expected).abs() <= 0.5001 * unit, "{found} is not {expected}");
}

#[test]
fn the_bounds_and_the_magnitude_of_gpt_oss_are_those_published() {
    let rope = gpt_oss();
    let yarn = rope.scaling.as_ref().unwrap();
    let (low, high) = yarn.correction_bounds(&rope, false);
    close(low, 8.092779, 7);
    close(high, 17.398025, 8);
    assert_eq!(yarn.correction_bounds(&rope, true), (8.0, 18.0));
    for truncate in [false, true] {
        close(rope.inverse_frequencies(truncate).1, 1.3465735903, 11);
    }
}

#[test]
fn frequencies_of_gpt_oss_are_those_of_the_table_exact_and_rounded() {
    let plain = RopeSpec { scaling: None, ..gpt_oss() }.inverse_frequencies(false);
    assert_eq!((plain.0.len(), plain.1), (32, 1.0));
    let (exact, rounded) = (gpt_oss().inverse_frequencies(false).0, gpt_oss().inverse_frequencies(true).0);
    assert_eq!((exact.len(), rounded.len()), (32, 32));
    for (i, frequency, as_trained, as_llama_cpp) in TABLE {
        close(plain.0[i], frequency, 6);
        close(exact[i], as_trained, 9);
        close(rounded[i], as_llama_cpp, 9);
    }
    for i in (0..32).filter(|&i| !(9..=17).contains(&i)) {
        let expected = if i < 9 { plain.0[i] } else { plain.0[i] / 32.0 };
        assert_eq!((exact[i], rounded[i]), (expected, expected), "pair {i}");
    }
}

#[test]
fn without_scaling_rounding_changes_nothing() {
    let plain = RopeSpec { scaling: None, ..gpt_oss() };
    assert_eq!(plain.inverse_frequencies(true), plain.inverse_frequencies(false));
}

#[test]
fn a_factor_of_one_is_no_scaling() {
    let mut rope = gpt_oss();
    rope.scaling.as_mut().unwrap().factor = 1.0;
    let plain = RopeSpec { scaling: None, ..gpt_oss() }.inverse_frequencies(false);
    let (found, magnitude) = rope.inverse_frequencies(false);
    assert_eq!(magnitude, 1.0);
    for (found, plain) in found.iter().zip(&plain.0) {
        // Twice rounded, f·(1 − r) and f·r, and once more their sum.
        assert!((found - plain).abs() <= 2.0 * f64::EPSILON * plain, "{found} is not {plain}");
    }
}

#[test]
fn the_attention_factor_multiplies_the_magnitude() {
    let mut rope = gpt_oss();
    rope.scaling.as_mut().unwrap().attention_factor = 0.5;
    close(rope.inverse_frequencies(false).1, 0.67328679514, 11);
}

#[test]
fn bounds_stay_inside_the_head_and_may_meet() {
    // In a context of 2 tokens not one pair turns once: all are divided.
    let mut rope = gpt_oss();
    let yarn = rope.scaling.as_mut().unwrap();
    yarn.original_context = 2;
    let yarn = yarn.clone();
    assert_eq!(yarn.correction_bounds(&rope, false).0, 0.0);
    let plain = RopeSpec { scaling: None, ..gpt_oss() }.inverse_frequencies(false).0;
    for truncate in [false, true] {
        let (found, _) = rope.inverse_frequencies(truncate);
        assert!(found.iter().zip(&plain).skip(1).all(|(found, plain)| *found == plain / 32.0));
    }
    // The largest context and the least base: the upper bound would be far beyond the last pair.
    rope.base = 1.5;
    rope.scaling.as_mut().unwrap().original_context = i32::MAX as usize;
    assert_eq!(yarn_bounds(&rope).1, 63.0);
    assert!(rope.inverse_frequencies(false).0.iter().all(|f| f.is_finite() && *f > 0.0));
}

fn yarn_bounds(rope: &RopeSpec) -> (f64, f64) {
    rope.scaling.as_ref().expect("YaRN").correction_bounds(rope, false)
}
