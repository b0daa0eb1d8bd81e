//! Numbers: half precision, and the functions of `f32` that `core` lacks.

use crate::machine;

#[cfg(not(target_arch = "nvptx64"))]
pub use half::f16;

/// IEEE binary16, with the methods of `half::f16` that kernels use; the hardware converts.
#[cfg(target_arch = "nvptx64")]
#[allow(non_camel_case_types, reason = "half's name")]
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct f16(u16);

#[cfg(target_arch = "nvptx64")]
impl f16 {
    /// The value with these bits.
    #[inline(always)]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The bits of this value.
    #[inline(always)]
    pub const fn to_bits(self) -> u16 {
        self.0
    }

    /// Rounds to nearest, ties to even: `cvt.rn.f16.f32`.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        Self(machine::f16_bits_of(value))
    }

    /// Exact: `cvt.f32.f16`.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        machine::f32_of_f16_bits(self.0)
    }
}

/// Two values rounded to f16 in one register, `low` in the low half: `cvt.rn.f16x2.f32`.
#[inline(always)]
pub fn pack_f16x2(low: f32, high: f32) -> u32 {
    machine::pack_f16x2(low, high)
}

/// The two halves of a register, low half first.
#[inline(always)]
pub fn unpack_f16x2(pair: u32) -> [f32; 2] {
    [f16::from_bits(pair as u16).to_f32(), f16::from_bits((pair >> 16) as u16).to_f32()]
}

/// Products of the halves of two registers, each rounded to nearest, subnormal numbers kept: `mul.rn.f16x2`.
#[inline(always)]
pub fn mul_f16x2(a: u32, b: u32) -> u32 {
    machine::mul_f16x2(a, b)
}

/// `add.rn.f16x2`: the sums of the low and of the high halves, each rounded once.
#[inline(always)]
pub fn add_f16x2(a: u32, b: u32) -> u32 {
    machine::add_f16x2(a, b)
}

/// `prmt.b32`: byte i of the result is the one that nibble i of `selector` names, `0..4` of `a`, `4..8` of `b`.
///
/// Nibbles are below 8: the instruction's other mode, which repeats a sign, is not to be had here.
#[inline(always)]
#[track_caller]
pub fn permute_bytes(a: u32, b: u32, selector: u32) -> u32 {
    machine::permute_bytes(a, b, selector)
}

/// Functions of `f32` beyond `core`'s. "Approximate" ones state their error; the others are IEEE-rounded on both machines.
pub trait Float {
    /// `sqrt.rn.f32`, correctly rounded.
    fn sqrt(self) -> Self;
    /// `fma.rn.f32`: `self · a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `ex2.approx.ftz.f32`: 2 to the `self`, within 2 ulp; results below 2⁻¹²⁶ are 0. The emulator rounds correctly.
    fn exp2(self) -> Self;
    /// e to the `self`, through [`exp2`](Float::exp2): relative error about `|self| · 2⁻²⁴ + 2⁻²²`.
    fn exp(self) -> Self;
    /// `rsqrt.approx.f32`: within 2 ulp of 1/√self. The emulator rounds correctly.
    fn rsqrt(self) -> Self;
    /// Hyperbolic tangent, through [`exp`](Float::exp): absolute error below 3e-7.
    fn tanh(self) -> Self;
    /// Largest integer not above; `cvt.rmi.f32.f32`.
    fn floor(self) -> Self;
    /// `div.full.f32`: `self / divisor` within 2 ulp, 0 for divisors beyond 2¹²⁶. The emulator rounds correctly. A plain `/` is
    /// correctly rounded on both machines, but a subroutine, beside which products of warpgroups are not kept under way.
    fn div_full(self, divisor: Self) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn sqrt(self) -> f32 {
        machine::sqrt(self)
    }

    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        machine::mul_add(self, a, b)
    }

    #[inline(always)]
    fn exp2(self) -> f32 {
        machine::exp2(self)
    }

    #[inline(always)]
    fn exp(self) -> f32 {
        machine::exp2(self * core::f32::consts::LOG2_E)
    }

    #[inline(always)]
    fn rsqrt(self) -> f32 {
        machine::rsqrt(self)
    }

    #[inline(always)]
    fn tanh(self) -> f32 {
        // 1 − 2/(e²ˣ + 1) is free of overflow trouble: e²ˣ = ∞ gives 1, e²ˣ = 0 gives −1.
        1.0 - 2.0.div_full(Float::exp(2.0 * self) + 1.0)
    }

    #[inline(always)]
    fn floor(self) -> f32 {
        machine::floor(self)
    }

    #[inline(always)]
    fn div_full(self, divisor: f32) -> f32 {
        machine::div_full(self, divisor)
    }
}
