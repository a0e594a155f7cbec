//! What is in a snapshot's file: a magic number, then frames, each with its length and CRC, the last of which counts what
//! came before.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::Frozen;
use crate::command::Reply;
use crate::log::Identity;
use crate::proto;
use crate::proto::registry::snapshot::v1::{self as file, frame::Frame};
use crate::state::SessionRecord;
use crate::tree::Record;
use crate::wire;

pub(super) const MAGIC: &[u8; 8] = b"REGSNAP\0";
pub(super) const FORMAT: u32 = 1;
/// How many bytes of records, or of a session's answers, go into one frame, but for the last of them.
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
                    let replies = replies(session.answered).collect();
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
            Frame::Answers(frame) => {
                let Some(session) = sessions.get_mut(&frame.session) else {
                    return Err(invalid("it holds answers to a session that it does not hold"));
                };
                Arc::make_mut(session).replies.extend(replies(frame.answered));
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
        put_session(out, *id, session)?;
    }
    let (mut records, mut bytes) = (Vec::new(), 0);
    for record in frozen.tree.from("") {
        let record = proto::Entry::from(&**record);
        bytes += record.encoded_len();
        records.push(record);
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

/// Writes a session, with as many of its answers as fit a frame, and the rest in frames that follow.
fn put_session(out: &mut dyn Write, id: u64, session: &SessionRecord) -> io::Result<()> {
    let head = |answered| {
        let session = file::Session {
            id,
            ttl_ms: session.ttl_ms,
            answered_below: session.answered_below,
            answered,
            silent_ms: session.silent_ms,
            heard: session.heard,
        };
        Frame::Sessions(file::Sessions {
            sessions: vec![session],
        })
    };
    let more = |answered| Frame::Answers(file::Answers { session: id, answered });
    let (mut answered, mut bytes, mut begun) = (Vec::new(), 0, false);
    for (sequence, reply) in &session.replies {
        if bytes > FRAME {
            let full = std::mem::take(&mut answered);
            put(out, if begun { more(full) } else { head(full) })?;
            (bytes, begun) = (0, true);
        }
        let one = file::Answered {
            sequence: *sequence,
            reply: Some(reply.clone()),
        };
        bytes += one.encoded_len();
        answered.push(one);
    }
    put(out, if begun { more(answered) } else { head(answered) })
}

fn replies(answered: Vec<file::Answered>) -> impl Iterator<Item = (u64, Reply)> {
    answered
        .into_iter()
        .filter_map(|answered| Some((answered.sequence, answered.reply?)))
}

/// Writes a frame.
///
/// # Errors
/// It is larger than what [`next`] takes.
fn put(out: &mut dyn Write, frame: Frame) -> io::Result<()> {
    let frame = file::Frame { frame: Some(frame) }.encode_to_vec();
    if frame.len() > MAX_FRAME {
        let size = frame.len();
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a frame of {size} bytes is larger than {MAX_FRAME}, and could not be read back"),
        ));
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Change, Command};
    use crate::proto::operation::Write as Operation;
    use crate::snapshot::Snapshots;
    use crate::state::State;
    use crate::tree::Tree;
    use crate::types::SnapshotMeta;

    const IDENTITY: Identity = Identity {
        cluster: [7; 16],
        member: 1,
    };

    fn put(key: String) -> Change {
        let put = Operation::Put(proto::Put {
            ephemeral: key.ends_with("/leaf"),
            ..proto::Put::default()
        });
        Change::Txn(proto::Txn {
            conditions: Vec::new(),
            operations: vec![proto::Operation { key, write: Some(put) }],
        })
    }

    /// What is remembered for a session may be larger than any frame: each of these answers names a key of 1,000 bytes.
    #[test]
    fn a_sessions_answers_are_read_back_however_many_there_are() {
        let mut state = State::default();
        let open = || Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 });
        for change in [open(), open()] {
            state.apply(1, Command::new(change));
        }
        let leaf = format!("/ns/{}/leaf", "x".repeat(1000));
        let below = format!("{leaf}/below");
        for sequence in 1..=20_000 {
            let command = Command {
                session: 1,
                sequence,
                change: Some(put(if sequence == 1 { leaf.clone() } else { below.clone() })),
                ..Command::default()
            };
            state.apply(1, command);
        }
        assert_eq!(state.sessions[&1].replies.len(), 20_000);
        let frozen = Frozen::of(&state, SnapshotMeta::default());
        let mut file = Vec::new();
        write(&mut file, &IDENTITY, &frozen).unwrap();
        assert!(file.len() > MAX_FRAME);
        let read = read(&*file, |_| {}).unwrap();
        let replies = |sessions: &BTreeMap<u64, Arc<SessionRecord>>| {
            let replies = sessions.iter().map(|(id, session)| (*id, session.replies.clone()));
            replies.collect::<Vec<_>>()
        };
        assert!(replies(&read.sessions) == replies(&state.sessions));

        // It counts as a snapshot, too.
        let dir = tempfile::tempdir().unwrap();
        let snapshots = || Snapshots::open(Some(dir.path().into()), IDENTITY).unwrap();
        snapshots().write(&frozen).unwrap();
        assert_eq!(snapshots().load().unwrap().unwrap().sessions.len(), 2);
    }

    /// The log is purged up to a snapshot that was written: one that could not be read back must not be.
    #[test]
    fn a_frame_that_could_not_be_read_is_not_written() {
        let mut tree = Tree::default();
        tree.insert(Arc::new(Record {
            key: "/ns/large".into(),
            value: vec![0; MAX_FRAME].into(),
            create_revision: 1,
            mod_revision: 1,
            version: 1,
            session: 0,
        }));
        let state = State::restore(tree, 1, 0, BTreeMap::new());
        let frozen = Frozen::of(&state, SnapshotMeta::default());
        let error = write(&mut io::sink(), &IDENTITY, &frozen).unwrap_err();
        assert!(error.to_string().contains("could not be read back"), "{error}");
    }

    #[test]
    fn answers_of_no_session_are_refused() {
        let mut file = [&MAGIC[..], &FORMAT.to_le_bytes()].concat();
        put_frames(
            &mut file,
            [
                Frame::Header(file::Header::default()),
                Frame::Answers(file::Answers::default()),
            ],
        );
        assert!(read(&*file, |_| {}).is_err());
    }

    fn put_frames(file: &mut Vec<u8>, frames: impl IntoIterator<Item = Frame>) {
        for frame in frames {
            super::put(file, frame).unwrap();
        }
    }
}
