//! The link over gRPC, to whichever member answers.

#[cfg(test)]
mod tests;
mod watching;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::{BoxFuture, Shared};
use futures_util::{FutureExt, StreamExt};
use parking_lot::Mutex;
use registry_api::{BoxError, Error, Namespace, Result, SessionId, Watch, WatchRequest};

use crate::backup::Parts;
use crate::command::{Outcome, not_understood};
use crate::conversation::Conversation;
use crate::link::{BACKEND, Gone, Link, failure, millis, of_question};
use crate::proto;
use crate::proto::backup_part::Part;
use crate::proto::registry_client::RegistryClient;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::status::Status;
use crate::transport::{Connection, MAX_MESSAGE, Transport, status_error};
use watching::WatchStream;

pub(crate) use watching::to_messages;
#[cfg(test)]
pub(crate) use watching::{Reader, pass_on};

/// The pause before a backup is asked for again.
const PAUSE: Duration = Duration::from_millis(100);

/// A link to the members at these addresses, one at a time.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    transport: Transport,
    addresses: Arc<[String]>,
    current: Arc<Mutex<Current>>,
    home: Arc<Mutex<Home>>,
}

/// Which cluster the handle deals with. Another one may come to be at the same addresses: restored from a backup, or founded
/// after the data was lost.
#[derive(Debug, Default)]
struct Home {
    /// That of the member that answered last.
    cluster: Option<[u8; 16]>,
    /// The newest session, and the cluster that opened it.
    session: Option<(u64, [u8; 16])>,
}

impl Home {
    /// Takes note of the cluster that answers.
    fn note(&mut self, by: Option<[u8; 16]>) {
        let before = self.cluster;
        self.cluster = by.or(before);
        if before.is_some() && self.cluster != before {
            tracing::warn!("another cluster answers than before: the session that the former one opened is over");
        }
    }

    /// The newest session, if another cluster answers now than the one that opened it.
    fn ended(&self) -> Option<SessionId> {
        let (session, of) = self.session?;
        (self.cluster? != of).then_some(SessionId(session))
    }

    /// Takes note of an answer. One of another cluster says nothing about a session: the session is over.
    fn answered(&mut self, asked: Option<u64>, by: Option<[u8; 16]>, answer: Answer) -> Result<Answer> {
        self.note(by);
        let Some(by) = by else { return Ok(answer) };
        let outcome = match &answer {
            Answer::Reply(reply) => reply.result.as_ref(),
            Answer::ReplyThenPage(both) => both.reply.as_ref().and_then(|reply| reply.result.as_ref()),
            _ => None,
        };
        if let Some(Outcome::SessionOpened(session)) = outcome {
            self.session = Some((*session, by));
        }
        match (self.session, outcome) {
            (Some((session, of)), _) if asked != Some(session) || of == by => Ok(answer),
            (None, _) | (_, Some(Outcome::SessionExpired(_))) => Ok(answer),
            (Some((session, _)), None) => Err(Error::SessionExpired {
                session: SessionId(session),
            }),
            // It was done, in the name of another's session.
            (Some(_), Some(_)) => Err(Error::OutcomeUnknown {
                operation: "a write",
                source: "another cluster answered than the one that opened the session".into(),
            }),
        }
    }
}

/// The session that a call is made in the name of.
fn session_of(call: &Call) -> Option<u64> {
    let session = match call {
        Call::KeepAlive(keep_alive) => keep_alive.session,
        Call::Command(command) => command.session,
        Call::CommandThenList(both) => both.command.as_ref().map_or(0, |command| command.session),
        _ => 0,
    };
    (session > 0).then_some(session)
}

/// The member that is asked, and the connection to it if there is one.
#[derive(Default)]
struct Current {
    at: usize,
    reached: Option<Reached>,
    /// Polled by all that wait for a connection, so that none of them depends on another.
    dialing: Option<Dialing>,
    /// Did not answer when it was asked last: a hint that it leads is not followed.
    shunned: Option<usize>,
}

/// A member that took a connection.
#[derive(Clone)]
struct Reached {
    at: usize,
    channel: Connection,
    conversation: Conversation,
}

/// A connection in the making: with it comes which member let the dialling wait, if one did.
type Dialing = Shared<BoxFuture<'static, std::result::Result<(Reached, Option<usize>), Arc<NotReached>>>>;

/// Why no member took a connection.
struct NotReached {
    causes: Vec<String>,
    /// Whether each of them refuses this handle.
    denied: bool,
}

impl NotReached {
    fn error(&self) -> Error {
        let (backend, source) = (BACKEND, self.causes.join("; ").into());
        match self.denied {
            true => Error::AccessDenied { backend, source },
            false => Error::Unavailable { backend, source },
        }
    }
}

/// Dials one member after the other, from that one on. Each has an equal part of the time that is left: an address that drops
/// packets takes no other's.
async fn dial(
    transport: Transport,
    addresses: Arc<[String]>,
    first: usize,
    patience: Duration,
) -> std::result::Result<(Reached, Option<usize>), Arc<NotReached>> {
    let until = Instant::now() + patience;
    let (mut causes, mut denied, mut silent) = (Vec::new(), 0, None);
    for (at, to_come) in (0..addresses.len())
        .map(|step| (first + step) % addresses.len())
        .zip((1..=addresses.len()).rev())
    {
        let address = &addresses[at];
        let begun = Instant::now();
        let part = until.saturating_duration_since(begun).div_f64(to_come as f64);
        match transport.dial(address, part).await {
            Ok(channel) => {
                let conversation = Conversation::begin(channel.clone());
                let reached = Reached {
                    at,
                    channel,
                    conversation,
                };
                return Ok((reached, silent));
            }
            Err(error) => {
                denied += usize::from(matches!(error, Error::AccessDenied { .. }));
                if begun.elapsed() >= part {
                    silent = silent.or(Some(at));
                }
                causes.push(match error {
                    Error::AccessDenied { source, .. } | Error::Unavailable { source, .. } => {
                        format!("{address}: {source}")
                    }
                    error => format!("{address}: {error}"),
                });
            }
        }
    }
    let denied = denied == addresses.len();
    Err(Arc::new(NotReached { causes, denied }))
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Current")
            .field("at", &self.at)
            .field("connected", &self.reached.is_some())
            .finish()
    }
}

impl Remote {
    pub(crate) fn new(transport: Transport, addresses: Vec<String>) -> Self {
        Self {
            transport,
            addresses: addresses.into(),
            current: Arc::default(),
            home: Arc::default(),
        }
    }

    /// A connection to the first member from the current one on that takes one. Nothing is sent yet. Of several callers one
    /// begins to dial, and all of them take what comes of it.
    async fn connect(&self, patience: Duration) -> Result<Reached> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (dialing, own) = {
                let mut current = self.current.lock();
                match (&current.reached, &current.dialing) {
                    (Some(reached), _) if !reached.conversation.has_ended() => return Ok(reached.clone()),
                    (_, Some(dialing)) => (dialing.clone(), false),
                    _ => {
                        let dialing = dial(self.transport.clone(), self.addresses.clone(), current.at, left);
                        (current.dialing.insert(dialing.boxed().shared()).clone(), true)
                    }
                }
            };
            let dialled = tokio::time::timeout(left, dialing.clone()).await;
            let dialled = dialled.map_err(|_| Error::Unavailable {
                backend: BACKEND,
                source: format!("no member took a connection within {patience:.1?}").into(),
            })?;
            let mut current = self.current.lock();
            if current.dialing.as_ref().is_some_and(|last| last.ptr_eq(&dialing)) {
                current.dialing = None;
                if let Ok((reached, silent)) = &dialled {
                    (current.at, current.reached) = (reached.at, Some(reached.clone()));
                    current.shunned = silent.or(current.shunned);
                }
            }
            match dialled {
                Ok((reached, _)) => return Ok(reached),
                // Another caller had begun it, with less time perhaps.
                Err(_) if !own && Instant::now() < until => {}
                Err(not_reached) => return Err(not_reached.error()),
            }
        }
    }

    /// The error, saying of which member it is.
    fn naming(&self, at: usize, error: Error) -> Error {
        let named = |source: BoxError| format!("{}: {source}", self.addresses[at]).into();
        match error {
            Error::Unavailable { backend, source } => Error::Unavailable {
                backend,
                source: named(source),
            },
            Error::OutcomeUnknown { operation, source } => Error::OutcomeUnknown {
                operation,
                source: named(source),
            },
            Error::AccessDenied { backend, source } => Error::AccessDenied {
                backend,
                source: named(source),
            },
            error => error,
        }
    }

    /// The member does not answer: the next is asked from now on.
    fn give_up(&self, at: usize) {
        self.leave(at);
        self.current.lock().shunned = Some(at);
    }

    /// The member can't do it now: the next is asked from now on, if there is another.
    fn pass_by(&self, at: usize) {
        if self.addresses.len() > 1 {
            self.leave(at);
        }
    }

    fn leave(&self, at: usize) {
        let mut current = self.current.lock();
        if current.at == at {
            (current.at, current.reached) = ((at + 1) % self.addresses.len(), None);
        }
    }

    /// The Raft leader is at that address: asked directly, if it is one of the handle's own, it answers sooner.
    fn follow(&self, leader: &str) {
        let Some(at) = self.addresses.iter().position(|address| address == leader) else {
            return;
        };
        let mut current = self.current.lock();
        if current.at != at && current.shunned != Some(at) {
            *current = Current {
                at,
                ..Current::default()
            };
        }
    }

    /// How long one member is asked: one that hangs is left while there is time to ask another.
    fn with_one(&self, patience: Duration) -> Duration {
        match self.addresses.len() {
            1 => patience,
            _ => patience.mul_f64(0.4),
        }
    }

    /// The answer that a member has told; one that failed is not asked next, if there are others.
    fn answered(&self, at: usize, told: Result<proto::Response, tonic::Status>) -> Result<Answer> {
        let response = told.map_err(|status| {
            self.give_up(at);
            self.naming(at, status_error(status))
        })?;
        match self.led(response).ok_or_else(not_understood)? {
            Answer::Failure(said) => {
                let error = failure(said);
                match error {
                    _ if self.addresses.len() == 1 => {}
                    Error::Unavailable { .. } => self.pass_by(at),
                    // It may be cut off from the others, and go on to take itself for the Raft leader.
                    Error::OutcomeUnknown { .. } => self.give_up(at),
                    _ => {}
                }
                Err(error)
            }
            answer => Ok(answer),
        }
    }

    /// The answer, once the hint that comes with it is taken.
    fn led(&self, response: proto::Response) -> Option<Answer> {
        if !response.leader.is_empty() {
            self.follow(&response.leader);
        }
        response.answer
    }

    /// How the group stands.
    pub(crate) async fn status(&self, patience: Duration) -> Result<Status> {
        let answer = self.call(Call::Status(proto::StatusRequest {}), patience).await;
        match answer.map_err(of_question)? {
            Answer::Status(status) => Ok(status.into()),
            _ => Err(not_understood()),
        }
    }

    /// The parts of a backup.
    pub(crate) async fn backup(&self, patience: Duration) -> Result<Parts> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let asked = async {
                let Reached { at, channel, .. } = self.connect(left).await?;
                let begun = async {
                    let mut parts = Self::client(channel)
                        .backup(proto::BackupRequest {})
                        .await?
                        .into_inner();
                    let first = parts.message().await?.and_then(|first| first.part);
                    Ok((first, parts))
                };
                match begun.await {
                    Ok((Some(Part::Failure(said)), _)) => {
                        self.pass_by(at);
                        Err(failure(said))
                    }
                    Ok((Some(first), parts)) => {
                        let rest = parts.map(|part| part.map_err(status_error)?.part.ok_or_else(not_understood));
                        Ok(futures_util::stream::iter([Ok(first)]).chain(rest).boxed())
                    }
                    Ok((None, _)) => Err(not_understood()),
                    Err(status) => {
                        self.give_up(at);
                        Err(status_error(status))
                    }
                }
            };
            let cause = match tokio::time::timeout(left, asked).await {
                Ok(Err(Error::Unavailable { source, .. } | Error::OutcomeUnknown { source, .. })) => source,
                Ok(answered) => return answered,
                Err(_) => "no member began it in time".into(),
            };
            if Instant::now() + PAUSE >= until {
                return Err(Error::Unavailable {
                    backend: BACKEND,
                    source: cause,
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    pub(crate) fn client(channel: Connection) -> RegistryClient<Connection> {
        RegistryClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

#[async_trait]
impl Link for Remote {
    async fn call(&self, call: Call, patience: Duration) -> Result<Answer> {
        let patience = self.with_one(patience);
        // The member says what is wrong before nobody waits for it any more.
        let patience_ms = millis(patience.mul_f64(0.9));
        let session = session_of(&call);
        let request = proto::Request {
            patience_ms,
            forwarded: false,
            header: None,
            call: Some(call),
        };
        let until = Instant::now() + patience;
        // Time that runs out before there is a connection leaves nothing unknown.
        let Reached { at, conversation, .. } = self.connect(patience).await?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Unavailable {
                backend: BACKEND,
                source: format!("{}: no time is left after the connection was made", self.addresses[at]).into(),
            });
        }
        match tokio::time::timeout(left, conversation.ask(request)).await {
            Ok(told) => {
                let answer = self.answered(at, told)?;
                self.home.lock().answered(session, conversation.cluster(), answer)
            }
            Err(_) => {
                self.give_up(at);
                let error = Error::OutcomeUnknown {
                    operation: "a request",
                    source: format!("no answer within {left:.1?}").into(),
                };
                Err(self.naming(at, error))
            }
        }
    }

    async fn watch(&self, namespace: &Namespace, request: WatchRequest, patience: Duration) -> Result<Watch> {
        WatchStream::begin(self.clone(), namespace.clone(), request, patience).await
    }

    async fn once_gone(&self, gone: Gone, patience: Duration) -> Result<Option<proto::Page>> {
        let patience = self.with_one(patience);
        let Reached { at, conversation, .. } = self.connect(patience).await?;
        let told = conversation.once_gone(proto::OnceGone {
            patience_ms: millis(patience),
            key: gone.namespace.qualify(gone.key.as_str()),
            created: gone.created.0,
            list: Some(gone.list),
        });
        match self.answered(at, told.await)? {
            Answer::Page(page) => Ok(Some(page)),
            Answer::Done(_) => Ok(None),
            _ => Err(not_understood()),
        }
    }

    fn endpoint(&self) -> String {
        self.addresses[self.current.lock().at].clone()
    }

    fn cluster(&self) -> Option<[u8; 16]> {
        self.home.lock().cluster
    }

    fn ended(&self) -> Option<SessionId> {
        self.home.lock().ended()
    }

    fn apart(&self) -> Arc<dyn Link> {
        Arc::new(Self {
            transport: self.transport.clone(),
            addresses: self.addresses.clone(),
            current: Arc::default(),
            home: self.home.clone(),
        })
    }
}
