//! A group seen from outside: `status`, `status --verify`, and each member's HTTP, while all is well and while it is not.

use std::collections::BTreeMap;

use registry_tests::{process, within};
use serde_json::Value;
use tokio::process::Command;

use crate::harness::{Group, NAMES, PATIENCE};
use crate::until;

/// A group whose members speak HTTP.
struct Site {
    group: Group,
    http: [u16; 3],
}

impl Site {
    async fn start() -> Self {
        let http = std::array::from_fn(|_| process::free_port());
        let group = Group::start_with(3, |at| format!("http = \"127.0.0.1:{}\"", http[at])).await;
        Self { group, http }
    }

    /// What a member answers over HTTP: the status and the body.
    async fn asks(&self, at: usize, path: &str, arguments: &[&str]) -> (u16, String) {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "25", "--write-out", "\n%{http_code}"]);
        curl.args(arguments)
            .arg(format!("http://127.0.0.1:{}{path}", self.http[at]));
        let output = within(PATIENCE, curl.kill_on_drop(true).output()).await;
        let output = output.expect("curl is missing: apt-get install curl");
        let said = String::from_utf8(output.stdout).unwrap();
        let (body, status) = said.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    async fn healthy(&self, at: usize) -> bool {
        self.asks(at, "/health", &[]).await.0 == 200
    }

    /// Every sample of a member's metrics, by its series.
    async fn metrics(&self, at: usize) -> BTreeMap<String, u64> {
        let (status, text) = self.asks(at, "/metrics", &[]).await;
        assert_eq!(status, 200, "{text}");
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let samples = samples.map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (
                series.trim_start_matches("registry_").to_owned(),
                value.parse().unwrap(),
            )
        });
        samples.collect()
    }
}

fn lag_of(name: &str) -> String {
    format!("member_lag{{member=\"{name}\"}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_seen_from_outside() {
    let mut site = Site::start().await;
    let leader = site.group.leader().await;
    let (slow, other) = ((leader + 1) % 3, (leader + 2) % 3);
    for at in 0..3 {
        until("it is healthy", || async { site.healthy(at).await }).await;
    }
    let (status, put) = site.asks(slow, "/v1/kv/k", &["-X", "PUT", "-d", "1"]).await;
    assert_eq!(status, 200, "{put}");

    // Each tells the same of the group, and who it is that tells; the leader alone tells the lag.
    let term = site.group.status(leader).await.unwrap().term;
    for (at, name) in NAMES.iter().enumerate().take(3) {
        let (_, told) = site.asks(at, "/v1/members", &[]).await;
        let told: Value = serde_json::from_str(&told).unwrap();
        let members = told["members"].as_array().unwrap();
        let by = |id: &Value| members.iter().find(|member| member["id"] == *id).unwrap();
        assert_eq!(by(&told["answered_by"])["name"], *name);
        let leaders: Vec<_> = members.iter().filter(|member| member["role"] == "leader").collect();
        assert_eq!((members.len(), leaders.len()), (3, 1), "{told}");
        assert_eq!(leaders[0]["name"], NAMES[leader]);
        until("it has applied the put", || async {
            site.metrics(at).await["revision"] == 1
        })
        .await;
        let metrics = site.metrics(at).await;
        let facts = ["leader", "has_leader", "members", "term", "keys"].map(|gauge| metrics[gauge]);
        assert_eq!(facts, [u64::from(at == leader), 1, 3, term, 1], "{metrics:?}");
        assert_eq!(metrics["sessions"], 3, "one for the HTTP of each: {metrics:?}");
        let lags = metrics.keys().filter(|series| series.starts_with("member_lag")).count();
        assert_eq!(lags, if at == leader { 3 } else { 0 }, "{metrics:?}");
        let equal = site.group.run(name, &["status", "--verify"]).await;
        let digests: Vec<_> = equal
            .lines()
            .filter_map(|line| line.strip_prefix("member ")?.split_whitespace().nth(1))
            .collect();
        assert!(
            digests.len() == 3 && digests.iter().all(|digest| *digest == digests[0]),
            "{equal}"
        );
        assert!(equal.lines().last().unwrap().starts_with("equal at entry "), "{equal}");
    }

    // How far each has applied the log, which all of them have in the end.
    until("all have applied the same", || async {
        let told = site.group.run(NAMES[slow], &["--json", "members"]).await;
        let applied = told.lines().map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["member"]["applied"].as_u64().unwrap()
        });
        let applied: Vec<_> = applied.collect();
        applied.len() == 3 && applied.iter().all(|each| *each == applied[0])
    })
    .await;

    // One that stands still lacks what is written meanwhile, and is told not to answer.
    site.group.process(slow).pause();
    for n in 0..40 {
        let (status, put) = site
            .asks(leader, "/v1/kv/k", &["-X", "PUT", "-d", &n.to_string()])
            .await;
        assert_eq!(status, 200, "{put}");
    }
    let metrics = site.metrics(leader).await;
    assert!(metrics[&lag_of(NAMES[slow])] >= 40, "{metrics:?}");
    let told = site.group.run(NAMES[leader], &["status"]).await;
    let line = told
        .lines()
        .find(|line| line.contains(&format!("member {} ", NAMES[slow])));
    let line = line.unwrap();
    assert!(line.contains(" lacks ") && !line.contains(" applied "), "{told}");
    let verified = site.group.command(NAMES[leader], &["status", "--verify"]).await;
    assert_eq!(verified.status.code(), Some(5));
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(said.contains("not all members have answered"), "{said}");
    site.group.process(slow).resume();
    until("it lacks nothing", || async {
        site.metrics(leader).await[&lag_of(NAMES[slow])] == 0
    })
    .await;

    // With both others gone it is not healthy, and still answers for itself.
    site.group.kill(leader).await;
    site.group.kill(other).await;
    until("it knows no leader", || async {
        site.metrics(slow).await["has_leader"] == 0
    })
    .await;
    let (status, told) = site.asks(slow, "/health", &[]).await;
    assert_eq!(status, 503, "{told}");
    let told: Value = serde_json::from_str(&told).unwrap();
    let why = told["message"].as_str().unwrap();
    assert!(why.starts_with("raft is unavailable: "), "{why}");
    assert_eq!(why.matches("unavailable").count(), 1, "{why}");
    let (status, told) = site.asks(slow, "/v1/kv/k?stale", &[]).await;
    assert_eq!((status, told.as_str()), (200, "39"));
    let (status, told) = site.asks(slow, "/v1/members", &[]).await;
    assert!(status == 200 && !told.contains("\"leader\""), "{told}");
    site.group.restart(&[leader, other]).await;
    for at in 0..3 {
        until("it is healthy again", || async { site.healthy(at).await }).await;
    }
    let equal = site.group.run("a", &["status", "--verify"]).await;
    assert!(equal.contains("equal at entry "), "{equal}");
}
