//! A batch of requests as one transaction of the server's, in two round trips: one that takes the counter's lock and
//! reads what the requests touch, one that writes and commits.
//!
//! The isolation is READ COMMITTED: after the lock each statement sees all that was committed before, and no gap is
//! locked. Between the two trips the lock is held by a client that may be paused or cut off, so the server is told to
//! end the connection when nothing comes for [`MAX_THOUGHT`].

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use registry_api::{Committed, Prefix, Result, Revision, SessionId};
use sqlx::mysql::MySqlRow;
use tokio::time::{Instant, timeout_at};

use crate::error::{self, Shared, Trouble, Verdict};
use crate::gather::{Job, MAX_SQL, Request};
use crate::line::{Answer, Line, NO_BOUND, column, number};
use crate::plan::{Change, Found, Held, Plan, Probes, What};
use crate::settings;
use crate::store::{Counters, Store};
use crate::tables::{Hex, Nullable, Tables};

/// How long the server lets a client think while it holds the lock, in seconds.
const MAX_THOUGHT: u64 = 3;

/// The most bytes of the names in one statement that reads keys, about.
const MAX_LIST: usize = 1 << 20;

/// The kinds of changes, as they are stored.
pub(crate) const PUT: u64 = 0;
pub(crate) const DELETED: u64 = 1;
pub(crate) const SESSION_ENDED: u64 = 2;

pub(crate) const CHANGE: &str =
    "namespace, revision, position, name, kind, value, create_revision, mod_revision, session, client, sequence";

/// What a request did.
pub(crate) struct Written {
    pub(crate) committed: Committed,
    /// How many keys a prefix had.
    pub(crate) deleted: u64,
}

/// What came of a try.
pub(crate) enum Tried {
    /// There is an answer to each request.
    Done(Vec<Result<Written>>),
    /// Nothing happened.
    Nothing(Trouble),
    /// It can't be found out.
    Unknown(Trouble),
}

/// Tries to commit a batch. Requests that were given up before the commit was sent are taken out of it.
pub(crate) async fn attempt(store: &Store, batch: &mut Vec<Request>, sequence: u64) -> Tried {
    match try_attempt(store, batch, sequence).await {
        Ok(tried) => tried,
        Err(trouble) => Tried::Nothing(trouble),
    }
}

async fn try_attempt(store: &Store, batch: &mut Vec<Request>, sequence: u64) -> Result<Tried, Trouble> {
    let probes = Probes::of(batch.iter().filter_map(Request::txn));
    let begin = begin(store, batch, &probes);
    let mut line = store.lines.take().await?;
    let mut answers = Vec::new();
    for packet in &begin.packets {
        let (same, some) = line.ask(packet, NO_BOUND).await?;
        line = same;
        answers.extend(some);
    }
    let mut plan = read(store, &probes, begin.lists, answers)?;
    let before = plan.revision;
    batch.retain(|request| !request.claimed.swap(true, Ordering::AcqRel));
    let mut write = Write {
        store,
        sequence,
        sql: String::new(),
        open: false,
    };
    let answers: Vec<_> = batch
        .iter()
        .map(|request| write.answer(&mut plan, &request.job, request.session))
        .collect();
    if plan.revision == before {
        finish(store, line).await;
        return Ok(Tried::Done(answers));
    }
    write.entries(&plan, before);
    match line.ask(&write.sql, NO_BOUND).await {
        Ok((line, _)) => store.lines.give_back(line),
        Err(trouble) => match settle(store, batch, before + 1, sequence).await {
            Some(true) => {}
            Some(false) => {
                batch
                    .iter()
                    .for_each(|request| request.claimed.store(false, Ordering::Release));
                return Err(trouble);
            }
            None => return Ok(Tried::Unknown(trouble)),
        },
    }
    store.poll.changed();
    Ok(Tried::Done(answers))
}

/// Ends a transaction that writes nothing. A line on which that fails is closed, which does as much.
async fn finish(store: &Store, line: Line<'_>) {
    if let Ok((line, _)) = line
        .ask("ROLLBACK; SET SESSION wait_timeout = @registry_wait", NO_BOUND)
        .await
    {
        store.lines.give_back(line);
    }
}

/// The statements that take the lock and read what the requests touch.
struct Begin {
    /// One, but for a single request of many long names, whose statements are longer than the least packet.
    packets: Vec<String>,
    /// How many statements read the keys.
    lists: usize,
}

fn begin(store: &Store, batch: &[Request], probes: &Probes) -> Begin {
    let Tables {
        entries,
        sessions,
        namespace,
        ..
    } = &store.tables;
    let mut packets = vec![format!(
        "SET @registry_wait = @@SESSION.wait_timeout, SESSION wait_timeout = {MAX_THOUGHT}; {}",
        lock(store)
    )];
    let mut ask = |query: String| match packets.last_mut() {
        Some(packet) if packet.len() + query.len() < MAX_SQL => {
            packet.push_str("; ");
            packet.push_str(&query);
        }
        _ => packets.push(query),
    };
    let lists = lists(probes.keys.iter().map(Hex::key));
    for names in &lists {
        ask(format!(
            "SELECT name, create_revision, mod_revision, session FROM {entries} \
             WHERE namespace = {namespace} AND name IN ({names})"
        ));
    }
    let ids = list(probes.sessions.iter().map(|session| session.0));
    if !ids.is_empty() {
        ask(format!(
            "SELECT id FROM {sessions} WHERE namespace = {namespace} AND id IN ({ids})"
        ));
    }
    for (key, count) in &probes.below {
        let below = store.tables.below(&Prefix::from(key));
        ask(format!(
            "SELECT name FROM {entries} WHERE namespace = {namespace} AND {below} ORDER BY name LIMIT {count}"
        ));
    }
    for request in batch {
        if let Job::DeletePrefix(prefix) = &request.job {
            ask(format!(
                "SELECT COUNT(*) FROM {entries} WHERE {}",
                store.tables.covered(prefix)
            ));
        }
    }
    ask(settings::READ_ONLY.into());
    Begin {
        packets,
        lists: lists.len(),
    }
}

/// Begins a transaction with the counter's lock.
fn lock(store: &Store) -> String {
    format!(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; START TRANSACTION; {} FOR UPDATE",
        store.select_revision()
    )
}

/// The answers to [`begin`].
fn read(store: &Store, probes: &Probes, lists: usize, mut answers: Vec<Answer>) -> Result<Plan, Trouble> {
    store.lines.route.check_writable(answers.pop())?;
    let failed = |source| Trouble::Client {
        endpoint: store.lines.route.endpoint.clone(),
        source,
    };
    let mut answers = answers.into_iter().skip(3);
    let counters = answers.next().and_then(|answer| answer.rows.into_iter().next());
    let counters = counters.ok_or_else(|| Trouble::NoNamespace(store.lines.route.endpoint.clone()))?;
    let mut plan = Plan {
        revision: Counters::of(&counters).map_err(failed)?.revision,
        ..Plan::default()
    };
    let mut rows = || answers.next().map(|answer| answer.rows).unwrap_or_default();
    plan.keys = probes.keys.iter().map(|key| (key.as_str().to_owned(), None)).collect();
    for _ in 0..lists {
        for row in rows() {
            let (name, found) = found(&row).map_err(failed)?;
            plan.keys.insert(name, Some(found));
        }
    }
    if !probes.sessions.is_empty() {
        let ids: Result<_, _> = rows().iter().map(|row| number(row, 0).map(SessionId)).collect();
        plan.sessions = ids.map_err(failed)?;
    }
    for key in probes.below.keys() {
        let names: Result<_, _> = rows().iter().map(|row| name(row, 0)).collect();
        plan.below.insert(key.clone(), names.map_err(failed)?);
    }
    if let Some(row) = rows().first() {
        plan.covered = number(row, 0).map_err(failed)?;
    }
    Ok(plan)
}

fn found(row: &MySqlRow) -> Result<(String, Found), sqlx::Error> {
    let found = Found {
        create_revision: number(row, 1)?,
        mod_revision: number(row, 2)?,
        session: column::<Option<u64>>(row, 3)?.map(SessionId),
        value: Held::Entry,
    };
    Ok((name(row, 0)?, found))
}

/// A name. What no registry wrote is in no table of the registry's, so what can't be read as text matches no key.
fn name(row: &MySqlRow, place: usize) -> Result<String, sqlx::Error> {
    Ok(String::from_utf8_lossy(column(row, place)?).into_owned())
}

/// The statements that write a batch.
struct Write<'s> {
    store: &'s Store,
    sequence: u64,
    sql: String,
    /// The last statement is a list of rows that may go on.
    open: bool,
}

impl Write<'_> {
    /// Judges a request and adds its changes.
    fn answer(&mut self, plan: &mut Plan, job: &Job, session: Option<SessionId>) -> Result<Written> {
        let (committed, deleted) = match job {
            Job::Txn(txn) => (plan.apply(txn, session)?, 0),
            Job::DeletePrefix(prefix) => {
                let deleted = plan.covered;
                if deleted > 0 {
                    plan.revision += 1;
                    self.delete_covered(prefix, plan.revision);
                }
                let committed = Committed {
                    revision: Revision(plan.revision),
                    changed: Vec::new(),
                };
                (committed, deleted)
            }
        };
        for change in plan.changes.drain(..) {
            self.change(change);
        }
        Ok(Written { committed, deleted })
    }

    fn change(&mut self, change: Change) {
        let Tables {
            entries,
            changes,
            namespace,
            ..
        } = &self.store.tables;
        let Change {
            revision,
            position,
            key,
            what,
        } = change;
        let name = Hex::key(&key);
        let mark = self.mark();
        match what {
            What::Put {
                value,
                create_revision,
                session,
            } => {
                let (value, session) = (Hex(&value), Nullable(session.map(|session| session.0)));
                let row = format!(
                    "({namespace}, {revision}, {position}, {name}, {PUT}, {value}, {create_revision}, {revision}, \
                     {session}, {mark})"
                );
                match self.open {
                    true => self.sql.push_str(", "),
                    false => self.sql.push_str(&format!("INSERT INTO {changes} ({CHANGE}) VALUES ")),
                }
                self.sql.push_str(&row);
                self.open = true;
            }
            What::Delete(last) => {
                let from = match last {
                    Held::Entry => format!("{entries} WHERE namespace = {namespace} AND name = {name}"),
                    Held::Change { revision, position } => format!(
                        "{changes} WHERE namespace = {namespace} AND revision = {revision} AND position = {position}"
                    ),
                };
                self.statement(format!(
                    "INSERT INTO {changes} ({CHANGE}) SELECT namespace, {revision}, {position}, name, {DELETED}, value, \
                     create_revision, mod_revision, session, {mark} FROM {from}"
                ));
            }
        }
    }

    fn statement(&mut self, statement: String) {
        if std::mem::take(&mut self.open) {
            self.sql.push_str("; ");
        }
        self.sql.push_str(&statement);
        self.sql.push_str("; ");
    }

    fn delete_covered(&mut self, prefix: &Prefix, revision: u64) {
        let Tables { entries, changes, .. } = &self.store.tables;
        let (covered, mark) = (self.store.tables.covered(prefix), self.mark());
        let statements = format!(
            "INSERT INTO {changes} ({CHANGE}) SELECT namespace, {revision}, ROW_NUMBER() OVER (ORDER BY name) - 1, name, \
             {DELETED}, value, create_revision, mod_revision, session, {mark} FROM {entries} WHERE {covered}; \
             DELETE FROM {entries} WHERE {covered}"
        );
        self.statement(statements);
    }

    fn mark(&self) -> String {
        format!("{}, {}", self.store.client, self.sequence)
    }

    /// Brings the entries and the counter to where the changes lead, and commits.
    fn entries(&mut self, plan: &Plan, before: u64) {
        let Tables {
            namespaces,
            entries,
            changes,
            namespace,
            ..
        } = &self.store.tables;
        // In the order of the changes, so that the last one of a key stays.
        let columns = "namespace, name, value, create_revision, mod_revision, session";
        self.statement(format!(
            "REPLACE INTO {entries} ({columns}) SELECT {columns} FROM {changes} \
             WHERE namespace = {namespace} AND revision > {before} AND kind = {PUT} ORDER BY revision, position"
        ));
        let gone = list(plan.gone().map(|name| Hex(name.as_bytes())));
        if !gone.is_empty() {
            self.statement(format!(
                "DELETE FROM {entries} WHERE namespace = {namespace} AND name IN ({gone})"
            ));
        }
        self.statement(format!(
            "UPDATE {namespaces} SET revision = {} WHERE id = {namespace}; COMMIT; \
             SET SESSION wait_timeout = @registry_wait",
            plan.revision
        ));
    }
}

/// Determines whether a batch whose commit got no response was committed: `None` if the server can no longer tell.
async fn settle(store: &Store, batch: &[Request], revision: u64, sequence: u64) -> Option<bool> {
    let sql = settlement(&lock(store), &store.tables, revision, (store.client, sequence));
    let deadline = latest(batch)?;
    let answers = store.lines.ask(deadline, &sql, NO_BOUND).await.ok()?;
    let counters = Counters::of(answers.get(2)?.rows.first()?).ok()?;
    if counters.compacted >= revision {
        return None;
    }
    let mark = |row: &MySqlRow| Some((number(row, 0).ok()?, number(row, 1).ok()?));
    Some(answers.get(3)?.rows.first().and_then(mark) == Some((store.client, sequence)))
}

/// Returns the statements that read whose changes have a revision, and commit to disk what they read.
///
/// The transaction holds the namespace's lock. So the batch's own transaction, which held that lock, has ended: its
/// changes are in the log, or never will be. A server without a binary log makes a commit visible before it is on disk,
/// and a crash may still lose it. So this transaction changes the counter, changes it back and commits. The server
/// acknowledges that commit once the redo log is synced up to it, and the batch's commit comes before it in that log. Where
/// the batch's changes are not in the log, nothing is written: a full disk does not make the outcome unknown.
fn settlement(lock: &str, tables: &Tables, revision: u64, (client, sequence): (u64, u64)) -> String {
    let Tables {
        namespaces,
        changes,
        namespace,
        ..
    } = tables;
    let at = format!("FROM {changes} WHERE namespace = {namespace} AND revision = {revision} AND position = 0");
    let ours = format!("EXISTS (SELECT 1 {at} AND client = {client} AND sequence = {sequence})");
    // An update that leaves a row as it is writes no redo log, and its commit waits for nothing.
    let change = |by| format!("UPDATE {namespaces} SET revision = revision {by} 1 WHERE id = {namespace} AND {ours}");
    format!(
        "{lock}; SELECT client, sequence {at}; {}; {}; COMMIT",
        change("+"),
        change("-")
    )
}

pub(crate) fn latest(batch: &[Request]) -> Option<Instant> {
    batch.iter().map(|request| request.deadline).max()
}

/// Items with commas between them, in as many lists as it takes to keep each below about [`MAX_LIST`] bytes.
fn lists(items: impl Iterator<Item = impl std::fmt::Display>) -> Vec<String> {
    let mut lists = Vec::<String>::new();
    for item in items {
        // Writing to a string does not fail.
        let _ = match lists.last_mut() {
            Some(list) if list.len() < MAX_LIST => write!(list, ", {item}"),
            _ => {
                lists.push(String::new());
                lists.last_mut().map_or(Ok(()), |list| write!(list, "{item}"))
            }
        };
    }
    lists
}

fn list(items: impl Iterator<Item = impl std::fmt::Display>) -> String {
    lists(items).join(", ")
}

/// What became of a batch.
pub(crate) enum Outcome {
    /// Every request in it was answered, or its caller has stopped waiting.
    Answered,
    /// Nothing happened, and it may be tried again.
    Again { batch: Vec<Request>, verdict: Verdict },
}

/// Tries to commit a batch once. Gives it back if it may be tried again, as it is or in parts.
pub(crate) async fn commit(
    store: &Store,
    mut batch: Vec<Request>,
    sequence: u64,
    last: &impl Fn(Option<Shared>),
) -> Outcome {
    batch.retain(|request| !request.answer.is_closed());
    let Some(deadline) = latest(&batch) else {
        return Outcome::Answered;
    };
    let Ok(tried) = timeout_at(deadline, attempt(store, &mut batch, sequence)).await else {
        // The callers have returned at their own deadlines.
        store.lines.forget_idle();
        return Outcome::Answered;
    };
    match tried {
        Tried::Done(answers) => {
            last(None);
            for (request, answer) in batch.into_iter().zip(answers) {
                // A caller that has stopped waiting takes no answer.
                let _ = request.answer.send(answer);
            }
        }
        Tried::Unknown(trouble) => {
            let cause = Shared(Arc::new(trouble));
            answer_all(batch, || error::unknown(cause.clone()));
        }
        Tried::Nothing(trouble) => {
            let verdict = trouble.verdict();
            if matches!(verdict, Verdict::Lost | Verdict::Conflict) {
                store.lines.forget_idle();
                last(Some(Shared(Arc::new(trouble))));
                return Outcome::Again { batch, verdict };
            }
            if batch.len() > 1 && may_be_of_one(verdict) {
                return Outcome::Again { batch, verdict };
            }
            let cause = Arc::new(trouble);
            answer_all(batch, || Trouble::Repeated(Shared(cause.clone())).unchanged());
        }
    }
    Outcome::Answered
}

/// Whether one request of a batch, or its length, may be the reason of a failure. A server that gets too long a statement
/// closes the connection, and its error (1153) may be lost with it.
pub(crate) fn may_be_of_one(verdict: Verdict) -> bool {
    matches!(
        verdict,
        Verdict::Lost | Verdict::Other | Verdict::Setting("max_allowed_packet")
    )
}

fn answer_all(batch: Vec<Request>, error: impl Fn() -> registry_api::Error) {
    for request in batch {
        // A caller that has stopped waiting takes no answer.
        let _ = request.answer.send(Err(error()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::TablePrefix;

    #[test]
    fn a_commit_that_is_found_is_covered_by_a_durable_one() {
        let sql = settlement("LOCK", &Tables::new(&TablePrefix::default()), 7, (3, 5));
        let statements: Vec<_> = sql.split("; ").collect();
        let [_, read, there, back, end] = statements[..] else {
            panic!("{sql}")
        };
        assert!(read.starts_with("SELECT client, sequence"), "{sql}");
        for (change, by) in [(there, "+"), (back, "-")] {
            let update = format!("UPDATE registry_namespaces SET revision = revision {by} 1 WHERE id = 0 AND EXISTS");
            assert!(change.starts_with(&update), "{change}");
            assert!(change.ends_with("client = 3 AND sequence = 5)"), "{change}");
        }
        assert_eq!(end, "COMMIT");
    }
}
