//! Everything a guest boots from: kernel, initramfs, runtime root filesystems, function code.
//!
//! **Owns** the folders `kernel/`, `initramfs/`, `images/`, `overlay/`, `cache/` and `staging/` of the
//! state folder (`THAW_HOME`), and how each file in them is made from distribution packages, pinned
//! wheels and the caller's zip.
//!
//! **Must not know** of KVM, of virtual machines, of HTTP, of functions. Nothing here draws or logs:
//! the caller passes a [`Progress`].
//!
//! **Start at** [`ImageStore`].
//!
//! **Always holds.**
//! - An artifact under its final name is complete: it was built in `staging/`, synced and renamed.
//! - Equal manifests give equal bytes: no time, host name, user or directory order enters an image.
//! - The host's installed packages never enter an image: packages are resolved against an empty system.
//! - No step needs root.
//! - A zip is hostile: [`ImageStore::code_image`] checks every entry before it touches the disk.

#![forbid(unsafe_code)]

mod apt;
mod code;
mod digest;
mod erofs;
mod fault;
mod initramfs;
mod kernel;
mod orders;
mod overlay;
mod progress;
mod runtime;
mod staging;
mod store;
mod tool;
mod unzip;

pub use apt::{Package, PackageError};
pub use code::{CODE_DISK_BYTES, CodeError, CodeImage};
pub use erofs::ErofsError;
pub use fault::{Fault, FileError};
pub use initramfs::cpio::{Archive as CpioArchive, CpioError};
pub use initramfs::{Initramfs, InitramfsError};
pub use kernel::bzimage::{BzImageError, VMLINUX_BYTES_MAX, extract_vmlinux};
pub use kernel::modules::{ModuleError, ModuleInfo, load_order};
pub use kernel::{Kernel, KernelError};
pub use overlay::{OVERLAY_MIB_MAX, OVERLAY_MIB_MIN, OverlayError};
pub use progress::{Progress, Quiet};
pub use runtime::{
    Contents, ImageError, LdCacheError, NpmError, NpmRecord, RuntimeImage, RuntimeManifest,
    RuntimeName, UnknownRuntime, WheelError, WheelRecord,
};
pub use staging::StagingError;
pub use store::ImageStore;
pub use tool::ToolError;
pub use unzip::UnzipError;
