//! What a key holds, and the number of the change that put it there.

use std::fmt;

use bytes::Bytes;

use crate::{Key, SessionId};

/// The largest value, in bytes (K2). The smallest is empty, which is a value too.
pub const MAX_VALUE: usize = 900_000;

/// The number of a change: larger than that of every change acknowledged before it began, in its namespace (R1).
///
/// Opaque and ordered; of one backend only, never compared with another's. Zero comes before every change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A key with its value, as one revision left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub key: Key,
    /// Its value, 0 to [`MAX_VALUE`] bytes.
    pub value: Bytes,
    /// The change that made the key. A key deleted and made anew has a new one, which is how the two are told apart.
    pub create_revision: Revision,
    /// The change that last put the key.
    pub mod_revision: Revision,
    /// The session the key ends with, if it is ephemeral.
    pub session: Option<SessionId>,
}
