//! Random matrices as large as models have them, and inputs in many copies.

use gamma_tests::bytes;
use gpt_gamma::device::{Buffer, Plain, View};
use gpt_gamma::gguf::{self, TensorType};
use gpt_gamma::weights::Packing;
use half::f16;
use kernels::format::WeightFormat;

use crate::Gpu;

/// A weight matrix as in a file.
pub struct Matrix {
    /// Its type.
    pub ty: TensorType,
    /// Elements of a row.
    pub n_in: usize,
    /// Rows.
    pub n_out: usize,
    bytes: Vec<u8>,
}

/// Random bytes that matrices repeat: a prime number, so that no two rows of a matrix begin alike.
const PERIOD: usize = 1_048_573;

impl Matrix {
    /// Random blocks whose scales make elements about 1.
    ///
    /// # Panics
    ///
    /// If no bench has weights of type `ty`.
    pub fn random(ty: TensorType, n_in: usize, n_out: usize, seed: u64) -> Self {
        let n_bytes = n_in / ty.block_len() * ty.block_bytes() * n_out;
        let random = bytes(seed, PERIOD.min(n_bytes));
        let mut bytes = random.repeat(n_bytes.div_ceil(random.len()));
        bytes.truncate(n_bytes);
        // Scales are not random bits: those would be infinite, NaN, or of magnitudes that drown all others.
        for (i, block) in bytes.chunks_exact_mut(ty.block_bytes()).enumerate() {
            let factor = (0.5 + (i % 13) as f32 / 13.0) * if i % 3 == 0 { -1.0 } else { 1.0 };
            let mut put = |at: usize, x: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
            match ty {
                // Sign and fraction stay; the exponent becomes that of 0.5..2.
                TensorType::F32 => block[3] = block[3] & 0x80 | 0x3f,
                TensorType::F16 => block[1] = block[1] & 0x87 | 0x38,
                TensorType::Q8_0 => put(0, factor / 64.0),
                TensorType::Q4_K => (put(0, factor / 256.0), put(2, factor / 32.0)).0,
                TensorType::Q6_K => put(208, factor / 1024.0),
                TensorType::MXFP4 => block[0] = 124 + (i % 3) as u8,
                other => panic!("no bench has weights of type {other}"),
            }
        }
        Self { ty, n_in, n_out, bytes }
    }

    /// As entries are named for it: activations are f32.
    pub fn types(ty: TensorType) -> String {
        format!("f32_{}w", ty.name().to_lowercase())
    }

    /// The kernels' name of its type.
    pub fn format(&self) -> WeightFormat {
        self.packing(self.n_out).format()
    }

    /// Repacked for the kernels.
    pub fn packed(&self) -> Vec<u8> {
        self.packed_experts(1)
    }

    /// Repacked as so many matrices of equally many rows.
    pub fn packed_experts(&self, n_expert: usize) -> Vec<u8> {
        let packing = self.packing(self.n_out / n_expert);
        let mut packed = vec![0; n_expert * packing.n_bytes()];
        let experts = self.bytes.chunks_exact(self.bytes.len() / n_expert);
        experts.zip(packed.chunks_exact_mut(packing.n_bytes())).for_each(|(from, to)| packing.repack(from, to));
        packed
    }

    /// Row `row` times `x`, in f64.
    pub fn dot(&self, row: usize, x: &[f32]) -> f64 {
        self.row(row).iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum()
    }

    /// Row `row`, by ggml's decoding of the file's bytes.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let row_bytes = self.bytes.len() / self.n_out;
        gguf::decode(self.ty, &self.bytes[row * row_bytes..][..row_bytes]).unwrap()
    }

    fn packing(&self, n_out: usize) -> Packing {
        Packing::new(self.ty, self.n_in, n_out).unwrap()
    }
}

/// As many copies of `len` elements of device memory as there are turns, each 256 bytes from the next at least.
pub struct Rotating<T: Plain> {
    buffer: Buffer<T>,
    len: usize,
}

impl<T: Plain> Rotating<T> {
    /// All of them `elements`.
    pub fn copies(gpu: &Gpu, n_turns: usize, elements: &[T]) -> Self {
        Self::of(gpu, n_turns, elements.len(), |_| elements)
    }

    /// That of each turn by `elements`.
    pub fn of<'a>(gpu: &Gpu, n_turns: usize, len: usize, elements: impl Fn(usize) -> &'a [T]) -> Self
    where
        T: 'a,
    {
        let buffer = Buffer::new(&gpu.device, n_turns * stride::<T>(len)).unwrap();
        (0..n_turns).for_each(|turn| buffer.write(turn * stride::<T>(len), elements(turn)).unwrap());
        Self { buffer, len }
    }

    /// For results: what a kernel forgets to write stays NaN and fails the check.
    pub fn poisoned(gpu: &Gpu, n_turns: usize, len: usize) -> Self {
        let buffer = Buffer::new(&gpu.device, n_turns * stride::<T>(len)).unwrap();
        buffer.fill_bytes(0xff).unwrap();
        Self { buffer, len }
    }

    /// How many copies there are.
    pub fn n_turns(&self) -> usize {
        self.buffer.len() / stride::<T>(self.len)
    }

    /// That of `turn`.
    pub fn at(&self, turn: usize) -> View<'_, T> {
        let start = turn * stride::<T>(self.len);
        self.buffer.view().part(start..start + self.len)
    }

    /// That of `turn`, on the host, when all launches are done.
    pub fn read(&self, turn: usize) -> Vec<T> {
        let start = turn * stride::<T>(self.len);
        self.buffer.read(start..start + self.len).unwrap()
    }
}

/// As allocations, copies start at multiples of 256 bytes.
fn stride<T>(len: usize) -> usize {
    len.next_multiple_of(256 / size_of::<T>())
}

/// Up to `count` of `0..n`, evenly apart, the first and the last among them.
pub fn spread(n: usize, count: usize) -> Vec<usize> {
    if n <= count { (0..n).collect() } else { (0..count).map(|i| i * (n - 1) / (count - 1)).collect() }
}
