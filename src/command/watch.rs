//! watch

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use registry::{Event, Prefix, Registry, Revision, WatchFrom, WatchItem, WatchRequest, WatchScope};
use serde_json::json;

use super::kv::close;
use super::output::{Output, value_line};
use super::stop::Stop;
use super::{Failure, Outcome, prefix};

#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// What to watch; it need not exist yet
    #[arg(value_parser = prefix, default_value = "/")]
    prefix: Prefix,
    /// Only the direct children.
    #[arg(long, conflicts_with = "key")]
    children: bool,
    /// Only the key itself.
    #[arg(long)]
    key: bool,
    /// Only what comes after this revision.
    #[arg(long, value_name = "REVISION")]
    after: Option<u64>,
}

impl Watch {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let scope = match (self.key, self.children) {
            (true, _) => WatchScope::Key,
            (_, true) => WatchScope::Children,
            _ => WatchScope::Subtree,
        };
        let from = self
            .after
            .map_or(WatchFrom::Now, |revision| WatchFrom::After(Revision(revision)));
        let stop = Stop::listen()?;
        let mut watch = registry
            .watch(WatchRequest {
                from,
                ..WatchRequest::new(self.prefix, scope)
            })
            .await?;
        loop {
            let item = tokio::select! {
                item = watch.next() => item,
                () = stop.asked() => break,
            };
            match item {
                Some(item) => print(item?, out)?,
                None => return Err(Failure::new(1, "the watch has ended")),
            }
        }
        close(registry).await;
        Ok(ExitCode::SUCCESS)
    }
}

fn print(item: WatchItem, out: Output) -> Result<(), Failure> {
    match item {
        WatchItem::Reset => out.line(|| "reset".into(), || json!({ "type": "reset" })),
        WatchItem::Synced(revision) => out.line(
            || format!("synced  {revision}"),
            || json!({ "type": "synced", "revision": revision.0 }),
        ),
        WatchItem::Changes(events) => {
            for event in &events {
                out.line(|| people(event), || registry::json::event(event))?;
            }
            Ok(())
        }
    }
}

fn people(event: &Event) -> String {
    format!(
        "{} {} {}  {}",
        registry::json::kind(event),
        event.revision(),
        event.key(),
        value_line(&event.entry().value)
    )
}
