//! Writes GGUF files, broken ones included: every field can be set to what no writer would write.

use std::ops::Range;

use gpt_gamma::gguf::TensorType;

/// A value of a metadata key.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "GGUF's own types")]
pub enum Val {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(u8),
    Str(Vec<u8>),
    U64(u64),
    I64(i64),
    F64(f64),
    /// Element type and elements; `Raw` below for arrays that lie.
    Array(u32, Vec<Val>),
    /// A value type and whatever bytes follow it.
    Raw(u32, Vec<u8>),
}

/// A string.
pub fn text(text: &str) -> Val {
    Val::Str(text.into())
}

/// An array of strings.
pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Val {
    Val::Array(8, texts.into_iter().map(text).collect())
}

impl Val {
    /// The number of its type.
    pub fn type_id(&self) -> u32 {
        match self {
            Val::U8(_) => 0,
            Val::I8(_) => 1,
            Val::U16(_) => 2,
            Val::I16(_) => 3,
            Val::U32(_) => 4,
            Val::I32(_) => 5,
            Val::F32(_) => 6,
            Val::Bool(_) => 7,
            Val::Str(_) => 8,
            Val::Array(..) => 9,
            Val::U64(_) => 10,
            Val::I64(_) => 11,
            Val::F64(_) => 12,
            Val::Raw(id, _) => *id,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Val::U8(x) => out.extend(x.to_le_bytes()),
            Val::I8(x) => out.extend(x.to_le_bytes()),
            Val::U16(x) => out.extend(x.to_le_bytes()),
            Val::I16(x) => out.extend(x.to_le_bytes()),
            Val::U32(x) => out.extend(x.to_le_bytes()),
            Val::I32(x) => out.extend(x.to_le_bytes()),
            Val::F32(x) => out.extend(x.to_le_bytes()),
            Val::Bool(x) => out.push(*x),
            Val::Str(bytes) => string(out, bytes),
            Val::Array(element, values) => {
                out.extend(element.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| value.write(out));
            }
            Val::U64(x) => out.extend(x.to_le_bytes()),
            Val::I64(x) => out.extend(x.to_le_bytes()),
            Val::F64(x) => out.extend(x.to_le_bytes()),
            Val::Raw(_, bytes) => out.extend(bytes),
        }
    }
}

/// A tensor info, and how much data stands behind it.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// UTF-8 in a sound file.
    pub name: Vec<u8>,
    /// Fastest first.
    pub dims: Vec<u64>,
    /// The type's number.
    pub ty: u32,
    /// Where the data starts, from the start of all data; `None`: after the tensor before.
    pub offset: Option<u64>,
}

/// A file to be written.
#[derive(Debug, Clone)]
pub struct File {
    /// `GGUF` in a sound file.
    pub magic: [u8; 4],
    /// 2 or 3 in a sound file.
    pub version: u32,
    /// What the header says, where it shall lie.
    pub n_tensors: Option<u64>,
    /// As `n_tensors`.
    pub n_keys: Option<u64>,
    /// Keys and their values.
    pub keys: Vec<(Vec<u8>, Val)>,
    /// In the order of their infos.
    pub tensors: Vec<Tensor>,
    /// The alignment in use, whatever `general.alignment` says.
    pub alignment: usize,
}

impl Default for File {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }
}

impl File {
    /// Version 3, without keys and tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more key.
    pub fn key(mut self, key: impl Into<Vec<u8>>, value: Val) -> Self {
        self.keys.push((key.into(), value));
        self
    }

    /// A tensor right after the one before.
    pub fn tensor(mut self, name: &str, ty: TensorType, dims: &[u64]) -> Self {
        self.tensors.push(Tensor { name: name.into(), dims: dims.into(), ty: ty.id(), offset: None });
        self
    }

    /// A tensor with any type number at any offset.
    pub fn tensor_at(mut self, name: impl Into<Vec<u8>>, ty: u32, dims: &[u64], offset: u64) -> Self {
        self.tensors.push(Tensor { name: name.into(), dims: dims.into(), ty, offset: Some(offset) });
        self
    }

    /// Header, metadata and tensor infos: no padding, no data.
    pub fn head(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            string(&mut out, key);
            out.extend(value.type_id().to_le_bytes());
            value.write(&mut out);
        }
        for (tensor, place) in self.tensors.iter().zip(self.places()) {
            string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.ty.to_le_bytes());
            out.extend(place.start.to_le_bytes());
        }
        out
    }

    /// Where each tensor's data lies, from the start of all data, which is the first multiple of the alignment after the head.
    pub fn places(&self) -> Vec<Range<u64>> {
        let mut next = 0;
        let place = |tensor: &Tensor| {
            let start = tensor.offset.unwrap_or(next);
            let end = start.saturating_add(n_bytes(tensor));
            next = end.checked_next_multiple_of(self.alignment as u64).unwrap_or(0);
            start..end
        };
        self.tensors.iter().map(place).collect()
    }

    /// The whole file: the head, and data that counts up, as far as the last tensor reaches.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.head();
        if self.tensors.is_empty() {
            return out;
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        let end = self.places().into_iter().map(|place| place.end).max().unwrap_or(0);
        out.extend((0..end).map(|i| i as u8));
        out
    }
}

fn n_bytes(tensor: &Tensor) -> u64 {
    let n_elements = tensor.dims.iter().fold(1_u64, |n, &dim| n.saturating_mul(dim));
    let n_blocks = |ty: TensorType| n_elements / ty.block_len() as u64;
    TensorType::from_id(tensor.ty).map_or(0, |ty| n_blocks(ty).saturating_mul(ty.block_bytes() as u64))
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}
