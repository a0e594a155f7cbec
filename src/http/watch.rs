//! `/v1/watch/...`: changes as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Response, header};
use futures_util::{Stream, stream};
use registry_api::{Event, Prefix, Registry, Revision, Watch, WatchFrom, WatchItem, WatchRequest, WatchScope};
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
    // A watch from a revision on has told everything up to each event; one that begins with the current entries has not.
    let resumed = watched.from != WatchFrom::Now;
    let watch = registry.watch(watched).await?;
    let mut response = Response::new(Body::from_stream(Events::of(watch, resumed).stream()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// A watch as server-sent events, each made when the connection takes it.
struct Events {
    /// Nothing once the watch has failed.
    watch: Option<Watch>,
    /// The rest of the last changes.
    pending: std::vec::IntoIter<Event>,
    /// The newest revision among the last changes.
    newest: Revision,
    /// Whether no change up to the last event is missing, so that a reader can go on after its revision.
    complete: bool,
}

impl Events {
    fn of(watch: Watch, complete: bool) -> Self {
        Self {
            watch: Some(watch),
            pending: Vec::new().into_iter(),
            newest: Revision(0),
            complete,
        }
    }

    fn stream(self) -> impl Stream<Item = Result<String, Infallible>> + Send {
        stream::unfold(self, |mut events| async {
            let text = events.next().await?;
            Some((Ok(text), events))
        })
    }

    async fn next(&mut self) -> Option<String> {
        if let Some(event) = self.pending.next() {
            return Some(self.change(&event));
        }
        let item = match tokio::time::timeout(SIGN_OF_LIFE, self.watch.as_mut()?.next()).await {
            Err(_) => return Some(":\n\n".to_owned()),
            Ok(item) => item?,
        };
        match item {
            Ok(WatchItem::Reset) => {
                self.complete = false;
                Some("event: reset\ndata: {}\n\n".to_owned())
            }
            Ok(WatchItem::Synced(revision)) => {
                self.complete = true;
                let body = json!({ "revision": revision.0 });
                Some(format!("id: {revision}\nevent: synced\ndata: {body}\n\n"))
            }
            Ok(WatchItem::Changes(events)) => {
                self.newest = events.iter().map(Event::revision).max().unwrap_or_default();
                self.pending = events.into_iter();
                let first = self.pending.next()?;
                Some(self.change(&first))
            }
            Err(error) => {
                self.watch = None;
                let body = json!({ "message": error.to_string() });
                Some(format!("event: error\ndata: {body}\n\n"))
            }
        }
    }

    /// An event. Only the last of its batch has an id: a transaction is one batch, and a reader that lost its connection in
    /// the middle of it has to be told all of it again.
    fn change(&self, event: &Event) -> String {
        let id = match self.complete && self.pending.len() == 0 {
            true => format!("id: {}\n", self.newest),
            false => String::new(),
        };
        format!(
            "{id}event: {}\ndata: {}\n\n",
            as_json::kind(event),
            as_json::event(event)
        )
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use registry_api::{Entry, Key, watch};

    use super::*;

    /// One text of a whole batch would be as large as all that it tells.
    #[tokio::test]
    async fn each_event_of_a_batch_is_a_text_of_its_own() {
        const EVENTS: usize = 50;
        const VALUE: usize = 10_000;
        let (feed, watch) = watch::feed();
        let created = |n: usize| {
            Event::Created(Entry {
                key: Key::parse(&format!("/k/{n}")).unwrap(),
                value: vec![b'v'; VALUE].into(),
                create_revision: Revision(1),
                mod_revision: Revision(1),
                session: None,
            })
        };
        feed.changes((0..EVENTS).map(created).collect());
        feed.synced(Revision(1));
        drop(feed);
        let texts: Vec<_> = Events::of(watch, false).stream().map(Result::unwrap).collect().await;
        assert_eq!(texts.len(), EVENTS + 1);
        let largest = texts.iter().map(String::len).max();
        assert!(largest < Some(2 * VALUE), "{largest:?}");
        assert!(texts[EVENTS].starts_with("id: 1\nevent: synced"), "{}", texts[EVENTS]);
    }
}
