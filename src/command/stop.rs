//! Ctrl-C, SIGTERM, and a terminal that is closed.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Failure;

/// Counts Ctrl-C, SIGTERM and SIGHUP from the moment it is made, so that one between two waits is not lost.
#[derive(Clone, Debug)]
pub(super) struct Stop(watch::Receiver<u32>);

impl Stop {
    /// Listens from now on. The signals no longer end the process by themselves.
    pub(super) fn listen() -> Result<Self, Failure> {
        let failed = |error| Failure::io("can't listen for signals", &error);
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut hang_up = match ignores_hang_up() {
            true => None,
            false => Some(signal(SignalKind::hangup()).map_err(failed)?),
        };
        let (heard, stop) = watch::channel(0);
        tokio::spawn(async move {
            loop {
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
                heard.send_modify(|count| *count += 1);
            }
        });
        Ok(Self(stop))
    }

    /// Waits until the process is asked to stop; returns at once if it was.
    pub(super) async fn asked(&self) {
        self.heard(1).await;
    }

    /// Waits for `work`, which may be a request to a store that can't be reached, unless the process is asked to stop once
    /// more: by a second signal if it was asked already.
    pub(super) async fn unless_again<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let next = *self.0.borrow() + 1;
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.heard(next) => None,
        }
    }

    async fn heard(&self, times: u32) {
        // An error says that the runtime ends, and the process with it.
        let _ = self.0.clone().wait_for(|count| *count >= times).await;
    }
}

/// Whether the process was started to outlive its terminal, as by `nohup`: listening would undo that.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // The lowest bit is signal 1.
    ignored.is_some_and(|mask| mask & 1 == 1)
}
