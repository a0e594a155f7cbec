//! The trait: the least that a backend must supply.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::recipe::{self, Election, Epoch, Lock, Mirror, Raise, ReentrantLock, Registration};
use crate::{
    Capabilities, Committed, Entry, Error, Existing, Expect, Key, Kind, Prefix, Result, Revision, Session,
    SessionState, Txn, Watch, WatchRequest, WatchScope,
};

/// A handle on a registry: one connection to one store, with one session.
///
/// The methods of the trait are the primitives, each with one meaning on every backend. What is built from them (`put`,
/// `lock`, `election`, ...) is found on the trait object, `dyn Registry`, and written once.
///
/// # Deadlines
/// Every call ends within the handle's `request_timeout` with a result or a typed error (F1).
///
/// # Cancel safety
/// Dropping the future of a read leaves nothing behind. Dropping that of a write leaves its outcome unknown: it may
/// still be applied.
#[async_trait]
pub trait Registry: std::fmt::Debug + Send + Sync + 'static {
    /// What this backend gives beyond the least.
    fn capabilities(&self) -> &Capabilities;

    /// The handle's session, to be read and watched.
    fn session(&self) -> &Session;

    /// Reads one key; `None` if it holds no value, whether or not there are keys below it.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::AccessDenied`], [`Error::Closed`].
    async fn get(&self, key: &Key, read: Read) -> Result<Option<Entry>>;

    /// Reads a page of entries, sorted by the bytes of their keys.
    ///
    /// # Errors
    /// As [`Registry::get`]; [`Error::InvalidRequest`] for a limit of zero.
    async fn list(&self, list: List) -> Result<Page>;

    /// The names of the direct children, sorted by their bytes: of keys, and of the parents that nobody put.
    ///
    /// # Errors
    /// As [`Registry::get`]; a backend with a bound on children names it in [`Capabilities::max_children`].
    async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>>;

    /// How many entries there are at and below a prefix.
    ///
    /// # Errors
    /// As [`Registry::get`].
    async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64>;

    /// Applies a transaction. When it returns, the change is durable (R5).
    ///
    /// # Errors
    /// [`Error::Conflict`] and [`Error::Refused`]: nothing changed. [`Error::SessionExpired`]: an ephemeral key was to
    /// be put, and the session is gone; nothing changed. [`Error::OutcomeUnknown`]: it may have been applied, or may be
    /// later. [`Error::InvalidRequest`] and [`Error::TooLarge`]: nothing was sent.
    async fn commit(&self, txn: Txn) -> Result<Committed>;

    /// Applies a transaction, then lists: [`Registry::commit`] and [`Registry::list`] one after the other, and less
    /// to wait for where the store tells both at once.
    ///
    /// The page shows the change, and every one that was acknowledged before it. Without a page the change was made, and
    /// could not be followed by a listing. Each of the two ends within the `request_timeout`.
    ///
    /// # Errors
    /// As [`Registry::commit`].
    async fn commit_and_list(&self, txn: Txn, list: List) -> Result<(Committed, Option<Page>)> {
        let committed = self.commit(txn).await?;
        Ok((committed, self.list(list).await.ok()))
    }

    /// Waits, however long, until a key is gone that was created at that revision, then lists: [`Registry::watch`] and
    /// [`Registry::list`] one after the other, and less to wait for where the store tells both at once.
    ///
    /// The page shows that the key is gone, and every change that was acknowledged before it went.
    ///
    /// # Errors
    /// As [`Registry::watch`] and [`Registry::list`]; [`Error::Closed`] when the handle is closed.
    ///
    /// # Cancel safety
    /// Dropping the future ends the watch.
    async fn list_once_gone(&self, key: &Key, created: Revision, list: List) -> Result<Page> {
        let request = WatchRequest::new(key, WatchScope::Key);
        self.watch(request).await?.gone(created).await?;
        self.list(list).await
    }

    /// Deletes a key and all below it, whoever owns them, and says how many there were. The root deletes everything in
    /// the user's tree.
    ///
    /// # Errors
    /// As [`Registry::commit`]. Where [`Capabilities::atomic_delete_prefix`] is not set, an error may leave a part of
    /// the keys deleted.
    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64>;

    /// Begins a watch.
    ///
    /// # Errors
    /// [`Error::Compacted`] if it was to start after a revision that is no longer kept, and no resync was asked for.
    async fn watch(&self, request: WatchRequest) -> Result<Watch>;

    /// Asks the store for a sign of life with a linearizable read, cheap and without a write.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with the cause.
    async fn health(&self) -> Result<Health>;

    /// Returns how often this handle noticed that its store went back: it lost changes that it had acknowledged, as one that
    /// was restored from a copy, and gives their revisions out again. Before the handle enters a queue for the next time,
    /// it raises the epoch of fencing tokens.
    fn rollbacks(&self) -> u64 {
        0
    }

    /// Ends the session; its ephemeral keys are gone when this returns (S3). Watches end, and every later call is
    /// refused with [`Error::Closed`]. A second `close` does nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::OutcomeUnknown`] if the store could not be told within the deadline: the
    /// session then ends by its TTL. The handle is closed all the same.
    async fn close(&self) -> Result<()>;
}

/// How fresh a read is (R4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Read {
    /// Sees every change acknowledged before it began, whichever client made it (Herlihy and Wing, 1990).
    Linearizable,
    /// May be old, and needs no quorum; one handle never goes back in time.
    Stale,
}

/// A listing to be read in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// Where to look.
    pub prefix: Prefix,
    /// How far down.
    pub depth: Depth,
    /// The most entries of a page, at least 1; a page may hold fewer, even where more follow.
    pub limit: usize,
    /// Where to go on from: [`Page::next`] of the page before.
    pub after: Option<Key>,
    /// How fresh.
    pub read: Read,
}

impl List {
    /// A linearizable listing of the key and all below it, a thousand entries a page.
    pub fn new(prefix: impl Into<Prefix>) -> Self {
        Self {
            prefix: prefix.into(),
            depth: Depth::Subtree,
            limit: 1000,
            after: None,
            read: Read::Linearizable,
        }
    }

    /// Whether `key` belongs in this listing, its place aside.
    pub fn wants(&self, key: &Key) -> bool {
        match self.depth {
            Depth::Subtree => self.prefix.covers(key),
            Depth::Children => self.prefix.child_of(key).is_some_and(|(_, itself)| itself),
        }
    }
}

/// How far down a listing goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Depth {
    /// The direct children that hold a value; not the key itself.
    Children,
    /// The key itself and all below it.
    Subtree,
}

/// A page of entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The entries, sorted by the bytes of their keys.
    pub entries: Vec<Entry>,
    /// Where the next page goes on from; `None` at the end.
    pub next: Option<Key>,
    /// The revision that the page shows: no change after it is in the page, and a watch can start after it.
    pub revision: Revision,
}

/// A sign of life of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// The member, endpoint or server that answered.
    pub endpoint: String,
    /// How long the answer took.
    pub latency: Duration,
    /// The store's revision as it answered.
    pub revision: Revision,
}

/// What is built from the primitives. Errors are those of [`Registry::commit`] and [`Registry::list`].
impl dyn Registry {
    /// Puts a persistent key.
    ///
    /// # Errors
    /// As [`Registry::commit`]: [`Error::Refused`] if the key is ephemeral or below an ephemeral one.
    pub async fn put(&self, key: &Key, value: impl Into<Bytes> + Send) -> Result<Revision> {
        Ok(self.commit(Txn::new().put(key, value)).await?.revision)
    }

    /// Puts a persistent key if it is as expected.
    ///
    /// # Errors
    /// As [`Registry::commit`]: [`Error::Conflict`] if it is not, with the revision found.
    pub async fn put_if(&self, key: &Key, expect: Expect, value: impl Into<Bytes> + Send) -> Result<Revision> {
        Ok(self
            .commit(Txn::new().when(key, expect).put(key, value))
            .await?
            .revision)
    }

    /// Puts a key that ends with this handle's session.
    ///
    /// # Errors
    /// As [`Registry::commit`]: [`Error::Refused`] if the key is persistent, another session's, or has children.
    pub async fn put_ephemeral(&self, key: &Key, value: impl Into<Bytes> + Send) -> Result<Revision> {
        Ok(self.commit(Txn::new().put_ephemeral(key, value)).await?.revision)
    }

    /// Puts a key whatever its kind and owner; one of another kind or owner is made anew (K7).
    ///
    /// # Errors
    /// As [`Registry::commit`].
    pub async fn take_over(&self, key: &Key, value: impl Into<Bytes> + Send, kind: Kind) -> Result<Revision> {
        Ok(self
            .commit(Txn::new().put_as(key, value, kind, Existing::TakeOver))
            .await?
            .revision)
    }

    /// Deletes one key and says whether it was there. What is below it stays.
    ///
    /// # Errors
    /// As [`Registry::commit`].
    pub async fn delete(&self, key: &Key) -> Result<bool> {
        Ok(self.commit(Txn::new().delete(key)).await?.changed[0])
    }

    /// Deletes one key if it is as expected, and says whether it was there.
    ///
    /// # Errors
    /// As [`Registry::commit`]: [`Error::Conflict`] if it is not, with the revision found.
    pub async fn delete_if(&self, key: &Key, expect: Expect) -> Result<bool> {
        Ok(self.commit(Txn::new().when(key, expect).delete(key)).await?.changed[0])
    }

    /// All entries of a listing, page by page. Each page is read on its own; keys that change meanwhile may show
    /// either state.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn list_all(&self, list: List) -> Result<Vec<Entry>> {
        let first = self.list(list.clone()).await?;
        self.list_on(list, first).await
    }

    /// The same, with a page of the listing at hand: its entries, and those of all that follow.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn list_on(&self, mut list: List, page: Page) -> Result<Vec<Entry>> {
        let (mut entries, mut next) = (page.entries, page.next);
        while next.is_some() {
            list.after = next;
            let page = self.list(list.clone()).await?;
            entries.extend(page.entries);
            next = page.next;
        }
        Ok(entries)
    }

    /// The lock of that name. Lock names and keys are apart: a lock on `/a` stores nothing in the user's tree.
    pub fn lock(self: &Arc<Self>, name: &Key) -> Lock {
        Lock::new(self.clone(), name)
    }

    /// The lock of that name, which one owner may acquire several times.
    pub fn reentrant_lock(self: &Arc<Self>, name: &Key) -> ReentrantLock {
        ReentrantLock::new(self.clone(), name)
    }

    /// The election of that name.
    pub fn election(self: &Arc<Self>, name: &Key) -> Election {
        Election::new(self.clone(), name)
    }

    /// Puts an ephemeral key and keeps it there: it comes back by itself after the session expired.
    ///
    /// # Errors
    /// As [`Registry::commit`]; see [`Registration`].
    pub async fn register(self: &Arc<Self>, key: &Key, value: impl Into<Bytes> + Send) -> Result<Registration> {
        Registration::start(self.clone(), key, value.into(), Existing::Keep).await
    }

    /// Makes a local copy of what a watch of that scope covers, and keeps it current.
    ///
    /// It returns when the copy is complete, which takes as long as reading the entries does.
    ///
    /// # Errors
    /// As [`Registry::watch`]; [`Error::Unavailable`] if the store does not answer within the `request_timeout`.
    pub async fn mirror(self: &Arc<Self>, prefix: impl Into<Prefix>, scope: WatchScope) -> Result<Mirror> {
        Mirror::start(self.clone(), prefix.into(), scope).await
    }

    /// Reads the epoch of the namespace's fencing tokens, and with it the largest one that can have been given out.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn epoch(&self) -> Result<Epoch> {
        recipe::epoch(self).await
    }

    /// Raises the epoch of the namespace's fencing tokens, so that later ones are larger than every one that `raise`
    /// names, and returns it. Contenders that are in a queue keep their tokens.
    ///
    /// # Errors
    /// [`Error::TokenOverflow`] if there is no such epoch; nothing changed. Else as [`Registry::commit`].
    pub async fn raise_epoch(&self, raise: Raise) -> Result<Epoch> {
        recipe::raise_epoch(self, raise).await
    }

    /// Waits until the session is connected and the store answers.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] when it does not within `deadline`; [`Error::Closed`].
    ///
    /// # Cancel safety
    /// Leaves nothing behind.
    pub async fn wait_connected(&self, deadline: Duration) -> Result<()> {
        let mut states = self.session().states();
        let wait = async {
            loop {
                let state = *states.borrow_and_update();
                match state {
                    SessionState::Closed(_) => return Err(Error::Closed),
                    SessionState::Connected(_) => {}
                    SessionState::Suspended(_) | SessionState::Expired(_) => {
                        states.changed().await.map_err(|_| Error::Closed)?;
                        continue;
                    }
                }
                match self.health().await {
                    Ok(_) => return Ok(()),
                    Err(Error::Closed) => return Err(Error::Closed),
                    Err(error) => tracing::debug!(%error, "not healthy yet"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let waited = Err(Error::DeadlineExceeded { waited: deadline });
        tokio::time::timeout(deadline, wait).await.unwrap_or(waited)
    }
}
