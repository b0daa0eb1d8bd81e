//! The experts of a layer of gpt-oss-20b: one token, and a prompt of 512.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

use criterion::Throughput;
use cuda_std::{LaunchError, Launcher};
use gamma_benches::{Case, Gpu, Matrix, Rotating, Suite, spread};
use gamma_tests::{normal, relative_error, uniform};
use gpt_gamma::device::ops::{self, ExpertsMatrix, ExpertsWork, expert_tiles_len};
use gpt_gamma::gguf::TensorType;

const N_EXPERT: usize = 32;
const N_USED: usize = 4;
const D: usize = 2880; // d_model and d_ff alike.
const TYPE: TensorType = TensorType::MXFP4;

/// f32 sums of 8 or 16 lanes: up to 32 roundings of 2⁻²⁴ in each, 2e-6, and the gated unit's slope brings some to 1.6e-5.
const DECODE: f64 = 1e-5;
/// f16 inputs: each of two factors is rounded by 2⁻¹² at most, norm-wise 3e-4 for a product; `h` is rounded once more.
const PREFILL: f64 = 1e-3;

fn main() {
    gamma_benches::run(|suite| {
        let expert_bytes = D / TYPE.block_len() * TYPE.block_bytes() * D;
        let work = Throughput::Bytes((3 * N_USED * expert_bytes) as u64);
        bench(suite, "experts_decode", 1, work, DECODE);
        let n_tokens = 512;
        let work = Throughput::Elements((n_tokens * N_USED * 3 * 2 * D * D) as u64);
        bench(suite, "experts_prefill", n_tokens, work, PREFILL);
    });
}

fn bench(suite: &mut Suite, op: &str, n_tokens: usize, work: Throughput, tolerance: f64) {
    let shape = format!("{n_tokens}x{N_USED}of{N_EXPERT}x{D}x{D}");
    suite.bench(&format!("{op}/{}", Matrix::types(TYPE)), &shape, work, tolerance, |gpu| Inputs::new(gpu, n_tokens));
}

struct Inputs {
    n_tokens: usize,
    /// Expert e's matrices are e, e + 1 and e + 2 of these, modulo 32: gate, up and down.
    experts: Matrix,
    x: Vec<f32>,
    biases: Vec<f32>,
    weights: Vec<f32>,
    /// Of each turn. A turn's experts are not the last one's, so one copy of the weights serves all.
    ids: Vec<Vec<u32>>,
    on_device: OnDevice,
}

struct OnDevice {
    matrices: [Rotating<u8>; 3],
    biases: Rotating<f32>,
    x: Rotating<f32>,
    out: Rotating<f32>,
    logits: Rotating<f32>,
    ids: Rotating<u32>,
    weights: Rotating<f32>,
    pairs: Rotating<u32>,
    tiles: Rotating<u32>,
    h: Rotating<f32>,
    y: Rotating<f32>,
}

impl Inputs {
    fn new(gpu: &Gpu, n_tokens: usize) -> Self {
        let (n_turns, n_pairs) = (N_EXPERT / N_USED, n_tokens * N_USED);
        let experts = Matrix::random(TYPE, D, N_EXPERT * D, 1);
        // Gates near 1, where the gated unit neither vanishes nor is cut off: elements are about 1, and 2880 are added.
        let x: Vec<f32> = normal(2, n_tokens * D).iter().map(|x| x / 50.0).collect();
        let (biases, weights) = (uniform(3, N_EXPERT * D, -0.5, 0.5), uniform(4, n_pairs, 0.1, 0.4));
        let id = |turn, t: usize, slot| ((turn + t * 5) * N_USED + slot) % N_EXPERT;
        let ids: Vec<Vec<u32>> = (0..n_turns)
            .map(|turn| (0..n_pairs).map(|pair| id(turn, pair / N_USED, pair % N_USED) as u32).collect())
            .collect();
        let packed = experts.packed_experts(N_EXPERT);
        let matrices = [0, 1, 2].map(|first| {
            let (wrapped, rest) = packed.split_at(first * packed.len() / N_EXPERT);
            Rotating::copies(gpu, 1, &[rest, wrapped].concat())
        });
        let on_device = OnDevice {
            matrices,
            biases: Rotating::copies(gpu, 1, &biases),
            x: Rotating::copies(gpu, n_turns, &x),
            out: Rotating::copies(gpu, n_turns, &vec![0.0; n_tokens * D]),
            logits: Rotating::poisoned(gpu, 1, n_tokens * N_EXPERT),
            ids: Rotating::of(gpu, n_turns, n_pairs, |turn| &ids[turn]),
            weights: Rotating::copies(gpu, 1, &weights),
            pairs: Rotating::poisoned(gpu, 1, n_pairs),
            tiles: Rotating::poisoned(gpu, 1, expert_tiles_len(n_pairs, N_EXPERT)),
            h: Rotating::poisoned(gpu, 1, n_pairs * D),
            y: Rotating::poisoned(gpu, 1, n_pairs * D),
        };
        Self { n_tokens, experts, x, biases, weights, ids, on_device }
    }

    /// Elements `rows` of what `token`'s experts give in turn `turn`.
    fn reference(&self, turn: usize, token: usize, rows: &[usize]) -> Vec<f64> {
        let x = &self.x[token * D..][..D];
        let mut sums = vec![0.0; rows.len()];
        for pair in token * N_USED..(token + 1) * N_USED {
            let expert = self.ids[turn][pair] as usize;
            let bias = |o: usize| f64::from(self.biases[expert * D + o]);
            let row = |matrix: usize, o: usize| (expert + matrix) % N_EXPERT * D + o;
            let h: Vec<f32> = (0..D)
                .map(|o| {
                    let gate = (self.experts.dot(row(0, o), x) + bias(o)).min(7.0);
                    let up = (self.experts.dot(row(1, o), x) + bias(o)).clamp(-7.0, 7.0);
                    (gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)) as f32
                })
                .collect();
            for (sum, &o) in sums.iter_mut().zip(rows) {
                *sum += f64::from(self.weights[pair]) * (self.experts.dot(row(2, o), &h) + bias(o));
            }
        }
        sums
    }
}

impl Case for Inputs {
    fn n_turns(&self) -> usize {
        self.ids.len()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let OnDevice { matrices, biases, x, out, logits, ids, weights, pairs, tiles, h, y } = &self.on_device;
        let work = ExpertsWork {
            n_expert: N_EXPERT,
            n_used: N_USED,
            d_model: D,
            d_ff: D,
            logits: logits.at(0),
            ids: ids.at(turn),
            weights: weights.at(0),
            pairs: pairs.at(0),
            tiles: tiles.at(0),
            h: h.at(0),
            y: y.at(0),
        };
        let format = self.experts.format();
        let [gate, up, down] =
            matrices.each_ref().map(|packed| ExpertsMatrix { format, packed: packed.at(0), bias: biases.at(0) });
        ops::experts(launcher, &work, out.at(turn), x.at(turn), gate, up, down)
    }

    /// 64 elements of the last token.
    fn error(&self, turn: usize) -> f64 {
        let (token, rows) = (self.n_tokens - 1, spread(D, 64));
        let out = self.on_device.out.read(turn);
        let found: Vec<f32> = rows.iter().map(|o| out[token * D + o]).collect();
        relative_error(&found, &self.reference(turn, token, &rows))
    }
}
