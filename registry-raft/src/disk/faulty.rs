//! A disk in memory that loses power, fails and fills up.
//!
//! What was written and not synced may be there after the power went, or not, each sector of 512 bytes for itself; so may
//! each change of the directory. After a failed sync the data looks written and is not, and the next sync succeeds, as on
//! Linux.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use registry_tests::Dice;

use super::direct::{Direct, assert_whole_pages};
use super::{Disk, DiskFile};

const SECTOR: usize = 512;

#[derive(Clone, Debug, Default)]
pub(crate) struct Faulty(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    directory: Mutex<Directory>,
    /// How many changes are left before the power goes.
    left: AtomicU64,
    /// How many bytes there is room for.
    room: AtomicU64,
    /// Whether every sync of a file is held up.
    held: (Mutex<bool>, Condvar),
    failing: AtomicU64,
    /// How many reads are left before one that fails.
    reads_left: AtomicU64,
    refuses_direct: AtomicBool,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            directory: Mutex::default(),
            left: AtomicU64::new(u64::MAX),
            room: AtomicU64::new(u64::MAX),
            held: Default::default(),
            failing: AtomicU64::new(0),
            reads_left: AtomicU64::new(u64::MAX),
            refuses_direct: AtomicBool::new(false),
        }
    }
}

type Files = BTreeMap<String, Arc<Mutex<Content>>>;

#[derive(Debug, Default)]
struct Directory {
    seen: Files,
    durable: Files,
    pending: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Create(String, Arc<Mutex<Content>>),
    Rename(String, String),
    Remove(String),
}

impl Change {
    fn apply(&self, files: &mut Files) {
        match self {
            Self::Create(name, content) => drop(files.insert(name.clone(), content.clone())),
            Self::Rename(from, to) => {
                if let Some(content) = files.remove(from) {
                    files.insert(to.clone(), content);
                }
            }
            Self::Remove(name) => drop(files.remove(name)),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(usize, Piece)>,
}

#[derive(Clone, Debug)]
enum Piece {
    Bytes(Vec<u8>),
    /// Nothing is beyond.
    End,
}

fn write(to: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if to.len() < offset + bytes.len() {
        to.resize(offset + bytes.len(), 0);
    }
    to[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl Faulty {
    /// The power goes after that many changes.
    pub(crate) fn cut_after(&self, changes: u64) {
        self.0.left.store(changes, Ordering::SeqCst);
    }

    pub(crate) fn is_off(&self) -> bool {
        self.0.left.load(Ordering::SeqCst) == 0
    }

    /// The next syncs of files fail.
    pub(crate) fn fail_syncs(&self, syncs: u64) {
        self.0.failing.store(syncs, Ordering::SeqCst);
    }

    /// After so many reads one fails, and those after it do not.
    pub(crate) fn fail_read_after(&self, reads: u64) {
        self.0.reads_left.store(reads, Ordering::SeqCst);
    }

    /// Whether the read that was to fail has failed.
    pub(crate) fn has_failed_a_read(&self) -> bool {
        self.0.reads_left.load(Ordering::SeqCst) == u64::MAX
    }

    /// It opens files as if they could be written past the cache, and takes no such write.
    pub(crate) fn refuse_direct(&self) {
        self.0.refuses_direct.store(true, Ordering::SeqCst);
    }

    pub(crate) fn limit(&self, bytes: u64) {
        self.0.room.store(bytes, Ordering::SeqCst);
    }

    /// No sync of a file ends before [`Faulty::let_syncs_go`].
    pub(crate) fn hold_syncs(&self) {
        *self.0.held.0.lock() = true;
    }

    pub(crate) fn let_syncs_go(&self) {
        *self.0.held.0.lock() = false;
        self.0.held.1.notify_all();
    }

    /// The files as they are seen.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let directory = self.0.directory.lock();
        let files = directory.seen.iter();
        files
            .map(|(name, content)| (name.clone(), content.lock().seen.clone()))
            .collect()
    }

    pub(crate) fn used(&self) -> u64 {
        self.files().values().map(|bytes| bytes.len() as u64).sum()
    }

    /// The disk after the process was killed: all that was written is seen, and no more durable than before.
    pub(crate) fn killed(&self) -> Self {
        self.cut_after(0);
        let directory = self.0.directory.lock();
        let mut copies = BTreeMap::new();
        let mut copy = |content: &Arc<Mutex<Content>>| {
            let new = || Arc::new(Mutex::new(content.lock().clone()));
            copies.entry(Arc::as_ptr(content).addr()).or_insert_with(new).clone()
        };
        let mut all = |files: &Files| {
            files
                .iter()
                .map(|(name, content)| (name.clone(), copy(content)))
                .collect()
        };
        let (seen, durable) = (all(&directory.seen), all(&directory.durable));
        let pending = directory.pending.iter().map(|change| match change {
            Change::Create(name, content) => Change::Create(name.clone(), copy(content)),
            Change::Rename(from, to) => Change::Rename(from.clone(), to.clone()),
            Change::Remove(name) => Change::Remove(name.clone()),
        });
        let pending = pending.collect();
        Self(Arc::new(Shared {
            directory: Mutex::new(Directory { seen, durable, pending }),
            ..Shared::default()
        }))
    }

    /// The disk after the power went: what was not synced is there as the dice have it.
    pub(crate) fn without_power(&self, dice: &mut Dice) -> Self {
        self.cut_after(0);
        let directory = self.0.directory.lock();
        // Now and then all of it, or none.
        let kept = dice.roll(5);
        let mut is_kept = || dice.roll(4) < kept;
        let mut files = directory.durable.clone();
        for change in &directory.pending {
            if is_kept() {
                change.apply(&mut files);
            }
        }
        let files: Files = files
            .into_iter()
            .map(|(name, content)| {
                let content = content.lock();
                let mut durable = content.durable.clone();
                for (offset, piece) in &content.pending {
                    let Piece::Bytes(bytes) = piece else {
                        if is_kept() {
                            durable.truncate(*offset);
                        }
                        continue;
                    };
                    let mut at = 0;
                    while at < bytes.len() {
                        let end = bytes.len().min(at + SECTOR - (offset + at) % SECTOR);
                        if is_kept() {
                            write(&mut durable, offset + at, &bytes[at..end]);
                        }
                        at = end;
                    }
                }
                let content = Content {
                    seen: durable.clone(),
                    durable,
                    pending: Vec::new(),
                };
                (name, Arc::new(Mutex::new(content)))
            })
            .collect();
        Self(Arc::new(Shared {
            directory: Mutex::new(Directory {
                seen: files.clone(),
                durable: files,
                pending: Vec::new(),
            }),
            ..Shared::default()
        }))
    }

    fn open(&self, name: &str) -> io::Result<OpenFile> {
        let content = self.0.directory.lock().seen.get(name).cloned();
        Ok(OpenFile {
            content: content.ok_or(io::ErrorKind::NotFound)?,
            disk: self.clone(),
            way: Way::Cached,
        })
    }

    /// Whether the power is still there; the change that takes the last of it does not end well.
    fn spend(&self) -> io::Result<()> {
        let spend = |left: u64| left.checked_sub(u64::from(left != u64::MAX));
        match self.0.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend) {
            Ok(1) | Err(_) => Err(io::Error::other("the power went")),
            Ok(_) => Ok(()),
        }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        if self.is_off() {
            return Err(io::Error::other("the power went"));
        }
        let mut directory = self.0.directory.lock();
        change.apply(&mut directory.seen);
        directory.pending.push(change);
        self.spend()
    }
}

impl Disk for Faulty {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.directory.lock().seen.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.change(Change::Create(name.into(), Arc::default()))?;
        Ok(Arc::new(self.open(name)?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(Faulty::open(self, name)?))
    }

    fn open_direct(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let cached = Faulty::open(self, name)?;
        let direct = OpenFile {
            way: Way::Direct,
            ..Faulty::open(self, name)?
        };
        Ok(Arc::new(Direct::new(cached, direct)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.open(from)?;
        self.change(Change::Rename(from.into(), to.into()))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.open(name)?;
        self.change(Change::Remove(name.into()))
    }

    fn sync(&self) -> io::Result<()> {
        self.spend()?;
        let mut directory = self.0.directory.lock();
        directory.durable = directory.seen.clone();
        directory.pending.clear();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("faulty").join(name)
    }
}

#[derive(Debug)]
struct OpenFile {
    content: Arc<Mutex<Content>>,
    disk: Faulty,
    way: Way,
}

#[derive(Debug, PartialEq)]
enum Way {
    Cached,
    Direct,
}

impl DiskFile for OpenFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.content.lock().seen.len() as u64)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let next = |left: u64| (left != u64::MAX).then(|| left.wrapping_sub(1));
        let left = &self.disk.0.reads_left;
        if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next) == Ok(0) {
            return Err(io::Error::other("the read failed"));
        }
        let content = self.content.lock();
        let found = content.seen.get(offset as usize..offset as usize + bytes.len());
        bytes.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.disk.is_off() {
            return Err(io::Error::other("the power went"));
        }
        if self.way == Way::Direct {
            if self.disk.0.refuses_direct.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            assert_whole_pages(bytes, offset);
        }
        let grows = (offset + bytes.len() as u64).saturating_sub(self.size()?);
        if grows > 0 && self.disk.used() + grows > self.disk.0.room.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut content = self.content.lock();
        write(&mut content.seen, offset as usize, bytes);
        content.pending.push((offset as usize, Piece::Bytes(bytes.to_vec())));
        self.disk.spend()
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        if self.disk.is_off() {
            return Err(io::Error::other("the power went"));
        }
        let mut content = self.content.lock();
        content.seen.truncate(length as usize);
        content.pending.push((length as usize, Piece::End));
        self.disk.spend()
    }

    fn sync(&self) -> io::Result<()> {
        let (held, go) = &self.disk.0.held;
        go.wait_while(&mut held.lock(), |held| *held);
        self.disk.spend()?;
        let mut content = self.content.lock();
        let failing = &self.disk.0.failing;
        if failing
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok()
        {
            content.pending.clear();
            return Err(io::Error::other("the sync failed"));
        }
        for (offset, piece) in std::mem::take(&mut content.pending) {
            match piece {
                Piece::Bytes(bytes) => write(&mut content.durable, offset, &bytes),
                Piece::End => content.durable.truncate(offset),
            }
        }
        Ok(())
    }
}
