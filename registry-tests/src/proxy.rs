//! A wire that can be cut: a TCP proxy between a client and its server.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    ToServer,
    /// From the server.
    ToClient,
}

/// What becomes of what goes one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Way {
    #[default]
    Open,
    /// It comes later.
    Slow(Duration),
    /// It does not come, and nobody is told: packets are lost.
    Cut,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    to_server: Way,
    to_client: Way,
    /// Connections are closed, and new ones refused.
    refused: bool,
    /// How often the connections of that moment were cut for good.
    stalls: u64,
}

impl Mode {
    /// For a connection that was made after so many stalls.
    fn way(&self, direction: Direction, made_after: u64) -> Way {
        match direction {
            _ if self.stalls > made_after => Way::Cut,
            Direction::ToServer => self.to_server,
            Direction::ToClient => self.to_client,
        }
    }
}

/// A wire between a client and a server. Dropping it cuts it for good.
#[derive(Debug)]
pub struct Wire {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    task: JoinHandle<()>,
}

impl Wire {
    /// A wire to that server.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let (mode, modes) = watch::channel(Mode::default());
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if !modes.borrow().refused {
                    tokio::spawn(connection(client, server, modes.clone()));
                }
            }
        });
        Self { address, mode, task }
    }

    /// Where a client connects.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Loses every byte from now on, both ways, and tells nobody.
    pub fn cut(&self) {
        self.set(Way::Cut, Way::Cut);
    }

    /// Loses every byte that goes one way.
    pub fn cut_one_way(&self, direction: Direction) {
        match direction {
            Direction::ToServer => self.set(Way::Cut, Way::Open),
            Direction::ToClient => self.set(Way::Open, Way::Cut),
        }
    }

    /// Holds up whatever is sent, both ways, for so long.
    pub fn slow(&self, by: Duration) {
        self.set(Way::Slow(by), Way::Slow(by));
    }

    /// Closes every connection, and refuses new ones.
    pub fn refuse(&self) {
        self.mode.send_modify(|mode| mode.refused = true);
    }

    /// Loses every byte of the connections there are, for good, and tells nobody. New ones pass.
    pub fn stall_present(&self) {
        self.mode.send_modify(|mode| mode.stalls += 1);
    }

    /// Makes it whole again. Connections that were cut go on with what was not read yet.
    pub fn mend(&self) {
        self.set(Way::Open, Way::Open);
    }

    fn set(&self, to_server: Way, to_client: Way) {
        self.mode.send_modify(|mode| {
            *mode = Mode {
                to_server,
                to_client,
                refused: false,
                stalls: mode.stalls,
            };
        });
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.refuse();
        self.task.abort();
    }
}

async fn connection(client: TcpStream, server: SocketAddr, modes: watch::Receiver<Mode>) {
    let connecting = tokio::time::timeout(Duration::from_secs(5), TcpStream::connect(server));
    let Ok(Ok(server)) = connecting.await else { return };
    for stream in [&client, &server] {
        // Without it the wire is slower, and as good.
        let _ = stream.set_nodelay(true);
    }
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let mut refused = modes.clone();
    tokio::select! {
        () = pass(from_client, to_server, modes.clone(), Direction::ToServer) => {}
        () = pass(from_server, to_client, modes, Direction::ToClient) => {}
        // An error says that the wire is gone.
        _ = refused.wait_for(|mode| mode.refused) => {}
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut modes: watch::Receiver<Mode>, direction: Direction) {
    let made_after = modes.borrow().stalls;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return };
        if read == 0 {
            return;
        }
        let Ok(way) = modes
            .wait_for(|mode| mode.way(direction, made_after) != Way::Cut)
            .await
            .map(|mode| mode.way(direction, made_after))
        else {
            return;
        };
        if let Way::Slow(by) = way {
            tokio::time::sleep(by).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
