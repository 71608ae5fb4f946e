use super::checkpoint::Checkpoints;
use super::schedule::Schedule;
use super::step::TrainPlan;
use super::{Experiment, TrainError};
use crate::data::tokenizer;
use crate::device::device;
use crate::export::{ExportError, export_for_inference, export_latent};
use crate::nn::DuckQuantized;
use crate::quant::Dial;
use burn::module::Module;
use burn::tensor::Device;
use std::path::Path;
use ternary_format::{PackedModel, Tokenizer, read_model};

/// What a run folder holds, for use after the run.
pub struct SavedRun {
    pub experiment: Experiment,
    pub tokenizer: Tokenizer,
    /// The model of the last good checkpoint, without autodiff.
    pub model: DuckQuantized,
}

impl SavedRun {
    /// Opens a run folder; the model goes to `device`.
    ///
    /// # Errors
    /// `Experiment`, `Data`, `Checkpoint`: the folder's files are missing or not as the run left them.
    pub fn open(run_dir: &Path, device: &Device) -> Result<Self, TrainError> {
        let experiment = Experiment::load(run_dir.join("experiment.toml"))?;
        let tokenizer = tokenizer::load(&run_dir.join("tokenizer.json"))?;
        let checkpoints = run_dir.join("checkpoints");
        let loaded = Checkpoints::open(&checkpoints, experiment.run.keep_checkpoints)?.latest_good()?;
        let loaded = loaded.ok_or_else(|| TrainError::Experiment {
            origin: checkpoints.display().to_string(),
            message: "expected a checkpoint, found none yet".into(),
        })?;
        let schedule = Schedule::new(&experiment.schedule, experiment.run.steps);
        let plan =
            TrainPlan { optim: experiment.optim.clone(), schedule, decay: Dial::default(), teacher: None };
        let last_step = loaded.state.step.saturating_sub(1);
        let model = experiment.model.init(&experiment.quant, experiment.run.seed, &device.clone().autodiff());
        let (learner, _) = plan.resume(model, loaded)?;
        let model = learner.model().model.valid();
        plan.schedule.turn(last_step, model.dials());
        Ok(Self { experiment, tokenizer, model })
    }

    /// The model as model files have it, under the name of the run.
    ///
    /// # Errors
    /// As [`export_for_inference`].
    pub fn export(&self) -> Result<PackedModel, ExportError> {
        export_for_inference(&self.model, Some(&self.tokenizer), &self.experiment.run.name)
    }
}

/// The weights that a run may start from: the latent ones of a run folder, or those of a model file of any kind.
///
/// # Errors
/// As [`packed_model`].
pub(super) fn start_model(path: &Path) -> Result<PackedModel, TrainError> {
    if !is_run(path) {
        return packed_model(path);
    }
    let run = SavedRun::open(path, &host()?)?;
    Ok(export_latent(&run.model, Some(&run.tokenizer), &run.experiment.run.name)?)
}

/// For models that are only written down: no device is begun, and no kernel tuned, for that.
fn host() -> Result<Device, TrainError> {
    Ok(device("flex").or_else(|_| device("auto"))?)
}

fn is_run(path: &Path) -> bool {
    path.join("experiment.toml").exists()
}

/// The model of a run folder, or of a model file of any kind.
///
/// # Errors
/// As [`SavedRun::open`]. `Model`: a run whose model no file can express, or a file that cannot be read.
pub fn packed_model(path: &Path) -> Result<PackedModel, TrainError> {
    if is_run(path) {
        return Ok(SavedRun::open(path, &host()?)?.export()?);
    }
    Ok(read_model(path).map_err(ExportError::from)?)
}
