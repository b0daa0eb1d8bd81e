//! Mixture of experts: each token goes through the feed-forward networks that [`router`](crate::router) chose for it.
//!
//! - [`decode`]: one token, memory bound. Two kernels, and no list of who goes where. [`token`]: the same for MXFP4 on tensor
//!   cores, at the speed of memory.
//! - [`sort`]: many tokens, by expert. [`prefill`]: the products of each expert with its tokens, on tensor cores, and the
//!   sum over a token's experts. [`grouped`]: the same for MXFP4 and activations in f16; [`warpgroups`]: as Hopper does it
//!   best.
//!
//! A layer's experts are matrices of one shape back to back, each repacked as [`crate::format`] says: matrix e starts
//! `e · planes.end` bytes in. `gate` and `up` have one format, `down` may have another. Token t's choice number s is its
//! *slot* s, and `t · n_used + s` the *pair* of both.

pub mod decode;
pub mod grouped;
pub mod prefill;
pub mod sort;
pub mod token;
pub mod warpgroups;

use crate::format::{Format, GROUP, Place};
use cuda_std::Global;

/// Matrix `expert` of `weight`, of `n_out` rows of `n_in` elements.
///
/// # Safety
///
/// It is there.
#[inline(always)]
unsafe fn place<F: Format>(weight: Global<u8>, expert: u32, n_in: u32, n_out: u32) -> Place {
    let planes = F::LAYOUT.planes(n_in as usize, n_out as usize);
    // SAFETY: the caller's promise.
    Place { weight: unsafe { weight.row_unchecked(expert as usize, planes.end) }, planes, n_groups: n_in / GROUP }
}

/// Element `i` of row `expert` of `bias`, `n_out` wide; 0 if there is no bias.
#[inline(always)]
fn bias_of(bias: Global<f32>, expert: u32, n_out: u32, i: u32) -> f32 {
    if bias.len() > 0 { bias[expert as usize * n_out as usize + i as usize] } else { 0.0 }
}
