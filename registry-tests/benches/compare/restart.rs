//! How long a server that was killed takes until it answers again, with all its keys.

use std::time::Instant;

use registry_api::BoxError;

use crate::Plan;
use crate::client::Client;
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const RESTART: &str = "restart";

pub(crate) async fn measure(plan: &Plan) -> Result<Samples, BoxError> {
    let mut sides = Vec::new();
    for kind in [Kind::Remote, Kind::Etcd] {
        let servers = Servers::start(kind, 1).await?;
        servers.connect().await?.fill(0, plan.keys).await?;
        sides.push((kind, servers));
    }
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for (kind, servers) in &mut sides {
            let began = Instant::now();
            servers.restart().await?;
            let client: Client = servers.connect().await?;
            client.clone().get(plan.keys - 1).await?;
            let took = began.elapsed().as_secs_f64();
            samples.push((RESTART, kind.name(), plan.keys, round), [("seconds", took)]);
            if client.count().await? != plan.keys as u64 {
                return Err("keys are missing".into());
            }
        }
    }
    Ok(samples)
}
