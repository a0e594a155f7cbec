//! What was measured, as it is kept and printed.

use std::collections::BTreeMap;
use std::path::Path;

use registry_api::BoxError;
use registry_tests::cost::median;
use serde::{Deserialize, Serialize};

/// One side's figures of one piece of work in one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) work: String,
    pub(crate) side: String,
    /// How many tasks, keys or members.
    pub(crate) at: usize,
    pub(crate) round: usize,
    pub(crate) figures: BTreeMap<String, f64>,
}

/// All of a section.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Samples {
    /// Where and when it was measured.
    pub(crate) machine: String,
    samples: Vec<Sample>,
}

impl Samples {
    pub(crate) fn push(
        &mut self,
        (work, side, at, round): (&str, &str, usize, usize),
        figures: impl IntoIterator<Item = (&'static str, f64)>,
    ) {
        self.samples.push(Sample {
            work: work.into(),
            side: side.into(),
            at,
            round,
            figures: figures
                .into_iter()
                .map(|(name, figure)| (name.into(), figure))
                .collect(),
        });
    }

    pub(crate) fn store(&self, path: &Path) -> Result<(), BoxError> {
        Ok(std::fs::write(path, serde_json::to_string(self)? + "\n")?)
    }

    /// Nothing if this section was not measured.
    pub(crate) fn load(path: &Path) -> Result<Option<Self>, BoxError> {
        match path.exists() {
            true => Ok(Some(serde_json::from_slice(&std::fs::read(path)?)?)),
            false => Ok(None),
        }
    }

    /// The pieces of work, the sides, or the numbers of tasks, in the order they were measured.
    pub(crate) fn distinct<T: PartialEq>(&self, of: impl Fn(&Sample) -> T) -> Vec<T> {
        let mut found = Vec::new();
        for sample in &self.samples {
            let one = of(sample);
            if !found.contains(&one) {
                found.push(one);
            }
        }
        found
    }

    fn rounds(&self, work: &str, side: &str, at: usize, figure: &str) -> BTreeMap<usize, f64> {
        let wanted = |sample: &&Sample| sample.work == work && sample.side == side && sample.at == at;
        let wanted = self.samples.iter().filter(wanted);
        wanted
            .filter_map(|sample| Some((sample.round, *sample.figures.get(figure)?)))
            .collect()
    }

    /// The median of the rounds.
    pub(crate) fn median(&self, work: &str, side: &str, at: usize, figure: &str) -> Option<f64> {
        let rounds = self.rounds(work, side, at, figure);
        (!rounds.is_empty()).then(|| median(rounds.into_values().collect()))
    }

    /// The median of the rounds' ratios, of one side to another.
    pub(crate) fn ratio(&self, work: &str, sides: (&str, &str), at: usize, figure: &str) -> Option<f64> {
        let (one, other) = (
            self.rounds(work, sides.0, at, figure),
            self.rounds(work, sides.1, at, figure),
        );
        let ratios: Vec<_> = one
            .iter()
            .filter_map(|(round, one)| Some(one / other.get(round)?))
            .collect();
        (!ratios.is_empty()).then(|| median(ratios))
    }

    /// As lines of a table: work and number first, then each side's medians.
    pub(crate) fn table(&self) -> String {
        use std::fmt::Write;
        let sides = self.distinct(|sample| sample.side.clone());
        let mut table = String::new();
        for work in self.distinct(|sample| sample.work.clone()) {
            let of_work = self.samples.iter().filter(|sample| sample.work == work);
            let of_work = Self {
                samples: of_work.cloned().collect(),
                ..Self::default()
            };
            let figures: Vec<String> = of_work
                .samples
                .iter()
                .flat_map(|sample| sample.figures.keys().cloned())
                .fold(Vec::new(), |mut all, figure| {
                    if !all.contains(&figure) {
                        all.push(figure);
                    }
                    all
                });
            let sides: Vec<_> = sides
                .iter()
                .filter(|side| of_work.samples.iter().any(|sample| sample.side == **side))
                .collect();
            let _ = write!(table, "| {work} | |");
            for side in &sides {
                let _ = write!(table, " {side} |");
            }
            let _ = write!(table, "\n| --- | --- |{}\n", " ---: |".repeat(sides.len()));
            for at in of_work.distinct(|sample| sample.at) {
                for figure in &figures {
                    let of = |side: &&String| of_work.median(&work, side, at, figure);
                    let cells = sides.iter().map(of).collect::<Vec<_>>();
                    if cells.iter().all(Option::is_none) {
                        continue;
                    }
                    let _ = write!(table, "| {} | {figure} |", grouped(at as f64));
                    for cell in cells {
                        let _ = write!(table, " {} |", cell.map(grouped).unwrap_or_default());
                    }
                    table.push('\n');
                }
            }
            table.push('\n');
        }
        table
    }

    pub(crate) fn print(&self) {
        println!("{}", self.table());
    }
}

/// A number as people read it: three digits that count, thousands apart.
pub(crate) fn grouped(number: f64) -> String {
    if number < 10.0 && number.fract() != 0.0 {
        return format!("{number:.2}");
    }
    if number < 100.0 && number.fract() != 0.0 {
        return format!("{number:.1}");
    }
    let digits = format!("{number:.0}");
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
