//! The vocabulary of kernels written in Rust, with the names of Rust-CUDA's crate of the same name.
//!
//! Two machines stand behind it. On `nvptx64` each operation is one PTX instruction of rustc's own NVPTX backend; on the
//! host the same operation runs in the SIMT [`emulator`], so that a kernel is tested where there is no GPU. What differs
//! between the two is in [`ptx`](self) and [`emulator`] and nowhere else: kernels never ask which machine they are on.
//!
//! - [`thread`], [`warp`]: who am I; barriers, shuffles, votes, reductions.
//! - [`Global`], [`Disjoint`], [`Atomics`]: device memory behind a kernel parameter; [`Shared`], [`shared_array!`]: a
//!   block's own memory; [`cp_async`]: copies between the two that overlap with arithmetic.
//! - [`grid`]: starting early, and the last block of a grid.
//! - [`mma`], [`wgmma`]: tensor cores; [`f16`](struct@f16), [`Float`]: numbers.
//! - [`kernel`], [`Entry`], [`Launch`]: one signature for PTX entry, emulated twin and typed launcher.
//!
//! # Convergence
//!
//! rustc 1.95 does not mark functions `convergent`. Barriers, shuffles and votes are LLVM intrinsics, which LLVM knows to
//! be convergent, and `cuda_builder` passes the two flags without which a barrier is still copied into the branches
//! around it; `cargo xtask audit` counts them per kernel against a committed table.

#![no_std]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_unadjusted, asm_experimental_arch, f16, link_llvm_intrinsics, stdarch_nvptx),
    expect(internal_features, reason = "convergent operations must be LLVM intrinsics: see `Convergence` above")
)]

#[cfg(not(target_arch = "nvptx64"))]
extern crate std;

pub mod cp_async;
mod element;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
mod float;
pub mod grid;
#[cfg(not(target_arch = "nvptx64"))]
mod launch;
mod memory;
pub mod mma;
#[cfg(target_arch = "nvptx64")]
mod ptx;
mod shared;
pub mod thread;
pub mod warp;
pub mod wgmma;

#[cfg(not(target_arch = "nvptx64"))]
use emulator::machine;
#[cfg(target_arch = "nvptx64")]
use ptx as machine;

pub use cuda_std_macros::kernel;
pub use element::{Element, Store};
pub use float::{Float, add_f16x2, f16, mul_f16x2, pack_f16x2, permute_bytes, unpack_f16x2};
#[cfg(not(target_arch = "nvptx64"))]
pub use launch::{Arg, DeviceSlice, Entry, Launch, LaunchError, Launcher, Param, ParamKind};
pub use memory::{Atomics, Disjoint, Global, lane_share};
pub use shared::Shared;

/// What macros expand to; not for use by hand.
#[doc(hidden)]
pub mod internal {
    #[cfg(target_arch = "nvptx64")]
    pub use core::arch::{asm, global_asm};

    #[cfg(not(target_arch = "nvptx64"))]
    pub use crate::emulator::machine::{dynamic_shared_array, shared_array};
    #[cfg(target_arch = "nvptx64")]
    pub use crate::shared::from_address;
}

/// On the device a panic is a trap: the launch fails with `CUDA_ERROR_LAUNCH_FAILED`. The message is for the emulator.
#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    machine::trap()
}
