//! GetAccountSettings: limits of all functions together, and of the caller's key.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::{AccountLimit, AccountSettings, AccountUsage};

use super::validate::ZIP_BYTES_MAX;
use super::{Answer, Call, json};
use crate::code::UNZIPPED_BYTES_MAX;
use crate::functions::storage;
use crate::state::App;

/// Invocations of all functions at once, as AWS gives a new account; what runs at once is this machine's to bear.
pub(super) const CONCURRENCY: u64 = 1000;

/// What no function may reserve of it.
pub(super) const UNRESERVED_MIN: u64 = 100;

/// Bytes of all zips, AWS's number; the file system is the limit here.
const TOTAL_CODE_BYTES: u64 = 80_530_636_800;

pub(super) fn settings(app: &Arc<App>, call: &Call) -> Answer {
    let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    // The limits of the caller's key, where it has some, and then what counts against them.
    let caller = call.caller.as_ref();
    let storage = caller.and_then(|caller| caller.quota.storage_bytes());
    let charged = caller.filter(|_| storage.is_some());
    let charged = charged.map(|caller| caller.access_key_id.as_str());
    let concurrency = caller.and_then(|caller| caller.quota.limits().concurrency);
    let concurrency = concurrency.map_or(CONCURRENCY, u64::from).min(CONCURRENCY);
    let body = AccountSettings {
        account_limit: AccountLimit {
            total_code_size: storage.unwrap_or(TOTAL_CODE_BYTES),
            code_size_unzipped: UNZIPPED_BYTES_MAX,
            code_size_zipped: wide(ZIP_BYTES_MAX),
            concurrent_executions: concurrency,
            unreserved_concurrent_executions: unreserved(app).min(concurrency),
        },
        account_usage: AccountUsage {
            total_code_size: storage::stored(app, charged),
            function_count: wide(app.count()),
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
