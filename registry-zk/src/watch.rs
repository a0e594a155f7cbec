//! Watches: ZooKeeper names what changed, and a read tells what it is now.
//!
//! A persistent recursive watch says which nodes changed, but neither to what nor, before ZooKeeper 3.9, when; and what
//! changes while the connection is down is not said at all. So every event only marks a key, marked keys are read, and a
//! [`Picture`] of what the reader knows turns what was read into events. ZooKeeper sends an event before any answer that
//! shows the change. When keys were read and no further event has come, they are all as of one moment; only then are
//! they told, which keeps the changes of one transaction together. After a gap everything is listed anew, in the same way.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures_util::FutureExt;
use registry_api::watch::{Feed, Picture, feed};
use registry_api::{
    DeleteCause, Depth, Entry, Error, Event, Key, Result, Revision, SessionState, Watch, WatchFrom, WatchRequest,
    WatchScope,
};
use tokio::sync::watch::Receiver;
use zookeeper_client::{AddWatchMode, Client, Error as ClientError, EventType, PersistentWatcher, WatchedEvent};

use crate::error::{self, Verdict};
use crate::names::{newest, parent, revision};
use crate::store::{Backoff, Conn, Store};
use crate::walk::{BATCH_BYTES, Fetch, Found, Values, Walk, entries, entry, get_key, read_births};

/// How often keys that change while they are read are read again before what is known is told.
const MAX_ROUNDS: u32 = 16;

/// Begins a watch.
pub(crate) async fn start(
    store: &Arc<Store>,
    request: WatchRequest,
    mut states: Receiver<SessionState>,
) -> Result<Watch> {
    if let WatchFrom::After(requested) = request.from {
        // A write, since only its answer tells the newest revision there is.
        let now = store
            .read(store.deadline(), |conn| async move {
                conn.client.set_data(&store.names.clock(), &[], None).await
            })
            .await?;
        let now = revision(now.mzxid);
        if requested > now {
            return Err(Error::InvalidRequest(format!(
                "a watch can't start after revision {requested}, which is still to come: it is {now} now"
            )));
        }
        // ZooKeeper keeps no history at all.
        return Err(Error::Compacted { requested, oldest: now });
    }
    let (feed, watch) = feed();
    if let WatchFrom::AfterOrReset(_) = request.from {
        feed.reset();
    }
    let mut watcher = Watcher {
        store: store.clone(),
        path: store.names.prefix(&request.prefix),
        request,
        picture: Picture::default(),
        told: Revision(0),
    };
    store.spawn(async move {
        let error = tokio::select! {
            error = watcher.run(&feed) => error,
            () = feed.closed() => return,
            // An error says that the handle is gone.
            _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => return,
        };
        if !matches!(error, Error::Closed) {
            feed.fail(error);
        }
    });
    Ok(watch)
}

/// One watch, apart from its reader.
struct Watcher {
    store: Arc<Store>,
    request: WatchRequest,
    path: String,
    /// What the reader was told.
    picture: Picture,
    /// The newest revision that was told.
    told: Revision,
}

/// The keys that changed since they were read; whether the last that was said of each is that it is gone.
type Marked = BTreeMap<String, bool>;

/// What was read of a marked key.
enum Seen {
    There(Entry),
    /// Gone, by a change that is not older than this.
    Gone(i64),
}

/// Why events are taken no longer.
enum Broken {
    /// The connection is lost; what was to be told meanwhile was not.
    Gap,
    /// A request failed.
    Failed(ClientError),
}

impl From<ClientError> for Broken {
    fn from(error: ClientError) -> Self {
        Self::Failed(error)
    }
}

impl Watcher {
    /// Ends with what no patience mends.
    async fn run(&mut self, feed: &Feed) -> Error {
        let store = self.store.clone();
        let mut backoff = Backoff::default();
        loop {
            let conn = match store.connected().await {
                Ok(conn) => conn,
                Err(error) => return error,
            };
            let told = self.told;
            let broken = tokio::select! {
                broken = self.follow(feed, &conn) => broken,
                () = store.replaced(&conn) => Broken::Gap,
            };
            drop(conn);
            if let Broken::Failed(failure) = broken {
                match error::verdict(&failure) {
                    Verdict::Denied | Verdict::Unsupported | Verdict::Invalid => return error::read(failure),
                    _ => tracing::debug!(%failure, path = self.path, "a watch broke off"),
                }
            }
            if self.told > told {
                backoff = Backoff::default();
            }
            backoff.wait().await;
        }
    }

    async fn follow(&mut self, feed: &Feed, conn: &Conn) -> Broken {
        match self.try_follow(feed, conn).await {
            Err(broken) => broken,
            Ok(never) => match never {},
        }
    }

    /// Lists, then tells changes until the connection is lost.
    async fn try_follow(&mut self, feed: &Feed, conn: &Conn) -> Result<std::convert::Infallible, Broken> {
        let client = &conn.client;
        let mut events = client.watch(&self.path, AddWatchMode::PersistentRecursive).await?;
        let mut marked = Marked::new();
        self.list(feed, conn, &mut events, &mut marked).await?;
        loop {
            if marked.is_empty() {
                let event = events.changed().await;
                self.mark(event, &mut marked)?;
            }
            self.drain(&mut events, &mut marked)?;
            let (seen, complete) = self.settle(client, &mut events, &mut marked).await?;
            self.tell(feed, seen);
            // A key that was created and deleted before it was read leaves nothing else to deliver.
            if revision(complete) > self.told {
                self.told = revision(complete);
                feed.synced(self.told);
            }
        }
    }

    /// Tells how what is there now differs from what was told.
    async fn list(
        &mut self,
        feed: &Feed,
        conn: &Conn,
        events: &mut PersistentWatcher,
        marked: &mut Marked,
    ) -> Result<(), Broken> {
        let client = &conn.client;
        let store = self.store.clone();
        let fresh = store.fresh(conn);
        let before = store.now(client).await?;
        let (covered, walked) = self.covered(client).await?;
        fresh.await?;
        let mut covered: BTreeMap<_, _> = covered.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        self.drain(events, marked)?;
        let (seen, settled) = self.settle(client, events, marked).await?;
        for (key, seen) in seen {
            match seen {
                Seen::There(entry) => drop(covered.insert(key, entry)),
                Seen::Gone(_) => drop(covered.remove(&key)),
            }
        }
        // The server is no older than any that was read before, unless the servers were restored from an older copy.
        let at = revision(before.max(walked).max(settled));
        let known = self.picture.entries().map(|entry| entry.mod_revision).max();
        let told = self.told.max(known.unwrap_or_default());
        let mut went_back = self.is_older(&covered);
        if went_back || at < told {
            // Only the answer to a write tells the newest revision there is.
            let clock = client.set_data(&store.names.clock(), &[], None).await?;
            went_back |= revision(clock.mzxid) < told;
            if went_back {
                self.go_back(feed, covered.into_values().collect(), revision(clock.mzxid));
                return Ok(());
            }
        }
        let at = at.max(told);
        feed.changes(self.picture.replace(covered.into_values().collect(), at));
        self.told = at;
        store.saw(i64::try_from(at.0).unwrap_or(i64::MAX));
        feed.synced(at);
        Ok(())
    }

    /// Whether a key is at an older revision than was delivered.
    fn is_older(&self, covered: &BTreeMap<Key, Entry>) -> bool {
        let is_older = |known: &Entry| {
            let there = covered.get(&known.key);
            there.is_some_and(|entry| entry.mod_revision < known.mod_revision)
        };
        self.picture.entries().any(is_older)
    }

    /// What differs from what was delivered is delivered as deleted, and as created.
    fn go_back(&mut self, feed: &Feed, entries: Vec<Entry>, at: Revision) {
        tracing::warn!(path = self.path, told = %self.told, now = %at, "the servers have lost changes that were delivered");
        let now: HashMap<_, _> = entries.iter().map(|entry| (&entry.key, entry)).collect();
        let lost = self
            .picture
            .entries()
            .filter(|known| now.get(&known.key) != Some(known));
        let deleted = lost.map(|last| Event::Deleted {
            last: last.clone(),
            revision: at,
            cause: DeleteCause::Unknown,
        });
        let created = entries
            .iter()
            .filter(|entry| self.picture.get(&entry.key) != Some(entry));
        feed.changes(deleted.chain(created.cloned().map(Event::Created)).collect());
        self.picture = Picture::default();
        self.picture.replace(entries, at);
        self.told = at;
        self.store.went_back(i64::try_from(at.0).unwrap_or(i64::MAX));
        feed.synced(at);
    }

    /// Everything that is covered, and the newest change seen with it.
    async fn covered(&self, client: &Client) -> Result<(Vec<Entry>, i64), ClientError> {
        let names = &self.store.names;
        let depth = match self.request.scope {
            WatchScope::Key => {
                let above = client
                    .check_stat(parent(&self.path))
                    .await?
                    .map_or(0, |stat| stat.pzxid);
                let found = get_key(names, client, &self.path)
                    .await?
                    .map(|found| (self.path.clone(), found));
                let newest = found.iter().map(|(_, found)| newest(&found.stat)).max().unwrap_or(0);
                return Ok((entries(names, found.into_iter().collect()), newest.max(above)));
            }
            WatchScope::Children => Depth::Children,
            WatchScope::Subtree => Depth::Subtree,
        };
        let walk = Walk::new(names, client, &self.request.prefix, depth, Values::Wanted);
        let (nodes, newest) = walk.all().await?;
        Ok((entries(names, nodes), newest))
    }

    /// Takes all events that have come.
    fn drain(&self, events: &mut PersistentWatcher, marked: &mut Marked) -> Result<(), Broken> {
        while let Some(event) = events.changed().now_or_never() {
            self.mark(event, marked)?;
        }
        Ok(())
    }

    fn mark(&self, event: WatchedEvent, marked: &mut Marked) -> Result<(), Broken> {
        match event.event_type {
            EventType::NodeCreated | EventType::NodeDataChanged | EventType::NodeDeleted => {
                let wanted = |key: Key| self.request.wants(&key);
                if self.store.names.key(&event.path).is_some_and(wanted) {
                    marked.insert(event.path, event.event_type == EventType::NodeDeleted);
                }
                Ok(())
            }
            EventType::NodeChildrenChanged => Ok(()),
            EventType::Session => Err(Broken::Gap),
        }
    }

    /// Reads marked keys until none is marked, or long enough. Returns what was read, and a revision up to which nothing
    /// is missing in it.
    async fn settle(
        &self,
        client: &Client,
        events: &mut PersistentWatcher,
        marked: &mut Marked,
    ) -> Result<(BTreeMap<Key, Seen>, i64), Broken> {
        let mut seen = BTreeMap::new();
        let mut complete = 0;
        let mut reached = 0;
        for _ in 0..MAX_ROUNDS {
            complete = reached;
            if marked.is_empty() {
                break;
            }
            let round = std::mem::take(marked);
            for (path, key) in self.read(client, round).await? {
                let at = match &key {
                    Seen::There(entry) => i64::try_from(entry.mod_revision.0).unwrap_or(i64::MAX),
                    Seen::Gone(at) => *at,
                };
                reached = reached.max(at);
                if let Some(name) = self.store.names.key(&path) {
                    seen.insert(name, key);
                }
            }
            self.drain(events, marked)?;
            if marked.is_empty() {
                complete = reached;
            }
        }
        Ok((seen, complete))
    }

    /// Reads keys. With one that is gone comes what tells since when: its guard and its parent, as of the same moment.
    async fn read(&self, client: &Client, marked: Marked) -> Result<Vec<(String, Seen)>, ClientError> {
        let names = &self.store.names;
        let together = |(path, gone): (&String, &bool)| {
            let mut paths = vec![path.clone()];
            if *gone {
                paths.push(parent(path).to_owned());
                paths.extend(names.part(path).map(|part| names.guard(part)));
            }
            paths
        };
        let wanted: Vec<_> = marked.iter().map(together).collect();
        let mut fetch = Fetch::new(Values::Wanted);
        let mut found = Vec::with_capacity(wanted.len());
        while found.len() < wanted.len() {
            found.extend(fetch.first(client, &wanted[found.len()..], BATCH_BYTES).await?);
        }
        let mut nodes: Vec<_> = found.iter_mut().map(|found| found[0].take()).collect();
        let paths: Vec<_> = marked.keys().cloned().collect();
        read_births(names, client, &paths, &mut nodes).await?;
        let mut seen = Vec::with_capacity(paths.len());
        for ((path, node), beside) in paths.into_iter().zip(nodes).zip(found) {
            let since = |(place, found): (usize, &Option<Found>)| {
                let stat = found.as_ref().map(|found| found.stat)?;
                // Its parent, then its guard.
                Some(if place == 0 { stat.pzxid } else { stat.mzxid })
            };
            let since = beside[1..].iter().enumerate().filter_map(since).max();
            let there = node.and_then(|node| entry(names, &path, node));
            seen.push((path, there.map_or(Seen::Gone(since.unwrap_or(0)), Seen::There)));
        }
        Ok(seen)
    }

    fn tell(&mut self, feed: &Feed, seen: BTreeMap<Key, Seen>) {
        let mut events = Vec::new();
        for (key, seen) in seen {
            match seen {
                Seen::There(entry) => events.extend(self.picture.put(entry)),
                Seen::Gone(since) => {
                    let Some(known) = self.picture.get(&key) else {
                        continue;
                    };
                    let at = revision(since).max(Revision(known.mod_revision.0 + 1));
                    let cause = match known.session {
                        Some(_) => DeleteCause::Unknown,
                        None => DeleteCause::Deleted,
                    };
                    events.extend(self.picture.delete(&key, at, cause));
                }
            }
        }
        // Stable, so that the delete of a key that was made anew stays before its creation.
        events.sort_by_key(Event::revision);
        if let Some(newest) = events.last().map(Event::revision) {
            self.told = self.told.max(newest);
            self.store.saw(i64::try_from(newest.0).unwrap_or(i64::MAX));
        }
        feed.changes(events);
    }
}
