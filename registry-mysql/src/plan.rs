//! What a batch of transactions does to the keys: judged one after the other, on what was read under the counter's lock.
//!
//! It knows no connection and reads no clock: what was found goes in, answers and changes come out.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use registry_api::{
    Committed, Condition, Error, Existing, Expect, Key, Kind, Operation, Prefix, Refusal, Result, Revision, SessionId,
    Txn,
};

/// What has to be read to judge transactions.
#[derive(Debug, Default)]
pub(crate) struct Probes {
    pub(crate) keys: BTreeSet<Key>,
    /// Below these keys, so many names: one more than the batch itself may delete there.
    pub(crate) below: BTreeMap<Key, usize>,
    pub(crate) sessions: BTreeSet<SessionId>,
}

impl Probes {
    pub(crate) fn of<'t>(txns: impl Iterator<Item = (&'t Txn, Option<SessionId>)> + Clone) -> Self {
        let mut probes = Self::default();
        for (txn, session) in txns.clone() {
            probes.sessions.extend(session);
            for condition in &txn.conditions {
                probes.keys.insert(condition.key.clone());
                if condition.expect == Expect::Childless {
                    probes.below.insert(condition.key.clone(), 1);
                }
            }
            for operation in &txn.operations {
                probes.keys.insert(operation.key().clone());
                if let Operation::Put { key, kind, .. } = operation {
                    probes.keys.extend(key.ancestors());
                    if must_be_leaf(key, *kind) {
                        probes.below.insert(key.clone(), 1);
                    }
                }
            }
        }
        if !probes.below.is_empty() {
            let deletes = txns
                .flat_map(|(txn, _)| &txn.operations)
                .filter(|o| o.value().is_none());
            for deleted in deletes {
                for ancestor in every_ancestor(deleted.key()) {
                    if let Some(count) = probes.below.get_mut(&ancestor) {
                        *count += 1;
                    }
                }
            }
        }
        probes
    }
}

/// Nothing is ever put below a recipe's ephemeral key.
fn must_be_leaf(key: &Key, kind: Kind) -> bool {
    kind == Kind::Ephemeral && !key.is_recipe()
}

/// All keys above, a recipe's too.
fn every_ancestor(key: &Key) -> impl Iterator<Item = Key> {
    std::iter::successors(key.parent().key(), |above| above.parent().key())
}

/// A key as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
    pub(crate) session: Option<SessionId>,
    pub(crate) value: Held,
}

/// Where a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// In the table of entries, from before the batch.
    Entry,
    /// In a change of this batch.
    Change { revision: u64, position: u64 },
}

/// A change that a batch makes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) position: u64,
    pub(crate) key: Key,
    pub(crate) what: What,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum What {
    Put {
        value: Bytes,
        create_revision: u64,
        session: Option<SessionId>,
    },
    /// It was last as it is held there.
    Delete(Held),
}

/// The keys, as they were read and as the batch changes them.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// The revision of the last change.
    pub(crate) revision: u64,
    /// Every key that was asked for; absent ones too.
    pub(crate) keys: BTreeMap<String, Option<Found>>,
    /// The keys that the batch deleted. It may have put them again.
    pub(crate) deleted: BTreeSet<String>,
    pub(crate) below: HashMap<Key, Vec<String>>,
    pub(crate) sessions: BTreeSet<SessionId>,
    pub(crate) changes: Vec<Change>,
    /// How many keys a prefix has that is to be deleted.
    pub(crate) covered: u64,
}

impl Plan {
    /// Judges a transaction, and takes its changes in if nothing stands against them.
    pub(crate) fn apply(&mut self, txn: &Txn, session: Option<SessionId>) -> Result<Committed> {
        for condition in &txn.conditions {
            self.judge_condition(condition)?;
        }
        for operation in &txn.operations {
            self.judge(operation, session)?;
        }
        // Under the counter's lock no session can end: whoever ends one needs it.
        if let Some(session) = session.filter(|session| !self.sessions.contains(session)) {
            return Err(Error::SessionExpired { session });
        }
        let changed: Vec<bool> = txn
            .operations
            .iter()
            .map(|o| o.value().is_some() || self.key(o.key()).is_some())
            .collect();
        if !changed.contains(&true) {
            return Ok(Committed {
                revision: Revision(self.revision),
                changed,
            });
        }
        self.revision += 1;
        let mut position = 0;
        for operation in &txn.operations {
            self.change(operation, session, &mut position);
        }
        Ok(Committed {
            revision: Revision(self.revision),
            changed,
        })
    }

    /// The keys that existed before the batch or within it, and do not after it.
    pub(crate) fn gone(&self) -> impl Iterator<Item = &str> {
        let is_gone = |name: &&String| self.keys.get(*name).is_none_or(Option::is_none);
        self.deleted.iter().filter(is_gone).map(String::as_str)
    }

    fn key(&self, key: &Key) -> Option<Found> {
        self.keys.get(key.as_str()).copied().flatten()
    }

    fn has_below(&self, key: &Key) -> bool {
        let range = Prefix::from(key).below();
        let known = || self.keys.range(range.clone());
        let read = self.below.get(key).into_iter().flatten();
        known().any(|(_, found)| found.is_some()) || read.into_iter().any(|name| !self.keys.contains_key(name))
    }

    fn judge_condition(&self, Condition { key, expect }: &Condition) -> Result<()> {
        let found = self.key(key);
        let holds = match expect {
            Expect::Absent => found.is_none(),
            Expect::Present => found.is_some(),
            Expect::ModRevision(revision) => found.is_some_and(|found| found.mod_revision == revision.0),
            Expect::CreateRevision(revision) => found.is_some_and(|found| found.create_revision == revision.0),
            Expect::Childless => !self.has_below(key),
            // A demand that is not known can't be met.
            _ => false,
        };
        match holds {
            true => Ok(()),
            false => Err(Error::Conflict {
                key: key.clone(),
                expected: *expect,
                found: found.map(|found| Revision(found.mod_revision)),
            }),
        }
    }

    fn judge(&self, operation: &Operation, session: Option<SessionId>) -> Result<()> {
        let Operation::Put {
            key, kind, existing, ..
        } = operation
        else {
            return Ok(());
        };
        let refused = |refusal| {
            Err(Error::Refused {
                key: key.clone(),
                refusal,
            })
        };
        if let (Some(refusal), Existing::Keep) = (refusal(self.key(key), *kind, session), existing) {
            return refused(refusal);
        }
        for ancestor in key.ancestors() {
            if self.key(&ancestor).is_some_and(|found| found.session.is_some()) {
                return refused(Refusal::BelowEphemeral(ancestor));
            }
        }
        match must_be_leaf(key, *kind) && self.has_below(key) {
            true => refused(Refusal::HasChildren),
            false => Ok(()),
        }
    }

    fn change(&mut self, operation: &Operation, session: Option<SessionId>, position: &mut u64) {
        let key = operation.key();
        let mut found = self.key(key);
        let gone = match operation {
            Operation::Delete { .. } => true,
            // Made anew.
            Operation::Put { kind, .. } => refusal(found, *kind, session).is_some(),
        };
        if gone && let Some(last) = found.take() {
            self.push(key, What::Delete(last.value), position);
            self.deleted.insert(key.as_str().to_owned());
        }
        if let Operation::Put { value, kind, .. } = operation {
            let session = session.filter(|_| *kind == Kind::Ephemeral);
            let create_revision = found.map_or(self.revision, |found| found.create_revision);
            let value = value.clone();
            let held = Held::Change {
                revision: self.revision,
                position: *position,
            };
            found = Some(Found {
                create_revision,
                mod_revision: self.revision,
                session,
                value: held,
            });
            let put = What::Put {
                value,
                create_revision,
                session,
            };
            self.push(key, put, position);
        }
        self.keys.insert(key.as_str().to_owned(), found);
    }

    fn push(&mut self, key: &Key, what: What, position: &mut u64) {
        self.changes.push(Change {
            revision: self.revision,
            position: *position,
            key: key.clone(),
            what,
        });
        *position += 1;
    }
}

/// Why a put over this key is refused, unless it takes over.
fn refusal(found: Option<Found>, kind: Kind, session: Option<SessionId>) -> Option<Refusal> {
    match (kind, found?.session) {
        (Kind::Persistent, None) => None,
        (Kind::Persistent, Some(_)) => Some(Refusal::Ephemeral),
        (Kind::Ephemeral, None) => Some(Refusal::Persistent),
        (Kind::Ephemeral, Some(owner)) => (Some(owner) != session).then_some(Refusal::OwnedBy(owner)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: SessionId = SessionId(7);

    fn key(path: &str) -> Key {
        Key::parse(path).expect("a key of the test")
    }

    /// A store in which these persistent keys were put, at revisions from 1 on.
    fn store(paths: &[&str]) -> Plan {
        let mut plan = Plan {
            sessions: [S].into(),
            ..Plan::default()
        };
        for path in paths {
            plan.revision += 1;
            let found = Found {
                create_revision: plan.revision,
                mod_revision: plan.revision,
                session: None,
                value: Held::Entry,
            };
            plan.keys.insert((*path).into(), Some(found));
        }
        plan
    }

    #[test]
    fn requests_see_those_before_them() {
        let (mut plan, a) = (store(&[]), key("/a"));
        let first = plan
            .apply(&Txn::new().when(&a, Expect::Absent).put(&a, "1"), None)
            .expect("it is absent");
        let again = plan.apply(&Txn::new().when(&a, Expect::Absent).put(&a, "2"), None);
        assert!(matches!(again, Err(Error::Conflict { found, .. }) if found == Some(first.revision)));
        let second = plan.apply(&Txn::new().put(&a, "3"), None).expect("it is there");
        assert!(second.revision > first.revision);
        let gone = plan.apply(&Txn::new().delete(&a), None).expect("it is there");
        let held = Held::Change {
            revision: second.revision.0,
            position: 0,
        };
        assert_eq!(
            plan.changes.last().map(|change| &change.what),
            Some(&What::Delete(held))
        );
        // What changes nothing takes no revision.
        let nothing = plan.apply(&Txn::new().delete(&a), None).expect("no error");
        assert_eq!((nothing.revision, nothing.changed), (gone.revision, vec![false]));
    }

    #[test]
    fn a_refused_request_leaves_nothing() {
        let mut plan = store(&["/p"]);
        let refused = plan.apply(&Txn::new().put(&key("/a"), "").put_ephemeral(&key("/p"), ""), Some(S));
        assert!(matches!(
            refused,
            Err(Error::Refused {
                refusal: Refusal::Persistent,
                ..
            })
        ));
        assert!(plan.changes.is_empty() && plan.revision == 1);
    }

    #[test]
    fn an_ended_session_puts_nothing() {
        let mut plan = store(&[]);
        let late = plan.apply(&Txn::new().put_ephemeral(&key("/e"), ""), Some(SessionId(8)));
        assert!(matches!(late, Err(Error::SessionExpired { session: SessionId(8) })));
        assert!(plan.changes.is_empty());
    }

    #[test]
    fn a_take_over_deletes_and_makes_anew_at_one_revision() {
        let (mut plan, p) = (store(&["/p"]), key("/p"));
        let txn = Txn::new().put_as(&p, "mine", Kind::Ephemeral, Existing::TakeOver);
        let taken = plan.apply(&txn, Some(S)).expect("it takes over");
        let whats: Vec<_> = plan
            .changes
            .iter()
            .map(|change| (change.revision, change.position, &change.what))
            .collect();
        assert!(matches!(
            whats[..],
            [
                (2, 0, What::Delete(Held::Entry)),
                (2, 1, What::Put { create_revision: 2, .. })
            ]
        ));
        // One of the own kind and owner is just put.
        plan.apply(&txn, Some(S)).expect("it is its own");
        assert!(
            matches!(plan.changes[2].what, What::Put { create_revision, .. } if create_revision == taken.revision.0)
        );
    }

    #[test]
    fn children_that_the_batch_deleted_do_not_count_and_those_it_put_do() {
        let (p, c, d) = (key("/p"), key("/p/c"), key("/p/d"));
        let childless = Txn::new().when(&p, Expect::Childless).put(&p, "");
        let txns = [Txn::new().delete(&c), childless.clone()];
        let probes = Probes::of(txns.iter().map(|txn| (txn, None)));
        assert_eq!(probes.below.get(&p), Some(&2));

        let mut plan = store(&["/p/c"]);
        plan.below.insert(p.clone(), vec!["/p/c".into()]);
        assert!(plan.apply(&childless, None).is_err());
        plan.apply(&Txn::new().delete(&c), None).expect("it is there");
        plan.apply(&childless, None).expect("the last child is gone");
        plan.apply(&Txn::new().put(&d, ""), None)
            .expect("nothing is against it");
        assert!(plan.apply(&childless, None).is_err());

        let mut plan = store(&["/p/c"]);
        plan.below.insert(p.clone(), vec!["/p/c".into(), "/p/other".into()]);
        plan.apply(&Txn::new().delete(&c), None).expect("it is there");
        assert!(plan.apply(&childless, None).is_err(), "another is left");
    }
}
