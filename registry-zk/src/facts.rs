//! What a handle remembers of the keys it puts, so that putting one again takes a single request.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many keys are remembered.
const MAX_FACTS: usize = 4096;
/// For how long. The guard tells what other handles of this crate did meanwhile, not what other ZooKeeper clients did.
const MAX_AGE: Duration = Duration::from_secs(1);

/// Keys known to hold a persistent value, each as of a version of its guard.
#[derive(Debug, Default)]
pub(crate) struct Facts(Mutex<HashMap<String, (i32, Instant)>>);

/// The directories of queues that had other contenders when this handle last left them. A release that expects others
/// does not try to delete the directory, which fails and takes the waiters' time.
#[derive(Debug, Default)]
pub(crate) struct Crowded(Mutex<HashSet<String>>);

impl Crowded {
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn contains(&self, directory: &str) -> bool {
        self.lock().contains(directory)
    }

    pub(crate) fn learn(&self, directory: &str) {
        let mut crowded = self.lock();
        if crowded.len() >= MAX_FACTS {
            crowded.clear();
        }
        crowded.insert(directory.to_owned());
    }

    pub(crate) fn forget(&self, directory: &str) {
        self.lock().remove(directory);
    }
}

impl Facts {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (i32, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version of the guard as of which the key is known to hold a persistent value.
    pub(crate) fn get(&self, path: &str) -> Option<i32> {
        let (version, at) = *self.lock().get(path)?;
        (at.elapsed() < MAX_AGE).then_some(version)
    }

    pub(crate) fn learn(&self, path: &str, version: i32) {
        let mut facts = self.lock();
        if facts.len() >= MAX_FACTS && !facts.contains_key(path) {
            facts.clear();
        }
        match facts.get_mut(path) {
            Some(fact) => *fact = (version, Instant::now()),
            None => drop(facts.insert(path.to_owned(), (version, Instant::now()))),
        }
    }

    pub(crate) fn forget(&self, path: &str) {
        self.lock().remove(path);
    }
}
