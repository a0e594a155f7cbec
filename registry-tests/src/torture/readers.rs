//! Watchers, whose picture must equal the store at the end.

use std::collections::BTreeSet;
use std::sync::Arc;

use registry_api::{Event, Key, Registry, Revision, Watch, WatchItem, WatchRequest, WatchScope};

use super::{PATIENCE, Run, begun, chapters};
use crate::history::{Answer, Call, Request};
use crate::watch::{Picture, same_as_store};
use crate::{key, prefix, within};

/// What tells a reader that nothing more comes, and what it says the first time and the second.
pub(super) const END: &str = "/h/end";
pub(super) const ONCE: &str = "once";
pub(super) const TWICE: &str = "twice";

/// A watcher of all keys of the history.
pub(super) struct Reader {
    registry: Arc<dyn Registry>,
    run: Run,
    watch: Watch,
    picture: Picture,
    /// Which keys it was told of, at which revisions.
    told: BTreeSet<(Key, Revision)>,
    newest: Revision,
    /// How often it was told that it knows all: once, unless there was a gap to bridge.
    synced: usize,
}

impl Reader {
    /// A reader that knows all there is.
    pub(super) async fn start(registry: Arc<dyn Registry>, run: Run) -> Self {
        let request = WatchRequest::new(prefix(chapters::DIR), WatchScope::Subtree);
        let watch = begun(|| registry.watch(request.clone())).await;
        Self::of(registry, run, watch).await
    }

    async fn of(registry: Arc<dyn Registry>, run: Run, watch: Watch) -> Self {
        let mut reader = Self {
            registry,
            run,
            watch,
            picture: Picture::default(),
            told: BTreeSet::new(),
            newest: Revision::default(),
            synced: 0,
        };
        while reader.synced == 0 {
            reader.next().await;
        }
        reader
    }

    /// Reads to the end, and compares.
    pub(super) async fn read(mut self) -> Self {
        while !self.run.is_over() {
            // The end comes to those who are not waiting for changes too.
            let mut stop = self.run.stop.clone();
            tokio::select! {
                () = self.next() => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        }
        self.until_end(ONCE).await;
        let same = same_as_store(&*self.registry, chapters::DIR, &self.picture).await;
        same.expect("the store is back");
        self
    }

    /// Looks for what it was not told of, once it is told of the end again: what bridges a gap has `Synced` behind it, and
    /// the end may have come first with that.
    pub(super) async fn look_for_gaps(mut self) {
        self.until_end(TWICE).await;
        if self.synced == 1 && self.registry.capabilities().every_change {
            self.has_no_gap();
            self.run.counts.one("watches without a gap");
        } else {
            self.run.counts.one("watches that bridged gaps");
        }
    }

    async fn until_end(&mut self, says: &str) {
        let reading = async {
            while !self.picture.has(END, says) {
                self.next().await;
            }
        };
        within(PATIENCE, reading).await;
    }

    async fn next(&mut self) {
        let item = self.watch.next().await.expect("a watch goes on");
        let item = item.expect("a watch goes on");
        match &item {
            WatchItem::Synced(_) => self.synced += 1,
            WatchItem::Reset => panic!("nobody asked for a reset"),
            WatchItem::Changes(events) => events.iter().for_each(|event| self.event(event)),
        }
        self.picture.take(item);
    }

    fn event(&mut self, event: &Event) {
        self.run.counts.one("events");
        self.told.insert((event.key().clone(), event.revision()));
        if self.registry.capabilities().every_change {
            let (newest, revision) = (self.newest, event.revision());
            assert!(revision >= newest, "{revision} was told after {newest}");
            self.newest = revision;
        }
    }

    /// Every change that was acknowledged was told.
    fn has_no_gap(&self) {
        for chapter in self.run.chapters.all() {
            for call in chapter.history.calls() {
                self.was_told(&chapter.dir(), &call);
            }
        }
    }

    fn was_told(&self, dir: &Key, call: &Call) {
        let (Request::Commit(_, writes), Answer::Committed(revision, changed)) = (&call.request, &call.answer) else {
            return;
        };
        for ((number, _), _) in writes.iter().zip(changed).filter(|(_, changed)| **changed) {
            let changed = (key(&format!("{dir}/{number}")), *revision);
            assert!(self.told.contains(&changed), "{changed:?} was never told: {call}");
        }
    }
}

#[cfg(test)]
mod tests {
    use registry_api::Options;
    use registry_api::watch::{Feed, feed};
    use registry_raft::{Member, RaftConfig};

    use super::*;
    use crate::history::Write;

    /// A reader that is not told of the first of two puts, and is told of the second and of the end by one item.
    async fn not_told_of_one(then: impl FnOnce(&Feed, Revision)) -> Arc<super::super::Counts> {
        let member = Member::start(&RaftConfig::in_memory()).await.unwrap();
        let registry = member.connect(&Options::default()).await.unwrap();
        let (_over, stop) = tokio::sync::watch::channel(true);
        let run = Run {
            counts: Arc::default(),
            chapters: Arc::default(),
            stop,
        };
        let (feed, watch) = feed();
        feed.synced(Revision::default());
        let reader = Reader::of(registry.clone(), run.clone(), watch).await;
        let mut client = run.chapters.current().client(&registry, 0);
        for _ in 0..2 {
            client.commit(vec![], vec![(0, Write::Put)]).await;
        }
        let revision = registry.put(&key(END), ONCE).await.unwrap();
        let list = registry_api::List {
            depth: registry_api::Depth::Subtree,
            ..registry_api::List::new(prefix(chapters::DIR))
        };
        let entries = registry.list_all(list).await.unwrap();
        feed.changes(entries.into_iter().map(Event::Created).collect());
        then(&feed, revision);
        let reader = reader.read().await;
        registry.put(&key(END), TWICE).await.unwrap();
        let end = registry
            .get(&key(END), registry_api::Read::Linearizable)
            .await
            .unwrap()
            .unwrap();
        feed.changes(vec![Event::Updated(end)]);
        reader.look_for_gaps().await;
        run.counts
    }

    #[tokio::test]
    #[should_panic(expected = "was never told")]
    async fn a_change_that_is_not_told_is_missed() {
        not_told_of_one(|_, _| {}).await;
    }

    /// The end comes with what bridges a gap, before the mark that says so.
    #[tokio::test]
    async fn an_end_within_a_gap_does_not_hide_it() {
        let counts = not_told_of_one(|feed, revision| feed.synced(revision)).await;
        assert_eq!(counts.of("watches that bridged gaps"), 1);
    }
}
