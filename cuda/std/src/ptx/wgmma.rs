//! `wgmma` as PTX.

use core::arch::asm;

use super::trap;

/// A matrix descriptor.
pub type Operand = u64;

/// # Safety
/// [`crate::Shared::operand`]'s.
#[inline(always)]
pub unsafe fn operand_at<T>(base: super::SharedAddress, i: usize, _len: usize) -> Operand {
    // Address and offsets are in 16 bytes: 1024 from one atom to the next; 1 << 62: the swizzle of 128 bytes.
    const LAYOUT: u64 = 1 << 62 | (1024 / 16) << 32 | 1 << 16;
    LAYOUT | u64::from((super::at::<T>(base, i) & 0x3_ffff) >> 4)
}

#[inline(always)]
pub fn quarter_of(operand: Operand, quarter: u32) -> Operand {
    operand + 2 * u64::from(quarter)
}

/// # Safety
/// [`crate::wgmma::fence`]'s; so for all below.
#[inline(always)]
pub unsafe fn wgmma_fence() {
    // SAFETY: the caller's promise.
    unsafe { asm!("wgmma.fence.sync.aligned;") }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn wgmma_commit() {
    // SAFETY: the caller's promise.
    unsafe { asm!("wgmma.commit_group.sync.aligned;") }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn wgmma_wait<const PENDING: u32>() {
    // SAFETY: the caller's promise.
    unsafe { asm!("wgmma.wait_group.sync.aligned {};", const PENDING) }
}

#[inline(always)]
pub fn fence_proxy_async() {
    // SAFETY: orders this thread's accesses.
    unsafe { asm!("fence.proxy.async.shared::cta;") }
}

/// One product: `$n` eighths of columns, the sums' registers named by `$i`. The scope's predicate says that sums are added
/// to; the numbers behind it, that neither operand is negated and B is not transposed.
macro_rules! product {
    ($sums:ident, $shape:literal, [$($i:literal)*], $a:literal, $transposed:literal, $($operand:tt)*) => {
        asm!(
            concat!(
                "{{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.", $shape, ".f32.f16.f16 {{",
                product!(@places $($i)*),
                "}}, ", $a, ", {b}, add, 1, 1, ", $transposed, "; }}"
            ),
            $(
                inout(reg32) $sums[$i][0], inout(reg32) $sums[$i][1],
                inout(reg32) $sums[$i][2], inout(reg32) $sums[$i][3],
            )*
            $($operand)*
        )
    };
    (@places $first:literal $($other:literal)*) => {
        concat!("{}, {}, {}, {}" $(, product!(@more $other))*)
    };
    (@more $i:literal) => { ", {}, {}, {}, {}" };
}

/// The product for as many columns as `$sums` has; the lists of registers grow from one width to the next.
macro_rules! by_width {
    ($sums:ident, $a:literal, $transposed:literal, ($($operand:tt)*)) => {
        by_width!(@ $sums, $a, $transposed, ($($operand)*), [],
            2 "m64n16k16" [0 1], 4 "m64n32k16" [2 3], 6 "m64n48k16" [4 5], 8 "m64n64k16" [6 7], 10 "m64n80k16" [8 9],
            12 "m64n96k16" [10 11], 14 "m64n112k16" [12 13], 16 "m64n128k16" [14 15], 18 "m64n144k16" [16 17],
            20 "m64n160k16" [18 19], 32 "m64n256k16" [20 21 22 23 24 25 26 27 28 29 30 31],)
    };
    (@ $sums:ident, $a:literal, $transposed:literal, $operands:tt, [$($known:literal)*],) => {
        trap()
    };
    (@ $sums:ident, $a:literal, $transposed:literal, ($($operand:tt)*), [$($known:literal)*],
        $n:literal $shape:literal [$($new:literal)*], $($rest:tt)*) => {
        if N == $n {
            product!($sums, $shape, [$($known)* $($new)*], $a, $transposed, $($operand)*);
        } else {
            by_width!(@ $sums, $a, $transposed, ($($operand)*), [$($known)* $($new)*], $($rest)*);
        }
    };
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn wgmma_m64k16_f16<const N: usize>(sums: &mut [[f32; 4]; N], a: [u32; 4], b: Operand) {
    const { crate::wgmma::assert_width(N) };
    // SAFETY: the caller's promise.
    unsafe {
        by_width!(sums, "{{{a0}, {a1}, {a2}, {a3}}}", "0", (
            a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3], b = in(reg64) b
        ));
    }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn wgmma_m64k16_f16_shared<const N: usize>(sums: &mut [[f32; 4]; N], a: Operand, b: Operand) {
    const { crate::wgmma::assert_width(N) };
    // SAFETY: the caller's promise.
    unsafe {
        by_width!(sums, "{a}", "0, 0", (a = in(reg64) a, b = in(reg64) b));
    }
}
