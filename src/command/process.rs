//! A command that runs under a lock or a leadership.

use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpgid};
use tokio::process::{Child, Command};

use super::holding::Hold;
use super::output::Output;
use super::stop::Stop;
use super::{Failure, Outcome};

/// How long a command may take to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether any of its processes is left.
const LOOK: Duration = Duration::from_millis(20);

/// Runs a command in a process group of its own until it ends. When the hold is lost first, that is printed at once, and
/// the command is ended.
///
/// The command reads the standard input of this process, unless that is a terminal: this process is in its foreground, and
/// a command in another process group that reads from it is stopped (SIGTTIN).
pub(super) async fn run_while(program: &str, arguments: &[String], hold: &Hold, stop: &Stop, out: Output) -> Outcome {
    let input = match std::io::stdin().is_terminal() {
        true => Stdio::null(),
        false => Stdio::inherit(),
    };
    let name = match hold {
        Hold::Lock(held) => held.name(),
        Hold::Leadership(leadership) => leadership.name(),
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(input)
        .env("REGISTRY_NAME", name.as_str())
        .env("REGISTRY_TOKEN", hold.token().to_string())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| not_started(program, &error))?;
    let failed = |error: std::io::Error| Failure::io(program, &error);
    let mut lost = pin!(hold.lost());
    let ended = tokio::select! {
        biased;
        () = &mut lost => None,
        ended = child.wait() => Some(ended.map_err(failed)?),
        () = stop.asked() => {
            let mut ending = pin!(end(&mut child));
            tokio::select! {
                biased;
                () = &mut lost => {
                    let failure = was_lost(hold, out);
                    // However it ended.
                    let _ = ending.await;
                    return Err(failure);
                }
                ended = &mut ending => Some(ended.map_err(failed)?),
            }
        }
    };
    match ended {
        None => {
            let failure = was_lost(hold, out);
            // However it ended: it had `GRACE`.
            let _ = end(&mut child).await;
            Err(failure)
        }
        // This process may have been stopped meanwhile: the command may have outlived the hold.
        Some(ended) if hold.is_lost() => {
            let reason = format!(
                "{} was lost, perhaps before the command ended, with {ended}",
                hold.what()
            );
            Err(Failure::new(Failure::LOST, reason))
        }
        Some(ended) => Ok(passed_on(ended)),
    }
}

/// Prints the loss. The failure that is left to return has the code alone.
fn was_lost(hold: &Hold, out: Output) -> Failure {
    Failure::new(Failure::LOST, format!("{} was lost, ending the command", hold.what())).report(out.json);
    Failure::silent(Failure::LOST)
}

/// The failure of a command that could not be started, with the code of a shell: 127 if there is none of that name.
fn not_started(program: &str, error: &std::io::Error) -> Failure {
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => 127,
        _ => 126,
    };
    Failure::new(code, format!("{program}: {error}"))
}

/// SIGTERM to the whole group, SIGKILL to what is left of it.
async fn end(child: &mut Child) -> std::io::Result<ExitStatus> {
    let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let signal = |signal| {
        if let Some(group) = group {
            // It may have ended meanwhile.
            let _ = kill_process_group(group, signal);
        }
    };
    signal(Signal::TERM);
    // One that stands still hears it only when it goes on.
    signal(Signal::CONT);
    if let Ok(ended) = tokio::time::timeout(GRACE, all_end(child, group)).await {
        return ended;
    }
    signal(Signal::KILL);
    match tokio::time::timeout(GRACE, all_end(child, group)).await {
        Ok(ended) => ended,
        Err(_) => child.wait().await,
    }
}

/// Waits for the command, and for what it has started.
async fn all_end(child: &mut Child, group: Option<Pid>) -> std::io::Result<ExitStatus> {
    let ended = child.wait().await;
    while let Some(group) = group {
        // The first process of a container inherits what the command leaves behind; any other has none to wait for.
        let _ = waitpgid(group, WaitOptions::NOHANG);
        if test_kill_process_group(group) == Err(Errno::SRCH) {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    ended
}

/// The code of a command, as a shell passes it on.
fn passed_on(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from)
}
