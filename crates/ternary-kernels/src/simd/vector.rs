//! [`Simd`]: what the algorithms need of a CPU, as vectors of 16 lanes of 32 bits on every instruction set.
//!
//! Layouts and algorithms are thus the same everywhere, floats are summed in the same order, and results are equal to
//! the bit. A CPU with narrower registers uses several for a vector.

use half::f16;
use std::convert::Infallible;

/// Rows of a tile, and lanes of a vector.
pub(crate) const LANES: usize = 16;

/// A cache line of packed weights: four bytes for each of 16 rows.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u8; 64]);

/// A block with a byte for each code + 1: a line for each plane.
pub(crate) type Planes = [Line; 4];

/// A value of the implementing type proves that the CPU has the instructions.
pub(crate) trait Simd: Copy {
    type Int: Copy;
    type Float: Copy;
    type Unit: Unit;

    /// Whether [`dot`](Self::dot) keeps two sums of 16 bits a lane, to be widened before they overflow.
    const NARROW: bool;
    /// What [`dot_signed`](Self::dot_signed) adds to each weight.
    const OFFSET: i32;
    /// Planes of two bits that are used without shifting them down, 1, 2 or 4; for 4, `dot` takes weights of 128.
    const PLANES: usize;
    /// Tokens that share a pass over the weights: as many as the registers hold.
    const TOKENS: usize;
    /// Tiles, 1 or 2, that share a pass over the codes of many tokens: as many as the registers hold.
    const TILES: usize;

    /// Runs the kernel with the instructions enabled.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    fn load(self, line: &Line) -> Self::Int;
    fn store(self, a: Self::Int, line: &mut Line);
    fn load_i8(self, values: &[i8; LANES]) -> Self::Int;
    /// The low bytes.
    fn store_i8(self, a: Self::Int, values: &mut [i8; LANES]);
    fn splat(self, value: i32) -> Self::Int;
    fn and(self, a: Self::Int, b: Self::Int) -> Self::Int;
    fn add(self, a: Self::Int, b: Self::Int) -> Self::Int;
    fn sub(self, a: Self::Int, b: Self::Int) -> Self::Int;
    fn mul(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// Shift left.
    fn shl<const N: i32>(self, a: Self::Int) -> Self::Int;
    /// Shift right, zeros in.
    fn shr<const N: i32>(self, a: Self::Int) -> Self::Int;
    /// Shift right, signs in.
    fn sra<const N: i32>(self, a: Self::Int) -> Self::Int;

    /// Adds the products of the four unsigned bytes of `w` and the four signed bytes of `x`, -127 or more, to each lane
    /// of a sum that [`widen`](Self::widen) makes whole. Where the sum is `NARROW`, products of neighbours may not
    /// exceed 2^15 - 1 together.
    fn dot(self, sum: Self::Int, w: Self::Int, x: Self::Int) -> Self::Int;
    /// The sum in 32 bits.
    fn widen(self, sum: Self::Int) -> Self::Int;
    /// Adds the four products of the signed bytes `(w + OFFSET) x` to each lane; `x` is -127 or more.
    fn dot_signed(self, sum: Self::Int, w: Self::Int, x: Self::Int) -> Self::Int;

    /// Whether the CPU has a unit for products of matrices: [`tiles`](Self::tiles) may be called.
    #[inline(always)]
    fn has_tiles(self) -> bool {
        false
    }
    /// Products of one or two panels and the codes of `tokens` tokens, whose blocks begin at `codes[t * stride]`; both are
    /// signed bytes, of which nothing is kept in 16 bits. The sink takes the sums of some tokens after the other.
    #[inline(always)]
    fn tiles<const R: usize>(
        self,
        _panels: [&[Planes]; R],
        _codes: &[[i8; LANES]],
        _stride: usize,
        _tokens: usize,
        _sink: &mut impl Sums<Self, R>,
    ) {
        unreachable!("has_tiles says so");
    }

    /// The same unit step by step, for 1 to 16 tokens and 1 to 4 blocks of columns at a time; `None` where there is none.
    #[inline(always)]
    fn unit(self, _tokens: usize, _blocks: usize) -> Option<Self::Unit> {
        None
    }

    /// Whether the unit also multiplies bfloat16: [`half_tiles`](Self::half_tiles) may be called.
    #[cfg(feature = "rayon")]
    #[inline(always)]
    fn has_half_tiles(self) -> bool {
        false
    }
    /// `sums[i][j] = sum over k of left[i][k] right[k][j]` in bfloat16, summed in f32.
    ///
    /// # Shapes
    /// left: twice `[k / 32, 16, 32]`, right: twice `[k / 2, 16, 2]`, two bytes a number
    #[cfg(feature = "rayon")]
    #[inline(always)]
    fn half_tiles(
        self,
        _left: [&[Line]; 2],
        _right: [&[Line]; 2],
        _sums: &mut [[f32; 2 * LANES]; 2 * LANES],
    ) {
        unreachable!("has_half_tiles says so");
    }

    fn load_f32(self, values: &[f32; LANES]) -> Self::Float;
    fn store_f32(self, a: Self::Float, values: &mut [f32; LANES]);
    /// [`store_f32`](Self::store_f32) past the caches, where a line is written whole; [`fence`](Self::fence) must follow before
    /// another thread reads it.
    #[inline(always)]
    fn stream_f32(self, a: Self::Float, values: &mut [f32; LANES]) {
        self.store_f32(a, values);
    }
    /// Lets what was streamed be seen before what is written from now on.
    #[inline(always)]
    fn fence(self) {}
    fn load_f16(self, values: &[f16; LANES]) -> Self::Float;
    /// Rounded to the nearest, ties to even.
    fn store_f16(self, a: Self::Float, values: &mut [f16; LANES]);
    fn splat_f32(self, value: f32) -> Self::Float;
    fn add_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn div_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn max_f32(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sqrt_f32(self, a: Self::Float) -> Self::Float;
    /// `x` where `a > b`, else `y`, also where they do not compare.
    fn select_greater(self, a: Self::Float, b: Self::Float, x: Self::Float, y: Self::Float) -> Self::Float;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Rounds ties to even.
    fn to_int(self, a: Self::Float) -> Self::Int;
    fn to_float(self, a: Self::Int) -> Self::Float;
    fn bits_to_float(self, a: Self::Int) -> Self::Float;
    fn float_to_bits(self, a: Self::Float) -> Self::Int;

    /// Lanes for vectors: lane `i` of vector `j` is lane `j` of row `i`.
    #[inline(always)]
    fn transpose(self, rows: [Self::Int; LANES]) -> [Self::Int; LANES] {
        let mut lines = [Line([0; 64]); LANES];
        for (i, row) in rows.into_iter().enumerate() {
            let mut line = Line([0; 64]);
            self.store(row, &mut line);
            for (line, lane) in lines.iter_mut().zip(line.0.as_chunks::<4>().0) {
                line.0.as_chunks_mut::<4>().0[i] = *lane;
            }
        }
        lines.map(|line| self.load(&line))
    }

    /// Asks for what is this many lines further on.
    #[inline(always)]
    fn prefetch<T>(self, _at: &T, _ahead: usize) {}

    /// Four activations in every lane.
    #[inline(always)]
    fn splat4(self, x: [i8; 4]) -> Self::Int {
        self.splat(i32::from_le_bytes(x.map(|x| x as u8)))
    }

    #[inline(always)]
    fn array(self, a: Self::Float) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        self.store_f32(a, &mut values);
        values
    }

    /// The four values in each quarter of a vector.
    #[inline(always)]
    fn quarters(self, values: &[f32; 4]) -> Self::Float {
        self.load_f32(&std::array::from_fn(|lane| values[lane % 4]))
    }

    /// Lane `4 i + j` is the sum of quarter `j` of vector `i`, of its lanes `(0 + 1) + (2 + 3)`.
    #[inline(always)]
    fn sum_fours(self, vectors: [Self::Float; 4]) -> Self::Float {
        let mut sums = [0.0; LANES];
        for (sums, vector) in sums.as_chunks_mut::<4>().0.iter_mut().zip(vectors) {
            for (sum, [a, b, c, d]) in sums.iter_mut().zip(self.array(vector).as_chunks::<4>().0) {
                *sum = (a + b) + (c + d);
            }
        }
        self.load_f32(&sums)
    }

    #[inline(always)]
    fn sum_lanes(self, a: Self::Float) -> f32 {
        let mut values = self.array(a);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                values[i] += values[i + half];
            }
        }
        values[0]
    }

    #[inline(always)]
    fn max_lanes(self, a: Self::Float) -> f32 {
        self.array(a).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Panels that a unit multiplies at once.
pub(crate) const PANELS: usize = 4;

/// A unit for products of some panels and the codes of some tokens, which keeps their sums: see [`Simd::unit`].
///
/// A thread has one at a time.
pub(crate) trait Unit {
    /// Begins sums.
    fn clear(&mut self);
    /// Adds the products of so many blocks as it was made for: four lines of each panel, and one block of each token, whose
    /// codes begin at `codes[t * stride]`. Both are signed bytes, of which nothing is kept in 16 bits.
    fn add(&mut self, panels: [&[Line]; PANELS], codes: &[[i8; LANES]], stride: usize);
    /// `sums[r][t]` of panel `r` and token `t`, 16 lanes each; those of no token stay as they are.
    fn store(&self, sums: &mut [[Line; LANES]; PANELS]);
}

/// Of CPUs without one.
impl Unit for Infallible {
    fn clear(&mut self) {
        match *self {}
    }

    fn add(&mut self, _: [&[Line]; PANELS], _: &[[i8; LANES]], _: usize) {
        match *self {}
    }

    fn store(&self, _: &mut [[Line; LANES]; PANELS]) {
        match *self {}
    }
}

/// Takes sums of products: `sums[t][r]` of panel `r` and token `first + t`. (Not a closure: those cannot be made to be inlined,
/// and would lose the instructions.)
pub(crate) trait Sums<S: Simd, const R: usize> {
    fn take(&mut self, s: S, first: usize, sums: &[[S::Int; R]]);
}

/// An algorithm over vectors. `run` must be `#[inline(always)]`, to be compiled with the instructions.
pub(crate) trait Kernel {
    type Output;

    fn run<S: Simd>(self, simd: S) -> Self::Output;
}
