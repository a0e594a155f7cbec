//! Elections.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::Stream;

use super::epoch;
use super::opening::read_to_synced;
use super::queue::{Contender, Hold, Queue, QueueKind};
use crate::{
    BootInstant, Condition, Entry, Event, Key, Registry, Result, Revision, SessionId, Token, Watch, WatchItem,
    WatchRequest, WatchScope,
};

/// An election: of the candidates that campaign, one leads at a time, in the order they came (E1).
///
/// Who leads is told by session and token, never by the value published: a restarted process that publishes what its
/// dead predecessor published is another candidate (E5).
///
/// ```no_run
/// # use std::sync::Arc;
/// # use registry_api::{Key, Registry, Result};
/// # async fn example(registry: Arc<dyn Registry>) -> Result<()> {
/// let election = registry.election(&Key::parse("/scheduler")?);
/// let leadership = election.campaign("10.0.0.7:7480").await?;
/// tokio::select! {
///     () = leadership.lost() => println!("somebody else may lead now"),
///     () = work(leadership.token()) => leadership.resign().await?,
/// }
/// # Ok(()) }
/// # async fn work(_: registry_api::Token) {}
/// ```
#[derive(Clone, Debug)]
pub struct Election {
    queue: Queue,
}

impl Election {
    /// The election of that name. Nothing is sent.
    pub fn new(registry: Arc<dyn Registry>, name: &Key) -> Self {
        Self {
            queue: Queue::new(registry, QueueKind::Election, name),
        }
    }

    /// Stands as a candidate with that value and waits to lead.
    ///
    /// # Errors
    /// As [`crate::Lock::acquire`].
    ///
    /// # Cancel safety
    /// Dropping the future withdraws the candidate, at the latest when the session ends (E4).
    pub async fn campaign(&self, value: impl Into<Bytes>) -> Result<Leadership> {
        Ok(Leadership(self.queue.wait(value.into()).await?))
    }

    /// Who leads now.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn leader(&self) -> Result<Option<Leader>> {
        self.queue
            .entries()
            .await?
            .into_iter()
            .next()
            .map(Leader::of)
            .transpose()
    }

    /// The leader, then the other candidates in their order.
    ///
    /// # Errors
    /// As [`Registry::list`].
    pub async fn candidates(&self) -> Result<Vec<Contender>> {
        self.queue.entries().await?.into_iter().map(Contender::of).collect()
    }

    /// Returns the leader now, then each change of leader or of its value (E2). Changes that come faster than they are
    /// read are coalesced; the newest is always delivered, and tokens only grow.
    ///
    /// # Errors
    /// As [`Registry::watch`]; [`crate::Error::Unavailable`] if the store does not answer within the `request_timeout`.
    pub async fn observe(&self) -> Result<Campaign> {
        let registry = &*self.queue.registry;
        let request = WatchRequest::new(self.queue.dir(), WatchScope::Children);
        let mut watch = registry.watch(request).await?;
        let mut candidates = Candidates::default();
        read_to_synced(registry, &mut watch, |item| candidates.apply(item)).await?;
        Ok(Campaign {
            watch,
            candidates,
            told: None,
        })
    }
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// What it published.
    pub value: Bytes,
    /// Its fencing token: larger than that of every earlier leader.
    pub token: Token,
    /// The revision of the value.
    pub mod_revision: Revision,
    /// Its session.
    pub session: Option<SessionId>,
}

impl Leader {
    fn of(entry: Entry) -> Result<Self> {
        Ok(Self {
            token: epoch::token(&entry)?,
            value: entry.value,
            mod_revision: entry.mod_revision,
            session: entry.session,
        })
    }
}

/// The course of an election as an observer sees it. Dropping it ends the watch beneath.
#[derive(Debug)]
pub struct Campaign {
    watch: Watch,
    candidates: Candidates,
    told: Option<Option<Leader>>,
}

/// The candidates that an observer knows, in their order: the first leads.
#[derive(Debug, Default)]
struct Candidates {
    places: BTreeMap<Revision, Entry>,
    /// Whether the present ones were all told.
    synced: bool,
}

impl Candidates {
    fn leader(&self) -> Result<Option<Leader>> {
        self.places.values().next().cloned().map(Leader::of).transpose()
    }

    fn apply(&mut self, item: WatchItem) {
        match item {
            WatchItem::Reset => *self = Self::default(),
            WatchItem::Synced(_) => self.synced = true,
            WatchItem::Changes(events) => events.into_iter().for_each(|event| self.change(event)),
        }
    }

    fn change(&mut self, event: Event) {
        // A candidate that left and returned may have the same key, and the two changes may have come as one.
        self.places.retain(|_, candidate| candidate.key != *event.key());
        if let Event::Created(entry) | Event::Updated(entry) = event {
            self.places.insert(entry.create_revision, entry);
        }
    }
}

impl Campaign {
    /// The next leader or value; `Some(Ok(None))` is the absence of a leader, `None` the end.
    ///
    /// # Errors
    /// As [`Watch::next`].
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn next(&mut self) -> Option<Result<Option<Leader>>> {
        loop {
            let leader = match self.candidates.leader() {
                Ok(leader) => leader,
                Err(error) => return Some(Err(error)),
            };
            if self.candidates.synced && self.told.as_ref() != Some(&leader) {
                self.told = Some(leader.clone());
                return Some(Ok(leader));
            }
            match self.watch.next().await? {
                Err(error) => return Some(Err(error)),
                Ok(item) => self.candidates.apply(item),
            }
        }
    }

    /// The same as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<Option<Leader>>> {
        futures_util::stream::unfold(
            self,
            |mut campaign| async move { Some((campaign.next().await?, campaign)) },
        )
    }
}

/// A leadership that was won.
///
/// Dropping it resigns soon after, in the background, retried until done or the session ends.
#[derive(Debug)]
pub struct Leadership(Hold);

impl Leadership {
    /// The election's name.
    pub fn name(&self) -> &Key {
        self.0.name()
    }

    /// The fencing token: larger than that of every earlier leader of this election.
    pub fn token(&self) -> Token {
        self.0.token()
    }

    /// What a transaction requires so that the store refuses it once the leadership is lost.
    pub fn condition(&self) -> Condition {
        self.0.condition()
    }

    /// Publishes another value; observers are told.
    ///
    /// # Errors
    /// [`crate::Error::HoldLost`] if the leadership is lost: nothing was published. Else as [`Registry::commit`].
    pub async fn publish(&self, value: impl Into<Bytes>) -> Result<Revision> {
        self.0.publish(value.into()).await
    }

    /// Until when the leadership is sure, as known now; `None` if it is lost. Keep-alives move it on.
    pub fn valid_until(&self) -> Option<BootInstant> {
        self.0.valid_until()
    }

    /// Whether the leadership was lost, by the session's clock. It never comes back.
    pub fn is_lost(&self) -> bool {
        self.0.is_lost()
    }

    /// Waits until the leadership is lost: the session ended, or another hand removed the leader's key (E3).
    ///
    /// # Cancel safety
    /// Leaves nothing behind.
    pub async fn lost(&self) {
        self.0.lost().await;
    }

    /// Hands over to the next candidate; done when it returns (E3).
    ///
    /// # Errors
    /// As [`crate::Held::release`].
    ///
    /// # Cancel safety
    /// Dropping the future resigns in the background.
    pub async fn resign(self) -> Result<()> {
        self.0.release().await
    }
}
