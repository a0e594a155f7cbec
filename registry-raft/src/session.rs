//! Sessions, as a handle opens and keeps them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use registry_api::{Error, Grant, Options, Result, SessionId, SessionStore};

use crate::command::{Change, Command, Outcome, not_understood};
use crate::link::{BACKEND, Link};
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;

/// Opens, keeps and ends sessions over a link of their own. Opening and closing are entries of the log; a keep-alive is
/// none, only the Raft leader's business.
#[derive(Debug)]
pub(crate) struct Sessions {
    link: Arc<dyn Link>,
    ttl: Duration,
    patience: Duration,
}

impl Sessions {
    pub(crate) fn new(link: Arc<dyn Link>, options: &Options) -> Self {
        // A little less than the keeper waits, so that the cause is told and not only that time ran out.
        let patience = options.connect_timeout.min(options.request_timeout).mul_f64(0.9);
        Self {
            link,
            ttl: options.session_ttl.get(),
            patience,
        }
    }

    /// A change that may be asked for twice: a second session that nobody uses expires, a second close finds nothing.
    async fn change(&self, change: Change) -> Result<Outcome> {
        let until = Instant::now() + self.patience;
        let mut backoff = Duration::from_millis(5);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.link.command(Command::new(change.clone()), left).await {
                Ok(reply) => return reply.result.ok_or_else(not_understood),
                Err(Error::Unavailable { source, .. } | Error::OutcomeUnknown { source, .. }) if left <= backoff => {
                    return Err(Error::Unavailable {
                        backend: BACKEND,
                        source,
                    });
                }
                Err(Error::Unavailable { source, .. } | Error::OutcomeUnknown { source, .. }) => {
                    tracing::debug!(error = %source, "a session can't be opened or closed yet");
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_millis(200));
        }
    }
}

#[async_trait]
impl SessionStore for Sessions {
    async fn open(&self) -> Result<Grant> {
        let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        match self.change(Change::Open(proto::OpenSession { ttl_ms })).await? {
            Outcome::SessionOpened(session) => Ok(Grant {
                session: SessionId(session),
                ttl: Duration::from_millis(ttl_ms),
                margin: Duration::ZERO,
            }),
            _ => Err(not_understood()),
        }
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        match self
            .link
            .call(Call::KeepAlive(proto::KeepAlive { session: session.0 }), self.patience)
            .await?
        {
            Answer::Done(_) => Ok(()),
            _ => Err(Error::Unavailable {
                backend: BACKEND,
                source: "no answer to a keep-alive".into(),
            }),
        }
    }

    async fn close(&self, session: SessionId) -> Result<()> {
        self.change(Change::Close(proto::CloseSession { session: session.0 }))
            .await
            .map(|_| ())
    }
}
