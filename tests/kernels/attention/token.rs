use std::f64::consts::TAU;

use gamma_tests::{TestDevice, assert_close, devices, relative_error};
use kernels::attention::token::{MAX_SPLITS, grouped, single};
use kernels::rope;

use super::{FULL_PRECISION, Kv, MODEL, Model, Session, TENSOR_CORES};

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
    // 700 cached keys: 11 units of 64, or 6 of 128; in 4 splits, 4 of three units or 3 of two.
    for n_splits in [1, 4, 8, MAX_SPLITS as usize] {
        check_decode(Model { n_head: 2, n_head_kv: 1, n_slots: 704, ..MODEL }, 701, 1, n_splits);
    }
    check_decode(Model { n_head: 16, n_head_kv: 2, d_head: 128, n_slots: 704, sinks: true, ..MODEL }, 701, 1, 8);
    check_decode(Model { n_head: 11, n_head_kv: 1, n_slots: 704, ..MODEL }, 701, 1, 8);
}

#[test]
fn split_edges_are_exact() {
    // Keys before the new one: around a warp's step, a block's, and where the work of one block ends for either kernel.
    for n_cached in [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 320, 321, 511, 512, 513, 640, 641] {
        check_decode(Model { n_head: 2, n_head_kv: 1, sinks: true, n_slots: 700, ..MODEL }, n_cached + 1, 1, 6);
    }
}

#[test]
fn decoding_covers_every_width_and_group() {
    for d_head in [8, 32, 40, 64, 72, 128] {
        check_decode(Model { d_head, n_head: 3, n_head_kv: 3, n_slots: 300, ..MODEL }, 300, 1, 3);
    }
    // Groups of one, less than, exactly, and more than a block's eight heads.
    for (n_head, n_head_kv) in [(2, 2), (6, 2), (16, 2), (11, 1)] {
        check_decode(Model { n_head, n_head_kv, n_slots: 300, ..MODEL }, 300, 1, 3);
    }
    check_decode(Model { n_head: 16, n_head_kv: 2, d_head: 128, ..MODEL }, 100, 1, 2);
    check_decode(Model { n_head: 11, n_head_kv: 1, d_head: 128, ..MODEL }, 200, 2, 3);
}

#[test]
fn decoding_in_a_window_reads_its_keys_only() {
    for window in [1, 2, 16, 64, 65, 99, 100, 101] {
        check_decode(Model { window, n_head: 2, n_head_kv: 1, sinks: true, ..MODEL }, 100, 1, 4);
    }
}

#[test]
fn splits_past_the_end_are_neither_written_nor_read() {
    let model = Model { n_head: 2, n_head_kv: 1, n_slots: 700, ..MODEL };
    let (qkv, n_keys, n_splits) = (model.qkv(1, 700), 700, 8);
    for device in devices() {
        // 699 keys are 11 units of 64, two a split, or 6 of 128.
        for (on_tensor_cores, n_in_use) in [(false, 6), (true, 6)] {
            let session = Session::new(&device, model, Kv::F16, 700);
            session.load(&qkv[..699 * model.width()]);
            session.partial(n_splits).fill_bytes(0xff).unwrap();
            let found = session.decode(n_keys - 1, &qkv[699 * model.width()..], n_splits, on_tensor_cores);
            assert!(found.iter().all(|x| x.is_finite()), "on tensor cores {on_tensor_cores}: {found:?}");
            let partial = session.partial(n_splits).to_vec().unwrap();
            let outputs = &partial[..model.n_head * n_splits * model.d_head];
            for (row, output) in outputs.chunks(model.d_head).enumerate() {
                let is_in_use = row % n_splits < n_in_use;
                assert!(output.iter().all(|x| x.is_nan() != is_in_use), "on tensor cores {on_tensor_cores}, row {row}");
            }
        }
    }
}

#[test]
fn splits_suit_the_context_and_fill_the_machine() {
    // Four units are one block's work; then a split each, until the blocks fill 132 SMs.
    assert_eq!([0, 256, 257, 1024].map(|n_keys| single::n_splits(n_keys, 12)), [1, 1, 5, 16]);
    assert_eq!(single::n_splits(131_072, 12), 22);
    assert_eq!(single::n_splits(131_072, 1), MAX_SPLITS);
    assert_eq!(single::n_splits(131_072, 1000), 1);
    assert_eq!([127, 512, 513, 1024].map(|n_keys| grouped::n_splits(n_keys, 64, 8, 64)), [1, 1, 5, 8]);
    assert_eq!([grouped::n_splits(131_072, 64, 8, 64), grouped::n_splits(131_072, 64, 8, 128)], [16, 32]);
}

#[test]
fn queries_and_the_new_key_turn_by_their_position() {
    // Widths whose pairs fill a warp, do not, and are two a lane.
    for d_head in [40, 64, 128] {
        let model = Model { n_head: 9, n_head_kv: 1, d_head, n_slots: 300, ..MODEL };
        let (n_tokens, magnitude) = (280, 1.25);
        let qkv = model.qkv(11, n_tokens);
        let radians: Vec<f64> = (0..d_head / 2).map(|i| 1.3f64.powi(-(i as i32))).collect();
        // The definition, on every token; half of the pairs would hide an exchange of the two.
        let mut turned = qkv.clone();
        for (position, row) in turned.chunks_mut(model.width()).enumerate() {
            for head in row[..10 * d_head].chunks_mut(d_head) {
                let (a, b) = head.split_at_mut(d_head / 2);
                for ((a, b), radians) in a.iter_mut().zip(b).zip(&radians) {
                    let (sin, cos) = (position as f64 * radians % TAU).sin_cos();
                    let (x, y) = (f64::from(*a), f64::from(*b));
                    *a = (f64::from(magnitude) * (x * cos - y * sin)) as f32;
                    *b = (f64::from(magnitude) * (y * cos + x * sin)) as f32;
                }
            }
        }
        let last = (n_tokens - 1) * model.width();
        for (kv, on_tensor_cores) in [(Kv::F16, false), (Kv::F16, true), (Kv::F32, false)] {
            let of_last = |qkv: &[f32]| model.reference(qkv, n_tokens - 1..n_tokens, &[], kv);
            let expected = of_last(&turned);
            // A key's f16 may round to either side of the reference's, an error of 2⁻¹¹ in one of its elements.
            let tolerance = if kv == Kv::F16 { TENSOR_CORES } else { FULL_PRECISION };
            let unturned = of_last(&[&turned[..last], &qkv[last..]].concat());
            for device in devices() {
                let mut session = Session::new(&device, model, kv, n_tokens);
                session.fill_caches();
                session.load(&turned[..last]);
                let frequencies: Vec<u64> = radians.iter().map(|&radians| rope::frequency(radians)).collect();
                (session.frequencies, session.magnitude) = (device.upload(&frequencies), magnitude);
                let found = session.decode(n_tokens - 1, &qkv[last..], 3, on_tensor_cores);
                assert_close(&found, &expected, tolerance);
                assert!(10.0 * tolerance < relative_error(&found, &unturned), "no turn would pass unseen");
                let (k, _) = session.caches_to_f32();
                let key = &turned[last + 9 * d_head..][..d_head];
                let expected: Vec<f64> = key.iter().map(|&x| kv.round(x).into()).collect();
                assert_close(&k[(n_tokens - 1) * d_head..n_tokens * d_head], &expected, tolerance);
            }
        }
    }
}

#[test]
fn the_new_key_and_value_land_where_appending_puts_them() {
    for (n_head, n_head_kv, d_head) in [(4, 2, 24), (22, 2, 64), (3, 3, 128)] {
        let model = Model { n_head, n_head_kv, d_head, n_slots: 8, ..MODEL };
        let qkv = model.qkv(12, 3);
        for device in devices() {
            for (kv, on_tensor_cores) in [(Kv::F16, false), (Kv::F16, true), (Kv::F32, false)] {
                let [by_token, by_append] = [true, false].map(|by_token| {
                    let session = Session::new(&device, model, kv, 3);
                    session.fill_caches();
                    session.load(&qkv[..2 * model.width()]);
                    match by_token {
                        true => drop(session.decode(2, &qkv[2 * model.width()..], 1, on_tensor_cores)),
                        false => session.append(2, &qkv[2 * model.width()..]),
                    }
                    let (k, v) = session.caches_to_f32();
                    [k, v].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
                });
                assert_eq!(by_token, by_append, "{model:?}, {kv:?}, on tensor cores {on_tensor_cores}");
            }
        }
    }
}

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
    let expected = model.reference(&exchanged, 0..20, &[], Kv::F32);
    for device in devices() {
        let found = Session::new(&device, model, Kv::F32, 20).prefill(0, &qkv);
        assert!(relative_error(&found, &expected) > 0.5);
    }
}

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
                assert_close(&sessions(&device, kv), &model.reference(&qkv, 0..n_tokens, &[], kv), TENSOR_CORES);
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
            let expected = model.reference(&qkv, 0..n_tokens, &sinks, kv);
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

/// Loads all but the last `n_decoded` of `n_keys` tokens into the cache and decodes those, with every kernel.
#[track_caller]
fn check_decode(model: Model, n_keys: usize, n_decoded: usize, n_splits: usize) {
    let (qkv, sinks) = (model.qkv(n_keys as u64, n_keys), model.sinks());
    for (kv, grouped) in [(Kv::F16, false), (Kv::F16, true), (Kv::F32, false)] {
        let from = n_keys - n_decoded;
        let expected = model.reference(&qkv, from..n_keys, &sinks, kv);
        let mutations = model.mutations(&qkv, from..n_keys, &sinks, kv);
        for device in devices() {
            let session = Session::new(&device, model, kv, n_keys);
            session.load(&qkv[..from * model.width()]);
            let mut out = Vec::new();
            for position in from..n_keys {
                let row = &qkv[position * model.width()..(position + 1) * model.width()];
                out.extend(session.decode(position, row, n_splits, grouped));
            }
            assert_close(&out, &expected, FULL_PRECISION);
            for (name, mutated) in &mutations {
                let error = relative_error(&out, mutated);
                assert!(error > 10.0 * FULL_PRECISION, "{name} would pass unseen: {error:.1e}");
            }
        }
    }
}
