//! The Lambda REST API: which operation a request is, and its answer in Lambda's shape. Always, errors included.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::body::{self, BodyError};
use crate::code::{CodeError, UNZIPPED_BYTES_MAX};
use crate::engine::chain;
use crate::functions::ChangeError;
use crate::state::{App, Live};

pub mod errors;
pub mod names;
pub mod validate;
pub mod view;

mod create;
mod delete;
mod invoke;
mod read;
mod update;

use errors::ApiError;
use names::FunctionRef;

/// Largest body of CreateFunction and UpdateFunctionCode, bytes: a 50 MiB zip in base64 and its settings.
pub const CODE_BODY_BYTES_MAX: usize = 70_167_211;

/// Largest body of any other operation but Invoke, bytes.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A request, taken apart.
pub(crate) struct Call {
    pub(crate) request_id: String,
    pub(crate) headers: HeaderMap,
    pub(crate) uri: Uri,
    pub(crate) body: Body,
}

pub(crate) type Answer = Result<Response<Body>, ApiError>;

/// Operations served.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Operation {
    CreateFunction,
    ListFunctions,
    GetFunction(String),
    DeleteFunction(String),
    GetFunctionConfiguration(String),
    UpdateFunctionConfiguration(String),
    UpdateFunctionCode(String),
    Invoke(String),
    /// A path of the API that this gateway does not serve.
    Unsupported,
    /// Not of the API.
    Unknown,
}

/// Answers any request that no other route took.
pub async fn serve(app: Arc<App>, request: axum::extract::Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let request_id = Uuid::new_v4().to_string();
    let operation = operation(&parts.method, parts.uri.path());
    let what = format!("{} {}", parts.method, parts.uri.path());
    let call = Call {
        request_id: request_id.clone(),
        headers: parts.headers,
        uri: parts.uri,
        body,
    };
    let answer = dispatch(&app, operation, call, &what).await;
    let mut response = match answer {
        Ok(response) => response,
        Err(error) => {
            if error.status.is_server_error() {
                tracing::error!(request = %what, %request_id, reason = %error.message, "request failed");
            } else {
                tracing::debug!(request = %what, %request_id, code = error.code, reason = %error.message, "request refused");
            }
            error.into_response(&request_id)
        }
    };
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert("x-amzn-requestid", id);
    }
    response
}

async fn dispatch(app: &Arc<App>, operation: Operation, call: Call, what: &str) -> Answer {
    match operation {
        Operation::CreateFunction => create::create(app, call).await,
        Operation::ListFunctions => read::list(app, &call),
        Operation::GetFunction(name) => read::function(app, &call, &name),
        Operation::GetFunctionConfiguration(name) => read::configuration(app, &call, &name),
        Operation::DeleteFunction(name) => delete::delete(app, call, &name).await,
        Operation::UpdateFunctionConfiguration(name) => {
            update::configuration(app, call, &name).await
        }
        Operation::UpdateFunctionCode(name) => update::code(app, call, &name).await,
        Operation::Invoke(name) => invoke::invoke(app, call, &name).await,
        Operation::Unsupported => Err(ApiError::invalid_parameter(format!(
            "{what} is not supported by this gateway. It serves CreateFunction, GetFunction, GetFunctionConfiguration, \
             ListFunctions, UpdateFunctionCode, UpdateFunctionConfiguration, DeleteFunction and Invoke."
        ))),
        Operation::Unknown => Err(ApiError::unknown_operation(format!(
            "{what} is no operation of this gateway. Functions answer at /fn/NAME/, the Lambda API at /2015-03-31/functions."
        ))),
    }
}

/// Which operation a request line is. An optional trailing slash is what older clients write.
fn operation(method: &Method, path: &str) -> Operation {
    let path = path.strip_suffix('/').unwrap_or(path);
    let mut segments = Vec::new();
    for segment in path.split('/').skip(1) {
        match percent_decode_str(segment).decode_utf8() {
            Ok(text) => segments.push(text.into_owned()),
            Err(_) => return Operation::Unknown,
        }
    }
    let words: Vec<&str> = segments.iter().map(String::as_str).collect();
    let (version, rest) = match words.as_slice() {
        [version, rest @ ..] if is_version(version) => (*version, rest),
        _ => return Operation::Unknown,
    };
    if version != "2015-03-31" {
        return Operation::Unsupported;
    }
    let named = |name: &str| name.to_owned();
    match (method.as_str(), rest) {
        ("POST", ["functions"]) => Operation::CreateFunction,
        ("GET", ["functions"]) => Operation::ListFunctions,
        ("GET", ["functions", name]) => Operation::GetFunction(named(name)),
        ("DELETE", ["functions", name]) => Operation::DeleteFunction(named(name)),
        ("GET", ["functions", name, "configuration"]) => {
            Operation::GetFunctionConfiguration(named(name))
        }
        ("PUT", ["functions", name, "configuration"]) => {
            Operation::UpdateFunctionConfiguration(named(name))
        }
        ("PUT", ["functions", name, "code"]) => Operation::UpdateFunctionCode(named(name)),
        ("POST", ["functions", name, "invocations"]) => Operation::Invoke(named(name)),
        _ => Operation::Unsupported,
    }
}

/// Lambda's paths begin with a date.
fn is_version(segment: &str) -> bool {
    segment.len() == 10
        && segment
            .bytes()
            .enumerate()
            .all(|(index, byte)| match index {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            })
}

impl Call {
    /// One parameter of the query, decoded.
    pub(crate) fn query(&self, name: &str) -> Option<String> {
        query(self.uri.query().unwrap_or_default())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    /// The function that the path and the query name. The only qualifier is `$LATEST`.
    pub(crate) fn function(
        &self,
        app: &App,
        name: &str,
    ) -> Result<(FunctionRef, Arc<Live>), ApiError> {
        let reference = FunctionRef::parse(name, self.query("Qualifier").as_deref())?;
        let live = find(app, &reference)?;
        Ok((reference, live))
    }

    /// The body as JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        self,
        limit: usize,
        operation: &str,
    ) -> Result<T, ApiError> {
        let bytes =
            body::read(&self.headers, self.body, limit)
                .await
                .map_err(|error| match error {
                    BodyError::TooLarge(limit) => ApiError::entity_too_large(limit, operation),
                    other => ApiError::invalid_content(other.to_string()),
                })?;
        serde_json::from_slice(&bytes).map_err(|error| {
            ApiError::invalid_content(format!("Could not parse request body into json: {error}"))
        })
    }

    pub(crate) fn json_limit(&self) -> usize {
        BODY_BYTES_MAX
    }
}

/// The function of a reference.
pub(crate) fn find(app: &App, reference: &FunctionRef) -> Result<Arc<Live>, ApiError> {
    let elsewhere = reference
        .region
        .as_ref()
        .is_some_and(|region| *region != app.region)
        || reference
            .account
            .as_ref()
            .is_some_and(|account| *account != app.account_id);
    let known_qualifier = matches!(reference.qualifier.as_deref(), None | Some("$LATEST"));
    app.find(&reference.name)
        .filter(|_| !elsewhere && known_qualifier)
        .ok_or_else(|| ApiError::not_found(&arn(app, reference)))
}

/// A reference's ARN, with its qualifier if it has one.
pub(crate) fn arn(app: &App, reference: &FunctionRef) -> String {
    let region = reference.region.as_ref().unwrap_or(&app.region);
    let account = reference.account.as_ref().unwrap_or(&app.account_id);
    let name = &reference.name;
    let arn = format!("arn:aws:lambda:{region}:{account}:function:{name}");
    match &reference.qualifier {
        Some(qualifier) => format!("{arn}:{qualifier}"),
        None => arn,
    }
}

/// Decoded pairs of a query.
pub(crate) fn query(text: &str) -> impl Iterator<Item = (String, String)> {
    text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key), decode(value))
    })
}

fn decode(text: &str) -> String {
    let spaced = text.replace('+', " ");
    percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
}

/// A JSON response.
pub(crate) fn json<T: Serialize>(status: StatusCode, body: &T) -> Answer {
    let body = serde_json::to_vec(body)
        .map_err(|error| ApiError::service(format!("the response is no JSON: {error}")))?;
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    Ok(response)
}

/// A response without a body.
pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// A refused change in Lambda's words.
pub(crate) fn change_error(app: &App, error: &ChangeError) -> ApiError {
    match error {
        ChangeError::Exists(name) => ApiError::conflict(format!("Function already exist: {name}")),
        ChangeError::Missing(name) => ApiError::not_found(&app.arn(name)),
        ChangeError::Busy(name) => ApiError::update_in_progress(&app.arn(name)),
        ChangeError::OtherRevision(_) => ApiError::precondition_failed(),
        ChangeError::TooMany(_) => ApiError::invalid_parameter(error.to_string()),
        ChangeError::Code(CodeError::Broken(_) | CodeError::Damaged(_)) => {
            ApiError::invalid_parameter(
                "Could not unzip uploaded file. Please check your file, then try to upload again.",
            )
        }
        ChangeError::Code(CodeError::Empty) => {
            ApiError::invalid_parameter("Uploaded file must be a non-empty zip")
        }
        ChangeError::Code(CodeError::TooLarge) => ApiError::invalid_parameter(format!(
            "Unzipped size must be smaller than {UNZIPPED_BYTES_MAX} bytes"
        )),
        ChangeError::Write(failed) if failed.is_disk_full() => ApiError::service(format!(
            "no space left for {}: free some on that file system, then try again",
            failed.path.display()
        )),
        ChangeError::Store(failed) if failed.is_disk_full() => ApiError::service(format!(
            "no space left for the database in {}: free some on that file system, then try again",
            app.home.display()
        )),
        ChangeError::Write(_) | ChangeError::Store(_) | ChangeError::Worker => {
            ApiError::service(chain(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_operations_with_or_without_a_trailing_slash() {
        let of = |method: Method, path: &str| operation(&method, path);
        for slash in ["", "/"] {
            let list = format!("/2015-03-31/functions{slash}");
            assert_eq!(of(Method::GET, &list), Operation::ListFunctions);
            assert_eq!(of(Method::POST, &list), Operation::CreateFunction);
            assert_eq!(of(Method::PATCH, &list), Operation::Unsupported);
            assert_eq!(
                of(
                    Method::POST,
                    &format!("/2015-03-31/functions/f/invocations{slash}")
                ),
                Operation::Invoke("f".to_owned())
            );
        }
        let arn =
            "/2015-03-31/functions/arn%3Aaws%3Alambda%3Aus-east-1%3A0%3Afunction%3Af%3A%24LATEST";
        assert_eq!(
            of(Method::GET, arn),
            Operation::GetFunction("arn:aws:lambda:us-east-1:0:function:f:$LATEST".to_owned())
        );
        assert_eq!(
            of(Method::GET, "/2018-10-31/layers"),
            Operation::Unsupported
        );
        assert_eq!(of(Method::GET, "/"), Operation::Unknown);
        assert_eq!(of(Method::GET, "/favicon.ico"), Operation::Unknown);
        assert_eq!(
            of(Method::GET, "/2015-03-31/functions/%FF"),
            Operation::Unknown
        );
    }

    #[test]
    fn queries_are_decoded() {
        let pairs: Vec<_> = query("a=1&b=x%20y+z&&c").collect();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            pairs,
            vec![pair("a", "1"), pair("b", "x y z"), pair("c", "")]
        );
    }
}
