//! What makes a clone its own machine: kernel generator, wall clock, host name, and the ids that programs read in files.

pub mod files;

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, Timespec};
use thaw_agent_protocol::Thaw;
use thiserror::Error;

use crate::boot::{BootError, mounts, step};
use crate::network;
use crate::sys;
use files::Files;

/// Fewest fresh random bytes that a thaw must bring: the generator's key is 256 bits.
pub const ENTROPY_BYTES_MIN: usize = 32;

/// Longest host name (`__NEW_UTS_LEN` of linux/utsname.h), bytes.
const HOSTNAME_BYTES_MAX: usize = 64;

/// Why a clone could not be made unique; it must not run anything.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// Too little to make the generator's future differ from the other clones'.
    #[error("thaw brings {0} random bytes, needed are {ENTROPY_BYTES_MIN} to {max}", max = sys::ENTROPY_BYTES_MAX)]
    Entropy(usize),
    /// The wall clock cannot be written as seconds since the epoch.
    #[error("thaw's wall clock {0} ns is out of range")]
    Time(u64),
    /// A name that is empty or over the kernel's limit.
    #[error("the host name has {0} bytes, the limit is {HOSTNAME_BYTES_MAX}")]
    Hostname(usize),
    /// The kernel refused.
    #[error("setting the clone's {what}")]
    System {
        /// What was set.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The machine whose identity changes on a thaw. Tests put a recorder here: the real one would set their host's clock.
pub trait Machine {
    /// Makes this machine the clone that `thaw` describes.
    ///
    /// # Errors
    /// Any part that failed; the machine is then unfit to run a request.
    fn adopt(&mut self, thaw: &Thaw) -> Result<(), AdoptError>;

    /// Gives this machine its name while the snapshot is built.
    ///
    /// # Errors
    /// A name that the kernel does not take.
    fn set_hostname(&mut self, hostname: &str) -> Result<(), AdoptError>;

    /// Mounts the function's code anew: in a guest that was restored from a base runtime's snapshot, another disk's content is
    /// mounted than is there now.
    ///
    /// # Errors
    /// There is no code on the disk, or it cannot be mounted.
    fn take_code(&mut self) -> Result<(), BootError>;

    /// Sets up the network interface, before anything of the function runs.
    ///
    /// # Errors
    /// There is no network device, or the kernel refused.
    fn set_up_network(&mut self, authority: Option<&str>) -> Result<(), BootError>;
}

/// The virtual machine in which the agent is PID 1.
#[derive(Debug)]
pub struct Guest {
    random: File,
    files: Files,
}

impl Guest {
    /// Opens what a thaw needs, so that the thaw itself opens nothing, and puts the files of [`files`] in their places.
    /// Only PID 1 of a guest may call it, once, after [`crate::boot::boot`].
    ///
    /// # Errors
    /// No `/dev/urandom`; a file that cannot be made or mounted.
    pub fn open() -> Result<Self, BootError> {
        let opened = File::options().write(true).open("/dev/urandom");
        let random = step("opening", "/dev/urandom", opened)?;
        let drawn = step("drawing random bytes from", "the kernel", draw())?;
        let files = Files::create(Path::new(files::FOLDER), &drawn)?;
        files::bind(Path::new(files::FOLDER))?;
        Ok(Self { random, files })
    }
}

impl Machine for Guest {
    fn adopt(&mut self, thaw: &Thaw) -> Result<(), AdoptError> {
        let time = validate(thaw)?;
        let failed = |what| move |source: io::Error| AdoptError::System { what, source };
        // Entropy first: nothing may be drawn between the clone's first moment and its reseeding.
        sys::add_entropy(&self.random, &thaw.entropy).map_err(failed("random generator"))?;
        rustix::time::clock_settime(ClockId::Realtime, time)
            .map_err(|e| failed("wall clock")(e.into()))?;
        self.set_hostname(&thaw.hostname)?;
        // From the generator that has just got the host's entropy: what is derived from it may be public.
        let random = draw().map_err(failed("random ids"))?;
        let renewed = self.files.renew(&random);
        renewed.map_err(|(name, source)| failed(name)(source))
    }

    fn set_hostname(&mut self, hostname: &str) -> Result<(), AdoptError> {
        check_hostname(hostname)?;
        rustix::system::sethostname(hostname.as_bytes()).map_err(|error| AdoptError::System {
            what: "host name",
            source: error.into(),
        })
    }

    fn take_code(&mut self) -> Result<(), BootError> {
        mounts::remount_code()
    }

    fn set_up_network(&mut self, authority: Option<&str>) -> Result<(), BootError> {
        network::set_up(authority)
    }
}

/// Random bytes of the kernel's generator for the files. Waits only while the guest boots, until the generator is ready.
fn draw() -> io::Result<[u8; files::RANDOM_BYTES]> {
    let mut bytes = [0; files::RANDOM_BYTES];
    let drawn = getrandom(&mut bytes[..], GetRandomFlags::empty())?;
    // The kernel hands out requests up to 256 bytes whole (getrandom(2)).
    if drawn == bytes.len() {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn check_hostname(hostname: &str) -> Result<(), AdoptError> {
    let length = hostname.len();
    if (1..=HOSTNAME_BYTES_MAX).contains(&length) {
        Ok(())
    } else {
        Err(AdoptError::Hostname(length))
    }
}

fn validate(thaw: &Thaw) -> Result<Timespec, AdoptError> {
    let entropy = thaw.entropy.len();
    if !(ENTROPY_BYTES_MIN..=sys::ENTROPY_BYTES_MAX).contains(&entropy) {
        return Err(AdoptError::Entropy(entropy));
    }
    check_hostname(&thaw.hostname)?;
    Timespec::try_from(Duration::from_nanos(thaw.unix_time_ns))
        .map_err(|_| AdoptError::Time(thaw.unix_time_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thaw() -> Thaw {
        Thaw {
            unix_time_ns: 1_800_000_000_123_456_789,
            hostname: "clone-1".into(),
            entropy: vec![7; 64],
        }
    }

    #[test]
    fn a_complete_thaw_is_valid() {
        let time = validate(&thaw()).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (1_800_000_000, 123_456_789));
    }

    #[test]
    fn a_thaw_without_enough_entropy_or_a_name_is_refused() {
        for bytes in [0, 31, 257] {
            let thaw = Thaw {
                entropy: vec![1; bytes],
                ..thaw()
            };
            assert!(matches!(validate(&thaw), Err(AdoptError::Entropy(n)) if n == bytes));
        }
        for name in [String::new(), "x".repeat(65)] {
            let thaw = Thaw {
                hostname: name,
                ..thaw()
            };
            assert!(matches!(validate(&thaw), Err(AdoptError::Hostname(_))));
        }
    }
}
