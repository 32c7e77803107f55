//! The disk (virtio 1.2, 5.2): requests checked here, bytes moved by [`store`].

mod guest_io;
mod store;

use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as abi;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::config::{DeviceBuildError, DiskAccess, DiskConfig};
use super::fault::GuestFault;
use super::registers::{FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Identity};
use super::slot::Turn;
use super::virtqueue::{Chain, VirtQueue};
use crate::memory::GuestMemoryMmap;
use store::Store;

/// Unit of the protocol's addresses and lengths (5.2.4).
const SECTOR_BYTES: u64 = 512;
/// `struct virtio_blk_req` before the data (5.2.6).
const HEADER_BYTES: usize = 16;
/// Bytes that GET_ID answers.
const ID_BYTES: usize = abi::VIRTIO_BLK_ID_BYTES as usize;
/// Data buffers of one request: with header and status they fill the queue once.
const SEGMENTS_MAX: u32 = 126;
/// Bytes of one data buffer.
const SEGMENT_BYTES_MAX: u32 = 64 * 1024;
/// Bytes of one request; more is refused, it would hold up the other devices.
const REQUEST_BYTES_MAX: usize = SEGMENTS_MAX as usize * SEGMENT_BYTES_MAX as usize;
/// Requests served before other devices get their turn.
const REQUESTS_PER_TURN: usize = 32;

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

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
    #[error("{length} bytes at {offset} end beyond the disk")]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: usize,
    },
    /// The host's file failed.
    #[error("disk content cannot be read")]
    File(#[source] io::Error),
}

/// Which disk was saved; its content is saved apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStateV1 {
    /// Bytes.
    pub length: u64,
    /// What the guest may do.
    pub access: DiskAccessStateV1,
    /// Serial number.
    pub id: String,
}

/// [`DiskAccess`] on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskAccessStateV1 {
    /// Writes fail.
    ReadOnly,
    /// Writes go to a delta.
    CopyOnWrite,
}

impl From<DiskAccess> for DiskAccessStateV1 {
    fn from(access: DiskAccess) -> Self {
        match access {
            DiskAccess::ReadOnly => Self::ReadOnly,
            DiskAccess::CopyOnWrite => Self::CopyOnWrite,
        }
    }
}

/// Whether a disk of this configuration can exist.
pub(super) fn check(disk: usize, config: &DiskConfig) -> Result<(), DeviceBuildError> {
    let DiskConfig {
        file,
        access: _,
        id,
        offset,
        length,
    } = config;
    if id.len() > ID_BYTES {
        return Err(DeviceBuildError::DiskId { disk });
    }
    let metadata = file
        .metadata()
        .map_err(|source| DeviceBuildError::DiskFile { disk, source })?;
    let fits = offset
        .checked_add(*length)
        .is_some_and(|end| end <= metadata.len());
    if *length == 0 || !length.is_multiple_of(SECTOR_BYTES) || !fits {
        return Err(DeviceBuildError::DiskWindow {
            disk,
            offset: *offset,
            length: *length,
        });
    }
    Ok(())
}

/// One disk.
#[derive(Debug)]
pub(super) struct Block {
    access: DiskAccess,
    id: String,
    store: Store,
}

impl Block {
    /// `config` was accepted by [`check`].
    pub(super) fn new(disk: usize, config: DiskConfig) -> Result<Self, DeviceBuildError> {
        let DiskConfig {
            file,
            access,
            id,
            offset,
            length,
        } = config;
        let store = match access {
            DiskAccess::ReadOnly => Store::read_only(file, offset, length),
            DiskAccess::CopyOnWrite => Store::copy_on_write(file, offset, length)
                .map_err(|source| DeviceBuildError::Delta { disk, source })?,
        };
        Ok(Self { access, id, store })
    }

    /// A disk whose content is not known yet: nothing can be read from it.
    pub(super) fn prepare(disk: usize, access: DiskAccess) -> Result<Self, DeviceBuildError> {
        let file = Store::no_base().map_err(|source| DeviceBuildError::Delta { disk, source })?;
        let config = DiskConfig {
            file,
            access,
            id: String::new(),
            offset: 0,
            length: 0,
        };
        Self::new(disk, config)
    }

    /// Whether this disk, with its base replaced by that of `config` if there is one, is the one saved: the guest's
    /// driver has read length, access and id.
    pub(super) fn check_state(&self, state: &BlockStateV1, config: Option<&DiskConfig>) -> bool {
        let BlockStateV1 { length, access, id } = state;
        let (new_length, new_access, new_id) = match config {
            Some(config) => (config.length, config.access, &config.id),
            None => (self.store.length(), self.access, &self.id),
        };
        let access_kept =
            new_access == self.access && DiskAccessStateV1::from(new_access) == *access;
        access_kept && new_length == *length && new_id == id
    }

    /// Becomes the disk that [`Block::check_state`] agreed to, as pristine as its base.
    pub(super) fn reset_to(&mut self, config: Option<DiskConfig>) -> io::Result<()> {
        let Self {
            access: _,
            id,
            store,
        } = self;
        if let Some(config) = config {
            *id = config.id;
            store.set_base(config.file, config.offset, config.length);
        }
        store.forget_writes()
    }

    pub(super) fn identity(&self) -> Identity {
        let feature = |bit: u32| 1u64 << bit;
        let mut features = FEATURE_VERSION_1
            | FEATURE_EVENT_IDX
            | FEATURE_INDIRECT
            | feature(abi::VIRTIO_BLK_F_SIZE_MAX)
            | feature(abi::VIRTIO_BLK_F_SEG_MAX)
            | feature(abi::VIRTIO_BLK_F_BLK_SIZE)
            | feature(abi::VIRTIO_BLK_F_FLUSH);
        if self.access == DiskAccess::ReadOnly {
            features |= feature(abi::VIRTIO_BLK_F_RO);
        }
        Identity {
            device_id: VIRTIO_ID_BLOCK,
            features,
            queue_size_max: &[128],
        }
    }

    /// 5.2.4: capacity, size_max, seg_max, geometry (absent), blk_size.
    pub(super) fn config_space(&self) -> Vec<u8> {
        let mut space = Vec::with_capacity(24);
        space.extend((self.store.length() / SECTOR_BYTES).to_le_bytes());
        space.extend(SEGMENT_BYTES_MAX.to_le_bytes());
        space.extend(SEGMENTS_MAX.to_le_bytes());
        space.extend([0; 4]);
        space.extend(512u32.to_le_bytes());
        space
    }

    pub(super) fn length(&self) -> u64 {
        self.store.length()
    }

    pub(super) fn access(&self) -> DiskAccess {
        self.access
    }

    pub(super) fn written_bytes(&self) -> u64 {
        self.store.written_bytes()
    }

    pub(super) fn written_runs(&self) -> Vec<Range<u64>> {
        self.store.written_runs()
    }

    /// Reads merged content for the host.
    pub(super) fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), DiskReadError> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.store.length()) {
            return Err(DiskReadError::Range {
                offset,
                length: into.len(),
            });
        }
        self.store.read(offset, into).map_err(DiskReadError::File)
    }

    /// The driver reset the device; content stays, as a real disk's would.
    pub(super) fn reset(&mut self) {}

    pub(super) fn serve(
        &mut self,
        queues: &mut [Option<VirtQueue>],
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, GuestFault> {
        let Some(Some(queue)) = queues.first_mut() else {
            return Ok(Turn::Idle);
        };
        for _ in 0..REQUESTS_PER_TURN {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(if queue.rearm(memory)? {
                    Turn::Again
                } else {
                    Turn::Idle
                });
            };
            let written = self.request(queue, memory, &chain)?;
            queue.complete(memory, &chain, written)?;
        }
        Ok(Turn::Again)
    }

    /// Serves one request (5.2.6); bytes written to the guest.
    fn request(
        &mut self,
        queue: &VirtQueue,
        memory: &GuestMemoryMmap,
        chain: &Chain,
    ) -> Result<usize, GuestFault> {
        let out_bytes = chain
            .readable
            .length()
            .checked_sub(HEADER_BYTES)
            .ok_or_else(|| queue.too_small())?;
        let in_bytes = chain
            .writable
            .length()
            .checked_sub(1)
            .ok_or_else(|| queue.too_small())?;
        let mut header = [0; HEADER_BYTES];
        chain
            .readable
            .read(memory, 0, &mut header)
            .map_err(|_| queue.buffer_fault())?;
        let (kind, sector) = decode(&header);
        let (status, written) = match kind {
            abi::VIRTIO_BLK_T_IN => match self.range(sector, in_bytes) {
                Some(offset) => {
                    let place = (&chain.writable, 0, in_bytes);
                    outcome(self.store.read_to_guest(memory, offset, place), in_bytes)
                }
                None => (STATUS_IOERR, 0),
            },
            abi::VIRTIO_BLK_T_OUT => match self.range(sector, out_bytes) {
                Some(offset) if self.access == DiskAccess::CopyOnWrite => {
                    let place = (&chain.readable, HEADER_BYTES, out_bytes);
                    outcome(self.store.write_from_guest(memory, offset, place), 0)
                }
                _ => (STATUS_IOERR, 0),
            },
            // The delta lives and dies with the machine: there is nothing more durable to flush to.
            abi::VIRTIO_BLK_T_FLUSH => (STATUS_OK, 0),
            abi::VIRTIO_BLK_T_GET_ID if in_bytes >= ID_BYTES => {
                let mut id = [0; ID_BYTES];
                id[..self.id.len()].copy_from_slice(self.id.as_bytes());
                chain
                    .writable
                    .write(memory, 0, &id)
                    .map_err(|_| queue.buffer_fault())?;
                (STATUS_OK, ID_BYTES)
            }
            abi::VIRTIO_BLK_T_GET_ID => (STATUS_IOERR, 0),
            _ => (STATUS_UNSUPPORTED, 0),
        };
        chain
            .writable
            .write(memory, in_bytes, &[status])
            .map_err(|_| queue.buffer_fault())?;
        Ok(written + 1)
    }

    /// The byte offset of a request, if it is whole sectors within the disk and the limits.
    fn range(&self, sector: u64, length: usize) -> Option<u64> {
        let bytes = length as u64;
        let offset = sector.checked_mul(SECTOR_BYTES)?;
        let end = offset.checked_add(bytes)?;
        let whole = bytes.is_multiple_of(SECTOR_BYTES) && length <= REQUEST_BYTES_MAX;
        (whole && end <= self.store.length()).then_some(offset)
    }

    pub(super) fn save(&self) -> BlockStateV1 {
        let Self { access, id, store } = self;
        BlockStateV1 {
            length: store.length(),
            access: (*access).into(),
            id: id.clone(),
        }
    }
}

fn outcome(result: io::Result<()>, written: usize) -> (u8, usize) {
    match result {
        Ok(()) => (STATUS_OK, written),
        Err(_) => (STATUS_IOERR, 0),
    }
}

/// Type and sector of a request header (5.2.6).
fn decode(header: &[u8; HEADER_BYTES]) -> (u32, u64) {
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = *header;
    (
        u32::from_le_bytes([k0, k1, k2, k3]),
        u64::from_le_bytes(sector),
    )
}
