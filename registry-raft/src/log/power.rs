//! Tests of the log on a disk that loses power at every point there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, RaftLogReader};
use registry_api::Result;
use registry_tests::Dice;

use super::{Identity, Options};
use crate::disk::faulty::Faulty;
use crate::log_store::LogStore;
use crate::types::{LogEntry, LogId, Proposal, TypeConfig, Vote};

const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};
const OPTIONS: Options = Options {
    segment_bytes: 8 << 10,
    cache_bytes: 2 << 10,
};

fn open(disk: &Faulty, fatal: &Arc<AtomicUsize>) -> Result<LogStore> {
    let fatal = fatal.clone();
    let on_fatal = Arc::new(move |_: &_| {
        fatal.fetch_add(1, Ordering::SeqCst);
    });
    LogStore::on(Arc::new(disk.clone()), IDENTITY, OPTIONS, on_fatal)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// What a log should hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    entries: Vec<LogEntry>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
}

impl Model {
    fn last(&self) -> Option<LogId> {
        self.entries.last().map(|entry| entry.log_id).or(self.purged)
    }

    async fn of(log: &mut LogStore) -> Self {
        Self {
            entries: log.try_get_log_entries(..).await.unwrap(),
            vote: log.read_vote().await.unwrap(),
            committed: log.read_committed().await.unwrap(),
            purged: log.get_log_state().await.unwrap().last_purged_log_id,
        }
    }
}

/// The states that the log went through, and which of them was the newest to be acknowledged.
struct History {
    states: Vec<Model>,
    acknowledged: usize,
}

impl History {
    fn now(&self) -> &Model {
        self.states.last().expect("there is always one")
    }

    fn step(&mut self, change: impl FnOnce(&mut Model)) {
        let mut next = self.now().clone();
        change(&mut next);
        self.states.push(next);
    }

    /// Whether a log that lost power may be found like this.
    fn explains(&self, found: &Model) -> bool {
        let committed = self.states.iter().any(|state| state.committed == found.committed);
        let written = found.committed.map(|id| id.index) <= found.last().map(|last| last.index);
        let same =
            |state: &Model| (&state.entries, state.vote, state.purged) == (&found.entries, found.vote, found.purged);
        committed && written && self.states[self.acknowledged..].iter().any(same)
    }

    fn acknowledge(&mut self, state: usize) {
        self.acknowledged = self.acknowledged.max(state);
    }
}

type Flushed = tokio::sync::oneshot::Receiver<std::result::Result<(), std::io::Error>>;

/// One life of a log: random work until the disk goes, or for long enough.
async fn live(log: &mut LogStore, disk: &Faulty, history: &mut History, dice: &mut Dice, term: &mut u64) {
    let mut flushed: Vec<(usize, Flushed)> = Vec::new();
    for _ in 0..dice.roll(60) {
        if disk.is_off() {
            break;
        }
        let now = history.now().clone();
        match dice.roll(12) {
            0 => {
                *term += 1;
                let vote = Vote::new(*term, 1);
                history.step(|model| model.vote = Some(vote));
                if log.save_vote(&vote).await.is_ok() {
                    history.acknowledge(history.states.len() - 1);
                }
            }
            1 => {
                // Nobody takes back what is committed.
                let least = now.entries.partition_point(|entry| Some(entry.log_id) <= now.committed);
                let keep = least + dice.roll((now.entries.len() - least) as u64 + 1) as usize;
                let last = match keep {
                    0 => now.purged,
                    _ => Some(now.entries[keep - 1].log_id),
                };
                history.step(|model| model.entries.truncate(keep));
                *term += 1;
                if log.truncate_after(last).await.is_ok() {
                    history.acknowledge(history.states.len() - 1);
                }
            }
            2 if now.last().is_some() => {
                let last = now.last();
                history.step(|model| model.committed = last);
                // Not promised: it is written when something else is.
                drop(log.save_committed(last).await);
            }
            3 if now.last().is_some() => {
                let upto = match dice.roll(8) {
                    0 => LogId::new_term_index(*term, now.last().map_or(0, |last| last.index) + 10),
                    _ if now.entries.is_empty() => continue,
                    _ => now.entries[dice.roll(now.entries.len() as u64) as usize].log_id,
                };
                history.step(|model| {
                    model.entries.retain(|entry| entry.log_id.index > upto.index);
                    model.purged = model.purged.max(Some(upto));
                });
                drop(log.purge(upto).await);
            }
            _ => {
                let next = now.last().map_or(0, |last| last.index + 1);
                let entries: Vec<_> = (next..=next + dice.roll(6))
                    .map(|index| entry(*term, index, dice))
                    .collect();
                for entry in &entries {
                    history.step(|model| model.entries.push(entry.clone()));
                }
                let (done, receiver) = TypeConfig::oneshot();
                if log.append(entries, IOFlushed::signal(done)).await.is_err() {
                    break;
                }
                flushed.push((history.states.len() - 1, receiver));
            }
        }
        if dice.roll(3) == 0 {
            for (state, receiver) in flushed.drain(..) {
                if receiver.await.expect("every append is answered").is_ok() {
                    history.acknowledge(state);
                }
            }
        }
    }
    // The half of the time the end comes with appends under way.
    if dice.roll(2) == 0 {
        disk.cut_after(0);
    }
    for (state, receiver) in flushed {
        if receiver.await.expect("every append is answered").is_ok() {
            history.acknowledge(state);
        }
    }
}

fn entry(term: u64, index: u64, dice: &mut Dice) -> LogEntry {
    let payload = match dice.roll(20) {
        0 => return LogEntry::new(LogId::new_term_index(term, index), EntryPayload::Blank),
        1 => vec![dice.roll(256) as u8; 3000],
        2 => vec![dice.roll(256) as u8; 12_000],
        _ => (0..dice.roll(600)).map(|_| dice.roll(256) as u8).collect(),
    };
    LogEntry::new(
        LogId::new_term_index(term, index),
        EntryPayload::Normal(Proposal(payload.into())),
    )
}

/// How many ends lost something, and how many a file that was to be used again.
fn run(seed: u64) -> (usize, usize) {
    let mut dice = Dice(seed);
    let mut disk = Faulty::default();
    let mut history = History {
        states: vec![Model::default()],
        acknowledged: 0,
    };
    let (mut term, mut lost, mut used) = (1, 0, 0);
    let runtime = runtime();
    for _ in 0..6 {
        if dice.roll(8) > 0 {
            disk.cut_after(1 + dice.roll(120));
        }
        if dice.roll(4) == 0 {
            disk.refuse_direct();
        }
        let fatal = Arc::default();
        match open(&disk, &fatal) {
            Ok(mut log) => runtime.block_on(async {
                let found = Model::of(&mut log).await;
                assert!(
                    history.explains(&found),
                    "seed {seed}: {found:?} is none of the {} states since what was acknowledged, {:?}",
                    history.states.len() - history.acknowledged,
                    history.states[history.acknowledged]
                );
                lost += usize::from(*history.now() != found);
                history = History {
                    states: vec![found],
                    acknowledged: 0,
                };
                live(&mut log, &disk, &mut history, &mut dice, &mut term).await;
            }),
            Err(error) => assert!(disk.is_off(), "seed {seed}: {error}"),
        }
        let next = disk.files().remove("wal-next");
        used += usize::from(next.is_some_and(|bytes| bytes.iter().any(|&byte| byte != 0)));
        disk = match dice.roll(3) {
            0 => disk.killed(),
            _ => disk.without_power(&mut dice),
        };
    }
    (lost, used)
}

#[test]
fn acknowledged_survives_the_loss_of_power_at_any_point() {
    let (first, runs) = match Dice::seed_asked_for() {
        Some(seed) => (seed, 1),
        None => (Dice::seed_of_run(), 1500),
    };
    let (mut lost, mut used) = (0, 0);
    for seed in 0..runs {
        // Far from each other, so that no run is another's, shifted.
        let (more_lost, more_used) = run(first + seed * 1_000_003);
        (lost, used) = (lost + more_lost, used + more_used);
    }
    println!(
        "{runs} runs of 6 lives from seed {first}; {lost} ends lost what was not acknowledged, {used} had a file to use again"
    );
    assert!(
        runs == 1 || (lost > 0 && used > 0),
        "no power loss ever took anything, or no file was used again: the test tests nothing"
    );
}
