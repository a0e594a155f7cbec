//! Clients that mean no good, or can do no better, at a served member: its memory stays bounded, and others are served.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

#[path = "../registry-raft/tests/security/authority.rs"]
#[allow(dead_code)]
mod authority;
mod clusters;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use clusters::Served;
use registry::raft::{self, RaftConfig};
use registry::{Options, Read, SessionState};
use registry_tests::torture::Usage;
use registry_tests::{Cluster, Dice, Members, key, process, within};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const LARGEST: usize = 900_000;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(body);
    frame
}

/// What a client of gRPC begins with: the preface, and a request's headers (RFC 7541, without its compression).
fn request(stream: u32, method: &str) -> Vec<u8> {
    let mut headers = vec![0x83, 0x86];
    let mut text = |before: &[u8], text: &str| {
        headers.extend(before);
        headers.push(u8::try_from(text.len()).unwrap());
        headers.extend(text.as_bytes());
    };
    text(&[0x04], method);
    text(&[0x01], "member");
    text(&[0x0f, 0x10], "application/grpc");
    text(&[0x00, 2, b't', b'e'], "trailers");
    frame(HEADERS, END_HEADERS, stream, &headers)
}

fn hello() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

async fn open(address: SocketAddr) -> TcpStream {
    within(PATIENCE, TcpStream::connect(address)).await.unwrap()
}

/// Sends until the member takes no more: it has closed the connection, or lets it wait.
async fn pour(stream: &mut TcpStream, bytes: &[u8], most: usize) -> usize {
    let mut sent = 0;
    while sent < most {
        match tokio::time::timeout(Duration::from_millis(300), stream.write(bytes)).await {
            Ok(Ok(count)) if count > 0 => sent += count,
            _ => break,
        }
    }
    sent
}

/// A part of a message of Protocol Buffers that has a length, up to 127.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()][..], bytes].concat()
}

/// What is asked on a conversation under a number, as frame of the first stream.
fn asked(number: u8, what: &[u8]) -> Vec<u8> {
    let asked = field(1, &[&[1 << 3, number], what].concat());
    let length = u8::try_from(asked.len()).unwrap();
    frame(DATA, 0, 1, &[&[0, 0, 0, 0, length], &asked[..]].concat())
}

/// Watches a key, asks for it again and again, and lives: it says so when it is asked. Never does it have room for what it
/// is told.
async fn ask_and_take_nothing(mut stream: TcpStream, key: &str) {
    let key = field(1, key.as_bytes());
    // A second of patience.
    let get = field(2, &[&[1 << 3, 0xe8, 0x07], &field(2, &key)[..]].concat());
    let said = [
        hello(),
        request(1, "/registry.v1.Registry/Converse"),
        asked(1, &field(3, &key)),
    ];
    stream.write_all(&said.concat()).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let (answers, mut to_answer) = tokio::sync::mpsc::unbounded_channel();
    let mut read = async || -> std::io::Result<()> {
        loop {
            let mut head = [0; 9];
            reader.read_exact(&mut head).await?;
            let [a, b, c, kind, flags, ..] = head;
            let mut body = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            reader.read_exact(&mut body).await?;
            if kind == PING && flags & ACK == 0 {
                answers.send(body).unwrap();
            }
        }
    };
    let mut write = async || -> std::io::Result<()> {
        let mut again = tokio::time::interval(Duration::from_millis(10));
        loop {
            let said = tokio::select! {
                Some(body) = to_answer.recv() => frame(PING, ACK, 0, &body),
                _ = again.tick() => asked(2, &get),
            };
            writer.write_all(&said).await?;
        }
    };
    // It may be hung up on after a while.
    let ended = async { tokio::try_join!(read(), write()) }.await;
    println!("hung up on: {:?}", ended.unwrap_err());
}

struct Besieged {
    cluster: Served,
    before: Usage,
}

impl Besieged {
    async fn start() -> Self {
        let cluster = Served::start().await;
        let registry = cluster.connect().await.unwrap();
        registry.put(&key("/a"), "before").await.unwrap();
        registry.close().await.unwrap();
        let before = cluster.usage().await.unwrap();
        Self { cluster, before }
    }

    /// Somebody else is served as if nothing was, and the member has grown by so much at most.
    async fn serves(&self, most: u64) {
        let began = Instant::now();
        // With the TTL that users have, not the suite's, which a slow machine may take to open a session in a siege.
        let connected = self.cluster.connect_with(Options::default());
        let registry = within(PATIENCE, connected).await.unwrap();
        let session = registry.session().live().unwrap();
        for n in 0..100 {
            registry.put(&key("/a"), n.to_string()).await.unwrap();
            let entry = registry.get(&key("/a"), Read::Linearizable).await.unwrap();
            assert_eq!(entry.unwrap().value, n.to_string());
        }
        let mut states = registry.session().states();
        let kept = states.wait_for(|state| *state == SessionState::Connected(session));
        within(PATIENCE, kept).await.unwrap();
        registry.close().await.unwrap();
        let usage = self.cluster.usage().await.unwrap();
        println!(
            "before: {}; now: {usage}; others served within {:?}",
            self.before,
            began.elapsed()
        );
        let grown = usage.memory.saturating_sub(self.before.memory);
        assert!(grown <= most, "the member grew by {} MiB", grown / MIB);
    }

    /// Nothing is left of who has gone.
    async fn lets_go(&self) {
        registry_tests::cluster::eventually(PATIENCE, || async {
            self.cluster.usage().await.unwrap().files <= self.before.files + 10
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_who_say_nothing_or_half_a_word() {
    // The system may allow less.
    let many = (process::take_open_files() - 1_000).min(10_000);
    let member = Besieged::start().await;
    let address = member.cluster.address();
    let mut held = Vec::new();
    for n in 0..many {
        let mut stream = open(address).await;
        // Nothing, half of the preface, or a request that never ends.
        let said = match n % 4 {
            0 => Vec::new(),
            1 => PREFACE[..PREFACE.len() / 2].to_vec(),
            2 => hello(),
            _ => [
                hello(),
                request(1, "/registry.v1.Registry/Converse"),
                frame(DATA, 0, 1, &[0, 0, 0, 1]),
            ]
            .concat(),
        };
        stream.write_all(&said).await.unwrap();
        held.push(stream);
    }
    println!("{} connections", held.len());
    member.serves(512 * MIB).await;
    drop(held);
    member.lets_go().await;
}

/// When there are more connections than the system lets a process have, those there are go on, the rest wait, and nobody
/// works in vain meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_there_are_file_descriptors() {
    const MORE: usize = 100;
    let member = Besieged::start().await;
    let (registry, process) = (
        member.cluster.connect().await.unwrap(),
        member.cluster.process_id().await,
    );
    // With this it has all its connections.
    registry.put(&key("/a"), "before").await.unwrap();
    let limit = Rlimit {
        current: Some(member.cluster.usage().await.unwrap().files + 20),
        ..getrlimit(Resource::Nofile)
    };
    prlimit(Pid::from_raw(process.cast_signed()), Resource::Nofile, limit).unwrap();
    let mut held = Vec::new();
    for _ in 0..MORE {
        held.push(open(member.cluster.address()).await);
    }
    let (before, began) = (process::on_cpu(process).unwrap(), Instant::now());
    while began.elapsed() < Duration::from_secs(3) {
        registry.put(&key("/a"), "during").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let worked = process::on_cpu(process).unwrap() - before;
    assert!(worked < began.elapsed() / 2, "{worked:?} of {:?}", began.elapsed());
    drop(held);
    member.serves(512 * MIB).await;
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_announces_gigabytes_sends_without_end_or_trickles() {
    let member = Besieged::start().await;
    let address = member.cluster.address();
    let mut hostile = JoinSet::new();
    for n in 0..60_u32 {
        hostile.spawn(async move {
            let mut stream = open(address).await;
            let method = match n % 2 {
                0 => "/registry.v1.Registry/Converse",
                _ => "/registry.peer.v1.Peers/Append",
            };
            stream.write_all(&hello()).await.unwrap();
            // Many at once on one connection, each with a message that is never whole.
            for id in (1..200).step_by(2) {
                let length = if n % 3 == 0 { u32::MAX } else { 7 << 20 };
                let head = [&[0][..], &length.to_be_bytes()].concat();
                let begun = [request(id, method), frame(DATA, 0, id, &head)].concat();
                if stream.write_all(&begun).await.is_err() {
                    return (stream, 0);
                }
            }
            let more = frame(DATA, 0, 1, &[7; 16_000]);
            let sent = pour(&mut stream, &more, 64 << 20).await;
            (stream, sent)
        });
    }
    let mut held = Vec::new();
    let mut sent = 0;
    while let Some(ended) = hostile.join_next().await {
        let (stream, some) = ended.unwrap();
        sent += some;
        held.push(stream);
    }
    println!(
        "{} connections of 100 requests each sent {} MiB",
        held.len(),
        sent as u64 / MIB
    );
    member.serves(512 * MIB).await;
    drop(held);
    member.lets_go().await;
}

/// Many streams on one connection, each with the beginning of a message, as fast as the member takes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_with_many_unfinished_messages_takes_little_memory() {
    const WINDOW_UPDATE: u8 = 8;
    const CHUNK: usize = 16_000;
    let member = Besieged::start().await;
    let mut stream = open(member.cluster.address()).await;
    stream.write_all(&hello()).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    // What the member lets the connection send, beyond the 65,535 bytes that it begins with.
    let (room, mut has_room) = tokio::sync::watch::channel(65_535_usize);
    let reading = tokio::spawn(async move {
        loop {
            let mut head = [0; 9];
            reader.read_exact(&mut head).await?;
            let [a, b, c, kind, _, stream @ ..] = head;
            let mut body = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            reader.read_exact(&mut body).await?;
            if kind == WINDOW_UPDATE && stream == [0; 4] {
                let more = u32::from_be_bytes(body[..4].try_into().unwrap());
                room.send_modify(|room| *room += more as usize);
            }
        }
        #[allow(unreachable_code)]
        Ok::<_, std::io::Error>(())
    });
    let mut sent = 0;
    let writing = async {
        for id in (1..3_000).step_by(2) {
            let head = [&[0][..], &(7_u32 << 20).to_be_bytes()].concat();
            let begun = [request(id, "/registry.v1.Registry/Converse"), frame(DATA, 0, id, &head)];
            writer.write_all(&begun.concat()).await?;
            sent += head.len();
            for _ in 0..60 {
                let enough = has_room.wait_for(|room| *room >= sent + CHUNK);
                match tokio::time::timeout(Duration::from_secs(2), enough).await {
                    Ok(Ok(_)) => {}
                    // It takes no more, or has hung up.
                    _ => return Ok(()),
                }
                writer.write_all(&frame(DATA, 0, id, &[7; CHUNK])).await?;
                sent += CHUNK;
            }
        }
        Ok::<_, std::io::Error>(())
    };
    let written = writing.await;
    println!("sent {} MiB: {written:?}", sent as u64 / MIB);
    member.serves(400 * MIB).await;
    reading.abort();
    drop(writer);
    member.lets_go().await;
}

/// Thousands of callers without a certificate that say nothing, or only how a handshake begins: those who prove who they are
/// are served at once all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_handshakes_hold_nobody_up() {
    let dir = tempfile::TempDir::new().unwrap();
    let authority = authority::Authority::new("the group's");
    let (own, client) = (
        authority.sign(dir.path(), "member"),
        authority.sign(dir.path(), "client"),
    );
    let mut config = RaftConfig::default();
    config.data_dir = Some(dir.path().join("data"));
    config.listen = Some("127.0.0.1:0".into());
    config.tls = Some(own);
    let member = raft::Member::start(&config).await.unwrap();
    let address = member.address().unwrap();
    let many = (process::take_open_files() / 3).min(3_000);
    let siege = tokio::spawn(async move {
        let mut held = std::collections::VecDeque::new();
        loop {
            for n in 0..50 {
                let Ok(mut silent) = TcpStream::connect(address).await else {
                    continue;
                };
                if n % 2 == 0 {
                    // A record of a handshake of 512 bytes, which do not come. It may have been hung up on.
                    let _ = silent.write_all(&[22, 3, 1, 2, 0]).await;
                }
                held.push_back(silent);
            }
            while held.len() > many as usize {
                held.pop_front();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    // So long that the silent ones would hold all places by then.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut remote = RaftConfig::remote([address.to_string()]);
    remote.tls = Some(client);
    let mut slowest = Duration::ZERO;
    for n in 0..10 {
        let began = Instant::now();
        let registry = raft::connect(&remote, &Options::default()).await.unwrap();
        registry.put(&key("/a"), n.to_string()).await.unwrap();
        slowest = slowest.max(began.elapsed());
        registry.close().await.unwrap();
    }
    println!("served within {slowest:?}");
    assert!(!siege.is_finished());
    siege.abort();
    // A member gives a connection two seconds.
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    member.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_speaks_nonsense_is_cut_off() {
    let member = Besieged::start().await;
    let address = member.cluster.address();
    let mut dice = Dice::of_run();
    let good = [
        hello(),
        request(1, "/registry.v1.Registry/Converse"),
        frame(DATA, 1, 1, &[0, 0, 0, 0, 4, 0x12, 2, 0x0a, 0]),
    ]
    .concat();
    for _ in 0..1_000 {
        let mut bytes = good.clone();
        for _ in 0..=dice.pick(4) {
            let at = dice.pick(bytes.len());
            bytes[at] = u8::try_from(dice.pick(256)).unwrap();
        }
        let mut stream = open(address).await;
        // It may be cut off in the middle.
        let _ = stream.write_all(&bytes).await;
    }
    member.serves(256 * MIB).await;
    member.lets_go().await;
}

/// Waits until so many watch.
async fn watched_by(member: &Besieged, watches: u64) {
    let remote = RaftConfig::remote([member.cluster.address().to_string()]);
    registry_tests::cluster::eventually(PATIENCE, || async {
        let status = raft::status(&remote, &member.cluster.options()).await.unwrap();
        status.watches == watches
    })
    .await;
}

/// Changes each key so many times, to the largest values there are.
async fn storm(member: &Besieged, keys: &[&str], times: u8) {
    let registry = member.cluster.connect().await.unwrap();
    for n in 0..times {
        let puts = keys.iter().map(|name| {
            let (registry, key) = (&registry, key(name));
            async move { registry.put(&key, vec![b'a' + n % 26; LARGEST]).await.unwrap() }
        });
        futures_util::future::join_all(puts).await;
    }
    registry.close().await.unwrap();
}

/// Neither to the member, whoever it is that does not read, nor to a program whose own part does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_and_does_not_read_costs_little() {
    const KEYS: [&str; 2] = ["/w/1", "/w/2"];
    let mut member = Besieged::start().await;
    // What changes cost without a watch: the history, and the log's cache.
    storm(&member, &KEYS, 60).await;
    member.before = member.cluster.usage().await.unwrap();
    let mut held = JoinSet::new();
    for name in KEYS {
        let stream = open(member.cluster.address()).await;
        held.spawn(async move { ask_and_take_nothing(stream, &format!("/registry{name}")).await });
    }
    // It prints what it is told, and nobody takes it.
    let mut program = Command::new(env!("CARGO_BIN_EXE_registry"))
        .args(["watch", "/w", "--set"])
        .arg(format!("raft.endpoints={}", member.cluster.address()))
        .env_remove("REGISTRY_CONFIG")
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    watched_by(&member, 3).await;
    storm(&member, &KEYS, 200).await;
    let usage = Usage::of(program.id(), Path::new("/nowhere"));
    println!("a program that does not read: {usage}");
    assert!(
        usage.memory < 96 * MIB,
        "the program has grown to {}",
        usage.memory / MIB
    );
    member.serves(96 * MIB).await;
    held.shutdown().await;
    program.kill().await.unwrap();
    watched_by(&member, 0).await;
    member.lets_go().await;
}
