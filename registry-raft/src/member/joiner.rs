//! A member that joins slowly: it has applied entries from before its admission for longer than a start waits.

use std::sync::atomic::{AtomicU64, Ordering};

use registry_api::{Key, Read};
use registry_tests::cluster::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::founding::Door;
use crate::transport::Transport;

const PATIENCE: Duration = Duration::from_secs(60);

/// A way to a member that lets so many bytes pass, of all connections together, and then holds up the rest.
struct Narrow {
    address: SocketAddr,
    pass: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Narrow {
    async fn to(listener: TcpListener, member: SocketAddr, pass: u64) -> Self {
        let address = listener.local_addr().unwrap();
        let pass = Arc::new(AtomicU64::new(pass));
        let left = pass.clone();
        let task = tokio::spawn(async move {
            while let Ok((caller, _)) = listener.accept().await {
                tokio::spawn(carry(caller, member, left.clone()));
            }
        });
        Self { address, pass, task }
    }

    fn widen(&self) {
        self.pass.store(u64::MAX / 2, Ordering::Relaxed);
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(caller: TcpStream, member: SocketAddr, pass: Arc<AtomicU64>) -> std::io::Result<()> {
    let member = TcpStream::connect(member).await?;
    let (mut from_caller, mut to_caller) = caller.into_split();
    let (mut from_member, mut to_member) = member.into_split();
    let back = tokio::spawn(async move { tokio::io::copy(&mut from_member, &mut to_caller).await });
    let mut bytes = vec![0; 16 << 10];
    loop {
        let count = from_caller.read(&mut bytes).await?;
        if count == 0 {
            break;
        }
        let takes = |left: u64| left.checked_sub(count as u64);
        // What is small always passes: greetings and heartbeats.
        while count > 4096 && pass.fetch_update(Ordering::Relaxed, Ordering::Relaxed, takes).is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        to_member.write_all(&bytes[..count]).await?;
    }
    back.abort();
    Ok(())
}

/// It takes longer than a start waits for a quorum, ten seconds, and learns of its admission last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_takes_long_to_join_is_not_taken_for_a_removed_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = |name: &str| RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.path().join(name)),
        listen: Some("127.0.0.1:0".into()),
        ..RaftConfig::default()
    };
    let first = Member::start(&config("a")).await.unwrap();
    let registry = first.connect(&Options::default()).await.unwrap();
    for n in 0..20 {
        let key = Key::parse(&format!("/k/{n}")).unwrap();
        registry.put(&key, vec![n; 800_000]).await.unwrap();
    }
    let listens = format!("127.0.0.1:{}", registry_tests::process::free_port());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // The first of some messages of 2 MiB.
    let way = Narrow::to(listener, listens.parse().unwrap(), 5 << 20).await;
    let joining = RaftConfig {
        listen: Some(listens),
        advertise: Some(way.address.to_string()),
        join: vec![first.address().unwrap().to_string()],
        ..config("b")
    };
    let began = Instant::now();
    let joined = registry_tests::within(PATIENCE, Member::start(&joining)).await.unwrap();
    assert!(joined.core.membership().0.is_some(), "it has applied nothing yet");
    let us = joined.core.identity().member;
    assert!(
        joined.core.membership().1.get_node(&us).is_none(),
        "it was quick: {:?}",
        began.elapsed()
    );
    // Longer than it takes to find that a member was removed.
    let ended = tokio::time::timeout(Duration::from_secs(4), joined.ended()).await;
    assert!(ended.is_err(), "{ended:?}");
    way.widen();
    eventually(PATIENCE, || async {
        joined.core.membership().1.get_node(&us).is_some()
    })
    .await;
    let local = joined.connect(&Options::default()).await.unwrap();
    let last = local
        .get(&Key::parse("/k/19").unwrap(), Read::Linearizable)
        .await
        .unwrap();
    assert_eq!(last.unwrap().value, vec![19; 800_000]);
    for handle in [local, registry] {
        handle.close().await.unwrap();
    }
    for member in [joined, first] {
        member.stop().await.unwrap();
    }
}

/// What one member says of another: neither one that it has not heard of yet nor its own member was removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_is_reported_as_removed_once_the_group_has_removed_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = |name: &str, join: Vec<String>| RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.path().join(name)),
        listen: Some("127.0.0.1:0".into()),
        join,
        ..RaftConfig::default()
    };
    let first = Member::start(&config("a", Vec::new())).await.unwrap();
    let join = vec![first.address().unwrap().to_string()];
    let joined = Member::start(&config("b", join)).await.unwrap();
    let (core, id) = (first.core(), joined.core.identity().member);
    let door = Door::new(
        core.identity().member,
        "a",
        &Default::default(),
        Transport::new(&RaftConfig::default()).unwrap(),
    );
    door.open(core.clone());
    let greeting = |id| crate::proto::registry::peer::v1::Greeting {
        cluster: bytes::Bytes::copy_from_slice(&core.identity().cluster),
        id,
        ..Default::default()
    };
    let removed = |id| door.respond(&greeting(id)).removed;
    assert!(!removed(id) && !removed(id + 1) && !removed(core.identity().member));
    first
        .change_members(MemberChange::Remove { name: "b".into() })
        .await
        .unwrap();
    assert!(removed(id) && !removed(id + 1));
    registry_tests::within(PATIENCE, joined.ended()).await;
    joined.stop().await.unwrap();
    first.stop().await.unwrap();
}
