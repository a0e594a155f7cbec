//! What a handle does when a member, a connection or the store itself is not what it was before.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, Txn, TxnOp};
use harness::{Servers, connect, connect_with_ttl, until};
use registry_api::{
    Error, Event, List, Options, Prefix, Read, Registry, SessionState, SessionTtl, Watch, WatchItem, WatchRequest,
    WatchScope,
};
use registry_etcd::{Endpoints, EtcdConfig};
use registry_tests::watch::Picture;
use registry_tests::{Wire, key, within};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(30);

async fn connect_with_timeout(endpoint: String, request_timeout: Duration) -> Arc<dyn Registry> {
    let config = EtcdConfig::new(Endpoints::new([endpoint]).unwrap());
    let options = Options {
        session_ttl: SessionTtl::new(Duration::from_secs(60)).unwrap(),
        request_timeout,
        ..Options::default()
    };
    registry_etcd::connect(&config, &options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_leader_renews_nothing() {
    answered_by_a_stale_leader(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_leader_that_is_deposed_at_once_renews_nothing() {
    answered_by_a_stale_leader(true).await;
}

/// Later versions than 3.4.23 may notice, and then there is nothing to see. A leader that is about to ask itself whether it
/// still leads does so before it answers.
async fn answered_by_a_stale_leader(heals: bool) {
    for _ in 0..5 {
        let (answered, version) = ask_a_stale_leader(heals).await;
        if answered || !version.starts_with("3.4.") {
            return;
        }
    }
    panic!("no leader ever answered: nothing is tested");
}

/// A leader is paused until another leads. When it goes on, cut off from the others, it answers a keep-alive that was
/// sent meanwhile, of which the new leader knows nothing. It is cut off for good, or learns of the new leader before the
/// handle's next request comes, and carries that out. Whether it did answer, and its version.
async fn ask_a_stale_leader(heals: bool) -> (bool, String) {
    let (cluster, wires) = Servers::start_over_wires(3).await;
    let old = cluster.leader().await;
    // So short that no ping is missed before it goes on: the handle would leave the connection.
    let ttl = Duration::from_secs(12);
    let wire = Wire::to(cluster.endpoint(old).parse().unwrap()).await;
    let registry = connect_with_ttl(&[wire.address().to_string()], ttl).await;
    let session = registry.session().live().unwrap();
    let raw = Client::connect([cluster.endpoint(old)], None).await.unwrap();
    let lease = raw.lease_client().grant(60, None).await.unwrap().id();
    let (mut keeper, mut answers) = raw.lease_client().keep_alive(lease).await.unwrap();
    let first = registry.session().valid_until(session).unwrap();
    until("a keep-alive is answered", async || {
        registry.session().valid_until(session).unwrap() > first + ttl / 6
    })
    .await;

    cluster.signal(old, Signal::STOP);
    let sure = registry.session().valid_until(session).unwrap();
    wires.iter().for_each(Wire::refuse);
    let others: Vec<_> = (0..3).filter(|&member| member != old).collect();
    others.iter().for_each(|&member| wires[member].mend());
    until("another leads", async || {
        cluster.leader_as_known_to(others.iter().copied()).await.is_some()
    })
    .await;
    keeper.keep_alive().await.unwrap();
    // The keep-alive is sent, and not given up yet.
    let mut states = registry.session().states();
    let suspended = states.wait_for(|state| matches!(state, SessionState::Suspended(_)));
    within(PATIENCE, suspended).await.unwrap();
    wires.iter().for_each(Wire::refuse);
    // So slow that the old leader may learn of the new one between its answer and what follows that.
    wire.slow(Duration::from_millis(100));
    cluster.signal(old, Signal::CONT);
    let answered = within(PATIENCE, answers.message()).await;
    if heals {
        wires.iter().for_each(Wire::mend);
    }
    let version = raw.maintenance_client().status().await.unwrap().version().to_owned();
    // The keep-alive that was sent a third of the TTL after the last counts for nothing. A later one, taken by the new
    // leader, does.
    let began = Instant::now();
    while let Some(until) = registry.session().valid_until(session) {
        let grown = until.saturating_duration_since(sure);
        assert!(
            grown.is_zero() || grown > ttl / 2,
            "it took the stale leader's word for {grown:?} more"
        );
        if until != sure {
            assert!(heals, "no member that it reaches has a quorum");
            break;
        }
        assert!(began.elapsed() < ttl, "it neither ends nor goes on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if !heals {
        wires.iter().for_each(Wire::mend);
        let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
        within(PATIENCE, renewed).await.unwrap();
    }
    let answered = matches!(answered, Ok(Some(answer)) if answer.ttl() > 0);
    (answered, version)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_is_passed_over() {
    let mut cluster = Servers::start(1).await;
    let learner = cluster.add_learner().await;
    for endpoints in [
        [cluster.endpoint(learner), cluster.endpoint(0)],
        [cluster.endpoint(0), cluster.endpoint(learner)],
    ] {
        let registry = connect(&endpoints).await;
        registry.put_ephemeral(&key("/a"), "1").await.unwrap();
        let (_watch, picture) = Picture::of(&*registry).await.unwrap();
        assert!(picture.has("/a", "1"));
        assert!(
            registry
                .health()
                .await
                .unwrap()
                .endpoint
                .ends_with(&cluster.endpoint(0))
        );
        registry.close().await.unwrap();
    }
    let config = EtcdConfig::new(Endpoints::new([cluster.endpoint(learner)]).unwrap());
    let alone = within(PATIENCE, registry_etcd::connect(&config, &Options::default())).await;
    assert!(matches!(alone, Err(Error::Unavailable { .. })), "{alone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_died_while_it_was_idle_costs_no_request() {
    let cluster = Servers::start(1).await;
    let wire = Wire::to(cluster.endpoint(0).parse().unwrap()).await;
    let registry = connect_with_timeout(wire.address().to_string(), Duration::from_secs(5)).await;
    registry.put(&key("/a"), "1").await.unwrap();
    let began = Instant::now();
    until("it was idle", async || began.elapsed() > Duration::from_secs(12)).await;
    // As a gateway that has forgotten the connection: nothing is closed.
    wire.stall_present();
    registry.put(&key("/a"), "2").await.unwrap();
    let there = registry.get(&key("/a"), Read::Linearizable).await.unwrap();
    assert_eq!(there.unwrap().value, "2");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_send_tcp_keep_alives() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    registry.put(&key("/a"), "1").await.unwrap();
    let port: u16 = cluster.endpoint(0).rsplit(':').next().unwrap().parse().unwrap();
    let peer = format!("0100007F:{port:04X}");
    until("each connection has a keep-alive timer", async || {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        let rows = table.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
        // The remote address, the state, and the timer that runs.
        let timers = rows
            .filter(|row| row.get(2) == Some(&peer.as_str()) && row[3] == "01")
            .map(|row| row[5].starts_with("02:"));
        let timers: Vec<_> = timers.collect();
        timers.len() >= 2 && timers.iter().all(|keep_alive| *keep_alive)
    })
    .await;
}

/// What a reader of a watch knows, whichever way revisions go.
#[derive(Default)]
struct Known {
    entries: BTreeMap<String, String>,
    deleted: Vec<String>,
}

impl Known {
    async fn until(&mut self, watch: &mut Watch, known: impl Fn(&Self) -> bool) {
        while !known(self) {
            let item = within(PATIENCE, watch.next()).await;
            let WatchItem::Changes(events) = item.unwrap().unwrap() else {
                continue;
            };
            for event in events {
                let key = event.key().to_string();
                match event {
                    Event::Created(entry) => {
                        let value = String::from_utf8(entry.value.to_vec()).unwrap();
                        assert_eq!(self.entries.insert(key.clone(), value), None, "{key} was created twice");
                    }
                    Event::Updated(entry) => {
                        let value = String::from_utf8(entry.value.to_vec()).unwrap();
                        assert!(self.entries.insert(key.clone(), value).is_some(), "{key} was not there");
                    }
                    Event::Deleted { .. } => {
                        assert!(self.entries.remove(&key).is_some(), "{key} was not there");
                        self.deleted.push(key);
                    }
                }
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

/// A cluster that is restored from a snapshot has another id; files that are put back have the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_went_back_is_noticed() {
    for by_snapshot in [true, false] {
        let mut cluster = Servers::start(1).await;
        let registry = connect_with_ttl(&cluster.endpoints(), Duration::from_secs(20)).await;
        let session = registry.session().live().unwrap();
        registry.put(&key("/kept"), "1").await.unwrap();
        registry.put(&key("/changed"), "before").await.unwrap();
        registry.put_ephemeral(&key("/mine"), "").await.unwrap();
        let (snapshot, files) = (cluster.file("snapshot"), cluster.file("files"));
        if by_snapshot {
            let saved = Command::new("etcdctl")
                .env("ETCDCTL_API", "3")
                .args(["--endpoints", &cluster.endpoint(0), "snapshot", "save"])
                .arg(&snapshot)
                .output()
                .expect("etcdctl is missing: apt-get install etcd-client");
            assert!(saved.status.success(), "{saved:?}");
        } else {
            cluster.restart_with(|_, data| copy(data, &files)).await;
            registry.wait_connected(PATIENCE).await.unwrap();
        }
        for number in 0..40 {
            registry.put(&key(&format!("/lost/{number}")), "1").await.unwrap();
        }
        registry.put(&key("/changed"), "after").await.unwrap();
        let held = registry.lock(&key("/lock")).acquire().await.unwrap();
        let request = WatchRequest::new(Prefix::root(), WatchScope::Subtree);
        let mut watch = registry.watch(request).await.unwrap();
        let mut known = Known::default();
        known.until(&mut watch, |known| known.entries.len() == 43).await;

        let sure = registry.session().valid_until(session).unwrap();
        match by_snapshot {
            true => cluster.restore(&snapshot).await,
            false => {
                cluster
                    .restart_with(|_, data| {
                        std::fs::remove_dir_all(data).unwrap();
                        copy(&files, data);
                    })
                    .await;
            }
        }
        let other = connect(&cluster.endpoints()).await;
        other.put(&key("/new"), "1").await.unwrap();
        known
            .until(&mut watch, |known| known.entries.contains_key("/new"))
            .await;
        // The lease was in the copy as well, and is the session's no more.
        let mut states = registry.session().states();
        let ended = states.wait_for(|state| state.live() != Some(session));
        within(PATIENCE, ended).await.unwrap();
        assert!(!sure.has_passed(), "only the clock ended the session");
        assert!(held.is_lost());
        let renewed = states.wait_for(|state| state.live().is_some_and(|id| id != session));
        within(PATIENCE, renewed).await.unwrap();
        // Its ephemeral key goes with it.
        known
            .until(&mut watch, |known| !known.entries.contains_key("/mine"))
            .await;
        let there = other.list_all(List::new(Prefix::root())).await.unwrap();
        let there: BTreeMap<_, _> = there
            .into_iter()
            .map(|entry| (entry.key.to_string(), String::from_utf8(entry.value.to_vec()).unwrap()))
            .collect();
        assert_eq!(known.entries, there);
        assert_eq!(there["/changed"], "before");
        assert!((0..40).all(|number| known.deleted.contains(&format!("/lost/{number}"))));
        // A stale read shows nothing older than what the handle has seen of this history, and asks no quorum for that.
        let stale = registry.get(&key("/kept"), Read::Stale).await.unwrap();
        assert_eq!(stale.unwrap().value, "1");
        registry.put_ephemeral(&key("/again"), "").await.unwrap();
        known
            .until(&mut watch, |known| known.entries.contains_key("/again"))
            .await;
        // L3. Revisions are given out again, fencing tokens are not.
        let next = registry.lock(&key("/lock")).acquire_within(PATIENCE).await.unwrap();
        assert!(next.token() > held.token(), "{} after {}", next.token(), held.token());
        registry.close().await.unwrap();
    }
}

/// Puts so many keys, without a handle.
async fn fill(cluster: &Servers, keys: usize) {
    let client = cluster.raw().await;
    let names: Vec<_> = (0..keys)
        .map(|number| format!("/registry/many/{number:06}{}", "x".repeat(60)))
        .collect();
    for some in names.chunks(128) {
        let puts: Vec<_> = some.iter().map(|name| TxnOp::put(name.as_str(), "1", None)).collect();
        client.kv_client().txn(Txn::new().and_then(puts)).await.unwrap();
    }
}

/// It takes several times as long to list what the watch covers as a request may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_many_keys_begins_and_goes_on_whatever_its_listing_takes() {
    const KEYS: usize = 40_000;
    let cluster = Servers::start(1).await;
    fill(&cluster, KEYS).await;
    let wire = Wire::to(cluster.endpoint(0).parse().unwrap()).await;
    let request_timeout = Duration::from_secs(1);
    let registry = connect_with_timeout(wire.address().to_string(), request_timeout).await;
    let other = connect(&cluster.endpoints()).await;
    wire.slow(Duration::from_millis(20));
    let began = Instant::now();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    assert!(
        began.elapsed() > request_timeout,
        "the listing was too fast to show anything"
    );
    assert_eq!(picture.entries.len(), KEYS);

    // The same listing follows a gap.
    wire.refuse();
    other.put(&key("/a"), "1").await.unwrap();
    other
        .delete(&key(&format!("/many/000000{}", "x".repeat(60))))
        .await
        .unwrap();
    picture.synced = None;
    wire.mend();
    wire.slow(Duration::from_millis(20));
    picture
        .until(&mut watch, |picture| picture.synced.is_some())
        .await
        .unwrap();
    assert!(picture.has("/a", "1"));
    assert_eq!(picture.entries.len(), KEYS);

    // A compaction in the middle of a listing starts it over.
    let listing = tokio::spawn({
        let registry = registry.clone();
        async move { Picture::of(&*registry).await.unwrap() }
    });
    let raw = cluster.raw().await;
    let began = Instant::now();
    while began.elapsed() < request_timeout {
        let newest = other.put(&key("/a"), "2").await.unwrap();
        raw.kv_client().compact(newest.0.cast_signed(), None).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (_watch, picture) = within(PATIENCE, listing).await.unwrap();
    assert_eq!(picture.entries.len(), KEYS);
}
