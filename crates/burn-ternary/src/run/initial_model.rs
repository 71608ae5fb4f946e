//! The weights that a run starts from: `run.start_from`.

use super::checkpoint::Loaded;
use super::identity::model_digest;
use super::run_folder::{SavedRun, host, is_run, packed_model};
use super::{Experiment, TrainError};
use crate::ImportError;
use crate::export::{ExportError, export_latent, export_quantized};
use crate::nn::DuckQuantized;
use crate::quant::QuantConfig;
use burn::module::Module;
use burn::tensor::Device;
use std::path::Path;
use ternary_format::{PackedModel, Tensor, print_stderr};

/// The model that `run.start_from` names, and its digest; `None` where the experiment names none.
///
/// The checkpoint of a resumed run has all weights: where the model is gone, the digest is the recorded one, with a warning.
pub(super) fn load_initial_model(
    experiment: &Experiment,
    loaded: Option<&Loaded>,
) -> Result<(Option<PackedModel>, Option<String>), TrainError> {
    let path = Path::new(&experiment.run.start_from);
    if path.as_os_str().is_empty() {
        return Ok((None, None));
    }
    let model = match experiment.lora.is_on() {
        true => frozen_model(path, &experiment.quant),
        false => latent_model(path),
    };
    let recorded =
        loaded.map(|loaded| loaded.identity.as_ref().map(|identity| identity.inputs.start.clone()));
    match (model, recorded) {
        (Ok(model), _) => {
            model.check_finite().map_err(ImportError::from)?;
            let digest = model_digest(&model);
            Ok((Some(model), Some(digest)))
        }
        // Not a run that started from nothing.
        (Err(error), Some(recorded)) if recorded != Some(None) => {
            print_stderr(format_args!(
                "warning: {error}; run.start_from cannot be compared, the checkpoint has all weights"
            ));
            Ok((None, recorded.flatten()))
        }
        (Err(error), _) => Err(error),
    }
}

/// The module of an experiment with the weights of `start`.
pub(super) fn init_from(
    experiment: &Experiment,
    start: &PackedModel,
    device: &Device,
) -> Result<DuckQuantized, TrainError> {
    let Experiment { model, quant, run, lora, .. } = experiment;
    let module = model.init_from(start, quant, run.seed, device).map_err(|error| {
        let origin = format!("run.start_from = \"{}\"", run.start_from);
        TrainError::Experiment { origin, message: error.to_string() }
    })?;
    if lora.is_on() {
        check_frozen(&module.valid(), start)?;
    }
    Ok(module)
}

/// The weights that a run may start from: the latent ones of a run folder, or those of a model file of any kind.
///
/// # Errors
/// As [`packed_model`].
fn latent_model(path: &Path) -> Result<PackedModel, TrainError> {
    if !is_run(path) {
        return packed_model(path);
    }
    let run = SavedRun::open(path, &host()?)?;
    let packed = export_latent(&run.model, Some(&run.tokenizer), &run.experiment.run.name)?;
    Ok(packed.with_chat_template(run.chat_template))
}

/// The frozen model of a run with adapters: what the run folder or the model file computes, ternary where it is.
///
/// # Errors
/// As [`packed_model`]. `Experiment`: `quant` has another norm before each layer. `Model`: ternary weights with an
/// adapter of their own.
fn frozen_model(path: &Path, quant: &QuantConfig) -> Result<PackedModel, TrainError> {
    let (model, input_norm) = if is_run(path) {
        let SavedRun { experiment, tokenizer, model, chat_template } = SavedRun::open(path, &host()?)?;
        let packed = export_quantized(&model, Some(&tokenizer), &experiment.run.name)?;
        (packed.with_chat_template(chat_template), experiment.quant.input_norm)
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

/// Checks that `model` computes with the weights of `start` unchanged: its adapters work with no others.
///
/// # Errors
/// `Experiment`: the first tensor that [model] or [quant] change.
fn check_frozen(model: &DuckQuantized, start: &PackedModel) -> Result<(), TrainError> {
    let own = export_quantized(model, None, "")?;
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
