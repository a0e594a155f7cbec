//! The queue beneath locks and elections: one ephemeral key per contender, in the order of their creation.
//!
//! Each contender watches only the one before it, so the end of one wakes one (the lock recipe of the ZooKeeper
//! documentation, without the herd). The `create_revision` of a contender's key is its place. Together with the epoch that
//! its name carries it is its fencing token once it holds.

mod hold;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

pub(super) use hold::Hold;

use super::cleanup::{Backoff, Retry, until_done};
use super::epoch;
use super::name::{Names, fresh};
use crate::{Depth, Entry, Error, Expect, Key, List, Page, Registry, Result, Revision, SessionId, Token, Txn, spawn};

/// How long entering or leaving is retried while the caller waits, whatever the session's TTL.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// When a key of unknown outcome is deleted again: 250 ms after the first delete, then after 500 ms and so on, two minutes in all.
const FIRST_LATE_DELETE: Duration = Duration::from_millis(250);
const LAST_LATE_DELETE: Duration = Duration::from_secs(64);

/// The kinds of queue, each with a tree of its own beside the user's keys (K9).
#[derive(Clone, Copy, Debug)]
pub(super) enum QueueKind {
    Lock,
    Election,
}

/// A named queue.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    pub(super) registry: Arc<dyn Registry>,
    pub(super) name: Key,
    dir: Key,
    /// Whether somebody was in it when it was entered last: then it is not likely to be empty now.
    crowded: Arc<AtomicBool>,
}

/// One who waits for a lock or a leadership, or has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// What it left to be known by: a label, or the value it published.
    pub value: Bytes,
    /// Its place: the smallest is the holder's, and is the holder's fencing token.
    pub token: Token,
    /// Its session.
    pub session: Option<SessionId>,
}

impl Contender {
    /// The contender that an entry is of.
    pub(super) fn of(entry: Entry) -> Result<Self> {
        Ok(Self {
            token: epoch::token(&entry)?,
            value: entry.value,
            session: entry.session,
        })
    }
}

impl Queue {
    pub(super) fn new(registry: Arc<dyn Registry>, kind: QueueKind, name: &Key) -> Self {
        let tree = match kind {
            QueueKind::Lock => "lock",
            QueueKind::Election => "election",
        };
        // The number of segments keeps the contenders of `/jobs` apart from the locks below it.
        let dir = Key::of_recipe(&format!("/{tree}/{}{name}", name.depth()));
        Self {
            registry,
            name: name.clone(),
            dir,
            crowded: Arc::default(),
        }
    }

    /// Where the contenders are.
    pub(super) fn dir(&self) -> &Key {
        &self.dir
    }

    /// What lists the contenders.
    fn listing(&self) -> List {
        List {
            depth: Depth::Children,
            ..List::new(&self.dir)
        }
    }

    /// The contenders' entries, first come first.
    pub(super) async fn entries(&self) -> Result<Vec<Entry>> {
        self.entries_from(self.registry.list(self.listing()).await?).await
    }

    /// The same, with their first page at hand.
    async fn entries_from(&self, page: Page) -> Result<Vec<Entry>> {
        let mut entries = self.registry.list_on(self.listing(), page).await?;
        entries.sort_by_key(|entry| entry.create_revision);
        if let Some(last) = entries.last() {
            self.registry.session().epochs().saw(epoch::token(last)?);
        }
        Ok(entries)
    }

    /// Enters the queue and waits for the first place.
    pub(super) async fn wait(&self, value: Bytes) -> Result<Hold> {
        let (mut place, seen) = self.enter(value, Enter::Anyway).await?;
        if let Seen::Queue(page) = seen {
            place.wait_first(page).await?;
        }
        place.into_hold()
    }

    /// Enters the queue only if nobody is in it.
    pub(super) async fn try_enter(&self, value: Bytes) -> Result<Option<Hold>> {
        match self.enter(value, Enter::IfEmpty).await {
            Ok((place, _)) => place.into_hold().map(Some),
            Err(Error::Conflict { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes a place, in the epoch that the store has.
    async fn enter(&self, value: Bytes, enter: Enter) -> Result<(Place, Seen)> {
        let registry = &*self.registry;
        let epochs = registry.session().epochs();
        loop {
            epochs.raise_if_due(registry).await?;
            let (epoch, before) = (epochs.epoch(), epochs.highest());
            match self.enter_in(epoch, value.clone(), enter).await {
                Ok((place, _)) if place.token()? <= before || epochs.is_due(registry) => {
                    // Revisions grow. This one is lower than one before, or the backend noticed as much, so the store is a
                    // copy of an earlier state. The place is left, as it is dropped.
                    tracing::warn!(queue = %self.name, ?before, "the store went back");
                    epochs.store_went_back();
                }
                Err(Error::Conflict { key, .. }) if key == epoch::condition(epoch).key => {
                    epochs.refresh(registry).await?;
                }
                entered => return entered,
            }
        }
    }

    async fn enter_in(&self, epoch: u32, value: Bytes, enter: Enter) -> Result<(Place, Seen)> {
        let session = self.registry.session().live()?;
        let name = self
            .names()
            .map_or_else(|| fresh(epoch), |names| names.take(session, epoch));
        let key = Key::of_recipe(&format!("{}/{name}", &self.dir.as_str()[1..]));
        let queue = self.clone();
        let put = {
            let key = key.clone();
            async move { queue.put(&key, epoch, value, session, enter).await }
        };
        let mut entering = Entering {
            put: Some(put.boxed()),
            place: Some(Place {
                queue: self.clone(),
                key,
                epoch,
                session,
                revision: None,
                sent: Sent::UNKNOWN,
                kept: false,
            }),
        };
        let (mut place, entered) = entering.done().await;
        if !entered.doubt {
            place.sent = Sent::ANSWERED;
        }
        match entered.place {
            Ok((revision, seen)) => {
                place.revision = Some(revision);
                Ok((place, seen))
            }
            Err(error) => {
                if !entered.doubt {
                    // What is known to have failed left nothing to clean up.
                    place.kept = true;
                    self.give_back(session, &place.key);
                }
                Err(error)
            }
        }
    }

    /// Puts the contender's key, within a deadline.
    async fn put(&self, key: &Key, epoch: u32, value: Bytes, session: SessionId, enter: Enter) -> Entered {
        let mut doubt = false;
        let put = self.try_put(key, epoch, value, session, enter, &mut doubt);
        match tokio::time::timeout(PATIENCE, put).await {
            Ok(place) => Entered {
                place: if doubt { place.map_err(entry_unknown) } else { place },
                doubt,
            },
            Err(elapsed) => Entered {
                place: Err(Error::OutcomeUnknown {
                    operation: "entering a queue",
                    source: elapsed.into(),
                }),
                doubt: true,
            },
        }
    }

    /// The names that may be used again. None where a key that was made anew can be taken for the one before.
    fn names(&self) -> Option<&Names> {
        let reuses = self.registry.capabilities().reuses_names;
        reuses.then(|| self.registry.session().names())
    }

    fn give_back(&self, session: SessionId, key: &Key) {
        if let Some(names) = self.names() {
            names.give_back(session, self.registry.session().epochs().epoch(), key.name());
        }
    }

    /// Puts the contender's key, once, whatever the outcome of each try (L7): nobody else has the key's name, so a try that
    /// finds it there has found its own. `doubt` is set from the first try on of which nobody knows what became.
    async fn try_put(
        &self,
        key: &Key,
        epoch: u32,
        value: Bytes,
        session: SessionId,
        enter: Enter,
        doubt: &mut bool,
    ) -> Result<(Revision, Seen)> {
        // An empty queue takes one request: nobody is there, so this place is the first. Where the queue is told along, so
        // does any.
        let was_stored = epoch > 0;
        let epoch = epoch::condition(epoch);
        let txn = || {
            let absent = Txn::new().when(key, Expect::Absent);
            absent.require(epoch.clone()).put_ephemeral(key, value.clone())
        };
        let told_along = self.registry.capabilities().lists_along;
        let mut empty = enter == Enter::IfEmpty || !(told_along || self.crowded.load(Ordering::Relaxed));
        let mut backoff = Backoff::default();
        loop {
            let entered = if empty {
                let committed = self.registry.commit(txn().when(&self.dir, Expect::Childless)).await;
                committed.map(|committed| (committed.revision, Seen::First))
            } else {
                let committed = self.registry.commit_and_list(txn(), self.listing()).await;
                committed.map(|(committed, page)| (committed.revision, Seen::Queue(page)))
            };
            match entered {
                Ok(entered) => return Ok(entered),
                Err(Error::Conflict { key: conflicting, .. }) if &conflicting == key => {}
                Err(error @ Error::Conflict { .. }) => {
                    // Another contender is in the queue, or perhaps this one, by an attempt of unknown outcome.
                    if *doubt && let Some(revision) = self.own(key, session).await? {
                        return Ok((revision, Seen::Queue(None)));
                    }
                    if matches!(&error, Error::Conflict { key, .. } if *key == epoch.key) {
                        // An epoch that was stored never comes back, so no attempt in flight can succeed any more. The first
                        // one, which is entered in before it is known, may be stored yet.
                        *doubt &= !was_stored;
                        return Err(error);
                    }
                    if enter == Enter::IfEmpty {
                        return Err(error);
                    }
                    empty = false;
                    self.crowded.store(true, Ordering::Relaxed);
                    continue;
                }
                Err(Error::OutcomeUnknown { operation, source }) => {
                    *doubt = true;
                    if !self.registry.session().is_valid(session) {
                        return Err(Error::OutcomeUnknown { operation, source });
                    }
                    backoff.wait().await;
                    continue;
                }
                Err(error) => return Err(error),
            }
            match self.own(key, session).await? {
                Some(revision) => return Ok((revision, Seen::Queue(None))),
                // It was there and is gone: the session it belonged to has ended.
                None => return Err(Error::SessionExpired { session }),
            }
        }
    }

    /// The place of a contender's key, read until there is an answer or its session ends.
    async fn own(&self, key: &Key, session: SessionId) -> Result<Option<Revision>> {
        let mut backoff = Backoff::default();
        loop {
            match self.registry.get(key, crate::Read::Linearizable).await {
                Ok(Some(entry)) if entry.session == Some(session) => return Ok(Some(entry.create_revision)),
                Ok(Some(_)) => return Err(Error::SessionExpired { session }),
                Ok(None) => return Ok(None),
                Err(error @ Error::Unavailable { .. }) if self.registry.session().is_valid(session) => {
                    tracing::debug!(%error, "could not look for the own place, trying again");
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// An earlier attempt may have entered the queue. The place is left in the background.
fn entry_unknown(error: Error) -> Error {
    match error {
        Error::Unavailable { source, .. } => Error::OutcomeUnknown {
            operation: "entering a queue",
            source,
        },
        error => error,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Enter {
    Anyway,
    IfEmpty,
}

/// What is known of a queue as a place in it was taken.
enum Seen {
    /// The place is the first.
    First,
    /// The first page of its contenders, if they were listed.
    Queue(Option<Page>),
}

/// What became of an entry.
struct Entered {
    place: Result<(Revision, Seen)>,
    /// Whether a key may have been put, whatever `place` says.
    doubt: bool,
}

/// A contender on its way into the queue. Dropped in the middle, the put goes on apart, so that what there is to clean up
/// is known when it has ended; undisturbed, it costs no task of its own.
struct Entering {
    put: Option<BoxFuture<'static, Entered>>,
    place: Option<Place>,
}

impl Entering {
    async fn done(&mut self) -> (Place, Entered) {
        let entered = self.put.as_mut().expect("entered once").await;
        self.put = None;
        (self.place.take().expect("entered once"), entered)
    }
}

impl Drop for Entering {
    fn drop(&mut self) {
        let (Some(put), Some(place)) = (self.put.take(), self.place.take()) else {
            return;
        };
        spawn(async move {
            // Whatever became of it, the place is to be left, which dropping it does.
            let _ = put.await;
            drop(place);
        });
    }
}

/// A contender's place in the queue. Dropped, it leaves the queue in the background.
struct Place {
    queue: Queue,
    key: Key,
    epoch: u32,
    session: SessionId,
    /// The `create_revision` of the key, once it is known to have been put.
    revision: Option<Revision>,
    sent: Sent,
    kept: bool,
}

/// What is known of the requests on a contender's key that were sent before its delete.
#[derive(Clone, Copy, Debug)]
struct Sent {
    /// Whether each of them was answered, so that the name can be used again.
    settled: bool,
    /// Whether one of them may create the key after the delete.
    may_create: bool,
}

impl Sent {
    const ANSWERED: Self = Self {
        settled: true,
        may_create: false,
    };
    const UNKNOWN: Self = Self {
        settled: false,
        may_create: true,
    };
}

impl Place {
    /// The fencing token of the place, once the key is known to have been put.
    fn token(&self) -> Result<Option<Token>> {
        self.revision
            .map(|revision| Token::of(self.epoch, revision))
            .transpose()
    }

    /// Waits until every contender before this one is gone, and this one is still there. `page` is the first of the
    /// contenders, no older than the place.
    async fn wait_first(&mut self, mut page: Option<Page>) -> Result<()> {
        let registry = self.queue.registry.clone();
        let mut backoff = Backoff::default();
        let mut waited = false;
        loop {
            let known = page.take();
            let next = async {
                let page = match known {
                    Some(page) => page,
                    None => registry.list(self.queue.listing()).await?,
                };
                let Some(before) = self.before(page).await? else {
                    self.queue.crowded.store(waited, Ordering::Relaxed);
                    return Ok(None);
                };
                waited = true;
                let (key, created) = (&before.key, before.create_revision);
                registry
                    .list_once_gone(key, created, self.queue.listing())
                    .await
                    .map(Some)
            };
            let step = tokio::select! {
                step = next => step,
                () = registry.session().ended(self.session) => return Err(self.session_gone()),
            };
            match step {
                Ok(None) => return Ok(()),
                Ok(next) => (page, backoff) = (next, Backoff::default()),
                // The store can't be asked now; the place is kept as long as the session lives.
                Err(error @ Error::Unavailable { .. }) => {
                    tracing::debug!(%error, "waiting in a queue");
                    backoff.wait().await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The entry of the contender just before this one.
    async fn before(&self, page: Page) -> Result<Option<Entry>> {
        let mut before = None;
        for entry in self.queue.entries_from(page).await? {
            if entry.key == self.key {
                return match entry.session == Some(self.session) {
                    true => Ok(before),
                    false => Err(self.session_gone()),
                };
            }
            before = Some(entry);
        }
        // The own key is not there: expired, or removed by another hand.
        match self.queue.registry.session().is_valid(self.session) {
            true => Err(Error::HoldLost {
                key: self.queue.name.clone(),
            }),
            false => Err(self.session_gone()),
        }
    }

    fn session_gone(&self) -> Error {
        match self.queue.registry.session().live() {
            Err(closed @ Error::Closed) => closed,
            _ => Error::SessionExpired { session: self.session },
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        leave_in_background(&self.queue, &self.key, self.session, self.sent);
    }
}

/// Deletes a contender's key in the background.
fn leave_in_background(queue: &Queue, key: &Key, session: SessionId, sent: Sent) {
    let (queue, key) = (queue.clone(), key.clone());
    spawn(async move {
        // On failure the session has ended, and the key with it.
        let _ = leave(&queue, &key, session, sent, Retry::Everything).await;
    });
}

/// What the delete of a contender's key found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The key, which is deleted now.
    Deleted,
    /// No key, in the first attempt: another client deleted it, or the session's end did.
    Absent,
    /// No key, after an attempt of unknown outcome, which may have deleted it.
    Perhaps,
}

/// Deletes a contender's key, retrying until that is done, or for a while after its session has ended and taken it
/// along. If every request on the key was answered, and the first attempt deletes it, its name is given back; otherwise it is
/// never used again, so that no late delete removes another contender's key.
async fn leave(queue: &Queue, key: &Key, session: SessionId, sent: Sent, retry: Retry) -> Result<Left> {
    let first = AtomicBool::new(true);
    let first = &first;
    let attempt = || async move {
        let deleted = queue.registry.delete(key).await;
        let first = first.swap(false, Ordering::Relaxed);
        Ok(match (deleted?, first) {
            (true, true) => {
                if sent.settled {
                    queue.give_back(session, key);
                }
                Left::Deleted
            }
            (true, false) => Left::Deleted,
            (false, true) => Left::Absent,
            (false, false) => Left::Perhaps,
        })
    };
    let left = until_done(&*queue.registry, session, retry, attempt).await;
    if sent.may_create {
        spawn(delete_late(Arc::downgrade(&queue.registry), key.clone()));
    }
    left
}

/// Deletes a contender's key again and again, at intervals that double: a put of unknown outcome may take effect after the
/// delete, as one that a member of the store held up while it was cut off.
async fn delete_late(registry: Weak<dyn Registry>, key: Key) {
    let mut pause = FIRST_LATE_DELETE;
    while pause <= LAST_LATE_DELETE {
        tokio::time::sleep(pause).await;
        // The key ends with the session, and the session with its handle.
        let Some(registry) = registry.upgrade() else { return };
        match registry.delete(&key).await {
            Ok(true) => tracing::info!(%key, "deleted a contender's key that a late request had created"),
            Err(Error::Closed) => return,
            Ok(false) | Err(_) => {}
        }
        pause *= 2;
    }
}
