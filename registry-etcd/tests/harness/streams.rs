//! A wire that knows HTTP/2, whose streams can die while their connection lives.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{self, AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What a client sends before its first frame (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// The head of a frame, and the one kind of frame that carries what is asked and answered (sections 4.1 and 6.1).
const HEAD: usize = 9;
const DATA: u8 = 0;

/// A wire between a client and a server that speak HTTP/2 in the clear. Dropping it cuts it for good.
pub struct Streams {
    address: SocketAddr,
    stalls: Arc<Stalls>,
    _task: JoinSet<()>,
}

#[derive(Default)]
struct Stalls {
    connections: Mutex<Vec<Arc<Connection>>>,
    lost: AtomicUsize,
}

/// Streams are numbered in the order in which they are opened.
#[derive(Default)]
struct Connection {
    opened: AtomicU32,
    stalled: AtomicU32,
}

impl Streams {
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stalls = Arc::new(Stalls::default());
        let mut task = JoinSet::new();
        let accepting = stalls.clone();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(connect(client, server, accepting.clone()));
            }
        });
        Self {
            address,
            stalls,
            _task: task,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on the streams there are carry nothing, either way, and nobody is told. Pings of their connections are
    /// answered, and new streams pass.
    pub fn stall_present(&self) {
        for connection in &*self.stalls.connections.lock().unwrap() {
            connection
                .stalled
                .store(connection.opened.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// How much was lost.
    pub fn lost(&self) -> usize {
        self.stalls.lost.load(Ordering::SeqCst)
    }
}

async fn connect(client: TcpStream, server: SocketAddr, stalls: Arc<Stalls>) {
    let Ok(server) = TcpStream::connect(server).await else {
        return;
    };
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let connection = Arc::new(Connection::default());
    stalls.connections.lock().unwrap().push(connection.clone());
    let ((mut from_client, to_client), (from_server, mut to_server)) = (client.into_split(), server.into_split());
    let mut preface = [0; PREFACE];
    if from_client.read_exact(&mut preface).await.is_err() || to_server.write_all(&preface).await.is_err() {
        return;
    }
    // That either side ends, or breaks off, ends both.
    let _ = tokio::select! {
        ended = pass(from_client, to_server, &connection, &stalls) => ended,
        ended = pass(from_server, to_client, &connection, &stalls) => ended,
    };
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    connection: &Connection,
    stalls: &Stalls,
) -> io::Result<()> {
    loop {
        let mut frame = vec![0; HEAD];
        from.read_exact(&mut frame).await?;
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
        let stream = u32::from_be_bytes([frame[5] & 0x7f, frame[6], frame[7], frame[8]]);
        frame.resize(HEAD + length as usize, 0);
        from.read_exact(&mut frame[HEAD..]).await?;
        connection.opened.fetch_max(stream, Ordering::SeqCst);
        // Headers pass: what packs them would lose count of those before.
        if frame[3] == DATA && stream <= connection.stalled.load(Ordering::SeqCst) {
            stalls.lost.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        to.write_all(&frame).await?;
    }
}
