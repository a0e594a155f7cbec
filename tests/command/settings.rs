//! Settings that are wrong are refused before anything is sent, and the error names where they come from.

use super::*;

impl Shell {
    /// What the command says that ends with 2, with these variables.
    async fn refuses(&self, variables: &[(&str, &str)], arguments: &[&str]) -> String {
        let mut command = self.command(arguments);
        command
            .envs(variables.iter().copied())
            .env_remove("REGISTRY__RAFT__LISTEN");
        let output = within(PATIENCE, command.output()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{variables:?} {arguments:?}: {said}");
        said
    }
}

#[tokio::test]
async fn a_wrong_setting_names_its_source() {
    let shell = Shell::new();
    let write = |name: &str, text: &str| std::fs::write(shell.dir.path().join(name), text).unwrap();
    write("good.yaml", "registry:\n  namespace: /a\n");
    write("wrong.toml", "[registry]\nnamespce = \"/a\"\n");
    let get = |file: &'static str| ["--config", file, "get", "/k"];

    let said = shell.refuses(&[], &get("wrong.toml")).await;
    assert!(said.contains("wrong.toml: unknown field `namespce`"), "{said}");
    // Also when other sources say something, which is right.
    let right = [("REGISTRY__NAMESPACE", "/b"), ("REGISTRY__RAFT__MEMBER", "m")];
    let said = shell
        .refuses(&right, &[&["--set", "session_ttl=3s"], &get("wrong.toml")[..]].concat())
        .await;
    assert!(said.contains("wrong.toml: unknown field `namespce`"), "{said}");

    let variables = [("REGISTRY__NAMESPCE", "/x"), ("REGISTRY__NAMESPACE", "/b")];
    let said = shell.refuses(&variables, &get("good.yaml")).await;
    assert!(
        said.contains("REGISTRY__NAMESPCE in the environment: unknown field `namespce`") && !said.contains("good.yaml"),
        "{said}"
    );
    let said = shell.refuses(&[("REGISTRY__RAFT__LISTEN_", "x")], &["get", "/k"]).await;
    assert!(said.contains("REGISTRY__RAFT__LISTEN_ in the environment"), "{said}");

    let set = [
        "--set",
        "session_ttl=4s",
        "--set",
        "raft.data=secret",
        "--set",
        "namespace=/c",
    ];
    let said = shell.refuses(&right, &[&set[..], &get("good.yaml")].concat()).await;
    assert!(
        said.contains("--set raft.data: unknown field `data`")
            && !said.contains("good.yaml")
            && !said.contains("secret"),
        "{said}"
    );
    // A check of several settings together names the last that it needs.
    let said = shell
        .refuses(
            &[],
            &[
                &["--set", "raft.member=m", "--set", "raft.endpoints=h:1"],
                &get("good.yaml")[..],
            ]
            .concat(),
        )
        .await;
    assert!(said.contains("--set raft.endpoints: registry.raft.member"), "{said}");
}

#[tokio::test]
async fn blanks_in_a_list_are_left_out() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let (port, dead) = (shell.port, process::free_port());
    // The second of two, so that it is used.
    let list = format!(" 127.0.0.1:{dead} , 127.0.0.1:{port} ");
    let mut command = shell.command(&["put", "/a", "1"]);
    command
        .env_remove("REGISTRY__RAFT__LISTEN")
        .env("REGISTRY__RAFT__ENDPOINTS", &list);
    let put = within(PATIENCE, command.output()).await.unwrap();
    assert!(put.status.success(), "{put:?}");
    let mut command = shell.command(&["--set", &format!("raft.endpoints={list}"), "get", "/a"]);
    command.env_remove("REGISTRY__RAFT__LISTEN");
    let got = within(PATIENCE, command.output()).await.unwrap();
    assert_eq!(got.stdout, b"1", "{got:?}");
}

#[tokio::test]
async fn an_endpoint_that_is_no_address_is_refused_at_once() {
    let shell = Shell::new();
    let names = [
        "a b:1",
        "a:1 b",
        "ü:1",
        "[::1:1",
        "[::x]:1",
        "a;b:1",
        "",
        "a",
        "a:0",
        "a:70000",
        "http://a:1",
    ];
    for name in names {
        let file = format!("[registry.raft]\nendpoints = [\"127.0.0.1:1\", \"{name}\"]\n");
        std::fs::write(shell.dir.path().join("list.toml"), file).unwrap();
        let said = shell.refuses(&[], &["--config", "list.toml", "get", "/k"]).await;
        let named = format!("registry.raft.endpoints: {name:?} is no host and port");
        assert!(said.contains("list.toml: ") && said.contains(&named), "{name}: {said}");
        let list = format!("127.0.0.1:1,{name}");
        let said = shell
            .refuses(&[("REGISTRY__RAFT__ENDPOINTS", &list)], &["get", "/k"])
            .await;
        assert!(
            said.contains("REGISTRY__RAFT__ENDPOINTS in the environment: ") && said.contains(&named),
            "{name}: {said}"
        );
        let said = shell
            .refuses(&[], &["--set", &format!("raft.endpoints={list}"), "get", "/k"])
            .await;
        assert!(
            said.contains("--set raft.endpoints: ") && said.contains(&named),
            "{name}: {said}"
        );
    }
    // In a file an item is taken as it is written.
    std::fs::write(
        shell.dir.path().join("list.toml"),
        "[registry.raft]\nendpoints = [\"127.0.0.1:1\", \" 127.0.0.1:2\"]\n",
    )
    .unwrap();
    let said = shell.refuses(&[], &["--config", "list.toml", "get", "/k"]).await;
    assert!(said.contains("\" 127.0.0.1:2\" is no host and port"), "{said}");
}

#[cfg(all(feature = "etcd", feature = "zk"))]
#[tokio::test]
async fn blanks_in_the_lists_of_other_stores_are_left_out_and_wrong_items_are_refused() {
    let shell = Shell::new();
    for (store, list, wrong) in [
        ("etcd", "ETCD__ENDPOINTS", "127.0.0.1:1, a b:2"),
        ("zk", "ZK__SERVERS", "127.0.0.1:1, a b:2"),
        ("zk", "ZK__SERVERS", "127.0.0.1:1,"),
        ("etcd", "ETCD__ENDPOINTS", "127.0.0.1:1,"),
    ] {
        let name = format!("REGISTRY__{list}");
        let said = shell
            .refuses(&[("REGISTRY__TYPE", store), (&name, wrong)], &["get", "/k"])
            .await;
        assert!(said.contains("number 2") && said.contains(&name), "{said}");
        let right = [
            ("REGISTRY__TYPE", store),
            (name.as_str(), " 127.0.0.1:1 , 127.0.0.1:2 "),
        ];
        let mut command = shell.command(&["--set", "connect_timeout=300ms", "--set", "session_ttl=4s", "get", "/k"]);
        command.env_remove("REGISTRY__RAFT__LISTEN").envs(right);
        let output = within(PATIENCE, command.output()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{store}: {said}");
    }
}

#[cfg(feature = "mysql")]
#[tokio::test]
async fn the_schema_has_the_prefix_of_the_settings() {
    let shell = Shell::new();
    let table = "[registry.mysql]\nurl = \"mysql://app@db/app\"\ntable_prefix = \"foo_\"\n";
    for (name, text) in [
        ("selected.toml", format!("[registry]\ntype = \"mysql\"\n{table}")),
        // Before the move to it.
        ("later.toml", table.to_owned()),
    ] {
        std::fs::write(shell.dir.path().join(name), text).unwrap();
        let sql = shell.says(0, &["schema", "mysql", "--config", name]).await;
        assert!(
            sql.contains("CREATE TABLE IF NOT EXISTS foo_entries") && !sql.contains("registry_"),
            "{sql}"
        );
        let sql = shell
            .says(0, &["schema", "mysql", "--config", name, "--table-prefix", "bar_"])
            .await;
        assert!(sql.contains("bar_entries") && !sql.contains("foo_"), "{sql}");
    }
    assert!(shell.says(0, &["schema", "mysql"]).await.contains("registry_entries"));
    std::fs::write(shell.dir.path().join("wrong.toml"), "[registry.mysql]\nurl = \"x\"\n").unwrap();
    let said = shell.says(2, &["schema", "mysql", "--config", "wrong.toml"]).await;
    assert!(said.contains("wrong.toml"), "{said}");
}

/// The package bsdutils has `script`, which gives a terminal.
#[tokio::test]
async fn log_lines_have_colors_only_where_they_are_wanted() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let typed = format!("'{}' get /none", env!("CARGO_BIN_EXE_registry"));
    for (variable, value, colored) in [
        ("TERM", "xterm", true),
        ("NO_COLOR", "", true),
        ("NO_COLOR", "1", false),
        ("TERM", "dumb", false),
    ] {
        let mut terminal = shell.of("script", &["--quiet", "--return", "--command", &typed, "/dev/null"]);
        terminal
            .env_remove("NO_COLOR")
            .env("TERM", "xterm")
            .env("RUST_LOG", "debug,h2=off")
            .env(variable, value);
        let shown = within(PATIENCE, terminal.output()).await.unwrap();
        let text = String::from_utf8_lossy(&shown.stdout);
        assert!(text.contains("DEBUG"), "{text}");
        assert_eq!(text.contains("\u{1b}["), colored, "{variable}={value}: {text}");
    }
}

#[tokio::test]
async fn what_demo_starts_is_offered_to_nobody() {
    let shell = Shell::new();
    for name in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = shell.says(0, &["completions", name]).await;
        assert!(
            script.contains("completions") && !script.contains("demo-worker"),
            "{name}"
        );
    }
    for arguments in [&["--json"][..], &[], &["--help"], &["help"]] {
        let said = shell.run(arguments).await;
        let said = [said.stdout, said.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains("completions") && !said.contains("worker"), "{said}");
    }
    shell.says(2, &["--json", "demo-worker", "h:1", "/k"]).await;
}

/// A restored group has the address of the settings, under which the other members find it.
#[tokio::test]
async fn a_restore_takes_the_address_of_the_settings() {
    let shell = Shell::new();
    let member = shell.serve().await;
    shell.says(0, &["put", "/a", "1"]).await;
    shell.says(0, &["backup", "one.backup"]).await;
    drop(member);
    let address = format!("127.0.0.1:{}", process::free_port());
    let file = format!("[registry.raft]\nmember = \"m\"\ndata_dir = \"new\"\nlisten = \"{address}\"\n");
    std::fs::write(shell.dir.path().join("m.toml"), file).unwrap();
    let with = |arguments: &[&'static str]| {
        let mut command = shell.command(&[&["--config", "m.toml"], arguments].concat());
        command.env_remove("REGISTRY__RAFT__LISTEN");
        command
    };
    let restored = within(PATIENCE, with(&["restore", "one.backup"]).output())
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&restored.stdout);
    assert!(restored.status.success() && said.contains(&address), "{restored:?}");
    let _member = Process::start(with(&["serve"]), |line| line.contains("ready").then_some(()))
        .await
        .0;
    let members = within(PATIENCE, with(&["members"]).output()).await.unwrap();
    let said = String::from_utf8_lossy(&members.stdout);
    assert!(said.contains("member m ") && said.contains(&address), "{said}");
}

/// A directory that holds something else stays as it is; one that is empty may be another user's.
#[tokio::test]
async fn serve_takes_over_no_directory_of_others() {
    use std::os::unix::fs::PermissionsExt;
    let shell = Shell::new();
    let shared = shell.dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777)).unwrap();
    std::fs::write(shared.join("notes"), "x").unwrap();
    let said = shell.says(1, &["serve", "--set", "raft.data_dir=shared"]).await;
    assert!(said.contains("shared: ") && said.contains("\"notes\""), "{said}");
    let mode = std::fs::metadata(&shared).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode, std::fs::read_dir(&shared).unwrap().count()), (0o1777, 1));
    std::fs::remove_file(shared.join("notes")).unwrap();
    let serve = shell.command(&["serve", "--set", "raft.data_dir=shared"]);
    let _member = Process::start(serve, |line| line.contains("ready").then_some(()))
        .await
        .0;
    assert_eq!(
        std::fs::metadata(&shared).unwrap().permissions().mode() & 0o7777,
        0o1777
    );
}

#[tokio::test]
async fn an_even_number_of_voters_is_warned_of() {
    let shell = Shell::new();
    let _member = shell.serve().await;
    let own = process::free_port();
    let settings = [
        "serve",
        "--set",
        "raft.member=b",
        "--set",
        "raft.data_dir=b",
        "--set",
        &format!("raft.listen=127.0.0.1:{own}"),
        "--set",
        &format!("raft.join=127.0.0.1:{}", shell.port),
    ];
    let _joined = Process::start(shell.command(&settings), |line| line.contains("ready").then_some(()))
        .await
        .0;
    let output = shell.run(&["members", "promote", "b"]).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("warning: the group has 2 voters: both have to be up") && said.contains("1, 3 or 5"),
        "{said}"
    );
    // Back to one, which is a good number.
    let output = shell.run(&["members", "remove", "b"]).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("voters"), "{said}");
}

/// A name or a password that looks like a number is taken as it is written.
#[tokio::test]
async fn a_variable_is_a_text_whatever_it_looks_like() {
    let shell = Shell::new();
    let mut serving = shell.command(&["serve"]);
    serving
        .env("REGISTRY__RAFT__MEMBER", "007")
        .env("REGISTRY__RAFT__LEASE_READS", "true");
    let (_member, ()) = Process::start(serving, |line| line.contains("ready").then_some(())).await;
    let members = shell.says(0, &["status"]).await;
    assert!(members.contains("member 007"), "{members}");
}
