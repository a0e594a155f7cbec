//! Groups of several members: how they are founded, and what a follower does.

#![allow(clippy::unwrap_used)]

mod harness;

use std::time::Duration;

use harness::{Group, PATIENCE, options};
use registry_api::{Error, Options, Read, Revision, WatchFrom, WatchRequest, WatchScope};
use registry_raft::{Member, RaftConfig};
use registry_tests::{key, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_member_writes_and_reads() {
    let group = Group::start(3).await;
    for at in 0..3 {
        let registry = group.connect(at).await;
        let k = key(&format!("/k/{at}"));
        registry.put(&k, at.to_string()).await.unwrap();
        for other in 0..3 {
            let other = group.connect(other).await;
            let entry = other.get(&k, Read::Linearizable).await.unwrap().unwrap();
            assert_eq!(entry.value, at.to_string());
            other.close().await.unwrap();
        }
        registry.close().await.unwrap();
    }
    let ids: Vec<_> = group
        .member(0)
        .status()
        .members
        .iter()
        .map(|member| member.id)
        .collect();
    assert_eq!(ids.len(), 3);
    for at in 1..3 {
        let same: Vec<_> = group
            .member(at)
            .status()
            .members
            .iter()
            .map(|member| member.id)
            .collect();
        assert_eq!(same, ids, "one group was founded");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_put_survives_the_leader() {
    let mut group = Group::start(3).await;
    let follower = group.follower().await;
    let registry = group.connect(follower).await;
    for round in 0..3 {
        registry.put(&key("/a"), round.to_string()).await.unwrap();
        let leader = group.leader().await;
        if leader == follower {
            break;
        }
        group.stop(leader).await;
        let entry = registry.get(&key("/a"), Read::Linearizable).await.unwrap().unwrap();
        assert_eq!(entry.value, round.to_string());
        registry.put(&key("/b"), round.to_string()).await.unwrap();
        group.restart(leader).await;
    }
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_disk_under_a_known_name_is_refused() {
    let mut group = Group::start(3).await;
    let follower = group.follower().await;
    let registry = group.connect(group.leader().await).await;
    registry.put(&key("/a"), "1").await.unwrap();
    group.stop(follower).await;
    let listed = group.configs[follower].clone();
    std::fs::remove_dir_all(listed.data_dir.clone().unwrap()).unwrap();
    let mut joining = listed.clone();
    joining.listen = Some(std::mem::take(&mut joining.cluster)[listed.member.as_deref().unwrap()].clone());
    joining.join = group.addresses();
    for config in [listed, joining] {
        let refused = within(PATIENCE, async {
            loop {
                match Member::start(&config).await.unwrap_err() {
                    // One that was refused before lets go of its port when its threads have ended.
                    Error::Unavailable { .. } => tokio::time::sleep(Duration::from_millis(20)).await,
                    refused => return refused,
                }
            }
        });
        let refused = refused.await;
        assert!(
            matches!(&refused, Error::Storage { reason, .. } if reason.contains("members remove")),
            "{refused}"
        );
    }
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_alone_of_a_list_founds_nothing() {
    let group = Group::new(3);
    let alone = tokio::time::timeout(Duration::from_secs(2), Member::start(&group.configs[0])).await;
    assert!(alone.is_err(), "it started without the others");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_that_differ_found_nothing() {
    let mut group = Group::new(2);
    group.configs[1].cluster.insert("c".into(), "127.0.0.1:9".into());
    let (one, other) = (group.configs[0].clone(), group.configs[1].clone());
    let refused = within(PATIENCE, async {
        tokio::select! {
            one = Member::start(&one) => one,
            other = Member::start(&other) => other,
        }
    });
    let refused = refused.await.unwrap_err();
    assert!(
        matches!(&refused, Error::Config { reason, .. } if reason.contains("another list")),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_handle_goes_on_to_the_next_member() {
    let mut group = Group::start(3).await;
    let remote = RaftConfig::remote(group.addresses());
    let registry = registry_raft::connect(&remote, &options()).await.unwrap();
    let session = registry.session().live().unwrap();
    for round in 0..3 {
        registry.put(&key("/a"), round.to_string()).await.unwrap();
        let leader = group.leader().await;
        group.stop(leader).await;
        let entry = registry.get(&key("/a"), Read::Linearizable).await.unwrap().unwrap();
        assert_eq!(entry.value, round.to_string());
        group.restart(leader).await;
    }
    assert_eq!(registry.session().live().unwrap(), session);
    registry.close().await.unwrap();
}

/// Whoever it asks first says where the leader is, and is asked no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_handle_goes_to_the_leader() {
    let group = Group::start(3).await;
    let follower = group.follower().await;
    let mut addresses = group.addresses();
    addresses.rotate_left(follower);
    let registry = registry_raft::connect(&RaftConfig::remote(addresses), &options())
        .await
        .unwrap();
    // One that is told to one who leads no more by then is followed by the next.
    let there = async {
        loop {
            registry.put(&key("/a"), "1").await.unwrap();
            let endpoint = registry.health().await.unwrap().endpoint;
            if endpoint == group.addresses()[group.leader().await] {
                return;
            }
        }
    };
    within(PATIENCE, there).await;
    // A handle that knows one member alone stays with it.
    let alone = RaftConfig::remote([group.addresses()[follower].clone()]);
    let alone = registry_raft::connect(&alone, &options()).await.unwrap();
    alone.put(&key("/a"), "2").await.unwrap();
    assert_eq!(alone.health().await.unwrap().endpoint, group.addresses()[follower]);
    alone.close().await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_only_stale_reads_are_answered_until_it_is_back() {
    let mut group = Group::start(3).await;
    let at = group.follower().await;
    let quick = Options {
        request_timeout: Duration::from_secs(2),
        ..options()
    };
    let registry = group.member(at).connect(&quick).await.unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    registry.get(&key("/a"), Read::Linearizable).await.unwrap();
    let others: Vec<_> = (0..3).filter(|other| *other != at).collect();
    for other in &others {
        group.stop(*other).await;
    }
    let started = std::time::Instant::now();
    let read = registry.get(&key("/a"), Read::Linearizable).await;
    assert!(matches!(read, Err(Error::Unavailable { .. })), "{read:?}");
    let write = registry.put(&key("/a"), "2").await;
    assert!(
        matches!(write, Err(Error::Unavailable { .. } | Error::OutcomeUnknown { .. })),
        "{write:?}"
    );
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(registry.get(&key("/a"), Read::Stale).await.unwrap().unwrap().value, "1");
    group.restart(others[0]).await;
    registry.wait_connected(PATIENCE).await.unwrap();
    within(PATIENCE, async {
        while registry.put(&key("/a"), "3").await.is_err() {}
    })
    .await;
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_changes_of_the_leader_keep_no_dead_session() {
    let group = Group::start(3).await;
    let wire = registry_tests::Wire::to(group.addresses()[0].parse().unwrap()).await;
    let remote = RaftConfig::remote([wire.address().to_string()]);
    let eight = Options {
        session_ttl: registry_api::SessionTtl::new(Duration::from_secs(8)).unwrap(),
        ..options()
    };
    let dead = registry_raft::connect(&remote, &eight).await.unwrap();
    dead.put_ephemeral(&key("/e"), "").await.unwrap();
    let registry = group.connect(1).await;
    wire.cut();
    let cut = std::time::Instant::now();
    // A leader for five seconds each: none of them sees the whole TTL pass.
    while registry.get(&key("/e"), Read::Linearizable).await.unwrap().is_some() {
        assert!(
            cut.elapsed() < Duration::from_secs(40),
            "the elections keep the dead session"
        );
        let before = std::time::Instant::now();
        while before.elapsed() < Duration::from_secs(5) {
            if registry.get(&key("/e"), Read::Linearizable).await.unwrap().is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let next = (group.leader().await + 1) % 3;
        let name = group.member(next).name().to_owned();
        let change = registry_raft::MemberChange::Transfer { name };
        group.member(next).change_members(change).await.unwrap();
    }
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_gone_is_called_with_pauses() {
    let mut group = Group::start(3).await;
    let gone = group.follower().await;
    let registry = group.connect(group.leader().await).await;
    group.stop(gone).await;
    // Somebody else has its address, and hangs up.
    let address = group.configs[gone].cluster[group.configs[gone].member.as_deref().unwrap()].clone();
    let there = tokio::net::TcpListener::bind(address).await.unwrap();
    let writing = tokio::spawn(async move {
        while registry.put(&key("/a"), "1").await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    let mut calls = 0_u32;
    let counting = async {
        loop {
            drop(there.accept().await.unwrap());
            calls += 1;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(2), counting).await.is_err());
    writing.abort();
    // One way pauses for 50 ms, and each of several heartbeats calls once; without the pause it is a thousand and more.
    assert!((1..400).contains(&calls), "{calls} calls in two seconds");
}

/// A member of each comes up where the other's was: everybody knows the address, and nobody takes what comes from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_on_one_network_never_mix() {
    let (mut one, mut other) = tokio::join!(Group::start(3), Group::start(3));
    let put = async |group: &Group, at: usize, value: &'static str| {
        let registry = group.connect(at).await;
        registry.put(&key("/whose"), value).await.unwrap();
        registry.close().await.unwrap();
    };
    put(&one, 2, "one").await;
    put(&other, 2, "other").await;
    let address = |group: &Group| group.configs[2].cluster["c"].clone();
    one.configs[2].listen = Some(address(&other));
    other.configs[2].listen = Some(address(&one));
    one.stop(2).await;
    other.stop(2).await;
    one.restart(2).await;
    other.restart(2).await;
    let held = async |group: &Group| group.member(2).status().revision;
    let before = (held(&one).await, held(&other).await);
    for n in 0..50 {
        put(&one, n % 2, "one").await;
        put(&other, n % 2, "other").await;
    }
    // Nothing has come where it does not belong, of its own group or the other.
    assert_eq!((held(&one).await, held(&other).await), before);
    for (group, value) in [(&one, "one"), (&other, "other")] {
        assert_eq!(group.member(0).status().members.len(), 3);
        for at in 0..2 {
            let registry = group.connect(at).await;
            let entry = registry.get(&key("/whose"), Read::Linearizable).await.unwrap().unwrap();
            assert_eq!(entry.value, value);
            registry.close().await.unwrap();
        }
    }
    // Each where it belongs again, they catch up.
    for group in [&mut one, &mut other] {
        group.stop(2).await;
        group.configs[2].listen = None;
    }
    one.restart(2).await;
    other.restart(2).await;
    for (group, value) in [(&one, "one"), (&other, "other")] {
        let registry = group.connect(2).await;
        let entry = registry.get(&key("/whose"), Read::Linearizable).await.unwrap().unwrap();
        assert_eq!(entry.value, value);
        registry.close().await.unwrap();
    }
}

/// A follower answers a stale read from its own copy, which may not hold yet what the Raft leader has acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_read_does_not_miss_the_handles_own_put() {
    let group = Group::start(3).await;
    let registry = group.connect(group.follower().await).await;
    let key = key("/own");
    for number in 0..500 {
        let revision = registry.put(&key, number.to_string()).await.unwrap();
        let entry = registry.get(&key, Read::Stale).await.unwrap();
        assert_eq!(entry.map(|entry| entry.mod_revision), Some(revision), "put {number}");
    }
}

/// A member that lags behind does not take the present revision for one that is still to come.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lags_refuses_no_revision_that_was_given_out() {
    let group = Group::start(3).await;
    let (leader, follower) = (group.leader().await, group.follower().await);
    let (writing, watching) = (group.connect(leader).await, group.connect(follower).await);
    let key = key("/new");
    for number in 0..200 {
        let after = writing.put(&key, number.to_string()).await.unwrap();
        let request = |after| WatchRequest {
            from: WatchFrom::After(after),
            ..WatchRequest::new(&key, WatchScope::Key)
        };
        watching.watch(request(after)).await.unwrap();
        let refused = watching.watch(request(Revision(after.0 + 1_000))).await;
        assert!(matches!(refused, Err(Error::InvalidRequest(_))), "{refused:?}");
    }
}
