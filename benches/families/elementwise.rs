//! What is left: activations, rotation, embedding, the likeliest token, the choice of experts.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

use criterion::Throughput;
use cuda_std::{LaunchError, Launcher};
use gamma_benches::{Case, Gpu, Matrix, Rotating, Suite, spread};
use gamma_tests::{normal, relative_error, uniform};
use gpt_gamma::device::ops::{self, AttentionShape, ExpertsWork};
use gpt_gamma::gguf::TensorType;
use kernels::{gelu, rope, swiglu};

fn main() {
    gamma_benches::run(|suite| {
        for n in [3072, 512 * 3072] {
            bench_activation(suite, Activation::GeluErf, n);
            bench_activation(suite, Activation::GeluTanh, n);
        }
        for n in [4 * 2880, 512 * 4 * 2880] {
            bench_activation(suite, Activation::Swiglu, n);
        }
        for n_tokens in [1, 512] {
            bench_rope(suite, n_tokens);
            bench_embed(suite, TensorType::Q4_K, n_tokens, 768, 50257);
            bench_embed(suite, TensorType::F16, n_tokens, 2880, 201_088);
            bench_router(suite, n_tokens);
        }
        for n_vocab in [50257, 201_088] {
            bench_argmax(suite, n_vocab);
        }
    });
}

// ---- gelu and swiglu ----

#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    GeluErf,
    GeluTanh,
    Swiglu,
}

/// erf is within 1.5e-7 absolutely, half of that in Φ, and `ex2.approx` within 2 ulp; norm-wise, where |x| is about 1.
const ACTIVATION: f64 = 1e-6;

struct Activated {
    activation: Activation,
    x: [Vec<f32>; 2],
    on_device: [Rotating<f32>; 3],
}

fn bench_activation(suite: &mut Suite, activation: Activation, n: usize) {
    let op = match activation {
        Activation::GeluErf => "gelu_erf/f32",
        Activation::GeluTanh => "gelu_tanh/f32",
        Activation::Swiglu => "swiglu_oai/f32",
    };
    let n_bytes = 4 * n * if activation == Activation::Swiglu { 3 } else { 2 };
    suite.bench(op, &n.to_string(), Throughput::Bytes(n_bytes as u64), ACTIVATION, |gpu| {
        let (x, n_turns) = ([normal(1, n), normal(2, n)], gpu.n_turns(n_bytes));
        let [x0, x1] = x.each_ref().map(|x| Rotating::copies(gpu, n_turns, x));
        Activated { activation, x, on_device: [Rotating::poisoned(gpu, n_turns, n), x0, x1] }
    });
}

impl Case for Activated {
    fn n_turns(&self) -> usize {
        self.on_device[0].n_turns()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let [out, x, up] = self.on_device.each_ref().map(|copies| copies.at(turn).slice());
        let n = out.len() as u32;
        // SAFETY: launched as their files say; the slices are of one length.
        unsafe {
            match self.activation {
                Activation::GeluErf => gelu::gelu_erf::run(launcher, gelu::launch(n), out, x),
                Activation::GeluTanh => gelu::gelu_tanh::run(launcher, gelu::launch(n), out, x),
                Activation::Swiglu => swiglu::swiglu_oai::run(launcher, swiglu::launch(n), out, x, up),
            }
        }
    }

    fn error(&self, turn: usize) -> f64 {
        let out = self.on_device[0].read(turn);
        let at = spread(out.len(), 1000);
        let found: Vec<f32> = at.iter().map(|&i| out[i]).collect();
        let expected: Vec<f64> = at
            .iter()
            .map(|&i| {
                let [x, up] = self.x.each_ref().map(|x| f64::from(x[i]));
                match self.activation {
                    Activation::GeluErf => x * normal_distribution(x),
                    Activation::GeluTanh => {
                        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
                    }
                    Activation::Swiglu => {
                        let gate = x.min(7.0);
                        gate / (1.0 + (-1.702 * gate).exp()) * (up.clamp(-7.0, 7.0) + 1.0)
                    }
                }
            })
            .collect();
        relative_error(&found, &expected)
    }
}

/// Φ(x) by its power series about 0, whose terms stay below 1e4 for |x| ≤ 6; beyond, Φ is within 1e-9 of 0 or 1.
fn normal_distribution(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let mut term = x;
    let mut sum = x;
    // Φ(x) = ½ + φ(x) Σ x²ⁿ⁺¹ / (2n + 1)!!, all terms of one sign.
    for n in 1..150 {
        term *= x * x / f64::from(2 * n + 1);
        sum += term;
    }
    0.5 + (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt() * sum
}

// ---- rope ----

const ROPE_POSITION: usize = 4000;
const GPT_OSS: AttentionShape =
    AttentionShape { n_head: 64, n_head_kv: 8, d_head: 64, n_ctx: 8192, scale: 0.125, window: None };
const ROPE_HEADS: usize = GPT_OSS.n_head + GPT_OSS.n_head_kv;
const ROPE_WIDTH: usize = (GPT_OSS.n_head + 2 * GPT_OSS.n_head_kv) * GPT_OSS.d_head;
/// Cosine and sine are within 2e-7, and two products and a sum round by 2⁻²⁴ each.
const ROPE: f64 = 1e-6;

struct Rotated {
    n_tokens: usize,
    qkv: Vec<f32>,
    on_device: Rotating<f32>,
    frequencies: Rotating<u64>,
    state: Rotating<u32>,
}

/// Radians from one position to the next.
fn theta(pair: usize) -> f64 {
    150_000f64.powf(-(2.0 * pair as f64) / GPT_OSS.d_head as f64)
}

fn bench_rope(suite: &mut Suite, n_tokens: usize) {
    let n_bytes = 8 * n_tokens * ROPE_HEADS * GPT_OSS.d_head;
    let shape = format!("{n_tokens}x{ROPE_HEADS}x{}", GPT_OSS.d_head);
    suite.bench("rope/f32", &shape, Throughput::Bytes(n_bytes as u64), ROPE, |gpu| {
        let qkv = normal(1, n_tokens * ROPE_WIDTH);
        let frequencies: Vec<u64> = (0..GPT_OSS.d_head / 2).map(|pair| rope::frequency(theta(pair))).collect();
        Rotated {
            n_tokens,
            on_device: Rotating::copies(gpu, gpu.n_turns(n_bytes), &qkv),
            frequencies: Rotating::copies(gpu, 1, &frequencies),
            state: Rotating::copies(gpu, 1, &[ROPE_POSITION as u32]),
            qkv,
        }
    });
}

impl Case for Rotated {
    fn n_turns(&self) -> usize {
        self.on_device.n_turns()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let (qkv, frequencies) = (self.on_device.at(turn), self.frequencies.at(0));
        ops::rope(launcher, qkv, frequencies, 1.0, self.state.at(0), GPT_OSS, self.n_tokens)
    }

    /// All heads of the last token; the values are not turned.
    fn error(&self, turn: usize) -> f64 {
        let (d, half, token) = (GPT_OSS.d_head, GPT_OSS.d_head / 2, self.n_tokens - 1);
        let before = &self.qkv[token * ROPE_WIDTH..];
        let mut expected: Vec<f64> = before.iter().map(|&x| x.into()).collect();
        for (i, c) in (0..ROPE_HEADS).flat_map(|head| (0..half).map(move |c| (head * d + c, c))) {
            let (sin, cos) = ((ROPE_POSITION + token) as f64 * theta(c)).sin_cos();
            let (a, b) = (expected[i], expected[i + half]);
            (expected[i], expected[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
        relative_error(&self.on_device.read(turn)[token * ROPE_WIDTH..], &expected)
    }
}

// ---- embed ----

struct Embedded {
    table: Matrix,
    ids: Vec<Vec<u32>>,
    packed: Rotating<u8>,
    tokens: Rotating<u32>,
    state: Rotating<u32>,
    out: Rotating<f32>,
}

/// Every machine decodes to the same bits.
const EMBED: f64 = 0.0;

fn bench_embed(suite: &mut Suite, ty: TensorType, n_tokens: usize, d_model: usize, n_vocab: usize) {
    let n_bytes = n_tokens * (d_model / ty.block_len() * ty.block_bytes() + 4 * d_model);
    let shape = format!("{n_tokens}x{d_model}of{n_vocab}");
    suite.bench(&format!("embed/{}", Matrix::types(ty)), &shape, Throughput::Bytes(n_bytes as u64), EMBED, |gpu| {
        let n_turns = gpu.n_turns(n_bytes);
        let table = Matrix::random(ty, d_model, n_vocab, 1);
        // Other rows each turn, far apart: one table serves all. 7919 is prime.
        let ids: Vec<Vec<u32>> = (0..n_turns)
            .map(|turn| (0..n_tokens).map(|t| ((turn * n_tokens + t) * 7919 % n_vocab) as u32).collect())
            .collect();
        Embedded {
            packed: Rotating::copies(gpu, 1, &table.packed()),
            tokens: Rotating::of(gpu, n_turns, n_tokens, |turn| &ids[turn]),
            state: Rotating::copies(gpu, 1, &[0]),
            out: Rotating::poisoned(gpu, n_turns, n_tokens * d_model),
            table,
            ids,
        }
    });
}

impl Case for Embedded {
    fn n_turns(&self) -> usize {
        self.ids.len()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let (out, table, tokens, state) =
            (self.out.at(turn), self.packed.at(0), self.tokens.at(turn), self.state.at(0));
        ops::embed(launcher, out, self.table.format(), table, tokens, None, state, self.table.n_out)
    }

    fn error(&self, turn: usize) -> f64 {
        let decoded = self.ids[turn].iter().flat_map(|&id| self.table.row(id as usize));
        let expected: Vec<f64> = decoded.map(f64::from).collect();
        relative_error(&self.out.read(turn), &expected)
    }
}

// ---- router ----

const N_EXPERT: usize = 32;
const N_USED: usize = 4;
const D_MODEL: usize = 2880;
/// Sums of 2880 products, 90 in a lane: at most about 100 roundings of 2⁻²⁴, which average out; a softmax of such logits, of
/// which the largest are near 1, keeps their absolute error.
const ROUTER: f64 = 6e-6;

struct Routed {
    n_tokens: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    on_device: [Rotating<f32>; 5],
    ids: Rotating<u32>,
    none: (Rotating<u32>, Rotating<f32>),
}

fn bench_router(suite: &mut Suite, n_tokens: usize) {
    let n_bytes = 4 * (n_tokens * (D_MODEL + 2 * N_EXPERT + 2 * N_USED) + N_EXPERT * D_MODEL);
    let shape = format!("{n_tokens}x{D_MODEL}x{N_USED}of{N_EXPERT}");
    suite.bench("router/f32_f32w", &shape, Throughput::Bytes(n_bytes as u64), ROUTER, |gpu| {
        Routed::new(gpu, gpu.n_turns(n_bytes), n_tokens)
    });
}

impl Routed {
    fn new(gpu: &Gpu, n_turns: usize, n_tokens: usize) -> Self {
        let (x, bias) = (normal(1, n_tokens * D_MODEL), normal(3, N_EXPERT));
        let weight: Vec<f32> = normal(2, N_EXPERT * D_MODEL).iter().map(|w| w / (D_MODEL as f32).sqrt()).collect();
        let [on_x, on_weight, on_bias] = [&x, &weight, &bias].map(|elements| Rotating::copies(gpu, n_turns, elements));
        let logits = Rotating::poisoned(gpu, n_turns, n_tokens * N_EXPERT);
        let weights = Rotating::poisoned(gpu, n_turns, n_tokens * N_USED);
        Self {
            n_tokens,
            x,
            weight,
            bias,
            on_device: [on_x, on_weight, on_bias, logits, weights],
            ids: Rotating::poisoned(gpu, n_turns, n_tokens * N_USED),
            none: (Rotating::poisoned(gpu, 1, 1), Rotating::poisoned(gpu, 1, 1)),
        }
    }
}

impl Case for Routed {
    fn n_turns(&self) -> usize {
        self.ids.n_turns()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let [x, weight, bias, logits, weights] = self.on_device.each_ref().map(|copies| copies.at(turn));
        // Routing leaves the rest of the work alone.
        let (words, numbers) = (self.none.0.at(0), self.none.1.at(0));
        let work = ExpertsWork {
            n_expert: N_EXPERT,
            n_used: N_USED,
            d_model: D_MODEL,
            d_ff: 0,
            logits,
            ids: self.ids.at(turn),
            weights,
            pairs: words,
            tiles: words,
            h: numbers,
            y: numbers,
        };
        ops::route(launcher, &work, x, weight, Some(bias))
    }

    /// Weights of 8 tokens; another choice than the reference's is an error of 1.
    fn error(&self, turn: usize) -> f64 {
        let (ids, weights) = (self.ids.read(turn), self.on_device[4].read(turn));
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for t in spread(self.n_tokens, 8) {
            let x = &self.x[t * D_MODEL..][..D_MODEL];
            let logit = |e: usize| {
                let row = &self.weight[e * D_MODEL..][..D_MODEL];
                let dot: f64 = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                dot + f64::from(self.bias[e])
            };
            let mut logits: Vec<(f64, usize)> = (0..N_EXPERT).map(|e| (logit(e), e)).collect();
            logits.sort_by(|a, b| b.0.total_cmp(&a.0));
            let chosen = &logits[..N_USED];
            if !chosen.iter().map(|&(_, e)| e as u32).eq(ids[t * N_USED..][..N_USED].iter().copied()) {
                return 1.0;
            }
            let exp: Vec<f64> = chosen.iter().map(|(logit, _)| (logit - chosen[0].0).exp()).collect();
            found.extend(&weights[t * N_USED..][..N_USED]);
            expected.extend(exp.iter().map(|e| e / exp.iter().sum::<f64>()));
        }
        relative_error(&found, &expected)
    }
}

// ---- argmax ----

/// Exact, whatever the order.
const ARGMAX: f64 = 0.0;

struct Likeliest {
    logits: Vec<f32>,
    on_device: Rotating<f32>,
    best_logits: Rotating<f32>,
    best_ids: Rotating<u32>,
    arrived: Rotating<u32>,
    token: Rotating<u32>,
    state: Rotating<u32>,
}

fn bench_argmax(suite: &mut Suite, n_vocab: usize) {
    let n_bytes = 4 * n_vocab;
    suite.bench("argmax/f32", &n_vocab.to_string(), Throughput::Bytes(n_bytes as u64), ARGMAX, |gpu| {
        let (logits, n_turns) = (uniform(1, n_vocab, -10.0, 10.0), gpu.n_turns(n_bytes));
        Likeliest {
            on_device: Rotating::copies(gpu, n_turns, &logits),
            best_logits: Rotating::poisoned(gpu, n_turns, ops::ARGMAX_PARTS),
            best_ids: Rotating::poisoned(gpu, n_turns, ops::ARGMAX_PARTS),
            arrived: Rotating::copies(gpu, n_turns, &[0]),
            token: Rotating::poisoned(gpu, n_turns, 1),
            state: Rotating::copies(gpu, n_turns, &[7]),
            logits,
        }
    });
}

impl Case for Likeliest {
    fn n_turns(&self) -> usize {
        self.token.n_turns()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let work = ops::ArgmaxWork {
            best_logits: self.best_logits.at(turn),
            best_ids: self.best_ids.at(turn),
            arrived: self.arrived.at(turn),
        };
        ops::argmax(launcher, self.token.at(turn), self.state.at(turn), self.on_device.at(turn), work, 1)
    }

    /// 0 if the token is the likeliest and the position moved by one, else 1.
    fn error(&self, turn: usize) -> f64 {
        // The first of equals, as the kernel's comment says.
        let expected =
            (0..self.logits.len()).reduce(|a, b| if self.logits[b] > self.logits[a] { b } else { a }).unwrap();
        let right = self.token.read(turn) == [expected as u32] && self.state.read(turn) == [8];
        if right { 0.0 } else { 1.0 }
    }
}
