//! The book's page, written from the samples.

use std::fmt::Write;
use std::path::Path;

use registry_api::BoxError;

use crate::plot::{self, Curve};
use crate::sample::{Samples, grouped};
use crate::{SECTIONS, expiry, growth, keys, lock, restart, throughput, watch};

const RATE: &str = "per second";
const MEDIAN: &str = "p50 µs";
const EMBEDDED: &str = "embedded";
const LEASED: &str = "lease reads";
const REMOTE: &str = "remote";
const ETCD: &str = "etcd";
const ZOOKEEPER: &str = "ZooKeeper";

/// What is to be reached: of a section's work at a number, one side's figure over another's.
struct Aim {
    section: &'static str,
    work: &'static str,
    at: usize,
    sides: (&'static str, &'static str),
    figure: &'static str,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    /// So many times the other's figure, or more.
    AtLeast(f64),
    /// So many times the other's figure, or less.
    AtMost(f64),
    /// The other's figure is so many times this one, or more.
    Faster(f64),
    /// The figure itself, whoever else has what.
    Below(f64),
}

fn aims() -> Vec<Aim> {
    let mut aims = Vec::new();
    let mut add = |section, work, at, sides, figure, bound| {
        aims.push(Aim {
            section,
            work,
            at,
            sides,
            figure,
            bound,
        });
    };
    use Bound::{AtLeast, AtMost, Below, Faster};
    let (put, get) = (throughput::PUT, throughput::GET);
    add("one", put, 256, (EMBEDDED, ETCD), RATE, AtLeast(5.0));
    add("one", put, 1, (EMBEDDED, throughput::DISK), MEDIAN, AtMost(1.5));
    for tasks in [64, 256] {
        add("three", put, tasks, (EMBEDDED, ETCD), RATE, AtLeast(6.0));
    }
    add("one", put, 64, (REMOTE, ETCD), RATE, AtLeast(1.3));
    add("three", put, 64, (REMOTE, ETCD), RATE, AtLeast(3.0));
    add("one", get, 1, (EMBEDDED, ETCD), RATE, AtLeast(20.0));
    add("one", get, 256, (EMBEDDED, ETCD), RATE, AtLeast(20.0));
    for side in [EMBEDDED, LEASED] {
        add("three", get, 1, (side, ETCD), RATE, AtLeast(5.0));
        add("three", get, 256, (side, ETCD), RATE, AtLeast(20.0));
    }
    for section in ["one", "three"] {
        for other in [ETCD, ZOOKEEPER] {
            add(section, get, 64, (REMOTE, other), RATE, AtLeast(2.0));
        }
    }
    for work in [keys::LIST, keys::COUNT] {
        for side in [EMBEDDED, REMOTE] {
            add("keys", work, keys::KEYS, (side, ETCD), MEDIAN, Faster(50.0));
        }
    }
    add(
        "watch",
        watch::WATCH,
        watch::WATCHES,
        (REMOTE, ETCD),
        MEDIAN,
        AtMost(0.5),
    );
    for other in [ETCD, ZOOKEEPER] {
        for clients in lock::CLIENTS {
            add("lock", lock::HAND_OVER, clients, (REMOTE, other), MEDIAN, AtMost(0.5));
        }
    }
    let sessions = expiry::SESSIONS;
    add(
        "expiry",
        expiry::KEEP,
        sessions,
        (REMOTE, ETCD),
        "% of a core",
        AtMost(1.0),
    );
    add(
        "expiry",
        expiry::EXPIRE,
        sessions,
        (REMOTE, ETCD),
        expiry::EXPIRING,
        Below(50.0),
    );
    add(
        "keys",
        keys::MEMORY,
        keys::KEYS,
        (REMOTE, ETCD),
        "bytes a key",
        AtMost(0.5),
    );
    add(
        "restart",
        restart::RESTART,
        1_000_000,
        (REMOTE, ETCD),
        "seconds",
        AtMost(1.0),
    );
    aims
}

pub(crate) fn write(kept: &Path, docs: &Path) -> Result<(), BoxError> {
    let pictures = docs.join("performance");
    std::fs::create_dir_all(&pictures)?;
    let mut page = String::from(HEAD);
    let mut sections = Vec::new();
    for name in SECTIONS {
        sections.extend(Samples::load(&kept.join(format!("{name}.json")))?.map(|samples| (name, samples)));
    }
    let of = |section: &str| {
        sections
            .iter()
            .find(|(name, _)| *name == section)
            .map(|(_, samples)| samples)
    };
    page.push_str(AIMS);
    for aim in aims() {
        if let Some(samples) = of(aim.section) {
            page.push_str(&aim.line(samples));
        }
    }
    for (name, samples) in &sections {
        let (title, text) = about(name);
        write!(
            page,
            "\n## {title}\n\n{text}\n\n`scripts/compare {name}`; {}\n\n",
            samples.machine
        )?;
        page.push_str(samples.table().trim_end());
        page.push('\n');
        for picture in draw(name, samples, &pictures)? {
            write!(page, "\n![{picture}](performance/{picture}.svg)\n")?;
        }
    }
    page.push_str(COSTS);
    let machine = kept.join("costs.txt");
    if machine.exists() {
        write!(page, "\n`scripts/compare costs`; {}", std::fs::read_to_string(machine)?)?;
    }
    for (backend, title) in [("etcd", "etcd"), ("zk", "ZooKeeper"), ("mysql", "MariaDB")] {
        let path = kept.join(format!("{backend}.txt"));
        if path.exists() {
            let table = std::fs::read_to_string(path)?;
            write!(
                page,
                "\n{title}, `cargo bench -p registry-{backend} --bench cost`:\n\n```text\n{}\n```\n",
                table.trim_end()
            )?;
        }
    }
    Ok(std::fs::write(docs.join("performance.md"), page)?)
}

impl Aim {
    fn line(&self, samples: &Samples) -> String {
        let measured = match self.bound {
            Bound::Below(_) => samples.median(self.work, self.sides.0, self.at, self.figure),
            Bound::Faster(_) => samples.ratio(self.work, (self.sides.1, self.sides.0), self.at, self.figure),
            _ => samples.ratio(self.work, self.sides, self.at, self.figure),
        };
        let Some(measured) = measured else { return String::new() };
        let times = grouped(measured);
        let (aim, reached, good) = match self.bound {
            Bound::AtLeast(least) => (format!("at least {least} ×"), format!("{times} ×"), measured >= least),
            Bound::AtMost(most) => (format!("at most {most} ×"), format!("{times} ×"), measured <= most),
            Bound::Faster(least) => (
                format!("at least {least} × faster"),
                format!("{times} × faster"),
                measured >= least,
            ),
            Bound::Below(most) => (format!("at most {most}"), times, measured <= most),
        };
        let servers = match self.section {
            "three" => "3 members",
            _ => "1 member",
        };
        format!(
            "| {}, {}, {}, {servers} | {} | {} | {aim} | {reached} | {} |\n",
            self.work,
            grouped(self.at as f64),
            self.sides.0,
            self.sides.1,
            self.figure,
            if good { "yes" } else { "**no**" }
        )
    }
}

/// The pictures of a section, by their names.
fn draw(section: &str, samples: &Samples, pictures: &Path) -> Result<Vec<String>, BoxError> {
    let mut drawn = Vec::new();
    let mut picture = |work: &str, across: &str, figure: &str, what: &str| -> Result<(), BoxError> {
        let curve = |side: String| {
            let point = |at: usize| Some((at as f64, samples.median(work, &side, at, figure)?));
            let points: Vec<_> = samples
                .distinct(|sample| sample.at)
                .into_iter()
                .filter_map(point)
                .collect();
            (points.len() > 1).then_some(Curve {
                name: side.clone(),
                points,
            })
        };
        let sides = samples.distinct(|sample| sample.side.clone());
        let curves: Vec<_> = sides.into_iter().filter_map(curve).collect();
        let name: String = format!("{section} {work} {what}")
            .split(|letter: char| !letter.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
            .join("-");
        plot::draw(
            &pictures.join(format!("{name}.svg")),
            &format!("{work}: {figure}"),
            (across, figure),
            &curves,
        )?;
        drawn.push(name);
        Ok(())
    };
    match section {
        "one" | "three" => {
            for work in [throughput::PUT, throughput::GET] {
                picture(work, "tasks", RATE, "rate")?;
                picture(work, "tasks", MEDIAN, "median")?;
            }
        }
        "growth" => {
            for work in [growth::PUT, growth::GET, growth::LIST] {
                picture(work, "keys", RATE, "rate")?;
            }
            picture(growth::MEMBERS, "members", RATE, "rate")?;
        }
        _ => {}
    }
    Ok(drawn)
}

fn about(section: &str) -> (&'static str, &'static str) {
    match section {
        "one" => (
            "One server",
            "Values of 256 bytes, 10,000 keys of 65 bytes, each put synced to disk before it is answered. `embedded` is a caller in \
             the member's process; `remote`, etcd and ZooKeeper are another process, reached over loopback through one connection \
             of the store's own client. ZooKeeper's get has a `sync` before it on the same connection, its nearest to linearizable. \
             The disk is timed without a pause, and as a put of one task uses it: left alone for 0.2 ms between two syncs. It \
             is written through the page cache there, and past it by the embedded store.",
        ),
        "three" => (
            "Three servers",
            "The same with three processes. `embedded` is a caller in the process of the member that leads; `lease reads` the same \
             with `lease_reads = true`, which asks nobody and relies on the leader's clock: see \
             [the embedded store](backends/raft.md#what-it-gives).",
        ),
        "keys" => (
            "Many keys",
            "300,000 keys of 65 bytes with values of 256. Memory is what the server's anonymous memory grew by. ZooKeeper has \
             neither pages nor a count.",
        ),
        "restart" => (
            "Restart",
            "A server that holds 1,000,000 keys is killed (SIGKILL) and started; counted until the first linearizable get is \
             answered.",
        ),
        "watch" => (
            "Watches",
            "1,000 watches of one prefix over one connection, one writer: from the put until the last watch was told.",
        ),
        "lock" => (
            "Locks",
            "A lock that goes round among 2 and 16 clients, each with its own connection and session: from the release until the \
             next holds it. etcd by its lock RPC, ZooKeeper by the recipe of Curator.",
        ),
        "expiry" => (
            "Sessions",
            "9,000 sessions of 15 s, each by a client of its own with 11 keys, kept alive each third of that: the server's share of \
             a core. Then their process is killed while one writer goes on: its slowest put of the first half of the TTL, in which the \
             system breaks 18,000 connections of ours and 9,000 of etcd's, and then until the last of the 99,000 keys is gone, \
             and how long that took.",
        ),
        _ => (
            "Growth",
            "The embedded store alone, the caller in the process of the member that leads.",
        ),
    }
}

const HEAD: &str = "# Performance

<!-- Written by `scripts/compare`; edit registry-tests/benches/compare/page.rs. -->

`scripts/compare` starts etcd, ZooKeeper and members of the embedded store on one machine, each with the durability that it is
shipped with, has them do the same work in turn, round by round, and writes this page: medians of the rounds, and the median of
the rounds' ratios. `scripts/compare SECTION` measures one section anew; beside its name is where that was last done. What each
round measured is in `performance/samples/`. Where the time goes is in [Profile](profile.md).

";

const AIMS: &str = "## What was to be reached

| work | against | figure | aim | measured | reached |
| --- | --- | --- | --- | ---: | --- |
";

const COSTS: &str = "
## The other backends through the trait

The same work by each store's own client and through the registry, in one run, in turn.
";
