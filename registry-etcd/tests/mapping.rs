//! What of the registry is what in etcd, and etcd's own bounds.

#![allow(clippy::unwrap_used)]

mod harness;

use std::process::Command;
use std::time::Duration;

use harness::{Servers, connect, until};
use registry_api::{Error, Expect, Prefix, Read, Txn};
use registry_etcd::{Endpoints, EtcdConfig};
use registry_tests::key;
use registry_tests::watch::Picture;

#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_sees_plain_names_and_values() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.endpoints()).await;
    registry.put(&key("/jobs/compact"), "now").await.unwrap();
    let held = registry.lock(&key("/jobs")).acquire().await.unwrap();
    let listed = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &cluster.endpoint(0), "get", "--prefix", "/registry"])
        .output()
        .expect("etcdctl is missing: apt-get install etcd-client");
    let listed = String::from_utf8(listed.stdout).unwrap();
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines[..2], ["/registry/jobs/compact", "now"]);
    assert!(lines[2].starts_with("/registry~/lock/1/jobs/"), "{lines:?}");
    held.release().await.unwrap();
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
    let list = registry_api::List::new(key("/large"));
    let entries = registry.list_all(list.clone()).await.unwrap();
    assert_eq!(entries.len(), 90);
    assert!(entries.iter().all(|entry| entry.value == large));
    let children = registry_api::List {
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
