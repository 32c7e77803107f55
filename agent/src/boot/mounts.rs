//! Mounts, and the way from the initramfs to the real root.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use super::disks::{self, Disk, Disks};
use super::{BootError, step};

/// Where the new root is put together in the initramfs.
pub const NEW_ROOT: &str = "/root.new";

/// Folders of the code disk, and where they are shown: the function's code and its layers.
const SHOWN: [(&str, &str); 2] = [("task", "var/task"), ("opt", "opt")];

/// Where the code disk is mounted for the moment in which its folders are bound: in the initramfs and in the running guest.
const CODE_EARLY: &str = "/code";
const CODE: &str = "/run/code";

/// Folders of the initramfs under which the overlay's parts are mounted; they stay reachable through the overlay only.
const LOWER: &str = "/lower";
const WRITABLE: &str = "/writable";

/// Nothing on the writable disk outlives the sandbox, so nothing is gained by ordering its writes.
const OVERLAY_DISK_OPTIONS: &std::ffi::CStr = c"nobarrier,noauto_da_alloc";

/// Mounts what loading modules and finding disks need.
///
/// # Errors
/// A mount that failed.
pub fn early() -> Result<(), BootError> {
    let nothing = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount("proc", "/proc", "proc", nothing, None)?;
    mount("sysfs", "/sys", "sysfs", nothing | MountFlags::RDONLY, None)?;
    let device = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devtmpfs", "/dev", "devtmpfs", device, Some(c"mode=0755"))
}

/// Puts the new root together: image, overlay, code, /tmp and the kernel's file systems.
///
/// # Errors
/// A mount or folder that failed.
pub fn root(disks: &Disks, new_root: &Path) -> Result<(), BootError> {
    let read_only = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOATIME;
    let writable = MountFlags::NODEV | MountFlags::NOATIME;
    mount_disk(&disks.root, Path::new(LOWER), read_only, None)?;
    let options = Some(OVERLAY_DISK_OPTIONS);
    mount_disk(&disks.overlay, Path::new(WRITABLE), writable, options)?;
    let folder = |name: &str| Path::new(WRITABLE).join(name);
    for (name, mode) in [("upper", 0o755), ("work", 0o700), ("tmp", 0o1777)] {
        make_folder(&folder(name), mode)?;
    }
    let options = c"lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work";
    mount("overlay", new_root, "overlay", writable, Some(options))?;

    // Straight on the disk and not through the overlay, which would copy nothing but still be in the way.
    let tmp = new_root.join("tmp");
    make_folder(&tmp, 0o1777)?;
    let flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    mount(folder("tmp"), &tmp, "", flags, None)?;

    if let Some(code) = &disks.code {
        show_code(code, Path::new(CODE_EARLY), new_root)?;
    }
    for early in ["proc", "sys", "dev"] {
        let to = new_root.join(early);
        make_folder(&to, 0o755)?;
        let from = Path::new("/").join(early);
        step(
            "moving mount to",
            &to,
            rustix::mount::mount_move(&from, &to),
        )?;
    }
    kernel_file_systems(new_root)
}

/// Mounts the code disk anew, in the running guest. Nothing of the old content is left: the kernel drops what it has read of a
/// disk when its last user is gone (block/bdev.c, `blkdev_flush_mapping`), and these mounts are all it has.
///
/// # Errors
/// There is no code disk, something uses the old content, or the new one is no file system.
pub fn remount_code() -> Result<(), BootError> {
    let root = Path::new("/");
    for (_, shown) in SHOWN {
        unmount(&root.join(shown))?;
    }
    show_code(&disks::code(Path::new("/dev"))?, Path::new(CODE), root)
}

/// Mounts the code disk at `at` for as long as it takes to bind its folders below `root`. A bind keeps the file system and the
/// flags of what it was made from (mount(2)): both are read-only.
fn show_code(disk: &Disk, at: &Path, root: &Path) -> Result<(), BootError> {
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOATIME | MountFlags::NOSUID;
    mount_disk(disk, at, flags, None)?;
    for (folder, shown) in SHOWN {
        let target = root.join(shown);
        make_folder(&target, 0o755)?;
        mount(at.join(folder), target, "", MountFlags::BIND, None)?;
    }
    unmount(at)?;
    step("removing", at, fs::remove_dir(at))
}

fn unmount(target: &Path) -> Result<(), BootError> {
    let result = rustix::mount::unmount(target, UnmountFlags::empty());
    step("unmounting", target, result)
}

fn kernel_file_systems(new_root: &Path) -> Result<(), BootError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    let devpts = Some(c"newinstance,ptmxmode=0666,mode=0620,gid=5");
    let device = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devpts", new_root.join("dev/pts"), "devpts", device, devpts)?;
    mount(
        "tmpfs",
        new_root.join("dev/shm"),
        "tmpfs",
        quiet,
        Some(c"mode=1777"),
    )?;
    mount(
        "tmpfs",
        new_root.join("run"),
        "tmpfs",
        quiet,
        Some(c"mode=0755"),
    )?;
    // devtmpfs has none of these; shells and runtimes expect them.
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let link = new_root.join("dev").join(name);
        match std::os::unix::fs::symlink(target, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => step("linking", &link, other)?,
        }
    }
    Ok(())
}

/// Makes `new_root` the root of this process and all later ones, and frees the initramfs.
///
/// # Errors
/// The mount cannot be moved. Files of the initramfs that cannot be removed only cost memory.
pub fn switch_root(new_root: &Path) -> Result<(), BootError> {
    let initramfs = step("examining", "/", fs::metadata("/"))?.dev();
    // The overlay keeps its parts alive; without these two names nothing else can reach them.
    for part in [LOWER, WRITABLE] {
        let result = rustix::mount::unmount(part, UnmountFlags::DETACH);
        step("detaching", part, result)?;
    }
    remove_files(Path::new("/"), initramfs);
    let chdir = |path: &Path| step("entering", path, rustix::process::chdir(path));
    chdir(new_root)?;
    step(
        "moving root from",
        new_root,
        rustix::mount::mount_move(".", "/"),
    )?;
    step("changing root to", new_root, rustix::process::chroot("."))?;
    chdir(Path::new("/"))
}

/// Removes everything below `folder` that lies on the file system `device`.
fn remove_files(folder: &Path, device: u64) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        match fs::symlink_metadata(&path) {
            Ok(found) if found.dev() != device => {}
            Ok(found) if found.is_dir() => {
                remove_files(&path, device);
                let _ = fs::remove_dir(&path);
            }
            Ok(_) => drop(fs::remove_file(&path)),
            Err(_) => {}
        }
    }
}

fn mount_disk(
    disk: &Disk,
    target: &Path,
    flags: MountFlags,
    options: Option<&std::ffi::CStr>,
) -> Result<(), BootError> {
    mount(&disk.path, target, disk.file_system.name(), flags, options)
}

fn mount(
    source: impl AsRef<Path>,
    target: impl AsRef<Path>,
    file_system: &str,
    flags: MountFlags,
    options: Option<&std::ffi::CStr>,
) -> Result<(), BootError> {
    let target = target.as_ref();
    if !target.exists() {
        make_folder(target, 0o755)?;
    }
    let result = rustix::mount::mount(source.as_ref(), target, file_system, flags, options);
    step("mounting on", target, result)
}

/// Makes a folder with exactly this mode; one that exists keeps its own mode unless it lacks some of these bits.
fn make_folder(path: &Path, mode: u32) -> Result<(), BootError> {
    step("making folder", path, fs::create_dir_all(path))?;
    let found = step("examining", path, fs::metadata(path))?;
    if found.permissions().mode() & mode == mode {
        return Ok(());
    }
    step(
        "setting the mode of",
        path,
        fs::set_permissions(path, Permissions::from_mode(mode)),
    )
}
