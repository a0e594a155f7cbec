//! The door for HTTP, as `curl` finds it at a served member.

// A test may fail.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "raft")]

#[path = "../../registry-raft/tests/security/authority.rs"]
#[allow(dead_code)]
mod authority;
mod watching;

use std::time::Duration;

use registry_tests::{Process, process, within};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

const PATIENCE: Duration = Duration::from_secs(30);

struct Served {
    port: u16,
    /// What every request has besides.
    with: Vec<String>,
    scheme: &'static str,
    member: Process,
    /// Removed last, when nobody writes to it any more.
    dir: TempDir,
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines();
        lines.find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// It says why, for programs and for people.
    #[track_caller]
    fn refuses(&self, status: u16, error: &str) -> String {
        assert_eq!(self.status, status, "{}{}", self.head, self.text());
        assert_eq!(self.json()["error"], error, "{}", self.text());
        self.json()["message"].as_str().unwrap().to_owned()
    }
}

impl Served {
    async fn start() -> Self {
        Self::start_with(TempDir::new().unwrap(), String::new()).await
    }

    async fn start_with(dir: TempDir, settings: String) -> Self {
        let (port, own) = (process::free_port(), process::free_port());
        let config = format!(
            "[registry.raft]\ndata_dir = \"data\"\nlisten = \"127.0.0.1:{own}\"\nhttp = \"127.0.0.1:{port}\"\n{settings}"
        );
        std::fs::write(dir.path().join("registry.toml"), config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command
            .args(["serve", "--config"])
            .arg(dir.path().join("registry.toml"));
        let member = Process::start(command, |line| line.contains("HTTP on").then_some(()))
            .await
            .0;
        Self {
            dir,
            port,
            with: Vec::new(),
            scheme: "http",
            member,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("{}://127.0.0.1:{}{path}", self.scheme, self.port)
    }

    fn curl(&self, path: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "25", "--path-as-is"]);
        command.args(&self.with).args(arguments).arg(self.url(path));
        command.current_dir(self.dir.path()).kill_on_drop(true);
        command
    }

    async fn asks(&self, path: &str, arguments: &[&str]) -> Answer {
        let output = within(
            PATIENCE,
            self.curl(path, &[&["--include"], arguments].concat()).output(),
        );
        let output = output.await.expect("curl is missing: apt-get install curl");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{path} {arguments:?}: {said}");
        let mut rest = &output.stdout[..];
        loop {
            let end = rest.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
            let head = String::from_utf8(rest[..end].to_vec()).unwrap();
            rest = &rest[end + 4..];
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            if status != 100 {
                return Answer {
                    status,
                    head,
                    body: rest.to_vec(),
                };
            }
        }
    }

    async fn puts(&self, key: &str, value: &str) -> u64 {
        let answer = self
            .asks(&format!("/v1/kv{key}"), &["-X", "PUT", "--data-binary", value])
            .await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["revision"].as_u64().unwrap()
    }

    async fn watches(&self, path: &str, arguments: &[&str]) -> Watching {
        let mut command = self.curl(path, &[&["--no-buffer"], arguments].concat());
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Watching { child, lines }
    }
}

struct Watching {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watching {
    /// The next event: what it is and what it says.
    async fn next(&mut self) -> (String, Value) {
        let (kind, body, _) = self.next_with_id().await;
        (kind, body)
    }

    /// With its id, if it has one.
    async fn next_with_id(&mut self) -> (String, Value, Option<u64>) {
        let (mut kind, mut id) = (String::new(), None);
        loop {
            let line = within(PATIENCE, self.lines.next_line())
                .await
                .unwrap()
                .expect("it goes on");
            if let Some(named) = line.strip_prefix("event: ") {
                kind = named.to_owned();
            }
            if let Some(named) = line.strip_prefix("id: ") {
                id = Some(named.parse().unwrap());
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return (kind, serde_json::from_str(data).unwrap(), id);
            }
        }
    }
}

#[tokio::test]
async fn keys_are_put_read_and_deleted_under_conditions() {
    let served = Served::start().await;
    let first = served.puts("/app/config", "v1").await;
    let read = served.asks("/v1/kv/app/config", &[]).await;
    assert_eq!((read.status, read.text().as_str()), (200, "v1"));
    let tag = format!("\"{first}\"");
    assert_eq!(read.header("etag"), Some(tag.as_str()));
    assert_eq!(
        read.header("registry-create-revision"),
        Some(first.to_string().as_str())
    );
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        // curl refuses an answer with a body.
        let head = served.asks("/v1/kv/app/config", &["--head", version]).await;
        assert_eq!((head.status, head.body.len()), (200, 0));
        assert_eq!(
            (head.header("etag"), head.header("content-length")),
            (Some(tag.as_str()), Some("2"))
        );
    }
    assert_eq!(served.asks("/v1/kv/app/none", &["--head"]).await.status, 404);
    for known in [tag.clone(), format!("W/{tag}"), format!("\"0\", {tag}"), "*".into()] {
        let same = served
            .asks("/v1/kv/app/config", &["-H", &format!("If-None-Match: {known}")])
            .await;
        assert_eq!((same.status, same.body.len()), (304, 0), "{known}");
        assert_eq!(same.header("etag"), Some(tag.as_str()));
    }
    let other = served.asks("/v1/kv/app/config", &["-H", "If-None-Match: \"0\""]).await;
    assert_eq!((other.status, other.text().as_str()), (200, "v1"));
    let misplaced = served
        .asks("/v1/kv/app/config", &["-H", &format!("If-Match: {tag}")])
        .await;
    misplaced.refuses(400, "invalid_request");

    let put = async |condition: &str| {
        let arguments = ["-X", "PUT", "--data-binary", "v2", "-H", condition];
        served.asks("/v1/kv/app/config", &arguments).await
    };
    let there = put("If-None-Match: *").await;
    assert!(there.refuses(412, "conflict").contains("/app/config"));
    assert_eq!(there.json()["found"], first);
    let second = put(&format!("If-Match: {tag}")).await;
    assert_eq!(second.status, 200, "{}", second.text());
    assert_eq!(
        second.header("etag").unwrap(),
        format!("\"{}\"", second.json()["revision"])
    );
    put(&format!("If-Match: {tag}")).await.refuses(412, "conflict");
    assert_eq!(put("If-Match: *").await.status, 200);
    put("If-Match: 7").await.refuses(400, "invalid_request");
    put("If-None-Match: \"7\"").await.refuses(400, "invalid_request");

    let delete = async |path: &str, condition: &str| served.asks(path, &["-X", "DELETE", "-H", condition]).await;
    delete("/v1/kv/app/config", &format!("If-Match: {tag}"))
        .await
        .refuses(412, "conflict");
    let tag = served
        .asks("/v1/kv/app/config", &[])
        .await
        .header("etag")
        .unwrap()
        .to_owned();
    assert_eq!(
        delete("/v1/kv/app/config", &format!("If-Match: {tag}")).await.json()["deleted"],
        true
    );
    delete("/v1/kv/app/config", "X-Nothing: 1")
        .await
        .refuses(404, "not_found");
    served.asks("/v1/kv/app/config", &[]).await.refuses(404, "not_found");
    let gone = served
        .asks("/v1/kv/app/config", &["-X", "PUT", "-d", "x", "-H", "If-Match: *"])
        .await;
    assert_eq!((gone.refuses(412, "conflict"), &gone.json()["found"]).1, &Value::Null);

    // Any bytes, and any key that can be.
    std::fs::write(served.dir.path().join("bytes"), [0, 255, 10]).unwrap();
    let bytes = served
        .asks("/v1/kv/a%20key/%C3%A9", &["-X", "PUT", "--data-binary", "@bytes"])
        .await;
    assert_eq!(bytes.status, 200, "{}", bytes.text());
    assert_eq!(served.asks("/v1/kv/a%20key/%C3%A9", &[]).await.body, [0, 255, 10]);
    let listed = served.asks("/v1/kv/a%20key/", &[]).await.json();
    assert_eq!(listed["entries"][0]["key"], "/a key/é");
    assert_eq!(listed["entries"][0]["value_base64"], "AP8K");
}

#[tokio::test]
async fn what_is_below_a_key_is_listed_in_pages() {
    let served = Served::start().await;
    for number in 0..7 {
        served.puts(&format!("/list/{number}/x"), "v").await;
    }
    served.puts("/list/0", "child").await;
    let (mut found, mut after) = (Vec::new(), String::new());
    loop {
        let page = served.asks(&format!("/v1/kv/list/?limit=3{after}"), &[]).await.json();
        let entries = page["entries"].as_array().unwrap();
        assert!(entries.len() <= 3 && page["revision"].as_u64().unwrap() >= 8);
        found.extend(entries.iter().map(|entry| entry["key"].as_str().unwrap().to_owned()));
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(
        (found.len(), found[0].as_str(), found[7].as_str()),
        (8, "/list/0", "/list/6/x")
    );
    let children = served.asks("/v1/kv/list/?children", &[]).await.json();
    assert_eq!(children["entries"].as_array().unwrap().len(), 1);
    let all = served.asks("/v1/kv/?stale=true", &[]).await.json();
    assert_eq!(all["entries"].as_array().unwrap().len(), 8);
    for wrong in [
        "?limit=0",
        "?limit=1001",
        "?limit=x",
        "?after=b",
        "?children=2",
        "?depth=3",
        "?limit=1&limit=2",
    ] {
        served
            .asks(&format!("/v1/kv/list/{wrong}"), &[])
            .await
            .refuses(400, "invalid_request");
    }
}

#[tokio::test]
async fn wrong_requests_are_refused_with_the_reason() {
    let served = Served::start().await;
    for path in ["/", "/v1", "/v1/kv", "/v1/kvs/a", "/v2/kv/a", "/healthy", "/metrics/x"] {
        served.asks(path, &[]).await.refuses(404, "not_found");
    }
    for path in [
        "/v1/kv/a//b",
        "/v1/kv/a/../b",
        "/v1/kv/a%00b",
        "/v1/kv/%ff",
        "/v1/watch/a/./b",
    ] {
        served.asks(path, &[]).await.refuses(400, "invalid_request");
    }
    for (path, method) in [
        ("/v1/kv/a", "POST"),
        ("/v1/kv/a/", "DELETE"),
        ("/v1/watch/a", "PUT"),
        ("/health", "POST"),
    ] {
        let refused = served.asks(path, &["-X", method]).await;
        refused.refuses(405, "invalid_request");
        assert!(refused.header("allow").unwrap().contains("GET"));
    }
    served
        .asks("/v1/watch/a?after=x", &[])
        .await
        .refuses(400, "invalid_request");
    for path in ["/v1/watch/a?before=1", "/v1/watch/a?reset=perhaps"] {
        served.asks(path, &[]).await.refuses(400, "invalid_request");
    }

    // As large as a value may be, and one byte more, told beforehand and not.
    for (size, chunked, status) in [(900_000, false, 200), (900_001, false, 413), (900_001, true, 413)] {
        std::fs::write(served.dir.path().join("value"), vec![7; size]).unwrap();
        let mut arguments = vec!["-X", "PUT", "--data-binary", "@value", "-H", "Expect:"];
        if chunked {
            arguments.extend(["-H", "Transfer-Encoding: chunked"]);
        }
        let answer = served.asks("/v1/kv/large", &arguments).await;
        assert_eq!(answer.status, status, "{size} {}", answer.text());
    }
    assert_eq!(served.asks("/v1/kv/large", &[]).await.body.len(), 900_000);
}

#[tokio::test]
async fn health_members_and_metrics_are_told() {
    let served = Served::start().await;
    let revision = served.puts("/a", "1").await;
    let health = served.asks("/health", &[]).await;
    assert_eq!(
        (health.status, &health.json()["ok"], &health.json()["revision"]),
        (200, &true.into(), &revision.into())
    );
    let members = served.asks("/v1/members", &[]).await.json();
    assert_eq!(members["members"][0]["role"], "leader");
    let metrics = served.asks("/metrics", &[]).await;
    assert!(
        metrics
            .header("content-type")
            .unwrap()
            .starts_with("text/plain; version=0.0.4")
    );
    let text = metrics.text();
    for line in [
        "registry_leader 1",
        "registry_members 1",
        "registry_keys 1",
        "registry_sessions 1",
        "registry_revision 1",
        "registry_member_lag{member=\"a\"} 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    for sample in samples {
        let (series, value) = sample.rsplit_once(' ').unwrap();
        let (name, _) = series.split_once('{').unwrap_or((series, ""));
        assert!(
            name.starts_with("registry_") && value.parse::<f64>().is_ok(),
            "{sample}"
        );
        assert!(text.contains(&format!("# TYPE {name} gauge\n")), "{name}");
    }
}

#[tokio::test]
async fn who_is_slow_keeps_nobody_waiting() {
    let served = Served::start().await;
    let mut slow = Vec::new();
    for _ in 0..50 {
        let mut half = tokio::net::TcpStream::connect(("127.0.0.1", served.port))
            .await
            .unwrap();
        half.write_all(b"PUT /v1/kv/a HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf")
            .await
            .unwrap();
        slow.push(half);
    }
    served.puts("/a", "whole").await;
    // A body that does not come is told so, and nothing is put.
    let mut answer = String::new();
    within(2 * PATIENCE, slow[0].read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert_eq!(served.asks("/v1/kv/a", &[]).await.text(), "whole");
}

/// It answers every ping, and asks for nothing: its place is free again after a while. A watch keeps its own.
#[tokio::test]
async fn an_idle_connection_that_answers_pings_does_not_keep_its_place() {
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    let served = Served::start().await;
    let mut watching = served.watches("/v1/watch/a", &["--http2-prior-knowledge"]).await;
    assert_eq!(watching.next().await.0, "synced");
    let mut idle = tokio::net::TcpStream::connect(("127.0.0.1", served.port))
        .await
        .unwrap();
    let frame = |length: u8, kind: u8, flags: u8| [0, 0, length, kind, flags, 0, 0, 0, 0];
    idle.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    idle.write_all(&frame(0, SETTINGS, 0)).await.unwrap();
    let mut pings = 0;
    let ended = within(2 * PATIENCE, async {
        loop {
            let mut head = [0; 9];
            idle.read_exact(&mut head).await?;
            let mut body = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            idle.read_exact(&mut body).await?;
            if head[3] == PING && head[4] == 0 {
                pings += 1;
                idle.write_all(&[&frame(8, PING, 1)[..], &body].concat()).await?;
            }
        }
    });
    let ended: std::io::Result<()> = ended.await;
    println!("{pings} pings, then {}", ended.unwrap_err());
    served.puts("/a", "1").await;
    assert_eq!(watching.next().await.0, "created");
}

#[tokio::test]
async fn with_tls_and_a_token_both_are_asked_for() {
    const TOKEN: &str = "a-word-that-nobody-guesses";
    let dir = TempDir::new().unwrap();
    let authority = authority::Authority::new("the group's");
    let (own, client) = (
        authority.sign(dir.path(), "member"),
        authority.sign(dir.path(), "client"),
    );
    std::fs::write(dir.path().join("token"), TOKEN).unwrap();
    let name = |path: &std::path::Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let settings = format!(
        "token_file = \"token\"\ntls = {{ ca = {:?}, cert = {:?}, key = {:?} }}\n",
        name(&own.ca),
        name(&own.cert),
        name(&own.key)
    );
    let mut served = Served::start_with(dir, settings).await;
    let plain = served.curl("/health", &[]).output().await.unwrap();
    assert!(!plain.status.success());
    served.scheme = "https";
    served.with = ["--cacert", &name(&client.ca)].map(str::to_owned).into();
    let nameless = served.curl("/health", &[]).output().await.unwrap();
    assert!(
        !nameless.status.success(),
        "{}",
        String::from_utf8_lossy(&nameless.stdout)
    );
    served
        .with
        .extend(["--cert", &name(&client.cert), "--key", &name(&client.key)].map(str::to_owned));
    let unasked = served.asks("/v1/kv/a", &["-X", "PUT", "-d", "x"]).await;
    unasked.refuses(401, "unauthorized");
    assert_eq!(unasked.header("www-authenticate"), Some("Bearer"));
    for wrong in [
        "Bearer a-word-that-nobody-guessed",
        "Basic a-word-that-nobody-guesses",
        TOKEN,
        "Bearer",
    ] {
        let refused = served
            .asks("/health", &["-H", &format!("Authorization: {wrong}")])
            .await;
        refused.refuses(401, "unauthorized");
    }
    served.asks("/metrics", &[]).await.refuses(401, "unauthorized");
    for version in ["--http1.1", "--http2"] {
        let said = format!("Authorization: bearer {TOKEN}");
        let health = served.asks("/health", &[version, "-H", &said]).await;
        assert_eq!(health.status, 200, "{}", health.text());
    }
}
