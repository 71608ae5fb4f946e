//! Finds out the commit of the source: result files name it (`RunResult::git`).

use std::{env, fs, path::Path, process::Command};

/// What the library is made of, besides the crates of the registry.
const SOURCE: [&str; 5] =
    ["Cargo.toml", "build.rs", "crates/burn-ternary", "crates/ternary-format", "crates/ternary-kernels"];
/// Where git notes the current commit; the last is written whenever it changes, and may be absent.
const HEAD: [&str; 2] = ["HEAD", "logs/HEAD"];

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let root = Path::new(&root);
    let (commit, dirty) = packaged(root).or_else(|| checked_out(root)).unwrap_or_default();
    println!("cargo::rustc-env=BURN_TERNARY_COMMIT={commit}");
    println!("cargo::rustc-env=BURN_TERNARY_DIRTY={dirty}");
}

/// A package from a registry: `cargo package` wrote down the commit.
fn packaged(root: &Path) -> Option<(String, String)> {
    println!("cargo::rerun-if-changed=Cargo.toml");
    let text = fs::read_to_string(root.join(".cargo_vcs_info.json")).ok()?;
    let (_, rest) = text.split_once("\"sha1\"")?;
    let commit = rest.split('"').nth(1)?;
    let dirty = text
        .split_once("\"dirty\"")
        .is_some_and(|(_, rest)| rest.trim_start_matches([':', ' ']).starts_with("true"));
    Some((commit.into(), dirty.to_string()))
}

/// A checkout: git knows. A repository around one that has none of its own is another project's.
fn checked_out(root: &Path) -> Option<(String, String)> {
    if !root.join(".git").exists() {
        return None;
    }
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").current_dir(root).arg("--no-optional-locks").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let changes = git(&[&["status", "--porcelain", "--untracked-files=no", "--"], &SOURCE[..]].concat())?;
    // All of it is compiled anyway when one of these changes, but for the commit alone.
    for path in SOURCE {
        println!("cargo::rerun-if-changed={path}");
    }
    for path in HEAD.iter().filter_map(|name| git(&["rev-parse", "--git-path", name])) {
        if root.join(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    Some((commit, (!changes.is_empty()).to_string()))
}
