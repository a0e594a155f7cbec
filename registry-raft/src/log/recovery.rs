//! Reads the log back after a stop of whatever kind.
//!
//! What was not acknowledged may be gone or torn, at the end of the newest segment only: it is cut off, with a line in the
//! program's log. Anything else that can't be read is damage to what was acknowledged, and refused.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use registry_api::{Error, Result};

use super::record::{self, Record};
use super::segment::{self, HEADER, Segment};
use super::{Identity, Options, Place, State, invalid, reserve};
use crate::directory::storage;
use crate::disk::{Disk, DiskFile};
use crate::wire;

/// The log as it was.
pub(super) struct Recovered {
    pub(super) state: State,
    pub(super) segments: Segments,
}

/// The segments there are.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// Each with the largest index of an entry in it.
    pub(super) largest: BTreeMap<u64, Option<u64>>,
    /// Where the newest goes on, and its size; nothing for a new log.
    pub(super) end: Option<(u64, u64)>,
}

/// Whether there is a log at all: a file that holds records.
pub(crate) fn has_segments(disk: &dyn Disk) -> io::Result<bool> {
    Ok(disk.list()?.iter().any(|name| segment::sequence(name).is_some()))
}

pub(super) fn recover(disk: &dyn Disk, identity: Identity, options: Options) -> Result<Recovered> {
    let directory = disk.path("");
    let failed = |what: &'static str| {
        let directory = directory.clone();
        move |error: io::Error| storage(&directory, format!("{what}: {error}"))
    };
    let mut names = BTreeMap::new();
    for name in disk.list().map_err(failed("can't be read"))? {
        if reserve::is_left_over(&name) {
            disk.remove(&name)
                .map_err(failed("what a stop left half made can't be removed"))?;
        }
        if let Some(sequence) = segment::sequence(&name) {
            names.insert(sequence, name);
        }
    }
    // A rename that was seen but not synced before the last stop must not be undone by the next.
    disk.sync().map_err(failed("can't be synced"))?;
    let mut recovered = Recovered {
        state: State::default(),
        segments: Segments::default(),
    };
    let newest = names.keys().next_back().copied();
    let mut expected = names.keys().next().copied();
    for (sequence, name) in &names {
        if let Some(missing) = expected.filter(|expected| expected != sequence) {
            return Err(storage(
                &disk.path(&segment::name(missing)),
                format!("the segment is missing, though later ones are there; {MEND}"),
            ));
        }
        expected = sequence.checked_add(1);
        let path = disk.path(name);
        let unreadable = |error: io::Error| storage(&path, format!("can't be read: {error}"));
        let is_newest = newest == Some(*sequence);
        // No other is written.
        let file = match is_newest {
            true => disk.open_direct(name),
            false => disk.open(name),
        };
        let file = file.map_err(unreadable)?;
        let mut bytes = vec![0; usize::try_from(file.size().map_err(unreadable)?).unwrap_or(usize::MAX)];
        file.read_at(&mut bytes, 0).map_err(unreadable)?;
        let tail = recovered.read_segment(&path, &bytes, *sequence, identity, is_newest)?;
        if is_newest {
            settle(&*file, &mut bytes, &tail)
                .map_err(|error| storage(&path, format!("its end can't be made sure: {error}")))?;
            recovered.segments.end = Some((tail.end as u64, bytes.len() as u64));
        }
        let segment = Segment { file, salt: tail.salt };
        recovered.state.segments.insert(*sequence, segment);
        recovered.state.evict(options.cache_bytes);
    }
    recovered.check_whole(disk)?;
    Ok(recovered)
}

/// Where the records of a segment end, and how far they were surely on disk.
struct Tail {
    salt: u64,
    synced: usize,
    end: usize,
}

/// Writes once more what may be only in the page cache (after a failed sync it looks written and is not), so that what is
/// served is on disk; and zeros over what was torn, so that no record that was cut off follows one that is written later.
fn settle(file: &dyn DiskFile, bytes: &mut [u8], tail: &Tail) -> io::Result<()> {
    let end = tail.end.min(bytes.len());
    let size = bytes.len() as u64;
    let zeros = match record::marks(&bytes[end..], tail.salt).next() {
        Some(_) => size,
        None => segment::zeros_to(end as u64, size),
    };
    let zeros = usize::try_from(zeros).map_err(io::Error::other)?;
    bytes[end..zeros].fill(0);
    let from = tail.synced.clamp(HEADER.min(end), end);
    file.write_at(&bytes[from..zeros], from as u64)?;
    file.sync()
}

/// The number of a log's first segment.
pub(super) const FIRST: u64 = 1;

const MEND: &str = "nothing was changed: put the file back from a copy, or restore a backup into a new directory";

impl Recovered {
    fn read_segment(
        &mut self,
        path: &Path,
        bytes: &[u8],
        sequence: u64,
        identity: Identity,
        newest: bool,
    ) -> Result<Tail> {
        let mut largest = None;
        let mut offset = HEADER;
        let mut synced = HEADER;
        let salt = segment::salt(bytes, sequence, identity).map_err(|why| storage(path, format!("{why}; {MEND}")))?;
        while let Some(read) = record::read(&bytes[offset.min(bytes.len())..], salt, offset as u64) {
            let length = u32::try_from(read.length).unwrap_or(u32::MAX);
            let place = Place {
                sequence,
                offset: offset as u64,
                length,
            };
            // It is no torn tail: after a stop the checksum of what was not written whole is wrong.
            let unknown = || damaged(path, offset, "the record there is none that this version knows");
            let index = self
                .take(read.record.ok_or_else(unknown)?, place)
                .map_err(|error| damaged(path, offset, &error.to_string()))?;
            largest = largest.max(index);
            synced = read.synced as usize;
            offset += read.length;
        }
        let rest = &bytes[offset.min(bytes.len())..];
        if !newest && rest.iter().any(|&byte| byte != 0) {
            return Err(damaged(path, offset, "later segments follow it"));
        }
        if let Some(later) = proof_of_damage(rest, salt, offset) {
            return Err(damaged(path, offset, &format!("a good record follows at byte {later}")));
        }
        // Zeros follow whatever is written.
        if rest.iter().take(record::HEAD).any(|&byte| byte != 0) {
            tracing::warn!(
                file = %path.display(),
                offset,
                "the end of the log is torn, and is cut: it was never acknowledged"
            );
        }
        self.segments.largest.insert(sequence, largest);
        Ok(Tail {
            salt,
            synced,
            end: offset,
        })
    }

    /// Applies a record; answers the index of an entry.
    fn take(&mut self, record: Record, place: Place) -> io::Result<Option<u64>> {
        let state = &mut self.state;
        match record {
            Record::Entry(entry) => {
                let entry = wire::entry_from(entry)?;
                let index = entry.log_id.index;
                // The head of a segment repeats what is purged; entries of older segments may be gone already.
                if state.purged.is_none_or(|purged| index > purged.index) {
                    state.push(entry, Some(place))?;
                }
                return Ok(Some(index));
            }
            Record::Vote(vote) => state.vote = Some(wire::vote_from(vote)),
            Record::Committed(id) => state.committed = Some(wire::log_id_from(id)),
            Record::Truncate(truncate) => state.truncate_after(truncate.last.map(wire::log_id_from)),
            Record::Purged(id) => drop(state.purge(wire::log_id_from(id))),
        }
        Ok(None)
    }
}

impl Recovered {
    /// The entries begin where the purged ones end: segments were removed only for what is purged. They go on at least to
    /// what is noted as committed, which is never written before the entries are.
    fn check_whole(&self, disk: &dyn Disk) -> Result<()> {
        let directory = &disk.path("");
        let oldest = self.segments.largest.keys().next().copied();
        if let Some(oldest) = oldest.filter(|oldest| *oldest > FIRST && self.state.purged.is_none()) {
            return Err(storage(
                &disk.path(&segment::name(oldest - 1)),
                format!("the segment is missing, and those before it, though nothing was purged; {MEND}"),
            ));
        }
        let last = self.state.last().map(|last| last.index);
        if let Some(committed) = self.state.committed.filter(|committed| Some(committed.index) > last) {
            let missing = last.map_or(0, |last| last.saturating_add(1));
            return Err(storage(
                directory,
                format!("entries {missing} to {} are missing; {MEND}", committed.index),
            ));
        }
        let Some(first) = self.state.slots.front().map(|slot| slot.id.index) else {
            return Ok(());
        };
        let purged = self.state.purged.map(|purged| purged.index);
        match purged.map_or(Some(0), |purged| purged.checked_add(1)) {
            Some(expected) if expected == first => Ok(()),
            _ => Err(storage(
                directory,
                format!("entries before {first} are missing; {MEND}"),
            )),
        }
    }
}

/// A record in `rest` that says it was written after the bad place, at `bad`, had been synced.
fn proof_of_damage(rest: &[u8], salt: u64, bad: usize) -> Option<usize> {
    record::marks(rest, salt).map(|at| bad + at).find(|at| {
        record::read(&rest[at - bad..], salt, *at as u64)
            .is_some_and(|read| (bad + 1..=*at).contains(&(read.synced as usize)))
    })
}

fn damaged(path: &Path, offset: usize, why: &str) -> Error {
    storage(
        path,
        invalid(format!("it is damaged at byte {offset}, and {why}; {MEND}")).to_string(),
    )
}
