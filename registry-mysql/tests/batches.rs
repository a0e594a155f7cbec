//! Batches of requests that are longer than a server or a proxy takes.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use harness::{Server, causes, connect, key, options, url, within};
use registry_api::{Error, Expect, MAX_KEY, MAX_TXN, Options, Prefix, Read, Registry, Txn};
use registry_mysql::MysqlConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

async fn connect_patiently(address: &str) -> Arc<dyn Registry> {
    let patient = Options {
        request_timeout: Duration::from_secs(40),
        ..options()
    };
    registry_mysql::connect(&MysqlConfig::new(url(address)), &patient)
        .await
        .unwrap()
}

/// Commits so many transactions at once, of 64 puts each.
async fn commit_many(registry: &Arc<dyn Registry>, count: usize, name: impl Fn(usize, usize) -> String) {
    let commits = (0..count).map(|n| {
        let txn = (0..64).fold(Txn::new(), |txn, m| txn.put(&key(&name(n, m)), "v"));
        let registry = registry.clone();
        tokio::spawn(async move { registry.commit(txn).await })
    });
    for commit in commits.collect::<Vec<_>>() {
        let commit = commit.await.unwrap();
        assert!(commit.is_ok(), "{}", causes(&commit.unwrap_err()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_values_fit_into_the_smallest_packets() {
    let server = Server::start_with(&["--max-allowed-packet=4M"]).await;
    let registry = connect_patiently(&server.address()).await;
    // The values are 25 kB; the names, and what stands around them, are several MB.
    let long = "a-name-that-is-rather-long-".repeat(5);
    commit_many(&registry, 400, |n, m| format!("/{n}/{long}/{m}")).await;
    let count = registry.count(&Prefix::root(), Read::Linearizable).await.unwrap();
    assert_eq!(count, 400 * 64);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_transaction_of_the_longest_names_fits_into_the_smallest_packets() {
    let server = Server::start_with(&["--max-allowed-packet=4M"]).await;
    let registry = connect_patiently(&server.address()).await;
    // Long names above and short ones below: each ancestor is nearly as long as the key.
    let deep = |n: usize| {
        let above = format!("/{n:03}{}/{}/{}", "a".repeat(250), "b".repeat(254), "c".repeat(254));
        let mut path = format!("{above}/{}", "d".repeat(MAX_KEY - above.len() - 2 - 2 * 27));
        path.push_str(&"/e".repeat(27));
        key(&path)
    };
    let value = vec![0xff; MAX_TXN / 64 - 2 * MAX_KEY];
    let txn = (0..64).fold(Txn::new(), |txn, n| {
        txn.put_ephemeral(&deep(n), value.clone())
            .when(&deep(100 + n), Expect::Childless)
    });
    registry.commit(txn.clone()).await.unwrap();
    for n in 0..64 {
        let entry = registry.get(&deep(n), Read::Linearizable).await.unwrap().unwrap();
        assert_eq!(entry.value, value);
    }
    // What the second packet read counts as well.
    registry.put(&key("/004"), "").await.unwrap();
    let conflict = txn.when(&deep(63), Expect::Absent);
    assert!(matches!(registry.commit(conflict).await, Err(Error::InvalidRequest(_))));
    let again = Txn::new().when(&deep(63), Expect::Absent).put(&key("/x"), "");
    assert!(matches!(registry.commit(again).await, Err(Error::Conflict { .. })));
    registry.close().await.unwrap();
}

/// A proxy that takes shorter statements than the server, and closes the connection at a longer one.
async fn proxy(server: String, longest: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                let Ok(server) = TcpStream::connect(server).await else {
                    return;
                };
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), server.into_split());
                // How much came since the server answered: the length of a statement, whether it is encrypted or not.
                let length = Arc::new(AtomicUsize::new(0));
                let counted = length.clone();
                let answers = async move {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
                        counted.store(0, Ordering::Relaxed);
                        if to_client.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                };
                let statements = async move {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
                        if length.fetch_add(read, Ordering::Relaxed) + read > longest {
                            return;
                        }
                        if to_server.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! { () = answers => {}, () = statements => {} }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_a_proxy_refuses_becomes_shorter() {
    let server = Server::start().await;
    let proxy = proxy(server.address(), 100_000).await;
    let registry = connect_patiently(&proxy).await;
    registry.put(&key("/a"), "").await.unwrap();
    let commits = commit_many(&registry, 100, |n, m| format!("/{n}/some-name-of-a-key/{m}"));
    within(Duration::from_secs(40), "the commits", commits).await;
    let direct = connect(&server.address()).await;
    let count = direct.count(&Prefix::root(), Read::Linearizable).await.unwrap();
    assert_eq!(count, 1 + 100 * 64);
    // One that is too long by itself fails alone, and those beside it do not.
    let long = tokio::spawn({
        let registry = connect_with_timeout(&proxy, Duration::from_secs(3)).await;
        async move {
            let name = key("/long");
            let long = registry.put(&name, vec![1; 200_000]);
            let short = futures_util::future::join_all((0..20).map(|n| {
                let registry = registry.clone();
                async move { registry.put(&key(&format!("/short/{n}")), "").await }
            }));
            tokio::join!(long, short)
        }
    });
    let (long, short) = within(Duration::from_secs(20), "both", long).await.unwrap();
    assert!(long.is_err(), "{long:?}");
    for put in short {
        put.unwrap();
    }
}

async fn connect_with_timeout(address: &str, request_timeout: Duration) -> Arc<dyn Registry> {
    let options = Options {
        request_timeout,
        ..options()
    };
    registry_mysql::connect(&MysqlConfig::new(url(address)), &options)
        .await
        .unwrap()
}
