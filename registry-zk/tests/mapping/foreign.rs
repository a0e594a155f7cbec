//! What other ZooKeeper clients do in a namespace.

use registry_api::Refusal;
use registry_tests::refusal;
use zookeeper_client::{Acl, Acls, AuthId, CreateMode, Permission};

use super::*;
use crate::harness::wire;

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_other_clients_are_keys() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let mut watch = registry
        .watch(WatchRequest::new(Prefix::root(), WatchScope::Subtree))
        .await
        .unwrap();
    raw.create("/registry/theirs", b"1", &anyone()).await.unwrap();
    raw.create("/registry/theirs/below", b"2", &anyone()).await.unwrap();
    raw.set_data("/registry/theirs", b"3", None).await.unwrap();
    // No key has such a name.
    raw.create("/registry/\u{e000}", b"", &anyone()).await.unwrap_err();
    let long = "x".repeat(300);
    raw.create(&format!("/registry/{long}"), b"", &anyone()).await.unwrap();
    let port = servers.address(0).parse::<std::net::SocketAddr>().unwrap().port();
    wire::create_without_data(port, "/registry/null").await.unwrap();

    assert_eq!(get(&registry, "/theirs").await.unwrap().value, "3");
    assert_eq!(get(&registry, "/null").await.unwrap().value, "");
    assert_eq!(children(&registry, "/").await, ["null", "theirs"]);
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await.unwrap(), 3);
    let mut picture = Picture::default();
    let last = key("/null");
    picture
        .until(&mut watch, |picture| picture.entries.contains_key(&last))
        .await
        .unwrap();
    same_as_store(&*registry, "/", &picture).await.unwrap();

    // They are put, compared and deleted like others.
    let theirs = key("/theirs");
    let found = get(&registry, "/theirs").await.unwrap();
    let expect = Expect::ModRevision(found.mod_revision);
    registry.put_if(&theirs, expect, "ours").await.unwrap();
    assert!(matches!(
        registry.put_if(&theirs, expect, "again").await,
        Err(Error::Conflict { .. })
    ));
    assert_eq!(data(&raw, "/registry/theirs").await.unwrap(), b"ours");
    raw.delete("/registry/theirs/below", None).await.unwrap();
    assert!(registry.delete(&theirs).await.unwrap());
    assert_eq!(data(&raw, "/registry/theirs").await, None);
    // What no key names goes with what it is below.
    assert_eq!(registry.delete_prefix(&Prefix::root()).await.unwrap(), 1);
    assert_eq!(nodes(&raw).await, Vec::<String>::new());
    registry.close().await.unwrap();
}

/// Others' nodes that this handle may not read or change are theirs, and in nobody's way.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_are_closed_to_the_handle_do_not_stop_the_sweep() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let stranger = [Acl::new(Permission::ALL, AuthId::new("digest", "x:y"))];
    let theirs = CreateMode::Persistent.with_acls(Acls::from(&stranger[..]));
    raw.create("/registry/theirs", MARK, &theirs).await.unwrap();
    let nothing_goes = [Acl::new(Permission::READ | Permission::CREATE, AuthId::anyone())];
    let kept = CreateMode::Persistent.with_acls(Acls::from(&nothing_goes[..]));
    raw.create("/registry/kept", b"", &kept).await.unwrap();
    raw.create("/registry/kept/mark", MARK, &anyone()).await.unwrap();
    let other = connect(&servers.addresses()).await;
    other.put_ephemeral(&key("/e/f/g"), "").await.unwrap();
    other.close().await.unwrap();
    until("the parents are gone", SOON, async || {
        nodes(&raw).await == ["/registry/kept", "/registry/kept/mark", "/registry/theirs"]
    })
    .await;
    // Nor does it stop what does not cover them.
    registry.put(&key("/a/b"), "1").await.unwrap();
    assert_eq!(children(&registry, "/").await, ["a", "kept", "theirs"]);
    assert_eq!(registry.list_all(List::new(key("/a"))).await.unwrap().len(), 1);
    let refused = registry.list_all(List::new(Prefix::root())).await;
    assert!(matches!(refused, Err(Error::AccessDenied { .. })), "{refused:?}");
    registry.close().await.unwrap();
}

/// ZooKeeper keeps their kind where it keeps the session of an ephemeral one, and does not show it.
#[tokio::test(flavor = "multi_thread")]
async fn containers_and_znodes_with_a_ttl_are_persistent_keys() {
    let servers = Servers::start_with(1, "extendedTypesEnabled=true\n").await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    let container = CreateMode::Container.with_acls(Acls::anyone_all());
    let with_ttl = anyone().with_ttl(Duration::from_secs(600));
    for (path, options) in [("/box", container), ("/passing", with_ttl)] {
        raw.create(&format!("/registry{path}"), b"1", &options).await.unwrap();
        let entry = get(&registry, path).await.unwrap();
        assert_eq!(entry.session, None, "{path}");
        registry.put(&key(path), "2").await.unwrap();
        registry.put(&key(&format!("{path}/below")), "").await.unwrap();
        let taken = registry.put_ephemeral(&key(path), "").await;
        assert_eq!(refusal(taken), Refusal::Persistent, "{path}");
    }
    registry.close().await.unwrap();
}

/// A handle that puts a key again and again does not read it in between, and learns what became of it from the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_another_client_makes_ephemeral_is_put_once_at_most() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    registry.put(&key("/k"), "1").await.unwrap();
    raw.delete("/registry/k", None).await.unwrap();
    let ephemeral = CreateMode::Ephemeral.with_acls(Acls::anyone_all());
    raw.create("/registry/k", b"2", &ephemeral).await.unwrap();
    // Within a second it goes through, and later it does not.
    let _ = registry.put(&key("/k"), "3").await;
    let refused = registry.put(&key("/k"), "4").await;
    assert_eq!(refusal(refused), Refusal::Ephemeral);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_another_hand_deleted_is_made_again() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    registry.put(&key("/a/b"), "1").await.unwrap();
    let mut paths = nodes(&raw).await;
    for path in [
        "/registry",
        "/registry~",
        "/registry~/rev",
        "/registry~/clock",
        "/registry~/sweeper",
        "/registry~/session",
        "/registry~/birth",
    ] {
        paths.push(path.to_owned());
    }
    paths.extend((0..256).map(|part| format!("/registry~/rev/{part:02x}")));
    let signs = raw.list_children("/registry~/session").await.unwrap();
    paths.extend(signs.iter().map(|sign| format!("/registry~/session/{sign}")));
    paths.sort();
    let mut all = raw.new_multi_writer();
    for path in paths.iter().rev() {
        all.add_delete(path, None).unwrap();
    }
    all.commit().await.unwrap();
    assert!(get(&registry, "/a/b").await.is_none());
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    held.release().await.unwrap();
    registry.put(&key("/a/b"), "2").await.unwrap();
    assert_eq!(get(&registry, "/a/b").await.unwrap().value, "2");
    // Or parts of it.
    raw.delete("/registry~/clock", None).await.unwrap();
    for part in 0..128 {
        raw.delete(&format!("/registry~/rev/{part:02x}"), None).await.unwrap();
    }
    for number in 0..20 {
        registry.put(&key(&format!("/many/{number}")), "").await.unwrap();
    }
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    held.release().await.unwrap();
    registry.close().await.unwrap();
}
