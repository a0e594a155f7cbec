//! How long nobody can write after the leader is killed (`kill -9`), and after it stops in an orderly way: three members
//! as processes, medians and extremes of 20 trials for each profile of timers. One handle has a session, a lock, a
//! leadership and a watch of every write through all of them, and loses none.
//!
//! `cargo bench -p registry-raft --bench failover [-- TRIALS]`

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use registry_api::{
    Held, Key, Leadership, Options, Registry, Result, SessionId, SessionTtl, Watch, WatchItem, WatchRequest, WatchScope,
};
use registry_raft::{Member, RaftConfig, Status, Timers};
use tokio::sync::watch;

const NAMES: [&str; 3] = ["a", "b", "c"];

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    if let [what, name, dir, timers, addresses] = &arguments[..]
        && what == "member"
    {
        return member(name, dir.into(), timers, addresses).await;
    }
    let trials = arguments.first().and_then(|trials| trials.parse().ok()).unwrap_or(20);
    for timers in ["fast", "default"] {
        let dir = std::env::temp_dir().join(format!("registry-failover-{}-{timers}", std::process::id()));
        let measured = measure(timers, &dir, trials).await;
        // The figures are printed; what can't be removed is for the user to see.
        let _ = std::fs::remove_dir_all(&dir);
        measured?;
    }
    Ok(())
}

fn config(name: &str, dir: &Path, timers: &str, addresses: &[String]) -> RaftConfig {
    let mut config = RaftConfig::default();
    config.member = Some(name.into());
    config.data_dir = Some(dir.join(name));
    let list = NAMES.iter().map(ToString::to_string).zip(addresses.iter().cloned());
    config.cluster = list.collect::<BTreeMap<_, _>>();
    config.timers = if timers == "fast" {
        Timers::Fast
    } else {
        Timers::Default
    };
    config
}

/// A member, until its standard input ends.
async fn member(name: &str, dir: PathBuf, timers: &str, addresses: &str) -> Result<()> {
    let addresses: Vec<_> = addresses.split(',').map(str::to_owned).collect();
    let member = Member::start(&config(name, &dir, timers, &addresses)).await?;
    println!("ready");
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop));
    ended.await.expect("reading does not panic");
    member.stop().await
}

struct Group {
    dir: PathBuf,
    timers: String,
    addresses: Vec<String>,
    processes: Vec<Child>,
}

impl Group {
    fn spawn(&self, at: usize) -> Child {
        let mut command = Command::new(std::env::current_exe().expect("this program has a file"));
        command
            .args(["member", NAMES[at]])
            .arg(&self.dir)
            .arg(&self.timers)
            .arg(self.addresses.join(","));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().expect("a member can be started")
    }

    fn ready(process: &mut Child) {
        let output = process.stdout.take().expect("its output is a pipe");
        let first = BufReader::new(output).lines().next();
        assert!(first.is_some_and(|line| line.is_ok()), "a member did not start");
    }

    /// Which member leads and every one follows.
    async fn leader(&self) -> usize {
        loop {
            let remote = RaftConfig::remote(self.addresses.clone());
            let status = registry_raft::status(&remote, &options()).await;
            let followed = |status: &Status| {
                let leader = status.leader()?.name.clone();
                let all = status
                    .members
                    .iter()
                    .all(|member| member.lag.is_some_and(|lag| lag < 10));
                NAMES.iter().position(|name| *name == leader).filter(|_| all)
            };
            if let Some(leader) = status.ok().as_ref().and_then(followed) {
                return leader;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn connect(&self) -> Result<Arc<dyn Registry>> {
        registry_raft::connect(&RaftConfig::remote(self.addresses.clone()), &options()).await
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may have ended.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn options() -> Options {
    Options {
        session_ttl: SessionTtl::new(Duration::from_secs(10)).expect("it is one"),
        ..Options::default()
    }
}

async fn measure(timers: &str, dir: &Path, trials: usize) -> Result<()> {
    let free = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        listener.local_addr().expect("it has an address").to_string()
    };
    let mut group = Group {
        dir: dir.into(),
        timers: timers.into(),
        addresses: NAMES.iter().map(|_| free()).collect(),
        processes: Vec::new(),
    };
    for at in 0..NAMES.len() {
        let process = group.spawn(at);
        group.processes.push(process);
    }
    group.processes.iter_mut().for_each(Group::ready);
    let undisturbed = Undisturbed::begin(group.connect().await?).await?;
    let numbers = Arc::new(Numbers {
        registry: undisturbed.registry.clone(),
        last: AtomicU64::new(0),
    });
    for how in ["kill -9", "orderly stop"] {
        let mut took = Vec::new();
        for _ in 0..trials {
            let leader = group.leader().await;
            numbers.put().await?;
            let (tell, told) = watch::channel(false);
            let longest = tokio::spawn(longest_put(numbers.clone(), told));
            match how {
                "kill -9" => group.processes[leader].kill().expect("it runs"),
                _ => drop(group.processes[leader].stdin.take()),
            }
            group.processes[leader].wait().expect("it ends");
            tell.send_replace(true);
            took.push(longest.await.expect("it does not panic")?);
            group.processes[leader] = group.spawn(leader);
            Group::ready(&mut group.processes[leader]);
        }
        took.sort();
        println!(
            "timers {timers:8} {how:13} until the next write is acknowledged: median {:4} ms, least {:4}, most {:4} ({trials} trials)",
            took[took.len() / 2].as_millis(),
            took[0].as_millis(),
            took[took.len() - 1].as_millis()
        );
    }
    let puts = numbers.last.load(Ordering::Relaxed);
    undisturbed.end(puts).await?;
    println!(
        "timers {timers:8} session, lock and leadership are those of the beginning; the watch was told all {puts} writes, each once"
    );
    Ok(())
}

/// What a failover must not take from anybody.
struct Undisturbed {
    registry: Arc<dyn Registry>,
    session: SessionId,
    held: Held,
    leadership: Leadership,
    told: tokio::task::JoinHandle<Result<()>>,
    newest: watch::Receiver<u64>,
}

impl Undisturbed {
    async fn begin(registry: Arc<dyn Registry>) -> Result<Self> {
        let watch = registry.watch(WatchRequest::new(key(), WatchScope::Key)).await?;
        let (telling, newest) = watch::channel(0);
        Ok(Self {
            session: registry.session().live()?,
            held: registry.lock(&key()).acquire().await?,
            leadership: registry.election(&key()).campaign("this one").await?,
            told: tokio::spawn(in_order(watch, telling)),
            newest,
            registry,
        })
    }

    /// Checks that nothing is lost after so many writes.
    async fn end(mut self, puts: u64) -> Result<()> {
        let told = self.newest.wait_for(|newest| *newest == puts);
        tokio::select! {
            told = tokio::time::timeout(Duration::from_secs(30), told) => {
                told.expect("the watch is told the last write in time").expect("the watch goes on");
            }
            ended = &mut self.told => panic!("the watch has ended: {ended:?}"),
        }
        assert_eq!(self.registry.session().live()?, self.session, "the session is lost");
        assert!(
            !self.held.is_lost() && !self.leadership.is_lost(),
            "what was held is lost"
        );
        self.held.release().await?;
        self.leadership.resign().await?;
        self.registry.close().await
    }
}

/// Follows a key whose values count up. None may be missing or come twice.
async fn in_order(mut watch: Watch, newest: watch::Sender<u64>) -> Result<()> {
    while let Some(item) = watch.next().await {
        let WatchItem::Changes(events) = item? else { continue };
        for event in events {
            let number = std::str::from_utf8(&event.entry().value).expect("it is a number");
            let before = newest.send_replace(number.parse().expect("it is a number"));
            assert_eq!(*newest.borrow(), before + 1, "an event is lost, or came twice");
        }
    }
    Ok(())
}

fn key() -> Key {
    Key::parse("/k").expect("it is one")
}

/// Puts one number after the other.
struct Numbers {
    registry: Arc<dyn Registry>,
    last: AtomicU64,
}

impl Numbers {
    async fn put(&self) -> Result<()> {
        let next = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.registry.put(&key(), next.to_string()).await.map(drop)
    }
}

/// The longest that one put took, of a writer that goes on until it is told, and once more.
async fn longest_put(numbers: Arc<Numbers>, told: watch::Receiver<bool>) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    loop {
        let (last, asked) = (*told.borrow(), Instant::now());
        numbers.put().await?;
        longest = longest.max(asked.elapsed());
        if last {
            return Ok(longest);
        }
    }
}
