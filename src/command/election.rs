//! elect, register

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use registry::{Error, Key, Leader, Refusal, Registered, Registration, Registry};
use serde_json::json;

use super::holding::{Hold, hold};
use super::kv::close;
use super::output::{Output, value_line};
use super::stop::Stop;
use super::{Failure, Outcome, key};

#[derive(Debug, Args)]
pub(crate) struct Elect {
    /// The election's name, such as /app/scheduler
    #[arg(value_parser = key)]
    name: Key,
    /// What the leader publishes: an address, for one.
    #[arg(long, required_unless_present = "observe")]
    value: Option<String>,
    /// Prints who leads, and every change, and stands for nothing.
    #[arg(long, conflicts_with_all = ["value", "command"])]
    observe: bool,
    /// The command to run while leading; it finds the fencing token in REGISTRY_TOKEN.
    #[arg(last = true)]
    command: Vec<String>,
}

impl Elect {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        if self.observe {
            return self.observe(registry, out).await;
        }
        let election = registry.election(&self.name);
        let stop = Stop::listen()?;
        let leadership = tokio::select! {
            won = election.campaign(self.value.unwrap_or_default()) => match won {
                Ok(won) => won,
                Err(error) => {
                    // Its place in the queue ends with its session.
                    stop.unless_again(close(registry)).await;
                    return Err(error.into());
                }
            },
            () = stop.asked() => {
                close(registry).await;
                return Ok(ExitCode::from(Failure::STOPPED));
            }
        };
        hold(Hold::Leadership(leadership), registry, &self.command, &stop, out).await
    }

    async fn observe(&self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let stop = Stop::listen()?;
        let mut campaign = registry.election(&self.name).observe().await?;
        loop {
            let leader = tokio::select! {
                leader = campaign.next() => leader,
                () = stop.asked() => break,
            };
            match leader {
                Some(leader) => print(leader?, out)?,
                None => return Err(Failure::new(1, "the observation has ended")),
            }
        }
        close(registry).await;
        Ok(ExitCode::SUCCESS)
    }
}

fn print(leader: Option<Leader>, out: Output) -> Result<(), Failure> {
    match leader {
        Some(leader) => {
            let (name, value) = registry::json::value(&leader.value);
            out.line(
                || format!("leader  {}  {}", leader.token, value_line(&leader.value)),
                || json!({ "token": leader.token, name: value }),
            )
        }
        None => out.line(|| "no leader".into(), || json!({ "token": null })),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Register {
    /// The key, such as /app/workers/w1
    #[arg(value_parser = key)]
    key: Key,
    /// Its value
    value: String,
    /// Takes the key from whoever holds it: for a restart before the predecessor's session has expired.
    #[arg(long)]
    take_over: bool,
}

impl Register {
    pub(crate) async fn run(self, registry: &Arc<dyn Registry>, out: Output) -> Outcome {
        let registration = match self.take_over {
            true => Registration::taking_over(registry, &self.key, self.value.clone()).await?,
            false => match registry.register(&self.key, self.value.clone()).await {
                Err(
                    error @ Error::Refused {
                        refusal: Refusal::OwnedBy(_),
                        ..
                    },
                ) => {
                    return Err(
                        Failure::from(error).after("wait until that session ends, or take the key with --take-over")
                    );
                }
                registered => registered?,
            },
        };
        let stop = Stop::listen()?;
        let shown = self.show(&registration, &stop, out).await;
        let kept = |why: Failure| why.after(&format!("{} is deleted once the session has expired", self.key));
        let left = match stop.unless_again(registration.unregister()).await {
            Some(Ok(())) => {
                stop.unless_again(close(registry)).await;
                Ok(())
            }
            Some(Err(error)) => Err(kept(error.into())),
            None => Err(kept(Failure::new(
                Failure::STOPPED,
                "stopped again before the key was deleted",
            ))),
        };
        shown.and(left).map(|()| ExitCode::SUCCESS)
    }

    /// Prints each state until Ctrl-C.
    async fn show(&self, registration: &Registration, stop: &Stop, out: Output) -> Result<(), Failure> {
        let mut states = registration.state();
        loop {
            let state = *states.borrow_and_update();
            let word = match state {
                Registered::There(_, _) => "registered",
                Registered::Lost => "lost, putting it back",
                Registered::Refused => "another's, trying again",
            };
            out.line(
                || format!("{}: {word}", self.key),
                || json!({ "key": self.key.as_str(), "state": word }),
            )?;
            tokio::select! {
                biased;
                changed = states.changed() => if changed.is_err() { return Err(Failure::new(1, "the registration has ended")) },
                () = stop.asked() => return Ok(()),
            }
        }
    }
}
