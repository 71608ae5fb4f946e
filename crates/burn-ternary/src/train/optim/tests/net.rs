//! A small model of an embedding and two linear layers, and its gradients.

use burn::Tensor;
use burn::module::{Module, Param, ParamGroup};
use burn::nn::Linear;
use burn::optim::GradientsParams;
use burn::tensor::{Device, TensorData};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;

#[derive(Module, Debug)]
pub(in crate::train) struct Net {
    pub(super) embedding: Param<Tensor<2>>,
    wide: Linear,
    pub(super) tall: Linear,
}

impl Net {
    pub(in crate::train) fn new(rng: &mut StdRng) -> Self {
        let device = Device::default().autodiff();
        let linear = |rng: &mut StdRng, d_in, d_out| Linear {
            weight: Param::from_data(random(rng, &[d_in, d_out]), &device),
            bias: Some(Param::from_data(random(rng, &[d_out]), &device)),
        };
        Self {
            embedding: Param::from_data(random(rng, &[7, 4]), &device),
            wide: linear(rng, 4, 10),
            tall: linear(rng, 10, 4),
        }
    }

    pub(super) fn matrices(&self) -> ParamGroup {
        ParamGroup::from_ids(vec![self.wide.weight.id, self.tall.weight.id])
    }

    pub(super) fn decayed(&self) -> ParamGroup {
        ParamGroup::from_ids(vec![self.embedding.id])
    }

    /// Embedding, weights and biases, in this order.
    pub(in crate::train) fn values(&self) -> [Vec<f32>; 5] {
        [
            floats(self.embedding.val()),
            floats(self.wide.weight.val()),
            floats(self.tall.weight.val()),
            floats(self.wide.bias.as_ref().unwrap().val()),
            floats(self.tall.bias.as_ref().unwrap().val()),
        ]
    }

    /// Gradients by the given function of the shape, in the order of `values`.
    pub(in crate::train) fn grads(&self, mut grad: impl FnMut(&[usize]) -> TensorData) -> GradientsParams {
        let mut grads = GradientsParams::new();
        put(&mut grads, &self.embedding, &mut grad);
        put(&mut grads, &self.wide.weight, &mut grad);
        put(&mut grads, &self.tall.weight, &mut grad);
        put(&mut grads, self.wide.bias.as_ref().unwrap(), &mut grad);
        put(&mut grads, self.tall.bias.as_ref().unwrap(), &mut grad);
        grads
    }

    pub(in crate::train) fn grad_values(&self, grads: &GradientsParams) -> [Vec<f32>; 5] {
        let bias = |linear: &Linear| floats(grads.get::<1>(linear.bias.as_ref().unwrap().id).unwrap());
        [
            floats(grads.get::<2>(self.embedding.id).unwrap()),
            floats(grads.get::<2>(self.wide.weight.id).unwrap()),
            floats(grads.get::<2>(self.tall.weight.id).unwrap()),
            bias(&self.wide),
            bias(&self.tall),
        ]
    }
}

fn put<const D: usize>(
    grads: &mut GradientsParams,
    param: &Param<Tensor<D>>,
    grad: &mut impl FnMut(&[usize]) -> TensorData,
) {
    let data = grad(&param.val().dims());
    grads.register(param.id, Tensor::<D>::from_data(data, &Device::default()));
}

/// A generator with a new seed each run, which a failing test prints.
pub(in crate::train) fn rng() -> StdRng {
    let seed = rand::random();
    println!("seed {seed}");
    StdRng::seed_from_u64(seed)
}

pub(in crate::train) fn random(rng: &mut StdRng, shape: &[usize]) -> TensorData {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.sample(StandardNormal)).collect();
    TensorData::new(values, shape.to_vec())
}

pub(in crate::train) fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

pub(in crate::train) fn assert_close(name: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (&a, b)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - b).abs();
        assert!(error <= tolerance, "{name}[{i}]: {a} instead of {b}");
    }
}
