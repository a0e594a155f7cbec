//! Clean-up, retried.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::{Error, Registry, Result, SessionId};

const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// A put that was in flight when the session ended may still land, under the next session.
const AFTER_THE_END: Duration = Duration::from_secs(60);

/// Which errors of a clean-up are retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Retry {
    /// Those of a store that can't be reached. The caller waits, and is given any other error.
    Outages,
    /// All of them: nobody waits.
    Everything,
}

/// Retries `attempt` until it succeeds, the handle is closed, or a minute has passed since the session ended, which
/// deletes the session's keys. This is the rule of curator#1193 and kazoo#732.
///
/// # Errors
/// That of the last attempt.
pub(super) async fn until_done<T, F>(
    registry: &dyn Registry,
    session: SessionId,
    retry: Retry,
    mut attempt: impl FnMut() -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut backoff = Backoff::default();
    let mut give_up = None;
    loop {
        let error = match attempt().await {
            Ok(done) => return Ok(done),
            Err(error @ Error::Closed) => return Err(error),
            Err(error) => error,
        };
        let outage = matches!(error, Error::Unavailable { .. } | Error::OutcomeUnknown { .. });
        if !outage && retry == Retry::Outages {
            return Err(error);
        }
        if !registry.session().is_valid(session)
            && *give_up.get_or_insert_with(|| Instant::now() + AFTER_THE_END) < Instant::now()
        {
            return Err(error);
        }
        tracing::debug!(%session, %error, "a clean-up failed, retrying");
        backoff.wait().await;
    }
}

/// Waits that double, from 10 ms to 1 s, each by up to half as much again, so that many clients that failed together do
/// not retry together.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(MIN_BACKOFF)
    }
}

impl Backoff {
    pub(super) async fn wait(&mut self) {
        // Two random bytes of an id are enough.
        let id = Uuid::new_v4();
        let jitter = f64::from(u16::from_le_bytes([id.as_bytes()[0], id.as_bytes()[1]])) / f64::from(u16::MAX) / 2.0;
        tokio::time::sleep(self.0.mul_f64(1.0 + jitter)).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}
