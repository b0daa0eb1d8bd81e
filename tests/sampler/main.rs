//! Logits to tokens: each filter against an obvious reference, penalties against numbers worked out by hand,
//! frequencies against probabilities, and the random stream against the cipher's published one.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]

use gpt_gamma::sampler::{Error, Likeliest, Sampled, Sampler, SamplerOptions};
use proptest::prelude::*;

/// No filter, no penalty, temperature 1, seed 0.
fn plain() -> SamplerOptions {
    SamplerOptions { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(0), ..SamplerOptions::default() }
}

fn greedy() -> SamplerOptions {
    SamplerOptions { temp: 0.0, ..plain() }
}

fn sampler(options: SamplerOptions, n_vocab: usize) -> Sampler {
    Sampler::new(options, n_vocab, &[]).unwrap()
}

fn draw(options: SamplerOptions, logits: &[f32], n_draws: usize) -> Vec<u32> {
    let mut sampler = sampler(options, logits.len());
    (0..n_draws).map(|_| sampler.sample(logits).unwrap().id).collect()
}

/// The whole chain in f64 with a full sort: `(id, probability)` of what the filters leave, likeliest first.
fn reference(options: &SamplerOptions, logits: &[f32]) -> Vec<(u32, f64)> {
    let mut kept: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(|&logit| f64::from(logit))).collect();
    kept.retain(|(_, logit)| *logit > f64::NEG_INFINITY);
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let probabilities = |kept: &[(u32, f64)], temp: f64| -> Vec<f64> {
        let weights: Vec<f64> = kept.iter().map(|(_, logit)| ((logit - kept[0].1) / temp).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    };
    if options.top_k > 0 {
        kept.truncate(options.top_k as usize);
    }
    if options.top_p < 1.0 {
        let shares = probabilities(&kept, 1.0);
        let enough = |n: &usize| shares[..*n].iter().sum::<f64>() >= f64::from(options.top_p);
        kept.truncate((1..kept.len()).find(enough).unwrap_or(kept.len()));
    }
    let first = kept[0].1;
    kept.retain(|(_, logit)| options.min_p == 0.0 || (logit - first).exp() >= f64::from(options.min_p));
    let shares = probabilities(&kept, f64::from(options.temp));
    kept.iter().zip(shares).map(|((id, _), share)| (*id, share)).collect()
}

/// Draws often and compares how often each token came with how often it should have.
#[track_caller]
fn check_frequencies(options: SamplerOptions, logits: &[f32]) {
    const N: usize = 40_000;
    let expected = reference(&options, logits);
    let drawn = draw(options, logits, N);
    let n_of = |id: u32| drawn.iter().filter(|&&other| other == id).count() as f64;
    for &(id, share) in &expected {
        // A count is binomial. Six standard deviations: below 1e-8 for each token if all is right. The one more is for
        // shares so small that the normal law does not hold (P(count ≥ 2) ≈ (N · share)² / 2).
        let tolerance = 6.0 * (N as f64 * share * (1.0 - share)).sqrt() + 1.0;
        let (found, wanted) = (n_of(id), N as f64 * share);
        assert!((found - wanted).abs() <= tolerance, "token {id}: {found} draws, expected {wanted} ± {tolerance}");
    }
    let n_expected: f64 = expected.iter().map(|&(id, _)| n_of(id)).sum();
    assert_eq!(n_expected, N as f64, "a token was drawn that the filters remove");
}

const LOGITS: [f32; 12] = [1.0, 3.0, 2.5, -1.0, 0.0, 3.0, f32::NEG_INFINITY, 2.0, -0.5, 1.5, -30.0, 0.5];

#[test]
fn draws_follow_the_softmax() {
    check_frequencies(plain(), &LOGITS);
}

#[test]
fn draws_follow_the_softmax_at_other_temperatures() {
    check_frequencies(SamplerOptions { temp: 0.5, ..plain() }, &LOGITS);
    check_frequencies(SamplerOptions { temp: 2.0, ..plain() }, &LOGITS);
}

#[test]
fn filters_apply_in_order() {
    check_frequencies(SamplerOptions { top_k: 4, ..plain() }, &LOGITS);
    check_frequencies(SamplerOptions { top_p: 0.6, ..plain() }, &LOGITS);
    check_frequencies(SamplerOptions { min_p: 0.2, ..plain() }, &LOGITS);
    check_frequencies(SamplerOptions { top_k: 6, top_p: 0.9, min_p: 0.3, temp: 1.5, ..plain() }, &LOGITS);
    check_frequencies(SamplerOptions { seed: Some(7), ..SamplerOptions::default() }, &LOGITS);
}

#[test]
fn top_p_counts_before_the_temperature_and_after_top_k() {
    // Shares 0.5, 0.3, 0.2. Among the first two they are 0.625 and 0.375, so 0.6 is reached by one; alone by two.
    let logits = [0.5f32, 0.3, 0.2].map(f32::ln);
    let seen = |options| {
        let mut ids = draw(options, &logits, 2_000);
        ids.sort_unstable();
        ids.dedup();
        ids
    };
    assert_eq!(seen(SamplerOptions { top_p: 0.6, ..plain() }), [0, 1]);
    assert_eq!(seen(SamplerOptions { top_p: 0.6, top_k: 2, ..plain() }), [0]);
    // At temperature 4 the first has 0.36 of the softmax, which alone would not reach 0.45; 0.5 does.
    assert_eq!(seen(SamplerOptions { top_p: 0.45, temp: 4.0, ..plain() }), [0]);
    assert_eq!(seen(SamplerOptions { top_p: 0.0, ..plain() }), [0]);
    assert_eq!(seen(SamplerOptions { min_p: 1.0, ..plain() }), [0]);
    assert_eq!(seen(SamplerOptions { min_p: 0.5, ..plain() }), [0, 1]);
}

#[test]
fn the_stream_is_chacha8_of_the_seed() {
    // Keystreams of ChaCha8 with a nonce of zeros, for a key of zeros and for one whose first byte is 1 (test cases 1
    // and 2 of draft-strombergson-chacha-test-vectors, 256-bit keys, 8 rounds).
    check_stream(0, [0x3e00ef2f895f40d6, 0x7f5bb8e81f09a5a1, 0x2c840ec3ce9a7f3b, 0x181be188ef711a1e]);
    check_stream(1, [0xcf5ee9a0494aa961, 0x3e05d5ed725b804b, 0x12f4a465ee635acc, 0x3a311de8740489ea]);
}

#[track_caller]
fn check_stream(seed: u64, keystream: [u64; 4]) {
    // Words are little-endian. Among 2¹⁶ equally likely tokens, the one drawn is the number's upper 16 bits.
    let expected = keystream.map(|bytes| (bytes.swap_bytes() >> 48) as u32);
    assert_eq!(draw(SamplerOptions { seed: Some(seed), ..plain() }, &[0.0; 1 << 16], 4), expected);
}

#[test]
fn seeds_decide() {
    let logits: Vec<f32> = (0..100).map(|id| (id as f32 * 0.37).sin()).collect();
    let with_seed = |seed| draw(SamplerOptions { seed, ..plain() }, &logits, 50);
    assert_eq!(with_seed(Some(42)), with_seed(Some(42)));
    assert_ne!(with_seed(Some(42)), with_seed(Some(43)));
    assert_ne!(with_seed(Some(1)), with_seed(Some(1 << 32)), "all 64 bits count");
    assert_ne!(with_seed(None), with_seed(None), "a seed from the system differs each time");

    let mut unseeded = sampler(SamplerOptions { seed: None, ..plain() }, 100);
    let drawn: Vec<u32> = (0..50).map(|_| unseeded.sample(&logits).unwrap().id).collect();
    assert_eq!(drawn, with_seed(Some(unseeded.seed())), "and can be read to repeat the run");
}

#[test]
fn temperature_zero_takes_the_likeliest_and_the_first_of_equals() {
    assert_eq!(draw(greedy(), &LOGITS, 3), [1, 1, 1]);
    assert_eq!(draw(greedy(), &[-0.0, 0.0], 1), [0]);
    assert_eq!(draw(greedy(), &[f32::MIN, f32::NEG_INFINITY], 1), [0]);
}

#[test]
fn extreme_temperatures_do_not_overflow() {
    assert_eq!(draw(SamplerOptions { temp: 1e-45, ..plain() }, &[1.0e30, -1.0e30, f32::MIN], 20), [0; 20]);
    let flat = draw(SamplerOptions { temp: f32::MAX, ..plain() }, &[30.0, -30.0], 200);
    assert!(flat.contains(&0) && flat.contains(&1));
}

#[test]
fn penalties_are_those_worked_out_by_hand() {
    // Tokens 0 (twice) and 1 (once) were seen. Repeat 2, presence 0.25, frequency 0.5:
    // 0: 4.0 / 2 − 2 · 0.5 − 0.25 = 0.75; 1: −1.0 · 2 − 0.5 − 0.25 = −2.75; 2 stays.
    let options = SamplerOptions { repeat_penalty: 2.0, presence_penalty: 0.25, frequency_penalty: 0.5, ..greedy() };
    let logits_with = |third: f32| [4.0, -1.0, third];
    let choose = |logits: &[f32]| {
        let mut sampler = sampler(options.clone(), 3);
        for token in [0, 1, 0] {
            sampler.accept(token).unwrap();
        }
        sampler.sample(logits).unwrap().id
    };
    assert_eq!(choose(&logits_with(0.7499)), 0);
    assert_eq!(choose(&logits_with(0.7501)), 2);
    assert_eq!(choose(&[-100.0, -1.0, -2.7499]), 2);
    assert_eq!(choose(&[-100.0, -1.0, -2.7501]), 1);
}

#[test]
fn penalties_forget_what_left_their_window() {
    let choose = |repeat_last_n, accepted: &[u32]| {
        let options = SamplerOptions { presence_penalty: 1.0, repeat_last_n, ..greedy() };
        let mut sampler = sampler(options, 3);
        accepted.iter().for_each(|&token| sampler.accept(token).unwrap());
        sampler.sample(&[1.0, 0.5, 0.1]).unwrap().id
    };
    assert_eq!(choose(Some(2), &[0]), 1);
    assert_eq!(choose(Some(2), &[0, 0, 2, 2]), 0);
    assert_eq!(choose(Some(2), &[0, 2, 0, 2]), 1, "the same token again is still in the window");
    assert_eq!(choose(Some(0), &[0, 0]), 0);
    assert_eq!(choose(None, &[&[0][..], &[2; 100]].concat()), 1);
    assert_eq!(choose(SamplerOptions::default().repeat_last_n, &[&[0][..], &[2; 63]].concat()), 1);
    assert_eq!(choose(SamplerOptions::default().repeat_last_n, &[&[0][..], &[2; 64]].concat()), 0);
}

#[test]
fn bias_comes_before_penalties_and_adds_up() {
    let options = SamplerOptions { logit_bias: vec![(1, 2.0), (1, 1.0)], repeat_penalty: 4.0, ..greedy() };
    let mut sampler = sampler(options, 2);
    sampler.accept(1).unwrap();
    // (1 + 3) / 4 = 1, while 1 / 4 + 3 would be 3.25.
    assert_eq!(sampler.sample(&[1.5, 1.0]).unwrap().id, 0);
    assert_eq!(sampler.sample(&[0.5, 1.0]).unwrap().id, 1);
}

#[test]
fn ignore_eos_bans_every_end_of_generation_token() {
    let options = SamplerOptions { ignore_eos: true, ..plain() };
    let mut sampler = Sampler::new(options, 4, &[0, 2]).unwrap();
    let drawn: Vec<u32> = (0..200).map(|_| sampler.sample(&[9.0, 0.0, 9.0, 0.0]).unwrap().id).collect();
    assert!(drawn.iter().all(|id| [1, 3].contains(id)));
    let mut heeding = Sampler::new(plain(), 4, &[0, 2]).unwrap();
    assert_eq!(heeding.sample(&[-90.0, -90.0, 9.0, -90.0]).unwrap().id, 2);
}

#[test]
fn log_probabilities_are_of_the_logits_as_given() {
    // Shares 1/8, 4/8, 2/8, 1/8, whatever the options do to them.
    let logits = [1.0f32, 4.0, 2.0, 1.0].map(|share| share.ln() + 5.0);
    let options = SamplerOptions {
        temp: 0.1,
        top_k: 1,
        logit_bias: vec![(1, f32::NEG_INFINITY), (2, 1.0)],
        n_probs: 3,
        ..plain()
    };
    let sampled = sampler(options, 4).sample(&logits).unwrap();
    assert_eq!(sampled.id, 2);
    // Logits below 8 are rounded by 2⁻²², twice in a difference; the sum is within 2⁻²¹, the result rounded by 2⁻²⁴.
    let tolerance = 5.0 * (-22f64).exp2();
    let close = |found: f32, share: f64| assert!((f64::from(found) - share.ln()).abs() < tolerance, "{found}");
    close(sampled.logprob, 0.25);
    assert_eq!(sampled.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 0]);
    sampled.top.iter().zip([0.5, 0.25, 0.125]).for_each(|((_, found), share)| close(*found, share));
}

#[test]
fn alternatives_are_no_more_than_possible() {
    let options = SamplerOptions { n_probs: 10, ..greedy() };
    let sampled = sampler(options, 3).sample(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]).unwrap();
    assert_eq!(sampled, Sampled { id: 1, logprob: 0.0, top: vec![(1, 0.0)] });
}

#[test]
fn logits_that_are_no_numbers_are_named() {
    for options in [plain(), greedy(), SamplerOptions::default()] {
        let mut sampler = sampler(options, 3);
        match sampler.sample(&[0.0, f32::NAN, f32::NAN]) {
            Err(Error::BadLogit { token: 1, value }) => assert!(value.is_nan()),
            other => panic!("{other:?}"),
        }
        let infinite = Error::BadLogit { token: 2, value: f32::INFINITY };
        assert_eq!(sampler.sample(&[0.0, 0.0, f32::INFINITY]), Err(infinite));
        assert_eq!(sampler.sample(&[0.0; 2]), Err(Error::LogitCount { found: 2, expected: 3 }));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3]), Err(Error::NoCandidate { n_vocab: 3 }));
        assert!(sampler.sample(&[0.0; 3]).is_ok(), "an error leaves the sampler usable");
    }
    let overflowing = SamplerOptions { logit_bias: vec![(1, f32::MAX)], ..plain() };
    let found = sampler(overflowing, 2).sample(&[0.0, f32::MAX]);
    assert_eq!(found, Err(Error::BadLogit { token: 1, value: f32::INFINITY }));
}

#[test]
fn a_vocabulary_without_tokens_has_no_candidate() {
    assert_eq!(sampler(plain(), 0).sample(&[]), Err(Error::NoCandidate { n_vocab: 0 }));
}

#[test]
fn values_out_of_range_are_refused() {
    type Set = fn(&mut SamplerOptions, f32);
    let cases: [(&str, Set, &[f32], &[f32]); 6] = [
        ("temp", |o, v| o.temp = v, &[-0.1], &[0.0, 5.0]),
        ("top-p", |o, v| o.top_p = v, &[-0.1, 1.1], &[0.0, 1.0]),
        ("min-p", |o, v| o.min_p = v, &[-0.1, 1.1], &[0.0, 1.0]),
        ("repeat-penalty", |o, v| o.repeat_penalty = v, &[0.0, -1.0], &[0.5, 1.5]),
        ("presence-penalty", |o, v| o.presence_penalty = v, &[], &[-2.0, 2.0]),
        ("frequency-penalty", |o, v| o.frequency_penalty = v, &[], &[-2.0, 2.0]),
    ];
    for (name, set, refused, taken) in cases {
        for &wrong in refused.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            let mut options = SamplerOptions::default();
            set(&mut options, wrong);
            match options.validate() {
                Err(Error::OutOfRange { option, value, .. }) => {
                    assert_eq!((option, value.to_bits()), (name, wrong.to_bits()));
                }
                other => panic!("{name} {wrong}: {other:?}"),
            }
            assert!(Sampler::new(options, 3, &[]).is_err());
        }
        for &right in taken {
            let mut options = SamplerOptions::default();
            set(&mut options, right);
            assert_eq!(options.validate(), Ok(()), "{name} {right}");
        }
    }
    let error = SamplerOptions { temp: -1.0, ..plain() }.validate().unwrap_err();
    assert_eq!(error.to_string(), "--temp: '-1' is out of range; expected 0 or more");
}

#[test]
fn biases_and_tokens_that_cannot_be_are_refused() {
    let biased = |entry| SamplerOptions { logit_bias: vec![(0, 1.0), entry], ..plain() };
    assert_eq!(biased((1, f32::INFINITY)).validate(), Err(Error::BadBias { token: 1, value: f32::INFINITY }));
    assert!(matches!(biased((1, f32::NAN)).validate(), Err(Error::BadBias { token: 1, .. })));
    assert_eq!(biased((1, f32::NEG_INFINITY)).validate(), Ok(()));
    let outside = Error::TokenOutsideVocabulary { token: 3, n_vocab: 3 };
    assert_eq!(Sampler::new(biased((3, 1.0)), 3, &[]).unwrap_err(), outside);
    let ignoring = SamplerOptions { ignore_eos: true, ..plain() };
    assert_eq!(Sampler::new(ignoring, 3, &[3]).unwrap_err(), outside);
    assert_eq!(sampler(plain(), 3).accept(3), Err(outside));
}

#[test]
fn defaults_are_those_of_llama_cpp() {
    let defaults = SamplerOptions::default();
    assert_eq!((defaults.temp, defaults.top_k, defaults.top_p, defaults.min_p), (0.8, 40, 0.95, 0.05));
    assert_eq!((defaults.repeat_last_n, defaults.repeat_penalty), (Some(64), 1.0));
    assert_eq!((defaults.presence_penalty, defaults.frequency_penalty), (0.0, 0.0));
    assert_eq!((defaults.seed, defaults.ignore_eos, defaults.logit_bias), (None, false, vec![]));
    assert_eq!(SamplerOptions::default().validate(), Ok(()));
}

/// Logits of any size of vocabulary, some equal, some `-inf`, one at least finite.
fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![8 => -20.0f32..20.0, 2 => (-8i8..8).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY)];
    let shape = prop_oneof![1usize..50, 1usize..3_000];
    (shape, any::<prop::sample::Index>(), -5.0f32..5.0).prop_flat_map(move |(n, at, finite)| {
        prop::collection::vec(logit.clone(), n).prop_map(move |mut logits| {
            logits[at.index(n)] = finite;
            logits
        })
    })
}

/// The token that the chain draws first must be the reference's for that number, in the chain's order of candidates.
fn check_first_draw(options: SamplerOptions, logits: &[f32], sorted: bool) -> Result<(), TestCaseError> {
    let mut expected = reference(&options, logits);
    if !sorted {
        expected.sort_by_key(|(id, _)| *id);
    }
    // The stream's first number is read off a vocabulary of 2¹⁴ equals: its upper 14 bits.
    const N_EQUALS: usize = 1 << 14;
    let u =
        f64::from(draw(SamplerOptions { seed: options.seed, ..plain() }, &vec![0.0; N_EQUALS], 1)[0]) / N_EQUALS as f64;
    let id = draw(options, logits, 1)[0];
    let at = expected.iter().position(|(other, _)| *other == id);
    prop_assert!(at.is_some(), "{} is not among {:?}", id, expected);
    let before: f64 = expected[..at.unwrap()].iter().map(|(_, share)| share).sum();
    let share = expected[at.unwrap()].1;
    // The number is known to 2⁻¹⁴; both sums are f64 over at most 3,000 terms, 3,000 · 2⁻⁵³ ≪ 2⁻³⁰.
    let slack = (-30f64).exp2();
    prop_assert!(
        before <= u + 1.0 / N_EQUALS as f64 + slack && u <= before + share + slack,
        "u {} of {}+{}",
        u,
        before,
        share
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn alternatives_are_a_full_sort_cut_off(logits in any_logits(), n_probs in 0u32..700) {
        let sampled = sampler(SamplerOptions { n_probs, ..greedy() }, logits.len()).sample(&logits).unwrap();
        let mut expected: Vec<u32> = reference(&plain(), &logits).iter().map(|(id, _)| *id).collect();
        prop_assert_eq!(sampled.id, expected[0]);
        expected.truncate(n_probs as usize);
        prop_assert_eq!(sampled.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn top_k_keeps_what_a_full_sort_does(logits in any_logits(), top_k in 1u32..700, seed: u64) {
        check_first_draw(SamplerOptions { top_k, seed: Some(seed), ..plain() }, &logits, true)?;
    }

    #[test]
    fn top_p_keeps_what_a_full_sort_does(logits in any_logits(), top_p in 0.0f32..1.0, seed: u64) {
        check_first_draw(SamplerOptions { top_p, seed: Some(seed), ..plain() }, &logits, true)?;
    }

    #[test]
    fn min_p_keeps_what_a_full_sort_does(logits in any_logits(), min_p in 0.0f32..=1.0, seed: u64) {
        check_first_draw(SamplerOptions { min_p, seed: Some(seed), ..plain() }, &logits, false)?;
    }

    #[test]
    fn the_whole_chain_keeps_what_a_full_sort_does(
        logits in any_logits(),
        (top_k, top_p, min_p, temp, seed) in (1u32..700, 0.0f32..1.0, 0.0f32..1.0, 0.05f32..4.0, any::<u64>()),
    ) {
        check_first_draw(SamplerOptions { temp, top_k, top_p, min_p, seed: Some(seed), ..plain() }, &logits, true)?;
    }
}

/// As the device does it: the `per_part` largest of each `part` logits, in no order.
fn likeliest(logits: &[f32], part: usize, per_part: usize) -> Likeliest {
    let mut found = Likeliest { per_part, ..Likeliest::default() };
    for (p, values) in logits.chunks(part).enumerate() {
        let mut ranked: Vec<usize> = (0..values.len()).collect();
        ranked.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        ranked.truncate(per_part);
        ranked.sort_by_key(|i| i * 7 % values.len());
        found.ids.extend(ranked.iter().map(|&i| (p * part + i) as u32));
        found.logits.extend(ranked.iter().map(|&i| values[i]));
        found.ids.resize((p + 1) * per_part, u32::MAX);
        found.logits.resize((p + 1) * per_part, f32::NEG_INFINITY);
    }
    found
}

proptest! {
    #[test]
    fn the_likeliest_tokens_give_what_all_logits_give(
        logits in prop::collection::vec(prop_oneof![9 => -8.0f32..8.0, 1 => Just(1.5f32)], 1..300),
        top_k in 1u32..20,
        top_p in 0.3f32..1.0,
        banned in prop::collection::vec(0u32..300, 0..40),
        part in 16usize..80,
        temp in prop_oneof![Just(0.0f32), 0.5f32..2.0],
        seed: u64,
    ) {
        let bans = banned.iter().filter(|&&id| (id as usize) < logits.len()).map(|&id| (id, f32::NEG_INFINITY));
        let options = SamplerOptions { top_k, top_p, temp, seed: Some(seed), logit_bias: bans.collect(), ..plain() };
        let mut by_all = sampler(options.clone(), logits.len());
        let mut by_likeliest = sampler(options, logits.len());
        let likeliest = likeliest(&logits, part, 16);
        for _ in 0..8 {
            match by_likeliest.sample_likeliest(&likeliest) {
                // What was left out could matter: nothing was drawn, and all logits say the rest.
                Ok(None) => prop_assert_eq!(by_likeliest.sample(&logits).unwrap(), by_all.sample(&logits).unwrap()),
                Ok(Some(found)) => prop_assert_eq!(found.id, by_all.sample(&logits).unwrap().id),
                Err(error) => prop_assert_eq!(error, by_all.sample(&logits).unwrap_err()),
            }
        }
    }
}

#[test]
fn likeliest_tokens_suffice_until_bans_or_a_large_top_k_reach_past_them() {
    let logits: Vec<f32> = (0..200).map(|i| (i % 100) as f32 / 10.0).collect();
    let found = likeliest(&logits, 100, 16);
    let run = |top_k, banned: Vec<u32>| {
        let logit_bias = banned.into_iter().map(|id| (id, f32::NEG_INFINITY)).collect();
        let options = SamplerOptions { top_k, logit_bias, ..plain() };
        sampler(options, 200).sample_likeliest(&found).unwrap().is_some()
    };
    // Each part has its sixteen: 99 down to 84. The 31st of both is above 84, which a token left out could equal.
    assert!(run(30, vec![]));
    assert!(!run(31, vec![]));
    assert!(!run(30, vec![99]));
    assert!(run(29, vec![99]));
}

#[test]
fn likeliest_tokens_will_not_do_where_logits_change() {
    let takes = |options: SamplerOptions| sampler(options, 100).takes_likeliest();
    let fits = SamplerOptions { top_k: 40, ..plain() };
    assert!(takes(fits.clone()));
    assert!(takes(SamplerOptions { logit_bias: vec![(3, f32::NEG_INFINITY)], ..fits.clone() }));
    assert!(!takes(SamplerOptions { logit_bias: vec![(3, -1.0)], ..fits.clone() }));
    assert!(!takes(SamplerOptions { repeat_penalty: 1.1, ..fits.clone() }));
    assert!(!takes(SamplerOptions { n_probs: 1, ..fits.clone() }));
    assert!(takes(SamplerOptions { temp: 0.0, top_k: 0, ..fits.clone() }));
    assert!(!takes(SamplerOptions { top_k: 0, ..fits }));
    let nan = Likeliest { per_part: 1, ids: vec![7], logits: vec![f32::NAN] };
    let options = SamplerOptions { top_k: 4, ..plain() };
    assert!(matches!(sampler(options, 100).sample_likeliest(&nan), Err(Error::BadLogit { token: 7, .. })));
}
