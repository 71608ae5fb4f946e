//! [`Table`]: the measures of models on one file, one row per measure.

use serde::{Serialize, Serializer, ser::SerializeMap};
use std::fmt::Write;
use ternary_eval::Estimate;

/// A number about a model.
#[derive(Clone, Debug)]
pub struct Measure {
    /// The key in JSON.
    pub key: &'static str,
    /// The label in tables.
    pub label: &'static str,
    /// Decimal places in tables.
    pub digits: usize,
    pub estimate: Estimate,
}

/// A value with its 95 % interval, as JSON has it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Value {
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    high: Option<f64>,
}

impl Value {
    fn new(estimate: &Estimate) -> Self {
        let [low, high] = estimate.interval().map_or([None; 2], |ends| ends.map(Some));
        Self { value: estimate.value, low, high }
    }

    /// `2.293 [2.281, 2.305]`
    fn text(&self, digits: usize) -> String {
        let number = |x: f64| if x.is_finite() { format!("{x:.digits$}") } else { "-".into() };
        match (self.low, self.high) {
            (Some(low), Some(high)) => {
                format!("{} [{}, {}]", number(self.value), number(low), number(high))
            }
            _ => number(self.value),
        }
    }
}

/// The measures of a file.
#[derive(Debug, Serialize)]
pub struct Table {
    pub file: String,
    pub documents: usize,
    pub models: Vec<Column>,
}

/// A model with its measures, the same ones as those of every other model of the table.
#[derive(Debug)]
pub struct Column {
    pub model: String,
    pub measures: Vec<Measure>,
    /// This column minus the first one.
    differences: Vec<Value>,
}

impl Serialize for Column {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry {
            #[serde(flatten)]
            value: Value,
            #[serde(skip_serializing_if = "Option::is_none")]
            difference: Option<Value>,
        }
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("model", &self.model)?;
        for (i, measure) in self.measures.iter().enumerate() {
            let difference = self.differences.get(i).copied();
            map.serialize_entry(measure.key, &Entry { value: Value::new(&measure.estimate), difference })?;
        }
        map.end()
    }
}

impl Table {
    pub fn new(file: String, documents: usize) -> Self {
        Self { file, documents, models: Vec::new() }
    }

    /// Adds a model, and compares it with the first one.
    pub fn add(&mut self, model: String, measures: Vec<Measure>) {
        let compare = |first: &Column| {
            let pairs = measures.iter().zip(&first.measures);
            pairs.map(|(own, first)| Value::new(&own.estimate.difference(&first.estimate))).collect()
        };
        let differences = self.models.first().map_or_else(Vec::new, compare);
        self.models.push(Column { model, measures, differences });
    }

    /// The rows: a label, and one cell per model.
    fn rows(&self) -> Vec<Vec<String>> {
        let header = self.models.iter().map(|column| column.model.clone());
        let mut rows = vec![Vec::from_iter([String::new()].into_iter().chain(header))];
        let Some(first) = self.models.first() else { return rows };
        for (i, Measure { label, digits, .. }) in first.measures.iter().enumerate() {
            let cells =
                self.models.iter().map(|column| Value::new(&column.measures[i].estimate).text(*digits));
            rows.push(Vec::from_iter([label.to_string()].into_iter().chain(cells)));
            if self.models.len() > 1 {
                let cell = |column: &Column| {
                    column.differences.get(i).map_or_else(String::new, |difference| difference.text(*digits))
                };
                let cells = self.models.iter().map(cell);
                rows.push(Vec::from_iter(["  minus the first".to_string()].into_iter().chain(cells)));
            }
        }
        rows
    }

    fn title(&self) -> String {
        match self.documents {
            1 => {
                format!("{}, 1 document: no intervals (lines `<|endoftext|>` separate documents)", self.file)
            }
            n => format!("{}, {n} documents", self.file),
        }
    }

    /// For terminals.
    pub fn text(&self) -> String {
        let rows = self.rows();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..=self.models.len()).map(width).collect();
        let mut text = self.title();
        for row in &rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            let line = cells.collect::<Vec<_>>().join("  ");
            let _ = write!(text, "\n{}", line.trim_end());
        }
        text
    }

    /// For documents.
    pub fn markdown(&self) -> String {
        let escape = |cell: &String| cell.trim().replace('|', "\\|");
        let line =
            |row: &Vec<String>| format!("| {} |", row.iter().map(escape).collect::<Vec<_>>().join(" | "));
        let rows = self.rows();
        let rule = format!("|{}", "---|".repeat(self.models.len() + 1));
        let mut lines = vec![self.title(), String::new(), line(&rows[0]), rule];
        lines.extend(rows[1..].iter().map(line));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(value: f64, resamples: &[f64]) -> Measure {
        let estimate = Estimate { value, resamples: resamples.into() };
        Measure { key: "loss", label: "loss", digits: 2, estimate }
    }

    fn table() -> Table {
        let mut table = Table::new("a.txt".into(), 2);
        table.add("one".into(), vec![measure(1.0, &[0.0, 2.0])]);
        table.add("t|wo".into(), vec![measure(1.5, &[0.5, 2.5])]);
        table
    }

    #[test]
    fn models_are_columns_and_are_compared_resample_by_resample() {
        let text = table().text();
        let expected = "a.txt, 2 documents\n                   one                t|wo\nloss               \
                        1.00 [0.05, 1.95]  1.50 [0.55, 2.45]\n  minus the first                     0.50 [0.50, 0.50]";
        assert_eq!(text, expected);
        assert!(
            table().markdown().contains("|  | one | t\\|wo |\n|---|---|---|\n| loss | 1.00 [0.05, 1.95] |")
        );
        let json = serde_json::to_value(table()).unwrap();
        assert_eq!(json["models"][1]["loss"]["difference"]["low"], 0.5);
        assert_eq!(json["models"][0]["loss"].get("difference"), None);
    }

    #[test]
    fn a_value_without_an_interval_is_alone_and_nan_is_a_dash() {
        let mut table = Table::new("a.txt".into(), 1);
        table.add("one".into(), vec![measure(f64::NAN, &[])]);
        assert!(table.text().ends_with("loss  -") && table.text().contains("1 document: no intervals"));
        assert!(serde_json::to_value(table).unwrap()["models"][0]["loss"]["value"].is_null());
    }
}
