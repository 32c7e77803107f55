//! The gateway as a client that speaks TLS: records for destinations, and code out of a store. The servers shake hands for real.

use std::fs;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use axum::Router;
use axum::http::HeaderMap;
use axum::routing::{get, post};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};
use thaw_api::auth::signer::Signer;
use thaw_api::connections::{self, ConnectionLimits};
use thaw_api::s3::S3;
use thaw_api::tls::{Tls, Trust};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use super::server::{Server, zip};
use super::{FUNCTIONS, good, refused};

/// An authority of the test's own.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempdir().unwrap();
        fs::write(folder.path().join("ca"), issuer.as_ref().pem()).unwrap();
        Self { issuer, folder }
    }

    /// Whom someone trusts who was given this authority's file.
    fn trusted(&self) -> Trust {
        Trust::load(Some(&self.folder.path().join("ca"))).unwrap()
    }

    /// A certificate of this authority for `localhost` in `folder`, and its key.
    fn certify(&self, folder: &Path, year_until: i32) -> (PathBuf, PathBuf) {
        let (cert, key) = (folder.join("cert"), folder.join("key"));
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year_until, 1, 1);
        let own = KeyPair::generate().unwrap();
        fs::write(&cert, params.signed_by(&own, &self.issuer).unwrap().pem()).unwrap();
        fs::write(&key, own.serialize_pem()).unwrap();
        (cert, key)
    }

    /// Serves on a port of loopback, until the test ends.
    async fn serve(&self, year_until: i32, router: Router) -> Secure {
        let folder = tempdir().unwrap();
        let (cert, key) = self.certify(folder.path(), year_until);
        let tls = Tls::load(&cert, &key).unwrap();
        let behind = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = behind.local_addr().unwrap();
        let (limits, end) = (ConnectionLimits::default(), Default::default());
        let serving = connections::serve(behind, Some(tls.clone()), router, limits, end, pending());
        tokio::spawn(serving);
        let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = front.local_addr().unwrap().port();
        let ended: Arc<AtomicUsize> = Arc::default();
        let count = Arc::clone(&ended);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = front.accept().await {
                let mut server = TcpStream::connect(address).await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Secure {
            tls,
            port,
            ended,
            folder,
        }
    }
}

/// A server that speaks TLS with one client at a time.
struct Secure {
    tls: Arc<Tls>,
    port: u16,
    /// Connections that have ended.
    ended: Arc<AtomicUsize>,
    folder: TempDir,
}

impl Secure {
    fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }
}

/// A hook whose certificate is of another authority at first: the record waits, and is there once it is of ours.
#[tokio::test]
async fn a_record_waits_for_a_certificate_that_is_trusted() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let records: Arc<Mutex<Vec<Value>>> = Arc::default();
    let kept = Arc::clone(&records);
    let take = move |body: String| async move {
        let record = serde_json::from_str(&body).unwrap();
        kept.lock().unwrap().push(record);
    };
    let router = Router::new().route("/hook", post(take));
    let hook = other.serve(2090, router).await;
    let server = Server::shaped(|config| config.trust = ours.trusted()).await;
    server.post(FUNCTIONS, &good("f")).await;
    server.deployed("f").await;
    let to = json!({"DestinationConfig": {"OnSuccess": {"Destination": format!("{}/hook", hook.url())}}});
    let path = "/2019-09-25/functions/f/event-invoke-config";
    let to = to.to_string();
    let configured = server.send("PUT", path, &[], to.as_bytes()).await;
    assert_eq!(configured.status, 200, "{}", configured.text());
    let kind = [("X-Amz-Invocation-Type", "Event")];
    let path = format!("{FUNCTIONS}/f/invocations");
    assert_eq!(server.send("POST", &path, &kind, b"7").await.status, 202);
    let refusals = || hook.ended.load(Ordering::Relaxed);
    server.until(|_| refusals() > 0).await;
    assert!(records.lock().unwrap().is_empty());
    ours.certify(hook.folder.path(), 2090);
    hook.tls.reload().unwrap();
    server.until(|_| !records.lock().unwrap().is_empty()).await;
    assert_eq!(records.lock().unwrap()[0]["requestPayload"], 7);
    server.stop().await;
}

#[tokio::test]
async fn code_comes_out_of_a_store_whose_certificate_is_trusted_and_out_of_no_other() {
    let [ours, other, namesake] = ["ours", "other", "ours"].map(Authority::new);
    let code = zip(&[("app.py", b"x = 1\n")]);
    let router = || {
        let (code, port) = (code.clone(), Arc::new(OnceLock::new()));
        let host = Arc::clone(&port);
        let give = move |headers: HeaderMap| async move {
            // What is signed is what the store sees: the host is the URL's.
            assert_eq!(headers["host"], *host.get().unwrap());
            code
        };
        (port, Router::new().route("/code/app.zip", get(give)))
    };
    let mut body = good("f");
    body["Code"] = json!({"S3Bucket": "code", "S3Key": "app.zip"});
    for (authority, year_until, host, why) in [
        (&ours, 2090, "localhost", None),
        (&other, 2090, "localhost", Some("with --ca or THAW_CA")),
        (&namesake, 2090, "localhost", Some("with --ca or THAW_CA")),
        (&ours, 2020, "localhost", Some("certificate expired")),
        (&ours, 2090, "127.0.0.1", Some("not valid for name")),
    ] {
        let (expected, router) = router();
        let store = authority.serve(year_until, router).await;
        expected.set(format!("localhost:{}", store.port)).unwrap();
        let signer = Signer {
            access_key_id: "AKIDEXAMPLE".to_owned(),
            secret: "secret".to_owned(),
            region: "us-east-1".to_owned(),
        };
        let endpoint = format!("https://{host}:{}", store.port);
        let store = S3::new(&endpoint, signer, &ours.trusted()).unwrap();
        let server = Server::shaped(|config| config.s3 = Some(store)).await;
        let answer = server.post(FUNCTIONS, &body).await;
        match why {
            None => assert_eq!(answer.status, 201, "{}", answer.text()),
            Some(why) => {
                let message = refused(&answer, 500, "ServiceException");
                assert!(message.contains(why), "{message}");
                assert!(message.contains(&endpoint), "{message}");
            }
        }
        server.stop().await;
    }
}
