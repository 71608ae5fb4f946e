//! Batches: windows of tokens as tensors. Nothing here can fail.

use super::window::{TokenWindows, Window};
use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    tensor::{Device, Int, Tensor, TensorData},
};
use std::{ops::Range, sync::Arc};

/// A micro-batch for training or evaluation; every tensor is `[batch, seq]`.
#[derive(Clone, Debug)]
pub struct LmBatch {
    /// Index of each window's first token in the corpus.
    pub starts: Vec<usize>,
    /// Token ids.
    pub inputs: Tensor<2, Int>,
    /// The id that follows each input.
    pub targets: Tensor<2, Int>,
    /// Loss mask: 1 where the target counts in the loss, otherwise 0.
    pub mask: Tensor<2>,
    /// Number of targets that count in the loss.
    pub tokens: usize,
    /// The batch's share of the target tokens of its optimizer step: the gradient of a step is the weighted sum of
    /// its batches' mean gradients. 1 for a step of one batch, 0 for a batch without target tokens.
    pub weight: f32,
}

/// Makes batches from windows.
#[derive(Clone, Copy, Debug, Default)]
pub struct LmBatcher;

impl LmBatcher {
    /// The batch of `windows`, as the only micro-batch of a step.
    ///
    /// # Shapes
    /// `windows`: `batch` windows of `seq + 1` ids each -> `[batch, seq]`.
    ///
    /// # Panics
    /// No windows, or windows of different lengths.
    pub fn batch(&self, windows: &[Window], device: &Device) -> LmBatch {
        let shape = [windows.len(), windows[0].mask.len()];
        let ids = |first: usize| {
            let ids: Vec<i32> =
                windows.iter().flat_map(|w| &w.ids[first..first + shape[1]]).map(|&id| id as i32).collect();
            Tensor::from_data(TensorData::new(ids, shape), device)
        };
        let mask: Vec<f32> =
            windows.iter().flat_map(|w| &w.mask).map(|&learned| f32::from(u8::from(learned))).collect();
        let tokens = mask.iter().filter(|&&m| m == 1.0).count();
        LmBatch {
            starts: windows.iter().map(|window| window.start).collect(),
            inputs: ids(0),
            targets: ids(1),
            mask: Tensor::from_data(TensorData::new(mask, shape), device),
            tokens,
            weight: if tokens == 0 { 0.0 } else { 1.0 },
        }
    }
}

/// The batches of a run or of an evaluation, by index: micro-batch `k` has the windows from `k * batch_size` on. A run is resumed
/// at item `k` by `slice(k, n)`; nothing is read to get there.
///
/// Items are the micro-batches, or those of one process's share: of the `accumulation` micro-batches of each step, process `r`
/// of `n` has the `r`-th part.
#[derive(Clone)]
pub struct LmLoader {
    windows: TokenWindows,
    /// Total number of windows; the last batch may be smaller.
    total: usize,
    batch_size: usize,
    accumulation: usize,
    /// Which micro-batches of each step are items.
    share: Range<usize>,
    range: Range<usize>,
    device: Device,
}

impl LmLoader {
    /// The `batches` micro-batches of a run; `accumulation` of them make an optimizer step.
    ///
    /// # Panics
    /// `batch_size` or `accumulation` is 0.
    pub fn training(
        windows: TokenWindows,
        batch_size: usize,
        accumulation: usize,
        batches: usize,
        device: &Device,
    ) -> Self {
        assert!(accumulation > 0, "a step has at least one batch");
        let share = 0..accumulation;
        Self { accumulation, share, ..Self::new(windows, batches * batch_size, batch_size, device) }
    }

    /// The share of process `rank` of `size` in each step.
    ///
    /// # Panics
    /// `size` does not divide the micro-batches of a step, or this is a slice.
    pub fn share_of(self, rank: usize, size: usize) -> Self {
        assert_eq!(self.range.start, 0, "a slice is part of a share");
        let range = 0..self.range.end / size;
        Self { share: ternary_parallel::share(self.accumulation, rank, size), range, ..self }
    }

    /// The first `limit` windows (0: all) of an epoch, once.
    ///
    /// # Panics
    /// `batch_size` is 0.
    pub fn evaluation(windows: TokenWindows, batch_size: usize, limit: usize, device: &Device) -> Self {
        let all = windows.per_epoch();
        let total = if limit == 0 { all } else { limit.min(all) };
        Self::new(windows, total, batch_size, device)
    }

    fn new(windows: TokenWindows, total: usize, batch_size: usize, device: &Device) -> Self {
        assert!(batch_size > 0, "a batch has at least one window");
        let range = 0..total.div_ceil(batch_size);
        Self { windows, total, batch_size, accumulation: 1, share: 0..1, range, device: device.clone() }
    }

    /// Item `item`.
    fn batch(&self, item: usize) -> LmBatch {
        let (step, place) = (item / self.share.len(), item % self.share.len());
        let k = step * self.accumulation + self.share.start + place;
        let windows: Vec<Window> = self.indices(k).map(|i| self.windows.get(i)).collect();
        let mut batch = LmBatcher.batch(&windows, &self.device);
        if self.accumulation > 1 && batch.tokens > 0 {
            let first = step * self.accumulation;
            let step_tokens: usize = (first..first + self.accumulation)
                .flat_map(|k| self.indices(k))
                .map(|i| self.windows.target_tokens(i))
                .sum();
            batch.weight = (batch.tokens as f64 / step_tokens as f64) as f32;
        }
        batch
    }

    /// The windows of micro-batch `k`.
    fn indices(&self, k: usize) -> Range<usize> {
        (k * self.batch_size).min(self.total)..((k + 1) * self.batch_size).min(self.total)
    }
}

impl DataLoader<LmBatch> for LmLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<LmBatch> + 'a> {
        Box::new(LmIterator { loader: self, next: self.range.start })
    }

    fn num_items(&self) -> usize {
        self.range.len()
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<LmBatch>> {
        Arc::new(Self { device: device.clone(), ..self.clone() })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<LmBatch>> {
        let end = (self.range.start + end).min(self.range.end);
        let start = (self.range.start + start).min(end);
        Arc::new(Self { range: start..end, ..self.clone() })
    }
}

struct LmIterator<'a> {
    loader: &'a LmLoader,
    next: usize,
}

impl Iterator for LmIterator<'_> {
    type Item = Result<LmBatch, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.loader.range.end {
            return None;
        }
        self.next += 1;
        Some(Ok(self.loader.batch(self.next - 1)))
    }
}

impl DataLoaderIterator<LmBatch> for LmIterator<'_> {
    fn progress(&self) -> Progress {
        let range = &self.loader.range;
        Progress::new(self.next - range.start, range.len(), Some("batches".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{corpus::Document, tokens::tests::byte_tokens};

    /// Dialogues, whose windows have different numbers of targets.
    fn windows(seq_len: usize) -> TokenWindows {
        let dialogues: Vec<_> = (0..40)
            .map(|i| Document::Dialogue { question: "q".repeat(i), answer: format!("{i}").repeat(i % 7) })
            .collect();
        TokenWindows::new(byte_tokens(&dialogues), seq_len, 1).unwrap()
    }

    fn ids(tensor: &Tensor<2, Int>) -> Vec<i64> {
        tensor.to_data().iter::<i64>().collect()
    }

    fn batches(loader: &dyn DataLoader<LmBatch>) -> Vec<LmBatch> {
        loader.iter().map(Result::unwrap).collect()
    }

    fn content(batch: &LmBatch) -> (Vec<i64>, Vec<i64>, Vec<f32>, usize, f32) {
        let mask = batch.mask.to_data().iter::<f32>().collect();
        (ids(&batch.inputs), ids(&batch.targets), mask, batch.tokens, batch.weight)
    }

    #[test]
    fn a_batch_holds_its_windows() {
        let windows = windows(10);
        let parts: Vec<_> = (0..3).map(|i| windows.get(i)).collect();
        let batch = LmBatcher.batch(&parts, &Device::default());
        assert_eq!(batch.inputs.dims(), [3, 10]);
        let (inputs, targets, mask, tokens, weight) = content(&batch);
        for (i, window) in parts.iter().enumerate() {
            for j in 0..10 {
                assert_eq!(inputs[i * 10 + j], i64::from(window.ids[j]));
                assert_eq!(targets[i * 10 + j], i64::from(window.ids[j + 1]));
                assert_eq!(mask[i * 10 + j] == 1.0, window.mask[j]);
            }
        }
        assert_eq!(tokens as f32, mask.iter().sum::<f32>());
        assert_eq!(weight, 1.0);
    }

    #[test]
    fn micro_batches_follow_the_windows_and_progress_counts_them() {
        let windows = windows(10);
        let loader = LmLoader::training(windows.clone(), 3, 1, 50, &Device::default());
        assert_eq!(loader.num_items(), 50);
        let mut iterator = loader.iter();
        for k in 0..50 {
            assert_eq!(iterator.progress().items_processed, k);
            let batch = iterator.next().unwrap().unwrap();
            let expected: Vec<i64> =
                (k * 3..k * 3 + 3).flat_map(|i| windows.get(i).ids[..10].to_vec()).map(i64::from).collect();
            assert_eq!(ids(&batch.inputs), expected);
        }
        assert!(iterator.progress().is_completed() && iterator.next().is_none());
    }

    #[test]
    fn a_slice_goes_on_where_the_run_was() {
        let loader = LmLoader::training(windows(10), 2, 4, 40, &Device::default());
        let all: Vec<_> = batches(&loader).iter().map(content).collect();
        // In the middle of a step, and a slice of a slice.
        let rest = loader.slice(7, 40);
        assert_eq!(rest.num_items(), 33);
        assert_eq!(batches(&*rest).iter().map(content).collect::<Vec<_>>(), all[7..]);
        let part = rest.slice(3, 5).to_device(&Device::default());
        assert_eq!(batches(&*part).iter().map(content).collect::<Vec<_>>(), all[10..12]);
        assert_eq!(loader.slice(40, 99).num_items(), 0);
    }

    #[test]
    fn shares_of_processes_are_the_micro_batches_of_each_step_in_order() {
        let loader = LmLoader::training(windows(10), 2, 6, 24, &Device::default());
        let all: Vec<_> = batches(&loader).iter().map(content).collect();
        for size in [1, 2, 3, 6] {
            let shares: Vec<_> = (0..size).map(|rank| loader.clone().share_of(rank, size)).collect();
            // The run continues after its first step.
            let slices = shares.iter().map(|share| batches(&*share.slice(6 / size, 24 / size)));
            let mut items: Vec<_> = slices.map(|items| items.into_iter()).collect();
            for (step, expected) in all.chunks(6).enumerate().skip(1) {
                let found = items.iter_mut().flat_map(|items| items.take(6 / size)).collect::<Vec<_>>();
                assert_eq!(found.iter().map(content).collect::<Vec<_>>(), expected, "{size}, step {step}");
            }
        }
    }

    #[test]
    fn the_weights_of_a_step_are_shares_of_its_tokens() {
        let loader = LmLoader::training(windows(10), 1, 4, 80, &Device::default());
        let mut uneven = false;
        for step in batches(&loader).chunks(4) {
            let tokens: usize = step.iter().map(|batch| batch.tokens).sum();
            for batch in step {
                let share = if tokens == 0 { 0.0 } else { batch.tokens as f64 / tokens as f64 };
                assert!((f64::from(batch.weight) - share).abs() < 1e-7);
                uneven |= share != 0.25;
            }
        }
        assert!(uneven);
    }

    #[test]
    fn a_step_without_targets_has_no_weight() {
        let document = Document::Dialogue { question: "q".repeat(500), answer: String::new() };
        let windows = TokenWindows::sequential(byte_tokens(&[document]), 16).unwrap();
        for accumulation in [1, 3] {
            let loader = LmLoader::training(windows.clone(), 2, accumulation, 6, &Device::default());
            assert!(batches(&loader).iter().all(|batch| batch.tokens == 0 && batch.weight == 0.0));
        }
    }

    #[test]
    fn an_evaluation_ends_with_the_text_or_its_limit() {
        let windows =
            TokenWindows::sequential(byte_tokens(&[Document::Text("duck ".repeat(30))]), 10).unwrap();
        assert_eq!(windows.per_epoch(), 15);
        for (limit, sizes) in [(0, vec![4, 4, 4, 3]), (6, vec![4, 2]), (99, vec![4, 4, 4, 3])] {
            let loader = LmLoader::evaluation(windows.clone(), 4, limit, &Device::default());
            let batches = batches(&loader);
            assert_eq!(batches.iter().map(|batch| batch.inputs.dims()[0]).collect::<Vec<_>>(), sizes);
            assert!(batches.iter().all(|batch| batch.weight == 1.0));
        }
    }
}
