//! Reads of a member that is the only voter: nobody is asked.
//!
//! A linearizable read sees all that was acknowledged before it. Where one member is the only voter, nobody else can
//! acknowledge anything, for nothing is committed and nobody elected without it; and it acknowledges a change once it has
//! applied it. So what it has applied is all there is. This holds from a ReadIndex on, by which the process has applied
//! what an earlier one acknowledged, until the log gets another membership, which is noted here before an entry reaches any
//! other member. No clock decides it.

use std::sync::atomic::{AtomicU64, Ordering};

use openraft::Membership;

use crate::types::Peer;

/// Bits of the state; the rest counts the changes of the newest membership.
const ONLY_VOTER: u64 = 1;
const CAUGHT_UP: u64 = 2;
const CHANGE: u64 = 4;

/// Whether this member is alone, by the newest membership in its log.
#[derive(Debug)]
pub(crate) struct Alone {
    member: u64,
    state: AtomicU64,
}

/// A moment at which it was alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since(u64);

impl Alone {
    pub(crate) fn new(member: u64) -> Self {
        let state = AtomicU64::new(0);
        Self { member, state }
    }

    /// The log has a newer membership from now on; `None` if it lost the newest.
    pub(crate) fn note(&self, membership: Option<&Membership<u64, Peer>>) {
        let only = membership.is_some_and(|membership| match &membership.get_joint_config()[..] {
            [voters] => voters.iter().eq([&self.member]),
            _ => false,
        });
        let next = |state: u64| Some((state & !(ONLY_VOTER | CAUGHT_UP)) + CHANGE + u64::from(only) * ONLY_VOTER);
        // The closure never declines.
        let _ = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next);
    }

    /// Whether what this member has applied is all that anybody has acknowledged.
    pub(crate) fn has_all(&self) -> bool {
        let both = ONLY_VOTER | CAUGHT_UP;
        self.state.load(Ordering::SeqCst) & both == both
    }

    /// To be taken before a ReadIndex is asked for.
    pub(crate) fn since(&self) -> Option<Since> {
        let state = self.state.load(Ordering::SeqCst);
        (state & ONLY_VOTER != 0).then_some(Since(state))
    }

    /// A ReadIndex that was asked for since then is applied. It says nothing about another membership.
    pub(crate) fn caught_up(&self, since: Since) {
        let caught_up = since.0 | CAUGHT_UP;
        // It fails where the membership is another by now.
        let _ = self
            .state
            .compare_exchange(since.0, caught_up, Ordering::SeqCst, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn membership(configs: &[&[u64]], nodes: &[u64]) -> Membership<u64, Peer> {
        let configs = configs
            .iter()
            .map(|voters| voters.iter().copied().collect::<BTreeSet<_>>());
        let nodes: BTreeMap<_, _> = nodes.iter().map(|id| (*id, Peer::default())).collect();
        Membership::new(configs.collect(), nodes).unwrap()
    }

    fn catches_up(alone: &Alone) -> bool {
        alone.since().inspect(|since| alone.caught_up(*since));
        alone.has_all()
    }

    #[test]
    fn only_the_only_voter_is_alone_and_only_once_it_has_caught_up() {
        let alone = Alone::new(1);
        assert!(!catches_up(&alone), "it has no membership");
        for (configs, nodes, is_alone) in [
            (&[&[1][..]][..], &[1][..], true),
            (&[&[1]], &[1, 2], true),
            (&[&[1], &[1, 2]], &[1, 2], false),
            (&[&[1, 2]], &[1, 2], false),
            (&[&[1, 2], &[1]], &[1, 2], false),
            (&[&[2]], &[1, 2], false),
        ] {
            alone.note(Some(&membership(configs, nodes)));
            assert!(!alone.has_all(), "{configs:?}: not caught up yet");
            assert_eq!(catches_up(&alone), is_alone, "{configs:?}");
        }
        alone.note(Some(&membership(&[&[1]], &[1])));
        assert!(catches_up(&alone));
        alone.note(None);
        assert!(!catches_up(&alone), "the membership was taken back");
    }

    #[test]
    fn a_read_index_says_nothing_about_a_later_membership() {
        let alone = Alone::new(1);
        let (one, two) = (membership(&[&[1]], &[1]), membership(&[&[1, 2]], &[1, 2]));
        alone.note(Some(&one));
        let since = alone.since().unwrap();
        for between in [Some(&two), Some(&one)] {
            alone.note(between);
            alone.caught_up(since);
            assert!(!alone.has_all());
        }
    }
}
