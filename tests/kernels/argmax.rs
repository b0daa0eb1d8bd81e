use gamma_tests::{devices, uniform};
use kernels::argmax::{NOT_A_NUMBER, PARTS, argmax, argmax_parts, launch, launch_parts};

#[test]
fn finds_the_largest_wherever_it_is() {
    // Alone, fewer than parts, first and last of a part, one off a part, one off a stride of a block, GPT-2's vocabulary.
    for (n, at) in [
        (1, 0),
        (100, 99),
        (1024, 0),
        (1024, 7),
        (1024, 1023),
        (1025, 1024),
        (40_000, 569),
        (50_257, 50_256),
        (50_257, 31),
    ] {
        let mut logits = uniform(n as u64, n, -4.0, 4.0);
        logits[at] = 4.5;
        check(&logits, at as u32);
    }
}

#[test]
fn equal_logits_give_the_lowest_id() {
    let mut logits = vec![0.0; 3000];
    for at in [77, 1101, 78, 2999] {
        logits[at] = 1.0;
    }
    check(&logits, 77);
    check(&[0.0; 2000], 0);
    check(&[f32::NEG_INFINITY; 40], 0);
}

#[test]
fn negative_and_infinite_logits_are_ordered() {
    check(&[-5.0, -1.0, -3.0], 1);
    check(&[1.0, f32::INFINITY, f32::MAX], 1);
}

#[test]
fn a_nan_anywhere_is_reported_and_not_lost() {
    for at in [0, 31, 32, 1023, 1024, 1999] {
        let mut logits = uniform(9, 2000, -1.0, 1.0);
        logits[at] = f32::NAN;
        check(&logits, NOT_A_NUMBER);
    }
}

#[track_caller]
fn check(logits: &[f32], expected: u32) {
    for device in devices() {
        let (token, state, logits) = (device.poisoned::<u32>(1), device.upload(&[41_u32]), device.upload(logits));
        let best = (device.poisoned::<f32>(PARTS as usize), device.poisoned::<u32>(PARTS as usize));
        let (best_logits, best_ids) = (best.0.slice(), best.1.slice());
        // SAFETY: shapes as the kernels' comments say.
        unsafe {
            argmax_parts::run(device.launcher(), launch_parts(), best_logits, best_ids, logits.slice()).unwrap();
            let (launcher, launch) = (device.launcher(), launch());
            argmax::run(launcher, launch, token.slice(), state.slice(), best_logits, best_ids, 3).unwrap();
        }
        assert_eq!(token.to_vec().unwrap(), [expected]);
        assert_eq!(state.to_vec().unwrap(), [44]);
    }
}
