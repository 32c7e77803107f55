//! The disk (virtio 1.2, 5.2).

use std::ops::Range;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::config::{DeviceBuildError, DeviceRestoreError, DiskAccess, DiskConfig};
use super::fault::GuestFault;
use super::registers::{FEATURE_VERSION_1, Identity};
use super::slot::Turn;
use super::virtqueue::VirtQueue;

/// A disk could not be read by the host.
#[derive(Debug, thiserror::Error)]
pub enum DiskReadError {
    /// There is no such disk.
    #[error("disk {disk} does not exist")]
    NoDisk {
        /// Index of the disk.
        disk: usize,
    },
    /// The range ends beyond the disk.
    #[error("range ends beyond the disk")]
    Range,
    /// The host's file failed.
    #[error("file cannot be read")]
    File(#[source] std::io::Error),
}

/// A disk's identity on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {}

pub(super) fn check(_disk: usize, _config: &DiskConfig) -> Result<(), DeviceBuildError> {
    Ok(())
}

#[derive(Debug)]
pub(super) struct Block {}
impl Block {
    pub(super) fn new(_disk: usize, _config: DiskConfig) -> Result<Self, DeviceBuildError> {
        Ok(Self {})
    }
    pub(super) fn restore(
        _disk: usize,
        _config: DiskConfig,
        _state: BlockStateV1,
    ) -> Result<Self, DeviceRestoreError> {
        Ok(Self {})
    }
    pub(super) fn identity(&self) -> Identity {
        Identity { device_id: 2, features: FEATURE_VERSION_1, queue_size_max: &[128] }
    }
    pub(super) fn config_space(&self) -> Vec<u8> {
        Vec::new()
    }
    pub(super) fn serve(
        &mut self,
        _queues: &mut [Option<VirtQueue>],
        _memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        Ok(Turn::Idle)
    }
    pub(super) fn reset(&mut self) {}
    pub(super) fn save(&self) -> BlockStateV1 {
        BlockStateV1 {}
    }
    pub(super) fn length(&self) -> u64 {
        0
    }
    pub(super) fn access(&self) -> DiskAccess {
        DiskAccess::ReadOnly
    }
    pub(super) fn written_runs(&self) -> Vec<Range<u64>> {
        Vec::new()
    }
    pub(super) fn read_at(&mut self, _offset: u64, _into: &mut [u8]) -> Result<(), DiskReadError> {
        Ok(())
    }
}
