//! Segment files: made with zeros, named by their number, headed by whose they are.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use prost::Message;

use super::Identity;
use crate::directory::owned;
use crate::proto::registry::log::v1::SegmentHeader;

const MAGIC: &[u8; 8] = b"REGWAL\0\0";
const FORMAT: u32 = 1;
/// Where the records begin.
pub(super) const HEADER: usize = 512;
const ZEROS: &[u8] = &[0; 1 << 20];

pub(super) fn path(directory: &Path, sequence: u64) -> PathBuf {
    directory.join(format!("wal-{sequence:016}.log"))
}

/// The number of a segment, from its name.
pub(super) fn sequence(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix("wal-")?
        .strip_suffix(".log")?
        .parse()
        .ok()
}

/// Makes a segment of zeros and syncs it, under a name that recovery removes until it is renamed.
pub(super) fn prepare(directory: &Path, bytes: u64) -> io::Result<()> {
    let mut file = owned(
        spare(directory),
        OpenOptions::new().create(true).truncate(true).write(true),
    )?;
    let mut left = bytes;
    while left > 0 {
        let chunk = left.min(ZEROS.len() as u64);
        file.write_all(&ZEROS[..usize::try_from(chunk).map_err(io::Error::other)?])?;
        left -= chunk;
    }
    file.sync_all()?;
    sync(directory)
}

/// The segment that is zeroed and waits to be used.
pub(super) fn spare(directory: &Path) -> PathBuf {
    directory.join("wal-next.zero")
}

/// Takes the spare into use as segment `sequence`. The header is synced with the first records.
pub(super) fn take_spare(directory: &Path, sequence: u64, identity: Identity) -> io::Result<File> {
    let path = path(directory, sequence);
    fs::rename(spare(directory), &path)?;
    sync(directory)?;
    let file = File::options().read(true).write(true).open(path)?;
    write_head(&file, sequence, identity)?;
    Ok(file)
}

pub(super) fn write_head(file: &File, sequence: u64, identity: Identity) -> io::Result<()> {
    file.write_all_at(&header(sequence, identity), 0)
}

fn header(sequence: u64, identity: Identity) -> Vec<u8> {
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

/// Makes renames and removals in a directory durable.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
