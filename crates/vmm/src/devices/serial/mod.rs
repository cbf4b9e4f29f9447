//! COM1: a 16550 whose output goes to a console ring (or a file, or stdout) and whose input comes from the API or a descriptor.

pub mod config;
mod output;

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Outcome};
use crate::config::TokenBucket;
use output::{Output, SavedOutput};

pub use output::Sink;

/// Input that waits for the guest, at most; what exceeds it is refused.
pub const MAX_PENDING_INPUT: usize = 64 * 1024;

#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Port {
    uart: Serial<Line, NoEvents, Output>,
    pending: VecDeque<u8>,
    bytes_in: u64,
}

impl Port {
    fn refill(&mut self) {
        let count = self.uart.fifo_capacity().min(self.pending.len());
        if count > 0 {
            let bytes: Vec<u8> = self.pending.drain(..count).collect();
            self.bytes_in += count as u64;
            // The FIFO has room for them; a lost interrupt shows at the guest's next read.
            let _ = self.uart.enqueue_raw_bytes(&bytes);
        }
    }
}

/// The port.
pub struct SerialPort {
    port: Mutex<Port>,
    line: EventFd,
}

/// What the port has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SerialMetrics {
    /// Bytes that the guest wrote.
    pub bytes_out: u64,
    /// Bytes of them that were over the limit.
    pub bytes_dropped: u64,
    /// Bytes of them that could not be written.
    pub bytes_lost: u64,
    /// Bytes that the guest was given.
    pub bytes_in: u64,
    /// Bytes of input that wait.
    pub bytes_pending: u64,
}

impl SerialPort {
    /// `line` raises COM1's interrupt; no more output than `limit` goes to `sink`.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn new(line: EventFd, sink: Sink, limit: Option<TokenBucket>) -> io::Result<Self> {
        let port = Port {
            uart: Serial::new(Line(line.try_clone()?), Output::new(sink, limit)),
            pending: VecDeque::new(),
            bytes_in: 0,
        };
        Ok(Self { port: Mutex::new(port), line })
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest input, all or nothing.
    ///
    /// # Errors
    /// How many bytes there is room for, when these are more.
    pub fn input(&self, bytes: &[u8]) -> Result<(), usize> {
        let mut port = self.lock();
        let room = MAX_PENDING_INPUT - port.pending.len();
        if bytes.len() > room {
            return Err(room);
        }
        port.pending.extend(bytes);
        port.refill();
        Ok(())
    }

    /// Room for input.
    #[must_use]
    pub fn input_room(&self) -> usize {
        MAX_PENDING_INPUT - self.lock().pending.len()
    }

    /// What the port has carried.
    #[must_use]
    pub fn metrics(&self) -> SerialMetrics {
        let port = self.lock();
        let output = port.uart.writer().counts();
        SerialMetrics {
            bytes_out: output.written,
            bytes_dropped: output.dropped,
            bytes_lost: output.lost,
            bytes_in: port.bytes_in,
            bytes_pending: port.pending.len() as u64,
        }
    }

    /// As after power-on; the output stream goes on.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn reset(&self) -> io::Result<()> {
        let line = Line(self.line.try_clone()?);
        let mut port = self.lock();
        let output = std::mem::replace(port.uart.writer_mut(), Output::new(Sink::Null, None));
        port.uart = Serial::new(line, output);
        Ok(())
    }
}

/// What a snapshot holds of the port: its registers and input, and what waits for the guest.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SavedSerial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
    pending: Vec<u8>,
    output: SavedOutput,
}

impl SerialPort {
    /// Reads the state.
    #[must_use]
    pub fn save(&self) -> SavedSerial {
        let port = self.lock();
        let state = port.uart.state();
        SavedSerial {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
            pending: port.pending.iter().copied().collect(),
            output: port.uart.writer().save(),
        }
    }

    /// Takes a state over; the output goes where it goes here.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated, or the state is not one of this port.
    pub fn restore(&self, saved: SavedSerial) -> io::Result<()> {
        let line = Line(self.line.try_clone()?);
        let mut port = self.lock();
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.input,
        };
        let mut output = std::mem::replace(port.uart.writer_mut(), Output::new(Sink::Null, None));
        output.restore(&saved.output);
        port.uart = Serial::from_state(&state, line, NoEvents, output).map_err(io::Error::other)?;
        port.pending = saved.pending.into_iter().take(MAX_PENDING_INPUT).collect();
        port.refill();
        Ok(())
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut port = self.lock();
        for byte in data {
            *byte = port.uart.read(u8::try_from(offset).unwrap_or(u8::MAX));
        }
        if offset == 0 {
            port.refill();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        let mut port = self.lock();
        // `rep outsb` arrives as one write of many bytes to the same register.
        for byte in data {
            let _ = port.uart.write(offset, *byte);
        }
        Outcome::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::ConsoleWriter;

    fn port() -> (SerialPort, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let ring = ConsoleWriter::new(file.as_file()).unwrap();
        let port =
            SerialPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), Sink::Ring(ring), None).unwrap();
        (port, file)
    }

    #[test]
    fn output_reaches_the_ring_also_after_a_reset() {
        let (port, file) = port();
        port.write(0, b"hello ");
        port.reset().unwrap();
        port.write(0, b"again");
        let reader = crate::console::ConsoleReader::new(file.reopen().unwrap()).unwrap();
        assert_eq!(reader.read_from(0).unwrap().bytes, b"hello again");
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_arrives_in_order() {
        let (port, _file) = port();
        let input: Vec<u8> = (0..=255).collect();
        port.input(&input).unwrap();
        let mut seen = Vec::new();
        loop {
            let mut status = [0];
            port.read(5, &mut status);
            if status[0] & 1 == 0 {
                break;
            }
            let mut byte = [0];
            port.read(0, &mut byte);
            seen.push(byte[0]);
        }
        assert_eq!(seen, input);
    }

    #[test]
    fn too_much_input_is_refused_with_the_room_there_is() {
        let (port, _file) = port();
        let room = port.input(&vec![0; MAX_PENDING_INPUT + 1]).unwrap_err();
        assert_eq!(room, MAX_PENDING_INPUT);
        port.input(&[b'x'; 100]).unwrap();
        assert_eq!(port.input_room(), MAX_PENDING_INPUT - 36);
    }
}
