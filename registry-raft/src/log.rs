//! The write-ahead log: one ordered stream of records (entries, votes, commits, truncations, purges) in segment files.
//!
//! A segment is written with zeros ahead of its use, so that appending to it changes data only and one `fdatasync` costs
//! no journal commit. One thread writes: it takes what has come, writes it at once, syncs once, then answers all. There is
//! no linger; what comes while the disk works is the next batch. The first error that the disk gives is the last thing
//! the log does: after a failed sync, what the page cache says about the data is worth nothing.

mod reader;
mod record;
mod recovery;
mod segment;
mod writer;

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use openraft::storage::IOFlushed;
use parking_lot::Mutex;
use registry_api::{Error, Result};
use tokio::sync::oneshot;

use crate::directory::storage;
use crate::types::{LogEntry, LogId, TypeConfig, Vote};

pub(crate) use reader::Place;

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
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// The size of a segment. The next one is always there, zeroed: so much space is kept in reserve for a full disk.
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
    /// The bytes of all entries, and of those in memory.
    bytes: u64,
    cached: usize,
    /// How many slots from the front are not in memory.
    evicted: usize,
}

/// One entry of the log.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: LogId,
    pub(crate) bytes: u32,
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

    pub(crate) fn last(&self) -> Option<LogId> {
        self.slots.back().map(|slot| slot.id).or(self.purged)
    }

    fn slot(&mut self, index: u64) -> Option<&mut Slot> {
        let at = index.checked_sub(self.first())?;
        self.slots.get_mut(usize::try_from(at).ok()?)
    }

    pub(crate) fn push(&mut self, entry: LogEntry, place: Option<Place>) -> io::Result<()> {
        // Where the first follows what is purged is the caller's to know: recovery learns it last.
        if let Some(last) = self.slots.back().filter(|last| last.id.index + 1 != entry.log_id.index) {
            return Err(invalid(format!(
                "entry {} follows {}",
                entry.log_id.index, last.id.index
            )));
        }
        let bytes = record::entry_bytes(&entry);
        self.bytes += u64::from(bytes);
        self.cached += bytes as usize;
        self.slots.push_back(Slot {
            id: entry.log_id,
            bytes,
            entry: Some(entry),
            place,
        });
        Ok(())
    }

    /// Drops everything after `last`.
    pub(crate) fn truncate_after(&mut self, last: Option<LogId>) {
        while self
            .slots
            .back()
            .is_some_and(|slot| last.is_none_or(|last| slot.id.index > last.index))
        {
            let slot = self.slots.pop_back().expect("it was looked at");
            self.forget(&slot);
        }
        self.evicted = self.evicted.min(self.slots.len());
    }

    /// Drops everything up to `upto`.
    pub(crate) fn purge(&mut self, upto: LogId) {
        while self.slots.front().is_some_and(|slot| slot.id.index <= upto.index) {
            let slot = self.slots.pop_front().expect("it was looked at");
            self.forget(&slot);
            self.evicted = self.evicted.saturating_sub(1);
        }
        self.purged = self.purged.max(Some(upto));
    }

    fn forget(&mut self, slot: &Slot) {
        self.bytes -= u64::from(slot.bytes);
        if slot.entry.is_some() {
            self.cached -= slot.bytes as usize;
        }
    }

    /// Notes where an entry is on disk, unless it was dropped meanwhile, and lets go of the oldest beyond the bound.
    fn written(&mut self, id: LogId, place: Place) {
        if let Some(slot) = self.slot(id.index).filter(|slot| slot.id == id) {
            slot.place = Some(place);
        }
    }

    pub(crate) fn evict(&mut self, cache_bytes: usize) {
        while self.cached > cache_bytes {
            let Some(slot) = self.slots.get_mut(self.evicted).filter(|slot| slot.place.is_some()) else {
                return;
            };
            if slot.entry.take().is_some() {
                self.cached -= slot.bytes as usize;
            }
            self.evicted += 1;
        }
    }
}

/// What the writer is asked to put on disk.
pub(crate) enum Job {
    Append(Vec<LogEntry>, IOFlushed<TypeConfig>),
    Vote(Vote, oneshot::Sender<io::Result<()>>),
    Truncate(Option<LogId>, oneshot::Sender<io::Result<()>>),
    Committed(LogId),
    Purge(LogId),
}

/// A member's log, on disk or, without files, in memory.
pub(crate) struct Log {
    pub(crate) state: Arc<Mutex<State>>,
    /// The writer, if there is a disk.
    writer: Mutex<Option<(Sender<Job>, JoinHandle<()>)>>,
    directory: Option<PathBuf>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Log {
    /// Opens the log in that directory and brings back what it holds.
    ///
    /// # Errors
    /// [`Error::Storage`] for what must not be gone on with: damage before good records, a segment that is missing,
    /// another's, or of another format. It names the file; nothing is deleted.
    pub(crate) fn open(directory: &Path, identity: Identity, options: Options, on_fatal: OnFatal) -> Result<Self> {
        let recovered = recovery::recover(directory, identity, options)?;
        let state = Arc::new(Mutex::new(recovered.state));
        let (jobs, queue) = channel();
        let writer = writer::Writer::new(
            directory,
            identity,
            options,
            recovered.segments,
            state.clone(),
            on_fatal,
        );
        let writer = writer.map_err(|error| storage(directory, format!("can't be written: {error}")))?;
        let thread = std::thread::Builder::new()
            .name("registry-log".into())
            .spawn(move || writer.run(&queue));
        let thread = thread.map_err(|error| storage(directory, format!("no thread to write it: {error}")))?;
        Ok(Self {
            state,
            writer: Mutex::new(Some((jobs, thread))),
            directory: Some(directory.into()),
        })
    }

    pub(crate) fn in_memory() -> Self {
        Self {
            state: Arc::default(),
            writer: Mutex::default(),
            directory: None,
        }
    }

    /// Hands a job to the writer. In memory there is none, and nothing to wait for: the job comes back.
    pub(crate) fn submit(&self, job: Job) -> io::Result<Option<Job>> {
        match (&*self.writer.lock(), &self.directory) {
            (Some((jobs, _)), _) => jobs.send(job).map(|()| None).map_err(|_| closed()),
            (None, Some(_)) => Err(closed()),
            (None, None) => Ok(Some(job)),
        }
    }

    /// The bytes of all entries that are not purged.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.lock().bytes
    }

    /// Reads an entry that is no longer in memory.
    pub(crate) fn read_back(&self, id: LogId, place: Place) -> io::Result<LogEntry> {
        let directory = self.directory.as_deref().ok_or_else(closed)?;
        reader::read(directory, id, place)
    }

    /// Writes and syncs what was handed in, and ends the writer.
    ///
    /// # Errors
    /// [`Error::Storage`] if the writer had failed.
    pub(crate) fn close(&self) -> Result<()> {
        let Some((jobs, thread)) = self.writer.lock().take() else {
            return Ok(());
        };
        drop(jobs);
        thread.join().map_err(|_| Error::Storage {
            place: self
                .directory
                .as_deref()
                .unwrap_or(Path::new("log"))
                .display()
                .to_string(),
            reason: "the thread that writes it has failed".into(),
        })
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
