//! The command's standard streams on this side.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
};

/// Where a standard stream of the command comes from or goes to.
#[derive(Debug)]
pub enum Stream {
    /// This process's own stream.
    Inherit,
    /// Nothing: an empty input, a dropped output.
    Null,
    /// This file, pipe or terminal.
    File(File),
}

/// A reader that ends when its run does, even while nothing comes.
#[derive(Debug)]
pub struct StoppableInput {
    source: Stream,
    stop: io::PipeReader,
}

impl StoppableInput {
    /// The input and the handle whose drop ends it.
    pub fn new(source: Stream) -> io::Result<(Self, io::PipeWriter)> {
        let (stop, stopper) = io::pipe()?;
        Ok((Self { source, stop }, stopper))
    }
}

impl Read for StoppableInput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stdin = io::stdin();
        let source: BorrowedFd<'_> = match &self.source {
            Stream::Null => return Ok(0),
            Stream::Inherit => stdin.as_fd(),
            Stream::File(file) => file.as_fd(),
        };
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [
            PollFd::new(&source, PollFlags::IN),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Ok(0);
        }
        Ok(rustix::io::read(source, buffer)?)
    }
}

/// The writer behind an output stream; `inherited` is this process's own.
pub fn writer(stream: Stream, inherited: impl Write + Send + 'static) -> Box<dyn Write + Send> {
    match stream {
        Stream::Inherit => Box::new(inherited),
        Stream::Null => Box::new(io::sink()),
        Stream::File(file) => Box::new(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_input_ends_when_the_run_does() {
        let (source, _held) = io::pipe().unwrap();
        let (mut input, stopper) =
            StoppableInput::new(Stream::File(File::from(std::os::fd::OwnedFd::from(source))))
                .unwrap();
        let reader = std::thread::spawn(move || input.read(&mut [0; 8]));
        drop(stopper);
        assert_eq!(reader.join().unwrap().unwrap(), 0);
    }
}
