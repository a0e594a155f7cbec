//! What the disk can do by itself, to be compared with.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const PAGES: usize = 1000;

/// The median of overwriting and syncing 4 KiB of a file in that directory that has its blocks, in microseconds. Between two
/// of them, the disk is left alone for `pause`, by a processor that does not sleep.
pub fn fdatasync(dir: &Path, pause: Duration) -> io::Result<f64> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join("fdatasync"))?;
    file.write_all_at(&vec![0; PAGES * PAGE], 0)?;
    file.sync_all()?;
    let mut took = Vec::new();
    for page in 0..PAGES as u64 {
        let pausing = Instant::now();
        while pausing.elapsed() < pause {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        file.write_all_at(&[1; PAGE], page * PAGE as u64)?;
        file.sync_data()?;
        took.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(crate::cost::median(took))
}
