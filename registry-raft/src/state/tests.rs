//! Tests of what commands do to the state.

use proptest::prelude::*;

use super::*;
use crate::proto::operation::Write;

const UNIT: proto::Unit = proto::Unit {};

fn put(key: &str, ephemeral: bool) -> proto::Operation {
    let put = proto::Put {
        value: "v".into(),
        ephemeral,
        take_over: false,
    };
    proto::Operation {
        key: key.into(),
        write: Some(Write::Put(put)),
    }
}

/// A client that never says which answers it received can't fill the members' memory, nor their snapshots; one that
/// says it goes on.
#[test]
fn the_answers_of_one_session_are_bounded() {
    let mut state = State::default();
    state.apply(
        1,
        Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 })),
    );
    let mut outcome = |sequence, answered_below| {
        let command = Command {
            answered_below,
            ..command(1, sequence, txn(vec![put("/ns/a", false)]))
        };
        let applied = state.apply(1, command);
        (applied.reply.result, state.sessions[&1].replies.len())
    };
    let most = MAX_REPLIES as u64;
    for sequence in 1..=most {
        let (reply, _) = outcome(sequence, 0);
        assert!(matches!(reply, Some(Outcome::Committed(_))), "{reply:?}");
    }
    let crowded = (Some(Outcome::Crowded(most)), MAX_REPLIES);
    assert_eq!(outcome(most + 1, 0), crowded);
    assert_eq!(outcome(most + 1, 1), crowded, "nothing was answered");
    // What was carried out is still known.
    let (again, _) = outcome(7, 1);
    assert!(matches!(again, Some(Outcome::Committed(_))), "{again:?}");
    let (reply, held) = outcome(most + 1, most);
    assert!(matches!(reply, Some(Outcome::Committed(_))), "{reply:?}");
    assert_eq!(held, 2);
}

fn txn(operations: Vec<proto::Operation>) -> Change {
    Change::Txn(proto::Txn {
        conditions: Vec::new(),
        operations,
    })
}

fn command(session: u64, sequence: u64, change: Change) -> Command {
    Command {
        session,
        sequence,
        answered_below: 0,
        level: 0,
        change: Some(change),
    }
}

fn outcome(state: &mut State, command: Command) -> Outcome {
    state.apply(1, command).reply.result.unwrap()
}

fn with_session() -> State {
    let mut state = State::default();
    let opened = outcome(
        &mut state,
        Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 })),
    );
    assert_eq!(opened, Outcome::SessionOpened(1));
    state
}

fn committed(revision: u64) -> Outcome {
    Outcome::Committed(proto::Committed {
        revision,
        changed: vec![true],
    })
}

#[test]
fn a_command_that_comes_twice_happens_once() {
    let mut state = with_session();
    let first = command(1, 1, txn(vec![put("/ns/a", false)]));
    assert_eq!(outcome(&mut state, first.clone()), committed(1));
    assert_eq!(
        outcome(&mut state, command(1, 2, txn(vec![put("/ns/a", false)]))),
        committed(2)
    );
    assert_eq!(outcome(&mut state, first.clone()), committed(1));
    assert_eq!(state.revision, 2);
    // Once the handle has the answer, it is forgotten, and a straggler changes nothing.
    let third = Command {
        answered_below: 3,
        ..command(1, 3, txn(vec![put("/ns/a", false)]))
    };
    assert_eq!(outcome(&mut state, third), committed(3));
    assert_eq!(state.sessions[&1].replies.len(), 1);
    assert_eq!(outcome(&mut state, first), Outcome::Done(UNIT));
    assert_eq!(state.revision, 3);
}

#[test]
fn an_expiry_counted_in_another_term_changes_nothing() {
    let mut state = with_session();
    outcome(
        &mut state,
        command(1, 1, txn(vec![put("/ns/a", true), put("/ns/b", true)])),
    );
    let expire = |term| {
        Command::new(Change::Expire(proto::ExpireSessions {
            sessions: vec![1],
            term,
        }))
    };
    assert!(state.apply(2, expire(1)).changes.is_empty());
    assert!(state.sessions.contains_key(&1));
    let changes = state.apply(1, expire(1)).changes;
    assert!(changes.len() == 2 && changes.iter().all(|change| change.kind == ChangeKind::SessionEnded));
    assert_eq!(
        (
            state.tree.len(),
            state.revision,
            state.sessions.len(),
            state.ephemeral.len()
        ),
        (0, 2, 0, 0)
    );
    assert_eq!(
        outcome(&mut state, command(1, 2, txn(vec![put("/ns/a", true)]))),
        Outcome::SessionExpired(1)
    );
}

#[test]
fn a_silence_counts_until_the_session_is_heard() {
    let mut state = with_session();
    let silence = |silent_ms, heard| {
        let silence = proto::Silence {
            session: 1,
            silent_ms,
            heard,
        };
        Command::new(Change::Silences(proto::Silences {
            term: 1,
            silences: vec![silence],
        }))
    };
    state.apply(2, silence(400, 0));
    assert_eq!(state.sessions[&1].silent_ms, 0, "it was counted in another term");
    state.apply(1, silence(500, 0));
    assert_eq!(state.sessions[&1].silent_ms, 500);
    state.apply(1, Command::new(Change::Heard(1)));
    assert_eq!(state.sessions[&1].silent_ms, 0);
    state.apply(1, silence(700, 0));
    assert_eq!(
        state.sessions[&1].silent_ms, 0,
        "it was counted before the session was heard"
    );
    assert_eq!(
        outcome(&mut state, Command::new(Change::Heard(9))),
        Outcome::SessionExpired(9)
    );
}

#[test]
fn an_old_sessions_end_leaves_what_a_newer_one_took_over() {
    let mut state = with_session();
    outcome(
        &mut state,
        Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 })),
    );
    outcome(&mut state, command(1, 1, txn(vec![put("/ns/a", true)])));
    let take_over = proto::Put {
        value: "new".into(),
        ephemeral: true,
        take_over: true,
    };
    let take_over = proto::Operation {
        key: "/ns/a".into(),
        write: Some(Write::Put(take_over)),
    };
    let applied = state.apply(1, command(2, 1, txn(vec![take_over])));
    let kinds: Vec<_> = applied.changes.iter().map(|change| change.kind).collect();
    assert_eq!(kinds, [ChangeKind::Deleted, ChangeKind::Created]);
    let closed = state.apply(1, Command::new(Change::Close(proto::CloseSession { session: 1 })));
    assert!(closed.changes.is_empty());
    let record = state.tree.get("/ns/a").unwrap();
    assert_eq!((record.session, record.create_revision, record.version), (2, 2, 1));
}

#[test]
fn a_transaction_that_changes_nothing_takes_no_revision() {
    let mut state = with_session();
    let delete = proto::Operation {
        key: "/ns/a".into(),
        write: Some(Write::Delete(UNIT)),
    };
    let nothing = Outcome::Committed(proto::Committed {
        revision: 0,
        changed: vec![false],
    });
    assert_eq!(outcome(&mut state, command(1, 1, txn(vec![delete]))), nothing);
}

#[test]
fn recipes_are_spared_the_question_what_is_above() {
    assert_eq!(ancestors("/ns/a/b/c").collect::<Vec<_>>(), ["/ns/a/b", "/ns/a", "/ns"]);
    assert_eq!(ancestors("/ns~/lock/1/a").count(), 0);
}

/// Two groups at one address, one after the other, have no session number in common but by chance. All members of one count
/// alike: where they begin is in the entry.
#[test]
fn the_first_session_says_where_the_numbers_begin() {
    let mut state = State::default();
    let mut open = |first| {
        let change = Change::Open(proto::OpenSession { ttl_ms: 1000, first });
        outcome(&mut state, Command::new(change))
    };
    assert_eq!(open(7 << 24), Outcome::SessionOpened((7 << 24) + 1));
    assert_eq!(open(9 << 24), Outcome::SessionOpened((7 << 24) + 2));
    let drawn: BTreeSet<_> = (0..100).map(|_| first_session()).collect();
    assert!(drawn.len() == 100 && drawn.iter().all(|first| (1 << 24..1 << 62).contains(first)));
}

proptest! {
    /// What is derived from the records is the same however it came to be: by changes, or from a snapshot.
    #[test]
    fn a_restored_state_is_the_state(
        changes in proptest::collection::vec((1u64..4, 0u8..4, any::<bool>(), 0u8..5), 1..200),
    ) {
        let mut state = State::default();
        for _ in 1..4 {
            state.apply(1, Command::new(Change::Open(proto::OpenSession { ttl_ms: 1000, first: 0 })));
        }
        for (sequence, (session, key, ephemeral, what)) in (1..).zip(changes) {
            let key = format!("/ns/{key}");
            let change = match what {
                0 => txn(vec![proto::Operation { key, write: Some(Write::Delete(UNIT)) }]),
                1 => txn(vec![put(&format!("{key}/below"), ephemeral)]),
                2 => Change::DeletePrefix(key),
                _ => txn(vec![put(&key, ephemeral)]),
            };
            state.apply(1, command(session, sequence, change));
        }
        let sessions = state.sessions.iter().map(|(id, session)| {
            (*id, SessionRecord { keys: BTreeSet::new(), ..(**session).clone() })
        });
        let restored = State::restore(state.tree.clone(), state.revision, state.last_session, sessions.collect());
        prop_assert_eq!(&restored.sessions, &state.sessions);
        prop_assert_eq!(&restored.ephemeral, &state.ephemeral);
        for key in &state.ephemeral {
            prop_assert!(!state.has_children(key), "{} is no leaf", key);
        }
    }
}
