//! Tensor cores: `mma.sync` and its operand loads, sm_80 and later.
//!
//! Fragment layout of m16n8k16 (PTX ISA, *Matrix Fragments for mma.m16n8k16*), with `g = lane / 4`, `t = lane % 4`; a
//! register holds two neighbours, the lower index in the low half:
//!
//! | fragment | register | element |
//! | --- | --- | --- |
//! | A, 16 × 16, row | 0, 1, 2, 3 | `(g, 2t)`, `(g + 8, 2t)`, `(g, 2t + 8)`, `(g + 8, 2t + 8)` and the next column |
//! | B, 16 × 8, column | 0, 1 | `(2t, g)`, `(2t + 8, g)` and the next row |
//! | C and D, 16 × 8, f32 | 0, 1, 2, 3 | `(g, 2t)`, `(g, 2t + 1)`, `(g + 8, 2t)`, `(g + 8, 2t + 1)` |
//!
//! Of m16n8k32 with 8-bit elements (*Matrix Fragments for mma.m16n8k32*) a register holds four neighbours, the lowest index in
//! the low byte:
//!
//! | fragment | register | element |
//! | --- | --- | --- |
//! | A, 16 × 32, row | 0, 1, 2, 3 | `(g, 4t)`, `(g + 8, 4t)`, `(g, 4t + 16)`, `(g + 8, 4t + 16)` and the next three columns |
//! | B, 32 × 8, column | 0, 1 | `(4t, g)`, `(4t + 16, g)` and the next three rows |
//! | C and D, 16 × 8, i32 | 0, 1, 2, 3 | as above |

use crate::machine;

/// `mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32`: returns `a · b + c`, f16 products, f32 sums.
///
/// The emulator sums in f64 and rounds once; hardware sums in its own order, so results agree to f32 rounding, not in bits.
///
/// # Safety
///
/// All 32 lanes of the warp are here, in code that the whole warp runs: the instruction is inline assembly, since rustc
/// cannot pass LLVM's `<2 x half>`, and LLVM may copy inline assembly into the branches of a divergent condition.
#[inline(always)]
#[track_caller]
pub unsafe fn m16n8k16_f16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    // SAFETY: the caller's promise.
    unsafe { machine::mma_m16n8k16_f16(a, b, c) }
}

/// `mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32`: returns `a · b + c`, exact, sums modulo 2³².
///
/// # Safety
///
/// As [`m16n8k16_f16`].
#[inline(always)]
#[track_caller]
pub unsafe fn m16n8k32_s8(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4] {
    // SAFETY: the caller's promise.
    unsafe { machine::mma_m16n8k32_s8(a, b, c) }
}
