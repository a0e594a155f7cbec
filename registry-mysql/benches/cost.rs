//! What the contract costs: writes, events and locks through the registry, and what one would write by hand on the same
//! server, in one run.
//!
//! `cargo bench -p registry-mysql` starts a MariaDB of its own on loopback, durable as shipped.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::{Server, connect, key, url};
use registry_api::{BoxError, Prefix, Registry, WatchItem, WatchRequest, WatchScope};
use registry_mysql::MysqlConfig;
use registry_tests::cost::{self, Done, KEYS, Ours, VALUE};
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use sqlx::{AssertSqlSafe, Connection, Executor, MySqlConnection, MySqlPool};

const TABLES: &str = "
    CREATE TABLE counter (id INT PRIMARY KEY, revision BIGINT UNSIGNED NOT NULL) ENGINE = InnoDB;
    CREATE TABLE entries (name VARBINARY(1024) PRIMARY KEY, value MEDIUMBLOB NOT NULL, revision BIGINT UNSIGNED NOT NULL)
        ENGINE = InnoDB ROW_FORMAT = DYNAMIC;
    CREATE TABLE changes (revision BIGINT UNSIGNED PRIMARY KEY, name VARBINARY(1024) NOT NULL, value MEDIUMBLOB NOT NULL)
        ENGINE = InnoDB;
    CREATE TABLE kine (id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY, name VARBINARY(630) NOT NULL, created INT,
        deleted INT, create_revision BIGINT, prev_revision BIGINT, lease INT, value MEDIUMBLOB, old_value MEDIUMBLOB,
        KEY by_name (name), UNIQUE KEY by_name_and_previous (name, prev_revision)) ENGINE = InnoDB ROW_FORMAT = DYNAMIC;
    INSERT INTO counter VALUES (1, 0);";

#[tokio::main]
async fn main() -> Done {
    if !cost::is_wanted() {
        return Ok(());
    }
    let server = Server::start().await;
    let options: MySqlConnectOptions = format!("mysql://root@{}/test", server.address()).parse()?;
    let raw = MySqlPoolOptions::new()
        .max_connections(256)
        .connect_with(options.clone())
        .await?;
    raw.execute(sqlx::raw_sql(TABLES)).await?;
    let raw = &Raw { pool: raw, options };
    let (ours, other) = (
        &Ours(connect(&server.address()).await),
        connect(&server.address()).await,
    );

    cost::head("by hand");
    for tasks in [1, 16, 64, 256] {
        let name = "put, against the same rows";
        cost::row(name, tasks, 400, (raw, Raw::put_rows), (ours, Ours::put)).await?;
        let name = "put, against kine's insert";
        cost::row(name, tasks, 400, (raw, Raw::put_kine), (ours, Ours::put)).await?;
    }
    for tasks in [1, 16] {
        let name = "lock and unlock, against GET_LOCK";
        cost::row(name, tasks, 320, (raw, Raw::get_lock), (ours, Ours::lock)).await?;
    }
    if cost::is_asked_for("delays") {
        delays(&ours.0, &other, "of another handle").await?;
        delays(&ours.0, &ours.0, "of the own handle").await?;
    }
    ours.0.close().await?;
    other.close().await?;
    if cost::is_asked_for("idle") {
        idle(&server).await?;
    }
    Ok(())
}

/// What one would write by hand.
#[derive(Clone)]
struct Raw {
    pool: MySqlPool,
    options: MySqlConnectOptions,
}

impl Raw {
    /// The same rows: the counter, the entry, the change.
    async fn put_rows(self, task: usize, count: usize) -> Done {
        let mut connection = self.pool.acquire().await?;
        for round in 0..count {
            let name = format!("/{task}-{}", round % KEYS);
            let mut txn = connection.begin().await?;
            sqlx::query("UPDATE counter SET revision = LAST_INSERT_ID(revision + 1) WHERE id = 1")
                .execute(&mut *txn)
                .await?;
            sqlx::query("REPLACE INTO entries VALUES (?, ?, LAST_INSERT_ID())")
                .bind(name.as_bytes())
                .bind(&VALUE[..])
                .execute(&mut *txn)
                .await?;
            sqlx::query("INSERT INTO changes VALUES (LAST_INSERT_ID(), ?, ?)")
                .bind(name.as_bytes())
                .bind(&VALUE[..])
                .execute(&mut *txn)
                .await?;
            txn.commit().await?;
        }
        Ok(())
    }

    /// One row that is inserted, its number given by the table. Nothing is judged, and nothing orders the commits.
    async fn put_kine(self, _task: usize, count: usize) -> Done {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut connection = self.pool.acquire().await?;
        for _ in 0..count {
            sqlx::query(
                "INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value, old_value) \
                 VALUES (?, 1, 0, 0, 0, 0, ?, NULL)",
            )
            .bind(format!("/{}", NEXT.fetch_add(1, Ordering::Relaxed)).as_bytes())
            .bind(&VALUE[..])
            .execute(&mut *connection)
            .await?;
        }
        Ok(())
    }

    /// A lock that is durable nowhere, orders nobody, and goes with its connection.
    async fn get_lock(self, _task: usize, count: usize) -> Done {
        let mut connection = MySqlConnection::connect_with(&self.options).await?;
        for _ in 0..count {
            connection.execute(sqlx::raw_sql("SELECT GET_LOCK('lock', 60)")).await?;
            connection.execute(sqlx::raw_sql("SELECT RELEASE_LOCK('lock')")).await?;
        }
        Ok(())
    }
}

/// From the answer to a put to its event, at all phases of the poll interval.
async fn delays(writing: &Arc<dyn Registry>, watching: &Arc<dyn Registry>, whose: &str) -> Done {
    const EVENTS: usize = 500;
    let prefix = Prefix::from(key("/delay"));
    let mut watch = watching.watch(WatchRequest::new(prefix, WatchScope::Children)).await?;
    while !matches!(watch.next().await.transpose()?, Some(WatchItem::Synced(_))) {}
    let mut delays = Vec::new();
    for n in 0..EVENTS {
        tokio::time::sleep(Duration::from_millis(7 * (n as u64 % 11))).await;
        writing.put(&key("/delay/k"), n.to_string()).await?;
        let answered = Instant::now();
        while !matches!(watch.next().await.transpose()?, Some(WatchItem::Changes(_))) {}
        delays.push(answered.elapsed());
    }
    delays.sort();
    println!(
        "from the answer to a put to the event at a watch {whose}: median {:.1} ms, 99 of 100 within {:.1} ms",
        delays[EVENTS / 2].as_secs_f64() * 1e3,
        delays[EVENTS * 99 / 100].as_secs_f64() * 1e3
    );
    Ok(())
}

/// What handles ask while nothing happens.
async fn idle(server: &Server) -> Done {
    let handle = registry_mysql::connect(&MysqlConfig::new(url(&server.address())), &harness::options()).await?;
    for watches in [0, 1, 20] {
        let mut open = Vec::new();
        for n in 0..watches {
            let request = WatchRequest::new(Prefix::from(key(&format!("/idle/{n}"))), WatchScope::Key);
            let mut watch = handle.watch(request).await?;
            while !matches!(watch.next().await.transpose()?, Some(WatchItem::Synced(_))) {}
            open.push(watch);
        }
        let (before, began) = (questions(server).await?, Instant::now());
        tokio::time::sleep(Duration::from_secs(3)).await;
        let asked = (questions(server).await? - before) as f64 / began.elapsed().as_secs_f64();
        println!("an idle handle with {watches} watches and a TTL of 3 s: {asked:.1} statements a second");
    }
    handle.close().await?;
    Ok(())
}

async fn questions(server: &Server) -> Result<u64, BoxError> {
    let sql = "SELECT CAST(variable_value AS UNSIGNED) FROM information_schema.global_status \
               WHERE variable_name = 'QUESTIONS'";
    let counted = sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_one(&mut server.root().await)
        .await?;
    Ok(counted)
}
