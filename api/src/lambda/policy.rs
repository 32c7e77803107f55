//! AddPermission, GetPolicy, RemovePermission: a function's resource-based policy, kept and shown as AWS does.
//!
//! Nobody is asked for it: who may do what here, keys say. Deployment tools write it and read it back.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use thaw_api_types::lambda::{AddPermissionRequest, AddPermissionResponse, GetPolicyResponse};
use uuid::Uuid;

use super::errors::{ApiError, violation};
use super::names::FunctionRef;
use super::{
    Answer, Call, Found, arn, change_function, empty, find_alias_or_version, find_or,
    json as answer, revise_version, validate,
};
use crate::policy::{PolicyError, Statement};
use crate::record::Alias;
use crate::state::App;

/// Longest name of a statement, characters.
const STATEMENT_ID_MAX: usize = 100;

pub(super) async fn add(app: &Arc<App>, call: Call, name: &str) -> Answer {
    let reference = call.reference(name)?;
    let limit = call.json_limit();
    let request: AddPermissionRequest = call.json(limit, "AddPermission").await?;
    let statement = statement(&request, arn(app, &reference))?;
    let qualifier = qualifier(&reference)?.to_owned();
    let found = find_alias_or_version(app, reference)?;
    let text = serde_json::to_string(&statement).map_err(PolicyError::Json)?;
    check_revision(&found, request.revision_id.as_deref())?;
    change_function(app, &found.function, move |record| {
        let policy = record.policies.entry(qualifier).or_default();
        let result = policy.add(statement);
        record
            .policies
            .retain(|_, policy| !policy.statements.is_empty());
        result
    })
    .await??;
    revise(app, &found).await?;
    answer(
        StatusCode::CREATED,
        &AddPermissionResponse { statement: text },
    )
}

pub(super) fn get(app: &Arc<App>, call: &Call, name: &str) -> Answer {
    let reference = call.reference(name)?;
    let qualifier = qualifier(&reference)?.to_owned();
    let found = find_or(app, reference, |_| ApiError::no_resource())?;
    let record = found.function.record();
    let policy = record.policies.get(&qualifier);
    let body = GetPolicyResponse {
        policy: policy.ok_or_else(ApiError::no_resource)?.document()?,
        revision_id: revision(&found),
    };
    answer(StatusCode::OK, &body)
}

pub(super) async fn remove(app: &Arc<App>, call: Call, name: &str, id: &str) -> Answer {
    let reference = call.reference(name)?;
    let qualifier = qualifier(&reference)?.to_owned();
    let found = find_or(app, reference, |reference| {
        let arn = arn(app, reference);
        match reference.names_alias() {
            true => ApiError::no_alias(&arn),
            false => ApiError::missing(format!("No policy found for: {arn}")),
        }
    })?;
    let id = id.to_owned();
    check_revision(&found, call.query("RevisionId").as_deref())?;
    change_function(app, &found.function, move |record| {
        let policy = record.policies.get_mut(&qualifier);
        policy.ok_or(PolicyError::None)?.remove(&id)?;
        record
            .policies
            .retain(|_, policy| !policy.statements.is_empty());
        Ok::<_, PolicyError>(())
    })
    .await??;
    revise(app, &found).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Of the alias or the version that a policy is of: policies have none of their own.
fn revision(found: &Found) -> String {
    match alias(found) {
        Some((_, alias)) => alias.revision_id,
        None => found.live.record().revision_id.clone(),
    }
}

fn alias(found: &Found) -> Option<(String, Alias)> {
    let name = found.reference.qualifier.as_ref()?;
    let alias = found.function.record().aliases.get(name).cloned();
    Some((name.clone(), alias?))
}

fn check_revision(found: &Found, wanted: Option<&str>) -> Result<(), ApiError> {
    match wanted.filter(|wanted| !wanted.is_empty()) {
        Some(wanted) if wanted != revision(found) => {
            Err(PolicyError::OtherRevision("GetPolicy").into())
        }
        _ => Ok(()),
    }
}

/// A change of a policy is one of what it is of.
async fn revise(app: &App, found: &Found) -> Result<(), ApiError> {
    match alias(found) {
        Some((name, _)) => {
            change_function(app, &found.function, |record| {
                if let Some(alias) = record.aliases.get_mut(&name) {
                    alias.revision_id = Uuid::new_v4().to_string();
                }
            })
            .await
        }
        None => revise_version(app, &found.live).await,
    }
}

/// Under which the policy is kept: an alias, a version's number, or `$LATEST` for none.
fn qualifier(reference: &FunctionRef) -> Result<&str, ApiError> {
    match reference.qualifier.as_deref() {
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
        _ if is_service(name) => json!({"Service": name}),
        _ => {
            return Err(ApiError::invalid_parameter(
                "The provided principal was invalid. Please check the principal and try again.",
            ));
        }
    })
}

/// Whether a service can have this name: AWS has them all under domains of its own.
fn is_service(name: &str) -> bool {
    let domains = [
        ".amazonaws.com",
        ".amazonaws.com.cn",
        ".amazon.com",
        ".aws.internal",
    ];
    domains.iter().any(|domain| name.ends_with(domain))
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
        for name in ["nobody", "somebody.example.com"] {
            let error = principal(name).unwrap_err();
            assert_eq!(error.code, "InvalidParameterValueException", "{name}");
        }
    }
}
