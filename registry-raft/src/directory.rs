//! A member's data directory: whose it is, and that nobody else has it open.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use registry_api::{Error, Result};
use rustix::fs::{FlockOperation, flock};

use crate::disk::{self, Disk, Folder};
use crate::log::{Identity, has_segments};

const FORMAT: u32 = 1;
const IDENTITY: &str = "identity";
const BESIDE: &str = "identity.new";
/// How the file begins.
const FORMAT_LINE: &str = "registry-raft ";
/// All that a member makes in its directory. The root of a file system has `lost+found` from the beginning.
const OWN: [&str; 6] = [IDENTITY, BESIDE, "lock", "log", "snapshots", "lost+found"];
/// How long a member that was dropped may take to let go of its directory.
const LET_GO: Duration = Duration::from_secs(2);

/// An open data directory. Dropping it lets another process open it.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    label: LabelFile,
    _lock: File,
}

/// What the file says that tells whose the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Label {
    identity: Identity,
    founded: bool,
    /// The group has gone on without it, for good.
    removed: bool,
}

impl Directory {
    /// Opens the directory, or makes it, for its owner only: a new one is that of `first`.
    pub(crate) fn open(path: &Path, member: &str, first: impl FnOnce() -> Identity) -> Result<Self> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| storage(path, format!("{what}: {error}"))
        };
        refuse_foreign(path)?;
        made(path).map_err(failed("can't be made"))?;
        let lock = owned(
            path.join("lock"),
            OpenOptions::new().create(true).truncate(false).write(true),
        );
        let lock = lock.map_err(failed("can't be locked"))?;
        match lock_within(&lock, LET_GO) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(storage(
                    path,
                    "another process has this directory open; stop it, or use its address in `endpoints`".into(),
                ));
            }
            Err(error) => return Err(failed("can't be locked")(error.into())),
        }
        for part in ["log", "snapshots"] {
            made(&path.join(part)).map_err(failed("can't be made"))?;
        }
        let file = LabelFile::open(Arc::new(Folder(path.into())), member, || {
            refuse_orphans(path)?;
            Ok(first())
        })?;
        let label = file.label();
        if label.removed {
            return Err(storage(path, removed_for_good(member)));
        }
        // What else is in there, such as the file of the next segment, holds no record.
        let log = Folder(path.join("log"));
        if label.founded && !has_segments(&log).map_err(failed("can't be read"))? {
            return Err(storage(
                &log.0,
                "the log is gone: there is no file wal-*.log, though the member's group was founded; nothing was changed: \
                 put the files back from a copy, or restore a backup into a new directory"
                    .into(),
            ));
        }
        Ok(Self {
            path: path.into(),
            label: file,
            _lock: lock,
        })
    }

    pub(crate) fn identity(&self) -> Identity {
        self.label.label().identity
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    /// Notes that the log is made: from now on a log without segments is a loss, not a beginning. To be called before the
    /// member votes for, or acknowledges, anything.
    pub(crate) fn founded(&self) -> Result<()> {
        self.label.note(|label| label.founded = true)
    }

    /// Notes which group it is in.
    pub(crate) fn belongs_to(&self, cluster: [u8; 16]) -> Result<()> {
        self.label.note(|label| label.identity.cluster = cluster)
    }

    /// Notes that the group has removed this member: it never starts again.
    pub(crate) fn removed(&self) -> Result<()> {
        self.label.note(|label| label.removed = true)
    }
}

/// The file that says whose the directory is.
#[derive(Debug)]
struct LabelFile {
    disk: Arc<dyn Disk>,
    member: String,
    label: Mutex<Label>,
}

impl LabelFile {
    /// Reads the file, or writes that of a new directory.
    fn open(disk: Arc<dyn Disk>, member: &str, first: impl FnOnce() -> Result<Identity>) -> Result<Self> {
        let file = disk.path(IDENTITY);
        let unreadable = |error: io::Error| storage(&file, format!("can't be read: {error}"));
        let there = disk.list().map_err(unreadable)?;
        let label = match there.iter().any(|name| name == IDENTITY) {
            true => {
                let mut text = String::new();
                disk.open(IDENTITY)
                    .and_then(disk::Reader::new)
                    .and_then(|mut file| file.read_to_string(&mut text))
                    .map_err(unreadable)?;
                let label = parse(&file, &text, member)?;
                // A rename that was seen but not synced before the last stop must not be undone by the next.
                disk.sync()
                    .map_err(|error| storage(&file, format!("can't be synced: {error}")))?;
                label
            }
            false => {
                let label = Label {
                    identity: first()?,
                    founded: false,
                    removed: false,
                };
                write(&*disk, &label, member)?;
                label
            }
        };
        Ok(Self {
            disk,
            member: member.into(),
            label: Mutex::new(label),
        })
    }

    fn label(&self) -> Label {
        *self.label.lock()
    }

    fn note(&self, change: impl FnOnce(&mut Label)) -> Result<()> {
        let mut label = self.label.lock();
        let mut changed = *label;
        change(&mut changed);
        if changed != *label {
            write(&*self.disk, &changed, &self.member)?;
            *label = changed;
        }
        Ok(())
    }
}

/// Takes the lock, at the latest when a member that just ended has let go of it.
fn lock_within(lock: &File, patience: Duration) -> rustix::io::Result<()> {
    let until = Instant::now() + patience;
    loop {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            taken => return taken,
        }
    }
}

/// Refuses a directory that is not a data directory and not empty, before anything is written there.
fn refuse_foreign(path: &Path) -> Result<()> {
    let file = path.join(IDENTITY);
    match fs::read(&file) {
        // What else is beside an identity is its owner's affair.
        Ok(text) if text.starts_with(FORMAT_LINE.as_bytes()) => return Ok(()),
        Ok(text) if !text.is_empty() => return Err(damaged(&file)),
        _ => {}
    }
    let failed = |error: io::Error| storage(path, format!("can't be read: {error}"));
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if !OWN.iter().any(|own| name == *own) {
            let reason = format!(
                "it is no data directory: {name:?} is in it; set registry.raft.data_dir to a new directory, or to an empty one"
            );
            return Err(storage(path, reason));
        }
    }
    Ok(())
}

/// Files without an identity are somebody's data that lost its label.
fn refuse_orphans(path: &Path) -> Result<()> {
    for part in ["log", "snapshots"] {
        let part = path.join(part);
        if !is_empty(&part).map_err(|error| storage(&part, error.to_string()))? {
            let reason = format!(
                "there is data, but {IDENTITY} is missing that says whose; put it back, or use an empty directory"
            );
            return Err(storage(&part, reason));
        }
    }
    Ok(())
}

fn is_empty(path: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(path)?.next().is_none())
}

/// The file is text, for people too: a format line, the cluster, the member, and a checksum of the lines above.
fn text(label: &Label, name: &str) -> String {
    let mut body = format!(
        "{FORMAT_LINE}{FORMAT}\ncluster {}\nmember {} {name}\nfounded {}\n",
        uuid::Uuid::from_bytes(label.identity.cluster).simple(),
        label.identity.member,
        label.founded,
    );
    if label.removed {
        body.push_str("removed true\n");
    }
    let checksum = crc32fast::hash(body.as_bytes());
    format!("{body}checksum {checksum:08x}\n")
}

fn damaged(file: &Path) -> Error {
    storage(
        file,
        "it is damaged; put it back from a copy, or restore a backup into a new directory".into(),
    )
}

fn parse(file: &Path, text: &str, member: &str) -> Result<Label> {
    let damaged = || damaged(file);
    if let Some(format) = text.strip_prefix(FORMAT_LINE).and_then(|rest| rest.lines().next())
        && format.parse::<u32>().is_ok_and(|format| format > FORMAT)
    {
        let reason =
            format!("its format is {format}, this version reads {FORMAT} at most; use the version that wrote it");
        return Err(storage(file, reason));
    }
    let (body, checksum) = text.trim_end().rsplit_once('\n').ok_or_else(damaged)?;
    let checksum = checksum
        .strip_prefix("checksum ")
        .and_then(|hex| u32::from_str_radix(hex, 16).ok());
    if checksum != Some(crc32fast::hash(format!("{body}\n").as_bytes())) {
        return Err(damaged());
    }
    let field = |name: &str| body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let cluster = field("cluster")
        .and_then(|hex| uuid::Uuid::try_parse(hex).ok())
        .ok_or_else(damaged)?;
    let (id, name) = field("member")
        .and_then(|line| line.split_once(' '))
        .ok_or_else(damaged)?;
    let id = id.parse().map_err(|_| damaged())?;
    let founded = field("founded").ok_or_else(damaged)? == "true";
    if name != member {
        return Err(storage(
            file,
            format!(
                "the directory belongs to member {name:?}, not {member:?}; set registry.raft.member, or another data_dir"
            ),
        ));
    }
    Ok(Label {
        identity: Identity {
            cluster: cluster.into_bytes(),
            member: id,
        },
        founded,
        removed: field("removed") == Some("true"),
    })
}

/// Writes the file, durably: a loss of power leaves the old one or the new one.
fn write(disk: &dyn Disk, label: &Label, member: &str) -> Result<()> {
    // A half-written file of an earlier attempt must not get the name.
    let cleared = disk
        .list()
        .and_then(|there| match there.iter().any(|name| name == BESIDE) {
            true => disk.remove(BESIDE).and_then(|()| disk.sync()),
            false => Ok(()),
        });
    let written = cleared.and_then(|()| disk.create(BESIDE)).and_then(|file| {
        file.write_at(text(label, member).as_bytes(), 0)?;
        file.sync()?;
        disk.rename(BESIDE, IDENTITY)?;
        disk.sync()
    });
    written.map_err(|error| storage(&disk.path(IDENTITY), format!("can't be written: {error}")))
}

/// Makes a directory that only its owner may read, durably, unless it exists. The mode of one that exists is its owner's
/// affair, who may be another user, as with a volume that Kubernetes mounts with `fsGroup`.
fn made(path: &Path) -> io::Result<()> {
    let missing: Vec<_> = path.ancestors().take_while(|above| !above.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    // Each is an entry of the one above it, which a loss of power would take with all that it holds.
    for made in missing {
        File::open(parent(made))?.sync_all()?;
    }
    Ok(())
}

/// The directory that a file or directory is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Opens a file that only its owner may read.
pub(crate) fn owned(path: PathBuf, options: &mut OpenOptions) -> io::Result<File> {
    options.mode(0o600).open(path)
}

/// What is said of a member that was removed, by its directory or by the group.
pub(crate) fn removed_for_good(member: &str) -> String {
    format!("member {member:?} was removed from its group; to come back, join with an empty directory")
}

pub(crate) fn storage(place: &Path, reason: String) -> Error {
    Error::Storage {
        place: place.display().to_string(),
        reason,
    }
}

#[cfg(test)]
mod power;

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(result: Result<Directory>) -> String {
        result.expect_err("it was taken").to_string()
    }

    #[test]
    fn is_one_members_and_one_processs() {
        let dir = tempfile::tempdir().unwrap();
        let open = Directory::open(dir.path(), "a", Identity::random).unwrap();
        assert!(refusal(Directory::open(dir.path(), "a", Identity::random)).contains("another process"));
        let identity = open.identity();
        drop(open);
        assert_eq!(
            Directory::open(dir.path(), "a", Identity::random).unwrap().identity(),
            identity
        );
        assert!(refusal(Directory::open(dir.path(), "b", Identity::random)).contains("belongs to member \"a\""));
    }

    #[test]
    fn damage_and_newer_formats_are_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(Directory::open(dir.path(), "a", Identity::random).unwrap());
        let file = dir.path().join(IDENTITY);
        let good = fs::read_to_string(&file).unwrap();
        let cases = [
            (good.replace("registry-raft 1", "registry-raft 2"), "format is 2"),
            (good.replace("member 1", "member 7"), "damaged"),
            (good[..good.len() / 2].to_owned(), "damaged"),
            (String::new(), "damaged"),
        ];
        for (text, why) in cases {
            fs::write(&file, &text).unwrap();
            assert!(
                refusal(Directory::open(dir.path(), "a", Identity::random)).contains(why),
                "{text:?}"
            );
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
    }

    #[test]
    fn a_directory_with_other_files_is_refused_and_left_as_it_is() {
        use std::os::unix::fs::PermissionsExt;
        for name in ["notes.txt", ".hidden", "identity"] {
            let dir = tempfile::tempdir().unwrap();
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
            fs::write(dir.path().join(name), "another program's\n").unwrap();
            let said = refusal(Directory::open(dir.path(), "a", Identity::random));
            assert!(said.contains(name), "{said}");
            let left: Vec<_> = fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            assert_eq!(left, [name]);
            assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o7777, 0o1777);
        }
    }

    #[test]
    fn the_mode_of_an_empty_directory_stays_and_all_in_it_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o775)).unwrap();
        fs::create_dir(dir.path().join("lost+found")).unwrap();
        for _ in 0..2 {
            drop(Directory::open(dir.path(), "a", Identity::random).unwrap());
            assert_eq!(mode(dir.path()), 0o775);
            for part in ["log", "snapshots", "identity", "lock"] {
                assert_eq!(mode(&dir.path().join(part)) & 0o077, 0, "{part}");
            }
        }
        let new = dir.path().join("lost+found/new/data");
        drop(Directory::open(&new, "a", Identity::random).unwrap());
        assert_eq!(mode(&new), 0o700);
    }

    #[test]
    fn a_lost_log_is_no_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let open = Directory::open(dir.path(), "a", Identity::random).unwrap();
        open.founded().unwrap();
        drop(open);
        let gone = || refusal(Directory::open(dir.path(), "a", Identity::random));
        assert!(gone().contains("the log is gone"));
        // What is beside the segments is no log.
        for beside in ["wal-next", "wal-spare-0000000000000001", "other", "wal-x.log"] {
            fs::write(dir.path().join("log").join(beside), "x").unwrap();
            assert!(gone().contains("the log is gone"), "with {beside}");
        }
        fs::write(dir.path().join("log/wal-0000000000000001.log"), "x").unwrap();
        drop(Directory::open(dir.path(), "a", Identity::random).unwrap());
        fs::remove_file(dir.path().join(IDENTITY)).unwrap();
        assert!(refusal(Directory::open(dir.path(), "a", Identity::random)).contains("identity is missing"));
    }
}
