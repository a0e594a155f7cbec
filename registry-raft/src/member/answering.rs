//! What a member answers, here or by the Raft leader.

use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use openraft::async_runtime::WatchReceiver;
use openraft::error::{ClientWriteError, RaftError};
use prost::Message;
use registry_api::{Error, Namespace, Result, SessionId, Watch, WatchRequest, WatchScope};

use super::{Core, GRACE, IN_FLIGHT, OF_SESSIONS, unavailable};
use crate::command::{Change, Command, Outcome, Reply, not_understood};
use crate::leader::Leader;
use crate::link::Gone;
use crate::proto;
use crate::proto::registry::peer::v1 as message;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::state::first_session;
use crate::transport::MAX_MESSAGE;
use crate::types::{Peer, Proposal};
use crate::watchers::Target;
use crate::wire;

/// How long the Raft leader may take to say how the members stand.
const STATUS: Duration = Duration::from_millis(500);
/// For how long who leads is asked again that does not do what it is asked, and the pause before it.
const SUCCESSION: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(4);
/// How many entries a page has that comes along with something else, and how many bytes.
const ALONG: u64 = 64;
const ALONG_BYTES: usize = 4 << 10;
/// The most bytes of a command: the log would take more, but no message to another member.
const MAX_PROPOSAL: usize = MAX_MESSAGE / 2;

impl Core {
    /// Answers a call within `patience`, here or by the Raft leader.
    pub(crate) async fn serve(&self, call: Call, patience: Duration) -> Result<Answer> {
        // Sessions that are kept alive do not wait for each other.
        let _calling = (!matches!(call, Call::KeepAlive(_))).then(|| self.awake.call());
        let answer = pin!(self.answer(&call, Instant::now() + patience));
        self.within(patience, &call, answer).await
    }

    /// Answers a call that another member has passed on: it goes no further.
    pub(crate) async fn serve_here(&self, call: Call, patience: Duration) -> Result<Answer> {
        let answer = pin!(self.answer_here(&call));
        self.within(patience, &call, answer).await
    }

    /// The answer, if it comes in time; if not, why it did not, as far as that is known here.
    async fn within(
        &self,
        patience: Duration,
        call: &Call,
        answer: Pin<&mut impl Future<Output = Result<Answer>>>,
    ) -> Result<Answer> {
        if let Ok(answer) = tokio::time::timeout(patience, answer).await {
            return answer;
        }
        let source = match self.present_leader() {
            Some(_) => format!("not done within {patience:?}"),
            None => "the member hears no Raft leader that has a majority".to_owned(),
        };
        Err(match call {
            Call::Command(_) | Call::CommandThenList(_) | Call::Members(_) => Error::OutcomeUnknown {
                operation: "a write",
                source: source.into(),
            },
            _ => unavailable(source),
        })
    }

    /// What is rare or has far to go has its own place in memory: every call would carry the room for it.
    async fn answer(&self, call: &Call, until: Instant) -> Result<Answer> {
        match call {
            Call::Command(_) | Call::CommandThenList(_) | Call::KeepAlive(_) | Call::Members(_) => {
                self.answer_by_leader(call, until).await
            }
            Call::Status(_) => {
                let left = until.saturating_duration_since(Instant::now());
                Ok(Answer::Status(Box::pin(self.status_of_all(left)).await))
            }
            _ => self.answer_here(call).await,
        }
    }

    /// Has it done by whoever leads. One that is about to be followed by another refuses what it is asked, and so does one
    /// that no majority has heard yet: whoever leads in a moment is asked again.
    async fn answer_by_leader(&self, call: &Call, until: Instant) -> Result<Answer> {
        let patience = Instant::now() + SUCCESSION;
        loop {
            let leader = self.leader().await?;
            let done = match leader {
                Leader::This => self.answer_here(call).await,
                Leader::Other(..) => {
                    let left = until.saturating_duration_since(Instant::now());
                    Box::pin(self.forward(&leader, call.clone(), left)).await
                }
            };
            let nothing_done = matches!(done, Err(Error::Unavailable { .. }));
            if !nothing_done || Instant::now() > patience {
                return done;
            }
            // Another may lead sooner.
            let _ = tokio::time::timeout(PAUSE, self.deposed(&leader)).await;
        }
    }

    /// How it stands, with what the Raft leader knows of each member and how far each has applied the log, as far as they
    /// answer soon.
    async fn status_of_all(&self, patience: Duration) -> proto::StatusAnswer {
        let mut status = self.status();
        let patience = patience.min(STATUS);
        let (_, membership) = self.membership();
        let others = membership.nodes().filter(|(id, _)| **id != self.identity.member);
        let asking = others.map(|(id, peer)| async move {
            let call = Call::Status(proto::StatusRequest {});
            match self.inquire(*id, peer, call, patience).await {
                Ok(Answer::Status(status)) => Some(status),
                _ => None,
            }
        });
        let answered: Vec<_> = join_all(asking).await.into_iter().flatten().collect();
        let of = |id| answered.iter().find(|answer| answer.answered_by == id);
        if let Some(Leader::Other(leader, _)) = self.known_leader()
            && let Some(leader) = of(leader)
        {
            status.members.clone_from(&leader.members);
        }
        for member in &mut status.members {
            member.applied = match member.id == status.answered_by {
                true => Some(status.applied),
                false => of(member.id).map(|answer| answer.applied),
            };
        }
        status
    }

    async fn answer_here(&self, call: &Call) -> Result<Answer> {
        Ok(match call {
            Call::Get(get) => {
                self.fresh(get.stale, get.at_least).await?;
                Answer::Get(self.store.get(&get.key))
            }
            Call::List(list) => {
                self.fresh(list.stale, list.at_least).await?;
                Answer::Page(self.store.list(list))
            }
            Call::Children(children) => {
                self.fresh(children.stale, children.at_least).await?;
                Answer::Children(self.store.children(&children.prefix, &children.from))
            }
            Call::Count(count) => {
                self.fresh(count.stale, count.at_least).await?;
                Answer::Count(self.store.count(&count.prefix))
            }
            Call::Command(command) => Answer::Reply(self.propose(command).await?),
            Call::CommandThenList(proto::CommandThenList { command, list }) => {
                let (command, list) = (command.as_ref(), list.as_ref());
                let reply = self.propose(command.ok_or_else(not_understood)?).await?;
                let committed = matches!(reply.result, Some(Outcome::Committed(_)));
                let page = list.filter(|_| committed).and_then(|list| self.list_along(list));
                let reply = Some(reply);
                Answer::ReplyThenPage(proto::ReplyThenPage { reply, page })
            }
            Call::KeepAlive(keep_alive) => {
                Box::pin(self.keep_alive(SessionId(keep_alive.session))).await?;
                Answer::Done(proto::Unit {})
            }
            Call::Members(change) => {
                Box::pin(self.change_members(change.clone())).await?;
                Answer::Done(proto::Unit {})
            }
            Call::Status(_) => Answer::Status(self.status()),
            Call::Digest(digest) => self.digest(digest.index).await?,
            Call::ReadIndex(request) => {
                let asker = self.asker(request.header.as_ref())?;
                let leads = request.term.map(|term| (asker, term));
                let index = Box::pin(self.read_index(leads)).await?;
                Answer::ReadIndex(message::ReadIndexAnswer {
                    header: self.identity.header(asker),
                    index: Some(wire::log_id_to(&index)),
                })
            }
            Call::Promise(request) => {
                let asker = self.asker(request.header.as_ref())?;
                Answer::Promise(message::PromiseAnswer {
                    header: self.identity.header(asker),
                    term: self.promised(),
                })
            }
        })
    }

    /// What comes along with something else that is told: a page of what is applied here, if it is small. Unread, a large one
    /// would take up memory.
    fn list_along(&self, list: &proto::List) -> Option<proto::Page> {
        let list = proto::List {
            limit: list.limit.min(ALONG),
            ..list.clone()
        };
        Some(self.store.list(&list)).filter(|page| page.encoded_len() <= ALONG_BYTES)
    }

    /// Which member asks what only members do.
    fn asker(&self, header: Option<&message::Header>) -> Result<u64> {
        let checked = self.identity.check(header);
        checked.map_err(|status| Error::InvalidRequest(status.message().into()))
    }

    /// Waits until the local state holds all that was acknowledged or, for a reader who does not care, what it has seen.
    async fn fresh(&self, stale: bool, at_least: u64) -> Result<()> {
        if !stale {
            return self.up_to_date().await;
        }
        let mut applied = self.raft.data_metrics();
        while self.store.read(|inner| inner.state.revision) < at_least {
            applied.changed().await.map_err(unavailable)?;
        }
        Ok(())
    }

    /// Where the Raft leader answers, if it is another member; empty otherwise.
    pub(crate) fn leader_elsewhere(&self) -> String {
        match self.known_leader() {
            Some(Leader::Other(_, peer)) => peer.address,
            Some(Leader::This) | None => String::new(),
        }
    }

    /// A command as the log carries it.
    ///
    /// # Errors
    /// This version does not know all of it, or it is too large for a message to another member.
    fn proposal(&self, command: &Command) -> Result<Proposal> {
        command.understood().map_err(Error::InvalidRequest)?;
        let proposal = match &command.change {
            Some(Change::Open(open)) => {
                let begins = self.store.read(|inner| inner.state.last_session == 0);
                let first = if begins { first_session() } else { 0 };
                let open = proto::OpenSession { first, ..*open };
                Command {
                    level: u32::from(begins),
                    change: Some(Change::Open(open)),
                    ..command.clone()
                }
                .encode()
            }
            _ => command.encode(),
        };
        match proposal.0.len() {
            size if size > MAX_PROPOSAL => Err(Error::TooLarge {
                what: "a change",
                size,
                limit: MAX_PROPOSAL,
            }),
            _ => Ok(proposal),
        }
    }

    /// Has a command committed and applied.
    pub(super) async fn propose(&self, command: &Command) -> Result<Reply> {
        let (room, bytes) = match &command.change {
            Some(Change::Heard(_) | Change::Silences(_) | Change::Expire(_)) => (&self.of_sessions, OF_SESSIONS),
            _ => (&self.in_flight, IN_FLIGHT),
        };
        let proposal = self.proposal(command)?;
        let size = u32::try_from(proposal.0.len().clamp(1, bytes)).unwrap_or(u32::MAX);
        let _permit = room.acquire_many(size).await.map_err(unavailable)?;
        match Box::pin(self.raft.client_write(proposal)).await {
            Ok(written) => Ok(written.data),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                Err(unavailable("there is no Raft leader"))
            }
            Err(RaftError::APIError(
                error @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)),
            )) => Err(unavailable(error)),
            // It was appended, and another leader's log went over it, or a snapshot that may hold it.
            Err(RaftError::APIError(error @ ClientWriteError::LogEntryDiscarded(_))) => Err(Error::OutcomeUnknown {
                operation: "a write",
                source: error.into(),
            }),
            Err(RaftError::Fatal(fatal)) => Err(Error::OutcomeUnknown {
                operation: "a write",
                source: fatal.into(),
            }),
        }
    }

    /// Waits until what this member has proposed is answered. What it could not commit itself before it handed over, the
    /// next Raft leader does, who must reach it for that.
    pub(super) async fn settle(&self) {
        let all = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let settled = async {
            tokio::join!(
                self.in_flight.acquire_many(all(IN_FLIGHT)),
                self.of_sessions.acquire_many(all(OF_SESSIONS))
            )
        };
        // Whoever comes later goes on with what is let go of here.
        let settled = tokio::time::timeout(GRACE, settled).await;
        tracing::debug!(in_time = settled.is_ok(), "what was proposed is answered");
    }

    async fn keep_alive(&self, session: SessionId) -> Result<()> {
        let known = || {
            let found = self.store.read(|inner| {
                let known = inner.state.sessions.get(&session.0)?;
                Some((known.silent_ms > 0, known.heard))
            });
            found.ok_or(Error::SessionExpired { session })
        };
        self.expiry.arrived(session, Instant::now());
        // Only a leader that still leads may promise a TTL: a deposed one's successor counts already.
        let Some(term) = self.confirmed().await? else {
            return Err(unavailable("the Raft leader has changed"));
        };
        let (_, heard) = known()?;
        // Counted anew first, so that nothing older is noted after what follows.
        let noted = self.expiry.extend(session, term, heard, Instant::now())?;
        let (silent, _) = known()?;
        if noted || silent {
            // In the log before it is promised: another leader would grant it less.
            let heard = self.propose(&Command::new(Change::Heard(session.0))).await?;
            if let Some(Outcome::SessionExpired(_)) = heard.result {
                return Err(Error::SessionExpired { session });
            }
        }
        known().map(|_| ())
    }

    pub(crate) async fn watch(
        &self,
        namespace: &Namespace,
        request: WatchRequest,
        patience: Duration,
    ) -> Result<Watch> {
        // By a majority, also where the config allows reads by a lease: a watch goes on for long.
        match tokio::time::timeout(patience, self.barrier()).await {
            Ok(fresh) => fresh?,
            Err(_) => return Err(unavailable("the member does not begin the watch in time")),
        }
        self.store.watch(Target {
            namespace: namespace.clone(),
            request,
            after: 0,
        })
    }

    /// Waits until that is gone, then lists.
    pub(crate) async fn once_gone(&self, gone: Gone, patience: Duration) -> Result<Option<proto::Page>> {
        let request = WatchRequest::new(&gone.key, WatchScope::Key);
        let watch = self.watch(&gone.namespace, request, patience).await?;
        // The member stops, or its state has jumped: another tells how it is now.
        let broke_off = |error: Error| Error::OutcomeUnknown {
            operation: "a wait",
            source: error.into(),
        };
        watch.gone(gone.created).await.map_err(broke_off)?;
        Ok(self.list_along(&gone.list))
    }

    pub(super) fn status(&self) -> proto::StatusAnswer {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let applied = metrics.last_applied.map_or(0, |applied| applied.index);
        let covered = metrics.snapshot.map(|snapshot| snapshot.index);
        let membership = metrics.membership_config.membership();
        let voters: Vec<_> = membership.voter_ids().collect();
        let leader = self.present_leader();
        let member = |(id, peer): (&u64, &Peer)| {
            let matched = match &metrics.replication {
                Some(_) if *id == self.identity.member => metrics.last_log_index,
                Some(replication) => replication.get(id).copied().flatten().map(|matched| matched.index),
                None => None,
            };
            let role = match (leader == Some(*id), voters.contains(id)) {
                (true, _) => "leader",
                (false, true) => "follower",
                (false, false) => "learner",
            };
            proto::MemberStatus {
                id: *id,
                name: peer.name.clone(),
                address: peer.address.clone(),
                role: role.into(),
                matched,
                lag: matched.map(|matched| metrics.last_log_index.unwrap_or(0).saturating_sub(matched)),
                applied: (*id == self.identity.member).then_some(applied),
            }
        };
        let mut members: Vec<_> = membership.nodes().map(member).collect();
        members.sort_by(|one, other| one.name.cmp(&other.name));
        self.store.read(|inner| proto::StatusAnswer {
            members,
            keys: inner.state.tree.len() as u64,
            sessions: inner.state.sessions.len() as u64,
            revision: inner.state.revision,
            compacted: inner.history.compacted(),
            log_bytes: self.log.log().bytes_after(covered),
            snapshot_bytes: self.snapshots.bytes(),
            term: metrics.current_term,
            applied,
            watches: self.store.watches() as u64,
            answered_by: self.identity.member,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::{Member, RaftConfig};

    use super::*;

    /// Each call is allocated and copied as large as the largest thing that any call may do: this was 11 KiB.
    #[tokio::test]
    async fn a_call_carries_no_room_for_what_it_does_not_do() {
        let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
        let core = member.core();
        let call = Call::Status(proto::StatusRequest {});
        assert!(size_of_val(&core.serve(call.clone(), Duration::from_secs(1))) <= 1536);
        assert!(size_of_val(&core.serve_here(call, Duration::from_secs(1))) <= 1536);
        member.stop().await.unwrap();
    }
}
