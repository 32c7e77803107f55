//! Messages to the runtime. The control loop's, but for the one that another thread sends when the loop cannot.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use thaw_vmm_control::wire::{self, WireError};
use thaw_vmm_control::{Event, Exit, FromMonitor};

/// The way to the runtime, one message at a time.
#[derive(Debug)]
pub struct Outbox {
    control: Arc<UnixStream>,
    sending: Mutex<()>,
}

impl Outbox {
    /// Messages go into `control`, which blocks.
    pub fn new(control: Arc<UnixStream>) -> Self {
        Self {
            control,
            sending: Mutex::new(()),
        }
    }

    /// Sends one.
    ///
    /// # Errors
    /// The socket's, or the message is too large.
    pub fn send(&self, message: &FromMonitor) -> Result<(), WireError> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        wire::send(&*self.control, message, &[])
    }

    /// Reports the end of the machine in place of the control loop, unless that is in the middle of a message. The process is to
    /// end then.
    pub fn send_last_word(&self, exit: Exit) {
        if let Ok(_sending) = self.sending.try_lock() {
            let message = FromMonitor::Event(Event::Exited(exit));
            // Without anybody to hear it there is nothing to report.
            let _ = wire::send(&*self.control, &message, &[]);
        }
    }
}
