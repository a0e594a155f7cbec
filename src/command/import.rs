//! import

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use base64::Engine;
use bytes::Bytes;
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use registry::{Key, Registry};
use serde::Deserialize;
use serde_json::json;

use super::epoch::Header;
use super::kv::close;
use super::output::{Output, progress};
use super::stop::Stop;
use super::{Failure, Outcome, Settings};

/// How many puts are in flight.
const IN_FLIGHT: usize = 256;

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The file of JSON lines; `-` reads standard input
    file: PathBuf,
}

/// A key and the value to put.
type Put = (Key, Bytes);

/// One line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    value: Option<String>,
    value_base64: Option<String>,
}

impl Line {
    fn parse(text: &[u8]) -> Result<Put, String> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        // Each is a text of one line to its parser; the number in the file is added by the caller.
        let wrong = |error: serde_json::Error| error.to_string().replace(" at line 1 column ", " at column ");
        let line: Line = serde_json::from_slice(text).map_err(wrong)?;
        let key = Key::parse(&line.key).map_err(|error| error.to_string())?;
        let value: Bytes = match (line.value, line.value_base64) {
            (Some(text), None) => text.into(),
            (None, Some(coded)) => {
                let decoded = base64::engine::general_purpose::STANDARD.decode(coded);
                decoded.map_err(|error| format!("value_base64: {error}"))?.into()
            }
            _ => return Err("a line has either `value` or `value_base64`".into()),
        };
        registry::Txn::new()
            .put(&key, value.clone())
            .check()
            .map_err(|error| error.to_string())?;
        Ok((key, value))
    }
}

/// The lines of a file that are not blank, with their numbers.
struct Lines<R> {
    reader: BufReader<R>,
    number: usize,
    text: Vec<u8>,
    /// The first line, if it is that of an export.
    header: Option<Header>,
}

impl<R: Read> Lines<R> {
    fn of(input: R) -> Self {
        Self {
            reader: BufReader::with_capacity(1 << 20, input),
            number: 0,
            text: Vec::new(),
            header: None,
        }
    }

    /// The next line as it is read, and parsed.
    fn next(&mut self) -> Option<(usize, Result<Put, String>)> {
        loop {
            self.text.clear();
            self.number += 1;
            match self.reader.read_until(b'\n', &mut self.text) {
                Ok(0) => return None,
                Ok(_) if self.text.trim_ascii().is_empty() => {}
                Ok(_) if self.number == 1 && self.is_header() => {}
                Ok(_) => return Some((self.number, Line::parse(&self.text))),
                Err(error) => return Some((self.number, Err(error.to_string()))),
            }
        }
    }
}

impl<R> Lines<R> {
    fn is_header(&mut self) -> bool {
        self.header = Header::parse(&self.text);
        self.header.is_some()
    }
}

/// A file whose lines were checked.
struct Checked {
    file: File,
    header: Option<Header>,
}

/// Opens the file and checks each line, so that a wrong one is refused before anything is sent. What can't be read twice,
/// as standard input or a pipe, is copied to a temporary file meanwhile.
fn checked(path: &Path) -> Result<Checked, Failure> {
    let wrong = |error: io::Error| Failure::usage(format!("{}: {error}", path.display()));
    if path == Path::new("-") {
        return copied(io::stdin().lock());
    }
    let file = File::open(path).map_err(wrong)?;
    if !file.metadata().map_err(wrong)?.is_file() {
        return copied(file);
    }
    let mut lines = Lines::of(&file);
    while let Some((number, line)) = lines.next() {
        line.map_err(|why| refused(number, &why))?;
    }
    let header = lines.header;
    (&file).rewind().map_err(wrong)?;
    Ok(Checked { file, header })
}

fn copied(input: impl Read) -> Result<Checked, Failure> {
    let failed = |error: io::Error| Failure::io("the input can't be copied to a temporary file", &error);
    let mut copy = io::BufWriter::new(tempfile::tempfile().map_err(failed)?);
    let (mut lines, mut last) = (Lines::of(input), 0);
    while let Some((number, line)) = lines.next() {
        line.map_err(|why| refused(number, &why))?;
        // With blank lines for those between, so that the numbers stay the same.
        for _ in last + 1..number {
            copy.write_all(b"\n").map_err(failed)?;
        }
        copy.write_all(&lines.text).map_err(failed)?;
        last = number;
    }
    let mut copy = copy.into_inner().map_err(|error| failed(error.into_error()))?;
    copy.rewind().map_err(failed)?;
    let header = lines.header;
    Ok(Checked { file: copy, header })
}

fn refused(number: usize, why: &str) -> Failure {
    Failure::usage(format!("line {number}: {why}")).after("nothing was imported")
}

impl Import {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let Checked { file, header } = checked(&self.file)?;
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        let registry = settings.connect().await?;
        let stop = Stop::listen()?;
        // Perhaps: it need not be, where tokens are larger already.
        let raised = header.is_some();
        match header {
            Some(header) => header.raise(&*registry).await?,
            None => tracing::warn!(
                "the file does not begin with the line in which an export says how high its store's fencing tokens are: the \
                 epoch is not raised; if keys move here from another store, run `registry epoch --raise --above TOKEN`"
            ),
        }
        let bar = progress(Some(size));
        let mut puts = Puts::new(&registry, Lines::of(bar.wrap_read(file)));
        puts.all(&stop).await;
        bar.finish_and_clear();
        let Puts { count, failure, .. } = puts;
        let summary = || format!("imported {count} keys");
        match failure {
            None => {
                close(&registry).await;
                out.line(summary, || json!({ "imported": count }))?;
                Ok(ExitCode::SUCCESS)
            }
            Some(failure) => Err(partly(failure, count > 0 || raised).after(&format!(
                "{}; import the file again when the cause is removed: a line that was put is put again without harm",
                summary()
            ))),
        }
    }
}

/// The failure of an import that put some keys, or raised the epoch: a code which means that nothing changed would not be true.
fn partly(failure: Failure, changed: bool) -> Failure {
    match failure.code() {
        Failure::UNKNOWN | Failure::LOST | Failure::STOPPED => failure,
        _ if !changed => failure,
        _ => failure.with_code(1),
    }
}

/// The puts of the lines of a file.
struct Puts<'a, R> {
    registry: &'a Arc<dyn Registry>,
    lines: Lines<R>,
    /// The keys of the puts in flight.
    keys: HashSet<Key>,
    /// A line whose key has a put in flight: it waits for the result, so that the later line is the one that stays.
    next: Option<(usize, Key, Bytes)>,
    count: u64,
    /// The first failure, or the first whose outcome is unknown. No put starts after it.
    failure: Option<Failure>,
}

impl<'a, R: Read> Puts<'a, R> {
    fn new(registry: &'a Arc<dyn Registry>, lines: Lines<R>) -> Self {
        Self {
            registry,
            lines,
            keys: HashSet::new(),
            next: None,
            count: 0,
            failure: None,
        }
    }

    /// Puts all lines. After a failure, and when the process is asked to stop, it waits for those in flight.
    async fn all(&mut self, stop: &Stop) {
        let registry = self.registry;
        let mut in_flight = FuturesUnordered::new();
        let mut stopped = false;
        loop {
            while in_flight.len() < IN_FLIGHT
                && let Some((number, key, value)) = self.take_next()
            {
                in_flight.push(async move {
                    let put = registry.put(&key, value).await;
                    (key, put.map_err(|error| Failure::from(error).at(number)))
                });
            }
            tokio::select! {
                biased;
                () = stop.asked(), if !stopped => {
                    stopped = true;
                    self.failed(Failure::new(Failure::STOPPED, "stopped"));
                }
                put = stop.unless_again(in_flight.next()) => match put {
                    Some(None) => return,
                    Some(Some((key, put))) => {
                        self.keys.remove(&key);
                        match put {
                            Ok(_) => self.count += 1,
                            Err(failure) => self.failed(failure),
                        }
                    }
                    None if stopped => {
                        let reason = format!("stopped again while {} puts were in flight", in_flight.len());
                        return self.failed(Failure::new(Failure::UNKNOWN, reason));
                    }
                    None => {}
                },
            }
        }
    }

    /// The next line to put, unless it has to wait or nothing is put any more.
    fn take_next(&mut self) -> Option<(usize, Key, Bytes)> {
        if self.failure.is_some() {
            return None;
        }
        let (number, key, value) = match self.next.take() {
            Some(next) => next,
            None => match self.lines.next()? {
                (number, Ok((key, value))) => (number, key, value),
                (number, Err(why)) => {
                    let reason = format!("the file has changed since it was checked: {why}");
                    self.failed(Failure::new(1, reason).at(number));
                    return None;
                }
            },
        };
        if !self.keys.insert(key.clone()) {
            self.next = Some((number, key, value));
            return None;
        }
        Some((number, key, value))
    }

    fn failed(&mut self, failure: Failure) {
        let worse = failure.code() == Failure::UNKNOWN;
        match &self.failure {
            Some(first) if !worse || first.code() == Failure::UNKNOWN => {}
            _ => self.failure = Some(failure),
        }
    }
}
