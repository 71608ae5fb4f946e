//! Promise: a run folder has one writer, and no file that is not the run's is touched.

use crate::resume::{losses, tensors};
use burn_ternary::run::{
    Experiment, LockError, RunLock, RunOptions, SavedRun, TrainCommand, TrainError, cache_teacher_logits,
    checkpoint::Checkpoints, packed_model, run,
};
use clap::Parser;
use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// Set in a child process: the command line that it runs, one argument per line.
const CHILD: &str = "BURN_TERNARY_FOLDER_CHILD";

const SMALL: &str = "train --quiet --device flex --batch-size 2 --set run.name=one \
                     --set run.sample_tokens=2 --set run.eval_windows=2 --set run.log_every=1 \
                     --set run.checkpoint_every=4 --set model.context=16 --set model.d_model=64 --set model.d_ff=64 \
                     --set model.n_layers=1 --set model.n_heads=2 --set model.n_kv_heads=2";

/// A small run in `out`.
fn arguments(out: &Path, more: &[&str]) -> Vec<String> {
    let own = ["--out", out.to_str().unwrap()];
    let tokenizer = ["--tokenizer", "byte"].into_iter().filter(|_| !more.contains(&"--tokenizer"));
    let all = SMALL.split_whitespace().chain(own).chain(tokenizer).chain(more.iter().copied());
    all.map(String::from).collect()
}

fn command(out: &Path, more: &[&str]) -> TrainCommand {
    TrainCommand::try_parse_from(arguments(out, more)).unwrap()
}

fn experiment(out: &Path, more: &[&str]) -> Experiment {
    command(out, more).experiment().unwrap()
}

#[test]
fn child_process_of_the_folder_tests() {
    let Ok(arguments) = env::var(CHILD) else { return };
    let result = TrainCommand::try_parse_from(arguments.lines()).unwrap().run();
    let code = result.map_or_else(
        |error| {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            error.exit_code()
        },
        |_| 0,
    );
    std::process::exit(code.into());
}

fn start(out: &Path, more: &[&str]) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "folder::child_process_of_the_folder_tests", "--nocapture"])
        .env(CHILD, arguments(out, more).join("\n"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn last_checkpoint(run_dir: &Path) -> PathBuf {
    let entries = fs::read_dir(run_dir.join("checkpoints")).unwrap();
    entries.map(|entry| entry.unwrap().path()).max().unwrap()
}

fn assert_is_as_if_alone(run_dir: &Path, alone: &Path) {
    let samples = |run_dir: &Path| fs::read_to_string(run_dir.join("samples.txt")).unwrap();
    assert_eq!(losses(run_dir), losses(alone));
    assert_eq!(samples(run_dir), samples(alone));
    assert!(tensors(&last_checkpoint(run_dir)) == tensors(&last_checkpoint(alone)), "the weights differ");
    for model in ["model.gguf", "tokenizer.json", "train.tokens"] {
        assert!(
            fs::read(run_dir.join(model)).unwrap() == fs::read(alone.join(model)).unwrap(),
            "{model} differs"
        );
    }
}

#[test]
fn of_eight_runs_started_with_one_name_exactly_one_trains() {
    let out = tempfile::tempdir().unwrap();
    let rates: Vec<String> = (1..=8).map(|n| format!("{n}e-3")).collect();
    let more = |rate| ["--steps", "60", "--lr", rate];
    let children: Vec<Child> =
        rates.iter().map(|rate| start(&out.path().join("runs"), &more(rate))).collect();
    let ids: Vec<u32> = children.iter().map(Child::id).collect();
    let ended: Vec<(Option<i32>, String)> = children
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        })
        .collect();
    let winners: Vec<usize> = (0..8).filter(|&i| ended[i].0 == Some(0)).collect();
    let [winner] = winners[..] else { panic!("{ended:?}") };
    for (i, (code, error)) in ended.iter().enumerate().filter(|(i, _)| *i != winner) {
        assert_eq!(*code, Some(2), "{i}: {error}");
        // A late process finds a finished run.
        let named =
            error.contains(&format!("process {}", ids[winner])) || error.contains("--resume continues it");
        assert!(named || error.contains("another process"), "{i}: {error}");
    }
    let run_dir = experiment(&out.path().join("runs"), &[]).run_dir();
    let written = Experiment::load(run_dir.join("experiment.toml")).unwrap();
    assert_eq!(written.optim.lr, rates[winner].parse::<f64>().unwrap());
    let alone = command(&out.path().join("alone"), &more(&rates[winner]));
    alone.run().unwrap();
    assert_is_as_if_alone(&run_dir, &alone.experiment().unwrap().run_dir());
    assert_eq!(fs::read_dir(out.path().join("runs")).unwrap().count(), 1);
}

#[test]
fn a_folder_of_a_running_training_has_no_other_writer() {
    let out = tempfile::tempdir().unwrap();
    let steps = ["--steps", "400"];
    let mut child = start(out.path(), &steps);
    let experiment = experiment(out.path(), &steps);
    let run_dir = experiment.run_dir();
    while !run_dir.join("checkpoints/step-00000004").exists() && losses_so_far(&run_dir) < 8 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was looked at");
        thread::sleep(Duration::from_millis(10));
    }
    let quiet = RunOptions::default().with_quiet(true);
    let refusals = [
        command(out.path(), &[&steps[..], &["--resume"]].concat()).run().map(drop),
        command(out.path(), &[&steps[..], &["--overwrite"]].concat()).run().map(drop),
        command(out.path(), &steps).run().map(drop),
        run(experiment.clone(), &quiet).map(drop),
        run(experiment.clone(), &quiet.with_resume(true)).map(drop),
        cache_teacher_logits(experiment.clone(), 4, &out.path().join("teacher.logits"), |_, _| ()),
    ];
    // Readers need no lock.
    SavedRun::open(&run_dir, &burn_ternary::device::device("flex").unwrap()).unwrap();
    assert!(child.try_wait().unwrap().is_none(), "it ended before all were refused");
    for refusal in refusals {
        let error = refusal.unwrap_err();
        assert!(matches!(error, TrainError::Lock(LockError::Held { .. })), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(&format!("process {}", child.id())), "{error}");
    }
    assert!(child.wait().unwrap().success());
    let alone = out.path().join("alone");
    command(&alone, &steps).run().unwrap();
    assert_is_as_if_alone(&run_dir, &self::experiment(&alone, &steps).run_dir());
    assert!(!out.path().join("one-1.old-1").exists());
}

fn losses_so_far(run_dir: &Path) -> usize {
    fs::read_to_string(run_dir.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

#[test]
fn a_killed_process_leaves_no_lock_and_no_scratch_file() {
    let out = tempfile::tempdir().unwrap();
    let steps = ["--steps", "4000"];
    let run_dir = experiment(out.path(), &steps).run_dir();
    let mut child = start(out.path(), &steps);
    while losses_so_far(&run_dir) < 8 {
        thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read_to_string(run_dir.join("run.lock")).unwrap(), format!("{}\n", child.id()));
    fs::write(run_dir.join(".ternary-abcdefghijkl.partial"), "half").unwrap();
    fs::write(run_dir.join("notes.partial"), "mine").unwrap();
    drop(RunLock::acquire(&run_dir).unwrap());
    assert_eq!(fs::read(run_dir.join("run.lock")).unwrap(), b"");
    assert!(!run_dir.join(".ternary-abcdefghijkl.partial").exists());
    assert_eq!(fs::read_to_string(run_dir.join("notes.partial")).unwrap(), "mine");
}

#[test]
fn a_run_whose_folder_was_moved_away_writes_into_no_other() {
    let out = tempfile::tempdir().unwrap();
    let steps = ["--steps", "4000"];
    let run_dir = experiment(out.path(), &steps).run_dir();
    let child = start(out.path(), &steps);
    while losses_so_far(&run_dir) < 8 {
        thread::sleep(Duration::from_millis(10));
    }
    fs::rename(&run_dir, out.path().join("kept")).unwrap();
    let other = RunLock::acquire(&run_dir).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(5), "{error}");
    assert!(error.contains("was moved or removed"), "{error}");
    drop(other);
    let names: Vec<_> = fs::read_dir(&run_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["run.lock"]);
}

/// A run folder from a stranger may contain links with the names of our files and of our scratch files.
#[cfg(unix)]
#[test]
fn links_in_a_run_folder_are_replaced_not_followed() {
    use std::os::unix::fs::symlink;
    let out = tempfile::tempdir().unwrap();
    let short = command(out.path(), &["--steps", "12"]);
    short.run().unwrap();
    let run_dir = short.experiment().unwrap().run_dir();
    let before = (losses(&run_dir), tensors(&last_checkpoint(&run_dir)));
    // The run still has steps to do.
    fs::remove_dir_all(last_checkpoint(&run_dir)).unwrap();
    let mine = out.path().join("mine");
    fs::create_dir(&mine).unwrap();
    // Files that are read again must be those of the run; the others may be anything.
    let files =
        ["metrics.jsonl", "samples.txt", "experiment.toml", "result.json", "tokenizer.json", "model.gguf"];
    let more = ["loss.svg", "codes.svg", "train.tokens", "valid.tokens", "valid.jsonl", "run.lock"];
    for name in files.into_iter().chain(more) {
        fs::rename(run_dir.join(name), mine.join(name)).unwrap();
        symlink(mine.join(name), run_dir.join(name)).unwrap();
        for scratch in [".scratch", ".partial"] {
            fs::write(mine.join(format!("{name}{scratch}")), "mine").unwrap();
            symlink(mine.join(format!("{name}{scratch}")), run_dir.join(format!("{name}{scratch}"))).unwrap();
        }
    }
    let contents = || {
        let mut files: Vec<_> = fs::read_dir(&mine).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect::<Vec<_>>()
    };
    let expected = contents();
    command(out.path(), &["--steps", "12", "--resume"]).run().unwrap();
    assert!(contents() == expected, "a target was changed");
    assert!(before == (losses(&run_dir), tensors(&last_checkpoint(&run_dir))), "another run came out");
    for name in files.into_iter().chain(["loss.svg", "codes.svg", "run.lock"]) {
        assert!(fs::symlink_metadata(run_dir.join(name)).unwrap().is_file(), "{name} is a link still");
    }
}

#[test]
fn readers_change_nothing() {
    let out = tempfile::tempdir().unwrap();
    let experiment = experiment(out.path(), &["--steps", "1"]);
    let run_dir = experiment.run_dir();
    run(experiment, &RunOptions::default().with_quiet(true)).unwrap();
    fs::remove_dir_all(run_dir.join("checkpoints")).unwrap();
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(&run_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let error = packed_model(&run_dir).unwrap_err();
    assert!(error.to_string().contains("expected a checkpoint, found none"), "{error}");
    assert_eq!(names(), before);
}

/// A checkpoint with correct checksums, but without the tensors of this model.
#[test]
fn a_checkpoint_that_lacks_a_tensor_is_a_data_error() {
    use burn::{module::Module, nn::LinearConfig};
    let out = tempfile::tempdir().unwrap();
    let short = command(out.path(), &["--steps", "4"]);
    short.run().unwrap();
    let run_dir = short.experiment().unwrap().run_dir();
    let checkpoints = Checkpoints::open(run_dir.join("checkpoints"), 1, 1).unwrap();
    let loaded = checkpoints.latest_good().unwrap().unwrap();
    let device = burn_ternary::device::device("flex").unwrap().autodiff();
    let other = LinearConfig::new(2, 2).init(&device).into_record();
    checkpoints
        .save(other, loaded.optimizer, &loaded.state, &loaded.identity.unwrap(), loaded.codes.as_deref())
        .unwrap();
    for error in [
        command(out.path(), &["--steps", "4", "--resume"]).run().unwrap_err(),
        packed_model(&run_dir).unwrap_err(),
    ] {
        assert_eq!(error.exit_code(), 3, "{error}");
        assert!(error.to_string().contains("step-00000004: model.bpk does not hold"), "{error}");
    }
}

/// A FIFO may never get a writer, so it is refused instead of opened.
#[cfg(unix)]
#[test]
fn every_input_is_a_plain_file() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        path.to_str().unwrap().to_owned()
    };
    let out = dir.path().join("runs");
    let refused = |arguments: &[&str]| {
        let (arguments, out) = (arguments.iter().map(ToString::to_string).collect::<Vec<_>>(), out.clone());
        let (said, hears) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let error = match TrainCommand::try_parse_from(self::arguments(&out, &arguments)).unwrap().run() {
                Ok(_) => panic!("it ran"),
                Err(error) => error,
            };
            said.send((error.exit_code(), error.to_string())).unwrap();
        });
        // One second would do on an idle machine, but tests run in parallel.
        hears.recv_timeout(Duration::from_secs(20)).expect("an error at once")
    };
    for (arguments, code) in [
        (&[&*fifo("experiment.toml")][..], 2),
        (&["--data", &fifo("text.txt")], 3),
        (&["--data", Path::new(&fifo("texts/text.jsonl")).parent().unwrap().to_str().unwrap()], 3),
        (&["--tokenizer", &fifo("tokenizer.json")], 3),
        (&["--tokenizer", Path::new(&fifo("model/tokenizer.json")).parent().unwrap().to_str().unwrap()], 3),
        (&["--tokenizer", &fifo("tokens.gguf")], 3),
        (&["--set", &format!("distill.teacher={}", fifo("teacher.logits"))], 3),
        (&["--set", &format!("run.start_from={}", fifo("start.ternary"))], 3),
    ] {
        let (found, error) = refused(arguments);
        assert!(error.contains("expected a plain file, found a FIFO"), "{arguments:?}: {error}");
        assert_eq!(found, code, "{error}");
        let _ = fs::remove_dir_all(&out);
    }
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("zero.txt")).unwrap();
    let (_, error) = refused(&["--data", dir.path().join("zero.txt").to_str().unwrap()]);
    assert!(error.contains("found a device"), "{error}");
}
