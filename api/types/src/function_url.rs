//! Function URLs, payload format 2.0: the event a function receives and the result it may answer with.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// The event of one HTTP request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpEvent {
    /// `2.0`.
    pub version: String,
    /// `$default`.
    pub route_key: String,
    /// Path below the function's URL, percent-encoded as it came; never empty.
    pub raw_path: String,
    /// Query as it came, without `?`; may be empty.
    pub raw_query_string: String,
    /// `name=value` of each cookie; absent when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cookies: Vec<String>,
    /// Lower-case names; repeated headers are joined by commas. Without `cookie`.
    pub headers: BTreeMap<String, String>,
    /// Decoded query; repeated names are joined by commas. Absent when empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub query_string_parameters: BTreeMap<String, String>,
    /// About the request.
    pub request_context: RequestContext,
    /// Absent when the request has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// `body` is base64.
    pub is_base64_encoded: bool,
}

/// About a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestContext {
    /// The caller's account, or `anonymous` at a URL that asks for no signature.
    pub account_id: String,
    /// Stable for a function.
    pub api_id: String,
    /// Who signed the request, at a URL that asks for a signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorizer: Option<Authorizer>,
    /// Host that was asked, with its port if it named one: adapters build absolute URLs from it.
    pub domain_name: String,
    /// First label of `domain_name`.
    pub domain_prefix: String,
    /// The request line and its sender.
    pub http: HttpContext,
    /// The invocation's id.
    pub request_id: String,
    /// `$default`.
    pub route_key: String,
    /// `$default`.
    pub stage: String,
    /// As in `12/Mar/2026:19:03:58 +0000`.
    pub time: String,
    /// Milliseconds since the Unix epoch.
    pub time_epoch: i64,
}

/// Who signed a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authorizer {
    /// An access key of the gateway's.
    pub iam: IamCaller,
}

/// An access key and whose it is. Members of AWS's that this gateway has nothing for are `null`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IamCaller {
    /// Its id.
    pub access_key: String,
    /// The gateway's account.
    pub account_id: String,
    /// As `accessKey`: users have no other id here.
    pub caller_id: String,
    /// `null`.
    pub cognito_identity: Option<serde_json::Value>,
    /// `null`.
    pub principal_org_id: Option<String>,
    /// ARN of the key's user.
    pub user_arn: String,
    /// As `accessKey`.
    pub user_id: String,
}

/// The request line and its sender.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpContext {
    /// `GET`, …
    pub method: String,
    /// As `rawPath`.
    pub path: String,
    /// `HTTP/1.1`.
    pub protocol: String,
    /// Address of the client.
    pub source_ip: String,
    /// `User-Agent`, or empty.
    pub user_agent: String,
}

/// A structured result. A result without `statusCode` is not one of these.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpResult {
    /// 100 to 599; digits in a string will do.
    #[serde(deserialize_with = "status_code")]
    pub status_code: u16,
    /// Strings, numbers or booleans.
    #[serde(default)]
    pub headers: Option<BTreeMap<String, serde_json::Value>>,
    /// One `Set-Cookie` each.
    #[serde(default)]
    pub cookies: Option<Vec<String>>,
    /// A string; anything else is sent as JSON.
    #[serde(default)]
    pub body: Option<serde_json::Value>,
    /// `body` is base64.
    #[serde(default)]
    pub is_base64_encoded: Option<bool>,
}

fn status_code<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Status {
        Number(u16),
        Text(String),
    }
    match Status::deserialize(deserializer)? {
        Status::Number(number) => Ok(number),
        Status::Text(text) => text.parse().map_err(D::Error::custom),
    }
}
