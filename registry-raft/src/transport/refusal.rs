//! Why there is no connection, and what an error of the transport is to a caller.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use registry_api::Error;
use rustls::AlertDescription;

use crate::link::BACKEND;

/// Why a member was not reached, or not spoken to.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("{0}")]
    Unreachable(io::Error),
    #[error("the connection was not taken within {0:?}")]
    Silent(Duration),
    #[error("its certificate is not to be trusted: {0}")]
    Untrusted(rustls::CertificateError),
    #[error("it does not speak TLS, which registry.raft.tls asks for")]
    Plain,
    #[error("it refused the certificate of this side: {}", alert_text(*.0))]
    Denied(AlertDescription),
    #[error("TLS failed: {0}")]
    Tls(rustls::Error),
    #[error("it ended the connection")]
    Ended,
}

impl From<rustls::Error> for Refusal {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(why) => Self::Untrusted(why),
            rustls::Error::InvalidMessage(_) => Self::Plain,
            rustls::Error::AlertReceived(alert) if is_denial(alert) => Self::Denied(alert),
            other => Self::Tls(other),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.downcast::<rustls::Error>() {
            Ok(error) => error.into(),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Self::Ended,
            Err(error) => Self::Unreachable(error),
        }
    }
}

/// Whether the alert is about the certificate that was presented, or its absence.
fn is_denial(alert: AlertDescription) -> bool {
    use AlertDescription as Alert;
    matches!(
        alert,
        Alert::NoCertificate
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError
            | Alert::CertificateRequired
    )
}

fn alert_text(alert: AlertDescription) -> String {
    use AlertDescription as Alert;
    match alert {
        Alert::UnknownCA => "an authority signed it that is not in registry.raft.tls.ca there".into(),
        Alert::CertificateExpired => "it has expired, or is not valid yet".into(),
        Alert::DecryptError => "its signature is not that of an authority in registry.raft.tls.ca there".into(),
        Alert::CertificateRequired | Alert::NoCertificate => "none was presented".into(),
        Alert::UnsupportedCertificate => "it is not for clients (its extended key usage)".into(),
        alert => format!("{alert:?}"),
    }
}

/// What a failure to connect is to a caller.
pub(super) fn connect_error(error: &tonic::transport::Error) -> Error {
    let refusal = causes(error).find_map(|cause| cause.downcast_ref::<Refusal>());
    let innermost = causes(error).last();
    let text = refusal.map_or_else(
        || innermost.map_or_else(|| error.to_string(), ToString::to_string),
        ToString::to_string,
    );
    match refusal {
        Some(Refusal::Denied(_)) => denied(text),
        _ => Error::Unavailable {
            backend: BACKEND,
            source: text.into(),
        },
    }
}

/// What a status is to a caller: the transport's, or the server's refusal of a request that it did not look at.
pub(crate) fn status_error(status: tonic::Status) -> Error {
    use tonic::Code;
    let again = causes(&status).find_map(|cause| cause.downcast_ref::<Refusal>());
    if let Some(refusal) = again {
        // The connection had broken, and could not be made anew: the request was not sent.
        let source = refusal.to_string().into();
        return Error::Unavailable {
            backend: BACKEND,
            source,
        };
    }
    let code = causes(&status).find_map(|cause| cause.downcast_ref::<h2::Error>()?.reason());
    match status.code() {
        Code::PermissionDenied if code == Some(h2::Reason::INADEQUATE_SECURITY) => {
            denied("it speaks TLS only: set registry.raft.tls".into())
        }
        Code::Unauthenticated | Code::PermissionDenied => denied(status.message().to_owned()),
        // The other side does not know the method, so nothing was read.
        Code::Unimplemented => Error::InvalidRequest(status.message().into()),
        // Everything else may have come after the request was read. A message that is too large to be encoded or decoded
        // (OUT_OF_RANGE) ends the stream with all that is in flight on it, writes that were carried out included.
        _ => {
            let beneath = causes(&status).skip(1).last().map(ToString::to_string);
            Error::OutcomeUnknown {
                operation: "a request",
                source: beneath.unwrap_or_else(|| status.message().to_owned()).into(),
            }
        }
    }
}

fn denied(why: String) -> Error {
    Error::AccessDenied {
        backend: BACKEND,
        source: why.into(),
    }
}

/// The error, and those beneath it.
fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}
