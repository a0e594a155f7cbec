//! From the client's errors to the registry's, by code and never by text (F2).

use registry_api::{BoxError, Error, SessionId};
use zookeeper_client::Error as Client;

/// The word in [`Error`] for this kind of store.
pub(crate) const BACKEND: &str = "zk";

/// What an error says of the request it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A node was not as the request needs it; nothing happened.
    Node,
    /// The session is over; nothing happened.
    SessionOver,
    /// Nothing happened, and it may be asked again.
    NotApplied,
    /// It may have been carried out, or may be later.
    Unknown,
    /// ZooKeeper refused who is asking; nothing happened.
    Denied,
    /// ZooKeeper refused what is asked; nothing happened.
    Invalid,
    /// This ZooKeeper does not know the request; nothing happened.
    Unsupported,
}

/// Reads an error.
pub(crate) fn verdict(error: &Client) -> Verdict {
    match error {
        Client::NoNode
        | Client::NodeExists
        | Client::NotEmpty
        | Client::BadVersion
        | Client::NoChildrenForEphemerals => Verdict::Node,
        // What is in flight when the server says so, or queued when the client does, was not carried out.
        Client::SessionExpired | Client::ClientClosed => Verdict::SessionOver,
        // The session was used elsewhere, the server has no quorum or is busy, or was not reached.
        Client::SessionMoved | Client::NotReadOnly | Client::Throttled | Client::NoHosts | Client::QuotaExceeded => {
            Verdict::NotApplied
        }
        Client::NoAuth | Client::AuthFailed | Client::InvalidAcl => Verdict::Denied,
        Client::BadArguments(_) | Client::MarshallingError => Verdict::Invalid,
        Client::Unimplemented => Verdict::Unsupported,
        Client::ConnectionLoss
        | Client::Timeout
        | Client::UnmarshalError { .. }
        | Client::UnexpectedError(_)
        | Client::UnexpectedErrorCode(_)
        | Client::NoWatcher
        | Client::ReconfigDisabled
        | Client::RuntimeInconsistent
        | Client::Custom(_) => Verdict::Unknown,
        // What a later client may add.
        _ => Verdict::Unknown,
    }
}

/// What a failed read is to its caller: nothing it did can matter.
pub(crate) fn read(error: Client) -> Error {
    match verdict(&error) {
        Verdict::Denied => denied(error),
        Verdict::Unsupported => unsupported("this read"),
        Verdict::Invalid => Error::InvalidRequest(error.to_string()),
        Verdict::Node | Verdict::SessionOver | Verdict::NotApplied | Verdict::Unknown => unavailable(error),
    }
}

/// What a failed write is to its caller. `session` is the one it was asked for, if it needs one.
pub(crate) fn write(operation: &'static str, session: Option<SessionId>, error: Client) -> Error {
    match (verdict(&error), session) {
        (Verdict::SessionOver, Some(session)) => Error::SessionExpired { session },
        (Verdict::Denied, _) => denied(error),
        (Verdict::Unsupported, _) => unsupported(operation),
        (Verdict::Invalid, _) => Error::InvalidRequest(error.to_string()),
        (Verdict::NotApplied | Verdict::SessionOver | Verdict::Node, _) => unavailable(error),
        (Verdict::Unknown, _) => Error::OutcomeUnknown {
            operation,
            source: error.into(),
        },
    }
}

pub(crate) fn unavailable(source: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: source.into(),
    }
}

pub(crate) fn unknown(operation: &'static str, source: impl Into<BoxError>) -> Error {
    Error::OutcomeUnknown {
        operation,
        source: source.into(),
    }
}

fn denied(source: Client) -> Error {
    Error::AccessDenied {
        backend: BACKEND,
        source: source.into(),
    }
}

pub(crate) fn unsupported(operation: &'static str) -> Error {
    Error::Unsupported {
        backend: BACKEND,
        operation,
    }
}

/// Why no answer is to be had, where no error of the client says it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("{0}")]
    Unreachable(String),
    #[error("not connected to any of {0}")]
    NotConnected(String),
    #[error("no answer from {0} in time")]
    Silent(String),
    #[error("others change the same keys faster than this request can look at them")]
    Contended,
}
