//! `COMPATIBILITY.md` is what the routes and the clients' tests say: it is made here, and compared.
#![expect(clippy::unwrap_used, reason = "a failed test says where")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use thaw_api::lambda::routes::ROUTES;

const HEAD: &str = "# The Lambda API: what is served

Every operation of the service model `lambda/2015-03-31`, whether this gateway serves it, and which end-to-end test calls it with an
unmodified client (boto3 or the AWS CLI, `api/tests/e2e`). What is not served answers 400 `InvalidParameterValueException` and says so.

This file is made by `THAW_UPDATE=1 cargo test -p thaw-api --test compatibility`.

| operation | request | served | tested by |
|---|---|---|---|
";

/// Where a client's method is called: method to tests, in the order of the files.
fn calls(folder: &Path) -> BTreeMap<String, Vec<String>> {
    let mut files: Vec<_> = (fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "py"))
        .collect();
    files.sort();
    let mut calls: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files {
        let mut within = String::new();
        let text = fs::read_to_string(&path).unwrap();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("def ") {
                rest.split('(').next().unwrap().clone_into(&mut within);
            }
            for route in ROUTES {
                let method = snake(route.name);
                let by_boto = format!(".{method}(");
                let by_paginator = format!("get_paginator(\"{method}\")");
                let by_cli = format!("\"{}\"", method.replace('_', "-"));
                let is_called = line.contains(&by_boto)
                    || line.contains(&by_paginator)
                    || line.contains("aws(") && line.contains(&by_cli);
                let found = calls.entry(method).or_default();
                if is_called && within.starts_with("test_") && !found.contains(&within) {
                    found.push(within.clone());
                }
            }
        }
    }
    calls
}

/// `GetFunctionUrlConfig` as clients spell it: `get_function_url_config`.
fn snake(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(letter.to_ascii_lowercase());
    }
    text
}

fn table() -> String {
    let calls = calls(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e"));
    let mut text = HEAD.to_owned();
    for route in ROUTES {
        let tests = &calls[&snake(route.name)];
        let (served, test) = match (route.operation, tests.first()) {
            (None, _) => ("no", String::new()),
            (Some(_), Some(test)) => ("yes", format!("`{test}`")),
            (Some(_), None) => ("yes", String::new()),
        };
        writeln!(
            text,
            "| {} | {} `{}` | {served} | {test} |",
            route.name, route.method, route.path
        )
        .unwrap();
    }
    text
}

#[test]
fn the_table_is_what_the_routes_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("COMPATIBILITY.md");
    let made = table();
    if std::env::var_os("THAW_UPDATE").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == made,
        "COMPATIBILITY.md is out of date: run THAW_UPDATE=1 cargo test -p thaw-api --test compatibility"
    );
}

#[test]
fn every_operation_that_is_served_is_called_by_a_client() {
    let calls = calls(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e"));
    let untested: Vec<_> = (ROUTES.iter())
        .filter(|route| route.operation.is_some() && calls[&snake(route.name)].is_empty())
        .map(|route| route.name)
        .collect();
    assert_eq!(untested, Vec::<&str>::new());
}
