//! Matrices of every type, as a file and as the kernels see them.

use gamma_tests::{TestDevice, bytes, normal};
use gpt_gamma::device::Buffer;
use gpt_gamma::gguf::{self, TensorType};
use gpt_gamma::weights::Packing;
use half::{bf16, f16};
use kernels::format::WeightFormat;

/// A matrix as in a file.
pub struct Matrix {
    pub ty: TensorType,
    pub n_in: usize,
    pub n_out: usize,
    pub bytes: Vec<u8>,
}

impl Matrix {
    /// Random blocks whose scales are such that elements are about 1.
    pub fn random(ty: TensorType, n_in: usize, n_out: usize, seed: u64) -> Self {
        let mut matrix = Self::any(ty, n_in, n_out, seed);
        let n_blocks = matrix.bytes.len() / ty.block_bytes();
        // Scales are not random bits: those would be infinite, NaN, or of magnitudes that drown all others.
        let factors: Vec<f32> =
            normal(seed + 1, 2 * n_blocks).iter().map(|x| x.signum() * (1.0 + x.abs()) / 2.0).collect();
        for (block, factors) in matrix.bytes.chunks_exact_mut(ty.block_bytes()).zip(factors.chunks_exact(2)) {
            let mut put = |at: usize, x: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
            let [d, m] = [factors[0], factors[1]];
            match ty {
                TensorType::F32 => block.copy_from_slice(&(d * m).to_le_bytes()),
                TensorType::F16 => put(0, d * m),
                TensorType::BF16 => block.copy_from_slice(&bf16::from_f32(d * m).to_le_bytes()),
                TensorType::Q4_0 => put(0, d / 4.0),
                TensorType::Q4_1 => (put(0, d / 8.0), put(2, m)).0,
                TensorType::Q5_0 => put(0, d / 8.0),
                TensorType::Q5_1 => (put(0, d / 16.0), put(2, m)).0,
                TensorType::Q8_0 => put(0, d / 64.0),
                TensorType::Q2_K => (put(80, d / 16.0), put(82, m / 8.0)).0,
                TensorType::Q3_K => put(108, d / 32.0),
                TensorType::Q4_K | TensorType::Q5_K => (put(0, d / 256.0), put(2, m / 32.0)).0,
                TensorType::Q6_K => put(208, d / 1024.0),
                TensorType::MXFP4 => block[0] = 124 + (d.abs() * 2.0) as u8,
                other => panic!("no weights have type {other}"),
            }
        }
        matrix
    }

    /// Random bits throughout.
    pub fn any(ty: TensorType, n_in: usize, n_out: usize, seed: u64) -> Self {
        let bytes = bytes(seed, n_in / ty.block_len() * ty.block_bytes() * n_out);
        Self { ty, n_in, n_out, bytes }
    }

    /// What the reference decodes.
    pub fn decoded(&self) -> Vec<f32> {
        gguf::decode(self.ty, &self.bytes).unwrap()
    }

    /// The kernels' name of its type.
    pub fn format(&self) -> WeightFormat {
        self.packing().format()
    }

    /// A repacked copy on the device.
    #[track_caller]
    pub fn upload(&self, device: &TestDevice) -> Buffer<u8> {
        let mut packed = vec![0; self.packing().n_bytes()];
        self.packing().repack(&self.bytes, &mut packed);
        device.upload(&packed)
    }

    fn packing(&self) -> Packing {
        Packing::new(self.ty, self.n_in, self.n_out).unwrap()
    }
}

/// y[t][o] = Σ weight[o][i] · x[t][i] + bias[o], in f64.
pub fn product(weight: &Matrix, x: &[f32], bias: &[f32]) -> Vec<f64> {
    let (n_in, w) = (weight.n_in, weight.decoded());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let mut out = Vec::new();
    for x in x.chunks(n_in) {
        for (o, row) in w.chunks(n_in).enumerate() {
            out.push(dot(row, x) + bias.get(o).map_or(0.0, |&b| f64::from(b)));
        }
    }
    out
}

/// x · Φ(x), with erf by its power series, whose terms stay below 1e7 for |x| ≤ 6.
pub fn gelu_erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.max(0.0);
    }
    let z = x / std::f64::consts::SQRT_2;
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= -z * z / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    0.5 * x * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * sum)
}

/// ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))).
pub fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}
