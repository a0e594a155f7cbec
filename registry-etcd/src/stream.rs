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
    incomplete: Incomplete,
}

impl Stream {
    pub(crate) fn new(stream: WatchStream) -> Self {
        let (requests, responses) = stream.split();
        Self {
            requests,
            responses,
            incomplete: Incomplete::default(),
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

    /// The events of each revision that a response completes.
    pub(crate) fn complete(&mut self, response: PbWatchResponse) -> Vec<(Revision, Vec<PbEvent>)> {
        self.incomplete.complete(response)
    }
}

/// The events of a revision that is still to be completed: a large response comes in fragments, cut anywhere.
#[derive(Default)]
struct Incomplete(Vec<PbEvent>);

impl Incomplete {
    fn complete(&mut self, response: PbWatchResponse) -> Vec<(Revision, Vec<PbEvent>)> {
        self.0.extend(response.events);
        let mut complete = Vec::<(Revision, Vec<PbEvent>)>::new();
        for event in self.0.drain(..) {
            let at = revision(event.kv.as_ref().map_or(0, |kv| kv.mod_revision));
            match complete.last_mut() {
                Some((last, events)) if *last == at => events.push(event),
                _ => complete.push((at, vec![event])),
            }
        }
        if response.fragment
            && let Some((_, events)) = complete.pop()
        {
            self.0 = events;
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::PbKeyValue;

    use super::*;

    fn response(fragment: bool, revisions: &[i64]) -> PbWatchResponse {
        let event = |&mod_revision| PbEvent {
            kv: Some(PbKeyValue {
                mod_revision,
                ..PbKeyValue::default()
            }),
            ..PbEvent::default()
        };
        PbWatchResponse {
            fragment,
            events: revisions.iter().map(event).collect(),
            ..PbWatchResponse::default()
        }
    }

    #[test]
    fn a_revision_that_is_cut_anywhere_comes_in_one_piece() {
        let mut incomplete = Incomplete::default();
        let mut complete = |fragment, revisions: &[i64]| {
            let complete = incomplete.complete(response(fragment, revisions));
            complete
                .into_iter()
                .map(|(at, events)| (at.0, events.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(complete(false, &[2, 2, 3]), [(2, 2), (3, 1)]);
        assert_eq!(complete(true, &[4, 5, 5]), [(4, 1)]);
        assert_eq!(complete(true, &[5]), []);
        assert_eq!(complete(true, &[5, 6]), [(5, 4)]);
        assert_eq!(complete(false, &[7]), [(6, 1), (7, 1)]);
        assert_eq!(complete(false, &[]), []);
    }
}
