//! [`Events`]: what a training loop reports to Burn.

use crate::report::burn_metrics::LmItem;
use crate::report::{History, StepReport};
use crate::train::LanguageModel;
use burn::data::dataloader::Progress;
use burn::train::{
    EventProcessorTraining, Interrupter, LearnerEvent, SupervisedTrainingEventProcessor, TrainingItem,
};

/// Burn's metrics and renderer. An interval between evaluations is one of Burn's epochs, and its items are steps of the run.
pub(super) struct Events {
    pub processor: SupervisedTrainingEventProcessor<LanguageModel>,
    pub interrupter: Interrupter,
    pub steps: usize,
    pub eval_every: usize,
}

impl Events {
    fn train(&mut self, event: LearnerEvent<LmItem>) {
        self.interrupter.fail_on_error(self.processor.process_train(event));
    }

    fn valid(&mut self, event: LearnerEvent<LmItem>) {
        self.interrupter.fail_on_error(self.processor.process_valid(event));
    }

    /// Replays the reports of earlier sessions of the run.
    pub fn recall(&mut self, history: &History) {
        let mut trained = history.train.iter().peekable();
        for report in &history.valid {
            while let Some(before) = trained.next_if(|before| before.step <= report.step) {
                self.trained(*before);
            }
            self.start_validation(report.step, 1);
            self.validated(*report, 1, 1);
            self.end_validation(report.step);
        }
        for report in trained {
            self.trained(*report);
        }
        self.train(LearnerEvent::EndSplit(1));
    }

    /// Starts the interval of the step after `done`.
    pub fn start_interval(&mut self, done: usize) {
        let epoch_number = done / self.eval_every + 1;
        self.train(LearnerEvent::StartSplit { epoch_number, total_items: self.steps });
    }

    pub fn trained(&mut self, report: StepReport) {
        let progress = Progress::new(report.step, self.steps, Some("steps".into()));
        let item = TrainingItem::new(LmItem(report), progress, Some(report.step), Some(report.lr.into()));
        self.train(LearnerEvent::ProcessedItem(item));
    }

    pub fn start_validation(&mut self, step: usize, batches: usize) {
        let epoch_number = step.div_ceil(self.eval_every);
        self.valid(LearnerEvent::StartSplit { epoch_number, total_items: batches });
    }

    pub fn validated(&mut self, report: StepReport, batch: usize, batches: usize) {
        let progress = Progress::new(batch, batches, Some("batches".into()));
        let item = TrainingItem::new(LmItem(report), progress, Some(batch), None);
        self.valid(LearnerEvent::ProcessedItem(item));
    }

    pub fn end_validation(&mut self, step: usize) {
        self.valid(LearnerEvent::EndSplit(step.div_ceil(self.eval_every)));
    }

    pub fn end_interval(&mut self, step: usize) {
        let number = step.div_ceil(self.eval_every);
        self.train(LearnerEvent::EndSplit(number));
        self.train(LearnerEvent::EndEpoch(number));
    }
}
