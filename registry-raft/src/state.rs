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
    /// The newest session's id. Ids are never used again.
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::operation::Write;

    const UNIT: proto::Unit = proto::Unit {};

    fn put(key: &str, ephemeral: bool) -> proto::Operation {
        let put = proto::Put {
            value: "v".into(),
            ephemeral,
            take_over: false,
        };
        proto::Operation {
            key: key.into(),
            write: Some(Write::Put(put)),
        }
    }

    /// A client that never says which answers it received can't fill the members' memory, nor their snapshots; one that
    /// says it goes on.
    #[test]
    fn the_answers_of_one_session_are_bounded() {
        let mut state = State::default();
        state.apply(1, Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000 })));
        let mut outcome = |sequence, answered_below| {
            let command = Command {
                answered_below,
                ..command(1, sequence, txn(vec![put("/ns/a", false)]))
            };
            let applied = state.apply(1, command);
            (applied.reply.result, state.sessions[&1].replies.len())
        };
        let most = MAX_REPLIES as u64;
        for sequence in 1..=most {
            let (reply, _) = outcome(sequence, 0);
            assert!(matches!(reply, Some(Outcome::Committed(_))), "{reply:?}");
        }
        let crowded = (Some(Outcome::Crowded(most)), MAX_REPLIES);
        assert_eq!(outcome(most + 1, 0), crowded);
        assert_eq!(outcome(most + 1, 1), crowded, "nothing was answered");
        // What was carried out is still known.
        let (again, _) = outcome(7, 1);
        assert!(matches!(again, Some(Outcome::Committed(_))), "{again:?}");
        let (reply, held) = outcome(most + 1, most);
        assert!(matches!(reply, Some(Outcome::Committed(_))), "{reply:?}");
        assert_eq!(held, 2);
    }

    fn txn(operations: Vec<proto::Operation>) -> Change {
        Change::Txn(proto::Txn {
            conditions: Vec::new(),
            operations,
        })
    }

    fn command(session: u64, sequence: u64, change: Change) -> Command {
        Command {
            session,
            sequence,
            answered_below: 0,
            change: Some(change),
        }
    }

    fn outcome(state: &mut State, command: Command) -> Outcome {
        state.apply(1, command).reply.result.unwrap()
    }

    fn with_session() -> State {
        let mut state = State::default();
        let opened = outcome(
            &mut state,
            Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000 })),
        );
        assert_eq!(opened, Outcome::SessionOpened(1));
        state
    }

    fn committed(revision: u64) -> Outcome {
        Outcome::Committed(proto::Committed {
            revision,
            changed: vec![true],
        })
    }

    #[test]
    fn a_command_that_comes_twice_happens_once() {
        let mut state = with_session();
        let first = command(1, 1, txn(vec![put("/ns/a", false)]));
        assert_eq!(outcome(&mut state, first.clone()), committed(1));
        assert_eq!(
            outcome(&mut state, command(1, 2, txn(vec![put("/ns/a", false)]))),
            committed(2)
        );
        assert_eq!(outcome(&mut state, first.clone()), committed(1));
        assert_eq!(state.revision, 2);
        // Once the handle has the answer, it is forgotten, and a straggler changes nothing.
        let third = Command {
            answered_below: 3,
            ..command(1, 3, txn(vec![put("/ns/a", false)]))
        };
        assert_eq!(outcome(&mut state, third), committed(3));
        assert_eq!(state.sessions[&1].replies.len(), 1);
        assert_eq!(outcome(&mut state, first), Outcome::Done(UNIT));
        assert_eq!(state.revision, 3);
    }

    #[test]
    fn an_expiry_counted_in_another_term_changes_nothing() {
        let mut state = with_session();
        outcome(
            &mut state,
            command(1, 1, txn(vec![put("/ns/a", true), put("/ns/b", true)])),
        );
        let expire = |term| {
            Command::new(Change::Expire(proto::ExpireSessions {
                sessions: vec![1],
                term,
            }))
        };
        assert!(state.apply(2, expire(1)).changes.is_empty());
        assert!(state.sessions.contains_key(&1));
        let changes = state.apply(1, expire(1)).changes;
        assert!(changes.len() == 2 && changes.iter().all(|change| change.kind == ChangeKind::SessionEnded));
        assert_eq!(
            (
                state.tree.len(),
                state.revision,
                state.sessions.len(),
                state.ephemeral.len()
            ),
            (0, 2, 0, 0)
        );
        assert_eq!(
            outcome(&mut state, command(1, 2, txn(vec![put("/ns/a", true)]))),
            Outcome::SessionExpired(1)
        );
    }

    #[test]
    fn a_silence_counts_until_the_session_is_heard() {
        let mut state = with_session();
        let silence = |silent_ms, heard| {
            let silence = proto::Silence {
                session: 1,
                silent_ms,
                heard,
            };
            Command::new(Change::Silences(proto::Silences {
                term: 1,
                silences: vec![silence],
            }))
        };
        state.apply(2, silence(400, 0));
        assert_eq!(state.sessions[&1].silent_ms, 0, "it was counted in another term");
        state.apply(1, silence(500, 0));
        assert_eq!(state.sessions[&1].silent_ms, 500);
        state.apply(1, Command::new(Change::Heard(1)));
        assert_eq!(state.sessions[&1].silent_ms, 0);
        state.apply(1, silence(700, 0));
        assert_eq!(
            state.sessions[&1].silent_ms, 0,
            "it was counted before the session was heard"
        );
        assert_eq!(
            outcome(&mut state, Command::new(Change::Heard(9))),
            Outcome::SessionExpired(9)
        );
    }

    #[test]
    fn an_old_sessions_end_leaves_what_a_newer_one_took_over() {
        let mut state = with_session();
        outcome(
            &mut state,
            Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000 })),
        );
        outcome(&mut state, command(1, 1, txn(vec![put("/ns/a", true)])));
        let take_over = proto::Put {
            value: "new".into(),
            ephemeral: true,
            take_over: true,
        };
        let take_over = proto::Operation {
            key: "/ns/a".into(),
            write: Some(Write::Put(take_over)),
        };
        let applied = state.apply(1, command(2, 1, txn(vec![take_over])));
        let kinds: Vec<_> = applied.changes.iter().map(|change| change.kind).collect();
        assert_eq!(kinds, [ChangeKind::Deleted, ChangeKind::Created]);
        let closed = state.apply(1, Command::new(Change::Close(proto::CloseSession { session: 1 })));
        assert!(closed.changes.is_empty());
        let record = state.tree.get("/ns/a").unwrap();
        assert_eq!((record.session, record.create_revision, record.version), (2, 2, 1));
    }

    #[test]
    fn a_transaction_that_changes_nothing_takes_no_revision() {
        let mut state = with_session();
        let delete = proto::Operation {
            key: "/ns/a".into(),
            write: Some(Write::Delete(UNIT)),
        };
        let nothing = Outcome::Committed(proto::Committed {
            revision: 0,
            changed: vec![false],
        });
        assert_eq!(outcome(&mut state, command(1, 1, txn(vec![delete]))), nothing);
    }

    #[test]
    fn recipes_are_spared_the_question_what_is_above() {
        assert_eq!(ancestors("/ns/a/b/c").collect::<Vec<_>>(), ["/ns/a/b", "/ns/a", "/ns"]);
        assert_eq!(ancestors("/ns~/lock/1/a").count(), 0);
    }

    proptest! {
        /// What is derived from the records is the same however it came to be: by changes, or from a snapshot.
        #[test]
        fn a_restored_state_is_the_state(
            changes in proptest::collection::vec((1u64..4, 0u8..4, any::<bool>(), 0u8..5), 1..200),
        ) {
            let mut state = State::default();
            for _ in 1..4 {
                state.apply(1, Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000 })));
            }
            for (sequence, (session, key, ephemeral, what)) in (1..).zip(changes) {
                let key = format!("/ns/{key}");
                let change = match what {
                    0 => txn(vec![proto::Operation { key, write: Some(Write::Delete(UNIT)) }]),
                    1 => txn(vec![put(&format!("{key}/below"), ephemeral)]),
                    2 => Change::DeletePrefix(key),
                    _ => txn(vec![put(&key, ephemeral)]),
                };
                state.apply(1, command(session, sequence, change));
            }
            let sessions = state.sessions.iter().map(|(id, session)| {
                (*id, SessionRecord { keys: BTreeSet::new(), ..(**session).clone() })
            });
            let restored = State::restore(state.tree.clone(), state.revision, state.last_session, sessions.collect());
            prop_assert_eq!(&restored.sessions, &state.sessions);
            prop_assert_eq!(&restored.ephemeral, &state.ephemeral);
            for key in &state.ephemeral {
                prop_assert!(!state.has_children(key), "{} is no leaf", key);
            }
        }
    }
}
