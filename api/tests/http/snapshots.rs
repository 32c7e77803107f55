//! Snapshots that are of no use here: frozen again.

use super::server::{Server, zip};
use super::{FUNCTIONS, create, good, refused};

#[tokio::test]
async fn a_snapshot_that_this_machine_refuses_is_frozen_again_once() {
    let server = Server::start().await;
    let invoke = async |name: &str| {
        let path = format!("{FUNCTIONS}/{name}/invocations");
        server.send("POST", &path, &[], b"1").await
    };
    for name in ["foreign-at-first", "foreign-for-ever"] {
        let code = zip(&[(name, b"")]);
        server.post(FUNCTIONS, &create(name, &code)).await;
        server.deployed(name).await;
    }
    assert_eq!(server.machine.freezes(), 2);
    // All of them wait for the one freeze.
    let answers = futures_util::future::join_all((0..5).map(|_| invoke("foreign-at-first"))).await;
    for answer in answers {
        assert_eq!((answer.status, answer.text().as_str()), (200, "1"));
    }
    assert_eq!(server.machine.freezes(), 3);
    for _ in 0..3 {
        let answer = invoke("foreign-for-ever").await;
        let message = refused(&answer, 500, "ServiceException");
        assert!(message.contains("this host's cpu lacks"), "{message}");
    }
    assert_eq!(server.machine.freezes(), 4);
    // New code is another chance.
    let code = format!("{FUNCTIONS}/foreign-for-ever/code");
    let update = create("foreign-for-ever", &zip(&[("app.py", b"x = 1\n")]))["Code"].clone();
    server
        .send("PUT", &code, &[], update.to_string().as_bytes())
        .await;
    server.deployed("foreign-for-ever").await;
    assert_eq!(invoke("foreign-for-ever").await.text(), "1");
    server.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_was_changed_behind_the_gateway_is_frozen_again_from_the_stored_code() {
    let server = Server::start().await;
    for name in ["changed", "kept"] {
        server.post(FUNCTIONS, &good(name)).await;
        server.deployed(name).await;
    }
    let home = server.stop().await;
    let revision = Server::revisions_in(home.path(), "changed").pop().unwrap();
    let folder = home.path().join("functions/changed").join(revision);
    let snapshot = folder.join("snapshot.thaw");
    let frozen = std::fs::read(&snapshot).unwrap();
    std::fs::write(&snapshot, b"of an intruder").unwrap();

    let server = Server::start_in(home).await;
    server.until_healthy().await;
    for name in ["changed", "kept"] {
        let path = format!("{FUNCTIONS}/{name}/invocations");
        let answer = server.send("POST", &path, &[], b"7").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "7"));
    }
    assert_eq!(server.machine.freezes(), 1);
    assert_eq!(std::fs::read(&snapshot).unwrap(), frozen);
    server.stop().await;
}

#[tokio::test]
async fn a_snapshot_that_comes_to_harm_while_it_serves_is_frozen_again() {
    let server = Server::start().await;
    for name in ["harmed", "kept"] {
        server.post(FUNCTIONS, &good(name)).await;
        server.deployed(name).await;
    }
    let invoke = async |name: &str, event: &[u8]| {
        let path = format!("{FUNCTIONS}/{name}/invocations");
        server.send("POST", &path, &[], event).await
    };
    // A monitor that dies of itself is no reason to freeze.
    refused(
        &invoke("harmed", b"\"host\"").await,
        500,
        "ServiceException",
    );
    assert_eq!(server.machine.freezes(), 2);
    let revision = server.revisions("harmed").pop().unwrap();
    let snapshot = server.home().join("functions/harmed").join(revision);
    std::fs::remove_file(snapshot.join("snapshot.thaw")).unwrap();
    refused(
        &invoke("harmed", b"\"host\"").await,
        500,
        "ServiceException",
    );
    for name in ["harmed", "kept"] {
        let answer = invoke(name, b"7").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "7"));
    }
    assert_eq!(server.machine.freezes(), 3);
    server.stop().await;
}
