use super::experts::{Layer, run_sort, spread, upload};
use gamma_tests::{TestDevice, assert_close, devices, normal, relative_error, uniform};
use gpt_gamma::device::Buffer;
use gpt_gamma::device::ops::{self, ExpertsMatrix, ExpertsRowsWork, expert_tiles_len, experts_rows_take};
use gpt_gamma::gguf::TensorType;
use half::f16;
use kernels::experts::grouped::{self, MAX_IN};
use kernels::experts::warpgroups;
use kernels::format::WeightFormat;

/// Weights and activations are exact; `h` is rounded to f16, by 2⁻¹¹ of itself at most, and what comes of it inherits that.
const ROUNDED_H: f64 = 1.0 / 2048.0;
/// f32 sums of a few hundred terms: each addition rounds by 2⁻²⁴ of the sum so far.
const SUMS: f64 = 1e-5;

fn layer(n_expert: usize, d_model: usize, d_ff: usize) -> Layer {
    Layer::new(TensorType::MXFP4, TensorType::MXFP4, n_expert, d_model, d_ff)
}

#[test]
fn every_width_of_tile() {
    let layer = layer(3, 160, 64);
    for n_pairs in [1, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 96, 97, 112, 113, 128, 129, 144, 145, 160, 161] {
        check(&layer, &vec![1; n_pairs], 1);
    }
}

#[test]
fn tokens_go_through_several_experts() {
    check(&layer(8, 64, 96), &spread(21, 8, 4), 4);
    check(&layer(32, 96, 64), &spread(9, 32, 4), 4);
}

#[test]
fn rows_of_whole_and_partial_steps() {
    // Steps are 128 elements, runs of the packed weights as well; the last has one, two or three groups of 32.
    for (d_model, d_ff) in [(32, 32), (64, 32), (96, 160), (128, 96), (224, 192), (1056, 64)] {
        check(&layer(2, d_model, d_ff), &spread(3, 2, 1), 1);
    }
}

#[test]
fn rows_of_the_longest_kind() {
    assert!(experts_rows_take(WeightFormat::Mxfp4, WeightFormat::Mxfp4, MAX_IN as usize, MAX_IN as usize));
    assert!(!experts_rows_take(WeightFormat::Mxfp4, WeightFormat::Mxfp4, MAX_IN as usize + 32, 32));
    assert!(!experts_rows_take(WeightFormat::Mxfp4, WeightFormat::Q8_0, 32, 32));
    check(&layer(2, MAX_IN as usize, 64), &[1, 0], 1);
}

#[test]
fn features_of_several_blocks_and_a_half() {
    // 64 features a block one way, 128 rows the other; twice as many by warpgroups.
    check(&layer(2, 160, 96), &spread(5, 2, 1), 1);
    check(&layer(2, 288, 160), &spread(5, 2, 1), 1);
}

#[test]
fn factors_of_rows_are_multiplied_back() {
    let layer = layer(4, 64, 64);
    let (x, ids) = (halves(&layer.x(5)), spread(5, 4, 2));
    let factors = [1.0, 0.5, 4.0, 2.0, 0.25];
    let scaled: Vec<f32> = x.iter().enumerate().map(|(i, x)| x.to_f32() * factors[i / 64]).collect();
    let expected: Vec<f64> = layer.reference(&scaled, &ids, 2).into_iter().flat_map(|pair| pair.h).collect();
    for (device, kernels) in devices_and_kernels() {
        let (h, pairs) = OnDevice::new(&layer, &device, kernels).gate_up(&x, Some(&factors), &ids, 2);
        assert_close(&by_pair(&h, &pairs, 64), &expected, ROUNDED_H);
    }
}

#[test]
fn a_wrong_expert_or_token_would_be_seen() {
    let layer = layer(4, 64, 64);
    let (x, ids) = (halves(&layer.x(3)), [3, 0, 2]);
    let expected: Vec<f64> = layer.reference(&singles(&x), &ids, 1).into_iter().flat_map(|pair| pair.h).collect();
    for (device, kernels) in devices_and_kernels() {
        let on_device = OnDevice::new(&layer, &device, kernels);
        let (h, pairs) = on_device.gate_up(&x, None, &[3, 1, 2], 1);
        assert!(relative_error(&by_pair(&h, &pairs, 64), &expected) > 100.0 * ROUNDED_H);
        let shifted = [&x[64..], &x[..64]].concat();
        let (h, pairs) = on_device.gate_up(&shifted, None, &ids, 1);
        assert!(relative_error(&by_pair(&h, &pairs, 64), &expected) > 100.0 * ROUNDED_H);
    }
}

// ---- scales ----

#[test]
fn weights_are_exact_over_24_powers_of_two() {
    // One activation is 1, the others 0: a row's product is one of its weights.
    let mut layer = layer(2, 64, 160);
    layer.down_bias.fill(0.0);
    let n_groups = 160 / 32;
    for (i, block) in layer.down.bytes.chunks_exact_mut(17).enumerate() {
        block[0] = [100, 76, 99, 80, 88][i % n_groups];
    }
    let down = layer.down.decoded();
    for column in [3, 32, 47, 63, 70, 100, 159] {
        let mut h = vec![f16::ZERO; 2 * 160];
        h[column] = f16::ONE;
        h[160 + column] = f16::ONE;
        let expected: Vec<f32> = (0..2 * 64).map(|row| down[row * 160 + column]).collect();
        assert!(expected.iter().any(|w| *w != 0.0));
        for (device, kernels) in devices_and_kernels() {
            assert_eq!(OnDevice::new(&layer, &device, kernels).down(&h, &[0, 1]), expected, "column {column}");
        }
    }
}

#[test]
fn all_scales_of_e8m0_are_kept() {
    // The same scale for all blocks, and codes up to 1.5, above which f32 ends; the activation brings products into range.
    let mut layer = layer(2, 64, 32);
    layer.down_bias.fill(0.0);
    for scale in [0, 1, 2, 30, 127, 253, 254] {
        for block in layer.down.bytes.chunks_exact_mut(17) {
            block[0] = scale;
            block[1..].iter_mut().for_each(|codes| *codes &= 0xbb);
        }
        let down = layer.down.decoded();
        let mut h = vec![f16::ZERO; 2 * 32];
        let one = f16::from_f32(if scale < 127 { 32768.0 } else { 1.0 / 64.0 });
        (h[5], h[32 + 5]) = (one, one);
        let expected: Vec<f32> = (0..2 * 64).map(|row| down[row * 32 + 5] * one.to_f32()).collect();
        for (device, kernels) in devices_and_kernels() {
            assert_eq!(OnDevice::new(&layer, &device, kernels).down(&h, &[0, 1]), expected, "scale {scale}");
        }
    }
}

#[test]
fn scales_of_one_row_do_not_touch_another() {
    // Rows of three blocks: their scales begin anywhere in a word. Every other row is 2⁵⁰ times the size of its neighbours.
    let mut layer = layer(2, 96, 96);
    layer.down_bias.fill(0.0);
    for (i, block) in layer.down.bytes.chunks_exact_mut(17).enumerate() {
        block[0] = if i / 3 % 2 == 0 { 90 } else { 140 };
    }
    let h = halves(&normal(3, 2 * 96));
    let down = layer.down.decoded();
    let dot = |row: usize| -> f64 {
        let h = &h[row / 96 * 96..][..96];
        down[row * 96..(row + 1) * 96].iter().zip(h).map(|(&w, h)| f64::from(w) * h.to_f64()).sum()
    };
    for (device, kernels) in devices_and_kernels() {
        let found = OnDevice::new(&layer, &device, kernels).down(&h, &[0, 1]);
        for parity in [0, 1] {
            let rows: Vec<usize> = (0..2 * 96).filter(|row| row % 2 == parity).collect();
            let expected: Vec<f64> = rows.iter().map(|&row| dot(row)).collect();
            let found: Vec<f32> = rows.iter().map(|&row| found[row]).collect();
            assert_close(&found, &expected, SUMS);
        }
    }
}

#[test]
fn a_nan_stays_with_its_token() {
    let layer = layer(4, 64, 64);
    let (mut x, ids) = (halves(&layer.x(5)), spread(5, 4, 2));
    x[2 * 64 + 9] = f16::NAN;
    for (device, kernels) in devices_and_kernels() {
        let found = OnDevice::new(&layer, &device, kernels).all(&x, &normal(1, 5 * 64), &ids, &[0.5; 10], 2);
        for (i, x) in found.iter().enumerate() {
            assert_eq!(x.is_nan(), i / 64 == 2, "element {i}");
        }
    }
}

#[test]
fn launches_repeat_to_the_bit() {
    let layer = layer(8, 64, 64);
    let (x, ids) = (halves(&layer.x(17)), spread(17, 8, 4));
    let (before, weights) = (normal(8, 17 * 64), uniform(9, ids.len(), 0.05, 0.95));
    // Two orders of threads in the emulator, twice the same on a GPU.
    let twice = || devices_and_kernels().into_iter().chain(devices_and_kernels());
    for which in [Kernels::Warps, Kernels::Warpgroups] {
        let of_kind = twice().filter(|(_, kernels)| *kernels == which);
        let run = |(device, kernels): (TestDevice, Kernels)| {
            OnDevice::new(&layer, &device, kernels).all(&x, &before, &ids, &weights, 4)
        };
        let found: Vec<_> = of_kind.map(run).collect();
        for other in found.iter().skip(1) {
            assert_eq!(found[0], *other, "{which:?}");
        }
    }
}

#[test]
fn long_rows_repeat_to_the_bit_at_every_width() {
    // What is read or written while products are under way shows as noise: rows of several whole steps and a rest.
    for (d_model, d_ff) in [(608, 32), (32, 608)] {
        let layer = layer(1, d_model, d_ff);
        for n_pairs in [16, 32, 48, 64, 80, 96, 112, 128, 144, 160] {
            let x = halves(&layer.x(n_pairs));
            let (before, weights) = (normal(8, n_pairs * d_model), vec![0.5; n_pairs]);
            for (device, kernels) in devices_and_kernels() {
                let on_device = OnDevice::new(&layer, &device, kernels);
                let run = || on_device.all(&x, &before, &vec![0; n_pairs], &weights, 1);
                let first = run();
                for _ in 0..if device.is_gpu() { 20 } else { 1 } {
                    assert_eq!(run(), first, "{n_pairs} pairs, {kernels:?}");
                }
            }
        }
    }
}

// ---- a layer in a device's memory ----

/// Which kernels: the one's twin is the other.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kernels {
    Warps,
    Warpgroups,
}

impl Kernels {
    fn tile_pairs(self) -> u32 {
        match self {
            Self::Warps => grouped::TILE_PAIRS,
            Self::Warpgroups => warpgroups::TILE_PAIRS,
        }
    }
}

/// The devices, and what is to be tested on each.
fn devices_and_kernels() -> Vec<(TestDevice, Kernels)> {
    let of = |device: &TestDevice| match device.has_warpgroups() {
        true => vec![Kernels::Warps, Kernels::Warpgroups],
        false => vec![Kernels::Warps],
    };
    devices().into_iter().flat_map(|device| of(&device).into_iter().map(move |which| (device.clone(), which))).collect()
}

struct OnDevice<'a> {
    layer: &'a Layer,
    device: &'a TestDevice,
    kernels: Kernels,
    packed: [Buffer<u8>; 3],
    biases: [Buffer<f32>; 3],
}

impl<'a> OnDevice<'a> {
    fn new(layer: &'a Layer, device: &'a TestDevice, kernels: Kernels) -> Self {
        let packed = [&layer.gate, &layer.up, &layer.down].map(|matrix| upload(device, matrix, layer.n_expert));
        let biases = [&layer.gate_bias, &layer.up_bias, &layer.down_bias].map(|bias| device.upload(bias));
        Self { layer, device, kernels, packed, biases }
    }

    /// h by place in the sorted list, and the list.
    fn gate_up(&self, x: &[f16], factors: Option<&[f32]>, ids: &[u32], n_used: usize) -> (Vec<f16>, Vec<u32>) {
        let (device, d_model, d_ff) = (self.device, self.layer.d_model as u32, self.layer.d_ff as u32);
        let (pairs, tiles) = run_sort(device, ids, self.layer.n_expert, self.kernels.tile_pairs());
        let (h, x) = (device.poisoned::<f16>(ids.len() * self.layer.d_ff), device.upload(x));
        let factors = factors.map_or_else(|| device.none(), |factors| device.upload(factors));
        let ([gate, up, _], [gate_bias, up_bias, _]) =
            (self.packed.each_ref().map(Buffer::slice), self.biases.each_ref().map(Buffer::slice));
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (launcher, h, x, factors) = (device.launcher(), h.slice(), x.slice(), factors.slice());
            let (p, t, n) = (pairs.slice(), tiles.slice(), n_used as u32);
            match self.kernels {
                Kernels::Warps => {
                    grouped::run_gate_up(launcher, h, gate, up, gate_bias, up_bias, x, factors, p, t, n, d_model, d_ff)
                }
                Kernels::Warpgroups => warpgroups::run_gate_up(
                    launcher, h, gate, up, gate_bias, up_bias, x, factors, p, t, n, d_model, d_ff,
                ),
            }
            .unwrap();
        }
        (h.to_vec().unwrap(), pairs.to_vec().unwrap())
    }

    /// y of pairs that are sorted already.
    fn down(&self, h: &[f16], ids: &[u32]) -> Vec<f32> {
        assert!(ids.is_sorted());
        let (device, d_model, d_ff) = (self.device, self.layer.d_model as u32, self.layer.d_ff as u32);
        let (pairs, tiles) = run_sort(device, ids, self.layer.n_expert, self.kernels.tile_pairs());
        let (y, h) = (device.poisoned(ids.len() * self.layer.d_model), device.upload(h));
        let (weight, bias) = (self.packed[2].slice(), self.biases[2].slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let (launcher, y, h, p, t) = (device.launcher(), y.slice(), h.slice(), pairs.slice(), tiles.slice());
            match self.kernels {
                Kernels::Warps => grouped::run_down(launcher, y, weight, bias, h, p, t, d_ff, d_model),
                Kernels::Warpgroups => warpgroups::run_down(launcher, y, weight, bias, h, p, t, d_ff, d_model),
            }
            .unwrap();
        }
        y.to_vec().unwrap()
    }

    /// What `ops::experts_rows` adds to `before`.
    fn all(&self, x: &[f16], before: &[f32], ids: &[u32], weights: &[f32], n_used: usize) -> Vec<f32> {
        let Layer { n_expert, d_model, d_ff, .. } = *self.layer;
        let device = self.device;
        let (x, out, ids, weights) =
            (device.upload(x), device.upload(before), device.upload(ids), device.upload(weights));
        let pairs = device.poisoned(ids.len());
        let tiles = device.poisoned(expert_tiles_len(ids.len(), n_expert));
        let (h, y) = (device.poisoned(ids.len() * d_ff), device.poisoned(ids.len() * d_model));
        let work = ExpertsRowsWork {
            n_expert,
            n_used,
            d_model,
            d_ff,
            warpgroup_pairs: (self.kernels == Kernels::Warpgroups).then_some(0),
            ids: ids.view(),
            weights: weights.view(),
            pairs: pairs.view(),
            tiles: tiles.view(),
            h: h.view(),
            y: y.view(),
        };
        let matrix = |i: usize| ExpertsMatrix {
            format: WeightFormat::Mxfp4,
            packed: self.packed[i].view(),
            bias: self.biases[i].view(),
        };
        ops::experts_rows(device.launcher(), &work, out.view(), x.view(), None, matrix(0), matrix(1), matrix(2))
            .unwrap();
        out.to_vec().unwrap()
    }
}

fn halves(x: &[f32]) -> Vec<f16> {
    x.iter().map(|&x| f16::from_f32(x)).collect()
}

fn singles(x: &[f16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

fn by_pair(h: &[f16], pairs: &[u32], d_ff: usize) -> Vec<f32> {
    let mut by_pair = vec![f32::NAN; h.len()];
    for (place, &pair) in pairs.iter().enumerate() {
        let pair = pair as usize;
        by_pair[pair * d_ff..(pair + 1) * d_ff].copy_from_slice(&singles(&h[place * d_ff..(place + 1) * d_ff]));
    }
    by_pair
}

#[track_caller]
fn check(layer: &Layer, ids: &[u32], n_used: usize) {
    let n_tokens = ids.len() / n_used;
    let x = halves(&layer.x(n_tokens));
    let (before, weights) = (normal(8, n_tokens * layer.d_model), uniform(9, ids.len(), 0.05, 0.95));
    let expected_h: Vec<f64> = layer.reference(&singles(&x), ids, n_used).into_iter().flat_map(|pair| pair.h).collect();
    let expected = layer.outputs(&singles(&x), &before, ids, &weights, n_used);
    for (device, kernels) in devices_and_kernels() {
        let on_device = OnDevice::new(layer, &device, kernels);
        let (h, pairs) = on_device.gate_up(&x, None, ids, n_used);
        assert_close(&by_pair(&h, &pairs, layer.d_ff), &expected_h, ROUNDED_H);
        assert_close(&on_device.all(&x, &before, ids, &weights, n_used), &expected, ROUNDED_H);
    }
}
