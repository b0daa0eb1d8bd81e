use cuda_std::f16;
use gamma_tests::{assert_close, devices, relative_error};

use super::{FULL_PRECISION, Kv, MODEL, Model, Session, TENSOR_CORES};

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

#[test]
fn outputs_may_be_f16() {
    let model = Model { n_head: 2, n_head_kv: 1, d_head: 24, ..MODEL };
    let qkv = model.qkv(2, 70);
    for device in devices() {
        for kv in [Kv::F16, Kv::F32] {
            let session = Session::new(&device, model, kv, 70);
            let out16 = device.poisoned(70 * 2 * 24);
            session.prefill_to(0, &qkv, &device.none(), &out16);
            let expected = session.prefill(0, &qkv).into_iter().map(f16::from_f32).collect::<Vec<_>>();
            assert_eq!(out16.to_vec().unwrap(), expected, "{kv:?}");
        }
    }
}

/// Prefills in pieces of the given sizes, with both caches, and compares; then shows that the comparison would notice,
/// in the last token alone, a window off by one, and a sink absent or scaled like a score.
#[track_caller]
fn check_prefill(model: Model, n_tokens: usize, pieces: &[usize]) {
    let (qkv, sinks) = (model.qkv(n_tokens as u64, n_tokens), model.sinks());
    for kv in [Kv::F16, Kv::F32] {
        let expected = model.reference(&qkv, 0..n_tokens, &sinks, kv);
        let tolerance = if kv == Kv::F16 { TENSOR_CORES } else { FULL_PRECISION };
        for device in devices() {
            let session = Session::new(&device, model, kv, n_tokens);
            let (mut out, mut first) = (Vec::new(), 0);
            for piece in pieces {
                out.extend(session.prefill(first, &qkv[first * model.width()..(first + piece) * model.width()]));
                first += piece;
            }
            assert_close(&out, &expected, tolerance);
            for (name, mutated) in model.mutations(&qkv, 0..n_tokens, &sinks, kv) {
                let last = (n_tokens - 1) * model.n_head * model.d_head;
                let error = relative_error(&out[last..], &mutated[last..]);
                assert!(error > 10.0 * tolerance, "{name} would pass unseen: {error:.1e}");
            }
        }
    }
}
