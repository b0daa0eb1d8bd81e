use super::weights::{Matrix, gelu_erf, gelu_tanh, product};
use gamma_tests::{TestDevice, assert_close, devices, normal};
use gpt_gamma::device::Buffer;
use gpt_gamma::gguf::TensorType;
use half::f16;
use kernels::matmul::rows::{Arguments, Plan, Shape, run};
use kernels::matmul::{ADD, GELU_ERF, GELU_TANH, STORE, powers};
use kernels::norm_rows;

const SHAPES: [Shape; 4] = [Shape::Warpgroups, Shape::Wide, Shape::Narrow, Shape::Skinny];

#[test]
fn single_block_and_token() {
    for &ty in TensorType::SUPPORTED {
        let n_in = ty.block_len().max(32);
        let (weight, x) = (Matrix::random(ty, n_in, 1, 1), normal(2, n_in));
        let expected = product(&weight, &x, &[])[0];
        // One sum may cancel, so its bound is that of its terms: each factor is rounded by at most 2⁻¹¹ of itself.
        let terms: f64 = weight.decoded().iter().zip(&x).map(|(&w, &x)| f64::from(w * x).abs()).sum();
        for device in devices() {
            let found = f64::from(Case::new(&weight, &x).run(&device)[0]);
            assert!((found - expected).abs() <= terms / 1024.0, "{ty}: found {found}, expected {expected}");
        }
    }
}

#[test]
fn one_off_a_tile_in_every_type_and_shape() {
    for &ty in TensorType::SUPPORTED {
        let weight = Matrix::random(ty, 256, 129, 2);
        for shape in SHAPES {
            check(&weight, 17, Some((shape, 1)));
        }
    }
}

#[test]
fn ragged_rows_tokens_and_steps() {
    for (n_in, n_out, n_tokens) in
        [(32, 127, 63), (64, 128, 64), (96, 65, 257), (160, 31, 33), (32, 33, 15), (96, 9, 2)]
    {
        for shape in SHAPES {
            check(&Matrix::random(TensorType::Q4_0, n_in, n_out, 3), n_tokens, Some((shape, 1)));
            check(&Matrix::random(TensorType::F16, n_in, n_out, 3), n_tokens, Some((shape, 1)));
        }
    }
}

#[test]
fn splits_add_up() {
    // 13 steps of 64 elements: 2 splits of 7 and 6, 3 of 5, 5 and 3, 13 of 1.
    let weight = Matrix::random(TensorType::Q8_0, 800, 70, 4);
    for shape in SHAPES {
        for n_splits in [2, 3, 13] {
            check(&weight, 33, Some((shape, n_splits)));
        }
    }
}

#[test]
fn a_split_launch_leaves_its_counters_ready_for_the_next() {
    let (weight, x) = (Matrix::random(TensorType::Q8_0, 256, 70, 5), normal(6, 33 * 256));
    for device in devices() {
        let case = Case { plan: Some((Shape::Skinny, 4)), ..Case::new(&weight, &x) };
        let first = case.run(&device);
        assert_eq!(case.run_twice(&device), first);
    }
}

#[test]
fn planned_shapes_of_gpt_oss() {
    for n_tokens in [2, 40, 300] {
        check(&Matrix::random(TensorType::Q8_0, 2880, 72, 7), n_tokens, None);
    }
}

#[test]
fn bias_and_epilogues() {
    let weight = Matrix::random(TensorType::Q4_1, 96, 40, 8);
    let x: Vec<f32> = normal(9, 5 * 96).iter().map(|x| x / 10.0).collect();
    let (bias, before) = (normal(10, 40), normal(11, 5 * 40));
    let y = product(&weight, &x, &bias);
    for device in devices() {
        for shape in SHAPES.into_iter().filter(|&shape| runs(&device, shape)) {
            let run = |epilogue| {
                let case = Case { bias: &bias, before: &before, epilogue, ..Case::new(&weight, &x) };
                Case { plan: Some((shape, 1)), ..case }.run(&device)
            };
            let each = |f: fn(f64) -> f64| y.iter().map(|&y| f(y)).collect::<Vec<_>>();
            assert_close(&run(STORE), &y, TOLERANCE);
            let sum: Vec<f64> = y.iter().zip(&before).map(|(y, &before)| y + f64::from(before)).collect();
            assert_close(&run(ADD), &sum, TOLERANCE);
            // GELU's slope is at most 1.13.
            assert_close(&run(GELU_ERF), &each(gelu_erf), 1.2 * TOLERANCE);
            assert_close(&run(GELU_TANH), &each(gelu_tanh), 1.2 * TOLERANCE);
        }
    }
}

#[test]
fn columns_of_a_wider_output_are_filled_and_no_others() {
    let (weight, x) = (Matrix::random(TensorType::Q8_0, 96, 10, 12), normal(13, 3 * 96));
    let expected = product(&weight, &x, &[]);
    // Where quads of columns are aligned, where they are not, and where the stride is not.
    for (stride, column) in [(24, 8), (24, 5), (23, 8)] {
        for device in devices() {
            let found = Case { stride, column, before: &[7.0; 3 * 24], ..Case::new(&weight, &x) }.run(&device);
            let mut inside = Vec::new();
            for t in 0..3 {
                for c in 0..stride {
                    match c.checked_sub(column) {
                        Some(o) if o < 10 => inside.push(found[t * stride + c]),
                        _ => assert_eq!(found[t * stride + c], 7.0, "token {t}, column {c}"),
                    }
                }
            }
            assert_close(&inside, &expected, TOLERANCE);
        }
    }
}

#[test]
fn f16_outputs_are_the_rounded_f32_ones() {
    let (weight, x) = (Matrix::random(TensorType::Q5_0, 96, 37, 14), normal(15, 5 * 96));
    for device in devices() {
        let case = Case { epilogue: GELU_TANH, ..Case::new(&weight, &x) };
        let expected: Vec<f16> = case.run(&device).into_iter().map(f16::from_f32).collect();
        assert_eq!(case.run_f16(&device), expected);
    }
}

#[test]
fn zero_rows_yield_the_bias() {
    for &ty in TensorType::SUPPORTED {
        let mut weight = Matrix::random(ty, 256, 3, 16);
        weight.bytes.fill(0);
        let (x, bias) = (normal(17, 256), [1.5, -2.0, 0.0]);
        for device in devices() {
            assert_eq!(Case { bias: &bias, ..Case::new(&weight, &x) }.run(&device), bias, "{ty}");
        }
    }
}

#[test]
fn zeros_under_the_largest_scale_yield_the_bias() {
    let mut weight = Matrix::random(TensorType::Q8_0, 64, 3, 18);
    for block in weight.bytes.chunks_exact_mut(34) {
        block[..2].copy_from_slice(&f16::MAX.to_le_bytes());
        block[2..].fill(0);
    }
    let mut codes = Matrix::random(TensorType::MXFP4, 64, 3, 19);
    for block in codes.bytes.chunks_exact_mut(17) {
        block.fill(0);
        block[0] = 254;
    }
    let (x, bias) = (normal(20, 64), [1.5, -2.0, 0.0]);
    for device in devices() {
        assert_eq!(Case { bias: &bias, ..Case::new(&weight, &x) }.run(&device), bias);
        assert_eq!(Case { bias: &bias, ..Case::new(&codes, &x) }.run(&device), bias);
    }
}

#[test]
fn magnitudes_beyond_f16_are_kept() {
    for (weight_scale, x_scale) in [(1e30, 1e-30), (1e-30, 1e30), (1e-33, 1.0), (1.0, 1e-33), (1.0, 1e35), (1e35, 1.0)]
    {
        for ty in [TensorType::F32, TensorType::BF16] {
            let mut weight = Matrix::random(ty, 96, 9, 21);
            for element in weight.bytes.chunks_exact_mut(ty.block_bytes()) {
                let high = element.len() - 2;
                let x = half::bf16::from_le_bytes([element[high], element[high + 1]]).to_f32() * weight_scale;
                element[high..].copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
            }
            let x: Vec<f32> = normal(22, 5 * 96).iter().map(|x| x * x_scale).collect();
            let expected = product(&weight, &x, &[]);
            for device in devices() {
                assert_close(&Case::new(&weight, &x).run(&device), &expected, TOLERANCE);
            }
        }
    }
}

#[test]
fn rows_and_tokens_of_very_different_magnitude_are_kept() {
    // Each row of the matrix and each token in a magnitude of its own.
    let power = |i: usize| 2f32.powi(10 * i as i32 - 40);
    let mut weight = Matrix::random(TensorType::F32, 96, 9, 23);
    for (i, element) in weight.bytes.chunks_exact_mut(4).enumerate() {
        let x = f32::from_le_bytes([element[0], element[1], element[2], element[3]]);
        element.copy_from_slice(&(x * power(i / 96)).to_le_bytes());
    }
    let x: Vec<f32> = normal(24, 9 * 96).iter().enumerate().map(|(i, x)| x * power(i / 96)).collect();
    let expected = product(&weight, &x, &[]);
    for device in devices() {
        let found = Case::new(&weight, &x).run(&device);
        for i in 0..81 {
            assert_close(&found[i..=i], &[expected[i] * (1.0 + 0.0)], 40.0 * TOLERANCE);
        }
    }
}

#[test]
fn one_group_far_above_the_others_costs_them_no_more_than_f16_has() {
    // 2³⁰ times as large as the others: those keep 2⁻³⁹ of the largest, and the row is flagged.
    let mut weight = Matrix::random(TensorType::Q8_0, 256, 3, 25);
    for (i, block) in weight.bytes.chunks_exact_mut(34).enumerate() {
        let d = if i % 8 == 3 { 2f32.powi(10) } else { 2f32.powi(-20) };
        block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    }
    let mut x = normal(26, 256);
    // The large group meets zeros, so that what is left of the others shows.
    x[3 * 32..4 * 32].fill(0.0);
    let expected = product(&weight, &x, &[]);
    let bound = 2f64.powi(10) * 128.0 * 2f64.powi(-39) * x.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    for device in devices() {
        assert!(is_wide(&device, &weight));
        for (found, expected) in Case::new(&weight, &x).run(&device).iter().zip(&expected) {
            let bound = bound + expected.abs() * 1e-3;
            assert!((f64::from(*found) - expected).abs() <= bound, "found {found}, expected {expected} ± {bound}");
        }
    }
}

#[test]
fn only_matrices_that_f16_cannot_hold_are_flagged() {
    for &ty in TensorType::SUPPORTED {
        for device in devices() {
            assert!(!is_wide(&device, &Matrix::random(ty, 256, 9, 27)), "{ty}");
        }
    }
    // Groups of zeros lose nothing, whatever their scale.
    let mut weight = Matrix::random(TensorType::MXFP4, 96, 9, 28);
    weight.bytes[17..2 * 17].fill(0);
    for device in devices() {
        assert!(!is_wide(&device, &weight));
    }
    for (e, flagged) in [(0, true), (1, true), (96, true), (100, false), (158, true), (254, true)] {
        let mut weight = Matrix::random(TensorType::MXFP4, 96, 9, 29);
        weight.bytes[5 * 17] = e;
        for device in devices() {
            assert_eq!(is_wide(&device, &weight), flagged, "E = {e}");
        }
    }
}

#[test]
fn extreme_exponents_of_mxfp4_are_kept() {
    for e in [0u8, 1, 2, 14, 60, 103, 141, 200, 250] {
        let mut weight = Matrix::random(TensorType::MXFP4, 64, 9, 30);
        weight.bytes.chunks_exact_mut(17).for_each(|block| block[0] = e);
        // Results near 1 whatever the weights; 2¹²⁰ is near the most that x may be.
        let x_scale = 2f32.powi(127 - i32::from(e.max(7)));
        let x: Vec<f32> = normal(31, 3 * 64).iter().map(|x| x * x_scale).collect();
        let expected = product(&weight, &x, &[]);
        for device in devices() {
            assert_close(&Case::new(&weight, &x).run(&device), &expected, TOLERANCE);
        }
    }
}

#[test]
fn non_finite_values_stay_visible_where_they_belong() {
    let weight = Matrix::random(TensorType::Q8_0, 64, 5, 32);
    for hostile in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = normal(33, 3 * 64);
        x[64 + 7] = hostile;
        for device in devices() {
            for (i, y) in Case::new(&weight, &x).run(&device).iter().enumerate() {
                assert_eq!(y.is_finite(), i / 5 != 1, "{hostile}: token {}, row {}: {y}", i / 5, i % 5);
            }
        }
    }
    let mut weight = Matrix::random(TensorType::Q4_0, 64, 5, 34);
    weight.bytes[2 * 36..2 * 36 + 2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    let x = normal(35, 3 * 64);
    for device in devices() {
        for (i, y) in Case::new(&weight, &x).run(&device).iter().enumerate() {
            assert_eq!(y.is_finite(), i % 5 != 2, "token {}, row {}: {y}", i / 5, i % 5);
        }
    }
}

/// Both factors are rounded to f16: each by 2⁻¹¹/√12 to 2⁻¹²/√12 of itself, so a product by about 2e-4 · √2 norm-wise.
/// A wrong weight shows as 1 / √n_in, 2e-2 at least.
const TOLERANCE: f64 = 6e-4;

#[track_caller]
fn check(weight: &Matrix, n_tokens: usize, plan: Option<(Shape, u32)>) {
    let (x, bias) = (normal(100, n_tokens * weight.n_in), normal(101, weight.n_out));
    let expected = product(weight, &x, &bias);
    for device in devices() {
        if plan.is_some_and(|(shape, _)| !runs(&device, shape)) {
            continue;
        }
        let found = Case { bias: &bias, plan, ..Case::new(weight, &x) }.run(&device);
        assert_close(&found, &expected, TOLERANCE);
    }
}

/// Whether the device has the kernels of this shape.
fn runs(device: &TestDevice, shape: Shape) -> bool {
    shape != Shape::Warpgroups || device.has_warpgroups()
}

fn is_wide(device: &TestDevice, weight: &Matrix) -> bool {
    powers_of(device, weight).1
}

fn powers_of(device: &TestDevice, weight: &Matrix) -> (Buffer<f32>, bool) {
    let (packed, out, wide) = (weight.upload(device), device.poisoned(weight.n_out), device.upload(&[0u32]));
    let (n_in, n_out) = (weight.n_in as u32, weight.n_out as u32);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (out, wide, packed) = (out.slice(), wide.slice(), packed.slice());
        powers::run(weight.format(), device.launcher(), out, wide, packed, n_in, n_out).unwrap();
    }
    let wide = wide.to_vec().unwrap()[0] != 0;
    (out, wide)
}

/// A product as the engine makes it: rows to f16, powers of the weight's rows, then the product.
#[derive(Clone, Copy)]
struct Case<'a> {
    weight: &'a Matrix,
    x: &'a [f32],
    bias: &'a [f32],
    /// What `out` holds; empty if that is of no matter.
    before: &'a [f32],
    epilogue: u32,
    /// Elements from one row of `out` to the next, and the first that is written; 0 for rows side by side.
    stride: usize,
    column: usize,
    /// The planned one if `None`.
    plan: Option<(Shape, u32)>,
}

impl<'a> Case<'a> {
    fn new(weight: &'a Matrix, x: &'a [f32]) -> Self {
        Self { weight, x, bias: &[], before: &[], epilogue: STORE, stride: 0, column: 0, plan: None }
    }

    fn run(&self, device: &TestDevice) -> Vec<f32> {
        let n_tokens = self.x.len() / self.weight.n_in;
        let out = match self.before {
            [] => device.poisoned(n_tokens * self.weight.n_out),
            before if self.stride > 0 => device.upload(&before[..n_tokens * self.stride]),
            before => device.upload(before),
        };
        self.launch(device, &out, &device.none(), 1);
        out.to_vec().unwrap()
    }

    fn run_twice(&self, device: &TestDevice) -> Vec<f32> {
        let out = device.poisoned(self.x.len() / self.weight.n_in * self.weight.n_out);
        self.launch(device, &out, &device.none(), 2);
        out.to_vec().unwrap()
    }

    fn run_f16(&self, device: &TestDevice) -> Vec<f16> {
        let out = device.poisoned(self.x.len() / self.weight.n_in * self.weight.n_out);
        self.launch(device, &device.none(), &out, 1);
        out.to_vec().unwrap()
    }

    fn launch(&self, device: &TestDevice, out: &Buffer<f32>, out16: &Buffer<f16>, times: usize) {
        let Matrix { n_in, n_out, .. } = *self.weight;
        let n_tokens = self.x.len() / n_in;
        let (x16, factors) = (device.poisoned(self.x.len()), device.poisoned(n_tokens));
        let (x, bias, packed) = (device.upload(self.x), device.upload(self.bias), self.weight.upload(device));
        let (powers, _) = powers_of(device, self.weight);
        let (tokens, width, height) = (n_tokens as u32, n_in as u32, n_out as u32);
        let plan = match self.plan {
            None => Plan::new(tokens, width, height, device.has_warpgroups()),
            Some((shape, n_splits)) => Plan::cut(shape, n_splits, tokens, width, height),
        };
        let (partial, counters) = (device.poisoned(plan.partial_len()), device.upload(&vec![0; plan.counters_len()]));
        let stride = if self.stride == 0 { n_out } else { self.stride };
        let arguments = Arguments {
            out: out.slice().slice(self.column..out.len()),
            out16: out16.slice(),
            weight: packed.slice(),
            powers: powers.slice(),
            x: x16.slice(),
            factors: factors.slice(),
            bias: bias.slice(),
            partial: partial.slice(),
            counters: counters.slice(),
            out_stride: stride as u32,
            epilogue: self.epilogue,
        };
        let launch = norm_rows::launch(tokens);
        // SAFETY: shapes as the kernels' comments say.
        unsafe {
            let (x16, factors) = (x16.slice(), factors.slice());
            norm_rows::to_f16::run(device.launcher(), launch, x16, factors, x.slice(), width).unwrap();
            for _ in 0..times {
                run(self.weight.format(), device.launcher(), plan, &arguments).unwrap();
            }
        }
    }
}
