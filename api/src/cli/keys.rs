//! `thaw keys`: asks the gateway, or, while none runs, writes into the home's database itself.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use thaw_api::GatewayConfig;
use thaw_api::auth::{Allow, Auth, AuthMode, keys};
use thaw_api::store::Store;
use thaw_api_types::keys::{
    ChangeKeyRequest, CreateKeyRequest, CreatedKey, KeyLimits, KeyList, KeySummary,
};

use super::Global;
use super::client::Client;
use super::output::{self, Format};

#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make a key; its secret is shown this once.
    Create(CreateArgs),
    /// List keys.
    Ls,
    /// Remove keys.
    Rm(IdArgs),
    /// Let keys in no more; they are kept.
    Disable(IdArgs),
    /// Let disabled keys in again.
    Enable(IdArgs),
    /// Give a key other limits; those not named stay.
    Limit(LimitArgs),
}

#[derive(Args)]
pub struct CreateArgs {
    /// What the key is called in lists and refusals.
    #[arg(long)]
    name: Option<String>,
    /// What it may do.
    #[arg(long, value_enum, default_value_t = AllowChoice::Manage)]
    allow: AllowChoice,
    /// Functions it may do it with: a name with * and ?; all unless given.
    #[arg(long, value_name = "PATTERN")]
    function: Option<String>,
    #[command(flatten)]
    limits: Limits,
}

#[derive(Args)]
pub struct LimitArgs {
    /// Access key id.
    id: String,
    #[command(flatten)]
    limits: Limits,
}

/// Numbers, or `none`.
#[derive(Args)]
#[group(multiple = true)]
struct Limits {
    /// Requests a second; or none, as all of these.
    #[arg(long, value_name = "COUNT")]
    rate: Option<Limit>,
    /// Requests at once after a pause; a second's unless given.
    #[arg(long, value_name = "COUNT")]
    burst: Option<Limit>,
    /// Invocations at once, of all functions.
    #[arg(long, value_name = "COUNT")]
    concurrency: Option<Limit>,
    /// Memory of the functions that these run, as configured.
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<Limit>,
    /// Code that is stored with the key.
    #[arg(long, value_name = "MIB")]
    storage_mib: Option<Limit>,
}

impl Limits {
    /// Over those that a key has.
    fn over(&self, limits: KeyLimits) -> KeyLimits {
        let over = |named: Option<Limit>, had| named.map_or(had, |Limit(limit)| limit);
        let rate = over(self.rate, limits.rate);
        KeyLimits {
            // Without a rate there is nothing that it is a burst of.
            burst: over(self.burst, limits.burst.filter(|_| rate.is_some())),
            rate,
            concurrency: over(self.concurrency, limits.concurrency),
            memory_mib: over(self.memory_mib, limits.memory_mib),
            storage_mib: over(self.storage_mib, limits.storage_mib),
        }
    }
}

/// A number, or `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit(Option<u32>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|number| *number > 0);
        match text {
            "none" => Ok(Self(None)),
            _ => number(text)
                .map(|number| Self(Some(number)))
                .ok_or_else(|| "a number from 1 on, or none".to_owned()),
        }
    }
}

#[derive(Args)]
pub struct IdArgs {
    /// Access key ids.
    #[arg(required = true)]
    ids: Vec<String>,
}

/// What a key may do.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum AllowChoice {
    /// Call functions.
    Invoke,
    /// Everything that is done with functions.
    Manage,
    /// Everything, keys included.
    All,
}

impl From<AllowChoice> for Allow {
    fn from(choice: AllowChoice) -> Self {
        match choice {
            AllowChoice::Invoke => Self::Invoke,
            AllowChoice::Manage => Self::Manage,
            AllowChoice::All => Self::All,
        }
    }
}

pub async fn run(global: &Global, command: &KeysCommand) -> anyhow::Result<ExitCode> {
    let keys = Keys::open(global).await?;
    match command {
        KeysCommand::Create(args) => {
            let request = CreateKeyRequest {
                name: args.name.clone(),
                allow: args.allow.into(),
                functions: args.function.clone(),
                limits: args.limits.over(KeyLimits::default()),
            };
            shown(global, &keys.create(request).await?)?;
        }
        KeysCommand::Ls => listed(global, &keys.list().await?)?,
        KeysCommand::Rm(args) => {
            for id in &args.ids {
                keys.remove(id).await?;
                println!("removed {id}");
            }
        }
        KeysCommand::Disable(args) => keys.set_all(&args.ids, false).await?,
        KeysCommand::Enable(args) => keys.set_all(&args.ids, true).await?,
        KeysCommand::Limit(args) => {
            let limits = args.limits.over(keys.limits(&args.id).await?);
            let change = ChangeKeyRequest {
                limits: Some(limits),
                ..ChangeKeyRequest::default()
            };
            keys.change(&args.id, change).await?;
            println!("limits of {}: {}", args.id, in_words(&limits));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn shown(global: &Global, made: &CreatedKey) -> anyhow::Result<()> {
    if global.format() == Format::Json {
        return output::json(made);
    }
    println!("AWS_ACCESS_KEY_ID={}", made.key.access_key_id);
    println!("AWS_SECRET_ACCESS_KEY={}", made.secret_access_key);
    eprintln!("thaw: the secret is not shown again");
    Ok(())
}

fn listed(global: &Global, list: &KeyList) -> anyhow::Result<()> {
    if global.format() == Format::Json {
        return output::json(list);
    }
    if !list.required {
        eprintln!("thaw: auth is off: keys are kept, and nobody is asked for one");
    }
    if list.keys.is_empty() {
        println!("no keys yet: `thaw keys create` makes one");
        return Ok(());
    }
    let row = |key: &KeySummary| {
        let allow = match key.allow {
            Allow::Invoke => "invoke",
            Allow::Manage => "manage",
            Allow::All => "all",
        };
        let state = if key.enabled { "enabled" } else { "disabled" };
        let limits = in_words(&key.limits);
        let texts = [
            &key.access_key_id,
            &key.name,
            allow,
            &key.functions,
            state,
            &limits,
        ];
        texts.map(str::to_owned).to_vec()
    };
    let head = ["key", "name", "allow", "functions", "state", "limits"];
    output::table(&head, list.keys.iter().map(row));
    Ok(())
}

fn in_words(limits: &KeyLimits) -> String {
    let texts = [
        limits.rate.map(|rate| {
            let burst = limits.burst.unwrap_or(rate);
            format!("{rate} requests/s (burst {burst})")
        }),
        limits.concurrency.map(|count| format!("{count} at once")),
        limits.memory_mib.map(|mib| format!("{mib} MiB run")),
        limits.storage_mib.map(|mib| format!("{mib} MiB stored")),
    ];
    let words: Vec<String> = texts.into_iter().flatten().collect();
    match words.is_empty() {
        true => "none".to_owned(),
        false => words.join(", "),
    }
}

/// Where the keys are.
enum Keys {
    /// At a gateway that runs.
    Gateway(Client),
    /// In the home, and no gateway uses it as long as its locks are held.
    Home { auth: Arc<Auth>, _locks: [File; 2] },
}

impl Keys {
    async fn open(global: &Global) -> anyhow::Result<Self> {
        let client = global.client()?;
        if client.answers().await? {
            return Ok(Self::Gateway(client));
        }
        let home = global.home()?;
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        // Locks do not reach across the lab's border: one is held on this side, the other where the gateway runs.
        let locks = [
            free(&home, "up.lock", client.endpoint())?,
            free(&home, "lock", client.endpoint())?,
        ];
        let database = home.join(GatewayConfig::DATABASE);
        keys::make_private(&database)
            .with_context(|| format!("cannot make {}", database.display()))?;
        let store = Store::open(&database).await?;
        let auth = Auth::open(AuthMode::Off, &home, "", "", store).await?;
        Ok(Self::Home {
            auth,
            _locks: locks,
        })
    }

    async fn create(&self, request: CreateKeyRequest) -> anyhow::Result<CreatedKey> {
        match self {
            Self::Gateway(client) => client.create_key(&request).await,
            Self::Home { auth, .. } => {
                let key = auth.create(request).await?;
                Ok(CreatedKey {
                    key: key.summary(),
                    secret_access_key: key.secret.clone(),
                })
            }
        }
    }

    async fn list(&self) -> anyhow::Result<KeyList> {
        match self {
            Self::Gateway(client) => client.keys().await,
            Self::Home { auth, .. } => Ok(KeyList {
                keys: auth.list(),
                required: true, // nobody can say before a gateway runs
            }),
        }
    }

    async fn remove(&self, id: &str) -> anyhow::Result<()> {
        match self {
            Self::Gateway(client) => client.remove_key(id).await,
            Self::Home { auth, .. } => Ok(auth.remove(id).await?),
        }
    }

    async fn limits(&self, id: &str) -> anyhow::Result<KeyLimits> {
        let list = self.list().await?;
        let found = list.keys.iter().find(|key| key.access_key_id == id);
        Ok(found
            .with_context(|| format!("there is no key {id:?} here"))?
            .limits)
    }

    async fn change(&self, id: &str, change: ChangeKeyRequest) -> anyhow::Result<()> {
        match self {
            Self::Gateway(client) => client.change_key(id, &change).await,
            Self::Home { auth, .. } => Ok(auth.change(id, change).await.map(drop)?),
        }
    }

    async fn set_all(&self, ids: &[String], enabled: bool) -> anyhow::Result<()> {
        let change = ChangeKeyRequest {
            enabled: Some(enabled),
            ..ChangeKeyRequest::default()
        };
        for id in ids {
            self.change(id, change).await?;
            println!("{} {id}", if enabled { "enabled" } else { "disabled" });
        }
        Ok(())
    }
}

/// A lock that no gateway holds.
fn free(home: &Path, name: &str, endpoint: &str) -> anyhow::Result<File> {
    let path = home.join(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "a gateway uses {}, but not at {endpoint}: name it with --endpoint",
            home.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(options: &[&str]) -> Result<Limits, clap::Error> {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            limits: Limits,
        }
        let line = std::iter::once(&"limit").chain(options);
        <Line as clap::Parser>::try_parse_from(line).map(|line| line.limits)
    }

    #[test]
    fn limits_that_are_not_named_stay_and_none_takes_one_away() {
        let had = KeyLimits {
            rate: Some(50),
            burst: Some(100),
            storage_mib: Some(1024),
            ..KeyLimits::default()
        };
        let over = |options: &[&str]| limits(options).unwrap().over(had);
        assert_eq!(over(&[]), had);
        let other = over(&["--rate", "20", "--memory-mib", "4096"]);
        assert_eq!(
            in_words(&other),
            "20 requests/s (burst 100), 4096 MiB run, 1024 MiB stored"
        );
        let none = over(&["--rate", "none", "--storage-mib", "none"]);
        assert_eq!(
            (none, in_words(&none).as_str()),
            (KeyLimits::default(), "none")
        );
        for wrong in ["0", "-1", "many"] {
            assert!(limits(&["--concurrency", wrong]).is_err(), "{wrong}");
        }
    }
}
