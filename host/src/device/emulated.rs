//! The emulator as a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cuda_std::emulator::{Emulator, Mode};
use cuda_std::{Arg, Entry, Launch, LaunchError, Launcher};

use super::{Device, Error, Fence, Graph, MemoryInfo, Staging};

/// Host memory and host cores, running the GPU's own kernels.
pub struct Emulated {
    emulator: Arc<Emulator>,
    limit: u64,
    used: AtomicU64,
    prefers_scalars: bool,
}

impl Emulated {
    /// A device with all of the host's memory.
    pub fn new(mode: Mode) -> Self {
        Self::with_limit(mode, u64::MAX)
    }

    /// A device that behaves as if it had `limit` bytes.
    pub fn with_limit(mode: Mode, limit: u64) -> Self {
        Self { emulator: Arc::new(Emulator::new(mode)), limit, used: AtomicU64::new(0), prefers_scalars: false }
    }

    /// Runs models with what is fastest here, not with what a GPU would run: see [`Device::prefers_scalars`].
    pub fn for_use(self) -> Self {
        Self { prefers_scalars: true, ..self }
    }
}

impl Launcher for Emulated {
    unsafe fn launch(&self, entry: &'static Entry, launch: Launch, args: &[Arg]) -> Result<(), LaunchError> {
        // SAFETY: the caller's promise.
        unsafe { self.emulator.launch(entry, launch, args) }
    }
}

impl Device for Emulated {
    fn name(&self) -> String {
        format!("SIMT emulator on {} CPU threads", std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn multiprocessors(&self) -> u32 {
        rayon::current_num_threads() as u32
    }

    fn has_warpgroups(&self) -> bool {
        // Such a product takes several times as long here as those of its warps do: it is for tests of kernels.
        matches!(self.emulator.mode(), Mode::Checked { .. })
    }

    fn prefers_scalars(&self) -> bool {
        self.prefers_scalars
    }

    fn memory(&self) -> Result<MemoryInfo, Error> {
        let used = self.used.load(Ordering::Relaxed);
        let total = self.limit.min(host_memory().unwrap_or(u64::MAX));
        Ok(MemoryInfo { free: total.saturating_sub(used), total, before: 0, since: used })
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        let MemoryInfo { free, total, .. } = self.memory()?;
        let wanted = bytes as u64;
        let out_of_memory = Error::OutOfMemory { wanted, free, total };
        if wanted > free {
            return Err(out_of_memory);
        }
        let address = self.emulator.allocate(bytes).map_err(|_| out_of_memory)?;
        self.used.fetch_add(wanted, Ordering::Relaxed);
        Ok(address)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        self.emulator.free(address).expect("freed once, by the buffer that allocated it");
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    fn copy_to_device(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        Ok(self.emulator.copy_to_device(address, from)?)
    }

    unsafe fn copy_to_device_async(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        self.copy_to_device(address, from)
    }

    fn staging(&self, bytes: usize) -> Result<Box<dyn Staging>, Error> {
        Ok(Box::new(vec![0; bytes]))
    }

    fn copy_to_host(&self, address: u64, to: &mut [u8]) -> Result<(), Error> {
        Ok(self.emulator.copy_to_host(address, to)?)
    }

    fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        Ok(self.emulator.fill(address, byte, bytes)?)
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(()) // Launches return when they are done.
    }

    fn fence(&self) -> Result<Box<dyn Fence>, Error> {
        Ok(Box::new(Done))
    }

    fn preload(&self, body: &mut dyn FnMut(&dyn Launcher) -> Result<(), LaunchError>) -> Result<(), Error> {
        // The kernels are part of this executable; what `body` does wrong is to be found here, too.
        Ok(body(&Recorder::default())?)
    }

    unsafe fn record(
        &self,
        body: &mut dyn FnMut(&dyn Launcher) -> Result<(), LaunchError>,
    ) -> Result<Box<dyn Graph>, Error> {
        let recorder = Recorder::default();
        body(&recorder)?;
        let launches = recorder.launches.into_inner().expect("no panic under this lock");
        Ok(Box::new(EmulatedGraph { emulator: Arc::clone(&self.emulator), launches }))
    }
}

/// Copies and launches return when they are done.
struct Done;

impl Fence for Done {
    fn wait(&self) -> Result<(), Error> {
        Ok(())
    }
}

struct Recorded {
    entry: &'static Entry,
    launch: Launch,
    args: Vec<Arg>,
}

#[derive(Default)]
struct Recorder {
    launches: std::sync::Mutex<Vec<Recorded>>,
}

impl Launcher for Recorder {
    unsafe fn launch(&self, entry: &'static Entry, launch: Launch, args: &[Arg]) -> Result<(), LaunchError> {
        LaunchError::check(entry, launch)?;
        let recorded = Recorded { entry, launch, args: args.to_vec() };
        self.launches.lock().expect("no panic under this lock").push(recorded);
        Ok(())
    }
}

struct EmulatedGraph {
    emulator: Arc<Emulator>,
    launches: Vec<Recorded>,
}

impl Graph for EmulatedGraph {
    fn replay(&self) -> Result<(), Error> {
        for recorded in &self.launches {
            // SAFETY: as recorded; the memory lives by `record`'s contract.
            unsafe { self.emulator.launch(recorded.entry, recorded.launch, &recorded.args)? };
        }
        Ok(())
    }

    fn n_nodes(&self) -> usize {
        self.launches.len()
    }
}

/// What the host can still give without swapping; `None` where `/proc` is not Linux's.
fn host_memory() -> Option<u64> {
    static TOTAL: std::sync::OnceLock<Option<u64>> = std::sync::OnceLock::new();
    *TOTAL.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
    })
}
