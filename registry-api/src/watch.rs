//! Watches: the present state, then every change to it.
//!
//! A [`Watch`] is what a caller reads. A backend makes one with [`feed`], which bounds what a slow reader costs, and,
//! where its store can't tell deletes after a gap by itself, keeps a [`Picture`] of what the reader was told.

mod feed;
mod picture;

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt};

pub use feed::{Feed, feed};
pub use picture::Picture;

use crate::{Entry, Error, Key, Prefix, Result, Revision};

/// What to watch, and from when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchRequest {
    /// The key, which need not exist, or the root.
    pub prefix: Prefix,
    /// Which keys about it.
    pub scope: WatchScope,
    /// From when.
    pub from: WatchFrom,
}

impl WatchRequest {
    /// A watch of that scope which begins with the current entries.
    pub fn new(prefix: impl Into<Prefix>, scope: WatchScope) -> Self {
        Self {
            prefix: prefix.into(),
            scope,
            from: WatchFrom::Now,
        }
    }

    /// Whether a change to `key` is to be told.
    pub fn wants(&self, key: &Key) -> bool {
        match self.scope {
            WatchScope::Key => self.prefix.as_str() == key.as_str(),
            WatchScope::Children => self.prefix.child_of(key).is_some_and(|(_, itself)| itself),
            WatchScope::Subtree => self.prefix.covers(key),
        }
    }
}

/// Which keys a watch covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WatchScope {
    /// The key alone.
    Key,
    /// The direct children that hold values; not the key itself.
    Children,
    /// The key and all below it.
    Subtree,
}

/// From when a watch tells changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchFrom {
    /// The current entries first, then [`WatchItem::Synced`], then changes.
    Now,
    /// The changes after this revision; an error if it is compacted (W4).
    After(Revision),
    /// The changes after this revision; if it is compacted, [`WatchItem::Reset`] and then as [`WatchFrom::Now`].
    AfterOrReset(Revision),
}

/// What a watch tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchItem {
    /// Forget what was told: the current entries follow. Only after [`WatchFrom::AfterOrReset`].
    Reset,
    /// Changes in the order of their revisions, those of one transaction together, none of them twice.
    Changes(Vec<Event>),
    /// All that was told so far is the state at this revision, no change of a watched key up to it is missing. Comes
    /// after the current entries, after each gap that was bridged (W3), and after changes that left nothing to deliver: a
    /// key that was created and deleted before the watch could read it.
    Synced(Revision),
}

/// A change to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key is there, which was not, or was another with an older `create_revision`.
    Created(Entry),
    /// The key holds another value.
    Updated(Entry),
    /// The key is gone.
    Deleted {
        /// The key as it last was (W5).
        last: Entry,
        /// The change that deleted it; where the store can't tell, the revision at which it was seen to be gone.
        revision: Revision,
        /// Whether its session ended, or somebody deleted it.
        cause: DeleteCause,
    },
}

/// Why a key is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeleteCause {
    /// Somebody deleted it.
    Deleted,
    /// Its session expired or was closed.
    SessionEnded,
    /// The store can't tell ([`crate::Capabilities::tells_expiry`]).
    Unknown,
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &Key {
        &self.entry().key
    }

    /// The entry: as it is now, or as it last was.
    pub fn entry(&self) -> &Entry {
        match self {
            Self::Created(entry) | Self::Updated(entry) | Self::Deleted { last: entry, .. } => entry,
        }
    }

    /// The revision of the change.
    pub fn revision(&self) -> Revision {
        match self {
            Self::Created(entry) | Self::Updated(entry) => entry.mod_revision,
            Self::Deleted { revision, .. } => *revision,
        }
    }
}

/// A running watch. It goes on by itself over disconnects, restarts and changes of leader (W3).
///
/// A reader that falls behind costs bounded memory: beyond the bound, changes of a key are folded into the newest (W6).
/// Dropping the watch ends it on the server (W7). It ends by itself only with an error it delivers, or when the handle is
/// closed.
pub struct Watch {
    items: Pin<Box<dyn Stream<Item = Result<WatchItem>> + Send>>,
}

impl Watch {
    /// A watch that tells what the stream tells. For backends.
    pub fn new(items: impl Stream<Item = Result<WatchItem>> + Send + 'static) -> Self {
        Self { items: Box::pin(items) }
    }

    /// The next item; `None` when the handle was closed, and after an error.
    ///
    /// # Errors
    /// [`crate::Error::AccessDenied`], [`crate::Error::Compacted`], or what else ends a watch for good.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn next(&mut self) -> Option<Result<WatchItem>> {
        self.items.next().await
    }

    /// For a watch of one key: waits until what was created at that revision is gone; a later key may have its name.
    ///
    /// # Errors
    /// [`Error::Closed`] when the handle was closed, and what else ends a watch.
    ///
    /// # Cancel safety
    /// Dropping the future ends the watch.
    pub async fn gone(mut self, created: Revision) -> Result<()> {
        let mut there = false;
        while let Some(item) = self.next().await {
            match item? {
                WatchItem::Synced(_) if !there => return Ok(()),
                WatchItem::Synced(_) => {}
                WatchItem::Reset => there = false,
                WatchItem::Changes(events) => {
                    there = match events.last() {
                        Some(Event::Created(entry) | Event::Updated(entry)) => entry.create_revision <= created,
                        Some(Event::Deleted { .. }) | None => false,
                    };
                    if !there {
                        return Ok(());
                    }
                }
            }
        }
        Err(Error::Closed)
    }
}

impl Stream for Watch {
    type Item = Result<WatchItem>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.items.poll_next_unpin(cx)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
