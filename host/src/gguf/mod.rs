//! Reads the directory of GGUF v2 and v3 files: `header · metadata · tensor infos · padding · data`, little-endian.
//!
//! Invariant: takes bytes, does no I/O, knows no device. A malformed file yields an [`Error`], never a panic. Nothing is
//! allocated because a length in the file says so: the directory takes at most four times the bytes that it was read
//! from, and tensor data and the elements of arrays are never copied one by one. Keys and tensor names are UTF-8 and
//! unique; the alignment is a power of two; tensor data lies inside the file and no two tensors share a byte.
//!
//! What a tensor or a key *means* is not decided here: see [`crate::adapter`] and [`crate::tokenizer`].

mod blocks;
mod error;
mod metadata;
mod reader;
mod split;
mod tensor_type;

pub use blocks::{DecodeError, decode};
pub use error::Error;
pub use metadata::{Array, FromValue, Metadata, MetadataError, Strings, Value, ValueKind, ValueType};
pub use split::{ShardName, Split};
pub use tensor_type::TensorType;

use reader::Reader;
use std::ops::Range;

/// The key whose `u32` value replaces [`DEFAULT_ALIGNMENT`].
pub const ALIGNMENT_KEY: &str = "general.alignment";
/// What tensor data is aligned to where a file does not say, in bytes.
pub const DEFAULT_ALIGNMENT: usize = 32;
/// The most metadata keys a file may have; the largest published models have fewer than 100.
pub const MAX_KEYS: usize = 1 << 16;
/// The most tensors a file may have; the largest published models have a few thousand.
pub const MAX_TENSORS: usize = 1 << 16;
/// The longest tensor name, in bytes: ggml keeps names in 64 bytes with a terminator.
pub const MAX_TENSOR_NAME: usize = 63;

const MAGIC: [u8; 4] = *b"GGUF";
/// A tensor info without name and dimensions: name length, dimension count, type, offset.
const MIN_TENSOR_INFO_BYTES: usize = 8 + 4 + 4 + 8;

/// What a GGUF file holds and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Directory {
    /// The container's version: 2 or 3.
    pub version: u32,
    /// What the offsets of tensors are multiples of, in bytes; a power of two.
    pub alignment: usize,
    /// The key-value pairs, in file order.
    pub metadata: Metadata,
    /// The tensors, in the order of their infos, which need not be the order of their data.
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data starts, in bytes from the start of the file.
    pub data_offset: usize,
}

/// One tensor: its name, type, shape and place in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// The name, such as `blk.0.attn_qkv.weight`: at most [`MAX_TENSOR_NAME`] bytes, unique in its file.
    pub name: String,
    /// The element type.
    pub ty: TensorType,
    /// The dimensions, fastest first; those that the file does not state are 1. Any may be 0.
    pub dims: [u64; 4],
    /// How many dimensions the file states: 0 to 4.
    pub n_dims: usize,
    /// Where the data starts, in bytes from the start of the file (not of the data, as in the file itself).
    pub offset: usize,
    /// The size of the data, in bytes.
    pub n_bytes: usize,
}

impl TensorInfo {
    /// The dimensions that the file states, fastest first; `[1]` if it states none.
    pub fn shape(&self) -> &[u64] {
        &self.dims[..self.n_dims.max(1)]
    }

    /// The number of elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product() // Below 2⁶³: the parser checked.
    }

    /// The bytes of the file that hold the data.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.n_bytes
    }
}

/// Parses the directory of `file`; tensor data stays where it is.
///
/// Tensors may lie in any order and leave gaps, which llama.cpp refuses and the specification allows. Types that this
/// engine cannot run are read like all others, so that such files can be inspected.
///
/// # Errors
/// - [`Error::BadMagic`], [`Error::LegacyFormat`] unless `file` starts with `GGUF`.
/// - [`Error::Version1`], [`Error::BigEndian`], [`Error::UnsupportedVersion`] for any version but 2 and 3.
/// - [`Error::Truncated`] if a length in the file points past its end, [`Error::TensorTruncated`] if tensor data does.
/// - [`Error::TooLong`], [`Error::TooMany`] if a length or count is over its limit.
/// - [`Error::NotUtf8`], [`Error::EmptyKey`], [`Error::DuplicateKey`], [`Error::DuplicateTensor`] for bad names.
/// - [`Error::UnknownValueType`], [`Error::NestedArray`] for a key with a value that no reader understands.
/// - [`Error::AlignmentType`], [`Error::BadAlignment`] unless the alignment is a power of two in a `u32`.
/// - [`Error::RemovedType`], [`Error::UnknownType`] for a tensor whose type number has no meaning.
/// - [`Error::TooManyDims`], [`Error::TensorTooLarge`], [`Error::PartialBlock`] for a shape that cannot be.
/// - [`Error::Misaligned`], [`Error::Overlap`] for tensors in impossible places.
pub fn parse(file: &[u8]) -> Result<Directory, Error> {
    let mut reader = Reader::new(file);
    check_magic(reader.array("magic")?)?;
    let version = reader.u32("version")?;
    match version {
        2 | 3 => {}
        1 => return Err(Error::Version1),
        // A version never needs its upper half, so zeros in the lower half are another byte order.
        _ if version != 0 && version & 0xFFFF == 0 => return Err(Error::BigEndian { version: version.swap_bytes() }),
        _ => return Err(Error::UnsupportedVersion { found: version }),
    }

    let n_tensors = reader.u64("tensor count")?;
    let n_keys = reader.u64("key count")?;
    let metadata = Metadata::read(&mut reader, n_keys)?;
    let alignment = alignment(&metadata)?;

    let n_tensors = reader.count("tensor infos", n_tensors, MIN_TENSOR_INFO_BYTES, MAX_TENSORS)?;
    let mut tensors = Vec::with_capacity(n_tensors);
    for _ in 0..n_tensors {
        tensors.push(read_tensor_info(&mut reader, alignment)?);
    }
    if let Some(name) = duplicate(tensors.len(), |i| &tensors[i].name) {
        return Err(Error::DuplicateTensor { name: name.to_owned() });
    }

    // A file that is vocabulary only needs no padding, since nothing follows it.
    if n_tensors > 0 {
        reader.pad(alignment)?;
    }
    let data_offset = reader.at();
    for tensor in &mut tensors {
        place(tensor, data_offset, file.len())?;
    }
    check_overlap(&tensors)?;
    Ok(Directory { version, alignment, metadata, tensors, data_offset })
}

fn check_magic(found: [u8; 4]) -> Result<(), Error> {
    // Each was written as an integer, so its letters may come in either order.
    let name = match &found {
        &MAGIC => return Ok(()),
        b"ggml" | b"lmgg" => "ggml",
        b"ggmf" | b"fmgg" => "ggmf",
        b"ggjt" | b"tjgg" => "ggjt",
        b"ggla" | b"algg" => "ggla",
        _ => return Err(Error::BadMagic { found: u32::from_le_bytes(found) }),
    };
    Err(Error::LegacyFormat { name })
}

fn alignment(metadata: &Metadata) -> Result<usize, Error> {
    match metadata.value(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(found)) if found.is_power_of_two() => Ok(found as usize),
        Some(&Value::U32(found)) => Err(Error::BadAlignment { found }),
        Some(other) => Err(Error::AlignmentType { found: other.kind() }),
    }
}

/// Reads one tensor info; its `offset` is still relative to the start of tensor data.
fn read_tensor_info(reader: &mut Reader, alignment: usize) -> Result<TensorInfo, Error> {
    let name = reader.name("tensor name", MAX_TENSOR_NAME)?;
    let n_dims = reader.u32("dimension count")?;
    if n_dims > 4 {
        return Err(Error::TooManyDims { tensor: name.to_owned(), found: n_dims });
    }
    let n_dims = n_dims as usize;
    let mut dims = [1; 4];
    for dim in &mut dims[..n_dims] {
        *dim = reader.u64("tensor dimension")?;
    }
    let id = reader.u32("tensor type")?;
    let offset = reader.u64("tensor offset")?;

    let ty = TensorType::from_id(id).ok_or_else(|| match TensorType::removed(id) {
        Some(was) => Error::RemovedType { tensor: name.to_owned(), id, was },
        None => Error::UnknownType { tensor: name.to_owned(), id },
    })?;
    let n_bytes = n_bytes(ty, dims).map_err(|problem| match problem {
        SizeProblem::TooLarge => Error::TensorTooLarge { tensor: name.to_owned(), dims },
        SizeProblem::PartialBlock => Error::PartialBlock { tensor: name.to_owned(), ty, row: dims[0] },
    })?;
    if !offset.is_multiple_of(alignment as u64) {
        return Err(Error::Misaligned { tensor: name.to_owned(), offset, alignment });
    }
    // An offset beyond the address space is beyond the file too, which `place` reports.
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    Ok(TensorInfo { name: name.to_owned(), ty, dims, n_dims, offset, n_bytes })
}

enum SizeProblem {
    TooLarge,
    PartialBlock,
}

/// The size of a tensor in bytes. Neither any dimension nor any product may leave `i64`, as in ggml.
fn n_bytes(ty: TensorType, dims: [u64; 4]) -> Result<usize, SizeProblem> {
    const MOST: u64 = i64::MAX as u64;
    let mut n_elements = 1_u64;
    // A zero dimension must not hide that the others are absurd.
    let mut n_elements_but_zeros = 1_u64;
    for dim in dims {
        n_elements = n_elements.checked_mul(dim).ok_or(SizeProblem::TooLarge)?;
        n_elements_but_zeros =
            n_elements_but_zeros.checked_mul(dim.max(1)).filter(|&n| n <= MOST).ok_or(SizeProblem::TooLarge)?;
    }
    if !dims[0].is_multiple_of(ty.block_len() as u64) {
        return Err(SizeProblem::PartialBlock);
    }
    let n_bytes = (n_elements / ty.block_len() as u64).checked_mul(ty.block_bytes() as u64);
    n_bytes.filter(|&n| n <= MOST).and_then(|n| usize::try_from(n).ok()).ok_or(SizeProblem::TooLarge)
}

/// Turns the offset of `tensor` into one from the start of the file and checks that its data ends inside.
fn place(tensor: &mut TensorInfo, data_offset: usize, file_bytes: usize) -> Result<(), Error> {
    let offset = data_offset.checked_add(tensor.offset);
    let end = offset.and_then(|offset| offset.checked_add(tensor.n_bytes));
    match (offset, end) {
        (Some(offset), Some(end)) if end <= file_bytes => {
            tensor.offset = offset;
            Ok(())
        }
        _ => Err(Error::TensorTruncated {
            tensor: tensor.name.clone(),
            n_bytes: tensor.n_bytes,
            offset: offset.unwrap_or(usize::MAX),
            file_bytes,
        }),
    }
}

fn check_overlap(tensors: &[TensorInfo]) -> Result<(), Error> {
    let mut by_offset: Vec<u32> = (0..tensors.len() as u32).collect(); // At most MAX_TENSORS.
    by_offset.sort_unstable_by_key(|&i| tensors[i as usize].offset);
    let mut last: Option<&TensorInfo> = None;
    for tensor in by_offset.into_iter().map(|i| &tensors[i as usize]).filter(|tensor| tensor.n_bytes > 0) {
        if let Some(last) = last
            && tensor.offset < last.range().end
        {
            return Err(Error::Overlap { first: last.name.clone(), second: tensor.name.clone() });
        }
        last = Some(tensor);
    }
    Ok(())
}

/// A name that two of `n` items share.
fn duplicate<'a>(n: usize, name: impl Fn(usize) -> &'a str) -> Option<&'a str> {
    let mut by_name: Vec<u32> = (0..n as u32).collect(); // At most MAX_KEYS or MAX_TENSORS.
    by_name.sort_unstable_by_key(|&i| name(i as usize));
    by_name
        .windows(2)
        .map(|pair| (name(pair[0] as usize), name(pair[1] as usize)))
        .find(|(a, b)| a == b)
        .map(|(a, _)| a)
}
