//! E: elections.

use std::time::Duration;

use registry_api::{Campaign, Election, Error, Leader, Leadership, Prefix, Result};
use tokio::task::JoinHandle;

use crate::cluster::eventually;
use crate::{Cluster, key, within};

const PATIENCE: Duration = Duration::from_secs(10);

/// A candidate that waits for its turn beside the test.
pub(crate) fn campaigning(election: &Election, value: impl Into<Vec<u8>>) -> JoinHandle<Result<Leadership>> {
    let (election, value) = (election.clone(), value.into());
    tokio::spawn(async move { election.campaign(value).await })
}

/// Waits until so many stand.
pub(crate) async fn standing(election: &Election, candidates: usize) {
    eventually(PATIENCE, || async move {
        election.candidates().await.is_ok_and(|all| all.len() == candidates)
    })
    .await;
}

async fn next(course: &mut Campaign) -> Result<Option<Leader>> {
    within(PATIENCE, course.next()).await.expect("an observation goes on")
}

/// E1. One leads at a time, in the order they came, each with a larger token.
pub async fn one_leads_in_order(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let (election, same) = (one.election(&key("/e")), other.election(&key("/e")));
    let first = election.campaign("first").await?;
    let waiting = campaigning(&same, "second");
    standing(&election, 2).await;
    assert_eq!(same.leader().await?.expect("one leads").value, "first");
    assert!(!waiting.is_finished());
    let token = first.token();
    first.resign().await?;
    let second = within(PATIENCE, waiting).await.expect("it does not panic")?;
    assert!(second.token() > token);
    assert_eq!(
        election.leader().await?.map(|leader| leader.token),
        Some(second.token())
    );
    second.resign().await?;
    assert_eq!(election.leader().await?, None);
    other.close().await?;
    one.close().await
}

/// E2. The leader publishes a value, and another; who leads no more can't.
pub async fn the_leader_publishes(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let (election, same) = (one.election(&key("/e")), other.election(&key("/e")));
    let leadership = election.campaign("1").await?;
    leadership.publish("2").await?;
    let leader = same.leader().await?.expect("one leads");
    assert_eq!((&leader.value[..], leader.token), (&b"2"[..], leadership.token()));
    other.delete(&leadership.condition().key).await?;
    let late = leadership.publish("3").await;
    assert!(matches!(late, Err(Error::HoldLost { .. })), "{late:?}");
    assert_eq!(same.leader().await?, None);
    assert!(leadership.is_lost());
    other.close().await?;
    one.close().await
}

/// E2. An observer is told the present leader first, then the changes, ending in the newest; tokens only grow.
pub async fn observe_ends_in_the_newest(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let election = one.election(&key("/e"));
    let mut course = other.election(&key("/e")).observe().await?;
    assert_eq!(next(&mut course).await?, None);
    let mut last = None;
    for round in 0..3 {
        let leadership = election.campaign(format!("a{round}")).await?;
        let leader = next(&mut course).await?.expect("one leads");
        assert_eq!(leader.value, format!("a{round}"));
        assert!(leader.token == leadership.token() && Some(leader.token) > last);
        last = Some(leader.token);
        leadership.publish(format!("b{round}")).await?;
        assert_eq!(next(&mut course).await?.expect("one leads").value, format!("b{round}"));
        leadership.resign().await?;
        assert_eq!(next(&mut course).await?, None);
    }
    let leadership = election.campaign("present").await?;
    let mut late = other.election(&key("/e")).observe().await?;
    assert_eq!(next(&mut late).await?.expect("one leads").token, leadership.token());
    leadership.resign().await?;
    other.close().await?;
    one.close().await
}

/// E3. `resign` hands over at once.
pub async fn resign_hands_over(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let election = registry.election(&key("/e"));
    let mut leadership = election.campaign("0").await?;
    for round in 1..4 {
        let waiting = campaigning(&election, round.to_string());
        standing(&election, 2).await;
        leadership.resign().await?;
        leadership = within(PATIENCE, waiting).await.expect("it does not panic")?;
    }
    leadership.resign().await?;
    registry.close().await
}

/// E3. A leader key that another hand removed ends the leadership, and the next candidate leads.
pub async fn a_removed_leader_key_ends_the_leadership(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let leadership = one.election(&key("/e")).campaign("one").await?;
    let election = other.election(&key("/e"));
    let waiting = campaigning(&election, "other");
    standing(&election, 2).await;
    other.delete(&leadership.condition().key).await?;
    within(PATIENCE, leadership.lost()).await;
    let next = within(PATIENCE, waiting).await.expect("it does not panic")?;
    // What is left of the old leadership, when it is dropped, is not the new one's.
    let token = leadership.token();
    drop(leadership);
    assert!(next.token() > token && !next.is_lost());
    assert_eq!(election.leader().await?.map(|leader| leader.token), Some(next.token()));
    next.resign().await?;
    other.close().await?;
    one.close().await
}

/// E4. A candidate that stops waiting leaves no trace.
pub async fn a_candidate_that_stops_leaves_no_trace(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let election = registry.election(&key("/e"));
    let leadership = election.campaign("leader").await?;
    let waiting = campaigning(&election, "waiting");
    standing(&election, 2).await;
    waiting.abort();
    standing(&election, 1).await;
    leadership.resign().await?;
    assert!(election.candidates().await?.is_empty());
    registry.close().await
}

/// E4. `close` with a candidate waiting returns at once, and the candidate is told.
pub async fn close_with_a_candidate_waiting_returns(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let leadership = one.election(&key("/e")).campaign("leader").await?;
    let election = other.election(&key("/e"));
    let waiting = tokio::spawn(async move { election.campaign("waiting").await });
    standing(&one.election(&key("/e")), 2).await;
    within(PATIENCE / 2, other.close()).await?;
    let told = within(PATIENCE, waiting).await.expect("it does not panic");
    assert!(
        matches!(told, Err(Error::Closed | Error::SessionExpired { .. })),
        "{told:?}"
    );
    standing(&one.election(&key("/e")), 1).await;
    leadership.resign().await?;
    one.close().await
}

/// E5. Candidates that publish the same value are different candidates.
pub async fn equal_values_are_other_candidates(cluster: &impl Cluster) -> Result<()> {
    let (old, new) = (cluster.connect().await?, cluster.connect().await?);
    let predecessor = old.election(&key("/e")).campaign("10.0.0.7").await?;
    let election = new.election(&key("/e"));
    let waiting = campaigning(&election, "10.0.0.7");
    standing(&election, 2).await;
    assert!(
        !waiting.is_finished(),
        "the predecessor still leads, whatever it published"
    );
    let token = predecessor.token();
    old.close().await?;
    let successor = within(PATIENCE, waiting).await.expect("it does not panic")?;
    assert!(successor.token() > token);
    let leader = election.leader().await?.expect("one leads");
    assert_eq!(
        (leader.token, leader.session),
        (successor.token(), Some(new.session().live()?))
    );
    successor.resign().await?;
    new.close().await
}

/// E1. One that led can stand and lead again, twenty times in a row.
pub async fn a_leader_can_lead_again(cluster: &impl Cluster) -> Result<()> {
    let registry = cluster.connect().await?;
    let election = registry.election(&key("/e"));
    let mut last = None;
    for _ in 0..20 {
        let leadership = within(PATIENCE, election.campaign("me")).await?;
        assert!(Some(leadership.token()) > last);
        last = Some(leadership.token());
        assert_eq!(election.leader().await?.map(|leader| leader.token), last);
        leadership.resign().await?;
    }
    registry.close().await
}

/// E1, E3. Candidates that come and go, refused ones and new values change nothing for the one that leads.
pub async fn others_change_nothing_for_the_leader(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let (election, same) = (one.election(&key("/e")), other.election(&key("/e")));
    let mut course = election.observe().await?;
    assert_eq!(next(&mut course).await?, None);
    let leadership = election.campaign("1").await?;
    assert_eq!(next(&mut course).await?.expect("one leads").token, leadership.token());
    for round in 0..3 {
        let waiting = campaigning(&same, "waiting");
        standing(&election, 2).await;
        leadership.publish(format!("2.{round}")).await?;
        let told = next(&mut course).await?.expect("one leads");
        assert_eq!(told.token, leadership.token(), "another leads");
        assert_eq!(told.value, format!("2.{round}"));
        waiting.abort();
        standing(&election, 1).await;
    }
    assert!(!leadership.is_lost());
    leadership.resign().await?;
    // Nothing was told in between but the values.
    assert_eq!(next(&mut course).await?, None);
    other.close().await?;
    one.close().await
}

/// E3, S6. What is left of an old leader, its late end too, leaves the one that leads now alone.
pub async fn an_old_leaders_end_leaves_the_present_one(cluster: &impl Cluster) -> Result<()> {
    let (old, other) = (cluster.connect().await?, cluster.connect().await?);
    let past = old.election(&key("/e")).campaign("same").await?;
    let election = other.election(&key("/e"));
    other.delete(&past.condition().key).await?;
    let present = within(PATIENCE, election.campaign("same")).await?;
    past.lost().await;
    // It may still think so, and say so, late.
    let late = past.publish("late").await;
    assert!(matches!(late, Err(Error::HoldLost { .. })), "{late:?}");
    // The end of a lost leadership changes nothing, with whatever answer.
    let _ = past.resign().await;
    old.close().await?;
    let leader = election.leader().await?.expect("one leads");
    assert_eq!(leader.token, present.token(), "another leads");
    present.publish("still").await?;
    assert!(!present.is_lost());
    present.resign().await?;
    other.close().await
}

/// E3. Who lost the leadership by another hand can stand and lead again, with a larger token, on the same handle.
pub async fn who_lost_it_can_lead_again(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let election = one.election(&key("/e"));
    let mut last = None;
    for _ in 0..5 {
        let leadership = within(PATIENCE, election.campaign("me")).await?;
        assert!(Some(leadership.token()) > last);
        last = Some(leadership.token());
        other.delete(&leadership.condition().key).await?;
        within(PATIENCE, leadership.lost()).await;
    }
    other.close().await?;
    one.close().await
}

/// E4. A closed handle never leads again, and leaves nobody standing.
pub async fn a_closed_handle_never_leads(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let election = one.election(&key("/e"));
    let leadership = election.campaign("me").await?;
    one.close().await?;
    assert!(leadership.is_lost(), "a closed handle leads");
    let again = election.campaign("me").await;
    assert!(matches!(again, Err(Error::Closed)), "{again:?}");
    assert!(other.election(&key("/e")).candidates().await?.is_empty());
    other.close().await
}

/// E3. A candidate's key that is removed while it is about to lead: it leads with its key there, or knows that it does not.
pub async fn a_removal_racing_the_election_is_noticed(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let (election, same) = (one.election(&key("/e")), other.election(&key("/e")));
    let candidates = Prefix::from_store("~/election").expect("it is one");
    for round in 0..20 {
        let standing = campaigning(&election, "racing");
        tokio::time::sleep(Duration::from_micros(300 * round)).await;
        other.delete_prefix(&candidates).await?;
        match within(PATIENCE, standing).await.expect("it does not panic") {
            Ok(leadership) => {
                // Removed after it was won, it is lost; what was removed before was never won.
                if same.leader().await?.map(|leader| leader.token) != Some(leadership.token()) {
                    within(PATIENCE, leadership.lost()).await;
                    assert!(leadership.is_lost());
                }
            }
            Err(Error::HoldLost { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    other.close().await?;
    one.close().await
}

/// E3, E4. Who closes its handle when it learns that it leads no more is gone from every election.
pub async fn closing_on_the_loss_ends_it(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let leadership = one.election(&key("/e")).campaign("me").await?;
    let elsewhere = one.election(&key("/other")).campaign("me").await?;
    let removed = leadership.condition().key;
    let ending = tokio::spawn({
        let one = one.clone();
        async move {
            leadership.lost().await;
            one.close().await
        }
    });
    other.delete(&removed).await?;
    within(PATIENCE, ending).await.expect("it does not panic")?;
    assert!(elsewhere.is_lost(), "a closed handle leads");
    for name in ["/e", "/other"] {
        let next = within(PATIENCE, other.election(&key(name)).campaign("next")).await?;
        next.resign().await?;
    }
    other.close().await
}

/// E1, E3. Leadership lost and won so many times in a row, by resigning, by another hand on its key and on its session:
/// each time with a larger token, told to an observer in that order, and nothing left of it.
pub async fn lost_and_won(cluster: &impl Cluster, times: u32) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let election = one.election(&key("/e"));
    let mut course = other.election(&key("/e")).observe().await?;
    let mut last = None;
    for round in 0..times {
        let leadership = loop {
            match within(PATIENCE, election.campaign(round.to_string())).await {
                Ok(leadership) => break leadership,
                // The session was ended a moment ago; the next comes by itself.
                Err(Error::SessionExpired { .. }) => one.wait_connected(PATIENCE).await?,
                Err(error) => return Err(error),
            }
        };
        assert!(Some(leadership.token()) > last, "{} after {last:?}", leadership.token());
        last = Some(leadership.token());
        match round % 100 {
            99 => {
                cluster.revoke(one.session().live()?).await;
                within(PATIENCE, leadership.lost()).await;
            }
            odd if odd % 2 == 1 => {
                other.delete(&leadership.condition().key).await?;
                within(PATIENCE, leadership.lost()).await;
            }
            _ => leadership.resign().await?,
        }
    }
    assert!(election.candidates().await?.is_empty());
    let (mut newest, mut told) = (None, 0);
    while newest < last {
        if let Some(leader) = next(&mut course).await? {
            assert!(
                Some(leader.token) >= newest,
                "{} was told after {newest:?}",
                leader.token
            );
            (newest, told) = (Some(leader.token), told + 1);
        }
    }
    println!("{times} leaderships in a row, {told} of them told to an observer");
    other.close().await?;
    one.close().await
}
