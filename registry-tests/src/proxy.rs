//! A wire that can be cut: a TCP proxy between a client and its server.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Everything passes.
    Whole,
    /// Nothing passes, and nobody is told: packets are lost.
    Cut,
    /// Connections are closed, and new ones refused.
    Refused,
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
        let (mode, modes) = watch::channel(Mode::Whole);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *modes.borrow() != Mode::Refused {
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
        self.mode.send_replace(Mode::Cut);
    }

    /// Closes every connection, and refuses new ones.
    pub fn refuse(&self) {
        self.mode.send_replace(Mode::Refused);
    }

    /// Makes it whole again. Connections that were cut go on with what was not read yet.
    pub fn mend(&self) {
        self.mode.send_replace(Mode::Whole);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.mode.send_replace(Mode::Refused);
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
        () = pass(from_client, to_server, modes.clone()) => {}
        () = pass(from_server, to_client, modes) => {}
        // An error says that the wire is gone.
        _ = refused.wait_for(|mode| *mode == Mode::Refused) => {}
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut modes: watch::Receiver<Mode>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return };
        if read == 0 || modes.wait_for(|mode| *mode == Mode::Whole).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
