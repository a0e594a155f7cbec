//! A server process that a test owns.

use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// A process that is killed with the test.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it, and waits for a line of its output that `ready` takes.
    pub async fn start<T>(command: Command, ready: impl Fn(&str) -> Option<T>) -> (Self, T) {
        let (process, mut lines) = Self::spawn(command);
        let name = process.name.clone();
        let waiting = async {
            while let Some(line) = lines.next_line().await.expect("its output can be read") {
                if let Some(found) = ready(&line) {
                    return found;
                }
            }
            panic!("{name} ended before it was ready");
        };
        let found = crate::within(std::time::Duration::from_secs(30), waiting).await;
        drain(lines);
        (process, found)
    }

    /// Starts it, and waits for nothing: for one that is ready only with others.
    pub fn start_unready(command: Command) -> Self {
        let (process, lines) = Self::spawn(command);
        drain(lines);
        process
    }

    fn spawn(mut command: Command) -> (Self, Lines<BufReader<ChildStdout>>) {
        let name = format!("{:?}", command.as_std().get_program());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{name} can't be started: {error}"));
        let lines = BufReader::new(child.stdout.take().expect("its output is a pipe")).lines();
        (Self { child, name }, lines)
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub async fn kill(&mut self) {
        self.child
            .kill()
            .await
            .unwrap_or_else(|error| panic!("{} can't be killed: {error}", self.name));
    }

    /// Asks it to stop (SIGTERM) and waits for its end.
    pub async fn stop(&mut self) -> io::Result<std::process::ExitStatus> {
        self.signal(Signal::TERM);
        self.child.wait().await
    }

    /// Stops it as Ctrl-C does (SIGINT) and waits for its end.
    pub async fn interrupt(&mut self) -> io::Result<std::process::ExitStatus> {
        self.signal(Signal::INT);
        self.child.wait().await
    }

    /// Its number, as long as it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until it ends by itself.
    pub async fn ended(&mut self) -> io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }

    /// Stops its clock.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self
            .child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let pid = pid.unwrap_or_else(|| panic!("{} has ended", self.name));
        kill_process(pid, signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }
}

/// What it prints later is read and thrown away, so that it never waits for a reader.
fn drain(mut lines: Lines<BufReader<ChildStdout>>) {
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
}

/// Takes as many open files for this process, and those that it starts, as the system gives. Answers how many.
pub fn take_open_files() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("what is allowed can be taken");
    limit.maximum.unwrap_or(u64::MAX)
}

/// The time that a process has spent on the processors.
pub fn on_cpu(process: u32) -> io::Result<Duration> {
    // What `/proc` counts in.
    const TICK: Duration = Duration::from_millis(10);
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name, in parentheses, may hold blanks; user and system time are the 12th and 13th field after it.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks = fields.skip(11).take(2).map(str::parse::<u32>);
    let ticks = ticks.sum::<std::result::Result<u32, _>>().map_err(io::Error::other)?;
    Ok(TICK * ticks)
}

/// A port that nobody uses, and that nobody is given again: neither by this, in this process, nor by the system, which
/// takes those for connections and for listeners that leave it the choice from 32768 up. A server that needs a while to
/// start finds it as free as it was.
pub fn free_port() -> u16 {
    const FIRST: u32 = 10_000;
    const PORTS: u32 = 22_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Processes that test at the same time begin far from each other.
    let start = std::process::id().wrapping_mul(997);
    for _ in 0..PORTS {
        let place = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        let port = u16::try_from(FIRST + place).expect("it is below 32000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("loopback has no free port");
}

/// Returns the class path of a ZooKeeper server: Debian's jars of the system, or those in the folder that the environment
/// variable `REGISTRY_ZOOKEEPER_JARS` names.
///
/// # Panics
/// If the folder has no ZooKeeper in it.
pub fn zookeeper_class_path() -> String {
    let jars = zookeeper_jars();
    let paths: Vec<_> = jars.iter().map(|jar| jar.display().to_string()).collect();
    paths.join(":")
}

/// Returns the jars of a ZooKeeper server and of what it needs. Each is named without its version, most are links.
///
/// # Panics
/// If the folder has no ZooKeeper in it.
pub fn zookeeper_jars() -> Vec<PathBuf> {
    const FOLDER: &str = "REGISTRY_ZOOKEEPER_JARS";
    const WANTED: [&str; 7] = [
        "zookeeper.jar",
        "zookeeper-jute.jar",
        "slf4j-api.jar",
        "slf4j-simple.jar",
        "snappy-java.jar",
        "metrics-core.jar",
        "netty-all.jar",
    ];
    let netty = |name: &str| name.starts_with("netty-") && name.ends_with(".jar");
    let folder = std::env::var_os(FOLDER).map_or_else(|| PathBuf::from("/usr/share/java"), PathBuf::from);
    let files = std::fs::read_dir(&folder).into_iter().flatten();
    let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    let mut jars: Vec<_> = names
        .filter(|name| WANTED.contains(&name.as_str()) || netty(name))
        .collect();
    // Debian's zookeeper.jar names the system's jars as its class path: those of the folder have to come before it.
    jars.sort();
    assert!(
        jars.iter().any(|name| name == "zookeeper.jar"),
        "no zookeeper.jar in {}: apt-get install zookeeper, or set {FOLDER}",
        folder.display()
    );
    jars.iter().map(|name| folder.join(name)).collect()
}
