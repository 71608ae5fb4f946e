//! Whether a run fits into memory.

use super::resolve::is_flex;
use super::{Experiment, TrainError};
use crate::device;
use crate::train::optim::Moments;
use burn::tensor::Device;
use ternary_format::memory;

/// Bytes of everything that is not a tensor: the program, and the stacks of threads, which Burn starts later and panics without.
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
        let tensors = memory_estimate(experiment, device) - PROGRAM + teacher;
        memory::check(tensors.saturating_sub(held) + PROGRAM)?;
    }
    Ok(())
}

/// Bytes that a run takes, roughly: the program; latent and fake quantized weights, gradients, optimizer moments and one temporary,
/// of which a frozen model has the first two; the activations that the backward pass reads, with the scores of attention
/// except on flex, which computes them again; and copies of weights and moments while a checkpoint is written.
///
/// The fused passes of flex keep fewer activations and temporaries. Its factors are fitted to the peak memory of runs with 0.9 to
/// 2.6 M parameters, which they exceed by 25 to 70 %.
pub(super) fn memory_estimate(
    Experiment { model, run, lora, optim, .. }: &Experiment,
    device: &Device,
) -> u64 {
    let flex = is_flex(device);
    let trained = |params: usize| match (flex, optim.moments) {
        (true, Moments::Float) => 6 * params,
        (true, Moments::Int8) => 5 * params,
        (false, Moments::Float) => 9 * params,
        (false, Moments::Int8) => 6 * params,
    };
    let weights = match lora.is_on() {
        true => 3 * model.num_params() + trained(lora.num_params(model)),
        false => trained(model.num_params()),
    };
    let tokens = run.batch_size * model.context;
    let layer = match flex {
        true => 8 * model.d_model + 4 * model.d_ff,
        false => 16 * model.d_model + 8 * model.d_ff + 4 * model.n_heads * model.context,
    };
    let activations = tokens * (model.n_layers * layer + 6 * model.vocab_size);
    PROGRAM + 4 * (weights + activations) as u64
}
