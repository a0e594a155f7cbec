//! A member's copy of the state, as reads and watches see it.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use parking_lot::{Mutex, RwLock};
use registry_api::watch::feed;
use registry_api::{Error, Event, Result, Revision, Watch, WatchFrom, WatchItem, WatchScope};
use tokio::sync::watch;

use crate::command::{Change, Outcome, Reply};
use crate::history::{Batch, History};
use crate::proto;
use crate::snapshot::Frozen;
use crate::state::{State, below};
use crate::transport::{CUT, part_len};
use crate::tree::Tree;
use crate::types::{LogId, SnapshotMeta, StoredMembership};
use crate::watchers::{Target, Watchers};

/// How many records a watch takes from the tree at a time while it tells the current entries.
const CHUNK: usize = 256;

/// The state with its history and watches. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Store {
    inner: Arc<RwLock<Inner>>,
    watchers: Arc<Mutex<Watchers>>,
    digests: Arc<watch::Sender<(u64, Bytes)>>,
    /// Entries are applied while this can be read: a test holds them up.
    #[cfg(test)]
    pub(crate) applies: Arc<tokio::sync::RwLock<()>>,
}

#[derive(Debug, Default)]
pub(crate) struct Inner {
    pub(crate) state: State,
    pub(crate) history: History,
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
    /// The state as the newest mark found it, until somebody takes its digest.
    marked: Option<Frozen>,
}

impl Inner {
    /// The state as it is now, which stays so.
    pub(crate) fn frozen(&self) -> Frozen {
        let meta = SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
        };
        Frozen::of(&self.state, meta)
    }
}

impl Store {
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&self.inner.read())
    }

    /// Applies commands of the log, in order, and tells the watches. The answers come in the same order.
    pub(crate) fn apply(&self, apply: impl FnOnce(&mut Applier<'_>)) {
        let mut inner = self.inner.write();
        // Taken inside the lock on the state, and by nobody the other way round.
        let watchers = self.watchers.lock();
        apply(&mut Applier {
            inner: &mut inner,
            watchers: &watchers,
        });
    }

    /// Takes up another state, from a snapshot. Watches are told the difference.
    pub(crate) fn replace(&self, frozen: Frozen) {
        let (state, meta) = frozen.thaw();
        let mut inner = self.inner.write();
        let watchers = self.watchers.lock();
        let before = std::mem::replace(&mut inner.state, state);
        inner.history = History::since(inner.state.revision);
        inner.applied = meta.last_log_id;
        inner.membership = meta.last_membership;
        let revision = inner.state.revision;
        watchers.jump(|target, feed| {
            // A watch knows all up to where it started, which this copy had reached then.
            if revision > target.after {
                feed.changes(difference(target, &before.tree, &inner.state.tree, revision));
                feed.synced(Revision(revision));
            }
        });
    }

    /// Whether a mark has left a state.
    pub(crate) fn is_marked(&self) -> bool {
        self.inner.read().marked.is_some()
    }

    /// The state as the newest mark found it, once.
    pub(crate) fn take_marked(&self) -> Option<Frozen> {
        self.inner.write().marked.take()
    }

    /// Notes the digest of a marked state.
    pub(crate) fn note_digest(&self, index: u64, digest: Bytes) {
        self.digests.send_if_modified(|newest| {
            let newer = newest.0 < index;
            if newer {
                *newest = (index, digest);
            }
            newer
        });
    }

    /// The newest mark with its digest.
    pub(crate) fn digests(&self) -> watch::Receiver<(u64, Bytes)> {
        self.digests.subscribe()
    }

    /// Ends every watch.
    pub(crate) fn end_watches(&self) {
        self.watchers.lock().clear();
    }

    pub(crate) fn watches(&self) -> usize {
        self.watchers.lock().len()
    }

    pub(crate) fn get(&self, key: &str) -> proto::GetAnswer {
        self.read(|inner| proto::GetAnswer {
            entry: inner.state.tree.get(key).map(|record| proto::Entry::from(&**record)),
            revision: inner.state.revision,
        })
    }

    pub(crate) fn count(&self, prefix: &str) -> proto::CountAnswer {
        let (from, to) = below(prefix);
        self.read(|inner| {
            let tree = &inner.state.tree;
            proto::CountAnswer {
                count: (usize::from(tree.get(prefix).is_some()) + tree.count(&from, &to)) as u64,
                revision: inner.state.revision,
            }
        })
    }

    pub(crate) fn list(&self, list: &proto::List) -> proto::Page {
        let (tree, revision) = self.read(|inner| (inner.state.tree.clone(), inner.state.revision));
        let (from, to) = below(&list.prefix);
        let mut page = proto::Page {
            entries: Vec::new(),
            more: false,
            revision,
        };
        let mut bytes = 0;
        let mut start = match list.after.is_empty() {
            true => list.prefix.clone(),
            // The least key that is larger.
            false => format!("{}\0", list.after),
        };
        // The key itself sorts first, apart from what is below it.
        if !list.children_only && start == list.prefix {
            page.entries
                .extend(tree.get(&list.prefix).map(|record| proto::Entry::from(&**record)));
        }
        if start < from {
            start.clone_from(&from);
        }
        loop {
            let mut seek = None;
            for record in tree.range(&start, &to) {
                if list.children_only
                    && let Some(deeper) = record.key[from.len()..].find('/')
                {
                    seek = Some(past(&record.key[..from.len() + deeper]));
                    break;
                }
                if page.entries.len() as u64 >= list.limit.max(1) || bytes > CUT {
                    page.more = true;
                    return page;
                }
                let entry = proto::Entry::from(&**record);
                bytes += part_len(&entry);
                page.entries.push(entry);
            }
            match seek {
                Some(next) => start = next,
                None => return page,
            }
        }
    }

    /// The names of direct children, from `start` on if it is given, as many as fit a message.
    pub(crate) fn children(&self, prefix: &str, start: &str) -> proto::ChildrenAnswer {
        let (tree, revision) = self.read(|inner| (inner.state.tree.clone(), inner.state.revision));
        let (from, to) = below(prefix);
        let mut names = BTreeSet::new();
        let mut bytes = 0;
        let mut start = start.max(&from).to_owned();
        loop {
            let mut seek = None;
            for record in tree.range(&start, &to) {
                let rest = &record.key[from.len()..];
                let (name, deeper) = rest.split_once('/').map_or((rest, false), |(name, _)| (name, true));
                if bytes > CUT {
                    return proto::ChildrenAnswer {
                        names: names.into_iter().collect(),
                        revision,
                        next: record.key.to_string(),
                    };
                }
                if names.insert(name.to_owned()) {
                    bytes += part_len(&name.to_owned());
                }
                if deeper {
                    seek = Some(past(&record.key[..from.len() + name.len()]));
                    break;
                }
            }
            match seek {
                Some(next) => start = next,
                None => {
                    return proto::ChildrenAnswer {
                        names: names.into_iter().collect(),
                        revision,
                        next: String::new(),
                    };
                }
            }
        }
    }

    /// Begins a watch on this copy of the state.
    pub(crate) fn watch(&self, mut target: Target) -> Result<Watch> {
        let (feed, live) = feed();
        // The state stands still while the watch is entered, so nothing falls between.
        let inner = self.inner.read();
        let mut watchers = self.watchers.lock();
        let revision = inner.state.revision;
        let resumed = match target.request.from {
            WatchFrom::Now => None,
            // The caller has made sure that this copy holds all that was acknowledged.
            WatchFrom::After(after) if after.0 > revision => return Err(still_to_come(after, revision)),
            WatchFrom::AfterOrReset(after) if after.0 > revision => None,
            WatchFrom::After(after) | WatchFrom::AfterOrReset(after) => {
                target.after = after.0;
                inner
                    .history
                    .after(after.0)
                    .map(|batches| batches.cloned().collect::<Vec<_>>())
            }
        };
        let begin = match (resumed, target.request.from) {
            (Some(batches), _) => {
                for batch in &batches {
                    feed.changes(target.events(batch));
                }
                feed.synced(Revision(revision));
                None
            }
            (None, WatchFrom::After(requested)) => {
                return Err(Error::Compacted {
                    requested,
                    oldest: Revision(inner.history.compacted()),
                });
            }
            (None, from) => {
                target.after = revision;
                Some((from != WatchFrom::Now, inner.state.tree.clone()))
            }
        };
        let prefix = target.qualified();
        let id = watchers.add(target.clone(), feed);
        let guard = Guard {
            watchers: self.watchers.clone(),
            prefix,
            id,
        };
        let items = match begin {
            None => stream::empty().boxed(),
            Some((reset, tree)) => {
                let reset = stream::iter(reset.then_some(Ok(WatchItem::Reset)));
                reset.chain(current(tree, target)).chain(synced(revision)).boxed()
            }
        };
        Ok(Watch::new(Guarded {
            items: items.chain(live).boxed(),
            _guard: guard,
        }))
    }
}

/// The error of a watch that is to start after a revision that no change has yet.
fn still_to_come(after: Revision, revision: u64) -> Error {
    Error::InvalidRequest(format!(
        "a watch can't start after revision {after}, which is still to come: it is {revision} now"
    ))
}

/// The least name past all that is below this one: `0` is the byte after `/`.
fn past(parent: &str) -> String {
    [parent, "0"].concat()
}

fn synced(revision: u64) -> impl Stream<Item = Result<WatchItem>> {
    stream::iter([Ok(WatchItem::Synced(Revision(revision)))])
}

/// The current entries, a chunk at a time, from a frozen tree that is let go at the end.
fn current(tree: Tree, target: Target) -> impl Stream<Item = Result<WatchItem>> {
    let prefix = target.qualified();
    let (from, to) = below(&prefix);
    let first = match target.request.scope {
        WatchScope::Children => None,
        WatchScope::Key | WatchScope::Subtree => tree.get(&prefix).and_then(|record| target.current(record)),
    };
    let mut next = (target.request.scope != WatchScope::Key).then_some(from);
    let below = std::iter::from_fn(move || {
        let from = next.take()?;
        let mut events = Vec::new();
        for record in tree.range(&from, &to).take(CHUNK) {
            events.extend(target.current(record));
            next = Some(format!("{}\0", record.key));
        }
        Some(events)
    });
    let below = stream::iter(
        below
            .filter(|events| !events.is_empty())
            .map(|events| Ok(WatchItem::Changes(events))),
    );
    let first = stream::iter(first.map(|event| Ok(WatchItem::Changes(vec![event]))));
    first.chain(below)
}

/// The events that lead from one tree to another, for one watch.
fn difference(target: &Target, before: &Tree, after: &Tree, revision: u64) -> Vec<Event> {
    let prefix = target.qualified();
    let (from, to) = below(&prefix);
    let keys = |tree: &Tree| {
        tree.get(&prefix)
            .cloned()
            .into_iter()
            .chain(tree.range(&from, &to).cloned())
            .collect::<Vec<_>>()
    };
    let mut picture = registry_api::watch::Picture::default();
    let entries = |tree: &Tree| {
        keys(tree)
            .iter()
            .filter_map(|record| target.current(record))
            .collect::<Vec<_>>()
    };
    for event in entries(before) {
        picture.put(event.entry().clone());
    }
    let now = entries(after).into_iter().map(|event| event.entry().clone()).collect();
    picture.replace(now, Revision(revision))
}

/// The state while commands are applied to it.
pub(crate) struct Applier<'a> {
    inner: &'a mut Inner,
    watchers: &'a Watchers,
}

impl Applier<'_> {
    /// Applies one command.
    pub(crate) fn command(&mut self, log_id: LogId, command: crate::command::Command) -> Reply {
        let mark = matches!(command.change, Some(Change::Mark(_)));
        let applied = self.inner.state.apply(log_id.committed_leader_id().term, command);
        self.inner.applied = Some(log_id);
        if !applied.changes.is_empty() {
            let batch = Batch {
                revision: self.inner.state.revision,
                changes: applied.changes.into(),
            };
            self.watchers.tell(&batch);
            self.inner.history.push(batch);
        }
        if mark {
            self.inner.marked = Some(self.inner.frozen());
            return Outcome::Marked(log_id.index).into();
        }
        applied.reply
    }

    pub(crate) fn blank(&mut self, log_id: LogId) {
        self.inner.applied = Some(log_id);
    }

    pub(crate) fn membership(&mut self, membership: StoredMembership, log_id: LogId) {
        let inner = &mut *self.inner;
        let gone = inner.membership.nodes().map(|(id, _)| *id);
        let gone = gone.filter(|id| membership.membership().get_node(id).is_none());
        inner.state.removed.extend(gone);
        inner.applied = Some(log_id);
        inner.membership = membership;
    }
}

/// Takes a watch off the list when its reader is gone.
struct Guard {
    watchers: Arc<Mutex<Watchers>>,
    prefix: String,
    id: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.watchers.lock().remove(&self.prefix, self.id);
    }
}

struct Guarded {
    items: stream::BoxStream<'static, Result<WatchItem>>,
    _guard: Guard,
}

impl Stream for Guarded {
    type Item = Result<WatchItem>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.poll_next_unpin(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proto::operation::Write;
    use registry_api::{Namespace, WatchRequest};

    use super::*;
    use crate::command::Command;

    fn write(state: &mut State, write: Write) -> Frozen {
        let operation = proto::Operation {
            key: "/ns/k".into(),
            write: Some(write),
        };
        let txn = proto::Txn {
            conditions: Vec::new(),
            operations: vec![operation],
        };
        let applied = state.apply(1, Command::new(Change::Txn(txn)));
        assert_eq!(applied.changes.len(), 1);
        Frozen::of(state, SnapshotMeta::default())
    }

    /// The states that a key goes through: created at 1, deleted at 2, created at 3, updated at 4.
    fn states() -> [Frozen; 4] {
        let (mut state, put) = (State::default(), || Write::Put(proto::Put::default()));
        [
            write(&mut state, put()),
            write(&mut state, Write::Delete(proto::Unit {})),
            write(&mut state, put()),
            write(&mut state, put()),
        ]
    }

    fn begin(store: &Store, from: WatchFrom) -> Result<Watch> {
        let request = WatchRequest {
            from,
            ..WatchRequest::new(registry_api::Prefix::root(), WatchScope::Subtree)
        };
        let namespace = Namespace::parse("/ns").unwrap();
        let target = Target {
            namespace,
            request,
            after: 0,
        };
        store.watch(target)
    }

    fn next(watch: &mut Watch) -> Option<Result<WatchItem>> {
        watch.next().now_or_never().map(Option::unwrap)
    }

    fn is_synced(told: &Option<Result<WatchItem>>, revision: u64) -> bool {
        matches!(told, Some(Ok(WatchItem::Synced(at))) if at.0 == revision)
    }

    #[test]
    fn a_jump_to_what_a_watch_knows_tells_it_nothing() {
        let [_, _, again, updated] = states();
        let store = Store::default();
        store.replace(again.clone());
        let mut watch = begin(&store, WatchFrom::After(Revision(3))).unwrap();
        let told = next(&mut watch);
        assert!(is_synced(&told, 3), "{told:?}");
        store.replace(again);
        assert!(next(&mut watch).is_none());
        store.replace(updated);
        let told = next(&mut watch);
        assert!(
            matches!(&told, Some(Ok(WatchItem::Changes(events))) if matches!(events[..], [Event::Updated(_)])),
            "{told:?}"
        );
        let told = next(&mut watch);
        assert!(is_synced(&told, 4), "{told:?}");
    }

    /// A watch would otherwise keep every change up to that revision to itself, and have said that it is synced.
    #[test]
    fn a_watch_after_a_revision_still_to_come_is_refused_or_reset() {
        let [created, ..] = states();
        let store = Store::default();
        store.replace(created);
        let refused = begin(&store, WatchFrom::After(Revision(2)));
        assert!(matches!(refused, Err(Error::InvalidRequest(_))), "{refused:?}");
        let mut reset = begin(&store, WatchFrom::AfterOrReset(Revision(2))).unwrap();
        let told = [next(&mut reset), next(&mut reset), next(&mut reset)];
        assert!(
            matches!(
                &told,
                [Some(Ok(WatchItem::Reset)), Some(Ok(WatchItem::Changes(events))), synced]
                    if matches!(events[..], [Event::Created(_)]) && is_synced(synced, 1)
            ),
            "{told:?}"
        );
        assert_eq!(store.watches(), 1);
        // The present revision has come.
        let mut watch = begin(&store, WatchFrom::After(Revision(1))).unwrap();
        let told = next(&mut watch);
        assert!(is_synced(&told, 1), "{told:?}");
    }
}
