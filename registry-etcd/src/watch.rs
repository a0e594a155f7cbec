//! Watches: what is there, then every change, over whatever happens to the connection.
//!
//! A watch lists what it covers at one revision, then follows etcd's own watch from there. When that breaks, it is
//! resumed from the last revision that was told, so no change is left out; when that revision is compacted meanwhile,
//! it lists again and tells the difference to its [`Picture`].
//!
//! One range holds a key and all below it, so that what changed in one transaction comes in one piece: from `/a` to
//! `/a0`. What else lies in it, such as `/a.b`, is passed over here.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use etcd_client::proto::PbEvent;
use etcd_client::{EventType, WatchOptions};
use registry_api::watch::{Feed, Picture, feed};
use registry_api::{
    DeleteCause, Entry, Error, Event, Key, Prefix, Result, Revision, SessionState, Watch, WatchFrom, WatchRequest,
    WatchScope,
};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, timeout, timeout_at};

use crate::error;
use crate::history::Point;
use crate::link::{Backoff, MAX_ANSWER, Member};
use crate::names::{after, revision};
use crate::range::Values;
use crate::store::Store;
use crate::stream::Stream;

/// Begins a watch.
pub(crate) async fn start(
    store: &Arc<Store>,
    request: WatchRequest,
    mut states: Receiver<SessionState>,
) -> Result<Watch> {
    if let WatchFrom::After(revision) = request.from {
        check_kept(store, &request, revision).await?;
    }
    let (feed, watch) = feed();
    let mut watcher = Watcher {
        store: store.clone(),
        request,
        picture: Picture::default(),
        told: Revision(0),
        history: store.history.now(),
    };
    registry_api::spawn(async move {
        let error = tokio::select! {
            error = watcher.run(&feed) => error,
            () = feed.closed() => return,
            // An error says that the handle is gone.
            _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => return,
        };
        feed.fail(error);
    });
    Ok(watch)
}

/// Checks that a watch can start after a revision.
async fn check_kept(store: &Store, request: &WatchRequest, after: Revision) -> Result<()> {
    let deadline = store.deadline();
    let key = WatchRequest {
        scope: WatchScope::Key,
        ..request.clone()
    };
    let (_, now) = store.reader(deadline).covered(&key, 0, Values::Omitted).await?;
    if after > now {
        return Err(Error::InvalidRequest(format!(
            "a watch can't start after revision {after}, which is still to come: it is {now} now"
        )));
    }
    match store.reader(deadline).covered(&key, past(after), Values::Omitted).await {
        Err(Error::Compacted { .. }) => Err(Error::Compacted {
            requested: after,
            oldest: oldest(store, deadline).await?,
        }),
        covered => covered.map(drop),
    }
}

/// The oldest revision that is kept. Only a watch that asks for an older one is told.
async fn oldest(store: &Store, deadline: Instant) -> Result<Revision> {
    let member = store.streams.member(deadline).await?;
    let ask = async {
        let (name, options) = (
            store.names.below(&Prefix::root()).start,
            WatchOptions::new().with_start_revision(1),
        );
        let mut stream = member
            .client
            .watch_client()
            .watch(name, Some(options))
            .await
            .map_err(error::read)?;
        while let Some(response) = stream.message().await.map_err(error::read)? {
            if response.0.compact_revision > 0 {
                return Ok(revision(response.0.compact_revision));
            }
        }
        Err(error::unavailable(error::Trouble::StreamEnded))
    };
    timeout_at(deadline, ask)
        .await
        .unwrap_or_else(|_| Err(error::unavailable(member.silent())))
}

/// One watch, apart from its reader.
struct Watcher {
    store: Arc<Store>,
    request: WatchRequest,
    /// What the reader was told.
    picture: Picture,
    /// Every change up to this revision was told.
    told: Revision,
    /// The history of the store that this is a revision of.
    history: Point,
}

/// Why a stream is followed no longer.
enum Broken {
    /// The next may do better.
    Stream,
    /// What it was to tell next is compacted.
    Compacted,
}

/// What was there after a gap, of what is not told yet: when nothing is left, the gap is bridged.
struct Missing {
    at: Revision,
    puts: HashMap<Key, Revision>,
    deletes: HashMap<Key, Revision>,
}

impl Watcher {
    /// Ends with what no patience mends.
    async fn run(&mut self, feed: &Feed) -> Error {
        match self.try_run(feed).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    async fn try_run(&mut self, feed: &Feed) -> Result<std::convert::Infallible> {
        let mut missing = self.begin(feed).await?;
        let mut backoff = Backoff::default();
        loop {
            let told = self.told;
            match self.follow(feed, &mut missing).await? {
                Broken::Compacted => {
                    self.list(feed).await?;
                    missing = None;
                }
                Broken::Stream => {
                    if self.told > told {
                        backoff = Backoff::default();
                    }
                    backoff.wait().await;
                    missing = self.resume(feed).await?;
                }
            }
        }
    }

    /// Brings the reader up to where the stream is to begin, and says what it is still to be told from there.
    async fn begin(&mut self, feed: &Feed) -> Result<Option<Missing>> {
        let (WatchFrom::After(after) | WatchFrom::AfterOrReset(after)) = self.request.from else {
            self.list(feed).await?;
            return Ok(None);
        };
        match self.covered(past(after), Values::Wanted).await {
            Ok((entries, _)) => {
                // The reader knows this: it is what deletes are told from.
                self.picture.replace(entries, after);
                self.told = after;
                self.resume(feed).await
            }
            Err(Error::Compacted { .. }) if self.request.from == WatchFrom::AfterOrReset(after) => {
                feed.reset();
                self.list(feed).await?;
                Ok(None)
            }
            Err(Error::Compacted { .. }) => Err(Error::Compacted {
                requested: after,
                oldest: oldest(&self.store, self.store.deadline()).await?,
            }),
            Err(error) => Err(error),
        }
    }

    /// Tells how what is there now differs from what was told.
    async fn list(&mut self, feed: &Feed) -> Result<()> {
        let (entries, at) = self.present(Values::Wanted).await?;
        let events = match self.has_gone_back(at) {
            false => self.picture.replace(entries, at),
            true => self.go_back(entries, at),
        };
        feed.changes(events);
        self.synced(feed, at);
        Ok(())
    }

    /// What the stream is still to tell of a gap; what is lost for good where the store went back.
    async fn resume(&mut self, feed: &Feed) -> Result<Option<Missing>> {
        let (entries, at) = self.present(Values::Omitted).await?;
        if self.has_gone_back(at) {
            self.list(feed).await?;
            return Ok(None);
        }
        Ok(Some(Missing::new(&self.picture, entries, at)))
    }

    /// Whether the store, of which `at` is the present revision, is not the one that was told of, or has lost changes.
    fn has_gone_back(&self, at: Revision) -> bool {
        at < self.told || self.store.history.now().number != self.history.number
    }

    /// Begins with another history: everything in which it differs is told as deleted, and as created where there is
    /// something. Revisions of the two can't be compared.
    fn go_back(&mut self, entries: Vec<Entry>, at: Revision) -> Vec<Event> {
        tracing::warn!(from = %self.told, to = %at, prefix = %self.request.prefix, "etcd went back: a watch starts over");
        let now: HashMap<_, _> = entries.iter().map(|entry| (&entry.key, entry)).collect();
        let lost = self
            .picture
            .entries()
            .filter(|known| now.get(&known.key) != Some(known));
        let deleted = lost.map(|last| Event::Deleted {
            last: last.clone(),
            revision: at,
            cause: DeleteCause::Unknown,
        });
        let news = entries
            .iter()
            .filter(|entry| self.picture.get(&entry.key) != Some(entry));
        let events = deleted.chain(news.cloned().map(Event::Created)).collect();
        self.picture = Picture::default();
        self.picture.replace(entries, at);
        self.told = at;
        self.history = self.store.history.now();
        events
    }

    fn synced(&mut self, feed: &Feed, at: Revision) {
        self.told = self.told.max(at);
        self.store.history.saw(self.history, self.told);
        feed.synced(self.told);
    }

    /// Everything that is covered, as of now.
    async fn present(&self, values: Values) -> Result<(Vec<Entry>, Revision)> {
        loop {
            let since = self.store.history.now();
            match self.covered(0, values).await {
                // Compacted while it was read, page by page.
                Err(Error::Compacted { .. }) => {}
                covered => {
                    let (entries, at) = covered?;
                    self.store.history.confirmed(since, at);
                    return Ok((entries, at));
                }
            }
        }
    }

    /// Everything that is covered at a revision, or, for zero, now.
    async fn covered(&self, at: i64, values: Values) -> Result<(Vec<Entry>, Revision)> {
        self.store.patient_reader().covered(&self.request, at, values).await
    }

    /// Follows etcd's watch until it breaks.
    async fn follow(&mut self, feed: &Feed, missing: &mut Option<Missing>) -> Result<Broken> {
        self.bridge(feed, missing);
        let member = match self.store.streams.member(self.store.deadline()).await {
            Ok(member) => member,
            Err(Error::Unavailable { .. }) => return Ok(Broken::Stream),
            Err(error) => return Err(error),
        };
        if self.store.history.now().number != self.history.number {
            return Ok(Broken::Stream);
        }
        let broken = match self.open(&member).await {
            Some(mut stream) => loop {
                let response = stream.next(self.store.request_timeout).await;
                if self.store.history.now().number != self.history.number {
                    break Broken::Stream;
                }
                match response {
                    Some(response) if response.canceled && response.compact_revision > 0 => break Broken::Compacted,
                    Some(response) if !response.canceled => {
                        for (at, events) in stream.complete(response) {
                            self.tell(feed, missing, at, events);
                        }
                    }
                    Some(_) | None => break Broken::Stream,
                }
            },
            None => Broken::Stream,
        };
        if matches!(broken, Broken::Stream) {
            // Whatever it was, a lost connection, a lost leader or a token that expired, another member is as good.
            member.suspect();
        }
        Ok(broken)
    }

    async fn open(&self, member: &Member) -> Option<Stream> {
        let range = self.range();
        // From the last revision that was told, not from the one after: some versions of etcd leave out deletes made at
        // the very revision that is compacted (etcd issues 18089 and 19179).
        let options = WatchOptions::new()
            .with_range(range.end)
            .with_start_revision(at(self.told).max(1))
            .with_fragment();
        let mut client = member.client.watch_client().max_decoding_message_size(MAX_ANSWER);
        let opened = timeout(self.store.request_timeout, client.watch(range.start, Some(options))).await;
        match opened.ok()? {
            Ok(stream) => Some(Stream::new(stream)),
            Err(error) => {
                tracing::debug!(%error, endpoint = member.endpoint, "a watch can't be opened");
                None
            }
        }
    }

    fn range(&self) -> Range<Vec<u8>> {
        let (names, prefix) = (&self.store.names, &self.request.prefix);
        let below = names.below(prefix);
        match (self.request.scope, names.prefix(prefix)) {
            (WatchScope::Key, Some(name)) => name.clone()..after(name),
            (WatchScope::Subtree, Some(name)) => name..below.end,
            (WatchScope::Children, _) | (_, None) => below,
        }
    }

    /// Tells the changes of one revision.
    fn tell(&mut self, feed: &Feed, missing: &mut Option<Missing>, at: Revision, events: Vec<PbEvent>) {
        if at <= self.told {
            return;
        }
        if missing.as_ref().is_some_and(|missing| missing.at < at) {
            // In order, so all that came before is told.
            let before = missing.take().map_or(self.told, |missing| missing.at);
            self.synced(feed, before);
        }
        feed.changes(events.into_iter().flat_map(|event| self.event(event, at)).collect());
        self.told = at;
        self.store.history.saw(self.history, at);
        self.bridge(feed, missing);
    }

    fn event(&mut self, event: PbEvent, at: Revision) -> Vec<Event> {
        let deleted = event.r#type == EventType::Delete as i32;
        let Some(stored) = event.kv else {
            return Vec::new();
        };
        let Some(key) = self
            .store
            .names
            .parse(&stored.key)
            .filter(|key| self.request.wants(key))
        else {
            return Vec::new();
        };
        if deleted {
            // A lease that ends deletes its keys like anybody else does.
            let cause = match self.picture.get(&key).map(|entry| entry.session) {
                Some(None) => DeleteCause::Deleted,
                _ => DeleteCause::Unknown,
            };
            return self.picture.delete(&key, at, cause).into_iter().collect();
        }
        self.store
            .names
            .entry(stored)
            .map_or_else(Vec::new, |entry| self.picture.put(entry))
    }

    /// Says so when a gap is bridged.
    fn bridge(&mut self, feed: &Feed, missing: &mut Option<Missing>) {
        let picture = &self.picture;
        if let Some(missing) = missing {
            missing
                .puts
                .retain(|key, put| picture.get(key).is_none_or(|known| known.mod_revision < *put));
            missing
                .deletes
                .retain(|key, last| picture.get(key).is_some_and(|known| known.mod_revision == *last));
        }
        let bridged = missing.take_if(|missing| missing.puts.is_empty() && missing.deletes.is_empty());
        if let Some(bridged) = bridged {
            // What came and went in the gap may still follow; it is older than this, and passed over.
            self.synced(feed, bridged.at);
        }
    }
}

impl Missing {
    fn new(told: &Picture, entries: Vec<Entry>, at: Revision) -> Self {
        let puts: HashMap<_, _> = entries
            .into_iter()
            .map(|entry| (entry.key, entry.mod_revision))
            .collect();
        let gone = told.entries().filter(|entry| !puts.contains_key(&entry.key));
        let deletes = gone.map(|entry| (entry.key.clone(), entry.mod_revision)).collect();
        Self { at, puts, deletes }
    }
}

/// Returns the revision to read the past at. Revision 1 is etcd's empty store; 0 would read the present.
fn past(revision: Revision) -> i64 {
    at(revision).max(1)
}

/// A revision as etcd takes it.
fn at(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}
