//! Everything that does not depend on the command: it is done before a lab's state is saved.

use crate::sys;
use std::{
    fs::{self, File},
    io,
    net::UdpSocket,
    path::PathBuf,
};

/// What must stay open for as long as the lab runs.
pub struct Booted {
    _kvm: Option<HeldVm>,
}

/// One idle VM. KVM turns static keys on for its first VM and off with its last, which patches the kernel's text; QEMU's
/// multi-threaded TCG sometimes deadlocks when another processor runs that text meanwhile.
struct HeldVm {
    _vm: File,
    _vcpu: File,
}

/// Mounts the kernel's file systems, loads the modules, holds a VM, and only then brings the other processors online.
pub fn boot() -> io::Result<Booted> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        sys::mount_at(kind, target.as_bytes(), kind, 0, "")?;
    }
    for name in fs::read_to_string("/modules/order")?.lines() {
        let path = format!("/modules/{name}");
        if let Err(error) = File::open(&path).and_then(|file| sys::load_module(&file)) {
            eprintln!("thaw-lab-init: module {name}: {error}");
        }
    }
    let kvm = hold_vm()
        .inspect_err(|error| eprintln!("thaw-lab-init: /dev/kvm: {error}"))
        .ok();
    online_processors()?;
    if let Err(error) = network() {
        eprintln!("thaw-lab-init: network: {error}");
    }
    Ok(Booted { _kvm: kvm })
}

// ioctl numbers: Documentation/virt/kvm/api.rst, include/uapi/linux/kvm.h.
fn hold_vm() -> io::Result<HeldVm> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let vm = sys::own(sys::ioctl_number(&kvm, 0xae01, 0)?); // KVM_CREATE_VM
    sys::ioctl_number(&vm, 0xae47, 0xfffb_d000)?; // KVM_SET_TSS_ADDR
    sys::ioctl_number(&vm, 0xae60, 0)?; // KVM_CREATE_IRQCHIP
    let vcpu = sys::own(sys::ioctl_number(&vm, 0xae41, 0)?); // KVM_CREATE_VCPU
    Ok(HeldVm {
        _vm: vm,
        _vcpu: vcpu,
    })
}

fn online_processors() -> io::Result<()> {
    for entry in fs::read_dir("/sys/devices/system/cpu")? {
        let online = entry?.path().join("online");
        if fs::read_to_string(&online).is_ok_and(|text| text.trim() == "0") {
            fs::write(&online, "1")?;
        }
    }
    Ok(())
}

/// Loopback, and eth0 with the address that QEMU's user-mode network expects (10.0.2.15, gateway 10.0.2.2).
fn network() -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let request = |name: &str, tail: &[u8]| {
        let mut request = [0; 40]; // struct ifreq, include/uapi/linux/if.h
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..16 + tail.len()].copy_from_slice(tail);
        request
    };
    let up = 0x41_u16.to_le_bytes(); // IFF_UP | IFF_RUNNING
    sys::ioctl_buffer(&socket, 0x8914, &mut request("lo", &up))?; // SIOCSIFFLAGS
    sys::ioctl_buffer(
        &socket,
        0x8916,
        &mut request("eth0", &address([10, 0, 2, 15])),
    )?; // SIOCSIFADDR
    sys::ioctl_buffer(
        &socket,
        0x891c,
        &mut request("eth0", &address([255, 255, 255, 0])),
    )?; // SIOCSIFNETMASK
    sys::ioctl_buffer(&socket, 0x8914, &mut request("eth0", &up))?;
    let mut route = [0; 120]; // struct rtentry, include/uapi/linux/route.h
    route[8..24].copy_from_slice(&address([0; 4]));
    route[24..40].copy_from_slice(&address([10, 0, 2, 2]));
    route[40..56].copy_from_slice(&address([0; 4]));
    route[56] = 3; // RTF_UP | RTF_GATEWAY
    sys::ioctl_buffer(&socket, 0x890b, &mut route) // SIOCADDRT
}

/// struct sockaddr_in without a port.
fn address(ip: [u8; 4]) -> [u8; 16] {
    let mut address = [0; 16];
    address[0] = 2; // AF_INET
    address[4..8].copy_from_slice(&ip);
    address
}

/// Device node of the virtio-serial port of that name.
pub fn port(name: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|text| text.trim() == name) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("no virtio-serial port {name}"),
    ))
}
