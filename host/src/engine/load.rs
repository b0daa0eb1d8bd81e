//! Brings a model's tensors to the device: matrices repacked for the kernels, vectors decoded to f32.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::Error;
use super::plan::{Stack, matrices, packing, vectors};
use kernels::format::WeightFormat;

use crate::adapter::{ModelSpec, TensorId};
use crate::device::ops::{LinearMatrix, RowsMatrix};
use crate::device::{Arena, Buffer, Device, Segment, View, upload};
use crate::gguf::{self, TensorType};
use crate::model_file::ModelFile;
use crate::weights::{self, Packing};

/// Bytes of weights, about, that a core repacks at a time: weights are streamed, never copied whole.
const PART_BYTES: usize = 2 << 20;

/// A matrix `[n_out, n_in]` in the layout the kernels of its type read.
pub(super) struct Matrix {
    pub format: WeightFormat,
    pub packed: Buffer<u8>,
    /// The power of two of each row, `[n_out]`, for products with many tokens.
    pub powers: Buffer<f32>,
    pub n_in: usize,
    pub n_out: usize,
}

impl Matrix {
    /// For a product with one token.
    pub fn linear(&self) -> LinearMatrix<'_> {
        LinearMatrix { format: self.format, packed: self.packed.view(), n_in: self.n_in, n_out: self.n_out }
    }

    /// For a product with many.
    pub fn rows(&self) -> RowsMatrix<'_> {
        let LinearMatrix { format, packed, n_in, n_out } = self.linear();
        RowsMatrix { format, packed, powers: self.powers.view(), n_in, n_out }
    }
}

/// The matrices of a layer's experts, one after the other, each in the layout the kernels of its type read.
pub(super) struct Experts {
    pub format: WeightFormat,
    pub packed: Buffer<u8>,
}

/// A model's tensors on the device, by the first tensor of each stack. A tied head is there once.
pub(super) struct DeviceWeights {
    matrices: HashMap<TensorId, Matrix>,
    experts: HashMap<TensorId, Experts>,
    vectors: HashMap<TensorId, Buffer<f32>>,
}

impl DeviceWeights {
    pub fn matrix(&self, id: TensorId) -> &Matrix {
        self.matrices.get(&id).expect("the plan listed every matrix of the spec")
    }

    /// The matrix whose first tensor this is, if it is any's first.
    pub fn find_matrix(&self, id: TensorId) -> Option<&Matrix> {
        self.matrices.get(&id)
    }

    /// All matrices but those of experts.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.matrices.values()
    }

    pub fn experts(&self, id: TensorId) -> &Experts {
        self.experts.get(&id).expect("the plan listed all experts of the spec")
    }

    pub fn vector(&self, id: TensorId) -> &Buffer<f32> {
        self.vectors.get(&id).expect("the plan listed every vector of the spec")
    }
}

/// Room for every tensor of the plan; contents are undefined.
pub(super) fn allocate(arena: &mut Arena, file: &ModelFile, spec: &ModelSpec) -> Result<DeviceWeights, Error> {
    let mut weights = DeviceWeights { matrices: HashMap::new(), experts: HashMap::new(), vectors: HashMap::new() };
    for Stack { parts, n_in, n_out } in matrices(spec, file.tensors()) {
        let packing = packing(&file.tensors()[parts[0].0], n_in, n_out)?;
        let packed = arena.buffer(packing.n_bytes());
        let powers = arena.buffer(n_out);
        weights.matrices.insert(parts[0], Matrix { format: packing.format(), packed, powers, n_in, n_out });
    }
    for (experts, n_expert) in super::experts(spec) {
        let packing = packing(&file.tensors()[experts.weight.0], experts.n_in, experts.n_out)?;
        let packed = arena.buffer(n_expert * packing.n_bytes());
        weights.experts.insert(experts.weight, Experts { format: packing.format(), packed });
    }
    for parts in vectors(spec) {
        let n_elements: u64 = parts.iter().map(|part| file.tensors()[part.0].n_elements()).sum();
        weights.vectors.insert(parts[0], arena.buffer(n_elements as usize));
    }
    Ok(weights)
}

/// Reads the file, and fills the room that [`allocate`] made.
pub(super) fn fill(
    weights: &DeviceWeights,
    device: &dyn Device,
    file: &ModelFile,
    spec: &ModelSpec,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let mut jobs = Vec::new();
    for Stack { parts, n_in, n_out } in matrices(spec, file.tensors()) {
        let packing = Arc::new(packing(&file.tensors()[parts[0].0], n_in, n_out)?);
        let mut first_row = 0;
        for &part in &parts {
            let n_rows = file.tensor_data(part.0).len() / packing.row_bytes();
            let rows = first_row..first_row + n_rows;
            add_rows(&mut jobs, &packing, part, 0, rows, weights.matrix(parts[0]).packed.view());
            first_row += n_rows;
        }
    }
    for (experts, n_expert) in super::experts(spec) {
        let packing = Arc::new(packing(&file.tensors()[experts.weight.0], experts.n_in, experts.n_out)?);
        let (n_source, n_packed) = (experts.n_out * packing.row_bytes(), packing.n_bytes());
        let all = weights.experts(experts.weight).packed.view();
        for expert in 0..n_expert {
            let one = all.part(expert * n_packed..(expert + 1) * n_packed);
            add_rows(&mut jobs, &packing, experts.weight, expert * n_source, 0..experts.n_out, one);
        }
    }
    for parts in vectors(spec) {
        let (all, mut at) = (weights.vector(parts[0]).view().bytes(), 0);
        for part in parts {
            let tensor = &file.tensors()[part.0];
            let end = at + size_of::<f32>() * tensor.n_elements() as usize;
            add_values(&mut jobs, part, tensor.ty, tensor.range().len(), all.part(at..end));
            at = end;
        }
    }
    let (mut done, total) = (0, jobs.iter().map(Job::n_bytes).sum::<usize>() as u64);
    let part_bytes = jobs.iter().map(Job::n_bytes).max().unwrap_or(0);
    let run = |job: usize, part: &mut [u8]| jobs[job].fill(file, part);
    upload(device, jobs.len(), part_bytes, run, &mut |bytes| {
        done += bytes;
        progress(done, total);
    })
}

/// Some bytes of a tensor, and what becomes of them.
struct Job<'a> {
    tensor: TensorId,
    /// Bytes of the tensor's data.
    source: Range<usize>,
    work: Work<'a>,
}

enum Work<'a> {
    /// They are rows of the matrix at `into`, and are repacked.
    Rows { packing: Arc<Packing>, rows: Range<usize>, into: View<'a, u8> },
    /// They are decoded to f32, the bytes of which are `into`.
    Values { into: View<'a, u8> },
}

/// Adds jobs for `rows` of a matrix, which are the tensor's bytes from `start` on.
fn add_rows<'a>(
    jobs: &mut Vec<Job<'a>>,
    packing: &Arc<Packing>,
    tensor: TensorId,
    start: usize,
    rows: Range<usize>,
    into: View<'a, u8>,
) {
    // Parts of a stack are whole heads, and those a multiple of eight rows.
    let step = (PART_BYTES / packing.row_bytes()).max(1).next_multiple_of(packing.rows_together());
    for first in rows.clone().step_by(step) {
        let part = first..rows.end.min(first + step);
        let source =
            start + (first - rows.start) * packing.row_bytes()..start + (part.end - rows.start) * packing.row_bytes();
        jobs.push(Job { tensor, source, work: Work::Rows { packing: Arc::clone(packing), rows: part, into } });
    }
}

/// Adds jobs for `n_source` bytes of values of type `ty`, a whole tensor.
fn add_values<'a>(jobs: &mut Vec<Job<'a>>, tensor: TensorId, ty: TensorType, n_source: usize, into: View<'a, u8>) {
    let block_values = ty.block_len() * size_of::<f32>();
    let n_blocks = n_source / ty.block_bytes();
    let step = (PART_BYTES / block_values).max(1);
    for first in (0..n_blocks).step_by(step) {
        let last = n_blocks.min(first + step);
        let source = first * ty.block_bytes()..last * ty.block_bytes();
        let into = into.part(first * block_values..last * block_values);
        jobs.push(Job { tensor, source, work: Work::Values { into } });
    }
}

impl<'a> Job<'a> {
    /// Bytes that it makes.
    fn n_bytes(&self) -> usize {
        match &self.work {
            Work::Rows { packing, rows, .. } => packing.rows_bytes(rows.clone()),
            Work::Values { into } => into.len(),
        }
    }

    fn fill(&self, file: &ModelFile, part: &mut [u8]) -> Result<Vec<Segment<'a>>, Error> {
        let source = &file.tensor_data(self.tensor.0)[self.source.clone()];
        let part = &mut part[..self.n_bytes()];
        match &self.work {
            Work::Rows { packing, rows, into } => {
                packing.check_rows(self.source.start / packing.row_bytes(), source).map_err(|source| {
                    let tensor = file.tensors()[self.tensor.0].name.clone();
                    Error::Repack { tensor, source }
                })?;
                let segments = packing.repack_rows(rows.clone(), source, part).into_iter();
                let segment = |weights::Segment { from, to }| {
                    let to = into.part(to..to + from.len());
                    Segment { from, to }
                };
                Ok(segments.map(segment).collect())
            }
            Work::Values { into } => {
                let tensor = &file.tensors()[self.tensor.0];
                let values = gguf::decode(tensor.ty, source)
                    .map_err(|source| Error::Decode { tensor: tensor.name.clone(), source })?;
                for (bytes, value) in part.chunks_exact_mut(size_of::<f32>()).zip(values) {
                    bytes.copy_from_slice(&value.to_ne_bytes());
                }
                Ok(vec![Segment { from: 0..part.len(), to: *into }])
            }
        }
    }
}
