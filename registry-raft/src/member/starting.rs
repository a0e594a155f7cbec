//! Members that are started again, and may have promised their silence to a leader before.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures_util::future::join_all;
use registry_tests::process::free_port;

use super::opening::{elects_from, raft_config, recovered};
use super::*;
use crate::network::Lane;
use crate::proto::registry::log::v1 as log;
use crate::proto::registry::peer::v1 as message;
use crate::transport::Transport;
use crate::types::Peer;

const NAMES: [&str; 3] = ["a", "b", "c"];

/// A group of three that was stopped.
async fn stopped(dir: &std::path::Path) -> (Vec<RaftConfig>, Vec<Identity>) {
    let list = NAMES.map(|name| (name.to_owned(), format!("127.0.0.1:{}", free_port())));
    let list = BTreeMap::from(list);
    let config = |name: &str| RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.join(name)),
        cluster: list.clone(),
        ..RaftConfig::default()
    };
    let configs: Vec<_> = NAMES.map(config).into();
    let members = join_all(configs.iter().map(Member::start)).await;
    let members: Vec<_> = members.into_iter().map(Result::unwrap).collect();
    let identities = members.iter().map(|member| member.core.identity()).collect();
    for member in members {
        member.stop().await.unwrap();
    }
    (configs, identities)
}

fn longest() -> Duration {
    Duration::from_millis(Timers::Default.millis().2)
}

/// How a vote is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    PreVote,
    Vote,
    /// In the name of the leader, which transfers its leadership.
    Transfer,
}

/// Whether it votes, or would vote, for another whose log is the newest; `None` as long as it does not answer.
async fn votes(address: &str, us: Identity, other: Identity, kind: Kind) -> Option<bool> {
    let request = message::VoteRequest {
        header: Some(message::Header {
            cluster: Bytes::copy_from_slice(&us.cluster),
            from: other.member,
            to: us.member,
        }),
        vote: Some(log::Vote {
            term: 1_000,
            node: other.member,
            committed: false,
        }),
        last: Some(log::LogId {
            term: 999,
            index: 1_000_000,
        }),
        leadership_transfer: kind == Kind::Transfer,
    };
    // One that could not connect leaves it alone for a while.
    let lane = Lane::new(&Transport::new(&RaftConfig::default()).unwrap(), address);
    let mut peer = lane.peer().await.ok()?;
    let answer = match kind {
        Kind::Vote | Kind::Transfer => peer.vote(request).await,
        Kind::PreVote => peer.pre_vote(request).await,
    };
    answer.ok().map(|answer| answer.into_inner().granted)
}

/// Whatever timers it is started with: it may have run with others, and promised more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_votes_for_nobody_until_it_would_have_missed_its_leader() {
    let dir = tempfile::tempdir().unwrap();
    let (mut configs, identities) = stopped(dir.path()).await;
    for (at, kind) in [Kind::PreVote, Kind::Vote].into_iter().enumerate() {
        configs[at].timers = Timers::Fast;
        let (config, us, other) = (configs[at].clone(), identities[at], identities[2]);
        let address = &config.cluster[NAMES[at]];
        let began = Instant::now();
        let starting = tokio::spawn({
            let config = config.clone();
            async move { Member::start(&config).await }
        });
        let granted = async {
            while votes(address, us, other, kind).await != Some(true) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        registry_tests::within(Duration::from_secs(30), granted).await;
        assert!(began.elapsed() >= longest(), "{kind:?} after {:?}", began.elapsed());
        starting.abort();
    }
}

/// On one thread openraft's own task has not run by the time the log is asked.
#[tokio::test]
async fn what_is_in_its_log_is_known_before_anything_else_has_run() {
    let dir = tempfile::tempdir().unwrap();
    let (configs, identities) = stopped(dir.path()).await;
    let config = &configs[0];
    let directory = Directory::open(config.directory().unwrap(), "a", Identity::of_no_group).unwrap();
    let options = crate::log::Options::default();
    let log = LogStore::open(&directory.log(), identities[0], options, crate::log::abort()).unwrap();
    let snapshots = Snapshots::open(Some(directory.snapshots()), identities[0]).unwrap();
    let machine = StateMachine::open(Store::default(), Arc::new(snapshots)).unwrap();
    let network = Network::new(identities[0], Transport::new(config).unwrap());
    let raft = Raft::new(
        identities[0].member,
        raft_config(config).unwrap().into(),
        network,
        log,
        machine,
    );
    let raft = raft.await.unwrap();
    let (membership, term) = recovered(&raft).await.unwrap();
    let voters: Vec<_> = membership.membership().voter_ids().collect();
    let mut members: Vec<_> = identities.iter().map(|identity| identity.member).collect();
    members.sort_unstable();
    assert_eq!(voters, members);
    assert!(term > 0);
    raft.shutdown().await.unwrap();
}

/// Its leader has said that it hands over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_votes_for_whom_its_leader_hands_over_to() {
    let dir = tempfile::tempdir().unwrap();
    let (configs, identities) = stopped(dir.path()).await;
    let address = &configs[0].cluster["a"];
    let starting = tokio::spawn({
        let config = configs[0].clone();
        async move { Member::start(&config).await }
    });
    let granted = async {
        loop {
            match votes(address, identities[0], identities[1], Kind::Transfer).await {
                Some(granted) => return granted,
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    assert!(registry_tests::within(Duration::from_secs(30), granted).await);
    starting.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_elect_nobody_until_they_would_have_missed_their_leader() {
    let dir = tempfile::tempdir().unwrap();
    let (configs, _) = stopped(dir.path()).await;
    for _ in 0..3 {
        let began = Instant::now();
        let members = join_all(configs.iter().map(Member::start)).await;
        assert!(began.elapsed() >= longest(), "one led after {:?}", began.elapsed());
        for member in members {
            member.unwrap().stop().await.unwrap();
        }
    }
}

#[test]
fn a_member_that_may_have_heard_a_leader_elects_after_the_longest_silence() {
    for (voters, term, waits) in [
        (&[1, 2, 3][..], 1, true),
        (&[2, 3], 1, true),
        (&[1, 2, 3], 0, false),
        (&[1], 1, false),
    ] {
        let nodes: BTreeMap<u64, Peer> = voters.iter().map(|id| (*id, Peer::default())).collect();
        let voters: BTreeSet<u64> = voters.iter().copied().collect();
        let membership = openraft::Membership::new(vec![voters.clone()], nodes).unwrap();
        let membership = StoredMembership::new(None, membership);
        let before = Instant::now();
        let from = elects_from(&membership, term, 1);
        let silence = Duration::from_millis(Timers::longest_silence());
        match waits {
            true => assert!(from >= before + silence, "{voters:?}, term {term}"),
            false => assert!(from <= Instant::now(), "{voters:?}, term {term}"),
        }
    }
}
