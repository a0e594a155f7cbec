//! Writes: read, judge, and send one multi that holds only if what was read still does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{join, try_join, try_join_all};
use registry_api::{Committed, Error, Existing, Expect, Key, Kind, Operation, Prefix, Result, SessionId, Txn};
use tokio::time::Instant;
use zookeeper_client::{Error as ClientError, Stat};

use crate::error::{self, Trouble, Verdict};
use crate::names::{Names, may_be_mark, may_have_birth, newest, owner, parent, revision};
use crate::plan::{Parents, Plan, Reach, Step, View, mark};
use crate::send::Sent;
use crate::session::prepare_namespace;
use crate::store::{Backoff, Conn, Store};
use crate::walk::{Found, look_at};

pub(crate) const OPERATION: &str = "a transaction";
/// A request of more bytes is refused by servers as shipped (`jute.maxbuffer`), with some room for what frames it.
const MAX_REQUEST: usize = 1_000_000;
/// How many bytes of parents are made in one request, where all together would be too large.
const MARKS_BYTES: usize = 256 << 10;
/// After so many tries in vain, each next one waits a little.
const EAGER: u32 = 3;
/// After so many, emptied parents are left to the sweep: whoever changes them may be why.
const TIDY: u32 = 2;

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
                Ok(Some(plan)) => match self.send_plan(&conn, deadline, &plan, session).await {
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
                // Others are in the queue that is left: its directory stays. The next holder is waiting for this.
                Sent::Stale(2, ClientError::NotEmpty) if is_short => {
                    short = self.leave(txn);
                    continue;
                }
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
                if self.crowded.contains(&directory) {
                    return self.leave(txn);
                }
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
                // The epoch of fencing tokens: a recipe's key is made once, so that it exists is all there is to check.
                Expect::Present if condition.key.is_recipe() => steps.push(Step::Check {
                    path: self.names.path(&condition.key),
                    version: -1,
                }),
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
        let left = Some(parent(&path).to_owned());
        let version = None;
        Some(Plan {
            steps: vec![self.tick(), Step::Delete { path, version }],
            changed: vec![true],
            left,
            ..Plan::default()
        })
    }

    async fn send_plan(&self, conn: &Arc<Conn>, deadline: Instant, plan: &Plan, session: Option<SessionId>) -> Sent {
        let Some(directory) = &plan.left else {
            return self.send(conn, deadline, &plan.steps, session).await;
        };
        // Sent one after the other, without waiting in between, and answered in that order.
        let (sent, found) = join(
            self.send(conn, deadline, &plan.steps, session),
            self.ask(conn, deadline, async { conn.client.check_stat(directory).await }),
        )
        .await;
        match (&sent, found) {
            (Sent::Done(..), Some(Ok(Some(stat)))) if stat.num_children == 0 => {
                self.crowded.forget(directory);
                let (path, version) = (directory.clone(), None);
                let steps = [self.tick(), Step::Delete { path, version }];
                // If it fails, another contender has come, or the sweep does it.
                let _ = self.send(conn, deadline, &steps, None).await;
            }
            (Sent::Done(..), _) => self.crowded.learn(directory),
            _ => {}
        }
        sent
    }

    /// Tells the revision of a multi that sets nothing else.
    pub(crate) fn tick(&self) -> Step {
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
        let above = self.above();
        let mut plan = Plan::new(&self.names, txn, session, &view, parents);
        if parents == Parents::Remove
            && let Ok(large) = &plan
            && large.size(above) > MAX_REQUEST
            && large.marks.is_empty()
        {
            // The parents that the deletes empty can be larger than the transaction itself.
            plan = Plan::new(&self.names, txn, session, &view, Parents::Leave);
        }
        match plan {
            Err(_) if attempt == 0 => Ok(None),
            Ok(plan) if attempt == 0 && plan.is_nothing() => Ok(None),
            Err(refused) => match self.is_cleared(conn, deadline, &refused).await? {
                true => Ok(None),
                false => Err(Sent::Failed(refused)),
            },
            Ok(plan) if plan.size(above) > MAX_REQUEST && !plan.marks.is_empty() => {
                self.make_marks(conn, deadline, &plan.marks, session).await?;
                Ok(None)
            }
            // Names that are long in birth znodes, or a long chroot. Servers would close the connection.
            Ok(plan) if plan.size(above) > MAX_REQUEST => Err(Sent::Failed(Error::TooLarge {
                what: "the request that a transaction becomes on ZooKeeper",
                size: plan.size(above),
                limit: MAX_REQUEST,
            })),
            Ok(plan) => Ok(Some(plan)),
        }
    }

    /// Reads what a transaction is judged by.
    async fn view(&self, conn: &Conn, txn: &Txn, reach: Reach, fresh: bool) -> Result<View, ClientError> {
        let (names, client) = (&self.names, &conn.client);
        let paths: Vec<_> = View::wanted(names, txn, reach).into_iter().collect();
        let parts: BTreeSet<_> = paths.iter().filter_map(|path| names.part(path)).collect();
        // All is sent at once and answered in this order.
        let again = fresh.then(|| {
            let (clock, births) = (names.clock(), names.births());
            (self.fresh(conn), client.check_stat(&clock), client.check_stat(&births))
        });
        let guards = parts.iter().map(|part| client.check_stat(&names.guard(*part)));
        let guards: Vec<_> = guards.collect();
        let stats: Vec<_> = paths.iter().map(|path| client.check_stat(path)).collect();
        let mut view = View::default();
        let mut seen = 0;
        let mut lost = false;
        if let Some((fresh, clock, births)) = again {
            fresh.await?;
            lost = clock.await?.is_none() | births.await?.is_none();
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
            .filter(|(_, stat)| stat.as_ref().is_some_and(may_be_mark))
            .map(|(path, _)| look_at(client, path));
        let births = paths
            .iter()
            .zip(&stats)
            .filter(|(_, stat)| stat.as_ref().is_some_and(may_need_birth))
            .filter_map(|(path, _)| names.birth(path).map(|birth| (path, birth)))
            .map(|(path, birth)| async move {
                let birth = client.check_stat(&birth).await?;
                Ok((path.clone(), birth.map(|birth| birth.czxid)))
            });
        let (marks, births) = try_join(try_join_all(marks), try_join_all(births)).await?;
        let mut births: HashMap<_, _> = births.into_iter().collect();
        let mut marks = marks.into_iter();
        for (path, stat) in paths.into_iter().zip(stats) {
            let found = match stat {
                Some(stat) if may_be_mark(&stat) => marks.next().flatten(),
                Some(stat) => Some(Found {
                    data: crate::names::Data::Value(Bytes::new()),
                    stat,
                    birth: None,
                }),
                None => None,
            };
            let birth = births.remove(&path).flatten();
            let found = found.map(|found| Found { birth, ..found });
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
            size += steps.iter().map(|step| step.size(self.above())).sum::<usize>();
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

    /// Deletes what a prefix covers and says how many keys there were.
    pub(crate) async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        crate::prune::prune(self, prefix).await
    }
}

/// Whether a transaction may rely on a node's birth, create it or delete it.
fn may_need_birth(stat: &Stat) -> bool {
    may_be_mark(stat) || may_have_birth(stat)
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
