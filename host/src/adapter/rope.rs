//! Rotary positions, and YaRN, which stretches them over a longer context.

use std::f64::consts::PI;

/// How positions turn queries and keys.
///
/// Element `i` of a head makes a pair with element `i + n_dims / 2`, for `i < n_dims / 2`; at position p the pair is
/// turned by `p · inverse_frequencies[i]` and multiplied by the magnitude μ.
/// Source: Su et al., *RoFormer*, arXiv:2104.09864, in the half-split order of GPT-NeoX.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// The elements of a head that are turned: all, `d_head`.
    pub n_dims: usize,
    /// θ: pair `i` has the frequency θ^(−2i / n_dims). Above 1.
    pub base: f32,
    /// How frequencies are scaled for a context longer than that of the training; `None`: they are not.
    pub scaling: Option<YarnSpec>,
}

/// YaRN: high frequencies stay, low ones are divided by `factor`, those between are mixed. Source: Peng et al., *YaRN*,
/// arXiv:2309.00071, section 3.2.
#[derive(Debug, Clone, PartialEq)]
pub struct YarnSpec {
    /// s, how many times longer the context became; at least 1.
    pub factor: f32,
    /// The context before, in tokens.
    pub original_context: usize,
    /// Pairs that turn more often than this within the original context stay as they are; above `beta_slow`.
    pub beta_fast: f32,
    /// Pairs that turn less often than this are divided by `factor`; positive.
    pub beta_slow: f32,
    /// Multiplies the magnitude on top of YaRN's own `1 + 0.1 · ln(factor)`; 1 but for unusual files.
    pub attention_factor: f32,
}

impl RopeSpec {
    /// The angle per position of each pair, in radians, `[n_dims / 2]`, and the magnitude μ that multiplies sine and
    /// cosine. Both queries and keys are turned, so scores carry μ².
    ///
    /// `truncate` rounds YaRN's bounds outward to whole pairs, as llama.cpp does. gpt-oss was trained without: rounding
    /// changes nine of its 32 frequencies, one by 76 %.
    ///
    /// ```
    /// # use gpt_gamma::adapter::RopeSpec;
    /// let plain = RopeSpec { n_dims: 4, base: 10_000.0, scaling: None };
    /// assert_eq!(plain.inverse_frequencies(false), (vec![1.0, 0.01], 1.0));
    /// ```
    pub fn inverse_frequencies(&self, truncate: bool) -> (Vec<f64>, f64) {
        let (n, base) = (self.n_dims as f64, f64::from(self.base));
        let plain = (0..self.n_dims / 2).map(|i| base.powf(-2.0 * i as f64 / n));
        let Some(yarn) = &self.scaling else {
            return (plain.collect(), 1.0);
        };
        let (low, high) = yarn.correction_bounds(self, truncate);
        let factor = f64::from(yarn.factor);
        let scaled = plain.enumerate().map(|(i, frequency)| {
            // Bounds that meet make a step; the least width is llama.cpp's.
            let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            frequency * (1.0 - ramp) + frequency / factor * ramp
        });
        (scaled.collect(), f64::from(yarn.attention_factor) * (1.0 + 0.1 * factor.ln()))
    }
}

impl YarnSpec {
    /// The pairs between which `rope`'s frequencies are mixed: up to the first they stay, from the second on they are
    /// divided by `factor`. In units of pairs; `truncate` as for [`RopeSpec::inverse_frequencies`].
    pub fn correction_bounds(&self, rope: &RopeSpec, truncate: bool) -> (f64, f64) {
        let (n, base) = (rope.n_dims as f64, f64::from(rope.base));
        // The pair, fractional, that turns `n_turns` times within the original context.
        let pair = |n_turns: f32| {
            n * (self.original_context as f64 / (2.0 * PI * f64::from(n_turns))).ln() / (2.0 * base.ln())
        };
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        (low.max(0.0), high.min(n - 1.0))
    }
}
