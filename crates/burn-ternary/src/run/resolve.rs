//! Settings that depend on the tokenizer, the text or the device.

use super::experiment::LARGEST_COUNT;
use super::{Experiment, TrainError};
use crate::device;
use crate::quant::MatmulPrecision;
use crate::train::optim::Moments;
use burn::tensor::Device;
use ternary_format::Tokenizer;

/// Refuses settings that only flex has: products of other factors than floats, and 8-bit moments.
pub(super) fn check_device(experiment: &Experiment, device: &Device) -> Result<(), TrainError> {
    if is_flex(device) {
        return Ok(());
    }
    let key = if experiment.quant.matmul_precision != MatmulPrecision::Float {
        "quant.matmul_precision"
    } else if experiment.optim.moments != Moments::Float {
        "optim.moments"
    } else {
        return Ok(());
    };
    let message = format!(
        "{key}: {} has \"float\" only; expected that, or run.device = \"flex\"",
        device::describe(device)
    );
    Err(TrainError::Experiment { origin: experiment.run.name.clone(), message })
}

pub(super) fn is_flex(device: &Device) -> bool {
    device::device("flex").is_ok_and(|flex| flex == *device)
}

/// Sets `model.vocab_size` where it is 0, and checks that the tokenizer fits otherwise.
pub(super) fn resolve_vocabulary(
    experiment: &mut Experiment,
    tokenizer: &Tokenizer,
) -> Result<(), TrainError> {
    let found = tokenizer.vocab_size();
    let vocab_size = &mut experiment.model.vocab_size;
    if *vocab_size == 0 {
        *vocab_size = found;
    }
    if *vocab_size < found {
        let message = format!(
            "model.vocab_size = {vocab_size}: the tokenizer `{}` has {found} tokens; expected 0 (as many as the \
             tokenizer has) or at least {found}",
            experiment.data.tokenizer
        );
        return Err(TrainError::Experiment { origin: experiment.run.name.clone(), message });
    }
    Ok(())
}

/// Sets `run.steps` to those of `--epochs`, where an epoch has `windows` windows.
pub(super) fn resolve_steps(
    experiment: &mut Experiment,
    epochs: Option<f64>,
    windows: usize,
) -> Result<(), TrainError> {
    if let Some(epochs) = epochs {
        let windows_per_step = experiment.run.batch_size * experiment.run.gradient_accumulation;
        let steps = (epochs * windows as f64 / windows_per_step as f64).ceil().max(1.0);
        if steps > LARGEST_COUNT as f64 {
            let message = format!("{epochs} are {steps} steps; expected at most {LARGEST_COUNT} steps");
            return Err(TrainError::Experiment { origin: "--epochs".into(), message });
        }
        experiment.run.steps = steps as usize;
    }
    Ok(())
}
