use super::checkpoint::{CheckpointError, Checkpoints, Loaded};
use super::{Experiment, TrainError};
use crate::data::{has_dialogues, tokenizer};
use crate::device::device;
use crate::export::{ExportError, export_for_inference, export_frozen, export_latent};
use crate::import::ImportError;
use crate::nn::DuckQuantized;
use crate::quant::QuantConfig;
use crate::train::restore;
use crate::train::schedule::Schedule;
use burn::module::Module;
use burn::tensor::Device;
use std::{fs, io, path::Path};
use ternary_format::{PackedModel, Tensor, Tokenizer, chat, disk, memory, read_model};

/// What a run folder holds, for use after the run.
pub struct SavedRun {
    /// What was trained.
    pub experiment: Experiment,
    /// Of its texts.
    pub tokenizer: Tokenizer,
    /// The model of the last good checkpoint, without autodiff.
    pub model: DuckQuantized,
    /// How dialogues are written; `None` where the model has seen none.
    pub chat_template: Option<String>,
}

impl SavedRun {
    /// Opens a run folder; the model goes to `device`.
    ///
    /// # Errors
    /// `Experiment`, `Data`, `Checkpoint`: the folder's files are missing or not as the run left them.
    pub fn open(run_dir: &Path, device: &Device) -> Result<Self, TrainError> {
        let experiment = Experiment::load(run_dir.join("experiment.toml"))?;
        let tokenizer = tokenizer::load(&run_dir.join("tokenizer.json"))?;
        let chat_template = read_template(run_dir)?;
        let checkpoints = run_dir.join("checkpoints");
        let loaded = Checkpoints::existing(&checkpoints).latest_good()?;
        let loaded = loaded.ok_or_else(|| TrainError::Experiment {
            origin: checkpoints.display().to_string(),
            message: "expected a checkpoint, found none yet".into(),
        })?;
        check_size(&experiment, &loaded, run_dir)?;
        let schedule = Schedule::new(&experiment.schedule, experiment.run.steps);
        let last_step = loaded.state.step.saturating_sub(1);
        let seed = experiment.run.seed;
        let model = experiment.model.init(&experiment.quant, seed, &device.clone().autodiff());
        let model = model.with_lora(&experiment.lora, seed);
        let model = restore(model, &experiment.optim, loaded.model, &loaded.path)?.valid();
        schedule.turn(last_step, model.dials());
        Ok(Self { experiment, tokenizer, model, chat_template })
    }

    /// The model as model files have it, under the name of the run.
    ///
    /// # Errors
    /// As [`export_for_inference`].
    pub fn export(&self) -> Result<PackedModel, ExportError> {
        let packed = export_for_inference(&self.model, Some(&self.tokenizer), &self.experiment.run.name)?;
        Ok(PackedModel { chat_template: self.chat_template.clone(), ..packed })
    }
}

/// Holds the chat template of a run's model in its folder.
const TEMPLATE: &str = "chat_template.jinja";

/// Leaves the chat template of a run's model in its folder, for models that are exported from a checkpoint.
pub(super) fn write_template(run_dir: &Path, template: Option<&str>) -> Result<(), TrainError> {
    let path = run_dir.join(TEMPLATE);
    let written = match template {
        Some(template) => disk::write(&path, template.as_bytes()),
        None => fs::remove_file(&path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }),
    };
    written.map_err(|source| TrainError::Write { path, source })
}

/// What [`write_template`] left. Folders of earlier versions have no such file, and their own template if they were
/// trained on dialogues.
pub(super) fn read_template(run_dir: &Path) -> Result<Option<String>, TrainError> {
    let path = run_dir.join(TEMPLATE);
    match disk::read_to_string(&path) {
        Ok(template) => Ok(Some(template)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            Ok(has_dialogues(run_dir).then(|| chat::TEMPLATE.into()))
        }
        Err(source) => Err(TrainError::Read { path, source }),
    }
}

/// An error where the settings of a run folder make a model that its checkpoint cannot fill, or that memory cannot hold:
/// they may be a stranger's.
fn check_size(experiment: &Experiment, loaded: &Loaded, run_dir: &Path) -> Result<(), TrainError> {
    let parameters = experiment.model.num_params() + experiment.lora.num_params(&experiment.model);
    let bytes = (size_of::<f32>() * parameters) as u64;
    if loaded.model_bytes < bytes {
        let detail = format!(
            "[model] of {} has {parameters} parameters, which take {bytes} bytes, the file has {}; expected the settings that \
             the run was made with",
            run_dir.join("experiment.toml").display(),
            loaded.model_bytes
        );
        return Err(CheckpointError::unfit(&loaded.path, detail).into());
    }
    // The first weights, and those of the checkpoint as they replace them.
    Ok(memory::check(2 * bytes)?)
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
    let packed = export_latent(&run.model, Some(&run.tokenizer), &run.experiment.run.name)?;
    Ok(PackedModel { chat_template: run.chat_template, ..packed })
}

/// The model that stands still beside adapters: what the run folder or the model file computes, ternary where it is.
///
/// # Errors
/// As [`packed_model`]. `Experiment`: `quant` has another norm before each layer. `Model`: ternary weights with an
/// adapter of their own.
pub(super) fn frozen_model(path: &Path, quant: &QuantConfig) -> Result<PackedModel, TrainError> {
    let (model, input_norm) = if is_run(path) {
        let SavedRun { experiment, tokenizer, model, chat_template } = SavedRun::open(path, &host()?)?;
        let packed = export_frozen(&model, Some(&tokenizer), &experiment.run.name)?;
        (PackedModel { chat_template, ..packed }, experiment.quant.input_norm)
    } else {
        (packed_model(path)?, false)
    };
    if quant.input_norm != input_norm {
        let message = format!(
            "quant.input_norm is {}, expected {input_norm} as the model to start from has it",
            quant.input_norm
        );
        return Err(TrainError::Experiment { origin: path.display().to_string(), message });
    }
    Ok(model.merged().map_err(ExportError::from)?.into_owned())
}

/// Whether `model` computes with the weights of `start` as they are: its adapters are of use beside no others.
///
/// # Errors
/// `Experiment`: the first tensor that [model] or [quant] make another of.
pub(super) fn check_frozen(model: &DuckQuantized, start: &PackedModel) -> Result<(), TrainError> {
    let own = export_frozen(model, None, "")?;
    let keeps = |name: &str, own: &Tensor| {
        let Some(start) = start.tensors.get(name) else { return false };
        let (mut found, mut expected) = (vec![0.0; own.cols()], vec![0.0; start.cols()]);
        // Of learned positions a shorter context needs the first ones.
        let rows = own.rows() == start.rows() || name == "position_embd.weight";
        rows && (0..own.rows()).all(|row| {
            own.read_row(row, &mut found);
            start.read_row(row, &mut expected);
            found == expected
        })
    };
    let Some((name, _)) = own.tensors.iter().find(|(name, own)| !keeps(name, own)) else {
        return Ok(());
    };
    let ternary = start.tensors.values().any(|tensor| tensor.encoding().is_ternary());
    let kind = if ternary { "quant.scale = \"learned\"" } else { "quant.enabled = false" };
    let message = format!(
        "[model] and [quant] change tensor `{name}` of the model to start from, which lora.rank freezes as it is: \
         expected its own shape, {kind}, and tables as it has them or \"float\""
    );
    Err(TrainError::Experiment { origin: "run.start_from".into(), message })
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
/// As [`SavedRun::open`]. `Model`: a run whose model no file can express. `Import`: a file that cannot be read.
pub fn packed_model(path: &Path) -> Result<PackedModel, TrainError> {
    if is_run(path) {
        return Ok(SavedRun::open(path, &host()?)?.export()?);
    }
    Ok(read_model(path).map_err(ImportError::from)?)
}
