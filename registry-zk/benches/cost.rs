//! What the abstraction costs: the same work through `zookeeper-client` and through the registry, in one run.
//!
//! `cargo bench -p registry-zk` starts a ZooKeeper of its own on loopback.

#[path = "../tests/harness/mod.rs"]
mod harness;

use harness::anyone;
use registry_api::BoxError;
use registry_tests::cost::{self, Done, KEYS, LISTED, Ours, VALUE};
use tokio::runtime::{Builder, Runtime};
use zookeeper_client::{Acls, AddWatchMode, Client, LockOptions, LockPrefix};

fn main() -> Done {
    if !cost::is_wanted() {
        return Ok(());
    }
    // Where the registry has the thread that keeps sessions.
    let apart = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    Runtime::new()?.block_on(measure(&apart))
}

async fn measure(apart: &Runtime) -> Done {
    let server = harness::Servers::start(1).await;
    let raw = &Raw(Client::connect(&server.addresses()).await?);
    let connecting = server.addresses();
    let connecting = apart.spawn(async move { Client::connect(&connecting).await });
    let apart = &Raw(connecting.await??);
    let ours = &Ours(harness::connect(&server.addresses()).await);
    raw.fill().await?;
    ours.fill().await?;
    // So that their parent stays.
    ours.0.put(&registry_tests::key("/turn/stays"), "").await?;

    cost::head("raw client");
    for tasks in [1, 64] {
        cost::row("put", tasks, 400, (raw, Raw::put), (ours, Ours::put)).await?;
        let name = "put, against a client on a thread of its own";
        cost::row(name, tasks, 400, (apart, Raw::put), (ours, Ours::put)).await?;
        let name = "put, against its multi with one check";
        cost::row(name, tasks, 400, (apart, Raw::put_checked), (ours, Ours::put)).await?;
        let name = "stale get";
        cost::row(name, tasks, 800, (raw, Raw::get), (ours, Ours::get_stale)).await?;
        let name = "stale get, against a client on its own thread";
        cost::row(name, tasks, 800, (apart, Raw::get), (ours, Ours::get_stale)).await?;
        let name = "get, against sync and get";
        cost::row(name, tasks, 600, (raw, Raw::get_synced), (ours, Ours::get)).await?;
        let name = "stale list of 100";
        cost::row(name, tasks, 150, (raw, Raw::list), (ours, Ours::list_stale)).await?;
        let name = "create and delete";
        cost::row(
            name,
            tasks,
            200,
            (raw, Raw::make_and_delete),
            (ours, Ours::make_and_delete),
        )
        .await?;
        // What ZooKeeper itself takes for it, in the columns of the two sides.
        let name = "ZooKeeper's get, and with a sync before it";
        cost::row(name, tasks, 600, (raw, Raw::get), (raw, Raw::get_synced)).await?;
    }
    let name = "put until its watch tells";
    cost::row(name, 1, 300, (raw, Raw::put_until_told), (ours, Ours::put_until_told)).await?;
    let name = "lock and unlock";
    cost::row(name, 1, 300, (raw, Raw::lock), (ours, Ours::lock)).await?;
    ours.0.close().await?;
    Ok(())
}

/// The bare client's side.
#[derive(Clone)]
struct Raw(Client);

impl Raw {
    async fn fill(&self) -> Result<(), BoxError> {
        for parent in [
            "/raw",
            "/raw/turn",
            "/raw/listed",
            "/raw/watched",
            "/raw/lock",
            "/raw/check",
        ] {
            self.0.create(parent, b"", &anyone()).await?;
        }
        for number in 0..64 * KEYS {
            let name = format!("/raw/{}-{}", number / KEYS, number % KEYS);
            self.0.create(&name, &VALUE, &anyone()).await?;
        }
        for entry in 0..LISTED {
            let name = format!("/raw/listed/{entry}");
            self.0.create(&name, &VALUE, &anyone()).await?;
        }
        self.0.create("/raw/watched/key", &VALUE, &anyone()).await?;
        Ok(())
    }

    async fn put(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            let name = format!("/raw/{task}-{}", round % KEYS);
            self.0.set_data(&name, &VALUE, None).await?;
        }
        Ok(())
    }

    /// With the one check that the contract asks of every put.
    async fn put_checked(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            let mut multi = self.0.new_multi_writer();
            multi.add_check_version("/raw/check", 0)?;
            multi.add_set_data(&format!("/raw/{task}-{}", round % KEYS), &VALUE, None)?;
            multi.commit().await?;
        }
        Ok(())
    }

    async fn make_and_delete(self, task: usize, count: usize) -> Done {
        let name = format!("/raw/turn/{task}");
        for _ in 0..count {
            self.0.create(&name, &VALUE, &anyone()).await?;
            self.0.delete(&name, None).await?;
        }
        Ok(())
    }

    async fn get(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.0.get_data(&format!("/raw/{task}-{}", round % KEYS)).await?;
        }
        Ok(())
    }

    /// Both are sent at once, and answered in this order.
    async fn get_synced(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            let name = format!("/raw/{task}-{}", round % KEYS);
            let synced = self.0.sync(&name);
            self.0.get_data(&name).await?;
            synced.await?;
        }
        Ok(())
    }

    /// The children's names, then all their values in one request.
    async fn list(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let names = self.0.list_children("/raw/listed").await?;
            let mut reader = self.0.new_multi_reader();
            for name in &names {
                reader.add_get_data(&format!("/raw/listed/{name}"))?;
            }
            assert_eq!(reader.commit().await?.len(), LISTED);
        }
        Ok(())
    }

    /// The value is read too, which the event does not carry.
    async fn put_until_told(self, _task: usize, count: usize) -> Done {
        let mut watch = self.0.watch("/raw/watched", AddWatchMode::PersistentRecursive).await?;
        for _ in 0..count {
            self.0.set_data("/raw/watched/key", &VALUE, None).await?;
            let event = watch.changed().await;
            self.0.get_data(&event.path).await?;
        }
        Ok(())
    }

    /// The crate's lock in Curator's manner. Its own release is not waited for, so it is done by hand.
    async fn lock(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let prefix = LockPrefix::new_curator("/raw/lock", "lock-")?;
            let held = self.0.lock(prefix, b"", LockOptions::new(Acls::anyone_all())).await?;
            let path = held.lock_path().to_owned();
            std::mem::forget(held);
            self.0.delete(&path, None).await?;
        }
        Ok(())
    }
}
