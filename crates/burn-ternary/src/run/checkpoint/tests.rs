//! Promise: a checkpoint is whole or it is none, and gives back what was saved.

use super::*;
use burn::{
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Distribution, Tensor},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{
    env,
    process::{self, Command},
    thread,
    time::Duration,
};
use tempfile::TempDir;

const FILES: [&str; 4] = [MODEL, OPTIMIZER, MANIFEST, MANIFEST_HASH];

#[derive(Module, Debug)]
struct Tiny {
    first: Linear,
    second: Linear,
}

impl Tiny {
    fn new(device: &Device) -> Self {
        Self { first: LinearConfig::new(5, 7).init(device), second: LinearConfig::new(7, 3).init(device) }
    }

    fn bits(&self) -> Vec<u32> {
        let bits = |data: burn::tensor::TensorData| data.try_into_vec::<f32>().unwrap();
        [&self.first, &self.second]
            .into_iter()
            .flat_map(|linear| {
                let bias = linear.bias.as_ref().unwrap().val().into_data();
                [bits(linear.weight.val().into_data()), bits(bias)].concat()
            })
            .map(f32::to_bits)
            .collect()
    }
}

fn autodiff() -> Device {
    Device::flex().autodiff()
}

fn inputs(count: usize) -> Vec<Tensor<2>> {
    let random = |_| Tensor::random([4, 5], Distribution::Default, &autodiff());
    (0..count).map(random).collect()
}

fn train(mut model: Tiny, optimizer: &mut ModuleOptimizer, inputs: &[Tensor<2>]) -> Tiny {
    for input in inputs {
        let hidden = burn::tensor::activation::tanh(model.first.forward(input.clone()));
        let loss = model.second.forward(hidden).powi_scalar(2).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.01, model, gradients);
    }
    model
}

fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().init()
}

fn state(step: usize) -> TrainState {
    TrainState { step, windows_seen: step as u64 * 12, ..TrainState::default() }
}

fn identity() -> Identity {
    Identity { steps: 9, settings: [("optim.lr".into(), "0.1".into())].into(), ..Identity::default() }
}

/// Saves a model after two steps of AdamW, a different one each time.
fn save(checkpoints: &Checkpoints, step: usize) -> PathBuf {
    let mut optimizer = optimizer();
    let model = train(Tiny::new(&autodiff()), &mut optimizer, &inputs(2));
    checkpoints.save(model.into_record(), optimizer.to_record(), &state(step), &identity(), None).unwrap()
}

fn folder() -> (TempDir, Checkpoints) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(dir.path().join("checkpoints"), 3, 1).unwrap();
    (dir, checkpoints)
}

fn latest(checkpoints: &Checkpoints) -> Loaded {
    checkpoints.latest_good().unwrap().unwrap()
}

fn names(checkpoints: &Checkpoints) -> Vec<String> {
    let entries = checkpoints.entries().unwrap();
    let mut names: Vec<_> = entries.iter().map(|path| name(path).to_owned()).collect();
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in FILES {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

/// Replaces a file of the newest of two checkpoints and expects the older one, with the newer one named.
fn refusal_of(checkpoints: &Checkpoints, bad: &Path, file: &str, bytes: &[u8]) -> RefusalReason {
    let path = bad.join(file);
    let good = fs::read(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let loaded = latest(checkpoints);
    fs::write(&path, good).unwrap();
    assert_eq!(loaded.state.step, 1, "{file}");
    assert_eq!(loaded.refused.len(), 1, "{file}");
    assert_eq!(loaded.refused[0].path, bad, "{file}");
    loaded.refused[0].reason.clone()
}

/// Replaces the manifest, and its hash with it.
fn forge(folder: &Path, manifest: &[u8]) {
    fs::write(folder.join(MANIFEST), manifest).unwrap();
    fs::write(folder.join(MANIFEST_HASH), manifest_hash(manifest)).unwrap();
}

#[test]
fn training_goes_on_bit_for_bit() {
    let (_dir, checkpoints) = folder();
    let inputs = inputs(5);
    let mut kept = optimizer();
    let model = train(Tiny::new(&autodiff()), &mut kept, &inputs[..2]);
    let record = model.clone().into_record();
    let path = checkpoints.save(record, kept.to_record(), &state(2), &identity(), None).unwrap();
    assert_eq!(name(&path), "step-00000002");

    let loaded = latest(&checkpoints);
    assert_eq!(loaded.path, path);
    assert_eq!(loaded.state, state(2));
    assert_eq!((loaded.identity, loaded.experiment_sha256), (Some(identity()), None));
    assert_eq!(loaded.refused, []);
    let resumed = Tiny::new(&autodiff()).load_record(loaded.model);
    assert_eq!(resumed.bits(), model.bits());
    let mut restored = optimizer().load_record(loaded.optimizer);

    let forgetful = train(resumed.clone(), &mut optimizer(), &inputs[2..]);
    let resumed = train(resumed, &mut restored, &inputs[2..]);
    let model = train(model, &mut kept, &inputs[2..]);
    assert_eq!(resumed.bits(), model.bits());
    assert_ne!(forgetful.bits(), model.bits(), "the test does not see the optimizer's state");
}

#[test]
fn an_empty_folder_has_no_checkpoint() {
    let (_dir, checkpoints) = folder();
    assert!(checkpoints.latest_good().unwrap().is_none());
    fs::create_dir(checkpoints.dir.join("step-1")).unwrap();
    fs::create_dir(checkpoints.dir.join("step-last")).unwrap();
    assert!(checkpoints.latest_good().unwrap().is_none());
}

#[test]
fn truncated_files_are_refused_by_name() {
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let bad = save(&checkpoints, 2);
    let mut random = ChaCha8Rng::from_os_rng();
    for file in FILES {
        let bytes = fs::read(bad.join(file)).unwrap();
        let mut lengths = vec![0, 1, bytes.len() / 2, bytes.len() - 1];
        lengths.extend((0..20).map(|_| random.random_range(0..bytes.len())));
        for length in lengths {
            let reason = refusal_of(&checkpoints, &bad, file, &bytes[..length]);
            // A shorter manifest shows in its hash.
            assert!(
                matches!(reason, RefusalReason::Length { file: f, found, .. }
                    if f == file && found == length as u64)
                    || matches!(reason, RefusalReason::Altered { file: MANIFEST } if file == MANIFEST),
                "{file} cut to {length}: {reason}"
            );
        }
        refusal_of(&checkpoints, &bad, file, &[&bytes[..], b"\n"].concat());
    }
    assert_eq!(latest(&checkpoints).state.step, 2);
}

#[test]
fn flipped_bits_are_refused_by_name() {
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let bad = save(&checkpoints, 2);
    let mut random = ChaCha8Rng::from_os_rng();
    for file in FILES {
        let bytes = fs::read(bad.join(file)).unwrap();
        for _ in 0..60 {
            let mut altered = bytes.clone();
            altered[random.random_range(0..bytes.len())] ^= 1 << random.random_range(0..8);
            let reason = refusal_of(&checkpoints, &bad, file, &altered);
            // A wrong hash cannot be told from a wrong manifest.
            let file = if file == MANIFEST_HASH { MANIFEST } else { file };
            assert_eq!(reason, RefusalReason::Altered { file });
        }
    }
}

#[test]
fn missing_files_are_refused_by_name() {
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let bad = save(&checkpoints, 2);
    for file in FILES {
        let bytes = fs::read(bad.join(file)).unwrap();
        fs::remove_file(bad.join(file)).unwrap();
        let loaded = latest(&checkpoints);
        assert_eq!(loaded.state.step, 1);
        let refusal = Refusal { path: bad.clone(), reason: RefusalReason::Missing { file } };
        assert_eq!(loaded.refused, [refusal]);
        fs::write(bad.join(file), bytes).unwrap();
    }
}

#[test]
fn hostile_manifests_are_refused() {
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let bad = save(&checkpoints, 2);
    let text = fs::read_to_string(bad.join(MANIFEST)).unwrap();
    let length = fs::metadata(bad.join(MODEL)).unwrap().len();
    let replace = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    };
    let version = replace("\"version\": 1", "\"version\": 2, \"new\": []");
    let manifests = [
        (version, "format version 2, expected 1"),
        (replace("\"step\": 2", "\"step\": 3"), "step 3 in a folder of step 2"),
        (replace("\"step\": 2", "\"step\": -2"), "not valid"),
        (replace("\"bad_steps\": 0,", ""), "bad_steps"),
        (replace("\"bad_steps\": 0,", "\"bad_steps\": 0, \"more\": 0,"), "more"),
        (replace("\"elapsed_s\": \"0.0\"", "\"elapsed_s\": \"soon\""), "soon"),
        (replace(MODEL, "../../../etc/passwd"), "etc/passwd"),
        (replace(&length.to_string(), &u64::MAX.to_string()), "expected 18446744073709551615"),
        ("[".repeat(100_000), "not valid"),
        (" ".repeat(MANIFEST_LIMIT as usize + 1), "expected at most"),
        (String::new(), "not valid"),
    ];
    for (manifest, reason) in manifests {
        forge(&bad, manifest.as_bytes());
        let loaded = latest(&checkpoints);
        assert_eq!(loaded.state.step, 1);
        assert_eq!(loaded.refused[0].path, bad);
        let found = loaded.refused[0].to_string();
        assert!(found.contains(reason) && found.starts_with(bad.to_str().unwrap()), "{found}");
    }
    forge(&bad, text.as_bytes());
    assert_eq!(latest(&checkpoints).state.step, 2);
}

#[test]
fn tensors_that_do_not_parse_are_refused() {
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let bad = save(&checkpoints, 2);
    let text = fs::read_to_string(bad.join(MANIFEST)).unwrap();
    for file in [MODEL, OPTIMIZER] {
        let good = fs::read(bad.join(file)).unwrap();
        let noise: Vec<u8> = good.iter().map(|byte| byte.wrapping_mul(31)).collect();
        for bytes in [&b""[..], b"burn", &good[..good.len() / 2], &noise] {
            fs::write(bad.join(file), bytes).unwrap();
            let manifest = text
                .replace(&sha256(&good), &sha256(bytes))
                .replace(&format!("\"bytes\": {}", good.len()), &format!("\"bytes\": {}", bytes.len()));
            forge(&bad, manifest.as_bytes());
            let loaded = latest(&checkpoints);
            assert_eq!(loaded.state.step, 1);
            let reason = &loaded.refused[0].reason;
            assert!(matches!(reason, RefusalReason::Tensors { file: f, .. } if *f == file), "{reason}");
        }
        fs::write(bad.join(file), good).unwrap();
    }
}

#[test]
fn without_a_good_one_all_are_named() {
    let (_dir, checkpoints) = folder();
    let paths = [1, 2, 3].map(|step| save(&checkpoints, step));
    for path in &paths {
        fs::write(path.join(MODEL), b"").unwrap();
    }
    let error = checkpoints.latest_good().unwrap_err();
    for path in &paths {
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    assert!(matches!(error, CheckpointError::NoneGood { refused, .. } if refused.len() == 3));
}

#[test]
fn the_last_ones_are_kept() {
    let (_dir, checkpoints) = folder();
    for step in [1, 2, 9, 10, 100] {
        save(&checkpoints, step);
    }
    assert_eq!(names(&checkpoints), ["step-00000009", "step-00000010", "step-00000100"]);
    // After a return to step 10: what is later does not crowd out what is good.
    save(&checkpoints, 11);
    save(&checkpoints, 12);
    let later = ["step-00000010", "step-00000011", "step-00000012", "step-00000100"];
    assert_eq!(names(&checkpoints), later);
    let none = Checkpoints::open(&checkpoints.dir, 0, 1).unwrap();
    save(&none, 101);
    assert_eq!(names(&checkpoints), ["step-00000101"]);
    assert_eq!(latest(&checkpoints).state.step, 101);
}

#[test]
fn the_same_step_is_replaced() {
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let path = save(&checkpoints, 2);
    let before = fs::read(path.join(MODEL)).unwrap();
    assert_eq!(save(&checkpoints, 2), path);
    assert_ne!(fs::read(path.join(MODEL)).unwrap(), before);
    assert_eq!(names(&checkpoints), ["step-00000001", "step-00000002"]);
    assert_eq!(latest(&checkpoints).refused, []);
}

#[test]
fn every_kill_point_leaves_a_checkpoint() {
    let stages = ["unfinished", "complete", "aside", "replaced", "half removed", "pruning"];
    for stage in stages {
        let (dir, checkpoints) = folder();
        save(&checkpoints, 1);
        let path = save(&checkpoints, 2);
        // A newer checkpoint of the same step, told apart by its window count.
        let other = Checkpoints::open(dir.path().join("other"), 1, 1).unwrap();
        let newer = TrainState { windows_seen: 99, ..state(2) };
        let record = Tiny::new(&autodiff()).into_record();
        let newer = other.save(record, optimizer().to_record(), &newer, &identity(), None).unwrap();
        let scratch = checkpoints.dir.join(".tmp-step-00000002-77");
        let aside = checkpoints.dir.join(".old-step-00000002");
        match stage {
            "unfinished" => {
                copy(&newer, &scratch);
                fs::remove_file(scratch.join(MANIFEST)).unwrap();
                fs::write(scratch.join("model.bpk.77-0.tmp"), b"half").unwrap();
            }
            "complete" => copy(&newer, &scratch),
            "aside" => {
                copy(&newer, &scratch);
                fs::rename(&path, &aside).unwrap();
            }
            "replaced" | "half removed" => {
                fs::rename(&path, &aside).unwrap();
                copy(&newer, &path);
                if stage == "half removed" {
                    fs::remove_file(aside.join(OPTIMIZER)).unwrap();
                }
            }
            _ => fs::rename(checkpoints.dir.join("step-00000001"), &scratch).unwrap(),
        }
        let windows = if ["replaced", "half removed"].contains(&stage) { 99 } else { 24 };
        let loaded = latest(&checkpoints);
        assert_eq!((loaded.state.step, loaded.state.windows_seen), (2, windows), "{stage}");
        assert_eq!(loaded.refused, [], "{stage}");

        save(&checkpoints, 3);
        let mut expected = vec!["step-00000001", "step-00000002", "step-00000003"];
        if stage == "pruning" {
            expected.remove(0);
        }
        assert_eq!(names(&checkpoints), expected, "{stage}");
        fs::remove_dir_all(checkpoints.dir.join("step-00000003")).unwrap();
        assert_eq!(latest(&checkpoints).state.windows_seen, windows, "{stage}");
    }
}

/// Runs one test of this module in a process of its own, which finds `dir` in its environment.
fn child(test: &str, dir: &Path, limit: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" --exact \"$1\"");
    let path = module_path!().split_once("::").unwrap().1;
    command
        .args(["-c", &script])
        .arg(env::current_exe().unwrap())
        .arg(format!("{path}::{test}"))
        .env(CHILD, dir)
        .stdout(process::Stdio::null());
    command
}

const CHILD: &str = "CHECKPOINT_TEST_DIR";

/// A model of `size * size` weights that are all `value`.
fn constant(size: usize, value: f32) -> Linear {
    let device = Device::flex();
    let mut linear = LinearConfig::new(size, size).with_bias(false).init(&device);
    linear.weight = Param::from_tensor(Tensor::full([size, size], value, &device));
    linear
}

#[cfg(unix)]
#[test]
fn a_killed_process_leaves_a_checkpoint() {
    const TEST: &str = "a_killed_process_leaves_a_checkpoint";
    if let Ok(dir) = env::var(CHILD) {
        let checkpoints = Checkpoints::open(dir, 2, 1).unwrap();
        let start = latest(&checkpoints).state.windows_seen;
        for windows in start + 1.. {
            // Each step three times, so that most saves replace a checkpoint.
            let state = TrainState { windows_seen: windows, ..state(windows as usize / 3) };
            let model = constant(64, windows as f32).into_record();
            checkpoints.save(model, optimizer().to_record(), &state, &identity(), None).unwrap();
        }
    }
    let (_dir, checkpoints) = folder();
    let model = constant(64, 0.0).into_record();
    checkpoints.save(model, optimizer().to_record(), &state(0), &identity(), None).unwrap();
    let mut random = ChaCha8Rng::from_os_rng();
    for _ in 0..20 {
        let mut child = child(TEST, &checkpoints.dir, "unlimited").spawn().unwrap();
        thread::sleep(Duration::from_micros(random.random_range(20_000..120_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let loaded = latest(&checkpoints);
        assert_eq!(loaded.refused, []);
        let windows = loaded.state.windows_seen;
        let weight = constant(64, -1.0).load_record(loaded.model).weight.val();
        let weights = weight.into_data().try_into_vec::<f32>().unwrap();
        assert!(weights.iter().all(|&weight| weight == windows as f32), "{windows}");
    }
    assert!(latest(&checkpoints).state.windows_seen > 0, "the child never saved");
}

#[cfg(unix)]
#[test]
fn a_full_disk_keeps_the_earlier_checkpoints() {
    const TEST: &str = "a_full_disk_keeps_the_earlier_checkpoints";
    const RAN: i32 = 7;
    if let Ok(dir) = env::var(CHILD) {
        let checkpoints = Checkpoints::open(dir, 1, 1).unwrap();
        for (step, size) in [(2, 256), (1, 256), (2, 512)] {
            let model = constant(size, 1.0).into_record();
            let error = checkpoints.save(model, optimizer().to_record(), &state(step), &identity(), None);
            let error = error.unwrap_err().to_string();
            assert!(error.contains(MODEL) && error.contains(&folder_name(step)), "{error}");
            assert_eq!(names(&checkpoints), ["step-00000001"]);
        }
        // The parent checks for it: a test name that matches no test succeeds, too.
        process::exit(RAN);
    }
    // No disk is full here: a limit on the size of files fails the same calls.
    let (_dir, checkpoints) = folder();
    let path = save(&checkpoints, 1);
    let before = FILES.map(|file| fs::read(path.join(file)).unwrap());
    let status = child(TEST, &checkpoints.dir, "64").status().unwrap();
    assert_eq!(status.code(), Some(RAN));
    assert_eq!(FILES.map(|file| fs::read(path.join(file)).unwrap()), before);
    assert_eq!(latest(&checkpoints).refused, []);
}

#[test]
fn a_file_in_place_of_the_folder_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"mine").unwrap();
    for path in [file.clone(), file.join("checkpoints")] {
        let error = Checkpoints::open(&path, 1, 1).unwrap_err();
        assert!(matches!(error, CheckpointError::Write { .. }));
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    let checkpoints = Checkpoints { dir: file.clone(), keep: 1, every: 1 };
    let model = constant(4, 1.0).into_record();
    let error = checkpoints.save(model, optimizer().to_record(), &state(1), &identity(), None);
    assert!(error.unwrap_err().to_string().contains(file.to_str().unwrap()));
}

#[cfg(unix)]
#[test]
fn a_folder_without_permission_is_an_error_that_names_it() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, checkpoints) = folder();
    save(&checkpoints, 1);
    let set = |mode| {
        fs::set_permissions(&checkpoints.dir, fs::Permissions::from_mode(mode)).unwrap();
    };
    set(0o555);
    if fs::write(checkpoints.dir.join("probe"), b"").is_ok() {
        println!("skipped: permissions do not bind this user");
        return;
    }
    let model = constant(4, 1.0).into_record();
    let error = checkpoints.save(model, optimizer().to_record(), &state(2), &identity(), None);
    set(0o755);
    assert!(error.unwrap_err().to_string().contains("step-00000002"));
    assert_eq!(latest(&checkpoints).state.step, 1);
}
