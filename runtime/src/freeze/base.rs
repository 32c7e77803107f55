//! Freezing over a base: the runtime is booted once and frozen before it knows of any function; each function's snapshot starts
//! there and stores what differs.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use thaw_agent_protocol::{Generation, HostMessage, Thaw};
use thaw_snapshot::{Metadata, OpenError, Snapshot, VerifyError};
use thaw_vmm_control::{
    Disk, DiskAccess, DiskSource, Failure, Fault, Request, RestoreRequest, SaveForm,
};
use thiserror::Error;
use tokio::sync::Mutex;

use super::drive::{self, Freeze, Progress};
use super::{BaseRequest, FreezeError, FreezeRequest, FreezeStep};
use crate::RuntimeConfig;
use crate::fault::HostError;
use crate::monitor::Spawner;
use crate::sandbox::{DISK_IDS, random};

/// The generation in which a function is configured in a restored base; clones have far higher ones.
const CONFIGURED_IN: Generation = Generation(1);
/// Fresh random bytes for the guest's kernel.
const ENTROPY_BYTES: usize = 64;

/// One base is made at a time: a second deployment that needs the same one waits for it and finds it.
static MAKING: Mutex<()> = Mutex::const_new(());

/// Why a base's file cannot be used: remove it, and the next deployment makes it again.
#[derive(Debug, Error)]
pub enum BaseFileError {
    /// It is no snapshot.
    #[error("file of the base cannot be opened")]
    Open(#[source] OpenError),
    /// It is damaged.
    #[error("file of the base is damaged")]
    Damaged(#[source] VerifyError),
    /// It fits neither this host nor the request: it was made with another processor, for instance.
    #[error("monitor does not restore the base")]
    Refused(#[source] Failure),
}

/// Makes the base if its file is not there, or is still the `unusable` one: what differs from that one is of no use here either.
pub(super) async fn make(
    spawner: &Spawner,
    config: &RuntimeConfig,
    request: &FreezeRequest,
    base: &BaseRequest,
    unusable: Option<FileId>,
    progress: Progress<'_>,
) -> Result<(), FreezeError> {
    let _making = MAKING.lock().await;
    let there = file_id(&base.file).await;
    if there.is_some() && there != unusable {
        return Ok(());
    }
    let mut request = request.clone();
    request.base = None;
    request.code = base.code.clone();
    request.tap = None;
    request.output = base.file.clone();
    request.metadata = Metadata {
        function: String::new(),
        revision: String::new(),
        handler: String::new(),
        ..request.metadata
    };
    drive::boot_and_freeze(spawner, config, &request, progress).await
}

/// Device and inode: a file made again has another.
pub(super) type FileId = (u64, u64);

/// The file at `path`, if there is one.
pub(super) async fn file_id(path: &Path) -> Option<FileId> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some((metadata.dev(), metadata.ino()))
}

impl Freeze<'_> {
    /// Restores the base with the function's code and lets it run as a clone of its own; returns the agent's version.
    pub(super) async fn start_from_base(
        &mut self,
        request: &FreezeRequest,
        base: &Path,
        progress: Progress<'_>,
    ) -> Result<String, FreezeError> {
        progress(FreezeStep::Booting);
        let agent_version = agent_version(base).await?;
        let disk = |id: &str, access, source| Disk {
            id: id.into(),
            access,
            source,
        };
        let [rootfs, code, overlay] = DISK_IDS;
        let restore = Request::Restore(RestoreRequest {
            disks: vec![
                disk(rootfs, DiskAccess::ReadOnly, DiskSource::Descriptor),
                disk(code, DiskAccess::ReadOnly, DiskSource::Descriptor),
                disk(overlay, DiskAccess::CopyOnWrite, DiskSource::Snapshot),
            ],
            resume: true,
            has_tap: request.tap.is_some(),
            ..Default::default()
        });
        let files = [
            drive::open(base).await?,
            drive::open(&request.rootfs).await?,
            drive::open(&request.code).await?,
        ];
        let tap = request.tap.as_ref().map(|tap| tap.as_fd());
        let fds: Vec<_> = files.iter().map(File::as_fd).chain(tap).collect();
        let limit = self.config.restore_limit;
        let restored = self.vm.monitor.command(&restore, &fds, limit).await;
        restored.map_err(|error| match error {
            HostError::Refused { source, .. } if source.fault == Fault::Caller => {
                FreezeError::Base {
                    path: base.to_owned(),
                    source: BaseFileError::Refused(source),
                }
            }
            other => other.into(),
        })?;
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let thaw = Thaw {
            unix_time_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            hostname: request.configure.hostname.clone(),
            entropy: random::<ENTROPY_BYTES>()?.to_vec(),
        };
        self.vm.channel.enter(CONFIGURED_IN);
        self.vm
            .channel
            .queue(HostMessage::Thaw(thaw))
            .map_err(FreezeError::TooLarge)?;
        Ok(agent_version)
    }

    /// How this function's snapshot is saved.
    pub(super) fn form(request: &FreezeRequest) -> SaveForm {
        match request.base {
            Some(_) => SaveForm::Difference,
            None => SaveForm::Whole,
        }
    }
}

async fn agent_version(base: &Path) -> Result<String, FreezeError> {
    let path = base.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let snapshot = Snapshot::open(&path).map_err(BaseFileError::Open)?;
        let metadata = snapshot.metadata().map_err(BaseFileError::Damaged)?;
        Ok(metadata.agent_version)
    });
    let result = read.await.unwrap_or_else(|error| {
        let error = std::io::Error::other(error);
        Err(BaseFileError::Open(OpenError::Read {
            name: base.display().to_string(),
            source: error,
        }))
    });
    result.map_err(|source| FreezeError::Base {
        path: base.to_owned(),
        source,
    })
}
