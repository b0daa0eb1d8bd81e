use super::weights::Matrix;
use gamma_tests::{TestDevice, assert_close, devices, normal, relative_error, uniform};
use gpt_gamma::device::Buffer;
use gpt_gamma::gguf::TensorType;
use gpt_gamma::weights::Packing;
use kernels::experts::prefill::{TILE_PAIRS, experts_combine, launch_combine};
use kernels::experts::sort::{self, TILE_QUANTUM, TILE_WORDS, experts_sort, n_tiles};
use kernels::experts::{decode, grouped, prefill};
use kernels::format::WeightFormat;

/// f32 sums of 8 or 16 lanes: up to 32 roundings of 2⁻²⁴ in each, 2e-6, which the gated unit's slope of up to 8 brings to at
/// most 1.6e-5 where it is steepest and averages out elsewhere.
const DECODE: f64 = 1e-5;
/// f16 inputs: each of two factors is rounded by 2⁻¹² of its group's largest at most, norm-wise 3e-4 for a product; `h` is
/// rounded once more for the second.
const PREFILL: f64 = 1e-3;

// ---- one token ----

#[test]
fn a_token_goes_through_its_experts() {
    for (n_expert, d_model, d_ff) in [(8, 64, 96), (32, 96, 64), (8, 256, 32)] {
        let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, n_expert, d_model, d_ff);
        check_decode(&layer, &[3, 0, (n_expert - 1) as u32, 5]);
    }
}

#[test]
fn every_type_decodes() {
    for &ty in TensorType::SUPPORTED {
        let layer = Layer::new(ty, ty, 3, 256, 256);
        check_decode(&layer, &[2, 0]);
    }
}

#[test]
fn slots_not_a_multiple_of_a_batch() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::Q8_0, 8, 64, 64);
    for ids in [&[7][..], &[7, 1, 2], &[4, 3, 2, 1, 0], &[0, 1, 2, 3, 4, 5, 6, 7]] {
        check_decode(&layer, ids);
    }
    let layer = Layer::new(TensorType::Q5_0, TensorType::MXFP4, 8, 64, 64);
    for ids in [&[7][..], &[7, 1, 2], &[4, 3, 2, 1, 0], &[0, 1, 2, 3, 4, 5, 6, 7]] {
        check_decode(&layer, ids);
    }
}

#[test]
fn rows_one_off_a_block() {
    // 32 features a block for MXFP4, 16 rows a block on the way down.
    for (d_model, d_ff) in [(32, 32), (64, 64), (96, 160)] {
        let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 2, d_model, d_ff);
        check_decode(&layer, &[1, 0]);
    }
    let layer = Layer::new(TensorType::F16, TensorType::F32, 2, 32, 32);
    check_decode(&layer, &[1]);
}

#[test]
fn activations_longer_than_shared_memory_come_in_parts() {
    // 4096 elements at a time one way, 1024 of each of four slots the other.
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 4, 4096 + 96, 32);
    check_decode(&layer, &[2, 1]);
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 4, 32, 1024 + 96);
    check_decode(&layer, &[2, 1, 0, 3]);
}

// ---- many tokens ----

#[test]
fn tokens_around_a_tile_go_through_their_experts() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 8, 64, 96);
    for n_tokens in [1, 2, 17, 65] {
        check_prefill(&layer, &spread(n_tokens, 8, 4), 4);
    }
}

#[test]
fn thirty_two_experts() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 32, 96, 64);
    check_prefill(&layer, &spread(17, 32, 4), 4);
}

#[test]
fn widths_of_several_blocks() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 4, 256, 160);
    check_prefill(&layer, &spread(9, 4, 2), 2);
}

#[test]
fn every_type_multiplies_for_many_tokens() {
    for &ty in TensorType::SUPPORTED {
        let layer = Layer::new(ty, ty, 2, 256, 256);
        check_prefill(&layer, &[1, 0, 1], 1);
    }
}

#[test]
fn all_tokens_on_one_expert_and_none_on_the_others() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::Q8_0, 8, 64, 64);
    for expert in [0, 5, 7] {
        check_prefill(&layer, &[expert; 65], 1);
        check_prefill(&layer, &[expert; 64], 1);
    }
}

#[test]
fn prefill_and_decode_agree() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 8, 64, 96);
    let (ids, n_used) = (spread(3, 8, 4), 4);
    let (x, before, weights) = (layer.x(3), normal(8, 3 * 64), layer.slot_weights(ids.len()));
    for device in devices() {
        let together = layer.upload(&device).prefill(&x, &before, &ids, &weights, n_used).out;
        let mut alone = Vec::new();
        for t in 0..3 {
            let slots = t * n_used..(t + 1) * n_used;
            let (x, before) = (&x[t * 64..(t + 1) * 64], &before[t * 64..(t + 1) * 64]);
            alone.extend(layer.upload(&device).decode(x, before, &ids[slots.clone()], &weights[slots]).1);
        }
        let alone: Vec<f64> = alone.into_iter().map(f64::from).collect();
        assert_close(&together, &alone, PREFILL);
    }
}

// ---- hostile values ----

#[test]
fn the_smallest_scales_of_e8m0_are_kept() {
    // 2⁻¹²⁷ and 2⁻¹²⁶ for every block; without biases the gated unit is all but linear for what 2¹⁰⁰ makes of them.
    for byte in [0, 1] {
        let mut layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 4, 64, 64);
        layer.gate_bias.fill(0.0);
        layer.up_bias.fill(0.0);
        for block in layer.gate.bytes.chunks_exact_mut(17).chain(layer.up.bytes.chunks_exact_mut(17)) {
            block[0] = byte;
        }
        let (ids, x) = ([1, 0, 2, 1], layer.x(2).iter().map(|x| x * 2f32.powi(100)).collect::<Vec<_>>());
        let h: Vec<f64> = layer.reference(&x, &ids, 2).into_iter().flat_map(|pair| pair.h).collect();
        assert!(h.iter().any(|h| h.abs() > 1e-9) && h.iter().all(|h| h.abs() < 1e-6), "{h:?}");
        for device in devices() {
            let on_device = layer.upload(&device);
            let (found, _) = on_device.decode(&x[..64], &[0.0; 64], &ids[..2], &[0.5, 0.5]);
            assert_close(&found, &h[..2 * 64], DECODE);
            let found = on_device.prefill(&x, &[0.0; 128], &ids, &[0.5; 4], 2);
            assert_close(&found.h_by_pair(64), &h, PREFILL);
        }
    }
}

#[test]
fn the_largest_scale_of_e8m0_is_kept() {
    // 2¹²⁷ for every block, and codes up to 1.5, above which f32 ends; one activation a block, since sums of more end too.
    let mut layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 4, 64, 64);
    layer.down_bias.fill(0.0);
    for block in layer.down.bytes.chunks_exact_mut(17) {
        block[0] = 254;
        block[1..].iter_mut().for_each(|codes| *codes &= 0xbb);
    }
    let down = layer.down.decoded();
    let mut h = vec![0.0; 64];
    (h[5], h[47]) = (2f32.powi(-100), -(2f32.powi(-101)));
    for expert in 0..4 {
        let row = |o: usize| &down[(expert * 64 + o) * 64..][..64];
        let y: Vec<f64> =
            (0..64).map(|o| row(o).iter().zip(&h).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum()).collect();
        assert!(y.iter().all(|y| y.is_finite()) && y.iter().any(|y| y.abs() > 1e8), "{y:?}");
        for device in devices() {
            let on_device = layer.upload(&device);
            let (ids, h) = (device.upload(&[expert as u32]), device.upload(&h));
            // Powers of two: exact but for the sum.
            assert_close(&on_device.decode_down(&h, &[0.0; 64], &ids, &[1.0]), &y, DECODE);
            let (pairs, tiles) = run_sort(&device, &[expert as u32], 4, TILE_PAIRS);
            assert_close(&on_device.prefill_down(&h, &pairs, &tiles).to_vec().unwrap(), &y, DECODE);
        }
    }
}

#[test]
fn a_nan_stays_with_its_token() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 4, 64, 64);
    let (mut x, ids) = (layer.x(5), spread(5, 4, 2));
    x[2 * 64 + 9] = f32::NAN;
    for device in devices() {
        let found = layer.upload(&device).prefill(&x, &normal(1, 5 * 64), &ids, &[0.5; 10], 2);
        for (i, x) in found.out.iter().enumerate() {
            assert_eq!(x.is_nan(), i / 64 == 2, "element {i}");
        }
    }
}

#[test]
fn a_wrong_expert_or_slot_weight_would_be_seen() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 8, 64, 96);
    let (x, weights) = (layer.x(1), layer.slot_weights(4));
    let expected = layer.outputs(&x, &[0.0; 64], &[3, 0, 7, 5], &weights, 4);
    let swapped = [weights[1], weights[0], weights[2], weights[3]];
    for device in devices() {
        let on_device = layer.upload(&device);
        let (_, found) = on_device.decode(&x, &[0.0; 64], &[3, 0, 7, 4], &weights);
        assert!(relative_error(&found, &expected) > 10.0 * PREFILL);
        let (_, found) = on_device.decode(&x, &[0.0; 64], &[3, 0, 7, 5], &swapped);
        assert!(relative_error(&found, &expected) > 10.0 * PREFILL);
    }
}

#[test]
fn launches_repeat_to_the_bit() {
    let layer = Layer::new(TensorType::MXFP4, TensorType::MXFP4, 8, 64, 64);
    let (x, ids) = (layer.x(17), spread(17, 8, 4));
    let (before, weights) = (normal(8, 17 * 64), layer.slot_weights(ids.len()));
    let run = |device: &TestDevice| {
        let on_device = layer.upload(device);
        let (h, out) = on_device.decode(&x[..64], &before[..64], &ids[..4], &weights[..4]);
        (h, out, on_device.prefill(&x, &before, &ids, &weights, 4).out)
    };
    // Two orders of threads in the emulator, twice the same on a GPU.
    let found: Vec<_> = devices().iter().chain(&devices()).map(run).collect();
    for other in &found[1..] {
        assert_eq!(found[0], *other);
    }
}

// ---- sorting ----

#[test]
fn pairs_are_sorted_by_expert_and_token() {
    for (n_tokens, n_expert, n_used) in
        [(1, 4, 4), (2, 8, 4), (16, 8, 4), (17, 32, 4), (65, 32, 4), (1300, 32, 4), (300, 128, 8)]
    {
        check_sort(&spread(n_tokens, n_expert, n_used), n_expert);
    }
}

#[test]
fn experts_without_pairs_and_with_whole_tiles() {
    for n in [1, 63, 64, 65, 127, 128, 129, 2048, 2049] {
        for expert in [0, 3, 7] {
            check_sort(&vec![expert; n], 8);
        }
    }
    // Whole tiles, one more and one less, side by side.
    let ids: Vec<u32> = [64, 0, 65, 63, 128, 1].iter().enumerate().flat_map(|(e, &n)| vec![e as u32; n]).collect();
    check_sort(&ids, 6);
    let mut reversed = ids;
    reversed.reverse();
    check_sort(&reversed, 6);
}

#[track_caller]
fn check_sort(ids: &[u32], n_expert: usize) {
    let mut expected: Vec<u32> = (0..ids.len() as u32).collect();
    expected.sort_by_key(|&pair| ids[pair as usize]);
    for (device, tile_pairs) in
        devices().iter().flat_map(|device| [TILE_PAIRS, grouped::TILE_PAIRS].map(|n| (device, n)))
    {
        let (pairs, tiles) = run_sort(device, ids, n_expert, tile_pairs);
        assert_eq!(pairs.to_vec().unwrap(), expected);
        let mut n_tiles = vec![0; n_expert];
        // The tiles cover each place once, in order, with its expert.
        let mut next = 0;
        for tile in tiles.to_vec().unwrap().chunks(TILE_WORDS as usize).filter(|tile| tile[2] > 0) {
            let (expert, first, count) = (tile[0], tile[1], tile[2]);
            assert_eq!(first, next, "{tile:?}");
            assert!(count <= tile_pairs, "{tile:?}");
            n_tiles[expert as usize] += 1;
            for place in first..first + count {
                assert_eq!(ids[expected[place as usize] as usize], expert, "{tile:?}");
            }
            next += count;
            let ends = next as usize == ids.len() || ids[expected[next as usize] as usize] != expert;
            assert!(ends || count.is_multiple_of(TILE_QUANTUM), "{tile:?}");
        }
        assert_eq!(next as usize, ids.len());
        for (expert, n_tiles) in n_tiles.into_iter().enumerate() {
            let n_pairs = ids.iter().filter(|&&id| id as usize == expert).count();
            assert_eq!(n_tiles, n_pairs.div_ceil(tile_pairs as usize), "expert {expert}");
        }
    }
}

pub fn run_sort(device: &TestDevice, ids: &[u32], n_expert: usize, tile_pairs: u32) -> (Buffer<u32>, Buffer<u32>) {
    let pairs = device.poisoned(ids.len());
    let tiles = device.poisoned((n_tiles(ids.len() as u32, n_expert as u32, tile_pairs) * TILE_WORDS) as usize);
    let (ids, launch) = (device.upload(ids), sort::launch(n_expert as u32));
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        experts_sort::run(device.launcher(), launch, pairs.slice(), tiles.slice(), ids.slice(), tile_pairs).unwrap()
    };
    (pairs, tiles)
}

/// Choices of `n_used` different experts a token, some chosen more often than others.
pub fn spread(n_tokens: usize, n_expert: usize, n_used: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    for t in 0..n_tokens {
        let scores = uniform(t as u64 + 1, n_expert, 0.0, 1.0);
        let mut experts: Vec<u32> = (0..n_expert as u32).collect();
        experts.sort_by(|&a, &b| {
            let score = |e: u32| scores[e as usize] + e as f32 / n_expert as f32;
            score(b).total_cmp(&score(a))
        });
        ids.extend(&experts[..n_used]);
    }
    ids
}

// ---- the model of a layer ----

/// The experts of a layer, with biases.
pub struct Layer {
    pub n_expert: usize,
    pub d_model: usize,
    pub d_ff: usize,
    /// All experts' rows, one expert after the other, as in a file.
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    pub gate_bias: Vec<f32>,
    pub up_bias: Vec<f32>,
    pub down_bias: Vec<f32>,
}

/// What one expert makes of one token.
pub struct Pair {
    pub h: Vec<f64>,
    pub y: Vec<f64>,
}

impl Layer {
    pub fn new(ty: TensorType, down: TensorType, n_expert: usize, d_model: usize, d_ff: usize) -> Self {
        Self {
            n_expert,
            d_model,
            d_ff,
            gate: Matrix::random(ty, d_model, n_expert * d_ff, 1),
            up: Matrix::random(ty, d_model, n_expert * d_ff, 2),
            down: Matrix::random(down, d_ff, n_expert * d_model, 3),
            gate_bias: normal(4, n_expert * d_ff),
            up_bias: normal(5, n_expert * d_ff),
            down_bias: normal(6, n_expert * d_model),
        }
    }

    /// Activations for which the first products are about 2, so that some are beyond the gated unit's limits and most not.
    pub fn x(&self, n_tokens: usize) -> Vec<f32> {
        let scale = 2.0 / (self.d_model as f32).sqrt();
        normal(7, n_tokens * self.d_model).iter().map(|x| x * scale).collect()
    }

    pub fn slot_weights(&self, n_pairs: usize) -> Vec<f32> {
        uniform(9, n_pairs, 0.05, 0.95)
    }

    /// h and y of every pair, in f64.
    pub fn reference(&self, x: &[f32], ids: &[u32], n_used: usize) -> Vec<Pair> {
        let (gate, up, down) = (self.gate.decoded(), self.up.decoded(), self.down.decoded());
        let (d_model, d_ff) = (self.d_model, self.d_ff);
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * x).sum::<f64>();
        let of = |(pair, &expert): (usize, &u32)| {
            let (x, expert) = (&x[pair / n_used * d_model..][..d_model], expert as usize);
            let row = |w: &[f32], bias: &[f32], n_out: usize, x: &[f64], o: usize| {
                let row = expert * n_out + o;
                dot(&w[row * x.len()..(row + 1) * x.len()], x) + f64::from(bias[row])
            };
            let h: Vec<f64> = (0..d_ff)
                .map(|f| swiglu(row(&gate, &self.gate_bias, d_ff, x, f), row(&up, &self.up_bias, d_ff, x, f)))
                .collect();
            let y = (0..d_model).map(|o| row(&down, &self.down_bias, d_model, &h, o)).collect();
            Pair { h, y }
        };
        ids.iter().enumerate().map(of).collect()
    }

    /// before + Σ weight · y, in f64.
    pub fn outputs(&self, x: &[f32], before: &[f32], ids: &[u32], weights: &[f32], n_used: usize) -> Vec<f64> {
        let mut out: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
        for (p, pair) in self.reference(x, ids, n_used).iter().enumerate() {
            for (o, y) in pair.y.iter().enumerate() {
                out[p / n_used * self.d_model + o] += f64::from(weights[p]) * y;
            }
        }
        out
    }

    fn upload<'a>(&'a self, device: &'a TestDevice) -> OnDevice<'a> {
        OnDevice {
            layer: self,
            device,
            gate: upload(device, &self.gate, self.n_expert),
            up: upload(device, &self.up, self.n_expert),
            down: upload(device, &self.down, self.n_expert),
            gate_bias: device.upload(&self.gate_bias),
            up_bias: device.upload(&self.up_bias),
            down_bias: device.upload(&self.down_bias),
        }
    }
}

fn swiglu(gate: f64, up: f64) -> f64 {
    let (gate, up) = (gate.min(7.0), up.clamp(-7.0, 7.0));
    gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
}

/// Each expert's rows repacked on their own, one expert after the other.
pub fn upload(device: &TestDevice, matrix: &Matrix, n_expert: usize) -> Buffer<u8> {
    let packing = Packing::new(matrix.ty, matrix.n_in, matrix.n_out / n_expert).unwrap();
    let mut packed = vec![0; n_expert * packing.n_bytes()];
    let sources = matrix.bytes.chunks_exact(matrix.bytes.len() / n_expert);
    for (source, into) in sources.zip(packed.chunks_exact_mut(packing.n_bytes())) {
        packing.repack(source, into);
    }
    device.upload(&packed)
}

/// A layer in a device's memory.
struct OnDevice<'a> {
    layer: &'a Layer,
    device: &'a TestDevice,
    gate: Buffer<u8>,
    up: Buffer<u8>,
    down: Buffer<u8>,
    gate_bias: Buffer<f32>,
    up_bias: Buffer<f32>,
    down_bias: Buffer<f32>,
}

/// What prefill leaves behind.
struct Prefilled {
    pairs: Vec<u32>,
    /// By place in the sorted list.
    h: Vec<f32>,
    out: Vec<f32>,
}

impl Prefilled {
    fn h_by_pair(&self, d_ff: usize) -> Vec<f32> {
        let mut by_pair = vec![f32::NAN; self.h.len()];
        for (place, &pair) in self.pairs.iter().enumerate() {
            let pair = pair as usize;
            by_pair[pair * d_ff..(pair + 1) * d_ff].copy_from_slice(&self.h[place * d_ff..(place + 1) * d_ff]);
        }
        by_pair
    }
}

impl OnDevice<'_> {
    fn formats(&self) -> [WeightFormat; 2] {
        [self.layer.gate.format(), self.layer.down.format()]
    }

    /// h and out of one token.
    fn decode(&self, x: &[f32], before: &[f32], ids: &[u32], weights: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (device, (d_model, d_ff)) = (self.device, (self.layer.d_model as u32, self.layer.d_ff as u32));
        let h = device.poisoned(ids.len() * self.layer.d_ff);
        let (x, ids) = (device.upload(x), device.upload(ids));
        let (gate, up, gate_bias, up_bias) =
            (self.gate.slice(), self.up.slice(), self.gate_bias.slice(), self.up_bias.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (format, launcher, x, ids) = (self.formats()[0], device.launcher(), x.slice(), ids.slice());
            decode::run_gate_up(format, launcher, h.slice(), gate, up, gate_bias, up_bias, x, ids, d_model, d_ff)
                .unwrap();
        }
        let out = self.decode_down(&h, before, &ids, weights);
        (h.to_vec().unwrap(), out)
    }

    fn decode_down(&self, h: &Buffer<f32>, before: &[f32], ids: &Buffer<u32>, weights: &[f32]) -> Vec<f32> {
        let (device, (d_model, d_ff)) = (self.device, (self.layer.d_model as u32, self.layer.d_ff as u32));
        let (out, weights) = (device.upload(before), device.upload(weights));
        let (weight, bias) = (self.down.slice(), self.down_bias.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (format, launcher) = (self.formats()[1], device.launcher());
            let (h, ids, weights) = (h.slice(), ids.slice(), weights.slice());
            decode::run_down(format, launcher, out.slice(), weight, bias, h, ids, weights, d_ff, d_model).unwrap();
        }
        out.to_vec().unwrap()
    }

    fn prefill(&self, x: &[f32], before: &[f32], ids: &[u32], weights: &[f32], n_used: usize) -> Prefilled {
        let (device, layer) = (self.device, self.layer);
        let (d_model, d_ff, n_expert) = (layer.d_model as u32, layer.d_ff as u32, layer.n_expert as u32);
        let n_used = n_used as u32;
        let (pairs, tiles) = run_sort(device, ids, layer.n_expert, TILE_PAIRS);
        let h = device.poisoned(ids.len() * layer.d_ff);
        let (x, out, weights) = (device.upload(x), device.upload(before), device.upload(weights));
        let (gate, up, gate_bias, up_bias) =
            (self.gate.slice(), self.up.slice(), self.gate_bias.slice(), self.up_bias.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (format, launcher, h, x) = (self.formats()[0], device.launcher(), h.slice(), x.slice());
            let (p, t) = (pairs.slice(), tiles.slice());
            prefill::run_gate_up(
                format, launcher, h, gate, up, gate_bias, up_bias, x, p, t, n_expert, n_used, d_model, d_ff,
            )
            .unwrap();
        }
        let y = self.prefill_down(&h, &pairs, &tiles);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let launch = launch_combine(ids.len() as u32 / n_used, d_model);
            experts_combine::run(device.launcher(), launch, out.slice(), y.slice(), weights.slice(), n_used, d_model)
                .unwrap();
        }
        Prefilled { pairs: pairs.to_vec().unwrap(), h: h.to_vec().unwrap(), out: out.to_vec().unwrap() }
    }

    fn prefill_down(&self, h: &Buffer<f32>, pairs: &Buffer<u32>, tiles: &Buffer<u32>) -> Buffer<f32> {
        let (device, layer) = (self.device, self.layer);
        let (d_model, d_ff, n_expert) = (layer.d_model as u32, layer.d_ff as u32, layer.n_expert as u32);
        let y = device.poisoned(pairs.len() * layer.d_model);
        let (weight, bias) = (self.down.slice(), self.down_bias.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (format, launcher, h) = (self.formats()[1], device.launcher(), h.slice());
            let (p, t) = (pairs.slice(), tiles.slice());
            prefill::run_down(format, launcher, y.slice(), weight, bias, h, p, t, n_expert, d_ff, d_model).unwrap();
        }
        y
    }
}

#[track_caller]
fn check_decode(layer: &Layer, ids: &[u32]) {
    let (x, before, weights) = (layer.x(1), normal(8, layer.d_model), layer.slot_weights(ids.len()));
    let expected_h: Vec<f64> = layer.reference(&x, ids, ids.len()).into_iter().flat_map(|pair| pair.h).collect();
    let expected = layer.outputs(&x, &before, ids, &weights, ids.len());
    for device in devices() {
        let (h, out) = layer.upload(&device).decode(&x, &before, ids, &weights);
        assert_close(&h, &expected_h, DECODE);
        assert_close(&out, &expected, DECODE);
    }
}

#[track_caller]
fn check_prefill(layer: &Layer, ids: &[u32], n_used: usize) {
    let n_tokens = ids.len() / n_used;
    let (x, before, weights) = (layer.x(n_tokens), normal(8, n_tokens * layer.d_model), layer.slot_weights(ids.len()));
    let expected_h: Vec<f64> = layer.reference(&x, ids, n_used).into_iter().flat_map(|pair| pair.h).collect();
    let expected = layer.outputs(&x, &before, ids, &weights, n_used);
    for device in devices() {
        let found = layer.upload(&device).prefill(&x, &before, ids, &weights, n_used);
        assert_close(&found.h_by_pair(layer.d_ff), &expected_h, PREFILL);
        assert_close(&found.out, &expected, PREFILL);
    }
}
