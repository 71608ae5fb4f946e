//! The meaning of every key of an experiment, taken from the doc comments of the configuration structs: the one place where a key
//! is documented. `duck new` and the book's page `docs/experiment-reference.md` are generated from it.

use super::Experiment;
use schemars::generate::SchemaSettings;
use serde_json::Value;
use toml::Table;

/// A section of an experiment.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// Its name in TOML.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// Its keys, in the order of an experiment file.
    pub keys: Vec<Key>,
}

/// A key of an experiment.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Its name in TOML.
    pub name: String,
    /// What it sets, with its unit and range.
    pub description: String,
    /// Its value in the experiment, as TOML.
    pub value: String,
    /// Its default, as TOML.
    pub default: String,
    /// The values that it may have.
    pub choices: Choices,
}

/// The values that a key may have.
#[derive(Clone, Debug, PartialEq)]
pub enum Choices {
    /// Any value of a type, which is named in English.
    Any(&'static str),
    /// One of these.
    OneOf(Vec<Choice>),
}

/// One of the values of a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The value as TOML; `N` and `M` stand for numbers.
    pub value: String,
    /// What it means.
    pub description: String,
}

/// All sections of `experiment`, with all keys.
pub fn reference(experiment: &Experiment) -> Vec<Section> {
    let settings = SchemaSettings::default().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<Experiment>().to_value();
    let default = Experiment::default();
    let [values, defaults] = [experiment, &default].map(|experiment| {
        Table::try_from(experiment).expect("an experiment is made of tables, lists, strings and numbers")
    });
    let mut sections: Vec<Section> = Vec::new();
    // A table does not keep the order of its keys.
    for line in default.to_toml().lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            let description = description(&schema["properties"][name]);
            sections.push(Section { name: name.into(), description, keys: Vec::new() });
        } else if let (Some(section), Some((name, _))) = (sections.last_mut(), line.split_once(" = ")) {
            let key = &schema["properties"][&section.name]["properties"][name];
            let [value, default] = [&values, &defaults].map(|table| table[&section.name][name].to_string());
            section.keys.push(Key {
                name: name.into(),
                description: description(key),
                value,
                default,
                choices: choices(key),
            });
        }
    }
    sections
}

/// A doc comment, one paragraph per line.
fn description(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    text.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect::<Vec<_>>().join("\n")
}

fn choices(schema: &Value) -> Choices {
    if let Some(choices) = schema["oneOf"].as_array() {
        return Choices::OneOf(choices.iter().map(choice).collect());
    }
    Choices::Any(match schema["type"].as_str() {
        Some("boolean") => "`true` or `false`",
        Some("integer") => "integer",
        Some("number") => "number",
        Some("array") => "list of strings",
        _ => "string",
    })
}

fn choice(schema: &Value) -> Choice {
    let value = match schema["properties"].as_object().and_then(|properties| properties.iter().next()) {
        Some((name, value)) if value["type"] == "array" => format!("{{ {name} = [N, M] }}"),
        Some((name, _)) => format!("{{ {name} = N }}"),
        None => schema["const"].to_string(),
    };
    Choice { value, description: description(schema) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{env, fs, path::Path};

    const HEAD: &str = "# Experiment reference\n\n\
        Every key of an experiment file, with its type or values and its default. `duck new --full` writes a file with all of them.\n\
        [Choosing settings](settings.md) explains the ones that matter. A file begins with `version = 1`; files of older versions\n\
        are read too, and an unknown key is an error. `--set section.key=value` overrides a key.\n\n\
        <!-- Generated from the doc comments of the configuration structs; see crates/burn-ternary/src/run/reference.rs. -->\n";

    fn cell(text: &str) -> String {
        text.replace('\n', "<br>").replace('|', "\\|")
    }

    fn page() -> String {
        let mut page = HEAD.to_owned();
        for Section { name, description, keys } in reference(&Experiment::default()) {
            page += &format!(
                "\n## `[{name}]`\n\n{description}\n\n| key | values | default | meaning |\n|---|---|---|---|\n"
            );
            for Key { name, mut description, default, choices, .. } in keys {
                let values = match choices {
                    Choices::Any(kind) => kind.to_owned(),
                    Choices::OneOf(choices) => {
                        for Choice { value, description: meaning } in &choices {
                            description += &format!("\n`{value}`: {meaning}");
                        }
                        choices
                            .iter()
                            .map(|choice| format!("`{}`", choice.value))
                            .collect::<Vec<_>>()
                            .join(", ")
                    }
                };
                page += &format!("| `{name}` | {values} | `{default}` | {} |\n", cell(&description));
            }
        }
        page
    }

    #[test]
    fn every_key_and_every_choice_is_documented_for_users() {
        let sections = reference(&Experiment::default());
        let keys = |table: &Table| table.values().map(|keys| keys.as_table().unwrap().len()).sum::<usize>();
        let expected = keys(&Table::try_from(Experiment::default()).unwrap());
        assert_eq!(sections.iter().map(|section| section.keys.len()).sum::<usize>(), expected);
        for section in sections {
            assert!(section.description.ends_with('.'), "[{}]", section.name);
            for key in section.keys {
                let mut texts = vec![key.description];
                if let Choices::OneOf(choices) = key.choices {
                    assert!(choices.len() > 1, "{}", key.name);
                    texts.extend(choices.into_iter().map(|choice| choice.description));
                }
                for text in texts {
                    let plain = text.ends_with('.') && !text.contains("[`") && !text.contains("](");
                    assert!(plain, "{}.{}: `{text}`", section.name, key.name);
                }
            }
        }
    }

    #[test]
    fn the_page_of_the_book_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/experiment-reference.md");
        if env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&path, page()).unwrap();
        }
        assert!(
            fs::read_to_string(&path).unwrap_or_default() == page(),
            "{} is out of date: run `UPDATE_DOCS=1 cargo test -p burn-ternary --lib reference`",
            path.display()
        );
    }
}
