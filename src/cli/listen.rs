//! Where metrics are served beside their socket: a port that nobody but this host can reach.

use std::net::SocketAddr;

/// Parses `ADDR:PORT`. There is no password and no encryption, so that the address has to be this host's own.
///
/// # Errors
/// In words: it is none, or one that others can reach.
pub fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| "give an address and a port, as in 127.0.0.1:9967".to_owned())?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "{} can be reached by others, and metrics have no password: listen on 127.0.0.1:{} or [::1]:{1}, and put a proxy before it \
             that asks who they are",
            address.ip(),
            address.port()
        ));
    }
    if address.port() == 0 {
        return Err("give the port by its number, as in 127.0.0.1:9967".to_owned());
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_of_the_loopback_interface_is_taken_and_no_other() {
        for good in ["127.0.0.1:9967", "127.3.2.1:1", "[::1]:9967"] {
            assert_eq!(loopback(good).unwrap().to_string(), good);
        }
        for bad in ["", "9967", "localhost", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999"] {
            assert!(loopback(bad).unwrap_err().contains("as in 127.0.0.1:9967"), "{bad}");
        }
        for open in ["0.0.0.0:9967", "192.168.0.1:9967", "[::]:9967", "[::ffff:10.0.0.1]:9967"] {
            let words = loopback(open).unwrap_err();
            assert!(
                words.contains("can be reached by others") && words.contains("127.0.0.1:9967"),
                "{words}"
            );
        }
    }
}
