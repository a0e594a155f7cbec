//! What a run uses, from time to time: it must stay level, however long the run.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Run;
use crate::Members;

/// How often is looked.
const EVERY: Duration = Duration::from_secs(5);
/// So many looks tell a trend.
const TREND: usize = 24;
const MIB: u64 = 1 << 20;

/// What some processes use, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory, in bytes.
    pub memory: u64,
    /// Open files and connections.
    pub files: u64,
    /// What is in their directory, in bytes.
    pub disk: u64,
}

impl Usage {
    /// Of these processes; one that has ended uses nothing.
    pub fn of(processes: impl IntoIterator<Item = u32>, directory: &Path) -> Self {
        let mut usage = Self {
            disk: disk(directory),
            ..Self::default()
        };
        for id in processes {
            let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let kib = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            usage.memory += kib.unwrap_or_default() << 10;
            usage.files += fs::read_dir(format!("/proc/{id}/fd")).map_or(0, |files| files.count() as u64);
        }
        usage
    }

    fn most(looks: &[Self]) -> Self {
        looks.iter().fold(Self::default(), |most, look| Self {
            memory: most.memory.max(look.memory),
            files: most.files.max(look.files),
            disk: most.disk.max(look.disk),
        })
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (memory, disk) = (self.memory / MIB, self.disk / MIB);
        write!(f, "{memory} MiB of memory, {} files, {disk} MiB of disk", self.files)
    }
}

/// What the files below a directory take up. Those that go meanwhile take nothing.
fn disk(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut directories: Vec<PathBuf> = vec![directory.into()];
    let mut bytes = 0;
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => directories.push(entry.path()),
                Ok(metadata) => bytes += metadata.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    bytes
}

/// What was used in the course of a run.
#[derive(Debug, Default)]
pub(super) struct Soak {
    /// By the members of the store.
    members: Vec<Usage>,
    /// By the process of the handles: its memory grows with the history.
    handles: Vec<Usage>,
}

impl Soak {
    /// Looks until the end.
    pub(super) async fn watch(cluster: &impl Members, until: Instant, run: &Run) -> Self {
        let mut soak = Self::default();
        while !run.is_over() && Instant::now() < until {
            soak.members.extend(cluster.usage().await);
            soak.handles
                .push(Usage::of([std::process::id()], Path::new("/nowhere")));
            tokio::time::sleep_until((Instant::now() + EVERY).min(until).into()).await;
        }
        soak
    }

    /// Of a run long enough to tell, the last third used no more than the first, and a little.
    pub(super) fn check(&self) {
        for (who, looks) in [("the members", &self.members), ("the handles", &self.handles)] {
            if looks.is_empty() {
                continue;
            }
            let third = looks.len().div_ceil(3);
            let (first, last) = (Usage::most(&looks[..third]), Usage::most(&looks[looks.len() - third..]));
            println!(
                "{who}, {} looks: at most {first} in the first third, {last} in the last",
                looks.len()
            );
            if looks.len() < TREND {
                continue;
            }
            assert!(last.files <= first.files * 3 / 2 + 32, "{who}: files grow");
            assert!(last.disk <= first.disk * 3 / 2 + 64 * MIB, "{who}: the disk fills up");
            if who == "the members" {
                assert!(last.memory <= first.memory * 3 / 2 + 64 * MIB, "{who}: memory grows");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let dir = tempfile::TempDir::new().expect("there is room for a directory");
        fs::create_dir(dir.path().join("below")).expect("there is room");
        fs::write(dir.path().join("below/file"), vec![1; 100_000]).expect("there is room");
        let usage = Usage::of([std::process::id()], dir.path());
        assert!(
            usage.memory > MIB && usage.files > 2 && usage.disk >= 100_000,
            "{usage}"
        );
        assert_eq!(Usage::of([u32::MAX], &dir.path().join("none")), Usage::default());
    }

    #[test]
    #[should_panic(expected = "files grow")]
    fn growth_is_seen() {
        let looks = (0..30).map(|n| Usage {
            files: 50 + 20 * n,
            ..Usage::default()
        });
        Soak {
            members: looks.collect(),
            ..Soak::default()
        }
        .check();
    }
}
