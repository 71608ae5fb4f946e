//! The ternary ops: one pass over memory each.
//!
//! Sums run over fixed blocks of rows and are added in order, so that a result does not depend on the number of threads.

use super::{POOL, dense, is_f32, memory::filled, tensor, values};
use crate::ops::{RowScale, absmax, absmax::ABSMAX_MIN, scale, ternary};
use burn::backend::{Flex, ops::FloatTensorOps};
use burn::tensor::Shape;
use burn_flex::FlexTensor;
use half::f16;
use rayon::prelude::*;
use ternary_kernels::{TensorBuffer, nn};

/// So few weights are sorted by passes over all columns; of more, each column is gathered and selected in.
const FEW: usize = 16;

pub(super) fn ternary_codes(weight: FlexTensor, threshold: FlexTensor) -> FlexTensor {
    if !is_f32(&[&weight, &threshold]) {
        return ternary::codes::<Flex>(weight, threshold);
    }
    let shape = threshold.layout().shape().clone();
    let ones = tensor(vec![1.0; shape.num_elements()], shape);
    ternary_quantize(weight, ones, threshold)
}

pub(super) fn ternary_quantize(
    weight: FlexTensor,
    mut scale: FlexTensor,
    threshold: FlexTensor,
) -> FlexTensor {
    if !is_f32(&[&weight, &scale, &threshold]) {
        return Flex::float_mul(ternary::codes::<Flex>(weight, threshold), scale);
    }
    let shape = weight.layout().shape().clone();
    let [_, mut n, mut channels] = shape.dims();
    if *threshold.layout().shape() == shape {
        // A threshold a weight: then a scale a weight, in rows as long as they come.
        scale = Flex::float_expand(scale, shape.clone());
        (n, channels) = (1, if channels == 1 { n } else { channels });
    }
    let (weight, scale, threshold) = (dense(weight), dense(scale), dense(threshold));
    let (weight, scale, threshold) = (values(&weight), values(&scale), values(&threshold));
    let mut output = TensorBuffer::new(weight.len());
    nn::ternary_quantize(&POOL, weight, [n, channels], scale, threshold, &mut output);
    filled(output, shape)
}

pub(super) fn mean_abs(weight: FlexTensor) -> FlexTensor {
    if !is_f32(&[&weight]) {
        return Flex::float_mean_dim(Flex::float_abs(weight), 1);
    }
    let [groups, n, channels] = weight.layout().shape().dims();
    let weight = dense(weight);
    let means = nn::mean_abs(&POOL, values(&weight), [n, channels]);
    tensor(means, Shape::new([groups, 1, channels]))
}

pub(super) fn kth_magnitude(weight: FlexTensor, k: usize) -> FlexTensor {
    if k == 0 || !is_f32(&[&weight]) {
        return scale::kth::<Flex>(weight, k);
    }
    let [groups, n, channels] = weight.layout().shape().dims();
    let weight = dense(weight);
    let weight = values(&weight);
    let mut found = vec![0f32; groups * channels];
    let columns = if n <= FEW { 64 } else { 16 };
    let groups_of = found.par_chunks_mut(channels).zip(weight.par_chunks(n * channels));
    groups_of.for_each(|(found, group)| {
        found.par_chunks_mut(columns).enumerate().for_each_init(Vec::new, |block, (index, found)| {
            let width = found.len();
            let rows = group.chunks_exact(channels).map(|row| &row[index * columns..][..width]);
            match n <= FEW {
                true => kth_of_few(rows, k, block, found),
                false => kth_of_many(rows, k, block, found),
            }
        });
    });
    tensor(found, Shape::new([groups, 1, channels]))
}

/// Magnitudes are ordered as their bits are.
fn magnitude(weight: &f32) -> i32 {
    weight.abs().to_bits() as i32
}

/// Of each column the `k`-th magnitude: each pass brings the least of what is left to the front, of all columns at once.
fn kth_of_few<'a>(rows: impl Iterator<Item = &'a [f32]>, k: usize, block: &mut Vec<i32>, found: &mut [f32]) {
    let width = found.len();
    block.clear();
    rows.for_each(|row| block.extend(row.iter().map(magnitude)));
    for pass in 0..k {
        let (front, rest) = block[pass * width..].split_at_mut(width);
        for row in rest.chunks_exact_mut(width) {
            for (least, other) in front.iter_mut().zip(row) {
                (*least, *other) = ((*least).min(*other), (*least).max(*other));
            }
        }
    }
    for (found, bits) in found.iter_mut().zip(&block[(k - 1) * width..]) {
        *found = f32::from_bits(*bits as u32);
    }
}

/// Of each column the `k`-th magnitude: gathered, then selected.
fn kth_of_many<'a>(
    rows: impl ExactSizeIterator<Item = &'a [f32]>,
    k: usize,
    block: &mut Vec<i32>,
    found: &mut [f32],
) {
    let n = rows.len();
    block.resize(n * found.len(), 0);
    for (index, row) in rows.enumerate() {
        row.iter().enumerate().for_each(|(column, weight)| block[column * n + index] = magnitude(weight));
    }
    for (found, column) in found.iter_mut().zip(block.chunks_exact_mut(n)) {
        *found = f32::from_bits(*column.select_nth_unstable(k - 1).1 as u32);
    }
}

pub(super) fn round_scale(input: FlexTensor) -> FlexTensor {
    if !is_f32(&[&input]) {
        return scale::round::<Flex>(input);
    }
    let shape = input.layout().shape().clone();
    let input = dense(input);
    let rounded = values(&input).iter().map(|&value| to_f16(value)).collect();
    tensor(rounded, shape)
}

pub(super) fn absmax_quantize(input: FlexTensor, levels: f32, scale: RowScale) -> FlexTensor {
    if !is_f32(&[&input]) {
        return absmax::quantize::<Flex>(input, levels, scale);
    }
    let shape = input.layout().shape().clone();
    let d = shape[shape.num_dims() - 1];
    let input = dense(input);
    let input = values(&input);
    let mut output = TensorBuffer::new(input.len());
    let scale = |max: f32| match scale {
        RowScale::F32 => max / levels,
        RowScale::F16 => to_f16(max / levels),
    };
    nn::absmax_quantize(&POOL, input, d, levels, ABSMAX_MIN, scale, &mut output);
    filled(output, shape)
}

/// The nearest normal f16.
fn to_f16(scale: f32) -> f32 {
    f16::from_f32(scale.clamp(scale::SCALE_MIN, scale::SCALE_MAX)).to_f32()
}
