//! What the emulator finds wrong with a kernel.

use std::format;
use std::string::String;

/// A kernel did something that a GPU would not forgive, or would forgive in silence.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel {kernel}, block {block:?}, thread {thread:?}, {at}: {kind}")]
pub struct Fault {
    /// The PTX entry.
    pub kernel: &'static str,
    /// The block's index in the grid.
    pub block: [u32; 3],
    /// The thread's index in its block.
    pub thread: [u32; 3],
    /// `file:line` of the operation; of a panic, "after" that of the last barrier or warp operation.
    pub at: String,
    /// What happened.
    pub kind: FaultKind,
}

/// What a kernel did wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum FaultKind {
    #[error("out of bounds: element {index} of {len}")]
    OutOfBounds { index: usize, len: usize },
    #[error("argument {index} ({param}): {bytes} bytes at {address:#x} are not inside one allocation of this device")]
    NotAllocated { index: usize, param: &'static str, address: u64, bytes: u64 },
    #[error("misaligned: address {address:#x} is not a multiple of {alignment}")]
    Misaligned { address: usize, alignment: usize },
    #[error("reads element {index}, which nothing wrote")]
    Uninitialized { index: usize },
    #[error(
        "data race on element {index}: this {this} and the {other} by thread {other_thread} of block {other_block} have no barrier between"
    )]
    Race { index: usize, this: &'static str, other: &'static str, other_thread: u32, other_block: u32 },
    #[error("divergent barrier: other threads of the block {others}")]
    DivergentBarrier { others: String },
    #[error("divergent warp operation: other lanes of the warp {others}")]
    DivergentWarp { others: String },
    #[error("a warp operation needs 32 lanes, but the block's last warp has {lanes}")]
    PartialWarp { lanes: u32 },
    #[error("shared memory: {bytes} bytes are in use, {limit} is the limit")]
    SharedMemory { bytes: usize, limit: usize },
    #[error("writes device memory before `grid::wait`, when the grid before may still run")]
    WroteBeforeWait,
    #[error("returns without `grid::wait`, so that later grids could not rely on earlier ones being done")]
    NeverWaited,
    #[error("a product of a warpgroup without `wgmma::fence` since the last `commit`: it may miss what registers hold")]
    ProductWithoutFence,
    #[error("an operand of a product starts at byte {offset} of the dynamic shared memory, not at a multiple of 1024")]
    OperandMisplaced { offset: usize },
    #[error(
        "a product reads element {index}, which thread {other_thread} wrote without `wgmma::fence_proxy_async` before the barrier"
    )]
    NotFenced { index: usize, other_thread: u32 },
    #[error("an operand of a product under way was overwritten before `wgmma::wait`")]
    OperandOverwritten,
    #[error("returns with {groups} groups of products under way: `wgmma::wait::<0>` comes last")]
    ProductsUnderWay { groups: u32 },
    #[error("returns after {found} products, but warp {other} of its warpgroup started {expected}")]
    UnevenWarpgroup { found: u32, other: u32, expected: u32 },
    #[error("panicked: {message}")]
    Panicked { message: String },
}

pub(super) fn place(location: &core::panic::Location<'_>) -> String {
    format!("{}:{}", location.file(), location.line())
}
