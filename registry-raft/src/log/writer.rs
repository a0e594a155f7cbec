//! The thread that writes the log.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::record::{self, Record};
use super::recovery::Segments;
use super::segment::{self, HEADER};
use super::{Identity, Job, OnFatal, Options, Place, State};
use crate::proto::registry::log::v1::Truncate;
use crate::types::LogId;
use crate::wire;

/// The most that is written before it is synced.
const MAX_BATCH: usize = 4 << 20;

pub(super) struct Writer {
    directory: PathBuf,
    identity: Identity,
    options: Options,
    state: Arc<Mutex<State>>,
    on_fatal: OnFatal,
    segments: Segments,
    file: File,
    sequence: u64,
    /// Where the next record goes, how much is written, how much is synced, and the size of the file.
    offset: u64,
    synced: u64,
    size: u64,
    /// What is encoded and not written yet; it ends at `offset`.
    buffer: Vec<u8>,
    /// Entries whose place is to be noted once they are written.
    placed: Vec<(LogId, Place)>,
    /// What a new segment begins with.
    heads: Heads,
    preparing: Option<JoinHandle<io::Result<()>>>,
}

/// The newest of the records that older segments hold alone.
#[derive(Default)]
struct Heads {
    vote: Option<Record>,
    committed: Option<Record>,
    purged: Option<LogId>,
}

impl Writer {
    pub(super) fn new(
        directory: &Path,
        identity: Identity,
        options: Options,
        segments: Segments,
        state: Arc<Mutex<State>>,
        on_fatal: OnFatal,
    ) -> io::Result<Self> {
        let heads = {
            let state = state.lock();
            Heads {
                vote: state.vote.as_ref().map(|vote| Record::Vote(wire::vote_to(vote))),
                committed: state
                    .committed
                    .as_ref()
                    .map(|id| Record::Committed(wire::log_id_to(id))),
                purged: state.purged,
            }
        };
        let newest = segments.largest.keys().next_back().copied();
        let (file, sequence, (offset, size)) = match (newest, segments.end) {
            (Some(sequence), Some(end)) => {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .open(segment::path(directory, sequence))?;
                (file, sequence, end)
            }
            _ => {
                segment::prepare(directory, options.segment_bytes)?;
                let file = segment::take_spare(directory, 1, identity)?;
                (file, 1, (HEADER as u64, options.segment_bytes))
            }
        };
        // The head may have been lost with the power, when nothing followed it.
        if offset == HEADER as u64 {
            segment::write_head(&file, sequence, identity)?;
        }
        file.sync_all()?;
        let mut writer = Self {
            directory: directory.into(),
            identity,
            options,
            state,
            on_fatal,
            segments,
            file,
            sequence,
            offset,
            synced: offset,
            size,
            buffer: Vec::new(),
            placed: Vec::new(),
            heads,
            preparing: None,
        };
        writer.segments.largest.entry(sequence).or_default();
        writer.prepare_next();
        Ok(writer)
    }

    /// Writes what comes until nobody can ask any more.
    pub(super) fn run(mut self, queue: &Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            let mut batch = vec![job];
            let mut bytes = 0;
            while bytes < MAX_BATCH {
                let Ok(job) = queue.try_recv() else { break };
                if let Job::Append(entries, _) = &job {
                    bytes += entries
                        .iter()
                        .map(|entry| record::entry_bytes(entry) as usize)
                        .sum::<usize>();
                }
                batch.push(job);
            }
            if let Err(error) = self.carry_out(&batch) {
                (self.on_fatal)(&error);
                fail(batch, &error);
                // Nothing is written, and nothing acknowledged, after the first failure.
                while let Ok(job) = queue.recv() {
                    fail(vec![job], &error);
                }
                return;
            }
            batch.into_iter().for_each(succeed);
        }
        if let Some(preparing) = self.preparing.take() {
            // The spare is made anew at the next start if need be.
            let _ = preparing.join();
        }
    }

    fn carry_out(&mut self, batch: &[Job]) -> io::Result<()> {
        let mut wait = false;
        let mut purge = None;
        for job in batch {
            match job {
                Job::Append(entries, _) => {
                    for entry in entries {
                        let at = self.put(&Record::Entry(wire::entry_to(entry)))?;
                        self.placed.push((entry.log_id, at));
                        let largest = self.segments.largest.entry(self.sequence).or_default();
                        *largest = (*largest).max(Some(entry.log_id.index));
                    }
                    wait = true;
                }
                Job::Vote(vote, _) => {
                    let record = Record::Vote(wire::vote_to(vote));
                    self.put(&record)?;
                    self.heads.vote = Some(record);
                    wait = true;
                }
                Job::Truncate(last, _) => {
                    self.put(&Record::Truncate(Truncate {
                        last: last.as_ref().map(wire::log_id_to),
                    }))?;
                    wait = true;
                }
                Job::Committed(id) => {
                    let record = Record::Committed(wire::log_id_to(id));
                    self.put(&record)?;
                    self.heads.committed = Some(record);
                }
                Job::Purge(id) => {
                    self.heads.purged = self.heads.purged.max(Some(*id));
                    self.put(&Record::Purged(wire::log_id_to(id)))?;
                    purge = Some(*id);
                }
            }
        }
        self.write()?;
        if wait || purge.is_some() {
            self.sync()?;
        }
        if let Some(purged) = purge {
            self.remove_purged(purged)?;
        }
        let mut state = self.state.lock();
        for (id, place) in self.placed.drain(..) {
            state.written(id, place);
        }
        state.evict(self.options.cache_bytes);
        Ok(())
    }

    /// Adds a record to what is to be written, in a new segment if this one is full.
    fn put(&mut self, record: &Record) -> io::Result<Place> {
        let synced = u32::try_from(self.synced).map_err(io::Error::other)?;
        let start = self.buffer.len();
        let length = record::write(&mut self.buffer, self.sequence, synced, record) as u64;
        if self.offset + length > self.size && self.offset > HEADER as u64 {
            self.buffer.truncate(start);
            self.next_segment()?;
            return self.put(record);
        }
        let place = Place {
            sequence: self.sequence,
            offset: self.offset,
            length: u32::try_from(length).map_err(io::Error::other)?,
        };
        self.offset += length;
        Ok(place)
    }

    fn write(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.file
                .write_all_at(&self.buffer, self.offset - self.buffer.len() as u64)?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.synced = self.offset;
        Ok(())
    }

    fn next_segment(&mut self) -> io::Result<()> {
        self.write()?;
        self.sync()?;
        match self.preparing.take().map(JoinHandle::join) {
            Some(Ok(Ok(()))) => {}
            // It failed beforehand, perhaps for want of space: now it is needed.
            _ => segment::prepare(&self.directory, self.options.segment_bytes)?,
        }
        self.sequence += 1;
        self.file = segment::take_spare(&self.directory, self.sequence, self.identity)?;
        (self.offset, self.synced, self.size) = (HEADER as u64, HEADER as u64, self.options.segment_bytes);
        self.segments.largest.insert(self.sequence, None);
        let purged = self.heads.purged.as_ref().map(|id| Record::Purged(wire::log_id_to(id)));
        for head in [self.heads.vote.clone(), self.heads.committed.clone(), purged]
            .into_iter()
            .flatten()
        {
            self.put(&head)?;
        }
        self.prepare_next();
        Ok(())
    }

    /// Has the next segment zeroed, beside the work.
    fn prepare_next(&mut self) {
        let (directory, bytes) = (self.directory.clone(), self.options.segment_bytes);
        let prepare = move || {
            let prepared = segment::prepare(&directory, bytes);
            if let Err(error) = &prepared {
                tracing::warn!(%error, "the next segment of the log could not be made ahead: is the disk full?");
            }
            prepared
        };
        self.preparing = std::thread::Builder::new()
            .name("registry-log-ahead".into())
            .spawn(prepare)
            .ok();
    }

    /// Removes the oldest segments that hold nothing but what is purged.
    fn remove_purged(&mut self, purged: LogId) -> io::Result<()> {
        let mut removed = false;
        while let Some((&sequence, largest)) = self.segments.largest.first_key_value() {
            if sequence == self.sequence || largest.is_some_and(|largest| largest > purged.index) {
                break;
            }
            fs::remove_file(segment::path(&self.directory, sequence))?;
            self.segments.largest.remove(&sequence);
            removed = true;
        }
        if removed {
            segment::sync(&self.directory)
        } else {
            Ok(())
        }
    }
}

pub(super) fn succeed(job: Job) {
    match job {
        Job::Append(_, flushed) => flushed.io_completed(Ok(())),
        // Whoever asked may be gone.
        Job::Vote(_, done) | Job::Truncate(_, done) => drop(done.send(Ok(()))),
        Job::Committed(_) | Job::Purge(_) => {}
    }
}

fn fail(batch: Vec<Job>, error: &io::Error) {
    let again = || io::Error::new(error.kind(), error.to_string());
    for job in batch {
        match job {
            Job::Append(_, flushed) => flushed.io_completed(Err(again())),
            // Whoever asked may be gone.
            Job::Vote(_, done) | Job::Truncate(_, done) => drop(done.send(Err(again()))),
            Job::Committed(_) | Job::Purge(_) => {}
        }
    }
}
