//! Both loops against a real HTTP server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::{get, post};

use crate::open_loop::Arrivals;
use crate::report::{Load, Report};
use crate::request::{Sender, Target};
use crate::{closed_loop, open_loop};

async fn serve(router: Router) -> Target {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    Target {
        url: format!("http://{address}/").parse().unwrap(),
        body: None,
        expect: None,
        timeout: Duration::from_secs(20),
    }
}

async fn closed(target: Target) -> Report {
    let plan = closed_loop::Plan {
        clients: 4,
        requests_per_client: 5,
    };
    closed_loop::run(plan, &Sender::new(target).unwrap())
        .await
        .unwrap()
}

fn open_plan(rate: f64, requests: u64) -> open_loop::Plan {
    open_loop::Plan {
        rate,
        arrivals: Arrivals::Constant,
        seed: 1,
        requests,
        in_flight_max: 1000,
    }
}

#[tokio::test]
async fn every_client_sends_all_its_requests() {
    let seen = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&seen);
    let route = get(move || async move {
        counter.fetch_add(1, Ordering::SeqCst);
        "fine"
    });
    let report = closed(serve(Router::new().route("/", route)).await).await;
    assert_eq!((report.good, seen.load(Ordering::SeqCst)), (20, 20));
    assert!(report.errors.is_empty());
    assert_eq!(report.load, Load::Closed { clients: 4 });
}

#[tokio::test]
async fn failures_are_counted_by_kind_and_not_timed_and_the_first_is_told() {
    let route = get(|| async { (StatusCode::TOO_MANY_REQUESTS, "x".repeat(10_000)) });
    let report = closed(serve(Router::new().route("/", route)).await).await;
    assert_eq!((report.good, report.bad), (0, 20));
    assert!(report.starts.is_empty());
    let error = &report.errors["status 429 Too Many Requests"];
    assert_eq!(
        (error.count, error.sample.as_str()),
        (20, "x".repeat(500).as_str())
    );
}

#[tokio::test]
async fn a_wrong_answer_and_a_functions_error_are_errors_of_their_own() {
    let count = Arc::new(AtomicU32::new(0));
    let route = get(move || async move {
        match count.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => ([("x-amz-function-error", "Unhandled")], "yes, it failed"),
            _ => ([("x-other", "")], "no"),
        }
    });
    let target = serve(Router::new().route("/", route)).await;
    let expecting = Target {
        expect: Some("yes".into()),
        ..target
    };
    let report = closed(expecting).await;
    let counts: BTreeMap<_, _> = report
        .errors
        .iter()
        .map(|(kind, error)| (kind.as_str(), (error.count, error.sample.as_str())))
        .collect();
    assert_eq!(
        counts,
        BTreeMap::from([
            ("function error", (10, "yes, it failed")),
            ("unexpected answer", (10, "no"))
        ])
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error_that_says_so() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = Target {
        url: format!("http://{}/", listener.local_addr().unwrap())
            .parse()
            .unwrap(),
        body: None,
        expect: None,
        timeout: Duration::from_secs(20),
    };
    drop(listener);
    let report = closed(target).await;
    let error = &report.errors["cannot connect"];
    assert_eq!(error.count, 20);
    assert!(error.sample.contains("refused"), "{}", error.sample);
}

#[tokio::test]
async fn answers_are_split_by_how_their_sandbox_was_started() {
    let count = Arc::new(AtomicU32::new(0));
    let route = post(move |body: String| async move {
        let start = match count.fetch_add(1, Ordering::SeqCst) {
            0 => "cold",
            n if n % 4 == 0 => "claimed",
            _ => "rewound",
        };
        ([("x-thaw-start", start)], body)
    });
    let target = serve(Router::new().route("/", route)).await;
    let posting = Target {
        body: Some("hello".into()),
        expect: Some("hello".into()),
        ..target
    };
    let report = closed(posting).await;
    assert!(report.errors.is_empty(), "{:?}", report.errors);
    let counts: Vec<_> = report
        .starts
        .iter()
        .map(|(start, figures)| (*start, figures.count))
        .collect();
    assert_eq!(counts, [("claimed", 4), ("cold", 1), ("rewound", 15)]);
    let mut log = Vec::new();
    report.write_percentiles(&mut log).unwrap();
    let log = String::from_utf8(log).unwrap();
    assert_eq!(log.matches("# start: ").count(), 3, "{log}");
    assert_eq!(
        log.matches("1.000000000000         15\n").count(),
        1,
        "{log}"
    );
}

/// One request at a time, and the first one takes long: what a stall is like.
async fn stalling(stall: Duration) -> Target {
    let turn = Arc::new(tokio::sync::Mutex::new(0));
    let route = get(move || async move {
        let mut served = turn.lock().await;
        *served += 1;
        if *served == 1 {
            tokio::time::sleep(stall).await;
        }
        "fine"
    });
    serve(Router::new().route("/", route)).await
}

#[tokio::test]
async fn a_stall_is_felt_by_all_that_wait_behind_it_in_the_open_loop_alone() {
    let stall = Duration::from_millis(1000);
    let plan = closed_loop::Plan {
        clients: 1,
        requests_per_client: 100,
    };
    let target = stalling(stall).await;
    let closed = closed_loop::run(plan, &Sender::new(target).unwrap())
        .await
        .unwrap();
    let target = stalling(stall).await;
    let open = open_loop::run(open_plan(100.0, 100), &Sender::new(target).unwrap())
        .await
        .unwrap();
    assert_eq!((closed.good, open.good), (100, 100));
    // The closed loop's client waited for the one slow answer and sent nothing meanwhile: 1 of 100 is slow.
    assert!(
        closed.service.p50_ms < 100.0 && closed.service.max_ms >= 1000.0,
        "{closed}"
    );
    // In the open loop all requests of that second waited: half of them longer than half of it.
    let felt = open.starts["untold"];
    assert!(felt.p50_ms > 300.0 && felt.max_ms >= 1000.0, "{open}");
}

#[tokio::test]
async fn latency_counts_from_the_intended_moment_when_the_generator_is_held_up() {
    let target = stalling(Duration::from_millis(1000)).await;
    let narrow = open_loop::Plan {
        in_flight_max: 1,
        ..open_plan(100.0, 100)
    };
    let report = open_loop::run(narrow, &Sender::new(target).unwrap())
        .await
        .unwrap();
    assert_eq!(report.good, 100);
    // Only one request was on its way at a time, so the server was fast for all but one; but the others were due long before.
    assert!(report.service.p50_ms < 100.0, "{report}");
    assert!(report.starts["untold"].p50_ms > 300.0, "{report}");
    assert!(report.lag.p50_ms > 300.0, "{report}");
}

#[tokio::test]
async fn the_rate_is_kept_by_both_arrivals() {
    let target = serve(Router::new().route("/", get(|| async { "fine" }))).await;
    let sender = Sender::new(target).unwrap();
    for arrivals in [Arrivals::Constant, Arrivals::Poisson] {
        let plan = open_loop::Plan {
            arrivals,
            ..open_plan(500.0, 500)
        };
        let report = open_loop::run(plan, &sender).await.unwrap();
        assert_eq!(report.good, 500, "{report}");
        assert!((0.8..1.5).contains(&report.seconds), "{report}");
    }
}
