//! Backups, taken while everything goes on, and the groups made from them.

#![allow(clippy::unwrap_used)]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Group, options};
use registry_api::{
    Depth, Error, Event, Key, List, Options, Prefix, Read, Registry, Result, Revision, SessionState, SessionTtl, Txn,
    WatchFrom, WatchItem, WatchRequest, WatchScope,
};
use registry_raft::{Backup, Member, MemberChange, RaftConfig};
use registry_tests::within;

const PATIENCE: Duration = Duration::from_secs(60);

fn member(data_dir: PathBuf) -> RaftConfig {
    let mut config = RaftConfig::default();
    config.data_dir = Some(data_dir);
    config.listen = Some("127.0.0.1:0".into());
    config
}

fn key(text: impl AsRef<str>) -> Key {
    Key::parse(text.as_ref()).unwrap()
}

async fn backup(member: &Member, file: &Path) -> Result<Backup> {
    let config = RaftConfig::remote([member.address().unwrap().to_string()]);
    let mut told = (0, 0);
    let backup = registry_raft::backup(&config, &options(), file, |done, size| told = (done, size)).await?;
    assert_eq!(told, (backup.bytes, backup.bytes), "progress ends at the end");
    Ok(backup)
}

async fn values(registry: &Arc<dyn Registry>, prefix: &str) -> Vec<(String, bytes::Bytes)> {
    let mut list = List::new(Prefix::parse(prefix).unwrap());
    list.depth = Depth::Subtree;
    let mut values = Vec::new();
    loop {
        let page = registry.list(list.clone()).await.unwrap();
        let entries = page.entries.into_iter();
        values.extend(entries.map(|entry| (entry.key.as_str().trim_start_matches(prefix).to_owned(), entry.value)));
        match page.next {
            Some(next) => list.after = Some(next),
            None => return values,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_one_moment_and_writes_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let first = Member::start(&member(dir.path().join("first"))).await.unwrap();
    let registry = first.connect(&options()).await.unwrap();
    for number in 0..500 {
        registry
            .put(&key(format!("/load/{number}")), vec![7; 2000])
            .await
            .unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writing = {
        let (registry, stop) = (registry.clone(), stop.clone());
        tokio::spawn(async move {
            let mut written = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let (left, right) = (
                    key(format!("/left/{}", written % 50)),
                    key(format!("/right/{}", written % 50)),
                );
                let value = written.to_string();
                registry
                    .commit(Txn::new().put(&left, value.clone()).put(&right, value))
                    .await
                    .unwrap();
                written += 1;
            }
            written
        })
    };
    let file = dir.path().join("one.backup");
    for _ in 0..3 {
        let before = registry.put(&key("/before"), "1").await.unwrap();
        let taken = backup(&first, &file).await.unwrap();
        assert!(taken.revision >= before.0, "{taken:?} lacks revision {before}");
    }
    stop.store(true, Ordering::Relaxed);
    assert!(writing.await.unwrap() > 0);
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let newest = registry.put(&key("/after"), "1").await.unwrap();

    let restored = member(dir.path().join("second"));
    registry_raft::restore(&file, &restored).await.unwrap();
    let second = Member::start(&restored).await.unwrap();
    let again = second.connect(&options()).await.unwrap();
    assert_eq!(values(&again, "/left").await, values(&again, "/right").await);
    assert_eq!(
        again
            .count(&Prefix::parse("/load").unwrap(), Read::Linearizable)
            .await
            .unwrap(),
        500
    );
    assert!(again.get(&key("/after"), Read::Linearizable).await.unwrap().is_none());
    let higher = again.put(&key("/after"), "1").await.unwrap();
    assert!(higher > newest, "{higher} was not above {newest}");
    let entry = again.get(&key("/before"), Read::Linearizable).await.unwrap().unwrap();
    assert!(entry.mod_revision < newest, "a key keeps its revisions");

    // Of a member's own library call, and of the new group, a backup is the same.
    let taken = second.backup(&file).await.unwrap();
    assert!(taken.revision >= higher.0);
    again.close().await.unwrap();
    second.stop().await.unwrap();
    let second = Member::start(&restored).await.unwrap();
    let again = second.connect(&options()).await.unwrap();
    assert_eq!(
        again
            .count(&Prefix::parse("/load").unwrap(), Read::Linearizable)
            .await
            .unwrap(),
        500
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_old_group_gave_out_is_not_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let (file, port) = (dir.path().join("backup"), registry_tests::process::free_port());
    let mut config = member(dir.path().join("first"));
    config.listen = Some(format!("127.0.0.1:{port}"));
    let first = Member::start(&config).await.unwrap();
    let remote = RaftConfig::remote([format!("127.0.0.1:{port}")]);
    let ttl = Duration::from_secs(5);
    let options = Options {
        session_ttl: SessionTtl::new(ttl).unwrap(),
        ..options()
    };
    let old = registry_raft::connect(&remote, &options).await.unwrap();
    let session = old.session().live().unwrap();
    old.put_ephemeral(&key("/worker"), "1").await.unwrap();
    let held = old.lock(&key("/lock")).acquire().await.unwrap();
    backup(&first, &file).await.unwrap();
    // After the backup the lock changes hands, which the backup can't know.
    held.release().await.unwrap();
    let held = old.lock(&key("/lock")).acquire().await.unwrap();
    let after = old.put(&key("/later"), "1").await.unwrap();
    first.stop().await.unwrap();

    config.data_dir = Some(dir.path().join("second"));
    let taken = registry_raft::restore(&file, &config).await.unwrap();
    assert_eq!((taken.sessions, taken.keys > 1), (1, true));
    let second = Member::start(&config).await.unwrap();
    let started = Instant::now();
    let new = second.connect(&options).await.unwrap();
    assert_ne!(new.session().live().unwrap(), session);

    // From here on, so that it is there still.
    let mut watch = new
        .watch(WatchRequest::new(key("/worker"), WatchScope::Key))
        .await
        .unwrap();
    // The old handle is told; it is not taken for anybody.
    let mut states = old.session().states();
    let expired = states.wait_for(|state| matches!(state, SessionState::Expired(id) if *id == session));
    within(PATIENCE, async { drop(expired.await.unwrap()) }).await;
    within(PATIENCE, held.lost()).await;

    // Its keys are there until the TTL is over, and then go as a dead process's do.
    let gone = async {
        let mut there = false;
        loop {
            match watch.next().await.unwrap().unwrap() {
                WatchItem::Changes(events) if events.iter().any(|event| matches!(event, Event::Deleted { .. })) => {
                    return there;
                }
                WatchItem::Changes(_) => there = true,
                _ => {}
            }
        }
    };
    assert!(within(PATIENCE, gone).await, "it was not there at first");
    assert!(
        started.elapsed() >= ttl.mul_f64(0.8),
        "gone after {:?}",
        started.elapsed()
    );
    let next = within(PATIENCE, new.lock(&key("/lock")).acquire()).await.unwrap();
    assert!(next.token() > held.token() && next.token().get().cast_unsigned() > after.0);

    // A watch of the old group's later revisions is not resumed as if nothing had happened.
    let mut resumed = WatchRequest::new(key("/later"), WatchScope::Key);
    resumed.from = WatchFrom::After(after);
    let told = async {
        match new.watch(resumed).await {
            Ok(mut watch) => watch.next().await.unwrap().map(drop),
            Err(error) => Err(error),
        }
    };
    let told = within(PATIENCE, told).await;
    assert!(
        matches!(told, Err(Error::Compacted { requested, .. }) if requested == after),
        "{told:?}"
    );
    assert!(after > Revision(taken.revision));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_refused_by_name_and_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let first = Member::start(&member(dir.path().join("first"))).await.unwrap();
    let registry = first.connect(&options()).await.unwrap();
    for number in 0..100 {
        registry.put(&key(format!("/a/{number}")), vec![7; 300]).await.unwrap();
    }
    let file = dir.path().join("good.backup");
    backup(&first, &file).await.unwrap();
    let good = std::fs::read(&file).unwrap();
    let (bad, config) = (dir.path().join("bad.backup"), member(dir.path().join("second")));
    let refusal = async |bytes: &[u8]| {
        std::fs::write(&bad, bytes).unwrap();
        let refused = registry_raft::restore(&bad, &config).await.unwrap_err();
        assert!(matches!(refused, Error::Storage { .. }), "{refused:?}");
        assert!(refused.to_string().contains("bad.backup"), "{refused}");
        assert!(!dir.path().join("second").exists(), "something was made");
        refused.to_string()
    };
    for at in (0..good.len()).step_by(good.len() / 101) {
        let mut flipped = good.clone();
        flipped[at] ^= 0x20;
        refusal(&flipped).await;
        assert!(refusal(&good[..at]).await.contains("cut short"));
    }
    assert!(refusal(&[&good[..], b"x"].concat()).await.contains("follows its end"));
    assert!(
        refusal(&[&good[..8], &9_u32.to_le_bytes(), &good[12..]].concat())
            .await
            .contains("format is 9")
    );
    assert!(
        refusal(b"some other file of somebody")
            .await
            .contains("no snapshot of a registry")
    );

    // Nor is anything restored over what is there, or from what is not.
    let used = member(dir.path().join("first"));
    let label = std::fs::read(dir.path().join("first/identity")).unwrap();
    let refused = registry_raft::restore(&file, &used).await.unwrap_err();
    assert!(refused.to_string().contains("new directory"), "{refused}");
    assert_eq!(std::fs::read(dir.path().join("first/identity")).unwrap(), label);
    let missing = registry_raft::restore(&dir.path().join("none"), &config)
        .await
        .unwrap_err();
    assert!(missing.to_string().contains("none"), "{missing}");

    registry_raft::restore(&file, &config).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_not_whole_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    std::fs::write(&file, "yesterday's").unwrap();
    let nobody = RaftConfig::remote([format!("127.0.0.1:{}", registry_tests::process::free_port())]);
    let options = Options {
        connect_timeout: Duration::from_secs(1),
        ..options()
    };
    let refused = registry_raft::backup(&nobody, &options, &file, |_, _| {}).await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })), "{refused:?}");

    // The member stops while it sends, as soon as the first bytes have come.
    let first = Member::start(&member(dir.path().join("first"))).await.unwrap();
    let registry = first.connect(&options).await.unwrap();
    for number in 0..100 {
        registry
            .put(&key(format!("/a/{number}")), vec![7; 800_000])
            .await
            .unwrap();
    }
    let config = RaftConfig::remote([first.address().unwrap().to_string()]);
    let mut first = Some(first);
    let taken = registry_raft::backup(&config, &options, &file, |done, _| {
        if let Some(first) = first.take_if(|_| done > 0) {
            drop(first);
        }
        // The stop goes on by itself, and what is read here waits for it.
        std::thread::sleep(Duration::from_millis(20));
    });
    let taken = taken.await;
    assert!(taken.is_err(), "{taken:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"yesterday's");
    assert_eq!(
        std::fs::read_dir(dir.path())
            .unwrap()
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_string_lossy().ends_with(".new")
            })
            .count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn others_join_a_restored_member() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    let mut group = Group::start(3).await;
    let follower = group.follower().await;
    let registry = group.connect(follower).await;
    registry.put(&key("/a"), "kept").await.unwrap();
    let taken = backup(group.member(follower), &file).await.unwrap();
    assert!(taken.keys >= 1);
    for at in 0..3 {
        group.stop(at).await;
    }

    let mut config = member(dir.path().join("first"));
    config.listen = Some(format!("127.0.0.1:{}", registry_tests::process::free_port()));
    registry_raft::restore(&file, &config).await.unwrap();
    let first = Member::start(&config).await.unwrap();
    let mut joining = member(dir.path().join("second"));
    joining.member = Some("b".into());
    joining.listen = Some(format!("127.0.0.1:{}", registry_tests::process::free_port()));
    joining.join = vec![first.address().unwrap().to_string()];
    let second = within(PATIENCE, Member::start(&joining)).await.unwrap();
    let there = second.connect(&options()).await.unwrap();
    let entry = there.get(&key("/a"), Read::Linearizable).await.unwrap();
    assert_eq!(entry.unwrap().value, "kept");
    there.put(&key("/b"), "new").await.unwrap();

    // With a vote, the one that joined goes on where the restored one has handed over, and alone once that is removed.
    let promote = MemberChange::Promote { name: "b".into() };
    first.change_members(promote).await.unwrap();
    let name = first.name().to_owned();
    second
        .change_members(MemberChange::Transfer { name: "b".into() })
        .await
        .unwrap();
    second.change_members(MemberChange::Remove { name }).await.unwrap();
    within(PATIENCE, first.ended()).await;
    first.stop().await.unwrap();
    let revision = there.put(&key("/a"), "after").await.unwrap();
    assert!(revision.0 > taken.revision, "{revision} is not above the backup's");
    let entry = there.get(&key("/b"), Read::Linearizable).await.unwrap();
    assert_eq!(entry.unwrap().value, "new");
}
