//! What there was in a run.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::history::{Answer, Call, Request};

/// What there was in a run, by name.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<&'static str, u64>>);

impl Counts {
    /// Counts one.
    pub fn one(&self, what: &'static str) {
        self.add(what, 1);
    }

    fn add(&self, what: &'static str, count: u64) {
        *self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(what)
            .or_default() += count;
    }

    /// How many there were.
    pub fn of(&self, what: &str) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(what).copied().unwrap_or_default()
    }

    /// Counts the calls of a history.
    pub(super) fn take(&self, calls: &[Call]) {
        for call in calls {
            self.one("calls");
            match (&call.request, &call.answer) {
                (Request::Read(_), Answer::Read(_)) => self.one("reads"),
                (_, Answer::Committed(..)) => self.one("commits"),
                (_, Answer::Conflict(..)) => self.one("conflicts"),
                (_, Answer::Unknown) => self.one("unknown outcomes"),
                _ => self.one("calls that failed"),
            }
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts: Vec<_> = counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        f.write_str(&counts.join(", "))
    }
}
