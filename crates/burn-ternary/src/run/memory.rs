//! Whether a run fits into memory.

use super::resolve::is_flex;
use super::{Experiment, TrainError};
use crate::device;
use crate::train::optim::Moments;
use burn::tensor::Device;
use ternary_format::memory;

/// Bytes for all that is not a tensor: the stacks of threads, which Burn starts later and panics without.
const PROGRAM: u64 = 64 << 20;

/// Checks that the run fits into memory, with a teacher of `teacher` bytes, where `held` bytes of it are allocated already.
///
/// # Errors
/// `MemoryTooSmall`.
pub(super) fn check_memory(
    experiment: &Experiment,
    device: &Device,
    teacher: u64,
    held: u64,
) -> Result<(), TrainError> {
    if device::is_cpu(device) {
        memory::check((memory_estimate(experiment, device) + teacher).saturating_sub(held) + PROGRAM)?;
    }
    Ok(())
}

/// Bytes that training takes, roughly: latent and fake quantized weights, gradients, optimizer moments and one
/// temporary, of which a frozen model has the first two; the activations that the backward pass reads, with the scores of attention
/// except on flex, which computes them again; and copies of weights and moments while a checkpoint is written.
pub(super) fn memory_estimate(
    Experiment { model, run, lora, optim, .. }: &Experiment,
    device: &Device,
) -> u64 {
    let trained = |params: usize| match optim.moments {
        Moments::Float => 9 * params,
        Moments::Int8 => 6 * params,
    };
    let weights = match lora.is_on() {
        true => 3 * model.num_params() + trained(lora.num_params(model)),
        false => trained(model.num_params()),
    };
    let tokens = run.batch_size * model.context;
    let scores = if is_flex(device) { 0 } else { 4 * model.n_heads * model.context };
    let layer = 16 * model.d_model + 8 * model.d_ff + scores;
    let activations = tokens * (model.n_layers * layer + 6 * model.vocab_size);
    4 * (weights + activations) as u64
}
