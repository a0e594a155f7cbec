//! Puts that are asked for at the same time go as one transaction.
//!
//! A put has to be a transaction, to be refused over an ephemeral key and below one, and to etcd a transaction that writes
//! costs about twice what a plain put does, whatever it compares. Under load that would be the whole cost of the
//! contract; so while a few requests are under way, further lone puts of persistent keys wait and go together. They then
//! share a revision, which nothing tells from puts that etcd happened to apply in that order; contenders for a lock, whose
//! order is their revision, are never gathered.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::join_all;
use registry_api::{Committed, Error, Existing, Key, Kind, MAX_OPERATIONS, MAX_TXN, Operation, Result, Txn};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::commit::commit;
use crate::error::{self, Trouble};
use crate::plan::MAX_OPS;
use crate::store::Store;

/// How many requests are under way before further puts wait for one to end.
const LANES: usize = 1;

/// The puts that wait.
#[derive(Default)]
pub(crate) struct Gather(Mutex<State>);

#[derive(Default)]
struct State {
    lanes: usize,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    txn: Txn,
    deadline: Instant,
    answer: oneshot::Sender<Result<Committed>>,
}

/// Whether a transaction may share a revision with others: one put of a persistent key, and no condition.
pub(crate) fn may_be_gathered(txn: &Txn) -> bool {
    let plain = |operation: &Operation| {
        matches!(
            operation,
            Operation::Put {
                kind: Kind::Persistent,
                existing: Existing::Keep,
                ..
            }
        )
    };
    txn.conditions.is_empty() && txn.operations.len() == 1 && txn.operations.iter().all(plain)
}

impl Gather {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Commits a transaction that may be gathered.
pub(crate) async fn put(store: &Arc<Store>, deadline: Instant, txn: Txn) -> Result<Committed> {
    let answer = {
        let mut state = store.gather.state();
        if state.lanes < LANES {
            state.lanes += 1;
            None
        } else {
            let (answer, answered) = oneshot::channel();
            state.waiting.push_back(Waiting {
                txn: txn.clone(),
                deadline,
                answer,
            });
            Some(answered)
        }
    };
    match answer {
        None => {
            let _lane = Lane(store.clone());
            commit(&store.requests, &store.names, deadline, &txn, None).await
        }
        Some(answered) => match timeout_at(deadline, answered).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(error::unavailable(Trouble::Stopped))),
            Err(elapsed) => Err(error::unknown("a put", elapsed)),
        },
    }
}

/// The right to have a request under way. Given up, it passes to those who wait.
struct Lane(Arc<Store>);

impl Drop for Lane {
    fn drop(&mut self) {
        let mut state = self.0.gather.state();
        let batch = state.next();
        if batch.is_empty() {
            state.lanes -= 1;
            return;
        }
        drop(state);
        let lane = Self(self.0.clone());
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move { lane.run(batch).await })),
            // The process is ending: those who wait are told by their channels.
            Err(_) => drop(batch),
        }
    }
}

impl State {
    /// As many of the first who wait as fit into one transaction, and into what etcd compares in one.
    fn next(&mut self) -> Vec<Waiting> {
        let mut batch: Vec<Waiting> = Vec::new();
        let mut compared = HashSet::<Key>::new();
        let mut bytes = 0;
        while let Some(waiting) = self.waiting.front() {
            let operations = &waiting.txn.operations;
            let keys = || operations.iter().map(|operation| operation.key().clone());
            bytes += operations.iter().map(size).sum::<usize>();
            let more: HashSet<Key> = keys()
                .flat_map(|key| key.ancestors().chain([key.clone()]).collect::<Vec<_>>())
                .collect();
            let more: HashSet<Key> = more.difference(&compared).cloned().collect();
            let again = keys().any(|key| {
                batch
                    .iter()
                    .any(|other| other.txn.operations.iter().any(|o| *o.key() == key))
            });
            let fits = bytes <= MAX_TXN && compared.len() + more.len() <= MAX_OPS && batch.len() < MAX_OPERATIONS;
            if !batch.is_empty() && (again || !fits) {
                break;
            }
            compared.extend(more);
            batch.extend(self.waiting.pop_front());
        }
        batch
    }
}

fn size(operation: &Operation) -> usize {
    operation.key().as_str().len() + operation.value().map_or(0, |value| value.len())
}

impl Lane {
    async fn run(self, batch: Vec<Waiting>) {
        let store = &self.0;
        let mut all = Txn::new();
        all.operations = batch
            .iter()
            .flat_map(|waiting| waiting.txn.operations.clone())
            .collect();
        let deadline = batch
            .iter()
            .map(|waiting| waiting.deadline)
            .max()
            .unwrap_or_else(|| store.deadline());
        let together = commit(&store.requests, &store.names, deadline, &all, None).await;
        // Those who wait no longer take no answer.
        match together {
            Ok(committed) => {
                for waiting in batch {
                    let committed = Committed {
                        changed: vec![true],
                        ..committed.clone()
                    };
                    let _ = waiting.answer.send(Ok(committed));
                }
            }
            Err(Error::Unavailable { source, .. }) => {
                let source = Shared(source.into());
                for waiting in batch {
                    let _ = waiting.answer.send(Err(error::unavailable(source.clone())));
                }
            }
            Err(Error::OutcomeUnknown { operation, source }) => {
                let source = Shared(source.into());
                for waiting in batch {
                    let _ = waiting.answer.send(Err(error::unknown(operation, source.clone())));
                }
            }
            // Nothing changed, because of one or some of them.
            Err(_) => {
                let each = |waiting: Waiting| async move {
                    let alone = commit(&store.requests, &store.names, waiting.deadline, &waiting.txn, None).await;
                    let _ = waiting.answer.send(alone);
                };
                join_all(batch.into_iter().map(each)).await;
            }
        }
    }
}

/// One cause of several errors.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
struct Shared(Arc<dyn std::error::Error + Send + Sync>);
