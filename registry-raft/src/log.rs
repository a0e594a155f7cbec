//! The write-ahead log: one ordered stream of records (entries, votes, commits, truncations, purges) in segment files.
//!
//! A segment's file is written before its use, with zeros or in an earlier use, so that appending to it changes data only
//! and one `fdatasync` costs no journal commit. It is written past the page cache, where that can be. One thread writes:
//! it takes what has come, writes it at once, syncs once, then answers all. It waits for no more, but for a moment where
//! entries came together of late; what comes while the disk works is the next batch. The first error that the disk gives is
//! the last thing the log does: after a failed sync, what the page cache says about the data is worth nothing.

mod company;
#[cfg(test)]
mod damage;
#[cfg(test)]
mod failing;
pub mod measure;
#[cfg(test)]
mod power;
mod reader;
mod record;
mod recovery;
mod reserve;
mod segment;
mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use openraft::storage::IOFlushed;
use parking_lot::Mutex;
use registry_api::Result;
use tokio::sync::oneshot;

use crate::directory::storage;
use crate::types::{LogEntry, LogId, TypeConfig, Vote};

use crate::disk::Disk;
use reserve::Reserve;
use writer::Writer;

pub(crate) use reader::{Place, read};
pub(crate) use recovery::has_segments;
pub(crate) use segment::Segment;

/// Whose log it is: in the head of every segment, so that no file of another member or cluster is taken for its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) cluster: [u8; 16],
    pub(crate) member: u64,
}

impl Identity {
    /// The first member of a new cluster.
    pub(crate) fn random() -> Self {
        Self {
            cluster: uuid::Uuid::new_v4().into_bytes(),
            member: 1,
        }
    }

    /// A member of a group that it is yet to find. Its id is drawn once for a disk, and so never given to another.
    pub(crate) fn of_no_group() -> Self {
        // 48 bits: programs that hold numbers as JavaScript does can still tell them apart.
        let drawn = uuid::Uuid::new_v4().as_u128() >> 80;
        Self {
            cluster: [0; 16],
            member: u64::try_from(drawn).unwrap_or_default().max(2),
        }
    }

    /// Whether it has found its group.
    pub(crate) fn has_group(&self) -> bool {
        self.cluster != [0; 16]
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// The size of a segment. The file of the next one is always there: so much space is kept in reserve for a full disk.
    pub(crate) segment_bytes: u64,
    /// How many bytes of entries are kept in memory; older ones are read back from the segments.
    pub(crate) cache_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes: 32 << 20,
            cache_bytes: 64 << 20,
        }
    }
}

/// What to do when the disk fails.
pub(crate) type OnFatal = Arc<dyn Fn(&io::Error) + Send + Sync>;

/// Ends the process: a member that can't trust its disk must not vote or answer.
pub(crate) fn abort() -> OnFatal {
    Arc::new(|error| {
        tracing::error!(%error, "the log can't be written, this process ends now to keep what it promised");
        std::process::abort();
    })
}

/// The log's state: what openraft may read at any time.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) slots: VecDeque<Slot>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    pub(crate) purged: Option<LogId>,
    /// How many slots from the front are not in memory.
    evicted: usize,
    /// The segments by their number, open: who reads an entry does so though it is purged meanwhile.
    segments: BTreeMap<u64, Segment>,
    last_sync: Duration,
}

/// One entry of the log.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: LogId,
    pub(crate) bytes: u32,
    /// The bytes of all entries up to this one, counted from some earlier one on: a difference is what a range takes.
    end: u64,
    /// In memory, unless it is old and on disk.
    pub(crate) entry: Option<LogEntry>,
    /// Where it was written.
    pub(crate) place: Option<Place>,
}

impl State {
    /// The index of the first slot.
    pub(crate) fn first(&self) -> u64 {
        self.slots.front().map_or(0, |slot| slot.id.index)
    }

    /// The segment of a place.
    pub(crate) fn segment(&self, place: Place) -> Option<Segment> {
        self.segments.get(&place.sequence).cloned()
    }

    pub(crate) fn last(&self) -> Option<LogId> {
        self.slots.back().map(|slot| slot.id).or(self.purged)
    }

    fn slot(&mut self, index: u64) -> Option<&mut Slot> {
        let at = index.checked_sub(self.first())?;
        self.slots.get_mut(usize::try_from(at).ok()?)
    }

    pub(crate) fn push(&mut self, entry: LogEntry, place: Option<Place>) -> io::Result<()> {
        // Where the first follows what is purged is the caller's to know: recovery learns it last.
        let follows = |last: &&Slot| last.id.index.checked_add(1) == Some(entry.log_id.index);
        if let Some(last) = self.slots.back().filter(|last| !follows(last)) {
            return Err(invalid(format!(
                "entry {} follows {}",
                entry.log_id.index, last.id.index
            )));
        }
        let bytes = record::entry_bytes(&entry);
        let end = self.slots.back().map_or(0, |last| last.end) + u64::from(bytes);
        self.slots.push_back(Slot {
            id: entry.log_id,
            bytes,
            end,
            entry: Some(entry),
            place,
        });
        Ok(())
    }

    /// Drops everything after `last`.
    pub(crate) fn truncate_after(&mut self, last: Option<LogId>) {
        let keep = self
            .slots
            .partition_point(|slot| last.is_some_and(|last| slot.id.index <= last.index));
        self.slots.truncate(keep);
        self.evicted = self.evicted.min(keep);
    }

    /// Takes out everything up to `upto`. The caller lets go of it where that holds nobody up: it may be a million.
    pub(crate) fn purge(&mut self, upto: LogId) -> VecDeque<Slot> {
        let gone = self.slots.partition_point(|slot| slot.id.index <= upto.index);
        let left = self.slots.split_off(gone);
        self.evicted = self.evicted.saturating_sub(gone);
        self.purged = self.purged.max(Some(upto));
        std::mem::replace(&mut self.slots, left)
    }

    /// The bytes of the entries from that slot on.
    fn bytes_from(&self, slot: usize) -> u64 {
        match (self.slots.get(slot), self.slots.back()) {
            (Some(first), Some(last)) => last.end - first.end + u64::from(first.bytes),
            _ => 0,
        }
    }

    /// Notes where an entry is on disk, unless it was dropped meanwhile, and lets go of the oldest beyond the bound.
    fn written(&mut self, id: LogId, place: Place) {
        if let Some(slot) = self.slot(id.index).filter(|slot| slot.id == id) {
            slot.place = Some(place);
        }
    }

    pub(crate) fn evict(&mut self, cache_bytes: usize) {
        while self.bytes_from(self.evicted) > cache_bytes as u64 {
            let Some(slot) = self.slots.get_mut(self.evicted).filter(|slot| slot.place.is_some()) else {
                return;
            };
            slot.entry = None;
            self.evicted += 1;
        }
    }
}

/// What the writer is asked to put on disk.
pub(crate) enum Job {
    Append(Vec<LogEntry>, IOFlushed<TypeConfig>),
    Vote(Vote, oneshot::Sender<io::Result<()>>),
    Truncate(Option<LogId>, oneshot::Sender<io::Result<()>>),
    Purge(LogId),
}

/// What the log takes and how its disk does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stats {
    pub(crate) segments: usize,
    pub(crate) disk_bytes: u64,
    /// How long the newest write took, with its sync.
    pub(crate) last_sync: Duration,
    /// Whether the next segment is there already. When it is not for longer than a second, the disk is full or failing,
    /// and what is left in the present segment should be kept for votes.
    pub(crate) reserve: bool,
}

type Work = (Sender<Job>, JoinHandle<io::Result<()>>);

/// A member's log, on disk or, without files, in memory.
pub(crate) struct Log {
    pub(crate) state: Arc<Mutex<State>>,
    /// The writer, if there is a disk.
    writer: Mutex<Option<Work>>,
    disk: Option<(Arc<dyn Disk>, Arc<Reserve>)>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Log {
    /// Opens the log in that directory and brings back what it holds.
    ///
    /// # Errors
    /// [`registry_api::Error::Storage`] for what must not be gone on with: damage before good records, a segment that is missing,
    /// another's, or of another format. It names the file; nothing is deleted.
    pub(crate) fn open(disk: Arc<dyn Disk>, identity: Identity, options: Options, on_fatal: OnFatal) -> Result<Self> {
        let recovered = recovery::recover(&*disk, identity, options)?;
        let state = Arc::new(Mutex::new(recovered.state));
        let (jobs, queue) = channel();
        let failed = |error: io::Error| storage(&disk.path(""), format!("can't be written: {error}"));
        let reserve = Reserve::start(disk.clone(), identity, options.segment_bytes).map_err(failed)?;
        let started =
            Writer::new(options, recovered.segments, state.clone(), reserve.clone(), on_fatal).and_then(|writer| {
                std::thread::Builder::new()
                    .name("registry-log".into())
                    .spawn(move || writer.run(&queue))
            });
        let thread = started.map_err(|error| {
            reserve.stop();
            failed(error)
        })?;
        Ok(Self {
            state,
            writer: Mutex::new(Some((jobs, thread))),
            disk: Some((disk, reserve)),
        })
    }

    pub(crate) fn in_memory() -> Self {
        Self {
            state: Arc::default(),
            writer: Mutex::default(),
            disk: None,
        }
    }

    /// Hands a job to the writer. In memory there is none, and nothing to wait for: the job comes back.
    pub(crate) fn submit(&self, job: Job) -> io::Result<Option<Job>> {
        match (&*self.writer.lock(), &self.disk) {
            (Some((jobs, _)), _) => jobs.send(job).map(|()| None).map_err(|_| closed()),
            (None, Some(_)) => Err(closed()),
            (None, None) => Ok(Some(job)),
        }
    }

    /// The bytes of the entries after that one.
    pub(crate) fn bytes_after(&self, index: Option<u64>) -> u64 {
        let state = self.state.lock();
        let from = state.slots.partition_point(|slot| Some(slot.id.index) <= index);
        state.bytes_from(from)
    }

    /// Up to where the log may be purged when everything up to `covered` is in a snapshot, and the newest `keep` bytes of
    /// that are kept for members that lag behind.
    pub(crate) fn purge_point(&self, covered: u64, keep: u64) -> Option<u64> {
        let state = self.state.lock();
        let past = state.slots.partition_point(|slot| slot.id.index <= covered);
        let end = state.slots.get(past.checked_sub(1)?)?.end;
        let gone = state
            .slots
            .partition_point(|slot| slot.id.index <= covered && slot.end + keep <= end);
        Some(state.slots.get(gone.checked_sub(1)?)?.id.index)
    }

    /// Nothing for a log in memory.
    pub(crate) fn stats(&self) -> Option<Stats> {
        let (_, reserve) = self.disk.as_ref()?;
        let state = self.state.lock();
        let sizes = state.segments.values().map(|segment| segment.file.size());
        Some(Stats {
            segments: state.segments.len(),
            disk_bytes: sizes.flatten().sum(),
            last_sync: state.last_sync,
            reserve: reserve.is_ready(),
        })
    }

    /// Writes and syncs what was handed in, and ends the writer.
    ///
    /// # Errors
    /// [`registry_api::Error::Storage`] if the writer had failed.
    pub(crate) fn close(&self) -> Result<()> {
        let (Some((jobs, thread)), Some((disk, _))) = (self.writer.lock().take(), &self.disk) else {
            return Ok(());
        };
        if let Some(stats) = self.stats() {
            tracing::debug!(
                segments = stats.segments,
                disk_bytes = stats.disk_bytes,
                last_sync = ?stats.last_sync,
                reserve = stats.reserve,
                "closing the log"
            );
        }
        drop(jobs);
        let ended = match thread.join() {
            Ok(ended) => ended.map_err(|error| error.to_string()),
            Err(_) => Err("the thread that writes it has failed".into()),
        };
        ended.map_err(|reason| storage(&disk.path(""), reason))
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // It says so itself when it fails.
        let _ = self.close();
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the log is closed")
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
