//! The state machine as openraft drives it: entries in, answers out, snapshots between.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, RaftSnapshotBuilder};

use crate::command::{Command, Outcome, Reply};
use crate::proto;
use crate::snapshot::{Frozen, SnapshotData, Snapshots};
use crate::store::{Inner, Store};
use crate::types::{LogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};

/// The most entries that are applied under one hold of the lock.
const CHUNK: usize = 256;
/// How long a snapshot that can't be written waits for the next try.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A member's state machine.
#[derive(Clone, Debug)]
pub(crate) struct StateMachine {
    store: Store,
    snapshots: Arc<Snapshots>,
    digesting: Arc<AtomicBool>,
}

impl StateMachine {
    /// The state of the newest snapshot, to go on from.
    pub(crate) fn open(store: Store, snapshots: Arc<Snapshots>) -> registry_api::Result<Self> {
        if let Some(frozen) = snapshots.load()? {
            store.replace(frozen);
        }
        Ok(Self {
            store,
            snapshots,
            digesting: Arc::default(),
        })
    }
}

impl StateMachine {
    /// Takes the digest of a state that a mark left, if there is one. If another is being taken, this one follows it.
    fn take_digest(&self) {
        if !self.store.is_marked() || self.digesting.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(frozen) = self.store.take_marked() else {
            self.digesting.store(false, Ordering::Release);
            return;
        };
        let this = self.clone();
        tokio::task::spawn_blocking(move || {
            match this.snapshots.digest(&frozen) {
                Ok(digest) => this
                    .store
                    .note_digest(frozen.meta.last_log_id.map_or(0, |id| id.index), digest),
                Err(error) => tracing::warn!(%error, "no digest of the state could be taken"),
            }
            this.digesting.store(false, Ordering::Release);
            this.take_digest();
        });
    }
}

/// An entry with what its payload is to the state, decoded before the lock is taken.
enum Step {
    Command(Command),
    Membership(StoredMembership),
    Blank,
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok(self.store.read(|inner| (inner.applied, inner.membership.clone())))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        let mut chunks = entries.ready_chunks(CHUNK);
        while let Some(chunk) = chunks.next().await {
            #[cfg(test)]
            let _applies = self.store.applies.clone().read_owned().await;
            let mut steps = Vec::with_capacity(chunk.len());
            for entry in chunk {
                let (entry, responder) = entry?;
                let step = match entry.payload {
                    EntryPayload::Blank => Step::Blank,
                    EntryPayload::Membership(membership) => {
                        Step::Membership(StoredMembership::new(Some(entry.log_id), membership))
                    }
                    EntryPayload::Normal(proposal) => {
                        let named = |error: io::Error| {
                            let what = format!("entry {} of the log: {error}", entry.log_id.index);
                            io::Error::new(error.kind(), what)
                        };
                        Step::Command(proposal.decode().map_err(named)?)
                    }
                };
                steps.push((entry.log_id, step, responder));
            }
            let mut answers = Vec::with_capacity(steps.len());
            self.store.apply(|applier| {
                for (log_id, step, responder) in steps {
                    let reply = match step {
                        Step::Command(command) => applier.command(log_id, command),
                        Step::Membership(membership) => {
                            applier.membership(membership, log_id);
                            done()
                        }
                        Step::Blank => {
                            applier.blank(log_id);
                            done()
                        }
                    };
                    answers.extend(responder.map(|responder| (responder, reply)));
                }
            });
            self.take_digest();
            for (responder, reply) in answers {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let frozen = self.store.read(Inner::frozen);
        Builder {
            frozen,
            snapshots: self.snapshots.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> Result<(), io::Error> {
        let (snapshots, meta) = (self.snapshots.clone(), meta.clone());
        // Durable first, then taken up in one step; the old one serves until then.
        let frozen = tokio::task::spawn_blocking(move || snapshots.install(&meta, data)).await??;
        self.store.replace(frozen);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.snapshots.current())
    }
}

fn done() -> Reply {
    Outcome::Done(proto::Unit {}).into()
}

/// Writes a frozen state to a file while the state goes on.
#[derive(Debug)]
pub(crate) struct Builder {
    frozen: Frozen,
    snapshots: Arc<Snapshots>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotData;

    /// Writes it, and tries again until that is done: to openraft a snapshot that fails is the end of the member. The
    /// log goes on meanwhile; when the disk has no room for that either, the log says so and ends the process.
    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let mut wait = FIRST_WAIT;
        loop {
            let (snapshots, frozen) = (self.snapshots.clone(), self.frozen.clone());
            match tokio::task::spawn_blocking(move || snapshots.write(&frozen)).await? {
                Ok(snapshot) => return Ok(snapshot),
                Err(error) => tracing::warn!(%error, again_in = ?wait, "a snapshot can't be written, the log grows on"),
            }
            tokio::time::sleep(wait).await;
            if self.snapshots.has_newer(&self.frozen.meta) {
                // openraft takes the metadata alone, and ignores what is older than what it has installed.
                return Ok(Snapshot {
                    meta: self.frozen.meta.clone(),
                    snapshot: SnapshotData::Memory(Bytes::new()),
                });
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use openraft::entry::RaftEntry;
    use prost::Message;

    use super::*;
    use crate::command::{Change, LEVEL};
    use crate::log::Identity;
    use crate::types::{LogEntry, Proposal};

    const IDENTITY: Identity = Identity {
        cluster: [7; 16],
        member: 1,
    };

    /// A member of an older version among newer ones: what it applied as nothing, or as something else, would make its state
    /// another than theirs, and nobody would notice.
    #[tokio::test]
    async fn a_change_that_this_version_does_not_know_ends_the_member_and_is_not_applied() {
        let txn = |condition, write| {
            Change::Txn(proto::Txn {
                conditions: vec![proto::Condition {
                    key: "/ns/a".into(),
                    expect: condition,
                }],
                operations: vec![proto::Operation {
                    key: "/ns/a".into(),
                    write,
                }],
            })
        };
        let put = || Some(proto::operation::Write::Put(proto::Put::default()));
        let absent = || Some(proto::condition::Expect::Absent(proto::Unit {}));
        let later = Command {
            level: LEVEL + 1,
            ..Command::new(txn(absent(), put()))
        };
        // Field 99: what a later version may add to the changes.
        let change = [0x9a, 0x06, 0x00].to_vec();
        let unknown = [
            change,
            later.encode_to_vec(),
            Command::new(txn(None, put())).encode_to_vec(),
            Command::new(txn(absent(), None)).encode_to_vec(),
        ];
        for bytes in unknown {
            let snapshots = Snapshots::open(None, IDENTITY).unwrap();
            let store = Store::default();
            let mut machine = StateMachine::open(store.clone(), snapshots.into()).unwrap();
            let mut entry = |index, bytes: Vec<u8>| {
                let payload = EntryPayload::Normal(Proposal(bytes.into()));
                let entry = LogEntry::new(LogId::new_term_index(1, index), payload);
                let entries = stream::iter([Ok((entry, None))]);
                futures_util::FutureExt::now_or_never(machine.apply(entries)).unwrap()
            };
            entry(1, Command::new(txn(absent(), put())).encode_to_vec()).unwrap();
            let error = entry(2, bytes).unwrap_err().to_string();
            assert!(
                error.contains("entry 2") && error.contains("this version knows"),
                "{error}"
            );
            let held = store.read(|inner| (inner.applied.map(|applied| applied.index), inner.state.tree.len()));
            assert_eq!(held, (Some(1), 1));
        }
    }
}
