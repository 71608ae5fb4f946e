//! Distances of a student from its teacher: of logits, of hidden states, and of the relations between positions.

use super::Divergence;
use crate::nn::{Projections, rms_normalize};
use crate::ops::{divergences, log_likelihood};
use burn::tensor::{
    Int, Tensor,
    activation::{log_softmax, softmax},
};

/// Keeps the norm of a vector of zeros from dividing by zero.
const EPSILON: f64 = 1e-12;
/// Minimum probability of all tokens together that a recording leaves out.
const MIN_REST_PROBABILITY: f64 = 1e-4;

/// `T² D(softmax(teacher / T), softmax(student / T))` of logits, the mean over the `tokens` targets where the mask is 1.
///
/// # Source
/// Hinton et al., Distilling the Knowledge in a Neural Network, section 2, for `T²`.
pub(super) fn divergence(
    kind: Divergence,
    temperature: f64,
    teacher: Tensor<3>,
    student: Tensor<3>,
    mask: Tensor<2>,
    tokens: usize,
) -> Tensor<1> {
    let [batch, seq, vocab] = student.dims();
    let [teacher, student] = [teacher, student].map(|logits| logits.reshape([batch * seq, vocab]));
    let both = divergences(teacher, student, temperature as f32);
    let [forward, reverse] = [0, 1].map(|column| both.clone().narrow(1, column, 1));
    let each = match kind {
        Divergence::Forward => forward,
        Divergence::Reverse => reverse,
        Divergence::Mean => (forward + reverse) / 2.0,
    };
    let share = temperature * temperature / tokens.max(1) as f64;
    (each * mask.reshape([batch * seq, 1])).sum().mul_scalar(share)
}

/// The divergence of a student's logits from cached logits of a teacher: the log probabilities `log_p` of its most likely `ids`. Both
/// distributions are over these tokens and one more, which stands for all others.
///
/// # Shapes
/// ids, log_p `[batch, seq, kept]`, student `[batch, seq, vocab]`, mask `[batch, seq]`
pub(super) fn cached_divergence(
    kind: Divergence,
    ids: Tensor<3, Int>,
    log_p: Tensor<3>,
    student: Tensor<3>,
    mask: Tensor<2>,
    tokens: usize,
) -> Tensor<1> {
    let [batch, seq, vocab] = student.dims();
    let most_likely = ids.clone().narrow(2, 0, 1).reshape([batch * seq, 1]);
    let likelihood = log_likelihood(student.clone().reshape([batch * seq, vocab]), most_likely);
    let log_partition = likelihood.narrow(1, 0, 1).reshape([batch, seq, 1]);
    let log_q = student.gather(2, ids) - log_partition;
    mean_divergence(kind, with_rest(log_p), with_rest(log_q), mask, tokens)
}

/// Log probabilities, and that of all else; the rest is at least what f16 logarithms can be wrong by.
fn with_rest(log: Tensor<3>) -> Tensor<3> {
    let rest = log.clone().exp().sum_dim(2).neg().add_scalar(1.0).clamp_min(MIN_REST_PROBABILITY).log();
    Tensor::cat(vec![log, rest], 2)
}

/// `D(p, q)`, the mean over the `tokens` targets where the mask is 1.
fn mean_divergence(
    kind: Divergence,
    log_p: Tensor<3>,
    log_q: Tensor<3>,
    mask: Tensor<2>,
    tokens: usize,
) -> Tensor<1> {
    let gap = log_p.clone() - log_q.clone();
    let sum = match kind {
        Divergence::Forward => log_p.exp() * gap,
        Divergence::Reverse => log_q.exp() * gap.neg(),
        Divergence::Mean => (log_p.exp() - log_q.exp()) * gap / 2.0,
    };
    let sum: Tensor<2> = sum.sum_dim(2).squeeze_dim(2);
    (sum * mask).sum().mul_scalar(1.0 / tokens.max(1) as f64)
}

/// Mean squared distance of hidden states, after both are scaled to a root mean square of 1, since the size of the residual stream
/// differs between models.
///
/// # Shapes
/// teacher, student `[batch, seq, d_model]` -> `[1]`
pub(super) fn hidden_distance(teacher: Tensor<3>, student: Tensor<3>) -> Tensor<1> {
    (rms_normalize(teacher, EPSILON) - rms_normalize(student, EPSILON)).square().mean()
}

/// KL divergence of the student's relations from the teacher's in nats: the sum over queries, keys and values, the mean over
/// positions, relation heads and sequences.
///
/// The relation of a position is the distribution `softmax(a Aᵀ)` over all positions of its sequence. The rows of `A` are the queries
/// (keys, values), split into `heads` parts, each normalized to length 1. So widths and heads of the two models may differ.
///
/// # Shapes
/// query, key and value of both: `[batch, seq, width]`, to `[1]`
///
/// # Source
/// Wu et al., BitNet Distillation (2025), section 3.3, after Wang et al., MiniLMv2 (2021).
pub(super) fn relation_divergence(heads: usize, teacher: Projections, student: Projections) -> Tensor<1> {
    let pairs = [(teacher.query, student.query), (teacher.key, student.key), (teacher.value, student.value)];
    let each = pairs.map(|(teacher, student)| {
        let [batch, seq, _] = student.dims();
        let p = relation(heads, teacher);
        let gap = log_softmax(p.clone(), 3) - log_softmax(relation(heads, student), 3);
        (softmax(p, 3) * gap).sum().mul_scalar(1.0 / (batch * heads * seq) as f64)
    });
    let [query, key, value] = each;
    query + key + value
}

/// Cosine similarities of all pairs of positions.
///
/// # Shapes
/// `[batch, seq, width]` to `[batch, heads, seq, seq]`
fn relation(heads: usize, states: Tensor<3>) -> Tensor<4> {
    let [batch, seq, width] = states.dims();
    let parts = states.reshape([batch, seq, heads, width / heads]).swap_dims(1, 2);
    let length = parts.clone().square().sum_dim(3).add_scalar(EPSILON).sqrt();
    let parts = parts / length;
    parts.clone().matmul(parts.swap_dims(2, 3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use rand::{Rng, SeedableRng};

    const SHAPE: [usize; 3] = [2, 3, 7];

    fn numbers(seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..SHAPE.iter().product()).map(|_| rng.random_range(-6.0..6.0)).collect()
    }

    fn probabilities(logits: &[f32], temperature: f64) -> Vec<f64> {
        let powers: Vec<f64> = logits.iter().map(|x| (f64::from(*x) / temperature).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    /// The definition in float64, over the targets under the mask.
    fn reference(kind: Divergence, temperature: f64, teacher: &[f32], student: &[f32], mask: &[f32]) -> f64 {
        let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() };
        let rows = teacher
            .chunks(SHAPE[2])
            .zip(student.chunks(SHAPE[2]))
            .zip(mask)
            .filter(|(_, mask)| **mask == 1.0);
        let each = rows.map(|((teacher, student), _)| {
            let (p, q) = (probabilities(teacher, temperature), probabilities(student, temperature));
            match kind {
                Divergence::Forward => kl(&p, &q),
                Divergence::Reverse => kl(&q, &p),
                Divergence::Mean => (kl(&p, &q) + kl(&q, &p)) / 2.0,
            }
        });
        let each: Vec<f64> = each.collect();
        each.iter().sum::<f64>() / each.len() as f64 * temperature * temperature
    }

    #[test]
    fn divergence_and_its_gradient_agree_with_float64() {
        let device = crate::device::device("flex").unwrap().autodiff();
        let (teacher, student) = (numbers(1), numbers(2));
        let mask = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0];
        let tensor =
            |values: &[f32]| Tensor::<3>::from_data(TensorData::new(values.to_vec(), SHAPE), &device);
        for kind in [Divergence::Forward, Divergence::Reverse, Divergence::Mean] {
            for temperature in [1.0, 2.5] {
                let logits = tensor(&student).require_grad();
                let mask_tensor =
                    Tensor::from_data(TensorData::new(mask.to_vec(), [SHAPE[0], SHAPE[1]]), &device);
                let found = divergence(kind, temperature, tensor(&teacher), logits.clone(), mask_tensor, 4);
                let expected = reference(kind, temperature, &teacher, &student, &mask);
                let value = f64::from(found.clone().into_scalar::<f32>());
                assert!(
                    (value - expected).abs() < 1e-5 * expected,
                    "{kind:?} at {temperature}: {value}, {expected}"
                );

                let gradient = logits.grad(&found.backward()).unwrap();
                for (i, found) in gradient.into_data().iter::<f64>().enumerate() {
                    let moved = |by: f32| {
                        let mut student = student.clone();
                        student[i] += by;
                        reference(kind, temperature, &teacher, &student, &mask)
                    };
                    let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                    assert!(
                        (found - slope).abs() < 1e-3 * slope.abs().max(0.1),
                        "{kind:?}: {found}, {slope}"
                    );
                }
            }
        }
    }

    #[test]
    fn divergence_from_cached_logits_agrees_with_float64() {
        let device = crate::device::device("flex").unwrap().autodiff();
        let (teacher, student) = (numbers(5), numbers(6));
        let (mask, kept) = ([0.0, 1.0, 1.0, 1.0, 1.0, 0.0], 3);
        // The likeliest of the teacher's, a position after the other.
        let mut likeliest = Vec::new();
        for row in teacher.chunks(SHAPE[2]) {
            let mut order: Vec<usize> = (0..SHAPE[2]).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            likeliest.push(order[..kept].to_vec());
        }
        let coarse = |logits: &[f32], ids: &[usize]| -> Vec<f64> {
            let p = probabilities(logits, 1.0);
            let mut kept: Vec<f64> = ids.iter().map(|id| p[*id]).collect();
            kept.push(1.0 - kept.iter().sum::<f64>());
            kept
        };
        let reference = |kind, student: &[f32]| -> f64 {
            let kl = |p: &[f64], q: &[f64]| -> f64 { p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum() };
            let rows = teacher.chunks(SHAPE[2]).zip(student.chunks(SHAPE[2])).zip(&likeliest).zip(mask);
            let each = rows.filter(|(_, mask)| *mask == 1.0).map(|(((teacher, student), ids), _)| {
                let (p, q) = (coarse(teacher, ids), coarse(student, ids));
                match kind {
                    Divergence::Forward => kl(&p, &q),
                    Divergence::Reverse => kl(&q, &p),
                    Divergence::Mean => (kl(&p, &q) + kl(&q, &p)) / 2.0,
                }
            });
            each.sum::<f64>() / 4.0
        };
        let shape = [SHAPE[0], SHAPE[1], kept];
        let ids: Vec<i32> = likeliest.iter().flatten().map(|id| *id as i32).collect();
        let logs: Vec<f32> = teacher
            .chunks(SHAPE[2])
            .zip(&likeliest)
            .flat_map(|(row, ids)| coarse(row, ids)[..kept].iter().map(|p| p.ln() as f32).collect::<Vec<_>>())
            .collect();
        for kind in [Divergence::Forward, Divergence::Reverse, Divergence::Mean] {
            let logits =
                Tensor::<3>::from_data(TensorData::new(student.clone(), SHAPE), &device).require_grad();
            let found = cached_divergence(
                kind,
                Tensor::from_data(TensorData::new(ids.clone(), shape), &device),
                Tensor::from_data(TensorData::new(logs.clone(), shape), &device),
                logits.clone(),
                Tensor::from_data(TensorData::new(mask.to_vec(), [SHAPE[0], SHAPE[1]]), &device),
                4,
            );
            let (value, expected) =
                (f64::from(found.clone().into_scalar::<f32>()), reference(kind, &student));
            assert!((value - expected).abs() < 1e-4 * expected, "{kind:?}: {value}, {expected}");
            let gradient = logits.grad(&found.backward()).unwrap();
            for (i, found) in gradient.into_data().iter::<f64>().enumerate() {
                let moved = |by: f32| {
                    let mut student = student.clone();
                    student[i] += by;
                    reference(kind, &student)
                };
                let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((found - slope).abs() < 1e-3 * slope.abs().max(0.3), "{kind:?}: {found}, {slope}");
            }
        }
    }

    fn random<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> (Vec<f32>, Tensor<D>) {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-2.0..2.0)).collect();
        (values.clone(), Tensor::from_data(TensorData::new(values, shape), device))
    }

    /// Compares `value` and its `gradient` with `reference` of `values` in float64 and its central differences.
    fn check(value: f32, gradient: Tensor<3>, values: &[f32], reference: impl Fn(&[f64]) -> f64) {
        let wide: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
        let (value, expected) = (f64::from(value), reference(&wide));
        assert!((value - expected).abs() < 1e-5 * expected, "{value}, {expected}");
        let mut largest = 0f64;
        for (i, found) in gradient.into_data().iter::<f64>().enumerate() {
            let moved = |by: f64| {
                let mut values = wide.clone();
                values[i] += by;
                reference(&values)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            largest = largest.max(slope.abs());
            assert!((found - slope).abs() < 1e-4 * slope.abs().max(0.01), "{i}: {found}, {slope}");
        }
        assert!(largest > 1e-3, "nothing was compared");
    }

    #[test]
    fn the_hidden_distance_and_its_gradient_agree_with_float64() {
        let device = crate::device::device("flex").unwrap().autodiff();
        let (teacher, teacher_tensor) = random([2, 3, 7], 3, &device);
        let (values, student) = random([2, 3, 7], 4, &device);
        let student = student.require_grad();
        let unit = |row: &[f64]| -> Vec<f64> {
            let root = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64).sqrt();
            row.iter().map(|x| x / root).collect()
        };
        let teacher: Vec<f64> = teacher.iter().map(|x| f64::from(*x)).collect();
        let reference = |student: &[f64]| {
            let rows = teacher.chunks(7).zip(student.chunks(7));
            let squares = rows.flat_map(|(t, s)| {
                unit(t).into_iter().zip(unit(s)).map(|(t, s)| (t - s).powi(2)).collect::<Vec<_>>()
            });
            squares.sum::<f64>() / student.len() as f64
        };
        let found = hidden_distance(teacher_tensor, student.clone());
        let value = found.clone().into_scalar::<f32>();
        check(value, student.grad(&found.backward()).unwrap(), &values, reference);
        // The size of a stream does not matter.
        let (_, tensor) = random([2, 3, 7], 3, &device);
        let same = hidden_distance(tensor.clone(), tensor.mul_scalar(3.0)).into_scalar::<f32>();
        assert!(same < 1e-10, "{same}");
    }

    /// The relation divergence of one of the three, in float64, a row at a time; `[batch, seq, width]` each.
    fn relations(heads: usize, seq: usize, teacher: &[f64], student: &[f64], batch: usize) -> f64 {
        let rows = |states: &[f64], sequence: usize, head: usize| -> Vec<Vec<f64>> {
            let width = states.len() / (batch * seq);
            let part = width / heads;
            let unit = |position: usize| -> Vec<f64> {
                let from = (sequence * seq + position) * width + head * part;
                let row = &states[from..from + part];
                let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                row.iter().map(|x| x / length).collect()
            };
            let units: Vec<Vec<f64>> = (0..seq).map(unit).collect();
            let relation = |a: &Vec<f64>| -> Vec<f64> {
                let powers: Vec<f64> =
                    units.iter().map(|b| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>().exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.iter().map(|power| power / sum).collect()
            };
            units.iter().map(relation).collect()
        };
        let mut sum = 0.0;
        for (sequence, head) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            for (p, q) in rows(teacher, sequence, head).iter().zip(rows(student, sequence, head)) {
                sum += p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            }
        }
        sum / (batch * heads * seq) as f64
    }

    #[test]
    fn the_relation_divergence_and_its_gradient_agree_with_float64() {
        let device = crate::device::device("flex").unwrap().autodiff();
        let (batch, seq) = (2, 5);
        for heads in [1, 3] {
            // The student is narrower than its teacher, and has fewer keys than queries.
            let of = |width: usize, seed| random([batch, seq, width], seed, &device);
            let (teacher, student) = ([of(18, 1), of(12, 2), of(12, 3)], [of(9, 4), of(6, 5), of(6, 6)]);
            let leaves = student.clone().map(|(_, tensor)| tensor.require_grad());
            let wide = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
            let [query, key, value] = teacher.clone().map(|(_, tensor)| tensor);
            let teacher_states = Projections { query, key, value };
            let [query, key, value] = leaves.clone();
            let found = relation_divergence(heads, teacher_states, Projections { query, key, value });
            let (value, gradients) = (found.clone().into_scalar::<f32>(), found.backward());
            for part in 0..3 {
                let reference = |moved: &[f64]| {
                    let parts = (0..3).map(|other| {
                        let student = if other == part { moved.to_vec() } else { wide(&student[other].0) };
                        relations(heads, seq, &wide(&teacher[other].0), &student, batch)
                    });
                    parts.sum()
                };
                check(value, leaves[part].grad(&gradients).unwrap(), &student[part].0, reference);
            }
        }
    }
}
