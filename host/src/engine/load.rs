//! Brings a model's tensors to the device: matrices repacked for the kernels, vectors decoded to f32.

use std::collections::HashMap;

use super::Error;
use super::plan::{MemoryPlan, Stack, matrices, packing, vectors};
use kernels::format::WeightFormat;
use rayon::prelude::*;

use crate::adapter::{ModelSpec, TensorId};
use crate::device::{Buffer, SharedDevice};
use crate::gguf;
use crate::model_file::ModelFile;
use crate::weights::Packing;

/// Bytes of repacked weights that each core holds at once: weights are streamed, never copied whole.
const STAGING_BYTES: usize = 1 << 20;

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
    let mut staging = vec![Vec::new(); rayon::current_num_threads()];
    let mut loaded = DeviceWeights { matrices: HashMap::new(), experts: HashMap::new(), vectors: HashMap::new() };
    for Stack { parts, n_in, n_out } in matrices(spec) {
        let packing = packing(&file.tensors()[parts[0].0], n_in, n_out)?;
        let packed = Buffer::new(device, packing.n_bytes())?;
        let mut first_row = 0;
        for part in &parts {
            let source = file.tensor_data(part.0);
            upload(&packing, source, first_row, &packed, 0, &mut staging, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
            first_row += source.len() / packing.row_bytes();
        }
        loaded.matrices.insert(parts[0], Matrix { format: packing.format(), packed, n_in, n_out });
    }
    for (experts, n_expert) in super::experts(spec) {
        let packing = packing(&file.tensors()[experts.weight.0], experts.n_in, experts.n_out)?;
        let packed = Buffer::new(device, n_expert * packing.n_bytes())?;
        let source = file.tensor_data(experts.weight.0);
        for (expert, source) in source.chunks_exact(source.len() / n_expert).enumerate() {
            upload(&packing, source, 0, &packed, expert * packing.n_bytes(), &mut staging, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
        }
        loaded.experts.insert(experts.weight, Experts { format: packing.format(), packed });
    }
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

/// Repacks the rows in `source`, which are rows `first_row..` of the matrix that starts at `at` of `packed`: on all cores,
/// some rows each, and copies them as they come.
fn upload(
    packing: &Packing,
    source: &[u8],
    first_row: usize,
    packed: &Buffer<u8>,
    at: usize,
    staging: &mut [Vec<u8>],
    copied: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let row_bytes = packing.row_bytes();
    let rows_at_once = (STAGING_BYTES / row_bytes).max(1);
    let n_rows = source.len() / row_bytes;
    for batch in (0..n_rows).step_by(rows_at_once * staging.len()) {
        let end = n_rows.min(batch + rows_at_once * staging.len());
        let parts = source[batch * row_bytes..end * row_bytes].par_chunks(rows_at_once * row_bytes);
        let repacked = parts.zip(staging.par_iter_mut()).enumerate().map(|(i, (source, staging))| {
            let first = first_row + batch + i * rows_at_once;
            let rows = first..first + source.len() / row_bytes;
            staging.resize(packing.rows_bytes(rows.clone()), 0);
            packing.repack_rows(rows, source, staging)
        });
        let segments: Vec<_> = repacked.collect();
        for (segments, staging) in segments.into_iter().zip(&*staging) {
            let mut bytes = 0;
            for segment in segments {
                bytes += segment.from.len() as u64;
                packed.write(at + segment.to, &staging[segment.from])?;
            }
            copied(bytes);
        }
    }
    Ok(())
}
