//! members

use std::process::ExitCode;

use clap::{Args, Subcommand};
use registry::Backend;
use registry::raft::{MemberChange, Status};
use serde_json::json;

use super::failure::warn;
use super::output::Output;
use super::{Failure, Outcome, Settings};

#[derive(Debug, Args)]
pub(crate) struct Members {
    #[command(subcommand)]
    change: Option<Change>,
}

#[derive(Debug, Subcommand)]
enum Change {
    /// Takes in a member that was started with `join`, as a learner without a vote.
    #[command(after_help = "Example: registry members add d 10.0.0.4:7480")]
    Add {
        /// Its name.
        name: String,
        /// Where it listens, as host:port.
        address: String,
    },
    /// Gives a learner a vote, once it has caught up. A group has 1, 3 or 5 voters.
    #[command(after_help = "Example: registry members promote d")]
    Promote {
        /// Its name.
        name: String,
    },
    /// Takes a member out for good: it stops, and can't come back with its data.
    #[command(after_help = "Example: registry members remove c")]
    Remove {
        /// Its name.
        name: String,
    },
    /// Makes another member the Raft leader.
    #[command(after_help = "Example: registry members transfer a")]
    Transfer {
        /// Its name.
        name: String,
    },
}

impl Members {
    pub(crate) async fn run(self, settings: &Settings, out: Output) -> Outcome {
        let config = settings.remote()?;
        let Backend::Raft(raft) = &config.backend else {
            return Err(Failure::usage("only the embedded store has members of its own"));
        };
        if let Some(change) = self.change {
            let change = match change {
                Change::Add { name, address } => MemberChange::Add { name, address },
                Change::Promote { name } => MemberChange::Promote { name },
                Change::Remove { name } => MemberChange::Remove { name },
                Change::Transfer { name } => MemberChange::Transfer { name },
            };
            let of_voters = matches!(change, MemberChange::Promote { .. } | MemberChange::Remove { .. });
            let changed = registry::raft::change_members(raft, &config.options, change).await;
            changed.map_err(|error| Failure::connect(error, &config))?;
            match registry::raft::status(raft, &config.options).await {
                Ok(status) => {
                    show(&status, out)?;
                    if let Some(warning) = of_voters.then(|| cost_of_voters(&status)).flatten() {
                        warn(&warning, out.json);
                    }
                }
                // The change is made, which the exit code says.
                Err(error) => {
                    let text = format!("the members were changed, and can't be listed: {}", error.with_causes());
                    warn(&text, out.json);
                }
            }
            return Ok(ExitCode::SUCCESS);
        }
        let status = registry::raft::status(raft, &config.options).await;
        show(&status.map_err(|error| Failure::connect(error, &config))?, out)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What the number of voters costs, if there are better ones: 1, 3 and 5.
fn cost_of_voters(status: &Status) -> Option<String> {
    let voters = status.members.iter().filter(|member| member.role != "learner").count();
    let (majority, failures) = (voters / 2 + 1, voters.saturating_sub(1) / 2);
    let costs = match voters {
        2 => "both have to be up, so the group stops when either fails: it is less available than one voter".to_owned(),
        even if even % 2 == 0 => format!(
            "every write waits for {majority} of them, and the group survives the failure of {failures}, as it does with {} voters",
            even - 1
        ),
        many if many > 5 => {
            format!("every write waits for {majority} of them; 5 voters survive the failure of 2, which is enough")
        }
        _ => return None,
    };
    Some(format!("the group has {voters} voters: {costs}. Use 1, 3 or 5 voters"))
}

/// A line for each member.
pub(super) fn show(status: &Status, out: Output) -> Result<(), Failure> {
    for member in &status.members {
        out.line(
            || {
                let lag = match member.lag {
                    Some(0) => String::new(),
                    Some(lag) => format!("  lacks {lag} entries"),
                    None => "  how far it is, is not known".into(),
                };
                let applied = member.applied.map(|applied| format!("  applied {applied}"));
                let this = match member.id == status.answered_by {
                    true => "  (answered)",
                    false => "",
                };
                format!(
                    "member {:10} {:8} {}{}{lag}{this}",
                    member.name,
                    member.role,
                    member.address,
                    applied.unwrap_or_default()
                )
            },
            || json!({ "member": member }),
        )?;
    }
    Ok(())
}
