//! Request and response bodies of the gateway, as they travel.
//!
//! Owns: the JSON shapes of the Lambda REST API that Thaw serves ([`lambda`]), of function URLs ([`function_url`]) and of
//! Thaw's own routes ([`thaw`]). Must not know: HTTP, validation, defaults that depend on a gateway, any other crate of
//! the workspace. The shapes follow botocore's service model `lambda/2015-03-31`.
#![forbid(unsafe_code)]

pub mod function_url;
pub mod keys;
pub mod lambda;
pub mod thaw;
