//! The language that host and guest speak over the agent channel.
//!
//! Owns: frames (bytes), messages (meaning), their limits. Must not know: sockets, clocks, threads: the codec is
//! sans-I/O, so that both sides and the fuzzers drive the same code. Start at [`HostMessage`] and [`AgentMessage`];
//! [`frame`] is the layer below. [`network`] has the addresses that both sides agree upon.
//!
//! Always holds: an agent frozen in a snapshot outlives host upgrades, therefore every frame carries a version and
//! every message's head is self-describing JSON in which unknown fields are ignored and new ones have defaults.
#![forbid(unsafe_code)]

pub mod frame;
pub mod message;
pub mod network;

pub use frame::{Decoder, Frame, FrameError, Generation};
pub use message::{
    AgentMessage, Configure, HostMessage, InitError, InvocationError, Invoke, LogStream, Message,
    MessageError, Reply, RuntimeExit, RuntimeExitCause, StreamBegin, StreamEnd, StreamFailure,
    Thaw,
};

/// vsock port on the host (CID 2) to which the agent connects once, at boot.
pub const AGENT_PORT: u32 = 1024;

/// Version of frames and messages that this crate writes. A reader accepts this version and older ones.
pub const PROTOCOL_VERSION: u8 = 1;

/// Largest invocation payload, bytes: Lambda's 6 MB limit for a synchronous request.
pub const PAYLOAD_BYTES_MAX: usize = 6 * 1024 * 1024;

/// Largest function response, bytes: Lambda's documented limit of 6 MB + 100 bytes.
pub const RESPONSE_BYTES_MAX: usize = 6_291_556;

/// Largest streamed response, bytes: Lambda's documented limit of 200 MB.
pub const STREAM_BYTES_MAX: usize = 200 * 1024 * 1024;

/// Largest piece of a streamed response in one message, bytes. Bounds what each step on the way holds.
pub const STREAM_CHUNK_BYTES_MAX: usize = 512 * 1024;
