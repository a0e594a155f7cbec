//! Puts that are asked for at the same time go as one transaction.
//!
//! A put has to be a transaction, to be refused over an ephemeral key and below one, and to etcd 3.4 a transaction that
//! writes costs about twice what a plain put does, whatever it compares. Under load that would be the whole cost of the
//! contract; so while one is under way, further lone puts of persistent keys wait and go together. Like the operations of
//! any transaction they then share a revision. Contenders for a lock, whose order is their revision, never do: an
//! ephemeral put is not gathered.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use registry_api::{Committed, Error, Existing, Kind, MAX_OPERATIONS, MAX_TXN, Operation, Result, Txn};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::commit::commit;
use crate::error::{self, Trouble};
use crate::plan::MAX_OPS;
use crate::store::Store;

/// For how long a request under way makes further puts wait for it. One that takes longer may never end.
const PATIENCE: Duration = Duration::from_millis(100);

/// The puts that wait.
#[derive(Default)]
pub(crate) struct Gather(Mutex<State>);

#[derive(Default)]
struct State {
    /// How many requests are under way, and when the last one began.
    lanes: usize,
    began: Option<Instant>,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    put: Operation,
    deadline: Instant,
    answer: oneshot::Sender<Result<Committed>>,
}

/// Whether a transaction may share a revision with others: one put of a persistent key, and no condition.
pub(crate) fn may_be_gathered(txn: &Txn) -> bool {
    let lone = matches!(
        txn.operations[..],
        [Operation::Put {
            kind: Kind::Persistent,
            existing: Existing::Keep,
            ..
        }]
    );
    lone && txn.conditions.is_empty()
}

/// Commits a transaction that may be gathered.
pub(crate) async fn put(store: &Arc<Store>, deadline: Instant, mut txn: Txn) -> Result<Committed> {
    let answered = {
        let mut state = store.gather.state();
        let busy = state.began.is_some_and(|began| began.elapsed() < PATIENCE);
        match txn.operations.pop() {
            Some(put) if state.lanes > 0 && busy => {
                let (answer, answered) = oneshot::channel();
                state.waiting.push_back(Waiting { put, deadline, answer });
                Some(answered)
            }
            put => {
                txn.operations.extend(put);
                state.lanes += 1;
                state.began = Some(Instant::now());
                None
            }
        }
    };
    match answered {
        None => {
            let _lane = Lane(store.clone());
            commit(&store.requests, &store.names, deadline, &txn, None).await
        }
        Some(answered) => match timeout_at(deadline, answered).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(error::unknown("a put", Trouble::Stopped))),
            Err(elapsed) => Err(error::unknown("a put", elapsed)),
        },
    }
}

impl Gather {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// As many of the first who wait as fit into one transaction, and into what etcd compares in one.
    fn next(&mut self) -> Vec<Waiting> {
        // Whoever waits no longer is spared.
        self.waiting.retain(|waiting| !waiting.answer.is_closed());
        let mut batch: Vec<Waiting> = Vec::new();
        let (mut bytes, mut compared) = (0, 0);
        while let Some(first) = self.waiting.front() {
            let key = first.put.key();
            bytes += key.as_str().len() + first.put.value().map_or(0, Bytes::len);
            compared += key.depth();
            let fits = batch.len() < MAX_OPERATIONS && bytes <= MAX_TXN && compared <= MAX_OPS;
            if !batch.is_empty() && (!fits || batch.iter().any(|other| other.put.key() == key)) {
                break;
            }
            batch.extend(self.waiting.pop_front());
        }
        batch
    }
}

/// A request under way. When it has ended, those who wait go.
struct Lane(Arc<Store>);

impl Drop for Lane {
    fn drop(&mut self) {
        let mut state = self.0.gather.state();
        let batch = state.next();
        if batch.is_empty() {
            state.lanes -= 1;
            return;
        }
        state.began = Some(Instant::now());
        drop(state);
        let lane = Self(self.0.clone());
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(lane.run(batch))),
            // A put that was dropped on a thread without a runtime; others wait.
            Err(_) => drop(registry_api::spawn(lane.run(batch))),
        }
    }
}

impl Lane {
    async fn run(self, batch: Vec<Waiting>) {
        let store = &self.0;
        let all = Txn {
            operations: batch.iter().map(|waiting| waiting.put.clone()).collect(),
            conditions: Vec::new(),
        };
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
                    let alone = Txn {
                        operations: vec![waiting.put],
                        conditions: Vec::new(),
                    };
                    let alone = commit(&store.requests, &store.names, waiting.deadline, &alone, None).await;
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
