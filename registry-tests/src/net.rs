//! A network between member processes in which each way from one to another can be cut or slowed.
//!
//! Each member is reached through a proxy. Who calls is told by the process that holds the other end of the connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::proxy::Way;

/// What becomes of bytes from one member to another, where it is not what should.
type Broken = HashMap<(usize, usize), Way>;

/// A network between members. Dropping it cuts it for good.
#[derive(Debug)]
pub struct Net {
    broken: watch::Sender<Broken>,
    processes: Arc<Mutex<Vec<Option<u32>>>>,
    proxies: Vec<(SocketAddr, JoinHandle<()>)>,
}

impl Net {
    /// A network before members that listen there.
    pub async fn before(members: &[SocketAddr]) -> Self {
        let (broken, seen) = watch::channel(Broken::new());
        let processes = Arc::new(Mutex::new(vec![None; members.len()]));
        let mut proxies = Vec::new();
        for (to, member) in members.iter().copied().enumerate() {
            let listener = TcpListener::bind("127.0.0.1:0")
                .await
                .expect("loopback has a free port");
            let address = listener.local_addr().expect("a listener has an address");
            let (broken, processes) = (seen.clone(), processes.clone());
            let proxy = tokio::spawn(async move {
                while let Ok((client, client_address)) = listener.accept().await {
                    let caller = Arc::new(Caller {
                        from: client_address,
                        to: address,
                        processes: processes.clone(),
                        found: OnceLock::new(),
                    });
                    tokio::spawn(connection(client, member, caller, to, broken.clone()));
                }
            });
            proxies.push((address, proxy));
        }
        Self {
            broken,
            processes,
            proxies,
        }
    }

    /// Where the others reach a member.
    pub fn address(&self, member: usize) -> SocketAddr {
        self.proxies[member].0
    }

    /// A member runs as that process now.
    pub fn runs(&self, member: usize, process: Option<u32>) {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)[member] = process;
    }

    /// Loses every byte between two members, both ways, and tells nobody.
    pub fn cut(&self, one: usize, other: usize) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Loses every byte from one member to another, whoever of them called, and tells nobody.
    pub fn cut_one_way(&self, from: usize, to: usize) {
        self.broken
            .send_modify(|broken| broken.extend([((from, to), Way::Cut)]));
    }

    /// Holds up whatever goes between two members, for so long each way.
    pub fn slow(&self, one: usize, other: usize, by: Duration) {
        self.broken
            .send_modify(|broken| broken.extend([(one, other), (other, one)].map(|way| (way, Way::Slow(by)))));
    }

    /// Cuts a member off from all others.
    pub fn isolate(&self, member: usize) {
        for other in (0..self.proxies.len()).filter(|other| *other != member) {
            self.cut(member, other);
        }
    }

    /// Makes everything whole again.
    pub fn mend(&self) {
        self.broken.send_modify(HashMap::clear);
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
    from: SocketAddr,
    to: SocketAddr,
    processes: Arc<Mutex<Vec<Option<u32>>>>,
    found: OnceLock<usize>,
}

impl Caller {
    /// Which member's process holds the other end, if one does.
    fn member(&self) -> Option<usize> {
        if let Some(found) = self.found.get() {
            return Some(*found);
        }
        let table = std::fs::read_to_string("/proc/net/tcp").expect("the system says who is connected");
        let name = format!("socket:[{}]", socket_of(&table, self.from, self.to)?);
        let holds = |process: &Option<u32>| {
            let files = process.and_then(|id| std::fs::read_dir(format!("/proc/{id}/fd")).ok());
            files
                .into_iter()
                .flatten()
                .flatten()
                .any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy() == name))
        };
        let processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        let found = processes.iter().position(holds)?;
        Some(*self.found.get_or_init(|| found))
    }
}

/// The number of the socket at the near end of a connection. One port can be the near end of several.
fn socket_of(table: &str, from: SocketAddr, to: SocketAddr) -> Option<&str> {
    let is_at = |field: &str, address: SocketAddr| field.ends_with(&format!(":{:04X}", address.port()));
    table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|fields| fields.len() > 9 && is_at(fields[1], from) && is_at(fields[2], to))
        .map(|fields| fields[9])
}

async fn connection(
    client: TcpStream,
    member: SocketAddr,
    caller: Arc<Caller>,
    to: usize,
    broken: watch::Receiver<Broken>,
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
        () = pass(from_client, to_server, broken.clone(), || Some((caller.member()?, to))) => {}
        () = pass(from_server, to_client, broken, || Some((to, caller.member()?))) => {}
    }
}

/// Passes on what comes, in a direction that is known once the caller is.
async fn pass(
    mut from: OwnedReadHalf,
    mut into: OwnedWriteHalf,
    mut broken: watch::Receiver<Broken>,
    direction: impl Fn() -> Option<(usize, usize)>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else {
            return;
        };
        let way = |broken: &Broken| match broken.is_empty() {
            true => Way::Open,
            false => direction()
                .and_then(|way| broken.get(&way).copied())
                .unwrap_or_default(),
        };
        let Ok(passable) = broken
            .wait_for(|broken| way(broken) != Way::Cut)
            .await
            .map(|broken| way(&broken))
        else {
            return;
        };
        if let Way::Slow(by) = passable {
            tokio::time::sleep(by).await;
        }
        if read == 0 || into.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_with_several_connections_is_told_apart() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:AAAA 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 11 1
   1: 0100007F:AAAA 0100007F:1F91 01 00000000:00000000 00:00000000 00000000     0        0 12 1
   2: 0100007F:1F91 0100007F:AAAA 01 00000000:00000000 00:00000000 00000000     0        0 13 1
";
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(socket_of(table, at(0xAAAA), at(8081)), Some("12"));
        assert_eq!(socket_of(table, at(0xAAAA), at(8082)), None);
    }
}
