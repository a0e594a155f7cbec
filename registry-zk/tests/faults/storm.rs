//! Changes by many while the way to the store breaks again and again.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use registry_api::{List, Mirror, Prefix, Watch};
use registry_tests::Dice;
use registry_tests::watch::same_as_store;

use super::*;

const KEYS: u64 = 40;

/// Who reads while the store changes.
struct Follower {
    registry: Arc<dyn Registry>,
    mirror: Mirror,
    watch: Watch,
    picture: Picture,
}

impl Follower {
    async fn start(servers: &str, ttl: Duration) -> Self {
        let registry = connect_with_ttl(servers, ttl).await;
        let request = WatchRequest::new(key("/p"), WatchScope::Subtree);
        Self {
            mirror: registry.mirror(key("/p"), WatchScope::Subtree).await.unwrap(),
            watch: registry.watch(request).await.unwrap(),
            picture: Picture::default(),
            registry,
        }
    }

    /// What it knows once it knows of that last change is what is there.
    async fn knows_all(&mut self, path: &str, last: &str) {
        self.picture
            .until(&mut self.watch, |picture| picture.has(path, last))
            .await
            .unwrap();
        same_as_store(&*self.registry, "/p", &self.picture).await.unwrap();
        until("the mirror knows it too", PATIENCE, async || {
            self.mirror.get(&key(path)).is_some_and(|entry| entry.value == last)
        })
        .await;
        let there = self.registry.list_all(List::new(key("/p"))).await.unwrap();
        assert_eq!(self.mirror.entries(), there);
    }
}

/// Changes keys until told to stop.
async fn write(
    registry: Arc<dyn Registry>,
    mut dice: Dice,
    stopped: tokio::sync::watch::Receiver<bool>,
    changes: Arc<AtomicU32>,
) -> Arc<dyn Registry> {
    while !*stopped.borrow() {
        let path = key(&format!("/p/{}", dice.roll(KEYS)));
        let value = dice.roll(u64::MAX).to_string();
        let done = match dice.roll(8) {
            0 => registry.delete(&path).await.map(drop),
            1 => registry.put(&key(&format!("{path}/below")), value).await.map(drop),
            2 => registry.delete_prefix(&Prefix::from(&path)).await.map(drop),
            3 => registry.put_ephemeral(&key(&format!("{path}-e")), "").await.map(drop),
            _ => registry.put(&path, value).await.map(drop),
        };
        changes.fetch_add(u32::from(done.is_ok()), Ordering::Relaxed);
    }
    registry
}

/// Changes by many, cuts of every kind, other servers after each: what a watch and a mirror know in the end is what is
/// there, whether the disconnects cost them their session or not: the one loses its own at the latest in the last, the
/// other keeps it throughout.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_with_disconnects_ends_in_the_state_of_the_store() {
    let mut servers = Servers::start(3).await;
    let mut wires = Vec::new();
    for number in 0..3 {
        wires.push(wire_to(&servers, number).await);
    }
    let addresses: Vec<_> = wires.iter().map(|wire| wire.address().to_string()).collect();
    let addresses = addresses.join(",");
    let mut followers = Vec::new();
    for ttl in [2, 60] {
        followers.push(Follower::start(&addresses, Duration::from_secs(ttl)).await);
    }
    let lasting = session_of(&followers[1].registry);

    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = u64::from(now.subsec_nanos());
    println!("seed {seed}");
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let changes = Arc::new(AtomicU32::new(0));
    let mut writers = Vec::new();
    for writer in 0..4 {
        let registry = connect(&servers.addresses()).await;
        let dice = Dice(seed ^ writer);
        writers.push(tokio::spawn(write(registry, dice, stopped.clone(), changes.clone())));
    }
    for round in 0..9 {
        match round % 3 {
            0 => wires.iter().for_each(Wire::refuse),
            1 => wires.iter().for_each(Wire::cut),
            // The rest of the ensemble goes on, perhaps with another leader.
            _ => servers.kill(round / 3),
        }
        // How long a disconnect lasts is what the test varies; it waits for nothing.
        tokio::time::sleep(Duration::from_millis(150 * (round as u64 + 1))).await;
        wires.iter().for_each(Wire::mend);
        if round % 3 == 2 {
            servers.spawn(round / 3);
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // The last changes come while nobody hears of them, and none comes after that would tell of them.
    wires.iter().for_each(Wire::refuse);
    let brief = session_of(&followers[0].registry);
    let before = changes.load(Ordering::Relaxed);
    until("keys change meanwhile", PATIENCE, async || {
        changes.load(Ordering::Relaxed) >= before + 5 * KEYS as u32
    })
    .await;
    stop.send_replace(true);
    let mut others = Vec::new();
    for writer in writers {
        others.push(within(PATIENCE, writer).await.unwrap());
    }
    println!("{} changes", changes.load(Ordering::Relaxed));
    put_at_last(&*others[0], "/p/end", "1").await;
    // Their ephemeral keys go with them.
    for other in others {
        other.wait_connected(PATIENCE).await.unwrap();
        other.close().await.unwrap();
    }
    until("a session is over", PATIENCE, async || {
        let live = followers[0].registry.session().live();
        matches!(live, Err(Error::SessionExpired { .. }))
    })
    .await;
    wires.iter().for_each(Wire::mend);

    for follower in &mut followers {
        follower.knows_all("/p/end", "1").await;
        follower.registry.wait_connected(PATIENCE).await.unwrap();
    }
    assert_ne!(session_of(&followers[0].registry), brief);
    assert_eq!(session_of(&followers[1].registry), lasting);
    for follower in followers {
        follower.registry.close().await.unwrap();
    }
}
