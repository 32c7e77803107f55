//! A client of one gateway: the Lambda API where it says what is needed, Thaw's own routes for the rest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use thaw_api::auth::signer::Signer;
use thaw_api::clock;
use thaw_api::record::Settings;
use thaw_api::tls::{self, Trust};
use thaw_api_types::keys::{ChangeKeyRequest, CreateKeyRequest, CreatedKey, KeyList};
use thaw_api_types::lambda::GetFunctionResponse;
use thaw_api_types::thaw::{ListResponse, ProgressEvent};
use url::{Position, Url};

use super::credentials::ID_VARIABLE;
use super::near::nearest;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
pub const FUNCTIONS: &str = "/2015-03-31/functions";
const KEYS: &str = "/thaw/v1/keys";

const NOT_FOUND: &str = "ResourceNotFoundException";

/// Lambda demands a role; Thaw has no use for one.
pub const ROLE: &str = "arn:aws:iam::000000000000:role/thaw";

/// What `deploy` sends.
pub struct Deployment {
    /// Function name.
    pub name: String,
    /// The code.
    pub zip: Vec<u8>,
    /// ARNs of its layers' versions.
    pub layers: Vec<String>,
    /// Everything else.
    pub settings: Settings,
}

impl Deployment {
    /// A Python function `app.handler` with room to spare.
    pub fn python(name: &str, zip: Vec<u8>) -> Self {
        let (runtime, handler, role) = ("python3.11".into(), "app.handler".into(), ROLE.into());
        let (description, environment) = (String::new(), None);
        let settings = Settings {
            runtime,
            handler,
            role,
            description,
            timeout_seconds: 60,
            memory_mib: 128,
            environment,
            snap_start: false,
            layers: Vec::new(),
            ephemeral_mib: thaw_api::engine::EPHEMERAL_MIB_DEFAULT,
            logging: thaw_api::record::Logging::default(),
            tracing: thaw_api::record::Tracing::default(),
            network: None,
        };
        Self {
            name: name.to_owned(),
            zip,
            layers: Vec::new(),
            settings,
        }
    }
}

/// Whether a function was created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It was.
    New,
    /// One of that name was there, and is as it was.
    Exists,
}

/// A function's answer.
pub struct Answer {
    /// `X-Amz-Function-Error`.
    pub function_error: Option<String>,
    /// Decoded log tail.
    pub log: String,
    /// `Server-Timing`, when it was asked for.
    pub timing: Option<String>,
    /// `X-Thaw-Start`: how the sandbox was had.
    pub start: Option<String>,
    /// The body.
    pub payload: Vec<u8>,
}

/// One gateway.
#[derive(Clone)]
pub struct Client {
    endpoint: String,
    http: reqwest::Client,
    signer: Option<Signer>,
}

impl Client {
    /// A client of the gateway at `endpoint`, an `http://` URL; nothing is sent yet.
    pub fn new(endpoint: &str) -> anyhow::Result<Self> {
        Self::over(endpoint, &Trust::default())
    }

    /// The same of an `https://` URL, too, which trusts this machine's authorities and those in this file.
    pub fn trusting(endpoint: &str, authorities: Option<&Path>) -> anyhow::Result<Self> {
        if !endpoint.starts_with("https://") {
            return Self::new(endpoint);
        }
        let trust = Trust::load(authorities)
            .context("cannot tell whom to trust: name a file of certificates with --ca")?;
        Self::over(endpoint, &trust)
    }

    fn over(endpoint: &str, trust: &Trust) -> anyhow::Result<Self> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let plain = Url::parse(&endpoint);
        let is_web = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
        ensure!(
            plain.as_ref().is_ok_and(is_web),
            "{endpoint} is no gateway's address: write --endpoint or THAW_ENDPOINT as http://HOST:PORT"
        );
        let http = trust.client(|http| http.connect_timeout(CONNECT_TIMEOUT))?;
        Ok(Self {
            endpoint,
            http,
            signer: None,
        })
    }

    /// The same, with requests signed if there is a key.
    #[must_use]
    pub fn signed_by(self, signer: Option<Signer>) -> Self {
        Self { signer, ..self }
    }

    /// Whether requests are signed.
    pub fn signs(&self) -> bool {
        self.signer.is_some()
    }

    /// Whether anything listens there.
    pub async fn answers(&self) -> anyhow::Result<bool> {
        match self.request(Method::GET, "/healthz").send().await {
            Err(error) if error.is_connect() && tls::failure(&error).is_none() => Ok(false),
            answer => answer
                .map(|_| true)
                .with_context(|| format!("the gateway at {} did not answer", self.endpoint)),
        }
    }

    /// Makes a key.
    pub async fn create_key(&self, request: &CreateKeyRequest) -> anyhow::Result<CreatedKey> {
        let request = self.request(Method::POST, KEYS).json(request);
        let answer = self.answer(request).await?;
        let made = answer.json().await;
        made.context("the gateway's key is malformed")
    }

    /// Every key.
    pub async fn keys(&self) -> anyhow::Result<KeyList> {
        let answer = self.answer(self.request(Method::GET, KEYS)).await?;
        let list = answer.json().await;
        list.context("the gateway's list of keys is malformed")
    }

    /// Removes a key.
    pub async fn remove_key(&self, id: &str) -> anyhow::Result<()> {
        let request = self.request(Method::DELETE, &format!("{KEYS}/{id}"));
        self.answer(request).await.map(drop)
    }

    /// Lets a key in, or not any more, or gives it other limits.
    pub async fn change_key(&self, id: &str, change: &ChangeKeyRequest) -> anyhow::Result<()> {
        let request = self.request(Method::PUT, &format!("{KEYS}/{id}"));
        let request = request.json(change);
        self.answer(request).await.map(drop)
    }

    /// The gateway's address.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Whether functions can be invoked; the reason if not.
    pub async fn healthy(&self) -> anyhow::Result<()> {
        self.answer(self.request(Method::GET, "/healthz"))
            .await
            .map(drop)
    }

    /// Creates the function, or gives an existing one new code and configuration.
    pub async fn deploy(&self, deployment: &Deployment) -> anyhow::Result<()> {
        if self.create(deployment).await? == Created::Exists {
            self.configure(deployment).await?;
            self.settled(&deployment.name).await?;
            self.upload(&deployment.name, &deployment.zip).await?;
        }
        Ok(())
    }

    /// Creates the function unless there is one of that name.
    pub async fn create(&self, deployment: &Deployment) -> anyhow::Result<Created> {
        let mut body = configuration(deployment);
        body["FunctionName"] = deployment.name.clone().into();
        body["Code"] = json!({ "ZipFile": STANDARD.encode(&deployment.zip) });
        let request = self.request(Method::POST, FUNCTIONS).json(&body);
        let answer = self.send(request).await?;
        if answer.status() == StatusCode::CONFLICT {
            return Ok(Created::Exists);
        }
        self.checked(answer).await.map(|_| Created::New)
    }

    /// Gives a function another configuration.
    pub async fn configure(&self, deployment: &Deployment) -> anyhow::Result<()> {
        let path = format!("{FUNCTIONS}/{}/configuration", deployment.name);
        let request = self.request(Method::PUT, &path);
        let request = request.json(&configuration(deployment));
        self.answer(request).await.map(drop)
    }

    /// Gives a function other code.
    pub async fn upload(&self, name: &str, zip: &[u8]) -> anyhow::Result<()> {
        let request = self.request(Method::PUT, &format!("{FUNCTIONS}/{name}/code"));
        let request = request.json(&json!({ "ZipFile": STANDARD.encode(zip) }));
        self.answer(request).await.map(drop)
    }

    /// A function as it is, if there is one of that name.
    pub async fn function(&self, name: &str) -> anyhow::Result<Option<GetFunctionResponse>> {
        let request = self.request(Method::GET, &format!("{FUNCTIONS}/{name}"));
        let answer = self.send(request).await?;
        if answer.status() == StatusCode::NOT_FOUND && error_type(&answer) == NOT_FOUND {
            return Ok(None);
        }
        let found = self.checked(answer).await?.json().await;
        found.context("the gateway's function is malformed")
    }

    /// Waits until no update of the function is in progress.
    pub async fn settled(&self, name: &str) -> anyhow::Result<()> {
        let mut events = self.progress(name).await?;
        while let Some(event) = events.next().await {
            if event?.done {
                break;
            }
        }
        Ok(())
    }

    /// An operation that answers JSON.
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<T> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = self.answer(request).await?.json().await;
        answer.context("the gateway's answer is malformed")
    }

    /// An operation without an answer.
    pub async fn call_empty(&self, method: Method, path: &str) -> anyhow::Result<()> {
        self.answer(self.request(method, path)).await.map(drop)
    }

    /// The steps of the function's newest deployment, those that are over included.
    pub async fn progress(
        &self,
        name: &str,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<ProgressEvent>>> {
        self.version_progress(name, "$LATEST").await
    }

    /// The same of a version.
    pub async fn version_progress(
        &self,
        name: &str,
        version: &str,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<ProgressEvent>>> {
        let path = format!("/thaw/v1/functions/{name}/progress?version={version}");
        let answer = self.answer(self.request(Method::GET, &path)).await?;
        Ok(lines(answer)
            .map(|line| {
                serde_json::from_slice(&line?).context("the gateway's progress is malformed")
            })
            .boxed())
    }

    /// Hands a function an event that it works on later; answers the request's id.
    pub async fn send_event(&self, name: &str, payload: Vec<u8>) -> anyhow::Result<String> {
        let request = self.request(Method::POST, &format!("{FUNCTIONS}/{name}/invocations"));
        let request = request.header("X-Amz-Invocation-Type", "Event");
        let answer = self.answer(request.body(payload)).await?;
        let id = answer.headers().get("x-amzn-requestid");
        let id = id.and_then(|id| id.to_str().ok()).map(str::to_owned);
        id.context("the gateway's answer has no request id")
    }

    /// Calls a function.
    pub async fn invoke(
        &self,
        name: &str,
        payload: Vec<u8>,
        measured: bool,
    ) -> anyhow::Result<Answer> {
        let mut request = self.request(Method::POST, &format!("{FUNCTIONS}/{name}/invocations"));
        request = request.header("X-Amz-Log-Type", "Tail").body(payload);
        if measured {
            request = request.header("X-Thaw-Timing", "1");
        }
        let answer = self.answer(request).await?;
        let header = |name: &str| {
            answer
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let log = header("x-amz-log-result")
            .and_then(|text| STANDARD.decode(text).ok())
            .unwrap_or_default();
        let (function_error, timing) = (header("x-amz-function-error"), header("server-timing"));
        let start = header("x-thaw-start");
        let payload = answer
            .bytes()
            .await
            .context("the connection broke while the answer came")?
            .to_vec();
        Ok(Answer {
            function_error,
            timing,
            start,
            log: String::from_utf8_lossy(&log).into_owned(),
            payload,
        })
    }

    /// Every function with its state.
    pub async fn list(&self) -> anyhow::Result<ListResponse> {
        let answer = self
            .answer(self.request(Method::GET, "/thaw/v1/functions"))
            .await?;
        answer
            .json()
            .await
            .context("the gateway's list is malformed")
    }

    /// Removes a function.
    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.answer(self.request(Method::DELETE, &format!("{FUNCTIONS}/{name}")))
            .await
            .map(drop)
    }

    /// What a function wrote: the last `tail` lines, then, if `follow`, whatever comes.
    pub async fn logs(
        &self,
        name: &str,
        follow: bool,
        tail: u32,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<Vec<u8>>>> {
        let path = format!("/thaw/v1/functions/{name}/logs?follow={follow}&tail={tail}");
        let answer = self.answer(self.request(Method::GET, &path)).await?;
        Ok(answer
            .bytes_stream()
            .map(|chunk| Ok(chunk.context("the connection broke")?.to_vec()))
            .boxed())
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.endpoint))
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let mut request = request.build().context("this is no request")?;
        if let Some(signer) = &self.signer {
            sign(signer, &mut request).context("this request cannot be signed")?;
        }
        self.http.execute(request).await.map_err(|error| {
            if let Some(why) = tls::failure(&error) {
                anyhow!("no TLS with {}: {why}", self.endpoint)
            } else if error.is_connect() {
                anyhow!("no gateway answers at {}: start one with `thaw up`, or name another with --endpoint", self.endpoint)
            } else {
                let is_plain = self.endpoint.starts_with("http://");
                let secure = if is_plain { "; if it speaks TLS, write https://" } else { "" };
                anyhow!(error).context(format!("the gateway at {} did not answer{secure}", self.endpoint))
            }
        })
    }

    async fn answer(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        self.checked(self.send(request).await?).await
    }

    /// An error of the gateway becomes an error with the gateway's own message; for a function that is not there, with
    /// the name that was probably meant.
    async fn checked(&self, answer: Response) -> anyhow::Result<Response> {
        let unknown = answer.status() == StatusCode::NOT_FOUND;
        let error = match checked(answer).await {
            Err(error) if unknown => error,
            other => return other,
        };
        let text = error.to_string();
        // As the Lambda API says it, and as Thaw's own routes do.
        let named = text.rsplit_once(":function:");
        let Some((_, name)) = named.or_else(|| text.rsplit_once("no function \"")) else {
            return Err(error);
        };
        let name = name.split([' ', ':', '"']).next().unwrap_or_default();
        let request = self.request(Method::GET, "/thaw/v1/functions");
        let list = checked(self.send(request).await?).await;
        let known: ListResponse = match list {
            Ok(list) => list.json().await.unwrap_or_default(),
            Err(_) => return Err(error), // this key may not list
        };
        let names = known.functions.iter().map(|known| known.name.as_str());
        if known.functions.iter().any(|known| known.name == name) {
            return Err(error); // a version or an alias is missing
        }
        Err(match nearest(name, names) {
            Some(meant) => anyhow!("{error}: did you mean {meant}?"),
            None => anyhow!(
                "{error}: `thaw ls` lists what there is, `thaw deploy DIR --name {name}` makes it"
            ),
        })
    }
}

/// Signs what will be sent, as it will be sent.
fn sign(signer: &Signer, request: &mut reqwest::Request) -> Option<()> {
    let url = request.url();
    let uri = url[Position::BeforePath..Position::AfterQuery]
        .parse()
        .ok()?;
    let host = match (url.host_str()?, url.port()) {
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.to_owned(),
    };
    let (method, now) = (request.method().clone(), clock::unix_ms() / 1000);
    let body = request
        .body()
        .map_or(Some(&[][..]), |body| body.as_bytes())?
        .to_vec();
    signer.sign(&method, &uri, &host, request.headers_mut(), &body, now)
}

/// A configuration as the gateway takes it.
fn configuration(deployment: &Deployment) -> Value {
    let settings = &deployment.settings;
    let snap_start = if settings.snap_start {
        "PublishedVersions"
    } else {
        "None"
    };
    json!({
        "Runtime": settings.runtime, "Handler": settings.handler, "Role": settings.role, "Timeout": settings.timeout_seconds,
        "MemorySize": settings.memory_mib, "Environment": { "Variables": settings.environment.clone().unwrap_or_default() },
        "EphemeralStorage": { "Size": settings.ephemeral_mib }, "SnapStart": { "ApplyOn": snap_start },
        "Layers": deployment.layers,
        // Without any, this says so.
        "ThawNetwork": settings.network.clone().unwrap_or_default(),
    })
}

fn error_type(answer: &Response) -> &str {
    let kind = answer.headers().get("x-amzn-errortype");
    kind.and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// An error of the gateway becomes an error with the gateway's own message.
async fn checked(answer: Response) -> anyhow::Result<Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let kind = error_type(&answer).to_owned();
    let body = answer.text().await.unwrap_or_default();
    let document: Value = serde_json::from_str(&body).unwrap_or_default();
    let message = ["message", "Message"]
        .iter()
        .find_map(|name| document[name].as_str())
        .unwrap_or(body.trim());
    let kind = if kind.is_empty() {
        status.to_string()
    } else {
        kind
    };
    let hint = match kind.as_str() {
        "UnrecognizedClientException" => format!(
            ": the key is none of this gateway; {ID_VARIABLE}, where it is set, goes before the home's own key"
        ),
        "MissingAuthenticationTokenException" => format!(
            ": this gateway asks for a key; set {ID_VARIABLE} and AWS_SECRET_ACCESS_KEY, or use the gateway's own --home"
        ),
        _ => String::new(),
    };
    Err(anyhow!("{message} ({kind}){hint}"))
}

/// A body's lines as they come.
fn lines(answer: Response) -> BoxStream<'static, anyhow::Result<Vec<u8>>> {
    let parts = (answer.bytes_stream(), Vec::new());
    futures_util::stream::unfold(parts, |(mut chunks, mut buffer)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.drain(..=end).collect();
                return Some((Ok(line), (chunks, buffer)));
            }
            match chunks.next().await? {
                Ok(chunk) => buffer.extend_from_slice(&chunk),
                Err(error) => {
                    return Some((
                        Err(anyhow!(error).context("the connection broke")),
                        (chunks, buffer),
                    ));
                }
            }
        }
    })
    .boxed()
}
