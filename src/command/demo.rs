//! demo: what a registry does, shown and checked.

mod group;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use registry::raft::RaftConfig;
use registry::{Event, Expect, Key, Prefix, Read, Registry, SessionTtl, Watch, WatchItem, WatchRequest, WatchScope};
use serde_json::json;

use super::output::Output;
use super::stop::Stop;
use super::{Failure, Outcome};
use group::{Group, kill, spawn, within};

/// The first argument of a process that the demo starts.
pub(crate) const WORKER: &str = "demo-worker";

/// What the demo starts as another process, to be killed.
#[derive(Debug, Parser)]
pub(crate) struct Worker {
    /// Where the members answer, separated by commas.
    endpoints: String,
    key: String,
    /// Stands in this election.
    election: Option<String>,
}

/// Of the workers, who are killed: what the demo waits for.
const WORKER_TTL: Duration = Duration::from_secs(2);
/// Of the demo itself, which nothing is to disturb.
const TTL: Duration = Duration::from_secs(6);
const PATIENCE: Duration = Duration::from_secs(10);

/// The settings of a handle of the demo, whatever those of the caller are.
fn config(raft: RaftConfig, ttl: Duration) -> Result<registry::Config, Failure> {
    let mut config = registry::Config::in_memory();
    config.options.session_ttl = SessionTtl::new(ttl)?;
    config.backend = registry::Backend::Raft(raft);
    Ok(config)
}

impl Worker {
    /// Registers, stands if asked, and goes on until it is killed.
    pub(crate) async fn run(self) -> Outcome {
        let remote = RaftConfig::remote(self.endpoints.split(',').map(String::from));
        let registry = registry::connect(&config(remote, WORKER_TTL)?).await?;
        let _registration = registry.register(&key(&self.key)?, "alive").await?;
        if let Some(election) = self.election {
            let election = registry.election(&key(&election)?);
            let leadership = election.campaign(format!("process {}", std::process::id())).await?;
            leadership.lost().await;
        }
        std::future::pending().await
    }
}

pub(crate) async fn run(out: Output) -> Outcome {
    let (start, stop) = (Instant::now(), Stop::listen()?);
    let dir = tempfile::tempdir().map_err(|error| Failure::io("no temporary directory", &error))?;
    say(
        out,
        "1. A registry of three members: one in this process, two in processes of their own, data in a temporary directory.",
    )?;
    // To its end, which does not take long: what is half begun can't be stopped in order.
    let mut group = Group::found(dir.path()).await?;
    let shown = tokio::select! {
        shown = show(out, start, &mut group) => shown.map(|()| ExitCode::SUCCESS),
        () = stop.asked() => Ok(ExitCode::from(130)),
    };
    // However it has ended: nothing is left behind.
    let stopped = group.stop().await;
    shown.and_then(|code| stopped.map(|()| code))
}

async fn show(out: Output, start: Instant, group: &mut Group) -> Result<(), Failure> {
    let registry = group
        .here()
        .connect(&config(RaftConfig::default(), TTL)?.options)
        .await?;
    let addresses = group.addresses().join(",");
    say(
        out,
        format!(
            "   ready on {addresses} after {:.0?}; {} leads",
            start.elapsed(),
            group.leader().await?
        ),
    )?;
    keys(out, &registry).await?;
    workers(out, &registry, &addresses).await?;
    locks(out, &registry, group.here()).await?;
    elections(out, &registry, &addresses).await?;
    failover(out, &registry, group).await?;
    registry.close().await?;
    let elapsed = start.elapsed().as_secs_f64();
    say(
        out,
        format!("\nAll of it was checked as it was shown, in {elapsed:.1} s."),
    )
}

/// A line of the transcript.
fn say(out: Output, line: impl Into<String>) -> Result<(), Failure> {
    let line = line.into();
    out.line(|| line.clone(), || json!({ "shown": line.trim() }))
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

async fn keys(out: Output, registry: &Arc<dyn Registry>) -> Result<(), Failure> {
    say(out, "\n2. Keys and values, with revisions.")?;
    let first = registry.put(&key("/app/config")?, "v1").await?;
    say(out, format!("   put /app/config v1            revision {first}"))?;
    let second = registry
        .put_if(&key("/app/config")?, Expect::ModRevision(first), "v2")
        .await?;
    say(out, format!("   put v2 if at revision {first}       revision {second}"))?;
    match registry
        .put_if(&key("/app/config")?, Expect::ModRevision(first), "v3")
        .await
    {
        Err(error @ registry::Error::Conflict { .. }) => {
            say(out, format!("   put v3 if at revision {first}       refused: {error}"))?
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
    say(out, format!("   ls /app                       {}", children.join("  ")))?;
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
    within("the event did not come", next).await?
}

async fn workers(out: Output, registry: &Arc<dyn Registry>, addresses: &str) -> Result<(), Failure> {
    say(
        out,
        "\n3. Who is alive: two processes register, and one is killed (kill -9).",
    )?;
    let mut watch = registry
        .watch(WatchRequest::new(&key("/app/workers")?, WatchScope::Children))
        .await?;
    let mut first = spawn([WORKER, addresses, "/app/workers/w1"])?;
    say(out, format!("   watch: created {}", event(&mut watch).await?.key()))?;
    let mut second = spawn([WORKER, addresses, "/app/workers/w2"])?;
    say(out, format!("   watch: created {}", event(&mut watch).await?.key()))?;
    let killed = kill(&mut first).await?;
    let gone = event(&mut watch).await?;
    check(
        matches!(&gone, Event::Deleted { .. }) && gone.key().name() == "w1",
        "the killed worker's key goes",
    )?;
    say(
        out,
        format!(
            "   watch: expired {} {:.1} s after the kill, its session's TTL being {WORKER_TTL:?}",
            gone.key(),
            killed.elapsed().as_secs_f64()
        ),
    )?;
    kill(&mut second).await.map(|_| ())
}

async fn locks(out: Output, registry: &Arc<dyn Registry>, member: &registry::raft::Member) -> Result<(), Failure> {
    say(
        out,
        "\n4. A lock, taken in turn by three handles, with fencing tokens that only grow.",
    )?;
    let name = key("/app/nightly")?;
    let held = registry.lock(&name).label("first").acquire().await?;
    say(out, format!("   first  holds it with token {}", held.token()))?;
    let mut waiters = Vec::new();
    for who in ["second", "third"] {
        let other = member.connect(&config(RaftConfig::default(), TTL)?.options).await?;
        let place = registry.lock(&name).contenders().await?.len();
        let lock = other.lock(&name).label(who);
        waiters.push(tokio::spawn(async move {
            let held = lock.acquire().await?;
            let token = held.token();
            say(out, format!("   {who:6} holds it with token {token}"))?;
            held.release().await?;
            other.close().await?;
            Ok::<_, Failure>(token)
        }));
        let queued = async {
            while registry.lock(&name).contenders().await?.len() == place {
                tokio::task::yield_now().await;
            }
            Ok::<_, registry::Error>(())
        };
        within("a waiter did not queue", queued).await??;
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

async fn elections(out: Output, registry: &Arc<dyn Registry>, addresses: &str) -> Result<(), Failure> {
    say(out, "\n5. An election of two processes; the one that leads is killed.")?;
    let election = registry.election(&key("/app/scheduler")?);
    let mut course = election.observe().await?;
    let mut first = spawn([WORKER, addresses, "/app/schedulers/s1", "/app/scheduler"])?;
    let leader = next_leader(&mut course).await?;
    say(
        out,
        format!(
            "   {} leads with token {}",
            String::from_utf8_lossy(&leader.value),
            leader.token
        ),
    )?;
    let mut second = spawn([WORKER, addresses, "/app/schedulers/s2", "/app/scheduler"])?;
    let standing = async {
        while election.candidates().await?.len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok::<_, registry::Error>(())
    };
    within("no second candidate came", standing).await??;
    let killed = kill(&mut first).await?;
    let next = next_leader(&mut course).await?;
    check(next.token > leader.token, "the next leader's token is larger")?;
    say(
        out,
        format!(
            "   killed; {} leads with token {} after {:.1} s",
            String::from_utf8_lossy(&next.value),
            next.token,
            killed.elapsed().as_secs_f64()
        ),
    )?;
    kill(&mut second).await.map(|_| ())
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
    within("no leader came", next).await?
}

async fn failover(out: Output, registry: &Arc<dyn Registry>, group: &mut Group) -> Result<(), Failure> {
    say(
        out,
        "\n6. The member that leads the group is killed (kill -9), while a lock is held.",
    )?;
    let held = registry.lock(&key("/app/migration")?).acquire().await?;
    registry.put(&key("/app/config")?, "v4").await?;
    let (killed, when) = group.kill_leader().await?;
    let (path, value) = (key("/app/config")?, "v5");
    let revision = loop {
        match registry.put(&path, value).await {
            Ok(revision) => break revision,
            // It may have been written by a leader that could not say so any more; to put it again does no harm.
            Err(error) if when.elapsed() < PATIENCE => say(out, format!("   put v5: {error}; again"))?,
            Err(error) => return Err(error.into()),
        }
    };
    let acknowledged = when.elapsed();
    say(
        out,
        format!(
            "   {killed} killed; {} leads, and the next put is acknowledged {acknowledged:.0?} after the kill, at revision {revision}",
            group.leader().await?
        ),
    )?;
    check(!held.is_lost(), "the lock is held on")?;
    say(
        out,
        format!(
            "   the lock with token {} is held on, by the same session",
            held.token()
        ),
    )?;
    held.release().await?;

    let (start, address) = (Instant::now(), group.restart(killed)?);
    let back = async {
        loop {
            if let Some(found) = at(&address, &path).await?.filter(|found| found == value) {
                return Ok::<_, Failure>(found);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let found = within("the member did not come back", back).await??;
    say(
        out,
        format!(
            "   {killed} starts again on its directory; get /app/config at it alone, after {:.0?}: {found}",
            start.elapsed()
        ),
    )?;
    Ok(())
}

/// What one member has, if it answers.
async fn at(address: &str, path: &Key) -> Result<Option<String>, Failure> {
    let Ok(registry) = registry::connect(&config(RaftConfig::remote([address.to_owned()]), TTL)?).await else {
        return Ok(None);
    };
    let entry = registry.get(path, Read::Stale).await?;
    registry.close().await?;
    Ok(entry.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()))
}
