//! What is measured, and how.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::ValueEnum;
use futures_util::{StreamExt, TryStreamExt, stream};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;
use registry::{
    Config, Error, Event, Expect, Key, List, Prefix, Read, Registry, Result, Revision, WatchItem, WatchRequest,
    WatchScope,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Failure;
use super::report::Row;

/// How many puts fill the store at once.
const IN_FLIGHT: usize = 256;
/// Entries of a listing.
const PAGE: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// A put of one of the keys.
    Put,
    /// A linearizable get of one of the keys.
    Get,
    /// A stale get of one of the keys.
    StaleGet,
    /// A compare-and-set of the task's own key.
    Cas,
    /// A listing of ten of the keys.
    List,
    /// From a put until the last of the tasks, each with a watch on it, was told.
    Watch,
    /// From a release until the next task holds the lock.
    Lock,
    /// From a resignation until the next task leads.
    Election,
    /// A handle opened and closed, with its session.
    Session,
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::StaleGet => "stale-get",
            Self::Cas => "cas",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Lock => "lock",
            Self::Election => "election",
            Self::Session => "session",
        })
    }
}

impl Work {
    pub(crate) const ALL: [Self; 9] = [
        Self::Put,
        Self::Get,
        Self::StaleGet,
        Self::Cas,
        Self::List,
        Self::Watch,
        Self::Lock,
        Self::Election,
        Self::Session,
    ];

    /// Whether the keys have to be there first.
    pub(crate) fn reads_keys(self) -> bool {
        matches!(self, Self::Put | Self::Get | Self::StaleGet | Self::List)
    }
}

/// What the tasks work on.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    config: Config,
    registry: Arc<dyn Registry>,
    space: Key,
    keys: u32,
    value: Bytes,
}

impl Load {
    pub(crate) fn new(
        config: &Config,
        registry: &Arc<dyn Registry>,
        space: &Key,
        keys: u32,
        value_size: usize,
    ) -> Self {
        Self {
            config: config.clone(),
            registry: registry.clone(),
            space: space.clone(),
            keys,
            value: vec![b'v'; value_size].into(),
        }
    }

    fn at(&self, path: &str) -> Result<Key> {
        Ok(Key::parse(&format!("{}/{path}", self.space))?)
    }

    fn some_key(&self, random: &mut StdRng) -> Result<Key> {
        self.at(&format!("keys/{:08}", random.random_range(0..self.keys)))
    }

    /// Puts the keys.
    pub(crate) async fn fill(&self) -> Result<()> {
        let puts = stream::iter(0..self.keys).map(|n| async move {
            let key = self.at(&format!("keys/{n:08}"))?;
            self.registry.put(&key, self.value.clone()).await.map(drop)
        });
        puts.buffer_unordered(IN_FLIGHT).try_collect().await
    }
}

/// Times between two moments, in nanoseconds up to an hour.
struct Recorder {
    from: Instant,
    until: Instant,
    took: Histogram<u64>,
    failures: u64,
    failed: Option<Error>,
}

impl Recorder {
    fn new(from: Instant, until: Instant) -> Self {
        Self {
            from,
            until,
            took: Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("the bounds are good"),
            failures: 0,
            failed: None,
        }
    }

    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// What began in the warm-up, or ended too late, is not counted.
    fn record(&mut self, began: Instant, outcome: Result<Duration>) {
        if began < self.from || Instant::now() > self.until {
            return;
        }
        match outcome {
            Ok(took) => self
                .took
                .saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)),
            Err(error) => {
                self.failures += 1;
                self.failed.get_or_insert(error);
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.took.add(other.took).expect("all have the same bounds");
        self.failures += other.failures;
        self.failed = self.failed.take().or(other.failed);
    }
}

/// Measures one kind of work with so many tasks.
pub(crate) async fn measure(
    work: Work,
    load: &Load,
    tasks: usize,
    warm_up: Duration,
    duration: Duration,
) -> Result<Row, Failure> {
    let from = Instant::now() + warm_up;
    let mut all = Recorder::new(from, from + duration);
    if work == Work::Watch {
        fan_out(load, tasks, &mut all).await?;
    } else {
        let released = Arc::new(Mutex::new(None));
        let mut running = JoinSet::new();
        for task in 0..tasks {
            let worker = Worker::new(work, load.clone(), task, released.clone())?;
            running.spawn(worker.run(Recorder::new(all.from, all.until)));
        }
        while let Some(done) = running.join_next().await {
            match done {
                Ok(recorder) => all.merge(recorder),
                Err(error) => return Err(Failure::new(1, format!("a task ended: {error}"))),
            }
        }
    }
    Ok(Row {
        work,
        tasks,
        seconds: duration.as_secs_f64(),
        took: all.took,
        failures: all.failures,
        failed: all.failed.map(|error| error.to_string()),
    })
}

/// One task.
struct Worker {
    work: Work,
    load: Load,
    random: StdRng,
    own: Key,
    revision: Option<Revision>,
    /// When the lock or the lead was given up last.
    released: Arc<Mutex<Option<Instant>>>,
}

impl Worker {
    fn new(work: Work, load: Load, task: usize, released: Arc<Mutex<Option<Instant>>>) -> Result<Self> {
        let own = match work {
            Work::Lock | Work::Election => load.at("queue")?,
            _ => load.at(&format!("own/{task}"))?,
        };
        Ok(Self {
            work,
            load,
            random: rand::SeedableRng::seed_from_u64(task as u64),
            own,
            revision: None,
            released,
        })
    }

    async fn run(mut self, mut recorder: Recorder) -> Recorder {
        while recorder.goes_on() {
            let began = Instant::now();
            let outcome = self.once().await;
            let whole = began.elapsed();
            recorder.record(began, outcome.map(|part| part.unwrap_or(whole)));
        }
        recorder
    }

    /// Does it once; says how long the part took that is measured, where that is not the whole.
    async fn once(&mut self) -> Result<Option<Duration>> {
        let Self { load, own, random, .. } = self;
        let registry = &load.registry;
        match self.work {
            Work::Put => {
                let key = load.some_key(random)?;
                registry.put(&key, load.value.clone()).await?;
            }
            Work::Get | Work::StaleGet => {
                let read = match self.work {
                    Work::Get => Read::Linearizable,
                    _ => Read::Stale,
                };
                let key = load.some_key(random)?;
                registry.get(&key, read).await?;
            }
            Work::Cas => {
                let expect = self.revision.map_or(Expect::Absent, Expect::ModRevision);
                let put = registry.put_if(own, expect, load.value.clone()).await;
                self.revision = match put {
                    Ok(revision) => Some(revision),
                    // Another measurement left it there, or the outcome of the last was unknown.
                    Err(Error::Conflict { found, .. }) => found,
                    Err(error) => return Err(error),
                };
            }
            Work::List => {
                let after = load.some_key(random)?;
                let list = List {
                    after: Some(after),
                    limit: PAGE,
                    ..List::new(load.at("keys")?)
                };
                registry.list(list).await?;
            }
            Work::Lock => {
                let held = registry.lock(own).acquire().await?;
                let now = Instant::now();
                let handed_over = self.released.lock().replace(now).map(|released| now - released);
                held.release().await?;
                return Ok(handed_over);
            }
            Work::Election => {
                let leadership = registry.election(own).campaign("bench").await?;
                let now = Instant::now();
                let handed_over = self.released.lock().replace(now).map(|released| now - released);
                leadership.resign().await?;
                return Ok(handed_over);
            }
            Work::Session => registry::connect(&load.config).await?.close().await?,
            Work::Watch => {
                return Err(Error::InvalidRequest(
                    "a watch is measured by all tasks together".into(),
                ));
            }
        }
        Ok(None)
    }
}

/// One writer, and a watch for each task.
async fn fan_out(load: &Load, watches: usize, recorder: &mut Recorder) -> Result<()> {
    let key = load.at("watched/key")?;
    let above = Prefix::from(load.at("watched")?);
    let (told, mut heard) = mpsc::channel(watches);
    let mut running = JoinSet::new();
    for _ in 0..watches {
        let request = WatchRequest::new(above.clone(), WatchScope::Subtree);
        let mut watch = load.registry.watch(request).await?;
        let told = told.clone();
        running.spawn(async move {
            while let Some(Ok(item)) = watch.next().await {
                let WatchItem::Changes(events) = item else { continue };
                for revision in events.iter().map(Event::revision) {
                    if told.send(revision).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
    drop(told);
    while recorder.goes_on() {
        let began = Instant::now();
        let put = load.registry.put(&key, load.value.clone()).await;
        let outcome = match put {
            Ok(revision) => {
                let mut left = watches;
                while left > 0 {
                    match heard.recv().await {
                        Some(told) => left -= usize::from(told == revision),
                        None => return Err(Error::Closed),
                    }
                }
                Ok(began.elapsed())
            }
            Err(error) => Err(error),
        };
        recorder.record(began, outcome);
    }
    Ok(())
}
