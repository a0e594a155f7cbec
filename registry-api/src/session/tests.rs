//! The clock of sessions.

use super::*;

const S: SessionId = SessionId(7);
const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn clock(margin: Duration) -> SessionClock {
    SessionClock::new(
        Grant {
            session: S,
            ttl: ms(1000),
            margin,
        },
        ms(5000),
    )
}

fn valid_until(clock: &SessionClock) -> Duration {
    Duration::from_nanos(clock.valid_until.load(Ordering::Acquire))
}

#[test]
fn validity_counts_from_the_sending() {
    let clock = clock(Duration::ZERO);
    assert_eq!(valid_until(&clock), ms(5900));
    clock.answered(S, ms(5300), ms(5800));
    assert_eq!(valid_until(&clock), ms(6200));
}

#[test]
fn the_stores_margin_is_kept() {
    assert_eq!(valid_until(&clock(ms(200))), ms(5700));
}

/// ZooKeeper's sessions were suspended when a keep-alive was late by a tenth of the TTL: 0.4 s of 4 s.
#[test]
fn a_keep_alive_may_be_late_by_a_fifth_of_the_ttl_whatever_the_margin() {
    for margin in [0, 1000 / 6] {
        let trusted = ms(900 - margin);
        assert!(period(trusted) + ms(1000 / 5) < suspended_after(trusted), "{margin}");
    }
    assert_eq!(period(ms(900)), ms(333));
}

#[test]
fn a_late_answer_revives_nothing() {
    let clock = clock(Duration::ZERO);
    clock.answered(S, ms(5800), ms(5900));
    assert_eq!(*clock.state.borrow(), SessionState::Expired(S));
    clock.answered(S, ms(5801), ms(5802));
    assert_eq!(*clock.state.borrow(), SessionState::Expired(S));
}

/// A machine that was suspended for longer than the TTL is to notice it soon after, whatever the TTL.
#[test]
fn a_sleep_is_short_whatever_the_ttl() {
    assert_eq!(pause(ms(5000), ms(5000 + 3_600_000)), MAX_SLEEP);
    assert_eq!(pause(ms(5000), ms(5300)), ms(300));
    assert_eq!(pause(ms(5000), ms(4000)), ms(1));
    assert!(MAX_SLEEP <= ms(1000));
}

#[test]
fn answers_out_of_order_take_nothing_back() {
    let clock = clock(Duration::ZERO);
    clock.answered(S, ms(5500), ms(5600));
    clock.answered(S, ms(5300), ms(5700));
    assert_eq!(valid_until(&clock), ms(6400));
}
