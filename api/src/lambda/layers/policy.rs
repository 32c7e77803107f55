//! AddLayerVersionPermission, GetLayerVersionPolicy, RemoveLayerVersionPermission: kept for clients that ask. This gateway has
//! one account, which may use its layers anyway.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Value, json as document};
use thaw_api_types::lambda::{
    AddLayerVersionPermissionRequest, LayerPolicyResponse, LayerStatementResponse,
};

use super::super::errors::{ApiError, violation};
use super::super::{Answer, Call, change_error, empty, json, validate};
use super::{is_name, layer_name, version_arn, version_number};
use crate::functions::ChangeError;
use crate::policy::{Policy, PolicyError, Statement};
use crate::state::App;

/// The one action that a layer's policy can allow.
const ACTION: &str = "lambda:GetLayerVersion";
const ID_CHARS_MAX: usize = 100;
/// What tells a policy's revision, in AWS's words.
const GET_POLICY: &str = "GetLayerPolicy";

pub(in crate::lambda) async fn add(app: &Arc<App>, call: Call, name: &str, number: &str) -> Answer {
    let (name, number) = (layer_name(app, name)?, version_number(number)?);
    let (limit, wanted) = (call.json_limit(), call.query("RevisionId"));
    let request: AddLayerVersionPermissionRequest =
        call.json(limit, "AddLayerVersionPermission").await?;
    let statement = statement(request, version_arn(app, &name, number))?;
    let text = serde_json::to_string(&statement).map_err(PolicyError::Json)?;
    let added = change(app, &name, number, |policy| {
        policy.check(wanted.as_deref(), GET_POLICY)?;
        policy.add(statement)
    });
    let body = LayerStatementResponse {
        revision_id: added.await?,
        statement: text,
    };
    json(StatusCode::CREATED, &body)
}

pub(in crate::lambda) fn get(app: &App, name: &str, number: &str) -> Answer {
    let (name, number) = (layer_name(app, name)?, version_number(number)?);
    let version = app.layers.version(&name, number);
    let policy = version.ok_or_else(|| gone(app, &name, number))?.policy;
    if policy.statements.is_empty() {
        return Err(PolicyError::None.into());
    }
    let body = LayerPolicyResponse {
        policy: policy.document()?,
        revision_id: policy.revision_id,
    };
    json(StatusCode::OK, &body)
}

pub(in crate::lambda) async fn remove(
    app: &App,
    call: Call,
    name: &str,
    number: &str,
    id: &str,
) -> Answer {
    let (name, number) = (layer_name(app, name)?, version_number(number)?);
    let wanted = call.query("RevisionId");
    let removed = change(app, &name, number, |policy| {
        if policy.statements.iter().any(|one| one.sid == id) {
            policy.check(wanted.as_deref(), GET_POLICY)?;
        }
        policy.remove(id)
    });
    removed.await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Commits a change of a policy; answers its new revision.
async fn change(
    app: &App,
    name: &str,
    number: u64,
    work: impl FnOnce(&mut Policy) -> Result<(), PolicyError>,
) -> Result<String, ApiError> {
    let changed = app.layers.change_policy(&app.store, name, number, work);
    match changed.await {
        Ok(Some(result)) => Ok(result?),
        Ok(None) => Err(gone(app, name, number)),
        Err(error) => Err(change_error(app, &ChangeError::Store(error))),
    }
}

fn statement(
    request: AddLayerVersionPermissionRequest,
    resource: String,
) -> Result<Statement, ApiError> {
    let mut violations = Vec::new();
    let mut member = |value: Option<String>, name: &str, pattern: &str, fits: fn(&str) -> bool| {
        match value {
            None => violations.push(validate::null(name)),
            Some(value) if fits(&value) => return value,
            Some(value) => {
                let constraint =
                    format!("Member must satisfy regular expression pattern: {pattern}");
                violations.push(violation(&value, name, &constraint));
            }
        }
        String::new()
    };
    let action = member(request.action, "action", ACTION, |text| text == ACTION);
    let principal = member(
        request.principal,
        "principal",
        "\\d{12}|\\*|arn:(aws[a-zA-Z-]*):iam::\\d{12}:root",
        |text| text == "*" || account(text).is_some(),
    );
    let sid = member(
        request.statement_id,
        "statementId",
        "([a-zA-Z0-9-_]+)",
        |text| is_name(text) && text.len() <= ID_CHARS_MAX,
    );
    let organization = request.organization_id.map(|id| {
        member(
            Some(id),
            "organizationId",
            "o-[a-z0-9]{10,32}",
            is_organization,
        )
    });
    validate::finish(&violations)?;
    Ok(Statement {
        sid,
        effect: "Allow".to_owned(),
        principal: match account(&principal) {
            Some(account) => document!({ "AWS": format!("arn:aws:iam::{account}:root") }),
            None => Value::String(principal),
        },
        action,
        resource,
        condition: organization
            .map(|id| document!({ "StringEquals": { "aws:PrincipalOrgID": id } })),
    })
}

/// The number of an account that is named by it or by its ARN.
fn account(principal: &str) -> Option<&str> {
    let number = match principal.strip_prefix("arn:aws") {
        Some(rest) => rest.split_once(":iam::")?.1.strip_suffix(":root")?,
        None => principal,
    };
    (number.len() == 12 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(number)
}

fn is_organization(text: &str) -> bool {
    let is_fit = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.strip_prefix("o-")
        .is_some_and(|id| (10..=32).contains(&id.len()) && id.bytes().all(is_fit))
}

fn gone(app: &App, name: &str, number: u64) -> ApiError {
    let arn = version_arn(app, name, number);
    ApiError::missing(format!("Layer version {arn} does not exist."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn principals_are_accounts() {
        for principal in ["123456789012", "arn:aws:iam::123456789012:root"] {
            assert_eq!(account(principal), Some("123456789012"), "{principal}");
        }
        for principal in ["*", "", "12", "arn:aws:iam::12:root", "arn:aws:s3:::x"] {
            assert_eq!(account(principal), None, "{principal}");
        }
        assert!(is_organization("o-abcdefghij") && !is_organization("o-x"));
    }
}
