//! AVX-512 with VNNI: one 512-bit vector for 16 lanes, with or without the tile registers of AMX.
//!
//! # Dot products
//! `vpdpbusd` multiplies unsigned with signed bytes and adds the four products of a lane to 32 bits. Signed weights are made
//! unsigned by adding 128, which is flipping the upper bit; the product is then too large by 128 times the sum of the
//! activations, which callers subtract ([`Simd::WEIGHT_OFFSET`]).
//!
//! # Registers
//! There are 32 registers, and a sum takes one of them. So 8 tokens have their sums in registers, for two tiles at once:
//! each broadcast of activations serves two products. At 512 tokens that reaches 93 % of the peak of `vpdpbusd`, at 8 tokens
//! 78 % (768 x 3072, in cache).
//!
//! # Transposition
//! 16 x 16 lanes take 64 shuffles and no memory, in two steps of 32:
//!
//! ```text
//! unpack within quarters    quads[4 i + j]: quarter q has lane 4 q + j of rows 4 i to 4 i + 3          i, j, q in 0..4
//! shuffle quarters          out[4 q + j] = quarter q of quads[j], quads[4 + j], quads[8 + j], quads[12 + j]
//! ```

use super::amx::{self, AmxUnit};
use crate::simd::vector::{AccumulatorSink, CacheLine, Kernel, LANES, Simd, UnpackedBlock};
use half::f16;
use std::arch::x86_64::*;

/// AVX-512 F, BW and VNNI, and perhaps AMX for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512 {
    /// Whether the tile registers of AMX may be used.
    amx: bool,
}

impl Avx512 {
    /// The proof without AMX, if the CPU has the instructions.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        has.then_some(Self { amx: false })
    }

    /// The proof with AMX, if the CPU has it and the system permits it.
    pub fn with_amx() -> Option<Self> {
        Self::new().filter(|_| amx::available()).map(|_| Self { amx: true })
    }
}

/// Compiles a kernel with AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn with_avx512<K: Kernel>(kernel: K, simd: Avx512) -> K::Output {
    kernel.run(simd)
}

type Int = __m512i;
type Float = __m512;

impl Simd for Avx512 {
    type Int = Int;
    type Float = Float;
    type MatrixUnit = AmxUnit;
    const I16_SUMS: bool = false;
    const WEIGHT_OFFSET: i32 = 128;
    const UNSHIFTED_PLANES: usize = 4;
    const REGISTER_TOKENS: usize = 8;
    const REGISTER_TILES: usize = 2;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the CPU has the features.
        unsafe { with_avx512(kernel, self) }
    }

    #[inline(always)]
    fn load(self, line: &CacheLine) -> Int {
        // SAFETY: a line has 64 bytes; `self` proves the instruction.
        unsafe { _mm512_loadu_si512(line.0.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, a: Int, line: &mut CacheLine) {
        // SAFETY: a line has 64 bytes; `self` proves the instruction.
        unsafe { _mm512_storeu_si512(line.0.as_mut_ptr().cast(), a) }
    }

    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Int {
        // SAFETY: 16 bytes are there; `self` proves the instructions.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_i8(self, a: Int, values: &mut [i8; LANES]) {
        // SAFETY: 16 bytes are there; `self` proves the instructions.
        unsafe { _mm_storeu_si128(values.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(a)) }
    }

    #[inline(always)]
    fn splat(self, value: i32) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn and(self, a: Int, b: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn add(self, a: Int, b: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Int, b: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_sub_epi32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Int, b: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_mullo_epi32(a, b) }
    }

    // Shifts take their count from a register: as a constant it would have to be of another type than `N`.
    #[inline(always)]
    fn shl<const N: i32>(self, a: Int) -> Int {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(N)) }
    }

    #[inline(always)]
    fn shr<const N: i32>(self, a: Int) -> Int {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(N)) }
    }

    #[inline(always)]
    fn sra<const N: i32>(self, a: Int) -> Int {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_sra_epi32(a, _mm_cvtsi32_si128(N)) }
    }

    #[inline(always)]
    fn dot(self, sum: Int, w: Int, x: Int) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_dpbusd_epi32(sum, w, x) }
    }

    #[inline(always)]
    fn widen(self, sum: Int) -> Int {
        sum
    }

    #[inline(always)]
    fn dot_signed(self, sum: Int, w: Int, x: Int) -> Int {
        // Flipping the upper bit adds 128: unsigned weights.
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_dpbusd_epi32(sum, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x) }
    }

    #[inline(always)]
    fn has_matrix_unit(self) -> bool {
        self.amx
    }

    #[inline(always)]
    fn multiply_panels<const R: usize>(
        self,
        panels: [&[UnpackedBlock]; R],
        codes: &[[i8; LANES]],
        stride: usize,
        tokens: usize,
        sink: &mut impl AccumulatorSink<Self, R>,
    ) {
        assert!(self.amx, "AMX");
        amx::multiply(self, panels, codes, stride, tokens, sink);
    }

    #[inline(always)]
    fn matrix_unit(self, tokens: usize, blocks: usize) -> Option<AmxUnit> {
        self.amx.then(|| AmxUnit::new(tokens, blocks))
    }

    #[cfg(feature = "rayon")]
    #[inline(always)]
    fn multiplies_bf16(self) -> bool {
        self.amx && amx::multiplies_bf16()
    }

    #[cfg(feature = "rayon")]
    #[inline(always)]
    fn multiply_bf16(
        self,
        left: [&[CacheLine]; 2],
        right: [&[CacheLine]; 2],
        sums: &mut [[f32; 2 * LANES]; 2 * LANES],
    ) {
        assert!(self.multiplies_bf16(), "AMX for bfloat16");
        amx::multiply_bf16(left, right, sums);
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Float {
        // SAFETY: 16 floats are there; `self` proves the instruction.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store_f32(self, a: Float, values: &mut [f32; LANES]) {
        // SAFETY: 16 floats are there; `self` proves the instruction.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), a) }
    }

    #[inline(always)]
    fn transpose(self, rows: [Int; LANES]) -> [Int; LANES] {
        // SAFETY: `self` proves the instructions, which touch no memory.
        unsafe {
            // In each quarter, lanes of neighbouring rows, then of four: `quads[4 i + j]` has in quarter `q` the lanes
            // `4 q + j` of rows `4 i` to `4 i + 3`.
            let mut quads = rows;
            for quad in quads.as_chunks_mut::<4>().0 {
                let [a, b, c, d] = *quad;
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                *quad = [
                    _mm512_unpacklo_epi64(ab, cd),
                    _mm512_unpackhi_epi64(ab, cd),
                    _mm512_unpacklo_epi64(ab_high, cd_high),
                    _mm512_unpackhi_epi64(ab_high, cd_high),
                ];
            }
            let mut out = rows;
            for j in 0..4 {
                let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
                // Quarters 0 and 2, 1 and 3, of two quads each.
                let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (even_2, odd_2) =
                    (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
                out[j] = _mm512_shuffle_i32x4::<0x88>(even, even_2);
                out[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_2);
                out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even_2);
                out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_2);
            }
            out
        }
    }

    #[inline(always)]
    fn stream_f32(self, a: Float, values: &mut [f32; LANES]) {
        // The instruction needs an aligned address.
        if values.as_ptr().addr().is_multiple_of(size_of::<Float>()) {
            // SAFETY: 16 floats are there, at a cache line; `self` proves the instruction, and `fence` follows.
            unsafe { _mm512_stream_ps(values.as_mut_ptr(), a) }
        } else {
            self.store_f32(a, values);
        }
    }

    #[inline(always)]
    fn fence(self) {
        // SAFETY: every CPU that has AVX-512 has the instruction.
        unsafe { _mm_sfence() }
    }

    #[inline(always)]
    fn load_f16(self, values: &[f16; LANES]) -> Float {
        // SAFETY: 32 bytes are there; `self` proves the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_f16(self, a: Float, values: &mut [f16; LANES]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        // SAFETY: 32 bytes are there; `self` proves the instructions.
        unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), _mm512_cvtps_ph::<NEAREST>(a)) }
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn splat4_f32(self, values: &[f32; 4]) -> Float {
        // SAFETY: four floats are there; `self` proves the instruction.
        unsafe { _mm512_broadcast_f32x4(_mm_loadu_ps(values.as_ptr())) }
    }

    #[inline(always)]
    fn sum_quads(self, [a, b, c, d]: [Float; 4]) -> Float {
        // SAFETY: `self` proves the instructions, which touch no memory.
        unsafe {
            // In each quarter: lanes 0 and 1 of two vectors in turn, and lanes 2 and 3.
            let (ab, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let (cd, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            // Lanes 0 + 1 and 2 + 3 of one vector after the other.
            let low = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let high = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
            let high = _mm512_add_ps(high, _mm512_shuffle_ps::<0xee>(ab_high, cd_high));
            let turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_permutexvar_ps(turned, _mm512_add_ps(low, high))
        }
    }

    #[inline(always)]
    fn add_f32(self, a: Float, b: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub_f32(self, a: Float, b: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul_f32(self, a: Float, b: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div_f32(self, a: Float, b: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max_f32(self, a: Float, b: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn select_greater(self, a: Float, b: Float, x: Float, y: Float) -> Float {
        // SAFETY: `self` proves the instructions.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    fn sqrt_f32(self, a: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_sqrt_ps(a) }
    }

    #[inline(always)]
    fn fma(self, a: Float, b: Float, c: Float) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn to_int(self, a: Float) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_cvtps_epi32(a) }
    }

    #[inline(always)]
    fn to_float(self, a: Int) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn bits_to_float(self, a: Int) -> Float {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_castsi512_ps(a) }
    }

    #[inline(always)]
    fn float_to_bits(self, a: Float) -> Int {
        // SAFETY: `self` proves the instruction.
        unsafe { _mm512_castps_si512(a) }
    }

    #[inline(always)]
    fn prefetch<T>(self, at: &T, ahead: usize) {
        let at = std::ptr::from_ref(at).cast::<CacheLine>().wrapping_add(ahead);
        // SAFETY: a prefetch of any address does nothing but fetch.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
