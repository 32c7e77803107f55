//! Where code comes from, of functions and of layers: a zip in the request, or one in the operator's S3-compatible store.

use bytes::Bytes;
use thaw_api_types::lambda::FunctionCode;

use super::errors::ApiError;
use super::validate;
use crate::code::UNZIPPED_BYTES_MAX;
use crate::engine::chain;
use crate::s3::{Object, S3Error};
use crate::state::App;

/// The zip.
///
/// # Errors
/// There is none, it is too large, or the store does not give it.
pub(super) async fn zip(app: &App, code: FunctionCode) -> Result<Bytes, ApiError> {
    if code.s3_bucket.is_none() && code.s3_key.is_none() {
        return validate::zip(code);
    }
    if code.zip_file.is_some() || code.image_uri.is_some() {
        return Err(ApiError::invalid_parameter(
            "Please do not provide other FunctionCode parameters when providing S3Bucket and S3Key.",
        ));
    }
    let (Some(bucket), Some(key)) = (code.s3_bucket, code.s3_key) else {
        return Err(ApiError::invalid_parameter(
            "Both S3Bucket and S3Key are needed.",
        ));
    };
    let Some(store) = &app.s3 else {
        return Err(ApiError::invalid_parameter(
            "This gateway knows no S3: start it with --s3-endpoint (or THAW_S3_ENDPOINT), or upload the code as ZipFile.",
        ));
    };
    let object = Object {
        bucket,
        key,
        version: code.s3_object_version,
    };
    // Not the limit of uploads: what is larger than a request may be goes by way of S3.
    let bytes_max = usize::try_from(UNZIPPED_BYTES_MAX).unwrap_or(usize::MAX);
    store
        .get(&object, bytes_max)
        .await
        .map_err(|error| match error {
            S3Error::Unreachable { .. } | S3Error::Tls { .. } => ApiError::service(chain(&error)),
            // What is larger packed than it may be unpacked.
            S3Error::TooLarge(limit) => ApiError::invalid_parameter(format!(
                "Unzipped size must be smaller than {limit} bytes"
            )),
            other => ApiError::invalid_parameter(other.to_string()),
        })
}
