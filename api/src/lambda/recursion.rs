//! PutFunctionRecursionConfig and GetFunctionRecursionConfig: whether loops of a function go on. Of those that Lambda ends there are
//! here the ones by way of destinations ([`crate::events::outcome::loops`]); queues, topics and buckets are none of this gateway's.

use std::sync::Arc;

use axum::http::StatusCode;
use thaw_api_types::lambda::RecursionConfig;

use super::errors::{ApiError, violation};
use super::{Answer, Call, change_function, json, validate};
use crate::state::App;

const ALLOW: &str = "Allow";
const TERMINATE: &str = "Terminate";

pub(super) async fn put(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let function = call.function(app, name);
    let limit = call.json_limit();
    let request: RecursionConfig = call.json(limit, "PutFunctionRecursionConfig").await?;
    let allows = match request.recursive_loop.as_deref() {
        None => return Err(ApiError::validation(&[validate::null("recursiveLoop")])),
        Some(ALLOW) => true,
        Some(TERMINATE) => false,
        Some(other) => {
            let constraint = "Member must satisfy enum value set: [Terminate, Allow]";
            let violation = violation(other, "recursiveLoop", constraint);
            return Err(ApiError::validation(&[violation]));
        }
    };
    change_function(app, &function?, |record| record.allows_loops = allows).await?;
    json(StatusCode::OK, &view(allows))
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let allows = call.function(app, name)?.record().allows_loops;
    json(StatusCode::OK, &view(allows))
}

fn view(allows: bool) -> RecursionConfig {
    let word = if allows { ALLOW } else { TERMINATE };
    RecursionConfig {
        recursive_loop: Some(word.to_owned()),
    }
}
