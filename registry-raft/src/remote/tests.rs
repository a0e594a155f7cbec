//! Where a handle goes for a hint, and where not.

use registry_api::{Key, Options, Prefix};
use registry_tests::cluster::eventually;

use super::*;
use crate::{Member, RaftConfig};

/// How long one call may take. A member that is asked answers long before, on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(10);

async fn asked(remote: &Remote) -> Result<Answer> {
    remote.call(Call::Status(proto::StatusRequest {}), PATIENCE).await
}

fn hint(address: &str) -> proto::Response {
    let leader = address.into();
    proto::Response { leader, answer: None }
}

/// A member that hangs may still be the leader that the others name: who waited for it once does not go back for that.
#[tokio::test]
async fn a_hint_to_one_that_does_not_answer_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let start = async |name: &str| {
        let config = RaftConfig {
            data_dir: Some(dir.path().join(name)),
            listen: Some("127.0.0.1:0".into()),
            ..RaftConfig::default()
        };
        Member::start(&config).await.unwrap()
    };
    let (one, other) = (start("one").await, start("other").await);
    // Connections to it are made by the system, and nobody reads from them.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = |member: &Member| member.address().unwrap().to_string();
    let addresses = vec![mute.local_addr().unwrap().to_string(), address(&one), address(&other)];
    let (mute, one_at, other_at) = (&addresses[0], &addresses[1], &addresses[2]);
    let transport = Transport::new(&RaftConfig::remote(addresses.clone())).unwrap();
    let remote = Remote::new(transport, addresses.clone());

    let silence = asked(&remote).await;
    assert!(matches!(silence, Err(Error::OutcomeUnknown { .. })), "{silence:?}");
    asked(&remote).await.unwrap();
    assert_eq!(remote.endpoint(), *one_at);
    remote.led(hint(mute));
    assert_eq!(remote.endpoint(), *one_at, "it goes back to who does not answer");
    // Nor anywhere that the handle was not told of.
    remote.led(hint("127.0.0.1:9"));
    remote.led(hint(""));
    assert_eq!(remote.endpoint(), *one_at);

    remote.led(hint(other_at));
    asked(&remote).await.unwrap();
    assert_eq!(remote.endpoint(), *other_at);
    for member in [one, other] {
        member.stop().await.unwrap();
    }
}

/// A watch that began after a revision knows what was there then, and is told what went while the only member was started
/// again from a snapshot, which leaves nothing of the history.
#[tokio::test]
async fn a_watch_after_a_revision_bridges_a_gap_without_history() {
    let dir = tempfile::tempdir().unwrap();
    let config = |port: u16| RaftConfig {
        data_dir: Some(dir.path().join("data")),
        listen: Some(format!("127.0.0.1:{port}")),
        ..RaftConfig::default()
    };
    let key = |name: &str| Key::parse(&format!("/{name}")).unwrap();
    let options = Options::default();
    let member = Member::start(&config(0)).await.unwrap();
    let port = member.address().unwrap().port();
    let registry = member.connect(&options).await.unwrap();
    registry.put(&key("goes"), "1").await.unwrap();
    let after = registry.put(&key("stays"), "1").await.unwrap();
    let remote = RaftConfig::remote([format!("127.0.0.1:{port}")]);
    let remote = crate::connect(&remote, &options).await.unwrap();
    let request = WatchRequest {
        from: WatchFrom::After(after),
        ..WatchRequest::new(Prefix::root(), WatchScope::Subtree)
    };
    let mut watch = remote.watch(request).await.unwrap();
    let mut next = async || {
        tokio::time::timeout(3 * PATIENCE, watch.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    };
    assert_eq!(next().await, WatchItem::Synced(after));

    registry.close().await.unwrap();
    member.stop().await.unwrap();
    let elsewhere = Member::start(&config(0)).await.unwrap();
    let registry = elsewhere.connect(&options).await.unwrap();
    registry.delete(&key("goes")).await.unwrap();
    registry.put(&key("comes"), "1").await.unwrap();
    registry.close().await.unwrap();
    elsewhere.snapshot().await.unwrap();
    eventually(PATIENCE, || async { elsewhere.status().snapshot_bytes > 0 }).await;
    elsewhere.stop().await.unwrap();

    let again = Member::start(&config(port)).await.unwrap();
    let WatchItem::Changes(events) = next().await else {
        panic!("nothing was told")
    };
    assert!(
        matches!(&events[..], [Event::Created(comes), Event::Deleted { last: goes, .. }]
            if comes.key == key("comes") && goes.key == key("goes")),
        "{events:?}"
    );
    assert!(matches!(next().await, WatchItem::Synced(_)));
    drop(watch);
    remote.close().await.unwrap();
    again.stop().await.unwrap();
}
