//! The quantizers on flex: one pass over memory each.

use super::{ABSMAX_MIN, QuantizeOps, RowScale, SCALE_MAX, SCALE_MIN, StraightThrough, reference};
use crate::ops::flex::{POOL, dense, from_buffer, from_vec, is_f32, values};
use burn::backend::{Flex, ops::FloatTensorOps, tensor::FloatTensor};
use burn::tensor::Shape;
use half::f16;
use rayon::prelude::*;
use ternary_kernels::{TensorBuffer, nn};

/// Up to this many weights that share a scale are sorted by passes over all columns at once; longer columns are gathered.
const MAX_SORTED_BY_ROWS: usize = 16;

impl QuantizeOps for Flex {
    fn ternary_codes(weight: FloatTensor<Self>, threshold: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&weight, &threshold]) {
            return reference::codes::<Flex>(weight, threshold);
        }
        let shape = threshold.layout().shape().clone();
        let ones = from_vec(vec![1.0; shape.num_elements()], shape);
        Self::ternary_quantize(weight, ones, threshold, StraightThrough::IDENTITY)
    }

    fn ternary_quantize(
        weight: FloatTensor<Self>,
        mut scale: FloatTensor<Self>,
        threshold: FloatTensor<Self>,
        _estimator: StraightThrough,
    ) -> FloatTensor<Self> {
        if !is_f32(&[&weight, &scale, &threshold]) {
            return reference::ternary_quantize::<Flex>(weight, scale, threshold);
        }
        let shape = weight.layout().shape().clone();
        let [_, mut n, mut channels] = shape.dims();
        if *threshold.layout().shape() == shape {
            // One threshold per weight: then also one scale per weight, in rows of any length.
            scale = Flex::float_expand(scale, shape.clone());
            (n, channels) = (1, if channels == 1 { n } else { channels });
        }
        let (weight, scale, threshold) = (dense(weight), dense(scale), dense(threshold));
        let (weight, scale, threshold) = (values(&weight), values(&scale), values(&threshold));
        let mut output = TensorBuffer::new(weight.len());
        nn::ternary_quantize(&POOL, weight, [n, channels], scale, threshold, &mut output);
        from_buffer(output, shape)
    }

    fn mean_abs(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&weight]) {
            return reference::mean_abs::<Flex>(weight);
        }
        let [groups, n, channels] = weight.layout().shape().dims();
        let weight = dense(weight);
        let means = nn::mean_abs(&POOL, values(&weight), [n, channels]);
        from_vec(means, Shape::new([groups, 1, channels]))
    }

    fn kth_magnitude(weight: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        if k == 0 || !is_f32(&[&weight]) {
            return reference::kth_magnitude::<Flex>(weight, k);
        }
        let [groups, n, channels] = weight.layout().shape().dims();
        let weight = dense(weight);
        let weight = values(&weight);
        let mut found = vec![0f32; groups * channels];
        let columns = if n <= MAX_SORTED_BY_ROWS { 64 } else { 16 };
        let groups_of = found.par_chunks_mut(channels).zip(weight.par_chunks(n * channels));
        groups_of.for_each(|(found, group)| {
            found.par_chunks_mut(columns).enumerate().for_each_init(Vec::new, |block, (index, found)| {
                let width = found.len();
                let rows = group.chunks_exact(channels).map(|row| &row[index * columns..][..width]);
                match n <= MAX_SORTED_BY_ROWS {
                    true => kth_by_rows(rows, k, block, found),
                    false => kth_by_columns(rows, k, block, found),
                }
            });
        });
        from_vec(found, Shape::new([groups, 1, channels]))
    }

    fn round_scale(input: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_f32(&[&input]) {
            return reference::round_scale::<Flex>(input);
        }
        let shape = input.layout().shape().clone();
        let input = dense(input);
        let rounded = values(&input).iter().map(|&value| to_f16(value)).collect();
        from_vec(rounded, shape)
    }

    fn absmax_quantize(input: FloatTensor<Self>, levels: f32, scale: RowScale) -> FloatTensor<Self> {
        if !is_f32(&[&input]) {
            return reference::absmax_quantize::<Flex>(input, levels, scale);
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
        from_buffer(output, shape)
    }
}

/// The bits of `|w|`, whose order is that of the magnitudes.
fn magnitude(weight: &f32) -> i32 {
    weight.abs().to_bits() as i32
}

/// The `k`-th magnitude of each column: each pass moves the smallest of the remaining rows to the front, in all columns at once.
fn kth_by_rows<'a>(rows: impl Iterator<Item = &'a [f32]>, k: usize, block: &mut Vec<i32>, found: &mut [f32]) {
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

/// The `k`-th magnitude of each column: gathered, then selected.
fn kth_by_columns<'a>(
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

/// The nearest normal f16.
fn to_f16(scale: f32) -> f32 {
    f16::from_f32(scale.clamp(SCALE_MIN, SCALE_MAX)).to_f32()
}
