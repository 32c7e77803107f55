//! The real machine: images from `thaw-images`, sandboxes from `thaw-runtime`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use thaw_images::{Fault, ImageStore, Progress, Quiet, RuntimeImage, RuntimeName};

use thaw_runtime::{
    BaseRequest, Configure, FreezeRequest, FreezeStep, Frozen, Invocation, InvokeError,
    OpenPoolError, Outcome, Point, Pool, PoolSpec, PoolStats, Runtime, RuntimeStats, StreamPart,
};
use thaw_snapshot::{Metadata, Snapshot};
use tokio::sync::mpsc;

use super::bases::{self, Held};
use super::{
    Artifact, EPHEMERAL_MIB_DEFAULT, Engine, EngineError, EngineStep, FreezeJob, Sandboxes,
};
use crate::clock;

/// Longest time from a VM's start to its agent's first message. An emulated host takes several seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Host name of a guest while it is frozen; each clone gets one of its own.
const HOSTNAME: &str = "thaw";

/// Names in a revision's folder.
const SNAPSHOT_FILE: &str = "snapshot.thaw";
const CODE_FILE: &str = "code.erofs";

/// This machine.
pub struct HostEngine {
    runtime: Runtime,
    images: ImageStore,
    agent: PathBuf,
    home: PathBuf,
}

/// What every guest boots from.
struct Base {
    kernel: PathBuf,
    kernel_version: String,
    initramfs: PathBuf,
    overlay: PathBuf,
}

impl HostEngine {
    /// An engine that keeps its images below `home` and puts `agent` into its guests.
    #[must_use]
    pub fn new(runtime: Runtime, home: PathBuf, agent: PathBuf) -> Self {
        Self {
            runtime,
            images: ImageStore::new(home.clone()),
            home,
            agent,
        }
    }

    /// The same where images cannot be made, in the lab: they are ordered of the process that started it.
    #[must_use]
    pub fn ordering_images(self) -> Self {
        Self {
            images: self.images.ordering(),
            ..self
        }
    }

    /// A runtime's image, made now if there is none; `step` hears of that.
    async fn image(
        &self,
        name: RuntimeName,
        step: &mut (dyn FnMut(EngineStep) + Send),
    ) -> Result<RuntimeImage, EngineError> {
        let (sender, mut steps) = mpsc::unbounded_channel();
        let making = self.blocking(move |images, _| rootfs(images, name, &mut Heard(sender)));
        let mut making = std::pin::pin!(making);
        loop {
            tokio::select! {
                biased;
                Some(heard) = steps.recv() => step(EngineStep::Image(heard)),
                made = &mut making => return made,
            }
        }
    }

    /// The snapshot of the runtime alone, over which a function's is a difference, with the disk that stands for its code.
    async fn base_request(
        &self,
        request: &FreezeRequest,
    ) -> Result<(BaseRequest, Held), EngineError> {
        let base = bases::request(&self.home, request);
        self.blocking(move |images, _| {
            let held = bases::hold(&base).map_err(image("the runtime's snapshot"))?;
            let code = &base.code;
            if !code.is_file() {
                let zip = no_code().map_err(image("the runtime's snapshot"))?;
                images
                    .code_image(&zip, &[], code)
                    .map_err(image("the runtime's snapshot"))?;
            }
            Ok((base, held))
        })
        .await
    }

    /// Runs blocking work on the images.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ImageStore, &Path) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let (images, agent) = (self.images.clone(), self.agent.clone());
        tokio::task::spawn_blocking(move || work(&images, &agent))
            .await
            .unwrap_or(Err(EngineError::Worker("images")))
    }
}

impl Engine for HostEngine {
    fn prepare(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        let home = self.home.clone();
        self.blocking(move |images, agent| {
            base(images, agent, EPHEMERAL_MIB_DEFAULT)?;
            for name in RuntimeName::AHEAD {
                rootfs(images, name, &mut Quiet)?;
            }
            images.sweep().map_err(image("scratch space"))?;
            bases::remove_unused(&home).map_err(image("the runtimes' snapshots"))
        })
        .boxed()
    }

    fn freeze<'a>(
        &'a self,
        job: FreezeJob,
        step: &'a mut (dyn FnMut(EngineStep) + Send),
    ) -> BoxFuture<'a, Result<Artifact, EngineError>> {
        async move {
            step(EngineStep::Images);
            let runtime = runtime_name(&job.runtime)?;
            let ephemeral_mib = job.ephemeral_mib;
            let base = self
                .blocking(move |images, agent| base(images, agent, ephemeral_mib))
                .await?;
            let rootfs = self.image(runtime, step).await?;
            step(EngineStep::Code);
            let (zip, layers) = (job.zip.clone(), job.layers.clone());
            let out = job.folder.join(CODE_FILE);
            let code = self
                .blocking(move |images, _| code_image(images, &zip, &layers, &out))
                .await?;
            Point::ImageMade.reached();
            let mut request = request(job, base, &rootfs, code);
            let (base, _held) = self.base_request(&request).await?;
            let base_file = base.file.clone();
            request.base = Some(base);
            let code = request.code.clone();
            let frozen = self
                .runtime
                .freeze(request, &mut |beginning| step(translate(&beginning)))
                .await
                .map_err(EngineError::Freeze)?;
            Ok(artifact(frozen, rootfs, code, base_file))
        }
        .boxed()
    }

    fn usable<'a>(&'a self, artifact: &'a Artifact, runtime: &'a str) -> BoxFuture<'a, bool> {
        async move {
            let Ok(name) = runtime_name(runtime) else {
                return false;
            };
            let artifact = artifact.clone();
            self.blocking(move |images, _| {
                let rootfs = rootfs(images, name, &mut Quiet)?;
                Ok(rootfs.digest == artifact.rootfs_digest
                    && rootfs.rootfs == artifact.rootfs
                    && Snapshot::open(&artifact.snapshot).is_ok()
                    && artifact.base.as_deref().is_none_or(Path::is_file)
                    && artifact.code.is_file())
            })
            .await
            .unwrap_or(false)
        }
        .boxed()
    }

    fn open_pool(
        &self,
        spec: PoolSpec,
    ) -> BoxFuture<'_, Result<Arc<dyn Sandboxes>, OpenPoolError>> {
        async move {
            let pool: Arc<dyn Sandboxes> = Arc::new(self.runtime.open_pool(spec).await?);
            Ok(pool)
        }
        .boxed()
    }

    fn stats(&self) -> RuntimeStats {
        self.runtime.stats()
    }

    fn shutdown(&self, deadline: Duration) -> BoxFuture<'_, ()> {
        self.runtime.shutdown(deadline).boxed()
    }
}

impl Sandboxes for Pool {
    fn invoke(&self, invocation: Invocation) -> BoxFuture<'_, Result<Outcome, InvokeError>> {
        Pool::invoke(self, invocation).boxed()
    }

    fn invoke_streaming(
        &self,
        invocation: Invocation,
        sink: mpsc::Sender<StreamPart>,
    ) -> BoxFuture<'_, Result<Outcome, InvokeError>> {
        Pool::invoke_streaming(self, invocation, sink).boxed()
    }

    fn keep_ready(&self, count: usize) {
        Pool::keep_ready(self, count);
    }

    fn stats(&self) -> PoolStats {
        Pool::stats(self)
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Pool::close(self).boxed()
    }
}

fn image<E: Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> EngineError {
    move |source| EngineError::Image {
        what,
        source: Box::new(source),
    }
}

fn base(images: &ImageStore, agent: &Path, overlay_mib: u32) -> Result<Base, EngineError> {
    let kernel = images
        .kernel(&mut Quiet)
        .map_err(image("the guest's kernel"))?;
    let initramfs = images
        .initramfs(&kernel, agent)
        .map_err(image("the initramfs"))?;
    let overlay = images
        .overlay(overlay_mib)
        .map_err(image("the writable overlay"))?;
    Ok(Base {
        // The monitor loads it without unpacking it in the guest.
        kernel: kernel.vmlinux,
        kernel_version: kernel.release,
        initramfs: initramfs.path,
        overlay,
    })
}

/// Hands on the steps of making an image.
struct Heard(mpsc::UnboundedSender<String>);

impl Progress for Heard {
    fn step(&mut self, name: &str) {
        // Whoever deployed may be gone; the image is made all the same.
        let _ = self.0.send(name.to_owned());
    }
    fn detail(&mut self, _text: &str) {}
    fn done(&mut self, _took: Duration) {}
}

fn rootfs(
    images: &ImageStore,
    name: RuntimeName,
    progress: &mut dyn Progress,
) -> Result<RuntimeImage, EngineError> {
    images
        .runtime(name, progress)
        .map_err(image("the runtime's image"))
}

fn runtime_name(runtime: &str) -> Result<RuntimeName, EngineError> {
    runtime.parse().map_err(image("the runtime's image"))
}

fn code_image(
    images: &ImageStore,
    zip: &Path,
    layers: &[PathBuf],
    out: &Path,
) -> Result<PathBuf, EngineError> {
    let read = |path: &Path| std::fs::read(path).map_err(image("the uploaded code"));
    let bytes = read(zip)?;
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| read(layer))
        .collect::<Result<_, _>>()?;
    match images.code_image(&bytes, &layers, out) {
        Ok(image) => Ok(image.path),
        Err(error) if error.fault() == Fault::Caller => Err(EngineError::Code(Box::new(error))),
        Err(error) => Err(image("the code image")(error)),
    }
}

/// A zip with one empty file: an empty zip is no code.
fn no_code() -> zip::result::ZipResult<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("no-code", zip::write::SimpleFileOptions::default())?;
    Ok(zip.finish()?.into_inner())
}

fn request(job: FreezeJob, base: Base, rootfs: &RuntimeImage, code: PathBuf) -> FreezeRequest {
    let handler = job.environment.get("_HANDLER").cloned();
    FreezeRequest {
        kernel: base.kernel,
        initramfs: base.initramfs,
        rootfs: rootfs.rootfs.clone(),
        code,
        overlay: base.overlay,
        vcpu_count: job.vcpu_count,
        memory_mib: job.memory_mib,
        configure: Configure {
            bootstrap: job.bootstrap,
            environment: job.environment,
            init_limit_ms: u64::try_from(job.init_limit.as_millis()).unwrap_or(u64::MAX),
            hostname: HOSTNAME.to_owned(),
            account_id: job.account_id,
            network: job.network.is_some(),
            authority: None,
        },
        network: job.network,
        metadata: Metadata {
            function: job.function,
            revision: job.revision,
            runtime: job.runtime,
            handler: handler.unwrap_or_default(),
            created_unix_ms: u64::try_from(clock::unix_ms()).unwrap_or_default(),
            thaw_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_version: base.kernel_version,
            image_digest: rootfs.digest.clone(),
            ..Metadata::default()
        },
        output: job.folder.join(SNAPSHOT_FILE),
        base: None,
        boot_limit: BOOT_LIMIT,
    }
}

fn translate(step: &FreezeStep) -> EngineStep {
    match step {
        FreezeStep::Booting => EngineStep::Booting,
        FreezeStep::AgentUp { .. } => EngineStep::AgentUp,
        FreezeStep::RuntimeStarting => EngineStep::Initializing,
        FreezeStep::Ready => EngineStep::Ready,
        FreezeStep::Saving => EngineStep::Saving,
        FreezeStep::Saved {
            file_bytes,
            stored_bytes,
        } => EngineStep::Saved {
            file_bytes: *file_bytes,
            stored_bytes: *stored_bytes,
        },
    }
}

fn artifact(frozen: Frozen, rootfs: RuntimeImage, code: PathBuf, base: PathBuf) -> Artifact {
    Artifact {
        snapshot: frozen.snapshot,
        base: Some(base),
        digest: frozen.digest,
        file_bytes: frozen.file_bytes,
        stored_bytes: frozen.stored_bytes,
        rootfs: rootfs.rootfs,
        code,
        rootfs_digest: rootfs.digest,
        init_log: String::from_utf8_lossy(&frozen.init_log).into_owned(),
        init_ms: u64::try_from(frozen.timings.init.as_millis()).unwrap_or(u64::MAX),
    }
}
