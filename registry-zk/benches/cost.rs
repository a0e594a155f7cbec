//! What the abstraction costs: the same work through `zookeeper-client` and through the registry, in one run.
//!
//! `cargo bench -p registry-zk` starts a ZooKeeper of its own on loopback.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::sync::Arc;

use registry_api::{BoxError, Depth, List, Read, Registry};
use registry_tests::cost::{self, Done};
use registry_tests::key;
use zookeeper_client::{Acls, AddWatchMode, Client, CreateMode, CreateOptions, LockOptions, LockPrefix};

const VALUE: [u8; 256] = [b'v'; 256];
const LISTED: usize = 100;
const OPEN: CreateOptions<'static> = CreateMode::Persistent.with_acls(Acls::anyone_all());

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // `cargo test` builds benches too, and runs them with this.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let server = harness::Servers::start(1).await;
    let raw = Client::connect(&server.addresses()).await?;
    let ours = harness::connect(&server.addresses()).await;
    let bench = Bench { raw, ours };
    bench.fill().await?;

    cost::head("raw client");
    for tasks in [1, 8, 64] {
        cost::row(
            &bench,
            "put on a key that is there",
            tasks,
            400,
            Bench::raw_put,
            Bench::our_put,
        )
        .await?;
        cost::row(
            &bench,
            "create and delete",
            tasks,
            200,
            Bench::raw_turn,
            Bench::our_turn,
        )
        .await?;
        cost::row(&bench, "stale get", tasks, 800, Bench::raw_get, Bench::our_stale_get).await?;
        cost::row(
            &bench,
            "get, against sync and get",
            tasks,
            600,
            Bench::raw_sync,
            Bench::our_get,
        )
        .await?;
        cost::row(
            &bench,
            "what sync costs a get",
            tasks,
            600,
            Bench::raw_get,
            Bench::raw_sync,
        )
        .await?;
        cost::row(
            &bench,
            "stale list of 100",
            tasks,
            150,
            Bench::raw_list,
            Bench::our_list,
        )
        .await?;
    }
    cost::row(
        &bench,
        "put until its watch tells",
        1,
        300,
        Bench::raw_watch,
        Bench::our_watch,
    )
    .await?;
    cost::row(&bench, "lock and unlock", 1, 300, Bench::raw_lock, Bench::our_lock).await?;
    bench.ours.close().await?;
    Ok(())
}

/// The two sides.
#[derive(Clone)]
struct Bench {
    raw: Client,
    ours: Arc<dyn Registry>,
}

impl Bench {
    async fn fill(&self) -> Done {
        for parent in [
            "/raw",
            "/raw/put",
            "/raw/turn",
            "/raw/listed",
            "/raw/watched",
            "/raw/lock",
        ] {
            self.raw.create(parent, b"", &OPEN).await?;
        }
        for task in 0..64 {
            self.raw.create(&format!("/raw/put/{task}"), &VALUE, &OPEN).await?;
            self.ours.put(&key(&format!("/put/{task}")), VALUE.to_vec()).await?;
        }
        for entry in 0..LISTED {
            self.raw.create(&format!("/raw/listed/{entry}"), &VALUE, &OPEN).await?;
            self.ours.put(&key(&format!("/listed/{entry}")), VALUE.to_vec()).await?;
        }
        self.raw.create("/raw/watched/key", &VALUE, &OPEN).await?;
        self.ours.put(&key("/watched/key"), VALUE.to_vec()).await?;
        // So that its parent stays.
        self.ours.put(&key("/turn/stays"), "").await?;
        Ok(())
    }

    async fn raw_put(self, task: usize, count: usize) -> Done {
        for _ in 0..count {
            self.raw.set_data(&format!("/raw/put/{task}"), &VALUE, None).await?;
        }
        Ok(())
    }

    async fn our_put(self, task: usize, count: usize) -> Done {
        for _ in 0..count {
            self.ours.put(&key(&format!("/put/{task}")), VALUE.to_vec()).await?;
        }
        Ok(())
    }

    async fn raw_turn(self, task: usize, count: usize) -> Done {
        let path = format!("/raw/turn/{task}");
        for _ in 0..count {
            self.raw.create(&path, &VALUE, &OPEN).await?;
            self.raw.delete(&path, None).await?;
        }
        Ok(())
    }

    async fn our_turn(self, task: usize, count: usize) -> Done {
        let path = key(&format!("/turn/{task}"));
        for _ in 0..count {
            self.ours.put(&path, VALUE.to_vec()).await?;
            self.ours.delete(&path).await?;
        }
        Ok(())
    }

    async fn raw_get(self, task: usize, count: usize) -> Done {
        for _ in 0..count {
            self.raw.get_data(&format!("/raw/put/{task}")).await?;
        }
        Ok(())
    }

    async fn raw_sync(self, task: usize, count: usize) -> Done {
        for _ in 0..count {
            let path = format!("/raw/put/{task}");
            let synced = self.raw.sync(&path);
            self.raw.get_data(&path).await?;
            synced.await?;
        }
        Ok(())
    }

    async fn our_stale_get(self, task: usize, count: usize) -> Done {
        for _ in 0..count {
            self.ours.get(&key(&format!("/put/{task}")), Read::Stale).await?;
        }
        Ok(())
    }

    async fn our_get(self, task: usize, count: usize) -> Done {
        for _ in 0..count {
            self.ours.get(&key(&format!("/put/{task}")), Read::Linearizable).await?;
        }
        Ok(())
    }

    /// The children's names, then all their values in one request.
    async fn raw_list(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let names = self.raw.list_children("/raw/listed").await?;
            let mut reader = self.raw.new_multi_reader();
            for name in &names {
                reader.add_get_data(&format!("/raw/listed/{name}"))?;
            }
            assert_eq!(reader.commit().await?.len(), LISTED);
        }
        Ok(())
    }

    async fn our_list(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let list = List {
                depth: Depth::Children,
                read: Read::Stale,
                ..List::new(key("/listed"))
            };
            assert_eq!(self.ours.list(list).await?.entries.len(), LISTED);
        }
        Ok(())
    }

    /// The value is read too, which the event does not carry.
    async fn raw_watch(self, _task: usize, count: usize) -> Done {
        let mut watch = self
            .raw
            .watch("/raw/watched", AddWatchMode::PersistentRecursive)
            .await?;
        for _ in 0..count {
            self.raw.set_data("/raw/watched/key", &VALUE, None).await?;
            let event = watch.changed().await;
            self.raw.get_data(&event.path).await?;
        }
        Ok(())
    }

    async fn our_watch(self, _task: usize, count: usize) -> Done {
        cost::put_until_told(&*self.ours, &key("/watched/key"), &VALUE, count).await
    }

    /// The crate's lock in Curator's manner. Its own release is not waited for, so it is done by hand.
    async fn raw_lock(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let prefix = LockPrefix::new_curator("/raw/lock", "lock-")?;
            let held = self.raw.lock(prefix, b"", LockOptions::new(Acls::anyone_all())).await?;
            let path = held.lock_path().to_owned();
            std::mem::forget(held);
            self.raw.delete(&path, None).await?;
        }
        Ok(())
    }

    async fn our_lock(self, _task: usize, count: usize) -> Done {
        cost::lock_and_unlock(self.ours, &key("/lock"), count).await
    }
}
