//! openraft's types as messages. Their layout on disk and on the wire is ours, not openraft's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use openraft::entry::RaftEntry;
use openraft::vote::RaftVote;
use openraft::{EntryPayload, Membership};

use crate::proto::registry::log::v1 as message;
use crate::types::{LogEntry, LogId, Peer, Proposal, StoredMembership, TypeConfig, Vote};

type LeaderId = openraft::type_config::alias::LeaderIdOf<TypeConfig>;
type CommittedLeaderId = openraft::type_config::alias::CommittedLeaderIdOf<TypeConfig>;

pub(crate) fn log_id_to(id: &LogId) -> message::LogId {
    message::LogId {
        term: id.committed_leader_id().term,
        index: id.index,
    }
}

pub(crate) fn log_id_from(id: message::LogId) -> LogId {
    LogId::new(CommittedLeaderId::new(id.term), id.index)
}

pub(crate) fn vote_to(vote: &Vote) -> message::Vote {
    let leader = vote.leader_id();
    message::Vote {
        term: leader.term,
        node: leader.voted_for,
        committed: vote.is_committed(),
    }
}

pub(crate) fn vote_from(vote: message::Vote) -> Vote {
    let leader = LeaderId {
        term: vote.term,
        voted_for: vote.node,
    };
    Vote::from_leader_id(leader, vote.committed)
}

pub(crate) fn membership_to(membership: &Membership<u64, Peer>) -> message::Membership {
    let voters = |voters: &BTreeSet<u64>| message::Voters {
        members: voters.iter().copied().collect(),
    };
    let node = |(id, peer): (&u64, &Peer)| message::Node {
        id: *id,
        name: peer.name.clone(),
        address: peer.address.clone(),
    };
    message::Membership {
        configs: membership.get_joint_config().iter().map(voters).collect(),
        nodes: membership.nodes().map(node).collect(),
    }
}

pub(crate) fn membership_from(membership: message::Membership) -> io::Result<Membership<u64, Peer>> {
    let configs = membership
        .configs
        .into_iter()
        .map(|voters| voters.members.into_iter().collect())
        .collect();
    let nodes = membership.nodes.into_iter().map(|node| {
        (
            node.id,
            Peer {
                name: node.name,
                address: node.address,
            },
        )
    });
    Membership::new(configs, nodes.collect::<BTreeMap<_, _>>()).map_err(io::Error::other)
}

pub(crate) fn stored_membership_from(
    log_id: Option<message::LogId>,
    membership: Option<message::Membership>,
) -> io::Result<StoredMembership> {
    Ok(match membership.filter(|membership| !membership.configs.is_empty()) {
        Some(membership) => StoredMembership::new(log_id.map(log_id_from), membership_from(membership)?),
        None => StoredMembership::default(),
    })
}

pub(crate) fn entry_to(entry: &LogEntry) -> message::Entry {
    use message::entry::Payload;
    let payload = match &entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Normal(proposal) => Some(Payload::Normal(proposal.0.clone())),
        EntryPayload::Membership(membership) => Some(Payload::Membership(membership_to(membership))),
    };
    message::Entry {
        id: Some(log_id_to(&entry.log_id)),
        payload,
    }
}

pub(crate) fn entry_from(entry: message::Entry) -> io::Result<LogEntry> {
    use message::entry::Payload;
    let id = entry
        .id
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an entry without its place in the log"))?;
    let payload = match entry.payload {
        None => EntryPayload::Blank,
        Some(Payload::Normal(bytes)) => EntryPayload::Normal(Proposal(bytes)),
        Some(Payload::Membership(membership)) => EntryPayload::Membership(membership_from(membership)?),
    };
    Ok(LogEntry::new(log_id_from(id), payload))
}
