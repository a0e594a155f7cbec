//! Writes that are asked for at the same time go as one transaction of the server's.
//!
//! The counter's lock makes the writes of a namespace one after the other, and each commit waits for the disk. So while
//! one is under way, those that come wait, without a timer, and then go together: one wait for the disk serves them all.
//! Each is still judged by itself, on what those before it left, and has a revision of its own: the order of a lock's
//! contenders rests on that.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use registry_api::{Operation, Prefix, Result, SessionId, Txn};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::commit::{Written, commit};
use crate::error::{self, Shared, Trouble};
use crate::store::Store;

/// How many requests wait in a handle before further ones wait to be let in.
const MAX_WAITING: usize = 4096;
/// The most requests, and bytes of values, of one transaction. One request alone may be larger.
const MAX_BATCH: usize = 1024;
const MAX_BYTES: usize = 1 << 20;

/// What is asked for.
pub(crate) enum Job {
    Txn(Txn),
    DeletePrefix(Prefix),
}

/// A write on its way.
pub(crate) struct Request {
    pub(crate) job: Job,
    /// The session that its ephemeral keys belong to.
    pub(crate) session: Option<SessionId>,
    pub(crate) deadline: Instant,
    /// Whoever sets it first decides: the caller, whose deadline has come, that it won't be sent; or the writer, just
    /// before the commit, that it will.
    pub(crate) claimed: Arc<AtomicBool>,
    pub(crate) answer: oneshot::Sender<Result<Written>>,
}

impl Request {
    pub(crate) fn txn(&self) -> Option<(&Txn, Option<SessionId>)> {
        match &self.job {
            Job::Txn(txn) => Some((txn, self.session)),
            Job::DeletePrefix(_) => None,
        }
    }

    fn bytes(&self) -> usize {
        let operations = self.txn().map_or(&[][..], |(txn, _)| &txn.operations);
        operations.iter().filter_map(Operation::value).map(Bytes::len).sum()
    }
}

/// The way to the writer, which ends when this is dropped.
pub(crate) struct Writes {
    requests: mpsc::Sender<Request>,
    /// Why the last try failed.
    last: Arc<Mutex<Option<Shared>>>,
}

impl Writes {
    pub(crate) fn start(store: Arc<Store>) -> Self {
        let (requests, waiting) = mpsc::channel(MAX_WAITING);
        let last = Arc::<Mutex<Option<Shared>>>::default();
        let writer = Writer {
            store,
            requests: waiting,
            waiting: VecDeque::new(),
            last: last.clone(),
        };
        registry_api::spawn(writer.run());
        Self { requests, last }
    }

    /// Writes, and says what came of it.
    pub(crate) async fn write(&self, job: Job, session: Option<SessionId>, deadline: Instant) -> Result<Written> {
        let (answer, answered) = oneshot::channel();
        let claimed = Arc::new(AtomicBool::new(false));
        let request = Request {
            job,
            session,
            deadline,
            claimed: claimed.clone(),
            answer,
        };
        let asking = async {
            self.requests.send(request).await.ok()?;
            answered.await.ok()
        };
        match timeout_at(deadline, asking).await {
            Ok(Some(answer)) => answer,
            none => {
                let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let cause = last.map_or(Trouble::Stopped, Trouble::Repeated);
                let cause: registry_api::BoxError = match none {
                    Err(elapsed) if matches!(cause, Trouble::Stopped) => elapsed.into(),
                    _ => cause.into(),
                };
                Err(match claimed.swap(true, Ordering::AcqRel) {
                    true => error::unknown(cause),
                    false => error::unavailable(cause),
                })
            }
        }
    }
}

/// The one who writes for a handle.
struct Writer {
    store: Arc<Store>,
    requests: mpsc::Receiver<Request>,
    waiting: VecDeque<Request>,
    last: Arc<Mutex<Option<Shared>>>,
}

impl Writer {
    async fn run(mut self) {
        let mut sequence = 0;
        while let Some(batch) = self.next().await {
            let note = |trouble| *self.last.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
            commit(&self.store, batch, &mut sequence, &note).await;
        }
    }

    /// All who wait, as far as they fit into one transaction.
    async fn next(&mut self) -> Option<Vec<Request>> {
        if self.waiting.is_empty() {
            self.waiting.push_back(self.requests.recv().await?);
        }
        while self.waiting.len() < MAX_BATCH
            && let Ok(request) = self.requests.try_recv()
        {
            self.waiting.push_back(request);
        }
        let mut batch: Vec<Request> = Vec::new();
        let mut bytes = 0;
        while let Some(first) = self.waiting.front() {
            bytes += first.bytes();
            let fits = batch.len() < MAX_BATCH && bytes <= MAX_BYTES && !alone(first) && !batch.iter().any(alone);
            if !batch.is_empty() && !fits {
                break;
            }
            batch.extend(self.waiting.pop_front());
        }
        Some(batch)
    }
}

/// Whether a request is judged on more than the keys it names, and so goes alone.
fn alone(request: &Request) -> bool {
    matches!(request.job, Job::DeletePrefix(_))
}
