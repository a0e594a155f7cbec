//! What is said to a member by who is not of its group, in another's name, or damaged: it is refused by name, and nothing
//! is written.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::stream;
use openraft::RaftLogReader;
use openraft::storage::RaftLogStorage;
use registry_api::Key;
use registry_tests::cluster::eventually;
use tempfile::TempDir;
use tonic::Code;

use super::*;
use crate::command::{Change, Command};
use crate::network::Lane;
use crate::proto;
use crate::proto::failure::Kind;
use crate::proto::registry::log::v1 as log;
use crate::proto::registry::peer::v1 as message;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::transport::Transport;
use message::snapshot_part::Part;

/// Who speaks to it, and is no member.
const STRANGER: u64 = 7;

struct Spoken {
    dir: TempDir,
    member: Member,
    lane: Lane,
}

impl Spoken {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = RaftConfig {
            data_dir: Some(dir.path().join("data")),
            listen: Some("127.0.0.1:0".into()),
            ..RaftConfig::default()
        };
        let member = Member::start(&config).await.unwrap();
        let registry = member.connect(&Options::default()).await.unwrap();
        registry.put(&Key::parse("/a").unwrap(), "kept").await.unwrap();
        registry.close().await.unwrap();
        // Its own last entry is shown as applied a moment after it was answered.
        eventually(Duration::from_secs(20), || async {
            let status = member.status();
            status.members[0].matched == Some(status.applied)
        })
        .await;
        // The log is written in order: with this, nothing of what was before is still on its way to the disk.
        let mut log = member.core.log.clone();
        let vote = log.read_vote().await.unwrap().unwrap();
        log.save_vote(&vote).await.unwrap();
        let transport = Transport::new(&RaftConfig::default()).unwrap();
        let lane = Lane::new(&transport, &member.address().unwrap().to_string());
        Self { dir, member, lane }
    }

    /// The header that would be right.
    fn header(&self) -> message::Header {
        let us = self.member.core.identity();
        message::Header {
            cluster: Bytes::copy_from_slice(&us.cluster),
            from: STRANGER,
            to: us.member,
        }
    }

    /// All that the member has on disk, but for what it keeps in reserve.
    fn on_disk(&self) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        for folder in ["log", "snapshots", ""] {
            let folder = self.dir.path().join("data").join(folder);
            for file in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                let reserved = ["wal-next", "wal-spare"].iter().any(|begins| name.starts_with(begins));
                if file.path().is_file() && !reserved {
                    found.insert(file.path().display().to_string(), std::fs::read(file.path()).unwrap());
                }
            }
        }
        found
    }

    /// Nothing was written that stays: what is left of a message that was broken off goes in a moment.
    async fn wrote_nothing(&self, before: &BTreeMap<String, Vec<u8>>) {
        eventually(Duration::from_secs(20), || async {
            self.on_disk().keys().eq(before.keys())
        })
        .await;
        for (name, now) in self.on_disk() {
            assert!(now == before[&name], "{name} has changed");
        }
    }

    /// Says everything that members say to each other under that header, and answers what was said to it.
    async fn say_everything(&self, header: Option<message::Header>) -> Vec<(&'static str, tonic::Status)> {
        // Of a term that none has: who takes it is changed by it.
        let vote = Some(log::Vote {
            term: 1_000,
            node: STRANGER,
            committed: true,
        });
        let mut peer = self.lane.peer().await.unwrap();
        let append = message::AppendRequest {
            header: header.clone(),
            vote,
            ..message::AppendRequest::default()
        };
        let ask = message::VoteRequest {
            header: header.clone(),
            vote,
            ..message::VoteRequest::default()
        };
        let head = Part::Head(message::SnapshotHead {
            header: header.clone(),
            vote,
            ..message::SnapshotHead::default()
        });
        let transfer = message::TransferRequest {
            header: header.clone(),
            vote,
            ..message::TransferRequest::default()
        };
        let read_index = message::ReadIndexRequest {
            header: header.clone(),
            term: None,
        };
        let promise = message::PromiseRequest { header: header.clone() };
        let put = proto::Operation {
            key: "/registry/forwarded".into(),
            write: Some(proto::operation::Write::Put(proto::Put::default())),
        };
        let put = Command::new(Change::Txn(proto::Txn {
            conditions: Vec::new(),
            operations: vec![put],
        }));
        let list = proto::List {
            prefix: "/registry".into(),
            limit: 1,
            ..proto::List::default()
        };
        let right = Some(self.header());
        let forwarded = [
            ("forwarded change", Call::Command(put)),
            ("forwarded listing", Call::List(list)),
            ("forwarded status", Call::Status(proto::StatusRequest {})),
        ];
        let appended = peer.append(stream::iter([append.clone()])).await.unwrap();
        let mut said = Vec::new();
        for (what, call) in forwarded {
            said.push((what, self.refusal_of(call, header.clone(), Kind::Unavailable).await));
        }
        said.extend([
            ("append", appended.into_inner().message().await.unwrap_err()),
            ("heartbeat", peer.heartbeat(append).await.unwrap_err()),
            ("vote", peer.vote(ask.clone()).await.unwrap_err()),
            ("pre-vote", peer.pre_vote(ask).await.unwrap_err()),
            ("snapshot", peer.snapshot(parts([head])).await.unwrap_err()),
            ("transfer", peer.transfer_leader(transfer).await.unwrap_err()),
            (
                "read index",
                self.refusal_of(Call::ReadIndex(read_index), right.clone(), Kind::Invalid)
                    .await,
            ),
            (
                "promise",
                self.refusal_of(Call::Promise(promise), right, Kind::Invalid).await,
            ),
        ]);
        said
    }

    /// What is said to a request that a member passes on, which goes the way of those of handles.
    async fn refusal_of(&self, call: Call, header: Option<message::Header>, kind: Kind) -> tonic::Status {
        let request = proto::Request {
            patience_ms: 10_000,
            forwarded: true,
            header,
            call: Some(call),
        };
        let answer = self.lane.conversation().await.unwrap().ask(request).await;
        match answer.unwrap().answer {
            Some(Answer::Failure(said)) if said.kind() == kind => tonic::Status::failed_precondition(said.text),
            other => panic!("it was not refused: {other:?}"),
        }
    }
}

fn parts<const N: usize>(parts: [Part; N]) -> impl futures_util::Stream<Item = message::SnapshotPart> {
    stream::iter(parts.map(|part| message::SnapshotPart { part: Some(part) }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_or_misdirected_message_is_refused_by_name_and_nothing_is_written() {
    let spoken = Spoken::start().await;
    let (status, disk) = (spoken.member.status(), spoken.on_disk());
    let right = spoken.header();
    let foreign = message::Header {
        cluster: Bytes::from_static(&[5; 16]),
        ..right.clone()
    };
    let misdirected = message::Header {
        to: right.to + 1,
        ..right.clone()
    };
    let (theirs, ours) = ("05050505-0505-0505-0505-050505050505", spoken.member.core.identity());
    let ours = uuid::Uuid::from_bytes(ours.cluster).to_string();
    let (for_whom, here) = (format!("for member {}", right.to + 1), format!("this is {}", right.to));
    for (header, named) in [
        (None, ["it does not say whose it is", "refused"]),
        (Some(foreign), [theirs, &ours]),
        (Some(misdirected), [&for_whom, &here]),
    ] {
        for (what, refusal) in spoken.say_everything(header).await {
            assert_eq!(refusal.code(), Code::FailedPrecondition, "{what}: {refusal}");
            for named in named {
                assert!(
                    refusal.message().contains(named),
                    "{what} does not name {named:?}: {refusal}"
                );
            }
        }
    }
    let admission = message::Admission {
        cluster: Bytes::from_static(&[5; 16]),
        id: STRANGER,
        name: "stranger".into(),
        address: "127.0.0.1:1".into(),
        forwarded: false,
    };
    let refusal = spoken.lane.peer().await.unwrap().admit(admission).await.unwrap_err();
    assert!(refusal.message().contains("another group"), "{refusal}");
    assert_eq!(spoken.member.status(), status);
    spoken.wrote_nothing(&disk).await;
    spoken.member.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_message_is_refused_by_name_and_nothing_is_written() {
    let spoken = Spoken::start().await;
    let (status, disk) = (spoken.member.status(), spoken.on_disk());
    let header = Some(spoken.header());
    let vote = |node| {
        Some(log::Vote {
            term: 1_000,
            node,
            committed: true,
        })
    };
    let mut peer = spoken.lane.peer().await.unwrap();
    let entry = |index| log::Entry {
        id: Some(log::LogId { term: 1_000, index }),
        payload: None,
    };
    let append = |vote, entries: &[log::Entry]| message::AppendRequest {
        header: header.clone(),
        vote,
        entries: entries.to_vec(),
        ..message::AppendRequest::default()
    };
    let damaged = [
        (append(vote(STRANGER + 1), &[]), "in the name of 8"),
        (append(None, &[]), "it has no vote"),
        (
            append(vote(STRANGER), &[entry(0), entry(2)]),
            "entry 2 is where 1 should be",
        ),
        (append(vote(STRANGER), &[log::Entry::default()]), "without its place"),
    ];
    for (request, named) in damaged {
        let refusal = peer.heartbeat(request.clone()).await.unwrap_err();
        assert!(refusal.message().contains(named), "{named:?} is not in {refusal}");
        let stream = peer.append(stream::iter([request])).await.unwrap();
        let refusal = stream.into_inner().message().await.unwrap_err();
        assert!(refusal.message().contains(named), "{named:?} is not in {refusal}");
    }
    let transfer = message::TransferRequest {
        header: header.clone(),
        vote: vote(STRANGER + 1),
        ..message::TransferRequest::default()
    };
    let refusal = peer.transfer_leader(transfer).await.unwrap_err();
    assert!(refusal.message().contains("not the sender's"), "{refusal}");

    let head = Part::Head(message::SnapshotHead {
        header: header.clone(),
        vote: vote(STRANGER),
        last: Some(log::LogId { term: 999, index: 900 }),
        ..message::SnapshotHead::default()
    });
    let chunk = Part::Chunk(Bytes::from_static(b"state"));
    let end = Part::End(message::SnapshotEnd {
        bytes: 5,
        checksum: crc32fast::hash(b"stale"),
    });
    let refusal = peer
        .snapshot(parts([head.clone(), chunk.clone(), end]))
        .await
        .unwrap_err();
    assert_eq!(refusal.code(), Code::DataLoss, "{refusal}");
    let refusal = peer.snapshot(parts([head, chunk.clone()])).await.unwrap_err();
    assert!(refusal.message().contains("cut off"), "{refusal}");
    let refusal = peer.snapshot(parts([chunk])).await.unwrap_err();
    assert!(refusal.message().contains("begins with its head"), "{refusal}");

    assert_eq!(spoken.member.status(), status);
    spoken.wrote_nothing(&disk).await;
    spoken.member.stop().await.unwrap();
}
