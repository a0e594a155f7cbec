//! One transaction of the registry as one of etcd's: what it demands of the keys, and what a refusal means.
//!
//! Every condition and every rule on kinds and owners becomes a comparison, so that etcd itself judges and writes in one
//! step. An absent key compares as zero throughout: its lease, its create revision, its mod revision.
//!
//! What can't be said in one comparison is hoped for: an ephemeral put demands that its key is absent; only when that
//! fails, and the key turns out to be the session's own, is it sent again with that demand. A refusal says nothing of its
//! cause: the keys concerned are read, at the revision of the refusal, and judged here.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use etcd_client::proto::{PbTxnOpResponse, PbTxnResponse};
use etcd_client::{DeleteOptions, PutOptions, Txn as Request, TxnOp};
use registry_api::{
    Condition, Error, Existing, Expect, Key, Kind, Operation, Prefix, Refusal, Result, Revision, SessionId, Txn,
};

use crate::demand::{Demand, Found, Probe, State};
use crate::names::{Names, compared, lease, revision, session};

/// The most comparisons, and the most operations, that etcd takes in one transaction (`--max-txn-ops`).
pub(crate) const MAX_OPS: usize = 128;

/// A transaction on its way, with what has been learnt about its keys.
pub(crate) struct Plan<'t> {
    names: &'t Names,
    txn: &'t Txn,
    /// The lease of the handle's session; zero where nothing ephemeral is put.
    lease: i64,
    /// Keys that are known to be the session's own already.
    own: HashSet<Key>,
    /// Keys of another kind or owner that were deleted to be recreated. Their conditions held when they were deleted.
    evicted: HashSet<Key>,
}

/// What to do after a look at the keys.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Judgement {
    /// Nothing stands against it, as far as is known now.
    Clear,
    /// These keys have to go first, at the revision they have: they are to be taken over.
    Evict(BTreeMap<Key, i64>),
}

impl<'t> Plan<'t> {
    pub(crate) fn new(names: &'t Names, txn: &'t Txn, session: Option<SessionId>) -> Self {
        // A condition that the key exists says that a put of it is one of an own key.
        let puts = txn.operations.iter().filter(|o| matches!(o, Operation::Put { .. }));
        let own = puts
            .map(Operation::key)
            .filter(|key| {
                let mut conditions = txn.conditions.iter().filter(|condition| condition.key == **key);
                conditions.any(|c| {
                    matches!(
                        c.expect,
                        Expect::Present | Expect::ModRevision(_) | Expect::CreateRevision(_)
                    )
                })
            })
            .cloned()
            .collect();
        Self {
            names,
            txn,
            lease: session.map_or(0, lease),
            own,
            evicted: HashSet::new(),
        }
    }

    /// The request, if it is within etcd's bound on comparisons.
    pub(crate) fn request(&self) -> Option<Request> {
        let demands = self.demands(&BTreeMap::new());
        (demands.len() <= MAX_OPS).then(|| self.build(demands, self.operations()))
    }

    /// The request with few comparisons, for keys that were seen to allow it.
    pub(crate) fn guarded_request(&self, seen: &State) -> Request {
        self.build(self.guarded(seen), self.operations())
    }

    /// Conditions are compared as they are, and of everything else it is demanded that nothing was put since. Keys near
    /// each other share a comparison.
    fn guarded(&self, seen: &State) -> BTreeSet<Demand> {
        let mut exact = BTreeSet::new();
        self.demand_conditions(&mut exact);
        let rest = self.demands(&BTreeMap::new());
        let mut ranges: Vec<_> = rest.difference(&exact).map(Demand::range).collect();
        ranges.sort();
        let share = ranges.len().div_ceil(MAX_OPS - exact.len()).max(1);
        for group in ranges.chunks(share) {
            let end = group.iter().map(|(_, end)| end).max().cloned().unwrap_or_default();
            exact.insert(Demand::Untouched(group[0].0.clone(), end, seen.revision + 1));
        }
        exact
    }

    /// The request that deletes keys which are to be made anew, under every demand of the transaction.
    pub(crate) fn eviction(&self, keys: &BTreeMap<Key, i64>) -> Request {
        let deletes = keys.keys().map(|key| TxnOp::delete(self.names.key(key), None));
        self.build(self.eviction_demands(keys), deletes.collect())
    }

    fn eviction_demands(&self, keys: &BTreeMap<Key, i64>) -> BTreeSet<Demand> {
        let mut first = BTreeSet::new();
        self.demand_conditions(&mut first);
        for (key, modified) in keys {
            first.insert(Demand::Modified(self.names.key(key), *modified));
        }
        // At most 64 conditions and 64 keys. The rest, beyond the bound, is left for the transaction itself.
        let room = MAX_OPS.saturating_sub(first.len());
        let rest = self.demands(keys).difference(&first).take(room).cloned().collect();
        &first | &rest
    }

    pub(crate) fn evicted(&mut self, keys: BTreeMap<Key, i64>) {
        self.evicted.extend(keys.into_keys());
    }

    /// Whether a part of the transaction, the deletes before a take-over, has happened.
    pub(crate) fn has_evicted(&self) -> bool {
        !self.evicted.is_empty()
    }

    fn build(&self, demands: BTreeSet<Demand>, operations: Vec<TxnOp>) -> Request {
        let compares: Vec<_> = demands.into_iter().map(Demand::compare).collect();
        Request::new().when(compares).and_then(operations)
    }

    fn operations(&self) -> Vec<TxnOp> {
        let operation = |operation: &Operation| match operation {
            Operation::Delete { key } => TxnOp::delete(self.names.key(key), Some(DeleteOptions::new())),
            Operation::Put { key, value, kind, .. } => {
                let lease = match kind {
                    Kind::Ephemeral => self.lease,
                    Kind::Persistent => 0,
                };
                TxnOp::put(
                    self.names.key(key),
                    value.to_vec(),
                    Some(PutOptions::new().with_lease(lease)),
                )
            }
        };
        self.txn.operations.iter().map(operation).collect()
    }

    /// Everything that has to hold, the kind of these keys aside.
    fn demands(&self, except: &BTreeMap<Key, i64>) -> BTreeSet<Demand> {
        let mut demands = BTreeSet::new();
        self.demand_conditions(&mut demands);
        for operation in &self.txn.operations {
            let Operation::Put { key, kind, .. } = operation else {
                continue;
            };
            if !except.contains_key(key) {
                demands.insert(self.demand_kind(key, *kind));
            }
            for ancestor in key.ancestors() {
                demands.insert(Demand::Lease(self.names.key(&ancestor), 0));
            }
            if let Some((start, end)) = self.range_below(key, *kind) {
                demands.insert(Demand::Empty(start, end));
            }
        }
        demands
    }

    fn demand_conditions(&self, demands: &mut BTreeSet<Demand>) {
        for Condition { key, expect } in &self.txn.conditions {
            let name = self.names.key(key);
            if self.evicted.contains(key) && *expect != Expect::Childless {
                // Verified when it was deleted.
                continue;
            }
            demands.insert(match expect {
                Expect::Absent => Demand::Absent(name),
                Expect::Present => Demand::Present(name),
                Expect::ModRevision(revision) => Demand::Modified(name, compared(*revision)),
                Expect::CreateRevision(revision) => Demand::Created(name, compared(*revision)),
                Expect::Childless => {
                    let below = self.names.below(&Prefix::from(key));
                    Demand::Empty(below.start, below.end)
                }
                // A demand that is not known can't be met.
                _ => Demand::Created(name, -1),
            });
        }
    }

    fn demand_kind(&self, key: &Key, kind: Kind) -> Demand {
        let name = self.names.key(key);
        match kind {
            _ if self.evicted.contains(key) => Demand::Absent(name),
            Kind::Persistent => Demand::Lease(name, 0),
            Kind::Ephemeral if self.own.contains(key) => Demand::Lease(name, self.lease),
            Kind::Ephemeral => Demand::Absent(name),
        }
    }

    /// Where an ephemeral key must have nothing: below it. Nothing is ever put below a recipe's ephemeral key.
    fn range_below(&self, key: &Key, kind: Kind) -> Option<(Vec<u8>, Vec<u8>)> {
        let below = (kind == Kind::Ephemeral && !key.is_recipe()).then(|| self.names.below(&Prefix::from(key)))?;
        Some((below.start, below.end))
    }

    /// What has to be read to judge the transaction.
    pub(crate) fn probes(&self) -> BTreeSet<Probe> {
        let mut probes = BTreeSet::new();
        for Condition { key, expect } in &self.txn.conditions {
            probes.insert(Probe::Key(self.names.key(key)));
            if *expect == Expect::Childless {
                let below = self.names.below(&Prefix::from(key));
                probes.insert(Probe::Range(below.start, below.end));
            }
        }
        for operation in &self.txn.operations {
            if let Operation::Put { key, kind, .. } = operation {
                probes.insert(Probe::Key(self.names.key(key)));
                probes.extend(key.ancestors().map(|ancestor| Probe::Key(self.names.key(&ancestor))));
                probes.extend(
                    self.range_below(key, *kind)
                        .map(|(start, end)| Probe::Range(start, end)),
                );
            }
        }
        probes
    }

    /// What a look at the keys means: an error, or what to do next. Conditions come before refusals.
    pub(crate) fn judge(&mut self, state: &State) -> Result<Judgement> {
        for condition in &self.txn.conditions {
            self.judge_condition(condition, state)?;
        }
        let mut evict = BTreeMap::new();
        for operation in &self.txn.operations {
            let Operation::Put {
                key, kind, existing, ..
            } = operation
            else {
                continue;
            };
            let found = state.key(self.names.key(key));
            self.own.remove(key);
            match (self.refusal(found, *kind), existing, found) {
                (None, _, Some(found)) if self.evicted.contains(key) => {
                    // Made anew by another after it was deleted here.
                    evict.insert(key.clone(), found.modified);
                }
                (None, _, found) => {
                    if found.is_some_and(|found| found.lease != 0) {
                        self.own.insert(key.clone());
                    }
                }
                (Some(_), Existing::TakeOver, Some(found)) => {
                    evict.insert(key.clone(), found.modified);
                }
                (Some(refusal), _, _) => return Err(refused(key, refusal)),
            }
            for ancestor in key.ancestors() {
                if state
                    .key(self.names.key(&ancestor))
                    .is_some_and(|found| found.lease != 0)
                {
                    return Err(refused(key, Refusal::BelowEphemeral(ancestor)));
                }
            }
            if let Some((start, end)) = self.range_below(key, *kind)
                && state.found.contains_key(&Probe::Range(start, end))
            {
                return Err(refused(key, Refusal::HasChildren));
            }
        }
        match evict.is_empty() {
            true => Ok(Judgement::Clear),
            false => Ok(Judgement::Evict(evict)),
        }
    }

    /// Why a put over this key is refused, unless it takes over.
    fn refusal(&self, found: Option<Found>, kind: Kind) -> Option<Refusal> {
        let owner = session(found?.lease);
        match (kind, owner) {
            (Kind::Persistent, None) => None,
            (Kind::Persistent, Some(_)) => Some(Refusal::Ephemeral),
            (Kind::Ephemeral, None) => Some(Refusal::Persistent),
            (Kind::Ephemeral, Some(owner)) => (lease(owner) != self.lease).then_some(Refusal::OwnedBy(owner)),
        }
    }

    fn judge_condition(&self, Condition { key, expect }: &Condition, state: &State) -> Result<()> {
        let found = state.key(self.names.key(key));
        let holds = match expect {
            Expect::Childless => {
                let below = self.names.below(&Prefix::from(key));
                !state.found.contains_key(&Probe::Range(below.start, below.end))
            }
            // The condition held for the key that was deleted. Another of its name, recreated since by another client, is
            // not the one that was meant.
            _ if self.evicted.contains(key) => found.is_none(),
            Expect::Absent => found.is_none(),
            Expect::Present => found.is_some(),
            Expect::ModRevision(revision) => found.is_some_and(|found| found.modified == compared(*revision)),
            Expect::CreateRevision(revision) => found.is_some_and(|found| found.created == compared(*revision)),
            _ => false,
        };
        match holds {
            true => Ok(()),
            false => Err(Error::Conflict {
                key: key.clone(),
                expected: *expect,
                found: found.map(|found| revision(found.modified)),
            }),
        }
    }

    /// For each operation, whether it changed anything.
    pub(crate) fn changed(&self, response: &PbTxnResponse) -> Vec<bool> {
        let change = |(operation, response): (&Operation, &Option<PbTxnOpResponse>)| match (operation, response) {
            (Operation::Delete { .. }, Some(PbTxnOpResponse::ResponseDeleteRange(deleted))) => deleted.deleted > 0,
            _ => true,
        };
        let responses = response.responses.iter().map(|response| &response.response);
        self.txn.operations.iter().zip(responses).map(change).collect()
    }
}

fn refused(key: &Key, refusal: Refusal) -> Error {
    Error::Refused {
        key: key.clone(),
        refusal,
    }
}

/// What a finished transaction says of its revision.
pub(crate) fn committed_at(response: &PbTxnResponse) -> Revision {
    revision(response.header.as_ref().map_or(0, |header| header.revision))
}

#[cfg(test)]
mod tests {
    use registry_api::Namespace;

    use super::*;

    fn key(path: &str) -> Key {
        Key::parse(path).expect("a key of the test")
    }

    #[test]
    fn ancestors_are_shared() {
        let names = Names(Namespace::default());
        let txn = (0..64).fold(Txn::new(), |txn, number| txn.put(&key(&format!("/a/b/c/{number}")), ""));
        let plan = Plan::new(&names, &txn, None);
        assert_eq!(plan.demands(&BTreeMap::new()).len(), 64 + 3);
        assert!(plan.request().is_some());
    }

    #[test]
    fn the_largest_transaction_fits_when_it_is_guarded() {
        let names = Names(Namespace::default());
        let deep = |number: usize| key(&format!("/{number}{}", "/d".repeat(31)));
        let txn = (0..64).fold(Txn::new(), |txn, number| {
            txn.put_ephemeral(&deep(number), "")
                .when(&key(&format!("/c{number}")), Expect::Present)
        });
        let mut plan = Plan::new(&names, &txn, Some(SessionId(7)));
        assert!(plan.request().is_none());
        let seen = State {
            revision: 9,
            ..State::default()
        };
        let guarded = plan.guarded(&seen);
        assert!(guarded.len() <= MAX_OPS);
        // Whatever is demanded is either compared as it is or lies in a range that is guarded.
        for demand in plan.demands(&BTreeMap::new()) {
            let (start, end) = demand.range();
            let within = |guard: &Demand| {
                let (from, to) = guard.range();
                matches!(guard, Demand::Untouched(_, _, 10)) && from <= start && end <= to
            };
            assert!(guarded.contains(&demand) || guarded.iter().any(within), "{demand:?}");
        }
        // Nothing is there, so the conditions fail.
        assert!(matches!(plan.judge(&seen), Err(Error::Conflict { .. })));
    }

    #[test]
    fn an_eviction_is_under_all_conditions_however_much_else_is_compared() {
        let names = Names(Namespace::default());
        let deep = |number: usize| key(&format!("/{number}{}", "/d".repeat(31)));
        let txn = (0..64).fold(Txn::new(), |txn, number| {
            txn.put(&deep(number), "")
                .when(&key(&format!("/c{number}")), Expect::Childless)
        });
        let plan = Plan::new(&names, &txn, None);
        let keys = (0..64).map(|number| (deep(number), 5)).collect();
        let demands = plan.eviction_demands(&keys);
        assert!(demands.len() <= MAX_OPS);
        let mut conditions = BTreeSet::new();
        plan.demand_conditions(&mut conditions);
        assert_eq!(conditions.len(), 64);
        assert!(conditions.is_subset(&demands));
        assert!((0..64).all(|number| demands.contains(&Demand::Modified(names.key(&deep(number)), 5))));
    }
}
