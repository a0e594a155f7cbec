//! E: elections.

use std::time::Duration;

use registry_api::{Campaign, Election, Error, Leader, Result};

use crate::cluster::eventually;
use crate::{Cluster, key, within};

const PATIENCE: Duration = Duration::from_secs(10);

async fn standing(election: &Election, candidates: usize) {
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
    let waiting = tokio::spawn({
        let same = same.clone();
        async move { same.campaign("second").await }
    });
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
    let mut last = registry_api::Revision(0);
    for round in 0..3 {
        let leadership = election.campaign(format!("a{round}")).await?;
        let leader = next(&mut course).await?.expect("one leads");
        assert_eq!(leader.value, format!("a{round}"));
        assert!(leader.token == leadership.token() && leader.token > last);
        last = leader.token;
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
        let waiting = tokio::spawn({
            let election = election.clone();
            async move { election.campaign(round.to_string()).await }
        });
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
    let waiting = tokio::spawn({
        let election = election.clone();
        async move { election.campaign("other").await }
    });
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
    let waiting = tokio::spawn({
        let election = election.clone();
        async move { election.campaign("waiting").await }
    });
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
    let waiting = tokio::spawn({
        let election = election.clone();
        async move { election.campaign("10.0.0.7").await }
    });
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
    let mut last = registry_api::Revision(0);
    for _ in 0..20 {
        let leadership = within(PATIENCE, election.campaign("me")).await?;
        assert!(leadership.token() > last);
        last = leadership.token();
        leadership.resign().await?;
    }
    registry.close().await
}
