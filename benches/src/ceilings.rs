//! What the device reaches at best: memory measured when a target starts, arithmetic by the device's own description, since
//! no kernel here does nothing but multiply and a slower one is no ceiling.

use std::fmt;

use cuda_loader::copy_on_device_async;
use cuda_loader::cust::device::{Device as CudaDevice, DeviceAttribute};
use cuda_loader::cust::event::{Event, EventFlags};
use cuda_loader::cust::stream::{Stream, StreamFlags};
use gpt_gamma::device::Buffer;
use gpt_gamma::device::ops::{Epilogue, linear};
use gpt_gamma::gguf::TensorType;

use crate::{Gpu, Matrix};

/// The rates that shares are taken of.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// GB/s of the driver's own copy from device memory to device memory, bytes read and bytes written counted.
    pub copy: f64,
    /// GB/s of our matrix-vector product over 1.07 GB of f32 weights, which only reads: the driver has nothing that does.
    pub read: f64,
    /// TFLOP/s of the tensor cores, f16 factors and f32 sums without sparsity, at the device's highest clock; `None` for
    /// a compute capability that is not known here.
    pub tensor_cores: Option<f64>,
}

/// The best of this many counts, after one that does not.
const N_TRIES: usize = 10;

impl Ceilings {
    /// Measures and computes them; takes 2 GB of device memory and a few seconds.
    pub(crate) fn measure(gpu: &Gpu) -> Self {
        Self { copy: copy(gpu), read: read(gpu), tensor_cores: tensor_cores() }
    }

    /// GB/s, the faster of the two.
    pub(crate) fn memory(&self) -> f64 {
        self.copy.max(self.read)
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { copy, read, .. } = self;
        write!(f, "shares are of {:.0} GB/s measured (device copy {copy:.0}, f32 matvec {read:.0})", self.memory())?;
        match self.tensor_cores {
            Some(peak) => write!(f, ", and of {peak:.0} TFLOP/s by multiprocessors and highest clock, not measured"),
            None => write!(f, "; TFLOP/s have none, as this compute capability's peak is not known"),
        }
    }
}

fn copy(gpu: &Gpu) -> f64 {
    const BYTES: usize = 1 << 30;
    let (from, to) = (Buffer::<u8>::new(&gpu.device, BYTES).unwrap(), Buffer::<u8>::new(&gpu.device, BYTES).unwrap());
    from.fill_bytes(0x5a).unwrap();
    gpu.device.synchronize().unwrap();
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None).unwrap();
    let event = || {
        let event = Event::new(EventFlags::DEFAULT).unwrap();
        event.record(&stream).unwrap();
        event
    };
    let milliseconds = (0..=N_TRIES).map(|_| {
        let start = event();
        // SAFETY: both are BYTES long and live until the event below is waited for.
        unsafe { copy_on_device_async(to.slice().address(), from.slice().address(), BYTES, &stream) }.unwrap();
        let end = event();
        end.synchronize().unwrap();
        f64::from(end.elapsed_time_f32(&start).unwrap())
    });
    2.0 * BYTES as f64 / best(milliseconds) / 1e6
}

fn read(gpu: &Gpu) -> f64 {
    let (n_in, n_out) = (4096, 65536);
    let matrix = Matrix::random(TensorType::F32, n_in, n_out, 1);
    let packed = Buffer::from_slice(&gpu.device, &matrix.packed()).unwrap();
    let x = Buffer::from_slice(&gpu.device, &gamma_tests::normal(2, n_in)).unwrap();
    let out = Buffer::new(&gpu.device, n_out).unwrap();
    let (out, weight, x, format) = (out.view(), packed.view(), x.view(), matrix.format());
    let nanoseconds = best((0..=N_TRIES).map(|_| {
        let start = gpu.mark();
        linear(&*gpu.device, out, format, weight, x, None, n_in, n_out, Epilogue::Store).unwrap();
        gpu.since(&start)
    }));
    packed.n_bytes() as f64 / nanoseconds
}

/// Operations a clock and multiprocessor: NVIDIA's architecture white papers. GeForce cards of 8.6, 8.9 and 12.0 reach half
/// with f32 sums, which nothing that the driver tells says.
fn tensor_cores() -> Option<f64> {
    let device = CudaDevice::get_device(0).unwrap();
    let of = |attribute| device.get_attribute(attribute).unwrap();
    let major = of(DeviceAttribute::ComputeCapabilityMajor);
    let per_clock = match (major, of(DeviceAttribute::ComputeCapabilityMinor)) {
        (8, 0) => 2048.0,
        (8, _) | (12, _) => 1024.0,
        (9, 0) => 4096.0,
        (10, _) => 8192.0,
        _ => return None,
    };
    // The clock is told in kHz.
    Some(
        per_clock * f64::from(of(DeviceAttribute::MultiprocessorCount)) * f64::from(of(DeviceAttribute::ClockRate))
            / 1e9,
    )
}

/// The least, the first left out.
fn best(times: impl Iterator<Item = f64>) -> f64 {
    times.skip(1).fold(f64::INFINITY, f64::min)
}
