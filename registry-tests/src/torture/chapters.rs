//! The history of a run, in chapters.
//!
//! Each chapter lasts a minute and is about keys of its own, so each can be judged by itself: what happens to some keys has
//! an order if what happens to each set of them has, that no call has in common with another (Herlihy and Wing, 1990,
//! locality). What one judge would have to keep in mind of an hour, a write of unknown outcome above all, is forgotten with
//! its chapter.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use registry_api::{Key, Registry};

use super::KEYS;
use crate::history::{Client, History};
use crate::key;

/// Where the keys of all chapters are.
pub(super) const DIR: &str = "/h";
const LASTS: Duration = Duration::from_secs(60);

/// One chapter.
#[derive(Clone)]
pub(super) struct Chapter {
    pub(super) number: usize,
    pub(super) history: Arc<History>,
}

impl Chapter {
    /// Where its keys are.
    pub(super) fn dir(&self) -> Key {
        key(&format!("{DIR}/{}", self.number))
    }

    /// A client that adds to it.
    pub(super) fn client(&self, registry: &Arc<dyn Registry>, number: usize) -> Client {
        Client::new(registry.clone(), self.history.clone(), number, &self.dir(), KEYS)
    }
}

/// All chapters so far.
pub(super) struct Chapters {
    began: Instant,
    histories: Mutex<Vec<Arc<History>>>,
}

impl Default for Chapters {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            histories: Mutex::default(),
        }
    }
}

impl Chapters {
    /// The one that is being written.
    pub(super) fn current(&self) -> Chapter {
        let number = (self.began.elapsed().as_secs() / LASTS.as_secs()) as usize;
        let mut histories = self.histories.lock().unwrap_or_else(PoisonError::into_inner);
        while histories.len() <= number {
            histories.push(Arc::default());
        }
        let history = histories[number].clone();
        Chapter { number, history }
    }

    /// All of them, the first first.
    pub(super) fn all(&self) -> Vec<Chapter> {
        let histories = self.histories.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let numbered = histories.into_iter().enumerate();
        numbered.map(|(number, history)| Chapter { number, history }).collect()
    }
}
