//! How much of the server's largest request the end of the session takes.
//!
//! ZooKeeper ends a session by one transaction that names all its ephemeral znodes. Where that is larger than
//! `jute.maxbuffer` allows, a server that replays it from its log or is sent it by its leader stops, and does not start
//! again (ZOOKEEPER-4306). So the handle counts the names of its session's znodes, and refuses a put that would take
//! them over [`MAX_BYTES`].

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use registry_api::SessionId;

/// Three quarters of what servers take as shipped, and a bit: the rest is for what frames it, and for the few znodes of
/// the backend's own.
pub(crate) const MAX_BYTES: usize = 800_000;
/// What frames a name in the transaction.
const FRAME: usize = 4;

/// The ephemeral znodes that one session has, or may have.
#[derive(Debug, Default)]
pub(crate) struct Ephemerals(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    session: Option<SessionId>,
    bytes: usize,
    nodes: HashMap<String, Node>,
}

/// One znode. It counts if it is being created, or was created after it was last deleted.
#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// How many requests in flight create it.
    in_flight: u32,
    /// The newest change that created it.
    created: i64,
    /// The newest change that deleted it.
    deleted: i64,
}

impl Node {
    fn counts(self) -> bool {
        self.in_flight > 0 || self.created > self.deleted
    }
}

/// What became of a request that creates znodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was carried out, as that change.
    Done(i64),
    NotDone,
    Unknown,
}

impl Ephemerals {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts znodes that are about to be created. `above` is what a chroot puts before their names.
    ///
    /// # Errors
    /// How many bytes all would take, if it is too much; then none is counted.
    pub(crate) fn reserve(&self, session: SessionId, paths: Vec<String>, above: usize) -> Result<Reserved<'_>, usize> {
        let mut state = self.lock();
        if state.session != Some(session) {
            *state = State {
                session: Some(session),
                ..State::default()
            };
        }
        let mut bytes = state.bytes;
        let mut new = HashSet::new();
        for path in &paths {
            if !state.nodes.get(path).is_some_and(|node| node.counts()) && new.insert(path) {
                bytes += path.len() + above + FRAME;
            }
        }
        if bytes > MAX_BYTES {
            return Err(bytes);
        }
        state.bytes = bytes;
        for path in &paths {
            state.nodes.entry(path.clone()).or_default().in_flight += 1;
        }
        Ok(Reserved {
            ephemerals: self,
            session,
            paths,
            above,
            outcome: Outcome::Unknown,
        })
    }

    /// Takes a znode off that the change `zxid` deleted.
    pub(crate) fn deleted(&self, session: SessionId, path: &str, zxid: i64, above: usize) {
        self.lock()
            .change(session, path, above, |node| node.deleted = node.deleted.max(zxid));
    }

    /// Takes the server's word for what there is. A znode that is being created counts all the same.
    pub(crate) fn replace(&self, session: SessionId, present: &HashSet<String>, above: usize) {
        let mut state = self.lock();
        if state.session != Some(session) {
            return;
        }
        state
            .nodes
            .retain(|path, node| node.in_flight > 0 || present.contains(path));
        for path in present {
            let node = state.nodes.entry(path.clone()).or_default();
            if node.created == i64::MAX || !node.counts() {
                node.created = node.deleted + 1;
            }
        }
        state.bytes = state.nodes.keys().map(|path| path.len() + above + FRAME).sum();
    }
}

impl State {
    fn change(&mut self, session: SessionId, path: &str, above: usize, change: impl FnOnce(&mut Node)) {
        if self.session != Some(session) {
            return;
        }
        let Some(node) = self.nodes.get_mut(path) else { return };
        let before = node.counts();
        change(node);
        let after = node.counts();
        if !after && node.in_flight == 0 {
            self.nodes.remove(path);
        }
        let size = path.len() + above + FRAME;
        match (before, after) {
            (true, false) => self.bytes -= size,
            (false, true) => self.bytes += size,
            _ => {}
        }
    }
}

/// Znodes that a request in flight creates. Dropped without an outcome, they count as created, since they may be.
#[derive(Debug)]
pub(crate) struct Reserved<'e> {
    ephemerals: &'e Ephemerals,
    session: SessionId,
    paths: Vec<String>,
    above: usize,
    outcome: Outcome,
}

impl Reserved<'_> {
    pub(crate) fn settle(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut state = self.ephemerals.lock();
        for path in &self.paths {
            state.change(self.session, path, self.above, |node| {
                node.in_flight -= 1;
                match self.outcome {
                    Outcome::Done(zxid) => node.created = node.created.max(zxid),
                    Outcome::NotDone => {}
                    // Until the server is asked.
                    Outcome::Unknown => node.created = i64::MAX,
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: SessionId = SessionId(7);

    fn path(number: usize) -> String {
        format!("/{number:0width$}", width = 999 - FRAME)
    }

    fn reserve(ephemerals: &Ephemerals, number: usize) -> Result<Reserved<'_>, usize> {
        ephemerals.reserve(S, vec![path(number)], 0)
    }

    /// 799 of 1,000 bytes.
    fn nearly_full() -> Ephemerals {
        let ephemerals = Ephemerals::default();
        for number in 0..799 {
            reserve(&ephemerals, number).unwrap().settle(Outcome::Done(10));
        }
        ephemerals
    }

    fn is_full(ephemerals: &Ephemerals) -> bool {
        match reserve(ephemerals, 5000) {
            Ok(reserved) => {
                reserved.settle(Outcome::NotDone);
                false
            }
            Err(bytes) => {
                assert_eq!(bytes, MAX_BYTES + 1000);
                true
            }
        }
    }

    #[test]
    fn what_is_created_counts_until_it_is_deleted() {
        let ephemerals = nearly_full();
        assert!(!is_full(&ephemerals));
        reserve(&ephemerals, 1000).unwrap().settle(Outcome::Done(11));
        assert!(is_full(&ephemerals));
        // A put of a key that is there takes no more room.
        reserve(&ephemerals, 3).unwrap().settle(Outcome::Done(12));
        reserve(&ephemerals, 3).unwrap().settle(Outcome::NotDone);
        assert!(is_full(&ephemerals));
        ephemerals.deleted(S, &path(3), 13, 0);
        assert!(!is_full(&ephemerals));
        ephemerals.deleted(S, &path(3), 14, 0);
        reserve(&ephemerals, 3).unwrap().settle(Outcome::Done(15));
        assert!(is_full(&ephemerals));
    }

    #[test]
    fn what_is_in_flight_counts() {
        let ephemerals = nearly_full();
        let (first, second) = (reserve(&ephemerals, 1000).unwrap(), reserve(&ephemerals, 1000).unwrap());
        assert!(is_full(&ephemerals));
        first.settle(Outcome::NotDone);
        assert!(is_full(&ephemerals));
        second.settle(Outcome::NotDone);
        assert!(!is_full(&ephemerals));
    }

    #[test]
    fn an_unknown_outcome_counts_until_the_server_is_asked() {
        let ephemerals = nearly_full();
        reserve(&ephemerals, 1000).unwrap().settle(Outcome::Unknown);
        ephemerals.deleted(S, &path(1000), 20, 0);
        assert!(is_full(&ephemerals));
        drop(reserve(&ephemerals, 1000).unwrap());
        assert!(is_full(&ephemerals));
        let present: HashSet<_> = (0..799).map(path).collect();
        ephemerals.replace(S, &present, 0);
        assert!(!is_full(&ephemerals));
        // What is in flight meanwhile is not lost, nor what another client created.
        let in_flight = reserve(&ephemerals, 1000).unwrap();
        ephemerals.replace(S, &present, 0);
        assert!(is_full(&ephemerals));
        in_flight.settle(Outcome::NotDone);
        ephemerals.replace(S, &(0..800).map(path).collect(), 0);
        assert!(is_full(&ephemerals));
    }

    /// Answers may be handled in another order than the changes were made in.
    #[test]
    fn the_newest_change_counts_whatever_the_order_of_answers() {
        let ephemerals = nearly_full();
        let again = reserve(&ephemerals, 3).unwrap();
        again.settle(Outcome::Done(31));
        ephemerals.deleted(S, &path(3), 30, 0);
        reserve(&ephemerals, 1000).unwrap().settle(Outcome::Done(32));
        assert!(is_full(&ephemerals));
        let put = reserve(&ephemerals, 3).unwrap();
        ephemerals.deleted(S, &path(3), 41, 0);
        put.settle(Outcome::Done(40));
        assert!(!is_full(&ephemerals));
    }

    #[test]
    fn another_session_begins_empty_and_a_chroot_counts() {
        let ephemerals = nearly_full();
        let late = reserve(&ephemerals, 1000).unwrap();
        let other = SessionId(8);
        ephemerals
            .reserve(other, vec![path(1)], 0)
            .unwrap()
            .settle(Outcome::Done(1));
        late.settle(Outcome::Done(50));
        assert_eq!(ephemerals.lock().bytes, 1000);
        ephemerals
            .reserve(other, vec![path(2)], 100)
            .unwrap()
            .settle(Outcome::Done(1));
        assert_eq!(ephemerals.lock().bytes, 2100);
    }
}
