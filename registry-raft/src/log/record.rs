//! One record: `length u32, crc u32, synced u32, message`.
//!
//! The CRC covers the segment's number, `synced` and the message, so a record of an older file in the same place is no
//! record. `synced` is how much of the segment was surely on disk when the record was written. It tells a torn tail from
//! damage: after a loss of power the unsynced end of a file may hold a later sector and lack an earlier one, but a record
//! that says it was written after the bad place was synced proves that what was lost there had been acknowledged.

use std::io;

use prost::Message;

use super::invalid;
use crate::proto::registry::log::v1 as message;
use crate::types::LogEntry;
use crate::wire;

pub(super) const HEAD: usize = 12;
/// No record is longer: the largest transaction, and room.
pub(super) const MAX_RECORD: usize = 16 << 20;

pub(super) use message::record::Record;

/// A record as it was read.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) record: Record,
    pub(super) synced: u32,
    /// The length in the file.
    pub(super) length: usize,
}

/// Appends a record to `out`; answers its length.
///
/// # Errors
/// It is longer than what recovery would take for a record.
pub(super) fn write(out: &mut Vec<u8>, sequence: u64, synced: u32, record: &Record) -> io::Result<usize> {
    let start = out.len();
    out.extend_from_slice(&[0; HEAD]);
    // The message `Record` is this one field.
    record.encode(out);
    let length = out.len() - start;
    if length - HEAD > MAX_RECORD {
        return Err(invalid(format!("a record of {length} bytes is too long for the log")));
    }
    let size = u32::try_from(length - HEAD).map_err(io::Error::other)?;
    out[start..start + 4].copy_from_slice(&size.to_le_bytes());
    out[start + 8..start + 12].copy_from_slice(&synced.to_le_bytes());
    let crc = crc(sequence, &out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    Ok(length)
}

/// The record at the start of `bytes`, if there is a good one.
pub(super) fn read(bytes: &[u8], sequence: u64) -> Option<Read> {
    let (size, expected, synced) = (field(bytes, 0)? as usize, field(bytes, 4)?, field(bytes, 8)?);
    if size == 0 || size > MAX_RECORD {
        return None;
    }
    let length = HEAD + size;
    let body = bytes.get(8..length)?;
    if crc(sequence, body) != expected {
        return None;
    }
    let record = message::Record::decode(bytes::Bytes::copy_from_slice(&body[4..]))
        .ok()?
        .record?;
    Some(Read { record, synced, length })
}

/// Puts the checksum right of what would be a record at the start of `bytes`, and answers its length.
#[cfg(test)]
pub(super) fn mend(bytes: &mut [u8], sequence: u64) -> Option<usize> {
    let size = field(bytes, 0)? as usize;
    let crc = crc(sequence, bytes.get(8..HEAD + size).filter(|_| size > 0)?);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    Some(HEAD + size)
}

/// How much a record at the start of `bytes` would say was synced, before it is known to be one.
pub(super) fn synced(bytes: &[u8]) -> Option<usize> {
    Some(field(bytes, 8)? as usize)
}

fn field(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn crc(sequence: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// The bytes of an entry in the log, about.
pub(super) fn entry_bytes(entry: &LogEntry) -> u32 {
    let payload = match &entry.payload {
        openraft::EntryPayload::Normal(proposal) => proposal.0.len(),
        _ => wire::entry_to(entry).encoded_len(),
    };
    u32::try_from(HEAD + 24 + payload).unwrap_or(u32::MAX)
}
