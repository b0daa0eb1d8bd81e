//! Logits to a token: llama.cpp's default chain under llama.cpp's names.
//!
//! Order: logit bias, penalties, top-k, top-p, min-p, temperature, draw. Invariants: pure; the same options, seed,
//! accepted tokens and logits give the same tokens; a value out of range is refused, never clamped; logits that are no
//! numbers are an error, never a token.
//!
//! The random stream is the ChaCha8 keystream of crate `chacha20` (key: the seed, little-endian, then zeros; nonce 0),
//! so it is fixed by the cipher's definition and not by a crate's version; `rand`'s own `StdRng` promises no such thing.
//! The step from stream to token is written here for the same reason.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet, VecDeque};

use chacha20::ChaCha8Rng;
use rand::{Rng, SeedableRng};

/// How to choose tokens; defaults are llama.cpp's.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits that are left after all filters; 0 takes the likeliest token, the lowest id among equals.
    /// 0 or more, finite. Default 0.8.
    pub temp: f32,
    /// Keeps that many of the likeliest tokens; 0 keeps all. Default 40.
    pub top_k: u32,
    /// Keeps the fewest likeliest tokens whose probabilities, among those that top-k left, sum up to this or more;
    /// always one at least. 0 to 1, 1 keeps all. Default 0.95.
    pub top_p: f32,
    /// Keeps tokens at least this times as likely as the likeliest. 0 to 1, 0 keeps all. Default 0.05.
    pub min_p: f32,
    /// Seed of the random stream; none takes one from the system ([`Sampler::seed`] tells which). Default none.
    pub seed: Option<u64>,
    /// How many of the last accepted tokens the penalties look at; none looks at all, 0 at none. Default 64.
    pub repeat_last_n: Option<u32>,
    /// Divides positive and multiplies other logits of seen tokens. More than 0, finite; 1 does nothing. Default 1.
    pub repeat_penalty: f32,
    /// Is subtracted once from the logits of seen tokens. Finite. Default 0.
    pub presence_penalty: f32,
    /// Is subtracted from the logits of seen tokens as often as they were seen. Finite. Default 0.
    pub frequency_penalty: f32,
    /// Is added to the logits of these tokens, before all else; `-inf` bans one. Entries for one token add up.
    pub logit_bias: Vec<(u32, f32)>,
    /// Bans the tokens that end generation. Default false.
    pub ignore_eos: bool,
    /// How many alternatives [`Sampled::top`] lists. Default 0.
    pub n_probs: u32,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            seed: None,
            repeat_last_n: Some(64),
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            ignore_eos: false,
            n_probs: 0,
        }
    }
}

impl SamplerOptions {
    /// Checks each value against the range that its field states.
    ///
    /// # Errors
    ///
    /// - [`Error::OutOfRange`] for the first value that is not in its range.
    /// - [`Error::BadBias`] for a logit bias that is neither finite nor `-inf`.
    pub fn validate(&self) -> Result<(), Error> {
        let unit = 0.0..=1.0;
        let checks = [
            ("temp", self.temp, self.temp >= 0.0, "0 or more"),
            ("top-p", self.top_p, unit.contains(&self.top_p), "0 to 1"),
            ("min-p", self.min_p, unit.contains(&self.min_p), "0 to 1"),
            ("repeat-penalty", self.repeat_penalty, self.repeat_penalty > 0.0, "more than 0"),
            ("presence-penalty", self.presence_penalty, true, "a finite number"),
            ("frequency-penalty", self.frequency_penalty, true, "a finite number"),
        ];
        for (option, value, in_range, range) in checks {
            if !(value.is_finite() && in_range) {
                return Err(Error::OutOfRange { option, value, range });
            }
        }
        match self.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            Some(&(token, value)) => Err(Error::BadBias { token, value }),
            None => Ok(()),
        }
    }
}

/// A chosen token. Log-probabilities are natural logarithms of the softmax of the logits as they were given: at
/// temperature 1, before bias, penalties and filters. So they say what the model thinks, not what the options made of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The [`SamplerOptions::n_probs`] likeliest tokens with their log-probabilities, likeliest first, lower id first
    /// among equals. Fewer if fewer tokens are possible at all.
    pub top: Vec<(u32, f32)>,
}

/// The likeliest tokens of each part of a vocabulary, as the device finds them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Likeliest {
    /// Tokens of each part. A part with fewer is filled up with logits of −∞.
    pub per_part: usize,
    /// Their ids, part after part; within a part in no order.
    pub ids: Vec<u32>,
    /// Their logits.
    pub logits: Vec<f32>,
}

/// Chooses tokens for one sequence.
#[derive(Debug)]
pub struct Sampler {
    options: SamplerOptions,
    n_vocab: usize,
    /// Summed logit bias, the ban of end-of-generation tokens included.
    bias: Vec<(u32, f32)>,
    /// The tokens that `bias` bans.
    banned: HashSet<u32>,
    seed: u64,
    rng: ChaCha8Rng,
    /// The tokens the penalties look at, oldest first, and how often each stands there.
    recent: VecDeque<u32>,
    counts: HashMap<u32, u32>,
    /// Scratch, kept for its allocation: logits after bias and penalties, and what the filters left of them.
    adjusted: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler that has accepted no token yet. `eog_ids` are the tokens that `ignore_eos` bans.
    ///
    /// # Errors
    ///
    /// - As [`SamplerOptions::validate`].
    /// - [`Error::TokenOutsideVocabulary`] for a biased or end-of-generation token that is not below `n_vocab`.
    pub fn new(options: SamplerOptions, n_vocab: usize, eog_ids: &[u32]) -> Result<Sampler, Error> {
        options.validate()?;
        let banned = if options.ignore_eos { eog_ids } else { &[] };
        let mut bias = options.logit_bias.clone();
        bias.extend(banned.iter().map(|&id| (id, f32::NEG_INFINITY)));
        if let Some(&(token, _)) = bias.iter().find(|&&(id, _)| id as usize >= n_vocab) {
            return Err(Error::TokenOutsideVocabulary { token, n_vocab });
        }
        let seed = options.seed.unwrap_or_else(rand::random);
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Ok(Sampler {
            options,
            n_vocab,
            banned: bias.iter().filter(|(_, bias)| *bias == f32::NEG_INFINITY).map(|&(id, _)| id).collect(),
            bias,
            seed,
            rng: ChaCha8Rng::from_seed(key),
            recent: VecDeque::new(),
            counts: HashMap::new(),
            adjusted: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The seed in use, to repeat a run whose seed came from the system.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Records a token of the sequence, prompt or chosen, for the penalties.
    ///
    /// # Errors
    ///
    /// [`Error::TokenOutsideVocabulary`] if `token` is not below the vocabulary size.
    pub fn accept(&mut self, token: u32) -> Result<(), Error> {
        if token as usize >= self.n_vocab {
            return Err(Error::TokenOutsideVocabulary { token, n_vocab: self.n_vocab });
        }
        self.recent.push_back(token);
        *self.counts.entry(token).or_default() += 1;
        let limit = self.options.repeat_last_n.map_or(usize::MAX, |n| n as usize);
        if self.recent.len() > limit
            && let Some(oldest) = self.recent.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
        Ok(())
    }

    /// Chooses a token by `logits`, shape `[n_vocab]`. Does not accept it. Takes one number from the random stream, none
    /// if the temperature is 0.
    ///
    /// # Errors
    ///
    /// - [`Error::LogitCount`] unless there is a logit per token.
    /// - [`Error::BadLogit`] for a logit that is NaN or `+inf`, as given or after bias and penalties.
    /// - [`Error::NoCandidate`] if every logit is `-inf`.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, Error> {
        if logits.len() != self.n_vocab {
            return Err(Error::LogitCount { found: logits.len(), expected: self.n_vocab });
        }
        check_logits(logits)?;
        self.adjusted.clear();
        self.adjusted.extend_from_slice(logits);
        self.apply_bias_and_penalties()?;
        let id = if self.options.temp == 0.0 { argmax(&self.adjusted) } else { self.draw() };
        let id = id.ok_or(Error::NoCandidate { n_vocab: self.n_vocab })?;

        let max = largest_of(logits);
        let log_sum = sum_exp(logits, max).ln();
        let logprob = |logit: f32| (f64::from(logit) - f64::from(max) - log_sum) as f32;
        largest(logits, self.options.n_probs as usize, &mut self.candidates);
        let top = self.candidates.iter().map(|candidate| (candidate.id, logprob(candidate.logit))).collect();
        Ok(Sampled { id, logprob: logprob(logits[id as usize]), top })
    }

    /// Whether [`sample_likeliest`](Self::sample_likeliest) can do for [`sample`](Self::sample): a top-k or temperature 0, and
    /// nothing that changes logits other than to ban tokens.
    pub fn takes_likeliest(&self) -> bool {
        let options = &self.options;
        let penalizes =
            options.repeat_penalty != 1.0 || options.presence_penalty != 0.0 || options.frequency_penalty != 0.0;
        let bans = self.bias.iter().all(|&(_, bias)| bias == f32::NEG_INFINITY);
        (options.temp == 0.0 || options.top_k > 0) && options.n_probs == 0 && bans && !penalizes
    }

    /// Whether the token is never chosen.
    pub fn bans(&self, token: u32) -> bool {
        self.banned.contains(&token)
    }

    /// As [`sample`](Self::sample), from the likeliest tokens alone: the same token for the same random stream, without its
    /// log-probability (NaN). None, and nothing taken from the stream, if what was left out could matter.
    ///
    /// # Errors
    ///
    /// As [`sample`](Self::sample), but for [`Error::LogitCount`].
    ///
    /// # Panics
    ///
    /// Unless [`takes_likeliest`](Self::takes_likeliest).
    pub fn sample_likeliest(&mut self, likeliest: &Likeliest) -> Result<Option<Sampled>, Error> {
        assert!(self.takes_likeliest(), "options that need all logits");
        let SamplerOptions { temp, top_k, top_p, min_p, .. } = self.options;
        let top_k = if temp == 0.0 { 1 } else { top_k as usize };
        if let Err(Error::BadLogit { token, value }) = check_logits(&likeliest.logits) {
            return Err(Error::BadLogit { token: likeliest.ids[token as usize], value });
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(likeliest.ids.iter().zip(&likeliest.logits).map(|(&id, &logit)| Candidate { id, logit }));
        // However many of the likeliest are banned, that many more are enough.
        let enough = top_k.saturating_add(self.banned.len());
        if enough < candidates.len() {
            candidates.select_nth_unstable_by(enough, by_rank);
            candidates.truncate(enough);
        }
        candidates.retain(|candidate| candidate.logit > f32::NEG_INFINITY && !self.banned.contains(&candidate.id));
        candidates.sort_unstable_by(by_rank);
        candidates.truncate(top_k);
        // A part that is full may have left out a token like its last one.
        let last = if candidates.len() == top_k { candidates.last().map(|candidate| candidate.logit) } else { None };
        for part in likeliest.logits.chunks(likeliest.per_part) {
            let lowest = part.iter().copied().fold(f32::INFINITY, f32::min);
            let has_all = lowest == f32::NEG_INFINITY;
            if !has_all && last.is_none_or(|last| lowest >= last) {
                return Ok(None);
            }
        }
        let Some(&Candidate { id, logit: max }) = candidates.first() else {
            return Err(Error::NoCandidate { n_vocab: self.n_vocab });
        };
        if temp == 0.0 {
            return Ok(Some(Sampled { id, logprob: f32::NAN, top: Vec::new() }));
        }
        let id = filter_and_pick(candidates, max, [top_p, min_p, temp], uniform(&mut self.rng));
        let id = id.ok_or(Error::NoCandidate { n_vocab: self.n_vocab })?;
        Ok(Some(Sampled { id, logprob: f32::NAN, top: Vec::new() }))
    }

    fn apply_bias_and_penalties(&mut self) -> Result<(), Error> {
        let SamplerOptions { repeat_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        for &(id, bias) in &self.bias {
            self.adjusted[id as usize] += bias;
        }
        for (&id, &count) in &self.counts {
            let logit = &mut self.adjusted[id as usize];
            *logit = if *logit <= 0.0 { *logit * repeat_penalty } else { *logit / repeat_penalty };
            *logit -= count as f32 * frequency_penalty + presence_penalty;
        }
        // Finite values far out can still overflow together; only logits touched above can have.
        for &id in self.bias.iter().map(|(id, _)| id).chain(self.counts.keys()) {
            let value = self.adjusted[id as usize];
            if value.is_nan() || value == f32::INFINITY {
                return Err(Error::BadLogit { token: id, value });
            }
        }
        Ok(())
    }

    /// The filters and the draw. None if no logit is above `-inf`.
    fn draw(&mut self) -> Option<u32> {
        let SamplerOptions { temp, top_k, top_p, min_p, .. } = self.options;
        let candidates = &mut self.candidates;
        let max = largest_of(&self.adjusted);
        if top_k > 0 {
            largest(&self.adjusted, top_k as usize, candidates);
            return filter_and_pick(candidates, max, [top_p, min_p, temp], uniform(&mut self.rng));
        }
        let total = sum_exp(&self.adjusted, max);
        candidates.clear();
        candidates.extend(possible(&self.adjusted).filter(likely(max, min_p)));
        if top_p < 1.0 {
            keep_nucleus(candidates, max, f64::from(top_p) * total);
        }
        pick(candidates, max, temp, uniform(&mut self.rng))
    }
}

/// Why options are refused or no token can be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("--{option}: '{value}' is out of range; expected {range}")]
    OutOfRange { option: &'static str, value: f32, range: &'static str },
    #[error("--logit-bias: '{value}' for token {token} is out of range; expected a finite number or -inf")]
    BadBias { token: u32, value: f32 },
    #[error("token id {token} is outside the vocabulary of {n_vocab} tokens")]
    TokenOutsideVocabulary { token: u32, n_vocab: usize },
    #[error("{found} logits for a vocabulary of {expected} tokens")]
    LogitCount { found: usize, expected: usize },
    #[error("logit of token {token} is {value}; expected a finite number or -inf")]
    BadLogit { token: u32, value: f32 },
    #[error("all {n_vocab} tokens are banned: every logit is -inf")]
    NoCandidate { n_vocab: usize },
}

/// How many logits the scans take at once.
const LANES: usize = 16;
/// How many terms a lane of [`sum_exp`] adds in f32.
const SUM_BLOCK: usize = 8;

/// A token that may be chosen. Its logit is above `-inf`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Likelier first, lower id first among equals.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    let by_logit = b.logit.partial_cmp(&a.logit).expect("`check_logits` refused NaN");
    by_logit.then(a.id.cmp(&b.id))
}

fn check_logits(logits: &[f32]) -> Result<(), Error> {
    // Comparisons alone, without a way out between them, become vector code; only a wrong logit costs the search.
    if logits.iter().fold(true, |sound, &logit| sound & (logit < f32::INFINITY)) {
        return Ok(());
    }
    match (0u32..).zip(logits).find(|(_, logit)| logit.is_nan() || **logit == f32::INFINITY) {
        Some((token, &value)) => Err(Error::BadLogit { token, value }),
        None => Ok(()),
    }
}

fn possible(logits: &[f32]) -> impl Iterator<Item = Candidate> {
    (0u32..).zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY).map(|(id, &logit)| Candidate { id, logit })
}

/// Id of the largest logit, the lowest among equals; none if all are `-inf`.
fn argmax(logits: &[f32]) -> Option<u32> {
    let max = largest_of(logits);
    possible(logits).find(|candidate| candidate.logit == max).map(|candidate| candidate.id)
}

/// Puts the `k` likeliest tokens into `out`, in order. A scan against a threshold: the buffer is cut back to `k` each
/// time it fills, which costs O(1) per entry it took, so O(n) in all besides sorting `k`.
fn largest(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    if k == 0 {
        return;
    }
    let room = k.saturating_mul(2).max(256);
    let mut threshold = f32::NEG_INFINITY;
    for (first, chunk) in (0u32..).step_by(LANES).zip(logits.chunks(LANES)) {
        if !chunk.iter().fold(false, |any, &logit| any | (logit > threshold)) {
            continue;
        }
        for (id, &logit) in (first..).zip(chunk) {
            // An equal of the k-th comes later, so has a higher id, and loses.
            if logit > threshold {
                out.push(Candidate { id, logit });
                if out.len() == room {
                    threshold = out.select_nth_unstable_by(k - 1, by_rank).1.logit;
                    out.truncate(k);
                }
            }
        }
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, by_rank);
        out.truncate(k);
    }
    out.sort_unstable_by(by_rank);
}

/// What min-p keeps. Each filter keeps a likeliest part, so min-p may go first as long as top-p counts what min-p removed.
fn likely(max: f32, min_p: f32) -> impl Fn(&Candidate) -> bool {
    let lowest = if min_p > 0.0 { f64::from(min_p).ln() } else { f64::NEG_INFINITY };
    move |candidate| f64::from(candidate.logit) - f64::from(max) >= lowest
}

/// The filters after top-k, and the draw; `candidates` are in order and not empty, `max` the largest logit.
fn filter_and_pick(candidates: &mut Vec<Candidate>, max: f32, [top_p, min_p, temp]: [f32; 3], u: f64) -> Option<u32> {
    let total: f64 = candidates.iter().map(|candidate| f64::from(exp_of_nonpositive(candidate.logit - max))).sum();
    candidates.retain(likely(max, min_p));
    if top_p < 1.0 {
        keep_nucleus(candidates, max, f64::from(top_p) * total);
    }
    pick(candidates, max, temp, u)
}

/// Cuts `candidates` down to the fewest likeliest whose `exp(logit − max)` sum up to `goal` or more, in order. Sorts
/// only as far as it must look: a share that grows eightfold, so all of it only for a very flat distribution.
fn keep_nucleus(candidates: &mut Vec<Candidate>, max: f32, goal: f64) {
    let (mut sum, mut n_sorted) = (0.0, 0);
    while n_sorted < candidates.len() {
        let end = candidates.len().min(256.max(8 * n_sorted));
        if end < candidates.len() {
            candidates[n_sorted..].select_nth_unstable_by(end - n_sorted, by_rank);
        }
        candidates[n_sorted..end].sort_unstable_by(by_rank);
        for at in n_sorted..end {
            sum += f64::from(exp_of_nonpositive(candidates[at].logit - max));
            if sum >= goal {
                candidates.truncate(at + 1);
                return;
            }
        }
        n_sorted = end;
    }
}

/// The candidate that `u`, uniform in [0, 1), falls on when each has a share of `exp(logit / temp)`. Turns the logits
/// into those shares.
fn pick(candidates: &mut [Candidate], max: f32, temp: f32, u: f64) -> Option<u32> {
    // The largest becomes exp(0), so neither a tiny temperature nor large logits overflow.
    for candidate in candidates.iter_mut() {
        candidate.logit = exp_of_nonpositive((candidate.logit - max) / temp);
    }
    let target = u * candidates.iter().map(|candidate| f64::from(candidate.logit)).sum::<f64>();
    let mut sum = 0.0;
    for candidate in candidates.iter() {
        sum += f64::from(candidate.logit);
        if target < sum {
            return Some(candidate.id);
        }
    }
    // u · total can round up to the total.
    candidates.iter().rfind(|candidate| candidate.logit > 0.0).map(|candidate| candidate.id)
}

/// Uniform in [0, 1): the high 53 bits of the stream's next 64.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * (-53f64).exp2()
}

/// The largest logit; `-inf` if there is none.
fn largest_of(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in logits.chunks(LANES) {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Σ exp(logit − max), within 2⁻²¹ of itself: a term is off by 2⁻²² and by the rounding of the difference d, d · 2⁻²⁴,
/// which exp(−d) outweighs; eight terms at a time add up in f32, 7 · 2⁻²⁴; the rest is f64.
fn sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut total = 0.0;
    for block in logits.chunks(SUM_BLOCK * LANES) {
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane += exp_of_nonpositive(logit - max);
            }
        }
        let rest = rest.iter().map(|&logit| exp_of_nonpositive(logit - max));
        total += lanes.into_iter().chain(rest).map(f64::from).sum::<f64>();
    }
    total
}

/// exp(x) for x ≤ 0 within 2⁻²² of itself, and 0 below −87, near the smallest normal f32. Without branch or call, so
/// that loops over 200,000 logits become vector code, and without the system's libm, so the same on every machine.
///
/// x = k ln 2 + r with |r| ≤ ln 2 / 2 (Cody and Waite), then the polynomial of Cephes' `expf`.
#[inline]
fn exp_of_nonpositive(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    // ln 2 in two parts, the first (355 / 512) short enough that k times it is exact.
    let r = x - k * 0.693_359_4 + k * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { (p * r * r + r + 1.0) * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_within_its_bound() {
        for step in 0..=870_000 {
            let x = -(step as f32) * 1e-4;
            let (found, exact) = (f64::from(exp_of_nonpositive(x)), f64::from(x).exp());
            assert!((found / exact - 1.0).abs() <= (-22f64).exp2(), "exp({x}) = {found}, expected {exact}");
        }
        assert_eq!([0.0, -87.5, f32::MIN, f32::NEG_INFINITY].map(exp_of_nonpositive), [1.0, 0.0, 0.0, 0.0]);
    }
}
