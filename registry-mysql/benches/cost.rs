//! What the contract costs: writes, events and locks through the registry, and what one would write by hand on the same
//! server, in one run.
//!
//! `cargo bench -p registry-mysql` starts a MariaDB of its own on loopback, durable as shipped. The sides take turns, round by
//! round, so that what else the machine does falls on all; the figure of each is the median of its rounds.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{Server, connect, key, url};
use registry_api::{BoxError, Prefix, Registry, WatchItem, WatchRequest, WatchScope};
use registry_mysql::MysqlConfig;
use registry_tests::cost::{self, Done, median, timed};
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use sqlx::{AssertSqlSafe, Connection, Executor, MySqlConnection, MySqlPool};

const VALUE: [u8; 256] = [b'v'; 256];
const ROUNDS: usize = 7;

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
    // `cargo test` builds benches too, and runs them with this.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let server = Server::start().await;
    let options: MySqlConnectOptions = format!("mysql://root@{}/test", server.address()).parse()?;
    let raw = MySqlPoolOptions::new()
        .max_connections(256)
        .connect_with(options.clone())
        .await?;
    raw.execute(sqlx::raw_sql(TABLES)).await?;
    let (ours, other) = (connect(&server.address()).await, connect(&server.address()).await);
    let bench = Bench { raw, ours };

    println!("puts a second, 256 bytes, the median of {ROUNDS} rounds in turns");
    println!(
        "{:>8}{:>12}{:>22}{:>10}{:>22}{:>10}",
        "writers", "registry", "a transaction each", "ratio", "kine's insert", "ratio"
    );
    for writers in [1, 16, 64, 256] {
        bench.puts(writers).await?;
    }
    bench.delays(&other, "of another handle").await?;
    let own = bench.ours.clone();
    bench.delays(&own, "of the own handle").await?;
    bench.locks(&options).await?;
    bench.ours.close().await?;
    other.close().await?;
    idle(&server).await
}

#[derive(Clone)]
struct Bench {
    raw: MySqlPool,
    ours: Arc<dyn Registry>,
}

impl Bench {
    async fn puts(&self, writers: usize) -> Done {
        let each = (2000 / writers).clamp(12, 400);
        let (mut ours, mut rows, mut kine) = (Vec::new(), Vec::new(), Vec::new());
        // The first round only warms up.
        for round in 0..=ROUNDS {
            let of_ours = timed(writers, |writer| self.clone().put_ours(writer, each)).await?;
            let of_rows = timed(writers, |writer| self.clone().put_rows(writer, each)).await?;
            let of_kine = timed(writers, |writer| {
                self.clone().put_kine(format!("/{writers}/{round}/{writer}"), each)
            })
            .await?;
            if round > 0 {
                let rate = |taken: Duration| (writers * each) as f64 / taken.as_secs_f64();
                ours.push(rate(of_ours));
                rows.push(rate(of_rows));
                kine.push(rate(of_kine));
            }
        }
        let (ours, rows, kine) = (median(ours), median(rows), median(kine));
        println!(
            "{writers:>8}{ours:>12.0}{rows:>22.0}{:>10.2}{kine:>22.0}{:>10.2}",
            ours / rows,
            ours / kine
        );
        Ok(())
    }

    async fn put_ours(self, writer: usize, count: usize) -> Done {
        for n in 0..count {
            self.ours
                .put(&key(&format!("/{writer}/{}", n % 10)), VALUE.to_vec())
                .await?;
        }
        Ok(())
    }

    /// The same rows: the counter, the entry, the change.
    async fn put_rows(self, writer: usize, count: usize) -> Done {
        let mut connection = self.raw.acquire().await?;
        for n in 0..count {
            let name = format!("/{writer}/{}", n % 10);
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
    async fn put_kine(self, name: String, count: usize) -> Done {
        let mut connection = self.raw.acquire().await?;
        for n in 0..count {
            sqlx::query(
                "INSERT INTO kine (name, created, deleted, create_revision, prev_revision, lease, value, old_value) \
                 VALUES (?, 1, 0, 0, 0, 0, ?, NULL)",
            )
            .bind(format!("{name}/{n}").as_bytes())
            .bind(&VALUE[..])
            .execute(&mut *connection)
            .await?;
        }
        Ok(())
    }

    /// From the answer to a put to its event, at all phases of the poll interval.
    async fn delays(&self, watching: &Arc<dyn Registry>, whose: &str) -> Done {
        const EVENTS: usize = 500;
        let prefix = Prefix::from(key("/delay"));
        let mut watch = watching.watch(WatchRequest::new(prefix, WatchScope::Children)).await?;
        while !matches!(watch.next().await.transpose()?, Some(WatchItem::Synced(_))) {}
        let mut delays = Vec::new();
        for n in 0..EVENTS {
            tokio::time::sleep(Duration::from_millis(7 * (n as u64 % 11))).await;
            self.ours.put(&key("/delay/k"), n.to_string()).await?;
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

    async fn locks(&self, options: &MySqlConnectOptions) -> Done {
        for tasks in [1, 16] {
            let each = 320 / tasks;
            let (mut ours, mut raw) = (Vec::new(), Vec::new());
            for round in 0..=ROUNDS {
                let of_ours = timed(tasks, |_| {
                    let ours = self.ours.clone();
                    async move { cost::lock_and_unlock(ours, &key("/lock"), each).await }
                });
                let of_ours = of_ours.await?;
                let of_raw = timed(tasks, |_| get_lock(options.clone(), each)).await?;
                if round > 0 {
                    let rate = |taken: Duration| (tasks * each) as f64 / taken.as_secs_f64();
                    ours.push(rate(of_ours));
                    raw.push(rate(of_raw));
                }
            }
            let (ours, raw) = (median(ours), median(raw));
            println!("lock and unlock, {tasks} tasks on one lock: {ours:.0} a second; GET_LOCK: {raw:.0}");
        }
        Ok(())
    }
}

/// A lock that is durable nowhere, orders nobody, and goes with its connection.
async fn get_lock(options: MySqlConnectOptions, count: usize) -> Done {
    let mut connection = MySqlConnection::connect_with(&options).await?;
    for _ in 0..count {
        connection.execute(sqlx::raw_sql("SELECT GET_LOCK('lock', 60)")).await?;
        connection.execute(sqlx::raw_sql("SELECT RELEASE_LOCK('lock')")).await?;
    }
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
