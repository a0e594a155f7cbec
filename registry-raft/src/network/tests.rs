//! A member that takes connections and says nothing, one that takes questions and nothing more, and one that answers as
//! somebody else: whatever they are asked ends by a deadline of its own, and nobody takes another's answer.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use openraft::raft::VoteRequest;
use registry_tests::within;
use tonic::service::Routes;
use tonic::{Request, Response, Streaming};

use super::*;
use crate::config::RaftConfig;
use crate::founding::{self, Door};
use crate::proto::registry::log::v1 as log;
use crate::types::SnapshotMeta;
use message::peers_server::{Peers, PeersServer};

/// Longer than any deadline, on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(30);
const US: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};
const OTHER: u64 = 2;

/// Ended by its deadline, not because the connection was found dead, which is later and says so.
fn timed_out<T: std::fmt::Debug>(answer: Result<T, RPCError<TypeConfig>>) {
    assert!(matches!(answer, Err(RPCError::Network(_))), "{answer:?}");
}

#[tokio::test]
async fn every_question_to_a_member_that_says_nothing_ends() {
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let transport = Transport::new(&RaftConfig::default()).unwrap();
    let network = Network::new(US, transport.clone());
    let peer = Peer {
        name: "b".into(),
        address: address.clone(),
    };
    let option = || RPCOption::new(Duration::from_millis(400));
    let vote = Vote::new(1, US.member);
    let entries = || AppendEntriesRequest::<TypeConfig> {
        vote,
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    };

    let mut heartbeats = network.client(OTHER, &peer, Kind::Heartbeats);
    timed_out(within(PATIENCE, heartbeats.append_entries(entries(), option())).await);
    let asks = || VoteRequest::new(vote, None);
    timed_out(within(PATIENCE, heartbeats.vote(asks(), option())).await);
    timed_out(within(PATIENCE, heartbeats.pre_vote(asks(), option())).await);
    let hands_over = TransferLeaderRequest::new(vote, OTHER, None);
    timed_out(within(PATIENCE, heartbeats.transfer_leader(hands_over, option())).await);

    let mut stream = network.client(OTHER, &peer, Kind::Entries);
    let opened = stream.stream_append(stream::iter([entries()]), option());
    timed_out(within(PATIENCE, opened).await.map(drop));

    let door = Door::new(US.member, "a", &BTreeMap::new(), transport);
    let lane = network.new_lane(&address);
    let code = within(PATIENCE, founding::greet(&lane, door.greeting()))
        .await
        .unwrap_err()
        .code();
    assert_eq!(code, Code::DeadlineExceeded);
}

/// The most that a member reads as one message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_large_is_neither_sent_nor_taken() {
    let dir = tempfile::tempdir().unwrap();
    let config = RaftConfig {
        data_dir: Some(dir.path().join("data")),
        listen: Some("127.0.0.1:0".into()),
        ..RaftConfig::default()
    };
    let member = crate::Member::start(&config).await.unwrap();
    let transport = Transport::new(&config).unwrap();
    let lane = Lane::new(&transport, &member.address().unwrap().to_string());
    let greeting = |bytes: usize| message::Greeting {
        name: "n".repeat(bytes),
        ..message::Greeting::default()
    };
    let large = || greeting(MAX_MESSAGE + 1);

    founding::greet(&lane, greeting(1)).await.unwrap();
    founding::greet(&lane, large()).await.unwrap_err();
    // From one that sends whatever it has.
    let channel = lane.channel().await.unwrap();
    let mut careless = PeersClient::new(channel).max_encoding_message_size(usize::MAX);
    let refused = within(PATIENCE, careless.greet(large())).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    founding::greet(&lane, greeting(1)).await.unwrap();
    member.stop().await.unwrap();
}

/// Takes every question, and notes over which connection it came. Answers with that header, or never.
#[derive(Clone)]
struct Other {
    answers: Option<message::Header>,
    heard: Arc<Mutex<Vec<(&'static str, SocketAddr)>>>,
}

impl Other {
    /// Starts it, and answers the ways to it.
    async fn start(answers: Option<message::Header>) -> (Self, Network, Peer) {
        let other = Self {
            answers,
            heard: Arc::default(),
        };
        let transport = Transport::new(&RaftConfig::default()).unwrap();
        let listener = transport.listen("listen", ([127, 0, 0, 1], 0).into()).await.unwrap();
        let peer = Peer {
            name: "b".into(),
            address: listener.local_addr().unwrap().to_string(),
        };
        let (serving, routes) = (transport.clone(), Routes::new(PeersServer::new(other.clone())));
        tokio::spawn(async move { serving.serve(listener, routes, std::future::pending()).await });
        (other, Network::new(US, transport), peer)
    }

    async fn answer<Q, A>(&self, what: &'static str, question: Request<Q>, answer: A) -> Result<Response<A>, Status> {
        self.heard.lock().push((what, question.remote_addr().unwrap()));
        match self.answers {
            Some(_) => Ok(Response::new(answer)),
            // What was sent and not read stays with the question.
            None => std::future::pending().await,
        }
    }

    /// Over which connections it heard this.
    fn connections(&self, of: &[&str]) -> Vec<SocketAddr> {
        let heard = self.heard.lock();
        let mut from: Vec<_> = heard
            .iter()
            .filter(|(what, _)| of.contains(what))
            .map(|(_, from)| *from)
            .collect();
        from.sort();
        from.dedup();
        from
    }
}

#[tonic::async_trait]
impl Peers for Other {
    async fn greet(&self, _: Request<message::Greeting>) -> Result<Response<message::Greeting>, Status> {
        unreachable!("it is known")
    }

    async fn admit(&self, _: Request<message::Admission>) -> Result<Response<message::Admitted>, Status> {
        unreachable!("nobody joins")
    }

    type AppendStream = BoxStream<'static, Result<message::AppendAnswer, Status>>;

    async fn append(
        &self,
        question: Request<Streaming<message::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        self.heard.lock().push(("append", question.remote_addr().unwrap()));
        let answer = message::AppendAnswer {
            header: self.answers.clone(),
            ..message::AppendAnswer::default()
        };
        let first = stream::iter(self.answers.is_some().then_some(Ok(answer)));
        let entries = question.into_inner();
        // Not read, and not ended either.
        let rest = stream::once(async move {
            let _entries = entries;
            std::future::pending().await
        });
        Ok(Response::new(first.chain(rest).boxed()))
    }

    async fn heartbeat(
        &self,
        question: Request<message::AppendRequest>,
    ) -> Result<Response<message::AppendAnswer>, Status> {
        let answer = message::AppendAnswer {
            header: self.answers.clone(),
            ..message::AppendAnswer::default()
        };
        self.answer("heartbeat", question, answer).await
    }

    async fn vote(&self, question: Request<message::VoteRequest>) -> Result<Response<message::VoteAnswer>, Status> {
        self.answer("vote", question, granted(self.answers.clone())).await
    }

    async fn pre_vote(&self, question: Request<message::VoteRequest>) -> Result<Response<message::VoteAnswer>, Status> {
        self.answer("pre-vote", question, granted(self.answers.clone())).await
    }

    async fn snapshot(
        &self,
        question: Request<Streaming<message::SnapshotPart>>,
    ) -> Result<Response<message::SnapshotAnswer>, Status> {
        let answer = message::SnapshotAnswer {
            header: self.answers.clone(),
            vote: None,
        };
        self.answer("snapshot", question, answer).await
    }

    async fn transfer_leader(
        &self,
        question: Request<message::TransferRequest>,
    ) -> Result<Response<message::TransferAnswer>, Status> {
        let answer = message::TransferAnswer {
            header: self.answers.clone(),
            taken: true,
        };
        self.answer("transfer", question, answer).await
    }
}

/// A vote for whoever asks.
fn granted(header: Option<message::Header>) -> message::VoteAnswer {
    let vote = log::Vote {
        term: 1,
        node: US.member,
        committed: false,
    };
    message::VoteAnswer {
        header,
        vote: Some(vote),
        granted: true,
        last: None,
    }
}

fn option() -> RPCOption {
    RPCOption::new(Duration::from_secs(10))
}

fn no_entries() -> AppendEntriesRequest<TypeConfig> {
    AppendEntriesRequest {
        vote: Vote::new(1, US.member),
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    }
}

fn snapshot_of(bytes: usize) -> Snapshot {
    Snapshot {
        meta: SnapshotMeta::default(),
        snapshot: SnapshotData::Memory(vec![7; bytes].into()),
    }
}

async fn send(client: &mut PeerClient, snapshot: Snapshot) -> Result<(), String> {
    let vote = Vote::new(1, US.member);
    let sent = client.full_snapshot(vote, snapshot, std::future::pending(), option());
    within(2 * PATIENCE, sent)
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Asks everything, and answers what came of it.
async fn ask_everything(network: &Network, peer: &Peer) -> Vec<(&'static str, Result<(), String>)> {
    let said = |error: RPCError<TypeConfig>| error.to_string();
    let vote = Vote::new(1, US.member);
    let mut heartbeats = network.client(OTHER, peer, Kind::Heartbeats);
    let heartbeat = heartbeats.append_entries(no_entries(), option()).await;
    let voted = heartbeats.vote(VoteRequest::new(vote, None), option()).await;
    let would_vote = heartbeats.pre_vote(VoteRequest::new(vote, None), option()).await;
    let transferred = heartbeats
        .transfer_leader(TransferLeaderRequest::new(vote, OTHER, None), option())
        .await;
    let mut entries = network.client(OTHER, peer, Kind::Entries);
    let input = stream::iter([no_entries()]).chain(stream::pending());
    let mut appended = entries.stream_append(Box::pin(input), option()).await.unwrap();
    let first = within(PATIENCE, appended.next()).await.unwrap();
    drop(appended);
    let sent = send(&mut network.client(OTHER, peer, Kind::Entries), snapshot_of(1)).await;
    vec![
        ("heartbeat", heartbeat.map(drop).map_err(said)),
        ("vote", voted.map(drop).map_err(said)),
        ("pre-vote", would_vote.map(drop).map_err(said)),
        ("transfer", transferred.map(drop).map_err(said)),
        ("append", first.map(drop).map_err(said)),
        ("snapshot", sent),
    ]
}

#[tokio::test]
async fn an_answer_of_somebody_else_is_refused_by_name() {
    let right = message::Header {
        cluster: US.cluster.to_vec().into(),
        from: OTHER,
        to: US.member,
    };
    let foreign = message::Header {
        cluster: vec![5; 16].into(),
        ..right.clone()
    };
    let misdirected = message::Header { to: 9, ..right.clone() };
    let impostor = message::Header {
        from: 8,
        ..right.clone()
    };
    for (header, named) in [
        (foreign, "05050505-0505-0505-0505-050505050505"),
        (misdirected, "for member 9, and this is 1"),
        (impostor, "member 2 was asked, and 8 answered"),
        (message::Header::default(), "it is of cluster"),
    ] {
        let (_, network, peer) = Other::start(Some(header)).await;
        for (what, answer) in ask_everything(&network, &peer).await {
            let refusal = answer.expect_err(what);
            assert!(refusal.contains(named), "{what} does not name {named:?}: {refusal}");
        }
    }

    // What is right is taken; and neither entries nor a snapshot keep a heartbeat or a vote waiting.
    let (other, network, peer) = Other::start(Some(right)).await;
    for (what, answer) in ask_everything(&network, &peer).await {
        answer.unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
    }
    let ways = [
        &["heartbeat", "vote", "pre-vote", "transfer"][..],
        &["append"],
        &["snapshot"],
    ];
    let mut ways: Vec<_> = ways.iter().flat_map(|of| other.connections(of)).collect();
    ways.sort();
    ways.dedup();
    assert_eq!(ways.len(), 3, "a connection for each: {:?}", other.heard.lock());
}

/// A live process whose disk, say, has stopped: the connection stays, and answers nothing.
#[tokio::test]
async fn entries_and_a_snapshot_that_are_not_taken_end() {
    let (other, network, peer) = Other::start(None).await;
    let mut entries = network.client(OTHER, &peer, Kind::Entries);
    let mut snapshots = network.client(OTHER, &peer, Kind::Entries);
    let appending = async {
        let input = stream::iter([no_entries()]).chain(stream::pending());
        let mut appended = entries.stream_append(Box::pin(input), option()).await.unwrap();
        within(PATIENCE, appended.next())
            .await
            .unwrap()
            .unwrap_err()
            .to_string()
    };
    // More than is on its way while nobody reads.
    let (appended, sent) = tokio::join!(appending, send(&mut snapshots, snapshot_of(8 << 20)));
    assert!(appended.contains("no answer to entries"), "{appended}");
    let sent = sent.unwrap_err();
    assert!(sent.contains("a snapshot does not get on"), "{sent}");
    assert_eq!(other.connections(&["append", "snapshot"]).len(), 2);
}
