//! The key that the command line signs with: the environment's, or the home's own.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context as _;
use thaw_api::auth::keys::{self, ROOT_FILE};
use thaw_api::auth::signer::Signer;

/// Region of keys from the environment that say none.
const REGION: &str = "us-east-1";
/// Environment variable of a key's id.
pub const ID_VARIABLE: &str = "AWS_ACCESS_KEY_ID";

/// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` where both are set, with `AWS_REGION`.
pub fn from_environment() -> Option<Signer> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
    Some(Signer {
        access_key_id: variable(ID_VARIABLE)?,
        secret: variable("AWS_SECRET_ACCESS_KEY")?,
        region: region.unwrap_or_else(|| REGION.to_owned()),
    })
}

/// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` where both are set, else the root key of this home, if it has one and
/// this user may read it.
pub fn signer(home: &Path) -> anyhow::Result<Option<Signer>> {
    if let Some(signer) = from_environment() {
        return Ok(Some(signer));
    }
    let path = home.join(ROOT_FILE);
    match keys::root_signer(&path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(None),
        found => found.with_context(|| format!("cannot read {}", path.display())),
    }
}
