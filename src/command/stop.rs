//! Ctrl-C and SIGTERM.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Failure;

/// Hears Ctrl-C and SIGTERM from the moment it is made, and remembers: one that comes between two waits is not lost.
#[derive(Clone, Debug)]
pub(super) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Listens from now on, in place of the signals' own way of ending the process.
    pub(super) fn listen() -> Result<Self, Failure> {
        let failed = |error| Failure::io("can't listen for signals", &error);
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let (heard, stop) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
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
