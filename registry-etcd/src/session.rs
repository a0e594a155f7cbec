//! Sessions are leases.
//!
//! A keep-alive counts only if the leader of the cluster took it. Before 3.4.31 and 3.5.13 a member that was deposed, and
//! has not noticed, renews a lease from its own memory, and later versions do so within a heartbeat of a pause; the leader
//! knows nothing of it and expires the lease. So each keep-alive is confirmed by a linearizable read at the same member.
//! The term in a response is that of the last entry the member has applied. If it is the same before the keep-alive and
//! in the read after it, then a quorum stood by the leader of that term after the keep-alive was answered: nobody led in a
//! later term before, and the member, which had applied an entry of that term, had taken part in no earlier one any more.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{LeaseKeepAliveStream, LeaseKeeper};
use registry_api::{Error, Grant, Options, Read, Result, SessionId, SessionStore};
use tokio::time::Instant;

use crate::error::{self, Trouble, Verdict};
use crate::link::{Link, Member};
use crate::names::{self, revision};

/// What etcd grants, in words.
const BOUNDS: &str = "etcd grants whole seconds, and no less than 1.5 times its election timeout: 2 s as shipped";

/// Leases, over a connection of their own that lives on the session thread.
pub(crate) struct Leases {
    link: Link,
    options: Options,
    beat: Mutex<Option<Beat>>,
    /// The number of the history in which the present session was granted.
    granted_in: AtomicU64,
    /// The last keep-alive was not answered, so its stream and its member are not trusted with the next.
    unanswered: AtomicBool,
}

/// The stream on which the last keep-alive was answered.
struct Beat {
    session: SessionId,
    member: Arc<Member>,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

/// The response to a keep-alive.
struct Renewal {
    /// The term that the member had come to before it.
    term: u64,
    /// Whether the lease was there, and is renewed.
    renewed: bool,
}

impl Leases {
    pub(crate) fn new(link: Link, options: Options) -> Self {
        Self {
            link,
            options,
            beat: Mutex::default(),
            granted_in: AtomicU64::new(0),
            unanswered: AtomicBool::new(false),
        }
    }

    fn beat(&self) -> MutexGuard<'_, Option<Beat>> {
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.options.request_timeout
    }

    /// Opens a stream with a keep-alive. The client hands on the header of no first response: the term before it is read
    /// first.
    async fn first_beat(&self, session: SessionId) -> Result<(Renewal, Arc<Member>, Option<Beat>)> {
        let member = self.link.member(self.deadline()).await?;
        let term = self.confirm(&member).await?;
        match member.client.lease_client().keep_alive(names::lease(session)).await {
            Ok((keeper, answers)) => {
                let beat = Beat {
                    session,
                    member: member.clone(),
                    keeper,
                    answers,
                };
                Ok((Renewal { term, renewed: true }, member, Some(beat)))
            }
            Err(error) if error::verdict(&error) == Verdict::NoLease => {
                Ok((Renewal { term, renewed: false }, member, None))
            }
            Err(error) => Err(keep_alive_error(session, error)),
        }
    }

    /// The term that the member has come to, read from the quorum.
    async fn confirm(&self, member: &Member) -> Result<u64> {
        let history = &self.link.history;
        let since = history.now();
        let header = member.sign_of_life(Read::Linearizable).await.map_err(error::read)?;
        member.answered();
        history.heard(header.cluster_id);
        history.confirmed(since, revision(header.revision));
        Ok(header.raft_term)
    }
}

impl Beat {
    async fn again(&mut self) -> Result<Renewal> {
        // That the stream is closed says nothing of the lease.
        self.keeper.keep_alive().await.map_err(error::unavailable)?;
        match self.answers.message().await {
            Ok(Some(answer)) => Ok(Renewal {
                term: answer.header().map_or(0, |header| header.raft_term()),
                renewed: answer.ttl() > 0,
            }),
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
        // Once more for each member that is asked: a session of the history that this member follows.
        let grant = |member: Arc<Member>| {
            self.granted_in.store(self.link.history.now().number, Ordering::Release);
            async move { member.client.lease_client().grant(seconds, None).await }
        };
        let granted = self.link.write(deadline, "opening a session", None, grant);
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
                    // The leader counts the TTL from the moment it takes a confirmed keep-alive, which is after its
                    // sending, and in its monotonic time.
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
        let (renewal, member, beat) = match beat {
            Some(mut beat) => (beat.again().await?, beat.member.clone(), Some(beat)),
            None => self.first_beat(session).await?,
        };
        let confirmed = self.confirm(&member).await?;
        if self.link.history.now().number != self.granted_in.load(Ordering::Acquire) {
            // A lease of the same id, in another history, is not this session.
            return Err(Error::SessionExpired { session });
        }
        if renewal.term != confirmed {
            return Err(error::unavailable(Trouble::LeaderChanged));
        }
        if !renewal.renewed {
            return Err(Error::SessionExpired { session });
        }
        *self.beat() = beat;
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
