//! The serial console: a 16550 at 0x3f8 whose output ends in a bounded ring. It has no input.

use std::collections::VecDeque;
use std::io::{self, Write};

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

#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        // Fails only when the counter is full, and then the edge is pending already.
        let _ = self.0.write(1);
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
        let line = Line(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self {
            serial: Serial::new(line, Tail::default()),
        })
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.serial.interrupt_evt().0
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
    /// The interrupt's eventfd could not be made.
    #[error("serial interrupt cannot be made")]
    EventFd(#[source] io::Error),
}

impl TryFrom<SerialStateV1> for Console {
    type Error = SerialError;

    fn try_from(state: SerialStateV1) -> Result<Self, SerialError> {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor.to_le_bytes();
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        let line = Line(EventFd::new(EFD_NONBLOCK).map_err(SerialError::EventFd)?);
        let serial = Serial::from_state(&registers, line, NoEvents, Tail::default())
            .map_err(|_| SerialError::Fifo)?;
        Ok(Self { serial })
    }
}
