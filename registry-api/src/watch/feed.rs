//! The queue between a backend that learns of changes and a reader who may be slow.

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_util::Stream;

use crate::{Error, Event, Key, Result, Revision, Watch, WatchItem};

/// How many events, and how many bytes of keys and values, wait for a reader before they are folded.
const MAX_EVENTS: usize = 4096;
const MAX_BYTES: usize = 8 << 20;

/// The two ends of a watch: the backend pushes, the caller reads.
///
/// Pushing never waits. Beyond 4,096 events or 8 MiB the queue is coalesced: of each key only the newest state is left, once
/// before the last `Synced` mark that waits and once after it, each delivered as one batch. What is left is at most what the
/// reader knew that is now deleted, and what there is now, twice: memory is bounded by the watched keys, not by the changes
/// to them. A key that was created and deleted meanwhile leaves no event, but its revision: a `Synced` at the end.
pub fn feed() -> (Feed, Watch) {
    let queue = Arc::new(Queue::default());
    (Feed(queue.clone()), Watch::new(Reader(queue)))
}

/// The backend's end of a watch. Dropping it ends the watch after what was pushed.
#[derive(Debug)]
pub struct Feed(Arc<Queue>);

impl Feed {
    /// Tells changes, in the order of their revisions; those of one transaction in one call.
    pub fn changes(&self, events: Vec<Event>) {
        if !events.is_empty() {
            self.0.push(WatchItem::Changes(events));
        }
    }

    /// Tells that everything up to this revision was told.
    pub fn synced(&self, revision: Revision) {
        self.0.push(WatchItem::Synced(revision));
    }

    /// Tells the reader to forget.
    pub fn reset(&self) {
        self.0.push(WatchItem::Reset);
    }

    /// Ends the watch with an error, after what was pushed.
    pub fn fail(&self, error: Error) {
        self.end(Some(error));
    }

    /// Whether the reader is gone.
    pub fn is_closed(&self) -> bool {
        self.0.lock().reader_gone
    }

    /// Waits until the reader is gone. One waits at a time.
    ///
    /// # Cancel safety
    /// Leaves nothing behind.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let queue = self.0.clone();
        std::future::poll_fn(move |cx| {
            let mut state = queue.lock();
            if state.reader_gone {
                return Poll::Ready(());
            }
            state.feed_waker = Some(cx.waker().clone());
            Poll::Pending
        })
    }

    fn end(&self, error: Option<Error>) {
        let mut state = self.0.lock();
        state.error = state.error.take().or(error);
        state.feed_gone = true;
        wake(&mut state.reader_waker);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.end(None);
    }
}

#[derive(Debug, Default)]
struct Queue(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    items: VecDeque<WatchItem>,
    events: usize,
    bytes: usize,
    /// What was left after the last fold: the next is due when as much again has come, so folding stays cheap.
    folded: (usize, usize),
    /// Whether the reader has been given a mark since the last reset.
    read_synced: bool,
    error: Option<Error>,
    feed_gone: bool,
    reader_gone: bool,
    reader_waker: Option<Waker>,
    feed_waker: Option<Waker>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: WatchItem) {
        let mut state = self.lock();
        if state.reader_gone {
            return;
        }
        // Marks of a connection that comes and goes, with nothing between, are one.
        if let (WatchItem::Synced(_), Some(WatchItem::Synced(_))) = (&item, state.items.back()) {
            state.items.pop_back();
        }
        state.count(&item, usize::wrapping_add);
        state.items.push_back(item);
        let (events, bytes) = state.folded;
        if state.events > MAX_EVENTS + 2 * events || state.bytes > MAX_BYTES + 2 * bytes {
            state.fold();
        }
        wake(&mut state.reader_waker);
    }
}

impl State {
    fn count(&mut self, item: &WatchItem, by: fn(usize, usize) -> usize) {
        if let WatchItem::Changes(events) = item {
            self.events = by(self.events, events.len());
            let bytes = events
                .iter()
                .map(|e| e.key().as_str().len() + e.entry().value.len())
                .sum();
            self.bytes = by(self.bytes, bytes);
        }
    }

    /// Coalesces the changes that wait: those before the last mark into one batch, and those after it into another, so that
    /// the mark stays where it is. Earlier marks say less and are left out.
    fn fold(&mut self) {
        let mut reset = false;
        let mut before = Coalesced::default();
        let mut after = Coalesced::default();
        let mut synced = None;
        // The newest of the changes after the last mark, which is complete if the current entries were told before.
        let mut newest = None;
        for item in mem::take(&mut self.items) {
            match item {
                WatchItem::Reset => {
                    (reset, synced, newest) = (true, None, None);
                    (before, after) = Default::default();
                }
                WatchItem::Synced(revision) => {
                    before.append(mem::take(&mut after));
                    (synced, newest) = (Some(revision), None);
                }
                WatchItem::Changes(events) => {
                    newest = newest.max(events.iter().map(Event::revision).max());
                    after.extend(events);
                }
            }
        }
        let is_complete = synced.is_some() || (self.read_synced && !reset);
        let after = after.into_item();
        let left = match &after {
            Some(WatchItem::Changes(events)) => events.last().map(Event::revision),
            _ => synced,
        };
        let newest = newest.filter(|_| is_complete && newest > left);
        if newest.is_some() && after.is_none() {
            synced = None;
        }
        let parts = [
            reset.then_some(WatchItem::Reset),
            before.into_item(),
            synced.map(WatchItem::Synced),
            after,
            newest.map(WatchItem::Synced),
        ];
        (self.events, self.bytes) = (0, 0);
        for item in parts.into_iter().flatten() {
            self.count(&item, usize::wrapping_add);
            self.items.push_back(item);
        }
        self.folded = (self.events, self.bytes);
    }
}

/// The changes of several batches, coalesced for each key.
#[derive(Default)]
struct Coalesced(BTreeMap<Key, Folded>);

impl Coalesced {
    fn extend(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.0.entry(event.key().clone()).or_default().then(event);
        }
    }

    /// Adds later changes.
    fn append(&mut self, later: Self) {
        self.extend(later.into_events());
    }

    fn into_events(self) -> impl Iterator<Item = Event> {
        self.0.into_values().flat_map(|f| f.deleted.into_iter().chain(f.put))
    }

    fn into_item(self) -> Option<WatchItem> {
        let mut events: Vec<_> = self.0.into_values().flat_map(Folded::in_order).collect();
        // Stable, so that the delete of a key stays before what replaced it, also in a store that went back.
        events.sort_by_key(|(revision, _)| *revision);
        let events: Vec<_> = events.into_iter().map(|(_, event)| event).collect();
        (!events.is_empty()).then_some(WatchItem::Changes(events))
    }
}

/// What is left of one key's changes: the end of what the reader knew, then what is there now.
#[derive(Default)]
struct Folded {
    deleted: Option<Event>,
    put: Option<Event>,
}

impl Folded {
    fn then(&mut self, event: Event) {
        match (event, self.put.take()) {
            (Event::Updated(entry), Some(Event::Created(_))) => self.put = Some(Event::Created(entry)),
            (event @ (Event::Created(_) | Event::Updated(_)), _) => self.put = Some(event),
            // The reader never saw what came and went.
            (Event::Deleted { .. }, Some(Event::Created(_))) => {}
            (event @ Event::Deleted { .. }, _) => self.deleted = Some(event),
        }
    }
}

impl Folded {
    /// What is left, each with the revision that it is sorted by.
    fn in_order(self) -> impl Iterator<Item = (Revision, Event)> {
        let deleted = self.deleted.map(|event| (event.revision(), event));
        let after = deleted.as_ref().map_or(Revision(0), |(revision, _)| *revision);
        let put = self.put.map(|event| (event.revision().max(after), event));
        deleted.into_iter().chain(put)
    }
}

struct Reader(Arc<Queue>);

impl Stream for Reader {
    type Item = Result<WatchItem>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.lock();
        if let Some(item) = state.items.pop_front() {
            state.count(&item, usize::wrapping_sub);
            match item {
                WatchItem::Reset => state.read_synced = false,
                WatchItem::Synced(_) => state.read_synced = true,
                WatchItem::Changes(_) => {}
            }
            if state.items.is_empty() {
                state.folded = (0, 0);
            }
            return Poll::Ready(Some(Ok(item)));
        }
        if let Some(error) = state.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if state.feed_gone {
            return Poll::Ready(None);
        }
        state.reader_waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.reader_gone = true;
        state.items = VecDeque::new();
        wake(&mut state.feed_waker);
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::Entry;
    use crate::watch::{DeleteCause, Picture};

    fn entry(key: u8, revision: u64) -> Entry {
        let (create_revision, mod_revision) = (Revision(revision), Revision(revision));
        let key = Key::parse(&format!("/{key}")).expect("a digit is a key");
        Entry {
            key,
            value: Bytes::from(revision.to_string()),
            create_revision,
            mod_revision,
            session: None,
        }
    }

    /// What a reader knows after these items.
    fn read(picture: &mut BTreeMap<Key, Entry>, item: WatchItem) {
        let WatchItem::Changes(events) = item else { return };
        for event in events {
            match event {
                Event::Created(entry) => {
                    let before = picture.insert(entry.key.clone(), entry);
                    assert!(before.is_none(), "created over {before:?}");
                }
                Event::Updated(entry) => assert!(picture.insert(entry.key.clone(), entry).is_some()),
                Event::Deleted { last, .. } => assert!(picture.remove(&last.key).is_some()),
            }
        }
    }

    proptest! {
        /// However often the queue is coalesced, and wherever the reader was, it ends with the newest state of every key; and
        /// no event comes after a mark that it is older than.
        #[test]
        fn folding_keeps_the_final_state(changes in proptest::collection::vec((0u8..6, any::<bool>(), 0u8..5), 1..200)) {
            let queue = Queue::default();
            let mut truth = Picture::default();
            let (mut known, mut synced) = (BTreeMap::new(), Revision(0));
            let mut take = |item| {
                match &item {
                    WatchItem::Synced(revision) => {
                        assert!(*revision > synced, "a mark of {revision} after one of {synced}");
                        synced = *revision;
                    }
                    WatchItem::Changes(events) => assert!(events.iter().all(|event| event.revision() > synced)),
                    WatchItem::Reset => {}
                }
                read(&mut known, item);
            };
            for (revision, (key, put, then)) in (1..).zip(changes) {
                let entry = entry(key, revision);
                let events = match put {
                    true => truth.put(entry),
                    false => truth.delete(&entry.key, Revision(revision), DeleteCause::Deleted).into_iter().collect(),
                };
                queue.push(WatchItem::Changes(events));
                match then {
                    0 => queue.lock().fold(),
                    1 => if let Some(item) = queue.lock().items.pop_front() { take(item) },
                    2 => queue.push(WatchItem::Synced(Revision(revision))),
                    _ => {}
                }
            }
            for item in mem::take(&mut queue.lock().items) {
                take(item);
            }
            prop_assert_eq!(known.into_values().collect::<Vec<_>>(), truth.entries().cloned().collect::<Vec<_>>());
        }
    }

    /// What the mark of a revision follows is told before it, and what came later after it.
    #[test]
    fn folding_keeps_the_last_mark_where_it_is() {
        let queue = Queue::default();
        let mut truth = Picture::default();
        let mut put = |key, revision| queue.push(WatchItem::Changes(truth.put(entry(key, revision))));
        put(1, 1);
        put(2, 2);
        queue.push(WatchItem::Synced(Revision(2)));
        put(1, 3);
        queue.push(WatchItem::Synced(Revision(3)));
        put(1, 4);
        put(3, 5);
        put(1, 6);
        let mut known = BTreeMap::new();
        // A second time changes nothing.
        for _ in 0..2 {
            queue.lock().fold();
            let items: Vec<_> = queue.lock().items.iter().cloned().collect();
            let revisions = |item: &WatchItem| match item {
                WatchItem::Changes(events) => events.iter().map(|event| event.revision().0).collect(),
                _ => Vec::new(),
            };
            assert!(
                matches!(&items[..], [_, WatchItem::Synced(Revision(3)), _]),
                "{items:?}"
            );
            assert_eq!(
                items.iter().map(revisions).collect::<Vec<_>>(),
                [vec![2, 3], vec![], vec![4, 5, 6]]
            );
        }
        for item in mem::take(&mut queue.lock().items) {
            read(&mut known, item);
        }
        assert_eq!(
            known.into_values().collect::<Vec<_>>(),
            truth.entries().cloned().collect::<Vec<_>>()
        );
    }

    /// What follows a reset is not all told yet, whatever was before.
    #[test]
    fn folding_keeps_no_mark_from_before_a_reset() {
        let queue = Queue::default();
        let changes = |revision| WatchItem::Changes(vec![Event::Created(entry(1, revision))]);
        let items = [changes(1), WatchItem::Synced(Revision(1)), WatchItem::Reset, changes(2)];
        items.iter().for_each(|item| queue.push(item.clone()));
        queue.lock().fold();
        assert_eq!(queue.lock().items, &items[2..]);
    }

    /// A reader that waits for the revision of its own put gets it, though the key was deleted before it read.
    #[tokio::test]
    async fn folding_keeps_the_newest_revision() {
        let (feed, mut watch) = feed();
        let changes = |event| WatchItem::Changes(vec![event]);
        let came_and_went = |put, at| {
            let (last, revision, cause) = (entry(2, put), Revision(at), DeleteCause::Deleted);
            feed.changes(vec![Event::Created(entry(2, put))]);
            feed.changes(vec![Event::Deleted { last, revision, cause }]);
            feed.0.lock().fold();
        };
        feed.changes(vec![Event::Created(entry(1, 1))]);
        came_and_went(2, 3);
        // The current entries are not complete yet, so neither is what is left of them.
        assert_eq!(feed.0.lock().items, [changes(Event::Created(entry(1, 1)))]);
        feed.synced(Revision(3));
        came_and_went(8, 9);
        let left = [changes(Event::Created(entry(1, 1))), WatchItem::Synced(Revision(9))];
        assert_eq!(feed.0.lock().items, left);
        feed.changes(vec![Event::Created(entry(3, 10))]);
        came_and_went(11, 12);
        assert_eq!(
            feed.0.lock().items,
            [
                left[0].clone(),
                left[1].clone(),
                changes(Event::Created(entry(3, 10))),
                WatchItem::Synced(Revision(12))
            ]
        );
        for _ in 0..4 {
            watch.next().await.expect("it goes on").expect("nothing failed");
        }
        // Also where the mark was read before.
        came_and_went(13, 14);
        assert_eq!(feed.0.lock().items, [WatchItem::Synced(Revision(14))]);
        feed.reset();
        came_and_went(15, 16);
        assert_eq!(feed.0.lock().items, [WatchItem::Reset]);
    }

    /// A store that was restored from an older copy has lower revisions.
    #[test]
    fn folding_keeps_a_delete_before_what_replaced_the_key() {
        let queue = Queue::default();
        let gone = Event::Deleted {
            last: entry(1, 99),
            revision: Revision(50),
            cause: DeleteCause::Unknown,
        };
        let items = [
            WatchItem::Changes(vec![gone, Event::Created(entry(1, 40))]),
            WatchItem::Synced(Revision(50)),
        ];
        queue.push(WatchItem::Synced(Revision(99)));
        items.iter().for_each(|item| queue.push(item.clone()));
        queue.lock().fold();
        assert_eq!(queue.lock().items, &items[..]);
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_costs_bounded_memory() {
        let (feed, mut watch) = feed();
        let mut truth = Picture::default();
        for revision in 1..200_000 {
            feed.changes(truth.put(entry((revision % 7) as u8, revision)));
            assert!(feed.0.lock().events <= MAX_EVENTS + 2 * 7 + 1);
        }
        feed.synced(Revision(200_000));
        drop(feed);
        let mut known = BTreeMap::new();
        while let Some(item) = watch.next().await {
            read(&mut known, item.expect("nothing failed"));
        }
        assert_eq!(
            known.into_values().collect::<Vec<_>>(),
            truth.entries().cloned().collect::<Vec<_>>()
        );
    }
}
