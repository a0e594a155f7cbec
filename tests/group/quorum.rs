//! A member that the quorum is lost to: by processes that are killed or stand still, and by a network that is cut.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use registry::raft::{self, MemberChange, RaftConfig};
use registry::{
    Error, Held, Leadership, List, Options, Prefix, Read, Registry, SessionState, SessionTtl, Txn, WatchRequest,
    WatchScope,
};
use registry_tests::{key, within};
use tokio::task::JoinHandle;

use crate::harness::{Group, PATIENCE, options};
use crate::{tells, until, value};

/// How much later than its deadline a call may end on a busy machine.
const LATE: Duration = Duration::from_secs(8);

/// How the others are lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Killed,
    StandingStill,
    CutOff,
}

/// Which member stays.
#[derive(Clone, Copy, Debug)]
enum Stays {
    Leader,
    Follower,
}

impl Loss {
    async fn happens(self, group: &mut Group, here: usize) {
        match self {
            Self::CutOff => group.net.isolate(here),
            _ => {
                for other in others(here) {
                    match self {
                        Self::Killed => group.kill(other).await,
                        _ => group.process(other).pause(),
                    }
                }
            }
        }
    }

    async fn ends(self, group: &mut Group, here: usize) {
        match self {
            Self::Killed => group.restart(&others(here)).await,
            Self::StandingStill => others(here).iter().for_each(|other| group.process(*other).resume()),
            Self::CutOff => group.net.mend(),
        }
    }
}

fn others(here: usize) -> Vec<usize> {
    (0..3).filter(|at| *at != here).collect()
}

/// Waits for what another holds, and says when it came.
struct Waiting {
    registry: Arc<dyn Registry>,
    lock: JoinHandle<(Held, Instant)>,
    leadership: JoinHandle<(Leadership, Instant)>,
}

impl Waiting {
    async fn at(group: &Group, member: usize) -> Self {
        // Its own session outlives the loss.
        let patient = Options {
            session_ttl: SessionTtl::new(Duration::from_secs(300)).unwrap(),
            ..options()
        };
        let registry = raft::connect(&group.remote(member), &patient).await.unwrap();
        let (lock, election) = (registry.lock(&key("/l")), registry.election(&key("/e")));
        let waiting = Self {
            lock: tokio::spawn(async move { (lock.acquire().await.unwrap(), Instant::now()) }),
            leadership: tokio::spawn(async move { (election.campaign("next").await.unwrap(), Instant::now()) }),
            registry,
        };
        let (lock, election) = (waiting.registry.lock(&key("/l")), waiting.registry.election(&key("/e")));
        until("it waits", || async {
            lock.contenders().await.unwrap().len() == 2 && election.candidates().await.unwrap().len() == 2
        })
        .await;
        waiting
    }
}

/// Every state of a handle's session, until the second one is connected.
fn states_of(registry: &Arc<dyn Registry>) -> JoinHandle<Vec<SessionState>> {
    let mut states = registry.session().states();
    let mut seen = vec![*states.borrow_and_update()];
    tokio::spawn(async move {
        while !matches!(seen.last(), Some(SessionState::Connected(id)) if *id != seen[0].id()) {
            states.changed().await.unwrap();
            seen.push(*states.borrow_and_update());
        }
        seen
    })
}

/// Every call that needs the quorum ends by its deadline, and none says that it has done anything.
async fn calls_fail(registry: &Arc<dyn Registry>, request_timeout: Duration) {
    let limit = request_timeout + LATE;
    let (a, below) = (key("/a"), Prefix::from(key("/b")));
    let reads = async {
        let (get, list, children, count, watch) = tokio::join!(
            within(limit, registry.get(&a, Read::Linearizable)),
            within(limit, registry.list(List::new(below.clone()))),
            within(limit, registry.children(&below, Read::Linearizable)),
            within(limit, registry.count(&below, Read::Linearizable)),
            within(limit, registry.watch(WatchRequest::new(key("/b"), WatchScope::Subtree))),
        );
        [get.err(), list.err(), children.err(), count.err(), watch.err()]
    };
    let writes = async {
        let (other, ephemeral) = (key("/other"), key("/ephemeral"));
        let (lock, election) = (registry.lock(&other), registry.election(&other));
        let (put, ephemeral, delete, delete_below, commit, locked, led) = tokio::join!(
            within(limit, registry.put(&a, "2")),
            within(limit, registry.put_ephemeral(&ephemeral, "2")),
            within(limit, registry.delete(&a)),
            within(limit, registry.delete_prefix(&below)),
            within(limit, registry.commit(Txn::new().put(&a, "2"))),
            within(limit, lock.try_acquire()),
            within(limit, election.leader()),
        );
        let in_session = [ephemeral.err(), locked.err()];
        (
            in_session,
            [put.err(), delete.err(), delete_below.err(), commit.err(), led.err()],
        )
    };
    assert!(within(limit, registry.health()).await.is_err());
    let (reads, (in_session, writes)) = tokio::join!(reads, writes);
    for read in reads {
        assert!(matches!(read, Some(Error::Unavailable { .. })), "{read:?}");
    }
    let unknown =
        |error: &Option<Error>| matches!(error, Some(Error::Unavailable { .. } | Error::OutcomeUnknown { .. }));
    for write in writes {
        assert!(unknown(&write), "{write:?}");
    }
    // The session may end before these calls begin, since `health` waits for its deadline first.
    for write in in_session {
        let ended = matches!(write, Some(Error::SessionExpired { session }) if !registry.session().is_valid(session));
        assert!(ended || unknown(&write), "{write:?}");
    }
}

/// Nor does what asks without a handle, or opens one.
async fn questions_fail(remote: &RaftConfig, options: &Options, dir: &Path) {
    let quick = Options {
        connect_timeout: options.request_timeout,
        ..options.clone()
    };
    let (limit, file) = (options.request_timeout + LATE, dir.join("backup"));
    let promote = MemberChange::Promote { name: "a".into() };
    let (opened, changed, compared, saved) = tokio::join!(
        within(limit, raft::connect(remote, &quick)),
        within(limit, raft::change_members(remote, &quick, promote)),
        within(limit, raft::verify(remote, &quick)),
        within(limit, raft::backup(remote, &quick, &file, |_, _| {})),
    );
    for failed in [opened.err(), changed.err(), compared.err(), saved.err()] {
        let unknown = matches!(failed, Some(Error::Unavailable { .. } | Error::OutcomeUnknown { .. }));
        assert!(unknown, "{failed:?}");
    }
    assert!(!file.exists());
}

/// What etcd's raftexample, kvrocks and DSS do not do: every call ends by its deadline, what needs no quorum goes on, who
/// held something is told that it is lost before another has it, and all goes on by itself when the quorum is back.
async fn a_loss(loss: Loss, stays: Stays) {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let here = match stays {
        Stays::Leader => leader,
        Stays::Follower => (leader + 1) % 3,
    };
    let short = Options {
        session_ttl: SessionTtl::new(Duration::from_secs(5)).unwrap(),
        request_timeout: Duration::from_secs(2),
        ..options()
    };
    let registry = raft::connect(&group.remote(here), &short).await.unwrap();
    let session = registry.session().live().unwrap();
    registry.put(&key("/a"), "1").await.unwrap();
    // A stale read of this member finds it from here on.
    assert_eq!(value(&registry, "/a", Read::Linearizable).await.unwrap(), "1");
    let held = registry.lock(&key("/l")).acquire().await.unwrap();
    let leadership = registry.election(&key("/e")).campaign("here").await.unwrap();
    let mut watch = registry
        .watch(WatchRequest::new(key("/a"), WatchScope::Key))
        .await
        .unwrap();
    // Who waits can come to its turn while the quorum is lost to the holder alone.
    let elsewhere = match loss {
        Loss::CutOff => others(here)[0],
        _ => here,
    };
    let waiting = Waiting::at(&group, elsewhere).await;
    let states = states_of(&registry);

    loss.happens(&mut group, here).await;
    let lost = async {
        held.lost().await;
        leadership.lost().await;
        Instant::now()
    };
    let (remote, dir) = (group.remote(here), group.directory());
    let ((), (), lost) = tokio::join!(
        calls_fail(&registry, short.request_timeout),
        questions_fail(&remote, &short, &dir),
        within(PATIENCE, lost)
    );
    assert!(!registry.session().is_valid(session));
    assert_eq!(value(&registry, "/a", Read::Stale).await.unwrap(), "1");
    if matches!(loss, Loss::CutOff) {
        within(PATIENCE, async {
            while !waiting.lock.is_finished() {
                tokio::task::yield_now().await
            }
        })
        .await;
    }

    loss.ends(&mut group, here).await;
    let (next, locked) = within(PATIENCE, waiting.lock).await.unwrap();
    let (leads, elected) = within(PATIENCE, waiting.leadership).await.unwrap();
    assert!(
        lost < locked && lost < elected,
        "another had it before the loss was told"
    );
    let token = next.token();
    assert!(token > held.token() && leads.token() > leadership.token());
    registry.wait_connected(PATIENCE).await.unwrap();
    until("writes go on", || async { registry.put(&key("/a"), "3").await.is_ok() }).await;
    tells(&mut watch, "3").await;
    assert!(held.is_lost() && leadership.is_lost(), "what was lost came back");
    next.release().await.unwrap();
    leads.resign().await.unwrap();
    let again = within(PATIENCE, registry.lock(&key("/l")).acquire()).await.unwrap();
    assert!(again.token() > token);
    let states = within(PATIENCE, states).await.unwrap();
    let place = |state| states.iter().position(|seen| *seen == state);
    let (suspended, expired) = (
        place(SessionState::Suspended(session)),
        place(SessionState::Expired(session)),
    );
    assert!(suspended.is_some() && suspended < expired, "{states:?}");
    registry.close().await.unwrap();
    waiting.registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_others_are_killed() {
    a_loss(Loss::Killed, Stays::Follower).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_others_stand_still() {
    a_loss(Loss::StandingStill, Stays::Follower).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_others_stand_still() {
    a_loss(Loss::StandingStill, Stays::Leader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_from_both() {
    a_loss(Loss::CutOff, Stays::Leader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_others_are_killed() {
    a_loss(Loss::Killed, Stays::Leader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_is_cut_off_from_both() {
    a_loss(Loss::CutOff, Stays::Follower).await;
}

/// W3, L1. The follower at which a handle watches and waits is cut off from its group, and not from the handle: both go on at
/// another member.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_and_waits_leave_a_member_that_is_cut_off() {
    let group = Group::start(3).await;
    let leader = group.leader().await;
    let (here, other) = ((leader + 1) % 3, (leader + 2) % 3);
    // Not the leader, whose address the handle would follow.
    let config = RaftConfig::remote([group.address(here), group.address(other)]);
    let registry = raft::connect(&config, &options()).await.unwrap();
    let holder = group.connect(leader).await;
    let lock = holder.lock(&key("/l"));
    let held = lock.acquire().await.unwrap();
    let request = WatchRequest::new(key("/w"), WatchScope::Key);
    let mut watch = registry.watch(request).await.unwrap();
    let waiter = registry.lock(&key("/l"));
    let waiting = tokio::spawn(async move { waiter.acquire().await });
    until("it waits", || async { lock.contenders().await.unwrap().len() == 2 }).await;

    group.net.isolate(here);
    holder.put(&key("/w"), "changed").await.unwrap();
    held.release().await.unwrap();
    tells(&mut watch, "changed").await;
    let held = within(PATIENCE, waiting).await.unwrap().unwrap();
    held.release().await.unwrap();
    group.net.mend();
}
