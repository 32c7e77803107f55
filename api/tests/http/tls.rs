//! A gateway that speaks TLS, over the wire.

use std::fs;
use std::sync::Arc;

use tempfile::tempdir;
use thaw_api::tls::{Tls, Trust};
use thaw_api::{Gateway, GatewayConfig};
use tokio::net::{TcpListener, TcpStream};

use crate::machine::Machine;

#[tokio::test]
async fn requests_are_answered_over_tls_and_a_connection_that_says_nothing_holds_up_nobody() {
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

    let client = Trust::load(Some(&cert)).unwrap().client(|http| http);
    let client = client.unwrap();
    let asked = |scheme: &str| {
        let url = format!("{scheme}://localhost:{}/thaw/v1/functions", address.port());
        client.get(url).send()
    };
    // Before anybody else, one who connects and says nothing.
    let silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(asked("https").await.unwrap().status(), 200);
    assert!(asked("http").await.is_err());
    drop(silent);
    drop(stop);
    served.await.unwrap().unwrap();
}
