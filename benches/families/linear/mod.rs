//! A linear map as the engine launches it: by the matrix-vector kernel for one token, by tensor cores for more.

use criterion::Throughput;
use cuda_std::{LaunchError, Launcher};
use gamma_benches::{Case, Matrix, Rotating, Suite, spread};
use gamma_tests::{normal, relative_error};
use gpt_gamma::device::ops::{self, Cut, Epilogue, LinearMatrix};
use gpt_gamma::gguf::TensorType;

/// `[n_tokens, n_in]` to `[n_tokens, n_out]`.
pub struct Linear {
    pub op: &'static str,
    pub ty: TensorType,
    pub n_tokens: usize,
    pub n_in: usize,
    pub n_out: usize,
}

impl Linear {
    /// One token counts in bytes, of weights and activations; more count in operations.
    pub fn bench(&self, suite: &mut Suite, tolerance: f64) {
        let &Self { op, ty, n_tokens, n_in, n_out } = self;
        let n_bytes = n_in / ty.block_len() * ty.block_bytes() * n_out + 4 * (n_tokens * (n_in + n_out) + n_out);
        let (shape, work) = match n_tokens {
            1 => (format!("{n_in}x{n_out}"), Throughput::Bytes(n_bytes as u64)),
            _ => (format!("{n_tokens}x{n_in}x{n_out}"), Throughput::Elements((2 * n_tokens * n_in * n_out) as u64)),
        };
        suite.bench(&format!("{op}/{}", Matrix::types(ty)), &shape, work, tolerance, |gpu| {
            let n_turns = gpu.n_turns(n_bytes);
            let matrix = Matrix::random(ty, n_in, n_out, 1);
            let (x, bias) = (normal(2, n_tokens * n_in), normal(3, n_out));
            Inputs {
                n_turns,
                cut: Cut::Multiprocessors(gpu.device.multiprocessors()),
                packed: Rotating::copies(gpu, n_turns, &matrix.packed()),
                on_device: (Rotating::copies(gpu, n_turns, &x), Rotating::copies(gpu, n_turns, &bias)),
                out: Rotating::poisoned(gpu, n_turns, n_tokens * n_out),
                matrix,
                x,
                bias,
            }
        });
    }
}

struct Inputs {
    n_turns: usize,
    cut: Cut,
    matrix: Matrix,
    x: Vec<f32>,
    bias: Vec<f32>,
    packed: Rotating<u8>,
    on_device: (Rotating<f32>, Rotating<f32>),
    out: Rotating<f32>,
}

impl Case for Inputs {
    fn n_turns(&self) -> usize {
        self.n_turns
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let Matrix { n_in, n_out, .. } = self.matrix;
        let (x, bias) = (self.on_device.0.at(turn), self.on_device.1.at(turn));
        let (out, weight, format) = (self.out.at(turn), self.packed.at(turn), self.matrix.format());
        if x.len() == n_in {
            let matrix = LinearMatrix { format, packed: weight, n_in, n_out };
            return ops::linear_fused(launcher, out, matrix, x, None, Some(bias), Epilogue::Store, None, self.cut);
        }
        ops::linear(launcher, out, format, weight, x, Some(bias), n_in, n_out, Epilogue::Store)
    }

    /// 64 rows for 3 tokens.
    fn error(&self, turn: usize) -> f64 {
        let Matrix { n_in, n_out, .. } = self.matrix;
        let out = self.out.read(turn);
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for t in spread(self.x.len() / n_in, 3) {
            for o in spread(n_out, 64) {
                found.push(out[t * n_out + o]);
                expected.push(self.matrix.dot(o, &self.x[t * n_in..][..n_in]) + f64::from(self.bias[o]));
            }
        }
        relative_error(&found, &expected)
    }
}
