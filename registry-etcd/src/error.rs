//! From the client's errors to the registry's, by code and never by text (F2).

use std::error::Error as _;

use etcd_client::Error as Client;
use registry_api::{BoxError, Error, SessionId};
use tonic::{Code, ConnectError, Status};

/// The word in [`Error`] for this kind of store.
pub(crate) const BACKEND: &str = "etcd";

/// What an error says of the request it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It never left this process.
    NotSent,
    /// It may have been carried out, or may be later.
    Unknown,
    /// There is no room. A write whose size the quota did not cover any more when it was applied was carried out, and is
    /// answered like one that was refused (etcd's `quotaApplierV3`).
    Full,
    /// The lease it names is gone; nothing happened.
    NoLease,
    /// A revision it names is compacted or not there yet, or the answer is larger than the client takes.
    OutOfRange,
    /// etcd refused who is asking; nothing happened.
    Denied,
    /// etcd refused what is asked: as a nobody where users are known, by a token older than the last change to them, or
    /// beyond a bound that was configured there. Nothing happened.
    Refused,
    /// This etcd does not know the request; nothing happened.
    Unsupported,
}

/// Reads an error.
pub(crate) fn verdict(error: &Client) -> Verdict {
    match error {
        Client::GRpcStatus(status) => verdict_of(status),
        // Made before anything is sent.
        Client::InvalidArgs(_) | Client::InvalidUri(_) | Client::InvalidMetadataValue(_) => Verdict::Refused,
        Client::EndpointError(_) | Client::EndpointsNotManaged => Verdict::NotSent,
        // The two requests whose answers the client reads itself: a keep-alive of a lease that is gone, ...
        Client::LeaseKeepAliveError(_) => Verdict::NoLease,
        // ... and a stream that ended before it began.
        Client::WatchError(_) | Client::ElectError(_) => Verdict::Unknown,
        Client::IoError(_) | Client::TransportError(_) | Client::Utf8Error(_) | Client::Internal(_) => Verdict::Unknown,
    }
}

fn verdict_of(status: &Status) -> Verdict {
    match status.code() {
        // No leader, a time-out on the way to a quorum, a connection that could not be made: one code for all.
        Code::Unavailable if never_connected(status) => Verdict::NotSent,
        Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded => {
            Verdict::Unknown
        }
        Code::Aborted | Code::DataLoss | Code::AlreadyExists | Code::FailedPrecondition | Code::Ok => Verdict::Unknown,
        // The quota is used up, or there are too many requests.
        Code::ResourceExhausted => Verdict::Full,
        Code::NotFound => Verdict::NoLease,
        Code::OutOfRange => Verdict::OutOfRange,
        Code::PermissionDenied | Code::Unauthenticated => Verdict::Denied,
        Code::InvalidArgument => Verdict::Refused,
        Code::Unimplemented => Verdict::Unsupported,
    }
}

fn never_connected(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What a failed read is to its caller: nothing it did can matter.
pub(crate) fn read(error: Client) -> Error {
    match verdict(&error) {
        Verdict::Denied | Verdict::Refused => denied(error),
        Verdict::Unsupported => unsupported("this read"),
        Verdict::NotSent | Verdict::Unknown | Verdict::Full | Verdict::NoLease | Verdict::OutOfRange => {
            unavailable(error)
        }
    }
}

/// What a failed write is to its caller. `session` is whose lease it named.
pub(crate) fn write(operation: &'static str, session: Option<SessionId>, error: Client) -> Error {
    match (verdict(&error), session) {
        (Verdict::NoLease, Some(session)) => Error::SessionExpired { session },
        (Verdict::Denied | Verdict::Refused, _) => denied(error),
        (Verdict::Unsupported, _) => unsupported(operation),
        (Verdict::NotSent, _) => unavailable(error),
        (Verdict::Unknown | Verdict::Full | Verdict::NoLease | Verdict::OutOfRange, _) => unknown(operation, error),
    }
}

/// A write that etcd refuses by one of its own bounds; nothing happened.
pub(crate) fn out_of_bounds(operation: &'static str, endpoint: &str, error: &Client) -> Error {
    Error::InvalidRequest(format!(
        "{endpoint} refuses {operation} by one of its own bounds, --max-request-bytes or --max-txn-ops, of which the \
         registry needs the defaults: {error}"
    ))
}

/// Whether an error is etcd's failed precondition: it knows no users, or it is a learner.
pub(crate) fn is_precondition(error: &Error) -> bool {
    let Error::AccessDenied { source, .. } = error else {
        return false;
    };
    matches!(source.downcast_ref(), Some(Client::GRpcStatus(status)) if status.code() == Code::FailedPrecondition)
}

/// What a failed request for a token is.
pub(crate) fn authenticate(error: Client) -> Error {
    match &error {
        // Where authentication is off, nobody gets a token.
        Client::GRpcStatus(status) if status.code() == Code::FailedPrecondition => denied(error),
        _ => read(error),
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

pub(crate) fn denied(source: impl Into<BoxError>) -> Error {
    Error::AccessDenied {
        backend: BACKEND,
        source: source.into(),
    }
}

fn unsupported(operation: &'static str) -> Error {
    Error::Unsupported {
        backend: BACKEND,
        operation,
    }
}

/// Why no answer is to be had, where no error of the client says it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("no endpoint answers: {0}")]
    NoEndpoint(String),
    #[error("{endpoint} answers, but no session can be opened: {cause}")]
    NoSession { endpoint: String, cause: String },
    #[error("no answer from {endpoint} in time")]
    Silent { endpoint: String },
    #[error("the leader changed while the keep-alive was confirmed")]
    LeaderChanged,
    #[error("the stream has ended")]
    StreamEnded,
    #[error("the runtime of the handle has stopped")]
    Stopped,
    #[error("others change the same keys faster than this request can look at them")]
    Contended,
}
