//! A server that knows no persistent recursive watches, as those before ZooKeeper 3.6.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// What asks for such a watch, and what no server knows.
const ADD_WATCH: i32 = 106;
const UNKNOWN: i32 = 9999;

/// The address of a way to the server on which it is asked for something unknown instead of such a watch: it answers as
/// an old server does, and closes the connection.
pub async fn through_an_old_server(server: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(&server).await else {
                return;
            };
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            tokio::spawn(requests(from_client, to_server));
            tokio::spawn(answers(from_server, to_client));
        }
    });
    address
}

async fn requests(mut client: OwnedReadHalf, mut server: OwnedWriteHalf) -> Option<()> {
    let mut first = true;
    loop {
        let length = client.read_i32().await.ok()?;
        let mut frame = vec![0; usize::try_from(length).ok()?];
        client.read_exact(&mut frame).await.ok()?;
        // The first is no request but the client's introduction. Later ones begin with a number and a code.
        if !first && frame[4..8] == ADD_WATCH.to_be_bytes() {
            frame[4..8].copy_from_slice(&UNKNOWN.to_be_bytes());
        }
        first = false;
        server.write_i32(length).await.ok()?;
        server.write_all(&frame).await.ok()?;
    }
}

async fn answers(mut server: OwnedReadHalf, mut client: OwnedWriteHalf) {
    // An error ends the connection, which is what there is to tell.
    let _ = tokio::io::copy(&mut server, &mut client).await;
}
