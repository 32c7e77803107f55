//! Freezing over a base: the runtime is booted once and frozen before it knows of any function; each function's snapshot starts
//! there and stores what differs.

use std::collections::BTreeSet;
use std::fs::{File, Metadata as FileMetadata};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::PoisonError;
use std::time::{SystemTime, UNIX_EPOCH};

use thaw_agent_protocol::{Generation, HostMessage, Thaw};
use thaw_snapshot::{AuthenticityError, Digest, Key, Metadata, OpenError, Snapshot, VerifyError};
use thaw_vmm_control::{
    Disk, DiskAccess, DiskSource, Failure, Fault, Request, RestoreRequest, SaveForm,
};
use thiserror::Error;
use tokio::sync::Mutex;

use super::drive::{self, Freeze, Progress};
use super::{BaseRequest, FreezeError, FreezeRequest, FreezeStep};
use crate::fault::HostError;
use crate::node::Node;
use crate::points::Point;
use crate::sandbox::{DISK_IDS, random};

/// The generation in which a function is configured in a restored base; clones have far higher ones.
const CONFIGURED_IN: Generation = Generation(1);
/// Fresh random bytes for the guest's kernel.
const ENTROPY_BYTES: usize = 64;

/// One base is made at a time: a second deployment that needs the same one waits for it and finds it.
static MAKING: Mutex<()> = Mutex::const_new(());
/// Bases that were verified in full: once for each file.
static VERIFIED: std::sync::Mutex<BTreeSet<(FileId, Digest)>> =
    std::sync::Mutex::new(BTreeSet::new());

/// Why a base's file cannot be used: remove it, and the next deployment makes it again.
#[derive(Debug, Error)]
pub enum BaseFileError {
    /// It is no snapshot.
    #[error("file of the base cannot be opened")]
    Open(#[source] OpenError),
    /// It was made elsewhere, or changed since.
    #[error("file of the base is not trusted")]
    Untrusted(#[source] AuthenticityError),
    /// It is damaged.
    #[error("file of the base is damaged")]
    Damaged(#[source] VerifyError),
    /// It fits neither this host nor the request: it was made with another processor, for instance.
    #[error("monitor does not restore the base")]
    Refused(#[source] Failure),
}

/// Makes the base if its file is not there, or is still the `unusable` one: what differs from that one is of no use here either.
pub(super) async fn make(
    node: &Node,
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
    request.network = None;
    request.output = base.file.clone();
    request.metadata = Metadata {
        function: String::new(),
        revision: String::new(),
        handler: String::new(),
        ..request.metadata
    };
    drive::boot_and_freeze(node, &request, progress).await?;
    Point::BaseMade.reached();
    Ok(())
}

/// Device and inode: a file made again has another.
pub(super) type FileId = (u64, u64);

/// The file at `path`, if there is one.
pub(super) async fn file_id(path: &Path) -> Option<FileId> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    Some(id_of(&metadata))
}

fn id_of(metadata: &FileMetadata) -> FileId {
    (metadata.dev(), metadata.ino())
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
        let (base_file, agent_version) = trusted(base, self.node.key.clone()).await?;
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
            has_tap: self.plug.is_some(),
            ..Default::default()
        });
        let files = [
            base_file,
            drive::open(&request.rootfs).await?,
            drive::open(&request.code).await?,
        ];
        let tap = self.plug.as_ref().map(|plug| plug.tap.as_fd());
        let fds: Vec<_> = files.iter().map(File::as_fd).chain(tap).collect();
        let limit = self.node.config.restore_limit;
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

/// The base's file, which was made here and is whole, and the version of the agent in it.
async fn trusted(base: &Path, key: Key) -> Result<(File, String), FreezeError> {
    let path = base.to_owned();
    let read = tokio::task::spawn_blocking(move || check(&path, &key));
    let result = read
        .await
        .unwrap_or_else(|error| Err(unreadable(base, std::io::Error::other(error))));
    result.map_err(|source| FreezeError::Base {
        path: base.to_owned(),
        source,
    })
}

fn check(path: &Path, key: &Key) -> Result<(File, String), BaseFileError> {
    let snapshot = Snapshot::open(path).map_err(BaseFileError::Open)?;
    snapshot
        .authenticate(key)
        .map_err(BaseFileError::Untrusted)?;
    let kept = snapshot.file().try_clone();
    let file = kept.map_err(|error| unreadable(path, error))?;
    let metadata = file.metadata().map_err(|error| unreadable(path, error))?;
    let known = (id_of(&metadata), snapshot.digest());
    let verified = || VERIFIED.lock().unwrap_or_else(PoisonError::into_inner);
    if !verified().contains(&known) {
        snapshot.verify().map_err(BaseFileError::Damaged)?;
        verified().insert(known);
    }
    let metadata = snapshot.metadata().map_err(BaseFileError::Damaged)?;
    Ok((file, metadata.agent_version))
}

fn unreadable(base: &Path, source: std::io::Error) -> BaseFileError {
    BaseFileError::Open(OpenError::Read {
        name: base.display().to_string(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt as _;

    use thaw_snapshot::{SectionKind, Writer, tag};

    use super::*;

    fn write(path: &Path, machine: &[u8]) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(path).unwrap();
        let mut writer = Writer::new(file.try_clone().unwrap());
        writer.metadata(&Metadata::default()).unwrap();
        writer.section(SectionKind::Machine, machine).unwrap();
        writer.finish().unwrap();
        file
    }

    #[test]
    fn a_base_that_was_not_made_here_or_is_damaged_is_never_given_to_a_monitor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.thaw");
        let (key, other) = (Key::new(&[1; 32]), Key::new(&[2; 32]));
        let file = write(&path, b"one");
        assert!(matches!(
            check(&path, &key),
            Err(BaseFileError::Untrusted(_))
        ));
        tag(&file, &other).unwrap();
        assert!(matches!(
            check(&path, &key),
            Err(BaseFileError::Untrusted(_))
        ));
        tag(&file, &key).unwrap();
        check(&path, &key).unwrap();
        // Verified once does not mean trusted for ever.
        tag(&file, &other).unwrap();
        assert!(matches!(
            check(&path, &key),
            Err(BaseFileError::Untrusted(_))
        ));

        let file = write(&path, b"two");
        tag(&file, &key).unwrap();
        file.write_all_at(b"x", 2 * thaw_snapshot::PAGE_BYTES)
            .unwrap();
        assert!(matches!(check(&path, &key), Err(BaseFileError::Damaged(_))));
    }
}
