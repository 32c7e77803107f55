//! `thaw up`: images first, on this machine; then the gateway, here or in the lab.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use thaw_api::auth::keys::{self, ROOT_FILE};
use thaw_api::gateway::{Confinement, Exposure, Gateway, GatewayConfig};
use thaw_api::s3::S3;
use thaw_api::tls::{Tls, Trust};
use thaw_api::{AuthMode, Budget};
use thaw_images::{ImageStore, Progress, RuntimeName};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::client::{Client, Deployment};
use super::confine;
use super::credentials;
use super::installation::Installation;
use super::progress::Steps;
use super::venue::{InLab, LabChoice, Venue, WhenLost};
use super::{Global, package};
use thaw_lab::Paging;

/// The function that `--example` deploys.
const EXAMPLE: &str = "hello";
/// Longest wait for the gateway to be able to invoke functions.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// How often it is looked for images that the gateway in the lab orders.
const ORDERS_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Args)]
pub struct UpArgs {
    /// Where to serve; on another than a loopback address, requests must be signed.
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Ask for signed requests on a loopback address, too.
    #[arg(long)]
    auth: bool,
    /// Speak TLS with this certificate chain, in PEM; SIGHUP reads it again.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_key",
        conflicts_with = "example"
    )]
    tls_cert: Option<PathBuf>,
    /// Its private key, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Sandboxes kept restored and ready for each function, at least; with 0 a function scales to zero.
    #[arg(long, default_value_t = 2)]
    ready: usize,
    /// How long sandboxes are kept at least after the demand that they were made for.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    keep_alive: u64,
    /// Memory that sandboxes may come to use; three quarters of the machine's unless given.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    memory: Option<u64>,
    /// Virtual CPUs that run at once; four for each of the machine's unless given.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// S3-compatible store that functions' code may come from, for instance https://store:9000; the key is that of
    /// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, the region `AWS_REGION`.
    #[arg(long, value_name = "URL", env = "THAW_S3_ENDPOINT")]
    s3_endpoint: Option<String>,
    /// Deploy this folder as the function `hello`, if there is none yet.
    #[arg(long, value_name = "DIR")]
    example: Option<PathBuf>,
    /// Where sandboxes run.
    #[arg(long, value_enum, default_value_t = LabChoice::Auto)]
    lab: LabChoice,
    /// Set when this process was started inside the lab by another `thaw up`: serve the lab's own network.
    #[arg(long, hide = true)]
    in_lab: bool,
    /// Another monitor than the installation's, for measurements of the gateway itself.
    #[arg(long, hide = true, value_name = "PROGRAM")]
    vmm: Option<PathBuf>,
}

impl UpArgs {
    fn auth(&self) -> AuthMode {
        if self.auth || !self.listen.ip().is_loopback() {
            AuthMode::Required
        } else {
            AuthMode::Off
        }
    }

    fn tls(&self) -> anyhow::Result<Option<Arc<Tls>>> {
        match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => Ok(Some(Tls::load(cert, key).context("cannot speak TLS")?)),
            _ => Ok(None),
        }
    }

    fn s3(&self, trust: &Trust) -> anyhow::Result<Option<S3>> {
        let Some(endpoint) = &self.s3_endpoint else {
            return Ok(None);
        };
        let signer = credentials::from_environment().context(
            "--s3-endpoint needs a key to sign with: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )?;
        Ok(Some(S3::new(endpoint, signer, trust)?))
    }

    /// Whom the gateway trusts.
    fn trust(&self, authorities: Option<&Path>) -> anyhow::Result<Trust> {
        let trust = Trust::load(authorities).context("cannot tell whom to trust")?;
        Ok(match self.in_lab {
            true => trust.seen_from_lab(LAB_MACHINE),
            false => trust,
        })
    }
}

/// This machine as the lab's user-mode network has it.
const LAB_MACHINE: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

pub fn run(global: &Global, args: &UpArgs) -> anyhow::Result<ExitCode> {
    let (home, installation) = (global.home()?, Installation::locate()?);
    let trust = args.trust(global.ca.as_deref())?;
    if args.in_lab {
        return serve(&home, &installation, args, trust);
    }
    args.tls()?; // before anything that takes long
    args.s3(&trust)?;
    std::fs::create_dir_all(&home).with_context(|| {
        format!(
            "cannot make {}, which holds all state: choose another folder with --home or THAW_HOME",
            home.display()
        )
    })?;
    let venue = Venue::choose(args.lab);
    eprintln!(
        "thaw: state in {}, sandboxes in {}",
        home.display(),
        venue.describe()
    );
    ensure!(
        venue == Venue::Native || args.listen.ip().is_loopback(),
        "{} is not a loopback address, and in the lab the gateway is reached from this machine only",
        args.listen
    );
    let mut steps = Steps::new();
    prepare_images(&home, &installation, &mut steps)?;
    match venue {
        Venue::Native => {
            drop(steps);
            serve(&home, &installation, args, trust)
        }
        Venue::Lab(_) => {
            let _lock = lock(&home)?; // locks do not reach across the lab's border, so both sides hold one
            ensure_port_free(args.listen, PORT_PATIENCE)?;
            serve_orders(&home);
            let command = in_lab_command(&installation, args, global.ca.as_ref())?;
            InLab {
                home: &home,
                command,
                writable: Vec::new(),
                ports: vec![args.listen.port()],
                paging: Paging::default(),
                memory_mib: None,
                when_lost: WhenLost::StartAgain,
            }
            .run(&mut steps)
        }
    }
}

fn in_lab_command(
    installation: &Installation,
    args: &UpArgs,
    authorities: Option<&PathBuf>,
) -> anyhow::Result<Vec<OsString>> {
    let mut command: Vec<OsString> = vec![installation.thaw.clone().into(), "up".into()];
    command.extend([
        "--in-lab".into(),
        "--listen".into(),
        args.listen.to_string().into(),
    ]);
    command.extend(["--ready".into(), args.ready.to_string().into()]);
    command.extend(["--keep-alive".into(), args.keep_alive.to_string().into()]);
    if args.auth() == AuthMode::Required {
        command.push("--auth".into());
    }
    for (option, path) in [
        ("--tls-cert", args.tls_cert.as_ref()),
        ("--tls-key", args.tls_key.as_ref()),
        ("--ca", authorities),
    ] {
        if let Some(path) = path {
            let path = std::path::absolute(path)
                .with_context(|| format!("{} is no usable path", path.display()))?;
            command.extend([option.into(), path.into()]);
        }
    }
    if let Some(endpoint) = &args.s3_endpoint {
        command.extend(["--s3-endpoint".into(), endpoint.into()]);
    }
    if let Some(memory) = args.memory {
        command.extend(["--memory".into(), memory.to_string().into()]);
    }
    if let Some(cpus) = args.cpus {
        command.extend(["--cpus".into(), cpus.to_string().into()]);
    }
    if let Some(vmm) = &args.vmm {
        command.extend(["--vmm".into(), vmm.into()]);
    }
    if let Some(example) = &args.example {
        command.extend(["--example".into(), example.into()]);
    }
    Ok(command)
}

fn lock(home: &Path) -> anyhow::Result<File> {
    let path = home.join("up.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.with_context(|| {
        let home = home.display();
        format!("cannot write into {home}, which holds all state: choose another folder with --home or THAW_HOME")
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another `thaw up` uses {}: stop it, or choose another --home",
            home.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

const PORT_PATIENCE: Duration = Duration::from_secs(5);

/// The emulator would only say that it cannot forward. A killed gateway's emulator holds the port until its memory is
/// given back, which can take seconds, so a busy port is tried again for a while.
fn ensure_port_free(address: SocketAddr, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match std::net::TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            tried => {
                return tried.map(drop).with_context(|| {
                    format!("cannot serve on {address}: choose another with --listen")
                });
            }
        }
    }
}

/// Everything that guests boot from; nothing to do when it is there.
pub fn prepare_images(
    home: &Path,
    installation: &Installation,
    steps: &mut Steps,
) -> anyhow::Result<()> {
    let store = ImageStore::new(home);
    let kernel = store
        .kernel(steps)
        .context("cannot make the guest kernel")?;
    store
        .initramfs(&kernel, &installation.agent)
        .context("cannot make the initramfs")?;
    for name in RuntimeName::AHEAD {
        store
            .runtime(name, steps)
            .with_context(|| format!("cannot make the image {name}"))?;
    }
    steps.end();
    Ok(())
}

/// Makes, for as long as this process lives, the images that the gateway in the lab orders.
fn serve_orders(home: &Path) {
    let store = ImageStore::new(home);
    std::thread::spawn(move || {
        loop {
            if let Err(error) = store.serve_orders(&mut Told) {
                let error = anyhow::Error::from(error);
                eprintln!("thaw: an image that was ordered is not made: {error:#}");
            }
            std::thread::sleep(ORDERS_INTERVAL);
        }
    });
}

/// A line on standard error for each step, beside what the gateway in the lab says.
struct Told;

impl Progress for Told {
    fn step(&mut self, name: &str) {
        eprintln!("thaw: {name}");
    }
    fn detail(&mut self, _text: &str) {}
    fn done(&mut self, _took: Duration) {}
}

impl Progress for Steps {
    fn step(&mut self, name: &str) {
        self.begin(name);
    }

    fn detail(&mut self, _text: &str) {}

    fn done(&mut self, _took: Duration) {
        self.end();
    }
}

fn serve(
    home: &Path,
    installation: &Installation,
    args: &UpArgs,
    trust: Trust,
) -> anyhow::Result<ExitCode> {
    confine::enter_own_namespace();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the I/O runtime")?;
    runtime.block_on(async {
        let tls = args.tls()?;
        let config = configure(home, installation, args, tls.clone(), trust).await?;
        let gateway = Gateway::start(config)
            .await
            .context("the gateway cannot start")?;
        say_who_is_let_in(home, args);
        if let Some(reach) = gateway.reach() {
            eprintln!("thaw: jail around each sandbox: {reach}");
        }
        let announcement = match tls {
            None => {
                let url = format!("http://{}", args.listen);
                tokio::spawn(announce(
                    url,
                    inner_client(home, args)?,
                    args.example.clone(),
                ))
            }
            Some(tls) => {
                tokio::spawn(reload_at_hangup(tls, signal(SignalKind::hangup())?));
                let (url, ready) = (format!("https://{}", args.listen), gateway.until_ready());
                tokio::spawn(async move {
                    ready.await;
                    println!("thaw: serving on {url}");
                })
            }
        };
        let served = gateway
            .run_until(stop_signal()?)
            .await
            .context("the gateway failed");
        announcement.abort();
        eprintln!("thaw: stopped");
        served.map(|()| ExitCode::SUCCESS)
    })
}

async fn configure(
    home: &Path,
    installation: &Installation,
    args: &UpArgs,
    tls: Option<Arc<Tls>>,
    trust: Trust,
) -> anyhow::Result<GatewayConfig> {
    // In the lab, the port is forwarded from this machine's loopback to the lab's only network interface.
    let (address, exposure) = if args.in_lab {
        (
            SocketAddr::from(([0, 0, 0, 0], args.listen.port())),
            Exposure::ForwardedLoopback,
        )
    } else {
        (args.listen, Exposure::Loopback)
    };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve on {address}: choose another with --listen"))?;
    let mut config = GatewayConfig::new(
        home.to_owned(),
        listener,
        args.vmm.clone().unwrap_or(installation.vmm.clone()),
        installation.agent.clone(),
    );
    config.exposure = exposure;
    config.egress = Some(installation.egress.clone());
    if args.vmm.is_some() {
        config.confinement = Confinement::Nothing;
    }
    config.auth = args.auth();
    config.tls = tls;
    config.s3 = args.s3(&trust)?;
    config.trust = trust;
    config.ready_count = args.ready;
    config.keep_alive = Duration::from_secs(args.keep_alive);
    config.budget = Budget {
        memory_mib: args.memory.unwrap_or(config.budget.memory_mib),
        vcpus: args.cpus.unwrap_or(config.budget.vcpus),
    };
    Ok(config)
}

fn say_who_is_let_in(home: &Path, args: &UpArgs) {
    match args.auth() {
        AuthMode::Off => eprintln!(
            "thaw: auth is off: only this machine can reach {}",
            args.listen
        ),
        AuthMode::Required => eprintln!(
            "thaw: auth is on: requests must be signed; `thaw keys create` makes keys, this home's own is in {}",
            home.join(ROOT_FILE).display()
        ),
    }
}

/// A client of the gateway in this very process.
fn inner_client(home: &Path, args: &UpArgs) -> anyhow::Result<Client> {
    let ip = match args.listen.ip() {
        ip if ip.is_unspecified() || args.in_lab => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    };
    let address = SocketAddr::from((ip, args.listen.port()));
    let root = match args.auth() {
        AuthMode::Off => None,
        AuthMode::Required => {
            keys::root_signer(&home.join(ROOT_FILE)).context("cannot read the root key")?
        }
    };
    Ok(Client::new(&format!("http://{address}"))?.signed_by(root))
}

async fn reload_at_hangup(tls: Arc<Tls>, mut hangups: Signal) {
    while hangups.recv().await.is_some() {
        match tls.reload() {
            Ok(()) => eprintln!("thaw: the certificate was read again"),
            Err(error) => eprintln!(
                "thaw: the old certificate stays in use: {:#}",
                anyhow::Error::from(error)
            ),
        }
    }
}

/// Resolves at the first SIGINT or SIGTERM.
pub fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Once functions can be invoked, deploys the example if asked, and says how to call it.
async fn announce(url: String, inner: Client, example: Option<PathBuf>) {
    if let Err(error) = try_announce(&url, &inner, example.as_deref()).await {
        eprintln!("thaw: {error:#}");
    }
}

async fn try_announce(url: &str, client: &Client, example: Option<&Path>) -> anyhow::Result<()> {
    wait_healthy(client).await?;
    println!("thaw: serving on {url}");
    let Some(example) = example else {
        if client.signs() {
            println!("  thaw init DIR    then    thaw deploy DIR    then    thaw invoke NAME");
            return Ok(());
        }
        println!("  thaw init DIR    then    thaw deploy DIR    then    curl {url}/fn/NAME/");
        return Ok(());
    };
    if !client
        .list()
        .await?
        .functions
        .iter()
        .any(|function| function.name == EXAMPLE)
    {
        let zip = package::zip_of(example)?;
        let deployment = Deployment::python(EXAMPLE, zip);
        client
            .deploy(&deployment)
            .await
            .context("cannot deploy the example")?;
    }
    let last = super::deploy::follow(client, EXAMPLE, &mut Steps::new()).await?;
    if let Some(error) = last.error {
        bail!("the example could not be frozen: {error}");
    }
    println!("  curl {url}/fn/{EXAMPLE}/");
    Ok(())
}

/// Waits until functions can be invoked.
pub async fn wait_healthy(client: &Client) -> anyhow::Result<()> {
    let began = tokio::time::Instant::now();
    loop {
        match client.healthy().await {
            Ok(()) => return Ok(()),
            Err(error) if began.elapsed() > READY_LIMIT => {
                return Err(error.context("the gateway is not ready"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_that_becomes_free_is_waited_for_and_a_busy_one_is_named() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = holder.local_addr().unwrap();
        let refused = ensure_port_free(address, Duration::ZERO).unwrap_err();
        assert!(refused.to_string().contains(&address.to_string()));
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(150));
            drop(holder);
        });
        ensure_port_free(address, Duration::from_secs(60)).unwrap();
        release.join().unwrap();
    }
}
