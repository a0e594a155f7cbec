//! The place of this member in its group, by its own log.
//!
//! The log store notes every membership and every vote here before another member can learn of it: an entry is sent
//! after it was appended, and a vote is answered after it was saved. The metrics of the Raft task may lag behind the other
//! members for a moment; what is noted here never does.
//!
//! A member that is the only voter needs no other member for a linearizable read: nothing is committed, and no leader is
//! elected, without it. A member that is no voter any more may lead until its removal is committed, but the others do not
//! wait for it: the only voter that is left elects itself at once.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::types::{StoredMembership, Vote};

/// What a member's log says about its place. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Standing(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    member: u64,
    state: Mutex<State>,
    /// The term in which the program was told that this member leads.
    leadership: watch::Sender<Option<u64>>,
}

#[derive(Debug, Default)]
struct State {
    /// The newest membership of the log, unless it was truncated.
    membership: Option<StoredMembership>,
    /// The newest vote of this member.
    vote: Option<Vote>,
    /// How many transfers of the leadership are in progress.
    transfers: usize,
    /// The newest term in which this member began a transfer. Its followers may elect another member at any time in it.
    resigned: Option<u64>,
    /// The member has stopped, and another process may go on with its directory.
    closed: bool,
}

impl State {
    /// Whether a member is a voter, and the only one, by the newer of the noted membership and the one that the Raft task
    /// goes by: a snapshot brings one that was in no entry of the log.
    fn votes(&self, member: u64, effective: &StoredMembership) -> (bool, bool) {
        let noted = self.membership.as_ref();
        let newest = noted.filter(|noted| noted.log_id() >= effective.log_id());
        let voters = || newest.unwrap_or(effective).membership().voter_ids();
        let is_voter = voters().any(|voter| voter == member);
        (is_voter, is_voter && voters().all(|voter| voter == member))
    }
}

impl Standing {
    pub(crate) fn new(member: u64) -> Self {
        Self(Arc::new(Shared {
            member,
            state: Mutex::default(),
            leadership: watch::channel(None).0,
        }))
    }

    /// Notes the newest membership of the log; `None` if the newest was truncated.
    pub(crate) fn note_membership(&self, membership: Option<StoredMembership>) {
        let removed = membership.as_ref().is_some_and(|membership| {
            let mut voters = membership.membership().voter_ids();
            voters.all(|voter| voter != self.0.member)
        });
        self.0.state.lock().membership = membership;
        if removed {
            self.withdraw();
        }
    }

    /// Notes a vote, before anybody is told of it.
    pub(crate) fn note_vote(&self, vote: &Vote) {
        self.0.state.lock().vote = Some(*vote);
        let leads = self.leads_by_vote();
        self.0
            .leadership
            .send_if_modified(|told| told.is_some() && *told != leads && told.take().is_some());
    }

    /// The member stops: it answers for nothing any more.
    pub(crate) fn close(&self) {
        self.0.state.lock().closed = true;
        self.withdraw();
    }

    /// Notifies the program, before it returns, that this member's leadership ends, since a transfer begins. The term in
    /// which the guard is dropped counts as given up too.
    pub(crate) fn resign(&self) -> Resigning {
        self.0.state.lock().transfers += 1;
        self.withdraw();
        Resigning(self.clone())
    }

    /// Whether this member may act as the leader of that term: it is a voter, has promised itself to no later term, and has
    /// not begun to transfer its leadership. The caller knows that it was elected, and `effective` from the Raft task.
    pub(crate) fn may_lead(&self, term: u64, effective: &StoredMembership) -> bool {
        let state = self.0.state.lock();
        let resigned = state.transfers > 0 || state.resigned.is_some_and(|resigned| resigned >= term);
        let (is_voter, _) = state.votes(self.0.member, effective);
        !state.closed && !resigned && is_voter && self.voted_for_itself(&state) == Some(term)
    }

    /// Whether this member is the only voter and has promised itself to no later term: no other member leads, and none
    /// commits anything. No clock decides it.
    pub(crate) fn is_only_voter_in(&self, term: u64, effective: &StoredMembership) -> bool {
        let state = self.0.state.lock();
        let (_, only_voter) = state.votes(self.0.member, effective);
        !state.closed && only_voter && self.voted_for_itself(&state) == Some(term)
    }

    /// What the program is told: the term in which this member leads.
    pub(crate) fn leadership(&self) -> watch::Receiver<Option<u64>> {
        self.0.leadership.subscribe()
    }

    /// Tells the program whether this member leads. `leads` is evaluated while nothing else can be told: what is noted
    /// meanwhile is told after it.
    pub(crate) fn publish(&self, leads: impl FnOnce() -> Option<u64>) -> Option<u64> {
        let mut now = None;
        self.0.leadership.send_if_modified(|told| {
            now = leads();
            std::mem::replace(told, now) != now
        });
        now
    }

    fn withdraw(&self) {
        self.0.leadership.send_if_modified(|told| told.take().is_some());
    }

    fn leads_by_vote(&self) -> Option<u64> {
        self.voted_for_itself(&self.0.state.lock())
    }

    fn voted_for_itself(&self, state: &State) -> Option<u64> {
        let leader = state.vote.as_ref()?.leader_id();
        (leader.voted_for == self.0.member).then_some(leader.term)
    }
}

/// A transfer of the leadership that is in progress.
#[derive(Debug)]
pub(crate) struct Resigning(Standing);

impl Drop for Resigning {
    fn drop(&mut self) {
        let mut state = self.0.0.state.lock();
        let term = state.vote.as_ref().map(|vote| vote.leader_id().term);
        state.resigned = state.resigned.max(term);
        state.transfers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use openraft::Membership;

    use super::*;
    use crate::types::{LogId, Peer};

    fn membership(index: u64, configs: &[&[u64]]) -> StoredMembership {
        let configs = configs
            .iter()
            .map(|voters| voters.iter().copied().collect::<BTreeSet<_>>());
        let nodes: BTreeMap<_, _> = (1..=3).map(|id| (id, Peer::default())).collect();
        let membership = Membership::new(configs.collect(), nodes).unwrap();
        StoredMembership::new(Some(LogId::new_term_index(2, index)), membership)
    }

    /// What the Raft task goes by may be older than what is noted.
    fn old() -> StoredMembership {
        membership(1, &[&[1, 2, 3]])
    }

    /// A member that leads in term 2, and has been told so.
    fn leader(configs: &[&[u64]]) -> Standing {
        let standing = Standing::new(1);
        standing.note_vote(&Vote::new_committed(2, 1));
        standing.note_membership(Some(membership(2, configs)));
        standing.publish(|| Some(2));
        standing
    }

    #[test]
    fn only_a_voter_may_lead_and_only_the_only_voter_needs_no_other() {
        for (configs, leads, only) in [
            (&[&[1][..]][..], true, true),
            (&[&[1], &[1, 2]], true, false),
            (&[&[1, 2]], true, false),
            (&[&[1, 2], &[1]], true, false),
            // It is being removed: the others still need it.
            (&[&[1, 2], &[2]], true, false),
            (&[&[2]], false, false),
            (&[&[2, 3]], false, false),
        ] {
            let standing = leader(configs);
            assert_eq!(standing.may_lead(2, &old()), leads, "{configs:?}");
            assert_eq!(standing.is_only_voter_in(2, &old()), only, "{configs:?}");
            for other in [1, 3] {
                assert!(!standing.may_lead(other, &old()), "{configs:?}");
                assert!(!standing.is_only_voter_in(other, &old()), "{configs:?}");
            }
        }
    }

    #[test]
    fn the_newer_membership_counts() {
        // A learner that a snapshot made a voter.
        let standing = leader(&[&[2]]);
        assert!(standing.may_lead(2, &membership(3, &[&[1, 2]])));
        assert!(standing.is_only_voter_in(2, &membership(3, &[&[1]])));
        let standing = leader(&[&[1]]);
        assert!(!standing.may_lead(2, &membership(3, &[&[2]])));
        assert!(!standing.is_only_voter_in(2, &membership(3, &[&[1, 2]])));
        // The newest was truncated.
        standing.note_membership(None);
        assert!(standing.may_lead(2, &old()) && !standing.is_only_voter_in(2, &old()));
    }

    #[test]
    fn a_leader_that_is_removed_is_told_before_its_log_has_the_entry() {
        let standing = leader(&[&[1, 2], &[2]]);
        let told = standing.leadership();
        standing.note_membership(Some(membership(3, &[&[1, 2]])));
        assert_eq!(*told.borrow(), Some(2));
        standing.note_membership(Some(membership(4, &[&[2]])));
        assert_eq!(*told.borrow(), None);
    }

    #[test]
    fn a_vote_for_a_later_term_ends_the_leadership_before_it_is_answered() {
        for vote in [Vote::new(3, 2), Vote::new_committed(3, 2), Vote::new(3, 1)] {
            let standing = leader(&[&[1]]);
            let told = standing.leadership();
            standing.note_vote(&Vote::new_committed(2, 1));
            assert_eq!(*told.borrow(), Some(2));
            standing.note_vote(&vote);
            assert!(!standing.may_lead(2, &old()), "{vote}");
            assert!(!standing.is_only_voter_in(2, &old()), "{vote}");
            assert_eq!(*told.borrow(), None, "{vote}");
        }
    }

    /// Its followers wait for it no more in all of this term, whether or not another member came to lead.
    #[test]
    fn a_leader_that_resigned_may_lead_again_in_a_later_term() {
        let standing = leader(&[&[1, 2]]);
        let told = standing.leadership();
        let (one, other) = (standing.resign(), standing.resign());
        assert_eq!(*told.borrow(), None, "it is told at once");
        assert!(!standing.may_lead(2, &old()));
        drop(one);
        assert!(!standing.may_lead(2, &old()));
        // The other transfer may be carried out late, in another term.
        standing.note_vote(&Vote::new_committed(3, 1));
        assert!(!standing.may_lead(3, &old()));
        drop(other);
        assert!(!standing.may_lead(2, &old()) && !standing.may_lead(3, &old()));
        standing.note_vote(&Vote::new_committed(4, 1));
        assert!(standing.may_lead(4, &old()));
    }

    #[test]
    fn a_member_that_has_stopped_leads_nothing() {
        let standing = leader(&[&[1]]);
        let told = standing.leadership();
        standing.close();
        assert!(!standing.may_lead(2, &old()) && !standing.is_only_voter_in(2, &old()));
        assert_eq!(*told.borrow(), None);
    }
}
