//! One record: `mark u32, length u32, crc u32, synced u32, message`.
//!
//! A segment has a salt, drawn at random when its file was taken into use. The mark is the salt's lower half, and the CRC
//! covers all of it, the place in the file, `synced` and the message: what an earlier use of the file left is no record, nor
//! is one that a disk put elsewhere, nor a value that was made to look like one, for who made it did not know the salt.
//!
//! `synced` is how much of the segment was surely on disk when the record was written. It tells a torn tail from damage:
//! after a loss of power the unsynced end of a file may hold a later sector and lack an earlier one, but a record that says
//! it was written after the bad place was synced proves that what was lost there had been acknowledged.

use std::io;

use prost::Message;

use super::invalid;
use crate::proto::registry::log::v1 as message;
use crate::types::LogEntry;
use crate::wire;

pub(super) const HEAD: usize = 16;
/// No record is longer: the largest transaction, and room.
pub(super) const MAX_RECORD: usize = 16 << 20;

pub(super) use message::record::Record;

/// A record as it was read.
#[derive(Debug)]
pub(super) struct Read {
    /// `None` for what this version does not know: its checksum is right, so it is what was written.
    pub(super) record: Option<Record>,
    pub(super) synced: u32,
    /// The length in the file.
    pub(super) length: usize,
}

/// Appends a record to `out` that is at `place` in the segment; answers its length.
///
/// # Errors
/// It is longer than what recovery would take for a record.
pub(super) fn write(out: &mut Vec<u8>, salt: u64, place: u64, synced: u32, record: &Record) -> io::Result<usize> {
    let start = out.len();
    out.extend_from_slice(&[0; HEAD]);
    // The message `Record` is this one field.
    record.encode(out);
    let length = out.len() - start;
    if length - HEAD > MAX_RECORD {
        return Err(invalid(format!("a record of {length} bytes is too long for the log")));
    }
    let size = u32::try_from(length - HEAD).map_err(io::Error::other)?;
    let head = &mut out[start..];
    head[..4].copy_from_slice(&mark(salt));
    head[4..8].copy_from_slice(&size.to_le_bytes());
    head[12..HEAD].copy_from_slice(&synced.to_le_bytes());
    let crc = crc(salt, place, &head[12..]);
    head[8..12].copy_from_slice(&crc.to_le_bytes());
    Ok(length)
}

/// The record at the start of `bytes`, if there is a good one; they are at `place` in the segment.
pub(super) fn read(bytes: &[u8], salt: u64, place: u64) -> Option<Read> {
    let (size, expected, synced) = (field(bytes, 4)? as usize, field(bytes, 8)?, field(bytes, 12)?);
    if !bytes.starts_with(&mark(salt)) || size == 0 || size > MAX_RECORD {
        return None;
    }
    let length = HEAD + size;
    let body = bytes.get(12..length)?;
    if crc(salt, place, body) != expected {
        return None;
    }
    let record = message::Record::decode(bytes::Bytes::copy_from_slice(&body[4..]));
    let record = record.ok().and_then(|record| record.record);
    Some(Read { record, synced, length })
}

/// Where in `bytes` records may begin, before they are known to be any.
pub(super) fn marks(bytes: &[u8], salt: u64) -> impl Iterator<Item = usize> {
    let mark = memchr::memmem::Finder::new(&mark(salt)).into_owned();
    let mut from = 0;
    std::iter::from_fn(move || {
        let found = from + mark.find(bytes.get(from..)?)?;
        from = found + 1;
        Some(found)
    })
}

/// Puts mark and checksum right of what would be a record at the start of `bytes`, and answers its length.
#[cfg(test)]
pub(super) fn mend(bytes: &mut [u8], salt: u64, place: u64) -> Option<usize> {
    let size = field(bytes, 4)? as usize;
    let crc = crc(salt, place, bytes.get(12..HEAD + size).filter(|_| size > 0)?);
    bytes[..4].copy_from_slice(&mark(salt));
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    Some(HEAD + size)
}

fn mark(salt: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = salt.to_le_bytes();
    [a, b, c, d]
}

fn field(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn crc(salt: u64, place: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&salt.to_le_bytes());
    hasher.update(&place.to_le_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_only_in_its_place_of_its_segment() {
        let committed = Record::Committed(message::LogId { term: 1, index: 2 });
        let mut bytes = Vec::new();
        let length = write(&mut bytes, 7 << 32 | 5, 512, 512, &committed).unwrap();
        assert_eq!(length, bytes.len());
        let found = |salt, place| read(&bytes, salt, place).map(|read| (read.record, read.synced, read.length));
        assert_eq!(found(7 << 32 | 5, 512), Some((Some(committed), 512, length)));
        for (salt, place) in [(7 << 32 | 6, 512), (8 << 32 | 5, 512), (7 << 32 | 5, 1024)] {
            assert_eq!(found(salt, place), None);
        }
        assert_eq!(
            read(&bytes[..length - 1], 7 << 32 | 5, 512).map(|read| read.length),
            None
        );
    }

    #[test]
    fn every_mark_is_found() {
        let salt = 0x0101_0101;
        assert_eq!(
            marks(&[1, 1, 1, 1, 1, 0, 1, 1, 1, 1], salt).collect::<Vec<_>>(),
            [0, 1, 6]
        );
        assert_eq!(marks(&[], salt).next(), None);
    }
}
