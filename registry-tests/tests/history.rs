//! The judge of histories catches what it is for, accepts what can happen, and agrees with one that tries every order.

// A test may fail.
#![allow(clippy::unwrap_used)]

#[path = "history/simulated.rs"]
mod simulated;

use std::time::{Duration, Instant};

use proptest::prelude::*;
use registry_api::Revision;
use registry_tests::Dice;
use registry_tests::history::{Answer, Call, Demand, Request, Violation, Write, check};
use simulated::{Break, simulate};

fn call(id: u64, from: u64, to: u64, request: Request, answer: Answer) -> Call {
    Call {
        id,
        client: 0,
        asked: Duration::from_millis(from),
        told: Duration::from_millis(to),
        request,
        answer,
    }
}

fn put(id: u64, from: u64, to: u64, revision: u64) -> Call {
    let request = Request::Commit(vec![], vec![(0, Write::Put)]);
    call(id, from, to, request, Answer::Committed(Revision(revision), vec![true]))
}

fn unknown_put(id: u64, from: u64, to: u64) -> Call {
    call(
        id,
        from,
        to,
        Request::Commit(vec![], vec![(0, Write::Put)]),
        Answer::Unknown,
    )
}

fn get(id: u64, from: u64, to: u64, seen: Option<(u64, u64)>) -> Call {
    let seen = seen.map(|(id, revision)| (id, Revision(revision)));
    call(id, from, to, Request::Read(vec![0]), Answer::Read(vec![seen]))
}

fn swap(id: u64, from: u64, to: u64, expected: u64, answer: Answer) -> Call {
    let demand = Demand::At(Revision(expected));
    call(
        id,
        from,
        to,
        Request::Commit(vec![(0, demand)], vec![(0, Write::Put)]),
        answer,
    )
}

#[track_caller]
fn no_order(calls: &[Call], at: u64) {
    match check(calls) {
        Err(Violation::NoOrder(call, _)) => assert_eq!(call.id, at),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_stale_read_is_caught() {
    check(&[put(1, 0, 1, 1), put(2, 2, 5, 2), get(3, 3, 4, Some((1, 1)))]).unwrap();
    no_order(&[put(1, 0, 1, 1), put(2, 2, 3, 2), get(3, 4, 5, Some((1, 1)))], 3);
    // One saw the new value before the other saw the old.
    let back = [
        put(1, 0, 1, 1),
        put(2, 2, 9, 2),
        get(3, 3, 4, Some((2, 2))),
        get(4, 5, 6, Some((1, 1))),
    ];
    no_order(&back, 4);
}

#[test]
fn a_lost_write_is_caught() {
    no_order(&[put(1, 0, 1, 1), get(2, 2, 3, None)], 2);
}

#[test]
fn a_double_apply_is_caught() {
    // Done, then put over, then done again by a retry.
    let twice = [
        unknown_put(1, 0, 1),
        get(2, 2, 3, Some((1, 1))),
        put(3, 4, 5, 2),
        get(4, 6, 7, Some((1, 1))),
    ];
    no_order(&twice, 4);
    let told = [put(1, 0, 1, 1), get(2, 2, 3, Some((1, 3)))];
    assert_eq!(check(&told), Err(Violation::TwoRevisions(1, Revision(1), Revision(3))));
}

#[test]
fn a_conflict_with_ones_own_success_is_caught() {
    let conflict = |found| Answer::Conflict(0, Some(Revision(found)));
    let calls = [put(1, 0, 1, 1), swap(2, 2, 3, 1, conflict(2))];
    no_order(&calls, 2);
    let seen = [calls[0].clone(), calls[1].clone(), get(3, 4, 5, Some((2, 2)))];
    assert_eq!(check(&seen), Err(Violation::NeverPut(Box::new(seen[2].clone()))));
    // Another's success is a reason, also one that nobody was told of.
    check(&[put(1, 0, 1, 1), put(2, 2, 3, 2), swap(3, 4, 5, 1, conflict(2))]).unwrap();
    check(&[put(1, 0, 1, 1), unknown_put(2, 2, 3), swap(3, 4, 5, 1, conflict(2))]).unwrap();
}

#[test]
fn an_unknown_outcome_may_come_later_or_never() {
    check(&[unknown_put(1, 0, 1), get(2, 2, 3, None), get(3, 4, 5, None)]).unwrap();
    check(&[
        unknown_put(1, 0, 1),
        get(2, 2, 3, None),
        put(3, 4, 5, 1),
        get(4, 6, 7, Some((1, 2))),
    ])
    .unwrap();
    // But not before it was asked, and not only for a while.
    no_order(&[get(1, 0, 1, Some((2, 1))), unknown_put(2, 2, 3)], 1);
    no_order(
        &[unknown_put(1, 0, 1), get(2, 2, 3, Some((1, 1))), get(3, 4, 5, None)],
        3,
    );
}

#[test]
fn revisions_against_time_are_caught() {
    no_order(&[put(1, 0, 1, 2), put(2, 2, 3, 1)], 1);
    check(&[put(1, 0, 3, 2), put(2, 1, 2, 1)]).unwrap();
    assert_eq!(
        check(&[put(1, 0, 3, 2), put(2, 1, 2, 2)]),
        Err(Violation::OneRevision(Revision(2), 1, 2))
    );
}

#[test]
fn half_a_transaction_is_caught() {
    let both = Request::Commit(vec![], vec![(0, Write::Put), (1, Write::Put)]);
    let both = call(1, 0, 9, both, Answer::Committed(Revision(1), vec![true, true]));
    let list = |read| call(2, 3, 4, Request::Read(vec![0, 1]), Answer::Read(read));
    let put = Some((1, Revision(1)));
    check(&[both.clone(), list(vec![put, put])]).unwrap();
    check(&[both.clone(), list(vec![None, None])]).unwrap();
    no_order(&[both, list(vec![put, None])], 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// On small histories, correct and broken ones, the judge says what trying every order says.
    #[test]
    fn agrees_with_trying_every_order(seed in any::<u64>(), calls in 2_usize..7, broken in any::<bool>()) {
        let broken = if broken { Break::Anything } else { Break::Nothing };
        let calls = simulate(&mut Dice(seed), calls, 3, 2, broken);
        let verdict = check(&calls);
        prop_assert!(!matches!(verdict, Err(Violation::Undecided(_))));
        prop_assert_eq!(verdict.is_ok(), simulated::by_every_order(&calls), "{:?} of {:#?}", verdict, calls);
        if broken == Break::Nothing {
            prop_assert!(verdict.is_ok());
        }
    }
}

/// Tens of thousands of calls with thousands of unknown outcomes are judged in no time, and one wrong answer among them is found.
#[test]
fn long_histories_are_judged() {
    let began = Instant::now();
    let (mut unknown, mut caught) = (0, 0);
    for (seed, calls) in [(0, 4_000), (1, 4_000), (2, 4_000), (3, 4_000), (4, 4_000), (5, 50_000)] {
        let calls = simulate(&mut Dice(seed), calls, 8, 4, Break::Nothing);
        unknown += calls.iter().filter(|call| call.answer == Answer::Unknown).count();
        check(&calls).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        let calls = simulate(&mut Dice(seed), calls.len(), 8, 4, Break::OneRead);
        match check(&calls) {
            Err(Violation::Undecided(call)) => panic!("seed {seed}: undecided at {call}"),
            Err(_) => caught += 1,
            Ok(()) => panic!("seed {seed}: a read of what was long put over was taken"),
        }
    }
    println!(
        "five histories of 4,000 calls and one of 50,000, {unknown} of unknown outcome; {caught} broken ones caught; {:?}",
        began.elapsed()
    );
    assert!(unknown > 5_000);
}
