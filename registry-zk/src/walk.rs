//! Reading many keys: pages, counts, children.
//!
//! ZooKeeper has a tree where the contract has sorted names, and the two orders differ: `/a!` sorts between `/a` and
//! `/a/b`. So the walk keeps a queue, sorted by name, of nodes still to be read and of nodes whose children are still to be
//! listed, and takes what comes first. It reads values in batches, each one request and one snapshot.
//!
//! ZooKeeper does not bound a response, and keep-alives wait behind it on the same connection. So a batch is of few nodes,
//! whose values may be large. Once one was, the lengths of values are read first, which costs a request for each.

use std::collections::BTreeMap;

use futures_util::future::try_join_all;
use registry_api::{Depth, Entry, List, Page, Prefix, Read, Result};
use tokio::time::Instant;
use zookeeper_client::{Client, Error as ClientError, MultiReadResult, Stat};

use crate::names::{Data, Names, may_be_mark, may_have_birth, newest, revision};
use crate::store::{Conn, Store};

/// How many nodes are read in one request without knowing the lengths of their values, of at most 900,000 bytes each; and
/// how many such requests are in flight at most: twice as many each time that all values were small.
const FEW: usize = 8;
const ABREAST: usize = 16;
/// Where a value was larger than this, lengths are read first.
const LARGE: usize = 4096;
/// The most bytes of a request's values where their lengths are known, and how many lengths are read at a time.
pub(crate) const BATCH_BYTES: usize = 1 << 20;
const LENGTHS: usize = 64;
/// How many single requests are under way at once.
pub(crate) const PIPELINE: usize = 128;
/// The most entries of a page, and how many bytes of keys and values end one: as on the other stores.
const MAX_PAGE: usize = 4096;
const MAX_PAGE_BYTES: usize = 4 << 20;

/// A znode as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) data: Data,
    pub(crate) stat: Stat,
    /// The `czxid` of its birth znode, where it may have one and that was read.
    pub(crate) birth: Option<i64>,
}

impl Found {
    pub(crate) fn is_mark(&self) -> bool {
        self.data == Data::Mark
    }

    /// The change that created the key. A birth znode that is older than the node is of an earlier one.
    pub(crate) fn created(&self) -> i64 {
        self.birth.unwrap_or_default().max(self.stat.czxid)
    }

    fn may_have_birth(&self) -> bool {
        !self.is_mark() && may_have_birth(&self.stat)
    }
}

/// Whether the values are wanted, or only whether there are any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Values {
    Wanted,
    Omitted,
    /// Only whether there are any, of the nodes that may be read; others are passed over.
    OmittedAndDenied,
}

/// Reads nodes in batches that are small whatever their values are.
#[derive(Debug)]
pub(crate) struct Fetch {
    values: Values,
    /// Whether a value was large.
    large: bool,
    /// How many requests are sent at once.
    abreast: usize,
}

impl Fetch {
    pub(crate) fn new(values: Values) -> Self {
        Self {
            values,
            large: false,
            abreast: 1,
        }
    }

    /// Reads the first of these nodes, at least one group. The nodes of a group are read in one request. `most` bounds
    /// the bytes of their values where a value was large before.
    pub(crate) async fn first(
        &mut self,
        client: &Client,
        groups: &[Vec<String>],
        most: usize,
    ) -> Result<Vec<Vec<Option<Found>>>, ClientError> {
        let read = if !self.large {
            let mut left = groups;
            let mut batches = Vec::new();
            while !left.is_empty() && batches.len() < self.abreast {
                let (batch, rest) = left.split_at(how_many(left.iter().map(Vec::len), FEW));
                batches.push(batch.concat());
                left = rest;
            }
            let read = batches.iter().map(|paths| self.snapshot(client, paths));
            try_join_all(read).await?.concat()
        } else if self.values != Values::Wanted {
            self.look(client, &groups.concat()).await?
        } else {
            let groups = &groups[..how_many(groups.iter().map(Vec::len), LENGTHS)];
            let paths = groups.concat();
            let stats = try_join_all(paths.iter().map(|path| client.check_stat(path))).await?;
            let mut lengths = stats.iter().map(|stat| stat.as_ref().map_or(0, length));
            let group = |group: &Vec<String>| lengths.by_ref().take(group.len()).sum();
            let groups = &groups[..how_many(groups.iter().map(group), most.min(BATCH_BYTES))];
            self.snapshot(client, &groups.concat()).await?
        };
        self.abreast = (2 * self.abreast).min(ABREAST);
        self.large |= read.iter().flatten().any(|found| length(&found.stat) > LARGE);
        let mut read = read.into_iter();
        let group = |group: &Vec<String>| read.by_ref().take(group.len()).collect::<Vec<_>>();
        Ok(groups.iter().map(group).take_while(|group| !group.is_empty()).collect())
    }

    /// Reads nodes as they are at one moment, which takes one request whatever its size.
    async fn snapshot(&self, client: &Client, paths: &[String]) -> Result<Vec<Option<Found>>, ClientError> {
        let mut reader = client.new_multi_reader();
        for path in paths {
            reader.add_get_data(path)?;
        }
        let mut found = Vec::with_capacity(paths.len());
        for result in reader.commit().await? {
            found.push(match result {
                MultiReadResult::Data { data, stat } => Some(Found {
                    data: Data::decode(data),
                    stat,
                    birth: None,
                }),
                MultiReadResult::Error { err } if self.passes_over(&err) => None,
                MultiReadResult::Error { err } => return Err(err),
                _ => return Err(ClientError::UnexpectedError("no answer to a read of data".into())),
            });
        }
        if found.len() != paths.len() {
            return Err(ClientError::UnexpectedError("fewer answers than reads".into()));
        }
        Ok(found)
    }

    /// Reads nodes without their values.
    async fn look(&self, client: &Client, paths: &[String]) -> Result<Vec<Option<Found>>, ClientError> {
        let look = async |path: &String| match look_at(client, path).await {
            Err(error) if self.passes_over(&error) => Ok(None),
            looked => looked,
        };
        let mut found = Vec::with_capacity(paths.len());
        for paths in paths.chunks(PIPELINE) {
            found.extend(try_join_all(paths.iter().map(look)).await?);
        }
        Ok(found)
    }

    fn passes_over(&self, error: &ClientError) -> bool {
        match error {
            ClientError::NoNode => true,
            ClientError::NoAuth => self.values == Values::OmittedAndDenied,
            _ => false,
        }
    }
}

/// Returns how many of these have at most so much in all, at least one.
fn how_many(sizes: impl Iterator<Item = usize>, most: usize) -> usize {
    let mut sum = 0;
    let fits = |size: &usize| {
        sum += size;
        sum <= most
    };
    sizes.take_while(fits).count().max(1)
}

fn length(stat: &Stat) -> usize {
    usize::try_from(stat.data_length).unwrap_or(0)
}

/// Reads a node without its value: only what is as long as the mark is read whole.
pub(crate) async fn look_at(client: &Client, path: &str) -> Result<Option<Found>, ClientError> {
    let Some(stat) = client.check_stat(path).await? else {
        return Ok(None);
    };
    if may_be_mark(&stat) {
        return get(client, path).await;
    }
    let data = Data::Value(bytes::Bytes::new());
    Ok(Some(Found {
        data,
        stat,
        birth: None,
    }))
}

/// Reads a node.
pub(crate) async fn get(client: &Client, path: &str) -> Result<Option<Found>, ClientError> {
    match client.get_data(path).await {
        Ok((data, stat)) => Ok(Some(Found {
            data: Data::decode(data),
            stat,
            birth: None,
        })),
        Err(ClientError::NoNode) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a key's node, with its birth.
pub(crate) async fn get_key(names: &Names, client: &Client, path: &str) -> Result<Option<Found>, ClientError> {
    let mut found = vec![get(client, path).await?];
    read_births(names, client, &[path.to_owned()], &mut found).await?;
    Ok(found.pop().flatten())
}

/// Reads nodes that may have a birth znode again, each together with that.
pub(crate) async fn read_births(
    names: &Names,
    client: &Client,
    paths: &[String],
    found: &mut [Option<Found>],
) -> Result<(), ClientError> {
    let wanted = |(place, found): (usize, &Option<Found>)| {
        let birth = names.birth(paths.get(place)?)?;
        found
            .as_ref()
            .is_some_and(Found::may_have_birth)
            .then_some((place, birth))
    };
    let wanted: Vec<_> = found.iter().enumerate().filter_map(wanted).collect();
    let pair = |(place, birth): &(usize, String)| vec![paths[*place].clone(), birth.clone()];
    let pairs: Vec<_> = wanted.iter().map(pair).collect();
    let mut fetch = Fetch::new(Values::Wanted);
    let mut read = 0;
    while read < pairs.len() {
        for nodes in fetch.first(client, &pairs[read..], BATCH_BYTES).await? {
            let [node, birth] = nodes.try_into().unwrap_or_default();
            let birth = birth.map(|birth| birth.stat.czxid);
            found[wanted[read].0] = node.map(|node| Found { birth, ..node });
            read += 1;
        }
    }
    Ok(())
}

/// The names of the nodes below, and the newest change among them; none where the node is not there.
async fn list_children(client: &Client, path: &str) -> Result<(Vec<String>, i64), ClientError> {
    match client.get_children(path).await {
        Ok((names, stat)) => Ok((names, stat.pzxid)),
        Err(ClientError::NoNode) => Ok((Vec::new(), 0)),
        Err(error) => Err(error),
    }
}

/// A node on its way through the walk.
enum Item {
    Unread,
    Read(Option<Found>),
    /// The children of the node are to be listed. Its place in the queue ends with `/`.
    Below,
}

/// A walk over a part of the tree, in the order of the names.
pub(crate) struct Walk<'a> {
    names: &'a Names,
    client: &'a Client,
    depth: Depth,
    after: Option<String>,
    /// Also the nodes of other clients that no key can name.
    foreign: bool,
    queue: BTreeMap<String, Item>,
    fetch: Fetch,
    /// The newest change that was seen.
    pub(crate) newest: i64,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(names: &'a Names, client: &'a Client, prefix: &Prefix, depth: Depth, values: Values) -> Self {
        let mut walk = Self {
            names,
            client,
            depth,
            after: None,
            foreign: false,
            queue: BTreeMap::new(),
            fetch: Fetch::new(values),
            newest: 0,
        };
        let path = names.prefix(prefix);
        match (depth, prefix.key()) {
            (Depth::Subtree, Some(_)) => drop(walk.queue.insert(path, Item::Unread)),
            // The root holds no value.
            _ => drop(walk.queue.insert(format!("{path}/"), Item::Below)),
        }
        walk
    }

    /// A walk over all that is below a path and may be read, whatever its name.
    pub(crate) fn below(names: &'a Names, client: &'a Client, path: &str) -> Self {
        let values = Values::OmittedAndDenied;
        let mut walk = Self::new(names, client, &Prefix::root(), Depth::Subtree, values).with_foreign();
        walk.queue = BTreeMap::from([(format!("{path}/"), Item::Below)]);
        walk
    }

    /// From behind this path on.
    pub(crate) fn after(mut self, path: String) -> Self {
        for (start, item) in std::mem::take(&mut self.queue) {
            match item {
                Item::Below => drop(self.queue.insert(start, item)),
                _ => {
                    self.after = Some(path.clone());
                    self.add(start);
                }
            }
        }
        self.after = Some(path);
        self
    }

    pub(crate) fn with_foreign(mut self) -> Self {
        self.foreign = true;
        self
    }

    /// The next nodes, at most so many that hold values and until these are that many bytes; and whether there may be more.
    pub(crate) async fn next(
        &mut self,
        limit: usize,
        most: usize,
    ) -> Result<(Vec<(String, Found)>, bool), ClientError> {
        let mut nodes = Vec::new();
        let (mut values, mut bytes) = (0, 0);
        while values < limit && bytes < most {
            let Some((place, item)) = self.queue.pop_first() else {
                return Ok((nodes, false));
            };
            match item {
                Item::Below => {
                    let (names, newest) = list_children(self.client, &place[..place.len() - 1]).await?;
                    self.newest = self.newest.max(newest);
                    for name in names {
                        self.add(format!("{place}{name}"));
                    }
                }
                Item::Unread => {
                    self.queue.insert(place, item);
                    self.read(limit - values, most - bytes).await?;
                }
                Item::Read(None) => {}
                Item::Read(Some(found)) => {
                    self.newest = self.newest.max(newest(&found.stat));
                    if found.stat.num_children > 0 && self.depth == Depth::Subtree {
                        self.queue.insert(format!("{place}/"), Item::Below);
                    }
                    if let Data::Value(value) = &found.data {
                        values += 1;
                        bytes += place.len() + value.len();
                    }
                    nodes.push((place, found));
                }
            }
        }
        Ok((nodes, !self.queue.is_empty()))
    }

    /// All nodes.
    pub(crate) async fn all(mut self) -> Result<(Vec<(String, Found)>, i64), ClientError> {
        let (nodes, _) = self.next(usize::MAX, usize::MAX).await?;
        Ok((nodes, self.newest))
    }

    fn add(&mut self, path: String) {
        if !self.foreign && self.names.key(&path).is_none() {
            return;
        }
        let Some(after) = self.after.as_deref() else {
            self.queue.insert(path, Item::Unread);
            return;
        };
        if after < path.as_str() {
            self.queue.insert(path, Item::Unread);
        } else if self.depth == Depth::Subtree && after < format!("{path}0").as_str() {
            // The node is behind us, what is below it not all.
            self.queue.insert(format!("{path}/"), Item::Below);
        }
    }

    /// Reads the first nodes of the queue, at most so many, and about as many bytes as a page has room for.
    async fn read(&mut self, limit: usize, most: usize) -> Result<(), ClientError> {
        let unread = |(path, item): (&String, &Item)| matches!(item, Item::Unread).then(|| vec![path.clone()]);
        let first: Vec<_> = self.queue.iter().filter_map(unread).take(limit.min(PIPELINE)).collect();
        let found = self.fetch.first(self.client, &first, most).await?;
        let mut found: Vec<_> = found.into_iter().flatten().collect();
        let paths: Vec<_> = first.into_iter().flatten().take(found.len()).collect();
        if self.fetch.values == Values::Wanted {
            read_births(self.names, self.client, &paths, &mut found).await?;
        }
        for (path, found) in paths.into_iter().zip(found) {
            self.queue.insert(path, Item::Read(found));
        }
        Ok(())
    }
}

/// The entries among nodes.
pub(crate) fn entries(names: &Names, nodes: Vec<(String, Found)>) -> Vec<Entry> {
    nodes
        .into_iter()
        .filter_map(|(path, found)| entry(names, &path, found))
        .collect()
}

/// The entry in a node; `None` for a placeholder, and for one that no key names.
pub(crate) fn entry(names: &Names, path: &str, found: Found) -> Option<Entry> {
    let created = found.created();
    match found.data {
        Data::Value(value) => names.entry(path, value, &found.stat, created),
        Data::Mark => None,
    }
}

impl Store {
    /// One linearizable or stale read on one connection, asked again until it is answered.
    async fn read_as<T, F>(
        &self,
        read: Read,
        deadline: Instant,
        ask: impl Fn(std::sync::Arc<Conn>) -> F + Sync,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, ClientError>> + Send,
    {
        self.read(deadline, |conn| {
            let ask = &ask;
            async move {
                match read {
                    Read::Stale => ask(conn).await,
                    Read::Linearizable => {
                        // Sent before what follows it, and answered in that order.
                        let fresh = self.fresh(&conn);
                        let answer = ask(conn.clone()).await?;
                        fresh.await?;
                        Ok(answer)
                    }
                }
            }
        })
        .await
    }

    pub(crate) async fn get(&self, path: &str, read: Read) -> Result<Option<Found>> {
        self.read_as(read, self.deadline(), |conn| async move {
            get_key(&self.names, &conn.client, path).await
        })
        .await
    }

    pub(crate) async fn children(&self, prefix: &Prefix, read: Read) -> Result<Vec<String>> {
        let path = &self.names.prefix(prefix);
        let (mut names, newest) = self
            .read_as(read, self.deadline(), |conn| async move {
                list_children(&conn.client, path).await
            })
            .await?;
        self.saw(newest);
        names.retain(|name| prefix.child(name).is_ok());
        names.sort_unstable();
        Ok(names)
    }

    pub(crate) async fn page(&self, list: &List) -> Result<Page> {
        let before = self.seen();
        let after = list.after.as_ref().map(|key| self.names.path(key));
        let (nodes, more, newest) = self
            .read_as(list.read, self.deadline(), |conn| {
                let after = after.clone();
                async move {
                    let mut walk = Walk::new(&self.names, &conn.client, &list.prefix, list.depth, Values::Wanted);
                    if let Some(after) = after {
                        walk = walk.after(after);
                    }
                    let (nodes, more) = walk.next(list.limit.min(MAX_PAGE), MAX_PAGE_BYTES).await?;
                    Ok((nodes, more, walk.newest))
                }
            })
            .await?;
        let entries = entries(&self.names, nodes);
        self.saw(newest);
        Ok(Page {
            next: more.then(|| entries.last().map(|entry| entry.key.clone())).flatten(),
            entries,
            revision: revision(newest.max(before)),
        })
    }

    pub(crate) async fn count(&self, prefix: &Prefix, read: Read) -> Result<u64> {
        self.read_as(read, self.deadline(), |conn| async move {
            let walk = Walk::new(&self.names, &conn.client, prefix, Depth::Subtree, Values::Omitted);
            let (nodes, _) = walk.all().await?;
            Ok(nodes.iter().filter(|(_, found)| !found.is_mark()).count() as u64)
        })
        .await
    }

    /// The newest change to any key's being there, as a server knows it.
    pub(crate) async fn now(&self, client: &Client) -> Result<i64, ClientError> {
        let names = &self.names;
        let mut paths = vec![names.clock(), names.root().to_owned()];
        paths.extend(crate::names::GUARDS.map(|part| names.guard(part)));
        let found = Fetch::new(Values::Omitted).snapshot(client, &paths).await?;
        Ok(found
            .iter()
            .flatten()
            .map(|found| newest(&found.stat))
            .max()
            .unwrap_or(0))
    }
}
