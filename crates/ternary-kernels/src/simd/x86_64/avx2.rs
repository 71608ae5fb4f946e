//! AVX2, with or without the dot products of AVX-VNNI: 256-bit vectors, two for 16 lanes.
//!
//! # Dot products without VNNI
//! `vpmaddubsw` multiplies unsigned with signed bytes and adds neighbouring products to 16 bits, with saturation. It is the
//! only byte product of AVX2, and shapes the code above it:
//!
//! ```text
//! bytes of a lane:   w0 x0    w1 x1    w2 x2    w3 x3
//! vpmaddubsw:        w0 x0 + w1 x1     w2 x2 + w3 x3         two 16-bit sums, each must stay below 2^15
//! vpaddw:            sum += ...                              ternary weights: for as many blocks as fit (max_blocks_per_sum)
//! vpmaddwd with 1:   one 32-bit sum                          widen
//! ```
//!
//! - `dot`: ternary codes + 1 are at most 2, so a pair adds at most 508 to a 16-bit sum, and many blocks are added before it
//!   is widened.
//! - `dot_signed`: int8 weights would not fit, since 255 * 127 * 2 exceeds 2^15. So the magnitudes of the weights are
//!   multiplied with activations that have the signs of the weights (`vpsignb`): at most 128 * 127 * 2 = 32,512. They are
//!   widened at once.
//!
//! With AVX-VNNI, `vpdpbusd` does all of it in one instruction, in 32 bits.
//!
//! # Registers
//! There are 16 registers, and a sum takes two of them. So 4 tokens have their sums in registers, for one tile. Six tokens
//! per pass were 7 % slower: registers spill.

use crate::simd::vector::{CacheLine, Kernel, LANES, Simd};
use half::f16;
use std::{arch::x86_64::*, convert::Infallible};

/// AVX2, FMA and F16C; with `VNNI` also AVX-VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    /// The proof, if the CPU has the instructions.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && (!VNNI || is_x86_feature_detected!("avxvnni"));
        has.then_some(Self(()))
    }
}

/// Compiles a kernel with AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<K: Kernel>(kernel: K, simd: Avx2<false>) -> K::Output {
    kernel.run(simd)
}

/// Compiles a kernel with AVX2 and AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn with_vnni<K: Kernel>(kernel: K, simd: Avx2<true>) -> K::Output {
    kernel.run(simd)
}

/// The transpose of a matrix of 8 x 8 lanes.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn transpose_8(rows: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: the caller has the instructions, which touch no memory.
    unsafe {
        // `quads[4 i + j]` has in half `q` the lanes `4 q + j` of rows `4 i` to `4 i + 3`.
        let mut quads = rows;
        for quad in quads.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *quad;
            let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
            *quad = [
                _mm256_unpacklo_epi64(ab, cd),
                _mm256_unpackhi_epi64(ab, cd),
                _mm256_unpacklo_epi64(ab_high, cd_high),
                _mm256_unpackhi_epi64(ab_high, cd_high),
            ];
        }
        // Halves of two quads are joined to rows of the result.
        let mut out = rows;
        for j in 0..4 {
            out[j] = _mm256_permute2x128_si256::<0x20>(quads[j], quads[4 + j]);
            out[4 + j] = _mm256_permute2x128_si256::<0x31>(quads[j], quads[4 + j]);
        }
        out
    }
}

type Int = [__m256i; 2];
type Float = [__m256; 2];

/// Applies an intrinsic to both halves of a vector.
macro_rules! each {
    ($f:ident $(::<$n:tt>)? ($($a:ident),+)) => {
        // SAFETY: `self` proves that the CPU has the instruction, which touches no memory.
        unsafe { [$f$(::<$n>)?($($a[0]),+), $f$(::<$n>)?($($a[1]),+)] }
    };
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type Int = Int;
    type Float = Float;
    type MatrixUnit = Infallible;
    const I16_SUMS: bool = !VNNI;
    const WEIGHT_OFFSET: i32 = if VNNI { 128 } else { 0 };
    const UNSHIFTED_PLANES: usize = if VNNI { 4 } else { 2 };
    const REGISTER_TOKENS: usize = 4;
    const REGISTER_TILES: usize = 1;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the CPU has the features.
        unsafe { if VNNI { with_vnni(kernel, Avx2(())) } else { with_avx2(kernel, Avx2(())) } }
    }

    #[inline(always)]
    fn load(self, line: &CacheLine) -> Int {
        let from = line.0.as_ptr().cast();
        // SAFETY: a line has 64 bytes; `self` proves the instruction.
        unsafe { [_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))] }
    }

    #[inline(always)]
    fn store(self, a: Int, line: &mut CacheLine) {
        let to: *mut __m256i = line.0.as_mut_ptr().cast();
        // SAFETY: a line has 64 bytes; `self` proves the instruction.
        unsafe {
            _mm256_storeu_si256(to, a[0]);
            _mm256_storeu_si256(to.add(1), a[1]);
        }
    }

    #[inline(always)]
    fn transpose(self, rows: [Int; LANES]) -> [Int; LANES] {
        // Four squares of 8 x 8 lanes: of rows 0-7 or 8-15, and of their low or high halves.
        let mut out = rows;
        for (i, half) in [(0, 0), (0, 1), (8, 0), (8, 1)] {
            let square = std::array::from_fn(|row| rows[i + row][half]);
            // SAFETY: `self` proves the instructions.
            let lanes = unsafe { transpose_8(square) };
            out[8 * half..][..8].iter_mut().zip(lanes).for_each(|(out, lanes)| out[i / 8] = lanes);
        }
        out
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Int {
        // SAFETY: 16 bytes are there; `self` proves the instructions.
        unsafe {
            let a = _mm_loadu_si128(values.as_ptr().cast());
            [_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(a))]
        }
    }

    #[inline(always)]
    fn store_i8(self, a: Int, values: &mut [i8; LANES]) {
        // SAFETY: 16 bytes are there; `self` proves the instructions.
        unsafe {
            // Packing saturates, so only the low byte is kept before.
            let low = _mm256_set1_epi32(0xff);
            let pairs = _mm256_packus_epi32(_mm256_and_si256(a[0], low), _mm256_and_si256(a[1], low));
            // Packing works within halves of a register: lanes 0-3, 8-11, 4-7, 12-15.
            let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            _mm_storeu_si128(values.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn splat(self, value: i32) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    fn and(self, a: Int, b: Int) -> Int {
        each!(_mm256_and_si256(a, b))
    }

    #[inline(always)]
    fn add(self, a: Int, b: Int) -> Int {
        each!(_mm256_add_epi32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Int, b: Int) -> Int {
        each!(_mm256_sub_epi32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Int, b: Int) -> Int {
        each!(_mm256_mullo_epi32(a, b))
    }

    #[inline(always)]
    fn shl<const N: i32>(self, a: Int) -> Int {
        each!(_mm256_slli_epi32::<N>(a))
    }

    #[inline(always)]
    fn shr<const N: i32>(self, a: Int) -> Int {
        each!(_mm256_srli_epi32::<N>(a))
    }

    #[inline(always)]
    fn sra<const N: i32>(self, a: Int) -> Int {
        each!(_mm256_srai_epi32::<N>(a))
    }

    #[inline(always)]
    fn dot(self, sum: Int, w: Int, x: Int) -> Int {
        if VNNI {
            each!(_mm256_dpbusd_avx_epi32(sum, w, x))
        } else {
            // Two 16-bit sums per lane.
            let pairs = each!(_mm256_maddubs_epi16(w, x));
            each!(_mm256_add_epi16(sum, pairs))
        }
    }

    #[inline(always)]
    fn widen(self, sum: Int) -> Int {
        if VNNI {
            sum
        } else {
            // SAFETY: `self` proves the instruction.
            // Multiplying by one adds neighbouring 16-bit sums to 32 bits.
            let ones = unsafe { [_mm256_set1_epi16(1); 2] };
            each!(_mm256_madd_epi16(sum, ones))
        }
    }

    #[inline(always)]
    fn dot_signed(self, sum: Int, w: Int, x: Int) -> Int {
        if VNNI {
            // SAFETY: `self` proves the instruction.
            // Flipping the upper bit adds 128: unsigned weights.
            let flip = unsafe { [_mm256_set1_epi8(-128); 2] };
            let w = each!(_mm256_xor_si256(w, flip));
            each!(_mm256_dpbusd_avx_epi32(sum, w, x))
        } else {
            // |w| times x with the sign of w: at most 128 * 127, two of which fit into 16 bits.
            let x = each!(_mm256_sign_epi8(x, w));
            let w = each!(_mm256_abs_epi8(w));
            let pairs = each!(_mm256_maddubs_epi16(w, x));
            self.add(sum, Avx2::<false>(()).widen(pairs))
        }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Float {
        // SAFETY: 16 floats are there; `self` proves the instruction.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store_f32(self, a: Float, values: &mut [f32; LANES]) {
        // SAFETY: 16 floats are there; `self` proves the instruction.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), a[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), a[1]);
        }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> Float {
        let from: *const __m128i = values.as_ptr().cast();
        // SAFETY: 32 bytes are there; `self` proves the instructions.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))] }
    }

    #[inline(always)]
    fn store_f16(self, a: Float, values: &mut [f16; LANES]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        let to: *mut __m128i = values.as_mut_ptr().cast();
        // SAFETY: 32 bytes are there; `self` proves the instructions.
        unsafe {
            _mm_storeu_si128(to, _mm256_cvtps_ph::<NEAREST>(a[0]));
            _mm_storeu_si128(to.add(1), _mm256_cvtps_ph::<NEAREST>(a[1]));
        }
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn splat4_f32(self, values: &[f32; 4]) -> Float {
        // SAFETY: `self` proves the instruction, and four floats are there.
        unsafe { [_mm256_broadcast_ps(&_mm_loadu_ps(values.as_ptr())); 2] }
    }

    #[inline(always)]
    fn sum_quads(self, [a, b, c, d]: [Float; 4]) -> Float {
        // SAFETY: `self` proves the instructions, which touch no memory.
        unsafe {
            // Sums of quarters 0 and 2 in the low half, of 1 and 3 in the high half.
            let ab = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(b[0], b[1]));
            let cd = _mm256_hadd_ps(_mm256_hadd_ps(c[0], c[1]), _mm256_hadd_ps(d[0], d[1]));
            let turned = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            [_mm256_permutevar8x32_ps(ab, turned), _mm256_permutevar8x32_ps(cd, turned)]
        }
    }

    #[inline(always)]
    fn add_f32(self, a: Float, b: Float) -> Float {
        each!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub_f32(self, a: Float, b: Float) -> Float {
        each!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul_f32(self, a: Float, b: Float) -> Float {
        each!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div_f32(self, a: Float, b: Float) -> Float {
        each!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn max_f32(self, a: Float, b: Float) -> Float {
        each!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn select_greater(self, a: Float, b: Float, x: Float, y: Float) -> Float {
        // SAFETY: `self` proves the instructions.
        std::array::from_fn(|i| unsafe {
            _mm256_blendv_ps(y[i], x[i], _mm256_cmp_ps::<_CMP_GT_OQ>(a[i], b[i]))
        })
    }

    #[inline(always)]
    fn sqrt_f32(self, a: Float) -> Float {
        each!(_mm256_sqrt_ps(a))
    }

    #[inline(always)]
    fn fma(self, a: Float, b: Float, c: Float) -> Float {
        each!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn to_int(self, a: Float) -> Int {
        each!(_mm256_cvtps_epi32(a))
    }

    #[inline(always)]
    fn to_float(self, a: Int) -> Float {
        each!(_mm256_cvtepi32_ps(a))
    }

    #[inline(always)]
    fn bits_to_float(self, a: Int) -> Float {
        each!(_mm256_castsi256_ps(a))
    }

    #[inline(always)]
    fn float_to_bits(self, a: Float) -> Int {
        each!(_mm256_castps_si256(a))
    }

    #[inline(always)]
    fn prefetch<T>(self, at: &T, ahead: usize) {
        let at = std::ptr::from_ref(at).cast::<CacheLine>().wrapping_add(ahead);
        // SAFETY: a prefetch of any address does nothing but fetch.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
