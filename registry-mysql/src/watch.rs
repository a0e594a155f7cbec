//! Watches: what is there, then every change, over whatever happens to the server.
//!
//! A watch lists what it covers at one revision and follows the change log from there. When the next revision is no
//! longer kept it lists again, and tells the difference to its [`Picture`]. Events are made from the rows of the log alone;
//! the picture is kept for such a gap.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use registry_api::watch::{Feed, Picture, feed};
use registry_api::{DeleteCause, Entry, Error, Event, Result, Revision, SessionState, Watch, WatchFrom, WatchRequest};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;

use crate::line::Backoff;
use crate::log::{Change, Cursor, Found};
use crate::poll::Before;
use crate::store::Store;

/// How long a listing of all that a watch covers may take, while rows keep coming.
const LISTING: Duration = Duration::from_secs(600);

/// Begins a watch.
pub(crate) async fn start(
    store: &Arc<Store>,
    request: WatchRequest,
    mut states: Receiver<SessionState>,
) -> Result<Watch> {
    if let WatchFrom::After(revision) = request.from {
        check_kept(store, revision).await?;
    }
    let (feed, watch) = feed();
    let mut watcher = Watcher {
        store: store.clone(),
        request,
        picture: Picture::default(),
        cursor: Cursor::at(Revision(0)),
    };
    registry_api::spawn(async move {
        let error = tokio::select! {
            error = watcher.run(&feed) => error,
            () = feed.closed() => return,
            // An error says that the handle is gone.
            _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => return,
        };
        feed.fail(error);
    });
    Ok(watch)
}

/// Checks that a watch can start after a revision.
async fn check_kept(store: &Store, after: Revision) -> Result<()> {
    let answers = store.ask(store.deadline(), &store.select_revision()).await?;
    let counters = store.counters(answers.first())?;
    if after.0 > counters.revision {
        return Err(Error::InvalidRequest(format!(
            "a watch can't start after revision {after}, which is still to come: it is {} now",
            counters.revision
        )));
    }
    match after.0 < counters.compacted {
        true => Err(compacted(after, counters.compacted)),
        false => Ok(()),
    }
}

fn compacted(requested: Revision, oldest: u64) -> Error {
    Error::Compacted {
        requested,
        oldest: Revision(oldest),
    }
}

/// One watch, apart from its reader.
struct Watcher {
    store: Arc<Store>,
    request: WatchRequest,
    /// What the reader was told.
    picture: Picture,
    /// Every change up to here was told.
    cursor: Cursor,
}

/// How far the log could be read.
enum Caught {
    Up,
    /// Not at all: what follows is no longer kept.
    Compacted,
    /// Not at all: the server went back in time.
    WentBack,
}

impl Watcher {
    /// Ends with what no patience mends.
    async fn run(&mut self, feed: &Feed) -> Error {
        match self.try_run(feed).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    async fn try_run(&mut self, feed: &Feed) -> Result<std::convert::Infallible> {
        let mut batches = self.store.poll.subscribe();
        self.begin(feed).await?;
        loop {
            let batch = match batches.recv().await {
                Ok(batch) => batch,
                Err(RecvError::Lagged(_)) => {
                    self.catch_up(feed).await?;
                    continue;
                }
                // The handle is gone.
                Err(RecvError::Closed) => return Err(Error::Closed),
            };
            let told = self.cursor.revision;
            if batch.before == Before::WentBack {
                self.go_back(feed).await?;
            } else if batch.after <= told {
                let news = batch.changes.iter().filter(|change| change.revision > told);
                self.tell(feed, news);
                self.cursor = Cursor::at(told.max(batch.until));
            } else {
                self.catch_up(feed).await?;
            }
            if batch.before == Before::Outage {
                feed.synced(self.cursor.revision);
            }
        }
    }

    async fn begin(&mut self, feed: &Feed) -> Result<()> {
        let (entries, revision) = self.list().await?;
        let after = match self.request.from {
            WatchFrom::Now => {
                self.begin_with(feed, entries, revision);
                return Ok(());
            }
            WatchFrom::After(after) | WatchFrom::AfterOrReset(after) => after,
        };
        // What is there now is told by the changes that led to it; the picture takes nothing from them then.
        self.picture.replace(entries, revision);
        self.cursor = Cursor::at(after);
        let caught = match after > revision {
            true => Caught::Compacted,
            false => self.read(feed).await?,
        };
        match (caught, self.request.from) {
            (Caught::Up, _) => feed.synced(self.cursor.revision),
            (_, WatchFrom::After(after)) => {
                let answers = self
                    .store
                    .ask(self.store.deadline(), &self.store.select_revision())
                    .await?;
                return Err(compacted(after, self.store.counters(answers.first())?.compacted));
            }
            (_, _) => {
                feed.reset();
                self.picture = Picture::default();
                let (entries, revision) = self.list().await?;
                self.begin_with(feed, entries, revision);
            }
        }
        Ok(())
    }

    fn begin_with(&mut self, feed: &Feed, entries: Vec<Entry>, revision: Revision) {
        feed.changes(self.picture.replace(entries, revision));
        feed.synced(revision);
        self.cursor = Cursor::at(revision);
    }

    /// Reads the log to its end, or lists again where that can't be.
    async fn catch_up(&mut self, feed: &Feed) -> Result<()> {
        match self.read(feed).await? {
            Caught::Up => {}
            Caught::Compacted => {
                let (entries, revision) = self.list().await?;
                self.begin_with(feed, entries, revision);
            }
            Caught::WentBack => self.go_back(feed).await?,
        }
        Ok(())
    }

    async fn read(&mut self, feed: &Feed) -> Result<Caught> {
        let store = self.store.clone();
        let mut patience = Patience::new(&store);
        loop {
            let mut cursor = self.cursor;
            match store.changes(&mut cursor).await {
                Ok(Found::Changes { changes, more }) => {
                    self.tell(feed, changes.iter());
                    self.cursor = cursor;
                    if !more {
                        return Ok(Caught::Up);
                    }
                }
                Ok(Found::Compacted) => return Ok(Caught::Compacted),
                Ok(Found::WentBack) => return Ok(Caught::WentBack),
                Err(error) => patience.wait_out(error).await?,
            }
        }
    }

    /// Tells changes, those of one revision together.
    fn tell<'c>(&mut self, feed: &Feed, changes: impl Iterator<Item = &'c Change>) {
        let mut events: Vec<Event> = Vec::new();
        for change in changes.filter(|change| self.request.wants(&change.entry.key)) {
            let event = change.event();
            if events.first().is_some_and(|first| first.revision() != change.revision) {
                feed.changes(std::mem::take(&mut events));
            }
            match &event {
                Event::Created(entry) | Event::Updated(entry) => drop(self.picture.put(entry.clone())),
                Event::Deleted { last, revision, cause } => drop(self.picture.delete(&last.key, *revision, *cause)),
            }
            events.push(event);
        }
        feed.changes(events);
    }

    /// The server went back in time, and with it whatever it had not kept. What differs from what was told is told as
    /// gone, and as made anew.
    async fn go_back(&mut self, feed: &Feed) -> Result<()> {
        let (entries, revision) = self.list().await?;
        tracing::warn!(from = %self.cursor.revision, to = %revision, "the server has lost changes that were told");
        let now: HashMap<_, _> = entries.iter().map(|entry| (&entry.key, entry)).collect();
        let lost = self
            .picture
            .entries()
            .filter(|known| now.get(&known.key) != Some(known));
        let gone = lost.map(|last| Event::Deleted {
            last: last.clone(),
            revision,
            cause: DeleteCause::Unknown,
        });
        let news = entries
            .iter()
            .filter(|entry| self.picture.get(&entry.key) != Some(entry));
        feed.changes(gone.chain(news.cloned().map(Event::Created)).collect());
        self.picture = Picture::default();
        self.picture.replace(entries, revision);
        self.cursor = Cursor::at(revision);
        feed.synced(revision);
        Ok(())
    }

    async fn list(&self) -> Result<(Vec<Entry>, Revision)> {
        let mut patience = Patience::new(&self.store);
        loop {
            match self.store.watched(&self.request, Instant::now() + LISTING).await {
                Err(error) => patience.wait_out(error).await?,
                listed => return listed,
            }
        }
    }
}

/// Waits for a server that does not answer.
struct Patience<'s> {
    store: &'s Store,
    backoff: Backoff,
}

impl<'s> Patience<'s> {
    fn new(store: &'s Store) -> Self {
        Self {
            store,
            backoff: Backoff::default(),
        }
    }

    /// Waits a while, unless the error is one that no patience mends.
    async fn wait_out(&mut self, error: Error) -> Result<()> {
        if !matches!(error, Error::Unavailable { .. }) {
            return Err(error);
        }
        tracing::debug!(%error, "a watch is waiting for the server");
        self.backoff
            .wait_until(Instant::now() + self.store.request_timeout)
            .await;
        Ok(())
    }
}
