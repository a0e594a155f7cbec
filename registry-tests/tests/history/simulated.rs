//! Histories of a store that is simulated, some of them broken; and a judge that tries every order.

use std::collections::HashMap;
use std::time::Duration;

use registry_api::Revision;
use registry_tests::Dice;
use registry_tests::history::{Answer, Call, Demand, Id, Request, Write};

/// What is made wrong.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Break {
    Nothing,
    /// One answer or time, in some way: what comes of it may still be possible.
    Anything,
    /// One read sees what was put over long before it began.
    OneRead,
}

#[derive(Default)]
struct Store {
    held: Vec<Option<(Id, Revision)>>,
    revision: u64,
}

impl Store {
    fn carry_out(&mut self, id: Id, request: &Request) -> Answer {
        match request {
            Request::Read(keys) => Answer::Read(keys.iter().map(|&key| self.held[key]).collect()),
            Request::Commit(demands, writes) => {
                for (key, demand) in demands {
                    let found = self.held[*key].map(|(_, revision)| revision);
                    let holds = match demand {
                        Demand::Absent => found.is_none(),
                        Demand::Present => found.is_some(),
                        Demand::At(revision) => found == Some(*revision),
                    };
                    if !holds {
                        return Answer::Conflict(*key, found);
                    }
                }
                self.revision += 1;
                let mut changed = Vec::new();
                for (key, write) in writes {
                    changed.push(*write == Write::Put || self.held[*key].is_some());
                    self.held[*key] = (*write == Write::Put).then_some((id, Revision(self.revision)));
                }
                Answer::Committed(Revision(self.revision), changed)
            }
        }
    }
}

/// What a client is at.
enum Doing {
    Nothing,
    Asked(Id, Duration, Request),
    Done(Id, Duration, Request, Answer),
}

/// A history of that many calls by so many clients of so many keys.
pub(crate) fn simulate(dice: &mut Dice, calls: usize, clients: usize, keys: usize, broken: Break) -> Vec<Call> {
    let mut store = Store {
        held: vec![None; keys],
        revision: 0,
    };
    let mut doing: Vec<_> = (0..clients).map(|_| Doing::Nothing).collect();
    let mut seen = vec![vec![None; keys]; clients];
    // Writes that nobody waits for any more, and that may still happen.
    let mut late: Vec<(Id, Request)> = Vec::new();
    let (mut history, mut ids, mut now) = (Vec::new(), 0, Duration::ZERO);
    while history.len() < calls {
        now += Duration::from_micros(dice.roll(3));
        if !late.is_empty() && dice.roll(6) == 0 {
            let (id, request) = late.swap_remove(dice.roll(late.len() as u64) as usize);
            if dice.roll(2) == 0 {
                store.carry_out(id, &request);
            }
        }
        let client = dice.roll(clients as u64) as usize;
        doing[client] = match std::mem::replace(&mut doing[client], Doing::Nothing) {
            Doing::Nothing => {
                ids += 1;
                Doing::Asked(ids, now, request(dice, &seen[client]))
            }
            Doing::Asked(id, asked, request) => match dice.roll(10) {
                0 if matches!(request, Request::Commit(..)) => {
                    late.push((id, request.clone()));
                    Doing::Done(id, asked, request, Answer::Unknown)
                }
                1 => Doing::Done(id, asked, request, Answer::Nothing),
                _ => {
                    let mut answer = store.carry_out(id, &request);
                    if matches!(request, Request::Commit(..)) && dice.roll(15) == 0 {
                        answer = Answer::Unknown;
                    }
                    Doing::Done(id, asked, request, answer)
                }
            },
            Doing::Done(id, asked, request, answer) => {
                if let (Request::Read(keys), Answer::Read(read)) = (&request, &answer) {
                    for (key, held) in keys.iter().zip(read) {
                        seen[client][*key] = held.map(|(_, revision)| revision);
                    }
                }
                history.push(Call {
                    id,
                    client,
                    asked,
                    told: now,
                    request,
                    answer,
                });
                Doing::Nothing
            }
        };
    }
    // What is still under way may have been done.
    for (client, doing) in doing.into_iter().enumerate() {
        if let Doing::Asked(id, asked, request) | Doing::Done(id, asked, request, _) = doing {
            history.push(Call {
                id,
                client,
                asked,
                told: now,
                request,
                answer: Answer::Unknown,
            });
        }
    }
    match broken {
        Break::Nothing => {}
        Break::Anything => break_anything(dice, &mut history),
        Break::OneRead => break_a_read(dice, &mut history),
    }
    history.sort_by_key(|call| (call.asked, call.id));
    history
}

fn request(dice: &mut Dice, seen: &[Option<Revision>]) -> Request {
    let keys = seen.len() as u64;
    let key = dice.roll(keys) as usize;
    let other = (key + 1) % seen.len();
    let unchanged = |key: usize| seen[key].map_or(Demand::Absent, Demand::At);
    match dice.roll(9) {
        0..=2 => Request::Read(vec![key]),
        3 => Request::Read((0..seen.len()).collect()),
        4 => Request::Commit(vec![], vec![(key, Write::Put)]),
        5 => Request::Commit(vec![], vec![(key, Write::Delete)]),
        6 => Request::Commit(vec![(key, unchanged(key))], vec![(key, Write::Put)]),
        7 => Request::Commit(
            vec![(key, Demand::Present)],
            vec![(key, Write::Delete), (other, Write::Put)],
        ),
        _ => Request::Commit(
            vec![(key, unchanged(key)), (other, unchanged(other))],
            vec![(key, Write::Put), (other, Write::Put)],
        ),
    }
}

fn break_anything(dice: &mut Dice, history: &mut [Call]) {
    let some = dice.roll(history.len() as u64) as usize;
    let ids: Vec<_> = history.iter().map(|call| call.id).collect();
    let id = ids[dice.roll(ids.len() as u64) as usize];
    let call = &mut history[some];
    match &mut call.answer {
        Answer::Read(read) => {
            let at = dice.roll(read.len() as u64) as usize;
            read[at] = match (read[at], dice.roll(3)) {
                (None, _) | (_, 0) => Some((id, Revision(1 + dice.roll(4)))),
                (Some(_), 1) => None,
                (Some((id, _)), _) => Some((id, Revision(1 + dice.roll(4)))),
            }
        }
        Answer::Committed(revision, changed) => match dice.roll(3) {
            0 => *revision = Revision(1 + dice.roll(4)),
            1 => changed[0] = !changed[0],
            _ => call.answer = Answer::Nothing,
        },
        Answer::Conflict(_, found) => *found = Some(Revision(1 + dice.roll(4))),
        _ => call.told = call.asked,
    }
    let moved = Duration::from_micros(dice.roll(6));
    call.asked += moved;
    call.told = call.told.max(call.asked) + moved;
}

fn break_a_read(dice: &mut Dice, history: &mut [Call]) {
    let half = history.len() / 2;
    let early: Vec<_> = history[..half]
        .iter()
        .filter_map(|call| match (&call.request, &call.answer) {
            (Request::Commit(_, writes), Answer::Committed(revision, _)) => {
                let (key, _) = writes.iter().find(|(_, write)| *write == Write::Put)?;
                Some((*key, call.id, *revision))
            }
            _ => None,
        })
        .collect();
    let (key, id, revision) = early[dice.roll(early.len() as u64 / 2) as usize];
    let late = history[half..]
        .iter_mut()
        .find(|call| call.request == Request::Read(vec![key]) && matches!(call.answer, Answer::Read(_)));
    late.expect("somebody reads the key").answer = Answer::Read(vec![Some((id, revision))]);
}

/// Whether some order explains every answer, by trying all of them.
pub(crate) fn by_every_order(calls: &[Call]) -> bool {
    let mut revisions = HashMap::new();
    let mut learn = |id: Id, revision: Revision| *revisions.entry(id).or_insert(revision) == revision;
    for call in calls {
        let learnt = match &call.answer {
            Answer::Read(read) => read.iter().flatten().all(|(id, revision)| learn(*id, *revision)),
            Answer::Committed(revision, changed) if changed.contains(&true) => learn(call.id, *revision),
            _ => true,
        };
        if !learnt {
            return false;
        }
    }
    let mut distinct: Vec<_> = revisions.values().collect();
    distinct.sort();
    distinct.dedup();
    distinct.len() == revisions.len() && extend(calls, &revisions, &mut Vec::new(), &[None; 8], Revision(0))
}

fn extend(
    calls: &[Call],
    revisions: &HashMap<Id, Revision>,
    order: &mut Vec<usize>,
    held: &[Option<Id>],
    newest: Revision,
) -> bool {
    let must = |call: &Call| !matches!(call.answer, Answer::Unknown | Answer::Nothing);
    let left: Vec<_> = (0..calls.len()).filter(|n| !order.contains(n)).collect();
    if left.iter().all(|&n| !must(&calls[n])) {
        return true;
    }
    left.iter().any(|&n| {
        let call = &calls[n];
        // Not before one that was answered before this was asked.
        if left.iter().any(|&m| must(&calls[m]) && calls[m].told < call.asked) {
            return false;
        }
        let Some((after, writes)) = explain(call, revisions, held) else {
            return false;
        };
        let newest = match revisions.get(&call.id).filter(|_| writes) {
            Some(revision) if *revision <= newest => return false,
            Some(revision) => *revision,
            None => newest,
        };
        order.push(n);
        let explained = extend(calls, revisions, order, &after, newest);
        order.pop();
        explained
    })
}

/// The state after the call and whether it wrote, if its answer is true.
fn explain(call: &Call, revisions: &HashMap<Id, Revision>, held: &[Option<Id>]) -> Option<(Vec<Option<Id>>, bool)> {
    let holds = |key: usize, demand: Demand| match demand {
        Demand::Absent => held[key].is_none(),
        Demand::Present => held[key].is_some(),
        Demand::At(revision) => held[key].and_then(|id| revisions.get(&id)) == Some(&revision),
    };
    match (&call.request, &call.answer) {
        (Request::Read(keys), Answer::Read(read)) => {
            let seen = keys
                .iter()
                .zip(read)
                .all(|(key, seen)| held[*key] == seen.map(|(id, _)| id));
            seen.then(|| (held.to_vec(), false))
        }
        (Request::Commit(demands, _), Answer::Conflict(key, found)) => {
            let broken = demands.iter().any(|(of, demand)| of == key && !holds(*key, *demand));
            let is_found = match (found, held[*key]) {
                (None, None) => true,
                (Some(found), Some(id)) => match revisions.get(&id) {
                    Some(revision) => revision == found,
                    None => !revisions.values().any(|revision| revision == found),
                },
                _ => false,
            };
            (broken && is_found).then(|| (held.to_vec(), false))
        }
        (Request::Commit(demands, writes), Answer::Committed(..) | Answer::Unknown) => {
            demands.iter().all(|(key, demand)| holds(*key, *demand)).then_some(())?;
            let changes: Vec<_> = writes
                .iter()
                .map(|(key, write)| *write == Write::Put || held[*key].is_some())
                .collect();
            if matches!(&call.answer, Answer::Committed(_, changed) if *changed != changes) {
                return None;
            }
            let mut after = held.to_vec();
            for (key, write) in writes {
                after[*key] = (*write == Write::Put).then_some(call.id);
            }
            Some((after, changes.contains(&true)))
        }
        _ => None,
    }
}
