//! Puts and linearizable gets at 1 to 256 tasks.

use registry_api::BoxError;
use registry_tests::disk;

use crate::Plan;
use crate::client::Client;
use crate::measure::run;
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const PUT: &str = "put";
pub(crate) const GET: &str = "get, linearizable";
pub(crate) const DISK: &str = "fdatasync of 4 KiB";
pub(crate) const TASKS: [usize; 4] = [1, 16, 64, 256];
const KEYS: usize = 10_000;

pub(crate) async fn measure(size: usize, plan: &Plan) -> Result<Samples, BoxError> {
    let mut sides = Vec::new();
    for kind in Kind::ALL {
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
                samples.push((PUT, DISK, tasks, round), [("p50 µs", disk::fdatasync(dir.path())?)]);
            }
            for work in [PUT, GET] {
                // Each round begins with another.
                for turn in 0..sides.len() {
                    let (kind, _, client) = &sides[(round + turn) % sides.len()];
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
