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
    assert!(
        !import.status.success() && said.contains("import the file again"),
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
        assert!(
            exported.stdout == text.as_bytes(),
            "the export differs from what was imported"
        );
        member.kill().await;
        member = shell.serve().await;
    }
}

#[tokio::test]
async fn a_bad_line_is_named_and_those_before_it_are_there() {
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
        std::fs::write(shell.dir.path().join("bad.jsonl"), [good.as_bytes(), bad].concat()).unwrap();
        let all = shell.says(2, &["import", "bad.jsonl"]).await;
        assert!(
            all.contains(said) && all.contains("imported 100 keys; import the file again"),
            "{all}"
        );
        assert_eq!(shell.says(0, &["delete", "/", "--prefix"]).await, "deleted 100\n");
    }
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
