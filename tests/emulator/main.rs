//! `cuda_std`'s emulator and `#[kernel]`: each fault planted and found, each operation against an independent reference.

#![expect(clippy::unwrap_used, reason = "a test that panics fails, which is what it should do")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    unsafe_op_in_unsafe_fn,
    reason = "kernels that break their contracts are the point, and the emulator is what checks them"
)]

mod convergence;
mod grids;
mod interface;
mod memory;
mod numbers;
mod operations;
mod order;
mod races;
mod warpgroups;

use cuda_std::emulator::{Emulator, Fault, MemoryError, Mode};
use cuda_std::{DeviceSlice, Element, LaunchError, f16};

/// Fast, and checked in natural and in permuted order.
fn all_modes() -> impl Iterator<Item = Device> {
    [Mode::Fast, Mode::Checked { seed: 0 }, Mode::Checked { seed: 7 }].into_iter().map(Device::new)
}

fn checked() -> Device {
    Device::new(Mode::Checked { seed: 0 })
}

/// An emulator with typed memory.
struct Device(Emulator);

impl Device {
    fn new(mode: Mode) -> Self {
        Self(Emulator::new(mode))
    }

    fn upload<T: Value>(&self, values: &[T]) -> DeviceSlice<T> {
        let slice = self.uninitialized(values.len());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.bytes()).collect();
        self.0.copy_to_device(slice.address(), &bytes).unwrap();
        slice
    }

    fn zeros<T: Value>(&self, len: usize) -> DeviceSlice<T> {
        let slice = self.uninitialized(len);
        self.0.fill(slice.address(), 0, len * size_of::<T>()).unwrap();
        slice
    }

    fn uninitialized<T: Element>(&self, len: usize) -> DeviceSlice<T> {
        DeviceSlice::new(self.0.allocate(len * size_of::<T>()).unwrap(), len)
    }

    fn download<T: Value>(&self, slice: DeviceSlice<T>) -> Result<Vec<T>, MemoryError> {
        let mut bytes = vec![0; slice.len() * size_of::<T>()];
        self.0.copy_to_host(slice.address(), &mut bytes)?;
        Ok(bytes.chunks_exact(size_of::<T>()).map(T::from_bytes).collect())
    }
}

/// An element that goes to the device and back.
trait Value: Element {
    fn bytes(self) -> Vec<u8>;
    fn from_bytes(bytes: &[u8]) -> Self;
}

macro_rules! value {
    ($($type:ty)*) => {$(
        impl Value for $type {
            fn bytes(self) -> Vec<u8> {
                self.to_ne_bytes().to_vec()
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_ne_bytes(bytes.try_into().unwrap())
            }
        }
    )*};
}
value!(u8 u16 u32 i32 u64 f32 f16);

#[track_caller]
fn fault(result: Result<(), LaunchError>) -> Fault {
    match result {
        Err(LaunchError::Fault(fault)) => fault,
        other => panic!("expected a fault, found {other:?}"),
    }
}

/// `file:line` of the one line of `file` that ends in the comment `marker`.
#[track_caller]
fn place(file: &str, marker: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let (source, ending) = (std::fs::read_to_string(path).unwrap(), format!("// {marker}"));
    let found: Vec<usize> = source.lines().enumerate().filter(|(_, l)| l.ends_with(&ending)).map(|(i, _)| i).collect();
    let [line] = found[..] else { panic!("{marker} marks {} lines of {file}", found.len()) };
    format!("{file}:{}", line + 1)
}

/// The place of a marker in the file that calls it.
macro_rules! at {
    ($marker:expr) => {
        crate::place(file!(), $marker)
    };
}
use at;

/// splitmix64: the same values in every run.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Uniform in `low..high`.
    fn uniform(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.bits() >> 40) as f32 / (1u64 << 24) as f32)
    }
}
