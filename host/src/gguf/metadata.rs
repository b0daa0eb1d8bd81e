//! The key-value pairs of a file, and look-ups that forgive what writers disagree on.

use super::reader::{MAX_LENGTH, Reader};
use super::{Error, MAX_KEYS, duplicate};
use std::fmt;

/// The longest key, in bytes: the specification's limit.
const MAX_KEY_BYTES: usize = 65535;
/// Key length, one letter, value type, one byte of value.
const MIN_PAIR_BYTES: usize = 8 + 1 + 4 + 1;

/// The key-value pairs of a file, in file order. Keys are UTF-8, unique and not empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Metadata {
    pairs: Vec<(Box<str>, Value)>,
}

/// Why a key cannot be used as asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum MetadataError {
    #[error("metadata key {key} is missing, expected {wanted}")]
    Missing { key: String, wanted: &'static str },
    #[error("metadata key {key} has type {found}, expected {wanted}")]
    WrongType { key: String, wanted: &'static str, found: ValueKind },
    #[error("metadata key {key} has value {found}, expected {wanted}")]
    OutOfRange { key: String, wanted: &'static str, found: i128 },
    #[error("metadata key {key} is not UTF-8")]
    NotUtf8 { key: String },
}

impl Metadata {
    /// Reads `n_keys` pairs from where `reader` stands.
    pub(super) fn read(reader: &mut Reader, n_keys: u64) -> Result<Self, Error> {
        let n_keys = reader.count("metadata keys", n_keys, MIN_PAIR_BYTES, MAX_KEYS)?;
        let mut pairs: Vec<(Box<str>, Value)> = Vec::with_capacity(n_keys);
        for _ in 0..n_keys {
            let offset = reader.at();
            let key = reader.name("metadata key", MAX_KEY_BYTES)?;
            if key.is_empty() {
                return Err(Error::EmptyKey { offset });
            }
            let value = Value::read(reader, key)?;
            pairs.push((key.into(), value));
        }
        match duplicate(pairs.len(), |i| &pairs[i].0) {
            Some(key) => Err(Error::DuplicateKey { key: key.to_owned() }),
            None => Ok(Self { pairs }),
        }
    }

    /// The number of pairs.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The pairs in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(key, value)| (&**key, value))
    }

    /// The value of `key` as the file has it.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.pairs.iter().find(|(found, _)| **found == *key).map(|(_, value)| value)
    }

    /// The value of `key` as a `T`, which the file must have.
    ///
    /// Integers of every width stand for each other as long as the value fits, and `f32` and `f64` do: writers differ,
    /// and the specification asks readers to cope. Nothing else is converted.
    ///
    /// ```
    /// # use gpt_gamma::gguf::{Metadata, MetadataError, Strings};
    /// fn layers_and_tokens(metadata: &Metadata) -> Result<(usize, usize), MetadataError> {
    ///     let tokens: Strings = metadata.required("tokenizer.ggml.tokens")?;
    ///     Ok((metadata.required("gpt2.block_count")?, tokens.len()))
    /// }
    /// ```
    ///
    /// # Errors
    /// - [`MetadataError::Missing`] if there is no such key.
    /// - [`MetadataError::WrongType`] if its value is of another kind.
    /// - [`MetadataError::OutOfRange`] if it, or an element of the array, does not fit `T`.
    /// - [`MetadataError::NotUtf8`] if a text was asked for and the bytes are none.
    pub fn required<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, MetadataError> {
        self.optional(key)?.ok_or_else(|| MetadataError::Missing { key: key.to_owned(), wanted: T::WANTED })
    }

    /// The value of `key` as a `T`; `None` if the file does not have it.
    ///
    /// # Errors
    /// As [`required`](Self::required), but for [`MetadataError::Missing`].
    pub fn optional<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, MetadataError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        T::from_value(value).map(Some).map_err(|problem| {
            let (key, wanted) = (key.to_owned(), T::WANTED);
            match problem {
                Problem::Type => MetadataError::WrongType { key, wanted, found: value.kind() },
                Problem::Range { found, idx: None } => MetadataError::OutOfRange { key, wanted, found },
                Problem::Range { found, idx: Some(idx) } => {
                    MetadataError::OutOfRange { key: format!("{key}[{idx}]"), wanted, found }
                }
                Problem::NotUtf8 => MetadataError::NotUtf8 { key },
            }
        })
    }
}

/// A value as the file has it.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the types are their names")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// Bytes, since token texts and templates need not be UTF-8.
    String(Box<[u8]>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array, kept as the bytes of the file: a vocabulary has 200,000 strings.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    element: ValueType,
    len: usize,
    /// `len` elements back to back, each of them checked when the file was read.
    bytes: Box<[u8]>,
}

impl Array {
    /// The type of every element; never an array.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        let mut reader = Reader::new(&self.bytes);
        (0..self.len).map(move |_| Value::read_scalar(&mut reader, self.element).expect("checked when it was read"))
    }
}

impl Value {
    fn read(reader: &mut Reader, key: &str) -> Result<Self, Error> {
        let value_type =
            |found| ValueType::from_id(found).ok_or_else(|| Error::UnknownValueType { key: key.to_owned(), found });
        let ty = value_type(reader.u32("value type")?)?;
        if ty != ValueType::Array {
            return Self::read_scalar(reader, ty);
        }
        let element = value_type(reader.u32("array element type")?)?;
        if element == ValueType::Array {
            return Err(Error::NestedArray { key: key.to_owned() });
        }
        let offset = reader.at();
        let found = reader.u64("array length")?;
        if found > MAX_LENGTH as u64 {
            return Err(Error::TooLong { what: "array", offset, found, most: MAX_LENGTH });
        }
        let len = reader.count("array", found, element.min_bytes(), MAX_LENGTH)?;
        let start = reader.at();
        if element == ValueType::String {
            for _ in 0..len {
                reader.string("string", MAX_LENGTH)?;
            }
        } else {
            reader.take((len * element.min_bytes()) as u64, "array")?;
        }
        Ok(Self::Array(Array { element, len, bytes: reader.since(start).into() }))
    }

    fn read_scalar(reader: &mut Reader, ty: ValueType) -> Result<Self, Error> {
        const WHAT: &str = "metadata value";
        Ok(match ty {
            ValueType::U8 => Self::U8(u8::from_le_bytes(reader.array(WHAT)?)),
            ValueType::I8 => Self::I8(i8::from_le_bytes(reader.array(WHAT)?)),
            ValueType::U16 => Self::U16(u16::from_le_bytes(reader.array(WHAT)?)),
            ValueType::I16 => Self::I16(i16::from_le_bytes(reader.array(WHAT)?)),
            ValueType::U32 => Self::U32(u32::from_le_bytes(reader.array(WHAT)?)),
            ValueType::I32 => Self::I32(i32::from_le_bytes(reader.array(WHAT)?)),
            ValueType::F32 => Self::F32(f32::from_le_bytes(reader.array(WHAT)?)),
            // The specification knows 0 and 1 only; llama.cpp takes all else for true.
            ValueType::Bool => Self::Bool(reader.array::<1>(WHAT)? != [0]),
            ValueType::String => Self::String(reader.string("string", MAX_LENGTH)?.into()),
            ValueType::U64 => Self::U64(u64::from_le_bytes(reader.array(WHAT)?)),
            ValueType::I64 => Self::I64(i64::from_le_bytes(reader.array(WHAT)?)),
            ValueType::F64 => Self::F64(f64::from_le_bytes(reader.array(WHAT)?)),
            ValueType::Array => unreachable!("both callers took arrays out"),
        })
    }

    /// The type, for messages.
    pub fn kind(&self) -> ValueKind {
        ValueKind::Scalar(match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(array) => return ValueKind::Array(array.element),
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        })
    }

    fn integer(&self) -> Result<i128, Problem> {
        Ok(match *self {
            Self::U8(x) => x.into(),
            Self::I8(x) => x.into(),
            Self::U16(x) => x.into(),
            Self::I16(x) => x.into(),
            Self::U32(x) => x.into(),
            Self::I32(x) => x.into(),
            Self::U64(x) => x.into(),
            Self::I64(x) => x.into(),
            _ => return Err(Problem::Type),
        })
    }

    fn array(&self) -> Result<&Array, Problem> {
        match self {
            Self::Array(array) => Ok(array),
            _ => Err(Problem::Type),
        }
    }
}

/// One line for people: texts with their control characters escaped, arrays as type and length.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(x) => write!(f, "{x}"),
            Self::I8(x) => write!(f, "{x}"),
            Self::U16(x) => write!(f, "{x}"),
            Self::I16(x) => write!(f, "{x}"),
            Self::U32(x) => write!(f, "{x}"),
            Self::I32(x) => write!(f, "{x}"),
            Self::F32(x) => write!(f, "{x}"),
            Self::Bool(x) => write!(f, "{x}"),
            Self::String(bytes) => write!(f, "{}", String::from_utf8_lossy(bytes).escape_debug()),
            Self::Array(array) => write!(f, "{} × {}", array.len, array.element),
            Self::U64(x) => write!(f, "{x}"),
            Self::I64(x) => write!(f, "{x}"),
            Self::F64(x) => write!(f, "{x}"),
        }
    }
}

/// The types of the container, in the order of their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the types are their names")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        const ALL: [ValueType; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        ALL.get(id as usize).copied()
    }

    /// The least bytes a value takes; exact for all but strings and arrays.
    fn min_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// The type of a value, with that of an array's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// One value.
    Scalar(ValueType),
    /// An array of these.
    Array(ValueType),
}

impl fmt::Display for ValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scalar(ty) => write!(f, "{ty}"),
            Self::Array(element) => write!(f, "array of {element}"),
        }
    }
}

/// What [`Metadata::required`] can be asked for: `usize`, `u32`, `u64`, `i32`, `f32`, `bool`, `&str`, `&[u8]`,
/// [`Strings`], and a [`Vec`] of the numbers.
pub trait FromValue<'a>: Sized + sealed::Sealed {
    #[doc(hidden)]
    const WANTED: &'static str;
    #[doc(hidden)]
    fn from_value(value: &'a Value) -> Result<Self, Problem>;
}

mod sealed {
    pub trait Sealed {}
}

#[doc(hidden)]
#[derive(Debug)]
pub enum Problem {
    Type,
    Range { found: i128, idx: Option<usize> },
    NotUtf8,
}

macro_rules! from_integer {
    ($($ty:ident: $wanted:literal;)+) => { $(
        impl sealed::Sealed for $ty {}
        impl FromValue<'_> for $ty {
            const WANTED: &'static str = $wanted;
            fn from_value(value: &Value) -> Result<Self, Problem> {
                let found = value.integer()?;
                found.try_into().map_err(|_| Problem::Range { found, idx: None })
            }
        }
        impl sealed::Sealed for Vec<$ty> {}
        impl FromValue<'_> for Vec<$ty> {
            const WANTED: &'static str = concat!("an array, each element ", $wanted);
            fn from_value(value: &Value) -> Result<Self, Problem> {
                let element = |(idx, value): (usize, Value)| {
                    let found = value.integer()?;
                    found.try_into().map_err(|_| Problem::Range { found, idx: Some(idx) })
                };
                value.array()?.iter().enumerate().map(element).collect()
            }
        }
    )+ };
}

from_integer! {
    u32: "an integer from 0 to 2^32 - 1";
    u64: "an integer from 0 to 2^64 - 1";
    usize: "an integer from 0 to 2^64 - 1";
    i32: "an integer from -2^31 to 2^31 - 1";
}

impl sealed::Sealed for f32 {}
impl FromValue<'_> for f32 {
    const WANTED: &'static str = "a floating-point number";
    fn from_value(value: &Value) -> Result<Self, Problem> {
        match *value {
            Value::F32(x) => Ok(x),
            Value::F64(x) => Ok(x as f32),
            _ => Err(Problem::Type),
        }
    }
}

impl sealed::Sealed for Vec<f32> {}
impl FromValue<'_> for Vec<f32> {
    const WANTED: &'static str = "an array of floating-point numbers";
    fn from_value(value: &Value) -> Result<Self, Problem> {
        value.array()?.iter().map(|value| f32::from_value(&value)).collect()
    }
}

impl sealed::Sealed for bool {}
impl FromValue<'_> for bool {
    const WANTED: &'static str = "a bool";
    fn from_value(value: &Value) -> Result<Self, Problem> {
        match *value {
            Value::Bool(x) => Ok(x),
            _ => Err(Problem::Type),
        }
    }
}

impl sealed::Sealed for &[u8] {}
impl<'a> FromValue<'a> for &'a [u8] {
    const WANTED: &'static str = "a string";
    fn from_value(value: &'a Value) -> Result<Self, Problem> {
        match value {
            Value::String(bytes) => Ok(bytes),
            _ => Err(Problem::Type),
        }
    }
}

impl sealed::Sealed for &str {}
impl<'a> FromValue<'a> for &'a str {
    const WANTED: &'static str = "a string";
    fn from_value(value: &'a Value) -> Result<Self, Problem> {
        std::str::from_utf8(FromValue::from_value(value)?).map_err(|_| Problem::NotUtf8)
    }
}

/// The elements of an array of strings, as bytes: a token may hold part of a character.
#[derive(Clone)]
pub struct Strings<'a> {
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        Some(self.reader.string("string", MAX_LENGTH).expect("checked when it was read"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

impl sealed::Sealed for Strings<'_> {}
impl<'a> FromValue<'a> for Strings<'a> {
    const WANTED: &'static str = "an array of strings";
    fn from_value(value: &'a Value) -> Result<Self, Problem> {
        match value {
            Value::Array(array) if array.element == ValueType::String => {
                Ok(Self { reader: Reader::new(&array.bytes), left: array.len })
            }
            _ => Err(Problem::Type),
        }
    }
}
