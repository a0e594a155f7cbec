//! lock

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use registry::{Held, Key, Registry};
use serde_json::json;

use super::holding::{Hold, hold};
use super::kv::close;
use super::output::Output;
use super::stop::Stop;
use super::{Failure, Outcome, key};

#[derive(Debug, Args)]
pub(crate) struct Lock {
    /// The lock's name, such as /app/nightly
    #[arg(value_parser = key)]
    name: Key,
    /// Gives up when the lock is not free in time: 10s, 500ms, 2m.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "now")]
    wait: Option<Duration>,
    /// Gives up at once when the lock is not free.
    #[arg(long = "try")]
    now: bool,
    /// What others see of the holder; host and process by default.
    #[arg(long)]
    label: Option<String>,
    /// Shows who holds the lock and who waits, and takes nothing.
    #[arg(long, conflicts_with_all = ["wait", "now", "label", "command"])]
    show: bool,
    /// The command to run under the lock; it finds the fencing token in REGISTRY_TOKEN.
    #[arg(last = true)]
    command: Vec<String>,
}

impl Lock {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        if self.show {
            return self.show(registry, out).await;
        }
        let stop = Stop::listen()?;
        let held = tokio::select! {
            held = self.acquire(registry) => match held {
                Ok(held) => held,
                Err(failure) => {
                    // Its place in the queue ends with its session.
                    stop.unless_again(close(registry)).await;
                    return Err(failure);
                }
            },
            () = stop.asked() => {
                close(registry).await;
                return Ok(ExitCode::from(Failure::STOPPED));
            }
        };
        hold(Hold::Lock(held), registry, &self.command, &stop, out).await
    }

    async fn acquire(&self, registry: &Arc<dyn Registry>) -> Result<Held, Failure> {
        let lock = registry
            .lock(&self.name)
            .label(self.label.clone().unwrap_or_else(whoami));
        match (self.now, self.wait) {
            (true, _) => {
                let taken = || Failure::new(5, format!("{} is taken", self.name));
                lock.try_acquire().await?.ok_or_else(taken)
            }
            (false, Some(wait)) => Ok(lock.acquire_within(wait).await?),
            (false, None) => Ok(lock.acquire().await?),
        }
    }

    async fn show(&self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let contenders = registry.lock(&self.name).contenders().await?;
        close(registry).await;
        for (place, contender) in contenders.iter().enumerate() {
            let role = if place == 0 { "holds" } else { "waits" };
            let label = String::from_utf8_lossy(&contender.value);
            let session = contender.session.map(|session| session.to_string());
            out.line(
                || {
                    format!(
                        "{role} {:>10} {}  {label}",
                        contender.token.get(),
                        session.clone().unwrap_or_default()
                    )
                },
                || json!({ "role": role, "token": contender.token, "session": session, "label": label }),
            )?;
        }
        match contenders.is_empty() {
            true => Err(Failure::new(Failure::NOT_FOUND, format!("nobody holds {}", self.name))),
            false => Ok(ExitCode::SUCCESS),
        }
    }
}

fn whoami() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{} pid {}", host.trim(), std::process::id())
}
