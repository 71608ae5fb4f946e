//! Promise: a signal costs at most a step, and the terminal is as it was.

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

/// Split, step and loss of every line.
fn losses(out: &Path) -> Vec<[String; 3]> {
    let metrics = fs::read_to_string(out.join("x-1/metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| ["split", "step", "loss"].map(|key| line[key].to_string())).collect()
}

#[test]
fn a_run_stopped_at_ten_moments_is_the_uninterrupted_one() {
    let home = tempfile::tempdir().unwrap();
    let [whole, stopped] = ["whole", "stopped"].map(|name| home.path().join(name));
    let steps_of_it = ["--steps", "4000"];
    assert!(duck(&whole, &steps_of_it).wait().unwrap().success());
    let mut moments = 0;
    // The system's clock is random enough.
    let mut random = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() as u64;
    while moments < 10 {
        let before = steps(&stopped);
        let mut child = duck(&stopped, &["--steps", "4000", "--resume"]);
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
    assert!(duck(&stopped, &["--steps", "4000", "--resume"]).wait().unwrap().success());
    assert_eq!(losses(&whole), losses(&stopped));
    let [a, b] = [&whole, &stopped].map(|out| {
        let file = out.join("x.ternary");
        let mut export = Command::new(env!("CARGO_BIN_EXE_duck"));
        let export = export.arg("export").arg(out.join("x-1")).arg(&file).stdout(Stdio::null());
        assert!(export.status().unwrap().success());
        fs::read(file).unwrap()
    });
    assert!(a == b, "the models differ");
    assert_eq!(result(&stopped)["interrupted"], false);
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let home = tempfile::tempdir().unwrap();
    // Evaluations that never end: the first signal waits for one.
    let slow = ["--set", "run.eval_every=3", "--set", "run.eval_windows=0", "--set", "run.sample_tokens=0"];
    let text = home.path().join("valid.txt");
    fs::write(&text, "The duck swims on the pond. ".repeat(400_000)).unwrap();
    let valid = format!("data.valid=[{:?}]", text.display().to_string());
    let mut child = duck(home.path(), &[&slow[..], &["--steps", "9", "--set", &valid]].concat());
    wait_for(home.path(), 3);
    send("-TERM", &child);
    sleep(Duration::from_millis(1300));
    assert!(child.try_wait().unwrap().is_none(), "the evaluation was too short");
    send("-TERM", &child);
    let sent = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert!(sent.elapsed() < Duration::from_secs(2));
    assert!(!home.path().join("x-1/result.json").exists());
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

/// Runs a command under a pseudo-terminal, sends it keys and a signal once it draws, and prints the exit code, whether the
/// terminal's attributes are those of before, and what was drawn.
const TERMINAL: &str = r#"
import fcntl, json, os, pty, select, signal, struct, sys, termios, time
keys, number, command = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
keeper, slave = pty.openpty()
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
before = termios.tcgetattr(slave)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2): os.dup2(slave, fd)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL)
    os.execv(command[0], command)
drawn, start, sent, code = b"", time.time(), 0, None
while code is None and time.time() - start < 60:
    if select.select([keeper], [], [], 0.05)[0]:
        drawn += os.read(keeper, 65536)
    if len(drawn) > 3000 or (drawn and time.time() - start > 5):
        if sent < len(keys):
            os.write(keeper, keys[sent:sent + 1]); sent += 1; time.sleep(0.4)
        elif sent == len(keys) and number:
            os.kill(child, number); sent += 1
    done, status = os.waitpid(child, os.WNOHANG)
    if done: code = os.waitstatus_to_exitcode(status)
if code is None: os.kill(child, signal.SIGKILL)
while select.select([keeper], [], [], 0.1)[0]: drawn += os.read(keeper, 65536)
print(json.dumps({"code": code, "same": before == termios.tcgetattr(slave), "screen": b"\x1b[?1049h" in drawn,
    "left": drawn.rfind(b"\x1b[?1049l") > drawn.rfind(b"\x1b[?1049h"), "cursor": drawn.rfind(b"\x1b[?25h") >= drawn.rfind(b"\x1b[?25l"),
    "end": drawn[-600:].decode(errors="replace")}))
"#;

/// What [`TERMINAL`] says of a run of many steps; `None` without Python.
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

#[test]
fn the_terminal_is_restored_however_a_run_ends() {
    let long = ["--steps", "100000", "--set", "schedule.warmup_steps=5"];
    for (name, keys, signal, code) in [
        ("Ctrl-C", "\x03", 0, 7),
        ("TERM", "", 15, 7),
        ("HUP", "", 1, 7),
        ("quit", "qs", 0, 7),
        ("kill", "qk", 0, 7),
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
        assert_eq!(saved > 0, name != "kill", "{name}");
    }
}

#[test]
fn a_terminal_that_cannot_draw_gets_lines() {
    let home = tempfile::tempdir().unwrap();
    let Some(seen) = in_terminal(home.path(), "dumb", "", 0, &["--steps", "20"]) else { return };
    assert_eq!((&seen["code"], &seen["screen"]), (&0.into(), &false.into()), "{seen}");
    assert!(!seen["end"].as_str().unwrap().contains('\u{1b}'), "{seen}");
}
