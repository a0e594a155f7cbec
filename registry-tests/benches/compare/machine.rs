//! The machine and the versions, as the page says them.

use std::process::Command;

use registry_api::BoxError;
use registry_tests::process::zookeeper_jars;

pub(crate) fn describe() -> Result<String, BoxError> {
    let processor = read("/proc/cpuinfo", "model name");
    let memory: f64 = read("/proc/meminfo", "MemTotal")
        .trim_end_matches("kB")
        .trim()
        .parse()
        .unwrap_or_default();
    let cores = std::thread::available_parallelism()?;
    // `zookeeper.jar` is a link to the jar that has the version in its name.
    let linked = zookeeper_jars().into_iter().find(|jar| jar.ends_with("zookeeper.jar"));
    let linked = linked.and_then(|jar| jar.canonicalize().ok()).unwrap_or_default();
    let name = linked.file_stem().unwrap_or_default().to_string_lossy();
    let zookeeper = name.strip_prefix("zookeeper-").unwrap_or("of an unknown version");
    Ok(format!(
        "{processor}, {cores} cores, {:.0} GiB, Linux {}; {}, ZooKeeper {zookeeper} on {}, {}; {}",
        memory / f64::from(1 << 20),
        first_line("uname", &["-r"]),
        first_line("etcd", &["--version"]).replace(" Version:", ""),
        first_line("java", &["--version"]),
        first_line("rustc", &["--version"]),
        first_line("date", &["+%-d %B %Y"]),
    ))
}

fn read(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.split(':').nth(1));
    line.unwrap_or_default().trim().to_owned()
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default()
        .lines()
        .next()
        .unwrap_or("unknown")
        .trim()
        .to_owned()
}
