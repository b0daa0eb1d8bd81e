//! Reads hyper-parameters: the keys under an architecture's name, each checked for its range.

use super::{Error, MAX_D_HEAD, MAX_SIZE};
use crate::gguf::{FromValue, Metadata, Strings, ValueKind};
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

    /// A size that may be given once or layer by layer, but has one value.
    pub(super) fn size_of_all_layers(&self, name: &str, n_layer: usize) -> Result<usize, Error> {
        let key = self.full(name);
        if !matches!(self.metadata.value(&key).map(|value| value.kind()), Some(ValueKind::Array(_))) {
            return self.size(name, MAX_SIZE);
        }
        let found: Vec<usize> = self.metadata.required(&key)?;
        if found.len() != n_layer {
            return Err(Error::LayerCount { key, found: found.len(), expected: n_layer });
        }
        match found.iter().position(|&other| other != found[0]) {
            Some(layer) => Err(Error::LayersDiffer { key, first: found[0], layer, other: found[layer] }),
            None => in_range(key, found[0], MAX_SIZE), // There is a layer 0: `n_layer` is at least 1.
        }
    }

    /// The number of key and value heads, which is that of the query heads where the file does not say.
    pub(super) fn n_head_kv(&self, n_head: usize, n_layer: usize) -> Result<usize, Error> {
        let name = "attention.head_count_kv";
        if self.metadata.value(&self.full(name)).is_none() {
            return Ok(n_head);
        }
        let n_head_kv = self.size_of_all_layers(name, n_layer)?;
        divide("attention.head_count", n_head, "attention.head_count_kv", n_head_kv)?;
        Ok(n_head_kv)
    }

    /// The width of a head: `attention.key_length`, else an equal share of the embedding.
    pub(super) fn d_head(&self, d_model: usize, n_head: usize) -> Result<usize, Error> {
        let d_head = match self.optional::<usize>("attention.key_length")? {
            Some(d_head) => d_head,
            None => divide("embedding_length", d_model, "attention.head_count", n_head)?,
        };
        if d_head == 0 || d_head % 2 != 0 || d_head > MAX_D_HEAD {
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

    /// The ε of a normalization. Zero would divide a constant row by nothing.
    pub(super) fn epsilon(&self, name: &str) -> Result<f32, Error> {
        let key = self.full(name);
        let found: f32 = self.metadata.required(&key)?;
        if found.is_finite() && found > 0.0 { Ok(found) } else { Err(Error::Epsilon { key, found }) }
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
