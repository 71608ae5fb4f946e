//! Promise: a signal loses at most one step, and the terminal is restored.

use serde_json::Value;
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const SMALL: &str = "train --tokenizer byte --device flex --batch-size 2 --out OUT --set run.name=x \
    --set model.context=32 --set model.d_model=64 --set model.d_ff=96 --set model.n_layers=1 --set run.eval_every=150 \
    --set run.eval_windows=4 --set run.checkpoint_every=1000 --set run.log_every=1 --set run.sample_tokens=2";

fn arguments(out: &Path, more: &[&str]) -> Vec<String> {
    let small = SMALL.split_whitespace().map(|word| word.replace("OUT", &out.display().to_string()));
    small.chain(more.iter().map(ToString::to_string)).collect()
}

/// The tests may run where signals are ignored (`nohup`, the background of a script); the program then ignores them too.
fn duck(out: &Path, more: &[&str]) -> Child {
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP,INT,TERM", env!("CARGO_BIN_EXE_duck")]).args(arguments(out, more));
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

fn steps(out: &Path) -> usize {
    let metrics = fs::read_to_string(out.join("x-1/metrics.jsonl")).unwrap_or_default();
    metrics.lines().filter(|line| line.contains("\"train\"")).count()
}

/// Waits for the first steps.
fn wait_for(out: &Path, count: usize) {
    let patience = Instant::now();
    while steps(out) < count {
        assert!(patience.elapsed() < Duration::from_secs(120), "no step");
        sleep(Duration::from_millis(5));
    }
}

fn result(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("x-1/result.json")).unwrap()).unwrap()
}

/// The lines without their times and memory, which depend on the machine.
fn metrics(out: &Path) -> Vec<Value> {
    let metrics = fs::read_to_string(out.join("x-1/metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let fields = line.as_object_mut().unwrap();
        for key in ["tokens_per_s", "peak_rss_bytes", "elapsed_s"] {
            assert!(fields.remove(key).is_some(), "{key}");
        }
        line
    });
    lines.collect()
}

#[test]
fn a_run_stopped_at_ten_moments_is_the_uninterrupted_one() {
    stop_at_ten_moments(&["--steps", "4000"]);
}

/// A resumed run rolls back to the same checkpoint as the uninterrupted one.
#[test]
fn a_run_that_rolls_back_is_the_uninterrupted_one() {
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("text.jsonl");
    let mut random = 1u64;
    let mut letters = |_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from(b'!' + (random >> 33) as u8 % 90)
    };
    let document = |index: usize| match index % 6 {
        5 => (0..150).map(&mut letters).collect(),
        _ => "ab".repeat(150),
    };
    let lines: Vec<String> =
        (0..120).map(document).map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    fs::write(&text, lines.join("\n")).unwrap();
    let spiky = "run.spike_factor=1.5 run.max_bad_steps=1 run.max_rollbacks=1000 run.checkpoint_every=25 \
                 run.keep_checkpoints=1 run.eval_every=50";
    let mut more = vec!["--steps", "3000", "--data", text.to_str().unwrap()];
    more.extend(spiky.split_whitespace().flat_map(|key| ["--set", key]));
    let result = stop_at_ten_moments(&more);
    assert!(result["rollbacks"].as_u64() > Some(10), "{result}");
}

/// Stops a run by ten signals, resumes it, compares it with the uninterrupted run, and returns its result.
fn stop_at_ten_moments(more: &[&str]) -> Value {
    let home = tempfile::tempdir().unwrap();
    let [whole, stopped] = ["whole", "stopped"].map(|name| home.path().join(name));
    let resume = [more, &["--resume"]].concat();
    assert!(duck(&whole, more).wait().unwrap().success());
    let mut moments = 0;
    // The system's clock is random enough.
    let mut random = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() as u64;
    while moments < 10 {
        let before = steps(&stopped);
        let mut child = duck(&stopped, &resume);
        wait_for(&stopped, before + 1);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        sleep(Duration::from_millis(random >> 33 & 63));
        let done = steps(&stopped);
        send(["-TERM", "-INT", "-HUP"][moments % 3], &child);
        let status = child.wait().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(status.code(), Some(7), "{status}");
        let result = result(&stopped);
        assert_eq!((&result["interrupted"], &result["finished"]), (&true.into(), &false.into()));
        let step = result["steps"].as_u64().unwrap() as usize;
        assert!(step >= done, "{done} steps were done, {step} are saved");
        assert!(stopped.join(format!("x-1/checkpoints/step-{step:08}")).exists());
        moments += 1;
    }
    assert_eq!(moments, 10, "the run is too short");
    assert!(duck(&stopped, &resume).wait().unwrap().success());
    let [whole_metrics, stopped_metrics] = [&whole, &stopped].map(|out| metrics(out));
    assert_eq!(whole_metrics.len(), stopped_metrics.len());
    for (whole, stopped) in whole_metrics.iter().zip(&stopped_metrics) {
        assert_eq!(whole, stopped);
    }
    let [a, b] = [&whole, &stopped].map(|out| {
        let file = out.join("x.ternary");
        let mut export = Command::new(env!("CARGO_BIN_EXE_duck"));
        let export = export.arg("export").arg(out.join("x-1")).arg(&file).stdout(Stdio::null());
        assert!(export.status().unwrap().success());
        fs::read(file).unwrap()
    });
    assert!(a == b, "the models differ");
    let result = result(&stopped);
    assert_eq!(result["interrupted"], false);
    result
}

/// Otherwise the files of its first end would be taken for the model of the run.
#[test]
fn a_run_that_goes_on_has_no_results_of_its_earlier_end() {
    let home = tempfile::tempdir().unwrap();
    let constant = ["--set", "schedule.shape=constant", "--set", "model.d_ff=128", "--steps"];
    let run = |steps: &str| duck(home.path(), &[&constant[..], &[steps, "--resume"]].concat());
    let at = |name: &str| home.path().join("x-1").join(name);
    assert!(run("40").wait().unwrap().success());
    assert!(["model.gguf", "loss.svg", "codes.svg"].iter().all(|name| at(name).exists()));
    let mut child = run("100000");
    wait_for(home.path(), 45);
    assert!(!at("model.gguf").exists() && !at("result.json").exists());
    send("-KILL", &child);
    child.wait().unwrap();
    let mut child = run("100000");
    wait_for(home.path(), 50);
    send("-TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(!at("model.gguf").exists() && at("loss.svg").exists());
    let steps = result(home.path())["steps"].as_u64().unwrap();
    assert!(steps > 40, "{steps}");
    // What the checkpoint holds.
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_duck"));
    assert!(inspect.arg("inspect").arg(home.path().join("x-1")).output().unwrap().status.success());
    // Resumed as it is, a finished run ends as it did.
    let finish = || {
        assert!(run(&(steps + 3).to_string()).wait().unwrap().success());
        (fs::read(at("model.gguf")).unwrap(), fs::read(at("codes.svg")).unwrap())
    };
    let first = finish();
    assert!(first == finish(), "another end");
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let home = tempfile::tempdir().unwrap();
    // A last evaluation that never ends: the first signal waits for it.
    let slow = ["--set", "run.eval_every=9", "--set", "run.eval_windows=0", "--set", "run.sample_tokens=0"];
    let text = home.path().join("valid.txt");
    fs::write(&text, "The duck swims on the pond. ".repeat(400_000)).unwrap();
    let valid = format!("data.valid=[{:?}]", text.display().to_string());
    let mut child = duck(home.path(), &[&slow[..], &["--steps", "9", "--set", &valid]].concat());
    wait_for(home.path(), 9);
    send("-TERM", &child);
    sleep(Duration::from_millis(1300));
    assert!(child.try_wait().unwrap().is_none(), "the evaluation was too short");
    send("-TERM", &child);
    let sent = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(sent.elapsed() < Duration::from_secs(2));
    assert!(!home.path().join("x-1/result.json").exists());
}

/// The next session does the validation of the last step.
#[test]
fn an_evaluation_does_not_delay_the_end() {
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("valid.txt");
    fs::write(&text, "The duck swims on the pond. ".repeat(40_000)).unwrap();
    let valid = format!("data.valid=[{:?}]", text.display().to_string());
    let [whole, stopped] = ["whole", "stopped"].map(|name| home.path().join(name));
    let more = ["--steps", "6", "--set", "run.eval_every=3", "--set", "run.eval_windows=0", "--set", &valid];
    assert!(duck(&whole, &more).wait().unwrap().success());
    let mut child = duck(&stopped, &more);
    wait_for(&stopped, 3);
    sleep(Duration::from_millis(100));
    send("-TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert_eq!((metrics(&stopped).len(), &result(&stopped)["steps"]), (3, &3.into()));
    assert!(duck(&stopped, &[&more[..], &["--resume"]].concat()).wait().unwrap().success());
    assert_eq!(metrics(&stopped), metrics(&whole));
    assert_eq!(result(&stopped)["best_valid_loss"], result(&whole)["best_valid_loss"]);
}

#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    let home = tempfile::tempdir().unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_duck")])
        .args(arguments(home.path(), &["--steps", "200"]))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(home.path(), 1);
    send("-HUP", &child);
    assert!(child.wait().unwrap().success());
}

/// Instead of a signal: the command gets no more memory, its terminal is closed, or its terminal accepts no output and the
/// command gets TERM twice.
const NO_MEMORY: i32 = 99;
const CLOSED: i32 = 98;
const STUCK: i32 = 97;

/// Hides the cursor.
const HIDE: &[u8] = b"\x1b[?25l";
/// Runs a command under a pseudo-terminal, sends it keys and a signal once it draws, and prints the exit code, whether the
/// terminal's attributes are those of before, and what was drawn.
const TERMINAL: &str = r#"
import fcntl, json, os, pty, resource, select, signal, struct, sys, termios, time
keys, number, command = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
keeper, slave = pty.openpty()
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
before = termios.tcgetattr(slave)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2): os.dup2(slave, fd)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execv(command[0], command)
drawn, start, sent, code = b"", time.time(), 0, None
while code is None and time.time() - start < 60:
    if select.select([keeper], [], [], 0.05)[0]:
        drawn += os.read(keeper, 65536)
    if len(drawn) > 3000 or (drawn and time.time() - start > 5):
        if sent < len(keys):
            os.write(keeper, keys[sent:sent + 1]); sent += 1; time.sleep(0.4)
        elif sent == len(keys) and number:
            if number == 99: resource.prlimit(child, resource.RLIMIT_AS, (1 << 20, 1 << 20))
            elif number == 98:
                os.close(keeper); os.close(slave)
                print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}))
                sys.exit()
            elif number == 97:
                # Nobody reads: the terminal's buffer fills.
                time.sleep(4)
                for signal_number, pause in ((signal.SIGTERM, 1.5), (signal.SIGTERM, 4), (signal.SIGKILL, 0.1)):
                    os.kill(child, signal_number)
                    time.sleep(pause)
            else: os.kill(child, number)
            sent += 1
    done, status = os.waitpid(child, os.WNOHANG)
    if done: code = os.waitstatus_to_exitcode(status)
if code is None: os.kill(child, signal.SIGKILL)
while select.select([keeper], [], [], 0.1)[0]: drawn += os.read(keeper, 65536)
print(json.dumps({"code": code, "same": before == termios.tcgetattr(slave), "screen": b"\x1b[?1049h" in drawn,
    "left": drawn.rfind(b"\x1b[?1049l") > drawn.rfind(b"\x1b[?1049h"), "cursor": drawn.rfind(b"\x1b[?25h") >= drawn.rfind(b"\x1b[?25l"),
    "end": drawn[-4000:].decode(errors="replace"), "drawn": drawn.hex()}))
"#;

/// The output of [`TERMINAL`] for a run of many steps; `None` without Python.
fn in_terminal(out: &Path, term: &str, keys: &str, signal: i32, more: &[&str]) -> Option<Value> {
    let script = out.join("terminal.py");
    fs::File::create(&script).unwrap().write_all(TERMINAL.as_bytes()).unwrap();
    let hex: String = keys.bytes().map(|key| format!("{key:02x}")).collect();
    let python = Command::new("python3")
        .arg(&script)
        .args([&hex, &signal.to_string(), env!("CARGO_BIN_EXE_duck")])
        .args(arguments(out, more))
        .env("TERM", term)
        .output();
    let Ok(python) = python else {
        println!("skipped: python3: not found");
        return None;
    };
    assert!(python.status.success(), "{}", String::from_utf8_lossy(&python.stderr));
    Some(serde_json::from_slice(&python.stdout).unwrap())
}

/// The frames that were drawn; each ends by hiding the cursor.
fn pictures(seen: &Value) -> Vec<String> {
    let hex = seen["drawn"].as_str().unwrap().as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let drawn: Vec<u8> = hex.map(byte).collect();
    let mut screen = vt100::Parser::default();
    let mut pictures = Vec::new();
    let mut start = 0;
    for end in HIDE.len()..=drawn.len() {
        if drawn[..end].ends_with(HIDE) {
            screen.process(&drawn[start..end]);
            start = end;
            pictures.push(screen.screen().contents());
        }
    }
    pictures
}

/// The numbers of `{before}A{between}B` in a picture.
fn numbers(picture: &str, before: &str, between: &str) -> Option<(usize, usize)> {
    let (_, rest) = picture.split_once(before)?;
    let (first, rest) = rest.split_once(between)?;
    let second = rest.split(|next: char| !next.is_ascii_digit()).next()?;
    Some((first.trim().parse().ok()?, second.parse().ok()?))
}

#[test]
fn the_display_shows_true_progress_keys_and_samples() {
    let home = tempfile::tempdir().unwrap();
    let more = ["--steps", "700", "--set", "run.seed=7"];
    let Some(seen) = in_terminal(home.path(), "xterm-256color", "", 0, &more) else { return };
    assert_eq!((&seen["code"], &seen["screen"]), (&0.into(), &true.into()));
    let pictures = pictures(&seen);
    let mut last = 0;
    for picture in &pictures {
        let (step, steps) = numbers(picture, "step ", " of ").unwrap_or_else(|| panic!("{picture}"));
        assert!(step <= steps && steps == 700 && step >= last, "after {last}:\n{picture}");
        let percent = format!("{} %", 100 * step / steps);
        assert!(picture.contains(&percent), "no {percent}:\n{picture}");
        if let Some((batch, batches)) = numbers(picture, "batch ", " of ") {
            assert!(batch <= batches && batches > 0, "{picture}");
        }
        for shown in ["x-7", "epoch ", "← →", "q quit", "Ctrl-C stop, with a checkpoint"] {
            assert!(picture.contains(shown), "no {shown}:\n{picture}");
        }
        last = step;
    }
    let shown = |what: &str| pictures.iter().any(|picture| picture.contains(what));
    assert!(shown("Loss, nats per token") && shown("• validation") && shown("Samples of step 150"));
}

#[test]
fn a_resumed_run_shows_what_was_before() {
    let home = tempfile::tempdir().unwrap();
    let more = ["--steps", "1500", "--set", "run.eval_every=500", "--resume"];
    let mut child = duck(home.path(), &more);
    wait_for(home.path(), 520);
    send("-TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let before = result(home.path())["steps"].as_u64().unwrap() as usize;
    assert!(before < 1000, "the run was too fast: {before}");
    let Some(seen) = in_terminal(home.path(), "xterm-256color", "", 0, &more) else { return };
    let step = |picture: &String| numbers(picture, "step ", " of ").map_or(0, |(step, _)| step);
    // Before the next evaluation.
    let first = pictures(&seen).into_iter().find(|picture| (before..1000).contains(&step(picture)));
    let first = first.expect("a picture of the first steps");
    assert!(first.contains("• validation "), "{first}");
    // A curve from the left on: the run has done a third.
    let braille = |c: char| ('\u{2801}'..='\u{28ff}').contains(&c);
    let columns = |line: &str| line.chars().position(braille);
    let start = first.lines().filter_map(columns).min().unwrap();
    assert!(start < 12, "column {start}:\n{first}");
}

#[test]
fn the_terminal_is_restored_however_a_run_ends() {
    let long = ["--steps", "100000", "--set", "schedule.warmup_steps=5"];
    for (name, keys, signal, code) in [
        ("Ctrl-C", "\x03", 0, 7),
        ("TERM", "", 15, 7),
        ("HUP", "", 1, 7),
        ("quit", "qs", 0, 7),
        ("kill", "qk", 0, 7),
        ("memory", "", NO_MEMORY, 4),
        ("QUIT", "", 3, -3),
        // Not to quit after all.
        ("go on", "qc\x03", 0, 7),
        // No key of the interface, and no signal.
        ("Ctrl-Z, Ctrl-C", "\x1a\x1c\x03", 0, 7),
    ] {
        let home = tempfile::tempdir().unwrap();
        let Some(seen) = in_terminal(home.path(), "xterm-256color", keys, signal, &long) else { return };
        assert_eq!(seen["code"], code, "{name}: {seen}");
        for what in ["same", "screen", "left", "cursor"] {
            assert_eq!(seen[what], true, "{name}, {what}: {seen}");
        }
        let saved = fs::read_dir(home.path().join("x-1/checkpoints")).map(Iterator::count).unwrap_or(0);
        // Without memory it may live long enough for its first one.
        assert!(name == "memory" || (saved > 0) != ["kill", "QUIT"].contains(&name), "{name}");
    }
}

/// As after Ctrl-S, or if the window hangs.
#[test]
fn a_second_signal_ends_a_run_whose_terminal_is_stuck() {
    let home = tempfile::tempdir().unwrap();
    let long = ["--steps", "100000", "--set", "schedule.warmup_steps=5"];
    let Some(seen) = in_terminal(home.path(), "xterm-256color", "", STUCK, &long) else { return };
    assert_eq!((&seen["code"], &seen["same"]), (&7.into(), &true.into()), "{seen}");
}

/// A window that is closed, or a connection that is lost.
#[test]
fn a_run_whose_terminal_is_closed_ends_with_a_checkpoint() {
    let long = ["--steps", "100000", "--set", "schedule.warmup_steps=5"];
    for term in ["xterm-256color", "dumb"] {
        let home = tempfile::tempdir().unwrap();
        let Some(seen) = in_terminal(home.path(), term, "", CLOSED, &long) else { return };
        assert_eq!(seen["code"], 7, "{term}: {seen}");
        let result = result(home.path());
        assert_eq!(result["interrupted"], true, "{term}");
        let step = result["steps"].as_u64().unwrap();
        assert!(home.path().join(format!("x-1/checkpoints/step-{step:08}")).exists(), "{term}");
    }
}

/// The display is removed after its last frame.
#[test]
fn the_end_shows_samples_and_what_may_be_done_next() {
    for flags in [&[][..], &["--plain"]] {
        let home = tempfile::tempdir().unwrap();
        let more = [&["--steps", "20", "--set", "model.d_ff=128"], flags].concat();
        let Some(seen) = in_terminal(home.path(), "xterm-256color", "", 0, &more) else { return };
        assert_eq!((&seen["code"], &seen["screen"]), (&0.into(), &flags.is_empty().into()), "{seen}");
        let end = seen["end"].as_str().unwrap();
        for shown in [
            "sample  \u{1b}[2m",
            "x-1 (model.gguf, loss.svg, codes.svg, samples.txt, metrics.jsonl)",
            "duck chat ",
            "duck generate ",
        ] {
            assert!(end.contains(shown), "{flags:?}: {shown} is not in {end}");
        }
    }
}

#[test]
fn a_terminal_that_cannot_draw_gets_lines() {
    let home = tempfile::tempdir().unwrap();
    let Some(seen) = in_terminal(home.path(), "dumb", "", 0, &["--steps", "20"]) else { return };
    assert_eq!((&seen["code"], &seen["screen"]), (&0.into(), &false.into()), "{seen}");
    assert!(!seen["end"].as_str().unwrap().contains('\u{1b}'), "{seen}");
}
