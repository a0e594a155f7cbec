//! Sessions of handles that are gone: they end in time, whichever handles are left to see to it.

#![allow(clippy::unwrap_used)]

mod harness;

use std::time::{Duration, Instant};

use harness::{Server, connect, key, options, until, url, within};
use registry_api::{Options, Prefix, SessionTtl, WatchScope};
use registry_mysql::MysqlConfig;
use sqlx::{AssertSqlSafe, Row};

/// Sessions that nobody keeps alive, with ids below those of every handle.
async fn dead_sessions(server: &Server, count: usize, ttl: Duration) {
    let rows: Vec<_> = (1..=count)
        .map(|id| format!("(1, {id}, {}, 1, NOW(3))", ttl.as_millis()))
        .collect();
    let insert = "INSERT INTO test.registry_sessions (namespace, id, ttl_ms, beat, seen_at) VALUES";
    server.run(&format!("{insert} {}", rows.join(", "))).await;
}

async fn left(server: &Server, count: usize) -> bool {
    let sql = format!("SELECT COUNT(*) FROM test.registry_sessions WHERE namespace = 1 AND id <= {count}");
    let row = sqlx::Executor::fetch_one(&mut server.root().await, sqlx::raw_sql(AssertSqlSafe(sql)))
        .await
        .unwrap();
    row.get::<i64, _>(0) > 0
}

/// S2. The handle that is left looks after sessions of an hour, when one of a second is opened.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_session_ends_in_time_beside_long_ones() {
    let server = Server::start().await;
    let long = Options {
        session_ttl: SessionTtl::new(Duration::from_secs(3_600)).unwrap(),
        ..options()
    };
    let registry = registry_mysql::connect(&MysqlConfig::new(url(&server.address())), &long)
        .await
        .unwrap();
    // It has looked once, and pauses.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ttl = Duration::from_secs(1);
    dead_sessions(&server, 1, ttl).await;
    let began = Instant::now();
    until("it is swept", async || !left(&server, 1).await).await;
    let took = began.elapsed();
    assert!(took >= ttl && took <= 3 * ttl, "{took:?}");
    registry.close().await.unwrap();
}

/// S2. All handles that look after the others end together, and many more with them.
#[tokio::test(flavor = "multi_thread")]
async fn many_that_end_together_are_swept_by_the_one_that_is_left() {
    const DEAD: usize = 40;
    let ttl = Duration::from_secs(4);
    let server = Server::start().await;
    let registry = connect(&server.address()).await;
    dead_sessions(&server, DEAD, ttl).await;
    let began = Instant::now();
    until("all are swept", async || !left(&server, DEAD).await).await;
    let took = began.elapsed();
    assert!(took >= ttl && took <= 2 * ttl + Duration::from_secs(1), "{took:?}");
    registry.close().await.unwrap();
}

/// A mirror is kept by a thread of the crate, whatever becomes of the runtime that it was made on.
#[test]
fn a_mirror_outlives_the_runtime_that_it_was_made_on() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::start());
    let registry = runtime.block_on(connect(&server.address()));
    let passing = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mirror = passing
        .block_on(registry.mirror(Prefix::parse("/w").unwrap(), WatchScope::Subtree))
        .unwrap();
    drop(passing);
    runtime.block_on(async {
        let revision = registry.put(&key("/w/1"), "1").await.unwrap();
        within(Duration::from_secs(20), "the copy", mirror.caught_up(revision))
            .await
            .unwrap();
        assert!(mirror.get(&key("/w/1")).is_some());
        registry.close().await.unwrap();
    });
}
