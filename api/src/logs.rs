//! A function's log: a bounded file, its predecessor, and those who follow it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::broadcast;

/// Size at which the file becomes the old one; at most two are kept.
pub const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Pieces a slow follower may lag behind before it loses some.
const FOLLOW_QUEUE_MAX: usize = 256;

/// Most lines of the past that one request gets.
pub const TAIL_LINES_MAX: usize = 100_000;

/// Bytes that wait to be written; past it the invocation that brings more waits for the disk.
const PENDING_BYTES_MAX: usize = 1024 * 1024;

/// One function's log. Lines are written in batches: a write for each invocation would cost more than the invocation.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    /// Locked before `pending`, never after it.
    file: Mutex<Option<(File, u64)>>,
    pending: Mutex<Pending>,
    followers: broadcast::Sender<Bytes>,
}

/// What followers know already and the file does not.
#[derive(Debug, Default)]
struct Pending {
    pieces: Vec<Bytes>,
    bytes: usize,
}

/// Who is to call [`Log::write`], and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Another caller of [`Log::push`] was told to.
    Others,
    /// This one, within moments.
    Soon,
    /// This one, before it goes on.
    Now,
}

impl Log {
    /// A log at `path`, made with the first line; its predecessor is `path` + `.1`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: Mutex::new(None),
            pending: Mutex::default(),
            followers: broadcast::Sender::new(FOLLOW_QUEUE_MAX),
        }
    }

    /// Takes whole lines, and tells followers. Does no I/O.
    #[must_use]
    pub fn push(&self, text: Bytes) -> Write {
        let mut pending = self.pending();
        // Within the lock, so that followers see the order of the file. Nobody following is no error.
        let _ = self.followers.send(text.clone());
        let was_empty = pending.pieces.is_empty();
        pending.bytes += text.len();
        pending.pieces.push(text);
        match was_empty {
            _ if pending.bytes > PENDING_BYTES_MAX => Write::Now,
            true => Write::Soon,
            false => Write::Others,
        }
    }

    /// Writes what was pushed. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written; what was to be written is lost.
    pub fn write(&self) -> io::Result<()> {
        let mut file = self.file();
        let pending = std::mem::take(&mut *self.pending());
        self.append(&mut file, &pending.pieces)
    }

    /// As few writes as the bound of the file allows.
    fn append(&self, slot: &mut Option<(File, u64)>, pieces: &[Bytes]) -> io::Result<()> {
        let mut pieces = pieces.iter().peekable();
        while pieces.peek().is_some() {
            let (mut file, mut size) = match slot.take() {
                Some(open) => open,
                None => self.open()?,
            };
            let mut batch = Vec::new();
            while let Some(piece) = pieces.next_if(|piece| {
                let length = u64::try_from(piece.len()).unwrap_or(u64::MAX);
                size == 0 || size.saturating_add(length) <= FILE_BYTES_MAX
            }) {
                batch.extend_from_slice(piece);
                size = size.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
            }
            file.write_all(&batch)?;
            if pieces.peek().is_some() {
                fs::rename(&self.path, old(&self.path))?;
            } else {
                *slot = Some((file, size));
            }
        }
        Ok(())
    }

    fn open(&self) -> io::Result<(File, u64)> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    fn file(&self) -> MutexGuard<'_, Option<(File, u64)>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last `lines` lines, and everything appended from then on: no line is lost or repeated between the two. Blocks
    /// on the disk.
    ///
    /// # Errors
    /// A file is there but cannot be read, or what was pushed cannot be written.
    pub fn tail(&self, lines: usize) -> io::Result<(Vec<u8>, broadcast::Receiver<Bytes>)> {
        let mut file = self.file();
        let (pending, follower) = {
            let mut pending = self.pending();
            (std::mem::take(&mut *pending), self.followers.subscribe())
        };
        self.append(&mut file, &pending.pieces)?;
        let lines = lines.min(TAIL_LINES_MAX);
        let mut text = read_end(&self.path)?;
        if count_lines(&text) < lines {
            let mut both = read_end(&old(&self.path))?;
            both.append(&mut text);
            text = both;
        }
        let start = last_lines(&text, lines);
        Ok((text.split_off(start), follower))
    }
}

fn old(path: &Path) -> PathBuf {
    path.with_added_extension("1")
}

/// The file's content, at most its last [`FILE_BYTES_MAX`] bytes.
fn read_end(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(FILE_BYTES_MAX)))?;
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
}

fn count_lines(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// Where the last `lines` lines of `text` begin.
fn last_lines(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let breaks = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    breaks
        .map(|(index, _)| index + 1)
        .nth(lines - 1)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let text = b"a\nb\nc\n";
        assert_eq!(last_lines(text, 0), 6);
        assert_eq!(last_lines(text, 1), 4);
        assert_eq!(last_lines(text, 3), 0);
        assert_eq!(last_lines(text, 9), 0);
        assert_eq!(last_lines(b"a\nb", 1), 2);
        assert_eq!(last_lines(b"", 1), 0);
    }

    #[test]
    fn the_file_is_bounded_and_the_tail_spans_both() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(folder.path().join("log"));
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        for _ in 0..9000 {
            if log.push(line.clone().into()) == Write::Now {
                log.write().unwrap();
            }
        }
        log.write().unwrap();
        let _ = log.push(Bytes::from_static(b"last\n"));
        log.write().unwrap();
        for name in ["log", "log.1"] {
            let size = fs::metadata(folder.path().join(name)).unwrap().len();
            assert!(size <= FILE_BYTES_MAX && size > 0, "{name}: {size}");
        }
        let (text, _) = log.tail(4500).unwrap();
        assert_eq!(count_lines(&text), 4500);
        assert!(text.ends_with(b"x\nlast\n"));
    }

    #[test]
    fn a_follower_gets_what_comes_after_its_tail() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(folder.path().join("log"));
        assert!(log.tail(10).unwrap().0.is_empty());
        assert_eq!(log.push(Bytes::from_static(b"a\n")), Write::Soon);
        let (text, mut follower) = log.tail(10).unwrap();
        assert_eq!(log.push(Bytes::from_static(b"b\n")), Write::Soon);
        assert_eq!(text, b"a\n");
        assert_eq!(follower.try_recv().unwrap(), "b\n");
    }

    #[test]
    fn one_caller_writes_what_many_pushed_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(folder.path().join("log"));
        let told: Vec<Write> = (0..4)
            .map(|number| log.push(format!("{number}\n").into()))
            .collect();
        assert_eq!(
            told,
            [Write::Soon, Write::Others, Write::Others, Write::Others]
        );
        let much = Bytes::from(b"x".repeat(PENDING_BYTES_MAX));
        assert_eq!(log.push(much), Write::Now);
        log.write().unwrap();
        let text = fs::read(folder.path().join("log")).unwrap();
        assert!(text.starts_with(b"0\n1\n2\n3\nxx"));
        assert_eq!(log.push(Bytes::from_static(b"again\n")), Write::Soon);
    }
}
