//! The state machine: what a command does to the store. No clock, no socket, no chance.
//!
//! The revision rules are etcd's: one revision for each command that changes something, a create and a mod revision and
//! a version for each key. Every member applies the same commands in the same order and holds the same state.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use crate::command::{Change, Command, Outcome, Reply};
use crate::proto;
use crate::tree::{Record, Tree};

/// How many answers are remembered for one session. One that never says what it received costs no more.
pub(crate) const MAX_REPLIES: usize = 1 << 16;

/// The replicated state.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    pub(crate) tree: Tree,
    pub(crate) revision: u64,
    pub(crate) sessions: BTreeMap<u64, Arc<SessionRecord>>,
    /// The newest session's id. Ids are never used again, nor by another group: where they begin is drawn by chance.
    pub(crate) last_session: u64,
    /// The ids of members that the group has removed. None is given again, so whoever asks in its name comes too late.
    pub(crate) removed: BTreeSet<u64>,
    /// The keys of `tree` that are ephemeral, for the question whether one is above a key that is put.
    ephemeral: HashSet<Arc<str>>,
}

/// A session as the group knows it. When it expires is the Raft leader's to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SessionRecord {
    pub(crate) ttl_ms: u64,
    /// Its ephemeral keys.
    pub(crate) keys: BTreeSet<Arc<str>>,
    /// What was answered to its commands, by sequence, as long as it may ask again.
    pub(crate) replies: BTreeMap<u64, Reply>,
    /// Every sequence below was answered, and is not remembered.
    pub(crate) answered_below: u64,
    /// How much of its TTL had passed without a keep-alive when that was last noted.
    pub(crate) silent_ms: u64,
    /// How often it was heard again after that: what was counted before is void then.
    pub(crate) heard: u64,
}

/// A change to a key, as watches tell it.
#[derive(Clone, Debug)]
pub(crate) struct KeyChange {
    pub(crate) kind: ChangeKind,
    /// The record as it is now, or as it last was.
    pub(crate) record: Arc<Record>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    Created,
    Updated,
    Deleted,
    SessionEnded,
}

/// What one command did: its answer, and the changes of its revision.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) reply: Reply,
    pub(crate) changes: Vec<KeyChange>,
}

impl State {
    /// Takes up a state that was stored: what can be derived from the records is.
    pub(crate) fn restore(
        tree: Tree,
        revision: u64,
        last_session: u64,
        sessions: BTreeMap<u64, SessionRecord>,
    ) -> Self {
        let mut sessions = sessions;
        let mut ephemeral = HashSet::new();
        for record in tree.from("").filter(|record| record.session > 0) {
            ephemeral.insert(record.key.clone());
            sessions
                .entry(record.session)
                .or_default()
                .keys
                .insert(record.key.clone());
        }
        let sessions = sessions
            .into_iter()
            .map(|(id, session)| (id, Arc::new(session)))
            .collect();
        Self {
            tree,
            revision,
            sessions,
            last_session,
            removed: BTreeSet::new(),
            ephemeral,
        }
    }

    /// Applies a command that the log holds in `term`.
    pub(crate) fn apply(&mut self, term: u64, command: Command) -> Applied {
        let mut changes = Vec::new();
        let Command {
            session,
            sequence,
            answered_below,
            level: _,
            change,
        } = command;
        if session > 0 {
            let Some(record) = self.sessions.get_mut(&session) else {
                return Applied {
                    reply: Outcome::SessionExpired(session).into(),
                    changes,
                };
            };
            let record = Arc::make_mut(record);
            if let Some(reply) = record.replies.get(&sequence) {
                return Applied {
                    reply: reply.clone(),
                    changes,
                };
            }
            if sequence < record.answered_below {
                // Answered, and the answer was received: only a request that lost its way comes now.
                return Applied {
                    reply: Outcome::Done(proto::Unit {}).into(),
                    changes,
                };
            }
            if answered_below > record.answered_below {
                record.answered_below = answered_below;
                // Few at a time; `split_off` would count what is left.
                while let Some(reply) = record
                    .replies
                    .first_entry()
                    .filter(|reply| *reply.key() < answered_below)
                {
                    reply.remove();
                }
            }
            if record.replies.len() >= MAX_REPLIES {
                return Applied {
                    reply: Outcome::Crowded(MAX_REPLIES as u64).into(),
                    changes,
                };
            }
        }
        let outcome = match change {
            Some(Change::Txn(txn)) => self.txn(session, txn, &mut changes),
            Some(Change::DeletePrefix(prefix)) => self.delete_prefix(&prefix, &mut changes),
            Some(Change::Open(open)) => self.open(&open),
            Some(Change::Close(close)) => self.end(&[close.session], &mut changes),
            Some(Change::Expire(expire)) if expire.term == term => self.end(&expire.sessions, &mut changes),
            Some(Change::Silences(silences)) if silences.term == term => self.note_silences(&silences),
            Some(Change::Heard(session)) => self.note_heard(session),
            Some(Change::Expire(_) | Change::Silences(_) | Change::Mark(_)) | None => Outcome::Done(proto::Unit {}),
        };
        let reply = Reply::from(outcome);
        if let Some(record) = self.sessions.get_mut(&session) {
            Arc::make_mut(record).replies.insert(sequence, reply.clone());
        }
        Applied { reply, changes }
    }

    fn open(&mut self, open: &proto::OpenSession) -> Outcome {
        if self.last_session == 0 {
            // Half of the numbers are left to count.
            self.last_session = open.first & (u64::MAX >> 1);
        }
        self.last_session += 1;
        let record = SessionRecord {
            ttl_ms: open.ttl_ms,
            ..SessionRecord::default()
        };
        self.sessions.insert(self.last_session, Arc::new(record));
        Outcome::SessionOpened(self.last_session)
    }

    fn end(&mut self, sessions: &[u64], changes: &mut Vec<KeyChange>) -> Outcome {
        for session in sessions {
            let Some(ended) = self.sessions.remove(session) else {
                continue;
            };
            for key in &ended.keys {
                self.delete(key, ChangeKind::SessionEnded, changes);
            }
        }
        self.revision += u64::from(!changes.is_empty());
        Outcome::Done(proto::Unit {})
    }

    fn note_silences(&mut self, silences: &proto::Silences) -> Outcome {
        for silence in &silences.silences {
            let session = self.sessions.get_mut(&silence.session);
            if let Some(session) = session.filter(|session| session.heard == silence.heard) {
                Arc::make_mut(session).silent_ms = silence.silent_ms;
            }
        }
        Outcome::Done(proto::Unit {})
    }

    fn note_heard(&mut self, session: u64) -> Outcome {
        let Some(record) = self.sessions.get_mut(&session) else {
            return Outcome::SessionExpired(session);
        };
        let record = Arc::make_mut(record);
        record.silent_ms = 0;
        record.heard += 1;
        Outcome::Done(proto::Unit {})
    }

    fn delete_prefix(&mut self, prefix: &str, changes: &mut Vec<KeyChange>) -> Outcome {
        let (from, to) = below(prefix);
        let keys: Vec<_> = self
            .tree
            .get(prefix)
            .into_iter()
            .chain(self.tree.range(&from, &to))
            .map(|r| r.key.clone())
            .collect();
        for key in &keys {
            self.delete(key, ChangeKind::Deleted, changes);
        }
        self.revision += u64::from(!changes.is_empty());
        Outcome::Deleted(keys.len() as u64)
    }

    fn txn(&mut self, session: u64, txn: proto::Txn, changes: &mut Vec<KeyChange>) -> Outcome {
        for (index, condition) in (0..).zip(&txn.conditions) {
            if !self.holds(condition) {
                let found = self.tree.get(&condition.key).map_or(0, |record| record.mod_revision);
                return Outcome::Conflict(proto::Conflict { index, found });
            }
        }
        for (index, operation) in (0..).zip(&txn.operations) {
            if let Some(why) = self.refuses(session, operation) {
                return Outcome::Refused(proto::Refused { index, why: Some(why) });
            }
        }
        let revision = self.revision + 1;
        let mut changed = Vec::with_capacity(txn.operations.len());
        for operation in txn.operations {
            changed.push(match operation.write {
                Some(proto::operation::Write::Put(put)) => {
                    self.put(session, revision, operation.key, put, changes);
                    true
                }
                Some(proto::operation::Write::Delete(_)) | None => {
                    self.delete(&operation.key, ChangeKind::Deleted, changes)
                }
            });
        }
        self.revision += u64::from(!changes.is_empty());
        Outcome::Committed(proto::Committed {
            revision: self.revision,
            changed,
        })
    }

    fn holds(&self, condition: &proto::Condition) -> bool {
        use proto::condition::Expect;
        let record = self.tree.get(&condition.key);
        match condition.expect {
            Some(Expect::Absent(_)) => record.is_none(),
            Some(Expect::Present(_)) => record.is_some(),
            Some(Expect::ModRevision(revision)) => record.is_some_and(|record| record.mod_revision == revision),
            Some(Expect::CreateRevision(revision)) => record.is_some_and(|record| record.create_revision == revision),
            Some(Expect::Childless(_)) => !self.has_children(&condition.key),
            None => false,
        }
    }

    fn has_children(&self, key: &str) -> bool {
        let (from, to) = below(key);
        self.tree.range(&from, &to).next().is_some()
    }

    /// Why a put must not be (K6, K7).
    fn refuses(&self, session: u64, operation: &proto::Operation) -> Option<proto::refused::Why> {
        use proto::refused::Why;
        let Some(proto::operation::Write::Put(put)) = &operation.write else {
            return None;
        };
        let unit = proto::Unit {};
        let here = self.tree.get(&operation.key);
        if let Some(here) = here.filter(|_| !put.take_over) {
            match (here.session, put.ephemeral) {
                (0, true) => return Some(Why::Persistent(unit)),
                (owner, true) if owner != session => return Some(Why::OwnedBy(owner)),
                (owner, false) if owner > 0 => return Some(Why::Ephemeral(unit)),
                _ => {}
            }
        }
        // An ephemeral key that is there already has no children, and none above it is ephemeral.
        if here.is_some_and(|here| here.session > 0) {
            return None;
        }
        if put.ephemeral && self.has_children(&operation.key) {
            return Some(Why::HasChildren(unit));
        }
        if here.is_some() || self.ephemeral.is_empty() {
            return None;
        }
        ancestors(&operation.key)
            .find(|&above| self.ephemeral.contains(above))
            .map(|above| Why::BelowEphemeral(above.into()))
    }

    fn put(&mut self, session: u64, revision: u64, key: String, put: proto::Put, changes: &mut Vec<KeyChange>) {
        let owner = if put.ephemeral { session } else { 0 };
        let (record, before) = self.tree.put(&key, |before| {
            let kept = before.filter(|before| before.session == owner);
            Arc::new(Record {
                key: before.map_or_else(|| key.as_str().into(), |before| before.key.clone()),
                value: put.value,
                create_revision: kept.map_or(revision, |before| before.create_revision),
                mod_revision: revision,
                version: kept.map_or(1, |before| before.version + 1),
                session: owner,
            })
        });
        let kind = match before {
            Some(before) if before.session == owner => ChangeKind::Updated,
            Some(before) => {
                // Taken over: the key is made anew.
                self.gone(before, ChangeKind::Deleted, changes);
                ChangeKind::Created
            }
            None => ChangeKind::Created,
        };
        if owner > 0 && kind == ChangeKind::Created {
            self.ephemeral.insert(record.key.clone());
            if let Some(session) = self.sessions.get_mut(&owner) {
                Arc::make_mut(session).keys.insert(record.key.clone());
            }
        }
        changes.push(KeyChange { kind, record });
    }

    fn delete(&mut self, key: &str, kind: ChangeKind, changes: &mut Vec<KeyChange>) -> bool {
        let removed = self.tree.remove(key);
        let was_there = removed.is_some();
        if let Some(record) = removed {
            self.gone(record, kind, changes);
        }
        was_there
    }

    /// A record is not in the tree any more.
    fn gone(&mut self, record: Arc<Record>, kind: ChangeKind, changes: &mut Vec<KeyChange>) {
        if record.session > 0 {
            self.ephemeral.remove(&record.key);
            if let Some(session) = self.sessions.get_mut(&record.session) {
                Arc::make_mut(session).keys.remove(&record.key);
            }
        }
        changes.push(KeyChange { kind, record });
    }
}

/// A number for a group's sessions to count from, drawn by chance: no session of one group is taken for one of another that
/// is founded or restored at the same address.
pub(crate) fn first_session() -> u64 {
    const COUNTED: u32 = 24;
    // At most 2^62, so that counting on does not end.
    let drawn = uuid::Uuid::new_v4().as_u64_pair().0 >> (COUNTED + 2);
    drawn.max(1) << COUNTED
}

/// The range of the keys below a qualified prefix.
pub(crate) fn below(prefix: &str) -> (String, String) {
    ([prefix, "/"].concat(), [prefix, "0"].concat())
}

/// The qualified keys above this one, the nearest first; none for a recipe's key.
fn ancestors(key: &str) -> impl Iterator<Item = &str> {
    let recipe = key
        .trim_start_matches('/')
        .split('/')
        .next()
        .is_some_and(|namespace| namespace.ends_with('~'));
    let path = if recipe { "" } else { key };
    path.rmatch_indices('/')
        .map(|(at, _)| &path[..at])
        .filter(|above| !above.is_empty())
}

#[cfg(test)]
mod tests;
