//! The SIMT emulator: runs kernels on the host, thread by thread, block by block.
//!
//! Every thread of a block is a stackful coroutine. It runs until an operation that needs others (a barrier, a shuffle, a
//! vote, `mma`); when all of them are there the operation is done for all at once, and they go on. So a kernel's body is
//! ordinary Rust to debuggers, sanitizers and profilers.
//!
//! - [`Mode::Fast`] spreads blocks over the cores and checks bounds, alignment of vector accesses, and convergence.
//! - [`Mode::Checked`] also finds reads of memory that nothing wrote and data races: two accesses of one element by
//!   different threads, one of them a write, with no barrier that orders them. It runs blocks, warps and lanes in an order
//!   drawn from its seed, so that what depends on order shows.
//!
//! It is not a model of time, and not of weak memory: accesses happen in program order.

mod block;
mod fault;
pub(crate) mod machine;
mod pool;
mod shadow;
mod wgmma;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::vec::Vec;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::launch::{Arg, Entry, Launch, LaunchError, Launcher};
pub use fault::{Fault, FaultKind};
pub use machine::Argument;
use shadow::Shadow;

/// Allocations are aligned like `cuMemAlloc`'s.
const ALIGNMENT: usize = 256;
/// What uninitialized memory holds in checked mode: NaN in every float format.
const POISON: u8 = 0xff;

/// How much is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For use: as fast as it gets.
    Fast,
    /// For tests. `seed` draws the order of blocks, warps and lanes; 0 is the natural order.
    Checked {
        /// Draws the order.
        seed: u64,
    },
}

/// A device made of host memory and host cores.
pub struct Emulator {
    mode: Mode,
    allocations: RwLock<BTreeMap<u64, Arc<Allocation>>>,
    launches: AtomicU32,
    /// Held by the host's copies and by checked launches: neither memory nor shadows are synchronized.
    exclusive: Mutex<()>,
}

struct Allocation {
    address: u64,
    bytes: usize,
    layout: Layout,
    shadow: Option<Shadow>,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: made by `alloc_zeroed` with this layout, and freed once.
        unsafe { dealloc(self.address as *mut u8, self.layout) };
    }
}

/// Why a memory operation of the emulator failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum MemoryError {
    #[error("the host cannot allocate {bytes} bytes")]
    OutOfMemory { bytes: usize },
    #[error("{bytes} bytes at {address:#x} are not inside one allocation")]
    NotAllocated { address: u64, bytes: usize },
    #[error("byte {byte} of the {bytes} read at {address:#x} was never written")]
    Uninitialized { address: u64, bytes: usize, byte: usize },
}

impl Emulator {
    /// An empty device.
    pub fn new(mode: Mode) -> Self {
        Self { mode, allocations: RwLock::new(BTreeMap::new()), launches: AtomicU32::new(0), exclusive: Mutex::new(()) }
    }

    /// The mode it was made with.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Allocates `bytes`, 256-byte aligned; contents are undefined.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfMemory`] if the host has none.
    pub fn allocate(&self, bytes: usize) -> Result<u64, MemoryError> {
        let failed = MemoryError::OutOfMemory { bytes };
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).map_err(|_| failed.clone())?;
        // SAFETY: the layout has a size of at least 1.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            return Err(failed);
        }
        let shadow = matches!(self.mode, Mode::Checked { .. }).then(|| {
            // SAFETY: just allocated with at least `bytes` bytes.
            unsafe { pointer.write_bytes(POISON, bytes) };
            Shadow::new(pointer as usize, bytes)
        });
        let address = pointer as u64;
        let allocation = Arc::new(Allocation { address, bytes, layout, shadow });
        self.allocations.write().expect("no panic under this lock").insert(address, allocation);
        Ok(address)
    }

    /// Frees what [`allocate`](Self::allocate) gave.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NotAllocated`] if `address` is not the start of an allocation.
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        let removed = self.allocations.write().expect("no panic under this lock").remove(&address);
        removed.map(drop).ok_or(MemoryError::NotAllocated { address, bytes: 0 })
    }

    fn find(&self, address: u64, bytes: usize) -> Result<Arc<Allocation>, MemoryError> {
        let allocations = self.allocations.read().expect("no panic under this lock");
        let found = allocations.range(..=address).next_back().map(|(_, allocation)| allocation);
        found
            .filter(|a| (address - a.address).checked_add(bytes as u64).is_some_and(|end| end <= a.bytes as u64))
            .cloned()
            .ok_or(MemoryError::NotAllocated { address, bytes })
    }

    /// Copies host bytes to the device.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NotAllocated`] if they do not fit one allocation.
    pub fn copy_to_device(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        let allocation = self.find(address, from.len())?;
        let _one_at_a_time = self.exclusive();
        // SAFETY: `find` checked the range. No other copy runs beside this one, and no kernel that touches these bytes: it
        // is checked and holds the lock, or its caller promised that they are its own.
        unsafe { (address as *mut u8).copy_from(from.as_ptr(), from.len()) };
        if let Some(shadow) = &allocation.shadow {
            shadow.initialize(address as usize, from.len());
        }
        Ok(())
    }

    /// Copies device bytes to the host.
    ///
    /// # Errors
    ///
    /// - [`MemoryError::NotAllocated`] if they are not inside one allocation.
    /// - [`MemoryError::Uninitialized`] in checked mode, if nothing wrote one of them.
    pub fn copy_to_host(&self, address: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let bytes = to.len();
        let allocation = self.find(address, bytes)?;
        let _one_at_a_time = self.exclusive();
        if let Some(shadow) = &allocation.shadow
            && let Some(byte) = shadow.first_uninitialized(address as usize, bytes)
        {
            return Err(MemoryError::Uninitialized { address, bytes, byte });
        }
        // SAFETY: as in `copy_to_device`.
        unsafe { to.as_mut_ptr().copy_from(address as *const u8, bytes) };
        Ok(())
    }

    /// Sets device bytes.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NotAllocated`] if they are not inside one allocation.
    pub fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<(), MemoryError> {
        let allocation = self.find(address, bytes)?;
        let _one_at_a_time = self.exclusive();
        // SAFETY: as in `copy_to_device`.
        unsafe { (address as *mut u8).write_bytes(byte, bytes) };
        if let Some(shadow) = &allocation.shadow {
            shadow.initialize(address as usize, bytes);
        }
        Ok(())
    }

    fn exclusive(&self) -> MutexGuard<'_, ()> {
        self.exclusive.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn resolve(&self, entry: &Entry, args: &[Arg], held: &mut Vec<Arc<Allocation>>) -> Result<Vec<Argument>, Fault> {
        assert_eq!(args.len(), entry.params.len(), "the typed launcher gives one argument per parameter");
        let resolve = |(index, arg): (usize, &Arg)| match *arg {
            // An empty slice names no memory.
            Arg::Slice { len: 0, .. } => Ok(Argument::empty_slice()),
            Arg::Slice { address, len } => {
                let (size, param) = (machine::element_bytes(entry.params[index].kind), entry.params[index].name);
                let bytes = len.saturating_mul(size as u64);
                let fault =
                    |kind| Fault { kernel: entry.name, block: [0; 3], thread: [0; 3], at: "at launch".into(), kind };
                if !(address as usize).is_multiple_of(size) {
                    return Err(fault(FaultKind::Misaligned { address: address as usize, alignment: size }));
                }
                let allocation = usize::try_from(bytes)
                    .ok()
                    .and_then(|bytes| self.find(address, bytes).ok())
                    .ok_or_else(|| fault(FaultKind::NotAllocated { index, param, address, bytes }))?;
                let argument = Argument::slice_of(address as usize, len as usize, allocation.shadow.as_ref());
                held.push(allocation);
                Ok(argument)
            }
            Arg::U32(value) => Ok(Argument::scalar(value.into())),
            Arg::I32(value) => Ok(Argument::scalar((value as u32).into())),
            Arg::U64(value) => Ok(Argument::scalar(value)),
            Arg::F32(value) => Ok(Argument::scalar(value.to_bits().into())),
        };
        args.iter().enumerate().map(resolve).collect()
    }
}

impl Launcher for Emulator {
    unsafe fn launch(&self, entry: &'static Entry, launch: Launch, args: &[Arg]) -> Result<(), LaunchError> {
        LaunchError::check(entry, launch)?;
        let mut held = Vec::new();
        let arguments = self.resolve(entry, args, &mut held)?;
        let number = self.launches.fetch_add(2, Ordering::Relaxed) + 1;
        let n_blocks = launch.grid.iter().map(|&n| n as usize).product::<usize>();

        match self.mode {
            Mode::Fast => {
                let run = |block| block::run(entry, launch, &arguments, number, block, None);
                if n_blocks == 1 {
                    run(0)?;
                } else {
                    (0..n_blocks).into_par_iter().try_for_each(run)?;
                }
            }
            Mode::Checked { seed } => {
                let _one_at_a_time = self.exclusive();
                let mut order = block::Order::new(seed, number);
                for block in order.permutation(n_blocks) {
                    block::run(entry, launch, &arguments, number, block, Some(&mut order))?;
                }
            }
        }
        Ok(())
    }
}
