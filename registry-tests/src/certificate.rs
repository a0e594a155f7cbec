//! Certificates for servers and clients of tests.

use std::path::Path;
use std::process::Command;

/// Makes `name.pem` and `name.key` in that folder, for 127.0.0.1, signed by the authority there, which is `ca` and is made
/// first, signed by itself.
pub fn certificate(dir: &Path, name: &str) {
    let file = |name: &str, ending: &str| dir.join(format!("{name}.{ending}")).display().to_string();
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt"]);
    openssl.args(["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]);
    openssl.args(["-subj", &format!("/CN=test-{name}")]);
    openssl.args(["-keyout", &file(name, "key"), "-out", &file(name, "pem")]);
    if name != "ca" {
        openssl.args(["-CA", &file("ca", "pem"), "-CAkey", &file("ca", "key")]);
        openssl.args(["-addext", "subjectAltName=IP:127.0.0.1"]);
        openssl.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    }
    let made = openssl.output().expect("openssl is missing: apt-get install openssl");
    assert!(
        made.status.success(),
        "no certificate for {name}: {}",
        String::from_utf8_lossy(&made.stderr)
    );
}
