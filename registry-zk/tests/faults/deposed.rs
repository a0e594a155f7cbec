//! A leader that was replaced while its machine was paused and cut off, and does not know it when it goes on.

use registry_api::BootInstant;
use rustix::process::Signal;

use super::*;

/// Ticks as servers have them as shipped: within half of one, a leader that goes on notices that its followers are gone.
const TICKS: &str = "tickTime=1000\ninitLimit=4\nsyncLimit=4\n";
/// Long enough for the others to elect a leader, and to be past the middle of a TTL by then.
const LONG_TTL: Duration = Duration::from_secs(24);

/// A `sync` is answered by a leader without its quorum, so its answer says nothing of a session that the next leader counts:
/// believed, two handles held one lock for some seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_deposed_leader_renews_no_session() {
    let (servers, to_followers) = Servers::start_wired(3, TICKS).await;
    let leader = servers.leader().await;
    // It knows no other server.
    let wire = wire_to(&servers, leader).await;
    let holder = connect_with_ttl(&wire.address().to_string(), LONG_TTL).await;
    let others: Vec<_> = (0..3).filter(|other| *other != leader).collect();
    let addresses: Vec<_> = others.iter().map(|other| servers.address(*other)).collect();
    let next = connect_with_ttl(&addresses.join(","), Duration::from_secs(40)).await;
    let held = holder.lock(&key("/lock")).acquire().await.unwrap();
    let session = session_of(&holder);
    let renewed = || {
        let before = holder.session().valid_until(session).unwrap() + Duration::from_secs(1);
        let holder = holder.clone();
        async move || holder.session().valid_until(session).is_none_or(|end| end > before)
    };

    until("a keep-alive is answered", LONG_TTL, renewed()).await;
    to_followers[leader].cut();
    servers.signal(leader, Signal::STOP);
    let waiting = tokio::spawn(async move {
        // There is no leader for a while.
        loop {
            if let Ok(taken) = next.lock(&key("/lock")).acquire().await {
                return (next, taken);
            }
        }
    });
    until("another leads", 2 * LONG_TTL, async || {
        let mut leads = false;
        for other in &others {
            leads |= servers.ask_if_up(*other, "srvr").await.contains("Mode: leader");
        }
        leads
    })
    .await;
    // A keep-alive that it may answer has been sent by then.
    until("the session is nearly over", LONG_TTL, async || {
        holder
            .session()
            .valid_until(session)
            .is_none_or(|end| end < BootInstant::now() + Duration::from_secs(2))
    })
    .await;
    let renewed = renewed();
    servers.signal(leader, Signal::CONT);
    // From the first answer on, the handle reaches nobody.
    until("a keep-alive is answered, or the session is over", LONG_TTL, renewed).await;
    wire.cut();
    let (next, taken) = within(3 * LONG_TTL, waiting).await.unwrap();
    let more = held
        .valid_until()
        .map(|end| end.saturating_duration_since(BootInstant::now()));
    assert!(held.is_lost(), "two hold the lock, the first for another {more:?}");
    taken.release().await.unwrap();
    next.close().await.unwrap();
}
