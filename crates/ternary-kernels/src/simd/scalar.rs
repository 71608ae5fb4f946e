//! [`Scalar`]: vectors as arrays, in plain Rust, for any CPU.
//!
//! It is also the oracle of the other instruction sets: tests compare all of them with it to the bit. So that every path is
//! tested on every CPU, it behaves like the most special of them: weights are offset by 128 in signed dot products as on
//! AVX-512, and in tests there is a matrix unit as on AMX.

use super::vector::{AccumulatorSink, CacheLine, Kernel, LANES, MatrixUnit, Simd, UNIT_TILES, UnpackedBlock};
#[cfg(feature = "rayon")]
use half::bf16;
use half::f16;
use std::array::from_fn;

/// Vectors as arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scalar;

type Int = [i32; LANES];
type Float = [f32; LANES];

/// The sum of the four products of bytes of a lane: of weights, as `weight` reads them, and signed activations.
fn products(w: i32, x: i32, weight: impl Fn(u8) -> i32) -> i32 {
    w.to_le_bytes().into_iter().zip(x.to_le_bytes()).map(|(w, x)| weight(w) * i32::from(x as i8)).sum()
}

impl Simd for Scalar {
    type Int = Int;
    type Float = Float;
    type MatrixUnit = ScalarMatrixUnit;
    const I16_SUMS: bool = false;
    /// As on AVX-512, so that the code that corrects for it is tested on every CPU.
    const WEIGHT_OFFSET: i32 = 128;
    const UNSHIFTED_PLANES: usize = 4;
    const REGISTER_TOKENS: usize = 4;
    const REGISTER_TILES: usize = 2;

    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    fn load(self, line: &CacheLine) -> Int {
        let (words, _) = line.0.as_chunks::<4>();
        from_fn(|i| i32::from_le_bytes(words[i]))
    }

    fn store(self, a: Int, line: &mut CacheLine) {
        line.0.as_chunks_mut::<4>().0.iter_mut().zip(a).for_each(|(word, a)| *word = a.to_le_bytes());
    }

    fn load_i8(self, values: &[i8; LANES]) -> Int {
        values.map(i32::from)
    }

    fn store_i8(self, a: Int, values: &mut [i8; LANES]) {
        *values = a.map(|a| a as i8);
    }

    fn splat(self, value: i32) -> Int {
        [value; LANES]
    }

    fn and(self, a: Int, b: Int) -> Int {
        from_fn(|i| a[i] & b[i])
    }

    fn add(self, a: Int, b: Int) -> Int {
        from_fn(|i| a[i].wrapping_add(b[i]))
    }

    fn sub(self, a: Int, b: Int) -> Int {
        from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    fn mul(self, a: Int, b: Int) -> Int {
        from_fn(|i| a[i].wrapping_mul(b[i]))
    }

    fn shl<const N: i32>(self, a: Int) -> Int {
        a.map(|a| a << N)
    }

    fn shr<const N: i32>(self, a: Int) -> Int {
        a.map(|a| (a as u32 >> N) as i32)
    }

    fn sra<const N: i32>(self, a: Int) -> Int {
        a.map(|a| a >> N)
    }

    fn dot(self, sum: Int, w: Int, x: Int) -> Int {
        from_fn(|i| sum[i].wrapping_add(products(w[i], x[i], i32::from)))
    }

    fn widen(self, sum: Int) -> Int {
        sum
    }

    fn dot_signed(self, sum: Int, w: Int, x: Int) -> Int {
        from_fn(|i| sum[i].wrapping_add(products(w[i], x[i], |w| i32::from(w as i8) + Self::WEIGHT_OFFSET)))
    }

    /// In tests only, so that the code for a matrix unit is tested on every CPU.
    fn has_matrix_unit(self) -> bool {
        cfg!(test)
    }

    fn multiply_panels<const R: usize>(
        self,
        panels: [&[UnpackedBlock]; R],
        codes: &[[i8; LANES]],
        stride: usize,
        tokens: usize,
        sink: &mut impl AccumulatorSink<Self, R>,
    ) {
        for t in 0..tokens {
            let mut sums = [[0i32; LANES]; R];
            for (sum, panel) in sums.iter_mut().zip(panels) {
                for (planes, block) in panel.iter().zip(&codes[t * stride..]) {
                    for (line, quad) in planes.iter().zip(block.as_chunks::<4>().0) {
                        let (w, x) = (self.load(line), self.splat4(*quad));
                        *sum = from_fn(|i| sum[i].wrapping_add(products(w[i], x[i], |w| i32::from(w as i8))));
                    }
                }
            }
            sink.take(self, t, &[sums]);
        }
    }

    fn matrix_unit(self, tokens: usize, blocks: usize) -> Option<ScalarMatrixUnit> {
        let sums = [[CacheLine([0; 64]); LANES]; UNIT_TILES];
        cfg!(test).then_some(ScalarMatrixUnit { tokens, blocks, sums })
    }

    #[cfg(feature = "rayon")]
    fn multiplies_bf16(self) -> bool {
        cfg!(test)
    }

    #[cfg(feature = "rayon")]
    fn multiply_bf16(
        self,
        left: [&[CacheLine]; 2],
        right: [&[CacheLine]; 2],
        sums: &mut [[f32; 2 * LANES]; 2 * LANES],
    ) {
        let number = |lines: &[CacheLine], index: usize| {
            let [low, high] = lines[index / 32].0.as_chunks::<2>().0[index % 32];
            bf16::from_bits(u16::from_ne_bytes([low, high])).to_f32()
        };
        let k = left[0].len() / LANES * 32;
        for (i, sums) in sums.iter_mut().enumerate() {
            for (j, sum) in sums.iter_mut().enumerate() {
                let (left, right) = (left[i / LANES], right[j / LANES]);
                let product = |c: usize| {
                    number(left, c / 32 * 512 + i % LANES * 32 + c % 32)
                        * number(right, c / 2 * 32 + j % LANES * 2 + c % 2)
                };
                *sum = (0..k).map(product).sum();
            }
        }
    }

    fn load_f32(self, values: &[f32; LANES]) -> Float {
        *values
    }

    fn store_f32(self, a: Float, values: &mut [f32; LANES]) {
        *values = a;
    }

    fn load_f16(self, values: &[f16; LANES]) -> Float {
        values.map(f16::to_f32)
    }

    fn store_f16(self, a: Float, values: &mut [f16; LANES]) {
        *values = a.map(f16::from_f32);
    }

    fn splat_f32(self, value: f32) -> Float {
        [value; LANES]
    }

    fn add_f32(self, a: Float, b: Float) -> Float {
        from_fn(|i| a[i] + b[i])
    }

    fn sub_f32(self, a: Float, b: Float) -> Float {
        from_fn(|i| a[i] - b[i])
    }

    fn mul_f32(self, a: Float, b: Float) -> Float {
        from_fn(|i| a[i] * b[i])
    }

    fn div_f32(self, a: Float, b: Float) -> Float {
        from_fn(|i| a[i] / b[i])
    }

    fn max_f32(self, a: Float, b: Float) -> Float {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    fn select_greater(self, a: Float, b: Float, x: Float, y: Float) -> Float {
        from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }

    fn sqrt_f32(self, a: Float) -> Float {
        a.map(f32::sqrt)
    }

    fn fma(self, a: Float, b: Float, c: Float) -> Float {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    fn to_int(self, a: Float) -> Int {
        a.map(|a| a.round_ties_even() as i32)
    }

    fn to_float(self, a: Int) -> Float {
        a.map(|a| a as f32)
    }

    fn bits_to_float(self, a: Int) -> Float {
        a.map(|a| f32::from_bits(a as u32))
    }

    fn float_to_bits(self, a: Float) -> Int {
        a.map(|a| a.to_bits() as i32)
    }
}

/// The matrix unit of tests: see [`Simd::has_matrix_unit`].
pub struct ScalarMatrixUnit {
    tokens: usize,
    blocks: usize,
    sums: [[CacheLine; LANES]; UNIT_TILES],
}

impl MatrixUnit for ScalarMatrixUnit {
    fn clear(&mut self) {
        self.sums = [[CacheLine([0; 64]); LANES]; UNIT_TILES];
    }

    fn add(&mut self, panels: [&[CacheLine]; UNIT_TILES], codes: &[[i8; LANES]], stride: usize) {
        let s = Scalar;
        for (sums, panel) in self.sums.iter_mut().zip(panels) {
            assert_eq!(panel.len(), 4 * self.blocks);
            for (t, sums) in sums[..self.tokens].iter_mut().enumerate() {
                let quads = codes[t * stride..][..self.blocks].as_flattened().as_chunks::<4>().0;
                for (line, quad) in panel.iter().zip(quads) {
                    let (w, x, sum) = (s.load(line), s.splat4(*quad), s.load(sums));
                    let products =
                        from_fn(|i| sum[i].wrapping_add(products(w[i], x[i], |w| i32::from(w as i8))));
                    s.store(products, sums);
                }
            }
        }
    }

    fn store(&self, sums: &mut [[CacheLine; LANES]; UNIT_TILES]) {
        for (to, from) in sums.iter_mut().zip(&self.sums) {
            to[..self.tokens].copy_from_slice(&from[..self.tokens]);
        }
    }
}
