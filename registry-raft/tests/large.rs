//! What does not fit one message comes in several, and the handle's caller never sees it.

// A test may fail.
#![allow(clippy::unwrap_used)]

use registry_api::{Key, List, Options, Prefix, Read, Txn};
use registry_raft::{Member, RaftConfig};

/// A member with its data in that directory, on a free port.
async fn serve(dir: &std::path::Path) -> Member {
    let mut config = RaftConfig::default();
    config.data_dir = Some(dir.join("data"));
    config.listen = Some("127.0.0.1:0".into());
    Member::start(&config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_children_than_fit_a_message() {
    let dir = tempfile::tempdir().unwrap();
    let member = serve(dir.path()).await;
    let remote = RaftConfig::remote([member.address().unwrap().to_string()]);
    let registry = registry_raft::connect(&remote, &Options::default()).await.unwrap();
    // 12 MiB of names. The first has a key below it, which sorts after its neighbour.
    let mut names: Vec<_> = (0..50_000).map(|n| format!("{n:0250}")).collect();
    names.push(format!("{}!", names[0]));
    names.sort();
    let parent = Key::parse("/p").unwrap();
    for some in names.chunks(registry_api::MAX_OPERATIONS) {
        let puts = some.iter().map(|name| parent.child(name).unwrap());
        registry
            .commit(puts.fold(Txn::new(), |txn, key| txn.put(&key, "")))
            .await
            .unwrap();
    }
    registry
        .put(&parent.child(&names[0]).unwrap().child("x").unwrap(), "")
        .await
        .unwrap();
    let children = registry
        .children(&Prefix::from(&parent), Read::Linearizable)
        .await
        .unwrap();
    assert!(children == names, "{} of {} came", children.len(), names.len());
    let page = registry
        .list(List {
            limit: usize::MAX,
            ..List::new(&parent)
        })
        .await
        .unwrap();
    assert!(!page.entries.is_empty() && page.next.is_some());
    registry.close().await.unwrap();
    member.stop().await.unwrap();
}
