//! The serial console: a 16550 at 0x3f8 whose output ends in a bounded ring. It has no input.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// First port of COM1.
pub(super) const PORT: u16 = 0x3f8;
/// Ports of a 16550.
pub(super) const PORT_COUNT: u16 = 8;
/// Last bytes of console output that are kept.
pub const CONSOLE_BYTES_MAX: usize = 64 * 1024;
/// Interrupt enable: transmitter holding register empty.
const IER_THR_EMPTY: u8 = 0b10;
/// Interrupt identification: transmitter holding register empty.
const IIR_THR_EMPTY: u8 = 0b10;

/// The newest bytes written, never more than [`CONSOLE_BYTES_MAX`].
#[derive(Debug, Default)]
struct Tail(VecDeque<u8>);

impl Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if self.0.len() == CONSOLE_BYTES_MAX {
                self.0.pop_front();
            }
            self.0.push_back(byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt's eventfd, which outlives the registers: KVM knows it.
#[derive(Debug)]
struct Line {
    event: Arc<EventFd>,
    /// False while registers are being restored: what is pending in them is signalled by [`Console::resend`].
    is_live: AtomicBool,
}

impl Line {
    fn new(event: Arc<EventFd>, is_live: bool) -> Self {
        Self {
            event,
            is_live: AtomicBool::new(is_live),
        }
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.is_live.load(Ordering::Relaxed) {
            // Fails only when the counter is full, and then the edge is pending already.
            let _ = self.event.write(1);
        }
        Ok(())
    }
}

/// The port's registers and its output.
pub(super) struct Console {
    serial: Serial<Line, NoEvents, Tail>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    pub(super) fn new() -> io::Result<Self> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self {
            serial: Serial::new(Line::new(event, true), Tail::default()),
        })
    }

    /// The port that `state` describes on this one's interrupt line, with an empty tail and nothing signalled:
    /// [`Console::resend`] does that. This one is as it was.
    pub(super) fn successor(&self, state: &SerialStateV1) -> Result<Self, SerialError> {
        let SerialStateV1 {
            baud_divisor,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = state;
        let [baud_divisor_low, baud_divisor_high] = baud_divisor.to_le_bytes();
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: *interrupt_enable,
            interrupt_identification: *interrupt_identification,
            line_control: *line_control,
            line_status: *line_status,
            modem_control: *modem_control,
            modem_status: *modem_status,
            scratch: *scratch,
            in_buffer: in_buffer.clone(),
        };
        let line = Line::new(self.serial.interrupt_evt().event.clone(), false);
        let serial = Serial::from_state(&registers, line, NoEvents, Tail::default())
            .map_err(|_| SerialError::Fifo)?;
        let line = serial.interrupt_evt();
        line.is_live.store(true, Ordering::Relaxed);
        Ok(Self { serial })
    }

    /// Forgets an interrupt that was signalled. Quiesced only.
    pub(super) fn drain(&self) {
        // WouldBlock: nothing was signalled, or KVM took it at once.
        let _ = self.event().read();
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.serial.interrupt_evt().event
    }

    /// Reads a register; anything but a byte access reads as zero.
    pub(super) fn read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.serial.read(offset);
        }
    }

    /// Writes a register; anything but a byte access is ignored.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // Neither the ring nor the eventfd can fail; loop-back with a full FIFO can, and drops the byte.
            let _ = self.serial.write(offset, byte);
        }
    }

    pub(super) fn tail(&self) -> Vec<u8> {
        self.serial.writer().0.iter().copied().collect()
    }

    /// Signals again an interrupt that the guest has not seen.
    pub(super) fn resend(&self) {
        let state = self.serial.state();
        let pending = state.interrupt_identification & IIR_THR_EMPTY != 0
            && state.interrupt_enable & IER_THR_EMPTY != 0;
        if pending || !state.in_buffer.is_empty() {
            let _ = self.serial.interrupt_evt().trigger();
        }
    }

    pub(super) fn save(&self) -> SerialStateV1 {
        // The output stays behind: a restored machine's console begins empty.
        let Self { serial } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = serial.state();
        SerialStateV1 {
            baud_divisor: u16::from_le_bytes([baud_divisor_low, baud_divisor_high]),
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        }
    }
}

/// The 16550's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV1 {
    /// Divisor latch.
    pub baud_divisor: u16,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Receive FIFO: loop-back bytes only.
    pub in_buffer: Vec<u8>,
}

/// The saved serial port cannot exist.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The receive FIFO is longer than a 16550's.
    #[error("serial receive fifo is too long")]
    Fifo,
}
