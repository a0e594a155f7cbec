//! A watch over gRPC, which goes on from member to member.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use registry_api::watch::{Feed, Picture, feed};
use registry_api::{
    Entry, Error, Event, Namespace, Result, Revision, Watch, WatchFrom, WatchItem, WatchRequest, WatchScope,
};

use super::{PAUSE, Reached, Remote};
use crate::command::{self, not_understood};
use crate::conversation::Items;
use crate::link::{BACKEND, Link, failure, of_question};
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::proto::watch_response::Item;
use crate::service::MAX_LIMIT;
use crate::transport::{CUT, part_len, status_error};

/// How long a watch that lost its member looks for another, and waits until that has begun it, before it tries the next.
const TO_REOPEN: Duration = Duration::from_secs(10);

/// A watch that goes on from member to member.
pub(super) struct WatchStream {
    link: Remote,
    namespace: Namespace,
    request: WatchRequest,
    reader: Arc<Mutex<Reader>>,
}

impl WatchStream {
    /// Begins a watch, and has it go on.
    pub(super) async fn begin(
        link: Remote,
        namespace: Namespace,
        request: WatchRequest,
        patience: Duration,
    ) -> Result<Watch> {
        let (feed, watch) = feed();
        let from = request.from;
        let after = match from {
            WatchFrom::Now => None,
            WatchFrom::After(revision) | WatchFrom::AfterOrReset(revision) => Some(revision),
        };
        let reader = Reader::new(namespace.clone(), feed, after);
        let stream = Self {
            link,
            reader: Arc::new(Mutex::new(reader)),
            namespace,
            request,
        };
        let begun = stream.open(from);
        let no_answer = |_| Error::Unavailable {
            backend: BACKEND,
            source: format!("no member began the watch within {patience:?}").into(),
        };
        let (at, items) = tokio::time::timeout(patience, begun).await.map_err(no_answer)??;
        registry_api::spawn(stream.run(after, at, items));
        Ok(watch)
    }

    /// Opens a stream, and says at which member.
    async fn open(&self, from: WatchFrom) -> Result<(usize, Items)> {
        let Reached { at, conversation, .. } = self.link.connect(TO_REOPEN).await?;
        let request = proto::WatchRequest {
            prefix: self.namespace.qualify(self.request.prefix.as_str()),
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
        let opened = opened.await;
        self.link.home.lock().note(conversation.cluster());
        if self.reader.lock().answered_by(conversation.cluster())
            && let WatchFrom::After(requested) | WatchFrom::AfterOrReset(requested) = from
        {
            // The revision is another cluster's: all is listed again.
            let oldest = requested;
            return Err(Error::Compacted { requested, oldest });
        }
        // The first item says whether the watch could begin; it is an empty one if so.
        match opened {
            Ok((Some(proto::WatchResponse { item: None }), items)) => Ok((at, items)),
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
                Err(of_question(status_error(status)))
            }
        }
    }

    /// Reads what the reader knows who begins after a revision, but for what has changed since, of which the stream tells:
    /// from this it can be told what went, should the history not bridge a gap one day.
    async fn recall(&self, after: Revision) -> Result<()> {
        let mut list = proto::List {
            prefix: self.namespace.qualify(self.request.prefix.as_str()),
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
                let entry = command::entry(&self.namespace, &entry)?;
                if entry.mod_revision <= after && self.request.wants(&entry.key) {
                    self.reader.lock().picture.put(entry);
                }
            }
            if !page.more || self.request.scope == WatchScope::Key {
                return Ok(());
            }
        }
    }

    /// Passes the changes on until the reader is gone, over as many streams as it takes. What the reader knows is read first,
    /// however long that takes.
    async fn run(mut self, after: Option<Revision>, mut at: usize, mut items: Items) {
        let gone = self.reader.lock().feed.closed();
        let passing = async {
            if let Some(after) = after
                && let Err(error) = self.recall(after).await
            {
                return error;
            }
            self.pass_on_all(&mut at, &mut items).await
        };
        tokio::select! {
            error = passing => self.reader.lock().feed.fail(error),
            () = gone => {}
        }
    }

    /// Passes the changes on until something goes wrong that no other member mends.
    async fn pass_on_all(&mut self, at: &mut usize, items: &mut Items) -> Error {
        loop {
            if let Err(error) = pass_on(&self.reader, items).await {
                return error;
            }
            if std::mem::take(&mut self.reader.lock().unavailable) {
                self.link.pass_by(*at);
            }
            let mut backoff = Duration::from_millis(5);
            (*at, *items) = loop {
                let from = self.reader.lock().told.map_or(WatchFrom::Now, WatchFrom::After);
                let current = self.link.current.lock().at;
                let opened = tokio::time::timeout(TO_REOPEN, self.open(from)).await;
                let opened = opened.unwrap_or_else(|elapsed| {
                    // It may never be up to date: cut off from the others, it does not know.
                    self.link.give_up(current);
                    Err(Error::Unavailable {
                        backend: BACKEND,
                        source: elapsed.into(),
                    })
                });
                match opened {
                    Ok(opened) => break opened,
                    Err(Error::Compacted { .. }) => self.reader.lock().told = None,
                    // The store does not know the revision yet that it told: it is not what it was.
                    Err(Error::InvalidRequest(reason)) if from != WatchFrom::Now => {
                        tracing::warn!(reason, "a watch lists all again");
                        self.reader.lock().went_back();
                    }
                    Err(Error::Unavailable { source, .. }) => {
                        tracing::debug!(error = %source, "a watch looks for a member");
                    }
                    Err(error) => return error,
                }
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(Duration::from_millis(500));
            };
        }
    }
}

/// Passes one stream's items on. `Ok` when it broke.
pub(crate) async fn pass_on(reader: &Arc<Mutex<Reader>>, items: &mut Items) -> Result<()> {
    reader.lock().begin();
    while let Ok(Some(response)) = items.message().await {
        let (goes_on, listing) = {
            let mut reader = reader.lock();
            (reader.take(&response), reader.listing)
        };
        if !goes_on {
            break;
        }
        // The entries that there are may be many to compare; from then on, what comes is little at a time, and goes to who
        // reads the watch with nobody between.
        if !listing {
            let reader = reader.clone();
            items.hear(move |response| reader.lock().take(response));
        }
    }
    reader.lock().failed.take().map_or(Ok(()), Err)
}

/// What a watch was told, by whichever member, and who is told of it.
pub(crate) struct Reader {
    namespace: Namespace,
    feed: Feed,
    picture: Picture,
    /// What is told comes after this revision; none as long as the first current entries are not all told.
    told: Option<Revision>,
    /// A stream has told it something, or could have.
    began: bool,
    /// The stream tells the current entries, up to `Synced`.
    listing: bool,
    /// Those so far, after a gap that the history does not bridge: they are compared with what was told before.
    current: Option<Vec<Entry>>,
    /// What belongs together is told together: of a part whose stream broke, the next tells the whole.
    together: Vec<proto::Event>,
    /// What no other member mends.
    failed: Option<Error>,
    /// Whether the member that the stream came from can't tell of anything now.
    unavailable: bool,
    /// The cluster of the member that the stream comes from.
    cluster: Option<[u8; 16]>,
    /// The store is not the one that told what is known: the next listing is compared with that by equality.
    moved: bool,
}

impl Reader {
    pub(crate) fn new(namespace: Namespace, feed: Feed, told: Option<Revision>) -> Self {
        Self {
            namespace,
            feed,
            picture: Picture::default(),
            told,
            began: false,
            listing: false,
            current: None,
            together: Vec::new(),
            failed: None,
            unavailable: false,
            cluster: None,
            moved: false,
        }
    }

    /// The revision that the next stream begins after.
    #[cfg(test)]
    pub(crate) fn reported(&self) -> Option<Revision> {
        self.told
    }

    /// Takes note of the cluster that answers, and says whether it is another than before.
    fn answered_by(&mut self, cluster: Option<[u8; 16]>) -> bool {
        let another = cluster.is_some() && self.cluster.is_some() && self.cluster != cluster;
        if another {
            self.went_back();
        }
        self.cluster = cluster.or(self.cluster);
        another
    }

    /// The store was restored, or is a new one: its revisions are not those that were told.
    fn went_back(&mut self) {
        self.told = None;
        self.moved = true;
    }

    /// A stream begins, with what comes after that which was told.
    pub(crate) fn begin(&mut self) {
        self.listing = self.told.is_none();
        let again = std::mem::replace(&mut self.began, true);
        self.current = (self.listing && again).then(Vec::new);
        self.together.clear();
    }

    /// Takes the next item, and says whether the stream is of any more use.
    pub(crate) fn take(&mut self, response: &proto::WatchResponse) -> bool {
        self.pass_on(response).unwrap_or_else(|error| {
            self.failed = Some(error);
            false
        })
    }

    fn pass_on(&mut self, response: &proto::WatchResponse) -> Result<bool> {
        match &response.item {
            Some(Item::Reset(_)) => {
                self.picture = Picture::default();
                self.current = None;
                self.told = None;
                self.listing = true;
                self.feed.reset();
            }
            Some(Item::Changes(changes)) => match &mut self.current {
                Some(current) => {
                    for entry in changes.events.iter().filter_map(|event| event.entry.as_ref()) {
                        current.push(command::entry(&self.namespace, entry)?);
                    }
                }
                None => self.changes(changes)?,
            },
            Some(Item::Synced(revision)) => {
                let revision = Revision(*revision);
                if let Some(current) = self.current.take() {
                    let events = match std::mem::take(&mut self.moved) {
                        true => self.picture.resync(current, revision),
                        false => self.picture.replace(current, revision),
                    };
                    self.feed.changes(events);
                }
                self.listing = false;
                // A stream that was cut while its events waited to be coalesced may mark what was reported before.
                let told = self.told.map_or(revision, |told| told.max(revision));
                self.told = Some(told);
                self.feed.synced(told);
            }
            Some(Item::Failure(said)) => match failure(said.clone()) {
                // Of what the member can't tell of any more, the next stream tells how it is now.
                Error::Compacted { .. } => return Ok(false),
                Error::Unavailable { .. } => {
                    self.unavailable = true;
                    return Ok(false);
                }
                error => return Err(error),
            },
            None => {}
        }
        Ok(true)
    }

    fn changes(&mut self, changes: &proto::Changes) -> Result<()> {
        if changes.more {
            self.together.extend_from_slice(&changes.events);
            return Ok(());
        }
        let mut events = Vec::new();
        for event in std::mem::take(&mut self.together).iter().chain(&changes.events) {
            events.extend(self.event(event)?);
        }
        if let Some(newest) = events.iter().map(Event::revision).max().filter(|_| !self.listing) {
            self.told = Some(newest);
        }
        self.feed.changes(events);
        Ok(())
    }

    /// What an event of the stream is to the reader, who may know it already.
    fn event(&mut self, event: &proto::Event) -> Result<Vec<Event>> {
        use proto::event::Kind;
        let (kind, revision) = (event.kind(), Revision(event.revision));
        let entry = command::entry(&self.namespace, event.entry.as_ref().ok_or_else(not_understood)?)?;
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

impl From<Item> for proto::WatchResponse {
    fn from(item: Item) -> Self {
        Self { item: Some(item) }
    }
}

/// An item of a watch, in as many messages as its size takes.
pub(crate) fn to_messages(namespace: &Namespace, item: Result<WatchItem>) -> Vec<proto::WatchResponse> {
    let items = match item {
        Ok(WatchItem::Reset) => vec![Item::Reset(proto::Unit {})],
        Ok(WatchItem::Synced(revision)) => vec![Item::Synced(revision.0)],
        Ok(WatchItem::Changes(events)) => messages(namespace, &events),
        Err(error) => vec![Item::Failure(crate::service::said(&error))],
    };
    items.into_iter().map(Into::into).collect()
}

/// Changes that belong together, in as many messages as their size takes.
fn messages(namespace: &Namespace, events: &[Event]) -> Vec<Item> {
    let mut parts = Vec::new();
    let (mut part, mut bytes) = (proto::Changes::default(), 0);
    for event in events {
        let event = message(namespace, event);
        let size = part_len(&event);
        if bytes + size > CUT && bytes > 0 {
            part.more = true;
            parts.push(Item::Changes(std::mem::take(&mut part)));
            bytes = 0;
        }
        bytes += size;
        part.events.push(event);
    }
    parts.push(Item::Changes(part));
    parts
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

#[cfg(test)]
mod tests {
    use prost::Message;
    use registry_api::{DeleteCause, Key, SessionId};

    use super::*;

    /// Events are cut by what they take on the wire: here the namespace is most of it.
    #[test]
    fn changes_are_cut_by_their_encoded_size() {
        let namespace = Namespace::parse(&format!("/{}", "n".repeat(255))).unwrap();
        let event = |n: u64, value: usize| {
            let last = Entry {
                key: Key::parse(&format!("/{n}")).unwrap(),
                value: vec![0; value].into(),
                create_revision: Revision(u64::MAX - n),
                mod_revision: Revision(u64::MAX),
                session: Some(SessionId(u64::MAX)),
            };
            Event::Deleted {
                last,
                revision: Revision(u64::MAX),
                cause: DeleteCause::SessionEnded,
            }
        };
        for (count, value) in [(40_000, 0), (10, 900_000), (3, 700_000), (1, 900_000), (0, 0)] {
            let events: Vec<_> = (0..count).map(|n| event(n, value)).collect();
            let parts = messages(&namespace, &events);
            let last = parts.len() - 1;
            let mut told = 0;
            for (at, part) in parts.into_iter().enumerate() {
                let Item::Changes(changes) = &part else {
                    panic!("{part:?}");
                };
                assert_eq!(changes.more, at < last, "of {count}, part {at} of {last}");
                told += changes.events.len() as u64;
                let bytes = proto::WatchResponse::from(part).encoded_len();
                assert!(bytes <= CUT + 16, "{count} events: {bytes} bytes");
            }
            assert_eq!(told, count);
        }
    }
}
