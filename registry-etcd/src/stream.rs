//! One stream of etcd's watch.

use std::time::Duration;

use etcd_client::proto::{PbEvent, PbWatchResponse};
use etcd_client::{WatchRequestSender, WatchResponseStream, WatchStream};
use registry_api::Revision;
use tokio::time::timeout;

use crate::names::revision;

/// How long a stream may be quiet before it is asked for a sign of life.
const QUIET: Duration = Duration::from_secs(3);

/// One stream of etcd's watch.
pub(crate) struct Stream {
    requests: WatchRequestSender,
    responses: WatchResponseStream,
    /// The events of a revision that is still to be completed.
    incomplete: Vec<PbEvent>,
}

impl Stream {
    pub(crate) fn new(stream: WatchStream) -> Self {
        let (requests, responses) = stream.split();
        Self {
            requests,
            responses,
            incomplete: Vec::new(),
        }
    }

    /// The next response; `None` when the stream is broken, or gives no sign of life when asked for one.
    pub(crate) async fn next(&mut self, patience: Duration) -> Option<PbWatchResponse> {
        let answer = match timeout(QUIET, self.responses.message()).await {
            Ok(answer) => answer,
            Err(_) => {
                self.requests.request_progress().await.ok()?;
                timeout(patience, self.responses.message()).await.ok()?
            }
        };
        match answer {
            Ok(response) => response.map(|response| response.0),
            Err(error) => {
                tracing::debug!(%error, "a watch broke off");
                None
            }
        }
    }

    /// The events of each revision that is complete. A large response comes in fragments, cut anywhere.
    pub(crate) fn complete(&mut self, response: PbWatchResponse) -> Vec<(Revision, Vec<PbEvent>)> {
        self.incomplete.extend(response.events);
        let mut complete = Vec::<(Revision, Vec<PbEvent>)>::new();
        for event in self.incomplete.drain(..) {
            let at = revision(event.kv.as_ref().map_or(0, |kv| kv.mod_revision));
            match complete.last_mut() {
                Some((last, events)) if *last == at => events.push(event),
                _ => complete.push((at, vec![event])),
            }
        }
        if response.fragment
            && let Some((_, events)) = complete.pop()
        {
            self.incomplete = events;
        }
        complete
    }
}
