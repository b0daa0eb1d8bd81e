use gamma_tests::{devices, uniform};
use kernels::argmax::{NOT_A_NUMBER, PARTS, argmax, launch};

#[test]
fn finds_the_largest_wherever_it_is() {
    // Alone, in one block, first and last of a block, in the one logit of a second block's last thread, one off a stride of a
    // block, GPT-2's vocabulary, and one for which all blocks have more than a batch of loads a thread.
    for (n, at) in [
        (1, 0),
        (100, 99),
        (1024, 0),
        (1024, 1023),
        (1025, 512),
        (1025, 1024),
        (40_000, 569),
        (50_257, 50_256),
        (50_257, 31),
        (270_000, 269_999),
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
        let (token, state, on_device) = (device.poisoned::<u32>(1), device.upload(&[41_u32]), device.upload(logits));
        let best = (device.poisoned::<f32>(PARTS as usize), device.poisoned::<u32>(PARTS as usize));
        let arrived = device.upload(&[0_u32]);
        // Twice: the counter is left as it was found.
        for position in [44, 47] {
            let (launcher, launch) = (device.launcher(), launch(logits.len() as u32));
            let (token, position_of, logits) = (token.slice(), state.slice(), on_device.slice());
            let (best_logits, best_ids, arrived) = (best.0.slice(), best.1.slice(), arrived.slice());
            // SAFETY: shapes as the kernel's comment says.
            unsafe {
                argmax::run(launcher, launch, token, position_of, best_logits, best_ids, arrived, logits, 3).unwrap();
            }
            assert_eq!(state.to_vec().unwrap(), [position]);
        }
        assert_eq!(token.to_vec().unwrap(), [expected]);
    }
}
