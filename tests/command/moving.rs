//! Many keys at once: import, export, backup and restore.

use super::*;

/// The packages that this machine's apt knows, as JSON lines.
async fn packages(path: &Path) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/packages");
    let output = within(PATIENCE, Command::new(script).output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    std::fs::write(path, &output.stdout).unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The first line of an export, and the lines of the keys.
fn split_header(exported: &[u8]) -> (Value, &[u8]) {
    let end = exported.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    (serde_json::from_slice(&exported[..end]).unwrap(), &exported[end..])
}

/// L3. Fencing tokens grow on when keys move to another store, whose revisions begin lower, and back again.
#[tokio::test]
async fn tokens_grow_from_store_to_store() {
    let (one, other) = (Shell::new(), Shell::new());
    let _members = (one.serve().await, other.serve().await);
    let token = async |shell: &Shell| -> i64 {
        let said = shell
            .says(0, &["lock", "/l", "--", "sh", "-c", "echo $REGISTRY_TOKEN"])
            .await;
        said.trim().parse().unwrap()
    };
    for n in 0..20 {
        one.says(0, &["put", "/app/config", &n.to_string()]).await;
    }
    let mut last = token(&one).await;
    assert!(token(&other).await < last, "the other store begins lower");
    for (from, to) in [(&one, &other), (&other, &one), (&one, &other)] {
        let exported = from.run(&["export", "/"]).await;
        assert!(exported.status.success(), "{exported:?}");
        let (header, _) = split_header(&exported.stdout);
        let highest: i64 = header["registry"]["token"].as_str().unwrap().parse().unwrap();
        assert!(highest >= last, "{header}");
        std::fs::write(to.dir.path().join("keys.jsonl"), &exported.stdout).unwrap();
        assert_eq!(to.says(0, &["import", "keys.jsonl"]).await, "imported 1 keys\n");
        let next = token(to).await;
        assert!(next > last && next > highest, "{next} after {last}, {highest}");
        last = next;
        // Once more, into the store that it is from by now: its tokens are larger already.
        let epoch = &to.json(&["epoch"]).await[0]["epoch"];
        to.says(0, &["import", "keys.jsonl"]).await;
        assert_eq!(&to.json(&["epoch"]).await[0]["epoch"], epoch);
    }
    // What can't be exceeded is refused, and nothing is imported.
    let header = serde_json::json!({ "registry": { "epoch": 0, "revision": 1, "token": i64::MAX.to_string() } });
    let keys = format!("{header}\n{{\"key\": \"/never\", \"value\": \"\"}}\n");
    std::fs::write(one.dir.path().join("last.jsonl"), keys).unwrap();
    let refused = one.says(1, &["import", "last.jsonl"]).await;
    assert!(
        refused.contains("no fencing token is left") && refused.contains("nothing was imported"),
        "{refused}"
    );
    one.says(3, &["get", "/never"]).await;
    for header in [
        "{\"registry\": {}}",
        "{\"registry\": {\"epoch\": 0, \"revision\": 1, \"token\": 5}}",
    ] {
        std::fs::write(one.dir.path().join("wrong.jsonl"), header).unwrap();
        assert!(one.says(2, &["import", "wrong.jsonl"]).await.contains("line 1: "));
    }
    // As after a restore of etcd, ZooKeeper or MySQL.
    let raised = &one.json(&["epoch", "--raise"]).await[0];
    assert!(raised["epoch"].as_u64() > Some(58_000_000), "{raised}");
    assert!(token(&one).await > last);
    // Above a token that the store does not know of.
    let known = (100_000_000_i64 << 32) + 5;
    one.says(0, &["epoch", "--raise", "--above", &known.to_string()]).await;
    assert!(token(&one).await > known);
    one.says(2, &["epoch", "--above", "5"]).await;
    one.says(2, &["epoch", "--raise", "--above", "-5"]).await;
    // A file of other origin does not say where tokens were.
    std::fs::write(
        other.dir.path().join("plain.jsonl"),
        "{\"key\": \"/plain\", \"value\": \"\"}\n",
    )
    .unwrap();
    let imported = other.run(&["import", "plain.jsonl"]).await;
    let said = String::from_utf8_lossy(&imported.stderr);
    assert!(
        imported.status.success() && said.contains("the epoch is not raised"),
        "{said}"
    );
}

/// L3. A backup from before the epoch was raised is restored: tokens are larger than those given out since.
#[tokio::test]
async fn tokens_grow_over_a_restore_of_an_older_epoch() {
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let token = async |shell: &Shell| -> i64 {
        let said = shell
            .says(0, &["lock", "/l", "--", "sh", "-c", "echo $REGISTRY_TOKEN"])
            .await;
        said.trim().parse().unwrap()
    };
    token(&shell).await;
    // Keys that look like an epoch and are none.
    for user in ["/a~/epoch/7", "/epoch/7"] {
        shell.says(0, &["put", user, "mine"]).await;
    }
    shell.says(0, &["backup", "backup"]).await;
    shell.says(0, &["epoch", "--raise"]).await;
    let last = token(&shell).await;
    member.kill().await;
    std::fs::remove_dir_all(shell.dir.path().join("registry-data")).unwrap();
    shell.says(0, &["restore", "backup"]).await;
    let _member = shell.serve().await;
    let next = token(&shell).await;
    assert!(next > last, "{next} after {last}");
    for user in ["/a~/epoch/7", "/epoch/7"] {
        assert_eq!(shell.says(0, &["get", user]).await, "mine");
    }
}

/// Real input, the description of every Debian package: imported with the member killed in the middle, listed in pages,
/// watched, exported, and compared byte by byte, before and after another kill.
#[tokio::test]
async fn what_is_imported_is_exported_also_after_a_crash_in_the_middle() {
    const LONG: Duration = Duration::from_secs(120);
    let shell = Shell::new();
    let mut member = shell.serve().await;
    let text = packages(&shell.dir.path().join("all.jsonl")).await;
    let mut import = shell.command(&["import", "all.jsonl"]);
    let import = import.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let keys = async || shell.json(&["status"]).await[1]["status"]["keys"].as_u64().unwrap();
    let some = async {
        loop {
            let keys = keys().await;
            if keys > 500 {
                return keys;
            }
        }
    };
    let seen = within(PATIENCE, some).await;
    member.kill().await;
    let import = within(PATIENCE, import.wait_with_output()).await.unwrap();
    let said = String::from_utf8_lossy(&import.stderr);
    // Not with a code that says that nothing changed.
    assert!(
        matches!(import.status.code(), Some(1 | 6)) && said.contains("import the file again"),
        "{import:?}"
    );
    // For people: who was asked, and what came between.
    assert!(
        said.contains(&format!("127.0.0.1:{}: ", shell.port)) && !said.contains("code: '"),
        "{said}"
    );

    let mut member = shell.serve().await;
    let left = keys().await;
    assert!(left >= seen, "{seen} keys were seen, {left} are left");
    let imported = within(LONG, shell.command(&["import", "all.jsonl"]).output())
        .await
        .unwrap();
    assert!(imported.status.success(), "{imported:?}");
    let all: Vec<_> = text.lines().filter_map(|line| line.split('"').nth(3)).collect();
    assert_eq!(keys().await as usize, all.len());

    let mut listed = Vec::new();
    loop {
        let mut arguments = vec!["ls", "-r", "/packages", "--limit", "10000"];
        let last = listed.last().cloned();
        arguments.extend(last.iter().flat_map(|last: &String| ["--after", last.as_str()]));
        let page = shell.says(0, &arguments).await;
        if page.is_empty() {
            break;
        }
        listed.extend(page.lines().map(str::to_owned));
    }
    assert!(listed == all, "the pages differ from what was imported");

    let (name, value) = (all[all.len() / 2], shell.says(0, &["get", all[all.len() / 2]]).await);
    let (mut watch, mut told, first) = shell.starts(&["watch", "--key", name]).await;
    assert!(first.starts_with("created"), "{first}");
    assert!(line(&mut told).await.starts_with("synced"));
    for value in ["changed", &value] {
        shell.says(0, &["put", name, value]).await;
        let said = line(&mut told).await;
        assert!(said.starts_with("updated") && said.contains(name), "{said}");
    }
    assert_eq!(interrupt(&mut watch).await, Some(0));

    for _ in 0..2 {
        let exported = shell.run(&["export", "/packages"]).await;
        let (_, keys) = split_header(&exported.stdout);
        assert!(keys == text.as_bytes(), "the export differs from what was imported");
        member.kill().await;
        member = shell.serve().await;
    }
}

#[tokio::test]
async fn a_bad_line_is_named_and_nothing_is_sent() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let good: String = (0..100)
        .map(|n| format!("{{\"key\": \"/ok/{n}\", \"value\": \"1\"}}\n"))
        .collect();
    let bad: [(&[u8], &str); 6] = [
        (b"\n{\"key\": \"bad\", \"value\": \"1\"}\n", "line 102: bad key"),
        (b"{\"key\": \"/a\"}\n", "line 101: a line has either"),
        (
            b"{\"key\": \"/a\", \"value\"\n",
            "line 101: EOF while parsing an object at column ",
        ),
        (b"{\"key\": \"/a\", \"value\": \"\xff\"}\n", "line 101: invalid unicode"),
        (
            b"{\"key\": \"/a\", \"value_base64\": \"?\"}\n",
            "line 101: value_base64: ",
        ),
        (b"{\"key\": \"/a\", \"val\": \"1\"}\n", "line 101: unknown field `val`"),
    ];
    for (bad, said) in bad {
        let text = [good.as_bytes(), bad, good.as_bytes()].concat();
        std::fs::write(shell.dir.path().join("bad.jsonl"), text).unwrap();
        let piped = format!("cat bad.jsonl | '{}' import -", env!("CARGO_BIN_EXE_registry"));
        for mut import in [shell.command(&["import", "bad.jsonl"]), shell.of("sh", &["-c", &piped])] {
            let output = within(PATIENCE, import.output()).await.unwrap();
            let all = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{all}");
            assert!(all.contains(said) && all.contains("nothing was imported"), "{all}");
            assert_eq!(shell.says(0, &["ls", "-r"]).await, "");
        }
    }
    // Refused before any store is asked.
    let nobody = shell
        .says(2, &["--set", "raft.listen=127.0.0.1:1", "import", "bad.jsonl"])
        .await;
    assert!(nobody.contains("line 101"), "{nobody}");
    // From a pipe as from a file, its blank lines too.
    std::fs::write(shell.dir.path().join("good.jsonl"), format!("\n\n{good}\n")).unwrap();
    let piped = format!("cat good.jsonl | '{}' import -", env!("CARGO_BIN_EXE_registry"));
    let output = within(PATIENCE, shell.of("sh", &["-c", &piped]).output())
        .await
        .unwrap();
    assert_eq!(output.stdout, b"imported 100 keys\n", "{output:?}");
}

/// A code which means that nothing changed is returned only if nothing did.
#[tokio::test]
async fn an_import_that_is_refused_in_the_middle_says_what_was_put() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let (_owner, _, _) = shell.starts(&["put", "/e", "1", "--ephemeral"]).await;
    let refused = "{\"key\": \"/e/below\", \"value\": \"1\"}\n";
    std::fs::write(shell.dir.path().join("alone.jsonl"), refused).unwrap();
    let said = shell.says(4, &["import", "alone.jsonl"]).await;
    assert!(said.contains("line 1: ") && said.contains("imported 0 keys"), "{said}");
    let good = |from: u32| -> String {
        (from..from + 1000)
            .map(|n| format!("{{\"key\": \"/ok/{n}\", \"value\": \"1\"}}\n"))
            .collect()
    };
    let text = [good(0).as_str(), refused, good(1000).as_str()].concat();
    std::fs::write(shell.dir.path().join("middle.jsonl"), text).unwrap();
    let said = shell.says(1, &["import", "middle.jsonl"]).await;
    let count = shell.says(0, &["ls", "/ok"]).await.lines().count();
    assert!(
        said.contains("line 1001: ") && said.contains(&format!("imported {count} keys")),
        "{count}: {said}"
    );
    assert!((1000..1300).contains(&count), "{count}");
}

#[tokio::test]
async fn of_two_lines_with_one_key_the_later_stays() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    for round in 0..10 {
        let text: String = (0..40)
            .flat_map(|value| (0..20).map(move |key| (key, value)))
            .map(|(key, value)| {
                // Large ones before small ones, so that some take longer.
                let filler = "x".repeat(if (key + value) % 7 == 0 { 20_000 } else { 1 });
                format!(
                    "{}\n",
                    serde_json::json!({ "key": format!("/k/{key}"), "value": format!("{round}.{value} {filler}") })
                )
            })
            .collect();
        std::fs::write(shell.dir.path().join("twice.jsonl"), text).unwrap();
        let said = shell.says(0, &["import", "twice.jsonl"]).await;
        assert!(said.starts_with("imported 800 keys\n"), "{said}");
        for entry in shell.json(&["ls", "-r", "/k"]).await {
            let value = entry["value"].as_str().unwrap();
            assert!(
                value.starts_with(&format!("{round}.39 ")),
                "{}: {value:.10}",
                entry["key"]
            );
        }
    }
}

#[tokio::test]
async fn an_import_that_is_interrupted_says_what_was_put() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let text: String = (0..100_000)
        .map(|n| format!("{{\"key\": \"/many/{n}\", \"value\": \"1\"}}\n"))
        .collect();
    std::fs::write(shell.dir.path().join("many.jsonl"), text).unwrap();
    let mut import = shell.command(&["import", "many.jsonl"]);
    let import = import.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let some = async { while shell.json(&["status"]).await[1]["status"]["keys"].as_u64() < Some(500) {} };
    within(PATIENCE, some).await;
    signal(&import, rustix::process::Signal::INT);
    let ended = within(PATIENCE, import.wait_with_output()).await.unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    let keys = shell.json(&["status"]).await[1]["status"]["keys"].as_u64().unwrap();
    assert!(
        keys < 100_000 && said.contains(&format!("imported {keys} keys")),
        "{keys}: {said}"
    );
}

/// Every transaction writes one value to keys of all pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_splits_no_transaction() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let remote = registry::raft::RaftConfig::remote([format!("127.0.0.1:{}", shell.port)]);
    let registry = registry::raft::connect(&remote, &registry::Options::default())
        .await
        .unwrap();
    let names: Vec<_> = (0..6400).map(|n| format!("/x/{n:04}")).collect();
    let text: String = names
        .iter()
        .map(|name| format!("{}\n", serde_json::json!({ "key": name, "value": "0" })))
        .collect();
    std::fs::write(shell.dir.path().join("all.jsonl"), text).unwrap();
    shell.says(0, &["import", "all.jsonl"]).await;
    let marked: Vec<registry::Key> = names.iter().step_by(100).map(|name| name.parse().unwrap()).collect();
    let (done, exports) = (std::sync::atomic::AtomicBool::new(false), 20);
    let writing = async {
        let mut value = 0_u64;
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            value += 1;
            // A part of the keys comes and goes.
            let mut txn = registry::Txn::new();
            for (at, key) in marked.iter().enumerate() {
                txn = match at % 4 == 3 && value.is_multiple_of(2) {
                    true => txn.delete(key),
                    false => txn.put(key, value.to_string()),
                };
            }
            registry.commit(txn).await.unwrap();
        }
        value
    };
    let exporting = async {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..exports {
            let exported = shell.run(&["--json", "export", "/x"]).await;
            assert!(exported.status.success(), "{exported:?}");
            let (_, text) = split_header(&exported.stdout);
            let text = str::from_utf8(text).unwrap();
            let entries: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let keys: Vec<_> = entries.iter().map(|entry| entry["key"].as_str().unwrap()).collect();
            assert!(keys.is_sorted() && keys.windows(2).all(|pair| pair[0] != pair[1]));
            let values: Vec<_> = entries
                .iter()
                .filter(|entry| marked.iter().any(|key| *key.as_str() == entry["key"]))
                .map(|entry| entry["value"].as_str().unwrap().to_owned())
                .collect();
            assert!(
                values.iter().all(|value| *value == values[0]),
                "a transaction was split: {values:?}"
            );
            let value: u64 = values[0].parse().unwrap();
            assert_eq!(values.len(), if value.is_multiple_of(2) { 48 } else { 64 });
            let summary: Value = serde_json::from_slice(&exported.stderr).unwrap();
            assert_eq!(summary["exported"], entries.len());
            assert!(summary["revision"].as_u64() > Some(6400), "{summary}");
            seen.insert(value);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        seen
    };
    let (written, seen) = tokio::join!(writing, exporting);
    println!("{written} transactions, {exports} exports of {} of them", seen.len());
    assert!(seen.len() > 1, "nothing was written meanwhile");
    registry.close().await.unwrap();
}

#[tokio::test]
async fn a_store_is_compared_backed_up_and_restored_into_a_new_directory() {
    let shell = Shell::new();
    let member = shell.serve().await;
    shell.says(0, &["put", "/app/config", "v1"]).await;
    let equal = shell.says(0, &["status", "--verify"]).await;
    assert!(
        equal.contains("member a") && equal.contains("equal at entry"),
        "{equal}"
    );
    let said = shell.says(0, &["backup", "one.backup"]).await;
    assert!(said.contains("one.backup: ") && said.contains("revision 1"), "{said}");
    let json = &shell.json(&["backup", "one.backup"]).await[0];
    assert_eq!(json["backup"]["revision"], 1);
    // A terminal is shown how far it is. The package bsdutils has `script`, which gives it one.
    let typed = format!("'{}' backup one.backup", env!("CARGO_BIN_EXE_registry"));
    let mut terminal = shell.of("script", &["--quiet", "--return", "--command", &typed, "/dev/null"]);
    let shown = within(PATIENCE, terminal.output()).await.unwrap();
    let (bytes, text) = (&json["backup"]["bytes"], String::from_utf8_lossy(&shown.stdout));
    assert!(shown.status.success(), "{text}");
    assert!(text.contains(&format!("{bytes} B/{bytes} B")), "{text}");
    // It is not there, then there is something already, then it is damaged, then it is right.
    let refused = shell.says(2, &["restore", "none.backup"]).await;
    assert!(refused.contains("none.backup: No such file"), "{refused}");
    let refused = shell.says(1, &["restore", "one.backup"]).await;
    assert!(refused.contains("new directory"), "{refused}");
    let file = shell.dir.path().join("one.backup");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, &good[..good.len() - 1]).unwrap();
    let elsewhere = ["restore", "one.backup", "--set", "raft.data_dir=new"];
    let refused = shell.says(1, &elsewhere).await;
    assert!(
        refused.contains("one.backup") && refused.contains("cut short"),
        "{refused}"
    );
    std::fs::write(&file, &good).unwrap();
    drop(member);
    let restored = shell.says(0, &elsewhere).await;
    assert!(restored.contains("registry serve"), "{restored}");
    let serve = shell.command(&["serve", "--set", "raft.data_dir=new"]);
    let _member = Process::start(serve, |line| line.contains("ready").then_some(()))
        .await
        .0;
    assert_eq!(shell.says(0, &["get", "/app/config"]).await, "v1");
    let revision = &shell.json(&["put", "/app/config", "v2"]).await[0]["revision"];
    assert!(revision.as_u64().unwrap() > 1 << 40, "{revision}");
}
