use super::weights::Matrix;
use gamma_tests::{TestDevice, assert_close, devices, normal, uniform};
use gpt_gamma::device::Buffer;
use gpt_gamma::gguf::TensorType;
use gpt_gamma::weights::Packing;
use half::f16;
use kernels::experts::token::{fits, run_down, run_gate_up};
use kernels::router::{launch, router};

/// f16 activations: each is rounded by 2⁻¹² of itself at most on average, norm-wise 3e-4 for a product, whatever its
/// length; `h` is rounded once more, and the gated unit's slope of up to 8 is met where its value is large too.
const TOLERANCE: f64 = 1e-3;
/// f16 activations that are exact: f32 sums, of which tensor cores may cut some bits.
const EXACT: f64 = 1e-4;
/// The router in f32: sums of some thousand terms, and `ex2.approx`.
const ROUTER: f64 = 1e-4;
const EPSILON: f32 = 1e-5;

#[test]
fn a_token_goes_through_its_experts() {
    for (n_expert, n_used, d_model, d_ff) in [(8, 4, 64, 96), (32, 4, 160, 32), (4, 2, 256, 64), (8, 4, 288, 288)] {
        Layer::new(n_expert, d_model, d_ff).check(n_used, 7, 4);
    }
}

#[test]
fn every_number_of_slots() {
    for n_used in 1..=8 {
        Layer::new(8, 96, 160).check(n_used, 3, 2);
    }
}

#[test]
fn rows_of_one_group_to_several_runs() {
    for width in [32, 64, 96, 128, 160, 256, 544] {
        Layer::new(2, width, 32).check(1, 1, 1);
        Layer::new(4, 32, width).check(3, 1, 1);
    }
}

#[test]
fn tiles_not_a_multiple_of_those_added_up_together() {
    // Of `down` alone: in a layer d_model is a multiple of 32.
    for (n_out, n_blocks) in [(8, 1), (24, 2), (40, 1), (72, 2), (136, 3)] {
        let layer = Layer { d_model: n_out, ..Layer::of(3, 64, 32, 544, n_out) };
        layer.check_down(&[2, 0, 1], n_blocks);
    }
}

#[test]
fn warps_with_several_tiles() {
    // One block: 16 warps share 48 tiles, or two blocks if there are more.
    Layer::new(4, 128, 192).check(2, 1, 1);
    Layer::new(4, 160, 64).check(4, 1, 2);
}

#[test]
fn the_widest_layers_that_fit() {
    assert!(fits(128, 4, 4096, 3072) && fits(32, 6, 64, 2048) && fits(32, 8, 64, 1536) && fits(32, 1, 64, 6144));
    assert!(!fits(32, 4, 4128, 64) && !fits(32, 3, 64, 3104) && !fits(32, 5, 64, 2080) && !fits(32, 7, 64, 1568));
    assert!(!fits(32, 1, 64, 6176));
    assert!(!fits(129, 4, 64, 64) && !fits(32, 9, 64, 64));
    Layer::of(2, 4096, 32, 32, 32).check_gate_up(1, 2, 1);
    Layer::of(8, 32, 32, 1536, 32).check_down(&[7, 6, 5, 4, 3, 2, 1, 0], 1);
    Layer::of(5, 32, 32, 2048, 32).check_down(&[4, 3, 2, 1, 0], 1);
    Layer::of(4, 32, 32, 3072, 32).check_down(&[3, 1, 2, 0], 1);
    Layer::of(1, 32, 32, 6144, 32).check_down(&[0], 1);
}

#[test]
fn experts_are_those_the_router_kernel_chooses() {
    for (n_expert, n_used) in [(4, 4), (31, 3), (32, 4), (33, 5), (128, 8)] {
        // One part with one element, and a mean square of 1: logits are the part and the bias.
        let ties = |e: usize| [0.5, -0.0, 0.0, 2.0, -3.0, 2.0, 0.5][e * 5 % 7];
        let mut logits: Vec<Vec<f32>> = vec![normal(1, n_expert), (0..n_expert).map(ties).collect()];
        let mut nan = normal(2, n_expert);
        nan[n_expert / 2] = f32::NAN;
        logits.push(nan);
        for logits in logits {
            let layer = Layer::of(n_expert, 32, 32, 32, 32);
            let parts = [logits.clone(), vec![32.0]].concat();
            for device in devices() {
                let found = layer.gate_up(&device, n_used, &[1.0; 32], &parts, &[], 0.0, 1);
                let (ids, weights) = route(&device, &logits, n_used);
                assert_eq!(found.chosen, ids);
                if logits.iter().any(|logit| logit.is_nan()) {
                    assert!(found.weights.iter().all(|weight| weight.is_nan()), "{:?}", found.weights);
                } else {
                    assert_eq!(found.weights, weights);
                }
            }
        }
    }
}

#[test]
fn many_parts_of_the_router_are_added() {
    // More than a warp's sixteen at a time; more than threads.
    for n_parts in [192, 193, 400] {
        Layer::new(32, 64, 32).check(4, n_parts, 2);
    }
}

#[test]
fn the_smallest_and_the_largest_scale_of_e8m0_are_kept() {
    for byte in [0, 1, 254] {
        // For 2¹²⁷ activations are tiny, and codes up to 1.5, above which f32 ends. f16 ends at 2⁻²⁴, which h has times 2⁹.
        let mut layer = Layer::new(2, 64, 64);
        for bias in [&mut layer.gate_bias, &mut layer.up_bias, &mut layer.down_bias] {
            bias.fill(0.0);
        }
        for matrix in [&mut layer.gate, &mut layer.up, &mut layer.down] {
            for block in matrix.bytes.chunks_exact_mut(17) {
                block[0] = byte;
                block[1..].iter_mut().for_each(|codes| *codes &= 0xbb);
            }
        }
        let h: Vec<f32> = match byte {
            254 => (0..64).map(|i| if i == 5 { 2f32.powi(-33) } else { 0.0 }).collect(),
            _ => normal(14, 64),
        };
        layer.check_down_of(&[1], &h, &[0.0; 64], 1);
        if byte < 254 {
            let x = layer.x();
            for device in devices() {
                let found = layer.gate_up(&device, 1, &x, &layer.parts(&x, 1), &layer.router_bias, EPSILON, 1);
                assert!(found.h.iter().all(|&h| h == 0.0), "{:?}", found.h);
            }
        }
    }
}

#[test]
fn launches_repeat_to_the_bit_and_down_s_of_any_size() {
    let layer = Layer::new(8, 160, 96);
    let (x, before) = (layer.x(), normal(8, 160));
    let run = |device: &TestDevice, n_blocks: u32| {
        let found = layer.gate_up(device, 4, &x, &layer.parts(&x, 5), &layer.router_bias, EPSILON, 3);
        let out = layer.down(device, &before, &found.h, &found.chosen, &found.weights, n_blocks);
        (found.h, found.chosen, out)
    };
    // Two orders of threads in the emulator, twice the same on a GPU; and tiles dealt out otherwise.
    let found: Vec<_> = devices().iter().flat_map(|device| [1, 3, 132].map(|n_blocks| run(device, n_blocks))).collect();
    let again: Vec<_> = devices().iter().map(|device| run(device, 3)).collect();
    for other in found[1..].iter().chain(&again) {
        assert_eq!(found[0], *other);
    }
}

/// The experts of a layer, and its router.
struct Layer {
    n_expert: usize,
    d_model: usize,
    d_ff: usize,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    gate_bias: Vec<f32>,
    up_bias: Vec<f32>,
    down_bias: Vec<f32>,
    gamma: Vec<f32>,
    router: Vec<f32>,
    router_bias: Vec<f32>,
}

struct Found {
    h: Vec<f32>,
    chosen: Vec<u32>,
    weights: Vec<f32>,
}

impl Layer {
    fn new(n_expert: usize, d_model: usize, d_ff: usize) -> Self {
        Self::of(n_expert, d_model, d_ff, d_ff, d_model)
    }

    /// `gate` and `up` from `d_model` to `d_ff`, `down` from `down_in` to `down_out`.
    fn of(n_expert: usize, d_model: usize, d_ff: usize, down_in: usize, down_out: usize) -> Self {
        // So that products are about 2: some beyond the gated unit's limits, most not.
        let gamma = uniform(11, d_model, 1.0, 3.0).iter().map(|x| x / (d_model as f32).sqrt()).collect();
        Self {
            n_expert,
            d_model,
            d_ff,
            gate: Matrix::random(TensorType::MXFP4, d_model, n_expert * d_ff, 1),
            up: Matrix::random(TensorType::MXFP4, d_model, n_expert * d_ff, 2),
            down: Matrix::random(TensorType::MXFP4, down_in, n_expert * down_out, 3),
            gate_bias: normal(4, n_expert * d_ff),
            up_bias: normal(5, n_expert * d_ff),
            down_bias: normal(6, n_expert * down_out),
            gamma,
            router: normal(12, n_expert * d_model),
            router_bias: normal(13, n_expert),
        }
    }

    fn x(&self) -> Vec<f32> {
        normal(7, self.d_model).iter().map(|x| 3.0 * x).collect()
    }

    /// What the kernel before leaves: the router's sums over each part of x, and the squares'.
    fn parts(&self, x: &[f32], n_parts: usize) -> Vec<f32> {
        let share = |p: usize| (p * x.len() / n_parts, (p + 1) * x.len() / n_parts);
        let mut parts = Vec::new();
        for (start, end) in (0..n_parts).map(share) {
            for e in 0..self.n_expert {
                let row = &self.router[e * self.d_model..];
                let terms = (start..end).map(|i| f64::from(row[i]) * f64::from(self.gamma[i]) * f64::from(x[i]));
                parts.push(terms.sum::<f64>() as f32);
            }
            parts.push(x[start..end].iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() as f32);
        }
        parts
    }

    /// x normed, in f64, and the experts with their weights, best first.
    fn routed(&self, x: &[f32], n_used: usize) -> (Vec<f64>, Vec<u32>, Vec<f64>) {
        let square = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (square + f64::from(EPSILON)).sqrt();
        let n: Vec<f64> =
            x.iter().zip(&self.gamma).map(|(&x, &gamma)| f64::from(x) * scale * f64::from(gamma)).collect();
        let logit = |e: usize| dot(&self.router[e * x.len()..(e + 1) * x.len()], &n) + f64::from(self.router_bias[e]);
        let logits: Vec<f64> = (0..self.n_expert).map(logit).collect();
        let mut chosen: Vec<u32> = (0..self.n_expert as u32).collect();
        chosen.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        chosen.truncate(n_used);
        let powers: Vec<f64> =
            chosen.iter().map(|&e| (logits[e as usize] - logits[chosen[0] as usize]).exp()).collect();
        let sum: f64 = powers.iter().sum();
        (n, chosen, powers.iter().map(|power| power / sum).collect())
    }

    #[track_caller]
    fn check(&self, n_used: usize, n_parts: usize, n_blocks: u32) {
        let chosen = self.check_gate_up(n_used, n_parts, n_blocks);
        self.check_down(&chosen, n_blocks);
    }

    #[track_caller]
    fn check_gate_up(&self, n_used: usize, n_parts: usize, n_blocks: u32) -> Vec<u32> {
        let x = self.x();
        let (n, chosen, weights) = self.routed(&x, n_used);
        let (gate, up) = (self.gate.decoded(), self.up.decoded());
        let row = |w: &[f32], bias: &[f32], row: usize| {
            dot(&w[row * self.d_model..(row + 1) * self.d_model], &n) + f64::from(bias[row])
        };
        let rows = chosen.iter().flat_map(|&e| (0..self.d_ff).map(move |f| e as usize * self.d_ff + f));
        let h: Vec<f64> = rows.map(|r| swiglu(row(&gate, &self.gate_bias, r), row(&up, &self.up_bias, r))).collect();
        for device in devices() {
            let parts = self.parts(&x, n_parts);
            let found = self.gate_up(&device, n_used, &x, &parts, &self.router_bias, EPSILON, n_blocks);
            assert_eq!(found.chosen, chosen);
            assert_close(&found.weights, &weights, ROUTER);
            assert_close(&found.h, &h, TOLERANCE);
        }
        chosen
    }

    #[track_caller]
    fn check_down(&self, chosen: &[u32], n_blocks: u32) {
        // As large as the gated unit makes it, and as small.
        let h: Vec<f32> =
            normal(14, chosen.len() * self.down.n_in).iter().map(|h| (h * h * h).clamp(-1.4, 56.0)).collect();
        self.check_down_of(chosen, &h, &normal(8, self.d_model), n_blocks);
    }

    #[track_caller]
    fn check_down_of(&self, chosen: &[u32], h: &[f32], before: &[f32], n_blocks: u32) {
        let weights = uniform(9, chosen.len(), 0.05, 0.95);
        let (down, d_in) = (self.down.decoded(), self.down.n_in);
        let mut expected: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
        for ((&e, h), &weight) in chosen.iter().zip(h.chunks_exact(d_in)).zip(&weights) {
            let h: Vec<f64> = h.iter().map(|&h| f64::from(f16::from_f32(h * 512.0).to_f32()) / 512.0).collect();
            for (o, out) in expected.iter_mut().enumerate() {
                let row = e as usize * self.d_model + o;
                *out +=
                    f64::from(weight) * (dot(&down[row * d_in..(row + 1) * d_in], &h) + f64::from(self.down_bias[row]));
            }
        }
        for device in devices() {
            assert_close(&self.down(&device, before, h, chosen, &weights, n_blocks), &expected, EXACT);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
    fn gate_up(
        &self,
        device: &TestDevice,
        n_used: usize,
        x: &[f32],
        parts: &[f32],
        router_bias: &[f32],
        epsilon: f32,
        n_blocks: u32,
    ) -> Found {
        let (h, chosen, weights) =
            (device.poisoned(n_used * self.d_ff / 2), device.poisoned(n_used), device.poisoned(n_used));
        let (gate, up) = (upload(device, &self.gate, self.n_expert), upload(device, &self.up, self.n_expert));
        let [gate_bias, up_bias, x, gamma, parts_on_device, router_bias] =
            [&self.gate_bias, &self.up_bias, x, &self.gamma, parts, router_bias].map(|values| device.upload(values));
        let n_parts = parts.len() / (self.n_expert + 1);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            run_gate_up(
                device.launcher(),
                n_blocks,
                h.slice(),
                chosen.slice(),
                weights.slice(),
                gate.slice(),
                up.slice(),
                gate_bias.slice(),
                up_bias.slice(),
                x.slice(),
                gamma.slice(),
                parts_on_device.slice(),
                router_bias.slice(),
                epsilon,
                self.d_model as u32,
                self.d_ff as u32,
                n_parts as u32,
            )
            .unwrap();
        }
        Found {
            h: unpacked(&h.to_vec().unwrap()),
            chosen: chosen.to_vec().unwrap(),
            weights: weights.to_vec().unwrap(),
        }
    }

    fn down(
        &self,
        device: &TestDevice,
        before: &[f32],
        h: &[f32],
        chosen: &[u32],
        weights: &[f32],
        n_blocks: u32,
    ) -> Vec<f32> {
        let (out, weight) = (device.upload(before), upload(device, &self.down, self.n_expert));
        let (bias, h, weights) = (device.upload(&self.down_bias), device.upload(&packed(h)), device.upload(weights));
        let chosen = device.upload(chosen);
        let (d_ff, d_model) = (self.down.n_in as u32, self.d_model as u32);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (h, chosen, weights) = (h.slice(), chosen.slice(), weights.slice());
            let (out, weight, bias) = (out.slice(), weight.slice(), bias.slice());
            run_down(device.launcher(), n_blocks, out, weight, bias, h, chosen, weights, d_ff, d_model).unwrap();
        }
        out.to_vec().unwrap()
    }
}

/// Where a pair of features lies, by its first: word and feature of each pair.
fn pairs(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n / 2).map(|word| (word, word / 16 * 32 + word % 4 * 8 + word % 16 / 4 * 2))
}

/// What the first kernel leaves to the second: pairs of f16 times 2⁹, in the order of B fragments.
fn packed(h: &[f32]) -> Vec<u32> {
    let half = |h: f32| u32::from(f16::from_f32(h * 512.0).to_bits());
    pairs(h.len()).map(|(_, f)| half(h[f]) | half(h[f + 1]) << 16).collect()
}

fn unpacked(words: &[u32]) -> Vec<f32> {
    let mut h = vec![f32::NAN; 2 * words.len()];
    for (word, f) in pairs(h.len()) {
        let halves = [words[word] as u16, (words[word] >> 16) as u16];
        [h[f], h[f + 1]] = halves.map(|bits| f16::from_bits(bits).to_f32() / 512.0);
    }
    h
}

fn dot(w: &[f32], x: &[f64]) -> f64 {
    w.iter().zip(x).map(|(&w, &x)| f64::from(w) * x).sum()
}

fn swiglu(gate: f64, up: f64) -> f64 {
    let (gate, up) = (gate.min(7.0), up.clamp(-7.0, 7.0));
    gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
}

/// Each expert's rows repacked on their own, one expert after the other.
fn upload(device: &TestDevice, matrix: &Matrix, n_expert: usize) -> Buffer<u8> {
    let packing = Packing::new(matrix.ty, matrix.n_in, matrix.n_out / n_expert).unwrap();
    let mut packed = vec![0; n_expert * packing.n_bytes()];
    let sources = matrix.bytes.chunks_exact(matrix.bytes.len() / n_expert);
    for (source, into) in sources.zip(packed.chunks_exact_mut(packing.n_bytes())) {
        packing.repack(source, into);
    }
    device.upload(&packed)
}

/// What the router's own kernel chooses.
fn route(device: &TestDevice, logits: &[f32], n_used: usize) -> (Vec<u32>, Vec<f32>) {
    let (ids, weights) = (device.poisoned(n_used), device.poisoned(n_used));
    let on_device = device.upload(logits);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (launcher, logits, n_expert) = (device.launcher(), on_device.slice(), logits.len() as u32);
        router::run(launcher, launch(1), ids.slice(), weights.slice(), logits, 1, n_expert, n_used as u32).unwrap();
    }
    (ids.to_vec().unwrap(), weights.to_vec().unwrap())
}
