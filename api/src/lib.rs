//! The gateway: an HTTP server that deploys functions, freezes them, and thaws one pristine sandbox for every request.
//!
//! Owns: functions and their life cycle (SQLite), the Lambda REST API for unmodified clients, function URLs, logs, Thaw's
//! own routes. Must not know: KVM, guest memory, how an image is built or a sandbox restored; of these it knows what
//! [`engine::Engine`] says.
//!
//! Start at [`Gateway`]; then [`lambda`] for what a client may ask, [`functions`] and [`deploy`] for what becomes of it,
//! [`invocation`] for a request's way through a sandbox.
//!
//! Always holds: a change that a client saw acknowledged is on disk; a function serves its old revision until the new one
//! is ready; bytes from clients and guests never panic; every queue and wait has a limit.
#![forbid(unsafe_code)]

pub mod auth;
pub mod body;
pub mod budget;
pub mod clock;
pub mod code;
pub mod connections;
pub mod deploy;
pub mod engine;
pub mod environment;
pub mod events;
pub mod function_url;
pub mod functions;
pub mod gateway;
pub mod invocation;
pub mod lambda;
pub mod layers;
pub mod logs;
pub mod network;
pub mod policy;
pub mod progress;
pub mod record;
pub mod s3;
pub mod server;
pub mod snapshot_key;
pub mod state;
pub mod store;
pub mod thaw_routes;
pub mod timing;
pub mod tls;

#[cfg(test)]
mod testing;

pub use auth::AuthMode;
pub use budget::Budget;
pub use gateway::{Exposure, Gateway, GatewayConfig, Limits, ServeError, StartError};
