//! Operations of one warp: 32 threads of consecutive linear index. All of them take the full warp.
//!
//! # Safety of every function marked `unsafe` here
//!
//! All 32 lanes of the warp get to this same call. The emulator reports a violation; on a GPU the result is undefined.

use crate::machine;

/// Threads in a warp, on every NVIDIA GPU.
pub const WARP_SIZE: u32 = 32;

/// This thread's position in its warp, `0..32`.
#[inline(always)]
pub fn lane_id() -> u32 {
    machine::lane_id()
}

mod sealed {
    /// 32-bit values travel as bits.
    pub trait Bits32: Copy {
        fn to_bits32(self) -> u32;
        fn from_bits32(bits: u32) -> Self;
    }
    impl Bits32 for u32 {
        #[inline(always)]
        fn to_bits32(self) -> u32 {
            self
        }
        #[inline(always)]
        fn from_bits32(bits: u32) -> Self {
            bits
        }
    }
    impl Bits32 for i32 {
        #[inline(always)]
        fn to_bits32(self) -> u32 {
            self as u32
        }
        #[inline(always)]
        fn from_bits32(bits: u32) -> Self {
            bits as i32
        }
    }
    impl Bits32 for f32 {
        #[inline(always)]
        fn to_bits32(self) -> u32 {
            self.to_bits()
        }
        #[inline(always)]
        fn from_bits32(bits: u32) -> Self {
            f32::from_bits(bits)
        }
    }
}

/// A value that fits one shuffle: `u32`, `i32` or `f32`.
pub trait Shuffle: sealed::Bits32 {}
impl Shuffle for u32 {}
impl Shuffle for i32 {}
impl Shuffle for f32 {}

/// `shfl.sync.bfly.b32`: the `value` of lane `lane_id() ^ lane_mask`.
///
/// # Safety
///
/// All 32 lanes are here; `lane_mask < 32`.
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_xor<T: Shuffle>(value: T, lane_mask: u32) -> T {
    // SAFETY: the caller's promise.
    T::from_bits32(unsafe { machine::shuffle_xor(value.to_bits32(), lane_mask) })
}

/// `shfl.sync.idx.b32`: the `value` of lane `source`.
///
/// # Safety
///
/// All 32 lanes are here; `source < 32`.
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle<T: Shuffle>(value: T, source: u32) -> T {
    // SAFETY: the caller's promise.
    T::from_bits32(unsafe { machine::shuffle_idx(value.to_bits32(), source) })
}

/// `shfl.sync.down.b32`: the `value` of lane `lane_id() + delta`; the last `delta` lanes keep their own.
///
/// # Safety
///
/// All 32 lanes are here; `delta < 32`.
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_down<T: Shuffle>(value: T, delta: u32) -> T {
    // SAFETY: the caller's promise.
    T::from_bits32(unsafe { machine::shuffle_down(value.to_bits32(), delta) })
}

/// `vote.sync.ballot.b32`: bit l is lane l's `predicate`.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
#[track_caller]
pub unsafe fn ballot(predicate: bool) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { machine::ballot(predicate) }
}

/// Whether any lane's `predicate` holds.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
#[track_caller]
pub unsafe fn any(predicate: bool) -> bool {
    // SAFETY: the caller's promise.
    unsafe { machine::ballot(predicate) != 0 }
}

/// Whether every lane's `predicate` holds.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
#[track_caller]
pub unsafe fn all(predicate: bool) -> bool {
    // SAFETY: the caller's promise.
    unsafe { machine::ballot(predicate) == !0 }
}

/// `bar.warp.sync`: waits for the warp and orders its memory accesses.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
#[track_caller]
pub unsafe fn sync() {
    // SAFETY: the caller's promise.
    unsafe { machine::sync_warp() }
}

/// The sum over each group of `WIDTH` neighbouring lanes, in every lane of the group: a butterfly whose order, and so
/// whose bits, is the same on every machine (`xor WIDTH/2`, …, `xor 1`).
///
/// # Safety
///
/// All 32 lanes are here. `WIDTH` is a power of two up to 32 (checked at compile time).
#[inline(always)]
#[track_caller]
pub unsafe fn sum_of<const WIDTH: u32>(value: f32) -> f32 {
    const { assert!(WIDTH.is_power_of_two() && WIDTH <= 32) };
    // SAFETY: the caller's promise.
    unsafe { machine::butterfly::<WIDTH, { machine::SUM }>(value) }
}

/// The largest value of each group of `WIDTH` neighbouring lanes, in every lane of the group. NaN counts as absent.
///
/// # Safety
///
/// As [`sum_of`].
#[inline(always)]
#[track_caller]
pub unsafe fn max_of<const WIDTH: u32>(value: f32) -> f32 {
    const { assert!(WIDTH.is_power_of_two() && WIDTH <= 32) };
    // SAFETY: the caller's promise.
    unsafe { machine::butterfly::<WIDTH, { machine::MAX }>(value) }
}

/// The sum over the warp, in every lane: [`sum_of`] with 32.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
#[track_caller]
pub unsafe fn sum(value: f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { sum_of::<32>(value) }
}

/// The largest value of the warp, in every lane: [`max_of`] with 32.
///
/// # Safety
///
/// All 32 lanes are here.
#[inline(always)]
#[track_caller]
pub unsafe fn max(value: f32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { max_of::<32>(value) }
}
