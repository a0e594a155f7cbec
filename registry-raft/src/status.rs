//! How a group stands, as a member sees it.

use serde::Serialize;

use crate::proto;

/// How a group stands, as one member sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The members, by name.
    pub members: Vec<MemberStatus>,
    /// The id of the member that answered.
    pub answered_by: u64,
    /// The Raft term.
    pub term: u64,
    /// The index of the last entry of the log that is applied.
    pub applied: u64,
    /// The newest revision.
    pub revision: u64,
    /// The newest revision whose changes are not kept: a watch can start after it.
    pub compacted: u64,
    /// How many keys there are, the recipes' own included.
    pub keys: u64,
    /// How many sessions are open.
    pub sessions: u64,
    /// How many watches the member serves.
    pub watches: u64,
    /// The size of the log on disk that no snapshot covers, in bytes.
    pub log_bytes: u64,
    /// The size of the newest snapshot, in bytes.
    pub snapshot_bytes: u64,
}

/// One member of the group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemberStatus {
    /// Its number, never used again for another.
    pub id: u64,
    /// Its name in the config.
    pub name: String,
    /// Where it answers; empty in memory.
    pub address: String,
    /// `leader`, `follower` or `learner`. Nobody is the leader while the member that answered hears none, or leads and
    /// hears no majority.
    pub role: String,
    /// The index up to which its log is the Raft leader's, if the Raft leader could be asked.
    pub matched: Option<u64>,
    /// How many entries of the log it lacks, if the Raft leader could be asked.
    pub lag: Option<u64>,
    /// The index of the last entry of the log that it has applied, if it could be asked.
    pub applied: Option<u64>,
}

impl Status {
    /// The Raft leader, if the member that answered hears one.
    pub fn leader(&self) -> Option<&MemberStatus> {
        self.members.iter().find(|member| member.role == "leader")
    }
}

impl From<proto::StatusAnswer> for Status {
    fn from(answer: proto::StatusAnswer) -> Self {
        let member = |member: proto::MemberStatus| MemberStatus {
            id: member.id,
            name: member.name,
            address: member.address,
            role: member.role,
            matched: member.matched,
            lag: member.lag,
            applied: member.applied,
        };
        Self {
            members: answer.members.into_iter().map(member).collect(),
            answered_by: answer.answered_by,
            term: answer.term,
            applied: answer.applied,
            revision: answer.revision,
            compacted: answer.compacted,
            keys: answer.keys,
            sessions: answer.sessions,
            watches: answer.watches,
            log_bytes: answer.log_bytes,
            snapshot_bytes: answer.snapshot_bytes,
        }
    }
}
