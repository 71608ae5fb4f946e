//! The losses on flex: one pass over the logits each.

use super::{LossOps, reference};
use crate::ops::flex::{POOL, buffer_like, dense, from_buffer, from_vec, indices, is_f32, shape, values};
use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::Shape;
use ternary_kernels::nn;

impl LossOps for Flex {
    fn log_likelihood(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&logits]) {
            return reference::log_likelihood::<Flex>(logits, targets);
        }
        let logits = dense(logits);
        let [rows, vocab] = logits.layout().shape().dims();
        let mut out = vec![[0.0; 3]; rows];
        nn::cross_entropy(&POOL, values(&logits), vocab, &indices(targets), &mut out);
        from_vec(out.into_flattened(), Shape::new([rows, 3]))
    }

    fn log_likelihood_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        output: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&logits, &output, &grad]) {
            return reference::log_likelihood_backward::<Flex>(logits, targets, output, grad);
        }
        let (logits, output, grad) = (dense(logits), dense(output), dense(grad));
        let [_, vocab] = logits.layout().shape().dims();
        let log_partition: Vec<f32> = values(&output).chunks(3).map(|row| row[0]).collect();
        let grads: Vec<[f32; 2]> = values(&grad).chunks(3).map(|row| [row[0], row[1]]).collect();
        let mut dlogits = buffer_like(&logits);
        nn::cross_entropy_backward(
            &POOL,
            values(&logits),
            vocab,
            &indices(targets),
            &log_partition,
            &grads,
            &mut dlogits,
        );
        from_buffer(dlogits, shape(&logits))
    }

    fn divergences(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&teacher, &student]) {
            return reference::divergences::<Flex>(teacher, student, temperature);
        }
        let (teacher, student) = (dense(teacher), dense(student));
        let [rows, vocab] = student.layout().shape().dims();
        let mut out = vec![[0.0; 4]; rows];
        nn::kl_divergence(&POOL, values(&teacher), values(&student), vocab, temperature, &mut out);
        from_vec(out.into_flattened(), Shape::new([rows, 4]))
    }

    fn divergences_backward(
        teacher: FloatTensor<Self>,
        student: FloatTensor<Self>,
        output: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        temperature: f32,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&teacher, &student, &output, &grad]) {
            return reference::divergences_backward::<Flex>(teacher, student, output, grad, temperature);
        }
        let [teacher, student, output, grad] = [teacher, student, output, grad].map(dense);
        let [_, vocab] = student.layout().shape().dims();
        let (saved, _) = values(&output).as_chunks::<4>();
        let grads: Vec<[f32; 2]> = values(&grad).chunks(4).map(|row| [row[0], row[1]]).collect();
        let mut dstudent = buffer_like(&student);
        nn::kl_divergence_backward(
            &POOL,
            values(&teacher),
            values(&student),
            vocab,
            temperature,
            saved,
            &grads,
            &mut dstudent,
        );
        from_buffer(dstudent, shape(&student))
    }
}
