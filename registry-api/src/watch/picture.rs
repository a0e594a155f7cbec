//! What a watcher has been told, for stores that can't tell a change apart by themselves.

use std::collections::BTreeMap;

use crate::watch::DeleteCause;
use crate::{Entry, Event, Key, Revision};

/// The entries a watcher knows. It turns what a store says (an entry, an absence, a whole new listing) into the events
/// that are still to be told: none twice, none older than one that was told, a delete for each key that is gone (W2, W3).
#[derive(Debug, Default)]
pub struct Picture {
    entries: BTreeMap<Key, Entry>,
}

impl Picture {
    /// The store holds this entry. Nothing is told if the watcher knows it, or a newer one; a key that was deleted and
    /// made anew behind the watcher's back is told as both.
    pub fn put(&mut self, entry: Entry) -> Vec<Event> {
        match self.entries.insert(entry.key.clone(), entry.clone()) {
            Some(known) if known.mod_revision >= entry.mod_revision => {
                self.entries.insert(known.key.clone(), known);
                Vec::new()
            }
            Some(known) if known.create_revision == entry.create_revision => vec![Event::Updated(entry)],
            Some(last) => {
                let revision = entry.create_revision;
                vec![
                    Event::Deleted {
                        last,
                        revision,
                        cause: DeleteCause::Unknown,
                    },
                    Event::Created(entry),
                ]
            }
            None => vec![Event::Created(entry)],
        }
    }

    /// The store holds nothing there as of `revision`. `None` if the watcher knows of nothing older.
    pub fn delete(&mut self, key: &Key, revision: Revision, cause: DeleteCause) -> Option<Event> {
        if self.entries.get(key)?.mod_revision > revision {
            return None;
        }
        let last = self.entries.remove(key)?;
        Some(Event::Deleted { last, revision, cause })
    }

    /// The store holds exactly these entries as of `revision`. What is known and newer is left alone.
    pub fn replace(&mut self, entries: Vec<Entry>, revision: Revision) -> Vec<Event> {
        let present: std::collections::HashSet<_> = entries.iter().map(|e| e.key.clone()).collect();
        let gone: Vec<_> = self
            .entries
            .keys()
            .filter(|&key| !present.contains(key))
            .cloned()
            .collect();
        let deletes = gone
            .iter()
            .filter_map(|key| self.delete(key, revision, DeleteCause::Unknown))
            .collect::<Vec<_>>();
        let mut puts: Vec<_> = entries.into_iter().flat_map(|entry| self.put(entry)).collect();
        puts.sort_by_key(Event::revision);
        // A delete that was found by a listing carries the listing's revision, so it comes last.
        puts.into_iter().chain(deletes).collect()
    }

    /// What is known of a key.
    pub fn get(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// All that is known, by key.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }
}
