//! Who may speak to a member: certificates on both sides, and a token.

#![allow(clippy::unwrap_used)]

mod authority;
#[path = "../harness/mod.rs"]
mod harness;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use authority::Authority;
use registry_api::{Error, Key, Options, Read, Registry, Result, WatchItem, WatchRequest, WatchScope};
use registry_raft::{Member, RaftConfig, Tls};

const TOKEN: &str = "a-word-that-nobody-guesses";

/// A member with its files, for as long as the test runs.
struct Fixture {
    authority: Authority,
    tls: Tls,
    member: Member,
    /// Removed last, when nobody writes to it any more.
    directory: tempfile::TempDir,
}

impl Fixture {
    async fn start(token: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new("the group's");
        let tls = authority.sign(directory.path(), "member");
        let token_file = token.map(|token| write(directory.path(), "token", token));
        let member = start(directory.path().join("data"), Some(tls.clone()), token_file).await;
        Self {
            directory,
            authority,
            tls,
            member,
        }
    }

    fn files(&self) -> &Path {
        self.directory.path()
    }
}

async fn start(data_dir: PathBuf, tls: Option<Tls>, token_file: Option<PathBuf>) -> Member {
    let mut config = RaftConfig::default();
    config.data_dir = Some(data_dir);
    config.listen = Some("127.0.0.1:0".into());
    (config.tls, config.token_file) = (tls, token_file);
    Member::start(&config).await.unwrap()
}

/// A remote handle on a member, which is to be there, or be refused, within a time that tells refusal from silence.
async fn connect(member: &Member, tls: Option<Tls>, token_file: Option<PathBuf>) -> Result<Arc<dyn Registry>> {
    let mut config = RaftConfig::remote([member.address().unwrap().to_string()]);
    (config.tls, config.token_file) = (tls, token_file);
    let options = Options {
        connect_timeout: Duration::from_secs(10),
        request_timeout: Duration::from_secs(10),
        ..Options::default()
    };
    let asked = tokio::time::timeout(Duration::from_secs(60), registry_raft::connect(&config, &options));
    asked.await.expect("neither taken nor refused")
}

fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn denied(refused: Result<Arc<dyn Registry>>, why: &str) {
    match refused {
        Err(error @ Error::AccessDenied { .. }) if text(&error).contains(why) => {}
        other => panic!("not denied for {why:?}: {other:?}"),
    }
}

fn unavailable(refused: Result<Arc<dyn Registry>>, why: &str) {
    match refused {
        Err(error @ Error::Unavailable { .. }) if text(&error).contains(why) => {}
        other => panic!("not unavailable for {why:?}: {other:?}"),
    }
}

/// Everything a handle does goes through.
async fn works(registry: &Arc<dyn Registry>) {
    let key = Key::parse("/a").unwrap();
    let mut watch = registry.watch(WatchRequest::new(&key, WatchScope::Key)).await.unwrap();
    registry.put(&key, "1").await.unwrap();
    let read = registry.get(&key, Read::Linearizable).await.unwrap().unwrap();
    assert_eq!(read.value, "1");
    let told = async {
        loop {
            if let WatchItem::Changes(_) = watch.next().await.unwrap().unwrap() {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), told).await.unwrap();
    let held = registry.lock(&key).acquire().await.unwrap();
    held.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_proves_who_they_are_is_served() {
    let fixture = Fixture::start(Some(TOKEN)).await;
    let tls = fixture.authority.sign(fixture.files(), "client");
    let token = write(fixture.files(), "same", &format!("{TOKEN}\n"));
    let registry = connect(&fixture.member, Some(tls.clone()), Some(token.clone()))
        .await
        .unwrap();
    works(&registry).await;
    let mut config = RaftConfig::remote([fixture.member.address().unwrap().to_string()]);
    (config.tls, config.token_file) = (Some(tls), Some(token));
    let status = registry_raft::status(&config, &Options::default()).await.unwrap();
    assert_eq!(status.members.len(), 1);
    registry.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_to_be_trusted_is_refused_with_the_reason() {
    let fixture = Fixture::start(None).await;
    let (member, files) = (&fixture.member, fixture.files());
    let foreign = Authority::new("foreign");

    // The member does not believe this side.
    let impostor = Tls {
        ca: fixture.tls.ca.clone(),
        ..foreign.sign(files, "impostor")
    };
    denied(connect(member, Some(impostor), None).await, "registry.raft.tls.ca");
    let namesake = Tls {
        ca: fixture.tls.ca.clone(),
        ..Authority::new("the group's").sign(files, "namesake")
    };
    denied(connect(member, Some(namesake), None).await, "registry.raft.tls.ca");
    let expired = fixture.authority.sign_expired(files, "expired");
    denied(connect(member, Some(expired.clone()), None).await, "expired");

    // None of it was in the way of who may ask.
    works(&connect(member, Some(fixture.tls.clone()), None).await.unwrap()).await;

    // This side does not believe the member: it might be another one soon, so that is tried until the time is up.
    let distrustful = Tls {
        ca: foreign.sign(files, "foreign").ca,
        ..fixture.authority.sign(files, "client")
    };
    let late = start(files.join("data-late"), Some(expired), None).await;
    let for_elsewhere = fixture.authority.sign_for("elsewhere.test", files, "elsewhere");
    let elsewhere = start(files.join("data-elsewhere"), Some(for_elsewhere), None).await;
    let whole = Some(fixture.tls.clone());
    let (foreign, late, elsewhere) = tokio::join!(
        connect(member, Some(distrustful), None),
        connect(&late, whole.clone(), None),
        connect(&elsewhere, whole.clone(), None),
    );
    unavailable(foreign, "not to be trusted");
    unavailable(late, "expired");
    unavailable(elsewhere, "elsewhere.test");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_on_one_side_only_nothing_goes() {
    let fixture = Fixture::start(None).await;
    denied(connect(&fixture.member, None, None).await, "set registry.raft.tls");

    let plain = start(fixture.files().join("plain"), None, None).await;
    unavailable(
        connect(&plain, Some(fixture.tls.clone()), None).await,
        "does not speak TLS",
    );
    works(&connect(&plain, None, None).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_the_token_is_denied() {
    let fixture = Fixture::start(Some(TOKEN)).await;
    let (member, tls) = (&fixture.member, Some(fixture.tls.clone()));
    denied(connect(member, tls.clone(), None).await, "registry.raft.token_file");
    for (name, wrong) in [
        ("other", "another-word-of-some-length"),
        ("shorter", &TOKEN[..TOKEN.len() - 1]),
        ("longer", "a-word-that-nobody-guesses-"),
    ] {
        let refused = connect(member, tls.clone(), Some(write(fixture.files(), name, wrong))).await;
        assert!(!format!("{refused:?}").contains(wrong), "{refused:?}");
        denied(refused, "not this group's");
    }
    let right = write(fixture.files(), "right", TOKEN);
    works(&connect(member, tls, Some(right)).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_do_not_hold_what_they_should_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let files = directory.path();
    let authority = Authority::new("the group's");
    let (whole, other) = (authority.sign(files, "whole"), authority.sign(files, "other"));
    let empty = write(files, "empty.pem", "nothing of the kind");
    let none = files.join("none.pem");
    let with = |change: fn(&mut Tls, PathBuf), path: &Path| {
        let mut tls = whole.clone();
        change(&mut tls, path.into());
        tls
    };
    let cases = [
        ("tls.ca", with(|tls, path| tls.ca = path, &none), "none.pem"),
        ("tls.ca", with(|tls, path| tls.ca = path, &empty), "empty.pem"),
        ("tls.cert", with(|tls, path| tls.cert = path, &none), "none.pem"),
        ("tls.cert", with(|tls, path| tls.cert = path, &whole.key), "whole.key"),
        ("tls.key", with(|tls, path| tls.key = path, &none), "none.pem"),
        ("tls.key", with(|tls, path| tls.key = path, &whole.cert), "whole.pem"),
        (
            "tls.key",
            with(|tls, path| tls.key = path, &other.key),
            "do not go together",
        ),
    ];
    let refusal = async |tls: Tls, token_file: Option<PathBuf>| {
        let mut member = RaftConfig::default();
        member.data_dir = Some(files.join("data"));
        (member.tls, member.token_file) = (Some(tls), token_file);
        let mut remote = RaftConfig::remote(["127.0.0.1:1".to_owned()]);
        (remote.tls, remote.token_file) = (member.tls.clone(), member.token_file.clone());
        let refused = Member::start(&member).await.map(drop).unwrap_err();
        let remote = registry_raft::connect(&remote, &Options::default()).await.map(drop);
        assert_eq!(text(&refused), text(&remote.unwrap_err()));
        assert!(!files.join("data").exists(), "something was made");
        text(&refused)
    };
    for (field, tls, named) in cases {
        let text = refusal(tls, None).await;
        assert!(
            text.starts_with(&format!("registry.raft.{field}: ")) && text.contains(named),
            "{field}: {text}"
        );
    }
    for word in [
        "",
        "short",
        "two words of a good length",
        "a-word-of-some-length-\u{e9}",
    ] {
        let text = refusal(whole.clone(), Some(write(files, "token", word))).await;
        assert!(
            text.starts_with("registry.raft.token_file: ") && text.contains("16 to 4096"),
            "{text}"
        );
        assert!(word.is_empty() || !text.contains(word), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_keeps_nobody_waiting() {
    let fixture = Fixture::start(None).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(
            tokio::net::TcpStream::connect(fixture.member.address().unwrap())
                .await
                .unwrap(),
        );
    }
    works(&connect(&fixture.member, Some(fixture.tls.clone()), None).await.unwrap()).await;

    // The other way round: something takes the connection and does not answer.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = RaftConfig::remote([mute.local_addr().unwrap().to_string()]);
    config.tls = Some(fixture.tls.clone());
    let options = Options {
        connect_timeout: Duration::from_secs(3),
        ..Options::default()
    };
    let asked = Instant::now();
    let refused = registry_raft::connect(&config, &options).await;
    assert!(asked.elapsed() < Duration::from_secs(30));
    unavailable(refused, "not taken within");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_prove_themselves_to_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new("the group's");
    let token = write(directory.path(), "token", TOKEN);
    let group = harness::Group::start_with(3, |config| {
        config.tls = Some(authority.sign(directory.path(), config.member.as_deref().unwrap()));
        config.token_file = Some(token.clone());
    })
    .await;
    let follower = group.member(group.follower().await);
    let client = authority.sign(directory.path(), "client");
    works(
        &connect(follower, Some(client.clone()), Some(token.clone()))
            .await
            .unwrap(),
    )
    .await;

    // A stranger on the same network does not get in, whatever it lacks; nor does a member that does not believe the others.
    let foreign = Authority::new("foreign").sign(directory.path(), "foreign");
    let distrustful = Tls {
        ca: foreign.ca.clone(),
        ..client.clone()
    };
    let impostor = Tls {
        ca: client.ca.clone(),
        ..foreign
    };
    let expired = authority.sign_expired(directory.path(), "expired");
    let guess = write(directory.path(), "guess", "a-word-that-somebody-guesses");
    let joins = async |name: &str, tls: Option<Tls>, token: &Path| {
        let mut config = RaftConfig::default();
        config.member = Some(name.into());
        config.data_dir = Some(directory.path().join(name));
        config.listen = Some("127.0.0.1:0".into());
        config.join = group.addresses();
        config.token_file = tls.is_some().then(|| token.into());
        config.tls = tls;
        Member::start(&config).await
    };
    let strangers = [
        ("impostor", Some(impostor), &token),
        ("distrustful", Some(distrustful), &token),
        ("expired", Some(expired), &token),
        ("guesser", Some(client.clone()), &guess),
        ("plain", None, &token),
    ];
    let strangers =
        strangers.map(|(name, tls, token)| tokio::time::timeout(Duration::from_secs(5), joins(name, tls, token)));
    for joined in futures_util::future::join_all(strangers).await {
        assert!(joined.is_err(), "{joined:?}");
    }
    assert_eq!(follower.status().members.len(), 3);
    // With all of it, it does.
    let joined = tokio::time::timeout(Duration::from_secs(60), joins("d", Some(client), &token));
    joined.await.expect("it joins in time").unwrap().stop().await.unwrap();
    assert_eq!(follower.status().members.len(), 4);
}
