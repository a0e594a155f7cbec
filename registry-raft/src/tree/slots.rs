//! The slots of a node in order of their keys, found without a look at most of them.
//!
//! A key lies elsewhere in memory, and a look at it costs a cache miss. What all keys of a node share is left out, and
//! the eight bytes that follow it are kept here, as one number a slot ("poor man's normalized keys" of Graefe and Larson,
//! "B-tree indexes and CPU caches", 2001): they tell most keys apart.

use std::cmp::Ordering;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// What lies in a slot.
pub(super) trait Keyed {
    fn key(&self) -> &Arc<str>;
}

#[derive(Clone, Debug)]
pub(super) struct Slots<T> {
    items: Vec<T>,
    /// Of each item the eight bytes of its key after what all share, or as many as there are and then zeros.
    hints: Vec<u64>,
    /// How many bytes all keys share, at least, and one that begins with them.
    shared: usize,
    like: Arc<str>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            hints: Vec::new(),
            shared: 0,
            like: Arc::default(),
        }
    }
}

impl<T> Deref for Slots<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items
    }
}

/// Whoever changes a key that way says so by [`Slots::rekeyed`].
impl<T> DerefMut for Slots<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items
    }
}

impl<T: Keyed> Slots<T> {
    /// Of items in order.
    pub(super) fn of(items: Vec<T>) -> Self {
        let mut slots = Self {
            hints: Vec::with_capacity(items.len()),
            items,
            ..Self::default()
        };
        slots.look();
        slots
    }

    /// Where that key is, or where it would be.
    pub(super) fn find(&self, key: &str) -> Result<usize, usize> {
        let begins = &key.as_bytes()[..key.len().min(self.shared)];
        match begins.cmp(self.all_begin()) {
            Ordering::Less => return Err(0),
            Ordering::Greater => return Err(self.items.len()),
            Ordering::Equal => {}
        }
        let hint = hint(key, self.shared);
        let from = self.hints.partition_point(|other| *other < hint);
        let alike = self.hints[from..].partition_point(|other| *other == hint);
        // Of a key that ends within its hint nothing is left to compare but how long it is.
        let told = key.len() <= self.shared + size_of::<u64>();
        let compare = |item: &T| match told && item.key().len() == key.len() {
            true => Ordering::Equal,
            false => (**item.key()).cmp(key),
        };
        let found = self.items[from..from + alike].binary_search_by(compare);
        found.map(|at| from + at).map_err(|at| from + at)
    }

    pub(super) fn insert(&mut self, at: usize, item: T) {
        self.items.insert(at, item);
        self.hints.insert(at, 0);
        self.rekeyed(at);
    }

    /// The key of that slot is another than before, in the same place of the order.
    pub(super) fn rekeyed(&mut self, at: usize) {
        let key = self.items[at].key();
        if self.items.len() > 1 && key.as_bytes().starts_with(self.all_begin()) {
            self.hints[at] = hint(key, self.shared);
        } else {
            self.look();
        }
    }

    pub(super) fn remove(&mut self, at: usize) -> T {
        self.hints.remove(at);
        self.items.remove(at)
    }

    /// Takes out the items from there on.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        let right = Self::of(self.items.split_off(at));
        self.look();
        right
    }

    /// Adds items that follow all there are.
    pub(super) fn extend(&mut self, more: &[T])
    where
        T: Clone,
    {
        self.items.extend_from_slice(more);
        self.look();
    }

    fn all_begin(&self) -> &[u8] {
        &self.like.as_bytes()[..self.shared]
    }

    /// Looks at all keys.
    fn look(&mut self) {
        self.like = self.items.first().map(|first| first.key().clone()).unwrap_or_default();
        // In order, all between two keys share what these do.
        self.shared = match &self.items[..] {
            [first, .., last] => {
                let both = first.key().bytes().zip(last.key().bytes());
                both.take_while(|(one, other)| one == other).count()
            }
            [only] => only.key().len(),
            [] => 0,
        };
        self.hints.clear();
        self.hints
            .extend(self.items.iter().map(|item| hint(item.key(), self.shared)));
    }
}

/// Among keys that share so many bytes, a larger one's is not smaller.
fn hint(key: &str, shared: usize) -> u64 {
    let rest = &key.as_bytes()[shared..];
    match rest.first_chunk() {
        Some(eight) => u64::from_be_bytes(*eight),
        None => {
            let mut eight = [0; 8];
            eight[..rest.len()].copy_from_slice(rest);
            u64::from_be_bytes(eight)
        }
    }
}
