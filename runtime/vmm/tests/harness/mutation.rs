//! Hostile snapshot files: a good one, changed by dice, its digests made right again if wanted. Shared by the tests that need
//! no KVM and those that do; it knows the format by FORMAT.md alone, not by the code that it is to test.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use thaw_fuzz::Dice;

const FIXED: usize = 32;
const LINE: usize = 64;
const PAGE: u64 = 4096;
/// Most bytes of a sparse section that are hashed anew: what claims to be longer keeps its digest.
const HASHED_MAX: u64 = 8 << 20;
/// Numbers at which code goes wrong.
const EDGES: [u64; 18] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    511,
    512,
    4095,
    4096,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    u64::MAX - 4095,
    u64::MAX,
];

/// Offset and length, bytes.
pub type Place = (u64, u64);

/// A good snapshot file.
pub struct Original {
    length: u64,
    /// Header, section ends and stored pages: everything that is no hole.
    stored: Vec<(u64, Vec<u8>)>,
    pub sections: Vec<Section>,
    /// Bytes that are changed more often than others: small fields that large blobs would hide.
    pub hot: Vec<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    pub kind: u32,
    pub offset: u64,
    pub length: u64,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Where a sparse section's runs are.
fn runs_kind(kind: u32) -> Option<u32> {
    match kind {
        0x10 => Some(0x11),
        0x100..0x200 => Some(kind + 0x100),
        _ => None,
    }
}

fn read(file: &File, offset: u64, length: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

fn table(header: &[u8]) -> Vec<Section> {
    let count = (word(header, 24) as usize).min(60);
    let line = |at: usize| Section {
        kind: word(header, at),
        offset: long(header, at + 8),
        length: long(header, at + 16),
    };
    (0..count).map(|line_| line(FIXED + LINE * line_)).collect()
}

/// The byte ranges of a sparse section that are stored, if its list makes sense.
fn ranges(file: &File, section: Section, sections: &[Section]) -> Option<(Vec<Place>, Vec<u8>)> {
    let kind = runs_kind(section.kind)?;
    let runs = sections.iter().find(|other| other.kind == kind)?;
    if runs.length > HASHED_MAX {
        return None;
    }
    let list = read(file, runs.offset, runs.length)?;
    let mut total = 0u64;
    let range = |pair: &[u8]| {
        let start = long(pair, 0)
            .checked_mul(PAGE)?
            .checked_add(section.offset)?;
        let length = long(pair, 8).checked_mul(PAGE)?;
        total = total
            .checked_add(length)
            .filter(|total| *total <= HASHED_MAX)?;
        Some((start, length))
    };
    let ranges = list.chunks_exact(16).map(range).collect::<Option<_>>()?;
    Some((ranges, list))
}

/// Makes every digest right that can be: of sections, then of the header.
pub fn redigest(file: &File) {
    let Some(mut header) = read(file, 0, PAGE) else {
        return;
    };
    let sections = table(&header);
    for (line, section) in sections.iter().enumerate() {
        let mut hasher = blake3::Hasher::new();
        let done = match runs_kind(section.kind) {
            Some(_) => ranges(file, *section, &sections).is_some_and(|(ranges, list)| {
                let mut hash = |(start, length): &(u64, u64)| {
                    read(file, *start, *length).is_some_and(|bytes| {
                        hasher.update(&bytes);
                        true
                    })
                };
                let whole = ranges.iter().all(&mut hash);
                hasher.update(&list);
                whole
            }),
            None if section.length <= HASHED_MAX => read(file, section.offset, section.length)
                .is_some_and(|bytes| {
                    hasher.update(&bytes);
                    true
                }),
            None => false,
        };
        if done {
            let at = FIXED + LINE * line + 24;
            header[at..at + 32].copy_from_slice(hasher.finalize().as_bytes());
        }
    }
    let end = FIXED + LINE * sections.len();
    let digest = *blake3::hash(&header[..end]).as_bytes();
    header[end..end + 32].copy_from_slice(&digest);
    file.write_all_at(&header, 0).unwrap();
}

impl Original {
    pub fn of(file: &File) -> Self {
        let header = read(file, 0, PAGE).unwrap();
        let sections = table(&header);
        let mut stored = vec![(0, header)];
        for section in &sections {
            match ranges(file, *section, &sections) {
                Some((ranges, _)) => stored.extend(
                    ranges
                        .iter()
                        .map(|(start, length)| (*start, read(file, *start, *length).unwrap())),
                ),
                None if runs_kind(section.kind).is_none() => {
                    let bytes = read(file, section.offset, section.length).unwrap();
                    stored.push((section.offset, bytes));
                }
                None => panic!("{section:?} is too long"),
            }
        }
        let length = file.metadata().unwrap().len();
        Self {
            length,
            stored,
            sections,
            hot: Vec::new(),
        }
    }

    /// The header and the sections of these kinds alone, all of them hot: for a file whose memory is too much to be held.
    pub fn state_of(file: &File, kinds: &[u32]) -> Self {
        let header = read(file, 0, PAGE).unwrap();
        let mut sections = table(&header);
        sections.retain(|section| kinds.contains(&section.kind));
        let hot: Vec<_> = (sections.iter())
            .map(|section| (section.offset, section.length))
            .collect();
        let bytes =
            |(offset, length): &(u64, u64)| (*offset, read(file, *offset, *length).unwrap());
        let mut stored = vec![(0, header)];
        stored.extend(hot.iter().map(bytes));
        Self {
            length: file.metadata().unwrap().len(),
            stored,
            sections,
            hot,
        }
    }

    /// Makes what is held good again.
    pub fn restore(&self, file: &File) {
        for (offset, bytes) in &self.stored {
            file.write_all_at(bytes, *offset).unwrap();
        }
    }

    /// Makes `file` the good one again, of which all is held.
    pub fn write(&self, file: &File) {
        file.set_len(0).unwrap();
        file.set_len(self.length).unwrap();
        self.restore(file);
    }

    /// Changes something within `length` bytes at `offset`, which hold what a program decodes; tells what.
    pub fn change_field(
        &self,
        file: &File,
        (offset, length): (u64, u64),
        dice: &mut Dice,
    ) -> String {
        let length = length.max(1);
        let at = offset + dice.any() % length;
        let left = offset + length - at;
        let write = |bytes: &[u8]| {
            let count = bytes.len().min(usize::try_from(left).unwrap());
            file.write_all_at(&bytes[..count], at).unwrap();
        };
        match dice.index(7) {
            0..=2 => {
                let mut byte = [0];
                // Behind a cut that another change has made there is nothing to flip.
                let _ = file.read_exact_at(&mut byte, at);
                byte[0] ^= 1 << dice.index(8);
                write(&byte);
                format!("bit of {at}")
            }
            3 => {
                // The longest number as postcard spells it, and an overlong one.
                let end = *dice.pick(&[0x01, 0x02, 0x7f, 0xff]);
                write(&[[0xff; 9].as_slice(), &[end]].concat());
                format!("varint at {at}")
            }
            4 => {
                let noise = dice.any().to_le_bytes();
                write(&noise[..1 + dice.index(8)]);
                format!("noise at {at}")
            }
            _ => {
                let (edge, width) = (*dice.pick(&EDGES), *dice.pick(&[1, 2, 4, 8]));
                write(&edge.to_le_bytes()[..width]);
                format!("{edge:#x} of {width} bytes at {at}")
            }
        }
    }

    /// Changes a line of the section table.
    fn change_line(&self, file: &File, dice: &mut Dice) -> String {
        let line = dice.index(self.sections.len());
        let start = (FIXED + LINE * line) as u64;
        let (name, at, width) = *dice.pick(&[
            ("kind", 0, 4),
            ("flags", 4, 4),
            ("offset", 8, 8),
            ("length", 16, 8),
            ("length", 16, 8),
            ("reserved", 56, 8),
        ]);
        let old = read(file, start + at, 8).map_or(0, |bytes| long(&bytes, 0));
        let other = self.sections[dice.index(self.sections.len())];
        let value = match dice.index(4) {
            0 => *dice.pick(&EDGES),
            1 => old.wrapping_add(*dice.pick(&[1, 16, PAGE, u64::MAX, u64::MAX - 15])),
            2 if name == "kind" => {
                *dice.pick(&[0, 4, 5, 6, 0x10, 0x11, 0x102, 0x1ff, 0x202, 1 << 31])
            }
            _ => match name {
                "kind" => other.kind.into(),
                "offset" => other.offset,
                _ => other.length,
            },
        };
        file.write_all_at(&value.to_le_bytes()[..width], start + at)
            .unwrap();
        format!("{name} of line {line}: {value:#x}")
    }

    /// Exchanges two sections: where they lie, or their places in the table.
    fn swap(&self, file: &File, dice: &mut Dice) -> String {
        let (one, other) = (
            dice.index(self.sections.len()),
            dice.index(self.sections.len()),
        );
        let from = *dice.pick(&[0, 8]);
        let place = |line: usize| (FIXED + LINE * line + from) as u64;
        let length = (LINE - from) as u64;
        let lines = [one, other].map(|line| read(file, place(line), length));
        if let [Some(first), Some(second)] = lines {
            file.write_all_at(&second, place(one)).unwrap();
            file.write_all_at(&first, place(other)).unwrap();
        }
        format!("lines {one} and {other} swapped from {from}")
    }

    /// Changes the file in one way or another; tells how.
    pub fn mutate(&self, file: &File, dice: &mut Dice) -> String {
        match dice.index(16) {
            0 => {
                let cut = match dice.index(3) {
                    0 => dice.any() % self.length,
                    1 => *dice.pick(&[0, 1, 31, 32, PAGE - 1, PAGE, self.length - PAGE]),
                    _ => self.length + *dice.pick(&[1, PAGE]),
                };
                file.set_len(cut).unwrap();
                // A header that agrees, half of the time.
                if dice.index(2) == 0 && cut >= PAGE {
                    file.write_all_at(&cut.to_le_bytes(), 16).unwrap();
                }
                format!("cut to {cut}")
            }
            1 => self.change_field(file, (0, FIXED as u64), dice),
            2 => self.change_line(file, dice),
            3 => self.swap(file, dice),
            4 => {
                // A piece of one section over another.
                let (from, to) = (*dice.pick(&self.sections), *dice.pick(&self.sections));
                let count = from.length.min(to.length).min(1 + dice.any() % 512);
                if let Some(bytes) = read(file, from.offset, count) {
                    let at = to.offset + dice.any() % (to.length - count + 1);
                    file.write_all_at(&bytes, at).unwrap();
                }
                format!("{count} bytes of {:#x} over {:#x}", from.kind, to.kind)
            }
            5..=11 if !self.hot.is_empty() => {
                let place = *dice.pick(&self.hot);
                self.change_field(file, place, dice)
            }
            _ => {
                let section = *dice.pick(&self.sections);
                let place = (section.offset, section.length.min(HASHED_MAX));
                let told = self.change_field(file, place, dice);
                format!("section {:#x}: {told}", section.kind)
            }
        }
    }
}
