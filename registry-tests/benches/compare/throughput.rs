//! Puts and linearizable gets at 1 to 256 tasks.

use std::time::Duration;

use registry_api::BoxError;
use registry_tests::disk;

use crate::Plan;
use crate::client::Client;
use crate::measure::{run, turns};
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const PUT: &str = "put";
pub(crate) const GET: &str = "get, linearizable";
pub(crate) const DISK: &str = "fdatasync of 4 KiB";
/// A put leaves the disk alone for about so long: that by itself makes it slower.
const SPACED: &str = "fdatasync 0.2 ms apart";
const PAUSE: Duration = Duration::from_micros(200);
pub(crate) const TASKS: [usize; 4] = [1, 16, 64, 256];
const KEYS: usize = 10_000;

pub(crate) async fn measure(size: usize, plan: &Plan) -> Result<Samples, BoxError> {
    let mut sides = Vec::new();
    // Who is alone asks nobody anyway.
    for kind in Kind::ALL.into_iter().filter(|kind| size > 1 || *kind != Kind::Leased) {
        let servers = Servers::start(kind, size).await?;
        let client = servers.connect().await?;
        client.fill(0, KEYS).await?;
        sides.push((kind, servers, client));
    }
    let dir = tempfile::tempdir()?;
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for tasks in TASKS {
            if tasks == 1 {
                for (name, pause) in [(DISK, Duration::ZERO), (SPACED, PAUSE)] {
                    let took = disk::fdatasync(dir.path(), pause)?;
                    samples.push((PUT, name, tasks, round), [("p50 µs", took)]);
                }
            }
            for work in [PUT, GET] {
                for turn in turns(sides.len(), round) {
                    let (kind, _, client) = &sides[turn];
                    if *kind == Kind::Leased && work == PUT {
                        continue;
                    }
                    let how = (tasks, KEYS, plan.seconds);
                    let figures = match work {
                        PUT => run(client, how, Client::put).await?,
                        _ => run(client, how, Client::get).await?,
                    };
                    samples.push((work, kind.name(), tasks, round), figures.throughput());
                }
            }
        }
    }
    Ok(samples)
}

/// One piece of work on one side.
pub(crate) async fn work(arguments: &[String]) -> Result<(), BoxError> {
    let [side, size, work, tasks, seconds] = arguments else {
        return Err("work SIDE SERVERS put|get TASKS SECONDS".into());
    };
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == side);
    let kind = kind.ok_or_else(|| format!("no side {side}"))?;
    let servers = Servers::start(kind, size.parse()?).await?;
    let client = servers.connect().await?;
    client.fill(0, KEYS).await?;
    let how = (tasks.parse()?, KEYS, seconds.parse()?);
    let figures = match work.as_str() {
        "put" => run(&client, how, Client::put).await?,
        "get" => run(&client, how, Client::get).await?,
        other => return Err(format!("no work {other}").into()),
    };
    println!("{:?}", figures.throughput());
    Ok(())
}
