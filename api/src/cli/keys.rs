//! `thaw keys`: asks the gateway, or, while none runs, writes into the home's database itself.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use thaw_api::GatewayConfig;
use thaw_api::auth::{Allow, Auth, AuthMode, keys};
use thaw_api::store::Store;
use thaw_api_types::keys::{CreateKeyRequest, CreatedKey, KeyList, KeySummary};

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
        let texts = [&key.access_key_id, &key.name, allow, &key.functions, state];
        texts.map(str::to_owned).to_vec()
    };
    let head = ["key", "name", "allow", "functions", "state"];
    output::table(&head, list.keys.iter().map(row));
    Ok(())
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

    async fn set_all(&self, ids: &[String], enabled: bool) -> anyhow::Result<()> {
        for id in ids {
            match self {
                Self::Gateway(client) => client.change_key(id, enabled).await?,
                Self::Home { auth, .. } => auth.set_enabled(id, enabled).await.map(drop)?,
            }
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
