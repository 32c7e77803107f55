//! AddPermission, GetPolicy, RemovePermission: a function's resource-based policy, kept and shown as AWS does.
//!
//! Nobody is asked for it: who may do what here, keys say. Deployment tools write it and read it back.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use thaw_api_types::lambda::{AddPermissionRequest, AddPermissionResponse, GetPolicyResponse};

use super::errors::{ApiError, violation};
use super::{Answer, Call, Found, change_function, empty, json as answer, validate};
use crate::policy::{PolicyError, Statement};
use crate::state::App;

/// Longest name of a statement, characters.
const STATEMENT_ID_MAX: usize = 100;

pub(super) async fn add(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let qualifier = qualifier(&found)?.to_owned();
    let limit = call.json_limit();
    let request: AddPermissionRequest = call.json(limit, "AddPermission").await?;
    let revision_id = request.revision_id.clone();
    let statement = statement(&request, found.arn(app))?;
    let text = serde_json::to_string(&statement).map_err(PolicyError::Json)?;
    change_function(app, &found.function, move |record| {
        let policy = record.policies.entry(qualifier).or_default();
        let result = policy.add(statement, revision_id.as_deref());
        record
            .policies
            .retain(|_, policy| !policy.statements.is_empty());
        result
    })
    .await??;
    answer(
        StatusCode::CREATED,
        &AddPermissionResponse { statement: text },
    )
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let found = call.version(app, name)?;
    let record = found.function.record();
    let policy = record
        .policies
        .get(qualifier(&found)?)
        .ok_or_else(|| ApiError::missing("The resource you requested does not exist."))?;
    let body = GetPolicyResponse {
        policy: policy.document()?,
        revision_id: policy.revision_id.clone(),
    };
    answer(StatusCode::OK, &body)
}

pub(super) async fn remove(app: &Arc<App>, call: Call, name: &str, id: &str) -> Answer {
    let found = call.version(app, name)?;
    let qualifier = qualifier(&found)?.to_owned();
    let (revision_id, id) = (call.query("RevisionId"), id.to_owned());
    change_function(app, &found.function, move |record| {
        let policy = record.policies.get_mut(&qualifier);
        policy
            .ok_or(PolicyError::None)?
            .remove(&id, revision_id.as_deref())?;
        record
            .policies
            .retain(|_, policy| !policy.statements.is_empty());
        Ok::<_, PolicyError>(())
    })
    .await??;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Under which the policy is kept: an alias, a version's number, or `$LATEST` for none.
fn qualifier(found: &Found) -> Result<&str, ApiError> {
    match found.reference.qualifier.as_deref() {
        Some("$LATEST") => Err(ApiError::invalid_parameter(
            "We currently do not support adding policies for $LATEST.",
        )),
        Some(qualifier) => Ok(qualifier),
        None => Ok("$LATEST"),
    }
}

/// A request as a statement on `resource`.
fn statement(request: &AddPermissionRequest, resource: String) -> Result<Statement, ApiError> {
    let word = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    let mut violations = Vec::new();
    let mut member =
        |value: &Option<String>, name: &str, pattern: &str, fits: &dyn Fn(&str) -> bool| {
            match value {
                None => violations.push(validate::null(name)),
                Some(text) if !fits(text) => {
                    let constraint =
                        format!("Member must satisfy regular expression pattern: {pattern}");
                    violations.push(violation(text, name, &constraint));
                }
                Some(_) => {}
            }
            value.clone().unwrap_or_default()
        };
    let sid = member(
        &request.statement_id,
        "statementId",
        "([a-zA-Z0-9-_]+)",
        &|text| (1..=STATEMENT_ID_MAX).contains(&text.len()) && word(text),
    );
    let action = member(
        &request.action,
        "action",
        "(lambda:[*]|lambda:[a-zA-Z]+|[*])",
        &|text| match text.strip_prefix("lambda:") {
            Some("*") => true,
            Some(name) => !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphabetic()),
            None => text == "*",
        },
    );
    let name = member(&request.principal, "principal", "[^\\s]+", &|text| {
        !text.is_empty() && !text.contains(char::is_whitespace)
    });
    if !violations.is_empty() {
        return Err(ApiError::validation(&violations));
    }
    Ok(Statement {
        sid,
        effect: "Allow".to_owned(),
        principal: principal(&name)?,
        action,
        resource,
        condition: condition(request),
    })
}

/// A principal as IAM spells it: an account, an ARN, a service or everybody.
fn principal(name: &str) -> Result<Value, ApiError> {
    let is_account = name.len() == 12 && name.bytes().all(|byte| byte.is_ascii_digit());
    Ok(match name {
        "*" => json!("*"),
        _ if is_account => json!({"AWS": format!("arn:aws:iam::{name}:root")}),
        _ if name.starts_with("arn:") => json!({"AWS": name}),
        _ if name.contains('.') => json!({"Service": name}),
        _ => {
            return Err(ApiError::invalid_parameter(
                "The provided principal was invalid. Please check the principal and try again.",
            ));
        }
    })
}

fn condition(request: &AddPermissionRequest) -> Option<Value> {
    let equals = [
        ("AWS:SourceAccount", &request.source_account),
        ("lambda:EventSourceToken", &request.event_source_token),
        ("aws:PrincipalOrgID", &request.principal_org_id),
        (
            "lambda:FunctionUrlAuthType",
            &request.function_url_auth_type,
        ),
    ];
    let equals: Map<String, Value> = equals
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value.clone()?.into())))
        .collect();
    let mut all = Map::new();
    if !equals.is_empty() {
        all.insert("StringEquals".to_owned(), equals.into());
    }
    if let Some(arn) = &request.source_arn {
        all.insert("ArnLike".to_owned(), json!({"AWS:SourceArn": arn}));
    }
    (!all.is_empty()).then(|| all.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn principals_are_spelled_as_iam_does() {
        assert_eq!(
            principal("123456789012").unwrap(),
            json!({"AWS": "arn:aws:iam::123456789012:root"})
        );
        assert_eq!(principal("*").unwrap(), json!("*"));
        let service = "s3.amazonaws.com";
        assert_eq!(principal(service).unwrap(), json!({"Service": service}));
        assert_eq!(
            principal("nobody").unwrap_err().code,
            "InvalidParameterValueException"
        );
    }
}
