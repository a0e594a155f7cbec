//! W: watches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use registry_api::{
    DeleteCause, Entry, Error, Event, Key, List, Page, Prefix, Registry, Result, Revision, Txn, Watch, WatchFrom,
    WatchItem, WatchRequest, WatchScope,
};

use crate::cluster::prefix;
use crate::{Cluster, key, within};

const PATIENCE: Duration = Duration::from_secs(10);

/// What a reader of a watch knows, and that it was told in order and nothing twice (W2).
#[derive(Debug, Default)]
pub struct Picture {
    /// The entries.
    pub entries: BTreeMap<Key, Entry>,
    newest: BTreeMap<Key, Revision>,
    /// Whether all that there was at the beginning was told.
    pub synced: Option<Revision>,
}

impl Picture {
    /// A watch of all keys, and what its reader knows once it has been told all there is.
    pub async fn of(registry: &dyn Registry) -> Result<(Watch, Self)> {
        let request = WatchRequest::new(Prefix::root(), WatchScope::Subtree);
        let (mut watch, mut picture) = (registry.watch(request).await?, Self::default());
        picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
        Ok((watch, picture))
    }

    /// Whether the key is known to have that value.
    pub fn has(&self, path: &str, value: &str) -> bool {
        self.entries.get(&key(path)).is_some_and(|entry| entry.value == value)
    }

    /// Takes an item in.
    pub fn take(&mut self, item: WatchItem) {
        match item {
            WatchItem::Reset => *self = Self::default(),
            WatchItem::Synced(revision) => self.synced = Some(revision),
            WatchItem::Changes(events) => events.into_iter().for_each(|event| self.event(event)),
        }
    }

    fn event(&mut self, event: Event) {
        let (key, revision) = (event.key().clone(), event.revision());
        if let Some(before) = self.newest.insert(key.clone(), revision) {
            // A take-over deletes and creates at one revision.
            assert!(revision >= before, "{key} at {revision} after {before}");
        }
        match event {
            Event::Created(entry) => {
                assert!(
                    self.entries.insert(key.clone(), entry).is_none(),
                    "{key} was created twice"
                );
            }
            Event::Updated(entry) => {
                let before = self.entries.insert(key.clone(), entry.clone());
                let before = before.unwrap_or_else(|| panic!("{key} was updated and never created"));
                assert!(before.mod_revision < entry.mod_revision, "{key} was told twice");
            }
            Event::Deleted { last, .. } => {
                let before = self
                    .entries
                    .remove(&key)
                    .unwrap_or_else(|| panic!("{key} was deleted and never created"));
                assert_eq!(before.value, last.value, "{key} was deleted with another value");
            }
        }
    }

    /// Reads until the reader knows what `known` asks for.
    pub async fn until(&mut self, watch: &mut Watch, known: impl Fn(&Self) -> bool) -> Result<()> {
        let reading = async {
            while !known(self) {
                let item = watch.next().await.expect("a watch goes on")?;
                self.take(item);
            }
            Ok(())
        };
        match tokio::time::timeout(3 * PATIENCE, reading).await {
            Ok(read) => read,
            Err(_) => panic!("what was to come did not; known is {:?}", self.values()),
        }
    }

    /// Keys and values.
    pub fn values(&self) -> Vec<(String, String)> {
        let text = |entry: &Entry| String::from_utf8_lossy(&entry.value).into_owned();
        self.entries
            .values()
            .map(|entry| (entry.key.to_string(), text(entry)))
            .collect()
    }
}

async fn next(watch: &mut Watch) -> Result<WatchItem> {
    within(PATIENCE, watch.next()).await.expect("a watch goes on")
}

/// The next changes, `Synced` marks passed over.
async fn changes(watch: &mut Watch) -> Result<Vec<Event>> {
    loop {
        if let WatchItem::Changes(events) = next(watch).await? {
            return Ok(events);
        }
    }
}

async fn open(registry: &dyn Registry, path: &str, scope: WatchScope) -> Result<Watch> {
    registry.watch(WatchRequest::new(prefix(path), scope)).await
}

fn told(events: &[Event]) -> Vec<(&'static str, &str, &[u8])> {
    let word = |event: &Event| match event {
        Event::Created(_) => "created",
        Event::Updated(_) => "updated",
        Event::Deleted { .. } => "deleted",
    };
    events
        .iter()
        .map(|event| (word(event), event.key().as_str(), &event.entry().value[..]))
        .collect()
}

/// W1. A watch begins with the current entries, then a `Synced` mark, then changes; created is told from updated.
pub async fn begins_with_the_present_then_follows(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/w/a"), "1").await?;
    let last = registry.put(&key("/w/b"), "2").await?;
    let mut watch = open(&*registry, "/w", WatchScope::Subtree).await?;
    let mut picture = Picture::default();
    picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
    assert_eq!(
        picture.values(),
        [("/w/a".into(), "1".into()), ("/w/b".into(), "2".into())]
    );
    assert!(picture.synced >= Some(last));
    let updated = registry.put(&key("/w/a"), "3").await?;
    let events = changes(&mut watch).await?;
    assert_eq!(
        (told(&events), events[0].revision()),
        (vec![("updated", "/w/a", &b"3"[..])], updated)
    );
    registry.put(&key("/w/c/d"), "4").await?;
    assert_eq!(told(&changes(&mut watch).await?), [("created", "/w/c/d", &b"4"[..])]);
    registry.close().await
}

/// W1. A key that does not exist yet can be watched.
pub async fn a_missing_key_can_be_watched(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut watch = open(&*registry, "/none/yet", WatchScope::Key).await?;
    assert!(matches!(next(&mut watch).await?, WatchItem::Synced(_)));
    registry.put(&key("/none/yet"), "now").await?;
    assert_eq!(
        told(&changes(&mut watch).await?),
        [("created", "/none/yet", &b"now"[..])]
    );
    registry.close().await
}

/// W1. A watch covers one key, its direct children, or a key and all below it, by whole segments.
pub async fn scopes_cover_what_they_say(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut key_only = open(&*registry, "/a", WatchScope::Key).await?;
    let mut children = open(&*registry, "/a", WatchScope::Children).await?;
    let mut subtree = open(&*registry, "/a", WatchScope::Subtree).await?;
    let mut root = open(&*registry, "/", WatchScope::Children).await?;
    let paths = ["/a", "/ab", "/a!", "/a.b", "/a/b", "/a/b/c", "/a/d"];
    for path in paths {
        registry.put(&key(path), path).await?;
    }
    // What is put last is seen last: by then everything else was told.
    for path in ["/a/z", "/a", "/z"] {
        registry.put(&key(path), "end").await?;
    }
    let seen = async |watch: &mut Watch, last: &str| {
        let mut picture = Picture::default();
        let last = key(last);
        picture
            .until(watch, |picture| {
                picture.entries.get(&last).is_some_and(|entry| entry.value == "end")
            })
            .await?;
        Ok::<_, Error>(picture.entries.keys().map(Key::to_string).collect::<Vec<_>>())
    };
    assert_eq!(seen(&mut key_only, "/a").await?, ["/a"]);
    assert_eq!(seen(&mut children, "/a/z").await?, ["/a/b", "/a/d", "/a/z"]);
    assert_eq!(
        seen(&mut subtree, "/a").await?,
        ["/a", "/a/b", "/a/b/c", "/a/d", "/a/z"]
    );
    assert_eq!(seen(&mut root, "/z").await?, ["/a", "/a!", "/a.b", "/ab", "/z"]);
    registry.close().await
}

/// W1, W5. A delete does not end a watch, and carries the entry as it last was.
pub async fn a_delete_does_not_end_it_and_carries_the_last_value(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let a = key("/a");
    registry.put(&a, "1").await?;
    let mut watch = open(&*registry, "/a", WatchScope::Key).await?;
    assert_eq!(told(&changes(&mut watch).await?), [("created", "/a", &b"1"[..])]);
    for round in 0..3 {
        registry.put(&a, format!("last {round}")).await?;
        changes(&mut watch).await?;
        registry.delete(&a).await?;
        let events = changes(&mut watch).await?;
        assert_eq!(told(&events), [("deleted", "/a", format!("last {round}").as_bytes())]);
        let Event::Deleted { cause, .. } = &events[0] else {
            unreachable!("it was told as deleted")
        };
        match registry.capabilities().tells_expiry {
            true => assert_eq!(*cause, DeleteCause::Deleted),
            false => assert_ne!(*cause, DeleteCause::SessionEnded),
        }
        registry.put(&a, "again").await?;
        assert_eq!(told(&changes(&mut watch).await?), [("created", "/a", &b"again"[..])]);
    }
    registry.close().await
}

/// S2, W5. The end of a session is told once for each of its keys, with the last value.
pub async fn an_expiry_is_told_once_with_the_last_value(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    for path in ["/e/a", "/e/b"] {
        one.put_ephemeral(&key(path), path).await?;
    }
    let mut watch = open(&*other, "/e", WatchScope::Children).await?;
    let mut picture = Picture::default();
    picture
        .until(&mut watch, |picture| {
            picture.synced.is_some() && picture.entries.len() == 2
        })
        .await?;
    one.close().await?;
    let mut gone = Vec::new();
    while gone.len() < 2 {
        let events = changes(&mut watch).await?;
        for event in &events {
            let Event::Deleted { last, cause, .. } = event else {
                panic!("{event:?}")
            };
            assert_eq!(last.value, last.key.as_str().as_bytes());
            match other.capabilities().tells_expiry {
                true => assert_eq!(*cause, DeleteCause::SessionEnded),
                false => assert_ne!(*cause, DeleteCause::Deleted),
            }
        }
        if other.capabilities().atomic_expiry {
            assert_eq!(events.len(), 2, "all keys of a session go at one revision");
        }
        gone.extend(events);
    }
    other.put(&key("/e/end"), "").await?;
    assert_eq!(told(&changes(&mut watch).await?), [("created", "/e/end", &b""[..])]);
    other.close().await
}

/// W1, W7. There may be any number of watches on one key; dropping one ends it and no other.
pub async fn several_watches_on_one_key(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut watches = Vec::new();
    for _ in 0..20 {
        watches.push(open(&*registry, "/a", WatchScope::Key).await?);
    }
    registry.put(&key("/a"), "1").await?;
    for watch in &mut watches {
        assert_eq!(told(&changes(watch).await?), [("created", "/a", &b"1"[..])]);
    }
    watches.truncate(2);
    registry.put(&key("/a"), "2").await?;
    for watch in &mut watches {
        assert_eq!(told(&changes(watch).await?), [("updated", "/a", &b"2"[..])]);
    }
    registry.close().await
}

/// W2. The changes of one transaction are handed on together, where every change is delivered.
pub async fn one_transaction_comes_together(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/t/old"), "").await?;
    let mut watch = open(&*registry, "/t", WatchScope::Subtree).await?;
    let mut picture = Picture::default();
    picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
    let txn = Txn::new()
        .put(&key("/t/a"), "1")
        .put(&key("/elsewhere"), "")
        .put(&key("/t/b"), "2")
        .delete(&key("/t/old"));
    registry.commit(txn).await?;
    if registry.capabilities().every_change {
        assert_eq!(changes(&mut watch).await?.len(), 3);
    } else {
        picture
            .until(&mut watch, |picture| {
                picture.entries.len() == 2 && !picture.entries.contains_key(&key("/t/old"))
            })
            .await?;
    }
    registry.close().await
}

/// W2. For each key, events come in revision order and none twice; where the store can, every change is told, in the
/// order of the whole namespace.
pub async fn every_change_in_order(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let mut watch = open(&*one, "/o", WatchScope::Subtree).await?;
    let writer = tokio::spawn(async move {
        for n in 0..300_u32 {
            let path = key(&format!("/o/{}", n % 7));
            match n % 5 {
                4 => drop(other.delete(&path).await?),
                _ => drop(other.put(&path, n.to_string()).await?),
            }
        }
        other.put(&key("/o/end"), "").await?;
        other.close().await
    });
    let (mut picture, mut revisions) = (Picture::default(), Vec::new());
    let end = key("/o/end");
    while !picture.entries.contains_key(&end) {
        let item = next(&mut watch).await?;
        if let WatchItem::Changes(events) = &item {
            revisions.extend(events.iter().map(Event::revision));
        }
        picture.take(item);
    }
    writer.await.expect("it does not panic")?;
    if one.capabilities().every_change {
        assert!(revisions.is_sorted(), "in the order of the namespace");
        // 60 deletes, of which those that found nothing are no change.
        assert!(revisions.len() >= 241, "{} changes were told", revisions.len());
    }
    same_as_store(&*one, "/o", &picture).await?;
    one.close().await
}

/// What a reader knows is what the store holds.
pub async fn same_as_store(registry: &dyn Registry, path: &str, picture: &Picture) -> Result<()> {
    let store = registry.list_all(List::new(prefix(path))).await?;
    assert_eq!(
        picture.entries.values().collect::<Vec<_>>(),
        store.iter().collect::<Vec<_>>()
    );
    Ok(())
}

/// W4. A watch can start after a given revision; if that is compacted, the caller is told, or gets all anew if it asked.
pub async fn after_a_revision(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for below in [prefix("/r"), Prefix::root()] {
        let first = registry.put(&key("/r/a"), "1").await?;
        registry.put(&key("/r/a"), "2").await?;
        registry.put(&key("/r/b"), "3").await?;
        let from = |from| WatchRequest {
            from,
            ..WatchRequest::new(below.clone(), WatchScope::Subtree)
        };
        let resumed = registry.watch(from(WatchFrom::After(first))).await;
        if registry.capabilities().watch_from_revision {
            let mut watch = resumed?;
            assert_eq!(told(&changes(&mut watch).await?), [("updated", "/r/a", &b"2"[..])]);
            assert_eq!(told(&changes(&mut watch).await?), [("created", "/r/b", &b"3"[..])]);
            registry.put(&key("/r/c"), "4").await?;
            assert_eq!(told(&changes(&mut watch).await?), [("created", "/r/c", &b"4"[..])]);
        } else {
            assert!(
                matches!(resumed, Err(Error::Compacted { requested, .. }) if requested == first),
                "{resumed:?}"
            );
            registry.put(&key("/r/c"), "4").await?;
            let mut watch = registry.watch(from(WatchFrom::AfterOrReset(first))).await?;
            assert!(matches!(next(&mut watch).await?, WatchItem::Reset));
            let mut picture = Picture::default();
            picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
            same_as_store(&*registry, "/r", &picture).await?;
        }
        registry.delete_prefix(&prefix("/r")).await?;
    }
    registry.close().await
}

/// W4. Revision 0 is before the first change: a watch from there delivers every key, or the store refuses it.
pub async fn after_revision_zero_no_key_is_left_out(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    registry.put(&key("/z/a"), "1").await?;
    for (watched, scope) in [
        (prefix("/z"), WatchScope::Subtree),
        (prefix("/z"), WatchScope::Children),
        (prefix("/z/a"), WatchScope::Key),
        (Prefix::root(), WatchScope::Subtree),
    ] {
        for from in [WatchFrom::After(Revision(0)), WatchFrom::AfterOrReset(Revision(0))] {
            let request = WatchRequest {
                from,
                ..WatchRequest::new(watched.clone(), scope)
            };
            let mut watch = match registry.watch(request).await {
                Ok(watch) => watch,
                Err(Error::Compacted { requested, .. }) if from == WatchFrom::After(requested) => continue,
                Err(error) => return Err(error),
            };
            let mut picture = Picture::default();
            picture.until(&mut watch, |picture| picture.synced.is_some()).await?;
            assert!(picture.has("/z/a", "1"), "{from:?} {watched} {scope:?}: {picture:?}");
        }
    }
    registry.close().await
}

/// W4. A revision that no change has yet is no place to start from: the watch would keep to itself what comes until then.
pub async fn after_a_revision_still_to_come_is_refused(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let now = registry.put(&key("/f/a"), "1").await?;
    for after in [Revision(now.0 + 1_000_000), Revision(1 << 52)] {
        for (watched, scope) in [
            (prefix("/f"), WatchScope::Subtree),
            (prefix("/f"), WatchScope::Children),
            (prefix("/f/a"), WatchScope::Key),
            (Prefix::root(), WatchScope::Subtree),
        ] {
            let from = |from| WatchRequest {
                from,
                ..WatchRequest::new(watched.clone(), scope)
            };
            let refused = registry.watch(from(WatchFrom::After(after))).await;
            assert!(matches!(refused, Err(Error::InvalidRequest(_))), "{refused:?}");
        }
    }
    registry.close().await
}

/// W6. A reader that does not read while much changes is told the final state of every key.
pub async fn a_slow_reader_sees_the_end(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut watch = open(&*registry, "/s", WatchScope::Subtree).await?;
    let writers = (0..32).map(|writer| {
        let registry = registry.clone();
        tokio::spawn(async move {
            for n in 0..40_u32 {
                registry.put(&key(&format!("/s/{writer}")), n.to_string()).await?;
            }
            Ok::<_, Error>(())
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("it does not panic")?;
    }
    registry.put(&key("/s/end"), "").await?;
    let mut picture = Picture::default();
    picture
        .until(&mut watch, |picture| {
            picture.entries.len() == 33 && picture.values().iter().filter(|(_, v)| v == "39").count() == 32
        })
        .await?;
    same_as_store(&*registry, "/s", &picture).await?;
    registry.close().await
}

/// W2, W3. Under a storm of changes by many, a reader's picture ends equal to the store.
pub async fn a_picture_equals_the_store(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    for n in 0..50 {
        registry.put(&key(&format!("/p/{n}")), "before").await?;
    }
    let storm = (0..8_u32).map(|writer| {
        let registry = registry.clone();
        tokio::spawn(async move {
            for n in 0..30_u32 {
                let at = (n * 31 + writer * 17) % 60;
                let path = key(&format!("/p/{at}"));
                match (n + writer) % 4 {
                    0 => drop(registry.delete(&path).await?),
                    1 => drop(registry.put(&key(&format!("/p/{at}/below")), "").await?),
                    2 => drop(registry.delete_prefix(&Prefix::from(&path)).await?),
                    _ => drop(registry.put(&path, n.to_string()).await?),
                }
            }
            Ok::<_, Error>(())
        })
    });
    let storm = storm.collect::<Vec<_>>();
    let mut watch = open(&*registry, "/p", WatchScope::Subtree).await?;
    for writer in storm {
        writer.await.expect("it does not panic")?;
    }
    let end = key("/p/end");
    registry.put(&end, "").await?;
    let mut picture = Picture::default();
    picture
        .until(&mut watch, |picture| {
            picture.synced.is_some() && picture.entries.contains_key(&end)
        })
        .await?;
    same_as_store(&*registry, "/p", &picture).await?;
    registry.close().await
}

/// W7. A watch ends with its handle.
pub async fn ends_with_the_handle(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let mut watch = open(&*registry, "/a", WatchScope::Key).await?;
    assert!(matches!(next(&mut watch).await?, WatchItem::Synced(_)));
    registry.close().await?;
    assert!(within(PATIENCE, watch.next()).await.is_none());
    Ok(())
}

/// W8. Who waits for the end of a key is told what there is then: not the key, and every change acknowledged before.
pub async fn a_listing_follows_the_end_of_a_key(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let (ends, stays) = (key("/d/ends"), key("/d/stays"));
    let list = List::new(key("/d"));
    let listed = |page: &Page| {
        page.entries
            .iter()
            .map(|e| (e.key.clone(), e.value.clone()))
            .collect::<Vec<_>>()
    };
    let mut created = Revision(0);
    for n in 0..20 {
        created = other.put(&ends, "1").await?;
        let ending = Arc::new(AtomicBool::new(false));
        let waiting = tokio::spawn({
            let (one, ends, list, ending) = (one.clone(), ends.clone(), list.clone(), ending.clone());
            async move {
                let page = one.list_once_gone(&ends, created, list).await;
                (page, ending.load(Ordering::SeqCst))
            }
        });
        // No end of it.
        other.put(&ends, "2").await?;
        // In every other round the wait has surely begun.
        if n % 2 == 0 {
            let (mut watch, mut picture) = Picture::of(&*one).await?;
            other.put(&ends, "3").await?;
            picture.until(&mut watch, |picture| picture.has("/d/ends", "3")).await?;
        }
        other.put(&stays, n.to_string()).await?;
        ending.store(true, Ordering::SeqCst);
        other.delete(&ends).await?;
        let (page, had_ended) = within(PATIENCE, waiting).await.expect("it does not panic");
        assert!(had_ended, "it was told before its end");
        assert_eq!(listed(&page?), [(stays.clone(), n.to_string().into())]);
    }
    // A later key of its name is another; what is gone is not waited for.
    other.put(&ends, "4").await?;
    let page = within(PATIENCE, one.list_once_gone(&ends, created, list.clone())).await?;
    assert_eq!(page.entries.len(), 2);
    other.delete(&ends).await?;
    within(PATIENCE, one.list_once_gone(&ends, created, list.clone())).await?;
    // It ends with its handle.
    let created = other.put(&ends, "5").await?;
    let waiting = tokio::spawn({
        let (one, ends) = (one.clone(), ends.clone());
        async move { one.list_once_gone(&ends, created, list).await }
    });
    one.close().await?;
    let closed = within(PATIENCE, waiting).await.expect("it does not panic");
    assert!(matches!(closed, Err(Error::Closed)), "{closed:?}");
    other.close().await
}
