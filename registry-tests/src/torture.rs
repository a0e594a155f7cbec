//! Everything at once while things break: clients that read and write, watchers, contenders for a lock, candidates of an
//! election; and at the end, with everything mended, what each was promised.
//!
//! What the clients asked and were told is judged as one history, a chapter at a time (R1 to R5, F2, F3). What watchers know
//! must equal the store (W2, W3). No two may be sure of a lock or a leadership at one time, tokens only grow, and a counter
//! in a file that refuses lower tokens loses no update (L1, L3, L5, E1). Nothing is left of who stopped waiting (L2, E4, L7).

mod chapters;
mod counts;
mod faults;
mod holders;
mod readers;
mod soak;
mod writers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{Depth, Error, List, Options, Registry, Result, SessionTtl};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

use crate::cluster::eventually;
use crate::history::{self, Answer, Violation};
use crate::{Dice, Members, Wire, key, prefix, within};
use chapters::{Chapter, Chapters};

pub use counts::Counts;
pub use soak::Usage;

/// How long a store may take to come back when everything is mended.
const PATIENCE: Duration = Duration::from_secs(40);
/// The TTL of the sessions that nothing happens to: a machine that is busy with all the others keeps them, and the shortest
/// run sees their end if it does not.
const UNTOUCHED: Duration = Duration::from_secs(4);
/// How many keys a chapter of the history is about.
const KEYS: usize = 4;

/// What a run does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Repeats the run, as far as chance is the run's.
    pub seed: u64,
    /// How long things break.
    pub lasts: Duration,
    /// What breaks.
    pub breaks: Breaks,
}

/// What breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaks {
    /// Connections of some clients.
    Wires,
    /// The members of the store too.
    Everything,
}

impl Plan {
    /// Connections break. The environment may say for how many seconds (`REGISTRY_TORTURE`, 5 if it does not) and from
    /// what seed (`REGISTRY_SEED`).
    pub fn of_wires() -> Self {
        let seconds = std::env::var("REGISTRY_TORTURE")
            .ok()
            .and_then(|text| text.parse().ok());
        Self {
            seed: Dice::seed_of_run(),
            lasts: Duration::from_secs(seconds.unwrap_or(5)),
            breaks: Breaks::Wires,
        }
    }

    /// Everything breaks; else as [`Plan::of_wires`].
    pub fn of_everything() -> Self {
        Self {
            breaks: Breaks::Everything,
            ..Self::of_wires()
        }
    }
}

/// Who has a handle in a run.
struct Party {
    registry: Arc<dyn Registry>,
    /// The wire that its connections pass, if it is one that breaks.
    wire: Option<Arc<Wire>>,
}

/// What all parts of a run share.
#[derive(Clone)]
struct Run {
    counts: Arc<Counts>,
    chapters: Arc<Chapters>,
    stop: watch::Receiver<bool>,
}

impl Run {
    fn is_over(&self) -> bool {
        *self.stop.borrow()
    }

    /// Waits, but not beyond the end.
    async fn sleep(&self, time: Duration) {
        let mut stop = self.stop.clone();
        // An error says that the run is gone.
        let _ = tokio::time::timeout(time, stop.wait_for(|stop| *stop)).await;
    }
}

/// Runs the plan and checks every promise; answers what there was.
///
/// # Panics
/// With the seed, if a promise was broken.
pub async fn run(cluster: &impl Members, plan: Plan) -> Arc<Counts> {
    println!("{plan:?}: REGISTRY_SEED={} repeats it", plan.seed);
    let mut dice = Dice(plan.seed);
    let (over, stop) = watch::channel(false);
    let run = Run {
        counts: Arc::default(),
        chapters: Arc::default(),
        stop,
    };
    let options = Options {
        request_timeout: Duration::from_secs(1),
        connect_timeout: Duration::from_secs(10),
        ..cluster.options()
    };
    let untouched = match plan.breaks {
        Breaks::Wires => Options {
            session_ttl: SessionTtl::new(UNTOUCHED).expect("it is in the range"),
            ..options.clone()
        },
        Breaks::Everything => options.clone(),
    };
    let mut parties = Vec::new();
    for number in 0..6 {
        parties.push(match number % 2 == 0 {
            true => wired(cluster, &options).await,
            false => straight(cluster, &untouched).await,
        });
    }

    let mut readers = JoinSet::new();
    for party in &parties[..2] {
        let reader = readers::Reader::start(party.registry.clone(), run.clone()).await;
        readers.spawn(reader.read());
    }
    let lock = Arc::new(holders::Arena::default());
    let election = Arc::new(holders::Arena::default());
    let counter = Arc::new(holders::Counter::default());
    let mut work = JoinSet::new();
    for (number, party) in parties.iter().enumerate() {
        work.spawn(writers::write(
            party.registry.clone(),
            run.clone(),
            number,
            dice.split(),
        ));
    }
    for party in &parties[1..5] {
        let contender = holders::contend(
            party.registry.clone(),
            run.clone(),
            lock.clone(),
            counter.clone(),
            dice.split(),
        );
        work.spawn(contender);
        let candidate = holders::campaign(party.registry.clone(), run.clone(), election.clone(), dice.split());
        work.spawn(candidate);
    }
    let observed = parties[1].registry.election(&key(holders::NAME));
    let course = begun(|| observed.observe()).await;
    work.spawn(holders::observe(course, run.clone()));
    work.spawn(writers::ballast(parties[3].registry.clone(), run.clone()));

    let sessions: Vec<_> = parties
        .iter()
        .map(|party| party.registry.session().state().id())
        .collect();
    let wires: Vec<_> = parties.iter().filter_map(|party| party.wire.clone()).collect();
    let until = Instant::now() + plan.lasts;
    let break_wires = faults::break_wires(&wires, &options, until, dice.split(), &run);
    let break_members = async {
        if plan.breaks == Breaks::Everything {
            let breaking = faults::break_members(cluster, &options, until, dice.split(), &run);
            let guests = faults::have_guests(cluster, &options, until, dice.split(), &run);
            tokio::join!(breaking, guests);
        }
    };
    let soak = soak::Soak::watch(cluster, until, &run);
    let ((), (), soak) = tokio::join!(break_wires, break_members, soak);

    // Everything is mended: whoever has a handle has a store again, with nothing done for it (F5).
    for party in &parties {
        let connected = party.registry.wait_connected(PATIENCE).await;
        connected.unwrap_or_else(|error| panic!("seed {}: not connected again: {error}", plan.seed));
    }
    over.send_replace(true);
    join(&mut work, &plan).await;
    if plan.breaks == Breaks::Wires {
        // Whose connection nobody touched has kept its session (S2, S7).
        for (party, session) in parties.iter().zip(sessions).filter(|(party, _)| party.wire.is_none()) {
            assert_eq!(
                party.registry.session().state().id(),
                session,
                "seed {}: a session was lost",
                plan.seed
            );
        }
    }
    let patient = Options {
        request_timeout: PATIENCE,
        ..options.clone()
    };
    let last = cluster.connect_with(patient).await.expect("the store is back");
    settle(&last, &run, &counter).await;
    let (chapters, counts) = (run.chapters.all(), run.counts.clone());
    let judged = tokio::task::spawn_blocking(move || chapters.iter().try_for_each(|chapter| judge(chapter, &counts)));
    let judged = judged.await.expect("the judge does not panic");
    // Said first: of a write that was lost, the readers were told nothing either.
    judged.unwrap_or_else(|violation| panic!("seed {}, {}: {violation}", plan.seed, run.counts));
    let readers = join(&mut readers, &plan).await;
    last.put(&key(readers::END), readers::TWICE)
        .await
        .expect("the store is back");
    let mut looking: JoinSet<_> = readers.into_iter().map(readers::Reader::look_for_gaps).collect();
    join(&mut looking, &plan).await;
    println!("seed {}, {:?}: {}", plan.seed, plan.breaks, run.counts);
    soak.check();
    for party in &parties {
        party.registry.close().await.expect("the store is back");
    }
    last.close().await.expect("the store is back");
    run.counts
}

/// What a run begins with. One call of it is short, and the machine may be busy.
async fn begun<T, F: Future<Output = Result<T>>>(begin: impl Fn() -> F) -> T {
    let beginning = async {
        loop {
            match begin().await {
                Err(Error::Unavailable { .. }) => {}
                begun => return begun.expect("nothing is broken yet"),
            }
        }
    };
    within(PATIENCE, beginning).await
}

fn judge(chapter: &Chapter, counts: &Counts) -> Result<(), Violation> {
    let calls = chapter.history.calls();
    counts.take(&calls);
    counts.one("histories");
    history::check(&calls)
}

async fn wired(cluster: &impl Members, options: &Options) -> Party {
    let opened = cluster.connect_through(options.clone()).await;
    let (registry, wire) = opened.expect("nothing is broken yet");
    Party {
        registry,
        wire: Some(Arc::new(wire)),
    }
}

async fn straight(cluster: &impl Members, options: &Options) -> Party {
    let opened = cluster.connect_with(options.clone()).await;
    Party {
        registry: opened.expect("nothing is broken yet"),
        wire: None,
    }
}

/// Waits for all to end. A panic of one is one of the run.
async fn join<T: 'static>(tasks: &mut JoinSet<T>, plan: &Plan) -> Vec<T> {
    let joining = async {
        let mut all = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            match ended.map_err(JoinError::try_into_panic) {
                Ok(ended) => all.push(ended),
                Err(Ok(panic)) => {
                    println!("seed {}: a promise was broken", plan.seed);
                    std::panic::resume_unwind(panic);
                }
                Err(Err(error)) => panic!("seed {}: {error}", plan.seed),
            }
        }
        all
    };
    let joined = tokio::time::timeout(PATIENCE, joining).await;
    joined.unwrap_or_else(|_| panic!("seed {}: not all ended within {PATIENCE:?}", plan.seed))
}

/// What is left when all have ended: the last reads of the history, empty queues, no lost update, the mark that tells
/// readers where the end is.
async fn settle(last: &Arc<dyn Registry>, run: &Run, counter: &holders::Counter) {
    let chapters = run.chapters.all();
    for chapter in &chapters {
        let mut client = chapter.client(last, usize::MAX);
        for number in 0..KEYS {
            let read = client.get(number).await;
            assert!(matches!(read, Answer::Read(_)), "the store is back: {read:?}");
        }
        client.list(&chapter.dir().into()).await;
    }
    let (lock, election) = (last.lock(&key(holders::NAME)), last.election(&key(holders::NAME)));
    let (lock, election) = (&lock, &election);
    eventually(PATIENCE, || async move {
        let queues = (lock.contenders().await, election.candidates().await);
        matches!(queues, (Ok(contenders), Ok(candidates)) if contenders.is_empty() && candidates.is_empty())
    })
    .await;
    counter.check();
    let all = List {
        depth: Depth::Subtree,
        ..List::new(prefix(chapters::DIR))
    };
    let entries = last.list_all(all).await.expect("the store is back");
    assert!(entries.len() <= KEYS * chapters.len(), "what nobody put: {entries:?}");
    last.put(&key(readers::END), readers::ONCE)
        .await
        .expect("the store is back");
}
