//! A lock that goes round among clients, each with a connection and a session of its own: from a release until the next
//! holds it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::LockOptions as EtcdLock;
use parking_lot::Mutex;
use registry_api::BoxError;
use zookeeper_client::{Acls, LockOptions, LockPrefix};

use crate::Plan;
use crate::client::{Client, OPEN, key};
use crate::measure::{Figures, turns};
use crate::sample::Samples;
use crate::servers::{Kind, Servers};

pub(crate) const HAND_OVER: &str = "lock hand-over";
pub(crate) const CLIENTS: [usize; 2] = [2, 16];
const TTL: Duration = Duration::from_secs(30);

pub(crate) async fn measure(plan: &Plan) -> Result<Samples, BoxError> {
    let mut sides = Vec::new();
    for kind in [Kind::Remote, Kind::Etcd, Kind::Zk] {
        let servers = Servers::start(kind, 1).await?;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS[1] {
            clients.push(servers.connect_with(TTL).await?);
        }
        if let Client::Zk(client) = &clients[0] {
            client.create("/lock", b"", &OPEN).await?;
        }
        sides.push((kind, servers, clients));
    }
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for count in CLIENTS {
            for turn in turns(sides.len(), round) {
                let (kind, _, clients) = &sides[turn];
                let figures = go_round(&clients[..count], plan.seconds).await?;
                samples.push((HAND_OVER, kind.name(), count, round), figures.latency());
            }
        }
    }
    Ok(samples)
}

/// When it was released last, and what the hand-overs took.
struct Shared {
    released: Option<Instant>,
    took: Figures,
}

async fn go_round(clients: &[Client], seconds: f64) -> Result<Figures, BoxError> {
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let shared = Shared {
        released: None,
        took: Figures::new(seconds),
    };
    let shared = Arc::new(Mutex::new(shared));
    let contend = |client: &Client| tokio::spawn(contend(client.clone(), until, shared.clone()));
    for contender in clients.iter().map(contend).collect::<Vec<_>>() {
        contender.await??;
    }
    let mut shared = shared.lock();
    Ok(std::mem::replace(&mut shared.took, Figures::new(seconds)))
}

async fn contend(client: Client, until: Instant, shared: Arc<Mutex<Shared>>) -> Result<(), BoxError> {
    let acquired = || {
        let (mut shared, now) = (shared.lock(), Instant::now());
        if let Some(released) = shared.released.take() {
            shared.took.record(now - released);
        }
    };
    let releasing = || shared.lock().released = Some(Instant::now());
    match client {
        Client::Ours(registry) => {
            let lock = registry.lock(&key("/lock"));
            while Instant::now() < until {
                let held = lock.acquire().await?;
                acquired();
                releasing();
                held.release().await?;
            }
        }
        Client::Etcd(client) => {
            let mut leases = client.lease_client();
            let lease = leases.grant(TTL.as_secs().try_into()?, None).await?.id();
            let mut locks = client.lock_client();
            while Instant::now() < until {
                let held = locks.lock("/lock", Some(EtcdLock::new().with_lease(lease))).await?;
                acquired();
                releasing();
                locks.unlock(held.key()).await?;
            }
            leases.revoke(lease).await?;
        }
        // The crate's lock in Curator's manner. Its own release is not waited for, so it is done by hand.
        Client::Zk(client) => {
            while Instant::now() < until {
                let prefix = LockPrefix::new_curator("/lock", "lock-")?;
                let held = client.lock(prefix, b"", LockOptions::new(Acls::anyone_all())).await?;
                acquired();
                let path = held.lock_path().to_owned();
                std::mem::forget(held);
                releasing();
                client.delete(&path, None).await?;
            }
        }
    }
    Ok(())
}
