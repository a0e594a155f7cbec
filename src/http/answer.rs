//! What is answered when there is nothing better: why not.

use std::collections::HashMap;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, Uri, header};
use registry_api::{Error, Key, KeyError, Revision};
use serde_json::Value;

/// A request that was not carried out: a status, a word for programs, and a text for people.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    body: Value,
    header: Option<(header::HeaderName, HeaderValue)>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, error: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            body: serde_json::json!({ "error": error, "message": message.into() }),
            header: None,
        }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    pub(super) fn method(allowed: &'static str) -> Self {
        Self {
            header: Some((header::ALLOW, HeaderValue::from_static(allowed))),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request",
                format!("only {allowed} here"),
            )
        }
    }

    pub(super) fn unauthorized() -> Self {
        Self {
            header: Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "send the token of the group: Authorization: Bearer ...",
            )
        }
    }

    pub(super) fn response(self) -> Response<Body> {
        let mut response = json(self.status, &self.body);
        if let Some((name, value)) = self.header {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let (status, word) = match &error {
            Error::Conflict { .. } => (StatusCode::PRECONDITION_FAILED, "conflict"),
            Error::Refused { .. } => (StatusCode::CONFLICT, "refused"),
            Error::Key(_) | Error::Namespace(_) | Error::InvalidRequest(_) | Error::Config { .. } => {
                (StatusCode::BAD_REQUEST, "invalid_request")
            }
            Error::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Error::Compacted { .. } => (StatusCode::GONE, "compacted"),
            Error::AccessDenied { .. } => (StatusCode::FORBIDDEN, "access_denied"),
            Error::Unavailable { .. }
            | Error::DeadlineExceeded { .. }
            | Error::Closed
            | Error::SessionExpired { .. } => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Error::OutcomeUnknown { .. } => (StatusCode::GATEWAY_TIMEOUT, "outcome_unknown"),
            Error::Unsupported { .. } => (StatusCode::NOT_IMPLEMENTED, "unsupported"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        let mut refusal = Self::new(status, word, error.with_causes());
        if let Error::Conflict { found, .. } = &error {
            refusal.body["found"] = serde_json::json!(found.map(|revision| revision.0));
        }
        refusal
    }
}

impl From<KeyError> for Refusal {
    fn from(error: KeyError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// An answer for programs.
pub(super) fn json(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(format!("{body}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The revision as an entity tag.
pub(super) fn etag(revision: Revision) -> HeaderValue {
    HeaderValue::try_from(format!("\"{revision}\"")).expect("digits and quotes are a header")
}

/// The key of a path, percent-encoded or not.
pub(super) fn key(path: &str) -> Result<Key, Refusal> {
    Ok(Key::parse(&decoded(path)?)?)
}

pub(super) fn decoded(text: &str) -> Result<String, Refusal> {
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    let decoded = decoded.map_err(|_| Refusal::invalid("the path is no UTF-8"))?;
    Ok(decoded.into_owned())
}

/// What stands behind the `?`, each name one of those known.
pub(super) fn query(uri: &Uri, known: &[&str]) -> Result<HashMap<String, String>, Refusal> {
    let mut query = HashMap::new();
    for pair in uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !known.contains(&name) {
            let message = format!("unknown parameter {name:?}; known here: {}", known.join(", "));
            return Err(Refusal::invalid(message));
        }
        if query.insert(name.to_owned(), decoded(value)?).is_some() {
            return Err(Refusal::invalid(format!("{name} is given twice")));
        }
    }
    Ok(query)
}

/// `?name`, which is also `?name=true`.
pub(super) fn flag(query: &HashMap<String, String>, name: &str) -> Result<bool, Refusal> {
    match query.get(name).map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("" | "true") => Ok(true),
        Some(_) => Err(Refusal::invalid(format!("{name} is true or false"))),
    }
}
