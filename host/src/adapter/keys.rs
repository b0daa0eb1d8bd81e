//! Reads hyper-parameters: the keys under an architecture's name, each checked for its range.

use super::{D_HEAD_STEP, Error, GROUP, MAX_D_HEAD, MAX_SIZE};
use crate::gguf::{FromValue, Metadata, Strings, Value, ValueKind, ValueType};
use std::fmt::Display;

/// The keys of one architecture: `head_count` is asked for as `attention.head_count` and found under
/// `gpt2.attention.head_count`.
pub(super) struct Keys<'a> {
    architecture: &'static str,
    metadata: &'a Metadata,
}

impl<'a> Keys<'a> {
    pub(super) fn new(architecture: &'static str, metadata: &'a Metadata) -> Self {
        Self { architecture, metadata }
    }

    fn full(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A size that must be there, from 1 to `most`.
    pub(super) fn size(&self, name: &str, most: usize) -> Result<usize, Error> {
        let key = self.full(name);
        let found = self.metadata.required(&key)?;
        in_range(key, found, most)
    }

    /// A size that may be given once or layer by layer, but has one value, from 1 to `most`.
    pub(super) fn size_of_all_layers(&self, name: &str, n_layer: usize, most: usize) -> Result<usize, Error> {
        let key = self.full(name);
        if !matches!(self.metadata.value(&key).map(Value::kind), Some(ValueKind::Array(_))) {
            return self.size(name, most);
        }
        let found: Vec<usize> = self.metadata.required(&key)?;
        if found.len() != n_layer {
            return Err(Error::LayerCount { key, found: found.len(), expected: n_layer });
        }
        match found.iter().position(|&other| other != found[0]) {
            Some(layer) => Err(Error::LayersDiffer { key, first: found[0], layer, other: found[layer] }),
            None => in_range(key, found[0], most), // There is a layer 0: `n_layer` is at least 1.
        }
    }

    /// `found`, a length that kernels read in whole groups of elements.
    pub(super) fn whole_groups(&self, name: &str, found: usize) -> Result<usize, Error> {
        if found.is_multiple_of(GROUP) { Ok(found) } else { Err(Error::Groups { what: self.full(name), found }) }
    }

    /// The number of key and value heads, which is that of the query heads where the file does not say.
    pub(super) fn n_head_kv(&self, n_head: usize, n_layer: usize) -> Result<usize, Error> {
        let name = "attention.head_count_kv";
        if self.metadata.value(&self.full(name)).is_none() {
            return Ok(n_head);
        }
        let n_head_kv = self.size_of_all_layers(name, n_layer, MAX_SIZE)?;
        divide("attention.head_count", n_head, "attention.head_count_kv", n_head_kv)?;
        Ok(n_head_kv)
    }

    /// The width of a head, `attention.key_length`, which must be there.
    pub(super) fn d_head(&self) -> Result<usize, Error> {
        self.head_width(self.required("attention.key_length")?)
    }

    /// The width of a head: `attention.key_length`, else an equal share of the embedding.
    pub(super) fn d_head_or_share(&self, d_model: usize, n_head: usize) -> Result<usize, Error> {
        match self.optional("attention.key_length")? {
            Some(d_head) => self.head_width(d_head),
            None => self.head_width(divide("embedding_length", d_model, "attention.head_count", n_head)?),
        }
    }

    fn head_width(&self, d_head: usize) -> Result<usize, Error> {
        if d_head == 0 || !d_head.is_multiple_of(D_HEAD_STEP) || d_head > MAX_D_HEAD {
            return Err(Error::HeadWidth { found: d_head });
        }
        self.only("attention.value_length", d_head)?;
        Ok(d_head)
    }

    /// The number of tokens: the length of the token list, or what the file states if it comes without a tokenizer.
    pub(super) fn n_vocab(&self) -> Result<usize, Error> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        if self.metadata.value(TOKENS).is_none() && self.optional::<usize>("vocab_size")?.is_some() {
            return self.size("vocab_size", MAX_SIZE);
        }
        let tokens: Strings = self.metadata.required(TOKENS)?;
        in_range(TOKENS.to_owned(), tokens.len(), MAX_SIZE)
    }

    /// Which layers see a window only. A number p says that of every p layers all but the last do; an array says it of
    /// each layer, in bools or in 0 and 1; the file need not say it.
    pub(super) fn window_pattern(&self, name: &str, n_layer: usize, default: usize) -> Result<Vec<bool>, Error> {
        let key = self.full(name);
        let of_layers: Vec<bool> = match self.metadata.value(&key) {
            Some(Value::Array(array)) if array.element() == ValueType::Bool => {
                array.iter().map(|value| value == Value::Bool(true)).collect()
            }
            Some(Value::Array(_)) => {
                let found: Vec<usize> = self.metadata.required(&key)?;
                if let Some((layer, &found)) = found.iter().enumerate().find(|&(_, &flag)| flag > 1) {
                    return Err(Error::OutOfRange { key: format!("{key}[{layer}]"), found, least: 0, most: 1 });
                }
                found.iter().map(|&flag| flag == 1).collect()
            }
            scalar => {
                let period = if scalar.is_some() { self.size(name, MAX_SIZE)? } else { default };
                (0..n_layer).map(|layer| layer % period < period - 1).collect()
            }
        };
        if of_layers.len() != n_layer {
            return Err(Error::LayerCount { key, found: of_layers.len(), expected: n_layer });
        }
        Ok(of_layers)
    }

    /// The ε of a normalization. Zero would divide a constant row by nothing.
    pub(super) fn epsilon(&self, name: &str) -> Result<f32, Error> {
        self.number(name, "above 0", |epsilon| epsilon > 0.0)
    }

    /// A finite number that must be there; `fits` says which are good, `expected` says it in words.
    pub(super) fn number(&self, name: &str, expected: &'static str, fits: fn(f32) -> bool) -> Result<f32, Error> {
        self.fitting(name, self.required(name)?, expected, fits)
    }

    /// As [`number`](Self::number), with a value for files that do not say.
    pub(super) fn number_or(
        &self,
        name: &str,
        default: f32,
        expected: &'static str,
        fits: impl Fn(f32) -> bool,
    ) -> Result<f32, Error> {
        self.fitting(name, self.optional(name)?.unwrap_or(default), expected, fits)
    }

    fn fitting(
        &self,
        name: &str,
        found: f32,
        expected: &'static str,
        fits: impl Fn(f32) -> bool,
    ) -> Result<f32, Error> {
        let fits = found.is_finite() && fits(found);
        if fits { Ok(found) } else { Err(Error::Number { key: self.full(name), found, expected }) }
    }

    /// A text that must be there.
    pub(super) fn text(&self, name: &str) -> Result<&'a str, Error> {
        self.required(name)
    }

    /// The refusal of a way to scale rotary positions.
    pub(super) fn rope_scaling(&self, name: &str, found: &str) -> Error {
        Error::RopeScaling { key: self.full(name), found: found.to_owned() }
    }

    /// Checks that a key, if it is there, has the one value that is implemented.
    pub(super) fn only<T: FromValue<'a> + PartialEq + Display>(&self, name: &str, expected: T) -> Result<(), Error> {
        match self.optional::<T>(name)? {
            Some(found) if found != expected => Err(Error::NotDefault {
                key: self.full(name),
                found: found.to_string(),
                expected: expected.to_string(),
            }),
            _ => Ok(()),
        }
    }

    fn required<T: FromValue<'a>>(&self, name: &str) -> Result<T, Error> {
        Ok(self.metadata.required(&self.full(name))?)
    }

    fn optional<T: FromValue<'a>>(&self, name: &str) -> Result<Option<T>, Error> {
        Ok(self.metadata.optional(&self.full(name))?)
    }
}

fn in_range(key: String, found: usize, most: usize) -> Result<usize, Error> {
    if (1..=most).contains(&found) { Ok(found) } else { Err(Error::OutOfRange { key, found, least: 1, most }) }
}

fn divide(what: &'static str, found: usize, by: &'static str, divisor: usize) -> Result<usize, Error> {
    if found.is_multiple_of(divisor) {
        Ok(found / divisor)
    } else {
        Err(Error::DoesNotDivide { what, found, by, divisor })
    }
}
