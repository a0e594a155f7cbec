//! What is asked in the name of a member that the group has removed: it comes too late, however long it was under way.

use bytes::Bytes;
use futures_util::future::join_all;

use super::*;
use crate::network::Lane;
use crate::proto::registry::peer::v1::Admission;
use crate::transport::Transport;

/// A member that is a group by itself, and the way to it.
struct Group {
    dir: tempfile::TempDir,
    member: Member,
    lane: Lane,
}

fn config(dir: &std::path::Path, name: &str) -> RaftConfig {
    RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.join(name)),
        listen: Some("127.0.0.1:0".into()),
        ..RaftConfig::default()
    }
}

impl Group {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(dir: tempfile::TempDir) -> Self {
        let member = Member::start(&config(dir.path(), "a")).await.unwrap();
        let transport = Transport::new(&RaftConfig::default()).unwrap();
        let lane = Lane::new(&transport, &member.address().unwrap().to_string());
        Self { dir, member, lane }
    }

    async fn restart(self) -> Self {
        self.member.stop().await.unwrap();
        Self::start_in(self.dir).await
    }

    fn question(&self, id: u64, name: &str) -> Admission {
        Admission {
            cluster: Bytes::copy_from_slice(&self.member.core.identity().cluster),
            id,
            name: name.into(),
            address: "127.0.0.1:1".into(),
            forwarded: false,
        }
    }

    /// Asks to be taken in, as a member does that joins.
    async fn admit(&self, question: &Admission) -> Result<(), tonic::Status> {
        let asked = self.lane.ask(START, |mut client| {
            let question = question.clone();
            async move { client.admit(question).await }
        });
        asked.await.map(drop)
    }

    async fn remove(&self, name: &str) {
        let name = name.into();
        self.member.change_members(MemberChange::Remove { name }).await.unwrap();
    }

    fn ids(&self, name: &str) -> Vec<u64> {
        let members = self.member.status().members.into_iter();
        members
            .filter(|member| member.name == name)
            .map(|member| member.id)
            .collect()
    }
}

fn removed(answer: Result<(), tonic::Status>) {
    let refusal = answer.unwrap_err();
    assert_eq!(refusal.code(), tonic::Code::AlreadyExists, "{refusal}");
    assert!(
        refusal.message().contains("member \"b\" was removed from its group"),
        "{refusal}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_is_not_taken_in_again() {
    let group = Group::start().await;
    let joining = RaftConfig {
        join: vec![group.member.address().unwrap().to_string()],
        ..config(group.dir.path(), "b")
    };
    // A directory that has heard of its group, and of nothing since.
    let directory = Directory::open(&group.dir.path().join("b"), "b", Identity::of_no_group).unwrap();
    directory.belongs_to(group.member.core.identity().cluster).unwrap();
    let id = directory.identity().member;
    drop(directory);
    let question = group.question(id, "b");
    group.admit(&question).await.unwrap();
    group.admit(&question).await.unwrap();
    assert_eq!(group.ids("b"), [id]);
    group.remove("b").await;
    removed(group.admit(&question).await);

    // So it is after the entry that tells it is gone from the log, and for a member that never heard of it.
    group.member.snapshot().await.unwrap();
    registry_tests::cluster::eventually(START, || async { group.member.status().snapshot_bytes > 0 }).await;
    let group = group.restart().await;
    removed(group.admit(&question).await);
    let joining = RaftConfig {
        join: vec![group.member.address().unwrap().to_string()],
        ..joining
    };
    let refused = registry_tests::within(START, Member::start(&joining))
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, Error::Storage { reason, .. } if reason.contains("was removed from its group")),
        "{refused:?}"
    );
    assert_eq!(group.ids("b"), []);

    // Its name is free for another.
    group.admit(&group.question(id + 1, "b")).await.unwrap();
    assert_eq!(group.ids("b"), [id + 1]);
    group.member.stop().await.unwrap();
}

/// Twenty times, as many questions as there may be are under way while it is taken in and removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_is_under_way_at_the_removal_changes_nothing_after_it() {
    let group = Group::start().await;
    for id in 100..120 {
        let question = group.question(id, "b");
        group.admit(&question).await.unwrap();
        let asking = join_all((0..64).map(|_| group.admit(&question)));
        let ((), answers) = tokio::join!(group.remove("b"), asking);
        assert_eq!(group.ids("b"), [], "of {answers:?}");
    }
    group.member.stop().await.unwrap();
}

/// Ten times, of many that ask at once with the same name one is taken in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_given_once_to_all_that_ask_at_the_same_time() {
    let group = Group::start().await;
    for round in 1..=10 {
        let questions: Vec<_> = (0..16).map(|at| group.question(1_000 * round + at, "b")).collect();
        let answers = join_all(questions.iter().map(|question| group.admit(question))).await;
        assert_eq!(group.ids("b").len(), 1, "of {answers:?}");
        group.remove("b").await;
    }
    group.member.stop().await.unwrap();
}

/// By whichever version it asks: what is recorded has to lead the others to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_at_no_address_is_not_taken_in() {
    let group = Group::start().await;
    let question = |address: &str, name: &str| Admission {
        address: address.into(),
        ..group.question(7, name)
    };
    let long = format!("{}:1", "h".repeat(300));
    for (address, name) in [
        ("0.0.0.0:1", "b"),
        ("[::]:1", "b"),
        ("b", "b"),
        (&long, "b"),
        ("h:1", "b c"),
    ] {
        let refusal = group.admit(&question(address, name)).await.unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::InvalidArgument, "{address}: {refusal}");
    }
    assert_eq!(group.member.status().members.len(), 1);
    // Nor is an address recorded for one that is there, unless it responds at it.
    group.admit(&question("127.0.0.1:1", "b")).await.unwrap();
    let refusal = group.admit(&question("127.0.0.1:2", "b")).await.unwrap_err();
    assert!(refusal.message().contains("does not respond"), "{refusal}");
    // The Raft leader checks its own new address as it does any other.
    let own = Admission {
        id: group.member.core.identity().member,
        ..question("127.0.0.1:2", "a")
    };
    let refusal = group.admit(&own).await.unwrap_err();
    assert!(refusal.message().contains("does not respond"), "{refusal}");
    let renamed = group.admit(&question("127.0.0.1:1", "c")).await.unwrap_err();
    assert_eq!(renamed.code(), tonic::Code::AlreadyExists, "{renamed}");
    group.member.stop().await.unwrap();
}
