//! [`Simd`]: the vector operations that an instruction set provides, and [`Kernel`]: an algorithm written over them.
//!
//! # Vectors
//! A vector has 16 lanes of 32 bits, on every instruction set:
//!
//! | instruction set | registers per vector | file |
//! |---|---|---|
//! | AVX-512 (and AMX) | 1 of 512 bits | `x86_64/avx512.rs`, `x86_64/amx.rs` |
//! | AVX2, AVX-VNNI | 2 of 256 bits | `x86_64/avx2.rs` |
//! | NEON | 4 of 128 bits | `aarch64/neon.rs` |
//! | none | an array | `scalar.rs`, which is also the oracle of the tests |
//!
//! A fixed width has two consequences. Memory layouts and algorithms are the same everywhere, so that each is written
//! once. And floats are added in the same order everywhere, so that results are equal to the bit on every CPU.
//!
//! # A value is the proof
//! Types that implement [`Simd`] can only be constructed after the CPU was found to have the instructions. All methods
//! are therefore safe. The compiler only emits the instructions inside a function that enables them, so an algorithm is
//! a [`Kernel`]: [`Simd::vectorize`] calls its [`run`](Kernel::run) from such a function, and everything that `run`
//! calls must be inlined into it. This is why functions over vectors are `#[inline(always)]`, and why some loops call a
//! method of a trait instead of a closure or `map`: those are not always inlined, and then lose the instructions.
//!
//! # Int8 dot products
//! The central operation multiplies bytes: each 32-bit lane holds four bytes of one row of the weights, which are
//! multiplied with four consecutive activations and added to the lane.
//!
//! ```text
//! lane r of w:    w[r, 4p]  w[r, 4p+1]  w[r, 4p+2]  w[r, 4p+3]      unsigned (dot) or signed (dot_signed) bytes
//! any lane of x:  x[4p]     x[4p+1]     x[4p+2]     x[4p+3]         signed bytes, the same in all lanes
//! lane r of sum += w[r, 4p] x[4p] + .. + w[r, 4p+3] x[4p+3]
//! ```
//!
//! | instruction set | `dot` | `dot_signed` | sums |
//! |---|---|---|---|
//! | AVX-512 VNNI, AVX-VNNI | `vpdpbusd` | the same, of weights + 128 | 32 bits |
//! | AVX2 | `vpmaddubsw`, `vpaddw` | of the magnitudes, with the signs moved to `x` | two of 16 bits, which [`Simd::widen`] adds |
//! | NEON | `sdot` | `sdot` | 32 bits |

use half::f16;
use std::convert::Infallible;

/// Rows of a tile, and lanes of a vector.
pub(crate) const LANES: usize = 16;

/// 64 bytes of packed weights: four bytes for each of 16 rows.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct CacheLine(pub [u8; 64]);

/// A block of 16 rows and 16 columns with a byte per weight: line `p` holds columns `4p..4p + 4` of each row.
///
/// Ternary weights at two bits are unpacked to this form, each bit plane to a line.
pub(crate) type UnpackedBlock = [CacheLine; 4];

/// Operations on vectors of 16 lanes. A value of the implementing type proves that the CPU has the instructions.
pub(crate) trait Simd: Copy {
    /// 16 lanes of `i32`, or of four bytes each.
    type Int: Copy;
    /// 16 lanes of `f32`.
    type Float: Copy;
    /// The accumulators of a matrix unit (AMX); [`Infallible`] where there is none.
    type MatrixUnit: MatrixUnit;

    /// Whether [`dot`](Self::dot) keeps two 16-bit sums per lane, which have to be widened before they overflow.
    const I16_SUMS: bool;
    /// What [`dot_signed`](Self::dot_signed) adds to each weight: 128 where the instruction takes unsigned bytes.
    const WEIGHT_OFFSET: i32;
    /// 2-bit planes that are multiplied where they are, without shifting them down: 1, 2 or 4. Plane 3 in place is a
    /// weight of up to 128, which `dot` must then take as unsigned.
    const UNSHIFTED_PLANES: usize;
    /// Tokens that share a pass over the weights: as many as have their sums in registers.
    const REGISTER_TOKENS: usize;
    /// Tiles of weights, 1 or 2, that share a pass over the activations: as many as have their sums in registers.
    const REGISTER_TILES: usize;

    /// Runs the kernel inside a function that enables the instructions.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// Loads 64 bytes.
    fn load(self, line: &CacheLine) -> Self::Int;
    /// Stores 64 bytes.
    fn store(self, a: Self::Int, line: &mut CacheLine);
    /// Loads 16 bytes and extends each with its sign to a lane.
    fn load_i8(self, values: &[i8; LANES]) -> Self::Int;
    /// Stores the low byte of each lane.
    fn store_i8(self, a: Self::Int, values: &mut [i8; LANES]);
    /// `value` in all lanes.
    fn splat(self, value: i32) -> Self::Int;
    /// Bitwise and.
    fn and(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a + b`, modulo 2^32.
    fn add(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a - b`, modulo 2^32.
    fn sub(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// `a * b`, modulo 2^32.
    fn mul(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// Shift left by `N` bits.
    fn shl<const N: i32>(self, a: Self::Int) -> Self::Int;
    /// Logical shift right by `N` bits.
    fn shr<const N: i32>(self, a: Self::Int) -> Self::Int;
    /// Arithmetic shift right by `N` bits: the sign is kept.
    fn sra<const N: i32>(self, a: Self::Int) -> Self::Int;

    /// Adds the products of the four unsigned bytes of `w` and the four signed bytes of `x` to each lane.
    ///
    /// `x` is -127 or more. With [`I16_SUMS`](Self::I16_SUMS), two neighbouring products may not exceed 2^15 - 1
    /// together, and `sum` has to be [widened](Self::widen) before either half overflows.
    fn dot(self, sum: Self::Int, w: Self::Int, x: Self::Int) -> Self::Int;
    /// The sums of [`dot`](Self::dot) in 32 bits.
    fn widen(self, sum: Self::Int) -> Self::Int;
    /// Adds the products of the four signed bytes of `w`, plus [`WEIGHT_OFFSET`](Self::WEIGHT_OFFSET) each, and the
    /// four signed bytes of `x` to each lane. `x` is -127 or more; sums have 32 bits.
    fn dot_signed(self, sum: Self::Int, w: Self::Int, x: Self::Int) -> Self::Int;

    /// Whether the CPU has a matrix unit (AMX), so that [`multiply_panels`](Self::multiply_panels) may be called.
    #[inline(always)]
    fn has_matrix_unit(self) -> bool {
        false
    }
    /// Products of `R` (1 or 2) panels of unpacked weights and the codes of `tokens` tokens, by the matrix unit.
    ///
    /// Both factors are signed bytes, and all sums have 32 bits. The sink receives the sums of 1 to 32 tokens at a time,
    /// in order.
    ///
    /// # Shapes
    /// panels: `R` of `[blocks]`, codes: the blocks of token `t` start at `codes[t * stride]`
    #[inline(always)]
    fn multiply_panels<const R: usize>(
        self,
        _panels: [&[UnpackedBlock]; R],
        _codes: &[[i8; LANES]],
        _stride: usize,
        _tokens: usize,
        _sink: &mut impl AccumulatorSink<Self, R>,
    ) {
        unreachable!("has_matrix_unit says so");
    }

    /// The matrix unit for few tokens: accumulators for 1 to 16 tokens that take 1 to 4 blocks of columns per step.
    /// `None` where the CPU has no such unit.
    #[inline(always)]
    fn matrix_unit(self, _tokens: usize, _blocks: usize) -> Option<Self::MatrixUnit> {
        None
    }

    /// Whether the matrix unit multiplies bfloat16, so that [`multiply_bf16`](Self::multiply_bf16) may be called.
    #[cfg(feature = "rayon")]
    #[inline(always)]
    fn multiplies_bf16(self) -> bool {
        false
    }
    /// `sums[i][j] = sum over k of left[i][k] right[k][j]`, of bfloat16 factors and summed in f32.
    ///
    /// # Shapes
    /// left: two of `[k / 32, 16, 32]`, right: two of `[k / 2, 16, 2]`, two bytes per number
    #[cfg(feature = "rayon")]
    #[inline(always)]
    fn multiply_bf16(
        self,
        _left: [&[CacheLine]; 2],
        _right: [&[CacheLine]; 2],
        _sums: &mut [[f32; 2 * LANES]; 2 * LANES],
    ) {
        unreachable!("multiplies_bf16 says so");
    }

    /// Loads 16 floats.
    fn load_f32(self, values: &[f32; LANES]) -> Self::Float;
    /// Stores 16 floats.
    fn store_f32(self, a: Self::Float, values: &mut [f32; LANES]);
    /// [`store_f32`](Self::store_f32) that bypasses the caches (a non-temporal store), if `values` is a whole cache line.
    /// [`fence`](Self::fence) must follow before another thread reads it.
    #[inline(always)]
    fn stream_f32(self, a: Self::Float, values: &mut [f32; LANES]) {
        self.store_f32(a, values);
    }
    /// Orders the stores of [`stream_f32`](Self::stream_f32) before all later stores.
    #[inline(always)]
    fn fence(self) {}
    /// Loads 16 halves and converts them to f32.
    fn load_f16(self, values: &[f16; LANES]) -> Self::Float;
    /// Rounds to the nearest half, ties to even, and stores.
    fn store_f16(self, a: Self::Float, values: &mut [f16; LANES]);
    /// `value` in all lanes.
    fn splat_f32(self, value: f32) -> Self::Float;
    /// `a + b`
    fn add_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a - b`
    fn sub_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a * b`
    fn mul_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a / b`
    fn div_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a` where `a > b`, else `b`: a NaN in `a` is replaced by `b`, a NaN in `b` stays.
    fn max_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// The square root.
    fn sqrt_f32(self, a: Self::Float) -> Self::Float;
    /// `x` where `a > b`, else `y`; `y` also where either is NaN.
    fn select_greater(self, a: Self::Float, b: Self::Float, x: Self::Float, y: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Rounds to the nearest integer, ties to even.
    fn to_int(self, a: Self::Float) -> Self::Int;
    /// Converts, rounding to the nearest float.
    fn to_float(self, a: Self::Int) -> Self::Float;
    /// Reinterprets bits as floats.
    fn bits_to_float(self, a: Self::Int) -> Self::Float;
    /// Reinterprets floats as bits.
    fn float_to_bits(self, a: Self::Float) -> Self::Int;

    /// The transpose of a 16 x 16 matrix: lane `i` of result `j` is lane `j` of `rows[i]`.
    #[inline(always)]
    fn transpose(self, rows: [Self::Int; LANES]) -> [Self::Int; LANES] {
        let mut lines = [CacheLine([0; 64]); LANES];
        for (i, row) in rows.into_iter().enumerate() {
            let mut line = CacheLine([0; 64]);
            self.store(row, &mut line);
            for (line, lane) in lines.iter_mut().zip(line.0.as_chunks::<4>().0) {
                line.0.as_chunks_mut::<4>().0[i] = *lane;
            }
        }
        lines.map(|line| self.load(&line))
    }

    /// Prefetches the cache line `ahead` lines after `_at` into the first-level cache. Any address is allowed.
    #[inline(always)]
    fn prefetch<T>(self, _at: &T, _ahead: usize) {}

    /// Four activations (a quad) in every lane: the right factor of [`dot`](Self::dot).
    #[inline(always)]
    fn splat4(self, x: [i8; 4]) -> Self::Int {
        self.splat(i32::from_le_bytes(x.map(|x| x as u8)))
    }

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self, a: Self::Float) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        self.store_f32(a, &mut values);
        values
    }

    /// Four values (a quad), repeated in each quarter of the vector.
    #[inline(always)]
    fn splat4_f32(self, values: &[f32; 4]) -> Self::Float {
        self.load_f32(&std::array::from_fn(|lane| values[lane % 4]))
    }

    /// Sums of quarters: lane `4 i + j` is the sum of quarter `j` of vector `i`, added as `(0 + 1) + (2 + 3)`.
    #[inline(always)]
    fn sum_quads(self, vectors: [Self::Float; 4]) -> Self::Float {
        let mut sums = [0.0; LANES];
        for (sums, vector) in sums.as_chunks_mut::<4>().0.iter_mut().zip(vectors) {
            for (sum, [a, b, c, d]) in sums.iter_mut().zip(self.to_array(vector).as_chunks::<4>().0) {
                *sum = (a + b) + (c + d);
            }
        }
        self.load_f32(&sums)
    }

    /// The sum of all lanes, in a fixed order: halves are added to each other until one lane is left.
    #[inline(always)]
    fn sum_lanes(self, a: Self::Float) -> f32 {
        let mut values = self.to_array(a);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                values[i] += values[i + half];
            }
        }
        values[0]
    }

    /// The largest lane; NaN counts as negative infinity.
    #[inline(always)]
    fn max_lanes(self, a: Self::Float) -> f32 {
        self.to_array(a).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Tiles of weights that a [`MatrixUnit`] multiplies per step.
///
/// Four, because a tile product of AMX that adds to the same accumulator waits for the one before: a step of
/// 64 columns took 78 cycles per two tiles with two of them, and 62 with four.
pub(crate) const UNIT_TILES: usize = 4;

/// Accumulators of a matrix unit for few tokens: see [`Simd::matrix_unit`].
///
/// They hold the sums of [`UNIT_TILES`] tiles and up to 16 tokens from one step to the next. A thread has one at a time.
pub(crate) trait MatrixUnit {
    /// Sets all sums to zero.
    fn clear(&mut self);
    /// Adds the products of one step: of as many blocks as the unit was created for.
    ///
    /// Both factors are signed bytes, and all sums have 32 bits.
    ///
    /// # Shapes
    /// panels: four lines per block of each tile, codes: the blocks of token `t` start at `codes[t * stride]`
    fn add(&mut self, panels: [&[CacheLine]; UNIT_TILES], codes: &[[i8; LANES]], stride: usize);
    /// Stores the sums: `sums[r][t]` are the 16 rows of tile `r` for token `t`. Lines beyond the tokens are left alone.
    fn store(&self, sums: &mut [[CacheLine; LANES]; UNIT_TILES]);
}

/// For CPUs without a matrix unit: there is no value to call these on.
impl MatrixUnit for Infallible {
    fn clear(&mut self) {
        match *self {}
    }

    fn add(&mut self, _: [&[CacheLine]; UNIT_TILES], _: &[[i8; LANES]], _: usize) {
        match *self {}
    }

    fn store(&self, _: &mut [[CacheLine; LANES]; UNIT_TILES]) {
        match *self {}
    }
}

/// Receives sums of products: `sums[t][r]` of panel `r` and token `first + t`, one lane per row.
///
/// A trait and not a closure, so that it is inlined for certain.
pub(crate) trait AccumulatorSink<S: Simd, const R: usize> {
    /// Takes the sums of `sums.len()` tokens from `first` on.
    fn take(&mut self, s: S, first: usize, sums: &[[S::Int; R]]);
}

/// An algorithm over vectors.
///
/// `run` must be `#[inline(always)]`, and so must everything it calls, to be compiled with the instructions.
pub(crate) trait Kernel {
    /// What the algorithm returns.
    type Output;

    /// Runs on vectors of the instruction set `S`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}
