//! Removes parents that nobody put and that hold nothing any more.
//!
//! A delete takes the parents along that it empties. What is left over is what a session's end emptied, and what a crash
//! left half made. One handle of a namespace sweeps for all: the one that holds the sweeper's key. It watches what lies
//! beside the keys: a session's sign goes when its keys do, and a guard is written when a key is made or deleted. A watch
//! of the keys themselves would be sent each put. It looks at the parents of the session's keys, as far as it knows them,
//! and walks the whole namespace when anything was made, deleted or ended since, for at most a hundredth of its time. The
//! others wait for the sweeper's key to go.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use registry_api::{SessionId, SessionState};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, sleep_until};
use zookeeper_client::{AddWatchMode, Client, Error as ClientError, EventType};

use crate::names::{Beside, Names, may_have_birth, owner, parent};
use crate::store::{Backoff, Conn, Store};
use crate::walk::Walk;

/// How long after a session, or a recipe's key, has gone the parents are looked at: often the next is put there by then.
const SETTLE: Duration = Duration::from_secs(1);
/// How much longer than a walk the time between two is, and how long at least.
const WALK_SHARE: u32 = 100;
const MIN_PAUSE: Duration = Duration::from_secs(3);
/// More parents than this are found by a walk.
const MAX_PARENTS: usize = 10_000;

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

type Parents = HashMap<SessionId, BTreeSet<String>>;

/// What the sweep has heard of since it last looked.
struct Heard {
    emptied: BTreeSet<String>,
    look_at: Option<Instant>,
    /// Something was made, deleted or ended.
    changed: bool,
    next_walk: Instant,
    /// The parents of each session's keys that nobody put, as of the last walk.
    parents: Parents,
}

impl Heard {
    fn new() -> Self {
        Self {
            emptied: BTreeSet::new(),
            look_at: None,
            changed: true,
            next_walk: Instant::now() + SETTLE,
            parents: Parents::new(),
        }
    }

    /// `false` when the connection is lost.
    fn hear(&mut self, names: &Names, event: EventType, path: &str) -> bool {
        match (event, names.beside(path)) {
            (EventType::Session, _) => return false,
            (EventType::NodeDeleted, Beside::Sign(session)) => {
                self.changed = true;
                let parents = self.parents.remove(&session);
                self.put_off(parents.unwrap_or_default());
            }
            (EventType::NodeDeleted, Beside::Other) => self.put_off(BTreeSet::from([parent(path).to_owned()])),
            (EventType::NodeCreated, Beside::Other) | (EventType::NodeDataChanged, Beside::Guard) => {
                self.changed = true;
            }
            _ => {}
        }
        true
    }

    /// Parents that are to be looked at in a while.
    fn put_off(&mut self, parents: BTreeSet<String>) {
        if self.emptied.len() + parents.len() > MAX_PARENTS {
            self.changed = true;
        } else if !parents.is_empty() {
            self.look_at.get_or_insert_with(|| Instant::now() + SETTLE);
            self.emptied.extend(parents);
        }
    }

    fn due(&self) -> Option<Instant> {
        let walk = self.changed.then_some(self.next_walk);
        [self.look_at, walk].into_iter().flatten().min()
    }
}

async fn sweep(store: &Arc<Store>, conn: &Arc<Conn>) -> Result<(), ClientError> {
    let client = &conn.client;
    let mut beside = client
        .watch(&store.names.side(), AddWatchMode::PersistentRecursive)
        .await?;
    let mut heard = Heard::new();
    loop {
        let due = heard.due();
        let wait = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = beside.changed() => {
                if !heard.hear(&store.names, event.event_type, &event.path) {
                    return Ok(());
                }
            }
            () = wait => {
                if heard.look_at.is_some_and(|at| at <= Instant::now()) {
                    heard.look_at = None;
                    let emptied = std::mem::take(&mut heard.emptied);
                    heard.put_off(tidy(store, conn, emptied).await?);
                }
                if heard.changed && heard.next_walk <= Instant::now() {
                    let began = Instant::now();
                    heard.changed = false;
                    let walked = walk(store, client).await?;
                    heard.parents = walked.parents;
                    heard.put_off(tidy(store, conn, walked.empty).await?);
                    for birth in walked.births {
                        store.tidy_birth(conn, store.deadline(), &birth).await?;
                    }
                    heard.next_walk = Instant::now() + (began.elapsed() * WALK_SHARE).max(MIN_PAUSE);
                }
            }
        }
    }
}

/// What a walk over both trees has found.
struct Walked {
    /// Placeholders that have no children.
    empty: BTreeSet<String>,
    /// Those that have a session's keys.
    parents: Parents,
    /// Birth znodes that belong to no key.
    births: Vec<String>,
}

async fn walk(store: &Store, client: &Client) -> Result<Walked, ClientError> {
    let mut empty = BTreeSet::new();
    let mut parents = Parents::new();
    let mut births = Vec::new();
    // The keys that may have a birth znode.
    let mut born = HashSet::new();
    let mut known = 0;
    for tree in [store.names.root(), &store.names.side()] {
        let (nodes, _) = Walk::below(&store.names, client, tree).all().await?;
        // What is below a node comes after it.
        let mut marks = BTreeSet::new();
        for (path, found) in nodes {
            if let Some(session) = owner(&found.stat) {
                let above = parent(&path);
                if known < MAX_PARENTS && marks.contains(above) {
                    known += usize::from(parents.entry(session).or_default().insert(above.to_owned()));
                }
            } else if found.is_mark() && found.stat.num_children == 0 {
                empty.insert(path);
            } else if found.is_mark() {
                marks.insert(path);
            } else if let Some(key) = store.names.born(&path) {
                if !born.contains(&key) {
                    births.push(path);
                }
            } else if may_have_birth(&found.stat) {
                born.insert(path);
            }
        }
    }
    Ok(Walked { empty, parents, births })
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

#[cfg(test)]
mod tests {
    use registry_api::Namespace;

    use super::*;

    const SESSION: SessionId = SessionId(7);

    fn quiet() -> Heard {
        Heard {
            changed: false,
            ..Heard::new()
        }
    }

    #[test]
    fn the_parents_of_an_ended_sessions_keys_are_looked_at() {
        let names = Names::new(Namespace::default());
        let above = BTreeSet::from(["/registry/a".to_owned()]);
        let mut heard = quiet();
        heard.parents.insert(SESSION, above.clone());
        assert!(heard.hear(&names, EventType::NodeDeleted, &names.sign(SESSION)));
        assert_eq!(heard.emptied, above);
        // There may be others, which no walk has seen.
        assert!(heard.look_at.is_some() && heard.changed);
    }

    #[test]
    fn what_empties_nothing_is_no_cause_to_look() {
        let names = Names::new(Namespace::default());
        let mut heard = quiet();
        for (event, path) in [
            (EventType::NodeCreated, names.sign(SESSION)),
            (EventType::NodeDataChanged, names.clock()),
            (EventType::NodeDataChanged, "/registry~/lock/1/a/contender".into()),
        ] {
            assert!(heard.hear(&names, event, &path));
        }
        assert_eq!(heard.due(), None);
        assert!(heard.hear(&names, EventType::NodeDataChanged, &names.guard(1)));
        assert_eq!(heard.due(), Some(heard.next_walk));
    }

    #[test]
    fn more_parents_than_are_remembered_are_found_by_a_walk() {
        let mut heard = quiet();
        heard.put_off((0..=MAX_PARENTS).map(|at| format!("/registry/{at}")).collect());
        assert!(heard.emptied.is_empty() && heard.changed);
    }
}
