//! What a caller is told when a call did not do what it was asked.

use std::time::Duration;

use crate::{Expect, Key, KeyError, NamespaceError, Revision, SessionId};

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error beneath an [`Error`], for people and logs.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What is now true, and what may be done about it.
///
/// The text is for people; programs match on the variant.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A condition did not hold. Nothing changed; read again, then decide.
    #[error("{key} should be {expected}, but {}", found_text(*.found))]
    Conflict {
        /// The key of the condition.
        key: Key,
        /// What was demanded of it.
        expected: Expect,
        /// Its `mod_revision`, or `None` if it was absent.
        found: Option<Revision>,
    },
    /// The key's kind or owner, or its place above or below an ephemeral key, forbids the put (K6, K7). Nothing changed.
    #[error("{key} can't be put: {refusal}")]
    Refused {
        /// The key that was to be put.
        key: Key,
        /// Why not.
        refusal: Refusal,
    },
    /// The session ended, by expiry or by another's hand, and its ephemeral keys with it. The handle opens a new one by
    /// itself; what hung on the old one has to be asked for again.
    #[error("session {session} has expired")]
    SessionExpired {
        /// The session that ended.
        session: SessionId,
    },
    /// The lock or leadership is not held any more, and not by a release that was confirmed. A release of unknown outcome,
    /// followed by the end of the session, ends like this too. Nothing of another holder's was changed.
    #[error("the hold on {key} is lost")]
    HoldLost {
        /// The lock or election.
        key: Key,
    },
    /// The handle was closed. Nothing changed.
    #[error("the handle is closed")]
    Closed,
    /// The store can't be asked now, and did not carry the request out. Nothing changed; it is safe to retry.
    #[error("{backend} is unavailable")]
    Unavailable {
        /// The kind of store.
        backend: &'static str,
        /// The cause.
        source: BoxError,
    },
    /// A wait of the caller's own length ran out. Nothing changed, and nothing is left behind.
    #[error("not within {waited:?}")]
    DeadlineExceeded {
        /// How long was waited.
        waited: Duration,
    },
    /// No answer came: the write may have been applied, or may be later. Read back before retrying.
    #[error("the outcome of {operation} is unknown")]
    OutcomeUnknown {
        /// What was asked.
        operation: &'static str,
        /// Why no answer came.
        source: BoxError,
    },
    /// The fencing tokens of the namespace are exhausted: no larger one fits 63 bits. The lock is not held.
    #[error("no fencing token is left: epoch {epoch} and revision {revision} make more than 9223372036854775807")]
    TokenOverflow {
        /// The namespace's epoch, or the one that it was to be raised to.
        epoch: u32,
        /// The revision of the store.
        revision: Revision,
    },
    /// A bad key. Nothing was sent.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A bad namespace. Nothing was sent.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Something is larger than the contract allows. Nothing was sent.
    #[error("{what} of {size} bytes is too large, at most {limit} are allowed")]
    TooLarge {
        /// What was measured.
        what: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The bound in bytes.
        limit: usize,
    },
    /// The request contradicts itself or names something that can't be. Nothing was sent.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// A setting that is wrong, unknown, or can't be met. Nothing was opened.
    #[error("{field}: {reason}")]
    Config {
        /// The setting, as the config file names it.
        field: String,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// The revision a watch was to start after is no longer kept (W4).
    #[error("revision {requested} is compacted, the oldest that can be watched from is {oldest}")]
    Compacted {
        /// The revision that was asked for.
        requested: Revision,
        /// The oldest one that is kept.
        oldest: Revision,
    },
    /// The store refused who is asking, or what they asked for. Nothing changed.
    #[error("{backend} denied access")]
    AccessDenied {
        /// The kind of store.
        backend: &'static str,
        /// The cause.
        source: BoxError,
    },
    /// This backend can't do it, which its page in the book says. Nothing changed.
    #[error("{backend} does not support {operation}")]
    Unsupported {
        /// The kind of store.
        backend: &'static str,
        /// What it can't do.
        operation: &'static str,
    },
    /// What is stored is damaged, foreign, or of another version. Nothing was changed or deleted.
    #[error("{place}: {reason}")]
    Storage {
        /// The file, table or key.
        place: String,
        /// What is wrong, and what to do.
        reason: String,
    },
}

impl Error {
    /// What is wrong, and what is beneath it, for people: `the error: its cause: the cause of that`, each said once.
    pub fn with_causes(&self) -> String {
        with_causes(self)
    }
}

/// As [`Error::with_causes`], of any error.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(beneath) = cause {
        let more = beneath.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = beneath.source();
    }
    text
}

/// Why a put is refused by name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The key holds a persistent value, and the put is ephemeral.
    #[error("it is persistent, and the put is ephemeral")]
    Persistent,
    /// The key is ephemeral, and the put is persistent.
    #[error("it is ephemeral, and the put is persistent")]
    Ephemeral,
    /// The key is ephemeral and belongs to another session.
    #[error("it belongs to session {0}")]
    OwnedBy(SessionId),
    /// The put is ephemeral, and there are keys below.
    #[error("an ephemeral key is a leaf, and there are keys below it")]
    HasChildren,
    /// A key above is ephemeral.
    #[error("{0} above it is ephemeral, which is a leaf")]
    BelowEphemeral(Key),
}

fn found_text(found: Option<Revision>) -> String {
    match found {
        Some(revision) => format!("is at revision {revision}"),
        None => "is absent".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Cause {
        text: &'static str,
        source: Option<Box<Self>>,
    }

    #[test]
    fn causes_are_said_in_their_order_and_once() {
        let cause = |text, source: Option<Cause>| Cause {
            text,
            source: source.map(Box::new),
        };
        let told_already = cause("a: no answer", Some(cause("no answer", None)));
        let error = Error::Unavailable {
            backend: "raft",
            source: cause("nobody leads", Some(told_already)).into(),
        };
        assert_eq!(error.with_causes(), "raft is unavailable: nobody leads: a: no answer");
        assert_eq!(Error::Closed.with_causes(), "the handle is closed");
    }
}
