//! What one member does on this disk: puts and reads at 1 to 256 tasks, beside the disk's own `fdatasync` of a
//! pre-written file, measured in the same run.
//!
//! `cargo bench -p registry-raft --bench member [-- DIRECTORY]`, or with `-- DIRECTORY keys N` what N keys cost: the load,
//! the restart, a listing of ten, and the longest wait of a write while a snapshot is taken.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use registry_api::{Key, List, Options, Read, Registry, Result};
use registry_raft::{Member, RaftConfig};
use registry_tests::cost::median;
use registry_tests::disk;

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let base = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = base.join(format!("registry-bench-{}", std::process::id()));
    let done = match (args.next().as_deref(), args.next().and_then(|n| n.parse().ok())) {
        (Some("keys"), Some(keys)) => many_keys(&dir, keys).await,
        _ => throughput(&dir).await,
    };
    // The measurements are printed; what can't be removed is for the user to see.
    let _ = std::fs::remove_dir_all(&dir);
    done
}

fn config(dir: &Path) -> RaftConfig {
    let mut config = RaftConfig::default();
    config.data_dir = Some(dir.join("data"));
    config.listen = Some("127.0.0.1:0".into());
    config
}

fn key(n: usize) -> Key {
    Key::parse(&format!(
        "/bench/keys/of/sixty/five/bytes/as/in/the/comparison/tables/{n:07}"
    ))
    .expect("it is a key")
}

async fn throughput(dir: &Path) -> Result<()> {
    let member = Member::start(&config(dir)).await?;
    let registry = member.connect(&Options::default()).await?;
    println!("{ROUNDS} rounds of {ROUND:?}, medians; values of 256 bytes, fsync on");
    let mut synced = Vec::new();
    for tasks in [1, 16, 64, 256] {
        let (mut puts, mut gets) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            if tasks == 1 {
                synced.push(disk::fdatasync(dir, Duration::ZERO).expect("the disk takes what is written"));
            }
            puts.push(run(&registry, tasks, Work::Put).await?);
            gets.push(run(&registry, tasks, Work::Get).await?);
        }
        if tasks == 1 {
            let ratios = puts.iter().zip(&synced).map(|(put, disk)| put.p50 / disk).collect();
            println!(
                "fdatasync of a pre-written 4 KiB: p50 {:.0} us; one writer's put costs {:.2} times that",
                median(synced.clone()),
                median(ratios)
            );
        }
        for (what, runs) in [("put", puts), ("get, linearizable", gets)] {
            let of = |pick: fn(&Run) -> f64| median(runs.iter().map(pick).collect());
            let (rate, p50, p99) = (of(|r| r.rate), of(|r| r.p50), of(|r| r.p99));
            println!("{what:18} {tasks:4} tasks {rate:10.0} /s   p50 {p50:8.0} us   p99 {p99:8.0} us");
        }
    }
    registry.close().await?;
    member.stop().await
}

#[derive(Clone, Copy)]
enum Work {
    Put,
    Get,
}

struct Run {
    rate: f64,
    p50: f64,
    p99: f64,
}

async fn run(registry: &Arc<dyn Registry>, tasks: usize, work: Work) -> Result<Run> {
    let start = Instant::now();
    let workers = (0..tasks).map(|task| {
        let registry = registry.clone();
        tokio::spawn(async move {
            let (mut took, mut n) = (Vec::new(), task * 7919);
            while start.elapsed() < ROUND {
                n += 1;
                let asked = Instant::now();
                match work {
                    Work::Put => drop(registry.put(&key(n % 10_000), vec![b'v'; 256]).await?),
                    Work::Get => drop(registry.get(&key(n % 10_000), Read::Linearizable).await?),
                }
                took.push(asked.elapsed().as_secs_f64() * 1e6);
            }
            Ok::<_, registry_api::Error>(took)
        })
    });
    let mut took = Vec::new();
    for worker in workers.collect::<Vec<_>>() {
        took.extend(worker.await.expect("a worker does not panic")?);
    }
    let rate = took.len() as f64 / start.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    Ok(Run {
        rate,
        p50: took[took.len() / 2],
        p99: took[took.len() * 99 / 100],
    })
}

async fn many_keys(dir: &Path, keys: usize) -> Result<()> {
    let member = Member::start(&config(dir)).await?;
    let registry = member.connect(&Options::default()).await?;
    let start = Instant::now();
    let loaders = (0..64).map(|task| {
        let registry = registry.clone();
        tokio::spawn(async move {
            for n in (task..keys).step_by(64) {
                registry.put(&key(n), vec![b'v'; 256]).await?;
            }
            Ok::<_, registry_api::Error>(())
        })
    });
    for loader in loaders.collect::<Vec<_>>() {
        loader.await.expect("a loader does not panic")?;
    }
    println!("load of {keys} keys: {:.1} s", start.elapsed().as_secs_f64());

    let mut took = Vec::new();
    for n in 0..101 {
        let asked = Instant::now();
        let prefix = Key::parse("/bench/keys/of/sixty/five/bytes/as/in/the/comparison/tables")?;
        let page = registry
            .list(List {
                limit: 10,
                after: Some(key(n * keys / 102)),
                ..List::new(&prefix)
            })
            .await?;
        assert_eq!(page.entries.len(), 10);
        took.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    println!("a page of ten: {:.2} ms", median(took));

    // The disk and the machine have their bad moments: as many looks without a snapshot as with one, in turn.
    let (mut without, mut with) = (Puts::default(), Puts::default());
    for _ in 0..ROUNDS {
        let before = member.status().snapshot_bytes;
        let started = Instant::now();
        // The writer is at it before the snapshot begins.
        let mut puts = puts(&registry, Duration::from_millis(200)).await?;
        // Something new, so that the snapshot is another.
        registry.put(&key(keys), vec![b'v'; 1 + without.longest.len()]).await?;
        member.snapshot().await?;
        while member.status().snapshot_bytes == before && started.elapsed() < Duration::from_secs(60) {
            puts.extend(self::puts(&registry, Duration::from_millis(50)).await?);
        }
        with.add(puts);
        without.add(self::puts(&registry, started.elapsed()).await?);
    }
    println!("one writer's puts, medians of {ROUNDS} rounds:");
    println!("  without a snapshot   {without}");
    println!("  during a snapshot    {with}");
    let status = member.status();
    println!(
        "snapshot {} MiB, log {} MiB",
        status.snapshot_bytes >> 20,
        status.log_bytes >> 20
    );
    registry.close().await?;
    member.stop().await?;

    let start = Instant::now();
    let member = Member::start(&config(dir)).await?;
    println!(
        "restart: {:.1} s, {} keys",
        start.elapsed().as_secs_f64(),
        member.status().keys
    );
    assert_eq!(member.status().keys as usize, keys + 1);
    member.stop().await
}

/// How long each put of one writer took, in milliseconds.
async fn puts(registry: &Arc<dyn Registry>, how_long: Duration) -> Result<Vec<f64>> {
    let (start, mut took) = (Instant::now(), Vec::new());
    while start.elapsed() < how_long {
        let asked = Instant::now();
        registry.put(&key(1), vec![b'v'; 256]).await?;
        took.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    Ok(took)
}

/// What rounds of puts took, in milliseconds.
#[derive(Default)]
struct Puts {
    p50: Vec<f64>,
    p99: Vec<f64>,
    longest: Vec<f64>,
    seconds: Vec<f64>,
}

impl Puts {
    fn add(&mut self, mut took: Vec<f64>) {
        took.sort_by(f64::total_cmp);
        self.p50.push(took[took.len() / 2]);
        self.p99.push(took[took.len() * 99 / 100]);
        self.longest.push(took[took.len() - 1]);
        self.seconds.push(took.iter().sum::<f64>() / 1e3);
    }
}

impl std::fmt::Display for Puts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [p50, p99, longest, seconds] =
            [&self.p50, &self.p99, &self.longest, &self.seconds].map(|of| median(of.clone()));
        let all = self
            .longest
            .iter()
            .map(|ms| format!("{ms:.1}"))
            .collect::<Vec<_>>()
            .join(" ");
        write!(
            f,
            "p50 {p50:.2} ms, p99 {p99:.2} ms, longest {longest:.1} ms (each: {all}) in {seconds:.1} s"
        )
    }
}
