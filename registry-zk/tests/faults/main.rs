//! What ZooKeeper and the way to it do to a handle, and what the handle makes of it.

#![allow(clippy::unwrap_used)]

mod calls;
mod deposed;
#[path = "../harness/mod.rs"]
mod harness;
mod restored;
mod steps;
mod storm;

use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::old::through_an_old_server;
use harness::{Servers, config, connect, connect_with_ttl, options, until};
use registry_api::{
    Error, Options, Read, Registry, SessionId, SessionState, SessionTtl, TtlBounds, WatchRequest, WatchScope,
};
use registry_tests::cluster::put_at_last;
use registry_tests::process::free_port;
use registry_tests::watch::Picture;
use registry_tests::{Wire, key, within};

const PATIENCE: Duration = Duration::from_secs(30);

fn session_of(registry: &Arc<dyn Registry>) -> SessionId {
    registry.session().state().id()
}

async fn wire_to(servers: &Servers, number: usize) -> Wire {
    Wire::to(servers.address(number).parse().unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_loses_no_session_and_no_change() {
    let mut servers = Servers::start(1).await;
    let registry = connect_with_ttl(&servers.addresses(), Duration::from_secs(20)).await;
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "yes").await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    servers.kill(0);
    servers.spawn(0);
    put_at_last(&*registry, "/after", "1").await;
    picture
        .until(&mut watch, |picture| picture.has("/after", "1"))
        .await
        .unwrap();
    assert!(picture.has("/alive", "yes"));
    assert_eq!(session_of(&registry), session);
    registry.wait_connected(PATIENCE).await.unwrap();
    registry.put_ephemeral(&key("/alive"), "still").await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_loses_no_session_and_no_change() {
    let mut servers = Servers::start(3).await;
    let leader = servers.leader().await;
    let mut wires = Vec::new();
    for number in 0..3 {
        wires.push(wire_to(&servers, number).await);
    }
    let followers = || (0..3).filter(|number| *number != leader).map(|number| &wires[number]);
    let addresses: Vec<_> = wires.iter().map(|wire| wire.address().to_string()).collect();
    // The session begins at the leader, so that its own server goes too.
    followers().for_each(Wire::refuse);
    let registry = connect_with_ttl(&addresses.join(","), Duration::from_secs(20)).await;
    followers().for_each(Wire::mend);
    let session = session_of(&registry);
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    registry.put(&key("/before"), "1").await.unwrap();

    servers.kill(leader);
    put_at_last(&*registry, "/after", "1").await;
    picture
        .until(&mut watch, |picture| {
            picture.has("/before", "1") && picture.has("/after", "1")
        })
        .await
        .unwrap();
    registry.wait_connected(PATIENCE).await.unwrap();
    assert_eq!(session_of(&registry), session);
    assert!(!held.is_lost());
    held.release().await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_shorter_than_the_ttl_loses_nothing() {
    let servers = Servers::start(1).await;
    let wire = wire_to(&servers, 0).await;
    let registry = connect_with_ttl(&wire.address().to_string(), Duration::from_secs(20)).await;
    let other = connect(&servers.addresses()).await;
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    wire.refuse();
    for count in 0..10 {
        other.put(&key("/count"), count.to_string()).await.unwrap();
    }
    other.put(&key("/brief"), "").await.unwrap();
    other.delete(&key("/brief")).await.unwrap();
    other.put(&key("/gone"), "").await.unwrap();
    assert!(matches!(
        registry.get(&key("/count"), Read::Linearizable).await,
        Err(Error::Unavailable { .. })
    ));
    picture.synced = None;
    wire.mend();

    picture
        .until(&mut watch, |picture| {
            picture.has("/count", "9") && picture.synced.is_some()
        })
        .await
        .unwrap();
    registry.wait_connected(PATIENCE).await.unwrap();
    assert_eq!(session_of(&registry), session);
    assert!(other.get(&key("/alive"), Read::Linearizable).await.unwrap().is_some());
    other.put(&key("/count"), "10").await.unwrap();
    other.delete(&key("/gone")).await.unwrap();
    picture
        .until(&mut watch, |picture| {
            picture.has("/count", "10") && !picture.entries.contains_key(&key("/gone"))
        })
        .await
        .unwrap();
    registry.close().await.unwrap();
}

/// Servers that come back grant every session a full TTL again. One that the handle gave up meanwhile is closed as soon as the
/// next is open, so that its keys are in nobody's way.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_given_up_while_no_server_ran_is_closed_when_they_are_back() {
    const TTL: Duration = Duration::from_secs(10);
    let mut servers = Servers::start(1).await;
    let registry = connect_with_ttl(&servers.addresses(), TTL).await;
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    let mut states = registry.session().states();
    let down = Instant::now();
    servers.kill(0);
    within(PATIENCE, registry.session().ended(session)).await;
    // The client itself gives a session up after 1.4 of its TTL, and does not connect to close it any more.
    tokio::time::sleep((TTL * 8 / 5).saturating_sub(down.elapsed())).await;
    servers.spawn(0);
    servers.ready().await;
    let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
    within(PATIENCE, renewed).await.unwrap();
    until("the key of the session before is deleted", TTL / 2, async || {
        let entry = registry.get(&key("/alive"), Read::Linearizable).await;
        entry.is_ok_and(|entry| entry.is_none())
    })
    .await;
    // The calls of the next session are not disturbed.
    let next = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    assert_eq!(session_of(&registry), next);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_longer_than_the_ttl_ends_the_session_and_a_new_one_follows() {
    let servers = Servers::start(1).await;
    let wire = wire_to(&servers, 0).await;
    let (registry, other) = (
        connect(&wire.address().to_string()).await,
        connect(&servers.addresses()).await,
    );
    let session = session_of(&registry);
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    let mut states = registry.session().states();

    wire.cut();
    let lost = async {
        held.lost().await;
        Instant::now()
    };
    let next = async {
        let next = other.lock(&key("/lock")).acquire().await.unwrap();
        (next, Instant::now())
    };
    let (lost, (next, taken)) = within(PATIENCE, async { tokio::join!(lost, next) }).await;
    assert!(lost < taken, "another held it before its holder knew");
    assert!(next.token() > held.token());
    assert!(matches!(registry.session().live(), Err(Error::SessionExpired { session: s }) if s == session));

    wire.mend();
    let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
    within(PATIENCE, renewed).await.unwrap();
    assert!(matches!(held.release().await, Err(Error::HoldLost { .. })));
    assert!(!next.is_lost());
    registry.put_ephemeral(&key("/alive"), "again").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_first_server_delays_nothing_for_long() {
    let servers = Servers::start(1).await;
    let silent = wire_to(&servers, 0).await;
    silent.cut();
    for dead in [format!("127.0.0.1:{}", free_port()), silent.address().to_string()] {
        // The order is the client's to choose: several handles, so that one of them meets the dead one first.
        for _ in 0..4 {
            let registry = connect(&format!("{dead},{}", servers.address(0))).await;
            registry.put(&key("/a"), "1").await.unwrap();
            registry.close().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_server_at_all_is_an_error_that_names_them() {
    let addresses = [
        format!("127.0.0.1:{}", free_port()),
        format!("127.0.0.1:{}", free_port()),
    ];
    let refused = registry_zk::connect(&config(&addresses.join(",")), &options()).await;
    let Err(Error::Unavailable { source, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        addresses.iter().all(|address| source.to_string().contains(address)),
        "{source}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_falls_silent_is_left() {
    let servers = Servers::start(3).await;
    let mut wires = Vec::new();
    for number in 0..3 {
        wires.push(wire_to(&servers, number).await);
    }
    let addresses: Vec<_> = wires.iter().map(|wire| wire.address().to_string()).collect();
    let registry = connect_with_ttl(&addresses.join(","), Duration::from_secs(10)).await;
    let session = session_of(&registry);
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    // Whichever it talks to: each falls silent in turn.
    for (silent, wire) in wires.iter().enumerate() {
        wire.cut();
        put_at_last(&*registry, "/a", &silent.to_string()).await;
        picture
            .until(&mut watch, |picture| picture.has("/a", &silent.to_string()))
            .await
            .unwrap();
        registry.wait_connected(PATIENCE).await.unwrap();
        wire.mend();
    }
    registry.wait_connected(PATIENCE).await.unwrap();
    assert_eq!(session_of(&registry), session);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_acknowledged() {
    let mut servers = Servers::start(3).await;
    let quick = Options {
        request_timeout: Duration::from_secs(2),
        ..options()
    };
    let registry = registry_zk::connect(&config(&servers.addresses()), &quick)
        .await
        .unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    servers.kill(0);
    servers.kill(1);
    let put = registry.put(&key("/a"), "2").await;
    assert!(
        matches!(put, Err(Error::OutcomeUnknown { .. } | Error::Unavailable { .. })),
        "{put:?}"
    );
    // A server without a quorum serves nobody, once it has noticed: until then it answers reads (`docs/backends/zk.md`).
    until("the last server has noticed", PATIENCE, async || {
        !servers.serves(2).await
    })
    .await;
    assert!(matches!(registry.health().await, Err(Error::Unavailable { .. })));
    for read in [Read::Linearizable, Read::Stale] {
        let got = registry.get(&key("/a"), read).await;
        assert!(matches!(got, Err(Error::Unavailable { .. })), "{got:?}");
    }
    servers.spawn(0);
    registry.wait_connected(PATIENCE).await.unwrap();
    registry.put(&key("/a"), "3").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_closed_by_another_hand_is_followed_by_a_new_one() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    let session = session_of(&registry);
    let registration = registry.register(&key("/member"), "here").await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    let mut states = registry.session().states();

    servers.close_session(session).await;
    within(PATIENCE, held.lost()).await;
    let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
    within(PATIENCE, renewed).await.unwrap();
    until("the registration is back under the new session", PATIENCE, async || {
        let there = registry.get(&key("/member"), Read::Linearizable).await.unwrap();
        there.is_some_and(|entry| entry.session == Some(session_of(&registry)))
    })
    .await;
    registration.unregister().await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_learns_that_the_session_is_gone_before_a_keep_alive_does() {
    let servers = Servers::start(1).await;
    let registry = connect_with_ttl(&servers.addresses(), Duration::from_secs(60)).await;
    let session = session_of(&registry);
    servers.close_session(session).await;
    let put = registry.put_ephemeral(&key("/e"), "").await;
    assert!(
        matches!(put, Err(Error::SessionExpired { session: s }) if s == session),
        "{put:?}"
    );
    until("there is a new session", PATIENCE, async || {
        registry.session().live().is_ok_and(|id| id != session)
    })
    .await;
    registry.put_ephemeral(&key("/e"), "").await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ttl_out_of_bounds_is_refused_and_leaves_no_session() {
    let servers = Servers::start_with(1, "tickTime=1000\nmaxSessionTimeout=5000\n").await;
    let mut options = Options::default();
    for ttl in [Duration::from_secs(1), Duration::from_secs(60)] {
        options.session_ttl = SessionTtl::new(ttl).unwrap();
        let refused = registry_zk::connect(&config(&servers.addresses()), &options).await;
        assert!(matches!(refused, Err(Error::Config { .. })), "{refused:?}");
    }
    until("the refused sessions are closed", PATIENCE, async || {
        servers.ask(0, "dump").await.contains("Session Sets (0)")
    })
    .await;
    options.session_ttl_bounds = TtlBounds::Accept;
    let registry = registry_zk::connect(&config(&servers.addresses()), &options)
        .await
        .unwrap();
    assert_eq!(registry.session().ttl(), Duration::from_secs(5));
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_recursive_watches_is_refused() {
    let servers = Servers::start(1).await;
    let old = through_an_old_server(servers.address(0)).await;
    let refused = registry_zk::connect(&config(&old), &options()).await;
    assert!(
        matches!(refused, Err(Error::Unsupported { operation, .. }) if operation.contains("3.6")),
        "{refused:?}"
    );
    let left = servers.raw().await.list_children("/").await.unwrap();
    assert_eq!(left, ["zookeeper"], "it left something behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_watch_ends_on_the_server() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    let watching = async |path: &str| servers.ask(0, "wchp").await.lines().any(|line| line == path);
    let watch = registry
        .watch(WatchRequest::new(key("/watched"), WatchScope::Subtree))
        .await
        .unwrap();
    until("it is there", PATIENCE, async || watching("/registry/watched").await).await;
    drop(watch);
    until("it is gone", PATIENCE, async || !watching("/registry/watched").await).await;
    registry.close().await.unwrap();
}
