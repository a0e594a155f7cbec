//! Reads single entries back from their segments.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::record::{self, Record};
use super::{invalid, segment};
use crate::types::{LogEntry, LogId};
use crate::wire;

/// Where an entry's record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) sequence: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

pub(super) fn read(directory: &Path, id: LogId, place: Place) -> io::Result<LogEntry> {
    let mut bytes = vec![0; place.length as usize];
    File::open(segment::path(directory, place.sequence))?.read_exact_at(&mut bytes, place.offset)?;
    match record::read(&bytes, place.sequence).map(|read| read.record) {
        Some(Record::Entry(entry)) => {
            let entry = wire::entry_from(entry)?;
            match entry.log_id == id {
                true => Ok(entry),
                false => Err(invalid(format!("entry {} is not where it was written", id.index))),
            }
        }
        _ => Err(invalid(format!("entry {} is damaged on disk", id.index))),
    }
}
