//! Gradients between the backward pass and the optimizer: accumulation, sums over processes, global norm, clipping.

use burn::{
    Tensor,
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::TensorData,
};
use std::collections::BTreeSet;
use ternary_parallel::{Group, TreeSum, sum_over_ranks};

use crate::ops::square_sum;

/// Returns the gradients of `module` and their global L2 norm, `sqrt(sum g^2)` over all parameters.
///
/// The device sums the squares of each gradient in the gradient's type; the host reads all sums at once and adds them in f64. The
/// norm is not finite if a gradient has a NaN or an infinity, or if a sum of squares exceeds f32 (a norm above 1.8e19).
pub fn global_norm<M: Module>(grads: GradientsParams, module: &M) -> (GradientsParams, f64) {
    let mut squares = SquareSum { from: grads, into: GradientsParams::new(), sums: Vec::new() };
    module.visit(&mut squares);
    let SquareSum { into: grads, sums, .. } = squares;
    if sums.is_empty() {
        return (grads, 0.0);
    }
    (grads, Tensor::cat(sums, 0).into_data().iter::<f64>().sum::<f64>().sqrt())
}

/// The factor that clips gradients of this norm to `max_norm`: `min(1, max_norm / norm)`. A `max_norm` of 0 does not clip.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm > 0.0 && norm > max_norm { (max_norm / norm) as f32 } else { 1.0 }
}

/// Sums the squares of each gradient. It moves the gradients, so that a parameter that is twice in a module counts once.
struct SquareSum {
    from: GradientsParams,
    into: GradientsParams,
    sums: Vec<Tensor<1>>,
}

impl ModuleVisitor for SquareSum {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.from.remove::<D>(param.id) {
            self.sums.push(square_sum(grad.clone()));
            self.into.register(param.id, grad);
        }
    }
}

/// The sum of two gradients, parameter by parameter. If the loss of each micro-batch is weighted by its share of the step's tokens,
/// the sum over them is the gradient of the mean over all tokens.
pub fn accumulate<M: Module>(left: GradientsParams, right: GradientsParams, module: &M) -> GradientsParams {
    let mut sum = GradientsAccumulator::new();
    sum.accumulate(module, left);
    sum.accumulate(module, right);
    sum.grads()
}

/// The sum over the micro-batches of all processes, from the sums of this one's micro-batches: the gradients that a single process
/// would have, bit for bit. `present` has a flag per micro-batch of the step; `None` where no micro-batch has a gradient.
pub fn sum_over_processes<M: Module>(
    group: &dyn Group,
    present: &[bool],
    sums: TreeSum<GradientsParams>,
    module: &M,
) -> Option<GradientsParams> {
    if group.size() == 1 {
        return sums.finish(&mut |left, right| accumulate(left, right, module));
    }
    if !present.contains(&true) {
        return None;
    }
    let mut nodes = Vec::new();
    let mut trained = Vec::new();
    for grads in sums.into_values() {
        nodes.push(grads.map(|grads| {
            let mut flat = Flat { grads, trained: Vec::new(), numbers: Vec::new() };
            module.visit(&mut flat);
            trained = flat.trained;
            flat.numbers
        }));
    }
    // A process whose micro-batches have no target does not know which parameters have a gradient.
    let flags = group.gather(&trained);
    let flags = flags.iter().find(|flags| !flags.is_empty()).expect("a micro-batch has a gradient");
    let numbers = sum_over_ranks(group, present, nodes);
    let mut parts = Parts { flags, numbers: &numbers, seen: BTreeSet::new(), grads: GradientsParams::new() };
    module.visit(&mut parts);
    Some(parts.grads)
}

/// Copies the gradients of a module into one vector, in the order in which the module has its parameters: ids are drawn at random
/// in each process.
struct Flat {
    grads: GradientsParams,
    /// A flag per parameter: 1 if it has a gradient (and comes for the first time).
    trained: Vec<u8>,
    numbers: Vec<f32>,
}

impl ModuleVisitor for Flat {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let grad = self.grads.remove::<D>(param.id);
        self.trained.push(grad.is_some().into());
        if let Some(grad) = grad {
            self.numbers.extend(grad.into_data().iter::<f32>());
        }
    }
}

/// Cuts such a vector into gradients again.
struct Parts<'a> {
    flags: &'a [u8],
    numbers: &'a [f32],
    seen: BTreeSet<ParamId>,
    grads: GradientsParams,
}

impl ModuleVisitor for Parts<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (flag, flags) = self.flags.split_first().expect("a flag per parameter");
        self.flags = flags;
        if *flag == 0 || !self.seen.insert(param.id) {
            return;
        }
        let weight = param.val();
        let (numbers, rest) = self.numbers.split_at(weight.shape().num_elements());
        self.numbers = rest;
        let grad = TensorData::new(numbers.to_vec(), weight.shape());
        self.grads.register(param.id, Tensor::<D>::from_data(grad, &weight.device().inner()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::optim::tests::{Net, assert_close, floats, random, rng};
    use burn::{
        nn::LinearConfig,
        tensor::{Device, TensorData},
    };

    #[test]
    fn the_norm_is_global_and_clips_what_is_beyond_it() {
        let rng = &mut rng();
        let net = Net::new(rng);
        let draws: Vec<TensorData> =
            [&[7, 4][..], &[4, 10], &[10, 4], &[10], &[4]].map(|shape| random(rng, shape)).to_vec();
        let make = || {
            let mut draws = draws.iter().cloned();
            net.grads(|_| draws.next().unwrap())
        };
        let before = net.grad_values(&make());
        let exact = before.iter().flatten().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();

        let (kept, norm) = global_norm(make(), &net);
        assert!((norm / exact - 1.0).abs() < 1e-6, "{norm} instead of {exact}");
        assert_eq!(net.grad_values(&kept), before);
        assert!((clip_factor(norm, exact / 3.0) - 1.0 / 3.0).abs() < 1e-6);
        for max_norm in [0.0, exact * 1.01] {
            assert_eq!(clip_factor(norm, max_norm), 1.0);
        }
        let (none, norm) = global_norm(GradientsParams::new(), &net);
        assert!(none.is_empty() && norm == 0.0 && clip_factor(norm, 1.0) == 1.0);
    }

    #[test]
    fn the_norm_of_a_large_matrix_is_exact() {
        let rng = &mut rng();
        let linear = LinearConfig::new(700, 900).with_bias(false).init(&Device::default());
        let data = random(rng, &[700, 900]);
        let exact = data.iter::<f64>().map(|g| g * g).sum::<f64>().sqrt();
        let mut grads = GradientsParams::new();
        grads.register(linear.weight.id, Tensor::<2>::from_data(data, &Device::default()));
        let (_, norm) = global_norm(grads, &linear);
        assert!((norm / exact - 1.0).abs() < 1e-6, "{norm} instead of {exact}");
    }

    #[test]
    fn gradients_without_a_finite_norm_are_left_alone() {
        let rng = &mut rng();
        let net = Net::new(rng);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let grads = net.grads(|shape| {
                let mut data: Vec<f32> = random(rng, shape).try_to_vec().unwrap();
                data[0] = bad;
                TensorData::new(data, shape.to_vec())
            });
            let bits = |grads: &GradientsParams| {
                net.grad_values(grads).map(|v| v.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
            };
            let before = bits(&grads);
            let (after, norm) = global_norm(grads, &net);
            assert!(!norm.is_finite(), "{bad}: {norm}");
            assert_eq!(bits(&after), before);
        }
    }

    #[test]
    fn a_parameter_held_twice_counts_once() {
        #[derive(Module, Debug)]
        struct Twice {
            first: Param<Tensor<1>>,
            second: Param<Tensor<1>>,
        }
        let shared = Param::from_data([0.0f32, 0.0], &Device::default());
        let twice = Twice { first: shared.clone(), second: shared };
        let mut grads = GradientsParams::new();
        let grad = Tensor::<1>::from_data([3.0f32, 4.0], &Device::default());
        grads.register(twice.first.id, grad);
        let (grads, norm) = global_norm(grads, &twice);
        assert_eq!(norm, 5.0);
        assert_eq!(floats(grads.get::<1>(twice.first.id).unwrap()), [3.0, 4.0]);
    }

    #[test]
    fn accumulated_gradients_are_the_sum() {
        let rng = &mut rng();
        let net = Net::new(rng);
        let mut total: Option<GradientsParams> = None;
        let mut expected: [Vec<f64>; 5] = net.values().map(|values| vec![0.0; values.len()]);
        for _ in 0..3 {
            let grads = net.grads(|shape| random(rng, shape));
            for (sum, grad) in expected.iter_mut().zip(net.grad_values(&grads)) {
                sum.iter_mut().zip(grad).for_each(|(sum, g)| *sum += f64::from(g));
            }
            total = Some(match total {
                Some(total) => accumulate(total, grads, &net),
                None => grads,
            });
        }
        for (found, expected) in net.grad_values(&total.unwrap()).iter().zip(&expected) {
            assert_close("sum", found, expected, 1e-5);
        }
    }
}
