//! Elementwise functions, norms and the parts of attention, as methods of [`Isa`].

use crate::{
    Isa,
    simd::{Kernel, LANES, Simd},
};

impl Isa {
    /// `out = x / sqrt(mean(x²) + epsilon) * weight`
    ///
    /// # Panics
    /// When lengths differ, here as in all of these.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        self.run(Norm { x, weight, bias: None, epsilon, out });
    }

    /// `out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`
    pub fn layer_norm(self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        self.run(Norm { x, weight, bias: Some(bias), epsilon, out });
    }

    /// `gate = silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`
    pub fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        self.run(Map { x: gate, y: up, f: SiluMul });
    }

    /// `gate = relu(gate)² * up`
    pub fn relu2_mul(self, gate: &mut [f32], up: &[f32]) {
        self.run(Map { x: gate, y: up, f: Relu2Mul });
    }

    /// `x = relu(x)²`
    pub fn relu2(self, x: &mut [f32]) {
        self.run(Map { x, y: &[], f: Relu2 });
    }

    /// GELU, tanh form: `x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))`
    pub fn gelu(self, x: &mut [f32]) {
        self.run(Map { x, y: &[], f: Gelu });
    }

    /// `x = exp(x - max(x)) / sum(exp(x - max(x)))`
    pub fn softmax(self, x: &mut [f32]) {
        self.run(Softmax { x });
    }

    /// `x = exp((x - max(x)) / temperature)`, and 0 below exp(-87) and where x is -infinity: a softmax that is not normalized.
    pub fn softmax_weights(self, x: &mut [f32], temperature: f32) {
        self.run(SoftmaxWeights { x, temperature });
    }

    /// Turns the pairs `(x[i], x[i + n])` of a head of size `2 n` by angles given as cosines and sines `[n]`.
    pub fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        self.run(Rope { x, cos, sin });
    }
}

/// Up to 16 values, zeros after them.
#[inline(always)]
pub(crate) fn load<S: Simd>(s: S, values: &[f32]) -> S::Float {
    load_padded(s, values, 0.0)
}

#[inline(always)]
pub(crate) fn load_padded<S: Simd>(s: S, values: &[f32], padding: f32) -> S::Float {
    match values.as_array::<LANES>() {
        Some(values) => s.load_f32(values),
        None => {
            let mut padded = [padding; LANES];
            padded[..values.len()].copy_from_slice(values);
            s.load_f32(&padded)
        }
    }
}

#[inline(always)]
pub(crate) fn abs<S: Simd>(s: S, x: S::Float) -> S::Float {
    s.bits_to_float(s.and(s.float_to_bits(x), s.splat(0x7fff_ffff)))
}

/// As many lanes as there are values.
#[inline(always)]
pub(crate) fn store<S: Simd>(s: S, a: S::Float, values: &mut [f32]) {
    match values.as_mut_array::<LANES>() {
        Some(values) => s.store_f32(a, values),
        None => values.copy_from_slice(&s.array(a)[..values.len()]),
    }
}

/// As many codes as there is room for.
#[inline(always)]
pub(crate) fn store_codes<S: Simd>(s: S, a: S::Int, codes: &mut [i8]) {
    match codes.as_mut_array::<LANES>() {
        Some(codes) => s.store_i8(a, codes),
        None => {
            let mut block = [0; LANES];
            s.store_i8(a, &mut block);
            codes.copy_from_slice(&block[..codes.len()]);
        }
    }
}

/// Up to 16 codes, zeros after them.
#[inline(always)]
pub(crate) fn load_codes<S: Simd>(s: S, codes: &[i8]) -> S::Int {
    match codes.as_array::<LANES>() {
        Some(codes) => s.load_i8(codes),
        None => {
            let mut block = [0; LANES];
            block[..codes.len()].copy_from_slice(codes);
            s.load_i8(&block)
        }
    }
}

/// `exp(x)` to 2 units in the last place, for x in -87 to 88; beyond, as at the ends.
///
/// # Source
/// Cephes, `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::Float) -> S::Float {
    let c = |value: f32| s.splat_f32(value);
    let negative = s.sub_f32(c(0.0), x);
    let x = s.max_f32(s.sub_f32(c(0.0), s.max_f32(negative, c(-88.0))), c(-87.0));
    let n = s.to_int(s.mul_f32(x, c(std::f32::consts::LOG2_E)));
    let n_float = s.to_float(n);
    let r = s.fma(n_float, c(-0.693_359_4), x);
    let r = s.fma(n_float, c(2.121_944_4e-4), r);
    let mut poly = c(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        poly = s.fma(poly, r, c(coefficient));
    }
    let mantissa = s.add_f32(s.fma(s.mul_f32(r, r), poly, r), c(1.0));
    s.mul_f32(mantissa, s.bits_to_float(s.shl::<23>(s.add(n, s.splat(127)))))
}

/// `1 / (1 + exp(-x))`
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::Float) -> S::Float {
    times_sigmoid(s, s.splat_f32(1.0), x)
}

/// `x / (1 + exp(-y))`
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, x: S::Float, y: S::Float) -> S::Float {
    s.div_f32(x, s.add_f32(s.splat_f32(1.0), exp(s, s.sub_f32(s.splat_f32(0.0), y))))
}

pub(crate) trait Function {
    fn apply<S: Simd>(&self, s: S, x: S::Float, y: S::Float) -> S::Float;
}

pub(crate) struct SiluMul;
struct Relu2Mul;
struct Relu2;
pub(crate) struct Gelu;

impl Function for SiluMul {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, y: S::Float) -> S::Float {
        s.mul_f32(times_sigmoid(s, x, x), y)
    }
}

impl Function for Relu2Mul {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, y: S::Float) -> S::Float {
        s.mul_f32(Relu2.apply(s, x, y), y)
    }
}

impl Function for Relu2 {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, _: S::Float) -> S::Float {
        let x = s.max_f32(x, s.splat_f32(0.0));
        s.mul_f32(x, x)
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: S::Float, _: S::Float) -> S::Float {
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x³)
        let cubic = s.fma(s.mul_f32(x, x), s.splat_f32(0.071_354_82), s.splat_f32(1.595_769_2));
        times_sigmoid(s, x, s.mul_f32(x, cubic))
    }
}

/// `x = f(x, y)`, with x for a `y` that is not there.
struct Map<'a, F> {
    x: &'a mut [f32],
    y: &'a [f32],
    f: F,
}

impl<F: Function> Kernel for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.y.is_empty() {
            for x in self.x.chunks_mut(LANES) {
                let value = load(s, x);
                store(s, self.f.apply(s, value, value), x);
            }
            return;
        }
        assert_eq!(self.x.len(), self.y.len());
        for (x, y) in self.x.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            store(s, self.f.apply(s, load(s, x), load(s, y)), x);
        }
    }
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    /// With one, the mean is subtracted.
    bias: Option<&'a [f32]>,
    epsilon: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, weight, bias, epsilon, out } = self;
        assert!(x.len() == weight.len() && x.len() == out.len() && bias.is_none_or(|b| b.len() == x.len()));
        let n = x.len() as f32;
        let mut mean = 0.0;
        if bias.is_some() {
            let sum = x.chunks(LANES).fold(s.splat_f32(0.0), |sum, x| s.add_f32(sum, load(s, x)));
            mean = s.sum_lanes(sum) / n;
        }
        let means = s.splat_f32(mean);
        let mut squares = s.splat_f32(0.0);
        for x in x.chunks(LANES) {
            let d = s.sub_f32(load_padded(s, x, mean), means);
            squares = s.fma(d, d, squares);
        }
        let variance = s.sum_lanes(squares) / n;
        let factor = s.splat_f32(1.0 / (variance + epsilon).sqrt());
        for (i, (out, x)) in out.chunks_mut(LANES).zip(x.chunks(LANES)).enumerate() {
            let part = i * LANES..i * LANES + out.len();
            let scaled = s.mul_f32(s.sub_f32(load(s, x), means), factor);
            let bias = bias.map_or(s.splat_f32(0.0), |bias| load(s, &bias[part.clone()]));
            store(s, s.fma(scaled, load(s, &weight[part]), bias), out);
        }
    }
}

pub(crate) struct Softmax<'a> {
    pub x: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (blocks, rest) = self.x.as_chunks_mut::<LANES>();
        let mut max = s.splat_f32(f32::NEG_INFINITY);
        for x in &*blocks {
            max = s.max_f32(max, s.load_f32(x));
        }
        let max = rest.iter().fold(s.max_lanes(max), |max, x| max.max(*x));
        let maxima = s.splat_f32(max);
        let mut sum = s.splat_f32(0.0);
        for x in &mut *blocks {
            let value = exp(s, s.sub_f32(s.load_f32(x), maxima));
            sum = s.add_f32(sum, value);
            s.store_f32(value, x);
        }
        let tail = s.array(exp(s, s.sub_f32(load(s, rest), maxima)));
        rest.copy_from_slice(&tail[..rest.len()]);
        let sum = s.sum_lanes(sum) + rest.iter().sum::<f32>();
        let factor = s.splat_f32(1.0 / sum);
        for x in self.x.chunks_mut(LANES) {
            store(s, s.mul_f32(load(s, x), factor), x);
        }
    }
}

struct SoftmaxWeights<'a> {
    x: &'a mut [f32],
    temperature: f32,
}

impl Kernel for SoftmaxWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut max = s.splat_f32(f32::NEG_INFINITY);
        for x in self.x.chunks(LANES) {
            max = s.max_f32(load_padded(s, x, f32::NEG_INFINITY), max);
        }
        let (max, temperature) = (s.splat_f32(s.max_lanes(max)), s.splat_f32(self.temperature));
        for x in self.x.chunks_mut(LANES) {
            // Two steps: the difference of two huge numbers may be infinite, a quotient of infinities is no number.
            let power = s.div_f32(s.sub_f32(load(s, x), max), temperature);
            store(s, s.select_greater(power, s.splat_f32(-87.0), exp(s, power), s.splat_f32(0.0)), x);
        }
    }
}

struct Rope<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
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
    use super::*;

    fn values(n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|i| ((i * 2_654_435_761 >> 7) % 2001) as f32 / 1000.0 * scale - scale).collect()
    }

    /// The same bits on every instruction set, within `tolerance` of the float64 values.
    fn check(name: &str, tolerance: f64, expected: &[f64], f: impl Fn(Isa) -> Vec<f32>) {
        let first = f(Isa::available()[0]);
        for isa in Isa::available() {
            let found = f(isa);
            assert!(found.iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}, {isa:?}");
            for (found, expected) in found.iter().zip(expected) {
                let error = (f64::from(*found) - expected).abs() / expected.abs().max(1.0);
                assert!(error <= tolerance, "{name}, {isa:?}: {found} is not {expected}");
            }
        }
    }

    /// Miri is a thousand times as slow.
    const SIZES: &[usize] = if cfg!(miri) { &[1, 5, 16, 17] } else { &[1, 5, 16, 17, 64, 100, 769] };

    #[test]
    fn activations_are_right() {
        for &n in SIZES {
            for scale in [1.0, 9.0, 100.0] {
                let (x, y) = (values(n, scale), values(n + 3, 2.0)[3..].to_vec());
                let map = |f: fn(f64, f64) -> f64| -> Vec<f64> {
                    x.iter().zip(&y).map(|(x, y)| f(f64::from(*x), f64::from(*y))).collect()
                };
                let apply = |f: fn(Isa, &mut [f32], &[f32])| {
                    let (x, y) = (x.clone(), y.clone());
                    move |isa| {
                        let mut x = x.clone();
                        f(isa, &mut x, &y);
                        x
                    }
                };
                check("silu", 1e-6, &map(|x, y| x / (1.0 + (-x).exp()) * y), apply(Isa::silu_mul));
                check("relu2", 1e-6, &map(|x, y| x.max(0.0).powi(2) * y), apply(Isa::relu2_mul));
                check("relu2", 1e-6, &map(|x, _| x.max(0.0).powi(2)), apply(|isa, x, _| isa.relu2(x)));
                let gelu = |x: f64, _| {
                    0.5 * x
                        * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
                };
                check("gelu", 1e-6, &map(gelu), apply(|isa, x, _| isa.gelu(x)));
            }
        }
    }

    #[test]
    fn norms_are_right() {
        for &n in SIZES {
            let x: Vec<_> = values(n, 3.0).iter().map(|x| x + 5.0).collect();
            let (weight, bias) = (values(n + 1, 1.0)[1..].to_vec(), values(n + 2, 1.0)[2..].to_vec());
            let exact = |centre: bool| -> Vec<f64> {
                let x: Vec<_> = x.iter().map(|x| f64::from(*x)).collect();
                let mean = if centre { x.iter().sum::<f64>() / n as f64 } else { 0.0 };
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
                let factor = (variance + 1e-5).sqrt().recip();
                let bias = |i: usize| if centre { f64::from(bias[i]) } else { 0.0 };
                (0..n).map(|i| (x[i] - mean) * factor * f64::from(weight[i]) + bias(i)).collect()
            };
            check("rms", 2e-6, &exact(false), |isa| {
                let mut out = vec![0.0; n];
                isa.rms_norm(&x, &weight, 1e-5, &mut out);
                out
            });
            check("layer", 2e-6, &exact(true), |isa| {
                let mut out = vec![0.0; n];
                isa.layer_norm(&x, &weight, &bias, 1e-5, &mut out);
                out
            });
        }
    }

    #[test]
    fn attention_is_right() {
        for &n in SIZES {
            for scale in [0.0, 1.0, 80.0] {
                let x = values(n, scale);
                let max = f64::from(x.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x)));
                let powers: Vec<_> = x.iter().map(|x| (f64::from(*x) - max).exp()).collect();
                let sum: f64 = powers.iter().sum();
                check("softmax", 1e-6, &powers.iter().map(|p| p / sum).collect::<Vec<_>>(), |isa| {
                    let mut x = x.clone();
                    isa.softmax(&mut x);
                    x
                });
            }
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

    #[test]
    fn softmax_weights_are_those_of_float64_and_equal_on_every_instruction_set() {
        for n in [1, 15, 16, 37, 300] {
            for temperature in [0.3, 1.0, 7.0] {
                let mut logits: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32 / 50.0) - 10.0).collect();
                logits[n / 2] = if n > 1 { f32::NEG_INFINITY } else { 3.0 };
                if n > 20 {
                    logits[n - 2] = -400.0;
                    logits[3] = f32::MIN;
                }
                let max = logits.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
                let mut first: Option<Vec<f32>> = None;
                for isa in Isa::available() {
                    let mut found = logits.clone();
                    isa.softmax_weights(&mut found, temperature);
                    for (found, logit) in found.iter().zip(&logits) {
                        let power = (f64::from(*logit) - f64::from(max)) / f64::from(temperature);
                        let expected = power.exp();
                        // A unit of the power in its last place is so much of the result.
                        let error = (f64::from(*found) - expected).abs() / expected.max(1e-37);
                        assert!(
                            error < 1e-6 + 1.2e-7 * power.abs().min(90.0),
                            "{found} for {expected}, {isa:?}"
                        );
                        assert!(power > -87.0 || *found == 0.0, "{isa:?}");
                    }
                    assert_eq!(first.get_or_insert(found.clone()), &found, "{isa:?}");
                }
            }
        }
        for isa in Isa::available() {
            let mut none = [f32::NEG_INFINITY; 3];
            isa.softmax_weights(&mut none, 1.0);
            assert_eq!(none, [0.0; 3]);
        }
    }
}
