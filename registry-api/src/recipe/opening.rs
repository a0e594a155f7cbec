//! The first part of a watch, up to its first `Synced`, within a deadline.

use std::time::Duration;

use crate::{Error, Registry, Result, Watch, WatchItem};

/// How long a watch may be silent before the store is checked.
const SILENCE: Duration = Duration::from_millis(200);

/// Reads a watch up to its first [`WatchItem::Synced`], which is handed over too.
///
/// A large listing may take long, so the time is bounded by the store's health and not by a constant: a watch that says
/// nothing is given up when the store does not answer within the `request_timeout` either.
///
/// # Errors
/// [`Error::Unavailable`] if the store does not answer; what ends the watch; [`Error::Closed`].
pub(super) async fn read_to_synced(
    registry: &dyn Registry,
    watch: &mut Watch,
    mut take: impl FnMut(WatchItem),
) -> Result<()> {
    loop {
        let check = async {
            loop {
                tokio::time::sleep(SILENCE).await;
                if let Err(error) = registry.health().await {
                    return error;
                }
            }
        };
        let item = tokio::select! {
            biased;
            item = watch.next() => item.ok_or(Error::Closed)??,
            error = check => return Err(error),
        };
        let synced = matches!(item, WatchItem::Synced(_));
        take(item);
        if synced {
            return Ok(());
        }
    }
}
