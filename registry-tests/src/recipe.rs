//! Registrations and mirrors.

use std::time::Duration;

use registry_api::{Expect, Kind, Read, Refusal, Registered, Registration, Result, WatchScope};

use crate::cluster::eventually;
use crate::{Cluster, key, refusal, within};

const PATIENCE: Duration = Duration::from_secs(10);

/// S5. A registration is an ephemeral key with a value that can change; unregistering deletes it.
pub async fn a_registration_stays_and_goes(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let k = key("/workers/w");
    let registration = one.register(&k, "1").await?;
    let entry = other.get(&k, Read::Linearizable).await?.expect("it is there");
    assert_eq!(
        (&entry.value[..], entry.session),
        (&b"1"[..], Some(one.session().live()?))
    );
    let refused = other.register(&k, "2").await;
    assert_eq!(refusal(refused), Refusal::OwnedBy(one.session().live()?));
    registration.set("3");
    let (other, k) = (&other, &k);
    eventually(PATIENCE, || async move {
        other
            .get(k, Read::Linearizable)
            .await
            .is_ok_and(|entry| entry.is_some_and(|entry| entry.value == "3"))
    })
    .await;
    registration.unregister().await?;
    assert!(other.get(k, Read::Linearizable).await?.is_none());
    drop(one.register(k, "4").await?);
    eventually(PATIENCE, || async move {
        other
            .get(k, Read::Linearizable)
            .await
            .is_ok_and(|entry| entry.is_none())
    })
    .await;
    other.close().await?;
    one.close().await
}

/// S5. A registration that another hand deleted is put back.
pub async fn a_registration_comes_back_when_deleted(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    let k = key("/workers/w");
    let registration = one.register(&k, "1").await?;
    for _ in 0..3 {
        let before = other.get(&k, Read::Linearizable).await?.expect("it is there");
        assert!(other.delete_if(&k, Expect::ModRevision(before.mod_revision)).await?);
        let (other, k) = (&other, &k);
        eventually(PATIENCE, || async move {
            other
                .get(k, Read::Linearizable)
                .await
                .is_ok_and(|entry| entry.is_some())
        })
        .await;
    }
    registration.unregister().await?;
    other.close().await?;
    one.close().await
}

/// K7, S5. A restart before the predecessor's session has expired takes its key over; the predecessor does not take it
/// back.
pub async fn a_registration_takes_over_when_asked(cluster: &impl Cluster) -> Result<()> {
    let (old, new) = (cluster.connect().await?, cluster.connect().await?);
    let k = key("/workers/w");
    old.take_over(&k, "same", Kind::Ephemeral).await?;
    let registration = Registration::taking_over(&new, &k, "same").await?;
    assert!(
        matches!(*registration.state().borrow(), Registered::There(session, _) if Some(session) == new.session().live().ok())
    );
    old.close().await?;
    assert_eq!(
        new.get(&k, Read::Linearizable).await?.expect("it stays").session,
        Some(new.session().live()?)
    );
    registration.unregister().await?;
    new.close().await
}

/// W1, W2. A mirror is a local copy that follows.
pub async fn a_mirror_is_current(cluster: &impl Cluster) -> Result<()> {
    let (one, other) = (cluster.connect().await?, cluster.connect().await?);
    one.put(&key("/m/a"), "1").await?;
    let mut mirror = other.mirror(&key("/m"), WatchScope::Subtree).await?;
    assert_eq!(mirror.get(&key("/m/a")).expect("it is there").value, "1");
    let revision = one.put(&key("/m/b"), "2").await?;
    within(PATIENCE, mirror.caught_up(revision)).await?;
    assert_eq!((mirror.len(), mirror.is_empty()), (2, false));
    one.delete(&key("/m/a")).await?;
    while mirror.get(&key("/m/a")).is_some() {
        within(PATIENCE, mirror.changed()).await?;
    }
    assert_eq!(
        mirror
            .entries()
            .iter()
            .map(|entry| entry.key.as_str())
            .collect::<Vec<_>>(),
        ["/m/b"]
    );
    other.close().await?;
    one.close().await
}
