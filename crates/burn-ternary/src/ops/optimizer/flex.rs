//! The optimizer steps on flex: one pass over memory each, in place.

use super::{AdamWStep, MOMENT_BLOCK, MuonStep, OptimizerOps, reference};
use crate::ops::flex::{POOL, dense, from_vec, into_owned, is_f32, shape, values};
use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::Shape;
use ternary_kernels::optim;

/// The default bodies and the kernels use the same constants.
const _: () = {
    assert!(optim::MOMENT_BLOCK == MOMENT_BLOCK[0] && optim::MomentBlock::WORDS == MOMENT_BLOCK[1]);
    assert!(optim::NEWTON_SCHULZ_STEPS == reference::NEWTON_SCHULZ_STEPS);
    let [a, b, c] = reference::NEWTON_SCHULZ;
    assert!(optim::NEWTON_SCHULZ[0] == a && optim::NEWTON_SCHULZ[1] == b && optim::NEWTON_SCHULZ[2] == c);
};

impl OptimizerOps for Flex {
    fn adamw_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&weight, &grad, &m, &v]) {
            return reference::adamw_step::<Flex>(weight, grad, m, v, step);
        }
        let grad = dense(grad);
        let [mut weight, mut m, mut v] = [weight, m, v].map(into_owned);
        let moments = (m.storage_mut(), v.storage_mut());
        optim::adamw(&POOL, kernel_step(step), weight.storage_mut(), values(&grad), moments.0, moments.1);
        (weight, m, v)
    }

    fn adamw_int8_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        assert!(is_f32(&[&weight, &grad, &moments]), "8-bit moments need f32 parameters");
        let grad = dense(grad);
        let [mut weight, mut moments] = [weight, moments].map(into_owned);
        let blocks = optim::MomentBlock::from_words(moments.storage_mut());
        optim::adamw_8bit(&POOL, kernel_step(step), weight.storage_mut(), values(&grad), blocks);
        (weight, moments)
    }

    fn muon_step(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        velocity: FloatTensor<Self>,
        step: MuonStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_f32(&[&weight, &grad, &velocity]) {
            return reference::muon_step::<Flex>(weight, grad, velocity, step);
        }
        let MuonStep { rate, keep, momentum, grad_factor } = step;
        let step = optim::MuonStep { rate, keep, momentum, grad_factor };
        let [_, cols] = shape(&weight).dims();
        let grad = dense(grad);
        let [mut weight, mut velocity] = [weight, velocity].map(into_owned);
        optim::muon(&POOL, step, cols, weight.storage_mut(), values(&grad), velocity.storage_mut());
        (weight, velocity)
    }

    fn square_sum(input: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&input]) {
            return reference::square_sum::<Flex>(input);
        }
        let sum = optim::square_sum(&POOL, values(&dense(input)));
        from_vec(vec![sum as f32], Shape::new([1]))
    }
}

/// The same parameters in the type of the kernels, which other backends are built without.
fn kernel_step(step: AdamWStep) -> optim::AdamWStep {
    let AdamWStep { lr, beta1, beta2, epsilon, keep, corrections, grad_factor } = step;
    optim::AdamWStep { lr, beta1, beta2, epsilon, keep, corrections, grad_factor }
}
