//! `duck eval`: loss, answers, choices and their intervals.

use crate::{failure, home, json, output, shared, write};
use serde_json::{Value, json};
use std::fs;

/// A folder with two models, texts, dialogues and a quiz.
fn school() -> tempfile::TempDir {
    let home = home();
    let path = |name: &str| home.path().join(name);
    write(&path("other.gguf"), 2);
    fs::write(path("texts.txt"), "One.\n<|endoftext|>\nTwo ducks.\n<|endoftext|>\nThree ducks on a pond.")
        .unwrap();
    let dialogue =
        |i: usize| format!("{}\n", json!({ "question": format!("How many? {i}"), "answer": "Two." }));
    fs::write(path("dialogues.jsonl"), (0..5).map(dialogue).collect::<String>()).unwrap();
    let quiz = |i: usize| {
        format!("{}\n", json!({ "question": "Who?", "choices": ["a duck", "a fox"], "answer": i % 2 }))
    };
    fs::write(path("quiz.jsonl"), (0..4).map(quiz).collect::<String>()).unwrap();
    home
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn loss_perplexity_and_bits_per_byte_are_consistent() {
    let home = school();
    let report = json(&output(&home, &["eval", "model.gguf", "--data", "texts.txt", "--json"]));
    assert_eq!(report["files"][0]["documents"], 3);
    let model = &report["files"][0]["models"][0];
    let loss = number(&model["loss"]["value"]);
    assert!((number(&model["perplexity"]["value"]) / loss.exp() - 1.0).abs() < 1e-9);
    // A token is a byte.
    assert!((number(&model["bits_per_byte"]["value"]) * 2f64.ln() / loss - 1.0).abs() < 1e-9);
    for measure in [&model["loss"], &model["perplexity"], &model["token_accuracy"]] {
        let [low, value, high] = ["low", "value", "high"].map(|key| number(&measure[key]));
        assert!(low <= value && value <= high, "{model}");
    }
}

#[test]
fn the_stride_sets_the_context_of_scored_tokens() {
    let home = school();
    let text = "a b c d e f g h ".repeat(20);
    fs::write(home.path().join("long.txt"), text).unwrap();
    let run = |flags: &[&str]| {
        json(&output(
            &home,
            &[&["eval", "model.gguf", "--data", "long.txt", "--json", "--context", "32"], flags].concat(),
        ))
    };
    let loss = |flags: &[&str]| number(&run(flags)["files"][0]["models"][0]["loss"]["value"]);
    assert_ne!(loss(&["--stride", "4"]), loss(&["--stride", "32"]));
    assert_eq!(loss(&[]), loss(&["--stride", "16"]));
    // One document has no interval.
    assert_eq!(run(&[])["files"][0]["models"][0]["loss"].get("low"), None);
}

#[test]
fn equal_seeds_give_equal_intervals() {
    let home = school();
    let texts = ["eval", "model.gguf", "--data", "texts.txt", "--json"];
    assert_eq!(output(&home, &texts), output(&home, &texts));
    assert_ne!(output(&home, &texts), output(&home, &[&texts[..], &["--seed", "2"]].concat()));
}

#[test]
fn models_are_columns_of_one_table() {
    let home = school();
    let models = [
        "eval",
        "model.gguf",
        "other.gguf",
        "model.gguf",
        "--data",
        "texts.txt",
        "--data",
        "dialogues.jsonl",
    ];
    let report = json(&output(&home, &[&models[..], &["--json"]].concat()));
    for file in report["files"].as_array().unwrap() {
        let columns = file["models"].as_array().unwrap();
        assert_eq!(columns.len(), 3);
        assert_eq!(columns[2]["loss"]["difference"], json!({ "value": 0.0, "low": 0.0, "high": 0.0 }));
        let [first, second] = [0, 1].map(|i| number(&columns[i]["loss"]["value"]));
        assert!((number(&columns[1]["loss"]["difference"]["value"]) - (second - first)).abs() < 1e-9);
    }
    let text = output(&home, &models);
    assert!(text.contains("texts.txt, 3 documents") && text.contains("minus the first"), "{text}");
    let markdown = output(&home, &[&models[..], &["--format", "markdown"]].concat());
    assert!(
        markdown.contains("|  | model.gguf | other.gguf | model.gguf |\n|---|---|---|---|\n"),
        "{markdown}"
    );
}

#[test]
fn without_data_runs_are_compared_on_their_validation_documents() {
    let home = school();
    let one = "{\"text\": \"One duck.\"}\n{\"text\": \"Two ducks.\"}\n";
    for (run, documents) in
        [("a-1", Some(one)), ("b-1", Some(one)), ("c-1", Some("{\"text\": \"A fox.\"}\n")), ("d-1", None)]
    {
        let run = home.path().join(run);
        fs::create_dir(&run).unwrap();
        fs::write(run.join("experiment.toml"), "").unwrap();
        fs::copy(home.path().join("model.gguf"), run.join("model.gguf")).unwrap();
        if let Some(documents) = documents {
            fs::write(run.join("valid.jsonl"), documents).unwrap();
        }
    }
    let report = json(&output(&home, &["eval", "other.gguf", "a-1", "b-1", "--json"]));
    let file = &report["files"][0];
    assert_eq!((&file["file"], &file["documents"]), (&"a-1/valid.jsonl".into(), &2.into()));
    assert_eq!(file["models"].as_array().unwrap().len(), 3);
    let error = failure(&home, &["eval", "a-1", "c-1"], 3);
    assert!(
        error.contains("c-1: expected the validation documents of a-1") && error.contains("--data"),
        "{error}"
    );
    let error = failure(&home, &["eval", "a-1", "d-1"], 3);
    assert!(error.contains("d-1: expected its validation documents in valid.jsonl"), "{error}");
    assert!(failure(&home, &["eval", "model.gguf"], 2).contains("--data FILE, or a run folder"));
    output(&home, &["eval", "a-1", "c-1", "d-1", "--data", "texts.txt"]);
}

#[test]
fn answers_are_compared_with_references() {
    let home = school();
    let flags = ["eval", "model.gguf", "--data", "dialogues.jsonl", "--answers", "--max-tokens", "8"];
    let save = [&flags[..], &["--save-answers", "answers.jsonl", "--json"]].concat();
    let report = json(&output(&home, &save));
    assert_eq!(report["bleu"], "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp");
    let saved = fs::read_to_string(home.path().join("answers.jsonl")).unwrap();
    let saved: Vec<Value> = saved.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(saved.len(), 5);
    // Told to say what the model says, it is right.
    let known: String = saved
        .iter()
        .map(|line| format!("{}\n", json!({ "question": line["question"], "answer": line["answer"] })))
        .collect();
    fs::write(home.path().join("known.jsonl"), known).unwrap();
    let known = ["eval", "model.gguf", "--data", "known.jsonl", "--answers", "--max-tokens", "8", "--json"];
    let report = json(&output(&home, &known));
    let model = &report["files"][0]["models"][0];
    assert_eq!(model["exact_match"]["value"], 1.0, "{model}");
    let words = saved.iter().any(|line| line["answer"].as_str().unwrap().split_whitespace().count() > 3);
    assert!(!words || number(&model["bleu"]["value"]) > 99.0, "{model}");
    let text = output(&home, &flags);
    assert!(
        text.contains("BLEU nrefs:1") && text.contains("ROUGE-L") && text.contains("distinct-2"),
        "{text}"
    );
}

#[test]
fn the_most_likely_choice_is_compared_with_the_correct_one() {
    let home = school();
    let report = json(&output(&home, &["eval", "model.gguf", "--data", "quiz.jsonl", "--json"]));
    let model = &report["files"][0]["models"][0];
    // The same two choices, each right twice.
    assert_eq!(model["choice_accuracy"]["value"], 0.5, "{model}");
    assert_eq!(model["choice_accuracy_by_byte"]["value"], 0.5, "{model}");
    assert_eq!(model.get("loss"), None);
}

#[test]
fn unusable_texts_are_named() {
    let home = school();
    let path = |name: &str| home.path().join(name);
    fs::write(path("empty.txt"), "").unwrap();
    fs::write(path("bad.jsonl"), "{\"text\": \"a\"}\n{\"text\": 1}\n").unwrap();
    fs::write(path("latin.txt"), b"caf\xe9").unwrap();
    for (flags, found) in [
        (&["missing.txt"][..], "missing.txt: cannot read"),
        (&["empty.txt"], "found an empty file"),
        (&["bad.jsonl"], "bad.jsonl, line 2"),
        (&["latin.txt"], "offset 3"),
        (&["model.gguf"], "ends in .txt or .jsonl"),
        (&["texts.txt", "--answers"], "\"question\" and \"answer\""),
    ] {
        let error = failure(&home, &[&["eval", "model.gguf", "--data"], flags].concat(), 3);
        assert!(error.contains(found) && error.lines().count() == 1, "{error}");
    }
    let save = ["--answers", "--max-tokens", "1", "--save-answers", "missing/a.jsonl"];
    failure(&home, &[&["eval", "model.gguf", "--data", "dialogues.jsonl"][..], &save].concat(), 5);
}

#[test]
fn a_story_model_reads_stories_better_than_other_texts() {
    let (Some(model), Some(stories)) = (shared("models/stories260k"), shared("text/tinystories/valid.txt"))
    else {
        return;
    };
    let home = home();
    let text = fs::read_to_string(stories).unwrap();
    let part = &text[..text.floor_char_boundary(20_000)];
    fs::write(home.path().join("stories.txt"), part).unwrap();
    let others = part.chars().rev().collect::<String>();
    fs::write(home.path().join("others.txt"), others).unwrap();
    let flags = ["eval", model.to_str().unwrap(), "--data", "stories.txt", "--data", "others.txt", "--json"];
    let report = json(&output(&home, &flags));
    let bits = [0, 1].map(|i| number(&report["files"][i]["models"][0]["bits_per_byte"]["value"]));
    assert!(bits[0] < 1.5 && bits[1] > 3.0, "{bits:?}");
}

/// A model that always gives the most frequent answer would match one in a hundred.
#[test]
fn the_built_in_duck_answers_most_held_out_questions() {
    let questions = concat!(env!("CARGO_MANIFEST_DIR"), "/../burn-ternary/data/duck_questions.jsonl");
    let report = json(&output(&home(), &["eval", "--answers", "--data", questions, "--json"]));
    let exact = number(&report["files"][0]["models"][0]["exact_match"]["value"]);
    assert!(exact > 0.7, "{exact}");
}
