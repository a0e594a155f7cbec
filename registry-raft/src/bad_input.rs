//! Whatever comes over the network makes nothing panic: what can't be understood is refused, and what was taken can be
//! applied by every member, stored and read back.

use std::sync::Arc;

use prost::Message;
use registry_api::Namespace;
use registry_tests::Dice;

use crate::command::{self, Change, Command, Outcome};
use crate::log::Identity;
use crate::proto::registry::log::v1 as log;
use crate::proto::registry::peer::v1 as peer;
use crate::proto::request::Call;
use crate::proto::response::Answer;
use crate::snapshot::{self, Frozen};
use crate::state::State;
use crate::types::SnapshotMeta;
use crate::{peers, proto, service, wire};

/// How many damaged messages there are of each kind.
const EACH: u64 = 20_000;
const UNIT: proto::Unit = proto::Unit {};
const IDENTITY: Identity = Identity {
    cluster: [7; 16],
    member: 1,
};

/// Hands on what can be decoded of damaged messages; `take` says whether it was taken.
pub(crate) fn damaged<M: Message + Default>(dice: &mut Dice, good: &[M], mut take: impl FnMut(M) -> bool) {
    let good: Vec<_> = good.iter().map(M::encode_to_vec).collect();
    let (mut decoded, mut taken) = (0, 0);
    let each = Dice::tries(EACH);
    for _ in 0..each {
        let one = dice.roll(good.len() as u64) as usize;
        let bytes = dice.damage(&good[one]);
        if let Ok(message) = M::decode(&*bytes) {
            decoded += 1;
            taken += u64::from(take(message));
        }
    }
    let name = std::any::type_name::<M>();
    println!("{each} of {name}: {decoded} could be decoded, {taken} were taken");
    assert!(
        0 < taken && decoded < each,
        "{name}: the damage damages nothing, or everything"
    );
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
    let txn = |conditions: &[proto::Condition], operations: Vec<proto::Operation>| {
        Change::Txn(proto::Txn {
            conditions: conditions.to_vec(),
            operations,
        })
    };
    let changes = [
        Change::Open(proto::OpenSession { ttl_ms: 10_000 }),
        Change::Close(proto::CloseSession { session: 3 }),
        Change::DeletePrefix("/ns/a".into()),
        Change::Mark(UNIT),
        txn(&[], vec![operation("/ns/a/b", false, true)]),
        txn(
            &[],
            vec![operation("/ns/a", true, false), operation("/ns/c/d", true, true)],
        ),
        txn(&conditions, vec![delete, operation("/ns~/lock/1/a/x", true, false)]),
    ];
    let command = |(number, change)| Command {
        session: number % 3,
        sequence: number,
        answered_below: number.saturating_sub(2),
        change: Some(change),
    };
    (1..).zip(changes).map(command).collect()
}

#[test]
fn a_request_that_is_taken_can_be_applied_stored_and_read_back() {
    let mut dice = Dice::of_run();
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
        Call::KeepAlive(proto::KeepAlive { session: 3 }),
        Call::Members(proto::ChangeMembers {
            name: "a".into(),
            address: "h:1".into(),
            ..proto::ChangeMembers::default()
        }),
    ];
    let calls = calls.into_iter().chain(commands().into_iter().map(Call::Command));
    let requests: Vec<_> = calls
        .map(|call| proto::Request {
            patience_ms: 1000,
            forwarded: false,
            call: Some(call),
        })
        .collect();
    let mut state = State::default();
    damaged(&mut dice, &requests, |request| {
        let Some(call) = request.call.filter(|call| service::check(call).is_ok()) else {
            return false;
        };
        if let Call::Command(command) = call {
            let again = command.clone();
            let (session, sequence) = (command.session, command.sequence);
            let reply = state.apply(1, command).reply;
            let closes = matches!(&again.change, Some(Change::Close(close)) if close.session == session);
            // Whatever it was, a second time it does nothing.
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
        true
    });
    // Some runs end every session, or delete every key.
    state.apply(1, Command::new(Change::Open(proto::OpenSession { ttl_ms: 10_000 })));
    let operations = vec![operation("/ns/kept", false, false)];
    let conditions = Vec::new();
    state.apply(1, Command::new(Change::Txn(proto::Txn { conditions, operations })));
    let mut file = Vec::new();
    snapshot::write(&mut file, &IDENTITY, &Frozen::of(&state, SnapshotMeta::default())).unwrap();
    let mut records = Vec::new();
    let read = snapshot::read(&*file, |record| records.push(Arc::new(record))).unwrap();
    assert!(state.tree.from("").eq(records.iter()));
    assert_eq!(read.sessions.len(), state.sessions.len());
    println!(
        "{} keys and {} sessions at revision {}",
        records.len(),
        read.sessions.len(),
        state.revision
    );
    assert!(!records.is_empty() && !read.sessions.is_empty());
}

#[test]
fn a_damaged_watch_request_is_understood_or_refused() {
    let watch = |from| proto::WatchRequest {
        prefix: "/ns/a".into(),
        scope: 1,
        from: Some(from),
    };
    let good = [
        watch(proto::watch_request::From::Now(UNIT)),
        watch(proto::watch_request::From::AfterOrReset(u64::MAX)),
    ];
    damaged(&mut Dice::of_run(), &good, |request| {
        service::watch_request(request).is_ok()
    });
}

#[test]
fn a_damaged_answer_makes_sense_to_a_handle_or_is_an_error() {
    let mut dice = Dice::of_run();
    let namespace = Namespace::parse("/ns").unwrap();
    let entry = proto::Entry {
        key: "/ns/a".into(),
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
    let answers = [
        Answer::Get(proto::GetAnswer {
            entry: Some(entry),
            ..proto::GetAnswer::default()
        }),
        Answer::Reply(committed.into()),
        Answer::Reply(refused.into()),
        Answer::Reply(conflict.into()),
    ];
    let good = answers.map(|answer| proto::Response {
        leader: "h:1".into(),
        answer: Some(answer),
    });
    let key = registry_api::Key::parse("/a").unwrap();
    let txn = registry_api::Txn::new()
        .when(&key, registry_api::Expect::Absent)
        .put(&key, "1");
    damaged(&mut dice, &good, |response| match response.answer {
        Some(Answer::Get(proto::GetAnswer { entry: Some(entry), .. })) => command::entry(&namespace, entry).is_ok(),
        Some(Answer::Reply(reply)) => reply
            .result
            .is_some_and(|outcome| command::txn_result(&namespace, &txn, outcome).is_ok()),
        _ => false,
    });
}

#[test]
fn a_damaged_message_between_members_is_understood_or_refused() {
    let mut dice = Dice::of_run();
    let header = IDENTITY.header(1);
    let id = Some(log::LogId { term: 2, index: 9 });
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
        previous: Some(log::LogId { term: 2, index: 8 }),
        entries: (9..)
            .zip(payloads)
            .map(|(index, payload)| log::Entry {
                id: Some(log::LogId { term: 2, index }),
                payload,
            })
            .collect(),
        committed: id,
    };
    damaged(&mut dice, &[append], |request| {
        let from = IDENTITY.check(request.header.as_ref());
        let taken = from.and_then(|from| peers::append_from(request, from));
        taken.is_ok_and(|taken| {
            for entry in &taken.entries {
                if let openraft::EntryPayload::Normal(proposal) = &entry.payload {
                    // One that can't be decoded is an error of the state machine, not a panic.
                    let _ = proposal.decode().map(|command| State::default().apply(2, command));
                }
            }
            true
        })
    });
    let asked = peer::VoteRequest {
        header: header.clone(),
        vote,
        last: id,
        leadership_transfer: true,
    };
    damaged(&mut dice, &[asked], |request| {
        let from = IDENTITY.check(request.header.as_ref());
        from.is_ok_and(|from| peers::vote_request_from(request, from).is_ok())
    });
    let answered = peer::VoteAnswer {
        header: header.clone(),
        vote,
        granted: true,
        last: id,
    };
    damaged(&mut dice, &[answered], |answer| peers::vote_answer_from(answer).is_ok());
    let appended = peer::AppendAnswer {
        header: header.clone(),
        matched: id,
        ..peer::AppendAnswer::default()
    };
    damaged(&mut dice, &[appended], |answer| peers::appended_from(answer).is_ok());
    let head = peer::SnapshotHead {
        header,
        vote,
        last: id,
        membership: Some(membership.clone()),
        membership_log_id: id,
    };
    damaged(&mut dice, &[head], |head| peers::snapshot_head_from(head, 1).is_ok());
    let greeting = peer::Greeting {
        cluster: vec![7; 16].into(),
        id: 1,
        name: "a".into(),
        list: [("a".to_owned(), "h:1".to_owned())].into(),
        membership: Some(membership),
        membership_log_id: id,
    };
    damaged(&mut dice, &[greeting], |greeting| {
        greeting
            .membership
            .is_some_and(|membership| wire::membership_from(membership).is_ok())
    });
}
