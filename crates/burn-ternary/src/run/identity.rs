//! The identity of a run: what `--resume` compares before it writes anything.
//!
//! Every key of an experiment belongs to one of these:
//!
//! | keys | compared by |
//! |---|---|
//! | `data.train`, `data.valid` | contents: the documents that are learned from and the held-out ones, in their order |
//! | the path in `data.tokenizer` | contents: the tokenizer. Its kind (`byte`, `char`, `bpe` or a file) is compared as a value |
//! | `distill.teacher` | contents: shape and tensors of the model, or the digest of cached logits |
//! | `run.start_from` | contents, while the model can be read; a checkpoint has all weights |
//! | `data.valid_fraction`, `data.bpe_vocab_size` | value, where both experiments hold out a share or train a `bpe` tokenizer |
//! | `run.steps` | the steps done: another number is fine if the learning rate, the weight decay, the share of ternary weights and the sparsity of every step so far are the same under both |
//! | [`NOT_COMPARED`]: the folder and device of a run, what it prints, when it gives up | nothing |
//! | all others | value |

use super::checkpoint::{Identity, Inputs, Loaded, sha256};
use super::version::{self, VERSION};
use super::{Experiment, TrainError};
use crate::data::Texts;
use crate::device;
use crate::train::schedule::{Schedule, ScheduleConfig};
use burn::tensor::Device;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use ternary_format::PackedModel;
use toml::{Table, Value};

/// Keys that change no weight and no validation loss. `run.device` is one of them because `auto` and a name may mean the same device;
/// only on the same device is a resumed run the same bit for bit, and [`Identity::other_device`] warns of another one.
/// `run.checkpoint_every` sets the steps that a later rollback returns to.
const NOT_COMPARED: [&str; 10] = [
    "run.name",
    "run.out_dir",
    "run.device",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.sample_prompts",
    "run.sample_tokens",
    "run.max_rollbacks",
];

/// Keys that name texts or models, whose contents are compared.
const COMPARED_BY_CONTENT: [&str; 4] = ["data.train", "data.valid", "distill.teacher", "run.start_from"];

/// Keys without a meaning in some experiments, compared where both have one.
const OPTIONAL: [&str; 2] = ["data.bpe_vocab_size", "data.valid_fraction"];

/// Key compared by kind: `byte`, `char`, `bpe` or a file.
const TOKENIZER: &str = "data.tokenizer";

impl Identity {
    /// The identity of a run of `experiment`, whose vocabulary and steps are resolved, on `device`.
    pub fn new(experiment: &Experiment, inputs: Inputs, device: &Device) -> Self {
        let table = Table::try_from(experiment).expect("an experiment is tables, lists, strings and numbers");
        let device = Some(device::describe(device));
        Self { settings: settings(&table), steps: experiment.run.steps, inputs, device }
    }

    /// The identity with the keys of the current version of experiments, from that of a checkpoint of `version`.
    ///
    /// # Errors
    /// As [`version::migrated`].
    pub(super) fn migrated(self, version: u32) -> Result<Self, String> {
        if version == VERSION {
            return Ok(self);
        }
        let text: String = self
            .settings
            .iter()
            // The only setting that is not written as TOML.
            .map(|(key, value)| match key == TOKENIZER {
                true => format!("{key} = {value:?}\n"),
                false => format!("{key} = {value}\n"),
            })
            .collect();
        let table = version::migrated(&format!("version = {version}\n{text}"))?;
        Ok(Self { settings: settings(&table), ..self })
    }

    /// Compares this run with that of a checkpoint. `steps` receives whether all else is the same, and returns the steps of this
    /// run, or `None`: for another text, the number of steps per epoch is unknown.
    ///
    /// # Errors
    /// `OtherRun`: every setting and input that differs. What `steps` returns.
    pub(crate) fn expect_same(
        &self,
        loaded: &Loaded,
        run_dir: &Path,
        schedule: &ScheduleConfig,
        steps: impl FnOnce(bool) -> Result<Option<usize>, TrainError>,
    ) -> Result<(), TrainError> {
        let recorded = match &loaded.identity {
            Some(recorded) => recorded.clone(),
            None => self.of_old_checkpoint(loaded, run_dir)?,
        };
        let mut differences = recorded.differences(self);
        if let Some(steps) = steps(differences.is_empty())? {
            differences.extend(steps_differ(recorded.steps, steps, loaded.state.step, schedule));
        }
        expect_none(differences, run_dir)
    }

    /// A warning if this run continues on another device than the one that computed `recorded`, if that is known.
    pub(crate) fn other_device(&self, recorded: &Self) -> Option<String> {
        let (before, now) = (recorded.device.as_ref()?, self.device.as_ref()?);
        (before != now).then(|| {
            format!(
                "the run was on {before} and continues on {now}: its losses may differ in the last bits from those of an \
                 uninterrupted run"
            )
        })
    }

    /// Checks that prepared texts may replace those of a run.
    ///
    /// # Errors
    /// `OtherRun`: another text or tokenizer. `Experiment`: a run of an earlier version, whose texts cannot be compared.
    pub(crate) fn expect_texts(loaded: &Loaded, texts: &Texts, run_dir: &Path) -> Result<(), TrainError> {
        let Some(recorded) = &loaded.identity else {
            let message = "holds a run of an earlier version, which has no digests of its texts; expected another run.name \
                           or run.seed";
            return Err(TrainError::Experiment {
                origin: run_dir.display().to_string(),
                message: message.into(),
            });
        };
        let mut now = recorded.clone();
        now.inputs = Inputs { teacher: now.inputs.teacher, start: now.inputs.start, ..Inputs::of(texts) };
        expect_none(recorded.differences(&now), run_dir)
    }

    /// The identity of a checkpoint of an earlier version, which stores none: settings from the run folder's experiment, inputs
    /// from this run.
    fn of_old_checkpoint(&self, loaded: &Loaded, run_dir: &Path) -> Result<Self, TrainError> {
        let text = fs::read_to_string(run_dir.join("experiment.toml")).unwrap_or_default();
        let table = version::migrated(&text).ok();
        let table = table.filter(|_| loaded.experiment_sha256.as_ref() == Some(&sha256(text.as_bytes())));
        let steps = table.as_ref().and_then(|table| table.get("run")?.get("steps")?.as_integer());
        let (Some(table), Some(steps)) = (table, steps.and_then(|steps| steps.try_into().ok())) else {
            let message = format!(
                "the checkpoint was made by another experiment than experiment.toml in {} says; expected that file as \
                 the run left it",
                run_dir.display()
            );
            return Err(TrainError::Experiment { origin: "--resume".into(), message });
        };
        Ok(Self { settings: settings(&table), steps, inputs: self.inputs.clone(), device: None })
    }

    /// A sentence for each difference of `now`, except in its steps.
    fn differences(&self, now: &Self) -> Vec<String> {
        let (was, is) = (&self.inputs, &now.inputs);
        let same = |was: &Option<String>, is: &Option<String>| was == is;
        let inputs = [
            ("data.train", "the training text", was.train == is.train),
            ("data.valid", "the validation text", was.valid == is.valid),
            ("data.tokenizer", "the tokenizer", was.tokenizer == is.tokenizer),
            ("distill.teacher", "the teacher", same(&was.teacher, &is.teacher)),
            ("run.start_from", "the model to start from", same(&was.start, &is.start)),
        ];
        let inputs = inputs.into_iter().filter(|(.., same)| !same);
        let inputs = inputs.map(|(key, what, _)| format!("{what} ({key}) is not that of the run"));
        let keys: BTreeSet<&String> = self.settings.keys().chain(now.settings.keys()).collect();
        let values = keys.into_iter().filter_map(|key| {
            let [was, is] = [self, now].map(|identity| identity.settings.get(key));
            match (was, is) {
                _ if was == is || (OPTIONAL.contains(&&**key) && (was.is_none() || is.is_none())) => None,
                (was, is) => {
                    let [was, is] = [was, is].map(|value| value.map_or("missing", String::as_str));
                    Some(format!("{key} is {is}, in the run {was}"))
                }
            }
        });
        inputs.chain(values).collect()
    }
}

impl Inputs {
    /// The digests of `texts`, without a teacher and a start.
    pub(crate) fn of(texts: &Texts) -> Self {
        let [train, valid] = texts.digests().map(|digest| hex(&digest));
        let tokenizer = sha256(texts.tokenizer.to_json().as_bytes());
        Self { train, valid, tokenizer, teacher: None, start: None }
    }
}

/// Every key of an experiment that processes of one run must have in common, with its value; texts and models are compared by
/// [`facts`], and process 0 has the run folder.
pub(super) fn all_settings(experiment: &Experiment) -> BTreeMap<String, String> {
    let table = Table::try_from(experiment).expect("an experiment is tables, lists, strings and numbers");
    let mut settings = BTreeMap::new();
    for (section, keys) in &table {
        for (key, value) in keys.as_table().into_iter().flatten() {
            settings.insert(format!("{section}.{key}"), value.to_string());
        }
    }
    let by_process = COMPARED_BY_CONTENT.iter().chain(&[TOKENIZER, "run.out_dir"]);
    by_process.for_each(|key| drop(settings.remove(*key)));
    settings
}

/// The digests of a run's inputs by what they are of, for a comparison of processes.
pub(super) fn facts(inputs: &Inputs) -> BTreeMap<String, String> {
    let Inputs { train, valid, tokenizer, teacher, start } = inputs;
    let missing = || "missing".to_string();
    let facts = [
        ("the training text (data.train)", train.clone()),
        ("the validation text (data.valid)", valid.clone()),
        ("the tokenizer (data.tokenizer)", tokenizer.clone()),
        ("the teacher (distill.teacher)", teacher.clone().unwrap_or_else(missing)),
        ("the model to start from (run.start_from)", start.clone().unwrap_or_else(missing)),
    ];
    // Enough digits to tell two apart.
    facts.map(|(name, digest)| (name.into(), digest.chars().take(12).collect())).into()
}

/// The keys that are compared by value, with their values.
fn settings(experiment: &Table) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    for (section, keys) in experiment {
        for (key, value) in keys.as_table().into_iter().flatten() {
            let key = format!("{section}.{key}");
            if !NOT_COMPARED.contains(&&*key) && !COMPARED_BY_CONTENT.contains(&&*key) && key != "run.steps" {
                settings.insert(key, value.to_string());
            }
        }
    }
    let data = |key: &str| experiment.get("data").and_then(|data| data.get(key));
    let kind =
        data("tokenizer").and_then(Value::as_str).filter(|kind| ["byte", "char", "bpe"].contains(kind));
    settings.insert(TOKENIZER.into(), kind.unwrap_or("a file").into());
    if kind != Some("bpe") {
        settings.remove("data.bpe_vocab_size");
    }
    if data("valid").and_then(Value::as_array).is_some_and(|valid| !valid.is_empty()) {
        settings.remove("data.valid_fraction");
    }
    settings
}

/// The difference between a run of `was` steps, of which `done` are done, and one of `now`.
fn steps_differ(was: usize, now: usize, done: usize, schedule: &ScheduleConfig) -> Option<String> {
    if now == was {
        return None;
    }
    if now < done {
        return Some(format!("run.steps is {now}, but {done} of {was} are done"));
    }
    let [before, after] = [was, now].map(|steps| Schedule::new(schedule, steps));
    let (key, step) = before.first_difference(&after, done)?;
    Some(format!(
        "run.steps is {now}, in the run {was}: {key} depends on run.steps, and with {now} steps would have had another value at \
         step {}, which is done ({done} are)",
        step + 1
    ))
}

fn expect_none(differences: Vec<String>, run_dir: &Path) -> Result<(), TrainError> {
    match differences.is_empty() {
        true => Ok(()),
        false => Err(TrainError::OtherRun { path: run_dir.into(), differences }),
    }
}

/// SHA-256 of a model's shape and tensors, independent of its name and path.
pub(crate) fn model_digest(model: &PackedModel) -> String {
    let mut digest = Sha256::new();
    let spec = serde_json::to_vec(&model.spec).expect("names and numbers are JSON");
    digest.update(spec);
    for (name, tensor) in &model.tensors {
        digest.update(format!("{name} {:?} {:?}\n", tensor.shape(), tensor.encoding()));
        digest.update(tensor.bytes());
    }
    for (name, pair) in model.adapter.iter().flat_map(|adapter| &adapter.pairs) {
        digest.update(format!("{name} {} {:?}\n", pair.rank(), pair.alpha()));
        digest.update(bytemuck::cast_slice::<f32, u8>(pair.a()));
        digest.update(bytemuck::cast_slice::<f32, u8>(pair.b()));
    }
    hex(&digest.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_device_is_a_warning_and_no_difference() {
        let on = |device: Option<&str>| Identity { device: device.map(String::from), ..Identity::default() };
        let flex = on(Some("flex (EPYC)"));
        let warning = flex.other_device(&on(Some("wgpu (H100)"))).unwrap();
        assert!(warning.contains("on wgpu (H100) and continues on flex (EPYC)"), "{warning}");
        for same in [on(Some("flex (EPYC)")), on(None)] {
            assert_eq!(flex.other_device(&same), None);
            assert_eq!(flex.differences(&same), [""; 0]);
        }
    }
}
