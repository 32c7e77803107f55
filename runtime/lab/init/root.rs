//! The command's file system: the machine's root, read-only under a tmpfs overlay, with the writable folders at their own paths.

use crate::{protocol, sys};
use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, fs::symlink},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// How long the shared file system's device may take to appear after it was plugged in.
const ROOT_WAIT: Duration = Duration::from_secs(20);

/// Builds the file system and makes it this process's root.
pub fn enter(start: &protocol::Start) -> Result<(), String> {
    for folder in ["/ro", "/rw", "/new"] {
        fs::create_dir_all(folder).map_err(|error| format!("{folder}: {error}"))?;
    }
    mount_root()?;
    mount("rw", "/rw", "tmpfs", "size=90%,mode=755")?;
    for folder in ["/rw/upper", "/rw/work"] {
        fs::create_dir(folder).map_err(|error| format!("{folder}: {error}"))?;
    }
    // Without root's rights over there, root's files show as nobody's, and a set-user-ID program would become nobody.
    let (lower, flags) = match start.rootless {
        0 => ("/ro", 0),
        _ => (rootless_layer()?, sys::MS_NOSUID),
    };
    let layers = format!("lowerdir={lower},upperdir=/rw/upper,workdir=/rw/work");
    sys::mount_at("overlay", b"/new", "overlay", flags, &layers)
        .map_err(|error| format!("overlay on /new: {error}"))?;
    kernel_file_systems()?;
    for folder in &start.writable {
        bind(folder, folder)?;
    }
    if !start.modules.is_empty() {
        bind(&start.modules, b"/lib/modules")
            .unwrap_or_else(|error| eprintln!("thaw-lab-init: modules: {error}"));
    }
    let resolv = Path::new("/new/etc/resolv.conf");
    let _ = fs::remove_file(resolv); // often a link into /run
    let _ = fs::write(resolv, "nameserver 10.0.2.3\n"); // QEMU's user-mode network passes it on to the host's
    // What switch_root(8) does: a mere chroot would forbid the command to make user namespaces.
    std::env::set_current_dir("/new")
        .and_then(|()| sys::mount_at(".", b"/", "", sys::MS_MOVE, ""))
        .and_then(|()| std::os::unix::fs::chroot("."))
        .and_then(|()| std::env::set_current_dir("/"))
        .map_err(|error| format!("new root: {error}"))
}

/// overlayfs opens the files below it with `O_NOATIME`, which the kernel of the machine grants to a file's owner alone; an ordinary
/// user's virtiofsd would be refused for every system file. A mounter without CAP_FOWNER makes overlayfs leave the flag out. The
/// upper overlay needs that capability for its copies, so this one lies between.
fn rootless_layer() -> Result<&'static str, String> {
    for folder in ["/empty", "/plain"] {
        fs::create_dir_all(folder).map_err(|error| format!("{folder}: {error}"))?;
    }
    // Capabilities belong to a thread; this one ends with them.
    let mounter = thread::spawn(|| {
        sys::drop_fowner().map_err(|error| format!("capabilities: {error}"))?;
        mount("overlay", "/plain", "overlay", "lowerdir=/ro:/empty")
    });
    mounter
        .join()
        .unwrap_or_else(|_| Err("mounting thread failed".to_owned()))?;
    Ok("/plain")
}

fn mount_root() -> Result<(), String> {
    let end = Instant::now() + ROOT_WAIT;
    loop {
        match sys::mount_at(protocol::ROOT_TAG, b"/ro", "virtiofs", 0, "") {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > end => {
                return Err(format!("shared file system: {error}"));
            }
            Err(_) => thread::sleep(Duration::from_millis(2)), // the device is still being plugged in
        }
    }
}

fn kernel_file_systems() -> Result<(), String> {
    for folder in ["proc", "sys", "dev", "run", "tmp"] {
        let _ = fs::create_dir(Path::new("/new").join(folder)); // mostly there
    }
    mount("proc", "/new/proc", "proc", "")?;
    mount("sysfs", "/new/sys", "sysfs", "")?;
    mount("cgroup2", "/new/sys/fs/cgroup", "cgroup2", "")?;
    mount("devtmpfs", "/new/dev", "devtmpfs", "")?;
    mount("run", "/new/run", "tmpfs", "mode=755")?;
    for (folder, kind, data) in [
        ("shm", "tmpfs", "mode=1777"),
        ("pts", "devpts", "mode=620,ptmxmode=666"),
    ] {
        let path = format!("/new/dev/{folder}");
        fs::create_dir_all(&path).map_err(|error| format!("{path}: {error}"))?;
        mount(folder, &path, kind, data)?;
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        let _ = symlink(target, Path::new("/new/dev").join(link)); // there already after an earlier attempt
    }
    for device in ["kvm", "net/tun"] {
        let _ = fs::set_permissions(
            Path::new("/new/dev").join(device),
            fs::Permissions::from_mode(0o666),
        );
    }
    let _ = fs::write("/proc/sys/vm/unprivileged_userfaultfd", "1");
    let _ = fs::write("/proc/sys/kernel/hostname", "thaw-lab");
    Ok(())
}

/// Mounts the shared file system's folder `from` over `to`, writable.
fn bind(from: &[u8], to: &[u8]) -> Result<(), String> {
    let shown = String::from_utf8_lossy(from).into_owned();
    let target = under("/new", to);
    fs::create_dir_all(&target)
        .and_then(|()| {
            sys::mount_bytes(
                under("/ro", from).as_os_str().as_bytes(),
                target.as_os_str().as_bytes(),
                "",
                sys::MS_BIND,
                "",
            )
        })
        .map_err(|error| format!("writable folder {shown}: {error}"))
}

fn under(root: &str, path: &[u8]) -> PathBuf {
    let relative = OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path));
    Path::new(root).join(relative)
}

fn mount(source: &str, target: &str, kind: &str, data: &str) -> Result<(), String> {
    sys::mount_at(source, target.as_bytes(), kind, 0, data)
        .map_err(|error| format!("{kind} on {target}: {error}"))
}
