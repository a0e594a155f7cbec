//! Writes: read, judge, and send one multi that holds only if what was read still does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use registry_api::{Committed, Error, Existing, Expect, Key, Kind, Operation, Prefix, Result, SessionId, Txn};
use tokio::time::Instant;
use zookeeper_client::{Client, Error as ClientError, MultiWriteError, MultiWriteResult, Stat};

use crate::error::{self, Trouble, Verdict};
use crate::names::{Names, newest, owner, parent, revision};
use crate::plan::{Parents, Plan, Reach, Step, View, mark};
use crate::session::prepare_namespace;
use crate::store::{Backoff, Conn, Store};
use crate::walk::look_at;

const OPERATION: &str = "a transaction";
/// A request of more bytes is refused by servers as shipped (`jute.maxbuffer`), with some room for what frames it.
const MAX_REQUEST: usize = 1_000_000;
/// How many bytes of parents are made in one request, where all together would be too large.
const MARKS_BYTES: usize = 256 << 10;
/// After so many tries in vain, each next one waits a little.
const EAGER: u32 = 3;
/// After so many, emptied parents are left to the sweep: whoever changes them may be why.
const TIDY: u32 = 2;

/// What became of a multi.
pub(crate) enum Sent {
    /// The change of that zxid, and for each step what the node is now, where it tells.
    Done(i64, Vec<Option<Stat>>),
    /// Something was not as it was read; which step said so. Nothing happened.
    Stale(usize, ClientError),
    /// Nothing happened.
    NotApplied(ClientError),
    /// It failed for good.
    Failed(Error),
}

impl Store {
    /// Commits a transaction. `session` is the one it is asked for, if it needs one.
    pub(crate) async fn commit(&self, txn: &Txn, session: Option<SessionId>) -> Result<Committed> {
        let deadline = self.deadline();
        let mut attempt = 0;
        let mut backoff = Backoff::default();
        let mut short = self.shortcut(txn);
        let mut failure: registry_api::BoxError = Trouble::Contended.into();
        loop {
            let conn = self.conn(deadline).await?;
            if let Some(session) = session.filter(|session| *session != conn.session) {
                return Err(Error::SessionExpired { session });
            }
            let taken = short.take();
            let is_short = taken.is_some();
            let plan = match taken {
                Some(plan) => Ok(Some(plan)),
                None => self.plan(&conn, deadline, txn, session, attempt).await,
            };
            let sent = match plan {
                Ok(Some(plan)) if plan.is_nothing() => {
                    return Ok(Committed {
                        revision: revision(self.seen()),
                        changed: plan.changed,
                    });
                }
                Ok(Some(plan)) => match self.send(&conn, deadline, &plan.steps, session).await {
                    Sent::Done(zxid, stats) => return Ok(self.done(txn, &plan, zxid, &stats)),
                    sent => sent,
                },
                // Judged on a state that may be old: once more on the newest.
                Ok(None) => {
                    attempt += 1;
                    continue;
                }
                Err(failed) => failed,
            };
            drop(conn);
            match sent {
                Sent::Done(..) => {}
                Sent::Failed(error) => return Err(error),
                // Others are in the queue that is left: its directory stays.
                Sent::Stale(2, ClientError::NotEmpty) if is_short => short = self.leave(txn),
                Sent::Stale(..) => {
                    // A shortcut's surprise is news: what is judged next has to be no older.
                    attempt = if is_short { 1 } else { attempt + 1 };
                    if attempt <= EAGER {
                        continue;
                    }
                }
                Sent::NotApplied(error) => {
                    if let (Verdict::SessionOver, Some(session)) = (error::verdict(&error), session) {
                        return Err(Error::SessionExpired { session });
                    }
                    failure = error.into();
                }
            }
            if !backoff.wait_until(deadline).await {
                return Err(error::unavailable(failure));
            }
        }
    }

    /// The plan of a common transaction, which needs nothing read.
    fn shortcut(&self, txn: &Txn) -> Option<Plan> {
        let [operation] = txn.operations.as_slice() else {
            return None;
        };
        let path = self.names.path(operation.key());
        match operation {
            Operation::Put {
                value,
                kind: Kind::Persistent,
                ..
            } if txn.conditions.is_empty() => {
                let part = self.names.part(&path)?;
                let version = self.facts.get(&path)?;
                let guard = Step::Check {
                    path: self.names.guard(part),
                    version,
                };
                let set = Step::Set {
                    path: path.clone(),
                    data: crate::names::encode(value),
                    version: None,
                };
                Some(Plan {
                    steps: vec![guard, set],
                    changed: vec![true],
                    // The answer says whether it still is a persistent one.
                    facts: vec![(path, part)],
                    known: BTreeMap::from([(part, version)]),
                    ..Plan::default()
                })
            }
            Operation::Put {
                key,
                value,
                kind: Kind::Ephemeral,
                existing: Existing::Keep,
            } if key.is_recipe() => self.enter(txn, key, &path, value),
            // A recipe's key is a leaf, and the directory it is in holds nothing else.
            Operation::Delete { key } if key.is_recipe() && txn.conditions.is_empty() => {
                let directory = parent(&path).to_owned();
                let delete = |path| Step::Delete { path, version: None };
                Some(Plan {
                    steps: vec![self.tick(), delete(path), delete(directory)],
                    changed: vec![true],
                    ..Plan::default()
                })
            }
            _ => None,
        }
    }

    /// A contender's entry into a queue. An empty queue has no directory, as its last contender took it along; so making
    /// the directory says at once that the queue is empty.
    fn enter(&self, txn: &Txn, key: &Key, path: &str, value: &Bytes) -> Option<Plan> {
        let directory = key.parent();
        let mut steps = vec![self.tick()];
        for condition in &txn.conditions {
            match condition.expect {
                Expect::Absent if condition.key == *key => {}
                Expect::Childless if Prefix::from(&condition.key) == directory => {
                    steps.push(mark(&self.names.prefix(&directory)));
                }
                _ => return None,
            }
        }
        steps.push(Step::Create {
            path: path.to_owned(),
            data: crate::names::encode(value),
            kind: Kind::Ephemeral,
        });
        Some(Plan {
            steps,
            changed: vec![true],
            ..Plan::default()
        })
    }

    /// A contender's way out of a queue that others are in.
    fn leave(&self, txn: &Txn) -> Option<Plan> {
        let [Operation::Delete { key }] = txn.operations.as_slice() else {
            return None;
        };
        let path = self.names.path(key);
        let version = None;
        Some(Plan {
            steps: vec![self.tick(), Step::Delete { path, version }],
            changed: vec![true],
            ..Plan::default()
        })
    }

    /// Tells the revision of a multi that sets nothing else.
    fn tick(&self) -> Step {
        Step::Set {
            path: self.names.clock(),
            data: Bytes::new(),
            version: None,
        }
    }

    /// Reads and judges. `None` if the judgement was on a state that may be old, and is not one that ZooKeeper checks.
    async fn plan(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        txn: &Txn,
        session: Option<SessionId>,
        attempt: u32,
    ) -> Result<Option<Plan>, Sent> {
        let reach = if attempt == 0 { Reach::Near } else { Reach::Far };
        let read = self.view(conn, txn, reach, attempt > 0);
        let view = match self.ask(conn, deadline, read).await {
            Some(Ok(view)) => view,
            Some(Err(failure)) => {
                return Err(match error::verdict(&failure) {
                    Verdict::SessionOver | Verdict::NotApplied | Verdict::Unknown => Sent::NotApplied(failure),
                    _ => Sent::Failed(error::read(failure)),
                });
            }
            None => return Err(Sent::Failed(error::unavailable(self.silent()))),
        };
        let parents = match attempt <= TIDY {
            true => Parents::Remove,
            false => Parents::Leave,
        };
        match Plan::new(&self.names, txn, session, &view, parents) {
            Err(_) if attempt == 0 => Ok(None),
            Ok(plan) if attempt == 0 && plan.is_nothing() => Ok(None),
            Err(refused) => Err(Sent::Failed(refused)),
            Ok(plan) if plan.size() > MAX_REQUEST && !plan.marks.is_empty() => {
                self.make_marks(conn, deadline, &plan.marks, session).await?;
                Ok(None)
            }
            Ok(plan) => Ok(Some(plan)),
        }
    }

    /// Reads what a transaction is judged by.
    async fn view(&self, conn: &Conn, txn: &Txn, reach: Reach, fresh: bool) -> Result<View, ClientError> {
        let (names, client) = (&self.names, &conn.client);
        let paths: Vec<_> = View::wanted(names, txn, reach).into_iter().collect();
        let parts: BTreeSet<_> = paths.iter().filter_map(|path| names.part(path)).collect();
        // All is sent at once and answered in this order.
        let again = fresh.then(|| (self.fresh(conn), client.check_stat(&names.clock())));
        let guards = parts.iter().map(|part| client.check_stat(&names.guard(*part)));
        let guards: Vec<_> = guards.collect();
        let stats: Vec<_> = paths.iter().map(|path| client.check_stat(path)).collect();
        let mut view = View::default();
        let mut seen = 0;
        let mut lost = false;
        if let Some((fresh, clock)) = again {
            fresh.await?;
            lost = clock.await?.is_none();
        }
        for (part, guard) in parts.iter().zip(try_join_all(guards).await?) {
            match guard {
                Some(stat) => {
                    seen = seen.max(newest(&stat));
                    view.guards.insert(*part, stat.version);
                }
                None => lost = true,
            }
        }
        if lost {
            // Somebody deleted the namespace behind our back.
            prepare_namespace(self, client).await?;
            return Err(ClientError::Throttled);
        }
        let stats = try_join_all(stats).await?;
        let marks = paths
            .iter()
            .zip(&stats)
            .filter(|(_, stat)| stat.as_ref().is_some_and(crate::names::may_be_mark))
            .map(|(path, _)| look_at(client, path));
        let marks = try_join_all(marks).await?;
        let mut marks = marks.into_iter();
        for (path, stat) in paths.into_iter().zip(stats) {
            let found = match stat {
                Some(stat) if crate::names::may_be_mark(&stat) => marks.next().flatten(),
                Some(stat) => Some(crate::walk::Found {
                    data: crate::names::Data::Value(Bytes::new()),
                    stat,
                }),
                None => None,
            };
            seen = seen.max(found.as_ref().map_or(0, |found| newest(&found.stat)));
            view.nodes.insert(path, found);
        }
        self.saw(seen);
        Ok(view)
    }

    /// Makes parents in requests of their own. A crash in between leaves them to the sweep.
    async fn make_marks(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        marks: &[String],
        session: Option<SessionId>,
    ) -> Result<(), Sent> {
        let mut batch = Vec::new();
        let mut size = 0;
        for (place, path) in marks.iter().enumerate() {
            let mut steps = vec![mark(path)];
            steps.extend(self.names.part(parent(path)).map(|part| Step::Set {
                path: self.names.guard(part),
                data: Bytes::new(),
                version: None,
            }));
            size += steps.iter().map(Step::size).sum::<usize>();
            batch.extend(steps);
            if size > MARKS_BYTES || place + 1 == marks.len() {
                match self.send(conn, deadline, &batch, session).await {
                    Sent::Done(..) => {}
                    failed => return Err(failed),
                }
                batch.clear();
                size = 0;
            }
        }
        Ok(())
    }

    /// Sends one multi.
    pub(crate) async fn send(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        steps: &[Step],
        session: Option<SessionId>,
    ) -> Sent {
        let multi = self.multi(&conn.client, steps);
        let failure = match self.ask(conn, deadline, multi).await {
            Some(Ok(results)) => return self.applied(&results),
            Some(Err(MultiWriteError::OperationFailed { index, source })) => {
                return match error::verdict(&source) {
                    Verdict::Node => {
                        if let Some(Step::Check { path, .. } | Step::Set { path, .. }) = steps.get(index) {
                            tracing::trace!(path, "not as it was read");
                        }
                        Sent::Stale(index, source)
                    }
                    Verdict::SessionOver | Verdict::NotApplied => Sent::NotApplied(source),
                    _ => Sent::Failed(error::write(OPERATION, session, source)),
                };
            }
            Some(Err(MultiWriteError::RequestFailed { source })) => source,
            None => return Sent::Failed(error::unknown(OPERATION, self.silent())),
        };
        match error::verdict(&failure) {
            Verdict::SessionOver | Verdict::NotApplied => Sent::NotApplied(failure),
            _ => Sent::Failed(error::write(OPERATION, session, failure)),
        }
    }

    async fn multi(&self, client: &Client, steps: &[Step]) -> Result<Vec<MultiWriteResult>, MultiWriteError> {
        let mut multi = client.new_multi_writer();
        for step in steps {
            match step {
                Step::Check { path, version } => multi.add_check_version(path, *version),
                Step::Set { path, data, version } => multi.add_set_data(path, data, *version),
                Step::Create { path, data, kind } => {
                    let options = match kind {
                        Kind::Persistent => self.persistent(),
                        Kind::Ephemeral => self.ephemeral(),
                    };
                    multi.add_create(path, data, &options)
                }
                Step::Delete { path, version } => multi.add_delete(path, *version),
            }?;
        }
        multi.commit().await
    }

    fn applied(&self, results: &[MultiWriteResult]) -> Sent {
        let stat = |result: &MultiWriteResult| match result {
            MultiWriteResult::SetData { stat } => Some(*stat),
            // Some versions of ZooKeeper answer a create in a multi without a stat (ZOOKEEPER-4026).
            _ => None,
        };
        let stats: Vec<_> = results.iter().map(stat).collect();
        let zxid = stats.iter().flatten().map(|stat| stat.mzxid).max().unwrap_or(0);
        self.saw(zxid);
        Sent::Done(zxid, stats)
    }

    fn done(&self, txn: &Txn, plan: &Plan, zxid: i64, stats: &[Option<Stat>]) -> Committed {
        let set = |node: &str| {
            plan.steps.iter().zip(stats).find_map(|(step, stat)| match step {
                Step::Set { path, .. } if path == node => *stat,
                _ => None,
            })
        };
        for (path, part) in &plan.facts {
            let guard = set(&self.names.guard(*part)).map(|guard| guard.version);
            let version = guard.or_else(|| plan.known.get(part).copied());
            // Another client may have made it an ephemeral one.
            let is_persistent = set(path).is_none_or(|stat| owner(&stat).is_none());
            match version.filter(|_| is_persistent) {
                Some(version) => self.facts.learn(path, version),
                None => self.facts.forget(path),
            }
        }
        for operation in &txn.operations {
            if matches!(operation, Operation::Delete { .. }) {
                self.facts.forget(&self.names.path(operation.key()));
            }
        }
        Committed {
            revision: revision(zxid),
            changed: plan.changed.clone(),
        }
    }

    /// Removes a parent that nobody put and that holds nothing, and those above it that it emptied. Returns the one that it
    /// did not get to judge, because others made or deleted keys meanwhile.
    pub(crate) async fn tidy<'p>(
        &self,
        conn: &Arc<Conn>,
        deadline: Instant,
        path: &'p str,
    ) -> Result<Option<&'p str>, ClientError> {
        let mut path = path;
        // The root of a tree stays.
        while path.get(1..).is_some_and(|path| path.contains('/')) {
            let (names, client) = (&self.names, &conn.client);
            let guard = names.part(path).map(|part| names.guard(part));
            let version = match &guard {
                Some(guard) => client.check_stat(guard).await?.map(|stat| stat.version),
                None => None,
            };
            let found = match look_at(client, path).await {
                Ok(Some(found)) => found,
                Ok(None) => {
                    path = parent(path);
                    continue;
                }
                // Another client's, then.
                Err(ClientError::NoAuth) => return Ok(None),
                Err(failure) => return Err(failure),
            };
            if !found.is_mark() || found.stat.num_children > 0 {
                return Ok(None);
            }
            let mut steps = vec![self.tick()];
            if let (Some(path), Some(version)) = (guard, version) {
                steps.push(Step::Check { path, version });
            }
            steps.push(Step::Delete {
                path: path.to_owned(),
                version: Some(found.stat.version),
            });
            match self.send(conn, deadline, &steps, None).await {
                Sent::Done(..) => path = parent(path),
                Sent::Stale(..) => return Ok(Some(path)),
                Sent::NotApplied(failure) => return Err(failure),
                // It lies in a node of another client.
                Sent::Failed(Error::AccessDenied { .. }) => return Ok(None),
                Sent::Failed(_) => return Err(ClientError::ConnectionLoss),
            }
        }
        Ok(None)
    }

    /// Deletes what a prefix covers and says how many keys there were.
    pub(crate) async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        crate::prune::prune(self, prefix).await
    }
}

/// The guards that the making or deleting of these keys writes.
pub(crate) fn guards_of<'p>(names: &Names, paths: impl Iterator<Item = &'p str>) -> Vec<Step> {
    let parts: BTreeSet<_> = paths.filter_map(|path| names.part(path)).collect();
    let write = |part: u8| Step::Set {
        path: names.guard(part),
        data: Bytes::new(),
        version: None,
    };
    parts.into_iter().map(write).collect()
}
