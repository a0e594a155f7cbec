//! Deleting a key with all that is below it.

use std::collections::HashMap;

use futures_util::future::try_join_all;
use registry_api::{BoxError, Depth, Error, Prefix, Result};
use tokio::time::Instant;
use zookeeper_client::{Client, Error as ClientError};

use crate::commit::guards_of;
use crate::error::{self, Trouble, Verdict};
use crate::names::{may_have_birth, parent};
use crate::plan::Step;
use crate::send::Sent;
use crate::store::{Backoff, Conn, Store};
use crate::walk::{Found, PIPELINE, Values, Walk};

/// How many nodes, and how many bytes, go in one multi.
const MAX_STEPS: usize = 256;
const MAX_BYTES: usize = 256 << 10;

const OPERATION: &str = "deleting a prefix";

/// Deletes what a prefix covers, the deepest first, and returns how many keys there were.
///
/// # Errors
/// [`Error::OutcomeUnknown`], whatever the cause, once something was deleted.
pub(crate) async fn prune(store: &Store, prefix: &Prefix) -> Result<u64> {
    let mut pruning = Pruning {
        store,
        deadline: store.deadline(),
        deleted: 0,
        changed: false,
    };
    match pruning.run(prefix).await {
        Ok(()) => Ok(pruning.deleted),
        Err(failure @ Error::OutcomeUnknown { .. }) => Err(failure),
        Err(failure) if pruning.changed => Err(error::unknown(OPERATION, failure)),
        Err(failure) => Err(failure),
    }
}

struct Pruning<'s> {
    store: &'s Store,
    deadline: Instant,
    /// How many keys were deleted.
    deleted: u64,
    /// Whether any request was carried out.
    changed: bool,
}

impl Pruning<'_> {
    async fn run(&mut self, prefix: &Prefix) -> Result<()> {
        let mut backoff = Backoff::default();
        let mut failure: BoxError;
        loop {
            let conn = self.store.conn(self.deadline).await?;
            match self.round(&conn, prefix).await {
                Ok(true) => return Ok(()),
                Ok(false) | Err(Sent::Done(..) | Sent::Stale(..)) => failure = Trouble::Contended.into(),
                Err(Sent::Failed(failure)) => return Err(failure),
                Err(Sent::NotApplied(error)) => failure = error.into(),
            }
            drop(conn);
            tracing::debug!(failure, "pruning, trying again");
            if !backoff.wait_until(self.deadline).await {
                return Err(error::unavailable(failure));
            }
        }
    }

    /// Deletes what is there; `false` if something changed meanwhile.
    async fn round(&mut self, conn: &std::sync::Arc<Conn>, prefix: &Prefix) -> Result<bool, Sent> {
        let store = self.store;
        let walk = async {
            let fresh = store.fresh(conn);
            let walk = Walk::new(&store.names, &conn.client, prefix, Depth::Subtree, Values::Omitted).with_foreign();
            let (nodes, _) = walk.all().await?;
            fresh.await?;
            let births = births(store, &conn.client, &nodes).await?;
            Ok((nodes, births))
        };
        let (mut nodes, births) = match store.ask(conn, self.deadline, walk).await {
            Some(Ok(read)) => read,
            Some(Err(failure)) => return Err(not_sent(failure)),
            None => return Err(Sent::Failed(error::unavailable(store.silent()))),
        };
        // What is below a key sorts after it.
        nodes.sort_by(|(a, _), (b, _)| b.cmp(a));
        let mut left = nodes.as_slice();
        while !left.is_empty() {
            let mut bytes = 0;
            let fits = |(path, _): &&(String, _)| {
                // Each node goes with its birth znode and its guard.
                let birth = births.get(path).map_or(0, String::len);
                bytes += path.len() + birth + store.names.guards().len() + 3 * (store.above() + 32);
                bytes < MAX_BYTES
            };
            let most = left.iter().take(MAX_STEPS).take_while(fits).count().max(1);
            let (batch, rest) = left.split_at(most);
            let values = batch
                .iter()
                .filter(|(path, found)| !found.is_mark() && store.names.key(path).is_some());
            let mut steps = guards_of(&store.names, values.clone().map(|(path, _)| path.as_str()));
            steps.extend(batch.iter().map(|(path, _)| Step::Delete {
                path: path.clone(),
                version: None,
            }));
            steps.extend(
                batch
                    .iter()
                    .filter_map(|(path, _)| births.get(path))
                    .map(|birth| Step::Delete {
                        path: birth.clone(),
                        version: None,
                    }),
            );
            match store.send(conn, self.deadline, &steps, None).await {
                Sent::Done(..) => {
                    self.changed = true;
                    self.deleted += values.count() as u64;
                }
                Sent::Stale(..) => return Ok(false),
                failed => return Err(failed),
            }
            left = rest;
        }
        if let Some(key) = prefix.key() {
            let path = store.names.path(&key);
            let tidied = store.tidy(conn, self.deadline, parent(&path)).await;
            if let Err(failure) = tidied {
                tracing::debug!(%failure, "emptied parents are left to the sweep");
            }
        }
        Ok(true)
    }
}

/// The birth znodes of these nodes, those that are there, by the node's path.
async fn births(
    store: &Store,
    client: &Client,
    nodes: &[(String, Found)],
) -> Result<HashMap<String, String>, ClientError> {
    let may_have = |(_, found): &&(String, Found)| !found.is_mark() && may_have_birth(&found.stat);
    let birth = |(path, _): &(String, Found)| Some((path.clone(), store.names.birth(path)?));
    let possible: Vec<_> = nodes.iter().filter(may_have).filter_map(birth).collect();
    let mut births = HashMap::new();
    for chunk in possible.chunks(PIPELINE) {
        let found = try_join_all(chunk.iter().map(|(_, birth)| client.check_stat(birth))).await?;
        let there = chunk.iter().zip(found).filter(|(_, found)| found.is_some());
        births.extend(there.map(|(pair, _)| pair.clone()));
    }
    Ok(births)
}

/// A read that failed.
fn not_sent(failure: ClientError) -> Sent {
    match error::verdict(&failure) {
        Verdict::SessionOver | Verdict::NotApplied | Verdict::Unknown => Sent::NotApplied(failure),
        _ => Sent::Failed(match error::read(failure) {
            Error::Unavailable { source, .. } => error::unavailable(source),
            other => other,
        }),
    }
}
