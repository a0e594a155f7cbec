//! Which history of revisions a handle follows, and how the handle notices that the store went back.
//!
//! A cluster that was restored from a snapshot (`etcdctl snapshot restore`) has another cluster id, and a lower revision
//! than the handle has seen. A member that was started from an older copy of its files keeps the cluster id. In both cases
//! revisions that the handle knows name other changes now, and a lease of the same id is not the handle's session.

use std::sync::{Mutex, MutexGuard, PoisonError};

use registry_api::Revision;

/// The history that all connections of a handle follow.
#[derive(Debug, Default)]
pub(crate) struct History(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The cluster's id; zero before the first response.
    cluster: u64,
    newest: Revision,
    number: u64,
}

/// A point in a history, taken before a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    /// Counts the histories that this handle has followed.
    pub(crate) number: u64,
    /// The newest revision that was seen.
    pub(crate) newest: Revision,
}

impl History {
    pub(crate) fn now(&self) -> Point {
        let state = self.state();
        Point {
            number: state.number,
            newest: state.newest,
        }
    }

    /// Takes the revision of any response or event. `since` is from before the request.
    pub(crate) fn saw(&self, since: Point, revision: Revision) {
        let mut state = self.state();
        if state.number == since.number {
            state.newest = state.newest.max(revision);
        }
    }

    /// Takes the revision of a linearizable response: it is at least the newest that was seen before the request was sent,
    /// or the store went back.
    pub(crate) fn confirmed(&self, since: Point, revision: Revision) {
        let mut state = self.state();
        if state.number != since.number {
            return;
        }
        if revision < since.newest {
            tracing::warn!(from = %since.newest, to = %revision, "etcd has lost changes that were seen");
            state.restart();
        }
        state.newest = state.newest.max(revision);
    }

    /// Takes the cluster id of a response; zero where it has none.
    pub(crate) fn heard(&self, cluster: u64) {
        if cluster == 0 {
            return;
        }
        let mut state = self.state();
        if state.cluster != 0 && state.cluster != cluster {
            tracing::warn!(from = state.cluster, to = cluster, "another etcd cluster responds");
            state.restart();
        }
        state.cluster = cluster;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The moment at which a handle notices that the store went back, or is another cluster. Everything that depends on it
    /// compares [`Point::number`]: the session expires with its next keep-alive, and each watch resynchronizes.
    fn restart(&mut self) {
        self.number += 1;
        self.newest = Revision(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_linearizable_revision_is_another_history() {
        let history = History::default();
        history.confirmed(history.now(), Revision(5));
        let before = history.now();
        history.saw(before, Revision(9));
        // Sent before 9 was seen.
        history.confirmed(before, Revision(7));
        assert_eq!(history.now().number, 0);
        history.confirmed(history.now(), Revision(9));
        assert_eq!(history.now().number, 0);
        history.confirmed(history.now(), Revision(8));
        assert_eq!(
            history.now(),
            Point {
                number: 1,
                newest: Revision(8)
            }
        );
        // A late response of the history that was left changes nothing.
        history.saw(before, Revision(20));
        history.confirmed(before, Revision(3));
        assert_eq!(
            history.now(),
            Point {
                number: 1,
                newest: Revision(8)
            }
        );
    }

    #[test]
    fn another_cluster_is_another_history_whatever_its_revision() {
        let history = History::default();
        history.heard(1);
        history.confirmed(history.now(), Revision(5));
        history.heard(0);
        history.heard(1);
        assert_eq!(history.now().number, 0);
        history.heard(2);
        assert_eq!(
            history.now(),
            Point {
                number: 1,
                newest: Revision(0)
            }
        );
    }
}
