//! The `registry` command: each subcommand makes calls on the trait and prints the results.

mod command;

use std::process::ExitCode;

/// Programs that embed the store choose their own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match command::parse() {
        Ok(cli) => cli,
        Err(error) => return command::misused(&error),
    };
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn,openraft=error,h2=error".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(command::colors_logs())
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("registry: no threads to run on: {error}");
            return ExitCode::FAILURE;
        }
    };
    let json = cli.json;
    let code = match runtime.block_on(command::run(cli)) {
        Ok(code) => code,
        Err(failure) => failure.report(json),
    };
    // Without waiting for its threads: one may be in a name lookup that takes long, and what was printed is to be acted on.
    runtime.shutdown_background();
    code
}
