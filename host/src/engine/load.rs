//! Brings a model's tensors to the device: matrices repacked for the kernels, vectors decoded to f32.

use std::collections::HashMap;

use super::Error;
use super::plan::{MemoryPlan, matrices, packing, vectors};
use kernels::format::WeightFormat;

use crate::adapter::{ModelSpec, TensorId};
use crate::device::{Buffer, SharedDevice};
use crate::gguf;
use crate::model_file::ModelFile;

/// Bytes of repacked weights held on the host at once: weights are streamed, never copied whole.
const STAGING_BYTES: usize = 16 << 20;

/// A matrix `[n_out, n_in]` in the layout the kernels of its type read.
pub(super) struct Matrix {
    pub format: WeightFormat,
    pub packed: Buffer<u8>,
    pub n_in: usize,
    pub n_out: usize,
}

/// A model's tensors on the device. A tied head is there once.
pub(super) struct DeviceWeights {
    matrices: HashMap<TensorId, Matrix>,
    vectors: HashMap<TensorId, Buffer<f32>>,
}

impl DeviceWeights {
    pub fn matrix(&self, id: TensorId) -> &Matrix {
        self.matrices.get(&id).expect("the plan listed every matrix of the spec")
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
    let name = |id: TensorId| file.tensors()[id.0].name.clone();
    let mut staging = Vec::new();
    let mut loaded = DeviceWeights { matrices: HashMap::new(), vectors: HashMap::new() };
    for (id, n_in, n_out) in matrices(spec) {
        let packing = packing(&file.tensors()[id.0], n_in, n_out)?;
        let packed = Buffer::new(device, packing.n_bytes())?;
        let (source, row_bytes) = (file.tensor_data(id.0), packing.row_bytes());
        let rows_at_once = (STAGING_BYTES / row_bytes).clamp(1, n_out);
        for first in (0..n_out).step_by(rows_at_once) {
            let rows = first..n_out.min(first + rows_at_once);
            staging.resize(packing.rows_bytes(rows.clone()), 0);
            let source = &source[rows.start * row_bytes..rows.end * row_bytes];
            for segment in packing.repack_rows(rows, source, &mut staging) {
                done += segment.from.len() as u64;
                packed.write(segment.to, &staging[segment.from])?;
            }
            progress(done, total);
        }
        loaded.matrices.insert(id, Matrix { format: packing.format(), packed, n_in, n_out });
    }
    for id in vectors(spec) {
        let decoded = gguf::decode(file.tensors()[id.0].ty, file.tensor_data(id.0))
            .map_err(|source| Error::Decode { tensor: name(id), source })?;
        loaded.vectors.insert(id, Buffer::from_slice(device, &decoded)?);
        done += 4 * decoded.len() as u64;
        progress(done, total);
    }
    Ok(loaded)
}
