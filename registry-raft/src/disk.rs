//! What log and snapshots need of a disk: one directory of files. Tests put one beneath them that loses power.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use crate::directory::owned;

mod direct;
#[cfg(test)]
pub(crate) mod faulty;

use direct::Direct;
pub(crate) use direct::PAGE;

pub(crate) trait Disk: Debug + Send + Sync {
    fn list(&self) -> io::Result<Vec<String>>;

    /// Makes an empty file, or empties it.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens a file whose writes go past the page cache, where that can be.
    fn open_direct(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file. Who has it open still reads it.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes what was created, renamed and removed durable.
    fn sync(&self) -> io::Result<()>;

    /// What an error calls the file.
    fn path(&self, name: &str) -> PathBuf;
}

pub(crate) trait DiskFile: Debug + Send + Sync {
    fn size(&self) -> io::Result<u64>;

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Cuts off what is beyond that length.
    fn truncate(&self, length: u64) -> io::Result<()>;

    /// Makes what was written durable: `fdatasync`.
    fn sync(&self) -> io::Result<()>;
}

/// Reads a file from its beginning to its end.
pub(crate) struct Reader {
    file: Arc<dyn DiskFile>,
    at: u64,
    size: u64,
}

impl Reader {
    pub(crate) fn new(file: Arc<dyn DiskFile>) -> io::Result<Self> {
        let size = file.size()?;
        Ok(Self { file, at: 0, size })
    }
}

impl io::Read for Reader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size - self.at).unwrap_or(usize::MAX);
        let count = left.min(bytes.len());
        self.file.read_at(&mut bytes[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Writes a file from its beginning.
pub(crate) struct Writer {
    file: Arc<dyn DiskFile>,
    written: u64,
}

impl Writer {
    pub(crate) fn new(file: Arc<dyn DiskFile>) -> Self {
        Self { file, written: 0 }
    }

    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(bytes, self.written)?;
        self.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How a file is opened whose writes go past the page cache.
#[cfg(target_os = "linux")]
const DIRECT: Option<i32> = Some(rustix::fs::OFlags::DIRECT.bits().cast_signed());
#[cfg(not(target_os = "linux"))]
const DIRECT: Option<i32> = None;

/// A directory of the operating system's.
#[derive(Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    fn file(&self, name: &str, flags: i32) -> io::Result<File> {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(flags).open(self.path(name))
    }
}

impl Disk for Folder {
    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.0)?.map(|file| Ok(file?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(true).read(true).write(true);
        Ok(Arc::new(owned(self.path(name), &mut options)?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(self.file(name, 0)?))
    }

    fn open_direct(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        match DIRECT.map(|flags| self.file(name, flags)) {
            Some(Ok(direct)) => Ok(Arc::new(Direct::new(self.file(name, 0)?, direct))),
            // A file system that has no such thing says so in this way.
            Some(Err(error)) if error.kind() != io::ErrorKind::InvalidInput => Err(error),
            _ => self.open(name),
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl DiskFile for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
