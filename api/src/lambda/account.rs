//! GetAccountSettings: limits of all functions together.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{AccountLimit, AccountSettings, AccountUsage};

use super::validate::ZIP_BYTES_MAX;
use super::{Answer, json};
use crate::code::UNZIPPED_BYTES_MAX;
use crate::state::App;

/// Invocations of all functions at once, as AWS gives a new account; what runs at once is this machine's to bear.
pub(super) const CONCURRENCY: u64 = 1000;

/// What no function may reserve of it.
pub(super) const UNRESERVED_MIN: u64 = 100;

/// Bytes of all zips, AWS's number; the file system is the limit here.
const TOTAL_CODE_BYTES: u64 = 80_530_636_800;

pub(super) fn settings(app: &Arc<App>) -> Answer {
    let functions = app.all();
    let versions = functions.iter().flat_map(|function| function.all());
    let layers = app.layers.all();
    let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let body = AccountSettings {
        account_limit: AccountLimit {
            total_code_size: TOTAL_CODE_BYTES,
            code_size_unzipped: UNZIPPED_BYTES_MAX,
            code_size_zipped: wide(ZIP_BYTES_MAX),
            concurrent_executions: CONCURRENCY,
            unreserved_concurrent_executions: unreserved(app),
        },
        account_usage: AccountUsage {
            total_code_size: versions
                .map(|live| live.record().target.code.bytes)
                .chain(layers.iter().flat_map(|layer| {
                    let versions = layer.versions.values();
                    versions.map(|version| version.code.bytes)
                }))
                .sum(),
            function_count: wide(functions.len()),
        },
    };
    json(StatusCode::OK, &body)
}

/// What no function has reserved.
pub(super) fn unreserved(app: &App) -> u64 {
    let reserved = |function: &Arc<crate::state::LiveFunction>| {
        u64::from(function.record().reserved_concurrency.unwrap_or_default())
    };
    CONCURRENCY.saturating_sub(app.all().iter().map(reserved).sum())
}
