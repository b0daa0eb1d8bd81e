//! The device code of gpt-gamma, and nothing else: one file per kernel family.
//!
//! Compiled twice from the same source: for `nvptx64` by `cuda_builder` into PTX, and for the host, where the same bodies
//! run in `cuda_std`'s emulator and the typed launchers live. Kernels decide nothing: which one runs is the engine's
//! choice. Every kernel's comment says math, shapes, launch, shared memory, cost, determinism and source.

#![no_std]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, asm_experimental_arch),
    allow(missing_docs, reason = "the host build checks them; here launchers are not compiled")
)]

pub mod argmax;
pub mod attention;
mod block;
pub mod candidates;
pub mod embed;
pub mod experts;
pub mod format;
pub mod gelu;
pub mod layer_norm;
pub mod matmul;
pub mod matvec;
pub mod norm_rows;
pub mod probe;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod swiglu;

/// The interface of every kernel, by module; a test holds it against the PTX.
#[cfg(not(target_arch = "nvptx64"))]
pub const ENTRIES: &[&[&cuda_std::Entry]] = &[
    argmax::ENTRIES,
    candidates::ENTRIES,
    layer_norm::ENTRIES,
    gelu::ENTRIES,
    embed::ENTRIES,
    matvec::ENTRIES,
    matvec::stream::ENTRIES,
    matmul::ENTRIES,
    matmul::powers::ENTRIES,
    matmul::rows::ENTRIES,
    norm_rows::ENTRIES,
    attention::kv_append::ENTRIES,
    attention::token::single::ENTRIES,
    attention::token::grouped::ENTRIES,
    attention::prefill::ENTRIES,
    rms_norm::ENTRIES,
    rope::ENTRIES,
    router::ENTRIES,
    swiglu::ENTRIES,
    experts::sort::ENTRIES,
    experts::decode::ENTRIES,
    experts::prefill::ENTRIES,
    experts::token::ENTRIES,
    probe::ENTRIES,
    experts::grouped::ENTRIES,
    experts::warpgroups::ENTRIES,
];
