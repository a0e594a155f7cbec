//! What was measured, as a table for people and as lines for programs.

use hdrhistogram::Histogram;
use serde_json::json;

use super::work::Work;
use super::{Failure, Output};

/// One measurement.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) work: Work,
    pub(crate) tasks: usize,
    pub(crate) seconds: f64,
    /// In nanoseconds.
    pub(crate) took: Histogram<u64>,
    pub(crate) failures: u64,
    pub(crate) failed: Option<String>,
}

/// The head of the table; programs need none.
pub(crate) fn head(out: Output) -> Result<(), Failure> {
    if out.json {
        return Ok(());
    }
    let head = format!(
        "{:10} {:>6} {:>10} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
        "work", "tasks", "done", "per s", "p50 us", "p90 us", "p99 us", "p99.9 us", "max us"
    );
    out.bytes(head.as_bytes())
}

impl Row {
    pub(crate) fn per_second(&self) -> f64 {
        self.took.len() as f64 / self.seconds
    }

    /// A percentile, in microseconds.
    pub(crate) fn micros(&self, percentile: f64) -> f64 {
        self.took.value_at_percentile(percentile) as f64 / 1e3
    }

    pub(crate) fn print(&self, out: Output) -> Result<(), Failure> {
        out.line(
            || {
                let failures = match self.failures {
                    0 => String::new(),
                    n => format!("   {n} failed"),
                };
                format!(
                    "{:10} {:>6} {:>10} {:>9.0} {:>10.0} {:>10.0} {:>10.0} {:>10.0} {:>10.0}{failures}",
                    self.work.to_string(),
                    self.tasks,
                    self.took.len(),
                    self.per_second(),
                    self.micros(50.0),
                    self.micros(90.0),
                    self.micros(99.0),
                    self.micros(99.9),
                    self.micros(100.0),
                )
            },
            || {
                json!({
                    "work": self.work.to_string(),
                    "tasks": self.tasks,
                    "done": self.took.len(),
                    "failures": self.failures,
                    "failed": self.failed,
                    "per_second": self.per_second(),
                    "p50_us": self.micros(50.0),
                    "p90_us": self.micros(90.0),
                    "p99_us": self.micros(99.0),
                    "p999_us": self.micros(99.9),
                    "max_us": self.micros(100.0),
                })
            },
        )
    }
}
