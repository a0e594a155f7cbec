//! Command-line arguments and dispatch.

#[cfg(feature = "raft")]
mod backup;
mod bench;
#[cfg(feature = "raft")]
mod demo;
mod election;
mod epoch;
mod export;
mod failure;
mod holding;
mod import;
mod kv;
mod lock;
#[cfg(feature = "raft")]
mod members;
mod output;
mod process;
#[cfg(feature = "mysql")]
mod schema;
#[cfg(feature = "raft")]
mod serve;
mod status;
mod stop;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand};
use registry::{Config, Key, Prefix, Registry};
use serde_json::json;

pub(crate) use failure::Failure;
use output::Output;

type Outcome = Result<ExitCode, Failure>;

/// Keys, ephemeral keys, watches, locks and elections, over an embedded Raft store, etcd, ZooKeeper or MySQL.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Without a config file, `serve` is one member of the embedded store on 127.0.0.1:7480 with its data in ./registry-data, \
and every other command asks that address.

Exit codes: 0 done; 1 failed; 2 wrong usage or settings; 3 not found; 4 a condition did not hold, or the put was refused; \
5 unavailable, nothing changed; 6 outcome unknown, read back before retrying; 7 lock, leadership or session lost; \
8 access denied; 130 stopped while waiting; 141 nobody reads on. `lock` and `elect` pass on the code of the command they run.

Settings come from the file (--config or REGISTRY_CONFIG; TOML, YAML or JSON), then REGISTRY__... in the environment \
(REGISTRY__TYPE, REGISTRY__RAFT__DATA_DIR), then --set. RUST_LOG=info shows what happens beneath."
)]
pub(crate) struct Cli {
    /// The config file.
    #[arg(long, short, global = true, env = "REGISTRY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, over the file and the environment: --set raft.data_dir=/var/lib/registry
    #[arg(long = "set", global = true, value_name = "NAME=VALUE", value_parser = pair)]
    settings: Vec<(String, String)>,
    /// Prints JSON: one object a line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a member until it is told to stop.
    #[cfg(feature = "raft")]
    #[command(
        after_help = "Example: registry serve --set raft.data_dir=/var/lib/registry --set raft.listen=127.0.0.1:7480"
    )]
    Serve,
    /// Shows what a registry does, in a temporary directory, in a few seconds.
    #[cfg(feature = "raft")]
    #[command(after_help = "Example: registry demo")]
    Demo,
    /// Prints the value of a key.
    #[command(after_help = "Example: registry get /app/config")]
    Get(kv::Get),
    /// Puts a value: an argument, a file, or standard input.
    #[command(
        after_help = "Examples:\n  registry put /app/config v1\n  registry put /app/logo --file logo.png\n  registry put /app/config v2 --if-revision 7\n  registry put /app/workers/w1 10.0.0.7 --ephemeral"
    )]
    Put(kv::Put),
    /// Deletes a key, or with --prefix a key and all below it.
    #[command(after_help = "Example: registry delete /app --prefix")]
    Delete(kv::Delete),
    /// Lists the children of a key, or with -r all entries at and below it.
    #[command(after_help = "Example: registry ls -l -r /app")]
    Ls(kv::Ls),
    /// Prints changes as they happen, the present entries first.
    #[command(after_help = "Example: registry watch /app/workers --children")]
    Watch(watch::Watch),
    /// Does several writes wholly or not at all, if conditions hold.
    #[command(after_help = "Example: registry txn --when /app/config=7 --put /app/config=v2 --delete /app/draft")]
    Txn(kv::Txn),
    /// Runs a command while holding a lock, or holds it until Ctrl-C.
    #[command(after_help = "Example: registry lock /app/nightly --wait 10s -- sh -c 'echo token $REGISTRY_TOKEN'")]
    Lock(lock::Lock),
    /// Stands in an election and leads until Ctrl-C or the end of a command; or observes it.
    #[command(
        after_help = "Examples:\n  registry elect /app/scheduler --value 10.0.0.7\n  registry elect /app/scheduler --observe"
    )]
    Elect(election::Elect),
    /// Keeps an ephemeral key there until Ctrl-C; it comes back after an expiry.
    #[command(after_help = "Example: registry register /app/workers/w1 10.0.0.7:9000")]
    Register(election::Register),
    /// Puts keys from JSON lines: {"key": "/a", "value": "text"} or {"key": "/a", "value_base64": "..."}.
    ///
    /// The whole file is checked before anything is sent: a wrong line is refused with its number. Of two lines with one
    /// key, the later one stays.
    #[command(after_help = "Example: registry import keys.jsonl")]
    Import(import::Import),
    /// Writes the persistent keys at and below a prefix as JSON lines.
    ///
    /// The first line has the highest fencing token that the store can have given out, above which `import` raises those of
    /// the next store. The keys are those of one revision, which is printed to standard error, also while others write. ZooKeeper has no such
    /// reads: there, and where the store no longer keeps the changes made meanwhile, a transaction may be in the export by
    /// half, which is warned of.
    #[command(after_help = "Example: registry export /app > app.jsonl")]
    Export(export::Export),
    /// Shows the epoch of the namespace's fencing tokens, or raises it.
    ///
    /// The tokens of locks and leaderships are larger in a higher epoch. `import` raises it by itself, and so does a handle
    /// that notices that its store went back.
    #[command(after_help = "Examples:\n  registry epoch\n  registry epoch --raise")]
    Epoch(epoch::Epoch),
    /// Measures the store: throughput and latency of each kind of work, with so many tasks at once.
    #[command(
        after_help = "Examples:\n  registry bench\n  registry bench put get --tasks 1,64,256 --duration 10s --plot bench.svg\n  registry bench --embedded --set raft.data_dir=/tmp/bench"
    )]
    Bench(bench::Bench),
    /// Writes all of the embedded store to a file, while everything goes on.
    #[cfg(feature = "raft")]
    #[command(after_help = "Example: registry backup registry-$(date +%F).backup")]
    Backup(backup::Backup),
    /// Makes the data directory of a new group from a backup; `serve` then starts it.
    #[cfg(feature = "raft")]
    #[command(after_help = "Example: registry restore monday.backup --set raft.data_dir=/var/lib/registry")]
    Restore(backup::Restore),
    /// Lists the members of an embedded group, or changes them.
    #[cfg(feature = "raft")]
    #[command(
        after_help = "Examples:\n  registry members\n  registry members promote d\n  registry members remove c\n  registry members transfer a"
    )]
    Members(members::Members),
    /// Shows how the store stands.
    #[command(after_help = "Examples:\n  registry status --json\n  registry status --verify")]
    Status(status::Status),
    /// Prints the SQL that makes a store's tables, for whoever may make them.
    #[cfg(feature = "mysql")]
    #[command(after_help = "Example: registry schema mysql | mariadb --user=root mydatabase")]
    Schema(schema::Schema),
    /// Prints the completions of a shell.
    #[command(after_help = "Example: registry completions bash > /etc/bash_completion.d/registry")]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Not an argument that a user gives, so in no help and no completion: see [`parse`].
    #[cfg(feature = "raft")]
    #[command(skip)]
    DemoWorker(demo::Worker),
}

/// Parses the arguments of this process: a user's, or those with which `demo` starts a worker.
pub(crate) fn parse() -> Result<Cli, clap::Error> {
    #[cfg(feature = "raft")]
    if std::env::args_os().nth(1).is_some_and(|first| first == demo::WORKER) {
        return Ok(Cli {
            config: None,
            settings: Vec::new(),
            json: false,
            command: Command::DemoWorker(demo::Worker::try_parse_from(std::env::args_os().skip(1))?),
        });
    }
    Cli::try_parse()
}

/// Whether log lines have colors: on a terminal that shows them, unless `NO_COLOR` asks for none (<https://no-color.org>).
pub(crate) fn colors_logs() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    output::shows_escapes() && !refused
}

pub(crate) async fn run(cli: Cli) -> Outcome {
    let out = Output { json: cli.json };
    let settings = Settings {
        file: cli.config,
        overrides: cli.settings,
    };
    match cli.command {
        #[cfg(feature = "raft")]
        Command::Serve => serve::run(&settings, out).await,
        #[cfg(feature = "raft")]
        Command::Demo => demo::run(out).await,
        #[cfg(feature = "raft")]
        Command::DemoWorker(worker) => worker.run().await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "registry", &mut script);
            let script = String::from_utf8_lossy(&script);
            out.line(
                || script.trim_end().to_owned(),
                || json!({ "shell": shell.to_string(), "script": script }),
            )?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench(bench) => bench.run(&settings, out).await,
        #[cfg(feature = "mysql")]
        Command::Schema(schema) => schema.run(&settings, out),
        #[cfg(feature = "raft")]
        Command::Backup(backup) => backup.run(&settings, out).await,
        #[cfg(feature = "raft")]
        Command::Restore(restore) => restore.run(&settings, out).await,
        #[cfg(feature = "raft")]
        Command::Members(members) => members.run(&settings, out).await,
        Command::Status(status) => status.run(&settings, out).await,
        Command::Get(get) => get.run(&settings.connect().await?, out).await,
        Command::Put(put) => put.run(&settings, out).await,
        Command::Delete(delete) => delete.run(&settings, out).await,
        Command::Ls(ls) => ls.run(&settings.connect().await?, out).await,
        Command::Watch(watch) => watch.run(&settings.connect().await?, out).await,
        Command::Txn(txn) => txn.run(&settings, out).await,
        Command::Lock(lock) => lock.run(&settings.connect().await?, out).await,
        Command::Elect(elect) => elect.run(&settings.connect().await?, out).await,
        Command::Register(register) => register.run(&settings.connect().await?, out).await,
        Command::Import(import) => import.run(&settings, out).await,
        Command::Export(export) => export.run(&settings.connect().await?, out).await,
        Command::Epoch(epoch) => epoch.run(&settings.connect().await?, out).await,
    }
}

/// What clap has to say: help and version, or what is wrong with the arguments.
pub(crate) fn misused(error: &clap::Error) -> ExitCode {
    let json = std::env::args_os()
        .take_while(|argument| argument != "--")
        .any(|argument| argument == "--json");
    if json && error.use_stderr() {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
        return Failure::usage(text).report(json);
    }
    // Standard error may be closed; the code tells all the same.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Where the settings come from.
#[derive(Debug)]
struct Settings {
    file: Option<PathBuf>,
    overrides: Vec<(String, String)>,
}

impl Settings {
    fn load(&self) -> Result<Config, Failure> {
        Ok(Config::load(self.file.as_deref(), &self.overrides)?)
    }

    /// The settings of a command that asks a store: with the embedded one, of a remote handle on the member that runs
    /// where the settings say.
    fn remote(&self) -> Result<Config, Failure> {
        #[cfg_attr(not(feature = "raft"), allow(unused_mut))]
        let mut config = self.load()?;
        #[cfg(feature = "raft")]
        if let registry::Backend::Raft(raft) = &mut config.backend
            && !raft.is_remote()
        {
            *raft = raft.to_remote();
        }
        Ok(config)
    }

    async fn connect(&self) -> Result<Arc<dyn Registry>, Failure> {
        let config = self.remote()?;
        registry::connect(&config)
            .await
            .map_err(|error| Failure::connect(error, &config))
    }
}

/// `NAME=VALUE`
fn pair(text: &str) -> Result<(String, String), String> {
    // The parser of arguments would quote what it refuses, and that may be a secret: without a name it is refused later.
    let (name, value) = text.split_once('=').unwrap_or_default();
    Ok((name.into(), value.into()))
}

fn key(text: &str) -> Result<Key, String> {
    Key::parse(text).map_err(|error| error.to_string())
}

fn prefix(text: &str) -> Result<Prefix, String> {
    Prefix::parse(text).map_err(|error| error.to_string())
}
