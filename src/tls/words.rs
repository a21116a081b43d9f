//! What rustls says, in the words of somebody who has files and hosts before him.

use std::path::Path;

use rustls::{AlertDescription, CertificateError, Error, InconsistentKeys};

use super::{CA, Role, TlsError};

/// What is wrong with a key and its certificate.
pub(super) fn of_own(e: &Error, certificate: &Path, key: &Path) -> TlsError {
    let (certificate, key) = (certificate.display(), key.display());
    match e {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::new(
            format!("{key} is not the key of {certificate}"),
            "copy both anew from where they were made together",
        ),
        Error::InvalidCertificate(_) => TlsError::new(
            format!("{certificate} is no certificate that is understood: {e}"),
            "have it made anew (X.509, version 3)",
        ),
        e => TlsError::new(
            format!("{key} is no key that is understood: {e}"),
            "have key and certificate made anew: RSA of 2048 bits or more, ECDSA or Ed25519",
        ),
    }
}

/// What is wrong with a certificate, ours or the other side's.
pub(super) fn of_certificate(e: &Error, whose: &str, dir: &Path, role: Role) -> TlsError {
    let ca = dir.join(CA);
    let ca = ca.display();
    let Error::InvalidCertificate(reason) = e else {
        return TlsError::new(format!("{whose} is refused: {e}"), "have it made anew (X.509, version 3)");
    };
    use CertificateError as C;
    match reason {
        C::Expired | C::ExpiredContext { .. } => TlsError::new(
            format!("{whose} has expired"),
            "have a new one made; or, if it has not, set this host's clock",
        ),
        C::NotValidYet | C::NotValidYetContext { .. } => TlsError::new(
            format!("{whose} is not valid yet"),
            "set the clocks: this host's, and that of the host where it was made",
        ),
        C::UnknownIssuer | C::BadSignature => TlsError::new(
            format!("{whose} is not signed by the CA of {ca}"),
            format!("have it signed by that CA, or put the certificate of the CA that did into {ca}"),
        ),
        C::Revoked => TlsError::new(format!("{whose} has been revoked"), "have a new one made"),
        C::NotValidForName => {
            TlsError::new(format!("{whose} is for another host"), "name the host as its certificate does")
        }
        C::NotValidForNameContext { expected, presented } => {
            let names: Vec<&str> = presented.iter().map(|name| bare(name)).collect();
            let for_whom = if names.is_empty() { "no name at all".to_owned() } else { names.join(", ") };
            TlsError::new(
                format!("{whose} is for {for_whom}, and not for {}", expected.to_str()),
                "name the host as its certificate does (subjectAltName), or say by which name it is to be known: tls-hostname",
            )
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => TlsError::new(
            format!("{whose} is not made for a {} (extended key usage)", role.word()),
            "have one made for that purpose, or for none",
        ),
        other => TlsError::new(
            format!("{whose} is refused: {}", Error::InvalidCertificate(other.clone())),
            "have it made anew (X.509, version 3)",
        ),
    }
}

/// A name as it stands in a certificate; what is told of it is `DnsName("localhost")`, or `IpAddress(127.0.0.1)`.
fn bare(told: &str) -> &str {
    let inner = told.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.map_or(told, |name| name.trim_matches('"'))
}

/// Why a connection has no TLS, or no more.
pub(super) fn of_connection(e: &Error, dir: &Path, role: Role) -> TlsError {
    let (us, other) = (role.word(), role.other().word());
    let own = role.certificate(dir);
    match e {
        Error::InvalidCertificate(_) => {
            of_certificate(e, &format!("the {other}'s certificate"), dir, role.other())
        }
        Error::NoCertificatesPresented => TlsError::new(
            format!("the {other} has shown no certificate"),
            format!("give it one that is signed by the CA of {}", dir.join(CA).display()),
        ),
        Error::AlertReceived(
            alert @ (AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError),
        ) => TlsError::new(
            format!("the {other} does not take our certificate {}: {alert:?}", own.display()),
            format!("see what the {other} says of it; its CA has to have signed {us}-cert.pem"),
        ),
        Error::AlertReceived(AlertDescription::ProtocolVersion) | Error::PeerIncompatible(_) => {
            TlsError::new(
                format!("the {other} speaks no TLS that is spoken here: {e}"),
                "have it speak TLS 1.3 with certificates; pre-shared keys and older versions are not spoken here",
            )
        }
        Error::AlertReceived(alert) => TlsError::new(
            format!("the {other} has ended TLS: {alert:?}"),
            format!("see what the {other} says of it"),
        ),
        e => TlsError::new(
            format!("what the {other} sends is no TLS that can be: {e}"),
            format!("see whether it is a {other} with TLS that is there"),
        ),
    }
}

/// The other side has gone without a word right after TLS began.
pub(super) fn gone(dir: &Path) -> TlsError {
    let own = Role::Client.certificate(dir);
    TlsError::new(
        format!(
            "the server has closed the connection as soon as it had seen our certificate {}",
            own.display()
        ),
        "see what the server says of it; its CA has to have signed client-cert.pem",
    )
}

#[cfg(test)]
mod tests {
    use super::bare;

    #[test]
    fn names_of_certificates_are_told_as_they_are() {
        for (told, name) in [
            ("DnsName(\"localhost\")", "localhost"),
            ("IpAddress(::1)", "::1"),
            ("else", "else"),
            ("x(", "x("),
        ] {
            assert_eq!(bare(told), name);
        }
    }
}
