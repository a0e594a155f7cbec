//! get, put, delete, ls, txn

use std::io::{self, Read as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use registry::{Committed, Depth, Expect, Key, List, Prefix, Read, Registry, Revision};
use serde_json::json;

use super::output::{Output, value_line};
use super::stop::Stop;
use super::{Failure, Outcome, Settings, key, pair, prefix};

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// The key, such as /app/config
    #[arg(value_parser = key)]
    key: Key,
    /// Answers at once from what is at hand, which may be old.
    #[arg(long)]
    stale: bool,
}

impl Get {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let read = if self.stale { Read::Stale } else { Read::Linearizable };
        let entry = registry.get(&self.key, read).await?;
        close(registry).await;
        let entry = entry.ok_or_else(|| Failure::new(Failure::NOT_FOUND, format!("{} is not there", self.key)))?;
        match out.json {
            true => out.line(String::new, || registry::json::entry(&entry))?,
            false => {
                // The value and nothing else where it goes to a program; a line on a terminal.
                out.bytes(&entry.value)?;
                if io::IsTerminal::is_terminal(&io::stdout()) && !entry.value.ends_with(b"\n") {
                    out.bytes(b"\n")?;
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Put {
    /// The key, such as /app/config
    #[arg(value_parser = key)]
    key: Key,
    /// The value; `-` reads standard input.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    value: Option<String>,
    /// Reads the value from a file.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Only if the key is not there.
    #[arg(long, conflicts_with = "if_revision")]
    if_absent: bool,
    /// Only if the key was last put at this revision.
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
    /// The key goes with this command: it stays until Ctrl-C.
    #[arg(long)]
    ephemeral: bool,
}

impl Put {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let value = value(self.value.as_deref(), self.file.as_ref())?;
        let mut txn = registry::Txn::new();
        if self.if_absent {
            txn = txn.when(&self.key, Expect::Absent);
        }
        if let Some(revision) = self.if_revision {
            txn = txn.when(&self.key, Expect::ModRevision(Revision(revision)));
        }
        txn = if self.ephemeral {
            txn.put_ephemeral(&self.key, value)
        } else {
            txn.put(&self.key, value)
        };
        // A value that is too large is refused before anybody is asked.
        txn.check()?;
        let registry = settings.connect().await?;
        // Taken before the key is put: a later session does not keep the key.
        let session = registry.session().live()?;
        let stop = self.ephemeral.then(Stop::listen).transpose()?;
        let Committed { revision, .. } = registry.commit(txn).await?;
        let printed = out.line(
            || format!("revision {revision}"),
            || json!({ "key": self.key.as_str(), "revision": revision.0 }),
        );
        let Some(stop) = stop else {
            printed?;
            close(&registry).await;
            return Ok(ExitCode::SUCCESS);
        };
        if printed.is_ok() {
            tokio::select! {
                biased;
                // Reported without a request to the store: it may be unreachable.
                () = registry.session().ended(session) => {
                    let reason = format!("session {session} has expired, and {} is deleted with it", self.key);
                    return Err(Failure::new(Failure::LOST, reason));
                }
                () = stop.asked() => {}
            }
        }
        let kept = |why: Failure| why.after(&format!("{} is deleted once the session has expired", self.key));
        let closed = match stop.unless_again(registry.close()).await {
            Some(closed) => closed.map_err(|error| kept(error.into())),
            None => Err(kept(Failure::new(
                Failure::STOPPED,
                "stopped again before the session was closed",
            ))),
        };
        printed.and(closed).map(|()| ExitCode::SUCCESS)
    }
}

fn value(argument: Option<&str>, file: Option<&PathBuf>) -> Result<Bytes, Failure> {
    match (argument, file) {
        (_, Some(path)) => match std::fs::read(path) {
            Ok(bytes) => Ok(bytes.into()),
            Err(error) => Err(Failure::usage(format!("{}: {error}", path.display()))),
        },
        (Some("-"), None) => {
            let mut bytes = Vec::new();
            io::stdin()
                .read_to_end(&mut bytes)
                .map_err(|error| Failure::io("standard input", &error))?;
            Ok(bytes.into())
        }
        (argument, None) => Ok(argument.unwrap_or_default().to_owned().into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// The key, or with --prefix `/` for everything
    #[arg(value_parser = prefix)]
    key: Prefix,
    /// The key and all below it.
    #[arg(long, conflicts_with = "if_revision")]
    prefix: bool,
    /// Only if the key was last put at this revision.
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
}

impl Delete {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        if !self.prefix && self.key.key().is_none() {
            return Err(Failure::usage("the root holds no value; --prefix deletes everything"));
        }
        let registry = settings.connect().await?;
        let deleted = match (self.prefix, self.key.key()) {
            (true, _) | (false, None) => registry.delete_prefix(&self.key).await?,
            (false, Some(key)) => u64::from(match self.if_revision {
                Some(revision) => {
                    registry
                        .delete_if(&key, Expect::ModRevision(Revision(revision)))
                        .await?
                }
                None => registry.delete(&key).await?,
            }),
        };
        close(&registry).await;
        out.line(|| format!("deleted {deleted}"), || json!({ "deleted": deleted }))?;
        Ok(if deleted == 0 && !self.prefix {
            ExitCode::from(Failure::NOT_FOUND)
        } else {
            ExitCode::SUCCESS
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// Where to look
    #[arg(value_parser = prefix, default_value = "/")]
    prefix: Prefix,
    /// With revisions, sessions and values.
    #[arg(long, short)]
    long: bool,
    /// All entries at and below, not only the children.
    #[arg(long, short)]
    recursive: bool,
    /// No more than so many.
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    limit: usize,
    /// Goes on after this key.
    #[arg(long, value_name = "KEY", value_parser = key)]
    after: Option<Key>,
}

impl Ls {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        match self.recursive || self.long || self.after.is_some() {
            true => self.entries(registry, out).await?,
            false => {
                for name in registry
                    .children(&self.prefix, Read::Linearizable)
                    .await?
                    .into_iter()
                    .take(self.limit)
                {
                    out.line(|| name.clone(), || json!({ "name": name }))?;
                }
            }
        }
        close(registry).await;
        Ok(ExitCode::SUCCESS)
    }

    async fn entries(&self, registry: &Arc<dyn Registry>, out: Output) -> Result<(), Failure> {
        let depth = if self.recursive {
            Depth::Subtree
        } else {
            Depth::Children
        };
        let mut list = List {
            depth,
            after: self.after.clone(),
            ..List::new(self.prefix.clone())
        };
        let mut left = self.limit;
        while left > 0 {
            list.limit = left.min(1000);
            let page = registry.list(list.clone()).await?;
            for entry in &page.entries {
                let people = || match self.long {
                    true => format!(
                        "{:>10} {:>10} {:16} {}  {}",
                        entry.create_revision.0,
                        entry.mod_revision.0,
                        entry.session.map_or_else(|| "-".into(), |session| session.to_string()),
                        entry.key,
                        value_line(&entry.value)
                    ),
                    false => entry.key.to_string(),
                };
                out.line(people, || registry::json::entry(entry))?;
            }
            left = left.saturating_sub(page.entries.len());
            match page.next {
                Some(next) => list.after = Some(next),
                None => break,
            }
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct Txn {
    /// KEY=absent, KEY=present, KEY=childless, or KEY=REVISION it was last put at. Repeated: all must hold.
    #[arg(long, value_name = "KEY=EXPECTED", value_parser = condition)]
    when: Vec<(Key, Expect)>,
    /// Puts a value. Repeated: all are put.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    put: Vec<(Key, String)>,
    /// Deletes a key.
    #[arg(long, value_name = "KEY", value_parser = key)]
    delete: Vec<Key>,
}

impl Txn {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let mut txn = registry::Txn::new();
        for (key, expect) in &self.when {
            txn = txn.when(key, *expect);
        }
        for (key, value) in self.put {
            txn = txn.put(&key, value);
        }
        for key in &self.delete {
            txn = txn.delete(key);
        }
        // A transaction that is not valid is refused before anything is sent.
        txn.check()?;
        let registry = settings.connect().await?;
        let committed = registry.commit(txn).await?;
        close(&registry).await;
        let changed = committed.changed.iter().filter(|changed| **changed).count();
        out.line(
            || format!("revision {}, {changed} changed", committed.revision),
            || json!({ "revision": committed.revision.0, "changed": committed.changed }),
        )?;
        Ok(ExitCode::SUCCESS)
    }
}

fn condition(text: &str) -> Result<(Key, Expect), String> {
    let (name, expected) = pair(text)?;
    let expect = match expected.as_str() {
        "absent" => Expect::Absent,
        "present" => Expect::Present,
        "childless" => Expect::Childless,
        revision => match revision.parse() {
            Ok(revision) => Expect::ModRevision(Revision(revision)),
            Err(_) => {
                return Err(format!(
                    "{revision:?} is neither absent, present, childless nor a revision"
                ));
            }
        },
    };
    Ok((key(&name)?, expect))
}

fn key_value(text: &str) -> Result<(Key, String), String> {
    let (name, value) = pair(text)?;
    Ok((key(&name)?, value))
}

/// Ends the session now; it would end by its TTL.
pub(super) async fn close(registry: &Arc<dyn Registry>) {
    if let Err(error) = registry.close().await {
        tracing::debug!(%error, "the session ends by its TTL");
    }
}
