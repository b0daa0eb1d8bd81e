//! What a GPU's memory reaches at best, measured on the spot.

use std::sync::Arc;

use cuda_std::{LaunchError, Launcher};
use kernels::probe;

use super::{Buffer, Cuda, Error, SharedDevice, View};

/// How a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamShape {
    /// 16-byte loads that each thread has on their way: 4, 8 or 16.
    pub depth: u32,
    /// Threads of a block: whole warps, at most 512.
    pub threads: u32,
    /// Blocks of the grid.
    pub n_blocks: u32,
}

impl StreamShape {
    /// Threads of the grid, and elements of the sums that [`stream_read`] writes.
    pub fn n_threads(&self) -> usize {
        self.threads as usize * self.n_blocks as usize
    }
}

/// Reads `data` once and writes each thread's sum of its words into `sums`.
///
/// # Errors
///
/// Those of the launch.
///
/// # Panics
///
/// If there are not as many sums as threads, `data` is no multiple of 4 words, or no kernel has that depth: the caller's
/// bug.
pub fn stream_read(
    launcher: &dyn Launcher,
    shape: StreamShape,
    sums: View<u32>,
    data: View<u32>,
) -> Result<(), LaunchError> {
    assert_eq!(sums.len(), shape.n_threads(), "a sum for each thread");
    assert!(data.len().is_multiple_of(4) && data.slice().address().is_multiple_of(16), "16-byte loads");
    let run = match shape.depth {
        4 => probe::stream_read_4::run,
        8 => probe::stream_read_8::run,
        16 => probe::stream_read_16::run,
        other => panic!("no kernel reads {other} loads deep"),
    };
    // SAFETY: lengths and alignment as checked above; views borrow memory that is there, and launches are in order.
    unsafe { run(launcher, probe::launch(shape.n_blocks, shape.threads), sums.slice(), data.slice()) }
}

/// The most bytes that are read at a time: many times the largest L2 cache.
const MOST_BYTES: u64 = 1 << 30;
/// The fewest that still are: smaller streams would measure the L2 cache.
const FEWEST_BYTES: u64 = 1 << 28;
/// Between two events, so that the way from an event to a launch does not count.
const N_LAUNCHES: usize = 4;
/// The best of this many counts, after one that does not.
const N_TRIES: usize = 10;

/// GB/s of a stream that is only read, the best of some shapes; `None` if less than half a gigabyte of device memory is
/// free. Takes up to a gigabyte for the time being.
///
/// # Errors
///
/// - [`Error::Launch`], [`Error::Driver`] if the device fails.
/// - [`Error::OutOfMemory`] if somebody else took the memory meanwhile.
pub fn read_bandwidth(cuda: &Arc<Cuda>) -> Result<Option<f64>, Error> {
    let device: SharedDevice = Arc::<Cuda>::clone(cuda);
    let bytes = (device.memory()?.free / 2).min(MOST_BYTES);
    if bytes < FEWEST_BYTES {
        return Ok(None);
    }
    let data = Buffer::<u32>::new(&device, (bytes / 16 * 4) as usize)?;
    data.fill_bytes(0x5a)?;
    let mut best = 0.0_f64;
    // 64 to 128 KB on their way in each multiprocessor, which is more than any memory so far needs.
    for (depth, threads, blocks_per_sm) in [(8, 512, 1), (16, 512, 1), (4, 512, 2), (8, 256, 4)] {
        let shape = StreamShape { depth, threads, n_blocks: cuda.n_sm() * blocks_per_sm };
        let sums = Buffer::new(&device, shape.n_threads())?;
        for i in 0..=N_TRIES {
            let start = cuda.mark()?;
            for _ in 0..N_LAUNCHES {
                stream_read(&*device, shape, sums.view(), data.view())?;
            }
            let nanoseconds = cuda.nanoseconds_since(&start)?;
            if i > 0 {
                best = best.max((N_LAUNCHES * data.n_bytes()) as f64 / nanoseconds);
            }
        }
    }
    Ok(Some(best))
}
