//! KL divergences between the distributions of a teacher and a student over a vocabulary, and their gradient: the losses of
//! knowledge distillation.
//!
//! One pass over both rows of logits computes four sums; a second pass computes the gradient:
//!
//! ```text
//! t = (teacher - max teacher) / temperature        u = (student - max student) / temperature
//! sum exp(t),  sum exp(u),  sum exp(t) (t - u),  sum exp(u) (t - u)
//! ```

use crate::{
    Pool,
    simd::{
        Kernel, LANES, Simd,
        vector_ops::{exp, load, load_padded, store},
    },
    thread_pool::rows_per_task,
};

/// For each row of logits, with `p = softmax(teacher / temperature)` and `q = softmax(student / temperature)`:
/// `[KL(p || q), KL(q || p), log Z of p, log Z of q]`, where `Z` is the sum of exponentials. In nats.
///
/// # Shapes
/// teacher, student `[rows, vocab]`, out `[rows]`
///
/// # Panics
/// When lengths differ.
///
/// # Source
/// Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
pub fn kl_divergence(
    pool: &Pool,
    teacher: &[f32],
    student: &[f32],
    vocab: usize,
    temperature: f32,
    out: &mut [[f32; 4]],
) {
    assert!(teacher.len() == out.len() * vocab && student.len() == teacher.len(), "logits of {vocab} tokens");
    let piece = rows_per_task(vocab);
    pool.chunks(out, piece, |index, _, out| {
        let start = index * piece * vocab;
        let rows = teacher[start..].chunks(vocab).zip(student[start..].chunks(vocab));
        for (out, (teacher, student)) in out.iter_mut().zip(rows) {
            *out = pool.isa().run(Row { teacher, student, inverse: temperature.recip() });
        }
    });
}

/// The gradient for the student's logits, given those of the two divergences of each row:
/// `(dforward (q - p) + dreverse q (log q - log p - KL(q || p))) / temperature`.
///
/// # Shapes
/// As of [`kl_divergence()`], whose output is `saved`; grads `[rows]`, dstudent `[rows, vocab]`
///
/// # Panics
/// As [`kl_divergence()`].
#[allow(clippy::too_many_arguments)]
pub fn kl_divergence_backward(
    pool: &Pool,
    teacher: &[f32],
    student: &[f32],
    vocab: usize,
    temperature: f32,
    saved: &[[f32; 4]],
    grads: &[[f32; 2]],
    dstudent: &mut [f32],
) {
    assert!(
        teacher.len() == saved.len() * vocab && student.len() == teacher.len(),
        "logits of {vocab} tokens"
    );
    assert!(grads.len() == saved.len() && dstudent.len() == student.len(), "gradients");
    let piece = rows_per_task(vocab);
    pool.chunks(dstudent, piece * vocab, |index, _, out| {
        for (i, out) in out.chunks_mut(vocab).enumerate() {
            let row = index * piece + i;
            let at = row * vocab..(row + 1) * vocab;
            pool.isa().run(Gradient {
                row: Row {
                    teacher: &teacher[at.clone()],
                    student: &student[at],
                    inverse: temperature.recip(),
                },
                saved: saved[row],
                grads: grads[row],
                out,
            });
        }
    });
}

/// The logits of one position.
struct Row<'a> {
    /// `[vocab]`
    teacher: &'a [f32],
    /// `[vocab]`
    student: &'a [f32],
    /// `1 / temperature`
    inverse: f32,
}

impl Kernel for Row<'_> {
    type Output = [f32; 4];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [f32; 4] {
        let Self { teacher, student, inverse } = self;
        let largest = [teacher, student].map(|row| {
            let lowest = f32::NEG_INFINITY;
            let lanes = row
                .chunks(LANES)
                .fold(s.splat_f32(lowest), |max, x| s.max_f32(max, load_padded(s, x, lowest)));
            s.max_lanes(lanes)
        });
        let mut sums = [s.splat_f32(0.0); 4];
        let whole = teacher.len() / LANES * LANES;
        for (teacher, student) in teacher[..whole].chunks(LANES).zip(student[..whole].chunks(LANES)) {
            for (sum, term) in sums.iter_mut().zip(terms(s, [teacher, student], largest, inverse)) {
                *sum = s.add_f32(*sum, term);
            }
        }
        let rest =
            terms(s, [&teacher[whole..], &student[whole..]], largest, inverse).map(|term| s.to_array(term));
        let rest = rest.map(|terms| terms[..teacher.len() - whole].iter().sum::<f32>());
        let [p, q, p_gap, q_gap] = std::array::from_fn(|i| s.sum_lanes(sums[i]) + rest[i]);
        let (log_p, log_q) = (p.ln(), q.ln());
        [
            p_gap / p + (log_q - log_p),
            (log_p - log_q) - q_gap / q,
            largest[0] * inverse + log_p,
            largest[1] * inverse + log_q,
        ]
    }
}

/// The four summands of at most 16 tokens: `exp(t)`, `exp(u)`, `exp(t) (t - u)`, `exp(u) (t - u)`.
#[inline(always)]
fn terms<S: Simd>(s: S, logits: [&[f32]; 2], largest: [f32; 2], inverse: f32) -> [S::Float; 4] {
    let [t, u] = [0, 1].map(|i| {
        let below = s.sub_f32(load(s, logits[i]), s.splat_f32(largest[i]));
        s.mul_f32(below, s.splat_f32(inverse))
    });
    let (p, q, gap) = (exp(s, t), exp(s, u), s.sub_f32(t, u));
    [p, q, s.mul_f32(p, gap), s.mul_f32(q, gap)]
}

/// The gradient of one position.
struct Gradient<'a> {
    row: Row<'a>,
    /// Output of the forward pass.
    saved: [f32; 4],
    /// Gradients of the two divergences.
    grads: [f32; 2],
    /// `[vocab]`
    out: &'a mut [f32],
}

impl Kernel for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row: Row { teacher, student, inverse }, saved, grads, out } = self;
        let [_, reverse, log_p, log_q] = saved.map(|number| s.splat_f32(number));
        let [dforward, dreverse] = grads.map(|grad| s.splat_f32(grad * inverse));
        let inverse = s.splat_f32(inverse);
        let logits = teacher.chunks(LANES).zip(student.chunks(LANES));
        for (out, (teacher, student)) in out.chunks_mut(LANES).zip(logits) {
            let log_p = s.sub_f32(s.mul_f32(load(s, teacher), inverse), log_p);
            let log_q = s.sub_f32(s.mul_f32(load(s, student), inverse), log_q);
            let (p, q) = (exp(s, log_p), exp(s, log_q));
            let excess = s.sub_f32(s.sub_f32(log_q, log_p), reverse);
            let forward = s.mul_f32(dforward, s.sub_f32(q, p));
            store(s, s.add_f32(forward, s.mul_f32(dreverse, s.mul_f32(q, excess))), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numbers, pools};

    fn log_softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
        let scaled: Vec<f64> = logits.iter().map(|x| f64::from(*x) / f64::from(temperature)).collect();
        let log_z = scaled.iter().map(|x| x.exp()).sum::<f64>().ln();
        scaled.iter().map(|x| x - log_z).collect()
    }

    fn kl(p: &[f64], q: &[f64]) -> f64 {
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    #[test]
    fn forward_and_backward_are_right() {
        for (rows, vocab, temperature) in
            [(1, 1, 1.0), (3, 7, 2.5), (5, 16, 1.0), (2, 65, 0.5), (3, 100, 1.0), (4, 8192, 2.0)]
        {
            let teacher = numbers(rows * vocab, 8.0, 1);
            let student = numbers(rows * vocab, 8.0, 2);
            let grads: Vec<[f32; 2]> =
                numbers(2 * rows, 1.0, 3).chunks(2).map(|pair| [pair[0], pair[1]]).collect();
            let logs: Vec<(Vec<f64>, Vec<f64>)> = teacher
                .chunks(vocab)
                .zip(student.chunks(vocab))
                .map(|(t, s)| (log_softmax(t, temperature), log_softmax(s, temperature)))
                .collect();
            let mut bits = None;
            for pool in pools() {
                let mut out = vec![[f32::NAN; 4]; rows];
                kl_divergence(&pool, &teacher, &student, vocab, temperature, &mut out);
                let column = |i: usize| out.iter().map(|out| out[i]).collect::<Vec<_>>();
                assert_close("forward", &column(0), logs.iter().map(|(p, q)| kl(p, q)), 4e-6);
                assert_close("reverse", &column(1), logs.iter().map(|(p, q)| kl(q, p)), 4e-6);
                let mut found = vec![f32::NAN; student.len()];
                kl_divergence_backward(
                    &pool,
                    &teacher,
                    &student,
                    vocab,
                    temperature,
                    &out,
                    &grads,
                    &mut found,
                );
                let expected = logs.iter().zip(&grads).flat_map(|((p, q), grads)| {
                    let ([forward, reverse], excess) = (grads.map(f64::from), kl(q, p));
                    let each = p.iter().zip(q).map(move |(p, q)| {
                        let slope = forward * (q.exp() - p.exp()) + reverse * q.exp() * (q - p - excess);
                        slope / f64::from(temperature)
                    });
                    each.collect::<Vec<_>>()
                });
                assert_close("dstudent", &found, expected, 1e-5);
                let now: Vec<u32> = out.as_flattened().iter().chain(&found).map(|x| x.to_bits()).collect();
                assert_eq!(*bits.get_or_insert_with(|| now.clone()), now, "other bits");
            }
        }
    }

    #[test]
    fn equal_distributions_are_at_no_distance() {
        for vocab in [1, 3, 40] {
            let logits = numbers(vocab, 30.0, 1);
            // A constant more is the same distribution.
            let other: Vec<f32> = logits.iter().map(|x| x + 4.0).collect();
            for pool in pools() {
                let mut out = [[f32::NAN; 4]];
                kl_divergence(&pool, &logits, &other, vocab, 1.0, &mut out);
                assert!(out[0][..2].iter().all(|distance| distance.abs() < 1e-5), "{out:?}");
            }
        }
    }
}
