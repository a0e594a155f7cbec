//! What is printed, for people and for programs.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::Failure;

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// Prints one line: the text for people, the object for programs.
    pub(crate) fn line(self, people: impl FnOnce() -> String, programs: impl FnOnce() -> Value) -> Result<(), Failure> {
        let line = if self.json { programs().to_string() } else { people() };
        self.bytes(format!("{line}\n").as_bytes())
    }

    /// Prints bytes as they are.
    pub(crate) fn bytes(self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            // Whoever read has read enough, or has died: `registry ls | head`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::unread()),
            Err(error) => Err(Failure::io("can't print", &error)),
        }
    }
}

/// Whether standard error is a terminal that shows escape sequences.
pub(crate) fn shows_escapes() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|name| name != "dumb")
}

/// A bar on a terminal, and nothing elsewhere.
pub(super) fn progress(size: Option<u64>) -> ProgressBar {
    if !shows_escapes() {
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

/// A value on one line of a terminal: escaped, and cut.
pub(crate) fn value_line(value: &[u8]) -> String {
    const MOST: usize = 100;
    match std::str::from_utf8(value) {
        Ok(text) if text.chars().count() <= MOST => text.escape_debug().to_string(),
        Ok(text) => format!(
            "{}... ({} bytes)",
            text.chars().take(MOST).collect::<String>().escape_debug(),
            value.len()
        ),
        Err(_) => format!("({} bytes)", value.len()),
    }
}
