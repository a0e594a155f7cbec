//! When a key was created, where its znode was there before as a placeholder.

use registry_api::{Event, Existing, Kind, Refusal, WatchItem};
use registry_tests::refusal;

use super::*;

fn put_at(path: &str, created: Revision) -> Txn {
    let at = Expect::CreateRevision(created);
    Txn::new().when(&key(path), at).put(&key(path), "again")
}

/// A program that keeps the revision of its put as the key's identity finds the key by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_over_a_placeholder_is_created_by_its_put() {
    let servers = Servers::start(1).await;
    let (registry, other) = (connect(&servers.addresses()).await, connect(&servers.addresses()).await);
    let raw = servers.raw().await;
    registry.put(&key("/m/a%2Fb/below"), "").await.unwrap();
    let mut before = Vec::new();
    for path in ["/m", "/m/a%2Fb"] {
        let made = other.put_if(&key(path), Expect::Absent, "1").await.unwrap();
        let entry = get(&registry, path).await.unwrap();
        assert_eq!((entry.create_revision, entry.mod_revision), (made, made), "{path}");
        // It stays what it is, by whichever way it is written and read.
        registry.put(&key(path), "2").await.unwrap();
        registry.put(&key(path), "3").await.unwrap();
        registry.commit(put_at(path, made)).await.unwrap();
        assert_eq!(get(&registry, path).await.unwrap().create_revision, made, "{path}");
        before.push((path, made));
    }
    let listed = registry.list_all(List::new(Prefix::root())).await.unwrap();
    for (path, made) in &before {
        let entry = listed.iter().find(|entry| entry.key.as_str() == *path).unwrap();
        assert_eq!(entry.create_revision, *made, "{path}");
    }
    // Deleted and put again it is another.
    for (path, made) in &before {
        assert!(registry.delete(&key(path)).await.unwrap());
        let again = registry.put(&key(path), "4").await.unwrap();
        let entry = get(&other, path).await.unwrap();
        assert_eq!((entry.create_revision, entry.mod_revision), (again, again), "{path}");
        let conflict = other.commit(put_at(path, *made)).await;
        assert!(matches!(conflict, Err(Error::Conflict { .. })), "{conflict:?}");
        other.commit(put_at(path, again)).await.unwrap();
    }
    assert_eq!(births(&raw).await.len(), 2);
    // Its birth goes with it, by a delete and by the delete of a prefix.
    assert!(registry.delete(&key("/m/a%2Fb/below")).await.unwrap());
    assert!(registry.delete(&key("/m/a%2Fb")).await.unwrap());
    assert_eq!(births(&raw).await, ["%2Fm"]);
    assert_eq!(registry.delete_prefix(&Prefix::parse("/m").unwrap()).await.unwrap(), 1);
    assert_eq!(nodes(&raw).await, Vec::<String>::new());
    assert_eq!(births(&raw).await, Vec::<String>::new());
    registry.close().await.unwrap();
    other.close().await.unwrap();
}

async fn births(raw: &Client) -> Vec<String> {
    raw.list_children("/registry~/birth").await.unwrap()
}

/// A watch tells a key that was deleted and put again apart from one that was written.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_a_key_by_its_birth() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    registry.put(&key("/m/below"), "").await.unwrap();
    let made = registry.put(&key("/m"), "1").await.unwrap();
    registry.put(&key("/m"), "2").await.unwrap();
    let request = WatchRequest::new(key("/m"), WatchScope::Key);
    let mut watch = registry.watch(request).await.unwrap();
    let next = async |watch: &mut registry_api::Watch| loop {
        if let WatchItem::Changes(events) = watch.next().await.unwrap().unwrap() {
            return events;
        }
    };
    let events = next(&mut watch).await;
    assert!(
        matches!(&events[..], [Event::Created(entry)] if entry.create_revision == made),
        "{events:?}"
    );
    registry.put(&key("/m"), "3").await.unwrap();
    let events = next(&mut watch).await;
    assert!(
        matches!(&events[..], [Event::Updated(entry)] if entry.create_revision == made),
        "{events:?}"
    );
    registry.delete(&key("/m")).await.unwrap();
    let again = registry.put(&key("/m"), "4").await.unwrap();
    let mut events = next(&mut watch).await;
    while events.len() < 2 {
        events.extend(next(&mut watch).await);
    }
    assert!(
        matches!(&events[..], [Event::Deleted { .. }, Event::Created(entry)] if entry.create_revision == again),
        "{events:?}"
    );
    registry.close().await.unwrap();
}

/// A birth that another client, or a crash, left over is of no key that came later, and goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_birth_that_was_left_over_counts_for_nothing() {
    let servers = Servers::start(1).await;
    let (registry, raw) = (connect(&servers.addresses()).await, servers.raw().await);
    raw.create("/registry~/birth/%2Fm", b"", &anyone()).await.unwrap();
    raw.create("/registry~/birth/%2Fnone", b"", &anyone()).await.unwrap();
    let made = registry.put(&key("/m"), "1").await.unwrap();
    registry.put(&key("/m/below"), "").await.unwrap();
    registry.put(&key("/m"), "2").await.unwrap();
    assert_eq!(get(&registry, "/m").await.unwrap().create_revision, made);
    assert!(registry.delete(&key("/m")).await.unwrap());
    let again = registry.put(&key("/m"), "3").await.unwrap();
    assert_eq!(get(&registry, "/m").await.unwrap().create_revision, again);
    until("the birth of no key is gone", SOON, async || {
        births(&raw).await == ["%2Fm"]
    })
    .await;
    assert_eq!(get(&registry, "/m").await.unwrap().create_revision, again);
    registry.close().await.unwrap();
}

/// The end of a session leaves placeholders, for some seconds. They are in no put's way, and no key's children.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_emptied_is_in_nobodys_way() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    let emptied = async |path: &str| {
        let other = connect(&servers.addresses()).await;
        for below in ["a", "b/c/d", "b/e"] {
            other
                .put_ephemeral(&key(&format!("{path}/{below}/e")), "")
                .await
                .unwrap();
        }
        other.close().await.unwrap();
    };
    emptied("/p").await;
    registry.put_ephemeral(&key("/p"), "").await.unwrap();
    registry.delete(&key("/p")).await.unwrap();
    emptied("/q").await;
    let childless = Txn::new().when(&key("/q"), Expect::Childless).put(&key("/q"), "1");
    registry.commit(childless.clone()).await.unwrap();
    // A key with a value keeps it.
    emptied("/q").await;
    registry.commit(childless.clone()).await.unwrap();
    assert_eq!(get(&registry, "/q").await.unwrap().value, "1");
    // A key below counts.
    emptied("/q").await;
    registry.put(&key("/q/b/kept"), "").await.unwrap();
    let refused = registry.commit(childless).await;
    assert!(matches!(refused, Err(Error::Conflict { .. })), "{refused:?}");
    let over = Txn::new().put_as(&key("/q"), "", Kind::Ephemeral, Existing::TakeOver);
    assert_eq!(refusal(registry.commit(over).await), Refusal::HasChildren);
    assert!(get(&registry, "/q/b/kept").await.is_some());
    registry.close().await.unwrap();
}

/// A reader that waits for its own put is not kept waiting when the key was deleted before the watch could read it.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_catches_up_with_a_key_that_came_and_went() {
    let servers = Servers::start(1).await;
    let registry = connect(&servers.addresses()).await;
    let mirror = registry.mirror(key("/k"), WatchScope::Subtree).await.unwrap();
    for round in 0..200 {
        let path = key(&format!("/k/{}", round % 3));
        let put = registry.put(&path, "").await.unwrap();
        registry.delete(&path).await.unwrap();
        let caught_up = tokio::time::timeout(PATIENCE, mirror.caught_up(put)).await;
        caught_up.unwrap_or_else(|_| panic!("round {round}: never")).unwrap();
    }
    // No watch can see this one: its node comes and goes in one transaction.
    registry.put(&key("/k/there"), "").await.unwrap();
    let raw = servers.raw().await;
    let mut both = raw.new_multi_writer();
    both.add_create("/registry/k/gone", b"", &anyone()).unwrap();
    both.add_delete("/registry/k/gone", None).unwrap();
    both.commit().await.unwrap();
    let (_, above) = raw.get_data("/registry/k").await.unwrap();
    let gone = Revision(above.pzxid.cast_unsigned());
    let caught_up = tokio::time::timeout(PATIENCE, mirror.caught_up(gone)).await;
    caught_up.expect("it never hears of it").unwrap();
    registry.close().await.unwrap();
}
