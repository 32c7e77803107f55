//! What commands that run sandboxes do to keep these apart from the machine.

use std::path::Path;

use anyhow::Context as _;
use thaw_runtime::{Jailer, Owner};

use super::installation::Installation;

/// Lets an ordinary user make the namespaces that a jail is made of; root may without. To be called while the process has one thread.
/// What cannot be had is said where the jail is.
pub fn enter_own_namespace() {
    if let Err(error) = thaw_runtime::become_root_of_own_namespace() {
        let error = anyhow::Error::from(error);
        eprintln!("thaw: the jail around sandboxes will have gaps: {error:#}");
    }
}

/// Jails for the monitors of a command that runs beside the home's gateway.
pub fn jailer(home: &Path, installation: &Installation) -> anyhow::Result<Jailer> {
    let (jailer, reach) = Jailer::survey(&installation.vmm, Owner::Command(home))
        .context("cannot find out how sandboxes can be kept apart here")?;
    tracing::info!(%reach, "jail around each sandbox");
    Ok(jailer)
}
