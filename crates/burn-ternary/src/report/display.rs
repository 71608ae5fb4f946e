//! The full-screen display of a run: progress, the curve of a metric, the last text samples, and the keys.

use super::format::{duration, significant};
use burn::train::{
    LearnerSummary,
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::{MetricAttributes, MetricDefinition, MetricId, NumericEntry},
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining,
    },
};
use ratatui::{
    Frame,
    crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Style, Stylize},
    symbols::Marker,
    text::{Line, Span},
    widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Wrap},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Points of a training curve. Each is the mean over an equal part of the run, so that the noise of single batches neither hides the
/// validation points nor fills the memory of a long run.
const PARTS: usize = 128;
/// No time left is estimated from less.
const LEAST: Duration = Duration::from_secs(3);
const TRAIN: Color = Color::LightBlue;
const VALID: Color = Color::LightYellow;

/// The action of a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum KeyAction {
    /// Stop after the current step, with a checkpoint.
    Stop,
    /// End the process at once, without one.
    Kill,
}

/// A display, shared by the run, Burn's events and the thread that draws.
#[derive(Clone)]
pub(crate) struct Display(Arc<Mutex<Picture>>);

impl Display {
    /// The display of a run of `steps` optimizer steps, each of which is a part of an epoch.
    pub fn new(run: String, steps: usize, epochs_per_step: f64) -> Self {
        let picture = Picture { run, steps, epochs_per_step, ..Picture::default() };
        Self(Arc::new(Mutex::new(picture)))
    }

    /// This display as the renderer of Burn's metrics.
    pub fn renderer(&self) -> Box<dyn MetricsRenderer> {
        Box::new(self.clone())
    }

    /// Shows the text samples of a step: pairs of a prompt and its continuation.
    pub fn sampled(&self, step: usize, samples: &[(String, String)]) {
        let mut picture = self.picture();
        picture.sampled = step;
        picture.samples = samples.to_vec();
    }

    /// Shows that the run returned to its last checkpoint after `step`, for the `number`th time.
    pub fn rolled_back(&self, number: usize, step: usize) {
        self.picture().rollback = Some((number, step));
    }

    /// Whether Ctrl-C is a signal, a second one of which ends the process. Otherwise it is a key.
    pub fn set_interrupts(&self, interrupts: bool) {
        self.picture().interrupts = interrupts;
    }

    pub fn draw(&self, frame: &mut Frame, stopping: bool) {
        self.picture().draw(frame, stopping);
    }

    pub fn key(&self, key: KeyEvent) -> Option<KeyAction> {
        self.picture().key(key)
    }

    fn picture(&self) -> MutexGuard<'_, Picture> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Picture {
    run: String,
    steps: usize,
    epochs_per_step: f64,
    /// Steps done.
    step: usize,
    /// When the first step of this session began, and the steps done before it.
    began: Option<(Instant, usize)>,
    /// Validation batches done and all, while the model is validated.
    validating: Option<(usize, usize)>,
    curves: Vec<Curve>,
    selected: usize,
    /// Curves and their values at the step that is reported next.
    reported: Vec<(usize, f64)>,
    sampled: usize,
    samples: Vec<(String, String)>,
    /// Number and step of the last rollback of this session.
    rollback: Option<(usize, usize)>,
    /// Whether Ctrl-C is a signal.
    interrupts: bool,
    /// Whether `q` was pressed, and how to stop is not yet answered.
    asks: bool,
}

/// The values of a metric over a run.
struct Curve {
    id: MetricId,
    title: String,
    /// Sum and number of the training values, for each part of the run.
    train: Vec<(f64, usize)>,
    latest: Option<f64>,
    /// Step and value of each validation.
    valid: Vec<(f64, f64)>,
}

impl Curve {
    fn new(definition: MetricDefinition) -> Self {
        let unit = match definition.attributes {
            MetricAttributes::Numeric(attributes) => attributes.unit,
            MetricAttributes::None => None,
        };
        let unit = unit.map(|unit| format!(", {unit}")).unwrap_or_default();
        Self {
            id: definition.metric_id,
            title: format!("{}{unit}", definition.name),
            train: vec![(0.0, 0); PARTS],
            latest: None,
            valid: Vec::new(),
        }
    }

    fn trained(&mut self, step: usize, steps: usize, value: f64) {
        let (sum, number) = &mut self.train[(step * PARTS / steps.max(1)).min(PARTS - 1)];
        *sum += value;
        *number += 1;
        self.latest = Some(*sum / *number as f64);
    }

    /// Step and mean of every part that has a value.
    fn means(&self, steps: usize) -> Vec<(f64, f64)> {
        let width = steps as f64 / PARTS as f64;
        let parts = self.train.iter().enumerate().filter(|(_, (_, number))| *number > 0);
        parts.map(|(part, (sum, number))| ((part as f64 + 0.5) * width, sum / *number as f64)).collect()
    }

    fn draw(&self, frame: &mut Frame, area: Rect, steps: usize) {
        let means = self.means(steps);
        let shown = |value: Option<f64>| value.map_or("-".into(), |value| significant(value, 4));
        let mut title = vec![
            Span::from(format!(" {} ", self.title)).bold(),
            Span::styled(format!(" ── training {} ", shown(self.latest)), TRAIN),
        ];
        if let Some((_, value)) = self.valid.last() {
            title.push(Span::styled(format!(" • validation {} ", shown(Some(*value))), VALID));
        }
        let values = means.iter().chain(&self.valid).map(|(_, value)| *value);
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(y), high.max(y)));
        let block = Block::bordered().title(Line::from(title));
        if low > high {
            frame.render_widget(Paragraph::new("no value yet").centered().block(block), area);
            return;
        }
        let room = (0.05 * (high - low)).max(1e-3 * high.abs()).max(1e-9);
        let (low, high) = (low - room, high + room);
        let at = |share: f64| significant(low + share * (high - low), 3);
        let line = |data, marker, graph, color| {
            let style = Style::default().fg(color);
            Dataset::default().marker(marker).graph_type(graph).style(style).data(data)
        };
        let chart = Chart::new(vec![
            line(&means[..], Marker::Braille, GraphType::Line, TRAIN),
            line(&self.valid, Marker::Dot, GraphType::Scatter, VALID),
        ]);
        let axis = |bounds, labels: [String; 3]| {
            Axis::default().bounds(bounds).labels(labels).style(Style::default().fg(Color::DarkGray))
        };
        let chart = chart
            .x_axis(axis([0.0, steps as f64], ["0".into(), (steps / 2).to_string(), format!("step {steps}")]))
            .y_axis(axis([low, high], [at(0.0), at(0.5), at(1.0)]))
            .legend_position(None);
        frame.render_widget(chart.block(block), area);
    }
}

impl Picture {
    fn draw(&self, frame: &mut Frame, stopping: bool) {
        /// Rows for a sample, and the two of the border.
        const SAMPLE: u16 = 2;
        const BORDER: u16 = 2;
        let most = (frame.area().height / 3).saturating_sub(BORDER) / SAMPLE;
        let count = (self.samples.len() as u16).min(most);
        let samples = if count == 0 { 0 } else { BORDER + SAMPLE * count };
        let rows = [
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Min(0),
            Constraint::Length(samples),
            Constraint::Length(1),
        ];
        let [head, bar, plot, texts, keys] = Layout::vertical(rows).areas(frame.area());
        self.draw_progress(frame, head, bar);
        if let Some(curve) = self.curves.get(self.selected) {
            curve.draw(frame, plot, self.steps);
        }
        let block = Block::bordered().title(format!(" Samples of step {} ", self.sampled).bold());
        let inner = block.inner(texts);
        frame.render_widget(block, texts);
        let places = Layout::vertical(vec![Constraint::Length(SAMPLE); count.into()]).split(inner);
        for ((prompt, text), place) in self.samples.iter().zip(places.iter()) {
            let one_line = |text: &str| text.replace('\n', "↵");
            let line = Line::from(vec![Span::from(one_line(prompt)).dim(), one_line(text).into()]);
            frame.render_widget(Paragraph::new(line).wrap(Wrap { trim: false }), *place);
        }
        frame.render_widget(Paragraph::new(self.keys(stopping)), keys);
    }

    fn draw_progress(&self, frame: &mut Frame, head: Rect, bar: Rect) {
        let epochs = |steps: usize| format!("{:.1}", steps as f64 * self.epochs_per_step);
        let Self { run, step, steps, .. } = self;
        let rollback = self.rollback.map(|(number, step)| format!("  rollback {number} after step {step} "));
        let progress = format!(
            " {run}   step {step} of {steps}   epoch {} of {} {}",
            epochs(*step),
            epochs(*steps),
            rollback.unwrap_or_default()
        );
        let now = match (self.validating, self.seconds_left()) {
            (Some((done, all)), _) => format!("validating, batch {done} of {all} "),
            (None, Some(seconds)) => format!("about {} left ", duration(seconds)),
            (None, None) => String::new(),
        };
        let [left, right] =
            Layout::horizontal([Constraint::Min(0), Constraint::Length(now.len() as u16)]).areas(head);
        frame.render_widget(Paragraph::new(progress.bold()), left);
        frame.render_widget(Paragraph::new(now).alignment(Alignment::Right), right);
        let percent = 100 * (*step).min(*steps) / (*steps).max(1);
        let done = (*step).min(*steps) as f64 / (*steps).max(1) as f64;
        let gauge = Gauge::default().gauge_style(Style::default().fg(TRAIN).bg(Color::Black));
        frame.render_widget(gauge.ratio(done).label(format!("{percent} %")), bar);
    }

    /// As many as the steps of this session took, validations and checkpoints included.
    fn seconds_left(&self) -> Option<f64> {
        let (began, before) = self.began?;
        let (took, done) = (began.elapsed(), self.step.saturating_sub(before));
        let left = self.steps.saturating_sub(self.step);
        (took > LEAST && done > 0).then(|| took.as_secs_f64() / done as f64 * left as f64)
    }

    /// What keys do.
    fn keys(&self, stopping: bool) -> Line<'static> {
        let keys: &[(&str, &str)] = match (stopping, self.asks) {
            (true, _) if self.interrupts => {
                &[("", "stopping after this step, with a checkpoint; "), ("Ctrl-C", "stops at once")]
            }
            (true, _) => &[("", "stopping after this step, with a checkpoint")],
            (false, true) => &[
                ("s", "stop, with a checkpoint  "),
                ("k", "stop at once, without a checkpoint  "),
                ("c", "go on"),
            ],
            (false, false) => {
                &[("← →", "another metric  "), ("q", "quit  "), ("Ctrl-C", "stop, with a checkpoint")]
            }
        };
        let spans =
            keys.iter().flat_map(|(key, what)| [Span::from(format!(" {key} ")).bold(), (*what).into()]);
        spans.collect()
    }

    fn key(&mut self, key: KeyEvent) -> Option<KeyAction> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        let count = self.curves.len().max(1);
        match key.code {
            KeyCode::Right => self.selected = (self.selected + 1) % count,
            KeyCode::Left => self.selected = (self.selected + count - 1) % count,
            // Where it is no signal.
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return Some(KeyAction::Stop);
            }
            KeyCode::Char('q') => self.asks = true,
            KeyCode::Char('k') if self.asks => return Some(KeyAction::Kill),
            KeyCode::Char('s') if self.asks => {
                self.asks = false;
                return Some(KeyAction::Stop);
            }
            KeyCode::Char('c') | KeyCode::Esc => self.asks = false,
            _ => (),
        }
        None
    }

    fn curve(&self, id: &MetricId) -> Option<usize> {
        self.curves.iter().position(|curve| curve.id == *id)
    }
}

impl MetricsRendererTraining for Display {
    fn update_train(&mut self, state: MetricState) {
        let mut picture = self.picture();
        if let MetricState::Numeric(entry, Some(value)) = state
            && !matches!(value, NumericEntry::Final(_))
            // A step without learned tokens has no loss, and a bad one an infinite gradient.
            && value.current().is_finite()
            && let Some(curve) = picture.curve(&entry.metric_id)
        {
            picture.reported.push((curve, value.current()));
        }
    }

    /// A validation is one point: the mean over its batches.
    fn update_valid(&mut self, state: MetricState) {
        let mut picture = self.picture();
        if let MetricState::Numeric(entry, Some(NumericEntry::Final(value))) = state
            && value.is_finite()
            && let Some(curve) = picture.curve(&entry.metric_id)
        {
            let step = picture.step as f64;
            picture.curves[curve].valid.push((step, value));
        }
    }

    fn on_train_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl TrainingProgressLogger for Display {
    fn start_split(&mut self, split: &str, items: usize) {
        let mut picture = self.picture();
        if split == "valid" {
            picture.validating = Some((0, items));
        } else if picture.began.is_none() {
            picture.began = Some((Instant::now(), picture.step));
        }
    }

    /// In training, `items` are the steps of the run.
    fn update_split(&mut self, items: usize) {
        let mut picture = self.picture();
        if let Some((done, _)) = &mut picture.validating {
            *done = items;
            return;
        }
        picture.step = items;
        let steps = picture.steps;
        for (curve, value) in std::mem::take(&mut picture.reported) {
            picture.curves[curve].trained(items, steps, value);
        }
    }

    fn end_split(&mut self) {
        self.picture().validating = None;
    }

    fn start(&mut self, _epochs: usize, _first: usize, _items: Option<usize>, _label: Option<&str>) {}
    fn update_epoch(&mut self, _epoch: usize) {}
    fn end(&mut self) {}
    fn log_event_training(&mut self, _event: String) {}
}

impl MetricsRendererEvaluation for Display {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
    fn on_test_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl EvaluationProgressLogger for Display {
    fn start_global_progress(&mut self, _tests: usize) {}
    fn start_test(&mut self, _name: &str, _items: usize) {}
    fn update_test_progress(&mut self, _items: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _event: String) {}
}

impl MetricsRenderer for Display {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, definition: MetricDefinition) {
        let mut picture = self.picture();
        if picture.curve(&definition.metric_id).is_none() {
            picture.curves.push(Curve::new(definition));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::train::metric::{MetricEntry, SerializedEntry};
    use ratatui::{Terminal, backend::TestBackend};

    fn definition(name: &str) -> MetricDefinition {
        MetricDefinition {
            metric_id: MetricId::new(Arc::new(name.into())),
            name: Arc::new(name.into()),
            description: None,
            attributes: MetricAttributes::None,
        }
    }

    fn entry(value: NumericEntry) -> MetricState {
        let entry = SerializedEntry::new(String::new(), String::new());
        MetricState::Numeric(MetricEntry::new(definition("Loss").metric_id, entry), Some(value))
    }

    /// A run of 100 steps that has done `step`, with validations at every tenth.
    fn display(step: usize) -> Display {
        let mut display = Display::new("pond-1".into(), 100, 0.05);
        display.register_metric(definition("Loss"));
        display.register_metric(definition("Accuracy"));
        display.start_split("train", 100);
        for step in 1..=step {
            display.update_train(entry(NumericEntry::Value(5.0 - step as f64 / 50.0)));
            display.update_split(step);
            if step.is_multiple_of(10) {
                display.start_split("valid", 4);
                display.update_valid(entry(NumericEntry::Value(99.0)));
                display.update_split(4);
                display.update_valid(entry(NumericEntry::Final(4.25)));
                display.end_split();
            }
        }
        display
    }

    fn drawn(display: &Display, (width, height): (u16, u16), stopping: bool) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| display.draw(frame, stopping)).unwrap();
        terminal.backend().to_string()
    }

    fn press(display: &Display, code: KeyCode) -> Option<KeyAction> {
        display.key(code.into())
    }

    #[test]
    fn a_small_terminal_shows_progress_curve_samples_and_keys() {
        let display = display(45);
        let sample = |prompt: &str, text: &str| (prompt.into(), text.into());
        display.sampled(40, &[sample("One day", ", said\nDuck."), sample("<|user|>Hi", "Quack!")]);
        let screen = drawn(&display, (80, 24), false);
        for shown in [
            "pond-1   step 45 of 100   epoch 2.2 of 5.0",
            "45 %",
            "Loss  ── training 4.1",
            "• validation 4.250",
            "step 100",
            "Samples of step 40",
            "One day, said↵Duck.",
            "<|user|>HiQuack!",
            "q quit",
            "Ctrl-C stop, with a checkpoint",
        ] {
            assert!(screen.contains(shown), "{shown} is not in\n{screen}");
        }
        // One dot for each validation, and the one of the title.
        assert_eq!(screen.matches('•').count(), 4 + 1, "{screen}");
    }

    #[test]
    fn a_rollback_is_shown() {
        let display = display(45);
        assert!(!drawn(&display, (80, 24), false).contains("rollback"));
        display.rolled_back(2, 41);
        let screen = drawn(&display, (80, 24), false);
        assert!(screen.contains("epoch 2.2 of 5.0   rollback 2 after step 41"), "{screen}");
    }

    #[test]
    fn any_size_and_any_moment_can_be_drawn() {
        for step in [0, 1, 100] {
            let display = display(step);
            display.sampled(step, &vec![("a".repeat(500), "\u{1b}[2J".into()); 9]);
            for size in [(1, 1), (20, 5), (80, 24), (300, 100)] {
                assert!(!drawn(&display, size, true).contains('\u{1b}'));
            }
        }
        let empty = Display::new(String::new(), 0, f64::NAN);
        drawn(&empty, (80, 24), false);
        let mut flat = empty;
        flat.register_metric(definition("Loss"));
        drawn(&flat, (80, 24), false);
    }

    #[test]
    fn progress_ends_at_its_end() {
        let screen = drawn(&display(99), (80, 24), false);
        assert!(screen.contains("99 %") && screen.contains("step 99 of 100"), "{screen}");
        assert!(drawn(&display(100), (80, 24), false).contains("100 %"));
        let mut validating = display(50);
        validating.start_split("valid", 8);
        validating.update_split(3);
        let screen = drawn(&validating, (80, 24), false);
        assert!(screen.contains("validating, batch 3 of 8") && screen.contains("step 50 of 100"), "{screen}");
    }

    #[test]
    fn keys_do_what_the_screen_says() {
        let display = display(5);
        let right = |display: &Display| press(display, KeyCode::Right);
        assert!(drawn(&display, (80, 24), false).contains(" Loss "));
        right(&display);
        assert!(drawn(&display, (80, 24), false).contains(" Accuracy "));
        right(&display);
        press(&display, KeyCode::Left);
        assert!(drawn(&display, (80, 24), false).contains(" Accuracy "));
        // Without a question these are no answers.
        assert_eq!([press(&display, KeyCode::Char('s')), press(&display, KeyCode::Char('k'))], [None, None]);
        assert_eq!(press(&display, KeyCode::Char('q')), None);
        assert!(drawn(&display, (80, 24), false).contains("k stop at once, without a checkpoint"));
        press(&display, KeyCode::Char('c'));
        assert_eq!(press(&display, KeyCode::Char('k')), None);
        press(&display, KeyCode::Char('q'));
        assert_eq!(press(&display, KeyCode::Char('s')), Some(KeyAction::Stop));
        press(&display, KeyCode::Char('q'));
        assert_eq!(press(&display, KeyCode::Char('k')), Some(KeyAction::Kill));
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(display.key(interrupt), Some(KeyAction::Stop));
        // Only a second signal ends the process.
        for interrupts in [false, true] {
            display.set_interrupts(interrupts);
            let screen = drawn(&display, (80, 24), true);
            assert!(screen.contains("stopping after this step"), "{screen}");
            assert_eq!(screen.contains("Ctrl-C stops at once"), interrupts, "{screen}");
        }
    }

    #[test]
    fn a_curve_is_as_short_as_the_screen_however_long_the_run() {
        let mut curve = Curve::new(definition("Loss"));
        let steps = 100_000;
        for step in 1..=steps {
            curve.trained(step, steps, (step % 2) as f64);
        }
        let means = curve.means(steps);
        assert_eq!(means.len(), PARTS);
        assert!(means.iter().all(|(step, mean)| *step < steps as f64 && (mean - 0.5).abs() < 0.01));
    }
}
