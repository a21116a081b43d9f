//! Certificates for tests, in QEMU's layout: a CA that lives as long as the test, and what it signs.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

/// When a certificate counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Now,
    Past,
    Future,
}

pub struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub fn new(name: &str) -> Ca {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A directory with everything that client and server need on this host.
    pub fn directory(&self, at: &Path) -> PathBuf {
        fs::create_dir_all(at).unwrap();
        fs::write(at.join("ca-cert.pem"), self.0.pem()).unwrap();
        self.sign(at, "server", &["localhost", "127.0.0.1", "::1"], When::Now);
        self.sign(at, "client", &[], When::Now);
        at.to_owned()
    }

    /// A certificate and its key for `server` or `client`, under those names.
    pub fn sign(&self, at: &Path, who: &str, names: &[&str], when: When) {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, who);
        params.serial_number = Some(SerialNumber::from_slice(who.as_bytes()));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        (params.not_before, params.not_after) = match when {
            When::Now => (date_time_ymd(2000, 1, 1), date_time_ymd(2100, 1, 1)),
            When::Past => (date_time_ymd(2000, 1, 1), date_time_ymd(2001, 1, 1)),
            When::Future => (date_time_ymd(2099, 1, 1), date_time_ymd(2100, 1, 1)),
        };
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(at.join(format!("{who}-cert.pem")), certificate.pem()).unwrap();
        let path = at.join(format!("{who}-key.pem"));
        let _ = fs::remove_file(&path);
        fs::write(&path, key.serialize_pem()).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// What `who` was given counts no more.
    pub fn revoke(&self, at: &Path, who: &str) {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2000, 1, 1),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from_slice(who.as_bytes()),
                revocation_time: date_time_ymd(2000, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        fs::write(at.join("ca-crl.pem"), list.signed_by(&self.0).unwrap().pem().unwrap()).unwrap();
    }
}
