//! Bootstrap confidence intervals over documents.
//!
//! # Source
//! Efron, Bootstrap Methods: Another Look at the Jackknife. Koehn, Statistical Significance Tests for Machine Translation
//! Evaluation, for intervals of the difference of two systems, from the same resamples of both.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use std::ops::AddAssign;

/// How often documents are resampled, and with which random numbers.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap {
    /// Number of resamples. 0: no intervals.
    pub resamples: usize,
    /// Equal seeds and numbers of documents resample the same documents.
    pub seed: u64,
}

impl Bootstrap {
    /// `statistic` of each resample: `n` indices below `n`, drawn with replacement. None of fewer than two documents.
    pub fn resample<T>(&self, n: usize, mut statistic: impl FnMut(&[usize]) -> T) -> Vec<T> {
        if n < 2 {
            return Vec::new();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut indices = vec![0; n];
        let draw = |_| {
            indices
                .iter_mut()
                .for_each(|index| *index = ((rng.next_u64() as u128 * n as u128) >> 64) as usize);
            statistic(&indices)
        };
        (0..self.resamples).map(draw).collect()
    }
}

/// A sum over documents, and the same sum over each resample of them.
#[derive(Clone, Debug)]
pub struct Resampled<T> {
    /// `None` without documents.
    total: Option<T>,
    resamples: Vec<T>,
}

impl<T: Copy + Default + AddAssign> Resampled<T> {
    /// Adds up documents and their resamples.
    pub fn new(documents: &[T], bootstrap: Bootstrap) -> Self {
        let sum = |items: &mut dyn Iterator<Item = T>| {
            let mut sum = T::default();
            items.for_each(|item| sum += item);
            sum
        };
        let resamples = bootstrap
            .resample(documents.len(), |indices| sum(&mut indices.iter().map(|index| documents[*index])));
        Self { total: (!documents.is_empty()).then(|| sum(&mut documents.iter().copied())), resamples }
    }

    /// A number that the sums determine; `None` without documents.
    pub fn estimate(&self, statistic: impl Fn(&T) -> f64) -> Option<Estimate> {
        let value = statistic(self.total.as_ref()?);
        Some(Estimate { value, resamples: self.resamples.iter().map(statistic).collect() })
    }
}

/// A number, and the same number of each resample.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Of all documents.
    pub value: f64,
    /// Empty: there is no interval.
    pub resamples: Vec<f64>,
}

impl Estimate {
    /// The 95 % percentile interval; `None` of fewer than two resamples.
    pub fn interval(&self) -> Option<[f64; 2]> {
        let mut sorted = self.resamples.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1).filter(|last| *last > 0)?;
        // Linear interpolation between two resamples.
        let quantile = |share: f64| {
            let place = share * last as f64;
            let below = sorted[place as usize];
            below + (sorted[(place as usize + 1).min(last)] - below) * place.fract()
        };
        Some([quantile(0.025), quantile(0.975)])
    }

    /// `self - other`, resample by resample, for two models on the same documents with the same [`Bootstrap`].
    pub fn difference(&self, other: &Self) -> Self {
        let resamples = self.resamples.iter().zip(&other.resamples).map(|(own, other)| own - other);
        Self { value: self.value - other.value, resamples: resamples.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(resamples: Vec<f64>) -> Option<[f64; 2]> {
        Estimate { value: 0.0, resamples }.interval()
    }

    #[test]
    fn an_interval_covers_the_mean_in_95_percent_of_trials() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let bootstrap = Bootstrap { resamples: 400, seed: 2 };
        let trials = 300;
        let held = (0..trials).filter(|_| {
            let sample: Vec<f64> = (0..60).map(|_| rng.next_u32() as f64 / u32::MAX as f64).collect();
            let mean = |places: &[usize]| places.iter().map(|i| sample[*i]).sum::<f64>() / 60.0;
            let [low, high] = interval(bootstrap.resample(60, mean)).unwrap();
            low < 0.5 && 0.5 < high
        });
        // 95 % with a standard deviation of 1.3 %.
        let share = held.count() as f64 / trials as f64;
        assert!((0.9..=0.99).contains(&share), "{share}");
    }

    #[test]
    fn equal_seeds_give_equal_resamples_and_one_document_has_none() {
        let draws = |seed, n| {
            Bootstrap { resamples: 5, seed }.resample(n, |places| places.iter().sum::<usize>() as f64)
        };
        assert_eq!(draws(1, 100), draws(1, 100));
        assert_ne!(draws(1, 100), draws(2, 100));
        assert_eq!(interval(draws(1, 1)), None);
        assert_eq!(interval(vec![1.0, 1.0, 1.0]), Some([1.0, 1.0]));
    }
}
