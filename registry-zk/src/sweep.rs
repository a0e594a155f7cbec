//! Removes parents that nobody put and that hold nothing any more.
//!
//! A delete takes the parents along that it empties. What is left over is what a session's end emptied, and what a crash
//! left half made. One handle of a namespace sweeps for all: the one that holds the sweeper's key. It watches the
//! namespace, looks at the parents of what goes, and walks the whole when something was made since, for at most a
//! hundredth of its time. The others wait for that key to go.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use registry_api::SessionState;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, sleep_until};
use zookeeper_client::{AddWatchMode, Client, Error as ClientError, EventType, WatchedEvent};

use crate::names::parent;
use crate::store::{Backoff, Conn, Store};
use crate::walk::Walk;

/// How long after a key has gone its parents are looked at: often the next is put there by then.
const SETTLE: Duration = Duration::from_secs(1);
/// How much longer than a walk the time between two is, and how long at least.
const WALK_SHARE: u32 = 100;
const MIN_PAUSE: Duration = Duration::from_secs(3);
/// More parents than this are found by a walk.
const MAX_EMPTIED: usize = 10_000;

/// Sweeps, or waits to, until the handle is closed.
pub(crate) async fn run(store: Arc<Store>, mut states: Receiver<SessionState>) {
    let sweep = async {
        let mut backoff = Backoff::default();
        while let Ok(conn) = store.connected().await {
            let served = tokio::select! {
                served = serve(&store, &conn) => served,
                () = store.replaced(&conn) => Ok(()),
            };
            drop(conn);
            match served {
                Ok(()) => backoff = Backoff::default(),
                Err(failure) => tracing::debug!(%failure, "the sweep broke off"),
            }
            backoff.wait().await;
        }
    };
    tokio::select! {
        () = sweep => {}
        // An error says that the handle is gone.
        _ = states.wait_for(|state| matches!(state, SessionState::Closed(_))) => {}
    }
}

/// Takes the sweeper's key when it is free. Ends when the connection is lost.
async fn serve(store: &Arc<Store>, conn: &Arc<Conn>) -> Result<(), ClientError> {
    let (client, path) = (&conn.client, store.names.sweeper());
    let mut events = client.watch(&path, AddWatchMode::PersistentRecursive).await?;
    loop {
        let taken = match client.create(&path, &[], &store.ephemeral()).await {
            Ok(_) => true,
            // Perhaps before the connection was lost.
            Err(ClientError::NodeExists) => client
                .check_stat(&path)
                .await?
                .is_some_and(|stat| stat.ephemeral_owner == client.session_id().0),
            Err(failure) => return Err(failure),
        };
        if taken {
            return sweep(store, conn).await;
        }
        loop {
            match events.changed().await.event_type {
                EventType::NodeDeleted => break,
                EventType::Session => return Ok(()),
                _ => {}
            }
        }
        // Not all at once.
        let spread = client.session_id().0.cast_unsigned() % 500;
        sleep(Duration::from_millis(spread)).await;
    }
}

/// What the sweep has heard of since it last looked.
struct Heard {
    emptied: BTreeSet<String>,
    look_at: Option<Instant>,
    made: bool,
    next_walk: Instant,
}

impl Heard {
    /// `false` when the connection is lost.
    fn hear(&mut self, event: WatchedEvent) -> bool {
        match event.event_type {
            EventType::NodeDeleted if self.emptied.len() < MAX_EMPTIED => {
                self.emptied.insert(parent(&event.path).to_owned());
                self.look_at.get_or_insert_with(|| Instant::now() + SETTLE);
            }
            EventType::NodeCreated | EventType::NodeDeleted => self.made = true,
            EventType::Session => return false,
            EventType::NodeDataChanged | EventType::NodeChildrenChanged => {}
        }
        true
    }

    /// Parents that are to be looked at again.
    fn put_off(&mut self, parents: BTreeSet<String>) {
        if self.emptied.len() + parents.len() > MAX_EMPTIED {
            self.made = true;
        } else if !parents.is_empty() {
            self.look_at.get_or_insert_with(|| Instant::now() + SETTLE);
            self.emptied.extend(parents);
        }
    }

    fn due(&self) -> Option<Instant> {
        let walk = self.made.then_some(self.next_walk);
        [self.look_at, walk].into_iter().flatten().min()
    }
}

async fn sweep(store: &Arc<Store>, conn: &Arc<Conn>) -> Result<(), ClientError> {
    let client = &conn.client;
    let recursive = AddWatchMode::PersistentRecursive;
    let side = store.names.side();
    let mut keys = client.watch(store.names.root(), recursive).await?;
    let mut recipes = client.watch(&side, recursive).await?;
    let mut heard = Heard {
        emptied: BTreeSet::new(),
        look_at: None,
        made: true,
        next_walk: Instant::now() + SETTLE,
    };
    loop {
        let due = heard.due();
        let wait = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = keys.changed() => if !heard.hear(event) { return Ok(()) },
            event = recipes.changed() => if !heard.hear(event) { return Ok(()) },
            () = wait => {
                if heard.look_at.is_some_and(|at| at <= Instant::now()) {
                    heard.look_at = None;
                    let emptied = std::mem::take(&mut heard.emptied);
                    heard.put_off(tidy(store, conn, emptied).await?);
                }
                if heard.made && heard.next_walk <= Instant::now() {
                    let began = Instant::now();
                    heard.made = false;
                    let mut empty = BTreeSet::new();
                    for tree in [store.names.root(), &side] {
                        empty.extend(empty_parents(store, client, tree).await?);
                    }
                    heard.put_off(tidy(store, conn, empty).await?);
                    heard.next_walk = Instant::now() + (began.elapsed() * WALK_SHARE).max(MIN_PAUSE);
                }
            }
        }
    }
}

/// The parents in a tree that nobody put and that hold nothing.
async fn empty_parents(store: &Store, client: &Client, tree: &str) -> Result<Vec<String>, ClientError> {
    let (nodes, _) = Walk::below(&store.names, client, tree).all().await?;
    let empty = nodes
        .into_iter()
        .filter(|(_, found)| found.is_mark() && found.stat.num_children == 0);
    Ok(empty.map(|(path, _)| path).collect())
}

/// Returns what is to be looked at again.
async fn tidy(store: &Store, conn: &Arc<Conn>, paths: BTreeSet<String>) -> Result<BTreeSet<String>, ClientError> {
    let mut again = BTreeSet::new();
    // The deepest first: the next may be what it empties.
    for path in paths.iter().rev() {
        let left = store.tidy(conn, store.deadline(), path).await?;
        again.extend(left.map(str::to_owned));
    }
    Ok(again)
}
