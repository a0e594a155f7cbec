//! `registry demo`.

use super::*;

#[tokio::test]
async fn the_demo_shows_what_it_says() {
    let shell = Shell::new();
    let output = within(
        PATIENCE,
        Command::new(env!("CARGO_BIN_EXE_registry"))
            .arg("demo")
            .current_dir(shell.dir.path())
            .output(),
    )
    .await
    .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("All of it was checked"),
        "{output:?}"
    );
    assert_eq!(
        std::fs::read_dir(shell.dir.path()).unwrap().count(),
        0,
        "it leaves nothing behind"
    );
}

/// Neither a process nor a directory is left of a demo that is interrupted, or that nobody reads any more.
#[tokio::test]
async fn a_demo_that_is_cut_short_leaves_nothing_behind() {
    for code in [130, 141] {
        let shell = Shell::new();
        let mut demo = shell.command(&["--json", "demo"]);
        // The settings of the caller are for a store of theirs.
        demo.env("TMPDIR", shell.dir.path()).env("REGISTRY__TYPE", "none");
        let mut demo = demo.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut told = BufReader::new(demo.stdout.take().unwrap()).lines();
        let mut shown = async || {
            let line: Value = serde_json::from_str(&line(&mut told).await).unwrap();
            line["shown"].as_str().unwrap().to_owned()
        };
        shown().await;
        let ready = shown().await;
        let addresses = ready.strip_prefix("ready on ").unwrap().split(' ').next().unwrap();
        while !shown().await.contains("/w2") {}
        if code == 130 {
            assert_eq!(interrupt(&mut demo).await, Some(code));
        } else {
            drop(told);
            assert_eq!(within(PATIENCE, demo.wait()).await.unwrap().code(), Some(code));
        }
        for address in addresses.split(',') {
            let refused = tokio::net::TcpStream::connect(address).await.expect_err(address);
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        assert_eq!(std::fs::read_dir(shell.dir.path()).unwrap().count(), 0);
    }
}
