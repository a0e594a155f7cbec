//! What a transaction becomes on ZooKeeper, as a function of what was read of its keys.
//!
//! A condition is judged on what was read, and guarded in the multi that carries the changes. A key's guard is written
//! whenever the key is made or deleted (its znode, or its value over a mark), so an unchanged guard says that the key is
//! still the one that was read; only a session's end deletes without it, and then the znode is gone, or was made anew by a
//! put that wrote the guard. A guard is written too when a node is made below its key, for those who need the key childless.
//! A key that is put over a placeholder gets a birth znode, whose creation is the key's; it goes with the key.
//! The rest ZooKeeper refuses by itself: a node made twice, one deleted with children, one made below an ephemeral one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use registry_api::{
    Condition, Error, Existing, Expect, Key, Kind, Operation, Refusal, Result, Revision, SessionId, Txn,
};

use crate::names::{MARK, Names, ancestors, encode, owner, parent, revision};
use crate::walk::Found;

/// One operation of a multi.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The node is there, at this version of its data; -1 for any.
    Check { path: String, version: i32 },
    /// New data for a node.
    Set {
        path: String,
        data: Bytes,
        version: Option<i32>,
    },
    /// A new node.
    Create { path: String, data: Bytes, kind: Kind },
    /// A node less.
    Delete { path: String, version: Option<i32> },
}

impl Step {
    /// Returns how many bytes the step takes in a request, or a few more. The client prepends a chroot of `above` bytes
    /// to every path.
    pub(crate) fn size(&self, above: usize) -> usize {
        // The header of an operation, the lengths of its fields and the version: 17 and 21 bytes. A create has its ACL too.
        const FRAME: usize = 24;
        const ACL: usize = 56;
        above
            + match self {
                Self::Check { path, .. } | Self::Delete { path, .. } => FRAME + path.len(),
                Self::Set { path, data, .. } => FRAME + path.len() + data.len(),
                Self::Create { path, data, .. } => FRAME + ACL + path.len() + data.len(),
            }
    }
}

/// How much was read of the tree around a transaction's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The keys, and what is above those that are deleted.
    Near,
    /// What is above the others too.
    Far,
}

/// What was read of a transaction's keys.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// By path; `None` for a node that is not there.
    pub(crate) nodes: HashMap<String, Option<Found>>,
    /// The guards' versions, read before the nodes.
    pub(crate) guards: BTreeMap<u8, i32>,
}

impl View {
    /// The paths to read.
    pub(crate) fn wanted(names: &Names, txn: &Txn, reach: Reach) -> BTreeSet<String> {
        let mut wanted = BTreeSet::new();
        for condition in &txn.conditions {
            wanted.insert(names.path(&condition.key));
        }
        for operation in &txn.operations {
            let path = names.path(operation.key());
            if reach == Reach::Far || matches!(operation, Operation::Delete { .. }) {
                wanted.extend(ancestors(&path).map(str::to_owned));
            }
            wanted.insert(path);
        }
        wanted
    }

    fn node(&self, path: &str) -> Option<&Found> {
        self.nodes.get(path)?.as_ref()
    }

    fn value(&self, path: &str) -> Option<&Found> {
        self.node(path).filter(|found| !found.is_mark())
    }
}

/// A transaction's multi.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// Marks that have to be there first, where all together would be too large for one request.
    pub(crate) marks: Vec<String>,
    /// For each operation of the transaction, whether it changes anything.
    pub(crate) changed: Vec<bool>,
    /// The persistent keys that are put, each with its guard.
    pub(crate) facts: Vec<(String, u8)>,
    /// The guards' versions as they were read.
    pub(crate) known: BTreeMap<u8, i32>,
    /// The directory of the queue that a contender leaves to others.
    pub(crate) left: Option<String>,
}

impl Plan {
    /// Judges a transaction and lays out its multi.
    ///
    /// # Errors
    /// [`Error::Conflict`] and [`Error::Refused`], as of what was read.
    pub(crate) fn new(
        names: &Names,
        txn: &Txn,
        session: Option<SessionId>,
        view: &View,
        parents: Parents,
    ) -> Result<Self> {
        let mut layout = Layout {
            names,
            view,
            session,
            checks: Vec::new(),
            relied: BTreeSet::new(),
            written: BTreeSet::new(),
            puts: Vec::new(),
            deletes: Vec::new(),
            made: HashSet::new(),
            marks: Vec::new(),
            children: HashMap::new(),
            facts: Vec::new(),
        };
        for condition in &txn.conditions {
            layout.require(condition)?;
        }
        let mut operations: Vec<_> = txn.operations.iter().enumerate().collect();
        // A parent is made before what is below it, and deleted after it.
        operations.sort_by_key(|(_, operation)| operation.key());
        let mut changed = vec![true; operations.len()];
        for (_, operation) in &operations {
            if let Operation::Put {
                key,
                value,
                kind,
                existing,
            } = operation
            {
                layout.put(key, value, *kind, *existing)?;
            }
        }
        for (place, operation) in operations.iter().rev() {
            if let Operation::Delete { key } = operation {
                changed[*place] = layout.delete(key, parents);
            }
        }
        Ok(layout.finish(changed, !txn.conditions.is_empty()))
    }

    /// Nothing is to be done, and nothing has to be guarded for it.
    pub(crate) fn is_nothing(&self) -> bool {
        self.steps.is_empty()
    }

    /// Returns how many bytes the multi takes; see [`Step::size`].
    pub(crate) fn size(&self, above: usize) -> usize {
        self.steps.iter().map(|step| step.size(above)).sum()
    }
}

/// What becomes of the parents that a delete empties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parents {
    /// They go with it.
    Remove,
    /// They are left to the sweep.
    Leave,
}

struct Layout<'v> {
    names: &'v Names,
    view: &'v View,
    session: Option<SessionId>,
    checks: Vec<Step>,
    /// The guards that have to be as they were read.
    relied: BTreeSet<u8>,
    /// The guards that are written.
    written: BTreeSet<u8>,
    puts: Vec<Step>,
    deletes: Vec<Step>,
    made: HashSet<String>,
    marks: Vec<String>,
    /// How many children more, or less, a node has afterwards.
    children: HashMap<String, i32>,
    facts: Vec<(String, u8)>,
}

impl Layout<'_> {
    fn rely(&mut self, path: &str) {
        self.relied.extend(self.names.part(path));
    }

    fn write(&mut self, path: &str) {
        self.written.extend(self.names.part(path));
    }

    fn children_left(&self, path: &str) -> i32 {
        let now = self.view.node(path).map_or(0, |found| found.stat.num_children);
        now + self.children.get(path).copied().unwrap_or(0)
    }

    fn require(&mut self, Condition { key, expect }: &Condition) -> Result<()> {
        let path = self.names.path(key);
        let value = self.view.value(&path);
        let holds = match expect {
            Expect::Absent => value.is_none(),
            Expect::Present => value.is_some(),
            Expect::ModRevision(wanted) => value.is_some_and(|found| revision(found.stat.mzxid) == *wanted),
            Expect::CreateRevision(wanted) => value.is_some_and(|found| revision(found.created()) == *wanted),
            Expect::Childless => self.view.node(&path).is_none_or(|found| found.stat.num_children == 0),
            // One that a later version of the api adds.
            _ => {
                return Err(crate::error::unsupported("this condition"));
            }
        };
        let found = value.map(|found| revision(found.stat.mzxid));
        if !holds {
            return Err(conflict(key, *expect, found));
        }
        match expect {
            Expect::Absent => self.rely(&path),
            Expect::Childless => self.require_childless(&path),
            _ => {
                let version = match (expect, value) {
                    (Expect::ModRevision(_), Some(found)) => found.stat.version,
                    _ => -1,
                };
                self.checks.push(Step::Check {
                    path: path.clone(),
                    version,
                });
                self.rely(&path);
            }
        }
        Ok(())
    }

    /// A user's key relies on its guard, which is written when something is made below it. A recipe's directory has none;
    /// it is nothing but a parent, so it can be made anew, which fails if there is something below it.
    fn require_childless(&mut self, path: &str) {
        self.rely(path);
        if let Some(found) = self.view.node(path).filter(|_| self.names.part(path).is_none()) {
            self.checks.push(Step::Delete {
                path: path.to_owned(),
                version: Some(found.stat.version),
            });
            self.checks.push(mark(path));
            self.made.insert(path.to_owned());
        }
    }

    fn put(&mut self, key: &Key, value: &Bytes, kind: Kind, existing: Existing) -> Result<()> {
        let path = self.names.path(key);
        let data = encode(value);
        let refused = |refusal| {
            Err(Error::Refused {
                key: key.clone(),
                refusal,
            })
        };
        for above in ancestors(&path) {
            if self.view.node(above).is_some_and(|found| owner(&found.stat).is_some())
                && let Some(above) = self.names.key(above)
            {
                return refused(Refusal::BelowEphemeral(above));
            }
        }
        if kind == Kind::Persistent {
            self.facts
                .extend(self.names.part(&path).map(|part| (path.clone(), part)));
        }
        let create = Step::Create {
            path: path.clone(),
            data: data.clone(),
            kind,
        };
        let Some(found) = self.view.node(&path) else {
            self.make_parents(&path);
            self.write(&path);
            self.make(&path);
            self.puts.push(create);
            return Ok(());
        };
        let stat = found.stat;
        let own = owner(&stat);
        let refusal = match (found.is_mark(), kind, own) {
            (true, ..) | (_, Kind::Persistent, None) => None,
            (_, Kind::Persistent, Some(_)) => Some(Refusal::Ephemeral),
            (_, Kind::Ephemeral, None) => Some(Refusal::Persistent),
            (_, Kind::Ephemeral, Some(session)) => (self.session != Some(session)).then_some(Refusal::OwnedBy(session)),
        };
        let anew = refusal.is_some();
        match refusal {
            Some(refusal) if existing == Existing::Keep => return refused(refusal),
            _ if kind == Kind::Ephemeral && stat.num_children > 0 => return refused(Refusal::HasChildren),
            _ => {}
        }
        self.rely(&path);
        if anew || (found.is_mark() && kind == Kind::Ephemeral) {
            self.write(&path);
            self.puts.push(Step::Delete {
                path,
                version: Some(stat.version),
            });
            self.puts.push(create);
        } else {
            let birth = self.names.birth(&path).filter(|_| found.is_mark());
            if found.is_mark() {
                self.write(&path);
            }
            self.puts.push(Step::Set {
                path,
                data,
                version: None,
            });
            if let Some(birth) = birth {
                // One that is there is of an earlier key.
                self.forget_birth(found, &birth);
                self.puts.push(Step::Create {
                    path: birth,
                    data: Bytes::new(),
                    kind: Kind::Persistent,
                });
            }
        }
        Ok(())
    }

    fn forget_birth(&mut self, found: &Found, birth: &str) {
        if found.birth.is_some() {
            self.puts.push(Step::Delete {
                path: birth.to_owned(),
                version: None,
            });
        }
    }

    /// Makes the parents that are known to be missing.
    fn make_parents(&mut self, path: &str) {
        let missing: Vec<_> = ancestors(path)
            .take_while(|above| self.view.nodes.get(*above).is_some_and(Option::is_none))
            .filter(|above| !self.made.contains(*above))
            .map(str::to_owned)
            .collect();
        for above in missing.into_iter().rev() {
            self.make(&above);
            self.puts.push(mark(&above));
            self.marks.push(above.clone());
            self.made.insert(above);
        }
    }

    /// A node is made there.
    fn make(&mut self, path: &str) {
        let above = parent(path);
        self.write_if_key(above);
        *self.children.entry(above.to_owned()).or_default() += 1;
        self.made.insert(path.to_owned());
    }

    /// The root of a tree is nobody's key.
    fn write_if_key(&mut self, path: &str) {
        if path != self.names.root() {
            self.write(path);
        }
    }

    /// Says whether there was a value.
    fn delete(&mut self, key: &Key, parents: Parents) -> bool {
        let path = self.names.path(key);
        self.rely(&path);
        let Some(found) = self.view.value(&path) else {
            return false;
        };
        self.write(&path);
        if let Some(birth) = self.names.birth(&path) {
            self.forget_birth(found, &birth);
        }
        if self.children_left(&path) > 0 {
            self.deletes.push(Step::Set {
                path,
                data: Bytes::from_static(MARK),
                version: None,
            });
            return true;
        }
        self.unmake(&path, None);
        if parents == Parents::Remove {
            for above in ancestors(&path) {
                let emptied = self
                    .view
                    .node(above)
                    .filter(|found| found.is_mark() && !self.made.contains(above) && !self.is_put(above));
                match emptied {
                    Some(found) if self.children_left(above) == 0 => {
                        let version = found.stat.version;
                        self.rely(above);
                        self.unmake(above, Some(version));
                    }
                    _ => break,
                }
            }
        }
        true
    }

    fn is_put(&self, path: &str) -> bool {
        self.puts.iter().any(|step| match step {
            Step::Set { path: put, .. } | Step::Create { path: put, .. } => put == path,
            Step::Check { .. } | Step::Delete { .. } => false,
        })
    }

    fn unmake(&mut self, path: &str, version: Option<i32>) {
        *self.children.entry(parent(path).to_owned()).or_default() -= 1;
        self.deletes.push(Step::Delete {
            path: path.to_owned(),
            version,
        });
    }

    fn finish(self, changed: Vec<bool>, conditional: bool) -> Plan {
        let Self {
            names,
            view,
            relied,
            written,
            ..
        } = self;
        let needed = conditional || !self.puts.is_empty() || !self.deletes.is_empty();
        let mut steps = self.checks;
        for part in relied.union(&written) {
            let version = view.guards.get(part).copied().filter(|_| relied.contains(part));
            match (written.contains(part), version) {
                (true, version) => steps.push(Step::Set {
                    path: names.guard(*part),
                    data: Bytes::new(),
                    version,
                }),
                (false, Some(version)) => steps.push(Step::Check {
                    path: names.guard(*part),
                    version,
                }),
                (false, None) => {}
            }
        }
        if !needed {
            // Deletes of keys that are not there, and no condition that would have to hold at the same moment.
            steps.clear();
        }
        steps.extend(self.puts);
        steps.extend(self.deletes);
        if !steps.is_empty() && !steps.iter().any(|step| matches!(step, Step::Set { .. })) {
            steps.push(Step::Set {
                path: names.clock(),
                data: Bytes::new(),
                version: None,
            });
        }
        Plan {
            steps,
            marks: self.marks,
            changed,
            facts: self.facts,
            known: view.guards.clone(),
            left: None,
        }
    }
}

/// A parent that nobody put.
pub(crate) fn mark(path: &str) -> Step {
    Step::Create {
        path: path.to_owned(),
        data: Bytes::from_static(MARK),
        kind: Kind::Persistent,
    }
}

fn conflict(key: &Key, expected: Expect, found: Option<Revision>) -> Error {
    Error::Conflict {
        key: key.clone(),
        expected,
        found,
    }
}
