//! `/v1/kv/...`: a key, or with a slash at the end what is at and below it.

use std::sync::Arc;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use registry_api::{Depth, Expect, Key, List, MAX_VALUE, Prefix, Read, Registry, Revision};
use serde_json::json;

use super::answer::{self, Refusal, etag, flag, key, query};
use super::{GRACE, PATIENCE};
use crate::json as as_json;

/// How many entries a page has when nothing is said, and at most.
const PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

pub(super) async fn answer(
    registry: &Arc<dyn Registry>,
    name: &str,
    head: &Parts,
    body: &mut Body,
) -> Result<Response<Body>, Refusal> {
    if let Some(prefix) = name.strip_suffix('/') {
        return match head.method {
            Method::GET | Method::HEAD => list(registry, prefix, head).await,
            _ => Err(Refusal::method("GET, HEAD")),
        };
    }
    let key = key(name)?;
    match head.method {
        Method::GET | Method::HEAD => get(registry, &key, head).await,
        Method::PUT => put(registry, &key, head, body).await,
        Method::DELETE => delete(registry, &key, head).await,
        _ => Err(Refusal::method("GET, HEAD, PUT, DELETE")),
    }
}

async fn get(registry: &Arc<dyn Registry>, key: &Key, head: &Parts) -> Result<Response<Body>, Refusal> {
    let query = query(&head.uri, &["stale"])?;
    if head.headers.contains_key(header::IF_MATCH) {
        return Err(Refusal::invalid("If-Match is for PUT and DELETE"));
    }
    let entry = registry.get(key, read(&query)?).await?.ok_or_else(|| absent(key))?;
    let mut response = Response::new(Body::empty());
    let tag = etag(entry.mod_revision);
    if is_known(&head.headers, &tag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else {
        *response.body_mut() = Body::from(entry.value);
    }
    let headers = response.headers_mut();
    headers.insert(header::ETAG, tag);
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert("registry-create-revision", entry.create_revision.0.into());
    if let Some(session) = entry.session
        && let Ok(session) = HeaderValue::try_from(session.to_string())
    {
        headers.insert("registry-session", session);
    }
    Ok(response)
}

async fn list(registry: &Arc<dyn Registry>, prefix: &str, head: &Parts) -> Result<Response<Body>, Refusal> {
    let query = query(&head.uri, &["stale", "limit", "after", "children"])?;
    let prefix = match prefix {
        "" => Prefix::root(),
        name => key(name)?.into(),
    };
    let mut list = List::new(prefix);
    list.read = read(&query)?;
    list.limit = match query.get("limit").map(|limit| limit.parse()) {
        None => PAGE,
        Some(Ok(limit)) if (1..=MAX_PAGE).contains(&limit) => limit,
        Some(_) => return Err(Refusal::invalid(format!("limit is 1 to {MAX_PAGE}"))),
    };
    list.after = query.get("after").map(|after| Key::parse(after)).transpose()?;
    if flag(&query, "children")? {
        list.depth = Depth::Children;
    }
    let page = registry.list(list).await?;
    let body = json!({
        "entries": page.entries.iter().map(as_json::entry).collect::<Vec<_>>(),
        "next": page.next.as_ref().map(Key::as_str),
        "revision": page.revision.0,
    });
    Ok(answer::json(StatusCode::OK, &body))
}

async fn put(
    registry: &Arc<dyn Registry>,
    key: &Key,
    head: &Parts,
    body: &mut Body,
) -> Result<Response<Body>, Refusal> {
    query(&head.uri, &[])?;
    let expect = condition(&head.headers)?;
    let value = whole(body).await?;
    let revision = match expect {
        Some(expect) => registry.put_if(key, expect, value).await?,
        None => registry.put(key, value).await?,
    };
    let mut response = answer::json(StatusCode::OK, &json!({ "revision": revision.0 }));
    response.headers_mut().insert(header::ETAG, etag(revision));
    Ok(response)
}

async fn delete(registry: &Arc<dyn Registry>, key: &Key, head: &Parts) -> Result<Response<Body>, Refusal> {
    query(&head.uri, &[])?;
    let was_there = match condition(&head.headers)? {
        Some(expect) => registry.delete_if(key, expect).await?,
        None => registry.delete(key).await?,
    };
    match was_there {
        true => Ok(answer::json(StatusCode::OK, &json!({ "deleted": true }))),
        false => Err(absent(key)),
    }
}

/// Whether `If-None-Match` says that the reader has what bears this tag: a list of tags, weak ones also, or `*` (RFC 9110,
/// section 13.1.2).
fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let lists = headers.get_all(header::IF_NONE_MATCH).iter();
    let mut known = lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','));
    known.any(|known| {
        let known = known.trim();
        known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag
    })
}

/// What `If-Match` and `If-None-Match` demand of a write.
fn condition(headers: &HeaderMap) -> Result<Option<Expect>, Refusal> {
    let wrong = |name: &str, allowed: &str| Refusal::invalid(format!("{name} is {allowed} here"));
    match (headers.get(header::IF_MATCH), headers.get(header::IF_NONE_MATCH)) {
        (None, None) => Ok(None),
        (Some(tag), None) if tag == "*" => Ok(Some(Expect::Present)),
        (Some(tag), None) => {
            let tag = tag
                .to_str()
                .ok()
                .and_then(|tag| tag.strip_prefix('"')?.strip_suffix('"'));
            let revision = tag.and_then(|revision| revision.parse().ok());
            let revision = revision.ok_or_else(|| wrong("If-Match", "an ETag such as \"7\", or *"))?;
            Ok(Some(Expect::ModRevision(Revision(revision))))
        }
        (None, Some(tag)) if tag == "*" => Ok(Some(Expect::Absent)),
        (None, Some(_)) => Err(wrong("If-None-Match", "*")),
        (Some(_), Some(_)) => Err(Refusal::invalid("If-Match and If-None-Match contradict each other")),
    }
}

/// The body, which has to come in time and be no larger than a value.
async fn whole(body: &mut Body) -> Result<Bytes, Refusal> {
    let too_large = || {
        let message = format!("a value has {MAX_VALUE} bytes at most");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    };
    match tokio::time::timeout(PATIENCE, Limited::new(body, MAX_VALUE).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Refusal::invalid(format!("the body did not come whole: {error}"))),
        Err(_) => {
            let message = format!("the body did not come within {PATIENCE:?}");
            Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "unavailable", message))
        }
    }
}

/// Reads what is left of a body that the answer does not need, within bounds: an answer that overtakes the request may be
/// lost with the rest of it.
pub(super) async fn let_go(body: &mut Body) {
    let rest = async {
        let mut bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > MAX_VALUE {
                break;
            }
        }
    };
    // Who sends no more is answered all the same.
    let _ = tokio::time::timeout(GRACE, rest).await;
}

fn read(query: &std::collections::HashMap<String, String>) -> Result<Read, Refusal> {
    Ok(match flag(query, "stale")? {
        true => Read::Stale,
        false => Read::Linearizable,
    })
}

fn absent(key: &Key) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "not_found", format!("{key} is absent"))
}
