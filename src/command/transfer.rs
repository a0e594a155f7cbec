//! import, export

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use base64::Engine;
use bytes::Bytes;
use clap::Args;
use futures_util::{StreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use registry::{Key, List, Prefix, Registry};
use serde::Deserialize;
use serde_json::json;

use super::kv::close;
use super::output::Output;
use super::{Failure, Outcome, Settings, prefix};

/// How many puts are on their way at once.
const IN_FLIGHT: usize = 256;

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The file of JSON lines; `-` reads standard input
    file: PathBuf,
}

/// One line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    value: Option<String>,
    value_base64: Option<String>,
}

impl Line {
    fn parse(text: &[u8]) -> Result<(Key, Bytes), String> {
        // Each is a text of one line to its parser; which line of the file it is, is said before.
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

impl Import {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let (input, size): (Box<dyn Read + Send>, Option<u64>) = match self.file.to_str() {
            Some("-") => (Box::new(io::stdin()), None),
            _ => {
                let wrong = |error: io::Error| Failure::usage(format!("{}: {error}", self.file.display()));
                let file = File::open(&self.file).map_err(wrong)?;
                let size = file.metadata().map_err(wrong)?.len();
                (Box::new(file), Some(size))
            }
        };
        let registry = settings.connect().await?;
        let bar = progress(size);
        let mut lines = BufReader::with_capacity(1 << 20, bar.wrap_read(input)).split(b'\n');
        let (mut number, failed) = (0, Cell::new(false));
        let lines = std::iter::from_fn(|| {
            while !failed.get() {
                number += 1;
                match lines.next()? {
                    Ok(text) if text.trim_ascii().is_empty() => {}
                    line => return Some((number, line)),
                }
            }
            None
        });
        let puts = stream::iter(lines).map(|(number, line)| {
            let at = move |code, why: String| Failure::new(code, format!("line {number}: {why}"));
            let registry = registry.clone();
            async move {
                let line = line.map_err(|error| at(1, error.to_string()))?;
                let (key, value) = Line::parse(&line).map_err(|why| at(2, why))?;
                registry
                    .put(&key, value)
                    .await
                    .map_err(|error| Failure::from(error).at(number))?;
                Ok::<_, Failure>(())
            }
        });
        // Lines are put again without harm, so after a failure the same file is imported again. What is on its way then is
        // waited for, so that all lines before a wrong one are there.
        let (mut count, mut imported) = (0_u64, Ok(()));
        let mut puts = std::pin::pin!(puts.buffer_unordered(IN_FLIGHT));
        while let Some(put) = puts.next().await {
            match put {
                Ok(()) => count += 1,
                Err(failure) => {
                    failed.set(true);
                    imported = imported.and(Err(failure));
                }
            }
        }
        bar.finish_and_clear();
        close(&registry).await;
        let summary = || format!("imported {count} keys");
        match imported {
            Ok(()) => out.line(summary, || json!({ "imported": count }))?,
            Err(failure) => {
                return Err(failure.after(&format!("{}; import the file again once it is mended", summary())));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Where to begin
    #[arg(value_parser = prefix, default_value = "/")]
    prefix: Prefix,
}

impl Export {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let bar = progress(None);
        let mut list = List::new(self.prefix);
        let (mut count, mut left_out) = (0_u64, 0_u64);
        loop {
            let page = registry.list(list.clone()).await?;
            let mut text = String::new();
            for entry in &page.entries {
                if entry.session.is_some() {
                    left_out += 1;
                    continue;
                }
                let (name, value) = registry::json::value(&entry.value);
                text.push_str(&format!("{}\n", json!({ "key": entry.key.as_str(), name: value })));
                count += 1;
            }
            bar.inc(text.len() as u64);
            out.bytes(text.as_bytes())?;
            match page.next {
                Some(next) => list.after = Some(next),
                None => break,
            }
        }
        bar.finish_and_clear();
        close(registry).await;
        match out.json {
            true => eprintln!("{}", json!({ "exported": count, "left_out": left_out })),
            false => eprintln!("exported {count} keys, left out {left_out} ephemeral ones"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A bar on a terminal, and nothing elsewhere.
pub(super) fn progress(size: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    match size {
        Some(size) => ProgressBar::new(size).with_style(
            ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
                .expect("the template is good"),
        ),
        None => ProgressBar::new_spinner().with_style(
            ProgressStyle::with_template("{spinner} {bytes} {bytes_per_sec}").expect("the template is good"),
        ),
    }
}
