//! Sends a transaction until it is applied or refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use etcd_client::Txn as Request;
use etcd_client::proto::PbTxnResponse;
use registry_api::{Committed, Key, Operation, Result, SessionId, Txn};
use tokio::time::Instant;

use crate::demand::{Probe, State};
use crate::error::{self, Trouble};
use crate::link::{Backoff, Link, Member};
use crate::names::{Names, revision};
use crate::plan::{Judgement, MAX_OPS, Plan, committed_at};

/// Applies a transaction.
///
/// One request, where the hopes of [`Plan`] are met. A key to be taken over is deleted by a request of its own, under
/// the same conditions, since etcd refuses two writes of one key in one transaction.
pub(crate) async fn commit(
    link: &Link,
    names: &Names,
    deadline: Instant,
    txn: &Txn,
    session: Option<SessionId>,
) -> Result<Committed> {
    if let ([], [Operation::Delete { key }]) = (&txn.conditions[..], &txn.operations[..]) {
        return delete(link, names, deadline, key).await;
    }
    let mut commit = Commit {
        link,
        deadline,
        session,
        plan: Plan::new(names, txn, session),
        state: State::default(),
    };
    let committed = commit.run().await;
    match committed {
        // The part that deletes what was to be taken over has happened.
        Err(error) if commit.plan.has_evicted() => Err(error::unknown("taking a key over", error)),
        committed => committed,
    }
}

/// Deletes one key, whatever it is: nothing is to be compared, and etcd does the plain request in less time.
async fn delete(link: &Link, names: &Names, deadline: Instant, key: &Key) -> Result<Committed> {
    let delete = |member: Arc<Member>| {
        let name = names.key(key);
        async move { member.kv().delete(name, None).await }
    };
    let response = link.write(deadline, "the delete", None, delete).await?.0;
    Ok(Committed {
        revision: revision(response.header.map_or(0, |header| header.revision)),
        changed: vec![response.deleted > 0],
    })
}

struct Commit<'t> {
    link: &'t Link,
    deadline: Instant,
    session: Option<SessionId>,
    plan: Plan<'t>,
    /// The keys as they were last seen.
    state: State,
}

impl Commit<'_> {
    async fn run(&mut self) -> Result<Committed> {
        let mut backoff = Backoff::default();
        let mut rounds = 0;
        loop {
            let request = match self.plan.request() {
                Some(request) => request,
                None => {
                    self.look(None).await?;
                    match self.plan.judge(&self.state)? {
                        Judgement::Clear => self.plan.guarded_request(&self.state),
                        Judgement::Evict(keys) => {
                            self.evict(keys).await?;
                            continue;
                        }
                    }
                }
            };
            let response = self.send(request).await?;
            if response.succeeded {
                return Ok(Committed {
                    revision: committed_at(&response),
                    changed: self.plan.changed(&response),
                });
            }
            self.look(Some(&response)).await?;
            if let Judgement::Evict(keys) = self.plan.judge(&self.state)? {
                self.evict(keys).await?;
            }
            // What was learnt about the keys is mostly enough for the next request; only a race takes more.
            rounds += 1;
            if rounds > 1 && !backoff.wait_until(self.deadline).await {
                return Err(error::unavailable(Trouble::Contended));
            }
        }
    }

    /// Deletes keys that are to be made anew, if they are still as they were seen.
    async fn evict(&mut self, keys: BTreeMap<Key, i64>) -> Result<()> {
        let response = self.send(self.plan.eviction(&keys)).await?;
        if response.succeeded {
            self.plan.evicted(keys);
            return Ok(());
        }
        self.look(Some(&response)).await?;
        self.plan.judge(&self.state).map(drop)
    }

    /// Reads the keys concerned, at one revision: that of a refusal, or the present one.
    async fn look(&mut self, refusal: Option<&PbTxnResponse>) -> Result<()> {
        let probes: Vec<Probe> = self.plan.probes().into_iter().collect();
        self.state = State::default();
        self.state.revision = refusal.map_or(0, |refusal| committed_at(refusal).0.cast_signed());
        for some in probes.chunks(MAX_OPS) {
            let at = self.state.revision;
            let read = |member: Arc<Member>| {
                let gets: Vec<_> = some.iter().map(|probe| probe.get(at)).collect();
                async move { member.kv().txn(Request::new().and_then(gets)).await }
            };
            let response = self.link.read(self.deadline, read).await?;
            self.state.add(some.iter(), &response.0);
        }
        Ok(())
    }

    async fn send(&self, request: Request) -> Result<PbTxnResponse> {
        let send = |member: Arc<Member>| {
            let request = request.clone();
            async move { member.kv().txn(request).await }
        };
        let response = self
            .link
            .write(self.deadline, "the transaction", self.session, send)
            .await?;
        Ok(response.0)
    }
}
