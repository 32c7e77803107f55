//! The name that a TLS client asks for, read on its way. The bytes are a guest's; rustls takes them apart.

use thaw_network::DomainName;
use tokio_rustls::rustls::server::Acceptor;

/// Longest ClientHello, with its records' headers. Post-quantum key shares make them about 2 KiB long.
const HELLO_BYTES_MAX: usize = 16 * 1024;

/// There is no name to be seen: not TLS, no SNI, or no host name in it.
#[derive(Debug, PartialEq, Eq)]
pub struct NoName;

/// A ClientHello as it comes in.
#[derive(Default)]
pub struct Hello {
    acceptor: Acceptor,
    bytes: Vec<u8>,
}

impl Hello {
    /// The next bytes; the name when it is known.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Option<DomainName>, NoName> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > HELLO_BYTES_MAX {
            return Err(NoName);
        }
        while !bytes.is_empty() {
            self.acceptor.read_tls(&mut bytes).map_err(|_| NoName)?;
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(DomainName::parse);
                    return name.and_then(Result::ok).map(Some).ok_or(NoName);
                }
                Err(_) => return Err(NoName),
            }
        }
        Ok(None)
    }

    /// All that was pushed, for the server.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use tokio_rustls::rustls::pki_types::ServerName;
    use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};

    fn hello(name: &'static str) -> Vec<u8> {
        let config = ClientConfig::builder()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    /// The handshake message of a record, cut into records of `size` bytes.
    fn cut(hello: &[u8], size: usize) -> Vec<u8> {
        let records = hello[5..].chunks(size).map(|part| {
            let length = u16::try_from(part.len()).unwrap().to_be_bytes();
            [&hello[..3], &length, part].concat()
        });
        records.collect::<Vec<_>>().concat()
    }

    fn name_of(parts: &[&[u8]]) -> Result<Option<DomainName>, NoName> {
        let mut hello = Hello::default();
        for part in parts {
            match hello.push(part) {
                Ok(None) => {}
                found => return found,
            }
        }
        Ok(None)
    }

    #[test]
    fn the_name_is_found_however_the_hello_is_cut() {
        let bytes = hello("API.example.com");
        let expected = Ok(Some(DomainName::parse("api.example.com").unwrap()));
        assert_eq!(name_of(&[&bytes]), expected);
        let single: Vec<_> = bytes.chunks(1).collect();
        assert_eq!(name_of(&single), expected);
        assert_eq!(name_of(&[&cut(&bytes, 7)]), expected);
        assert_eq!(name_of(&[&bytes[..bytes.len() - 1]]), Ok(None));
        let mut whole = Hello::default();
        whole.push(&bytes[..9]).unwrap();
        whole.push(&bytes[9..]).unwrap();
        assert_eq!(whole.into_bytes(), bytes);
    }

    #[test]
    fn what_has_no_name_is_told_so() {
        assert_eq!(name_of(&[&hello("93.184.216.34")]), Err(NoName));
        assert_eq!(
            name_of(&[b"GET / HTTP/1.1\r\nHost: a.b\r\n\r\n"]),
            Err(NoName)
        );
        // A handshake message that claims to be 8 MiB long, byte by byte: bounded.
        let flood = [&[0x16, 3, 1, 0x40, 0, 1, 0x80, 0, 0][..], &[0; 16_379]].concat();
        assert_eq!(name_of(&[&flood, &flood]), Err(NoName));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]
        #[test]
        fn any_bytes_are_taken(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), framed: bool, cut in 1_usize..64,
        ) {
            let bytes = if framed {
                let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
                [&[0x16, 3, 1][..], &length, &bytes].concat()
            } else {
                bytes
            };
            let parts: Vec<_> = bytes.chunks(cut).collect();
            let _ = name_of(&parts);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn a_changed_hello_never_names_what_it_does_not_hold(at in 0_usize..220, byte: u8) {
            let mut bytes = hello("api.example.com");
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(Some(name)) = name_of(&[&bytes]) {
                let text = bytes.to_ascii_lowercase();
                let held = text.windows(name.as_str().len()).any(|part| part == name.as_str().as_bytes());
                prop_assert!(held, "{}", name);
            }
        }
    }
}
