//! What the abstraction costs: the same work through `etcd-client` and through the registry, in one run.
//!
//! `cargo bench -p registry-etcd` starts an etcd of its own on loopback.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::sync::Arc;

use etcd_client::{Client, Compare, CompareOp, GetOptions, KvClient, LockOptions, Txn, TxnOp, WatchOptions};
use registry_api::{BoxError, List, Read, Registry};
use registry_tests::cost::{self, Done};
use registry_tests::key;

const VALUE: [u8; 256] = [b'v'; 256];
const LISTED: usize = 100;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // `cargo test` builds benches too, and runs them with this.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    let server = harness::Servers::start(1).await;
    let raw = Client::connect(server.endpoints(), None).await?;
    let ours = harness::connect(&server.endpoints()).await;
    let bench = Bench { raw, ours };
    bench.fill().await?;

    cost::head("etcd-client");
    for tasks in [1, 8, 64] {
        cost::row(&bench, "put", tasks, 400, Bench::raw_put, Bench::our_put).await?;
        cost::row(
            &bench,
            "put in a transaction",
            tasks,
            400,
            Bench::raw_txn,
            Bench::our_put,
        )
        .await?;
        cost::row(
            &bench,
            "put 8 segments deep",
            tasks,
            400,
            Bench::raw_deep_put,
            Bench::our_deep_put,
        )
        .await?;
        cost::row(&bench, "get", tasks, 600, Bench::raw_get, Bench::our_get).await?;
        cost::row(&bench, "list 100 entries", tasks, 150, Bench::raw_list, Bench::our_list).await?;
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
        for entry in 0..LISTED {
            self.ours.put(&key(&format!("/listed/{entry}")), VALUE.to_vec()).await?;
        }
        Ok(())
    }

    fn kv(&self) -> KvClient {
        self.raw.kv_client()
    }

    async fn raw_put(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.kv()
                .put(format!("/raw/{task}-{}", round % 10), VALUE, None)
                .await?;
        }
        Ok(())
    }

    /// A put with the one comparison that the contract asks of every put.
    async fn raw_txn(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            let name = format!("/raw/{task}-{}", round % 10);
            let persistent = Compare::lease(name.clone(), CompareOp::Equal, 0);
            let txn = Txn::new().when([persistent]).and_then([TxnOp::put(name, VALUE, None)]);
            assert!(self.kv().txn(txn).await?.succeeded());
        }
        Ok(())
    }

    async fn our_put(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.ours
                .put(&key(&format!("/{task}-{}", round % 10)), VALUE.to_vec())
                .await?;
        }
        Ok(())
    }

    async fn raw_deep_put(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.kv()
                .put(format!("/raw/a/b/c/d/e/f/g/{task}-{}", round % 10), VALUE, None)
                .await?;
        }
        Ok(())
    }

    async fn our_deep_put(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.ours
                .put(&key(&format!("/a/b/c/d/e/f/g/{task}-{}", round % 10)), VALUE.to_vec())
                .await?;
        }
        Ok(())
    }

    async fn raw_get(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.kv().get(format!("/raw/{task}-{}", round % 10), None).await?;
        }
        Ok(())
    }

    async fn our_get(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.ours
                .get(&key(&format!("/{task}-{}", round % 10)), Read::Linearizable)
                .await?;
        }
        Ok(())
    }

    async fn raw_list(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let options = GetOptions::new().with_prefix();
            let listed = self.kv().get("/registry/listed/", Some(options)).await?;
            assert_eq!(listed.kvs().len(), LISTED);
        }
        Ok(())
    }

    async fn our_list(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let listed = self.ours.list(List::new(key("/listed"))).await?;
            assert_eq!(listed.entries.len(), LISTED);
        }
        Ok(())
    }

    async fn raw_watch(self, _task: usize, count: usize) -> Done {
        let options = WatchOptions::new().with_prefix();
        let mut watch = self.raw.watch_client().watch("/raw/watched/", Some(options)).await?;
        for _ in 0..count {
            self.kv().put("/raw/watched/key", VALUE, None).await?;
            while watch
                .message()
                .await?
                .is_none_or(|response| response.events().is_empty())
            {}
        }
        Ok(())
    }

    async fn our_watch(self, _task: usize, count: usize) -> Done {
        cost::put_until_told(&*self.ours, &key("/watched/key"), &VALUE, count).await
    }

    async fn raw_lock(mut self, _task: usize, count: usize) -> Done {
        let lease = self.raw.lease_grant(60, None).await?.id();
        for _ in 0..count {
            let options = LockOptions::new().with_lease(lease);
            let held = self.raw.lock("/raw/lock", Some(options)).await?;
            self.raw.unlock(held.key()).await?;
        }
        self.raw.lease_revoke(lease).await?;
        Ok(())
    }

    async fn our_lock(self, _task: usize, count: usize) -> Done {
        cost::lock_and_unlock(self.ours, &key("/lock"), count).await
    }
}
