//! All members hold the same, and it can be seen.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::{Group, options};
use registry_api::{Key, Options};
use registry_raft::RaftConfig;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn members_hold_the_same_while_writes_go_on() {
    let mut group = Group::start(3).await;
    let follower = group.follower().await;
    let stop = Arc::new(AtomicBool::new(false));
    let registry = group.connect(follower).await;
    registry.put_ephemeral(&Key::parse("/e").unwrap(), "1").await.unwrap();
    let writing = {
        let stop = stop.clone();
        tokio::spawn(async move {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let key = Key::parse(&format!("/a/{}", number % 100)).unwrap();
                registry.put(&key, number.to_string()).await.unwrap();
                number += 1;
            }
            registry
        })
    };
    // Whichever member is asked first.
    let mut seen = Vec::new();
    for at in 0..3 {
        let mut addresses = group.addresses();
        addresses.rotate_left(at);
        let verified = registry_raft::verify(&RaftConfig::remote(addresses), &options())
            .await
            .unwrap();
        assert!(verified.is_complete() && verified.is_equal(), "{verified:?}");
        assert_eq!(verified.members.len(), 3);
        seen.push(verified.members[0].digest.clone());
    }
    seen.dedup();
    assert_eq!(seen.len(), 3, "other states had the same digest");
    stop.store(true, Ordering::Relaxed);
    let registry = writing.await.unwrap();
    assert!(
        registry
            .get(&Key::parse("/a/0").unwrap(), registry_api::Read::Stale)
            .await
            .unwrap()
            .is_some()
    );

    // One that does not answer is told of; the others are compared.
    let stopped = (0..3).find(|at| *at != follower).unwrap();
    group.stop(stopped).await;
    let others: Vec<_> = group
        .addresses()
        .into_iter()
        .enumerate()
        .filter(|(at, _)| *at != stopped)
        .map(|(_, a)| a)
        .collect();
    let _leader = group.leader().await;
    let options = Options {
        request_timeout: Duration::from_secs(5),
        ..options()
    };
    let asking = async {
        loop {
            // Until the group has another Raft leader it can't be asked.
            if let Ok(verified) = registry_raft::verify(&RaftConfig::remote(others.clone()), &options).await {
                return verified;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let verified = registry_tests::within(Duration::from_secs(60), asking).await;
    assert!(verified.is_equal() && !verified.is_complete(), "{verified:?}");
    let silent = verified.members.iter().filter(|member| member.error.is_some()).count();
    assert_eq!(silent, 1, "{verified:?}");
}
