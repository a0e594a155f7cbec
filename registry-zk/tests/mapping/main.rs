//! How keys lie in ZooKeeper, seen by its other clients.

#![allow(clippy::unwrap_used)]

mod births;
mod foreign;
#[path = "../harness/mod.rs"]
mod harness;
mod large;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use harness::{MARK, Servers, anyone, config, until};
use registry_api::{
    Entry, Error, Expect, List, Options, Prefix, Read, Registry, Revision, Txn, WatchRequest, WatchScope,
};
use registry_tests::key;
use registry_tests::watch::{Picture, same_as_store};
use registry_zk::ReadMode;
use zookeeper_client::Client;

const PATIENCE: Duration = Duration::from_secs(30);
/// How long what nobody put may stay, on a machine that does other things as well.
const SOON: Duration = Duration::from_secs(10);

/// None of these tests is about sessions, so theirs outlive what a large request costs a server.
fn options() -> Options {
    Options {
        request_timeout: Duration::from_secs(60),
        ..Options::default()
    }
}

async fn connect(servers: &str) -> Arc<dyn Registry> {
    registry_zk::connect(&config(servers), &options()).await.unwrap()
}

/// The data of a node; none where there is no node.
async fn data(raw: &Client, path: &str) -> Option<Vec<u8>> {
    raw.get_data(path).await.ok().map(|(data, _)| data)
}

async fn get(registry: &Arc<dyn Registry>, path: &str) -> Option<Entry> {
    registry.get(&key(path), Read::Linearizable).await.unwrap()
}

async fn children(registry: &Arc<dyn Registry>, path: &str) -> Vec<String> {
    let prefix = Prefix::parse(path).unwrap();
    registry.children(&prefix, Read::Linearizable).await.unwrap()
}

/// Everything below the namespace's node.
async fn nodes(raw: &Client) -> Vec<String> {
    let (mut found, mut left) = (Vec::new(), vec!["/registry".to_owned()]);
    while let Some(path) = left.pop() {
        for name in raw.list_children(&path).await.unwrap_or_default() {
            found.push(format!("{path}/{name}"));
            left.push(format!("{path}/{name}"));
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn other_clients_see_plain_names_and_values() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    registry.put(&key("/jobs/compact"), "now").await.unwrap();
    registry.put(&key("/empty"), "").await.unwrap();
    let held = registry.lock(&key("/jobs")).acquire().await.unwrap();
    assert_eq!(data(&raw, "/registry/jobs/compact").await.unwrap(), b"now");
    assert_eq!(data(&raw, "/registry/empty").await.unwrap(), b"");
    assert_eq!(data(&raw, "/registry/jobs").await.unwrap(), MARK);
    assert_eq!(raw.list_children("/registry~/lock/1/jobs").await.unwrap().len(), 1);
    held.release().await.unwrap();

    // What looks like the backend's own is kept apart from it.
    registry.put(&key("/odd"), MARK).await.unwrap();
    assert_ne!(data(&raw, "/registry/odd").await.unwrap(), MARK);
    assert_eq!(get(&registry, "/odd").await.unwrap().value, MARK);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_are_zxids() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let made = registry.put(&key("/a"), "1").await.unwrap();
    let put = registry.put(&key("/a"), "2").await.unwrap();
    let (_, stat) = raw.get_data("/registry/a").await.unwrap();
    let zxids = [stat.czxid, stat.mzxid].map(|zxid| Revision(zxid.cast_unsigned()));
    assert_eq!(zxids, [made, put]);
    let entry = get(&registry, "/a").await.unwrap();
    assert_eq!([entry.create_revision, entry.mod_revision], zxids);
    // What anybody else changes moves them on.
    raw.create("/theirs", b"", &anyone()).await.unwrap();
    let (_, theirs) = raw.get_data("/theirs").await.unwrap();
    let next = registry.put(&key("/b"), "").await.unwrap();
    assert!(put.0 < theirs.czxid.cast_unsigned() && theirs.czxid.cast_unsigned() < next.0);
    // A lock's token as well, in whichever way it was taken.
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    let queue = "/registry~/lock/1/l";
    let contenders = raw.list_children(queue).await.unwrap();
    let (_, stat) = raw.get_data(&format!("{queue}/{}", contenders[0])).await.unwrap();
    assert_eq!(held.token().get(), stat.czxid);
    held.release().await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_children_keeps_its_node_and_is_another() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let first = registry.put(&key("/a"), "1").await.unwrap();
    registry.put(&key("/a/b/c"), "below").await.unwrap();
    assert!(registry.delete(&key("/a")).await.unwrap());
    assert_eq!(data(&raw, "/registry/a").await.unwrap(), MARK);
    assert!(get(&registry, "/a").await.is_none());
    assert!(!registry.delete(&key("/a")).await.unwrap());
    let again = registry.put_if(&key("/a"), Expect::Absent, "2").await.unwrap();
    let entry = get(&registry, "/a").await.unwrap();
    // The node was there all the time, and its birth is of the second key.
    assert!(registry.capabilities().fresh_create_revision);
    assert_eq!((entry.create_revision, entry.mod_revision), (again, again));
    let (_, stat) = raw.get_data("/registry/a").await.unwrap();
    assert_eq!(stat.czxid.cast_unsigned(), first.0);
    registry.delete(&key("/a/b/c")).await.unwrap();
    assert_eq!(nodes(&raw).await, ["/registry/a"]);
    registry.delete(&key("/a")).await.unwrap();
    assert_eq!(nodes(&raw).await, Vec::<String>::new());
    registry.close().await.unwrap();
}

/// As a put does in a request of its own, before the one with the key.
async fn make_marks(raw: &Client, paths: &[&str]) {
    let mut marks = raw.new_multi_writer();
    for path in paths {
        marks.add_create(path, MARK, &anyone()).unwrap();
    }
    marks.add_set_data("/registry~/rev/00", b"", None).unwrap();
    marks.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_nobody_put_never_stays() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let gone = async |what: &str| {
        until(what, SOON, async || nodes(&raw).await.is_empty()).await;
    };
    // A delete takes it along.
    registry.put(&key("/a/b/c/d"), "").await.unwrap();
    registry.delete(&key("/a/b/c/d")).await.unwrap();
    assert_eq!(nodes(&raw).await, Vec::<String>::new());
    registry.put(&key("/a/b/c/d"), "").await.unwrap();
    registry.delete_prefix(&Prefix::parse("/a/b/c").unwrap()).await.unwrap();
    assert_eq!(nodes(&raw).await, Vec::<String>::new());
    // A session's end can't: the sweep does.
    let other = connect(&servers.addresses()).await;
    other.put_ephemeral(&key("/e/f/g"), "").await.unwrap();
    other.close().await.unwrap();
    gone("the parents of an ephemeral key").await;
    // A put whose program ended half way leaves a chain without an end, and a session that ends.
    let cut_off = connect(&servers.addresses()).await;
    make_marks(&raw, &["/registry/half", "/registry/half/made"]).await;
    cut_off.close().await.unwrap();
    gone("a half-finished chain").await;
    // It is in nobody's way before.
    make_marks(&raw, &["/registry/half", "/registry/half/made"]).await;
    registry.put(&key("/half/made/key"), "whole").await.unwrap();
    registry.put_if(&key("/half"), Expect::Absent, "").await.unwrap();
    assert_eq!(get(&registry, "/half/made/key").await.unwrap().value, "whole");
    registry.delete_prefix(&Prefix::root()).await.unwrap();
    gone("everything").await;

    // The sweep goes on when the handle that swept is gone.
    let next = connect(&servers.addresses()).await;
    make_marks(&raw, &["/registry/half"]).await;
    registry.close().await.unwrap();
    gone("a leaf that is none").await;
    next.close().await.unwrap();
}

/// What was put is no placeholder, however empty it is, and whatever was deleted below it.
#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_was_put_stays() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    for value in ["", "v"] {
        registry.put(&key("/p"), value).await.unwrap();
        registry.put(&key("/p/q/r"), "").await.unwrap();
        registry.delete_prefix(&Prefix::parse("/p/q").unwrap()).await.unwrap();
        assert_eq!(get(&registry, "/p").await.unwrap().value, value);
        registry.put(&key("/p/q/r"), "").await.unwrap();
        registry.delete(&key("/p/q/r")).await.unwrap();
        assert_eq!(get(&registry, "/p").await.unwrap().value, value);
        assert_eq!(children(&registry, "/p").await, Vec::<String>::new());
    }
    registry.close().await.unwrap();
}

/// A sweep that meets changes on its way looks again, also when nothing happens any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_nobody_put_goes_though_others_are_at_work() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let other = connect(&servers.addresses()).await;
    other.put_ephemeral(&key("/e/f/g"), "").await.unwrap();
    // What the making and deleting of other keys does to the guards, while the sweep looks there and walks the whole too.
    let busy = async {
        loop {
            let mut guards = raw.new_multi_writer();
            for part in 0..64 {
                let guard = format!("/registry~/rev/{part:02x}");
                guards.add_set_data(&guard, b"", None).unwrap();
            }
            guards.commit().await.unwrap();
        }
    };
    let closed = async {
        other.close().await.unwrap();
        busy.await
    };
    tokio::time::timeout(Duration::from_secs(6), closed).await.unwrap_err();
    until("the parents are gone", SOON, async || nodes(&raw).await.is_empty()).await;
    registry.close().await.unwrap();
}

/// Puts and deletes of a key and of what is below it, by several handles at once: none that was acknowledged is lost, and
/// nothing stays.
#[tokio::test(flavor = "multi_thread")]
async fn deletes_and_creates_that_race_lose_nothing() {
    let servers = Servers::start(1).await;
    let raw = servers.raw().await;
    let mut racers = Vec::new();
    for racer in 0..6 {
        let registry = connect(&servers.addresses()).await;
        racers.push(tokio::spawn(async move {
            let own = key(&format!("/p/q/{racer}"));
            for round in 0..40 {
                registry.put(&own, round.to_string()).await.unwrap();
                match (racer + round) % 4 {
                    0 => drop(registry.put(&key("/p"), "").await.unwrap()),
                    1 => drop(registry.delete(&key("/p")).await.unwrap()),
                    2 => drop(registry.delete(&key("/p/q")).await.unwrap()),
                    _ => drop(registry.put(&key("/p/q"), "").await.unwrap()),
                }
                // Nobody else writes this one.
                let entry = get(&registry, own.as_str()).await.expect("nobody deleted it");
                assert_eq!(entry.value, round.to_string());
                assert!(registry.delete(&own).await.unwrap());
                assert_eq!(get(&registry, own.as_str()).await, None);
            }
            registry
        }));
    }
    let mut handles = Vec::new();
    for racer in racers {
        handles.push(racer.await.unwrap());
    }
    handles[0].delete(&key("/p")).await.unwrap();
    handles[0].delete(&key("/p/q")).await.unwrap();
    until("nothing is left", PATIENCE, async || nodes(&raw).await.is_empty()).await;
    for handle in handles {
        handle.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_on_absent_keys_hold_to_the_end() {
    let servers = Servers::start(1).await;
    let (one, other) = (connect(&servers.addresses()).await, connect(&servers.addresses()).await);
    // Each puts its own key if the other's is absent: at most one of the two is ever there. They have no parent, which
    // one of the two would find made by the other.
    for round in 0..60 {
        let (a, b) = (key(&format!("/{round}-a")), key(&format!("/{round}-b")));
        let put = |registry: Arc<dyn Registry>, own: &registry_api::Key, others: &registry_api::Key| {
            let txn = Txn::new().when(others, Expect::Absent).put(own, "");
            tokio::spawn(async move { registry.commit(txn).await })
        };
        let (first, second) = (put(one.clone(), &a, &b), put(other.clone(), &b, &a));
        let (first, second) = (first.await.unwrap(), second.await.unwrap());
        assert!(first.is_ok() != second.is_ok(), "{first:?}, {second:?}");
        let failed = first.err().or(second.err()).unwrap();
        assert!(matches!(failed, Error::Conflict { .. }), "{failed:?}");
    }
    one.close().await.unwrap();
    other.close().await.unwrap();
}

/// Nothing guards a recipe's keys against being taken for earlier ones of their names.
#[tokio::test(flavor = "multi_thread")]
async fn a_contenders_name_is_used_once() {
    let cluster = Servers::start(1).await;
    let registry = connect(&cluster.addresses()).await;
    let mut names = Vec::new();
    for _ in 0..3 {
        let held = registry.lock(&key("/lock")).acquire().await.unwrap();
        names.push(held.condition().key);
        held.release().await.unwrap();
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_after_the_servers_is_where_everything_lies() {
    let servers = Servers::start(1).await;
    let raw = servers.raw().await;
    let below = |path: &str| format!("{}{path}", servers.addresses());
    let (one, other) = (connect(&below("/apps/one")).await, connect(&below("/apps/other")).await);
    let mut watch = one
        .watch(WatchRequest::new(Prefix::root(), WatchScope::Subtree))
        .await
        .unwrap();
    one.put(&key("/a/b"), "one").await.unwrap();
    other.put(&key("/a/b"), "other").await.unwrap();
    let (held, also) = (
        one.lock(&key("/l")).acquire().await.unwrap(),
        other.lock(&key("/l")).try_acquire().await.unwrap(),
    );
    assert!(also.is_some(), "another's lock");
    held.release().await.unwrap();
    assert_eq!(data(&raw, "/apps/one/registry/a/b").await.unwrap(), b"one");
    assert_eq!(data(&raw, "/apps/other/registry/a/b").await.unwrap(), b"other");
    let (mut picture, path) = (Picture::default(), key("/a/b"));
    picture
        .until(&mut watch, |picture| picture.entries.contains_key(&path))
        .await
        .unwrap();
    same_as_store(&*one, "/", &picture).await.unwrap();
    one.delete(&path).await.unwrap();
    assert_eq!(
        raw.list_children("/apps/one/registry").await.unwrap(),
        Vec::<String>::new()
    );
    one.close().await.unwrap();
    other.close().await.unwrap();
}

/// R4, the other way: a small write before a linearizable read, on an ensemble whose servers are not all as new.
#[tokio::test(flavor = "multi_thread")]
async fn write_backed_reads_see_every_acknowledged_write() {
    let servers = Servers::start(3).await;
    let mut handles = Vec::new();
    for number in 0..3 {
        let mut config = config(&servers.address(number));
        config.read = ReadMode::Write;
        handles.push(registry_zk::connect(&config, &options()).await.unwrap());
    }
    let mut expected = BTreeMap::new();
    for round in 0..60 {
        let (writer, path) = (&handles[round % 3], format!("/k/{}", round % 5));
        writer.put(&key(&path), round.to_string()).await.unwrap();
        expected.insert(path, round.to_string());
        let reader = &handles[(round + 1) % 3];
        let there = reader.list_all(List::new(key("/k"))).await.unwrap();
        let there = there
            .iter()
            .map(|entry| (entry.key.to_string(), String::from_utf8(entry.value.to_vec()).unwrap()))
            .collect::<BTreeMap<_, _>>();
        assert_eq!(there, expected);
    }
    // Each read had its write, also where the server was as new without it.
    let (_, clock) = servers.raw().await.get_data("/registry~/clock").await.unwrap();
    assert!(clock.version >= 60, "{clock:?}");
    for handle in handles {
        handle.close().await.unwrap();
    }
}
