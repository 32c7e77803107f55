//! A gateway that speaks TLS, over the wire.

use std::fs;
use std::sync::Arc;

use tempfile::tempdir;
use thaw_api::tls::{Tls, client_config};
use thaw_api::{Gateway, GatewayConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::machine::Machine;

const REQUEST: &[u8] =
    b"GET /thaw/v1/functions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

async fn asked(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> String {
    let mut answer = Vec::new();
    if stream.write_all(REQUEST).await.is_ok() {
        let _ = stream.read_to_end(&mut answer).await;
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn requests_are_answered_over_tls_and_no_other_way() {
    let home = tempdir().unwrap();
    let (cert, key) = (home.path().join("cert"), home.path().join("key"));
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (vmm, agent) = ("thaw-vmm".into(), "thaw-agent".into());
    let mut config = GatewayConfig::new(home.path().to_owned(), listener, vmm, agent);
    config.tls = Some(Tls::load(&cert, &key).unwrap());
    let gateway = Gateway::start_on(config, Arc::new(Machine::new()))
        .await
        .unwrap();
    let (address, ready) = (gateway.address(), gateway.until_ready());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(gateway.run_until(async {
        let _ = stopped.await;
    }));
    ready.await;

    let connector = TlsConnector::from(Arc::new(client_config(&cert).unwrap()));
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let answer = asked(connector.connect(name, stream).await.unwrap()).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let plain = asked(TcpStream::connect(address).await.unwrap()).await;
    assert!(!plain.contains("HTTP/"), "{plain}");
    drop(stop);
    served.await.unwrap().unwrap();
}
