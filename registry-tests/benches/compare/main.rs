//! The embedded store beside etcd and ZooKeeper on this machine, all as they are shipped, each change synced to disk.
//!
//! `cargo bench -p registry-tests --bench compare -- [--rounds N] [--seconds S] [--keys N]
//! [--sessions N] [SECTION]...` starts servers of
//! its own on loopback and measures; a section's samples are kept in `docs/performance/samples/`, and the page is written
//! from all that are there. `scripts/compare` installs what it needs.

mod client;
mod expiry;
mod growth;
mod keys;
mod lock;
mod machine;
mod measure;
mod page;
mod plot;
mod restart;
mod sample;
mod servers;
mod throughput;
mod watch;

use std::path::PathBuf;

use registry_api::BoxError;
use sample::Samples;

/// As in the `registry` command.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SECTIONS: [&str; 8] = ["one", "three", "keys", "restart", "watch", "lock", "expiry", "growth"];

/// What is asked for.
struct Plan {
    rounds: usize,
    seconds: f64,
    /// How many keys the store that is restarted holds.
    keys: usize,
    /// How many sessions are kept, and end at once.
    sessions: usize,
    sections: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    match arguments.first().map(String::as_str) {
        // `cargo test` builds benches too, and runs them with this.
        Some("--test") => return Ok(()),
        Some("member") => return servers::member(&arguments[1..]).await,
        Some("work") => return throughput::work(&arguments[1..]).await,
        Some("machine") => {
            println!("{}", machine::describe()?);
            return Ok(());
        }
        Some("holders") => return expiry::holders(&arguments[1..]).await,
        _ => {}
    }
    let plan = plan(&arguments)?;
    registry_tests::process::take_open_files();
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let kept = docs.join("performance/samples");
    std::fs::create_dir_all(&kept)?;
    for section in &plan.sections {
        println!("== {section}");
        let mut samples = measured(section, &plan).await?;
        samples.machine = machine::describe()?;
        samples.store(&kept.join(format!("{section}.json")))?;
        samples.print();
    }
    page::write(&kept, &docs)
}

async fn measured(section: &str, plan: &Plan) -> Result<Samples, BoxError> {
    match section {
        "one" => throughput::measure(1, plan).await,
        "three" => throughput::measure(3, plan).await,
        "keys" => keys::measure(plan).await,
        "restart" => restart::measure(plan).await,
        "watch" => watch::measure(plan).await,
        "lock" => lock::measure(plan).await,
        "expiry" => expiry::measure(plan).await,
        "growth" => growth::measure(plan).await,
        other => Err(format!("no section {other}: {}", SECTIONS.join(", ")).into()),
    }
}

fn plan(arguments: &[String]) -> Result<Plan, BoxError> {
    let mut plan = Plan {
        rounds: 9,
        seconds: 1.0,
        keys: 1_000_000,
        sessions: expiry::SESSIONS,
        sections: Vec::new(),
    };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--rounds" => plan.rounds = value()?.parse()?,
            "--seconds" => plan.seconds = value()?.parse()?,
            "--keys" => plan.keys = value()?.parse()?,
            "--sessions" => plan.sessions = value()?.parse()?,
            // To write the page anew from what is there.
            "page" => return Ok(plan),
            section => plan.sections.push(section.to_owned()),
        }
    }
    if plan.sections.is_empty() {
        plan.sections = SECTIONS.map(str::to_owned).to_vec();
    }
    Ok(plan)
}
