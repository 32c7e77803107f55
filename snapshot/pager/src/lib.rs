//! Serves a range of this process's memory from somewhere else, page by page as it is touched (userfaultfd(2)).
//!
//! Owns: the userfaultfd, the order in which chunks are brought in, what happens when they cannot be, and the record of first
//! touches. Must not know: KVM, guests, where chunks come from (a [`Source`] does). Start at [`Pager`].
//!
//! Always holds: a page that was not served is never seen as zeros. A thread that touches it waits until it is there; when it
//! cannot be brought in, the owner is told, once, and ends the process or drops the [`Pager`], which takes the whole range away.

mod fetch;
mod pager;
mod schedule;
mod source;
mod userfault;

pub use pager::{Failure, Mode, Pager, PagerConfig, StartError, Stats, WORKERS_MAX};
pub use source::{Filled, OpenStoreError, SnapshotSource, Source, SourceError, stored_memory};
pub use userfault::{Userfault, UserfaultError};
