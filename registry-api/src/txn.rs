//! Writes: conditions, then puts and deletes, wholly or not at all.

use std::collections::HashSet;
use std::fmt;

use bytes::Bytes;

use crate::{Error, Key, MAX_VALUE, Prefix, Result, Revision};

/// The most operations of one transaction, and the most conditions.
pub const MAX_OPERATIONS: usize = 64;
/// The most bytes of one transaction, keys and values together.
pub const MAX_TXN: usize = 900_000;

/// A transaction: if every condition holds, every operation happens, at one revision; otherwise nothing does (R3).
///
/// Conditions and the refusals of K6 and K7 are judged on the state before the transaction. One put alone is a
/// transaction too: it is the only way to write.
///
/// ```
/// # use registry_api::{Key, Txn, Expect, Revision};
/// let (config, lock) = (Key::parse("/config")?, Key::parse("/config/lock")?);
/// let txn = Txn::new().when(&config, Expect::ModRevision(Revision(7))).put(&config, "v2").delete(&lock);
/// # Ok::<(), registry_api::KeyError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// What must hold, at most [`MAX_OPERATIONS`].
    pub conditions: Vec<Condition>,
    /// What then happens, 1 to [`MAX_OPERATIONS`], no key twice.
    pub operations: Vec<Operation>,
}

impl Txn {
    /// An empty transaction.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(self, key: &Key, expect: Expect) -> Self {
        self.require(Condition {
            key: key.clone(),
            expect,
        })
    }

    /// Adds a condition that somebody else made, such as a lock's ([`crate::Held::condition`]).
    #[must_use]
    pub fn require(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Adds a put of a persistent key.
    #[must_use]
    pub fn put(self, key: &Key, value: impl Into<Bytes>) -> Self {
        self.put_as(key, value, Kind::Persistent, Existing::Keep)
    }

    /// Adds a put of a key that ends with the handle's session.
    #[must_use]
    pub fn put_ephemeral(self, key: &Key, value: impl Into<Bytes>) -> Self {
        self.put_as(key, value, Kind::Ephemeral, Existing::Keep)
    }

    /// Adds a put, all told.
    #[must_use]
    pub fn put_as(mut self, key: &Key, value: impl Into<Bytes>, kind: Kind, existing: Existing) -> Self {
        self.operations.push(Operation::Put {
            key: key.clone(),
            value: value.into(),
            kind,
            existing,
        });
        self
    }

    /// Adds a delete of one key; what is below it stays.
    #[must_use]
    pub fn delete(mut self, key: &Key) -> Self {
        self.operations.push(Operation::Delete { key: key.clone() });
        self
    }

    /// Whether an operation makes or changes an ephemeral key, which takes a live session.
    pub fn needs_session(&self) -> bool {
        self.operations.iter().any(|o| {
            matches!(
                o,
                Operation::Put {
                    kind: Kind::Ephemeral,
                    ..
                }
            )
        })
    }

    /// Checks the bounds. Every backend calls it before anything is sent.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a value or the whole; [`Error::InvalidRequest`] for no operation, too many, a key written
    /// twice, or a put below an ephemeral put of the same transaction.
    pub fn check(&self) -> Result<()> {
        let invalid = |reason: String| Err(Error::InvalidRequest(reason));
        if self.operations.is_empty() {
            return invalid("a transaction needs an operation".into());
        }
        if self.operations.len() > MAX_OPERATIONS || self.conditions.len() > MAX_OPERATIONS {
            return invalid(format!(
                "{} conditions and {} operations, at most {MAX_OPERATIONS} of each are allowed",
                self.conditions.len(),
                self.operations.len()
            ));
        }
        let mut size = self.conditions.iter().map(|c| c.key.as_str().len()).sum::<usize>();
        let mut written = HashSet::new();
        for operation in &self.operations {
            let value = operation.value().map_or(0, Bytes::len);
            if value > MAX_VALUE {
                return Err(Error::TooLarge {
                    what: "a value",
                    size: value,
                    limit: MAX_VALUE,
                });
            }
            if !written.insert(operation.key()) {
                return invalid(format!("{} is written twice", operation.key()));
            }
            size += operation.key().as_str().len() + value;
        }
        // A lone put of the largest value is allowed, whatever its key and conditions add.
        if self.operations.len() > 1 && size > MAX_TXN {
            return Err(Error::TooLarge {
                what: "a transaction",
                size,
                limit: MAX_TXN,
            });
        }
        self.check_leaves()
    }

    fn check_leaves(&self) -> Result<()> {
        let puts = || self.operations.iter().filter(|o| matches!(o, Operation::Put { .. }));
        for leaf in puts().filter(|o| {
            matches!(
                o,
                Operation::Put {
                    kind: Kind::Ephemeral,
                    ..
                }
            )
        }) {
            let prefix = Prefix::from(leaf.key());
            if let Some(below) = puts().find(|o| prefix.covers(o.key()) && o.key() != leaf.key()) {
                return Err(Error::InvalidRequest(format!(
                    "{} is below {}, which is put as ephemeral",
                    below.key(),
                    leaf.key()
                )));
            }
        }
        Ok(())
    }
}

/// What must hold of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The key.
    pub key: Key,
    /// What is demanded.
    pub expect: Expect,
}

/// What a condition demands of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key exists.
    Present,
    /// The key was last put by this change. A key deleted and made anew never passes for the old one.
    ModRevision(Revision),
    /// The key was made by this change, and is there since; it may have been put again.
    CreateRevision(Revision),
    /// No key is below this one; the key itself may exist or not.
    Childless,
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::Present => f.write_str("present"),
            Self::ModRevision(revision) => write!(f, "at revision {revision}"),
            Self::CreateRevision(revision) => write!(f, "the one created at revision {revision}"),
            Self::Childless => f.write_str("without children"),
        }
    }
}

/// One write of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Puts a value.
    Put {
        /// The key.
        key: Key,
        /// Its new value.
        value: Bytes,
        /// Whether it ends with the session.
        kind: Kind,
        /// What to do with a key of another kind or owner.
        existing: Existing,
    },
    /// Deletes a key, and nothing below it; a key that is absent is left so.
    Delete {
        /// The key.
        key: Key,
    },
}

impl Operation {
    /// The key that is written.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    /// The value that is put.
    pub fn value(&self) -> Option<&Bytes> {
        match self {
            Self::Put { value, .. } => Some(value),
            Self::Delete { .. } => None,
        }
    }
}

/// How long a key lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Until it is deleted.
    Persistent,
    /// Until it is deleted or the session of the handle that put it ends. Always a leaf (K6).
    Ephemeral,
}

/// What a put does with a key of the other kind, or of another session (K7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Existing {
    /// Refuses by name.
    Keep,
    /// Makes the key anew, with a new `create_revision`. A key of the same kind and owner is just put.
    TakeOver,
}

/// What a transaction did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The revision of the change; where nothing changed (only absent keys were deleted), one not older than the
    /// transaction's view of the store.
    pub revision: Revision,
    /// For each operation, whether it changed anything: `false` only for the delete of an absent key.
    pub changed: Vec<bool>,
}
