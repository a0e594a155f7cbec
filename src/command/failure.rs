//! How a command fails: what is said, and the exit code.

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

    /// Nobody reads what is printed. Told by the code alone, as a shell tells it (SIGPIPE).
    pub(crate) fn unread() -> Self {
        Self::new(Self::UNREAD, "")
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
        Self {
            text: format!("{}\n{more}", self.text),
            ..self
        }
    }

    pub(crate) fn report(self, json: bool) -> ExitCode {
        match (self.code, json) {
            (Self::UNREAD, _) => {}
            (_, true) => eprintln!("{}", serde_json::json!({ "error": self.text, "code": self.code })),
            (_, false) => eprintln!("registry: {}", self.text),
        }
        ExitCode::from(self.code)
    }
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
            Error::OutcomeUnknown { .. } => 6,
            Error::SessionExpired { .. } | Error::HoldLost { .. } => Self::LOST,
            Error::AccessDenied { .. } => 8,
            _ => 1,
        };
        let mut text = error.with_causes();
        if code == 6 {
            text.push_str("\nit may have been done, or may be later: read back before trying again");
        }
        Self { code, text }
    }
}
