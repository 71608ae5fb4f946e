//! Versions of the experiment format, and how files of older versions are read.
//!
//! A file of version `v` has `version = v` as its first key; a file without this key has version 0. To change the format, raise
//! [`VERSION`] and append a migration to `MIGRATIONS` that turns the keys of the version before into those of the new one. Add
//! a run folder of the version before to `tests/fixtures`.

use serde::Deserialize;
use std::{borrow::Cow, ops::Range};
use toml::de::{DeTable, DeValue, Deserializer};
use toml::{Spanned, Table};

/// Version of the experiments that are written.
pub const VERSION: u32 = 1;

/// Changes the keys of one version into those of the next. It works on TOML with positions, so that an error in a file of an
/// older version still names its line.
type Migration = fn(&mut DeTable);

/// The migration at index `v` is that from version `v`.
const MIGRATIONS: [Migration; VERSION as usize] = [name_keys_as_the_field_does];

/// Section, name in version 0, name since version 1.
const RENAMED: [(&str, &str, &str); 4] = [
    ("model", "compute", "mixed_precision"),
    ("quant", "compute", "matmul_precision"),
    ("optim", "matrices", "matrix_optimizer"),
    ("run", "accumulation", "gradient_accumulation"),
];

/// From version 0 to 1.
fn name_keys_as_the_field_does(experiment: &mut DeTable) {
    for (section, old, new) in RENAMED {
        let Some(keys) = section_mut(experiment, section) else { continue };
        // A file with both names keeps the old one, which is an error.
        if !keys.contains_key(new)
            && let Some((key, value)) = keys.remove_entry(old)
        {
            keys.insert(Spanned::new(key.span(), Cow::Borrowed(new)), value);
        }
    }
}

/// Why a file is not an experiment of a known version, and where in its text.
#[derive(Debug)]
pub(super) struct VersionError {
    pub span: Range<usize>,
    pub message: String,
}

/// Takes the version out of an experiment, and changes its keys into those of the current version.
///
/// # Errors
/// The version is not an integer, or newer than this program; a key has its name of an older version.
pub(super) fn migrate(experiment: &mut DeTable) -> Result<(), VersionError> {
    let version = match experiment.remove("version") {
        Some(value) => known(&value)?,
        None => 0,
    };
    for migration in &MIGRATIONS[version..] {
        migration(experiment);
    }
    for (section, old, _) in RENAMED {
        let key = section_mut(experiment, section).and_then(|keys| keys.get_key_value(old));
        if let (Some((key, _)), Some(message)) = (key, renamed(section, old)) {
            return Err(VersionError { span: key.span(), message });
        }
    }
    Ok(())
}

/// The experiment in `text` as a table with the keys of the current version.
///
/// # Errors
/// `text` is not TOML, or as [`migrate`].
pub(super) fn migrated(text: &str) -> Result<Table, String> {
    let mut table = DeTable::parse(text).map_err(|error| error.message().to_owned())?;
    migrate(table.get_mut()).map_err(|error| error.message)?;
    Table::deserialize(Deserializer::from(table)).map_err(|error| error.message().to_owned())
}

/// A sentence with the new name of a key; `None` if it has not been renamed.
pub(super) fn renamed(section: &str, key: &str) -> Option<String> {
    let (.., new) = RENAMED.into_iter().find(|(of, old, _)| (*of, *old) == (section, key))?;
    Some(format!(
        "unknown key `{section}.{key}`: since version 1 of experiments it is named `{section}.{new}`"
    ))
}

fn known(value: &Spanned<DeValue>) -> Result<usize, VersionError> {
    let error = |message| VersionError { span: value.span(), message };
    let number = value.get_ref().as_integer();
    let number = number.and_then(|number| i64::from_str_radix(number.as_str(), number.radix()).ok());
    match number {
        Some(version) if (0..=i64::from(VERSION)).contains(&version) => Ok(version as usize),
        Some(version) if version > 0 => Err(error(format!(
            "`version` is {version}, expected at most {VERSION}: a newer program wrote this experiment, use that one"
        ))),
        _ => Err(error(format!("`version` is {}, expected 0 to {VERSION}", written(value.get_ref())))),
    }
}

/// The value of an unusable version, as far as it is a number or a word.
fn written(value: &DeValue) -> String {
    match value {
        DeValue::Integer(number) => number.to_string(),
        DeValue::String(text) => format!("{text:?}"),
        other => format!("a value of type {}", other.type_str()),
    }
}

fn section_mut<'t, 'i>(experiment: &'t mut DeTable<'i>, section: &str) -> Option<&'t mut DeTable<'i>> {
    match experiment.get_mut(section).map(Spanned::get_mut) {
        Some(DeValue::Table(keys)) => Some(keys),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Experiment;

    const OLD: &str = "model.compute = \"bf16\"\nquant.compute = \"int8\"\noptim.matrices = \"adamw\"\nrun.accumulation = 3\n";
    const NEW: &str = "version = 1\nmodel.mixed_precision = \"bf16\"\nquant.matmul_precision = \"int8\"\n\
                       optim.matrix_optimizer = \"adamw\"\nrun.gradient_accumulation = 3\n";

    fn error(text: &str) -> String {
        Experiment::parse(text, "x.toml").unwrap_err().to_string()
    }

    #[test]
    fn an_experiment_without_a_version_has_the_keys_of_version_0() {
        let new = Experiment::parse(NEW, "new").unwrap();
        assert_ne!(new, Experiment::default());
        for version in ["", "version = 0\n"] {
            assert_eq!(Experiment::parse(&format!("{version}{OLD}"), "old").unwrap(), new);
        }
        assert_eq!(migrated(OLD), migrated(NEW));
    }

    #[test]
    fn what_is_written_has_the_current_version() {
        let experiment = Experiment::parse(OLD, "old").unwrap();
        let text = experiment.to_toml();
        assert!(text.starts_with("version = 1\n"), "{text}");
        assert_eq!(Experiment::parse(&text, "written").unwrap(), experiment);
    }

    #[test]
    fn an_old_key_is_an_error_that_names_the_new_one() {
        for (section, old, new) in RENAMED {
            let expected = format!("it is named `{section}.{new}`");
            let message = error(&format!("version = 1\n{section}.{old} = 1\n"));
            assert!(message.starts_with("x.toml:2: ") && message.contains(&expected), "{message}");
            let message = error(&format!("{section}.{new} = 1\n{section}.{old} = 1\n"));
            assert!(message.starts_with("x.toml:2: ") && message.contains(&expected), "{message}");
            let error = Experiment::default().set(&format!("{section}.{old}=1")).unwrap_err();
            assert!(error.to_string().contains(&expected), "{error}");
        }
    }

    #[test]
    fn an_unusable_version_is_an_error_that_says_what_to_do() {
        for (version, expected) in [
            (
                "2",
                "x.toml:2: `version` is 2, expected at most 1: a newer program wrote this experiment, use that one",
            ),
            ("-1", "x.toml:2: `version` is -1, expected 0 to 1"),
            ("\"1\"", "x.toml:2: `version` is \"1\", expected 0 to 1"),
            ("1.0", "x.toml:2: `version` is a value of type float, expected 0 to 1"),
            ("99999999999999999999", "x.toml:2: `version` is 99999999999999999999, expected 0 to 1"),
        ] {
            assert_eq!(error(&format!("\nversion = {version}\n")), expected);
        }
    }

    #[test]
    fn an_error_in_an_old_file_names_its_line() {
        let message = error("[model]\ncompute = \"bf16\"\n\n[quant]\ncompute = \"int9\"\n");
        assert!(message.starts_with("x.toml:5: ") && message.contains("int9"), "{message}");
    }
}
