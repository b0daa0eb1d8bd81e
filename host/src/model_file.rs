//! A model on disk: one GGUF file or all shards of a split one, mapped into memory.
//!
//! The one place that opens model files. What the bytes mean is [`crate::gguf`]'s business.

use crate::gguf::{self, Metadata, MetadataError, ShardName, Split, TensorInfo};
use memmap2::Mmap;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A model whose directory was read and whose tensor data is at hand.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    shards: Vec<Bytes>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// For each tensor, which of `shards` holds its data.
    shard_of_tensor: Vec<usize>,
}

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("{}: no such file", path.display())]
    NotFound { path: PathBuf },
    #[error("{}: is a directory, expected a GGUF file", path.display())]
    IsDirectory { path: PathBuf },
    #[error("{}: is no regular file, so it cannot be mapped", path.display())]
    NotRegular { path: PathBuf },
    #[error("{}: file is empty", path.display())]
    Empty { path: PathBuf },
    #[error("{}: cannot be read", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}", path.display())]
    Gguf { path: PathBuf, source: gguf::Error },
    #[error("{}", path.display())]
    SplitKeys { path: PathBuf, source: MetadataError },
    #[error("{}: is shard {} of {count}; open the first one{}", path.display(), no + 1, named(first))]
    NotFirstShard { path: PathBuf, no: usize, count: usize, first: Option<String> },
    #[error(
        "{}: is the first of {count} shards, so its name must end in -00001-of-{count:05}.gguf to lead to the others",
        path.display()
    )]
    ShardName { path: PathBuf, count: usize },
    #[error("{}: shard {} of {count} is missing", path.display(), no + 1)]
    MissingShard { path: PathBuf, no: usize, count: usize },
    #[error("{}: says that it is {}, expected shard {} of {count}", path.display(), describe(*found), no + 1)]
    WrongShard { path: PathBuf, no: usize, count: usize, found: Option<Split> },
    #[error("{}: tensor {tensor} is in an earlier shard too", path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    #[error("{}: the shards hold {found} tensors, expected {expected} as split.tensors.count says", path.display())]
    TensorCount { path: PathBuf, found: usize, expected: usize },
}

fn named(first: &Option<String>) -> String {
    first.as_ref().map_or(String::new(), |first| format!(", {first}"))
}

fn describe(split: Option<Split>) -> String {
    split.map_or("no shard".to_owned(), |split| format!("shard {} of {}", split.no + 1, split.count))
}

impl ModelFile {
    /// Maps the file at `path`, and the other shards if it is the first of several, and reads the directories.
    ///
    /// Nothing is read but the directories: tensor data comes in when [`tensor_data`](Self::tensor_data) is used.
    /// Other processes must leave the files alone while this value lives: truncating a mapped file makes the next
    /// access to the lost pages fatal (`SIGBUS`), and overwriting it changes weights under the engine. Replace a model
    /// by renaming a new file over it, which is safe.
    ///
    /// # Errors
    /// - [`Error::NotFound`], [`Error::IsDirectory`], [`Error::NotRegular`], [`Error::Empty`], [`Error::Io`] if there
    ///   is nothing to map.
    /// - [`Error::Gguf`] if it, or another shard, is not a GGUF file or ends too early.
    /// - [`Error::NotFirstShard`], [`Error::ShardName`], [`Error::MissingShard`], [`Error::WrongShard`],
    ///   [`Error::SplitKeys`] if the shards cannot be put together.
    /// - [`Error::DuplicateTensor`], [`Error::TensorCount`] if the shards are not of one model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let mut model = Self::single(path, map(path)?)?;
        if let Some(split) = model.split(path)? {
            model.check_first(split)?;
            model.add_shards(split)?;
        }
        Ok(model)
    }

    /// The model in `bytes`, such as one embedded in the executable; not split.
    ///
    /// # Errors
    /// - [`Error::Empty`], [`Error::Gguf`], [`Error::SplitKeys`] as for [`open`](Self::open).
    /// - [`Error::NotFirstShard`], [`Error::ShardName`] if it is a shard: nobody knows where its neighbours are.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self, Error> {
        let path = Path::new("bundled model");
        if bytes.is_empty() {
            return Err(Error::Empty { path: path.to_owned() });
        }
        let model = Self::single(path, Bytes::Static(bytes))?;
        match model.split(path)? {
            None => Ok(model),
            Some(split) => {
                model.check_first(split)?;
                Err(Error::ShardName { path: path.to_owned(), count: split.count })
            }
        }
    }

    /// The path that was opened; `bundled model` for one that is no file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of the model with all its shards, in bytes.
    pub fn n_bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    /// The number of files that the model consists of.
    pub fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// The key-value pairs, which are those of the first shard.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors of all shards, in file order, shard by shard.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The data of the tensor at `idx` of [`tensors`](Self::tensors): whole blocks, row after row. Data of no tensor is
    /// aligned to more than a byte.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn tensor_data(&self, idx: usize) -> &[u8] {
        &self.shards[self.shard_of_tensor[idx]][self.tensors[idx].range()]
    }

    fn single(path: &Path, bytes: Bytes) -> Result<Self, Error> {
        let directory = gguf::parse(&bytes).map_err(|source| Error::Gguf { path: path.to_owned(), source })?;
        Ok(Self {
            path: path.to_owned(),
            metadata: directory.metadata,
            shard_of_tensor: vec![0; directory.tensors.len()],
            tensors: directory.tensors,
            shards: vec![bytes],
        })
    }

    fn split(&self, path: &Path) -> Result<Option<Split>, Error> {
        Split::of(&self.metadata).map_err(|source| Error::SplitKeys { path: path.to_owned(), source })
    }

    fn check_first(&self, split: Split) -> Result<(), Error> {
        if split.no == 0 {
            return Ok(());
        }
        let first = shard_name(&self.path).map(|name| ShardName { no: 0, ..name }.to_string());
        Err(Error::NotFirstShard { path: self.path.clone(), no: split.no, count: split.count, first })
    }

    /// Adds shards 1 to `first.count - 1` to a model that has shard 0 only.
    fn add_shards(&mut self, first: Split) -> Result<(), Error> {
        let Split { count, n_tensors, .. } = first;
        let first = self.path.clone();
        let name = shard_name(&first).filter(|name| name.no == 0 && name.count == count);
        let name = name.ok_or_else(|| Error::ShardName { path: first.clone(), count })?;
        let path_of = |no| first.with_file_name(ShardName { no, ..name }.to_string());

        for no in 1..count {
            let path = path_of(no);
            let bytes = map(&path).map_err(|error| match error {
                Error::NotFound { path } => Error::MissingShard { path, no, count },
                other => other,
            })?;
            let shard = Self::single(&path, bytes)?;
            let found = shard.split(&path)?;
            if !found.is_some_and(|found| found.no == no && found.count == count) {
                return Err(Error::WrongShard { path, no, count, found });
            }
            self.shards.extend(shard.shards);
            self.shard_of_tensor.extend(shard.tensors.iter().map(|_| no));
            self.tensors.extend(shard.tensors);
        }

        let mut seen = HashMap::with_capacity(self.tensors.len());
        for (tensor, &no) in self.tensors.iter().zip(&self.shard_of_tensor) {
            if seen.insert(&*tensor.name, no).is_some() {
                return Err(Error::DuplicateTensor { path: path_of(no), tensor: tensor.name.clone() });
            }
        }
        if self.tensors.len() != n_tensors {
            return Err(Error::TensorCount { path: first, found: self.tensors.len(), expected: n_tensors });
        }
        Ok(())
    }
}

/// The parsed name of a file, if it is that of a shard.
fn shard_name(path: &Path) -> Option<ShardName<'_>> {
    ShardName::parse(path.file_name()?.to_str()?)
}

/// Where the bytes of a file are.
#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

fn map(path: &Path) -> Result<Bytes, Error> {
    let io_error = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NotFound { path: path.to_owned() },
        _ => Error::Io { path: path.to_owned(), source },
    };
    // The path is looked at before it is opened, since opening a pipe waits for its other end.
    let found = std::fs::metadata(path).map_err(io_error)?;
    if found.is_dir() {
        return Err(Error::IsDirectory { path: path.to_owned() });
    }
    if !found.is_file() {
        return Err(Error::NotRegular { path: path.to_owned() });
    }
    let file = File::open(path).map_err(io_error)?;
    // `mmap` refuses a length of zero with a code that says nothing.
    if file.metadata().map_err(io_error)?.len() == 0 {
        return Err(Error::Empty { path: path.to_owned() });
    }
    #[expect(unsafe_code, reason = "a mapping is only as sound as other processes let it be")]
    // SAFETY: the mapping is private to this value and read-only, so nothing in this process writes to it. Required of
    // others, and said at `ModelFile::open`: no process writes to or truncates the file while it is mapped. All bytes
    // are treated as untrusted input, so that a change before the directory is read cannot break the parser.
    let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
    Ok(Bytes::Mapped(map))
}
