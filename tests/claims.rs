//! Promise: the numbers of README and book are those of the committed results.

use burn_ternary::nn::DuckConfig;
use burn_ternary::report::RunResult;
use std::fs;
use std::path::Path;
use ternary_format::{Encoding, SizeReport, WriteOptions, read_model, write_model};
use ternary_infer::{Engine, EngineOptions, GenerateOptions};

/// Results of all seeds of a run, in the order of the seeds.
fn results(name: &str) -> Vec<RunResult> {
    let mut results: Vec<RunResult> = fs::read_dir("experiments/results")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let seed = stem.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
            path.extension().is_some_and(|extension| extension == "json")
                && seed.is_some_and(|seed| seed.parse::<u64>().is_ok())
        })
        .map(|path| RunResult::read(&path).unwrap())
        .collect();
    results.sort_by_key(|result| result.seed);
    results
}

/// The results of a run, which are all finished and have the seeds that a table names.
fn results_of(name: &str, seeds: &str) -> Vec<RunResult> {
    let results = results(name);
    assert!(results.iter().all(|result| result.finished), "{name}");
    let found: Vec<String> = results.iter().map(|result| result.seed.to_string()).collect();
    assert_eq!(seeds, found.join(", "), "{name}");
    results
}

/// The number at `path` in the JSON output of `duck` for each of the runs.
fn said(folder: &str, results: &[RunResult], path: &str) -> Vec<f64> {
    let number = |result: &RunResult| {
        let file = format!("experiments/results/{folder}/{}-{}.json", result.name, result.seed);
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or_else(|| panic!("{file}: {path}"))
    };
    results.iter().map(number).collect()
}

fn mean_of(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}

fn mean(results: &[RunResult], value: fn(&RunResult) -> f64) -> f64 {
    mean_of(&results.iter().map(value).collect::<Vec<_>>())
}

fn page(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Rows `| `name` | … |` of the table of a page between two marks.
fn rows(path: &str, mark: &str) -> Vec<Vec<String>> {
    let page = page(path);
    let table = page.split(&format!("<!-- {mark} -->")).nth(1).expect("the page has this table");
    table
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

#[test]
fn the_results_are_computed_from_the_committed_results() {
    let rows = rows("docs/results.md", "results");
    assert!(rows.len() >= 3, "{rows:?}");
    for row in rows {
        let [name, _, seeds, loss, size] = &row[..] else { panic!("five cells expected: {row:?}") };
        let name = name.trim_matches('`');
        let results = results_of(name, seeds);
        let valid = mean(&results, |result| result.valid_loss.unwrap());
        assert_eq!(*loss, format!("{valid:.3}"), "{name}");
        let compression = mean(&results, |result| result.fp32_bytes as f64 / result.packed_bytes as f64);
        assert_eq!(*size, format!("{compression:.1}x"), "{name}");
    }
}

#[test]
fn the_differences_are_those_of_the_committed_results() {
    let page = page("docs/results.md");
    for (worse, better) in [
        ("11-shakespeare-ternary", "10-shakespeare-float"),
        ("13-shakespeare-distilled", "10-shakespeare-float"),
        ("17-shakespeare-wide-teacher", "50-float-muon.01"),
        ("16-shakespeare-converted", "50-float-muon.01"),
        ("15-austen", "15-float-muon.01"),
        ("15-float-muon.01", "15-taught"),
        ("14-shakespeare-equal-bytes", "11-shakespeare-ternary"),
        ("14-shakespeare-equal-bytes", "13-shakespeare-distilled"),
    ] {
        let [worse_loss, better_loss] = [worse, better]
            .map(|name| mean(&results_of(name, "1, 2, 3"), |result| result.valid_loss.unwrap()));
        let difference = format!("{:.3}", worse_loss - better_loss);
        assert!(page.contains(&difference), "not in the results: {difference}, {worse} over {better}");
    }
}

/// The first table of the README: loss behind the float twin, and the size ratios.
#[test]
fn the_front_page_has_figures_of_the_committed_results() {
    let readme = page("README.md");
    let loss = |name: &str| mean(&results(name), |result| result.valid_loss.unwrap());
    let ratio =
        |name: &str| mean(&results(name), |result| result.fp32_bytes as f64 / result.packed_bytes as f64);
    let controlled: Vec<f64> = (1..=3)
        .map(|seed| {
            let name = format!("eval-13-float-taught-13-shakespeare-distilled-{seed}.json");
            let text = page(&format!("experiments/results/controls/{name}"));
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            value.pointer("/files/0/models/1/loss/difference/value").unwrap().as_f64().unwrap()
        })
        .collect();
    for claim in [
        format!("{:.3} nats per character", loss("11-shakespeare-ternary") - loss("10-shakespeare-float")),
        format!("{:.3} if both had the same teacher", mean_of(&controlled)),
        format!("{:.1} times smaller", ratio("11-shakespeare-ternary")),
    ] {
        assert!(readme.contains(&claim), "not in the README: {claim}");
    }
}

/// `sizes/` has the output of `duck export RUN NAME.ternary --json`.
#[test]
fn the_frontier_is_computed_from_the_committed_results() {
    let rows = rows("docs/results.md", "frontier");
    assert!(rows.len() >= 4, "{rows:?}");
    for row in rows {
        let [name, seeds, zeros, bytes, ratio, loss, lost] = &row[..] else { panic!("seven cells: {row:?}") };
        let results = results_of(name.trim_matches('`'), seeds);
        assert_eq!(
            *zeros,
            format!("{:.0} %", 100.0 * mean(&results, |result| result.zero_fraction.unwrap()))
        );
        let sizes = said("sizes", &results, "/total/bytes");
        assert_eq!(*bytes, format!("{:.0}", mean_of(&sizes)), "{name}");
        let ratios: Vec<f64> =
            results.iter().zip(sizes).map(|(result, bytes)| result.fp32_bytes as f64 / bytes).collect();
        assert_eq!(*ratio, format!("{:.1}x", mean_of(&ratios)), "{name}");
        let valid = mean(&results, |result| result.valid_loss.unwrap());
        assert_eq!(*loss, format!("{valid:.3}"), "{name}");
        let mut twins = results_of("50-float-muon.01", "1, 2, 3");
        twins.retain(|twin| results.iter().any(|result| result.seed == twin.seed));
        let twin = mean(&twins, |result| result.valid_loss.unwrap());
        assert_eq!(*lost, format!("{:.3}", valid - twin), "{name}");
    }
}

/// `answers/` has the output of `duck eval RUN --answers --json`.
#[test]
fn the_answers_are_computed_from_the_committed_results() {
    let rows = rows("docs/results.md", "answers");
    assert!(rows.len() >= 2, "{rows:?}");
    for row in rows {
        let [name, _, seeds, bleu, exact] = &row[..] else { panic!("five cells expected: {row:?}") };
        let results = results_of(name.trim_matches('`'), seeds);
        let mean = |key: &str| mean_of(&said("answers", &results, &format!("/files/0/models/0/{key}/value")));
        assert_eq!(*bleu, format!("{:.2}", mean("bleu")), "{name}");
        assert_eq!(*exact, format!("{:.3}", mean("exact_match")), "{name}");
    }
    let duck = results("02-duck-context");
    let exact = said("answers", &duck, "/files/0/models/0/exact_match/value")[0];
    let questions = said("answers", &duck, "/files/0/documents")[0];
    let claim = format!(
        "On {questions} held-out questions, {:.0} % of its answers match the reference exactly",
        100.0 * exact
    );
    assert!(page("README.md").contains(&claim), "not in the README: {claim}");
}

/// `controls/` has the output of `duck eval CONTROL RUN --json`, with paired differences.
#[test]
fn the_controls_are_computed_from_the_committed_results() {
    let rows = rows("docs/results.md", "controls");
    assert!(rows.len() >= 4, "{rows:?}");
    for row in rows {
        let [run, control, seed, measure, ternary, float, difference, interval] = &row[..] else {
            panic!("eight cells expected: {row:?}")
        };
        let (run, control) = (run.trim_matches('`'), control.split('`').nth(1).unwrap());
        let folder = "experiments/results/controls";
        for name in [run, control] {
            let result = RunResult::read(Path::new(&format!("{folder}/{name}-{seed}.json"))).unwrap();
            assert!(result.finished && result.name == name, "{name}");
        }
        let text = fs::read_to_string(format!("{folder}/eval-{control}-{run}-{seed}.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let model = |place: usize| &json["files"][0]["models"][place][measure.to_lowercase()];
        let digits = if measure == "loss" { 3 } else { 2 };
        let [found, other] = [model(1), model(0)].map(|model| model["value"].as_f64().unwrap());
        assert_eq!([ternary, float], [found, other].map(|x| format!("{x:.digits$}")).each_ref(), "{run}");
        let [value, low, high] =
            ["value", "low", "high"].map(|key| model(1)["difference"][key].as_f64().unwrap());
        assert_eq!(*difference, format!("{value:+.digits$}"), "{run}");
        assert_eq!(*interval, format!("{low:+.digits$} to {high:+.digits$}"), "{run}");
    }
}

#[test]
fn the_conversions_are_computed_from_the_committed_results() {
    let rows = rows("docs/results.md", "converted");
    assert!(!rows.is_empty());
    for row in rows {
        let [name, seeds, float, rounded, trained, lost] = &row[..] else {
            panic!("six cells expected: {row:?}")
        };
        let results = results_of(name.trim_matches('`'), seeds);
        let [was, fell, ended] = [
            mean(&results, |result| result.start_float_loss.unwrap()),
            mean(&results, |result| result.start_rounded_loss.unwrap()),
            mean(&results, |result| result.valid_loss.unwrap()),
        ];
        let computed = [was, fell, ended, ended - was].map(|loss| format!("{loss:.3}"));
        assert_eq!([float, rounded, trained, lost], computed.each_ref(), "{name}");
    }
}

#[test]
fn the_ablation_is_computed_from_the_committed_results() {
    let rows = rows("docs/results.md", "ablation");
    assert!(rows.len() >= 19, "{rows:?}");
    let base = mean(&results("20-quantizer-ablation"), |result| result.valid_loss.unwrap());
    for row in rows {
        let [name, _, seeds, loss, difference] = &row[..] else { panic!("five cells expected: {row:?}") };
        let valid = mean(&results_of(name.trim_matches('`'), seeds), |result| result.valid_loss.unwrap());
        assert_eq!(*loss, format!("{valid:.3}"), "{name}");
        assert_eq!(*difference, format!("{:+.3}", valid - base), "{name}");
    }
}

#[test]
fn the_matmul_precisions_are_computed_from_the_committed_results() {
    let rows = rows("docs/integer-training.md", "compute");
    assert_eq!(rows.len(), 8, "{rows:?}");
    let valid = |name: &str, seeds: &str| mean(&results_of(name, seeds), |result| result.valid_loss.unwrap());
    for row in rows {
        let [name, _, _, seeds, loss, difference] = &row[..] else { panic!("six cells expected: {row:?}") };
        let name = name.trim_matches('`');
        let base = valid(&format!("{}-act8-float", &name[..2]), seeds);
        let loss_found = valid(name, seeds);
        assert_eq!(*loss, format!("{loss_found:.3}"), "{name}");
        assert_eq!(*difference, format!("{:+.3}", loss_found - base), "{name}");
    }
}

/// `tests/archive.rs` of ternary-format checks the format; this is the file that README and book mention.
#[test]
fn the_committed_archive_unpacks_bit_for_bit_and_runs() {
    let path = Path::new("experiments/results/50-zeros-93-1.ternary");
    let packed = fs::read(path).unwrap();
    let ratio = results("50-zeros-93")[0].fp32_bytes as f64 / packed.len() as f64;
    assert!(ratio > 63.0, "{ratio}");
    let files = page("docs/files.md");
    for number in [format!("{} bytes", packed.len()), format!("{ratio:.1} times")] {
        assert!(files.contains(&number), "not in docs/files.md: {number}");
    }

    let model = read_model(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let again = folder.path().join("again.ternary");
    write_model(&model, &again, &WriteOptions::default()).unwrap();
    assert!(fs::read(again).unwrap() == packed, "packed again, it is another file");
    let prompt = model.tokenizer.as_ref().unwrap().encode("ROMEO:").unwrap();
    let engine = Engine::from_model(model, EngineOptions::default()).unwrap();
    let options = GenerateOptions::default().with_max_tokens(20);
    assert_eq!(engine.generate(&prompt, options).unwrap().count(), 20);
}

#[test]
fn every_committed_result_has_an_entry_in_the_log() {
    let log = fs::read_to_string("experiments/LOG.md").unwrap();
    for entry in fs::read_dir("experiments/results").unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let result = RunResult::read(Path::new(&path)).unwrap();
            assert!(log.contains(&format!("`{}`", result.name)), "{} is not in the log", result.name);
        }
    }
}

#[test]
fn the_arithmetic_of_sizes_is_right() {
    // H(z) = h2(z) + 1 - z bits per weight at zero fraction z, with equally likely signs.
    let entropy = |z: f64| -z * z.log2() - (1.0 - z) * (1.0 - z).log2() + 1.0 - z;
    assert_eq!(format!("{:.2}", 32.0 / 3f64.log2()), "20.19");
    assert_eq!(format!("{:.3}", 3f64.log2()), "1.585");
    assert_eq!(format!("{:.3}", 32.0 / 63.0), "0.508");
    assert!(entropy(0.9137) > 32.0 / 63.0 && entropy(0.9143) < 32.0 / 63.0);
}

#[test]
fn the_sizes_are_those_of_the_shapes() {
    let files = page("docs/files.md");
    for (preset, embedding) in [
        ("gpt2-small", Encoding::Q8_0),
        ("gpt2-small", Encoding::Q4_0),
        ("gpt2-small", Encoding::Tq2_0),
        ("gpt2-medium", Encoding::Q4_0),
        ("llama-2-7b", Encoding::Q4_0),
    ] {
        let spec = DuckConfig::preset(preset).unwrap().spec();
        let size = SizeReport::of_spec(&spec, Encoding::Tq2_0, embedding, embedding).unwrap();
        let tables = size.embedding.bytes + size.head.bytes;
        let row = format!(
            "| {preset}, {embedding} | {} | {tables} | {} | {} | {:.2}x |",
            size.blocks.bytes, size.other.bytes, size.total.bytes, size.total.compression
        );
        assert!(files.contains(&row), "not in docs/files.md: {row}");
    }
}
