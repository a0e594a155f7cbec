//! Segment files: named by their number, headed by whose they are.

use std::sync::Arc;

use prost::Message;

use super::{Identity, record};
use crate::disk::{DiskFile, PAGE};
use crate::proto::registry::log::v1::SegmentHeader;

const MAGIC: &[u8; 8] = b"REGWAL\0\0";
const FORMAT: u32 = 2;
/// Where the records begin.
pub(super) const HEADER: usize = 512;

/// An open segment.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(super) file: Arc<dyn DiskFile>,
    /// What its records are told by from all else that is in the file.
    pub(super) salt: u64,
}

pub(super) fn name(sequence: u64) -> String {
    format!("wal-{sequence:016}.log")
}

/// The number of a segment, from its name.
pub(super) fn sequence(name: &str) -> Option<u64> {
    name.strip_prefix("wal-")?.strip_suffix(".log")?.parse().ok()
}

/// Up to where zeros are written after records that end at `end`: they tell the end from what is torn. To the end of a
/// page, so that no more of it has to be read.
pub(super) fn zeros_to(end: u64, size: u64) -> u64 {
    (end + record::HEAD as u64).next_multiple_of(PAGE).min(size).max(end)
}

pub(super) fn header(sequence: u64, identity: Identity, salt: u64) -> Vec<u8> {
    let header = SegmentHeader {
        cluster: bytes::Bytes::copy_from_slice(&identity.cluster),
        member: identity.member,
        sequence,
        salt,
    };
    let header = header.encode_length_delimited_to_vec();
    let crc = crc32fast::hash(&header);
    let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes(), &crc.to_le_bytes(), &header].concat();
    bytes.resize(HEADER, 0);
    bytes
}

/// The salt of a segment, from its head; or why it can't be used.
pub(super) fn salt(bytes: &[u8], sequence: u64, identity: Identity) -> Result<u64, String> {
    let Some(head) = bytes.get(..HEADER) else {
        return Err("it is cut short".into());
    };
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if head.iter().all(|&byte| byte == 0) {
        return Err("its head is gone".into());
    }
    if head[..8] != *MAGIC {
        return Err("its head is damaged, or it is no log".into());
    }
    if number(8) != FORMAT {
        return Err(format!(
            "its format is {}, this version reads {FORMAT}; use the version that wrote it",
            number(8)
        ));
    }
    let Ok(header) = SegmentHeader::decode_length_delimited(&head[16..]) else {
        return Err("its head is damaged".into());
    };
    if crc32fast::hash(&header.encode_length_delimited_to_vec()) != number(12) {
        return Err("its head is damaged".into());
    }
    match () {
        () if *header.cluster != identity.cluster => Err("it is another cluster's".into()),
        () if header.member != identity.member => Err(format!("it is member {}'s", header.member)),
        () if header.sequence != sequence => Err(format!("it is segment {}", header.sequence)),
        () => Ok(header.salt),
    }
}
