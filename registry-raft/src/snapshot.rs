//! Snapshots: the whole state in one file, from which a member starts and a lagging one catches up.
//!
//! A file is written beside, synced, renamed, and the directory synced, before the log that it covers may be dropped.

#[cfg(test)]
mod damage;
mod format;
#[cfg(test)]
mod power;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, BufWriter, Cursor, Read as _, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use registry_api::Result;

use crate::directory::storage;
use crate::disk::{self, Disk, DiskFile, Folder};
use crate::log::Identity;
use crate::state::{SessionRecord, State};
use crate::tree::Tree;
use crate::types::{Snapshot, SnapshotMeta};
use crate::verify::Digest;
use crate::wire;
use format::invalid;

pub(crate) use format::{Read, read, write};

/// How much of a file is written before it is synced.
const PACE: usize = 1 << 20;

/// A state that stands still.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    pub(crate) meta: SnapshotMeta,
    pub(crate) tree: Tree,
    pub(crate) revision: u64,
    pub(crate) last_session: u64,
    pub(crate) sessions: BTreeMap<u64, Arc<SessionRecord>>,
    pub(crate) removed: BTreeSet<u64>,
}

impl Frozen {
    pub(crate) fn of(state: &State, meta: SnapshotMeta) -> Self {
        Self {
            meta,
            tree: state.tree.clone(),
            revision: state.revision,
            last_session: state.last_session,
            sessions: state.sessions.clone(),
            removed: state.removed.clone(),
        }
    }

    pub(crate) fn thaw(self) -> (State, SnapshotMeta) {
        let sessions = self
            .sessions
            .into_iter()
            .map(|(id, session)| (id, Arc::unwrap_or_clone(session)))
            .collect();
        let mut state = State::restore(self.tree, self.revision, self.last_session, sessions);
        state.removed = self.removed;
        (state, self.meta)
    }
}

/// Where a snapshot's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum SnapshotData {
    File(Arc<SnapshotFile>),
    Memory(Bytes),
}

impl SnapshotData {
    pub(crate) fn open(&self) -> io::Result<Box<dyn io::Read>> {
        Ok(match self {
            Self::File(file) => Box::new(file.open()?),
            Self::Memory(bytes) => Box::new(Cursor::new(bytes.clone())),
        })
    }
}

/// A snapshot's file. One that is replaced goes when nobody sends it any more.
#[derive(Debug)]
pub(crate) struct SnapshotFile {
    disk: Arc<dyn Disk>,
    name: String,
    replaced: AtomicBool,
}

impl SnapshotFile {
    fn new(disk: &Arc<dyn Disk>, name: String, replaced: bool) -> Arc<Self> {
        Arc::new(Self {
            disk: disk.clone(),
            name,
            replaced: AtomicBool::new(replaced),
        })
    }

    fn open(&self) -> io::Result<impl io::Read + use<>> {
        let file = disk::Reader::new(self.disk.open(&self.name)?)?;
        Ok(BufReader::with_capacity(1 << 20, file))
    }
}

impl Drop for SnapshotFile {
    fn drop(&mut self) {
        if *self.replaced.get_mut() {
            let (disk, name) = (self.disk.clone(), std::mem::take(&mut self.name));
            // It takes a while, and who lets go of it last may be in a hurry. What is left is removed at the next start.
            let _ = std::thread::Builder::new()
                .name("registry-remove".into())
                .spawn(move || remove(&*disk, &name));
        }
    }
}

/// A snapshot that comes from another member. Dropped before its end it leaves nothing.
pub(crate) struct Incoming {
    file: Option<(Paced, Arc<SnapshotFile>)>,
    memory: Vec<u8>,
}

impl Incoming {
    /// Makes what has come durable.
    pub(crate) fn finish(self) -> io::Result<SnapshotData> {
        Ok(match self.file {
            Some((paced, file)) => {
                paced.file.sync()?;
                SnapshotData::File(file)
            }
            None => SnapshotData::Memory(self.memory.into()),
        })
    }
}

impl Write for Incoming {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some((file, _)) => file.write(bytes),
            None => self.memory.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A member's snapshots: the newest, and the means to make the next.
#[derive(Debug)]
pub(crate) struct Snapshots {
    disk: Option<Arc<dyn Disk>>,
    identity: Identity,
    newest: Mutex<Option<(SnapshotMeta, SnapshotData, u64)>>,
    writing: AtomicBool,
}

impl Snapshots {
    /// Snapshots in that directory, or in memory. What a crash left half written is removed.
    pub(crate) fn open(directory: Option<PathBuf>, identity: Identity) -> Result<Self> {
        let disk = directory.map(|directory| Arc::new(Folder(directory)) as Arc<dyn Disk>);
        Self::on(disk, identity)
    }

    fn on(disk: Option<Arc<dyn Disk>>, identity: Identity) -> Result<Self> {
        if let Some(disk) = &disk {
            for beside in files(&**disk, ".new")? {
                disk.remove(&beside)
                    .map_err(|e| storage(&disk.path(&beside), e.to_string()))?;
            }
        }
        Ok(Self {
            disk,
            identity,
            newest: Mutex::default(),
            writing: AtomicBool::new(false),
        })
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.writing.load(Ordering::Acquire)
    }

    /// The size of the newest, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.newest.lock().as_ref().map_or(0, |(_, _, bytes)| *bytes)
    }

    /// Room for a snapshot that another member sends.
    pub(crate) fn incoming(&self) -> io::Result<Incoming> {
        let Some(disk) = &self.disk else {
            return Ok(Incoming {
                file: None,
                memory: Vec::new(),
            });
        };
        // No name is used again: a file that was dropped is removed in the background.
        let name = format!("from-a-member-{}.new", uuid::Uuid::new_v4().simple());
        let file = Paced::new(disk.create(&name)?);
        Ok(Incoming {
            file: Some((file, SnapshotFile::new(disk, name, true))),
            memory: Vec::new(),
        })
    }

    pub(crate) fn current(&self) -> Option<Snapshot> {
        let newest = self.newest.lock();
        newest.as_ref().map(|(meta, data, _)| Snapshot {
            meta: meta.clone(),
            snapshot: data.clone(),
        })
    }

    /// Reads the newest file, at start. A damaged one is refused, not skipped: the log it covered may be gone.
    pub(crate) fn load(&self) -> Result<Option<Frozen>> {
        let Some(disk) = &self.disk else {
            return Ok(None);
        };
        let mut found = files(&**disk, ".snap")?;
        let Some(name) = found.pop() else { return Ok(None) };
        // A rename that was seen but not synced before the last stop must not be undone by the next.
        disk.sync()
            .map_err(|e| storage(&disk.path(""), format!("can't be synced: {e}")))?;
        let path = disk.path(&name);
        let refused = |error: io::Error| {
            let text = match error.kind() {
                io::ErrorKind::InvalidData => {
                    format!("{error}; nothing was changed: restore a backup into a new directory")
                }
                _ => format!("can't be read: {error}"),
            };
            storage(&path, text)
        };
        let file = SnapshotFile::new(disk, name, false);
        let frozen = file.open().and_then(|file| self.read(file)).map_err(refused)?;
        let bytes = disk.open(&file.name).and_then(|file| file.size()).map_err(refused)?;
        for older in found {
            drop(SnapshotFile::new(disk, older, true));
        }
        *self.newest.lock() = Some((frozen.meta.clone(), SnapshotData::File(file), bytes));
        Ok(Some(frozen))
    }

    /// Writes a snapshot. When it returns, the snapshot is durable and the older one removed. If a newer one was installed
    /// meanwhile, that one stays and this one is removed.
    pub(crate) fn write(&self, frozen: &Frozen) -> io::Result<Snapshot> {
        self.writing.store(true, Ordering::Release);
        let written = self.store(&frozen.meta, |out| write(out, &self.identity, frozen));
        self.writing.store(false, Ordering::Release);
        written
    }

    /// A digest of the bytes that a snapshot of this state has, on whichever member of the group.
    pub(crate) fn digest(&self, frozen: &Frozen) -> io::Result<Bytes> {
        let mut digest = Digest::new();
        write(&mut digest, &self.identity, frozen)?;
        Ok(digest.finish())
    }

    /// Reads a snapshot that another member sent.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if it is damaged, another cluster's, or not the one that was announced.
    pub(crate) fn check(&self, meta: &SnapshotMeta, data: &SnapshotData) -> io::Result<Frozen> {
        let frozen = self.read(data.open()?)?;
        if frozen.meta != *meta {
            return Err(invalid("it is not the snapshot that was announced"));
        }
        Ok(frozen)
    }

    /// Reads the newest snapshot again, which may have been damaged since it was written.
    ///
    /// # Errors
    /// As [`Snapshots::check`].
    pub(crate) fn check_newest(&self) -> io::Result<()> {
        let newest = self.current();
        newest.map_or(Ok(()), |newest| self.check(&newest.meta, &newest.snapshot).map(drop))
    }

    /// Takes a snapshot that another member sent: checked, made durable, and answered as a state.
    pub(crate) fn install(&self, meta: &SnapshotMeta, data: SnapshotData) -> io::Result<Frozen> {
        let frozen = self.check(meta, &data)?;
        match (&self.disk, data) {
            // It was received here. Its bytes are durable, and the same that this member would write.
            (Some(disk), SnapshotData::File(file)) if Arc::ptr_eq(disk, &file.disk) && file.name.ends_with(".new") => {
                let size = disk.open(&file.name)?.size()?;
                self.adopt(disk, meta, &file.name, size)?;
                file.replaced.store(false, Ordering::Release);
            }
            (_, data) => {
                let mut bytes = Vec::new();
                data.open()?.read_to_end(&mut bytes)?;
                self.store(meta, |out| out.write_all(&bytes))?;
            }
        }
        Ok(frozen)
    }

    fn store(&self, meta: &SnapshotMeta, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<Snapshot> {
        let Some(disk) = &self.disk else {
            let mut out = Vec::new();
            write(&mut out)?;
            let size = out.len() as u64;
            return Ok(self.replace(meta, SnapshotData::Memory(out.into()), size));
        };
        let beside = format!("{:020}.new", index(meta));
        let written = durable(&**disk, &beside, write).and_then(|size| self.adopt(disk, meta, &beside, size));
        if written.is_err() {
            // On a full disk its room is the log's. What can't be removed now is at the next start.
            let _ = disk.remove(&beside);
        }
        written
    }

    /// Gives a durable file its name as a snapshot.
    fn adopt(&self, disk: &Arc<dyn Disk>, meta: &SnapshotMeta, beside: &str, size: u64) -> io::Result<Snapshot> {
        let name = format!("{:020}.snap", index(meta));
        disk.rename(beside, &name)?;
        disk.sync()?;
        Ok(self.replace(meta, SnapshotData::File(SnapshotFile::new(disk, name, false)), size))
    }

    fn replace(&self, meta: &SnapshotMeta, data: SnapshotData, size: u64) -> Snapshot {
        let mut newest = self.newest.lock();
        let replaced = match &*newest {
            // openraft builds a snapshot in a task of its own and may install one from the leader meanwhile. Up to the
            // installed one the log is purged, so that one stays and this one is removed.
            Some((than, ..)) if than.last_log_id > meta.last_log_id => Some(data.clone()),
            _ => newest
                .replace((meta.clone(), data.clone(), size))
                .map(|(_, before, _)| before),
        };
        if let (Some(SnapshotData::File(replaced)), Some((_, SnapshotData::File(newest), _))) = (&replaced, &*newest) {
            // Written again for the same place in the log, it is the same file.
            replaced.replaced.store(replaced.name != newest.name, Ordering::Release);
        }
        Snapshot {
            meta: meta.clone(),
            snapshot: data,
        }
    }

    /// Whether there is a snapshot of a later state than that one.
    pub(crate) fn has_newer(&self, than: &SnapshotMeta) -> bool {
        let newest = self.newest.lock();
        newest
            .as_ref()
            .is_some_and(|(meta, ..)| meta.last_log_id > than.last_log_id)
    }

    fn read(&self, from: impl io::Read) -> io::Result<Frozen> {
        let mut tree = Tree::default();
        let read = read(from, |record| {
            tree.insert(Arc::new(record));
        })?;
        if *read.header.cluster != self.identity.cluster {
            return Err(invalid("it is another cluster's"));
        }
        Ok(Frozen {
            meta: SnapshotMeta {
                last_log_id: read.header.last_log_id.map(wire::log_id_from),
                last_membership: wire::stored_membership_from(read.header.membership_log_id, read.header.membership)?,
            },
            tree,
            revision: read.header.revision,
            last_session: read.header.last_session,
            sessions: read.sessions,
            removed: read.header.removed.into_iter().collect(),
        })
    }
}

/// The index of the last entry that a snapshot covers.
fn index(meta: &SnapshotMeta) -> u64 {
    meta.last_log_id.map_or(0, |id| id.index)
}

/// Writes a file that is durable when this returns, but for its name, and answers its size.
fn durable(disk: &dyn Disk, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<u64> {
    let paced = Paced::new(disk.create(name)?);
    let mut out = BufWriter::with_capacity(1 << 20, paced);
    write(&mut out)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?.file;
    file.sync()?;
    Ok(file.written())
}

/// Removes a large file piece by piece: its blocks freed at once would hold up the log's writes.
fn remove(disk: &dyn Disk, name: &str) -> io::Result<()> {
    let file = disk.open(name)?;
    let mut left = file.size()?;
    while left > 0 {
        left = left.saturating_sub(8 * PACE as u64);
        file.truncate(left)?;
        file.sync()?;
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    disk.remove(name)
}

/// A file that is synced as it grows, and written half of the time only. Hundreds of megabytes at once would hold up the
/// log's small writes, which share its disk and its processors.
struct Paced {
    file: disk::Writer,
    unsynced: usize,
    since: Instant,
}

impl Paced {
    fn new(file: Arc<dyn DiskFile>) -> Self {
        Self {
            file: disk::Writer::new(file),
            unsynced: 0,
            since: Instant::now(),
        }
    }
}

impl Write for Paced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.unsynced += written;
        if self.unsynced >= PACE {
            self.file.sync()?;
            std::thread::sleep(self.since.elapsed());
            (self.unsynced, self.since) = (0, Instant::now());
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The files with that ending, by name.
fn files(disk: &dyn Disk, ending: &str) -> Result<Vec<String>> {
    let mut files = disk.list().map_err(|e| storage(&disk.path(""), e.to_string()))?;
    files.retain(|name| name.ends_with(ending));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::command::{Change, Command};
    use crate::proto;
    use crate::types::LogId;

    const IDENTITY: Identity = Identity {
        cluster: [7; 16],
        member: 1,
    };

    fn state() -> State {
        let mut state = State::default();
        state.apply(
            1,
            Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 })),
        );
        for key in 0..2000_u64 {
            let put = proto::Put {
                value: vec![1; 300].into(),
                ephemeral: key % 100 == 0,
                take_over: false,
            };
            let write = Some(proto::operation::Write::Put(put));
            let operations = vec![proto::Operation {
                key: format!("/ns/{key}"),
                write,
            }];
            let change = Some(Change::Txn(proto::Txn {
                conditions: Vec::new(),
                operations,
            }));
            state.apply(
                1,
                Command {
                    session: 1,
                    sequence: key + 1,
                    answered_below: key,
                    level: 0,
                    change,
                },
            );
        }
        state
    }

    fn snapshots(directory: &Path) -> Snapshots {
        Snapshots::open(Some(directory.into()), IDENTITY).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (dir, state) = (tempfile::tempdir().unwrap(), state());
        snapshots(dir.path())
            .write(&Frozen::of(&state, SnapshotMeta::default()))
            .unwrap();
        fs::write(dir.path().join("half.new"), "x").unwrap();
        let (back, _) = snapshots(dir.path()).load().unwrap().unwrap().thaw();
        assert!(back.tree.from("").eq(state.tree.from("")));
        assert_eq!((back.revision, back.last_session), (state.revision, state.last_session));
        assert_eq!(back.sessions, state.sessions);
        assert!(!dir.path().join("half.new").exists());
    }

    fn at(state: &State, index: u64) -> Frozen {
        let meta = SnapshotMeta {
            last_log_id: Some(LogId::new_term_index(1, index)),
            ..SnapshotMeta::default()
        };
        Frozen::of(state, meta)
    }

    /// The log is purged up to the installed snapshot, so a member that starts from an older one can't go on.
    #[test]
    fn a_build_never_replaces_a_newer_snapshot_that_was_installed_meanwhile() {
        for disk in [true, false] {
            let (dir, state) = (tempfile::tempdir().unwrap(), state());
            let directory = disk.then(|| dir.path().to_owned());
            let snapshots = Snapshots::open(directory.clone(), IDENTITY).unwrap();
            let (older, newer) = (at(&state, 100), at(&state, 10_000));
            let index = |snapshots: &Snapshots| snapshots.current().unwrap().meta.last_log_id.unwrap().index;
            let built = snapshots.store(&older.meta, |out| {
                write(out, &IDENTITY, &older)?;
                let mut incoming = snapshots.incoming()?;
                write(&mut incoming, &IDENTITY, &newer)?;
                snapshots.install(&newer.meta, incoming.finish()?).map(drop)
            });
            let built = built.unwrap();
            assert_eq!(built.meta, older.meta);
            assert!(snapshots.has_newer(&older.meta) && !snapshots.has_newer(&newer.meta));
            assert_eq!(index(&snapshots), 10_000);
            drop(built);
            assert!(
                snapshots.current().unwrap().snapshot.open().is_ok(),
                "its file was removed"
            );
            let Some(directory) = directory else { continue };
            let found = Snapshots::open(Some(directory), IDENTITY).unwrap().load().unwrap();
            assert_eq!(found.unwrap().meta, newer.meta);
        }
    }

    #[test]
    fn one_that_can_t_be_written_leaves_nothing() {
        let (dir, state) = (tempfile::tempdir().unwrap(), state());
        let snapshots = snapshots(dir.path());
        let frozen = Frozen::of(&state, SnapshotMeta::default());
        let full = snapshots.store(&frozen.meta, |out| {
            out.write_all(&[1; 5000])?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(snapshots.current().is_none());
    }

    #[test]
    fn a_digest_is_of_everything_that_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let digest = |state: &State| {
            let frozen = Frozen::of(state, SnapshotMeta::default());
            snapshots(dir.path()).digest(&frozen).unwrap()
        };
        let (one, mut other) = (digest(&state()), state());
        assert_eq!(one, digest(&other));
        let put = proto::operation::Write::Put(proto::Put {
            value: vec![2; 300].into(),
            ..proto::Put::default()
        });
        let operations = vec![proto::Operation {
            key: "/ns/7".into(),
            write: Some(put),
        }];
        let conditions = Vec::new();
        let txn = Change::Txn(proto::Txn { conditions, operations });
        other.apply(1, Command::new(txn));
        assert_ne!(one, digest(&other));
        let mut other = state();
        other.last_session += 1;
        assert_ne!(one, digest(&other));
        let mut other = state();
        other
            .sessions
            .values_mut()
            .for_each(|session| Arc::make_mut(session).answered_below += 1);
        assert_ne!(one, digest(&other));
    }

    #[test]
    fn every_damage_is_refused_by_name_and_nothing_deleted() {
        let (dir, state) = (tempfile::tempdir().unwrap(), state());
        snapshots(dir.path())
            .write(&Frozen::of(&state, SnapshotMeta::default()))
            .unwrap();
        let path = dir.path().join("00000000000000000000.snap");
        let good = fs::read(&path).unwrap();
        let refusal = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let error = snapshots(dir.path()).load().expect_err("it was taken").to_string();
            assert!(error.contains(".snap") && error.contains("restore a backup"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
            error
        };
        for at in (0..good.len()).step_by(good.len() / 211) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            refusal(&bad);
            refusal(&good[..at]);
        }
        assert!(refusal(&[&good[..8], &9_u32.to_le_bytes(), &good[12..]].concat()).contains("format is 9"));
        fs::write(&path, &good).unwrap();
        let other = Snapshots::open(
            Some(dir.path().into()),
            Identity {
                cluster: [8; 16],
                member: 1,
            },
        )
        .unwrap();
        assert!(other.load().unwrap_err().to_string().contains("another cluster's"));
    }
}
