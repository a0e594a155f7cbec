//! What is in a snapshot's file: a magic number, then frames, each with its length and CRC, the last of which counts what
//! came before.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::Frozen;
use crate::log::Identity;
use crate::proto::registry::snapshot::v1::{self as file, frame::Frame};
use crate::state::SessionRecord;
use crate::tree::Record;
use crate::wire;

pub(super) const MAGIC: &[u8; 8] = b"REGSNAP\0";
pub(super) const FORMAT: u32 = 1;
/// How much of keys and values goes into one frame.
const FRAME: usize = 256 << 10;
/// No frame is larger: one value, and room.
const MAX_FRAME: usize = 16 << 20;

/// What was read of a file, but for the records.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) header: file::Header,
    pub(crate) sessions: BTreeMap<u64, Arc<SessionRecord>>,
    pub(crate) records: u64,
}

/// Reads a file to its end, whosever it is, and hands each record on. What is handed on counts only with an `Ok`.
pub(crate) fn read(mut from: impl io::Read, mut each: impl FnMut(Record)) -> io::Result<Read> {
    let mut head = [0; 12];
    from.read_exact(&mut head).map_err(cut_short)?;
    let format = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    if head[..8] != *MAGIC {
        return Err(invalid("it is no snapshot of a registry"));
    }
    if format != FORMAT {
        return Err(invalid(&format!(
            "its format is {format}, this version reads {FORMAT}; use the version that wrote it"
        )));
    }
    let Frame::Header(header) = next(&mut from)? else {
        return Err(invalid("it has no header"));
    };
    let (mut sessions, mut records) = (BTreeMap::new(), 0);
    loop {
        match next(&mut from)? {
            Frame::Header(_) => return Err(invalid("it has two headers")),
            Frame::Sessions(frame) => {
                for session in frame.sessions {
                    let replies = session
                        .answered
                        .into_iter()
                        .filter_map(|a| Some((a.sequence, a.reply?)))
                        .collect();
                    let record = SessionRecord {
                        ttl_ms: session.ttl_ms,
                        answered_below: session.answered_below,
                        silent_ms: session.silent_ms,
                        heard: session.heard,
                        replies,
                        ..SessionRecord::default()
                    };
                    sessions.insert(session.id, Arc::new(record));
                }
            }
            Frame::Records(frame) => {
                for entry in frame.records {
                    records += 1;
                    each(entry.into_record());
                }
            }
            Frame::End(end) if (end.records, end.sessions) == (records, sessions.len() as u64) => break,
            Frame::End(_) => return Err(invalid("it lacks a part")),
        }
    }
    match from.read(&mut [0])? {
        0 => Ok(Read {
            header,
            sessions,
            records,
        }),
        _ => Err(invalid("it is damaged: something follows its end")),
    }
}

/// Writes a state as a file.
pub(crate) fn write(out: &mut dyn Write, identity: &Identity, frozen: &Frozen) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(&FORMAT.to_le_bytes())?;
    put(
        out,
        Frame::Header(file::Header {
            cluster: Bytes::copy_from_slice(&identity.cluster),
            last_log_id: frozen.meta.last_log_id.as_ref().map(wire::log_id_to),
            membership: Some(wire::membership_to(frozen.meta.last_membership.membership())),
            membership_log_id: frozen.meta.last_membership.log_id().as_ref().map(wire::log_id_to),
            revision: frozen.revision,
            last_session: frozen.last_session,
            removed: frozen.removed.iter().copied().collect(),
        }),
    )?;
    for (id, session) in &frozen.sessions {
        let answered = session.replies.iter();
        let answered = answered.map(|(sequence, reply)| file::Answered {
            sequence: *sequence,
            reply: Some(reply.clone()),
        });
        let session = file::Session {
            id: *id,
            ttl_ms: session.ttl_ms,
            answered_below: session.answered_below,
            answered: answered.collect(),
            silent_ms: session.silent_ms,
            heard: session.heard,
        };
        put(
            out,
            Frame::Sessions(file::Sessions {
                sessions: vec![session],
            }),
        )?;
    }
    let (mut records, mut bytes) = (Vec::new(), 0);
    for record in frozen.tree.from("") {
        bytes += record.key.len() + record.value.len();
        records.push((&**record).into());
        if bytes > FRAME {
            put(
                out,
                Frame::Records(file::Records {
                    records: std::mem::take(&mut records),
                }),
            )?;
            bytes = 0;
        }
    }
    if !records.is_empty() {
        put(out, Frame::Records(file::Records { records }))?;
    }
    put(
        out,
        Frame::End(file::End {
            sessions: frozen.sessions.len() as u64,
            records: frozen.tree.len() as u64,
        }),
    )?;
    out.flush()
}

fn put(out: &mut dyn Write, frame: Frame) -> io::Result<()> {
    let frame = file::Frame { frame: Some(frame) }.encode_to_vec();
    let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&crc32fast::hash(&frame).to_le_bytes())?;
    out.write_all(&frame)
}

/// A file that ends too early, and not one that can't be read.
fn cut_short(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => invalid("it is cut short"),
        _ => error,
    }
}

fn next(from: &mut impl io::Read) -> io::Result<Frame> {
    let (mut length, mut crc) = ([0; 4], [0; 4]);
    from.read_exact(&mut length).map_err(cut_short)?;
    from.read_exact(&mut crc).map_err(cut_short)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(invalid("it is damaged: a frame has an impossible length"));
    }
    // A length may be damaged too: there is room for what comes, not for what it says.
    let mut frame = Vec::new();
    if from.take(length as u64).read_to_end(&mut frame)? < length {
        return Err(invalid("it is cut short"));
    }
    if crc32fast::hash(&frame) != u32::from_le_bytes(crc) {
        return Err(invalid("it is damaged: a checksum is wrong"));
    }
    let frame = file::Frame::decode(Bytes::from(frame)).map_err(|_| invalid("it is damaged: a frame can't be read"))?;
    frame
        .frame
        .ok_or_else(|| invalid("it holds what this version does not know"))
}

pub(super) fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}
