//! Disks: requests that are right, nearly right and wrong, and what is on the disk afterwards.

use thaw_fuzz::{Campaign, Dice};

use super::chains::bring_up;
use super::machine::{DISK_SECTORS, Machine};
use super::ring::Want;
use super::{DEVICES, Device};
use crate::devices::tests::driver::{COW, pattern};

const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

fn sector(dice: &mut Dice) -> u64 {
    match dice.range(0, 9) {
        0 => dice.edge(64),
        1 => DISK_SECTORS as u64 - dice.range(0, 2),
        _ => dice.range(0, DISK_SECTORS as u64 - 1),
    }
}

/// Cuts bytes into buffers of any length.
fn cut(dice: &mut Dice, bytes: Vec<u8>) -> Vec<Want> {
    let mut rest = &bytes[..];
    let mut wants = Vec::new();
    while !rest.is_empty() && wants.len() < 5 {
        let length = if dice.in_thousand(400) {
            dice.index(rest.len() + 1)
        } else {
            rest.len()
        };
        let (part, after) = rest.split_at(length);
        wants.push(Want::Out(part.to_vec()));
        rest = after;
    }
    if !rest.is_empty() {
        wants.push(Want::Out(rest.to_vec()));
    }
    wants
}

/// A request that a driver might make, whatever comes of it.
pub fn request(dice: &mut Dice, _: u32) -> Vec<Want> {
    let kind = match dice.range(0, 9) {
        0..=3 => IN,
        4..=7 => OUT,
        8 => *dice.pick(&[4, GET_ID, 11, 13]),
        _ => dice.edge(32) as u32,
    };
    let sector = sector(dice);
    let length = match dice.range(0, 5) {
        0 => dice.index(3000),
        _ => 512 * dice.index(9),
    };
    let mut out = header(kind, sector);
    let mut wants = Vec::new();
    if kind == OUT {
        out.extend(dice.bytes(length));
    } else {
        wants.push(Want::In(length));
    }
    let mut all = cut(dice, out);
    all.append(&mut wants);
    if dice.in_thousand(980) {
        all.push(Want::In(1));
    }
    all
}

fn play(dice: &mut Dice) {
    let mut machine = Machine::new();
    let device: &Device = DEVICES.iter().find(|device| device.window == COW).unwrap();
    let mut ring = bring_up(&mut machine, dice, device).remove(0);
    let mut content = pattern(DISK_SECTORS);
    for _ in 0..dice.range(1, 20) {
        let (sector, length) = (sector(dice), 512 * dice.index(9));
        let is_write = dice.in_thousand(500);
        let bytes = dice.bytes(if is_write { length } else { 0 });
        let mut out = header(if is_write { OUT } else { IN }, sector);
        out.extend(&bytes);
        let mut wants = cut(dice, out);
        if !is_write {
            wants.push(Want::In(length));
        }
        wants.push(Want::In(1));
        let place = loop {
            let place = ring.offer(&machine, dice, &wants).buffers;
            if is_apart(&place) {
                break place;
            }
            // Written to by the device and read by it: the outcome is the driver's own fault. It is served all the same.
            machine.serve(COW);
            if ring.waiting(&machine) > 0 || is_write {
                return;
            }
        };
        machine.serve(COW);
        assert!(!machine.is_broken(COW), "a whole request is never refused");
        let status = machine.peek(place[place.len() - 1].0, 1)[0];
        let start = usize::try_from(sector)
            .ok()
            .and_then(|sector| sector.checked_mul(512));
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        match range.filter(|range| range.end <= content.len()) {
            None => {
                assert_eq!(status, 1, "beyond the disk");
                dice.saw("refused");
            }
            Some(range) if is_write => {
                assert_eq!(status, 0);
                content[range].copy_from_slice(&bytes);
                dice.saw("written");
            }
            Some(range) => {
                assert_eq!(status, 0);
                let (address, length) = place[place.len() - 2];
                assert_eq!(
                    machine.peek(address, length),
                    content[range],
                    "read at {sector}"
                );
                dice.saw("read");
            }
        }
    }
    let mut found = vec![0; content.len()];
    machine
        .guest
        .devices
        .disk_read_at(COW, 0, &mut found)
        .unwrap();
    assert_eq!(found, content, "the disk is what was written to it");
    assert!(machine.guest.devices.disk_written_bytes() <= content.len() as u64);
}

/// Whether no two buffers of a request overlap.
fn is_apart(buffers: &[(u64, usize)]) -> bool {
    let mut buffers: Vec<_> = buffers.iter().filter(|(_, length)| *length > 0).collect();
    buffers.sort_unstable();
    buffers
        .windows(2)
        .all(|pair| pair[0].0 + pair[0].1 as u64 <= pair[1].0)
}

#[test]
fn disk_requests_of_any_shape_change_what_they_say_and_nothing_else() {
    let name = "disk_requests_of_any_shape_change_what_they_say_and_nothing_else";
    Campaign::new(env!("CARGO_PKG_NAME"), name, 1000)
        .must_see(&["read", "written", "refused"])
        .play(play);
}
