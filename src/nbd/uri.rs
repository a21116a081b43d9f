//! NBD URIs (the NBD project's `doc/uri.md`): `nbd://host:port/export`, `nbd+unix:///export?socket=/path`, and the same with TLS: `nbds://`,
//! `nbds+unix://`.
//!
//! What the specification has and is not implemented is refused by name, and so are words that nobody knows: a setting with a slip of the pen
//! must not go unnoticed. Words of ours in the query: `reconnect`, `timeout`, `connections`, `retain`.

use std::{
    ffi::OsString,
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{MAX_STRING, PORT};

/// Where the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A host by name or address, and a port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// What is said of TLS.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tls {
    /// The directory of certificates, if it is another than the usual one.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate has, if it is another than the host's.
    pub hostname: Option<String>,
}

/// A parsed URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Where.
    pub place: Place,
    /// The export; empty for the server's default.
    pub export: String,
    /// With TLS, and then with nothing else.
    pub tls: Option<Tls>,
    /// How long commands wait for a server that is away before they fail.
    pub reconnect: Duration,
    /// How long a server may take for one command before its connection is given up.
    pub timeout: Duration,
    /// Connections, if the server can keep several in step.
    pub connections: usize,
    /// Bytes of writes kept until they are flushed, for a server that comes back without them.
    pub retain: u64,
}

/// Connections at most.
pub const MAX_CONNECTIONS: usize = 16;

const SCHEMES: [&str; 4] = ["nbd", "nbds", "nbd+unix", "nbds+unix"];

/// Whether that names an NBD export and not a file.
pub fn is_uri(path: &Path) -> bool {
    let Some(text) = path.to_str() else { return false };
    text.split_once("://").is_some_and(|(scheme, _)| SCHEMES.contains(&scheme))
}

/// Why a URI is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UriError(String);

fn wrong<T>(what: impl Into<String>) -> Result<T, UriError> {
    Err(UriError(what.into()))
}

impl Uri {
    /// Parses one.
    ///
    /// # Errors
    /// In words, the part that is wrong or not implemented.
    pub fn parse(text: &str) -> Result<Uri, UriError> {
        let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| SCHEMES.contains(scheme))
        else {
            return wrong("an NBD URI begins with nbd://, nbd+unix://, nbds:// or nbds+unix://");
        };
        if rest.contains('#') {
            return wrong("an NBD URI has no part after #");
        }
        let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, query)| (rest, query));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut uri = Uri {
            place: Place::Unix(PathBuf::new()),
            export: string(path)?,
            tls: scheme.starts_with("nbds").then(Tls::default),
            reconnect: Duration::from_secs(60),
            timeout: Duration::from_secs(60),
            connections: 1,
            retain: 64 << 20,
        };
        if uri.export.len() > MAX_STRING {
            return wrong(format!("an export's name has {MAX_STRING} bytes at most"));
        }
        let mut socket = None;
        let mut seen: Vec<&str> = Vec::new();
        for part in query.split('&').filter(|p| !p.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return wrong(format!("'{part}' has no value"));
            };
            if seen.contains(&key) {
                return wrong(format!("{key} is set twice"));
            }
            seen.push(key);
            match key {
                "socket" => socket = Some(PathBuf::from(OsString::from_vec(decode(value)?))),
                "reconnect" => uri.reconnect = seconds(key, value, 0)?,
                "timeout" => uri.timeout = seconds(key, value, 1)?,
                "connections" => match value.parse() {
                    Ok(n @ 1..=MAX_CONNECTIONS) => uri.connections = n,
                    _ => {
                        return wrong(format!(
                            "connections is a number from 1 to {MAX_CONNECTIONS}, and not '{value}'"
                        ));
                    }
                },
                "retain" => match crate::units::parse_size(value) {
                    Ok(bytes @ 0x10_0000..=0x1_0000_0000) => uri.retain = bytes,
                    _ => return wrong(format!("retain is a size from 1M to 4G, and not '{value}'")),
                },
                _ if key.starts_with("tls-") => match &mut uri.tls {
                    Some(tls) => tls.take(key, value)?,
                    None => return wrong(format!("{key} goes with nbds:// or nbds+unix://")),
                },
                _ => return wrong(format!("'{key}' is not known")),
            }
        }
        if authority.contains('@') {
            return wrong(
                "a user goes with pre-shared keys, which are not implemented: TLS is with certificates",
            );
        }
        uri.place = match (scheme, socket) {
            ("nbd" | "nbds", None) => tcp(authority)?,
            ("nbd" | "nbds", Some(_)) => return wrong(format!("a socket goes with {scheme}+unix://")),
            (_, None) => return wrong(format!("{scheme}:// needs ?socket=/path")),
            (_, Some(_)) if !authority.is_empty() => {
                return wrong(format!("{scheme}:// has three slashes and no host '{authority}'"));
            }
            (_, Some(path)) if !path.is_absolute() => {
                return wrong(format!("the socket '{}' is not an absolute path", path.display()));
            }
            (_, Some(path)) => Place::Unix(path),
        };
        Ok(uri)
    }
}

impl Tls {
    fn take(&mut self, key: &str, value: &str) -> Result<(), UriError> {
        match key {
            "tls-certificates" => {
                let dir = PathBuf::from(OsString::from_vec(decode(value)?));
                if !dir.is_absolute() {
                    return wrong(format!("{key}: '{}' is not an absolute path", dir.display()));
                }
                self.certificates = Some(dir);
                Ok(())
            }
            "tls-hostname" => match string(value)? {
                name if name.is_empty() => wrong(format!("{key} is empty")),
                name => {
                    self.hostname = Some(name);
                    Ok(())
                }
            },
            // Nothing else is done.
            "tls-type" if value == "x509" => Ok(()),
            "tls-type" | "tls-psk-file" => wrong(format!(
                "{key}={value}: TLS is with certificates (x509); pre-shared keys are not implemented"
            )),
            "tls-verify-peer" => {
                wrong(format!("{key}: the server's certificate is always verified; leave it out"))
            }
            _ => wrong(format!("'{key}' is not known")),
        }
    }
}

impl Uri {
    /// The name that the server's certificate has to have: of a Unix socket it is this host's.
    pub fn tls_name<'a>(&'a self, tls: &'a Tls) -> &'a str {
        match (&tls.hostname, &self.place) {
            (Some(name), _) => name,
            (None, Place::Tcp { host, .. }) => host,
            (None, Place::Unix(_)) => "localhost",
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&of(&self.place, &self.export, self.tls.is_some()))
    }
}

/// The URI of an export at that place, with TLS or without.
pub fn of(place: &Place, export: &str, tls: bool) -> String {
    let (export, s) = (encode(export.as_bytes()), if tls { "s" } else { "" });
    match place {
        Place::Tcp { host, port } if host.contains(':') => format!("nbd{s}://[{host}]:{port}/{export}"),
        Place::Tcp { host, port } => format!("nbd{s}://{host}:{port}/{export}"),
        Place::Unix(path) => {
            format!("nbd{s}+unix:///{export}?socket={}", encode(path.as_os_str().as_bytes()))
        }
    }
}

fn tcp(authority: &str) -> Result<Place, UriError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, port)) if port.starts_with(':') => (host, Some(&port[1..])),
            _ => return wrong(format!("'{authority}' is no host")),
        },
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let host = string(host)?;
    if let Some(c) = host.chars().find(|c| !(c.is_ascii_alphanumeric() || ".:_-".contains(*c))) {
        return wrong(format!("{c:?} is in no name of a host"));
    }
    let port = match port.filter(|p| !p.is_empty()) {
        None => Some(PORT),
        Some(port) => port.parse().ok().filter(|p| *p > 0),
    };
    match port {
        None => wrong(format!("'{authority}' has no port that there can be")),
        // As libnbd has it.
        Some(port) if host.is_empty() => Ok(Place::Tcp { host: "localhost".into(), port }),
        Some(port) => Ok(Place::Tcp { host, port }),
    }
}

fn seconds(key: &str, value: &str, least: u64) -> Result<Duration, UriError> {
    match value.parse::<u64>() {
        Ok(n) if (least..=86_400).contains(&n) => Ok(Duration::from_secs(n)),
        _ => wrong(format!("{key} is a number of seconds from {least} to 86400, and not '{value}'")),
    }
}

fn string(text: &str) -> Result<String, UriError> {
    let bytes = decode(text)?;
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => wrong(format!("'{text}' is no text")),
    }
}

fn decode(text: &str) -> Result<Vec<u8>, UriError> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let mut digit = || bytes.next().and_then(|d| char::from(d).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => return wrong(format!("'{text}' is not percent-encoded")),
        }
    }
    Ok(out)
}

/// Percent-encodes what does not stand for itself in a path or a query.
pub fn encode(bytes: &[u8]) -> String {
    let mut out = String::new();
    for b in bytes {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                out.push(char::from(*b))
            }
            _ => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_forms_of_the_specification_are_understood() {
        let tcp = |host: &str, port| Place::Tcp { host: host.into(), port };
        for (text, place, export) in [
            ("nbd://example.com", tcp("example.com", 10809), ""),
            ("nbd://example.com:10810/a%20b/c", tcp("example.com", 10810), "a b/c"),
            ("nbd://[::1]:1/", tcp("::1", 1), ""),
            ("nbd:///x", tcp("localhost", 10809), "x"),
            ("nbd+unix:///?socket=/run/nbd.sock", Place::Unix("/run/nbd.sock".into()), ""),
            ("nbd+unix:////x?socket=/run/a%26b", Place::Unix("/run/a&b".into()), "/x"),
        ] {
            let uri = Uri::parse(text).unwrap();
            assert_eq!((uri.place, uri.export.as_str()), (place, export), "{text}");
            assert!(is_uri(Path::new(text)));
        }
        let uri = Uri::parse("nbd://h/?reconnect=5&timeout=7&connections=4&retain=1M").unwrap();
        assert_eq!(
            (uri.reconnect.as_secs(), uri.timeout.as_secs(), uri.connections, uri.retain),
            (5, 7, 4, 1 << 20)
        );
        let uri =
            Uri::parse("nbds://store.example.com/vm1?tls-certificates=/etc/pki/a%20b&tls-hostname=store")
                .unwrap();
        let tls = uri.tls.clone().unwrap();
        assert_eq!(tls.certificates.as_deref(), Some(Path::new("/etc/pki/a b")));
        assert_eq!((uri.place.clone(), uri.tls_name(&tls)), (tcp("store.example.com", 10809), "store"));
        assert_eq!(uri.to_string(), "nbds://store.example.com:10809/vm1");
        for (text, name) in [
            ("nbds://h/?tls-type=x509", "h"),
            ("nbds://[::1]", "::1"),
            ("nbds+unix:///?socket=/x", "localhost"),
        ] {
            let uri = Uri::parse(text).unwrap();
            assert_eq!(uri.tls_name(uri.tls.as_ref().unwrap()), name);
            assert!(is_uri(Path::new(text)));
        }
        assert!(!is_uri(Path::new("/nbd://x")) && !is_uri(Path::new("http://x")));
    }

    #[test]
    fn what_is_wrong_or_not_there_is_named() {
        for (text, word) in [
            ("http://x", "begins with"),
            ("nbd://x?tls-certificates=/x", "tls-certificates goes with nbds"),
            ("nbd+unix:///?socket=/x&tls-hostname=y", "tls-hostname goes with nbds"),
            ("nbds://x?tls-certificates=x", "absolute"),
            ("nbds://x?tls-hostname=", "empty"),
            ("nbds://x?tls-psk-file=/x", "pre-shared keys are not implemented"),
            ("nbds://x?tls-type=psk", "pre-shared keys are not implemented"),
            ("nbds://x?tls-verify-peer=false", "always verified"),
            ("nbds://x?tls-colour=red", "tls-colour"),
            ("nbds+unix:///", "nbds+unix:// needs ?socket"),
            ("nbds://x?socket=/x", "nbds+unix"),
            ("nbd://x?socket=/x", "nbd+unix"),
            ("nbd+unix:///", "socket"),
            ("nbd+unix://x/?socket=/x", "three slashes"),
            ("nbd+unix:///?socket=x", "absolute"),
            ("nbd://x:0", "port"),
            ("nbd://x:70000", "port"),
            ("nbd://u@x", "user"),
            ("nbds://u@x", "user"),
            ("nbd://a%2Fb", "name of a host"),
            ("nbd://[a%5D]", "name of a host"),
            ("nbd://x/?colour=red", "colour"),
            ("nbd://x/?timeout", "no value"),
            ("nbd://x/?timeout=0", "timeout"),
            ("nbd://x/?connections=17", "connections"),
            ("nbd://x/?retain=5", "retain"),
            ("nbd://x/?retain=2M&retain=3M", "twice"),
            ("nbd://x/%zz", "percent"),
            ("nbd://x/%00", "no text"),
            ("nbd://x/#f", "#"),
        ] {
            let e = Uri::parse(text).unwrap_err().to_string();
            assert!(e.contains(word), "{text}: {e}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed_back(host in "[a-z.]{1,20}|::1", port in 1..u16::MAX, export in "\\PC{0,20}", unix: bool, tls: bool) {
            let place = match unix {
                true => Place::Unix(format!("/{export}").into()),
                false => Place::Tcp { host, port },
            };
            let uri = Uri { place, export, tls: tls.then(Tls::default), ..Uri::parse("nbd://x").unwrap() };
            prop_assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in "(nbd|nbds)(\\+unix)?://\\PC{0,60}") {
            let _ = Uri::parse(&text);
        }
    }
}
