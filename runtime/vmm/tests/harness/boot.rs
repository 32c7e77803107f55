//! Booting, and every way in which a guest ends.

use thaw_vmm_control::{BootRequest, ExitReason, Fault, Network, Reply, Request};

use crate::guest::{disk_of, ext4, kernel};
use crate::monitor::{Monitor, copy_on_write, read_only};

fn boots(kernel: &str, vcpu_count: u8) {
    let mut monitor = Monitor::boot(kernel, vcpu_count, &[]);
    assert_eq!(monitor.command("cpus"), vcpu_count.to_string());
    assert_eq!(monitor.command("devices"), "2");
    assert_eq!(monitor.command("random"), "8");
    let status = monitor.status();
    let timings = status.timings;
    let since =
        |moment: Option<u64>| moment.unwrap().saturating_sub(timings.claimed_ns.unwrap()) / 1000;
    println!(
        "{kernel} with {vcpu_count} vcpus: vm made {} us, loaded {} us, first instruction {} us, agent byte {} us",
        since(timings.vm_made_ns),
        since(timings.state_set_ns),
        since(timings.first_instruction_ns),
        since(timings.first_agent_byte_ns),
    );
    monitor.quit();
}

#[test]
fn elf_kernel_boots_with_one_vcpu() {
    boots("vmlinux", 1);
}

#[test]
fn elf_kernel_boots_with_two_vcpus() {
    boots("vmlinux", 2);
}

#[test]
fn elf_kernel_boots_with_four_vcpus() {
    boots("vmlinux", 4);
}

#[test]
fn bzimage_boots_with_one_vcpu() {
    boots("bzImage", 1);
}

#[test]
fn bzimage_boots_with_two_vcpus() {
    boots("bzImage", 2);
}

#[test]
fn bzimage_boots_with_four_vcpus() {
    boots("bzImage", 4);
}

fn ends(command: &str, reason: ExitReason) {
    let mut monitor = Monitor::boot("vmlinux", 1, &[]);
    monitor.tell(command);
    let exit = monitor.exit();
    assert_eq!(exit.reason, reason, "{}: {}", exit.detail, exit.console);
    assert_eq!(monitor.status().console, exit.console);
    assert_eq!(
        exit.console.contains("Kernel panic"),
        reason == ExitReason::Panic
    );
    let refused = monitor.ask(&Request::Pause, &[]);
    assert!(matches!(refused, Reply::Failed(failure) if failure.fault == Fault::Guest));
    monitor.quit();
}

#[test]
fn power_off_is_a_shutdown() {
    ends("poweroff", ExitReason::Shutdown);
}

#[test]
fn reboot_is_a_reset() {
    ends("reboot", ExitReason::Reset);
}

#[test]
fn kernel_panic_is_a_panic_with_its_text() {
    ends("panic", ExitReason::Panic);
}

#[test]
fn disks_are_read_and_written_and_the_file_stays() {
    let (shared, overlay) = (disk_of(b'r', 1 << 20), ext4());
    let disks = [
        (read_only("shared"), &shared),
        (copy_on_write("overlay"), &overlay),
    ];
    let mut monitor = Monitor::boot("vmlinux", 2, &disks);
    assert_eq!(monitor.command("devices"), "4");
    assert_eq!(monitor.command("read /dev/vda 4096 4"), "rrrr");
    assert!(monitor.command("write /dev/vda 0 x").starts_with("error"));
    assert_eq!(monitor.command("mount /dev/vdb"), "mounted");
    assert_eq!(monitor.command("put one text"), "put");
    assert_eq!(monitor.command("get one"), "text");
    monitor.quit();
    let mut fresh = Monitor::boot("vmlinux", 1, &disks);
    fresh.command("mount /dev/vdb");
    assert!(
        fresh.command("get one").starts_with("error"),
        "the file was written to"
    );
    fresh.quit();
}

#[test]
fn a_guest_that_spins_on_all_cpus_is_paused_and_resumed() {
    let mut monitor = Monitor::boot("vmlinux", 2, &[]);
    assert_eq!(monitor.command("spin"), "spinning");
    for round in 0..3 {
        monitor.done(&Request::Pause, &[]);
        monitor.done(&Request::Resume, &[]);
        assert_eq!(
            monitor.command(&format!("ping {round}")),
            format!("pong {round}")
        );
    }
    monitor.quit();
}

#[test]
fn what_is_no_kernel_is_the_callers_fault() {
    let mut monitor = Monitor::start();
    let request = Request::Boot(BootRequest {
        vcpu_count: 1,
        memory_mib: 64,
        command_line: String::new(),
        has_initramfs: false,
        disks: Vec::new(),
        network: Network::Absent,
    });
    let Reply::Failed(failure) = monitor.ask(&request, &[&disk_of(0, 4096)]) else {
        panic!("booted zeros")
    };
    assert_eq!(failure.fault, Fault::Caller, "{failure}");
    assert!(
        matches!(
            monitor.ask(&request, &[&kernel("vmlinux")]),
            Reply::Failed(_)
        ),
        "a second try in the same process"
    );
    monitor.quit();
}

#[test]
fn a_guest_ends_when_the_host_closes_the_agent_channel() {
    let mut monitor = Monitor::boot("vmlinux", 1, &[]);
    monitor.agent.shutdown(std::net::Shutdown::Both).unwrap();
    let exit = monitor.exit();
    assert!(
        exit.detail.contains("agent") || exit.reason == ExitReason::Panic,
        "{exit:?}"
    );
    monitor.quit();
}
