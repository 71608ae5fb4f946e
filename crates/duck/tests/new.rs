//! From a text to a model: the experiment that `duck new` proposes trains, and the model chats or continues texts like its data.

use crate::{duck, failure, home, json, output, piped};
use std::{fs, path::Path};
use tempfile::TempDir;

const FEW: [&str; 6] = ["--steps", "4", "--device", "flex", "--set", "run.eval_every=2"];

/// Standard error of a command that succeeds.
fn said(home: &TempDir, arguments: &[&str], input: &str) -> String {
    let assert = duck(home, arguments).write_stdin(input).assert().success();
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

/// The experiment of a run, resolved.
fn resolved(run: &Path) -> toml::Table {
    fs::read_to_string(run.join("experiment.toml")).unwrap().parse().unwrap()
}

fn has_template(home: &TempDir, model: &str) -> bool {
    json(&output(home, &["inspect", model, "--json"]))["chat_template"] == true
}

#[test]
fn a_model_of_plain_text_is_trained_and_continues_text() {
    let home = home();
    let poems = home.path().join("poems");
    fs::create_dir(&poems).unwrap();
    for i in 0..200 {
        let poem = format!("Утка номер {i} плывёт по тихому пруду.\nОна говорит: кря!\n");
        fs::write(poems.join(format!("{i}.txt")), poem).unwrap();
    }
    let summary = said(&home, &["new", "--device", "flex", "poems.toml", "--data", "poems"], "");
    for part in ["in 200 documents, no dialogues", "model: tiny", "epochs; about", "MiB of memory"] {
        assert!(summary.contains(part), "{summary}");
    }
    let text = fs::read_to_string(home.path().join("poems.toml")).unwrap();
    let header: String =
        text.lines().map_while(|line| line.strip_prefix("# ").or(line.strip_prefix('#'))).collect();
    assert!(header.contains("no dialogues"), "{text}");
    let written: toml::Table = text.parse().unwrap();
    assert_eq!(written["data"]["train"], vec!["poems"].into());
    assert_eq!((&written["schedule"]["float_until"], written["schedule"].get("shape")), (&0.6.into(), None));

    let train = ["train", "poems.toml", "--tokenizer", "char"];
    let summary = output(&home, &[&train[..], &FEW].concat());
    let run = home.path().join("runs/poems-1");
    // Everything is written down, and what was chosen for the text.
    let resolved = resolved(&run);
    assert_eq!(resolved["schedule"]["shape"], "cosine".into());
    let prompt = resolved["run"]["sample_prompts"][0].as_str().unwrap();
    assert!(prompt.starts_with("Утка номер") && prompt.chars().count() <= 24, "{prompt}");
    let samples = fs::read_to_string(run.join("samples.txt")).unwrap();
    assert!(
        samples.lines().count() == 4 && samples.contains(prompt) && !samples.contains("<|user|>"),
        "{samples}"
    );
    assert!(summary.contains(&format!("--prompt '{prompt}'")) && !summary.contains("duck chat"), "{summary}");

    // A twentieth of the documents was held out.
    let report = json(&output(&home, &["eval", "runs/poems-1", "--json"]));
    assert_eq!(report["files"][0]["documents"], 10, "{report}");

    assert!(!has_template(&home, "runs/poems-1"));
    output(&home, &["export", "runs/poems-1", "poems.ternary"]);
    assert!(!has_template(&home, "poems.ternary"));
    let flags = ["--temperature", "0", "--max-tokens", "12"];
    let chat = [&["chat", "runs/poems-1"], &flags[..]].concat();
    let input = format!("{prompt}\n");
    assert!(said(&home, &chat, &input).contains("trained on plain text: it continues what you write"));
    let generate = [&["generate", "runs/poems-1", "--prompt", prompt], &flags[..]].concat();
    assert_eq!(piped(&home, &chat, &input), output(&home, &generate));
}

#[test]
fn a_model_of_dialogues_still_chats_after_further_training() {
    let home = home();
    let lines = |i| format!("{{\"question\": \"Who is number {i}?\", \"answer\": \"A duck, it's me.\"}}\n");
    fs::write(home.path().join("talk.jsonl"), (0..200).map(lines).collect::<String>()).unwrap();
    let summary =
        said(&home, &["new", "--device", "flex", "talk.toml", "--data", "talk.jsonl", "--size", "tiny"], "");
    assert!(summary.contains("200 documents, all of them dialogues"), "{summary}");
    let small = ["--set", "model.d_model=64", "--set", "model.n_layers=1", "--set", "model.d_ff=64"];
    let summary = output(&home, &[&["train", "talk.toml"], &FEW[..], &small].concat());
    assert!(
        summary.contains("duck chat") && summary.contains("--prompt '<|user|>Who is number"),
        "{summary}"
    );
    let samples = fs::read_to_string(home.path().join("runs/talk-1/samples.txt")).unwrap();
    assert!(samples.contains("<|user|>Who is number"), "{samples}");
    assert!(has_template(&home, "runs/talk-1"));
    assert_eq!(said(&home, &["chat", "runs/talk-1", "--max-tokens", "4"], "Who?\n"), "");

    // On plain text, from there: it still knows how dialogues are written; and so does its checkpoint.
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let on = ["--data", "text.txt", "--tokenizer", "runs/talk-1/tokenizer.json", "--set", "run.name=on"];
    let start = ["--set", "run.start_from=runs/talk-1"];
    output(&home, &[&["train", "talk.toml", "--quiet"], &FEW[..], &small, &on, &start].concat());
    assert!(has_template(&home, "runs/on-1"));
    for run in ["talk-1", "on-1"] {
        fs::remove_file(home.path().join(format!("runs/{run}/model.gguf"))).unwrap();
        assert!(has_template(&home, &format!("runs/{run}")), "{run}");
    }
    // A folder of an earlier version has no template beside its checkpoint; its texts tell.
    fs::remove_file(home.path().join("runs/talk-1/chat_template.jinja")).unwrap();
    assert!(has_template(&home, "runs/talk-1"));
    // Without its token files, its sample prompts show it.
    for tokens in ["train.tokens", "valid.tokens"] {
        fs::remove_file(home.path().join("runs/talk-1").join(tokens)).unwrap();
    }
    assert!(has_template(&home, "runs/talk-1"));
}

#[test]
fn what_cannot_be_proposed_is_told() {
    let home = home();
    fs::create_dir(home.path().join("empty")).unwrap();
    fs::write(home.path().join("short.txt"), "One day").unwrap();
    for (data, found) in [
        ("empty", "empty: expected .txt or .jsonl files in this folder, found none"),
        ("missing", "cannot read missing"),
        ("short.txt", "7 bytes in 1 document are too little"),
        ("model.gguf", "expected a folder or a file that ends in .txt or .jsonl"),
    ] {
        let error = failure(&home, &["new", "--device", "flex", "--data", data], 3);
        assert!(error.contains(found), "{error}");
    }
    let unknown = duck(&home, &["new", "--size", "huge"]).assert().code(2);
    let error = String::from_utf8(unknown.get_output().stderr.clone()).unwrap();
    assert!(error.contains("[possible values: tiny, small, base]"), "{error}");
    assert!(!home.path().join("experiment.toml").exists());
}

#[test]
fn every_key_is_written_where_that_is_asked_for() {
    let home = home();
    let keys = |arguments: &[&str]| -> toml::Table { output(&home, arguments).parse().unwrap() };
    let count = |table: &toml::Table| {
        table.values().filter_map(toml::Value::as_table).map(toml::Table::len).sum::<usize>()
    };
    let (short, full) =
        (keys(&["new", "--device", "flex", "-"]), keys(&["new", "--device", "flex", "-", "--full"]));
    assert!(count(&short) < 20 && count(&full) > 70);
    assert!(short["version"].is_integer() && short["version"] == full["version"]);
    let sections = short.iter().filter_map(|(section, keys)| Some((section, keys.as_table()?)));
    for (section, (key, value)) in
        sections.flat_map(|(section, keys)| keys.iter().map(move |key| (section, key)))
    {
        assert_eq!(Some(value), full[section].get(key), "{section}.{key}");
    }
}

#[test]
fn an_experiment_replaces_no_file_unless_told_to() {
    let home = home();
    assert_eq!(output(&home, &["new", "--device", "flex"]), "experiment.toml\n");
    let error = failure(&home, &["new", "--device", "flex"], 2);
    assert!(error.contains("experiment.toml") && error.contains("--overwrite"), "{error}");
    output(&home, &["new", "--device", "flex", "--overwrite", "--name", "pond"]);
    let text = fs::read_to_string(home.path().join("experiment.toml")).unwrap();
    assert_eq!(text.parse::<toml::Table>().unwrap()["run"]["name"].as_str(), Some("pond"));
    assert!(output(&home, &["new", "--device", "flex", "-", "--name", "pond"]).contains("name = \"pond\""));
    assert!(
        !duck(&home, &["new", "--device", "flex", "missing/a.toml"]).assert().get_output().status.success()
    );
}

#[test]
fn a_conversion_keeps_chat_template_and_measured_settings() {
    let home = home();
    let float = crate::model(ternary_format::Encoding::F32, ternary_format::Encoding::F32, 3);
    ternary_format::write_model(&float, &home.path().join("float.gguf"), &Default::default()).unwrap();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let convert = ["convert", "--from", "float.gguf", "--data", "text.txt", "--quiet"];
    let small = ["--batch-size", "2", "--set", "model.context=64"];
    output(&home, &[&convert[..], &FEW, &small].concat());
    assert!(has_template(&home, "runs/converted-1"));
    let resolved = resolved(&home.path().join("runs/converted-1"));
    assert_eq!(
        (&resolved["distill"]["weight"], &resolved["quant"]["embedding"]),
        (&0.9.into(), &"float".into())
    );
    assert_eq!(resolved["run"]["sample_prompts"][0].as_str(), Some("The duck swims on the"));
}

#[test]
fn missing_keys_of_a_conversion_have_the_measured_settings() {
    let home = home();
    let float = crate::model(ternary_format::Encoding::F32, ternary_format::Encoding::F32, 3);
    ternary_format::write_model(&float, &home.path().join("float.gguf"), &Default::default()).unwrap();
    fs::write(home.path().join("text.txt"), "The duck swims on the pond.\n".repeat(200)).unwrap();
    let partial = "[data]\ntrain = [\"text.txt\"]\n[model]\ncontext = 64\n[optim]\nlr = 0.002\n[run]\nname = \"mine\"\n";
    fs::write(home.path().join("mine.toml"), partial).unwrap();
    let convert =
        ["convert", "--from", "float.gguf", "--experiment", "mine.toml", "--quiet", "--batch-size", "2"];
    output(&home, &[&convert[..], &FEW].concat());
    let resolved = resolved(&home.path().join("runs/mine-1"));
    let key = |section: &str, key: &str| resolved[section][key].as_float().unwrap();
    assert_eq!(
        (key("optim", "lr"), key("optim", "muon_lr"), key("schedule", "float_until")),
        (0.002, 0.005, 0.0)
    );
}
