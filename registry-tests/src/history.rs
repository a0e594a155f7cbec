//! Histories: what concurrent clients asked of a store and what they were told, with the times of both, to be judged.
//!
//! Each write puts a value of its own, so that a read tells whose write it saw. [`check`] then looks for one order of all
//! calls that explains every answer (Herlihy and Wing, 1990).

mod check;
mod client;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use registry_api::Revision;

pub use check::{Violation, check};
pub use client::Client;

/// The identity of a call, which is also what it puts.
pub type Id = u64;

/// One call with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its identity.
    pub id: Id,
    /// Who asked.
    pub client: usize,
    /// When it began, and when the answer came.
    pub asked: Duration,
    /// As `asked`.
    pub told: Duration,
    /// What was asked.
    pub request: Request,
    /// What was answered.
    pub answer: Answer,
}

/// What is asked, of keys that go by their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Keys are read, at one moment.
    Read(Vec<usize>),
    /// A transaction: what is demanded, then what is written.
    Commit(Vec<(usize, Demand)>, Vec<(usize, Write)>),
}

/// What is demanded of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Demand {
    /// It is not there.
    Absent,
    /// It is there.
    Present,
    /// It was last put by that change.
    At(Revision),
}

/// What is done to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    /// The call's identity is put.
    Put,
    /// It is deleted.
    Delete,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// For each key that was read what it held: who put it, and the revision of that.
    Read(Vec<Option<(Id, Revision)>>),
    /// It was done at that revision; for each write whether it changed anything.
    Committed(Revision, Vec<bool>),
    /// A demand did not hold: of which key, and the revision found there. Nothing was done.
    Conflict(usize, Option<Revision>),
    /// Nothing was done, and nothing is known.
    Nothing,
    /// It may have been done, or may be later.
    Unknown,
    /// What no call of a history should be told.
    Unexpected(String),
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_micros() as f64 / 1000.0;
        let (from, to) = (ms(self.asked), ms(self.told));
        write!(f, "{from:>10.3} to {to:>10.3} ms, client {}: ", self.client)?;
        match &self.request {
            Request::Read(keys) => write!(f, "{} read {keys:?}", self.id)?,
            Request::Commit(demands, writes) => write!(f, "{} if {demands:?} do {writes:?}", self.id)?,
        }
        write!(f, " -> {:?}", self.answer)
    }
}

/// A history as it is recorded.
#[derive(Debug)]
pub struct History {
    began: Instant,
    calls: Mutex<Vec<Call>>,
    next: AtomicU64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            calls: Mutex::default(),
            next: AtomicU64::new(1),
        }
    }
}

impl History {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn next(&self) -> Id {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn add(&self, call: Call) {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }

    /// The calls that have ended, in the order they were asked.
    pub fn calls(&self) -> Vec<Call> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone();
        calls.sort_by_key(|call| (call.asked, call.id));
        calls
    }
}
