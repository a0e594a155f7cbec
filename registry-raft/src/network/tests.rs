//! A member that takes connections and says nothing: whatever it is asked ends by a deadline of its own.

use std::collections::BTreeMap;

use openraft::raft::VoteRequest;
use registry_tests::within;

use super::*;
use crate::config::RaftConfig;
use crate::founding::{self, Door};

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
