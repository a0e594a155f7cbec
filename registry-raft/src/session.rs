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

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, TryStreamExt, stream};
    use registry_api::{Key, Prefix, Read, SessionState, SessionTtl};

    use super::*;
    use crate::{Member, RaftConfig};

    const MANY: usize = 5_000;
    /// How many are asked for at once.
    const AT_ONCE: usize = 256;

    /// An ephemeral key of a session that nobody keeps alive.
    async fn put(link: &dyn Link, session: SessionId, key: String) -> Result<()> {
        let put = proto::Put {
            ephemeral: true,
            ..proto::Put::default()
        };
        let operations = vec![proto::Operation {
            key,
            write: Some(proto::operation::Write::Put(put)),
        }];
        let conditions = Vec::new();
        let command = Command {
            session: session.0,
            sequence: 1,
            answered_below: 1,
            change: Some(Change::Txn(proto::Txn { conditions, operations })),
        };
        link.command(command, Duration::from_secs(30)).await.map(drop)
    }

    /// Ten thousand sessions are held. Half of them die at one moment: they expire in time, all with their keys; nobody
    /// else's session is lost, and nobody who writes meanwhile waits for it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn ten_thousand_are_held_and_half_of_them_die_at_once() {
        let ttl = Duration::from_secs(10);
        let options = Options {
            session_ttl: SessionTtl::new(ttl).unwrap(),
            request_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(30),
            ..Options::default()
        };
        let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
        let alive: Vec<_> = stream::iter(0..MANY)
            .map(|n| {
                let (member, options) = (&member, &options);
                async move {
                    let registry = member.connect(options).await?;
                    let key = Key::parse(&format!("/alive/{n}"))?;
                    registry.put_ephemeral(&key, "").await?;
                    Ok::<_, Error>(registry)
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
            .unwrap();
        let (link, sessions) = (member.link(), Sessions::new(member.link(), &options));
        let dying: Vec<_> = stream::iter(0..MANY)
            .map(|n| {
                let (link, sessions) = (&link, &sessions);
                async move {
                    let session = sessions.open().await?.session;
                    let key = Options::default().namespace.qualify(&format!("/dying/{n}"));
                    put(&**link, session, key).await?;
                    Ok::<_, Error>(session)
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
            .unwrap();
        let held: Vec<_> = alive
            .iter()
            .map(|registry| registry.session().live().unwrap())
            .collect();
        // Their last sign of life.
        for session in &dying {
            sessions.keep_alive(*session).await.unwrap();
        }
        let died = Instant::now();
        let (registry, prefix) = (&alive[0], Prefix::parse("/dying").unwrap());
        let key = Key::parse("/a").unwrap();
        let (mut left, mut slowest, mut first) = (MANY as u64, Duration::ZERO, None);
        while left > 0 {
            assert!(died.elapsed() <= 2 * ttl + Duration::from_secs(1), "{left} are left");
            let began = Instant::now();
            registry.put(&key, "").await.unwrap();
            slowest = slowest.max(began.elapsed());
            left = registry.count(&prefix, Read::Linearizable).await.unwrap();
            if left < MANY as u64 {
                first.get_or_insert(died.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!(
            "{MANY} expired from {first:?} to {:?}; the slowest put meanwhile took {slowest:?}",
            died.elapsed()
        );
        let living = registry
            .count(&Prefix::parse("/alive").unwrap(), Read::Linearizable)
            .await
            .unwrap();
        assert_eq!(living, MANY as u64);
        for (registry, session) in alive.iter().zip(held) {
            assert_eq!(registry.session().state(), SessionState::Connected(session));
        }
        // It took its turn among them, and no deadline of a call.
        assert!(slowest < options.request_timeout);
        stream::iter(alive)
            .for_each_concurrent(AT_ONCE, |registry| async move { registry.close().await.unwrap() })
            .await;
        member.stop().await.unwrap();
    }
}
