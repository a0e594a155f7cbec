//! Whatever comes over the network makes nothing panic: what can't be understood is refused, and what was taken can be
//! said again, applied by every member, stored and read back.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openraft::EntryPayload;
use prost::Message;
use registry_tests::Dice;

use crate::command::{Change, Command, Outcome};
use crate::log::Identity;
use crate::proto::asked::What as Ask;
use crate::proto::registry::log::v1 as log;
use crate::proto::registry::peer::v1 as peer;
use crate::proto::request::Call;
use crate::snapshot::{self, Frozen};
use crate::state::State;
use crate::types::SnapshotMeta;
use crate::{peers, proto, service, wire};

/// How many damaged inputs there are of each kind.
pub(crate) const EACH: u64 = 20_000;
const UNIT: proto::Unit = proto::Unit {};
const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};

/// What is held at once for an input is in proportion to it, whatever it says of itself.
pub(crate) fn in_proportion<T>(input: &[u8], take: impl FnOnce() -> T) -> T {
    let mut taken = None;
    let held = allocation_counter::measure(|| taken = Some(take())).bytes_max;
    let most = (64 << 10) + 512 * input.len() as u64;
    assert!(held <= most, "{held} bytes were held for {}", input.len());
    taken.expect("it was measured")
}

/// The message, if it is one. Said again it is the same.
pub(crate) fn decoded<M: Message + Default + PartialEq + fmt::Debug>(input: &[u8]) -> Option<M> {
    let message = in_proportion(input, || M::decode(input)).ok()?;
    assert!(
        M::decode(&*message.encode_to_vec()).as_ref() == Ok(&message),
        "{message:?}"
    );
    Some(message)
}

fn operation(key: &str, ephemeral: bool, take_over: bool) -> proto::Operation {
    let value = "a value".into();
    proto::Operation {
        key: key.into(),
        write: Some(proto::operation::Write::Put(proto::Put {
            value,
            ephemeral,
            take_over,
        })),
    }
}

fn txn(operations: Vec<proto::Operation>) -> Change {
    let conditions = Vec::new();
    Change::Txn(proto::Txn { conditions, operations })
}

fn commands() -> Vec<Command> {
    let delete = proto::Operation {
        key: "/ns/a".into(),
        write: Some(proto::operation::Write::Delete(UNIT)),
    };
    let conditions = [
        proto::condition::Expect::Absent(UNIT),
        proto::condition::Expect::ModRevision(3),
        proto::condition::Expect::Childless(UNIT),
    ];
    let conditions = conditions.map(|expect| proto::Condition {
        key: "/ns/a".into(),
        expect: Some(expect),
    });
    let changes = [
        Change::Open(proto::OpenSession {
            ttl_ms: 10_000,
            first: 0,
        }),
        Change::Close(proto::CloseSession { session: 3 }),
        Change::DeletePrefix("/ns/a".into()),
        Change::Mark(UNIT),
        txn(vec![operation("/ns/a/b", false, true)]),
        txn(vec![operation("/ns/a", true, false), operation("/ns/c/d", true, true)]),
        Change::Txn(proto::Txn {
            conditions: conditions.to_vec(),
            operations: vec![delete, operation("/ns~/lock/1/a/x", true, false)],
        }),
    ];
    let command = |(number, change)| Command {
        // A mark is of no session.
        session: if matches!(change, Change::Mark(_)) {
            0
        } else {
            number % 3
        },
        sequence: number,
        answered_below: number.saturating_sub(2),
        level: 0,
        change: Some(change),
    };
    (1..).zip(changes).map(command).collect()
}

fn questions() -> Vec<Ask> {
    let key = || "/ns/a/b".to_owned();
    let calls = [
        Call::Get(proto::Get {
            key: key(),
            stale: true,
            at_least: 7,
        }),
        Call::List(proto::List {
            prefix: key(),
            limit: 10,
            after: "/ns/a/b/c".into(),
            ..proto::List::default()
        }),
        Call::Children(proto::Children {
            prefix: "/ns".into(),
            from: "c".into(),
            ..proto::Children::default()
        }),
        Call::Count(proto::Count {
            prefix: "/ns~/lock".into(),
            ..proto::Count::default()
        }),
        Call::KeepAlive(proto::KeepAlive { session: 3 }),
        Call::Status(proto::StatusRequest {}),
        Call::Digest(proto::DigestRequest { index: u64::MAX / 3 }),
        Call::ReadIndex(peer::ReadIndexRequest {
            header: IDENTITY.header(2),
            term: Some(u64::MAX),
        }),
        Call::Promise(peer::PromiseRequest {
            header: IDENTITY.header(2),
        }),
        Call::Members(proto::ChangeMembers {
            name: "a".into(),
            address: "h:1".into(),
            ..proto::ChangeMembers::default()
        }),
    ];
    let list = proto::List {
        prefix: "/ns~/lock".into(),
        children_only: true,
        limit: 7,
        ..proto::List::default()
    };
    let then_list = |command| {
        Call::CommandThenList(proto::CommandThenList {
            command: Some(command),
            list: Some(list.clone()),
        })
    };
    let calls = calls.into_iter().chain(commands().into_iter().map(Call::Command));
    let calls = calls.chain(commands().into_iter().take(1).map(then_list));
    let request = |call| {
        Ask::Request(
            proto::Request {
                patience_ms: 1000,
                forwarded: false,
                header: None,
                call: Some(call),
            }
            .into(),
        )
    };
    let watch = |from| {
        Ask::Watch(
            proto::WatchRequest {
                prefix: "/ns/a".into(),
                scope: 1,
                from: Some(from),
            }
            .into(),
        )
    };
    let once_gone = proto::OnceGone {
        patience_ms: 1000,
        key: key(),
        created: 7,
        list: Some(list.clone()),
    };
    let watches = [
        watch(proto::watch_request::From::Now(UNIT)),
        watch(proto::watch_request::From::AfterOrReset(u64::MAX)),
        Ask::OnceGone(once_gone.into()),
    ];
    calls.map(request).chain(watches).collect()
}

/// What handles ask: each question for itself, and all together.
fn asked() -> Vec<Vec<u8>> {
    let asked = (0..).zip(questions()).map(|(number, what)| {
        let what = Some(what);
        proto::Asked { number, what }
    });
    let asked: Vec<_> = asked.collect();
    let alone = asked.iter().map(|one| vec![one.clone()]);
    let together = |asked| proto::AskedTogether { asked }.encode_to_vec();
    alone.chain([asked.clone()]).map(together).collect()
}

/// Takes the input for what handles ask. What is not refused can be applied, and a second time does nothing; the state that
/// it leaves can be stored and read back.
fn is_answered(input: &[u8]) -> bool {
    let Some(message) = decoded::<proto::AskedTogether>(input) else {
        return false;
    };
    let mut state = State::default();
    state.apply(
        1,
        Command::new(Change::Open(proto::OpenSession {
            ttl_ms: 10_000,
            first: 0,
        })),
    );
    state.apply(1, Command::new(txn(vec![operation("/ns/a", false, false)])));
    let mut answered = false;
    for asked in message.asked {
        answered |= match asked.what {
            Some(Ask::Request(request)) => request.call.is_some_and(|call| {
                let good = service::check(&call).is_ok();
                match call {
                    Call::Command(command) if good => apply_twice(&mut state, command),
                    Call::CommandThenList(both) if good => apply_twice(&mut state, both.command.unwrap()),
                    _ => {}
                }
                good
            }),
            Some(Ask::Watch(request)) => service::watch_request(*request.clone()).is_ok_and(|(namespace, taken)| {
                assert_eq!(namespace.qualify(taken.prefix.as_str()), request.prefix);
                true
            }),
            Some(Ask::OnceGone(gone)) => service::wait(*gone.clone()).is_ok_and(|taken| {
                assert_eq!(taken.namespace.qualify(taken.key.as_str()), gone.key);
                true
            }),
            Some(Ask::Cancel(_)) | None => false,
        }
    }
    let mut file = Vec::new();
    snapshot::write(&mut file, &IDENTITY, &Frozen::of(&state, SnapshotMeta::default())).unwrap();
    let mut records = Vec::new();
    let read = snapshot::read(&*file, |record| records.push(Arc::new(record))).unwrap();
    assert!(state.tree.from("").eq(records.iter()));
    assert_eq!(read.sessions.len(), state.sessions.len());
    answered
}

fn apply_twice(state: &mut State, command: Command) {
    let again = command.clone();
    let (session, sequence) = (command.session, command.sequence);
    let reply = state.apply(1, command).reply;
    let closes = matches!(&again.change, Some(Change::Close(close)) if close.session == session);
    if session > 0 && !closes && state.sessions.contains_key(&session) && reply.result.is_some() {
        let held = state.revision;
        let crowded = matches!(reply.result, Some(Outcome::Crowded(_)));
        let repeated = state.apply(1, again);
        assert!(
            crowded || repeated.changes.is_empty(),
            "{session} {sequence} happened twice"
        );
        assert_eq!(state.revision, held);
    }
}

#[test]
fn a_request_that_is_taken_can_be_applied_stored_and_read_back() {
    Dice::damage_each(&asked(), EACH, is_answered);
    bolero::check!(name = "asked")
        .with_iterations(1_000)
        .for_each(|input: &[u8]| {
            is_answered(input);
        });
}

/// What members say to each other.
fn said() -> Vec<Vec<u8>> {
    let header = IDENTITY.header(1);
    // Numbers of many bytes, for a fuzzer to change.
    let far = u64::MAX / 3;
    let id = Some(log::LogId { term: 2, index: far });
    let vote = Some(log::Vote {
        term: 2,
        node: 1,
        committed: true,
    });
    let membership = log::Membership {
        configs: vec![log::Voters { members: vec![1, 2] }],
        nodes: [1, 2]
            .map(|id| log::Node {
                id,
                name: "a".into(),
                address: "h:1".into(),
            })
            .to_vec(),
    };
    let payloads = [
        None,
        Some(log::entry::Payload::Normal(commands()[4].encode_to_vec().into())),
        Some(log::entry::Payload::Membership(membership.clone())),
    ];
    let append = peer::AppendRequest {
        header: header.clone(),
        vote,
        previous: id,
        entries: (far + 1..)
            .zip(payloads)
            .map(|(index, payload)| log::Entry {
                id: Some(log::LogId { term: 2, index }),
                payload,
            })
            .collect(),
        committed: id,
    };
    let appended = peer::AppendAnswer {
        header: header.clone(),
        matched: id,
        ..peer::AppendAnswer::default()
    };
    let asks_for_a_vote = peer::VoteRequest {
        header: header.clone(),
        vote,
        last: id,
        leadership_transfer: true,
    };
    let votes = peer::VoteAnswer {
        header: header.clone(),
        vote,
        granted: true,
        last: id,
    };
    let head = peer::SnapshotHead {
        header,
        vote,
        last: id,
        membership: Some(membership.clone()),
        membership_log_id: id,
    };
    let greeting = peer::Greeting {
        cluster: vec![7; 16].into(),
        id: 1,
        name: "a".into(),
        list: [("a".to_owned(), "h:1".to_owned())].into(),
        membership: Some(membership),
        membership_log_id: id,
        proposed: vec![3; 16].into(),
        removed: true,
        address: "h:1".into(),
    };
    [
        append.encode_to_vec(),
        appended.encode_to_vec(),
        asks_for_a_vote.encode_to_vec(),
        votes.encode_to_vec(),
        head.encode_to_vec(),
        greeting.encode_to_vec(),
    ]
    .to_vec()
}

/// Takes the input for each message of members: nothing in it says which it is. What is not refused is the same when it is
/// said again.
fn is_heard(input: &[u8]) -> bool {
    let from = |header: &Option<peer::Header>| IDENTITY.check(header.as_ref()).ok();
    let append = decoded::<peer::AppendRequest>(input).is_some_and(|request| {
        let (header, from) = (request.header.clone(), from(&request.header));
        let taken = |request| from.and_then(|from| peers::append_from(request, from).ok());
        taken(request.clone()).is_some_and(|understood| {
            let again = peers::append_to(header.clone(), &understood);
            // Members may be named in another order, or twice.
            let is_plain = |entry: &log::Entry| !matches!(entry.payload, Some(log::entry::Payload::Membership(_)));
            assert!(again == request || !request.entries.iter().all(is_plain), "{request:?}");
            assert_eq!(peers::append_to(header, &taken(again.clone()).unwrap()), again);
            for entry in &understood.entries {
                if let EntryPayload::Normal(proposal) = &entry.payload {
                    // One that can't be decoded is an error of the state machine, not a panic.
                    let _ = proposal.decode().map(|command| State::default().apply(2, command));
                }
            }
            true
        })
    });
    let vote_request = decoded::<peer::VoteRequest>(input).is_some_and(|request| {
        let taken = from(&request.header).and_then(|from| peers::vote_request_from(request.clone(), from).ok());
        taken.is_some_and(|taken| {
            assert_eq!(peers::vote_request_to(request.header.clone(), &taken), request);
            true
        })
    });
    let vote_answer = decoded::<peer::VoteAnswer>(input).is_some_and(|answer| {
        let taken = from(&answer.header).and_then(|_| peers::vote_answer_from(answer.clone()).ok());
        taken.is_some_and(|taken| {
            assert_eq!(peers::vote_answer_to(answer.header.clone(), &taken), answer);
            true
        })
    });
    let appended = decoded::<peer::AppendAnswer>(input).is_some_and(|answer| {
        let silence = Duration::from_millis(answer.silence_ms.into());
        let again = peers::appended_to(answer.header.clone(), &peers::appended_from(answer.clone()), silence);
        let said = [
            answer.matched.is_some(),
            answer.conflict.is_some(),
            answer.higher_vote.is_some(),
        ];
        // One that contradicts itself is the worst that it says.
        assert!(
            again == answer || said.map(u8::from).iter().sum::<u8>() > 1,
            "{answer:?}"
        );
        from(&answer.header).is_some()
    });
    let head = decoded::<peer::SnapshotHead>(input).is_some_and(|head| {
        let from = from(&head.header);
        from.is_some_and(|from| peers::snapshot_head_from(head, from).is_ok())
    });
    let greeting = decoded::<peer::Greeting>(input).is_some_and(|greeting| {
        greeting
            .membership
            .is_some_and(|membership| wire::membership_from(membership).is_ok())
    });
    // Nothing is read of these but their fields.
    decoded::<peer::Admission>(input);
    decoded::<peer::SnapshotPart>(input);
    decoded::<peer::SnapshotAnswer>(input);
    decoded::<peer::TransferRequest>(input);
    decoded::<peer::TransferAnswer>(input);
    decoded::<peer::ReadIndexRequest>(input);
    decoded::<peer::ReadIndexAnswer>(input);
    decoded::<peer::PromiseRequest>(input);
    decoded::<peer::PromiseAnswer>(input);
    append || vote_request || vote_answer || appended || head || greeting
}

#[test]
fn a_message_between_members_is_understood_or_refused() {
    Dice::damage_each(&said(), EACH, is_heard);
    bolero::check!(name = "members")
        .with_iterations(1_000)
        .for_each(|input: &[u8]| {
            is_heard(input);
        });
}

/// No log is so long: there is no next index to count to.
#[test]
fn what_follows_the_last_index_is_refused() {
    let at = |index| log::LogId { term: 2, index };
    let append = |previous, entries: &[u64]| {
        let entries = entries.iter().map(|&index| log::Entry {
            id: Some(at(index)),
            payload: None,
        });
        let request = peer::AppendRequest {
            header: IDENTITY.header(1),
            vote: Some(log::Vote {
                term: 2,
                node: 1,
                committed: true,
            }),
            previous: Some(at(previous)),
            entries: entries.collect(),
            committed: None,
        };
        peers::append_from(request, 1).is_ok()
    };
    assert!(append(u64::MAX - 2, &[u64::MAX - 1]));
    assert!(!append(u64::MAX - 2, &[u64::MAX - 1, u64::MAX]));
    assert!(!append(u64::MAX, &[]) && !append(u64::MAX, &[0]));
}
