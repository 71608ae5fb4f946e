//! Warnings of a run: settings without effect, prompts that cannot be encoded, a doubtful end.

use super::Experiment;
use super::experiment::RunConfig;
use crate::data::{DataError, Dataset};
use crate::train::TrainState;
use ternary_format::{Tokenizer, chat::encode_prompt, print_stderr};

/// Settings of the run that have no effect.
pub(super) fn without_effect(Experiment { run, schedule, .. }: &Experiment, data: &Dataset) -> Vec<String> {
    let mut warnings = Vec::new();
    if schedule.warmup_steps >= run.steps {
        warnings.push(format!(
            "schedule.warmup_steps = {}, but the run has {} steps: the learning rate never reaches its peak; \
             expected fewer warm-up steps or a longer run",
            schedule.warmup_steps, run.steps
        ));
    }
    let limit = if run.eval_windows == 0 { usize::MAX } else { run.eval_windows };
    let windows = limit.min(data.valid.per_epoch());
    if data.valid.without_targets(windows) == windows {
        warnings.push(format!(
            "the {windows} windows of the validation text have no learned token: the run has no validation loss; \
             expected a longer validation text or more run.eval_windows"
        ));
    }
    warnings
}

/// Signs that a run which ended has not learned.
pub(super) fn doubtful_end(state: &TrainState) -> Vec<String> {
    /// Nats per token by which the mean loss may rise again, as it does when weights become ternary.
    const MAX_RISE: f64 = 1.0;
    let mut warnings = Vec::new();
    if state.step > 0 && state.tokens == 0 {
        warnings.push(
            "no step had a learned token, so the weights are those of the start; expected a longer model.context or \
             shorter prompts"
                .into(),
        );
    }
    if let (Some(lowest), Some(end)) = (state.lowest_average, state.loss_average)
        && end > lowest + MAX_RISE
    {
        warnings.push(format!(
            "the mean training loss rose from {lowest:.3} to {end:.3}: the run diverges; expected a lower optim.lr or \
             optim.muon_lr"
        ));
    }
    warnings
}

/// The prompts of text samples, as text and as ids; warns of those that the tokenizer cannot encode, and leaves them out.
pub(super) fn sample_prompts(run: &RunConfig, tokenizer: &Tokenizer) -> Vec<(String, Vec<u32>)> {
    if run.sample_tokens == 0 {
        return Vec::new();
    }
    let encode = |prompt: &String| {
        let why = match encode_prompt(tokenizer, prompt) {
            Ok(ids) if !ids.is_empty() => return Some((prompt.clone(), ids)),
            Ok(_) => "the tokenizer makes no token of it".into(),
            Err(error) => DataError::from(error).to_string(),
        };
        print_stderr(format_args!("warning: run.sample_prompts: {prompt:?} is left out: {why}"));
        None
    };
    run.sample_prompts.iter().filter_map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer;
    use std::fs;

    #[test]
    fn prompts_that_the_tokenizer_cannot_express_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        // Words, and none for those that are unknown.
        let words = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"duck": 0, "swims": 1}, "unk_token": "[UNK]"}}"#;
        fs::write(&path, words).unwrap();
        let mut run = Experiment::load("experiments/00-default.toml").unwrap().run;
        run.sample_prompts =
            ["duck", "One day", "<|user|>swims", "", "<|user|>Who?"].map(String::from).into();
        let kept = |run: &RunConfig, tokenizer: &Tokenizer| -> Vec<String> {
            sample_prompts(run, tokenizer)
                .into_iter()
                .map(|(prompt, ids)| {
                    assert!(!ids.is_empty());
                    prompt
                })
                .collect()
        };
        let letters = Tokenizer::from_characters("cdikmsuw".chars().collect()).unwrap();
        for tokenizer in [letters, tokenizer::load(&path).unwrap()] {
            assert_eq!(kept(&run, &tokenizer), ["duck", "<|user|>swims", ""]);
        }
        assert_eq!(kept(&run, &Tokenizer::byte()).len(), 5);
        run.sample_tokens = 0;
        assert!(kept(&run, &Tokenizer::byte()).is_empty());
    }

    #[test]
    fn a_run_that_learned_nothing_or_lost_it_is_reported() {
        let state = TrainState { step: 100, tokens: 99, ..TrainState::default() };
        let of = |lowest, end| TrainState {
            lowest_average: Some(lowest),
            loss_average: Some(end),
            ..state.clone()
        };
        assert_eq!(doubtful_end(&state), [""; 0]);
        assert_eq!(doubtful_end(&of(2.0, 2.9)), [""; 0]);
        assert!(doubtful_end(&of(2.5, 5.6))[0].contains("rose from 2.500 to 5.600"));
        assert!(doubtful_end(&TrainState { tokens: 0, ..state })[0].contains("no step had a learned token"));
    }

    #[test]
    fn a_warm_up_as_long_as_the_run_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let mut experiment = Experiment::load("experiments/00-default.toml").unwrap();
        experiment.data.tokenizer = "byte".into();
        let data = Dataset::prepare(&experiment.data, 64, 1, folder.path()).unwrap();
        assert_eq!(without_effect(&experiment, &data), [""; 0]);
        experiment.run.steps = 50;
        let warnings = without_effect(&experiment, &data);
        assert!(warnings[0].contains("schedule.warmup_steps = 50, but the run has 50 steps"), "{warnings:?}");
        experiment.schedule.warmup_steps = 49;
        assert_eq!(without_effect(&experiment, &data), [""; 0]);
    }
}
