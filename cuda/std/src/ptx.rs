//! The device machine: each operation of this crate as PTX. With [`wgmma`] the only file with inline assembly.

use core::arch::asm;
use core::arch::nvptx;

use crate::{Element, Store};

mod wgmma;
pub use wgmma::*;

/// An address in the `.shared` window.
pub type SharedAddress = u32;

pub const SUM: u8 = 0;
pub const MAX: u8 = 1;

unsafe extern "unadjusted" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn barrier_cta_sync_aligned_all(barrier: u32);
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn bar_warp_sync(mask: u32);
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shfl_sync_bfly(mask: u32, value: u32, lane_mask: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shfl_sync_idx(mask: u32, value: u32, source: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    fn shfl_sync_down(mask: u32, value: u32, delta: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn vote_ballot_sync(mask: u32, predicate: bool) -> u32;
    #[link_name = "llvm.nvvm.ex2.approx.ftz.f"]
    fn ex2_approx_ftz(x: f32) -> f32;
    #[link_name = "llvm.nvvm.rsqrt.approx.f"]
    fn rsqrt_approx(x: f32) -> f32;
    #[link_name = "llvm.nvvm.sqrt.rn.f"]
    fn sqrt_rn(x: f32) -> f32;
    #[link_name = "llvm.nvvm.prmt"]
    fn prmt(a: u32, b: u32, selector: u32) -> u32;
    #[link_name = "llvm.nvvm.fma.rn.f"]
    fn fma_rn(a: f32, b: f32, c: f32) -> f32;
    #[cfg(programmatic_launch)]
    #[link_name = "llvm.nvvm.griddepcontrol.wait"]
    fn griddepcontrol_wait();
    #[cfg(programmatic_launch)]
    #[link_name = "llvm.nvvm.griddepcontrol.launch.dependents"]
    fn griddepcontrol_launch_dependents();
    #[link_name = "llvm.nvvm.read.ptx.sreg.laneid"]
    fn read_laneid() -> u32;
}

#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: ends the launch.
    unsafe { nvptx::trap() }
}

#[inline(always)]
pub fn out_of_bounds(_index: usize, _len: usize) -> ! {
    trap()
}

#[inline(always)]
pub fn thread_idx() -> [u32; 3] {
    // SAFETY: reads special registers.
    unsafe { [nvptx::_thread_idx_x() as u32, nvptx::_thread_idx_y() as u32, nvptx::_thread_idx_z() as u32] }
}

#[inline(always)]
pub fn block_idx() -> [u32; 3] {
    // SAFETY: reads special registers.
    unsafe { [nvptx::_block_idx_x() as u32, nvptx::_block_idx_y() as u32, nvptx::_block_idx_z() as u32] }
}

#[inline(always)]
pub fn block_dim() -> [u32; 3] {
    // SAFETY: reads special registers.
    unsafe { [nvptx::_block_dim_x() as u32, nvptx::_block_dim_y() as u32, nvptx::_block_dim_z() as u32] }
}

#[inline(always)]
pub fn grid_dim() -> [u32; 3] {
    // SAFETY: reads special registers.
    unsafe { [nvptx::_grid_dim_x() as u32, nvptx::_grid_dim_y() as u32, nvptx::_grid_dim_z() as u32] }
}

#[inline(always)]
pub fn launch_dependents() {
    // SAFETY: a hint.
    #[cfg(programmatic_launch)]
    unsafe {
        griddepcontrol_launch_dependents()
    }
}

/// # Safety
/// [`crate::grid::wait`]'s.
#[inline(always)]
pub unsafe fn wait_for_grids() {
    // SAFETY: the caller's promise.
    #[cfg(programmatic_launch)]
    unsafe {
        griddepcontrol_wait()
    }
}

#[inline(always)]
pub fn acquired(_last: bool) {}

#[inline(always)]
pub fn lane_id() -> u32 {
    // SAFETY: reads a special register.
    unsafe { read_laneid() }
}

/// # Safety
/// [`crate::thread::sync_threads`]'s.
#[inline(always)]
pub unsafe fn sync_threads() {
    // SAFETY: the caller's promise.
    unsafe { barrier_cta_sync_aligned_all(0) }
}

/// # Safety
/// All 32 lanes are here; so for all functions of this group.
#[inline(always)]
pub unsafe fn sync_warp() {
    // SAFETY: the caller's promise.
    unsafe { bar_warp_sync(!0) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shuffle_xor(value: u32, lane_mask: u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { shfl_sync_bfly(!0, value, lane_mask, 31) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shuffle_idx(value: u32, source: u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { shfl_sync_idx(!0, value, source, 31) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shuffle_down(value: u32, delta: u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { shfl_sync_down(!0, value, delta, 31) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn ballot(predicate: bool) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { vote_ballot_sync(!0, predicate) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn butterfly<const WIDTH: u32, const OPERATION: u8>(mut value: f32) -> f32 {
    let mut step = WIDTH / 2;
    while step > 0 {
        // SAFETY: the caller's promise.
        let other = f32::from_bits(unsafe { shuffle_xor(value.to_bits(), step) });
        value = if OPERATION == SUM { value + other } else { value.max(other) };
        step /= 2;
    }
    value
}

#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    // SAFETY: arithmetic.
    unsafe { ex2_approx_ftz(x) }
}

#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    // SAFETY: arithmetic.
    unsafe { rsqrt_approx(x) }
}

#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    // SAFETY: arithmetic.
    unsafe { sqrt_rn(x) }
}

#[inline(always)]
pub fn mul_add(x: f32, a: f32, b: f32) -> f32 {
    // SAFETY: arithmetic.
    unsafe { fma_rn(x, a, b) }
}

#[inline(always)]
pub fn floor(x: f32) -> f32 {
    let floor: f32;
    // SAFETY: arithmetic.
    unsafe { asm!("cvt.rmi.f32.f32 {}, {};", out(reg32) floor, in(reg32) x, options(pure, nomem, nostack)) };
    floor
}

#[inline(always)]
pub fn div_full(x: f32, divisor: f32) -> f32 {
    let quotient: f32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("div.full.f32 {}, {}, {};", out(reg32) quotient, in(reg32) x, in(reg32) divisor, options(pure, nomem, nostack));
    }
    quotient
}

#[inline(always)]
pub fn f16_bits_of(value: f32) -> u16 {
    (value as f16).to_bits()
}

#[inline(always)]
pub fn f32_of_f16_bits(bits: u16) -> f32 {
    f16::from_bits(bits) as f32
}

#[inline(always)]
pub fn pack_f16x2(low: f32, high: f32) -> u32 {
    let pair: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(reg32) pair, in(reg32) high, in(reg32) low, options(pure, nomem, nostack));
    }
    pair
}

#[inline(always)]
pub fn mul_f16x2(a: u32, b: u32) -> u32 {
    let product: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("mul.rn.f16x2 {}, {}, {};", out(reg32) product, in(reg32) a, in(reg32) b, options(pure, nomem, nostack));
    }
    product
}

#[inline(always)]
pub fn add_f16x2(a: u32, b: u32) -> u32 {
    let sum: u32;
    // SAFETY: arithmetic.
    unsafe {
        asm!("add.rn.f16x2 {}, {}, {};", out(reg32) sum, in(reg32) a, in(reg32) b, options(pure, nomem, nostack));
    }
    sum
}

#[inline(always)]
pub fn permute_bytes(a: u32, b: u32, selector: u32) -> u32 {
    // SAFETY: arithmetic.
    unsafe { prmt(a, b, selector) }
}

/// # Safety
/// [`crate::mma::m16n8k16_f16`]'s.
#[inline(always)]
pub unsafe fn mma_m16n8k16_f16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    let (d0, d1, d2, d3): (f32, f32, f32, f32);
    // SAFETY: the caller's promise. Not `pure`, so that LLVM neither sinks nor speculates it.
    unsafe {
        asm!(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{}, {}, {}, {}}}, {{{}, {}, {}, {}}}, {{{}, {}}}, {{{}, {}, {}, {}}};",
            lateout(reg32) d0, lateout(reg32) d1, lateout(reg32) d2, lateout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
            in(reg32) b[0], in(reg32) b[1],
            in(reg32) c[0], in(reg32) c[1], in(reg32) c[2], in(reg32) c[3],
            options(nomem, nostack)
        );
    }
    [d0, d1, d2, d3]
}

/// # Safety
/// [`crate::mma::m16n8k32_s8`]'s.
#[inline(always)]
pub unsafe fn mma_m16n8k32_s8(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4] {
    let (d0, d1, d2, d3): (i32, i32, i32, i32);
    // SAFETY: as above.
    unsafe {
        asm!(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{}, {}, {}, {}}}, {{{}, {}, {}, {}}}, {{{}, {}}}, {{{}, {}, {}, {}}};",
            lateout(reg32) d0, lateout(reg32) d1, lateout(reg32) d2, lateout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
            in(reg32) b[0], in(reg32) b[1],
            in(reg32) c[0], in(reg32) c[1], in(reg32) c[2], in(reg32) c[3],
            options(nomem, nostack)
        );
    }
    [d0, d1, d2, d3]
}

#[inline(always)]
pub fn cp_async_commit() {
    // SAFETY: orders this thread's copies.
    unsafe { asm!("cp.async.commit_group;") }
}

#[inline(always)]
pub fn cp_async_wait<const PENDING: u32>() {
    // SAFETY: orders this thread's copies.
    unsafe { asm!("cp.async.wait_group {};", const PENDING) }
}

/// # Safety
/// [`crate::Shared::copy_async`]'s.
#[inline(always)]
pub unsafe fn copy_async<T>(to: SharedAddress, i: usize, _len: usize, from: *const u8, valid: bool) {
    let bytes: u32 = if valid { 16 } else { 0 };
    // SAFETY: the caller's promise.
    unsafe {
        asm!("cp.async.cg.shared.global [{}], [{}], 16, {};", in(reg32) at::<T>(to, i), in(reg64) from, in(reg32) bytes);
    }
}

/// # Safety
/// [`crate::Shared::copy_async_if`]'s.
#[inline(always)]
pub unsafe fn copy_async_if<T>(wanted: bool, to: SharedAddress, i: usize, _len: usize, from: *const u8) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; @wanted cp.async.cg.shared.global [{}], [{}], 16; }}",
            in(reg32) u32::from(wanted), in(reg32) at::<T>(to, i), in(reg64) from
        );
    }
}

/// # Safety
/// [`crate::Shared::copy_async4`]'s.
#[inline(always)]
pub unsafe fn copy_async4<T>(to: SharedAddress, i: usize, _len: usize, from: *const u8, valid: bool) {
    let bytes: u32 = if valid { 4 } else { 0 };
    // SAFETY: the caller's promise.
    unsafe {
        asm!("cp.async.ca.shared.global [{}], [{}], 4, {};", in(reg32) at::<T>(to, i), in(reg64) from, in(reg32) bytes);
    }
}

/// # Safety
/// The bytes are readable and aligned; so for all loads and stores below.
#[inline(always)]
pub unsafe fn load4(from: *const u32) -> u32 {
    let x: u32;
    // SAFETY: the caller's promise.
    unsafe { asm!("ld.global.u32 {}, [{}];", out(reg32) x, in(reg64) from, options(nostack, readonly)) };
    x
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn load8(from: *const u32) -> [u32; 2] {
    let (a, b): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ld.global.v2.u32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b, in(reg64) from, options(nostack, readonly));
    }
    [a, b]
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn load16(from: *const u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's promise. Plain `ld.global`, not `.nc`: ptxas sinks `.nc` loads below a dependency wait.
    unsafe {
        asm!(
            "ld.global.v4.u32 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) from,
            options(nostack, readonly)
        );
    }
    [a, b, c, d]
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn store16(to: *mut u32, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "st.global.v4.u32 [{}], {{{}, {}, {}, {}}};",
            in(reg64) to, in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3]
        );
    }
}

#[inline(always)]
fn at<T>(base: SharedAddress, i: usize) -> u32 {
    base + i as u32 * size_of::<T>() as u32
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shared_read<T: Element>(base: SharedAddress, i: usize, _len: usize) -> T {
    // SAFETY: the caller's promise.
    unsafe { T::load_shared(at::<T>(base, i)) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shared_write<T: Store>(base: SharedAddress, i: usize, _len: usize, value: T) {
    // SAFETY: the caller's promise.
    unsafe { T::store_shared(at::<T>(base, i), value) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shared_load4<T>(base: SharedAddress, i: usize, _len: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { u32::load_shared(at::<T>(base, i)) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shared_load16<T>(base: SharedAddress, i: usize, _len: usize) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) at::<T>(base, i)
        );
    }
    [a, b, c, d]
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shared_store4<T>(base: SharedAddress, i: usize, _len: usize, value: u32) {
    // SAFETY: the caller's promise.
    unsafe { u32::store_shared(at::<T>(base, i), value) }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn shared_store16<T>(base: SharedAddress, i: usize, _len: usize, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};",
            in(reg32) at::<T>(base, i), in(reg32) x[0], in(reg32) x[1], in(reg32) x[2], in(reg32) x[3]
        );
    }
}

/// # Safety
/// [`crate::Shared::load_matrix_x4`]'s.
#[inline(always)]
pub unsafe fn load_matrix_x4<T>(base: SharedAddress, i: usize, _len: usize, transposed: bool) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        if transposed {
            asm!(
                "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) at::<T>(base, i)
            );
        } else {
            asm!(
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) at::<T>(base, i)
            );
        }
    }
    [a, b, c, d]
}

macro_rules! atomic {
    ($name:ident, $type:ty, $register:ident, $operation:literal) => {
        /// # Safety
        /// `to` is valid, and everyone accesses it by atomics only.
        #[inline(always)]
        pub unsafe fn $name(to: *mut $type, value: $type) -> $type {
            let before: $type;
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!("atom.relaxed.gpu.global.", $operation, " {}, [{}], {};"),
                    out($register) before, in(reg64) to, in($register) value
                );
            }
            before
        }
    };
}

/// # Safety
/// `to` is valid, and everyone accesses it by atomics only.
#[inline(always)]
pub unsafe fn atomic_inc_u32(to: *mut u32, last: u32) -> u32 {
    let before: u32;
    // SAFETY: the caller's promise. The fences make the pattern cumulative: what the block's other threads wrote before its
    // barrier is released, and what other blocks released is seen by them after the next.
    unsafe {
        asm!(
            "fence.acq_rel.gpu; atom.relaxed.gpu.global.inc.u32 {}, [{}], {}; fence.acq_rel.gpu;",
            out(reg32) before, in(reg64) to, in(reg32) last
        );
    }
    before
}

atomic!(atomic_add_u32, u32, reg32, "add.u32");
atomic!(atomic_max_u32, u32, reg32, "max.u32");
atomic!(atomic_add_u64, u64, reg64, "add.u64");
atomic!(atomic_max_u64, u64, reg64, "max.u64");
