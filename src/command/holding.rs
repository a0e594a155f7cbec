//! What `lock` and `elect` share: holding something until Ctrl-C, until a command ends, or until it is lost.

use std::process::ExitCode;
use std::sync::Arc;

use registry::{BootInstant, Error, Held, Key, Leadership, Registry, Token};
use serde_json::json;

use super::failure::warn;
use super::kv::close;
use super::output::Output;
use super::process::run_while;
use super::stop::Stop;
use super::{Failure, Outcome};

/// A lock that is held, or a leadership.
pub(super) enum Hold {
    Lock(Held),
    Leadership(Leadership),
}

impl Hold {
    fn name(&self) -> &Key {
        match self {
            Self::Lock(held) => held.name(),
            Self::Leadership(leadership) => leadership.name(),
        }
    }

    pub(super) fn token(&self) -> Token {
        match self {
            Self::Lock(held) => held.token(),
            Self::Leadership(leadership) => leadership.token(),
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        match self {
            Self::Lock(held) => held.is_lost(),
            Self::Leadership(leadership) => leadership.is_lost(),
        }
    }

    pub(super) async fn lost(&self) {
        match self {
            Self::Lock(held) => held.lost().await,
            Self::Leadership(leadership) => leadership.lost().await,
        }
    }

    /// Until when no other client can hold it, as far as is known now.
    fn valid_until(&self) -> Option<BootInstant> {
        match self {
            Self::Lock(held) => held.valid_until(),
            Self::Leadership(leadership) => leadership.valid_until(),
        }
    }

    async fn release(self) -> registry::Result<()> {
        match self {
            Self::Lock(held) => held.release().await,
            Self::Leadership(leadership) => leadership.resign().await,
        }
    }

    /// What it is, for an error message.
    pub(super) fn what(&self) -> String {
        match self {
            Self::Lock(held) => format!("the lock {}", held.name()),
            Self::Leadership(leadership) => format!("the leadership of {}", leadership.name()),
        }
    }
}

/// Holds it until Ctrl-C or the end of the command, then releases it.
///
/// A loss is printed, and the process ends, before any request to the store: the store may be unreachable, and another
/// client may hold what was lost as soon as the session's TTL has passed. So nothing that is lost is released or closed.
pub(super) async fn hold(
    hold: Hold,
    registry: &Arc<dyn Registry>,
    command: &[String],
    stop: &Stop,
    out: Output,
) -> Outcome {
    let what = hold.what();
    let outcome = match command {
        [] => until_stopped(&hold, stop, out).await,
        [program, arguments @ ..] => run_while(program, arguments, &hold, stop, out).await,
    };
    if let Err(failure) = &outcome
        && failure.code() == Failure::LOST
    {
        return outcome;
    }
    let valid_until = hold.valid_until();
    let unreleased = match stop.unless_again(hold.release()).await {
        Some(Ok(())) => {
            // A session that can't be closed expires; nothing depends on it any more.
            stop.unless_again(close(registry)).await;
            return outcome;
        }
        Some(Err(error)) => {
            // Lost though the time is not over in which the session was sure: the store said so, and nobody knows whether
            // that was before the command ended. Otherwise the store could not be reached until then.
            let in_time = valid_until.is_none_or(|until| BootInstant::now() < until);
            if matches!(error, Error::HoldLost { .. }) && in_time {
                return Err(Failure::from(error));
            }
            Failure::from(error)
        }
        None => Failure::new(Failure::STOPPED, format!("stopped again before {what} was released")),
    };
    let unreleased = unreleased.after("it is free once the session has expired");
    match outcome {
        // The hold was valid when the command ended, so the result is the command's.
        Ok(code) if !command.is_empty() => {
            warn(unreleased.text(), out.json);
            Ok(code)
        }
        outcome => outcome.and(Err(unreleased)),
    }
}

/// Waits for Ctrl-C, or for the loss.
async fn until_stopped(hold: &Hold, stop: &Stop, out: Output) -> Outcome {
    let (name, token) = (hold.name(), hold.token());
    let holding = match hold {
        Hold::Lock(_) => "holding",
        Hold::Leadership(_) => "leading",
    };
    out.line(
        || format!("{holding} {name} with token {token}, until Ctrl-C"),
        || json!({ "name": name.as_str(), "token": token }),
    )?;
    tokio::select! {
        biased;
        () = hold.lost() => Err(Failure::new(Failure::LOST, format!("{} was lost", hold.what()))),
        () = stop.asked() => Ok(ExitCode::SUCCESS),
    }
}
