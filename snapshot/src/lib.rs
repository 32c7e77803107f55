//! The snapshot: a booted, initialised VM, frozen into one file.
//!
//! Owns: the file format (FORMAT.md beside this crate describes each byte), its digests and its authentication, atomic commit, and
//! the record of CPU features. Must not know: KVM, guests, sockets. Start at [`Writer`] and [`Snapshot`].
//!
//! A snapshot stands by itself or is a difference to another, its base. [`set_working_set`] gives one a working set later.
//!
//! Always holds: no byte of a section is decoded before its digest was checked; no length from a file is trusted
//! before it was compared with a named limit and with the file's own length; a final name never holds a partial file.
#![forbid(unsafe_code)]

mod amend;
mod authentic;
pub mod commit;
pub mod cpu;
mod difference;
mod layers;
mod layout;
mod metadata;
mod reader;
mod sparse;
mod working_set;
mod writer;

pub use amend::{AmendError, set_working_set};
pub use authentic::{AuthenticityError, Key, TagError, tag};
pub use commit::PendingFile;
pub use cpu::{CpuRecord, Leaf, MissingFeature};
pub use difference::{BaseRef, DIFFERENCE_RUNS_DEFAULT, DIFFERENCE_RUNS_MAX, close_gaps};
pub use layers::{BaseError, MemoryLayer, MemoryReader};
pub use layout::{FORMAT_VERSION, HeaderError, PAGE_BYTES, SectionKind};
pub use metadata::Metadata;
pub use reader::{OpenError, Snapshot, SparseSection, VerifyError};
pub use sparse::{PageRun, RunsError};
pub use working_set::{
    Access, Touch, TouchedRun, WORKING_SET_RUNS_MAX, WorkingSet, WorkingSetError,
};
pub use writer::{PageSource, Summary, WriteError, Writer};

/// Identity of a snapshot: blake3 over its header, which holds the digest of every section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
