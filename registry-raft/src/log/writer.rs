//! The thread that writes the log.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::company::{self, Company};
use super::record::{self, Record};
use super::recovery::{self, Segments};
use super::reserve::Reserve;
use super::segment::{self, HEADER, Segment};
use super::{Job, OnFatal, Options, Place, State};
use crate::proto::registry::log::v1::Truncate;
use crate::types::LogId;
use crate::wire;

/// What entries leave free at a segment's end: on a full disk a vote can still be cast, and a purge make room.
const MARGIN: u64 = 4 << 10;

/// How long it may stay unwritten what is committed. It goes with what is written next: nobody waits for it, and a restart
/// without it learns it from the others.
const LAZY: Duration = Duration::from_millis(100);

/// How long the writer looks for its next job before it sleeps, where the last one came as soon. To wake a thread that
/// sleeps takes a good part of what a sync does.
const SPIN: Duration = Duration::from_micros(150);

/// The most that is written before it is synced.
const MAX_BATCH: usize = 4 << 20;

pub(super) struct Writer {
    options: Options,
    state: Arc<Mutex<State>>,
    on_fatal: OnFatal,
    reserve: Arc<Reserve>,
    segments: Segments,
    segment: Segment,
    sequence: u64,
    /// Where the next record goes, how much is synced, and the size of the file.
    offset: u64,
    synced: u64,
    size: u64,
    /// Where the segment's own records begin, after what it repeats of older ones.
    start: u64,
    /// What is encoded and not written yet; it ends at `offset`.
    buffer: Vec<u8>,
    /// Entries whose place is to be noted once they are written.
    placed: Vec<(LogId, Place)>,
    heads: Heads,
    /// Whether this segment has what older ones hold alone, so that they may go.
    headed: bool,
    /// Whether older segments may go now.
    removing: bool,
    /// Whether the last wait was shorter than [`SPIN`].
    busy: bool,
    company: Company,
}

/// The newest of the records that older segments hold alone.
#[derive(Default)]
struct Heads {
    vote: Option<Record>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// The last entry.
    last: Option<u64>,
}

impl Heads {
    /// Up to where all is written, or in a snapshot.
    fn covers(&self) -> Option<u64> {
        self.last.max(self.purged.map(|purged| purged.index))
    }
}

impl Writer {
    pub(super) fn new(
        options: Options,
        segments: Segments,
        state: Arc<Mutex<State>>,
        reserve: Arc<Reserve>,
        on_fatal: OnFatal,
    ) -> io::Result<Self> {
        let heads = {
            let state = state.lock();
            Heads {
                vote: state.vote.as_ref().map(|vote| Record::Vote(wire::vote_to(vote))),
                committed: state.committed,
                purged: state.purged,
                last: state.last().map(|last| last.index),
            }
        };
        let newest = (state.lock().segments.last_key_value()).map(|(sequence, segment)| (*sequence, segment.clone()));
        let ((sequence, segment), (offset, size)) = match (newest, segments.end) {
            (Some(newest), Some(end)) => (newest, end),
            _ => (
                (recovery::FIRST, reserve.take(recovery::FIRST)?),
                (HEADER as u64, options.segment_bytes),
            ),
        };
        state.lock().segments.insert(sequence, segment.clone());
        let mut writer = Self {
            options,
            state,
            on_fatal,
            reserve,
            segments,
            segment,
            sequence,
            offset,
            synced: offset,
            size,
            start: HEADER as u64,
            buffer: Vec::new(),
            placed: Vec::new(),
            heads,
            // Not known: its first records may have been torn off. Written before an older one goes, not now: the disk
            // may be full.
            headed: false,
            removing: false,
            busy: false,
            company: Company::default(),
        };
        writer.segments.largest.entry(sequence).or_default();
        Ok(writer)
    }

    /// Writes what comes until nobody can ask any more.
    ///
    /// # Errors
    /// The disk's first.
    pub(super) fn run(mut self, queue: &Receiver<Job>) -> io::Result<()> {
        let ended = self.work(queue);
        self.reserve.stop();
        ended
    }

    fn work(&mut self, queue: &Receiver<Job>) -> io::Result<()> {
        loop {
            let mut batch = match queue.try_recv() {
                Ok(job) => vec![job],
                // There is work of its own.
                Err(_) if self.removing => Vec::new(),
                Err(_) => match self.wait(queue) {
                    Ok(job) => vec![job],
                    Err(RecvTimeoutError::Timeout) => Vec::new(),
                    Err(RecvTimeoutError::Disconnected) => return self.carry_out(&[]),
                },
            };
            self.gather(&mut batch, queue);
            let done = self.carry_out(&batch);
            let (batch, done) = match done {
                Ok(()) => {
                    self.removing |= batch.iter().any(|job| matches!(job, Job::Purge(_)));
                    batch.into_iter().for_each(succeed);
                    // Nobody waits for it, and who comes next waits for one removal at most.
                    (Vec::new(), self.remove_oldest())
                }
                Err(error) => (batch, Err(error)),
            };
            if let Err(error) = done {
                (self.on_fatal)(&error);
                fail(batch, &error);
                // Nothing is written, and nothing acknowledged, after the first failure.
                while let Ok(job) = queue.recv() {
                    fail(vec![job], &error);
                }
                return Err(error);
            }
        }
    }

    /// Adds what else there is to be written, and what comes soon if that is likely.
    fn gather(&mut self, batch: &mut Vec<Job>, queue: &Receiver<Job>) {
        // Whoever votes does not wait, nor the writer's own work.
        let patient = |job: &Job| matches!(job, Job::Append(..));
        let mut may_wait = batch.first().is_some_and(patient);
        let (mut entries, mut bytes) = sizes(batch);
        // There when it began to wait, and until when it does.
        let mut waits = None::<(usize, Instant)>;
        while bytes < MAX_BATCH {
            if let Ok(job) = queue.try_recv() {
                let (more, larger) = sizes(std::slice::from_ref(&job));
                (entries, bytes) = (entries + more, bytes + larger);
                may_wait &= patient(&job);
                batch.push(job);
                continue;
            }
            if !may_wait || entries >= self.company.expected() {
                break;
            }
            let most = || self.state.lock().last_sync.min(company::MOMENT);
            let (_, until) = *waits.get_or_insert_with(|| (entries, Instant::now() + most()));
            if Instant::now() >= until {
                break;
            }
            std::thread::yield_now();
        }
        if entries > 0 {
            self.company.note(waits.map(|(first, _)| first), entries);
        }
    }

    fn wait(&mut self, queue: &Receiver<Job>) -> Result<Job, RecvTimeoutError> {
        let start = Instant::now();
        while self.busy && start.elapsed() < SPIN {
            if let Ok(job) = queue.try_recv() {
                return Ok(job);
            }
            std::thread::yield_now();
        }
        let job = self.sleep(queue);
        self.busy = start.elapsed() < SPIN;
        job
    }

    fn sleep(&self, queue: &Receiver<Job>) -> Result<Job, RecvTimeoutError> {
        // What is written is committed soon after.
        match self.heads.committed.map(|id| id.index) < self.heads.covers() {
            true => queue.recv_timeout(LAZY),
            false => queue.recv().map_err(RecvTimeoutError::from),
        }
    }

    /// What is committed and not written yet, if all that it covers is written.
    fn newly_committed(&self) -> Option<LogId> {
        let committed = self.state.lock().committed;
        committed.filter(|id| committed > self.heads.committed && Some(id.index) <= self.heads.covers())
    }

    fn carry_out(&mut self, batch: &[Job]) -> io::Result<()> {
        let mut wait = false;
        for job in batch {
            match job {
                Job::Append(entries, _) => {
                    for entry in entries {
                        let at = self.put(&Record::Entry(wire::entry_to(entry)))?;
                        self.placed.push((entry.log_id, at));
                        let largest = self.segments.largest.entry(self.sequence).or_default();
                        *largest = (*largest).max(Some(entry.log_id.index));
                        self.heads.last = Some(entry.log_id.index);
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
                    self.heads.last = last.map(|last| last.index);
                    wait = true;
                }
                Job::Purge(id) => {
                    self.heads.purged = self.heads.purged.max(Some(*id));
                    self.put(&Record::Purged(wire::log_id_to(id)))?;
                }
            }
        }
        if let Some(committed) = self.newly_committed() {
            self.put(&Record::Committed(wire::log_id_to(&committed)))?;
            self.heads.committed = Some(committed);
        }
        match wait {
            true => self.sync()?,
            false => self.write()?,
        }
        let mut state = self.state.lock();
        for (id, place) in self.placed.drain(..) {
            state.written(id, place);
        }
        state.evict(self.options.cache_bytes);
        Ok(())
    }

    /// Adds a record to what is to be written, in a new segment if this one is full. One that no segment has room for
    /// makes its own longer.
    fn put(&mut self, record: &Record) -> io::Result<Place> {
        let synced = u32::try_from(self.synced).map_err(io::Error::other)?;
        let start = self.buffer.len();
        let length = record::write(&mut self.buffer, self.segment.salt, self.offset, synced, record)? as u64;
        let margin = match record {
            Record::Entry(_) => MARGIN.min(self.size / 8),
            _ => 0,
        };
        if self.offset + length + margin > self.size && self.offset > self.start {
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
            let at = self.offset - self.buffer.len() as u64;
            self.fill_to(segment::zeros_to(self.offset, self.size))?;
            self.segment.file.write_at(&self.buffer, at)?;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Adds zeros, up to that place in the file.
    fn fill_to(&mut self, end: u64) -> io::Result<()> {
        let zeros = usize::try_from(end.saturating_sub(self.offset)).map_err(io::Error::other)?;
        self.buffer.resize(self.buffer.len() + zeros, 0);
        Ok(())
    }

    /// Makes durable what is to be written, and what was.
    fn sync(&mut self) -> io::Result<()> {
        let start = Instant::now();
        self.write()?;
        self.segment.file.sync()?;
        self.synced = self.offset;
        self.state.lock().last_sync = start.elapsed();
        Ok(())
    }

    fn next_segment(&mut self) -> io::Result<()> {
        // To its end, or what an earlier use left there would look like damage.
        self.fill_to(self.size)?;
        self.offset = self.offset.max(self.size);
        self.sync()?;
        self.sequence += 1;
        self.segment = self.reserve.take(self.sequence)?;
        self.state.lock().segments.insert(self.sequence, self.segment.clone());
        self.segments.largest.insert(self.sequence, None);
        (self.offset, self.synced, self.size) = (HEADER as u64, HEADER as u64, self.options.segment_bytes);
        self.put_heads()?;
        self.start = self.offset;
        Ok(())
    }

    /// Repeats what older segments hold alone.
    fn put_heads(&mut self) -> io::Result<()> {
        // Never in yet another segment.
        self.start = u64::MAX;
        let committed = self
            .heads
            .committed
            .as_ref()
            .map(wire::log_id_to)
            .map(Record::Committed);
        let purged = self.heads.purged.as_ref().map(wire::log_id_to).map(Record::Purged);
        for head in [self.heads.vote.clone(), committed, purged].into_iter().flatten() {
            self.put(&head)?;
        }
        self.headed = true;
        Ok(())
    }

    /// Removes the oldest segment if it holds nothing but what is purged, durably before the next goes: with a hole in
    /// their numbers the log is refused.
    fn remove_oldest(&mut self) -> io::Result<()> {
        let purged = self.heads.purged.map(|purged| purged.index).filter(|_| self.removing);
        let oldest = self
            .segments
            .largest
            .first_key_value()
            .map(|(sequence, largest)| (*sequence, *largest));
        let gone = oldest.zip(purged).filter(|((sequence, largest), purged)| {
            *sequence != self.sequence && largest.is_none_or(|largest| largest <= *purged)
        });
        let Some(((sequence, _), _)) = gone else {
            self.removing = false;
            return Ok(());
        };
        if !self.headed {
            self.put_heads()?;
            self.start = HEADER as u64;
        }
        self.sync()?;
        self.segments.largest.remove(&sequence);
        let segment = self.state.lock().segments.remove(&sequence);
        segment.map_or(Ok(()), |segment| self.reserve.retire(sequence, segment))
    }
}

/// How many entries there are to be appended, and their bytes.
fn sizes(jobs: &[Job]) -> (usize, usize) {
    let appended = jobs.iter().filter_map(|job| match job {
        Job::Append(entries, _) => Some(entries),
        _ => None,
    });
    appended.flatten().fold((0, 0), |(entries, bytes), entry| {
        (entries + 1, bytes + record::entry_bytes(entry) as usize)
    })
}

pub(super) fn succeed(job: Job) {
    match job {
        Job::Append(_, flushed) => flushed.io_completed(Ok(())),
        // Whoever asked may be gone.
        Job::Vote(_, done) | Job::Truncate(_, done) => drop(done.send(Ok(()))),
        Job::Purge(_) => {}
    }
}

fn fail(batch: Vec<Job>, error: &io::Error) {
    let again = || io::Error::new(error.kind(), error.to_string());
    for job in batch {
        match job {
            Job::Append(_, flushed) => flushed.io_completed(Err(again())),
            // Whoever asked may be gone.
            Job::Vote(_, done) | Job::Truncate(_, done) => drop(done.send(Err(again()))),
            Job::Purge(_) => {}
        }
    }
}
