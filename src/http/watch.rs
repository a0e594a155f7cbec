//! `/v1/watch/...`: changes as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Response, header};
use futures_util::stream;
use registry_api::{Prefix, Registry, Revision, Watch, WatchFrom, WatchItem, WatchRequest, WatchScope};
use serde_json::json;

use super::answer::{Refusal, flag, key, query};
use crate::json as as_json;

/// How often a watch in which nothing happens says so, for what stands between and forgets quiet connections.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// A key; or with a slash at the end, it and all below it.
pub(super) async fn answer(registry: &Arc<dyn Registry>, name: &str, head: &Parts) -> Result<Response<Body>, Refusal> {
    let query = query(&head.uri, &["after", "reset"])?;
    let (prefix, scope) = match name.strip_suffix('/') {
        Some("") => (Prefix::root(), WatchScope::Subtree),
        Some(name) => (key(name)?.into(), WatchScope::Subtree),
        None => (key(name)?.into(), WatchScope::Key),
    };
    let reset = flag(&query, "reset")?;
    let mut watched = WatchRequest::new(prefix, scope);
    // A browser that lost its connection says by itself where it was.
    let last = head.headers.get("last-event-id").and_then(|id| id.to_str().ok());
    if let Some(after) = last.or(query.get("after").map(String::as_str)) {
        let after = after.parse().map_err(|_| Refusal::invalid("after is a revision"))?;
        watched.from = match reset {
            true => WatchFrom::AfterOrReset(Revision(after)),
            false => WatchFrom::After(Revision(after)),
        };
    }
    let watch = registry.watch(watched).await?;
    let mut response = Response::new(Body::from_stream(events(watch)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn events(watch: Watch) -> impl futures_util::Stream<Item = Result<String, Infallible>> + Send {
    stream::unfold(Some(watch), |watch| async {
        let mut watch = watch?;
        let text = match tokio::time::timeout(SIGN_OF_LIFE, watch.next()).await {
            Err(_) => ":\n\n".to_owned(),
            Ok(Some(Ok(item))) => text(&item),
            Ok(Some(Err(error))) => {
                let body = json!({ "message": error.to_string() });
                return Some((Ok(format!("event: error\ndata: {body}\n\n")), None));
            }
            Ok(None) => return None,
        };
        Some((Ok(text), Some(watch)))
    })
}

fn text(item: &WatchItem) -> String {
    match item {
        WatchItem::Reset => "event: reset\ndata: {}\n\n".to_owned(),
        WatchItem::Synced(revision) => {
            format!(
                "id: {revision}\nevent: synced\ndata: {}\n\n",
                json!({ "revision": revision.0 })
            )
        }
        WatchItem::Changes(events) => {
            let mut text = String::new();
            for event in events {
                text.push_str(&format!(
                    "event: {}\ndata: {}\n\n",
                    as_json::kind(event),
                    as_json::event(event)
                ));
            }
            text
        }
    }
}
