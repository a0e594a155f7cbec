//! Processes that hold one lock in turns, each stopped for longer than its TTL now and then: what a counter in a file says
//! that refuses older tokens, and one that does not. The test runs itself as its processes.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

mod clusters;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clusters::Served;
use registry::raft::{self, RaftConfig};
use registry::{Error, Held, Options, SessionTtl};
use registry_tests::{Cluster, TTL, key, within};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

const ADDRESS: &str = "REGISTRY_TEST_ADDRESS";
const FILES: &str = "REGISTRY_TEST_FILES";
const PROCESSES: usize = 4;
const STOPS: usize = 6;
const PATIENCE: Duration = Duration::from_secs(40);

/// Two counters, and what each process did.
struct Files(PathBuf);

impl Files {
    fn number(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.0.join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    fn put(&self, name: &str, number: u64) {
        // Renamed, so that nobody reads half of it.
        let beside = self.0.join(format!("{name}.{}", std::process::id()));
        fs::write(&beside, number.to_string()).unwrap();
        fs::rename(beside, self.0.join(name)).unwrap();
    }

    /// One more, unless a larger token was here.
    fn count_fenced(&self, token: u64) -> bool {
        let guard = File::create(self.0.join("guard")).unwrap();
        flock(&guard, FlockOperation::LockExclusive).unwrap();
        if token < self.number("token") {
            return false;
        }
        self.put("token", token);
        self.put("fenced", self.number("fenced") + 1);
        true
    }

    /// One more, by who trusts that nobody else is here.
    async fn count_trusting(&self) {
        let number = self.number("trusting");
        tokio::time::sleep(Duration::from_millis(3)).await;
        self.put("trusting", number + 1);
    }

    fn ended(&self) -> bool {
        self.0.join("end").exists()
    }
}

fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(TTL).unwrap(),
        // A process that stands still in the middle of a call finds its deadline passed.
        request_timeout: PATIENCE,
        ..Options::default()
    }
}

/// Works under the lock as long as it is sure of it, and says what it did.
async fn work(files: &Files, held: &Held) {
    for _ in 0..60 {
        if held.is_lost() {
            println!("said: lost");
            return;
        }
        let said = match files.count_fenced(held.token().get().cast_unsigned()) {
            true => "counted",
            false => "refused",
        };
        println!("said: {said}");
        files.count_trusting().await;
        println!("said: trusted");
    }
    if held.is_lost() {
        println!("said: lost");
    }
}

/// Holds the lock in turns with others. Does nothing by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_holds() {
    let (Ok(address), Ok(files)) = (std::env::var(ADDRESS), std::env::var(FILES)) else {
        return;
    };
    let files = Files(files.into());
    let registry = raft::connect(&RaftConfig::remote([address]), &options()).await.unwrap();
    let lock = registry.lock(&key("/l")).label(std::process::id().to_string());
    while !files.ended() {
        match lock.acquire_within(TTL).await {
            Ok(held) => {
                println!("said: held");
                work(&files, &held).await;
                // One that was lost has nothing to release.
                let _ = held.release().await;
            }
            Err(Error::DeadlineExceeded { .. }) => {}
            // It had come to its turn, and was stopped before it knew.
            Err(Error::SessionExpired { .. } | Error::HoldLost { .. }) => {
                println!("said: lost");
                registry.wait_connected(PATIENCE).await.unwrap();
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    registry.close().await.unwrap();
}

fn process(address: &str, files: &Path) -> tokio::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_that_holds", "--nocapture", "--test-threads=1"])
        .env(ADDRESS, address)
        .env(FILES, files)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_holder_finds_it_lost_and_no_fenced_update_is() {
    let cluster = Served::start().await;
    let dir = tempfile::tempdir().unwrap();
    let files = Files(dir.path().into());
    let address = cluster.address().to_string();
    let processes: Vec<_> = (0..PROCESSES).map(|_| process(&address, dir.path())).collect();
    let registry = cluster.connect().await.unwrap();
    let lock = registry.lock(&key("/l"));
    let mut stops = 0;
    let stopping = async {
        while stops < STOPS {
            let places = lock.contenders().await.unwrap();
            let sessions: BTreeSet<_> = places.iter().map(|place| place.session).collect();
            assert_eq!(sessions.len(), places.len(), "two places of one contender: {places:?}");
            let Some(holder) = places.first() else { continue };
            let id: i32 = std::str::from_utf8(&holder.value).unwrap().parse().unwrap();
            let id = Pid::from_raw(id).unwrap();
            kill_process(id, Signal::STOP).unwrap();
            // It may have been about to leave when it was looked at.
            tokio::time::sleep(TTL / 4).await;
            let still = lock.contenders().await.unwrap().first().map(|first| first.token) == Some(holder.token);
            if still {
                stops += 1;
                // Somebody else holds it before it goes on.
                registry_tests::cluster::eventually(PATIENCE, || async {
                    let first = lock.contenders().await.unwrap().into_iter().next();
                    first.is_some_and(|first| first.token > holder.token)
                })
                .await;
            }
            kill_process(id, Signal::CONT).unwrap();
            tokio::time::sleep(TTL / 4).await;
        }
    };
    within(3 * PATIENCE, stopping).await;
    File::create(dir.path().join("end")).unwrap();
    let (mut all, mut holds) = (BTreeMap::new(), Vec::new());
    for process in processes {
        let output = within(PATIENCE, process.wait_with_output()).await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let said: Vec<_> = text.lines().filter_map(|line| line.split_once("said: ")).collect();
        holds.push(said.iter().filter(|(_, word)| *word == "held").count());
        for (_, word) in said {
            *all.entry(word.to_owned()).or_insert(0_u64) += 1;
        }
    }
    let of = |word: &str| all.get(word).copied().unwrap_or_default();
    println!(
        "{stops} holders stopped beyond their TTL: {} times it was found lost, {} writes were refused for their token; of {} updates \
         without a token {} were lost; holds by process: {holds:?}",
        of("lost"),
        of("refused"),
        of("trusted"),
        of("trusted") - files.number("trusting"),
    );
    assert_eq!(files.number("fenced"), of("counted"), "an update was lost");
    // Each was stopped while it held: the first that it knows is that it does not, or one write under way is refused.
    assert!(of("lost") >= stops as u64, "{all:?}");
    assert!(of("refused") <= stops as u64, "{all:?}");
    assert!(
        holds.iter().all(|holds| *holds > 0),
        "somebody never had its turn: {holds:?}"
    );
    registry.close().await.unwrap();
}
