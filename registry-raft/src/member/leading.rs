//! What a leader may answer and promise, and for how long, while other members follow it, leave it and lead in its place.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use registry_api::{Key, SessionId};
use registry_tests::process::free_port;
use registry_tests::{Direction, Wire, cluster::eventually, within};

use super::*;
use crate::command::{Change, Command};

const PATIENCE: Duration = Duration::from_secs(40);
const NAMES: [&str; 3] = ["a", "b", "c"];

/// Members of this process, each behind a wire.
struct Group {
    members: Vec<Member>,
    wires: Vec<Wire>,
    dir: tempfile::TempDir,
}

impl Group {
    async fn start(size: usize, set: impl Fn(usize, &mut RaftConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listen: Vec<_> = (0..size).map(|_| format!("127.0.0.1:{}", free_port())).collect();
        let wires = join_all(listen.iter().map(|address| Wire::to(address.parse().unwrap()))).await;
        let names = NAMES.iter().map(|name| (*name).to_owned());
        let list: BTreeMap<_, _> = names.zip(wires.iter().map(|wire| wire.address().to_string())).collect();
        let config = |at: usize| {
            let mut config = RaftConfig {
                member: Some(NAMES[at].into()),
                data_dir: Some(dir.path().join(NAMES[at])),
                listen: Some(listen[at].clone()),
                cluster: list.clone(),
                ..RaftConfig::default()
            };
            set(at, &mut config);
            config
        };
        let configs: Vec<_> = (0..size).map(config).collect();
        let members = join_all(configs.iter().map(Member::start)).await;
        let members = members.into_iter().map(Result::unwrap).collect();
        Self { members, wires, dir }
    }

    fn core(&self, at: usize) -> &Core {
        &self.members[at].core
    }

    /// The member that leads, and has been told so.
    async fn leader(&self) -> usize {
        let leads =
            |at: &usize| self.members[*at].leads().is_some() && self.members[*at].leadership().borrow().is_some();
        eventually(PATIENCE, || async { (0..self.members.len()).any(|at| leads(&at)) }).await;
        (0..self.members.len()).find(leads).unwrap()
    }

    /// Makes this member the leader.
    async fn led_by(&self, at: usize) {
        let name = NAMES[at].to_owned();
        let transferred = self.members[at].change_members(MemberChange::Transfer { name });
        within(PATIENCE, transferred).await.unwrap();
        eventually(PATIENCE, || async { self.members[at].leadership().borrow().is_some() }).await;
    }

    async fn session(&self, at: usize, ttl: Duration) -> SessionId {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap();
        let open = Command::new(Change::Open(proto::OpenSession { ttl_ms, first: 0 }));
        let reply = self.core(at).propose(&open).await.unwrap();
        match reply.result.unwrap() {
            crate::command::Outcome::SessionOpened(session) => SessionId(session),
            other => panic!("{other:?}"),
        }
    }

    async fn stop(self) {
        for stopped in join_all(self.members.into_iter().map(Member::stop)).await {
            stopped.unwrap();
        }
        drop(self.dir);
    }
}

fn key() -> Key {
    Key::parse("/a").unwrap()
}

fn put(value: &'static str) -> Command {
    let txn = registry_api::Txn::new().put(&key(), value);
    Command::new(Change::Txn(crate::command::txn_to_proto(&Namespace::default(), &txn)))
}

fn keep_alive(session: SessionId) -> Call {
    Call::KeepAlive(proto::KeepAlive { session: session.0 })
}

/// A linearizable read at a member; `None` if it is not answered in that time.
async fn read_at(core: &Core, patience: Duration) -> Option<String> {
    let get = proto::Get {
        key: Namespace::default().qualify(key().as_str()),
        ..proto::Get::default()
    };
    match core.serve(Call::Get(get), patience).await {
        Ok(Answer::Get(found)) => Some(String::from_utf8(found.entry.unwrap().value.to_vec()).unwrap()),
        Ok(other) => panic!("{other:?}"),
        Err(_) => None,
    }
}

/// The leader of a group of two is removed, and does not hear that the other, which needs no vote but its own, has the entry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_leader_of_two_leads_no_more_and_reads_nothing_by_its_lease() {
    let group = Group::start(2, |_, config| config.lease_reads = true).await;
    group.led_by(0).await;
    let (old, next) = (&group.members[0], &group.members[1]);
    old.core.propose(&put("1")).await.unwrap();
    assert_eq!(read_at(&old.core, PATIENCE).await.as_deref(), Some("1"));
    group.wires[1].slow(Duration::from_millis(25));
    let us = old.core.identity().member;
    let removing = tokio::spawn({
        let core = old.core.clone();
        async move {
            let change = proto::ChangeMembers {
                kind: proto::change_members::Kind::Remove.into(),
                name: "a".into(),
                address: String::new(),
            };
            core.change_members(change).await
        }
    });
    // The last entry of its removal is on its way; what the other says is lost.
    within(PATIENCE, async {
        let mut metrics = old.core.raft.server_metrics();
        while metrics
            .borrow_watched()
            .membership_config
            .membership()
            .voter_ids()
            .any(|voter| voter == us)
        {
            metrics.changed().await.unwrap();
        }
    })
    .await;
    group.wires[1].cut_one_way(Direction::ToClient);
    eventually(PATIENCE, || async { next.leads().is_some() }).await;
    next.core.propose(&put("2")).await.unwrap();
    let told = (old.leads(), *old.leadership().borrow());
    assert_eq!(told, (None, None), "{:?} leads", next.leads());
    assert!(
        old.core.leads().is_some(),
        "it has heard of its successor: the wire was not cut in time"
    );
    let read = read_at(&old.core, Duration::from_millis(300)).await;
    assert!(read.as_deref() != Some("1"), "it reads what was true before");
    removing.abort();
    group.wires.iter().for_each(Wire::mend);
    group.stop().await;
}

/// What is committed is told by another member before the leader itself has applied it.
async fn reads_at_a_leader_that_applies_late(group: &Group, leader: usize, other: usize) {
    let (leader, other) = (group.core(leader), group.core(other));
    leader.propose(&put("1")).await.unwrap();
    assert_eq!(read_at(other, PATIENCE).await.as_deref(), Some("1"));
    assert_eq!(read_at(leader, PATIENCE).await.as_deref(), Some("1"));
    let late = leader.store.applies.clone().write_owned().await;
    let putting = tokio::spawn({
        let leader = leader.clone();
        async move { leader.propose(&put("2")).await }
    });
    eventually(PATIENCE, || async {
        read_at(other, PATIENCE).await.as_deref() == Some("2")
    })
    .await;
    let early = read_at(leader, Duration::from_millis(300)).await;
    assert_eq!(early, None, "a read goes back in time");
    drop(late);
    putting.await.unwrap().unwrap();
    assert_eq!(read_at(leader, PATIENCE).await.as_deref(), Some("2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_at_the_only_voter_is_not_older_than_one_at_its_learner() {
    let dir = tempfile::tempdir().unwrap();
    let config = |name: &str, join: Vec<String>| RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.path().join(name)),
        listen: Some("127.0.0.1:0".into()),
        join,
        ..RaftConfig::default()
    };
    let voter = Member::start(&config("a", Vec::new())).await.unwrap();
    let address = voter.address().unwrap().to_string();
    let learner = Member::start(&config("b", vec![address])).await.unwrap();
    let group = Group {
        members: vec![voter, learner],
        wires: Vec::new(),
        dir: tempfile::tempdir().unwrap(),
    };
    reads_at_a_leader_that_applies_late(&group, 0, 1).await;
    group.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_by_the_lease_is_not_older_than_one_at_a_follower() {
    let group = Group::start(3, |_, config| config.lease_reads = true).await;
    let leader = group.leader().await;
    reads_at_a_leader_that_applies_late(&group, leader, (leader + 1) % 3).await;
    group.stop().await;
}

/// A keep-alive that was passed on to it comes right after it lost its leadership: its successor counts by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deposed_leader_promises_no_session_anything() {
    let group = Group::start(3, |_, _| {}).await;
    let mut leader = group.leader().await;
    let session = group.session(leader, Duration::from_secs(60)).await;
    for round in 0..20 {
        let old = group.core(leader);
        eventually(PATIENCE, || async {
            old.serve_here(keep_alive(session), PATIENCE).await.is_ok()
        })
        .await;
        let next = (leader + 1) % 3;
        within(PATIENCE, old.transfer(group.core(next).identity().member))
            .await
            .unwrap();
        let promised = old.serve_here(keep_alive(session), PATIENCE).await;
        assert!(promised.is_err(), "round {round}: {promised:?}");
        leader = next;
        group.leader().await;
    }
    group.stop().await;
}

/// No majority says that it still leads: another may, and count the session's time by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_majority_promises_no_session_anything() {
    let group = Group::start(3, |_, _| {}).await;
    let leader = group.leader().await;
    let session = group.session(leader, Duration::from_secs(60)).await;
    let core = group.core(leader).clone();
    eventually(PATIENCE, || async {
        core.serve_here(keep_alive(session), PATIENCE).await.is_ok()
    })
    .await;
    let others = (0..3).filter(|at| *at != leader);
    others.for_each(|at| group.wires[at].cut());
    let promised = core.serve_here(keep_alive(session), Duration::from_millis(300)).await;
    assert!(promised.is_err(), "{promised:?}");
    group.wires.iter().for_each(Wire::mend);
    group.stop().await;
}

/// Of a session that was silent the log says so: the next leader would grant it less than what a keep-alive promises.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_session_is_heard_in_the_log_before_it_is_answered() {
    let group = Group::start(1, |_, _| {}).await;
    let core = group.core(0);
    let session = group.session(0, Duration::from_secs(2)).await;
    let silent = || core.store.read(|inner| inner.state.sessions[&session.0].silent_ms);
    for _ in 0..2 {
        eventually(PATIENCE, || async { silent() > 0 }).await;
        core.serve(keep_alive(session), PATIENCE).await.unwrap();
        assert_eq!(silent(), 0);
    }
    group.stop().await;
}

/// The member that is to lead does not take over. openraft takes no transfer back, and the followers wait no more for this
/// leader, so it does not lead for certain in all of that term.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_ends_the_leadership_whether_or_not_another_takes_over() {
    let group = Group::start(3, |_, _| {}).await;
    let leader = group.leader().await;
    let member = &group.members[leader];
    let (term, told) = (member.leads().unwrap(), member.leadership());
    // One that never answers.
    let next = (leader + 1) % 3;
    group.wires[next].cut();
    let next_id = group.core(next).identity().member;
    let mut transferring = Box::pin(member.core.transfer(next_id));
    assert!(futures_util::poll!(&mut transferring).is_pending());
    assert_eq!(*told.borrow(), None, "the program is told before the transfer begins");
    while member.core.leads() == Some(term) {
        let leads = (member.leads(), *told.borrow());
        // It may be elected again meanwhile.
        if leads.0.or(leads.1) == Some(term) && member.core.leads() == Some(term) {
            panic!("it leads for certain while it transfers its leadership, or has tried to: {leads:?}");
        }
        tokio::task::yield_now().await;
    }
    transferring.await.unwrap_err();
    group.wires[next].mend();
    group.leader().await;
    group.stop().await;
}

/// All threads that the member's tasks run on are busy, and no majority acknowledges it: by its clock it leads no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_runs_out_is_told_while_the_members_threads_are_busy() {
    let group = Group::start(3, |_, _| {}).await;
    let leader = group.leader().await;
    let member = &group.members[leader];
    let mut told = member.leadership();
    let threads = member.running.as_ref().unwrap().threads.handle().unwrap();
    let (release, busy): (Vec<_>, Vec<_>) = (0..workers()).map(|_| std::sync::mpsc::channel::<()>()).unzip();
    for busy in busy {
        threads.spawn(async move { busy.recv().unwrap_err() });
    }
    within(PATIENCE, told.wait_for(Option::is_none)).await.unwrap();
    drop(release);
    // It is told again once it leads for certain.
    group.leader().await;
    group.stop().await;
}

/// More changes wait at the leader, for the disk or the majority, than one conversation has worked on at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keep_alive_and_a_read_at_a_follower_pass_changes_that_wait() {
    let group = Group::start(3, |_, _| {}).await;
    let leader = group.leader().await;
    let (leader, follower) = (group.core(leader), group.core((leader + 1) % 3));
    let at = group.leader().await;
    let session = group.session(at, Duration::from_secs(6)).await;
    leader.propose(&put("1")).await.unwrap();
    let all = leader
        .in_flight
        .clone()
        .acquire_many_owned(u32::try_from(IN_FLIGHT).unwrap());
    let all = all.await.unwrap();
    let changes: Vec<_> = (0..1_100)
        .map(|_| {
            let follower = follower.clone();
            tokio::spawn(async move { follower.serve(Call::Command(put("2")), PATIENCE).await })
        })
        .collect();
    // As many wait as the leader takes of one conversation.
    let asked = || async { read_at(follower, Duration::from_secs(5)).await };
    for _ in 0..3 {
        assert_eq!(asked().await.as_deref(), Some("1"));
        let kept = follower.serve(keep_alive(session), Duration::from_secs(5)).await;
        assert!(kept.is_ok(), "{kept:?}");
    }
    // So does one that needs an entry of the log, and the note that makes it so.
    let silent = || leader.store.read(|inner| inner.state.sessions[&session.0].silent_ms);
    eventually(PATIENCE, || async { silent() > 0 }).await;
    let kept = follower.serve(keep_alive(session), Duration::from_secs(2)).await;
    assert!(kept.is_ok(), "{kept:?}");
    assert_eq!(silent(), 0);
    drop(all);
    for change in changes {
        change.await.unwrap().unwrap();
    }
    group.stop().await;
}

/// The setting is changed on one member after the other: the leader counts on the silence of each as that one keeps it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_as_short_as_the_shortest_timers_of_a_voter() {
    let group = Group::start(3, |at, config| {
        config.timers = if at == 2 { Timers::Fast } else { Timers::Default };
    })
    .await;
    let lease = |at: usize| {
        let (_, membership) = group.core(at).leads_with().unwrap();
        group.core(at).lease(&membership)
    };
    for (at, shortest) in [(0, 300), (2, 300)] {
        group.led_by(at).await;
        let shortest = Duration::from_millis(shortest).mul_f64(0.8);
        eventually(PATIENCE, || async { lease(at) == shortest }).await;
        assert_eq!(lease(at), shortest);
    }
    group.stop().await;
}

/// A member that joins the group by that address.
async fn joiner(dir: &std::path::Path, name: &str, by: String) -> Member {
    let config = RaftConfig {
        member: Some(name.into()),
        data_dir: Some(dir.join(name)),
        listen: Some(format!("127.0.0.1:{}", free_port())),
        join: vec![by],
        ..RaftConfig::default()
    };
    within(PATIENCE, Member::start(&config)).await.unwrap()
}

/// A change of voters is two entries of the log. Who proposed it is gone when the first is there: the leader completes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_voters_that_was_interrupted_is_completed() {
    let group = Group::start(2, |_, _| {}).await;
    let leader = group.leader().await;
    let c = joiner(group.dir.path(), "c", group.wires[leader].address().to_string()).await;
    let (core, id) = (group.core(leader), c.core.identity().member);
    let (at, membership) = core.membership();
    assert!(membership.get_node(&id).is_some());
    let voters = openraft::ChangeMembers::AddVoterIds(std::iter::once(id).collect());
    let unchanged = openraft::Precondition::LastMembershipLogId {
        last_membership_log_id: at,
    };
    let mut metrics = core.raft().metrics();
    let begun = async {
        while !crate::members::is_joint(metrics.borrow_watched().membership_config.membership()) {
            metrics.changed().await.unwrap();
        }
    };
    tokio::select! {
        biased;
        () = begun => {}
        changed = core.raft().change_membership_if(voters, true, [unchanged]) => panic!("it was not interrupted: {changed:?}"),
    }
    eventually(PATIENCE, || async {
        let membership = core.membership().1;
        membership.voter_ids().count() == 3 && !crate::members::is_joint(&membership)
    })
    .await;
    c.stop().await.unwrap();
    group.stop().await;
}

/// The leader's snapshot was damaged since it was written: the member that it is sent to lives, and gets the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_snapshot_ends_no_other_member_and_is_replaced() {
    let group = Group::start(1, |_, _| {}).await;
    group.leader().await;
    let registry = group.members[0].connect(&Options::default()).await.unwrap();
    for n in 0..100 {
        let key = Key::parse(&format!("/k/{n}")).unwrap();
        registry.put(&key, vec![b'x'; 1_000]).await.unwrap();
    }
    registry.close().await.unwrap();
    within(PATIENCE, group.members[0].snapshot()).await.unwrap();
    let folder = group.dir.path().join("a/snapshots");
    let snapshot = || {
        let files = std::fs::read_dir(&folder).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|ending| ending == "snap"));
        files.pop()
    };
    eventually(PATIENCE, || async {
        snapshot().is_some() && group.members[0].status().snapshot_bytes > 0
    })
    .await;
    // The log that it covers is not there any more, so that another member needs it.
    eventually(PATIENCE, || async {
        group.core(0).raft().metrics().borrow_watched().purged.is_some()
    })
    .await;
    let file = snapshot().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    assert!(group.core(0).snapshots().check_newest().is_err());

    let c = joiner(group.dir.path(), "c", group.wires[0].address().to_string()).await;
    eventually(PATIENCE, || async {
        c.core.store().read(|inner| inner.state.tree.len()) >= 100
    })
    .await;
    assert!(futures_util::FutureExt::now_or_never(c.ended()).is_none());
    group.core(0).snapshots().check_newest().unwrap();
    c.stop().await.unwrap();
    group.stop().await;
}
