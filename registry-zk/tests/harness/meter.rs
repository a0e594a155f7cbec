//! A way to a server on which the size of each response is measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Measures responses, and holds them back when it is told to.
pub struct Meter {
    pub address: String,
    state: Arc<State>,
}

struct State {
    largest: AtomicUsize,
    total: AtomicUsize,
    held: watch::Sender<bool>,
}

impl Meter {
    /// A way to that server.
    pub async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State {
            largest: AtomicUsize::new(0),
            total: AtomicUsize::new(0),
            held: watch::Sender::new(false),
        });
        let meter = Self {
            address,
            state: state.clone(),
        };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else {
                    return;
                };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(requests(from_client, to_server));
                tokio::spawn(responses(from_server, to_client, state.clone()));
            }
        });
        meter
    }

    /// Returns the bytes of the largest response and of all since the last call.
    pub fn take(&self) -> (usize, usize) {
        let take = |count: &AtomicUsize| count.swap(0, Ordering::SeqCst);
        (take(&self.state.largest), take(&self.state.total))
    }

    /// Holds responses back, or lets them through again.
    pub fn hold(&self, held: bool) {
        self.state.held.send_replace(held);
    }
}

async fn requests(mut client: OwnedReadHalf, mut server: OwnedWriteHalf) {
    // An error ends the connection, which is what there is to tell.
    let _ = tokio::io::copy(&mut client, &mut server).await;
}

async fn responses(mut server: OwnedReadHalf, mut client: OwnedWriteHalf, state: Arc<State>) -> Option<()> {
    let mut held = state.held.subscribe();
    loop {
        let length = server.read_i32().await.ok()?;
        let size = usize::try_from(length).ok()?;
        state.largest.fetch_max(size, Ordering::SeqCst);
        state.total.fetch_add(size, Ordering::SeqCst);
        let mut frame = vec![0; size];
        server.read_exact(&mut frame).await.ok()?;
        held.wait_for(|held| !held).await.ok()?;
        client.write_i32(length).await.ok()?;
        client.write_all(&frame).await.ok()?;
    }
}
