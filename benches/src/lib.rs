//! Criterion benches: of the kernels, one target per family, each bench named `kernel/OP/TYPES/SHAPE`; of the device itself,
//! `ceiling/…`; and of whole models, `engine/decode/MODEL/ctxN` and `engine/prefill/MODEL/N`.
//!
//! What a number means: the launches are recorded in a graph and replayed, as the engine does, so that a time holds the gap
//! between two nodes (about a microsecond) and no call of the driver; CUDA events around the replays give the device's own
//! time, which [`DeviceTime`] hands to criterion. Each launch has inputs that the launches before have pushed out of the L2
//! cache: see [`Gpu::n_turns`]. Nothing is timed before a launch's results have been held against an f64 reference.
//!
//! Shares are of [`Ceilings`]: what this device was just measured to reach, in bytes and in operations. Where there is no GPU,
//! a line says so and nothing is timed: the emulator's speed means nothing.

#![allow(clippy::unwrap_used, reason = "a bench that cannot run its kernel has failed")]

mod ceilings;
mod data;
mod engine;

use std::env;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{Criterion, Throughput};
use cuda_loader::cust::device::{Device as CudaDevice, DeviceAttribute};
use cuda_loader::cust::event::Event;
use cuda_std::{LaunchError, Launcher};
use gpt_gamma::device::{Cuda, CudaOptions, Error, Graph, PtxBuild, SharedDevice};

pub use ceilings::Ceilings;
pub use data::{Matrix, Rotating, spread};
pub use engine::models;

/// The GPU that is timed.
#[derive(Clone)]
pub struct Gpu {
    /// For buffers.
    pub device: SharedDevice,
    /// The same, for what only a GPU has.
    pub cuda: Arc<Cuda>,
    l2_bytes: usize,
}

/// The first GPU, with the PTX build named by `GAMMA_PTX` if that is set; without one a line on standard error, and `None`.
///
/// # Panics
///
/// If there is a GPU and it does not work, or `GAMMA_PTX` names no build.
pub fn gpu() -> Option<Gpu> {
    open(true)
}

/// `programmatic`: whether kernels may start before those ahead of them have ended.
fn open(programmatic: bool) -> Option<Gpu> {
    let ptx = env::var("GAMMA_PTX").ok().map(|name| {
        PtxBuild::from_name(&name).unwrap_or_else(|| panic!("GAMMA_PTX is {name}, expected sm_80 or sm_90a"))
    });
    match Cuda::new(CudaOptions { ptx, programmatic, ..CudaOptions::default() }) {
        Ok(cuda) => {
            let device = CudaDevice::get_device(0).unwrap();
            let l2_bytes = device.get_attribute(DeviceAttribute::L2CacheSize).unwrap() as usize;
            let cuda = Arc::new(cuda);
            Some(Gpu { device: Arc::<Cuda>::clone(&cuda), cuda, l2_bytes })
        }
        Err(Error::NoDevice { reason }) => {
            // Not on standard output, where test runners read the list of benches.
            eprintln!("no GPU, so nothing is timed: {reason}");
            None
        }
        Err(error) => panic!("the GPU does not work: {error}"),
    }
}

impl Gpu {
    /// How many sets of inputs of so many bytes it takes until the first has left the cache again: three times what L2
    /// holds. At most 4096, so that launches that touch less than 0.04 of a megabyte find some of it still there.
    pub fn n_turns(&self, bytes: usize) -> usize {
        (3 * self.l2_bytes).div_ceil(bytes).min(4096)
    }

    fn mark(&self) -> Event {
        self.cuda.mark().unwrap()
    }

    /// Nanoseconds on the device from `start` to now.
    fn since(&self, start: &Event) -> f64 {
        self.cuda.nanoseconds_since(start).unwrap()
    }
}

/// One bench: its inputs, in as many copies as there are turns, and what is launched with them.
pub trait Case {
    /// How many copies there are.
    fn n_turns(&self) -> usize;

    /// Launches with copy `turn`.
    ///
    /// # Errors
    ///
    /// Those of the launches.
    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError>;

    /// Relative error of what the only launch with copy `turn` so far left, against an f64 reference of some of it.
    fn error(&self, turn: usize) -> f64;
}

/// The benches of one target.
pub struct Suite {
    gpu: Gpu,
    criterion: Criterion<DeviceTime>,
    time: DeviceTime,
}

/// Runs the benches of a target if there is a GPU, by criterion's command line.
pub fn run(family: fn(&mut Suite)) {
    let Some(gpu) = gpu() else { return };
    // `cargo test` and `--list` time nothing, so nothing needs to be measured for them.
    let times = env::args().any(|arg| arg == "--bench") && !env::args().any(|arg| arg == "--test" || arg == "--list");
    let ceilings = times.then(|| Ceilings::measure(&gpu));
    if let Some(ceilings) = &ceilings {
        eprintln!("{}: {ceilings}", gpu.device.name());
    }
    let time = DeviceTime { gpu: gpu.clone(), format: Format { ceilings } };
    let criterion = Criterion::default()
        .with_measurement(time.clone())
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
        .configure_from_args();
    let mut suite = Suite { gpu, criterion, time };
    family(&mut suite);
    suite.criterion.final_summary();
}

impl Suite {
    /// Times a case, `prepare`d only if the command line selects it. `work`: what one launch must read and write, in
    /// [`Throughput::Bytes`], or its operations, a product and a sum being two, in [`Throughput::Elements`].
    ///
    /// # Panics
    ///
    /// If the first or the last turn's relative error is beyond `tolerance`, or the device fails.
    pub fn bench<C: Case>(
        &mut self,
        op_and_types: &str,
        shape: &str,
        work: Throughput,
        tolerance: f64,
        prepare: impl Fn(&Gpu) -> C,
    ) {
        self.time_case(&format!("kernel/{op_and_types}"), shape, Some(work), tolerance, prepare);
    }

    /// As [`bench`](Self::bench), for what the device reaches at best; `work` is none if there is nothing to count.
    ///
    /// # Panics
    ///
    /// As [`bench`](Self::bench).
    pub fn ceiling<C: Case>(
        &mut self,
        what: &str,
        shape: &str,
        work: Option<Throughput>,
        tolerance: f64,
        prepare: impl Fn(&Gpu) -> C,
    ) {
        self.time_case(&format!("ceiling/{what}"), shape, work, tolerance, prepare);
    }

    /// Has `body` time cases where each kernel starts after those ahead of it have ended.
    ///
    /// # Panics
    ///
    /// If the GPU, which worked, does not any more.
    pub fn without_programmatic_launches(&mut self, body: impl FnOnce(&mut Self)) {
        let gpu = open(false).expect("there was a GPU when the suite began");
        let time = DeviceTime { gpu: gpu.clone(), format: self.time.format.clone() };
        let (own_gpu, own_time) = (std::mem::replace(&mut self.gpu, gpu), std::mem::replace(&mut self.time, time));
        body(self);
        (self.gpu, self.time) = (own_gpu, own_time);
    }

    fn time_case<C: Case>(
        &mut self,
        name: &str,
        shape: &str,
        work: Option<Throughput>,
        tolerance: f64,
        prepare: impl Fn(&Gpu) -> C,
    ) {
        let mut group = self.criterion.benchmark_group(name);
        if let Some(work) = work {
            group.throughput(work);
        }
        let (gpu, time, mut prepared) = (&self.gpu, &self.time, None);
        group.bench_function(shape, |bencher| {
            // Criterion comes here once for each sample.
            let recorded: &Recorded<C> = prepared.get_or_insert_with(|| {
                let case = prepare(gpu);
                let last = case.n_turns() - 1;
                for turn in if last == 0 { vec![0] } else { vec![0, last] } {
                    case.launch(&*gpu.device, turn).unwrap();
                    let error = case.error(turn);
                    assert!(
                        error <= tolerance,
                        "{name}/{shape}: relative error {error:.3e}, tolerance {tolerance:.3e}"
                    );
                }
                Recorded::new(gpu, case)
            });
            bencher.iter_custom(|n_launches| recorded.time(time, n_launches));
        });
        group.finish();
    }
}

/// The launches of all turns as a graph.
struct Recorded<C> {
    graph: Box<dyn Graph>,
    n_launches: u64,
    // Memory that the graph names.
    _case: C,
}

impl<C: Case> Recorded<C> {
    /// Enough rounds for 16 launches: starting a graph takes longer than some of them.
    fn new(gpu: &Gpu, case: C) -> Self {
        let n_launches = 16_usize.next_multiple_of(case.n_turns());
        // SAFETY: the case lives as long as the graph.
        let graph = unsafe {
            gpu.device.record(&mut |launcher| {
                (0..n_launches).try_for_each(|launch| case.launch(launcher, launch % case.n_turns()))
            })
        };
        Self { graph: graph.unwrap(), n_launches: n_launches as u64, _case: case }
    }

    /// Nanoseconds of so many launches, by those of the whole rounds that hold them.
    fn time(&self, time: &DeviceTime, n_launches: u64) -> f64 {
        let n_replays = n_launches.div_ceil(self.n_launches);
        let start = time.start();
        (0..n_replays).for_each(|_| self.graph.replay().unwrap());
        time.end(start) * n_launches as f64 / (n_replays * self.n_launches) as f64
    }
}

/// Criterion's measurement: nanoseconds between two CUDA events.
#[derive(Clone)]
pub struct DeviceTime {
    gpu: Gpu,
    format: Format,
}

impl Measurement for DeviceTime {
    type Intermediate = Event;
    type Value = f64;

    fn start(&self) -> Event {
        self.gpu.mark()
    }

    fn end(&self, start: Event) -> f64 {
        self.gpu.since(&start)
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &self.format
    }
}

/// Times in µs; throughputs in GB/s and TFLOP/s with the share of the ceiling, and in tokens/s.
#[derive(Clone)]
struct Format {
    ceilings: Option<Ceilings>,
}

/// What `work` in so many nanoseconds is per second, and its unit.
fn rate(work: &Throughput, nanoseconds: f64) -> (f64, &'static str) {
    match *work {
        Throughput::Bytes(bytes) => (bytes as f64 / nanoseconds, "GB/s"),
        Throughput::Elements(operations) => (operations as f64 / nanoseconds / 1e3, "TFLOP/s"),
        // Of what whole models are given; criterion has no unit that is only a number of things.
        Throughput::ElementsAndBytes { elements, bytes: _ } => (elements as f64 / nanoseconds * 1e9, "tokens/s"),
        _ => unreachable!("benches count bytes, operations or tokens"),
    }
}

impl ValueFormatter for Format {
    fn format_throughput(&self, work: &Throughput, nanoseconds: f64) -> String {
        let (rate, unit) = rate(work, nanoseconds);
        let ceiling = self.ceilings.as_ref().and_then(|ceilings| match work {
            Throughput::Bytes(_) => Some(ceilings.memory()),
            Throughput::Elements(_) => Some(ceilings.tensor_cores),
            _ => None,
        });
        match ceiling {
            Some(ceiling) => format!("{rate:.1} {unit} ({:.1} %)", 100.0 * rate / ceiling),
            None => format!("{rate:.1} {unit}"),
        }
    }

    fn scale_values(&self, _typical: f64, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|value| *value /= 1e3);
        "µs"
    }

    fn scale_throughputs(&self, typical: f64, work: &Throughput, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|value| *value = rate(work, *value).0);
        rate(work, typical).1
    }

    fn scale_for_machines(&self, _values: &mut [f64]) -> &'static str {
        "ns"
    }
}
