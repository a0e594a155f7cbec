//! A command that runs under a lock or a leadership.

use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use registry::Revision;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpgid};
use tokio::process::{Child, Command};

use super::stop::Stop;
use super::{Failure, Outcome};

/// How long a command may take to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether any of its processes is left.
const LOOK: Duration = Duration::from_millis(20);

/// Runs a command in a process group of its own until it ends; if `lost` comes first it is killed, and that is the
/// failure.
///
/// It reads what this process was given to read, unless that is a terminal: this process is the one in its foreground, and
/// a command that tried to read there would be stopped for ever (SIGTTIN).
pub(super) async fn run_while(
    command: &[String],
    name: &str,
    token: Revision,
    lost: impl Future<Output = ()>,
    stop: &Stop,
) -> Outcome {
    let [program, arguments @ ..] = command else {
        return Err(Failure::usage("no command to run"));
    };
    let input = match std::io::stdin().is_terminal() {
        true => Stdio::null(),
        false => Stdio::inherit(),
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(input)
        .env("REGISTRY_NAME", name)
        .env("REGISTRY_TOKEN", token.to_string())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| Failure::usage(format!("{program}: {error}")))?;
    tokio::select! {
        ended = child.wait() => passed_on(ended.map_err(|error| Failure::io(program, &error))?),
        () = stop.asked() => {
            let ended = end(&mut child).await.map_err(|error| Failure::io(program, &error))?;
            passed_on(ended)
        }
        () = lost => {
            // However it ended: it had `GRACE`, of which its session had a part left.
            let _ = end(&mut child).await;
            Err(Failure::new(Failure::LOST, format!("{name} was lost, the command was ended")))
        }
    }
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
fn passed_on(status: ExitStatus) -> Outcome {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
