//! A served member whose disk fails: its process ends and says why, and what it acknowledged is there when it starts again.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use registry::raft::{self, RaftConfig};
use registry::{Error, Key, List, Options, Read, Registry};
use registry_tests::cluster::eventually;
use registry_tests::{Process, System, key, prefix, process, within};
use rustix::io::Errno;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(40);
const WRITERS: usize = 8;
const FAILURES: usize = 3;

/// A member in a process of its own, on a disk of its own.
struct Site {
    dir: TempDir,
    system: System,
    address: String,
}

impl Site {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let system = System::told_by(&dir.path().join("system"));
        let address = format!("127.0.0.1:{}", process::free_port());
        Self { dir, system, address }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `registry serve`, which logs to that file.
    fn serving(&self, log: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command
            .arg("serve")
            .env_remove("REGISTRY_CONFIG")
            .current_dir(self.dir.path());
        command.args(["--set", &format!("raft.data_dir={}", self.file("data").display())]);
        command.args(["--set", &format!("raft.listen={}", self.address)]);
        command.stderr(File::create(log).unwrap());
        self.system.give_to(&mut command);
        command
    }

    async fn serve(&self, log: &Path) -> Process {
        let ready = |line: &str| line.contains("ready").then_some(());
        Process::start(self.serving(log), ready).await.0
    }

    async fn connect(&self) -> Arc<dyn Registry> {
        let options = Options {
            request_timeout: Duration::from_secs(2),
            ..Options::default()
        };
        let remote = RaftConfig::remote([self.address.clone()]);
        raft::connect(&remote, &options).await.unwrap()
    }
}

/// Puts one key after the other until one is not acknowledged; answers those that were.
async fn put_until_told_otherwise(registry: Arc<dyn Registry>, below: String) -> (Vec<Key>, Error) {
    let mut acknowledged = Vec::new();
    loop {
        let key = key(&format!("{below}/{}", acknowledged.len()));
        match registry.put(&key, key.as_str().to_owned()).await {
            Ok(_) => acknowledged.push(key),
            Err(error) => return (acknowledged, error),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_ends_the_process_and_nothing_acknowledged_is_lost() {
    let site = Site::new();
    let log = site.file("log");
    let mut acknowledged = Vec::<Key>::new();
    // Once more than it fails, to see what the last one left.
    for round in 0..=FAILURES {
        let mut member = site.serve(&log).await;
        let registry = site.connect().await;
        for key in &acknowledged {
            let found = registry.get(key, Read::Linearizable).await.unwrap();
            let found = found.unwrap_or_else(|| panic!("{key} was acknowledged and is lost"));
            assert_eq!(found.value, key.as_str());
        }
        if round == FAILURES {
            println!(
                "{FAILURES} syncs failed, all of {} acknowledged puts are there",
                acknowledged.len()
            );
            return;
        }
        let mut writing = JoinSet::new();
        for writer in 0..WRITERS {
            writing.spawn(put_until_told_otherwise(registry.clone(), format!("/{round}/{writer}")));
        }
        let seen = key(&format!("/{round}/0/200"));
        eventually(PATIENCE, || async {
            registry
                .get(&seen, Read::Linearizable)
                .await
                .is_ok_and(|entry| entry.is_some())
        })
        .await;
        site.system.fail_syncs(Some(Errno::IO));
        let status = within(PATIENCE, member.ended()).await.unwrap();
        assert!(!status.success(), "{status}");
        while let Some(written) = writing.join_next().await {
            let (keys, error) = written.unwrap();
            let may_be = matches!(error, Error::OutcomeUnknown { .. } | Error::Unavailable { .. });
            assert!(may_be, "{error:?}");
            acknowledged.extend(keys);
        }
        let said = fs::read_to_string(&log).unwrap();
        assert!(
            said.contains("the log can't be written") && said.contains("Input/output error"),
            "{said}"
        );
        site.system.fail_syncs(None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_does_not_start_on_a_disk_that_does_not_sync() {
    let site = Site::new();
    let log = site.file("log");
    site.serve(&log).await.stop().await.unwrap();
    site.system.fail_syncs(Some(Errno::IO));
    let output = within(PATIENCE, site.serving(&log).kill_on_drop(true).output())
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("Input/output error"),
        "{said}"
    );
    site.system.fail_syncs(None);
    site.serve(&log).await.stop().await.unwrap();
}

/// The newest segment of its log.
fn segment(site: &Site) -> PathBuf {
    let files = fs::read_dir(site.file("data/log"))
        .unwrap()
        .map(|file| file.unwrap().path());
    let segments = files.filter(|path| path.extension().is_some_and(|ending| ending == "log"));
    segments.max().expect("a member that has run has one")
}

/// Runs a member once, with some keys put.
async fn has_run(site: &Site) {
    let mut member = site.serve(&site.file("log")).await;
    let registry = site.connect().await;
    for number in 0..20 {
        registry.put(&key(&format!("/kept/{number}")), "1").await.unwrap();
    }
    member.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_torn_is_cut_with_a_line_and_what_is_damaged_is_named_and_left_alone() {
    let (site, other) = (Site::new(), Site::new());
    has_run(&site).await;
    has_run(&other).await;
    let (log, wal, identity) = (site.file("log"), segment(&site), site.file("data/identity"));
    let name = wal.file_name().unwrap().to_str().unwrap();

    let mut torn = fs::read(&wal).unwrap();
    let end = torn.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    torn[end..end + 100].fill(0x55);
    fs::write(&wal, torn).unwrap();
    let mut member = site.serve(&log).await;
    let kept = site.connect().await.list_all(List::new(prefix("/kept"))).await.unwrap();
    assert_eq!(kept.len(), 20);
    member.kill().await;
    let said = fs::read_to_string(&log).unwrap();
    assert!(
        said.contains("the end of the log is torn") && said.contains(name),
        "{said}"
    );

    let good = (fs::read(&wal).unwrap(), fs::read_to_string(&identity).unwrap());
    let mut flipped = good.0.clone();
    flipped[end / 2] ^= 4;
    let foreign = fs::read(segment(&other)).unwrap();
    let newer = good.1.replace("registry-raft 1", "registry-raft 9");
    for (bytes, text, says) in [
        (
            &flipped,
            &good.1,
            [name, "damaged at byte", "restore a backup into a new directory"],
        ),
        (&foreign, &good.1, [name, "another cluster's", "put the file back"]),
        (
            &good.0,
            &newer,
            ["identity", "its format is 9", "use the version that wrote it"],
        ),
    ] {
        fs::write(&wal, bytes).unwrap();
        fs::write(&identity, text).unwrap();
        let output = within(PATIENCE, site.serving(&log).kill_on_drop(true).output())
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && says.iter().all(|words| said.contains(words)),
            "{says:?}: {said}"
        );
        assert!(fs::read(&wal).unwrap() == *bytes && fs::read_to_string(&identity).unwrap() == *text);
    }
    fs::write(&identity, &good.1).unwrap();
    site.serve(&log).await.stop().await.unwrap();
}
