//! What the log costs beside the disk's own sync, for the bench.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use registry_api::Result;

use super::{Identity, Options, abort};
use crate::directory::storage;
use crate::log_store::LogStore;
use crate::types::{LogEntry, LogId, Proposal, TypeConfig};

/// How long something took, many times over.
#[derive(Clone, Debug)]
pub struct Took {
    /// Sorted, in microseconds.
    micros: Vec<f64>,
    /// From the first to the last.
    whole: Duration,
}

impl Took {
    fn new(mut micros: Vec<f64>, whole: Duration) -> Self {
        micros.sort_by(f64::total_cmp);
        Self { micros, whole }
    }

    /// The time that so many of a hundred did not exceed, in microseconds.
    pub fn percentile(&self, percent: usize) -> f64 {
        let last = self.micros.len().saturating_sub(1);
        self.micros
            .get((self.micros.len() * percent / 100).min(last))
            .copied()
            .unwrap_or_default()
    }

    /// How many a second.
    pub fn rate(&self) -> f64 {
        self.micros.len() as f64 / self.whole.as_secs_f64()
    }
}

/// `fdatasync` of 4 KiB overwritten in a file that has its blocks.
///
/// # Errors
/// The disk's.
pub fn sync_alone(directory: &Path, rounds: u64) -> Result<Took> {
    let path = directory.join("fdatasync");
    let measure = || {
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(&path)?;
        file.write_all_at(&vec![0; 4 << 20], 0)?;
        file.sync_all()?;
        let (start, mut micros) = (Instant::now(), Vec::new());
        for round in 0..rounds {
            let asked = Instant::now();
            file.write_all_at(&[1; 4096], round % 1024 * 4096)?;
            file.sync_data()?;
            micros.push(asked.elapsed().as_secs_f64() * 1e6);
        }
        Ok(Took::new(micros, start.elapsed()))
    };
    measure().map_err(|error: std::io::Error| storage(&path, error.to_string()))
}

/// Entries of 256 bytes, each from its append to its callback, with so many under way.
///
/// # Errors
/// The log's.
pub async fn append(directory: &Path, under_way: usize, entries: u64) -> Result<Took> {
    let mut log = LogStore::open(directory, Identity::random(), Options::default(), abort())?;
    let broken = |error: std::io::Error| storage(directory, error.to_string());
    let payload = bytes::Bytes::from(vec![b'v'; 256]);
    let (mut waiting, mut micros) = (FuturesUnordered::new(), Vec::new());
    let start = Instant::now();
    for index in 0..entries {
        if waiting.len() == under_way {
            micros.extend(waiting.next().await);
        }
        let asked = Instant::now();
        let entry = LogEntry::new(
            LogId::new_term_index(1, index),
            EntryPayload::Normal(Proposal(payload.clone())),
        );
        let (done, flushed) = TypeConfig::oneshot();
        log.append([entry], IOFlushed::signal(done)).await.map_err(broken)?;
        waiting.push(async move {
            // An error ends the process.
            drop(flushed.await);
            asked.elapsed().as_secs_f64() * 1e6
        });
    }
    while let Some(took) = waiting.next().await {
        micros.push(took);
    }
    let took = Took::new(micros, start.elapsed());
    log.log().close()?;
    Ok(took)
}
