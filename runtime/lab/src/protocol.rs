//! What the host and the lab's init say to each other over the control port, sans-I/O apart from whole-frame reads and writes.
//!
//! A frame is `length: u32 LE` (of the rest), `kind: u8`, `fields: u32 LE`, then each field as `length: u32 LE` and bytes. This file
//! is compiled into the library and, by build.rs, into the init; it uses the standard library alone. Both ends come from one
//! build (the init's digest names the lab's files), so the protocol carries no version.
//!
//! The three stream ports carry chunks, `length: u32 LE` and bytes; an empty chunk ends the stream. So an end is told apart from a
//! pause without closing the port, which virtio-serial does not order after the data.

use std::io::{self, Read, Write};

/// Longest frame either side takes: a command line with its environment stays under the kernel's own limit (`ARG_MAX`, 2 MiB).
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Longest chunk of a stream.
pub const CHUNK_BYTES_MAX: usize = 32 << 10;

/// Names of the virtio-serial ports, as the init finds them under `/sys/class/virtio-ports/*/name`.
pub const CONTROL_PORT: &str = "thaw.control";
/// The command's standard input, raw bytes.
pub const STDIN_PORT: &str = "thaw.stdin";
/// The command's standard output, raw bytes.
pub const STDOUT_PORT: &str = "thaw.stdout";
/// The command's standard error, raw bytes.
pub const STDERR_PORT: &str = "thaw.stderr";
/// virtiofs tag of the machine's root file system.
pub const ROOT_TAG: &str = "thaw-root";

/// Host → init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostMessage {
    /// Mount the shared file system and run the command.
    Start(Start),
    /// Send this signal to the command's process group.
    Signal(i32),
}

/// What to run and what a lab resumed from a saved state must be told anew.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Start {
    /// Wall clock, nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Fresh entropy: every lab resumed from one saved state would otherwise draw the same numbers.
    pub entropy: Vec<u8>,
    /// Working folder, absolute.
    pub cwd: Vec<u8>,
    /// Command and arguments; at least one.
    pub command: Vec<Vec<u8>>,
    /// `KEY=value` each; the command's whole environment.
    pub env: Vec<Vec<u8>>,
    /// Folders writable at their own paths, absolute.
    pub writable: Vec<Vec<u8>>,
    /// Folder with the lab kernel's modules (`<release>/…`), mounted at /lib/modules; empty: none.
    pub modules: Vec<u8>,
    /// 1 if an ordinary user shares the root file system: the daemon that serves it may not do everything for everyone.
    pub rootless: u8,
    /// Files that the daemon serving the root file system may hold open: one for each that the lab's kernel remembers.
    pub shared_files_max: u64,
}

/// Init → host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitMessage {
    /// Modules loaded, KVM held open, every processor online; waiting for [`HostMessage::Start`].
    Booted,
    /// The command is about to be started: from here on it must not be started a second time.
    Started,
    /// Sent every few seconds; silence means that the lab hangs.
    Alive,
    /// The command ended, every file is synced: exit code, or 128 + signal.
    Exited(i32),
    /// The command could not be started: 127 if there is no such command, 126 otherwise; and why.
    Failed(i32, String),
}

impl HostMessage {
    /// Writes the message as one frame.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, fields) = match self {
            Self::Start(start) => (1, start.fields()),
            Self::Signal(signal) => (2, vec![signal.to_le_bytes().to_vec()]),
        };
        write_frame(to, kind, &fields)
    }

    /// Reads one message. `UnexpectedEof` at a frame's start means that the other side is gone.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let (kind, fields) = read_frame(from)?;
        match (kind, fields.as_slice()) {
            (1, fields) => Start::from_fields(fields).map(Self::Start),
            (2, [signal]) => array(signal).map(|bytes| Self::Signal(i32::from_le_bytes(bytes))),
            _ => Err(invalid("unknown message")),
        }
    }
}

impl InitMessage {
    /// Writes the message as one frame.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, fields) = match self {
            Self::Booted => (65, vec![]),
            Self::Started => (66, vec![]),
            Self::Alive => (67, vec![]),
            Self::Exited(code) => (68, vec![code.to_le_bytes().to_vec()]),
            Self::Failed(code, why) => (
                69,
                vec![code.to_le_bytes().to_vec(), why.clone().into_bytes()],
            ),
        };
        write_frame(to, kind, &fields)
    }

    /// Reads one message.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let (kind, fields) = read_frame(from)?;
        match (kind, fields.as_slice()) {
            (65, []) => Ok(Self::Booted),
            (66, []) => Ok(Self::Started),
            (67, []) => Ok(Self::Alive),
            (68, [code]) => array(code).map(|bytes| Self::Exited(i32::from_le_bytes(bytes))),
            (69, [code, why]) => array(code).map(|bytes| {
                Self::Failed(
                    i32::from_le_bytes(bytes),
                    String::from_utf8_lossy(why).into_owned(),
                )
            }),
            _ => Err(invalid("unknown message")),
        }
    }
}

impl Start {
    fn fields(&self) -> Vec<Vec<u8>> {
        let mut fields = vec![
            self.unix_nanos.to_le_bytes().to_vec(),
            self.entropy.clone(),
            self.cwd.clone(),
            self.modules.clone(),
            vec![self.rootless],
            self.shared_files_max.to_le_bytes().to_vec(),
        ];
        for list in [&self.command, &self.env, &self.writable] {
            fields.push((list.len() as u64).to_le_bytes().to_vec());
            fields.extend(list.iter().cloned());
        }
        fields
    }

    fn from_fields(fields: &[Vec<u8>]) -> io::Result<Self> {
        let [
            unix_nanos,
            entropy,
            cwd,
            modules,
            rootless,
            shared_files_max,
            lists @ ..,
        ] = fields
        else {
            return Err(invalid("start is too short"));
        };
        let mut rest = lists.iter();
        let mut list = || {
            let count = rest.next().ok_or_else(|| invalid("start lacks a list"))?;
            let count = usize::try_from(u64::from_le_bytes(array(count)?))
                .map_err(|_| invalid("list is too long"))?;
            if count > rest.len() {
                return Err(invalid("list is longer than the message"));
            }
            Ok(rest.by_ref().take(count).cloned().collect::<Vec<_>>())
        };
        let start = Self {
            unix_nanos: u64::from_le_bytes(array(unix_nanos)?),
            entropy: entropy.clone(),
            cwd: cwd.clone(),
            modules: modules.clone(),
            rootless: array::<1>(rootless)?[0],
            shared_files_max: u64::from_le_bytes(array(shared_files_max)?),
            command: list()?,
            env: list()?,
            writable: list()?,
        };
        if start.command.is_empty() {
            Err(invalid("start names no command"))
        } else {
            Ok(start)
        }
    }
}

/// Copies a plain stream into chunks, then ends it. An error of `from` counts as its end.
pub fn copy_into_chunks(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        to.write_all(&length(count)?)?;
        to.write_all(&buffer[..count])?;
        if count == 0 {
            return to.flush();
        }
    }
}

/// Copies chunks into a plain stream until they end. When `to` takes no more, the rest is read and dropped, so that the sender never
/// waits for a reader that is gone.
pub fn copy_from_chunks(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    let mut broken = false;
    loop {
        let mut head = [0; 4];
        from.read_exact(&mut head)?;
        let count = u32::from_le_bytes(head) as usize;
        if count == 0 {
            return Ok(());
        }
        let chunk = buffer
            .get_mut(..count)
            .ok_or_else(|| invalid("chunk is too long"))?;
        from.read_exact(chunk)?;
        broken = broken || to.write_all(chunk).and_then(|()| to.flush()).is_err();
    }
}

fn write_frame(to: &mut impl Write, kind: u8, fields: &[Vec<u8>]) -> io::Result<()> {
    let mut body = vec![kind];
    body.extend(length(fields.len())?);
    for field in fields {
        body.extend(length(field.len())?);
        body.extend(field);
    }
    if body.len() > FRAME_BYTES_MAX {
        return Err(invalid("message is too long"));
    }
    let mut frame = length(body.len())?.to_vec();
    frame.extend(body);
    to.write_all(&frame)?;
    to.flush()
}

fn read_frame(from: &mut impl Read) -> io::Result<(u8, Vec<Vec<u8>>)> {
    let mut head = [0; 4];
    from.read_exact(&mut head)?;
    let size = u32::from_le_bytes(head) as usize;
    if size > FRAME_BYTES_MAX {
        return Err(invalid("message is too long"));
    }
    let mut body = vec![0; size];
    from.read_exact(&mut body)?;
    let mut rest = body.as_slice();
    let kind = take(&mut rest, 1)?[0];
    let count = u32::from_le_bytes(array(take(&mut rest, 4)?)?);
    let mut fields = Vec::new();
    for _ in 0..count {
        let size = u32::from_le_bytes(array(take(&mut rest, 4)?)?) as usize;
        fields.push(take(&mut rest, size)?.to_vec());
    }
    if rest.is_empty() {
        Ok((kind, fields))
    } else {
        Err(invalid("message has a tail"))
    }
}

fn take<'a>(from: &mut &'a [u8], count: usize) -> io::Result<&'a [u8]> {
    let (head, tail) = from
        .split_at_checked(count)
        .ok_or_else(|| invalid("message ends early"))?;
    *from = tail;
    Ok(head)
}

fn array<const N: usize>(bytes: &[u8]) -> io::Result<[u8; N]> {
    bytes
        .try_into()
        .map_err(|_| invalid("number has the wrong size"))
}

fn length(count: usize) -> io::Result<[u8; 4]> {
    u32::try_from(count)
        .map(u32::to_le_bytes)
        .map_err(|_| invalid("message is too long"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Start {
        Start {
            unix_nanos: 1_700_000_000_000_000_001,
            entropy: vec![7; 64],
            cwd: b"/a b".to_vec(),
            command: vec![b"sh".to_vec(), b"-c".to_vec(), b"\xff\0".to_vec()],
            env: vec![b"A=1".to_vec()],
            writable: vec![],
            modules: vec![],
            rootless: 1,
            shared_files_max: 20_000,
        }
    }

    #[test]
    fn messages_come_back_as_they_were_sent() {
        for message in [HostMessage::Start(start()), HostMessage::Signal(15)] {
            let mut wire = Vec::new();
            message.write(&mut wire).unwrap();
            assert_eq!(HostMessage::read(&mut wire.as_slice()).unwrap(), message);
        }
        let ends = [
            InitMessage::Exited(143),
            InitMessage::Failed(127, "x".into()),
        ];
        for message in ends.into_iter().chain([
            InitMessage::Booted,
            InitMessage::Started,
            InitMessage::Alive,
        ]) {
            let mut wire = Vec::new();
            message.write(&mut wire).unwrap();
            assert_eq!(InitMessage::read(&mut wire.as_slice()).unwrap(), message);
        }
    }

    #[test]
    fn broken_frames_are_refused_at_every_byte() {
        let mut wire = Vec::new();
        HostMessage::Start(start()).write(&mut wire).unwrap();
        for cut in 0..wire.len() {
            assert!(
                HostMessage::read(&mut &wire[..cut]).is_err(),
                "cut at {cut}"
            );
        }
        for at in 0..wire.len() {
            let mut broken = wire.clone();
            broken[at] ^= 0x80;
            let _ = HostMessage::read(&mut broken.as_slice()); // must not panic; a flipped byte in a text goes unnoticed
        }
    }

    #[test]
    fn streams_come_back_whole_and_end() {
        let text: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let (mut wire, mut back) = (Vec::new(), Vec::new());
        copy_into_chunks(&mut text.as_slice(), &mut wire).unwrap();
        wire.extend(b"beyond the end");
        copy_from_chunks(&mut wire.as_slice(), &mut back).unwrap();
        assert!(back == text);
        assert!(copy_from_chunks(&mut [0xff_u8; 4].as_slice(), &mut back).is_err());
    }

    #[test]
    fn command_without_words_is_refused() {
        let mut wire = Vec::new();
        HostMessage::Start(Start {
            command: vec![],
            ..start()
        })
        .write(&mut wire)
        .unwrap();
        assert!(HostMessage::read(&mut wire.as_slice()).is_err());
    }
}
