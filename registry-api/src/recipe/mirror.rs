//! A local copy of a part of the registry.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::opening::read_to_synced;
use crate::{Entry, Error, Event, Key, Prefix, Registry, Result, Revision, WatchItem, WatchRequest, WatchScope, spawn};

/// An always current copy of a key, its children or its subtree, kept by a watch.
///
/// Reads are local and cost no request. A thread of this crate keeps the copy, whatever becomes of the caller's runtime. The copy trails the store by the time a change takes to arrive; during an
/// outage it holds what it last knew. Dropping the last clone ends the watch.
#[derive(Clone, Debug)]
pub struct Mirror {
    entries: Arc<RwLock<BTreeMap<Key, Entry>>>,
    revision: watch::Receiver<Revision>,
    _task: Arc<AbortOnDrop>,
}

impl Mirror {
    pub(crate) async fn start(registry: Arc<dyn Registry>, prefix: Prefix, scope: WatchScope) -> Result<Self> {
        let mut watch = registry.watch(WatchRequest::new(prefix, scope)).await?;
        let mut entries = BTreeMap::new();
        let mut synced = false;
        let mut revision = Revision(0);
        read_to_synced(&*registry, &mut watch, |item| {
            revision = apply(&mut entries, item, &mut synced);
        })
        .await?;
        let entries = Arc::new(RwLock::new(entries));
        let (newest, revision) = watch::channel(revision);
        let copy = entries.clone();
        let task = spawn(async move {
            // After an error, or the handle's end, nothing follows, and the channel is closed.
            while let Some(Ok(item)) = watch.next().await {
                let (from_the_start, changes) = match &item {
                    WatchItem::Reset => (true, false),
                    WatchItem::Changes(_) => (false, true),
                    WatchItem::Synced(_) => (false, false),
                };
                let revision = apply(
                    &mut copy.write().unwrap_or_else(PoisonError::into_inner),
                    item,
                    &mut synced,
                );
                newest.send_if_modified(|newest| {
                    let before = *newest;
                    if !changes {
                        // A store that went back begins with lower revisions.
                        *newest = revision;
                    } else if synced {
                        *newest = revision.max(before);
                    }
                    from_the_start || (synced && (changes || *newest != before))
                });
            }
        });
        Ok(Self {
            entries,
            revision,
            _task: Arc::new(AbortOnDrop(task)),
        })
    }

    /// The entry of a key.
    pub fn get(&self, key: &Key) -> Option<Entry> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(key)
            .cloned()
    }

    /// All entries, sorted by key.
    pub fn entries(&self) -> Vec<Entry> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The newest revision whose changes are in the copy.
    pub fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    /// Waits until every change up to `revision` that the copy covers is in it: after an own write, with the revision
    /// that the write returned, if it was to a key that is covered. During an outage it waits for the store.
    ///
    /// # Errors
    /// [`Error::Closed`] if the watch beneath has ended.
    pub async fn caught_up(&self, revision: Revision) -> Result<()> {
        let mut revisions = self.revision.clone();
        let reached = revisions.wait_for(|newest| *newest >= revision).await;
        reached.map(|_| ()).map_err(|_| Error::Closed)
    }

    /// Waits for the next change.
    ///
    /// # Errors
    /// [`Error::Closed`] if the watch beneath has ended.
    pub async fn changed(&mut self) -> Result<Revision> {
        self.revision.changed().await.map_err(|_| Error::Closed)?;
        Ok(*self.revision.borrow_and_update())
    }
}

fn apply(entries: &mut BTreeMap<Key, Entry>, item: WatchItem, synced: &mut bool) -> Revision {
    match item {
        WatchItem::Reset => {
            entries.clear();
            *synced = false;
            Revision(0)
        }
        WatchItem::Synced(revision) => {
            *synced = true;
            revision
        }
        WatchItem::Changes(events) => {
            let newest = events.iter().map(Event::revision).max().unwrap_or_default();
            for event in events {
                match event {
                    Event::Created(entry) | Event::Updated(entry) => {
                        entries.insert(entry.key.clone(), entry);
                    }
                    Event::Deleted { last, .. } => {
                        entries.remove(&last.key);
                    }
                }
            }
            newest
        }
    }
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
