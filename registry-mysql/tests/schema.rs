//! The tables: who makes them, whose database they are in, and which versions are taken.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;

use harness::{Server, connect, key, options, try_connect, url};
use registry_api::{Error, Options, Read, Registry, Result};
use registry_mysql::{MysqlConfig, TablePrefix, Url};
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions, MySqlRow};
use sqlx::{Executor, MySqlPool, Row};

async fn works(registry: &Arc<dyn Registry>) {
    registry.put(&key("/a"), "1").await.unwrap();
    registry.put_ephemeral(&key("/e"), "1").await.unwrap();
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    held.release().await.unwrap();
    let entry = registry.get(&key("/a"), Read::Linearizable).await.unwrap().unwrap();
    assert_eq!(entry.value, "1");
}

fn as_user(server: &Server, user: &str) -> MysqlConfig {
    MysqlConfig::new(Url::new(&format!("mysql://{user}@{}/test", server.address())).unwrap())
}

async fn connect_to(config: &MysqlConfig) -> Result<Arc<dyn Registry>> {
    registry_mysql::connect(config, &options()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_migrate_missing_tables_are_an_error_that_says_what_to_do() {
    let server = Server::start().await;
    let mut config = MysqlConfig::new(url(&server.address()));
    config.migrate = false;
    let refused = connect_to(&config).await.unwrap_err();
    let said = refused.to_string();
    assert!(matches!(refused, Error::Storage { .. }), "{refused:?}");
    assert!(
        said.contains("registry_schema") && said.contains("registry schema mysql"),
        "{said}"
    );
    // What it says to run makes them; run again, it changes nothing.
    for _ in 0..2 {
        let sql = registry_mysql::schema(&TablePrefix::default());
        server.run(&format!("USE test; {sql}")).await;
    }
    works(&connect_to(&config).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_make_no_tables_works_on_those_that_are_there() {
    let server = Server::start().await;
    server
        .run("CREATE USER app; GRANT SELECT, INSERT, UPDATE, DELETE ON test.* TO app")
        .await;
    let refused = connect_to(&as_user(&server, "app")).await.unwrap_err();
    let Error::AccessDenied { source, .. } = refused else {
        panic!("{refused:?}")
    };
    let said = source.to_string();
    assert!(
        said.contains("CREATE") && said.contains("registry schema mysql"),
        "{said}"
    );
    let sql = registry_mysql::schema(&TablePrefix::default());
    server.run(&format!("USE test; {sql}")).await;
    works(&connect_to(&as_user(&server, "app")).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_a_newer_version_are_refused() {
    let server = Server::start().await;
    connect(&server.address()).await.close().await.unwrap();
    server.run("INSERT INTO test.registry_schema VALUES (2)").await;
    let refused = try_connect(&server.address()).await.unwrap_err();
    assert!(matches!(refused, Error::Storage { .. }), "{refused:?}");
    assert!(refused.to_string().contains("newer than this program"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_make_the_tables_together() {
    let server = Server::start().await;
    let connecting: Vec<_> = (0..10)
        .map(|_| {
            let address = server.address();
            tokio::spawn(async move { try_connect(&address).await })
        })
        .collect();
    let mut sessions = std::collections::BTreeSet::new();
    for connected in connecting {
        let registry = connected.await.unwrap().unwrap();
        sessions.insert(registry.session().live().unwrap());
    }
    assert_eq!(sessions.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_prefixes_in_one_database_are_two_stores() {
    let server = Server::start().await;
    let mut config = MysqlConfig::new(url(&server.address()));
    config.table_prefix = TablePrefix::new("other_").unwrap();
    let (one, other) = (connect(&server.address()).await, connect_to(&config).await.unwrap());
    one.put(&key("/a"), "1").await.unwrap();
    assert!(other.get(&key("/a"), Read::Linearizable).await.unwrap().is_none());
    works(&other).await;
}

async fn pool(server: &Server) -> MySqlPool {
    let options: MySqlConnectOptions = format!("mysql://root@{}/test", server.address()).parse().unwrap();
    MySqlPoolOptions::new()
        .max_connections(3)
        .connect_with(options)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_the_applications_pool_leaves_it_as_it_was() {
    let server = Server::start().await;
    let pool = pool(&server).await;
    // All but what a statement changes by itself, and what is the connection's own.
    let session = "SHOW SESSION VARIABLES WHERE Variable_name NOT IN ('timestamp', 'rand_seed1', 'rand_seed2', 'pseudo_thread_id', \
                   'last_gtid', 'gtid_executed', 'gtid_owned', 'gtid_binlog_pos', 'gtid_binlog_state', 'gtid_current_pos', \
                   'statement_id', 'identity', 'last_insert_id', 'warning_count', 'error_count', 'gtid_seq_no')";
    let settings = async || {
        let rows = pool.fetch_all(sqlx::raw_sql(session)).await.unwrap();
        let setting = |row: &MySqlRow| {
            let column = |place| {
                row.try_get_unchecked::<Option<String>, _>(place)
                    .unwrap()
                    .unwrap_or_default()
            };
            (column(0), column(1))
        };
        rows.iter().map(setting).collect::<BTreeMap<_, _>>()
    };
    let before = settings().await;
    let registry = connect_to(&MysqlConfig::on_pool(pool.clone())).await.unwrap();
    works(&registry).await;
    let puts: Vec<_> = (0..50)
        .map(|n| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.put(&key(&format!("/many/{n}")), "").await })
        })
        .collect();
    for put in puts {
        put.await.unwrap().unwrap();
    }
    // A put that is refused writes nothing, and gives its connection back all the same.
    assert!(registry.put(&key("/e"), "").await.is_err());
    let mut rows = Vec::new();
    for _ in 0..6 {
        rows.push(settings().await);
    }
    assert!(before.len() > 100, "{before:?}");
    for row in rows {
        let changed: Vec<_> = row
            .iter()
            .filter(|(name, value)| before.get(*name) != Some(value))
            .collect();
        assert!(changed.is_empty(), "{changed:?}");
    }
    assert!(pool.size() <= 3);
    registry.close().await.unwrap();
    works(&connect_to(&MysqlConfig::on_pool(pool.clone())).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_pool_that_is_used_up_is_an_error_in_time() {
    let server = Server::start().await;
    let pool = pool(&server).await;
    let quick = Options {
        request_timeout: std::time::Duration::from_secs(1),
        ..options()
    };
    let registry = registry_mysql::connect(&MysqlConfig::on_pool(pool.clone()), &quick)
        .await
        .unwrap();
    let taken = [
        pool.acquire().await.unwrap(),
        pool.acquire().await.unwrap(),
        pool.acquire().await.unwrap(),
    ];
    let refused = registry.get(&key("/a"), Read::Linearizable).await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })), "{refused:?}");
    let refused = registry.put(&key("/a"), "").await;
    assert!(matches!(refused, Err(Error::Unavailable { .. })), "{refused:?}");
    drop(taken);
    registry.put(&key("/a"), "").await.unwrap();
    registry.close().await.unwrap();
}
