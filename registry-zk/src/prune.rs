//! Deleting a key with all that is below it.

use registry_api::{Depth, Error, Prefix, Result};
use tokio::time::Instant;

use crate::commit::{Sent, guards_of};
use crate::error::{self, Trouble, Verdict};
use crate::names::parent;
use crate::plan::Step;
use crate::store::{Backoff, Conn, Store};
use crate::walk::{Values, Walk};

/// How many nodes, and how many bytes, go in one multi.
const MAX_STEPS: usize = 256;
const MAX_BYTES: usize = 256 << 10;

/// Deletes what a prefix covers, the deepest first, and says how many keys there were.
pub(crate) async fn prune(store: &Store, prefix: &Prefix) -> Result<u64> {
    let deadline = store.deadline();
    let mut backoff = Backoff::default();
    let mut pruning = Pruning {
        store,
        deadline,
        deleted: 0,
    };
    loop {
        let conn = store.conn(deadline).await?;
        match pruning.round(&conn, prefix).await {
            Ok(true) => return Ok(pruning.deleted),
            Ok(false) => {}
            Err(Sent::Failed(failure)) => return Err(failure),
            Err(Sent::NotApplied(failure)) => tracing::debug!(%failure, "pruning, trying again"),
            Err(Sent::Done(..) | Sent::Stale(..)) => {}
        }
        drop(conn);
        if !backoff.wait_until(deadline).await {
            return Err(match pruning.deleted {
                0 => error::unavailable(Trouble::Contended),
                _ => error::unknown("deleting a prefix", Trouble::Contended),
            });
        }
    }
}

struct Pruning<'s> {
    store: &'s Store,
    deadline: Instant,
    deleted: u64,
}

impl Pruning<'_> {
    /// Deletes what is there; `false` if something changed meanwhile.
    async fn round(&mut self, conn: &std::sync::Arc<Conn>, prefix: &Prefix) -> Result<bool, Sent> {
        let store = self.store;
        let walk = async {
            let fresh = store.fresh(conn);
            let walk = Walk::new(&store.names, &conn.client, prefix, Depth::Subtree, Values::Omitted).with_foreign();
            let (nodes, _) = walk.all().await?;
            fresh.await?;
            Ok(nodes)
        };
        let mut nodes = match store.ask(conn, self.deadline, walk).await {
            Some(Ok(nodes)) => nodes,
            Some(Err(failure)) => return Err(not_sent(failure)),
            None => return Err(Sent::Failed(error::unavailable(store.silent()))),
        };
        // What is below a key sorts after it.
        nodes.sort_by(|(a, _), (b, _)| b.cmp(a));
        let mut left = nodes.as_slice();
        while !left.is_empty() {
            let mut bytes = 0;
            let fits = |(path, _): &&(String, _)| {
                bytes += path.len() + 80;
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
            match store.send(conn, self.deadline, &steps, None).await {
                Sent::Done(..) => self.deleted += values.count() as u64,
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

/// A read that failed.
fn not_sent(failure: zookeeper_client::Error) -> Sent {
    match error::verdict(&failure) {
        Verdict::SessionOver | Verdict::NotApplied | Verdict::Unknown => Sent::NotApplied(failure),
        _ => Sent::Failed(match error::read(failure) {
            Error::Unavailable { source, .. } => error::unavailable(source),
            other => other,
        }),
    }
}
