//! Progress without a full-screen display: one line of plain text per log step.

use super::format::{compact, duration, significant};
use super::step_report::StepReport;
use burn::train::{
    LearnerSummary,
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::MetricDefinition,
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining,
    },
};

/// The lines that a run prints, without line feeds and escape codes. What a report does not have is left out, so the
/// columns of a run stay where they are.
pub struct ProgressLine;

impl ProgressLine {
    /// `step  120/700  loss  3.2145  ppl   24.9  acc 0.310  1.23k tok/s  lr 1.9e-2  |g|   0.840  zeros 0.312  eta 1m12s`
    ///
    /// `eta_s`: seconds that the rest of the run should take.
    pub fn train(report: &StepReport, total_steps: usize, eta_s: f64) -> String {
        let mut line = start("step", report, total_steps);
        line += &format!(
            "  {:>5} tok/s  lr {:>6}  |g| {:>7}",
            compact(report.tokens_per_s),
            format!("{:.1e}", report.lr),
            significant(report.grad_norm, 3),
        );
        push(&mut line, "zeros", report.zero_fraction);
        push(&mut line, "lambda", report.lambda.filter(|lambda| *lambda != 1.0));
        if report.skipped_steps > 0 {
            line += &format!("  skipped {}", report.skipped_steps);
        }
        if let Some(wait_s) = report.wait_s {
            line += &format!("  wait {:.0} ms", 1e3 * wait_s);
        }
        line + "  eta " + &duration(eta_s)
    }

    /// `valid 120/700  loss  3.2145  ppl   24.9  acc 0.310  bpb 2.113  zeros 0.312  flipped 0.018  drift 0.024`
    pub fn valid(report: &StepReport, total_steps: usize) -> String {
        let mut line = start("valid", report, total_steps);
        push(&mut line, "bpb", report.bits_per_byte);
        push(&mut line, "zeros", report.zero_fraction);
        push(&mut line, "flipped", report.flipped);
        push(&mut line, "drift", report.scale_drift);
        line
    }

    /// `sample "Once upon a time|, there was a duck"`: the prompt, a bar, and what the model wrote, on one line, as `samples.txt` and
    /// pipes have it. Control characters, which an untrained model writes too, are escaped.
    pub fn sample(prompt: &str, text: &str) -> String {
        let mut line = String::from("sample \"");
        let bar = if prompt.is_empty() { "" } else { "|" };
        for character in [prompt, bar, text].into_iter().flat_map(str::chars) {
            if character.is_control() {
                line.extend(character.escape_default());
            } else {
                line.push(character);
            }
        }
        line + "\""
    }

    /// The same for a terminal: the prompt is dimmed, and the text keeps its lines. Other control characters are replaced.
    pub fn sample_dimmed(prompt: &str, text: &str) -> String {
        let shown =
            |text: &str| text.replace(|c: char| c.is_control() && !matches!(c, '\n' | '\t'), "\u{fffd}");
        format!("sample  \u{1b}[2m{}\u{1b}[0m{}", shown(prompt), shown(text))
    }
}

/// The columns that both splits have.
fn start(name: &str, report: &StepReport, total_steps: usize) -> String {
    let width = total_steps.to_string().len();
    let step = format!("{name:<5} {:>width$}/{total_steps}", report.step);
    if report.tokens == 0 {
        return format!("{step}  {:<35}", "no learned token");
    }
    format!(
        "{step}  loss {:>7.4}  ppl {:>6}  acc {:>5.3}",
        report.loss,
        significant(report.perplexity(), 3),
        report.accuracy,
    )
}

fn push(line: &mut String, name: &str, value: Option<f64>) {
    if let Some(value) = value {
        *line += &format!("  {name} {value:>5.3}");
    }
}

/// A renderer for lines and `--quiet`: it prints nothing, since Burn would have it write a line a batch and a table at the end; the run
/// prints its [`ProgressLine`]s and its summary itself.
pub struct PlainRenderer;

impl MetricsRendererTraining for PlainRenderer {
    fn update_train(&mut self, _state: MetricState) {}
    fn update_valid(&mut self, _state: MetricState) {}
    fn on_train_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl MetricsRendererEvaluation for PlainRenderer {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
    fn on_test_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl TrainingProgressLogger for PlainRenderer {
    fn start(&mut self, _epochs: usize, _first: usize, _items: Option<usize>, _label: Option<&str>) {}
    fn update_epoch(&mut self, _epoch: usize) {}
    fn start_split(&mut self, _split: &str, _items: usize) {}
    fn update_split(&mut self, _items: usize) {}
    fn end_split(&mut self) {}
    fn end(&mut self) {}
    fn log_event_training(&mut self, _event: String) {}
}

impl EvaluationProgressLogger for PlainRenderer {
    fn start_global_progress(&mut self, _tests: usize) {}
    fn start_test(&mut self, _name: &str, _items: usize) {}
    fn update_test_progress(&mut self, _items: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _event: String) {}
}

impl MetricsRenderer for PlainRenderer {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _definition: MetricDefinition) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> StepReport {
        StepReport {
            step: 120,
            tokens: 64,
            loss: 3.2145,
            accuracy: 0.31,
            tokens_per_s: 1234.0,
            lr: 0.019,
            grad_norm: 0.84,
            zero_fraction: Some(0.312),
            ..Default::default()
        }
    }

    #[test]
    fn lines_say_what_a_report_has() {
        assert_eq!(
            ProgressLine::train(&report(), 700, 72.0),
            "step  120/700  loss  3.2145  ppl   24.9  acc 0.310  1.23k tok/s  lr 1.9e-2  |g|   0.840  \
             zeros 0.312  eta 1m12s"
        );
        let more = StepReport { lambda: Some(0.5), skipped_steps: 3, ..report() };
        assert!(
            ProgressLine::train(&more, 700, f64::NAN)
                .ends_with("zeros 0.312  lambda 0.500  skipped 3  eta ?")
        );
        let valid = StepReport {
            bits_per_byte: Some(2.1134),
            flipped: Some(0.018),
            scale_drift: Some(0.0242),
            ..report()
        };
        assert_eq!(
            ProgressLine::valid(&valid, 700),
            "valid 120/700  loss  3.2145  ppl   24.9  acc 0.310  bpb 2.113  zeros 0.312  flipped 0.018  \
             drift 0.024"
        );
    }

    #[test]
    fn a_step_without_a_learned_token_says_so() {
        let empty = StepReport { tokens: 0, loss: f64::NAN, accuracy: f64::NAN, ..report() };
        let (line, usual) =
            (ProgressLine::train(&empty, 700, 72.0), ProgressLine::train(&report(), 700, 72.0));
        assert!(line.starts_with("step  120/700  no learned token  ") && !line.contains("NaN"), "{line}");
        assert_eq!(line.find("tok/s"), usual.find("tok/s"), "{line}\n{usual}");
        assert_eq!(
            ProgressLine::valid(&empty, 700).find("zeros"),
            ProgressLine::valid(&report(), 700).find("zeros")
        );
    }

    #[test]
    fn columns_stay_where_they_are() {
        let expected = ProgressLine::train(&report(), 2000, 0.0);
        let column = |line: &str| ["loss", "ppl", "acc", "lr", "|g|", "zeros"].map(|name| line.find(name));
        for value in [0.0, 0.0123, 0.99996, 9.9996, 12.5, 1.2e-4, f64::NAN, f64::INFINITY] {
            let changed = StepReport {
                step: 9,
                loss: value,
                tokens_per_s: value * 1e3,
                lr: value / 1e3,
                grad_norm: value,
                ..report()
            };
            let line = ProgressLine::train(&changed, 2000, 0.0);
            assert_eq!(column(&line), column(&expected), "{line}\n{expected}");
            let valid = ProgressLine::valid(&changed, 2000);
            assert_eq!(valid.find("acc"), expected.find("acc"), "{valid}\n{expected}");
        }
    }

    #[test]
    fn a_sample_is_one_line_without_control_characters() {
        let line = ProgressLine::sample("Hi,", "\n\x1b[31mduck \"é\u{9b}\"\t");
        assert_eq!(line, "sample \"Hi,|\\n\\u{1b}[31mduck \"é\\u{9b}\"\\t\"");
        assert_eq!(ProgressLine::sample("", "quack"), "sample \"quack\"");
    }

    #[test]
    fn a_sample_on_a_terminal_is_its_text() {
        let shown = ProgressLine::sample_dimmed("Hi,\r", " \"duck\"\n\x1b[31mé\u{9b}");
        assert_eq!(shown, "sample  \u{1b}[2mHi,\u{fffd}\u{1b}[0m \"duck\"\n\u{fffd}[31mé\u{fffd}");
    }
}
