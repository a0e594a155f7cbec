//! Segment files: named by their number, headed by whose they are.

use std::io;

use prost::Message;

use super::Identity;
use crate::disk::DiskFile;
use crate::proto::registry::log::v1::SegmentHeader;

const MAGIC: &[u8; 8] = b"REGWAL\0\0";
const FORMAT: u32 = 1;
/// Where the records begin.
pub(super) const HEADER: usize = 512;

pub(super) fn name(sequence: u64) -> String {
    format!("wal-{sequence:016}.log")
}

/// The number of a segment, from its name.
pub(super) fn sequence(name: &str) -> Option<u64> {
    name.strip_prefix("wal-")?.strip_suffix(".log")?.parse().ok()
}

/// Writes the head of a segment, and syncs it: a record must not outlive the head of its file.
pub(super) fn write_head(file: &dyn DiskFile, sequence: u64, identity: Identity) -> io::Result<()> {
    file.write_at(&header(sequence, identity), 0)?;
    file.sync()
}

pub(super) fn header(sequence: u64, identity: Identity) -> Vec<u8> {
    let header = SegmentHeader {
        cluster: bytes::Bytes::copy_from_slice(&identity.cluster),
        member: identity.member,
        sequence,
    };
    let header = header.encode_length_delimited_to_vec();
    let crc = crc32fast::hash(&header);
    let mut bytes = [&MAGIC[..], &FORMAT.to_le_bytes(), &crc.to_le_bytes(), &header].concat();
    bytes.resize(HEADER, 0);
    bytes
}

/// What the head of a segment says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// It is of this log.
    Own,
    /// Nothing was written yet.
    Blank,
    /// Why it can't be used.
    Refused(String),
}

pub(super) fn head(bytes: &[u8], sequence: u64, identity: Identity) -> Head {
    let refused = |reason: &str| Head::Refused(reason.into());
    let Some(head) = bytes.get(..HEADER) else {
        return refused("it is cut short");
    };
    if head.iter().all(|&byte| byte == 0) {
        return Head::Blank;
    }
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if head[..8] != *MAGIC {
        return refused("its head is damaged, or it is no log");
    }
    if number(8) != FORMAT {
        return Head::Refused(format!(
            "its format is {}, this version reads {FORMAT}; use the version that wrote it",
            number(8)
        ));
    }
    let Ok(header) = SegmentHeader::decode_length_delimited(&head[16..]) else {
        return refused("its head is damaged");
    };
    if crc32fast::hash(&header.encode_length_delimited_to_vec()) != number(12) {
        return refused("its head is damaged");
    }
    match () {
        () if *header.cluster != identity.cluster => refused("it is another cluster's"),
        () if header.member != identity.member => Head::Refused(format!("it is member {}'s", header.member)),
        () if header.sequence != sequence => Head::Refused(format!("it is segment {}", header.sequence)),
        () => Head::Own,
    }
}
