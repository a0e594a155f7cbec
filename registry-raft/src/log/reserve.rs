//! Keeps one file ahead of its use, so that a segment costs the writer a rename, and a full disk leaves the room of one.
//!
//! A file whose records nobody needs any more is used again, as PostgreSQL and RocksDB do with theirs: to fill a new one
//! with zeros is to write everything twice.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::segment::{self, Segment};
use super::{Identity, record};
use crate::disk::Disk;

/// The reserve's name while it waits, and while it is made.
const NAME: &str = "wal-next";
const MAKING: &str = "wal-next.tmp";
/// How files begin that wait to be used again, and how many there are at the most: about as many as a purge sets free.
const SPARE: &str = "wal-spare-";
const SPARES: usize = 2;
/// What is written and synced at a time: more would delay the log's own syncs.
const ZEROS: &[u8] = &[0; 1 << 20];
/// How long after a failure, a full disk most likely, it is tried again.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Reserve {
    disk: Arc<dyn Disk>,
    identity: Identity,
    bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
enum State {
    /// Taken, and the next is not asked for yet.
    Taken,
    Wanted,
    Ready,
    Failed(io::Error),
    Stopped,
}

impl Reserve {
    /// Begins to make the first, or finds the one that was left.
    pub(super) fn start(disk: Arc<dyn Disk>, identity: Identity, bytes: u64) -> io::Result<Arc<Self>> {
        let reserve = Arc::new(Self {
            disk,
            identity,
            bytes,
            state: Mutex::new(State::Wanted),
            changed: Condvar::new(),
            thread: Mutex::new(None),
        });
        let maker = reserve.clone();
        let thread = std::thread::Builder::new().name("registry-log-ahead".into());
        *reserve.thread.lock() = Some(thread.spawn(move || maker.run())?);
        Ok(reserve)
    }

    /// Whether there is one.
    pub(super) fn is_ready(&self) -> bool {
        matches!(*self.state.lock(), State::Ready)
    }

    /// Makes the reserve the segment of that number, durably, and has the next one made. Waits for one that is being made;
    /// if that failed, tries once more.
    pub(super) fn take(&self, sequence: u64) -> io::Result<Segment> {
        let mut state = self.state.lock();
        self.try_again(&mut state);
        loop {
            match &*state {
                State::Ready => break,
                State::Failed(error) => return Err(io::Error::new(error.kind(), error.to_string())),
                State::Stopped => return Err(io::Error::other("the log is closed")),
                State::Wanted | State::Taken => self.changed.wait(&mut state),
            }
        }
        *state = State::Taken;
        let file = self.disk.open_direct(NAME)?;
        let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
        let salt = high ^ low;
        // With an end after it. Before it has its name: a segment without a head is damaged.
        let end = [0; record::HEAD];
        file.write_at(&[&segment::header(sequence, self.identity, salt)[..], &end].concat(), 0)?;
        file.sync()?;
        self.disk.rename(NAME, &segment::name(sequence))?;
        self.disk.sync()?;
        *state = State::Wanted;
        self.changed.notify_all();
        Ok(Segment { file, salt })
    }

    /// Takes a segment out of the log, durably: to be used again, if that may be, or removed.
    pub(super) fn retire(&self, sequence: u64, segment: Segment) -> io::Result<()> {
        // Who still reads it must not find it written anew.
        let unread = Arc::strong_count(&segment.file) == 1;
        let spares = self.disk.list()?.iter().filter(|name| name.starts_with(SPARE)).count();
        let name = segment::name(sequence);
        match unread && spares < SPARES && segment.file.size()? == self.bytes {
            true => self.disk.rename(&name, &format!("{SPARE}{sequence:016}"))?,
            false => self.disk.remove(&name)?,
        }
        self.disk.sync()?;
        // There is room now, if there was none.
        self.try_again(&mut self.state.lock());
        Ok(())
    }

    fn try_again(&self, state: &mut State) {
        if matches!(state, State::Failed(_)) {
            *state = State::Wanted;
            self.changed.notify_all();
        }
    }

    /// Ends the thread. What is half made is made anew by the next start.
    pub(super) fn stop(&self) {
        *self.state.lock() = State::Stopped;
        self.changed.notify_all();
        if let Some(Err(_)) = self.thread.lock().take().map(JoinHandle::join) {
            tracing::error!("the thread that makes the log's segments has failed");
        }
    }

    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            match &*state {
                State::Stopped => return,
                State::Taken | State::Ready => self.changed.wait(&mut state),
                State::Failed(_) => {
                    if self.changed.wait_for(&mut state, AGAIN).timed_out() && matches!(*state, State::Failed(_)) {
                        *state = State::Wanted;
                    }
                }
                State::Wanted => {
                    drop(state);
                    let made = self.make();
                    state = self.state.lock();
                    if matches!(*state, State::Stopped) {
                        return;
                    }
                    *state = match made {
                        Ok(()) => State::Ready,
                        Err(error) => {
                            tracing::warn!(%error, "the log's next segment can't be made ahead: is the disk full?");
                            State::Failed(error)
                        }
                    };
                    self.changed.notify_all();
                }
            }
        }
    }

    fn make(&self) -> io::Result<()> {
        let names = self.disk.list()?;
        let fits = |name: &str| Ok::<_, io::Error>(self.disk.open(name)?.size()? == self.bytes);
        // One of a run before is as good: it got this name when it was on disk.
        if names.iter().any(|name| name == NAME) && fits(NAME)? {
            return Ok(());
        }
        for spare in names.iter().filter(|name| name.starts_with(SPARE)) {
            if fits(spare)? {
                // With the segment that it becomes, it is durable.
                return self.disk.rename(spare, NAME);
            }
            self.disk.remove(spare)?;
        }
        let file = self.disk.create(MAKING)?;
        let mut at = 0;
        while at < self.bytes && !matches!(*self.state.lock(), State::Stopped) {
            let chunk = (self.bytes - at).min(ZEROS.len() as u64);
            file.write_at(&ZEROS[..usize::try_from(chunk).map_err(io::Error::other)?], at)?;
            file.sync()?;
            at += chunk;
        }
        if at < self.bytes {
            return Err(io::Error::other("the log is closed"));
        }
        self.disk.rename(MAKING, NAME)?;
        self.disk.sync()
    }
}

/// Whether a file is what a stop in the middle of making a reserve left behind.
pub(super) fn is_left_over(name: &str) -> bool {
    name == MAKING
}
