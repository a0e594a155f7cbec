//! One writer, and many watches on one prefix over one connection: from a put until the last of them was told.

use std::time::{Duration, Instant};

use etcd_client::WatchOptions;
use registry_api::{BoxError, Prefix, WatchItem, WatchRequest, WatchScope};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::Plan;
use crate::client::{Client, TABLE, key};
use crate::measure::{Figures, turns};
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const WATCH: &str = "put until the last watch is told";
pub(crate) const WATCHES: usize = 1000;

pub(crate) async fn measure(plan: &Plan) -> Result<Samples, BoxError> {
    let mut sides = Vec::new();
    for kind in [Kind::Embedded, Kind::Remote, Kind::Etcd] {
        let servers = Servers::start(kind, 1).await?;
        let client = servers.connect().await?;
        sides.push((kind, servers, client));
    }
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for turn in turns(sides.len(), round) {
            let (kind, _, client) = &sides[turn];
            let figures = fan_out(client, plan.seconds).await?;
            samples.push((WATCH, kind.name(), WATCHES, round), figures.latency());
        }
    }
    Ok(samples)
}

async fn fan_out(client: &Client, seconds: f64) -> Result<Figures, BoxError> {
    let (told, mut heard) = mpsc::channel(WATCHES);
    let mut watching = JoinSet::new();
    for _ in 0..WATCHES {
        watch(client, told.clone(), &mut watching).await?;
    }
    let mut figures = Figures::new(seconds);
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    while Instant::now() < until {
        let began = Instant::now();
        client.clone().put(0).await?;
        for _ in 0..WATCHES {
            heard.recv().await.ok_or("a watch ended")?;
        }
        figures.record(began.elapsed());
    }
    Ok(figures)
}

/// Begins a watch, and says each change that it tells of.
async fn watch(client: &Client, told: mpsc::Sender<()>, watching: &mut JoinSet<()>) -> Result<(), BoxError> {
    match client {
        Client::Ours(registry) => {
            let request = WatchRequest::new(Prefix::from(key(TABLE)), WatchScope::Subtree);
            let mut watch = registry.watch(request).await?;
            while !matches!(watch.next().await.transpose()?, Some(WatchItem::Synced(_))) {}
            watching.spawn(async move {
                while let Some(Ok(item)) = watch.next().await {
                    if matches!(item, WatchItem::Changes(_)) && told.send(()).await.is_err() {
                        return;
                    }
                }
            });
        }
        Client::Etcd(client) => {
            let options = WatchOptions::new().with_prefix();
            let mut watch = client.watch_client().watch(TABLE, Some(options)).await?;
            watching.spawn(async move {
                while let Ok(Some(answer)) = watch.message().await {
                    if !answer.events().is_empty() && told.send(()).await.is_err() {
                        return;
                    }
                }
            });
        }
        Client::Zk(_) => return Err("ZooKeeper tells each connection once".into()),
    }
    Ok(())
}
