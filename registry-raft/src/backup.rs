//! Backups: the state as one file, taken while everything goes on, and a new group from it.
//!
//! A backup is a snapshot, sent as it is written: the member that is asked freezes its copy of the state once it holds
//! all that was acknowledged, and nothing waits. The file counts when it was read back whole.
//!
//! A restored state belongs to a new group, and takes a leap: whoever dealt with the old group after the backup was taken
//! holds revisions, fencing tokens and sessions that the backup knows nothing of, and none of them may be given out
//! again. Nor does a session of the old group live on. It might hold a lock that it gave back since, for ever. So the
//! sessions of the backup get numbers that nobody keeps alive, and expire, not before their TTL, as those of dead
//! processes do: their keys go by entries of the log.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::Membership;
use registry_api::{BoxError, Epoch, Error, Key, Result, Revision};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::config::{RaftConfig, refused};
use crate::directory::{Directory, owned, parent, storage};
use crate::link::BACKEND;
use crate::log::Identity;
use crate::member::Core;
use crate::proto;
use crate::proto::backup_part::Part;
use crate::service::split;
use crate::snapshot::{self, Frozen, Snapshots};
use crate::state::{SessionRecord, first_session};
use crate::store::Inner;
use crate::tree::{Record, Tree};
use crate::types::{LogId, Peer, SnapshotMeta, StoredMembership};
use crate::wire;

/// How many revisions a second (as a power of two) a restored state leaps over since 2025, which is [`EPOCH`]: a group makes
/// far fewer. So each restore begins above all that an earlier one can have given out by then, be it a moment before.
/// Programs which hold numbers as JavaScript does can tell the revisions apart until 2093.
const REVISIONS_A_SECOND: u32 = 22;
const EPOCH: Duration = Duration::from_secs(1_735_689_600);
/// How much of a backup is one message, how many are made ahead of who reads them, and how long one may wait.
const PART: usize = 256 << 10;
const AHEAD: usize = 4;
const UNREAD: Duration = Duration::from_secs(30);

/// What a backup holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Backup {
    /// The group that it is of.
    pub cluster: String,
    /// The revision that it was taken at.
    pub revision: u64,
    /// How many keys it holds, the recipes' own included.
    pub keys: u64,
    /// How many sessions.
    pub sessions: u64,
    /// Its size.
    pub bytes: u64,
}

/// The parts of a backup as they are sent: the size of the whole first.
pub(crate) type Parts = futures_util::stream::BoxStream<'static, Result<Part>>;

impl Core {
    /// The state with all that was acknowledged, frozen now and sent as it is read.
    pub(crate) async fn backup(&self) -> Result<Parts> {
        let Ok(permit) = self.backups().clone().try_acquire_owned() else {
            return Err(unavailable("this member is sending another backup"));
        };
        match tokio::time::timeout(UNREAD, self.barrier()).await {
            Ok(fresh) => fresh?,
            Err(elapsed) => return Err(unavailable(elapsed)),
        }
        let frozen = self.store().read(Inner::frozen);
        let (parts, sent) = mpsc::channel(AHEAD);
        let identity = self.identity();
        tokio::task::spawn_blocking(move || write(&identity, &frozen, parts, permit));
        Ok(tokio_stream::wrappers::ReceiverStream::new(sent).map(Ok).boxed())
    }
}

/// Writes it twice, the first time to measure. What goes wrong is that nobody reads any more: the end is missing then.
fn write(identity: &Identity, frozen: &Frozen, parts: mpsc::Sender<Part>, _permit: OwnedSemaphorePermit) {
    let mut measure = Measure(0);
    let mut sender = Sender(parts);
    let written = snapshot::write(&mut measure, identity, frozen)
        .and_then(|()| sender.send(Part::Size(measure.0)))
        .and_then(|()| {
            let mut out = BufWriter::with_capacity(PART, &mut sender);
            snapshot::write(&mut out, identity, frozen)
        });
    if let Err(error) = written {
        tracing::warn!(%error, "a backup was given up");
    }
}

struct Measure(u64);

impl Write for Measure {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands parts to whoever reads them, from a thread that may wait.
struct Sender(mpsc::Sender<Part>);

impl Sender {
    fn send(&mut self, part: Part) -> io::Result<()> {
        let sending = tokio::time::timeout(UNREAD, self.0.send(part));
        match tokio::runtime::Handle::current().block_on(sending) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(io::Error::other("who asked for it is gone")),
            Err(_) => Err(io::Error::other(format!(
                "who asked for it read nothing for {UNREAD:?}"
            ))),
        }
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(PART)];
        self.send(Part::Data(Bytes::copy_from_slice(part)))?;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the parts to a file, which is there when all of it is, and was read back.
///
/// `progress` is told how many bytes have come, and of how many.
pub(crate) async fn save<S>(
    mut parts: S,
    file: &Path,
    patience: Duration,
    mut progress: impl FnMut(u64, u64),
) -> Result<Backup>
where
    S: Stream<Item = Result<Part>> + Unpin,
{
    let beside = Beside::new(file);
    let failed = |error: io::Error| storage(&beside.0, format!("can't be written: {error}"));
    let out = owned(
        beside.0.clone(),
        OpenOptions::new().create(true).truncate(true).write(true),
    )
    .map_err(failed)?;
    let mut out = tokio::fs::File::from_std(out);
    let (mut done, mut size) = (0, 0);
    loop {
        use tokio::io::AsyncWriteExt;
        let part = tokio::time::timeout(patience, parts.next()).await;
        let part = part.map_err(|_| unavailable(format!("no more of the backup came within {patience:?}")))?;
        match part.transpose()? {
            Some(Part::Size(bytes)) => size = bytes,
            Some(Part::Data(bytes)) => {
                out.write_all(&bytes).await.map_err(failed)?;
                done += bytes.len() as u64;
            }
            Some(Part::Failure(said)) => return Err(crate::link::failure(said)),
            None => break,
        }
        progress(done, size);
    }
    if done != size {
        return Err(unavailable(format!(
            "the backup was cut short: {done} bytes of {size} came"
        )));
    }
    out.sync_all().await.map_err(failed)?;
    drop(out);
    let file = file.to_owned();
    let checked = move || {
        let backup = read(&beside.0, |_| {})?.0;
        let renamed = fs::rename(&beside.0, &file).and_then(|()| File::open(parent(&file))?.sync_all());
        renamed.map_err(|error| storage(&file, format!("can't be written: {error}")))?;
        Ok(backup)
    };
    tokio::task::spawn_blocking(checked).await.map_err(unavailable)?
}

/// The file that is written, beside the one that it becomes. Dropped before that it is removed.
struct Beside(PathBuf);

impl Beside {
    fn new(file: &Path) -> Self {
        let mut name: OsString = file.into();
        name.push(format!(".{}.new", uuid::Uuid::new_v4().simple()));
        Self(name.into())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It has been renamed, or was never made.
        let _ = fs::remove_file(&self.0);
    }
}

/// Reads a backup to its end.
fn read(file: &Path, each: impl FnMut(Record)) -> Result<(Backup, snapshot::Read)> {
    let refused = |error: io::Error| storage(file, error.to_string());
    let open = File::open(file).map_err(refused)?;
    let bytes = open.metadata().map_err(refused)?.len();
    let read = snapshot::read(BufReader::with_capacity(1 << 20, open), each).map_err(refused)?;
    let backup = Backup {
        cluster: uuid::Uuid::from_slice(&read.header.cluster)
            .unwrap_or_default()
            .to_string(),
        revision: read.header.revision,
        keys: read.records,
        sessions: read.sessions.len() as u64,
        bytes,
    };
    Ok((backup, read))
}

/// Makes the data directory of the first member of a new group, with what the backup holds. Nothing is started.
///
/// The group has this member alone; others join it. Its revisions and sessions go on far above those of the backup, and
/// the sessions of the backup expire once it has started: their keys go as those of dead processes do. The new group is
/// not the old one, which should not run any more.
///
/// # Errors
/// [`Error::Storage`] names the file if it is damaged, cut short, or of another version, and the directory if there is one
/// already: nothing is made then. [`Error::Config`] for a config that is no member's with a directory.
pub async fn restore(file: &Path, config: &RaftConfig) -> Result<Backup> {
    config.check()?;
    if config.is_remote() {
        return Err(refused(
            "endpoints",
            "a backup is restored where a member keeps its data".into(),
        ));
    }
    let Some(directory) = config.directory() else {
        return Err(refused("data_dir", "a member in memory keeps nothing".into()));
    };
    let peer = Peer {
        name: config.member_name().into(),
        address: config.advertised(config.address()?),
    };
    let (file, directory) = (file.to_owned(), directory.to_owned());
    let restored = move || make(&file, &directory, peer);
    tokio::task::spawn_blocking(restored).await.map_err(unavailable)?
}

fn make(file: &Path, directory: &Path, peer: Peer) -> Result<Backup> {
    let failed = |error: io::Error| storage(directory, format!("can't be made: {error}"));
    match fs::read_dir(directory).map(|mut entries| entries.next().is_some()) {
        Ok(false) => {}
        Ok(true) => {
            let reason = "there is something in it; a backup is restored into a new directory";
            return Err(storage(directory, reason.into()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(storage(directory, error.to_string())),
    }
    let mut tree = Tree::default();
    let mut ephemeral = Vec::new();
    let mut epochs = Vec::new();
    let (backup, read) = read(file, |record| match record.session {
        0 if record.key.contains("~/epoch/") => epochs.push(record),
        0 => drop(tree.insert(Arc::new(record))),
        _ => ephemeral.push(record),
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let revision = revision_after(read.header.revision, now)?;
    for record in epochs {
        tree.insert(Arc::new(raised(record, revision)?));
    }
    let (first, mut numbers) = (first_session(), BTreeMap::new());
    let owners = ephemeral.iter().map(|record| record.session);
    for (session, number) in read.sessions.keys().copied().chain(owners).zip(first + 1..) {
        numbers.entry(session).or_insert(number);
    }
    for record in ephemeral {
        let session = numbers[&record.session];
        tree.insert(Arc::new(Record { session, ..record }));
    }
    let name = peer.name.clone();
    let identity = Identity::random();
    let frozen = leap(read, tree, identity, peer, revision, &numbers)?;
    // Made beside and renamed: a directory that is there is whole. Its name is this restore's alone.
    let mut beside: OsString = directory.into();
    beside.push(format!(".restoring-{}", uuid::Uuid::new_v4().simple()));
    let beside = PathBuf::from(beside);
    let made = || {
        let made = Directory::open(&beside, &name, || identity)?;
        Snapshots::open(Some(made.snapshots()), identity)?
            .write(&frozen)
            .map_err(failed)?;
        fs::rename(&beside, directory)
            .and_then(|()| File::open(parent(directory))?.sync_all())
            .map_err(failed)
    };
    let made = made();
    if made.is_err() {
        // It is renamed, or was never made, or has what nobody will use.
        let _ = fs::remove_dir_all(&beside);
    }
    made.map(|()| backup)
}

/// The revision of a state that is restored now: above all that any group before it has given out.
///
/// # Errors
/// The clock is before 2025, or the backup is of a group that was restored later than now by this clock: what other groups
/// have given out can't be known then.
fn revision_after(backup: u64, now: Duration) -> Result<u64> {
    let clock = |reason: &str| Err(storage(Path::new("the clock"), reason.into()));
    let Some(since) = now.checked_sub(EPOCH) else {
        return clock("it is set to a time before 2025; a restored group's revisions begin with the time, so set it");
    };
    let fraction = (u64::from(since.subsec_nanos()) << REVISIONS_A_SECOND) / 1_000_000_000;
    let leap = since.as_secs().checked_mul(1 << REVISIONS_A_SECOND);
    match leap.map(|leap| leap + fraction) {
        Some(revision) if revision > backup => Ok(revision),
        _ => clock(
            "the backup's revisions are larger than those of a group that is restored now: it was restored itself at a \
             later time; set the clock",
        ),
    }
}

/// The record that a restore at that revision puts in the place of one that may hold the epoch of a namespace's fencing
/// tokens. The epoch may have been raised after the backup was taken, and tokens from then are to be exceeded too.
fn raised(record: Record, revision: u64) -> Result<Record> {
    let (namespace, key) = split(&record.key)?;
    let key = Key::from_store(key).map_err(unavailable)?;
    let raised = Epoch::restored(&key, Revision(revision))?;
    Ok(raised.map_or(record, |(key, value)| Record {
        key: namespace.qualify(key.as_str()).into(),
        value: value.into(),
        create_revision: revision,
        mod_revision: revision,
        version: 1,
        session: 0,
    }))
}

/// The state as the new group begins with it.
fn leap(
    read: snapshot::Read,
    tree: Tree,
    identity: Identity,
    peer: Peer,
    revision: u64,
    numbers: &BTreeMap<u64, u64>,
) -> Result<Frozen> {
    let sessions = read.sessions.into_iter().filter_map(|(id, session)| {
        let session = SessionRecord {
            ttl_ms: session.ttl_ms,
            ..SessionRecord::default()
        };
        Some((*numbers.get(&id)?, Arc::new(session)))
    });
    // Before the first term, so that it is before every entry that the new group writes.
    let index = read.header.last_log_id.map_or(1, |id| id.index.max(1));
    let at: LogId = wire::log_id_from(crate::proto::registry::log::v1::LogId { term: 0, index });
    let voters = vec![std::iter::once(identity.member).collect()];
    let members = BTreeMap::from([(identity.member, peer)]);
    let membership = Membership::new(voters, members).map_err(|error| unavailable(error.to_string()))?;
    Ok(Frozen {
        meta: SnapshotMeta {
            last_log_id: Some(at),
            last_membership: StoredMembership::new(Some(at), membership),
        },
        tree,
        revision,
        last_session: numbers.values().max().copied().unwrap_or_else(first_session),
        sessions: sessions.collect(),
        // Nobody of the old group is asked for in the new one.
        removed: BTreeSet::new(),
    })
}

/// A part as a message.
pub(crate) fn message(part: Result<Part>) -> proto::BackupPart {
    let part = part.unwrap_or_else(|error| Part::Failure(crate::service::said(&error)));
    proto::BackupPart { part: Some(part) }
}

fn unavailable(cause: impl Into<BoxError>) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        source: cause.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_later_restore_begins_above_all_that_an_earlier_one_gave_out() {
        let now = EPOCH + 700 * DAY;
        let first = revision_after(1_000, now).unwrap();
        assert!(first > 1_000);
        // A million revisions a second are more than any group makes.
        let mut second = first;
        for after in [
            Duration::from_micros(10),
            Duration::from_millis(5),
            Duration::from_secs(11),
        ] {
            let given_out = first + u64::try_from(after.as_micros()).unwrap();
            second = revision_after(1_000, now + after).unwrap();
            assert!(second > given_out, "{second} was given out by then");
        }
        assert!(revision_after(0, EPOCH + 24_800 * DAY).unwrap() < 1 << 53);
        for (backup, now) in [(0, EPOCH - DAY), (second, now - DAY), (u64::MAX, now)] {
            let refused = revision_after(backup, now).unwrap_err().to_string();
            assert!(refused.contains("the clock"), "{refused}");
        }
    }
}
