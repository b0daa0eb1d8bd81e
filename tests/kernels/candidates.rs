use gamma_tests::{devices, normal};
use kernels::candidates::{KEPT, PART, launch, likeliest, n_parts};

#[test]
fn each_part_gives_its_64_largest() {
    // Less than what is kept, less than a part, a part and one more, several.
    for n in [1, 63, 64, 65, 700, PART as usize, PART as usize + 1, 3 * PART as usize - 5] {
        check(&normal(n as u64, n));
    }
}

#[test]
fn among_equals_the_lower_ids_are_kept() {
    check(&vec![0.5; PART as usize]);
    // 30 larger ones, then 100 equals for 34 places.
    let mut logits = vec![-1.0; 1500];
    (0..100).for_each(|i| logits[1400 - 7 * i] = 2.0);
    (0..30).for_each(|i| logits[11 * i + 1] = 3.0);
    check(&logits);
}

#[test]
fn zeros_of_both_signs_infinities_and_banned_tokens_keep_their_order() {
    let mut logits = normal(5, 300);
    logits[17] = f32::NEG_INFINITY;
    logits[18] = f32::MAX;
    logits[19] = -0.0;
    logits[20] = f32::MIN;
    check(&logits);
    check(&[f32::NEG_INFINITY; 200]);
}

#[test]
fn not_a_number_is_kept() {
    for device in devices() {
        let mut logits = normal(6, 3000);
        logits[2500] = -f32::NAN;
        let (values, ids) = run(&device, &logits);
        let at = ids.iter().position(|&id| id == 2500).unwrap();
        assert!(values[at].is_nan());
    }
}

fn run(device: &gamma_tests::TestDevice, logits: &[f32]) -> (Vec<f32>, Vec<u32>) {
    let n = logits.len() as u32;
    let kept = (n_parts(n) * KEPT) as usize;
    let (values, ids) = (device.poisoned(kept), device.poisoned(kept));
    let logits = device.upload(logits);
    // SAFETY: shapes as the kernel's comment says.
    unsafe {
        let (values, ids) = (values.slice(), ids.slice());
        likeliest::run(device.launcher(), launch(n), values, ids, logits.slice()).unwrap();
    }
    (values.to_vec().unwrap(), ids.to_vec().unwrap())
}

#[track_caller]
fn check(logits: &[f32]) {
    for device in devices() {
        let (values, ids) = run(&device, logits);
        for (b, part) in logits.chunks(PART as usize).enumerate() {
            let mut expected: Vec<u32> = (0..part.len() as u32).collect();
            // A stable sort leaves equals in the order of their ids; −0 ranks below 0 here, as in IEEE 754's total order.
            expected.sort_by(|&a, &b| part[b as usize].total_cmp(&part[a as usize]));
            expected.truncate(KEPT as usize);
            expected.iter_mut().for_each(|id| *id += b as u32 * PART);
            expected.sort_unstable();
            let range = b * KEPT as usize..(b + 1) * KEPT as usize;
            let mut found: Vec<u32> = ids[range.clone()].iter().copied().filter(|&id| id != u32::MAX).collect();
            found.sort_unstable();
            assert_eq!(found, expected);
            for (&id, &value) in ids[range.clone()].iter().zip(&values[range]) {
                let expected = if id == u32::MAX { f32::NEG_INFINITY } else { logits[id as usize] };
                assert_eq!(value.to_bits(), expected.to_bits());
            }
        }
    }
}
