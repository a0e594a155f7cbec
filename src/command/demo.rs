//! demo: what a registry does, shown and checked.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use registry::{Event, Expect, Key, Prefix, Read, Registry, Watch, WatchItem, WatchRequest, WatchScope};

use super::{Failure, Outcome};

/// What the demo starts as another process, to be killed.
#[derive(Debug, Args)]
pub(crate) struct Worker {
    endpoint: String,
    key: String,
    /// Stands in this election.
    election: Option<String>,
}

const TTL: &str = "1s";
const PATIENCE: Duration = Duration::from_secs(10);

fn config(raft: registry::raft::RaftConfig) -> Result<registry::Config, Failure> {
    let mut config = registry::Config::load(None, &vec![("session_ttl".into(), TTL.into())])?;
    config.options.namespace = registry::Namespace::default();
    config.backend = registry::Backend::Raft(raft);
    Ok(config)
}

impl Worker {
    /// Registers, stands if asked, and goes on until it is killed.
    pub(crate) async fn run(self) -> Outcome {
        let remote = registry::raft::RaftConfig::remote([self.endpoint]);
        let registry = registry::connect(&config(remote)?).await?;
        let _registration = registry
            .register(&Key::parse(&self.key).map_err(registry::Error::from)?, "alive")
            .await?;
        if let Some(election) = self.election {
            let election = registry.election(&Key::parse(&election).map_err(registry::Error::from)?);
            let leadership = election.campaign(format!("process {}", std::process::id())).await?;
            leadership.lost().await;
        }
        std::future::pending().await
    }
}

pub(crate) async fn run() -> Outcome {
    let start = Instant::now();
    let dir = tempfile::tempdir().map_err(|error| Failure::io("no temporary directory", &error))?;
    let mut member_config = registry::raft::RaftConfig::default();
    member_config.data_dir = Some(dir.path().join("data"));
    member_config.listen = Some("127.0.0.1:0".into());
    println!("1. A registry in this process: one member of the embedded store, its data in a temporary directory.");
    let member = registry::raft::Member::start(&member_config).await?;
    let address = member.address().map_or_else(String::new, |address| address.to_string());
    println!("   ready on {address} after {:.0?}", start.elapsed());
    let registry = member.connect(&config(member_config.clone())?.options).await?;

    keys(&registry).await?;
    workers(&registry, &address).await?;
    locks(&registry, &member).await?;
    elections(&registry, &address).await?;
    restart(registry, member, &member_config).await?;
    println!(
        "\nAll of it was checked as it was shown, in {:.1} s.",
        start.elapsed().as_secs_f64()
    );
    Ok(ExitCode::SUCCESS)
}

/// Refuses to show what is not so.
fn check(holds: bool, what: &str) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::new(1, format!("this should be so and is not: {what}")))
    }
}

fn key(path: &str) -> Result<Key, Failure> {
    Ok(Key::parse(path).map_err(registry::Error::from)?)
}

async fn keys(registry: &Arc<dyn Registry>) -> Result<(), Failure> {
    println!("\n2. Keys and values, with revisions.");
    let first = registry.put(&key("/app/config")?, "v1").await?;
    println!("   put /app/config v1            revision {first}");
    let second = registry
        .put_if(&key("/app/config")?, Expect::ModRevision(first), "v2")
        .await?;
    println!("   put v2 if at revision {first}       revision {second}");
    match registry
        .put_if(&key("/app/config")?, Expect::ModRevision(first), "v3")
        .await
    {
        Err(error @ registry::Error::Conflict { .. }) => {
            println!("   put v3 if at revision {first}       refused: {error}")
        }
        _ => check(false, "a put on an old revision is refused")?,
    }
    registry.put(&key("/app/limits/cpu")?, "4").await?;
    registry.put(&key("/app/limits/memory")?, "8G").await?;
    let children = registry
        .children(
            &Prefix::parse("/app").map_err(registry::Error::from)?,
            Read::Linearizable,
        )
        .await?;
    println!("   ls /app                       {}", children.join("  "));
    check(children == ["config", "limits"], "/app has two children")
}

/// The events of a watch, one at a time.
async fn event(watch: &mut Watch) -> Result<Event, Failure> {
    let next = async {
        loop {
            match watch.next().await {
                Some(Ok(WatchItem::Changes(events))) if events.len() == 1 => return Ok(events[0].clone()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
                None => return Err(Failure::new(1, "the watch has ended")),
            }
        }
    };
    tokio::time::timeout(PATIENCE, next)
        .await
        .unwrap_or_else(|_| Err(Failure::new(1, "the event did not come")))
}

fn spawn(arguments: &[&str]) -> Result<tokio::process::Child, Failure> {
    let program = std::env::current_exe().map_err(|error| Failure::io("this program's file", &error))?;
    let mut command = tokio::process::Command::new(program);
    command
        .arg("demo-worker")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    command
        .spawn()
        .map_err(|error| Failure::io("can't start a worker", &error))
}

async fn kill(mut child: tokio::process::Child) -> Result<Instant, Failure> {
    let killed = Instant::now();
    child
        .kill()
        .await
        .map_err(|error| Failure::io("can't kill a worker", &error))?;
    Ok(killed)
}

async fn workers(registry: &Arc<dyn Registry>, address: &str) -> Result<(), Failure> {
    println!("\n3. Who is alive: two processes register, and one is killed (kill -9).");
    let mut watch = registry
        .watch(WatchRequest::new(&key("/app/workers")?, WatchScope::Children))
        .await?;
    let first = spawn(&[address, "/app/workers/w1"])?;
    println!("   watch: created {}", event(&mut watch).await?.key());
    let second = spawn(&[address, "/app/workers/w2"])?;
    println!("   watch: created {}", event(&mut watch).await?.key());
    let killed = kill(first).await?;
    let gone = event(&mut watch).await?;
    check(
        matches!(&gone, Event::Deleted { .. }) && gone.key().name() == "w1",
        "the killed worker's key goes",
    )?;
    println!(
        "   watch: expired {} {:.1} s after the kill, its session's TTL being {TTL}",
        gone.key(),
        killed.elapsed().as_secs_f64()
    );
    kill(second).await.map(|_| ())
}

async fn locks(registry: &Arc<dyn Registry>, member: &registry::raft::Member) -> Result<(), Failure> {
    println!("\n4. A lock, taken in turn by three handles, with fencing tokens that only grow.");
    let name = key("/app/nightly")?;
    let held = registry.lock(&name).label("first").acquire().await?;
    println!("   first  holds it with token {}", held.token());
    let mut waiters = Vec::new();
    for who in ["second", "third"] {
        let other = member
            .connect(&config(registry::raft::RaftConfig::default())?.options)
            .await?;
        let place = registry.lock(&name).contenders().await?.len();
        let lock = other.lock(&name).label(who);
        waiters.push(tokio::spawn(async move {
            let held = lock.acquire().await?;
            let token = held.token();
            println!("   {who:6} holds it with token {token}");
            held.release().await?;
            other.close().await?;
            Ok::<_, registry::Error>(token)
        }));
        let queued = async {
            while registry.lock(&name).contenders().await?.len() == place {
                tokio::task::yield_now().await;
            }
            Ok::<_, registry::Error>(())
        };
        tokio::time::timeout(PATIENCE, queued)
            .await
            .map_err(|_| Failure::new(1, "a waiter did not queue"))??;
    }
    let mut last = held.token();
    held.release().await?;
    for waiter in waiters {
        let token = waiter.await.map_err(|error| Failure::new(1, error.to_string()))??;
        check(token > last, "tokens grow")?;
        last = token;
    }
    Ok(())
}

async fn elections(registry: &Arc<dyn Registry>, address: &str) -> Result<(), Failure> {
    println!("\n5. An election of two processes; the leader is killed.");
    let election = registry.election(&key("/app/scheduler")?);
    let mut course = election.observe().await?;
    let first = spawn(&[address, "/app/schedulers/s1", "/app/scheduler"])?;
    let leader = next_leader(&mut course).await?;
    println!(
        "   {} leads with token {}",
        String::from_utf8_lossy(&leader.value),
        leader.token
    );
    let second = spawn(&[address, "/app/schedulers/s2", "/app/scheduler"])?;
    let standing = async {
        while election.candidates().await?.len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok::<_, registry::Error>(())
    };
    tokio::time::timeout(PATIENCE, standing)
        .await
        .map_err(|_| Failure::new(1, "no second candidate came"))??;
    let killed = kill(first).await?;
    let next = next_leader(&mut course).await?;
    check(next.token > leader.token, "the next leader's token is larger")?;
    println!(
        "   killed; {} leads with token {} after {:.1} s",
        String::from_utf8_lossy(&next.value),
        next.token,
        killed.elapsed().as_secs_f64()
    );
    kill(second).await.map(|_| ())
}

async fn next_leader(course: &mut registry::Campaign) -> Result<registry::Leader, Failure> {
    let next = async {
        loop {
            match course.next().await {
                Some(Ok(Some(leader))) => return Ok(leader),
                Some(Ok(None)) => {}
                Some(Err(error)) => return Err(error.into()),
                None => return Err(Failure::new(1, "the observation has ended")),
            }
        }
    };
    tokio::time::timeout(PATIENCE, next)
        .await
        .unwrap_or_else(|_| Err(Failure::new(1, "no leader came")))
}

async fn restart(
    registry: Arc<dyn Registry>,
    member: registry::raft::Member,
    config: &registry::raft::RaftConfig,
) -> Result<(), Failure> {
    println!("\n6. What was acknowledged is on disk: the member stops, and starts again on its directory.");
    registry.close().await?;
    member.stop().await?;
    let start = Instant::now();
    let member = registry::raft::Member::start(config).await?;
    let registry = member.connect(&registry::Options::default()).await?;
    let entry = registry.get(&key("/app/config")?, Read::Linearizable).await?;
    let entry = entry.ok_or_else(|| Failure::new(1, "/app/config is gone"))?;
    check(entry.value == "v2", "the value is the last one put")?;
    println!(
        "   ready after {:.0?}; get /app/config: v2, put at revision {}",
        start.elapsed(),
        entry.mod_revision
    );
    registry.close().await?;
    Ok(member.stop().await?)
}
