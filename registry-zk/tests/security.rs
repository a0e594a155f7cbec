//! Users, access control and TLS.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::tls::start_with_tls;
use harness::{Servers, config, until};
use registry_api::{Error, Namespace, Options, Read, Registry, Result, WatchRequest, WatchScope};
use registry_tests::cluster::put_at_last;
use registry_tests::key;
use registry_zk::{Digest, Identity, Tls};
use zookeeper_client::{Acls, Client, Error as ClientError};

async fn connect_as(servers: &Servers, who: Option<(&str, &str)>, options: &Options) -> Result<Arc<dyn Registry>> {
    let mut config = config(&servers.addresses());
    config.auth = who.map(|(user, password)| Digest {
        user: user.into(),
        password: password.into(),
    });
    registry_zk::connect(&config, options).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_works_in_its_namespace_and_nobody_else_does() {
    let mut servers = Servers::start(1).await;
    let options = Options::default();
    let app = Some(("app", "app-secret"));
    let registry = connect_as(&servers, app, &options).await.unwrap();
    registry.put(&key("/a/b"), "1").await.unwrap();
    registry.put_ephemeral(&key("/e"), "1").await.unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    // Another handle of the same user, at the same time.
    let also = connect_as(&servers, app, &options).await.unwrap();
    assert!(also.lock(&key("/lock")).try_acquire().await.unwrap().is_none());
    let entry = also.get(&key("/a/b"), Read::Linearizable).await.unwrap();
    assert_eq!(entry.unwrap().value, "1");
    held.release().await.unwrap();

    for who in [Some(("app", "wrong")), Some(("nobody", "app-secret")), None] {
        let refused = connect_as(&servers, who, &options).await;
        assert!(
            matches!(refused, Err(Error::AccessDenied { .. })),
            "{who:?}: {refused:?}"
        );
        assert!(!format!("{refused:?}").contains("secret"));
    }
    // Of all that is stored, nothing is anybody's.
    let raw = servers.raw().await;
    let mut left = vec!["/registry".to_owned(), "/registry~".to_owned()];
    let authenticated = Client::connector().with_auth("digest", b"app:app-secret");
    let authenticated = authenticated.connect(&servers.addresses()).await.unwrap();
    let mut looked = 0;
    while let Some(path) = left.pop() {
        let found = [
            raw.get_data(&path).await.unwrap_err(),
            raw.delete(&path, None).await.unwrap_err(),
        ];
        // The sweep may take away what is empty.
        if !found.contains(&ClientError::NoNode) {
            assert_eq!(found, [ClientError::NoAuth, not_allowed(&path)], "{path}");
            looked += 1;
        }
        let children = authenticated.list_children(&path).await.unwrap_or_default();
        left.extend(children.into_iter().map(|name| format!("{path}/{name}")));
    }
    assert!(looked > 10);
    // Where nobody was before, whoever comes first is at home.
    let elsewhere = Options {
        namespace: Namespace::parse("/other").unwrap(),
        ..Options::default()
    };
    let other = connect_as(&servers, Some(("nobody", "else")), &elsewhere)
        .await
        .unwrap();
    other.put(&key("/a"), "1").await.unwrap();
    other.close().await.unwrap();
    // The same user when the connection is made anew.
    servers.kill(0);
    servers.spawn(0);
    put_at_last(&*registry, "/a/b", "2").await;
    registry.wait_connected(Duration::from_secs(30)).await.unwrap();
    registry.put_ephemeral(&key("/f"), "2").await.unwrap();
    also.close().await.unwrap();
    registry.close().await.unwrap();
}

/// What is said to a stranger who deletes: the two nodes above everything lie in a root that is everybody's.
fn not_allowed(path: &str) -> ClientError {
    match path {
        "/registry" | "/registry~" => ClientError::NotEmpty,
        _ => ClientError::NoAuth,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_taken_away_are_missed_at_once() {
    let servers = Servers::start(1).await;
    let registry = connect_as(&servers, Some(("app", "app-secret")), &Options::default())
        .await
        .unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    registry.put(&key("/b"), "1").await.unwrap();
    let app = Client::connector().with_auth("digest", b"app:app-secret");
    let app = app.connect(&servers.addresses()).await.unwrap();
    // Their owner can no longer read the one, nor write either.
    app.set_acl("/registry/b", &Acls::anyone_read(), None).await.unwrap();
    let refused = registry.put(&key("/b"), "2").await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
    let there = registry.get(&key("/b"), Read::Linearizable).await.unwrap();
    assert_eq!(there.unwrap().value, "1");
    let stranger = [zookeeper_client::Acl::new(
        zookeeper_client::Permission::ALL,
        zookeeper_client::AuthId::new("digest", "x:y"),
    )];
    app.set_acl("/registry/a", &stranger, None).await.unwrap();
    let refused = registry.get(&key("/a"), Read::Linearizable).await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
    // A watch that can't read what it covers says so, and does not try for ever.
    let mut watch = registry
        .watch(WatchRequest::new(key("/a"), WatchScope::Key))
        .await
        .unwrap();
    let told = tokio::time::timeout(Duration::from_secs(30), watch.next())
        .await
        .unwrap();
    assert!(matches!(told, Some(Err(Error::AccessDenied { .. }))), "{told:?}");
    registry.put(&key("/c"), "1").await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_authority_and_a_certificate() {
    let (mut servers, address) = start_with_tls().await;
    let connect_to = async |address: &str, tls: Option<Tls>| {
        let mut config = config(address);
        config.tls = tls;
        let options = Options {
            connect_timeout: Duration::from_secs(4),
            ..Options::default()
        };
        registry_zk::connect(&config, &options).await
    };
    let connect = async |tls| connect_to(&address, tls).await;
    let client = Identity {
        cert: servers.file("client.pem"),
        key: servers.file("client.key"),
    };
    let ca = servers.file("ca.pem");
    let whole = || Tls {
        ca: ca.clone(),
        client: Some(client.clone()),
    };
    until("the server answers over TLS", Duration::from_secs(40), async || {
        connect(Some(whole())).await.is_ok()
    })
    .await;
    let registry = connect(Some(whole())).await.unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    held.release().await.unwrap();
    // The same way when the connection is made anew.
    servers.kill(0);
    servers.spawn(0);
    put_at_last(&*registry, "/a", "2").await;
    registry.close().await.unwrap();

    let elsewhere = address.replace("127.0.0.1", "localhost");
    let misnamed = connect_to(&elsewhere, Some(whole())).await;
    assert!(
        matches!(misnamed, Err(Error::Unavailable { ref source, .. }) if source.to_string().contains("takes connections")),
        "{misnamed:?}"
    );
    let nameless = connect(Some(Tls {
        client: None,
        ..whole()
    }))
    .await;
    assert!(matches!(nameless, Err(Error::Unavailable { .. })), "{nameless:?}");
    let distrusted = connect(Some(Tls {
        ca: servers.file("client.pem"),
        ..whole()
    }))
    .await;
    assert!(matches!(distrusted, Err(Error::Unavailable { .. })), "{distrusted:?}");
    let plain = connect(None).await;
    assert!(matches!(plain, Err(Error::Unavailable { .. })), "{plain:?}");
    let missing = connect(Some(Tls {
        ca: servers.file("none.pem"),
        ..whole()
    }))
    .await;
    assert!(
        matches!(missing, Err(Error::Config { ref field, .. }) if field == "registry.zk.tls.ca"),
        "{missing:?}"
    );
}
