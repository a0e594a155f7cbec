//! Writes that are asked for at the same time go as one transaction of the server's.
//!
//! The counter's lock makes the writes of a namespace one after the other, and each commit waits for the disk. So while
//! one is under way, those that come wait, without a timer, and then go together: one wait for the disk serves them all.
//! Each is still judged by itself, on what those before it left, and has a revision of its own: the order of a lock's
//! contenders rests on that.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use registry_api::{Expect, Key, Kind, Operation, Prefix, Result, SessionId, Txn};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::commit::{Outcome, Written, commit, latest, may_be_of_one};
use crate::error::{self, Shared, Trouble, Verdict};
use crate::line::{Backoff, Route};
use crate::settings::LEAST_PACKET;
use crate::store::Store;

/// How many requests wait in a handle before further ones wait to be let in.
const MAX_WAITING: usize = 4096;
/// The most requests of one transaction.
const MAX_BATCH: usize = 1024;
/// The most bytes of SQL in one packet: less than the least `max_allowed_packet` by what the statements have apart from the
/// requests. A batch takes one packet to begin and one to write; one request alone may take two to begin.
pub(crate) const MAX_SQL: usize = LEAST_PACKET as usize - (64 << 10);

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

    /// At least as many bytes as the request adds to either statement of a batch.
    fn sql_bytes(&self) -> usize {
        match &self.job {
            Job::Txn(txn) => sql_bytes(txn),
            Job::DeletePrefix(_) => MAX_SQL,
        }
    }
}

/// As [`Request::sql_bytes`].
pub(crate) fn sql_bytes(txn: &Txn) -> usize {
    /// What a statement has beside its names and values: numbers of at most 20 digits, and names of tables of at most 50.
    const STATEMENT: usize = 640;
    let name = |key: &Key| 2 * key.as_str().len() + 8;
    // A range of two bounds, each as long as the name and a character.
    let below = |key: &Key| 2 * name(key) + STATEMENT;
    let (mut begin, mut write) = (STATEMENT, 0);
    for condition in &txn.conditions {
        begin += name(&condition.key);
        if condition.expect == Expect::Childless {
            begin += below(&condition.key);
        }
    }
    for operation in &txn.operations {
        let key = operation.key();
        begin += name(key);
        // The deletion of what it takes over or deletes, its row, and its place in the list of what is deleted.
        write += 2 * STATEMENT + 2 * name(key);
        if let Operation::Put { value, kind, .. } = operation {
            begin += key.ancestors().map(|above| name(&above)).sum::<usize>();
            write += 2 * value.len() + name(key);
            if *kind == Kind::Ephemeral {
                begin += below(key);
            }
        }
    }
    begin.max(write)
}

/// The way to the writer, which ends when this is dropped.
pub(crate) struct Writes {
    requests: mpsc::Sender<Request>,
    route: Route,
    /// Why the last try failed.
    last: Arc<Mutex<Option<Shared>>>,
}

impl Writes {
    pub(crate) fn start(store: Arc<Store>) -> Self {
        let (requests, waiting) = mpsc::channel(MAX_WAITING);
        let route = store.lines.route.clone();
        let last = Arc::<Mutex<Option<Shared>>>::default();
        let writer = Writer {
            store,
            requests: waiting,
            waiting: VecDeque::new(),
            limit: MAX_SQL,
            last: last.clone(),
        };
        registry_api::spawn(writer.run());
        Self { requests, route, last }
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
                let waited_out = Instant::now() >= deadline || none.is_err();
                let cause = match last {
                    Some(last) => Trouble::Repeated(last),
                    None if waited_out => self.route.silent(),
                    None => Trouble::Stopped,
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
    /// The most bytes of SQL of the next batch: halved while a batch fails, doubled when one succeeds.
    limit: usize,
    last: Arc<Mutex<Option<Shared>>>,
}

impl Writer {
    async fn run(mut self) {
        let mut sequence = 0;
        let mut backoff = Backoff::default();
        while let Some(batch) = self.next().await {
            let note = |trouble| *self.last.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
            sequence += 1;
            match commit(&self.store, batch, sequence, &note).await {
                Outcome::Answered => {
                    backoff = Backoff::default();
                    self.limit = (2 * self.limit).min(MAX_SQL);
                }
                Outcome::Again { batch, verdict } => {
                    let may_wait = matches!(verdict, Verdict::Lost | Verdict::Conflict);
                    let deadline = latest(&batch).unwrap_or_else(Instant::now);
                    // Those that can't be tried in time are told why by their last try.
                    if !may_wait || backoff.wait_until(deadline).await {
                        self.take_back(batch, verdict);
                    }
                }
            }
        }
    }

    /// Puts a batch that failed as a whole back, to be tried in parts. So a request that no server takes fails alone, and a
    /// batch that is too long for a server or a proxy before it becomes shorter.
    fn take_back(&mut self, mut batch: Vec<Request>, verdict: Verdict) {
        if batch.len() == 1 {
            // The others do not wait for one that may never succeed.
            self.waiting.extend(batch.pop());
            return;
        }
        if may_be_of_one(verdict) {
            let bytes: usize = batch.iter().map(Request::sql_bytes).sum();
            self.limit = bytes / 2;
        }
        for request in batch.into_iter().rev() {
            self.waiting.push_front(request);
        }
    }

    /// All pending requests, as far as they fit into one transaction.
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
            bytes += first.sql_bytes();
            let fits = batch.len() < MAX_BATCH && bytes <= self.limit && !alone(first) && !batch.iter().any(alone);
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
