//! How a command fails: what is said, and the exit code.

use std::io::Write;
use std::process::ExitCode;

use registry::{Config, Error};

#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    pub(crate) const NOT_FOUND: u8 = 3;
    pub(crate) const LOST: u8 = 7;
    pub(crate) const UNKNOWN: u8 = 6;
    pub(crate) const STOPPED: u8 = 130;
    const UNREAD: u8 = 141;

    pub(crate) fn new(code: u8, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(2, text)
    }

    /// The code alone, for a failure that was reported already.
    pub(crate) fn silent(code: u8) -> Self {
        Self::new(code, "")
    }

    /// The reader of the output is gone. Reported by the code alone, as a shell does (SIGPIPE).
    pub(crate) fn unread() -> Self {
        Self::silent(Self::UNREAD)
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The same, with another code.
    pub(crate) fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    pub(crate) fn io(what: &str, error: &std::io::Error) -> Self {
        Self::new(1, format!("{what}: {error}"))
    }

    /// A failure to connect, with what to do about it.
    pub(crate) fn connect(error: Error, config: &Config) -> Self {
        let hint = match &config.backend {
            #[cfg(feature = "raft")]
            registry::Backend::Raft(_) => {
                "is a member running there, and a majority of its group? `registry serve` starts a member"
            }
            #[allow(unreachable_patterns)]
            _ => "is the store running there, and are the settings right?",
        };
        match error {
            Error::Unavailable { .. } => Self::from(error).after(hint),
            error => Self::from(error),
        }
    }

    /// The same, of one line of a file.
    pub(crate) fn at(self, line: usize) -> Self {
        Self {
            text: format!("line {line}: {}", self.text),
            ..self
        }
    }

    /// The same, with what was done before, or what to do about it, on a line of its own.
    pub(crate) fn after(self, more: &str) -> Self {
        let text = match self.text.as_str() {
            "" => more.to_owned(),
            text => format!("{text}\n{more}"),
        };
        Self { text, ..self }
    }

    /// Prints the failure to standard error. Returns the exit code.
    pub(crate) fn report(self, json: bool) -> ExitCode {
        match (self.text.is_empty(), json) {
            (true, _) => {}
            (false, true) => complain(&serde_json::json!({ "error": self.text, "code": self.code }).to_string()),
            (false, false) => complain(&format!("registry: {}", self.text)),
        }
        ExitCode::from(self.code)
    }
}

/// Prints a warning to standard error: the command goes on, or ends with a code that says something else.
pub(crate) fn warn(text: &str, json: bool) {
    match json {
        true => complain(&serde_json::json!({ "warning": text }).to_string()),
        false => complain(&format!("registry: warning: {text}")),
    }
}

/// Prints a line to standard error, which may be closed: the exit code says the same.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Key(_)
            | Error::Namespace(_)
            | Error::TooLarge { .. }
            | Error::InvalidRequest(_)
            | Error::Config { .. } => 2,
            Error::Conflict { .. } | Error::Refused { .. } => 4,
            Error::Unavailable { .. } | Error::DeadlineExceeded { .. } => 5,
            Error::OutcomeUnknown { .. } => Self::UNKNOWN,
            Error::SessionExpired { .. } | Error::HoldLost { .. } => Self::LOST,
            Error::AccessDenied { .. } => 8,
            _ => 1,
        };
        let mut text = error.with_causes();
        if code == Self::UNKNOWN {
            text.push_str("\nit may have been done, or may be later: read back before you retry");
        }
        Self { code, text }
    }
}
