//! `thaw url`: where functions answer HTTP, and who may call them there.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use reqwest::Method;
use serde_json::json;
use thaw_api_types::lambda::{FunctionUrlConfig, ListFunctionUrlConfigsResponse};

use super::Global;
use super::client::Client;
use super::output::{self, Format};

const URLS: &str = "/2021-10-31/functions";

#[derive(Subcommand)]
pub enum UrlCommand {
    /// Configure the URL of a function, or of an alias: NAME or NAME:ALIAS.
    Set(SetArgs),
    /// List a function's configured URLs.
    Ls {
        /// Function name.
        name: String,
    },
    /// Remove a URL's configuration: the function answers at its path as before.
    Rm {
        /// NAME or NAME:ALIAS.
        name: String,
    },
}

#[derive(Args)]
pub struct SetArgs {
    /// NAME or NAME:ALIAS.
    name: String,
    /// Who may call it.
    #[arg(long, value_enum, default_value_t = Auth::None)]
    auth: Auth,
    /// An origin whose pages may read answers, or `*`; may be given several times.
    #[arg(long, value_name = "ORIGIN")]
    allow_origin: Vec<String>,
    /// A method that such pages may use, or `*`; may be given several times.
    #[arg(long, value_name = "METHOD", default_value = "*")]
    allow_method: Vec<String>,
    /// A header that such pages may send, or `*`; may be given several times.
    #[arg(long, value_name = "HEADER")]
    allow_header: Vec<String>,
    /// Send answers on piece by piece, as the function writes them.
    #[arg(long)]
    streaming: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Auth {
    /// Anyone.
    None,
    /// Who signs with a key, wherever the gateway asks for signatures.
    Iam,
}

pub async fn run(global: &Global, command: &UrlCommand) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    match command {
        UrlCommand::Set(args) => {
            let mut body = json!({
                "AuthType": match args.auth { Auth::None => "NONE", Auth::Iam => "AWS_IAM" },
                "Cors": {}, "InvokeMode": if args.streaming { "RESPONSE_STREAM" } else { "BUFFERED" },
            });
            if !args.allow_origin.is_empty() {
                body["Cors"] = json!({
                    "AllowOrigins": args.allow_origin, "AllowMethods": args.allow_method, "AllowHeaders": args.allow_header,
                });
            }
            let url = put(&client, &args.name, &body).await?;
            show(global, &[url])?;
        }
        UrlCommand::Ls { name } => {
            let path = format!("{URLS}/{name}/urls");
            let list: ListFunctionUrlConfigsResponse =
                client.call(Method::GET, &path, None).await?;
            show(global, &list.function_url_configs)?;
        }
        UrlCommand::Rm { name } => {
            client
                .call_empty(Method::DELETE, &format!("{URLS}/{name}/url"))
                .await?;
            println!("removed the URL of {name}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Configures the URL of NAME or NAME:ALIAS.
pub async fn put(
    client: &Client,
    name: &str,
    body: &serde_json::Value,
) -> anyhow::Result<FunctionUrlConfig> {
    let method = match get(client, name).await? {
        Some(_) => Method::PUT,
        None => Method::POST,
    };
    let path = format!("{URLS}/{name}/url");
    client.call(method, &path, Some(body)).await
}

/// The URL of NAME or NAME:ALIAS, if it is configured.
pub async fn get(client: &Client, name: &str) -> anyhow::Result<Option<FunctionUrlConfig>> {
    let function = name.split(':').next().unwrap_or_default();
    let path = format!("{URLS}/{function}/urls");
    let known: ListFunctionUrlConfigsResponse = client.call(Method::GET, &path, None).await?;
    let end = format!(":function:{name}");
    let mut urls = known.function_url_configs.into_iter();
    Ok(urls.find(|url| url.function_arn.ends_with(&end)))
}

fn show(global: &Global, urls: &[FunctionUrlConfig]) -> anyhow::Result<()> {
    if global.format() == Format::Json {
        return output::json(&urls);
    }
    let origins = |url: &FunctionUrlConfig| {
        let cors = url.cors.as_ref();
        let origins = cors.and_then(|cors| cors.allow_origins.clone());
        origins.unwrap_or_default().join(", ")
    };
    let row = |url: &FunctionUrlConfig| {
        vec![
            url.function_url.clone(),
            url.auth_type.clone(),
            origins(url),
        ]
    };
    output::table(&["url", "auth", "origins"], urls.iter().map(row));
    Ok(())
}
