//! A server that speaks TLS.

use std::fs;

use registry_tests::certificate::certificate;
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
