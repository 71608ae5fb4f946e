//! [`Table`]: models side by side, a row a measure.

use super::bootstrap::interval;
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::fmt::Write;

/// A number about a model.
#[derive(Clone, Debug)]
pub struct Measure {
    /// In JSON.
    pub key: &'static str,
    /// In tables.
    pub label: &'static str,
    /// Behind the point, in tables.
    pub digits: usize,
    pub value: f64,
    /// The same of documents that were drawn again; empty: without an interval.
    pub draws: Vec<f64>,
}

/// A value with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Estimate {
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    high: Option<f64>,
}

impl Estimate {
    fn new(value: f64, draws: Vec<f64>) -> Self {
        let [low, high] = interval(draws).map_or([None; 2], |ends| ends.map(Some));
        Self { value, low, high }
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

impl Measure {
    fn estimate(&self) -> Estimate {
        Estimate::new(self.value, self.draws.clone())
    }

    /// By how much it is above that of another model, draw by draw of the same documents.
    fn difference(&self, other: &Self) -> Estimate {
        let draws = self.draws.iter().zip(&other.draws).map(|(own, other)| own - other);
        Estimate::new(self.value - other.value, draws.collect())
    }
}

/// What was measured on a file.
#[derive(Debug, Serialize)]
pub struct Table {
    pub file: String,
    pub documents: usize,
    pub models: Vec<Column>,
}

/// A model, and the same measures as every other of the table has.
#[derive(Debug)]
pub struct Column {
    pub model: String,
    pub measures: Vec<Measure>,
    /// Of this column to the first one.
    differences: Vec<Estimate>,
}

impl Serialize for Column {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry {
            #[serde(flatten)]
            estimate: Estimate,
            #[serde(skip_serializing_if = "Option::is_none")]
            difference: Option<Estimate>,
        }
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("model", &self.model)?;
        for (i, measure) in self.measures.iter().enumerate() {
            let difference = self.differences.get(i).copied();
            map.serialize_entry(measure.key, &Entry { estimate: measure.estimate(), difference })?;
        }
        map.end()
    }
}

impl Table {
    pub fn new(file: String, documents: usize) -> Self {
        Self { file, documents, models: Vec::new() }
    }

    /// Adds a model, and compares it to the first one.
    pub fn add(&mut self, model: String, measures: Vec<Measure>) {
        let compare = |first: &Column| {
            measures.iter().zip(&first.measures).map(|(own, first)| own.difference(first)).collect()
        };
        let differences = self.models.first().map_or_else(Vec::new, compare);
        self.models.push(Column { model, measures, differences });
    }

    /// The rows: a label, and a cell a model.
    fn rows(&self) -> Vec<Vec<String>> {
        let header = self.models.iter().map(|column| column.model.clone());
        let mut rows = vec![Vec::from_iter([String::new()].into_iter().chain(header))];
        let Some(first) = self.models.first() else { return rows };
        for (i, Measure { label, digits, .. }) in first.measures.iter().enumerate() {
            let cells = self.models.iter().map(|column| column.measures[i].estimate().text(*digits));
            rows.push(Vec::from_iter([label.to_string()].into_iter().chain(cells)));
            if self.models.len() > 1 {
                let cell = |column: &Column| {
                    column.differences.get(i).map_or_else(String::new, |over| over.text(*digits))
                };
                let cells = self.models.iter().map(cell);
                rows.push(Vec::from_iter(["  over the first".to_string()].into_iter().chain(cells)));
            }
        }
        rows
    }

    fn title(&self) -> String {
        let plural = if self.documents == 1 { "" } else { "s" };
        format!("{}, {} document{plural}", self.file, self.documents)
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

    fn measure(value: f64, draws: &[f64]) -> Measure {
        Measure { key: "loss", label: "loss", digits: 2, value, draws: draws.into() }
    }

    fn table() -> Table {
        let mut table = Table::new("a.txt".into(), 2);
        table.add("one".into(), vec![measure(1.0, &[0.0, 2.0])]);
        table.add("t|wo".into(), vec![measure(1.5, &[0.5, 2.5])]);
        table
    }

    #[test]
    fn models_stand_side_by_side_and_are_compared_draw_by_draw() {
        let text = table().text();
        let expected = "a.txt, 2 documents\n                  one                t|wo\nloss              \
                        1.00 [0.05, 1.95]  1.50 [0.55, 2.45]\n  over the first                     0.50 [0.50, 0.50]";
        assert_eq!(text, expected);
        assert!(
            table().markdown().contains("|  | one | t\\|wo |\n|---|---|---|\n| loss | 1.00 [0.05, 1.95] |")
        );
        let json = serde_json::to_value(table()).unwrap();
        assert_eq!(json["models"][1]["loss"]["difference"]["low"], 0.5);
        assert_eq!(json["models"][0]["loss"].get("difference"), None);
    }

    #[test]
    fn what_has_no_interval_has_none_and_what_is_no_number_is_a_dash() {
        let mut table = Table::new("a.txt".into(), 1);
        table.add("one".into(), vec![measure(f64::NAN, &[])]);
        assert!(table.text().ends_with("loss  -") && table.text().contains("1 document\n"));
        assert!(serde_json::to_value(table).unwrap()["models"][0]["loss"]["value"].is_null());
    }
}
