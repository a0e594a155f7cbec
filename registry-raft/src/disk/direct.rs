//! Writes past the page cache: what is synced at once gains nothing by a copy there, whose pages have to be found, marked
//! and waited for one by one.
//!
//! `O_DIRECT` takes whole blocks, from memory that begins where one may (open(2)): what is around the bytes is written once
//! more with them. Reads go through the cache; Linux drops from it what is written past it.

use std::io;

use parking_lot::Mutex;

use super::DiskFile;

/// What is written is whole pages: of no file system that takes `O_DIRECT` here is a block larger.
pub(crate) const PAGE: u64 = 4 << 10;

/// How much of the last write is kept in memory: an append begins in its last page, or in the one before.
const KEPT: usize = 2 * PAGE as usize;

/// One file, opened twice. Where the second way is refused at the first write, as a file system may, all goes the first.
#[derive(Debug)]
pub(super) struct Direct<F> {
    cached: F,
    direct: F,
    last: Mutex<Last>,
}

/// The end of what was written last.
#[derive(Debug, Default)]
struct Last {
    at: u64,
    bytes: Vec<u8>,
    refused: bool,
}

impl Last {
    /// Whether it has what is in the file at that place; if so, the bytes are that.
    fn read(&self, bytes: &mut [u8], at: u64) -> bool {
        let skip = at.checked_sub(self.at).and_then(|skip| usize::try_from(skip).ok());
        let known = skip.and_then(|skip| self.bytes.get(skip..)?.get(..bytes.len()));
        known.is_some_and(|known| {
            bytes.copy_from_slice(known);
            true
        })
    }

    fn keep(&mut self, pages: &Pages) {
        let (gone, kept) = pages.bytes().split_at(pages.length.saturating_sub(KEPT));
        self.at = pages.at + gone.len() as u64;
        self.bytes.extend_from_slice(kept);
    }
}

/// Whole pages of a file, in memory that begins where a page may.
struct Pages {
    room: Vec<u8>,
    skip: usize,
    length: usize,
    at: u64,
}

impl Pages {
    /// Those around that part of the file, of zeros.
    fn around(start: u64, end: u64) -> io::Result<Self> {
        let at = start - start % PAGE;
        let length = usize::try_from(end.next_multiple_of(PAGE) - at).map_err(io::Error::other)?;
        let room = vec![0; length + PAGE as usize];
        let skip = room.as_ptr().align_offset(PAGE as usize);
        Ok(Self { room, skip, length, at })
    }

    fn bytes(&self) -> &[u8] {
        &self.room[self.skip..][..self.length]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.room[self.skip..][..self.length]
    }
}

impl<F: DiskFile> Direct<F> {
    pub(super) fn new(cached: F, direct: F) -> Self {
        let last = Mutex::default();
        Self { cached, direct, last }
    }

    /// The bytes, with what the file has around them.
    fn pages(&self, last: &Last, bytes: &[u8], offset: u64) -> io::Result<Pages> {
        let end = offset + bytes.len() as u64;
        let mut pages = Pages::around(offset, end)?;
        let start = pages.at;
        let before = usize::try_from(offset - start).map_err(io::Error::other)?;
        let (before, rest) = pages.bytes_mut().split_at_mut(before);
        let (new, after) = rest.split_at_mut(bytes.len());
        if !last.read(before, start) {
            self.read_there(before, start)?;
        }
        new.copy_from_slice(bytes);
        self.read_there(after, end)?;
        Ok(pages)
    }

    /// Reads as much as there is.
    fn read_there(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let there = usize::try_from(self.cached.size()?.saturating_sub(at)).map_err(io::Error::other)?;
        match bytes.len().min(there) {
            0 => Ok(()),
            length => self.cached.read_at(&mut bytes[..length], at),
        }
    }
}

impl<F: DiskFile> DiskFile for Direct<F> {
    fn size(&self) -> io::Result<u64> {
        self.cached.size()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.cached.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut last = self.last.lock();
        if last.refused {
            return self.cached.write_at(bytes, offset);
        }
        let pages = self.pages(&last, bytes, offset)?;
        // What is there is not known any more, if this fails.
        last.bytes.clear();
        match self.direct.write_at(pages.bytes(), pages.at) {
            Ok(()) => {
                last.keep(&pages);
                Ok(())
            }
            // Blocks that are larger than a page, or a file that only looked as if it could.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                last.refused = true;
                self.cached.write_at(bytes, offset)
            }
            Err(error) => Err(error),
        }
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.last.lock().bytes.clear();
        self.cached.truncate(length)
    }

    fn sync(&self) -> io::Result<()> {
        // Both ways lead to one file.
        self.cached.sync()
    }
}

/// What `O_DIRECT` asks of a write, with the largest of blocks.
#[cfg(test)]
pub(super) fn assert_whole_pages(bytes: &[u8], offset: u64) {
    let all = [offset, bytes.len() as u64, bytes.as_ptr().addr() as u64];
    assert!(
        all.iter().all(|part| part.is_multiple_of(PAGE)),
        "no whole pages: {all:?}"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use registry_tests::Dice;

    use super::*;
    use crate::disk::{Disk, Folder};

    /// What the next write past the cache comes to.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    enum Write {
        #[default]
        Done,
        /// It fails when half is written.
        Torn,
        Refused,
    }

    /// One of the two ways to a file in memory.
    #[derive(Debug)]
    struct Memory {
        bytes: Arc<Mutex<Vec<u8>>>,
        next: Option<Arc<Mutex<Write>>>,
    }

    impl DiskFile for Memory {
        fn size(&self) -> io::Result<u64> {
            Ok(self.bytes.lock().len() as u64)
        }

        fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
            bytes.copy_from_slice(&self.bytes.lock()[offset as usize..][..bytes.len()]);
            Ok(())
        }

        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            let outcome = self.next.as_ref().map(|next| *next.lock()).unwrap_or_default();
            let written = match outcome {
                Write::Done => bytes.len(),
                Write::Torn => bytes.len() / 2,
                Write::Refused => return Err(io::ErrorKind::InvalidInput.into()),
            };
            if self.next.is_some() {
                assert_whole_pages(bytes, offset);
            }
            put(&mut self.bytes.lock(), &bytes[..written], offset as usize);
            match outcome {
                Write::Torn => Err(io::Error::other("half is written")),
                _ => Ok(()),
            }
        }

        fn truncate(&self, length: u64) -> io::Result<()> {
            self.bytes.lock().truncate(length as usize);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn put(to: &mut Vec<u8>, bytes: &[u8], at: usize) {
        to.resize(to.len().max(at + bytes.len()), 0);
        to[at..][..bytes.len()].copy_from_slice(bytes);
    }

    fn all(file: &dyn DiskFile) -> Vec<u8> {
        let mut bytes = vec![0; file.size().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// One random write, most of them where the one before ended, or now and then a cut; `model` is what the file is then.
    fn step(file: &dyn DiskFile, model: &mut Vec<u8>, end: &mut usize, dice: &mut Dice) -> io::Result<()> {
        let page = PAGE as usize;
        if dice.roll(20) == 0 {
            *end = dice.pick(model.len() + 1);
            model.truncate(*end);
            return file.truncate(*end as u64);
        }
        let at = match dice.roll(4) {
            0 => dice.pick(model.len() + page),
            _ => *end,
        };
        let most = [20, page, 4 * page][dice.pick(3)];
        let bytes = vec![dice.roll(256) as u8; 1 + dice.pick(most)];
        *end = at + bytes.len();
        put(model, &bytes, at);
        file.write_at(&bytes, at as u64)?;
        file.sync()
    }

    /// The file is what it should be, and zeros to the end of a page.
    fn check(file: &dyn DiskFile, model: &[u8]) {
        let found = all(file);
        assert!(found.len() >= model.len() && found.len() <= model.len().next_multiple_of(PAGE as usize));
        let (written, rest) = found.split_at(model.len());
        let wrong = written
            .iter()
            .zip(model)
            .position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "the first byte that is wrong");
        assert!(rest.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_is_written_is_what_is_there_on_whatever_file_system() {
        let mut dice = Dice::of_run();
        let temporary = [tempfile::tempdir(), tempfile::tempdir_in("/dev/shm")];
        for directory in temporary {
            let directory = directory.unwrap();
            let folder = Folder(directory.path().into());
            let mut model = vec![7; dice.pick(3 * PAGE as usize)];
            folder.create("file").unwrap().write_at(&model, 0).unwrap();
            let mut end = model.len();
            for _ in 0..10 {
                let file = folder.open_direct("file").unwrap();
                for _ in 0..30 {
                    step(&*file, &mut model, &mut end, &mut dice).unwrap();
                    check(&*file, &model);
                }
            }
            check(&*folder.open("file").unwrap(), &model);
        }
    }

    #[test]
    fn a_write_that_is_refused_goes_through_the_cache_and_one_that_fails_leaves_what_there_is() {
        let mut dice = Dice::of_run();
        for _ in 0..Dice::tries(50) {
            let (bytes, next) = (Arc::default(), Arc::new(Mutex::default()));
            let way = |next| Memory {
                bytes: Arc::clone(&bytes),
                next,
            };
            let file = Direct::new(way(None), way(Some(next.clone())));
            let (mut model, mut end) = (Vec::new(), 0);
            let refused = dice.pick(60);
            for round in 0..40 {
                *next.lock() = match dice.roll(10) {
                    _ if round >= refused => Write::Refused,
                    0 => Write::Torn,
                    _ => Write::Done,
                };
                if let Err(error) = step(&file, &mut model, &mut end, &mut dice) {
                    assert_eq!((round < refused, error.kind()), (true, io::ErrorKind::Other));
                    model = all(&file);
                }
                check(&file, &model);
            }
        }
    }
}
