//! What grows with the keys and with the members: a curve without a cliff, or not.

use registry_api::BoxError;

use crate::Plan;
use crate::client::Client;
use crate::measure::run;
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const TASKS: usize = 64;
pub(crate) const PUT: &str = "put, 64 tasks, by keys";
pub(crate) const GET: &str = "get, 64 tasks, by keys";
pub(crate) const LIST: &str = "list 10, 1 task, by keys";
pub(crate) const MEMBERS: &str = "put, 64 tasks, by members";
const KEYS: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];
const SIZES: [usize; 3] = [1, 3, 5];

pub(crate) async fn measure(plan: &Plan) -> Result<Samples, BoxError> {
    let mut samples = Samples::default();
    let side = Kind::Embedded.name();
    let servers = Servers::start(Kind::Embedded, 1).await?;
    let client = servers.connect().await?;
    let mut filled = 0;
    for keys in KEYS {
        client.fill(filled, keys).await?;
        filled = keys;
        for round in 0..plan.rounds {
            let many = (TASKS, keys, plan.seconds);
            let put = run(&client, many, Client::put).await?;
            samples.push((PUT, side, keys, round), put.throughput());
            let get = run(&client, many, Client::get).await?;
            samples.push((GET, side, keys, round), get.throughput());
            let list = run(&client, (1, keys - 11, plan.seconds), Client::page).await?;
            samples.push((LIST, side, keys, round), list.throughput());
        }
    }
    drop((client, servers));
    let mut groups = Vec::new();
    for size in SIZES {
        let servers = Servers::start(Kind::Embedded, size).await?;
        let client = servers.connect().await?;
        client.fill(0, KEYS[0]).await?;
        groups.push((size, servers, client));
    }
    for round in 0..plan.rounds {
        for (size, _, client) in &groups {
            let put = run(client, (TASKS, KEYS[0], plan.seconds), Client::put).await?;
            samples.push((MEMBERS, side, *size, round), put.throughput());
        }
    }
    Ok(samples)
}
