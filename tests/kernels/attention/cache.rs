use cuda_std::LaunchError;
use cuda_std::emulator::FaultKind;
use gamma_tests::devices;

use super::{Kv, MODEL, Model, Session};

#[test]
fn appended_rows_land_at_their_positions_rounded_once() {
    let model = Model { n_head: 3, n_head_kv: 3, d_head: 24, n_slots: 20, ..MODEL };
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
    let model = Model { n_slots: 8, n_head: 2, n_head_kv: 2, ..MODEL };
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

#[test]
fn a_ring_takes_the_slots_of_keys_that_no_query_sees_any_more() {
    // A window of 5 and chunks of up to 4 tokens: 8 slots are just enough.
    let model = Model { n_head: 2, n_head_kv: 2, d_head: 8, n_slots: 8, window: 5, ..MODEL };
    let qkv = model.qkv(17, 21);
    for device in devices() {
        let session = Session::new(&device, model, Kv::F32, 21);
        session.fill_caches();
        let mut first = 0;
        for n_tokens in [4, 1, 4, 3, 2, 4, 3] {
            session.append(first, &qkv[first * model.width()..(first + n_tokens) * model.width()]);
            first += n_tokens;
        }
        let (k, v) = session.caches_to_f32();
        for (first_head, cache) in [(2, k), (4, v)] {
            for (row, found) in cache.chunks(8).enumerate() {
                // 13..21 are the last eight.
                let (head, position) = (row / 8, 13 + (row % 8 + 8 - 13 % 8) % 8);
                let from = position * model.width() + (first_head + head) * 8;
                assert_eq!(found, &qkv[from..from + 8], "head {head}, position {position}");
            }
        }
    }
}

#[test]
fn a_ring_too_small_for_window_and_chunk_is_a_fault() {
    let model = Model { n_slots: 8, window: 6, ..MODEL };
    for device in devices().iter().filter(|device| !device.is_gpu()) {
        let session = Session::new(device, model, Kv::F16, 4);
        session.qkv.write(0, &model.qkv(8, 4)).unwrap();
        for (position, is_allowed) in [(4, true), (5, false)] {
            session.state.write(0, &[position]).unwrap();
            let result = session.try_append(4);
            assert_eq!(result.is_ok(), is_allowed, "position {position}: {result:?}");
        }
        // A chunk of one fits.
        session.append(5, &model.qkv(8, 1));
        session.append(100, &model.qkv(8, 3));
    }
}

#[test]
fn a_token_past_the_context_or_a_ring_below_its_window_is_a_fault() {
    for (n_slots, window, position, is_allowed) in
        [(8, 0, 7, true), (8, 0, 8, false), (8, 8, 8, true), (8, 9, 8, false)]
    {
        let model = Model { n_slots, window, n_head: 2, n_head_kv: 1, ..MODEL };
        let qkv = model.qkv(18, 8);
        for device in devices().iter().filter(|device| !device.is_gpu()) {
            for (kv, on_tensor_cores) in [(Kv::F32, false), (Kv::F16, false), (Kv::F16, true)] {
                let session = Session::new(device, model, kv, 8);
                session.load(&qkv);
                let found = session.try_decode(position, &qkv[..model.width()], 1, on_tensor_cores);
                let is_fault = matches!(
                    found, Err(LaunchError::Fault(ref fault)) if matches!(fault.kind, FaultKind::OutOfBounds { .. })
                );
                assert_eq!(
                    (found.is_ok(), is_fault),
                    (is_allowed, !is_allowed),
                    "{n_slots} slots, {window}: {found:?}"
                );
            }
        }
    }
}

#[test]
fn rings_give_the_bits_of_whole_caches_in_any_chunking() {
    for (window, d_head) in [(5, 16), (70, 64), (130, 72)] {
        for pieces in [&[1, 62, 1, 40, 26, 90, 1, 1, 1][..], &[223], &[64, 64, 64, 31]] {
            let n_tokens: usize = pieces.iter().sum();
            let longest = *pieces.iter().max().unwrap();
            let whole = Model { n_head: 2, n_head_kv: 1, d_head, n_slots: 230, window, sinks: true };
            let ring = Model { n_slots: (window - 1 + longest).min(230), ..whole };
            let qkv = whole.qkv(19, n_tokens);
            for device in devices() {
                for (kv, on_tensor_cores) in [(Kv::F32, false), (Kv::F16, false), (Kv::F16, true)] {
                    let [expected, found] = [whole, ring].map(|model| {
                        let session = Session::new(&device, model, kv, n_tokens);
                        let (mut out, mut first) = (Vec::new(), 0);
                        for &piece in pieces {
                            let rows = &qkv[first * model.width()..(first + piece) * model.width()];
                            out.extend(match piece {
                                1 => session.decode(first, rows, 4, on_tensor_cores),
                                _ => session.prefill(first, rows),
                            });
                            first += piece;
                        }
                        out
                    });
                    assert_eq!(found, expected, "window {window}, {kv:?}, {pieces:?}");
                }
            }
        }
    }
}

#[test]
fn rings_of_many_splits_give_the_bits_of_whole_caches() {
    let whole = Model { n_head: 2, n_head_kv: 1, d_head: 16, n_slots: 1000, window: 650, sinks: true };
    let qkv = whole.qkv(20, 1000);
    for device in devices() {
        for (kv, on_tensor_cores) in [(Kv::F32, false), (Kv::F16, false), (Kv::F16, true)] {
            let [expected, found] = [1000, 700].map(|n_slots| {
                let model = Model { n_slots, ..whole };
                let session = Session::new(&device, model, kv, 50);
                let mut rows = qkv.chunks(model.width()).map(|row| row.to_vec());
                for first in (0..950).step_by(50) {
                    session.append(first, &rows.by_ref().take(50).collect::<Vec<_>>().concat());
                }
                (950..955)
                    .flat_map(|i| session.decode(i, &rows.next().unwrap(), 6, on_tensor_cores))
                    .collect::<Vec<_>>()
            });
            assert_eq!(found, expected, "{kv:?}, on tensor cores {on_tensor_cores}");
        }
    }
}
