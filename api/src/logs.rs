//! A function's log: a bounded file, its predecessor, and those who follow it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::broadcast;

/// Size at which the file becomes the old one; at most two are kept.
pub const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Pieces a slow follower may lag behind before it loses some.
const FOLLOW_QUEUE_MAX: usize = 256;

/// Most lines of the past that one request gets.
pub const TAIL_LINES_MAX: usize = 100_000;

/// One function's log.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: Mutex<Option<(File, u64)>>,
    followers: broadcast::Sender<Bytes>,
}

impl Log {
    /// A log at `path`, made with the first line; its predecessor is `path` + `.1`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: Mutex::new(None),
            followers: broadcast::Sender::new(FOLLOW_QUEUE_MAX),
        }
    }

    /// Appends whole lines, and tells followers. Blocks on the disk.
    ///
    /// # Errors
    /// The file cannot be written; followers were told nevertheless.
    pub fn append(&self, text: &[u8]) -> io::Result<()> {
        let mut slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // Within the lock, so that followers see the order of the file. Nobody following is no error.
        let _ = self.followers.send(Bytes::copy_from_slice(text));
        let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
        if let Some((_, size)) = &*slot
            && size.saturating_add(length) > FILE_BYTES_MAX
        {
            *slot = None;
            fs::rename(&self.path, old(&self.path))?;
        }
        if slot.is_none() {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&self.path)?;
            let size = file.metadata()?.len();
            *slot = Some((file, size));
        }
        if let Some((file, size)) = &mut *slot {
            file.write_all(text)?;
            *size += length;
        }
        Ok(())
    }

    /// The last `lines` lines, and everything appended from then on: no line is lost or repeated between the two. Blocks
    /// on the disk.
    ///
    /// # Errors
    /// A file is there but cannot be read.
    pub fn tail(&self, lines: usize) -> io::Result<(Vec<u8>, broadcast::Receiver<Bytes>)> {
        let _slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let follower = self.followers.subscribe();
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
            log.append(&line).unwrap();
        }
        log.append(b"last\n").unwrap();
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
        log.append(b"a\n").unwrap();
        let (text, mut follower) = log.tail(10).unwrap();
        log.append(b"b\n").unwrap();
        assert_eq!(text, b"a\n");
        assert_eq!(follower.try_recv().unwrap(), "b\n");
    }
}
