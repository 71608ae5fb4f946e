//! Elementwise functions and reductions, as methods of [`Isa`].

use crate::Isa;
use half::f16;

impl Isa {
    /// `out = x / sqrt(mean(x²) + epsilon) * weight`
    pub fn rms_norm(self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        let factor = 1.0 / (mean + epsilon).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * w;
        }
    }

    /// `out = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias`
    pub fn layer_norm(self, x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32, out: &mut [f32]) {
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / x.len() as f32;
        let factor = 1.0 / (variance + epsilon).sqrt();
        for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * factor * w + b;
        }
    }

    /// `gate = silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`
    pub fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
    }

    /// `gate = relu(gate)² * up`
    pub fn relu2_mul(self, gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = gate.max(0.0) * gate.max(0.0) * up;
        }
    }

    /// `x = relu(x)²`
    pub fn relu2(self, x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = x.max(0.0) * x.max(0.0));
    }

    /// GELU, tanh form: `x = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))`
    pub fn gelu(self, x: &mut [f32]) {
        for x in x {
            *x = 0.5 * *x * (1.0 + (0.797_884_56 * (*x + 0.044715 * *x * *x * *x)).tanh());
        }
    }

    /// `x = exp(x - max(x)) / sum(exp(x - max(x)))`
    pub fn softmax(self, x: &mut [f32]) {
        let max = x.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
        x.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f32 = x.iter().sum();
        x.iter_mut().for_each(|x| *x /= sum);
    }

    /// Turns the pairs `(x[i], x[i + n])` of a head of size `2 n` by angles given as cosines and sines `[n]`.
    pub fn rope(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (a, b) = x.split_at_mut(cos.len());
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }

    /// Rounds to f16, ties to even.
    pub fn to_f16(self, x: &[f32], out: &mut [f16]) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = f16::from_f32(*x));
    }

    /// `scores[j] = scale * dot(query, keys[j])`, where `keys[j]` starts at `j * stride`.
    pub fn scores(self, query: &[f32], keys: &[f16], stride: usize, scale: f32, scores: &mut [f32]) {
        for (j, score) in scores.iter_mut().enumerate() {
            *score = scale * query.iter().zip(&keys[j * stride..]).map(|(q, k)| q * k.to_f32()).sum::<f32>();
        }
    }

    /// `out = sum_j weights[j] * values[j]`, where `values[j]` starts at `j * stride`.
    pub fn weighted_sum(self, weights: &[f32], values: &[f16], stride: usize, out: &mut [f32]) {
        out.fill(0.0);
        for (j, w) in weights.iter().enumerate() {
            out.iter_mut().zip(&values[j * stride..]).for_each(|(out, v)| *out += w * v.to_f32());
        }
    }
}
