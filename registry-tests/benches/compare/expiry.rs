//! Many sessions, each with keys of its own: what it costs the server to keep them, and what others notice when they all
//! end at once.

use std::time::{Duration, Instant};

use etcd_client::{PutOptions, Txn as EtcdTxn, TxnOp};
use futures_util::{StreamExt, TryStreamExt, stream};
use registry_api::{BoxError, Key, Prefix, Read, Txn};
use registry_tests::Process;
use registry_tests::process::on_cpu;
use tokio::process::Command;

use crate::Plan;
use crate::client::{Client, VALUE};
use crate::sample::Samples;
use crate::servers::{Kind, Servers, remote};

pub(crate) const KEEP: &str = "sessions kept";
pub(crate) const EXPIRE: &str = "all expire at once";
/// As many as a process can hold whom the system gives 20,000 file descriptors: a handle has two connections.
pub(crate) const SESSIONS: usize = 9_000;
const BREAKING: &str = "slowest put ms, connections breaking";
pub(crate) const EXPIRING: &str = "slowest put ms, sessions expiring";
const KEYS_EACH: usize = 11;
const HELD: &str = "/held";
const TTL: Duration = Duration::from_secs(15);
/// How long the server's work is counted.
const KEPT: Duration = Duration::from_secs(15);
/// How many sessions are opened at once.
const AT_ONCE: usize = 16;
/// For how long the end of all is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) async fn measure(plan: &Plan) -> Result<Samples, BoxError> {
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for kind in [Kind::Remote, Kind::Etcd] {
            let servers = Servers::start(kind, 1).await?;
            let client = servers.connect().await?;
            client.fill(0, 1).await?;
            let mut command = Command::new(std::env::current_exe()?);
            command
                .args(["holders", kind.name(), &plan.sessions.to_string()])
                .args(servers.addresses());
            let mut holders = Process::start_unready(command);
            all_held(&client, plan.sessions).await?;
            let before = on_cpu(servers.process()?)?;
            tokio::time::sleep(KEPT).await;
            let worked = on_cpu(servers.process()?)? - before;
            let share = worked.as_secs_f64() / KEPT.as_secs_f64();
            samples.push(
                (KEEP, kind.name(), plan.sessions, round),
                [("% of a core", share * 100.0)],
            );
            if held(&client).await? != (plan.sessions * KEYS_EACH) as u64 {
                return Err(format!("{}: not all sessions were kept", kind.name()).into());
            }
            holders.kill().await;
            let figures = expire(&client).await?;
            samples.push((EXPIRE, kind.name(), plan.sessions, round), figures);
        }
    }
    Ok(samples)
}

/// Waits until each session has its keys.
async fn all_held(client: &Client, sessions: usize) -> Result<(), BoxError> {
    let began = Instant::now();
    loop {
        let found = held(client).await?;
        match found == (sessions * KEYS_EACH) as u64 {
            true => return Ok(()),
            false if began.elapsed() > PATIENCE => return Err(format!("only {found} keys are held").into()),
            false => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// One writer goes on until no key of the sessions is left: the longest that a put took, first as the connections break and
/// then as the sessions expire, and how long it all was.
async fn expire(client: &Client) -> Result<[(&'static str, f64); 3], BoxError> {
    let died = Instant::now();
    let (mut breaking, mut expiring) = (Duration::ZERO, Duration::ZERO);
    let mut looked = died;
    loop {
        let began = Instant::now();
        client.clone().put(0).await?;
        let of_when = if died.elapsed() < TTL / 2 {
            &mut breaking
        } else {
            &mut expiring
        };
        *of_when = began.elapsed().max(*of_when);
        if looked.elapsed() > Duration::from_millis(200) {
            if held(client).await? == 0 {
                return Ok([
                    (BREAKING, breaking.as_secs_f64() * 1e3),
                    (EXPIRING, expiring.as_secs_f64() * 1e3),
                    ("all gone after s", died.elapsed().as_secs_f64()),
                ]);
            }
            looked = Instant::now();
        }
        if died.elapsed() > PATIENCE {
            return Err(format!("sessions of {TTL:?} live after {PATIENCE:?}").into());
        }
    }
}

/// How many keys of the sessions are there.
async fn held(client: &Client) -> Result<u64, BoxError> {
    match client {
        Client::Ours(registry) => Ok(registry.count(&Prefix::parse(HELD)?, Read::Stale).await?),
        Client::Etcd(client) => {
            let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
            let counted = client.kv_client().get(HELD, Some(options.with_serializable())).await?;
            Ok(counted.count().try_into()?)
        }
        Client::Zk(_) => Err("not measured".into()),
    }
}

/// Holds the sessions, each over a connection of its own, until it is killed.
pub(crate) async fn holders(arguments: &[String]) -> Result<(), BoxError> {
    let [kind, sessions, addresses @ ..] = arguments else {
        return Err("holders KIND SESSIONS ADDRESS...".into());
    };
    registry_tests::process::take_open_files();
    let opening = stream::iter(0..sessions.parse::<usize>()?);
    let _kept: Vec<_> = if kind == Kind::Remote.name() {
        let open = opening.map(|n| async move {
            let registry = remote(addresses, TTL).await?;
            let keys = (0..KEYS_EACH).map(|key| Key::parse(&format!("{HELD}/{n}/{key}")));
            let mut txn = Txn::new();
            for key in keys {
                txn = txn.put_ephemeral(&key?, VALUE.to_vec());
            }
            registry.commit(txn).await?;
            Ok::<_, BoxError>(Some(registry))
        });
        open.buffer_unordered(AT_ONCE).try_collect().await?
    } else {
        let open = opening.map(|n| async move {
            let mut client = etcd_client::Client::connect(addresses, None).await?;
            let lease = client.lease_grant(TTL.as_secs().try_into()?, None).await?.id();
            let put = |key| {
                let options = PutOptions::new().with_lease(lease);
                TxnOp::put(format!("{HELD}/{n}/{key}"), VALUE, Some(options))
            };
            let puts: Vec<_> = (0..KEYS_EACH).map(put).collect();
            client.txn(EtcdTxn::new().and_then(puts)).await?;
            let (mut keeper, mut answers) = client.lease_keep_alive(lease).await?;
            tokio::spawn(async move {
                let _client = client;
                loop {
                    tokio::time::sleep(TTL / 3).await;
                    keeper.keep_alive().await?;
                    answers.message().await?;
                }
                #[allow(unreachable_code)]
                Ok::<_, BoxError>(())
            });
            Ok::<_, BoxError>(None)
        });
        open.buffer_unordered(AT_ONCE).try_collect().await?
    };
    std::future::pending().await
}
