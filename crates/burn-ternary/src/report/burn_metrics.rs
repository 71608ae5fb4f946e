//! What is measured: one [`StepReport`] a log step or evaluation, and the Burn metrics that read it.

use super::result::real;
use burn::{
    tensor::{ExecutionError, TensorReadError},
    train::metric::{
        Adaptor, ItemLazy, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
        NumericEntry, SerializedEntry,
    },
};
use serde::{Deserialize, Serialize};

/// Which text a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    Train,
    Valid,
}

/// The state of a run at one step, in plain numbers. A number that may be missing is an `Option`; one that is not
/// finite stays so, in memory and in JSON (as the string `NaN`, `inf` or `-inf`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Optimizer steps done.
    pub step: usize,
    /// Passes over the training text.
    #[serde(with = "real")]
    pub epoch: f64,
    /// Learned tokens that `loss` and `accuracy` are means over: the weight of this report in an average. Where there
    /// is none, both are NaN.
    pub tokens: usize,
    /// Cross entropy in nats a token, regularizers left out.
    #[serde(with = "real")]
    pub loss: f64,
    /// Mean squared log partition function.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub z_loss: Option<f64>,
    /// Divergence from the teacher, in nats a token.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// Mean squared distance of normalized hidden states from the teacher's.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<f64>,
    /// Divergence of the relations between positions from the teacher's, in nats a position.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub relation: Option<f64>,
    /// Cross entropy in bits a byte of text, which does not depend on the tokenizer.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Share of target tokens whose logit is the largest, in [0, 1].
    #[serde(with = "real")]
    pub accuracy: f64,
    #[serde(with = "real")]
    pub tokens_per_s: f64,
    #[serde(with = "real")]
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(with = "real")]
    pub grad_norm: f64,
    /// Share of ternary codes that are 0.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub zero_fraction: Option<f64>,
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// FP32 bytes over packed bytes of the whole model.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<f64>,
    /// Share of the ternary weight in the forward pass: 0 is float, 1 is ternary.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Share of codes that changed since the last evaluation.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub flipped: Option<f64>,
    /// `mean |ln(scale now / scale at start)|`.
    #[serde(with = "real::option", default, skip_serializing_if = "Option::is_none")]
    pub scale_drift: Option<f64>,
    /// Largest resident set of the process so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Steps that the spike guard has skipped so far.
    pub skipped_steps: usize,
    /// Seconds since the run began, those before a resume included.
    #[serde(with = "real")]
    pub elapsed_s: f64,
}

impl StepReport {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

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

/// `value` with so many significant digits, in scientific notation outside [1e-3, 1e6).
pub(crate) fn significant(value: f64, digits: usize) -> String {
    // The exponent is that of the rounded number: 0.9996 in three digits is 1.00.
    let scientific = format!("{value:.*e}", digits - 1);
    let exponent = scientific.split_once('e').and_then(|(_, text)| text.parse().ok());
    match exponent {
        Some(exponent @ -3..6) => {
            let decimals = (digits as i32 - 1 - exponent).max(0) as usize;
            format!("{value:.decimals$}")
        }
        _ => scientific,
    }
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
    fn what_is_not_finite_shows_and_leaves_the_average_alone() {
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

    #[test]
    fn numbers_have_so_many_digits() {
        for (value, text) in [
            (0.0, "0.000"),
            (3.21449, "3.214"),
            (-24.9, "-24.90"),
            (0.99996, "1.000"),
            (999_999.6, "1.000e6"),
            (123456.0, "123456"),
            (1.5e6, "1.500e6"),
            (0.00123456, "0.001235"),
            (1.9e-5, "1.900e-5"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(significant(value, 4), text);
        }
    }
}
