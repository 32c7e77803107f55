//! The Lambda REST API: which operation a request is, and its answer in Lambda's shape. Always, errors included.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, Uri, header};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::auth::admission::Caller;
use crate::body::{self, BodyError};
use crate::code::{CodeError, UNZIPPED_BYTES_MAX};
use crate::engine::chain;
use crate::functions::ChangeError;
use crate::record::Function;
use crate::state::{App, Live, LiveFunction};

pub mod errors;
pub mod names;
pub mod routes;
pub mod validate;
pub mod view;

mod absent;
mod account;
mod aliases;
mod concurrency;
mod create;
mod delete;
mod event_config;
mod invoke;
mod layers;
mod logging;
mod paging;
mod policy;
mod provisioned;
mod read;
mod recursion;
mod source;
pub(crate) mod stream;
mod tags;
mod update;
mod url_config;
mod versions;

use errors::ApiError;
use event_config::Members;
use names::FunctionRef;
use routes::{Matched, Operation};

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
    /// Who it is from, where that is asked.
    pub(crate) caller: Option<Caller>,
}

pub(crate) type Answer = Result<Response<Body>, ApiError>;

/// Answers any request that no other route took.
pub async fn serve(app: Arc<App>, request: axum::extract::Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let request_id = Uuid::new_v4().to_string();
    let what = format!("{} {}", parts.method, parts.uri.path());
    let (path, query) = (parts.uri.path(), parts.uri.query().unwrap_or_default());
    let found = match routes::find(parts.method.as_str(), path, query) {
        Some(found) => Ok(found),
        None if routes::is_api(path) => Err(ApiError::invalid_parameter(format!(
            "{what} is no operation of the Lambda API 2015-03-31."
        ))),
        None => Err(ApiError::unknown_operation(format!(
            "{what} is no operation of this gateway. Functions answer at /fn/NAME/, the Lambda API at /2015-03-31/functions."
        ))),
    };
    let call = Call {
        request_id: request_id.clone(),
        headers: parts.headers,
        uri: parts.uri,
        body,
        caller: parts.extensions.get().cloned(),
    };
    let answer = match found {
        Ok(found) => dispatch(&app, found, call).await,
        Err(error) => Err(error),
    };
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

async fn dispatch(app: &Arc<App>, found: Matched, call: Call) -> Answer {
    let Some(operation) = found.route.operation else {
        return Err(ApiError::invalid_parameter(format!(
            "{} is not supported by this gateway.",
            found.route.name
        )));
    };
    let mut names = found.names.into_iter();
    let first = names.next().unwrap_or_default();
    let second = names.next().unwrap_or_default();
    match operation {
        Operation::CreateFunction => create::create(app, call).await,
        Operation::ListFunctions => read::list(app, &call),
        Operation::GetFunction => read::function(app, &call, &first),
        Operation::GetFunctionConfiguration => read::configuration(app, &call, &first),
        Operation::DeleteFunction => delete::delete(app, call, &first).await,
        Operation::UpdateFunctionConfiguration => update::configuration(app, call, &first).await,
        Operation::UpdateFunctionCode => update::code(app, call, &first).await,
        Operation::Invoke => invoke::invoke(app, call, &first).await,
        Operation::PublishVersion => versions::publish(app, call, &first).await,
        Operation::ListVersionsByFunction => versions::list(app, &call, &first),
        Operation::CreateAlias => aliases::create(app, call, &first).await,
        Operation::GetAlias => aliases::get(app, &call, &first, &second),
        Operation::UpdateAlias => aliases::update(app, call, &first, &second).await,
        Operation::DeleteAlias => aliases::delete(app, call, &first, &second).await,
        Operation::ListAliases => aliases::list(app, &call, &first),
        Operation::TagResource => tags::tag(app, call, &first).await,
        Operation::UntagResource => tags::untag(app, call, &first).await,
        Operation::ListTags => tags::list(app, &first),
        Operation::PutFunctionConcurrency => concurrency::put(app, call, &first).await,
        Operation::GetFunctionConcurrency => concurrency::get(app, &call, &first),
        Operation::DeleteFunctionConcurrency => concurrency::delete(app, call, &first).await,
        Operation::InvokeWithResponseStream => stream::invoke(app, call, &first).await,
        Operation::InvokeAsync => invoke::invoke_async(app, call, &first).await,
        Operation::PutFunctionEventInvokeConfig => {
            event_config::keep(app, call, &first, Members::Replaced).await
        }
        Operation::UpdateFunctionEventInvokeConfig => {
            event_config::keep(app, call, &first, Members::Merged).await
        }
        Operation::GetFunctionEventInvokeConfig => event_config::get(app, &call, &first),
        Operation::DeleteFunctionEventInvokeConfig => event_config::delete(app, call, &first).await,
        Operation::ListFunctionEventInvokeConfigs => event_config::list(app, &call, &first),
        Operation::CreateFunctionUrlConfig => url_config::create(app, call, &first).await,
        Operation::GetFunctionUrlConfig => url_config::get(app, &call, &first),
        Operation::UpdateFunctionUrlConfig => url_config::update(app, call, &first).await,
        Operation::DeleteFunctionUrlConfig => url_config::delete(app, call, &first).await,
        Operation::ListFunctionUrlConfigs => url_config::list(app, &call, &first),
        Operation::GetAccountSettings => account::settings(app, &call),
        Operation::GetFunctionCodeSigningConfig => absent::code_signing(app, &call, &first),
        Operation::GetRuntimeManagementConfig => absent::runtime_management(app, &call, &first),
        Operation::GetCodeSigningConfig
        | Operation::UpdateCodeSigningConfig
        | Operation::DeleteCodeSigningConfig
        | Operation::ListFunctionsByCodeSigningConfig => absent::code_signing_config(&first),
        Operation::PutFunctionCodeSigningConfig => absent::put_code_signing(call).await,
        Operation::DeleteFunctionCodeSigningConfig => {
            absent::delete_code_signing(app, &call, &first)
        }
        Operation::GetEventSourceMapping
        | Operation::UpdateEventSourceMapping
        | Operation::DeleteEventSourceMapping => absent::mapping(),
        Operation::PutRuntimeManagementConfig => absent::manage_runtime(app, call, &first).await,
        Operation::PutFunctionRecursionConfig => recursion::put(app, call, &first).await,
        Operation::GetFunctionRecursionConfig => recursion::get(app, &call, &first),
        Operation::ListCodeSigningConfigs => absent::list("CodeSigningConfigs"),
        Operation::ListEventSourceMappings => absent::list("EventSourceMappings"),
        Operation::AddPermission => policy::add(app, call, &first).await,
        Operation::GetPolicy => policy::get(app, &call, &first),
        Operation::RemovePermission => policy::remove(app, call, &first, &second).await,
        Operation::PutProvisionedConcurrencyConfig => provisioned::put(app, call, &first).await,
        Operation::GetProvisionedConcurrencyConfig => provisioned::get(app, &call, &first),
        Operation::DeleteProvisionedConcurrencyConfig => {
            provisioned::delete(app, call, &first).await
        }
        Operation::ListProvisionedConcurrencyConfigs => provisioned::list(app, &call, &first),
        Operation::PublishLayerVersion => layers::publish(app, call, &first).await,
        Operation::GetLayerVersion => layers::get(app, &call, &first, &second),
        Operation::GetLayerVersionByArn => layers::get_by_arn(app, &call),
        Operation::ListLayers => layers::list(app, &call),
        Operation::ListLayerVersions => layers::list_versions(app, &call, &first),
        Operation::DeleteLayerVersion => layers::delete(app, &first, &second).await,
        Operation::AddLayerVersionPermission => {
            layers::policy::add(app, call, &first, &second).await
        }
        Operation::GetLayerVersionPolicy => layers::policy::get(app, &first, &second),
        Operation::RemoveLayerVersionPermission => {
            let statement = names.next().unwrap_or_default();
            layers::policy::remove(app, call, &first, &second, &statement).await
        }
    }
}

impl Call {
    /// One parameter of the query, decoded.
    pub(crate) fn query(&self, name: &str) -> Option<String> {
        query(self.uri.query().unwrap_or_default())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    /// The version that the path and the query name.
    pub(crate) fn version(&self, app: &App, name: &str) -> Result<Found, ApiError> {
        find(app, self.reference(name)?)
    }

    /// The version that the path and the query name, there or not.
    pub(crate) fn reference(&self, name: &str) -> Result<FunctionRef, ApiError> {
        FunctionRef::parse(name, self.query("Qualifier").as_deref())
    }

    /// The function that the path names, without a qualifier.
    pub(crate) fn function(&self, app: &App, name: &str) -> Result<Arc<LiveFunction>, ApiError> {
        function_or(app, name, |reference| {
            ApiError::not_found(&arn(app, reference))
        })
    }

    /// The body as JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        self,
        limit: usize,
        operation: &str,
    ) -> Result<T, ApiError> {
        parse(&self.bytes(limit, operation).await?)
    }

    /// The body as JSON of which no member is required, so that there may be none at all.
    pub(crate) async fn json_or_nothing<T: DeserializeOwned + Default>(
        self,
        limit: usize,
        operation: &str,
    ) -> Result<T, ApiError> {
        let bytes = self.bytes(limit, operation).await?;
        match bytes.is_empty() {
            true => Ok(T::default()),
            false => parse(&bytes),
        }
    }

    async fn bytes(self, limit: usize, operation: &str) -> Result<Bytes, ApiError> {
        body::read(&self.headers, self.body, limit)
            .await
            .map_err(|error| match error {
                BodyError::TooLarge(limit) => ApiError::entity_too_large(limit, operation),
                other => ApiError::invalid_content(other.to_string()),
            })
    }

    /// Where this client finds the gateway.
    pub(crate) fn base(&self, app: &App) -> String {
        let host = self.headers.get(header::HOST);
        let host = host.and_then(|host| host.to_str().ok());
        let host = host.map_or_else(|| app.address.to_string(), str::to_owned);
        let scheme = if app.is_encrypted { "https" } else { "http" };
        format!("{scheme}://{host}")
    }

    pub(crate) fn json_limit(&self) -> usize {
        BODY_BYTES_MAX
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| {
        ApiError::invalid_content(format!("Could not parse request body into json: {error}"))
    })
}

/// What a client named, found.
pub(crate) struct Found {
    /// As it was named.
    pub(crate) reference: FunctionRef,
    /// The function.
    pub(crate) function: Arc<LiveFunction>,
    /// The version: the first of an alias that has two.
    pub(crate) live: Arc<Live>,
}

impl Found {
    /// The version that answers an invocation: an alias with two divides them by weight.
    pub(crate) fn pick(&self) -> Arc<Live> {
        let record = self.function.record();
        let alias = self.reference.qualifier.as_deref();
        alias
            .and_then(|alias| record.aliases.get(alias))
            .and_then(|alias| self.function.version(alias.pick(dice())))
            .unwrap_or_else(|| Arc::clone(&self.live))
    }

    pub(crate) fn arn(&self, app: &App) -> String {
        arn(app, &self.reference)
    }
}

/// Uniform in 0..1.
fn dice() -> f64 {
    let (random, _) = Uuid::new_v4().as_u64_pair();
    f64::from(u32::try_from(random >> 32).unwrap_or_default()) / f64::from(1u32 << 31) / 2.0
}

/// The version of a reference.
pub(crate) fn find(app: &App, reference: FunctionRef) -> Result<Found, ApiError> {
    find_or(app, reference, |reference| {
        ApiError::not_found(&arn(app, reference))
    })
}

/// The same for operations that tell an alias that is not there from a version that is not there.
pub(crate) fn find_alias_or_version(app: &App, reference: FunctionRef) -> Result<Found, ApiError> {
    find_or(app, reference, |reference| {
        let arn = arn(app, reference);
        match reference.names_alias() {
            true => ApiError::no_alias(&arn),
            false => ApiError::not_found(&arn),
        }
    })
}

/// The function that a path names, without a qualifier, or an error of the operation's own.
pub(crate) fn function_or(
    app: &App,
    name: &str,
    missing: impl FnOnce(&FunctionRef) -> ApiError,
) -> Result<Arc<LiveFunction>, ApiError> {
    let reference = FunctionRef::parse(name, None)?;
    if reference.qualifier.is_some() {
        return Err(ApiError::invalid_parameter(
            "This operation is permitted on Lambda functions only. Aliases and versions do not support this operation. \
             Please specify either a function name or an unqualified function ARN.",
        ));
    }
    Ok(find_or(app, reference, missing)?.function)
}

/// The version of a reference, or an error of the operation's own.
pub(crate) fn find_or(
    app: &App,
    reference: FunctionRef,
    missing: impl FnOnce(&FunctionRef) -> ApiError,
) -> Result<Found, ApiError> {
    check_region(app, &reference)?;
    let found =
        app.find(&reference.name)
            .filter(|_| !is_elsewhere(app, &reference))
            .and_then(|function| {
                let live = match reference.qualifier.as_deref() {
                    None => Arc::clone(&function.latest),
                    Some(qualifier) => {
                        function.version(qualifier.parse().ok().or_else(|| {
                            Some(function.record().aliases.get(qualifier)?.version)
                        })?)?
                    }
                };
                Some((function, live))
            });
    match found {
        Some((function, live)) => Ok(Found {
            reference,
            function,
            live,
        }),
        None => Err(missing(&reference)),
    }
}

/// A gateway is one region.
pub(crate) fn check_region(app: &App, reference: &FunctionRef) -> Result<(), ApiError> {
    match &reference.region {
        Some(region) if *region != app.region => {
            Err(ApiError::unreachable_region(region, &app.region))
        }
        _ => Ok(()),
    }
}

/// Whether a reference is to another region or account than this gateway's.
pub(crate) fn is_elsewhere(app: &App, reference: &FunctionRef) -> bool {
    let differs = |named: &Option<String>, ours: &str| named.as_ref().is_some_and(|n| n != ours);
    differs(&reference.region, &app.region) || differs(&reference.account, &app.account_id)
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

/// Commits a change of what a function's versions share.
pub(crate) async fn change_function<T>(
    app: &App,
    function: &Arc<LiveFunction>,
    work: impl FnOnce(&mut Function) -> T,
) -> Result<T, ApiError> {
    let changed = app.change_function(function, None, |record| Some(work(record)));
    match changed.await {
        Ok(Some(value)) => Ok(value),
        Ok(None) => Err(ApiError::not_found(&app.arn(&function.name))),
        Err(error) => Err(change_error(app, &ChangeError::Store(error))),
    }
}

/// Gives a version another `RevisionId`, as something of it has changed that is kept elsewhere.
pub(crate) async fn revise_version(app: &App, live: &Arc<Live>) -> Result<(), ApiError> {
    let changed = app.change(live, |version| {
        version.revise();
        Some(())
    });
    match changed.await {
        Ok(_) => Ok(()),
        Err(error) => Err(change_error(app, &ChangeError::Store(error))),
    }
}

/// A refused change in Lambda's words.
pub(crate) fn change_error(app: &App, error: &ChangeError) -> ApiError {
    match error {
        ChangeError::Exists(name) => ApiError::conflict(format!("Function already exist: {name}")),
        ChangeError::Missing(name) => ApiError::not_found(&app.arn(name)),
        ChangeError::Busy(name) => ApiError::update_in_progress(&app.arn(name)),
        ChangeError::OtherRevision(_) => ApiError::precondition_failed(),
        ChangeError::TooMany(_) => ApiError::invalid_parameter(error.to_string()),
        ChangeError::Inactive(_, state) => ApiError::inactive(state),
        ChangeError::OtherCode { given, current } => ApiError::invalid_parameter(format!(
            "CodeSHA256 ({given}) is different from current CodeSHA256 in $LATEST ({current}). Please try again with the CodeSHA256 in $LATEST."
        )),
        ChangeError::NoVersion(name, id) => ApiError::not_found(&format!("{}:{id}", app.arn(name))),
        ChangeError::Named(version, aliases) => ApiError::conflict(format!(
            "Unable to delete version {version} because the following aliases reference it: [{}]",
            aliases.join(", ")
        )),
        ChangeError::AliasExists(name, alias) => {
            ApiError::conflict(format!("Alias already exists: {}:{alias}", app.arn(name)))
        }
        ChangeError::NoAlias(name, alias) => {
            ApiError::missing(format!("Alias not found: {}:{alias}", app.arn(name)))
        }
        ChangeError::NoLayer(arn) => layers::no_version(arn),
        ChangeError::TooLargeTogether(sum) => ApiError::invalid_parameter(format!(
            "Function code combined with layers exceeds the maximum allowed size of {UNZIPPED_BYTES_MAX} bytes. The actual size is {sum} bytes."
        )),
        ChangeError::Storage(exceeded) => ApiError::code_storage_exceeded(&exceeded.to_string()),
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
    fn dice_are_shares() {
        assert!(
            (0..1000)
                .map(|_| dice())
                .all(|share| (0.0..1.0).contains(&share))
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
