//! A server that speaks TLS.

use std::fs;
use std::path::Path;
use std::process::Command;

use registry_tests::process::free_port;

use super::Servers;

/// A server that asks clients for a certificate, and the address of its TLS. Certificates and keys are files beside its
/// data: the authority's are `ca`, and it signed `server` and `client`.
pub async fn start_with_tls() -> (Servers, String) {
    let (data, port) = (tempfile::tempdir().unwrap(), free_port());
    for name in ["ca", "server", "client"] {
        certificate(data.path(), name);
    }
    // ZooKeeper wants a key and its certificates in one file.
    let file = |name: &str| data.path().join(name);
    let parts = ["server.key", "server.pem"].map(|part| fs::read(file(part)).unwrap());
    fs::write(file("identity.pem"), parts.concat()).unwrap();
    let lines = format!(
        "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory\nsecureClientPort={port}\n\
         secureClientPortAddress=127.0.0.1\nssl.keyStore.location={}\nssl.trustStore.location={}\n",
        file("identity.pem").display(),
        file("ca.pem").display()
    );
    (Servers::start_in(data, 1, &lines).await, format!("127.0.0.1:{port}"))
}

/// Makes `name.pem` and `name.key`, signed by the authority, or by itself if it is the authority.
fn certificate(dir: &Path, name: &str) {
    let file = |name: &str, ending: &str| dir.join(format!("{name}.{ending}")).display().to_string();
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]);
    openssl.args(["-days", "2", "-subj", &format!("/CN=test-{name}")]);
    openssl.args(["-keyout", &file(name, "key"), "-out", &file(name, "pem")]);
    if name != "ca" {
        openssl.args(["-CA", &file("ca", "pem"), "-CAkey", &file("ca", "key")]);
        openssl.args(["-addext", "subjectAltName=IP:127.0.0.1"]);
        openssl.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    }
    let made = openssl.output().expect("openssl is missing: apt-get install openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}
