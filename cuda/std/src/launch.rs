//! The host's view of a kernel: what `#[kernel]` says of it, and how it is started on either machine.

use std::string::String;
use std::vec::Vec;
use std::{fmt, ops::Range};

use core::marker::PhantomData;

use crate::{Element, emulator};

/// The geometry of one launch, in blocks and threads; each axis at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
}

impl Launch {
    /// A one-dimensional grid of one-dimensional blocks.
    pub const fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1] }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.block[0] * self.block[1] * self.block[2]
    }
}

/// What `#[kernel]` records of a kernel: the single source of its interface.
pub struct Entry {
    /// The PTX entry's name.
    pub name: &'static str,
    /// The parameters in order.
    pub params: &'static [Param],
    /// The most threads a block may have (`.maxntid`).
    pub threads: u32,
    /// How many such blocks an SM is to hold (`.minnctapersm`).
    pub blocks_per_sm: u32,
    /// Bytes of `dynamic_shared_array!` that each launch gives a block.
    pub dynamic_shared: u32,
    /// Whether it calls [`grid::wait`](crate::grid::wait) itself, instead of first of all.
    pub waits: bool,
    /// Whether a multiprocessor is to have no two of its blocks, where grids overlap.
    pub alone: bool,
    /// Whether it uses [`wgmma`](crate::wgmma), and so is only in sm_90a's PTX.
    pub warpgroups: bool,
    /// The same body for the emulator. Called once per thread, inside its coroutine.
    #[doc(hidden)]
    pub emulate: unsafe fn(&[emulator::Argument]),
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name)?;
        for (i, param) in self.params.iter().enumerate() {
            write!(f, "{}{}: {}", if i == 0 { "" } else { ", " }, param.name, param.kind)?;
        }
        write!(f, ")")
    }
}

/// One parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in the source.
    pub name: &'static str,
    /// What it is.
    pub kind: ParamKind,
}

/// The kinds of kernel parameters. A slice becomes two PTX parameters: `.u64` address, `.u64` number of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// `Global<T>`; the element's name.
    Global(&'static str),
    /// `Disjoint<T>`.
    Disjoint(&'static str),
    /// `Atomics<T>`.
    Atomics(&'static str),
    /// A scalar by value; its type's name.
    Scalar(&'static str),
}

impl fmt::Display for ParamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Global(element) => write!(f, "Global<{element}>"),
            Self::Disjoint(element) => write!(f, "Disjoint<{element}>"),
            Self::Atomics(element) => write!(f, "Atomics<{element}>"),
            Self::Scalar(name) => f.write_str(name),
        }
    }
}

/// One argument of a launch, checked against the kernel's signature by the typed launcher.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "the type of each scalar")]
pub enum Arg {
    /// Device memory: address and number of elements.
    Slice {
        address: u64,
        len: u64,
    },
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
}

macro_rules! scalar {
    ($type:ty, $variant:ident) => {
        impl From<$type> for Arg {
            fn from(value: $type) -> Self {
                Self::$variant(value)
            }
        }
    };
}
scalar!(u32, U32);
scalar!(i32, I32);
scalar!(u64, U64);
scalar!(f32, F32);

impl<T: Element> From<DeviceSlice<T>> for Arg {
    fn from(slice: DeviceSlice<T>) -> Self {
        Self::Slice { address: slice.address, len: slice.len as u64 }
    }
}

/// `len` elements of some device's memory: an address, not an owner.
pub struct DeviceSlice<T> {
    address: u64,
    len: usize,
    elements: PhantomData<fn(T) -> T>,
}

impl<T> Clone for DeviceSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for DeviceSlice<T> {}

impl<T> fmt::Debug for DeviceSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements at {:#x}", self.len, self.address)
    }
}

impl<T: Element> DeviceSlice<T> {
    /// `len` elements from `address`; whoever launches with it answers for their being there.
    pub fn new(address: u64, len: usize) -> Self {
        Self { address, len, elements: PhantomData }
    }

    /// The first element's address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`.
    ///
    /// # Panics
    ///
    /// If `range` reaches past the end: the caller's bug.
    #[track_caller]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        Self::new(self.address + (range.start * size_of::<T>()) as u64, range.end - range.start)
    }
}

/// A machine that runs kernels: the emulator, or a GPU.
pub trait Launcher {
    /// Starts `entry`; a GPU may still be at it on return.
    ///
    /// # Errors
    ///
    /// - [`LaunchError::Contract`] if the geometry breaks the kernel's bounds.
    /// - [`LaunchError::Fault`] from the emulator: the kernel did something wrong.
    /// - [`LaunchError::Driver`] from a GPU.
    ///
    /// # Safety
    ///
    /// `args` fit `entry.params`, their memory is this device's and lives until the launch is done, and the kernel's own
    /// `# Safety` section holds.
    unsafe fn launch(&self, entry: &'static Entry, launch: Launch, args: &[Arg]) -> Result<(), LaunchError>;
}

/// Why a kernel did not run, or not to its end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum LaunchError {
    #[error("kernel {kernel}: {what} is {found}, but {bound} is the bound")]
    Contract { kernel: &'static str, what: &'static str, found: u64, bound: u64 },
    #[error(transparent)]
    Fault(#[from] emulator::Fault),
    #[error("kernel {kernel}: {call} failed: {reason}")]
    Driver { kernel: &'static str, call: &'static str, reason: String },
}

impl LaunchError {
    /// Checks what holds for every launch on every machine: axes of at least 1 and at most the hardware's, and a block
    /// within the kernel's own bound.
    ///
    /// # Errors
    ///
    /// [`LaunchError::Contract`] naming the first bound broken.
    pub fn check(entry: &Entry, launch: Launch) -> Result<(), Self> {
        let kernel = entry.name;
        let axes = ["grid.x", "grid.y", "grid.z", "block.x", "block.y", "block.z"];
        let bounds = [0x7fff_ffff, 0xffff, 0xffff, 1024, 1024, 64];
        let found: Vec<u32> = launch.grid.into_iter().chain(launch.block).collect();
        for ((what, bound), found) in axes.into_iter().zip(bounds).zip(found) {
            if found == 0 || u64::from(found) > bound {
                return Err(Self::Contract { kernel, what, found: found.into(), bound });
            }
        }
        let threads: u64 = launch.block.into_iter().map(u64::from).product();
        if threads > entry.threads.into() {
            return Err(Self::Contract {
                kernel,
                what: "threads per block",
                found: threads,
                bound: entry.threads.into(),
            });
        }
        Ok(())
    }
}
