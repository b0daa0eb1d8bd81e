use cuda_std::emulator::FaultKind;
use cuda_std::{DeviceSlice, Launch, LaunchError, Launcher, f16};
use gamma_tests::{TestDevice, assert_close, devices, normal, relative_error, uniform};
use gpt_gamma::device::Buffer;
use kernels::attention::decode::{
    MAX_SPLITS, attention_decode_f16_32, attention_decode_f16_64, attention_decode_f16_128, attention_decode_f32_32,
    attention_decode_f32_64, attention_decode_f32_128, attention_decode_grouped_f16_64,
    attention_decode_grouped_f16_128, attention_merge, decode_splits, launch, launch_grouped, launch_merge,
    partial_len,
};
use kernels::attention::kv_append::{self, kv_append_f16, kv_append_f32};
use kernels::attention::prefill::{
    attention_prefill_f16_64, attention_prefill_f16_128, attention_prefill_f32_32, attention_prefill_f32_64,
    attention_prefill_f32_128, launch_f16, launch_f32,
};

/// q and the softmax's numerators are rounded to f16. A score's error is `Σ δq·k`, with |δq| ≤ 2⁻¹² |q| mostly: for the
/// standard normal data here 2⁻¹² times a score's own deviation of 1, and a numerator adds its own 2⁻¹². Both average out
/// over keys. Twice what a window of one key or a dominating key leaves of that.
const TENSOR_CORES: f64 = 1e-3;
/// f32 sums of up to 128 products and of up to 1000 keys, and exp2's 2 ulp of a score of a few units. The grouped kernels'
/// two f16 for one f32 leave 2⁻²².
const FULL_PRECISION: f64 = 1e-5;

// ---- prompts ----

#[test]
fn prompts_around_a_tile_follow_the_reference() {
    for n_tokens in [1, 2, 63, 64, 65, 130] {
        let model = Model { n_head: 2, n_head_kv: 2, ..MODEL };
        check_prefill(model, n_tokens, &[n_tokens]);
    }
}

#[test]
fn heads_of_every_width_follow_the_reference() {
    for d_head in [8, 32, 40, 64, 72, 128] {
        check_prefill(Model { d_head, ..MODEL }, 70, &[70]);
    }
}

#[test]
fn a_prompt_in_pieces_is_the_whole_prompt() {
    // Later pieces start in the middle of a tile, at its end, and at its start.
    check_prefill(MODEL, 130, &[1, 62, 1, 40, 26]);
    check_prefill(Model { window: 16, sinks: true, ..MODEL }, 130, &[50, 80]);
}

#[test]
fn query_heads_share_their_group_s_keys_and_values() {
    check_prefill(Model { n_head: 8, n_head_kv: 1, d_head: 16, ..MODEL }, 66, &[66]);
    check_prefill(Model { n_head: 4, n_head_kv: 2, d_head: 16, ..MODEL }, 66, &[66]);
}

#[test]
fn windows_end_at_the_right_key() {
    for (window, n_tokens) in [(1, 70), (16, 15), (16, 16), (16, 17), (16, 140), (64, 64), (64, 65), (64, 140)] {
        check_prefill(Model { window, n_head: 2, n_head_kv: 1, ..MODEL }, n_tokens, &[n_tokens]);
    }
}

#[test]
fn sinks_enter_the_denominator() {
    check_prefill(Model { sinks: true, n_head: 2, ..MODEL }, 66, &[66]);
}

// ---- one token at a time ----

#[test]
fn decoding_token_by_token_is_prefill() {
    let models = [
        MODEL,
        Model { n_head: 8, n_head_kv: 1, d_head: 40, ..MODEL },
        Model { n_head: 4, n_head_kv: 2, window: 5, sinks: true, ..MODEL },
    ];
    for model in models {
        check_decode(model, 12, 12, 3);
    }
}

#[test]
fn contexts_of_many_splits_follow_the_reference() {
    // 701 keys: 11 units of 64 in 8 splits make 6 of two units; in 11 splits, 11 of one, the last with 61 keys.
    for n_splits in [1, 8, 11, 40] {
        check_decode(Model { n_head: 2, n_head_kv: 1, n_ctx: 704, ..MODEL }, 701, 1, n_splits);
    }
}

#[test]
fn split_edges_are_exact() {
    for n_keys in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192] {
        check_decode(Model { n_head: 2, n_head_kv: 1, sinks: true, ..MODEL }, n_keys, 1, 2);
    }
}

#[test]
fn decoding_covers_every_width_and_group() {
    for d_head in [8, 32, 40, 64, 72, 128] {
        check_decode(Model { d_head, n_head: 3, n_head_kv: 3, ..MODEL }, 100, 1, 2);
    }
    // Groups of one, less than, exactly, and more than a block's eight heads.
    for (n_head, n_head_kv) in [(2, 2), (6, 2), (16, 2), (11, 1)] {
        check_decode(Model { n_head, n_head_kv, ..MODEL }, 100, 1, 2);
    }
    check_decode(Model { n_head: 16, n_head_kv: 2, d_head: 128, ..MODEL }, 100, 1, 2);
}

#[test]
fn decoding_in_a_window_reads_its_keys_only() {
    for window in [1, 16, 64, 65, 99, 100, 101] {
        check_decode(Model { window, n_head: 2, n_head_kv: 1, sinks: true, ..MODEL }, 100, 1, 4);
    }
}

#[test]
fn splits_past_the_end_are_neither_written_nor_read() {
    let model = Model { n_head: 2, n_head_kv: 1, n_ctx: 128, ..MODEL };
    let (qkv, n_keys, n_splits) = (model.qkv(1, 65), 65, 8);
    for device in devices() {
        for grouped in [false, true] {
            let session = Session::new(&device, model, Kv::F16, 65);
            session.load(&qkv[..64 * model.width()]);
            session.partial(n_splits).fill_bytes(0xff).unwrap();
            let found = session.decode(n_keys - 1, &qkv[64 * model.width()..], n_splits, grouped);
            assert!(found.iter().all(|x| x.is_finite()), "grouped {grouped}: {found:?}");
            let partial = session.partial(n_splits).to_vec().unwrap();
            let outputs = &partial[..model.n_head * n_splits * model.d_head];
            for (row, output) in outputs.chunks(model.d_head).enumerate() {
                let in_use = row % n_splits < 2;
                assert!(output.iter().all(|x| x.is_nan() != in_use), "grouped {grouped}, row {row}");
            }
        }
    }
}

#[test]
fn splits_suit_the_context_and_fill_the_machine() {
    // One unit of 64 keys a split until there are two blocks for each of 132 SMs.
    assert_eq!([1, 64, 65, 1024].map(|n_keys| decode_splits(n_keys, 12)), [1, 1, 2, 16]);
    assert_eq!(decode_splits(131_072, 12), 22);
    assert_eq!(decode_splits(131_072, 8), 33);
    assert_eq!(decode_splits(131_072, 1), MAX_SPLITS);
    assert_eq!(decode_splits(131_072, 1000), 1);
}

// ---- grouped queries ----

#[test]
fn groups_equal_the_same_model_with_keys_and_values_repeated() {
    let grouped = Model { n_head: 4, n_head_kv: 2, d_head: 16, ..MODEL };
    let repeated = Model { n_head_kv: 4, ..grouped };
    let (n_tokens, n_splits) = (70, 2);
    let qkv = grouped.qkv(3, n_tokens);
    let mut qkv_repeated = Vec::new();
    for row in qkv.chunks(grouped.width()) {
        let heads: Vec<&[f32]> = row.chunks(grouped.d_head).collect();
        let of = |heads: &[&[f32]]| heads.concat();
        qkv_repeated.extend(of(&heads[..4]));
        qkv_repeated.extend(of(&[heads[4], heads[4], heads[5], heads[5]]));
        qkv_repeated.extend(of(&[heads[6], heads[6], heads[7], heads[7]]));
    }
    for device in devices() {
        for kv in [Kv::F16, Kv::F32] {
            let run = |model: Model, qkv: &[f32], on_tensor_cores: bool| {
                let session = Session::new(&device, model, kv, n_tokens);
                let before = (n_tokens - 1) * model.width();
                let mut out = session.prefill(0, &qkv[..before]);
                out.extend(session.decode(n_tokens - 1, &qkv[before..], n_splits, on_tensor_cores && kv == Kv::F16));
                out
            };
            // The same operations on the same numbers, head by head.
            for on_tensor_cores in [false, true] {
                let found = run(repeated, &qkv_repeated, on_tensor_cores);
                assert_eq!(run(grouped, &qkv, on_tensor_cores), found, "{kv:?}");
            }
        }
    }
}

#[test]
fn exchanging_two_kv_heads_changes_the_result() {
    let model = Model { n_head: 4, n_head_kv: 2, d_head: 16, ..MODEL };
    let qkv = model.qkv(4, 20);
    let mut exchanged = qkv.clone();
    for row in exchanged.chunks_mut(model.width()) {
        let (k, v) = row[4 * 16..].split_at_mut(2 * 16);
        k.rotate_left(16);
        v.rotate_left(16);
    }
    let expected = model.reference(&exchanged, 20, &[], Kv::F32);
    for device in devices() {
        let found = Session::new(&device, model, Kv::F32, 20).prefill(0, &qkv);
        assert!(relative_error(&found, &expected) > 0.5);
    }
}

// ---- hostile values ----

#[test]
fn large_scores_do_not_overflow() {
    let model = Model { n_head: 2, n_head_kv: 1, d_head: 64, ..MODEL };
    let (n_tokens, chosen) = (100, 30);
    // Scores of ± 12000, all equal but for one key's, which dominates by 5000: the softmax is one-hot from that key on, and
    // uniform before it. Powers of two, so that every product is exact but for the scale's.
    for sign in [1.0, -1.0] {
        let mut qkv = model.qkv(5, n_tokens);
        for (token, row) in qkv.chunks_mut(model.width()).enumerate() {
            row[..128].fill(32.0);
            row[128..192].fill(if token == chosen { sign * 48.0 + 20.0 } else { sign * 48.0 });
        }
        let sessions = |device: &TestDevice, kv| {
            let session = Session::new(device, model, kv, n_tokens);
            let mut out = session.prefill(0, &qkv[..(n_tokens - 1) * model.width()]);
            out.extend(session.decode(n_tokens - 1, &qkv[(n_tokens - 1) * model.width()..], 2, kv == Kv::F16));
            out
        };
        for device in devices() {
            for kv in [Kv::F16, Kv::F32] {
                assert_close(&sessions(&device, kv), &model.reference(&qkv, n_tokens, &[], kv), TENSOR_CORES);
            }
        }
    }
}

#[test]
fn a_sink_far_above_the_scores_scales_the_output_and_no_more() {
    let model = Model { n_head: 2, n_head_kv: 1, sinks: true, ..MODEL };
    // e⁻⁴⁰ is far below the least f16, yet the numerators keep their precision.
    let (qkv, sinks, n_tokens) = (model.qkv(9, 70), [40.0, -40.0], 70);
    for device in devices() {
        for (kv, tolerance) in [(Kv::F16, TENSOR_CORES), (Kv::F32, FULL_PRECISION)] {
            let session = Session::new(&device, model, kv, n_tokens);
            session.sinks.write(0, &sinks).unwrap();
            let before = (n_tokens - 1) * model.width();
            let mut found = session.prefill(0, &qkv[..before]);
            found.extend(session.decode(n_tokens - 1, &qkv[before..], 2, kv == Kv::F16));
            let expected = model.reference(&qkv, n_tokens, &sinks, kv);
            for head in 0..2 {
                let of_head = |i: &usize| i / model.d_head % 2 == head;
                let found: Vec<f32> = (0..found.len()).filter(of_head).map(|i| found[i]).collect();
                let expected: Vec<f64> = (0..expected.len()).filter(of_head).map(|i| expected[i]).collect();
                // e⁻⁴⁰ itself carries exp2's error for an argument near 58: about 58 · 2⁻²⁴.
                assert_close(&found, &expected, tolerance);
            }
        }
    }
}

#[test]
fn values_past_f16_show_as_nan_where_they_are_seen() {
    let model = Model { n_head: 2, n_head_kv: 2, d_head: 16, ..MODEL };
    let (n_tokens, at) = (40, 25);
    // A key of KV head 1, and the largest value that still rounds to a finite f16 in head 0.
    let mut qkv = model.qkv(6, n_tokens);
    let keys = at * model.width() + 2 * 16;
    qkv[keys + 16] = -70_000.0;
    qkv[keys] = 65_519.0;
    for device in devices() {
        let session = Session::new(&device, model, Kv::F16, n_tokens);
        let before = (n_tokens - 1) * model.width();
        let mut found = session.prefill(0, &qkv[..before]);
        found.extend(session.decode(n_tokens - 1, &qkv[before..], 1, false));
        for (i, x) in found.iter().enumerate() {
            let (token, head) = (i / 32, i / 16 % 2);
            assert_eq!(x.is_nan(), token >= at && head == 1, "token {token}, head {head}: {x}");
        }
        let found = session.decode(n_tokens - 1, &qkv[before..], 1, true);
        assert!(found[..16].iter().all(|x| x.is_finite()) && found[16..].iter().all(|x| x.is_nan()), "{found:?}");

        // A query, in the tensor cores of both kernels.
        let mut qkv = model.qkv(6, n_tokens);
        qkv[before + 16] = 70_000.0 * 4.0; // 4 = √d_head
        qkv[keys + 16] = 0.0;
        let session = Session::new(&device, model, Kv::F16, n_tokens);
        let prefill = session.prefill(0, &qkv);
        let decode = session.decode(n_tokens - 1, &qkv[before..], 1, true);
        for found in [&prefill[(n_tokens - 1) * 32..], &decode] {
            assert!(found[..16].iter().all(|x| x.is_finite()) && found[16..].iter().all(|x| x.is_nan()), "{found:?}");
        }
    }
}

// ---- the cache ----

#[test]
fn appended_rows_land_at_their_positions_rounded_once() {
    let model = Model { n_head: 3, n_head_kv: 3, d_head: 24, n_ctx: 20, ..MODEL };
    let qkv = model.qkv(7, 17);
    for device in devices() {
        for kv in [Kv::F16, Kv::F32] {
            let session = Session::new(&device, model, kv, 17);
            session.fill_caches();
            session.append(0, &qkv[..9 * model.width()]);
            session.append(9, &qkv[9 * model.width()..]);
            let (k, v) = session.caches_to_f32();
            for (first_head, cache) in [(3, k), (6, v)] {
                for (row, found) in cache.chunks(24).enumerate() {
                    let (head, position) = (row / 20, row % 20);
                    let from = position * model.width() + (first_head + head) * 24;
                    if position < 17 {
                        let expected: Vec<f32> = qkv[from..from + 24].iter().map(|&x| kv.round(x)).collect();
                        assert_eq!(found, expected, "head {head}, position {position}");
                    } else {
                        assert!(found.iter().all(|x| x.is_nan()), "head {head}, position {position} was written");
                    }
                }
            }
        }
    }
}

#[test]
fn appending_past_the_context_is_a_fault() {
    // The row past the first head's last is the second head's first.
    let model = Model { n_ctx: 8, n_head: 2, n_head_kv: 2, ..MODEL };
    // A trap ends a GPU's context, and every other test's with it.
    for device in devices().iter().filter(|device| !device.is_gpu()) {
        let session = Session::new(device, model, Kv::F16, 2);
        session.state.write(0, &[7]).unwrap();
        session.qkv.write(0, &model.qkv(8, 2)).unwrap();
        // The kernel's own check reads one past the end; a store beyond the last head would name a later element.
        let Err(LaunchError::Fault(fault)) = session.try_append(2) else { panic!("position 8 of 8 was written") };
        assert!(matches!(fault.kind, FaultKind::OutOfBounds { index, len } if index == len), "{fault}");
    }
}

// ---- procedure ----

/// Prefills in pieces of the given sizes, with both caches, and compares; then shows that the comparison would notice,
/// in the last token alone, a window off by one, and a sink absent or scaled like a score.
#[track_caller]
fn check_prefill(model: Model, n_tokens: usize, pieces: &[usize]) {
    let (qkv, sinks) = (model.qkv(n_tokens as u64, n_tokens), model.sinks());
    for kv in [Kv::F16, Kv::F32] {
        let expected = model.reference(&qkv, n_tokens, &sinks, kv);
        let tolerance = if kv == Kv::F16 { TENSOR_CORES } else { FULL_PRECISION };
        for device in devices() {
            let session = Session::new(&device, model, kv, n_tokens);
            let (mut out, mut first) = (Vec::new(), 0);
            for piece in pieces {
                out.extend(session.prefill(first, &qkv[first * model.width()..(first + piece) * model.width()]));
                first += piece;
            }
            assert_close(&out, &expected, tolerance);
            for (name, mutated) in model.mutations(&qkv, n_tokens, &sinks, kv) {
                let last = (n_tokens - 1) * model.n_head * model.d_head;
                let error = relative_error(&out[last..], &mutated[last..]);
                assert!(error > 10.0 * tolerance, "{name} would pass unseen: {error:.1e}");
            }
        }
    }
}

/// Loads all but the last `n_decoded` of `n_keys` tokens into the cache and decodes those, with every kernel.
#[track_caller]
fn check_decode(model: Model, n_keys: usize, n_decoded: usize, n_splits: usize) {
    let (qkv, sinks) = (model.qkv(n_keys as u64, n_keys), model.sinks());
    for (kv, grouped) in [(Kv::F16, false), (Kv::F16, true), (Kv::F32, false)] {
        let from = n_keys - n_decoded;
        let last = |reference: Vec<f64>| reference[from * model.n_head * model.d_head..].to_vec();
        let expected = last(model.reference(&qkv, n_keys, &sinks, kv));
        for device in devices() {
            let session = Session::new(&device, model, kv, n_keys);
            session.load(&qkv[..from * model.width()]);
            let mut out = Vec::new();
            for position in from..n_keys {
                let row = &qkv[position * model.width()..(position + 1) * model.width()];
                out.extend(session.decode(position, row, n_splits, grouped));
            }
            assert_close(&out, &expected, FULL_PRECISION);
            for (name, mutated) in model.mutations(&qkv, n_keys, &sinks, kv) {
                let error = relative_error(&out, &last(mutated));
                assert!(error > 10.0 * FULL_PRECISION, "{name} would pass unseen: {error:.1e}");
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Model {
    n_head: usize,
    n_head_kv: usize,
    d_head: usize,
    n_ctx: usize,
    window: usize,
    sinks: bool,
}

const MODEL: Model = Model { n_head: 1, n_head_kv: 1, d_head: 64, n_ctx: 200, window: 0, sinks: false };

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

    /// Attention as its definition says: `[n_tokens, n_head d_head]`.
    fn reference(&self, qkv: &[f32], n_tokens: usize, sinks: &[f32], kv: Kv) -> Vec<f64> {
        let &Model { n_head, n_head_kv, d_head, window, .. } = self;
        let mut out = vec![0.0; n_tokens * n_head * d_head];
        for i in 0..n_tokens {
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
                    for c in 0..d_head {
                        let value = f64::from(kv.round(v[c]));
                        out[(i * n_head + h) * d_head + c] += (score - largest).exp() / sum * value;
                    }
                }
            }
        }
        out
    }

    /// References with a mistake each, of those that show in the last of `n_tokens`.
    fn mutations(&self, qkv: &[f32], n_tokens: usize, sinks: &[f32], kv: Kv) -> Vec<(String, Vec<f64>)> {
        let mut mutations = Vec::new();
        let mut add = |name: String, model: Model, sinks: &[f32]| {
            mutations.push((name, model.reference(qkv, n_tokens, sinks, kv)));
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

type Decode<E> = unsafe fn(
    &dyn Launcher,
    Launch,
    DeviceSlice<f32>,
    DeviceSlice<f32>,
    DeviceSlice<E>,
    DeviceSlice<E>,
    DeviceSlice<u32>,
    u32,
    u32,
    u32,
    u32,
    u32,
    f32,
) -> Result<(), LaunchError>;

impl<'a> Session<'a> {
    fn new(device: &'a TestDevice, model: Model, kv: Kv, n_tokens: usize) -> Self {
        let n = model.n_head_kv * model.n_ctx * model.d_head;
        let caches = match kv {
            Kv::F16 => Caches::F16(device.poisoned(n), device.poisoned(n)),
            Kv::F32 => Caches::F32(device.poisoned(n), device.poisoned(n)),
        };
        let sinks = if model.sinks { device.upload(&model.sinks()) } else { device.none() };
        let (qkv, state) = (device.poisoned(n_tokens * model.width()), device.poisoned(1));
        Self { device, model, caches, qkv, state, sinks, partial: Vec::new().into() }
    }

    /// `n_head, n_head_kv, d_head, n_ctx, window`.
    fn sizes(&self) -> [u32; 5] {
        let Model { n_head, n_head_kv, d_head, n_ctx, window, .. } = self.model;
        [n_head, n_head_kv, d_head, n_ctx, window].map(|n| n as u32)
    }

    #[track_caller]
    fn append(&self, position: usize, qkv: &[f32]) {
        self.state.write(0, &[position as u32]).unwrap();
        self.qkv.write(0, qkv).unwrap();
        self.try_append(qkv.len() / self.model.width()).unwrap();
    }

    fn try_append(&self, n_tokens: usize) -> Result<(), LaunchError> {
        let [n_head, n_head_kv, d, n_ctx, _] = self.sizes();
        let (device, n) = (self.device.launcher(), n_tokens as u32);
        let (qkv, state) = (self.qkv.slice(), self.state.slice());
        let launch = kv_append::launch(n, n_head_kv);
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            match &self.caches {
                Caches::F16(k, v) => {
                    kv_append_f16::run(device, launch, k.slice(), v.slice(), qkv, state, n, n_head, n_head_kv, d, n_ctx)
                }
                Caches::F32(k, v) => {
                    kv_append_f32::run(device, launch, k.slice(), v.slice(), qkv, state, n, n_head, n_head_kv, d, n_ctx)
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
        self.append(position, qkv);
        let n_tokens = qkv.len() / self.model.width();
        let out = self.device.poisoned(n_tokens * self.model.n_head * self.model.d_head);
        let (n, [n_head, _, d_head, ..]) = (n_tokens as u32, self.sizes());
        let narrow = d_head <= 64;
        match &self.caches {
            Caches::F16(k, v) => {
                let kernel = if narrow { attention_prefill_f16_64::run } else { attention_prefill_f16_128::run };
                self.run_prefill(kernel, launch_f16(n, n_head), &out, k, v, n);
            }
            Caches::F32(k, v) => {
                let kernel = match d_head {
                    0..=32 => attention_prefill_f32_32::run,
                    33..=64 => attention_prefill_f32_64::run,
                    _ => attention_prefill_f32_128::run,
                };
                self.run_prefill(kernel, launch_f32(n, n_head), &out, k, v, n);
            }
        }
        out.to_vec().unwrap()
    }

    #[track_caller]
    fn run_prefill<E: cuda_std::Element + gpt_gamma::device::Plain>(
        &self,
        kernel: Prefill<E>,
        launch: Launch,
        out: &Buffer<f32>,
        k: &Buffer<E>,
        v: &Buffer<E>,
        n_tokens: u32,
    ) {
        let ([n_head, n_head_kv, d_head, n_ctx, window], scale) = (self.sizes(), self.model.scale());
        let (device, qkv) = (self.device.launcher(), self.qkv.slice());
        let (k, v, state, sinks) = (k.slice(), v.slice(), self.state.slice(), self.sinks.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            kernel(
                device,
                launch,
                out.slice(),
                qkv,
                k,
                v,
                state,
                sinks,
                n_tokens,
                n_head,
                n_head_kv,
                d_head,
                n_ctx,
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

    /// Appends the token `qkv` at `position` and attends from it.
    #[track_caller]
    fn decode(&self, position: usize, qkv: &[f32], n_splits: usize, grouped: bool) -> Vec<f32> {
        self.append(position, qkv);
        let [n_head, n_head_kv, d_head, _, window] = self.sizes();
        let (partial, s) = (self.partial(n_splits), n_splits as u32);
        let narrow = d_head <= 64;
        match &self.caches {
            Caches::F16(k, v) if grouped => {
                let kernel =
                    if narrow { attention_decode_grouped_f16_64::run } else { attention_decode_grouped_f16_128::run };
                self.run_decode(kernel, launch_grouped(n_head, n_head_kv, s), &partial, k, v);
            }
            Caches::F16(k, v) => {
                let kernel = match d_head {
                    0..=32 => attention_decode_f16_32::run,
                    33..=64 => attention_decode_f16_64::run,
                    _ => attention_decode_f16_128::run,
                };
                self.run_decode(kernel, launch(n_head, s), &partial, k, v);
            }
            Caches::F32(k, v) => {
                let kernel = match d_head {
                    0..=32 => attention_decode_f32_32::run,
                    33..=64 => attention_decode_f32_64::run,
                    _ => attention_decode_f32_128::run,
                };
                self.run_decode(kernel, launch(n_head, s), &partial, k, v);
            }
        }
        let out = self.device.poisoned(self.model.n_head * self.model.d_head);
        let (device, launch) = (self.device.launcher(), launch_merge(n_head));
        let (partial, state, sinks) = (partial.slice(), self.state.slice(), self.sinks.slice());
        // SAFETY: shapes as the kernel's comment says; the partials are this step's.
        unsafe {
            attention_merge::run(device, launch, out.slice(), partial, state, sinks, n_head, d_head, s, window)
                .unwrap();
        }
        out.to_vec().unwrap()
    }

    #[track_caller]
    fn run_decode<E: cuda_std::Element + gpt_gamma::device::Plain>(
        &self,
        kernel: Decode<E>,
        launch: Launch,
        partial: &Buffer<f32>,
        k: &Buffer<E>,
        v: &Buffer<E>,
    ) {
        let ([n_head, n_head_kv, d_head, n_ctx, window], scale) = (self.sizes(), self.model.scale());
        let (device, partial, qkv) = (self.device.launcher(), partial.slice(), self.qkv.slice());
        let (k, v, state) = (k.slice(), v.slice(), self.state.slice());
        // SAFETY: shapes as the kernel's comment says.
        unsafe { kernel(device, launch, partial, qkv, k, v, state, n_head, n_head_kv, d_head, n_ctx, window, scale) }
            .unwrap();
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
