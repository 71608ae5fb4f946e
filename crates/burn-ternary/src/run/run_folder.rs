use super::checkpoint::{CheckpointError, Checkpoints, Loaded};
use super::{Experiment, TrainError};
use crate::data::{chat::Special, has_token_files, makes_chat_model, tokenizer};
use crate::device::device;
use crate::export::{ExportError, export_for_inference};
use crate::import::ImportError;
use crate::nn::DuckQuantized;
use crate::report::{RunResult, write_atomic};
use crate::train::restore;
use crate::train::schedule::Schedule;
use burn::module::Module;
use burn::tensor::Device;
use std::{
    cmp::Reverse,
    fs, io,
    path::{Path, PathBuf},
};
use ternary_format::{PackedModel, Tokenizer, chat, disk, memory, print_stderr, read_model};

/// The model of a run folder, for use after the run.
pub struct SavedRun {
    /// The resolved settings of the run.
    pub experiment: Experiment,
    /// The tokenizer of its texts.
    pub tokenizer: Tokenizer,
    /// The model of the last good checkpoint, without autodiff.
    pub model: DuckQuantized,
    /// Jinja template of dialogues; `None` where the model has seen none.
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
        let chat_template = read_template(run_dir, &experiment)?;
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
        let model = restore(model, &experiment.optim, loaded.model)
            .map_err(|error| CheckpointError::unfit(&loaded.path, error))?
            .valid();
        schedule.apply(last_step, model.schedule_handle());
        Ok(Self { experiment, tokenizer, model, chat_template })
    }

    /// The model as model files have it, under the name of the run.
    ///
    /// # Errors
    /// As [`export_for_inference`].
    pub fn export(&self) -> Result<PackedModel, ExportError> {
        let packed = export_for_inference(&self.model, Some(&self.tokenizer), &self.experiment.run.name)?;
        Ok(packed.with_chat_template(self.chat_template.clone()))
    }
}

/// File of the chat template in a run folder.
const TEMPLATE: &str = "chat_template.jinja";

/// Writes the chat template of a run's model, for models that are exported from a checkpoint; removes it where there is none.
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

/// The template that [`write_template`] wrote. Folders of earlier versions have no such file: theirs is our own template if their
/// texts have dialogues, as their token files show, or their sample prompts where the token files were removed.
fn read_template(run_dir: &Path, experiment: &Experiment) -> Result<Option<String>, TrainError> {
    let path = run_dir.join(TEMPLATE);
    match disk::read_to_string(&path) {
        Ok(template) => Ok(Some(template)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            let asks = |prompt: &String| prompt.starts_with(Special::User.text());
            let dialogues = match has_token_files(run_dir) {
                true => makes_chat_model(run_dir),
                false => experiment.run.sample_prompts.iter().any(asks),
            };
            Ok(dialogues.then(|| chat::TEMPLATE.into()))
        }
        Err(source) => Err(TrainError::Read { path, source }),
    }
}

/// Checks that the settings of a run folder make a model which its checkpoint can fill and which fits into memory: the folder
/// may come from anyone.
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

/// A CPU device for export-only work. It avoids initializing a GPU and tuning its kernels.
pub(super) fn host() -> Result<Device, TrainError> {
    Ok(device("flex").or_else(|_| device("auto"))?)
}

pub(super) fn is_run(path: &Path) -> bool {
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

/// The last good checkpoint of a run folder; `None` where its run has none yet.
///
/// # Errors
/// `Experiment`: the run has ended, and its checkpoints are gone.
pub(super) fn last_checkpoint(run_dir: &Path) -> Result<Option<Loaded>, TrainError> {
    let loaded = Checkpoints::existing(run_dir.join("checkpoints")).latest_good()?;
    if loaded.is_none() && RunResult::read(&run_dir.join("result.json")).is_ok_and(|result| result.steps > 0)
    {
        let message = "holds a run that has ended, without a checkpoint; expected its checkpoints, or another run.name or \
                       run.seed (`train --overwrite` moves the run aside)";
        return Err(TrainError::Experiment {
            origin: run_dir.display().to_string(),
            message: message.into(),
        });
    }
    Ok(loaded)
}

/// The checkpoint that `--resume` continues; warns of those that were refused. `None`: there is no run, or it was killed before its
/// first checkpoint.
///
/// # Errors
/// As [`last_checkpoint`].
pub(super) fn checkpoint_to_resume(run_dir: &Path) -> Result<Option<Loaded>, TrainError> {
    let Some(loaded) = last_checkpoint(run_dir)? else {
        let run = run_dir.display();
        match is_run(run_dir) {
            true => print_stderr(format_args!("{run}: no checkpoint yet, starting from the first step")),
            false => {
                let similar = match &similar_runs(run_dir)[..] {
                    [] => String::new(),
                    names => format!(" (runs with similar names: {})", names.join(", ")),
                };
                print_stderr(format_args!("no run to resume in {run}: starting a new one{similar}"));
            }
        }
        return Ok(None);
    };
    for refusal in &loaded.refused {
        print_stderr(format_args!("warning: {refusal}"));
    }
    Ok(Some(loaded))
}

/// At most three runs in the folder of `run_dir` whose names begin like its name, the most similar first.
fn similar_runs(run_dir: &Path) -> Vec<String> {
    const FEWEST_COMMON: usize = 3;
    const MOST_NAMES: usize = 3;
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let own = name(run_dir);
    let common = |other: &str| own.chars().zip(other.chars()).take_while(|(a, b)| a == b).count();
    let folder = run_dir.parent().and_then(|folder| fs::read_dir(folder).ok());
    let runs = folder.into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| is_run(path));
    let mut names: Vec<_> =
        runs.map(|path| name(&path)).filter(|name| common(name) >= FEWEST_COMMON).collect();
    names.sort_by_cached_key(|name| (Reverse(common(name)), name.clone()));
    names.truncate(MOST_NAMES);
    names
}

/// Removes the results of an earlier end of the run, which would not describe it any more once it continues. They can be made
/// again from the checkpoint.
pub(super) fn remove_results(run_dir: &Path) -> Result<(), TrainError> {
    let at = |name: &str| run_dir.join(name);
    let remove = |path: PathBuf, removed: io::Result<()>| match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(TrainError::Write { path, source }),
        _ => Ok(()),
    };
    for name in ["result.json", "model.gguf", "loss.svg", "codes.svg"] {
        remove(at(name), fs::remove_file(at(name)))?;
    }
    remove(at("adapter"), disk::remove_folder(&at("adapter")))
}

/// The chat template of a run's model: that of its training dialogues, otherwise that of the initial model. Where that model is
/// gone, a resumed run takes the template in its folder.
pub(super) fn chat_template(
    chats: bool,
    experiment: &Experiment,
    start: Option<&PackedModel>,
    run_dir: &Path,
) -> Result<Option<String>, TrainError> {
    match start {
        _ if chats => Ok(Some(chat::TEMPLATE.into())),
        Some(start) => Ok(start.chat_template.clone()),
        None if experiment.run.start_from.is_empty() => Ok(None),
        None => read_template(run_dir, experiment),
    }
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    write_atomic(path, bytes).map_err(|source| TrainError::Write { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similar_runs_are_named_the_most_similar_first() {
        let home = tempfile::tempdir().unwrap();
        for name in ["poems-1", "poems-12", "poem-1", "po-1", "verse-1", "pond-1"] {
            fs::create_dir(home.path().join(name)).unwrap();
            fs::write(home.path().join(name).join("experiment.toml"), "").unwrap();
        }
        fs::create_dir(home.path().join("poems-2.old")).unwrap();
        let similar = |name: &str| similar_runs(&home.path().join(name));
        assert_eq!(similar("poems-2"), ["poems-1", "poems-12", "poem-1"]);
        assert_eq!(similar("duck-1"), [""; 0]);
        assert_eq!(similar_runs(Path::new("missing/poems-2")), [""; 0]);
    }
}
