//! Promise: an experiment becomes complete and explicit, and a wrong one is a clear error.

use std::{fs, path::PathBuf};

use burn_ternary::run::{Experiment, Size, TrainError, version::VERSION};
use proptest::{prelude::*, sample::Index};
use toml::{Table, Value};

const DEFAULT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/experiments/00-default.toml"));

fn files() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/experiments");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "toml")).collect();
    assert!(files.len() >= 6, "{files:?}");
    files
}

fn default() -> Experiment {
    Experiment::parse(DEFAULT, "00-default.toml").unwrap()
}

/// The error of an experiment's text.
fn message(text: &str) -> String {
    let error = Experiment::parse(text, "x.toml").and_then(|e| e.validate("x.toml").map(|()| e));
    let error = error.expect_err(text);
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn every_file_loads_and_comes_back_equal_from_its_resolved_form() {
    for path in files() {
        let experiment = Experiment::load(&path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(experiment.run.name, path.file_stem().unwrap().to_str().unwrap());
        let again = Experiment::parse(&experiment.to_toml(), "resolved").unwrap();
        assert_eq!(again, experiment);
    }
}

#[test]
fn every_file_of_ours_writes_every_key() {
    let whole = Table::try_from(Experiment::default()).unwrap();
    for path in files() {
        let written: Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        assert_eq!(written["version"], Value::from(VERSION), "{}", path.display());
        for (section, keys) in &whole {
            let missing: Vec<_> =
                keys.as_table().unwrap().keys().filter(|key| written[section].get(key).is_none()).collect();
            assert!(missing.is_empty(), "{}: [{section}] lacks {missing:?}", path.display());
        }
    }
}

#[test]
fn the_presets_are_those_proposed_for_texts_of_their_size() {
    let presets = [("60-text-1mb", Size::Tiny), ("61-text-10mb", Size::Small), ("62-text-100mb", Size::Base)];
    for (name, size) in presets {
        let preset = Experiment::load(format!("experiments/{name}.toml")).unwrap();
        let dropout = preset.model.dropout;
        assert_eq!(preset.model, size.model().with_dropout(dropout), "{name}");
        let defaults = Experiment::default();
        assert_eq!(preset.optim, defaults.optim);
        assert_eq!((preset.schedule, preset.distill), (defaults.schedule, defaults.distill), "{name}");
    }
}

#[test]
fn a_missing_key_has_its_default() {
    assert_eq!(Experiment::parse("", "").unwrap(), Experiment::default());
    let found = Experiment::parse("[run]\nsteps = 7\n", "").unwrap();
    let mut expected = Experiment::default();
    expected.run.steps = 7;
    assert_eq!(found, expected);
    // The default experiment is older than the best recipe, and has its own text.
    let mut own = Experiment::default();
    for assignment in [
        "data.train=[\"embedded\"]",
        "quant.embedding=int8",
        "distill.weight=0.5",
        "schedule.float_until=0.0",
        "schedule.min_lr_ratio=0.1",
        "run.name=00-default",
        "run.sample_prompts=[\"One day\", \"<|user|>Who are you?\"]",
    ] {
        own.set(assignment).unwrap();
    }
    assert_eq!(own, default());
}

#[test]
fn every_file_opens_with_question_expectation_and_cost() {
    for path in files() {
        let text = fs::read_to_string(&path).unwrap();
        for (line, start) in text.lines().zip(["# Question: ", "# Expectation: ", "# Cost: "]) {
            assert!(line.starts_with(start), "{}: {line}", path.display());
        }
    }
}

#[test]
fn every_override_that_a_comment_names_works() {
    let mut lines = 0;
    for path in files() {
        let text = fs::read_to_string(&path).unwrap();
        let base = Experiment::load(&path).unwrap();
        let mut names = vec![base.run.name.clone()];
        for line in text.lines().filter_map(|line| line.strip_prefix("#   --set ")) {
            let mut experiment = base.clone();
            for assignment in line.split(" --set ") {
                experiment.set(assignment).unwrap();
            }
            experiment.validate(line).unwrap();
            assert!(!names.contains(&experiment.run.name), "two runs would share a folder: {line}");
            names.push(experiment.run.name);
            lines += 1;
        }
    }
    assert!(lines >= 10);
}

#[test]
fn the_ternary_shakespeare_differs_from_its_float_twin_in_few_keys() {
    let load =
        |name: &str| Experiment::load(files().into_iter().find(|p| p.ends_with(name)).unwrap()).unwrap();
    let mut float = load("10-shakespeare-float.toml");
    let ternary = load("11-shakespeare-ternary.toml");
    assert!(!float.quant.enabled && ternary.quant.enabled);
    float.quant.enabled = true;
    float.optim = ternary.optim.clone();
    float.schedule = ternary.schedule.clone();
    float.run.name = ternary.run.name.clone();
    assert_eq!(float, ternary);
}

#[test]
fn the_run_folder_is_named_after_run_and_seed() {
    assert_eq!(default().run_dir(), PathBuf::from("runs").join("00-default-1"));
}

#[test]
fn a_group_size_survives_the_resolved_form() {
    let mut experiment = default();
    experiment.set("quant.granularity = { per_group = 64 }").unwrap();
    experiment.validate("").unwrap();
    assert_eq!(Experiment::parse(&experiment.to_toml(), "").unwrap(), experiment);
    experiment.set("quant.sparsity = { n_of_m = [2, 4] }").unwrap();
    experiment.validate("").unwrap();
    assert_eq!(Experiment::parse(&experiment.to_toml(), "").unwrap(), experiment);
}

#[test]
fn a_bad_file_is_told_where_and_what_is_allowed() {
    let line = |start: &str| 1 + DEFAULT.lines().position(|line| line.starts_with(start)).unwrap();
    for (from, to, fragments) in [
        ("d_ff =", "d_fff =", &["unknown field `d_fff`", "`d_ff`", "in `model`: "][..]),
        ("[run]", "[runs]", &["unknown field `runs`", "`schedule`"]),
        (
            "steps = 640",
            "steps = \"700\"",
            &["string \"700\", expected a whole number, at least 0", "`run.steps`"],
        ),
        ("steps = 640", "steps = 7.5", &["invalid type: floating point `7.5`", "`run.steps`"]),
        ("steps = 640", "steps = -7", &["`-7`, expected a whole number, at least 0", "`run.steps`"]),
        ("enabled = true", "enabled = 1", &["expected a boolean", "`quant.enabled`"]),
        ("\"absmean\"", "\"absmax\"", &["unknown variant `absmax`", "`seq`", "`quant.scale`"]),
        ("steps = 640", "steps = ", &["x.toml:"]),
        ("steps = 640", "steps = 640\nsteps = 8", &["duplicate key"]),
    ] {
        let text = DEFAULT.replacen(from, to, 1);
        assert_ne!(text, DEFAULT, "{from}");
        let message = message(&text);
        for fragment in fragments {
            assert!(message.contains(fragment), "{message}");
        }
        assert!(!message.contains('\n'), "{message}");
    }
    let found = message(&DEFAULT.replacen("d_ff =", "d_fff =", 1));
    assert!(found.starts_with(&format!("x.toml:{}: ", line("d_ff"))), "{found}");
    assert!(message("").contains("`data.train` is [], expected at least one file"));
    assert!(message("[data]\ntrain = [\"a.txt\"]").contains("`run.name` is \"\""));
}

#[test]
fn an_error_names_key_value_and_allowed_range() {
    for (assignment, fragment) in [
        ("data.train=[]", "`data.train` is [], expected at least one file"),
        ("data.train=[\"\"]", "`data.train`"),
        ("data.valid=[\"\"]", "`data.valid`"),
        ("data.valid_fraction=0", "`data.valid_fraction` is 0.0, expected above 0, at most 0.5"),
        ("data.valid_fraction=0.6", "`data.valid_fraction`"),
        ("data.tokenizer=words", "`data.tokenizer` is \"words\", expected byte, char, bpe, or"),
        ("data.bpe_vocab_size=256", "`data.bpe_vocab_size`"),
        ("model.d_model=0", "`model.d_model` is 0, expected 1 to"),
        ("model.n_heads=3", "`model.n_heads` is 3, expected a divisor of d_model = 128"),
        ("model.activation=gelu", "`model.activation` is \"gelu\", expected swiglu or squared_relu"),
        ("quant.granularity={per_group=48}", "{ per_group = 48 }, expected a per_group that divides"),
        ("quant.granularity={per_group=0}", "`quant.granularity`"),
        ("quant.granularity={per_group=256}", "`quant.granularity`"),
        ("quant.threshold=1", "`quant.threshold` is 1.0, expected above 0 and below 1"),
        ("quant.threshold=0", "`quant.threshold`"),
        (
            "quant.sparsity={zero_fraction=1}",
            "{ zero_fraction = 1.0 }, expected a zero_fraction above 0 and below 1",
        ),
        ("quant.sparsity={zero_fraction=nan}", "`quant.sparsity`"),
        ("quant.sparsity={n_of_m=[2,5]}", "M a divisor of d_model = 128 and d_ff = 384"),
        (
            "quant.sparsity={n_of_m=[4,4]}",
            "`quant.sparsity` is { n_of_m = [4, 4] }, expected n_of_m = [N, M] with 0 < N < M",
        ),
        ("quant.sparsity={n_of_m=[0,4]}", "`quant.sparsity`"),
        ("quant.sparsity={n_of_m=[0,0]}", "`quant.sparsity`"),
        ("quant.estimator=masked", "`quant.estimator` is \"masked\", expected identity"),
        (
            "quant.estimator=annealed",
            "`quant.estimator` is \"annealed\", expected identity, unless schedule.ramp_until is above float_until",
        ),
        ("quant.dead_bias=-1", "`quant.dead_bias` is -1.0, expected a finite number, at least 0"),
        ("quant.dead_bias=0.001", "because only model.family = \"gpt2\" has biases in files"),
        (
            "quant.matmul_precision=int8",
            "`quant.matmul_precision` is \"int8\", expected float, because this value requires quant.activations = \"int8\"",
        ),
        (
            "quant.matmul_precision=int8_bf16",
            "`quant.matmul_precision` is \"int8_bf16\", expected float, because this value requires quant.activations = \"int8\"",
        ),
        ("quant.quantization_penalty=-1", "`quant.quantization_penalty`"),
        ("quant.scale_penalty=inf", "`quant.scale_penalty`"),
        ("lora.rank=129", "`lora.rank` is 129, expected 0 (off) to d_model = 128"),
        (
            "lora.rank=8",
            "`run.start_from` is \"\", expected a run folder or a model file, whose weights lora.rank = 8",
        ),
        ("lora.alpha=0", "`lora.alpha` is 0.0, expected a finite number above 0"),
        ("lora.alpha=inf", "`lora.alpha`"),
        (
            "lora.targets=[]",
            "`lora.targets` is [], expected some of all, query, key, value, output, gate, up, down",
        ),
        ("lora.targets=[\"q_proj\"]", "[\"q_proj\"], expected some of all, query"),
        ("optim.lr=0", "`optim.lr` is 0.0, expected a finite number above 0"),
        ("optim.lr=nan", "`optim.lr` is nan"),
        ("optim.muon_lr=-1", "`optim.muon_lr`"),
        ("optim.muon_momentum=1", "`optim.muon_momentum`"),
        ("optim.beta1=1", "`optim.beta1` is 1.0, expected at least 0 and below 1"),
        ("optim.beta2=-0.1", "`optim.beta2`"),
        ("optim.epsilon=0", "`optim.epsilon`"),
        ("optim.weight_decay=-0.1", "`optim.weight_decay`"),
        ("optim.clip_norm=-1", "`optim.clip_norm`"),
        ("optim.z_loss=nan", "`optim.z_loss`"),
        ("schedule.warmup_steps=1000000001", "`schedule.warmup_steps`"),
        ("schedule.decay_fraction=1.1", "`schedule.decay_fraction` is 1.1, expected 0 to 1"),
        ("schedule.min_lr_ratio=2", "`schedule.min_lr_ratio`"),
        ("schedule.weight_decay_until=-1", "`schedule.weight_decay_until`"),
        ("schedule.float_until=1.5", "`schedule.float_until`"),
        ("schedule.ramp_until=1.5", "`schedule.ramp_until`"),
        (
            "schedule.sparse_until=1",
            "`schedule.sparse_until` is 1.0, expected 0 (at once), or at least float_until",
        ),
        ("schedule.sparse_until=nan", "`schedule.sparse_until`"),
        ("run.name=a/b", "`run.name` is \"a/b\", expected a plain file name"),
        ("run.name=\"\"", "`run.name`"),
        ("run.name=..", "`run.name`"),
        ("run.out_dir=\"\"", "`run.out_dir`"),
        ("run.device=tpu", "expected one of auto, flex, ndarray, wgpu, tch, cuda"),
        ("run.steps=0", "`run.steps` is 0, expected 1 to 1000000000"),
        ("run.batch_size=0", "`run.batch_size`"),
        ("run.batch_size=1000000000", "tokens per step"),
        ("run.gradient_accumulation=0", "`run.gradient_accumulation`"),
        ("run.log_every=0", "`run.log_every`"),
        ("run.eval_every=0", "`run.eval_every`"),
        ("run.eval_windows=9000000000", "`run.eval_windows`"),
        ("run.checkpoint_every=0", "`run.checkpoint_every`"),
        ("run.keep_checkpoints=0", "`run.keep_checkpoints`"),
        ("run.sample_tokens=9000000000", "`run.sample_tokens`"),
        ("run.spike_factor=1", "`run.spike_factor`"),
        ("run.max_bad_steps=0", "`run.max_bad_steps`"),
        ("run.max_rollbacks=9000000000", "`run.max_rollbacks`"),
    ] {
        let mut experiment = default();
        experiment.set(assignment).unwrap();
        let message = experiment.validate("x.toml").expect_err(assignment).to_string();
        assert!(message.starts_with("x.toml: ") && message.contains(fragment), "{message}");
    }
    let mut integer = default();
    for assignment in ["quant.activations=int8", "quant.matmul_precision=int8"] {
        integer.set(assignment).unwrap();
    }
    integer.validate("one scale per channel").unwrap();
    for wrong in ["quant.granularity={per_group=32}", "model.mixed_precision=bf16"] {
        let mut integer = integer.clone();
        integer.set(wrong).unwrap();
        assert!(integer.validate("").unwrap_err().to_string().contains("quant.matmul_precision"), "{wrong}");
    }
    let mut half = default();
    for assignment in ["quant.matmul_precision=bf16", "quant.granularity={per_group=32}"] {
        half.set(assignment).unwrap();
    }
    half.validate("of float activations, with one scale per group").unwrap();
    half.set("model.mixed_precision=bf16").unwrap();
    let told = half.validate("").unwrap_err().to_string();
    assert!(
        told.contains(
            "`quant.matmul_precision` is \"bf16\", expected float, because this value requires model.mixed_precision"
        ),
        "{told}"
    );
    let mut frozen = default();
    for assignment in ["lora.rank=8", "run.start_from=base.gguf"] {
        frozen.set(assignment).unwrap();
    }
    frozen.validate("with a base").unwrap();
    for key in ["schedule.float_until", "schedule.ramp_until"] {
        let mut blended = frozen.clone();
        blended.set(&format!("{key}=0.5")).unwrap();
        let message = blended.validate("").unwrap_err().to_string();
        assert!(
            message.contains(&format!("`{key}` is 0.5, expected 0.0, as lora.rank = 8 freezes")),
            "{message}"
        );
    }
    let mut gpt2 = default();
    for assignment in ["model.family=gpt2", "model.activation=gelu", "lora.targets=[\"gate\"]"] {
        gpt2.set(assignment).unwrap();
    }
    let refusal = gpt2.validate("").unwrap_err().to_string();
    assert!(refusal.contains("some of all, query, key, value, output, up, down"), "{refusal}");
    integer.set("quant.scale=ttq").unwrap();
    assert!(integer.validate("").unwrap_err().to_string().contains("ttq, which has two"));
    let mut annealed = default();
    for assignment in ["quant.estimator=annealed", "schedule.ramp_until=0.5"] {
        annealed.set(assignment).unwrap();
    }
    annealed.validate("weights harden").unwrap();
    for wrong in ["quant.scale=learned", "quant.scale=seq", "quant.scale=ttq"] {
        let mut annealed = annealed.clone();
        annealed.set(wrong).unwrap();
        assert!(annealed.validate("").unwrap_err().to_string().contains("a computed scale"), "{wrong}");
    }
    let mut dead = default();
    for assignment in ["quant.dead_bias=0.001", "model.family=gpt2", "model.activation=gelu"] {
        dead.set(assignment).unwrap();
    }
    dead.validate("biases").unwrap();
    dead.set("quant.sparsity={zero_fraction=0.5}").unwrap();
    assert!(dead.validate("").unwrap_err().to_string().contains("quant.sparsity selects zeros"));
    let mut sparse = default();
    for assignment in ["quant.sparsity={n_of_m=[2,8]}", "quant.scale=learned"] {
        sparse.set(assignment).unwrap();
    }
    sparse.validate("two of eight").unwrap();
    sparse.set("quant.estimator=masked").unwrap();
    assert!(sparse.validate("").unwrap_err().to_string().contains("under quant.sparsity"));
    let mut ramp = default();
    ramp.set("schedule.float_until=0.5").unwrap();
    ramp.validate("0 is a switch").unwrap();
    ramp.set("schedule.ramp_until=0.4").unwrap();
    assert!(ramp.validate("").unwrap_err().to_string().contains("at least float_until = 0.5"));
    let seed = DEFAULT.replacen("seed = 1", "seed = 18446744073709551615", 1);
    assert!(message(&seed).contains("run.seed"));
}

#[test]
fn a_file_that_is_no_text_is_told_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bytes.toml");
    fs::write(&path, [DEFAULT.as_bytes(), &[0xff, 0xfe]].concat()).unwrap();
    let missing = folder.path().join("missing.toml");
    for (path, fragment) in [(&path, "UTF-8"), (&missing, "missing.toml: expected an experiment")] {
        let error = Experiment::load(path).unwrap_err();
        assert!(matches!(error, TrainError::Experiment { .. }));
        assert!(error.to_string().contains(fragment), "{error}");
    }
    assert!(Experiment::load(folder.path()).is_err());
}

#[test]
fn a_bad_override_changes_nothing_and_names_the_allowed_values() {
    for (assignment, fragment) in [
        ("optim.lrr=1", "unknown key `optim.lrr`, expected one of `beta1`"),
        ("optimizer.lr=1", "unknown section `optimizer`, expected one of `data`"),
        ("quant.granularity.per_group=64", "unknown key `quant.granularity.per_group`"),
        ("optim.lr", "expected section.key=value"),
        ("lr=1", "expected section.key=value"),
        ("optim.lr=fast", "invalid type: string \"fast\", expected a number"),
        ("run.steps=1.5", "in `run.steps`"),
        ("run.name=5", "expected a string"),
        ("data.train=a.txt", "expected a sequence"),
        ("quant.scale=absmax", "unknown variant `absmax`, expected one of `absmean`"),
        ("run.steps=1\n[model]", "in `run.steps`"),
    ] {
        let mut experiment = default();
        let message = experiment.set(assignment).expect_err(assignment).to_string();
        assert!(message.contains(fragment), "{message}");
        assert_eq!(experiment, default());
    }
}

/// Every `section.key` of an experiment.
fn keys() -> Vec<(String, String)> {
    let whole: Table = DEFAULT.parse().unwrap();
    let key = |(section, table): (&String, &Value)| {
        let keys = table.as_table().into_iter().flatten();
        keys.map(|(key, _)| (section.clone(), key.clone())).collect::<Vec<_>>()
    };
    whole.iter().flat_map(key).collect()
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-0.5..1.5).prop_map(Value::from),
        prop::sample::select(vec![f64::NAN, f64::INFINITY, -0.0, f64::MIN_POSITIVE]).prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        prop::sample::select(vec![
            "gpt2",
            "bitnet",
            "seq",
            "ttq",
            "annealed",
            "none",
            "per_tensor",
            "squared_relu",
            "byte"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 4, 2, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            (prop::sample::select(vec!["per_group", "zero_fraction", "n_of_m"]), inner)
                .prop_map(|(key, value)| Value::Table(Table::from_iter([(key.to_string(), value)]))),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_change_of_one_key_is_an_error_or_a_sound_experiment(key in any::<Index>(), value in value()) {
        let keys = keys();
        let (section, key) = key.get(&keys);
        let mut whole: Table = DEFAULT.parse().unwrap();
        whole[section][key.as_str()] = value.clone();
        let text = toml::to_string(&whole).unwrap();
        let mut changed = default();
        let set = changed.set(&format!("{section}.{key}={value}"));
        let parsed = Experiment::parse(&text, "mutated");
        prop_assert_eq!(set.is_ok(), parsed.is_ok());
        if let Ok(parsed) = parsed && parsed.validate("mutated").is_ok() {
            prop_assert_eq!(&parsed, &changed);
            prop_assert_eq!(&Experiment::parse(&parsed.to_toml(), "again").unwrap(), &parsed);
            prop_assert!(parsed.model.num_params() > 0);
            prop_assert!(parsed.run_dir().starts_with(&parsed.run.out_dir));
        }
    }

    #[test]
    fn any_text_is_an_error_or_an_experiment(text in any::<String>(), at in any::<Index>()) {
        let cut = (0..DEFAULT.len()).rev().filter(|i| DEFAULT.is_char_boundary(*i));
        let cut = at.get(&cut.collect::<Vec<_>>()).to_owned();
        let _ = Experiment::parse(&format!("{}{text}{}", &DEFAULT[..cut], &DEFAULT[cut..]), "spliced");
        let _ = Experiment::parse(&text, "text");
        let _ = default().set(&text);
    }
}
