//! A runtime whose monitors are scripted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use thaw_runtime::{
    Configure, End, Fault, FreezeError, FreezeRequest, FreezeStep, Frozen, Invocation, InvokeError,
    Learn, Measure, Outcome, Pool, PoolSpec, Runtime, RuntimeConfig,
};
use thaw_snapshot::{CpuRecord, Key, Metadata, PageSource, SectionKind, Writer, tag};

/// A limit that no test should come near.
pub const AMPLE: Duration = Duration::from_secs(60);

/// The key of all stages.
pub fn key() -> Key {
    Key::new(&[7; Key::SECRET_BYTES])
}

/// Memory of a guest that has done nothing.
struct Zeros;

impl PageSource for Zeros {
    fn read_at(&mut self, _: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn next_data(&mut self, _: u64) -> std::io::Result<Option<u64>> {
        Ok(None)
    }
}

/// Writes a snapshot of 128 MiB, which says that it is of a VM of this size.
pub fn write_snapshot(path: &Path, vcpu_count: u8, memory_mib: u32) {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create_new(true);
    let file = options.open(path).unwrap();
    let mut writer = Writer::new(file.try_clone().unwrap());
    let metadata = Metadata {
        vcpu_count,
        memory_mib,
        ..Metadata::default()
    };
    writer.metadata(&metadata).unwrap();
    writer.cpu(&CpuRecord::default()).unwrap();
    writer.section(SectionKind::Machine, b"machine").unwrap();
    let memory = SectionKind::Memory;
    (writer.sparse_section(memory, 128 << 20, &mut Zeros)).unwrap();
    writer.finish().unwrap();
    tag(&file, &key()).unwrap();
}

/// A runtime whose monitors play one script, and the files it works on.
pub struct Stage {
    pub folder: TempDir,
    pub runtime: Runtime,
}

impl Stage {
    /// Without shells, so that the first monitor is the one that a script means.
    pub fn new(script: &str) -> Self {
        Self::with(script, |_| {})
    }

    pub fn with(script: &str, change: impl FnOnce(&mut RuntimeConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let vmm = folder.path().join(script);
        std::os::unix::fs::symlink(scripted_monitor(), &vmm).unwrap();
        for name in ["rootfs", "code", "kernel", "initramfs", "overlay"] {
            fs::write(folder.path().join(name), name).unwrap();
        }
        write_snapshot(&folder.path().join("snapshot.thaw"), 1, 128);
        let mut config = RuntimeConfig {
            vmm,
            shells_per_class: 0,
            restore_limit: Duration::from_secs(2),
            reply_limit: Duration::from_secs(2),
            ..RuntimeConfig::default()
        };
        change(&mut config);
        let runtime = Runtime::new(config, key()).unwrap();
        Self { folder, runtime }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn spec(&self) -> PoolSpec {
        PoolSpec {
            name: "f".into(),
            snapshot: self.path("snapshot.thaw"),
            base: None,
            rootfs: self.path("rootfs"),
            code: self.path("code"),
            ready_count: 1,
            concurrency_max: 2,
            queue_max: 8,
            queue_wait_max: AMPLE,
            network: None,
            learn: Learn::Nothing,
        }
    }

    pub async fn pool(&self) -> Pool {
        self.runtime.open_pool(self.spec()).await.unwrap()
    }

    /// A pool whose first VM is ready.
    pub async fn ready_pool(&self) -> Pool {
        let pool = self.pool().await;
        while pool.stats().ready == 0 {
            tokio::task::yield_now().await;
        }
        pool
    }

    pub async fn freeze(&self) -> (Result<Frozen, FreezeError>, Vec<FreezeStep>) {
        let request = FreezeRequest {
            kernel: self.path("kernel"),
            initramfs: self.path("initramfs"),
            rootfs: self.path("rootfs"),
            code: self.path("code"),
            overlay: self.path("overlay"),
            vcpu_count: 1,
            memory_mib: 128,
            configure: Configure::default(),
            network: None,
            metadata: Metadata::default(),
            output: self.path("out.thaw"),
            base: None,
            boot_limit: Duration::from_secs(2),
        };
        let mut steps = Vec::new();
        let mut note = |step| steps.push(step);
        let result = self.runtime.freeze(request, &mut note).await;
        (result, steps)
    }

    /// Shuts down, which must leave no monitor and no temporary file.
    pub async fn strike(self) {
        self.runtime.shutdown(AMPLE).await;
        let left: Vec<_> = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("tmp"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(monitors(self.folder.path()).is_empty());
    }
}

/// Process ids of live monitors started from `folder`.
pub fn monitors(folder: &Path) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap();
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(folder.as_os_str().as_encoded_bytes())
    })
    .collect()
}

pub fn scripted_monitor() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let monitor = profile.join("examples/scripted-monitor");
    assert!(monitor.exists(), "build it: cargo build --examples");
    monitor
}

pub fn invocation(payload: &[u8]) -> Invocation {
    Invocation {
        request_id: "r-1".into(),
        function_arn: "arn".into(),
        payload: Bytes::copy_from_slice(payload),
        timeout: AMPLE,
        client_context: None,
        cognito_identity: None,
        trace_id: None,
        measure: Measure::Off,
    }
}

pub async fn invoke(pool: &Pool) -> Result<Outcome, InvokeError> {
    pool.invoke(invocation(b"{}")).await
}

pub fn is_answer(result: &Result<Outcome, InvokeError>, expected: &[u8]) -> bool {
    matches!(result, Ok(Outcome { end: End::Response { payload, .. }, .. }) if payload == expected)
}

pub fn host(result: Result<Outcome, InvokeError>) -> String {
    let error = result.expect_err("no failure");
    assert_eq!(error.fault(), Fault::Host);
    let InvokeError::Host(cause) = &error else {
        panic!("not the host's: {error:?}");
    };
    let source = std::error::Error::source(&**cause);
    format!(
        "{cause}; {}",
        source.map(ToString::to_string).unwrap_or_default()
    )
}
