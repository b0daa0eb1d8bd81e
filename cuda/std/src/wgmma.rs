//! Tensor cores as Hopper has them: `wgmma`, products that a warpgroup starts and waits for later. sm_90a only, so for
//! kernels marked `#[kernel(…, warpgroups)]`.
//!
//! A *warpgroup* is four neighbouring warps, the first of index 0 mod 4. One instruction multiplies 64 rows with 16 elements
//! each, and runs beside what follows:
//!
//! 1. [`fence`]: registers written before are seen by the products. Before the first product, and again whenever a
//!    register of an operand or of the sums was written.
//! 2. [`m64k16_f16`] or [`m64k16_f16_shared`], any number of them.
//! 3. [`commit`] closes them as a group; [`wait`] waits for groups. Until then nobody writes their operands in shared
//!    memory, nor looks at their sums.
//!
//! What ordinary stores or [`cp_async`](crate::cp_async) brought to shared memory is seen by products only behind
//! [`fence_proxy_async`], by the thread that brought it, and then a barrier.
//!
//! Warp w of a warpgroup holds rows 16 w to 16 w + 15 of A and D. Its fragments are those of [`mma`](crate::mma)'s m16n8k16:
//! A's four registers, and of D one such C fragment for each eight columns.
//!
//! Source: PTX ISA, *Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions*, with *Matrix Descriptor* and
//! *Swizzling Modes*; *Async Proxy*.

use crate::machine;

/// An operand in shared memory: rows of 64 f16, 128 bytes each, 8 of which are an *atom* of 1024 bytes that starts at a
/// multiple of its size. In row r of an atom the 16 bytes of elements `8 c..8 c + 8` lie in place `c ^ r` (128-byte swizzle).
/// An operand of more rows has its atoms one after the other. A product takes 16 elements of each row.
#[derive(Clone, Copy)]
pub struct Operand(pub(crate) machine::Operand);

impl Operand {
    /// The same rows, elements `16 quarter..16 quarter + 16` of them; `self` is quarter 0.
    #[inline(always)]
    pub fn quarter(self, quarter: u32) -> Self {
        Self(machine::quarter_of(self.0, quarter))
    }
}

/// Whether a product of 8 `n` columns is to be had.
pub(crate) const fn assert_width(n: usize) {
    assert!(n == 32 || 2 <= n && n <= 20 && n.is_multiple_of(2), "a product has 16, 32, … 160 or 256 columns");
}

/// `wgmma.fence.sync.aligned`: see the module.
///
/// # Safety
///
/// All 32 lanes of the warp are here, as are sooner or later all four warps of the warpgroup: so for all functions below.
#[inline(always)]
#[track_caller]
pub unsafe fn fence() {
    // SAFETY: the caller's promise.
    unsafe { machine::wgmma_fence() }
}

/// `wgmma.commit_group.sync.aligned`: closes the group of products started since the last.
///
/// # Safety
///
/// As [`fence`].
#[inline(always)]
#[track_caller]
pub unsafe fn commit() {
    // SAFETY: the caller's promise.
    unsafe { machine::wgmma_commit() }
}

/// `wgmma.wait_group.sync.aligned PENDING`: waits until at most `PENDING` of the newest groups are under way.
///
/// # Safety
///
/// As [`fence`].
#[inline(always)]
#[track_caller]
pub unsafe fn wait<const PENDING: u32>() {
    // SAFETY: the caller's promise.
    unsafe { machine::wgmma_wait::<PENDING>() }
}

/// `fence.proxy.async.shared::cta`: what this thread wrote to shared memory, products started after the next barrier see.
#[inline(always)]
pub fn fence_proxy_async() {
    machine::fence_proxy_async();
}

/// `wgmma.mma_async.sync.aligned.m64nNk16.f32.f16.f16`: starts `sums += a · bᵀ`, A in registers, b with 8 `N` rows.
///
/// `N` is even and at most 20, or 32. The emulator sums in f64 and rounds once; hardware sums in its own order.
///
/// # Safety
///
/// As [`fence`], and in code that the warp runs as a whole, being inline assembly; the rules of the module hold.
#[inline(always)]
#[track_caller]
pub unsafe fn m64k16_f16<const N: usize>(sums: &mut [[f32; 4]; N], a: [u32; 4], b: Operand) {
    // SAFETY: the caller's promise.
    unsafe { machine::wgmma_m64k16_f16::<N>(sums, a, b.0) }
}

/// As [`m64k16_f16`] with A in shared memory: 64 rows.
///
/// # Safety
///
/// As [`m64k16_f16`].
#[inline(always)]
#[track_caller]
pub unsafe fn m64k16_f16_shared<const N: usize>(sums: &mut [[f32; 4]; N], a: Operand, b: Operand) {
    // SAFETY: the caller's promise.
    unsafe { machine::wgmma_m64k16_f16_shared::<N>(sums, a.0, b.0) }
}
