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
    /// How long is tried to open one, to close it, and to keep it alive: a little less than the keeper waits, so that the
    /// cause is told and not only that time ran out.
    to_open: Duration,
    to_close: Duration,
    to_keep: Duration,
    /// How long one try may take.
    each: Duration,
}

impl Sessions {
    pub(crate) fn new(link: Arc<dyn Link>, options: &Options) -> Self {
        let (ttl, each) = (options.session_ttl.get(), options.request_timeout);
        let timeout = options.connect_timeout.min(each);
        Self {
            link,
            ttl,
            to_open: options.connect_timeout.mul_f64(0.9),
            to_close: timeout.mul_f64(0.9),
            // The keeper's turn is a third of the TTL.
            to_keep: (ttl / 3).min(timeout).mul_f64(0.9),
            each,
        }
    }

    /// Asks what may be asked twice, until somebody answers: a second session that nobody uses expires, a second close
    /// finds nothing, and a keep-alive is one. Members fail over faster than the keeper tries again.
    async fn ask(&self, call: Call, patience: Duration) -> Result<Answer> {
        let until = Instant::now() + patience;
        let mut backoff = Duration::from_millis(5);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let source = match self.link.call(call.clone(), left.min(self.each)).await {
                Err(Error::Unavailable { source, .. } | Error::OutcomeUnknown { source, .. }) => source,
                answered => return answered,
            };
            // Asked in the last moment, nobody would have the time to say what is wrong.
            if Instant::now() + 2 * backoff >= until {
                let backend = BACKEND;
                return Err(Error::Unavailable { backend, source });
            }
            tracing::debug!(error = %source, "nobody answers for a session yet");
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_millis(200));
        }
    }

    async fn change(&self, change: Change, patience: Duration) -> Result<Outcome> {
        match self.ask(Call::Command(Command::new(change)), patience).await? {
            Answer::Reply(reply) => reply.result.ok_or_else(not_understood),
            _ => Err(not_understood()),
        }
    }
}

#[async_trait]
impl SessionStore for Sessions {
    async fn open(&self) -> Result<Grant> {
        let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        match self
            .change(Change::Open(proto::OpenSession { ttl_ms, first: 0 }), self.to_open)
            .await?
        {
            Outcome::SessionOpened(session) => Ok(Grant {
                session: SessionId(session),
                ttl: Duration::from_millis(ttl_ms),
                margin: Duration::ZERO,
            }),
            _ => Err(not_understood()),
        }
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        let call = Call::KeepAlive(proto::KeepAlive { session: session.0 });
        match self.ask(call, self.to_keep).await? {
            Answer::Done(_) => Ok(()),
            _ => Err(not_understood()),
        }
    }

    async fn close(&self, session: SessionId) -> Result<()> {
        let close = Change::Close(proto::CloseSession { session: session.0 });
        self.change(close, self.to_close).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures_util::{StreamExt, TryStreamExt, stream};
    use registry_api::{Key, Namespace, Prefix, Read, SessionState, SessionTtl, Watch, WatchRequest};

    use super::*;
    use crate::link::Gone;
    use crate::{Member, RaftConfig};

    /// A way to a member on which three calls of four are lost: the member is not reached, or its answer does not come.
    #[derive(Debug)]
    struct Lossy(Arc<dyn Link>, AtomicU32);

    #[async_trait]
    impl Link for Lossy {
        async fn call(&self, call: Call, patience: Duration) -> Result<Answer> {
            let source = "lost".into();
            match self.1.fetch_add(1, Ordering::Relaxed) % 4 {
                0 | 1 => Err(Error::Unavailable {
                    backend: BACKEND,
                    source,
                }),
                2 => {
                    let _answer = self.0.call(call, patience).await;
                    Err(Error::OutcomeUnknown {
                        operation: "a request",
                        source,
                    })
                }
                _ => self.0.call(call, patience).await,
            }
        }

        async fn watch(&self, namespace: &Namespace, request: WatchRequest, patience: Duration) -> Result<Watch> {
            self.0.watch(namespace, request, patience).await
        }

        async fn once_gone(&self, gone: Gone, patience: Duration) -> Result<Option<proto::Page>> {
            self.0.once_gone(gone, patience).await
        }

        fn endpoint(&self) -> String {
            self.0.endpoint()
        }

        fn apart(&self) -> Arc<dyn Link> {
            self.0.apart()
        }
    }

    /// The keeper pauses between its keep-alives for a twentieth of the TTL, while a leader may have come and gone.
    #[tokio::test]
    async fn one_keep_alive_asks_until_it_is_answered() {
        let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
        let sessions = Sessions::new(Arc::new(Lossy(member.link(), AtomicU32::new(0))), &Options::default());
        let session = sessions.open().await.unwrap().session;
        for _ in 0..3 {
            sessions.keep_alive(session).await.unwrap();
        }
        sessions.close(session).await.unwrap();
        let gone = sessions.keep_alive(session).await;
        assert!(matches!(gone, Err(Error::SessionExpired { .. })), "{gone:?}");
        member.stop().await.unwrap();
    }

    /// One call may take less than the member needs to come.
    #[tokio::test]
    async fn opening_is_tried_until_connect_timeout() {
        let address = format!("127.0.0.1:{}", registry_tests::process::free_port());
        let options = Options {
            request_timeout: Duration::from_millis(200),
            connect_timeout: Duration::from_secs(30),
            ..Options::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let late = async {
            tokio::time::sleep(3 * options.request_timeout).await;
            let config = RaftConfig {
                data_dir: Some(dir.path().join("data")),
                listen: Some(address.clone()),
                ..RaftConfig::default()
            };
            Member::start(&config).await.unwrap()
        };
        let remote = RaftConfig::remote([address.clone()]);
        let (opened, member) = tokio::join!(crate::connect(&remote, &options), late);
        opened.unwrap().close().await.unwrap();
        member.stop().await.unwrap();
    }

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
            level: 0,
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
