//! Founders that are slow, restarted or replaced while a group is founded: one list founds one group.

use std::collections::BTreeMap;

use openraft::RaftLogReader;
use registry_api::{Key, Read};
use registry_tests::process::free_port;

use super::opening::serve;
use super::*;
use crate::founding::{Door, Group};
use crate::proto::registry::peer::v1 as message;
use crate::transport::Transport;

const PATIENCE: Duration = Duration::from_secs(60);
/// How long a founder is polled that is not to get on.
const A_WHILE: Duration = Duration::from_secs(3);

/// The list of three, of whom `b` is driven by the test.
struct Founders {
    dir: tempfile::TempDir,
    list: BTreeMap<String, String>,
    slow: Door,
    _stop: watch::Sender<bool>,
}

impl Founders {
    /// `b` responds to greetings, and founds only while the test polls it.
    async fn start() -> Self {
        let list = ["a", "b", "c"].map(|name| (name.to_owned(), format!("127.0.0.1:{}", free_port())));
        let list = BTreeMap::from(list);
        let transport = Transport::new(&RaftConfig::default()).unwrap();
        let slow = Door::new(Identity::random().member, "b", &list, transport.clone());
        let listener = tokio::net::TcpListener::bind(&list["b"]).await.unwrap();
        let (_stop, stopping) = watch::channel(false);
        tokio::spawn(serve(slow.clone(), transport, listener, stopping));
        Self {
            dir: tempfile::tempdir().unwrap(),
            list,
            slow,
            _stop,
        }
    }

    fn config(&self, name: &str) -> RaftConfig {
        RaftConfig {
            member: Some(name.into()),
            data_dir: Some(self.dir.path().join(name)),
            cluster: self.list.clone(),
            ..RaftConfig::default()
        }
    }

    fn starting(&self, name: &str) -> tokio::task::JoinHandle<Result<Member>> {
        let config = self.config(name);
        tokio::spawn(async move { Member::start(&config).await })
    }

    /// `a` and `c` found the group while `b` has heard `a` alone, and acknowledge a key.
    async fn found_without_b(&self) -> (Member, Member) {
        let a = self.starting("a");
        let heard = tokio::time::timeout(A_WHILE, self.slow.found()).await;
        assert!(heard.is_err(), "one is missing: {heard:?}");
        let (a, c) = tokio::join!(a, self.starting("c"));
        let (a, c) = (a.unwrap().unwrap(), c.unwrap().unwrap());
        let registry = a.connect(&Options::default()).await.unwrap();
        registry.put(&Key::parse("/a").unwrap(), "kept").await.unwrap();
        registry.close().await.unwrap();
        (a, c)
    }
}

async fn first_entry(member: &Member) -> Option<crate::proto::registry::log::v1::Entry> {
    let mut log = member.core.log.clone();
    let entries = log.try_get_log_entries(0..1).await.unwrap();
    entries.first().map(crate::wire::entry_to)
}

async fn kept(member: &Member) -> Option<String> {
    let registry = member.connect(&Options::default()).await.unwrap();
    let entry = registry.get(&Key::parse("/a").unwrap(), Read::Linearizable).await;
    registry.close().await.unwrap();
    entry
        .unwrap()
        .map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
}

/// It had heard `a` and not `c`, which is gone before it hears anything more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_founder_takes_the_group_from_any_member() {
    let founders = Founders::start().await;
    let (a, c) = founders.found_without_b().await;
    let cluster = a.core.identity().cluster;
    c.stop().await.unwrap();
    let group = registry_tests::within(PATIENCE, founders.slow.found()).await.unwrap();
    assert_eq!(group.cluster, cluster);
    a.stop().await.unwrap();
}

/// The whole member: with it the group has a majority again. Meanwhile the group has changed, which is no reason to begin
/// the log with another entry than it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founder_that_was_stopped_makes_a_majority_with_the_member_that_has_the_log() {
    let founders = Founders::start().await;
    let (a, c) = founders.found_without_b().await;
    let joining = RaftConfig {
        member: Some("d".into()),
        data_dir: Some(founders.dir.path().join("d")),
        listen: Some("127.0.0.1:0".into()),
        join: vec![founders.list["a"].clone()],
        ..RaftConfig::default()
    };
    let d = registry_tests::within(PATIENCE, Member::start(&joining)).await.unwrap();
    c.stop().await.unwrap();
    // The same disk under the same id, by the directory that it would have had.
    let directory = Directory::open(&founders.dir.path().join("b"), "b", || Identity {
        member: founders.slow.greeting().id,
        ..Identity::of_no_group()
    });
    drop(directory.unwrap());
    let Founders { dir, list, _stop, .. } = founders;
    _stop.send_replace(true);
    let config = RaftConfig {
        member: Some("b".into()),
        data_dir: Some(dir.path().join("b")),
        cluster: list,
        ..RaftConfig::default()
    };
    let b = registry_tests::within(PATIENCE, async {
        loop {
            // The address is free once the test's server has stopped.
            match Member::start(&config).await {
                Ok(member) => return member,
                Err(Error::Unavailable { .. }) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await;
    assert_eq!(kept(&b).await.as_deref(), Some("kept"));
    assert_eq!(first_entry(&b).await, first_entry(&a).await);
    for member in [a, b, d] {
        member.stop().await.unwrap();
    }
}

/// A lost disk and an unreachable member are a minority each: what was acknowledged is not founded over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_founds_no_second_group_while_a_member_of_the_first_is_away() {
    let founders = Founders::start().await;
    let (a, c) = founders.found_without_b().await;
    let cluster = a.core.identity().cluster;
    for member in [a, c] {
        member.stop().await.unwrap();
    }
    std::fs::remove_dir_all(founders.dir.path().join("c")).unwrap();
    let replaced = founders.starting("c");
    let second = tokio::time::timeout(A_WHILE, founders.slow.found()).await;
    assert!(second.is_err(), "a second group was founded: {second:?}");
    assert!(!replaced.is_finished(), "the replaced one has founded a group");

    let a = founders.starting("a");
    let group = registry_tests::within(PATIENCE, founders.slow.found()).await.unwrap();
    assert_eq!(group.cluster, cluster);
    let refused = registry_tests::within(PATIENCE, replaced).await.unwrap().unwrap_err();
    assert!(
        matches!(&refused, Error::Storage { reason, .. } if reason.contains("with other data")),
        "{refused}"
    );
    a.await.unwrap().unwrap().stop().await.unwrap();
}

/// Between the two rounds of a founder a disk is replaced, and another founder proposes the group with the new one.
#[tokio::test]
async fn a_founder_takes_its_proposal_back_when_another_group_is_proposed() {
    let list: BTreeMap<_, _> = ["a", "b", "c"]
        .map(|name| (name.to_owned(), format!("{name}:1")))
        .into();
    let door = |id, name| Door::new(id, name, &list, Transport::new(&RaftConfig::default()).unwrap());
    let group = |c| Group::of([(1, "a"), (2, "b"), (c, "c")].map(|(id, name)| (id, peer(name))).into());
    let (own, other) = (group(3), group(4));
    let greeting = |group: &Group, list: &BTreeMap<String, String>| message::Greeting {
        id: 2,
        name: "b".into(),
        list: list.clone().into_iter().collect(),
        proposed: bytes::Bytes::copy_from_slice(&group.cluster),
        ..message::Greeting::default()
    };

    let same = door(1, "a");
    same.propose(&own);
    assert_eq!(*same.respond(&greeting(&own, &list)).proposed, own.cluster);
    // Those of another list found nothing with this member.
    same.respond(&greeting(&other, &BTreeMap::new()));
    assert!(same.decide(&own));
    // It is decided: whoever asks is told so, and the other proposal comes too late.
    let told = same.respond(&greeting(&other, &list));
    assert_eq!(*told.cluster, own.cluster);
    assert!(told.membership.is_some());

    let overtaken = door(1, "a");
    overtaken.propose(&own);
    let told = overtaken.respond(&greeting(&other, &list));
    assert!(told.membership.is_none());
    assert!(!overtaken.decide(&own), "two groups were founded");
}

fn peer(name: &str) -> crate::types::Peer {
    crate::types::Peer {
        name: name.into(),
        address: format!("{name}:1"),
    }
}
