//! [`Ranks`]: the processes of a run, and what they agree on.
//!
//! Process 0 writes the run folder; the others have a private scratch folder, which is removed when they end. An error on one
//! process ends all of them, at the next point where they agree: [`Ranks::agree`].

use super::TrainError;
use super::checkpoint::{Checkpoints, Loaded};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};
use ternary_format::disk;
use ternary_parallel::{Alone, Group, Phase, Watchdog};

/// Exit code of a process that has given up waiting for the others.
pub(super) const LOST_PROCESS: u8 = 8;

/// The processes of a run.
#[derive(Clone)]
pub(super) struct Ranks {
    group: Arc<Watchdog<Arc<dyn Group>>>,
}

/// What all processes must have in common, by name.
pub(super) type Facts = BTreeMap<String, String>;

impl Ranks {
    /// The processes of `group`, which may keep each other waiting for `timeout`; without a group, this one alone.
    pub fn new(group: Option<Arc<dyn Group>>, timeout: Option<Duration>) -> Self {
        let group = group.unwrap_or_else(|| Arc::new(Alone));
        let group = Watchdog::new(group, timeout, LOST_PROCESS);
        group
            .advise("there is no checkpoint yet; the same command with --resume starts the run again".into());
        Self { group: Arc::new(group) }
    }

    pub fn group(&self) -> Arc<dyn Group> {
        self.group.clone()
    }

    /// Whether this process writes the files, prints, and draws.
    pub fn is_first(&self) -> bool {
        self.group.is_first()
    }

    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// Sets what the processes wait for from now on.
    pub fn enter(&self, phase: Phase) {
        self.group.enter(phase);
    }

    /// Notes the duration of a step, which limits how long the next ones may wait.
    pub fn stepped(&self, duration: Duration) {
        self.group.stepped(duration);
    }

    /// Sets the folder that is removed if this process gives up waiting.
    pub fn remove_at_exit(&self, folder: &Path) {
        self.group.remove_at_exit(folder);
    }

    /// Sets where the last checkpoint is.
    pub fn saved(&self, checkpoint: &Path) {
        let checkpoint = checkpoint.display();
        self.group.advise(format!(
            "the last checkpoint is {checkpoint}; the same command with --resume continues from it, on any number of processes"
        ));
    }

    /// `result`, if it is good on every process. Otherwise the error of the first process that has one, there; the others have
    /// [`TrainError::Elsewhere`], so that one process reports it.
    ///
    /// # Errors
    /// As described.
    pub fn agree<T>(&self, result: Result<T, TrainError>) -> Result<T, TrainError> {
        if self.size() == 1 {
            return result;
        }
        let code = result.as_ref().err().map_or(0, TrainError::exit_code);
        let codes = self.group.gather(&[code, result.is_err().into()]);
        let Some(first) = codes.iter().position(|code| code[1] == 1) else { return result };
        let exit_code = codes[first][0];
        match result {
            Err(source) if first == self.rank() => {
                Err(TrainError::Rank { name: self.group.name(), source: source.into() })
            }
            _ => Err(TrainError::Elsewhere { exit_code }),
        }
    }

    /// An error that all processes have alike, or that they have agreed on: process 0 reports the former.
    pub fn reported_once(&self, error: TrainError) -> TrainError {
        match error {
            agreed @ (TrainError::Rank { .. } | TrainError::Elsewhere { .. }) => agreed,
            common if self.is_first() => common,
            common => TrainError::Elsewhere { exit_code: common.exit_code() },
        }
    }

    /// `work` on process 0; the default value on the others.
    pub fn on_first<T: Default>(
        &self,
        work: impl FnOnce() -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        if self.is_first() { work() } else { Ok(T::default()) }
    }

    /// The number of process 0.
    pub fn number_of_first(&self, number: usize) -> usize {
        self.group.gather_numbers(&[number as f64])[0] as usize
    }

    /// Checks that all processes have the same `facts`.
    ///
    /// # Errors
    /// `Ranks`: every fact that differs from that of process 0, with the process.
    pub fn expect_same(&self, facts: &Facts) -> Result<(), TrainError> {
        if self.size() == 1 {
            return Ok(());
        }
        let own = serde_json::to_vec(&(self.group.host(), facts)).expect("a map of strings is JSON");
        let all = self.group.gather(&own);
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<(String, Facts)>(bytes).unwrap_or_default();
        let all: Vec<_> = all.iter().map(read).collect();
        let differences = differences(&all);
        if differences.is_empty() {
            return Ok(());
        }
        // All processes see them; one reports.
        self.agree(if self.is_first() { Err(TrainError::Ranks { differences }) } else { Ok(()) })
    }

    /// The checkpoint that process 0 has found, on all processes: its files are copied to `scratch`, since another machine may not
    /// see the run folder.
    ///
    /// # Errors
    /// That of process 0. `Checkpoint`, `Write`: the copy cannot be written or read.
    pub fn share_checkpoint(
        &self,
        found: Result<Option<Loaded>, TrainError>,
        scratch: &Path,
    ) -> Result<Option<Loaded>, TrainError> {
        if self.size() == 1 {
            return found;
        }
        let found = self.agree(found)?;
        let files = self.agree(self.on_first(|| match &found {
            Some(loaded) => Ok(file_names(&loaded.path)?),
            None => Ok(Vec::new()),
        }))?;
        let mut names = serde_json::to_vec(&files).expect("names are JSON");
        self.group.broadcast(&mut names);
        let names: Vec<String> = serde_json::from_slice(&names).unwrap_or_default();
        let Some((folder, names)) = names.split_first() else { return Ok(found) };
        let checkpoints = scratch.join("checkpoints");
        let copy = checkpoints.join(folder);
        let mut written = if self.is_first() { Ok(()) } else { replace_folder(&checkpoints, &copy) };
        for name in names {
            let read = self.on_first(|| match &found {
                Some(loaded) => read(&loaded.path.join(name)),
                None => Ok(Vec::new()),
            });
            let mut bytes = self.agree(read)?;
            self.group.broadcast(&mut bytes);
            if !self.is_first() && written.is_ok() {
                written = disk::write_new(&copy.join(name), &bytes);
            }
        }
        let written = written.map_err(|source| TrainError::Write { path: copy.clone(), source });
        self.agree(written)?;
        let loaded =
            if self.is_first() { Ok(found) } else { Checkpoints::existing(&checkpoints).latest_good() };
        self.agree(loaded.map_err(TrainError::from))
    }

    /// The bytes of process 0, on all processes.
    ///
    /// # Errors
    /// That of process 0.
    pub fn broadcast(&self, bytes: Result<Vec<u8>, TrainError>) -> Result<Vec<u8>, TrainError> {
        let mut bytes = self.agree(bytes)?;
        self.group.broadcast(&mut bytes);
        Ok(bytes)
    }
}

/// A sentence for each process and fact that differs from that of process 0.
fn differences(all: &[(String, Facts)]) -> Vec<String> {
    let Some((_, first)) = all.first() else { return Vec::new() };
    let mut differences = Vec::new();
    for (rank, (host, facts)) in all.iter().enumerate() {
        let names = first.keys().chain(facts.keys().filter(|name| !first.contains_key(*name)));
        for name in names.filter(|name| first.get(*name) != facts.get(*name)) {
            let value = |facts: &Facts| facts.get(name).map_or("missing", String::as_str).to_string();
            let (here, there) = (value(facts), value(first));
            differences.push(format!("rank {rank} (host {host}): {name} is {here}, on rank 0 {there}"));
        }
    }
    differences
}

/// The name of a folder, and those of its files.
fn file_names(folder: &Path) -> Result<Vec<String>, TrainError> {
    let at = |source| TrainError::Read { path: folder.into(), source };
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = fs::read_dir(folder).map_err(at)?;
    let files = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = vec![name];
    names.extend(files.collect::<io::Result<Vec<_>>>().map_err(at)?);
    Ok(names)
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    disk::read(path).map_err(|source| TrainError::Read { path: path.into(), source })
}

/// Makes `folder` the only one in `parent`.
fn replace_folder(parent: &Path, folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(parent) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::create_dir_all(folder),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ternary_parallel::Threads;

    fn on_ranks<T: Send>(size: usize, program: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
        let program = &program;
        std::thread::scope(|scope| {
            let ranks = Threads::group(size)
                .into_iter()
                .map(|rank| scope.spawn(move || program(Ranks::new(Some(Arc::new(rank)), None))));
            ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn one_process_reports_the_first_error_and_all_end() {
        let errors = on_ranks(3, |ranks| {
            let own = match ranks.rank() {
                0 => Ok(()),
                rank => Err(TrainError::Experiment { origin: format!("x{rank}"), message: "bad".into() }),
            };
            let error = ranks.agree(own).unwrap_err();
            ranks.agree(Ok(())).unwrap();
            (error.to_string(), error.exit_code(), error.is_reported())
        });
        assert!(errors.iter().all(|(_, code, _)| *code == 2));
        assert_eq!(errors.iter().map(|(.., reported)| *reported).collect::<Vec<_>>(), [true, false, true]);
        assert!(errors[1].0.starts_with("rank 1 of 3 (host "), "{}", errors[1].0);
        assert!(errors[1].0.ends_with("x1: bad"), "{}", errors[1].0);
    }

    #[test]
    fn who_differs_is_named() {
        let errors = on_ranks(3, |ranks| {
            let lr = if ranks.rank() == 2 { "0.2" } else { "0.1" };
            let facts = Facts::from([("optim.lr".into(), lr.into()), ("program".into(), "1".into())]);
            ranks.expect_same(&facts).unwrap_err().to_string()
        });
        assert!(errors[0].contains("rank 2 (host "), "{}", errors[0]);
        assert!(errors[0].contains("optim.lr is 0.2, on rank 0 0.1"), "{}", errors[0]);
        assert!(!errors[0].contains("program is") && !errors[0].contains("rank 1 ("), "{}", errors[0]);
    }

    #[test]
    fn one_process_alone_agrees_with_itself() {
        let ranks = Ranks::new(None, None);
        assert!(ranks.is_first() && ranks.number_of_first(7) == 7);
        let error = ranks.agree::<()>(Err(TrainError::Burn("shape".into()))).unwrap_err();
        assert_eq!(error.to_string(), "shape");
    }
}
