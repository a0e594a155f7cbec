//! Servers that come back with an older copy of their data.

use std::path::Path;
use std::process::Command;

use registry_api::Prefix;

use super::*;

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "{from:?} is not copied");
}

/// A watch that goes on delivers the state that there is now, and the changes after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_follows_servers_that_went_back() {
    let mut servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    registry.put(&key("/kept"), "old").await.unwrap();
    registry.put(&key("/removed"), "old").await.unwrap();
    let (data, saved) = (servers.file("1"), servers.file("saved"));
    servers.kill(0);
    copy(&data, &saved);
    servers.spawn(0);
    servers.ready().await;
    put_at_last(&*registry, "/kept", "new").await;
    for count in 0..50 {
        put_at_last(&*registry, "/later", &count.to_string()).await;
    }
    registry.delete(&key("/removed")).await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    let token = held.token();
    held.release().await.unwrap();
    let mirror = registry.mirror(Prefix::root(), WatchScope::Subtree).await.unwrap();
    let holds = |path: &str| {
        let entry = mirror.get(&key(path))?;
        Some(String::from_utf8(entry.value.to_vec()).unwrap())
    };
    assert_eq!(
        (holds("/kept"), holds("/later")),
        (Some("new".into()), Some("49".into()))
    );

    servers.kill(0);
    copy(&saved, &data);
    servers.spawn(0);
    servers.ready().await;
    until("the mirror is as the store", 2 * PATIENCE, async || {
        holds("/kept").as_deref() == Some("old") && holds("/removed").is_some() && holds("/later").is_none()
    })
    .await;
    registry.wait_connected(PATIENCE).await.unwrap();
    registry.put(&key("/later"), "again").await.unwrap();
    until("the mirror goes on", PATIENCE, async || holds("/later").is_some()).await;
    // L3. Revisions are given out again, fencing tokens are not.
    let next = registry.lock(&key("/lock")).acquire_within(PATIENCE).await.unwrap();
    assert!(next.token() > token, "{} after {token}", next.token());
    registry.close().await.unwrap();
}
