//! Who is to be told of which change.

use std::collections::HashMap;
use std::sync::Arc;

use registry_api::watch::Feed;
use registry_api::{DeleteCause, Entry, Event, Namespace, Revision, SessionId, WatchRequest};

use crate::command;
use crate::history::Batch;
use crate::state::{ChangeKind, KeyChange};
use crate::tree::Record;

/// The running watches of a member, by the qualified prefix they watch: a change finds its watchers by the key and the
/// keys above it, whatever the number of others.
#[derive(Debug, Default)]
pub(crate) struct Watchers {
    by_prefix: HashMap<Arc<str>, Vec<Watcher>>,
    next: u64,
    len: usize,
}

#[derive(Debug)]
struct Watcher {
    id: u64,
    feed: Feed,
    target: Target,
}

/// What a watch wants.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) namespace: Namespace,
    pub(crate) request: WatchRequest,
    /// Nothing up to this revision is told.
    pub(crate) after: u64,
}

impl Target {
    pub(crate) fn qualified(&self) -> String {
        self.namespace.qualify(self.request.prefix.as_str())
    }

    /// What a batch holds for this watch.
    pub(crate) fn events(&self, batch: &Batch) -> Vec<Event> {
        Said::new(batch).to(self)
    }

    /// A record as the first of its key that the watch tells.
    pub(crate) fn current(&self, record: &Record) -> Option<Event> {
        let entry = entry(&self.namespace, record)?;
        self.request.wants(&entry.key).then_some(Event::Created(entry))
    }
}

/// What a batch holds, in the words of the api: said once for all watches of a namespace, and a key is in one only.
struct Said<'b> {
    batch: &'b Batch,
    events: Option<(Namespace, Vec<Event>)>,
}

impl<'b> Said<'b> {
    fn new(batch: &'b Batch) -> Self {
        Self { batch, events: None }
    }

    fn to(&mut self, target: &Target) -> Vec<Event> {
        let (batch, namespace) = (self.batch, &target.namespace);
        if batch.revision <= target.after {
            return Vec::new();
        }
        if self.events.as_ref().is_none_or(|(of, _)| of != namespace) {
            let changes = batch.changes.iter();
            let events = changes.filter_map(|change| event(namespace, batch.revision, change));
            self.events = Some((namespace.clone(), events.collect()));
        }
        let events = self.events.iter().flat_map(|(_, events)| events);
        events
            .filter(|event| target.request.wants(event.key()))
            .cloned()
            .collect()
    }
}

impl Watchers {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn add(&mut self, target: Target, feed: Feed) -> u64 {
        self.next += 1;
        self.len += 1;
        let id = self.next;
        self.by_prefix
            .entry(target.qualified().into())
            .or_default()
            .push(Watcher { id, feed, target });
        id
    }

    pub(crate) fn remove(&mut self, prefix: &str, id: u64) {
        let Some(watchers) = self.by_prefix.get_mut(prefix) else {
            return;
        };
        let before = watchers.len();
        watchers.retain(|watcher| watcher.id != id);
        self.len -= before - watchers.len();
        if watchers.is_empty() {
            self.by_prefix.remove(prefix);
        }
    }

    /// Tells the changes of one revision, to each watch in one call.
    pub(crate) fn tell(&self, batch: &Batch) {
        if self.len == 0 {
            return;
        }
        let mut said = Said::new(batch);
        if let [change] = &*batch.changes {
            // One change, which is nearly every revision: nothing to gather.
            self.each_watcher(&change.record.key, |watcher| {
                watcher.feed.changes(said.to(&watcher.target));
            });
            return;
        }
        let mut told = std::collections::HashSet::new();
        for change in batch.changes.iter() {
            self.each_watcher(&change.record.key, |watcher| {
                if told.insert(watcher.id) {
                    watcher.feed.changes(said.to(&watcher.target));
                }
            });
        }
    }

    /// Ends every watch: the member stops.
    pub(crate) fn clear(&mut self) {
        self.by_prefix.clear();
        self.len = 0;
    }

    /// Gives every watch what a jump of the state means to it: the difference between two states.
    pub(crate) fn jump(&self, mut tell: impl FnMut(&Target, &Feed)) {
        for watcher in self.by_prefix.values().flatten() {
            tell(&watcher.target, &watcher.feed);
        }
    }

    fn each_watcher(&self, key: &str, mut tell: impl FnMut(&Watcher)) {
        let above = key
            .rmatch_indices('/')
            .map(|(at, _)| &key[..at])
            .filter(|above| !above.is_empty());
        for prefix in std::iter::once(key).chain(above) {
            self.by_prefix.get(prefix).into_iter().flatten().for_each(&mut tell);
        }
    }
}

/// The event of a change, in the words of the api. `None` for a key of another namespace, or one the api does not know.
pub(crate) fn event(namespace: &Namespace, revision: u64, change: &KeyChange) -> Option<Event> {
    let entry = entry(namespace, &change.record)?;
    let deleted = |last, cause| Event::Deleted {
        last,
        revision: Revision(revision),
        cause,
    };
    Some(match change.kind {
        ChangeKind::Created => Event::Created(entry),
        ChangeKind::Updated => Event::Updated(entry),
        ChangeKind::Deleted => deleted(entry, DeleteCause::Deleted),
        ChangeKind::SessionEnded => deleted(entry, DeleteCause::SessionEnded),
    })
}

pub(crate) fn entry(namespace: &Namespace, record: &Record) -> Option<Entry> {
    Some(Entry {
        key: command::logical(namespace, &record.key).ok()?,
        value: record.value.clone(),
        create_revision: Revision(record.create_revision),
        mod_revision: Revision(record.mod_revision),
        session: (record.session > 0).then_some(SessionId(record.session)),
    })
}
