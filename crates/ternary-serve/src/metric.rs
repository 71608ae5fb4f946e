//! [`Metric`]: counters and histograms, in the text format of Prometheus.

use std::{
    fmt::{Display, Write},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Upper bounds of the histogram buckets, in seconds.
const BUCKET_BOUNDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];

/// Metrics of the server.
#[derive(Debug, Default)]
pub struct Metric {
    /// Number of responses by route and status.
    responses: Mutex<Vec<(&'static str, u16, u64)>>,
}

/// Metrics of a model.
#[derive(Debug, Default)]
pub struct ModelMetric {
    prompt_tokens: AtomicU64,
    reused_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    steps: AtomicU64,
    step_completions: AtomicU64,
    abandoned: AtomicU64,
    first_token: Histogram,
    duration: Histogram,
}

#[derive(Debug, Default)]
struct Histogram {
    counts: [AtomicU64; BUCKET_BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

impl Metric {
    pub fn response(&self, route: &'static str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        match responses.iter_mut().find(|response| (response.0, response.1) == (route, status)) {
            Some((_, _, count)) => *count += 1,
            None => responses.push((route, status, 1)),
        }
    }

    /// All metrics. `models`: name, metrics, and numbers of active and of queued completions.
    pub fn render<'a>(
        &self,
        models: impl Iterator<Item = (&'a str, &'a ModelMetric, (usize, usize))>,
    ) -> String {
        let mut page = Page(String::new());
        let responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        page.head("duck_http_responses_total", "counter", "Responses by route and status.");
        for (route, status, count) in responses {
            let labels = format!("route=\"{route}\",status=\"{status}\"");
            page.line("duck_http_responses_total", &labels, count);
        }
        let models: Vec<_> = models
            .map(|(name, metric, load)| (format!("model=\"{}\"", escaped(name)), metric, load))
            .collect();
        type Counter = fn(&ModelMetric) -> &AtomicU64;
        let counters: [(&str, &str, Counter); 6] = [
            ("duck_prompt_tokens_total", "Tokens of prompts.", |m| &m.prompt_tokens),
            ("duck_prompt_reused_tokens_total", "Tokens of prompts found in the prefix cache.", |m| {
                &m.reused_tokens
            }),
            ("duck_generated_tokens_total", "Tokens generated.", |m| &m.generated_tokens),
            ("duck_steps_total", "Decode steps.", |m| &m.steps),
            ("duck_step_texts_total", "Completions in these steps.", |m| &m.step_completions),
            ("duck_abandoned_total", "Requests whose client disconnected.", |m| &m.abandoned),
        ];
        for (name, help, counter) in counters {
            page.head(name, "counter", help);
            models
                .iter()
                .for_each(|(labels, metric, _)| page.line(name, labels, counter(metric).load(Relaxed)));
        }
        page.head("duck_running", "gauge", "Active completions.");
        models.iter().for_each(|(labels, _, load)| page.line("duck_running", labels, load.0));
        page.head("duck_waiting", "gauge", "Queued completions.");
        models.iter().for_each(|(labels, _, load)| page.line("duck_waiting", labels, load.1));
        type Times = fn(&ModelMetric) -> &Histogram;
        let histograms: [(&str, &str, Times); 2] = [
            ("duck_first_token_seconds", "Time to first token.", |m| &m.first_token),
            ("duck_request_seconds", "Duration of requests.", |m| &m.duration),
        ];
        for (name, help, histogram) in histograms {
            page.head(name, "histogram", help);
            models.iter().for_each(|(labels, metric, _)| page.histogram(name, labels, histogram(metric)));
        }
        page.0
    }
}

impl ModelMetric {
    pub fn prompt(&self, tokens: usize) {
        self.prompt_tokens.fetch_add(tokens as u64, Relaxed);
    }

    pub fn reused(&self, tokens: usize) {
        self.reused_tokens.fetch_add(tokens as u64, Relaxed);
    }

    pub fn generated(&self, tokens: usize) {
        self.generated_tokens.fetch_add(tokens as u64, Relaxed);
    }

    /// A decode step of this many completions.
    pub fn step(&self, completions: usize) {
        if completions > 0 {
            self.steps.fetch_add(1, Relaxed);
            self.step_completions.fetch_add(completions as u64, Relaxed);
        }
    }

    pub fn first_token(&self, after: Duration) {
        self.first_token.add(after);
    }

    /// A request has ended.
    pub fn finished(&self, after: Duration, abandoned: bool) {
        self.duration.add(after);
        self.abandoned.fetch_add(abandoned.into(), Relaxed);
    }
}

impl Histogram {
    fn add(&self, time: Duration) {
        let bucket = BUCKET_BOUNDS
            .iter()
            .position(|bound| time.as_secs_f64() <= *bound)
            .unwrap_or(BUCKET_BOUNDS.len());
        self.counts[bucket].fetch_add(1, Relaxed);
        self.microseconds.fetch_add(time.as_micros() as u64, Relaxed);
    }
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}")
            .expect("writing to a string never fails");
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        writeln!(self.0, "{name}{{{labels}}} {value}").expect("writing to a string never fails");
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let mut sum = 0;
        let bounds = BUCKET_BOUNDS.iter().map(f64::to_string).chain(["+Inf".into()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            sum += count.load(Relaxed);
            self.line(&format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), sum);
        }
        let seconds = histogram.microseconds.load(Relaxed) as f64 / 1e6;
        self.line(&format!("{name}_sum"), labels, seconds);
        self.line(&format!("{name}_count"), labels, sum);
    }
}

/// A label value, escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_names_are_escaped() {
        let model = ModelMetric::default();
        for seconds in [0.001, 0.3, 0.3, 1000.0] {
            model.first_token(Duration::from_secs_f64(seconds));
        }
        let metric = Metric::default();
        metric.response("/health", 200);
        metric.response("/health", 200);
        let page = metric.render([("a\"\\\n", &model, (1, 2))].into_iter());
        let label = r#"model="a\"\\\n""#;
        for line in [
            "duck_http_responses_total{route=\"/health\",status=\"200\"} 2".to_string(),
            format!("duck_first_token_seconds_bucket{{{label},le=\"0.005\"}} 1"),
            format!("duck_first_token_seconds_bucket{{{label},le=\"0.5\"}} 3"),
            format!("duck_first_token_seconds_bucket{{{label},le=\"+Inf\"}} 4"),
            format!("duck_first_token_seconds_count{{{label}}} 4"),
            format!("duck_waiting{{{label}}} 2"),
        ] {
            assert!(page.lines().any(|found| found == line), "no {line} in\n{page}");
        }
    }
}
