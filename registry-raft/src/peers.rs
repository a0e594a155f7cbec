//! What members say to each other, as messages: whose it is, for whom, and what of openraft's types is in it.

use std::time::Duration;

use bytes::Bytes;
use openraft::raft::{AppendEntriesRequest, StreamAppendError, VoteRequest, VoteResponse};
use tonic::Status;

use crate::link::millis;
use crate::log::Identity;
use crate::proto::registry::log::v1 as log;
use crate::proto::registry::peer::v1 as message;
use crate::types::{Snapshot, SnapshotMeta, TypeConfig, Vote};
use crate::wire;

/// What a follower answers to entries: how far its log matches, or why it does not take them.
pub(crate) type Appended = Result<Option<crate::types::LogId>, StreamAppendError<TypeConfig>>;

impl Identity {
    /// The head of every message to that member.
    pub(crate) fn header(&self, to: u64) -> Option<message::Header> {
        Some(message::Header {
            cluster: Bytes::copy_from_slice(&self.cluster),
            from: self.member,
            to,
        })
    }

    /// Refuses, by name, what is another cluster's or for another member. Answers the sender.
    pub(crate) fn check(&self, header: Option<&message::Header>) -> Result<u64, Status> {
        let header = header.ok_or_else(|| refused("it does not say whose it is".into()))?;
        if *header.cluster != self.cluster {
            let theirs = uuid::Uuid::from_slice(&header.cluster).unwrap_or_default();
            let ours = uuid::Uuid::from_bytes(self.cluster);
            return Err(refused(format!("it is of cluster {theirs}, and this is one of {ours}")));
        }
        if header.to != self.member {
            return Err(refused(format!(
                "it is for member {}, and this is {}",
                header.to, self.member
            )));
        }
        Ok(header.from)
    }

    /// As [`Identity::check`], for an answer of that member.
    pub(crate) fn check_answer(&self, header: Option<&message::Header>, of: u64) -> Result<(), Status> {
        match self.check(header)? {
            from if from == of => Ok(()),
            from => Err(refused(format!("member {of} was asked, and {from} answered"))),
        }
    }
}

/// A message that must not be taken. Nothing was written, but for the log of the process.
pub(crate) fn refused(why: String) -> Status {
    tracing::warn!(why, "a message between members is refused");
    Status::failed_precondition(format!("a message between members is refused: {why}"))
}

fn vote_from(vote: Option<log::Vote>, sender: Option<u64>) -> Result<Vote, Status> {
    let vote = vote.ok_or_else(|| refused("it has no vote".into()))?;
    if let Some(sender) = sender.filter(|sender| *sender != vote.node) {
        return Err(refused(format!("{sender} sent it in the name of {}", vote.node)));
    }
    Ok(wire::vote_from(vote))
}

pub(crate) fn append_to(
    header: Option<message::Header>,
    request: &AppendEntriesRequest<TypeConfig>,
) -> message::AppendRequest {
    message::AppendRequest {
        header,
        vote: Some(wire::vote_to(&request.vote)),
        previous: request.prev_log_id.as_ref().map(wire::log_id_to),
        entries: request.entries.iter().map(wire::entry_to).collect(),
        committed: request.leader_commit.as_ref().map(wire::log_id_to),
    }
}

pub(crate) fn append_from(
    request: message::AppendRequest,
    sender: u64,
) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    let entries = request.entries.into_iter().map(wire::entry_from);
    let entries = entries
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| refused(error.to_string()))?;
    let previous = request.previous.map(wire::log_id_from);
    // A hole would be taken for a broken promise of the log.
    let first = previous.map_or(Some(0), |previous| previous.index.checked_add(1));
    let first = first.filter(|first| first.checked_add(entries.len() as u64).is_some());
    let first = first.ok_or_else(|| refused("it goes beyond the last index that there is".into()))?;
    for (entry, expected) in entries.iter().zip(first..) {
        if entry.log_id.index != expected {
            return Err(refused(format!(
                "entry {} is where {expected} should be",
                entry.log_id.index
            )));
        }
    }
    Ok(AppendEntriesRequest {
        vote: vote_from(request.vote, Some(sender))?,
        prev_log_id: previous,
        entries,
        leader_commit: request.committed.map(wire::log_id_from),
    })
}

/// The acknowledgement of a member that elects no other leader for so long after it.
pub(crate) fn appended_to(
    header: Option<message::Header>,
    appended: &Appended,
    silence: Duration,
) -> message::AppendAnswer {
    let mut answer = message::AppendAnswer {
        header,
        silence_ms: millis(silence),
        ..message::AppendAnswer::default()
    };
    match appended {
        Ok(matched) => answer.matched = matched.as_ref().map(wire::log_id_to),
        Err(StreamAppendError::Conflict(at)) => answer.conflict = Some(wire::log_id_to(at)),
        Err(StreamAppendError::HigherVote(vote)) => answer.higher_vote = Some(wire::vote_to(vote)),
    }
    answer
}

pub(crate) fn appended_from(answer: message::AppendAnswer) -> Appended {
    match (answer.higher_vote, answer.conflict) {
        (Some(vote), _) => Err(StreamAppendError::HigherVote(wire::vote_from(vote))),
        (None, Some(at)) => Err(StreamAppendError::Conflict(wire::log_id_from(at))),
        (None, None) => Ok(answer.matched.map(wire::log_id_from)),
    }
}

pub(crate) fn vote_request_to(
    header: Option<message::Header>,
    request: &VoteRequest<TypeConfig>,
) -> message::VoteRequest {
    message::VoteRequest {
        header,
        vote: Some(wire::vote_to(&request.vote)),
        last: request.last_log_id.as_ref().map(wire::log_id_to),
        leadership_transfer: request.leadership_transfer,
    }
}

pub(crate) fn vote_request_from(request: message::VoteRequest, sender: u64) -> Result<VoteRequest<TypeConfig>, Status> {
    let vote = vote_from(request.vote, Some(sender))?;
    let mut asked = VoteRequest::new(vote, request.last.map(wire::log_id_from));
    asked.leadership_transfer = request.leadership_transfer;
    Ok(asked)
}

pub(crate) fn vote_answer_to(
    header: Option<message::Header>,
    answer: &VoteResponse<TypeConfig>,
) -> message::VoteAnswer {
    message::VoteAnswer {
        header,
        vote: Some(wire::vote_to(&answer.vote)),
        granted: answer.vote_granted,
        last: answer.last_log_id.as_ref().map(wire::log_id_to),
    }
}

pub(crate) fn vote_answer_from(answer: message::VoteAnswer) -> Result<VoteResponse<TypeConfig>, Status> {
    let vote = vote_from(answer.vote, None)?;
    Ok(VoteResponse::new(
        vote,
        answer.last.map(wire::log_id_from),
        answer.granted,
    ))
}

pub(crate) fn snapshot_head_to(
    header: Option<message::Header>,
    vote: &Vote,
    snapshot: &Snapshot,
) -> message::SnapshotHead {
    let membership = &snapshot.meta.last_membership;
    message::SnapshotHead {
        header,
        vote: Some(wire::vote_to(vote)),
        last: snapshot.meta.last_log_id.as_ref().map(wire::log_id_to),
        membership: Some(wire::membership_to(membership.membership())),
        membership_log_id: membership.log_id().as_ref().map(wire::log_id_to),
    }
}

pub(crate) fn snapshot_head_from(head: message::SnapshotHead, sender: u64) -> Result<(Vote, SnapshotMeta), Status> {
    let membership = wire::stored_membership_from(head.membership_log_id, head.membership);
    let meta = SnapshotMeta {
        last_log_id: head.last.map(wire::log_id_from),
        last_membership: membership.map_err(|error| refused(error.to_string()))?,
    };
    Ok((vote_from(head.vote, Some(sender))?, meta))
}
