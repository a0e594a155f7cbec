//! What etcd and the way to it do to a handle, and what the handle makes of it.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::CompactionOptions;
use harness::streams::Streams;
use harness::{Servers, TTL, connect, until};
use registry_api::{
    Error, Event, Prefix, Read, Registry, SessionId, SessionState, WatchFrom, WatchItem, WatchRequest, WatchScope,
};
use registry_etcd::{Endpoints, EtcdConfig};
use registry_tests::cluster::put_at_last;
use registry_tests::process::free_port;
use registry_tests::watch::Picture;
use registry_tests::{Process, Wire, key, within};

const PATIENCE: Duration = Duration::from_secs(30);
/// A TTL that outlasts the start of a server, or an election, on a busy machine.
const LONG: Duration = Duration::from_secs(20);
/// Where the process that holds a lock finds etcd, and what it says when it has it.
const ENDPOINT: &str = "REGISTRY_TEST_ENDPOINT";
const HOLDS: &str = "it holds the lock";

async fn wire_to(cluster: &Servers) -> Wire {
    Wire::to(cluster.endpoint(0).parse().unwrap()).await
}

fn session_of(registry: &Arc<dyn Registry>) -> SessionId {
    registry.session().state().id()
}

/// Waits for the answer to the session's first keep-alive, and with that for the stream of those that follow.
async fn kept_alive(registry: &Arc<dyn Registry>) {
    let session = session_of(registry);
    let first = registry.session().valid_until(session).unwrap();
    until("a keep-alive is answered", async || {
        registry.session().valid_until(session).unwrap() > first + TTL / 6
    })
    .await;
}

/// Ends a session's lease behind its handle's back.
async fn revoke(cluster: &Servers, session: SessionId) {
    let lease = session.0.cast_signed();
    cluster.raw().await.lease_client().revoke(lease).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_loses_no_session_and_no_change() {
    let mut cluster = Servers::start(1).await;
    let registry = harness::connect_with_ttl(&cluster.endpoints(), LONG).await;
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "yes").await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    picture.synced = None;
    cluster.kill(0);
    cluster.spawn(0);
    put_at_last(&*registry, "/after", "1").await;
    picture
        .until(&mut watch, |picture| {
            picture.has("/after", "1") && picture.synced.is_some()
        })
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
    let mut cluster = Servers::start(3).await;
    let leader = cluster.leader().await;
    // The one that is killed comes first, so that all three links have to leave it.
    let mut endpoints = cluster.endpoints();
    endpoints.rotate_left(leader);
    let registry = harness::connect_with_ttl(&endpoints, LONG).await;
    let session = session_of(&registry);
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    registry.put(&key("/before"), "1").await.unwrap();

    cluster.kill(leader);
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
async fn a_session_outlives_twice_its_ttl_while_leaders_change() {
    let cluster = Servers::start(3).await;
    let wire = wire_to(&cluster).await;
    let (registry, other) = (
        connect(&[wire.address().to_string()]).await,
        connect(&cluster.endpoints()).await,
    );
    let lost = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    let is_there = async || {
        let there = other.get(&key("/alive"), Read::Linearizable).await.unwrap();
        there.is_some_and(|entry| entry.session == Some(lost))
    };

    wire.cut();
    let began = Instant::now();
    let bound = 2 * TTL + Duration::from_secs(1);
    while began.elapsed() <= bound {
        cluster.move_leader().await;
        // Each of them grants the whole TTL again, and is replaced before that is over.
        tokio::time::sleep(TTL / 4).await;
    }
    assert!(is_there().await, "no leader granted it its time again");
    assert!(!registry.session().is_valid(lost), "its handle counts on no leader");
    let began = Instant::now();
    until("it has expired", async || !is_there().await).await;
    assert!(began.elapsed() < bound, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_shorter_than_the_ttl_loses_nothing() {
    let cluster = Servers::start(1).await;
    let wire = wire_to(&cluster).await;
    let (registry, other) = (
        harness::connect_with_ttl(&[wire.address().to_string()], LONG).await,
        connect(&cluster.endpoints()).await,
    );
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    picture.synced = None;
    wire.refuse();
    for count in 0..10 {
        other.put(&key("/count"), count.to_string()).await.unwrap();
    }
    other.put(&key("/brief"), "").await.unwrap();
    other.delete(&key("/brief")).await.unwrap();
    assert!(matches!(
        registry.get(&key("/count"), Read::Linearizable).await,
        Err(Error::Unavailable { .. })
    ));
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
    picture
        .until(&mut watch, |picture| picture.has("/count", "10"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_longer_than_the_ttl_ends_the_session_and_a_new_one_follows() {
    let cluster = Servers::start(1).await;
    let wire = wire_to(&cluster).await;
    let (registry, other) = (
        connect(&[wire.address().to_string()]).await,
        connect(&cluster.endpoints()).await,
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
async fn a_dead_first_endpoint_delays_nothing_for_long() {
    let cluster = Servers::start(1).await;
    let silent = wire_to(&cluster).await;
    silent.cut();
    for dead in [format!("127.0.0.1:{}", free_port()), silent.address().to_string()] {
        let config = EtcdConfig::new(Endpoints::new([dead, cluster.endpoint(0)]).unwrap());
        let patient = registry_api::Options {
            connect_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(60),
            ..registry_api::Options::default()
        };
        let began = Instant::now();
        let registry = registry_etcd::connect(&config, &patient).await.unwrap();
        registry.put(&key("/a"), "1").await.unwrap();
        // A tenth of a second for each connection; to wait for it to time out would take a minute.
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        registry.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_endpoint_at_all_is_an_error_that_names_them() {
    let endpoints = [
        format!("127.0.0.1:{}", free_port()),
        format!("127.0.0.1:{}", free_port()),
    ];
    let config = EtcdConfig::new(Endpoints::new(&endpoints).unwrap());
    let refused = registry_etcd::connect(&config, &registry_api::Options::default()).await;
    let Err(Error::Unavailable { source, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        endpoints.iter().all(|endpoint| source.to_string().contains(endpoint)),
        "{source}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_falls_silent_is_left() {
    let cluster = Servers::start(3).await;
    let wire = wire_to(&cluster).await;
    let endpoints = [wire.address().to_string(), cluster.endpoint(1), cluster.endpoint(2)];
    let registry = harness::connect_with_ttl(&endpoints, LONG).await;
    let session = session_of(&registry);
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    wire.cut();
    registry
        .get(&key("/a"), Read::Linearizable)
        .await
        .expect("a read finds another member within its deadline");
    registry.put(&key("/a"), "1").await.unwrap();
    picture
        .until(&mut watch, |picture| picture.has("/a", "1"))
        .await
        .unwrap();
    registry.wait_connected(PATIENCE).await.unwrap();
    assert_eq!(session_of(&registry), session);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_hides_no_final_state_from_a_watch() {
    let cluster = Servers::start(1).await;
    let wire = wire_to(&cluster).await;
    let registry = connect(&[wire.address().to_string()]).await;
    let other = connect(&cluster.endpoints()).await;
    for number in 0..20 {
        other.put(&key(&format!("/old/{number}")), "old").await.unwrap();
    }
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    picture.synced = None;
    wire.refuse();
    for number in 0..10 {
        other.delete(&key(&format!("/old/{number}"))).await.unwrap();
    }
    other.put(&key("/old/3"), "anew").await.unwrap();
    let mut last = other.put(&key("/old/15"), "changed").await.unwrap();
    for number in 0..20 {
        last = other.put(&key("/new"), number.to_string()).await.unwrap();
    }
    let compaction = CompactionOptions::new().with_physical();
    cluster
        .raw()
        .await
        .kv_client()
        .compact(last.0.cast_signed(), Some(compaction))
        .await
        .unwrap();
    wire.mend();

    picture
        .until(&mut watch, |picture| picture.synced.is_some())
        .await
        .unwrap();
    let there = other.list_all(registry_api::List::new(Prefix::root())).await.unwrap();
    assert_eq!(picture.entries.into_values().collect::<Vec<_>>(), there);
    assert_eq!(there.len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_a_compacted_revision_is_told_the_oldest_or_starts_over() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    let first = registry.put(&key("/a"), "1").await.unwrap();
    let kept = registry.put(&key("/a"), "2").await.unwrap();
    registry.put(&key("/b"), "3").await.unwrap();
    let raw = cluster.raw().await;
    raw.kv_client().compact(kept.0.cast_signed(), None).await.unwrap();
    let from = |from| WatchRequest {
        from,
        ..WatchRequest::new(Prefix::root(), WatchScope::Subtree)
    };

    let refused = registry.watch(from(WatchFrom::After(first))).await;
    assert!(
        matches!(refused, Err(Error::Compacted { requested, oldest }) if (requested, oldest) == (first, kept)),
        "{refused:?}"
    );
    let mut oldest = registry.watch(from(WatchFrom::After(kept))).await.unwrap();
    let told = within(PATIENCE, oldest.next()).await.unwrap().unwrap();
    assert!(
        matches!(&told, WatchItem::Changes(events) if matches!(&events[..], [Event::Created(entry)] if entry.key == key("/b"))),
        "{told:?}"
    );
    let mut anew = registry.watch(from(WatchFrom::AfterOrReset(first))).await.unwrap();
    let told = within(PATIENCE, anew.next()).await.unwrap().unwrap();
    assert!(matches!(told, WatchItem::Reset), "{told:?}");
    let mut picture = Picture::default();
    picture
        .until(&mut anew, |picture| picture.synced.is_some())
        .await
        .unwrap();
    assert!(picture.has("/a", "2") && picture.has("/b", "3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_revoked_by_another_hand_ends_the_session() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    let session = session_of(&registry);
    let registration = registry.register(&key("/member"), "here").await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    let mut states = registry.session().states();

    revoke(&cluster, session).await;
    within(PATIENCE, held.lost()).await;
    let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
    within(PATIENCE, renewed).await.unwrap();
    until("the registration is back under the new session", async || {
        let there = registry.get(&key("/member"), Read::Linearizable).await.unwrap();
        there.is_some_and(|entry| entry.session == Some(session_of(&registry)))
    })
    .await;
    assert!(matches!(held.release().await, Err(Error::HoldLost { .. })));
    registration.unregister().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keep_alive_learns_that_the_lease_is_gone_before_the_clock_does() {
    let cluster = Servers::start(1).await;
    for has_a_stream in [false, true] {
        let registry = harness::connect_with_ttl(&cluster.endpoints(), 3 * TTL).await;
        let session = session_of(&registry);
        let held = registry.lock(&key("/lock")).acquire().await.unwrap();
        if has_a_stream {
            kept_alive(&registry).await;
        }
        let sure = registry.session().valid_until(session).unwrap();
        revoke(&cluster, session).await;
        within(PATIENCE, registry.session().ended(session)).await;
        assert!(!sure.has_passed(), "it took the handle's own clock");
        assert!(held.is_lost() && !registry.session().is_valid(session));
        let mut states = registry.session().states();
        let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
        within(PATIENCE, renewed).await.unwrap();
        registry.close().await.unwrap();
    }
}

/// Holds a lock until it is lost. Does nothing by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_holds() {
    let Ok(endpoint) = std::env::var(ENDPOINT) else {
        return;
    };
    let registry = connect(&[endpoint]).await;
    let session = session_of(&registry);
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    println!("{HOLDS}");
    let mut sure = Instant::now();
    loop {
        let asked = Instant::now();
        if held.is_lost() {
            break;
        }
        assert!(
            asked - sure < TTL,
            "sure of it after it stood still for longer than the TTL"
        );
        sure = asked;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(matches!(held.release().await, Err(Error::HoldLost { .. })));
    let mut states = registry.session().states();
    let renewed = states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session));
    within(PATIENCE, renewed).await.unwrap();
    registry.put_ephemeral(&key("/back"), "").await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_expired_while_its_process_stood_still_is_lost_at_once() {
    let cluster = Servers::start(1).await;
    let other = connect(&cluster.endpoints()).await;
    let mut holder = tokio::process::Command::new(std::env::current_exe().unwrap());
    holder
        .args(["--exact", "a_process_that_holds", "--nocapture"])
        .env(ENDPOINT, cluster.endpoint(0));
    let (mut holder, ()) = Process::start(holder, |line| line.contains(HOLDS).then_some(())).await;
    holder.pause();
    // Etcd has let the lease expire.
    let next = within(PATIENCE, other.lock(&key("/lock")).acquire()).await.unwrap();
    holder.resume();
    assert!(within(PATIENCE, holder.ended()).await.unwrap().success());
    assert!(!next.is_lost());
    next.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_learns_that_the_lease_is_gone_before_a_keep_alive_does() {
    let cluster = Servers::start(1).await;
    let registry = harness::connect_with_ttl(&cluster.endpoints(), Duration::from_secs(60)).await;
    let session = session_of(&registry);
    revoke(&cluster, session).await;
    let put = registry.put_ephemeral(&key("/e"), "").await;
    assert!(
        matches!(put, Err(Error::SessionExpired { session: s }) if s == session),
        "{put:?}"
    );
    until("there is a new session", async || {
        registry.session().live().is_ok_and(|id| id != session)
    })
    .await;
    registry.put_ephemeral(&key("/e"), "").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn keep_alives_find_a_new_connection_when_theirs_is_dead() {
    let cluster = Servers::start(1).await;
    let wire = wire_to(&cluster).await;
    let registry = connect(&[wire.address().to_string()]).await;
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    let mut states = registry.session().states();
    states.mark_unchanged();

    // Nothing is closed: only what was open carries nothing any more.
    wire.stall_present();
    let began = Instant::now();
    until("two TTLs have passed", async || began.elapsed() > 2 * TTL).await;
    assert_eq!(registry.session().state().live(), Some(session));
    let other = connect(&cluster.endpoints()).await;
    assert!(other.get(&key("/alive"), Read::Linearizable).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn keep_alives_leave_a_stream_that_is_dead_while_its_connection_lives() {
    let cluster = Servers::start(1).await;
    let wire = Streams::to(cluster.endpoint(0).parse().unwrap()).await;
    let registry = connect(&[wire.address().to_string()]).await;
    let session = session_of(&registry);
    registry.put_ephemeral(&key("/alive"), "").await.unwrap();
    kept_alive(&registry).await;

    wire.stall_present();
    let began = Instant::now();
    until("two TTLs have passed", async || began.elapsed() > 2 * TTL).await;
    assert!(wire.lost() > 0, "no stream was in use");
    assert_eq!(registry.session().state().live(), Some(session));
    let other = connect(&cluster.endpoints()).await;
    assert!(other.get(&key("/alive"), Read::Linearizable).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_leaves_a_stream_that_is_dead_while_its_connection_lives() {
    let cluster = Servers::start(1).await;
    let wire = Streams::to(cluster.endpoint(0).parse().unwrap()).await;
    let registry = connect(&[wire.address().to_string()]).await;
    let other = connect(&cluster.endpoints()).await;
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    // Told by the stream, which is open then.
    other.put(&key("/a"), "1").await.unwrap();
    picture
        .until(&mut watch, |picture| picture.has("/a", "1"))
        .await
        .unwrap();

    wire.stall_present();
    other.put(&key("/a"), "2").await.unwrap();
    picture
        .until(&mut watch, |picture| picture.has("/a", "2"))
        .await
        .unwrap();
    assert!(wire.lost() > 0, "no stream was in use");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_notices_a_dead_connection() {
    let cluster = Servers::start(1).await;
    let wire = wire_to(&cluster).await;
    let registry = connect(&[wire.address().to_string()]).await;
    let other = connect(&cluster.endpoints()).await;
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    wire.stall_present();
    other.put(&key("/a"), "1").await.unwrap();
    picture
        .until(&mut watch, |picture| picture.has("/a", "1"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_only_stale_reads_answer() {
    let mut cluster = Servers::start(3).await;
    let registry = connect(&cluster.endpoints()).await;
    registry.put(&key("/a"), "1").await.unwrap();
    // Whoever stays may not have applied the put yet.
    let stays = 2;
    until("it is applied there", async || {
        let options = etcd_client::GetOptions::new().with_serializable();
        let client = etcd_client::Client::connect([cluster.endpoint(stays)], None)
            .await
            .unwrap();
        client
            .kv_client()
            .get("/registry/a", Some(options))
            .await
            .is_ok_and(|answer| !answer.kvs().is_empty())
    })
    .await;
    cluster.kill(0);
    cluster.kill(1);
    assert!(matches!(
        registry.get(&key("/a"), Read::Linearizable).await,
        Err(Error::Unavailable { .. })
    ));
    assert!(matches!(registry.health().await, Err(Error::Unavailable { .. })));
    let put = registry.put(&key("/a"), "2").await;
    assert!(matches!(put, Err(Error::OutcomeUnknown { .. })), "{put:?}");
    let stale = registry.get(&key("/a"), Read::Stale).await.unwrap();
    assert_eq!(stale.unwrap().value, "1");

    cluster.spawn(0);
    registry.wait_connected(Duration::from_secs(30)).await.unwrap();
    registry.put(&key("/a"), "3").await.unwrap();
}
