//! Existing files are not overwritten, and anything but a plain file is refused.

use crate::{duck, failure, home, output, piped};
use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;

fn fifo(home: &TempDir, name: &str) {
    let path = home.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _ = fs::remove_file(&path);
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
}

#[test]
fn an_export_changes_no_other_file() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    fs::create_dir_all(at("folder.partial/deep")).unwrap();
    for name in ["folder.partial/deep/file", "out.gguf.partial", "out.onnx.partial", "target"] {
        fs::write(at(name), "mine").unwrap();
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(at("target"), at("out.ternary.partial")).unwrap();
    for (out, kind) in
        [("folder", "F32"), ("out.gguf", "Q2_0"), ("out.onnx", "INT2"), ("out.ternary", "Q2_0")]
    {
        output(&home, &["export", "model.gguf", out, "--type", kind]);
    }
    for name in ["folder.partial/deep/file", "out.gguf.partial", "out.onnx.partial", "target"] {
        assert_eq!(fs::read_to_string(at(name)).unwrap(), "mine", "{name}");
    }
    let names: Vec<_> = fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{names:?}");
}

/// Every command that writes a file, with the path last, or as the input of `chat`.
#[test]
fn no_command_replaces_a_file_without_overwrite() {
    let home = home();
    let out = home.path().join("out.gguf");
    fs::write(home.path().join("qa.jsonl"), r#"{"question": "Who?", "answer": "A duck."}"#).unwrap();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(20)).unwrap();
    let answers =
        ["eval", "model.gguf", "--data", "qa.jsonl", "--answers", "--max-tokens", "1", "--save-answers"];
    let mut commands = vec![vec!["export", "model.gguf"], answers.to_vec()];
    if cfg!(feature = "train") {
        commands.push(vec!["new", "--device", "flex"]);
        let record = "distill-logits --data text.txt --tokenizer byte --device flex --teacher model.gguf --set model.context=16 --to";
        commands.push(record.split(' ').collect());
    }
    for command in commands {
        let writing = |more: &[&'static str]| [&command[..], &["out.gguf"], more].concat();
        fs::write(&out, "mine").unwrap();
        let error = failure(&home, &writing(&[]), 2);
        assert!(error.contains("out.gguf: a plain file is there already; --overwrite"), "{error}");
        assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
        output(&home, &writing(&["--overwrite"]));
        assert_ne!(fs::read(&out).unwrap(), b"mine");
        fs::remove_file(&out).unwrap();

        fs::create_dir(&out).unwrap();
        assert!(failure(&home, &writing(&["--overwrite"]), 2).contains("out.gguf: a folder is there"));
        fs::remove_dir(&out).unwrap();
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere", &out).unwrap();
            for more in [&[][..], &["--overwrite"]] {
                assert!(failure(&home, &writing(more), 2).contains("a symbolic link is there"));
            }
            fs::remove_file(&out).unwrap();
            fifo(&home, "out.gguf");
            for more in [&[][..], &["--overwrite"]] {
                assert!(failure(&home, &writing(more), 2).contains("a FIFO is there"));
            }
            fs::remove_file(&out).unwrap();
        }
    }
}

#[test]
fn save_and_man_replace_no_file_without_overwrite() {
    let home = home();
    let saved = home.path().join("d.json");
    fs::write(&saved, "mine").unwrap();
    let chat = ["chat", "model.gguf", "--max-tokens", "1", "--json"];
    let mut refused = duck(&home, &chat);
    let error = refused.write_stdin("/save d.json\n").assert().code(2).get_output().stderr.clone();
    assert!(String::from_utf8(error).unwrap().contains("d.json: a plain file is there already"));
    assert_eq!(fs::read_to_string(&saved).unwrap(), "mine");
    piped(&home, &chat, "/save --overwrite d.json\n/save other one.json\n");
    assert_eq!(fs::read_to_string(&saved).unwrap(), "[]\n");
    assert!(home.path().join("other one.json").exists());

    output(&home, &["man", "pages"]);
    let page = home.path().join("pages/duck-chat.1");
    let text = fs::read(&page).unwrap();
    fs::write(&page, "mine").unwrap();
    fs::remove_file(home.path().join("pages/duck.1")).unwrap();
    assert!(failure(&home, &["man", "pages"], 2).contains("--overwrite"));
    assert_eq!(fs::read_to_string(&page).unwrap(), "mine");
    assert!(!home.path().join("pages/duck.1").exists(), "none or all of them");
    output(&home, &["man", "pages", "--overwrite"]);
    assert_eq!(fs::read(&page).unwrap(), text);
}

#[test]
fn an_export_into_a_locked_run_folder_names_the_writer() {
    let home = home();
    let run = home.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join("experiment.toml"), "").unwrap();
    let lock = ternary_format::disk::RunLock::acquire(&run).unwrap();
    let error = failure(&home, &["export", "model.gguf", "run/other.gguf"], 2);
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    assert!(!run.join("other.gguf").exists());
    drop(lock);
    output(&home, &["export", "model.gguf", "run/other.gguf"]);
}

#[cfg(unix)]
#[test]
fn every_input_is_a_plain_file() {
    let home = home();
    fs::write(home.path().join("text.txt"), "the duck swims on the pond").unwrap();
    output(&home, &["export", "model.gguf", "folder", "--type", "F32"]);
    let copy = |name: &str, fifos: &[&str]| {
        fs::create_dir(home.path().join(name)).unwrap();
        for entry in fs::read_dir(home.path().join("folder")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), home.path().join(name).join(entry.file_name())).unwrap();
        }
        fifos.iter().for_each(|file| fifo(&home, &format!("{name}/{file}")));
    };
    copy("config", &["config.json"]);
    copy("weights", &["model.safetensors"]);
    copy("tokenizer", &["tokenizer.json"]);
    copy("generation", &["generation_config.json"]);
    copy("template", &["chat_template.jinja"]);
    copy("index", &["model.safetensors.index.json"]);
    copy("shards", &["a.safetensors"]);
    fs::remove_file(home.path().join("index/model.safetensors")).unwrap();
    fs::remove_file(home.path().join("shards/model.safetensors")).unwrap();
    let index = r#"{"weight_map": {"model.norm.weight": "a.safetensors"}}"#;
    fs::write(home.path().join("shards/model.safetensors.index.json"), index).unwrap();
    for name in ["a.gguf", "a.ternary", "a.txt", "adapter/adapter_config.json", "run/model.gguf"] {
        fifo(&home, name);
    }
    fs::write(home.path().join("run/experiment.toml"), "").unwrap();
    let models = [
        "a.gguf",
        "a.ternary",
        "config",
        "weights",
        "tokenizer",
        "generation",
        "template",
        "index",
        "shards",
        "run",
    ];
    let mut commands: Vec<Vec<&str>> = models.iter().map(|model| vec!["inspect", model]).collect();
    commands.push(vec!["eval", "model.gguf", "--data", "a.txt"]);
    commands.push(vec!["generate", "model.gguf", "--prompt", "a", "--adapter", "adapter"]);
    commands.push(vec!["export", "a.gguf", "b.gguf"]);
    commands.push(vec!["serve", "a.gguf", "--port", "0"]);
    if cfg!(feature = "train") {
        commands.push(vec!["convert", "--from", "a.gguf", "--data", "text.txt"]);
    }
    for command in commands {
        let started = Instant::now();
        let error = failure(&home, &command, 3);
        assert!(error.contains("expected a plain file, found a FIFO"), "{command:?}: {error}");
        // A second on an idle machine; tests share theirs.
        assert!(started.elapsed() < Duration::from_secs(20), "{command:?}");
    }
}

/// The commit in a result is that of the program. Git is not run: its configuration may name programs to run.
#[cfg(feature = "train")]
#[test]
fn a_repository_around_a_run_is_ignored() {
    let home = home();
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.current_dir(&home).args(["-c", "user.name=a", "-c", "user.email=a@b"]).args(arguments);
        command.output().is_ok_and(|output| output.status.success())
    };
    if !git(&["init", "--quiet"]) || !git(&["commit", "--quiet", "--allow-empty", "--message", "theirs"]) {
        println!("skipped: git: not there");
        return;
    }
    let monitor = format!("sh -c 'touch {}' -", home.path().join("executed").display());
    assert!(git(&["config", "core.fsmonitor", &monitor]));
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(20)).unwrap();
    let train = "train --data text.txt --tokenizer byte --device flex --steps 1 --quiet --set model.context=16 \
                 --set model.d_model=64 --set model.d_ff=64 --set model.n_layers=1 --set run.sample_tokens=0";
    output(&home, &train.split_whitespace().collect::<Vec<_>>());
    assert!(!home.path().join("executed").exists());
    let result = fs::read_to_string(home.path().join("runs/00-default-1/result.json")).unwrap();
    let result: serde_json::Value = serde_json::from_str(&result).unwrap();
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let head = Command::new("git").current_dir(source).args(["rev-parse", "HEAD"]).output().unwrap();
    let head = String::from_utf8(head.stdout).unwrap();
    match result["git"].as_str() {
        Some(commit) => assert_eq!(commit, head.trim()),
        None => println!("skipped: the source is in no repository"),
    }
}
