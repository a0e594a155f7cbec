use std::time::Duration;

use registry_api::{Key, Options, Registry};
use registry_tests::Dice;
use registry_tests::cluster::{eventually, within};
use tempfile::TempDir;

use futures_util::StreamExt;
use tokio::sync::watch;

use super::answering::{WATCHES, answer_unless};
use super::*;
use crate::bad_input::EACH;
use crate::config::RaftConfig;
use crate::founding::Door;
use crate::member::Member;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::proto::watch_response::Item;
use crate::service::Service;
use crate::transport::Transport;

const PATIENCE: Duration = Duration::from_secs(20);

struct Spoken {
    _dir: TempDir,
    member: Member,
    registry: Arc<dyn Registry>,
    conversation: Conversation,
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
        let transport = Transport::new(&RaftConfig::default()).unwrap();
        let address = member.address().unwrap().to_string();
        let channel = transport.dial(&address, PATIENCE).await.unwrap();
        Self {
            _dir: dir,
            member,
            registry,
            conversation: Conversation::begin(channel),
        }
    }

    /// What the member says of a key.
    async fn get(&self, key: &str) -> Result<Option<Answer>, Status> {
        let get = proto::Get {
            key: format!("/registry{key}"),
            ..proto::Get::default()
        };
        let request = proto::Request {
            patience_ms: 10_000,
            forwarded: false,
            header: None,
            call: Some(Call::Get(get)),
        };
        within(PATIENCE, self.conversation.ask(request))
            .await
            .map(|told| told.answer)
    }

    fn watch(&self) -> Items {
        let request = proto::WatchRequest {
            prefix: "/registry/a".into(),
            ..proto::WatchRequest::default()
        };
        self.conversation.watch(request).unwrap()
    }

    /// A conversation without a connection: what is asked, and what is told when the test takes it. It ends when nothing
    /// was taken for so long.
    fn directly(&self, deaf: Duration) -> (Asking, impl Stream<Item = Result<proto::ToldTogether, Status>> + use<>) {
        let transport = Transport::new(&RaftConfig::default()).unwrap();
        let door = Door::new(1, "a", &Default::default(), transport);
        door.open(self.member.core());
        let (stop, stopping) = watch::channel(false);
        let service = Service {
            door,
            stopping: stopping.clone(),
        };
        let (asking, mut asked) = mpsc::unbounded_channel();
        let asked = stream::poll_fn(move |context| asked.poll_recv(context));
        let told = answer_unless(service, asked, stopping, deaf);
        (Asking { asking, _stop: stop }, told)
    }

    /// Waits for the end of a key.
    async fn once_gone(&self, key: &str) -> Result<Option<Answer>, Status> {
        let list = proto::List {
            prefix: "/registry/a".into(),
            limit: 10,
            ..proto::List::default()
        };
        let gone = proto::OnceGone {
            patience_ms: 10_000,
            key: format!("/registry{key}"),
            created: u64::MAX,
            list: Some(list),
        };
        self.conversation.once_gone(gone).await.map(|told| told.answer)
    }

    fn waiters(&self) -> usize {
        self.conversation.waiting.lock().waiters.len()
    }
}

struct Asking {
    asking: mpsc::UnboundedSender<Result<proto::AskedTogether, Status>>,
    _stop: watch::Sender<bool>,
}

impl Asking {
    fn ask(&self, parts: impl IntoIterator<Item = proto::Asked>) {
        let asked = parts.into_iter().collect();
        self.asking.send(Ok(proto::AskedTogether { asked })).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_question_gets_its_own_answer() {
    let spoken = Spoken::start().await;
    for n in 0..50 {
        let key = Key::parse(&format!("/k/{n}")).unwrap();
        spoken.registry.put(&key, n.to_string()).await.unwrap();
    }
    // More at once than are worked on at once, some of them with large answers, others dropped halfway.
    spoken
        .registry
        .put(&Key::parse("/k/large").unwrap(), vec![7; 300_000])
        .await
        .unwrap();
    let spoken = &spoken;
    let asked = (0..3_000_usize).map(|n| async move {
        if n % 100 == 1 {
            let get = spoken.get("/k/large");
            drop(tokio::time::timeout(Duration::from_micros(n as u64), get).await);
            return;
        }
        let n = n % 50;
        match spoken.get(&format!("/k/{n}")).await.unwrap() {
            Some(Answer::Get(proto::GetAnswer { entry: Some(entry), .. })) => assert_eq!(entry.value, n.to_string()),
            other => panic!("{other:?}"),
        }
    });
    futures_util::future::join_all(asked).await;
    assert_eq!(spoken.waiters(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_question_is_answered_and_spoils_no_other() {
    let spoken = Spoken::start().await;
    let answer = spoken.get("/../a").await.unwrap();
    assert!(matches!(answer, Some(Answer::Failure(said)) if said.kind() == proto::failure::Kind::Invalid));
    assert!(matches!(spoken.get("/a").await, Ok(Some(Answer::Get(_)))));
    let unknown = proto::Request::default();
    let answer = within(PATIENCE, spoken.conversation.ask(unknown)).await.unwrap().answer;
    assert!(matches!(answer, Some(Answer::Failure(said)) if said.kind() == proto::failure::Kind::Invalid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_on_the_member_when_nobody_reads_it_any_more() {
    let spoken = Spoken::start().await;
    let mut watches: Vec<_> = (0..10).map(|_| spoken.watch()).collect();
    for items in &mut watches {
        assert_eq!(within(PATIENCE, items.message()).await.unwrap().unwrap().item, None);
    }
    assert_eq!(spoken.member.status().watches, 10);
    let kept = watches.pop();
    drop(watches);
    eventually(PATIENCE, || async { spoken.member.status().watches == 1 }).await;
    assert_eq!(spoken.waiters(), 1);
    // With the conversation, whatever is left of it ends.
    let Spoken {
        member, conversation, ..
    } = spoken;
    drop((kept, conversation));
    eventually(PATIENCE, || async { member.status().watches == 0 }).await;
}

/// More than one message has room for, which are told the same, and some that are told less.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_many_watches_is_told_each_change_once() {
    const CHANGES: u64 = 50;
    let spoken = Spoken::start().await;
    let spoken = &spoken;
    let watches = (0..600).map(|n| async move {
        let prefix = if n % 7 == 0 { "/registry/w/a" } else { "/registry/w" };
        let request = proto::WatchRequest {
            prefix: prefix.into(),
            scope: proto::watch_request::Scope::Subtree.into(),
            from: Some(proto::watch_request::From::Now(proto::Unit {})),
        };
        let mut items = spoken.conversation.watch(request).unwrap();
        while !matches!(items.message().await.unwrap().unwrap().item, Some(Item::Synced(_))) {}
        let mut told = Vec::new();
        while told.last() != Some(&CHANGES) {
            match items.message().await.unwrap().unwrap().item {
                Some(Item::Changes(changes)) => told.extend(changes.events.iter().map(|event| {
                    let value = &event.entry.as_ref().unwrap().value;
                    std::str::from_utf8(value).unwrap().parse::<u64>().unwrap()
                })),
                other => panic!("{other:?}"),
            }
        }
        (n, told)
    });
    let change = async {
        eventually(PATIENCE, || async { spoken.member.status().watches == 600 }).await;
        for n in 1..=CHANGES {
            let name = if n % 5 == 0 { "/w/a" } else { "/w/b" };
            spoken
                .registry
                .put(&Key::parse(name).unwrap(), n.to_string())
                .await
                .unwrap();
        }
    };
    let (told, ()) = within(
        PATIENCE,
        futures_util::future::join(futures_util::future::join_all(watches), change),
    )
    .await;
    for (n, told) in told {
        let all: Vec<_> = (1..=CHANGES).filter(|change| n % 7 > 0 || *change % 5 == 0).collect();
        assert_eq!(told, all, "watch {n}");
    }
}

/// What else is in flight on the stream gets its response.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_too_large_is_refused_before_it_is_sent() {
    let spoken = Spoken::start().await;
    let watch = spoken.watch();
    let get = proto::Get {
        key: "k".repeat(crate::transport::MAX_MESSAGE),
        ..proto::Get::default()
    };
    let request = proto::Request {
        call: Some(Call::Get(get)),
        ..proto::Request::default()
    };
    let refused = within(PATIENCE, spoken.conversation.ask(request)).await.unwrap().answer;
    assert!(
        matches!(&refused, Some(Answer::Failure(said)) if said.kind() == proto::failure::Kind::Invalid),
        "{refused:?}"
    );
    assert!(!spoken.conversation.has_ended());
    assert!(matches!(spoken.get("/a").await, Ok(Some(Answer::Get(_)))));
    drop(watch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_on_the_member_when_nobody_waits_any_more() {
    let spoken = Spoken::start().await;
    let key = Key::parse("/a").unwrap();
    spoken.registry.put(&key, "1").await.unwrap();
    let watches = async |many| eventually(PATIENCE, || async { spoken.member.status().watches == many }).await;
    for _ in 0..10 {
        tokio::select! {
            answer = spoken.once_gone("/a") => panic!("{answer:?}"),
            () = watches(1) => {}
        }
        watches(0).await;
    }
    let end = async {
        watches(1).await;
        spoken.registry.delete(&key).await.unwrap()
    };
    let (answer, _) = tokio::join!(within(PATIENCE, spoken.once_gone("/a")), end);
    assert!(matches!(answer, Ok(Some(Answer::Page(_)))), "{answer:?}");
    watches(0).await;
    assert_eq!(spoken.waiters(), 0);
    let bad = within(PATIENCE, spoken.once_gone("/a/../b")).await;
    assert!(matches!(bad, Ok(Some(Answer::Failure(_)))), "{bad:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_member_stops_everybody_is_told_and_it_waits_for_nobody() {
    let spoken = Spoken::start().await;
    let mut items = spoken.watch();
    within(PATIENCE, items.message()).await.unwrap().unwrap();
    let Spoken {
        _dir: dir,
        member,
        registry,
        conversation,
    } = spoken;
    assert!(!conversation.has_ended());
    member.stop().await.unwrap();
    let last = async { while let Ok(Some(_)) = items.message().await {} };
    within(PATIENCE, last).await;
    eventually(PATIENCE, || async { conversation.has_ended() }).await;
    let refused = within(PATIENCE, conversation.ask(proto::Request::default())).await;
    // It came to its end, and was not cut off with those who are still there when the member's patience is over.
    assert_eq!(refused.unwrap_err().message(), gone().message());
    assert!(conversation.watch(proto::WatchRequest::default()).is_err());
    drop((registry, dir));
}

/// The part of a message that is about one question.
fn asked(number: u64, what: Ask) -> proto::Asked {
    let what = Some(what);
    proto::Asked { number, what }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_was_asked_the_next_is_answered() {
    let spoken = Spoken::start().await;
    let get = Call::Get(proto::Get {
        key: "/registry/a".into(),
        ..proto::Get::default()
    });
    let request = proto::Request {
        patience_ms: 1_000,
        forwarded: false,
        header: None,
        call: Some(get),
    };
    let watch = proto::WatchRequest {
        prefix: "/registry/a".into(),
        scope: 1,
        ..proto::WatchRequest::default()
    };
    let parts = [
        Ask::Request(request.into()),
        Ask::Watch(watch.into()),
        Ask::Cancel(proto::Unit {}),
    ];
    let message = proto::AskedTogether {
        asked: (0..)
            .map(|n| n / 2)
            .zip(parts)
            .map(|(number, what)| asked(number, what))
            .collect(),
    };
    Dice::damage_each(&[message.encode_to_vec()], EACH, |message| {
        let Ok(message) = proto::AskedTogether::decode(message) else {
            return false;
        };
        let understood = message.asked.iter().all(|asked| asked.what.is_some());
        for asked in message.asked {
            spoken.conversation.asking.send(asked).unwrap();
        }
        understood
    });
    // A number that none of them had.
    spoken.conversation.waiting.lock().next = 1 << 50;
    assert!(matches!(spoken.get("/a").await, Ok(Some(Answer::Get(_)))));
}

/// Two bytes of a message are one of them.
#[test]
fn an_empty_question_takes_little_memory() {
    assert!(size_of::<proto::Asked>() <= 32);
}

fn watch_of(key: &str) -> Ask {
    Ask::Watch(
        proto::WatchRequest {
            prefix: format!("/registry{key}"),
            ..proto::WatchRequest::default()
        }
        .into(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_nothing_is_told_nothing_any_more_and_others_are() {
    let spoken = Spoken::start().await;
    let (deaf, changing) = (Duration::from_secs(2), Key::parse("/w").unwrap());
    let (silent, _never_taken) = spoken.directly(deaf);
    let (living, mut told) = spoken.directly(deaf);
    for asking in [&silent, &living] {
        asking.ask([asked(1, watch_of("/w"))]);
    }
    let (hear, mut heard) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(together)) = told.next().await {
            for told in together.told {
                let Some(Tell::Item(proto::WatchResponse {
                    item: Some(Item::Changes(changes)),
                    ..
                })) = told.what
                else {
                    continue;
                };
                for event in changes.events {
                    // The test may have ended.
                    let _ = hear.send(event.entry.unwrap().value);
                }
            }
        }
    });
    eventually(PATIENCE, || async { spoken.member.status().watches == 2 }).await;
    // More than may wait.
    within(PATIENCE, async {
        let mut value = 0_u8;
        while spoken.member.status().watches == 2 {
            value = value.wrapping_add(1);
            spoken.registry.put(&changing, vec![value; 900_000]).await.unwrap();
        }
    })
    .await;
    // The other has nothing to take for as long, and goes on.
    tokio::time::sleep(3 * deaf).await;
    assert_eq!(spoken.member.status().watches, 1);
    spoken.registry.put(&changing, "last").await.unwrap();
    while within(PATIENCE, heard.recv()).await.unwrap() != "last" {}
    // Whoever asks in vain is left alone too.
    assert!(silent.asking.is_closed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_watch_too_many_is_refused_and_ends_no_other() {
    let spoken = Spoken::start().await;
    let begun = async |mut items: Items| match within(PATIENCE, items.message()).await.unwrap() {
        Some(proto::WatchResponse { item: None, .. }) => Some(items),
        Some(proto::WatchResponse {
            item: Some(Item::Failure(said)),
            ..
        }) => {
            assert_eq!(said.kind(), proto::failure::Kind::Invalid);
            assert_eq!(items.message().await.unwrap(), None);
            None
        }
        other => panic!("{other:?}"),
    };
    let mut watches = Vec::new();
    for _ in 0..WATCHES {
        watches.push(begun(spoken.watch()).await.unwrap());
    }
    assert!(begun(spoken.watch()).await.is_none());
    let refused = within(PATIENCE, spoken.once_gone("/missing")).await;
    assert!(matches!(refused, Ok(Some(Answer::Failure(said))) if said.kind() == proto::failure::Kind::Invalid));
    assert_eq!(spoken.member.status().watches, WATCHES as u64);
    watches.pop();
    // One that ends leaves its place to the next, as one that is cancelled does.
    for _ in 0..3 {
        let answered = || async { matches!(spoken.once_gone("/missing").await, Ok(Some(Answer::Page(_)))) };
        eventually(PATIENCE, answered).await;
    }
    eventually(PATIENCE, || async { begun(spoken.watch()).await.is_some() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_given_twice_is_the_later_watchs() {
    let spoken = Spoken::start().await;
    let (asking, _told) = spoken.directly(PATIENCE);
    for _ in 0..100 {
        asking.ask((0..50).map(|_| asked(7, watch_of("/w"))));
    }
    asking.ask([asked(8, watch_of("/w"))]);
    eventually(PATIENCE, || async { spoken.member.status().watches == 2 }).await;
    asking.ask([asked(7, Ask::Cancel(proto::Unit {}))]);
    eventually(PATIENCE, || async { spoken.member.status().watches == 1 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_no_handle_makes_ends_the_conversation() {
    let spoken = Spoken::start().await;
    let (asking, told) = spoken.directly(PATIENCE);
    asking.ask((0..=TOGETHER as u64).map(|number| asked(number, watch_of("/w"))));
    assert_eq!(within(PATIENCE, told.collect::<Vec<_>>()).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_answer_that_nobody_takes_is_read_again_when_somebody_does() {
    const LARGE: usize = 300_000;
    const ASKED: u64 = 100;
    let spoken = Spoken::start().await;
    let key = Key::parse("/a").unwrap();
    spoken.registry.put(&key, vec![1; LARGE]).await.unwrap();
    let (asking, mut told) = spoken.directly(PATIENCE);
    let get = || {
        Ask::Request(
            proto::Request {
                patience_ms: 10_000,
                forwarded: false,
                header: None,
                call: Some(Call::Get(proto::Get {
                    key: "/registry/a".into(),
                    ..proto::Get::default()
                })),
            }
            .into(),
        )
    };
    asking.ask((0..ASKED).map(|number| asked(number, get())));
    // Long enough for all to be read once; a test that is too quick for that shows less, and fails no more.
    tokio::time::sleep(Duration::from_millis(500)).await;
    spoken.registry.put(&key, vec![2; LARGE]).await.unwrap();
    let (mut old, mut new) = (0, 0);
    while old + new < ASKED {
        for told in within(PATIENCE, told.next()).await.unwrap().unwrap().told {
            match told.what {
                Some(Tell::Response(proto::Response {
                    answer: Some(Answer::Get(got)),
                    ..
                })) => match got.entry.unwrap().value[0] {
                    1 => old += 1,
                    _ => new += 1,
                },
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(
        old * LARGE as u64 <= 5 << 20,
        "{old} answers were held while nobody took them"
    );
}
