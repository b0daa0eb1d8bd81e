//! Models split over several files: which shard a file is, and what its neighbours are called.

use super::{Metadata, MetadataError};
use std::fmt;

/// The place of a file in a split model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// The number of this shard, from 0. Shard 0 holds the metadata of the model.
    pub no: usize,
    /// How many shards there are; at least 2.
    pub count: usize,
    /// How many tensors all shards hold together.
    pub n_tensors: usize,
}

impl Split {
    /// The split that `metadata` tells of; `None` for a model in a single file (`split.count` absent, 0 or 1).
    ///
    /// # Errors
    /// Those of [`Metadata::required`], for `split.no`, `split.count` and `split.tensors.count`.
    pub fn of(metadata: &Metadata) -> Result<Option<Self>, MetadataError> {
        match metadata.optional("split.count")? {
            None | Some(0 | 1) => Ok(None),
            Some(count) => Ok(Some(Self {
                no: metadata.required("split.no")?,
                count,
                n_tensors: metadata.required("split.tensors.count")?,
            })),
        }
    }
}

/// The name of a shard: `PREFIX-00001-of-00003.gguf` for shard 0 of 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardName<'a> {
    /// All before the numbers, without the hyphen.
    pub prefix: &'a str,
    /// The number of the shard, from 0: one less than in the name.
    pub no: usize,
    /// How many shards there are.
    pub count: usize,
}

impl<'a> ShardName<'a> {
    /// Splits a file name; `None` if it is not the name of a shard.
    pub fn parse(file_name: &'a str) -> Option<Self> {
        let (rest, count) = file_name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let five_digits = |text: &str| {
            (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse::<usize>().ok())?
        };
        Some(Self { prefix, no: five_digits(number)?.checked_sub(1)?, count: five_digits(count)? })
    }
}

impl fmt::Display for ShardName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:05}-of-{:05}.gguf", self.prefix, self.no + 1, self.count)
    }
}
