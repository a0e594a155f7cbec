//! What a history says before any search: the revisions of its writes, who saw what, and what is stale by that alone.

use std::collections::{BTreeMap, HashMap};

use registry_api::Revision;

use super::Violation;
use crate::history::{Answer, Call, Demand, Id, Request, Write};

#[derive(Clone, Copy)]
pub(super) enum Event {
    Asked(usize),
    Told(usize),
}

/// What a call is to the search.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Role {
    /// Changes nothing.
    Reads,
    /// The write of that place in the order of revisions.
    Known(usize),
    /// A write of unknown outcome that nobody saw, of that kind.
    Loose(usize),
    /// Was not done.
    Nothing,
}

/// A history with what is known of its calls.
pub(super) struct Judge<'a> {
    pub(super) calls: &'a [Call],
    pub(super) keys: usize,
    pub(super) roles: Vec<Role>,
    /// The writes of known revision, in that order.
    pub(super) order: Vec<usize>,
    pub(super) by_revision: BTreeMap<Revision, usize>,
    pub(super) by_id: HashMap<Id, usize>,
    /// The loose writes that ask and do the same, each kind in the order of asking.
    pub(super) kinds: Vec<Vec<usize>>,
    /// The kinds that need no certain revision; and those that do, by one key and the write that it must hold.
    pub(super) free: Vec<usize>,
    pub(super) bound: HashMap<(usize, usize), Vec<usize>>,
    pub(super) events: Vec<Event>,
    /// When each call was asked, and answered, among the events.
    pub(super) asked: Vec<usize>,
    pub(super) told: Vec<usize>,
    /// The calls whose answers say that a key held what a call put.
    pub(super) witnesses: HashMap<(usize, usize), Vec<usize>>,
}

impl<'a> Judge<'a> {
    pub(super) fn new(calls: &'a [Call]) -> Result<Self, Violation> {
        let by_id = calls.iter().enumerate().map(|(n, call)| (call.id, n)).collect();
        let keys = calls.iter().flat_map(|call| match &call.request {
            Request::Read(keys) => keys.clone(),
            Request::Commit(demands, writes) => {
                let demanded = demands.iter().map(|(key, _)| *key);
                demanded.chain(writes.iter().map(|(key, _)| *key)).collect()
            }
        });
        let mut judge = Self {
            calls,
            keys: keys.max().map_or(0, |key| key + 1),
            roles: Vec::new(),
            order: Vec::new(),
            by_revision: BTreeMap::new(),
            by_id,
            kinds: Vec::new(),
            free: Vec::new(),
            bound: HashMap::new(),
            events: Vec::new(),
            asked: vec![0; calls.len()],
            told: vec![usize::MAX; calls.len()],
            witnesses: HashMap::new(),
        };
        judge.learn_revisions()?;
        judge.give_roles();
        judge.call_witnesses();
        judge.line_up();
        Ok(judge)
    }

    /// The revision of every write that any answer names.
    fn learn_revisions(&mut self) -> Result<(), Violation> {
        let mut learn = |writer: usize, revision: Revision| match self.by_revision.insert(revision, writer) {
            Some(other) if other != writer => {
                let ids = (self.calls[other].id, self.calls[writer].id);
                Err(Violation::OneRevision(revision, ids.0, ids.1))
            }
            _ => Ok(()),
        };
        for (n, call) in self.calls.iter().enumerate() {
            match (&call.request, &call.answer) {
                (_, Answer::Unexpected(_)) => return Err(Violation::Unexpected(Box::new(call.clone()))),
                (_, Answer::Committed(revision, changed)) if changed.contains(&true) => learn(n, *revision)?,
                (Request::Read(keys), Answer::Read(read)) => {
                    for (key, seen) in keys.iter().zip(read) {
                        let Some((id, revision)) = seen else { continue };
                        let writer = self.by_id.get(id).filter(|&&writer| puts(&self.calls[writer], *key));
                        let Some(&writer) = writer else {
                            return Err(Violation::NeverPut(Box::new(call.clone())));
                        };
                        learn(writer, *revision)?;
                    }
                }
                _ => {}
            }
        }
        let mut revisions = HashMap::new();
        for (&revision, &writer) in &self.by_revision {
            if let Some(other) = revisions.insert(writer, revision) {
                return Err(Violation::TwoRevisions(self.calls[writer].id, other, revision));
            }
        }
        self.order = self.by_revision.values().copied().collect();
        Ok(())
    }

    fn give_roles(&mut self) {
        let known: HashMap<_, _> = self.order.iter().enumerate().map(|(place, &n)| (n, place)).collect();
        let mut kinds = HashMap::new();
        for (n, call) in self.calls.iter().enumerate() {
            let role = match (known.get(&n), &call.request, &call.answer) {
                (Some(&place), _, _) => Role::Known(place),
                (None, Request::Commit(demands, writes), Answer::Unknown) => {
                    let kind = *kinds.entry((demands, writes)).or_insert_with(|| {
                        self.kinds.push(Vec::new());
                        self.kinds.len() - 1
                    });
                    self.kinds[kind].push(n);
                    Role::Loose(kind)
                }
                (None, _, Answer::Read(_) | Answer::Committed(..) | Answer::Conflict(..)) => Role::Reads,
                (None, _, _) => Role::Nothing,
            };
            self.roles.push(role);
        }
        for (kind, writes) in self.kinds.iter_mut().enumerate() {
            writes.sort_by_key(|&n| self.calls[n].asked);
            let Request::Commit(demands, _) = &self.calls[writes[0]].request else {
                continue;
            };
            let revision = demands.iter().find_map(|(key, demand)| match demand {
                Demand::At(revision) => Some((*key, revision)),
                Demand::Absent | Demand::Present => None,
            });
            match revision {
                None => self.free.push(kind),
                // What nobody knows the writer of is nowhere in the search, and the demand not met.
                Some((key, revision)) => {
                    if let Some(&writer) = self.by_revision.get(revision) {
                        self.bound.entry((key, writer)).or_default().push(kind);
                    }
                }
            }
        }
    }

    /// What the answer of a call says that keys held: what was put by which call.
    fn testimony(&self, n: usize) -> Vec<(usize, usize)> {
        let call = &self.calls[n];
        let by_revision = |key: &usize, revision| Some((*key, *self.by_revision.get(revision)?));
        match (&call.request, &call.answer) {
            (Request::Read(keys), Answer::Read(read)) => {
                let held = keys.iter().zip(read);
                held.filter_map(|(key, held)| Some((*key, self.by_id[&held.as_ref()?.0])))
                    .collect()
            }
            (_, Answer::Conflict(key, found)) => found.iter().filter_map(|found| by_revision(key, found)).collect(),
            (Request::Commit(demands, _), _) if matches!(self.roles[n], Role::Reads | Role::Known(_)) => {
                let demands = demands.iter().filter_map(|(key, demand)| match demand {
                    Demand::At(revision) => by_revision(key, revision),
                    Demand::Absent | Demand::Present => None,
                });
                demands.collect()
            }
            _ => Vec::new(),
        }
    }

    fn call_witnesses(&mut self) {
        for n in 0..self.calls.len() {
            for held in self.testimony(n) {
                self.witnesses.entry(held).or_default().push(n);
            }
        }
    }

    /// Refutes an answer that tells of a key what is older than what somebody was told of it before it was asked.
    pub(super) fn none_is_stale(&self) -> Result<(), Violation> {
        let place = |writer: usize| match self.roles[writer] {
            Role::Known(place) => place,
            _ => 0,
        };
        // For each key, when somebody was told which write of it.
        let mut told = vec![Vec::new(); self.keys];
        for (n, call) in self.calls.iter().enumerate() {
            for (key, writer) in self.testimony(n) {
                told[key].push((call.told, place(writer)));
            }
            if let (Request::Commit(_, writes), Answer::Committed(_, changed)) = (&call.request, &call.answer) {
                for ((key, _), _) in writes.iter().zip(changed).filter(|(_, changed)| **changed) {
                    told[*key].push((call.told, place(n)));
                }
            }
        }
        for told in &mut told {
            told.sort_unstable();
            let mut newest = 0;
            for (_, place) in told {
                newest = newest.max(*place);
                *place = newest;
            }
        }
        for (n, call) in self.calls.iter().enumerate() {
            for (key, writer) in self.testimony(n) {
                let before = told[key].partition_point(|(time, _)| *time < call.asked);
                if told[key][..before]
                    .last()
                    .is_some_and(|(_, newest)| *newest > place(writer))
                {
                    return Err(self.no_order(n));
                }
            }
        }
        Ok(())
    }

    /// Puts the questions and answers in the order of time. A question and an answer of one moment are concurrent.
    fn line_up(&mut self) {
        let mut events = Vec::new();
        for (n, call) in self.calls.iter().enumerate() {
            if self.roles[n] != Role::Nothing {
                events.push((call.asked, 0, Event::Asked(n)));
            }
            if matches!(
                call.answer,
                Answer::Read(_) | Answer::Committed(..) | Answer::Conflict(..)
            ) {
                events.push((call.told, 1, Event::Told(n)));
            }
        }
        events.sort_by_key(|&(time, kind, _)| (time, kind));
        self.events = events.into_iter().map(|(_, _, event)| event).collect();
        for (at, event) in self.events.iter().enumerate() {
            match *event {
                Event::Asked(n) => self.asked[n] = at,
                Event::Told(n) => self.told[n] = at,
            }
        }
    }

    pub(super) fn no_order(&self, call: usize) -> Violation {
        let call = &self.calls[call];
        let about = |other: &&Call| {
            let unsure = other.answer == Answer::Unknown && other.asked < call.told;
            unsure || (other.asked <= call.told && other.told >= call.asked)
        };
        let mut about: Vec<_> = self.calls.iter().filter(about).cloned().collect();
        // What the keys held when it was asked, and what came last before that.
        let before = self.calls.iter().filter(|other| other.told < call.asked);
        let mut before: Vec<_> = before
            .filter(|other| other.answer != Answer::Nothing)
            .cloned()
            .collect();
        before.sort_by_key(|other| other.told);
        about.splice(0..0, before.split_off(before.len().saturating_sub(30)));
        Violation::NoOrder(Box::new(call.clone()), about)
    }
}

/// Whether a call may have put that key.
fn puts(call: &Call, key: usize) -> bool {
    let done = matches!(call.answer, Answer::Committed(..) | Answer::Unknown);
    matches!(&call.request, Request::Commit(_, writes) if done && writes.contains(&(key, Write::Put)))
}
