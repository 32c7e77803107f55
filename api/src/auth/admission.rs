//! The way in: a request is taken apart, its signature and its key's permissions are checked, and it goes on with its body
//! in memory, or is refused in AWS's words.
//!
//! Everything that can be checked before the body is read is. A client that declares (and signs) its body's digest, or sends
//! none, is proven by then; boto3 declares nothing, so that a body must be read on the word of someone who only knows a key's
//! id: such bodies, all together, have [`super::room::BODIES_MIB_MAX`], and so have events of those who need no key.
//!
//! **Invariant:** no handler runs before signature, body and permission were checked
//! (`nothing_unsigned_altered_or_not_allowed_reaches_a_handler`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, HttpBody as _};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::middleware::Next;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::action::{Action, BodyKind, Need, Target};
use super::keys::AccessKey;
use super::quota::Quota;
use super::room::Room;
use super::sigv4::{Claim, Expected, Head, SignatureError, hex_digest};
use super::{Allow, Auth, links, pages, signer::SERVICE};
use crate::body::{self, BodyError};
use crate::function_url;
use crate::lambda::errors::{ApiError, CALLER_RATE};
use crate::lambda::names::FunctionRef;

/// From this size on a body is hashed on a thread of its own, bytes.
const HASH_INLINE_BYTES_MAX: usize = 1024 * 1024;

/// Who a request is from, as handlers may ask for it.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its key.
    pub access_key_id: String,
    /// `arn:aws:iam::…:user/NAME`.
    pub user_arn: String,
    /// What the key may use.
    pub quota: Quota,
}

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its signature.
    Signature(SignatureError),
    /// Its key may not do this.
    Denied(String),
    /// Its body, or too many requests of its key.
    Error(ApiError),
}

/// In front of every route: with auth on, all but the open ones are for signed requests; with auth off, for whom no web page has sent.
pub async fn guard(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Response<Body> {
    if is_open(request.uri().path()) {
        return next.run(request).await;
    }
    if !auth.is_required() {
        return match pages::sent_by_a_page(request.headers()) {
            Some(page) => Refusal::Denied(pages::refusal(&page)).into_response(),
            None => next.run(request).await,
        };
    }
    let action = Action::of(
        request.method(),
        request.uri().path(),
        request.uri().query().unwrap_or_default(),
    );
    let (request, _code) = match admit(&auth, request, &action).await {
        Ok(admitted) => admitted,
        Err(refusal) => return refusal.into_response(),
    };
    if !links::GIVEN_BY.contains(&action.name.as_str()) {
        return next.run(request).await;
    }
    let host = links::host(request.headers());
    links::presigned(&auth, host, next.run(request).await).await
}

/// Health says nothing of functions, and function URLs have an authorization of their own.
fn is_open(path: &str) -> bool {
    // Without a name it is no function URL, and no route of theirs takes it.
    let is_url = |rest: &str| !rest.is_empty() && !rest.starts_with('/');
    path == "/healthz" || path.strip_prefix(function_url::PREFIX).is_some_and(is_url)
}

/// Lets a call of a function URL with auth `AWS_IAM` in, or says no as AWS does. The request goes on with its body in memory
/// and a [`Caller`] among its extensions.
///
/// # Errors
/// The answer for the client.
pub async fn authorize_function_url(
    auth: &Auth,
    request: Request,
    function: &str,
) -> Result<Request, Response<Body>> {
    let admitted = admit(auth, request, &Action::url(function)).await;
    admitted.map(|(request, _)| request).map_err(|refusal| match refusal {
        Refusal::Signature(SignatureError::Missing) | Refusal::Denied(_) => {
            let text = "Forbidden. For troubleshooting Function URL authorization issues, see: https://docs.aws.amazon.com/lambda/latest/dg/urls-auth.html";
            answer("AccessDeniedException", &json!({ "Message": text }))
        }
        other => other.into_response(),
    })
}

async fn admit(
    auth: &Auth,
    request: Request,
    action: &Action,
) -> Result<(Request, Option<Room>), Refusal> {
    let (mut parts, body) = request.into_parts();
    let head = Head {
        method: &parts.method,
        uri: &parts.uri,
        headers: &parts.headers,
    };
    let (claim, key, is_proven) = before_the_body(auth, head, action, body.is_end_stream())?;
    let quota = auth.quota(&key);
    if is_proven {
        pace(&quota)?;
    }
    let sender = parts.extensions.get::<ConnectInfo<SocketAddr>>();
    let sender = sender.map(|info| info.0.ip());
    let room = auth.room(sender, &parts.headers, action.limit.bytes).await;
    let room = room.map_err(Refusal::Error)?;
    let bytes = body::read(&parts.headers, body, action.limit.bytes)
        .await
        .map_err(|error| Refusal::Error(refused_body(&error, action)))?;
    let digest = digest_of(&bytes).await?;
    claim
        .verify(&key.secret, &digest)
        .map_err(Refusal::Signature)?;
    let target = named_in(&bytes, &action.target);
    auth.check(&key, action, &target)?;
    if !is_proven {
        pace(&quota)?;
    }
    parts.extensions.insert(Caller {
        access_key_id: key.id.clone(),
        user_arn: auth.user_arn(&key),
        quota,
    });
    let room = room.filter(|_| action.limit.kind == BodyKind::Code);
    Ok((Request::from_parts(parts, Body::from(bytes)), room))
}

/// Counts a request of a key that has proven to be its own: who only knows its id uses up nothing of it.
fn pace(quota: &Quota) -> Result<(), Refusal> {
    quota.pace(Instant::now()).map_err(|wait| {
        let rate = quota.limits().rate.unwrap_or_default();
        let why = format!("this key may send {rate} requests a second");
        Refusal::Error(ApiError::throttled(CALLER_RATE, &why).retried_after(wait))
    })
}

/// All checks that need no body; the signature's own too, when the body's digest is known: `true` then, and all is proven.
fn before_the_body(
    auth: &Auth,
    head: Head<'_>,
    action: &Action,
    is_empty: bool,
) -> Result<(Claim, Arc<AccessKey>, bool), Refusal> {
    let expected = Expected {
        region: &auth.region,
        service: SERVICE,
        now_unix_seconds: crate::clock::unix_ms().div_euclid(1000),
    };
    let claim = Claim::read(head, expected).map_err(Refusal::Signature)?;
    // Nobody gives out session tokens here: one that comes belongs to another cloud's key.
    let key = auth
        .find(claim.access_key_id())
        .filter(|_| !claim.has_token())
        .ok_or(Refusal::Signature(SignatureError::UnknownKey))?;
    let empty = is_empty.then(|| hex_digest(b""));
    let known = claim.declared_digest().or(empty.as_deref());
    if let Some(digest) = known {
        claim
            .verify(&key.secret, digest)
            .map_err(Refusal::Signature)?;
        if action.target != Target::InBody {
            auth.check(&key, action, &action.target)?;
        }
    }
    let is_proven = known.is_some() && action.target != Target::InBody;
    Ok((claim, key, is_proven))
}

async fn digest_of(bytes: &Bytes) -> Result<String, Refusal> {
    if bytes.len() <= HASH_INLINE_BYTES_MAX {
        return Ok(hex_digest(bytes));
    }
    let bytes = bytes.clone();
    tokio::task::spawn_blocking(move || hex_digest(&bytes))
        .await
        .map_err(|_| Refusal::Error(ApiError::service("the body could not be hashed")))
}

/// The function that a body names. One without a legible name is for keys that may do everything; its handler refuses it.
fn named_in(body: &[u8], target: &Target) -> Target {
    #[derive(Deserialize)]
    struct Named {
        #[serde(rename = "FunctionName")]
        name: String,
    }
    if *target != Target::InBody {
        return target.clone();
    }
    serde_json::from_slice::<Named>(body)
        .ok()
        .and_then(|named| FunctionRef::parse(&named.name, None).ok())
        .map_or(Target::Everything, |found| Target::Function(found.name))
}

fn refused_body(error: &BodyError, action: &Action) -> ApiError {
    let operation = action.name.trim_start_matches("lambda:");
    match error {
        BodyError::TooLarge(limit) if action.limit.kind == BodyKind::Event => {
            ApiError::request_too_large(*limit)
        }
        BodyError::TooLarge(limit) => ApiError::entity_too_large(*limit, operation),
        other => ApiError::invalid_content(other.to_string()),
    }
}

impl Auth {
    /// Whether a key may do this.
    fn check(&self, key: &AccessKey, action: &Action, target: &Target) -> Result<(), Refusal> {
        let may = match key.allow {
            Allow::Invoke => Need::Invoke,
            Allow::Manage => Need::Manage,
            Allow::All => Need::All,
        };
        let (covers, resource) = match target {
            Target::Function(name) => {
                let (region, account) = (&self.region, &self.account_id);
                let arn = format!("arn:aws:lambda:{region}:{account}:function:{name}");
                (key.covers(name), arn)
            }
            Target::Everything | Target::InBody => (key.covers_all(), "*".to_owned()),
        };
        if covers && action.need <= may {
            return Ok(());
        }
        let (user, name) = (self.user_arn(key), &action.name);
        Err(Refusal::Denied(format!(
            "User: {user} is not authorized to perform: {name} on resource: {resource} because no identity-based policy allows the {name} action"
        )))
    }

    fn user_arn(&self, key: &AccessKey) -> String {
        format!("arn:aws:iam::{}:user/{}", self.account_id, key.name)
    }
}

impl Refusal {
    /// As Lambda answers.
    #[must_use]
    pub fn into_response(self) -> Response<Body> {
        match self {
            Self::Signature(error) => {
                let code = match error {
                    SignatureError::Missing => "MissingAuthenticationTokenException",
                    SignatureError::Incomplete(_) => "IncompleteSignatureException",
                    SignatureError::Invalid(_) => "InvalidSignatureException",
                    SignatureError::UnknownKey => "UnrecognizedClientException",
                };
                answer(code, &json!({ "message": error.to_string() }))
            }
            Self::Denied(text) => answer("AccessDeniedException", &json!({ "Message": text })),
            Self::Error(error) => error.into_response(&Uuid::new_v4().to_string()),
        }
    }
}

/// 403 in Lambda's shape.
fn answer(code: &'static str, body: &serde_json::Value) -> Response<Body> {
    tracing::debug!(code, "request refused");
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::FORBIDDEN;
    let headers = response.headers_mut();
    let json = HeaderValue::from_static("application/json");
    headers.insert(header::CONTENT_TYPE, json);
    headers.insert("x-amzn-errortype", HeaderValue::from_static(code));
    if let Ok(id) = HeaderValue::from_str(&Uuid::new_v4().to_string()) {
        headers.insert("x-amzn-requestid", id);
    }
    response
}
