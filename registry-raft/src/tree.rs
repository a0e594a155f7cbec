//! The ordered store: a copy-on-write B+ tree that counts.
//!
//! A clone is one reference, and a frozen picture of the whole store: snapshots and watches read one while writes go on,
//! which then copy the nodes they change, a handful each. Every inner node knows how many records are below it, so
//! counting a prefix and paging cost the depth of the tree, not its size.

mod slots;

use std::sync::Arc;

use bytes::Bytes;
use slots::{Keyed, Slots};

/// The most slots of a node. A node that falls below a quarter is merged with a neighbour where both fit in one.
const MAX: usize = 64;

/// A key with its value, as one revision left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The name with its namespace.
    pub(crate) key: Arc<str>,
    pub(crate) value: Bytes,
    pub(crate) create_revision: u64,
    pub(crate) mod_revision: u64,
    /// How often the key was put since it was created.
    pub(crate) version: u64,
    /// The session it ends with, or zero.
    pub(crate) session: u64,
}

/// Records by key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    root: Arc<Node>,
}

#[derive(Clone, Debug)]
enum Node {
    Leaf(Slots<Arc<Record>>),
    Inner(Slots<Child>),
}

#[derive(Clone, Debug)]
struct Child {
    /// No key below is smaller, and none before is as large.
    first: Arc<str>,
    len: usize,
    node: Arc<Node>,
}

impl Keyed for Arc<Record> {
    fn key(&self) -> &Arc<str> {
        &self.key
    }
}

impl Keyed for Child {
    fn key(&self) -> &Arc<str> {
        &self.first
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::Leaf(Slots::default())
    }
}

impl Tree {
    pub(crate) fn len(&self) -> usize {
        self.root.len()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Arc<Record>> {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Inner(children) => node = &children[child_for(children, key)].node,
                Node::Leaf(records) => return records.find(key).ok().map(|at| &records[at]),
            }
        }
    }

    /// Puts a record and answers the one it replaced.
    pub(crate) fn insert(&mut self, record: Arc<Record>) -> Option<Arc<Record>> {
        let key = record.key.clone();
        self.put(&key, |_| record).1
    }

    /// Puts a record of that key, made in the light of the one it replaces, and answers both.
    pub(crate) fn put(
        &mut self,
        key: &str,
        make: impl FnOnce(Option<&Arc<Record>>) -> Arc<Record>,
    ) -> (Arc<Record>, Option<Arc<Record>>) {
        let Put { new, old, split } = put(&mut self.root, key, make);
        if let Some(right) = split {
            let left = Child::of(std::mem::take(&mut self.root));
            self.root = Arc::new(Node::Inner(Slots::of(vec![left, right])));
        }
        (new, old)
    }

    /// Takes a record out.
    pub(crate) fn remove(&mut self, key: &str) -> Option<Arc<Record>> {
        // Looked for first, so that a miss copies no node.
        self.get(key)?;
        let removed = remove(&mut self.root, key);
        if let Node::Inner(children) = &*self.root
            && let [only] = &children[..]
        {
            self.root = only.node.clone();
        }
        removed
    }

    /// How many records come before `key`.
    pub(crate) fn rank(&self, key: &str) -> usize {
        let (mut node, mut before) = (&*self.root, 0);
        loop {
            match node {
                Node::Inner(children) => {
                    let at = child_for(children, key);
                    before += children[..at].iter().map(|child| child.len).sum::<usize>();
                    node = &children[at].node;
                }
                Node::Leaf(records) => return before + records.find(key).unwrap_or_else(|at| at),
            }
        }
    }

    /// How many records are in `from..to`.
    pub(crate) fn count(&self, from: &str, to: &str) -> usize {
        self.rank(to).saturating_sub(self.rank(from))
    }

    /// The records from `key` on, in order.
    pub(crate) fn from(&self, key: &str) -> Iter<'_> {
        let mut path = Vec::new();
        let mut node = &*self.root;
        loop {
            match node {
                Node::Inner(children) => {
                    let at = child_for(children, key);
                    path.push((&children[..], at + 1));
                    node = &children[at].node;
                }
                Node::Leaf(records) => {
                    let at = records.find(key).unwrap_or_else(|at| at);
                    return Iter {
                        path,
                        leaf: records[at..].iter(),
                    };
                }
            }
        }
    }

    /// The records of `from..to`, in order.
    pub(crate) fn range<'t>(&'t self, from: &str, to: &'t str) -> impl Iterator<Item = &'t Arc<Record>> {
        self.from(from).take_while(move |record| &*record.key < to)
    }
}

impl Node {
    fn len(&self) -> usize {
        match self {
            Self::Leaf(records) => records.len(),
            Self::Inner(children) => children.iter().map(|child| child.len).sum(),
        }
    }

    fn slots(&self) -> usize {
        match self {
            Self::Leaf(records) => records.len(),
            Self::Inner(children) => children.len(),
        }
    }
}

impl Child {
    fn of(node: Arc<Node>) -> Self {
        let first = match &*node {
            Node::Leaf(records) => records.first().map_or_else(|| "".into(), |record| record.key.clone()),
            Node::Inner(children) => children[0].first.clone(),
        };
        Self {
            first,
            len: node.len(),
            node,
        }
    }
}

/// The child that holds the key if any does: the last whose first key is not larger.
fn child_for(children: &Slots<Child>, key: &str) -> usize {
    children.find(key).unwrap_or_else(|at| at.saturating_sub(1))
}

/// What came of a put.
struct Put {
    new: Arc<Record>,
    old: Option<Arc<Record>>,
    /// A new right neighbour of the node, if it was split.
    split: Option<Child>,
}

fn put(node: &mut Arc<Node>, key: &str, make: impl FnOnce(Option<&Arc<Record>>) -> Arc<Record>) -> Put {
    let node = Arc::make_mut(node);
    // Where the last slot was written: a split there leaves the left node full, as keys that come in order need it.
    let (mut put, at_end) = match node {
        Node::Leaf(records) => {
            let found = records.find(key);
            let new = make(found.ok().map(|at| &records[at]));
            let mut put = Put {
                new: new.clone(),
                old: None,
                split: None,
            };
            let at_end = match found {
                Ok(at) => {
                    put.old = Some(std::mem::replace(&mut records[at], new));
                    false
                }
                Err(at) => {
                    records.insert(at, new);
                    at + 1 == records.len()
                }
            };
            (put, at_end)
        }
        Node::Inner(children) => {
            let at = child_for(children, key);
            let child = &mut children[at];
            let mut put = put(&mut child.node, key, make);
            child.len += usize::from(put.old.is_none());
            if at == 0 && put.new.key < child.first {
                child.first = put.new.key.clone();
                children.rekeyed(at);
            }
            let at_end = match put.split.take() {
                Some(right) => {
                    children[at].len -= right.len;
                    children.insert(at + 1, right);
                    at + 2 == children.len()
                }
                None => false,
            };
            (put, at_end)
        }
    };
    put.split = (node.slots() > MAX).then(|| {
        let keep = if at_end { MAX } else { node.slots() / 2 };
        let right = match node {
            Node::Leaf(records) => Node::Leaf(records.split_off(keep)),
            Node::Inner(children) => Node::Inner(children.split_off(keep)),
        };
        Child::of(Arc::new(right))
    });
    put
}

fn remove(node: &mut Arc<Node>, key: &str) -> Option<Arc<Record>> {
    match Arc::make_mut(node) {
        Node::Leaf(records) => records.find(key).ok().map(|at| records.remove(at)),
        Node::Inner(children) => {
            let at = child_for(children, key);
            let removed = remove(&mut children[at].node, key)?;
            children[at].len -= 1;
            if children[at].node.slots() < MAX / 4 {
                merge(children, at);
            }
            Some(removed)
        }
    }
}

/// Merges a small child with a neighbour, if both fit in one node.
fn merge(children: &mut Slots<Child>, at: usize) {
    let left = at.saturating_sub(1);
    if left + 1 >= children.len() || children[left].node.slots() + children[left + 1].node.slots() > MAX {
        return;
    }
    let right = children.remove(left + 1);
    let left = &mut children[left];
    match (Arc::make_mut(&mut left.node), &*right.node) {
        (Node::Leaf(records), Node::Leaf(more)) => records.extend(more),
        (Node::Inner(children), Node::Inner(more)) => children.extend(more),
        _ => unreachable!("neighbours are of one height"),
    }
    left.len += right.len;
}

/// Records in order.
pub(crate) struct Iter<'t> {
    /// The inner nodes above the leaf, each with the next child to go to.
    path: Vec<(&'t [Child], usize)>,
    leaf: std::slice::Iter<'t, Arc<Record>>,
}

impl<'t> Iterator for Iter<'t> {
    type Item = &'t Arc<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(record) = self.leaf.next() {
                return Some(record);
            }
            let (children, next) = self.path.last_mut()?;
            let Some(child) = children.get(*next) else {
                self.path.pop();
                continue;
            };
            *next += 1;
            let mut node = &*child.node;
            loop {
                match node {
                    Node::Inner(children) => {
                        self.path.push((children, 1));
                        node = &children[0].node;
                    }
                    Node::Leaf(records) => {
                        self.leaf = records.iter();
                        break;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn record(key: &str, revision: u64) -> Arc<Record> {
        let value = Bytes::new();
        Arc::new(Record {
            key: key.into(),
            value,
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            session: 0,
        })
    }

    fn number(key: u16) -> String {
        format!("/{key:03x}")
    }

    fn same(tree: &Tree, model: &BTreeMap<Arc<str>, Arc<Record>>) {
        assert_eq!(tree.len(), model.len());
        assert!(tree.from("").eq(model.values()));
    }

    /// Puts and deletes those keys, and looks for the others.
    fn is_a_map(changes: &[(String, u8)], others: impl IntoIterator<Item = String>) {
        let (mut tree, mut model) = (Tree::default(), BTreeMap::new());
        let mut frozen = None;
        let removing = changes.len() / 2;
        for (revision, (key, what)) in changes.iter().enumerate() {
            let record = record(key, revision as u64);
            // Mostly puts first, then mostly deletes, so that nodes split and merge.
            let put = if revision < removing { *what > 0 } else { *what == 0 };
            if put {
                assert_eq!(tree.insert(record.clone()), model.insert(record.key.clone(), record));
            } else {
                assert_eq!(tree.remove(&record.key), model.remove(&record.key));
            }
            if revision == removing {
                frozen = Some((tree.clone(), model.clone()));
            }
        }
        same(&tree, &model);
        let (tree, model) = frozen.unwrap();
        same(&tree, &model);
        for key in others
            .into_iter()
            .chain(changes.iter().step_by(37).map(|(key, _)| key.clone()))
        {
            let key: Arc<str> = key.into();
            assert_eq!(tree.rank(&key), model.range(..key.clone()).count());
            assert_eq!(tree.get(&key), model.get(&key));
            assert!(
                tree.from(&key)
                    .take(5)
                    .eq(model.range(key..).map(|(_, record)| record).take(5))
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// The tree holds, counts and orders what a `BTreeMap` does, and a clone stays as it was.
        #[test]
        fn is_an_ordered_map(changes in proptest::collection::vec((0u16..3000, 0u8..8), 1..4000)) {
            let changes: Vec<_> = changes.into_iter().map(|(key, what)| (number(key), what)).collect();
            is_a_map(&changes, (0..3000).step_by(37).map(number));
        }

        /// Keys of all lengths, which share much or nothing, and bytes that sort around the separator.
        #[test]
        fn is_an_ordered_map_of_any_keys(
            changes in proptest::collection::vec(("(/a|/aaaaaaaaaaaaaaaa|/b/)?[a!/\u{0}é]{0,10}", 0u8..8), 1..1500),
            others in proptest::collection::vec("(/a|/aaaaaaaaaaaaaaaa|/b)?[a!/\u{0}é]{0,3}", 100),
        ) {
            is_a_map(&changes, others);
        }
    }

    #[test]
    fn keys_in_order_fill_the_nodes() {
        let mut tree = Tree::default();
        for key in 0..4096 {
            tree.insert(record(&number(key), 1));
        }
        let Node::Inner(children) = &*tree.root else {
            panic!("4096 records fit no leaf")
        };
        assert_eq!(children.len(), 4096 / MAX);
    }
}
