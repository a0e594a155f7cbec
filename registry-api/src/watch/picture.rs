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

    /// The store holds exactly these entries as of `revision`, and is not the one that the picture is of: it was restored
    /// from a backup, or replaced. Revisions say nothing there about which entry is newer, so only an equal one is known.
    /// Each other is delivered, and a delete for each key that the store does not hold, whatever its revision.
    pub fn resync(&mut self, entries: Vec<Entry>, revision: Revision) -> Vec<Event> {
        let mut known = std::mem::take(&mut self.entries);
        let mut puts = Vec::new();
        for entry in entries {
            match known.remove(&entry.key) {
                Some(known) if known == entry => {}
                Some(known) if known.create_revision == entry.create_revision => {
                    puts.push(Event::Updated(entry.clone()));
                }
                Some(last) => {
                    puts.push(Event::Deleted {
                        last,
                        revision: entry.create_revision,
                        cause: DeleteCause::Unknown,
                    });
                    puts.push(Event::Created(entry.clone()));
                }
                None => puts.push(Event::Created(entry.clone())),
            }
            self.entries.insert(entry.key.clone(), entry);
        }
        puts.sort_by_key(Event::revision);
        let deletes = known.into_values().map(|last| Event::Deleted {
            last,
            revision,
            cause: DeleteCause::Unknown,
        });
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, created: u64, changed: u64, value: &str) -> Entry {
        Entry {
            key: Key::parse(key).expect("it is a key"),
            value: value.to_owned().into(),
            create_revision: Revision(created),
            mod_revision: Revision(changed),
            session: None,
        }
    }

    /// A store that was restored holds older entries than a watcher knows, or others under the same revisions.
    #[test]
    fn a_store_that_went_back_is_told_whole() {
        let same = entry("/same", 1, 1, "1");
        let mut picture = Picture::default();
        let known = [
            same.clone(),
            entry("/older", 2, 9, "new"),
            entry("/recreated", 8, 8, "new"),
            entry("/deleted", 7, 7, ""),
            entry("/value", 3, 3, "one"),
            entry("/modified", 4, 5, "same"),
        ];
        for entry in known.clone() {
            picture.put(entry);
        }
        let store = vec![
            same,
            entry("/older", 2, 2, "old"),
            entry("/recreated", 6, 6, "old"),
            entry("/value", 3, 3, "two"),
            entry("/modified", 4, 4, "same"),
            entry("/new", 5, 5, ""),
        ];
        let (told, mut now) = (picture.resync(store.clone(), Revision(6)), BTreeMap::new());
        let deleted = |revision: u64, at: usize| Event::Deleted {
            last: known[at].clone(),
            revision: Revision(revision),
            cause: DeleteCause::Unknown,
        };
        assert_eq!(
            told,
            [
                Event::Updated(store[1].clone()),
                Event::Updated(store[3].clone()),
                Event::Updated(store[4].clone()),
                Event::Created(store[5].clone()),
                deleted(6, 2),
                Event::Created(store[2].clone()),
                deleted(6, 3),
            ]
        );
        for entry in store {
            now.insert(entry.key.clone(), entry);
        }
        assert!(picture.entries().eq(now.values()));
    }
}
