//! A real `thaw-vmm` process, driven over its control protocol, with the test guest at the other end of the agent channel.

use std::fs::{File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use thaw_vmm_control::wire::{self, Read, Receiver};
use thaw_vmm_control::{
    AGENT_FD, BootRequest, CONTROL_FD, Disk, DiskAccess, DiskSource, Event, Exit, FromMonitor,
    Network, Reply, Request, RestoreRequest, SaveForm, SaveRequest, Status,
};

const MONITOR: &str = env!("CARGO_BIN_EXE_thaw-vmm");
/// Longest wait for anything: an emulated host is slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// A monitor process.
pub struct Monitor {
    process: Child,
    control: UnixStream,
    receiver: Receiver,
    exits: Vec<Exit>,
    /// Our end of the agent channel.
    pub agent: UnixStream,
}

/// A copy of a descriptor above those a child gets.
fn above(fd: BorrowedFd<'_>) -> OwnedFd {
    // SAFETY: no pointers; the descriptor that comes back is new and ours.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10) };
    assert!(copy >= 10, "{}", io::Error::last_os_error());
    // SAFETY: as above.
    unsafe { OwnedFd::from_raw_fd(copy) }
}

impl Monitor {
    /// Starts a monitor without a machine.
    pub fn start() -> Self {
        Self::start_by(Command::new(MONITOR))
    }

    /// The same with none of root's capabilities and no /dev/userfaultfd; /dev/kvm is its user's, root's, all the same.
    pub fn start_without_privileges(folder: &Path) -> Self {
        let closed = folder.join("closed");
        let closing = File::create(&closed).unwrap();
        closing
            .set_permissions(Permissions::from_mode(0o000))
            .unwrap();
        let mut command = Command::new("unshare");
        let steps =
            "if [ -e /dev/userfaultfd ]; then mount --bind \"$1\" /dev/userfaultfd || exit; fi
            exec setpriv --bounding-set=-all --inh-caps=-all \"$2\"";
        command.args(["--mount", "sh", "-c", steps, "sh"]);
        command.arg(&closed).arg(MONITOR);
        Self::start_by(command)
    }

    fn start_by(mut command: Command) -> Self {
        let (control, control_theirs) = UnixStream::pair().unwrap();
        let (agent, agent_theirs) = UnixStream::pair().unwrap();
        let theirs = [
            (above(control_theirs.as_fd()), CONTROL_FD),
            (above(agent_theirs.as_fd()), AGENT_FD),
        ];
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for (fd, number) in &theirs {
                    if libc::dup2(fd.as_raw_fd(), *number) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            })
        };
        let process = command.spawn().unwrap();
        for socket in [&control, &agent] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        Self {
            process,
            control,
            receiver: Receiver::new(),
            exits: Vec::new(),
            agent,
        }
    }

    fn next(&mut self) -> FromMonitor {
        loop {
            if let Some((message, _)) = self.receiver.next_message().unwrap() {
                return message;
            }
            assert_eq!(
                self.receiver
                    .read_from(&self.control)
                    .expect("monitor silent"),
                Read::Some,
                "monitor gone"
            );
        }
    }

    /// A request whose reply nobody waits for.
    pub fn send(&mut self, request: &Request, files: &[&File]) {
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        wire::send(&self.control, request, &fds).unwrap();
    }

    /// One request and its reply; events in between are kept.
    pub fn ask(&mut self, request: &Request, files: &[&File]) -> Reply {
        self.send(request, files);
        loop {
            match self.next() {
                FromMonitor::Reply(reply) => return reply,
                FromMonitor::Event(Event::Exited(exit)) => self.exits.push(exit),
            }
        }
    }

    /// A request that must be done.
    pub fn done(&mut self, request: &Request, files: &[&File]) {
        let reply = self.ask(request, files);
        assert_eq!(reply, Reply::Done, "{}", self.status().console);
    }

    /// The machine's own end.
    pub fn exit(&mut self) -> Exit {
        loop {
            if let Some(exit) = self.exits.pop() {
                return exit;
            }
            match self.receiver.next_message().unwrap() {
                Some((FromMonitor::Event(Event::Exited(exit)), _)) => return exit,
                Some((FromMonitor::Reply(reply), _)) => {
                    panic!("reply without a request: {reply:?}")
                }
                None => {}
            }
            if let Err(error) = self.receiver.read_from(&self.control) {
                panic!("no exit, {error}: {}", self.status().console);
            }
        }
    }

    /// The same, whatever was answered meanwhile.
    pub fn exit_in_any_case(&mut self) -> Exit {
        loop {
            if let FromMonitor::Event(Event::Exited(exit)) = self.next() {
                return exit;
            }
        }
    }

    /// Waits until the process is gone, which its control socket's end must bring about.
    pub fn leave(mut self) {
        self.control.shutdown(Shutdown::Both).unwrap();
        self.process.wait().unwrap();
    }

    /// The end of the machine, if it has come.
    pub fn has_ended(&mut self) -> Option<Exit> {
        // Whatever was sent before the answer is read with it.
        self.status();
        self.exits.pop()
    }

    /// The process, below /proc.
    pub fn proc(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.process.id()))
    }

    /// Console and timings.
    pub fn status(&mut self) -> Status {
        match self.ask(&Request::Status, &[]) {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Sends a line to the guest.
    pub fn tell(&mut self, line: &str) {
        self.agent
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }

    /// The guest's next line.
    pub fn hear(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match self.agent.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => return String::from_utf8(line).unwrap(),
                Ok(1) => line.push(byte[0]),
                Ok(_) => panic!("channel closed after {line:?}: {}", self.status().console),
                Err(error) => panic!("{error} after {line:?}: {}", self.status().console),
            }
        }
    }

    /// A command to the guest and its answer.
    pub fn command(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    /// Pauses and saves into a new file.
    pub fn freeze(&mut self) -> File {
        self.done(&Request::Pause, &[]);
        self.save()
    }

    /// Saves a paused machine into a new file.
    pub fn save(&mut self) -> File {
        self.save_as(SaveForm::Whole)
    }

    /// The same, in this form.
    pub fn save_as(&mut self, form: SaveForm) -> File {
        let file = tempfile::tempfile().unwrap();
        self.save_into(&file, form);
        file
    }

    /// Saves a paused machine into an empty file.
    pub fn save_into(&mut self, file: &File, form: SaveForm) {
        let request = Request::Save(SaveRequest {
            metadata: serde_json::json!({ "function": "test" }),
            form,
        });
        match self.ask(&request, &[file]) {
            Reply::Saved(saved) => assert_eq!(saved.file_bytes, file.metadata().unwrap().len()),
            other => panic!("{other:?}"),
        }
    }

    /// Restores a snapshot in a fresh process, paused.
    pub fn restore(snapshot: &File, disks: &[Disk], files: &[&File]) -> Self {
        let mut monitor = Self::start();
        let request = Request::Restore(RestoreRequest {
            disks: disks.to_vec(),
            ..Default::default()
        });
        let all: Vec<&File> = [snapshot]
            .into_iter()
            .chain(files.iter().copied())
            .collect();
        monitor.done(&request, &all);
        monitor
    }

    /// Restores a difference and its base in a fresh process, paused.
    pub fn restore_over(base: &File, snapshot: &File, disks: &[Disk], files: &[&File]) -> Self {
        let mut monitor = Self::start();
        let request = Request::Restore(RestoreRequest {
            disks: disks.to_vec(),
            has_base: true,
            ..Default::default()
        });
        monitor.done(&request, &[&[snapshot, base], files].concat());
        monitor
    }

    /// Ends it, which must go well.
    pub fn quit(mut self) {
        self.done(&Request::Quit, &[]);
        assert!(self.process.wait().unwrap().success());
    }

    /// Boots the test guest and waits for its first line.
    pub fn boot(kernel: &str, vcpu_count: u8, disks: &[(Disk, &File)]) -> Self {
        Self::boot_with(kernel, vcpu_count, disks, None)
    }

    /// The same, with a network device on this tap if there is one.
    pub fn boot_with(
        kernel: &str,
        vcpu_count: u8,
        disks: &[(Disk, &File)],
        tap: Option<&File>,
    ) -> Self {
        let mut monitor = Self::start();
        let (kernel, initramfs) = (crate::guest::kernel(kernel), crate::guest::initramfs());
        let request = Request::Boot(BootRequest {
            vcpu_count,
            memory_mib: 256,
            command_line: "console=ttyS0 quiet panic=-1 pci=off mitigations=off iomem=relaxed"
                .into(),
            has_initramfs: true,
            disks: disks.iter().map(|(disk, _)| disk.clone()).collect(),
            network: match tap {
                Some(_) => Network::Plugged,
                None => Network::Absent,
            },
        });
        let mut files = vec![&kernel, &initramfs];
        files.extend(disks.iter().map(|(_, file)| *file));
        files.extend(tap);
        monitor.done(&request, &files);
        assert_eq!(monitor.hear(), "hello");
        monitor
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A disk that the guest only reads.
pub fn read_only(id: &str) -> Disk {
    Disk {
        id: id.into(),
        access: DiskAccess::ReadOnly,
        source: DiskSource::Descriptor,
    }
}

/// A disk that the guest writes to.
pub fn copy_on_write(id: &str) -> Disk {
    Disk {
        id: id.into(),
        access: DiskAccess::CopyOnWrite,
        source: DiskSource::Descriptor,
    }
}

/// The same disk when it comes out of the snapshot.
pub fn stored(disk: &Disk) -> Disk {
    Disk {
        source: DiskSource::Snapshot,
        ..disk.clone()
    }
}
