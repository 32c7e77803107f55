//! `thaw versions` and `thaw alias`: what does not change, and names for it.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::json;
use thaw_api_types::lambda::{
    AliasConfiguration, FunctionConfiguration, ListAliasesResponse, ListVersionsResponse,
};

use super::Global;
use super::client::{Client, FUNCTIONS};
use super::output::{self, Format};

#[derive(Subcommand)]
pub enum VersionsCommand {
    /// Publish a function as it is now, under the next number.
    Publish(PublishArgs),
    /// List a function's versions.
    Ls(NameArgs),
    /// Remove versions.
    Rm(RmArgs),
}

#[derive(Args)]
pub struct NameArgs {
    /// Function name.
    name: String,
}

#[derive(Args)]
pub struct PublishArgs {
    /// Function name.
    name: String,
    /// What is different about it.
    #[arg(long)]
    description: Option<String>,
    /// Let this alias name it, once it is ready.
    #[arg(long)]
    alias: Option<String>,
}

#[derive(Args)]
pub struct RmArgs {
    /// Function name.
    name: String,
    /// Versions' numbers.
    #[arg(required = true)]
    versions: Vec<u64>,
}

pub async fn run(global: &Global, command: &VersionsCommand) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    match command {
        VersionsCommand::Publish(args) => publish(global, &client, args).await?,
        VersionsCommand::Ls(args) => {
            let path = format!("{FUNCTIONS}/{}/versions?MaxItems=10000", args.name);
            let list: ListVersionsResponse = client.call(Method::GET, &path, None).await?;
            if global.format() == Format::Json {
                output::json(&list)?;
            } else {
                let head = ["version", "modified", "memory", "code", "description"];
                output::table(&head, list.versions.iter().map(version_row));
            }
        }
        VersionsCommand::Rm(args) => {
            for version in &args.versions {
                // DeleteFunction says nothing of a version that is not there.
                let path = format!(
                    "{FUNCTIONS}/{}/configuration?Qualifier={version}",
                    args.name
                );
                let _: FunctionConfiguration = client.call(Method::GET, &path, None).await?;
                client
                    .delete(&format!("{}?Qualifier={version}", args.name))
                    .await?;
                println!("removed {}:{version}", args.name);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn version_row(version: &FunctionConfiguration) -> Vec<String> {
    vec![
        version.version.clone(),
        version.last_modified.clone(),
        format!("{} MiB", version.memory_size),
        output::bytes(version.code_size),
        version.description.clone(),
    ]
}

async fn publish(global: &Global, client: &Client, args: &PublishArgs) -> anyhow::Result<()> {
    let (description, alias) = (args.description.as_deref(), args.alias.as_deref());
    let made = publish_version(client, &args.name, description, alias).await?;
    if global.format() == Format::Json {
        output::json(&made)
    } else {
        println!("published {}:{}", args.name, made.version);
        Ok(())
    }
}

/// Publishes a function as it is now, waits until the version is ready, and lets the alias name it. Where nothing has
/// changed since the newest version, it is that one.
pub async fn publish_version(
    client: &Client,
    name: &str,
    description: Option<&str>,
    alias: Option<&str>,
) -> anyhow::Result<FunctionConfiguration> {
    let path = format!("{FUNCTIONS}/{name}/versions");
    let mut body = json!({});
    if let Some(text) = description {
        body["Description"] = text.into();
    }
    let made: FunctionConfiguration = client.call(Method::POST, &path, Some(&body)).await?;
    let mut events = client.version_progress(name, &made.version).await?;
    while let Some(event) = events.next().await {
        if let Some(error) = event?.error {
            anyhow::bail!("{name}:{} is not ready: {error}", made.version);
        }
    }
    if let Some(alias) = alias {
        set(client, name, alias, &made.version, None).await?;
    }
    Ok(made)
}

#[derive(Subcommand)]
pub enum AliasCommand {
    /// Make an alias, or let it name another version.
    Set(SetArgs),
    /// List a function's aliases.
    Ls(NameArgs),
    /// Remove an alias.
    Rm(RmAliasArgs),
}

#[derive(Args)]
pub struct SetArgs {
    /// Function name.
    name: String,
    /// The alias.
    alias: String,
    /// The version that it names.
    version: String,
    /// A second version and its share of invocations, as in 2=0.1.
    #[arg(long, value_name = "VERSION=SHARE", value_parser = canary)]
    canary: Option<(String, f64)>,
}

#[derive(Args)]
pub struct RmAliasArgs {
    /// Function name.
    name: String,
    /// The alias.
    alias: String,
}

fn canary(text: &str) -> Result<(String, f64), String> {
    let (version, share) = text.split_once('=').ok_or("write it as VERSION=SHARE")?;
    let share = share
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    let share = share.ok_or("the share is a number from 0 to 1")?;
    Ok((version.to_owned(), share))
}

pub async fn alias(global: &Global, command: &AliasCommand) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    match command {
        AliasCommand::Set(args) => {
            let canary = args.canary.clone();
            let alias = set(&client, &args.name, &args.alias, &args.version, canary).await?;
            if global.format() == Format::Json {
                output::json(&alias)?;
            } else {
                println!("{}:{} is version {}", args.name, args.alias, names(&alias));
            }
        }
        AliasCommand::Ls(args) => {
            let path = format!("{FUNCTIONS}/{}/aliases?MaxItems=10000", args.name);
            let list: ListAliasesResponse = client.call(Method::GET, &path, None).await?;
            if global.format() == Format::Json {
                output::json(&list)?;
            } else {
                let row = |alias: &AliasConfiguration| {
                    vec![alias.name.clone(), names(alias), alias.description.clone()]
                };
                output::table(
                    &["alias", "version", "description"],
                    list.aliases.iter().map(row),
                );
            }
        }
        AliasCommand::Rm(args) => {
            let path = format!("{FUNCTIONS}/{}/aliases/{}", args.name, args.alias);
            client.call_empty(Method::DELETE, &path).await?;
            println!("removed {}:{}", args.name, args.alias);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Versions that an alias names, for people.
fn names(alias: &AliasConfiguration) -> String {
    let first = &alias.function_version;
    let weights = alias.routing_config.as_ref();
    match weights.and_then(|routing| routing.additional_version_weights.iter().next()) {
        Some((second, share)) => format!("{first}, {:.1} % to {second}", share * 100.0),
        None => first.clone(),
    }
}

async fn set(
    client: &Client,
    name: &str,
    alias: &str,
    version: &str,
    canary: Option<(String, f64)>,
) -> anyhow::Result<AliasConfiguration> {
    let path = format!("{FUNCTIONS}/{name}/aliases");
    let weights: BTreeMap<String, f64> = canary.into_iter().collect();
    let mut body = json!({
        "FunctionVersion": version, "RoutingConfig": { "AdditionalVersionWeights": weights },
    });
    let known: ListAliasesResponse = client
        .call(Method::GET, &format!("{path}?MaxItems=10000"), None)
        .await?;
    if known.aliases.iter().any(|known| known.name == alias) {
        let path = format!("{path}/{alias}");
        return client.call(Method::PUT, &path, Some(&body)).await;
    }
    body["Name"] = alias.into();
    client.call(Method::POST, &path, Some(&body)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read() {
        assert_eq!(canary("2=0.1"), Ok(("2".to_owned(), 0.1)));
        for wrong in ["2", "2=", "2=1.5", "2=-1", "2=x"] {
            assert!(canary(wrong).is_err(), "{wrong}");
        }
    }
}
