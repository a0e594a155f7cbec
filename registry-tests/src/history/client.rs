//! A client whose calls are recorded.

use std::sync::Arc;

use registry_api::{Entry, Error, Expect, Key, List, Prefix, Read, Registry, Revision, Txn};

use super::{Answer, Call, Demand, History, Id, Request, Write};

/// A client that asks one thing after the other, and records each.
#[derive(Debug)]
pub struct Client {
    registry: Arc<dyn Registry>,
    history: Arc<History>,
    number: usize,
    keys: Vec<Key>,
    /// At what revision each key was seen last.
    seen: Vec<Option<Revision>>,
}

impl Client {
    /// A client of keys that no other history uses, all of them children of `dir`.
    pub fn new(registry: Arc<dyn Registry>, history: Arc<History>, number: usize, dir: &Key, keys: usize) -> Self {
        let key = |n| Key::parse(&format!("{dir}/{n}")).expect("a number is a segment");
        Self {
            registry,
            history,
            number,
            keys: (0..keys).map(key).collect(),
            seen: vec![None; keys],
        }
    }

    /// Reads one key.
    pub async fn get(&mut self, key: usize) -> Answer {
        let (id, asked) = (self.history.next(), self.history.now());
        let answer = match self.registry.get(&self.keys[key], Read::Linearizable).await {
            Ok(entry) => self.read(&[key], &[entry]),
            Err(error) => failed(&error),
        };
        self.record(id, asked, Request::Read(vec![key]), answer)
    }

    /// Reads all keys: at one moment where the store's pages are, else each at a moment of its own.
    pub async fn list(&mut self, dir: &Prefix) -> Answer {
        let (id, asked) = (self.history.next(), self.history.now());
        let all: Vec<_> = (0..self.keys.len()).collect();
        let page = match self.registry.list(List::new(dir.clone())).await {
            Ok(page) => page,
            Err(error) => {
                return self.record(id, asked, Request::Read(all), failed(&error));
            }
        };
        let of = |key: &usize| page.entries.iter().find(|entry| entry.key == self.keys[*key]).cloned();
        let entries: Vec<_> = all.iter().map(of).collect();
        if self.registry.capabilities().consistent_pages {
            let answer = self.read(&all, &entries);
            return self.record(id, asked, Request::Read(all), answer);
        }
        let mut answer = Answer::Read(Vec::new());
        for (key, entry) in all.into_iter().zip(entries) {
            answer = self.read(&[key], &[entry]);
            self.record(self.history.next(), asked, Request::Read(vec![key]), answer.clone());
        }
        answer
    }

    /// Commits a transaction.
    pub async fn commit(&mut self, demands: Vec<(usize, Demand)>, writes: Vec<(usize, Write)>) -> Answer {
        let id = self.history.next();
        let mut txn = Txn::new();
        for (key, demand) in &demands {
            let expect = match demand {
                Demand::Absent => Expect::Absent,
                Demand::Present => Expect::Present,
                Demand::At(revision) => Expect::ModRevision(*revision),
            };
            txn = txn.when(&self.keys[*key], expect);
        }
        for (key, write) in &writes {
            txn = match write {
                Write::Put => txn.put(&self.keys[*key], id.to_string()),
                Write::Delete => txn.delete(&self.keys[*key]),
            };
        }
        let asked = self.history.now();
        let answer = match self.registry.commit(txn).await {
            Ok(committed) => Answer::Committed(committed.revision, committed.changed),
            Err(Error::Conflict { key, found, .. }) => match self.keys.iter().position(|known| *known == key) {
                Some(key) => Answer::Conflict(key, found),
                None => Answer::Unexpected(format!("a conflict of {key}, which was not asked about")),
            },
            Err(error) => failed(&error),
        };
        self.note(&writes, &answer);
        self.record(id, asked, Request::Commit(demands, writes), answer)
    }

    /// What to demand of a key so that nobody has changed it since this client saw it.
    pub fn unchanged(&self, key: usize) -> Demand {
        self.seen[key].map_or(Demand::Absent, Demand::At)
    }

    fn note(&mut self, writes: &[(usize, Write)], answer: &Answer) {
        match answer {
            Answer::Committed(revision, _) => {
                for (key, write) in writes {
                    self.seen[*key] = (*write == Write::Put).then_some(*revision);
                }
            }
            // A revision that nobody's answer names is no use to the judge.
            Answer::Conflict(key, None) => self.seen[*key] = None,
            _ => {}
        }
    }

    fn read(&mut self, keys: &[usize], entries: &[Option<Entry>]) -> Answer {
        let mut read = Vec::new();
        for (key, entry) in keys.iter().zip(entries) {
            self.seen[*key] = entry.as_ref().map(|entry| entry.mod_revision);
            let Some(entry) = entry else {
                read.push(None);
                continue;
            };
            let text = String::from_utf8_lossy(&entry.value);
            match text.parse() {
                Ok(id) => read.push(Some((id, entry.mod_revision))),
                Err(_) => return Answer::Unexpected(format!("{} holds {text:?}, which nobody put", entry.key)),
            }
        }
        Answer::Read(read)
    }

    fn record(&self, id: Id, asked: std::time::Duration, request: Request, answer: Answer) -> Answer {
        self.history.add(Call {
            id,
            client: self.number,
            asked,
            told: self.history.now(),
            request,
            answer: answer.clone(),
        });
        answer
    }
}

fn failed(error: &Error) -> Answer {
    match error {
        Error::Unavailable { .. } => Answer::Nothing,
        Error::OutcomeUnknown { .. } => Answer::Unknown,
        error => Answer::Unexpected(format!("{error}: {error:?}")),
    }
}
