//! The monitor's control protocol: what the runtime asks of one `thaw-vmm` process, and what that answers.
//!
//! Owns: requests, replies and events, and their framing with descriptors on a Unix stream socket. Must not know: KVM,
//! guest memory, tokio. The monitor inherits two descriptors: [`CONTROL_FD`] and [`AGENT_FD`].
//!
//! Protocol: the runtime sends one [`Request`] at a time and waits for its [`Reply`]; [`Event`]s may come in between.
//! When the control socket closes, the monitor ends its VM and exits: no monitor outlives its runtime.
//!
//! Framing: `length u32 LE | JSON`, at most [`MESSAGE_BYTES_MAX`]; descriptors travel as `SCM_RIGHTS` with the first
//! byte of their message, in the order that the request names them.
#![forbid(unsafe_code)]

pub mod wire;

use std::fmt;

use serde::{Deserialize, Serialize};

/// Descriptor number of the control socket in a monitor (Unix stream).
pub const CONTROL_FD: i32 = 3;
/// Descriptor number of the agent channel in a monitor (Unix stream): the guest's vsock stream, byte for byte.
pub const AGENT_FD: i32 = 4;
/// Largest JSON message, bytes.
pub const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// Most descriptors with one message.
pub const FDS_MAX: usize = 16;
/// Most virtual CPUs of a VM.
pub const VCPU_COUNT_MAX: u8 = 4;
/// Most runs of a [`WorkingSet`]; what was touched later is left out.
pub const WORKING_SET_RUNS_MAX: usize = 8192;
/// Most disks of a VM.
pub const DISK_COUNT_MAX: usize = 8;

/// From the runtime to the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Make a VM and start its kernel. Descriptors: kernel, initramfs (if any), then one for each disk, all readable; last the
    /// tap, if [`Network::Plugged`].
    Boot(BootRequest),
    /// Become a shell: make everything of a VM that no snapshot is needed for. No descriptors.
    Prepare(PrepareRequest),
    /// Make a VM from a snapshot. Descriptors: the snapshot, its base if [`RestoreRequest::has_base`], the store's folder if
    /// [`Paging::Store`], then one for each disk with [`DiskSource::Descriptor`], last the tap if [`RestoreRequest::has_tap`]. A shell of the snapshot's shape is *claimed*; an empty monitor is prepared first.
    Restore(RestoreRequest),
    /// Run the VM. Bytes already waiting in the agent channel are in the guest's receive queue before its first instruction.
    Resume,
    /// Stop all vCPUs and finish what the devices have begun.
    Pause,
    /// Put the VM back to the snapshot that it was restored from, paused, as if it had never run. Descriptor: a fresh agent
    /// channel (Unix stream), which replaces the old one; then a fresh tap, if the VM is to have one again: the old one is closed
    /// in any case. After a failure the VM is of no use.
    Rewind,
    /// Write the paused VM as a snapshot. Descriptor: an empty writable file. It is complete and synced on `Done`; naming
    /// (renaming) it is the caller's part. The VM stays paused.
    Save(SaveRequest),
    /// Ask for the console's tail and the timings so far.
    Status,
    /// Tell which pages the guest has touched since it was restored: in the order of the first touches if [`Paging::Recorded`].
    WorkingSet,
    /// End the VM and the process. The reply is the last message.
    Quit,
}

/// A VM from a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRequest {
    /// 1 to [`VCPU_COUNT_MAX`].
    pub vcpu_count: u8,
    /// Guest memory, MiB, 64 to 10,240.
    pub memory_mib: u32,
    /// Kernel command line, printable ASCII, at most 2,047 bytes.
    pub command_line: String,
    /// An initramfs descriptor follows the kernel's.
    pub has_initramfs: bool,
    /// In order: the guest's /dev/vda, /dev/vdb, …
    pub disks: Vec<Disk>,
    /// The guest's network.
    #[serde(default)]
    pub network: Network,
}

/// A VM's network device. A tap is one of IFF_TAP, IFF_NO_PI and IFF_VNET_HDR with a header of 12 bytes and no offloads; the monitor
/// reads and writes it and asks nothing else of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// The guest has none.
    #[default]
    Absent,
    /// It has one, with nothing at the other end: what it sends is lost. A restored guest may get a tap all the same.
    Unplugged,
    /// It has one, with the tap behind the last descriptor.
    Plugged,
}

/// The shape of a VM whose snapshot is not known yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRequest {
    /// 1 to [`VCPU_COUNT_MAX`].
    pub vcpu_count: u8,
    /// Guest memory, MiB, 64 to 10,240.
    pub memory_mib: u32,
    /// In order: the guest's /dev/vda, /dev/vdb, …
    pub disks: Vec<DiskShape>,
    /// There is a network device. Its tap comes with the claim.
    #[serde(default)]
    pub has_network: bool,
}

/// What of a disk must be known before its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShape {
    /// What the guest may do.
    pub access: DiskAccess,
}

/// A VM from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// As many as the snapshot was taken with, in the same order.
    pub disks: Vec<Disk>,
    /// Run it at once, as [`Request::Resume`] would: one message for claim and run. Without it the VM is left paused.
    #[serde(default)]
    pub resume: bool,
    /// The snapshot is a difference; the descriptor of what it differs from follows the snapshot's own.
    #[serde(default)]
    pub has_base: bool,
    /// What is fetched beside the running guest before it asks for it.
    #[serde(default)]
    pub prefetch: Prefetch,
    /// How its memory is brought in.
    #[serde(default)]
    pub paging: Paging,
    /// The last descriptor is a tap for the snapshot's network device, which it must have. Without it, the device is unplugged.
    #[serde(default)]
    pub has_tap: bool,
}

/// How guest memory is brought in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Paging {
    /// By the kernel, from a private mapping of the snapshot's file: clones share what they do not write.
    #[default]
    Mapped,
    /// By the monitor, when it is touched, from a chunk store; the snapshot is a stub and has no base. Each chunk is verified.
    /// A source that fails or does not answer ends the VM ([`ExitReason::HostFault`]), and the process if it cannot say so.
    Store,
    /// By the monitor, page by page when it is touched, from the snapshot's files, so that [`Request::WorkingSet`] tells the
    /// order. Slow: for recording.
    Recorded,
}

/// What is fetched beside a running guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefetch {
    /// Nothing: every page when the guest first touches it.
    #[default]
    Off,
    /// The snapshot's own working set, if it has one.
    WorkingSet,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The serial number the guest sees, at most 20 ASCII bytes.
    pub id: String,
    /// What the guest may do.
    pub access: DiskAccess,
    /// Where the content comes from.
    #[serde(default)]
    pub source: DiskSource,
}

/// What the guest may do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskAccess {
    /// Read only; the file is shared between VMs.
    ReadOnly,
    /// Writes go to memory of this VM alone and end with it; the file is never written. Saved into the snapshot.
    CopyOnWrite,
}

/// Where a disk's content comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// The whole file behind the next descriptor.
    #[default]
    Descriptor,
    /// The snapshot's own disk section for this disk (restore only).
    Snapshot,
}

/// What goes into a snapshot beside the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// JSON document for the snapshot's metadata section.
    pub metadata: serde_json::Value,
    /// How guest memory is written.
    #[serde(default)]
    pub form: SaveForm,
}

/// How a snapshot holds guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveForm {
    /// All of it: the snapshot stands by itself.
    #[default]
    Whole,
    /// What differs from the snapshot that the VM was restored from, which must stand by itself.
    Difference,
}

/// Answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time is sent and taken apart at once; boxes would be for nothing"
)]
pub enum Reply {
    /// Done.
    Done,
    /// Saved: what it took.
    Saved(Saved),
    /// Rewound: what it took.
    Rewound(Rewound),
    /// Answer to [`Request::WorkingSet`].
    WorkingSet(WorkingSet),
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Not done. After a failed boot, restore or resume the only sensible request is `Quit`.
    Failed(Failure),
}

/// A snapshot as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Length of the file, bytes.
    pub file_bytes: u64,
    /// Bytes that are not holes.
    pub stored_bytes: u64,
    /// Identity of the snapshot: hexadecimal blake3.
    pub digest: String,
}

/// A VM that is as it was restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewound {
    /// Pages of guest memory that were put back.
    pub pages: u64,
    /// Bytes of copy-on-write disks that were dropped.
    pub disk_bytes: u64,
}

/// What a guest has touched of its memory since it was restored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// In the order in which they should be fetched, at most [`WORKING_SET_RUNS_MAX`].
    pub runs: Vec<WorkingSetRun>,
}

/// Neighbouring pages of guest memory, counted in pages of 4 KiB from the memory section's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSetRun {
    /// First page.
    pub start: u64,
    /// Pages, at least 1.
    pub count: u64,
    /// The guest wrote to them, or to some of them.
    pub written: bool,
}

/// The monitor's view of its VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The last bytes the guest wrote to its serial console, lossy UTF-8, at most 64 KiB.
    pub console: String,
    /// When things happened.
    pub timings: Timings,
}

/// Moments on this host's `CLOCK_MONOTONIC`, nanoseconds; `None` for what has not happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// The shell was asked for: `Prepare` arrived, or `Restore` in an empty monitor.
    #[serde(default)]
    pub prepared_from_ns: Option<u64>,
    /// VM, interrupt chips, vCPUs and devices exist.
    pub vm_made_ns: Option<u64>,
    /// The shell is ready: event descriptors are registered, threads parked.
    #[serde(default)]
    pub prepared_ns: Option<u64>,
    /// `Boot` or `Restore` arrived: the claim. In a shell, all of the above lie before.
    pub claimed_ns: Option<u64>,
    /// The snapshot's header and state were read and decoded. In a rewind: the VM is stopped, and what it has written is known.
    #[serde(default)]
    pub decoded_ns: Option<u64>,
    /// Guest memory is mapped.
    pub memory_mapped_ns: Option<u64>,
    /// The vCPUs have their state.
    #[serde(default)]
    pub vcpus_set_ns: Option<u64>,
    /// The interrupt chips have theirs.
    #[serde(default)]
    pub chips_set_ns: Option<u64>,
    /// vCPU, interrupt chip and device state is set; the VM is paused and ready.
    pub state_set_ns: Option<u64>,
    /// The newest `Resume` arrived, or a claim went on to run.
    pub resume_ns: Option<u64>,
    /// What lay in the agent channel is in the guest's receive queue.
    #[serde(default)]
    pub primed_ns: Option<u64>,
    /// The guest's clocks are set and its vCPUs are told to run.
    #[serde(default)]
    pub time_set_ns: Option<u64>,
    /// The first vCPU entered the guest after the newest `Resume`: the guest's first instruction.
    pub first_instruction_ns: Option<u64>,
    /// The first byte from the agent reached the host after the newest `Resume`.
    pub first_agent_byte_ns: Option<u64>,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The whole chain of causes, for people.
    pub message: String,
    /// Whose fault.
    pub fault: Fault,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Whose fault a failure is; picks log level and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The request, or a file it names.
    Caller,
    /// The guest.
    Guest,
    /// This machine or the monitor.
    Host,
}

/// From the monitor, unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The VM ended by itself. Only `Status` and `Quit` are of use afterwards.
    Exited(Exit),
}

/// How a VM ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// What ended it.
    pub reason: ExitReason,
    /// For people: the fault's text, or empty.
    pub detail: String,
    /// The console's tail, as in [`Status`].
    pub console: String,
}

/// What ended a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset; the monitor does not reboot guests.
    Reset,
    /// The guest's kernel panicked (a reset with `Kernel panic` on the console).
    Panic,
    /// The guest did what no well-behaved guest does: broke a device's rules, triple fault, KVM internal error.
    GuestFault,
    /// This machine failed the VM: a KVM call, a disk, or the source of its memory.
    HostFault,
}

/// Everything that travels from the monitor to the runtime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FromMonitor {
    /// An answer.
    Reply(Reply),
    /// News.
    Event(Event),
}
