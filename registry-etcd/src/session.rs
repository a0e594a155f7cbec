//! Sessions are leases.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{LeaseKeepAliveStream, LeaseKeeper};
use registry_api::{Error, Grant, Options, Result, SessionId, SessionStore};
use tokio::time::Instant;

use crate::error::{self, Trouble};
use crate::link::Link;
use crate::names;

/// What etcd grants, in words.
const BOUNDS: &str = "etcd grants whole seconds, and no less than 1.5 times its election timeout: 2 s as shipped";

/// Leases, over a connection of their own that lives on the session thread.
pub(crate) struct Leases {
    link: Link,
    options: Options,
    beat: Mutex<Option<Beat>>,
    /// The last keep-alive was not answered, so its stream and its member are not trusted with the next.
    unanswered: AtomicBool,
}

/// The stream on which the last keep-alive was answered.
struct Beat {
    session: SessionId,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl Leases {
    pub(crate) fn new(link: Link, options: Options) -> Self {
        Self {
            link,
            options,
            beat: Mutex::default(),
            unanswered: AtomicBool::new(false),
        }
    }

    fn beat(&self) -> MutexGuard<'_, Option<Beat>> {
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.options.request_timeout
    }

    /// A keep-alive on a new stream.
    async fn first_beat(&self, session: SessionId) -> Result<Beat> {
        let member = self.link.member(self.deadline()).await?;
        let opened = member.client.lease_client().keep_alive(names::lease(session)).await;
        let (keeper, answers) = opened.map_err(|error| keep_alive_error(session, error))?;
        Ok(Beat {
            session,
            keeper,
            answers,
        })
    }
}

impl Beat {
    async fn again(&mut self) -> Result<()> {
        // That the stream is closed says nothing of the lease.
        self.keeper.keep_alive().await.map_err(error::unavailable)?;
        match self.answers.message().await {
            Ok(Some(answer)) if answer.ttl() > 0 => Ok(()),
            Ok(Some(_)) => Err(Error::SessionExpired { session: self.session }),
            Ok(None) => Err(error::unavailable(Trouble::StreamEnded)),
            Err(error) => Err(keep_alive_error(self.session, error)),
        }
    }
}

fn keep_alive_error(session: SessionId, error: etcd_client::Error) -> Error {
    error::write("a keep-alive", Some(session), error)
}

#[async_trait]
impl SessionStore for Leases {
    async fn open(&self) -> Result<Grant> {
        let asked = self.options.session_ttl.get();
        let seconds = asked.as_secs() + u64::from(asked.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let deadline = Instant::now() + self.options.connect_timeout;
        let granted = self
            .link
            .write(deadline, "opening a session", None, |member| async move {
                member.client.lease_client().grant(seconds, None).await
            });
        let granted = match granted.await {
            // A lease that was granted unseen is kept alive by nobody.
            Err(Error::OutcomeUnknown { source, .. }) => return Err(error::unavailable(source)),
            granted => granted?,
        };
        let session = SessionId(granted.id().cast_unsigned());
        let granted = Duration::from_secs(granted.ttl().unsigned_abs());
        match self.options.accept_ttl(granted, BOUNDS) {
            Ok(ttl) => {
                self.unanswered.store(false, Ordering::Release);
                Ok(Grant {
                    session,
                    ttl,
                    // The leader counts the TTL from the moment it takes a keep-alive, which is after its sending, and
                    // in its monotonic time.
                    margin: Duration::ZERO,
                })
            }
            Err(refused) => {
                // Not worth waiting out: kept alive by nobody, it ends by itself.
                let _ = self.close(session).await;
                Err(refused)
            }
        }
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        if self.unanswered.swap(true, Ordering::AcqRel) {
            self.link.suspect();
        }
        // Taken out while it is used: an answer that comes after this call was given up must not be taken for that to
        // a later keep-alive.
        let beat = self.beat().take().filter(|beat| beat.session == session);
        let beat = match beat {
            Some(mut beat) => {
                beat.again().await?;
                beat
            }
            None => self.first_beat(session).await?,
        };
        *self.beat() = Some(beat);
        self.unanswered.store(false, Ordering::Release);
        Ok(())
    }

    async fn close(&self, session: SessionId) -> Result<()> {
        let lease = names::lease(session);
        let revoked = self.link.write(
            self.deadline(),
            "closing a session",
            Some(session),
            |member| async move { member.client.lease_client().revoke(lease).await },
        );
        match revoked.await {
            Ok(_) | Err(Error::SessionExpired { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
