//! A store with many keys: a page of ten, a count, and the memory that they take.

use std::fs;

use registry_api::BoxError;

use crate::Plan;
use crate::client::Client;
use crate::measure::run;
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const LIST: &str = "list 10";
pub(crate) const COUNT: &str = "count";
pub(crate) const MEMORY: &str = "memory";
pub(crate) const KEYS: usize = 300_000;

pub(crate) async fn measure(plan: &Plan) -> Result<Samples, BoxError> {
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for kind in [Kind::Embedded, Kind::Remote, Kind::Etcd] {
            let servers = Servers::start(kind, 1).await?;
            let client = servers.connect().await?;
            // The embedded member shares its process with this bench.
            let before = match kind {
                Kind::Embedded => None,
                _ => Some(anonymous(servers.process()?)?),
            };
            client.fill(0, KEYS).await?;
            // The last ten have nothing after them.
            let how = (1, KEYS - 11, plan.seconds);
            let list = run(&client, how, Client::page).await?;
            samples.push((LIST, kind.name(), KEYS, round), list.latency());
            let count = |client: Client, _| async move {
                match client.count().await? {
                    counted if counted == KEYS as u64 => Ok(()),
                    counted => Err(format!("{counted} keys").into()),
                }
            };
            let count = run(&client, (1, 1, plan.seconds), count).await?;
            samples.push((COUNT, kind.name(), KEYS, round), count.latency());
            if let Some(before) = before {
                let taken = anonymous(servers.process()?)?.saturating_sub(before);
                let each = taken as f64 / KEYS as f64;
                samples.push((MEMORY, kind.name(), KEYS, round), [("bytes a key", each)]);
            }
        }
    }
    Ok(samples)
}

/// The anonymous memory of a process, in bytes: what is not a file's.
fn anonymous(process: u32) -> Result<u64, BoxError> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kilobytes.ok_or("no RssAnon")?.trim().parse::<u64>()? * 1024)
}
