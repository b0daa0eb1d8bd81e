//! Conversions and functions of numbers, as documented.

use cuda_std::{Float, f16, pack_f16x2, unpack_f16x2};

use crate::Random;

/// The value of a binary16 pattern after IEEE 754.
fn value_of(bits: u16) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

#[test]
fn every_f16_converts_to_its_value_and_back() {
    for bits in 0..=u16::MAX {
        let (half, expected) = (f16::from_bits(bits), value_of(bits));
        let found = half.to_f32();
        assert!(f64::from(found) == expected || found.is_nan() && expected.is_nan(), "{bits:#06x}: {found} {expected}");
        if !expected.is_nan() {
            assert_eq!(found.is_sign_negative(), bits >> 15 == 1);
            assert_eq!(f16::from_f32(found).to_bits(), bits);
        }
        let [low, high] = unpack_f16x2(u32::from(bits) | u32::from(!bits) << 16);
        assert_eq!(low.to_bits(), found.to_bits());
        assert_eq!(high.to_bits(), f16::from_bits(!bits).to_f32().to_bits());
    }
}

#[test]
fn conversion_to_f16_rounds_to_nearest_even() {
    // Between neighbours of one sign: the middle goes to the even pattern, one f32 beside it to the nearer.
    for bits in 0..0x7bffu16 {
        let middle = ((value_of(bits) + value_of(bits + 1)) / 2.0) as f32;
        assert_eq!(f64::from(middle), (value_of(bits) + value_of(bits + 1)) / 2.0, "the middle is an f32");
        let even = bits + (bits & 1);
        for (x, expected) in [(middle, even), (middle.next_down(), bits), (middle.next_up(), bits + 1)] {
            assert_eq!(f16::from_f32(x).to_bits(), expected, "{x}");
            assert_eq!(f16::from_f32(-x).to_bits(), expected | 0x8000, "{x}");
            assert_eq!(pack_f16x2(x, -x), u32::from(expected) | u32::from(expected | 0x8000) << 16);
        }
    }
    // 65520 is the middle between the largest f16 and the next power of two.
    assert_eq!(f16::from_f32(65519.996).to_bits(), 0x7bff);
    assert_eq!(f16::from_f32(65520.0).to_bits(), 0x7c00);
    assert_eq!(f16::from_f32(f32::MAX).to_bits(), 0x7c00);
    assert!(f16::from_f32(f32::NAN).is_nan());
}

/// Distance of `found` from `exact` in units of the last place of the f32 nearest to `exact`.
fn ulps(found: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    let ulp = f64::from(nearest.abs().next_up()) - f64::from(nearest.abs());
    (f64::from(found) - exact).abs() / ulp
}

#[test]
fn exp2_and_rsqrt_are_rounded_correctly() {
    let mut random = Random(4);
    for _ in 0..300_000 {
        let x = random.uniform(-126.0, 128.0);
        // f64 functions are within 1 ulp, 2⁻²⁹ ulp of f32: correct rounding is half an ulp and that.
        assert!(ulps(Float::exp2(x), f64::from(x).exp2()) <= 0.5 + 4e-9, "{x}");
        let small = x / 1024.0;
        assert!(ulps(Float::exp2(small), f64::from(small).exp2()) <= 0.5 + 4e-9, "{small}");
        let bits = f32::from_bits(random.bits() as u32 % 0x7f80_0000);
        assert!(ulps(Float::rsqrt(bits), f64::from(bits).sqrt().recip()) <= 0.5 + 4e-9, "{bits}");
    }
    let exp2 = [(-126.0, f32::MIN_POSITIVE), (-126.1, 0.0), (-149.0, 0.0), (-1e30, 0.0), (0.0, 1.0), (-1e-45, 1.0)];
    for (x, expected) in exp2.into_iter().chain([(127.0, 2f32.powi(127)), (128.0, f32::INFINITY)]) {
        assert_eq!(Float::exp2(x), expected, "{x}");
    }
    assert_eq!(Float::exp2(f32::NEG_INFINITY), 0.0);
    assert_eq!(Float::exp2(f32::INFINITY), f32::INFINITY);
    assert!(Float::exp2(f32::NAN).is_nan());
    assert_eq!(Float::rsqrt(0.0), f32::INFINITY);
    assert_eq!(Float::rsqrt(-0.0), f32::NEG_INFINITY);
    assert_eq!(Float::rsqrt(f32::INFINITY), 0.0);
    assert!(Float::rsqrt(-1.0).is_nan());
}

#[test]
fn exp_and_tanh_keep_their_documented_errors() {
    let mut random = Random(5);
    for _ in 0..300_000 {
        let x = random.uniform(-87.0, 88.0);
        let (found, exact) = (f64::from(Float::exp(x)), f64::from(x).exp());
        // "About": the product's rounding is |x| 2⁻²⁴ relative, log₂ e's as much again, the last half an ulp 2⁻²⁴.
        let bound = 2.0 * f64::from(x).abs() * 2f64.powi(-24) + 2f64.powi(-22);
        assert!((found / exact - 1.0).abs() <= bound, "{x}: {found} {exact}");
        let x = x / 8.0;
        assert!((f64::from(Float::tanh(x)) - f64::from(x).tanh()).abs() < 3e-7, "{x}");
    }
    assert_eq!(Float::tanh(1e30), 1.0);
    assert_eq!(Float::tanh(-1e30), -1.0);
    assert_eq!(Float::tanh(0.0), 0.0);
    assert!(Float::tanh(f32::NAN).is_nan());
    assert_eq!(Float::exp(f32::NEG_INFINITY), 0.0);
}

#[test]
fn mul_add_rounds_once() {
    let mut random = Random(6);
    for _ in 0..300_000 {
        let [x, a, b] = [0; 3].map(|_| random.uniform(-4.0, 4.0));
        let b = b * 2f32.powi((random.bits() % 40) as i32 - 30);
        assert_eq!(Float::mul_add(x, a, b).to_bits(), f32::mul_add(x, a, b).to_bits(), "{x} {a} {b}");
    }
    // 4097² = 2²⁴ + 2¹³ + 1 is the middle between two f32; ± 2⁻⁶⁰, which the sum in f64 loses, decides.
    let tiny = 2f32.powi(-60);
    assert_eq!(Float::mul_add(4097.0, 4097.0, tiny), 16_785_410.0);
    assert_eq!(Float::mul_add(4097.0, 4097.0, -tiny), 16_785_408.0);
    assert_eq!(Float::mul_add(4097.0, 4097.0, 0.0), 16_785_408.0);
    // The same at the bottom of the subnormals: 2⁻¹⁵⁰ is the middle between 0 and the least.
    let least = f32::from_bits(1);
    assert_eq!(Float::mul_add(least, 0.5, 0.0), 0.0);
    assert_eq!(Float::mul_add(least, 0.5 + f32::EPSILON, 0.0), least);
    assert_eq!(Float::mul_add(least, 0.5, 0.25 * least).to_bits(), f32::mul_add(least, 0.5, 0.25 * least).to_bits());
    for _ in 0..100_000 {
        let [x, a] = [0; 2].map(|_| random.uniform(-1.0, 1.0) * 2f32.powi(-70));
        let b = f32::from_bits(random.bits() as u32 % 0x0080_0000);
        assert_eq!(Float::mul_add(x, a, b).to_bits(), f32::mul_add(x, a, b).to_bits(), "{x} {a} {b}");
    }
    assert!(Float::mul_add(f32::INFINITY, 0.0, 1.0).is_nan());
    assert_eq!(Float::mul_add(f32::MAX, 2.0, f32::NEG_INFINITY), f32::NEG_INFINITY);
    assert_eq!(Float::mul_add(-0.0, 1.0, 0.0).to_bits(), 0);
}

#[test]
fn floor_and_sqrt_are_exact() {
    let mut random = Random(7);
    for _ in 0..100_000 {
        let x = random.uniform(-1e6, 1e6);
        let floor = Float::floor(x);
        assert!(floor <= x && floor + 1.0 > x && f64::from(floor).fract() == 0.0, "{x}");
        let root = f64::from(x.abs()).sqrt();
        assert!(ulps(Float::sqrt(x.abs()), root) <= 0.5 + 4e-9, "{x}");
    }
    assert_eq!(Float::floor(-0.5), -1.0);
    assert_eq!(Float::floor(1e30), 1e30);
    assert_eq!(Float::floor(f32::NEG_INFINITY), f32::NEG_INFINITY);
}
