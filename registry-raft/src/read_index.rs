//! How far the log must be applied for a read that begins now, as the Raft leader finds it out.
//!
//! This is the ReadIndex of Ongaro's dissertation (section 6.4): what is committed when the question comes, once a majority
//! has said since then that no later leader can have committed more. The leader asks only as many others as make a majority
//! with it, and the rest when these do not answer soon (the thrifty quorums of Moraru, Andersen and Kaminsky's *There Is
//! More Consensus in Egalitarian Parliaments*, 2013). Whoever is asked looks for the term that it has promised itself to,
//! which is in its log before anybody is told of the promise, so its Raft task is not disturbed. A member that asks the
//! leader says its own term with that, and is one of the majority.
//!
//! A leader of a later term that committed anything had the promise of a majority before it did. Both majorities have a
//! member in common, which would have said so.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::Membership;
use openraft::async_runtime::WatchReceiver;
use registry_api::Result;

use crate::command::not_understood;
use crate::leader::no_leader;
use crate::member::{Core, unavailable};
use crate::proto::registry::peer::v1 as message;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::types::{LogId, Peer};

/// How long the members that are asked first have, before the rest is asked as well.
const SOON: Duration = Duration::from_millis(10);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(800);

/// What the Raft task knows at one moment.
struct Known {
    /// In which this member leads, if it does.
    term: Option<u64>,
    committed: Option<LogId>,
    membership: Membership<u64, Peer>,
}

impl Known {
    /// The index of a read, if these have promised themselves to no later term than `term` since it began. `None` as long as
    /// nothing of that term is committed: the leader does not know until then how much earlier leaders have committed
    /// (section 6.4 of the dissertation, step 1), which comes before its first entry.
    fn index(self, term: u64, true_to: &BTreeSet<u64>) -> Result<Option<LogId>> {
        if self.term != Some(term) {
            return Err(no_leader());
        }
        if !is_majority(&self.membership, true_to) {
            return Err(unavailable("the members have changed meanwhile"));
        }
        Ok(of_term(self.committed, term))
    }
}

/// The id of an entry, if it is of that term.
pub(crate) fn of_term(id: Option<LogId>, term: u64) -> Option<LogId> {
    id.filter(|id| id.committed_leader_id().term == term)
}

impl Core {
    /// How far a member must have applied the log for a read that began before this was called. `with` has promised itself
    /// to no later term than it says, since the read began. The index is of the term in which this member was confirmed as the
    /// leader since then.
    ///
    /// # Errors
    /// [`registry_api::Error::Unavailable`] if this member does not lead, or no majority says so.
    pub(crate) async fn read_index(&self, with: Option<(u64, u64)>) -> Result<LogId> {
        let us = self.identity().member;
        // What is asked for before it is known for certain.
        let (term, membership) = {
            let metrics = self.raft().server_metrics();
            let metrics = metrics.borrow_watched();
            let membership = metrics.membership_config.membership().clone();
            (metrics.vote.leader_id().term, membership)
        };
        let mut true_to = BTreeSet::from([us]);
        true_to.extend(with.filter(|(_, promised)| *promised <= term).map(|(member, _)| member));
        let known = self.raft().with_raft_state(move |state| {
            let (vote, leader) = (state.vote_ref(), state.vote_ref().leader_id());
            Known {
                term: (vote.is_committed() && leader.voted_for == us).then_some(leader.term),
                // What a majority has may be committed, and told by others, before it is in this member's own log.
                committed: state.local_committed().max(state.cluster_committed()).copied(),
                membership: state.membership_state.effective().membership().clone(),
            }
        });
        let (known, asked) = tokio::join!(known, self.majority(term, &membership, true_to));
        if let Some(index) = known.map_err(unavailable)?.index(term, &asked?)? {
            return Ok(index);
        }
        let mut changes = self.raft().data_metrics();
        loop {
            let applied = self.store().read(|inner| inner.applied);
            if let Some(applied) = of_term(applied, term) {
                return Ok(applied);
            }
            changes.changed().await.map_err(unavailable)?;
        }
    }

    /// Asks until a majority is true to that term.
    async fn majority(
        &self,
        term: u64,
        of: &Membership<u64, Peer>,
        mut true_to: BTreeSet<u64>,
    ) -> Result<BTreeSet<u64>> {
        let ask = |(id, peer)| self.ask_promise(id, peer);
        let mut others = self.in_order_of_answers(of, &true_to).into_iter();
        let mut asked = FuturesUnordered::new();
        // As many as it takes, if all of them answer.
        let mut hoped_for = true_to.clone();
        while !is_majority(of, &hoped_for)
            && let Some((id, peer)) = others.next()
        {
            hoped_for.insert(id);
            asked.push(ask((id, peer)));
        }
        let mut late = pin!(tokio::time::sleep(SOON));
        while !is_majority(of, &true_to) {
            let answer = tokio::select! {
                answer = asked.next() => answer,
                () = &mut late, if others.len() > 0 => {
                    asked.extend(others.by_ref().map(ask));
                    continue;
                }
            };
            match answer {
                Some((id, Ok(promised))) if promised <= term => {
                    true_to.insert(id);
                }
                Some((_, Ok(_))) => return Err(no_leader()),
                Some((_, Err(cause))) => {
                    tracing::debug!(%cause, "a member does not say whether this one leads");
                    asked.extend(others.by_ref().map(ask));
                }
                None => return Err(unavailable("no majority answers the Raft leader")),
            }
        }
        self.answered().lock().clone_from(&true_to);
        Ok(true_to)
    }

    /// The other voters, first those that answered last time.
    fn in_order_of_answers(&self, of: &Membership<u64, Peer>, but: &BTreeSet<u64>) -> Vec<(u64, Peer)> {
        let voters = of.voter_ids().filter(|id| !but.contains(id));
        let mut others: Vec<_> = voters.filter_map(|id| Some((id, of.get_node(&id)?.clone()))).collect();
        let answered = self.answered().lock();
        others.sort_by_key(|(id, _)| !answered.contains(id));
        others
    }

    /// Which term another has promised itself to.
    async fn ask_promise(&self, id: u64, peer: Peer) -> (u64, Result<u64>) {
        let us = self.identity();
        let question = Call::Promise(message::PromiseRequest { header: us.header(id) });
        let answer = match self.inquire(id, &peer, question, PATIENCE).await {
            Ok(Answer::Promise(answer)) => match us.check_answer(answer.header.as_ref(), id) {
                Ok(()) => Ok(answer.term),
                Err(status) => Err(unavailable(status.message().to_owned())),
            },
            Ok(_) => Err(not_understood()),
            Err(error) => Err(error),
        };
        (id, answer)
    }
}

/// Whether they are a majority of each of the configurations.
fn is_majority(of: &Membership<u64, Peer>, members: &BTreeSet<u64>) -> bool {
    of.get_joint_config()
        .iter()
        .all(|voters| voters.intersection(members).count() > voters.len() / 2)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn membership(configs: &[&[u64]]) -> Membership<u64, Peer> {
        let configs: Vec<BTreeSet<u64>> = configs.iter().map(|voters| voters.iter().copied().collect()).collect();
        let nodes: BTreeMap<_, _> = (1..=6).map(|id| (id, Peer::default())).collect();
        Membership::new(configs, nodes).unwrap()
    }

    #[test]
    fn a_read_waits_for_an_entry_of_the_leaders_own_term() {
        let known = |term, committed: Option<(u64, u64)>| Known {
            term,
            committed: committed.map(|(term, index)| LogId::new_term_index(term, index)),
            membership: membership(&[&[1, 2, 3]]),
        };
        let (some, few) = (BTreeSet::from([1, 2]), BTreeSet::from([1]));
        let index = |known: Known| known.index(2, &some).ok();
        assert_eq!(
            index(known(Some(2), Some((2, 9)))),
            Some(Some(LogId::new_term_index(2, 9)))
        );
        assert_eq!(index(known(Some(2), Some((1, 8)))), Some(None));
        assert_eq!(index(known(Some(2), None)), Some(None));
        // It does not lead any more, or not in this term.
        assert_eq!(index(known(None, Some((2, 9)))), None);
        assert_eq!(index(known(Some(3), Some((3, 9)))), None);
        // No majority of the present members said so.
        assert!(known(Some(2), Some((2, 9))).index(2, &few).is_err());
    }

    #[test]
    fn a_majority_is_one_of_each_configuration() {
        for (configs, members, is) in [
            (&[&[1][..]][..], &[1][..], true),
            (&[&[1, 2]], &[1], false),
            (&[&[1, 2]], &[1, 2], true),
            (&[&[1, 2, 3]], &[1, 3], true),
            (&[&[1, 2, 3]], &[1, 6], false),
            (&[&[1, 2, 3, 4]], &[1, 2], false),
            (&[&[1, 2, 3], &[3, 4, 5]], &[1, 2, 3], false),
            (&[&[1, 2, 3], &[3, 4, 5]], &[2, 3, 4], true),
        ] {
            let members = members.iter().copied().collect();
            assert_eq!(
                is_majority(&membership(configs), &members),
                is,
                "{configs:?} {members:?}"
            );
        }
    }
}
