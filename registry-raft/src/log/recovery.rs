//! Reads the log back after a stop of whatever kind.
//!
//! What was not acknowledged may be gone or torn, at the end of the newest segment only: it is cut off, with a line in the
//! program's log. Anything else that can't be read is damage to what was acknowledged, and refused.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use registry_api::{Error, Result};

use super::record::{self, Record};
use super::segment::{self, HEADER, Head};
use super::{Identity, Options, Place, State, invalid};
use crate::directory::storage;
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

pub(super) fn recover(directory: &Path, identity: Identity, options: Options) -> Result<Recovered> {
    let read = |error: io::Error| storage(directory, format!("can't be read: {error}"));
    let mut paths = BTreeMap::new();
    for file in fs::read_dir(directory).map_err(read)? {
        let path = file.map_err(read)?.path();
        if let Some(sequence) = segment::sequence(&path) {
            paths.insert(sequence, path);
        }
    }
    let mut recovered = Recovered {
        state: State::default(),
        segments: Segments::default(),
    };
    let newest = paths.keys().next_back().copied();
    let mut expected = paths.keys().next().copied();
    for (sequence, path) in &paths {
        if expected != Some(*sequence) {
            let missing = segment::path(directory, expected.unwrap_or_default());
            return Err(storage(
                &missing,
                format!("the segment is missing, though later ones are there; {MEND}"),
            ));
        }
        expected = Some(sequence + 1);
        recovered.read_segment(path, *sequence, identity, Some(*sequence) == newest)?;
        recovered.state.evict(options.cache_bytes);
    }
    recovered.check_whole(directory)?;
    Ok(recovered)
}

const MEND: &str = "nothing was changed: put the file back from a copy, or restore a backup into a new directory";

impl Recovered {
    fn read_segment(&mut self, path: &Path, sequence: u64, identity: Identity, newest: bool) -> Result<()> {
        let bytes = fs::read(path).map_err(|error| storage(path, format!("can't be read: {error}")))?;
        let mut largest = None;
        let mut offset = HEADER;
        match segment::head(&bytes, sequence, identity) {
            Head::Own => {}
            // Renamed, and nothing written before the power went.
            Head::Blank if newest && bytes[HEADER..].iter().all(|&byte| byte == 0) => {}
            Head::Blank => return Err(storage(path, format!("its head is gone; {MEND}"))),
            Head::Refused(why) => return Err(storage(path, format!("{why}; {MEND}"))),
        }
        while let Some(read) = record::read(&bytes[offset.min(bytes.len())..], sequence) {
            let length = u32::try_from(read.length).unwrap_or(u32::MAX);
            let place = Place {
                sequence,
                offset: offset as u64,
                length,
            };
            let index = self
                .take(read.record, place)
                .map_err(|error| damaged(path, offset, &error.to_string()))?;
            largest = largest.max(index);
            offset += read.length;
        }
        let rest = &bytes[offset.min(bytes.len())..];
        if rest.iter().any(|&byte| byte != 0) {
            if !newest {
                return Err(damaged(path, offset, "later segments follow it"));
            }
            if let Some(later) = proof_of_damage(rest, sequence, offset) {
                return Err(damaged(path, offset, &format!("a good record follows at byte {later}")));
            }
            cut(path, offset, rest.len())
                .map_err(|error| storage(path, format!("its torn end can't be cut: {error}")))?;
            tracing::warn!(file = %path.display(), offset, "the end of the log was torn, and cut: it was never acknowledged");
        }
        self.segments.largest.insert(sequence, largest);
        self.segments.end = Some((offset as u64, bytes.len() as u64));
        Ok(())
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
            Record::Purged(id) => state.purge(wire::log_id_from(id)),
        }
        Ok(None)
    }
}

impl Recovered {
    /// The entries begin where the purged ones end: segments were removed only for what is purged.
    fn check_whole(&self, directory: &Path) -> Result<()> {
        let Some(first) = self.state.slots.front().map(|slot| slot.id.index) else {
            return Ok(());
        };
        let expected = self.state.purged.map_or(0, |purged| purged.index + 1);
        match first == expected {
            true => Ok(()),
            false => Err(storage(
                directory,
                format!("entries {expected} to {} are missing; {MEND}", first.saturating_sub(1)),
            )),
        }
    }
}

/// A record in `rest` that says it was written after the bad place, at `bad`, had been synced.
fn proof_of_damage(rest: &[u8], sequence: u64, bad: usize) -> Option<usize> {
    let mut at = 1;
    while at + record::HEAD < rest.len() {
        match record::read(&rest[at..], sequence) {
            Some(read) if read.synced as usize > bad => return Some(bad + at),
            Some(read) => at += read.length,
            None => at += 1,
        }
    }
    None
}

/// Writes zeros over a torn end.
fn cut(path: &Path, offset: usize, length: usize) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    file.write_all_at(&vec![0; length], offset as u64)?;
    file.sync_all()
}

fn damaged(path: &Path, offset: usize, why: &str) -> Error {
    storage(
        path,
        invalid(format!("it is damaged at byte {offset}, and {why}; {MEND}")).to_string(),
    )
}
