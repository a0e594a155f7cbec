//! Users and TLS.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;

use harness::{Product, Server, key, options, product};
use registry_api::{Error, Read, Registry, Result};
use registry_mysql::{Identity, MysqlConfig, Server as Place, Tls, Url};
use sqlx::{Executor, Row};

async fn connect_as(server: &Server, user: &str, database: &str) -> Result<Arc<dyn Registry>> {
    let url = format!("mysql://{user}@{}/{database}", server.address());
    registry_mysql::connect(&MysqlConfig::new(Url::new(&url).unwrap()), &options()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_works_in_its_database_and_nobody_else_does() {
    let server = Server::start().await;
    let users = "CREATE USER app IDENTIFIED BY 'app s@cret'; GRANT ALL ON test.* TO app; CREATE DATABASE other";
    server.run(users).await;
    let registry = connect_as(&server, "app:app%20s%40cret", "test").await.unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    assert!(registry.get(&key("/a"), Read::Linearizable).await.unwrap().is_some());
    for (user, database) in [
        ("app:wrong-s%40cret", "test"),
        ("nobody:app%20s%40cret", "test"),
        ("app", "test"),
        ("app:app%20s%40cret", "other"),
    ] {
        let refused = connect_as(&server, user, database).await;
        assert!(
            matches!(refused, Err(Error::AccessDenied { .. })),
            "{user}: {refused:?}"
        );
        assert!(!format!("{refused:?}").contains("cret"), "{refused:?}");
    }
    let missing = connect_as(&server, "root", "none").await;
    assert!(
        matches!(&missing, Err(Error::Config { field, .. }) if field.contains("database")),
        "{missing:?}"
    );
    // Rights that are taken away while a handle is open are told to it.
    server.run("REVOKE ALL ON test.* FROM app").await;
    server.kill_connections("app").await;
    let refused = registry.put(&key("/a"), "2").await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_authority_and_a_certificate() {
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str| files.path().join(name);
    for (name, subject) in [
        ("ca", "/CN=test-ca"),
        ("server", "/CN=server"),
        ("client", "/CN=client"),
    ] {
        harness::certificate(files.path(), name, subject);
    }
    let argument = |option: &str, name: &str| format!("--{option}={}", file(name).display());
    let server = Server::start_with(&[
        &argument("ssl-ca", "ca.pem"),
        &argument("ssl-cert", "server.pem"),
        &argument("ssl-key", "server.key"),
    ])
    .await;
    server
        .run("CREATE USER app REQUIRE X509; GRANT ALL ON test.* TO app")
        .await;
    let connect = async |user: &str, tls: Option<Tls>| {
        let url = Url::new(&format!("mysql://{user}@{}/test", server.address())).unwrap();
        let mut config = MysqlConfig::new(url.clone());
        if let Place::Url { tls: place, .. } = &mut config.server {
            *place = tls;
        }
        registry_mysql::connect(&config, &options()).await
    };
    let client = Identity {
        cert: file("client.pem"),
        key: file("client.key"),
    };
    let whole = || Tls {
        ca: file("ca.pem"),
        client: Some(client.clone()),
    };
    let registry = connect("app", Some(whole())).await.unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    let encrypted = "SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'app'";
    let rows = server.root().await.fetch_all(sqlx::raw_sql(encrypted)).await.unwrap();
    assert!(rows[0].try_get_unchecked::<u64, _>(0).unwrap() > 0);
    registry.close().await.unwrap();

    let nameless = connect(
        "app",
        Some(Tls {
            client: None,
            ..whole()
        }),
    )
    .await;
    assert!(matches!(nameless, Err(Error::AccessDenied { .. })), "{nameless:?}");
    let distrusted = connect(
        "app",
        Some(Tls {
            ca: file("client.pem"),
            ..whole()
        }),
    )
    .await;
    assert!(matches!(distrusted, Err(Error::Unavailable { .. })), "{distrusted:?}");
    let missing = connect(
        "app",
        Some(Tls {
            ca: file("none.pem"),
            ..whole()
        }),
    )
    .await;
    assert!(
        matches!(&missing, Err(Error::Config { field, .. }) if field == "registry.mysql.tls.ca"),
        "{missing:?}"
    );
    // Without a word about TLS it is used all the same where it is offered.
    connect("root", None).await.unwrap().close().await.unwrap();
}

/// Without TLS the password of `caching_sha2_password`, which is MySQL's default, can't be sent. With MariaDB's default it
/// can.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_needs_tls_says_so() {
    let server = match product() {
        Product::MySql => Server::start_with(&["--tls-version="]).await,
        Product::MariaDb => Server::start_with(&["--skip-ssl"]).await,
    };
    server
        .run("CREATE USER app IDENTIFIED BY 'app s@cret'; GRANT ALL ON test.* TO app")
        .await;
    let connected = connect_as(&server, "app:app%20s%40cret", "test").await;
    match product() {
        Product::MySql => {
            let refused = connected.expect_err("it can't log in");
            let said = refused.to_string();
            assert!(
                matches!(&refused, Error::Config { field, .. } if field == "registry.mysql.tls"),
                "{refused:?}"
            );
            assert!(
                said.contains("caching_sha2_password") && !said.contains("s@cret"),
                "{said}"
            );
        }
        Product::MariaDb => {
            let registry = connected.unwrap();
            registry.put(&key("/a"), "1").await.unwrap();
            registry.close().await.unwrap();
        }
    }
}
