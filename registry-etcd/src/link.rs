//! The way to etcd: one member at a time, another when that one fails.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use registry_api::{BoxError, Error, Options, Result, SessionId};
use tokio::time::{Instant, sleep, timeout_at};

use crate::config::EtcdConfig;
use crate::error::{self, Trouble, Verdict};
use crate::history::History;
pub(crate) use crate::member::Member;
use crate::names::Names;

/// How much later each further endpoint is tried while the ones before it have not answered.
const STAGGER: Duration = Duration::from_millis(100);
/// An idle connection that answers no ping within these two together is dead. etcd refuses pings more frequent than
/// one in 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_WAIT: Duration = Duration::from_secs(3);
/// An idle connection sends a TCP keep-alive so often, which keeps a gateway from forgetting it.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(30);
/// The largest answer that is taken. etcd takes requests of 1.5 MiB, so this bounds what lists many entries.
pub(crate) const MAX_ANSWER: usize = 64 << 20;
const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_millis(320);

/// What a link asks of the member it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leader {
    /// That it knows a leader; etcd then also ends streams when there is none.
    Required,
    /// Nothing: stale reads are to be had from a member that lost its leader.
    Optional,
}

/// A connection that many share, to one member at a time.
///
/// The client's own balancing sends every second request to a dead endpoint, so each member has a client of its own.
/// One that failed is left for the first of the others that answers, those with a leader first.
pub(crate) struct Link {
    endpoints: Vec<String>,
    dial: ConnectOptions,
    authenticates: bool,
    leader: Leader,
    connect_timeout: Duration,
    /// What is read to see whether a member responds.
    sign: Vec<u8>,
    pub(crate) history: Arc<History>,
    current: Mutex<Option<Arc<Member>>>,
    dialling: tokio::sync::Mutex<()>,
}

impl Link {
    /// Nothing is sent before the first request.
    pub(crate) fn new(
        config: &EtcdConfig,
        dial: ConnectOptions,
        leader: Leader,
        options: &Options,
        history: Arc<History>,
    ) -> Self {
        let dial = dial
            .with_require_leader(leader == Leader::Required)
            .with_keep_alive(PING_EVERY, PING_WAIT)
            // Pings of an idle connection count as too many.
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(TCP_KEEP_ALIVE)
            .with_connect_timeout(options.connect_timeout)
            .with_auto_token_refresh(true);
        Self {
            endpoints: config.endpoints.iter().map(str::to_owned).collect(),
            dial,
            authenticates: config.credentials.is_some(),
            leader,
            connect_timeout: options.connect_timeout,
            sign: Names(options.namespace.clone()).sign(),
            history,
            current: Mutex::default(),
            dialling: tokio::sync::Mutex::default(),
        }
    }

    /// Reads: tried again elsewhere until there is an answer, or the time is up.
    pub(crate) async fn read<T, F>(&self, deadline: Instant, call: impl Fn(Arc<Member>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut backoff = Backoff::default();
        let mut renewed = false;
        loop {
            let member = self.member(deadline).await?;
            // A member that hangs is to leave time for another.
            let patience = match self.endpoints.len() {
                1 => deadline,
                _ => Instant::now() + (deadline - Instant::now()) / 2,
            };
            let failure: BoxError = match timeout_at(patience, call(member.clone())).await {
                Ok(Ok(answer)) => {
                    member.answered();
                    return Ok(answer);
                }
                Ok(Err(error)) => match error::verdict(&error) {
                    Verdict::NotSent | Verdict::Unknown => error.into(),
                    Verdict::Refused if self.renews(&mut renewed) => error.into(),
                    _ => return Err(error::read(error)),
                },
                Err(_) => member.silent().into(),
            };
            member.suspect();
            if !backoff.wait_until(deadline).await {
                return Err(error::unavailable(failure));
            }
        }
    }

    /// As [`Link::read`]; `None` for an answer that is out of range: of a revision that is compacted, or too large.
    pub(crate) async fn read_in_range<T, F>(
        &self,
        deadline: Instant,
        call: impl Fn(Arc<Member>) -> F,
    ) -> Result<Option<T>>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let in_range = |member| {
            let answer = call(member);
            async move {
                match answer.await {
                    Ok(answer) => Ok(Some(answer)),
                    Err(error) if error::verdict(&error) == Verdict::OutOfRange => Ok(None),
                    Err(error) => Err(error),
                }
            }
        };
        self.read(deadline, in_range).await
    }

    /// Writes: sent once. Only one that surely was not sent is tried again.
    pub(crate) async fn write<T, F>(
        &self,
        deadline: Instant,
        operation: &'static str,
        session: Option<SessionId>,
        call: impl Fn(Arc<Member>) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut backoff = Backoff::default();
        let mut renewed = false;
        loop {
            let member = self.member(deadline).await?;
            let failure = match timeout_at(deadline, call(member.clone())).await {
                Ok(Ok(answer)) => {
                    member.answered();
                    return Ok(answer);
                }
                Ok(Err(error)) => error,
                Err(_) => {
                    member.suspect();
                    return Err(error::unknown(operation, member.silent()));
                }
            };
            match error::verdict(&failure) {
                Verdict::NotSent => member.suspect(),
                Verdict::Refused if self.renews(&mut renewed) => member.suspect(),
                Verdict::Refused => {
                    let of_the_request = timeout_at(deadline, member.is_of_the_request(&failure)).await;
                    return Err(match of_the_request {
                        Ok(true) => error::out_of_bounds(operation, &member.endpoint, &failure),
                        Ok(false) | Err(_) => error::write(operation, session, failure),
                    });
                }
                verdict => {
                    if verdict == Verdict::Unknown {
                        member.suspect();
                    }
                    return Err(error::write(operation, session, failure));
                }
            }
            if !backoff.wait_until(deadline).await {
                return Err(error::unavailable(failure));
            }
        }
    }

    /// The member to talk to; another one if there is none, or if something went wrong with it.
    pub(crate) async fn member(&self, deadline: Instant) -> Result<Arc<Member>> {
        if let Some(member) = self.healthy()
            && !member.is_idle()
        {
            return Ok(member);
        }
        let dial = async {
            let _one_at_a_time = self.dialling.lock().await;
            if let Some(member) = self.healthy() {
                if !member.is_idle() || member.still_answers(deadline).await {
                    return Ok(member);
                }
                tracing::debug!(endpoint = member.endpoint, "an idle connection is dead");
                member.suspect();
            }
            let last = self.current().as_ref().map(|member| member.index);
            let member = Arc::new(self.dial(last, deadline).await?);
            tracing::debug!(endpoint = member.endpoint, "talking to another member");
            self.history.heard(member.cluster);
            *self.current() = Some(member.clone());
            Ok(member)
        };
        let late = |_| error::unavailable(Trouble::NoEndpoint(self.endpoints.join(", ")));
        timeout_at(deadline, dial).await.map_err(late)?
    }

    /// Whether a refusal may be one of a token that is older than the last change to users and roles: a new connection
    /// brings a new one. Tried once.
    fn renews(&self, renewed: &mut bool) -> bool {
        self.authenticates && !std::mem::replace(renewed, true)
    }

    /// Something went wrong with whichever member is talked to.
    pub(crate) fn suspect(&self) {
        if let Some(member) = &*self.current() {
            member.suspect();
        }
    }

    fn healthy(&self) -> Option<Arc<Member>> {
        let current = self.current();
        current.as_ref().filter(|member| !member.is_suspect()).cloned()
    }

    fn current(&self) -> MutexGuard<'_, Option<Arc<Member>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first member that answers and has a leader; one without where no other answers. The one that failed last
    /// comes last.
    async fn dial(&self, last: Option<usize>, deadline: Instant) -> Result<Member> {
        let deadline = deadline.min(Instant::now() + self.connect_timeout);
        let first = last.map_or(0, |last| last + 1);
        let attempts = (0..self.endpoints.len()).map(|place| async move {
            let index = (first + place) % self.endpoints.len();
            sleep(STAGGER * u32::try_from(place).unwrap_or(u32::MAX)).await;
            (index, self.try_member(index).await)
        });
        let mut attempts: FuturesUnordered<_> = attempts.collect();
        let (mut leaderless, mut refused) = (None, None);
        let mut causes = vec!["no answer in time".to_owned(); self.endpoints.len()];
        while let Ok(Some((index, attempt))) = timeout_at(deadline, attempts.next()).await {
            match attempt {
                Ok(member) if member.has_leader => return Ok(member),
                Ok(member) => leaderless = Some(member),
                // Whoever may not ask here may not ask elsewhere.
                Err(error @ Error::AccessDenied { .. }) if !error::is_precondition(&error) => return Err(error),
                // Another may be no learner, and have other settings.
                Err(error @ (Error::AccessDenied { .. } | Error::Config { .. })) => refused = Some(error),
                Err(error) => causes[index] = error.with_causes(),
            }
        }
        let told = || {
            self.endpoints
                .iter()
                .zip(&causes)
                .map(|(endpoint, cause)| format!("{endpoint}: {cause}"))
        };
        let unavailable = || error::unavailable(Trouble::NoEndpoint(told().collect::<Vec<_>>().join("; ")));
        leaderless.ok_or_else(|| refused.unwrap_or_else(unavailable))
    }

    async fn try_member(&self, index: usize) -> Result<Member> {
        let endpoint = &self.endpoints[index];
        let client = Client::connect([endpoint], Some(self.dial.clone()))
            .await
            // The one request of `connect` is that for a token.
            .map_err(error::authenticate)?;
        let kv = client.kv_client().max_decoding_message_size(MAX_ANSWER);
        let member = Member::check((index, endpoint), client, kv, self.sign.clone()).await?;
        if self.leader == Leader::Optional {
            member.check_bounds().await?;
        }
        Ok(member)
    }
}

/// Waits that double, from 10 ms to 320 ms.
#[derive(Debug)]
pub(crate) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(MIN_BACKOFF)
    }
}

impl Backoff {
    /// Waits once; `false` if the time is up before.
    pub(crate) async fn wait_until(&mut self, deadline: Instant) -> bool {
        if Instant::now() + self.0 >= deadline {
            return false;
        }
        self.wait().await;
        true
    }

    pub(crate) async fn wait(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}
