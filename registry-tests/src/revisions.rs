//! R: revisions, conditions, transactions, reads.

use std::sync::Arc;

use registry_api::{Depth, Error, Expect, Kind, List, Read, Registry, Result, Revision, Txn};

use crate::{Cluster, key};

/// R1. Every change has a revision larger than that of every change acknowledged before it began.
pub async fn revisions_grow(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let mut last = Revision(0);
    for n in 0..20 {
        let registry = if n % 2 == 0 { &one } else { &other };
        let revision = match n % 4 {
            0 => registry.put(&key(&format!("/{n}")), "").await?,
            1 => registry.put_ephemeral(&key(&format!("/{n}")), "").await?,
            2 => {
                registry
                    .commit(Txn::new().delete(&key(&format!("/{}", n - 2))))
                    .await?
                    .revision
            }
            _ => registry.put(&key("/same"), "").await?,
        };
        assert!(revision > last, "{revision} after {last}, at {n}");
        last = revision;
    }
    other.close().await?;
    one.close().await
}

/// R1. An entry carries its value, both revisions, and its session when it is ephemeral.
pub async fn entries_carry_their_revisions(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let created = registry.put(&key("/a"), "1").await?;
    let updated = registry.put(&key("/a"), "2").await?;
    let entry = registry
        .get(&key("/a"), Read::Linearizable)
        .await?
        .expect("it is there");
    assert_eq!(
        (entry.create_revision, entry.mod_revision, entry.session),
        (created, updated, None)
    );
    let created = registry.put_ephemeral(&key("/e"), "1").await?;
    let entry = registry
        .get(&key("/e"), Read::Linearizable)
        .await?
        .expect("it is there");
    let session = registry.session().live()?;
    assert_eq!(
        (entry.create_revision, entry.mod_revision, entry.session),
        (created, created, Some(session))
    );
    registry.close().await
}

/// R2. Puts and deletes demand that a key is absent, present or at a revision; if not, nothing changes and the error
/// carries the revision found.
pub async fn conditions_are_checked(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let a = key("/a");
    let refused = |result: Result<Revision>, expected: Expect, at: Option<Revision>| match result {
        Err(Error::Conflict {
            key,
            expected: demanded,
            found,
        }) => {
            assert_eq!((key.as_str(), demanded, found), ("/a", expected, at));
        }
        other => panic!("{expected}: {other:?}"),
    };
    refused(registry.put_if(&a, Expect::Present, "x").await, Expect::Present, None);
    // No key is at revision 0, so it is no name for an absent one.
    for revision in [Revision(0), Revision(1), Revision(u64::MAX)] {
        for demanded in [Expect::ModRevision(revision), Expect::CreateRevision(revision)] {
            refused(registry.put_if(&a, demanded, "x").await, demanded, None);
        }
    }
    let first = registry.put_if(&a, Expect::Absent, "1").await?;
    refused(
        registry.put_if(&a, Expect::Absent, "x").await,
        Expect::Absent,
        Some(first),
    );
    let second = registry.put_if(&a, Expect::ModRevision(first), "2").await?;
    refused(
        registry.put_if(&a, Expect::ModRevision(first), "x").await,
        Expect::ModRevision(first),
        Some(second),
    );
    let third = registry.put_if(&a, Expect::CreateRevision(first), "3").await?;
    refused(
        registry.put_if(&a, Expect::CreateRevision(second), "x").await,
        Expect::CreateRevision(second),
        Some(third),
    );
    let fourth = registry.put_if(&a, Expect::Present, "4").await?;
    assert!(
        matches!(registry.delete_if(&a, Expect::ModRevision(third)).await, Err(Error::Conflict { found, .. }) if found == Some(fourth))
    );
    assert_eq!(
        registry.get(&a, Read::Linearizable).await?.expect("it is there").value,
        "4"
    );
    assert!(registry.delete_if(&a, Expect::ModRevision(fourth)).await?);
    assert!(!registry.delete_if(&a, Expect::Absent).await?);
    registry.close().await
}

/// R2. A key that was deleted and made anew never passes for the old one.
pub async fn an_old_key_never_passes_for_a_new_one(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let a = key("/a");
    for kind in [Kind::Persistent, Kind::Ephemeral] {
        let put = |value: &'static str| {
            let txn = Txn::new().put_as(&a, value, kind, registry_api::Existing::Keep);
            let one = one.clone();
            async move { one.commit(txn).await }
        };
        let old = put("same").await?.revision;
        assert!(other.delete(&a).await?);
        let new = put("same").await?.revision;
        for stale in [Expect::ModRevision(old), Expect::CreateRevision(old)] {
            let written = other.commit(Txn::new().when(&a, stale).delete(&a)).await;
            assert!(
                matches!(written, Err(Error::Conflict { found, .. }) if found == Some(new)),
                "{stale}: {written:?}"
            );
        }
        assert!(other.delete_if(&a, Expect::ModRevision(new)).await?);
    }
    other.close().await?;
    one.close().await
}

/// R3. A transaction happens wholly or not at all.
pub async fn a_transaction_happens_wholly_or_not_at_all(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let (a, b, c) = (key("/a"), key("/b"), key("/c"));
    registry.put(&c, "old").await?;
    let failed = Txn::new()
        .when(&a, Expect::Absent)
        .when(&c, Expect::Absent)
        .put(&a, "1")
        .put(&b, "2")
        .delete(&c);
    let failed = registry.commit(failed).await;
    assert!(
        matches!(&failed, Err(Error::Conflict { key, .. }) if *key == c),
        "{failed:?}"
    );
    // A refusal of one operation undoes the others as well.
    registry.put_ephemeral(&key("/e"), "").await?;
    let refused = registry.commit(Txn::new().put(&a, "1").put(&key("/e"), "2")).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    assert!(registry.get(&a, Read::Linearizable).await?.is_none());
    assert_eq!(
        registry.get(&c, Read::Linearizable).await?.expect("it is there").value,
        "old"
    );
    let done = registry
        .commit(
            Txn::new()
                .when(&a, Expect::Absent)
                .put(&a, "1")
                .put(&b, "2")
                .delete(&c)
                .delete(&key("/none")),
        )
        .await?;
    assert_eq!(done.changed, [true, true, true, false]);
    assert!(registry.get(&c, Read::Linearizable).await?.is_none());
    registry.close().await
}

/// R3. All of a transaction happens at one revision.
pub async fn a_transaction_has_one_revision(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut txn = Txn::new();
    for n in 0..registry_api::MAX_OPERATIONS {
        txn = txn.put(&key(&format!("/t/{n}")), vec![1; 10_000]);
    }
    let revision = registry.commit(txn).await?.revision;
    for n in [0, 1, registry_api::MAX_OPERATIONS - 1] {
        let entry = registry
            .get(&key(&format!("/t/{n}")), Read::Linearizable)
            .await?
            .expect("it is there");
        assert_eq!((entry.create_revision, entry.mod_revision), (revision, revision));
    }
    registry.close().await
}

/// R3. What contradicts itself or is too much is refused before anything is sent.
pub async fn bad_transactions_are_refused(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let a = key("/a");
    let many = (0..65).fold(Txn::new(), |txn, n| txn.put(&key(&format!("/{n}")), ""));
    let large = (0..10).fold(Txn::new(), |txn, n| txn.put(&key(&format!("/{n}")), vec![0; 100_000]));
    let bad = [
        Txn::new(),
        Txn::new().put(&a, "1").put(&a, "2"),
        Txn::new().put(&a, "1").delete(&a),
        Txn::new().put_ephemeral(&a, "1").put(&key("/a/b"), "2"),
        many,
        large,
    ];
    for txn in bad {
        let refused = registry.commit(txn).await;
        assert!(
            matches!(refused, Err(Error::InvalidRequest(_) | Error::TooLarge { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(
        registry
            .count(&registry_api::Prefix::root(), Read::Linearizable)
            .await?,
        0
    );
    registry.close().await
}

/// R3. A condition can demand that no key is below another.
pub async fn conditions_on_children(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let (p, c) = (key("/p"), key("/p/c"));
    registry.put_if(&p, Expect::Childless, "1").await?;
    registry
        .commit(Txn::new().when(&p, Expect::Childless).put(&c, "2"))
        .await?;
    let refused = registry.delete_if(&p, Expect::Childless).await;
    assert!(
        matches!(
            refused,
            Err(Error::Conflict {
                expected: Expect::Childless,
                ..
            })
        ),
        "{refused:?}"
    );
    registry.put(&key("/p!"), "no child").await?;
    registry.delete(&c).await?;
    assert!(registry.delete_if(&p, Expect::Childless).await?);
    registry.close().await
}

/// R2, R4. Eight tasks of two handles count to 80 by compare-and-set: no increment is lost, none counts twice.
pub async fn one_counter_by_many(cluster: &impl Cluster) -> Result<()> {
    let handles = [cluster.connect().await?, cluster.connect().await?];
    let counter = key("/counter");
    handles[0].put(&counter, "0").await?;
    let tasks = (0..8).map(|task| {
        let (registry, counter) = (handles[task % 2].clone(), counter.clone());
        tokio::spawn(async move {
            let mut done = 0;
            while done < 10 {
                let entry = registry
                    .get(&counter, Read::Linearizable)
                    .await?
                    .expect("it is never deleted");
                let count: u64 = String::from_utf8_lossy(&entry.value).parse().expect("it is a number");
                match registry
                    .put_if(
                        &counter,
                        Expect::ModRevision(entry.mod_revision),
                        (count + 1).to_string(),
                    )
                    .await
                {
                    Ok(_) => done += 1,
                    Err(Error::Conflict { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("no task panics")?;
    }
    assert_eq!(
        handles[0]
            .get(&counter, Read::Linearizable)
            .await?
            .expect("it is there")
            .value,
        "80"
    );
    for handle in handles {
        handle.close().await?;
    }
    Ok(())
}

/// R4. A linearizable read sees every change acknowledged before it began, whichever handle made it.
pub async fn reads_see_every_acknowledged_write(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    for n in 0..100_u32 {
        let (writer, reader): (&Arc<dyn Registry>, _) = if n % 2 == 0 { (&one, &other) } else { (&other, &one) };
        writer.put(&key("/a"), n.to_string()).await?;
        let entry = reader.get(&key("/a"), Read::Linearizable).await?.expect("it is there");
        assert_eq!(entry.value, n.to_string());
    }
    other.close().await?;
    one.close().await
}

/// R4. A stale read may be old, and one handle never goes back in time.
pub async fn a_stale_read_never_goes_back(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let mut last = Revision(0);
    for n in 0..100_u32 {
        one.put(&key("/a"), n.to_string()).await?;
        if let Some(entry) = other.get(&key("/a"), Read::Stale).await? {
            assert!(entry.mod_revision >= last);
            last = entry.mod_revision;
        }
    }
    other.close().await?;
    one.close().await
}

/// R6. The listing that follows a commit shows what it changed, and every change acknowledged before it.
pub async fn a_listing_follows_a_commit(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let list = List {
        depth: Depth::Children,
        ..List::new(key("/a"))
    };
    let mut there = Vec::new();
    // In the end more than may come along with an answer, in number and then in bytes.
    for n in 0..134 {
        let (before, own) = (key(&format!("/a/{n:03}")), key(&format!("/a/{n:03}/b")));
        other.put(&before, vec![0; if n == 131 { 5000 } else { 1 }]).await?;
        let txn = Txn::new().put(&own, "1").delete(&before);
        let txn = if n % 2 == 0 { txn } else { Txn::new().put(&own, "1") };
        let (committed, page) = one.commit_and_list(txn, list.clone()).await?;
        assert!(committed.changed.iter().all(|changed| *changed));
        let page = page.expect("the store answers");
        let listed = one.list_on(list.clone(), page).await?;
        let listed: Vec<_> = listed.iter().map(|entry| entry.key.to_string()).collect();
        there.extend((n % 2 == 1).then(|| before.to_string()));
        assert_eq!(listed, there, "after the commit {n}");
    }
    let page = List {
        limit: 3,
        ..list.clone()
    };
    let (_, page) = one.commit_and_list(Txn::new().put(&key("/b"), "1"), page).await?;
    let page = page.expect("the store answers");
    assert!((1..=3).contains(&page.entries.len()) && page.next.is_some());
    // Nothing is listed of what did not happen.
    let txn = Txn::new().when(&key("/b"), Expect::Absent).delete(&key("/b"));
    let refused = one.commit_and_list(txn, list).await;
    assert!(matches!(refused, Err(Error::Conflict { .. })), "{refused:?}");
    other.close().await?;
    one.close().await
}
