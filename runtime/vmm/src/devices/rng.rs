//! The entropy device (virtio 1.2, 5.4): random bytes of the host's kernel, at a bounded rate.

use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::fault::GuestFault;
use super::registers::{FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Identity};
use super::slot::Turn;
use super::virtqueue::VirtQueue;
use crate::memory::GuestMemoryMmap;

/// Bytes given to one request, whatever its size: the kernel's driver asks again.
const REQUEST_BYTES_MAX: usize = 4096;
/// Requests served before other devices get their turn.
const CHAINS_PER_TURN: usize = 16;
/// Bytes a guest may take at once after a pause.
const BURST_BYTES: usize = 256 * 1024;
/// Sustained bytes a second: far beyond what reseeding needs, far below what would cost the host a core.
const BYTES_PER_SECOND: usize = 1024 * 1024;

/// Registers of the device.
pub(super) const IDENTITY: Identity = Identity {
    device_id: VIRTIO_ID_RNG,
    features: FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT,
    queue_size_max: &[64],
};

/// A token bucket over the host's random source.
#[derive(Debug)]
pub(super) struct Rng {
    tokens: usize,
    refilled: Instant,
}

impl Rng {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            tokens: BURST_BYTES,
            refilled: now,
        }
    }

    /// The driver reset the device; the allowance stays, or resets would evade the limit.
    pub(super) fn reset(&mut self) {}

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled);
        let millis = usize::try_from(elapsed.as_millis()).unwrap_or(usize::MAX);
        if millis > 0 {
            let earned = millis.saturating_mul(BYTES_PER_SECOND / 1000);
            self.tokens = self.tokens.saturating_add(earned).min(BURST_BYTES);
            self.refilled = now;
        }
    }

    /// Serves requests while the allowance lasts; the rest stay in the queue.
    pub(super) fn serve(
        &mut self,
        queues: &mut [Option<VirtQueue>],
        memory: &GuestMemoryMmap,
        now: Instant,
    ) -> Result<Turn, GuestFault> {
        let Some(Some(queue)) = queues.first_mut() else {
            return Ok(Turn::Idle);
        };
        self.refill(now);
        for _ in 0..CHAINS_PER_TURN {
            if self.tokens < REQUEST_BYTES_MAX {
                return Ok(Turn::At(now + Duration::from_millis(10)));
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(if queue.rearm(memory)? {
                    Turn::Again
                } else {
                    Turn::Idle
                });
            };
            let mut bytes = [0; REQUEST_BYTES_MAX];
            let wanted = chain.writable.length().min(REQUEST_BYTES_MAX);
            if wanted == 0 {
                return Err(queue.too_small());
            }
            // The host's pool is initialised long before a machine starts; a short or failed read
            // leaves the guest with what was read, never with old bytes.
            let count = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
            chain
                .writable
                .write(memory, 0, &bytes[..count])
                .map_err(|_| queue.buffer_fault())?;
            queue.complete(memory, &chain, count)?;
            self.tokens -= count;
        }
        Ok(Turn::Again)
    }

    pub(super) fn save(&self) -> RngStateV1 {
        // A restored machine starts with a full allowance: the bucket limits cost, it holds no secret.
        let Self {
            tokens: _,
            refilled: _,
        } = self;
        RngStateV1 {}
    }
}

/// The entropy device has no state of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngStateV1 {}
