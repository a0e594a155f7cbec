//! Processes at once, each with a handle of its own: the test runs itself again and again.

#![allow(clippy::unwrap_used)]

mod harness;

use std::process::Stdio;
use std::time::Duration;

use harness::{Server, connect, key, until};
use registry_api::{Depth, Error, Expect, List, Prefix, Read};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Executor, Row};
use tokio::process::Command;

const ADDRESS: &str = "REGISTRY_TEST_ADDRESS";

/// Runs a worker of this file in so many processes, and gives what they printed.
async fn run(processes: usize, worker: &str, address: &str) -> Vec<String> {
    let started = (0..processes).map(|_| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", worker, "--nocapture", "--test-threads=1"])
            .env(ADDRESS, address)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    });
    let started: Vec<_> = started.collect();
    let mut said = Vec::new();
    for process in started {
        let waiting = tokio::time::timeout(Duration::from_secs(50), process.wait_with_output());
        let output = waiting.await.expect("the process ends").unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let lines = text.lines().filter_map(|line| line.split_once("said: "));
        said.extend(lines.map(|(_, word)| word.to_owned()));
    }
    said
}

/// The server's address, if this is a process of [`run`].
fn address() -> Option<String> {
    std::env::var(ADDRESS).ok()
}

/// Counts to 20 more by compare-and-set. Does nothing by itself.
#[tokio::test(flavor = "multi_thread")]
async fn worker_that_counts() {
    let Some(address) = address() else { return };
    let registry = connect(&address).await;
    let counter = key("/counter");
    let mut done = 0;
    while done < 20 {
        let entry = registry.get(&counter, Read::Linearizable).await.unwrap().unwrap();
        let next = std::str::from_utf8(&entry.value).unwrap().parse::<u64>().unwrap() + 1;
        let written = registry
            .put_if(&counter, Expect::ModRevision(entry.mod_revision), next.to_string())
            .await;
        match written {
            Ok(_) => done += 1,
            Err(Error::Conflict { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    registry.close().await.unwrap();
}

/// Holds a lock five times, and writes its token while it does. Does nothing by itself.
#[tokio::test(flavor = "multi_thread")]
async fn worker_that_locks() {
    let Some(address) = address() else { return };
    let registry = connect(&address).await;
    for _ in 0..5 {
        let held = registry.lock(&key("/lock")).acquire().await.unwrap();
        // Nobody else is inside, or this would find its key there.
        let inside = key("/inside");
        registry.put_if(&inside, Expect::Absent, "").await.unwrap();
        println!("said: {}", held.token());
        assert!(registry.delete(&inside).await.unwrap());
        held.release().await.unwrap();
    }
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_and_ten_processes_on_one_counter() {
    if address().is_some() {
        return;
    }
    let server = Server::start().await;
    let registry = connect(&server.address()).await;
    for processes in [2, 10] {
        registry.put(&key("/counter"), "0").await.unwrap();
        run(processes, "worker_that_counts", &server.address()).await;
        let entry = registry
            .get(&key("/counter"), Read::Linearizable)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(entry.value, (20 * processes).to_string());
    }
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_and_ten_processes_on_one_lock() {
    if address().is_some() {
        return;
    }
    let server = Server::start().await;
    let registry = connect(&server.address()).await;
    for processes in [2, 10] {
        let said = run(processes, "worker_that_locks", &server.address()).await;
        let mut tokens: Vec<u64> = said.iter().map(|token| token.parse().unwrap()).collect();
        assert_eq!(tokens.len(), 5 * processes);
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens.len(), 5 * processes, "a token was given twice");
    }
    let left = registry
        .list_all(List {
            depth: Depth::Subtree,
            ..List::new(Prefix::root())
        })
        .await
        .unwrap();
    assert!(left.is_empty(), "{left:?}");
    registry.close().await.unwrap();
}

/// Writes until it is killed. Does nothing by itself.
#[tokio::test(flavor = "multi_thread")]
async fn worker_that_writes() {
    let Some(address) = address() else { return };
    let registry = connect(&address).await;
    loop {
        // One that was stopped for long is refused, and goes on.
        let _ = registry.put(&key("/written"), "").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_stopped_in_the_middle_of_a_write_blocks_nobody_for_long() {
    if address().is_some() {
        return;
    }
    let server = Server::start().await;
    let other = connect(&server.address()).await;
    let mut worker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker_that_writes", "--test-threads=1"])
        .env(ADDRESS, server.address())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = i32::try_from(worker.id().unwrap()).unwrap();
    let signal = |signal| kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    // Stopped with the lock in its hand, by the server's own account.
    let holds =
        "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'RUNNING' AND trx_rows_locked > 0";
    let held = async || {
        let rows = server.root().await.fetch_all(sqlx::raw_sql(holds)).await.unwrap();
        rows[0].try_get_unchecked::<u64, _>(0).unwrap() > 0
    };
    until("it is stopped with the lock in its hand", async || {
        signal(Signal::CONT);
        tokio::time::sleep(Duration::from_millis(7)).await;
        signal(Signal::STOP);
        // What was under way at the server ends; what waits for the client stays. (Not less: the server renews `innodb_trx`
        // only when nobody has read it for 100 ms.)
        tokio::time::sleep(Duration::from_millis(200)).await;
        held().await
    })
    .await;
    until("another writes", async || other.put(&key("/other"), "").await.is_ok()).await;
    worker.kill().await.unwrap();
    other.close().await.unwrap();
}
