//! The guest's network: the interface `eth0`, the same in every guest that has one ([`thaw_agent_protocol::network`]). It is set up
//! once, before the function's runtime starts, and is part of the snapshot: a clone has it without a step of its own.
//!
//! The gateway is entered as a neighbour, so that a clone's first packet waits for nobody. There is no IPv6: what is outside
//! speaks none, and a router that announced itself would be an impostor.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use thaw_agent_protocol::network::{
    AUTHORITIES_FILE, DNS_ADDRESS, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, NETMASK,
};

use crate::boot::{BootError, step};
use crate::sys::interface;

/// Where the kernel lists the devices of its virtio bus.
pub const DEVICES: &str = "/sys/bus/virtio/devices";
const INTERFACE: &str = "eth0";
const NO_IPV6: &str = "/proc/sys/net/ipv6/conf/eth0/disable_ipv6";
const RESOLVER: &str = "/etc/resolv.conf";
/// Virtio device type of a network device (virtio 1.2, section 5), as a `device` file has it.
const NETWORK_DEVICE: &str = "0x0001";

/// Whether one of the devices in `folder` is a network device.
///
/// # Errors
/// The folder or a file in it cannot be read. A kernel without the bus has no devices.
pub fn has_device(folder: &Path) -> Result<bool, BootError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => step("listing", folder, other)?,
    };
    for entry in entries {
        let file = step("listing", folder, entry)?.path().join("device");
        let device = step("reading", &file, fs::read_to_string(&file))?;
        if device.trim() == NETWORK_DEVICE {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Sets up the interface and the resolver, and adds an authority to those that programs trust. Only PID 1 of a guest may call it, once, after [`crate::boot::boot`].
///
/// # Errors
/// There is no interface, or a step that the kernel refused.
pub fn set_up(authority: Option<&str>) -> Result<(), BootError> {
    match fs::write(NO_IPV6, "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => step("turning off", NO_IPV6, other)?,
    }
    let address = interface::set_address(INTERFACE, GUEST_ADDRESS, NETMASK);
    step("giving its address to", INTERFACE, address)?;
    step("bringing up", INTERFACE, interface::up(INTERFACE))?;
    let neighbour = interface::add_neighbour(INTERFACE, GATEWAY_ADDRESS, GATEWAY_MAC);
    step("entering the gateway beside", INTERFACE, neighbour)?;
    let route = interface::add_default_route(GATEWAY_ADDRESS);
    step("routing everything to", INTERFACE, route)?;
    write_resolver(Path::new(RESOLVER))?;
    match authority {
        Some(certificate) => trust(Path::new(AUTHORITIES_FILE), certificate),
        None => Ok(()),
    }
}

/// Behind those that are there; an image without any gets the file.
fn trust(file: &Path, certificate: &str) -> Result<(), BootError> {
    if let Some(folder) = file.parent() {
        step("making", folder, fs::create_dir_all(folder))?;
    }
    let opened = OpenOptions::new().append(true).create(true).open(file);
    let mut bundle = step("opening", file, opened)?;
    let text = format!("\n{}\n", certificate.trim_end());
    step("writing", file, bundle.write_all(text.as_bytes()))
}

/// An image's own file may be a link to what another init would have written: it is replaced.
fn write_resolver(file: &Path) -> Result<(), BootError> {
    match fs::remove_file(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => step("removing", file, other)?,
    }
    let text = format!("nameserver {DNS_ADDRESS}\n");
    step("writing", file, fs::write(file, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_device_is_known_by_its_type() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!has_device(&folder.path().join("absent")).unwrap());
        for (name, device) in [("virtio0", "0x0002\n"), ("virtio1", "0x0013\n")] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("device"), device).unwrap();
        }
        assert!(!has_device(folder.path()).unwrap());
        fs::create_dir(folder.path().join("virtio2")).unwrap();
        assert!(
            has_device(folder.path()).is_err(),
            "what cannot be read is not taken for nothing"
        );
        fs::write(folder.path().join("virtio2/device"), "0x0001\n").unwrap();
        assert!(has_device(folder.path()).unwrap());
    }

    #[test]
    fn the_resolver_replaces_a_link_and_not_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let (file, target) = (
            folder.path().join("resolv.conf"),
            folder.path().join("stub"),
        );
        fs::write(&target, "nameserver 8.8.8.8\n").unwrap();
        std::os::unix::fs::symlink(&target, &file).unwrap();
        write_resolver(&file).unwrap();
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            "nameserver 172.31.255.1\n"
        );
        assert!(fs::read_to_string(&target).unwrap().contains("8.8.8.8"));
        write_resolver(&file).unwrap();
    }

    #[test]
    fn an_authority_comes_behind_those_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("certs/all.crt");
        trust(&file, "-one-\n").unwrap();
        trust(&file, "-two-").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "\n-one-\n\n-two-\n");
    }
}
