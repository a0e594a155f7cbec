//! What a handle is told, of which anything may be wrong, and in which order a watch hears it.

use futures_util::{FutureExt, StreamExt};
use registry_api::{Error, Expect, Key, Namespace, Revision, Txn, WatchItem};
use registry_tests::Dice;

use super::*;
use crate::bad_input::{EACH, decoded};
use crate::command::{self, Outcome};
use crate::link::failure;
use crate::proto::response::Answer;
use crate::proto::watch_response::Item;
use crate::remote::{Reader, pass_on};

/// What a handle is told: answers of every kind, and the items of a watch.
fn good() -> Vec<Vec<u8>> {
    let unit = proto::Unit {};
    let entry = |key: &str| proto::Entry {
        key: key.into(),
        value: "a value".into(),
        create_revision: 1,
        mod_revision: 2,
        version: 2,
        session: 3,
    };
    let committed = Outcome::Committed(proto::Committed {
        revision: 3,
        changed: vec![true, false],
    });
    let refused = Outcome::Refused(proto::Refused {
        index: 0,
        why: Some(proto::refused::Why::BelowEphemeral("/ns/a".into())),
    });
    let conflict = Outcome::Conflict(proto::Conflict { index: 0, found: 3 });
    let failure = proto::Failure {
        kind: proto::failure::Kind::Compacted.into(),
        text: "why".into(),
        requested: 1,
        oldest: 2,
    };
    let member = proto::MemberStatus {
        name: "a".into(),
        matched: Some(7),
        ..proto::MemberStatus::default()
    };
    let answers = [
        Answer::Get(proto::GetAnswer {
            entry: Some(entry("/ns/a")),
            revision: 3,
        }),
        Answer::Page(proto::Page {
            entries: vec![entry("/ns/a"), entry("/ns/a/b")],
            more: true,
            revision: 3,
        }),
        Answer::Status(proto::StatusAnswer {
            members: vec![member],
            ..proto::StatusAnswer::default()
        }),
        Answer::Reply(committed.into()),
        Answer::Reply(refused.into()),
        Answer::Reply(conflict.into()),
        Answer::Failure(failure),
        Answer::Done(unit),
    ];
    let mut messages = answers.map(|answer| {
        let leader = "h:1".into();
        let answer = Some(answer);
        vec![(1, Some(Tell::Response(proto::Response { leader, answer })))]
    });
    let kinds = [0, 1, 2, 3].map(|kind| proto::Event {
        kind,
        entry: Some(entry("/ns/a")),
        revision: 2 + u64::from(kind.unsigned_abs()),
    });
    let changes = |more| proto::Changes {
        events: kinds.to_vec(),
        more,
    };
    let items = [
        Item::Reset(unit),
        Item::Changes(changes(true)),
        Item::Changes(changes(false)),
        Item::Synced(3),
        Item::Changes(changes(false)),
        Item::Reset(unit),
        Item::Synced(9),
    ];
    let items = items.map(|item| (2, Some(Tell::Item(item.into()))));
    messages[0].extend(items.into_iter().chain([(2, None)]));
    let told = |parts: Vec<(u64, Option<Tell>)>| {
        let told = parts.into_iter().map(|(number, what)| proto::Told {
            number,
            also: vec![2; (number == 1).into()],
            what,
        });
        proto::ToldTogether {
            told: told.collect(),
            cluster: bytes::Bytes::new(),
        }
        .encode_to_vec()
    };
    messages.map(told).to_vec()
}

/// Takes the input for what a handle is told that has asked, and watches: it makes sense, is an error, or is passed over.
fn is_understood(input: &[u8]) -> bool {
    let Some(message) = decoded::<proto::ToldTogether>(input) else {
        return false;
    };
    let (asking, _asked) = mpsc::unbounded_channel();
    let conversation = Conversation {
        asking,
        waiting: Arc::default(),
        cluster: Arc::default(),
    };
    let (once, mut answer) = oneshot::channel();
    conversation.waiting.lock().add(Waiter::Once(once)).unwrap();
    let mut items = conversation.watch(proto::WatchRequest::default()).unwrap();
    message
        .told
        .into_iter()
        .for_each(|told| tell(&conversation.waiting, told));
    conversation.waiting.lock().end(gone());

    let namespace = Namespace::parse("/ns").unwrap();
    let (feed, watch) = registry_api::watch::feed();
    let passed_on = async {
        let reader = Reader::new(namespace.clone(), feed, Some(Revision::default()));
        let passed_on = pass_on(&Arc::new(Mutex::new(reader)), &mut items).await;
        (passed_on, watch.count().await)
    };
    let (passed_on, heard) = passed_on.now_or_never().expect("nothing is waited for");
    let Ok(Ok(response)) = answer.try_recv() else {
        return passed_on.is_ok() && heard > 0;
    };
    match response.answer {
        Some(Answer::Get(proto::GetAnswer { entry: Some(entry), .. })) => command::entry(&namespace, &entry).is_ok(),
        Some(Answer::Page(page)) => {
            let entries = page.entries.into_iter();
            entries
                .map(|entry| command::entry(&namespace, &entry))
                .all(|entry| entry.is_ok())
        }
        Some(Answer::Reply(reply)) => reply.result.is_some_and(|outcome| {
            let key = Key::parse("/a").unwrap();
            let txn = Txn::new().when(&key, Expect::Absent).put(&key, "1");
            let result = command::txn_result(&namespace, &txn, outcome);
            !matches!(result, Err(Error::OutcomeUnknown { .. }))
        }),
        Some(Answer::Failure(said)) => !failure(said).to_string().is_empty(),
        Some(Answer::Status(status)) => crate::status::Status::from(status).leader().is_none(),
        answer => answer.is_some(),
    }
}

/// A key that is created at revision 5, as all of what belongs together or with more of it to come.
fn part(key: &str, more: bool) -> Item {
    let created = proto::Event {
        kind: proto::event::Kind::Created.into(),
        entry: Some(proto::Entry {
            key: key.into(),
            create_revision: 5,
            mod_revision: 5,
            ..proto::Entry::default()
        }),
        revision: 5,
    };
    let events = vec![created];
    Item::Changes(proto::Changes { events, more })
}

/// What a reader is told who knows of all up to a revision, or of nothing, by streams that break one after the other.
fn told_by<const N: usize>(knows: Option<Revision>, streams: [Vec<Item>; N]) -> Vec<WatchItem> {
    let (feed, watch) = registry_api::watch::feed();
    let reader = Reader::new(Namespace::parse("/ns").unwrap(), feed, knows);
    let reader = Arc::new(Mutex::new(reader));
    for parts in streams {
        let conversation = Conversation {
            asking: mpsc::unbounded_channel().0,
            waiting: Arc::default(),
            cluster: Arc::default(),
        };
        let mut items = conversation.watch(proto::WatchRequest::default()).unwrap();
        for part in parts {
            let what = Some(Tell::Item(part.into()));
            let (number, also) = (1, Vec::new());
            tell(&conversation.waiting, proto::Told { number, also, what });
        }
        conversation.waiting.lock().end(gone());
        let passed_on = pass_on(&reader, &mut items).now_or_never();
        passed_on.expect("nothing is waited for").unwrap();
    }
    drop(reader);
    let items = watch.map(Result::unwrap).collect().now_or_never();
    items.expect("the feed is gone")
}

/// The stream breaks between two parts of what belongs together: the next one's whole is told, once. Of a key that the watch
/// does not know, nothing else says that its end was told before.
#[test]
fn a_part_is_told_with_the_rest_of_it() {
    let end_of_a = || {
        let Item::Changes(mut changes) = part("/ns/a", true) else {
            unreachable!("a part is changes");
        };
        changes.events[0].kind = proto::event::Kind::Deleted.into();
        Item::Changes(changes)
    };
    let broken = vec![end_of_a()];
    let whole = vec![end_of_a(), part("/ns/b", false)];
    let told = told_by(Some(Revision(4)), [broken, whole]);
    assert!(
        matches!(&told[..], [WatchItem::Changes(events)] if events.len() == 2),
        "{told:?}"
    );
}

/// A member that was slow to pass on its events marks what the watch has reported before: after a break it goes on from the
/// newest.
#[test]
fn an_old_mark_takes_a_watch_back_nowhere() {
    let gone = |kind: proto::event::Kind| {
        let deleted = proto::Event {
            kind: kind.into(),
            entry: Some(proto::Entry {
                key: "/ns/a".into(),
                create_revision: 5,
                mod_revision: 5,
                ..proto::Entry::default()
            }),
            revision: 7,
        };
        let events = vec![deleted];
        Item::Changes(proto::Changes { events, more: false })
    };
    let deleted = gone(proto::event::Kind::Deleted);
    let (feed, _watch) = registry_api::watch::feed();
    let mut reader = Reader::new(Namespace::parse("/ns").unwrap(), feed, Some(Revision(4)));
    reader.begin();
    for item in [part("/ns/a", false), deleted, Item::Synced(4)] {
        assert!(reader.take(&item.into()));
    }
    assert_eq!(reader.reported(), Some(Revision(7)));
}

/// Also of what it was about to be told.
#[test]
fn a_reset_leaves_nothing_of_what_was_told_before_it() {
    let unit = proto::Unit {};
    let again = vec![
        part("/ns/a", false),
        Item::Reset(unit),
        part("/ns/b", false),
        Item::Synced(5),
    ];
    let told = told_by(None, [Vec::new(), again]);
    assert!(
        matches!(&told[..], [WatchItem::Reset, WatchItem::Changes(events), WatchItem::Synced(_)]
            if events.len() == 1 && events[0].key().as_str() == "/b"),
        "{told:?}"
    );
}

#[test]
fn what_is_told_makes_sense_or_is_an_error_or_passed_over() {
    Dice::damage_each(&good(), EACH, is_understood);
    bolero::check!(name = "told")
        .with_iterations(1_000)
        .for_each(|input: &[u8]| {
            is_understood(input);
        });
}
