//! The results of a run: exported model, adapters, plots and `result.json`.

use super::TrainError;
use super::context::RunContext;
use super::training_loop::Outcome;
use crate::device;
use crate::nn::DuckQuantized;
use crate::report::RunResult;
#[cfg(feature = "plot")]
use crate::report::{History, plot};
use crate::{ExportError, export::export_quantized, export_for_inference};
use std::fs;
use ternary_format::{WriteOptions, huggingface::write_adapter, write_model};

/// The model files of a run.
#[derive(Default)]
pub(super) struct Exported {
    /// Bytes of `model.gguf`.
    pub file_bytes: Option<u64>,
    /// Why there is no such file.
    pub no_file: Option<String>,
    /// The name of an archive for a model that only GGUF cannot hold.
    pub archive: Option<String>,
    /// Bytes of the adapters.
    pub adapter_bytes: Option<u64>,
}

impl Exported {
    /// Writes `model.gguf`. That no file can hold the model is no error of the run.
    pub fn write_model(&mut self, run: &RunContext, model: &DuckQuantized) {
        let path = run.home.dir().join("model.gguf");
        let name = &run.experiment.run.name;
        let packed = match export_for_inference(model, Some(&run.data.tokenizer), name) {
            Ok(packed) => packed.with_chat_template(run.chat_template.clone()),
            Err(error) => {
                self.no_file = Some(error.to_string());
                return;
            }
        };
        match write_model(&packed, &path, &WriteOptions::default()).map_err(ExportError::from) {
            Ok(_) => self.file_bytes = fs::metadata(&path).ok().map(|file| file.len()),
            Err(error) => {
                self.no_file = Some(error.to_string());
                // Adapters cannot be merged into ternary weights, in whatever file.
                let fits = !error.is_io() && !run.experiment.lora.is_on();
                self.archive = fits.then(|| format!("{name}.ternary"));
            }
        }
    }

    /// Writes the adapters, if there are any, in the format that PEFT loads.
    ///
    /// # Errors
    /// `Model`: the folder cannot be written.
    pub fn write_adapter(&mut self, run: &RunContext, model: &DuckQuantized) -> Result<(), TrainError> {
        if !run.experiment.lora.is_on() {
            return Ok(());
        }
        let Some(adapter) = export_quantized(model, None, "")?.adapter else { return Ok(()) };
        let (path, base) = (run.home.dir().join("adapter"), &run.experiment.run.start_from);
        write_adapter(&adapter, &model.config().spec(), base, &path).map_err(ExportError::from)?;
        self.adapter_bytes = Some(adapter.bytes() as u64);
        Ok(())
    }
}

/// The numbers of a run that has ended.
pub(super) fn result(context: &RunContext, outcome: &Outcome) -> RunResult {
    let run = &context.experiment.run;
    let train = outcome.history.train.iter().rfind(|report| report.tokens > 0);
    let valid = outcome.history.valid.last().filter(|report| report.tokens > 0);
    let step = outcome.state.step;
    RunResult {
        device: device::describe(&context.device),
        threads: rayon::current_num_threads(),
        steps: step,
        tokens: outcome.state.tokens,
        tokens_per_s: outcome.state.tokens as f64 / outcome.state.elapsed_s.max(1e-9),
        start_float_loss: outcome.state.start.map(|start| start.float),
        start_rounded_loss: outcome.state.start.map(|start| start.rounded),
        train_loss: train.map(|report| report.loss),
        valid_loss: valid.map(|report| report.loss),
        valid_bits_per_byte: valid.and_then(|report| report.bits_per_byte),
        valid_perplexity: valid.map(|report| report.perplexity()),
        best_valid_loss: outcome.state.best_valid_loss,
        best_valid_step: outcome.state.best_valid_step,
        zero_fraction: valid.and_then(|report| report.zero_fraction),
        bits_per_weight: valid.and_then(|report| report.bits_per_weight),
        skipped_steps: outcome.state.skipped_steps,
        empty_steps: outcome.state.empty_steps,
        rollbacks: outcome.state.rollbacks,
        interrupted: outcome.interrupted,
        finished: step == run.steps,
        ..RunResult::new(&run.name, run.seed)
    }
}

/// Draws the loss curve and the codes of every layer.
#[cfg(feature = "plot")]
pub(super) fn write_plots(run: &RunContext, outcome: &Outcome) -> Result<(), TrainError> {
    let History { train, valid } = &outcome.history;
    let path = run.home.dir().join("loss.svg");
    let settings = &run.experiment.run;
    let title = format!("{}, seed {}", settings.name, settings.seed);
    plot::loss_curve(&path, train, valid, &title).map_err(|source| TrainError::Write { path, source })?;
    if !outcome.counts.is_empty() {
        let path = run.home.dir().join("codes.svg");
        plot::code_histogram(&path, &outcome.counts).map_err(|source| TrainError::Write { path, source })?;
    }
    Ok(())
}

/// Draws nothing: plots need the feature `plot`.
#[cfg(not(feature = "plot"))]
pub(super) fn write_plots(_run: &RunContext, _outcome: &Outcome) -> Result<(), TrainError> {
    Ok(())
}
