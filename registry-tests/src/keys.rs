//! K: keys, values, namespaces.

use std::sync::Arc;
use std::time::Duration;

use registry_api::{
    Depth, Error, Expect, Key, Kind, List, Namespace, Options, Prefix, Read, Refusal, Registry, Result,
};

use crate::cluster::eventually;
use crate::{Cluster, key, prefix, refusal};

const PATIENCE: Duration = Duration::from_secs(20);

async fn names(registry: &Arc<dyn Registry>, path: &str) -> Result<Vec<String>> {
    registry.children(&prefix(path), Read::Linearizable).await
}

async fn value(registry: &Arc<dyn Registry>, path: &str) -> Result<Option<Vec<u8>>> {
    Ok(registry
        .get(&key(path), Read::Linearizable)
        .await?
        .map(|entry| entry.value.to_vec()))
}

/// K1. A bad key is refused when it is parsed, before anything is sent, with the reason.
pub async fn bad_keys_are_refused_before_anything_is_sent(_: &impl Cluster) -> Result<()> {
    let long = format!("/{}", "a".repeat(256));
    let deep = "/a".repeat(33);
    let large = format!("/{}", vec!["a".repeat(200); 6].join("/"));
    let bad = [
        "",
        "a",
        "/",
        "//a",
        "/a/",
        "/a//b",
        "/.",
        "/a/..",
        "/a\0b",
        "/a\nb",
        "/\u{e000}",
        "/\u{fff0}",
        "/\u{1f600}",
    ];
    for path in bad.into_iter().chain([long.as_str(), &deep, &large]) {
        let error = Key::parse(path).expect_err(path).to_string();
        assert!(error.starts_with("bad key") && error.len() < 400, "{error}");
    }
    Ok(())
}

/// K1. `_`, `%`, `\`, blanks and every other character that is allowed are plain.
pub async fn odd_keys_are_plain(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let odd = [
        "/a_b",
        "/a%b",
        "/a\\b",
        "/a b",
        "/ab ",
        "/a'b\"c",
        "/a@b",
        "/ä/ß/中",
        "/a.b",
        "/...",
        "/~",
        "/a:b;c",
        "/[a]*?",
    ];
    for path in odd {
        registry.put(&key(path), path).await?;
    }
    registry.put(&key("/axb"), "another").await?;
    for path in odd {
        assert_eq!(
            value(&registry, path).await?.as_deref(),
            Some(path.as_bytes()),
            "{path}"
        );
    }
    assert!(registry.delete(&key("/a_b")).await?);
    assert_eq!(registry.delete_prefix(&prefix("/a%b")).await?, 1);
    assert_eq!(
        registry.count(&Prefix::root(), Read::Linearizable).await? as usize,
        odd.len() + 1 - 2
    );
    let longest = format!("/{}/{}", "k".repeat(255), vec!["é".repeat(127); 3].join("/"));
    registry.put(&key(&longest), "long").await?;
    assert_eq!(value(&registry, &longest).await?.as_deref(), Some(&b"long"[..]));
    let deepest = "/d".repeat(32);
    registry.put(&key(&deepest), "deep").await?;
    assert_eq!(value(&registry, &deepest).await?.as_deref(), Some(&b"deep"[..]));
    registry.close().await
}

/// K1. Keys compare by bytes: case and trailing blanks tell them apart.
pub async fn keys_differ_by_bytes(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for path in ["/Key", "/key", "/KEY", "/key ", "/kéy"] {
        registry.put_if(&key(path), Expect::Absent, path).await?;
    }
    assert_eq!(names(&registry, "/").await?, ["KEY", "Key", "key", "key ", "kéy"]);
    registry.close().await
}

/// K2. A value is any bytes, the empty one too, and none at all is another thing.
pub async fn values_are_any_bytes(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let all: Vec<u8> = (0..=255).collect();
    let largest = vec![7; registry_api::MAX_VALUE];
    for bytes in [&b""[..], b"\0", b"a@b", &all, &largest] {
        registry.put(&key("/v"), bytes.to_vec()).await?;
        assert!(
            value(&registry, "/v").await?.as_deref() == Some(bytes),
            "{} bytes came back otherwise",
            bytes.len()
        );
    }
    assert_eq!(value(&registry, "/none").await?, None);
    registry.close().await
}

/// K2. A larger value is refused, and the handle goes on.
pub async fn too_large_is_refused_before_anything_is_sent(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let put = registry.put(&key("/v"), vec![0; registry_api::MAX_VALUE + 1]).await;
    assert!(
        matches!(
            put,
            Err(Error::TooLarge {
                size: 900_001,
                limit: 900_000,
                ..
            })
        ),
        "{put:?}"
    );
    assert_eq!(value(&registry, "/v").await?, None);
    registry.close().await
}

/// K3. Two namespaces of one store never see or disturb each other.
pub async fn namespaces_never_meet(cluster: &impl Cluster) -> Result<()> {
    let name = cluster.steady().namespace;
    let beside = Options {
        namespace: Namespace::parse(&format!("{name}-b"))?,
        ..cluster.steady()
    };
    let (one, other) = (cluster.connect().await?, cluster.connect_with(beside).await?);
    one.put(&key("/a"), "one").await?;
    other.put(&key("/a"), "other").await?;
    assert_eq!(value(&one, "/a").await?.as_deref(), Some(&b"one"[..]));
    assert_eq!(names(&other, "/").await?, ["a"]);
    let (held, also) = (
        one.lock(&key("/l")).acquire().await?,
        other.lock(&key("/l")).try_acquire().await?,
    );
    assert!(also.is_some());
    assert_eq!(one.delete_prefix(&Prefix::root()).await?, 1);
    assert_eq!(value(&other, "/a").await?.as_deref(), Some(&b"other"[..]));
    held.release().await?;
    other.close().await?;
    one.close().await
}

/// K4. Parents need not exist; a parent that nobody put has no value and shows as a child.
pub async fn parents_need_not_exist(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/a/b/c"), "deep").await?;
    assert_eq!(value(&registry, "/a").await?, None);
    assert_eq!(names(&registry, "/a").await?, ["b"]);
    assert_eq!(names(&registry, "/none").await?, Vec::<String>::new());
    registry.put_if(&key("/a"), Expect::Absent, "parent").await?;
    assert_eq!(value(&registry, "/a").await?.as_deref(), Some(&b"parent"[..]));
    assert_eq!(value(&registry, "/a/b/c").await?.as_deref(), Some(&b"deep"[..]));
    registry.close().await
}

/// K4. When the last key below a parent that was never put goes, the parent goes too.
pub async fn nothing_is_left_behind(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/a/b/c"), "1").await?;
    registry.put_ephemeral(&key("/e/f/g"), "2").await?;
    registry.put(&key("/keep"), "3").await?;
    registry.delete(&key("/a/b/c")).await?;
    registry.delete(&key("/e/f/g")).await?;
    let registry = &registry;
    eventually(PATIENCE, || async move {
        names(registry, "/").await.is_ok_and(|names| names == ["keep"])
    })
    .await;
    registry.close().await
}

/// K5. `/a/b` is below `/a`; `/ab`, `/a!` and `/a.b` are not.
pub async fn below_goes_by_whole_segments(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for path in ["/a", "/a/b", "/a/b/c", "/ab", "/a!", "/a.b", "/a0", "/b"] {
        registry.put(&key(path), path).await?;
    }
    let listed = registry.list_all(List::new(key("/a"))).await?;
    assert_eq!(
        listed.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(),
        ["/a", "/a/b", "/a/b/c"]
    );
    assert_eq!(names(&registry, "/a").await?, ["b"]);
    assert_eq!(registry.count(&prefix("/a"), Read::Linearizable).await?, 3);
    assert_eq!(registry.delete_prefix(&prefix("/a")).await?, 3);
    let left = registry.list_all(List::new(Prefix::root())).await?;
    assert_eq!(
        left.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(),
        ["/a!", "/a.b", "/a0", "/ab", "/b"]
    );
    registry.close().await
}

/// K5. `delete` removes one key and leaves what is below it.
pub async fn delete_leaves_what_is_below(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/a"), "1").await?;
    registry.put(&key("/a/b"), "2").await?;
    assert!(registry.delete(&key("/a")).await?);
    assert_eq!(value(&registry, "/a").await?, None);
    assert_eq!(value(&registry, "/a/b").await?.as_deref(), Some(&b"2"[..]));
    assert_eq!(names(&registry, "/").await?, ["a"]);
    registry.close().await
}

/// K5. Deleting what is missing changes nothing and is no error.
pub async fn delete_of_what_is_missing_is_no_error(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/a/b"), "1").await?;
    assert!(!registry.delete(&key("/none")).await?);
    // A parent that nobody put is not there to be deleted.
    assert!(!registry.delete(&key("/a")).await?);
    assert_eq!(registry.delete_prefix(&prefix("/none")).await?, 0);
    assert_eq!(value(&registry, "/a/b").await?.as_deref(), Some(&b"1"[..]));
    registry.close().await
}

/// K6. An ephemeral key is a leaf: nothing is put below it, and it is put over nothing that has children.
pub async fn ephemeral_keys_are_leaves(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put_ephemeral(&key("/e"), "1").await?;
    for put in [
        registry.put(&key("/e/a"), "2").await,
        registry.put_ephemeral(&key("/e/a/b"), "2").await,
    ] {
        assert_eq!(refusal(put), Refusal::BelowEphemeral(key("/e")));
    }
    registry.put(&key("/p/c"), "3").await?;
    let over = registry.put_ephemeral(&key("/p"), "4").await;
    assert_eq!(refusal(over), Refusal::HasChildren);
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await?, 2);
    registry.close().await
}

/// K7. A put never changes a key's kind or owner in silence.
pub async fn kind_and_owner_never_change_in_silence(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    one.put_ephemeral(&key("/e"), "1").await?;
    one.put(&key("/p"), "1").await?;
    let owner = one.session().live()?;
    let refused = one.put(&key("/e"), "2").await;
    assert_eq!(refusal(refused), Refusal::Ephemeral);
    let refused = one.put_ephemeral(&key("/p"), "2").await;
    assert_eq!(refusal(refused), Refusal::Persistent);
    let refused = other.put_ephemeral(&key("/e"), "2").await;
    assert_eq!(refusal(refused), Refusal::OwnedBy(owner));
    one.put_ephemeral(&key("/e"), "3").await?;
    let entry = other.get(&key("/e"), Read::Linearizable).await?.expect("it is there");
    assert_eq!((&entry.value[..], entry.session), (&b"3"[..], Some(owner)));
    assert_eq!(value(&one, "/p").await?.as_deref(), Some(&b"1"[..]));
    other.close().await?;
    one.close().await
}

/// K7. A take-over makes the key anew, with a new `create_revision`.
pub async fn a_take_over_makes_the_key_anew(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    one.put_ephemeral(&key("/e"), "1").await?;
    let before = one.get(&key("/e"), Read::Linearizable).await?.expect("it is there");
    other.take_over(&key("/e"), "2", Kind::Ephemeral).await?;
    let after = one.get(&key("/e"), Read::Linearizable).await?.expect("it is there");
    assert!(after.create_revision > before.mod_revision);
    assert_eq!(
        (&after.value[..], after.session),
        (&b"2"[..], Some(other.session().live()?))
    );
    other.take_over(&key("/e"), "3", Kind::Persistent).await?;
    let last = one.get(&key("/e"), Read::Linearizable).await?.expect("it is there");
    assert!(last.session.is_none() && last.create_revision > after.mod_revision);
    other.close().await?;
    assert_eq!(value(&one, "/e").await?.as_deref(), Some(&b"3"[..]));
    one.close().await
}

/// K8. `children` gives the direct children's names, sorted by bytes, each once.
pub async fn children_are_sorted_and_direct(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for path in ["/p/b/x", "/p/b", "/p/b!", "/p/a/y/z", "/p/c", "/p/B", "/p/b/y"] {
        registry.put(&key(path), "").await?;
    }
    assert_eq!(names(&registry, "/p").await?, ["B", "a", "b", "b!", "c"]);
    registry.close().await
}

/// K8. `list` comes in pages, sorted, with no entry twice and none missing.
pub async fn lists_come_in_pages(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut expected = Vec::new();
    for n in 0..25 {
        for path in [format!("/p/{n:02}"), format!("/p/{n:02}!"), format!("/p/{n:02}/x")] {
            registry.put(&key(&path), path.clone()).await?;
            expected.push(path);
        }
    }
    expected.sort();
    for limit in [1, 7, 75, 1000] {
        let mut list = List {
            limit,
            ..List::new(key("/p"))
        };
        let mut found = Vec::new();
        loop {
            let page = registry.list(list.clone()).await?;
            assert!(page.entries.len() <= limit);
            found.extend(page.entries.iter().map(|entry| entry.key.as_str().to_owned()));
            match page.next {
                Some(next) => list.after = Some(next),
                None => break,
            }
        }
        assert_eq!(found, expected, "by {limit}");
    }
    let none = registry
        .list(List {
            limit: 0,
            ..List::new(key("/p"))
        })
        .await;
    assert!(matches!(none, Err(Error::InvalidRequest(_))), "{none:?}");
    registry.close().await
}

/// K8. A list of direct children has their values, and neither the key itself nor what is deeper.
pub async fn a_list_of_children_has_their_values(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for path in ["/p", "/p/a", "/p/a/deep", "/p/b", "/p/c/deep", "/p/d", "/q"] {
        registry.put(&key(path), path).await?;
    }
    for limit in [1, 2, 10] {
        let list = List {
            depth: Depth::Children,
            limit,
            ..List::new(key("/p"))
        };
        let listed = registry.list_all(list).await?;
        let found: Vec<_> = listed
            .iter()
            .map(|entry| (entry.key.as_str(), &entry.value[..]))
            .collect();
        assert_eq!(
            found,
            [("/p/a", &b"/p/a"[..]), ("/p/b", b"/p/b"), ("/p/d", b"/p/d")],
            "by {limit}"
        );
    }
    registry.close().await
}

/// K8. `count` counts the entries at and below.
pub async fn count_counts(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let count = async |path| registry.count(&prefix(path), Read::Linearizable).await;
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await?, 0);
    for path in ["/p", "/p/a", "/p/a/deep", "/pq"] {
        registry.put(&key(path), "").await?;
    }
    assert_eq!(
        (count("/p").await?, count("/p/a").await?, count("/none").await?),
        (3, 2, 0)
    );
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await?, 4);
    registry.close().await
}

/// K9. What locks and elections store is in no listing and no count, and users can't write there.
pub async fn recipes_are_not_in_the_users_tree(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/a"), "1").await?;
    let held = registry.lock(&key("/a")).acquire().await?;
    let leadership = registry.election(&key("/a")).campaign("me").await?;
    assert_eq!(names(&registry, "/").await?, ["a"]);
    assert_eq!(registry.list_all(List::new(Prefix::root())).await?.len(), 1);
    assert_eq!(registry.count(&Prefix::root(), Read::Linearizable).await?, 1);
    assert_eq!(names(&registry, "/a").await?, Vec::<String>::new());
    assert_eq!(registry.delete_prefix(&Prefix::root()).await?, 1);
    assert!(
        registry.lock(&key("/a")).holder().await?.is_some() && registry.election(&key("/a")).leader().await?.is_some()
    );
    assert!(Key::parse(held.condition().key.as_str()).is_err());
    leadership.resign().await?;
    held.release().await?;
    registry.close().await
}
