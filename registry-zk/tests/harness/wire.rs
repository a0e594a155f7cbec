//! ZooKeeper's protocol spoken by hand, for what a client library does not do.

use registry_api::SessionId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What a server says of a session.
#[derive(PartialEq, Eq)]
pub enum Answer {
    /// It was there, and was asked to close it.
    Asked,
    Over,
}

/// Closes a session as its owner would.
pub async fn close_session(port: u16, session: SessionId) -> Option<Answer> {
    let (mut stream, granted) = open(port, session).await?;
    if granted.0 == 0 {
        return Some(Answer::Over);
    }
    close(&mut stream).await?;
    Some(Answer::Asked)
}

/// Makes a node with no data at all, as Java clients can, which is not the same as empty data.
pub async fn create_without_data(port: u16, path: &str) -> Option<()> {
    let (mut stream, _) = open(port, SessionId(0)).await?;
    let mut create = request(1);
    create.extend(bytes(path.as_bytes()));
    create.extend((-1i32).to_be_bytes());
    // One entry of access control: all rights, for the world, which is anyone.
    create.extend(1i32.to_be_bytes());
    create.extend(31i32.to_be_bytes());
    create.extend(bytes(b"world"));
    create.extend(bytes(b"anyone"));
    // Persistent.
    create.extend(0i32.to_be_bytes());
    send(&mut stream, &create).await?;
    // The request's number, the change's, and whether it failed.
    let answer = receive(&mut stream).await?;
    assert_eq!(answer[12..16], [0; 4], "the node is not made");
    close(&mut stream).await
}

/// Takes a session up, or begins one if it is zero; the answer is zero for one that is over.
async fn open(port: u16, session: SessionId) -> Option<(TcpStream, SessionId)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    // Version, last zxid, timeout, session, password, no read-only server.
    let mut connect = Vec::new();
    connect.extend(0i32.to_be_bytes());
    connect.extend(0i64.to_be_bytes());
    connect.extend(1000i32.to_be_bytes());
    connect.extend(session.0.to_be_bytes());
    connect.extend(bytes(&password(session)));
    connect.push(0);
    send(&mut stream, &connect).await?;
    let answer = receive(&mut stream).await?;
    let granted = u64::from_be_bytes(answer.get(8..16)?.try_into().ok()?);
    Some((stream, SessionId(granted)))
}

async fn close(stream: &mut TcpStream) -> Option<()> {
    send(stream, &request(-11)).await?;
    receive(stream).await.map(drop)
}

/// The request's number and what it is.
fn request(code: i32) -> Vec<u8> {
    [1i32.to_be_bytes(), code.to_be_bytes()].concat()
}

fn bytes(of: &[u8]) -> Vec<u8> {
    let length = i32::try_from(of.len()).unwrap();
    [&length.to_be_bytes(), of].concat()
}

async fn send(stream: &mut TcpStream, frame: &[u8]) -> Option<()> {
    stream.write_all(&bytes(frame)).await.ok()
}

async fn receive(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let length = stream.read_i32().await.ok()?;
    let mut frame = vec![0; usize::try_from(length).ok()?];
    stream.read_exact(&mut frame).await.ok()?;
    Some(frame)
}

/// The password of a session: sixteen bytes of Java's random numbers, from a seed that ZooKeeper keeps in its source.
fn password(session: SessionId) -> Vec<u8> {
    const MASK: u64 = (1 << 48) - 1;
    let mut state = ((session.0 ^ 0xB341_5C00) ^ 0x5_DEEC_E66D) & MASK;
    let mut password = Vec::new();
    for _ in 0..4 {
        state = state.wrapping_mul(0x5_DEEC_E66D).wrapping_add(0xB) & MASK;
        password.extend(((state >> 16) as u32).to_le_bytes());
    }
    password
}
