//! What the abstraction costs: the same work through `etcd-client` and through the registry, in one run.
//!
//! `cargo bench -p registry-etcd` starts an etcd of its own on loopback.

#[path = "../tests/harness/mod.rs"]
mod harness;

use etcd_client::{Client, Compare, CompareOp, GetOptions, KvClient, LockOptions, Txn, TxnOp, WatchOptions};
use registry_tests::cost::{self, Done, KEYS, LISTED, Ours, VALUE};

#[tokio::main]
async fn main() -> Done {
    if !cost::is_wanted() {
        return Ok(());
    }
    let server = harness::Servers::start(1).await;
    let raw = &Raw(Client::connect(server.endpoints(), None).await?);
    let ours = &Ours(harness::connect(&server.endpoints()).await);
    ours.fill().await?;

    cost::head("etcd-client");
    for tasks in [1, 64] {
        cost::row("put", tasks, 400, (raw, Raw::put), (ours, Ours::put)).await?;
        let name = "put, against a transaction that compares a lease";
        cost::row(name, tasks, 400, (raw, Raw::put_compared), (ours, Ours::put)).await?;
        let name = "put 8 segments deep";
        cost::row(name, tasks, 400, (raw, Raw::put_deep), (ours, Ours::put_deep)).await?;
        cost::row("get", tasks, 600, (raw, Raw::get), (ours, Ours::get)).await?;
        cost::row("list of 100", tasks, 150, (raw, Raw::list), (ours, Ours::list)).await?;
    }
    // What etcd itself takes for it, in the columns of the two sides.
    let name = "etcd's put, and its transaction of a put";
    cost::row(name, 1, 400, (raw, Raw::put), (raw, Raw::put_in_txn)).await?;
    let name = "etcd's transaction of a put, and a compare";
    cost::row(name, 1, 400, (raw, Raw::put_in_txn), (raw, Raw::put_compared)).await?;
    let name = "put until its watch tells";
    cost::row(name, 1, 300, (raw, Raw::put_until_told), (ours, Ours::put_until_told)).await?;
    let name = "lock and unlock, against the lock RPC";
    cost::row(name, 1, 300, (raw, Raw::lock), (ours, Ours::lock)).await?;
    ours.0.close().await?;
    Ok(())
}

/// The bare client's side.
#[derive(Clone)]
struct Raw(Client);

impl Raw {
    fn kv(&self) -> KvClient {
        self.0.kv_client()
    }

    async fn put(self, task: usize, count: usize) -> Done {
        self.put_below("/raw", task, count).await
    }

    async fn put_deep(self, task: usize, count: usize) -> Done {
        self.put_below("/raw/a/b/c/d/e/f/g", task, count).await
    }

    async fn put_below(self, parent: &str, task: usize, count: usize) -> Done {
        for round in 0..count {
            let name = format!("{parent}/{task}-{}", round % KEYS);
            self.kv().put(name, VALUE, None).await?;
        }
        Ok(())
    }

    async fn put_in_txn(self, task: usize, count: usize) -> Done {
        self.put_if(|_| Vec::new(), task, count).await
    }

    /// A put with the one comparison that the contract asks of every put.
    async fn put_compared(self, task: usize, count: usize) -> Done {
        let persistent = |name: &str| vec![Compare::lease(name, CompareOp::Equal, 0)];
        self.put_if(persistent, task, count).await
    }

    async fn put_if(self, compares: impl Fn(&str) -> Vec<Compare>, task: usize, count: usize) -> Done {
        for round in 0..count {
            let name = format!("/raw/{task}-{}", round % KEYS);
            let txn = Txn::new().when(compares(&name));
            let txn = txn.and_then([TxnOp::put(name, VALUE, None)]);
            assert!(self.kv().txn(txn).await?.succeeded());
        }
        Ok(())
    }

    async fn get(self, task: usize, count: usize) -> Done {
        for round in 0..count {
            self.kv().get(format!("/raw/{task}-{}", round % KEYS), None).await?;
        }
        Ok(())
    }

    async fn list(self, _task: usize, count: usize) -> Done {
        for _ in 0..count {
            let options = GetOptions::new().with_prefix();
            let listed = self.kv().get("/registry/listed/", Some(options)).await?;
            assert_eq!(listed.kvs().len(), LISTED);
        }
        Ok(())
    }

    async fn put_until_told(self, _task: usize, count: usize) -> Done {
        let options = WatchOptions::new().with_prefix();
        let mut watch = self.0.watch_client().watch("/raw/watched/", Some(options)).await?;
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

    async fn lock(mut self, _task: usize, count: usize) -> Done {
        let lease = self.0.lease_grant(60, None).await?.id();
        for _ in 0..count {
            let options = LockOptions::new().with_lease(lease);
            let held = self.0.lock("/raw/lock", Some(options)).await?;
            self.0.unlock(held.key()).await?;
        }
        self.0.lease_revoke(lease).await?;
        Ok(())
    }
}
