//! Attention against its definition in f64, kernel by kernel; here is what the tests share.

mod cache;
mod prefill;
mod token;

use std::ops::Range;

use cuda_std::{DeviceSlice, Launch, LaunchError, Launcher, f16};
use gamma_tests::{TestDevice, normal, uniform};
use gpt_gamma::device::Buffer;
use kernels::attention::kv_append::{self, kv_append_f16, kv_append_f32};
use kernels::attention::prefill::{
    attention_prefill_f16_64, attention_prefill_f16_128, attention_prefill_f32_32, attention_prefill_f32_64,
    attention_prefill_f32_128, launch_f16, launch_f32,
};
use kernels::attention::reciprocal;
use kernels::attention::token::grouped::{self, attention_token_grouped_f16_64, attention_token_grouped_f16_128};
use kernels::attention::token::partial_len;
use kernels::attention::token::single::{
    self, attention_token_f16_32, attention_token_f16_64, attention_token_f16_128, attention_token_f32_32,
    attention_token_f32_64, attention_token_f32_128,
};

/// q and the softmax's numerators are rounded to f16. A score's error is `Σ δq·k`, with |δq| ≤ 2⁻¹² |q| mostly: for the
/// standard normal data here 2⁻¹² times a score's own deviation of 1, and a numerator adds its own 2⁻¹². Both average out
/// over keys. Twice what a window of one key or a dominating key leaves of that.
const TENSOR_CORES: f64 = 1e-3;
/// f32 sums of up to 128 products and of up to 1000 keys, and exp2's 2 ulp of a score of a few units. The grouped kernels'
/// two f16 for one f32 leave 2⁻²².
const FULL_PRECISION: f64 = 1e-5;

#[derive(Clone, Copy, Debug)]
struct Model {
    n_head: usize,
    n_head_kv: usize,
    d_head: usize,
    n_slots: usize,
    window: usize,
    sinks: bool,
}

const MODEL: Model = Model { n_head: 1, n_head_kv: 1, d_head: 64, n_slots: 200, window: 0, sinks: false };

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kv {
    F16,
    F32,
}

impl Kv {
    fn round(self, x: f32) -> f32 {
        if self == Kv::F16 { f16::from_f32(x).to_f32() } else { x }
    }
}

impl Model {
    fn width(&self) -> usize {
        (self.n_head + 2 * self.n_head_kv) * self.d_head
    }

    fn scale(&self) -> f32 {
        (self.d_head as f32).sqrt().recip()
    }

    fn qkv(&self, seed: u64, n_tokens: usize) -> Vec<f32> {
        normal(seed, n_tokens * self.width())
    }

    fn sinks(&self) -> Vec<f32> {
        if self.sinks { uniform(99, self.n_head, 1.0, 3.0) } else { Vec::new() }
    }

    /// Attention from these tokens as its definition says: `[tokens.len(), n_head d_head]`.
    fn reference(&self, qkv: &[f32], tokens: Range<usize>, sinks: &[f32], kv: Kv) -> Vec<f64> {
        let &Model { n_head, n_head_kv, d_head, window, .. } = self;
        let first = tokens.start;
        let mut out = vec![0.0; tokens.len() * n_head * d_head];
        for i in tokens {
            for h in 0..n_head {
                let at = |token: usize, head: usize| token * self.width() + head * d_head;
                let kv_head = h / (n_head / n_head_kv);
                let visible: Vec<usize> = (0..=i).filter(|j| window == 0 || i - j < window).collect();
                let score = |&j: &usize| {
                    let (q, k) = (&qkv[at(i, h)..], &qkv[at(j, n_head + kv_head)..]);
                    let dot: f64 = (0..d_head).map(|c| f64::from(q[c]) * f64::from(kv.round(k[c]))).sum();
                    dot * f64::from(self.scale())
                };
                let scores: Vec<f64> = visible.iter().map(score).collect();
                let sink = sinks.get(h).map_or(f64::NEG_INFINITY, |&sink| f64::from(sink));
                let largest = scores.iter().fold(sink, |a, &b| a.max(b));
                let sum = scores.iter().map(|s| (s - largest).exp()).sum::<f64>() + (sink - largest).exp();
                for (&j, score) in visible.iter().zip(&scores) {
                    let v = &qkv[at(j, n_head + n_head_kv + kv_head)..];
                    let share = (score - largest).exp() / sum;
                    for c in 0..d_head {
                        out[((i - first) * n_head + h) * d_head + c] += share * f64::from(kv.round(v[c]));
                    }
                }
            }
        }
        out
    }

    /// References with a mistake each, of those that show in the last of `tokens`.
    fn mutations(&self, qkv: &[f32], tokens: Range<usize>, sinks: &[f32], kv: Kv) -> Vec<(String, Vec<f64>)> {
        let n_tokens = tokens.end;
        let mut mutations = Vec::new();
        let mut add = |name: String, model: Model, sinks: &[f32]| {
            mutations.push((name, model.reference(qkv, tokens.clone(), sinks, kv)));
        };
        if self.window > 0 && self.window < n_tokens {
            add(format!("window {} + 1", self.window), Model { window: self.window + 1, ..*self }, sinks);
        }
        if self.window > 1 && self.window <= n_tokens {
            add(format!("window {} − 1", self.window), Model { window: self.window - 1, ..*self }, sinks);
        }
        if self.sinks {
            add("no sinks".into(), *self, &[]);
            add("scaled sinks".into(), *self, &sinks.iter().map(|z| z * self.scale()).collect::<Vec<_>>());
        }
        mutations
    }
}

/// A device with caches, as the engine keeps them between launches.
struct Session<'a> {
    device: &'a TestDevice,
    model: Model,
    caches: Caches,
    qkv: Buffer<f32>,
    state: Buffer<u32>,
    sinks: Buffer<f32>,
    /// No rotation at first.
    frequencies: Buffer<u64>,
    magnitude: f32,
    counters: Buffer<u32>,
    /// By number of splits, so that what one step leaves there meets the next.
    partial: std::cell::RefCell<Vec<(usize, std::rc::Rc<Buffer<f32>>)>>,
}

enum Caches {
    F16(Buffer<f16>, Buffer<f16>),
    F32(Buffer<f32>, Buffer<f32>),
}

type Prefill<E> = unsafe fn(
    &dyn Launcher,
    Launch,
    DeviceSlice<f32>,
    DeviceSlice<f16>,
    DeviceSlice<f32>,
    DeviceSlice<E>,
    DeviceSlice<E>,
    DeviceSlice<u32>,
    DeviceSlice<f32>,
    u32,
    u32,
    u32,
    u32,
    u32,
    u32,
    f32,
) -> Result<(), LaunchError>;

type Token<E> = unsafe fn(
    &dyn Launcher,
    Launch,
    DeviceSlice<f32>,
    DeviceSlice<f32>,
    DeviceSlice<u32>,
    DeviceSlice<f32>,
    DeviceSlice<E>,
    DeviceSlice<E>,
    DeviceSlice<E>,
    DeviceSlice<E>,
    DeviceSlice<u32>,
    DeviceSlice<u64>,
    DeviceSlice<f32>,
    u32,
    u32,
    u32,
    u64,
    u32,
    f32,
    f32,
) -> Result<(), LaunchError>;

impl<'a> Session<'a> {
    fn new(device: &'a TestDevice, model: Model, kv: Kv, n_tokens: usize) -> Self {
        let n = model.n_head_kv * model.n_slots * model.d_head;
        let caches = match kv {
            Kv::F16 => Caches::F16(device.poisoned(n), device.poisoned(n)),
            Kv::F32 => Caches::F32(device.poisoned(n), device.poisoned(n)),
        };
        let sinks = if model.sinks { device.upload(&model.sinks()) } else { device.none() };
        let (qkv, state) = (device.poisoned(n_tokens * model.width()), device.poisoned(1));
        Self {
            device,
            model,
            caches,
            qkv,
            state,
            sinks,
            frequencies: device.none(),
            magnitude: 1.0,
            counters: device.upload(&vec![0; model.n_head]),
            partial: Vec::new().into(),
        }
    }

    /// `n_head, n_head_kv, d_head, n_slots, window`.
    fn sizes(&self) -> [u32; 5] {
        let Model { n_head, n_head_kv, d_head, n_slots, window, .. } = self.model;
        [n_head, n_head_kv, d_head, n_slots, window].map(|n| n as u32)
    }

    #[track_caller]
    fn append(&self, position: usize, qkv: &[f32]) {
        self.state.write(0, &[position as u32]).unwrap();
        self.qkv.write(0, qkv).unwrap();
        self.try_append(qkv.len() / self.model.width()).unwrap();
    }

    fn try_append(&self, n_tokens: usize) -> Result<(), LaunchError> {
        let [n_head, n_head_kv, d, s, w] = self.sizes();
        let (device, n) = (self.device.launcher(), n_tokens as u32);
        let (qkv, state) = (self.qkv.slice(), self.state.slice());
        let launch = kv_append::launch(n, n_head_kv);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            match &self.caches {
                Caches::F16(k, v) => {
                    kv_append_f16::run(device, launch, k.slice(), v.slice(), qkv, state, n, n_head, n_head_kv, d, s, w)
                }
                Caches::F32(k, v) => {
                    kv_append_f32::run(device, launch, k.slice(), v.slice(), qkv, state, n, n_head, n_head_kv, d, s, w)
                }
            }
        }
    }

    /// Puts the keys and values of a prompt into the empty cache.
    #[track_caller]
    fn load(&self, qkv: &[f32]) {
        if !qkv.is_empty() {
            self.append(0, qkv);
        }
    }

    /// Appends the tokens of `qkv` at `position` and attends from them.
    #[track_caller]
    fn prefill(&self, position: usize, qkv: &[f32]) -> Vec<f32> {
        let len = qkv.len() / self.model.width() * self.model.n_head * self.model.d_head;
        let out = self.device.poisoned(len);
        self.prefill_to(position, qkv, &out, &self.device.none());
        out.to_vec().unwrap()
    }

    #[track_caller]
    fn prefill_to(&self, position: usize, qkv: &[f32], out: &Buffer<f32>, out16: &Buffer<f16>) {
        self.append(position, qkv);
        let n_tokens = qkv.len() / self.model.width();
        let (n, [n_head, _, d_head, ..]) = (n_tokens as u32, self.sizes());
        let narrow = d_head <= 64;
        match &self.caches {
            Caches::F16(k, v) => {
                let kernel = if narrow { attention_prefill_f16_64::run } else { attention_prefill_f16_128::run };
                self.run_prefill(kernel, launch_f16(n, n_head), out, out16, k, v, n);
            }
            Caches::F32(k, v) => {
                let kernel = match d_head {
                    0..=32 => attention_prefill_f32_32::run,
                    33..=64 => attention_prefill_f32_64::run,
                    _ => attention_prefill_f32_128::run,
                };
                self.run_prefill(kernel, launch_f32(n, n_head), out, out16, k, v, n);
            }
        }
    }

    #[track_caller]
    fn run_prefill<E: cuda_std::Element + gpt_gamma::device::Plain>(
        &self,
        kernel: Prefill<E>,
        launch: Launch,
        out: &Buffer<f32>,
        out16: &Buffer<f16>,
        k: &Buffer<E>,
        v: &Buffer<E>,
        n_tokens: u32,
    ) {
        let ([n_head, n_head_kv, d_head, n_slots, window], scale) = (self.sizes(), self.model.scale());
        let (device, qkv) = (self.device.launcher(), self.qkv.slice());
        let (k, v, state, sinks) = (k.slice(), v.slice(), self.state.slice(), self.sinks.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            kernel(
                device,
                launch,
                out.slice(),
                out16.slice(),
                qkv,
                k,
                v,
                state,
                sinks,
                n_tokens,
                n_head,
                n_head_kv,
                d_head,
                n_slots,
                window,
                scale,
            )
        }
        .unwrap();
    }

    #[track_caller]
    fn partial(&self, n_splits: usize) -> std::rc::Rc<Buffer<f32>> {
        let mut buffers = self.partial.borrow_mut();
        if let Some((_, buffer)) = buffers.iter().find(|(of, _)| *of == n_splits) {
            return buffer.clone();
        }
        let len = partial_len(self.model.n_head as u32, self.model.d_head as u32, n_splits as u32);
        let buffer = std::rc::Rc::new(self.device.poisoned(len));
        buffers.push((n_splits, buffer.clone()));
        buffer
    }

    /// The token `qkv` at `position`, by the kernel that has the new key from there.
    #[track_caller]
    fn decode(&self, position: usize, qkv: &[f32], n_splits: usize, on_tensor_cores: bool) -> Vec<f32> {
        let out = self.try_decode(position, qkv, n_splits, on_tensor_cores).unwrap();
        assert!(self.counters.to_vec().unwrap().iter().all(|&n| n == 0), "a counter was left");
        out
    }

    fn try_decode(
        &self,
        position: usize,
        qkv: &[f32],
        n_splits: usize,
        on_tensor_cores: bool,
    ) -> Result<Vec<f32>, LaunchError> {
        self.state.write(0, &[position as u32]).unwrap();
        self.qkv.write(0, qkv).unwrap();
        let [n_head, n_head_kv, d_head, ..] = self.sizes();
        let s = n_splits as u32;
        match &self.caches {
            Caches::F16(k, v) if on_tensor_cores => {
                let kernel = match d_head {
                    0..=64 => attention_token_grouped_f16_64::run,
                    _ => attention_token_grouped_f16_128::run,
                };
                self.run_token(kernel, grouped::launch(n_head, n_head_kv, d_head, s), k, v)
            }
            Caches::F16(k, v) => {
                let kernel = match d_head {
                    0..=32 => attention_token_f16_32::run,
                    33..=64 => attention_token_f16_64::run,
                    _ => attention_token_f16_128::run,
                };
                self.run_token(kernel, single::launch(n_head, s), k, v)
            }
            Caches::F32(k, v) => {
                let kernel = match d_head {
                    0..=32 => attention_token_f32_32::run,
                    33..=64 => attention_token_f32_64::run,
                    _ => attention_token_f32_128::run,
                };
                self.run_token(kernel, single::launch(n_head, s), k, v)
            }
        }
    }

    fn run_token<E: cuda_std::Element + gpt_gamma::device::Plain>(
        &self,
        kernel: Token<E>,
        launch: Launch,
        k: &Buffer<E>,
        v: &Buffer<E>,
    ) -> Result<Vec<f32>, LaunchError> {
        let ([_, n_head_kv, d_head, n_slots, window], scale) = (self.sizes(), self.model.scale());
        let out = self.device.poisoned(self.model.n_head * self.model.d_head);
        let partial = self.partial(launch.grid[1] as usize);
        let (k, v) = (k.slice(), v.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            kernel(
                self.device.launcher(),
                launch,
                out.slice(),
                partial.slice(),
                self.counters.slice(),
                self.qkv.slice(),
                k,
                v,
                k,
                v,
                self.state.slice(),
                self.frequencies.slice(),
                self.sinks.slice(),
                n_head_kv,
                d_head,
                n_slots,
                reciprocal(n_slots),
                window,
                scale,
                self.magnitude,
            )?;
        }
        Ok(out.to_vec().unwrap())
    }

    /// Fills both caches with NaN.
    fn fill_caches(&self) {
        match &self.caches {
            Caches::F16(k, v) => [k, v].map(|cache| cache.fill_bytes(0xff).unwrap()),
            Caches::F32(k, v) => [k, v].map(|cache| cache.fill_bytes(0xff).unwrap()),
        };
    }

    fn caches_to_f32(&self) -> (Vec<f32>, Vec<f32>) {
        match &self.caches {
            Caches::F16(k, v) => {
                let widen = |cache: &Buffer<f16>| cache.to_vec().unwrap().into_iter().map(f16::to_f32).collect();
                (widen(k), widen(v))
            }
            Caches::F32(k, v) => (k.to_vec().unwrap(), v.to_vec().unwrap()),
        }
    }
}
