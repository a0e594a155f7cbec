//! A snapshot that can't be written is tried again, and nothing else stops for it.

// A test may fail.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use registry_api::{Key, Options};
use registry_raft::{Member, RaftConfig};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_can_t_be_written_stops_nothing_and_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = RaftConfig::default();
    config.data_dir = Some(dir.path().join("data"));
    config.listen = Some("127.0.0.1:0".into());
    let member = Member::start(&config).await.unwrap();
    let registry = member.connect(&Options::default()).await.unwrap();
    let key = Key::parse("/a").unwrap();
    registry.put(&key, "before").await.unwrap();

    // Whoever runs the test may write anywhere; nobody writes below a file.
    let snapshots = dir.path().join("data/snapshots");
    std::fs::remove_dir(&snapshots).unwrap();
    std::fs::write(&snapshots, "").unwrap();
    member.snapshot().await.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(500) {
        registry.put(&key, "meanwhile").await.unwrap();
    }
    assert_eq!(member.status().snapshot_bytes, 0);

    std::fs::remove_file(&snapshots).unwrap();
    std::fs::create_dir(&snapshots).unwrap();
    while member.status().snapshot_bytes == 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "no snapshot came");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    registry.put(&key, "after").await.unwrap();
    registry.close().await.unwrap();
    member.stop().await.unwrap();
}
