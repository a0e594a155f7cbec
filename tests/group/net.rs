//! A network between member processes in which each way from one to another can be cut.
//!
//! Each member is reached through a proxy. Who calls is told by the process that holds the other end of the connection.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Two members between which nothing passes.
type Cuts = HashSet<(usize, usize)>;

pub(crate) struct Net {
    cuts: watch::Sender<Cuts>,
    processes: Arc<Mutex<Vec<Option<u32>>>>,
    proxies: Vec<(SocketAddr, JoinHandle<()>)>,
}

impl Net {
    /// A network before members that listen there.
    pub(crate) async fn before(members: &[SocketAddr]) -> Self {
        let (cuts, cut) = watch::channel(Cuts::new());
        let processes = Arc::new(Mutex::new(vec![None; members.len()]));
        let mut proxies = Vec::new();
        for (to, member) in members.iter().copied().enumerate() {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (cut, processes) = (cut.clone(), processes.clone());
            let proxy = tokio::spawn(async move {
                while let Ok((client, address)) = listener.accept().await {
                    let caller = Arc::new(Caller {
                        address,
                        processes: processes.clone(),
                        found: OnceLock::new(),
                    });
                    tokio::spawn(connection(client, member, caller, to, cut.clone()));
                }
            });
            proxies.push((address, proxy));
        }
        Self {
            cuts,
            processes,
            proxies,
        }
    }

    /// Where the others reach a member.
    pub(crate) fn address(&self, member: usize) -> SocketAddr {
        self.proxies[member].0
    }

    /// A member runs as that process now.
    pub(crate) fn runs(&self, member: usize, process: Option<u32>) {
        self.processes.lock().unwrap()[member] = process;
    }

    /// Loses every byte between two members, both ways, and tells nobody.
    pub(crate) fn cut(&self, one: usize, other: usize) {
        self.cuts.send_modify(|cuts| cuts.extend([(one, other), (other, one)]));
    }

    /// Cuts a member off from all others.
    pub(crate) fn isolate(&self, member: usize) {
        for other in (0..self.proxies.len()).filter(|other| *other != member) {
            self.cut(member, other);
        }
    }

    /// Makes everything whole again.
    pub(crate) fn mend(&self) {
        self.cuts.send_modify(HashSet::clear);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for (_, proxy) in &self.proxies {
            proxy.abort();
        }
    }
}

/// Who is at the other end of a connection. A process may be known only after it has called.
struct Caller {
    address: SocketAddr,
    processes: Arc<Mutex<Vec<Option<u32>>>>,
    found: OnceLock<usize>,
}

impl Caller {
    /// Which member's process holds the other end, if one does.
    fn member(&self) -> Option<usize> {
        if let Some(found) = self.found.get() {
            return Some(*found);
        }
        let port = format!(":{:04X}", self.address.port());
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let mut sockets = table
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let socket = sockets.find(|fields| fields.get(1).is_some_and(|local| local.ends_with(&port)))?;
        let name = format!("socket:[{}]", socket.get(9)?);
        let holds = |process: &Option<u32>| {
            let files = process.and_then(|id| std::fs::read_dir(format!("/proc/{id}/fd")).ok());
            files
                .into_iter()
                .flatten()
                .flatten()
                .any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy() == name))
        };
        let found = self.processes.lock().unwrap().iter().position(holds)?;
        Some(*self.found.get_or_init(|| found))
    }
}

async fn connection(
    client: TcpStream,
    member: SocketAddr,
    caller: Arc<Caller>,
    to: usize,
    cuts: watch::Receiver<Cuts>,
) {
    let Ok(server) = TcpStream::connect(member).await else {
        return;
    };
    for stream in [&client, &server] {
        // Without it the network is slower, and as good.
        let _ = stream.set_nodelay(true);
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::select! {
        () = pass(from_client, to_server, &caller, to, cuts.clone()) => {}
        () = pass(from_server, to_client, &caller, to, cuts) => {}
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut into: OwnedWriteHalf,
    caller: &Caller,
    to: usize,
    mut cuts: watch::Receiver<Cuts>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else {
            return;
        };
        let whole = |cuts: &Cuts| cuts.is_empty() || caller.member().is_none_or(|from| !cuts.contains(&(from, to)));
        if read == 0 || cuts.wait_for(whole).await.is_err() || into.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
