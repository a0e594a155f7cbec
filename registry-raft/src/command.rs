//! What the log carries and what applying it answers, between the types of the api and those of the wire.

use std::fmt;
use std::io;

use bytes::Bytes;
use prost::Message;
use registry_api::{
    Committed, Condition, Error, Existing, Expect, Key, Kind, Namespace, Operation, Refusal, Revision, SessionId, Txn,
};

use crate::proto;
use crate::types::Proposal;

pub(crate) use proto::command::Change;
pub(crate) use proto::reply::Result as Outcome;
pub(crate) use proto::{Command, Reply};

/// The rules that this version applies. Whoever adds a change, or a field that changes what a change does, adds a level: a
/// member of an older version would otherwise apply something else than the others, and hold another state from then on.
///
/// 1: [`proto::OpenSession::first`].
pub(crate) const LEVEL: u32 = 1;

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl From<Outcome> for Reply {
    fn from(result: Outcome) -> Self {
        Self { result: Some(result) }
    }
}

impl Command {
    /// A command of no session.
    pub(crate) fn new(change: Change) -> Self {
        Self {
            change: Some(change),
            ..Self::default()
        }
    }

    /// Checks that this version knows every part of it.
    ///
    /// # Errors
    /// Says what it does not know.
    pub(crate) fn understood(&self) -> Result<(), String> {
        let unknown = |what: &str| {
            Err(format!(
                "{what} is none that this version knows; use the version that wrote it, or a later one"
            ))
        };
        if self.level > LEVEL {
            return unknown(&format!("level {} of a change", self.level));
        }
        let txn = match &self.change {
            Some(Change::Txn(txn)) => txn,
            Some(_) => return Ok(()),
            None => return unknown("a change"),
        };
        if txn.conditions.iter().any(|condition| condition.expect.is_none()) {
            return unknown("a condition");
        }
        match txn.operations.iter().any(|operation| operation.write.is_none()) {
            true => unknown("an operation"),
            false => Ok(()),
        }
    }

    pub(crate) fn encode(&self) -> Proposal {
        Proposal(self.encode_to_vec().into())
    }
}

impl Proposal {
    /// Decodes what a member encoded. The bytes of values are shared, not copied.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for what this version does not know. Applied as nothing it would make this member's
    /// state another than that of the others.
    pub(crate) fn decode(&self) -> io::Result<Command> {
        let command = Command::decode(self.0.clone()).map_err(io::Error::other)?;
        let unknown = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        command.understood().map_err(unknown)?;
        Ok(command)
    }
}

/// A transaction with its keys qualified.
pub(crate) fn txn_to_proto(namespace: &Namespace, txn: &Txn) -> proto::Txn {
    use proto::condition::Expect as Wire;
    use proto::operation::Write;
    let unit = proto::Unit {};
    let condition = |condition: &Condition| proto::Condition {
        key: namespace.qualify(condition.key.as_str()),
        expect: match condition.expect {
            Expect::Absent => Some(Wire::Absent(unit)),
            Expect::Present => Some(Wire::Present(unit)),
            Expect::ModRevision(revision) => Some(Wire::ModRevision(revision.0)),
            Expect::CreateRevision(revision) => Some(Wire::CreateRevision(revision.0)),
            Expect::Childless => Some(Wire::Childless(unit)),
            // The enum may grow; a condition that is not understood fails.
            _ => None,
        },
    };
    let operation = |operation: &Operation| proto::Operation {
        key: namespace.qualify(operation.key().as_str()),
        write: Some(match operation {
            Operation::Put {
                value, kind, existing, ..
            } => Write::Put(proto::Put {
                value: value.clone(),
                ephemeral: *kind == Kind::Ephemeral,
                take_over: *existing == Existing::TakeOver,
            }),
            Operation::Delete { .. } => Write::Delete(unit),
        }),
    };
    proto::Txn {
        conditions: txn.conditions.iter().map(condition).collect(),
        operations: txn.operations.iter().map(operation).collect(),
    }
}

/// The answer to a transaction, in the words of the api.
pub(crate) fn txn_result(namespace: &Namespace, txn: &Txn, outcome: Outcome) -> Result<Committed, Error> {
    match outcome {
        Outcome::Committed(committed) => Ok(Committed {
            revision: Revision(committed.revision),
            changed: committed.changed,
        }),
        Outcome::Conflict(conflict) => match txn.conditions.get(conflict.index as usize) {
            Some(condition) => Err(Error::Conflict {
                key: condition.key.clone(),
                expected: condition.expect,
                found: (conflict.found > 0).then_some(Revision(conflict.found)),
            }),
            None => Err(not_understood()),
        },
        Outcome::Refused(refused) => {
            let operation = txn.operations.get(refused.index as usize).ok_or_else(not_understood)?;
            let why = refused.why.ok_or_else(not_understood)?;
            Err(Error::Refused {
                key: operation.key().clone(),
                refusal: refusal(namespace, why)?,
            })
        }
        Outcome::SessionExpired(session) => Err(Error::SessionExpired {
            session: SessionId(session),
        }),
        Outcome::SessionOpened(_)
        | Outcome::Deleted(_)
        | Outcome::Done(_)
        | Outcome::Marked(_)
        | Outcome::Crowded(_) => Err(not_understood()),
    }
}

fn refusal(namespace: &Namespace, why: proto::refused::Why) -> Result<Refusal, Error> {
    use proto::refused::Why;
    Ok(match why {
        Why::Persistent(_) => Refusal::Persistent,
        Why::Ephemeral(_) => Refusal::Ephemeral,
        Why::OwnedBy(session) => Refusal::OwnedBy(SessionId(session)),
        Why::HasChildren(_) => Refusal::HasChildren,
        Why::BelowEphemeral(key) => Refusal::BelowEphemeral(logical(namespace, &key)?),
    })
}

/// The key without its namespace.
pub(crate) fn logical(namespace: &Namespace, qualified: &str) -> Result<Key, Error> {
    let name = namespace.strip(qualified).ok_or_else(not_understood)?;
    Ok(Key::from_store(name)?)
}

/// A member answered what this version does not know: the write may have happened.
pub(crate) fn not_understood() -> Error {
    Error::OutcomeUnknown {
        operation: "a request",
        source: "the member's answer makes no sense to this version".into(),
    }
}

/// An entry with its key made logical.
pub(crate) fn entry(namespace: &Namespace, entry: &proto::Entry) -> Result<registry_api::Entry, Error> {
    Ok(registry_api::Entry {
        key: logical(namespace, &entry.key)?,
        value: entry.value.clone(),
        create_revision: Revision(entry.create_revision),
        mod_revision: Revision(entry.mod_revision),
        session: (entry.session > 0).then_some(SessionId(entry.session)),
    })
}

impl From<&crate::tree::Record> for proto::Entry {
    fn from(record: &crate::tree::Record) -> Self {
        Self {
            key: record.key.as_ref().into(),
            value: record.value.clone(),
            create_revision: record.create_revision,
            mod_revision: record.mod_revision,
            version: record.version,
            session: record.session,
        }
    }
}

impl proto::Entry {
    pub(crate) fn into_record(self) -> crate::tree::Record {
        crate::tree::Record {
            key: self.key.into(),
            // Its own allocation: the buffer it was read in holds much else.
            value: Bytes::copy_from_slice(&self.value),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            session: self.session,
        }
    }
}
