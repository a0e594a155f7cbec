//! export

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Seek, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use registry::{Entry, Error, Event, List, Prefix, Registry, Revision, WatchFrom, WatchItem, WatchRequest, WatchScope};
use serde_json::json;
use tempfile::SpooledTempFile;

use super::epoch::Header;
use super::failure::warn;
use super::kv::close;
use super::output::{Output, progress};
use super::{Failure, Outcome, prefix};

/// What is kept in memory of the pages, and how much is printed in one piece.
const IN_MEMORY: usize = 16 << 20;
const CHUNK: usize = 64 << 10;
/// How long the changes made during the listing may take to come.
const CHANGES: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Where to begin
    #[arg(value_parser = prefix, default_value = "/")]
    prefix: Prefix,
}

impl Export {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let bar = progress(None);
        let read = Pages::read(registry, &self.prefix, |bytes| bar.inc(bytes)).await;
        bar.finish_and_clear();
        let mut pages = read?;
        let changed = pages.changes(registry, &self.prefix).await;
        let header = Header::read(&**registry).await;
        close(registry).await;
        let (changed, revision) = match changed? {
            Changes::Known(changed, revision) => (changed, Some(revision)),
            Changes::Lost(why) => {
                warn(&why, out.json);
                (BTreeMap::new(), None)
            }
        };
        let mut printed = Printed::new(out);
        match header? {
            Some(header) => printed.header(&header)?,
            None => warn(
                "this client may not read the epoch of fencing tokens: those of the store that imports this may be smaller",
                out.json,
            ),
        }
        pages.merged(changed, |line| printed.line(line))?;
        let Printed { count, left_out, .. } = printed.end()?;
        // The export went to standard output.
        match out.json {
            true => eprintln!(
                "{}",
                json!({ "exported": count, "left_out": left_out, "revision": revision.map(|revision| revision.0) })
            ),
            false => {
                let at = revision.map_or_else(String::new, |revision| format!(" of revision {revision}"));
                eprintln!("exported {count} keys{at}, left out {left_out} ephemeral ones");
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The pages of a listing, with the key of each entry before its line; ephemeral entries have an empty line.
struct Pages {
    text: SpooledTempFile,
    /// The revisions of the first page and of the last.
    first: Revision,
    last: Revision,
}

/// What happened below the prefix between the first page and the revision of the export.
enum Changes {
    /// Each key that changed, with its line at that revision, if it is there.
    Known(BTreeMap<String, Option<String>>, Revision),
    /// It is not known, and why.
    Lost(String),
}

impl Pages {
    async fn read(
        registry: &Arc<dyn Registry>,
        prefix: &Prefix,
        mut progress: impl FnMut(u64),
    ) -> Result<Self, Failure> {
        let mut list = List::new(prefix.clone());
        let mut pages: Option<Self> = None;
        loop {
            let page = registry.list(list.clone()).await?;
            let pages = pages.get_or_insert_with(|| Self {
                text: SpooledTempFile::new(IN_MEMORY),
                first: page.revision,
                last: page.revision,
            });
            pages.last = page.revision;
            let mut text = String::new();
            for entry in &page.entries {
                text.push_str(&format!("{}\t{}\n", entry.key, line(entry)));
            }
            pages.text.write_all(text.as_bytes()).map_err(failed)?;
            progress(text.len() as u64);
            list.after = page.next;
            if list.after.is_none() {
                break;
            }
        }
        // The first page is always read.
        pages.ok_or_else(|| Failure::new(1, "nothing was listed"))
    }

    /// Reads the changes since the first page, up to a revision that no page is newer than. Each page shows one revision, so
    /// the pages with these changes are the state at that revision.
    async fn changes(&self, registry: &Arc<dyn Registry>, prefix: &Prefix) -> Result<Changes, Failure> {
        let mut changed = BTreeMap::new();
        let capabilities = registry.capabilities();
        if capabilities.consistent_pages && self.first == self.last {
            return Ok(Changes::Known(changed, self.first));
        }
        let torn = |why: &str| {
            Changes::Lost(format!(
                "the pages were read at revisions {} to {}, and {why}: a transaction made meanwhile may be in the export by half",
                self.first, self.last
            ))
        };
        if !(capabilities.consistent_pages && capabilities.watch_from_revision) {
            return Ok(torn("the store can't read them at one"));
        }
        let until = Instant::now() + CHANGES;
        let mut after = self.first;
        // A member that is behind says so by an older revision, and is asked again.
        while after < self.last {
            let request = WatchRequest {
                from: WatchFrom::After(after),
                ..WatchRequest::new(prefix.clone(), WatchScope::Subtree)
            };
            let left = until.saturating_duration_since(Instant::now());
            let read = tokio::time::timeout(left, read_changes(registry, request, &mut changed)).await;
            match read {
                Ok(Ok(revision)) => after = after.max(revision),
                Ok(Err(Error::Compacted { .. })) => return Ok(torn("the store no longer keeps the changes between")),
                Ok(Err(error)) => return Err(error.into()),
                Err(_) => {
                    let reason = format!("the changes during the export did not come within {CHANGES:?}");
                    return Err(Failure::new(5, reason));
                }
            }
        }
        Ok(Changes::Known(changed, after))
    }

    /// Passes on the line of each key, in the order of the keys: as it was changed, or as its page had it.
    fn merged(
        &mut self,
        mut changed: BTreeMap<String, Option<String>>,
        mut each: impl FnMut(&str) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.text.rewind().map_err(failed)?;
        for text in BufReader::new(&mut self.text).lines() {
            let text = text.map_err(failed)?;
            // A key has no control character.
            let (key, line) = text.split_once('\t').unwrap_or((&text, ""));
            let mut replaced = false;
            while let Some(first) = changed.first_entry()
                && first.key().as_str() <= key
            {
                let (name, line) = first.remove_entry();
                replaced = name == key;
                line.map_or(Ok(()), |line| each(&line))?;
            }
            if !replaced {
                each(line)?;
            }
        }
        changed.into_values().flatten().try_for_each(|line| each(&line))
    }
}

/// Reads the changes of a watch up to the first revision to which they are complete.
async fn read_changes(
    registry: &Arc<dyn Registry>,
    request: WatchRequest,
    changed: &mut BTreeMap<String, Option<String>>,
) -> registry::Result<Revision> {
    let mut watch = registry.watch(request).await?;
    loop {
        match watch.next().await.ok_or(Error::Closed)?? {
            WatchItem::Synced(revision) => return Ok(revision),
            WatchItem::Changes(events) => {
                for event in events {
                    let line = match &event {
                        Event::Created(entry) | Event::Updated(entry) => Some(line(entry)),
                        Event::Deleted { .. } => None,
                    };
                    changed.insert(event.key().to_string(), line);
                }
            }
            WatchItem::Reset => {}
        }
    }
}

/// The line of an entry; an ephemeral one is left out, and has an empty line.
fn line(entry: &Entry) -> String {
    if entry.session.is_some() {
        return String::new();
    }
    let (name, value) = registry::json::value(&entry.value);
    json!({ "key": entry.key.as_str(), name: value }).to_string()
}

/// Prints lines in larger pieces, and counts them.
struct Printed {
    out: Output,
    text: String,
    count: u64,
    left_out: u64,
}

impl Printed {
    fn new(out: Output) -> Self {
        Self {
            out,
            text: String::new(),
            count: 0,
            left_out: 0,
        }
    }

    fn header(&mut self, header: &Header) -> Result<(), Failure> {
        self.out.bytes(format!("{}\n", header.line()).as_bytes())
    }

    fn line(&mut self, line: &str) -> Result<(), Failure> {
        if line.is_empty() {
            self.left_out += 1;
            return Ok(());
        }
        self.count += 1;
        self.text.push_str(line);
        self.text.push('\n');
        match self.text.len() > CHUNK {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.out.bytes(std::mem::take(&mut self.text).as_bytes())
    }

    fn end(mut self) -> Result<Self, Failure> {
        self.flush()?;
        Ok(self)
    }
}

fn failed(error: std::io::Error) -> Failure {
    Failure::io("the listing can't be kept in a temporary file", &error)
}
