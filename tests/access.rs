//! Who has no business with a served member is refused, and logged without a secret; what it stores is its owner's alone.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

#[path = "../registry-raft/tests/security/authority.rs"]
#[allow(dead_code)]
mod authority;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use authority::Authority;
use registry::raft::Tls;
use registry_tests::{Process, process, within};
use tempfile::TempDir;
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_secs(40);
const TOKEN: &str = "a-word-that-nobody-guesses";
const GUESS: &str = "a-word-that-somebody-said";

/// Processes of the command, and what each has logged. Whatever they make, the system would let anybody read.
struct Site {
    dir: TempDir,
    authority: Authority,
}

impl Site {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("token"), TOKEN).unwrap();
        fs::write(dir.path().join("guess"), GUESS).unwrap();
        Self {
            dir,
            authority: Authority::new("the group's"),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn sign(&self, name: &str) -> Tls {
        self.authority.sign(self.dir.path(), name)
    }

    /// A config file of that name, with these lines in the table of the embedded store.
    fn config(&self, name: &str, lines: &str, tls: Option<&Tls>, token: Option<&str>) {
        let tls = tls.map(|Tls { ca, cert, key }| format!("tls = {{ ca = {ca:?}, cert = {cert:?}, key = {key:?} }}\n"));
        let token = token.map(|token| format!("token_file = {token:?}\n"));
        let (tls, token) = (tls.unwrap_or_default(), token.unwrap_or_default());
        let text = format!("[registry]\nconnect_timeout = \"3s\"\n[registry.raft]\n{tls}{token}{lines}\n");
        fs::write(self.file(&format!("{name}.toml")), text).unwrap();
    }

    fn command(&self, name: &str, arguments: &[&str], log: &str) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "umask 000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_registry")])
            .args(arguments)
            .arg("--config")
            .arg(self.file(&format!("{name}.toml")))
            .current_dir(self.dir.path())
            .env_remove("REGISTRY_CONFIG")
            .env("RUST_LOG", log)
            .kill_on_drop(true);
        command
    }

    async fn serve(&self, name: &str, log: &str) -> Process {
        let mut command = self.command(name, &["serve"], log);
        command.stderr(File::create(self.file(&format!("{name}.log"))).unwrap());
        let ready = |line: &str| line.contains("ready").then_some(());
        Process::start(command, ready).await.0
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.file(&format!("{name}.log"))).unwrap()
    }

    async fn logs(&self, name: &str, what: &str) {
        registry_tests::cluster::eventually(PATIENCE, || async { self.log(name).contains(what) }).await;
    }

    async fn asks(&self, name: &str) -> Output {
        let mut command = self.command(name, &["put", "/a", "1"], "trace");
        within(PATIENCE, command.output()).await.unwrap()
    }
}

/// What no log may have: the tokens, and every line of every key.
fn secrets(dir: &Path) -> Vec<String> {
    let mut secrets = vec![TOKEN.to_owned(), GUESS.to_owned()];
    for file in fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()) {
        if file.extension().is_some_and(|ending| ending == "key") {
            let text = fs::read_to_string(file).unwrap();
            secrets.extend(text.lines().filter(|line| !line.contains("---")).map(str::to_owned));
        }
    }
    secrets
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_ask_is_refused_and_logged_without_a_secret() {
    let site = Site::new();
    let (address, http) = (process::free_port(), process::free_port());
    let own = site.sign("member");
    let listens = format!("data_dir = \"data\"\nlisten = \"127.0.0.1:{address}\"\nhttp = \"127.0.0.1:{http}\"");
    site.config("member", &listens, Some(&own), Some("token"));
    let _member = site.serve("member", "trace").await;

    let client = site.sign("client");
    let stranger = Tls {
        ca: own.ca.clone(),
        ..Authority::new("foreign").sign(site.dir.path(), "stranger")
    };
    let expired = site.authority.sign_expired(site.dir.path(), "expired");
    let reaches = format!("endpoints = [\"127.0.0.1:{address}\"]");
    let cases = [
        ("plain", None, None, "it does not speak TLS"),
        ("stranger", Some(&stranger), Some("token"), "UnknownIssuer"),
        ("expired", Some(&expired), Some("token"), "xpired"),
        ("wordless", Some(&client), None, "a token is asked for"),
        ("guess", Some(&client), Some("guess"), "the token is not this group's"),
    ];
    let secrets = secrets(site.dir.path());
    let silent = |text: &str| secrets.iter().find(|secret| text.contains(secret.as_str())).cloned();
    for (name, tls, token, why) in cases {
        site.config(name, &reaches, tls, token);
        let output = site.asks(name).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(8), "{name}: {said}");
        assert_eq!(silent(&said), None, "{name} tells a secret");
        site.logs("member", why).await;
    }
    for said in [format!("Bearer {GUESS}"), format!("Basic {TOKEN}")] {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "25", "--cacert"]).arg(&client.ca);
        curl.arg("--cert").arg(&client.cert).arg("--key").arg(&client.key);
        curl.args([
            "--header",
            &format!("Authorization: {said}"),
            "--write-out",
            "%{http_code}",
        ]);
        curl.arg(format!("https://127.0.0.1:{http}/v1/kv/a"));
        let output = within(PATIENCE, curl.output())
            .await
            .expect("curl is missing: apt-get install curl");
        let answer = String::from_utf8_lossy(&output.stdout);
        assert!(answer.ends_with("401"), "{answer}");
    }

    site.config("client", &reaches, Some(&client), Some("token"));
    let output = site.asks("client").await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert_eq!(silent(&said), None, "the client tells a secret");
    let log = site.log("member");
    println!(
        "{} lines are logged, with none of {} secrets",
        log.lines().count(),
        secrets.len()
    );
    assert_eq!(silent(&log), None, "the member tells a secret");
}

/// Where a member was, one of another cluster is now, with the same authority and the same token.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_another_cluster_is_refused_and_that_is_logged() {
    let site = Site::new();
    let ports = [process::free_port(), process::free_port()];
    let list = format!("{{ a = \"127.0.0.1:{}\", b = \"127.0.0.1:{}\" }}", ports[0], ports[1]);
    let tls = site.sign("member");
    let member = |name: &str, port: u16, more: &str| {
        let lines = format!("member = {name:?}\ndata_dir = \"data-{name}\"\nlisten = \"127.0.0.1:{port}\"\n{more}");
        site.config(name, &lines, Some(&tls), Some("token"));
    };
    member("a", ports[0], &format!("cluster = {list}"));
    member("b", ports[1], &format!("cluster = {list}"));
    member("other", ports[1], "");
    let (_a, mut b) = tokio::join!(site.serve("a", "warn"), site.serve("b", "warn"));
    b.kill().await;
    let mut other = site.serve("other", "warn").await;
    site.logs("other", "it is of cluster").await;
    assert!(
        site.asks("other").await.status.success(),
        "it is no member of its own cluster any more"
    );
    other.kill().await;
    // Nobody took anything for its own.
    let _b = site.serve("b", "warn").await;
    assert!(site.asks("a").await.status.success(), "the group does not go on");
    for name in ["a", "b", "other"] {
        assert!(!site.log(name).contains(TOKEN), "{name} tells a secret");
    }
}

/// Everything in a directory that others than its owner may do anything with.
fn open_to_others(path: &Path) -> Vec<String> {
    let mode = fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    let mut open = Vec::new();
    if mode & 0o077 != 0 {
        open.push(format!("{} is {mode:o}", path.display()));
    }
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            open.extend(open_to_others(&entry.unwrap().path()));
        }
    }
    open
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_member_stores_is_its_owners_alone() {
    let site = Site::new();
    let listens = format!(
        "data_dir = \"data/of/a\"\nlisten = \"127.0.0.1:{}\"\nsnapshot_log_bytes = 1048576",
        process::free_port()
    );
    site.config("member", &listens, None, None);
    let _member = site.serve("member", "warn").await;
    fs::write(site.file("value"), vec![b'v'; 800_000]).unwrap();
    for _ in 0..3 {
        let mut command = site.command("member", &["put", "/a", "--file", "value"], "warn");
        let output = within(PATIENCE, command.output()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let data = site.file("data/of/a");
    let has_snapshot = || async { fs::read_dir(data.join("snapshots")).unwrap().count() > 0 };
    registry_tests::cluster::eventually(PATIENCE, has_snapshot).await;
    let mut backup = site.command("member", &["backup", "data/backup"], "warn");
    let output = within(PATIENCE, backup.output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(fs::read_dir(data.join("log")).unwrap().count() > 0 && site.file("data/backup").exists());
    assert_eq!(open_to_others(&site.file("data")), Vec::<String>::new());
}

/// The address is nobody's (RFC 5737), so the warning is all that comes of it.
#[tokio::test(flavor = "multi_thread")]
async fn listening_beyond_loopback_without_tls_is_warned_of() {
    let site = Site::new();
    let own = site.sign("member");
    let cases = [
        ("plain", "listen = \"192.0.2.1:7480\"", None, true),
        ("http", "http = \"192.0.2.1:7490\"", None, true),
        ("tls", "listen = \"192.0.2.1:7480\"", Some(&own), false),
    ];
    for (name, listens, tls, warned) in cases {
        site.config(name, listens, tls, None);
        let output = site.command(name, &["serve"], "warn").output();
        let output = within(PATIENCE, output).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("can't listen on 192.0.2.1"), "{name}: {said}");
        let warning = "listening beyond loopback without registry.raft.tls";
        assert_eq!(said.contains(warning), warned, "{name}: {said}");
    }
    // A token that whoever listens would hear is not taken at all.
    site.config("token", "listen = \"192.0.2.1:7480\"", None, Some("token"));
    let output = site.command("token", &["serve"], "warn").output();
    let output = within(PATIENCE, output).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("registry.raft.token_file") && said.contains("registry.raft.tls"),
        "{said}"
    );
}
