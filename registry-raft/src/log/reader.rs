//! Reads single entries back from their segments.

use std::io;

use super::invalid;
use super::record::{self, Record};
use super::segment::Segment;
use crate::types::{LogEntry, LogId};
use crate::wire;

/// Where an entry's record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) sequence: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

pub(crate) fn read(segment: &Segment, id: LogId, place: Place) -> io::Result<LogEntry> {
    let mut bytes = vec![0; place.length as usize];
    segment.file.read_at(&mut bytes, place.offset)?;
    match record::read(&bytes, segment.salt, place.offset).and_then(|read| read.record) {
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
