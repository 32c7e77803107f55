//! `thaw layers`: folders that functions share.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::json;
use thaw_api_types::lambda::{
    LayerVersionItem, LayerVersionResponse, ListLayerVersionsResponse, ListLayersResponse,
};

use super::client::Client;
use super::output::{self, Format};
use super::{Global, package};

const LAYERS: &str = "/2018-10-31/layers";

#[derive(Subcommand)]
pub enum LayersCommand {
    /// Publish a folder or a zip, which functions see at /opt, under the next number.
    Publish(PublishArgs),
    /// List layers, or one layer's versions.
    Ls(LsArgs),
    /// Remove versions; functions that have one keep it.
    Rm(RmArgs),
}

#[derive(Args)]
pub struct PublishArgs {
    /// Layer name.
    name: String,
    /// Folder or zip; python/ in it is where Python finds modules, bin/ is in PATH, lib/ is where libraries are found.
    content: PathBuf,
    /// What it is.
    #[arg(long)]
    description: Option<String>,
    /// Runtime that it is for; may be given several times.
    #[arg(long, value_name = "RUNTIME")]
    runtime: Vec<String>,
}

#[derive(Args)]
pub struct LsArgs {
    /// Layer name.
    name: Option<String>,
}

#[derive(Args)]
pub struct RmArgs {
    /// Layer name.
    name: String,
    /// Versions' numbers.
    #[arg(required = true)]
    versions: Vec<u64>,
}

pub async fn run(global: &Global, command: &LayersCommand) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    match command {
        LayersCommand::Publish(args) => publish(global, &client, args).await?,
        LayersCommand::Ls(args) => ls(global, &client, args.name.as_deref()).await?,
        LayersCommand::Rm(args) => {
            for version in &args.versions {
                let path = format!("{LAYERS}/{}/versions/{version}", args.name);
                client.call_empty(Method::DELETE, &path).await?;
                println!("removed {}:{version}", args.name);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn publish(global: &Global, client: &Client, args: &PublishArgs) -> anyhow::Result<()> {
    let zip = package::zip_of(&args.content)?;
    let mut body = json!({ "Content": { "ZipFile": STANDARD.encode(zip) } });
    if let Some(text) = &args.description {
        body["Description"] = text.clone().into();
    }
    if !args.runtime.is_empty() {
        body["CompatibleRuntimes"] = args.runtime.clone().into();
    }
    let path = format!("{LAYERS}/{}/versions", args.name);
    let made: LayerVersionResponse = client.call(Method::POST, &path, Some(&body)).await?;
    if global.format() == Format::Json {
        return output::json(&made);
    }
    let version = format!("{}:{}", args.name, made.version.version);
    println!("published {version}\n  thaw deploy … --layer {version}");
    Ok(())
}

async fn ls(global: &Global, client: &Client, name: Option<&str>) -> anyhow::Result<()> {
    let is_json = global.format() == Format::Json;
    match name {
        None => {
            let layers = layers(client).await?;
            if is_json {
                return output::json(&layers);
            }
            let rows = layers.layers.into_iter();
            let rows = rows.map(|layer| row(layer.layer_name, &layer.latest_matching_version));
            output::table(&["layer", "newest", "published", "description"], rows);
        }
        Some(name) => {
            let versions = versions(client, name).await?;
            if is_json {
                return output::json(&versions);
            }
            let rows = versions.layer_versions.iter();
            let rows = rows.map(|version| row(name.to_owned(), version));
            output::table(&["layer", "version", "published", "description"], rows);
        }
    }
    Ok(())
}

fn row(name: String, version: &LayerVersionItem) -> Vec<String> {
    vec![
        name,
        version.version.to_string(),
        version.created_date.clone(),
        version.description.clone(),
    ]
}

/// All pages.
async fn layers(client: &Client) -> anyhow::Result<ListLayersResponse> {
    let mut all = ListLayersResponse::default();
    let mut path = LAYERS.to_owned();
    loop {
        let page: ListLayersResponse = client.call(Method::GET, &path, None).await?;
        all.layers.extend(page.layers);
        match page.next_marker {
            Some(marker) => path = format!("{LAYERS}?Marker={marker}"),
            None => return Ok(all),
        }
    }
}

/// All pages.
async fn versions(client: &Client, name: &str) -> anyhow::Result<ListLayerVersionsResponse> {
    let mut all = ListLayerVersionsResponse::default();
    let first = format!("{LAYERS}/{name}/versions");
    let mut path = first.clone();
    loop {
        let page: ListLayerVersionsResponse = client.call(Method::GET, &path, None).await?;
        all.layer_versions.extend(page.layer_versions);
        match page.next_marker {
            Some(marker) => path = format!("{first}?Marker={marker}"),
            None => return Ok(all),
        }
    }
}

/// The ARN of a layer version that is named by it, or as NAME:VERSION.
pub async fn arn(client: &Client, text: &str) -> anyhow::Result<String> {
    if text.starts_with("arn:") {
        return Ok(text.to_owned());
    }
    let (name, version) = text
        .split_once(':')
        .with_context(|| format!("{text} names no layer version: write it as NAME:VERSION"))?;
    let path = format!("{LAYERS}/{name}/versions/{version}");
    let found: LayerVersionResponse = client
        .call(Method::GET, &path, None)
        .await
        .with_context(|| format!("there is no layer version {text}; see `thaw layers ls`"))?;
    Ok(found.version.layer_version_arn)
}
