//! Brings a model's tensors to the device: matrices repacked for the kernels, vectors decoded to f32.

use std::collections::HashMap;

use super::Error;
use super::plan::{MemoryPlan, Stack, matrices, packing, vectors};
use kernels::format::WeightFormat;
use rayon::prelude::*;

use crate::adapter::{ModelSpec, TensorId};
use crate::device::{Buffer, Segment, SharedDevice, Uploader};
use crate::gguf;
use crate::model_file::ModelFile;
use crate::weights::Packing;

/// Bytes of weights, about, that a core repacks at a time: weights are streamed, never copied whole.
const PART_BYTES: usize = 2 << 20;

/// A matrix `[n_out, n_in]` in the layout the kernels of its type read.
pub(super) struct Matrix {
    pub format: WeightFormat,
    pub packed: Buffer<u8>,
    pub n_in: usize,
    pub n_out: usize,
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

    pub fn experts(&self, id: TensorId) -> &Experts {
        self.experts.get(&id).expect("the plan listed all experts of the spec")
    }

    pub fn vector(&self, id: TensorId) -> &Buffer<f32> {
        self.vectors.get(&id).expect("the plan listed every vector of the spec")
    }
}

pub(super) fn load(
    device: &SharedDevice,
    file: &ModelFile,
    spec: &ModelSpec,
    plan: &MemoryPlan,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<DeviceWeights, Error> {
    let (mut done, total) = (0, plan.weight_bytes());
    // Planes pad to 128 bytes, so a part takes a little more than its rows; a row may be longer than a part.
    let packings = matrices(spec).into_iter().map(|stack| (stack.parts[0], stack.n_in, stack.n_out));
    let packings =
        packings.chain(super::experts(spec).map(|(experts, _)| (experts.weight, experts.n_in, experts.n_out)));
    let mut part_bytes = 0;
    for (id, n_in, n_out) in packings {
        let packing = packing(&file.tensors()[id.0], n_in, n_out)?;
        let rows = rows_of_part(&packing, n_out);
        part_bytes = part_bytes.max(packing.rows_bytes(0..rows)).max(packing.rows_bytes(n_out - rows..n_out));
    }
    let mut uploader = Uploader::new(device, rayon::current_num_threads(), part_bytes)?;
    let mut loaded = DeviceWeights { matrices: HashMap::new(), experts: HashMap::new(), vectors: HashMap::new() };
    for Stack { parts, n_in, n_out } in matrices(spec) {
        let packing = packing(&file.tensors()[parts[0].0], n_in, n_out)?;
        let packed = Buffer::new(device, packing.n_bytes())?;
        let mut first_row = 0;
        for part in &parts {
            let source = Source { tensor: &file.tensors()[part.0].name, first_row: 0, rows: file.tensor_data(part.0) };
            upload(&packing, &source, first_row, &packed, 0, &mut uploader, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
            first_row += source.rows.len() / packing.row_bytes();
        }
        loaded.matrices.insert(parts[0], Matrix { format: packing.format(), packed, n_in, n_out });
    }
    for (experts, n_expert) in super::experts(spec) {
        let tensor = &file.tensors()[experts.weight.0];
        let packing = packing(tensor, experts.n_in, experts.n_out)?;
        let packed = Buffer::new(device, n_expert * packing.n_bytes())?;
        let data = file.tensor_data(experts.weight.0);
        for (expert, rows) in data.chunks_exact(data.len() / n_expert).enumerate() {
            let source = Source { tensor: &tensor.name, first_row: expert * experts.n_out, rows };
            upload(&packing, &source, 0, &packed, expert * packing.n_bytes(), &mut uploader, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
        }
        loaded.experts.insert(experts.weight, Experts { format: packing.format(), packed });
    }
    uploader.finish()?;
    for parts in vectors(spec) {
        let mut decoded = Vec::new();
        for &part in &parts {
            let tensor = &file.tensors()[part.0];
            let values = gguf::decode(tensor.ty, file.tensor_data(part.0))
                .map_err(|source| Error::Decode { tensor: tensor.name.clone(), source })?;
            decoded.extend(values);
        }
        loaded.vectors.insert(parts[0], Buffer::from_slice(device, &decoded)?);
        done += 4 * decoded.len() as u64;
        progress(done, total);
    }
    Ok(loaded)
}

/// Rows of a tensor in the file.
struct Source<'a> {
    tensor: &'a str,
    /// Which of the tensor's rows is the first here.
    first_row: usize,
    rows: &'a [u8],
}

/// Repacks the rows in `source`, which are rows `first_row..` of the matrix that starts at `at` of `packed`: on all cores,
/// some rows each, and copies them as they come.
fn upload(
    packing: &Packing,
    source: &Source<'_>,
    first_row: usize,
    packed: &Buffer<u8>,
    at: usize,
    uploader: &mut Uploader,
    copied: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let row_bytes = packing.row_bytes();
    let rows_of_part = rows_of_part(packing, source.rows.len() / row_bytes);
    let parts: Vec<(usize, &[u8])> = source.rows.chunks(rows_of_part * row_bytes).enumerate().collect();
    for batch in parts.chunks(uploader.n_parts()) {
        let check =
            |&(part, rows): &(usize, &[u8])| packing.check_rows(source.first_row + part * rows_of_part, rows).err();
        if let Some(error) = batch.par_iter().find_map_first(check) {
            return Err(Error::Repack { tensor: source.tensor.to_owned(), source: error });
        }
        let bytes = uploader.batch(packed, batch.len(), |i, staging| {
            let (part, source) = batch[i];
            let first = first_row + part * rows_of_part;
            let rows = first..first + source.len() / row_bytes;
            let staging = &mut staging[..packing.rows_bytes(rows.clone())];
            let segments = packing.repack_rows(rows, source, staging);
            segments.into_iter().map(|segment| Segment { from: segment.from, to: at + segment.to }).collect()
        })?;
        copied(bytes);
    }
    Ok(())
}

/// Rows of `n_rows` that a core repacks at a time: few enough that every core has some.
fn rows_of_part(packing: &Packing, n_rows: usize) -> usize {
    n_rows.div_ceil(rayon::current_num_threads()).min(PART_BYTES / packing.row_bytes()).max(1)
}
