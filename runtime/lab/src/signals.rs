//! Signals of this process, to be passed to the command in the lab.

use signal_hook::{consts, iterator::Signals};
use std::{
    io,
    sync::mpsc::{Receiver, channel},
    thread,
};

/// From now on SIGINT, SIGTERM and SIGHUP no longer end this process: each is received here. For `main` alone, once.
pub fn of_this_process() -> io::Result<Receiver<i32>> {
    let mut signals = Signals::new([consts::SIGINT, consts::SIGTERM, consts::SIGHUP])?;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for signal in signals.forever() {
            if sender.send(signal).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
