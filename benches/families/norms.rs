//! Normalization, at the widths of GPT-2 and gpt-oss.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

use criterion::Throughput;
use cuda_std::{LaunchError, Launcher};
use gamma_benches::{Case, Gpu, Rotating, Suite, spread};
use gamma_tests::{normal, relative_error, uniform};
use gpt_gamma::device::ops;

const EPSILON: f32 = 1e-5;
/// Sums of up to 2880 squares in lanes and a butterfly: fewer than 20 roundings of 2⁻²⁴, then a root, a reciprocal and a few
/// products and sums.
const TOLERANCE: f64 = 2e-6;

fn main() {
    gamma_benches::run(|suite| {
        for n_tokens in [1, 512, 2048] {
            bench(suite, true, n_tokens, 768);
            bench(suite, false, n_tokens, 2880);
        }
    });
}

fn bench(suite: &mut Suite, is_layer_norm: bool, n_tokens: usize, d: usize) {
    let op = if is_layer_norm { "layer_norm/f32" } else { "rms_norm/f32" };
    let n_bytes = 4 * d * (2 * n_tokens + if is_layer_norm { 2 } else { 1 });
    suite.bench(op, &format!("{n_tokens}x{d}"), Throughput::Bytes(n_bytes as u64), TOLERANCE, |gpu| {
        Inputs::new(gpu, is_layer_norm, gpu.n_turns(n_bytes), n_tokens, d)
    });
}

struct Inputs {
    is_layer_norm: bool,
    x: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    on_device: [Rotating<f32>; 4],
}

impl Inputs {
    fn new(gpu: &Gpu, is_layer_norm: bool, n_turns: usize, n_tokens: usize, d: usize) -> Self {
        let (x, gamma, beta) = (normal(1, n_tokens * d), uniform(2, d, 0.5, 1.5), uniform(3, d, -1.0, 1.0));
        let out = Rotating::poisoned(gpu, n_turns, n_tokens * d);
        let [on_x, on_gamma, on_beta] = [&x, &gamma, &beta].map(|elements| Rotating::copies(gpu, n_turns, elements));
        Self { is_layer_norm, x, gamma, beta, on_device: [out, on_x, on_gamma, on_beta] }
    }
}

impl Case for Inputs {
    fn n_turns(&self) -> usize {
        self.on_device[0].n_turns()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let [out, x, gamma, beta] = self.on_device.each_ref().map(|copies| copies.at(turn));
        match self.is_layer_norm {
            true => ops::layer_norm(launcher, out, x, gamma, beta, EPSILON),
            false => ops::rms_norm(launcher, out, x, gamma, EPSILON),
        }
    }

    /// 8 rows.
    fn error(&self, turn: usize) -> f64 {
        let (d, out) = (self.gamma.len(), self.on_device[0].read(turn));
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for t in spread(self.x.len() / d, 8) {
            let x: Vec<f64> = self.x[t * d..][..d].iter().map(|&x| x.into()).collect();
            let mean = if self.is_layer_norm { x.iter().sum::<f64>() / d as f64 } else { 0.0 };
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
            found.extend(&out[t * d..][..d]);
            expected.extend(x.iter().enumerate().map(|(c, x)| {
                let beta = if self.is_layer_norm { f64::from(self.beta[c]) } else { 0.0 };
                (x - mean) / (variance + f64::from(EPSILON)).sqrt() * f64::from(self.gamma[c]) + beta
            }));
        }
        relative_error(&found, &expected)
    }
}
