//! A handle reads and writes at the primary only, also when the primary changes and no connection is closed.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{Server, causes, key, options, until, within};
use registry_api::{Error, Expect, Options, Prefix, Read, Registry, Result, Txn, WatchItem, WatchRequest, WatchScope};
use registry_mysql::{MysqlConfig, Url};

/// A handle of a user without global rights. One with them (SUPER, CONNECTION ADMIN) writes to a read-only server.
async fn try_connect_as(user: &str, address: &str, options: &Options) -> Result<Arc<dyn Registry>> {
    let url = format!("mysql://{user}@{address}/test");
    registry_mysql::connect(&MysqlConfig::new(Url::new(&url).unwrap()), options).await
}

async fn start() -> Server {
    let server = Server::start().await;
    server.run("CREATE USER app; GRANT ALL ON test.* TO app").await;
    server
}

/// So many requests at once that several connections stay open.
async fn fill(registry: &Arc<dyn Registry>) {
    let gets = (0..8).map(|_| {
        let registry = registry.clone();
        tokio::spawn(async move { registry.get(&key("/a"), Read::Linearizable).await })
    });
    for get in gets.collect::<Vec<_>>() {
        get.await.unwrap().unwrap();
    }
}

fn assert_read_only<T: std::fmt::Debug>(what: &str, answer: Result<T>) {
    let error = answer.expect_err(what);
    assert!(matches!(error, Error::Unavailable { .. }), "{what}: {error:?}");
    assert!(causes(&error).contains("is read-only"), "{what}: {}", causes(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_server_answers_nothing() {
    let server = start().await;
    for user in ["app", "root"] {
        server.run("SET GLOBAL read_only = 0").await;
        let quick = Options {
            request_timeout: Duration::from_secs(1),
            ..options()
        };
        let registry = try_connect_as(user, &server.address(), &quick).await.unwrap();
        // A switchover that closes no connection. A call that was refused leaves its connections, so each call gets new ones.
        let demote = async || {
            server.run("SET GLOBAL read_only = 0").await;
            registry.put(&key("/a"), "1").await.unwrap();
            fill(&registry).await;
            server.run("SET GLOBAL read_only = 1").await;
        };
        let root = Prefix::root();
        demote().await;
        assert_read_only("get", registry.get(&key("/a"), Read::Linearizable).await);
        demote().await;
        assert_read_only("stale get", registry.get(&key("/a"), Read::Stale).await);
        demote().await;
        let list = registry_api::List::new(root.clone());
        assert_read_only("list", registry.list(list).await);
        demote().await;
        assert_read_only("children", registry.children(&root, Read::Linearizable).await);
        demote().await;
        assert_read_only("count", registry.count(&root, Read::Linearizable).await);
        demote().await;
        assert_read_only("health", registry.health().await.map(|_| ()));
        demote().await;
        assert_read_only("put", registry.put(&key("/a"), "2").await);
        demote().await;
        // A refusal is a read too.
        let refused = Txn::new().when(&key("/a"), Expect::Absent).put(&key("/a"), "3");
        assert_read_only("commit", registry.commit(refused).await.map(|_| ()));
        let began = Instant::now();
        let short = Options {
            connect_timeout: Duration::from_secs(1),
            ..quick
        };
        assert_read_only("connect", try_connect_as(user, &server.address(), &short).await);
        assert!(began.elapsed() < Duration::from_secs(3));
        server.run("SET GLOBAL read_only = 0").await;
        assert_eq!(
            registry
                .get(&key("/a"), Read::Linearizable)
                .await
                .unwrap()
                .unwrap()
                .value,
            "1"
        );
        registry.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_the_end_of_a_switchover() {
    let server = start().await;
    let patient = Options {
        request_timeout: Duration::from_secs(20),
        ..options()
    };
    let registry = try_connect_as("app", &server.address(), &patient).await.unwrap();
    let mut watch = registry
        .watch(WatchRequest::new(Prefix::root(), WatchScope::Subtree))
        .await
        .unwrap();
    assert!(matches!(watch.next().await.unwrap().unwrap(), WatchItem::Synced(_)));
    fill(&registry).await;
    server.run("SET GLOBAL read_only = 1").await;
    let put = tokio::spawn({
        let registry = registry.clone();
        async move { registry.put(&key("/a"), "1").await }
    });
    let get = tokio::spawn({
        let registry = registry.clone();
        async move { registry.get(&key("/b"), Read::Linearizable).await }
    });
    // Both were refused before the other server is the primary.
    let refused = async || {
        use sqlx::{Executor, Row};
        let opened = sqlx::raw_sql("SHOW GLOBAL STATUS LIKE 'Connections'");
        let rows = server.root().await.fetch_all(opened).await.unwrap();
        rows[0]
            .try_get_unchecked::<String, _>(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    // Each look is a connection too, so a dozen looks prove nothing; a dozen more connections than looks do.
    let (first, looks) = (refused().await, std::cell::Cell::new(0));
    until("connections were refused", async || {
        looks.set(looks.get() + 1);
        refused().await > first + looks.get() + 6
    })
    .await;
    assert!(!put.is_finished() && !get.is_finished());
    server.run("SET GLOBAL read_only = 0").await;
    within(Duration::from_secs(15), "the put", put).await.unwrap().unwrap();
    within(Duration::from_secs(15), "the get", get).await.unwrap().unwrap();
    // The watch goes on by itself.
    let told = async {
        loop {
            if let WatchItem::Changes(events) = watch.next().await.unwrap().unwrap() {
                return events;
            }
        }
    };
    assert_eq!(within(Duration::from_secs(15), "the event", told).await.len(), 1);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_read_only_tables_is_no_primary() {
    let mut server = start().await;
    let registry = try_connect_as("app", &server.address(), &options()).await.unwrap();
    registry.close().await.unwrap();
    server.stop().await;
    server.add_argument("--innodb-read-only=1");
    server.spawn();
    assert!(server.is_ready().await);
    let short = Options {
        connect_timeout: Duration::from_secs(1),
        ..options()
    };
    assert_read_only("connect", try_connect_as("app", &server.address(), &short).await);
}
