//! A registry that breaks one sentence of the book, whatever the store beneath it does.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use registry::{
    Capabilities, Committed, Depth, Entry, Error, Event, Existing, Expect, Health, Key, Kind, List, Operation, Page,
    Prefix, Read, Registry, Result, Revision, Session, Txn, Watch, WatchFrom, WatchItem, WatchRequest, WatchScope,
};
use tokio::sync::watch;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    // Keys and values.
    KeysFoldCase,
    PercentIsWild,
    EmptyIsNothing,
    LargeIsCut,
    NamespacesAreOne,
    ParentsHaveValues,
    ChildrenNeverGo,
    BelowGoesByBytes,
    DeleteTakesWhatIsBelow,
    DeleteOfNothingIsTrue,
    DeleteDoesNothing,
    EphemeralStays,
    KindIsIgnored,
    TakeOverIsRefused,
    TakeOverKeepsTheRevision,
    ChildrenAreUnsorted,
    PagesOverlap,
    ListOfChildrenIsDeep,
    CountLeavesOutTheKey,
    RecipesLeak,
    // Revisions and transactions.
    RevisionIsStuck,
    ModRevisionIsZero,
    ConditionsAreIgnored,
    AnyRevisionWillDo,
    TransactionsAreSplit,
    ReadsAreOld,
    ListingsComeEarly,
    StaleReadsGoBack,
    // Sessions.
    TtlIsAnother,
    SessionsAreShared,
    SessionsDie,
    HandlesLeak,
    CloseDoesNothing,
    CloseTakesWhatOthersPut,
    // Watches.
    NeverSynced,
    FirstIsLost,
    DeletesAreMissed,
    WatchesSayNothing,
    LastValueIsLost,
    EventsComeTwice,
    EventsComeAlone,
    ScopeIsIgnored,
    RevisionIsIgnored,
    OneWatchAtATime,
    SlowReadersLose,
    // Queues.
    QueuesAreTurnedRound,
    LabelsAreLost,
    // Failures.
    HealthSaysNothing,
    WritesAreForgotten,
    RestartsForget,
    CallsHang,
    ErrorsNameNobody,
    SessionsEndEarly,
    SessionsNeverEnd,
    WatchesEnd,
    UnknownIsTakenForDone,
    // Answers.
    AnswersAreRight,
    FirstAnswerIsLost,
    ManyAnswersAreLost,
    PutsComeLate,
    FirstPutLandsLate,
}

/// A handle with a fault.
#[derive(Debug)]
pub(crate) struct Broken {
    whole: Arc<dyn Registry>,
    capabilities: Capabilities,
    fault: Fault,
    first: Mutex<HashMap<Key, Entry>>,
    children: Mutex<BTreeSet<String>>,
    written: Mutex<Vec<Key>>,
    count: AtomicU64,
    /// The newest watch's number.
    watches: watch::Sender<u64>,
}

impl Broken {
    /// How late a put of [`Fault::PutsComeLate`] comes.
    pub(crate) const LATE: Duration = Duration::from_millis(300);

    pub(crate) fn new(whole: Arc<dyn Registry>, fault: Fault) -> Self {
        if fault == Fault::HandlesLeak {
            std::mem::forget(whole.clone());
        }
        if fault == Fault::SessionsDie {
            let session = whole.session().clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                session.told_expired(session.state().id());
            });
        }
        Self {
            // A listing that follows is a call of its own here.
            capabilities: Capabilities {
                lists_along: false,
                ..whole.capabilities().clone()
            },
            whole,
            fault,
            first: Mutex::default(),
            children: Mutex::default(),
            written: Mutex::default(),
            count: AtomicU64::new(0),
            watches: watch::Sender::new(0),
        }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn broken_condition(&self, expect: Expect) -> Expect {
        match expect {
            Expect::ModRevision(_) | Expect::CreateRevision(_) if self.is(Fault::AnyRevisionWillDo) => Expect::Present,
            expect => expect,
        }
    }

    fn broken_put(&self, key: Key, value: bytes::Bytes, kind: Kind, existing: Existing) -> Operation {
        let value = match self.fault {
            Fault::LargeIsCut => value.slice(..value.len().min(registry::MAX_VALUE)),
            Fault::LabelsAreLost if key.is_recipe() => bytes::Bytes::new(),
            _ => value,
        };
        let kind = if self.is(Fault::EphemeralStays) {
            Kind::Persistent
        } else {
            kind
        };
        let existing = match self.fault {
            Fault::KindIsIgnored => Existing::TakeOver,
            Fault::TakeOverIsRefused => Existing::Keep,
            _ => existing,
        };
        if kind == Kind::Ephemeral {
            self.written.lock().unwrap().push(key.clone());
        }
        Operation::Put {
            key,
            value,
            kind,
            existing,
        }
    }

    fn broken_key(&self, key: &Key) -> Key {
        match self.fault {
            Fault::KeysFoldCase => Key::from_store(&key.as_str().to_lowercase()).unwrap(),
            _ => key.clone(),
        }
    }

    fn broken_entry(&self, mut entry: Entry) -> Entry {
        match self.fault {
            Fault::ModRevisionIsZero => entry.mod_revision = Revision(0),
            Fault::TakeOverKeepsTheRevision => {
                let mut first = self.first.lock().unwrap();
                let first = first.entry(entry.key.clone()).or_insert_with(|| entry.clone());
                entry.create_revision = first.create_revision;
            }
            Fault::QueuesAreTurnedRound => entry.create_revision = Revision((1 << 40) - entry.create_revision.0),
            _ => {}
        }
        entry
    }

    /// All entries of the user's tree whose names begin with these bytes.
    async fn by_bytes(&self, prefix: &Prefix) -> Result<Vec<Entry>> {
        let mut entries = self.whole.list_all(List::new(Prefix::root())).await?;
        if prefix.as_str().starts_with('~') {
            entries = self.whole.list_all(List::new(prefix.key().unwrap().parent())).await?;
        }
        entries.retain(|entry| entry.key.as_str().starts_with(prefix.as_str()));
        Ok(entries)
    }
}

#[async_trait]
impl Registry for Broken {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn session(&self) -> &Session {
        self.whole.session()
    }

    async fn get(&self, key: &Key, read: Read) -> Result<Option<Entry>> {
        if self.is(Fault::CallsHang) && self.whole.get(key, read).await.is_err() {
            return std::future::pending().await;
        }
        let found = self
            .whole
            .get(&self.broken_key(key), read)
            .await?
            .map(|entry| self.broken_entry(entry));
        let again = self.count.fetch_add(1, Ordering::Relaxed) % 2 == 1;
        Ok(match (self.fault, found) {
            (Fault::EmptyIsNothing, found) => found.filter(|entry| !entry.value.is_empty()),
            (Fault::ParentsHaveValues, None) => {
                let below = self.whole.list_all(List::new(key)).await?;
                below.into_iter().next().map(|entry| Entry {
                    key: key.clone(),
                    ..entry
                })
            }
            (Fault::ReadsAreOld, Some(entry)) => {
                Some(self.first.lock().unwrap().entry(key.clone()).or_insert(entry).clone())
            }
            (Fault::StaleReadsGoBack, Some(entry)) if read == Read::Stale => {
                let first = self
                    .first
                    .lock()
                    .unwrap()
                    .entry(key.clone())
                    .or_insert(entry.clone())
                    .clone();
                Some(if again { first } else { entry })
            }
            (_, found) => found,
        })
    }

    async fn list(&self, mut list: List) -> Result<Page> {
        if self.is(Fault::ListOfChildrenIsDeep) {
            list.depth = Depth::Subtree;
        }
        let mut page = self.whole.list(list.clone()).await?;
        match self.fault {
            Fault::BelowGoesByBytes => page.entries = self.by_bytes(&list.prefix).await?,
            Fault::PagesOverlap if page.entries.len() > 1 => {
                let next = page.entries[page.entries.len() - 2].key.clone();
                page.next = page.next.map(|_| next);
            }
            Fault::RecipesLeak if list.prefix == Prefix::root() => {
                page.entries
                    .extend(self.whole.list_all(List::new(Prefix::from_store("~/lock")?)).await?);
            }
            _ => {}
        }
        page.entries = page.entries.into_iter().map(|entry| self.broken_entry(entry)).collect();
        Ok(page)
    }

    async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>> {
        let mut names = self.whole.children(prefix, read).await?;
        if self.is(Fault::ChildrenAreUnsorted) {
            names.reverse();
        }
        if self.is(Fault::ChildrenNeverGo) {
            let mut ever = self.children.lock().unwrap();
            ever.extend(names.drain(..));
            names = ever.iter().cloned().collect();
        }
        Ok(names)
    }

    async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64> {
        let count = self.whole.count(prefix, read).await?;
        let itself = match prefix.key() {
            Some(key) => self.whole.get(&key, read).await?.is_some(),
            None => false,
        };
        Ok(count - u64::from(itself && self.is(Fault::CountLeavesOutTheKey)))
    }

    async fn commit(&self, txn: Txn) -> Result<Committed> {
        let mut broken = Txn::new();
        for condition in txn.conditions {
            if !self.is(Fault::ConditionsAreIgnored) {
                broken = broken.when(
                    &self.broken_key(&condition.key),
                    self.broken_condition(condition.expect),
                );
            }
        }
        let mut deleted = Vec::new();
        for operation in txn.operations {
            let key = self.broken_key(operation.key());
            match operation {
                Operation::Put {
                    value, kind, existing, ..
                } => {
                    broken.operations.push(self.broken_put(key, value, kind, existing));
                }
                Operation::Delete { .. } => {
                    self.children
                        .lock()
                        .unwrap()
                        .extend(key.as_str().split('/').nth(1).map(str::to_owned));
                    deleted.push(key.clone());
                    broken.operations.push(Operation::Delete { key });
                }
            }
        }
        let nothing = Committed {
            revision: Revision(0),
            changed: vec![true; broken.operations.len()],
        };
        let forgotten = self.is(Fault::WritesAreForgotten) && self.count.fetch_add(1, Ordering::Relaxed) % 10 == 9;
        let mut committed = match self.fault {
            Fault::DeleteDoesNothing if !deleted.is_empty() => nothing,
            _ if forgotten => nothing,
            Fault::TransactionsAreSplit => {
                let mut last = nothing;
                for operation in broken.operations {
                    let alone = Txn {
                        conditions: broken.conditions.clone(),
                        operations: vec![operation],
                    };
                    last.revision = self.whole.commit(alone).await?.revision;
                }
                last
            }
            // One that did not happen is as unknown.
            Fault::ManyAnswersAreLost if self.count.fetch_add(1, Ordering::Relaxed) % 3 < 2 => {
                drop(self.whole.commit(broken).await);
                return Err(Error::OutcomeUnknown {
                    operation: "a write",
                    source: "the answer is lost".into(),
                });
            }
            Fault::FirstAnswerIsLost => match self.count.fetch_add(1, Ordering::Relaxed) {
                0 => {
                    self.whole.commit(broken).await?;
                    return Err(Error::OutcomeUnknown {
                        operation: "a write",
                        source: "the answer is lost".into(),
                    });
                }
                1 => {
                    return Err(Error::Unavailable {
                        backend: "broken",
                        source: "nobody answers".into(),
                    });
                }
                _ => self.whole.commit(broken).await?,
            },
            Fault::UnknownIsTakenForDone => self.whole.commit(broken).await.unwrap_or(nothing),
            Fault::PutsComeLate if deleted.is_empty() => {
                let whole = self.whole.clone();
                let late = async move {
                    tokio::time::sleep(Self::LATE).await;
                    whole.commit(broken).await
                };
                tokio::spawn(late).await.unwrap()?
            }
            Fault::FirstPutLandsLate if deleted.is_empty() && self.count.fetch_add(1, Ordering::Relaxed) == 0 => {
                let whole = self.whole.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Self::LATE).await;
                    whole.commit(broken).await
                });
                return Err(Error::OutcomeUnknown {
                    operation: "a put",
                    source: "it lands late".into(),
                });
            }
            _ => self.whole.commit(broken).await?,
        };
        match self.fault {
            // So that others surely come between.
            Fault::ConditionsAreIgnored => tokio::time::sleep(Duration::from_millis(10)).await,
            Fault::RevisionIsStuck => committed.revision = Revision(7),
            Fault::DeleteOfNothingIsTrue => committed.changed.fill(true),
            Fault::DeleteTakesWhatIsBelow => {
                for key in deleted {
                    self.whole.delete_prefix(&Prefix::from(key)).await?;
                }
            }
            _ => {}
        }
        Ok(committed)
    }

    async fn commit_and_list(&self, txn: Txn, list: List) -> Result<(Committed, Option<Page>)> {
        let early = self.list(list.clone()).await.ok();
        let committed = self.commit(txn).await?;
        let page = match self.fault {
            Fault::ListingsComeEarly => early,
            _ => self.list(list).await.ok(),
        };
        Ok((committed, page))
    }

    async fn list_once_gone(&self, key: &Key, created: Revision, list: List) -> Result<Page> {
        let early = self.list(list.clone()).await?;
        let watch = self.watch(WatchRequest::new(key, WatchScope::Key)).await?;
        watch.gone(created).await?;
        match self.fault {
            Fault::ListingsComeEarly => Ok(early),
            _ => self.list(list).await,
        }
    }

    async fn delete_prefix(&self, prefix: &Prefix) -> Result<u64> {
        match self.fault {
            Fault::PercentIsWild if prefix.as_str().contains('%') => self.whole.delete_prefix(&Prefix::root()).await,
            _ => self.whole.delete_prefix(prefix).await,
        }
    }

    async fn watch(&self, mut request: WatchRequest) -> Result<Watch> {
        match self.fault {
            Fault::ScopeIsIgnored => request.scope = WatchScope::Subtree,
            Fault::RevisionIsIgnored => request.from = WatchFrom::Now,
            _ => {}
        }
        if self.is(Fault::WatchesSayNothing) {
            return Ok(Watch::new(stream::pending()));
        }
        let fault = self.fault;
        let mut told = 0;
        let whole = self.whole.watch(request).await?;
        let items = whole.flat_map(move |item| {
            told += 1;
            stream::iter(item.map_or_else(|error| vec![Err(error)], |item| broken_item(fault, item, told)))
        });
        if fault == Fault::WatchesEnd {
            // All that there is, and nothing of what comes.
            return Ok(Watch::new(items.take(2)));
        }
        if fault != Fault::OneWatchAtATime {
            return Ok(Watch::new(items));
        }
        self.watches.send_modify(|newest| *newest += 1);
        let mut newest = self.watches.subscribe();
        let this = *newest.borrow();
        Ok(Watch::new(items.take_until(async move {
            newest.wait_for(|newest| *newest != this).await.map(|_| ())
        })))
    }

    async fn health(&self) -> Result<Health> {
        let health = self.whole.health().await?;
        Ok(match self.fault {
            Fault::HealthSaysNothing => Health {
                endpoint: String::new(),
                ..health
            },
            _ => health,
        })
    }

    async fn close(&self) -> Result<()> {
        match self.fault {
            Fault::CloseDoesNothing => return Ok(()),
            Fault::CloseTakesWhatOthersPut => {
                let written = self.written.lock().unwrap().clone();
                for key in written {
                    self.whole.delete(&key).await?;
                }
            }
            _ => {}
        }
        self.whole.close().await
    }
}

/// What a watch with that fault tells instead; `told` is the number of the item.
fn broken_item(fault: Fault, item: WatchItem, told: usize) -> Vec<Result<WatchItem>> {
    let deleted = |event: &Event| matches!(event, Event::Deleted { .. });
    let mut items = match (fault, item) {
        (Fault::NeverSynced, WatchItem::Synced(_)) => Vec::new(),
        (Fault::FirstIsLost, WatchItem::Changes(_)) if told == 1 => Vec::new(),
        (Fault::SlowReadersLose, WatchItem::Changes(_)) if told > 20 => Vec::new(),
        (Fault::DeletesAreMissed, WatchItem::Changes(mut events)) => {
            events.retain(|event| !deleted(event));
            vec![WatchItem::Changes(events)]
        }
        (Fault::LastValueIsLost, WatchItem::Changes(mut events)) => {
            for event in &mut events {
                if let Event::Deleted { last, .. } = event {
                    last.value = bytes::Bytes::new();
                }
            }
            vec![WatchItem::Changes(events)]
        }
        (Fault::EventsComeTwice, item) => vec![item.clone(), item],
        (Fault::EventsComeAlone, WatchItem::Changes(events)) => events
            .into_iter()
            .map(|event| WatchItem::Changes(vec![event]))
            .collect(),
        (_, item) => vec![item],
    };
    items.retain(|item| !matches!(item, WatchItem::Changes(events) if events.is_empty()));
    items.into_iter().map(Ok).collect()
}
