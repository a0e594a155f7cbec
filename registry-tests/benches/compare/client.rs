//! The same work through each store's own client: ours, `etcd-client` and `zookeeper-client`.

use std::sync::Arc;

use etcd_client::{GetOptions, Txn as EtcdTxn, TxnOp};
use futures_util::{StreamExt, TryStreamExt, stream};
use registry_api::{BoxError, Key, List, Prefix, Read, Registry, Txn};
use zookeeper_client::{Acls, CreateMode, CreateOptions};

pub(crate) const VALUE: [u8; 256] = [b'v'; 256];
/// Above all keys, each of which has 65 bytes.
pub(crate) const TABLE: &str = "/bench/keys/of/sixty/five/bytes/as/in/all/those/tables/of";
/// How many keys are put in one request to fill a store, and how many such requests are on their way at once.
const BATCH: usize = 64;
const IN_FLIGHT: usize = 32;
pub(crate) const OPEN: CreateOptions<'static> = CreateMode::Persistent.with_acls(Acls::anyone_all());

/// One connection, shared by all tasks.
#[derive(Clone)]
pub(crate) enum Client {
    Ours(Arc<dyn Registry>),
    Etcd(Arc<etcd_client::Client>),
    Zk(zookeeper_client::Client),
}

pub(crate) fn name(n: usize) -> String {
    format!("{TABLE}/{n:07}")
}

pub(crate) fn key(name: &str) -> Key {
    Key::parse(name).expect("it is one")
}

impl Client {
    pub(crate) async fn put(self, n: usize) -> Result<(), BoxError> {
        match self {
            Self::Ours(registry) => drop(registry.put(&key(&name(n)), VALUE.to_vec()).await?),
            Self::Etcd(client) => drop(client.kv_client().put(name(n), VALUE, None).await?),
            Self::Zk(client) => drop(client.set_data(&name(n), &VALUE, None).await?),
        }
        Ok(())
    }

    /// A linearizable get; ZooKeeper's nearest to it is a `sync` before it, on the same connection.
    pub(crate) async fn get(self, n: usize) -> Result<(), BoxError> {
        let found = match self {
            Self::Ours(registry) => registry
                .get(&key(&name(n)), Read::Linearizable)
                .await?
                .map(|entry| entry.value.len()),
            Self::Etcd(client) => {
                let answer = client.kv_client().get(name(n), None).await?;
                answer.kvs().first().map(|entry| entry.value().len())
            }
            Self::Zk(client) => {
                let name = name(n);
                let synced = client.sync(&name);
                let (value, _) = client.get_data(&name).await?;
                synced.await?;
                Some(value.len())
            }
        };
        match found {
            Some(length) if length == VALUE.len() => Ok(()),
            other => Err(format!("key {n}: {other:?}").into()),
        }
    }

    /// Ten keys, from one on.
    pub(crate) async fn page(self, n: usize) -> Result<(), BoxError> {
        let found = match self {
            Self::Ours(registry) => {
                let list = List {
                    after: Some(key(&name(n))),
                    limit: 10,
                    ..List::new(key(TABLE))
                };
                registry.list(list).await?.entries.len()
            }
            Self::Etcd(client) => {
                let options = GetOptions::new().with_range(format!("{TABLE}0")).with_limit(10);
                client.kv_client().get(name(n), Some(options)).await?.kvs().len()
            }
            Self::Zk(_) => return Err("ZooKeeper has no pages".into()),
        };
        match found {
            10 => Ok(()),
            other => Err(format!("{other} keys from {n} on").into()),
        }
    }

    /// How many keys there are.
    pub(crate) async fn count(self) -> Result<u64, BoxError> {
        match self {
            Self::Ours(registry) => Ok(registry.count(&Prefix::from(key(TABLE)), Read::Linearizable).await?),
            Self::Etcd(client) => {
                let options = GetOptions::new().with_prefix().with_count_only();
                let counted = client.kv_client().get(format!("{TABLE}/"), Some(options)).await?;
                Ok(counted.count().try_into()?)
            }
            Self::Zk(_) => Err("ZooKeeper counts no subtree that is not its own quota's".into()),
        }
    }

    /// Puts the keys of these numbers.
    pub(crate) async fn fill(&self, from: usize, to: usize) -> Result<(), BoxError> {
        if let Self::Zk(client) = self {
            for end in (1..=TABLE.len()).filter(|end| *end == TABLE.len() || TABLE.as_bytes()[*end] == b'/') {
                client.create(&TABLE[..end], b"", &OPEN).await?;
            }
        }
        let batches =
            stream::iter((from..to).step_by(BATCH)).map(|first| self.clone().put_all(first..(first + BATCH).min(to)));
        batches.buffer_unordered(IN_FLIGHT).try_collect().await
    }

    async fn put_all(self, numbers: std::ops::Range<usize>) -> Result<(), BoxError> {
        match self {
            Self::Ours(registry) => {
                let puts = numbers.fold(Txn::new(), |txn, n| txn.put(&key(&name(n)), VALUE.to_vec()));
                registry.commit(puts).await?;
            }
            Self::Etcd(client) => {
                let puts: Vec<_> = numbers.map(|n| TxnOp::put(name(n), VALUE, None)).collect();
                client.kv_client().txn(EtcdTxn::new().and_then(puts)).await?;
            }
            Self::Zk(client) => {
                let names: Vec<_> = numbers.map(name).collect();
                let creates: Vec<_> = names.iter().map(|name| client.create(name, &VALUE, &OPEN)).collect();
                for created in creates {
                    created.await?;
                }
            }
        }
        Ok(())
    }
}
