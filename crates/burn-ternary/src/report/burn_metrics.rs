//! The numbers of a [`StepReport`] as Burn metrics.

use super::{format::significant, step_report::StepReport};
use burn::{
    tensor::{ExecutionError, TensorReadError},
    train::metric::{
        Adaptor, ItemLazy, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
        NumericEntry, SerializedEntry,
    },
};

/// What a step hands to Burn's metrics. The numbers are on the host already, so there is nothing to wait for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LmItem(pub StepReport);

impl ItemLazy for LmItem {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

impl Adaptor<StepReport> for LmItem {
    fn adapt(&self) -> StepReport {
        self.0
    }
}

/// How the values of an epoch become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aggregate {
    /// Mean weighted by tokens.
    Mean,
    /// The last value, for what describes the model or the process rather than a batch.
    Latest,
}

/// One number of a [`StepReport`] as a Burn metric.
///
/// `read` gives the quantity that is averaged and `show` turns it, or its average, into the number that people see:
/// perplexity averages the loss and shows `exp`; tokens per second averages seconds per token and shows `1 / x`.
/// A value that is missing or not finite shows as such and leaves the average alone.
#[derive(Clone)]
pub struct ReportMetric {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    aggregate: Aggregate,
    validates: bool,
    read: fn(&StepReport) -> Option<f64>,
    show: fn(f64) -> f64,
    current: Option<f64>,
    current_tokens: usize,
    sum: f64,
    weight: usize,
}

impl ReportMetric {
    fn mean(name: &str, read: fn(&StepReport) -> Option<f64>) -> Self {
        Self {
            name: MetricName::new(name.into()),
            unit: None,
            higher_is_better: false,
            aggregate: Aggregate::Mean,
            validates: true,
            read,
            show: |value| value,
            current: None,
            current_tokens: 0,
            sum: 0.0,
            weight: 0,
        }
    }

    fn latest(name: &str, read: fn(&StepReport) -> Option<f64>) -> Self {
        Self { aggregate: Aggregate::Latest, ..Self::mean(name, read) }
    }

    fn unit(self, unit: &'static str) -> Self {
        Self { unit: Some(unit), ..self }
    }

    fn show(self, show: fn(f64) -> f64) -> Self {
        Self { show, ..self }
    }

    fn higher_is_better(self) -> Self {
        Self { higher_is_better: true, ..self }
    }

    /// Of training steps only.
    fn of_training(self) -> Self {
        Self { validates: false, ..self }
    }

    /// Whether a validation has this number.
    pub fn validates(&self) -> bool {
        self.validates
    }

    /// The value of the last report, finite or not.
    fn batch(&self) -> Option<f64> {
        self.current.map(self.show)
    }

    /// The value of the epoch so far.
    fn epoch(&self) -> Option<f64> {
        (self.weight > 0).then(|| (self.show)(self.sum / self.weight as f64))
    }

    fn entry(&self, serialized: Option<NumericEntry>) -> SerializedEntry {
        let unit = self.unit.map(|unit| format!(" {unit}")).unwrap_or_default();
        let text = |value: Option<f64>| match value {
            Some(value) => significant(value, 4) + &unit,
            None => SerializedEntry::NOT_AVAILABLE.into(),
        };
        SerializedEntry::new(
            format!("epoch {} - batch {}", text(self.epoch()), text(self.batch())),
            serialized.map_or(SerializedEntry::NOT_AVAILABLE.into(), |entry| entry.serialize()),
        )
    }
}

impl Metric for ReportMetric {
    type Input = StepReport;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        let unit = self.unit.map(String::from);
        NumericAttributes { unit, higher_is_better: self.higher_is_better }.into()
    }

    fn update(
        &mut self,
        report: &StepReport,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        self.current = (self.read)(report);
        self.current_tokens = report.tokens;
        if let Some(value) = self.current.filter(|value| value.is_finite()) {
            match self.aggregate {
                Aggregate::Mean => {
                    self.sum += value * report.tokens as f64;
                    self.weight += report.tokens;
                }
                Aggregate::Latest => (self.sum, self.weight) = (value, 1),
            }
        }
        Ok(self.entry(self.value()))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.entry(self.epoch().map(NumericEntry::Final)))
    }

    fn clear(&mut self) {
        (self.current, self.current_tokens, self.sum, self.weight) = (None, 0, 0.0, 0);
    }
}

impl Numeric for ReportMetric {
    fn value(&self) -> Option<NumericEntry> {
        let aggregated_value = self.batch().filter(|value| value.is_finite())?;
        Some(NumericEntry::Aggregated { aggregated_value, count: self.current_tokens })
    }

    fn running_value(&self) -> Option<NumericEntry> {
        let aggregated_value = self.epoch().filter(|value| value.is_finite())?;
        Some(NumericEntry::Aggregated { aggregated_value, count: self.weight })
    }

    fn final_value(&self) -> NumericEntry {
        NumericEntry::Final(self.epoch().unwrap_or(f64::NAN))
    }
}

/// Every metric of a run, in the order in which a dashboard shows them.
pub fn all() -> Vec<ReportMetric> {
    vec![
        ReportMetric::mean("Loss", |r| Some(r.loss)).unit("nats per token"),
        ReportMetric::mean("Perplexity", |r| Some(r.loss)).show(f64::exp),
        ReportMetric::mean("Bits per byte", |r| r.bits_per_byte).unit("bits"),
        ReportMetric::mean("Accuracy", |r| Some(r.accuracy)).higher_is_better(),
        ReportMetric::mean("Tokens per second", |r| Some(r.tokens_per_s.recip()))
            .show(f64::recip)
            .unit("tok/s")
            .higher_is_better()
            .of_training(),
        ReportMetric::latest("Learning rate", |r| Some(r.lr)).of_training(),
        ReportMetric::mean("Gradient norm", |r| Some(r.grad_norm)).of_training(),
        ReportMetric::latest("Zero fraction", |r| r.zero_fraction).higher_is_better(),
        ReportMetric::latest("Bits per weight", |r| r.bits_per_weight).unit("bits"),
        ReportMetric::latest("Compression ratio", |r| r.compression).unit("x").higher_is_better(),
        ReportMetric::latest("Flipped codes", |r| r.flipped),
        ReportMetric::latest("Scale drift", |r| r.scale_drift),
        ReportMetric::latest("Peak memory", |r| Some(r.peak_rss_bytes? as f64 / (1 << 20) as f64))
            .unit("MiB"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::data::dataloader::Progress;
    use rand::Rng;

    fn metadata() -> MetricMetadata {
        MetricMetadata { progress: Progress::new(1, 1, None), iteration: None, lr: None }
    }

    fn metric(name: &str) -> ReportMetric {
        all().into_iter().find(|metric| metric.name.as_str() == name).unwrap()
    }

    fn update(metric: &mut ReportMetric, report: StepReport) -> SerializedEntry {
        metric.update(&LmItem(report).sync().unwrap().adapt(), &metadata()).unwrap()
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs(), "{found} is not {expected}");
    }

    /// Random reports with unequal weights.
    fn reports() -> Vec<StepReport> {
        let mut rng = rand::rng();
        (0..50)
            .map(|_| StepReport {
                tokens: rng.random_range(1..5000),
                loss: rng.random_range(0.5..9.0),
                accuracy: rng.random(),
                tokens_per_s: rng.random_range(10.0..1e5),
                lr: rng.random(),
                ..Default::default()
            })
            .collect()
    }

    #[test]
    fn perplexity_is_the_exponential_of_the_mean_loss() {
        let reports = reports();
        let mut perplexity = metric("Perplexity");
        let (mut nats, mut tokens) = (0.0, 0);
        for report in &reports {
            update(&mut perplexity, *report);
            nats += report.loss * report.tokens as f64;
            tokens += report.tokens;
            close(perplexity.value().unwrap().current(), report.perplexity());
            close(perplexity.running_value().unwrap().current(), (nats / tokens as f64).exp());
        }
        close(perplexity.final_value().current(), (nats / tokens as f64).exp());
        let mean = reports.iter().map(|r| r.perplexity() * r.tokens as f64).sum::<f64>();
        assert!(perplexity.final_value().current() < 0.99 * mean / tokens as f64);
    }

    #[test]
    fn averages_are_weighted_by_tokens() {
        let reports = reports();
        let tokens: f64 = reports.iter().map(|r| r.tokens as f64).sum();
        let mut accuracy = metric("Accuracy");
        let mut speed = metric("Tokens per second");
        let mut lr = metric("Learning rate");
        for report in &reports {
            for metric in [&mut accuracy, &mut speed, &mut lr] {
                update(metric, *report);
            }
        }
        let right: f64 = reports.iter().map(|r| r.accuracy * r.tokens as f64).sum();
        close(accuracy.final_value().current(), right / tokens);
        let seconds: f64 = reports.iter().map(|r| r.tokens as f64 / r.tokens_per_s).sum();
        close(speed.final_value().current(), tokens / seconds);
        close(lr.final_value().current(), reports.last().unwrap().lr);
        accuracy.clear();
        assert!(accuracy.running_value().is_none(), "an epoch starts empty");
    }

    #[test]
    fn what_is_missing_shows_as_not_available() {
        let mut zeros = metric("Zero fraction");
        let entry = update(&mut zeros, StepReport::default());
        assert!(entry.is_not_available());
        assert_eq!(entry.formatted, "epoch N/A - batch N/A");
        assert!(zeros.value().is_none() && zeros.running_value().is_none());
        update(&mut zeros, StepReport { zero_fraction: Some(0.25), ..Default::default() });
        let entry = update(&mut zeros, StepReport::default());
        assert_eq!(entry.formatted, "epoch 0.2500 - batch N/A");
    }

    #[test]
    fn non_finite_values_are_shown_but_not_averaged() {
        let mut loss = metric("Loss");
        update(&mut loss, StepReport { loss: 2.0, tokens: 8, ..Default::default() });
        let entry = update(&mut loss, StepReport { loss: f64::NAN, tokens: 8, ..Default::default() });
        assert_eq!(entry.formatted, "epoch 2.000 nats per token - batch NaN nats per token");
        assert!(loss.value().is_none());
        assert_eq!(loss.final_value().current(), 2.0);
    }

    #[test]
    fn every_metric_has_its_own_name_and_reads_a_full_report() {
        let report = StepReport {
            tokens: 1,
            loss: 1.0,
            bits_per_byte: Some(2.0),
            accuracy: 3.0,
            tokens_per_s: 4.0,
            lr: 5.0,
            grad_norm: 6.0,
            zero_fraction: Some(7.0),
            bits_per_weight: Some(8.0),
            compression: Some(9.0),
            flipped: Some(10.0),
            scale_drift: Some(11.0),
            peak_rss_bytes: Some(12 << 20),
            ..Default::default()
        };
        let mut values: Vec<f64> = Vec::new();
        let mut names = std::collections::HashSet::new();
        for mut metric in all() {
            update(&mut metric, report);
            values.push(metric.value().unwrap().current());
            assert!(names.insert(metric.name()));
        }
        let expected = [1., 1f64.exp(), 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12.];
        assert_eq!(values, expected);
    }
}
