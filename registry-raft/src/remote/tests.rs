//! Where a handle goes for a hint, and where not; what it is told along.

use registry_api::{Event, Key, Options, Prefix, Registry, Revision, Txn, WatchFrom, WatchItem, WatchScope};
use registry_tests::cluster::eventually;

use super::*;
use crate::command::{self, Change, Command};
use crate::{Member, RaftConfig};

/// How long one call may take. A member that is asked answers long before, on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(10);

async fn asked(remote: &Remote) -> Result<Answer> {
    remote.call(Call::Status(proto::StatusRequest {}), PATIENCE).await
}

fn hint(address: &str) -> proto::Response {
    let leader = address.into();
    proto::Response { leader, answer: None }
}

/// A member that hangs may still be the leader that the others name: who waited for it once does not go back for that.
#[tokio::test]
async fn a_hint_to_one_that_does_not_answer_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let start = async |name: &str| {
        let config = RaftConfig {
            data_dir: Some(dir.path().join(name)),
            listen: Some("127.0.0.1:0".into()),
            ..RaftConfig::default()
        };
        Member::start(&config).await.unwrap()
    };
    let (one, other) = (start("one").await, start("other").await);
    // Connections to it are made by the system, and nobody reads from them.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = |member: &Member| member.address().unwrap().to_string();
    let addresses = vec![mute.local_addr().unwrap().to_string(), address(&one), address(&other)];
    let (mute, one_at, other_at) = (&addresses[0], &addresses[1], &addresses[2]);
    let transport = Transport::new(&RaftConfig::remote(addresses.clone())).unwrap();
    let remote = Remote::new(transport, addresses.clone());

    let silence = asked(&remote).await;
    assert!(matches!(silence, Err(Error::OutcomeUnknown { .. })), "{silence:?}");
    asked(&remote).await.unwrap();
    assert_eq!(remote.endpoint(), *one_at);
    remote.led(hint(mute));
    assert_eq!(remote.endpoint(), *one_at, "it goes back to who does not answer");
    // Nor anywhere that the handle was not told of.
    remote.led(hint("127.0.0.1:9"));
    remote.led(hint(""));
    assert_eq!(remote.endpoint(), *one_at);

    remote.led(hint(other_at));
    asked(&remote).await.unwrap();
    assert_eq!(remote.endpoint(), *other_at);
    for member in [one, other] {
        member.stop().await.unwrap();
    }
}

/// A group of one, and a handle to it by the wire.
struct Alone {
    dir: tempfile::TempDir,
    member: Member,
    remote: Arc<dyn Registry>,
}

impl Alone {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let member = Self::open(&dir, 0).await;
        let remote = RaftConfig::remote([member.address().unwrap().to_string()]);
        let remote = crate::connect(&remote, &Options::default()).await.unwrap();
        Self { dir, member, remote }
    }

    async fn open(dir: &tempfile::TempDir, port: u16) -> Member {
        let config = RaftConfig {
            data_dir: Some(dir.path().join("data")),
            listen: Some(format!("127.0.0.1:{port}")),
            ..RaftConfig::default()
        };
        Member::start(&config).await.unwrap()
    }

    /// The member is elsewhere while the store changes, and comes back from a snapshot, which leaves nothing of the history.
    async fn miss(mut self, change: impl AsyncFnOnce(&dyn Registry)) -> Self {
        let port = self.member.address().unwrap().port();
        self.member.stop().await.unwrap();
        let elsewhere = Self::open(&self.dir, 0).await;
        let registry = elsewhere.connect(&Options::default()).await.unwrap();
        change(&*registry).await;
        registry.close().await.unwrap();
        elsewhere.snapshot().await.unwrap();
        eventually(PATIENCE, || async { elsewhere.status().snapshot_bytes > 0 }).await;
        elsewhere.stop().await.unwrap();
        self.member = Self::open(&self.dir, port).await;
        self
    }

    async fn stop(self) {
        self.remote.close().await.unwrap();
        self.member.stop().await.unwrap();
    }
}

fn key(name: &str) -> Key {
    Key::parse(&format!("/{name}")).unwrap()
}

async fn next(watch: &mut Watch) -> WatchItem {
    let next = tokio::time::timeout(3 * PATIENCE, watch.next()).await;
    next.unwrap().unwrap().unwrap()
}

/// A watch that began after a revision knows what was there then, and is told what went while the only member was started
/// again from a snapshot.
#[tokio::test]
async fn a_watch_after_a_revision_bridges_a_gap_without_history() {
    let store = Alone::start().await;
    store.remote.put(&key("goes"), "1").await.unwrap();
    let after = store.remote.put(&key("stays"), "1").await.unwrap();
    let request = WatchRequest {
        from: WatchFrom::After(after),
        ..WatchRequest::new(Prefix::root(), WatchScope::Subtree)
    };
    let mut watch = store.remote.watch(request).await.unwrap();
    assert_eq!(next(&mut watch).await, WatchItem::Synced(after));
    let change = async |registry: &dyn Registry| {
        registry.delete(&key("goes")).await.unwrap();
        registry.put(&key("comes"), "1").await.unwrap();
    };
    let store = store.miss(change).await;
    let WatchItem::Changes(events) = next(&mut watch).await else {
        panic!("nothing was told")
    };
    assert!(
        matches!(&events[..], [Event::Created(comes), Event::Deleted { last: goes, .. }]
            if comes.key == key("comes") && goes.key == key("goes")),
        "{events:?}"
    );
    assert!(matches!(next(&mut watch).await, WatchItem::Synced(_)));
    drop(watch);
    store.stop().await;
}

/// Also to a reader who knew of no key before.
#[tokio::test]
async fn what_bridges_a_gap_is_told_in_the_order_of_revisions() {
    let store = Alone::start().await;
    let request = WatchRequest::new(Prefix::root(), WatchScope::Subtree);
    let mut watch = store.remote.watch(request).await.unwrap();
    assert!(matches!(next(&mut watch).await, WatchItem::Synced(_)));
    let change = async |registry: &dyn Registry| {
        registry.put(&key("b"), "1").await.unwrap();
        registry.put(&key("a"), "2").await.unwrap();
    };
    let store = store.miss(change).await;
    let WatchItem::Changes(events) = next(&mut watch).await else {
        panic!("nothing was told")
    };
    assert!(
        matches!(&events[..], [Event::Created(first), Event::Created(second)]
            if first.key == key("b") && second.key == key("a")),
        "{events:?}"
    );
    assert!(matches!(next(&mut watch).await, WatchItem::Synced(_)));
    drop(watch);
    store.stop().await;
}

/// What takes more than a message at one revision: the watch is told all of it, and no other call of the handle is disturbed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_that_end_at_once_disturb_no_other_call() {
    const KEYS: usize = 40_000;
    let store = Alone::start().await;
    let options = Options {
        namespace: Namespace::parse(&format!("/{}", "n".repeat(200))).unwrap(),
        ..Options::default()
    };
    let local = store.member.connect(&options).await.unwrap();
    let puts: Vec<_> = (0..KEYS).map(|n| key(&format!("k/{n}"))).collect();
    for some in puts.chunks(registry_api::MAX_OPERATIONS) {
        let txn = some.iter().fold(Txn::new(), |txn, key| txn.put(key, ""));
        local.commit(txn).await.unwrap();
    }
    let remote = RaftConfig::remote([store.member.address().unwrap().to_string()]);
    let remote = crate::connect(&remote, &options).await.unwrap();
    let request = WatchRequest::new(key("k"), WatchScope::Subtree);
    let mut watch = remote.watch(request).await.unwrap();
    while !matches!(next(&mut watch).await, WatchItem::Synced(_)) {}
    let told = async {
        let mut told = 0;
        while told < KEYS {
            if let WatchItem::Changes(events) = next(&mut watch).await {
                told += events.len();
            }
        }
        told
    };
    let others = async {
        let deleted = local.delete_prefix(&key("k").into()).await.unwrap();
        for n in 0..200 {
            remote.put(&key("other"), n.to_string()).await.unwrap();
        }
        deleted
    };
    let (told, deleted) = tokio::join!(told, others);
    assert_eq!((told, deleted), (KEYS, KEYS as u64));
    drop(watch);
    for handle in [local, remote] {
        handle.close().await.unwrap();
    }
    store.stop().await;
}

/// A message that can't be encoded or decoded ends the stream: what was in flight may have been carried out.
#[test]
fn a_message_of_the_wrong_size_leaves_the_outcome_unknown() {
    let ended = status_error(tonic::Status::out_of_range("encoded message length too large"));
    assert!(matches!(ended, Error::OutcomeUnknown { .. }), "{ended:?}");
    let ended = status_error(tonic::Status::invalid_argument("what a proxy says"));
    assert!(matches!(ended, Error::OutcomeUnknown { .. }), "{ended:?}");
}

/// A small page comes along with a commit, and with the end of a key; for a large one the handle asks.
#[tokio::test]
async fn a_small_listing_comes_along() {
    let store = Alone::start().await;
    let addresses = vec![store.member.address().unwrap().to_string()];
    let transport = Transport::new(&RaftConfig::remote(addresses.clone())).unwrap();
    let link = Remote::new(transport, addresses);
    let namespace = Namespace::default();
    let list = proto::List {
        prefix: namespace.qualify("/d"),
        limit: 1000,
        ..proto::List::default()
    };
    let names = |page: &proto::Page| page.entries.iter().map(|e| e.key.clone()).collect::<Vec<_>>();
    let listed = async |name: &str, value: &[u8]| {
        let txn = Txn::new().put(&key(name), value.to_vec());
        let command = Command::new(Change::Txn(command::txn_to_proto(&namespace, &txn)));
        let done = (&link as &dyn Link).command_then_list(command, Some(list.clone()), PATIENCE);
        done.await.unwrap().1
    };
    let page = listed("d/a", b"1").await.expect("it is small");
    assert_eq!(names(&page), [namespace.qualify("/d/a")]);

    let once_gone = async |name: &str, created| {
        let gone = Gone {
            namespace: namespace.clone(),
            key: key(name),
            created,
            list: list.clone(),
        };
        link.once_gone(gone, PATIENCE).await.unwrap()
    };
    let page = once_gone("missing", Revision(1)).await;
    assert_eq!(page.as_ref().map(names), Some(vec![namespace.qualify("/d/a")]));

    store.remote.put(&key("d/b"), "1").await.unwrap();
    let created = page.unwrap().entries[0].create_revision;
    let end = async |of: &str| {
        eventually(PATIENCE, || async { store.member.status().watches == 1 }).await;
        assert!(store.remote.delete(&key(of)).await.unwrap());
    };
    let (page, ()) = tokio::join!(once_gone("d/a", Revision(created)), end("d/a"));
    assert_eq!(page.as_ref().map(names), Some(vec![namespace.qualify("/d/b")]));

    let created = page.unwrap().entries[0].create_revision;
    assert_eq!(listed("d/large", &[0; 5000]).await, None);
    let (page, ()) = tokio::join!(once_gone("d/b", Revision(created)), end("d/b"));
    assert_eq!(page, None, "it is large");
    store.stop().await;
}

/// A queue that is longer than the page that comes along: who waits for a lock is not taken for the first because it is in
/// the rest.
#[tokio::test]
async fn a_long_queue_is_in_order() {
    let store = Alone::start().await;
    let lock = store.remote.lock(&key("l"));
    let held = lock.acquire().await.unwrap();
    let (acquired, mut order) = tokio::sync::mpsc::unbounded_channel();
    for waiter in 1..=100 {
        let (watched, lock, acquired) = (&lock, lock.clone(), acquired.clone());
        let waiting = async move {
            let held = lock.acquire().await.unwrap();
            acquired.send((waiter, held.token())).unwrap();
            held.release().await.unwrap();
        };
        tokio::spawn(waiting);
        let entered = || async { watched.contenders().await.unwrap().len() > waiter };
        eventually(PATIENCE, entered).await;
    }
    held.release().await.unwrap();
    let mut last = None;
    for waiter in 1..=100 {
        let (acquired, token) = tokio::time::timeout(PATIENCE, order.recv()).await.unwrap().unwrap();
        assert_eq!(acquired, waiter);
        assert!(last < Some(token));
        last = Some(token);
    }
    store.stop().await;
}

/// Another store at the same address may know the session's number, as another's: what it answers keeps no session alive.
#[test]
fn a_session_is_over_where_another_cluster_answers() {
    let (one, other) = (Some([1; 16]), Some([2; 16]));
    let reply = |outcome| Answer::Reply(command::Reply::from(outcome));
    let done = || Answer::Done(proto::Unit {});
    let mut home = Home::default();
    home.answered(None, one, reply(Outcome::SessionOpened(7))).unwrap();
    for by in [one, None] {
        home.answered(Some(7), by, done()).unwrap();
    }
    assert_eq!(home.ended(), None);
    let kept = home.answered(Some(7), other, done());
    assert!(
        matches!(&kept, Err(Error::SessionExpired { session }) if session.0 == 7),
        "{kept:?}"
    );
    assert_eq!(home.ended().map(|session| session.0), Some(7));
    let written = home.answered(Some(7), other, reply(Outcome::Done(proto::Unit {})));
    assert!(matches!(written, Err(Error::OutcomeUnknown { .. })), "{written:?}");
    let expired = home.answered(Some(7), other, reply(Outcome::SessionExpired(7)));
    assert!(matches!(expired, Ok(Answer::Reply(_))), "{expired:?}");
    // Reads are of the store that there is, and the next session is one of it.
    home.answered(None, other, Answer::Get(proto::GetAnswer::default()))
        .unwrap();
    home.answered(None, other, reply(Outcome::SessionOpened(8))).unwrap();
    home.answered(Some(8), other, done()).unwrap();
    assert_eq!((home.cluster, home.ended()), (other, None));
}

/// An address whose packets are lost takes a part of the time of a call, and the member behind it is reached.
#[tokio::test]
async fn an_address_that_takes_no_connection_leaves_time_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let member = Alone::open(&dir, 0).await;
    // The queue of its listener is full, so that the system drops what comes.
    let listener = tokio::net::TcpSocket::new_v4().unwrap();
    listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = listener.listen(1).unwrap();
    let silent = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(taken) = tokio::time::timeout(Duration::from_millis(300), tokio::net::TcpStream::connect(silent)).await
    {
        queued.push(taken.unwrap());
    }
    let addresses = vec![silent.to_string(), member.address().unwrap().to_string()];
    let transport = Transport::new(&RaftConfig::remote(addresses.clone())).unwrap();
    let remote = Remote::new(transport, addresses.clone());
    let call = remote.call(Call::Status(proto::StatusRequest {}), Duration::from_secs(5));
    call.await.unwrap();
    assert_eq!(remote.endpoint(), addresses[1]);
    // Nor is it gone back to, though it may lead.
    remote.led(hint(&addresses[0]));
    assert_eq!(remote.endpoint(), addresses[1]);
    // A handle opens.
    let options = Options::default();
    let registry = crate::connect(&RaftConfig::remote(addresses), &options).await.unwrap();
    registry.put(&key("a"), "1").await.unwrap();
    registry.close().await.unwrap();
    member.stop().await.unwrap();
}

/// However many calls and watches look for a member at once, also when the caller that began to dial goes on no more.
#[tokio::test]
async fn callers_share_a_connection() {
    let alone = Alone::start().await;
    let address = alone.member.address().unwrap().to_string();
    let remote = Remote::new(Transport::new(&RaftConfig::default()).unwrap(), vec![address]);
    let mut first = Box::pin(remote.connect(PATIENCE));
    assert!(futures_util::poll!(&mut first).is_pending());
    let others = futures_util::future::join_all((0..50).map(|_| remote.connect(PATIENCE))).await;
    let first = first.await.unwrap();
    for other in others {
        assert!(other.unwrap().conversation.is(&first.conversation));
    }
    alone.stop().await;
}

/// The connection was made on a runtime that stops: a wait on another one does not wait for it for ever.
#[test]
fn a_wait_ends_with_the_runtime_of_its_connection() {
    let (one, other) = (
        tokio::runtime::Runtime::new().unwrap(),
        tokio::runtime::Runtime::new().unwrap(),
    );
    let alone = other.block_on(Alone::start());
    let address = alone.member.address().unwrap().to_string();
    let remote = Remote::new(Transport::new(&RaftConfig::default()).unwrap(), vec![address]);
    let reached = one.block_on(remote.connect(PATIENCE)).unwrap();
    other.block_on(async {
        let created = alone.remote.put(&key("a"), "1").await.unwrap();
        let waiting = reached.conversation.once_gone(proto::OnceGone {
            patience_ms: 10_000,
            key: "/registry/a".into(),
            created: created.0,
            list: Some(proto::List {
                prefix: "/registry".into(),
                limit: 1,
                ..proto::List::default()
            }),
        });
        let mut waiting = Box::pin(waiting);
        let begun = tokio::time::timeout(Duration::from_millis(200), &mut waiting).await;
        assert!(begun.is_err(), "{begun:?}");
        one.shutdown_background();
        let ended = tokio::time::timeout(PATIENCE, waiting).await.unwrap();
        assert!(ended.is_err(), "{ended:?}");
        alone.stop().await;
    });
}
