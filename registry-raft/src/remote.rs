//! The link over gRPC, to whichever member answers.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt;
use parking_lot::Mutex;
use registry_api::watch::{Feed, Picture, feed};
use registry_api::{
    BoxError, Error, Event, Namespace, Result, Revision, Watch, WatchFrom, WatchItem, WatchRequest, WatchScope,
};

use crate::backup::Parts;
use crate::command::{self, not_understood};
use crate::conversation::{Conversation, Items};
use crate::link::{BACKEND, Link, failure};
use crate::proto;
use crate::proto::backup_part::Part;
use crate::proto::registry_client::RegistryClient;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::proto::watch_response::Item;
use crate::service::MAX_LIMIT;
use crate::status::Status;
use crate::transport::{Connection, MAX_MESSAGE, Transport, status_error};

/// The pause before a backup is asked for again.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a watch that lost its member looks for another, and waits until that has begun it, before it tries the next.
const TO_REOPEN: Duration = Duration::from_secs(10);

/// A link to the members at these addresses, one at a time.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    transport: Transport,
    addresses: Arc<[String]>,
    current: Arc<Mutex<Current>>,
}

/// The member that is asked, and the connection to it if there is one.
#[derive(Default)]
struct Current {
    at: usize,
    reached: Option<Reached>,
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
        }
    }

    /// A connection to the first member from the current one on that takes one. Nothing is sent yet.
    async fn connect(&self, patience: Duration) -> Result<Reached> {
        let until = Instant::now() + patience;
        let at = {
            let current = self.current.lock();
            match &current.reached {
                Some(reached) if !reached.conversation.has_ended() => return Ok(reached.clone()),
                _ => current.at,
            }
        };
        let (mut causes, mut denied) = (Vec::new(), 0);
        for at in (0..self.addresses.len()).map(|step| (at + step) % self.addresses.len()) {
            let address = &self.addresses[at];
            let left = until.saturating_duration_since(Instant::now());
            match self.transport.dial(address, left).await {
                Ok(channel) => {
                    let conversation = Conversation::begin(channel.clone());
                    let reached = Reached {
                        at,
                        channel,
                        conversation,
                    };
                    let mut current = self.current.lock();
                    (current.at, current.reached) = (at, Some(reached.clone()));
                    return Ok(reached);
                }
                Err(Error::AccessDenied { source, .. }) => {
                    denied += 1;
                    causes.push(format!("{address}: {source}"));
                }
                Err(Error::Unavailable { source, .. }) => causes.push(format!("{address}: {source}")),
                Err(error) => causes.push(format!("{address}: {error}")),
            }
        }
        let (backend, source) = (BACKEND, causes.join("; ").into());
        Err(match denied == self.addresses.len() {
            true => Error::AccessDenied { backend, source },
            false => Error::Unavailable { backend, source },
        })
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
        self.pass_by(at);
        self.current.lock().shunned = Some(at);
    }

    /// The member can't do it now: the next is asked from now on.
    fn pass_by(&self, at: usize) {
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

    /// The answer, once the hint that comes with it is taken.
    fn led(&self, response: proto::Response) -> Option<Answer> {
        if !response.leader.is_empty() {
            self.follow(&response.leader);
        }
        response.answer
    }

    /// How the group stands.
    pub(crate) async fn status(&self, patience: Duration) -> Result<Status> {
        match self.call(Call::Status(proto::StatusRequest {}), patience).await {
            Ok(Answer::Status(status)) => Ok(status.into()),
            Ok(_) => Err(not_understood()),
            // Asking changes nothing, whatever became of the question.
            Err(Error::OutcomeUnknown { source, .. }) => Err(Error::Unavailable {
                backend: BACKEND,
                source,
            }),
            Err(error) => Err(error),
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
        // One that hangs is left while there is time to ask another.
        let patience = if self.addresses.len() > 1 {
            patience.mul_f64(0.4)
        } else {
            patience
        };
        // The member says what is wrong before nobody waits for it any more.
        let patience_ms = u32::try_from(patience.mul_f64(0.9).as_millis()).unwrap_or(u32::MAX);
        let request = proto::Request {
            patience_ms,
            forwarded: false,
            call: Some(call),
        };
        let until = Instant::now() + patience;
        // Time that runs out before there is a connection leaves nothing unknown.
        let Reached { at, conversation, .. } = self.connect(patience).await?;
        let left = until.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, conversation.ask(request)).await {
            Ok(Ok(response)) => match self.led(response).ok_or_else(not_understood)? {
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
            },
            Ok(Err(status)) => {
                self.give_up(at);
                Err(self.naming(at, status_error(status)))
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
        let mut stream = WatchStream {
            link: self.clone(),
            request,
            reader: Reader::new(namespace.clone()),
        };
        let no_answer = |_| Error::Unavailable {
            backend: BACKEND,
            source: format!("no member began the watch within {patience:?}").into(),
        };
        let begun = async {
            let from = stream.request.from;
            let items = stream.open(from).await?;
            if let WatchFrom::After(after) | WatchFrom::AfterOrReset(after) = from {
                stream.recall(after).await?;
            }
            Ok::<_, Error>(items)
        };
        let items = tokio::time::timeout(patience, begun).await.map_err(no_answer)??;
        let (feed, watch) = feed();
        tokio::spawn(stream.run(items, feed));
        Ok(watch)
    }

    fn endpoint(&self) -> String {
        self.addresses[self.current.lock().at].clone()
    }

    fn apart(&self) -> Arc<dyn Link> {
        Arc::new(Self {
            transport: self.transport.clone(),
            addresses: self.addresses.clone(),
            current: Arc::default(),
        })
    }
}

/// A watch that goes on from member to member.
struct WatchStream {
    link: Remote,
    request: WatchRequest,
    reader: Reader,
}

impl WatchStream {
    async fn open(&mut self, from: WatchFrom) -> Result<Items> {
        let Reached { at, conversation, .. } = self.link.connect(TO_REOPEN).await?;
        let request = proto::WatchRequest {
            prefix: self.reader.namespace.qualify(self.request.prefix.as_str()),
            scope: match self.request.scope {
                WatchScope::Key => proto::watch_request::Scope::Key,
                WatchScope::Children => proto::watch_request::Scope::Children,
                WatchScope::Subtree => proto::watch_request::Scope::Subtree,
            }
            .into(),
            from: Some(match from {
                WatchFrom::Now => proto::watch_request::From::Now(proto::Unit {}),
                WatchFrom::After(revision) => proto::watch_request::From::After(revision.0),
                WatchFrom::AfterOrReset(revision) => proto::watch_request::From::AfterOrReset(revision.0),
            }),
        };
        let opened = async {
            let mut items = conversation.watch(request)?;
            let first = items.message().await?;
            Ok::<_, tonic::Status>((first, items))
        };
        // The first item says whether the watch could begin; it is an empty one if so.
        match opened.await {
            Ok((Some(proto::WatchResponse { item: None }), items)) => Ok(items),
            Ok((
                Some(proto::WatchResponse {
                    item: Some(Item::Failure(said)),
                }),
                _,
            )) => {
                let error = failure(said);
                if matches!(error, Error::Unavailable { .. }) {
                    self.link.pass_by(at);
                }
                Err(error)
            }
            Ok(_) => {
                self.link.give_up(at);
                Err(Error::Unavailable {
                    backend: BACKEND,
                    source: "the watch did not begin".into(),
                })
            }
            Err(status) => {
                self.link.give_up(at);
                Err(match status_error(status) {
                    Error::OutcomeUnknown { source, .. } => Error::Unavailable {
                        backend: BACKEND,
                        source,
                    },
                    error => error,
                })
            }
        }
    }

    /// Reads what the reader knows who begins after a revision, but for what has changed since, of which the stream tells:
    /// from this it can be told what went, should the history not bridge a gap one day.
    async fn recall(&mut self, after: Revision) -> Result<()> {
        let mut list = proto::List {
            prefix: self.reader.namespace.qualify(self.request.prefix.as_str()),
            children_only: self.request.scope == WatchScope::Children,
            // The key itself comes first.
            limit: if self.request.scope == WatchScope::Key {
                1
            } else {
                MAX_LIMIT
            },
            ..proto::List::default()
        };
        loop {
            let page = match self.link.call(Call::List(list.clone()), TO_REOPEN).await {
                Ok(Answer::Page(page)) => page,
                Ok(_) => return Err(not_understood()),
                // Asking changes nothing, whatever became of the question.
                Err(Error::Unavailable { source, .. } | Error::OutcomeUnknown { source, .. }) => {
                    tracing::debug!(error = %source, "a watch reads what its reader knows, and tries again");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Some(last) = page.entries.last() {
                list.after.clone_from(&last.key);
            }
            for entry in page.entries {
                let entry = command::entry(&self.reader.namespace, entry)?;
                if entry.mod_revision <= after && self.request.wants(&entry.key) {
                    self.reader.picture.put(entry);
                }
            }
            if !page.more || self.request.scope == WatchScope::Key {
                return Ok(());
            }
        }
    }

    /// Passes the changes on until the reader is gone, over as many streams as it takes.
    async fn run(mut self, mut items: Items, feed: Feed) {
        // What is told comes after this revision; none as long as the first current entries are not all told.
        let mut told = match self.request.from {
            WatchFrom::Now => None,
            WatchFrom::After(revision) | WatchFrom::AfterOrReset(revision) => Some(revision),
        };
        let mut listing = self.request.from == WatchFrom::Now;
        loop {
            let ended = tokio::select! {
                ended = self.reader.pass_on(&mut items, &feed, &mut told, &mut listing) => ended,
                () = feed.closed() => return,
            };
            if let Err(error) = ended {
                return feed.fail(error);
            }
            let mut backoff = Duration::from_millis(5);
            items = loop {
                let from = told.map_or(WatchFrom::Now, WatchFrom::After);
                let at = self.link.current.lock().at;
                let opened = tokio::select! {
                    opened = tokio::time::timeout(TO_REOPEN, self.open(from)) => opened,
                    () = feed.closed() => return,
                };
                let opened = opened.unwrap_or_else(|elapsed| {
                    // It may never be up to date: cut off from the others, it does not know.
                    self.link.give_up(at);
                    Err(Error::Unavailable {
                        backend: BACKEND,
                        source: elapsed.into(),
                    })
                });
                match opened {
                    Ok(items) => {
                        listing = from == WatchFrom::Now;
                        break items;
                    }
                    Err(Error::Compacted { .. }) => told = None,
                    Err(Error::Unavailable { source, .. }) => {
                        tracing::debug!(error = %source, "a watch looks for a member");
                    }
                    Err(error) => return feed.fail(error),
                }
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(Duration::from_millis(500));
            };
        }
    }
}

/// What a watch was told, by whichever member.
pub(crate) struct Reader {
    namespace: Namespace,
    picture: Picture,
    /// A stream has told it something, or could have.
    began: bool,
}

impl Reader {
    pub(crate) fn new(namespace: Namespace) -> Self {
        let picture = Picture::default();
        Self {
            namespace,
            picture,
            began: false,
        }
    }

    /// Passes one stream's items on. `Ok` when it broke.
    pub(crate) async fn pass_on(
        &mut self,
        items: &mut Items,
        feed: &Feed,
        told: &mut Option<Revision>,
        listing: &mut bool,
    ) -> Result<()> {
        // The current entries after a gap that the history does not bridge are compared with what was told before.
        let mut current = Vec::new();
        // What belongs together is told together: of a part whose stream broke, the next tells the whole.
        let mut together = Vec::new();
        let again = std::mem::replace(&mut self.began, true);
        while let Ok(Some(response)) = items.message().await {
            match response.item {
                Some(Item::Reset(_)) => {
                    self.picture = Picture::default();
                    *told = None;
                    *listing = true;
                    feed.reset();
                }
                Some(Item::Changes(changes)) if *listing && again => {
                    let entries = changes.events.into_iter().filter_map(|event| event.entry);
                    for entry in entries {
                        current.push(command::entry(&self.namespace, entry)?);
                    }
                }
                Some(Item::Changes(changes)) => {
                    together.extend(changes.events);
                    if changes.more {
                        continue;
                    }
                    let mut events = Vec::new();
                    for event in together.drain(..) {
                        events.extend(self.event(event)?);
                    }
                    if let Some(newest) = events.iter().map(Event::revision).max().filter(|_| !*listing) {
                        *told = Some(newest);
                    }
                    feed.changes(events);
                }
                Some(Item::Synced(revision)) => {
                    if *listing && again {
                        feed.changes(self.picture.replace(std::mem::take(&mut current), Revision(revision)));
                    }
                    *listing = false;
                    *told = Some(Revision(revision));
                    feed.synced(Revision(revision));
                }
                Some(Item::Failure(said)) => match failure(said) {
                    // Of what the member can't tell of any more, the next stream tells how it is now.
                    Error::Unavailable { .. } | Error::Compacted { .. } => return Ok(()),
                    error => return Err(error),
                },
                None => {}
            }
        }
        Ok(())
    }

    /// What an event of the stream is to the reader, who may know it already.
    fn event(&mut self, event: proto::Event) -> Result<Vec<Event>> {
        use proto::event::Kind;
        let (kind, revision) = (event.kind(), Revision(event.revision));
        let entry = command::entry(&self.namespace, event.entry.ok_or_else(not_understood)?)?;
        let cause = match kind {
            Kind::Created => return Ok(self.picture.put(entry)),
            Kind::Updated => {
                let known = self.picture.get(&entry.key).is_some();
                let events = self.picture.put(entry.clone());
                // Begun after a revision, the watch does not know how this key was then; it was there all the same.
                return Ok(if known { events } else { vec![Event::Updated(entry)] });
            }
            Kind::Deleted => registry_api::DeleteCause::Deleted,
            Kind::SessionEnded => registry_api::DeleteCause::SessionEnded,
        };
        match self.picture.get(&entry.key) {
            Some(_) => Ok(self.picture.delete(&entry.key, revision, cause).into_iter().collect()),
            // Begun after a revision, the watch does not know how this key was then; the store knows what it last was.
            None => Ok(vec![Event::Deleted {
                last: entry,
                revision,
                cause,
            }]),
        }
    }
}

/// The items of a watch, as a stream of messages: an empty one first, which says that the watch has begun.
pub(crate) fn to_messages(
    namespace: Namespace,
    watch: Watch,
) -> impl futures_util::Stream<Item = proto::WatchResponse> + Send {
    let begun = futures_util::stream::iter([proto::WatchResponse { item: None }]);
    let items = watch.flat_map(move |item| {
        let items = match item {
            Ok(WatchItem::Reset) => vec![Item::Reset(proto::Unit {})],
            Ok(WatchItem::Synced(revision)) => vec![Item::Synced(revision.0)],
            Ok(WatchItem::Changes(events)) => messages(&namespace, &events),
            Err(error) => vec![Item::Failure(crate::service::said(&error))],
        };
        futures_util::stream::iter(items.into_iter().map(|item| proto::WatchResponse { item: Some(item) }))
    });
    begun.chain(items)
}

/// Changes that belong together, in as many messages as their size takes.
fn messages(namespace: &Namespace, events: &[Event]) -> Vec<Item> {
    let mut parts = vec![proto::Changes::default()];
    let mut bytes = 0;
    for event in events {
        let size = event.key().as_str().len() + event.entry().value.len();
        if bytes + size > MAX_MESSAGE / 4 && bytes > 0 {
            parts.push(proto::Changes::default());
            bytes = 0;
        }
        bytes += size;
        parts
            .last_mut()
            .expect("there is one from the start")
            .events
            .push(message(namespace, event));
    }
    let last = parts.len() - 1;
    let more = |(at, changes): (usize, proto::Changes)| {
        Item::Changes(proto::Changes {
            more: at < last,
            ..changes
        })
    };
    parts.into_iter().enumerate().map(more).collect()
}

fn message(namespace: &Namespace, event: &Event) -> proto::Event {
    use proto::event::Kind;
    let entry = event.entry();
    let kind = match event {
        Event::Created(_) => Kind::Created,
        Event::Updated(_) => Kind::Updated,
        Event::Deleted {
            cause: registry_api::DeleteCause::SessionEnded,
            ..
        } => Kind::SessionEnded,
        Event::Deleted { .. } => Kind::Deleted,
    };
    let entry = proto::Entry {
        key: namespace.qualify(entry.key.as_str()),
        value: entry.value.clone(),
        create_revision: entry.create_revision.0,
        mod_revision: entry.mod_revision.0,
        version: 0,
        session: entry.session.map_or(0, |session| session.0),
    };
    proto::Event {
        kind: kind.into(),
        entry: Some(entry),
        revision: event.revision().0,
    }
}
