//! Attention with an f16 cache, at the shapes of GPT-2 (124M) and gpt-oss-20b.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

use criterion::Throughput;
use cuda_std::{LaunchError, Launcher, f16};
use gamma_benches::{Case, Gpu, Rotating, Suite, spread};
use gamma_tests::{normal, relative_error, uniform};
use gpt_gamma::device::ops::{
    self, AttentionOut, AttentionShape, Cache, TokenWork, attention_counters_len, attention_partial_len,
};

/// q and the softmax's numerators are rounded to f16, and their errors average out over keys; a window's first queries have
/// few. Grouped decode keeps f32's precision, so this holds for all.
const TOLERANCE: f64 = 1e-3;

#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    n_head: usize,
    n_head_kv: usize,
    window: Option<usize>,
    sinks: bool,
}

const GPT2: Model = Model { name: "gpt2", n_head: 12, n_head_kv: 12, window: None, sinks: false };
const GPT_OSS: Model = Model { name: "gpt_oss", n_head: 64, n_head_kv: 8, window: None, sinks: true };
const GPT_OSS_WINDOW: Model = Model { name: "gpt_oss_window", window: Some(128), ..GPT_OSS };
const D_HEAD: usize = 64;

fn main() {
    gamma_benches::run(|suite| {
        for model in [GPT2, GPT_OSS, GPT_OSS_WINDOW] {
            for n_ctx in [1024, 16384] {
                model.bench(suite, 1, n_ctx);
            }
            for n_tokens in [512, 2048] {
                model.bench(suite, n_tokens, n_tokens);
            }
        }
    });
}

impl Model {
    fn shape(self, n_ctx: usize) -> AttentionShape {
        let Self { n_head, n_head_kv, window, .. } = self;
        AttentionShape {
            n_head,
            n_head_kv,
            d_head: D_HEAD,
            n_slots: n_ctx,
            scale: (D_HEAD as f32).sqrt().recip(),
            window,
        }
    }

    /// The last `n_tokens` of `n_ctx`: one counts in bytes of the keys and values that it sees, more in operations.
    fn bench(self, suite: &mut Suite, n_tokens: usize, n_ctx: usize) {
        let seen = |position: usize| (position + 1).min(self.window.unwrap_or(usize::MAX));
        let row_bytes = 2 * self.n_head_kv * D_HEAD * 2;
        let (op, work) = if n_tokens == 1 {
            // The new key's and value's way to the cache included.
            ("attention_token", Throughput::Bytes((row_bytes * seen(n_ctx - 1)) as u64))
        } else {
            // Two products of d_head for each pair of query and key that it sees.
            let pairs: usize = (n_ctx - n_tokens..n_ctx).map(seen).sum();
            ("attention_prefill", Throughput::Elements((4 * D_HEAD * self.n_head * pairs) as u64))
        };
        let shape = format!("{}_{n_ctx}", self.name);
        suite.bench(&format!("{op}/f32_f16kv"), &shape, work, TOLERANCE, |gpu| {
            Inputs::new(gpu, self, n_tokens, n_ctx, row_bytes * n_ctx.min(seen(n_ctx - 1) + n_tokens))
        });
    }
}

struct Inputs {
    n_turns: usize,
    model: Model,
    shape: AttentionShape,
    n_tokens: usize,
    qkv: Vec<f32>,
    /// `[n_head_kv, n_ctx, d_head]`: no rings.
    keys: Vec<f16>,
    values: Vec<f16>,
    sinks: Vec<f32>,
    on_device: OnDevice,
}

struct OnDevice {
    qkv: Rotating<f32>,
    keys: Rotating<f16>,
    values: Rotating<f16>,
    sinks: Rotating<f32>,
    state: Rotating<u32>,
    partial: Rotating<f32>,
    counters: Rotating<u32>,
    out: Rotating<f32>,
}

impl Inputs {
    fn new(gpu: &Gpu, model: Model, n_tokens: usize, n_ctx: usize, bytes_seen: usize) -> Self {
        let shape = model.shape(n_ctx);
        let qkv = normal(1, n_tokens * (model.n_head + 2 * model.n_head_kv) * D_HEAD);
        let n_turns = gpu.n_turns(bytes_seen + 4 * qkv.len());
        let cache = |seed| -> Vec<f16> {
            normal(seed, model.n_head_kv * n_ctx * D_HEAD).into_iter().map(f16::from_f32).collect()
        };
        let (mut keys, mut values, sinks) = (cache(2), cache(3), uniform(4, model.n_head, 1.0, 3.0));
        if n_tokens == 1 {
            // What the kernel takes from `qkv`, for the reference.
            let heads = qkv.chunks_exact(D_HEAD).skip(model.n_head).enumerate();
            for (i, head) in heads {
                let (cache, kv_head) =
                    if i < model.n_head_kv { (&mut keys, i) } else { (&mut values, i - model.n_head_kv) };
                let row = &mut cache[((kv_head + 1) * n_ctx - 1) * D_HEAD..][..D_HEAD];
                row.iter_mut().zip(head).for_each(|(to, &from)| *to = f16::from_f32(from));
            }
        }
        let on_device = OnDevice {
            qkv: Rotating::copies(gpu, n_turns, &qkv),
            keys: Rotating::copies(gpu, n_turns, &keys),
            values: Rotating::copies(gpu, n_turns, &values),
            sinks: Rotating::copies(gpu, 1, &sinks),
            state: Rotating::copies(gpu, 1, &[(n_ctx - n_tokens) as u32]),
            partial: Rotating::poisoned(gpu, 1, attention_partial_len(shape).max(1)),
            counters: Rotating::copies(gpu, 1, &vec![0; attention_counters_len(shape)]),
            out: Rotating::poisoned(gpu, n_turns, n_tokens * model.n_head * D_HEAD),
        };
        Self { n_turns, model, shape, n_tokens, qkv, keys, values, sinks, on_device }
    }

    /// Head `head` of token `token`, as the definition says.
    fn attend(&self, token: usize, head: usize) -> Vec<f64> {
        let Model { n_head, n_head_kv, window, sinks, .. } = self.model;
        let (n_ctx, kv_head) = (self.shape.n_slots, head / (n_head / n_head_kv));
        let position = n_ctx - self.n_tokens + token;
        let q = &self.qkv[(token * (n_head + 2 * n_head_kv) + head) * D_HEAD..][..D_HEAD];
        let row = |cache: &'_ [f16], j: usize, c: usize| f64::from(cache[(kv_head * n_ctx + j) * D_HEAD + c].to_f32());
        let seen = (position + 1).saturating_sub(window.unwrap_or(usize::MAX))..position + 1;
        let scores: Vec<f64> = seen
            .clone()
            .map(|j| {
                let dot: f64 = (0..D_HEAD).map(|c| f64::from(q[c]) * row(&self.keys, j, c)).sum();
                dot * f64::from(self.shape.scale)
            })
            .collect();
        let sink = if sinks { f64::from(self.sinks[head]) } else { f64::NEG_INFINITY };
        let largest = scores.iter().fold(sink, |a, &b| a.max(b));
        let sum = scores.iter().map(|s| (s - largest).exp()).sum::<f64>() + (sink - largest).exp();
        let weighted =
            |c| seen.clone().zip(&scores).map(move |(j, s)| (s - largest).exp() / sum * row(&self.values, j, c));
        (0..D_HEAD).map(|c| weighted(c).sum()).collect()
    }
}

impl Case for Inputs {
    fn n_turns(&self) -> usize {
        self.n_turns
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        let OnDevice { qkv, keys, values, sinks, state, partial, counters, out } = &self.on_device;
        let cache = Cache::F16 { k: keys.at(turn), v: values.at(turn) };
        let sinks = self.model.sinks.then(|| sinks.at(0));
        let (out, qkv, state) = (out.at(turn), qkv.at(turn), state.at(0));
        if self.n_tokens == 1 {
            let work = TokenWork { partial: partial.at(0), counters: counters.at(0) };
            return ops::attention_token(launcher, out, qkv, cache, state, None, sinks, work, self.shape);
        }
        ops::attention(launcher, AttentionOut::F32(out), qkv, cache, state, sinks, self.shape, self.n_tokens)
    }

    /// 3 tokens by 4 heads.
    fn error(&self, turn: usize) -> f64 {
        let out = self.on_device.out.read(turn);
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for token in spread(self.n_tokens, 3) {
            for head in spread(self.model.n_head, 4) {
                found.extend(&out[(token * self.model.n_head + head) * D_HEAD..][..D_HEAD]);
                expected.extend(self.attend(token, head));
            }
        }
        relative_error(&found, &expected)
    }
}
