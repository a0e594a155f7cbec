//! Another store at the same address: restored from a backup, once and again, or founded after the data was lost.

// A test may fail.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use harness::options;
use registry_api::{
    Error, Event, Key, Mirror, Options, Prefix, Read, Registry, SessionId, SessionState, SessionTtl, Watch, WatchItem,
    WatchRequest, WatchScope,
};
use registry_raft::{Member, RaftConfig};
use registry_tests::cluster::eventually;
use registry_tests::within;

const PATIENCE: Duration = Duration::from_secs(60);

fn key(text: &str) -> Key {
    Key::parse(text).unwrap()
}

/// One address at which one store comes after the other.
struct Place {
    dir: tempfile::TempDir,
    port: u16,
    member: Option<Member>,
}

impl Place {
    async fn start() -> Self {
        let mut place = Self {
            dir: tempfile::tempdir().unwrap(),
            port: registry_tests::process::free_port(),
            member: None,
        };
        place.serve("first").await;
        place
    }

    fn config(&self, name: &str) -> RaftConfig {
        let mut config = RaftConfig::default();
        config.data_dir = Some(self.dir.path().join(name));
        config.listen = Some(format!("127.0.0.1:{}", self.port));
        config
    }

    async fn serve(&mut self, name: &str) {
        self.member = Some(Member::start(&self.config(name)).await.unwrap());
    }

    /// Ends the store that is served, and serves that of another directory.
    async fn replace(&mut self, name: &str, backup: Option<&Path>) {
        self.member.take().unwrap().stop().await.unwrap();
        if let Some(file) = backup {
            registry_raft::restore(file, &self.config(name)).await.unwrap();
        }
        self.serve(name).await;
    }

    async fn backup(&self) -> PathBuf {
        let file = self.dir.path().join("backup");
        self.member.as_ref().unwrap().backup(&file).await.unwrap();
        file
    }

    async fn connect(&self) -> Arc<dyn Registry> {
        let remote = RaftConfig::remote([format!("127.0.0.1:{}", self.port)]);
        let options = Options {
            session_ttl: SessionTtl::new(Duration::from_secs(30)).unwrap(),
            ..options()
        };
        registry_raft::connect(&remote, &options).await.unwrap()
    }
}

/// What the reader of a watch holds.
async fn follow(mut watch: Watch, mut held: impl FnMut(&BTreeMap<String, String>) -> bool) -> (Watch, Vec<Event>) {
    let (mut entries, mut told) = (BTreeMap::new(), Vec::new());
    within(PATIENCE, async {
        loop {
            match watch.next().await.unwrap().unwrap() {
                WatchItem::Changes(events) => {
                    for event in &events {
                        let name = event.key().as_str().to_owned();
                        match event {
                            Event::Deleted { .. } => drop(entries.remove(&name)),
                            _ => drop(entries.insert(name, String::from_utf8_lossy(&event.entry().value).into_owned())),
                        }
                    }
                    told.extend(events);
                }
                WatchItem::Reset => panic!("it was not asked for"),
                WatchItem::Synced(_) if held(&entries) => return,
                WatchItem::Synced(_) => {}
            }
        }
    })
    .await;
    (watch, told)
}

fn values(mirror: &Mirror) -> Vec<(String, String)> {
    let entries = mirror.entries().into_iter();
    entries
        .map(|entry| {
            (
                entry.key.to_string(),
                String::from_utf8_lossy(&entry.value).into_owned(),
            )
        })
        .collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).into(), (*value).into()))
        .collect()
}

async fn expired(registry: &Arc<dyn Registry>, session: SessionId) {
    let mut states = registry.session().states();
    let expired =
        states.wait_for(|state| matches!(state, SessionState::Expired(id) if *id == session) || state.id() != session);
    within(PATIENCE, async { drop(expired.await.unwrap()) }).await;
}

/// What kubernetes issue 107457 found in a client of etcd: after a restore a cache kept what was put after the backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_holds_what_a_restored_store_holds() {
    let mut place = Place::start().await;
    let registry = place.connect().await;
    for (name, value) in [
        ("/w/changed", "one"),
        ("/w/deleted", "1"),
        ("/w/same", "1"),
        ("/w/recreated", "1"),
    ] {
        registry.put(&key(name), value).await.unwrap();
    }
    let mirror = registry
        .mirror(Prefix::parse("/w").unwrap(), WatchScope::Subtree)
        .await
        .unwrap();
    let watch = registry
        .watch(WatchRequest::new(key("/w"), WatchScope::Subtree))
        .await
        .unwrap();
    let (watch, _) = follow(watch, |held| held.len() == 4).await;
    let file = place.backup().await;
    registry.put(&key("/w/changed"), "two").await.unwrap();
    registry.delete(&key("/w/deleted")).await.unwrap();
    registry.delete(&key("/w/recreated")).await.unwrap();
    registry.put(&key("/w/recreated"), "2").await.unwrap();
    registry.put(&key("/w/later"), "1").await.unwrap();
    eventually(PATIENCE, || async { mirror.get(&key("/w/later")).is_some() }).await;

    place.replace("second", Some(&file)).await;
    let restored = pairs(&[
        ("/w/changed", "one"),
        ("/w/deleted", "1"),
        ("/w/recreated", "1"),
        ("/w/same", "1"),
    ]);
    eventually(PATIENCE, || async { values(&mirror) == restored }).await;
    let read = registry.get(&key("/w/changed"), Read::Linearizable).await.unwrap();
    assert_eq!(read.unwrap().value, "one");
    // A watch that had seen all of it is told each difference, and goes on.
    let (watch, told) = follow(watch, |held| held.get("/w/changed").is_some_and(|value| value == "one")).await;
    let same = told.iter().filter(|event| event.key().as_str() == "/w/same");
    assert_eq!(same.count(), 0, "{told:?}");
    registry.put(&key("/w/changed"), "three").await.unwrap();
    eventually(PATIENCE, || async {
        mirror
            .get(&key("/w/changed"))
            .is_some_and(|entry| entry.value == "three")
    })
    .await;
    drop(watch);
    place.member.take().unwrap().stop().await.unwrap();
}

/// The second group from a backup gives out nothing that the first has, and what dealt with the first notices.
#[tokio::test(flavor = "multi_thread")]
async fn two_restores_of_one_backup_share_no_number() {
    let mut place = Place::start().await;
    let registry = place.connect().await;
    registry.put(&key("/a"), "1").await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    held.release().await.unwrap();
    let file = place.backup().await;
    registry.close().await.unwrap();

    place.replace("second", Some(&file)).await;
    let first = place.connect().await;
    let session = first.session().live().unwrap();
    let mut held = first.lock(&key("/lock")).acquire().await.unwrap();
    for _ in 0..3 {
        held.release().await.unwrap();
        held = first.lock(&key("/lock")).acquire().await.unwrap();
    }
    let newest = first.put(&key("/a"), "2").await.unwrap();

    place.replace("third", Some(&file)).await;
    let second = place.connect().await;
    assert_ne!(second.session().live().unwrap(), session);
    let other = second.lock(&key("/lock")).acquire().await.unwrap();
    assert!(
        other.token() > held.token() && other.token().get().cast_unsigned() > newest.0,
        "{} was given out",
        other.token()
    );
    assert!(second.put(&key("/b"), "1").await.unwrap() > newest);
    // The holder of the first group's lock learns of it, though its session had time to go.
    within(PATIENCE, held.lost()).await;
    expired(&first, session).await;
    let released = held.release().await;
    assert!(matches!(released, Err(Error::HoldLost { .. })), "{released:?}");
    assert!(!other.is_lost());
    place.member.take().unwrap().stop().await.unwrap();
}

/// The data is lost, and the same address serves an empty store: what was there is gone, and nothing is taken for anything
/// of before.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_store_at_the_same_address_is_noticed() {
    let mut place = Place::start().await;
    let registry = place.connect().await;
    let session = registry.session().live().unwrap();
    for number in 0..20 {
        registry.put(&key(&format!("/w/{number}")), "1").await.unwrap();
    }
    registry.put_ephemeral(&key("/w/own"), "1").await.unwrap();
    let watch = registry
        .watch(WatchRequest::new(key("/w"), WatchScope::Subtree))
        .await
        .unwrap();
    let (watch, _) = follow(watch, |held| held.len() == 21).await;
    let mirror = registry
        .mirror(Prefix::parse("/w").unwrap(), WatchScope::Subtree)
        .await
        .unwrap();

    place.replace("empty", None).await;
    expired(&registry, session).await;
    let (watch, told) = follow(watch, |_| true).await;
    let deleted = told.iter().filter(|event| matches!(event, Event::Deleted { .. }));
    assert_eq!((deleted.count(), told.len()), (21, 21), "{told:?}");
    // Revisions begin anew: neither a read nor the watch waits for those that were seen.
    let revision = registry.put(&key("/w/new"), "1").await.unwrap();
    assert!(revision.0 < 20, "{revision}");
    // Nor does one who waits for a copy take it for a newer one.
    eventually(PATIENCE, || async { mirror.revision() == revision }).await;
    mirror.caught_up(revision).await.unwrap();
    assert_eq!(mirror.entries().len(), 1);
    let read = registry.get(&key("/w/new"), Read::Stale).await.unwrap();
    assert_eq!(read.unwrap().mod_revision, revision);
    let mut watch = watch;
    let told = within(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert!(
        matches!(&told, WatchItem::Changes(events) if matches!(&events[..], [Event::Created(_)])),
        "{told:?}"
    );
    assert_ne!(registry.session().live().unwrap(), session);
    // Other handles may have held locks: this one raises the epoch of fencing tokens before it enters a queue.
    assert_eq!(registry.rollbacks(), 1);
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    assert!(held.token().get() >> 32 > 58_000_000, "{}", held.token());
    registry.close().await.unwrap();
    place.member.take().unwrap().stop().await.unwrap();
}
