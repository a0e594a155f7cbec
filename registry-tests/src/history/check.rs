//! The judge: is there one order of the calls that explains every answer?
//!
//! The search is that of Wing and Gong (1993) with the memory of Lowe (*Testing for linearizability*, 2017): a call takes
//! its place in the order only when the answer to one that still lacks a place has come. Before it, what is older than
//! what was known when it was asked is refuted by revisions alone. What keeps the search short is particular to a registry:
//!
//! - Revisions say in which order the writes happened that anybody knows the revision of (R1), so there is one next.
//! - A call that changes nothing takes its place as soon as it can: later is never better.
//! - Of the writes whose outcome nobody knows and whose value nobody saw, those that do the same are one for another, and
//!   what they put is one unseen value.
//! - A write that is seen by an answer yet to be explained is not put over before.
//! - A place in the search that was seen before with more such writes left need not be looked at again.

mod evidence;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use registry_api::Revision;

use super::{Answer, Call, Demand, Id, Request, Write};
use evidence::{Event, Judge, Role};

/// How many places the search looks at before it gives up, which no correct history has come near.
const MOST_STEPS: usize = 2_000_000;

/// A key that is not there; one that holds what nobody saw. Other states are the number of the call that put it, and 2.
const ABSENT: usize = 0;
const UNSEEN: usize = 1;

/// Why a history can't have happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// What no call should be told.
    Unexpected(Box<Call>),
    /// A read saw what was never put there, or was said not to have been.
    NeverPut(Box<Call>),
    /// One write was seen at two revisions.
    TwoRevisions(Id, Revision, Revision),
    /// Two changes have the same revision.
    OneRevision(Revision, Id, Id),
    /// No order explains this answer. The calls about that time come with it.
    NoOrder(Box<Call>, Vec<Call>),
    /// The search took too long.
    Undecided(Box<Call>),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unexpected(call) => write!(f, "unexpected: {call}"),
            Self::NeverPut(call) => write!(f, "what was seen was never put, or was said not to be: {call}"),
            Self::TwoRevisions(id, one, other) => write!(f, "what {id} put has the revisions {one} and {other}"),
            Self::OneRevision(revision, one, other) => write!(f, "{one} and {other} both have the revision {revision}"),
            Self::NoOrder(call, about) => {
                writeln!(f, "no order of the calls explains: {call}")?;
                about.iter().try_for_each(|call| writeln!(f, "    {call}"))
            }
            Self::Undecided(call) => write!(f, "undecided, the search took too long at: {call}"),
        }
    }
}

/// Judges a history of keys that were all absent at its beginning.
///
/// # Errors
/// The first thing found that can't have happened, or that the search took too long.
pub fn check(calls: &[Call]) -> Result<(), Violation> {
    let judge = Judge::new(calls)?;
    judge.none_is_stale()?;
    judge.search()
}

/// A place in the search.
#[derive(Clone)]
struct Place {
    at: At,
    /// How many loose writes were done of each kind that can still be.
    used: BTreeMap<usize, usize>,
}

/// Whether every kind was done at most as often.
fn at_most(one: &BTreeMap<usize, usize>, other: &BTreeMap<usize, usize>) -> bool {
    let done = |kind| other.get(kind).copied().unwrap_or(0);
    one.iter().all(|(kind, times)| *times <= done(kind))
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct At {
    event: usize,
    state: Vec<usize>,
    /// How many writes of known revision were done.
    known: usize,
    /// The reads that have a place, of those that wait for their answer; and those that have none.
    done: BTreeSet<usize>,
    open: BTreeSet<usize>,
}

impl Judge<'_> {
    fn search(&self) -> Result<(), Violation> {
        let mut seen = HashMap::<At, Vec<BTreeMap<usize, usize>>>::new();
        let mut stack = vec![Place {
            at: At {
                event: 0,
                state: vec![ABSENT; self.keys],
                known: 0,
                done: BTreeSet::new(),
                open: BTreeSet::new(),
            },
            used: BTreeMap::new(),
        }];
        let (mut furthest, mut stuck) = (0, None);
        for _ in 0..MOST_STEPS {
            let Some(mut place) = stack.pop() else {
                let call = stuck.expect("an empty history has an order");
                return Err(self.no_order(call));
            };
            let Some(waits) = self.forward(&mut place.at) else {
                return Ok(());
            };
            if place.at.event >= furthest {
                (furthest, stuck) = (place.at.event, Some(waits));
            }
            let before = seen.entry(place.at.clone()).or_default();
            if before.iter().any(|used| at_most(used, &place.used)) {
                continue;
            }
            before.push(place.used.clone());
            self.branch(&place, &mut stack);
        }
        let call = &self.calls[stuck.expect("it took steps")];
        Err(Violation::Undecided(Box::new(call.clone())))
    }

    /// Goes on to the answer of a call that has no place yet: that call, or nothing at the end.
    fn forward(&self, at: &mut At) -> Option<usize> {
        self.place_reads(at);
        while let Some(event) = self.events.get(at.event) {
            match *event {
                Event::Asked(n) if self.roles[n] == Role::Reads => {
                    let set = match self.after(n, &at.state) {
                        Some(_) => &mut at.done,
                        None => &mut at.open,
                    };
                    set.insert(n);
                }
                Event::Asked(_) => {}
                Event::Told(n) => {
                    let has_place = match self.roles[n] {
                        Role::Known(place) => place < at.known,
                        _ => at.done.remove(&n),
                    };
                    if !has_place {
                        return Some(n);
                    }
                }
            }
            at.event += 1;
        }
        None
    }

    fn place_reads(&self, at: &mut At) {
        let (done, open) = at.open.iter().partition(|&&n| self.after(n, &at.state).is_some());
        at.open = open;
        at.done.extend::<BTreeSet<_>>(done);
    }

    /// Every write that can be the next; the most likely last, to be looked at first.
    fn branch(&self, place: &Place, stack: &mut Vec<Place>) {
        let is_asked = |n: usize| self.asked[n] < place.at.event;
        let held = place.at.state.iter().enumerate();
        let bound = held.filter_map(|(key, held)| self.bound.get(&(key, held.checked_sub(2)?)));
        for kind in self.free.iter().chain(bound.flatten()) {
            let next = self.kinds[*kind].get(place.used.get(kind).copied().unwrap_or(0));
            if let Some(&n) = next.filter(|&&n| is_asked(n)) {
                stack.extend(self.then(place, n));
            }
        }
        if let Some(&n) = self.order.get(place.at.known).filter(|&&n| is_asked(n)) {
            stack.extend(self.then(place, n));
        }
    }

    /// The place after that write, if it can be the next and makes a difference.
    fn then(&self, place: &Place, n: usize) -> Option<Place> {
        let state = self.after(n, &place.at.state)?;
        let mut next = place.clone();
        match self.roles[n] {
            Role::Known(_) => next.at.known += 1,
            Role::Loose(_) if state == place.at.state => return None,
            Role::Loose(kind) => *next.used.entry(kind).or_default() += 1,
            Role::Reads | Role::Nothing => return None,
        }
        let is_explained = |witness: &usize| match self.roles[*witness] {
            Role::Known(order) => order < next.at.known,
            _ => self.told[*witness] < place.at.event || place.at.done.contains(witness),
        };
        for (key, (&before, after)) in place.at.state.iter().zip(&state).enumerate() {
            let writer = before.checked_sub(2).filter(|_| before != *after);
            let witnesses = writer.and_then(|writer| self.witnesses.get(&(key, writer)));
            if !witnesses.is_none_or(|all| all.iter().all(is_explained)) {
                return None;
            }
        }
        if state != next.at.state {
            // A key that holds something else never holds that revision again.
            next.used.retain(|&kind, _| self.can_be(kind, &state));
        }
        next.at.state = state;
        Some(next)
    }

    /// Whether the revisions that a kind of loose write needs are there.
    fn can_be(&self, kind: usize, state: &[usize]) -> bool {
        match &self.calls[self.kinds[kind][0]].request {
            Request::Commit(demands, _) => demands
                .iter()
                .all(|(key, demand)| !matches!(demand, Demand::At(_)) || self.holds(*demand, state[*key])),
            Request::Read(_) => false,
        }
    }

    /// The state after a call, if its answer is true of the state before.
    fn after(&self, n: usize, state: &[usize]) -> Option<Vec<usize>> {
        let call = &self.calls[n];
        match (&call.request, &call.answer) {
            (Request::Read(keys), Answer::Read(read)) => {
                let is_true = |(key, seen): (&usize, &Option<(Id, _)>)| match seen {
                    None => state[*key] == ABSENT,
                    Some((id, _)) => state[*key] == self.by_id[id] + 2,
                };
                keys.iter().zip(read).all(is_true).then(|| state.to_vec())
            }
            (Request::Commit(demands, _), Answer::Conflict(key, found)) => {
                let broken = |(of, demand): &(usize, Demand)| of == key && !self.holds(*demand, state[*key]);
                let is_found = match found {
                    None => state[*key] == ABSENT,
                    Some(revision) => state[*key] == self.by_revision.get(revision).map_or(UNSEEN, |writer| writer + 2),
                };
                (demands.iter().any(broken) && is_found).then(|| state.to_vec())
            }
            (Request::Commit(demands, writes), answer) => {
                let hold = demands.iter().all(|(key, demand)| self.holds(*demand, state[*key]));
                hold.then_some(())?;
                let put = match self.roles[n] {
                    Role::Loose(_) => UNSEEN,
                    _ => n + 2,
                };
                let mut after = state.to_vec();
                for (at, (key, write)) in writes.iter().enumerate() {
                    let changes = *write == Write::Put || state[*key] != ABSENT;
                    if let Answer::Committed(_, changed) = answer {
                        (changed.get(at) == Some(&changes)).then_some(())?;
                    }
                    after[*key] = if *write == Write::Put { put } else { ABSENT };
                }
                Some(after)
            }
            _ => None,
        }
    }

    fn holds(&self, demand: Demand, held: usize) -> bool {
        match demand {
            Demand::Absent => held == ABSENT,
            Demand::Present => held != ABSENT,
            Demand::At(revision) => self.by_revision.get(&revision).is_some_and(|writer| held == writer + 2),
        }
    }
}
