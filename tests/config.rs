//! The config: every key changes what it says or is refused by name.

// A test may fail.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::time::Duration;

use registry::{Backend, Config, TtlBounds};
use registry_tests::Dice;
use tempfile::{Builder, NamedTempFile};

fn file(ending: &str, text: impl AsRef<[u8]>) -> NamedTempFile {
    let mut file = Builder::new().suffix(ending).tempfile().unwrap();
    file.write_all(text.as_ref()).unwrap();
    file
}

fn load(text: &str) -> registry::Result<Config> {
    Config::load(Some(file(".toml", text).path()), &Vec::new())
}

fn refusal(text: &str) -> String {
    let error = load(text).expect_err(text);
    assert!(matches!(error, registry::Error::Config { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn no_file_is_the_embedded_store() {
    let config = Config::load(None, &Vec::new()).unwrap();
    assert_eq!(config.options.namespace.as_str(), "/registry");
    assert_eq!(config.options.session_ttl.get(), Duration::from_secs(10));
    assert_eq!(
        (config.options.request_timeout, config.options.connect_timeout),
        (Duration::from_secs(5), Duration::from_secs(5))
    );
    assert_eq!(config.options.session_ttl_bounds, TtlBounds::Refuse);
    assert!(matches!(config.backend, Backend::Raft(raft) if !raft.is_remote()));
}

#[test]
fn every_shared_key_is_taken() {
    let config = load(
        "[registry]\ntype = \"raft\"\nnamespace = \"/app\"\nsession_ttl = \"3s\"\nsession_ttl_bounds = \"accept\"\n\
         request_timeout = \"700ms\"\nconnect_timeout = \"2m\"\n[registry.raft]\nmember = \"m\"\ndata_dir = \"d\"\n\
         listen = \"127.0.0.1:1\"\nsnapshot_log_bytes = 2000000\ntimers = \"fast\"",
    )
    .unwrap();
    let options = &config.options;
    assert_eq!(
        (options.namespace.as_str(), options.session_ttl.get()),
        ("/app", Duration::from_secs(3))
    );
    assert_eq!(options.session_ttl_bounds, TtlBounds::Accept);
    assert_eq!(
        (options.request_timeout, options.connect_timeout),
        (Duration::from_millis(700), Duration::from_secs(120))
    );
    let Backend::Raft(raft) = &config.backend else {
        panic!("{config:?}")
    };
    assert_eq!(
        (raft.member.as_deref(), raft.listen.as_deref()),
        (Some("m"), Some("127.0.0.1:1"))
    );
    assert_eq!(
        (raft.data_dir.as_deref(), raft.snapshot_log_bytes),
        (Some(std::env::temp_dir().join("d").as_path()), Some(2_000_000))
    );
    assert_eq!(raft.timers, registry::raft::Timers::Fast);
}

#[test]
fn the_three_formats_say_the_same() {
    let yaml = file(
        ".yaml",
        "registry:\n  namespace: /app\n  raft:\n    endpoints: [\"h:1\", \"i:2\"]\n",
    );
    let json = file(
        ".json",
        r#"{"registry": {"namespace": "/app", "raft": {"endpoints": ["h:1", "i:2"]}}}"#,
    );
    let toml = file(
        ".toml",
        "registry.namespace = \"/app\"\nregistry.raft.endpoints = [\"h:1\", \"i:2\"]",
    );
    for file in [yaml, json, toml] {
        let config = Config::load(Some(file.path()), &Vec::new()).unwrap();
        assert_eq!(config.options.namespace.as_str(), "/app");
        assert!(matches!(config.backend, Backend::Raft(raft) if raft.endpoints == ["h:1", "i:2"]));
    }
}

#[test]
fn overrides_come_last() {
    let file = file(".toml", "[registry]\nnamespace = \"/file\"\nsession_ttl = \"3s\"");
    let overrides = vec![
        ("namespace".into(), "/over".into()),
        ("raft.endpoints".into(), "h:1,i:2".into()),
    ];
    let config = Config::load(Some(file.path()), &overrides).unwrap();
    assert_eq!(
        (config.options.namespace.as_str(), config.options.session_ttl.get()),
        ("/over", Duration::from_secs(3))
    );
    assert!(matches!(config.backend, Backend::Raft(raft) if raft.endpoints == ["h:1", "i:2"]));
}

#[test]
fn paths_in_a_file_are_beside_it() {
    let file = file(
        ".toml",
        "[registry.raft]\ndata_dir = \"/data\"\ntoken_file = \"token\"\n\
         tls = { ca = \"tls/ca.pem\", cert = \"a.pem\", key = \"../a.key\" }",
    );
    let directory = file.path().parent().unwrap();
    let load = |overrides| {
        let config = Config::load(Some(file.path()), &overrides).unwrap();
        match config.backend {
            Backend::Raft(raft) => (raft.data_dir.unwrap(), raft.token_file.unwrap(), raft.tls.unwrap()),
            #[allow(unreachable_patterns)]
            other => panic!("{other:?}"),
        }
    };
    let (data_dir, token_file, tls) = load(Vec::new());
    assert_eq!(
        (data_dir.to_str(), token_file),
        (Some("/data"), directory.join("token"))
    );
    assert_eq!(
        (tls.ca, tls.cert, tls.key),
        (
            directory.join("tls/ca.pem"),
            directory.join("a.pem"),
            directory.join("../a.key")
        )
    );
    // Said on the spot, it is where the program runs.
    let (_, token_file, _) = load(vec![("raft.token_file".into(), "here".into())]);
    assert_eq!(token_file.to_str(), Some("here"));
    let memory = self::file(".toml", "registry.raft.data_dir = \":memory:\"");
    let config = Config::load(Some(memory.path()), &Vec::new()).unwrap();
    assert!(matches!(config.backend, Backend::Raft(raft) if raft.data_dir == Some(":memory:".into())));
}

#[test]
fn wrong_settings_are_refused_naming_key_file_and_what_is_allowed() {
    let cases = [
        ("[registry]\nnamespce = \"/a\"", "unknown field `namespce`"),
        ("[registry.raft]\ndatadir = \"d\"", "unknown field `datadir`"),
        (
            "[registry.raft]\ntls = { ca = \"ca\", cert = \"c\" }",
            "missing configuration field \"registry.raft.tls.key\"",
        ),
        (
            "[registry.raft]\ntls = { ca = \"ca\", key = \"k\" }",
            "missing configuration field \"registry.raft.tls.cert\"",
        ),
        (
            "[registry.raft]\ntls = { cert = \"c\", key = \"k\" }",
            "missing configuration field \"registry.raft.tls.ca\"",
        ),
        ("[registry.raft]\ntimers = \"quick\"", "neither `default` nor `fast`"),
        ("[regisrty]\n", "unknown field `regisrty`"),
        ("[registry]\ntype = \"zookeeper\"", "is unknown; this program has: raft"),
        ("[registry]\nnamespace = \"/a/b\"", "one segment only"),
        ("[registry]\nnamespace = \"a\"", "begins with `/`"),
        ("[registry]\nsession_ttl = \"500ms\"", "not between 1s and 1h"),
        ("[registry]\nsession_ttl = 10", "session_ttl"),
        (
            "[registry]\nsession_ttl_bounds = \"clamp\"",
            "neither `refuse` nor `accept`",
        ),
        ("[registry]\nrequest_timeout = \"0s\"", "not between 1ms and 1h"),
        ("[registry]\nconnect_timeout = \"soon\"", "no time such as"),
        ("[registry\n", "TOML"),
    ];
    for (text, why) in cases {
        let said = refusal(text);
        assert!(said.contains(why) && said.contains(".toml"), "{text}: {said}");
    }
    let missing = Config::load(Some("/none/registry.toml".as_ref()), &Vec::new())
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("/none/registry.toml") && missing.contains("can't be read"),
        "{missing}"
    );
    let ending = file(".ini", "");
    let said = Config::load(Some(ending.path()), &Vec::new()).unwrap_err().to_string();
    assert!(said.contains(".toml, .yaml, .yml or .json"), "{said}");
}

#[cfg(not(feature = "zk"))]
#[test]
fn a_backend_that_is_not_compiled_in_is_refused_naming_those_that_are() {
    let said = refusal("[registry]\ntype = \"zk\"");
    assert!(
        said.contains("\"zk\" is not compiled into this program, which has: raft"),
        "{said}"
    );
}

#[cfg(feature = "etcd")]
#[test]
fn the_etcd_table_is_taken_and_its_password_is_shown_nowhere() {
    let text = "[registry]\ntype = \"etcd\"\n[registry.etcd]\nendpoints = [\"etcd-1:2379\", \"https://etcd-2:2379\"]\n\
                user = \"app\"\npassword = \"secret\"\n[registry.etcd.tls]\nca = \"ca.pem\"\ncert = \"app.pem\"\nkey = \"app.key\"";
    let file = file(".toml", text);
    let etcd = |overrides| match Config::load(Some(file.path()), &overrides).unwrap().backend {
        Backend::Etcd(etcd) => etcd,
        #[allow(unreachable_patterns)]
        other => panic!("{other:?}"),
    };
    let given = etcd(Vec::new());
    let endpoints = |list: &[&str]| registry::etcd::Endpoints::new(list.to_vec()).unwrap();
    assert_eq!(given.endpoints, endpoints(&["etcd-1:2379", "https://etcd-2:2379"]));
    let who = given.credentials.as_ref().unwrap();
    assert_eq!((who.user.as_str(), who.password.as_str()), ("app", "secret"));
    let (tls, directory) = (given.tls.as_ref().unwrap(), file.path().parent().unwrap());
    let own = tls.client.as_ref().unwrap();
    assert_eq!(
        [&tls.ca, &own.cert, &own.key],
        [
            &directory.join("ca.pem"),
            &directory.join("app.pem"),
            &directory.join("app.key")
        ]
    );
    assert!(!format!("{given:?}").contains("secret"));
    let over = etcd(vec![("etcd.endpoints".into(), "a:1,b:2".into())]);
    assert_eq!(over.endpoints, endpoints(&["a:1", "b:2"]));
    for (wrong, why) in [
        ("endpoints = []", "registry.etcd.endpoints"),
        ("endpoints = [\"a:1\"]\nttl = 3", "unknown field `ttl`"),
        ("endpoints = [\"a:1\"]\npassword = \"secret\"", "registry.etcd.user"),
        ("endpoints = [\"http://app:secret@a:1\"]", "registry.etcd.password"),
    ] {
        let said = refusal(&format!("[registry]\ntype = \"etcd\"\n[registry.etcd]\n{wrong}"));
        assert!(said.contains(why) && !said.contains("secret"), "{said}");
    }
}

#[cfg(feature = "etcd")]
#[test]
fn a_backend_without_its_table_is_refused() {
    assert!(refusal("[registry]\ntype = \"etcd\"").contains("needs the table [registry.etcd]"));
    let config = load("[registry]\ntype = \"etcd\"\n[registry.etcd]\nendpoints = [\"127.0.0.1:2379\"]").unwrap();
    assert!(matches!(config.backend, Backend::Etcd(_)));
}

#[cfg(feature = "mysql")]
#[test]
fn the_mysql_table_is_taken_and_its_password_is_shown_nowhere() {
    assert!(refusal("[registry]\ntype = \"mysql\"").contains("needs the table [registry.mysql]"));
    let config = load(
        "[registry]\ntype = \"mysql\"\n[registry.mysql]\nurl = \"mysql://app:secret@db:3306/app\"\npool_size = 8\n\
         poll_interval = \"20ms\"\nhistory = 5000\ntable_prefix = \"app_\"\nmigrate = false\n\
         [registry.mysql.tls]\nca = \"ca.pem\"",
    )
    .unwrap();
    let Backend::Mysql(mysql) = &config.backend else {
        panic!("{config:?}")
    };
    assert!(!mysql.migrate);
    assert!(!format!("{config:?}").contains("secret"));
    for (wrong, why) in [
        ("url = \"mysql://app:secret@db\"", "names no database"),
        ("url = \"mysql://db/app\"\npool = 3", "unknown field `pool`"),
        ("url = \"mysql://db/app\"\nhistory = 5", "registry.mysql.history"),
        (
            "url = \"mysql://db/app\"\npoll_interval = \"1ms\"",
            "registry.mysql.poll_interval",
        ),
    ] {
        let said = refusal(&format!("[registry]\ntype = \"mysql\"\n[registry.mysql]\n{wrong}"));
        assert!(said.contains(why) && !said.contains("secret"), "{said}");
    }
}

/// Whatever is in a file, it is a config or refused by name, and what is held for it is in proportion.
fn is_taken(input: &[u8]) -> bool {
    let taken = [".toml", ".yaml", ".json"].map(|ending| {
        let file = file(ending, input);
        let mut result = None;
        let load = || result = Some(Config::load(Some(file.path()), &Vec::new()));
        let held = allocation_counter::measure(load).bytes_max;
        assert!(
            held < (1 << 20) + 1_000 * input.len() as u64,
            "{held} bytes were held for {}",
            input.len()
        );
        match result.unwrap() {
            Ok(_) => true,
            Err(registry::Error::Config { .. }) => false,
            Err(error) => panic!("{error:?}"),
        }
    });
    taken.contains(&true)
}

#[test]
fn whatever_is_in_a_file_is_a_config_or_refused() {
    let good = [
        "[registry]\ntype = \"raft\"\nnamespace = \"/app\"\nsession_ttl = \"3s\"\n[registry.raft]\nmember = \"a\"\n\
         listen = \"127.0.0.1:1\"\n[registry.raft.cluster]\na = \"127.0.0.1:1\"\nb = \"127.0.0.1:2\"\n",
        "[registry.raft]\ndata_dir = \"d\"\nlease_reads = true\ntls = { ca = \"c\", cert = \"a\", key = \"k\" }\n\
         [registry.etcd]\nendpoints = [\"h:1\"]\n[registry.mysql]\nurl = \"mysql://a:b@db:3306/c\"\npool_size = 8\n",
        "registry:\n  type: raft\n  session_ttl: 3s\n  raft:\n    endpoints: [\"h:1\", 'h:2']\n",
        "{\"registry\": {\"type\": \"raft\", \"raft\": {\"join\": [\"h:1\"], \"snapshot_log_bytes\": 2000000}}}",
    ];
    Dice::damage_each(&good.map(|text| text.as_bytes().to_vec()), 2_000, is_taken);
    bolero::check!(name = "config")
        .with_iterations(100)
        .for_each(|input: &[u8]| {
            is_taken(input);
        });
}

/// Nor does nesting beyond all measure do any harm.
#[test]
fn a_deep_file_is_refused() {
    for ending in [".toml", ".yaml", ".json"] {
        for open in ["[", "{", "{\"a\":", "a = [", "a.", "- ", "? ", "? - ", "a:\n"] {
            let deep = open.repeat(100_000);
            let result = Config::load(Some(file(ending, &deep).path()), &Vec::new());
            assert!(
                matches!(result, Err(registry::Error::Config { .. })),
                "{open}: {result:?}"
            );
        }
    }
}

/// A value that is refused may be a password in the wrong place, or in a line that is no TOML.
#[test]
fn no_value_is_repeated_in_a_refusal() {
    for text in [
        "[registry]\ntype = \"etcd\"\n[registry.etcd]\nendpoints = [\"a:1\"]\nusername = \"u\"\npassword = \"s3cret",
        "[registry.mysql]\nurl = \"mysql://u:s3cret@h/db\" x",
        "[registry]\ntype = \"zk\"\n[registry.zk]\nservers = \"a:1\"\nauth = \"u:s3cret\"",
        "[registry]\nmysql = \"mysql://u:s3cret@h/db\"",
    ] {
        let refusal = refusal(text);
        assert!(!refusal.contains("s3cret"), "{refusal}");
    }
    let refused = refusal("[registry]\ntype = \"raft\"\n\n  x y");
    assert!(refused.contains("line 4, column 5"), "{refused}");
    for given in [("mysql", "mysql://u:s3cret@h/db"), ("", ""), ("raft.s3", "s3cret")] {
        let given = vec![(given.0.to_owned(), given.1.to_owned())];
        let refused = Config::load(None, &given).unwrap_err().to_string();
        assert!(!refused.contains("s3cret"), "{refused}");
    }
}
