//! Users, roles and TLS.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission};
use harness::{Servers, until};
use registry_api::{Error, Namespace, Options, Read, Registry, Result};
use registry_etcd::{Credentials, Endpoints, EtcdConfig, Identity, Tls};
use registry_tests::key;

/// Turns authentication on, with a user `app` who may do anything in `/registry`, and nothing else.
async fn with_users(cluster: &Servers) -> Client {
    let mut client = cluster.raw().await;
    client.user_add("root", "root-secret", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("app").await.unwrap();
    let everything = Permission::read_write("/registry").with_prefix();
    client.role_grant_permission("app", everything).await.unwrap();
    client.user_add("app", "app-secret", None).await.unwrap();
    client.user_grant_role("app", "app").await.unwrap();
    client.auth_enable().await.unwrap();
    let as_root = ConnectOptions::new().with_user("root", "root-secret");
    Client::connect(cluster.endpoints(), Some(as_root)).await.unwrap()
}

async fn connect_as(cluster: &Servers, who: Option<(&str, &str)>, options: &Options) -> Result<Arc<dyn Registry>> {
    let mut config = EtcdConfig::new(Endpoints::new(cluster.endpoints()).unwrap());
    config.credentials = who.map(|(user, password)| Credentials {
        user: user.into(),
        password: password.into(),
    });
    registry_etcd::connect(&config, options).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_works_in_its_namespace_and_nobody_else_does() {
    let cluster = Servers::start(1).await;
    with_users(&cluster).await;
    let registry = connect_as(&cluster, Some(("app", "app-secret")), &Options::default())
        .await
        .unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    registry.put_ephemeral(&key("/e"), "1").await.unwrap();
    registry
        .lock(&key("/lock"))
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
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

    let elsewhere = Options {
        namespace: Namespace::parse("/other").unwrap(),
        ..Options::default()
    };
    for (who, options) in [
        (Some(("app", "wrong")), &Options::default()),
        (Some(("nobody", "app-secret")), &Options::default()),
        (None, &Options::default()),
        (Some(("app", "app-secret")), &elsewhere),
    ] {
        let refused = connect_as(&cluster, who, options).await;
        assert!(
            matches!(refused, Err(Error::AccessDenied { .. })),
            "{who:?}: {refused:?}"
        );
        assert!(!format!("{refused:?}").contains("secret"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_users_stops_no_handle() {
    let cluster = Servers::start(1).await;
    let mut root = with_users(&cluster).await;
    let registry = connect_as(&cluster, Some(("app", "app-secret")), &Options::default())
        .await
        .unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    // Every change to users outdates the tokens there are.
    root.user_add("another", "password", None).await.unwrap();
    registry.put(&key("/a"), "2").await.unwrap();
    root.user_add("yet another", "password", None).await.unwrap();
    assert_eq!(
        registry
            .get(&key("/a"), Read::Linearizable)
            .await
            .unwrap()
            .unwrap()
            .value,
        "2"
    );
    root.user_revoke_role("app", "app").await.unwrap();
    let refused = registry.put(&key("/a"), "3").await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_where_nobody_is_known_are_refused() {
    let cluster = Servers::start(1).await;
    let refused = connect_as(&cluster, Some(("app", "app-secret")), &Options::default()).await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_authority_and_a_certificate() {
    let cluster = Servers::start_with_tls();
    let connect = async |tls: Tls| {
        let mut config = EtcdConfig::new(Endpoints::new([format!("https://{}", cluster.endpoint(0))]).unwrap());
        config.tls = Some(tls);
        let options = Options {
            connect_timeout: Duration::from_secs(2),
            ..Options::default()
        };
        registry_etcd::connect(&config, &options).await
    };
    let identity = Identity {
        cert: cluster.file("client.pem"),
        key: cluster.file("client.key"),
    };
    let whole = || Tls {
        ca: cluster.file("ca.pem"),
        client: Some(identity.clone()),
    };
    until("the server answers over TLS", async || connect(whole()).await.is_ok()).await;
    let registry = connect(whole()).await.unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    registry.close().await.unwrap();

    let nameless = connect(Tls {
        client: None,
        ..whole()
    })
    .await;
    assert!(matches!(nameless, Err(Error::Unavailable { .. })), "{nameless:?}");
    let distrusted = connect(Tls {
        ca: cluster.file("client.pem"),
        ..whole()
    })
    .await;
    assert!(matches!(distrusted, Err(Error::Unavailable { .. })), "{distrusted:?}");
    let missing = connect(Tls {
        ca: cluster.file("none.pem"),
        ..whole()
    })
    .await;
    assert!(
        matches!(missing, Err(Error::Config { ref field, .. }) if field == "registry.etcd.tls.ca"),
        "{missing:?}"
    );
}
