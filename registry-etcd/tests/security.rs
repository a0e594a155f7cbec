//! Users, roles and TLS.

#![allow(clippy::unwrap_used)]

mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, Permission};
use harness::{Servers, until};
use registry_api::{Error, Namespace, Options, Read, Registry, Result};
use registry_etcd::{Credentials, Endpoints, EtcdConfig, Identity, Tls};
use registry_tests::cluster::put_at_last;
use registry_tests::key;
use registry_tests::process::free_port;
use registry_tests::watch::Picture;

/// Turns authentication on, with a user `app` who may do anything in the namespace `/registry`, and nothing else.
async fn with_users(cluster: &Servers) -> Client {
    let mut client = cluster.raw().await;
    client.user_add("root", "root-secret", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("app").await.unwrap();
    // What the page on etcd has an operator grant.
    for part in ["/registry/", "/registry~/"] {
        let everything = Permission::read_write(part).with_prefix();
        client.role_grant_permission("app", everything).await.unwrap();
    }
    client.user_add("app", "app-secret", None).await.unwrap();
    client.user_grant_role("app", "app").await.unwrap();
    client.auth_enable().await.unwrap();
    let as_root = cluster.dial().with_user("root", "root-secret");
    Client::connect(cluster.endpoints(), Some(as_root)).await.unwrap()
}

async fn connect_as(cluster: &Servers, who: Option<(&str, &str)>, options: &Options) -> Result<Arc<dyn Registry>> {
    connect_to(&cluster.endpoints(), who, options).await
}

async fn connect_to(endpoints: &[String], who: Option<(&str, &str)>, options: &Options) -> Result<Arc<dyn Registry>> {
    let mut config = EtcdConfig::new(Endpoints::new(endpoints).unwrap());
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
        namespace: Namespace::parse("/registry2").unwrap(),
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
async fn a_token_that_expired_stops_no_handle() {
    let cluster = Servers::start_with(1, &["--auth-token-ttl=1"]).await;
    with_users(&cluster).await;
    let registry = connect_as(&cluster, Some(("app", "app-secret")), &Options::default())
        .await
        .unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    let as_app = cluster.dial().with_user("app", "app-secret");
    let bare = Client::connect(cluster.endpoints(), Some(as_app)).await.unwrap();
    bare.kv_client().get("/registry/a", None).await.unwrap();
    // Each use of a token gives it its time anew.
    let began = Instant::now();
    until("tokens have expired", async || began.elapsed() > Duration::from_secs(4)).await;
    bare.kv_client()
        .get("/registry/a", None)
        .await
        .expect_err("its token has expired");
    registry.put(&key("/a"), "2").await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    picture
        .until(&mut watch, |picture| picture.has("/a", "2"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_where_nobody_is_known_are_refused() {
    let cluster = Servers::start(1).await;
    let refused = connect_as(&cluster, Some(("app", "app-secret")), &Options::default()).await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_authority_and_a_certificate() {
    let cluster = Servers::start_with_mutual_tls(1).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_user_needs_the_authority_alone_and_finds_a_member_over_tls() {
    let cluster = Servers::start_with_tls().await;
    with_users(&cluster).await;
    let ca_alone = Tls {
        ca: cluster.file("ca.pem"),
        client: None,
    };
    // Without a scheme it is https:// where TLS is set. A member that can't be reached comes first.
    let endpoints = [format!("127.0.0.1:{}", free_port()), cluster.endpoint(0)];
    let mut config = EtcdConfig::new(Endpoints::new(&endpoints).unwrap());
    config.credentials = Some(Credentials {
        user: "app".into(),
        password: "app-secret".into(),
    });
    let plain = registry_etcd::connect(&config, &Options::default()).await;
    assert!(matches!(plain, Err(Error::Unavailable { .. })), "{plain:?}");
    config.tls = Some(ca_alone);
    let registry = registry_etcd::connect(&config, &Options::default()).await.unwrap();
    registry.put_ephemeral(&key("/a"), "1").await.unwrap();
    registry.close().await.unwrap();
    config.credentials = None;
    let nobody = registry_etcd::connect(&config, &Options::default()).await;
    assert!(matches!(nobody, Err(Error::AccessDenied { .. })), "{nobody:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_left_by_a_user_too() {
    let mut cluster = Servers::start(3).await;
    // Asked for while anybody may ask.
    let leader = cluster.leader().await;
    with_users(&cluster).await;
    let mut endpoints = cluster.endpoints();
    endpoints.rotate_left(leader);
    let registry = connect_to(&endpoints, Some(("app", "app-secret")), &Options::default())
        .await
        .unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();
    cluster.kill(leader);
    put_at_last(&*registry, "/after", "1").await;
    picture
        .until(&mut watch, |picture| picture.has("/after", "1"))
        .await
        .unwrap();
    registry.wait_connected(Duration::from_secs(20)).await.unwrap();
    assert!(!held.is_lost());
    held.release().await.unwrap();
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_member_is_left_over_tls() {
    let mut cluster = Servers::start_with_mutual_tls(3).await;
    let mut config = EtcdConfig::new(Endpoints::new(cluster.endpoints()).unwrap());
    config.tls = Some(Tls {
        ca: cluster.file("ca.pem"),
        client: Some(Identity {
            cert: cluster.file("client.pem"),
            key: cluster.file("client.key"),
        }),
    });
    let registry = registry_etcd::connect(&config, &Options::default()).await.unwrap();
    let session = registry.session().live().unwrap();
    let held = registry.lock(&key("/lock")).acquire().await.unwrap();
    let (mut watch, mut picture) = Picture::of(&*registry).await.unwrap();

    // Twice, and the second time there is a quorum again, so that the one that was found is left as well.
    for round in 0..2 {
        let endpoint = registry.health().await.unwrap().endpoint;
        let used = (0..3).find(|&member| endpoint.ends_with(&cluster.endpoint(member)));
        let used = used.unwrap_or_else(|| panic!("{endpoint}"));
        cluster.kill(used);
        let value = round.to_string();
        put_at_last(&*registry, "/after", &value).await;
        picture
            .until(&mut watch, |picture| picture.has("/after", &value))
            .await
            .unwrap();
        registry.wait_connected(Duration::from_secs(20)).await.unwrap();
        assert!(
            !registry
                .health()
                .await
                .unwrap()
                .endpoint
                .ends_with(&cluster.endpoint(used))
        );
        cluster.spawn(used);
        cluster.ready().await;
    }
    assert_eq!(registry.session().live().unwrap(), session);
    held.release().await.unwrap();
    registry.close().await.unwrap();
}
