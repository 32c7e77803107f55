//! The real thing: namespaces, taps, nftables and `thaw-egress`, with a TCP/IP stack in user space for a guest and servers in a world of the test's own.
//! Each test runs itself again in namespaces of its own, as root or by a user namespace; where the kernel cannot do this, it fails.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

#[path = "egress/guest.rs"]
mod guest;
#[path = "egress/world.rs"]
mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::End;
use hickory_proto::op::ResponseCode;
use thaw_network::{Denial, EgressError, GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, Reason};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};
use world::{Asked, ECHO, LIMIT, METADATA, Machine, OTHER, OWN, PRIVATE, SERVER, inside, run};

fn denial(what: impl ToString, reason: Reason) -> Denial {
    Denial {
        what: what.to_string(),
        reason,
    }
}

#[test]
fn what_a_cidr_allows_is_carried_and_the_rest_is_refused() {
    if !inside("what_a_cidr_allows_is_carried_and_the_rest_is_refused") {
        return;
    }
    let machine = Machine::start(1);
    let policy = format!(r#"{{"allow": [{{"cidr": "{SERVER}/32", "ports": [{ECHO}]}}]}}"#);
    let (slot, mut guest) = machine.guest(&policy);
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let handle = guest.begin(SERVER, ECHO);
    let (read, end) = guest.talk(handle, &sent, sent.len());
    assert!(read == sent && end == End::Open);
    assert!(guest.is_refused(SERVER, 80));
    assert!(guest.is_refused(OTHER, ECHO));
    assert!(guest.is_refused(PRIVATE, ECHO));
    assert!(
        guest.is_refused(GATEWAY_ADDRESS, 1),
        "the relay's own listener"
    );
    assert_eq!(
        guest.resolve("api.example.com."),
        Err(ResponseCode::NXDomain)
    );
    let report = machine.report(&slot);
    assert_eq!((report.connections, report.open, report.denied), (1, 1, 5));
    assert_eq!(
        (report.sent_bytes, report.received_bytes),
        (300_000, 300_000)
    );
    let expected = [
        denial(format!("{SERVER}:80"), Reason::NotAllowed),
        denial(format!("{OTHER}:{ECHO}"), Reason::NotAllowed),
        denial(format!("{PRIVATE}:{ECHO}"), Reason::Private),
        denial(format!("{GATEWAY_ADDRESS}:1"), Reason::AlwaysBlocked),
        denial("api.example.com", Reason::NotAllowed),
    ];
    assert_eq!(report.denials, expected);
    // What is given back is ended: the guest's connection, too, and every way out.
    let report = machine
        .tokio
        .block_on(machine.egress.give_back(slot))
        .unwrap();
    assert_eq!(report.denied, 5);
    assert_ne!(guest.talk(handle, b"", usize::MAX).1, End::Open);
    assert!(guest.is_refused(SERVER, ECHO));
}

#[test]
fn metadata_and_the_machines_own_addresses_are_blocked_though_everything_is_allowed() {
    if !inside("metadata_and_the_machines_own_addresses_are_blocked_though_everything_is_allowed") {
        return;
    }
    let machine = Machine::start(1);
    let (slot, mut guest) = machine.guest(r#"{"allow": ["internet", {"cidr": "0.0.0.0/0"}]}"#);
    assert!(guest.is_refused(METADATA, 80));
    assert!(guest.is_refused(OWN, 80));
    assert_eq!(
        guest.resolve("metadata.example.com."),
        Err(ResponseCode::NXDomain)
    );
    assert_eq!(guest.ask(SERVER, ECHO, b"hello", 5).0, b"hello");
    assert_eq!(guest.ask(PRIVATE, ECHO, b"hello", 5).0, b"hello");
    let expected = [
        denial(format!("{METADATA}:80"), Reason::AlwaysBlocked),
        denial(format!("{OWN}:80"), Reason::AlwaysBlocked),
        denial("metadata.example.com", Reason::Rebinding),
    ];
    assert_eq!(machine.report(&slot).denials, expected);
}

#[test]
fn frames_that_are_not_the_guests_own_are_dropped_and_it_sees_no_ipv6() {
    if !inside("frames_that_are_not_the_guests_own_are_dropped_and_it_sees_no_ipv6") {
        return;
    }
    let machine = Machine::start(1);
    let (slot, mut guest) = machine.guest(r#"{"allow": ["internet"]}"#);
    assert_eq!(guest.resolve("api.example.com."), Ok(vec![SERVER]));
    let other = GUEST_MAC.map(|byte| byte ^ 8);
    guest.query_from(other, GUEST_ADDRESS, "api.example.com.");
    guest.query_from(GUEST_MAC, PRIVATE, "api.example.com.");
    guest.query_from(GUEST_MAC, GATEWAY_ADDRESS, "api.example.com.");
    // Frames keep their order: when this one is answered, the others were dropped.
    guest.query_from(GUEST_MAC, GUEST_ADDRESS, "other.example.com.");
    guest.until("the answer", |_| {
        (machine.report(&slot).queries >= 2).then_some(())
    });
    assert_eq!(guest.resolve("api.example.com."), Ok(vec![SERVER]));
    assert_eq!(machine.report(&slot).queries, 3);
    // ARP and IPv4.
    assert_eq!(
        guest.kinds_seen().into_iter().collect::<Vec<_>>(),
        [[8, 0], [8, 6]]
    );
}

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

fn get(host: &str) -> String {
    format!(
        "GET /page HTTP/1.1\r\nHost: {host}\r\nAuthorization: guest\r\nConnection: close\r\n\r\n"
    )
}

#[test]
fn a_domain_opens_what_was_resolved_and_only_for_its_name() {
    if !inside("a_domain_opens_what_was_resolved_and_only_for_its_name") {
        return;
    }
    let machine = Machine::start(1);
    let (slot, mut guest) = machine.guest(r#"{"allow": [{"domain": "*.example.com"}]}"#);
    let tls = hello("api.example.com");
    assert!(
        guest.is_refused(SERVER, 443) && guest.is_refused(SERVER, ECHO),
        "before it is resolved"
    );
    assert_eq!(guest.resolve("API.example.com."), Ok(vec![SERVER]));
    assert_eq!(guest.resolve("hosts.example.com."), Ok(vec![OTHER]));
    assert_eq!(
        guest.resolve("none.example.com."),
        Err(ResponseCode::NXDomain)
    );
    assert_eq!(guest.ask(SERVER, ECHO, b"hello", 5).0, b"hello");
    // A handshake record of the server's.
    assert_eq!(guest.ask(SERVER, 443, &tls, 1).0[..2], [0x16, 3]);
    assert!(
        guest
            .get(SERVER, &get("api.example.com"))
            .ends_with("served /page")
    );

    let before = machine.report(&slot).denied;
    assert_eq!(
        guest.ask(SERVER, 443, &hello("shared.example.org"), 1),
        (vec![], End::Reset)
    );
    // Another name that is allowed, but has another address.
    assert_eq!(
        guest.ask(SERVER, 443, &hello("hosts.example.com"), 1),
        (vec![], End::Reset)
    );
    assert_eq!(
        guest.ask(
            SERVER,
            443,
            b"no TLS at all, but long enough for a header",
            1
        ),
        (vec![], End::Reset)
    );
    let refused = guest.get(SERVER, &get("shared.example.org"));
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    assert_eq!(
        guest.resolve("shared.example.org."),
        Err(ResponseCode::NXDomain)
    );
    assert_eq!(
        guest.resolve("rebinding.example.com."),
        Err(ResponseCode::NXDomain)
    );
    assert!(guest.is_refused(PRIVATE, 443));
    let report = machine.report(&slot);
    assert_eq!(report.denied, before + 7);
    for expected in [
        denial("shared.example.org", Reason::OtherName),
        denial("hosts.example.com", Reason::OtherName),
        denial(format!("{SERVER}:443"), Reason::NoName),
        denial("shared.example.org", Reason::NotAllowed),
        denial("rebinding.example.com", Reason::Rebinding),
        denial(format!("{PRIVATE}:443"), Reason::Private),
    ] {
        assert!(
            report.denials.contains(&expected),
            "{expected}: {:?}",
            report.denials
        );
    }
    let asked = machine.asked.lock().unwrap();
    let expected = Asked {
        tls: false,
        host: "api.example.com".into(),
        authorization: vec!["guest".into()],
    };
    assert_eq!(*asked, [expected]);
}

/// The maker's process id: the one child of `egress`.
fn maker(egress: u32) -> u32 {
    let children = format!("/proc/{egress}/task/{egress}/children");
    let children = std::fs::read_to_string(children).unwrap();
    children.trim().parse().unwrap()
}

#[test]
fn a_burst_of_a_hundred_takes_nothing_of_who_configures_networks() {
    if !inside("a_burst_of_a_hundred_takes_nothing_of_who_configures_networks") {
        return;
    }
    const BURST: usize = 100;
    let machine = Machine::start(BURST);
    let began = Instant::now();
    machine.wait_ready(BURST);
    println!("{BURST} slots made in {:?}", began.elapsed());
    // The maker is the only process that speaks to the kernel about networks; here it is stopped.
    let maker = maker(machine.egress.pid());
    run("kill", &format!("-STOP {maker}"));
    let policy = serde_json::from_str(r#"{"allow": ["internet"]}"#).unwrap();
    let began = Instant::now();
    let mut taken = machine.tokio.block_on(async {
        let takes: Vec<_> = (0..BURST)
            .map(|_| {
                let (egress, policy): (_, thaw_network::Policy) =
                    (machine.egress.clone(), Clone::clone(&policy));
                tokio::spawn(async move {
                    let began = Instant::now();
                    let taken = egress.take(&policy, LIMIT).await.unwrap();
                    (began.elapsed(), taken)
                })
            })
            .collect();
        let mut taken = Vec::new();
        for take in takes {
            taken.push(take.await.unwrap());
        }
        taken
    });
    taken.sort_by_key(|(took, _)| *took);
    println!(
        "{BURST} taken in {:?}, median {:?}",
        began.elapsed(),
        taken[BURST / 2].0
    );
    let status = machine.tokio.block_on(machine.egress.status()).unwrap();
    assert_eq!(
        (status.ready, status.taken, status.made),
        (0, BURST, BURST as u64)
    );
    // They work, and with the same addresses inside: two at once, each with its own answer.
    let mut guests: Vec<_> = taken
        .drain(..2)
        .map(|(_, (slot, tap))| (slot, guest::Guest::new(tap)))
        .collect();
    let handles: Vec<_> = guests
        .iter_mut()
        .map(|(_, guest)| guest.begin(SERVER, ECHO))
        .collect();
    for (said, ((_, guest), handle)) in [b"one", b"two"].iter().zip(guests.iter_mut().zip(&handles))
    {
        assert_eq!(guest.talk(*handle, *said, 3), (said.to_vec(), End::Open));
    }
    // The next one is one that is not made yet.
    let patience = Duration::from_millis(50);
    let refused = machine
        .tokio
        .block_on(machine.egress.take(&policy, patience));
    assert!(matches!(refused, Err(EgressError::Silent(_))));
    run("kill", &format!("-CONT {maker}"));
    machine.wait_ready(BURST);
}

#[test]
fn a_flood_of_connections_is_bounded_and_ends_with_itself() {
    if !inside("a_flood_of_connections_is_bounded_and_ends_with_itself") {
        return;
    }
    let machine = Machine::start(1);
    let (slot, mut guest) = machine.guest(r#"{"allow": ["internet"], "connections_max": 4}"#);
    let handles: Vec<_> = (0..40).map(|_| guest.begin(SERVER, ECHO)).collect();
    let ends: Vec<_> = handles
        .iter()
        .map(|handle| guest.talk(*handle, b"x", 1))
        .collect();
    let open = ends
        .iter()
        .filter(|(read, end)| read == b"x" && *end == End::Open)
        .count();
    let reset = ends
        .iter()
        .filter(|(read, end)| read.is_empty() && *end == End::Reset)
        .count();
    assert_eq!((open, reset), (4, 36));
    let report = machine.report(&slot);
    assert_eq!((report.open, report.denied), (4, 36));
    assert_eq!(
        report.denials,
        [denial(format!("{SERVER}:{ECHO}"), Reason::TooMany)]
    );
    for handle in handles {
        guest.abort(handle);
    }
    while machine.report(&slot).open > 0 {
        guest.until("nothing", |_| Some(()));
    }
    assert_eq!(guest.ask(SERVER, ECHO, b"again", 5).0, b"again");
}

#[test]
fn a_bandwidth_holds_back_what_passes() {
    if !inside("a_bandwidth_holds_back_what_passes") {
        return;
    }
    let machine = Machine::start(1);
    let (_slot, mut guest) =
        machine.guest(r#"{"allow": ["internet"], "bandwidth_bytes_per_second": 65536}"#);
    let began = Instant::now();
    let sent = vec![7; 96 * 1024];
    let (read, _) = guest.ask(SERVER, ECHO, &sent, sent.len());
    assert!(read == sent);
    // 16 KiB at once and a chunk of 8: what is left takes over a second at least, however slow the machine.
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_secret_reaches_its_server_over_tls_and_never_the_guest() {
    if !inside("a_secret_reaches_its_server_over_tls_and_never_the_guest") {
        return;
    }
    const SECRET: &str = "Bearer 0f4c-very-secret";
    let machine = Machine::start(1);
    let policy = |ca: &str| {
        serde_json::json!({"secrets": [
            {"host": "api.example.com", "header": "authorization", "value": SECRET, "ca": ca},
        ]})
        .to_string()
    };
    let (slot, mut guest) = machine.guest(&policy(&machine.ca));
    assert!(guest.is_refused(SERVER, 80), "not resolved yet");
    assert_eq!(guest.resolve("api.example.com."), Ok(vec![SERVER]));
    for host in ["api.example.com", "API.example.com:80"] {
        let answer = guest.get(SERVER, &get(host));
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("served /page"),
            "{answer}"
        );
    }
    let with_secret = Asked {
        tls: true,
        host: "api.example.com".into(),
        authorization: vec![SECRET.into()],
    };
    assert_eq!(
        *machine.asked.lock().unwrap(),
        [with_secret.clone(), with_secret]
    );
    // Neither another host at that address nor another way to this one.
    assert!(
        guest
            .get(SERVER, &get("shared.example.org"))
            .starts_with("HTTP/1.1 403")
    );
    assert!(guest.is_refused(SERVER, 443), "no TLS");
    assert!(!guest.has_seen(b"0f4c") && guest.has_seen(b"served /page"));
    assert_eq!(machine.report(&slot).connections, 3);

    // The same over TLS, which ends in the relay for who trusts its authority, and for the host alone.
    let (slot, mut guest) = machine.guest(&policy(&machine.ca));
    guest.resolve("api.example.com.").unwrap();
    let api = (SERVER, "api.example.com");
    let page = get("api.example.com");
    let answer = guest.get_tls(api, &page, &machine.authority, "http/1.1");
    let answer = answer.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("served /page"),
        "{answer}"
    );
    assert_eq!(machine.asked.lock().unwrap().len(), 3);
    assert_eq!(machine.asked.lock().unwrap()[2].authorization, [SECRET]);
    let other = get("shared.example.org");
    let answer = guest.get_tls(api, &other, &machine.authority, "http/1.1");
    assert!(answer.unwrap().starts_with("HTTP/1.1 403"));
    let shared = (SERVER, "shared.example.org");
    let refused = guest.get_tls(shared, &other, &machine.authority, "http/1.1");
    assert_eq!(refused, Err("reset".to_owned()));
    let untrusting = guest.get_tls(api, &page, &machine.ca, "http/1.1");
    assert!(untrusting.unwrap_err().contains("UnknownIssuer"));
    let newer = guest.get_tls(api, &page, &machine.authority, "h2");
    assert!(newer.unwrap_err().contains("NoApplicationProtocol"));
    assert!(!guest.has_seen(b"0f4c"));
    let denials = [
        denial("shared.example.org", Reason::OtherName),
        denial("https://api.example.com", Reason::Untrusted),
    ];
    let began = Instant::now();
    while !denials
        .iter()
        .all(|one| machine.report(&slot).denials.contains(one))
    {
        assert!(began.elapsed() < LIMIT, "{:?}", machine.report(&slot));
    }

    // An authority that the server's certificate is not of: nothing is told.
    let stranger = rcgen::generate_simple_self_signed(vec!["api.example.com".to_owned()]).unwrap();
    let (slot, mut guest) = machine.guest(&policy(&stranger.cert.pem()));
    guest.resolve("api.example.com.").unwrap();
    assert!(
        guest
            .get(SERVER, &get("api.example.com"))
            .starts_with("HTTP/1.1 502")
    );
    assert_eq!(machine.asked.lock().unwrap().len(), 3);
    assert_eq!(
        machine.report(&slot).denials,
        [denial("https://api.example.com", Reason::Unreachable)]
    );
    let nonsense = serde_json::from_str(&policy("no certificate")).unwrap();
    let refused = machine
        .tokio
        .block_on(machine.egress.take(&nonsense, LIMIT));
    assert!(matches!(refused, Err(EgressError::Refused(why)) if why.contains("api.example.com")));
}

/// Waits until no process of these is left, nor anything that could keep a namespace of theirs.
fn gone(pids: &[u32]) {
    let began = Instant::now();
    let is_alive = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        status.is_ok_and(|status| !status.contains(") Z "))
    };
    while pids.iter().any(is_alive) {
        assert!(began.elapsed() < LIMIT, "{pids:?} live on");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(" nsfs "), "{mounts}");
    let links = std::process::Command::new("ip")
        .args(["-o", "link"])
        .output()
        .unwrap();
    assert!(!String::from_utf8(links.stdout).unwrap().contains("tap"));
}

#[test]
fn a_killed_egress_leaves_nothing_and_is_told() {
    if !inside("a_killed_egress_leaves_nothing_and_is_told") {
        return;
    }
    let machine = Machine::start(2);
    machine.wait_ready(2);
    let (_slot, mut guest) = machine.guest(r#"{"allow": ["internet"]}"#);
    let handle = guest.begin(SERVER, ECHO);
    assert_eq!(guest.talk(handle, b"hello", 5).0, b"hello");
    let pids = [machine.egress.pid(), maker(machine.egress.pid())];
    run("kill", &format!("-KILL {}", pids[0]));
    gone(&pids);
    let words = machine.tokio.block_on(machine.egress.ended());
    assert!(words.ends_with("signal: 9 (SIGKILL)"), "{words}");
    let policy = serde_json::from_str("{}").unwrap();
    let refused = machine.tokio.block_on(machine.egress.take(&policy, LIMIT));
    assert!(matches!(refused, Err(EgressError::Ended(_))), "{refused:?}");
}

#[test]
fn a_killed_gateway_takes_its_egress_along() {
    const GATEWAY: &str = "THAW_TEST_GATEWAY";
    if !inside("a_killed_gateway_takes_its_egress_along") {
        return;
    }
    if std::env::var_os(GATEWAY).is_some() {
        let machine = Machine::start(2);
        machine.wait_ready(2);
        println!(
            "\npids {} {}",
            machine.egress.pid(),
            maker(machine.egress.pid())
        );
        loop {
            std::thread::park();
        }
    }
    let mut gateway = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_killed_gateway_takes_its_egress_along",
            "--nocapture",
        ])
        .env(GATEWAY, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(gateway.stdout.take().unwrap()));
    let pids: Vec<u32> = loop {
        let line = lines.next().unwrap().unwrap();
        if let Some(pids) = line.strip_prefix("pids ") {
            break pids.split(' ').map(|pid| pid.parse().unwrap()).collect();
        }
    };
    gateway.kill().unwrap();
    gateway.wait().unwrap();
    gone(&pids);
}

#[test]
fn no_root_is_needed_and_the_relay_has_no_right_left() {
    if !inside("no_root_is_needed_and_the_relay_has_no_right_left") {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let program = files.path().join("thaw-egress");
    std::fs::copy(env!("CARGO_BIN_EXE_thaw-egress"), &program).unwrap();
    let mut started = program.clone();
    // Inside a user namespace of an ordinary user this is so already.
    if std::fs::read_to_string("/proc/self/uid_map")
        .unwrap()
        .contains("4294967295")
    {
        started = files.path().join("as-nobody");
        let script = format!(
            "#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs {} \"$@\"\n",
            program.display()
        );
        std::fs::write(&started, script).unwrap();
        // As udev leaves it; some machines have it for root alone.
        run("mount", "-t tmpfs none /dev/net");
        run("mknod", "-m 666 /dev/net/tun c 10 200");
    }
    run("chmod", &format!("-R 755 {}", files.path().display()));
    let machine = Machine::start_with(started, 1);
    let (_slot, mut guest) = machine.guest(r#"{"allow": [{"domain": "api.example.com"}]}"#);
    assert_eq!(guest.resolve("api.example.com."), Ok(vec![SERVER]));
    assert_eq!(guest.ask(SERVER, ECHO, b"hello", 5).0, b"hello");
    rights_of(machine.egress.pid());
}

#[test]
fn the_relay_of_a_gateway_that_is_root_has_no_right_left() {
    if !inside("the_relay_of_a_gateway_that_is_root_has_no_right_left") {
        return;
    }
    let machine = Machine::start(1);
    rights_of(machine.egress.pid());
}

/// No capability, none to be gained, and not root.
fn rights_of(pid: u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].trim().to_owned()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    if std::fs::read_to_string("/proc/self/uid_map")
        .unwrap()
        .contains("4294967295")
    {
        assert_eq!(field("Uid:"), "65534\t65534\t65534\t65534");
    }
}
