//! F: failures, and what the other sentences promise while something fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{
    Error, Event, List, Options, Prefix, Read, Registered, Registry, Result, SessionState, Watch, WatchItem,
    WatchRequest, WatchScope,
};

use crate::cluster::eventually;
use crate::election::{campaigning, standing};
use crate::lock::acquire;
use crate::watch::{Picture, same_as_store};
use crate::{Cluster, key, within};

const PATIENCE: Duration = Duration::from_secs(20);
/// How much later than it must a store, or an answer, comes on a busy machine.
const LATE: Duration = Duration::from_secs(5);

/// F5. `health` answers without a write.
pub async fn health_answers(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let revision = registry.put(&key("/a"), "").await?;
    let health = registry.health().await?;
    assert!(health.revision >= revision && !health.endpoint.is_empty());
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await?, 1);
    registry.close().await
}

/// F5. `wait_connected` returns when the store answers, and says when the handle is closed.
pub async fn wait_connected_returns(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.wait_connected(PATIENCE).await?;
    registry.close().await?;
    assert!(matches!(registry.wait_connected(PATIENCE).await, Err(Error::Closed)));
    Ok(())
}

/// R5. What one handle left is there for the next.
pub async fn connect_again_finds_all(cluster: &impl Cluster) -> Result<()> {
    let one = cluster.connect().await?;
    for n in 0..50 {
        one.put(&key(&format!("/k/{n}")), n.to_string()).await?;
    }
    one.close().await?;
    let other = cluster.connect().await?;
    assert_eq!(other.count(&Prefix::root(), Read::Linearizable).await?, 50);
    other.close().await
}

/// R5. Acknowledged is durable: it survives the death of the store, killed at any moment.
pub async fn acknowledged_is_durable(cluster: &impl Cluster) -> Result<()> {
    for round in 0..3 {
        let registry = cluster.connect().await?;
        let writers = (0..8).map(|writer| {
            let registry = registry.clone();
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for n in 0..10_000 {
                    let path = format!("/d/{round}/{writer}/{n}");
                    match registry.put(&key(&path), path.clone()).await {
                        Ok(_) => acknowledged.push(path),
                        Err(_) => return acknowledged,
                    }
                }
                acknowledged
            })
        });
        let writers: Vec<_> = writers.collect();
        let watched = registry.clone();
        eventually(PATIENCE, || {
            let watched = watched.clone();
            async move {
                watched
                    .count(&Prefix::root(), Read::Stale)
                    .await
                    .is_ok_and(|count| count > 200 * (round + 1))
            }
        })
        .await;
        cluster.kill().await;
        drop(watched);
        drop(registry);
        let mut acknowledged = Vec::new();
        for writer in writers {
            acknowledged.extend(within(PATIENCE, writer).await.expect("it does not panic"));
        }
        cluster.restart().await;
        let registry = cluster.connect().await?;
        assert!(acknowledged.len() > 100);
        for path in acknowledged {
            let entry = registry.get(&key(&path), Read::Linearizable).await?;
            assert_eq!(
                entry
                    .unwrap_or_else(|| panic!("{path} was acknowledged and is lost"))
                    .value,
                path
            );
        }
        registry.close().await?;
    }
    Ok(())
}

fn quick(cluster: &impl Cluster) -> Options {
    Options {
        request_timeout: Duration::from_secs(1),
        connect_timeout: Duration::from_secs(2),
        ..cluster.steady()
    }
}

/// Sessions that outlast a restart of the store on a busy machine.
fn patient(cluster: &impl Cluster) -> Options {
    Options {
        session_ttl: registry_api::SessionTtl::new(Duration::from_secs(20)).expect("it is in the range"),
        ..cluster.steady()
    }
}

/// F1, F2. Without a store every call ends within its deadline, with an error that says what is true.
pub async fn calls_end_in_time_without_a_store(cluster: &impl Cluster) -> Result<()> {
    let (registry, wire) = cluster.connect_through(quick(cluster)).await?;
    registry.put(&key("/a"), "before").await?;
    wire.cut();
    let bound = quick(cluster).request_timeout + LATE;
    let read = within(bound, registry.get(&key("/a"), Read::Linearizable)).await;
    assert!(matches!(read, Err(Error::Unavailable { .. })), "{read:?}");
    let write = within(bound, registry.put(&key("/a"), "cut")).await;
    assert!(
        matches!(write, Err(Error::OutcomeUnknown { .. } | Error::Unavailable { .. })),
        "{write:?}"
    );
    let health = within(bound, registry.health()).await;
    assert!(matches!(health, Err(Error::Unavailable { .. })), "{health:?}");
    let mirror = within(bound, registry.mirror(&key("/a"), WatchScope::Subtree)).await;
    assert!(matches!(mirror, Err(Error::Unavailable { .. })), "{mirror:?}");
    let observed = within(bound, registry.election(&key("/e")).observe()).await;
    assert!(matches!(observed, Err(Error::Unavailable { .. })), "{observed:?}");
    let closed = within(bound, registry.close()).await;
    assert!(
        matches!(closed, Err(Error::OutcomeUnknown { .. } | Error::Unavailable { .. })),
        "{closed:?}"
    );
    Ok(())
}

/// F4. A store that is down, or takes a connection and says nothing, is an error within `connect_timeout`, naming the endpoint.
pub async fn a_store_that_is_down_is_told_at_connect(cluster: &impl Cluster) -> Result<()> {
    cluster.pause().await;
    told_at_connect(cluster).await;
    cluster.resume().await;
    cluster.kill().await;
    told_at_connect(cluster).await;
    Ok(())
}

async fn told_at_connect(cluster: &impl Cluster) {
    let options = quick(cluster);
    let asked = Instant::now();
    let refused = cluster.connect_with(options.clone()).await;
    assert!(
        asked.elapsed() < 2 * options.connect_timeout + LATE,
        "{:?}",
        asked.elapsed()
    );
    let error = refused.expect_err("nobody answers there");
    let Error::Unavailable { source, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(
        source.to_string().contains("127.0.0.1"),
        "it names no endpoint: {source}"
    );
}

/// F5, S7. After the store comes back the same handle works again by itself, with its session and its keys.
pub async fn the_same_handle_works_again(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect_with(patient(cluster)).await?;
    let session = registry.session().live()?;
    registry.put_ephemeral(&key("/e"), "1").await?;
    let held = acquire(&registry, "/l").await?;
    cluster.kill().await;
    cluster.restart().await;
    registry.wait_connected(PATIENCE).await?;
    registry.put(&key("/a"), "after").await?;
    assert_eq!(registry.session().live()?, session, "a restart loses no session");
    assert_eq!(
        registry
            .get(&key("/e"), Read::Linearizable)
            .await?
            .expect("it stays")
            .session,
        Some(session)
    );
    assert!(!held.is_lost());
    held.release().await?;
    registry.close().await
}

/// S7. A cut shorter than the TTL loses no session, no key and no lock.
pub async fn a_short_cut_loses_no_session(cluster: &impl Cluster) -> Result<()> {
    let options = Options {
        session_ttl: registry_api::SessionTtl::new(Duration::from_secs(6))?,
        ..cluster.steady()
    };
    let (registry, wire) = cluster.connect_through(options).await?;
    let other = cluster.connect().await?;
    let session = registry.session().live()?;
    registry.put_ephemeral(&key("/e"), "").await?;
    let held = acquire(&registry, "/l").await?;
    let mut states = registry.session().states();
    wire.cut();
    // Suspended comes when a keep-alive is overdue, well before the end.
    within(
        PATIENCE,
        states.wait_for(|state| *state == SessionState::Suspended(session)),
    )
    .await
    .expect("it is kept");
    wire.mend();
    within(
        PATIENCE,
        states.wait_for(|state| *state == SessionState::Connected(session)),
    )
    .await
    .expect("it is kept");
    assert!(!held.is_lost());
    assert!(other.get(&key("/e"), Read::Linearizable).await?.is_some());
    registry.wait_connected(PATIENCE).await?;
    held.release().await?;
    registry.close().await?;
    other.close().await
}

/// S4, S5, L5. A cut longer than the TTL: the holder is told before anybody else can hold, the handle goes on with a new
/// session, and nothing is carried over in silence.
pub async fn a_long_cut_loses_it_before_others_can_hold(cluster: &impl Cluster) -> Result<()> {
    let (registry, wire) = cluster.connect_through(cluster.steady()).await?;
    let other = cluster.connect().await?;
    let session = registry.session().live()?;
    registry.put_ephemeral(&key("/e"), "").await?;
    let held = acquire(&registry, "/l").await?;
    let waiting = tokio::spawn({
        let lock = other.lock(&key("/l"));
        async move { lock.acquire().await.map(|held| (held, Instant::now())) }
    });
    eventually(PATIENCE, || async {
        registry
            .lock(&key("/l"))
            .contenders()
            .await
            .is_ok_and(|all| all.len() == 2)
    })
    .await;
    let mut states = registry.session().states();
    let cut = Instant::now();
    wire.cut();
    within(PATIENCE, held.lost()).await;
    let lost = Instant::now();
    assert!(held.is_lost() && !registry.session().is_valid(session));
    let (next, won) = within(PATIENCE, waiting).await.expect("it does not panic")?;
    assert!(won > lost, "another held it {:?} before the loss was told", lost - won);
    assert!(next.token() > held.token());
    // By the store's clock: not before the TTL, and not later than twice that and a second, with some room for this machine.
    let ttl = registry.session().ttl();
    let latest = 2 * ttl + Duration::from_secs(1) + LATE;
    assert!(cut.elapsed() < latest, "{:?}", cut.elapsed());
    wire.mend();
    within(
        PATIENCE,
        states.wait_for(|state| matches!(state, SessionState::Connected(id) if *id != session)),
    )
    .await
    .expect("it is kept");
    registry.wait_connected(PATIENCE).await?;
    assert!(held.is_lost(), "a lost lock never comes back");
    assert!(registry.get(&key("/e"), Read::Linearizable).await?.is_none());
    registry.put_ephemeral(&key("/e"), "new").await?;
    next.release().await?;
    registry.close().await?;
    other.close().await
}

/// S2, E3. A holder whose process is gone is replaced when its session expires: not before its TTL, and in time.
pub async fn a_dead_holder_is_replaced_in_time(cluster: &impl Cluster) -> Result<()> {
    let (dead, wire) = cluster.connect_through(cluster.steady()).await?;
    let other = cluster.connect().await?;
    let _held = acquire(&dead, "/l").await?;
    let ttl = dead.session().ttl();
    wire.cut();
    let cut = Instant::now();
    let latest = 2 * ttl + Duration::from_secs(1) + LATE;
    let next = within(latest, other.lock(&key("/l")).acquire()).await?;
    assert!(cut.elapsed() > ttl / 2, "after {:?} already", cut.elapsed());
    next.release().await?;
    other.close().await
}

/// W3, W8. A watch goes on over a restart of the store, and loses no final state; so does who waits for the end of a key.
pub async fn a_watch_goes_on_over_a_restart(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for n in 0..20 {
        registry.put(&key(&format!("/w/{n}")), "before").await?;
    }
    let mut watch = registry
        .watch(WatchRequest::new(key("/w"), WatchScope::Subtree))
        .await?;
    let mut picture = Picture::default();
    picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
    let waited_for = key("/w/0");
    let created = picture.entries[&waited_for].create_revision;
    let waiting = tokio::spawn({
        let (registry, key) = (registry.clone(), waited_for.clone());
        async move { registry.list_once_gone(&key, created, List::new(key.clone())).await }
    });
    cluster.kill().await;
    cluster.restart().await;
    let other = cluster.connect().await?;
    assert!(!waiting.is_finished(), "it is still there");
    for n in 0..10 {
        other.delete(&key(&format!("/w/{n}"))).await?;
        other.put(&key(&format!("/w/{}", n + 10)), "after").await?;
    }
    let end = key("/w/end");
    other.put(&end, "").await?;
    picture
        .until(&mut watch, |picture| picture.entries.contains_key(&end))
        .await?;
    same_as_store(&*other, "/w", &picture).await?;
    let page = within(PATIENCE, waiting).await.expect("it does not panic")?;
    assert_eq!(page.entries, [], "it is gone");
    other.close().await
}

/// W3. What changed while the watch was cut off arrives as puts and deletes.
pub async fn a_watch_bridges_a_cut(cluster: &impl Cluster) -> Result<()> {
    let (registry, wire) = cluster.connect_through(cluster.steady()).await?;
    let other = cluster.connect().await?;
    for n in 0..10 {
        other.put(&key(&format!("/w/{n}")), "before").await?;
    }
    let mut watch = registry
        .watch(WatchRequest::new(key("/w"), WatchScope::Subtree))
        .await?;
    let mut picture = Picture::default();
    picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
    for round in 0..2 {
        if round == 0 {
            wire.cut()
        } else {
            wire.refuse()
        }
        for n in 0..5 {
            other.delete(&key(&format!("/w/{n}"))).await?;
            other
                .put(&key(&format!("/w/{}", n + 5)), format!("round {round}"))
                .await?;
        }
        for n in 0..3 {
            other.put(&key(&format!("/w/{n}")), "made anew").await?;
        }
        let end = key(&format!("/w/end{round}"));
        other.put(&end, "").await?;
        wire.mend();
        picture
            .until(&mut watch, |picture| picture.entries.contains_key(&end))
            .await?;
        same_as_store(&*other, "/w", &picture).await?;
    }
    // The handle may have lost its session meanwhile, and tells so or not: it ends here.
    let _ = registry.close().await;
    other.close().await
}

/// L2. A waiter whose own session ends learns it at once.
pub async fn a_waiter_learns_of_its_sessions_end(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let held = acquire(&one, "/l").await?;
    let session = other.session().live()?;
    let waiting = tokio::spawn({
        let lock = other.lock(&key("/l"));
        async move { lock.acquire().await }
    });
    let queue = one.lock(&key("/l"));
    let queue = &queue;
    eventually(PATIENCE, || async move {
        queue.contenders().await.is_ok_and(|all| all.len() == 2)
    })
    .await;
    cluster.revoke(session).await;
    let told = within(PATIENCE, waiting).await.expect("it does not panic");
    assert!(
        matches!(told, Err(Error::SessionExpired { .. } | Error::HoldLost { .. })),
        "{told:?}"
    );
    held.release().await?;
    other.wait_connected(PATIENCE).await?;
    assert_ne!(other.session().live()?, session);
    acquire(&other, "/l").await?.release().await?;
    other.close().await?;
    one.close().await
}

/// E3. A leader whose session another hand ended learns it, and the next candidate leads.
pub async fn a_leader_learns_of_its_sessions_end(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let leadership = one.election(&key("/e")).campaign("one").await?;
    cluster.revoke(one.session().live()?).await;
    within(PATIENCE, leadership.lost()).await;
    let next = within(PATIENCE, other.election(&key("/e")).campaign("other")).await?;
    assert!(next.token() > leadership.token());
    assert!(matches!(leadership.publish("late").await, Err(Error::HoldLost { .. })));
    next.resign().await?;
    other.close().await?;
    one.close().await
}

/// E3, F5. A candidate that waits while the store is down leads when it comes to its turn.
pub async fn a_campaign_goes_on_over_a_restart(cluster: &impl Cluster) -> Result<()> {
    let one = cluster.connect_with(patient(cluster)).await?;
    let other = cluster.connect_with(patient(cluster)).await?;
    let leadership = one.election(&key("/e")).campaign("one").await?;
    let election = other.election(&key("/e"));
    let waiting = campaigning(&election, "other");
    standing(&election, 2).await;
    cluster.kill().await;
    cluster.restart().await;
    one.wait_connected(PATIENCE).await?;
    assert!(!leadership.is_lost(), "a restart takes it from nobody");
    let token = leadership.token();
    leadership.resign().await?;
    let next = within(PATIENCE, waiting).await.expect("it does not panic")?;
    assert!(next.token() > token);
    let leader = within(PATIENCE, election.leader()).await?.expect("one leads");
    assert_eq!(leader.token, next.token());
    next.resign().await?;
    other.close().await?;
    one.close().await
}

/// S5. A registration comes back by itself after its session expired, and is put once.
pub async fn an_expired_registration_comes_back(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let k = key("/workers/w");
    let mut watch = other.watch(WatchRequest::new(&k, WatchScope::Key)).await?;
    let registration = one.register(&k, "1").await?;
    let mut events = Vec::new();
    for _ in 0..2 {
        let session = one.session().live()?;
        // Before the next put: a watch may pass over a key that is deleted and put again at once.
        hear(
            &mut watch,
            &mut events,
            |event| matches!(event, Event::Created(entry) if entry.session == Some(session)),
        )
        .await?;
        cluster.revoke(session).await;
        let mut states = registration.state();
        let back = states.wait_for(|state| matches!(state, Registered::There(id, _) if *id != session));
        within(PATIENCE, back).await.expect("it is kept");
        let entry = other.get(&k, Read::Linearizable).await?.expect("it is back");
        assert_ne!(entry.session, Some(session));
    }
    let session = one.session().live()?;
    hear(
        &mut watch,
        &mut events,
        |event| matches!(event, Event::Created(entry) if entry.session == Some(session)),
    )
    .await?;
    registration.unregister().await?;
    hear(
        &mut watch,
        &mut events,
        |event| matches!(event, Event::Deleted { last, .. } if last.session == Some(session)),
    )
    .await?;
    let updated = events.iter().any(|event| matches!(event, Event::Updated(_)));
    assert!(!updated, "put more than once: {events:?}");
    other.close().await?;
    one.close().await
}

/// Reads a watch until it has told of such an event.
async fn hear(watch: &mut Watch, events: &mut Vec<Event>, wanted: impl Fn(&Event) -> bool) -> Result<()> {
    while !events.iter().any(&wanted) {
        match within(PATIENCE, watch.next()).await.expect("a watch goes on")? {
            WatchItem::Changes(changes) => events.extend(changes),
            WatchItem::Synced(_) | WatchItem::Reset => {}
        }
    }
    Ok(())
}

/// S5. A registration that ends while the store is away is deleted once the store is back, though its session lives on.
pub async fn a_registration_ends_though_the_store_is_away(cluster: &impl Cluster) -> Result<()> {
    let options = Options {
        request_timeout: Duration::from_secs(1),
        ..patient(cluster)
    };
    let (registry, wire) = cluster.connect_through(options).await?;
    let other = cluster.connect().await?;
    let session = registry.session().live()?;
    let dropped = registry.register(&key("/workers/dropped"), "").await?;
    let unregistered = registry.register(&key("/workers/unregistered"), "").await?;
    wire.cut();
    drop(dropped);
    let unregistering = tokio::spawn(unregistered.unregister());
    // So long that the first attempts have failed.
    for _ in 0..2 {
        let health = registry.health().await;
        assert!(matches!(health, Err(Error::Unavailable { .. })), "{health:?}");
    }
    wire.mend();
    within(PATIENCE, unregistering).await.expect("it does not panic")?;
    let (others, workers) = (&other, &Prefix::from(key("/workers")));
    eventually(PATIENCE, || async move {
        others
            .count(workers, Read::Linearizable)
            .await
            .is_ok_and(|count| count == 0)
    })
    .await;
    assert_eq!(
        registry.session().live()?,
        session,
        "the keys did not go with the session"
    );
    registry.close().await?;
    other.close().await
}

/// R5, S7. A store that stands still for a while loses nothing acknowledged, and no handle has to be opened anew.
pub async fn a_paused_store_loses_nothing_acknowledged(cluster: &impl Cluster) -> Result<()> {
    let quick = quick(cluster);
    let bound = quick.request_timeout + LATE;
    let registry: Arc<dyn Registry> = cluster.connect_with(quick).await?;
    registry.put(&key("/a"), "before").await?;
    cluster.pause().await;
    let write = within(bound, registry.put(&key("/b"), "paused")).await;
    assert!(
        matches!(write, Err(Error::OutcomeUnknown { .. } | Error::Unavailable { .. })),
        "{write:?}"
    );
    cluster.resume().await;
    registry.wait_connected(PATIENCE).await?;
    assert_eq!(
        registry
            .get(&key("/a"), Read::Linearizable)
            .await?
            .expect("it stays")
            .value,
        "before"
    );
    registry.put(&key("/c"), "after").await?;
    registry.close().await
}
