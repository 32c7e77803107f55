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

/// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` where both are set, else the root key of this home, if it has one and
/// this user may read it.
pub fn signer(home: &Path) -> anyhow::Result<Option<Signer>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let (Some(access_key_id), Some(secret)) =
        (variable(ID_VARIABLE), variable("AWS_SECRET_ACCESS_KEY"))
    {
        let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
        return Ok(Some(Signer {
            access_key_id,
            secret,
            region: region.unwrap_or_else(|| REGION.to_owned()),
        }));
    }
    let path = home.join(ROOT_FILE);
    match keys::root_signer(&path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(None),
        found => found.with_context(|| format!("cannot read {}", path.display())),
    }
}
