//! What an append to the log costs, beside the disk's own `fdatasync` of a pre-written file, measured in the same run.
//!
//! `cargo bench -p registry-raft --bench log [-- DIRECTORY]`

use std::path::PathBuf;

use registry_api::Result;
use registry_raft::measure::{append, sync_alone};

const ROUNDS: usize = 5;

#[tokio::main]
async fn main() -> Result<()> {
    let base = std::env::args().skip(1).find(|arg| arg != "--bench");
    let dir = base.map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = dir.join(format!("registry-bench-log-{}", std::process::id()));
    let done = run(&dir).await;
    // The measurements are printed; what can't be removed is for the user to see.
    let _ = std::fs::remove_dir_all(&dir);
    done
}

async fn run(dir: &std::path::Path) -> Result<()> {
    println!("{ROUNDS} rounds, medians; entries of 256 bytes, more than a segment of them from 16 under way on");
    let mut disk = (Vec::new(), Vec::new());
    let mut ours = [1, 16, 64, 256].map(|under_way| (under_way, Vec::new(), Vec::new(), Vec::new()));
    for round in 0..ROUNDS {
        let log = |under_way| dir.join(format!("{round}-{under_way}"));
        for (under_way, ..) in &ours {
            std::fs::create_dir_all(log(*under_way)).expect("the directory takes files");
        }
        // The disk has its good and bad moments: both are measured in each.
        let took = sync_alone(dir, 2000)?;
        disk.0.push(took.percentile(50));
        disk.1.push(took.percentile(99));
        for (under_way, rate, p50, p99) in &mut ours {
            let took = append(
                &log(*under_way),
                *under_way,
                if *under_way == 1 { 2000 } else { 250_000 },
            )
            .await?;
            rate.push(took.rate());
            p50.push(took.percentile(50));
            p99.push(took.percentile(99));
        }
    }
    let alone = (median(disk.0), median(disk.1));
    println!(
        "fdatasync of 4 KiB, pre-written           p50 {:6.0} us   p99 {:6.0} us",
        alone.0, alone.1
    );
    for (under_way, rate, p50, p99) in ours {
        let (p50, p99) = (median(p50), median(p99));
        println!(
            "append, {under_way:3} under way   {:8.0} /s   p50 {p50:6.0} us   p99 {p99:6.0} us   {:5.2} and {:5.2} times that",
            median(rate),
            p50 / alone.0,
            p99 / alone.1
        );
    }
    Ok(())
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}
