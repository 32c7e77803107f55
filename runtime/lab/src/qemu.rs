//! QEMU's command line.

use crate::{Paging, PortForward};
use std::{
    ffi::{OsStr, OsString},
    os::fd::RawFd,
    path::PathBuf,
};

/// What the emulated machine is made of. A saved state fits only a machine of the same plan, forwards and descriptors apart.
#[derive(Debug, Clone)]
pub struct Plan {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub memory_mib: u32,
    pub cpu_count: u8,
    pub paging: Paging,
    /// Frequency of this machine's time-stamp counter.
    pub tsc_khz: u64,
    pub forwards: Vec<PortForward>,
}

/// Descriptors that QEMU inherits: guest memory and one end each of connected sockets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Descriptors {
    pub memory: RawFd,
    pub monitor: RawFd,
    pub root: RawFd,
    pub control: RawFd,
    pub stdin: RawFd,
    pub stdout: RawFd,
    pub stderr: RawFd,
}

/// How the machine comes to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The kernel boots, the shared file system is there from the start.
    Boot,
    /// The kernel boots without the shared file system, which cannot be saved.
    BootToSave,
    /// A saved state will be loaded through the monitor.
    Resume,
}

/// The kernel's command line. The clock is the host's time-stamp counter: measured here, never calibrated (that fails and hangs on a busy
/// machine). Processors beyond the first come online after all modules are loaded (see the init's `boot.rs`).
fn kernel_command_line(tsc_khz: u64) -> String {
    format!(
        "console=ttyS0 quiet reboot=t panic=-1 mitigations=off maxcpus=1 tsc=reliable clocksource=tsc tsc_early_khz={tsc_khz}"
    )
}

/// The emulated processor. Guests' page tables are shadowed: with nested paging, QEMU 7.2 on two processors now and then walks a guest's page tables in the wrong
/// memory, the tables themselves being right (seen: 11 errors in a little over 600 invocations by 20 clients, mostly triple faults, and
/// lab kernels with overwritten stacks). 2.4 invocations a second under that load, where nested paging gave 2.3 to 2.8.
fn processor(paging: Paging) -> &'static str {
    match paging {
        Paging::Shadow => "max,+svm,-npt",
        Paging::Nested => "max,+svm,+npt",
    }
}

/// The device through which the lab sees this machine's files.
pub const ROOT_DEVICE: &str = "vhost-user-fs-pci";

/// All arguments. The `pc` machine is used because its PCI bus takes devices while it runs (ACPI hot-plug).
pub fn arguments(plan: &Plan, fds: &Descriptors, start: Start) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add =
        |name: &str, value: &OsStr| arguments.extend([OsString::from(name), value.to_owned()]);
    let memory = plan.memory_mib;
    add("-name", "thaw-lab".as_ref());
    add(
        "-machine",
        "pc,memory-backend=mem,usb=off,vmport=off".as_ref(),
    );
    add("-accel", "tcg,thread=multi".as_ref());
    add("-cpu", processor(plan.paging).as_ref());
    add("-smp", plan.cpu_count.to_string().as_ref());
    add("-m", memory.to_string().as_ref());
    // vhost-user needs shared memory, saving needs a file; a memfd is both and leaves nothing behind.
    let backend = format!(
        "memory-backend-file,id=mem,size={memory}M,share=on,mem-path=/proc/self/fd/{}",
        fds.memory
    );
    add("-object", backend.as_ref());
    add("-kernel", plan.kernel.as_os_str());
    add("-initrd", plan.initrd.as_os_str());
    add("-append", kernel_command_line(plan.tsc_khz).as_ref());
    for (id, fd) in [("qmp", fds.monitor), ("root", fds.root)] {
        add("-chardev", format!("socket,id={id},fd={fd}").as_ref());
    }
    add("-mon", "chardev=qmp,mode=control".as_ref());
    add("-chardev", "stdio,id=console,signal=off".as_ref());
    add("-serial", "chardev:console".as_ref());
    add("-device", "virtio-serial-pci,id=ports".as_ref());
    use crate::protocol::{CONTROL_PORT, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
    for (name, fd) in [
        (CONTROL_PORT, fds.control),
        (STDIN_PORT, fds.stdin),
        (STDOUT_PORT, fds.stdout),
        (STDERR_PORT, fds.stderr),
    ] {
        add("-chardev", format!("socket,id={name},fd={fd}").as_ref());
        add(
            "-device",
            format!("virtserialport,bus=ports.0,chardev={name},name={name}").as_ref(),
        );
    }
    let mut network = "user,id=net".to_owned();
    for PortForward { host, lab } in &plan.forwards {
        network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{lab}"));
    }
    add("-netdev", network.as_ref());
    add("-device", "virtio-net-pci,netdev=net,romfile=".as_ref());
    match start {
        Start::Boot => add(
            "-device",
            format!(
                "{ROOT_DEVICE},chardev=root,tag={}",
                crate::protocol::ROOT_TAG
            )
            .as_ref(),
        ),
        Start::BootToSave => {}
        Start::Resume => add("-incoming", "defer".as_ref()),
    }
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    arguments.extend(["-display", "none"].map(OsString::from));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(start: Start) -> String {
        let forwards = vec![
            PortForward {
                host: 18080,
                lab: 8080,
            },
            PortForward {
                host: 18081,
                lab: 81,
            },
        ];
        let plan = Plan {
            kernel: "/k".into(),
            initrd: "/i".into(),
            memory_mib: 1024,
            cpu_count: 3,
            paging: Paging::Shadow,
            tsc_khz: 2_596_144,
            forwards,
        };
        let fds = Descriptors {
            memory: 10,
            monitor: 11,
            root: 12,
            control: 13,
            stdin: 14,
            stdout: 15,
            stderr: 16,
        };
        arguments(&plan, &fds, start)
            .iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn machine_is_the_one_that_was_planned() {
        let line = shown(Start::Boot);
        for part in [
            "-cpu max,+svm,-npt -smp 3 ",
            "-m 1024 ",
            "size=1024M,share=on,mem-path=/proc/self/fd/10 ",
            "tsc_early_khz=2596144",
            "hostfwd=tcp:127.0.0.1:18080-:8080,hostfwd=tcp:127.0.0.1:18081-:81 ",
            "-chardev socket,id=thaw.stderr,fd=16 -device virtserialport,bus=ports.0,chardev=thaw.stderr,name=thaw.stderr",
            "vhost-user-fs-pci,chardev=root,tag=thaw-root",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }

    #[test]
    fn shared_file_system_is_absent_while_the_state_is_saved_or_loaded() {
        assert!(!shown(Start::BootToSave).contains("vhost-user-fs"));
        let resumed = shown(Start::Resume);
        assert!(!resumed.contains("vhost-user-fs") && resumed.contains("-incoming defer"));
    }
}
