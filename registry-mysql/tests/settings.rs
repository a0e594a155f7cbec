//! Server settings that change what SQL means: set for the handle's own connections, refused by name where they can't be.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;

use harness::{Product, Server, connect, key, options, product, try_connect, within};
use registry_api::{Error, Expect, Prefix, Read, Registry, Txn, Watch, WatchItem, WatchRequest, WatchScope};
use registry_mysql::MysqlConfig;
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use sqlx::{Executor, MySqlConnection, MySqlPool, Row};

/// Longer than the shortest `max_sort_length` that a server takes.
fn child(n: usize) -> String {
    format!("{}{n:02}", "a-common-beginning-of-names-".repeat(5))
}

async fn entries_until_synced(watch: &mut Watch) -> usize {
    let mut entries = 0;
    loop {
        match watch.next().await.unwrap().unwrap() {
            WatchItem::Changes(events) => entries += events.len(),
            WatchItem::Synced(_) => return entries,
            WatchItem::Reset => {}
        }
    }
}

/// What a handle is for, with enough keys that a setting that leaves rows out or puts them into another order shows.
async fn works(registry: &Arc<dyn Registry>, setting: &str) {
    let folder = key("/folder");
    let keys: Vec<_> = (0..12).rev().map(|n| key(&format!("/folder/{}", child(n)))).collect();
    for key in &keys {
        registry
            .put(key, "")
            .await
            .unwrap_or_else(|error| panic!("{setting}: {error:?}"));
    }
    let sorted: Vec<_> = (0..12).map(child).collect();
    let children = registry
        .children(&Prefix::from(folder.clone()), Read::Linearizable)
        .await;
    assert_eq!(children.unwrap(), sorted, "{setting}");
    let request = WatchRequest::new(Prefix::from(folder.clone()), WatchScope::Children);
    let mut watch = registry.watch(request).await.unwrap();
    assert_eq!(entries_until_synced(&mut watch).await, 12, "{setting}");
    // Judged on what is read for it.
    let present = keys.iter().fold(Txn::new(), |txn, key| txn.when(key, Expect::Present));
    let present = keys.iter().fold(present, |txn, key| txn.put(key, "again"));
    registry
        .commit(present)
        .await
        .unwrap_or_else(|error| panic!("{setting}: {error:?}"));
    for key in &keys {
        let entry = registry.get(key, Read::Linearizable).await.unwrap().unwrap();
        assert!(
            entry.create_revision < entry.mod_revision,
            "{setting}: it was made anew"
        );
    }
    registry.put_ephemeral(&key("/ephemeral"), "").await.unwrap();
    assert_eq!(
        registry.delete_prefix(&Prefix::from(folder)).await.unwrap(),
        12,
        "{setting}"
    );
}

/// What is committed by one handle is seen by another, at once; what is not is seen by nobody.
async fn commits(root: &mut MySqlConnection, registry: &Arc<dyn Registry>, other: &Arc<dyn Registry>, setting: &str) {
    let shared = key("/shared");
    for n in 0..4 {
        registry.put(&shared, n.to_string()).await.unwrap();
        let seen = other.get(&shared, Read::Linearizable).await.unwrap().unwrap();
        assert_eq!(seen.value, n.to_string(), "{setting}");
    }
    let dirty = "START TRANSACTION; UPDATE test.registry_entries SET value = 'dirty' WHERE name = '/shared'";
    root.execute(sqlx::raw_sql(dirty)).await.unwrap();
    let seen = other.get(&shared, Read::Linearizable).await.unwrap().unwrap();
    assert_eq!(seen.value, "3", "{setting}");
    root.execute(sqlx::raw_sql("ROLLBACK")).await.unwrap();
}

async fn pool(server: &Server) -> MySqlPool {
    let options: MySqlConnectOptions = format!("mysql://root@{}/test", server.address()).parse().unwrap();
    MySqlPoolOptions::new()
        .max_connections(3)
        .connect_with(options)
        .await
        .unwrap()
}

/// The variable of a product, and the same of the other.
fn named(mariadb: &'static str, mysql: &'static str) -> &'static str {
    match product() {
        Product::MariaDb => mariadb,
        Product::MySql => mysql,
    }
}

/// Sets a variable for all connections that come, and gives what it was.
async fn set(root: &mut MySqlConnection, variable: &str, value: &str) -> String {
    let before = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("SELECT @@GLOBAL.{variable}")));
    let rows = root.fetch_all(before).await.unwrap();
    let before = rows[0].try_get_unchecked::<String, _>(0).unwrap();
    run(root, &format!("SET GLOBAL {variable} = {value}")).await;
    before
}

async fn restore(root: &mut MySqlConnection, variable: &str, value: &str) {
    let is_number = value.parse::<f64>().is_ok();
    let value = if is_number {
        value.to_owned()
    } else {
        format!("'{value}'")
    };
    run(root, &format!("SET GLOBAL {variable} = {value}")).await;
}

/// On a connection from before a setting was changed, which has the old one.
async fn run(root: &mut MySqlConnection, sql: &str) {
    root.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(sql))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn session_settings_of_the_server_change_nothing_for_a_handle() {
    let server = Server::start().await;
    connect(&server.address()).await.close().await.unwrap();
    let mut root = server.root().await;
    let settings = [
        ("sql_select_limit", "5"),
        ("sql_select_limit", "0"),
        ("completion_type", "'CHAIN'"),
        ("completion_type", "'RELEASE'"),
        ("autocommit", "0"),
        ("sql_safe_updates", "1"),
        (
            "sql_mode",
            named(
                "'EMPTY_STRING_IS_NULL,HIGH_NOT_PRECEDENCE,SIMULTANEOUS_ASSIGNMENT,ORACLE'",
                "'HIGH_NOT_PRECEDENCE'",
            ),
        ),
        (
            "sql_mode",
            "'ANSI,TRADITIONAL,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH'",
        ),
        ("sql_mode", "''"),
        // It turns `sql_big_selects` off.
        ("max_join_size", "1"),
        ("unique_checks", "0"),
        ("foreign_key_checks", "0"),
        ("max_sort_length", named("64", "4")),
        ("group_concat_max_len", "4"),
        ("div_precision_increment", "0"),
        ("time_zone", "'+05:30'"),
        ("character_set_results", "'utf16'"),
        ("character_set_connection", "'utf16'"),
        ("collation_connection", "'latin1_bin'"),
        (named("tx_isolation", "transaction_isolation"), "'READ-UNCOMMITTED'"),
        (named("tx_isolation", "transaction_isolation"), "'SERIALIZABLE'"),
        (named("tx_read_only", "transaction_read_only"), "1"),
        // Of MariaDB in seconds, of MySQL in milliseconds.
        (
            named("max_statement_time", "max_execution_time"),
            named("0.000001", "1"),
        ),
        ("wait_timeout", "1"),
        ("innodb_lock_wait_timeout", "1"),
        ("lock_wait_timeout", "1"),
    ];
    for (variable, value) in settings {
        let setting = format!("{variable} = {value}");
        let before = set(&mut root, variable, value).await;
        let (registry, other) = (connect(&server.address()).await, connect(&server.address()).await);
        let limit = std::time::Duration::from_secs(30);
        within(limit, &setting, works(&registry, &setting)).await;
        within(limit, &setting, commits(&mut root, &registry, &other, &setting)).await;
        restore(&mut root, variable, &before).await;
        for handle in [registry, other] {
            handle.close().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_with_a_setting_that_changes_the_meaning_of_sql_is_refused_by_name() {
    let server = Server::start().await;
    let mut root = server.root().await;
    let isolation = named("tx_isolation", "transaction_isolation");
    let read_only = named("tx_read_only", "transaction_read_only");
    for (variable, value, field) in [
        ("sql_select_limit", "5", "sql_select_limit"),
        ("sql_select_limit", "0", "sql_select_limit"),
        ("completion_type", "'CHAIN'", "completion_type"),
        ("autocommit", "0", "autocommit"),
        ("sql_safe_updates", "1", "sql_safe_updates"),
        ("sql_mode", "'HIGH_NOT_PRECEDENCE'", "sql_mode"),
        ("max_join_size", "1", "max_join_size"),
        ("unique_checks", "0", "unique_checks"),
        ("max_sort_length", "100", "max_sort_length"),
        // Later versions of MariaDB have both names.
        (isolation, "'READ-UNCOMMITTED'", "isolation"),
        (read_only, "1", "read_only"),
    ] {
        let before = set(&mut root, variable, value).await;
        let pool = pool(&server).await;
        let refused = registry_mysql::connect(&MysqlConfig::on_pool(pool.clone()), &options()).await;
        let Err(Error::Config { field: named, reason }) = &refused else {
            panic!("{variable} = {value}: {refused:?}");
        };
        assert!(
            named.contains(field) && reason.to_lowercase().contains(field),
            "{variable}: {named}: {reason}"
        );
        pool.close().await;
        restore(&mut root, variable, &before).await;
    }
    let registry = registry_mysql::connect(&MysqlConfig::on_pool(pool(&server).await), &options())
        .await
        .unwrap();
    works(&registry, "as shipped").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loses_acknowledged_writes_is_refused_by_name() {
    let server = Server::start_with(&[
        "--log-bin=binlog",
        "--server-id=1",
        "--sync-binlog=1",
        "--binlog-format=ROW",
    ])
    .await;
    connect(&server.address()).await.close().await.unwrap();
    let mut root = server.root().await;
    for (variable, value) in [
        ("innodb_flush_log_at_trx_commit", "0"),
        ("innodb_flush_log_at_trx_commit", "2"),
        ("sync_binlog", "0"),
        ("sync_binlog", "100"),
        ("binlog_format", "'STATEMENT'"),
        ("max_allowed_packet", "1048576"),
    ] {
        let before = set(&mut root, variable, value).await;
        let refused = try_connect(&server.address()).await;
        assert!(
            matches!(&refused, Err(Error::Config { field, .. }) if field.contains(variable)),
            "{variable} = {value}: {refused:?}"
        );
        restore(&mut root, variable, &before).await;
    }
    connect(&server.address()).await.close().await.unwrap();
}

/// The setting of a connection that is open may be another than that of the next one.
#[tokio::test(flavor = "multi_thread")]
async fn statement_based_logs_that_a_handle_meets_later_are_named() {
    let server = Server::start_with(&[
        "--log-bin=binlog",
        "--server-id=1",
        "--sync-binlog=1",
        "--binlog-format=ROW",
    ])
    .await;
    let registry = connect(&server.address()).await;
    registry.put(&key("/a"), "1").await.unwrap();
    server.run("SET GLOBAL binlog_format = 'STATEMENT'").await;
    server.kill_connections("root").await;
    let refused = registry.put(&key("/a"), "2").await;
    assert!(
        matches!(&refused, Err(Error::Config { field, .. }) if field.contains("binlog_format")),
        "{refused:?}"
    );
}
