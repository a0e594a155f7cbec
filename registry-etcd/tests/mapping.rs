//! What of the registry is what in etcd, and etcd's own bounds.

#![allow(clippy::unwrap_used)]

mod harness;

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use harness::{Servers, connect, connect_with_ttl, until};
use registry_api::{Error, Event, Existing, Expect, Kind, List, Prefix, Read, Registry, SessionId, Txn, WatchItem};
use registry_etcd::{Endpoints, EtcdConfig};
use registry_tests::watch::Picture;
use registry_tests::{Wire, key, within};

const PATIENCE: Duration = Duration::from_secs(30);

fn etcdctl(cluster: &Servers, arguments: &[&str]) -> Vec<String> {
    let output = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &cluster.endpoint(0)])
        .args(arguments)
        .output()
        .expect("etcdctl is missing: apt-get install etcd-client");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_sees_plain_names_and_values_and_nothing_else() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    registry.put(&key("/jobs/compact"), "now").await.unwrap();
    registry.put_ephemeral(&key("/workers/ä b"), "here").await.unwrap();
    let held = registry.lock(&key("/jobs")).label("me").acquire().await.unwrap();
    let leadership = registry.election(&key("/jobs/all")).campaign("I").await.unwrap();

    let all = etcdctl(&cluster, &["get", "--prefix", ""]);
    let [
        job,
        now,
        worker,
        here,
        candidate,
        published,
        epoch,
        zero,
        contender,
        label,
    ] = &all[..]
    else {
        panic!("{all:?}");
    };
    assert_eq!(
        [job, now, worker, here],
        ["/registry/jobs/compact", "now", "/registry/workers/ä b", "here"]
    );
    assert!(candidate.starts_with("/registry~/election/2/jobs/all/"), "{candidate}");
    assert!(contender.starts_with("/registry~/lock/1/jobs/"), "{contender}");
    assert_eq!([published, label], ["I", "me"]);
    // The epoch of the namespace's fencing tokens, which stays.
    assert_eq!([epoch, zero], ["/registry~/epoch/0", "0"]);
    // A session is a lease by its number, and what is ephemeral is attached to it.
    let session = registry.session().live().unwrap().to_string();
    let lease = etcdctl(&cluster, &["lease", "timetolive", &session, "--keys"]).concat();
    assert!(lease.contains("granted with TTL(3s)"), "{lease}");
    assert!(
        [worker, candidate, contender]
            .iter()
            .all(|name| lease.contains(name.as_str())),
        "{lease}"
    );
    assert!(!lease.contains(job.as_str()), "{lease}");

    leadership.resign().await.unwrap();
    held.release().await.unwrap();
    registry.close().await.unwrap();
    assert_eq!(
        etcdctl(&cluster, &["get", "--prefix", ""]),
        ["/registry/jobs/compact", "now", "/registry~/epoch/0", "0"]
    );
    assert_eq!(etcdctl(&cluster, &["lease", "list"]), ["found 0 leases"]);
}

/// etcd reads past every name that was in a queue since the last compaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_contender_that_comes_back_has_its_old_name() {
    let cluster = Servers::start(1).await;
    let (one, other) = (connect(&cluster.endpoints()).await, connect(&cluster.endpoints()).await);
    let acquire = async |registry: &Arc<dyn Registry>| {
        let held = within(PATIENCE, registry.lock(&key("/lock")).acquire()).await.unwrap();
        let name = held.condition().key;
        (held, name)
    };
    let (held, name) = acquire(&one).await;
    held.release().await.unwrap();
    let (held, again) = acquire(&one).await;
    assert_eq!(again, name);
    held.release().await.unwrap();
    // One that finds it taken, and one that waits for another handle's.
    let (theirs, their_name) = acquire(&other).await;
    assert_ne!(their_name, name);
    assert!(one.lock(&key("/lock")).try_acquire().await.unwrap().is_none());
    let ((held, again), ()) = tokio::join!(acquire(&one), async {
        until("it waits", async || {
            other.lock(&key("/lock")).contenders().await.unwrap().len() == 2
        })
        .await;
        theirs.release().await.unwrap();
    });
    assert_eq!(again, name);
    // The name is in use.
    let elsewhere = one.lock(&key("/other")).acquire().await.unwrap();
    assert_ne!(elsewhere.condition().key.name(), name.name());
    held.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_other_clients_are_keys_where_they_can_be() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    let raw = cluster.raw().await;
    let lease = raw.lease_client().grant(60, None).await.unwrap().id();
    let mut kv = raw.kv_client();
    for name in [
        "/registry/a//b",
        "/registry/",
        "/registry//",
        "/registry/a/",
        "/registry/\u{1}",
    ] {
        kv.put(name, "no key", None).await.unwrap();
    }
    kv.put(&b"/registry/\xff"[..], "no text", None).await.unwrap();
    for name in ["/registryx", "/registr", "registry/a"] {
        kv.put(name, "another's", None).await.unwrap();
    }
    kv.put("/registry/theirs", "1", None).await.unwrap();
    let options = etcd_client::PutOptions::new().with_lease(lease);
    kv.put("/registry/z/leased", "2", Some(options)).await.unwrap();

    picture
        .until(&mut watch, |picture| picture.has("/z/leased", "2"))
        .await
        .unwrap();
    let there = registry.list_all(List::new(Prefix::root())).await.unwrap();
    assert_eq!(picture.entries.into_values().collect::<Vec<_>>(), there);
    let there: Vec<_> = there.iter().map(|entry| (entry.key.as_str(), entry.session)).collect();
    let theirs = SessionId(lease.cast_unsigned());
    assert_eq!(there, [("/theirs", None), ("/z/leased", Some(theirs))]);
    // One at a time, so that a page may hold none that is a key.
    let mut page = List::new(Prefix::root());
    page.limit = 1;
    assert_eq!(registry.list_all(page).await.unwrap().len(), 2);
    assert_eq!(
        registry.children(&Prefix::root(), Read::Linearizable).await.unwrap(),
        ["theirs", "z"]
    );
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await.unwrap(), 8);
    let refused = registry.put_ephemeral(&key("/z/leased"), "3").await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    registry.put(&key("/theirs"), "ours").await.unwrap();
    assert_eq!(registry.delete_prefix(&Prefix::root()).await.unwrap(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_take_over_is_told_as_a_delete_and_then_a_create() {
    let cluster = Servers::start(1).await;
    let (one, other) = (connect(&cluster.endpoints()).await, connect(&cluster.endpoints()).await);
    one.put_ephemeral(&key("/e"), "1").await.unwrap();
    let (mut watch, _) = Picture::of(&*other).await.unwrap();
    other.take_over(&key("/e"), "2", Kind::Ephemeral).await.unwrap();
    let mut told = Vec::new();
    while told.len() < 2 {
        if let WatchItem::Changes(events) = within(PATIENCE, watch.next()).await.unwrap().unwrap() {
            told.push(events);
        }
    }
    let [deleted, created] = &told[..] else { unreachable!() };
    let ([Event::Deleted { last, .. }], [Event::Created(entry)]) = (&deleted[..], &created[..]) else {
        panic!("{told:?}");
    };
    assert_eq!((&last.value[..], &entry.value[..]), (&b"1"[..], &b"2"[..]));
    assert!(deleted[0].revision() < entry.create_revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_take_over_whose_second_request_is_refused_leaves_the_key_deleted() {
    let cluster = Servers::start(1).await;
    let one = connect(&cluster.endpoints()).await;
    let other = connect_with_ttl(&cluster.endpoints(), Duration::from_secs(60)).await;
    one.put_ephemeral(&key("/e"), "1").await.unwrap();
    // What its handle has not learnt yet: the delete names no lease, the put one that is gone.
    let lease = other.session().live().unwrap().0.cast_signed();
    cluster.raw().await.lease_client().revoke(lease).await.unwrap();
    let taken = other.take_over(&key("/e"), "2", Kind::Ephemeral).await;
    let Err(Error::OutcomeUnknown { source, .. }) = &taken else {
        panic!("{taken:?}");
    };
    let cause = source.downcast_ref::<Error>();
    assert!(matches!(cause, Some(Error::SessionExpired { .. })), "{taken:?}");
    assert_eq!(one.get(&key("/e"), Read::Linearizable).await.unwrap(), None);
    // Nothing stands in the way of another.
    other.take_over(&key("/e"), "3", Kind::Persistent).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_take_over_whose_second_request_is_lost_leaves_the_key_deleted() {
    let cluster = Servers::start(1).await;
    let wire = Wire::to(cluster.endpoint(0).parse().unwrap()).await;
    let one = connect(&cluster.endpoints()).await;
    let other = connect(&[wire.address().to_string()]).await;
    one.put_ephemeral(&key("/e"), "1").await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*one).await.unwrap();
    // So slow that the delete is known here before it is there, and the put is not sent yet.
    wire.slow(Duration::from_millis(200));
    let taking = tokio::spawn(async move { other.take_over(&key("/e"), "2", Kind::Ephemeral).await });
    picture
        .until(&mut watch, |picture| picture.entries.is_empty())
        .await
        .unwrap();
    wire.cut();
    let taken = within(PATIENCE, taking).await.unwrap();
    assert!(matches!(taken, Err(Error::OutcomeUnknown { .. })), "{taken:?}");
    assert_eq!(one.get(&key("/e"), Read::Linearizable).await.unwrap(), None);
}

/// Another client recreates the key in the moment between the two requests of a take-over.
#[tokio::test(flavor = "multi_thread")]
async fn a_take_over_at_a_revision_never_takes_the_next_key_of_that_name() {
    let cluster = Servers::start(1).await;
    for conditional in [true, false] {
        let wire = Wire::to(cluster.endpoint(0).parse().unwrap()).await;
        let config = EtcdConfig::new(Endpoints::new([wire.address().to_string()]).unwrap());
        let options = registry_api::Options {
            session_ttl: registry_api::SessionTtl::new(Duration::from_secs(60)).unwrap(),
            request_timeout: Duration::from_secs(20),
            ..registry_api::Options::default()
        };
        let taker = registry_etcd::connect(&config, &options).await.unwrap();
        let (first, next) = (connect(&cluster.endpoints()).await, connect(&cluster.endpoints()).await);
        let name = key("/e");
        let old = first.put_ephemeral(&name, "first").await.unwrap();
        let (mut watch, mut picture) = Picture::of(&*next).await.unwrap();

        // So slow that the delete is known here long before the put that follows it is sent.
        wire.slow(Duration::from_millis(200));
        let mut txn = Txn::new().put_as(&name, "taken", Kind::Ephemeral, Existing::TakeOver);
        if conditional {
            txn = txn.when(&name, Expect::ModRevision(old));
        }
        let taking = tokio::spawn({
            let taker = taker.clone();
            async move { taker.commit(txn).await }
        });
        picture
            .until(&mut watch, |picture| picture.entries.is_empty())
            .await
            .unwrap();
        let theirs = next.put_ephemeral(&name, "next").await.unwrap();
        let taken = within(PATIENCE, taking).await.unwrap();
        let there = first.get(&name, Read::Linearizable).await.unwrap().unwrap();
        if conditional {
            let Err(Error::OutcomeUnknown { source, .. }) = &taken else {
                panic!("{taken:?}");
            };
            let cause = source.downcast_ref::<Error>();
            assert!(
                matches!(cause, Some(Error::Conflict { found, .. }) if *found == Some(theirs)),
                "{taken:?}"
            );
            assert_eq!((there.mod_revision, &there.value[..]), (theirs, &b"next"[..]));
        } else {
            assert_eq!(
                (there.mod_revision, &there.value[..]),
                (taken.unwrap().revision, &b"taken"[..])
            );
        }
        for registry in [taker, first, next] {
            wire.mend();
            registry.close().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_takes_too_few_operations_is_refused_by_name() {
    let cluster = Servers::start_with(1, &["--max-txn-ops=127"]).await;
    let config = EtcdConfig::new(Endpoints::new(cluster.endpoints()).unwrap());
    let refused = registry_etcd::connect(&config, &registry_api::Options::default()).await;
    assert!(
        matches!(&refused, Err(Error::Config { field, .. }) if field.contains("--max-txn-ops")),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_larger_than_etcd_is_set_to_take_is_refused_as_that_and_changes_nothing() {
    let cluster = Servers::start_with(1, &["--max-request-bytes=10000"]).await;
    let registry = connect(&cluster.endpoints()).await;
    let refused = registry.put(&key("/large"), vec![0; 20_000]).await;
    assert!(
        matches!(&refused, Err(Error::InvalidRequest(why)) if why.contains("--max-request-bytes")),
        "{refused:?}"
    );
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await.unwrap(), 0);
    registry.put(&key("/small"), "").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_leaves_the_outcome_unknown_until_there_is_room_again() {
    let cluster = Servers::start_with(1, &["--quota-backend-bytes=8000000"]).await;
    let registry = connect(&cluster.endpoints()).await;
    let session = registry.session().live().unwrap();
    let value = |number: u8| vec![number; registry_api::MAX_VALUE];
    let mut last = None;
    let full = loop {
        let next = last.map_or(0, |(number, _)| number + 1);
        match registry.put(&key("/a"), value(next)).await {
            Ok(revision) => last = Some((next, revision)),
            Err(error) => break error,
        }
        assert!(next < 20, "the quota is not kept");
    };
    assert!(matches!(full, Error::OutcomeUnknown { .. }), "{full:?}");
    let refused = registry.put_ephemeral(&key("/e"), "").await;
    assert!(matches!(refused, Err(Error::OutcomeUnknown { .. })), "{refused:?}");
    let (number, revision) = last.unwrap();
    let there = registry.list_all(List::new(Prefix::root())).await.unwrap();
    assert_eq!(there.len(), 1);
    let (there, next) = (&there[0], number + 1);
    // The first that was beyond the quota may be there, whole.
    assert!(
        (there.mod_revision == revision && there.value == value(number))
            || (there.mod_revision > revision && there.value == value(next)),
        "{} after {revision}: {}",
        there.mod_revision,
        there.value[0]
    );

    // What the page on etcd has an operator do.
    etcdctl(&cluster, &["compact", &revision.to_string()]);
    etcdctl(&cluster, &["defrag"]);
    etcdctl(&cluster, &["alarm", "disarm"]);
    registry.put(&key("/a"), "2").await.unwrap();
    assert_eq!(registry.session().live().unwrap(), session);
    registry.put_ephemeral(&key("/e"), "").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_beyond_etcds_bound_on_comparisons_is_applied_all_the_same() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    let deep = |number: usize| key(&format!("/{number}/b/c/d/e/f/g/h"));
    let txn = || {
        (0..64).fold(Txn::new(), |txn, number| {
            txn.put(&deep(number), "1")
                .when(&key(&format!("/c{number}")), Expect::Absent)
        })
    };
    registry.commit(txn()).await.unwrap();
    registry.put(&key("/c63"), "").await.unwrap();
    assert!(matches!(registry.commit(txn()).await, Err(Error::Conflict { key: k, .. }) if k == key("/c63")));
    registry.delete(&key("/c63")).await.unwrap();
    registry.delete_prefix(&Prefix::parse("/40").unwrap()).await.unwrap();
    registry.put_ephemeral(&key("/40"), "").await.unwrap();
    assert!(matches!(registry.commit(txn()).await, Err(Error::Refused { key: k, .. }) if k == deep(40)));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_come_in_pages_that_fit() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    let large = vec![b'x'; registry_api::MAX_VALUE];
    for number in 0..90 {
        registry
            .put(&key(&format!("/large/{number:02}")), large.clone())
            .await
            .unwrap();
    }
    let list = List::new(key("/large"));
    let entries = registry.list_all(list.clone()).await.unwrap();
    assert_eq!(entries.len(), 90);
    assert!(entries.iter().all(|entry| entry.value == large));
    let children = List {
        depth: registry_api::Depth::Children,
        ..list
    };
    assert_eq!(registry.list_all(children).await.unwrap().len(), 90);
    let (_, picture) = Picture::of(&*registry).await.unwrap();
    assert_eq!(picture.entries.len(), 90);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_ttl_leaves_no_lease() {
    let cluster = Servers::start(1).await;
    let config = EtcdConfig::new(Endpoints::new(cluster.endpoints()).unwrap());
    let mut options = registry_api::Options::default();
    for ttl in [Duration::from_secs(1), Duration::from_millis(2500)] {
        options.session_ttl = registry_api::SessionTtl::new(ttl).unwrap();
        let refused = registry_etcd::connect(&config, &options).await;
        assert!(matches!(refused, Err(Error::Config { .. })), "{refused:?}");
    }
    let leases = cluster.raw().await.lease_client().leases().await.unwrap();
    assert!(leases.leases().is_empty());
    options.session_ttl_bounds = registry_api::TtlBounds::Accept;
    let registry = registry_etcd::connect(&config, &options).await.unwrap();
    assert_eq!(registry.session().ttl(), Duration::from_secs(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_watch_ends_on_the_server() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    let watchers = "etcd_debugging_mvcc_watcher_total";
    let mut watches = Vec::new();
    for _ in 0..50 {
        watches.push(Picture::of(&*registry).await.unwrap().0);
    }
    until("they are there", async || cluster.metric(watchers).await == 50.0).await;
    watches.truncate(1);
    until("all but one are gone", async || cluster.metric(watchers).await == 1.0).await;
    registry.close().await.unwrap();
    until("the last one is gone", async || cluster.metric(watchers).await == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_at_the_same_time_are_each_answered_for_themselves() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    registry.put_ephemeral(&key("/e"), "").await.unwrap();
    let puts = (0..500).map(|number| {
        let registry = registry.clone();
        tokio::spawn(async move {
            // Every fiftieth is refused, and every third is of the same key.
            let path = match number {
                _ if number % 50 == 0 => format!("/e/{number}"),
                _ if number % 3 == 0 => "/same".into(),
                _ => format!("/{number}"),
            };
            (
                number,
                path.clone(),
                registry.put(&key(&path), number.to_string()).await,
            )
        })
    });
    for put in puts.collect::<Vec<_>>() {
        let (number, path, put) = put.await.unwrap();
        if number % 50 == 0 {
            assert!(matches!(put, Err(Error::Refused { .. })), "{put:?}");
            continue;
        }
        let entry = registry.get(&key(&path), Read::Linearizable).await.unwrap().unwrap();
        if path == "/same" {
            assert!(put.unwrap() <= entry.mod_revision);
        } else {
            assert_eq!(
                (put.unwrap(), entry.value),
                (entry.mod_revision, number.to_string().into())
            );
        }
    }
}
