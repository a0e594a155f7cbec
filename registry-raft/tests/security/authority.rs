//! Certificates, as an operator would make them.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
};
use registry_raft::Tls;

/// An authority that signs certificates.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).unwrap(),
        }
    }

    /// Files in that directory, `name.*`: this authority's certificate, and one that it signed for 127.0.0.1.
    pub(crate) fn sign(&self, directory: &Path, name: &str) -> Tls {
        self.sign_as(directory, name, |_| {})
    }

    /// The same, of a certificate that is over.
    pub(crate) fn sign_expired(&self, directory: &Path, name: &str) -> Tls {
        self.sign_as(directory, name, |params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        })
    }

    /// The same, of a certificate for another host.
    pub(crate) fn sign_for(&self, host: &str, directory: &Path, name: &str) -> Tls {
        self.sign_as(directory, name, |params| {
            params.subject_alt_names = vec![rcgen::SanType::DnsName(host.try_into().unwrap())];
        })
    }

    fn sign_as(&self, directory: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Tls {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let file = |ending: &str, text: String| {
            let path = directory.join(format!("{name}.{ending}"));
            std::fs::write(&path, text).unwrap();
            path
        };
        Tls {
            ca: file("ca", self.issuer.pem()),
            cert: file("pem", certificate.pem()),
            key: file("key", key.serialize_pem()),
        }
    }
}
