use gamma_tests::{TestDevice, devices, uniform};
use kernels::swiglu::{launch, swiglu_oai};

#[test]
fn follows_its_formula_inside_and_outside_the_limits() {
    for n in [1, 255, 256, 257, 2880] {
        let (gate, up) = (uniform(1, n, -20.0, 12.0), uniform(2, n, -12.0, 12.0));
        for device in devices() {
            check(&gate, &up, &run(&device, &gate, &up));
        }
    }
}

#[test]
fn limits_are_seven_and_the_gate_has_none_below() {
    let gate = [6.999_999, 7.0, 7.000_001, 1e30, f32::INFINITY, -7.1, -60.0, -1e30, 0.0, -0.0];
    let up = [0.5; 10];
    for device in devices() {
        let found = run(&device, &gate, &up);
        check(&gate, &up, &found);
        assert_eq!(found[1], found[4]);
        // Bounded below at −7 the gate would give −7 σ(−11.9) · 1.5 = −7e-5.
        assert!(found[6].abs() < 1e-30 && found[7] == 0.0, "{found:?}");
        let found = run(&device, &[1.0; 5], &[7.0, 7.5, f32::INFINITY, -7.0, f32::NEG_INFINITY]);
        assert_eq!(found[..3], [found[0]; 3]);
        assert_eq!(found[3], found[4]);
    }
}

#[test]
fn a_nan_on_either_side_stays() {
    for device in devices() {
        let found = run(&device, &[f32::NAN, 1.0, 9.0], &[1.0, f32::NAN, f32::NAN]);
        assert!(found.iter().all(|x| x.is_nan()), "{found:?}");
    }
}

#[track_caller]
fn check(gate: &[f32], up: &[f32], found: &[f32]) {
    for i in 0..gate.len() {
        let (g, u) = (f64::from(gate[i]).min(7.0), f64::from(up[i]).clamp(-7.0, 7.0));
        let expected = g / (1.0 + (-1.702 * g).exp()) * (u + 1.0);
        // σ's relative error is exp's at most: 2⁻²² and that of the exponent, where 1.702, log₂ e and two products are
        // rounded, 2⁻²⁴ each. Four more roundings. What f32 cannot hold is 0.
        let relative = (4.0 * 1.702 * g.abs() + 8.0) / 16_777_216.0;
        let bound = relative * expected.abs() + f64::from(f32::MIN_POSITIVE);
        assert!(
            (f64::from(found[i]) - expected).abs() <= bound,
            "swiglu({g}, {u}): found {}, expected {expected}",
            found[i]
        );
    }
}

fn run(device: &TestDevice, gate: &[f32], up: &[f32]) -> Vec<f32> {
    let (out, n) = (device.poisoned(gate.len()), gate.len() as u32);
    let (gate, up) = (device.upload(gate), device.upload(up));
    // SAFETY: shapes as the kernel's comment says.
    unsafe { swiglu_oai::run(device.launcher(), launch(n), out.slice(), gate.slice(), up.slice()).unwrap() };
    out.to_vec().unwrap()
}
