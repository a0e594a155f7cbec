//! Who is in the group, changed while it runs; and who of them leads.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, Instant as _, LogIdOptionExt, Membership, Precondition};
use registry_api::{Error, Result};
use tokio::sync::watch;

use crate::config::check_reachable;
use crate::founding::greet;
use crate::leader::Leader;
use crate::link::Link;
use crate::member::{Core, unavailable};
use crate::proto;
use crate::proto::registry::peer::v1 as message;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::types::{LogId, Peer, StoredMembership};

/// How often a leadership is checked that may end by time alone.
const LOOK: Duration = Duration::from_millis(20);
/// The pause before a change is asked for again.
const PAUSE: Duration = Duration::from_millis(100);
/// How many entries a learner may lack that is to have a vote.
const LAG: u64 = 1000;

/// A change of the group's members, by their names. It is an entry of the log, and one at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemberChange {
    /// Takes in a member that was started with `join`, as a learner: it follows the log and has no vote. One that joined
    /// by itself is there already. Of a member at another address than before the new one is recorded.
    Add {
        /// Its name.
        name: String,
        /// Where it listens.
        address: String,
    },
    /// Gives a learner a vote, once it has the log.
    Promote {
        /// Its name.
        name: String,
    },
    /// Takes a member out for good: it stops, and its directory is of no use any more. One that is dead can be removed
    /// as long as a majority lives both of the members with a vote, it included, and of those that are left.
    Remove {
        /// Its name.
        name: String,
    },
    /// Makes another member the Raft leader.
    Transfer {
        /// Its name.
        name: String,
    },
}

impl From<MemberChange> for proto::ChangeMembers {
    fn from(change: MemberChange) -> Self {
        use proto::change_members::Kind;
        let (kind, name, address) = match change {
            MemberChange::Add { name, address } => (Kind::Add, name, address),
            MemberChange::Promote { name } => (Kind::Promote, name, String::new()),
            MemberChange::Remove { name } => (Kind::Remove, name, String::new()),
            MemberChange::Transfer { name } => (Kind::Transfer, name, String::new()),
        };
        Self {
            kind: kind.into(),
            name,
            address,
        }
    }
}

/// Whether a change of voters has begun, and its second entry is still to come.
pub(crate) fn is_joint(membership: &Membership<u64, Peer>) -> bool {
    membership.get_joint_config().len() > 1
}

/// Asks for a change, again while it is not known to be made and there is time.
pub(crate) async fn ask(link: &dyn Link, change: MemberChange, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    let mut unknown = None;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match link.call(Call::Members(change.clone().into()), left).await {
            Ok(_) => return Ok(()),
            Err(error @ Error::Unavailable { .. }) if left < PAUSE => return Err(unknown.unwrap_or(error)),
            Err(Error::Unavailable { .. }) => tokio::time::sleep(PAUSE).await,
            Err(error @ Error::OutcomeUnknown { .. }) if left < PAUSE => return Err(error),
            Err(error @ Error::OutcomeUnknown { .. }) => {
                unknown = Some(error);
                tokio::time::sleep(PAUSE).await;
            }
            Err(refused) => {
                let Some(unknown) = unknown else { return Err(refused) };
                // An earlier attempt may have removed it, after which there is nothing to remove.
                return match &change {
                    MemberChange::Remove { name } if is_gone(link, name, left).await => Ok(()),
                    _ => Err(unknown),
                };
            }
        }
    }
}

/// Whether the group has no member of that name. Unknown counts as no.
async fn is_gone(link: &dyn Link, name: &str, patience: Duration) -> bool {
    let status = link.call(Call::Status(proto::StatusRequest {}), patience).await;
    matches!(status, Ok(Answer::Status(status)) if status.members.iter().all(|member| member.name != name))
}

impl Core {
    /// Changes the members, on the Raft leader. What is so already is no error.
    pub(crate) async fn change_members(&self, change: proto::ChangeMembers) -> Result<()> {
        use proto::change_members::Kind;
        let name = &change.name;
        if change.kind() == Kind::Add {
            return self.invite(name, &change.address).await;
        }
        // What was changed before is decided on, and nothing that this member does not lead any more.
        self.barrier().await?;
        self.finish_change().await?;
        let (decided_on, membership) = self.membership();
        let Some((id, peer)) = membership.nodes().find(|(_, peer)| peer.name == *name) else {
            let names: BTreeSet<_> = membership.nodes().map(|(_, peer)| peer.name.as_str()).collect();
            let names = Vec::from_iter(names);
            let reason = format!("there is no member {name:?}; there are {}", names.join(", "));
            return Err(Error::InvalidRequest(reason));
        };
        let (id, address) = (*id, peer.address.clone());
        let votes = membership.voter_ids().collect::<BTreeSet<_>>();
        match change.kind() {
            Kind::Add => Ok(()),
            Kind::Promote if votes.contains(&id) => Ok(()),
            Kind::Promote => {
                let there = self.responds_at(id, &address).await;
                there.map_err(|status| {
                    let reason = status.message();
                    Error::InvalidRequest(format!("{name:?} can't be given a vote at {address}: {reason}"))
                })?;
                self.caught_up(id, name).await?;
                let voters = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
                self.propose_members(voters, true, decided_on).await
            }
            Kind::Remove if votes.len() == 1 && votes.contains(&id) => Err(Error::InvalidRequest(format!(
                "{name:?} is the only member with a vote: stop it instead"
            ))),
            Kind::Remove => {
                let gone = BTreeSet::from([id]);
                let gone = match votes.contains(&id) {
                    true => ChangeMembers::RemoveVoters(gone),
                    false => ChangeMembers::RemoveNodes(gone),
                };
                self.propose_members(gone, false, decided_on).await
            }
            Kind::Transfer if !votes.contains(&id) => Err(Error::InvalidRequest(format!(
                "{name:?} is a learner: promote it first"
            ))),
            Kind::Transfer => self.transfer(id).await,
        }
    }

    async fn invite(&self, name: &str, address: &str) -> Result<()> {
        let refused = |reason: String| Err(Error::InvalidRequest(reason));
        if let Err(Error::Config { reason, .. }) = check_reachable("address", address) {
            return refused(reason);
        }
        let lane = self.network().new_lane(address);
        let greeting = match greet(&lane, message::Greeting::default()).await {
            Ok(greeting) => greeting,
            // Not tried again: who asks knows better when it is there.
            Err(status) => {
                return refused(format!(
                    "nobody answers at {address}: start it there with `join` ({})",
                    status.message()
                ));
            }
        };
        if greeting.name != name {
            return refused(format!("at {address} is member {:?}, not {name:?}", greeting.name));
        }
        if !greeting.cluster.is_empty() && *greeting.cluster != self.identity().cluster {
            return refused(format!("the member at {address} is in another group"));
        }
        if !greeting.address.is_empty() && greeting.address != address {
            // It would have its own address recorded again.
            return refused(format!(
                "member {name:?} is at {address}, but tells the others to reach it at {:?}: set registry.raft.advertise there",
                greeting.address
            ));
        }
        let admission = message::Admission {
            cluster: bytes::Bytes::copy_from_slice(&self.identity().cluster),
            id: greeting.id,
            name: name.into(),
            address: address.into(),
            forwarded: true,
        };
        let admitted = self.admit(admission).await;
        admitted.map_err(|status| match status.code() {
            tonic::Code::AlreadyExists | tonic::Code::InvalidArgument => Error::InvalidRequest(status.message().into()),
            tonic::Code::Unavailable => unavailable(status.message().to_owned()),
            _ => Error::OutcomeUnknown {
                operation: "a change of members",
                source: status.message().to_owned().into(),
            },
        })
    }

    /// Waits until a learner has nearly all of the log.
    async fn caught_up(&self, id: u64, name: &str) -> Result<()> {
        let mut metrics = self.raft().metrics();
        loop {
            {
                let metrics = metrics.borrow_watched();
                let Some(replication) = &metrics.replication else {
                    return Err(unavailable("the Raft leader has changed"));
                };
                let matched = replication.get(&id).copied().flatten();
                if matched.next_index() + LAG >= metrics.last_log_index.map_or(0, |index| index + 1)
                    && matched.is_some()
                {
                    return Ok(());
                }
            }
            let changed = tokio::time::timeout(Duration::from_secs(5), metrics.changed()).await;
            match changed {
                Ok(changed) => changed.map_err(unavailable)?,
                Err(_) => return Err(unavailable(format!("{name:?} does not catch up"))),
            }
        }
    }

    /// Has a change committed, unless the members have changed since what it was decided on.
    ///
    /// # Cancel safety
    /// The change goes on: one of voters is two entries, and openraft proposes the second when the first is committed.
    pub(crate) async fn propose_members(
        &self,
        change: ChangeMembers<u64, Peer>,
        retain: bool,
        decided_on: Option<LogId>,
    ) -> Result<()> {
        let core = self.clone();
        let proposing = tokio::spawn(async move {
            let unchanged = Precondition::LastMembershipLogId {
                last_membership_log_id: decided_on,
            };
            let changed = core.raft().change_membership_if(change, retain, [unchanged]).await;
            // The first entry may be there when the second is refused.
            changed.map_err(|error| (core.membership().0 == decided_on, error))
        });
        match proposing.await.map_err(unavailable)? {
            Ok(_) => Ok(()),
            Err((true, RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => {
                Err(unavailable("the Raft leader has changed"))
            }
            Err((
                true,
                RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    error @ (ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_)),
                )),
            )) => Err(unavailable(error)),
            Err((true, RaftError::APIError(ClientWriteError::ChangeMembershipError(error)))) => {
                Err(Error::InvalidRequest(error.to_string()))
            }
            Err((_, error)) => Err(Error::OutcomeUnknown {
                operation: "a change of members",
                source: error.into(),
            }),
        }
    }

    /// Completes a change of voters that was interrupted between its two entries, as by the end of the leader that had
    /// proposed the first. Until then a majority of the old voters is needed too, though the new ones vote.
    pub(crate) async fn finish_change(&self) -> Result<()> {
        let (decided_on, membership) = self.membership();
        if !is_joint(&membership) {
            return Ok(());
        }
        let nothing_more = ChangeMembers::AddVoterIds(BTreeSet::new());
        self.propose_members(nothing_more, false, decided_on).await
    }

    /// Makes another member lead, and waits until it does.
    ///
    /// openraft takes no transfer back: if it fails, this member sends no heartbeats any more, and its followers elect
    /// another one at any time. It leads for certain only in a later term.
    ///
    /// # Cancel safety
    /// The transfer goes on.
    pub(crate) async fn transfer(&self, to: u64) -> Result<()> {
        if to == self.identity().member {
            return Ok(());
        }
        // The program is told that the leadership ends before another member can lead.
        let resigning = self.standing().resign();
        let core = self.clone();
        let transfer = tokio::spawn(async move {
            let transferred = core.transfer_now(to).await;
            drop(resigning);
            transferred
        });
        transfer.await.map_err(unavailable)?
    }

    async fn transfer_now(&self, to: u64) -> Result<()> {
        self.raft().trigger().transfer_leader(to).await.map_err(unavailable)?;
        // It has begun, in whatever term that was, when the next request is answered.
        self.raft().with_raft_state(|_| ()).await.map_err(unavailable)?;
        let transferred = async {
            let mut metrics = self.raft().server_metrics();
            loop {
                match self.known_leader() {
                    Some(Leader::Other(leader, _)) if leader == to => return Ok(()),
                    Some(Leader::Other(_, peer)) => return Err(unavailable(format!("{} leads instead", peer.name))),
                    Some(Leader::This) | None => metrics.changed().await.map_err(unavailable)?,
                }
            }
        };
        let patience = Duration::from_millis(2 * self.timers().millis().2);
        match tokio::time::timeout(patience, transferred).await {
            Ok(transferred) => transferred,
            Err(_) => Err(unavailable("the other member did not take over")),
        }
    }

    /// Before an orderly stop: makes another member lead, so that nobody waits for the silence.
    pub(crate) async fn hand_over(&self) {
        let start = Instant::now();
        for next in self.successors() {
            if self.known_leader() != Some(Leader::This) {
                break;
            }
            match self.transfer(next).await {
                Ok(()) => tracing::info!(took = ?start.elapsed(), "another member leads now"),
                Err(error) => tracing::warn!(%error, "the leadership could not be handed over"),
            }
        }
    }

    /// The other members with a vote that live, as far as is known: first who has most of the log.
    fn successors(&self) -> Vec<u64> {
        let alive = Duration::from_millis(self.timers().millis().2);
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        let (Some(matched), Some(heard)) = (&metrics.replication, &metrics.heartbeat) else {
            return Vec::new();
        };
        let voters = metrics.membership_config.membership().voter_ids();
        let mut next: Vec<_> = voters
            .filter(|id| *id != self.identity().member)
            .filter(|id| heard.get(id).copied().flatten().is_some_and(|at| at.elapsed() < alive))
            .collect();
        next.sort_by_key(|id| std::cmp::Reverse(matched.get(id).copied().flatten()));
        next
    }

    /// Tells the program in which term this member leads, as what decides it changes. It may end by time alone:
    /// [`Core::keep_lease`] sees to that.
    pub(crate) async fn keep_leadership(self, lease: Lease, mut stopping: watch::Receiver<bool>) {
        // All that changes, which is every entry too; and who leads, which seldom does.
        let mut all = self.raft().metrics();
        let mut server = self.raft().server_metrics();
        let mut told = self.standing().leadership();
        while !*stopping.borrow_and_update() {
            self.standing().publish(|| self.leads_surely());
            let leads = *told.borrow_and_update();
            if leads.is_some() {
                lease.begins();
            }
            let changed = async {
                match leads.is_none() && self.leads().is_some() {
                    // A majority is about to be heard.
                    true => all.changed().await,
                    false => server.changed().await,
                }
            };
            tokio::select! {
                changed = changed => if changed.is_err() { break },
                // Errors say that the member is gone.
                _ = told.changed() => {}
                _ = stopping.changed() => {}
            }
        }
        self.standing().publish(|| None);
    }

    /// Ends the leadership that the program was told of when its time has run out. On a thread of its own: whatever keeps the
    /// member's other threads busy delays it no more than the machine does.
    pub(crate) fn keep_lease(self) -> Result<Lease> {
        let ended = Arc::new(AtomicBool::new(false));
        let ends = ended.clone();
        let keep = move || {
            let _needed = self.needs("the lease");
            let told = self.standing().leadership();
            while !ends.load(Ordering::Acquire) {
                let leads = *told.borrow();
                match leads {
                    Some(_) => std::thread::park_timeout(LOOK),
                    None => std::thread::park(),
                }
                if told.borrow().is_some() {
                    self.standing().publish(|| self.leads_surely());
                }
            }
        };
        let thread = std::thread::Builder::new().name("registry-lease".into()).spawn(keep);
        let thread = thread.map_err(unavailable)?.thread().clone();
        Ok(Lease { thread, ended })
    }

    /// The term this member leads in, if a majority acknowledged it a short time ago: the others elect no other member for
    /// `election_timeout_max` after they did. `None` also as soon as its own log says that they need not wait.
    pub(crate) fn leads_surely(&self) -> Option<u64> {
        let (term, effective) = self.leads_with()?;
        let heard = self.majority_heard_within(self.lease(&effective));
        (heard && self.standing().may_lead(term, &effective)).then_some(term)
    }

    /// For how long after its acknowledgement by a majority this member leads for certain: a part of the shortest time for
    /// which one of the voters said that it waits, so that clocks may run differently. Their timers may differ from this
    /// member's while the setting is changed.
    pub(crate) fn lease(&self, membership: &StoredMembership) -> Duration {
        let us = self.identity().member;
        let others = membership.membership().voter_ids().filter(|voter| *voter != us);
        let shortest = self
            .network()
            .shortest_silence(others)
            .unwrap_or_else(|| self.silence());
        shortest.min(self.silence()).mul_f64(0.8)
    }

    /// For how long this member elects no other leader after it heard one.
    pub(crate) fn silence(&self) -> Duration {
        Duration::from_millis(self.timers().millis().2)
    }
}

/// The thread that ends a leadership by time. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    thread: Thread,
    ended: Arc<AtomicBool>,
}

impl Lease {
    /// The program was told that the member leads.
    fn begins(&self) {
        self.thread.unpark();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use async_trait::async_trait;
    use parking_lot::Mutex;
    use registry_api::{Namespace, Watch, WatchRequest};

    use super::*;
    use crate::link::Gone;

    /// Answers in that order, and then that it is unavailable.
    #[derive(Debug)]
    struct Answers(Mutex<VecDeque<Result<Answer>>>);

    impl Answers {
        async fn to(answers: impl IntoIterator<Item = Result<Answer>>, change: MemberChange) -> Result<()> {
            let link = Self(Mutex::new(answers.into_iter().collect()));
            ask(&link, change, Duration::from_millis(500)).await
        }
    }

    #[async_trait]
    impl Link for Answers {
        async fn call(&self, _: Call, _: Duration) -> Result<Answer> {
            self.0
                .lock()
                .pop_front()
                .unwrap_or_else(|| Err(unavailable("nobody leads")))
        }

        async fn watch(&self, _: &Namespace, _: WatchRequest, _: Duration) -> Result<Watch> {
            unreachable!("no change watches")
        }

        async fn once_gone(&self, _: Gone, _: Duration) -> Result<Option<proto::Page>> {
            unreachable!("no change waits for a key")
        }

        fn endpoint(&self) -> String {
            "here".into()
        }

        fn apart(&self) -> Arc<dyn Link> {
            unreachable!("no change has a session")
        }
    }

    fn unknown() -> Result<Answer> {
        Err(Error::OutcomeUnknown {
            operation: "a change of members",
            source: "no answer".into(),
        })
    }

    fn refused() -> Result<Answer> {
        Err(Error::InvalidRequest("no".into()))
    }

    fn members(names: &[&str]) -> Result<Answer> {
        let member = |name: &&str| proto::MemberStatus {
            name: (*name).into(),
            ..proto::MemberStatus::default()
        };
        Ok(Answer::Status(proto::StatusAnswer {
            members: names.iter().map(member).collect(),
            ..proto::StatusAnswer::default()
        }))
    }

    #[tokio::test]
    async fn a_change_that_may_have_been_made_is_not_reported_as_none() {
        let remove = || MemberChange::Remove { name: "b".into() };
        let promote = MemberChange::Promote { name: "b".into() };
        let is_unknown = |changed: Result<()>| matches!(changed, Err(Error::OutcomeUnknown { .. }));
        // Nobody leads until the time is over.
        assert!(is_unknown(Answers::to([unknown()], promote.clone()).await));
        assert!(is_unknown(Answers::to([unknown(), refused()], promote).await));
        // Whether it is gone is read, and not guessed from the refusal.
        assert!(is_unknown(
            Answers::to([unknown(), refused(), members(&["a", "b"])], remove()).await
        ));
        assert!(is_unknown(Answers::to([unknown(), refused()], remove()).await));
        Answers::to([unknown(), refused(), members(&["a"])], remove())
            .await
            .unwrap();
        // What was refused at once was not made.
        let changed = Answers::to([refused()], remove()).await;
        assert!(matches!(changed, Err(Error::InvalidRequest(_))), "{changed:?}");
        let changed = Answers::to([], remove()).await;
        assert!(matches!(changed, Err(Error::Unavailable { .. })), "{changed:?}");
    }
}
