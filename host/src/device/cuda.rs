//! An NVIDIA GPU as a device.

use std::collections::HashMap;
use std::env;
use std::ffi::c_void;
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use cuda_loader::cust::context::{Context, CurrentContext};
use cuda_loader::cust::device::{Device as CudaDevice, DeviceAttribute};
use cuda_loader::cust::error::CudaError;
use cuda_loader::cust::event::{Event, EventFlags};
use cuda_loader::cust::link::Linker;
use cuda_loader::cust::memory::{DevicePointer, cuda_free, cuda_malloc};
use cuda_loader::cust::module::Module;
use cuda_loader::cust::stream::{Stream, StreamFlags};
use cuda_loader::graph::{CaptureMode, GraphExec, capture};
use cuda_loader::{
    LaunchAttributes, PinnedBuffer, copy_to_device_async, copy_to_host_async, fill_async, function_attributes,
    launch_ex, prefer_shared, set_max_dynamic_shared,
};
use cuda_std::{Arg, Entry, Launch, LaunchError, Launcher};
use flate2::read::GzDecoder;
use rayon::prelude::*;

use super::{Device, Error, Fence, Graph, MemoryInfo, Staging};

/// The kernels for every GPU from Ampere on, compressed.
const PTX_SM_80: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels-sm_80.ptx.gz"));
/// The kernels for Hopper, compressed.
const PTX_SM_90A: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels-sm_90a.ptx.gz"));

/// Which PTX build a GPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PtxBuild {
    /// Runs on every card of compute capability 8.0 or later.
    Sm80,
    /// Hopper's own instructions; runs on compute capability 9.0 only.
    Sm90a,
}

impl PtxBuild {
    /// The build's name: `sm_80` or `sm_90a`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }

    /// The build of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Sm80, Self::Sm90a].into_iter().find(|build| build.name() == name)
    }

    /// Its text, decompressed at the first call.
    pub fn text(self) -> &'static str {
        static SM_80: OnceLock<String> = OnceLock::new();
        static SM_90A: OnceLock<String> = OnceLock::new();
        let (compressed, text) = match self {
            Self::Sm80 => (PTX_SM_80, &SM_80),
            Self::Sm90a => (PTX_SM_90A, &SM_90A),
        };
        text.get_or_init(|| {
            let mut text = String::new();
            GzDecoder::new(compressed).read_to_string(&mut text).expect("the build script compressed it");
            text
        })
    }
}

/// Name of the environment variable that, set to anything but 0, launches each kernel after the one before has ended: no
/// programmatic dependent launch. For finding out whether a kernel starts too early.
pub const NO_PDL: &str = "GAMMA_NO_PDL";

/// What to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// The device's number as the driver counts; default 0.
    pub ordinal: u32,
    /// The PTX build; default by the device's compute capability.
    pub ptx: Option<PtxBuild>,
    /// Bytes to act as if the device had no more; default all it has.
    pub vram_limit: Option<u64>,
    /// Whether kernels may be launched before those ahead of them have ended, where the PTX build is made for it; default
    /// true. The environment variable `GAMMA_NO_PDL` overrides it.
    pub programmatic: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self { ordinal: 0, ptx: None, vram_limit: None, programmatic: true }
    }
}

/// One GPU, with a stream of its own.
pub struct Cuda {
    card: String,
    ptx: PtxBuild,
    n_sm: u32,
    limit: u64,
    used: AtomicU64,
    /// Bytes taken when it was opened.
    before: u64,
    inner: Arc<Inner>,
}

struct Inner {
    /// Whether kernels may be launched before those ahead of them have ended.
    programmatic: bool,
    // Dropped in this order: modules, memory and the stream belong to the context.
    kernels: Kernels,
    letters: Mutex<Letters>,
    stream: Stream,
    context: Context,
    last_kernel: Mutex<&'static str>,
}

// SAFETY: the driver's functions may be called from any thread once the context is current there, which every method sees
// to through `Inner::enter`; the handles belong to no thread.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Inner {
    fn enter(&self) -> Result<(), cuda_loader::Error> {
        Ok(CurrentContext::set_current(&self.context)?)
    }

    fn last_kernel(&self) -> &'static str {
        *self.last_kernel.lock().expect("no panic under this lock")
    }

    /// A driver error names the kernel launched last: CUDA reports faults late.
    fn driver_error(&self, call: &'static str) -> impl FnOnce(cuda_loader::Error) -> Error {
        let after = self.last_kernel();
        move |error| Error::Driver { call, after, reason: error.to_string() }
    }

    fn run<T>(&self, call: &'static str, body: impl FnOnce() -> Result<T, cuda_loader::Error>) -> Result<T, Error> {
        self.enter().and_then(|()| body()).map_err(self.driver_error(call))
    }

    fn synchronize(&self, call: &'static str) -> Result<(), Error> {
        self.run(call, || Ok(self.stream.synchronize()?))
    }
}

/// Most bytes of a copy that goes by [`Letters`].
const LETTER_BYTES: usize = 4096;
/// Where the one coming from the device lies, behind those going there.
const REPLY: usize = 60 * 1024;

/// Page-locked memory for small copies: a token's id and position. Without it each costs a wait on its own.
struct Letters {
    memory: PinnedBuffer<u8>,
    /// Bytes of the first [`REPLY`] that copies may still be reading: since the stream was last waited for.
    in_use: usize,
}

/// The kernels of a build, each a module of its own that is compiled when it is first needed: the driver takes up to a fifth of a
/// second for one and 25 s for all, and a model needs about two dozen.
struct Kernels {
    /// A multiprocessor's shared memory in bytes, if grids overlap.
    shared_where_grids_overlap: Option<u32>,
    /// What all modules begin with: version, target, shared arrays.
    preamble: &'static str,
    entries: HashMap<&'static str, Kernel>,
}

struct Kernel {
    text: &'static str,
    /// Locked while it is compiled, so that other kernels can be at the same time.
    module: Mutex<Option<Loaded>>,
}

#[derive(Clone)]
struct Loaded {
    module: Arc<Module>,
    /// Dynamic shared memory that launches ask for, in bytes.
    dynamic_shared: u32,
}

impl Kernels {
    fn of(ptx: &'static str, shared_where_grids_overlap: Option<u32>) -> Self {
        const ENTRY: &str = "\n.visible .entry ";
        let mut parts = ptx.match_indices(ENTRY).map(|(at, _)| at + 1).peekable();
        let preamble = &ptx[..parts.peek().copied().unwrap_or(ptx.len())];
        let mut entries = HashMap::new();
        while let Some(start) = parts.next() {
            let text = &ptx[start..parts.peek().copied().unwrap_or(ptx.len())];
            let name = text[ENTRY.len() - 1..].split('(').next().unwrap_or_default();
            entries.insert(name, Kernel { text, module: Mutex::new(None) });
        }
        Self { shared_where_grids_overlap, preamble, entries }
    }

    /// The module of an entry; the context is current.
    fn module(&self, entry: &'static Entry) -> Result<Loaded, cuda_loader::Error> {
        let kernel = self.entries.get(entry.name).expect("the PTX and the host are built from the same kernels");
        let mut loaded = kernel.module.lock().expect("no panic under this lock");
        if let Some(loaded) = &*loaded {
            return Ok(loaded.clone());
        }
        let module = Arc::new(compile(&format!("{}{}\0", self.preamble, kernel.text))?);
        // Those that start early share multiprocessors with their neighbours: all ask for one split of the cache.
        if entry.waits {
            prefer_shared(&module.get_function(entry.name)?)?;
        }
        let mut dynamic_shared = entry.dynamic_shared;
        // A grid that starts early finds some multiprocessors less busy than others, and would put two blocks there: they take
        // twice as long, and with them the grid. Two that ask for half, and the driver's share, do not fit.
        if let Some(of_multiprocessor) = self.shared_where_grids_overlap.filter(|_| entry.alone) {
            let own = function_attributes(&module.get_function(entry.name)?)?.static_shared_bytes;
            dynamic_shared = dynamic_shared.max((of_multiprocessor / 2).saturating_sub(own));
        }
        if dynamic_shared > 0 {
            set_max_dynamic_shared(&module.get_function(entry.name)?, dynamic_shared)?;
        }
        let now = Loaded { module, dynamic_shared };
        *loaded = Some(now.clone());
        Ok(now)
    }
}

/// The module of PTX that ends in a zero byte.
///
/// It is compiled by the driver's linker and only then loaded: loading PTX itself takes the driver as long, but every other
/// call in the context waits for it. An H100 compiled gpt-oss's kernels on 16 cores in 0.2 s in this way, with copies going on
/// undisturbed, and in 1.4 s in the other, with none.
fn compile(ptx: &str) -> Result<Module, cuda_loader::Error> {
    let link = || {
        let mut linker = Linker::new()?;
        linker.add_ptx(ptx)?;
        Module::from_cubin(linker.complete()?, &[])
    };
    // The other way has the compiler's log, if it cannot do it either.
    link().or_else(|_| cuda_loader::module_from_ptx_with_log(ptx.trim_end_matches('\0')))
}

/// Which kernels are launched, each once.
#[derive(Default)]
struct Wanted(Mutex<Vec<&'static Entry>>);

impl Launcher for Wanted {
    unsafe fn launch(&self, entry: &'static Entry, launch: Launch, _args: &[Arg]) -> Result<(), LaunchError> {
        LaunchError::check(entry, launch)?;
        let mut wanted = self.0.lock().expect("no panic under this lock");
        if wanted.iter().all(|other| other.name != entry.name) {
            wanted.push(entry);
        }
        Ok(())
    }
}

/// Loads the kernels of launches without making them: the driver compiles nothing while a graph is recorded.
struct Preloader<'a>(&'a Inner);

impl Launcher for Preloader<'_> {
    unsafe fn launch(&self, entry: &'static Entry, _launch: Launch, _args: &[Arg]) -> Result<(), LaunchError> {
        self.0.kernels.module(entry).map(drop).map_err(|error| launch_error(entry, &error))
    }
}

fn launch_error(entry: &'static Entry, error: &cuda_loader::Error) -> LaunchError {
    LaunchError::Driver { kernel: entry.name, call: "launch", reason: error.to_string() }
}

impl Cuda {
    /// Opens a GPU.
    ///
    /// # Errors
    ///
    /// - [`Error::NoDevice`] if there is no driver, no such device, or one older than Ampere.
    /// - [`Error::Driver`] if the driver fails. Kernels are compiled when they are first launched.
    pub fn new(options: CudaOptions) -> Result<Self, Error> {
        let driver = cuda_loader::availability().map_err(|reason| Error::NoDevice { reason: chain(&reason) })?;
        if options.ordinal >= driver.devices {
            let reason = format!("device {} was asked for, the driver has {}", options.ordinal, driver.devices);
            return Err(Error::NoDevice { reason });
        }
        let failed = |call: &'static str| {
            move |error: cuda_loader::Error| Error::Driver { call, after: "none", reason: error.to_string() }
        };
        let open = || -> Result<_, cuda_loader::Error> {
            let device = CudaDevice::get_device(options.ordinal)?;
            let major = device.get_attribute(DeviceAttribute::ComputeCapabilityMajor)?;
            let minor = device.get_attribute(DeviceAttribute::ComputeCapabilityMinor)?;
            let n_sm = device.get_attribute(DeviceAttribute::MultiprocessorCount)?;
            Ok((device, device.name()?, (major, minor), n_sm as u32))
        };
        let (device, card, capability, n_sm) = open().map_err(failed("opening the device"))?;
        if capability.0 < 8 {
            let (major, minor) = capability;
            let reason = format!("{card} has compute capability {major}.{minor}, 8.0 or later is needed");
            return Err(Error::NoDevice { reason });
        }
        let ptx = options.ptx.unwrap_or(if capability == (9, 0) { PtxBuild::Sm90a } else { PtxBuild::Sm80 });
        if ptx == PtxBuild::Sm90a && capability != (9, 0) {
            let (major, minor) = capability;
            let reason = format!("PTX sm_90a runs on compute capability 9.0 only, {card} has {major}.{minor}");
            return Err(Error::NoDevice { reason });
        }
        let load = || -> Result<_, cuda_loader::Error> {
            let context = Context::new(device)?;
            CurrentContext::set_current(&context)?;
            let stream = Stream::new(StreamFlags::NON_BLOCKING, None)?;
            let allowed = options.programmatic && env::var_os(NO_PDL).is_none_or(|value| value == "0");
            let programmatic = allowed && ptx == PtxBuild::Sm90a;
            let shared = device.get_attribute(DeviceAttribute::MaxSharedMemoryPerMultiprocessor)?;
            let kernels = Kernels::of(ptx.text(), programmatic.then_some(shared as u32));
            let letters = Mutex::new(Letters { memory: PinnedBuffer::zeroed(REPLY + LETTER_BYTES)?, in_use: 0 });
            let (free, total) = cuda_loader::memory_info()?;
            let last_kernel = Mutex::new("none");
            Ok((Inner { programmatic, kernels, letters, stream, context, last_kernel }, (total - free) as u64))
        };
        let (inner, before) = load().map_err(failed("opening the context"))?;
        let (limit, used) = (options.vram_limit.unwrap_or(u64::MAX), AtomicU64::new(0));
        Ok(Self { card, ptx, n_sm, limit, used, before, inner: Arc::new(inner) })
    }

    /// The card's name.
    pub fn card(&self) -> &str {
        &self.card
    }

    /// Which PTX build it runs.
    pub fn ptx(&self) -> PtxBuild {
        self.ptx
    }

    /// How many multiprocessors it has.
    pub fn n_sm(&self) -> u32 {
        self.n_sm
    }

    /// An event behind what was launched so far: the time between two of them is the device's own for what lies between.
    /// The calling thread is left in the device's context, as the event's own methods want it.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if the driver fails, earlier kernels' faults included.
    pub fn mark(&self) -> Result<Event, Error> {
        self.inner.run("event", || {
            let event = Event::new(EventFlags::DEFAULT)?;
            event.record(&self.inner.stream)?;
            Ok(event)
        })
    }

    /// Nanoseconds on the device from `start` until all that was launched since is done.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] if the driver fails, earlier kernels' faults included.
    pub fn nanoseconds_since(&self, start: &Event) -> Result<f64, Error> {
        let end = self.mark()?;
        self.inner.run("event", || {
            end.synchronize()?;
            Ok(f64::from(end.elapsed_time_f32(start)?) * 1e6)
        })
    }
}

/// An error and its sources on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

impl Launcher for Cuda {
    unsafe fn launch(&self, entry: &'static Entry, launch: Launch, args: &[Arg]) -> Result<(), LaunchError> {
        LaunchError::check(entry, launch)?;
        // A slice is two parameters: address and length. Each takes one 8-byte place, of which a scalar fills the start.
        let mut values = Vec::with_capacity(2 * args.len());
        for arg in args {
            match *arg {
                Arg::Slice { address, len } => values.extend([address, len]),
                Arg::U32(value) => values.push(value.into()),
                Arg::I32(value) => values.push((value as u32).into()),
                Arg::U64(value) => values.push(value),
                Arg::F32(value) => values.push(value.to_bits().into()),
            }
        }
        let pointers: Vec<*mut c_void> = values.iter_mut().map(|value| (value as *mut u64).cast()).collect();
        let start = || {
            self.inner.enter()?;
            let Loaded { module, dynamic_shared } = self.inner.kernels.module(entry)?;
            let function = module.get_function(entry.name)?;
            let stream = &self.inner.stream;
            let attributes = LaunchAttributes {
                programmatic_stream_serialization: self.inner.programmatic,
                ..LaunchAttributes::default()
            };
            // SAFETY: the values fit the entry's parameters, as the typed launcher made them; the rest is the caller's.
            unsafe { launch_ex(&function, launch.grid, launch.block, dynamic_shared, stream, &pointers, attributes) }
        };
        start().map_err(|error: cuda_loader::Error| launch_error(entry, &error))?;
        *self.inner.last_kernel.lock().expect("no panic under this lock") = entry.name;
        Ok(())
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        format!("{} ({} PTX)", self.card, self.ptx.name())
    }

    fn multiprocessors(&self) -> u32 {
        self.n_sm
    }

    fn has_warpgroups(&self) -> bool {
        self.ptx == PtxBuild::Sm90a
    }

    fn memory(&self) -> Result<MemoryInfo, Error> {
        let (free, total) = self.inner.run("memory info", cuda_loader::memory_info)?;
        let since = ((total - free) as u64).saturating_sub(self.before);
        let used = self.used.load(Ordering::Relaxed);
        let total = self.limit.min(total as u64);
        Ok(MemoryInfo { free: (free as u64).min(total.saturating_sub(used)), total, before: self.before, since })
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        let MemoryInfo { free, total, .. } = self.memory()?;
        let wanted = bytes as u64;
        if wanted > free {
            return Err(Error::OutOfMemory { wanted, free, total });
        }
        // SAFETY: owned by the caller until `free`.
        let pointer = unsafe { cuda_malloc::<u8>(bytes.max(1)) };
        let pointer = pointer.map_err(|error| match error {
            CudaError::OutOfMemory => Error::OutOfMemory { wanted, free, total },
            other => self.inner.driver_error("allocate")(other.into()),
        })?;
        self.used.fetch_add(wanted, Ordering::Relaxed);
        Ok(pointer.as_raw())
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
        // A failure here is an earlier kernel's fault, which the next checked call reports.
        let _ = self.inner.enter();
        // SAFETY: the caller's promise; `cuMemFree` waits for work that uses the memory.
        let _ = unsafe { cuda_free(DevicePointer::<u8>::from_raw(address)) };
    }

    fn copy_to_device(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        let inner = &self.inner;
        if from.len() <= LETTER_BYTES {
            let mut letters = inner.letters.lock().expect("no panic under this lock");
            if letters.in_use + from.len() > REPLY {
                inner.synchronize("copy to the device")?;
                letters.in_use = 0;
            }
            let place = letters.in_use..letters.in_use + from.len();
            letters.in_use = place.end;
            let letter = &mut letters.memory[place];
            letter.copy_from_slice(from);
            // SAFETY: nobody writes there before the stream has been waited for.
            return inner.run("copy to the device", || unsafe { copy_to_device_async(address, letter, &inner.stream) });
        }
        // SAFETY: `from` is not touched before the synchronization below.
        inner.run("copy to the device", || unsafe { copy_to_device_async(address, from, &inner.stream) })?;
        inner.synchronize("copy to the device")
    }

    unsafe fn copy_to_device_async(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        let inner = &self.inner;
        // SAFETY: the caller's promise.
        inner.run("copy to the device", || unsafe { copy_to_device_async(address, from, &inner.stream) })
    }

    fn staging(&self, bytes: usize) -> Result<Box<dyn Staging>, Error> {
        self.inner.run("page-locked memory", || Ok(Box::new(PinnedBuffer::<u8>::zeroed(bytes)?) as Box<dyn Staging>))
    }

    fn copy_to_host(&self, address: u64, to: &mut [u8]) -> Result<(), Error> {
        let inner = &self.inner;
        if to.len() <= LETTER_BYTES {
            let mut letters = inner.letters.lock().expect("no panic under this lock");
            let letter = &mut letters.memory[REPLY..REPLY + to.len()];
            // SAFETY: `letter` is not touched before the synchronization below.
            inner.run("copy to the host", || unsafe { copy_to_host_async(letter, address, &inner.stream) })?;
            inner.synchronize("copy to the host")?;
            to.copy_from_slice(letter);
            letters.in_use = 0;
            return Ok(());
        }
        // SAFETY: `to` is not touched before the synchronization below.
        inner.run("copy to the host", || unsafe { copy_to_host_async(to, address, &inner.stream) })?;
        inner.synchronize("copy to the host")
    }

    fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        let inner = &self.inner;
        // SAFETY: the caller's range, in the stream's order.
        inner.run("fill", || unsafe { fill_async(address, byte, bytes, &inner.stream) })
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.inner.synchronize("synchronize")
    }

    fn fence(&self) -> Result<Box<dyn Fence>, Error> {
        let inner = &self.inner;
        let event = inner.run("fence", || {
            let event = Event::new(EventFlags::DISABLE_TIMING)?;
            event.record(&inner.stream)?;
            Ok(event)
        })?;
        Ok(Box::new(CudaFence { event, inner: Arc::clone(inner) }))
    }

    fn preload(&self, body: &mut dyn FnMut(&dyn Launcher) -> Result<(), LaunchError>) -> Result<(), Error> {
        let wanted = Wanted::default();
        body(&wanted)?;
        let (inner, wanted) = (&self.inner, wanted.0.into_inner().expect("no panic under this lock"));
        wanted.into_par_iter().try_for_each(|entry| {
            let loaded = inner.enter().and_then(|()| inner.kernels.module(entry));
            loaded.map(drop).map_err(|error| Error::Launch(launch_error(entry, &error)))
        })
    }

    unsafe fn record(
        &self,
        body: &mut dyn FnMut(&dyn Launcher) -> Result<(), LaunchError>,
    ) -> Result<Box<dyn Graph>, Error> {
        let inner = &self.inner;
        inner.enter().map_err(inner.driver_error("record"))?;
        body(&Preloader(inner))?;
        let graph = capture(&inner.stream, CaptureMode::ThreadLocal, || body(self).map_err(Recording::Launch));
        let graph = graph.map_err(|error| match error {
            Recording::Launch(error) => Error::Launch(error),
            Recording::Driver(error) => inner.driver_error("record")(error),
        })?;
        let (exec, n_nodes) = inner.run("record", || Ok((graph.instantiate()?, graph.node_count()?)))?;
        Ok(Box::new(CudaGraph { exec, n_nodes, inner: Arc::clone(inner) }))
    }
}

enum Recording {
    Launch(LaunchError),
    Driver(cuda_loader::Error),
}

impl From<cuda_loader::Error> for Recording {
    fn from(error: cuda_loader::Error) -> Self {
        Self::Driver(error)
    }
}

struct CudaFence {
    event: Event,
    inner: Arc<Inner>,
}

// SAFETY: an event belongs to no thread, as with `Inner`.
unsafe impl Send for CudaFence {}

impl Fence for CudaFence {
    fn wait(&self) -> Result<(), Error> {
        self.inner.run("fence", || Ok(self.event.synchronize()?))
    }
}

struct CudaGraph {
    exec: GraphExec,
    n_nodes: usize,
    inner: Arc<Inner>,
}

impl Graph for CudaGraph {
    fn replay(&self) -> Result<(), Error> {
        // SAFETY: the recorded memory lives by `record`'s contract, the module by `inner`.
        self.inner.run("graph replay", || unsafe { self.exec.launch(&self.inner.stream) })
    }

    fn n_nodes(&self) -> usize {
        self.n_nodes
    }
}
