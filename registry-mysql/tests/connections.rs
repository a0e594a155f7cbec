//! Connections that are dead, closed or killed, and what a handle makes of them.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{Server, connect, key, options, until, url, within};
use registry_api::{Error, Options, Read, Registry, SessionTtl};
use registry_mysql::MysqlConfig;
use registry_tests::{Direction, Wire};
use sqlx::{Executor, Row};

const PATIENCE: Duration = Duration::from_secs(20);

async fn value(registry: &Arc<dyn Registry>, path: &str) -> Option<String> {
    let entry = registry.get(&key(path), Read::Linearizable).await.unwrap();
    entry.map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
}

/// Connections that a gateway has forgotten are not used again after half a minute; nobody says that they are dead.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_died_while_they_were_idle_are_not_used() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    // Eight others look after the sessions, each 250 ms: this handle is none of those.
    connect(&server.address()).await.close().await.unwrap();
    let others: Vec<_> = (1..=8).map(|id| format!("(1, {id}, 3600000, 1, NOW(3))")).collect();
    let insert = "INSERT INTO test.registry_sessions (namespace, id, ttl_ms, beat, seen_at) VALUES";
    server.run(&format!("{insert} {}", others.join(", "))).await;
    let rare = Options {
        // Keep-alives and reads of the sessions are rare, and keep no connection alive.
        session_ttl: SessionTtl::new(Duration::from_secs(3600)).unwrap(),
        ..options()
    };
    let config = MysqlConfig::new(url(&wire.address().to_string()));
    let registry = registry_mysql::connect(&config, &rare).await.unwrap();
    let puts = (0..4).map(|n| {
        let registry = registry.clone();
        tokio::spawn(async move {
            let key = key(&format!("/{n}"));
            registry.put(&key, "").await.unwrap();
            registry.get(&key, Read::Linearizable).await.unwrap();
        })
    });
    for put in puts.collect::<Vec<_>>() {
        put.await.unwrap();
    }
    // No condition to wait for: the time itself is what is tested.
    tokio::time::sleep(Duration::from_secs(31)).await;
    wire.stall_present();
    let began = Instant::now();
    registry.put(&key("/a"), "").await.unwrap();
    assert_eq!(value(&registry, "/a").await, Some(String::new()));
    registry.close().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

/// MySQL says so (4031) before it closes an idle connection; MariaDB just closes it.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_server_closed_while_idle_are_replaced_without_the_callers_notice() {
    let server = Server::start().await;
    server.run("SET GLOBAL wait_timeout = 1").await;
    let registry = connect(&server.address()).await;
    let connections = async || {
        let open = sqlx::raw_sql("SELECT COUNT(*) FROM information_schema.processlist WHERE db = 'test'");
        let rows = server.root().await.fetch_all(open).await.unwrap();
        rows[0].try_get_unchecked::<u64, _>(0).unwrap()
    };
    for _ in 0..3 {
        let gets = (0..8).map(|_| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.get(&key("/a"), Read::Linearizable).await })
        });
        for get in gets.collect::<Vec<_>>() {
            get.await.unwrap().unwrap();
        }
        registry.put(&key("/a"), "").await.unwrap();
        // One for keep-alives stays, and one that reads the sessions. Each call of the next round meets a dead one.
        until("the others are closed", async || connections().await <= 2).await;
    }
    registry.close().await.unwrap();
}

/// A client that is paused between the two trips of a write finds its connection closed and its write undone.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_waited_too_long_in_the_middle_is_tried_again() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let patient = Options {
        request_timeout: Duration::from_secs(30),
        session_ttl: SessionTtl::new(Duration::from_secs(60)).unwrap(),
        ..options()
    };
    let config = MysqlConfig::new(url(&wire.address().to_string()));
    let registry = registry_mysql::connect(&config, &patient).await.unwrap();
    registry.put(&key("/a"), "0").await.unwrap();
    for n in 1..4 {
        // Its answer is held up for longer than the server lets a client think.
        wire.slow(Duration::from_secs(4));
        let put = tokio::spawn({
            let registry = registry.clone();
            async move { registry.put(&key("/a"), n.to_string()).await }
        });
        let holds = async |wanted: bool| {
            let sql = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_rows_locked > 0";
            until("the lock is taken, and let go", async || {
                tokio::time::sleep(Duration::from_millis(150)).await;
                let rows = server.root().await.fetch_all(sqlx::raw_sql(sql)).await.unwrap();
                (rows[0].try_get_unchecked::<u64, _>(0).unwrap() > 0) == wanted
            })
            .await;
        };
        holds(true).await;
        holds(false).await;
        wire.mend();
        within(PATIENCE, "the put", put).await.unwrap().unwrap();
        assert_eq!(value(&registry, "/a").await, Some(n.to_string()));
    }
    registry.close().await.unwrap();
}

/// The commit is on its way when the answers stop: the caller must not take it for one that never happened.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_never_comes_is_unknown() {
    let server = Server::start().await;
    let wire = Wire::to(server.address().parse().unwrap()).await;
    let patient = Options {
        request_timeout: Duration::from_secs(6),
        ..options()
    };
    let config = MysqlConfig::new(url(&wire.address().to_string()));
    let registry = registry_mysql::connect(&config, &patient).await.unwrap();
    let other = connect(&server.address()).await;
    registry.put(&key("/a"), "0").await.unwrap();
    // The lock is taken by another, so the put waits for it in the middle of its first trip; what it sends then arrives, and
    // what comes back from its second trip does not.
    let mut holder = server.root().await;
    let hold = "BEGIN; SELECT * FROM test.registry_namespaces FOR UPDATE";
    holder.execute(sqlx::raw_sql(hold)).await.unwrap();
    let put = tokio::spawn({
        let registry = registry.clone();
        async move { registry.put(&key("/a"), "1").await }
    });
    until("the put waits for the lock", async || {
        let waits = sqlx::raw_sql("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'");
        let rows = server.root().await.fetch_all(waits).await.unwrap();
        rows[0].try_get_unchecked::<String, _>(1).unwrap() != "0"
    })
    .await;
    // The wire takes a second each way: the answer to the first trip arrives after one, the second trip after two. The cut
    // comes between them.
    wire.slow(Duration::from_secs(1));
    holder.execute(sqlx::raw_sql("ROLLBACK")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(value(&other, "/a").await, Some("0".into()));
    wire.cut_one_way(Direction::ToClient);
    until("it is committed", async || {
        value(&other, "/a").await == Some("1".into())
    })
    .await;
    let outcome = within(PATIENCE, "the put", put).await.unwrap();
    assert!(matches!(outcome, Err(Error::OutcomeUnknown { .. })), "{outcome:?}");
    other.close().await.unwrap();
}
