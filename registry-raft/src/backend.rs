//! The handle: the trait over a link.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt;
use parking_lot::Mutex;
use registry_api::{
    Capabilities, Committed, Depth, Entry, Error, Health, Key, List, Namespace, Options, Page, Prefix, Read, Registry,
    Result, Revision, Session, SessionId, Txn, Watch, WatchRequest,
};

use crate::command::{self, Change, Command, Outcome, not_understood};
use crate::link::{BACKEND, Gone, Link, of_question};
use crate::member::Member;
use crate::proto;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::service::MAX_LIMIT;
use crate::session::Sessions;

const CAPABILITIES: Capabilities = Capabilities {
    backend: BACKEND,
    every_change: true,
    watch_from_revision: true,
    consistent_pages: true,
    tells_expiry: true,
    atomic_expiry: true,
    atomic_delete_prefix: true,
    fresh_create_revision: true,
    reuses_names: true,
    stale_without_quorum: true,
    lists_along: true,
    max_children: None,
};

/// The longest pause between two tries of one request.
const MAX_BACKOFF: Duration = Duration::from_millis(50);

/// A handle on the members of a group, whichever link it holds.
#[derive(Debug)]
pub(crate) struct RaftRegistry {
    link: Arc<dyn Link>,
    options: Options,
    session: Session,
    sequences: Mutex<Sequences>,
    /// The newest revision that a read or a commit has returned: no later read goes back behind it, whichever member answers.
    seen: Mutex<Seen>,
    /// The member that was started for this handle, and stops with it.
    member: Mutex<Option<Member>>,
}

/// A revision, and the cluster that it is of.
#[derive(Debug, Default)]
struct Seen {
    of: Option<[u8; 16]>,
    revision: u64,
    /// How often another cluster answered at a lower revision.
    rollbacks: u64,
}

impl Seen {
    /// Whether the cluster that answers may be the one that the revision is of.
    fn is_of(&self, cluster: Option<[u8; 16]>) -> bool {
        self.of == cluster || self.of.is_none() || cluster.is_none()
    }
}

impl RaftRegistry {
    pub(crate) async fn open(link: Arc<dyn Link>, options: &Options) -> Result<Self> {
        let sessions = Arc::new(Sessions::new(link.apart(), options));
        let session = Session::open(BACKEND, sessions, options.connect_timeout).await?;
        Ok(Self {
            link,
            options: options.clone(),
            session,
            sequences: Mutex::default(),
            seen: Mutex::default(),
            member: Mutex::default(),
        })
    }

    /// Makes the handle the owner of its member.
    pub(crate) fn owning(self, member: Member) -> Self {
        *self.member.lock() = Some(member);
        self
    }

    fn namespace(&self) -> &Namespace {
        &self.options.namespace
    }

    fn qualify(&self, name: &str) -> String {
        self.namespace().qualify(name)
    }

    fn deadline(&self) -> Deadline {
        Deadline {
            until: Instant::now() + self.options.request_timeout,
        }
    }

    /// Asks a question that changes nothing, again while nobody can answer and there is time.
    async fn ask(&self, call: Call) -> Result<Answer> {
        self.session.check_open()?;
        let deadline = self.deadline();
        let mut backoff = Backoff::default();
        loop {
            match self.link.call(call.clone(), deadline.left()).await {
                Err(Error::Unavailable { .. } | Error::OutcomeUnknown { .. }) if backoff.within(&deadline) => {
                    backoff.wait().await;
                }
                answered => {
                    self.end_with_its_cluster();
                    if let Ok(answer) = &answered {
                        self.note(revision(answer));
                    }
                    return answered.map_err(of_question);
                }
            }
        }
    }

    /// Lists once that is gone; `None` if the page is too large to come along. A wait that breaks off goes on with whoever
    /// answers.
    async fn once_gone(&self, gone: Gone) -> Result<Option<proto::Page>> {
        self.session.check_open()?;
        let (mut deadline, mut backoff) = (self.deadline(), Backoff::default());
        loop {
            match self.link.once_gone(gone.clone(), deadline.left()).await {
                Err(Error::OutcomeUnknown { .. }) => deadline = self.deadline(),
                Err(Error::Unavailable { .. }) if backoff.within(&deadline) => {}
                done => return done,
            }
            backoff.wait().await;
        }
    }

    /// The newest revision that this handle has seen; nothing of a cluster that is not there any more.
    fn seen(&self) -> u64 {
        let (seen, cluster) = (self.seen.lock(), self.link.cluster());
        if seen.is_of(cluster) { seen.revision } else { 0 }
    }

    /// Gives the session up if another cluster answers now than the one that opened it.
    fn end_with_its_cluster(&self) {
        if let Some(session) = self.link.ended() {
            self.session.told_expired(session);
        }
    }

    /// Takes note of a revision that was returned.
    fn note(&self, revision: u64) {
        let (mut seen, of) = (self.seen.lock(), self.link.cluster());
        if seen.is_of(of) {
            seen.revision = seen.revision.max(revision);
        } else {
            seen.rollbacks += u64::from(revision < seen.revision);
            seen.revision = revision;
        }
        seen.of = of;
    }

    async fn commit_along(&self, txn: Txn, list: Option<proto::List>) -> Result<(Committed, Option<proto::Page>)> {
        txn.check()?;
        let change = Change::Txn(command::txn_to_proto(self.namespace(), &txn));
        let (outcome, page) = self.change(change, list, txn.needs_session()).await?;
        let committed = command::txn_result(self.namespace(), &txn, outcome)?;
        // A stale read at another member does not miss it.
        self.note(committed.revision.0);
        Ok((committed, page))
    }

    fn listing(&self, list: &List) -> Result<proto::List> {
        if list.limit == 0 {
            return Err(Error::InvalidRequest("a page of no entries".into()));
        }
        Ok(proto::List {
            prefix: self.qualify(list.prefix.as_str()),
            children_only: list.depth == Depth::Children,
            limit: (list.limit as u64).min(MAX_LIMIT),
            after: list
                .after
                .as_ref()
                .map_or_else(String::new, |key| self.qualify(key.as_str())),
            stale: list.read == Read::Stale,
            at_least: self.seen(),
        })
    }

    fn page(&self, page: proto::Page) -> Result<Page> {
        self.note(page.revision);
        let entries = page
            .entries
            .into_iter()
            .map(|entry| command::entry(self.namespace(), &entry));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let next = entries.last().filter(|_| page.more).map(|entry| entry.key.clone());
        Ok(Page {
            entries,
            next,
            revision: Revision(page.revision),
        })
    }

    /// Carries out a change once, whatever happens to each try: the members remember what (session, sequence) did.
    /// Lists then, if that can come along.
    async fn change(
        &self,
        change: Change,
        list: Option<proto::List>,
        needs_session: bool,
    ) -> Result<(Outcome, Option<proto::Page>)> {
        self.session.check_open()?;
        let deadline = self.deadline();
        let mut backoff = Backoff::default();
        loop {
            let session = match self.session.live() {
                Ok(session) => session,
                Err(error @ Error::SessionExpired { .. }) if needs_session => return Err(error),
                Err(error @ Error::SessionExpired { .. }) => match backoff.within(&deadline) {
                    true => {
                        backoff.wait().await;
                        continue;
                    }
                    false => {
                        return Err(Error::Unavailable {
                            backend: BACKEND,
                            source: error.into(),
                        });
                    }
                },
                Err(error) => return Err(error),
            };
            match self
                .change_under(session, &change, list.as_ref(), &deadline, &mut backoff)
                .await
            {
                // It was refused for its session alone; what needs none is asked again under the next.
                Err(Error::SessionExpired { .. }) if !needs_session => {}
                done => return done,
            }
        }
    }

    async fn change_under(
        &self,
        session: SessionId,
        change: &Change,
        list: Option<&proto::List>,
        deadline: &Deadline,
        backoff: &mut Backoff,
    ) -> Result<(Outcome, Option<proto::Page>)> {
        let sequence = Sequence::next(&self.sequences);
        let mut unknown = None;
        loop {
            let command = Command {
                session: session.0,
                sequence: sequence.number,
                answered_below: sequence.answered_below(),
                level: 0,
                change: Some(change.clone()),
            };
            let asked = self.link.command_then_list(command, list.cloned(), deadline.left());
            let answered = asked.await;
            self.end_with_its_cluster();
            match answered {
                Ok((reply, page)) => match (reply.result.ok_or_else(not_understood)?, unknown) {
                    (Outcome::SessionExpired(_), Some(unknown)) => {
                        // An earlier try may have been carried out before the session went.
                        self.session.told_expired(session);
                        return Err(unknown);
                    }
                    (Outcome::SessionExpired(_), None) => {
                        self.session.told_expired(session);
                        return Err(Error::SessionExpired { session });
                    }
                    // Nothing was done: there is room again when what went before is answered.
                    (Outcome::Crowded(most), unknown) if !backoff.within(deadline) => {
                        return Err(unknown.unwrap_or_else(|| crowded(most)));
                    }
                    (Outcome::Crowded(_), before) => unknown = before,
                    (outcome, _) => return Ok((outcome, page)),
                },
                Err(error @ Error::OutcomeUnknown { .. }) => unknown = Some(error),
                Err(error @ Error::Unavailable { .. }) if !backoff.within(deadline) => {
                    return Err(unknown.unwrap_or(error));
                }
                Err(Error::Unavailable { .. }) => {}
                Err(error) => return Err(unknown.unwrap_or(error)),
            }
            if !backoff.within(deadline) {
                return Err(unknown.unwrap_or_else(not_understood));
            }
            backoff.wait().await;
        }
    }
}

#[async_trait]
impl Registry for RaftRegistry {
    fn capabilities(&self) -> &Capabilities {
        &CAPABILITIES
    }

    fn session(&self) -> &Session {
        &self.session
    }

    fn rollbacks(&self) -> u64 {
        self.seen.lock().rollbacks
    }

    async fn get(&self, key: &Key, read: Read) -> Result<Option<Entry>> {
        let get = proto::Get {
            key: self.qualify(key.as_str()),
            stale: read == Read::Stale,
            at_least: self.seen(),
        };
        match self.ask(Call::Get(get)).await? {
            Answer::Get(answer) => answer
                .entry
                .map(|entry| command::entry(self.namespace(), &entry))
                .transpose(),
            _ => Err(not_understood()),
        }
    }

    async fn list(&self, list: List) -> Result<Page> {
        match self.ask(Call::List(self.listing(&list)?)).await? {
            Answer::Page(page) => self.page(page),
            _ => Err(not_understood()),
        }
    }

    async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>> {
        let mut call = proto::Children {
            prefix: self.qualify(prefix.as_str()),
            stale: read == Read::Stale,
            at_least: self.seen(),
            from: String::new(),
        };
        // A child with keys below it may come on two pages, and out of order: `/b!` sorts before `/b/x`.
        let mut names = BTreeSet::new();
        loop {
            let Answer::Children(answer) = self.ask(Call::Children(call.clone())).await? else {
                return Err(not_understood());
            };
            if names.is_empty() && answer.next.is_empty() {
                return Ok(answer.names);
            }
            names.extend(answer.names);
            if answer.next.is_empty() {
                return Ok(names.into_iter().collect());
            }
            call.from = answer.next;
            // The next page is not older than this one.
            call.at_least = self.seen();
        }
    }

    async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64> {
        let call = proto::Count {
            prefix: self.qualify(prefix.as_str()),
            stale: read == Read::Stale,
            at_least: self.seen(),
        };
        match self.ask(Call::Count(call)).await? {
            Answer::Count(answer) => Ok(answer.count),
            _ => Err(not_understood()),
        }
    }

    async fn commit(&self, txn: Txn) -> Result<Committed> {
        self.commit_along(txn, None).await.map(|(committed, _)| committed)
    }

    async fn commit_and_list(&self, txn: Txn, list: List) -> Result<(Committed, Option<Page>)> {
        let (committed, page) = self.commit_along(txn, Some(self.listing(&list)?)).await?;
        let page = match page {
            Some(page) => self.page(page),
            None => self.list(list).await,
        };
        Ok((committed, page.ok()))
    }

    async fn list_once_gone(&self, key: &Key, created: Revision, list: List) -> Result<Page> {
        let gone = Gone {
            namespace: self.namespace().clone(),
            key: key.clone(),
            created,
            list: self.listing(&list)?,
        };
        let page = tokio::select! {
            page = self.once_gone(gone) => page?,
            () = closed(&self.session) => return Err(Error::Closed),
        };
        match page {
            Some(page) => self.page(page),
            None => self.list(list).await,
        }
    }

    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        let change = Change::DeletePrefix(self.qualify(prefix.as_str()));
        match self.change(change, None, false).await? {
            (Outcome::Deleted(count), _) => Ok(count),
            _ => Err(not_understood()),
        }
    }

    async fn watch(&self, request: WatchRequest) -> Result<Watch> {
        self.session.check_open()?;
        let patience = self.options.request_timeout;
        let watch = self.link.watch(self.namespace(), request, patience).await?;
        // The watch ends with the handle.
        Ok(Watch::new(watch.take_until(closed(&self.session))))
    }

    async fn health(&self) -> Result<Health> {
        let asked = Instant::now();
        // A key that can't be: the read is as short as a linearizable one gets.
        let get = proto::Get {
            key: self.qualify("~/health"),
            stale: false,
            at_least: 0,
        };
        match self.ask(Call::Get(get)).await? {
            Answer::Get(answer) => Ok(Health {
                endpoint: self.link.endpoint(),
                latency: asked.elapsed(),
                revision: Revision(answer.revision),
            }),
            _ => Err(not_understood()),
        }
    }

    async fn close(&self) -> Result<()> {
        let closed = self.session.close(self.options.request_timeout).await;
        let member = self.member.lock().take();
        match member {
            Some(member) => closed.and(member.stop().await),
            None => closed,
        }
    }
}

fn crowded(most: u64) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: format!("{most} changes of this handle wait for their answers").into(),
    }
}

/// The revision that the answer to a read tells.
fn revision(answer: &Answer) -> u64 {
    match answer {
        Answer::Get(answer) => answer.revision,
        Answer::Page(answer) => answer.revision,
        Answer::Children(answer) => answer.revision,
        Answer::Count(answer) => answer.revision,
        Answer::Failure(_) | Answer::Reply(_) | Answer::Done(_) | Answer::Status(_) => 0,
        Answer::Digest(_) | Answer::ReadIndex(_) | Answer::Promise(_) | Answer::ReplyThenPage(_) => 0,
    }
}

/// Waits until the handle is closed.
fn closed(session: &Session) -> impl Future<Output = ()> + Send + use<> {
    let mut states = session.states();
    async move {
        // An error says that the keeper is gone, and the handle with it.
        let _ = states
            .wait_for(|state| matches!(state, registry_api::SessionState::Closed(_)))
            .await;
    }
}

#[derive(Debug)]
struct Deadline {
    until: Instant,
}

impl Deadline {
    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}

/// Short waits that double; a leader is found again in a second or so.
#[derive(Debug)]
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(5))
    }
}

impl Backoff {
    fn within(&self, deadline: &Deadline) -> bool {
        deadline.left() > self.0
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(MAX_BACKOFF);
    }
}

/// The numbers of a handle's changes, and which of them still wait for an answer.
#[derive(Debug, Default)]
struct Sequences {
    last: u64,
    waiting: BTreeSet<u64>,
}

/// One change's number; dropped when nobody will ask for its answer again.
struct Sequence<'a> {
    sequences: &'a Mutex<Sequences>,
    number: u64,
}

impl<'a> Sequence<'a> {
    fn next(sequences: &'a Mutex<Sequences>) -> Self {
        let mut locked = sequences.lock();
        locked.last += 1;
        let number = locked.last;
        locked.waiting.insert(number);
        Self { sequences, number }
    }

    /// Every number below was answered.
    fn answered_below(&self) -> u64 {
        self.sequences.lock().waiting.first().copied().unwrap_or(self.number)
    }
}

impl Drop for Sequence<'_> {
    fn drop(&mut self) {
        self.sequences.lock().waiting.remove(&self.number);
    }
}
