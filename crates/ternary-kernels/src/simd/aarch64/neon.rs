//! NEON with the dot products of ARMv8.2: 128-bit vectors, four for 16 lanes.
//!
//! `sdot` multiplies signed bytes and adds the four products of a lane to 32 bits. So signed weights need no offset, but
//! ternary planes may only be used unshifted up to weights of 127 ([`Simd::UNSHIFTED_PLANES`] is 2).
//!
//! ```text
//! plane p of ternary codes + 1, not shifted down:     0..=2 * 4^p     p = 2: at most 32     p = 3: 128, beyond a signed byte
//! ```
//!
//! So for one or two tokens, planes 2 and 3 are shifted down by 4 bits onto planes 0 and 1, and two sums per token serve four planes. For
//! more tokens, every plane is shifted to plane 0, and there is one sum per token.
//!
//! There are 32 registers, and a sum takes four of them: 4 tokens have their sums in registers, for one tile.
//!
//! Tested under emulation (see CONTRIBUTING.md); speed was not measured.

use crate::simd::vector::{CacheLine, Kernel, LANES, Simd};
use half::f16;
use std::{
    arch::{aarch64::*, asm, is_aarch64_feature_detected},
    array::from_fn,
    convert::Infallible,
};

/// NEON with dot products. (Conversions of f16 are in every NEON.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    /// The proof, if the CPU has the instructions.
    pub fn new() -> Option<Self> {
        let has = is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod");
        has.then_some(Self(()))
    }
}

/// Compiles a kernel with NEON and dot products.
#[target_feature(enable = "neon,dotprod")]
fn with_neon<K: Kernel>(kernel: K, simd: Neon) -> K::Output {
    kernel.run(simd)
}

type Int = [int32x4_t; 4];
type Float = [float32x4_t; 4];

/// Applies an intrinsic to all four quarters of a vector.
macro_rules! each {
    ($f:ident ($($a:ident),+)) => {
        // SAFETY: `self` proves that the CPU has the instruction, which touches no memory.
        unsafe { [$f($($a[0]),+), $f($($a[1]),+), $f($($a[2]),+), $f($($a[3]),+)] }
    };
}

/// Adds the four products of signed bytes to each lane. (The intrinsic is not stable.)
///
/// # Safety
/// The CPU has `sdot`.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
    // SAFETY: registers only; the caller promises the instruction.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

impl Simd for Neon {
    type Int = Int;
    type Float = Float;
    type MatrixUnit = Infallible;
    const I16_SUMS: bool = false;
    const WEIGHT_OFFSET: i32 = 0;
    const UNSHIFTED_PLANES: usize = 2;
    const REGISTER_TOKENS: usize = 4;
    const REGISTER_TILES: usize = 1;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the CPU has the features.
        unsafe { with_neon(kernel, self) }
    }

    #[inline(always)]
    fn load(self, line: &CacheLine) -> Int {
        let from: *const i32 = line.0.as_ptr().cast();
        // SAFETY: a line has 64 bytes, at a multiple of 64; `self` proves the instruction.
        unsafe { from_fn(|i| vld1q_s32(from.add(4 * i))) }
    }

    #[inline(always)]
    fn store(self, a: Int, line: &mut CacheLine) {
        let to: *mut i32 = line.0.as_mut_ptr().cast();
        for (i, a) in a.into_iter().enumerate() {
            // SAFETY: a line has 64 bytes, at a multiple of 64; `self` proves the instruction.
            unsafe { vst1q_s32(to.add(4 * i), a) }
        }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Int {
        // SAFETY: 16 bytes are there; `self` proves the instructions.
        unsafe {
            // Extended twice: to 16 bits, then to 32.
            let a = vld1q_s8(values.as_ptr());
            let (low, high) = (vmovl_s8(vget_low_s8(a)), vmovl_s8(vget_high_s8(a)));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_s16(vget_high_s16(low)),
                vmovl_s16(vget_low_s16(high)),
                vmovl_s16(vget_high_s16(high)),
            ]
        }
    }

    #[inline(always)]
    fn store_i8(self, a: Int, values: &mut [i8; LANES]) {
        // SAFETY: 16 bytes are there; `self` proves the instructions, which narrow to the low halves.
        unsafe {
            let low = vmovn_s16(vcombine_s16(vmovn_s32(a[0]), vmovn_s32(a[1])));
            let high = vmovn_s16(vcombine_s16(vmovn_s32(a[2]), vmovn_s32(a[3])));
            vst1q_s8(values.as_mut_ptr(), vcombine_s8(low, high));
        }
    }

    #[inline(always)]
    fn splat(self, value: i32) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { [vdupq_n_s32(value); 4] }
    }

    #[inline(always)]
    fn and(self, a: Int, b: Int) -> Int {
        each!(vandq_s32(a, b))
    }

    #[inline(always)]
    fn add(self, a: Int, b: Int) -> Int {
        each!(vaddq_s32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Int, b: Int) -> Int {
        each!(vsubq_s32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Int, b: Int) -> Int {
        each!(vmulq_s32(a, b))
    }

    #[inline(always)]
    fn shl<const N: i32>(self, a: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { a.map(|a| vshlq_s32(a, vdupq_n_s32(N))) }
    }

    #[inline(always)]
    fn shr<const N: i32>(self, a: Int) -> Int {
        // A shift left by a negative number.
        // SAFETY: `self` proves the instruction.
        unsafe { a.map(|a| vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-N)))) }
    }

    #[inline(always)]
    fn sra<const N: i32>(self, a: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { a.map(|a| vshlq_s32(a, vdupq_n_s32(-N))) }
    }

    #[inline(always)]
    fn dot(self, sum: Int, w: Int, x: Int) -> Int {
        // With two planes, weights are below 128: the largest are 2 << 2 (ternary) and 63 (6-bit).
        each!(sdot(sum, w, x))
    }

    #[inline(always)]
    fn widen(self, sum: Int) -> Int {
        sum
    }

    #[inline(always)]
    fn dot_signed(self, sum: Int, w: Int, x: Int) -> Int {
        each!(sdot(sum, w, x))
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Float {
        // SAFETY: 16 floats are there; `self` proves the instruction.
        unsafe { from_fn(|i| vld1q_f32(values.as_ptr().add(4 * i))) }
    }

    #[inline(always)]
    fn store_f32(self, a: Float, values: &mut [f32; LANES]) {
        for (i, a) in a.into_iter().enumerate() {
            // SAFETY: 16 floats are there; `self` proves the instruction.
            unsafe { vst1q_f32(values.as_mut_ptr().add(4 * i), a) }
        }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> Float {
        let from: *const u16 = values.as_ptr().cast();
        from_fn(|i| {
            let to: float32x4_t;
            // SAFETY: 16 halves are there; `self` proves the instructions. (The type of halves is not stable.)
            unsafe {
                let halves = vld1_u16(from.add(4 * i));
                asm!(
                    "fcvtl {to:v}.4s, {halves:v}.4h",
                    to = lateout(vreg) to,
                    halves = in(vreg) halves,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            to
        })
    }

    #[inline(always)]
    fn store_f16(self, a: Float, values: &mut [f16; LANES]) {
        let to: *mut u16 = values.as_mut_ptr().cast();
        for (i, a) in a.into_iter().enumerate() {
            // SAFETY: 16 halves are there; `self` proves the instructions.
            unsafe {
                let halves: uint16x4_t;
                asm!(
                    "fcvtn {halves:v}.4h, {a:v}.4s",
                    halves = lateout(vreg) halves,
                    a = in(vreg) a,
                    options(pure, nomem, nostack, preserves_flags),
                );
                vst1_u16(to.add(4 * i), halves);
            }
        }
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn splat4_f32(self, values: &[f32; 4]) -> Float {
        // SAFETY: four floats are there; `self` proves the instruction.
        unsafe { [vld1q_f32(values.as_ptr()); 4] }
    }

    #[inline(always)]
    fn sum_quads(self, vectors: [Float; 4]) -> Float {
        // SAFETY: `self` proves the instruction, which touches no memory.
        vectors.map(|[a, b, c, d]| unsafe { vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)) })
    }

    #[inline(always)]
    fn add_f32(self, a: Float, b: Float) -> Float {
        each!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub_f32(self, a: Float, b: Float) -> Float {
        each!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul_f32(self, a: Float, b: Float) -> Float {
        each!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div_f32(self, a: Float, b: Float) -> Float {
        each!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn max_f32(self, a: Float, b: Float) -> Float {
        // As on other instruction sets, b where either is NaN.
        // SAFETY: `self` proves the instructions.
        unsafe { from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }

    #[inline(always)]
    fn select_greater(self, a: Float, b: Float, x: Float, y: Float) -> Float {
        // SAFETY: `self` proves the instructions.
        unsafe { from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), x[i], y[i])) }
    }

    #[inline(always)]
    fn sqrt_f32(self, a: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { a.map(|a| vsqrtq_f32(a)) }
    }

    #[inline(always)]
    fn fma(self, a: Float, b: Float, c: Float) -> Float {
        // The sum is the first operand.
        each!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn to_int(self, a: Float) -> Int {
        each!(vcvtnq_s32_f32(a))
    }

    #[inline(always)]
    fn to_float(self, a: Int) -> Float {
        each!(vcvtq_f32_s32(a))
    }

    #[inline(always)]
    fn bits_to_float(self, a: Int) -> Float {
        each!(vreinterpretq_f32_s32(a))
    }

    #[inline(always)]
    fn float_to_bits(self, a: Float) -> Int {
        each!(vreinterpretq_s32_f32(a))
    }
}
