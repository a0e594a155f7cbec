//! Ctrl-C, SIGTERM, and a terminal that is closed.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Failure;

/// Hears Ctrl-C, SIGTERM and SIGHUP from the moment it is made, and remembers: one that comes between two waits is not lost.
#[derive(Clone, Debug)]
pub(super) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Listens from now on, in place of the signals' own way of ending the process.
    pub(super) fn listen() -> Result<Self, Failure> {
        let failed = |error| Failure::io("can't listen for signals", &error);
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut hang_up = match ignores_hang_up() {
            true => None,
            false => Some(signal(SignalKind::hangup()).map_err(failed)?),
        };
        let (heard, stop) = watch::channel(false);
        tokio::spawn(async move {
            let hang_up = async {
                match &mut hang_up {
                    Some(signal) => signal.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hang_up => {}
            }
            heard.send_replace(true);
        });
        Ok(Self(stop))
    }

    /// Waits until the process is asked to stop; at once if it was.
    pub(super) async fn asked(&self) {
        // An error says that the runtime ends, and the process with it.
        let _ = self.0.clone().wait_for(|asked| *asked).await;
    }
}

/// Whether whoever started the process wants it to outlive the terminal, as `nohup` does: to listen would undo that.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // The lowest bit is signal 1.
    ignored.is_some_and(|mask| mask & 1 == 1)
}
