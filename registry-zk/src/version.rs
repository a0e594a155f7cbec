//! Faults of server versions that break the registry's guarantees, and that a later version does not have (F4).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::store::Store;

/// How long a server is waited for. It delays nothing.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than this is no answer.
const MAX_ANSWER: u64 = 16 << 10;
/// No later patch has it fixed.
const EVER: u32 = u32::MAX;

/// A fault: what it does, and in each minor version of ZooKeeper 3 that has it, which patches have it.
struct Fault(&'static str, &'static [(u32, Range<u32>)]);

const FAULTS: &[Fault] = &[
    Fault(
        "servers that crash while they follow a new leader can lose acknowledged writes (ZOOKEEPER-4785)",
        &[(6, 0..EVER), (7, 0..EVER), (8, 0..5), (9, 0..2)],
    ),
    Fault(
        "a follower that changes its leader can have other data than the rest (ZOOKEEPER-4712)",
        &[(6, 0..EVER), (7, 0..EVER), (8, 0..EVER), (9, 0..3)],
    ),
    Fault(
        "a follower that lagged behind and then leads can lose acknowledged writes (ZOOKEEPER-4925)",
        &[(9, 3..4)],
    ),
    Fault(
        "a watch tells the names of znodes that the user may not read (ZOOKEEPER-4799, CVE-2024-23944)",
        &[(6, 0..EVER), (7, 0..3), (8, 0..4), (9, 0..2)],
    ),
];

/// What is wrong with this version; nothing, of a version that is not understood.
fn faults(version: &str) -> Vec<&'static str> {
    let mut numbers = version.split(['.', '-']).map(str::parse::<u32>);
    let (Some(Ok(3)), Some(Ok(minor)), Some(Ok(patch))) = (numbers.next(), numbers.next(), numbers.next()) else {
        return Vec::new();
    };
    let has = |fault: &&Fault| {
        fault
            .1
            .iter()
            .any(|(of, patches)| *of == minor && patches.contains(&patch))
    };
    FAULTS.iter().filter(has).map(|Fault(what, _)| *what).collect()
}

/// The version in the answer to `srvr`: `Zookeeper version: 3.8.0-0, built on ...`.
fn version(answer: &str) -> Option<&str> {
    let line = answer
        .lines()
        .find_map(|line| line.strip_prefix("Zookeeper version: "))?;
    line.split(',').next()
}

/// Warns of faults that the servers' versions are known for. A server that does not say its version is passed over.
pub(crate) async fn warn(store: Arc<Store>) {
    // The word is not spoken over TLS.
    if store.config.tls.is_some() {
        return;
    }
    for server in store.config.servers.addresses() {
        let Ok(Some(answer)) = timeout(PATIENCE, ask(server)).await else {
            continue;
        };
        let Some(version) = version(&answer) else { continue };
        for fault in faults(version) {
            tracing::warn!(
                server,
                version,
                fault,
                "this version of ZooKeeper has a known fault: upgrade it"
            );
        }
    }
}

async fn ask(server: &str) -> Option<String> {
    let mut stream = TcpStream::connect(server).await.ok()?;
    stream.write_all(b"srvr").await.ok()?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_a_version_has() {
        for (version, count) in [
            ("3.6.4", 3),
            ("3.7.2-1", 3),
            ("3.7.3", 2),
            ("3.8.0-0", 3),
            ("3.8.6", 1),
            ("3.9.0", 3),
            ("3.9.2", 1),
            ("3.9.3", 1),
            ("3.9.4", 0),
            ("3.9.6", 0),
            ("3.10.0", 0),
            ("4.0.0", 0),
            ("what", 0),
        ] {
            assert_eq!(faults(version).len(), count, "{version}");
        }
    }

    #[test]
    fn a_server_says_its_version() {
        let answer = "Zookeeper version: 3.8.0-0, built on 2022-02-25 08:49 UTC\nLatency min/avg/max: 0/0.0/0\n";
        assert_eq!(version(answer), Some("3.8.0-0"));
        assert_eq!(
            version("srvr is not executed because it is not in the whitelist.\n"),
            None
        );
    }
}
