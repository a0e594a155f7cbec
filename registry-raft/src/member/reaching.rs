//! Whether a member reaches its group, for handles that watch and wait there.
//!
//! A member that is cut off from the others delivers nothing, and its handles don't notice: their connections to it live. It
//! ends their watches and waits then, so that they go on at another member.

use std::time::Duration;

use registry_api::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use super::{Core, unavailable};

/// The pause between two checks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a check may take, an election included, before the member counts as cut off.
const REACHES: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

/// Ends what waits at a member that is cut off. A clone for each handle's watch or wait.
#[derive(Clone, Debug)]
pub(crate) struct CutOff(watch::Receiver<bool>);

impl CutOff {
    /// Waits until the member is cut off from its group, or gone.
    ///
    /// # Cancel safety
    /// Leaves nothing behind.
    pub(crate) async fn wait(&mut self) -> Error {
        // An error says that the member is gone.
        let _ = self.0.wait_for(|cut_off| *cut_off).await;
        unavailable("the member does not reach its group")
    }
}

impl Core {
    /// What a handle's watch or wait is ended by.
    pub(crate) fn cut_off(&self) -> CutOff {
        CutOff(self.cut_off.subscribe())
    }

    /// Checks whether this member reaches its group, as long as handles watch or wait here.
    pub(super) async fn keep_reaching(self, mut stopping: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = sleep(PERIOD) => {}
                // An error says that the member is gone.
                _ = stopping.changed() => return,
            }
            let cut_off = self.cut_off.receiver_count() > 0 && !self.reaches_its_group().await;
            self.cut_off.send_if_modified(|before| {
                if cut_off && !*before {
                    tracing::warn!(
                        "this member does not reach its group: handles that watch and wait here go elsewhere"
                    );
                }
                std::mem::replace(before, cut_off) != cut_off
            });
        }
    }

    async fn reaches_its_group(&self) -> bool {
        let until = Instant::now() + REACHES;
        loop {
            match timeout_at(until, self.barrier()).await {
                Ok(Ok(())) => return true,
                Ok(Err(_)) if Instant::now() + PAUSE < until => sleep(PAUSE).await,
                Ok(Err(_)) | Err(_) => return false,
            }
        }
    }
}
