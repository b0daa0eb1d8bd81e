//! What the device reaches at best, measured when a target starts.

use std::fmt;

use cuda_loader::copy_on_device_async;
use cuda_loader::cust::event::{Event, EventFlags};
use cuda_loader::cust::stream::{Stream, StreamFlags};
use gamma_tests::uniform;
use gpt_gamma::device::{self, Buffer};
use half::f16;
use kernels::probe;

use crate::Gpu;

/// The rates that shares are taken of.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// GB/s of the driver's own copy from device memory to device memory, bytes read and bytes written counted.
    pub copy: f64,
    /// GB/s of [`device::read_bandwidth`], which only reads: the driver has nothing that does.
    pub read: f64,
    /// TFLOP/s of `mma.sync` with f16 factors and f32 sums, from registers. Hopper's `wgmma` goes beyond.
    pub tensor_cores: f64,
}

/// The best of this many counts, after one that does not.
const N_TRIES: usize = 10;

impl Ceilings {
    /// Measures them; takes 2 GB of device memory and less than a second.
    pub(crate) fn measure(gpu: &Gpu) -> Self {
        let copy = copy(gpu);
        let read = device::read_bandwidth(&gpu.cuda).unwrap().expect("the copy had more memory");
        Self { copy, read, tensor_cores: tensor_cores(gpu) }
    }

    /// GB/s, the faster of the two.
    pub(crate) fn memory(&self) -> f64 {
        self.copy.max(self.read)
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { copy, read, tensor_cores } = self;
        write!(
            f,
            "shares are of {:.0} GB/s (device copy {copy:.0}, streaming read {read:.0}) and {tensor_cores:.0} TFLOP/s \
             (mma.sync), all measured just now",
            self.memory()
        )
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

/// Random factors: a card that multiplies zeros takes less power and clocks higher.
fn tensor_cores(gpu: &Gpu) -> f64 {
    const N_ROUNDS: u32 = 16_384;
    let (threads, n_blocks) = (256, 2 * gpu.cuda.n_sm());
    let out = Buffer::<f32>::new(&gpu.device, 4 * (threads * n_blocks) as usize).unwrap();
    let factors = Buffer::from_slice(&gpu.device, &factors()).unwrap();
    let nanoseconds = best((0..=N_TRIES).map(|_| {
        let start = gpu.mark();
        // SAFETY: shapes as the kernel's comment says.
        unsafe {
            let launch = probe::launch(n_blocks, threads);
            probe::mma_chains::run(&*gpu.device, launch, out.slice(), factors.slice(), N_ROUNDS).unwrap();
        }
        gpu.since(&start)
    }));
    let n_warps = u64::from(threads / 32 * n_blocks);
    (n_warps * u64::from(N_ROUNDS) * probe::ROUND_FLOP) as f64 / nanoseconds / 1e3
}

/// Each lane's fragments of A and B.
fn factors() -> Vec<u32> {
    let factors = uniform(1, 2 * 32 * probe::FACTOR_WORDS, -1.0, 1.0);
    let bits = |x: f32| u32::from(f16::from_f32(x).to_bits());
    factors.chunks_exact(2).map(|pair| bits(pair[0]) | bits(pair[1]) << 16).collect()
}

/// The least, the first left out.
fn best(times: impl Iterator<Item = f64>) -> f64 {
    times.skip(1).fold(f64::INFINITY, f64::min)
}
