//! A way to a server on which a chosen transaction waits, and nothing passes after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// A transaction (`multi`).
const MULTI: i32 = 14;

/// Holds one transaction back. When it is let through, it is the last thing that reaches the server.
pub struct Gate {
    pub address: String,
    state: Arc<State>,
}

struct State {
    /// How many more transactions pass before the one that waits.
    pass: AtomicUsize,
    arrived: Semaphore,
    open: Semaphore,
}

impl Gate {
    /// A way to that server, on which everything passes.
    pub async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State {
            pass: AtomicUsize::new(usize::MAX),
            arrived: Semaphore::new(0),
            open: Semaphore::new(0),
        });
        let gate = Self {
            address,
            state: state.clone(),
        };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else {
                    return;
                };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(requests(from_client, to_server, state.clone()));
                tokio::spawn(answers(from_server, to_client));
            }
        });
        gate
    }

    /// Holds a transaction back, after so many that pass.
    pub fn hold_after(&self, pass: usize) {
        self.state.pass.store(pass, Ordering::SeqCst);
    }

    /// Waits until the transaction is held back.
    pub async fn arrived(&self) {
        self.state.arrived.acquire().await.unwrap().forget();
    }

    /// Lets it through, and nothing after it.
    pub fn open_and_close(&self) {
        self.state.open.add_permits(1);
    }
}

async fn requests(mut client: OwnedReadHalf, mut server: OwnedWriteHalf, state: Arc<State>) -> Option<()> {
    let mut first = true;
    loop {
        let length = client.read_i32().await.ok()?;
        let mut frame = vec![0; usize::try_from(length).ok()?];
        client.read_exact(&mut frame).await.ok()?;
        // The first is the client's introduction.
        let held = !first && frame[4..8] == MULTI.to_be_bytes() && {
            let next = |pass: usize| Some(pass.saturating_sub(1));
            state.pass.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next) == Ok(0)
        };
        first = false;
        if held {
            state.arrived.add_permits(1);
            state.open.acquire().await.unwrap().forget();
        }
        server.write_i32(length).await.ok()?;
        server.write_all(&frame).await.ok()?;
        if held {
            // The connection stays open.
            return std::future::pending().await;
        }
    }
}

async fn answers(mut server: OwnedReadHalf, mut client: OwnedWriteHalf) {
    // An error ends the connection, which is what there is to tell.
    let _ = tokio::io::copy(&mut server, &mut client).await;
}
