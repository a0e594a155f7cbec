//! Groups of members that are processes: killed, stopped for a while and cut off from each other.

#![cfg(feature = "raft")]
#![allow(clippy::unwrap_used)]

mod book;
mod failover;
mod harness;
mod leadership;
mod losing;
mod members;
mod quorum;
mod reads;
mod seen;
mod three;

use std::sync::Arc;
use std::time::Duration;

use harness::{Group, NAMES, PATIENCE, options};
use registry::{Config, Error, Expect, Options, Overrides, Read, Registry, Watch, WatchItem, WatchRequest, WatchScope};
use registry_tests::{key, within};

/// Asks again until the answer is yes.
async fn until(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, asking).await.is_err() {
        panic!("not within {PATIENCE:?}: {what}");
    }
}

async fn value(registry: &Arc<dyn Registry>, path: &str, read: Read) -> Option<String> {
    let entry = registry.get(&key(path), read).await.unwrap();
    entry.map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
}

/// Waits until the watch tells of that value.
async fn tells(watch: &mut Watch, value: &str) {
    let told = async {
        loop {
            match watch.next().await.unwrap().unwrap() {
                WatchItem::Changes(events) if events.iter().any(|event| event.entry().value == value) => return,
                _ => {}
            }
        }
    };
    within(PATIENCE, told).await;
}

/// What kvrocks' Raft engine and raftexample lose: a put is acknowledged by a follower, and the leader dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_answered_by_a_follower_whose_leader_dies_is_durable() {
    let mut group = Group::start(3).await;
    for round in 0..4 {
        let leader = group.leader().await;
        let follower = (leader + 1) % 3;
        let registry = group.connect(follower).await;
        let putting = tokio::spawn({
            let registry = registry.clone();
            async move {
                for n in 0..u32::MAX {
                    let put = registry.put(&key(&format!("/{round}/{n}")), n.to_string()).await;
                    put.unwrap_or_else(|error| panic!("put {n}: {error}"));
                    if n % 16 == 15 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            }
        });
        until("some are put", || async {
            value(&registry, &format!("/{round}/50"), Read::Stale).await.is_some()
        })
        .await;
        group.kill(leader).await;
        let at = registry
            .count(&key(&format!("/{round}")).into(), Read::Stale)
            .await
            .unwrap();
        until("more are put", || async {
            registry
                .count(&key(&format!("/{round}")).into(), Read::Stale)
                .await
                .unwrap()
                > at + 20
        })
        .await;
        putting.abort();
        let acknowledged = registry
            .count(&key(&format!("/{round}")).into(), Read::Linearizable)
            .await
            .unwrap();
        for n in 0..acknowledged.saturating_sub(1) {
            let found = value(&registry, &format!("/{round}/{n}"), Read::Linearizable).await;
            assert_eq!(found, Some(n.to_string()), "an acknowledged put is lost");
        }
        group.restart(&[leader]).await;
        registry.close().await.unwrap();
    }
}

/// What kvrocks' Raft engine does: it applies the tail of its log on restart, committed or not. Here it waits for a majority,
/// and then, as the others have less, it is committed: the tail was there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uncommitted_tail_is_not_applied_on_restart() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let others: Vec<_> = (0..3).filter(|at| *at != leader).collect();
    let quick = Options {
        request_timeout: Duration::from_secs(2),
        ..options()
    };
    let registry = registry::raft::connect(&group.remote(leader), &quick).await.unwrap();
    until("it is committed", || async {
        registry.put(&key("/a"), "committed").await.is_ok()
    })
    .await;
    let revision = group.status(leader).await.unwrap().revision;
    for other in &others {
        group.kill(*other).await;
    }
    let put = registry.put(&key("/a"), "the tail").await;
    assert!(matches!(put, Err(Error::OutcomeUnknown { .. })), "{put:?}");
    group.kill(leader).await;
    group.restart(&[leader]).await;
    let alone = group.status(leader).await.unwrap();
    assert_eq!(
        (alone.revision, alone.leader()),
        (revision, None),
        "what nobody else has was applied"
    );
    group.restart(&others[..1]).await;
    let registry = group.connect(leader).await;
    assert_eq!(value(&registry, "/a", Read::Linearizable).await.unwrap(), "the tail");
    registry.close().await.unwrap();
}

/// Everything a handle has goes over from one leader to the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_loses_no_session_no_event_and_no_lock() {
    let mut group = Group::start(3).await;
    let registry = group.connect_all().await;
    let session = registry.session().live().unwrap();
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    let leadership = registry.election(&key("/e")).campaign("me").await.unwrap();
    registry.put_ephemeral(&key("/eph"), "").await.unwrap();
    let mut watch = registry
        .watch(WatchRequest::new(key("/n"), WatchScope::Key))
        .await
        .unwrap();
    let mut next = 0_u32;
    for round in 0..4 {
        let leader = group.leader().await;
        for _ in 0..20 {
            registry.put(&key("/n"), next.to_string()).await.unwrap();
            next += 1;
        }
        if round % 2 == 0 {
            group.kill(leader).await;
        } else {
            group.process(leader).pause();
        }
        for _ in 0..20 {
            registry.put(&key("/n"), next.to_string()).await.unwrap();
            next += 1;
        }
        if round % 2 == 0 {
            group.restart(&[leader]).await;
        } else {
            group.process(leader).resume();
        }
    }
    let mut told = 0;
    while told < next {
        match within(PATIENCE, watch.next()).await.unwrap().unwrap() {
            WatchItem::Changes(events) => {
                for event in events {
                    assert_eq!(event.entry().value, told.to_string(), "an event is lost, or came twice");
                    told += 1;
                }
            }
            WatchItem::Synced(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(registry.session().live().unwrap(), session);
    assert!(!held.is_lost() && !leadership.is_lost());
    assert!(value(&registry, "/eph", Read::Linearizable).await.is_some());
    held.release().await.unwrap();
    leadership.resign().await.unwrap();
    registry.close().await.unwrap();
}

/// A counter that is only ever raised by one: what was acknowledged counts once, whatever happens to the leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_counter_under_failovers_counts_every_success_once() {
    let mut group = Group::start(3).await;
    let setup = group.connect_all().await;
    setup.put(&key("/counter"), "0").await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut workers = Vec::new();
    for _ in 0..4 {
        let (registry, stopped) = (group.connect_all().await, stopped.clone());
        workers.push(tokio::spawn(async move {
            let (mut sure, mut unknown) = (0_u64, 0_u64);
            while !*stopped.borrow() {
                let Ok(Some(entry)) = registry.get(&key("/counter"), Read::Linearizable).await else {
                    continue;
                };
                let count: u64 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                let expect = Expect::ModRevision(entry.mod_revision);
                match registry.put_if(&key("/counter"), expect, (count + 1).to_string()).await {
                    Ok(_) => sure += 1,
                    Err(Error::Conflict { .. } | Error::Unavailable { .. } | Error::SessionExpired { .. }) => {}
                    Err(Error::OutcomeUnknown { .. }) => unknown += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            registry.close().await.unwrap();
            (sure, unknown)
        }));
    }
    for round in 0..4 {
        let leader = group.leader().await;
        let before: u64 = value(&setup, "/counter", Read::Linearizable)
            .await
            .unwrap()
            .parse()
            .unwrap();
        if round % 2 == 0 {
            group.kill(leader).await;
        } else {
            group.process(leader).pause();
        }
        until("the counting goes on", || async {
            let now = setup.get(&key("/counter"), Read::Linearizable).await;
            now.is_ok_and(|now| {
                let now = now.unwrap();
                std::str::from_utf8(&now.value).unwrap().parse::<u64>().unwrap() > before + 5
            })
        })
        .await;
        if round % 2 == 0 {
            group.restart(&[leader]).await;
        } else {
            group.process(leader).resume();
        }
    }
    stop.send_replace(true);
    let (mut sure, mut unknown) = (0, 0);
    for worker in workers {
        let counted = within(PATIENCE, worker).await.unwrap();
        (sure, unknown) = (sure + counted.0, unknown + counted.1);
    }
    let count: u64 = value(&setup, "/counter", Read::Linearizable)
        .await
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        (sure..=sure + unknown).contains(&count),
        "{sure} were acknowledged, {unknown} are unknown, and the counter says {count}"
    );
    setup.close().await.unwrap();
}

/// openraft's issue 2080: a leader that a majority does not hear keeps a follower between the two sides from voting. If the
/// leader does not stop its heartbeats by itself nobody is elected, however long one waits. Three times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partial_partition_does_not_keep_the_majority_from_electing() {
    let mut group = Group::start(5).await;
    for round in 0..3 {
        let old = group.leader().await;
        let others: Vec<_> = (0..5).filter(|at| *at != old).collect();
        let (bridge, rest, dead) = (others[0], [others[1], others[2]], others[3]);
        group.kill(dead).await;
        for one in rest {
            group.net.cut(old, one);
        }
        let among = [bridge, rest[0], rest[1]];
        let next = group.leader_of(&among, &among).await;
        assert_ne!(next, old);
        let registry = group.connect(rest[0]).await;
        registry.put(&key("/a"), round.to_string()).await.unwrap();
        group.net.mend();
        let back = group.connect(old).await;
        assert_eq!(value(&back, "/a", Read::Linearizable).await.unwrap(), round.to_string());
        // Five survive two.
        group.kill(old).await;
        registry.put(&key("/a"), "without two").await.unwrap();
        registry.close().await.unwrap();
        group.restart(&[old, dead]).await;
    }
}

/// A program that links the crate is a member with the config of a served one: it stores, votes, and stops with its handle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_is_a_member_with_the_config_of_a_served_one() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let (here, other) = ((leader + 1) % 3, (leader + 2) % 3);
    group.kill(here).await;
    let config = Config::load(Some(&group.config_file(NAMES[here])), &Overrides::default()).unwrap();
    let registry = registry::connect(&config).await.unwrap();
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    // Its vote is needed now.
    group.kill(leader).await;
    until("another leads", || async {
        registry.put(&key("/a"), "1").await.is_ok()
    })
    .await;
    let remote = group.connect(here).await;
    assert_eq!(value(&remote, "/a", Read::Linearizable).await.unwrap(), "1");
    remote.close().await.unwrap();
    assert!(!held.is_lost());
    held.release().await.unwrap();
    registry.close().await.unwrap();
    assert!(
        group.status(here).await.is_none(),
        "it answers after its handle is closed"
    );
    group.restart(&[here, leader]).await;
    assert_eq!(
        value(&group.connect(other).await, "/a", Read::Linearizable)
            .await
            .unwrap(),
        "1"
    );
}

/// The list founds the group, once: a member whose list is another later says so, and nothing comes of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_was_changed_later_is_warned_of() {
    let mut group = Group::start(3).await;
    group.kill(2).await;
    let file = group.config_file("c");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\na = ", "\nx = ")).unwrap();
    let log = group.directory().join("c.log");
    let mut command = harness::serving(&file);
    command.stderr(std::fs::File::create(&log).unwrap());
    let _c = harness::ready(command).await;
    let said = std::fs::read_to_string(log).unwrap();
    assert!(
        said.contains("registry.raft.cluster founded the group and changes it no more"),
        "{said}"
    );
    assert!(
        said.contains("x is no member any more") && said.contains("a at "),
        "{said}"
    );
    let members = group.run("b", &["members"]).await;
    let names: Vec<_> = members
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    assert_eq!(names, ["a", "b", "c"]);
}

/// A member that comes back from a partition has no larger term: it follows whom the others follow. Three times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_comes_back_does_not_depose_the_leader() {
    let group = Group::start(3).await;
    let (mut undisturbed, mut deposed) = (0, Vec::new());
    while undisturbed < 3 {
        let leader = group.leader().await;
        let away = (leader + 1) % 3;
        let term = group.status(leader).await.unwrap().term;
        group.net.isolate(away);
        let registry = group.connect(leader).await;
        // Several elections could be held meanwhile.
        for n in 0..30 {
            registry.put(&key("/a"), n.to_string()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        group.net.mend();
        let back = group.connect(away).await;
        assert_eq!(value(&back, "/a", Read::Linearizable).await.unwrap(), "29");
        registry.put(&key("/a"), "30").await.unwrap();
        back.close().await.unwrap();
        registry.close().await.unwrap();
        let after = group.status(away).await.unwrap();
        match after.term == term && group.leader().await == leader {
            true => undisturbed += 1,
            // An election in these seconds may be the machine's fault; as often as not it is none.
            false => deposed.push((term, after.term)),
        }
        assert!(deposed.len() < 3, "the terms went {deposed:?}");
    }
}
