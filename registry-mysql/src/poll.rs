//! One reader of the change log for all watches of a handle.
//!
//! It asks at every poll interval, at once after the handle's own commits, and not at all while there is no watch. What
//! it reads is handed to every watch; one that does not stand where the reader does reads the log for itself until it
//! does.

use std::sync::Arc;

use registry_api::{Error, Result, Revision, SessionState};
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;

use crate::line::Backoff;
use crate::log::{Change, Cursor, Found};
use crate::store::Store;

/// How many batches wait for a watch that does not come to take them. It then reads the log for itself.
const MAX_WAITING: usize = 16;

/// Changes that follow one another.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The changes are those after this revision ...
    pub(crate) after: Revision,
    /// ... up to this one.
    pub(crate) until: Revision,
    pub(crate) changes: Vec<Change>,
    /// What came before them.
    pub(crate) before: Before,
}

/// How a batch follows the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nothing happened.
    Quiet,
    /// The server did not answer for a while.
    Outage,
    /// The server went back in time: what was told may never have been.
    WentBack,
}

/// Where watches and the reader meet.
pub(crate) struct Poll {
    batches: broadcast::Sender<Arc<Batch>>,
    wake: Notify,
}

impl Default for Poll {
    fn default() -> Self {
        Self {
            batches: broadcast::Sender::new(MAX_WAITING),
            wake: Notify::new(),
        }
    }
}

impl Poll {
    /// Says that there is something to read.
    pub(crate) fn changed(&self) {
        self.wake.notify_one();
    }

    /// What is read from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Arc<Batch>> {
        let batches = self.batches.subscribe();
        self.wake.notify_one();
        batches
    }
}

/// Reads until the handle is closed.
pub(crate) async fn run(store: Arc<Store>, mut states: watch::Receiver<SessionState>) {
    tokio::select! {
        () = read(&store) => {}
        // An error says that the handle is gone.
        _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => {}
    }
}

async fn read(store: &Store) {
    let mut reader = Reader {
        store,
        cursor: None,
        before: Before::Quiet,
    };
    let mut backoff = Backoff::default();
    // Whether there is a reason to believe that something follows.
    let mut expects = true;
    loop {
        if store.poll.batches.receiver_count() == 0 {
            reader.cursor = None;
            store.poll.wake.notified().await;
            expects = true;
            continue;
        }
        match reader.step(expects).await {
            Ok(true) => {
                expects = true;
                continue;
            }
            Ok(false) => backoff = Backoff::default(),
            Err(error) => {
                tracing::debug!(%error, "could not look for changes");
                if reader.before == Before::Quiet {
                    reader.before = Before::Outage;
                }
                // Whatever it is, watches wait for it to pass, or learn it from their own questions.
                backoff.wait_until(Instant::now() + store.request_timeout).await;
                continue;
            }
        }
        expects = tokio::select! {
            () = store.poll.wake.notified() => true,
            () = tokio::time::sleep(store.poll_interval) => false,
        };
    }
}

struct Reader<'s> {
    store: &'s Store,
    cursor: Option<Cursor>,
    before: Before,
}

impl Reader<'_> {
    /// Reads once, and says whether more is there.
    async fn step(&mut self, expects: bool) -> Result<bool, Error> {
        let Some(cursor) = &mut self.cursor else {
            let revision = self.store.revision(self.store.deadline()).await?;
            self.cursor = Some(Cursor::at(revision));
            self.hand_on(revision, revision, Vec::new());
            return Ok(true);
        };
        if !expects && self.before == Before::Quiet && self.store.is_quiet(cursor).await? {
            return Ok(false);
        }
        let after = cursor.revision;
        match self.store.changes(cursor).await? {
            Found::Changes { changes, more } => {
                let until = cursor.revision;
                if !changes.is_empty() || until > after || self.before != Before::Quiet {
                    self.hand_on(after, until, changes);
                }
                Ok(more)
            }
            // Each watch finds for itself what it missed.
            Found::Compacted => {
                self.cursor = None;
                Ok(true)
            }
            Found::WentBack => {
                self.cursor = None;
                self.before = Before::WentBack;
                Ok(true)
            }
        }
    }

    fn hand_on(&mut self, after: Revision, until: Revision, changes: Vec<Change>) {
        let before = std::mem::replace(&mut self.before, Before::Quiet);
        // An error says that there is no watch any more.
        let _ = self.store.poll.batches.send(Arc::new(Batch {
            after,
            until,
            changes,
            before,
        }));
    }
}
