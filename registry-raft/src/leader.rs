//! What only the Raft leader can do, asked of it by the others.
//!
//! A follower passes a change or a keep-alive on, one hop at the most. For a linearizable read it asks how far the log
//! must be applied, for all readers that wait at that moment at once, and then reads its own copy (the follower read of
//! Ongaro's dissertation, section 6.4).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use openraft::raft::StreamAppendError;
use openraft::raft::linearizable_read::{Linearizer, ReadLogId};
use openraft::{ChangeMembers, Instant as _, Membership};
use registry_api::{Error, Result};
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Status};

use crate::command::not_understood;
use crate::config::{check_name, check_reachable, refused as refused_setting};
use crate::directory::removed_for_good;
use crate::founding::greet;
use crate::link::{BACKEND, failure, millis, of_question};
use crate::member::{Core, unavailable};
use crate::network::Way;
use crate::peers::{Appended, refused};
use crate::proto;
use crate::proto::registry::peer::v1 as message;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::read_index::of_term;
use crate::service::why;
use crate::types::{LogId, Peer};
use crate::wire;

/// How long one question for all waiting readers may take.
const ROUND: Duration = Duration::from_secs(1);
/// How many readers may wait to be asked for; more wait before that.
const READERS: usize = 4096;

/// Who leads, as far as a member knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leader {
    This,
    Other(u64, Peer),
}

/// Readers that wait until the local copy has what was acknowledged before they asked. The answer is the term in which a
/// majority confirmed this member as the leader since then, if it was this member that led.
pub(crate) type Readers = mpsc::Sender<oneshot::Sender<Confirmed>>;
type Waiting = mpsc::Receiver<oneshot::Sender<Confirmed>>;
type Confirmed = std::result::Result<Option<u64>, String>;

pub(crate) fn readers() -> (Readers, Waiting) {
    mpsc::channel(READERS)
}

impl Core {
    /// Who leads now, if anybody is known to.
    pub(crate) fn known_leader(&self) -> Option<Leader> {
        let metrics = self.raft().server_metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader?;
        if leader == self.identity().member {
            return metrics.state.is_leader().then_some(Leader::This);
        }
        let peer = metrics.membership_config.membership().get_node(&leader)?;
        Some(Leader::Other(leader, peer.clone()))
    }

    /// Notes that a Raft leader sent something, unless it is none any more.
    pub(crate) fn hear(&self, leader: u64, appended: &Appended) {
        if !matches!(appended, Err(StreamAppendError::HigherVote(_))) {
            *self.heard().lock() = Some((leader, Instant::now()));
        }
    }

    /// Who leads and was heard a short time ago: another by this member, this one by a majority. openraft goes on to name a
    /// leader that has become silent, until there is another.
    pub(crate) fn present_leader(&self) -> Option<u64> {
        let patience = Duration::from_millis(2 * self.timers().millis().2);
        match self.known_leader()? {
            Leader::This => self.majority_heard_within(patience).then_some(self.identity().member),
            Leader::Other(leader, _) => {
                let heard = *self.heard().lock();
                let (heard, at) = heard?;
                (heard == leader && at.elapsed() < patience).then_some(leader)
            }
        }
    }

    /// Whether a majority has acknowledged this member as their leader so short a time ago.
    pub(crate) fn majority_heard_within(&self, patience: Duration) -> bool {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        let mut voters = metrics.membership_config.membership().voter_ids();
        let needs_no_other = voters.all(|voter| voter == self.identity().member);
        needs_no_other || metrics.last_quorum_acked.is_some_and(|at| at.elapsed() < patience)
    }

    /// Who leads, as soon as somebody does. It never gives up: the caller has a deadline.
    pub(crate) async fn leader(&self) -> Result<Leader> {
        let mut metrics = self.raft().server_metrics();
        loop {
            if let Some(leader) = self.known_leader() {
                return Ok(leader);
            }
            metrics
                .changed()
                .await
                .map_err(|_| unavailable("the member has stopped"))?;
        }
    }

    /// Ends when another leads than this one, or nobody.
    pub(crate) async fn deposed(&self, leader: &Leader) {
        let mut metrics = self.raft().server_metrics();
        while self.known_leader().as_ref() == Some(leader) {
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    /// The membership that is applied, and where in the log it is.
    pub(crate) fn membership(&self) -> (Option<LogId>, Membership<u64, Peer>) {
        self.store()
            .read(|inner| (*inner.membership.log_id(), inner.membership.membership().clone()))
    }

    /// Passes a call on to the Raft leader.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it was not asked or did not do it, [`Error::OutcomeUnknown`] if it did not answer.
    pub(crate) async fn forward(&self, leader: &Leader, call: Call, patience: Duration) -> Result<Answer> {
        let Leader::Other(id, peer) = leader else {
            return Err(unavailable("the Raft leader has changed"));
        };
        self.ask(*id, peer, call, patience, self.deposed(leader)).await
    }

    /// Asks another member, which does not pass it on, as long as it is the one to ask.
    ///
    /// # Errors
    /// As [`Core::forward`].
    pub(crate) async fn ask(
        &self,
        id: u64,
        peer: &Peer,
        call: Call,
        patience: Duration,
        deposed: impl Future<Output = ()>,
    ) -> Result<Answer> {
        let lane = self.network().lane_for(id, &peer.address, Way::of(&call));
        let silent = |_| unavailable(format!("{}: no answer within {patience:.1?}", peer.address));
        let conversation = tokio::time::timeout(patience, lane.conversation())
            .await
            .map_err(silent)?;
        let conversation = conversation.map_err(|status| unavailable(status.message().to_owned()))?;
        let request = proto::Request {
            patience_ms: millis(patience),
            forwarded: true,
            header: self.identity().header(id),
            call: Some(call),
        };
        let unknown = |source: registry_api::BoxError| Error::OutcomeUnknown {
            operation: "a write",
            source,
        };
        let answered = tokio::select! {
            answered = conversation.ask(request) => answered,
            () = deposed => return Err(unknown("the Raft leader has changed".into())),
        };
        match answered {
            Ok(response) => match response.answer.ok_or_else(not_understood)? {
                Answer::Failure(said) => Err(failure(said)),
                answer => Ok(answer),
            },
            Err(status) => {
                if status.code() != Code::DeadlineExceeded {
                    lane.reset();
                }
                Err(unknown(status.into()))
            }
        }
    }

    /// Asks another member what changes nothing, whatever becomes of the question.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it did not answer, or could not.
    pub(crate) async fn inquire(&self, id: u64, peer: &Peer, call: Call, patience: Duration) -> Result<Answer> {
        let asked = self.ask(id, peer, call, patience, std::future::pending());
        match tokio::time::timeout(patience, asked).await {
            Ok(answer) => answer.map_err(of_question),
            Err(_) => Err(unavailable(format!(
                "{}: no answer within {patience:.1?}",
                peer.address
            ))),
        }
    }

    /// Waits until the local copy has all that was acknowledged before, for a read: a lease will do where the config allows
    /// it (section 6.4.1 of Ongaro's dissertation).
    pub(crate) async fn up_to_date(&self) -> Result<()> {
        if self.lease_reads()
            && let Some(term) = self.leads_surely()
            && self.applied_all_committed(term).await?
        {
            return Ok(());
        }
        self.barrier().await
    }

    /// Waits until the local copy has all that was acknowledged before, by what the others say.
    pub(crate) async fn barrier(&self) -> Result<()> {
        self.confirmed().await.map(|_| ())
    }

    /// As [`Core::barrier`]. Returns the term in which this member was the leader for certain after the call began, if it
    /// was.
    pub(crate) async fn confirmed(&self) -> Result<Option<u64>> {
        if let Some(term) = self.leads_alone()
            && self.applied_all_committed(term).await?
        {
            return Ok(Some(term));
        }
        // Whoever leads is waited for by each of those who ask, as long as they like.
        self.leader().await?;
        let (done, waits) = oneshot::channel();
        self.readers()
            .send(done)
            .await
            .map_err(|_| unavailable("the member has stopped"))?;
        let answered = waits.await.map_err(|_| unavailable("the member has stopped"))?;
        answered.map_err(unavailable)
    }

    /// The term in which this member leads as the only voter.
    pub(crate) fn leads_alone(&self) -> Option<u64> {
        let (term, effective) = self.leads_with()?;
        self.standing().is_only_voter_in(term, &effective).then_some(term)
    }

    /// Waits until this member has applied all that is committed at this moment: its followers and learners may have told
    /// readers of it already. The caller knows that no other member can have led since, and that this one leads in `term`.
    /// Returns `false` if nothing of that term is committed: what earlier leaders committed is not known then.
    async fn applied_all_committed(&self, term: u64) -> Result<bool> {
        let applied = self.store().read(|inner| of_term(inner.applied, term));
        // Nothing is committed that is not in the leader's log: often there is nothing to wait for.
        if applied.is_some() && applied >= self.last() {
            return Ok(true);
        }
        Box::pin(self.apply_all_committed(term)).await
    }

    async fn apply_all_committed(&self, term: u64) -> Result<bool> {
        let committed = self
            .raft()
            .with_raft_state(|state| state.local_committed().max(state.cluster_committed()).copied());
        match of_term(committed.await.map_err(unavailable)?, term) {
            Some(committed) => self.applied(committed).await.map(|()| true),
            None => Ok(false),
        }
    }

    /// Asks for all readers that wait, round after round.
    pub(crate) async fn serve_readers(self, mut waiting: Waiting) {
        let mut readers = Vec::new();
        while waiting.recv_many(&mut readers, READERS).await > 0 {
            let asked = tokio::time::timeout(ROUND, self.follow_up()).await;
            let answer = match asked {
                Ok(answer) => answer.map_err(|error| why(&error)),
                Err(_) => Err("the Raft leader does not answer".to_owned()),
            };
            for reader in readers.drain(..) {
                // A reader may have given up.
                let _ = reader.send(answer.clone());
            }
        }
    }

    /// Follows the log up to where the Raft leader is. Returns the term in which this member was confirmed as the leader, if
    /// it leads itself.
    async fn follow_up(&self) -> Result<Option<u64>> {
        let us = self.identity();
        let (id, peer) = match self.leader().await? {
            Leader::Other(id, peer) => (id, peer),
            Leader::This => {
                let index = self.read_index(None).await?;
                self.applied(index).await?;
                return Ok(Some(index.committed_leader_id().term));
            }
        };
        let request = message::ReadIndexRequest {
            header: us.header(id),
            term: Some(self.promised()),
        };
        let Answer::ReadIndex(answer) = self.inquire(id, &peer, Call::ReadIndex(request), ROUND).await? else {
            return Err(not_understood());
        };
        let told = |status: Status| unavailable(status.message().to_owned());
        us.check_answer(answer.header.as_ref(), id).map_err(told)?;
        let index = answer.index.map(wire::log_id_from).ok_or_else(not_understood)?;
        self.applied(index).await.map(|()| None)
    }

    /// Waits until this member has applied the log so far.
    async fn applied(&self, index: LogId) -> Result<()> {
        if self.store().read(|inner| inner.applied) >= Some(index) {
            return Ok(());
        }
        let linearizer = Linearizer::new(self.identity().member, ReadLogId::from_log_id(index), None);
        match linearizer.try_await_ready(self.raft(), Some(ROUND)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(unavailable("this member lags behind")),
            Err(fatal) => Err(unavailable(fatal)),
        }
    }

    /// Takes a new member in as a learner; again and again comes to the same. One that was removed stays so, whenever it
    /// asked: the question may have been under way since before.
    pub(crate) async fn admit(&self, admission: message::Admission) -> std::result::Result<(), Status> {
        if *admission.cluster != self.identity().cluster {
            return Err(refused("it asks to join another group".into()));
        }
        check_name("member", &admission.name)
            .and_then(|()| check_reachable("advertise", &admission.address))
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let leader = tokio::time::timeout(ROUND, self.leader()).await;
        let leader = leader.map_err(|_| Status::unavailable("there is no Raft leader"))?;
        match leader.map_err(|error| Status::unavailable(why(&error)))? {
            // What was changed before is decided on.
            Leader::This => match tokio::time::timeout(ROUND, self.barrier()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(Status::unavailable(why(&error))),
                Err(_) => return Err(Status::unavailable("no majority answers the Raft leader")),
            },
            Leader::Other(..) if admission.forwarded => return Err(Status::unavailable("the Raft leader has changed")),
            Leader::Other(id, peer) => {
                let passed_on = message::Admission {
                    forwarded: true,
                    ..admission
                };
                let lane = self.network().lane(id, &peer.address);
                let asked = lane.ask(5 * ROUND, |mut client| async move { client.admit(passed_on).await });
                return asked.await.map(|_| ());
            }
        }
        let (decided_on, members, removed) = self.store().read(|inner| {
            let members = inner.membership.nodes().map(|(id, peer)| (*id, peer.clone()));
            let removed = inner.state.removed.contains(&admission.id);
            (*inner.membership.log_id(), members.collect(), removed)
        });
        if removed {
            return Err(Status::already_exists(removed_for_good(&admission.name)));
        }
        crate::founding::refuse_namesake(&members, admission.id, &admission.name)
            .map_err(|error| Status::already_exists(error.to_string()))?;
        let peer = Peer {
            name: admission.name,
            address: admission.address,
        };
        let change = match members.get(&admission.id) {
            Some(known) if *known == peer => return Ok(()),
            Some(known) if known.name != peer.name => {
                let reason = format!("the group has this member under the name {:?}", known.name);
                return Err(Status::already_exists(reason));
            }
            Some(known) => {
                self.responds_at(admission.id, &peer.address).await?;
                tracing::info!(
                    member = peer.name,
                    from = known.address,
                    to = peer.address,
                    "a member has moved"
                );
                ChangeMembers::SetNodes(BTreeMap::from([(admission.id, peer)]))
            }
            None => {
                tracing::info!(member = peer.name, address = peer.address, "a member joins");
                ChangeMembers::AddNodes(BTreeMap::from([(admission.id, peer)]))
            }
        };
        let changed = self.propose_members(change, true, decided_on).await;
        changed.map_err(|error| match error {
            Error::OutcomeUnknown { .. } => Status::aborted(why(&error)),
            error => Status::unavailable(why(&error)),
        })
    }

    /// Checks that a member is at an address before that is recorded or relied on.
    pub(crate) async fn responds_at(&self, id: u64, address: &str) -> std::result::Result<(), Status> {
        let greeting = greet(&self.network().new_lane(address), message::Greeting::default()).await;
        match greeting {
            Ok(greeting) if greeting.id == id => Ok(()),
            Ok(greeting) => {
                let reason = format!("at {address} is another member, {:?}", greeting.name);
                Err(Status::unavailable(reason))
            }
            Err(status) => Err(Status::unavailable(format!(
                "it does not respond: {}",
                status.message()
            ))),
        }
    }

    /// Asks the members at these addresses to be taken in, until one of them has it done.
    ///
    /// # Errors
    /// [`Error::Storage`] if the group knows another disk under this member's name, or has removed this one.
    pub(crate) async fn join(&self, addresses: &[String], peer: &Peer) -> Result<()> {
        let admission = message::Admission {
            cluster: bytes::Bytes::copy_from_slice(&self.identity().cluster),
            id: self.identity().member,
            name: peer.name.clone(),
            address: peer.address.clone(),
            forwarded: false,
        };
        let lanes: Vec<_> = addresses
            .iter()
            .map(|address| self.network().new_lane(address))
            .collect();
        let mut said = Instant::now();
        loop {
            for lane in &lanes {
                let admission = admission.clone();
                let asked = lane.ask(5 * ROUND, |mut client| async move { client.admit(admission).await });
                match asked.await {
                    Ok(_) => return Ok(()),
                    Err(status) if status.code() == Code::AlreadyExists => {
                        return Err(Error::Storage {
                            place: format!("member {}", peer.name),
                            reason: status.message().into(),
                        });
                    }
                    Err(status) if status.code() == Code::InvalidArgument => {
                        return Err(refused_setting("advertise", status.message().into()));
                    }
                    Err(status) if said.elapsed() > 5 * ROUND => {
                        said = Instant::now();
                        tracing::warn!(cause = status.message(), "no member takes this one in yet");
                    }
                    Err(_) => {}
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

pub(crate) fn no_leader() -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: "there is no Raft leader".into(),
    }
}
