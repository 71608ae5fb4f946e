//! Rotary position embedding (RoPE) of one head, as a method of [`Isa`].

use crate::simd::{
    Isa, Kernel, LANES, Simd,
    vector_ops::{load, store},
};

impl Isa {
    /// Rotates the pairs `(x[i], x[i + n])` of a head of `2 n` components by angles, given as cosines and sines `[n]`.
    ///
    /// # Panics
    /// When lengths do not fit.
    ///
    /// # Source
    /// Su et al., "RoFormer" (2021), with the pairs of GPT-NeoX.
    pub fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        self.run(Rope { x, cos, sin });
    }
}

/// See [`Isa::rope`].
struct Rope<'a> {
    /// `[2 n]`
    x: &'a mut [f32],
    /// `[n]`
    cos: &'a [f32],
    /// `[n]`
    sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(self.x.len() == 2 * self.cos.len() && self.cos.len() == self.sin.len());
        let (a, b) = self.x.split_at_mut(self.cos.len());
        let angles = self.cos.chunks(LANES).zip(self.sin.chunks(LANES));
        for ((a, b), (cos, sin)) in a.chunks_mut(LANES).zip(b.chunks_mut(LANES)).zip(angles) {
            let (x, y, cos, sin) = (load(s, a), load(s, b), load(s, cos), load(s, sin));
            store(s, s.sub_f32(s.mul_f32(x, cos), s.mul_f32(y, sin)), a);
            store(s, s.fma(x, sin, s.mul_f32(y, cos)), b);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{SIZES, check, values};

    #[test]
    fn a_rotation_is_right() {
        for &n in SIZES {
            let (x, cos, sin) = (values(2 * n, 2.0), values(n, 1.0), values(n + 1, 1.0)[1..].to_vec());
            let turned = (0..2 * n).map(|i| {
                let (a, b) = (f64::from(x[i % n]), f64::from(x[i % n + n]));
                let (cos, sin) = (f64::from(cos[i % n]), f64::from(sin[i % n]));
                if i < n { a * cos - b * sin } else { a * sin + b * cos }
            });
            check("rope", 1e-6, &turned.collect::<Vec<_>>(), |isa| {
                let mut x = x.clone();
                isa.rope(&mut x, &cos, &sin);
                x
            });
        }
    }
}
